"""Calls of `multi_lora_linear`, which `case.judge` judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.call import MultiOperands
from ..ops.multi import multi_lora_linear
from ..quantization import QuantizedWeight
from . import case as cases
from . import reference
from .case import Allowances, AnyCase, Case, Source


def plain_pytorch(
    *, index: Tensor, scaling: list[float], dropout_p: float, **tensors: Any
) -> Tensor:
    """Compute y as PEFT does: a loop over adapters, each on its own rows.

    tensors: the other fields of `MultiOperands`.
    """
    weight: Any
    x, weight, lora_A, lora_B, _, bias, rng, *_ = MultiOperands(adapter_index=index, **tensors)
    wide_dtype = torch.promote_types(x.dtype, lora_A[0].dtype)
    dropped = cases.masked(x, rng, dropout_p)
    if weight is None:
        weight = x.new_zeros(lora_B[0].shape[0], x.shape[1])
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize(x.dtype)
    y = torch.nn.functional.linear(x, weight, bias)
    for e, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        rows = (index == e).nonzero()[:, 0]
        s = (dropped[rows].to(wide_dtype) @ A.to(wide_dtype).T) * scaling[e]
        y = y.index_put((rows,), (y[rows] + s @ B.to(wide_dtype).T).to(y.dtype))
    return y


@dataclass(frozen=True)
class MultiCase(AnyCase):
    """A call of `multi_lora_linear`. With three adapters or more, no row has the last but one.

    >>> all(verdict.ok for verdict in cases.judge(MultiCase(M=9, N=33, K=17)).values())
    True
    """

    M: int
    N: int
    K: int
    ranks: tuple[int, ...] = (3, 5, 8, 1)  # of each adapter
    rows: str = "grouped"  # by adapter, or "mixed"; some rows have no adapter
    dtype: torch.dtype = torch.float32  # of x, weight and bias
    adapter_dtype: torch.dtype | None = None  # of A and B; None for x's
    base: bool = True
    bias: bool = True

    op = staticmethod(multi_lora_linear)
    equation = staticmethod(reference.multi_lora_linear)
    eager = staticmethod(plain_pytorch)

    @property
    def p_elements(self) -> int:
        return self.M * sum(self.ranks) // len(self.ranks)

    def draw(self, source: Source) -> dict[str, Any]:
        M, N, K, E = self.M, self.N, self.K, len(self.ranks)
        adapter_dtype = self.adapter_dtype or self.dtype
        index = source.integers(-1, E, M)
        if E > 2:
            index[index == E - 2] = E - 1
        if self.rows == "grouped":  # in descending order, unlike the adapters
            index = index.sort(descending=True).values
        return {
            "weight": source.weight((N, K), K**-0.5, self.dtype) if self.base else None,
            "x": source((M, K), 1.0, self.dtype),
            "lora_A": [source((R, K), K**-0.5, adapter_dtype) for R in self.ranks],
            "lora_B": [source((N, R), R**-0.5, adapter_dtype) for R in self.ranks],
            "index": index.to(self.device),
            "scaling": [1.25 + e / 2 for e in range(E)],
            "bias": source((N,), 1.0, self.dtype) if self.bias else None,
            "dy": source((M, N), 1.0, self.dtype),
        }

    def allowances(self) -> Allowances:
        # y and dx include the base GEMM, to which the update is added in place.
        linear_case = Case(
            self.M, self.N, self.K, 1, self.dtype, self.adapter_dtype, device=self.device
        )
        return linear_case.allowances()
