"""The planted faults that `make faults` tries, which takes too long for `make test`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.__main__ import BACKENDS, PARTS, read

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_every_patch_applies_and_names_a_file_of_tests() -> None:
    patches = sorted((ROOT / "tests/faults").glob("*.patch"))
    assert len(patches) > 60
    for patch in patches:
        file = next(word for word in read(patch).tests.split() if "=" not in word)
        assert (ROOT / file).is_file(), patch.name
        subprocess.run(["git", "apply", "--check", str(patch)], cwd=ROOT, check=True)


def test_each_gradient_and_option_has_a_fault_in_each_backend() -> None:
    covered = {
        cell for patch in (ROOT / "tests/faults").glob("*.patch") for cell in read(patch).covers
    }
    assert covered == {f"{backend} {part}" for backend in BACKENDS for part in PARTS}
