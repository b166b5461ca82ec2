"""`python -m tests.processors`: layers and models on other processors, as far as this one can.

Each leg caps the instruction set of the native kernels. One caps PyTorch's, MKL's and oneDNN's too,
and runs on one thread. The tests of `tests/ops` call every instruction set by name, so the legs
leave them out. A processor that has an instruction set cannot be one that others lack: AMX runs on
Intel's alone, and MKL and oneDNN choose other kernels on AMD's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from lora_kernels.backends.cpu import native

CAPPED = {
    "LORA_KERNELS_CPU_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OMP_NUM_THREADS": "1",
}
LEGS = {isa: {"LORA_KERNELS_CPU_ISA": isa} for isa in native.ISAS[:-1]} | {"capped": CAPPED}
SLICE = ("-m", "not slow and not proof")
PATHS = ("tests/layers", "tests/interop", "tests/states")


def run(leg: str) -> tuple[str, int, str, float]:
    """Return the leg, pytest's status, its counts and the seconds it took; print what failed."""
    start = time.monotonic()
    pytest = ["pytest", "-q", "--disable-warnings", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", *pytest, *SLICE, *PATHS]
    done = subprocess.run(command, env=os.environ | LEGS[leg], capture_output=True, text=True)
    *lines, last = done.stdout.strip().splitlines() or [done.stderr]
    if done.returncode:
        print(f"--- {leg}", *lines[-200:], sep="\n", flush=True)
    return leg, done.returncode, last, time.monotonic() - start


def main() -> int:
    """Run the legs, two at a time; print a row for each, and return 1 if a test failed."""
    with ThreadPoolExecutor(2) as threads:
        rows = list(threads.map(run, LEGS))
    print("| leg | passed | failed | skipped | minutes |\n|---|---|---|---|---|")
    for leg, _, last, seconds in rows:
        counts = dict(reversed(each) for each in re.findall(r"(\d+) (\w+)", last))
        numbers = (counts.get(name, "0") for name in ("passed", "failed", "skipped"))
        print(f"| {leg} | {' | '.join(numbers)} | {seconds / 60:.1f} |")
    return int(any(status for _, status, _, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
