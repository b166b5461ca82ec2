"""The decoder's refusals, plans and launches, and operands beyond 2^31."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.backends import cuda, workspace
from lora_kernels.backends.cuda import COOPERATIVE, STRATEGIES
from lora_kernels.backends.cuda import linear as equation
from lora_kernels.core.call import Operands, Spec
from tests.support.emulator import build_program, deferred_launches, emulated_stream
from tests.support.problems import bf16, f16, f32

F32, BF16, F16 = 0, 1, 2
ADDRESS = 4096  # of what is never read
FITS = "too many blocks for a cooperative launch"  # on no multiprocessor: nothing else is wrong


def arguments(
    M: int = 8, N: int = 32, K: int = 128, R: int = 4, codes: bool = False, **changed: Any
) -> tuple[Any, ...]:
    """A call's arguments; changed: fields that are not those of an ordinary one."""
    given: dict[str, Any] = {
        "x": BF16,
        "x_whole": True,
        "x_of_p": BF16,
        "x_of_p_whole": True,
        "w": BF16,
        "w_whole": True,
        "a_whole": True,
        "codes_whole": True,
        "log2_block": 6,
        "transposed": False,
        "compute": BF16,
        "max_blocks": 12,
    }
    assert given.keys() >= changed.keys()
    given |= changed
    x = ADDRESS, given["x"], K, 1, given["x_whole"]
    w = None if codes else (ADDRESS, given["w"], K, 1, given["w_whole"])
    scales = ADDRESS, 0, 0, 0, given["log2_block"], 0
    c = (ADDRESS, ADDRESS, *scales, N, K, given["codes_whole"]) if codes else None
    q, vectors = (ADDRESS, BF16, 1, R, False), (None, 1.0, None, None)
    outputs = ADDRESS, 0, BF16
    linear = x, w, c, given["transposed"], given["compute"], 0, q, *vectors, *outputs, M, N, K, R
    x_of_p = ADDRESS, given["x_of_p"], K, 1, given["x_of_p_whole"]
    a = ADDRESS, BF16, K, 1, given["a_whole"]
    return linear, x_of_p, a, ADDRESS, ADDRESS, ADDRESS, 256, 1, ADDRESS, given["max_blocks"]


X, A, W = (
    f"{name}'s rows are not whole and aligned 16 bytes" for name in ("x", "lora_A", "the weight")
)
CODES = "the weight's rows are not whole blocks of 64 codes or more"
ROWS = "it is for 1 to 16 rows"


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, FITS),
        ({"codes": True}, FITS),
        ({"M": 1}, FITS),
        ({"M": 16}, FITS),
        ({"M": 0}, ROWS),
        ({"M": 17}, ROWS),
        ({"transposed": True}, "it is for the forward"),
        ({"compute": F32, "x": F32, "w": F32}, "float32 products need every bit"),
        ({"compute": F16, "x": F16, "w": F16}, FITS),
        ({"x_whole": False}, X),
        ({"x_whole": False, "codes": True}, X),
        ({"K": 8}, FITS),
        ({"K": 132}, X),
        ({"x": F32}, FITS),  # converted on its way to shared memory
        ({"x": F16}, FITS),
        ({"x": F32, "M": 9}, X),
        ({"x": F32, "M": 16, "codes": True}, X),
        ({"x": F32, "K": 8192}, X),  # more than a block keeps
        ({"x_of_p": F32, "M": 9}, FITS),  # P's rows are of any dtype
        ({"x_of_p_whole": False}, X),
        ({"a_whole": False}, A),
        ({"w": F32}, W),
        ({"w": F16}, W),
        ({"w_whole": False}, W),
        ({"codes_whole": False}, FITS),
        ({"log2_block": 5}, FITS),
        ({"codes": True, "w": F32, "w_whole": False}, FITS),
        ({"codes": True, "codes_whole": False}, CODES),
        ({"codes": True, "log2_block": 5}, CODES),
        ({"codes": True, "log2_block": 12}, FITS),
        ({"codes": True, "K": 96}, CODES),
        ({"codes": True, "K": 64}, FITS),
        ({"codes": True, "K": 192}, FITS),
    ],
    ids=str,
)
def test_decode_refuses_what_it_cannot_read(changed: dict[str, Any], why: str) -> None:
    """The choice of a strategy asks first; a launch that does not is no wrong result."""
    device = 1
    with cuda.emulate(0, 0) as emulator, pytest.raises(RuntimeError, match=f"^decode: {why}"):
        emulator.decode(arguments(**changed), (0, device))


