"""`python -m tests.packaging`, as far as it needs no environment."""

from __future__ import annotations

import re
import sys

import pytest

from tests.packaging import __main__ as matrix


def test_every_library_has_one_floor() -> None:
    found = dict(requirement.split("==") for requirement in matrix.floors())
    assert set(found) == {"torch", "safetensors", *matrix.PEERS}
    assert all(re.fullmatch(r"\d+(\.\d+)+", version) for version in found.values())


def test_what_is_left_out_of_the_oldest_is_there() -> None:
    """A test that was renamed would run, and one that is gone needs no place in the list."""
    sources = "".join(f.read_text() for f in (matrix.ROOT / "tests/interop").glob("*.py"))
    files = {f.stem for f in (matrix.ROOT / "tests/interop").glob("*.py")}
    for selection in matrix.LATER.values():
        for word in re.findall(r"\w+", selection):
            assert word in ("and", "or") or word in files or word in sources, word


def test_a_command_that_fails_says_what_it_printed() -> None:
    with pytest.raises(matrix.Failed, match=r"exit status 3\nsaid"):
        matrix.run([sys.executable, "-c", "print('said'); raise SystemExit(3)"], matrix.ROOT)
