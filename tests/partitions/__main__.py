"""List a test for each kernel in two parts or more with each option: `python -m tests.partitions`.

It runs the files test_partitions.py and prints a table. A number is a test's; "·" is a cell that
cannot be. The exit status is 1 if a cell is empty or a test failed. With files of records, which
LORA_KERNELS_PARTITIONS=FILE pytest -p tests.partitions.record writes, it prints theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lora_kernels.bench.case import engines

from .kernels import KERNELS, OPTIONS, cells

ROOT = Path(__file__).resolve().parents[2]
# The Triton kernels run in a process of their own.
RUNS = (
    ["tests/ops/test_partitions.py", "tests/cuda_emulated/test_partitions.py"],
    ["tests/triton/test_partitions.py"],
)

Found = dict[tuple[str, ...], dict[str, str]]


def run(folder: Path) -> tuple[list[Path], bool]:
    """Records of all tests, and whether all passed."""
    records, running = [], []
    for number, files in enumerate(RUNS):
        records.append(folder / f"{number}.json")
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "tests.partitions.record"]
        command = [*pytest, "-m", "not slow and not proof", *files]
        env = os.environ | {"LORA_KERNELS_PARTITIONS": str(records[-1])}
        env |= {"TRITON_INTERPRET": "1"} if "triton" in files[0] else {}
        running.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=sys.stderr))
    return records, not any([process.wait() for process in running])


def read(records: list[Path]) -> Found:
    found: Found = {}
    for record in records:
        for key, tests in json.loads(record.read_text())["found"].items():
            found.setdefault(tuple(key.split("/")), {}).update(tests)
    return found


def find_tests(found: Found, cell: tuple[str, ...], isas: set[str]) -> list[str]:
    """The tests that fill a cell, on each instruction set that has the kernel; [] if one lacks."""
    tests = found.get(cell, {})
    backend, kernel, partition, _ = cell
    if backend != "cpu":
        isas = {""}
    if kernel.startswith("product"):
        isas = {isa for isa in isas if isa.startswith("avx512")}
    if (kernel, partition) == ("few_rows", "passes"):  # which has too few rows on "scalar"
        isas = isas - {"scalar"}
    return sorted(set(tests.values())) if isas <= tests.keys() else []


def table(found: Found, isas: set[str]) -> tuple[str, int]:
    """The table in Markdown, and how many of its cells are empty."""
    numbers: dict[str, int] = {}
    wanted, empty, lines = set(cells()), 0, []
    for backend, kernels in KERNELS.items():
        lines += ["", f"| {backend} | partition | {' | '.join(OPTIONS)} |", "|---" * 7 + "|"]
        for name, kernel in kernels.items():
            for partition in kernel.partitions:
                row = []
                for option in OPTIONS:
                    cell = (backend, name, partition, option)
                    tests = find_tests(found, cell, isas)
                    if cell not in wanted:
                        row.append("·")
                    elif tests:
                        test = min(tests, key=lambda test: numbers.get(test, len(numbers)))
                        row.append(str(numbers.setdefault(test, len(numbers) + 1)))
                    else:
                        row.append("EMPTY")
                        empty += 1
                lines.append(f"| {name} | {partition} | {' | '.join(row)} |")
    lines += ["", *(f"{number}. {test}" for test, number in numbers.items()), ""]
    for backend, kernels in KERNELS.items():
        for name, kernel in kernels.items():
            for absent, reason in kernel.absent.items():
                what = absent if isinstance(absent, str) else " × ".join(absent)
                lines.append(f"- {backend} {name}: no {what}: {reason}")
    return "\n".join(lines), empty


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.partitions", description=__doc__)
    parser.add_argument("records", nargs="*", type=Path)
    records = parser.parse_args().records
    with tempfile.TemporaryDirectory() as folder:
        records, passed = (records, True) if records else run(Path(folder))
        found = read(records)
    isas = {engine for engine in engines() if " " not in engine and "eager" not in engine}
    text, empty = table(found, isas - {"amxbf16"})
    print(text)
    print(f"\n{len(cells())} cells, {empty} of them empty", file=sys.stderr)
    return int(bool(empty) or not passed)


if __name__ == "__main__":
    sys.exit(main())
