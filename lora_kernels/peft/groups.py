"""Groups: layers that a module's forward calls with one x, such as q, k and v.

`fuse` reads the forward's source once. On the eager backend's GPU path, for more than `MANY_ROWS`
rows, the first layer's call computes the results of all layers (`ops.blocks`). The call of another
layer returns its result if x, the thread's state and the layer's tensors are unchanged. Otherwise
the layer computes its own result. A thread stores the results of one group at a time. The next call
of any grouped layer drops the unused ones, and so does the end of x.

The results have one graph, which saves bytes of dx. If x needs no gradient in training, each layer
computes its own result, so that each has a graph of its own. Without gradients a group saves reads
of x.

A write to x, or to a later layer's tensors, goes unnoticed between two calls if it does not move a
version counter: by `.data`, NumPy or DLPack, or by the step of a fused optimizer.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _get_dispatch_stack_at, _len_torch_dispatch_stack
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import peek_interpreter_stack

from ..backends.eager.products import MANY_ROWS
from ..core import forced
from ..core.record import PLAIN
from ..ops import blocks
from . import direct


class _Results(NamedTuple):
    """The results that the first call of a group computed for the others.

    Args:
        x: a weak reference. The end of x empties `pending`.
        call_state: `_call_state` of x.
        pending: (layer, state, stamp of the state, y) of each layer that was not called yet, the
            next layer last.
    """

    x: weakref.ref[Tensor]
    call_state: tuple[object, ...]
    pending: list[tuple[Any, Any, int, Tensor]]


class _Local(threading.local):
    results: _Results | None = None


_local = _Local()


class Group:
    """The layers of one module that its forward calls with one x, in the order of the calls.

    A copy of a model has copies of its groups. A copy of a group has no layers, and the copy of
    each layer joins it. So a layer that is copied alone takes no other layer along.

    Args:
        layers: fused layers. In the group of a copied layer, None for those that were not copied.
        names: their names in the module.
    """

    def __init__(self, layers: list[Any], names: list[str]) -> None:
        self.layers, self.names, self.in_features = layers, names, layers[0].in_features

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"layers": [None] * len(self.layers)}

    def call(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return y of one of the layers; None if the layer has to compute y itself."""
        results = _local.results
        if results is not None:
            _local.results = None
            y = _take_result(results, layer, x)
            if y is not None:
                if results.pending:
                    _local.results = results
                return y
        layers = self.layers
        if layer is not layers[0] or x.numel() <= MANY_ROWS * self.in_features:
            return None
        if torch.is_grad_enabled() and not x.requires_grad:
            return None
        if not blocks.can_run(x) or torch.is_inference_mode_enabled() or x.is_inference():
            return None  # inference tensors have no version counter
        for member in layers:
            if member is None or member.__dict__.get("_group") is not self:
                return None
            if member is not layer and direct.is_hooked(member):
                return None
        block_and_states = direct.make_block(layers, x)
        if block_and_states is None:
            return None
        block, states = block_and_states
        ys = blocks.linears(x, block)
        grad_mode = torch.is_grad_enabled()
        pending = [
            (layers[i], states[i], _stamp(states[i], grad_mode), ys[i])
            for i in range(len(layers) - 1, 0, -1)
        ]
        x_ref = weakref.ref(x, lambda _: pending.clear())
        _local.results = _Results(x_ref, _call_state(x), pending)
        return ys[0]


def _call_state(x: Tensor) -> tuple[object, ...]:
    """Return what may change between two calls for x: x itself, and the state of the thread.

    It is x's version and whether x needs a gradient, the grad mode, autocast's dtype, the hooks of
    saved tensors, the innermost dispatch mode, the forced backend, and the current CUDA stream,
    which may not wait for another one.
    """
    depth = _len_torch_dispatch_stack()
    return (
        x._version,
        x.requires_grad,
        torch.is_grad_enabled(),
        blocks.cast_dtype(x),
        _top_saved_tensors_default_hooks(True),  # True: even while tracing
        _get_dispatch_stack_at(depth - 1) if depth else None,
        forced.current.get(),
        _stream(x),
    )


