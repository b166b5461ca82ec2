"""The command from the arguments to the adapter that stock PEFT loads."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_kernels.cli import main

RUN = ["--rank", "3", "--alpha", "8", "--dropout", "0.1", "--batch", "2", "--seq-len", "16"]
RUN += ["--lr", "0.01", "--prompt", "Line 7 says [the]"]


def command(model_folder: Path, text: Path, out: Path, steps: int) -> list[str]:
    paths = ["--model", str(model_folder), "--data", str(text), "--out", str(out)]
    return ["finetune", *paths, *RUN, "--steps", str(steps)]


def logits_of_stock_peft(model_folder: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32), str(adapter)
    )
    with torch.no_grad():
        return model(input_ids=torch.arange(16)[None]).logits


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_whole_run(dtype, model_folder, text, tmp_path: Path, capsys) -> None:
    run = command(model_folder, text, tmp_path, steps=6)
    run += ["--dtype", dtype, "--sgd-steps", "2", "--timed-steps", "2", "--peft-steps", "4"]
    assert main(run) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        r"trainable: 5,568 of [\d,]+ parameters \(\d+\.\d+%\)",
        r"14 LoRA layers",
        r"gradients of 28 adapters \S+ ≤ 0.0001 ✓",
        r"control: dA doubled \S+ > 0.0001 seen",
        r"LoRA tax \(step / frozen\) 1.000 \d",
        r"fused: step 6/6 loss \d\.\d{4} \d+ tokens/s",
        r"prompt Line 7 says \[the\] before \S.* after \S",
        r"stock PEFT's over 4 steps, whose dropout masks",
        r"0\.0 MB beside the model's 0\.\d MB \(\d+\.\d+%\)",
        r"loaded again in stock PEFT: logits differ by at most \S+, the largest is \S+ ✓",
    ):
        assert re.search(words, shown), words
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    assert weights.stat().st_size < 30_000
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(losses["fused"]) == 6
    assert len(losses["peft"]) == 4
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert "14 LoRA layers" in (tmp_path / "layers.txt").read_text()

    # The same command again finds all of it done.
    assert main(run) == 0
    shown = capsys.readouterr().out
    assert "going on after step 6 of 6" in shown
    assert "comparing" not in shown
    assert json.loads((tmp_path / "losses.json").read_text()) == losses


def test_sigterm_leaves_a_checkpoint_that_loads_and_resumes(
    model_folder: Path, text: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    steps = 40
    once = [*command(model_folder, text, tmp_path / "once", steps), "--no-compare"]
    assert main(once) == 0
    capsys.readouterr()

    # The process signals itself as soon as the first steps are done.
    script = f"""
import os, signal, sys
from lora_kernels.cli import main
from lora_kernels.finetune import train
step = train.torch.nn.utils.clip_grad_norm_
count = 0
def clip(*args):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*args)
train.torch.nn.utils.clip_grad_norm_ = clip
sys.exit(main({[*command(model_folder, text, tmp_path / "twice", steps), "--no-compare"]!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stdout.endswith(
        f"stopped after step 3 of {steps} and saved; the same command goes on from there\n"
    )
    checkpoint = tmp_path / "twice" / "checkpoint-3"
    assert logits_of_stock_peft(model_folder, checkpoint).isfinite().all()

    # Another learning rate is another run.
    again = [*command(model_folder, text, tmp_path / "twice", steps), "--no-compare"]
    assert main([*again, "--lr", "0.02", "--rank", "4"]) == 2
    assert "holds a run with another --rank, --lr; give the same" in capsys.readouterr().err

    assert main(again) == 0
    assert f"going on after step 3 of {steps}" in capsys.readouterr().out
    broken, unbroken = (
        json.loads((tmp_path / name / "losses.json").read_text())["fused"]
        for name in ("twice", "once")
    )
    assert broken == unbroken
    torch.testing.assert_close(
        logits_of_stock_peft(model_folder, tmp_path / "twice" / "adapter"),
        logits_of_stock_peft(model_folder, tmp_path / "once" / "adapter"),
        rtol=0,
        atol=0,
    )
