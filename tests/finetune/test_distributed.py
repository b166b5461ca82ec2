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

from lora_kernels.finetune import LoRATrainer, load_chat, newest_checkpoint, training_arguments
from lora_kernels.finetune.trainer import read_metrics
from tests.finetune.test_trainer import adapted, weights
from tests.finetune.tiny import chat, tokenizer, write_lines

SCRIPT = """
import sys
import torch
from tests.finetune.test_distributed import train
torch.set_num_threads(1)
train(*sys.argv[1:])
"""


def train(out: str, file: str) -> None:
    model = adapted()
    args = training_arguments(
        out, steps=6, batch=4 // int(os.environ.get("WORLD_SIZE", "1")), lr=0.5, save_every=3,
        optim="sgd", cpu=True,
    )  # fmt: skip
    trainer = LoRATrainer(
        model, args, train_dataset=load_chat(file, tokenizer()), processing_class=tokenizer()
    )
    trainer.train(resume_from_checkpoint=newest_checkpoint(out) is not None)
    if args.process_index == 0:
        torch.save(weights(model), Path(out, "weights.pt"))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_and_one(tmp_path: Path) -> None:
    """Losses, norms and weights; and what two have saved one goes on with."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    records = [chat(f"{i} squared?", f"It is {i * i}.") for i in range(12)]
    file = write_lines(tmp_path / "chat.jsonl", records)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def results(out: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        lines = [line for line in read_metrics(tmp_path / out / "metrics.jsonl") if "loss" in line]
        return lines, torch.load(tmp_path / out / "weights.pt", weights_only=True)

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path / "two"), str(file)],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    train(str(tmp_path / "one"), str(file))
    alone, both = results("one"), results("two")
    shutil.copytree(tmp_path / "two" / "checkpoint-3", tmp_path / "three" / "checkpoint-3")
    shutil.copy(tmp_path / "two" / "metrics.jsonl", tmp_path / "three")
    train(str(tmp_path / "three"), str(file))
    for lines, found in (both, results("three")):
        # A gradient is the sum of two halves, each of a few hundred float32 terms.
        for got, want in zip(lines, alone[0], strict=True):
            for name in ("loss", "grad_norm", "learning_rate"):
                assert got[name] == pytest.approx(want[name], rel=2.0**-15), (got["step"], name)
        assert found.keys() == alone[1].keys()
        for name, p in alone[1].items():
            assert (found[name] - p).norm() <= 2.0**-15 * p.norm(), name
