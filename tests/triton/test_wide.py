"""Launches whose offsets exceed 2³¹ elements address in 64 bits. On meta tensors no kernel runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.backends.triton import FUSED, TWO_PASS, codec, configs, equation, experts, launch
from lora_kernels.core.call import (
    ExpertsNeeds,
    ExpertsOperands,
    ExpertsSpec,
    Needs,
    Operands,
    Saved,
    Spec,
)
from lora_kernels.core.packed4bit import Packed4bit

f32 = torch.float32
FAR = 1 << 30  # elements between rows: the third row lies beyond 2³¹
ROWS, K, N, R = 3, 64, 32, 16


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Record for each kernel if its addresses have 64 bits."""
    found: dict[str, bool] = {}

    def record(kernel: Any, config: Any, *args: Any, **meta: Any) -> None:
        types = meta.get("TYPES")
        found[kernel.__name__] = types.WIDE if types is not None else meta.get("WIDE", False)

    monkeypatch.setattr(launch, "run", record)
    monkeypatch.setattr(configs, "target", lambda *args: configs.INTERPRETER)
    return found


def near(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def far(*shape: int) -> Tensor:
    """A meta tensor whose rows are FAR elements apart."""
    strides = (shape[-2] * FAR, FAR, 1)[-len(shape) :]
    return strided(shape, strides)


def strided(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(shape, strides, device="meta")


def test_is_wide_from_an_offset_of_31_bits_on() -> None:
    assert not launch.is_wide(strided((2, 1), ((1 << 31) - 1, 1)))
    assert launch.is_wide(strided((2, 1), (1 << 31, 1)))
    assert launch.is_wide(strided((3, 2), (FAR, 1))) and not launch.is_wide(
        strided((2, 2), (FAR, 1))
    )


NAMES = ["", "x", "weight", "lora_A", "lora_B"]


@pytest.mark.parametrize("strategy", [FUSED, TWO_PASS])
@pytest.mark.parametrize("name", NAMES)
def test_lora_linear_addresses_each_operand_widely(
    name: str, strategy: str, launches: dict[str, bool]
) -> None:
    shapes = {"x": (ROWS, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R)}
    tensors = {n: (far if n == name else near)(*shape) for n, shape in shapes.items()}
    equation.lora_linear(Operands(**tensors), Spec(1.0, 0.0, f32, f32), strategy)
    assert launches[f"{strategy}_kernel"] is bool(name)
    if strategy == TWO_PASS:
        assert launches["shrink_kernel"] is (name in ("x", "lora_A"))


@pytest.mark.parametrize("name", ["", "x", "lora_B", "dy"])
@pytest.mark.parametrize("M", [ROWS, 600])  # from 128 rows on dS and dB in one kernel
def test_lora_linear_backward_addresses_each_operand_widely(
    M: int, name: str, launches: dict[str, bool]
) -> None:
    shapes = {"x": (M, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R)}
    tensors = {n: (far if n == name else near)(*shape) for n, shape in shapes.items()}
    dy = (far if name == "dy" else near)(M, N)
    needs = Needs(x=False, lora_A=True, lora_B=True)
    operands, saved = Operands(**tensors), Saved(near(M, R))
    equation.lora_linear_backward(dy, operands, saved, Spec(1.0, 0.0, f32, f32), needs, TWO_PASS)
    if M == ROWS:
        assert launches["shrink_kernel"] is (name in ("dy", "lora_B"))
    assert launches["outer_kernel"] is (name == "x")  # of dA, the last one
    if "shrink_outer_kernel" in launches:
        assert launches["shrink_outer_kernel"] is (name == "dy")


@pytest.mark.parametrize("name", ["", "weight", "lora_A", "lora_B"])
def test_dora_norm_addresses_each_operand_widely(name: str, launches: dict[str, bool]) -> None:
    shapes = {"weight": (N, K), "lora_A": (R, K), "lora_B": (N, R)}
    tensors = {n: (far if n == name else near)(*shape) for n, shape in shapes.items()}
    equation.dora_norm(**tensors, scaling=1.0, rank_gate=None)
    assert launches["row_norm_kernel"] is bool(name)


EXPERTS = {"x": (ROWS, K), "weight": (2, N, K), "lora_A": (2, R, K), "lora_B": (2, N, R)}


@pytest.mark.parametrize("name", NAMES)
def test_lora_experts_addresses_each_operand_widely(name: str, launches: dict[str, bool]) -> None:
    tensors: dict[str, Any] = {n: (far if n == name else near)(*s) for n, s in EXPERTS.items()}
    operands = ExpertsOperands(**tensors, offsets=near(2))
    experts.lora_experts(operands, ExpertsSpec(1.0, 0.0, f32, f32), TWO_PASS)
    assert launches["grouped_shrink_kernel"] is (name in ("x", "lora_A"))
    assert launches["grouped_linear_kernel"] is (name in ("x", "weight", "lora_B"))


@pytest.mark.parametrize("name", [*NAMES, "dy"])
def test_lora_experts_backward_addresses_each_operand_widely(
    name: str, launches: dict[str, bool]
) -> None:
    tensors: dict[str, Any] = {n: (far if n == name else near)(*s) for n, s in EXPERTS.items()}
    operands = ExpertsOperands(**tensors, offsets=near(2))
    dy = (far if name == "dy" else near)(ROWS, N)
    spec, needs = ExpertsSpec(1.0, 0.0, f32, f32), ExpertsNeeds(True, True, False)
    experts.lora_experts_backward(dy, operands, Saved(near(ROWS, R)), spec, needs, TWO_PASS)
    assert launches["grouped_shrink_kernel"] is (name in ("dy", "lora_B"))
    assert launches["grouped_linear_kernel"] is (name in ("dy", "weight", "lora_A"))
    assert launches["grouped_outer_kernel"] is (name == "x")


def codes(elements: int) -> Packed4bit:
    packed = torch.empty(elements // 2, dtype=torch.uint8, device="meta")
    tables = near(elements // 64), near(16), None, None, None
    return Packed4bit(packed, *tables, 64, 1, "nf4")


@pytest.mark.parametrize("columns", [(1 << 31) // 64 - 1, (1 << 31) // 64])
def test_codes_of_so_many_elements_are_addressed_widely(
    columns: int, launches: dict[str, bool]
) -> None:
    """The elements of the weight decide, however small the other operands are."""
    wide, weight = columns * 64 >= 1 << 31, codes(columns * 64)
    operands = Operands(near(1, 64), weight, near(1, 64), near(columns, 1))
    equation.lora_linear(operands, Spec(1.0, 0.0, f32, f32), TWO_PASS)
    assert launches["two_pass_kernel"] is wide
    equation.dora_norm(weight, near(1, 64), near(columns, 1), 1.0, None)
    assert launches["row_norm_kernel"] is wide
    codec.dequantize(weight, (columns, 64), f32)
    assert launches["dequantize_kernel"] is wide
    stack = near(64, 1, 64), near(64, columns // 64 + 1, 1)
    held = ExpertsOperands(near(1, 64), codes(64), *stack, near(64))
    experts.lora_experts(held, ExpertsSpec(1.0, 0.0, f32, f32), TWO_PASS)
    assert launches["grouped_linear_kernel"] is (64 * (columns // 64 + 1) * 64 >= 1 << 31)
