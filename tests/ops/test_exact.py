"""Results are exact if the answer is: integers, B = 0, unit matrices, masks, repetition."""

import itertools
from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.backends.cpu import linear as cpu
from lora_kernels.backends.cpu import native
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case
from tests.ops.engines import every_engine, every_native_engine, every_thread_count, ways
from tests.ops.shapes import NARROW, RANKS, ROWS, WIDE
from tests.support import exact
from tests.support.assertions import assert_close_derived, assert_exact
from tests.support.exact import integers
from tests.support.problems import FULL, bf16, f16, f32

every_dtype = pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
two_dtypes = pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
OPTIONS = [*exact.SOME_OPTIONS, {"base": False, "dropout_p": 0.5}]


@every_engine
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(13, 19, 17, 5), (2, 35, 33, 3), (7, 65, 31, 8)], ids=str)
@every_dtype
def test_lora_linear_of_integers_is_exact(
    dtype: torch.dtype, shape: tuple[int, ...], options: dict[str, Any], engine: str
) -> None:
    """Sums that even bfloat16 holds."""
    exact.check(integers(*shape, dtype=dtype, **options), narrow=True)


@every_engine
@pytest.mark.parametrize("M", [1, 9, 70])
@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_lora_linear_of_a_float32_adapter_takes_a_column_scale_of_all_bits(
    dtype: torch.dtype, M: int, engine: str
) -> None:
    """c ⊙ dY beside 16-bit activations: in 16 bits c is 1, and dA and dB are 2⁻¹² too small.

    Two 16-bit parts of a float32, on a GPU or in AMX tiles, hold it to 2⁻¹⁷.
    """
    args = exact.inputs(integers(M, 33, 31, 5, dtype=dtype, adapter_dtype=f32, **exact.UNDROPPED))
    scale = torch.full_like(args["column_scale"], 1 + 2.0**-12, dtype=f32)
    args["column_scale"] = scale.requires_grad_()
    got, want = cases.run(lora_kernels.lora_linear, args), cases.oracle(args)
    for name in ("dA", "dB", "dg"):
        assert_close_derived(got[name], want[name].float(), rtol=2.0**-14)


@pytest.mark.proof
@pytest.mark.parametrize("N_K", [*NARROW, *WIDE], ids=str)
@pytest.mark.parametrize("rank", RANKS)
@every_dtype
def test_lora_linear_of_integers_in_every_shape_is_exact(
    dtype: torch.dtype, rank: int, N_K: tuple[int, int]
) -> None:
    """Sums are exact in float32; the kernels round them once, to the output's dtype. Not so in 16
    bits the eager backend, which rounds S."""
    for M, options in itertools.product(ROWS, OPTIONS):
        for engine in cases.engines()[0 if dtype is f32 else len(cases.EAGERS) :]:
            with cases.engine(engine):
                exact.check(integers(M, *N_K, rank, dtype=dtype, **options))


@every_engine
@pytest.mark.parametrize("blocksize", [0, 32])
@pytest.mark.parametrize("M", [3, 33])
@two_dtypes
def test_lora_linear_of_arguments_off_alignment_is_the_same(
    dtype: torch.dtype, M: int, blocksize: int, engine: str
) -> None:
    case = integers(M, 40, 64, 8, dtype=dtype, **exact.OPTIONS)
    for way in ways(engine, M, dtype, blocksize > 0):
        with way:
            exact.check_alignment(case, blocksize)


