"""`lora-kernels check`: its exit status on sound and faulty adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_kernels import peft
from tests.finetune import tiny
from tests.support.peft_models import moe, randomize, train_moe

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny Llama, as if it had been trained."""
    return save(folder, tmp_path / "adapter", randomize)


def save(base: Path, to: Path, change: Callable[[Any], None], **config: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]} | config
    model = get_peft_model(model, LoraConfig(**settings))
    change(model)
    model.save_pretrained(to)
    return to


@pytest.mark.parametrize("more", [(), ("--dtype", "bf16")])
def test_check_of_a_sound_adapter_succeeds(
    adapter: Path, folder: Path, run: Any, more: tuple[str, ...]
) -> None:
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}
    shown = run("check", adapter, "--model", folder, *more)
    assert "LoRA layers, 0 with a fault" in shown and "self_attn.q_proj" in shown
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == before


def test_check_over_a_4bit_base_succeeds(adapter: Path, folder: Path, run: Any) -> None:
    pytest.importorskip("bitsandbytes")
    run("check", adapter, "--model", folder, "--quant", "nf4")


def test_check_of_a_text_runs_the_model_on_it(
    adapter: Path, folder: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = peft.check

    def record(model: Any, batch: Any, **kwargs: Any) -> Any:
        seen.append(batch["input_ids"])
        return original(model, batch, **kwargs)

    monkeypatch.setattr(peft, "check", record)
    text = tmp_path / "text.txt"
    text.write_text("Line 7 says [the] square of 7 is 49.")
    for more in ((), ("--text", text)):
        run("check", adapter, "--model", folder, *more)
    want = tiny.tokenizer()(text.read_text(), return_tensors="pt")["input_ids"]
    assert torch.equal(seen[1], want) and not torch.equal(seen[0], want)
    text.write_text(" ")
    assert "--text: " in run("check", adapter, "--model", folder, "--text", text, status=2)


def test_check_of_a_file_without_a_key_fails(adapter: Path, folder: Path, run: Any) -> None:
    state = load_file(adapter / WEIGHTS)
    key = next(key for key in state if "q_proj.lora_B" in key)
    del state[key]
    save_file(state, adapter / WEIGHTS)
    shown = run("check", adapter, "--model", folder, status=1)
    assert "lora_B.default.weight is not in the file" in shown and "1 with a fault" in shown


def test_check_of_an_untrained_adapter_fails(folder: Path, run: Any, tmp_path: Path) -> None:
    adapter = save(folder, tmp_path / "adapter", lambda model: None)
    assert "lora_B is 0" in run("check", adapter, "--model", folder, status=1)


def test_check_of_a_target_that_matches_nothing_fails(
    folder: Path, run: Any, tmp_path: Path
) -> None:
    targets = ["q_proj", "query"]
    adapter = save(folder, tmp_path / "adapter", randomize, target_modules=targets)
    shown = run("check", adapter, "--model", folder, status=1)
    assert "target_modules: 'query' matches nothing" in shown


def test_check_of_experts_in_the_other_order_fails(run: Any, tmp_path: Path) -> None:
    """The file that PEFT saves, and the same with lora_B stacked expert by expert."""
    model = train_moe(moe())
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    model.save_pretrained(adapter)
    tiny.save_model(base, model.unload())
    assert "0 with a fault" in run("check", adapter, "--model", base)
    state = load_file(adapter / WEIGHTS)
    for key, B in state.items():
        if "experts" in key and "lora_B" in key:
            state[key] = B.view(B.shape[0], -1, 4).transpose(1, 2).reshape(B.shape)
    save_file(state, adapter / WEIGHTS)
    shown = run("check", adapter, "--model", base, status=1)
    assert "4 with a fault" in shown and "PEFT reads it rank by rank" in shown


def test_check_refuses_other_folders_and_other_models(
    adapter: Path, folder: Path, run: Any, tmp_path: Path
) -> None:
    assert "--model is missing" in run("check", adapter, status=2)
    shown = run("check", folder, "--model", folder, status=2)
    assert "holds no adapter_config.json" in shown
    other = tiny.save_model(tmp_path / "other", tiny.llama(hidden_size=48))
    shown = run("check", adapter, "--model", other, status=2)
    assert f"adapter: {adapter}, made for {folder}, does not fit the base: " in shown
    assert "size mismatch for base_model.model" in shown
