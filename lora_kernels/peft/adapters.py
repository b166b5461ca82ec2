"""The active adapters of a PEFT layer, and how they share calls of `lora_linear`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import variants
from torch import Tensor, nn

from ..backends.eager.linear import MANY_ROWS
from ..backends.library import is_on_gpu_path


class Adapter(NamedTuple):
    name: str
    lora_A: nn.Linear
    lora_B: nn.Linear
    scaling: float | Tensor  # a tensor if PEFT has prepared the model for hot-swapping
    dropout: nn.Module
    diag: Tensor | None = None  # KaSA's factors of the ranks, [R]
    is_alora: bool = False  # active from a sequence's invocation tokens on


def adapters_of(layer: Any, names: Sequence[str] | None = None) -> list[Adapter]:
    """Return the layer's adapters with these names, or its active adapters without names."""
    modules = cast(dict[str, Any], layer._modules)
    lora_A, lora_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropout = modules["lora_dropout"]._modules
    adapters = [
        Adapter(name, lora_A[name], lora_B[name], layer.scaling[name], dropout[name])
        for name in names or layer.active_adapters
        if name in lora_A
    ]
    return [_as_variant(layer, adapter) for adapter in adapters] if layer.lora_variant else adapters


def _as_variant(layer: Any, adapter: Adapter) -> Adapter:
    """Return the adapter with the fields of its variant of LoRA."""
    operand = operand_of(layer, adapter.name)
    if operand == RANK_GATE:
        return adapter._replace(diag=layer.lora_diag[adapter.name])
    return adapter._replace(is_alora=operand == ROW_INDEX)


class Variant(NamedTuple):
    """A variant of LoRA.

    Args:
        title: its name, with an article.
        operand: what it adds to lora_A, lora_B and scaling; None for nothing.
    """

    title: str
    operand: str | None


RANK_GATE, COLUMN_SCALE, ROW_INDEX = "rank gate", "column scale", "row index"

# The variants that fused layers compute, by PEFT's class. Older releases of PEFT lack some classes.
# Each code path names the operands that it takes, and `operand_reason` refuses all other variants.
VARIANTS: dict[Any, Variant] = {
    getattr(variants, name, None): variant
    for name, variant in {
        "DoraLinearVariant": Variant("a DoRA", COLUMN_SCALE),
        "KasaLinearVariant": Variant("a KaSA", RANK_GATE),
        "ALoraLinearVariant": Variant("an aLoRA", ROW_INDEX),
        # Plain LoRA with lora_B frozen.
        "MiCALinearVariant": Variant("a MiCA", None),
        "MiCAEmbeddingVariant": Variant("a MiCA", None),
    }.items()
}


def variant_of(layer: Any, name: str) -> Variant | None:
    """Return an adapter's variant, with an operand of no code path if unknown; None for LoRA."""
    variant = layer.lora_variant.get(name)
    if variant is None:
        return None
    cls = type(variant)
    return VARIANTS.get(cls) or Variant(f"a variant of LoRA ({cls.__name__})", "formula")


def operand_of(layer: Any, name: str) -> str | None:
    """Return the operand that an adapter's variant adds; None for plain LoRA."""
    variant = variant_of(layer, name)
    return None if variant is None else variant.operand


def operand_reason(
    layer: Any, adapters: Sequence[Any], taken: Collection[str], path: str
) -> str | None:
    """Return why a code path refuses an adapter's variant; None if it takes the operands of all.

    Args:
        taken: the operands that the code path takes.
        path: its name, for the reason.
    """
    for adapter in adapters if layer.lora_variant else ():
        variant = variant_of(layer, adapter.name)
        if variant is not None and variant.operand not in (None, *taken):
            title, operand = variant
            return f"adapter {adapter.name!r} is {title}, whose {operand} {path} does not take"
    return None


class Call(NamedTuple):
    """The adapters' arguments of one `lora_linear`."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    rank_gate: Tensor | None
    dropout_p: float


class MixedCall(NamedTuple):
    """The adapters' arguments of one `multi_lora_linear`."""

    lora_A: list[Tensor]
    lora_B: list[Tensor]
    row_index: Tensor  # `multi_lora_linear`'s index
    scaling: list[float]
    dropout_p: float


def calls(adapters: Sequence[Adapter], device_type: str, rows: int | None) -> list[Call]:
    """Return a call for each of the `groups` of adapters."""
    adapter_groups = groups(adapters, device_type, rows)
    return [stack(group, dropout_p(group[0].dropout)) for group in adapter_groups]


