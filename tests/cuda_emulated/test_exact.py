"""Results are exact if the answer is; launches, memory, and the bytes that kernels move."""

import math
from collections import Counter

import pytest
import torch

import lora_kernels
from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import COOPERATIVE, STRATEGIES, TWO_PASS, launch
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case
from lora_kernels.quantization import quantize_4bit
from tests.support import exact
from tests.support.engines import each, pair_cases
from tests.support.exact import integers
from tests.support.problems import UNDROPPED, bf16, f16, f32

every_dtype = pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
# A strategy, and a shape in which it has several parts.
SHAPES = {TWO_PASS: (65, 40, 72, 33), COOPERATIVE: (13, 40, 72, 5)}
INTEGERS = [
    pair
    for strategy, shape in SHAPES.items()
    for dtype in (bf16, f16)
    for options in ({}, UNDROPPED)
    for pair in pair_cases("cuda", (strategy,), [integers(*shape, dtype=dtype, **options)])
]


@each({"": INTEGERS})
def test_lora_linear_of_integers_is_exact(case: Case, engine: str) -> None:
    exact.check(case)


@pytest.mark.parametrize(("M", "blocksize"), [(33, 0), (33, 64), (9, 64)])
def test_lora_linear_of_arguments_off_alignment_is_the_same(M: int, blocksize: int) -> None:
    """Whichever kernel takes them is exact; a weight off alignment is refused."""
    case = integers(M, 40, 64, 8, dtype=bf16, **UNDROPPED)
    exact.check_alignment(case, blocksize, refused=("weight", "weight packed"))


@every_dtype
@pytest.mark.parametrize(
    ("sizes", "quant"),
    [
        ((72, 128), "nf4-64-nested"),
        ((40, 96), "fp4-32-nested"),
        ((64, 96), "nf4-64"),
        ((40, 96), "mxfp4-32-nested"),
        ((72, 160), "nvfp4-16-nested"),
    ],
    ids=str,
)
def test_lora_linear_of_unit_matrices_is_the_4bit_weight(
    sizes: tuple[int, int], quant: str, dtype: torch.dtype
) -> None:
    exact.check_reads_out_the_weight(sizes, quant, dtype)


@pytest.mark.parametrize(("dtype", "bits"), [(bf16, 16), (f16, 21)], ids=str)
def test_decode_of_codes_keeps_more_bits_than_a_matrix_unit_takes(
    dtype: torch.dtype, bits: int
) -> None:
    """y in float32 shows them: the sum of a high and a low part, as one float32 product each."""
    N, K = 40, 128
    weight = quantize_4bit(torch.randn(N, K, generator=torch.Generator().manual_seed(2)))
    A, B = torch.ones(3, K), torch.zeros(N, 3)
    want = weight.dequantize(f32).double()
    for m in range(0, K, 16):
        with lora_kernels.backend("cuda", COOPERATIVE):
            y = lora_kernels.lora_linear(
                torch.eye(K)[m : m + 16], weight, A, B, compute_dtype=dtype
            )
        assert y.dtype is f32
        error = (y.double().t() - want[:, m : m + 16]).abs()
        assert (error <= want[:, m : m + 16].abs() * 2.0**-bits).all()
    assert {kernel for kernel, _ in launch.traffic} >= {"decode"}


