"""transformers' Trainer on `fuse(model, loss=True)`: trains and evaluates as the unfused model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from lora_kernels.integrations import FuseCallback
from lora_kernels.peft import explain
from tests.finetune.tiny import llama

ROWS = torch.randint(4, 260, (12, 17), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"max_steps": 3, "learning_rate": 0.1, "optim": "sgd", "use_cpu": True}
SETTINGS |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "report_to": []}
SETTINGS |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}


def rows() -> list[dict[str, Any]]:
    """Sequences of labels, some ignored, so that `num_items_in_batch` counts."""
    labels = ROWS.clone()
    for i, row in enumerate(labels):
        row[: i % 5 + 1] = -100
    return [{"input_ids": a, "labels": b} for a, b in zip(ROWS, labels, strict=True)]


def accuracy(prediction: Any) -> dict[str, float]:
    logits, labels = prediction.predictions, prediction.label_ids
    assert logits.shape == (*labels.shape, 260)
    return {"accuracy": float(numpy.mean(logits[:, :-1].argmax(-1) == labels[:, 1:]))}


def run(out: Path, fused: bool, metrics: bool, **changes: Any) -> tuple[dict[str, Any], Any]:
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "lm_head"])
    model = get_peft_model(llama(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    args = TrainingArguments(str(out), prediction_loss_only=not metrics, **SETTINGS | changes)
    callbacks = [FuseCallback(loss=True)] if fused else []
    compute = {"compute_metrics": accuracy} if metrics else {}
    data = {"train_dataset": rows(), "eval_dataset": rows()[:5]}
    trainer = Trainer(model, args, callbacks=callbacks, **data, **compute)
    trainer.train()
    if fused:
        explain(model).assert_fused()
        assert explain(model).losses
    found: dict[str, Any] = trainer.evaluate()
    losses = {f"loss {e['step']}": e["loss"] for e in trainer.state.log_history if "loss" in e}
    kept = {n: v for n, v in found.items() if n in ("eval_loss", "eval_accuracy")}
    return losses | kept, {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("changes", [{}, {"label_smoothing_factor": 0.1}], ids=str)
@pytest.mark.parametrize("metrics", [False, True])
def test_trainer_with_a_fused_loss_is_as_without(
    tmp_path: Path, metrics: bool, changes: dict[str, Any]
) -> None:
    """SGD in float32: what the adapters have become is a sum of their gradients."""
    (got, after), (want, wanted) = (
        run(tmp_path / str(fused), fused, metrics, **changes) for fused in (True, False)
    )
    assert got.keys() == want.keys() and len(got) == 4 + metrics
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-5), name
    for name, p in wanted.items():
        torch.testing.assert_close(after[name], p, rtol=1e-4, atol=1e-5)
