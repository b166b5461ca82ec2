"""The table of mutations. `make mutations` tries them, which takes too long for `make test`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.mutations.table import PAIRS, ROOT, function_span, read


def test_table_every_mutation_applies_and_names_a_file_of_tests() -> None:
    mutations = read()
    assert len(mutations) > 140
    for mutation in mutations:
        file = ROOT / mutation.file
        sound = file.read_text()
        mutant = mutation.apply(sound)
        assert mutant != sound, mutation.id
        if mutation.file.endswith(".py"):
            compile(mutant, mutation.file, "exec")
        tests = next(word for word in mutation.tests.split() if "=" not in word)
        assert (ROOT / tests).is_file(), mutation.id


def test_table_covers_each_part_in_each_backend() -> None:
    covered = {pair for mutation in read() for pair in mutation.covers}
    assert covered == PAIRS


def entry(**changes: str) -> str:
    fields = {"description": "d", "file": "f.py", "find": "a", "replace": "b", "tests": "f.py"}
    return "[one]\n" + "".join(f'{name} = "{v}"\n' for name, v in (fields | changes).items())


def test_read_of_a_repeated_id_raises(tmp_path: Path) -> None:
    path = tmp_path / "table.toml"
    path.write_text(entry() + entry())
    with pytest.raises(ValueError, match=r"declare \('one',\) twice"):
        read(path)


def test_apply_of_text_that_is_not_there_once_raises(tmp_path: Path) -> None:
    path = tmp_path / "table.toml"
    path.write_text(entry(file="f.py::f", find="a + a", replace="a"))
    (mutation,) = read(path)
    source = "def f(a):\n    return a + a\ndef g(a):\n    return a + a\n"
    mutant = mutation.apply(source)
    assert Counter(mutant) == Counter(source) - Counter("a + a") + Counter("a")
    assert mutant.index("return a\n") < mutant.index("def g")
    for twice in ("def f(a):\n    return a + a + (a + a)\n", "def f(a):\n    return a\n"):
        with pytest.raises(ValueError, match=r"one: `find` occurs [02] times in f.py, f, want"):
            mutation.apply(twice)


def test_function_span_of_a_name_that_is_not_defined_once_raises() -> None:
    with pytest.raises(ValueError, match="f is defined 0 times"):
        function_span("int g() { return f(1); }", "f", False)
    with pytest.raises(ValueError, match="f is defined 2 times"):
        function_span("int f(int n) { return n; } int f(long n) { return 1; }", "f", False)
