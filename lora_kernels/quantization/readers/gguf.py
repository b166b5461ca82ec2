"""The blocks of GGUF files, llama.cpp's format.

A row of a tensor is a whole number of blocks, of 32 or 256 elements. `BLOCKS` names the types that
are forms of `QuantizedWeight`. The decoded weight has the bits of `gguf.quants.dequantize`, since
only the last sum of each element rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import codebooks
from ..weight import NESTED_BLOCKSIZE, QuantizedWeight
from .form import pack

_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_SIGNED, _UNSIGNED = tuple(range(-8, 8)), tuple(range(16))


class Blocks(NamedTuple):
    """The parts of blocks.

    Args:
        q: uint8 [blocks, elements], indices of `code`.
        code: float32[16], or float32[256] for more than 4 bits.
        scales: float16 [blocks]; or bytes of groups, uint8 [blocks, groups], and with shifts
            uint8 [blocks, groups, 2].
        nested: float32 [blocks], by which the table's value of a byte is multiplied; with shifts
            [blocks, 2]. None: 1, or scales in float16.
        table: float32[256] of bytes; None beside float16.
    """

    q: Tensor
    code: Tensor
    scales: Tensor
    nested: Tensor | None = None
    table: Tensor | None = None


class Type(NamedTuple):
    """A type of blocks.

    Args:
        elements, nbytes: of a block.
        take_apart: bytes [blocks, nbytes] -> Blocks.
        put: bytes, q [blocks, elements] -> None. Writes other codes into the bytes.
    """

    elements: int
    nbytes: int
    take_apart: Callable[[Tensor], Blocks]
    put: Callable[[Tensor, Tensor], None]


def read(rows: Tensor, kind: str, dtype: torch.dtype) -> QuantizedWeight:
    """Return the weight in rows of blocks.

    Args:
        rows: uint8 [N, bytes of a row].
        kind: one of `BLOCKS`, such as "Q4_K".
        dtype: of the decoded weight.

    >>> one = torch.ones(1, dtype=torch.float16).view(torch.uint8)
    >>> row = torch.cat([one, torch.full((32,), 7, dtype=torch.uint8)])
    >>> read(row[None], "Q8_0", torch.float32)
    QuantizedWeight([1, 32], 8 bits of float32, blocksize=32, 1,058 bytes)
    """
    elements, nbytes, take_apart, _ = BLOCKS[kind]
    N, count = len(rows), rows.shape[1] // nbytes
    q, code, scales, nested, table = take_apart(rows.reshape(-1, nbytes))
    groups = scales.shape[1] if scales.dtype is torch.uint8 and scales.dim() > 1 else 1
    if groups > 1:
        scales = scales.flatten(0, 1)
    q = q.reshape(N, count * elements)
    return QuantizedWeight(
        packed=pack(q) if len(code) == 16 else q.reshape(-1),
        absmax=scales.contiguous(),
        code=code,
        quant_type="",
        blocksize=elements // groups,
        shape=(N, count * elements),
        dtype=dtype,
        nested_absmax=nested,
        nested_code=table,
        nested_blocksize=NESTED_BLOCKSIZE if nested is None else groups,
    )


def replace_codes(rows: Tensor, kind: str, q: Tensor) -> Tensor:
    """Return rows of blocks with other codes and the scales that they have.

    Args:
        rows: uint8 [N, bytes of a row].
        kind: one of `BLOCKS`.
        q: the codes of what `read` returns, uint8 [N, K].

    >>> row = torch.zeros(1, 34, dtype=torch.uint8)
    >>> replace_codes(row, "Q8_0", torch.full((1, 32), 7, dtype=torch.uint8))[0, :4].tolist()
    [0, 0, 7, 7]
    """
    elements, nbytes, _, put = BLOCKS[kind]
    blocks = rows.reshape(-1, nbytes).clone()
    put(blocks, q.reshape(-1, elements))
    return blocks.view(rows.shape)


def _planes(b: Tensor, bits: int, chunk: int) -> Tensor:
    """Return the codes of `bits` bits in bytes [blocks, n]: of a chunk the lowest bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=b.device)
    codes = b.view(len(b), -1, 1, chunk) >> shifts[:, None] & (1 << bits) - 1
    return codes.reshape(len(b), -1)


