"""Try mutations: `python -m tests.mutations [ID ...]`.

Each entry of table.toml is one small mistake in one function of csrc/, with the tests that must
notice it; sample.py draws mutants of the Python code.
The tree is copied (the working tree is never touched) and the tests run in the copy: first on the
sound tree, where all must pass, then on each mutant, where one must fail. A surviving mutant, one
that does not build, and tests that cannot be collected are failures. A mutation that needs an
instruction set that the processor lacks is left out, and that is printed.
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

from lora_kernels.oracle.case import engines

from .table import ROOT, Mutation, read

TIMEOUT = 600  # seconds for one run of tests or one build


@dataclass(frozen=True)
class Outcome:
    noticed: bool
    said: str  # the first test that failed, or why the mutant does not count as noticed
    seconds: float


class Copy:
    """A copy of the tree with a build of its own, in which one mutant at a time stands."""

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
            "LORA_KERNELS_OPTIMIZE": "1",  # most of a mutant's time is its compilation
            "OMP_WAIT_POLICY": "passive",  # the copies' threads share the processor
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

    def try_out(self, mutation: Mutation) -> Outcome:
        """Run the mutation's tests on its mutant."""
        start, file = time.monotonic(), self.folder / mutation.file
        sound, noticed, said = file.read_text(), False, ""
        try:
            file.write_text(mutation.apply(sound))
            if mutation.is_native:
                self.build()
            status, said = self.test(mutation.tests)
            # 1: a test failed. Negative: a signal, as after an overrun. 2 to 5: no test ran.
            noticed = status == 1 or status < 0
            said = said if status else f"survived: {said}"
        except ValueError as error:
            said = f"does not apply: {error}"
        except subprocess.CalledProcessError as error:
            said = f"does not build: {(error.stdout + error.stderr).strip()[-500:]}"
        except subprocess.TimeoutExpired:
            said = f"no end within {TIMEOUT} s"
        file.write_text(sound)
        for extension in self.extensions if mutation.is_native else []:
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
    """Merge selections of pytest into one for each set of files.

    Starting pytest takes longer than most tests.

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
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("ids", nargs="*", metavar="ID", help="only these (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="copies at work (default: 2)")
    args = parser.parse_args()
    table = {mutation.id: mutation for mutation in read()}
    if unknown := set(args.ids) - set(table):
        parser.error(f"no such mutation: {', '.join(sorted(unknown))}")
    chosen, here = [table[i] for i in args.ids or table], engines()
    lacking = [m for m in chosen if m.needs and m.needs not in here]
    for mutation in lacking:
        print(f"- {mutation.id:34}         left out: this processor lacks {mutation.needs}")
    mutations = [m for m in chosen if m not in lacking]

    sound = united(m.tests for m in mutations)
    work: list[str | Mutation] = [*sound, *mutations]  # the sound tree comes first
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
                lines = [f"✗ sound tree, {item}: {said}"] if status else []
            else:
                outcome = copy.try_out(item)
                status, by = not outcome.noticed, "noticed by " if outcome.noticed else ""
                mark = "✓" if outcome.noticed else "✗"
                lines = [
                    f"{mark} {item.id:34} {outcome.seconds:4.0f} s  {item.description}",
                    f"    {by}{outcome.said}",
                ]
            with lock:
                failures += bool(status)
                print(*lines, sep="\n", end="\n" if lines else "", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutants-") as name, ThreadPoolExecutor() as pool:
        folders = [Path(name) / str(job) for job in range(min(args.jobs, len(mutations)))]
        for done in [pool.submit(worker, folder) for folder in folders]:
            done.result()  # raises what the worker raised
    print(f"{len(mutations)} mutants, {len(sound)} selections of tests, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
