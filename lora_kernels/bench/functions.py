"""A function of somebody else's, for `verify --function` and `bench --baseline`.

It computes `lora_linear` of (x, weight, lora_A, lora_B, scaling, bias), called by position, and
brings its backward. bias is left out for a function of five arguments; a parameter named rank_gate
or column_scale is given by its name.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

REQUIRED = ("x", "weight", "lora_A", "lora_B", "scaling")
BY_NAME = ("rank_gate", "column_scale")


class Function(NamedTuple):
    """A function, and the operands that it takes beside `REQUIRED`."""

    name: str  # module:name
    call: Callable[..., Tensor]
    operands: frozenset[str]

    def __call__(self, **arguments: Any) -> Tensor:
        """Call it with arguments of `lora_linear`."""
        given = [arguments[name] for name in REQUIRED]
        if "bias" in self.operands:
            given.append(arguments.get("bias"))
        by_name = {name: arguments.get(name) for name in BY_NAME if name in self.operands}
        return self.call(*given, **by_name)


def load(path: str) -> Function:
    """Import the function that "module:name" names; the current folder is looked in first.

    Raises ValueError, which says what is wrong, in one line, also for an error of the module's own.

    >>> load("textwrap:dedent")
    Traceback (most recent call last):
      ...
    ValueError: got dedent(text), want a function of x, weight, lora_A, lora_B, scaling and bias
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"got {path!r}, want module:name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(one_line(error)) from error
    for part in name.split("."):
        if not hasattr(value, part):
            raise ValueError(f"got {path!r}, want a name in {module_name}, which has no {part}")
        value = getattr(value, part)
    if not callable(value):
        raise ValueError(f"got {type(value).__name__} {path}, want a function")
    return Function(path, value, _operands_of(value))


def one_line(error: Exception) -> str:
    """Return the error's class and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _operands_of(function: Callable[..., Any]) -> frozenset[str]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a compiled extension
        return frozenset({"bias"})
    parameters = signature.parameters.values()
    taken = {name for name in BY_NAME if name in signature.parameters}
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = [p for p in parameters if p.kind in positional and p.name not in BY_NAME]
    takes_any = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    required = [p for p in parameters if p.default is p.empty and p.name not in taken]
    required = [p for p in required if p.kind in (*positional, inspect.Parameter.KEYWORD_ONLY)]
    if not takes_any and (len(first) < len(REQUIRED) or len(required) > len(REQUIRED) + 1):
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(
            f"got {name}{signature}, want a function of x, weight, lora_A, lora_B, scaling and bias"
        )
    if takes_any or len(first) > len(REQUIRED):
        taken.add("bias")
    return frozenset(taken)
