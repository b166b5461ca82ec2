"""`python -m tests.compile_only` passes: in a process of its own, since it replaces the driver."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels.backends import triton

pytestmark = pytest.mark.skipif(triton.absence() is not None, reason="Triton is not installed")


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100", "sm120", "gfx942"])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.proof)])
def test_budgets(target: str, every: bool) -> None:
    command = [sys.executable, "-m", "tests.compile_only", "--target", target]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command + ["--all"] * every,
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_cuda_kernels() -> None:
    """Of the build; where nvcc was not found there are none, and another test says so."""
    from tests.compile_only import cuda

    if cuda.library() is None:
        pytest.skip("nvcc is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_only.cuda"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_document_says_what_the_budgets_say() -> None:
    from tests.compile_only import document

    budgets = json.loads((Path(__file__).parent / "budgets.json").read_text())
    text = document.DOCUMENT.read_text()
    assert document.render(text, budgets) == text, "run python -m tests.compile_only --all --write"
