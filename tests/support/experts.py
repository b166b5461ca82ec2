"""Cases of `lora_experts_linear`, and checks against their float64 reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from lora_kernels import lora_experts_linear
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import inputs as inputs
from lora_kernels.oracle.experts_case import ExpertsCase as ExpertsCase
from tests.support import exact
from tests.support.assertions import assert_exact
from tests.support.engines import check as check
from tests.support.problems import E2M1, bf16, f16, f32

ROWS = (3, 0, 1, 20)  # an expert without rows, a single row, more than a few
SIZES = (33, 47, 3), (64, 128, 8)


def some_cases(sizes: Sequence[tuple[int, int, int]] = SIZES) -> list[ExpertsCase]:
    """Cases of each dtype, layout and option in these sizes, and of each format."""
    found = []
    for dtype, (N, K, R) in itertools.product((f32, bf16, f16), sizes):
        case = ExpertsCase(ROWS, N, K, R, dtype=dtype)
        found += [
            case,
            replace(case, transposed=True, bias=False),
            replace(case, dropout_p=0.25, adapter_dtype=f32),
            replace(case, peft_layout=True, transposed=True, dropout_p=0.5),
            replace(case, quant="nf4-64"),
        ]
    case = ExpertsCase(ROWS, 64, 128, 8, dtype=bf16)
    found += [
        replace(case, quant="fp4-32", transposed=True, dropout_p=0.25),
        replace(case, quant="nf4-64-nested", adapter_dtype=f32),
        # 192 blocks an expert: blocks of nested scales straddle experts.
        replace(case, N=96, quant="nf4-64-nested", rows=(3, 20, 2, 4)),
        replace(case, N=96, quant="nf4-64-nested", rows=(3, 20, 2, 4), transposed=True),
        replace(case, N=256, quant="nf4-64-nested", adapter_dtype=f32),
        replace(case, N=33, K=47, quant="nf4-64-nested", transposed=True),
        # Each expert of NVFP4 has a table of scales; 2·40 blocks of MXFP4 are an expert.
        *(
            replace(case, quant=quant, transposed=transposed, N=80, K=K, dtype=dtype)
            for (K, quant), transposed, dtype in itertools.product(E2M1, (False, True), (f32, bf16))
            if not transposed or quant.startswith("nvfp4")
        ),
        replace(case, quant="mxfp4-32-nested", N=96, transposed=True, adapter_dtype=f32),
        replace(case, quant="nvfp4-16-nested", N=80, adapter_dtype=f32, dropout_p=0.25),
        replace(case, rows=(0, 0, 5), tail=0),
        # PEFT's lora_B is copied for 32 experts at a time.
        *(
            replace(case, rows=(0, 3, 0, 1) * 18, N=33, K=47, R=3, peft_layout=True, dtype=dtype)
            for dtype in (f32, bf16)
        ),
        replace(case, rows=(2, 1), tail=9),
        *(replace(case, frozen=(name,)) for name in ("x", "lora_A", "lora_B", "bias")),
        replace(case, frozen=("lora_A", "lora_B", "bias"), quant="nf4-64"),
    ]
    return found + cases_of_tenants() + folded_cases()


def cases_of_tenants() -> list[ExpertsCase]:
    """Cases of two experts for three tenants, and of an expert without rows of some."""
    case = ExpertsCase((3, 0, 9, 1, 20, 5), 64, 128, 8, tenants=3)
    tensors = replace(case, R=16, ranks=(8, 16, 0))  # of each tenant its own
    return [
        tensors,
        replace(tensors, dtype=bf16, peft_layout=True, dropout_p=0.25),
        replace(tensors, dtype=f16, peft_layout=True, transposed=True, rows=(1, 1, 0, 0, 40, 0)),
        replace(tensors, rows=(1, 0, 2) * 35, N=33, K=47, dtype=bf16, peft_layout=True),
        replace(tensors, N=33, K=47, ranks=(3, 13, 1), bias=False, peft_layout=True),
        replace(tensors, dtype=bf16, quant="nf4-64", adapter_dtype=f32, ranks=(16,) * 3),
        case,
        replace(case, dtype=bf16, adapter_dtype=f32, dropout_p=0.25),
        replace(case, dtype=f16, transposed=True, peft_layout=True),
        replace(case, N=33, K=47, R=3, bias=False),
        # One tenant with so many rows would have W + s·B·A on the eager GPU path.
        *(
            replace(case, N=16, K=8, R=8, rows=(30, 0, 1, 50, 9, 20), quant=q)
            for q in ("", "nf4-64")
        ),
        replace(case, dtype=bf16, quant="nf4-64-nested", tail=0),
        replace(case, rows=(0, 1, 0, 0, 0, 1, 0, 0), tenants=2, quant="nf4-64", tail=0),
        replace(case, dtype=bf16, rows=(0, 0, 0, 0, 7, 0)),
        *(replace(case, dtype=bf16, frozen=(name,)) for name in ("x", "lora_A", "lora_B", "bias")),
    ]


def folded_cases() -> list[ExpertsCase]:
    """Cases of so many rows that the eager GPU path computes W + s·B·A."""
    case = ExpertsCase((30, 0, 1, 50), 16, 8, 8)
    of_codes = replace(case, rows=(200, 0, 3, 90), N=64, K=64, dtype=bf16, quant="nf4-64")
    return [
        *(replace(case, dtype=dtype) for dtype in (f32, bf16, f16)),
        replace(case, dtype=bf16, adapter_dtype=f32, transposed=True, bias=False),
        replace(case, dtype=bf16, peft_layout=True, tail=0),
        *(replace(case, dtype=bf16, frozen=(name,)) for name in ("x", "lora_A", "lora_B", "bias")),
        of_codes,
        replace(of_codes, quant="nf4-64-nested", transposed=True, adapter_dtype=f32),
    ]


def check_exact(case: ExpertsCase, blocksize: int = 0) -> None:
    """Check that y and every gradient of a case of integers are the reference.

    In 16 bits, elements above 128 are left out: a partial sum of theirs may have been rounded.

    blocksize: of a 4-bit weight; 0 for a dense one.
    """
    assert case.values == "integers" and case.dropout_p in (0.0, 0.5)
    args = cases.inputs(case)
    if blocksize:
        args["weight"] = exact.quantize_integers(args["weight"], blocksize)
    ref = cases.oracle(args, case.equation)
    got = cases.run(lora_experts_linear, cases.give_mask(args))
    assert got.keys() == ref.keys()
    for name in got:
        is_exact = ref[name].abs() <= (128 if case.dtype.itemsize == 2 else 2**24)
        want = ref[name].where(is_exact, 0.0).to(got[name].dtype)
        assert_exact(got[name].where(is_exact, 0.0), want, f"{case}, {blocksize}: {name}")
