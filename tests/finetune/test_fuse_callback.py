"""`FuseCallback` in transformers' and TRL's trainers: the unfused run, and a resumed one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from lora_kernels.integrations import FuseCallback
from lora_kernels.peft import FusedLinear
from tests.finetune.tiny import llama, tokenizer

pytest.importorskip("trl", exc_type=ImportError)
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tests.finetune import test_trl as trl_tests

SETTINGS = trl_tests.SETTINGS
TEXTS = [f"{i} squared? It is {i * i}." for i in range(8)]


def fused_layers(model: Any) -> int:
    return sum(isinstance(module, FusedLinear) for module in model.modules())


@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo"])
def test_fuse_callback_step_equals_the_unfused_run(
    trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests of `fuse` on a trainer's model, fused by the callback in its place."""

    def by_callback(trainer: Any, fused: bool, **how: Any) -> Any:
        if fused:
            callback = FuseCallback()
            callback.on_init_end(None, None, None, model=trainer.model)
            trainer.add_callback(callback)
            assert fused_layers(trainer.model) == 14
        return original(trainer, False, **how)

    original = trl_tests.run
    monkeypatch.setattr(trl_tests, "run", by_callback)
    if trainer == "sft":
        trl_tests.test_sft(tmp_path, torch.float64)
    elif trainer == "dpo":
        trl_tests.test_dpo(tmp_path, torch.float64, "peft_config")
    else:
        trl_tests.test_grpo(tmp_path, torch.float64, 0.0)


def sft(out: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    return SFTTrainer(
        llama(), SFTConfig(str(out), max_length=64, **SETTINGS | settings),
        train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer(),
        peft_config=LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", lora_dropout=0.1),
        callbacks=[FuseCallback()],
    )  # fmt: skip


def adapters(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_fuse_callback_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = sft(tmp_path / "whole", **settings)
    assert fused_layers(whole.model) == 14
    whole.train()
    resumed = sft(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert fused_layers(resumed.model) == 14
    want = adapters(whole)
    for name, p in adapters(resumed).items():
        assert torch.equal(p, want[name]), name


def test_fuse_callback_says_once_what_it_fused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lora_kernels"):
        sft(tmp_path, max_steps=1).train()
    said = [record.getMessage() for record in caplog.records if record.name == "lora_kernels"]
    assert said == ["14 of 14 LoRA layers fused"]


def test_fuse_callback_warns_of_layers_left_to_peft(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with caplog.at_level(logging.INFO, logger="lora_kernels"):
        Trainer(model, arguments, callbacks=[FuseCallback()])
    levels = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "lora_kernels"]
    assert levels == [
        ("INFO", "3 of 4 LoRA layers fused"),
        ("WARNING", "1 LoRA layers stay PEFT's: the base weight is trainable"),
    ]


def test_fuse_callback_of_a_model_without_adapters_raises(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match=r"without LoRA layers.*peft_config"):
        Trainer(llama(), arguments, callbacks=[FuseCallback()])


def test_fuse_callback_merges_and_unloads(tmp_path: Path) -> None:
    trainer = sft(tmp_path, max_steps=1, gradient_checkpointing=True)
    trainer.train()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        want = trainer.model.eval()(input_ids=ids).logits
        merged = trainer.model.merge_and_unload()
        got = merged(input_ids=ids).logits
    assert fused_layers(merged) == 0
    # Sums of at most 2**8 float32 products in two orders, through two layers.
    torch.testing.assert_close(got, want, rtol=2.0**-14, atol=2.0**-14)
