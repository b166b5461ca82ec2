"""A verdict in the cache, read, written, damaged or another card's, and the choice by it."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels.backends import cuda, triton
from lora_kernels.backends.cuda import constraints
from lora_kernels.choice import choose as selection
from lora_kernels.choice import verdicts
from lora_kernels.choice.verdicts import Group, Point, Seconds, Verdict
from lora_kernels.core import device
from lora_kernels.core.device import DeviceInfo
from lora_kernels.core.problem import ONE_ADAPTER, Choice, Layout, Problem
from lora_kernels.core.record import Record
from lora_kernels.ops import blocks
from lora_kernels.peft import explain, fuse, row_adapters
from lora_kernels.qualification.plan import CANDIDATES
from tests.support import fake_card
from tests.support.gpus import OnCuda

bf16, f32 = torch.bfloat16, torch.float32
DECODE = Group("cuda", "cooperative", "bfloat16", "bfloat16", "4bit")
OTHER = Group("cuda", "two_pass", "bfloat16", "bfloat16", "4bit")
TRITON = Group("triton", "fused", "bfloat16", "bfloat16", "4bit")
POINTS = [
    Point(DECODE, 1, 4096, 4096, 16, Seconds(1e-5, 1e-6), Seconds(4e-5, 2e-6, False), None, None)
]
ROWS = (1, 8, 32, 128)
VERDICT = Verdict(fake_card.KEY, frozenset({DECODE}), {OTHER: "memory: no"}, POINTS, "2026")

NO_PAIRS = '{"key": {}, "passed": [], "failed": [0], "points": [], "date": ""}'
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


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}}', "[" * 100_000, NO_PAIRS])
def test_read_of_a_damaged_file_is_no_verdict_and_no_error(text: str) -> None:
    verdicts.write(VERDICT).write_text(text)
    found = verdicts.read(fake_card.KEY)
    assert isinstance(found, str) and "cannot be read" in found and verdicts.ADVICE in found


# A field of the first point -> a value that a file may have, and what is wrong with the value.
POINT_FIELDS: list[tuple[str, Any, str]] = [
    *(
        (name, value, f"{name}: got {value!r}, want a positive integer")
        for name in ("rows", "columns", "inner", "rank")
        for value in ("16", 0, -1, 16.0, True, None)
    ),
    *(
        (name, [*value, True], f"{name}: got {[*value, True]!r}, want positive seconds")
        for name in ("forward", "eager_forward", "step", "eager_step")
        for value in ((0.0, 1e-6), (1e-5, 0), ("1e-5", 1e-6), (-1e-5, 1e-6), (1e-5, math.inf))
    ),
    ("forward", [math.nan, 1e-6, True], "forward: got [nan, 1e-06, True], want positive seconds"),
    ("forward", [1e-5, 1e-6, 1], "forward: got [1e-05, 1e-06, 1], want positive seconds"),
    ("forward", None, "forward: got None, want positive seconds"),
    ("eager_forward", None, "eager_forward: got None, want positive seconds"),
    ("forward", [1e-5, 1e-6], "forward: got [1e-05, 1e-06], want positive seconds"),
    ("group", [*DECODE[:4], 4], "group: got"),
    ("group", DECODE[:4], "group: got"),
]


@pytest.mark.parametrize(("field", "value", "reason"), POINT_FIELDS, ids=str)
def test_read_of_a_point_of_a_wrong_kind_says_the_file_and_the_field(
    field: str, value: Any, reason: str
) -> None:
    file = verdicts.write(VERDICT)
    data = json.loads(file.read_text())
    data["points"][0][Point._fields.index(field)] = value
    file.write_text(json.dumps(data))
    found = verdicts.read(fake_card.KEY)
    assert isinstance(found, str) and f"{file} cannot be read (ValueError: {reason}" in found


@pytest.mark.parametrize("field", ["passed", "failed"])
def test_read_of_a_group_of_a_wrong_kind_says_the_file_and_the_group(field: str) -> None:
    file = verdicts.write(VERDICT)
    data = json.loads(file.read_text())
    group = data[field][0] if field == "passed" else data[field][0][0]
    group[1] = 4
    file.write_text(json.dumps(data))
    found = verdicts.read(fake_card.KEY)
    assert f"{file} cannot be read (ValueError: group: got {group!r}, want five" in str(found)


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
    monkeypatch.setattr(device, "driver_version", lambda: "1")
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


def test_digest_is_of_each_kernel_s_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verdicts, "__file__", str(tmp_path / "choice/verdicts.py"))
    found = set()
    for name in ("backends/a.py", "backends/b/c.py", "core/d.py", "_cuda.so", "peft.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        for text in ("before", "after"):
            (tmp_path / name).write_text(text)
            found.add(verdicts._source_digest.__wrapped__())
    assert len(found) == 8  # all but the two of peft.py
    (tmp_path / "backends/a.py").rename(tmp_path / "backends/e.py")
    assert verdicts._source_digest.__wrapped__() not in found


def test_choose_follows_the_tensors_gpu(card: DeviceInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU 1 is the current one and qualified; GPU 2 is too old for our kernels."""
    old = replace(card, capability=75)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(device, "gpu", lambda index: old if index == 2 else card)
    for index, found in enumerate(("not qualified", VERDICT, VERDICT)):
        verdicts.set_current(index, found)
    chosen = [selection.choose(problem(device_index=index)).backend for index in (None, 0, 1, 2)]
    assert chosen == ["cuda", "eager", "cuda", "eager"]


