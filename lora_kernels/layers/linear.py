"""LoRALinear: a frozen linear layer with a trainable low-rank adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .layer import Init, LoRALayer, check_stock

if TYPE_CHECKING:
    from typing_extensions import Self


class LoRALinear(LoRALayer):
    """y = x·Wᵀ + bias + (alpha/r) · dropout(x)·Aᵀ·Bᵀ, with W and bias frozen, in one fused op.

    Deliberately no `nn.Linear`: tools that replace every `nn.Linear` (quantizers, FP8 converters)
    would drop the adapter without a word. So would code that reads `weight` instead of calling the
    layer, as `nn.TransformerEncoderLayer` does in eval mode without gradients: keep it from that
    with `torch.backends.mha.set_fastpath_enabled(False)`.

    Args:
        in_features, out_features: K and N.
        r: rank of the adapter, at least 1.
        alpha: the adapter is scaled by alpha / r (attribute `scaling`); see scaling.
        dropout: probability in [0, 1] of dropping an element of x, on the adapter's branch alone
            and in training mode alone.
        bias: whether the base has a bias [N]. It is frozen; `layer.bias.requires_grad_()` trains
            it.
        init: how lora_A starts: "kaiming" (or None; uniform in ±1/√K, as `nn.Linear`'s weight),
            "gaussian" (standard deviation 1/r), "xavier" (uniform in ±√(6/(r+K))), "orthogonal"
            (its rows orthonormal, r ≤ K), or a callable that fills the tensor [r, K] in place. It
            is kept for `reset_parameters`, so a layer to be pickled needs a picklable one. lora_B
            starts at zero: the new layer computes what its base does.
        device, dtype: of the base.
        lora_dtype: of lora_A and lora_B; None takes float32 beside a 16-bit base (small updates
            would be rounded away), else the base's dtype.
        scaling: "lora" for alpha / r, "rslora" for alpha / √r, which keeps the size of an update
            the same as the rank grows (Kalajdzievski, 2023).

    Parameters: weight [N, K], bias [N] or None, lora_A [r, K], lora_B [N, r].

    Raises ValueError or TypeError, naming the argument.

    >>> from lora_kernels.layers import LoRALinear
    >>> layer = LoRALinear(64, 32, r=4)
    >>> layer(torch.ones(2, 64)).shape, [n for n, p in layer.named_parameters() if p.requires_grad]
    (torch.Size([2, 32]), ['lora_A', 'lora_B'])
    """

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        init: Init | None = None,
        lora_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """The same layer with an adapter; weight and bias are shared with `linear`, not copied.

        Being the same Parameters, they are frozen in `linear` too. A 4-bit layer quantizes the
        weight and shares the bias. Device, dtype and training mode are `linear`'s; options are the
        class's other ones. Raises TypeError for anything but a stock `nn.Linear`: what a subclass,
        a hook or a parametrization adds to the forward would be lost.

        >>> import torch
        >>> from lora_kernels.layers import LoRALinear
        >>> linear = torch.nn.Linear(8, 8)
        >>> LoRALinear.from_linear(linear, r=2, alpha=4).weight is linear.weight
        True
        """
        check_stock("linear", linear, nn.Linear, "torch.nn.Linear")
        weight, bias = linear.weight, linear.bias
        N, K = weight.shape
        sizes, of_base = (K, N, r, alpha), ("meta", weight.dtype, lora_dtype)
        layer = cls(*sizes, dropout, bias is not None, init, *of_base, **options)._take(
            weight, bias
        )
        linear.requires_grad_(False)
        return layer.train(linear.training)
