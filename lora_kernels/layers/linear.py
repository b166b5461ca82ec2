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

    The class does not inherit from `nn.Linear`, because tools that replace every `nn.Linear`
    (quantizers, FP8 converters) would silently drop the adapter. Code that reads `weight` instead
    of calling the layer drops it too. `nn.TransformerEncoderLayer` does so in eval mode without
    gradients, unless `torch.backends.mha.set_fastpath_enabled(False)` was called.

    Args:
        in_features, out_features: K and N.
        r: rank of the adapter, at least 1.
        alpha: the adapter is scaled by alpha / r (attribute `scaling`); see scaling.
        dropout: probability in [0, 1] of zeroing an element of x. It applies to the adapter's
            branch alone, and in training mode alone.
        bias: whether the base has a bias [N]. It is frozen; `layer.bias.requires_grad_()` trains
            it.
        init: the initialization of lora_A. "kaiming" (or None) is uniform in ±1/√K, like the weight
            of `nn.Linear`. "gaussian" has standard deviation 1/r. "xavier" is uniform in
            ±√(6/(r+K)). "orthogonal" has orthonormal rows, r ≤ K. A callable fills the tensor
            [r, K] in place; pickling the layer pickles it too. lora_B starts at zero, so the new
            layer computes the same as its base.
        device, dtype: of the base.
        lora_dtype: of lora_A and lora_B. None: float32 for a 16-bit base, in which small updates
            would be rounded away, else the base's dtype.
        scaling: "lora" for alpha / r. "rslora" for alpha / √r, which keeps the magnitude of the
            low-rank update independent of the rank (Kalajdzievski, 2023).

    Parameters: weight [N, K], bias [N] or None, lora_A [r, K], lora_B [N, r].

    Raises ValueError or TypeError that names the argument.

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
        """Build the layer from an `nn.Linear`, whose weight and bias are shared and not copied.

        Since the Parameters are the same, they are frozen in `linear` too. A 4-bit layer quantizes
        the weight and shares the bias. Device, dtype and training mode are taken from `linear`.

        options: the other arguments of the class.

        Raises TypeError if `linear` is not a stock `nn.Linear`, because the additions of a
        subclass, a hook or a parametrization would be lost.

        >>> import torch
        >>> from lora_kernels.layers import LoRALinear
        >>> linear = torch.nn.Linear(8, 8)
        >>> LoRALinear.from_linear(linear, r=2, alpha=4).weight is linear.weight
        True
        """
        check_stock("linear", linear, nn.Linear, "torch.nn.Linear")
        weight, bias = linear.weight, linear.bias
        N, K = weight.shape
        sizes, factory_args = (K, N, r, alpha), ("meta", weight.dtype, lora_dtype)
        layer = cls(*sizes, dropout, bias is not None, init, *factory_args, **options)._set_base(
            weight, bias
        )
        linear.requires_grad_(False)
        return layer.train(linear.training)
