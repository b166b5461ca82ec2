"""Variants of LoRA, all with the equation

    y = c ⊙ (x·Wᵀ + s·((D(x)·Aᵀ) ⊙ g)·Bᵀ) + bias        g: rank gate, c: column scale

A variant chooses its parameters in `make_adapter`, their initialization in
`reset_lora_parameters`, and the operands in `record`; see `LoRALayer`. The classes whose names
start with Q are the same variants over a 4-bit base.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.record import Record
from ..ops.norm import dora_norm
from ..quantization import QuantizedWeight
from .layer import check_size
from .linear import LoRALinear
from .quantized import QLoRALinear

if TYPE_CHECKING:
    from typing_extensions import Self


class DoRALinear(LoRALinear):
    """y = (magnitude ⊘ ‖W + s·B·A‖) ⊙ (x·Wᵀ + s·dropout(x)·Aᵀ·Bᵀ) + bias, s = alpha/r.

    `magnitude` [N] starts as the norm of W's rows, so the new layer computes the same as its base.
    The backward treats the norm as a constant, and no kernel stores W + s·B·A. Without gradients
    the norm is cached on a CPU. Each call compares the weights with those of the cached norm.

    Args are as in `LoRALinear`. Dropout applies to the adapter's branch alone; PEFT's layer applies
    it to the scaled base GEMM as well. Raises ValueError if a row of W is all zeros, because the
    layer divides by its norm.

    >>> import torch
    >>> from lora_kernels.layers import DoRALinear
    >>> linear = torch.nn.Linear(64, 32)
    >>> layer, x = DoRALinear.from_linear(linear, r=4), torch.randn(5, 64)
    >>> torch.allclose(layer(x), linear(x), atol=1e-5), layer.magnitude.shape
    (True, torch.Size([32]))
    """

    magnitude: nn.Parameter

    def make_adapter(self, dtype: torch.dtype) -> None:
        super().make_adapter(dtype)
        self.magnitude = self.empty_vector(self.out_features, dtype)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Set magnitude to the norm of W's rows, and lora_A and lora_B as `LoRALinear` does."""
        super().reset_lora_parameters()
        if self.lora_A.is_meta:
            return
        weight = self.base_weight()
        record = super().record(weight)
        factors = record.lora_A, record.lora_B, record.scaling
        norm = dora_norm(weight, *factors, rank_gate=record.rank_gate)
        zero_rows = (norm == 0).nonzero()
        if zero_rows.numel():
            raise ValueError(
                f"weight: got row {int(zero_rows[0])} all zeros, want a norm to divide by"
            )
        self.magnitude.copy_(norm)

    def record(self, weight: Tensor | QuantizedWeight) -> Record:
        record = super().record(weight)
        factors = record.lora_A, record.lora_B, record.scaling
        norm = self._cache.norm(weight, *factors, record.rank_gate)
        return record._replace(column_scale=self.magnitude / norm)


