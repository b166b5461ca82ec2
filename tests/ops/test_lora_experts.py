"""`lora_experts_linear`: y and every gradient against the float64 reference; compilers; errors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels import lora_experts_linear, reference
from lora_kernels.backends.eager import experts as eager_experts
from lora_kernels.backends.eager import quantized_stack
from lora_kernels.core.call import ExpertsOperands, ExpertsSpec
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import give_mask, judge, run
from lora_kernels.quantization import quantize_4bit
from tests.ops.engines import engines_in_turn, every_engine, every_native_engine, every_thread_count
from tests.support.engines import assert_near, assert_within
from tests.support.experts import (
    ROWS,
    ExpertsCase,
    check,
    check_exact,
    folded_cases,
    inputs,
    some_cases,
)

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@engines_in_turn(some_cases())
def test_lora_experts_linear_of_each_case_is_within_tolerance(
    case: ExpertsCase, engine: str
) -> None:
    check(case)


@every_engine
@every_thread_count
@pytest.mark.parametrize(
    "rows", [(5, 9, 2, 7, 4, 0, 11, 3), (60, 1, 2), (30, 30), (90, 1)], ids=str
)
def test_lora_experts_linear_shared_among_threads_is_within_tolerance(
    rows: tuple[int, ...], threads: int, engine: str
) -> None:
    """Experts that take one thread each, and one that takes all."""
    check(ExpertsCase(rows, 96, 130, 5, dropout_p=0.25))


@every_engine
def test_lora_experts_linear_again_has_the_same_bits(engine: str) -> None:
    args = inputs(ExpertsCase((5, 9, 2, 7, 4, 0, 11, 3), 96, 128, 8, dtype=bf16, dropout_p=0.1))
    first, second = (run(lora_experts_linear, give_mask(args)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_engine
@pytest.mark.parametrize("quant", ["", "nf4-64"])
def test_lora_experts_linear_of_no_rows_has_zero_gradients(quant: str, engine: str) -> None:
    got = run(lora_experts_linear, inputs(ExpertsCase((0, 0), 32, 64, 8, tail=0, quant=quant)))
    assert got["y"].shape == (0, 32) and got["dx"].shape == (0, 64)
    assert got["dA"].shape == (2, 8, 64) and not got["dA"].any()
    assert got["dB"].shape == (2, 32, 8) and not got["dB"].any()
    assert got["dbias"].shape == (2, 32) and not got["dbias"].any()


@every_engine
@pytest.mark.parametrize("N", [33, 64])
def test_lora_experts_linear_rows_of_no_expert_are_zeros_whatever_x_is(N: int, engine: str) -> None:
    """NaN in those rows of x and dy reaches no result."""
    case = ExpertsCase((3, 2), N, 64, 8, tail=3, dropout_p=0.25)
    args, spoiled = give_mask(inputs(case)), give_mask(inputs(case))
    with torch.no_grad():
        spoiled["x"][5:] = torch.nan
        spoiled["dy"][5:] = torch.nan
    want, got = run(lora_experts_linear, args), run(lora_experts_linear, spoiled)
    assert not got["y"][5:].any() and not got["dx"][5:].any()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("case", folded_cases(), ids=str)
def test_folded_experts_are_so_in_both_directions_and_not_with_fewer_rows(
    case: ExpertsCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded: list[Any] = []
    fold_ = eager_experts._fold_
    monkeypatch.setattr(eager_experts, "_fold_", lambda *a: folded.append(a) or fold_(*a))
    N, K, E = case.N, case.K, case.experts
    with cases.engine("eager-gpu"):
        assert case.is_folded
        run(lora_experts_linear, inputs(case))
        assert [backward for *_, backward in folded] == [False, True][: 2 - ("x" in case.frozen)]
        fewer = replace(case, rows=(2 * E * N * K // (N + K) - case.tail, *[0] * (E - 1)))
        assert not fewer.is_folded
        run(lora_experts_linear, inputs(fewer))
        run(lora_experts_linear, give_mask(inputs(replace(case, dropout_p=0.5))))
        assert len(folded) == 2 - ("x" in case.frozen)
        run(lora_experts_linear, inputs(replace(fewer, tail=case.tail + 1)))
        assert len(folded) == 2 * (2 - ("x" in case.frozen))


@every_engine
@pytest.mark.parametrize("case", [ExpertsCase(ROWS, 64, 128, 8, tail=0), folded_cases()[4]])
def test_lora_experts_linear_without_a_tail_has_the_same_bits(
    case: ExpertsCase, engine: str
) -> None:
    args = inputs(case)
    want, got = (run(lora_experts_linear, {**args, "has_tail": flag}) for flag in (True, False))
    assert all(torch.equal(got[name], want[name]) for name in want)


@every_engine
@pytest.mark.parametrize("quant", ["", "nf4-64"])
def test_four_tenants_of_experts_equal_four_calls(quant: str, engine: str) -> None:
    """One call and four calls are each within the tolerance of the float64 reference."""
    rows = (3, 1, 0, 9, 20, 0, 4, 2)
    group = torch.arange(8).repeat_interleave(torch.tensor(rows))

    def four_calls(
        x: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, **others: Any
    ) -> Any:
        y = x.new_zeros(x.shape[0], lora_B.shape[1])
        for tenant in range(4):
            places, pairs = group % 4 == tenant, slice(tenant, None, 4)
            stops = torch.tensor(rows)[pairs].cumsum(0)
            args = others | {"lora_A": lora_A[pairs], "lora_B": lora_B[pairs], "offsets": stops}
            y[places] = lora_experts_linear(x[places], **args)
        return y

    case = ExpertsCase(rows, 64, 128, 8, dtype=bf16, tail=0, tenants=4, quant=quant)
    check(case)
    assert_within(case, judge(case, four_calls))


@every_engine
@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "dy"])
@pytest.mark.parametrize("quant", ["", "nf4-64"])
def test_a_nan_of_one_tenant_stays_in_its_rows_and_adapter(
    quant: str, name: str, engine: str
) -> None:
    rows = (3, 2, 4, 0, 5, 2)
    case = ExpertsCase(rows, 64, 128, 8, dtype=bf16, tenants=3, quant=quant, frozen=("bias",))
    args, spoiled = inputs(case), inputs(case)
    group = torch.tensor([*range(6)]).repeat_interleave(torch.tensor(rows))
    own = torch.cat([group, torch.tensor([9, 9])]) % 3 == 1  # of a tenant with rows of one expert
    with torch.no_grad():
        spoiled[name][own if name in ("x", "dy") else slice(1, None, 3)] = torch.nan
    want, got = run(lora_experts_linear, args), run(lora_experts_linear, spoiled)
    others = torch.arange(6) % 3 != 1
    for key in ("y", "dx"):
        assert torch.equal(got[key][~own], want[key][~own])
    for key in ("dA", "dB"):
        assert torch.equal(got[key][others], want[key][others])
    assert any(got[key].isnan().any() for key in got)


@every_engine
@pytest.mark.parametrize("peft_layout", [False, True])
@pytest.mark.parametrize("tenants", [1, 2])
@pytest.mark.parametrize("narrow", ["lora_A", "lora_B"])
def test_lora_experts_linear_of_A_and_B_in_two_dtypes_is_as_of_one(
    narrow: str, tenants: int, peft_layout: bool, engine: str
) -> None:
    """Of values that bfloat16 holds. A gradient has its parameter's dtype."""
    case = ExpertsCase((3, 5, 0, 2, 4, 20), 64, 128, 8, tenants=tenants, peft_layout=peft_layout)
    args = inputs(case)
    with torch.no_grad():
        args[narrow].copy_(args[narrow].bfloat16())
    mixed = args | {narrow: args[narrow].detach().bfloat16().requires_grad_()}
    want, got = run(lora_experts_linear, args), run(lora_experts_linear, mixed)
    assert got["dA" if narrow == "lora_A" else "dB"].dtype is bf16
    for name in want:
        torch.testing.assert_close(got[name], want[name].to(got[name].dtype))


