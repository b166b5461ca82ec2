"""Results are exact if the answer is; launches, memory, and the bytes that kernels move."""

import math
from collections import Counter

import pytest
import torch

import lora_kernels
from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import COOPERATIVE, OVERLAPPED, TWO_PASS, TWO_PASS_SIMT, launch
from lora_kernels.bench import case as cases
from lora_kernels.bench.case import Case, fits_cuda
from lora_kernels.quantization import quantize_4bit
from tests.support import exact
from tests.support.engines import each, pair_cases
from tests.support.exact import integers
from tests.support.problems import FULL, bf16, f16, f32

every_dtype = pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
# A strategy, and a shape in which it has several parts; CUDA cores take the rest.
SHAPES = {
    TWO_PASS_SIMT: (13, 19, 17, 5),
    TWO_PASS: (65, 40, 72, 33),
    COOPERATIVE: (13, 40, 72, 5),
    OVERLAPPED: (5, 40, 136, 3),
}
INTEGERS = [
    pair
    for strategy, shape in SHAPES.items()
    for dtype in (f32, bf16, f16)
    for options in exact.SOME_OPTIONS
    for case in [integers(*shape, dtype=dtype, **options)]
    for pair in pair_cases(
        "cuda", (strategy if fits_cuda(case, strategy) else TWO_PASS_SIMT,), [case]
    )
]


@each({"": INTEGERS})
def test_lora_linear_of_integers_is_exact(case: Case, engine: str) -> None:
    exact.check(case)


@pytest.mark.parametrize(
    ("M", "dtype", "blocksize"), [(33, f32, 0), (33, bf16, 0), (33, bf16, 64), (9, bf16, 64)]
)
def test_lora_linear_of_arguments_off_alignment_is_the_same(
    M: int, dtype: torch.dtype, blocksize: int
) -> None:
    """Whichever kernel takes them is exact."""
    exact.check_alignment(integers(M, 40, 64, 8, dtype=dtype, **exact.OPTIONS), blocksize)


@every_dtype
@pytest.mark.parametrize(("sizes", "quant"), [*exact.FORMATS, ((64, 72), "nf4-64")], ids=str)
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


@pytest.mark.parametrize(
    ("M", "dtype", "strategy"),
    [(12, bf16, COOPERATIVE), (70, bf16, TWO_PASS), (65, f32, TWO_PASS_SIMT)],
)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_lora_linear_with_dropout_sees_the_public_mask(
    p: float, M: int, dtype: torch.dtype, strategy: str
) -> None:
    # 1/(1 - p), and what it multiplies, are each rounded to bfloat16: by 2⁻⁹ at most.
    with lora_kernels.backend("cuda", strategy):
        exact.check_mask((M, 64, 64), p, dtype, rtol=2 * 2.0**-9 if dtype is bf16 else 0)


@pytest.mark.parametrize("strategy", [COOPERATIVE, OVERLAPPED, TWO_PASS])
def test_lora_linear_in_any_order_of_threads_has_the_same_bits(strategy: str) -> None:
    args = cases.inputs(Case(13, 72, 320, 16, bf16, **FULL))
    results = []
    for seed, multiprocessors in ((0, 4), (1, 2), (2, 9)):
        with cuda.emulate(seed, multiprocessors), lora_kernels.backend("cuda", strategy):
            results.append(cases.run(lora_kernels.lora_linear, args))
    for other in results[1:]:
        for name, first in results[0].items():
            assert torch.equal(first, other[name]), name


@pytest.mark.parametrize("where", exact.FINITE)
@pytest.mark.parametrize(
    ("K", "strategy"), [(37, TWO_PASS_SIMT), (40, TWO_PASS), (40, COOPERATIVE)], ids=str
)
def test_lora_linear_of_what_is_not_finite_spreads_it_as_pytorch(
    K: int, strategy: str, where: str
) -> None:
    case = Case(9, 40, K, 5, bf16, gate=True, column_scale=True, bias=True)
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
    """One launch. W's bytes once; x once for each block, and once a rank; A once a row; B once for
    each row of x, from the cache but the first time; y, P once."""
    N, K, R, blocks = 96, 512, 5, 4
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
    assert bytes_["read x"] == (blocks + R) * M * K * 2
    assert bytes_["read a"] == M * R * K * 2
    assert bytes_["read q"] == M * N * R * 2
    assert bytes_["write y"] == M * N * 2
    num_splits = 2
    assert bytes_["write partials"] == num_splits * M * R * 4
    assert bytes_["read partials"] == blocks * num_splits * M * R * 4
    assert bytes_["write p"] == M * R * 4


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
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
        assert bytes_["read absmax"] == down * N * K // 32  # two runs of 32 codes have one scale
    else:
        assert bytes_["read w"] == down * N * K * 2
    assert bytes_["read p"] == across * M * R * 4
    assert bytes_["read q"] == down * N * R * 2
    assert bytes_["write y"] == M * N * 2


def test_backward_reads_dy_once_for_ds_and_db() -> None:
    M, N, K, R = 130, 200, 64, 5
    args = cases.inputs(Case(M, N, K, R, f32))
    args["x"].requires_grad_(False)
    y = lora_kernels.lora_linear(**{name: a for name, a in args.items() if name != "dy"})
    launch.traffic.clear()
    y.backward(args["dy"])
    assert [kernel for kernel, _ in launch.traffic][:2] == ["pair", "reduce"]
    assert launch.traffic[0][1]["v"] == (M * N * 4, 0)
    reads = sum(ranges.get("v", (0, 0))[0] for _, ranges in launch.traffic)
    assert reads == M * N * 4 + M * K * 4  # and x once, for dA


def test_quantize_and_dequantize_move_each_byte_once() -> None:
    N, K = 32, 256
    weight = quantize_4bit(torch.randn(N, K), "nf4", 64, False)
    bytes_ = moved(list(launch.traffic))
    for free in ("read w", "read order", "read thresholds"):
        bytes_.pop(free)
    written = {"write packed": N * K // 2, "write absmax": N * K // 64 * 4}
    assert {name: n for name, n in bytes_.items() if n} == written
    launch.traffic.clear()
    weight.dequantize(bf16)
    bytes_ = moved(list(launch.traffic))
    assert bytes_["read packed"] == N * K // 2 and bytes_["write w"] == N * K * 2
