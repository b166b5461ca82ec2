"""Weights of any form for cases: 4- and 8-bit codebooks, scales as they may be stored, and shifts.

A form is named by its codes, the block size, and how scales are stored, such as "int8-32-half", and
ends in "-shift" if its blocks have one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..core import coding
from ..quantization import QuantizedWeight, codebooks

SCALES_PER_BLOCK = 8  # of nested scales, as in GGUF's K-quants


def code(name: str) -> Tensor:
    """Return a codebook: float32 [16] of 4 bits, [256] of 8.

    name: "int4" (0 to 15), "signed4" (−8 to 7), "int8", "uint8", "e4m3" or "e5m2".

    >>> code("signed4")[:2]
    tensor([-8., -7.])
    """
    integers = torch.arange(256, dtype=torch.uint8)
    values = {
        "int4": torch.arange(16.0),
        "signed4": torch.arange(-8.0, 8.0),
        "int8": integers.view(torch.int8).float(),
        "uint8": integers.float(),
        "e4m3": codebooks.e4m3(),
        "e5m2": integers.view(torch.float8_e5m2).float(),
    }
    return values[name]


CODES = "int4", "signed4", "int8", "uint8", "e4m3", "e5m2"


def is_form(quant: str) -> bool:
    """Return True if the name is one of this module's.

    >>> is_form("int4-32-half-shift"), is_form("nf4-64-nested")
    (True, False)
    """
    return quant.split("-")[0] in CODES


def is_name(quant: str) -> bool:
    """Return True if `build` takes the name.

    >>> is_name("int4-32-half-shift"), is_name("int4-24"), is_name("int4-half")
    (True, False, False)
    """
    name, *rest = quant.split("-")
    size = rest[0] if rest else ""
    if name not in CODES or not size.isdecimal() or int(size) < 16 or int(size) & int(size) - 1:
        return False
    return rest[1:] in ([], ["half"], ["nested"], ["shift"], ["half", "shift"], ["nested", "shift"])


def build(values: Tensor, quant: str) -> QuantizedWeight:
    """Return a weight of the form that `quant` names, near `values` [N, K] or [E, N, K].

    K is a multiple of the block size. Nested shifts are 0 or less.

    >>> weight = build(torch.eye(32), "uint8-16-nested-shift")
    >>> weight.format, (weight.dequantize() - torch.eye(32)).abs().max().item() < 0.02
    ('8 bits with a shift', True)
    """
    name, size, *how = quant.split("-")
    table, blocksize, has_shift = code(name).to(values.device), int(size), "shift" in how
    order = table.where(table.isfinite(), torch.inf).argsort(stable=True)[: table.isfinite().sum()]
    rising = table[order]
    blocks = values.detach().float().reshape(-1, blocksize)
    if has_shift:
        scale = (blocks.amax(1) - blocks.amin(1)) / (rising[-1] - rising[0])
        shift = blocks.amin(1) - scale * rising[0]
        scales = torch.stack([scale, shift.clamp(max=0) if "nested" in how else shift], 1)
    else:
        scales = blocks.abs().amax(1) / rising.abs().max()
    fields, decoded = _store(scales, how)
    pairs = decoded if has_shift else torch.stack([decoded, torch.zeros_like(decoded)], 1)
    wanted = (blocks - pairs[:, 1:]) / pairs[:, :1].where(pairs[:, :1] != 0, 1.0)
    q = order[torch.bucketize(wanted, (rising[1:] + rising[:-1]) / 2)].to(torch.uint8).view(-1)
    return QuantizedWeight(
        packed=q if len(table) == 256 else (q[::2] << 4) | q[1::2],
        code=table,
        quant_type="",
        blocksize=blocksize,
        shape=tuple(values.shape),
        dtype=values.dtype,
        **fields,
    )


def on_meta(N: int, K: int, quant: str, dtype: torch.dtype) -> QuantizedWeight:
    """Return a weight [N, K] of the form on meta, without values.

    >>> on_meta(64, 32, "int8-32-half", torch.bfloat16)
    QuantizedWeight([64, 32], 8 bits of bfloat16, blocksize=32, 3,200 bytes)
    """
    rows = SCALES_PER_BLOCK  # whole blocks of nested scales
    few = build(torch.zeros(rows, K), quant)
    fields: dict[str, Any] = {"code": few.code.to("meta"), "shape": (N, K), "dtype": dtype}
    if few.nested_code is not None:
        fields["nested_code"] = few.nested_code.to("meta")
    for name in ("packed", "absmax", "nested_absmax"):
        t = getattr(few, name)
        if t is not None:
            sizes = (len(t) * N // rows, *t.shape[1:])
            fields[name] = t.new_empty(sizes, device="meta")
    return dataclasses.replace(few, **fields)


def _store(scales: Tensor, how: list[str]) -> tuple[dict[str, Any], Tensor]:
    """Return the fields of scales [blocks], or of pairs [blocks, 2], and what they decode to."""
    if "half" in how:
        return {"absmax": scales.half()}, scales.half().float()
    if "nested" not in how:
        return {"absmax": scales}, scales
    groups = -(-len(scales) // SCALES_PER_BLOCK)
    padded = scales.new_zeros(groups * SCALES_PER_BLOCK, *scales.shape[1:])
    padded[: len(scales)] = scales
    of_group = padded.view(groups, SCALES_PER_BLOCK, *scales.shape[1:])
    nested = of_group.sum(1).sign() * of_group.abs().amax(1) / 255
    wide = nested.repeat_interleave(SCALES_PER_BLOCK, dim=0)[: len(scales)]
    absmax = (scales / wide.where(wide != 0, 1.0)).round().to(torch.uint8)
    table = torch.arange(256.0, device=scales.device)
    fields = {"absmax": absmax, "nested_absmax": nested, "nested_code": table}
    decoded = coding.dequantize_scales(absmax, nested, table, None, SCALES_PER_BLOCK)
    return fields | {"nested_blocksize": SCALES_PER_BLOCK}, decoded