@every_engine
@pytest.mark.parametrize("frozen", [(0,), (2,), (0, 1)], ids=str)
def test_tenants_beside_frozen_ones_get_the_gradients_of_all_tenants_trained(
    frozen: tuple[int, ...], engine: str
) -> None:
    """Some tenants' lora_A is frozen, then some tenants' lora_B."""
    case = ExpertsCase((3, 2, 9, 1, 20, 5), 64, 128, 16, tenants=3, ranks=(8, 16, 8))
    args, names = inputs(case), ("lora_A", "lora_B")
    want, dy = run(lora_experts_linear, args), args.pop("dy")
    for name in names:
        sizes = [t.numel() for t in args[name]]
        tensors = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(args[name])]
        trained = [t for t in tensors if t.requires_grad]
        y = lora_experts_linear(**args | {name: tensors})
        grads = torch.autograd.grad(y, trained, dy)
        wants = want["dA" if name == "lora_A" else "dB"].split(sizes)
        wants = [t for i, t in enumerate(wants) if i not in frozen]
        for grad, each in zip(grads, wants, strict=True):
            torch.testing.assert_close(grad.flatten(), each)


@every_engine
@pytest.mark.parametrize("order", [1, -1])
def test_tenants_with_scalings_far_apart_have_finite_results(order: int, engine: str) -> None:
    """As if the tenant of the small scaling had none, whichever tenant it is."""
    case = ExpertsCase((3, 2, 9, 1), 64, 128, 16, dtype=f16, tenants=2, ranks=(16, 16))
    args, by_zero = inputs(case), inputs(case)
    args["scaling"], by_zero["scaling"] = [1e-9, 1.25][::order], [0.0, 1.25][::order]
    want, got = run(lora_experts_linear, by_zero), run(lora_experts_linear, args)
    for name in want:  # 1e-9 times anything here is below half a unit of float16's least
        assert got[name].isfinite().all()
        torch.testing.assert_close(got[name], want[name])


