"""Results are exact if the answer is; how many launches it takes, and what memory."""

from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.backends.triton import FUSED, configs, launch, tiles
from lora_kernels.backends.triton import linear as equation
from lora_kernels.core.call import Operands, Spec
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case
from tests.support import exact
from tests.support.allocations import Allocations
from tests.support.engines import each, pair_cases
from tests.support.exact import integers
from tests.support.problems import FULL, bf16, f16, f32
from tests.triton.device import DEVICE

every_engine = pytest.mark.parametrize("engine", [f"triton {FUSED}"], indirect=True)
every_dtype = pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
INTEGERS = [
    integers(*shape, dtype=dtype, **options)
    for dtype in (f32, bf16, f16)
    for shape in ((13, 19, 17, 5), (65, 35, 33, 3))
    for options in exact.SOME_OPTIONS[:2]  # without dropout
]


@each({"": pair_cases("triton", (FUSED,), INTEGERS)}, DEVICE)
def test_lora_linear_of_integers_is_exact(case: Case, engine: str) -> None:
    exact.check(case)


def test_lora_linear_of_arguments_off_alignment_is_the_same() -> None:
    """Codes that are no whole words there are read byte by byte."""
    case = integers(5, 19, 64, 3, device=DEVICE)
    codes = exact.inputs(case, 64)["weight"].codes
    for packed, words in ((codes.packed, True), (exact.off(codes.packed), False)):
        moved = codes._replace(packed=packed)
        assert launch.codes_arguments(moved, 64, configs.INTERPRETER)["WORDS"] is words
    with lora_kernels.backend("triton"):
        exact.check_alignment(case, blocksize=64)


@every_engine
@every_dtype
@pytest.mark.parametrize(("sizes", "quant"), [*exact.FORMATS, ((9, 72), "nf4-64")], ids=str)
def test_lora_linear_of_unit_matrices_is_the_4bit_weight(
    sizes: tuple[int, int], quant: str, dtype: torch.dtype, engine: str
) -> None:
    exact.check_reads_out_the_weight(sizes, quant, dtype, DEVICE)


@every_engine
def test_lora_linear_again_has_the_same_bits(engine: str) -> None:
    options: Any = FULL | {"dropout_p": 0.0}
    exact.check_same_bits(Case(133, 129, 131, 16, bf16, **options, device=DEVICE))


@every_engine
@pytest.mark.parametrize("where", exact.FINITE)
def test_lora_linear_of_what_is_not_finite_spreads_it_as_pytorch(where: str, engine: str) -> None:
    options: Any = {"gate": True, "column_scale": True, "bias": True}
    exact.check_spread(Case(9, 33, 37, 5, bf16, **options, device=DEVICE), where, float("inf"))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that run, by name."""
    names, run = [], launch.run

    def counted(kernel: Any, *rest: Any, **meta: Any) -> None:
        names.append(kernel.__name__.removesuffix("_kernel"))
        run(kernel, *rest, **meta)

    monkeypatch.setattr(launch, "run", counted)
    return names


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_forward_launches_one_kernel_and_makes_p_and_y_alone(
    quant: str, launched: list[str]
) -> None:
    M, N, K = 40, 160, 128
    args = cases.inputs(Case(M, N, K, 5, f32, quant=quant, gate=True, bias=True, device=DEVICE))
    weight = args["weight"].codes if quant else args["weight"]
    with Allocations() as allocations:
        A, B, gate, bias = (args[name] for name in ("lora_A", "lora_B", "rank_gate", "bias"))
        operands = Operands(args["x"].detach(), weight, A, B, gate, None, bias)
        equation.lora_linear(operands, Spec(2.0, 0.0, f32, f32), FUSED)
    assert launched == ["fused"]
    assert sorted(allocations.sizes)[-2:] == [M * 5, M * N]  # P and y


@pytest.mark.parametrize("frozen", [(), ("x",)], ids=str)
def test_backward_launches_one_kernel_for_dx_and_ds(
    frozen: tuple[str, ...], launched: list[str]
) -> None:
    args = cases.inputs(Case(300, 65, 40, 5, f32, frozen=frozen, device=DEVICE))
    with lora_kernels.backend("triton"):
        y = lora_kernels.lora_linear(
            **{name: value for name, value in args.items() if name != "dy"}
        )
        launched.clear()
        y.backward(args["dy"])
    ds = "shrink" if frozen else "fused"
    assert launched == ["outer", "reduce", ds, "outer", "reduce"]


@every_dtype
def test_to_dtype_rounds_to_nearest_even(dtype: torch.dtype) -> None:
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
