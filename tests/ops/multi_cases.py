"""What rows with adapters of their own are tested on, by Triton's kernels and CUDA's."""

import itertools

import pytest
import torch

import lora_kernels
from lora_kernels.measure.multi import MultiCase, inputs, judge, run

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


def some_cases(many: tuple[int, int]) -> list[MultiCase]:
    """many: rows, and K beside them, of which the kernels have more than a tile."""
    even = (3, 5, 8, 4)  # one of rank 1 alone would decide, by few roundings, what gradients lose
    chosen = [
        MultiCase(M, 72, K, rows=rows, dtype=dtype, quant=quant, dropout_p=p)
        for (M, K), rows, (dtype, quant), p in itertools.product(
            ((7, 96), many), ("grouped", "mixed"),
            ((f32, ""), (bf16, ""), (bf16, "nf4-64-nested")), (0.0, 0.1),
        )
    ]  # fmt: skip
    return [
        *chosen,
        MultiCase(1, 65, 96, ranks=(16, 7)),
        MultiCase(0, 65, 96),
        MultiCase(40, 33, 63, rows="mixed", dtype=f16),
        MultiCase(40, 33, 63, rows="mixed", dtype=bf16, adapter_dtype=f32),
        MultiCase(40, 33, 63, rows="mixed", dtype=f32, base=False, bias=False),
        MultiCase(5, 33, 63, ranks=(100, 3, 17), dtype=f32),
        *(MultiCase(40, 33, 63, even, "mixed", frozen=(name,)) for name in ("x", "lora_A")),
        MultiCase(40, 33, 63, even, "mixed", frozen=("lora_B", "bias"), dropout_p=0.1),
    ]


def check(case: MultiCase) -> None:
    wrong = [f"{name} {verdict}" for name, verdict in judge(case).items() if not verdict.ok]
    if wrong:
        pytest.fail("\n".join([str(case), *wrong]), pytrace=False)


def check_overflow() -> None:
    """What is not finite in a row, of the gradients of adapters only that row's own has."""
    args = inputs(MultiCase(9, 20, 32, ranks=(4, 4, 4), rows="mixed"))
    args["index"] = torch.tensor([0, 1, 2] * 3)
    args["dy"][1, 3] = float("inf")
    args["x"].data[5, 7] = float("inf")
    got = run(lora_kernels.multi_lora_linear, args)
    finite = got["dA"].view(3, 4, 32).isfinite().all(2).all(1)
    assert finite.tolist() == [True, False, False]
    assert got["dB"].view(3, 20, 4).isfinite().all(2).all(1).tolist() == [True, False, False]
