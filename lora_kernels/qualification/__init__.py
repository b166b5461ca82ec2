"""`qualify`: check this package's kernels on the card that they landed on, before they are used.

A worker process checks the claims one by one: a kernel that hangs or reads where it may
not costs the worker, never this process, which starts another for the rest. A group of calls is
used when all its claims hold. The verdict is cached (`verdicts`).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from ..choice import verdicts
from ..choice.verdicts import Group, Point, Verdict
from ..core import device as devices
from . import compiling
from .plan import DTYPES, KNOWN_DTYPES, SQUARE, WIDE, Claim, list_claims, list_orders

__all__ = [
    "BUDGET",
    "DTYPES",
    "KNOWN_DTYPES",
    "Claim",
    "index_of",
    "list_claims",
    "list_orders",
    "measure_orders",
    "qualify",
]

WORKER = "lora_kernels.qualification.claims"
CARD = "lora_kernels.qualification.card:Card"
BUDGET = 25.0  # seconds
SILENCE = 30.0  # seconds without a line from the worker, after which it counts as hanging
START = 120.0  # the same to import torch and open the device, on a busy machine
MAX_WORKERS = 6  # one, and five restarts


def qualify(
    device: int | str | torch.device | None = None,
    *,
    dtypes: Sequence[str] = DTYPES,
    shapes: Sequence[tuple[int, int]] = (SQUARE, WIDE),
    budget_s: float = BUDGET,
    report: Callable[[Claim, str | None], None] | None = None,
    card: str = CARD,
) -> Verdict:
    """Check the kernels on a GPU against the reference, time them, and cache the verdict.

    From then on this process, and others on the same kind of card with the same driver, versions
    and kernels, use what passed where it was measured at least 5 % faster than the eager backend,
    and no slower in a training step. The nearest measured size counts; with more rows than were
    measured the eager backend runs, in the order and with the skinny GEMMs of a training step that
    were measured faster. It makes no collective call: run it once a machine, before a
    distributed program.

    Triton's kernels are compiled first, if its cache lacks them: about 30 s of one processor,
    divided among those of the cgroup. `budget_s` counts from then on.

    Args:
        device: a CUDA device or its index. Default: the current one.
        dtypes: of the base GEMM: "bfloat16", "float16".
        shapes: N and K of the weights whose calls are timed. Default: those of Llama-3-8B that
            `lora-kernels qualify --dry-run` prints.
        budget_s: seconds, after which the worker begins no claim. A group with a claim that is
            left is not used, and the verdict does not name it.
        report: called after each claim with the claim, and why it does not hold or None.
        card: the worker's access to the device, "module:class"; tests pass an emulated one.

    Returns the verdict. Raises RuntimeError, with nothing cached, if there is no GPU, another
    process is qualifying, the cache cannot be written, memory is low, the driver is older than the
    kernels' CUDA, the card accepts no second process, no group was checked to its end, or the
    process belongs to a process group and is not its machine's first.

    >>> verdict = qualify()  # doctest: +SKIP
    >>> sorted(verdict.passed)  # doctest: +SKIP
    """
    index = index_of(device)
    claims = list_claims(_require_dtypes(dtypes), shapes)
    with _checked(claims, index, budget_s, report, card) as verdict:
        try:
            verdicts.write(verdict)
        except OSError as error:
            raise RuntimeError(f"qualify: the cache cannot be written: {error}") from error
    verdicts.set_current(index, verdict)
    return verdict


def measure_orders(
    device: int | str | torch.device | None = None,
    *,
    dtypes: Sequence[str] = DTYPES,
    budget_s: float = BUDGET,
    report: Callable[[Claim, str | None], None] | None = None,
    card: str = CARD,
) -> Verdict:
    """Check and time the orders and the skinny GEMMs of a training step, and cache nothing.

    Arguments, result and errors are those of `qualify`, which measures them too.
    """
    claims = list_orders(_require_dtypes(dtypes))
    with _checked(claims, index_of(device), budget_s, report, card) as verdict:
        return verdict


def _require_dtypes(dtypes: Sequence[str]) -> tuple[str, ...]:
    """Return the dtypes, each once; ValueError for another than KNOWN_DTYPES."""
    if wrong := [name for name in dtypes if name not in KNOWN_DTYPES]:
        raise ValueError(f"dtypes: got {wrong[0]!r}, want 'bfloat16' or 'float16'")
    return tuple(dict.fromkeys(dtypes))


@contextlib.contextmanager
def _checked(
    claims: Sequence[Claim],
    index: int,
    budget_s: float,
    report: Callable[[Claim, str | None], None] | None,
    card: str,
) -> Iterator[Verdict]:
    """Yield the verdict on the claims, with the lock of the cache held. Arguments of `qualify`."""
    if not budget_s > 0:
        raise ValueError(f"budget_s: got {budget_s}, want seconds above 0")
    if (why := _unready_reason()) is not None:
        raise RuntimeError(f"qualify: {why}; nothing was cached")
    with _locked():
        run = _Run(claims, card, index, verdicts.key(index), budget_s)
        run.check(report or (lambda claim, reason: None))
        if (after := verdicts.key(index)) != run.key:
            changed = ", ".join(name for name in run.key if run.key[name] != after.get(name))
            raise RuntimeError(f"qualify: {changed} changed meanwhile; nothing was cached")
        yield run.verdict()


def index_of(given: int | str | torch.device | None) -> int:
    """Return the index of a GPU; ValueError if it names none, RuntimeError if there is none."""
    if not devices.has_gpu():
        raise RuntimeError("qualify: there is no GPU that torch can use")
    if given is None:
        return torch.cuda.current_device()
    where = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
    count = torch.cuda.device_count()
    if where.type != "cuda" or (where.index or 0) >= count:
        raise ValueError(f"device: got {where}, want a CUDA device of the {count} there are")
    return torch.cuda.current_device() if where.index is None else where.index


def _unready_reason() -> str | None:
    """Return why this process may not qualify a card now, or None."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and os.environ.get("LOCAL_RANK", "0") != "0":
        return "only the first process of a machine may, run `lora-kernels qualify` before"
    place = verdicts.folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return f"the cache folder {place} cannot be written ({error.strerror or error})"
    return None


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Hold the lock of the cache folder; RuntimeError at once if another process holds it."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system; two runs write the same file, atomically
        yield
        return
    with open(verdicts.folder() / "qualify.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(
                "qualify: another process is qualifying; nothing was cached"
            ) from error
        yield


