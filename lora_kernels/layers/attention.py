"""LoRAAttention: multi-head self-attention with adapters on chosen projections."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .group import LoRAGroup
from .layer import Init, check_size
from .linear import LoRALinear

_PROJECTIONS = ("q", "k", "v", "o")


class LoRAAttention(nn.Module):
    """Self-attention o(softmax(q·kᵀ/√d)·v) with adapters on `targets`; the base is frozen.

    q, k and v are one `LoRAGroup`: one base GEMM and one low-rank update that read the input once.

    Args:
        hidden_size: width of the input, the output and each projection.
        num_heads: number of heads, a divisor of hidden_size; d = hidden_size / num_heads.
        targets: those of "q", "k", "v", "o" with an adapter; the others are frozen `nn.Linear`.
        r, alpha, dropout, bias, init, device, dtype, lora_dtype: as in `LoRALinear`, for every
            projection. `dropout` applies to the adapters; the attention weights have none.

    Submodules: o_proj, and qkv_proj, a `LoRAGroup` with members "q", "k" and "v". qkv_proj is a
    frozen `nn.Linear` if none of them is a target. Raises ValueError or TypeError that names the
    argument.

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

        def frozen_linear(size: int) -> nn.Module:
            return nn.Linear(hidden_size, size, bias, device, dtype).requires_grad_(False)

        lora_args = (r, alpha, dropout, bias, init, device, dtype, lora_dtype)
        group_targets = [name for name in "qkv" if name in self.targets]
        self.qkv_proj = (
            LoRAGroup(
                hidden_size, dict.fromkeys("qkv", hidden_size), *lora_args, targets=group_targets
            )
            if group_targets
            else frozen_linear(3 * hidden_size)
        )
        self.o_proj = (
            LoRALinear(hidden_size, hidden_size, *lora_args)
            if "o" in self.targets
            else frozen_linear(hidden_size)
        )

    def forward(
        self, hidden: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Compute the attention of hidden [..., L, hidden_size]; the output has the same shape.

        Args:
            hidden: the input.
            attn_mask: broadcastable to [..., num_heads, L, L]. A bool mask is True for the scores
                to keep; a floating mask is added to the scores.
            is_causal: whether token i attends to tokens 0..i alone. Excludes attn_mask.
        """
        qkv = self.qkv_proj(hidden)
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for y in (qkv if isinstance(qkv, tuple) else qkv.chunk(3, dim=-1))
        )  # each [..., num_heads, L, d]
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)
        y: Tensor = self.o_proj(heads.transpose(-3, -2).flatten(-2))
        return y

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, targets={self.targets}"


def _hint(target: str) -> str:
    """Suggest the projection for a name of another library, such as q_proj, query or out_proj."""
    letter = str(target)[:1].lower()
    return f"; did you mean {letter!r}?" if letter in _PROJECTIONS else ""
