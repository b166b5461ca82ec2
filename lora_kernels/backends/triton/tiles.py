"""Functions that the kernels share: conversions, `dot`, tiles of a matrix and of 4-bit codes.

Triton's interpreter stores bfloat16 as its bits. Its products multiply the bits, its conversions to
bfloat16 may truncate, and its conversions from bfloat16 flush subnormals. So kernels use `dot` and
`to_dtype` for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import is_interpreted

INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def to_dtype(x, dtype: tl.constexpr):
    """Round x to `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, (bits >> 16) | 0x40)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif INTERPRETED and dtype == tl.float32 and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a·b in float32. PRECISION: for float32 operands."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_tile(ptr, offs_0, stride_0, offs_1, stride_1, mask_0, mask_1, WIDE: tl.constexpr):
    """Load [BLOCK_0, BLOCK_1] of a matrix, 0 outside. WIDE: whether offsets exceed 2³¹."""
    if WIDE:
        offs_0 = offs_0.to(tl.int64)
        offs_1 = offs_1.to(tl.int64)
    at = ptr + (offs_0[:, None] * stride_0 + offs_1[None, :] * stride_1)
    return tl.load(at, mask=mask_0[:, None] & mask_1[None, :], other=0.0)


@triton.jit
def scale_columns(v, scale_ptr, offs_n, mask_n):
    """Return v ⊙ scale [BLOCK_M, BLOCK_N] in float32, or v itself without a scale."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        v = v.to(tl.float32) * scale[None, :]
    return v


@triton.jit
def look_up(code_ptr, codes, ASM: tl.constexpr):
    """Return the float32 values of the codes. The codebook's 64 bytes are in one L1 cache line.

    The compiler would pipeline `tl.load` through shared memory, hence the inline PTX.
    """
    if ASM:
        base = tl.zeros(codes.shape, dtype=tl.int64) + code_ptr.to(tl.int64)
        return tl.inline_asm_elementwise(
            "{ .reg .b64 a; mad.wide.u32 a, $1, 4, $2; ld.global.nc.f32 $0, [a]; }",
            "=f,r,l",
            [codes, base],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.load(code_ptr + codes)


@triton.jit
def block_scales(
    block, mask, codes, PARTS: tl.constexpr = 1, PART: tl.constexpr = 0,
    LOG2_NESTED: tl.constexpr = 8,
):  # fmt: skip
    """Load the scales of the blocks in float32, 0 if masked. Each operation on them rounds.

    PARTS: 2 if each block has a scale and a shift, stored in pairs, else 1. PART: 0 loads scales, 1
        shifts.
    """
    _, absmax_ptr, _, nested_absmax_ptr, nested_code_ptr, offset_ptr = codes
    at = block * PARTS + PART
    if nested_code_ptr is not None:
        code = tl.load(absmax_ptr + at, mask=mask, other=0).to(tl.int32)
        if nested_absmax_ptr is None:
            return tl.load(nested_code_ptr + code, mask=mask, other=0.0)
        else:  # without it Triton would compile the lines below, and fail
            at = (block >> LOG2_NESTED) * PARTS + PART
            scale = tl.load(nested_absmax_ptr + at, mask=mask, other=0.0)
            scale = tl.load(nested_code_ptr + code) * scale
            if offset_ptr is not None:
                scale += tl.load(offset_ptr)
            return tl.where(mask, scale, 0.0)
    else:
        return tl.load(absmax_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def tile_scales(
    offs_n, mask_n, k0, K, codes, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    LOG2_BLOCK: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, LOG2_NESTED: tl.constexpr,
):  # fmt: skip
    """Return the scales of a tile of rows of whole blocks, [BLOCK_N, BLOCK_K] or [BLOCK_N, 1]."""
    SCALES: tl.constexpr = (BLOCK_K + (1 << LOG2_BLOCK) - 1) >> LOG2_BLOCK
    per_row, first_block = K >> LOG2_BLOCK, k0 >> LOG2_BLOCK
    if SCALES == 1:
        block = offs_n * per_row + first_block
        return block_scales(block, mask_n, codes, PARTS, PART, LOG2_NESTED)[:, None]
    else:
        offs_s = first_block + tl.arange(0, SCALES)
        block = offs_n[:, None] * per_row + offs_s[None, :]
        mask = mask_n[:, None] & (offs_s < per_row)[None, :]
        scale = block_scales(block, mask, codes, PARTS, PART, LOG2_NESTED)
        scale = tl.broadcast_to(scale[:, :, None], BLOCK_N, SCALES, BLOCK_K // SCALES)
        return scale.reshape(BLOCK_N, BLOCK_K)


@triton.jit
def load_codes(
    codes, n0, k0, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    FORMAT: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr = 4, SHIFT: tl.constexpr = False,
    LOG2_NESTED: tl.constexpr = 8,
):  # fmt: skip
    """Decode [BLOCK_N, BLOCK_K] of a weight [N, K] at [n0, k0] in float32, 0 or the shift outside.

    Args:
        codes: pointers to the tensors of `Codes`, or None.
        FORMAT: log2 of the block size; whether rows consist of WHOLE blocks, and of whole,
            aligned WORDS of 8 codes; whether inline PTX reads the codebook (ASM).
        BITS: of a code. SHIFT: whether blocks have one. With it, and for 8 bits, rows are WHOLE.

    WORDS requires k0 that is a multiple of 8. WHOLE requires k0 that is a multiple of the block or
    of BLOCK_K. Then a row of the tile has one scale or few.
    """
    packed_ptr, _, code_ptr, _, _, _ = codes
    LOG2_BLOCK: tl.constexpr = FORMAT[0]
    WHOLE: tl.constexpr = FORMAT[1]
    WORDS: tl.constexpr = FORMAT[2]
    ASM: tl.constexpr = FORMAT[3]
    offs_n, offs_k = n0 + tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_k < K)[None, :]
    if WIDE:
        offs_n = offs_n.to(tl.int64)
    first = offs_n[:, None] * K  # of the row, in the flattened weight
    if BITS == 8:
        q = tl.load(packed_ptr + (first + offs_k[None, :]), mask=mask, other=0).to(tl.int32)
        value = look_up(code_ptr, q, ASM)
    elif WORDS:
        offs_w = k0 // 8 + tl.arange(0, BLOCK_K // 8)
        inside = mask_n[:, None] & (offs_w < K // 8)[None, :]
        words = packed_ptr.to(tl.pointer_type(tl.uint32))
        word = tl.load(words + (offs_n[:, None] * (K // 8) + offs_w[None, :]), mask=inside, other=0)
        # The even element of a byte is in its high half.
        v0 = look_up(code_ptr, (word >> 4) & 15, ASM)
        v1 = look_up(code_ptr, word & 15, ASM)
        v2 = look_up(code_ptr, (word >> 12) & 15, ASM)
        v3 = look_up(code_ptr, (word >> 8) & 15, ASM)
        v4 = look_up(code_ptr, (word >> 20) & 15, ASM)
        v5 = look_up(code_ptr, (word >> 16) & 15, ASM)
        v6 = look_up(code_ptr, word >> 28, ASM)
        v7 = look_up(code_ptr, (word >> 24) & 15, ASM)
        even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
        odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
        value = tl.join(even, odd).reshape(BLOCK_N, BLOCK_K)
    else:
        element = first + offs_k[None, :]
        byte = tl.load(packed_ptr + (element >> 1), mask=mask, other=0).to(tl.int32)
        value = look_up(code_ptr, tl.where((element & 1) == 0, byte >> 4, byte & 15), ASM)
    if WHOLE:
        PARTS: tl.constexpr = 2 if SHIFT else 1
        scale = tile_scales(
            offs_n, mask_n, k0, K, codes, BLOCK_N, BLOCK_K, LOG2_BLOCK, PARTS, 0, LOG2_NESTED
        )
        if SHIFT:
            return value * scale + tile_scales(
                offs_n, mask_n, k0, K, codes, BLOCK_N, BLOCK_K, LOG2_BLOCK, PARTS, 1, LOG2_NESTED
            )
    else:
        block = (first + offs_k[None, :]) >> LOG2_BLOCK
        scale = block_scales(block, mask, codes)
    return value * scale


@triton.jit
def grouped(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return the tile of a program in a grouped order, which improves L2 cache hits.

    Programs go down GROUP_M tiles, then one tile to the right.
    """
    width = GROUP_M * tiles_n
    first_m = pid // width * GROUP_M
    height = min(tiles_m - first_m, GROUP_M)
    return first_m + pid % width % height, pid % width // height