@every_engine
@pytest.mark.parametrize("zeros", [(0,), (1,), (0, 1, 2)], ids=str)
def test_a_tenant_scaled_by_zero_is_the_base_and_has_zero_gradients(
    zeros: tuple[int, ...], engine: str
) -> None:
    """As if the tenant's lora_B were zero, whichever tenant it is."""
    case = ExpertsCase((3, 2, 9, 1, 20, 5), 64, 128, 16, tenants=3, ranks=(8, 16, 8))
    args, by_zeros = inputs(case), inputs(case)
    args["scaling"] = [0.0 if t in zeros else 1.25 for t in range(3)]
    by_zeros["scaling"] = [1.25] * 3
    with torch.no_grad():
        for t in zeros:
            by_zeros["lora_B"][t].zero_()
    want, got = run(lora_experts_linear, by_zeros), run(lora_experts_linear, args)
    sizes = [B.numel() for B in args["lora_B"]]
    for t in zeros:
        want["dB"].split(sizes)[t].zero_()
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@every_engine
def test_lora_experts_linear_without_adapters_is_the_base(engine: str) -> None:
    args = inputs(ExpertsCase(ROWS, 32, 64, 8, bias=False))
    x, weight, offsets = args["x"], args["weight"], args["offsets"]
    y = lora_experts_linear(x, weight, None, None, offsets)
    (dx,) = torch.autograd.grad(y, x, args["dy"])
    want = equation_of_base(x, weight, offsets)
    (want_dx,) = torch.autograd.grad(want, x, args["dy"])
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(dx, want_dx)


