"""Launches whose offsets exceed 2³¹ elements address in 64 bits. On meta tensors no kernel runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.backends.triton import FUSED, codec, configs, launch
from lora_kernels.backends.triton import linear as equation
from lora_kernels.core.call import Needs, Operands, Saved, Spec
from lora_kernels.core.codes import Codes

f32 = torch.float32
FAR = 1 << 30  # elements between rows: the third row lies beyond 2³¹
ROWS, K, N, R = 3, 64, 32, 16


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Record for each kernel if its addresses have 64 bits."""
    found: dict[str, bool] = {}

    def record(kernel: Any, config: Any, plan: Any = None, **arguments: Any) -> None:
        found[kernel.__name__] = arguments.get("WIDE", False)

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


@pytest.mark.parametrize("name", ["", "x", "weight", "lora_A", "lora_B"])
def test_lora_linear_addresses_each_operand_widely(name: str, launches: dict[str, bool]) -> None:
    shapes = {"x": (ROWS, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R)}
    tensors = {n: (far if n == name else near)(*shape) for n, shape in shapes.items()}
    equation.lora_linear(Operands(**tensors), Spec(1.0, 0.0, f32, f32), FUSED)
    assert launches["fused_kernel"] is bool(name)


@pytest.mark.parametrize("name", ["", "x", "lora_B", "dy"])
def test_lora_linear_backward_addresses_each_operand_widely(
    name: str, launches: dict[str, bool]
) -> None:
    shapes = {"x": (ROWS, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R)}
    tensors = {n: (far if n == name else near)(*shape) for n, shape in shapes.items()}
    dy = (far if name == "dy" else near)(ROWS, N)
    needs = Needs(x=False, lora_A=True, lora_B=True)
    operands, saved = Operands(**tensors), Saved(near(ROWS, R))
    equation.lora_linear_backward(dy, operands, saved, Spec(1.0, 0.0, f32, f32), needs, FUSED)
    assert launches["shrink_kernel"] is (name in ("dy", "lora_B"))
    assert launches["outer_kernel"] is (name == "x")  # of dA, the last one


def codes(elements: int) -> Codes:
    packed = torch.empty(elements // 2, dtype=torch.uint8, device="meta")
    tables = near(elements // 64), near(16), None, None, None
    return Codes(packed, *tables, 64, 1, "nf4")


@pytest.mark.parametrize("columns", [(1 << 31) // 64 - 1, (1 << 31) // 64])
def test_codes_of_so_many_elements_are_addressed_widely(
    columns: int, launches: dict[str, bool]
) -> None:
    """The elements of the weight decide, however small the other operands are."""
    wide, weight = columns * 64 >= 1 << 31, codes(columns * 64)
    operands = Operands(near(1, 64), weight, near(1, 64), near(columns, 1))
    equation.lora_linear(operands, Spec(1.0, 0.0, f32, f32), FUSED)
    assert launches["fused_kernel"] is wide
    codec.dequantize(weight, (columns, 64), f32)
    assert launches["dequantize_kernel"] is wide