class AdaLoRALinear(LoRALinear):
    """y = x·Wᵀ + bias + (alpha/r) · ((dropout(x)·Aᵀ) ⊙ E ⊙ mask)·Bᵀ: A as Q, B as P, E as Λ.

    Each rank is a triplet: a row of lora_A, an element of lora_E and a column of lora_B. The saved
    buffer `rank_mask` [r] keeps or prunes it; a pruned triplet gets no gradient. lora_E [r] starts
    at zero. lora_B, and lora_A unless `init` is given, are drawn from a normal distribution with
    standard deviation 0.02.

    Args are as in `LoRALinear`. `RankAllocator` prunes the triplets of a whole model by score.

    >>> import torch
    >>> from lora_kernels.layers import AdaLoRALinear
    >>> layer = AdaLoRALinear(64, 32, r=4)
    >>> layer.update_rank(torch.tensor([0.1, 0.4, 0.2, 0.3]), quantile=0.5)
    >>> layer.rank_mask.tolist(), layer.current_rank
    ([False, True, False, True], 2)
    """

    lora_E: nn.Parameter
    rank_mask: Tensor
    default_init = staticmethod(functools.partial(nn.init.normal_, std=0.02))

    def make_adapter(self, dtype: torch.dtype) -> None:
        super().make_adapter(dtype)
        self.lora_E = self.empty_vector(self.r, dtype)
        self.register_buffer("rank_mask", self.lora_A.new_ones(self.r, dtype=torch.bool))

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Initialize as the class documents, and keep every rank."""
        super().reset_lora_parameters()
        if self.lora_A.is_meta:
            return
        nn.init.normal_(self.lora_B, std=0.02)
        nn.init.zeros_(self.lora_E)
        self.rank_mask.fill_(True)

    def record(self, weight: Tensor | QuantizedWeight) -> Record:
        return super().record(weight)._replace(rank_gate=self.lora_E * self.rank_mask)

    @property
    def current_rank(self) -> int:
        """The number of ranks that are not pruned."""
        return int(self.rank_mask.sum())

    @torch.no_grad()
    def update_rank(self, scores: Tensor, quantile: float = 0.5) -> None:
        """Keep the ranks whose score is above the quantile of all scores, and prune the others.

        The rank with the highest score, the first one among equals, is always kept.

        Args:
            scores: finite numbers [r].
            quantile: in [0, 1].

        Raises ValueError that names the argument.
        """
        if scores.shape != (self.r,):
            raise ValueError(f"scores: got shape {list(scores.shape)}, want [{self.r}]")
        if not 0.0 <= quantile <= 1.0:
            raise ValueError(f"quantile: got {quantile}, want a number in [0, 1]")
        scores = scores.detach().to(self.rank_mask.device, torch.float64)
        if not scores.isfinite().all():
            raise ValueError("scores: got NaN or infinity in it, want finite values")
        keep = scores > scores.quantile(quantile)
        keep[scores.argmax()] = True
        self.rank_mask.copy_(keep)

    def orthogonality(self) -> Tensor:
        """Return ‖BᵀB − I‖² + ‖AAᵀ − I‖² in Frobenius norms, differentiable, in float32.

        The result is 0 if the triplets are a singular value decomposition.
        """
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B = self.lora_A.to(dtype), self.lora_B.to(dtype)
        eye = torch.eye(self.r, dtype=dtype, device=A.device)
        return (B.T @ B - eye).square().sum() + (A @ A.T - eye).square().sum()

    def extra_repr(self) -> str:
        rank = "" if self.rank_mask.is_meta else f", current_rank={self.current_rank}"
        return super().extra_repr() + rank


class StableLoRALinear(LoRALinear):
    """`LoRALinear` with Xavier initialization and gradient clipping of the adapter.

    Args, in addition to those of `LoRALinear`:
        max_grad_norm: the largest norm of the gradients of lora_A and lora_B together, after
            `clip_gradients`.

    >>> import torch
    >>> from lora_kernels.layers import StableLoRALinear
    >>> layer = StableLoRALinear(64, 32, r=4, max_grad_norm=0.5)
    >>> layer(torch.randn(8, 64)).square().sum().backward()
    >>> norm, clipped = layer.clip_gradients(), layer.clip_gradients()
    >>> bool(norm > 0.5), round(clipped.item(), 3)
    (True, 0.5)
    """

    default_init = "xavier"

    def __init__(self, *args: Any, max_grad_norm: float = 1.0, **kwargs: Any) -> None:
        if not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: got {max_grad_norm}, want more than 0")
        self.max_grad_norm = max_grad_norm
        super().__init__(*args, **kwargs)

    def clip_gradients(self) -> Tensor:
        """Clip the norm of the gradients of lora_A and lora_B together to `max_grad_norm`.

        Returns the norm before clipping, 0 without gradients. Raises RuntimeError if the norm is
        not finite.
        """
        return nn.utils.clip_grad_norm_(
            [self.lora_A, self.lora_B], self.max_grad_norm, error_if_nonfinite=True
        )


class MemoryEfficientLoRALinear(LoRALinear):
    """`LoRALinear` that saves x alone for the backward, and recomputes D(x)·Aᵀ [M, r] there.

    On a CPU the gradients are bitwise equal to `LoRALinear`'s. Triton's kernels may sum D(x)·Aᵀ in
    another order.

    Args, in addition to those of `LoRALinear`:
        use_checkpoint: False saves D(x)·Aᵀ, as `LoRALinear` does.

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


