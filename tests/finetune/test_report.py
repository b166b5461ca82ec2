import io
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from lora_kernels.finetune import report
from lora_kernels.finetune.report import Row
from lora_kernels.finetune.trainer import plot_losses


def test_lines_of_a_log_are_not_wrapped_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", log := io.StringIO())
    report.new_console().print("x" * 90 + " " + "y" * 20)
    assert log.getvalue() == "x" * 90 + " " + "y" * 20 + "\n"
    monkeypatch.setenv("COLUMNS", "40")
    assert report.new_console().width == 40


def printed(renderable: object, width: int = 80) -> str:
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_the_table_fits_80_columns() -> None:
    table = report.comparison_table(
        [
            Row("seconds a step", 0.987, None, "11.134", "12.123", "11.223", ratio=True),
            Row("gradients of 420 adapters", 2.3e-3, 1e-4),
            Row("updates in 4 SGD steps", 2.3e-5, 1e-3),
            Row("dA zeroed", 0.31, 1e-4, control=True),
            Row("dA doubled", 0.0, 1e-4, control=True),
        ],
        "SmolLM2-135M-Instruct.Q4_1, rank 16, fp32",
    )
    lines = printed(table).splitlines()
    assert not any("…" in line for line in lines)
    assert any(line.split()[-2:] == ["11.223", "×0.987"] for line in lines)
    assert any(line.split()[-4:] == ["2.3e-05", "≤", "0.001", "✓"] for line in lines)
    assert any(line.split()[-4:] == ["2.3e-03", "≤", "0.0001", "✗"] for line in lines)
    assert any(line.startswith("control: dA zeroed") and "> 0.0001 seen" in line for line in lines)
    assert any(
        line.startswith("control: dA doubled") and "> 0.0001 missed" in line for line in lines
    )


def test_a_row_under_load_is_no_result() -> None:
    """From a tenth of the processors on."""
    rows = [
        Row("milliseconds a step", 0.9, None, "11134.0", "12123.0", "11223.0", True, others=0.35),
        Row("milliseconds a token", 0.8, None, "1.0", "2.0", "3.0", ratio=True, others=0.1),
        Row("MB a step adds", 0.7, None, "11134.0", "12123.0", "11223.0", ratio=True),
    ]
    lines = printed(report.comparison_table(rows, "x")).splitlines()
    assert not any("…" in line for line in lines) and max(map(len, lines)) <= 80
    marked = [line for line in lines if line.rstrip().endswith("no result")]
    assert [line.split()[:3] for line in marked] == [["milliseconds", "a", "step"]]
    assert report.load_lines(rows) == [
        "milliseconds a step: under load, other programs took 35% of the processors: no result"
    ]


def test_brackets_in_an_answer_are_text() -> None:
    assert "[exit] [/to the Queen]" in printed(
        report.facts_table({"after": "[exit] [/to the Queen]"})
    )


def shown(console: Console, done: int, steps: range, total: int, data: object = None) -> str:
    """Return what Progress prints of these steps of 12 rows, whose losses are 1 / step."""
    progress = report.Progress(console, "fused")
    state = TrainerState(global_step=done, max_steps=total)
    sizes = {"train_batch_size": 2, "gradient_accumulation_steps": 3, "world_size": 2}
    with console.capture() as capture, progress.bar:
        loader = SimpleNamespace(dataset=data)
        progress.on_train_begin(SimpleNamespace(**sizes), state, None, train_dataloader=loader)
        for state.global_step in steps:
            progress.on_log(None, state, None, {"loss": 1 / state.global_step})
    return capture.get()


def test_progress_off_a_terminal_is_a_few_lines() -> None:
    lines = shown(Console(width=80, force_terminal=False), 0, range(1, 41), 40).splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("fused: step 40/40  loss 0.0250  ")
    assert lines[-1].endswith(" rows/s")  # the data do not count their tokens


@pytest.mark.parametrize(
    ("data", "speed"),
    [
        (None, "6 rows/s"),
        (SimpleNamespace(report=SimpleNamespace(tokens=70, examples=5)), "84 tokens/s"),
    ],
    ids=["rows", "tokens"],
)
@pytest.mark.parametrize("done", [0, 10], ids=["from the start", "resumed"])
def test_progress_speed_is_of_all_rows_since_the_run_began_or_went_on(
    done: int, data: object, speed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 12 rows, of 14 tokens each on average, takes 2 seconds."""
    clock = itertools.count(100.0, 2.0)
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(clock))
    console = Console(width=80, force_terminal=False)
    lines = shown(console, done, range(done + 1, 13), 12, data).splitlines()
    assert lines[-1] == f"fused: step 12/12  loss 0.0833  {speed}"
    assert len(lines) == 12 - done and all(line.endswith(f"  {speed}") for line in lines)


def test_progress_on_a_terminal_shows_loss_speed_and_time_left() -> None:
    said = shown(Console(width=100, force_terminal=True), 1, range(2, 3), 4)
    for words in ("fused", "2/4", "loss 0.5000", "rows/s", "left"):
        assert words in said


@pytest.mark.parametrize("terminal", [False, True])
def test_stages_are_lines_or_a_bar(terminal: bool) -> None:
    console = Console(width=100, force_terminal=terminal)
    with console.capture() as capture, report.show_stages(console, "x", 3) as advance:
        for stage in ("one", "one", "two"):
            advance(stage)
    said = capture.get()
    assert "3/3" in said if terminal else said.splitlines() == ["x: one", "x: two"]


def test_progress_stops_and_saves_on_a_signal() -> None:
    for caught in ([], [15]):
        progress = report.Progress(Console(), "fused")
        progress.caught = caught
        state = TrainerState(global_step=3, max_steps=9)
        control = progress.on_step_end(None, state, TrainerControl())
        assert control.should_training_stop == control.should_save == bool(caught)


def test_curves(tmp_path: Path) -> None:
    file = tmp_path / "loss.png"
    lines = [{"step": i, "loss": loss} for i, loss in enumerate([3.0, 2.5, 2.2], 1)]
    plot_losses(file, lines)
    assert file.read_bytes().startswith(b"\x89PNG")
