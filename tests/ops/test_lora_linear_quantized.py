"""`lora_linear` on 4-bit weights: y and every gradient against the float64 reference."""

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.backends import decoder
from lora_kernels.backends.cpu import linear as cpu
from lora_kernels.backends.cpu import native
from lora_kernels.backends.decoder import encode
from lora_kernels.core import coding
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case
from lora_kernels.quantization import codebooks, quantize_4bit
from tests.ops.engines import engines_in_turn, every_engine, every_native_engine, ways
from tests.support import exact
from tests.support.engines import check
from tests.support.problems import E2M1, FULL, bf16, f16, f32, with_rank
from tests.support.threads import check_interrupted_thread, check_late_threads

every_dtype = pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
ROWS = (*range(18), 128)
# N, K: rows of whole blocks; blocks that straddle rows; rows that start within a byte's half
SIZES = [(65, 128), (33, 96), (70, 144), (33, 63), (17, 21)]


def some_cases() -> list[Case]:
    chosen = [
        Case(M, N, K, 5, dtype, quant="nf4-64-nested", **FULL)
        for M, (N, K), dtype in itertools.product((0, 1, 3, 5, 8, 9, 16, 17), SIZES, (f32, bf16))
    ]
    # Scales decoded row by row and by few rows, of rows that begin where blocks do and within them;
    # fewer rows than are decoded side by side, and three left over (SIZES leaves one or two).
    long = [
        (1 << 14, "nf4-32"),
        (16432, "nf4-64-nested"),
        (4096, "nf4-32"),
        (4112, "nf4-32-nested"),
    ]
    chosen += [Case(3, 30, K, 5, f32, quant=quant) for K, quant in long]
    # x in several slabs, which do not stay in the L1 cache together.
    chosen += [Case(M, 30, 3200, 5, bf16, quant="nf4-64-nested") for M in (2, 8)]
    # Codes decoded in slabs, also of rows that begin within blocks or bytes.
    for K, dtype in itertools.product((3200, 3208, 3201), (f32, bf16)):
        chosen += [Case(11, 30, K, 5, dtype, quant="nf4-64-nested")]
    chosen += [Case(5, N, 96, 5, dtype, quant="nf4-64") for N in (3, 7) for dtype in (f32, bf16)]
    for N, K in ((40, 1152), (30, 1101), (1101, 160)):  # several panels of the sum, also in pairs
        chosen += [Case(33, N, K, 5, bf16, quant="nf4-64-nested", values="nonnegative")]
    for N, K in ((40, 1152), (1152, 40)):  # that pause, for two blocks of rows
        chosen += [Case(850, N, K, 5, bf16, quant="nf4-64-nested", dropout_p=0.1)]
        chosen += [Case(140, N, K, 5, f32, quant="nf4-64-nested", dropout_p=0.1)]
    for M, R, dtype in itertools.product((1, 2), (5, 40), (f32, bf16, f16)):  # B unpacked
        rest: dict[str, Any] = {"column_scale": True, "bias": True}
        chosen += [Case(M, 70, 144, R, dtype, quant="nf4-64-nested", **rest)]
    for M, dtype in itertools.product((2, 33), (f32, bf16, f16)):
        shape = (M, 65, 160, 5, dtype)
        chosen += [Case(*shape, quant=quant) for quant in ("nf4-64", "fp4-32-nested", "fp4-4096")]
        chosen += [Case(*shape, quant="nf4-64-nested", values="nonnegative", gate=True)]
        chosen += [Case(*shape, quant="nf4-64-nested", x_layout="padded", dy_layout="padded")]
        chosen += [Case(*shape, quant="nf4-64-nested", frozen=("x",))]
    for M, (K, quant), dtype in itertools.product((1, 3, 9, 33), E2M1, (f32, bf16, f16)):
        chosen += [Case(M, 65, K, 5, dtype, quant=quant, **(FULL if dtype is bf16 else {}))]
        chosen += [Case(M, 33, K, 5, dtype, quant=quant, values="nonnegative")]
    for M, quant, dtype in itertools.product((2, 11, 140), ("mxfp4-32", "nvfp4-16"), (f32, bf16)):
        chosen += [Case(M, 30, 3232, 5, dtype, quant=f"{quant}-nested", dropout_p=0.1)]
    autocast: dict[str, Any] = {"quant": "nf4-64-nested", "bias": True}
    chosen += [Case(M, 65, 96, 5, f32, f32, bf16, **autocast) for M in (2, 70)]
    chosen += [Case(70, 65, 96, 5, bf16, f32, f16, gate=True, **autocast)]
    return [*map(with_rank, chosen)]