def test_decode_of_nested_scales_is_bitwise() -> None:
    """A code of 1 is exact, so that y in float32 shows the scale as it was rounded, twice."""
    N, K = 96, 128
    scales = torch.rand(N * K // 64, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    weight = quantize_4bit(scales.expand(-1, 64).reshape(N, K), "nf4", 64, double_quant=True)
    A, B = torch.ones(3, K), torch.zeros(N, 3)
    with lora_kernels.backend("cuda", COOPERATIVE):
        y = lora_kernels.lora_linear(torch.eye(K)[60:76], weight, A, B, compute_dtype=bf16)
    assert torch.equal(y.t(), weight.dequantize(f32)[:, 60:76])


@pytest.mark.parametrize(("N", "K", "blocksize"), [(72, 192, 128), (40, 64, 256)])
def test_decode_of_blocks_that_straddle_rows_has_their_scales(
    N: int, K: int, blocksize: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = quantize_4bit(torch.randn(N, K, generator=generator), "nf4", blocksize)
    A, B, want = torch.ones(3, K), torch.zeros(N, 3), weight.dequantize(f32).t()
    with lora_kernels.backend("cuda", COOPERATIVE):
        for m in range(0, K, 16):
            x = torch.eye(K)[m : m + 16]
            y = lora_kernels.lora_linear(x, weight, A, B, compute_dtype=bf16)
            assert ((y - want[m : m + 16]).abs() <= want[m : m + 16].abs() * 2.0**-16).all()


@pytest.mark.parametrize(("K", "blocksize"), [(1088, 64), (2816, 0)])
def test_decode_of_eight_rows_that_are_not_kept_is_exact(K: int, blocksize: int) -> None:
    """Eight columns of a product are enough for them, and shared memory has no more."""
    with lora_kernels.backend("cuda", COOPERATIVE):
        exact.check(exact.integers(8, 72, K, 5, dtype=bf16, **UNDROPPED), blocksize)
    assert "decode" in {kernel for kernel, _ in launch.traffic}


def test_eight_rows_of_float32_that_are_not_kept_are_converted() -> None:
    args = cases.inputs(Case(8, 72, 4096, 4, bf16, **UNDROPPED))
    args.pop("dy")
    wide = args | {"x": args["x"].detach().float()}
    with (
        torch.no_grad(),
        lora_kernels.backend("cuda", COOPERATIVE),
        torch.autocast("cpu", bf16),
    ):
        y, want = (lora_kernels.lora_linear(**each) for each in (wide, args))
    assert torch.equal(y.to(want.dtype), want)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lora_linear_of_a_weight_with_gaps_between_rows_has_the_same_bits(strategy: str) -> None:
    args = cases.inputs(Case(9, 40, 64, 5, bf16, **UNDROPPED))
    wide = torch.nn.functional.pad(args["weight"], (0, 8), value=float("nan"))[:, :64]
    with lora_kernels.backend("cuda", strategy):
        want, got = (
            cases.run(lora_kernels.lora_linear, args | {"weight": w})
            for w in (args["weight"], wide)
        )
    for name in want:
        assert torch.equal(want[name], got[name]), name


def test_decode_of_tiles_that_many_blocks_share_has_the_same_bits() -> None:
    """Sums of two blocks commute, those of three do not; y in float32 shows it."""
    options = {"quant": "nf4-64", "compute": bf16, **UNDROPPED}
    args = cases.inputs(Case(9, 40, 4096, 5, f32, **options))
    args.pop("dy")
    found = []
    with torch.no_grad(), lora_kernels.backend("cuda", COOPERATIVE):
        for seed in range(6):
            with cuda.emulate(seed, 4):
                found.append(lora_kernels.lora_linear(**args))
    for other in found[1:]:
        assert torch.equal(found[0], other)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lora_linear_in_any_order_of_threads_has_the_same_bits(strategy: str) -> None:
    """Also with fewer blocks than splits of P."""
    args = cases.inputs(Case(13, 72, 640, 16, bf16, **UNDROPPED))
    results = []
    for seed, multiprocessors in ((0, 2), (1, 2), (2, 2)):
        with cuda.emulate(seed, multiprocessors), lora_kernels.backend("cuda", strategy):
            results.append(cases.run(lora_kernels.lora_linear, args))
    for other in results[1:]:
        for name, first in results[0].items():
            assert torch.equal(first, other[name]), name


@pytest.mark.parametrize("where", exact.FINITE)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lora_linear_of_what_is_not_finite_spreads_it_as_pytorch(strategy: str, where: str) -> None:
    case = Case(9, 40, 40, 5, bf16, **UNDROPPED)
    with lora_kernels.backend("cuda", strategy):
        exact.check_spread(case, where, float("inf"))


# Launches and bytes -----------------------------------------------------------------------------


def forward(case: Case, strategy: str) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """The launches of a forward, with the bytes that each read and wrote."""
    args = cases.inputs(case)
    args.pop("dy")
    launch.traffic.clear()
    with lora_kernels.backend("cuda", strategy), torch.no_grad():
        lora_kernels.lora_linear(**args)
    return list(launch.traffic)


def moved(traffic: list[tuple[str, dict[str, tuple[int, int]]]]) -> dict[str, int]:
    """Bytes read and written, by name and in all launches."""
    total: Counter[str] = Counter()
    for _, ranges in traffic:
        for name, (read, written) in ranges.items():
            total[f"read {name}"] += read
            total[f"write {name}"] += written
    return dict(total)


@pytest.mark.parametrize("quant", ["", "nf4-64-nested", "fp4-128"])
@pytest.mark.parametrize("M", [1, 16])
def test_decode_of_few_rows_moves_each_byte_of_w_once(M: int, quant: str) -> None:
    """One launch. W's bytes once; x once for each block, or each 16 rows of W, and once for two
    ranks; A once for four rows; B once for each row of x, from the cache but the first time; y, P
    once."""
    N, K, R = 96, 512, 5
    traffic = forward(Case(M, N, K, R, bf16, quant=quant), COOPERATIVE)
    assert [kernel for kernel, _ in traffic] == ["decode"]
    bytes_ = moved(traffic)
    if quant:
        assert bytes_["read packed"] == N * K // 2
        blocksize = int(quant.split("-")[1])
        assert bytes_["read absmax"] == N * K // 64 * (1 if "nested" in quant else 4)
        assert blocksize % 64 == 0
    else:
        assert bytes_["read w"] == N * K * 2
    # One row: six tiles of 16 rows, two a block. 16 rows: two tiles of 64, each a block's, whose
    # warps read x for 16.
    blocks, of_x = (3, 3) if M == 1 else (2, 8)
    assert bytes_["read x"] == (of_x + math.ceil(R / 2)) * M * K * 2
    assert bytes_["read a"] == math.ceil(M / 4) * R * K * 2
    assert bytes_["read q"] == M * N * R * 2
    assert bytes_["write y"] == M * N * 2
    num_splits = 2
    assert bytes_["write partials"] == num_splits * M * R * 4
    assert bytes_["read partials"] == blocks * num_splits * M * R * 4
    assert bytes_["write p"] == M * R * 4


@pytest.mark.parametrize(("M", "N", "K"), [(1, 72, 2304), (3, 40, 3136), (11, 200, 1088)], ids=str)
@pytest.mark.parametrize("blocksize", [0, 64])
def test_decode_of_tiles_that_blocks_share_is_exact(M: int, N: int, K: int, blocksize: int) -> None:
    """If a block's stripe ends inside of a tile, the last block of the tile adds all sums."""
    shared = set()
    for places in range(1, 8):
        launch.traffic.clear()
        with cuda.emulate(places, places), lora_kernels.backend("cuda", COOPERATIVE):
            exact.check(exact.integers(M, N, K, 5, dtype=bf16, **UNDROPPED), blocksize)
        (bytes_,) = (ranges for kernel, ranges in launch.traffic if kernel == "decode")
        if bytes_.get("tile_partials", (0, 0))[1]:
            shared.add(places)
    assert 1 not in shared and len(shared) > 1


@pytest.mark.parametrize("quant", ["", "nf4-64-nested", "mxfp4-32-nested", "nvfp4-16-nested"])
def test_gemm_moves_x_once_for_each_128_columns_and_w_for_each_64_rows(quant: str) -> None:
    """x once for each 128 columns, W once for each 64 rows, P and Q with them; y once."""
    M, N, K, R = 130, 264, 192, 5
    traffic = forward(Case(M, N, K, R, bf16, quant=quant), TWO_PASS)
    assert [kernel for kernel, _ in traffic] == ["thin", "gemm"]
    bytes_ = moved(traffic[1:])
    down, across = math.ceil(M / 64), math.ceil(N / 128)
    assert bytes_["read x"] == across * M * K * 2
    if quant:
        assert bytes_["read packed"] == down * N * K // 2
        # Two runs of 32 codes have one scale, and a block of 16 has one.
        assert bytes_["read absmax"] == down * N * K // (16 if quant.startswith("nv") else 32)
    else:
        assert bytes_["read w"] == down * N * K * 2
    assert bytes_["read p"] == across * M * R * 4
    assert bytes_["read q"] == down * N * R * 2
    assert bytes_["write y"] == M * N * 2


def test_backward_reads_dy_once_for_ds_and_db() -> None:
    M, N, K, R = 130, 200, 64, 5
    args = cases.inputs(Case(M, N, K, R, bf16))
    args["x"].requires_grad_(False)
    y = lora_kernels.lora_linear(**{name: a for name, a in args.items() if name != "dy"})
    launch.traffic.clear()
    y.backward(args["dy"])
    assert [kernel for kernel, _ in launch.traffic][:2] == ["pair", "reduce"]
    assert launch.traffic[0][1]["v"] == (M * N * 2, 0)
    reads = sum(ranges.get("v", (0, 0))[0] for _, ranges in launch.traffic)
    assert reads == M * N * 2 + M * K * 2  # and x once, for dA
