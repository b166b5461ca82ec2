"""`profiled`: the names of variants, and the FLOPs and bytes of launches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.backends.triton import LIBRARY, TWO_PASS, launch, linear, shrink
from lora_kernels.backends.triton.arguments import Types
from lora_kernels.backends.triton.profiling import profiled
from tests.triton.device import DEVICE

BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}
TYPES = Types("bfloat16", "float32", "ieee", False)


@pytest.mark.parametrize(
    ("missing", "base"), [("codes", "dense"), ("w", "4bit"), ("w codes", "update")]
)
def test_name_variant_says_base_dtype_and_blocks(missing: str, base: str) -> None:
    constants = {**dict.fromkeys(missing.split()), "TYPES": TYPES, **BLOCKS}
    variant = SimpleNamespace(signature={"w": "", "codes": "", "N": "i32"}, constants=constants)
    assert profiled("gemm", "MNK")["repr"](variant) == f"gemm_{base}_bfloat16_64x128x32"


def test_name_variant_without_base_says_the_dtype_of_the_adapter() -> None:
    variant = SimpleNamespace(signature={"x": "", "K": "i32"}, constants={"TYPES": TYPES})
    assert profiled("shrink", "MKR")["repr"](variant) == "shrink_float32"


@pytest.mark.parametrize(("strategy", "has_base"), [(TWO_PASS, True), (LIBRARY, False)])
def test_launch_metadata_counts_flops_and_bytes(
    monkeypatch: pytest.MonkeyPatch, strategy: str, has_base: bool
) -> None:
    counted, run = {}, launch.run

    def record(kernel: Any, config: Any, *args: Any, **meta: Any) -> None:
        count = kernel.kwargs["launch_metadata"] if DEVICE == "cpu" else kernel.launch_metadata
        named = dict(zip(kernel.arg_names, args, strict=False)) | meta
        counted[kernel.__name__] = count(meta["grid"], None, named)
        run(kernel, config, *args, **meta)

    monkeypatch.setattr(launch, "run", record)
    M, N, K, R = 33, 48, 64, 5
    x, W, A, B = (torch.randn(s, device=DEVICE) for s in ((M, K), (N, K), (R, K), (N, R)))
    with lora_kernels.backend("triton", strategy):
        lora_kernels.lora_linear(x, W, A, B)
    partials = 4 * M * R
    assert counted.pop(shrink.shrink_kernel.__name__) == {
        "flops32": 2 * M * K * R,
        "bytes": 4 * (M * K + R * K) + partials,
    }
    # P is its only partial sum, and given twice.
    assert counted.pop(linear.two_pass_kernel.__name__) == {
        "flops32": 2 * M * N * (K * has_base + R),
        "bytes": 4 * (M * K + N * K * has_base + N * R + M * N) + 2 * partials,
    }
    assert not counted
