"""Cases of `multi_lora_linear` for Triton's kernels and CUDA's."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lora_kernels
from lora_kernels.bench import case as cases
from lora_kernels.bench.case import inputs
from lora_kernels.bench.multi import MultiCase

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
FORMATS = ((f32, ""), (bf16, ""), (bf16, "nf4-64-nested"))  # dtype, weight


def run(call: Callable[..., Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """Return y and the requested gradients as vectors, those of all adapters one after another."""
    results = cases.run(call, args)
    return {name: t if name == "y" else t.flatten() for name, t in results.items()}


def of_formats(N: int, sizes: list[tuple[int, int]]) -> list[MultiCase]:
    """Every M and K, rows that lie together or not, with dropout and without."""
    return [
        MultiCase(M, N, K, rows=rows, dtype=dtype, quant=quant, dropout_p=p)
        for (M, K), rows, (dtype, quant), p in itertools.product(
            sizes, ("grouped", "mixed"), FORMATS, (0.0, 0.1)
        )
    ]


def some_cases(many: tuple[int, int]) -> list[MultiCase]:
    """many: rows, and K beside them, that take more than a tile."""
    even = (3, 5, 8, 4)  # one of rank 1 alone would decide, by few roundings, what gradients lose
    return [
        *of_formats(72, [(7, 96), many]),
        MultiCase(1, 65, 96, ranks=(16, 7)),
        MultiCase(0, 65, 96),
        MultiCase(40, 33, 63, rows="mixed", dtype=f16),
        MultiCase(40, 33, 63, rows="mixed", dtype=bf16, adapter_dtype=f32),
        MultiCase(40, 33, 63, rows="mixed", dtype=f32, base=False, bias=False),
        MultiCase(5, 33, 63, ranks=(100, 3, 17), dtype=f32),
        *(MultiCase(40, 33, 63, even, "mixed", frozen=(name,)) for name in ("x", "lora_A")),
        MultiCase(40, 33, 63, even, "mixed", frozen=("lora_B", "bias"), dropout_p=0.1),
    ]


def check_overflow() -> None:
    """A non-finite value in a row reaches the gradients of its own adapter alone."""
    args = inputs(MultiCase(9, 20, 32, ranks=(4, 4, 4), rows="mixed"))
    args["index"] = torch.tensor([0, 1, 2] * 3)
    args["dy"][1, 3] = float("inf")
    args["x"].data[5, 7] = float("inf")
    got = run(lora_kernels.multi_lora_linear, args)
    finite = got["dA"].view(3, 4, 32).isfinite().all(2).all(1)
    assert finite.tolist() == [True, False, False]
    assert got["dB"].view(3, 20, 4).isfinite().all(2).all(1).tolist() == [True, False, False]


def check_isolation() -> None:
    """A down-projection that overflows reaches y of its own adapter's rows alone."""
    args = inputs(MultiCase(9, 20, 32, ranks=(4, 4, 4), rows="mixed"))
    args["index"] = torch.tensor([0, 1, -1] * 3)
    want = run(lora_kernels.multi_lora_linear, args)["y"]
    with torch.no_grad():
        args["lora_A"][1][2, 5] = float("inf")
    got, others = run(lora_kernels.multi_lora_linear, args)["y"], args["index"] != 1
    assert torch.equal(got[others], want[others]) and not got[~others].isfinite().any(1).all()