def test_group_of_a_call_has_its_dtypes() -> None:
    group = Group("cuda", "cooperative", "bfloat16", "float32", "4bit")
    call = fake_card.problem(group, 3, 5, 7, 9)
    assert call == Problem("cuda", bf16, f32, f32, bf16, 9, 3, True, 5, 7)
    assert verdicts.group_of(*group[:2], call) == group
    other = call._replace(a_dtype=bf16)
    assert verdicts.group_of(*group[:2], other) == group._replace(adapter="unequal")


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
    verdicts.set_off(True)
    off = selection.choose(problem())
    assert off.backend == "eager" and off.reason.endswith(verdicts.OFF)


def timed(
    group: Group, rows: int, ratio: float, step: float | None = None, shape: Any = (4096, 4096)
) -> Point:
    """A point whose device and host take `ratio` of eager's seconds, and a step `step`."""
    ours, eager = Seconds(ratio, ratio), Seconds(1.0, 1.0)
    steps = (None, None) if step is None else (Seconds(step, step), eager)
    return Point(group, rows, *shape, 16, ours, eager, *steps)


def choose_after(points: list[Point], call: Problem, **fields: Any) -> Choice:
    """The choice after a verdict by which the points' groups passed."""
    passed = frozenset(point.group for point in points)
    found = replace(VERDICT, passed=passed, failed={}, points=points, **fields)
    verdicts.set_current(0, found)
    return selection.choose(call)


def test_choose_takes_the_smallest_ratio_of_what_can_run_the_call() -> None:
    points = [timed(DECODE, 1, 0.7), timed(OTHER, 8, 0.6, 0.9), timed(TRITON, 16, 0.8, 0.8)]
    choice = choose_after(points, problem())
    assert (choice.backend, choice.strategy) == ("cuda", "two_pass")
    assert choice.reason == "measured 0.60 of eager's time at 8×4096×4096, step 0.90"
    assert choose_after(points[::-1], problem()) == choice
    off = problem(layout=Layout(64, unsupported_reason="the packed bytes are not aligned to 16"))
    choice = choose_after(points, off)
    assert (choice.backend, choice.strategy) == ("triton", "fused")
    assert choice_reasons(points[:2], off) == (
        "cuda 'cooperative' cannot run it: the packed bytes are not aligned to 16; "
        "cuda 'two_pass' cannot run it: the packed bytes are not aligned to 16"
    )


def choice_reasons(points: list[Point], call: Problem) -> str:
    """Why the choice is eager, after the words on PyTorch's GEMMs."""
    choice = choose_after(points, call)
    assert (choice.backend, choice.strategy) == ("eager", "library")
    return choice.reason.removeprefix(f"{selection._ON_GPU}; ")


def test_choose_of_what_one_direction_cannot_run_is_eager() -> None:
    """The forward would take N = 4097, dx would not."""
    points = [timed(OTHER, 8, 0.5, 0.5)]
    assert choose_after(points, problem(8)).backend == "cuda"
    assert "N = 4097 is no multiple of 8" in choice_reasons(points, problem(8, columns=4097))


def test_choose_asks_a_strategy_for_its_own_largest_rank() -> None:
    points = [timed(OTHER, 16, 0.6, 0.6), timed(TRITON, 16, 0.5, 0.5)]
    ranks = {rank: choose_after(points, problem(rank=rank)) for rank in (64, 65, 128, 129)}
    assert [choice.backend for choice in ranks.values()] == ["triton", "cuda", "cuda", "eager"]
    assert ranks[129].reason.endswith("rank 129 is above the qualified 128")
    assert choice_reasons(points[1:], problem(rank=65)).endswith("rank 65 is above 64")


