"""The table of kernels, partitions and options has no empty cell, and says where it has one."""

import subprocess
import sys

import pytest

from tests.partitions.__main__ import ROOT, find_tests
from tests.partitions.__main__ import table as as_table
from tests.partitions.kernels import KERNELS, OPTIONS, cells


def test_table_of_nothing_is_empty_everywhere() -> None:
    text, empty = as_table({}, {"avx2"})
    assert empty == len(cells()) == text.count("EMPTY") > 300


def test_table_of_all_but_one_counts_that_one() -> None:
    isas = {"scalar", "avx512"}
    found = {
        cell: dict.fromkeys(isas if cell[0] == "cpu" else {""}, "tests/a.py::test_a")
        for cell in cells()
    }
    assert as_table(found, isas)[1] == 0
    cell = ("cpu", "shrink", "rows", "dropout")
    del found[cell]["scalar"]  # one instruction set is not enough
    assert as_table(found, isas)[1] == 1 and not find_tests(found, cell, isas)


def test_absent_cells_name_what_there_is() -> None:
    for kernels in KERNELS.values():
        for kernel in kernels.values():
            for absent, reason in kernel.absent.items():
                partition, option = ("", absent) if isinstance(absent, str) else absent
                assert option in OPTIONS and reason
                assert not partition or partition in kernel.partitions


@pytest.mark.proof
def test_every_cell_is_filled() -> None:
    subprocess.run([sys.executable, "-m", "tests.partitions"], check=True, cwd=ROOT)
