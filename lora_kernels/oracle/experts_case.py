"""Calls of `lora_experts_linear`, which `case.judge` judges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..backends import library
from ..backends.eager.quantized_stack import ALIGNED
from ..choice import choose as selection
from ..ops.experts import lora_experts_linear
from ..quantization import QuantizedWeight
from . import case as cases
from . import reference
from .case import Allowances, AnyCase, Case, Source


def plain_pytorch(*, weight: Any, is_transposed: bool, **others: Any) -> Tensor:
    """Compute the layer without this package, as a loop over experts."""
    others = _stacked(others)
    x, dtype = others["x"], others["x"].dtype
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize(dtype)
    weight = weight.mT if is_transposed else weight
    A, B, bias = others["lora_A"], others["lora_B"], others["bias"]
    weight, bias = (_repeat_for_tenants(t, A) for t in (weight, bias))
    wide_dtype = torch.promote_types(dtype, A.dtype)
    dropped = cases.masked(x, others["rng"], others["dropout_p"]).to(wide_dtype)
    parts, start = [], 0
    for e, stop in enumerate(others["offsets"].tolist()):
        s = dropped[start:stop] @ A[e].to(wide_dtype).T * others["scaling"]
        y = (x[start:stop] @ weight[e].T + s @ B[e].to(wide_dtype).T).to(dtype)
        parts.append(y if bias is None else y + bias[e])
        start = stop
    return torch.cat([*parts, x.new_zeros(x.shape[0] - start, weight.shape[1])])


def narrow_pytorch(**args: Any) -> Tensor:
    """Compute the layer with an adapter in x's dtype, as the eager backend's `grouped_mm` does."""
    args = _stacked(args)
    adapter = {name: args[name].to(args["x"].dtype) for name in ("lora_A", "lora_B")}
    return plain_pytorch(**{**args, **adapter})


def folded_pytorch(*, weight: Any, is_transposed: bool, **others: Any) -> Tensor:
    """Compute the layer by W + s·B·A in x's dtype, as PEFT does."""
    dtype = others["x"].dtype
    weight = weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight
    A, B = (others[name].to(dtype) for name in ("lora_A", "lora_B"))
    folded = torch.baddbmm(weight.mT if is_transposed else weight, B, A, alpha=others["scaling"])
    parts, start = [], 0
    for e, stop in enumerate(others["offsets"].tolist()):
        y = others["x"][start:stop] @ folded[e].T
        parts.append(y if others["bias"] is None else y + others["bias"][e])
        start = stop
    return torch.cat([*parts, y.new_zeros(others["x"].shape[0] - start, folded.shape[1])])


def _stacked(args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with the tenants' tensors in one, padded with zeros."""
    if isinstance(args["lora_A"], Tensor):
        return args
    first, R = args["scaling"][0], max(A.shape[1] for A in args["lora_A"])
    lora_A = [functional.pad(A, (0, 0, 0, R - A.shape[1])) for A in args["lora_A"]]
    lora_B = [
        functional.pad(B * (factor / first), (0, R - B.shape[2]))
        for B, factor in zip(args["lora_B"], args["scaling"], strict=True)
    ]
    A, B = (torch.stack(tensors, 1).flatten(0, 1) for tensors in (lora_A, lora_B))
    return {**args, "lora_A": A, "lora_B": B, "scaling": first}


def _repeat_for_tenants(t: Any, lora_A: Tensor) -> Any:
    """Repeat each expert's weight or bias once for each of its tenants."""
    return None if t is None else t.repeat_interleave(lora_A.shape[0] // t.shape[0], 0)


@dataclass(frozen=True)
class ExpertsCase(AnyCase):
    """A call of `lora_experts_linear`.

    >>> case = ExpertsCase((3, 0, 5), N=33, K=17, R=3)
    >>> all(verdict.ok for verdict in cases.judge(case).values())
    True
    """

    rows: tuple[int, ...]  # of each expert, or of each expert's tenants
    N: int
    K: int
    R: int
    tail: int = 2  # rows of no expert
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    transposed: bool = False
    bias: bool = True
    peft_layout: bool = False  # of lora_B
    tenants: int = 1
    ranks: tuple[int, ...] = ()  # of each tenant, if its tensors are its own; R is the largest

    op = staticmethod(lora_experts_linear)

    @property
    def M(self) -> int:  # type: ignore[override]
        return sum(self.rows) + self.tail

    @property
    def experts(self) -> int:
        return len(self.rows) // self.tenants

    @property
    def is_folded(self) -> bool:
        """True if the engine in force computes W + s·B·A."""
        if self.tenants > 1 or self.dropout_p or not self.is_grouped:
            return False
        return 2 * self.experts * self.N * self.K < self.M * (self.N + self.K)

    @property
    def is_grouped(self) -> bool:
        """True if the engine in force runs the case in GEMMs of all experts."""
        if selection.forced_backend() != "eager" or not library.is_on_gpu_path("cpu"):
            return False
        if self.quant and self.experts > self.M:
            return self.N * self.K % int(self.quant.split("-")[1]) == 0
        if self.quant and self.dtype is not torch.bfloat16:
            return False
        return all(n * self.dtype.itemsize % ALIGNED == 0 for n in (self.N, self.K, self.R))

    def draw(self, source: Source) -> dict[str, Any]:
        E, M, N, K, adapter = self.experts, self.M, self.N, self.K, self.adapter_dtype or self.dtype
        shape = (E, K, N) if self.transposed else (E, N, K)
        weight = source.weight(shape, K**-0.5, self.dtype)

        def draw_B(groups: int, R: int) -> Tensor:
            shape = (N, R, groups) if self.peft_layout else (groups, N, R)
            B = source(shape, max(R, 1) ** -0.5, adapter)
            return B.permute(2, 0, 1) if self.peft_layout else B

        def draw_A(groups: int, R: int) -> Tensor:
            return source((groups, R, K), K**-0.5, adapter)

        G, scaling = len(self.rows), 2.0 if self.values == "integers" else 1.25
        lora_B = [draw_B(E, R) for R in self.ranks] or draw_B(G, self.R)
        return {
            "x": source((M, K), 1.0, self.dtype),
            "weight": weight,
            "lora_A": [draw_A(E, R) for R in self.ranks] or draw_A(G, self.R),
            "lora_B": lora_B,
            "offsets": torch.tensor(self.rows).cumsum(0).to(self.device),
            "scaling": [scaling * 2.0**t for t in range(len(self.ranks))] or scaling,
            "bias": source((E, N), 1.0, self.dtype) if self.bias else None,
            "is_transposed": self.transposed,
            "dy": source((M, N), 1.0, self.dtype),
        }

    @staticmethod
    def equation(*, weight: Tensor, is_transposed: bool, **others: Any) -> Tensor:
        """Call the reference, which takes weights [E, N, K] and one tensor for all tenants."""
        others = _stacked(others)
        weight = weight.mT if is_transposed else weight
        weight, others["bias"] = (
            _repeat_for_tenants(t, others["lora_A"]) for t in (weight, others["bias"])
        )
        return reference.lora_experts_linear(weight=weight, **others)

    @property
    def eager(self) -> Callable[..., Tensor]:  # type: ignore[override]
        if self.is_folded:
            return folded_pytorch
        return narrow_pytorch if self.is_grouped else plain_pytorch

    def allowances(self) -> Allowances:
        adapter = self.dtype if self.is_grouped else self.adapter_dtype
        return Case(self.M, self.N, self.K, self.R, self.dtype, adapter).allowances()
