"""The lint of idioms: what it finds, what it allows, and that this tree passes."""

from __future__ import annotations

import pytest

from tests.lint.__main__ import find_idioms, main

IDIOMS = [
    {"find": r"\bof which\b", "say": "two sentences"},
    {"find": r"\bobstacle\b", "say": "unsupported_reason", "identifiers": True},
    {"find": r"\bthe stream\b", "say": "memory bandwidth", "allow": ["CUDA stream"]},
]


def found(path: str, text: str) -> list[str]:
    return list(find_idioms(path, text, IDIOMS))


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [
        ("a.py", "x = 1\n# two tiles, of which one is empty\n", 2),
        ("a.py", 'def f():\n    """Return two,\n    of which one is empty."""\n', 3),
        ("a.py", "# two tiles, of\n# which one is empty\n", 2),
        ("a.cu", "int x;  // of which none\n", 1),
        ("a.h", "/* two\n   of which none */\n", 2),
        ("a.md", "Two tables, of\nwhich one is empty.\n", 2),
    ],
)
def test_find_idioms_in_prose_names_line_and_term(path: str, text: str, line: int) -> None:
    assert found(path, text) == [f'{path}:{line}: "of which": say "two sentences"']


def test_find_idioms_in_code_finds_only_identifiers() -> None:
    assert found("a.py", "of = which = obstacle\n") == [
        'a.py:1: "obstacle": say "unsupported_reason"'
    ]
    assert not found("a.py", "x = of  # a\ny = 2  # which\n")


def test_find_idioms_in_an_allowed_line_finds_nothing() -> None:
    assert found("a.md", "It is the stream.") and not found(
        "a.md", "It is the stream (CUDA stream)."
    )


@pytest.mark.slow  # `make lint`, with which `make test` begins, does the same
def test_main_finds_no_idiom_in_this_tree(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0, capsys.readouterr().out
