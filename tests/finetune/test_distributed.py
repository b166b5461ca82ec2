"""`torchrun` with two processes is one process with the batch of both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels.finetune.trainer import read_metrics
from tests.finetune.tiny import chat, write_lines

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from lora_kernels.finetune import LoRATrainer, load_chat, newest_checkpoint, training_arguments
from tests.finetune.test_trainer import adapted, weights
from tests.finetune.tiny import tokenizer

torch.set_num_threads(1)
out, file = Path(sys.argv[1]), sys.argv[2]
model = adapted()
args = training_arguments(
    out, steps=6, batch=4 // int(os.environ.get("WORLD_SIZE", 1)), lr=0.5, save_every=3,
    optim="sgd", cpu=True,
)
trainer = LoRATrainer(
    model, args, train_dataset=load_chat(file, tokenizer()), processing_class=tokenizer()
)
trainer.train(resume_from_checkpoint=newest_checkpoint(out) is not None)
if args.process_index == 0:
    torch.save(weights(model), out / "weights.pt")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_and_one(tmp_path: Path) -> None:
    """Losses, norms and weights; and what two have saved one goes on with."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    records = [chat(f"{i} squared?", f"It is {i * i}.") for i in range(12)]
    file = write_lines(tmp_path / "chat.jsonl", records)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(out: str, *launcher: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        command = [sys.executable, *launcher, str(script), str(tmp_path / out), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        lines = [line for line in read_metrics(tmp_path / out / "metrics.jsonl") if "loss" in line]
        return lines, torch.load(tmp_path / out / "weights.pt", weights_only=True)

    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    alone, both = run("one"), run("two", *two)
    shutil.copytree(tmp_path / "two" / "checkpoint-3", tmp_path / "three" / "checkpoint-3")
    shutil.copy(tmp_path / "two" / "metrics.jsonl", tmp_path / "three")
    for lines, weights in (both, run("three")):
        # A gradient is the sum of two halves, each of a few hundred float32 terms.
        for got, want in zip(lines, alone[0], strict=True):
            for name in ("loss", "grad_norm", "learning_rate"):
                assert got[name] == pytest.approx(want[name], rel=2.0**-15), (got["step"], name)
        assert weights.keys() == alone[1].keys()
        for name, p in alone[1].items():
            assert (weights[name] - p).norm() <= 2.0**-15 * p.norm(), name
