"""Hold the CUDA kernels that the build compiled to their budgets, for GPUs that are not here.

    python -m tests.compile_only.cuda [--write]

A kernel that spills, a product without its matrix instruction, or a kernel that reads no 128 bits
at a time fails, and one that takes more registers than budgets.json says (for the nvcc that they
were written with). So does one that reads what its launch writes by ld.global.nc, see `coherence`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.compile_only import budgets, coherence, machine_code
from tests.compile_only.machine_code import TOOLS, Code

LIBRARIES = Path(__file__).parents[2] / "lora_kernels"
MATRIX = ("gemm", "decode")
WIDE = ("gemm", "decode", "thin", "pair")
TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120")  # those of setup.py's default


@dataclass(frozen=True)
class Found:
    target: str
    kernel: str  # "gemm"
    key: str  # "gemm bfloat16 codes dx"
    code: Code
    incoherent: list[str]  # what is wrong with its loads


def library() -> Path | None:
    """The CUDA extension, where the build made one."""
    return next(iter(sorted(LIBRARIES.glob("_cuda*.so"))), None)


def nvcc_version() -> str:
    """Return the version of the build's compiler; "" if there is none."""
    from lora_kernels.core.device import nvcc

    if nvcc() is None:
        return ""
    text = machine_code.output(str(nvcc()), "--version")
    found = re.search(r"release ([\d.]+)", text)
    return found[1] if found else ""


def kernels(library: Path) -> Iterator[Found]:
    """Each kernel for each target."""
    with tempfile.TemporaryDirectory() as folder:
        extract = [TOOLS / "cuobjdump", "-xelf", "all", str(library)]
        subprocess.run(extract, cwd=folder, capture_output=True, check=True)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = re.search(r"sm_(\w+)\.cubin", cubin.name)
            target = f"sm{arch[1]}" if arch else ""
            if target not in TARGETS:
                continue
            usage = machine_code.output("cuobjdump", "--dump-resource-usage", str(cubin))
            sass = machine_code.output("nvdisasm", "-c", str(cubin))
            bodies = dict(
                re.findall(
                    r"\.section\s+\.text\.(\S+?),.*?\n(.*?)(?=\n\s*\.section\s|\Z)", sass, re.S
                )
            )
            for name, fields in re.findall(r"Function (\S+):\s*\n\s*(.*)", usage):
                kernel, key = _named(name)
                if kernel:
                    matrix = "mma.sync" if "HMMA" in bodies[name] else ""
                    code = machine_code.parse(fields, bodies[name], matrix)
                    incoherent = coherence.faults_of_sass(kernel, bodies[name])
                    yield Found(target, kernel, key, code, incoherent)


def incoherent_ptx(library: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each kernel, and what is wrong with its loads by the PTX that the library contains."""
    with tempfile.TemporaryDirectory() as folder:
        extract = [TOOLS / "cuobjdump", "-xptx", "all", str(library)]
        subprocess.run(extract, cwd=folder, capture_output=True, check=True)
        texts = [path.read_text() for path in sorted(Path(folder).glob("*.ptx"))]
    for name, body in {entry for text in texts for entry in coherence.entries(text)}:
        kernel, key = _named(name)
        if kernel:
            yield key, coherence.faults_of_ptx(kernel, body)


def _named(mangled: str) -> tuple[str, str]:
    """gemm_kernel<true, false, true> as ("gemm", "gemm bfloat16 dense dx")."""
    found = re.search(
        r"\d((?!lora)[a-z]+)(?:_(codes|dense))?_kernel(?:I((?:L[bi]\d+E)+)E)?", mangled
    )
    if found is None:
        return "", ""
    kernel, numbers = found[1], [int(n) for n in re.findall(r"L[bi](\d+)E", found[3] or "")]
    words: list[str] = [kernel]
    if kernel in MATRIX:
        words.append("bfloat16" if numbers[0] else "float16")
    if kernel == "gemm":
        words += ["codes" if numbers[1] else "dense", "dx" if numbers[2] else "y"]
    elif kernel == "decode":
        where = "x in shared memory" if numbers[1] else "x from caches"
        words += [found[2], f"M{8 * numbers[2]}", where]
    elif kernel == "thin":
        words.append(f"R{8 * numbers[0]}")
    elif kernel == "pair":
        words.append(f"R{16 * numbers[0]}")
    return kernel, " ".join(words)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compile_only.cuda", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--write", action="store_true", help="write the budgets of what is seen")
    args = parser.parse_args()
    path = library()
    if path is None:
        print("no CUDA kernels were built: LORA_KERNELS_CUDA=1 python setup.py build_ext --inplace")
        return 2
    kept, version = budgets.read(), nvcc_version()
    same = kept["nvcc"] == version
    if not same and not args.write:
        print(f"no budgets compared: they are of nvcc {kept['nvcc']}, this is {version}")
    print("registers, matrix instruction; then kernel")
    failures = seen = 0
    if args.write:
        kept["cuda"], kept["nvcc"] = {}, version
    for found in sorted(kernels(path), key=lambda f: (f.target, f.key)):
        seen += 1
        code = found.code
        wrong = code.faults(found.kernel in MATRIX, found.kernel in WIDE) + found.incoherent
        limits = kept["cuda"].setdefault(found.key, {})
        if args.write:
            limits[found.target] = [code.registers]
        elif same:
            wrong += budgets.excess(code, limits.get(found.target))
        line = (
            f"{'✗' if wrong else '✓'} {found.target:6} {code.registers:3} {code.matrix:9} "
            f"{found.key}"
        )
        print("  ".join([line, *wrong]), flush=True)
        failures += bool(wrong)
    followed = sorted(incoherent_ptx(path))
    for key, wrong in followed:
        if wrong:
            print("  ".join([f"✗ PTX  {key}", *wrong]), flush=True)
    failures += sum(bool(wrong) for _, wrong in followed) + (not followed)
    print(f"the pointers of {len(followed)} kernels followed in their PTX")
    if args.write:
        budgets.write(kept)
    print(f"{seen} kernels compiled with nvcc {version}, {failures} failures")
    return 1 if failures or not seen else 0


if __name__ == "__main__":
    sys.exit(main())
