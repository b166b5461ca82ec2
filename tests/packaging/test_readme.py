"""The README's commands for contributors exist, and CI runs the one that tests."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> dict[str, str]:
    """Command -> its comment, of the block below "Develop"."""
    block = re.search(r"^## Develop\n\n((?:    \S.*\n)+)", README, re.MULTILINE)
    assert block is not None
    lines = (line.partition("#") for line in block[1].splitlines())
    return {command.strip(): comment.strip() for command, _, comment in lines}


def test_readme_s_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(commands()) == {"make demo", "make test"}
    for command in commands():
        program, target = shlex.split(command)
        assert program == "make"
        assert re.search(rf"^{target}:(?! [\w ]+=)", makefile, re.MULTILINE), target


def test_ci_runs_the_readme_s_test_command() -> None:
    last = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert last.removeprefix("exec ") == "make test"


def test_readme_s_time_of_the_tests_is_contributing_s() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    row = re.search(r"^\| `make test` \|.*\| (.+) \|$", table, re.MULTILINE)
    assert row is not None and row[1] in commands()["make test"]


def test_readme_s_python_is_the_package_s() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    least = re.search(r'^requires-python = ">=(.+)"$', project, re.MULTILINE)
    assert least is not None and f"Python ≥ {least[1]}" in README