@pytest.mark.parametrize(
    ("rows", "columns", "inner", "want"),
    [
        (0, 4096, 4096, 0.1),
        (1, 4096, 4096, 0.1),
        (3, 4096, 4096, 0.1),
        (4, 4096, 4096, 0.1),  # as far from 16, but measured first
        (5, 4096, 4096, 0.2),
        (16, 8192, 4096, 0.3),  # the weight's size is twice and 7/8 of those
        (16, 4096, 14336, 0.3),  # of equal size, if of another shape
        (16, 14336, 4096, 0.3),
        (16, 64, 64, 0.2),
        (1, 14336, 4096, 0.1),  # the rows count first
        (128, 4096, 4096, 0.4),
    ],
)
def test_choose_follows_the_nearest_point(rows: int, columns: int, inner: int, want: float) -> None:
    wide = (14336, 4096)
    sizes = [(1, (4096, 4096), 0.1), (16, (4096, 4096), 0.2), (16, wide, 0.3), (128, wide, 0.4)]
    points = [timed(OTHER, M, ratio, shape=shape) for M, shape, ratio in sizes]
    choice = choose_after(points, problem(rows, columns=columns, inner=inner))
    assert choice.reason.startswith(f"measured {want:.2f} of eager's time"), choice.reason


def test_nearest_point_of_equal_sizes_has_the_nearer_columns() -> None:
    points = [timed(OTHER, 16, 0.5, shape=shape) for shape in ((4096, 14336), (14336, 4096))]
    verdict = replace(VERDICT, points=points)
    for point in points:
        assert verdict.nearest_point(OTHER, 16, point.columns, point.inner) == point
    assert verdict.nearest_point(DECODE, 16, 1, 1) is None


def test_choose_above_the_measured_rows_is_eager() -> None:
    points = [timed(OTHER, M, 0.5, 0.5) for M in (17, 128)]
    points.append(timed(TRITON, 32, 0.4, 0.4))
    assert choose_after(points, problem(32)).backend == "triton"
    assert choose_after(points, problem(33)).backend == "cuda"  # Triton's was measured up to 32
    assert choice_reasons(points, problem(129)) == "129 rows are above the 128 that were measured"
    assert choice_reasons(points[2:], problem(33)) == "33 rows are above the 32 that were measured"


