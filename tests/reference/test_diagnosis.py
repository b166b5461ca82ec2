"""`oracle.diagnosis`: planted faults are told with their cause, and other errors with none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.oracle.case import Case, judge
from lora_kernels.oracle.diagnosis import AGAIN, diagnose
from lora_kernels.oracle.experts_case import ExpertsCase

f32, bf16 = torch.float32, torch.bfloat16
Sums = Callable[[str, Tensor, Tensor], Tensor]


class Layer(torch.autograd.Function):
    """`lora_linear`, whose products are computed by `sums(output, a, b)`."""

    @staticmethod
    def forward(
        ctx: Any, sums: Sums, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float
    ) -> Tensor:
        p = (x.float() @ A.float().t()).to(x.dtype)
        ctx.save_for_backward(x, W, A, B, p)
        ctx.sums, ctx.s = sums, s
        update = s * (p.float() @ B.float().t())
        return sums("y", x.float(), W.float().t(), update).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, A, B, p = (t.float() for t in ctx.saved_tensors)
        narrow, dy = dy.dtype, dy.float()
        ds = (ctx.s * dy @ B).to(narrow).float()
        dx = ctx.sums("dx", dy, W, ds @ A)
        dA, dB = ctx.sums("dA", ds.t(), x, 0.0), ctx.sums("dB", ctx.s * dy.t(), p, 0.0)
        return None, dx.to(narrow), None, dA.to(narrow), dB.to(narrow), None


def causes(case: Case, wrong: str, product: Callable[..., Tensor]) -> dict[str, Any]:
    """Return the diagnoses of a layer with one wrong product, which may miss in `wrong` alone."""

    def sums(output: str, a: Tensor, b: Tensor, rest: Any) -> Tensor:
        return product(a, b, rest) if output == wrong else a @ b + rest

    def call(**of: Any) -> Tensor:
        names = ("x", "weight", "lora_A", "lora_B", "scaling")
        return Layer.apply(sums, *(of[name] for name in names))  # type: ignore[no-any-return]

    missed = [name for name, verdict in judge(case, call).items() if not verdict.ok]
    assert missed == [wrong]
    return diagnose(case, missed, call)[wrong].cause  # type: ignore[return-value]


def without_last(a: Tensor, b: Tensor, rest: Any) -> Tensor:
    stop = a.shape[1] // 64 * 64
    return a[:, :stop] @ b[:stop] + rest


def first_twice(a: Tensor, b: Tensor, rest: Any) -> Tensor:
    return a @ b + a[:, :32] @ b[:32] + rest


def last_rows_zero(a: Tensor, b: Tensor, rest: Any) -> Tensor:
    y = a @ b + rest
    y[y.shape[0] // 64 * 64 :] = 0
    return y


def one_column_wrong(a: Tensor, b: Tensor, rest: Any) -> Tensor:
    y = a @ b + rest
    y[:, 3] += 1
    return y


def one_nan(a: Tensor, b: Tensor, rest: Any) -> Tensor:
    y = a @ b + rest
    y[3, 4] = torch.nan
    return y


def noise(a: Tensor, b: Tensor, rest: Any) -> Tensor:
    y = a @ b + rest
    draws = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return y * (1 + 0.01 * draws)


def narrow_sum(block: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    def product(a: Tensor, b: Tensor, rest: Any) -> Tensor:
        total = torch.zeros(a.shape[0], b.shape[1])
        for start in range(0, a.shape[1], block):
            total = (
                (total + a[:, start : start + block] @ b[start : start + block]).to(dtype).float()
            )
        return total + rest

    return product


def transposed(a: Tensor, b: Tensor, rest: Any) -> Tensor:
    y = a @ b + rest
    return y.t().reshape(y.shape)


SMALL = Case(70, 69, 100, 8)
FAULTS: list[tuple[str, Callable[..., Tensor], str]] = [
    ("y", without_last, "x·Wᵀ lacks the last 36 of 100 terms (K mod 64)"),
    ("dx", without_last, "dy·W lacks the last 5 of 69 terms (N mod 8, 16, 32 or 64)"),
    ("dA", without_last, "dSᵀ·x lacks the last 6 of 70 terms (M mod 8, 16, 32 or 64)"),
    ("dB", without_last, "dyᵀ·S lacks the last 6 of 70 terms (M mod 8, 16, 32 or 64)"),
    ("y", first_twice, "x·Wᵀ adds twice the first 32 of 100 terms"),
    ("dB", first_twice, "dyᵀ·S adds twice the first 32 of 70 terms"),
    (
        "y",
        lambda a, b, rest: rest + 0 * (a @ b),
        "x·Wᵀ is missing: all 100 terms, which are K mod 128",
    ),
    ("y", lambda a, b, rest: a @ b, "the LoRA part is missing"),
    ("dx", lambda a, b, rest: a @ b - rest, "the LoRA part is -1.00 times what it should be"),
    ("dA", lambda a, b, rest: 0 * (a @ b), "dA is missing"),
    ("y", lambda a, b, rest: a @ b + 2 * rest, "the LoRA part is 2.00 times what it should be"),
    (
        "y",
        lambda a, b, rest: a @ b + 1.25 * rest,
        "the LoRA part is 1.25 times what it should be: the scaling, 1.25, applied twice?",
    ),
    (
        "dB",
        lambda a, b, rest: 0.8 * (a @ b),
        "dB is 0.80 times what it should be: the scaling, 1.25, not applied?",
    ),
    ("y", lambda a, b, rest: 1.01 * (a @ b + rest), "y is 1.010 times what it should be"),
    ("dA", transposed, "the memory of dA is transposed"),
    ("y", one_nan, "1 NaN of 4830 elements, the first at [3, 4]: row 3 and column 4 of y"),
]


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize(("output", "product", "cause"), FAULTS, ids=[f[2][:40] for f in FAULTS])
def test_planted_fault_is_told_with_its_cause(
    output: str, product: Callable[..., Tensor], cause: str, dtype: torch.dtype
) -> None:
    case = Case(70, 69, 100, 8, dtype)
    assert causes(case, output, product) == cause


def test_terms_of_a_short_sum_that_are_missing_are_named() -> None:
    found = causes(Case(70, 69, 35, 8), "y", without_last)
    assert found == "x·Wᵀ is missing: all 35 terms, which are K mod 64 or 128"


@pytest.mark.parametrize(("output", "size"), [("y", 70), ("dx", 70), ("dB", 69)])
def test_last_rows_that_are_zero_are_named(output: str, size: int) -> None:
    rows = f"rows 64 to {size - 1} (the last {size} mod 8, 16, 32 or 64) of {output}"
    want = f"only {rows} are zero; the rest is within the tolerance"
    assert causes(SMALL, output, last_rows_zero) == want


def test_column_that_is_wrong_is_named() -> None:
    want = "only column 3 of dA is wrong; the rest is within the tolerance"
    assert causes(SMALL, "dA", one_column_wrong) == want


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize(
    ("output", "sizes", "dimension"),
    [("y", (33, 35, 4099), "K"), ("dx", (33, 4099, 35), "N"), ("dB", (4099, 33, 35), "M")],
)
def test_accumulator_in_16_bits_is_told_by_its_size(
    output: str, sizes: tuple[int, int, int], dimension: str, dtype: torch.dtype
) -> None:
    case = Case(*sizes, 9, dtype)
    cause = str(causes(case, output, narrow_sum(64, bf16)))
    assert cause.startswith(
        f"has the size of an accumulator in bfloat16, rounded every 64 terms of {dimension}: "
    ) or (dtype is f32 and cause.startswith("each element is a bfloat16 number"))


def test_result_that_was_rounded_is_told() -> None:
    found = causes(SMALL, "y", lambda a, b, rest: (a @ b + rest).to(bf16).float())
    assert found == "each element is a bfloat16 number: the result was rounded to bfloat16"


def test_operands_that_were_rounded_are_told() -> None:
    def call(scaling: float, **of: Any) -> Tensor:
        x, W, A, B = (of[name].half().float() for name in ("x", "weight", "lora_A", "lora_B"))
        return x @ W.T + scaling * (x @ A.T) @ B.T

    found = diagnose(SMALL, ["y"], lambda **of: call(**of))["y"].cause
    assert found == "most of the error is that of operands rounded to float16"


@pytest.mark.parametrize(
    ("fields", "left_out", "cause"),
    [
        ({"gate": True}, {"rank_gate": None}, "rank_gate is not applied"),
        ({"column_scale": True}, {"column_scale": None}, "column_scale is not applied"),
        ({"dropout_p": 0.1}, {"dropout_p": 0.0, "rng": None}, "dropout is not applied"),
        ({"bias": True}, {"bias": None}, "bias is missing"),
    ],
    ids=["gate", "column scale", "dropout", "bias"],
)
def test_operand_that_is_not_applied_is_told(
    fields: dict[str, Any], left_out: dict[str, Any], cause: str
) -> None:
    case = Case(70, 69, 40, 8, frozen=("rank_gate", "column_scale", "bias"), **fields)
    found = diagnose(case, ["y"], lambda **of: case.op(**{**of, **left_out}))
    assert found["y"].cause == cause


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_two_faults_are_told_together(dtype: torch.dtype) -> None:
    """A dropped last block beside a LoRA part that is scaled twice."""

    def call(**of: Any) -> Tensor:
        x, W, A, B = (of[name].float() for name in ("x", "weight", "lora_A", "lora_B"))
        stop = x.shape[1] // 64 * 64
        update = of["scaling"] ** 2 * x @ A.t() @ B.t()
        return (x[:, :stop] @ W[:, :stop].t() + update).to(dtype)

    found = diagnose(Case(70, 69, 100, 8, dtype), ["y"], call)
    assert found["y"].cause == (
        "x·Wᵀ lacks the last 36 of 100 terms (K mod 64), and the LoRA part is 1.25 times what it "
        "should be: the scaling, 1.25, applied twice?"
    )


def test_square_weight_in_place_of_its_transpose_is_told() -> None:
    case = Case(70, 96, 96, 8)
    found = diagnose(case, ["y"], lambda **of: case.op(**{**of, "weight": of["weight"].T}))
    assert found["y"].cause == "W stands in place of Wᵀ, or Wᵀ of W"


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize(
    ("output", "sizes"),
    [("y", (33, 35, 4099)), ("dx", (33, 4099, 35)), ("dB", (4099, 33, 35)), ("dA", (70, 69, 100))],
)
def test_noise_has_no_cause(output: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Of 1 %, which in bfloat16 is as large as the error of an accumulator in a long sum."""
    assert causes(Case(*sizes, 9, dtype), output, noise) is None


