"""Plant one fault at a time and see that the tests notice: `python -m tests.faults [NAME ...]`.

Each NAME.patch beside this file is one small realistic mistake. Its head names what must notice it:

    Fault: the gate is left out of the forward
    Tests: tests/ops/test_lora_linear.py -k "float32 and gate"

Variables for the tests' environment may stand before them: TRITON_INTERPRET=1 tests/triton/....
A line "Needs: amxbf16" names an instruction set without which no test can notice; where the
processor lacks it, the fault is left out, and that is said. A line "Covers: cuda dx, cuda gate"
names the cells of the table in benchmarks/FAULTS.md where the fault stands (see BACKENDS, PARTS).

The tree is copied (the working tree is never touched), and the tests are run in the copy: first
without any fault, where all must pass, then with each, where one must fail. A fault that no test
notices, a patch that does not apply, and tests that cannot be collected are failures.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lora_kernels.measure.case import engines

ROOT = Path(__file__).resolve().parents[2]
# Of what at least one fault must be planted, in each of them.
BACKENDS = ("eager", "cpu", "triton", "cuda")
PARTS = (
    "y", "dx", "dA", "dB", "dg", "dc", "dbias", "scaling", "gate", "column scale", "bias",
    "dropout", "4-bit codes", "nested scales", "block size", "row norm", "several adapters",
)  # fmt: skip
TIMEOUT = 600  # seconds for one run of tests or one build


@dataclass(frozen=True)
class Fault:
    name: str
    text: str
    tests: str
    files: tuple[str, ...]
    patch: Path
    needs: str | None = None
    covers: tuple[str, ...] = ()

    @property
    def native(self) -> bool:
        return any(file.startswith("csrc/") for file in self.files)


@dataclass(frozen=True)
class Outcome:
    noticed: bool
    said: str  # the first test that failed, or why the fault does not count as noticed
    seconds: float


def read(patch: Path) -> Fault:
    head, _, body = patch.read_text().partition("--- a/")
    fields = dict(line.split(": ", 1) for line in head.strip().splitlines())
    files = re.findall(r"^\+\+\+ b/(\S+)", body, re.MULTILINE)
    if set(fields) - {"Needs", "Covers"} != {"Fault", "Tests"} or not files:
        raise SystemExit(f"{patch.name}: want the lines 'Fault: ...' and 'Tests: ...', then a diff")
    covers = tuple(fields["Covers"].split(", ")) if "Covers" in fields else ()
    if unknown := set(covers) - {f"{b} {part}" for b in BACKENDS for part in PARTS}:
        raise SystemExit(f"{patch.name}: Covers: got {', '.join(sorted(unknown))}")
    return Fault(
        patch.stem, fields["Fault"], fields["Tests"], tuple(files), patch, fields.get("Needs"),
        covers,
    )  # fmt: skip


class Copy:
    """A copy of the tree with a build of its own, which faults come to and leave again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in filter(None, self._output(listed, ROOT).split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(folder),  # goes before an editable install of the working tree
            "LORA_KERNELS_NATIVE": "1",
            "LORA_KERNELS_EMULATOR": "1",  # which runs the CUDA kernels, so that nvcc need not
            "LORA_KERNELS_CUDA": "0",
            "LORA_KERNELS_OPTIMIZE": "1",  # compiling is most of what a fault takes
            "OMP_WAIT_POLICY": "passive",  # the copies' threads share the processor
            "GIT_CEILING_DIRECTORIES": str(folder.parent),  # a patch is for this folder
        }
        # Built here and not copied, so that later builds are incremental.
        self.build()
        package = folder / "lora_kernels"
        self.extensions = [*package.glob("_native*.so"), *package.glob("_emulator*.so")]
        for extension in self.extensions:
            shutil.copy2(extension, self._kept(extension))
        show = "from lora_kernels import _native; print(_native.__file__)"
        imported = Path(self._output([sys.executable, "-c", show], folder).strip())
        if not imported.is_relative_to(folder):
            raise SystemExit(f"the tests would import {imported}, want it from {folder}")

    def build(self) -> None:
        self._output([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], self.folder)

    def test(self, selection: str) -> tuple[int, str]:
        """pytest's exit status, and the test that failed or the last line that it printed."""
        words = shlex.split(selection)
        variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header"]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *words[len(variables) :]],
                cwd=self.folder,
                env={**self.environment, **variables},
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return 2, f"no end within {TIMEOUT} s"
        if done.returncode < 0:
            return done.returncode, signal.strsignal(-done.returncode) or "a signal"
        failed = re.search(r"^FAILED (.+?)(?: - |$)", done.stdout, re.MULTILINE)
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        return done.returncode, failed[1] if failed else "".join(last)

    def try_out(self, fault: Fault) -> Outcome:
        start = time.monotonic()
        noticed, said = False, ""
        try:
            self._output(["git", "apply", str(fault.patch)], self.folder)
        except subprocess.CalledProcessError as error:
            return Outcome(False, f"does not apply: {error.stderr.strip()}", 0.0)
        try:
            if fault.native:
                self.build()
            status, said = self.test(fault.tests)
            # 1: a test failed. Negative: a signal, as where memory was overrun. 2 to 5: none ran
            # to its end.
            noticed = status == 1 or status < 0
            said = said if status else f"nobody noticed: {said}"
        except subprocess.CalledProcessError as error:
            said = f"does not build: {(error.stdout + error.stderr).strip()[-500:]}"
        except subprocess.TimeoutExpired:
            said = f"no end within {TIMEOUT} s"
        self._output(["git", "apply", "-R", str(fault.patch)], self.folder)
        for extension in self.extensions if fault.native else []:
            shutil.copy2(self._kept(extension), extension)
        return Outcome(noticed, said, time.monotonic() - start)

    def _kept(self, extension: Path) -> Path:
        return self.folder / f"{extension.name}.sound"

    def _output(self, command: list[str], folder: Path) -> str:
        environment = getattr(self, "environment", None)
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        done.check_returncode()
        return done.stdout


