"""Rank search: one training a rank, score and efficiency, the base model as it was."""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from lora_kernels.finetune import find_optimal_rank, load_chat
from tests.finetune.tiny import chat, llama, tokenizer, write_lines


def test_ranks(tmp_path: Path) -> None:
    records = [chat(f"{i} and 1?", f"It is {i + 1}.") for i in range(8)]
    data = load_chat(write_lines(tmp_path / "sums.jsonl", records), tokenizer())
    train, val = data.split(0.25)
    model = llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = {"steps": 10, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    found = find_optimal_rank(model, train, val, ranks=(2, 4), preset="legal", **settings)
    for row in found.rows:
        # q of 64 + 64, k and v of 64 + 32, in two layers.
        assert row.parameters == row.rank * 2 * (128 + 2 * 96)
        assert row.score == math.exp(-row.loss)
        assert row.efficiency == pytest.approx(1e6 * row.score / row.parameters)
    assert found.best.score == max(row.score for row in found.rows)
    assert found.most_efficient.rank == 2
    assert "favours small ranks" in str(found)
    assert sum(found.allocation.values()) == 4 * 6  # AdaLoRA: of six layers, the middle rank each
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
