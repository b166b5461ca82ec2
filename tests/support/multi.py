"""Cases of `multi_lora_linear`."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_kernels.oracle import case as cases
from lora_kernels.oracle.multi_case import MultiCase

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