@dataclass
class _Run:
    """The claims of one qualification, and what is known of them."""

    claims: Sequence[Claim]
    card: str
    index: int
    key: Mapping[str, str]
    budget_s: float
    end: float | None = None  # by time.monotonic, from the first worker on
    holds: set[Claim] = field(default_factory=set)
    failed: dict[Group, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)

    def check(self, report: Callable[[Claim, str | None], None]) -> None:
        """Check all claims, in as many workers as it takes."""
        for _ in range(MAX_WORKERS):
            left = [c for c in self.claims if c not in self.holds and c.group not in self.failed]
            if not left or (self.end is not None and time.monotonic() >= self.end):
                return
            with _Worker(self.card, self.index) as worker:
                self._require_ready(worker)
                if self.end is None:
                    compiling.compile_ahead(self.claims, devices.gpu(self.index))
                    self.end = time.monotonic() + self.budget_s
                worker.order(claims=left, end=time.time() + self.end - time.monotonic())
                self._follow(worker, left, report)

    def _require_ready(self, worker: _Worker) -> None:
        first = worker.read(START)
        if "ready" not in first:
            raise RuntimeError(f"qualify: {worker.ending(first)}; nothing was cached")
        other = [name for name, v in first["ready"].items() if v != self.key.get(name)]
        if other:
            raise RuntimeError(
                f"qualify: the worker sees another card or version ({', '.join(other)}); "
                "nothing was cached"
            )

    def _follow(
        self, worker: _Worker, left: list[Claim], report: Callable[[Claim, str | None], None]
    ) -> None:
        """Note what a worker finds until it ends, dies or is silent."""
        begun: Claim | None = None
        while line := worker.read(SILENCE):
            if "begin" in line:
                begun = left[line["begin"]]
            elif "end" in line:
                claim, begun = left[line["end"]], None
                if line.get("retry"):
                    raise RuntimeError(f"qualify: {line['retry']}; nothing was cached")
                self._settle(claim, line["failed"], report)
                points = line.get("points", ())
                self.points += [verdicts.read_point([claim.group, *each]) for each in points]
            else:
                break
        if begun is not None:
            self._settle(begun, worker.ending(line), report)

    def _settle(
        self, claim: Claim, reason: str | None, report: Callable[[Claim, str | None], None]
    ) -> None:
        if reason is None:
            self.holds.add(claim)
        else:
            self.failed[claim.group] = f"{claim.name}: {reason}"
        report(claim, reason)

    def verdict(self) -> Verdict:
        """Return the verdict on the groups that were checked to their end."""
        left = {claim.group for claim in self.claims if claim not in self.holds}
        passed = frozenset(claim.group for claim in self.claims if claim.group not in left)
        if not passed and not self.failed:
            raise RuntimeError(
                f"qualify: no group was checked within {self.budget_s:g} s; nothing was cached"
            )
        points = [point for point in self.points if point.group in passed]
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return Verdict(self.key, passed, self.failed, points, date)


class _Worker:
    """A worker process, which prints a line of JSON for each thing that happens."""

    def __init__(self, card: str, index: int) -> None:
        environment = os.environ | _visible_device(index) | {"LORA_KERNELS_BACKEND": ""}
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, card],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],  # -m finds this package there, and no file of the user's
            start_new_session=True,  # a compiler that it started ends with it
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._listener.join()
        self._errors.close()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout:
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def order(self, **order: Any) -> None:
        """Give it claims and the time when it must begin no more."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(json.dumps(order))

    def read(self, seconds: float) -> dict[str, Any]:
        """Return the next line; {"silent": seconds} if there is none, {} at the end."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return {"silent": seconds}
        try:
            return {} if line is None else dict(json.loads(line))
        except ValueError:
            return {}  # torn, because the process died while it wrote

    def ending(self, last: Mapping[str, Any]) -> str:
        """Return how the worker ended, in words; `last` is what `read` returned."""
        if "silent" in last:
            return f"no answer for {last['silent']:g} s"
        if "refused" in last:
            return str(last["refused"])
        self._kill(5.0)
        self._errors.seek(0)
        said = self._errors.read().strip().rpartition("\n")[2][-300:]
        status = self._process.returncode
        how = (
            f"the worker was killed by {signal.Signals(-status).name}"
            if status is not None and status < 0
            else f"the worker exited with status {status}"
        )
        return f"{how}: {said}" if said else how

    def _kill(self, grace: float = 0.0) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
            return
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()


def _visible_device(index: int) -> dict[str, str]:
    """Return the variable for a process that sees this GPU alone.

    None is set where there is one GPU: a MIG slice in a container has no name that CUDA accepts.
    """
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if index < len(named):
        return {"CUDA_VISIBLE_DEVICES": named[index]}
    if torch.cuda.device_count() == 1:
        return {}
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return {"CUDA_VISIBLE_DEVICES": str(index) if uuid is None else f"GPU-{uuid}"}