def groups(adapters: Sequence[Any], device_type: str, rows: int | None) -> list[Sequence[Any]]:
    """Group the adapters by call: one group without dropout, and one for each with dropout.

    On a GPU, if x has at most `MANY_ROWS` rows, each adapter is a group. Stacking would copy the
    adapters in every call, which moves more bytes than it saves.

    Args:
        adapters: the active adapters.
        device_type: the device type of x.
        rows: the number of rows of x; None for many.
    """
    if len(adapters) == 1:
        return [adapters]
    if rows is not None and rows <= MANY_ROWS and is_on_gpu_path(device_type):
        return [[adapter] for adapter in adapters]
    without_dropout = [adapter for adapter in adapters if not dropout_p(adapter.dropout)]
    with_dropout: list[Sequence[Any]] = [[a] for a in adapters if dropout_p(a.dropout)]
    return [without_dropout, *with_dropout] if without_dropout else with_dropout


def stack(adapters: Sequence[Adapter], dropout_p: float) -> Call:
    """Return the adapters stacked along the rank, with a gate if their factors differ."""
    _, lora_A, lora_B, scaling, _, diag, _ = adapters[0]
    if len(adapters) == 1 and not isinstance(scaling, Tensor):
        return Call(weight_of(lora_A), weight_of(lora_B), scaling, diag, dropout_p)
    A = torch.cat([weight_of(adapter.lora_A) for adapter in adapters])
    B = torch.cat([weight_of(adapter.lora_B) for adapter in adapters], dim=1)
    if not any(
        isinstance(a.scaling, Tensor) or a.scaling != scaling or a.diag is not None
        for a in adapters
    ):
        return Call(A, B, cast(float, scaling), None, dropout_p)
    gates = [gate_of(weight_of(a.lora_A), a.scaling, a.diag) for a in adapters]
    return Call(A, B, 1.0, torch.cat(gates), dropout_p)


def casts_adapters(
    layer: Any, device_type: str, x_dtype: torch.dtype, rows: int | None = None
) -> bool:
    """Return True if the layer rounds its adapters to x's 16-bit dtype, by `fuse`'s cast_adapters.

    rows: of x; None for many. For few rows a copy of the adapters would be larger than x's.
    """
    is_half = x_dtype in (torch.bfloat16, torch.float16)
    is_many = rows is None or rows > MANY_ROWS
    return layer.casts_adapters and is_half and is_many and is_on_gpu_path(device_type)


def cast_call(call: Call | MixedCall, dtype: torch.dtype) -> Call | MixedCall:
    """Return the call with lora_A and lora_B in `dtype`."""
    if isinstance(call, Call):
        return call._replace(lora_A=call.lora_A.to(dtype), lora_B=call.lora_B.to(dtype))
    A, B = ([t.to(dtype) for t in tensors] for tensors in (call.lora_A, call.lora_B))
    return call._replace(lora_A=A, lora_B=B)


class RowNames(NamedTuple):
    """The arguments of PEFT's forward that tell which rows of x have an adapter.

    Args:
        names: adapter_names, an adapter for each x[i]; None if all rows have the active adapters.
        offsets: alora_offsets, the number of last rows of each x[i] in which an aLoRA is active.
            None, for one x[i] or for all, means 0.
    """

    names: Sequence[str] | None = None
    offsets: Sequence[int | None] | None = None


def calls_for(adapters: Sequence[Adapter], x: Tensor, rows: RowNames) -> list[Call | MixedCall]:
    """Return the calls for x, each row of which may have its own adapter.

    An aLoRA that is active in every row shares the call of the other adapters.
    """
    if rows.names is not None:
        return [_mixed_call(adapters, rows, x)]
    shared, separate = list(adapters), [adapter for adapter in adapters if adapter.is_alora]
    if separate and min(_active_rows(rows.offsets, x), default=0) == _length(x):
        separate = []
    if separate:
        shared = [adapter for adapter in adapters if not adapter.is_alora]
    all_calls: list[Call | MixedCall] = []
    if shared:
        all_calls += calls(shared, x.device.type, x.shape[:-1].numel())
    for adapter in separate:
        names = [adapter.name] * x.shape[0]
        all_calls.append(_mixed_call([adapter], rows._replace(names=names), x))
    return all_calls


def _mixed_call(adapters: Sequence[Adapter], rows: RowNames, x: Tensor) -> MixedCall:
    """Return the call in which x[i] takes the adapter rows.names[i], if this layer has it."""
    assert rows.names is not None
    return MixedCall(
        [weight_of(adapter.lora_A) for adapter in adapters],
        [weight_of(adapter.lora_B) for adapter in adapters],
        _row_index(adapters, rows.names, rows.offsets, x),
        [cast(float, adapter.scaling) for adapter in adapters],
        dropout_p(adapters[0].dropout),
    )


