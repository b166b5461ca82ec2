"""How the records of a layer's active adapters share calls of `lora_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..backends.eager.products import MANY_ROWS
from ..backends.library import is_on_gpu_path
from ..core.dtypes import to_dtype
from ..core.record import Record


class Call(NamedTuple):
    """A call of `lora_linear`, or of `multi_lora_linear` if the rows of x have different adapters.

    Args:
        records: of the adapters. Without a row index they are stacked along the rank.
        row_index: of the record of each x[i], [B], or of each row of x [B, T, K], [B, T]; -1 for
            none. On the CPU.
    """

    records: Sequence[Record]
    row_index: Tensor | None = None


class RowNames(NamedTuple):
    """The arguments of PEFT's forward that tell which rows of x have an adapter.

    Args:
        names: adapter_names, an adapter for each x[i]; None if all rows have the active adapters.
        offsets: alora_offsets, the number of last rows of each x[i] in which an aLoRA is active.
            None, for one x[i] or for all, means 0.
    """

    names: Sequence[str] | None = None
    offsets: Sequence[int | None] | None = None


def calls_for(records: Sequence[Record], x: Tensor, rows: RowNames) -> list[Call]:
    """Return the calls for x. The rows of x may have different adapters.

    An aLoRA that is active in every row shares the call of the other adapters.
    """
    if rows.names is not None:
        return [Call(records, _row_index(records, rows.names, rows.offsets, x))]
    shared, separate = list(records), [record for record in records if record.has_row_index]
    if separate and min(_active_rows(rows.offsets, x), default=0) == _length(x):
        separate = []
    if separate:
        shared = [record for record in records if not record.has_row_index]
    calls: list[Call] = []
    if shared:
        M = x.shape[:-1].numel()
        calls += [Call(sharing) for sharing in share_calls(shared, x.device.type, M)]
    for record in separate:
        names = [record.name] * x.shape[0]
        calls.append(Call([record], _row_index([record], names, rows.offsets, x)))
    return calls


def share_calls(
    records: Sequence[Record], device_type: str, rows: int | None
) -> list[Sequence[Record]]:
    """Return the records of each call: of all adapters without dropout, and of each with dropout.

    On a GPU, if x has at most `MANY_ROWS` rows, each adapter has a call. Stacking would copy the
    adapters in every call, which moves more bytes than it saves.

    Args:
        records: of the active adapters.
        device_type: the device type of x.
        rows: the number of rows of x; None for many.
    """
    if len(records) == 1:
        return [records]
    if rows is not None and rows <= MANY_ROWS and is_on_gpu_path(device_type):
        return [[record] for record in records]
    without_dropout = [record for record in records if not record.dropout_p]
    with_dropout: list[Sequence[Record]] = [[r] for r in records if r.dropout_p]
    return [without_dropout, *with_dropout] if without_dropout else with_dropout


def stack_records(records: Sequence[Record]) -> Record:
    """Return one record of the adapters that share a call, stacked along the rank.

    It has the first adapter's base and dropout. Its scaling is a float. It has a rank gate if the
    factors of the ranks differ, or if a scaling was a tensor.
    """
    first, A, B = records[0], records[0].lora_A, records[0].lora_B
    is_plain = first.ranknum is None and not isinstance(first.scaling, Tensor)
    if len(records) == 1 and is_plain:
        return first
    if len(records) > 1:
        A = torch.cat([record.lora_A for record in records])
        B = torch.cat([record.lora_B for record in records], dim=1)
        is_plain = is_plain and all(
            [
                r.rank_gate is None
                and not isinstance(r.scaling, Tensor)
                and r.scaling == first.scaling
                for r in records
            ]
        )
    scaling, gate = first.scaling, None
    if not is_plain:
        gates = [gate_of(record) for record in records]
        scaling, gate = 1.0, gates[0] if len(gates) == 1 else torch.cat(gates)
    # Torch 2.8 cannot trace `_replace`.
    return Record(first.weight, A, B, first.bias, scaling, first.dropout_p, rank_gate=gate)


def gate_of(record: Record) -> Tensor:
    """Return the factor of each rank of an adapter, its scaling and rank gate, [R]."""
    scaling, gate = record.scaling, record.rank_gate
    if record.ranknum is not None:  # E · scaling / (ranknum + 1e-5), as PEFT computes it
        E = cast(Tensor, gate).flatten()
        E = to_dtype(E, torch.promote_types(E.dtype, torch.float32))
        return cast(Tensor, E * scaling / (record.ranknum + 1e-5))
    R, dtype = record.lora_A.shape[0], torch.promote_types(record.lora_A.dtype, torch.float32)
    if isinstance(scaling, Tensor):
        factors = scaling.to(record.lora_A.device, dtype).expand(R)
    else:
        factors = torch.full((R,), scaling, dtype=dtype, device=record.lora_A.device)
    return factors if gate is None else factors * gate


def lora_bias(records: Sequence[Record]) -> Tensor | None:
    """Return the sum of scaling · lora_bias, [N]; None without `lora_bias`."""
    total: Tensor | None = None
    for record in records:
        if record.lora_bias is not None:
            part = record.scaling * record.lora_bias
            total = part if total is None else total + part
    return total


def add_bias(bias: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return bias + other, [N], with None for no bias."""
    if bias is None or other is None:
        return other if bias is None else bias
    return bias + other