@pytest.mark.parametrize(("rows", "is_measured"), [(1, True), (128, True), (129, False)])
def test_blocks_above_the_measured_rows_are_made_as_without_a_verdict(
    rows: int, is_measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training step has thousands of rows, and takes no longer on the host after `qualify`."""
    points = [timed(OTHER, 128, 0.5, 0.5), timed(TRITON, 32, 0.4, 0.4)]
    verdict = replace(VERDICT, passed=frozenset({OTHER, TRITON}), failed={}, points=points)
    verdicts.set_current(-1, verdict)  # `get_device` of a CPU
    x: Any = OnCuda(torch.ones(rows, 1, 5, dtype=bf16))
    A, B, weight = torch.ones(3, 5), torch.ones(7, 3), torch.ones(7, 5)
    layer = Record(weight.to(bf16), A.to(bf16), B.to(bf16), None, 0.5)
    asked: list[Record] = []
    monkeypatch.setattr(blocks, "_is_eager", lambda x, layer, dtype: not asked.append(layer))
    assert blocks.make_block(x, [layer, layer], [None, None]) is not None
    assert asked == ([layer, layer] if is_measured else [])
    monkeypatch.setattr(blocks, "can_run", lambda x: True)
    monkeypatch.setattr(blocks, "_linear", lambda x, layer: "plain")
    monkeypatch.setattr(blocks, "_is_eager", lambda x, layer, dtype: False)
    with torch.no_grad():
        assert blocks.call_linear(x, layer, None) == (None if is_measured else "plain")


def test_choose_is_the_same_with_and_without_gradients() -> None:
    points = [timed(OTHER, 8, 0.5, 1.1)]
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert "step 1.10" in choice_reasons(points, problem(8))


def test_choose_of_what_passed_but_was_not_timed_is_eager() -> None:
    verdicts.set_current(0, replace(VERDICT, points=[]))
    assert "cuda 'cooperative' was not measured" in selection.choose(problem()).reason


def test_choose_of_a_call_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = choose_after(POINTS, problem())
    monkeypatch.setattr(selection, "_judge", lambda *args: pytest.fail("judged again"))
    assert selection.choose(problem()) is first


def test_choose_asks_what_runs_on_the_tensors_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(cuda, "unsupported_device_reason", lambda *where: asked.append(where))
    verdicts.set_current(1, VERDICT)
    assert selection.choose(problem(device_index=1)).backend == "cuda"
    assert asked == [("cuda", 1)]


def test_choose_takes_no_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing, backend in ((None, "triton"), ("not installed", "eager")):
        monkeypatch.setattr(triton, "unavailable_reason", lambda why=missing: why)
        choice = choose_after([timed(TRITON, 128, 0.5)], problem(128))
        assert choice.backend == backend and (missing or "measured") in choice.reason


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"a_dtype": f32, "b_dtype": f32}, "not checked"),
        ({"a_dtype": f32}, "not checked"),
        ({"dtype": torch.float16}, "not checked"),
        ({"is_quantized": False}, "not checked"),
        ({"extra": ("rng",)}, "dropout"),
        ({"extra": ("row_scale",)}, "its kernels take no row_scale"),
        ({"rank": 129}, "rank 129"),
        ({"x_dtype": torch.float64}, "float64"),
        ({"layout": Layout(columns=True)}, "stored as [K, N]"),
        ({"layout": Layout(unsupported_reason=constraints.NO_BASE)}, "without a base GEMM"),
    ],
    ids=str,
)
def test_choose_of_what_was_not_qualified_is_eager_and_says_why(
    fields: dict[str, Any], word: str
) -> None:
    verdicts.set_current(0, VERDICT)
    choice = selection.choose(problem(**fields))
    assert choice.backend == "eager" and word in choice.reason, choice.reason


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Layout(columns=True), "weights stored as [K, N] are not part of the qualification"),
        (
            Layout(unsupported_reason=constraints.NO_BASE),
            "calls without a base GEMM are not part of the qualification",
        ),
    ],
    ids=str,
)
def test_choose_of_a_layout_that_no_claim_has_is_eager_though_triton_takes_it(
    layout: Layout, reason: str
) -> None:
    points = [timed(TRITON._replace(weight="dense"), 16, 0.5, 0.5)]
    call = problem(16, is_quantized=False)
    assert choose_after(points, call).backend == "triton"
    assert choice_reasons(points, call._replace(layout=layout)) == reason


def test_choose_says_which_claim_failed() -> None:
    verdicts.set_current(0, replace(VERDICT, passed=frozenset(), failed={DECODE: "memory: NaN"}))
    reason = selection.choose(problem()).reason
    assert "cuda 'cooperative' did not qualify: memory: NaN" in reason


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ({"forward": Seconds(0.95, 0.0), "eager_forward": Seconds(1.0, 0.0)}, ""),
        ({"forward": Seconds(0.951, 0.0), "eager_forward": Seconds(1.0, 0.0)}, "measured 0.95 of"),
        ({"step": Seconds(1.001, 0.0), "eager_step": Seconds(1.0, 1.0)}, "step 1.00"),
        ({"forward": Seconds(3.7e-5, 0.0)}, ""),
        ({"forward": Seconds(3.9e-5, 0.0)}, "measured 0.97 of eager's time"),
        ({"forward": Seconds(1e-5, 3.9e-5)}, "measured 0.97 of eager's time"),
        ({"step": Seconds(1.0, 0.0), "eager_step": Seconds(0.0, 1.0)}, ""),
        (
            {"step": Seconds(1.01, 0.0), "eager_step": Seconds(1.0, 0.0)},
            "measured 0.25 of eager's time at 1×4096×4096, step 1.01",
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
    assert f"measured {0.25 if in_graph else 1.25:.2f} of eager's time" in choice.reason


def test_ratios_are_of_the_longer_of_device_and_host() -> None:
    step = Seconds(8.0, 12.0), Seconds(2.0, 16.0)
    point = Point(DECODE, 1, 1, 1, 16, Seconds(3.0, 0.1), Seconds(1.0, 2.0), *step)
    assert point.ratios() == (1.5, 0.75) and point.ratios(in_graph=True) == (3.0, 4.0)
    assert point._replace(step=None).ratios() == (1.5, None)


def everything_qualified() -> Verdict:
    """Every strategy of both backends passed, ten times as fast as eager with any rows."""
    kinds = {(*each[:2], "bfloat16", "bfloat16", "4bit") for each in CANDIDATES}
    groups = [Group(*kind) for kind in kinds]
    points = [timed(group, M, 0.1, 0.1) for group in groups for M in ROWS]
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
    choose = selection.choose
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), LoraConfig(target_modules=["0"]))
    with row_adapters(fuse(model), ["default", "__base__"]):
        model(torch.ones(2, 64))
        on_gpu = lambda problem, *args: choose(problem._replace(device_type="cuda"), *args)  # noqa: E731
        monkeypatch.setattr(selection, "choose", on_gpu)
        (row,) = explain(model, rows=2).rows
    assert row.backend == "eager" and ONE_ADAPTER in row.reason


def test_kernel_that_was_measured_from_17_rows_on_runs_no_fewer() -> None:
    points = [timed(OTHER, 17, 0.5, 0.5), timed(OTHER, 128, 0.5, 0.5)]
    assert choice_reasons(points, problem(16)) == "cuda 'two_pass' was not measured with 16 rows"
    assert choose_after(points, problem(17)).backend == "cuda"
    assert choose_after([timed(TRITON, 16, 0.5, 0.5)], problem(1)).backend == "triton"
