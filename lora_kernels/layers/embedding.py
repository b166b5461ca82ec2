"""LoRAEmbedding: a frozen embedding with a trainable low-rank adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.record import Record
from ..quantization import QuantizedWeight
from .layer import Base, LoRALayer, check_size, check_stock

if TYPE_CHECKING:
    from typing_extensions import Self


class EmbeddingBase(Base):
    """W in one parameter `weight` [K, N], as in `nn.Embedding`."""

    transposed = True

    @torch.no_grad()
    def reset(self, layer: LoRAEmbedding) -> None:  # type: ignore[override]
        """Initialize the weight as `nn.Embedding` does."""
        nn.init.normal_(layer.weight)
        if layer.padding_idx is not None:
            layer.weight[layer.padding_idx].zero_()

    def multiply(self, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(weight, Tensor)
        return F.embedding(x, weight)


class LoRAEmbedding(LoRALayer):
    """y = W[x] + (alpha/r) · A[:, x]ᵀ·Bᵀ, with W frozen.

    The rows of W and the columns of A are looked up, and one PyTorch GEMM adds the low-rank update
    to the rows in place. Neither forward nor backward allocates [num_embeddings, embedding_dim].
    `lora_linear` is not used, because there is no base GEMM to fuse the update with.

    Args:
        num_embeddings, embedding_dim: K and N (attributes `in_features` and `out_features`).
        r, alpha, device, dtype, lora_dtype, scaling: as in `LoRALinear`.
        padding_idx: the index whose column of lora_A gets no gradient, and whose row of a new
            weight is zero. A negative index counts from the end.
        init: a callable that fills lora_B [N, r] in place. None: a normal distribution with
            standard deviation 1. It is kept for `reset_parameters`. lora_A starts at zero, so the
            new layer computes the same as its base.
        scale_grad_by_freq: whether the gradient of a column of lora_A is divided by the number of
            times that x contains its index.

    Parameters: weight [K, N], lora_A [r, K], lora_B [N, r].

    x [...], int32 or int64 -> y [..., N], in the weight's dtype, under autocast too.

    Raises ValueError or TypeError that names the argument.

    >>> import torch
    >>> from lora_kernels.layers import LoRAEmbedding
    >>> layer = LoRAEmbedding(1000, 32, r=4)
    >>> layer(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 32])
    >>> [name for name, p in layer.named_parameters() if p.requires_grad]
    ['lora_A', 'lora_B']
    """

    base = EmbeddingBase()
    default_init = staticmethod(nn.init.normal_)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 8,
        alpha: float = 16.0,
        padding_idx: int | None = None,
        init: Callable[[Tensor], object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        lora_dtype: torch.dtype | None = None,
        *,
        scaling: str = "lora",
        scale_grad_by_freq: bool = False,
    ) -> None:
        check_size("num_embeddings", num_embeddings)
        check_size("embedding_dim", embedding_dim)
        if init is not None and not callable(init):
            raise TypeError(f"init: got {init!r}, want a callable that fills lora_B")
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(
                    f"padding_idx: got {padding_idx}, want an index of {num_embeddings} embeddings"
                )
            padding_idx %= num_embeddings
        self.padding_idx, self.scale_grad_by_freq = padding_idx, scale_grad_by_freq
        sizes, options = (num_embeddings, embedding_dim, r, alpha), (device, dtype, lora_dtype)
        super().__init__(*sizes, 0.0, False, init, *options, scaling=scaling)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        r: int = 8,
        alpha: float = 16.0,
        init: Callable[[Tensor], object] | None = None,
        lora_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Build the layer from an `nn.Embedding`, whose weight is shared and not copied.

        Since the Parameter is the same, it is frozen in `embedding` and in all modules tied to it
        too. Device, dtype, training mode, padding_idx and scale_grad_by_freq are taken from
        `embedding`. `sparse` is ignored: a frozen weight has no gradient, and lora_A's is dense.

        Raises TypeError if `embedding` is not a stock `nn.Embedding`, and ValueError if it has
        max_norm, because then lookups write to the weight.

        >>> import torch
        >>> from lora_kernels.layers import LoRAEmbedding
        >>> embedding = torch.nn.Embedding(100, 8)
        >>> LoRAEmbedding.from_embedding(embedding, r=2, alpha=4).weight is embedding.weight
        True
        """
        check_stock("embedding", embedding, nn.Embedding, "torch.nn.Embedding")
        if embedding.max_norm is not None:
            raise ValueError(
                f"embedding: got max_norm={embedding.max_norm}, want None: looking rows up would "
                "renormalize the frozen weight in place"
            )
        V, E = embedding.weight.shape
        options = {"scale_grad_by_freq": embedding.scale_grad_by_freq, **options}
        padding_idx, factory_args = (
            embedding.padding_idx,
            ("meta", embedding.weight.dtype, lora_dtype),
        )
        layer = cls(V, E, r, alpha, padding_idx, init, *factory_args, **options)._set_base(
            embedding.weight, None
        )
        embedding.requires_grad_(False)
        return layer.train(embedding.training)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Set lora_A to zero and lora_B by `init`. Meta tensors are left alone."""
        if self.lora_A.is_meta:
            return
        assert callable(self.init)
        nn.init.zeros_(self.lora_A)
        self.init(self.lora_B)

    def record(self, weight: Tensor | QuantizedWeight) -> Record:
        """Return the operands for a weight [K, N]: Bᵀ as A, and Aᵀ as B."""
        return Record(weight, self.lora_B.t(), self.lora_A.t(), None, self.scaling)

    def forward_fused(self, x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
        assert isinstance(weight, Tensor)
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "weight: got requires_grad=True, want a frozen weight: its gradient is not "
                "computed here. Call weight.requires_grad_(False)"
            )
        record = Record(weight, self.lora_A, self.lora_B, None, self.scaling)
        return lookup(x, weight, [record], self.padding_idx, self.scale_grad_by_freq)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        text = f"{self.in_features}, {self.out_features}, r={self.r}, alpha={self.alpha:g}{padding}"
        return text + ", merged" * self.merged + ", disabled" * (not self.enabled)


def lookup(
    x: Tensor,
    weight: Tensor,
    records: Sequence[Record],
    padding_idx: int | None,
    scale_grad_by_freq: bool,
) -> Tensor:
    """Return W[x] + Σ s·A[:, x]ᵀ·Bᵀ over the records' A [r, K], B [N, r] and s, in weight's dtype.

    One GEMM serves all adapters, in the widest dtype of the weight and the adapters; the result is
    rounded once. weight [K, N] may not require a gradient, because the looked-up rows are
    overwritten.
    """
    ids = x.reshape(-1)
    rows = F.embedding(ids, weight)
    tensors = (t for record in records for t in (record.lora_A, record.lora_B))
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), weight.dtype)
    parts = [
        F.embedding(ids, record.lora_A.t(), padding_idx, scale_grad_by_freq=scale_grad_by_freq).to(
            dtype
        )
        * record.scaling
        for record in records
    ]
    P = torch.cat(parts, dim=1)
    B = torch.cat([record.lora_B.to(dtype) for record in records], dim=1)
    # autocast would round the rows of W, but it does not apply to in-place ops.
    y = rows.to(dtype).addmm_(P, B.t())
    return y.to(weight.dtype).view(*x.shape, weight.shape[1])
