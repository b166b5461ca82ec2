"""Where the answer is exact, the result is: integers, B = 0, unit matrices, masks, repetition."""

import itertools
from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels import ops, reference
from lora_kernels.measure import case as cases
from lora_kernels.measure.case import Case
from lora_kernels.measure.tolerance import assert_exact
from tests.ops.engines import every_engine, every_thread_count, ways
from tests.ops.shapes import NARROW, RANKS, ROWS, WIDE
from tests.partitions import exact

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


# With dropout one half, 1/(1 - p) is 2 and everything stays an integer.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"gate": True, "column_scale": True, "bias": True},
    {"dropout_p": 0.5},
    {"base": False, "dropout_p": 0.5},
]


@every_engine
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(13, 19, 17, 5), (2, 35, 33, 3), (7, 65, 31, 8)], ids=str)
@every_dtype
def test_integers(
    dtype: torch.dtype, shape: tuple[int, ...], options: dict[str, Any], engine: str
) -> None:
    """-1, 0 and 1 everywhere: all sums are integers that even bfloat16 holds."""
    args = cases.inputs(Case(*shape, dtype, values="integers", **options))
    ref = cases.oracle(args)
    for name, got in cases.run(lora_kernels.lora_linear, cases.give_mask(args)).items():
        assert_exact(ref[name].to(dtype), ref[name], f"{name} is no exact {dtype}; choose a seed")
        assert_exact(got, ref[name], name)


@pytest.mark.proof
@pytest.mark.parametrize("N_K", [*NARROW, *WIDE], ids=str)
@pytest.mark.parametrize("rank", RANKS)
@every_dtype
def test_integers_in_every_shape(dtype: torch.dtype, rank: int, N_K: tuple[int, int]) -> None:
    """Sums are exact in float32; the kernels round them once, to the output's dtype.

    Not so in 16 bits the eager backend, which rounds S, and dc, which is summed from a rounded z.
    """
    wide = dtype is torch.float32
    for M, options in itertools.product(ROWS, OPTIONS):
        case = Case(M, *N_K, rank, dtype, values="integers", **options)
        args = cases.inputs(case)
        ref = cases.oracle(args)
        for engine in cases.engines()[0 if wide else len(cases.EAGERS) :]:
            with cases.engine(engine):
                got = cases.run(lora_kernels.lora_linear, cases.give_mask(args))
            for name in got if wide else got.keys() - {"dc"}:
                want = ref[name].to(got[name].dtype)
                assert_exact(got[name], want, f"{case} on {engine}: {name}")


@every_engine
@pytest.mark.parametrize("blocksize", [0, 32])
@pytest.mark.parametrize("M", [3, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_arguments_off_alignment_change_nothing(
    dtype: torch.dtype, M: int, blocksize: int, engine: str
) -> None:
    case = Case(M, 40, 64, 8, dtype, values="integers", **exact.OPTIONS)
    for way in ways(engine, M, dtype, blocksize > 0):
        with way:
            exact.check_alignment(case, blocksize)


@every_engine
@every_dtype
def test_a_zero_adapter_changes_nothing(dtype: torch.dtype, engine: str) -> None:
    args = cases.inputs(Case(33, 65, 63, 5, dtype, gate=True))
    args["lora_B"] = torch.zeros_like(args["lora_B"], requires_grad=True)
    got = cases.run(lora_kernels.lora_linear, args)
    if engine.endswith("single pass"):  # whose product is its own: the same with any other A
        other = cases.run(lora_kernels.lora_linear, {**args, "lora_A": args["lora_A"] + 1})
        y, dx = other["y"], other["dx"]
    else:
        y, dx = torch.mm(args["x"], args["weight"].t()), torch.mm(args["dy"], args["weight"])
    assert_exact(got["y"], y, "y")
    assert_exact(got["dx"], dx, "dx")
    assert_exact(got["dA"], torch.zeros(5, 63), "dA")
    assert got["dB"].abs().max() > 0


@every_engine
@every_dtype
def test_unit_matrix_reads_out_the_weights(dtype: torch.dtype, engine: str) -> None:
    K, N, R = 65, 33, 7
    args = cases.inputs(Case(K, N, K, R, dtype))
    y, p, *_ = ops.lora_linear(
        torch.eye(K, dtype=dtype), args["weight"], args["lora_A"], torch.zeros(N, R, dtype=dtype),
        None, None, None, None, 1.0, 0.0, dtype, dtype, False,
    )  # fmt: skip
    assert_exact(y, args["weight"].t(), "y")
    assert_exact(p, args["lora_A"].t(), "P")


@every_engine
@every_dtype
@pytest.mark.parametrize("p", [0.1, 0.5, 0.99, 1.0])
def test_the_mask_is_the_public_one(p: float, dtype: torch.dtype, engine: str) -> None:
    """A and B pick columns of x, so that y and dx show where it was dropped; dA sums the mask."""
    M, K, R = 70, 257, 256
    rng = torch.tensor([-(2**50) + 3, 2**45 + 17])
    kept = reference.dropout_mask(rng, M, K, p)
    if engine == "eager-gpu":
        with pytest.raises(RuntimeError, match="PyTorch's dropout kernel"):
            lora_kernels.dropout_mask(rng, M, K, p)
        rng = kept
    else:
        assert torch.equal(lora_kernels.dropout_mask(rng, M, K, p), kept)
    scale = 0.0 if p == 1.0 else 1 / (1 - p)
    scale = torch.tensor(scale, dtype=torch.float32).to(dtype)
    for first in (0, 1):  # 256 of the 257 columns at a time
        pick = torch.eye(K, dtype=dtype)[first : first + R]
        x = torch.ones(M, K, dtype=dtype, requires_grad=True)
        A = pick.clone().requires_grad_()
        y = lora_kernels.lora_linear(
            x, torch.zeros(R, K, dtype=dtype), A, torch.eye(R, dtype=dtype), dropout_p=p, rng=rng
        )
        y.backward(torch.ones_like(y))
        want = kept[:, first : first + R] * scale
        assert_exact(y, want, "y")
        assert_exact(x.grad @ pick.t(), want, "dx")
        # Multiples of one number up to 70 times it: exact but for the last rounding.
        assert_exact(A.grad != 0, (kept.sum(0) > 0).expand(R, K) & (scale > 0), "dA")


@every_engine
@every_thread_count
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_again(dtype: torch.dtype, threads: int, engine: str) -> None:
    case = Case(261, 515, 259, 16, dtype, gate=True, column_scale=True, bias=True, dropout_p=0.1)
    args = cases.give_mask(cases.inputs(case))
    first, *others = (cases.run(lora_kernels.lora_linear, args) for _ in range(3))
    for other in others:
        for name in first:
            assert torch.equal(first[name], other[name]), name


@every_engine
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "weight", "lora_A", "lora_B", "bias", "column_scale", "dy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_spreads_as_in_pytorch(
    dtype: torch.dtype, where: str, value: float, engine: str
) -> None:
    args = cases.inputs(Case(9, 33, 37, 5, dtype, gate=True, column_scale=True, bias=True))
    with torch.no_grad():
        args[where].view(-1)[7] = value
    got = cases.run(lora_kernels.lora_linear, args)
    want = cases.run(cases.plain_pytorch, args)
    for name in want:
        assert_exact(got[name].isfinite(), want[name].isfinite(), name)
