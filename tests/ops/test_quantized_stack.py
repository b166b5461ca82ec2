"""4-bit stacks of experts on the eager GPU path: decoded in pieces, or an expert for each row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lora_kernels import lora_experts_linear
from lora_kernels.backends import decoder
from lora_kernels.backends.eager import experts as eager_experts
from lora_kernels.backends.eager import quantized_stack
from lora_kernels.bench.counter import Kernel, count
from lora_kernels.core import coding
from lora_kernels.core.call import ExpertsOperands, ExpertsSpec
from lora_kernels.oracle.case import engine, give_mask, run
from lora_kernels.quantization import QuantizedWeight, quantize_4bit
from tests.support.experts import ROWS, ExpertsCase, check, inputs

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
E, N, K, R = 4, 80, 192, 8
CASE = ExpertsCase(ROWS, N, K, R, dtype=bf16, quant="nf4-64")


@pytest.fixture(autouse=True)
def on_gpu_path() -> Iterator[None]:
    with engine("eager-gpu"):
        yield


def operands_of(case: ExpertsCase) -> tuple[ExpertsOperands, ExpertsSpec]:
    args = inputs(case)
    tensors = [args[name].detach() for name in ("x", "lora_A", "lora_B", "offsets")]
    x, lora_A, lora_B, offsets = tensors
    spec = ExpertsSpec((args["scaling"],), 0.0, case.dtype, case.dtype, case.transposed)
    return ExpertsOperands(x, args["weight"].codes, [lora_A], [lora_B], offsets), spec


def sizes(case: ExpertsCase, backward: bool) -> list[int]:
    """The out-features of each piece."""
    operands, spec = operands_of(case)
    chosen = eager_experts.chosen_experts(operands, spec)
    pieces = quantized_stack.build_stack(operands, spec, chosen, backward).pieces
    return [piece.stop - piece.start for piece in pieces]


CASES = [
    CASE,
    replace(CASE, quant="nf4-64-nested"),
    replace(CASE, quant="fp4-32", adapter_dtype=f32),
    replace(CASE, quant="fp4-64-nested", transposed=True, N=192, K=80),
    replace(CASE, quant="nf4-32", transposed=True, N=192, K=80, bias=False),
    replace(CASE, quant="mxfp4-32-nested"),
    replace(CASE, quant="nvfp4-16-nested", adapter_dtype=f32),
    replace(CASE, quant="nvfp4-16-nested", transposed=True, N=192, K=80),
    replace(CASE, quant="nvfp4-16", rows=(0, 2, 0, 0, 1, 0, 0)),
    replace(CASE, dropout_p=0.25, adapter_dtype=f32),
    replace(CASE, dropout_p=0.5, peft_layout=True, adapter_dtype=f16),
    replace(CASE, rows=(0, 24, 0, 0), quant="nf4-64-nested"),  # one expert with all rows
    replace(CASE, rows=(0, 0, 5), tail=0),
    replace(CASE, rows=(9, 2), tail=9),
    replace(CASE, rows=(5, 0, 7, 1, 0, 0, 11), quant="nf4-64-nested"),
    *(replace(CASE, frozen=(name,)) for name in ("x", "lora_A", "lora_B")),
    replace(CASE, frozen=("lora_A", "lora_B", "bias")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("piece", ["smallest", "uneven", "whole"])
def test_a_stack_in_pieces_is_within_tolerance(
    case: ExpertsCase, piece: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "smallest" holds less than one expert; of "uneven" the last piece is smaller."""
    experts = len(case.rows)
    # 48 + 32 of 80 out-features, for 192 in-features, and 128 + 64 or 96 + 96 of 192, for 80.
    budget = {"smallest": 1, "uneven": experts * 80 * 128 * 2, "whole": 1 << 30}[piece]
    monkeypatch.setattr(quantized_stack, "PIECE_BYTES", budget)
    assert eager_experts.is_grouped(*operands_of(case))
    found = [sizes(case, backward) for backward in (False, True)]
    assert all((len(each) > 1) is (piece != "whole") for each in found)
    if piece == "smallest":
        assert budget < case.N * case.K * 2 and max(map(len, found)) > 2
    if piece == "uneven":
        assert any(len({*each}) > 1 for each in found), found
    check(case)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_folded_stack_in_pieces_is_within_tolerance(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece takes its own columns of B·A, in both directions."""
    monkeypatch.setattr(quantized_stack, "PIECE_BYTES", 1)
    rows = (400, 0, 3, 190)
    case = replace(CASE, rows=rows, N=128, K=128, transposed=transposed, adapter_dtype=f32)
    assert case.is_folded
    assert all(len(sizes(case, backward)) > 1 for backward in (False, True))
    check(case)


@pytest.mark.parametrize("rows", [ROWS, (0, 1, 0, 0, 2, 0)], ids=str)
@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_a_stack_without_adapters_is_the_base(
    budget: int, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_stack, "PIECE_BYTES", budget)
    args = inputs(replace(CASE, rows=rows, bias=False))
    x, weight, offsets, dy = (args[name] for name in ("x", "weight", "offsets", "dy"))
    torch.use_deterministic_algorithms(True)  # uninitialized memory is NaN
    try:
        y = lora_experts_linear(x, weight, None, None, offsets)
        (dx,) = torch.autograd.grad(y, x, dy)
    finally:
        torch.use_deterministic_algorithms(False)
    want, want_dx = torch.zeros_like(dy), torch.zeros_like(x)
    start = 0
    for W, stop in zip(weight.dequantize(bf16), offsets.tolist(), strict=True):
        want[start:stop] = x.detach()[start:stop] @ W.T
        want_dx[start:stop] = dy[start:stop] @ W
        start = stop
    # Sums in another order are rounded to neighbouring bfloat16 numbers at most.
    torch.testing.assert_close(y, want, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(dx, want_dx, rtol=2**-7, atol=2**-7)


def test_cut_gives_the_fewest_pieces_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_stack, "PIECE_BYTES", 1000)

    def cut(size: int, one: int, step: int) -> list[int]:
        pieces = quantized_stack._cut(size, one, step)
        assert pieces[0].start == 0 and pieces[-1].stop == size
        assert all(a.stop == b.start for a, b in itertools.pairwise(pieces))
        return [piece.stop - piece.start for piece in pieces]

    assert cut(100, 10, 16) == [100]  # as large as the budget, and no multiple of the step
    assert cut(101, 10, 16) == [64, 37]  # 96 + 5 would be two as well, and less even
    assert cut(192, 10, 64) == [64, 64, 64]
    assert cut(192, 7, 64) == [128, 64]
    assert cut(80, 2000, 16) == [16] * 5  # a step may exceed the budget


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("experts", [None, [2], [0, 2, 2, 1]], ids=str)
@pytest.mark.parametrize("budget", [1, 3 * 128 * 2 * 64, 1 << 30])
def test_decoded_pieces_are_columns_of_the_decoded_stack(
    budget: int, experts: list[int] | None, nested: bool, backward: bool, transposed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Bit for bit. 128·128 codes are one block of nested scales; 128·192 straddle one."""
    monkeypatch.setattr(quantized_stack, "PIECE_BYTES", budget)
    for rows, columns in ((128, 128), (128, 192)):
        W = torch.randn(3, rows, columns) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
        weight = quantize_4bit(W, blocksize=64, double_quant=nested)
        n, k = (columns, rows) if transposed else (rows, columns)
        A, B = torch.zeros(3, R, k), torch.zeros(3, n, R)
        operands = ExpertsOperands(
            torch.zeros(9, k), weight.codes, [A], [B], torch.tensor([9, 9, 9])
        )
        spec = ExpertsSpec((1.0,), 0.0, bf16, bf16, transposed)
        chosen = None if experts is None else torch.tensor(experts)
        stack = quantized_stack.build_stack(operands, spec, chosen, backward)
        count = 3 if experts is None else len(experts)
        assert (len(stack.pieces) == 1) is (count * rows * columns * 2 <= budget)
        found = torch.cat([stack.decode(piece) for piece in stack.pieces], dim=2)
        want = weight.dequantize(bf16)
        want = want if experts is None else want[experts]
        # x·Wᵀ in the forward, dy·W in the backward
        assert torch.equal(found, want if backward is not transposed else want.mT)


FEW = ExpertsCase(tuple(int(e % 10 == 7) for e in range(20)), 64, 128, R, quant="nf4-64")
FEW_CASES = [
    *(replace(FEW, dtype=dtype) for dtype in (f32, bf16, f16)),
    # Rows that share an expert; sizes that `grouped_mm` does not take; rows of no expert alone.
    replace(FEW, rows=(0, 3, 0, 0, 1, 0, 2, 0, 0), dtype=bf16, quant="nf4-64-nested"),
    replace(FEW, N=66, K=96, R=3, quant="fp4-32", adapter_dtype=f32, dtype=f16),
    replace(FEW, N=128, quant="nf4-64-nested", dropout_p=0.25, dtype=bf16),
    replace(FEW, N=80, quant="nvfp4-16-nested", dtype=bf16),
    replace(FEW, N=80, quant="mxfp4-32-nested", dtype=f16),
    replace(FEW, N=48, quant="nvfp4-16-nested", transposed=True, dtype=bf16),
    replace(FEW, N=192, quant="nf4-64-nested", transposed=True, peft_layout=True, dtype=bf16),
    replace(FEW, N=128, K=96, transposed=True, dropout_p=0.5, adapter_dtype=f32, dtype=f16),
    replace(FEW, rows=(0,) * 8, tail=3, dtype=bf16),
    replace(FEW, frozen=("lora_A", "lora_B", "bias"), bias=False),
]


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_fewer_rows_than_experts_are_within_tolerance(
    case: ExpertsCase, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    operands, spec = operands_of(case)
    monkeypatch.setattr(quantized_stack, "PIECE_BYTES", budget)
    assert eager_experts.chosen_experts(operands, spec) is not None
    assert (len(sizes(case, False)) > 1) is (budget == 1)
    check(case)


def test_fewer_rows_than_experts_decode_those_experts_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded: list[int] = []
    dense = decoder.dense

    def spy(weight: Any, shape: tuple[int, int], *args: Any) -> Tensor:
        decoded.append(shape[0] * shape[1])
        return dense(weight, shape, *args)

    monkeypatch.setattr(decoder, "dense", spy)
    case = replace(FEW, dtype=bf16)
    run(lora_experts_linear, inputs(case))
    assert len(case.rows) > case.M and decoded == [case.M * case.N * case.K] * 2


def test_as_many_rows_as_experts_or_none_decode_the_stack() -> None:
    for rows, few in (((1,) * 8, False), ((1,) * 7 + (0,), True), ((0,) * 8, False)):
        chosen = eager_experts.chosen_experts(*operands_of(replace(CASE, rows=rows, tail=0)))
        assert (chosen is not None) is few
    dense = operands_of(CASE)[0]._replace(weight=torch.zeros(E, N, K, dtype=bf16))
    assert quantized_stack.chosen_experts(dense, ExpertsSpec((1.0,), 0.0, bf16, bf16)) is None


def test_experts_that_begin_inside_of_a_block_are_not_chosen() -> None:
    case = ExpertsCase((1, 0, 0, 0, 0, 0), 33, 47, R, dtype=bf16, quant="nf4-64")
    assert eager_experts.chosen_experts(*operands_of(case)) is None
    check(case)


def test_experts_one_at_a_time_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16, for which PyTorch has no kernel of all experts. Scales are decoded once for all."""
    decoded: list[tuple[int, int]] = []
    scales: list[int] = []
    checked_dense, dequantize_scales = decoder._checked_dense, coding.dequantize_scales

    def spy(weight: Any, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        decoded.append(shape)
        return checked_dense(weight, shape, dtype)

    def spy_scales(codes: Tensor, *nested: Any) -> Tensor:
        scales.append(codes.numel())
        return dequantize_scales(codes, *nested)

    monkeypatch.setattr(decoder, "_checked_dense", spy)
    monkeypatch.setattr(coding, "dequantize_scales", spy_scales)
    case = replace(CASE, dtype=f16, quant="nf4-64-nested")
    run(lora_experts_linear, inputs(case))
    assert decoded == [(N, K)] * 2 * sum(n > 0 for n in ROWS)
    assert scales == [E * N * K // 64] * 2


@pytest.mark.parametrize("nested", [False, True])
def test_rows_of_a_weight_decode_to_the_rows_of_all(nested: bool) -> None:
    weight = quantize_4bit(torch.randn(24, 96), blocksize=64, double_quant=nested)
    want = weight.dequantize()
    for rows in (slice(2, 6), slice(0, 2), slice(22, 24), slice(3, 7), slice(4, 4), slice(None)):
        found = decoder.dense(weight.codes, (24, 96), f32, rows=rows, columns=slice(5, 70))
        assert torch.equal(found, want[rows, 5:70])


# ---- What the host waits for ----


def on_meta(experts: int, rows: int, dtype: torch.dtype = bf16, **sizes: int) -> dict[str, Any]:
    """Arguments on meta, where an op whose result's size or Python value is data raises."""
    N, K, R = sizes.get("N", 128), sizes.get("K", 256), 16
    like = {"dtype": dtype, "device": "meta"}
    codes = experts * N * K
    weight = QuantizedWeight(
        packed=torch.empty(codes // 2, dtype=torch.uint8, device="meta"),
        absmax=torch.empty(codes // 64, dtype=torch.uint8, device="meta"),
        code=torch.empty(16, device="meta"),
        nested_absmax=torch.empty(-(-codes // (64 * 256)), device="meta"),
        nested_code=torch.empty(256, device="meta"),
        offset=torch.empty((), device="meta"),
        quant_type="nf4",
        blocksize=64,
        shape=(experts, N, K),
        dtype=dtype,
    )
    return {
        "x": torch.empty(rows, K, **like, requires_grad=True),
        "weight": weight,
        "lora_A": torch.empty(experts, R, K, **like, requires_grad=True),
        "lora_B": torch.empty(experts, N, R, **like, requires_grad=True),
        "offsets": torch.empty(experts, dtype=torch.int32, device="meta"),
        "bias": torch.empty(experts, N, **like, requires_grad=True),
    }


def count_both(args: dict[str, Any], log: list[Kernel] | None = None) -> Any:
    names = "x", "lora_A", "lora_B", "bias"

    def both() -> None:
        y = lora_experts_linear(**args)
        torch.autograd.grad(y, [args[name] for name in names], torch.empty_like(y))

    return count(both, log)


@pytest.mark.parametrize("budget", [1, 1 << 30])
@pytest.mark.parametrize("rows", [5, 64])
def test_the_host_waits_for_nothing(
    rows: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(quantized_stack, "PIECE_BYTES", budget)
    count_both(on_meta(8, rows))
    with pytest.raises((RuntimeError, NotImplementedError)):  # so such a wait is seen
        count_both(on_meta(8, 64, f16))
    if rows < 8:  # without gradients in any dtype
        args = on_meta(8, rows, f16)
        with torch.no_grad():
            count(lambda: lora_experts_linear(**args))


def test_kernels_depend_on_the_pieces_and_not_on_the_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of several pieces takes five: copies of its codes and scales, its decoding, the GEMM and
    the sum, and before the first piece five decode the nested scales. One piece takes three."""
    pytest.importorskip("bitsandbytes")
    found = {}
    for experts in (8, 32, 128):
        monkeypatch.setattr(quantized_stack, "PIECE_BYTES", 1 << 40)
        count_both(on_meta(experts, 256))
        for pieces in (1, 2, 4):
            # 128 out-features of x·Wᵀ, 256 of dy·W, in `pieces` and the same
            monkeypatch.setattr(quantized_stack, "PIECE_BYTES", experts * 256 * 128 * 2 // pieces)
            found[experts, pieces] = count_both(on_meta(experts, 256)).kernels
    assert {kernels for (_, pieces), kernels in found.items() if pieces == 1} == {found[8, 1]}
    for (_, pieces), kernels in found.items():
        assert kernels == found[8, 1] + 2 * (5 + 5 * pieces - 3) * (pieces > 1)


def test_one_piece_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the stack, the codes' copy, scales, and the results; not two pieces."""
    pytest.importorskip("bitsandbytes")
    args = on_meta(64, 64, N=512, K=512)
    whole = 64 * 512 * 512 * 2
    monkeypatch.setattr(quantized_stack, "PIECE_BYTES", whole // 4)
    count_both(args)
    assert whole // 4 < count_both(args).peak < whole // 2


# ---- Why a call runs expert by expert ----


def reason(**fields: Any) -> str | None:
    operands, spec = operands_of(replace(CASE, **{k: v for k, v in fields.items() if k != "spec"}))
    return eager_experts.loop_reason(operands, spec)


def test_loop_reason_names_what_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason() is None
    assert reason(dtype=f32) == "PyTorch's kernel for all experts takes bfloat16, not torch.float32"
    assert reason(dtype=f16) == "PyTorch's kernel for all experts takes bfloat16, not torch.float16"
    assert "rank 4, in 192, out 80 are no such" in str(reason(R=4))
    assert "rank 8, in 192, out 84 are no such" in str(reason(N=84))
    assert "rank 8, in 180, out 80 are no such" in str(reason(K=180))
    straddles = {"quant": "nf4-256"}  # 256 codes, rows of 192
    assert reason(**straddles) is None
    monkeypatch.setattr(quantized_stack, "PIECE_BYTES", E * N * K * 2)
    assert reason(**straddles) is None
    monkeypatch.setattr(quantized_stack, "PIECE_BYTES", E * N * K * 2 - 1)
    assert reason(**straddles) == "blocks of 256 codes straddle rows of 192"
    assert reason() is None
    monkeypatch.setattr(eager_experts, "MOST_GROUPS", E - 1)
    assert reason() == f"grouped_mm takes at most {E - 1} experts"
    operands, spec = operands_of(CASE)
    wide = spec._replace(dtype=f64)
    assert eager_experts.loop_reason(operands, wide) == "grouped_mm does not take torch.float64"
    monkeypatch.delattr(functional, "grouped_mm")
    assert str(eager_experts.loop_reason(operands, spec)).endswith("has no grouped_mm")


@pytest.mark.parametrize(
    ("kind", "capability", "waits"),
    [
        ("cuda", 90, False),
        ("cuda", 100, False),
        ("cuda", 103, False),
        ("cuda", 80, True),
        ("cuda", 89, True),
        ("cuda", 120, True),
        ("hip", 0, True),
    ],
)
def test_waits_reason_is_that_of_the_card(
    kind: str, capability: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = eager_experts.device.DeviceInfo(kind, capability, 100, 1 << 16, "a card")
    monkeypatch.setattr(eager_experts.device, "gpu", lambda index: card)
    found = eager_experts.waits_reason(torch.device("cuda", 0), bf16)
    assert found == ("PyTorch's kernel for all experts does not run on a card" if waits else None)
    assert eager_experts.waits_reason(torch.device("meta"), bf16) is None
    assert "xpu is not known" in str(eager_experts.waits_reason(torch.device("xpu"), bf16))


def test_a_stack_that_cannot_be_cut_is_within_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASE, quant="nf4-256")
    monkeypatch.setattr(quantized_stack, "PIECE_BYTES", 1)
    assert not eager_experts.is_grouped(*operands_of(case))
    check(case)
    few = replace(case, rows=(1, 0, 0, 0, 0, 0), quant="nf4-512")
    assert eager_experts.chosen_experts(*operands_of(few)) is None
    check(few)


@pytest.mark.parametrize("quant", ["", "nf4-64"])
def test_operands_of_grouped_mm_are_aligned_wherever_x_and_dy_begin(
    quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses other addresses, and, summing over rows, rows side by side in memory."""
    grouped_mm = functional.grouped_mm

    def checked(a: Tensor, b: Tensor, **offs: Tensor) -> Tensor:
        assert not a.data_ptr() % 16 and not b.data_ptr() % 16
        assert b.dim() == 3 or (a.stride(0) == 1 and b.stride(1) == 1)
        return grouped_mm(a, b, **offs)

    args = give_mask(inputs(replace(CASE, quant=quant)))
    want = run(lora_experts_linear, args)
    monkeypatch.setattr(functional, "grouped_mm", checked)
    for name in ("x", "dy"):
        t = args[name].detach()
        args[name] = torch.cat([t.new_zeros(3), t.flatten()])[3:].view_as(t)
        args[name].requires_grad_(name == "x")
        assert args[name].is_contiguous() and args[name].data_ptr() % 16
    got = run(lora_experts_linear, args)
    assert all(torch.equal(got[name], want[name]) for name in want)
