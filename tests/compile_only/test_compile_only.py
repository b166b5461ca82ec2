"""`python -m tests.compile_only` passes: in a process of its own, since it replaces the driver."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels.backends import triton

pytestmark = pytest.mark.skipif(
    triton.unavailable_reason() is not None, reason="Triton is not installed"
)
ROOT = Path(__file__).parents[2]
MIN_TRITON = ".".join(map(str, triton.MIN_TRITON))
OLDEST = Path(sys.prefix) / f"triton-{MIN_TRITON}"  # where the Makefile unpacks it


def run(*command: str, **variables: str) -> str:
    """Run a module and return its output; outside of Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_budgets_are_kept() -> None:
    """Compile a config of each kernel for a GPU of NVIDIA and for one of AMD."""
    run("tests.compile_only", "--target", "sm90", "gfx942")


@pytest.mark.proof
@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100", "gfx942", "sm120"])
def test_budgets_of_every_config_are_kept(target: str) -> None:
    run("tests.compile_only", "--target", target, "--all")


@pytest.mark.skipif(not OLDEST.is_dir(), reason="the oldest Triton is not unpacked")
@pytest.mark.parametrize("target", [pytest.param("sm80", marks=pytest.mark.slow), "sm90"])
def test_kernels_compile_with_the_oldest_triton(target: str) -> None:
    """Each kernel, without spills and with its matrix instruction."""
    path = os.pathsep.join(filter(None, (str(OLDEST), os.environ.get("PYTHONPATH"))))
    printed = run("tests.compile_only", "--target", target, PYTHONPATH=path)
    assert f"compiled with Triton {MIN_TRITON}." in printed
    sources = (ROOT / "lora_kernels/backends/triton").glob("*.py")
    defined = {
        name
        for file in sources
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert defined == set(re.findall(r"(\w+_kernel) ", printed))


@pytest.mark.slow
@pytest.mark.skipif(not OLDEST.is_dir(), reason="the oldest Triton is not unpacked")
def test_qualification_is_planned_with_the_oldest_triton() -> None:
    path = os.pathsep.join(filter(None, (str(OLDEST), os.environ.get("PYTHONPATH"))))
    printed = run("lora_kernels.cli", "qualify", "--dry-run", PYTHONPATH=path)
    assert "H100" in printed


def test_oldest_triton_is_the_one_that_is_unpacked_and_required() -> None:
    assert f"OLDEST_TRITON := {MIN_TRITON}\n" in (ROOT / "Makefile").read_text()
    assert f'"triton>={MIN_TRITON};' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm86", "sm89", "sm103", "sm110", "sm121"])
def test_budgets_of_a_relative_are_kept(target: str) -> None:
    run("tests.compile_only", "--target", target)


def test_layer_rows_vary_compiles_once_for_each_tile() -> None:
    """38 when M and the numbers of splits were compiled for."""
    lines = run("tests.compile_only.specializations").splitlines()
    found = {name: int(rest.split()[0]) for name, _, rest in (x.partition(": ") for x in lines[1:])}
    # Forward and backward of fused_kernel in four tiles of rows; reduce_kernel for dA and dB, of
    # one part or more; outer_kernel.
    most = 2 * 4 + 2 * 2 + 1
    assert len(found) == 2 and max(found.values()) <= most, "\n".join(lines)


def test_budgets_of_cuda_kernels_are_kept() -> None:
    """The kernels are the build's: without a GPU `make proof` builds them, if nvcc is found."""
    from tests.compile_only import cuda

    if cuda.library() is None:
        pytest.skip("no CUDA kernels were built")
    run("tests.compile_only.cuda")


def test_budgets_written_read_again_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.compile_only import budgets

    kept, text = budgets.read(), budgets.FILE.read_text()
    monkeypatch.setattr(budgets, "FILE", tmp_path / "budgets.json")
    budgets.write(kept)
    assert budgets.FILE.read_text() == text and budgets.read() == kept
