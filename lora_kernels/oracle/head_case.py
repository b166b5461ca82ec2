"""Calls of the head's functions, which `case.judge` judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.head import lora_linear_cross_entropy, lora_linear_log_probs
from ..quantization import QuantizedWeight
from . import case as cases
from . import reference
from .case import STATISTICS, Allowances, AnyCase, Source
from .tolerance import unit_roundoff

IGNORED = -7  # not the default


def plain_pytorch(
    *, x: Tensor, weight: Any, lora_A: Any, lora_B: Any, labels: Tensor, bias: Any, **args: Any
) -> Any:
    """Compute as users write it without this package: logits in x's dtype, the loss in float32."""
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize(x.dtype)
    y = x @ weight.T
    dtype = y.dtype
    if lora_A is not None:
        wide_dtype = torch.promote_types(x.dtype, lora_A.dtype)
        dropped = cases.masked(x, args["rng"], args["dropout_p"]).to(wide_dtype)
        y = (
            y + (dropped @ lora_A.to(wide_dtype).T * args["scaling"]) @ lora_B.to(wide_dtype).T
        ).to(dtype)
    if bias is not None:
        y = (y + bias).to(dtype)
    y = y.float() * args["logit_scale"]
    if (cap := args["logit_softcap"]) is not None:
        y = torch.tanh(y / cap) * cap
    if "reduction" in args:
        names = "reduction", "label_smoothing", "ignore_index"
        options = {name: args[name] for name in names}
        return torch.nn.functional.cross_entropy(y, labels, **options)
    z = y / args["temperature"]
    log_p, is_counted = z.log_softmax(1), labels != IGNORED
    statistics = (
        log_p.gather(1, labels.where(is_counted, 0)[:, None])[:, 0],
        -(log_p.exp() * log_p).sum(1),
        z.mean(1),
        (2 * log_p).logsumexp(1),
    )
    return tuple(t.where(is_counted, 0.0) for t in statistics)


@dataclass(frozen=True)
class HeadCase(AnyCase):
    """A call of `lora_linear_cross_entropy` or `lora_linear_log_probs`.

    of: a reduction of the cross-entropy, or "log_probs".

    >>> all(verdict.ok for verdict in cases.judge(HeadCase(M=9, V=33, K=17, R=3)).values())
    True
    """

    M: int
    V: int
    K: int
    R: int
    of: str = "mean"
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None
    adapter: bool = True
    bias: bool = True
    ignored: float = 0.3  # the share of rows without a label
    label_smoothing: float = 0.0
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    chunk_rows: int | None = None

    eager = staticmethod(plain_pytorch)

    def draw(self, source: Source) -> dict[str, Any]:
        M, V, K, R = self.M, self.V, self.K, self.R
        adapter = self.adapter_dtype or self.dtype
        labels = source.integers(0, V, M)
        labels[torch.rand(M, generator=source.generator) < self.ignored] = IGNORED
        args: dict[str, Any] = {
            "weight": source.weight((V, K), K**-0.5, self.dtype),
            "x": source((M, K), 1.0, self.dtype),
            "lora_A": source((R, K), K**-0.5, adapter) if self.adapter else None,
            "lora_B": source((V, R), R**-0.5, adapter) if self.adapter else None,
            "labels": labels,
            "scaling": 1.25,
            "bias": source((V,), 1.0, self.dtype) if self.bias else None,
            "ignore_index": IGNORED,
            "logit_softcap": self.logit_softcap,
            "logit_scale": self.logit_scale,
            "chunk_rows": self.chunk_rows,
        }
        wide_dtype = torch.float64 if self.dtype is torch.float64 else torch.float32
        if self.of == "log_probs":  # log_probs and entropy have gradients, the others none
            args |= {"temperature": self.temperature, "outputs": STATISTICS[1:]}
            return {**args, "dy": [source((M,), 1.0, wide_dtype) for _ in range(2)]}
        args |= {"reduction": self.of, "label_smoothing": self.label_smoothing}
        dy = (
            source((M,), 1.0, wide_dtype)
            if self.of == "none"
            else torch.tensor(1.75, dtype=wide_dtype)
        )
        return {**args, "dy": dy}

    @staticmethod
    def op(**args: Any) -> Any:
        """Call the case's function."""
        if "reduction" in args:
            return lora_linear_cross_entropy(**args)
        return lora_linear_log_probs(**args)

    @staticmethod
    def equation(*, chunk_rows: Any, outputs: Any = None, **args: Any) -> Any:
        """Call the reference."""
        if "reduction" in args:
            return reference.lora_linear_cross_entropy(**args)
        return reference.lora_linear_log_probs(**args)

    def allowances(self) -> Allowances:
        # The logits and their gradient are rounded to y's dtype first, so u is at least that
        # dtype's. Each row sums over the vocabulary.
        M, V, K = self.M, self.V, self.K
        compute = self.autocast or self.dtype
        adapter = self.adapter_dtype or self.dtype
        u = unit_roundoff(compute)
        return {
            **{name: (u, (K, V)) for name in ("y", *STATISTICS)},
            "dx": (unit_roundoff(self.dtype, compute), (K, V, V)),
            "dW": (u, (K, V, M)),
            "dA": (unit_roundoff(adapter, compute), (K, V, V, M)),
            "dB": (unit_roundoff(adapter, compute), (K, V, M)),
            "dbias": (u, (K, V, M)),
        }
