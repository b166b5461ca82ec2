"""One call of `multi_lora_linear` with all its gradients, judged as `case.judge` does a layer's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..core import reference
from ..core.call import MultiOperands
from ..quantization import Weight4bit
from . import case as cases
from .case import Case, Expected
from .tolerance import Verdict


@dataclass(frozen=True)
class MultiCase:
    """The fields that determine every number that `inputs` draws."""

    M: int
    N: int
    K: int
    ranks: tuple[int, ...] = (3, 5, 8, 1)  # of each adapter
    rows: str = "grouped"  # by adapter, or "mixed"; some rows have no adapter
    dtype: torch.dtype = torch.float32  # of x, weight and bias
    adapter_dtype: torch.dtype | None = None  # of A and B; None for x's
    quant: str = ""  # as `Case.quant`
    base: bool = True
    bias: bool = True
    dropout_p: float = 0.0
    values: str = "normal"  # or "nonnegative"
    frozen: tuple[str, ...] = ()
    device: str = "cpu"  # where it runs; the numbers are drawn on the CPU
    seed: int = 0

    def __str__(self) -> str:
        return cases.describe(self)


def inputs(case: MultiCase) -> dict[str, Any]:
    """Return the arguments of `multi_lora_linear` and `dy`. Tensors with a gradient require it.

    With three adapters or more, no row has the last but one.
    """
    generator = torch.Generator().manual_seed(case.seed)
    draw = cases.random_source(case.values, generator)
    M, N, K, E = case.M, case.N, case.K, len(case.ranks)
    adapter_dtype = case.adapter_dtype or case.dtype
    index = torch.randint(-1, E, (M,), generator=generator)
    if E > 2:
        index[index == E - 2] = E - 1
    if case.rows == "grouped":  # in descending order, unlike the adapters
        index = index.sort(descending=True).values
    weight: Any = draw((N, K), K**-0.5, case.dtype) if case.base else None
    args: dict[str, Any] = {
        "x": draw((M, K), 1.0, case.dtype),
        "weight": cases.quantize(weight, case.quant) if case.quant else weight,
        "lora_A": [draw((R, K), K**-0.5, adapter_dtype) for R in case.ranks],
        "lora_B": [draw((N, R), R**-0.5, adapter_dtype) for R in case.ranks],
        "index": index,
        "scaling": [1.25 + e / 2 for e in range(E)],
        "bias": draw((N,), 1.0, case.dtype) if case.bias else None,
        "dropout_p": case.dropout_p,
        "rng": cases.dropout_state(case.seed) if case.dropout_p else None,
        "dy": draw((M, N), 1.0, case.dtype),
    }
    args = {name: _moved(arg, case.device) for name, arg in args.items()}
    for name in ("x", "lora_A", "lora_B", "bias"):
        for t in args[name] if isinstance(args[name], list) else [args[name]]:
            if t is not None:
                t.requires_grad_(name not in case.frozen)
    return args


def _moved(arg: Any, device: str) -> Any:
    """Return a tensor, a list of tensors or a 4-bit weight on the device; numbers unchanged."""
    if isinstance(arg, list):
        return [_moved(each, device) for each in arg]
    return arg.to(device) if isinstance(arg, Tensor | Weight4bit) else arg


def plain_pytorch(
    *, index: Tensor, scaling: list[float], dropout_p: float, **tensors: Any
) -> Tensor:
    """Compute y as PEFT does: a loop over adapters, each on its own rows.

    tensors: the other fields of `MultiOperands`.
    """
    weight: Any
    x, weight, lora_A, lora_B, _, bias, rng = MultiOperands(adapter_index=index, **tensors)
    wide = torch.promote_types(x.dtype, lora_A[0].dtype)
    dropped = cases.masked(x, rng, dropout_p)
    if weight is None:
        weight = x.new_zeros(lora_B[0].shape[0], x.shape[1])
    if isinstance(weight, Weight4bit):
        weight = weight.dequantize(x.dtype)
    y = torch.nn.functional.linear(x, weight, bias)
    for e, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        rows = (index == e).nonzero()[:, 0]
        s = (dropped[rows].to(wide) @ A.to(wide).T) * scaling[e]
        y = y.index_put((rows,), (y[rows] + s @ B.to(wide).T).to(y.dtype))
    return y


def judge(
    case: MultiCase, call: Callable[..., Tensor] = functional.multi_lora_linear
) -> dict[str, Verdict]:
    """Run `call` on the case; return a verdict for y and for each gradient.

    >>> all(verdict.ok for verdict in judge(MultiCase(M=9, N=33, K=17)).values())
    True
    """

    def make(case: MultiCase) -> Expected:
        args = inputs(case)
        ref = cases.oracle(args, reference.multi_lora_linear)
        return Expected(args, ref, cases.run(plain_pytorch, args))

    found = cases.expected(case, case.M * sum(case.ranks) // len(case.ranks), make)
    # y and dx include the base GEMM, to which the update is added in place.
    like = Case(case.M, case.N, case.K, 1, case.dtype, case.adapter_dtype, device=case.device)
    return cases.verdicts(found, call, like)
