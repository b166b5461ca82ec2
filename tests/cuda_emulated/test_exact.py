"""Where the answer is exact, the result is; launches, memory, and the bytes that kernels move."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels import reference
from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import COOPERATIVE, ORDINARY, OVERLAPPED, SPLIT, launch
from lora_kernels.measure import case as cases
from lora_kernels.measure.case import Case, fits_cuda
from lora_kernels.measure.tolerance import assert_exact
from lora_kernels.quantization import quantize_4bit
from tests.partitions import exact

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
every_dtype = pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"gate": True, "column_scale": True, "bias": True},
    {"dropout_p": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("shape", "strategy"),
    [
        ((13, 19, 17, 5), ORDINARY),
        ((65, 40, 72, 33), SPLIT),
        ((13, 40, 72, 5), COOPERATIVE),
        ((5, 40, 136, 3), OVERLAPPED),
    ],
    ids=str,
)
@every_dtype
def test_integers(
    dtype: torch.dtype, shape: tuple[int, ...], strategy: str, options: dict[str, Any]
) -> None:
    """-1, 0 and 1 everywhere: all sums are integers, rounded once."""
    case = Case(*shape, dtype, values="integers", **options)
    strategy = strategy if fits_cuda(case, strategy) else ORDINARY
    args = cases.inputs(case)
    ref = cases.oracle(args)
    with lora_kernels.backend("cuda", strategy):
        got = cases.run(lora_kernels.lora_linear, args)
    for name in got.keys() - ({"dc"} if dtype is not f32 else set()):  # of a z that was rounded
        assert_exact(got[name], ref[name].to(got[name].dtype), name)


@pytest.mark.parametrize(
    ("M", "dtype", "blocksize"), [(33, f32, 0), (33, bf16, 0), (33, bf16, 64), (9, bf16, 64)]
)
def test_arguments_off_alignment_change_nothing(M: int, dtype: torch.dtype, blocksize: int) -> None:
    """By whichever kernel takes them."""
    exact.check_alignment(Case(M, 40, 64, 8, dtype, values="integers", **exact.OPTIONS), blocksize)


@every_dtype
@pytest.mark.parametrize(
    ("sizes", "quant"),
    [
        ((65, 128), "nf4-64-nested"),
        ((33, 96), "fp4-32-nested"),
        ((33, 63), "nf4-64-nested"),
        ((64, 72), "nf4-64"),
    ],
    ids=str,
)
def test_unit_matrices_read_out_the_weight(
    sizes: tuple[int, int], quant: str, dtype: torch.dtype
) -> None:
    """Row by row in the forward, column by column in dx; few rows and many."""
    N, K = sizes
    kind, blocksize, *nested = quant.split("-")
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    weight = quantize_4bit(values, kind, int(blocksize), bool(nested))
    A, B = torch.ones(3, K, dtype=dtype), torch.zeros(N, 3, dtype=dtype)
    want = reference.dequantize_4bit(
        weight.packed, weight.scales(), weight.code, int(blocksize), weight.shape, dtype
    )
    x = torch.eye(K, dtype=dtype)
    assert_exact(lora_kernels.lora_linear(x, weight, A, B), want.t(), "y")
    x = torch.zeros(N, K, dtype=dtype, requires_grad=True)
    lora_kernels.lora_linear(x, weight, A, B).backward(torch.eye(N, dtype=dtype))
    assert_exact(x.grad, want, "dx")


@pytest.mark.parametrize(("dtype", "bits"), [(bf16, 16), (f16, 21)], ids=str)
def test_few_rows_decode_codes_to_more_bits_than_a_matrix_unit_takes(
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
    ("M", "dtype", "strategy"), [(12, bf16, COOPERATIVE), (70, bf16, SPLIT), (65, f32, ORDINARY)]
)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_the_mask_is_the_public_one(p: float, M: int, dtype: torch.dtype, strategy: str) -> None:
    """A and B pick columns of x, so that y and dx show where it was dropped."""
    K = R = 64
    rng = torch.tensor([-(2**50) + 3, 2**45 + 17])
    kept = lora_kernels.dropout_mask(rng, M, K, p)
    scale = torch.tensor(0.0 if p == 1.0 else 1 / (1 - p), dtype=f32)
    want = (kept * scale).to(dtype)
    x = torch.ones(M, K, dtype=dtype, requires_grad=True)
    A, B = torch.eye(K, dtype=dtype).requires_grad_(), torch.eye(R, dtype=dtype)
    with lora_kernels.backend("cuda", strategy):
        weight = torch.zeros(R, K, dtype=dtype)
        y = lora_kernels.lora_linear(x, weight, A, B, dropout_p=p, rng=rng)
        y.backward(torch.ones_like(y))
    # A scale is multiplied by as 16 bits of it.
    torch.testing.assert_close(y, want, rtol=2.0**-8 if dtype is bf16 else 0, atol=0)
    torch.testing.assert_close(x.grad, want, rtol=2.0**-8 if dtype is bf16 else 0, atol=0)
    assert_exact(y != 0, kept & (scale > 0), "y")
    assert_exact(A.grad != 0, (kept.sum(0) > 0).expand(R, K) & (scale > 0), "dA")


@pytest.mark.parametrize("strategy", [COOPERATIVE, OVERLAPPED, SPLIT])
def test_the_same_bits_in_any_order_of_threads(strategy: str) -> None:
    options = {"gate": True, "column_scale": True, "bias": True, "dropout_p": 0.1}
    args = cases.inputs(Case(13, 72, 320, 16, bf16, **options))
    results = []
    for seed, multiprocessors in ((0, 4), (1, 2), (2, 9)):
        with (
            cuda.emulate(seed, multiprocessors),
            lora_kernels.backend("cuda", strategy),
        ):
            results.append(cases.run(lora_kernels.lora_linear, args))
    for other in results[1:]:
        for name, first in results[0].items():
            assert torch.equal(first, other[name]), name


@pytest.mark.parametrize("where", ["x", "weight", "lora_A", "lora_B", "bias", "column_scale", "dy"])
@pytest.mark.parametrize(
    ("K", "strategy"), [(37, ORDINARY), (40, SPLIT), (40, COOPERATIVE)], ids=str
)
def test_what_is_not_finite_spreads_as_in_pytorch(K: int, strategy: str, where: str) -> None:
    args = cases.inputs(Case(9, 40, K, 5, bf16, gate=True, column_scale=True, bias=True))
    with torch.no_grad():
        args[where].view(-1)[7] = float("inf")
    with lora_kernels.backend("cuda", strategy):
        got = cases.run(lora_kernels.lora_linear, args)
    want = cases.run(cases.plain_pytorch, args)
    for name in want:
        assert_exact(got[name].isfinite(), want[name].isfinite(), name)


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
def test_bytes_of_a_few_rows(M: int, quant: str) -> None:
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
    slots = 2
    assert bytes_["write slots"] == slots * M * R * 4
    assert bytes_["read slots"] == blocks * slots * M * R * 4
    assert bytes_["write p"] == M * R * 4


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_bytes_of_a_product(quant: str) -> None:
    """x once for each 128 columns, W once for each 64 rows, P and Q with them; y once."""
    M, N, K, R = 130, 264, 192, 5
    traffic = forward(Case(M, N, K, R, bf16, quant=quant), SPLIT)
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


def test_dy_is_read_once_for_ds_and_db() -> None:
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


def test_dequantize_and_quantize_move_each_byte_once() -> None:
    N, K = 32, 256
    weight = quantize_4bit(torch.randn(N, K), "nf4", 64, False)
    assert moved(list(launch.traffic)) | {"read w": 0, "read order": 0, "read thresholds": 0} == {
        "read w": 0, "write w": 0, "read thresholds": 0, "write thresholds": 0, "read order": 0,
        "write order": 0, "read packed": 0, "write packed": N * K // 2, "read absmax": 0,
        "write absmax": N * K // 64 * 4,
    }  # fmt: skip
    launch.traffic.clear()
    weight.dequantize(bf16)
    bytes_ = moved(list(launch.traffic))
    assert bytes_["read packed"] == N * K // 2 and bytes_["write w"] == N * K * 2