def equation_of_base(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    E, N, K = weight.shape
    return reference.lora_experts_linear(
        x, weight, x.new_zeros(E, 1, K), x.new_zeros(E, N, 1), offsets
    )


@every_engine
@pytest.mark.parametrize("gap", [8, 3])  # 3: rows and addresses that `grouped_mm` refuses
def test_lora_experts_linear_of_x_and_dy_with_gaps_has_the_same_bits(gap: int, engine: str) -> None:
    args = inputs(ExpertsCase(ROWS, 32, 64, 8, dtype=bf16, dropout_p=0.25))
    want = run(lora_experts_linear, give_mask(args))
    for name in ("x", "dy"):
        wide = torch.nn.functional.pad(args[name].detach(), (gap, gap))[:, gap:-gap]
        args[name] = wide.requires_grad_(name == "x")
    args["lora_A"] = args["lora_A"].detach().mT.contiguous().mT.requires_grad_()
    got = run(lora_experts_linear, give_mask(args))
    assert all(torch.equal(got[name], want[name]) for name in want)


@every_engine
def test_lora_experts_linear_of_a_strided_stack_is_as_of_a_contiguous_one(engine: str) -> None:
    """Every other expert of a larger stack, and a stack with no contiguous dimension."""
    args = give_mask(inputs(ExpertsCase((3, 4), 32, 64, 8)))
    want = run(lora_experts_linear, args)
    weight = args["weight"]
    for strided in (
        weight.repeat_interleave(2, 0)[::2],
        weight.repeat_interleave(2, 2)[:, :, ::2],
    ):
        got = run(lora_experts_linear, {**args, "weight": strided})
        for name in want:  # float32 sums in another order
            torch.testing.assert_close(got[name], want[name])


@every_engine
@pytest.mark.parametrize("quant", ["", "nf4-64"])
def test_lora_experts_linear_of_few_rows_and_a_strided_stack_of_B_is_within_tolerance(
    quant: str, engine: str
) -> None:
    """One row for every tenth expert: of PEFT's lora_B the kernels copy two experts'."""
    rows = tuple(int(e % 10 == 7) for e in range(20))
    check(ExpertsCase(rows, 64, 128, 8, peft_layout=True, quant=quant))


@every_native_engine
@every_thread_count
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_lora_experts_linear_of_a_gathered_B_has_the_bits_of_a_contiguous_one(
    dtype: torch.dtype, threads: int, engine: str
) -> None:
    """Several blocks of the copy, shared among threads; R is no power of two."""
    case = ExpertsCase((1, 0, 2, 0, 1, 30), 1150, 64, 13, dtype=dtype, peft_layout=True)
    args = give_mask(inputs(case))
    assert 1 not in args["lora_B"].stride()[1:]
    contiguous = args["lora_B"].detach().contiguous().requires_grad_()
    got, want = (
        run(lora_experts_linear, args),
        run(lora_experts_linear, {**args, "lora_B": contiguous}),
    )
    assert all(torch.equal(got[name], want[name]) for name in want)


@every_engine
def test_lora_experts_linear_of_offsets_in_32_bits_or_a_column_is_the_same(engine: str) -> None:
    args = give_mask(inputs(ExpertsCase(ROWS, 32, 64, 8, dropout_p=0.25)))
    want, offsets = run(lora_experts_linear, args), args["offsets"]
    for other in (offsets.int(), torch.stack([offsets, offsets + 1], 1)[:, 0]):
        got = run(lora_experts_linear, {**args, "offsets": other})
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("offset", [99, -1], ids=["beyond", "negative"])
@every_engine
def test_offsets_changed_before_the_backward_raise(offset: int, engine: str) -> None:
    args = inputs(ExpertsCase((2, 3), 32, 64, 8))
    dy, offsets = args.pop("dy"), args["offsets"]
    y = lora_experts_linear(**args)
    offsets.data[1] = offset  # moves no version counter
    with pytest.raises(ValueError, match=rf"^offsets\[1\]: got {offset}, want 2 to"):
        y.backward(dy)


def test_gradcheck_of_lora_experts_linear_passes() -> None:
    args = inputs(ExpertsCase((2, 0, 3), 4, 5, 2, tail=1, dtype=f64, dropout_p=0.25))
    del args["dy"]
    names = ("x", "lora_A", "lora_B", "bias")

    def call(*tensors: Tensor) -> Tensor:
        return lora_experts_linear(**{**args, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(call, [args[name] for name in names])


def op_arguments(case: ExpertsCase, backward: bool) -> tuple[Any, ...]:
    args, T = inputs(case), case.tenants
    weight = args["weight"]
    base = tuple(weight.codes) if case.quant else (weight,)
    adapters = [[t.detach() for t in args[name]] for name in ("lora_A", "lora_B")]
    operands = (args["x"].detach(), *base, *adapters, args["offsets"])
    spec = args["scaling"], 0.25, case.dtype, case.dtype, False, True
    if not backward:
        return *operands, args["bias"].detach(), args["rng"], None, *spec
    p = torch.randn(case.M, case.R)
    needs = True, [True] * T, [False] * T, True
    return args["dy"], p, *operands, None, args["rng"], None, *spec, *needs


@pytest.mark.parametrize("quant", ["", "nf4-64"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("ranks", [(8,), (8, 16, 0)], ids=str)
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_opcheck_of_experts_ops_passes(
    dtype: torch.dtype, ranks: tuple[int, ...], backward: bool, quant: str
) -> None:
    rows, tenants = (2, 0, 3) * len(ranks), len(ranks)
    sizes: dict[str, Any] = {"R": max(ranks), "ranks": ranks, "tenants": tenants, "quant": quant}
    case = ExpertsCase(rows, 32, 64, dropout_p=0.25, dtype=dtype, **sizes)
    name = "lora_experts" + "_backward" * backward + "_quantized" * bool(quant)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        getattr(torch.ops.lora_kernels, name).default,
        op_arguments(case, backward),
        test_utils=checks,
    )


@pytest.mark.parametrize(
    "tenants",
    [{"R": 8}, {"R": 16, "tenants": 3, "ranks": (8, 16, 0), "peft_layout": True}],
    ids=["one", "three"],
)
@pytest.mark.parametrize("quant", ["", "nf4-64"])
def test_lora_experts_linear_compiled_whole_has_the_same_bits(
    quant: str, tenants: dict[str, Any]
) -> None:
    rows = (2, 0, 3) * tenants.get("tenants", 1)
    args = inputs(ExpertsCase(rows, 32, 64, quant=quant, dropout_p=0.25, **tenants))
    want = run(lora_experts_linear, args)
    compiled = torch.compile(lora_experts_linear, fullgraph=True, backend="aot_eager")
    got = run(compiled, args)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_lora_experts_linear_by_a_backend_without_kernels_raises() -> None:
    args = inputs(ExpertsCase((2, 3), 4, 5, 2))
    del args["dy"]
    with (
        lora_kernels.backend("cuda"),
        pytest.raises(RuntimeError, match=r"cuda.* no kernels for experts"),
    ):
        lora_experts_linear(**args)


def test_calls_that_grouped_mm_refuses_run_expert_by_expert() -> None:
    """Its operands have rows and addresses of 16 bytes. Meta tensors stand for a GPU's."""

    def is_grouped(N: int = 32, K: int = 64, R: int = 8, dtype: Any = bf16, **fields: Any) -> bool:
        x, W, A, B = (
            torch.empty(s, dtype=dtype, device="meta")
            for s in ((5, K), (2, N, K), (2, R, K), (2, N, R))
        )
        operands = ExpertsOperands(x, W, [A], [B], torch.tensor([2, 5]))
        spec = ExpertsSpec((1.0,), 0.0, dtype, dtype, False)
        return eager_experts.is_grouped(operands._replace(**fields), spec)

    assert is_grouped() and is_grouped(dtype=f32) and is_grouped(R=4, dtype=f32)
    assert not any(is_grouped(**{name: 4}) for name in "NKR")
    assert not is_grouped(dtype=f64)
    assert not is_grouped(weight=torch.empty(2, 32, 65, dtype=bf16, device="meta")[..., :64])
    memory = torch.empty(2 * 32 * 64 + 1)
    aligned, shifted = (memory[i : i + 2 * 32 * 64].view(2, 32, 64) for i in (0, 1))
    assert eager_experts._is_aligned(aligned) and not eager_experts._is_aligned(shifted)
    assert not eager_experts._is_aligned(torch.empty(32, 64, 4).permute(2, 0, 1))


def test_backward_of_adapters_alone_decodes_no_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is for dx alone."""
    args = inputs(ExpertsCase(ROWS, 32, 64, 8, quant="nf4-64", frozen=("x",)))
    dy = args.pop("dy")
    with lora_kernels.backend("eager"):
        y = lora_experts_linear(**args)
        monkeypatch.setattr(eager_experts, "weight_of", None)
        dA, dB = torch.autograd.grad(y, (args["lora_A"], args["lora_B"]), dy)
    assert dA.any() and dB.any()


def changed(**new: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda args: {**args, **{n: f(args[n]) if callable(f) else f for n, f in new.items()}}


BAD = {
    "offsets_descend": (changed(offsets=torch.tensor([3, 2])), r"offsets\[1\]: got 2, want 3 to 7"),
    "offsets_exceed": (changed(offsets=torch.tensor([3, 8])), r"offsets\[1\]: got 8, want 3 to 7"),
    "offsets_negative": (changed(offsets=torch.tensor([-1, 8])), r"offsets\[0\]: got -1, want 0"),
    "offsets_shape": (changed(offsets=torch.tensor([3])), r"offsets: got shape \[1\], want \[2\]"),
    "offsets_dtype": (changed(offsets=torch.tensor([1.0, 2.0])), "offsets: got torch.float32"),
    "offsets_list": (changed(offsets=[3, 5]), "offsets: got list, want a tensor"),
    "x_columns": (changed(x=torch.ones(7, 6)), r"x: got shape \[7, 6\], want \[M, 5\]"),
    "x_3d": (changed(x=torch.ones(1, 7, 5)), r"x: got shape \[1, 7, 5\], want \[M, 5\]"),
    "x_dtype": (changed(x=torch.ones(7, 5, dtype=torch.int32)), "x: got torch.int32"),
    "x_list": (changed(x=[1.0]), "x: got list, want a tensor"),
    "weight_2d": (
        changed(weight=torch.ones(4, 5)),
        r"weight: got shape \[4, 5\], want \[E, N, K\]",
    ),
    "weight_none": (
        changed(weight=None),
        "weight: got NoneType, want a tensor or a QuantizedWeight",
    ),
    "weight_trains": (
        changed(weight=lambda w: w.clone().requires_grad_()),
        "weight: got requires_grad=True",
    ),
    "weight_4bit_2d": (
        changed(weight=quantize_4bit(torch.ones(4, 5))),
        r"weight: got shape \[4, 5\], want \[E, N, K\]",
    ),
    "transposed": (
        changed(is_transposed=True),
        r"x: got shape \[7, 5\], want \[M, 4\] for weight \[2, 4, 5\] and is_transposed=True",
    ),
    "experts_of_A": (
        changed(lora_A=torch.ones(3, 2, 5)),
        r"lora_A: got shape \[3, 2, 5\], want \[2, R, 5\] with R .* \[2·T, R, 5\] for T tenants",
    ),
    "tenants_of_B": (
        changed(lora_A=torch.ones(6, 2, 5)),
        r"lora_B: got shape \[2, 4, 2\], want \[6, 4, 2\]",
    ),
    "tenants_of_offsets": (
        changed(lora_A=torch.ones(6, 2, 5), lora_B=torch.ones(6, 4, 2)),
        r"offsets: got shape \[2\], want \[6\]",
    ),
    "tensors_of_tenants": (
        changed(lora_A=[torch.ones(2, 2, 5)]),
        "lora_B: got Tensor, want a sequence of a tensor for each tenant",
    ),
    "count_of_tenants": (
        changed(lora_A=[torch.ones(2, 2, 5)], lora_B=[torch.ones(2, 4, 2)] * 2),
        "lora_B: got tensors of 2 tenants, want 1, as many as of lora_A",
    ),
    "rank_of_a_tenant": (
        changed(lora_A=[torch.ones(2, 2, 5)] * 2, lora_B=[torch.ones(2, 4, n) for n in (2, 3)]),
        r"lora_B\[1\]: got shape \[2, 4, 3\], want \[2, 4, 2\]",
    ),
    **{
        f"dtype_of_a_tenant_s_{name}": (
            changed(
                lora_A=[torch.ones(2, 2, 5), torch.ones(2, 2, 5, dtype=A)],
                lora_B=[torch.ones(2, 4, 2), torch.ones(2, 4, 2, dtype=B)],
            ),
            rf"lora_A\[1\], lora_B\[1\]: got {A}, {B}, want torch.float32, torch.float32",
        )
        for name, A, B in (("A", bf16, f32), ("B", f32, bf16))
    },
    "scaling_of_tenants": (
        changed(lora_A=[torch.ones(2, 2, 5)], lora_B=[torch.ones(2, 4, 2)], scaling=[1.0, 2.0]),
        "scaling: got 2 numbers, want one, or 1",
    ),
    "rank_of_B": (
        changed(lora_B=torch.ones(2, 4, 3)),
        r"lora_B: got shape \[2, 4, 3\], want \[2, 4, 2\]",
    ),
    "rank_0": (changed(lora_A=torch.ones(2, 0, 5)), r"lora_A: .* R at least 1"),
    "B_alone": (changed(lora_A=None), "lora_A: got None, want a tensor, or None for both"),
    "A_alone": (changed(lora_B=None), "lora_B: got None, want a tensor, or None for both"),
    "bias_shape": (changed(bias=torch.ones(4)), r"bias: got shape \[4\], want \[2, 4\]"),
    "bias_list": (changed(bias=[1.0]), "bias: got list, want a tensor"),
    "dropout_p": (changed(dropout_p=1.5), r"dropout_p: got 1.5, want a probability"),
    "scaling": (changed(scaling="1"), "scaling: got '1', want a number"),
    "adapter_dtype": (changed(lora_A=torch.ones(2, 2, 5, dtype=f64)), "lora_A: got torch.float64"),
    "dtype_of_B": (changed(lora_B=torch.ones(2, 4, 2, dtype=f64)), "lora_B: got torch.float64"),
    "dtype_of_bias": (
        changed(bias=torch.ones(2, 4, dtype=f64)),
        "bias: got torch.float64 beside x in torch.float32",
    ),
    "device_of_A": (changed(lora_A=torch.ones(2, 2, 5, device="meta")), "lora_A: got device meta"),
    "device_of_bias": (changed(bias=torch.ones(2, 4, device="meta")), "bias: got device meta"),
    "device_of_offsets": (
        changed(offsets=torch.tensor([2, 5], device="meta")),
        "offsets: got device meta, want x's device cpu",
    ),
    "device": (
        changed(lora_B=torch.ones(2, 4, 2, device="meta")),
        "lora_B: got device meta, want x's device cpu",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_lora_experts_linear_of_bad_input_names_the_argument(name: str) -> None:
    change, message = BAD[name]
    args = inputs(ExpertsCase((2, 3), 4, 5, 2))
    del args["dy"]
    with pytest.raises((TypeError, ValueError), match=message):
        lora_experts_linear(**change(args))


def test_lora_experts_linear_on_meta_has_no_temporary_of_the_stack_s_size() -> None:
    """On a GPU's path no tensor of E·N·K elements is made in either direction."""
    from lora_kernels.bench.counter import count

    E, N, K, R, M = 64, 256, 512, 16, 64
    meta = {"device": "meta", "dtype": bf16}
    x = torch.empty(M, K, **meta, requires_grad=True)
    A, B = (torch.empty(*s, **meta, requires_grad=True) for s in ((E, R, K), (E, N, R)))
    weight, offsets = torch.empty(E, N, K, **meta), torch.empty(E, device="meta", dtype=torch.int32)

    def step() -> None:
        y = lora_experts_linear(x, weight, A, B, offsets)
        torch.autograd.grad(y, (x, A, B), torch.empty_like(y))

    found = count(step)
    assert found.peak < E * N * K * 2


@pytest.mark.parametrize(("N", "quant"), [(33, ""), (64, ""), (64, "nf4-64"), (33, "nf4-64")])
def test_mask_of_experts_that_pytorchs_kernel_draws_is_that_of_both_directions(
    N: int, quant: str
) -> None:
    """GEMMs of all experts and of one after another, for many rows and few."""
    for rows in ((3, 0, 5), (0, 1, 0, 0, 0)):
        case = ExpertsCase(rows, N, 64, 8, dtype=bf16, quant=quant, dropout_p=0.5)
        args = inputs(case) | {"rng": None}
        with cases.engine("eager-gpu"):
            torch.manual_seed(5)
            got = run(lora_experts_linear, args)
            torch.manual_seed(5)
            mask = torch.native_dropout(args["x"].detach(), 0.5, True)[1]
            want = run(lora_experts_linear, args | {"dropout_mask": mask})
        assert all(torch.equal(got[name], want[name]) for name in want)


# Classes of calls


def draw_experts(random: Random, quant: str) -> ExpertsCase:
    """Draw experts with rows and without, layouts and options that are rarely combined."""
    experts = random.choice((1, 2, 4, 7))
    rows = [random.choice((0, 1, 3, 8)) for _ in range(experts)]
    if random.random() < 0.3:  # one expert has all rows, or few experts have one
        rows = [0] * experts
        rows[random.randrange(experts)] = random.choice((1, 21))
    dtype = random.choice((f32, bf16, bf16, f16))
    shapes = ((64, 192, 8), (192, 64, 8), (80, 128, 16), (48, 96, 5), (33, 47, 3))
    if "fp4-" in quant and not quant.startswith("fp4"):  # MXFP4 and NVFP4 have whole blocks in rows
        shapes = ((64, 192, 8), (32, 96, 5))
    N, K, R = random.choice(shapes)
    names = ["x", "lora_A", "lora_B", "bias"]
    return ExpertsCase(
        rows=tuple(rows),
        N=N,
        K=K,
        R=R,
        tail=random.choice((0, 1, 5)) if sum(rows) else 3,
        dtype=dtype,
        adapter_dtype=random.choice((None, f32)),
        transposed=random.random() < 0.5,
        bias=random.random() < 0.7,
        peft_layout=random.random() < 0.4,
        quant=quant,
        dropout_p=random.choice((0.0, 0.0, 0.25, 0.5)),
        frozen=tuple(sorted(random.sample(names, random.choice((0, 0, 1, 2, 3))))),
        seed=random.getrandbits(20),
    )


def with_views(random: Random) -> Callable[..., Tensor]:
    """Return `lora_experts_linear` of operands and offsets with gaps or other strides."""
    has_gaps, is_apart, is_turned = (random.random() < 0.5 for _ in range(3))
    offsets_dtype = random.choice((torch.int32, torch.int64))

    def call(**args: Any) -> Tensor:
        if has_gaps:
            args["x"] = torch.nn.functional.pad(args["x"], (3, 2))[:, 3:-2]
        if is_apart:
            wide = torch.stack([args["offsets"], args["offsets"] + 1], 1)
            args["offsets"] = wide.to(offsets_dtype)[:, 0]
        if is_turned:
            args["lora_A"] = args["lora_A"].mT.contiguous().mT
            if isinstance(args["weight"], Tensor):
                args["weight"] = args["weight"].mT.contiguous().mT
        return lora_experts_linear(**args)

    return call


FORMATS = ("", "nf4-64", "fp4-32", "nf4-64-nested", "nf4-32-nested", "nvfp4-16-nested")
FORMATS += ("mxfp4-32-nested",)


@pytest.mark.parametrize("seed", range(6))
def test_lora_experts_linear_of_drawn_calls_is_within_tolerance(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = Random(seed)
    for _ in range(5):
        case = draw_experts(random, random.choice(FORMATS))
        budget = random.choice((1, 30_000, 100_000, 1 << 30))
        monkeypatch.setattr(quantized_stack, "PIECE_BYTES", budget)
        engine = random.choice(("eager", "eager-gpu", "eager-gpu", None))
        with cases.engine(engine) if engine else nullcontext():
            verdicts = judge(case, with_views(random))
        assert_near((case, engine, budget), verdicts)


@pytest.mark.parametrize("seed", range(8))
def test_lora_experts_linear_of_drawn_integers_is_exact(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sum is a whole number that bfloat16 holds, or is rounded once."""
    random = Random(100 + seed)
    for _ in range(12):
        case = draw_experts(random, "")
        dtype = random.choice((f32, bf16))
        case = replace(case, values="integers", dtype=dtype, adapter_dtype=None, frozen=())
        case = replace(case, dropout_p=random.choice((0.0, 0.5)))
        blocksize = random.choice((0, 32, 64, 128) if dtype is bf16 else (0, 32))
        monkeypatch.setattr(quantized_stack, "PIECE_BYTES", random.choice((1, 30_000, 1 << 30)))
        engine = random.choice(("eager", "eager-gpu", "eager-gpu", None))
        with cases.engine(engine) if engine else nullcontext():
            check_exact(case, blocksize)
