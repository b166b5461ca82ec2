"""DoRALinear: magnitude and direction of each row apart (Liu et al., 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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
        self._kept: tuple[tuple[object, ...], Tensor] | None = None

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
        norm = self._norm(self._base_weight())
        zero = (norm == 0).nonzero()
        if zero.numel():
            raise ValueError(f"weight: got row {int(zero[0])} all zeros, want a norm to divide by")
        self.magnitude.copy_(norm)

    def _norm(self, weight: Tensor | Weight4bit) -> Tensor:
        return dora_norm(weight, self.lora_A, self.lora_B, self.scaling, rank_gate=self._gate())

    def _column_scale(self, weight: Tensor | Weight4bit) -> Tensor:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.magnitude / self._norm(weight)
        base = weight.packed if isinstance(weight, Weight4bit) else weight
        tensors = (base, self.lora_A, self.lora_B, self.magnitude)
        if any(t.is_inference() for t in tensors):  # which tell nobody when they change
            return self.magnitude / self._norm(weight)
        key = tuple((t.data_ptr(), t._version, t.shape, t.dtype) for t in tensors)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.magnitude / self._norm(weight)
        return self._kept[1]

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._kept = None
        super()._apply(*args, **kwargs)
        return self

    def __getstate__(self) -> dict[str, object]:
        base = getattr(super(), "__getstate__", None)
        state: dict[str, object] = dict(base()) if base is not None else dict(self.__dict__)
        return {**state, "_kept": None}


class QDoRALinear(DoRALinear, QLoRALinear):
    """`DoRALinear` over a 4-bit base; see `QLoRALinear`.

    >>> from lora_kernels.layers import QDoRALinear
    >>> QDoRALinear(64, 32, r=4)(torch.ones(2, 64)).shape
    torch.Size([2, 32])
    """
