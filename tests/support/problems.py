"""Cases of `lora_linear` that the tests of several backends share.

No size is a multiple of a tile. RANK is no power of two, and five draws of RANK elements are as
many elements of dg as are compared; of a gate of 5 ranks it takes 52.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from lora_kernels.oracle.case import Case

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
RANK = 61
RANKS = (1, 2, 16, 17, 64, 65, 130, 256)
UNDROPPED: dict[str, Any] = {"gate": True, "column_scale": True, "bias": True}
FULL: dict[str, Any] = UNDROPPED | {"dropout_p": 0.1}
# K and the format: scales in bytes and in float32; blocks of 16 that are an even or odd number.
E2M1 = [(96, "mxfp4-32-nested"), (96, "nvfp4-16-nested"), (160, "mxfp4-32"), (112, "nvfp4-16")]
# dtype, adapter_dtype, autocast
DTYPES: list[tuple[Any, ...]] = [
    (f32, None, None),
    (bf16, None, None),
    (f16, None, None),
    (bf16, f32, None),  # PEFT's default beside a 16-bit model
    (f32, f32, bf16),
]
# What is frozen where each argument alone needs a gradient, and where each does not.
ALL = ("x", "lora_A", "lora_B", "rank_gate", "column_scale", "bias")
NEEDS = [
    *(tuple(n for n in ALL if n != alone) for alone in ALL),
    *((missing,) for missing in ("x", "lora_A", "lora_B")),
    ("lora_A", "lora_B"),
    ALL,
]
OPTIONS: list[dict[str, Any]] = [
    {"gate": True},
    {"column_scale": True},
    {"bias": True},
    {"dropout_p": 0.5},
    {"dropout_p": 1.0},
    {"base": False, "gate": True, "dropout_p": 0.1},
    *({"frozen": frozen, **FULL} for frozen in NEEDS),
]
LAYOUTS = ("padded", "columns", "every_other", "expanded", "3d_swapped")


def with_rank(case: Case) -> Case:
    """Return the case with RANK in place of fewer ranks if it has a gate."""
    return replace(case, R=max(case.R, RANK)) if case.gate else case


def of_dtypes(*sizes: int, dtypes: Any = DTYPES) -> list[Case]:
    """Each dtype, without options and with all."""
    options: Any = ({}, FULL)
    return [Case(*sizes, RANK, *d, **o) for d, o in itertools.product(dtypes, options)]


def of_options(*sizes: int) -> list[Case]:
    return [Case(*sizes, RANK, bf16, **options) for options in OPTIONS]


def of_layouts(*sizes: int, dtype: torch.dtype, layouts: tuple[str, ...] = LAYOUTS) -> list[Case]:
    """dy takes its leading dimensions from x."""
    dy = {layout: layout if "d_" not in layout else "rows" for layout in layouts}
    return [Case(*sizes, RANK, dtype, x_layout=x, dy_layout=dy[x], dropout_p=0.1) for x in layouts]


def without_dropout(cases: Iterable[Case]) -> list[Case]:
    """The cases for a backend whose kernels have no dropout, each once."""
    return list(dict.fromkeys(replace(case, dropout_p=0.0) for case in cases))


def of_4bit(M: int, N: int, dtype: torch.dtype, formats: list[tuple[int, str]]) -> list[Case]:
    """formats: K and the weight's format. Without signs, errors do not average out."""
    return [Case(M, N, K, RANK, dtype, quant=quant, values="nonnegative") for K, quant in formats]


def of_options_4bit(M: int) -> list[Case]:
    """Every option beside a 4-bit weight, and a product in another dtype than x's."""
    return [
        Case(M, 65, 128, RANK, f16, quant="nf4-64-nested", **FULL),
        Case(9, 65, 96, RANK, f32, quant="nf4-64-nested", compute=bf16),
    ]


def cross_product(shapes: list[tuple[int, int, int]]) -> list[Case]:
    """Each format and dtype in each shape M, N, K; options take turns."""
    options: Any = itertools.cycle([{}, FULL, {"gate": True, "bias": True}, {"dropout_p": 0.5}])
    return [
        Case(
            *sizes, RANK, dtype, adapter, None if quant else autocast, quant=quant, **next(options)
        )
        for quant in ("", "nf4-64-nested", "fp4-32")
        for dtype, adapter, autocast in DTYPES
        for sizes in shapes
    ]
