"""DoRALinear: magnitude and direction of each row apart (Liu et al., 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..fastpath import DoraNormCache
from ..functional import dora_norm
from ..quantization import Weight4bit
from .linear import LoRALinear
from .quantized import QLoRALinear

if TYPE_CHECKING:
    from typing_extensions import Self


class DoRALinear(LoRALinear):
    """y = (magnitude ⊘ ‖W + s·B·A‖) ⊙ (x·Wᵀ + s·dropout(x)·Aᵀ·Bᵀ) + bias, s = alpha/r.

    `magnitude` [N] starts as the norm of W's rows, so that the new layer computes what its base
    does. The norm counts as a constant in the backward, and is made without writing the sum out.
    In evaluation without gradients it is kept until a weight changes.

    Args as `LoRALinear`'s. Raises ValueError where a row of the base is all zeros, whose norm
    nothing can be divided by. Dropout is on the adapter's branch alone (PEFT's layer drops x for
    the base product of its update as well).

    >>> import torch
    >>> from lora_kernels.layers import DoRALinear
    >>> linear = torch.nn.Linear(64, 32)
    >>> layer, x = DoRALinear.from_linear(linear, r=4), torch.randn(5, 64)
    >>> torch.allclose(layer(x), linear(x), atol=1e-5), layer.magnitude.shape
    (True, torch.Size([32]))
    """

    magnitude: nn.Parameter

    def _make_parameters(self) -> None:
        super()._make_parameters()
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        self.magnitude = nn.Parameter(self.lora_A.new_empty(self.out_features, dtype=dtype))
        self._norm = DoraNormCache()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """lora_A by `init`, lora_B to zero, magnitude to the norm of the base's rows."""
        super().reset_lora_parameters()
        self._base_changed()

    @torch.no_grad()
    def _base_changed(self) -> None:
        super()._base_changed()
        if self.magnitude.is_meta or self.weight.is_meta:
            return
        norm = dora_norm(
            self._base_weight(), self.lora_A, self.lora_B, self.scaling, rank_gate=self._gate()
        )
        zero = (norm == 0).nonzero()
        if zero.numel():
            raise ValueError(f"weight: got row {int(zero[0])} all zeros, want a norm to divide by")
        self.magnitude.copy_(norm)

    def _column_scale(self, weight: Tensor | Weight4bit) -> Tensor:
        return self.magnitude / self._norm(
            weight, self.lora_A, self.lora_B, self.scaling, self._gate()
        )

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._norm = DoraNormCache()  # whose tensor would stay in memory where these move
        super()._apply(*args, **kwargs)
        return self


class QDoRALinear(DoRALinear, QLoRALinear):
    """`DoRALinear` over a 4-bit base; see `QLoRALinear`.

    >>> from lora_kernels.layers import QDoRALinear
    >>> QDoRALinear(64, 32, r=4)(torch.ones(2, 64)).shape
    torch.Size([2, 32])
    """
