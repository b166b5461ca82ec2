"""What `bench --count` counts and `bench --host` times: PEFT's layers, and blocks of them.

A block is one linear layer, q, k and v of one x, or a gated MLP.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor, nn

from . import baselines

RANK = 16


class Cell(NamedTuple):
    """A kind of layer.

    Args:
        name: in the table.
        dtype: of x and of the base; with a 4-bit base, of x and its compute dtype.
        adapter_dtype: of lora_A, lora_B and DoRA's magnitude.
        base: "dense" or "nf4" (nested scales, blocks of 64).
        autocast: whether the forward runs under autocast to `dtype`.
        dora: whether the adapter is a DoRA.
        adapters: how many are active.
        x_dtype: of x, if it is another than `dtype`.
    """

    name: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    base: str = "dense"
    autocast: bool = False
    dora: bool = False
    adapters: int = 1
    x_dtype: torch.dtype | None = None


class Block(NamedTuple):
    """Projections that are counted together.

    Args:
        name: "layer", "qkv" or "mlp".
        K: in-features, of the MLP also the out-features.
        Ns: out-features of each projection of x.
    """

    name: str
    K: int
    Ns: tuple[int, ...]

    @property
    def title(self) -> str:
        """The name, and in-features and out-features.

        >>> Block("mlp", 64, (96, 96)).title
        'mlp 64→96→64'
        """
        out = f"{self.Ns[0]}→{self.K}" if self.name == "mlp" else "+".join(map(str, self.Ns))
        return f"{self.name} {self.K}→{out}"


_F32, _BF16 = torch.float32, torch.bfloat16
_COMMON = "NF4 bf16, fp32 adapters, autocast"
CELLS = (
    Cell("bf16, bf16 adapters", _BF16, _BF16),
    Cell("bf16, fp32 adapters", _BF16, _F32),
    Cell("bf16, fp32 adapters, autocast", _BF16, _F32, autocast=True),
    Cell("NF4 bf16, bf16 adapters", _BF16, _BF16, "nf4"),
    Cell("NF4 bf16, fp32 adapters", _BF16, _F32, "nf4"),
    Cell("NF4 bf16, bf16 adapters, autocast", _BF16, _BF16, "nf4", autocast=True),
    Cell(_COMMON, _BF16, _F32, "nf4", autocast=True),
    # The norms' outputs after `prepare_model_for_kbit_training`.
    Cell(f"{_COMMON}, fp32 x", _BF16, _F32, "nf4", autocast=True, x_dtype=_F32),
    # A layer behind a norm that returns float32, as in gated delta networks.
    Cell("bf16, fp32 adapters, autocast, fp32 x", _BF16, _F32, autocast=True, x_dtype=_F32),
)
BLOCKS = (
    Block("layer", 4096, (4096,)),
    Block("qkv", 4096, (4096, 1024, 1024)),
    Block("mlp", 4096, (14336, 14336)),
)


class QueryKeyValue(nn.Module):
    """q, k and v of one x, as an attention layer calls them. x [M, K] -> three [M, N]."""

    def __init__(self, q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = q_proj, k_proj, v_proj

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class OneProjection(nn.Module):
    """One linear layer, called as `QueryKeyValue` calls its layers. x [M, K] -> one [M, N]."""

    def __init__(self, q_proj: nn.Module) -> None:
        super().__init__()
        self.q_proj = q_proj

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.q_proj(x),)


def build_layer(
    cell: Cell, K: int, N: int, R: int, dropout_p: float = 0.0, device: str = "meta"
) -> Any:
    """Build PEFT's layer of a cell, in training mode; alpha = 2·R."""
    base: Any = nn.Linear(K, N, bias=False, device=device, dtype=cell.dtype)
    if cell.base == "nf4":
        base = baselines.linear_4bit(base, "nf4")
    # PEFT's DoRA copies a 4-bit base, which bitsandbytes cannot on meta.
    with mock.patch("peft.tuners.lora.dora.deepcopy", lambda layer: layer):
        return baselines.peft_layer(
            base,
            [R] * cell.adapters,
            adapter_dtype=cell.adapter_dtype,
            lora_dropout=dropout_p,
            use_dora=cell.dora,
        )


def build_block(block: Block, cell: Cell, R: int = RANK, device: str = "meta") -> nn.Module:
    """Build a block of PEFT's layers, in training mode; an MLP is transformers' LlamaMLP.

    >>> type(build_block(Block("mlp", 64, (96, 96)), CELLS[0])).__name__
    'LlamaMLP'
    """
    if block.name != "mlp":
        kind = QueryKeyValue if block.name == "qkv" else OneProjection
        return kind(*(build_layer(cell, block.K, N, R, device=device) for N in block.Ns))
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    K, H = block.K, block.Ns[0]
    with torch.device("meta"):
        mlp = cast(Any, LlamaMLP)(LlamaConfig(hidden_size=K, intermediate_size=H))
    adapt_linears(mlp, cell, R, device)
    return cast(nn.Module, mlp)


def adapt_linears(parent: nn.Module, cell: Cell, R: int, device: str) -> None:
    """Replace the linear layers that a parent calls by PEFT's of their size, newly drawn."""
    for name, layer in list(parent.named_children()):
        if isinstance(layer, nn.Linear):
            sizes = layer.in_features, layer.out_features
            setattr(parent, name, build_layer(cell, *sizes, R, device=device))
