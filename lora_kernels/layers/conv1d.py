"""LoRAConv1D: GPT-2's linear layer, whose weight is stored as [K, N], with an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .layer import Base, Init, LoRALayer, check_stock

if TYPE_CHECKING:
    from typing_extensions import Self


class TransposedBase(Base):
    """W in one parameter `weight` [K, N], as in transformers' `Conv1D`."""

    transposed = True

    @torch.no_grad()
    def reset(self, layer: LoRALayer) -> None:
        """Initialize weight and bias as GPT-2 does."""
        nn.init.normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

    def operand(self, layer: LoRALayer) -> Tensor:
        return layer.weight.t()


class LoRAConv1D(LoRALayer):
    """`LoRALinear` over a weight [K, N], as in transformers' `Conv1D`. No copy is transposed.

    Args and parameters are as in `LoRALinear`, except for `weight` [K, N] and the bias, which
    exists by default. As in GPT-2, the weight is drawn from a normal distribution with standard
    deviation 0.02, and the bias is zero.

    >>> import torch
    >>> from lora_kernels.layers import LoRAConv1D
    >>> layer = LoRAConv1D(64, 32, r=4)
    >>> layer.weight.shape, layer(torch.ones(2, 64)).shape
    (torch.Size([64, 32]), torch.Size([2, 32]))
    """

    base = TransposedBase()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        bias: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, r, alpha, dropout, bias, *args, **kwargs)

    @classmethod
    def from_conv1d(
        cls,
        conv: nn.Module,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        init: Init | None = None,
        lora_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Build the layer from a `Conv1D`, whose weight and bias are shared and frozen.

        Raises TypeError if `conv` is not a stock `Conv1D` of transformers.

        >>> from transformers.pytorch_utils import Conv1D
        >>> conv = Conv1D(32, 64)  # out-features first
        >>> LoRAConv1D.from_conv1d(conv, r=2).weight is conv.weight
        True
        """
        from transformers.pytorch_utils import Conv1D

        check_stock("conv", conv, Conv1D, "transformers' Conv1D")
        assert isinstance(conv, Conv1D)
        K, N = conv.weight.shape
        factory_args = ("meta", conv.weight.dtype, lora_dtype)
        layer = cls(K, N, r, alpha, dropout, True, init, *factory_args, **options)
        layer._set_base(conv.weight, conv.bias)
        conv.requires_grad_(False)
        return layer.train(conv.training)
