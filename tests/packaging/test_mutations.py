"""The table of mutations. `make mutations` tries them, which takes too long for `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations import sample
from tests.mutations.table import ROOT, function_span, read


def test_table_every_mutation_applies_and_names_a_file_of_tests() -> None:
    mutations = read()
    assert len(mutations) > 60
    for mutation in mutations:
        file = ROOT / mutation.file
        sound = file.read_text()
        mutant = mutation.apply(sound)
        assert mutant != sound, mutation.id
        tests = next(word for word in mutation.tests.split() if "=" not in word)
        assert (ROOT / tests).is_file(), mutation.id


def test_sample_names_files_that_exist() -> None:
    for file, tests in sample.TESTS.items():
        names = [f"lora_kernels/{file}", *(test.partition("::")[0] for test in tests.split())]
        assert not [name for name in names if not (ROOT / name).exists()], file


def entry(**changes: str) -> str:
    fields = {"description": "d", "file": "csrc/f.h", "find": "a", "replace": "b", "tests": "f.py"}
    return "[one]\n" + "".join(f'{name} = "{v}"\n' for name, v in (fields | changes).items())


def test_read_of_a_repeated_id_raises(tmp_path: Path) -> None:
    path = tmp_path / "table.toml"
    path.write_text(entry() + entry())
    with pytest.raises(ValueError, match=r"declare \('one',\) twice"):
        read(path)


def test_read_of_a_file_outside_csrc_raises(tmp_path: Path) -> None:
    path = tmp_path / "table.toml"
    path.write_text(entry(file="lora_kernels/ops/registry.py"))
    with pytest.raises(ValueError, match="one: file: got lora_kernels/ops"):
        read(path)


def test_apply_of_text_that_is_not_there_once_raises(tmp_path: Path) -> None:
    path = tmp_path / "table.toml"
    path.write_text(entry(file="csrc/f.h::f", find="a + a", replace="a"))
    (mutation,) = read(path)
    source = "int f(int a) { return a + a; }\nint g(int a) { return a + a; }\n"
    assert mutation.apply(source) == source.replace("a + a", "a", 1)
    for twice in ("int f(int a) { return a + a + (a + a); }", "int f(int a) { return a; }"):
        with pytest.raises(ValueError, match=r"`find` occurs [02] times in csrc/f.h, f, want"):
            mutation.apply(twice)


def test_function_span_of_a_name_that_is_not_defined_once_raises() -> None:
    with pytest.raises(ValueError, match="f is defined 0 times"):
        function_span("int g() { return f(1); }", "f")
    with pytest.raises(ValueError, match="f is defined 2 times"):
        function_span("int f(int n) { return n; } int f(long n) { return 1; }", "f")
