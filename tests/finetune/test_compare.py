"""The comparison passes for the fused model, and for nothing that is wrong."""

import itertools
import math
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.finetune import Preset, TrainingError
from lora_kernels.finetune import compare as module
from lora_kernels.finetune.chat import ChatData, load_chat
from lora_kernels.finetune.compare import (
    GRADIENT_LIMIT,
    PIECES,
    STEP_MEMORY,
    UPDATE_LIMIT,
    build_pair,
    compare,
    draw_batch,
    largest_rms,
    measure_steps,
    relative_rms,
    train_sgd,
)
from lora_kernels.finetune.model import load_tokenizer
from lora_kernels.finetune.report import Row

LORA = {"preset": Preset(3, 8, ("all-linear",), 0.0), "seed": 0}
CPU = torch.device("cpu")
MB = 1_000_000


@pytest.fixture(scope="session")
def data(model_folder: Path, text: Path) -> ChatData:
    """Read plain text, in place of chats."""
    return load_chat(text, load_tokenizer(model_folder), max_length=16)


@pytest.fixture
def batches(data: ChatData) -> list[module.Batch]:
    return [draw_batch(data, step, 2, 0, CPU) for step in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_agrees_and_controls_are_seen(base: nn.Module, data: ChatData, dtype) -> None:
    for p in base.parameters():
        p.data = p.data.to(dtype)
    pieces: list[str] = []
    rows = compare(base, data, lora=LORA, batch_size=2, advance=pieces.append)
    assert {row.what: (row.ok, row.control) for row in rows} == {
        "gradients of 28 adapters": (True, False),
        "dA doubled": (True, True),
        "dA zeroed": (True, True),
        "updates in 4 SGD steps": (True, False),
        "milliseconds a step": (None, False),
        STEP_MEMORY: (None, False),
        "milliseconds a token": (None, False),
    }
    assert len(pieces) == PIECES
    assert list(Counter(pieces)) == [
        "gradients",
        "SGD updates",
        "times of a step",
        "memory of a step",
        "times of a token",
    ]
    for row in (row for row in rows if row.what.startswith("milliseconds")):
        times = [float(cell) for cell in (row.frozen, row.peft, row.fused)]
        assert min(times) > 0 and row.ratio
    assert {p.dtype for p in base.parameters()} == {dtype}
    assert not any(m._forward_hooks for m in base.modules())


def test_float32_weights_are_freed_before_the_times(
    base: nn.Module, data: ChatData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are twice the base's bytes, on a card that is full."""
    copies: list[weakref.ref[nn.Module]] = []
    alive: list[bool] = []
    cast, time_steps = module.cast_parameters, module.time_steps

    def kept(model: nn.Module, dtype: torch.dtype) -> nn.Module:
        copies.append(weakref.ref(cast(model, dtype)))
        return model

    def seen(*args) -> Row:
        alive.extend(copy() is not None for copy in copies)
        return time_steps(*args)

    monkeypatch.setattr(module, "cast_parameters", kept)
    monkeypatch.setattr(module, "time_steps", seen)
    compare(base.bfloat16(), data, lora=LORA, batch_size=2)
    assert alive == [False]


@pytest.mark.parametrize(("weight", "words"), [(float("nan"), "loss is nan"), (0.0, "are all 0")])
def test_compare_on_a_base_without_gradients_is_an_error(base, data, weight, words: str) -> None:
    """Two zeros, or two NaN, would agree."""
    base.get_output_embeddings().weight.data.fill_(weight)
    with pytest.raises(TrainingError, match=words):
        compare(base, data, lora=LORA, batch_size=2)


def spoil(model: nn.Module, factor: float) -> None:
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.register_hook(lambda grad: grad * factor)


@pytest.mark.parametrize("factor", [2.0, 0.0])
def test_a_wrong_fused_model_fails(base, data, factor: float, monkeypatch) -> None:
    def fuse_wrongly(model: nn.Module, linears: bool = False) -> nn.Module:
        spoil(model, factor)
        return model

    monkeypatch.setattr(module, "fuse", fuse_wrongly)
    rows = compare(base, data, lora=LORA, batch_size=2)
    failed = {row.what for row in rows if row.ok is False}
    assert {"gradients of 28 adapters", "updates in 4 SGD steps"} <= failed


def test_updates_notice_a_doubled_gradient(base: nn.Module, batches) -> None:
    stock, fused = build_pair(base, base, **LORA)
    spoil(fused, 2.0)
    want, got = (train_sgd(model, batches) for model in (stock, fused))
    assert largest_rms(got, want) > 100 * UPDATE_LIMIT


def test_b_is_random_so_that_dA_counts(base: nn.Module, batches) -> None:
    stock, _ = build_pair(base, base, **LORA)
    gradients = module.loss_and_gradients(stock, batches[0])[1]
    assert all(g.abs().max() > 0 for g in gradients.values())


def test_nan_fails_and_is_not_taken_for_a_control_that_was_seen() -> None:
    nan = torch.full((3,), float("nan"))
    assert Row("x", relative_rms(nan, torch.ones(3)), GRADIENT_LIMIT).ok is False
    assert Row("x", float("nan"), GRADIENT_LIMIT, control=True).ok is False
    many = {"a": torch.ones(3), "b": torch.ones(3)}
    assert not largest_rms({"a": nan, "b": torch.ones(3)}, many) <= GRADIENT_LIMIT
    assert not largest_rms({"a": torch.ones(3), "b": nan}, many) <= GRADIENT_LIMIT


def test_a_row_at_its_limit_is_within_and_a_control_is_not_seen() -> None:
    assert Row("x", 0.5, 0.5).ok is True
    assert Row("x", 0.5, 0.5, control=True).ok is False
    assert Row("x", 0.5).ok is Row("x", None, 0.5).ok is None


def test_times_are_medians_and_compared_with_peft() -> None:
    seconds = {"frozen": [1.0, 9.0, 1.0], "peft": [2.0, 2.0, 2.0], "fused": [1.5, 1.5, 7.0]}
    row = module.timed_row("x", seconds, 1e3, ".0f")
    assert (row.frozen, row.peft, row.fused) == ("1000", "2000", "1500")
    assert row.difference == 0.75 and row.difference_text == "×0.750"


class Keeper:
    """Stands for a model whose step keeps so many bytes from forward to backward."""

    def __init__(self, size: int) -> None:
        self.size, self.calls = size, list[str]()

    def __call__(self, **batch: Any) -> SimpleNamespace:
        self.kept = torch.ones(self.size, dtype=torch.uint8)
        return SimpleNamespace(loss=self)

    def backward(self) -> None:
        del self.kept

    def zero_grad(self, set_to_none: bool) -> None:
        self.calls.append("zero_grad")

    def enable_input_require_grads(self) -> None:
        self.calls.append("enable")

    def disable_input_require_grads(self) -> None:
        self.calls.append("disable")


def measure(sizes: Mapping[str, int], pieces: list[None]) -> Row | None:
    models = {name: Keeper(size) for name, size in sizes.items()}
    row = measure_steps(models, {"input_ids": torch.zeros(1)}, lambda: pieces.append(None))
    rounds = module.MEMORY_ROUNDS
    calls = ["enable", *["zero_grad"] * rounds, "disable", "zero_grad"]
    assert all(model.calls == calls for model in models.values())
    assert len(pieces) == 3 * rounds
    return row


def test_measure_steps_sees_the_bytes_that_each_step_keeps() -> None:
    """Each size in its own column, and ours over PEFT's: exchanged ones would be seen."""
    row = measure({"frozen": 50 * MB, "peft": 200 * MB, "fused": 120 * MB}, [])
    assert row is not None
    for cell, size in ((row.frozen, 50), (row.peft, 200), (row.fused, 120)):
        assert size - 3 < float(cell) < size + 5  # resident pages are counted in batches
    assert row.what == STEP_MEMORY and row.ratio and row.ok is None
    assert row.difference == pytest.approx(120 / 200, rel=0.04)


def test_measure_steps_takes_the_smallest_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = itertools.chain((70, 55, 90), (60, 50, 30), (65, 60, 35))
    monkeypatch.setattr(module.process_memory, "reset_peak", lambda device: 10 * MB)
    monkeypatch.setattr(module.process_memory, "peak", lambda device: next(peaks) * MB)
    row = measure({"frozen": 1, "peft": 1, "fused": 1}, [])
    assert row == Row(STEP_MEMORY, 0.5, None, "50.0", "40.0", "20.0", ratio=True)


def test_step_memory_is_counted_from_what_was_in_use_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_use = itertools.count(10 * MB, 10 * MB)  # each step leaves 10 MB
    monkeypatch.setattr(module.process_memory, "reset_peak", lambda device: next(in_use))
    monkeypatch.setattr(module.process_memory, "peak", lambda device: 200 * MB)
    row = measure({"frozen": 1, "peft": 1, "fused": 1}, [])
    assert row is not None and (row.frozen, row.peft, row.fused) == ("130.0", "120.0", "110.0")


@pytest.mark.parametrize(("peft", "ratio"), [(0, None), (MB - 1, None), (MB, 2.0)])
def test_measure_steps_gives_no_ratio_below_the_resolution(
    peft: int, ratio: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = itertools.cycle((0, peft, 2 * MB))
    monkeypatch.setattr(module.process_memory, "reset_peak", lambda device: 0)
    monkeypatch.setattr(module.process_memory, "peak", lambda device: next(peaks))
    row = measure({"frozen": 1, "peft": 1, "fused": 1}, [])
    assert row is not None and row.difference == ratio and row.fused == "2.0"


def test_measure_steps_without_a_report_gives_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.process_memory, "reset_peak", lambda device: None)
    assert measure({"frozen": 1, "peft": 1, "fused": 1}, []) is None


@pytest.mark.parametrize(("seconds", "others"), [(0.6, 0.35), (0.4, None)], ids=["long", "short"])
def test_note_load_judges_what_takes_long_enough(
    seconds: float, others: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux counts CPU time in steps of 10 ms."""
    clock = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(module, "watch_others", lambda: lambda: 0.35)
    row = module.note_load(lambda what: Row(what), "x")
    assert row == Row("x", others=others)


def test_load_is_watched_while_the_calls_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def watch() -> Any:
        events.append("start")
        return lambda: events.append("end") or 0.35

    def calls() -> Row:
        events.append("calls")
        return Row("x")

    monkeypatch.setattr(module, "watch_others", watch)
    module.note_load(calls)
    assert events == ["start", "calls", "end"]


def test_compare_notes_the_load_of_its_times_alone(
    base: nn.Module, data: ChatData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "JUDGED_SECONDS", 0.0)
    shares = iter([0.35, 0.05])
    monkeypatch.setattr(module, "watch_others", lambda: lambda: next(shares))
    rows = compare(base, data, lora=LORA, batch_size=2)
    assert {row.what: row.others for row in rows if row.others is not None} == {
        "milliseconds a step": 0.35,
        "milliseconds a token": 0.05,
    }
    assert [row.what for row in rows if row.under_load] == ["milliseconds a step"]


def test_seed_and_step_settle_a_batch(data: ChatData) -> None:
    def drawn(step: int, seed: int) -> Tensor:
        return draw_batch(data, step, 8, seed, CPU)["input_ids"]

    assert drawn(3, 1).equal(drawn(3, 1))
    assert not drawn(3, 1).equal(drawn(3, 2))
    assert not drawn(3, 1).equal(drawn(2, 1))


def test_relative_rms_by_hand() -> None:
    assert relative_rms(torch.tensor([0.0, 6.0]), torch.tensor([0.0, 4.0])) == 0.5
    assert math.isnan(relative_rms(torch.zeros(2), torch.zeros(2)))
    zero, one = torch.zeros(1), torch.ones(1)
    assert largest_rms({"a": zero, "b": one}, {"a": zero, "b": one}) == 0.0
    assert math.isnan(largest_rms({"a": zero}, {"a": zero}))
    assert relative_rms(torch.ones(2), torch.zeros(2)) == float("inf")
    with pytest.raises(ValueError, match="other names"):
        largest_rms({"a": torch.ones(1)}, {"b": torch.ones(1)})