@engines_in_turn(some_cases())
def test_lora_linear_of_each_4bit_case_is_within_tolerance(case: Case, engine: str) -> None:
    check(case, ways(engine, case.M, case.compute or case.compute_dtype, True))


@pytest.mark.parametrize("M", [2, 9])
@pytest.mark.parametrize("adapter", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("compute", [None, f32, bf16, f16], ids=str)
@pytest.mark.parametrize("autocast", [None, bf16, f16], ids=str)
@every_dtype
def test_lora_linear_of_dtypes_returns_autocasts_or_xs(
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    compute: torch.dtype | None,
    adapter: torch.dtype,
    M: int,
) -> None:
    """y has the dtype that a Linear4bit would return: autocast's where it is on, else x's."""
    case = Case(
        M, 65, 96, 5, dtype, adapter, autocast, quant="nf4-64-nested", compute=compute, bias=True
    )
    args = cases.inputs(case)
    got = cases.run(lora_kernels.lora_linear, args, autocast)
    assert got["y"].dtype is (autocast or dtype)
    if autocast is None:  # under it, compute gives way
        check(case)


@pytest.mark.parametrize("several", [False, True])
def test_lora_linear_under_autocast_multiplies_in_its_dtype_whatever_compute_is(
    several: bool,
) -> None:
    args = cases.inputs(Case(9, 65, 96, 5, quant="nf4-64-nested"))
    x, weight, A, B = (args[n] for n in ("x", "weight", "lora_A", "lora_B"))
    index = torch.zeros(9, dtype=torch.int64)

    def call(compute: torch.dtype | None) -> torch.Tensor:
        if several:
            return lora_kernels.multi_lora_linear(x, weight, [A], [B], index, compute_dtype=compute)
        return lora_kernels.lora_linear(x, weight, A, B, compute_dtype=compute)

    with torch.no_grad():
        assert not torch.equal(call(None), call(bf16).float())
        with torch.autocast("cpu", bf16):
            assert torch.equal(call(f32), call(None)) and torch.equal(call(f16), call(None))


@every_engine
def test_lora_linear_in_a_compute_dtype_recomputes_the_same_p(engine: str) -> None:
    """x in float32 beside adapters in the compute dtype: eager rounds it once for both GEMMs."""
    args = cases.inputs(Case(9, 65, 96, 5, f32, bf16, quant="nf4-64-nested", compute=bf16))
    want, got = (
        cases.run(lora_kernels.lora_linear, args | {"recompute": recompute})["dB"]
        for recompute in (False, True)
    )
    assert torch.equal(got, want)


@every_engine
def test_lora_linear_in_a_compute_dtype_rounds_the_operands(engine: str) -> None:
    """The GEMM's operands are rounded to bfloat16; a library rounds its result too."""
    args = cases.inputs(Case(9, 65, 96, 5, quant="nf4-64-nested"))
    x, weight, A, B = args["x"], args["weight"], args["lora_A"], args["lora_B"] * 0
    y = lora_kernels.lora_linear(x, weight, A, B, compute_dtype=bf16)
    # These multiply in float32; below AVX-512, where the library has no AMX tiles for bfloat16.
    in_float32 = [f"avx512 {cpu.FUSED}", *([] if native.amx_bf16 else ["avx2", "scalar"])]
    decoded = f32 if engine in in_float32 else bf16
    want = x.to(bf16).double() @ weight.dequantize(decoded).double().t()
    if cpu.FUSED in engine:
        torch.testing.assert_close(y, want.float())
    else:
        torch.testing.assert_close(y, want.float(), rtol=2**-8, atol=1e-5)  # half an ulp: 2⁻⁹


@pytest.mark.proof
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rank", [1, 16, 100])
def test_lora_linear_of_formats_and_ranks_is_within_tolerance(
    rank: int, sizes: tuple[int, int]
) -> None:
    """Every rank × sizes; M, dtypes and formats take turns, so that each meets each."""
    turn = [1, 16, 100].index(rank) + SIZES.index(sizes)
    dtype = (f32, bf16, f16)[turn % 3]
    quant = ("nf4-64-nested", "fp4-128")[turn % 2]
    for M in ROWS[5 + turn % 3 :: 3]:
        case = Case(M, *sizes, rank, dtype, quant=quant, **FULL)
        for engine in cases.engines():
            with cases.engine(engine):
                check(case, ways(engine, case.M, case.compute or case.compute_dtype, True))


@every_engine
@every_dtype
@pytest.mark.parametrize(
    ("sizes", "quant"),
    [*((sizes, "nf4-64-nested") for sizes in SIZES), *(((33, K), quant) for K, quant in E2M1)],
    ids=str,
)
def test_lora_linear_of_unit_matrices_is_the_4bit_weight(
    sizes: tuple[int, int], quant: str, dtype: torch.dtype, engine: str
) -> None:
    exact.check_reads_out_the_weight(sizes, quant, dtype)


@every_native_engine
@pytest.mark.parametrize("M", [1, 2])
def test_lora_linear_of_few_rows_keeps_the_codes_bits(M: int, engine: str) -> None:
    """Equal codes err alike, which a sum of non-negative products does not average out: 17 bits of
    each leave 2⁻¹⁷ of it, the 8 of a bfloat16 up to 2⁻⁹."""
    weight = quantize_4bit(torch.randn(65, 512, generator=torch.Generator().manual_seed(1)).abs())
    x = torch.rand(M, 512, generator=torch.Generator().manual_seed(2)).to(bf16).float()
    A, B = torch.zeros(5, 512), torch.zeros(65, 5)
    with lora_kernels.backend("cpu", cpu.GEMV_QUANTIZED):
        y = lora_kernels.lora_linear(x, weight, A, B, compute_dtype=bf16)
    want = x.double() @ weight.dequantize(f32).double().t()
    assert (y - want).norm() < 2**-15 * want.norm()


@every_native_engine
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_lora_linear_of_few_rows_makes_every_rank(threads: int, engine: str) -> None:
    """Threads share the ranks. Exact, and never what was left in memory by the call before."""
    generator = torch.Generator().manual_seed(1)
    x, A, B = (
        torch.randint(-3, 4, shape, generator=generator).float()
        for shape in ((3, 512), (5, 512), (64, 5))
    )
    weight = quantize_4bit(torch.zeros(64, 512))
    for factor in (1.0, -1.0, 2.0):
        with lora_kernels.backend("cpu", cpu.GEMV_QUANTIZED):
            y = lora_kernels.lora_linear(x * factor, weight, A, B)
        assert torch.equal(y, x @ A.t() @ B.t() * factor)


@every_native_engine
@pytest.mark.parametrize("threads", [5], indirect=True)
@pytest.mark.parametrize(("M", "dropout_p"), [(1, 0.0), (4, 0.0), (8, 0.0), (1, 0.5), (4, 0.5)])
def test_lora_linear_of_late_threads_has_the_bits_of_one(
    threads: int, engine: str, M: int, dropout_p: float
) -> None:
    weight = quantize_4bit(torch.randn(2003, 128))
    check_late_threads(weight, M, cpu.GEMV_QUANTIZED, threads, dropout_p)


@every_native_engine
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_lora_linear_of_interrupted_threads_has_the_bits_of_one(
    engine: str, dropout_p: float
) -> None:
    check_interrupted_thread(
        quantize_4bit(torch.randn(512, 1 << 14)), cpu.GEMV_QUANTIZED, dropout_p
    )


def test_lora_linear_of_fewer_threads_than_asked_has_the_same_bits() -> None:
    """A thread limit of OpenMP gives a kernel two threads where torch says five."""
    program = (
        "import torch, lora_kernels\n"
        "from lora_kernels.quantization import quantize_4bit\n"
        "W, A, B = quantize_4bit(torch.randn(900, 128)), torch.randn(5, 128), torch.randn(900, 5)\n"
        "for M in (1, 3, 8, 40):\n"
        "    x, ys = torch.randn(M, 128), []\n"
        "    for threads in (1, 5):\n"
        "        torch.set_num_threads(threads)\n"
        "        ys.append(lora_kernels.lora_linear(x, W, A, B))\n"
        "    assert torch.equal(*ys), M\n"
    )
    env = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env=env)