def _row_index(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    offsets: Sequence[int | None] | None,
    x: Tensor,
) -> Tensor:
    """Return the index of each row's adapter, -1 for none, in x's leading shape."""
    indices = {adapter.name: e for e, adapter in enumerate(adapters)}
    shape = -1, *[1] * (x.dim() - 2)
    index = torch.tensor([indices.get(name, -1) for name in names], device=x.device).view(shape)
    aloras = {adapter.name for adapter in adapters if adapter.is_alora}
    if aloras:
        length, active_counts = _length(x), _active_rows(offsets, x)
        starts = [
            length - count if name in aloras else 0
            for name, count in zip(names, active_counts, strict=True)
        ]
        row = torch.arange(length, device=x.device) if x.dim() == 3 else index.new_zeros(())
        start = torch.tensor(starts, device=x.device).view(shape)
        index = index.where(row >= start, -1)
    return index.expand(x.shape[:-1])


def _length(x: Tensor) -> int:
    """Return the number of rows in a sequence of x [B, T, K], or 1 for x [B, K]."""
    return x.shape[1] if x.dim() == 3 else 1


def _active_rows(offsets: Sequence[int | None] | None, x: Tensor) -> list[int]:
    """Return the number of last rows of each sequence of x in which an aLoRA is active."""
    if offsets is None:
        return [0] * x.shape[0]
    return [min(int(offset or 0), _length(x)) for offset in offsets]


def gate_of(lora_A: Tensor, scaling: float | Tensor, diag: Tensor | None) -> Tensor:
    """Return the scaling of each rank of an adapter, [R]."""
    R, dtype = lora_A.shape[0], torch.promote_types(lora_A.dtype, torch.float32)
    if isinstance(scaling, Tensor):
        gate = scaling.to(lora_A.device, dtype).expand(R)
    else:
        gate = torch.full((R,), scaling, dtype=dtype, device=lora_A.device)
    return gate if diag is None else gate * diag


def weight_of(linear: nn.Linear) -> Tensor:
    return cast(Tensor, linear._parameters["weight"])


def lora_bias(adapters: Sequence[Adapter]) -> Tensor | None:
    """Return the sum of scaling · lora_B.bias, [N]; None without `lora_bias`."""
    total: Tensor | None = None
    for adapter in adapters:
        bias = adapter.lora_B._parameters["bias"]
        if bias is not None:
            part = adapter.scaling * bias
            total = part if total is None else total + part
    return total


def dropout_p(dropout: nn.Module) -> float:
    """Return the dropout probability of the module, which is 0 in eval mode."""
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


class SVDAdapter(NamedTuple):
    name: str
    lora_A: Tensor  # [R, K]
    lora_B: Tensor  # [N, R]
    lora_E: Tensor  # [R, 1]
    ranknum: Tensor  # [1]
    scaling: float | Tensor
    dropout: nn.Module


def svd_adapters_of(layer: Any) -> list[SVDAdapter]:
    """Return the active adapters that this layer has."""
    modules = layer._modules
    lora_A, lora_B, lora_E, ranknum = (
        modules[name]._parameters for name in ("lora_A", "lora_B", "lora_E", "ranknum")
    )
    dropout = modules["lora_dropout"]._modules
    mappings = (lora_A, lora_B, lora_E, ranknum, layer.scaling, dropout)
    return [
        SVDAdapter(name, *(mapping[name] for mapping in mappings))
        for name in layer.active_adapters
        if name in lora_A
    ]


def svd_calls(adapters: Sequence[SVDAdapter], device_type: str, rows: int | None) -> list[Call]:
    """Return a call for each of the `groups` of adapters."""
    adapter_groups = groups(adapters, device_type, rows)
    return [_stack_svd(group, dropout_p(group[0].dropout)) for group in adapter_groups]


def _stack_svd(adapters: Sequence[SVDAdapter], dropout_p: float) -> Call:
    if len(adapters) == 1:
        adapter = adapters[0]
        return Call(adapter.lora_A, adapter.lora_B, 1.0, _svd_gate(adapter), dropout_p)
    return Call(
        torch.cat([adapter.lora_A for adapter in adapters]),
        torch.cat([adapter.lora_B for adapter in adapters], dim=1),
        1.0,
        torch.cat([_svd_gate(adapter) for adapter in adapters]),
        dropout_p,
    )


def _svd_gate(adapter: SVDAdapter) -> Tensor:
    """Return E · scaling / (ranknum + 1e-5), [R], as PEFT computes it."""
    dtype = torch.promote_types(adapter.lora_E.dtype, torch.float32)
    return adapter.lora_E.flatten().to(dtype) * adapter.scaling / (adapter.ranknum + 1e-5)


class EmbeddingAdapter(NamedTuple):
    name: str
    lora_A: Tensor  # [R, K]
    lora_B: Tensor  # [N, R]
    scaling: float | Tensor


def embedding_adapters_of(layer: Any) -> list[EmbeddingAdapter]:
    """Return the active adapters that this layer has."""
    lora_A = layer._modules["lora_embedding_A"]._parameters
    lora_B = layer._modules["lora_embedding_B"]._parameters
    return [
        EmbeddingAdapter(name, lora_A[name], lora_B[name], layer.scaling[name])
        for name in layer.active_adapters
        if name in lora_A
    ]