def _join(q: Tensor, bits: int, chunk: int) -> Tensor:
    """Pack codes [blocks, elements] into bytes: the inverse of `_planes`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=q.device)
    codes = q.reshape(len(q), -1, 8 // bits, chunk) << shifts[:, None]
    return codes.sum(2, dtype=torch.uint8).reshape(len(q), -1)


def _halves(b: Tensor) -> Tensor:
    """Return the float16 numbers in bytes [blocks, 2 · n]: [blocks, n], or [blocks] if n is 1."""
    return b.contiguous().view(torch.float16).squeeze(1)


def _code(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _integers(device: torch.device) -> Tensor:
    return torch.arange(256.0, device=device)


def _signed(q: Tensor, zero: int) -> Tensor:
    """Return codes less their zero, as bytes of `codebooks.int8`."""
    return q - zero & 255


# Shift and scale stand in the file as two halves at the start, in this order.


def _q4(shifted: bool, values: tuple[int, ...]) -> Callable[[Tensor], Blocks]:
    def take_apart(b: Tensor) -> Blocks:
        start = 4 if shifted else 2
        q = _planes(b[:, start:].contiguous(), 4, 16)
        return Blocks(q, _code(values, b.device), _halves(b[:, :start]))

    return take_apart


def _q5(shifted: bool) -> Callable[[Tensor], Blocks]:
    def take_apart(b: Tensor) -> Blocks:
        start = 4 if shifted else 2
        high = _planes(b[:, start : start + 4].contiguous(), 1, 1)
        q = _planes(b[:, start + 4 :].contiguous(), 4, 16) | high << 4
        q = q if shifted else _signed(q, 16)
        return Blocks(q, codebooks.int8(b.device), _halves(b[:, :start]))

    return take_apart


def _q8_0(b: Tensor) -> Blocks:
    return Blocks(b[:, 2:], codebooks.int8(b.device), _halves(b[:, :2]))


def _mxfp4(b: Tensor) -> Blocks:
    q = _planes(b[:, 1:].contiguous(), 4, 16)
    code = codebooks.code("mxfp4", b.device) * 2
    code[8] = 0  # a table of integers, which has no -0
    powers = torch.arange(-128, 128, dtype=torch.float64, device=b.device)
    return Blocks(q, code, b[:, 0], None, torch.exp2(powers).float())


def _pairs(scale: Tensor, shift: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return bytes [blocks, groups, 2], and their factors [blocks, 2] of d [blocks, 2]."""
    factor = d.float() * torch.tensor([1.0, -1.0], device=d.device)
    return torch.stack([scale, shift], -1), factor


