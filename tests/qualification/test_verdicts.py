"""A verdict in the cache, read, written, damaged or another card's, and the choice by it."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels import costs, device, selection, verdicts
from lora_kernels.backends import cuda, decode4bit, triton
from lora_kernels.backends.cuda import constraints
from lora_kernels.backends.triton import measured
from lora_kernels.core.problem import ONE_ADAPTER, Layout, Problem
from lora_kernels.device import DeviceInfo
from lora_kernels.peft import explain, explain_rows, fuse, row_adapters
from lora_kernels.qualification import STRATEGIES
from lora_kernels.verdicts import Group, Point, Seconds, Verdict
from tests.support import fake_card

bf16, f32 = torch.bfloat16, torch.float32
DECODE = Group("cuda", "cooperative", "bfloat16", "bfloat16", "4bit")
OTHER = Group("cuda", "overlapped", "bfloat16", "bfloat16", "4bit")
TRITON = Group("triton", "two_pass", "bfloat16", "bfloat16", "4bit")
POINTS = [
    Point(DECODE, 1, 4096, 4096, 16, Seconds(1e-5, 1e-6), Seconds(4e-5, 2e-6, False), None, None)
]
ROWS = (1, 8, 32, 128)
VERDICT = Verdict(fake_card.KEY, frozenset({DECODE}), {OTHER: "memory: no"}, POINTS, {}, "2026")

NO_RATES = '{"key": {}, "passed": [], "failed": [], "points": [], "rates": [], "date": ""}'
KEY = verdicts.key  # the fixture `card` replaces it


def problem(rows: int = 1, **fields: Any) -> Problem:
    return Problem("cuda", *(bf16,) * 4, 16, rows, True)._replace(**fields)


def test_written_verdict_is_read_back_with_every_field() -> None:
    file = verdicts.write(VERDICT)
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing half-written
    found = verdicts.read(fake_card.KEY)
    assert isinstance(found, Verdict)
    assert found.json() == VERDICT.json() and found.digest == VERDICT.digest
    assert found.passed == {DECODE} and found.points == POINTS
    assert not found.points[0].eager_forward.is_captured
    assert replace(found, date="2027").digest != found.digest


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}}', "[" * 100_000, NO_RATES])
def test_read_of_a_damaged_file_is_no_verdict_and_no_error(text: str) -> None:
    verdicts.write(VERDICT).write_text(text)
    found = verdicts.read(fake_card.KEY)
    assert isinstance(found, str) and "cannot be read" in found and verdicts.ADVICE in found


@pytest.mark.parametrize("field", sorted(VERDICT.json()))
def test_read_of_a_file_that_lacks_a_field_is_no_verdict(field: str) -> None:
    file = verdicts.write(VERDICT)
    data = json.loads(file.read_text())
    del data[field]
    file.write_text(json.dumps(data))
    assert isinstance(verdicts.read(fake_card.KEY), str)


def test_read_of_another_card_s_file_is_no_verdict() -> None:
    key = dict(fake_card.KEY)
    other = replace(VERDICT, key=key | {"driver": "2"})
    verdicts.write(other).replace(verdicts.file_of(key))
    assert "is another card's" in str(verdicts.read(key))


def test_verdicts_of_cards_that_differ_in_a_driver_lie_side_by_side() -> None:
    keys = [{"name": "NVIDIA H100/80GB", "driver": driver} for driver in "12"]
    files = [verdicts.write(replace(VERDICT, key=key)) for key in keys]
    assert [verdicts.read(key).key for key in keys] == keys  # type: ignore[union-attr]
    assert all(file.name.startswith("qualified-nvidia-h100-80gb-") for file in files)


def test_verdict_that_cannot_be_written_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", lambda *files: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        verdicts.write(VERDICT)
    assert not list(verdicts.folder().iterdir())


def test_key_names_all_that_kernels_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu", {1: DeviceInfo("cuda", 90, 132, 9, "H100", 80)}.get)
    monkeypatch.setattr(verdicts, "driver_version", lambda: "1")
    monkeypatch.setattr(torch, "__version__", "2")
    monkeypatch.setattr(torch.version, "cuda", "3")
    monkeypatch.setattr(device, "version", lambda name: f"{name} 4")
    monkeypatch.setattr(verdicts, "_source_digest", lambda: "5")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/6")
    found = " ".join(f"{name}={value}" for name, value in KEY(1).items())
    assert found == (
        f"format={verdicts.FORMAT} name=H100 capability=90 multiprocessors=132 memory=80 driver=1 "
        "torch=2 cuda=3 triton=triton 4 ptxas=/6 bitsandbytes=bitsandbytes 4 kernels=5"
    )


def test_driver_version_is_all_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19\nGCC 12.2.0"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert verdicts.driver_version.__wrapped__() == "535.129.03"


def test_digest_is_of_each_kernel_s_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verdicts, "__file__", str(tmp_path / "verdicts.py"))
    found = set()
    for name in ("backends/a.py", "backends/b/c.py", "core/d.py", "_cuda.so", "peft.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        for text in ("before", "after"):
            (tmp_path / name).write_text(text)
            found.add(verdicts._source_digest.__wrapped__())
    assert len(found) == 8  # all but the two of peft.py


def test_choose_follows_the_tensors_gpu(card: DeviceInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU 1 is the current one and qualified; GPU 2 is too old for our kernels."""
    old = replace(card, capability=75)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(device, "gpu", lambda index: old if index == 2 else card)
    for index, found in enumerate(("not qualified", VERDICT, VERDICT)):
        verdicts.set_current(index, found)
    chosen = [selection.choose(problem(device_index=index)).backend for index in (None, 0, 1, 2)]
    assert chosen == ["cuda", "eager", "cuda", "eager"]