def _stream(x: Tensor) -> int | None:
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else None


def _stamp(state: Sequence[Any], grad_mode: bool) -> int:
    """Return a number that changes if a tensor of a layer's state is written, or frozen.

    It is the sum of the versions, which only grow. With gradients a bit for each tensor follows,
    whether it requires one. Returns -1, which matches nothing, if a tensor is an inference tensor,
    which has no version.
    """
    weight, lora_A, lora_B, bias = state[:4]
    others: Sequence[Tensor] = () if bias is None else (bias,)
    if len(state) > PLAIN:  # a `Record`, with scaling as a tensor or further operands
        others = (*others, *[t for t in state[4:] if isinstance(t, Tensor)])
    try:
        total: int = weight._version + lora_A._version + lora_B._version
        for t in others:
            total += t._version
    except RuntimeError:
        return -1
    if grad_mode:
        total = 8 * total + 4 * weight.requires_grad
        total += 2 * lora_A.requires_grad + lora_B.requires_grad
        for t in others:
            total = 2 * total + t.requires_grad
    return total


def _take_result(results: _Results, layer: Any, x: Tensor) -> Tensor | None:
    """Return the result that the group's first call computed for the layer.

    Returns None if x, the thread's state or the layer's tensors have changed since that call, or if
    a backward has run, which frees the graph.
    """
    x_ref, call_state, pending = results
    # There was no transform in the first call, since `can_run`, nor inference mode.
    if x_ref() is not x or torch.is_inference_mode_enabled() or call_state != _call_state(x):
        return None
    if peek_interpreter_stack() is not None:
        return None
    next_layer, state, stamp, y = pending.pop()
    grad_mode = torch.is_grad_enabled()
    if next_layer is not layer or (grad_mode and getattr(y.grad_fn, "has_run", False)):
        return None
    current_state = direct.read_state(layer, x)
    if (
        current_state is None
        or len(current_state) != len(state)
        or not all(map(is_, current_state, state))
    ):
        return None
    return y if 0 <= stamp == _stamp(current_state, grad_mode) else None


# Groups in a model


def add_groups(model: nn.Module) -> None:
    """Group the fused linear layers of each module whose forward calls them with one x."""
    for parent in model.modules():
        fused = {
            name: child
            for name, child in parent._modules.items()
            if getattr(type(child), "fits_blocks", False)
        }
        if len(fused) < 2:
            continue
        for names in shared_calls(type(parent), fused):
            group = Group([fused[name] for name in names], names)
            for layer in group.layers:
                layer.__dict__["_group"] = group


def remove_groups(model: nn.Module) -> None:
    """Undo `add_groups`."""
    for module in model.modules():
        module.__dict__.pop("_group", None)


def groups_of(model: nn.Module) -> Iterator[tuple[str, Group]]:
    """Yield the name of each module that has a group, and the group."""
    for name, module in model.named_modules():
        groups = [child.__dict__.get("_group") for child in module._modules.values() if child]
        yield from ((name, group) for group in dict.fromkeys(groups) if group is not None)


def shared_calls(cls: Any, layers: dict[str, Any]) -> list[list[str]]:
    """Return the names of the layers that the class's forward calls with one x, group by group.

    A layer joins a group if

    - the forward calls it exactly once, as `self.name(x)`, where x is a variable;
    - it has as many in-features as the group's first layer;
    - the call is outside of loops and nested functions;
    - each run that calls the group's first layer calls this layer later;
    - no assignment to that x, and no return, is in between.

    A layer with two names in the module is in no group.

    Args:
        cls: a class of modules. Without its source there is no group.
        layers: the children that may share x, by name.
    """
    ids = Counter(id(layer) for layer in layers.values())
    candidates: list[tuple[Any, Any, list[str]]] = []
    for name, (argument, branch) in _single_calls(cls.forward, frozenset(layers)).items():
        if ids[id(layers[name])] != 1:
            continue
        key = argument, layers[name].in_features
        for group_key, group_branch, names in candidates:
            if group_key == key and group_branch[: len(branch)] == branch:
                names.append(name)
                break
        else:
            candidates.append((key, branch, [name]))
    return [names for _, _, names in candidates if len(names) > 1]


