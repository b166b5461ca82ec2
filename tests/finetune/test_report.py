import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from lora_kernels.finetune import report
from lora_kernels.finetune.compare import Row
from lora_kernels.finetune.trainer import plot_metrics


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
            Row("loss before the first step", 1.2e-7, None, "", "3.54959", "3.54959"),
            Row("seconds a step, p80", None, None, "11.134", "12.123", "11.223"),
            Row("bf16 gradients, off fp32", 0.987, 1.25, "", "0.0769", "0.0771", ratio=True),
            Row("gradients of 420 adapters", 2.3e-3, 1e-4),
            Row("mask off dx", 0.31, 1e-4, control=True),
            Row("dA doubled", 0.0, 1e-4, control=True),
        ],
        "SmolLM2-135M-Instruct.Q4_1, rank 16, fp32",
    )
    lines = printed(table).splitlines()
    assert not any("…" in line for line in lines)
    assert any(line.split()[-5:] == ["0.0771", "×0.987", "≤", "1.25", "✓"] for line in lines)
    assert any(line.split()[-4:] == ["2.3e-03", "≤", "0.0001", "✗"] for line in lines)
    assert any(
        line.startswith("control: mask off dx") and "> 0.0001 seen" in line for line in lines
    )
    assert any(
        line.startswith("control: dA doubled") and "> 0.0001 missed" in line for line in lines
    )


def test_brackets_in_an_answer_are_text() -> None:
    assert "[exit] [/to the Queen]" in printed(
        report.facts_table({"after": "[exit] [/to the Queen]"})
    )


def shown(console: Console, done: int, steps: range, total: int) -> str:
    """Return what Progress prints of these steps, whose losses are 1 / step."""
    progress = report.Progress(console, "fused")
    state = TrainerState(global_step=done, max_steps=total)
    sizes = {"train_batch_size": 2, "gradient_accumulation_steps": 3, "world_size": 2}
    with console.capture() as capture, progress.bar:
        progress.on_train_begin(SimpleNamespace(**sizes), state, None)
        for state.global_step in steps:
            progress.on_log(None, state, None, {"loss": 1 / state.global_step})
    return capture.get()


def test_progress_off_a_terminal_is_a_few_lines() -> None:
    lines = shown(Console(width=80, force_terminal=False), 0, range(1, 41), 40).splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("fused: step 40/40  loss 0.0250  ")
    assert lines[-1].endswith(" rows/s")  # the data do not count their tokens


def test_progress_on_a_terminal_shows_loss_speed_and_time_left() -> None:
    said = shown(Console(width=100, force_terminal=True), 1, range(2, 3), 4)
    for words in ("fused", "2/4", "loss 0.5000", "rows/s", "left"):
        assert words in said


def test_progress_stops_after_its_steps_and_saves_on_a_signal() -> None:
    def ended(step: int, most: float, caught: list[int]) -> tuple[bool, bool]:
        progress = report.Progress(Console(), "fused")
        progress.most, progress.caught = most, caught
        state = TrainerState(global_step=step, max_steps=9)
        control = progress.on_step_end(None, state, TrainerControl())
        return control.should_training_stop, control.should_save

    assert ended(3, 4, []) == (False, False)
    assert ended(4, 4, []) == (True, False)
    assert ended(3, 4, [15]) == (True, True)


def test_curves(tmp_path: Path) -> None:
    file = tmp_path / "loss.png"
    lines = [{"step": i, "loss": loss} for i, loss in enumerate([3.0, 2.5, 2.2], 1)]
    plot_metrics(file, lines, [3.0, 2.5], "tiny, LoRA rank 3")
    assert file.read_bytes().startswith(b"\x89PNG")
