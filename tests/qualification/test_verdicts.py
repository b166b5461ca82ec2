"""A verdict in the cache, read, written, damaged or another card's, and the choice by it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels import costs, selection, verdicts
from lora_kernels.backends.cuda import constraints
from lora_kernels.core.problem import Layout, Problem
from lora_kernels.verdicts import Group, Point, Verdict
from tests.support import fake_card

bf16, f32 = torch.bfloat16, torch.float32
DECODE = Group("cuda", "cooperative", "bfloat16", "bfloat16", "4bit")
OTHER = Group("cuda", "overlapped", "bfloat16", "bfloat16", "4bit")
POINTS = [Point(DECODE, 1, 4096, 4096, 16, 1e-5, 4e-5, None, None)]
VERDICT = Verdict(fake_card.KEY, frozenset({DECODE}), {OTHER: "memory: no"}, POINTS, {}, "2026")


def problem(rows: int = 1, **fields: Any) -> Problem:
    return Problem("cuda", *(bf16,) * 4, 16, rows, True)._replace(**fields)


def test_written_verdict_is_read_back_with_every_field() -> None:
    file = verdicts.write(VERDICT)
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing half-written
    found = verdicts.read(fake_card.KEY)
    assert isinstance(found, Verdict)
    assert found.json() == VERDICT.json() and found.digest == VERDICT.digest
    assert found.passed == {DECODE} and found.points == POINTS
    assert replace(found, date="2027").digest != found.digest


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}}', "[" * 100_000])
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


def test_current_is_read_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts.write(VERDICT)
    first = verdicts.current(0)
    verdicts.write(replace(VERDICT, date="2027"))
    assert isinstance(first, Verdict) and verdicts.current(0) is first
    assert verdicts.current(None) is first


def test_current_of_a_card_whose_key_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(index: int) -> dict[str, str]:
        raise OSError("no such file")

    monkeypatch.setattr(verdicts, "key", fails)
    assert "its key is unknown (no such file)" in str(verdicts.current(0))
    assert selection.choose(problem()).backend == "eager"


def test_forget_removes_files_and_what_the_process_knows() -> None:
    file = verdicts.write(VERDICT)
    assert isinstance(verdicts.current(0), Verdict)
    assert verdicts.forget() == [file] and not file.exists()
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


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"a_dtype": f32, "b_dtype": f32}, "not checked"),
        ({"a_dtype": f32}, "not checked"),
        ({"dtype": torch.float16}, "not checked"),
        ({"four_bit": False}, "not checked"),
        ({"dropout": True}, "dropout"),
        ({"rank": 65}, "rank 65"),
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


@pytest.mark.parametrize(("seconds", "backend"), [(3.7e-5, "cuda"), (3.9e-5, "eager")])
def test_choose_of_what_was_measured_wants_five_percent(seconds: float, backend: str) -> None:
    points = [POINTS[0]._replace(forward=seconds)]
    verdicts.set_current(0, replace(VERDICT, points=points))
    choice = selection.choose(problem())
    assert choice.backend == backend, choice.reason
    assert backend == "cuda" or "took 0.97 of eager's time" in choice.reason


def test_ratios_are_of_the_nearest_rows() -> None:
    points = [
        Point(DECODE, M, 1, 1, 16, float(M), 2.0, step, 4.0)
        for M, step in ((1, None), (32, 1.0), (32, 2.0), (32, 8.0), (1024, 4.0))
    ]
    verdict = replace(VERDICT, points=[*points, POINTS[0]._replace(group=OTHER)])
    assert verdict.ratios(DECODE, 0) == verdict.ratios(DECODE, 5) == (0.5, 0.0)
    assert verdict.ratios(DECODE, 6) == verdict.ratios(DECODE, 181) == (16.0, 0.5)
    assert verdict.ratios(DECODE, 182) == (512.0, 1.0)
    assert verdict.ratios(OTHER, 1) == (0.25, 0.0)
    assert verdict.ratios(DECODE._replace(weight="dense"), 1) is None


def test_choose_of_what_was_slower_in_a_step_is_eager() -> None:
    point = POINTS[0]._replace(eager_step=1.0)
    for step, backend in ((1.0, "cuda"), (1.01, "eager")):
        verdicts.set_current(0, replace(VERDICT, points=[point._replace(step=step)]))
        choice = selection.choose(problem())
        assert choice.backend == backend, choice.reason
    assert "took 1.01 of eager's time for a step" in choice.reason


def test_choose_takes_no_adapters_of_their_own_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group("triton", "two_pass", "bfloat16", "bfloat16", "4bit")
    verdict = replace(VERDICT, passed=frozenset({group}))
    cost = costs.Cost("triton", costs.Strategy.TWO_PASS, 1.0, "memory")
    assert costs._unqualified(*cost[:2], problem(), verdict) is None
    assert "several adapters" in str(costs._unqualified(*cost[:2], problem(mixed=True), verdict))


def test_choose_takes_no_kernel_without_a_base_product() -> None:
    no_base = Layout(unsupported_reason=constraints.NO_BASE)
    cost = costs.Cost("cuda", costs.Strategy.COOPERATIVE, 1.0, "memory")
    assert costs._unqualified(*cost[:2], problem(), VERDICT) is None
    assert "base product" in str(costs._unqualified(*cost[:2], problem(layout=no_base), VERDICT))