class LoRAPlusLinear(LoRALinear):
    """`LoRALinear` with a higher learning rate for lora_B than for lora_A (Hayou et al., 2024).

    >>> from lora_kernels.layers import LoRAPlusLinear
    >>> layer = LoRAPlusLinear(64, 32, r=4)
    >>> [group["lr"] for group in layer.get_parameter_groups(lr=1e-4, ratio=16)]
    [0.0001, 0.0016]
    """

    def get_parameter_groups(self, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
        """Return parameter groups: lora_B with learning rate lr · ratio, the others with lr."""
        return lora_plus_parameter_groups(self, lr, ratio)


def lora_plus_parameter_groups(
    model: nn.Module, lr: float, ratio: float = 16.0
) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups for LoRA+, for this package's layers or PEFT's.

    The first group has learning rate lr. The second group has the trainable lora_B of linear and
    embedding layers, with learning rate lr · ratio. Raises ValueError if a number is not positive
    or no lora_B is trainable.

    >>> import torch
    >>> from lora_kernels.layers import LoRALinear, lora_plus_parameter_groups
    >>> model = torch.nn.Sequential(LoRALinear(8, 8, r=2), torch.nn.LayerNorm(8))
    >>> groups = lora_plus_parameter_groups(model, lr=0.5)
    >>> [(len(group["params"]), group["lr"]) for group in groups]
    [(3, 0.5), (1, 8.0)]
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        if not value > 0:
            raise ValueError(f"{name}: got {value}, want more than 0")
    others: list[nn.Parameter] = []
    lora_Bs: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            is_B = any(part in ("lora_B", "lora_embedding_B") for part in name.split("."))
            (lora_Bs if is_B else others).append(param)
    if not lora_Bs:
        raise ValueError("model: got none with a trainable lora_B, want one")
    return [{"params": others, "lr": lr}, {"params": lora_Bs, "lr": lr * ratio}]


class HierarchicalLoRALinear(LoRALinear):
    """Adapters of several ranks, each level with a trainable weight, in one fused call.

        y = x·Wᵀ + bias + Σᵢ wᵢ · (alpha / rᵢ) · dropout(x)·Aᵢᵀ·Bᵢᵀ

    The levels share one dropout mask.

    Args, in addition to those of `LoRALinear` except r:
        ranks: the rank of each level. lora_A [Σ ranks, K] and lora_B [N, Σ ranks] concatenate the
            levels.
        weights: the initial values of `level_weights` [levels].

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
        # The rank gate holds the scaling of each level.
        power = 0.5 if kwargs.get("scaling") == "rslora" else 1.0
        self.scaling, self.level_scales = 1.0, tuple(alpha / rank**power for rank in self.ranks)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls, linear: nn.Linear, ranks: Sequence[int] = (8, 16, 32), *args: Any, **options: Any
    ) -> Self:
        """Build the layer as `LoRALinear.from_linear` does, with ranks in place of r."""
        return super().from_linear(linear, ranks, *args, **options)  # type: ignore[arg-type]

    def make_adapter(self, dtype: torch.dtype) -> None:
        super().make_adapter(dtype)
        self.level_weights = self.empty_vector(len(self.ranks), dtype)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        super().reset_lora_parameters()
        if not self.level_weights.is_meta:
            self.level_weights.copy_(self.level_weights.new_tensor(self.weights))

    def record(self, weight: Tensor | QuantizedWeight) -> Record:
        levels = zip(self.level_weights.unbind(), self.level_scales, self.ranks, strict=True)
        gate = torch.cat([(level * scale).expand(rank) for level, scale, rank in levels])
        return super().record(weight)._replace(rank_gate=gate)

    def adapter_config(self) -> dict[str, Any]:
        levels = {"ranks": list(self.ranks), "level_scales": list(self.level_scales)}
        return super().adapter_config() | levels

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.ranks}"


class QDoRALinear(DoRALinear, QLoRALinear):
    """`DoRALinear` over a 4-bit base; see `QLoRALinear`.

    >>> from lora_kernels.layers import QDoRALinear
    >>> QDoRALinear(64, 32, r=4)(torch.ones(2, 64)).shape
    torch.Size([2, 32])
    """


class QAdaLoRALinear(AdaLoRALinear, QLoRALinear):
    """`AdaLoRALinear` over a 4-bit base; see `QLoRALinear`."""


class QStableLoRALinear(StableLoRALinear, QLoRALinear):
    """`StableLoRALinear` over a 4-bit base; see `QLoRALinear`."""


class QMemoryEfficientLoRALinear(MemoryEfficientLoRALinear, QLoRALinear):
    """`MemoryEfficientLoRALinear` over a 4-bit base; see `QLoRALinear`."""


class QLoRAPlusLinear(LoRAPlusLinear, QLoRALinear):
    """`LoRAPlusLinear` over a 4-bit base; see `QLoRALinear`."""


class QHierarchicalLoRALinear(HierarchicalLoRALinear, QLoRALinear):
    """`HierarchicalLoRALinear` over a 4-bit base; see `QLoRALinear`."""