@every_engine
@every_dtype
def test_lora_linear_of_a_zero_adapter_is_the_base_product(dtype: torch.dtype, engine: str) -> None:
    args = cases.inputs(Case(33, 65, 63, 5, dtype, gate=True))
    args["lora_B"] = torch.zeros_like(args["lora_B"], requires_grad=True)
    got = cases.run(lora_kernels.lora_linear, args)
    if engine.endswith("fused"):  # whose product is its own: the same with any other A
        other = cases.run(lora_kernels.lora_linear, {**args, "lora_A": args["lora_A"] + 1})
        y, dx = other["y"], other["dx"]
    elif engine.split()[0] in native.ISAS:  # without AVX-512 16-bit GEMMs are float32's, rounded
        x, dy, weight = (args[name].detach() for name in ("x", "dy", "weight"))
        y, dx = cpu.library_linear(x, weight), cpu.library_dx(dy, weight)
    else:
        y, dx = torch.mm(args["x"], args["weight"].t()), torch.mm(args["dy"], args["weight"])
    assert_exact(got["y"], y, "y")
    assert_exact(got["dx"], dx, "dx")
    assert_exact(got["dA"], torch.zeros(5, 63), "dA")
    assert got["dB"].abs().max() > 0


@every_engine
@every_dtype
def test_lora_linear_of_a_unit_matrix_is_the_weights(dtype: torch.dtype, engine: str) -> None:
    K, N, R = 65, 33, 7
    args = cases.inputs(Case(K, N, K, R, dtype))
    operands = torch.eye(K, dtype=dtype), args["weight"], args["lora_A"]
    options = *[None] * 5, 1.0, 0.0, dtype, dtype, False
    y, p, *_ = torch.ops.lora_kernels.lora_linear.default(
        *operands, torch.zeros(N, R, dtype=dtype), *options
    )
    assert_exact(y, args["weight"].t(), "y")
    assert_exact(p, args["lora_A"].t(), "P")


@every_engine
@every_dtype
@pytest.mark.parametrize("p", [0.1, 0.5, 0.99, 1.0])
def test_lora_linear_with_dropout_sees_the_public_mask(
    p: float, dtype: torch.dtype, engine: str
) -> None:
    exact.check_mask((70, 257, 256), p, dtype)


@every_engine
@every_thread_count
@two_dtypes
def test_lora_linear_again_has_the_same_bits(dtype: torch.dtype, threads: int, engine: str) -> None:
    exact.check_same_bits(Case(261, 515, 259, 16, dtype, **FULL), runs=3)


@every_engine
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", exact.FINITE)
@two_dtypes
def test_lora_linear_of_what_is_not_finite_spreads_it_as_pytorch(
    dtype: torch.dtype, where: str, value: float, engine: str
) -> None:
    case = Case(9, 33, 37, 5, dtype, gate=True, column_scale=True, bias=True)
    exact.check_spread(case, where, value)


@every_native_engine
@pytest.mark.parametrize("bits", exact.NAN_OF_ALL_BITS.values(), ids=exact.NAN_OF_ALL_BITS)
@pytest.mark.parametrize("where", ["lora_A", "lora_B", "rank_gate", "column_scale"])
@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_lora_linear_of_a_nan_of_all_bits_rounds_it_to_nan(
    dtype: torch.dtype, where: str, bits: int, engine: str
) -> None:
    """Operands in float32 beside results in 16 bits, of a whole register's columns and more."""
    nan = torch.tensor(bits, dtype=torch.int32).view(f32)
    for M in (1, 9):
        case = Case(M, 33, 37, 5, dtype, f32, gate=True, column_scale=True, bias=True)
        exact.check_spread(case, where, nan)


def test_backward_takes_factors_of_any_dtype_and_strides() -> None:
    """A gate in bfloat16, and lora_A stored by columns, are those of contiguous float32."""
    args = cases.inputs(Case(9, 33, 48, 5, f32, gate=True))
    args["rank_gate"] = args["rank_gate"].detach().to(bf16).float().requires_grad_()
    want = cases.run(lora_kernels.lora_linear, args)
    gate, A = args["rank_gate"].detach().to(bf16), args["lora_A"].detach()
    other = {"rank_gate": gate, "lora_A": A.t().contiguous().t()}
    got = cases.run(
        lora_kernels.lora_linear, args | {n: t.requires_grad_() for n, t in other.items()}
    )
    for name in ("y", "dx", "dA", "dB"):
        assert torch.equal(got[name], want[name]), name
