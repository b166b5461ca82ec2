"""Where the answer is exact, the result is; how many launches it takes, and what memory."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels
from lora_kernels import reference
from lora_kernels.backends.triton import (
    LIBRARY,
    SINGLE_PASS,
    SPLIT,
    configs,
    equation,
    launch,
    tiles,
)
from lora_kernels.core.call import Operands, Spec
from lora_kernels.measure import case as cases
from lora_kernels.measure.case import Case
from lora_kernels.measure.tolerance import assert_exact
from lora_kernels.quantization import quantize_4bit
from tests.partitions import exact
from tests.triton.device import DEVICE

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
every_strategy = pytest.mark.parametrize("strategy", [SINGLE_PASS, SPLIT, LIBRARY])
every_dtype = pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)


@every_strategy
@pytest.mark.parametrize(
    "options",
    [{}, {"gate": True, "column_scale": True, "bias": True}, {"dropout_p": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("shape", [(13, 19, 17, 5), (65, 35, 33, 3)], ids=str)
@every_dtype
def test_integers(
    dtype: torch.dtype, shape: tuple[int, ...], options: dict[str, Any], strategy: str
) -> None:
    """-1, 0 and 1 everywhere: all sums are integers, rounded once."""
    _check_integers(Case(*shape, dtype, values="integers", device=DEVICE, **options), strategy)


@every_dtype
def test_integers_where_dy_is_read_once(dtype: torch.dtype) -> None:
    options = {"gate": True, "column_scale": True, "bias": True}
    case = Case(300, 260, 17, 5, dtype, values="integers", device=DEVICE, **options)
    _check_integers(case, SPLIT)


def _check_integers(case: Case, strategy: str) -> None:
    args, dtype = cases.inputs(case), case.dtype
    ref = cases.oracle(args)
    with lora_kernels.backend("triton", strategy):
        got = cases.run(lora_kernels.lora_linear, args)
    for name in got.keys() - ({"dc"} if dtype is not f32 else set()):  # of a z that was rounded
        assert_exact(got[name], ref[name].to(got[name].dtype), name)


def test_arguments_off_alignment_change_nothing() -> None:
    """Codes that are no whole words there are read byte by byte."""
    case = Case(5, 19, 64, 3, f32, values="integers", device=DEVICE)
    codes = exact.inputs(case, 64)["weight"].codes
    for packed, words in ((codes.packed, True), (exact.off(codes.packed), False)):
        moved = codes._replace(packed=packed)
        assert launch.format_4bit(moved, 64, configs.INTERPRETER)["WORDS"] is words
    with lora_kernels.backend("triton", SPLIT):
        exact.check_alignment(case, blocksize=64)


@every_strategy
@every_dtype
@pytest.mark.parametrize(
    ("sizes", "quant"),
    [
        ((65, 128), "nf4-64-nested"),
        ((33, 96), "fp4-32-nested"),
        ((33, 63), "nf4-64-nested"),
        ((9, 72), "nf4-64"),
    ],
    ids=str,
)
def test_unit_matrices_read_out_the_weight(
    sizes: tuple[int, int], quant: str, dtype: torch.dtype, strategy: str
) -> None:
    """Row by row in the forward, column by column in dx; few rows and many."""
    N, K = sizes
    kind, blocksize, *nested = quant.split("-")
    weight = quantize_4bit(
        torch.randn(N, K, generator=torch.Generator().manual_seed(1)),
        kind,
        int(blocksize),
        bool(nested),
    ).to(DEVICE)
    A = torch.ones(3, K, dtype=dtype, device=DEVICE)
    B = torch.zeros(N, 3, dtype=dtype, device=DEVICE)
    want = reference.dequantize_4bit(
        weight.packed, weight.scales(), weight.code, int(blocksize), weight.shape, dtype
    )
    with lora_kernels.backend("triton", strategy):
        for m in (slice(0, 4), slice(0, K)):
            x = torch.eye(K, dtype=dtype, device=DEVICE)[m]
            assert_exact(lora_kernels.lora_linear(x, weight, A, B), want.t()[m], "y")
        x = torch.zeros(N, K, dtype=dtype, device=DEVICE, requires_grad=True)
        lora_kernels.lora_linear(x, weight, A, B).backward(torch.eye(N, dtype=dtype, device=DEVICE))
        assert_exact(x.grad, want, "dx")


@every_strategy
@pytest.mark.parametrize("M", [12, 70, 257], ids=["tiles of 16", "of 64", "of 128"])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_the_mask_is_the_public_one(p: float, M: int, strategy: str) -> None:
    """A and B pick columns of x, so that y and dx show where it was dropped."""
    K, R = 61, 61
    rng = torch.tensor([-(2**50) + 3, 2**45 + 17], device=DEVICE)
    kept = lora_kernels.dropout_mask(rng, M, K, p)
    scale = torch.tensor(0.0 if p == 1.0 else 1 / (1 - p), dtype=f32, device=DEVICE)
    x = torch.ones(M, K, device=DEVICE, requires_grad=True)
    A, B = torch.eye(K, device=DEVICE).requires_grad_(), torch.eye(R, device=DEVICE)
    with lora_kernels.backend("triton", strategy):
        y = lora_kernels.lora_linear(
            x, torch.zeros(R, K, device=DEVICE), A, B, dropout_p=p, rng=rng
        )
        y.backward(torch.ones_like(y))
    assert_exact(y, kept * scale, "y")
    assert_exact(x.grad, kept * scale, "dx")
    assert_exact(A.grad != 0, (kept.sum(0) > 0).expand(R, K) & (scale > 0), "dA")


@every_strategy
def test_the_same_bits_again(strategy: str) -> None:
    case = Case(
        133,
        129,
        131,
        16,
        bf16,
        gate=True,
        column_scale=True,
        bias=True,
        dropout_p=0.1,
        device=DEVICE,
    )
    args = cases.inputs(case)
    with lora_kernels.backend("triton", strategy):
        first, other = (cases.run(lora_kernels.lora_linear, args) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], other[name]), name


@every_strategy
@pytest.mark.parametrize("where", ["x", "weight", "lora_A", "lora_B", "bias", "column_scale", "dy"])
def test_what_is_not_finite_spreads_as_in_pytorch(where: str, strategy: str) -> None:
    args = cases.inputs(
        Case(9, 33, 37, 5, bf16, gate=True, column_scale=True, bias=True, device=DEVICE)
    )
    with torch.no_grad():
        args[where].view(-1)[7] = float("inf")
    with lora_kernels.backend("triton", strategy):
        got = cases.run(lora_kernels.lora_linear, args)
    want = cases.run(cases.plain_pytorch, args)
    for name in want:
        assert_exact(got[name].isfinite(), want[name].isfinite(), name)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that run, by name."""
    names, run = [], launch.run

    def counted(kernel: Any, *rest: Any, **meta: Any) -> None:
        names.append(kernel.__name__.removesuffix("_kernel"))
        run(kernel, *rest, **meta)

    monkeypatch.setattr(launch, "run", counted)
    return names


