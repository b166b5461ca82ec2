"""The host's time of one layer on the eager backend's GPU path, beside PEFT's own:

    pytest benchmarks/test_eager_host.py --benchmark-columns=min,median,iqr --benchmark-sort=name

CPU tensors take the GPU path, so small that a GEMM takes about as long as its launch would. The
time of a GPU's driver is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.peft import fuse

WIDTH = 16
DTYPES = {"float32": (torch.float32,) * 2, "bfloat16": (torch.bfloat16,) * 2}
DTYPES["bfloat16, float32 adapter"] = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def gpu_path() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with as_on_gpu(), lora_kernels.backend("eager"):
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("whose", ["ours", "PEFT's"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("what", ["without gradients", "forward", "step"])
def test_layer(benchmark: Any, what: str, rows: int, dtypes: str, whose: str) -> None:
    dtype, adapter_dtype = DTYPES[dtypes]
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH)).to(dtype)
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        p.data = p.data.to(adapter_dtype if "lora_" in name else dtype)
    layer = (fuse(model) if whose == "ours" else model).base_model.model[0]
    x = torch.randn(rows, WIDTH, dtype=dtype, requires_grad=what != "without gradients")
    dy = torch.randn(rows, WIDTH, dtype=dtype)

    def step() -> None:
        layer(x).backward(dy)

    call: Any = step if what == "step" else lambda: layer(x)
    with torch.set_grad_enabled(x.requires_grad):
        for _ in range(3):
            call()
        benchmark(call)
