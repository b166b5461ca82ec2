"""LoRAConv1D: GPT-2's linear layer, whose weight lies as [K, N], with an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..quantization import Weight4bit
from .linear import Init, LoRALinear, check_stock

if TYPE_CHECKING:
    from typing_extensions import Self


class LoRAConv1D(LoRALinear):
    """`LoRALinear` over a weight [K, N], as transformers' `Conv1D` has it; it is read as it lies.

    Args and parameters as `LoRALinear`'s, but for `weight` [K, N], which starts normal with
    standard deviation 0.02 and the bias, there by default, at zero, as in GPT-2.

    >>> import torch
    >>> from lora_kernels.layers import LoRAConv1D
    >>> layer = LoRAConv1D(64, 32, r=4)
    >>> layer.weight.shape, layer(torch.ones(2, 64)).shape
    (torch.Size([64, 32]), torch.Size([2, 32]))
    """

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
        """The same layer with an adapter; weight and bias are shared with `conv`, and frozen.

        Raises TypeError for anything but a stock transformers `Conv1D`.

        >>> from transformers.pytorch_utils import Conv1D
        >>> conv = Conv1D(32, 64)  # out-features first
        >>> LoRAConv1D.from_conv1d(conv, r=2).weight is conv.weight
        True
        """
        from transformers.pytorch_utils import Conv1D

        check_stock("conv", conv, Conv1D, "transformers' Conv1D")
        assert isinstance(conv, Conv1D)
        K, N = conv.weight.shape
        layer = cls(
            K, N, r, alpha, dropout, True, init, "meta", conv.weight.dtype, lora_dtype, **options
        )
        layer.bias = conv.bias
        layer._take(conv.weight)
        conv.requires_grad_(False)
        return layer.train(conv.training)

    @classmethod
    def from_linear(cls, *args: Any, **kwargs: Any) -> Self:
        """Raises TypeError: use `LoRALinear.from_linear`, or `from_conv1d`."""
        raise TypeError("linear: want a Conv1D, by from_conv1d, or LoRALinear.from_linear")

    def _make_parameters(self) -> None:
        super()._make_parameters()
        self.weight = nn.Parameter(self.weight.new_empty(self.weight.shape[::-1]), False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The base as GPT-2 starts it, the adapter as `reset_lora_parameters` does."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.reset_lora_parameters()

    def _dense_weight(self) -> Tensor:
        return self.weight.t()

    def _base_weight(self) -> Tensor | Weight4bit:
        return self.weight.t()
