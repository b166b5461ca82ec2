"""`qualify` from end to end, on Triton's interpreter and CUDA's emulator in a worker process."""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import lora_kernels
from lora_kernels import qualification
from lora_kernels.backends import triton
from lora_kernels.choice import choose as selection
from lora_kernels.choice import verdicts
from lora_kernels.choice.verdicts import Group, Point, Verdict
from lora_kernels.qualification import Claim, compiling, qualify
from lora_kernels.qualification.plan import CANDIDATES, STEP_ROWS, list_claims
from tests.support import fake_card
from tests.support.emulator import emulator_unavailable_reason

if emulator_unavailable_reason() or triton.unavailable_reason():
    pytest.skip("the emulator was not built", allow_module_level=True)

DECODE = Group("cuda", "cooperative", "bfloat16", "bfloat16", "dense")
TWO_PASS = Group("cuda", "two_pass", "bfloat16", "float32", "4bit")
FUSED = Group("triton", "fused", "bfloat16", "float32", "4bit")
SHAPES = ((64, 128),)


def run(
    monkeypatch: pytest.MonkeyPatch,
    claims: list[Claim],
    seen: list[Claim] | None = None,
    *,
    budget_s: float = 600.0,
    **faults: str,
) -> Verdict:
    """Qualify the fake card. faults: "group/claim" or "start" -> what befalls it."""
    monkeypatch.setattr(qualification, "list_claims", lambda *args: claims)
    monkeypatch.setenv(fake_card.FAULTS, ";".join(f"{at}={what}" for at, what in faults.items()))
    noted = [] if seen is None else seen
    return qualify(
        card=fake_card.NAME,
        shapes=SHAPES,
        budget_s=budget_s,
        report=lambda claim, reason: noted.append(claim),
    )


def claims_on(*groups: Group, names: tuple[str, ...] = ("memory",)) -> list[Claim]:
    return [Claim(group, name, 1) for name in names for group in groups]


def choose(group: Group) -> selection.Choice:
    return selection.choose(fake_card.problem(group, 1, 4096, 4096))


def is_cached() -> bool:
    return any(verdicts.folder().glob("qualified-*"))


def list_claims_of(*groups: Group) -> list[Claim]:
    return [c for c in list_claims(shapes=SHAPES) if c.group in groups]


def test_every_claim_of_a_group_of_each_backend_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qualification, "SILENCE", 300.0)
    claims = list_claims_of(DECODE, FUSED)
    assert {c.name for c in claims} == {c.name for c in list_claims()}
    seen: list[tuple[Claim, str | None]] = []
    monkeypatch.setattr(qualification, "list_claims", lambda *args: claims)
    assert choose(DECODE).backend == "eager"
    found = qualify(card=fake_card.NAME, budget_s=600, report=lambda *each: seen.append(each))
    assert not found.failed and found.passed == {DECODE, FUSED}
    assert seen == [(claim, None) for claim in claims]
    timed = [(c.group, *sizes) for c in claims for sizes in c.sizes]
    assert [(p.group, p.rows, p.columns, p.inner) for p in found.points] == timed
    assert all(p.forward == fake_card.SECONDS for p in found.points)
    assert all(p.eager_forward == fake_card.EAGER_SECONDS for p in found.points)
    assert all((p.step is None) == (p.rows < STEP_ROWS) for p in found.points)
    cached = verdicts.read(fake_card.KEY)
    assert isinstance(cached, Verdict) and cached.json() == found.json()
    choice = choose(DECODE)
    assert (choice.backend, choice.strategy) == ("cuda", "cooperative")
    assert choice.reason == "measured 0.50 of eager's time at 1×64×128"


EVERY = [Group(b, str(s), "bfloat16", "bfloat16", weight) for b, s, weight, *_ in CANDIDATES]


