"""compute-sanitizer over one call of each kernel: no access out of bounds, no race."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = """
import torch, lora_kernels
from lora_kernels.oracle.case import Case, inputs, run
full = dict(gate=True, column_scale=True, bias=True, device="cuda")
for quant in ("", "nf4-64-nested"):
    for M in (5, 70, 300):
        args = inputs(Case(M, 129, 192, 13, torch.bfloat16, quant=quant, **full))
        with lora_kernels.backend("triton"):
            run(lora_kernels.lora_linear, args)
with lora_kernels.backend("triton"):
    args["weight"].dequantize(torch.bfloat16)
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", pytest.param("racecheck", marks=pytest.mark.proof)])
def test_kernels_under_compute_sanitizer_are_clean(tool: str) -> None:
    done = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7", sys.executable, "-c", CALLS],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