def _six_bits(b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales and the minima [blocks, 8] that Q4_K and Q5_K store in 12 bytes."""
    scale, shift, rest = b.split(4, 1)
    low, high = scale & 63, rest & 15 | scale >> 2 & 48
    return torch.cat([low, high], 1), torch.cat([shift & 63, rest >> 4 | shift >> 2 & 48], 1)


def _q2_k(b: Tensor) -> Blocks:
    pairs, factor = _pairs(b[:, :16] & 15, b[:, :16] >> 4, _halves(b[:, 80:]))
    q = _planes(b[:, 16:80].contiguous(), 2, 32)
    return Blocks(q, _code(_UNSIGNED, b.device), pairs, factor, _integers(b.device))


def _q3_k(b: Tensor) -> Blocks:
    low, high = b[:, 96:104].contiguous(), b[:, 104:108].contiguous()
    scales = _signed(_planes(low, 4, 8) | _planes(high, 2, 4) << 4, 32)
    q = _planes(b[:, 32:96].contiguous(), 2, 32) | _planes(b[:, :32].contiguous(), 1, 32) << 2
    factor, table = _halves(b[:, 108:]).float(), codebooks.int8(b.device)
    return Blocks(q + 4, _code(_SIGNED, b.device), scales, factor, table)


def _q4_k(b: Tensor) -> Blocks:
    pairs, factor = _pairs(*_six_bits(b[:, 4:16]), _halves(b[:, :4]))
    q = _planes(b[:, 16:].contiguous(), 4, 32)
    return Blocks(q, _code(_UNSIGNED, b.device), pairs, factor, _integers(b.device))


def _q5_k(b: Tensor) -> Blocks:
    pairs, factor = _pairs(*_six_bits(b[:, 4:16]), _halves(b[:, :4]))
    q = _planes(b[:, 48:].contiguous(), 4, 32) | _planes(b[:, 16:48].contiguous(), 1, 32) << 4
    return Blocks(q, codebooks.int8(b.device), pairs, factor, _integers(b.device))


def _q6_k(b: Tensor) -> Blocks:
    q = _planes(b[:, :128].contiguous(), 4, 64) | _planes(b[:, 128:192].contiguous(), 2, 32) << 4
    table = codebooks.int8(b.device)
    return Blocks(_signed(q, 32), table, b[:, 192:208], _halves(b[:, 208:]).float(), table.clone())


def _iq4_xs(b: Tensor) -> Blocks:
    low, high = b[:, 4:8].contiguous(), b[:, 2:4].contiguous()
    scales = _signed(_planes(low, 4, 1) | _planes(high, 2, 1) << 4, 32)
    q = _planes(b[:, 8:].contiguous(), 4, 16)
    factor, table = _halves(b[:, :2]).float(), codebooks.int8(b.device)
    return Blocks(q, _code(_IQ4_NL, b.device), scales, factor, table)


Put = Callable[[Tensor, Tensor], None]


def _put_nibbles(start: int, chunk: int = 16) -> Put:
    def put(b: Tensor, q: Tensor) -> None:
        b[:, start:] = _join(q, 4, chunk)

    return put


def _put_bytes(b: Tensor, q: Tensor) -> None:
    b[:, 2:] = q


def _put_q2_k(b: Tensor, q: Tensor) -> None:
    b[:, 16:80] = _join(q, 2, 32)


def _put_q3_k(b: Tensor, q: Tensor) -> None:
    u = q - 4
    b[:, 32:96], b[:, :32] = _join(u & 3, 2, 32), _join(u >> 2, 1, 32)


def _put_q5(shifted: bool) -> Put:
    start = 4 if shifted else 2

    def put(b: Tensor, q: Tensor) -> None:
        u = q if shifted else _signed(q, -16)
        b[:, start : start + 4], b[:, start + 4 :] = _join(u >> 4, 1, 1), _join(u & 15, 4, 16)

    return put


def _put_q5_k(b: Tensor, q: Tensor) -> None:
    b[:, 48:], b[:, 16:48] = _join(q & 15, 4, 32), _join(q >> 4, 1, 32)


def _put_q6_k(b: Tensor, q: Tensor) -> None:
    u = _signed(q, -32)
    b[:, :128], b[:, 128:192] = _join(u & 15, 4, 64), _join(u >> 4, 2, 32)


BLOCKS: dict[str, Type] = {
    "Q4_0": Type(32, 18, _q4(False, _SIGNED), _put_nibbles(2)),
    "Q4_1": Type(32, 20, _q4(True, _UNSIGNED), _put_nibbles(4)),
    "Q5_0": Type(32, 22, _q5(False), _put_q5(False)),
    "Q5_1": Type(32, 24, _q5(True), _put_q5(True)),
    "Q8_0": Type(32, 34, _q8_0, _put_bytes),
    "Q2_K": Type(256, 84, _q2_k, _put_q2_k),
    "Q3_K": Type(256, 110, _q3_k, _put_q3_k),
    "Q4_K": Type(256, 144, _q4_k, _put_nibbles(16, 32)),
    "Q5_K": Type(256, 176, _q5_k, _put_q5_k),
    "Q6_K": Type(256, 210, _q6_k, _put_q6_k),
    "IQ4_NL": Type(32, 18, _q4(False, _IQ4_NL), _put_nibbles(2)),
    "IQ4_XS": Type(256, 136, _iq4_xs, _put_nibbles(8)),
    "MXFP4": Type(32, 17, _mxfp4, _put_nibbles(1)),
}