def test_group_of_a_group_s_problem_is_the_group() -> None:
    group = Group("cuda", "cooperative", "bfloat16", "float32", "4bit")
    call = group.problem(3, 5, 7, 9)
    assert call == Problem("cuda", bf16, f32, f32, bf16, 9, 3, True, 5, 7)
    assert verdicts.group_of(*group[:2], call) == group
    other = call._replace(a_dtype=bf16, rank=verdicts.MAX_RANK)
    assert verdicts.group_of(*group[:2], other) == group._replace(adapter="mixed")
    assert verdicts.unqualified_reason(other) is None


def test_current_is_read_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    without = verdicts.current(1)
    verdicts.write(VERDICT)
    assert verdicts.current(1) is without  # and so is what is missing
    first = verdicts.current(0)
    verdicts.write(replace(VERDICT, date="2027"))
    assert isinstance(first, Verdict) and verdicts.current(0) is first
    assert verdicts.current(None) is first


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_current_of_a_card_whose_key_fails_is_a_reason(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(index: int) -> dict[str, str]:
        raise error("no such file")

    monkeypatch.setattr(verdicts, "key", fails)
    assert "its key is unknown (no such file)" in str(verdicts.current(0))
    assert selection.choose(problem()).backend == "eager"


def test_forget_removes_files_and_what_the_process_knows() -> None:
    file = verdicts.write(VERDICT)
    assert isinstance(verdicts.current(0), Verdict)
    other = verdicts.folder() / "measured.json"  # the user's
    other.write_text("{}")
    assert verdicts.forget() == [file] and not file.exists() and other.exists()
    assert verdicts.forget() == []
    assert verdicts.ADVICE in str(verdicts.current(0))


def test_folder_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_CACHE", "/a")
    assert verdicts.folder() == Path("/a")
    monkeypatch.delenv("LORA_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert verdicts.folder() == Path("/b/lora_kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert verdicts.folder() == Path.home() / ".cache/lora_kernels"


def test_choose_without_a_verdict_is_eager_and_advises() -> None:
    choice = selection.choose(problem())
    assert choice.backend == "eager"
    assert choice.reason.endswith(f"; not qualified on this card: {verdicts.ADVICE}")


def test_choose_with_a_verdict_takes_what_passed_and_is_faster() -> None:
    verdicts.set_current(0, VERDICT)
    choice = selection.choose(problem())
    assert (choice.backend, choice.strategy) == ("cuda", "cooperative")
    verdicts.switch_off(True)
    off = selection.choose(problem())
    assert off.backend == "eager" and off.reason.endswith(verdicts.OFF)


def test_tuned_strategy_needs_a_verdict_too(card: DeviceInfo) -> None:
    row = measured.Measured(triton.TWO_PASS, microseconds=1.0, eager_microseconds=2.0)
    key = measured.shape(card, 1, 4096, 4096, 16, bf16, bf16, True)
    for passed, backend in (({DECODE, TRITON}, "triton"), ({DECODE}, "cuda")):
        verdicts.set_current(0, replace(VERDICT, passed=frozenset(passed)))
        with measured.override_row(key, row):
            assert selection.choose(problem(columns=4096, inner=4096)).backend == backend


def test_choose_takes_the_next_of_what_passed_and_says_its_backward() -> None:
    passed = frozenset({DECODE._replace(strategy="two_pass")})
    verdicts.set_current(0, replace(VERDICT, passed=passed, failed={DECODE: "memory: no"}))
    choice = selection.choose(problem(8, columns=4097, inner=4096))
    assert (choice.backend, choice.strategy) == ("cuda", "two_pass")
    assert "dx on CUDA cores: N = 4097" in choice.reason


def test_choose_asks_what_runs_on_the_tensors_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager is expected to take longer where bitsandbytes does not decode for it."""
    asked: list[Any] = []
    times = []
    monkeypatch.setattr(cuda, "unsupported_device_reason", lambda *where: asked.append(where))
    for why in (None, "not installed"):
        monkeypatch.setattr(
            decode4bit, "bitsandbytes_reason", lambda at, w=why: asked.append(at) or w
        )
        verdicts.set_current(1, replace(VERDICT))
        reason = selection.choose(problem(device_index=1)).reason
        times += map(int, re.findall(r"of eager's (\d+) µs", reason))
    assert asked == [("cuda", 1), torch.device("cuda", 1)] * 2 and times[0] < times[1]


def test_choose_takes_no_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing, backend in ((None, "triton"), ("not installed", "eager")):
        monkeypatch.setattr(triton, "unavailable_reason", lambda why=missing: why)
        verdicts.set_current(0, replace(VERDICT, passed=frozenset({TRITON})))
        assert selection.choose(problem(128, columns=14336, inner=4096)).backend == backend


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"a_dtype": f32, "b_dtype": f32}, "not checked"),
        ({"a_dtype": f32}, "not checked"),
        ({"dtype": torch.float16}, "not checked"),
        ({"four_bit": False}, "not checked"),
        ({"dropout": True}, "dropout"),
        ({"rank": 65}, "rank 65"),
        ({"x_dtype": torch.float64}, "float64"),
        ({"layout": Layout(columns=True)}, "stored as [K, N]"),
    ],
    ids=str,
)
def test_choose_of_what_was_not_qualified_is_eager_and_says_why(
    fields: dict[str, Any], word: str
) -> None:
    verdicts.set_current(0, VERDICT)
    choice = selection.choose(problem(**fields))
    assert choice.backend == "eager" and word in choice.reason, choice.reason


def test_choose_says_which_claim_failed() -> None:
    verdicts.set_current(0, replace(VERDICT, passed=frozenset(), failed={DECODE: "memory: NaN"}))
    reason = selection.choose(problem()).reason
    assert "cuda 'cooperative' did not qualify: memory: NaN" in reason


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ({"forward": Seconds(3.7e-5, 0.0)}, ""),
        ({"forward": Seconds(3.9e-5, 0.0)}, "took 0.97 of eager's time"),
        ({"forward": Seconds(1e-5, 3.9e-5)}, "took 0.97 of eager's time"),
        ({"step": Seconds(1.0, 0.0), "eager_step": Seconds(0.0, 1.0)}, ""),
        (
            {"step": Seconds(1.01, 0.0), "eager_step": Seconds(1.0, 0.0)},
            "took 1.01 of eager's time for a step",
        ),
    ],
    ids=str,
)
def test_choose_of_what_was_measured_wants_five_percent_and_no_slower_step(
    times: dict[str, Seconds], reason: str
) -> None:
    verdicts.set_current(0, replace(VERDICT, points=[POINTS[0]._replace(**times)]))
    choice = selection.choose(problem())
    assert choice.backend == ("eager" if reason else "cuda"), choice.reason
    assert reason in choice.reason


@pytest.mark.parametrize("in_graph", [False, True])
def test_choose_in_a_captured_graph_leaves_the_host_s_time_out(
    in_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel whose launch takes longer than eager's, and whose device time is a quarter."""
    slow = POINTS[0]._replace(forward=Seconds(1e-5, 5e-5), eager_forward=Seconds(4e-5, 4e-5))
    verdicts.set_current(0, replace(VERDICT, points=[slow]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: in_graph)
    choice = selection.choose(problem())
    assert choice.backend == ("cuda" if in_graph else "eager")
    assert in_graph or "took 1.25 of eager's time" in choice.reason


def test_cost_model_leaves_the_host_s_time_out_in_a_graph(card: DeviceInfo) -> None:
    one = problem(columns=512, inner=512)  # smaller than any launch from Python
    available: dict[str, str | None] = {"triton": None, "cuda": None, "bitsandbytes": None}
    reasons = [
        str(costs.choose_fastest(one, card, available, in_graph=in_graph))
        for in_graph in (False, True)
    ]
    assert [costs_host in reasons[0] for costs_host in ("launches from Python",)] == [True]
    assert "launches from Python" not in reasons[1]


def test_ratios_are_of_the_nearest_rows() -> None:
    def times(forward: float, step: float | None) -> list[Seconds | None]:
        """The longer of both is the device's for ours, and the host's for eager."""
        steps = (None if step is None else Seconds(step, 0.1)), Seconds(8.0, 4.0)
        return [Seconds(forward, 0.1), Seconds(1.0, 2.0), *steps]

    points = [
        Point(DECODE, M, 1, 1, 16, *times(float(M) * (step or 1.0), step))
        for M, step in ((1, None), (32, 2.0), (32, 4.0), (32, 16.0), (1024, 8.0))
    ]
    verdict = replace(VERDICT, points=[*points, POINTS[0]._replace(group=OTHER)])
    assert verdict.ratios(DECODE, 0) == verdict.ratios(DECODE, 5) == (0.5, 0.0)
    assert verdict.ratios(DECODE, 6) == verdict.ratios(DECODE, 181) == (64.0, 0.5)
    assert verdict.ratios(DECODE, 182) == (4096.0, 1.0)
    assert verdict.ratios(DECODE, 182, in_graph=True) == (8192.0, 1.0)
    assert verdict.ratios(OTHER, 1) == (0.25, 0.0)
    assert verdict.ratios(DECODE._replace(weight="dense"), 1) is None


def test_choose_takes_no_kernel_without_the_base_gemm_that_is_checked() -> None:
    verdict = replace(VERDICT, passed=frozenset({DECODE}))
    assert costs._unqualified(*DECODE[:2], problem(), verdict) is None
    without = problem(layout=Layout(unsupported_reason=constraints.NO_BASE))
    assert "base GEMM" in str(costs._unqualified(*DECODE[:2], without, verdict))


def everything_qualified() -> Verdict:
    """Every strategy of both backends passed, ten times as fast as eager with any rows."""
    kinds = [(*each, "bfloat16", "bfloat16", "4bit") for each in STRATEGIES]
    groups = [Group(*kind) for kind in kinds]
    times = (Seconds(1e-6, 1e-6), Seconds(1e-5, 1e-5)) * 2
    points = [Point(group, M, 4096, 4096, 16, *times) for group in groups for M in ROWS]
    return replace(VERDICT, passed=frozenset(groups), failed={}, points=points)


@pytest.mark.parametrize("rows", ROWS)
def test_choose_of_several_adapters_is_eager_whatever_qualified(rows: int) -> None:
    verdicts.set_current(0, everything_qualified())
    assert selection.choose(problem(rows)).backend in ("triton", "cuda")
    choice = selection.choose(problem(rows, mixed=True))
    assert choice.backend == "eager" and choice.reason.endswith(ONE_ADAPTER)


def test_explain_of_rows_that_name_their_adapters_says_why_it_is_eager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verdicts.set_current(0, everything_qualified())
    on_cpu = explain_rows._problem
    on_gpu = lambda *args: on_cpu(*args)._replace(device_type="cuda")  # noqa: E731
    monkeypatch.setattr(explain_rows, "_problem", on_gpu)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), LoraConfig(target_modules=["0"]))
    with row_adapters(fuse(model), ["default", "__base__"]):
        model(torch.ones(2, 64))
        (row,) = explain(model, rows=2).rows
    assert row.backend == "eager" and ONE_ADAPTER in row.reason