ROOM = 80 << 10  # bytes of shared memory: two blocks of a multiprocessor of sm_80
TABLE, RINGS, WARPS = 32 << 10, 32 << 10, 8


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("M", range(1, 10))
def test_decode_keeps_x_where_two_blocks_still_fit(M: int, codes: bool) -> None:
    """The table of codes, W's loads, a tile's sums of each warp, S, and x in whole chunks."""
    others = (TABLE if codes else 0) + RINGS + WARPS * 8 * (16 + 4) * 4 + 16
    for R in (1, 16, 61, 64, 200):
        left = ROOM - others - -(-4 * M * R // 16) * 16
        chunks = left // (256 * M)
        for K in (128 * chunks, 128 * chunks + 64):
            if K > 0:
                is_kept = M <= 8 and 128 * chunks == K
                assert cuda.module().decode_plan(arguments(M, 32, K, R, codes))[0] == is_kept
        # As many ranks as are left room by so many chunks.
        most = (ROOM - others - 256 * M * chunks) // 16 * 16 // (4 * M)
        for ranks in (most, most + 1):
            is_kept = M <= 8 and ranks == most
            plan = cuda.module().decode_plan(arguments(M, 32, 128 * chunks, ranks, codes))
            assert chunks < 1 or plan[0] == is_kept


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "K", "max_blocks", "want"),
    [
        # Tiles of 16 rows in parts of 1024: two places for each block.
        (1, 16, 1024, 12, 0),
        (1, 16, 1088, 12, 2 * 2 * 16),
        (1, 160, 1024, 12, 0),
        (1, 160, 1088, 12, 2 * 12 * 16),
        (1, 96, 1088, 12, 2 * 12 * 16),
        (1, 80, 1088, 12, 2 * 10 * 16),
        (1, 88, 2112, 384, 2 * 18 * 16),
        (4, 88, 1088, 5, 2 * 5 * 16 * 4),
        # Of 64 rows in parts of 256.
        (9, 64, 256, 12, 0),
        (9, 64, 320, 12, 2 * 2 * 64 * 9),
        (16, 72, 576, 12, 2 * 6 * 64 * 16),
        (16, 72, 576, 4, 2 * 4 * 64 * 16),
        (8, 72, 8192, 20, 2 * 20 * 64 * 8),
    ],
)
def test_decode_plans_two_sums_of_a_tile_for_each_block(
    M: int, N: int, K: int, max_blocks: int, want: int, codes: bool
) -> None:
    args = arguments(M, N, K, codes=codes, max_blocks=max_blocks)
    assert cuda.module().decode_plan(args) == (M < 8, want)


def test_flags_are_for_as_many_blocks_as_a_launch_may_have() -> None:
    filled = [torch.full((2 + workspace.MAX_BLOCKS,), 7, dtype=torch.int32) for _ in range(9)]
    del filled  # memory that is given out again
    flags = workspace.flags(torch.device("cpu"))
    assert (flags.shape, flags.dtype) == ((2 + workspace.MAX_BLOCKS,), torch.int32)
    assert not flags.any() and workspace.MAX_BLOCKS >= 2 * 188  # multiprocessors of a GPU


# A call ----------------------------------------------------------------------------------------


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = bf16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).to(dtype)


def call(operands: Operands, strategy: str = COOPERATIVE) -> Tensor:
    y, _ = equation.lora_linear(operands, Spec(1.0, 0.0, bf16, f32), strategy)
    return y


