"""Presets as data, targets by role, and two domains on one base in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from lora_kernels.backends.cpu import native
from lora_kernels.finetune import UsageError
from lora_kernels.finetune.chat import ChatData
from lora_kernels.finetune.presets import (
    PRESETS,
    Preset,
    add_lora_layers,
    create_domain_model,
    find_preset,
    find_targets,
)
from lora_kernels.peft import explain
from tests.finetune.tiny import chat, gpt2, llama, metrics, tokenizer, write_lines

TRAINING: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "save_steps": 2,
    "use_cpu": True,
}


def adapted_names(model: PeftModel, adapter: str = "default") -> set[str]:
    return {
        name.rpartition(".lora_A")[0].rpartition(".")[2]
        for name, _ in model.named_parameters()
        if f"lora_A.{adapter}." in name
    }


@pytest.mark.parametrize(
    ("preset", "rank", "alpha", "dropout", "names"),
    [
        ("medical", 32, 32, 0.1, {"q_proj", "v_proj", "gate_proj", "up_proj"}),
        ("legal", 16, 16, 0.05, {"q_proj", "k_proj", "v_proj"}),
        ("chat", 16, 32, 0.05, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_presets(preset: str, rank: int, alpha: int, dropout: float, names: set[str]) -> None:
    model = add_lora_layers(llama(), preset)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (rank, alpha, dropout)
    assert config.task_type == "CAUSAL_LM"
    assert adapted_names(model) == names
    if native.module:
        explain(model).assert_fused(kernels=True)
    torch.manual_seed(0)  # llama() draws, add_lora_layers must not
    llama()
    after = torch.get_rng_state()
    add_lora_layers(llama(), preset)
    llama()
    assert torch.equal(after, torch.get_rng_state())


def test_a_seed_settles_the_start() -> None:
    weights = []
    for seed in (1, 1, 2):
        model = add_lora_layers(llama(), "legal", seed=seed)
        weights.append(next(p for n, p in model.named_parameters() if "lora_A" in n))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_settings_go_before_the_preset() -> None:
    model = add_lora_layers(
        llama(),
        Preset(4, 8, ("all-linear",), 0.0),
        rank=3,
        alpha=5.0,
        targets=["o", "up_proj"],
        use_rslora=True,
    )
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5.0, 0.0)
    assert adapted_names(model) == {"o_proj", "up_proj"}
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert layer.scaling["default"] == pytest.approx(5.0 / 3**0.5)
    assert len(adapted_names(add_lora_layers(llama(), targets="all-linear"))) == 7


def test_gpt2s_conv1d_is_found() -> None:
    """Attention only, rank 16; the preset's names are none of GPT-2's."""
    model = add_lora_layers(gpt2(), "legal", rank=16)
    assert adapted_names(model) == {"c_attn"}
    assert model.peft_config["default"].fan_in_fan_out
    if native.module:
        explain(model).assert_fused(kernels=True)
    with pytest.warns(UserWarning, match="GPT2LMHeadModel has no layer for gate; the adapter is"):
        model = add_lora_layers(gpt2(), "code")
    names = {n.rpartition(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"base_model.model.transformer.h.{i}.{p}" for i in range(2) for p in parts}


def test_no_match_is_an_error_with_candidates() -> None:
    with pytest.raises(UsageError) as error:
        add_lora_layers(gpt2(), targets=["gate"])
    assert "targets: got gate, which no layer of this GPT2LMHeadModel matches" in str(error.value)
    assert "its linear layers are c_attn, c_proj, c_fc, lm_head" in str(error.value)
    with pytest.raises(UsageError, match="is named q_prj; did you mean q_proj"):
        add_lora_layers(llama(), targets=["q_prj"])
    with pytest.raises(UsageError, match="its linear layers are none"):
        find_targets(nn.Sequential(nn.ReLU()), ("q",))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"preset": "medcial"}, "preset: got 'medcial'; did you mean 'medical'"),
        ({"preset": "x"}, "preset: got 'x'; want one of medical, legal, chat, code"),
        ({"rank": 0}, "rank: got 0"),
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"dropout": 1.0}, r"dropout: got 1\.0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        add_lora_layers(llama(), **settings)


def test_every_preset_is_found_by_name() -> None:
    assert [find_preset(name) for name in PRESETS] == list(PRESETS.values())


def test_two_domains_on_one_base(tmp_path: Path) -> None:
    """Trained one after the other and switched; the base as it was. A batch of both is served in
    acceptance/test_domain_models.py."""
    law = [chat(f"Is {i} lawful?", f"Clause {i} says so.") for i in range(8)]
    code = [{"prompt": f"x = {i}; print(x)  # ", "completion": str(i)} for i in range(8)]
    files = {
        "legal": write_lines(tmp_path / "law.jsonl", law),
        "code": write_lines(tmp_path / "code.jsonl", code),
    }
    model: Any = llama()
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        base_logits = model.eval()(ids).logits
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = {}
    for name, file in files.items():
        model = create_domain_model(
            model, name, file, out=tmp_path / name, tokenizer=tokenizer(), training=TRAINING
        )
        assert model.active_adapters == [name]
        assert len(metrics(tmp_path / name)) == 4
        if name == "legal":
            trained = {n: p.detach().clone() for n, p in model.named_parameters() if ".legal." in n}
    assert any(p.any() for n, p in trained.items() if "lora_B" in n)
    for n, p in model.named_parameters():
        if n in trained:  # the second domain's training left the first one's adapter alone
            assert torch.equal(p, trained[n]), n
    for n, p in before.items():
        now = model.get_base_model().state_dict()
        assert torch.equal(p, now.get(n, now.get(f"{n[:-7]}.base_layer.weight"))), n

    alone = {}
    with torch.no_grad():
        for name in files:
            model.set_adapter(name)
            alone[name] = model(ids).logits
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, base_logits)
    assert (alone["code"] - alone["legal"]).norm() > 2.0**-8 * base_logits.norm()

    # The saved adapters are stock PEFT's, each adapter alone in its folder.
    for name in files:
        folder = tmp_path / name / "adapter"
        assert [path.name for path in folder.iterdir() if path.is_dir()] == [name]
        stock = PeftModel.from_pretrained(llama(), str(folder / name)).eval()
        with torch.no_grad():
            got = stock(ids).logits
        # A few hundred float32 products through two layers, in another order.
        assert (got - alone[name]).norm() <= 2.0**-15 * got.norm()


def test_a_domain_goes_on_from_its_checkpoint(data: ChatData, tmp_path: Path) -> None:
    """An adapter that is not called "default", which PEFT saves in a folder of its own: the same
    bits as a run that was not broken off, and the best one found again at the end."""
    weights = {}
    every = {"eval_steps": 1, "save_steps": 1, "lr_scheduler_type": "constant"}
    for name, steps in (("once", 4), ("twice", 2), ("twice", 4)):
        how: Any = {"out": tmp_path / name, "val": data, "patience": 9}
        how["training"] = TRAINING | every | {"max_steps": steps}
        made = create_domain_model(llama(), "legal", data, **how)
        weights[name] = {n: p for n, p in made.named_parameters() if "lora" in n}
    for n, p in weights["once"].items():
        assert torch.equal(weights["twice"][n], p), n


def test_names_that_are_taken(tmp_path: Path) -> None:
    model = add_lora_layers(llama(), "legal", adapter_name="legal")
    with pytest.raises(UsageError, match="adapter_name: 'legal' is on the model already"):
        add_lora_layers(model, "legal", adapter_name="legal")
    with pytest.raises(UsageError, match="tokenizer: got none"):
        create_domain_model(llama(), "legal", tmp_path / "x.jsonl", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