@pytest.mark.parametrize("backend", ["cuda", pytest.param("triton", marks=pytest.mark.proof)])
def test_every_claim_of_every_candidate_holds(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's kernels take any size; those of CUDA are asked here what they take."""
    monkeypatch.setattr(qualification, "SILENCE", 300.0)
    groups = [group for group in EVERY if group.backend == backend]
    found = run(monkeypatch, list_claims_of(*groups))
    assert not found.failed and found.passed == {*groups}


def with_eager(point: Point, factor: float) -> Point:
    """The point, with the eager backend's seconds times `factor`."""
    scaled = {
        name: seconds._replace(device=factor * seconds.device, host=factor * seconds.host)
        for name in ("eager_forward", "eager_step")
        if (seconds := getattr(point, name)) is not None
    }
    return point._replace(**scaled)


def test_choose_takes_each_candidate_that_was_measured_faster_and_none_that_was_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qualification, "SILENCE", 300.0)
    measured = run(monkeypatch, [c for c in list_claims_of(*EVERY) if c.name == "time"])
    assert not measured.failed and measured.passed == {*EVERY}
    for ratio, eager in ((0.5, 1.0), (1.5, 1 / 3)):
        found = replace(measured, points=tuple(with_eager(p, eager) for p in measured.points))
        for group, rows in zip(EVERY, (each.rows for each in CANDIDATES), strict=True):
            alone = replace(found, passed=frozenset({group}))
            verdicts.set_current(0, alone)
            for M in (rows[0], rows[-1]):
                choice = selection.choose(fake_card.problem(group, M, 64, 128))
                want = group[:2] if ratio < 1 else ("eager", "library")
                assert (choice.backend, choice.strategy) == want, choice
                assert f"measured {ratio:.2f} of eager's time at {M}×64×128" in choice.reason
            above = selection.choose(fake_card.problem(group, rows[-1] + 1, 64, 128))
            assert above.backend == "eager" and f"{rows[-1]} " in above.reason


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong", "odd sizes: y MISS"),
        ("hang", "odd sizes: no answer for 8 s"),
        pytest.param(
            "signal", "odd sizes: the worker was killed by SIGSEGV", marks=pytest.mark.slow
        ),
        pytest.param("exit", "odd sizes: the worker exited with status 0", marks=pytest.mark.slow),
        pytest.param(
            "broken", "odd sizes: CUDA error: an illegal memory access", marks=pytest.mark.slow
        ),
    ],
)
def test_fault_closes_its_group_alone(
    monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    monkeypatch.setattr(qualification, "SILENCE", 8.0 if fault == "hang" else 300.0)
    claims = [
        *claims_on(DECODE, names=("memory", "odd sizes")),
        *claims_on(DECODE._replace(weight="4bit")),
    ]
    seen: list[Claim] = []
    claims += claims_on(DECODE, names=("graph",))  # of a group that has failed by then
    found = run(monkeypatch, claims, seen, **{f"{DECODE}/odd sizes": fault})
    assert [claim.name for claim in seen if claim.group == DECODE] == ["memory", "odd sizes"]
    assert found.failed[DECODE].startswith(reason), found.failed
    assert found.passed == {DECODE._replace(weight="4bit")}
    choice = choose(DECODE)
    assert choice.backend == "eager" and reason in choice.reason, choice.reason
    assert is_cached()  # failures too: nothing hangs twice


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({f"{DECODE}/memory": "memory"}, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        ({"start": "refuse"}, "all CUDA-capable devices are busy or unavailable"),
        ({"start": "signal"}, "the worker was killed by SIGSEGV"),
    ],
    ids=["out of memory", "exclusive", "start"],
)
def test_what_may_pass_another_time_is_not_cached(
    monkeypatch: pytest.MonkeyPatch, faults: dict[str, str], reason: str
) -> None:
    with pytest.raises(RuntimeError, match=f"qualify: .*{reason}.*; nothing was cached"):
        run(monkeypatch, claims_on(DECODE), **faults)
    assert not is_cached() and choose(DECODE).backend == "eager"


def test_worker_that_sees_another_card_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fake_card.KEY_VARIABLE, "other")
    with pytest.raises(RuntimeError, match=r"another card or version \(driver\)"):
        run(monkeypatch, claims_on(DECODE))
    assert not is_cached()


def test_key_that_changes_meanwhile_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = iter([fake_card.KEY, fake_card.KEY | {"torch": "3"}])
    monkeypatch.setattr(verdicts, "key", lambda index: dict(next(keys)))
    with pytest.raises(RuntimeError, match="changed meanwhile"):
        run(monkeypatch, claims_on(DECODE))
    assert not is_cached()


def test_second_process_gives_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts.folder().mkdir(parents=True)
    with open(verdicts.folder() / "qualify.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process is qualifying"):
            run(monkeypatch, claims_on(DECODE))
    assert not is_cached() and choose(DECODE).backend == "eager"


def test_cache_that_cannot_be_written_is_said_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(qualification, "_Worker", None)
    with pytest.raises(RuntimeError, match=r"the cache folder .* cannot be written \(Not a dir"):
        run(monkeypatch, claims_on(DECODE))