def operands(M: int = 3, N: int = 72, K: int = 136, R: int = 5, seed: int = 0) -> Operands:
    sizes = (M, K), (N, K), (R, K), (N, R)
    return Operands(*(integers(*size, seed=seed + i) for i, size in enumerate(sizes)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("save_z", [False, True])
def test_call_of_no_rows_returns_what_a_call_of_some_does(strategy: str, save_z: bool) -> None:
    (y, saved), (none, empty) = (
        equation.lora_linear(operands(M), Spec(1.0, 0.0, bf16, f16, save_z), strategy)
        for M in (1, 0)
    )
    for some, no in ((y, none), *zip(saved, empty, strict=True)):
        assert (some is None) == (no is None)
        if some is not None and no is not None:
            assert (no.dtype, no.shape) == (some.dtype, (0, *some.shape[1:]))


@pytest.mark.parametrize("seed", range(6))
def test_grids_of_two_streams_wait_for_room_as_a_whole(seed: int) -> None:
    """Blocks of both that wait for those without a place would wait forever."""
    inputs = operands(), operands(seed=9)
    want = [call(each) for each in inputs]
    with cuda.emulate(seed, 4), deferred_launches():
        got = []
        for number, each in enumerate(inputs):
            with emulated_stream(number):
                got.append(call(each))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Beyond 2^31 -----------------------------------------------------------------------------------


def far_apart(t: Tensor) -> Tensor:
    """Copy t into rows far apart, so that the last one begins past 2^31 elements. Memory between
    them is never used."""
    rows, columns = t.shape
    step = -(-(2**31) // (rows - 1) // 8) * 8 + 8
    assert (rows - 1) * step > 2**31
    return torch.empty_strided((rows, columns), (step, 1), dtype=t.dtype).copy_(t)


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "lora_B by columns"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("M", [3, 9])
def test_lora_linear_of_rows_far_apart_is_exact(M: int, strategy: str, name: str) -> None:
    args = operands(M)
    field, _, by_columns = name.partition(" ")
    t = getattr(args, field)
    far = far_apart(t.t()).t() if by_columns else far_apart(t)
    got = call(args._replace(**{field: far}), strategy)
    assert torch.equal(got, call(args, strategy))
    x, w, a, b = (t.double() for t in args[:4] if isinstance(t, Tensor))
    assert torch.equal(got.double(), x @ w.t() + x @ a.t() @ b.t())


LAST_BLOCK = """
#include <cstdio>
#include <cstdlib>
#include "cuda/ptx.cuh"
// The one block that runs is the last of a grid.
namespace lora_kernels::gpu {
int before = 0;
inline int block_of_many() { return before + block_x(); }
}
#define block_x() block_of_many()
#include "cuda/decode.cu"
using namespace lora_kernels;
using namespace lora_kernels::gpu;

int main() {
  // 2^32 codes and two tiles more, in memory that is zero and used nowhere else.
  const int64_t K = 2048, N = (1 << 21) + 32, past = N - 32;
  uint8_t* const packed = (uint8_t*)std::calloc(N * K / 2, 1);
  float* const absmax = (float*)std::calloc(N * K / 64, 4);
  static float code[16], out[1 << 22], p, partials[1];
  static uint16_t x[2048], a[2048], b[1];
  static int flags[4];
  for (int i = 0; i < 16; ++i) code[i] = (float)i;
  for (int k = 0; k < K; ++k) x[k] = f32_to_bf16(1.0f);
  for (int64_t i = past * K / 2; i < N * K / 2; ++i) packed[i] = (uint8_t)(i / 1024 % 16 * 17);
  for (int64_t i = past * K / 64; i < N * K / 64; ++i) absmax[i] = (float)(i / 32 % 5 + 1);
  DecodeArgs d = {};
  LinearArgs& l = d.linear;
  l.x = {x, BF16, K, 1, true};
  l.codes = true;
  l.c = {packed, code, absmax, nullptr, nullptr, nullptr, 6, 0, N, K, true};
  l.compute = BF16;
  l.q = {b, BF16, 0, 0, false};
  l.s_scale = 1.0f;
  l.y = out;
  l.y_dtype = F32;
  l.M = l.R = 1, l.N = N, l.K = K;
  d.a = {a, BF16, K, 1, true};
  d.partials = partials, d.p = &p, d.flags = flags, d.k_per_split = K;
  d.resident = true;
  set_tiles(d);
  d.stripe = 2 * d.parts;
  before = d.tiles / 2 - 1;
  emulator::multiprocessors = 1;
  const auto range = [](const char* name, const void* of, int64_t bytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(of);
    return emulator::Range{.name = name, .begin = begin, .end = begin + bytes};
  };
  emulator::allow({range("packed", packed + past * K / 2, 32 * K / 2), range("code", code, 64),
                   range("absmax", absmax + past * K / 64, 32 * K / 16), range("x", x, 4096),
                   range("q", b, 2), range("y", out + past, 32 * 4), range("flags", flags, 16)});
  launch({.name = "decode", .x = 1, .threads = THREADS, .shared_bytes = shared_bytes(d),
          .stream = {}},
         decode_codes_kernel<true, true, 1>, d);
  try {
    emulator::synchronize();
  } catch (const std::exception& error) {
    std::printf("%s", error.what());
    return 1;
  }
  for (int64_t n = past; n < N; ++n) std::printf("%g ", out[n] / 2048);
}
"""


def test_decode_of_more_codes_than_a_32_bit_number_counts_is_exact(tmp_path: Path) -> None:
    program = build_program(LAST_BLOCK, tmp_path)
    done = subprocess.run([program], capture_output=True, text=True)
    first = 2**21  # of the rows; each has a code and a scale of its own
    want = [n % 16 * (n % 5 + 1) for n in range(first, first + 32)]
    assert done.stdout.split() == [f"{each:g}" for each in want]