def casts_adapters(
    layer: Any, device_type: str, x_dtype: torch.dtype, rows: int | None = None
) -> bool:
    """Return True if the layer rounds its adapters to x's 16-bit dtype, by `fuse`'s cast_adapters.

    rows: of x; None for many. For few rows a copy of the adapters would be larger than x's.
    """
    is_half = x_dtype in (torch.bfloat16, torch.float16)
    is_many = rows is None or rows > MANY_ROWS
    return layer.casts_adapters and is_half and is_many and is_on_gpu_path(device_type)


def cast_adapters(records: Sequence[Record], dtype: torch.dtype) -> list[Record]:
    """Return the records with lora_A and lora_B in `dtype`."""
    return [r._replace(lora_A=r.lora_A.to(dtype), lora_B=r.lora_B.to(dtype)) for r in records]


def _row_index(
    records: Sequence[Record],
    names: Sequence[str],
    offsets: Sequence[int | None] | None,
    x: Tensor,
) -> Tensor:
    """Return the index of the adapter of each x[i] or, with an aLoRA, of each row; -1 for none.

    It is on the CPU, which has the names, because reading it on a GPU would wait for the GPU.
    """
    indices = {record.name: e for e, record in enumerate(records)}
    index = torch.tensor([indices.get(name, -1) for name in names], device="cpu")
    aloras = {record.name for record in records if record.has_row_index}
    if not aloras:
        return index
    length, active_counts = _length(x), _active_rows(offsets, x)
    starts = [
        length - count if name in aloras else 0
        for name, count in zip(names, active_counts, strict=True)
    ]
    row, start = torch.arange(length, device="cpu"), torch.tensor(starts, device="cpu")
    by_row = index[:, None].where(row >= start[:, None], -1)
    return by_row if x.dim() == 3 else by_row[:, 0]


def _length(x: Tensor) -> int:
    """Return the number of rows in a sequence of x [B, T, K], or 1 for x [B, K]."""
    return x.shape[1] if x.dim() == 3 else 1


def _active_rows(offsets: Sequence[int | None] | None, x: Tensor) -> list[int]:
    """Return the number of last rows of each sequence of x in which an aLoRA is active."""
    if offsets is None:
        return [0] * x.shape[0]
    return [min(int(offset or 0), _length(x)) for offset in offsets]


def has_invalid_sequences(records: Sequence[Record], x: Tensor, rows: RowNames) -> bool:
    """Return True if an aLoRA is active, and x is not [B, T, K] or [B, K] or alora_offsets not [B].

    PEFT's forward then computes the call or, for most shapes, raises.
    """
    if not any(record.has_row_index for record in records):
        return False
    fits = rows.offsets is None or len(rows.offsets) == x.shape[0]
    return x.dim() not in (2, 3) or not fits