class Allocations(TorchDispatchMode):
    """How many elements each new tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(part in str(func) for part in ("empty", "zeros", "new_", "mm")):
            self.sizes.append(out.numel())
        return out


LAUNCHES = {SINGLE_PASS: ["linear"], SPLIT: ["shrink", "linear"], LIBRARY: ["shrink", "linear"]}


@every_strategy
@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_launches_and_temporaries(quant: str, strategy: str, launched: list[str]) -> None:
    """One launch in a single pass, two in split; no temporary of M×N, M×K or N×K elements."""
    M, N, K = 40, 160, 128
    args = cases.inputs(Case(M, N, K, 5, f32, quant=quant, gate=True, bias=True, device=DEVICE))
    weight = args["weight"].codes if quant else args["weight"]
    with Allocations() as allocations:
        operands = Operands(
            args["x"].detach(), weight, args["lora_A"], args["lora_B"], args["rank_gate"], None,
            args["bias"],
        )  # fmt: skip
        equation.lora_linear(operands, Spec(2.0, 0.0, f32, f32), strategy)
    decoded = ["dequantize"] if quant and strategy == LIBRARY else []
    assert launched == decoded + LAUNCHES[strategy]
    if strategy != LIBRARY:
        assert sorted(allocations.sizes)[-2:] == [M * 5, M * N]  # P and y


@pytest.mark.parametrize("frozen", [(), ("x",)], ids=str)
@pytest.mark.parametrize("rank", [5, 61])
def test_launches_of_the_backward(rank: int, frozen: tuple[str, ...], launched: list[str]) -> None:
    """dS and dB in one launch where the rank is small; dx only where it is asked for."""
    args = cases.inputs(Case(300, 65, 40, rank, f32, frozen=frozen, device=DEVICE))
    with lora_kernels.backend("triton", SPLIT):
        y = lora_kernels.lora_linear(
            **{name: value for name, value in args.items() if name != "dy"}
        )
        launched.clear()
        y.backward(args["dy"])
    both = ["shrink_outer", "reduce"] if rank == 5 else ["outer", "reduce", "shrink"]
    assert launched == [*both, *([] if frozen else ["linear"]), "outer", "reduce"]


def test_the_row_norm_is_one_launch_without_a_second_weight(launched: list[str]) -> None:
    N, K = 96, 160
    weight, A, B = (torch.randn(s, device=DEVICE) for s in ((N, K), (3, K), (N, 3)))
    with Allocations() as allocations:
        equation.dora_norm(weight, A, B, 1.0, None)
    assert launched == ["row_norm"]
    assert max(allocations.sizes) < N * K // 10


@every_dtype
def test_conversion_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    """In the interpreter too, whose own conversion to bfloat16 may cut bits off."""
    import triton
    import triton.language as tl

    @triton.jit
    def convert(x_ptr, y_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.arange(0, N)
        tl.store(y_ptr + i, tiles.to_dtype(tl.load(x_ptr + i), y_ptr.dtype.element_ty))

    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    x[:5] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), float("nan"), 3.3e38])
    x = x.to(DEVICE)
    y = torch.empty(1024, dtype=dtype, device=DEVICE)
    convert[(1,)](x, y, N=1024)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)
