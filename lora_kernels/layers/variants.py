"""Variants of LoRALinear that are a choice of gate, start or bookkeeping: the same fused op.

Each has a form over a 4-bit base, whose name begins with Q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .linear import LoRALinear, check_size
from .quantized import QLoRALinear

if TYPE_CHECKING:
    from typing_extensions import Self


class StableLoRALinear(LoRALinear):
    """`LoRALinear` that starts by Xavier's rule and can clip its adapter's gradient.

    Args, beside those of `LoRALinear`: max_grad_norm, at which `clip_gradients` cuts the joint norm
    of the gradients of lora_A and lora_B.

    >>> import torch
    >>> from lora_kernels.layers import StableLoRALinear
    >>> layer = StableLoRALinear(64, 32, r=4, max_grad_norm=0.5)
    >>> layer(torch.randn(8, 64)).square().sum().backward()
    >>> norm, clipped = layer.clip_gradients(), layer.clip_gradients()
    >>> bool(norm > 0.5), round(clipped.item(), 3)
    (True, 0.5)
    """

    _default_init = "xavier"

    def __init__(self, *args: Any, max_grad_norm: float = 1.0, **kwargs: Any) -> None:
        if not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: got {max_grad_norm}, want more than 0")
        self.max_grad_norm = max_grad_norm
        super().__init__(*args, **kwargs)

    def clip_gradients(self) -> Tensor:
        """Scale the gradients of lora_A and lora_B down, together, to `max_grad_norm`; returns
        their joint norm before, 0 where there are none. Raises RuntimeError where it is not finite.
        """
        return nn.utils.clip_grad_norm_(
            [self.lora_A, self.lora_B], self.max_grad_norm, error_if_nonfinite=True
        )


class MemoryEfficientLoRALinear(LoRALinear):
    """`LoRALinear` that keeps x alone for the backward: D(x)·Aᵀ [M, r] is made again there.

    Args, beside those of `LoRALinear`: use_checkpoint, False for what `LoRALinear` does. On a CPU
    the gradients are the same bits either way; Triton's kernels may add D(x)·Aᵀ in another order.

    >>> import torch
    >>> from lora_kernels.layers import MemoryEfficientLoRALinear
    >>> layer, kept = MemoryEfficientLoRALinear(64, 32, r=4), []
    >>> with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
    ...     y = layer(torch.ones(8, 64))
    >>> torch.Size([8, 4]) in kept
    False
    """

    def __init__(self, *args: Any, use_checkpoint: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_checkpoint = use_checkpoint

    @property
    def _recompute(self) -> bool:  # type: ignore[override]
        return self.use_checkpoint


class LoRAPlusLinear(LoRALinear):
    """`LoRALinear` whose lora_B learns faster than its lora_A (Hayou et al., 2024).

    >>> from lora_kernels.layers import LoRAPlusLinear
    >>> layer = LoRAPlusLinear(64, 32, r=4)
    >>> [group["lr"] for group in layer.get_parameter_groups(lr=1e-4, ratio=16)]
    [0.0001, 0.0016]
    """

    def get_parameter_groups(self, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
        """Groups for an optimizer: lora_B's learning rate is `ratio` times the other's, `lr`."""
        return lora_plus_parameter_groups(self, lr, ratio)


def lora_plus_parameter_groups(
    model: nn.Module, lr: float, ratio: float = 16.0
) -> list[dict[str, Any]]:
    """LoRA+ for a whole model, this package's layers or PEFT's: two groups for an optimizer.

    Every trainable parameter is in one of them: lora_B's (of linear and of embedding layers) with
    learning rate lr · ratio, all others with lr. Raises ValueError where a number is not positive,
    or no lora_B is trainable.

    >>> import torch
    >>> from lora_kernels.layers import LoRALinear, lora_plus_parameter_groups
    >>> model = torch.nn.Sequential(LoRALinear(8, 8, r=2), torch.nn.LayerNorm(8))
    >>> groups = lora_plus_parameter_groups(model, lr=0.5)
    >>> [(len(group["params"]), group["lr"]) for group in groups]
    [(3, 0.5), (1, 8.0)]
    """
    for name, number in (("lr", lr), ("ratio", ratio)):
        if not number > 0:
            raise ValueError(f"{name}: got {number}, want more than 0")
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            is_B = any(part in ("lora_B", "lora_embedding_B") for part in name.split("."))
            (fast if is_B else slow).append(param)
    if not fast:
        raise ValueError("model: got none with a trainable lora_B, want one")
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]


class HierarchicalLoRALinear(LoRALinear):
    """Several ranks at once, each level with a trainable weight, in one call and one base product.

        y = x·Wᵀ + bias + Σᵢ wᵢ · (alpha / rᵢ) · dropout(x)·Aᵢᵀ·Bᵢᵀ

    Args, beside those of `LoRALinear` but r:
        ranks: of the levels; lora_A [Σ ranks, K] and lora_B [N, Σ ranks] hold them one after
            another.
        weights: what `level_weights` [levels] starts from.

    The levels share one mask of dropout.

    >>> import torch
    >>> from lora_kernels.layers import HierarchicalLoRALinear
    >>> layer = HierarchicalLoRALinear(64, 32, ranks=(8, 16, 32), weights=(0.6, 0.3, 0.1))
    >>> layer.level_scales, layer.lora_A.shape, layer(torch.ones(2, 64)).shape
    ((2.0, 1.0, 0.5), torch.Size([56, 64]), torch.Size([2, 32]))
    """

    level_weights: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Sequence[int] = (8, 16, 32),
        alpha: float = 16.0,
        *args: Any,
        weights: Sequence[float] = (0.6, 0.3, 0.1),
        **kwargs: Any,
    ) -> None:
        self.ranks, self.weights = tuple(ranks), tuple(map(float, weights))
        if not self.ranks:
            raise ValueError("ranks: got none, want at least one level")
        for i, rank in enumerate(self.ranks):
            check_size(f"ranks[{i}]", rank)
        if len(self.weights) != len(self.ranks) or not all(map(math.isfinite, self.weights)):
            raise ValueError(
                f"weights: got {self.weights}, want {len(self.ranks)} finite numbers, one a level"
            )
        super().__init__(in_features, out_features, sum(self.ranks), alpha, *args, **kwargs)
        # Each level has a scale of its own, in the gate.
        power = 0.5 if kwargs.get("scaling") == "rslora" else 1.0
        self.scaling, self.level_scales = 1.0, tuple(alpha / rank**power for rank in self.ranks)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls, linear: nn.Linear, ranks: Sequence[int] = (8, 16, 32), *args: Any, **options: Any
    ) -> Self:
        """As `LoRALinear.from_linear`, with ranks in place of r."""
        return super().from_linear(linear, ranks, *args, **options)  # type: ignore[arg-type]

    def _make_parameters(self) -> None:
        super()._make_parameters()
        count, dtype = len(self.ranks), torch.promote_types(self.lora_A.dtype, torch.float32)
        self.level_weights = nn.Parameter(self.lora_A.new_empty(count, dtype=dtype))

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        super().reset_lora_parameters()
        if not self.level_weights.is_meta:
            self.level_weights.copy_(self.level_weights.new_tensor(self.weights))

    def _gate(self) -> Tensor:
        levels = zip(self.level_weights.unbind(), self.level_scales, self.ranks, strict=True)
        return torch.cat([(weight * scale).expand(rank) for weight, scale, rank in levels])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.ranks}"


class QStableLoRALinear(StableLoRALinear, QLoRALinear):
    """`StableLoRALinear` over a 4-bit base; see `QLoRALinear`."""


class QMemoryEfficientLoRALinear(MemoryEfficientLoRALinear, QLoRALinear):
    """`MemoryEfficientLoRALinear` over a 4-bit base; see `QLoRALinear`."""


class QLoRAPlusLinear(LoRAPlusLinear, QLoRALinear):
    """`LoRAPlusLinear` over a 4-bit base; see `QLoRALinear`."""


class QHierarchicalLoRALinear(HierarchicalLoRALinear, QLoRALinear):  # type: ignore[misc]
    """`HierarchicalLoRALinear` over a 4-bit base; see `QLoRALinear`."""
