"""LoRAAttention: multi-head self-attention with adapters on chosen projections."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import Init, LoRALinear, check_size

_PROJECTIONS = ("q", "k", "v", "o")


class LoRAAttention(nn.Module):
    """Self-attention o(softmax(q·kᵀ/√d)·v) whose `targets` are `LoRALinear`; the rest is frozen.

    Args:
        hidden_size: width of the input, the output and each projection.
        num_heads: divides hidden_size; d = hidden_size / num_heads.
        targets: which of "q", "k", "v", "o" get an adapter; the others are frozen `nn.Linear`.
        r, alpha, dropout, bias, init, device, dtype, lora_dtype: as `LoRALinear`'s, for every
            projection. `dropout` is the adapters'; the attention weights have none.

    Submodules: q_proj, k_proj, v_proj, o_proj. Raises ValueError or TypeError, naming the argument.

    >>> from lora_kernels.layers import LoRAAttention
    >>> attention = LoRAAttention(64, num_heads=4, r=2, targets=("q", "v"))
    >>> attention(torch.ones(2, 5, 64), is_causal=True).shape
    torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        r: int = 8,
        alpha: float = 16.0,
        targets: Iterable[str] = ("q", "v"),
        dropout: float = 0.0,
        bias: bool = False,
        init: Init | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_size("num_heads", num_heads)
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size: got {hidden_size}, want a multiple of num_heads = {num_heads}"
            )
        self.targets = tuple(targets)
        for target in self.targets:
            if target not in _PROJECTIONS:
                raise ValueError(
                    f"targets: got {target!r}, want some of {_PROJECTIONS}{_hint(target)}"
                )
        if not self.targets:
            raise ValueError(f"targets: got none, want some of {_PROJECTIONS}")
        self.num_heads = num_heads

        def projection(name: str) -> nn.Module:
            if name in self.targets:
                return LoRALinear(
                    hidden_size, hidden_size, r, alpha, dropout, bias, init, device, dtype,
                    lora_dtype,
                )  # fmt: skip
            return nn.Linear(hidden_size, hidden_size, bias, device, dtype).requires_grad_(False)

        self.q_proj, self.k_proj, self.v_proj, self.o_proj = map(projection, _PROJECTIONS)

    def forward(
        self, hidden: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """hidden [..., L, hidden_size] -> the same shape.

        attn_mask: broadcastable to [..., num_heads, L, L]; bool (True takes part) or floating
        (added to the scores). is_causal: token i sees tokens 0..i; not together with attn_mask.
        """
        q, k, v = (
            proj(hidden).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # each [..., num_heads, L, d]
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)
        y: Tensor = self.o_proj(heads.transpose(-3, -2).flatten(-2))
        return y

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, targets={self.targets}"


def _hint(target: str) -> str:
    """Names from elsewhere (q_proj, query, out_proj) begin with the right letter."""
    letter = str(target)[:1].lower()
    return f"; did you mean {letter!r}?" if letter in _PROJECTIONS else ""
