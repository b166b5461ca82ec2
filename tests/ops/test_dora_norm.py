"""The row norm of W + (B ⊙ g)·A against the float64 reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels import reference
from lora_kernels.choice import choose as selection
from lora_kernels.core.problem import Problem
from lora_kernels.oracle.case import Case, inputs
from lora_kernels.quantization import quantize_4bit
from tests.ops.engines import every_engine, every_thread_count
from tests.support.engines import check_norm
from tests.support.problems import E2M1

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@every_engine
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("quant", ["", "nf4-64-nested", "fp4-32"])
@pytest.mark.parametrize("dtypes", [(f32, None), (bf16, None), (f16, None), (bf16, f32)], ids=str)
def test_dora_norm_of_formats_is_within_tolerance(
    dtypes: Any, quant: str, gate: bool, engine: str
) -> None:
    check_norm(Case(0, 67, 129, 13, *dtypes, quant=quant, gate=gate))


@every_engine
@pytest.mark.parametrize("K, quant", E2M1)
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_dora_norm_of_e2m1_is_within_tolerance(
    dtype: torch.dtype, K: int, quant: str, engine: str
) -> None:
    check_norm(Case(0, 67, K, 13, dtype, quant=quant))


@every_engine
@pytest.mark.parametrize("rank", [1, 16, 64, 65, 130, 256])
def test_dora_norm_of_ranks_is_within_tolerance(rank: int, engine: str) -> None:
    check_norm(Case(0, 40, 70, rank, f32, gate=True))


@every_engine
@pytest.mark.parametrize("K", [1, 63, 512, 513, 1100])
@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_dora_norm_of_columns_is_within_tolerance(quant: str, K: int, engine: str) -> None:
    """Panels of 512, the last one short or of one element."""
    check_norm(Case(0, 30, K, 5, bf16, quant=quant))


@every_engine
@every_thread_count
def test_dora_norm_of_any_threads_has_the_same_bits(threads: int, engine: str) -> None:
    args = inputs(Case(0, 301, 400, 5, f32, gate=True))
    names = ("weight", "lora_A", "lora_B")
    many = lora_kernels.dora_norm(*(args[n] for n in names), rank_gate=args["rank_gate"])
    torch.set_num_threads(1)
    one = lora_kernels.dora_norm(*(args[n] for n in names), rank_gate=args["rank_gate"])
    if engine != "eager":
        assert torch.equal(many, one)


def test_dora_norm_of_float64_is_exact_to_its_sums() -> None:
    args = inputs(Case(0, 70, 65, 5, f32, gate=True))
    tensors = {n: args[n].double() for n in ("weight", "lora_A", "lora_B", "rank_gate")}
    got = lora_kernels.dora_norm(**tensors, scaling=1.25)
    assert got.dtype is f64
    want = reference.dora_norm(**tensors, scaling=1.25)
    torch.testing.assert_close(got, want, rtol=65 * 2.0**-53, atol=0)


def test_dora_norm_of_strided_operands_has_no_gradient() -> None:
    case = Case(0, 70, 65, 5, f32)
    args = inputs(case)
    names = ("weight", "lora_A", "lora_B")
    want = lora_kernels.dora_norm(*(args[n] for n in names), 0.5)
    swapped = [args[n].t().contiguous().t() for n in names]
    got = lora_kernels.dora_norm(*swapped, 0.5)
    assert not got.requires_grad and args["lora_A"].requires_grad
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_dora_norm_under_autocast_has_the_same_bits(backend: str) -> None:
    args = inputs(Case(0, 70, 65, 5, f32))
    operands = [args[n] for n in ("weight", "lora_A", "lora_B")]
    with lora_kernels.backend(backend):
        want = lora_kernels.dora_norm(*operands, 0.5)
        with torch.autocast("cpu", bf16):
            assert torch.equal(lora_kernels.dora_norm(*operands, 0.5), want)


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_dora_norm_compiles_and_passes_opcheck(quant: str) -> None:
    args = inputs(replace(Case(0, 7, 64, 3, f32, gate=True), quant=quant))
    A, B, gate = (args[n].detach() for n in ("lora_A", "lora_B", "rank_gate"))
    if quant:
        torch.library.opcheck(
            torch.ops.lora_kernels.dora_norm_quantized.default,
            (*args["weight"].codes, A, B, 1.5, gate),
        )
    else:
        operands = args["weight"], A, B
        torch.library.opcheck(torch.ops.lora_kernels.dora_norm.default, (*operands, 1.5, gate))
        torch.library.opcheck(
            torch.ops.lora_kernels.dora_norm.default,
            (*(t.double() for t in operands), 1.5, gate.double()),
        )
    compiled = torch.compile(lora_kernels.dora_norm, fullgraph=True, backend="aot_eager")
    got = compiled(args["weight"], A, B, 1.5, rank_gate=gate)
    torch.testing.assert_close(
        got, lora_kernels.dora_norm(args["weight"], A, B, 1.5, rank_gate=gate)
    )


W, A, B = torch.ones(4, 3), torch.ones(2, 3), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": W.t()}, ValueError, r"weight: got shape \[3, 4\], want \[4, 3\]"),
        ({"weight": None}, TypeError, "weight: got NoneType, want a tensor or a QuantizedWeight"),
        (
            {"weight": W.double()},
            TypeError,
            "weight: got torch.float64 beside lora_A in torch.float32",
        ),
        ({"weight": W.to("meta")}, ValueError, "weight: got device meta"),
        ({"weight": W.int()}, TypeError, "weight: got torch.int32"),
        ({"lora_B": B.double()}, TypeError, "lora_B: got torch.float64 beside lora_A"),
        ({"lora_B": B.to("meta")}, ValueError, "lora_B: got device meta, want lora_A's device"),
        ({"lora_A": A[0]}, ValueError, r"lora_A: got shape \[3\]"),
        ({"lora_B": B.t()}, ValueError, r"lora_B: got shape \[2, 4\], want \[N, 2\]"),
        ({"rank_gate": torch.ones(3)}, ValueError, r"rank_gate: got shape \[3\], want \[2\]"),
        (
            {"weight": quantize_4bit(W), "lora_A": A.double(), "lora_B": B.double()},
            TypeError,
            "lora_A: got torch.float64, want float32, bfloat16 or float16 beside a 4-bit",
        ),
    ],
)
def test_dora_norm_of_bad_arguments_raises(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        lora_kernels.dora_norm(**{"weight": W, "lora_A": A, "lora_B": B, **change})


def test_choose_norm_where_it_cannot_run_raises() -> None:
    with lora_kernels.backend("cpu"), pytest.raises(RuntimeError, match="device type 'mps'"):
        selection.choose_norm(Problem("mps", f32, f32, f32, f32, 8))
    with lora_kernels.backend("cpu"), pytest.raises(RuntimeError, match="rank 257"):
        selection.choose_norm(Problem("cpu", f32, f32, f32, f32, 257))
    with lora_kernels.backend("triton"), pytest.raises(RuntimeError, match="triton"):
        selection.choose_norm(Problem("mps", f32, f32, f64, f32, 8))
    choice = selection.choose_norm(Problem("cuda", f32, f32, f32, f32, 8))
    assert choice.backend == "eager" and "only lora_linear may take" in choice.reason
    with lora_kernels.backend("cuda"), pytest.raises(RuntimeError, match="no kernel for row norms"):
        selection.choose_norm(Problem("mps", f32, f32, f32, f32, 8))
    assert lora_kernels.dora_norm(*(t.to("meta") for t in (W, A, B))).shape == (4,)
