"""The README's first screen: its two commands exist, and CI runs the one that tests."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_LINES = 110
SCREEN = 30  # lines that a terminal or a browser shows without scrolling


def first_commands() -> dict[str, str]:
    """Command -> its comment, of the README's first block that is indented."""
    block = re.search(r"(?:^    \S.*\n)+", README, re.MULTILINE)
    assert block is not None
    assert README.count("\n", 0, block.end()) <= SCREEN
    lines = (line.partition("#") for line in block[0].splitlines())
    return {command.strip(): comment.strip() for command, _, comment in lines}


def test_readme_s_first_block_is_a_demo_and_the_tests() -> None:
    assert list(first_commands()) == ["make demo", "make test"]


def test_readme_s_first_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in first_commands():
        program, target = shlex.split(command)
        assert program == "make"
        assert re.search(rf"^{target}:(?! [\w ]+=)", makefile, re.MULTILINE), target


def test_ci_runs_the_readme_s_test_command() -> None:
    last = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert last.removeprefix("exec ") == list(first_commands())[-1]


def test_readme_s_time_of_the_tests_is_contributing_s() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    row = re.search(r"^\| `make test` \|.*\| (.+) \|$", table, re.MULTILINE)
    assert row is not None and row[1] in first_commands()["make test"]


def test_readme_s_python_is_the_package_s() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    least = re.search(r'^requires-python = ">=(.+)"$', project, re.MULTILINE)
    assert least is not None
    versions = re.findall(r"Python ≥ ([\d.]+)", README[: README.index("## Install")])
    assert versions == [least[1]]


def test_readme_is_short() -> None:
    assert README.count("\n") <= MAX_LINES