@every_engine
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_lora_linear_of_nested_scales_rounds_them_twice(rows: int, engine: str) -> None:
    """Many blocks a row, whose scales are decoded by whole registers: an FMA changes 6.6 %."""
    weight = quantize_4bit(
        torch.randn(33, 100 * 32, generator=torch.Generator().manual_seed(1)), blocksize=32
    )
    A, B = torch.ones(1, 100 * 32), torch.zeros(33, 1)
    x = torch.eye(100 * 32)[7::32]  # one element of each block
    want = weight.dequantize(torch.float64)[:, 7::32].t()
    for m in range(0, 100, rows):
        for way in ways(engine, rows, f32, True):
            with way:
                y = lora_kernels.lora_linear(x[m : m + rows], weight, A, B)
            assert torch.equal(y.double(), want[m : m + rows])


@every_native_engine
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@every_dtype
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_encode_is_bitwise(quant_type: str, dtype: torch.dtype, threads: int, engine: str) -> None:
    """The kernel's codes and scales, bit for bit the reference's, which is judged elsewhere."""
    thresholds, order = codebooks.thresholds(quant_type), codebooks.order(quant_type)
    generator = torch.Generator().manual_seed(0)
    for blocksize, n in itertools.product((32, 64, 4096), (1, 63, 64, 4097, 70001)):
        weight = torch.randn(n, generator=generator) * torch.logspace(-40, 3, n)
        on_thresholds = torch.arange(n // 2) % 3 == 0
        weight[: n // 2] = torch.where(
            on_thresholds, thresholds[torch.arange(n // 2) % 15], weight[: n // 2].clamp(-1, 1)
        )
        weight[n // 3 : n // 3 + 64] = 0
        weight = weight.to(dtype)
        want = coding.quantize_4bit(weight, thresholds, order, blocksize)
        assert all(map(torch.equal, encode(weight, thresholds, order, blocksize), want))


@every_native_engine
@pytest.mark.parametrize("at", [0, 40, 64, 95])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_quantize_not_finite_raises(value: float, at: int, engine: str) -> None:
    weight = torch.randn(3, 32)
    weight.view(-1)[at] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_4bit(weight)


@every_engine
@every_dtype
@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_is_bitwise(nested: bool, dtype: torch.dtype, engine: str) -> None:
    """A whole weight and blocks of it, bit for bit what the reference decodes."""
    check_dequantize(nested, dtype)


def test_dequantize_without_kernels_is_bitwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "module", None)
    check_dequantize(True, bf16)


def check_dequantize(nested: bool, dtype: torch.dtype) -> None:
    weight = quantize_4bit(torch.randn(37, 71), "nf4", 32, nested)
    want = coding.dequantize(weight.packed, weight.scales(), weight.code, 32, weight.shape, dtype)
    assert torch.equal(weight.dequantize(dtype), want)
    part = decoder.dense(weight.codes, weight.shape, dtype, slice(3, 30), slice(5, 70))
    assert torch.equal(part, want[3:30, 5:70])


def test_ops_of_4bit_weights_compile_and_pass_opcheck() -> None:
    args = cases.inputs(Case(6, 33, 64, 5, bf16, quant="nf4-64-nested", gate=True, dropout_p=0.1))
    x, A, B, gate = (args[name].detach() for name in ("x", "lora_A", "lora_B", "rank_gate"))
    operands = x, *args["weight"].codes, A, B, gate, None
    options = 1.5, 0.1, bf16, bf16
    forward = *operands, None, args["rng"], None, *options, False
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_quantized.default, forward)
    y, p, *_ = torch.ops.lora_kernels.lora_linear_quantized.default(*forward)
    needs = False, True, True, True, True, False, False
    backward = torch.ones_like(y), p, None, *operands, None, args["rng"], None, *options, *needs
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_backward_quantized.default, backward)

    compiled = torch.compile(lora_kernels.lora_linear, fullgraph=True, dynamic=True)
    eager = cases.run(lora_kernels.lora_linear, args)
    for name, got in cases.run(compiled, args).items():
        assert torch.equal(got, eager[name]), name


SHAPES = {"x": (1, 64), "lora_A": (2, 64), "lora_B": (8, 2)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lora_B": torch.zeros(9, 2)}, ValueError, "weight.*8, 64.*9, 64"),
        ({"x": torch.zeros(1, 64, dtype=torch.float64)}, TypeError, "float64"),
        *(
            (
                {n: torch.zeros(s).double() for n, s in SHAPES.items()}
                | {"compute_dtype": compute},
                TypeError,
                "^x: got torch.float64, want float32, bfloat16 or float16 beside a 4-bit weight",
            )
            for compute in (None, bf16)
        ),
        (
            {"weight": quantize_4bit(torch.ones(8, 64)).to("meta")},
            ValueError,
            "^weight: got device meta, want x's device cpu",
        ),
        (
            {"weight": quantize_4bit(torch.ones(2, 4, 64))},
            ValueError,
            r"weight: got .*\[2, 4, 64\]",
        ),
        ({"compute_dtype": torch.float64}, TypeError, "compute_dtype"),
        ({"compute_dtype": torch.int8}, TypeError, "compute_dtype"),
        ({"weight": torch.zeros(8, 64), "compute_dtype": bf16}, ValueError, "compute_dtype"),
    ],
    ids=str,
)
def test_lora_linear_of_bad_4bit_arguments_raises(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    args: dict[str, Any] = {
        "weight": quantize_4bit(torch.ones(8, 64)),
        **{name: torch.zeros(shape) for name, shape in SHAPES.items()},
    }
    with pytest.raises(error, match=words):
        lora_kernels.lora_linear(**{**args, **change})