def test_weight_in_place_of_its_transpose_is_told_of_dx() -> None:
    found = causes(Case(70, 96, 96, 8), "dx", lambda a, b, rest: a @ b.t() + rest)
    assert found == "W stands in place of Wᵀ, or Wᵀ of W"  # type: ignore[comparison-overlap]


def test_nan_is_the_largest_error() -> None:
    def call(**of: Any) -> Tensor:
        return one_nan(SMALL.op(**of), torch.eye(SMALL.N, dtype=SMALL.dtype), 0.0)

    assert diagnose(SMALL, ["y"], call)["y"].largest.startswith("row 3, column 4: nan")


def test_largest_error_is_where_it_is() -> None:
    def call(**of: Any) -> Tensor:
        y = SMALL.op(**of)
        draws = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        one = torch.zeros(70, 69)
        one[5, 7] = 2
        return y * (1 + 0.01 * draws) + one

    found = diagnose(SMALL, ["y"], call)["y"]
    assert found.cause is None and str(found).startswith("largest error at row 5, column 7: ")


def test_result_that_is_right_the_second_time_varies_from_run_to_run() -> None:
    assert diagnose(SMALL, ["y", "dB"])["dB"].cause == AGAIN


def test_other_op_is_told_its_factor() -> None:
    case = ExpertsCase((3, 0, 5), N=33, K=17, R=3)
    assert diagnose(case, ["y"], lambda **of: 2 * case.op(**of))["y"].cause == (
        "y is 2.00 times what it should be"
    )
