"""Runs on a GGUF file, from which PEFT cannot load a base."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from lora_kernels.cli import main
from lora_kernels.finetune.command import quiet
from lora_kernels.finetune.model import load_adapter, load_base
from tests.finetune.tiny import TEMPLATE, chat, write_gguf, write_lines


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.proof)])
def test_auto_peft_loads_the_adapter_of_a_run_on_gguf(
    dtype: str, tmp_path: Path, capsys: Any
) -> None:
    """On the weights that it was trained on, in the run's dtype, bit for bit."""
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "tiny.gguf")
    lines = write_lines(tmp_path / "chat.jsonl", [chat(f"{i}?", f"{i}!") for i in range(4)])
    out = tmp_path / "out"
    run = ["finetune", "--model", str(file), "--data", str(lines), "--out", str(out)]
    assert main([*run, "--steps", "2", "--lr", "0.01", "--dtype", dtype]) == 0
    assert "loaded again" in capsys.readouterr().out
    model = AutoPeftModelForCausalLM.from_pretrained(out / "adapter")
    saved = AutoTokenizer.from_pretrained(out / "adapter")
    assert saved.chat_template == TEMPLATE
    to = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    want = load_adapter(load_base(file, to, torch.device("cpu")), out / "adapter")
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        got = model.eval()(input_ids=ids).logits
        assert got.dtype is to
        # PEFT makes room for as many tokens as the tokenizer has, which may be more.
        assert torch.equal(got[..., :261], want(input_ids=ids).logits)
    # The checkpoints name it too, and the same command finds it there.
    before = (out / "base" / "model.safetensors").stat().st_mtime_ns
    AutoPeftModelForCausalLM.from_pretrained(out / "checkpoint-2")
    assert main([*run, "--steps", "2", "--lr", "0.01", "--dtype", dtype]) == 0
    assert (out / "base" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("is_terminal", [False, True])
def test_quiet_shows_the_bar_of_a_gguf_file_on_a_terminal_alone(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    monkeypatch.setattr(loader, "tqdm", loader.tqdm)  # so that it is put back
    quiet()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    assert list(loader.tqdm(range(3), desc="tensors")) == [0, 1, 2]
    assert ("tensors" in capsys.readouterr().err) is is_terminal


@pytest.mark.proof
def test_commands_without_a_terminal_print_no_bars(tmp_path: Path) -> None:
    """In a process of its own: tqdm asks once, when it is imported."""
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "tiny.gguf")
    command = [
        sys.executable,
        "-m",
        "lora_kernels",
        "finetune",
        "--model",
        str(file),
        "--steps",
        "1",
    ]
    lines = write_lines(tmp_path / "chat.jsonl", [chat(f"{i}?", f"{i}!") for i in range(4)])
    done = subprocess.run(
        [*command, "--model", str(file), "--data", str(lines), "--out", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert "\r" not in shown and "%|" not in shown
    assert max(map(len, shown.splitlines())) < 400