def test_torn_file_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    file = verdicts.file_of(fake_card.KEY)
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert "cannot be read" in choose(DECODE).reason
    run(monkeypatch, claims_on(DECODE))
    assert isinstance(verdicts.read(fake_card.KEY), Verdict)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Workers that say the lines of a script. Notes their orders, their waits and the GPUs."""
    noted = SimpleNamespace(scripts=[], orders=[], ends=[], waits=[], gpus=set())

    class Worker(contextlib.nullcontext[Any]):
        def __init__(self, card: str, index: int) -> None:
            super().__init__(self)
            self.index = index
            self.lines = iter([{"ready": fake_card.KEY}, *noted.scripts.pop(0)])
            noted.waits.append([])

        def order(self, claims: list[Claim], end: float) -> None:
            noted.orders.append((self.index, claims))
            noted.ends.append(end)

        def read(self, seconds: float) -> dict[str, Any]:
            noted.waits[-1].append(seconds)
            return next(self.lines, {})

        def ending(self, last: object) -> str:
            return "died"

    key = verdicts.key
    monkeypatch.setattr(qualification, "_Worker", Worker)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(verdicts, "key", lambda at: noted.gpus.add(at) or key(at))
    return noted


def test_workers_share_the_claims(monkeypatch: pytest.MonkeyPatch, scripted: Any) -> None:
    claims = [Claim(g, name, 1) for name in ("memory", "time") for g in (TWO_PASS, DECODE)]
    claims.append(Claim(TWO_PASS, "graph", 2))
    time = [1, 64, 128, 16, [1e-5, 1e-6, True], [2e-5, 1e-6, False], None, None]
    holds = [[{"begin": n}, {"end": n, "failed": None, "points": [time]}] for n in range(2)]
    scripted.scripts += [[*holds[0], *holds[1], {"begin": 2}], holds[0]]
    listed = {(("bfloat16",), SHAPES): claims}
    monkeypatch.setattr(qualification, "list_claims", lambda *args: listed[args])

    def report(claim: Claim, reason: str | None) -> None:  # the lock is held until the end
        with open(verdicts.folder() / "qualify.lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    found = qualify(1, dtypes=["bfloat16"] * 2, shapes=SHAPES, report=report)
    assert scripted.orders == [(1, claims), (1, [claims[3]])]
    start, silence = qualification.START, qualification.SILENCE
    assert scripted.waits == [[start, *[silence] * 6], [start, *[silence] * 3]]
    assert scripted.gpus == {1} and verdicts._current == {1: found}
    assert found.passed == {DECODE} and found.failed == {TWO_PASS: "time: died"}
    assert [point.group for point in found.points] == [DECODE, DECODE]
    assert found.date.endswith("+00:00")


def test_workers_share_the_budget(monkeypatch: pytest.MonkeyPatch, scripted: Any) -> None:
    """The next one has what the last one left, on the clock of its process; compiling is apart."""
    clock = SimpleNamespace(time=lambda: clock.now + 1e9, monotonic=lambda: clock.now, now=7.0)
    monkeypatch.setattr(qualification, "time", clock)

    def report(claim: Claim, reason: str | None) -> None:
        clock.now += 200.0

    def compile_ahead(claims: list[Claim], gpu: Any) -> None:
        assert len(scripted.waits) == 1 and not scripted.orders  # a worker is ready, and waits
        clock.now += 100.0

    scripted.scripts += [[{"begin": 0}], [{"begin": 0}]]
    monkeypatch.setattr(compiling, "compile_ahead", compile_ahead)
    monkeypatch.setattr(qualification, "list_claims", lambda *args: claims_on(DECODE, TWO_PASS))
    qualify(1, budget_s=600.0, report=report)
    assert scripted.ends == [1e9 + 707.0] * 2


def test_workers_are_given_up(monkeypatch: pytest.MonkeyPatch, scripted: Any) -> None:
    scripted.scripts += [[] for _ in range(6)]
    with pytest.raises(RuntimeError, match="no group was checked within 600 s; nothing was cach"):
        run(monkeypatch, claims_on(DECODE))
    assert not scripted.scripts and not is_cached()
    monkeypatch.setattr(os, "replace", lambda *files: (_ for _ in ()).throw(OSError("full")))
    scripted.scripts += [[{"begin": 0}]]
    with pytest.raises(RuntimeError, match="qualify: the cache cannot be written: full"):
        run(monkeypatch, claims_on(DECODE))
    assert not verdicts._current


def test_worker_s_end_is_told_in_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """import os, time; print('{"begin": 1}'); print('{"en', end="", flush=True)
os.close(0); os.close(1); time.sleep(0.2); raise SystemExit("first\\nlast")"""  # slowly
    options: dict[str, Any] = {}
    popen = qualification.subprocess.Popen

    def start(command: list[str], **given: Any) -> Any:
        options.update(given)
        return popen([sys.executable, "-c", code], **given)

    monkeypatch.setattr(qualification.subprocess, "Popen", start)
    monkeypatch.setattr(
        qualification, "_visible_device", lambda i: {"CUDA_VISIBLE_DEVICES": f"of {i}"}
    )
    with qualification._Worker("card", 3) as worker:
        worker.order(more_than_a_pipe_holds="x" * 300_000)
        assert [worker.read(60.0), worker.read(60.0)] == [{"begin": 1}, {}]
        assert worker.ending({}) == "the worker exited with status 1: last"
    assert options["env"]["CUDA_VISIBLE_DEVICES"] == "of 3"
    assert options["env"]["LORA_KERNELS_BACKEND"] == ""  # whatever the user forces
    assert options["cwd"] == Path(lora_kernels.__file__).parents[1]  # whatever files lie here


def test_worker_and_its_children_end(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """import subprocess, sys, time
apart = {"stdin": -3, "stdout": -3, "stderr": -3}  # DEVNULL
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], **apart)
print('{"child": %d}' % child.pid, flush=True); time.sleep(600)"""
    popen = qualification.subprocess.Popen
    monkeypatch.setattr(
        qualification.subprocess,
        "Popen",
        lambda command, **given: popen([sys.executable, "-c", code], **given),
    )
    with qualification._Worker("card", 0) as worker:
        child = psutil.Process(worker.read(60.0)["child"])
    assert not psutil.pid_exists(worker._process.pid)
    for _ in range(500):
        if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.01)
    child.kill()
    raise AssertionError("the worker's child lives")


def test_budget_leaves_claims_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"no group was checked within 1e-09 s; nothing was"):
        run(monkeypatch, claims_on(DECODE), budget_s=1e-9)
    assert not is_cached() and choose(DECODE).backend == "eager"


def test_group_that_the_budget_left_is_not_in_the_verdict(
    monkeypatch: pytest.MonkeyPatch, scripted: Any
) -> None:
    """Neither passed nor failed: another run may check it."""
    claims = [*claims_on(DECODE), *claims_on(TWO_PASS, names=("memory", "graph"))]
    ends = [line for n in range(2) for line in ({"begin": n}, {"end": n, "failed": None})]
    scripted.scripts += [ends, *[[]] * 5]
    found = run(monkeypatch, claims)
    assert found.passed == {DECODE} and not found.failed
    cached = verdicts.read(fake_card.KEY)
    assert isinstance(cached, Verdict) and cached.json() == found.json()
    assert "not checked" not in verdicts.file_of(fake_card.KEY).read_text()
    assert choose(TWO_PASS).reason.endswith("were not checked")


def test_other_ranks_of_a_machine_do_not_qualify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert qualification._unready_reason() is None  # not yet in a process group
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.delenv("LOCAL_RANK")
    assert qualification._unready_reason() is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RuntimeError, match="only the first process of a machine may"):
        run(monkeypatch, claims_on(DECODE))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: qualify("cpu"), "device: got cpu, want a CUDA device of the 1 there are"),
        (lambda: qualify(1), "device: got cuda:1, want a CUDA device"),
        (lambda: qualify(dtypes=["float32"]), "dtypes: got 'float32', want 'bfloat16'"),
        (lambda: qualify(budget_s=0.0), "budget_s: got 0.0, want seconds above 0"),
        (lambda: qualify(budget_s=float("nan")), "budget_s: got nan, want seconds above 0"),
    ],
)
def test_arguments_that_are_wrong(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_device_without_an_index_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    given = (None, "cuda", 0, "cuda:0", torch.device("cuda", 1))
    assert [qualification.index_of(device) for device in given] == [1, 1, 0, 0, 1]


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="there is no GPU that torch can use"):
            lora_kernels.qualify()


def test_worker_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert qualification._visible_device(1) == {"CUDA_VISIBLE_DEVICES": "GPU-abc"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert qualification._visible_device(0) == {}  # a MIG slice, say
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    facts = type("Properties", (), {"uuid": "1-2"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    for index in range(2):
        assert qualification._visible_device(index) == {"CUDA_VISIBLE_DEVICES": "GPU-1-2"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: None)
    assert qualification._visible_device(1) == {"CUDA_VISIBLE_DEVICES": "1"}