def united(selections: Iterable[str]) -> list[str]:
    """Selections of pytest that hold all the tests of these, one for each set of files: to start
    takes longer than most tests.

    >>> united(["a.py -k x", "b.py", 'a.py -k "y and not z"', "b.py -k x", "a.py -k x"])
    ["a.py -k '(x) or (y and not z)'", 'b.py']
    """
    found: dict[tuple[str, ...], dict[str, None]] = {}
    for selection in selections:
        words, expression = shlex.split(selection), ""
        if "-k" in words:
            at = words.index("-k")
            expression = words[at + 1]
            del words[at : at + 2]
        found.setdefault(tuple(words), {})[expression] = None
    return [
        shlex.join(words if "" in each else [*words, "-k", " or ".join(f"({k})" for k in each)])
        for words, each in found.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="copies at work (default: 2)")
    args = parser.parse_args()
    faults = [read(patch) for patch in sorted(Path(__file__).parent.glob("*.patch"))]
    unknown = set(args.names) - {fault.name for fault in faults}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    faults = [fault for fault in faults if not args.names or fault.name in args.names]
    here = engines()
    for fault in [fault for fault in faults if fault.needs and fault.needs not in here]:
        print(f"- {fault.name:34}         left out: this processor lacks {fault.needs}")
        faults.remove(fault)

    # The same tests without a fault come first; of the faults, those that need a build.
    sound = united(fault.tests for fault in faults)
    work = [*sound, *sorted(faults, key=lambda fault: not fault.native)]
    lock, failures = threading.Lock(), 0

    def worker(folder: Path) -> None:
        nonlocal failures
        copy = Copy(folder)
        while True:
            with lock:
                if not work:
                    return
                item = work.pop(0)
            if isinstance(item, str):
                status, said = copy.test(item)
                lines = [f"✗ without a fault, {item}: {said}"] if status else []
            else:
                outcome = copy.try_out(item)
                status, by = not outcome.noticed, "noticed by " if outcome.noticed else ""
                mark = "✓" if outcome.noticed else "✗"
                lines = [
                    f"{mark} {item.name:34} {outcome.seconds:4.0f} s  {item.text}",
                    f"    {by}{outcome.said}",
                ]
            with lock:
                failures += bool(status)
                print(*lines, sep="\n", end="\n" if lines else "", flush=True)

    with tempfile.TemporaryDirectory(prefix="faults-") as name, ThreadPoolExecutor() as pool:
        folders = [Path(name) / str(job) for job in range(min(args.jobs, len(faults)))]
        for done in [pool.submit(worker, folder) for folder in folders]:
            done.result()  # raises what the worker raised
    print(f"{len(faults)} faults, {len(sound)} selections of tests, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
