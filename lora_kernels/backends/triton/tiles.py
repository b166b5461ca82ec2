"""Functions that the kernels share: conversions, `dot`, the dropout mask, tiles of a weight.

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
def to_named(x, NAME: tl.constexpr):
    """Round x to the dtype of that name; see `arguments.Types`."""
    if NAME == "float32":
        return to_dtype(x, tl.float32)
    elif NAME == "bfloat16":
        return to_dtype(x, tl.bfloat16)
    else:
        return to_dtype(x, tl.float16)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a·b in float32. PRECISION: for float32 operands."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def keep_mask(mask, m0, k0, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the tile of `reference.dropout_mask` at [m0, k0], int1[BLOCK_M, BLOCK_K].

    k0 is a multiple of 4, because four elements share a call of Philox.
    """
    seed = tl.load(mask.rng).to(tl.uint64, bitcast=True)
    offset = tl.load(mask.rng + 1).to(tl.uint64, bitcast=True)
    zeros = tl.zeros([BLOCK_M, BLOCK_K // 4], dtype=tl.uint32)
    group = k0 // 4 + tl.arange(0, BLOCK_K // 4)
    row = m0 + tl.arange(0, BLOCK_M)
    c0, c1, c2, c3 = tl.philox_impl(
        zeros + group[None, :].to(tl.uint32),
        zeros + row[:, None].to(tl.uint32),
        zeros + (offset & 0xFFFFFFFF).to(tl.uint32),
        zeros + (offset >> 32).to(tl.uint32),
        (seed & 0xFFFFFFFF).to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return words.reshape(BLOCK_M, BLOCK_K) >= mask.threshold


@triton.jit
def load_tile(ptr, offs_0, stride_0, offs_1, stride_1, mask_0, mask_1, WIDE: tl.constexpr):
    """Load [BLOCK_0, BLOCK_1] of a matrix, 0 outside. WIDE: whether offsets exceed 2³¹."""
    if WIDE:
        offs_0 = offs_0.to(tl.int64)
        offs_1 = offs_1.to(tl.int64)
    at = ptr + (offs_0[:, None] * stride_0 + offs_1[None, :] * stride_1)
    return tl.load(at, mask=mask_0[:, None] & mask_1[None, :], other=0.0)


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
def block_scales(block, mask, codes):
    """Load the float32 scales of the blocks, 0 if masked. Nested scales are rounded twice."""
    if codes.nested_absmax is not None:
        code = tl.load(codes.absmax + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(codes.nested_absmax + (block >> 8), mask=mask, other=0.0)
        scale = tl.load(codes.nested_code + code) * scale + tl.load(codes.offset)
        return tl.where(mask, scale, 0.0)
    else:
        return tl.load(codes.absmax + block, mask=mask, other=0.0)


@triton.jit
def load_codes(
    codes,
    n0,
    k0,
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FORMAT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Decode [BLOCK_N, BLOCK_K] of a 4-bit weight at [n0, k0] in float32, 0 outside.

    The weight [N, K] starts at `codes.first_row` of a stack.

    WORDS requires aligned words, and K and k0 that are multiples of 8. WHOLE requires K that is a
    multiple of the block, and k0 that is a multiple of the block or of BLOCK_K. Then a row of the
    tile has one scale or few.
    """
    offs_n, offs_k = n0 + tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_k < K)[None, :]
    if WIDE:
        offs_n = offs_n.to(tl.int64)
    if codes.first_row is not None:
        offs_n += codes.first_row
    first = offs_n[:, None] * K  # of the row, in the flattened weight
    if FORMAT.WORDS:
        offs_w = k0 // 8 + tl.arange(0, BLOCK_K // 8)
        inside = mask_n[:, None] & (offs_w < K // 8)[None, :]
        words = codes.packed.to(tl.pointer_type(tl.uint32))
        word = tl.load(words + (offs_n[:, None] * (K // 8) + offs_w[None, :]), mask=inside, other=0)
        # The even element of a byte is in its high half.
        v0 = look_up(codes.code, (word >> 4) & 15, FORMAT.ASM)
        v1 = look_up(codes.code, word & 15, FORMAT.ASM)
        v2 = look_up(codes.code, (word >> 12) & 15, FORMAT.ASM)
        v3 = look_up(codes.code, (word >> 8) & 15, FORMAT.ASM)
        v4 = look_up(codes.code, (word >> 20) & 15, FORMAT.ASM)
        v5 = look_up(codes.code, (word >> 16) & 15, FORMAT.ASM)
        v6 = look_up(codes.code, word >> 28, FORMAT.ASM)
        v7 = look_up(codes.code, (word >> 24) & 15, FORMAT.ASM)
        even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
        odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
        value = tl.join(even, odd).reshape(BLOCK_N, BLOCK_K)
    else:
        element = first + offs_k[None, :]
        byte = tl.load(codes.packed + (element >> 1), mask=mask, other=0).to(tl.int32)
        value = look_up(codes.code, tl.where((element & 1) == 0, byte >> 4, byte & 15), FORMAT.ASM)
    if FORMAT.WHOLE:
        SCALES: tl.constexpr = (BLOCK_K + (1 << FORMAT.LOG2_BLOCK) - 1) >> FORMAT.LOG2_BLOCK
        per_row, first_block = K >> FORMAT.LOG2_BLOCK, k0 >> FORMAT.LOG2_BLOCK
        if SCALES == 1:
            scale = block_scales(offs_n * per_row + first_block, mask_n, codes)[:, None]
        else:
            offs_s = first_block + tl.arange(0, SCALES)
            block = offs_n[:, None] * per_row + offs_s[None, :]
            scale = block_scales(block, mask_n[:, None] & (offs_s < per_row)[None, :], codes)
            scale = tl.broadcast_to(scale[:, :, None], BLOCK_N, SCALES, BLOCK_K // SCALES)
            scale = scale.reshape(BLOCK_N, BLOCK_K)
    else:
        block = (first + offs_k[None, :]) >> FORMAT.LOG2_BLOCK
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