@functools.cache
def _single_calls(forward: Any, names: frozenset[str]) -> dict[str, Any]:
    """Return the entries of `_ForwardReader.calls` whose names the forward uses nowhere else."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))
        function: Any = ast.parse(source).body[0]
        reader = _ForwardReader(function.args.args[0].arg, names)
    except (OSError, TypeError, SyntaxError, AttributeError, IndexError):
        return {}
    for statement in function.body:
        reader.visit(statement)
    return {name: call for name, call in reader.calls.items() if reader.uses[name] == 1}


class _ForwardReader(ast.NodeVisitor):
    """Finds the calls `self.name(x)` of the given names in a forward, in order.

    `uses` counts the expressions that may read the attribute of a name. `calls` has a pair for each
    name. Its first element is the argument's name, the number of assignments to the argument before
    the call, and the number of returns before the call: equal ones are the same value of x. The
    second is the branches around the call.
    """

    def __init__(self, self_name: str, names: frozenset[str]) -> None:
        self.self_name, self.names = self_name, names
        self.uses: Counter[str] = Counter()
        self.calls: dict[str, tuple[tuple[str, int, int], tuple[Any, ...]]] = {}
        self.assigned: Counter[str] = Counter()
        self.returns = 0
        self.branch: tuple[tuple[ast.AST, str], ...] = ()  # from the outermost
        self.depth = 0  # of nodes of _NOT_ONCE around the current one

    def generic_visit(self, node: ast.AST) -> None:
        is_not_once = isinstance(node, _NOT_ONCE)
        self.depth += is_not_once
        super().generic_visit(node)
        self.depth -= is_not_once

    def _visit_branches(self, node: Any) -> None:
        outer = self.branch
        for field, value in ast.iter_fields(node):
            self.branch = (*outer, (node, field))
            for child in value if isinstance(value, list) else [value]:
                self.visit(child)
        self.branch = outer

    visit_If = visit_IfExp = _visit_branches

    def _visit_assignment(self, node: Any) -> None:
        """Visit the value before the targets, in the order of execution."""
        if node.value is not None:
            self.visit(node.value)
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            self.visit(target)

    visit_Assign = visit_AugAssign = visit_AnnAssign = visit_NamedExpr = _visit_assignment

    def visit_Return(self, node: ast.Return) -> None:
        self.generic_visit(node)
        self.returns += 1

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, (ast.Store, ast.Del)):
            self.assigned[node.id] += 1

    def visit_Constant(self, node: ast.Constant) -> None:
        if node.value in self.names:  # getattr(self, "q_proj")
            self.uses[node.value] += 1

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in self.names:
            self.uses[node.attr] += 1
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        callee = node.func
        is_layer = isinstance(callee, ast.Attribute) and callee.attr in self.names
        if not is_layer or self.depth:
            return
        assert isinstance(callee, ast.Attribute)
        is_on_self = isinstance(callee.value, ast.Name) and callee.value.id == self.self_name
        if is_on_self and len(node.args) == 1 and not node.keywords:
            x = node.args[0]
            if isinstance(x, ast.Name):
                argument = x.id, self.assigned[x.id], self.returns
                self.calls[callee.attr] = argument, self.branch


# Nodes whose children may run several times or not at all. If and IfExp have branches instead.
_NOT_ONCE = (
    *(ast.For, ast.AsyncFor, ast.While, ast.Try, ast.Match, ast.BoolOp),
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)
