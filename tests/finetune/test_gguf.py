"""`lora-kernels` on GGUF files: training, answers, checks, merges, rank search, export."""

from __future__ import annotations

import json
import re
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import torch

pytest.importorskip("transformers.quantizers.quantizer_gguf")
pytest.importorskip("gguf")
import gguf
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_kernels.finetune import UsageError, export, export_gguf
from lora_kernels.finetune.model import build_skeleton, load_base
from lora_kernels.integrations import FuseCallback, load_gguf
from lora_kernels.peft import explain
from lora_kernels.peft.explain_rows import KERNELS
from tests.finetune.tiny import TEMPLATE, llama, save_model, squares, write_gguf, write_lines
from tests.support.assertions import assert_close_derived

CHAT = split("--steps 4 --batch 2 --lr 0.01 --rank 3 --save-steps 2")
IDS = torch.arange(4, 40)[None]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "Q5_1")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "chats.jsonl", squares(6))


def decoded(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )


def said(shown: str, *patterns: str) -> None:
    shown = " ".join(shown.split())
    for pattern in patterns:
        assert re.search(pattern, shown), (pattern, shown)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_and_what_follows_it(
    dtype: str, file: Path, chats: Path, tmp_path: Path, run: Any
) -> None:
    out = tmp_path / "out"
    argv = ["finetune", "--model", file, "--data", chats, "--out", out, *CHAT, "--compare"]
    shown = run(*argv, "--dtype", dtype, "--target-modules", "all-linear")
    said(
        shown,
        r"14 LoRA layers: our kernels",
        r"gradients of 28 adapters \S+ ≤ 0.0001 ✓",
        r"control: dA doubled \S+ > 0.0001 seen",
        r"updates in 4 SGD steps \S+ ≤ 0.001 ✓",
        rf"file tiny\.gguf, {file.stat().st_size / 1e6:.1f} MB; in memory \S+ MB, \S+ MB of it pac",
        r"adapter off the base model's logits, bit for bit ✓",
        r"loaded again in stock PEFT: .* ✓",
        rf"to serve it: llama-server -m {file} --lora {out}/adapter\.gguf$",
    )
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(file)
    assert AutoTokenizer.from_pretrained(out / "adapter").chat_template == TEMPLATE
    assert gguf.GGUFReader(out / "adapter.gguf").fields["general.type"].contents() == "adapter"
    # The same command goes on from the last step.
    said(run(*argv, "--dtype", dtype, "--target-modules", "all-linear"), "all 4 steps are done")

    how = ["--prompt", "3 squared?", "--max-new-tokens", "4"]
    said(run("generate", "--run", out, *how, "--compare"), r"fused: 4 tokens", "stock PEFT: 4 tok")
    said(run("check", out / "adapter"), "14")
    words = f"merging into the weights of {file}, decoded, over which the adapter was trained"
    merged = run("merge", "--run", out, "--out", tmp_path / "merged", "--dtype", "fp32")
    assert words in merged
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE
    peft = PeftModel.from_pretrained(decoded(file), str(out / "adapter"))
    with torch.no_grad():
        assert_close_derived(model(IDS).logits, peft(IDS).logits, layers=8)

    other = tmp_path / "again.gguf"
    shown = run("export", "--run", out, "--gguf", other)
    said(shown, r"again\.gguf: 14 layers, 0\.\d MB", rf"llama-server -m {file} --lora {other}")
    assert other.read_bytes() == (out / "adapter.gguf").read_bytes()


def test_rank_search(file: Path, chats: Path, tmp_path: Path, run: Any) -> None:
    argv = ["rank-search", "--model", file, "--data", chats, "--out", tmp_path]
    shown = run(*argv, *split("--ranks 2 3 --steps 2 --batch 2 --no-adalora"))
    said(shown, "rank 2: score 0.", "best score")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["finetune", "--quant", "nf4"], "--quant: got nf4, want none: .* has its own codes"),
        (["compare"], "--model: got .*, want a folder: full fine-tuning"),
    ],
)
def test_what_a_file_of_codes_cannot_do_is_refused(
    argv: list[str], words: str, file: Path, chats: Path, tmp_path: Path, run: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    said(run(*argv, "--model", file, "--data", chats, "--out", tmp_path / "o", status=2), words)


def test_a_folder_of_files_is_refused_with_one_of_them(
    file: Path, chats: Path, tmp_path: Path, run: Any
) -> None:
    argv = ["finetune", "--model", file.parent, "--data", chats, "--out", tmp_path / "o"]
    said(run(*argv, status=2), rf"--model: {file.parent} holds GGUF; give a file, such as {file}")


def test_merging_into_the_original_weights_is_refused(file: Path, tmp_path: Path) -> None:
    from lora_kernels.finetune import merge_adapter

    adapter = save_adapter(load_base(file, torch.float32, torch.device("cpu")), tmp_path / "a")
    with pytest.raises(
        UsageError, match=r"onto: .* holds quantized weights alone; give --onto deq"
    ):
        merge_adapter(file, adapter, tmp_path / "merged")


def test_trls_trainer_takes_the_model(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", exc_type=ImportError)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": []}
    trainer = SFTTrainer(
        load_gguf(file),
        SFTConfig(str(tmp_path / "out"), **args),
        train_dataset=Dataset.from_dict({"text": ["Who are you? A small model."] * 4}),
        processing_class=AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        callbacks=[FuseCallback()],
    )
    trainer.train()
    rows = explain(trainer.model).rows
    assert len(rows) == 14 and {row.state for row in rows} == {KERNELS}
    moved = [p for n, p in trainer.model.named_parameters() if "lora_B" in n and p.any()]
    assert len(moved) == 14
    assert (tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors").is_file()


# Export


def save_adapter(base: Any, folder: Path, **config: Any) -> Path:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | config
    model = get_peft_model(base, LoraConfig(**settings))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_()
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def updates(file: Path) -> dict[str, torch.Tensor]:
    """The update of each weight, as llama.cpp adds it: alpha / r · B·A, or B·A without an alpha."""
    reader = gguf.GGUFReader(file)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    found = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        found[name] = (alpha / len(a) if alpha else 1.0) * (b @ a)
    return found


SCALINGS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2}},
    {"alpha_pattern": {"q_proj": 3}},
    {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"0.*q_proj": 16}},
    {"lora_alpha": 0},
    {"alpha_pattern": {"q_proj": 0}},
]


@pytest.mark.parametrize("config", SCALINGS)
def test_llama_cpp_adds_the_update_of_peft(config: dict[str, Any], tmp_path: Path) -> None:
    """In its order of q's rows: of each head the halves alternate."""
    folder = save_model(tmp_path / "model", llama())
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapter = save_adapter(base, tmp_path / "adapter", **config)
    export_gguf(folder, adapter, tmp_path / "a.gguf")
    got = updates(tmp_path / "a.gguf")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(adapter))
    assert len(got) == 4
    for i, layer in enumerate(peft.base_model.model.model.layers):
        q = layer.self_attn.q_proj.get_delta_weight("default")
        rows = q.view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)
        for name, want in (("attn_q", rows), ("ffn_down", None)):
            want = layer.mlp.down_proj.get_delta_weight("default") if want is None else want
            update = got[f"blk.{i}.{name}.weight"]
            assert_close_derived(update, want.detach()) if want.any() else None
            assert update.any() == want.any()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, r"got DoRA's magnitudes \(use_dora\)"),
    ({"bias": "lora_only"}, "got bias='lora_only', want 'none'"),
    ({"lora_bias": True}, r"got biases of lora_B \(lora_bias\)"),
    ({"modules_to_save": ["lm_head"]}, "got modules_to_save"),
    ({"trainable_token_indices": [3]}, "got trainable tokens"),
    ({"target_modules": ["embed_tokens"]}, "got model.embed_tokens, an embedding: llama.cpp abor"),
    ({"target_modules": ["q_proj", "lm_head"]}, "got lm_head, which is tied"),
    ({"init_lora_weights": "olora"}, "got init_lora_weights='olora', which changes the base"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("config, match", REFUSED)
def test_what_the_format_cannot_hold_is_refused(
    config: dict[str, Any], match: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", llama(tie_word_embeddings=True))
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapter = save_adapter(base, tmp_path / "adapter", **config)
    with pytest.raises(UsageError, match=f"^adapter: {match}"):
        export_gguf(folder, adapter, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_other_kinds_of_adapters_are_refused(tmp_path: Path) -> None:
    from peft import LoHaConfig

    folder = save_model(tmp_path / "model", llama())
    base = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(base, LoHaConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    with pytest.raises(UsageError, match="adapter: got LOHA, want LORA"):
        export_gguf(folder, tmp_path / "a", tmp_path / "a.gguf")


def test_experts_are_refused(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 32}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 260, "num_experts": 2}
    sizes |= {"moe_intermediate_size": 32, "num_experts_per_tok": 1}
    folder = save_model(tmp_path / "model", Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)))
    base = AutoModelForCausalLM.from_pretrained(folder)
    config = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    adapter = save_adapter(base, tmp_path / "adapter", **config)
    with pytest.raises(UsageError, match="adapter: got adapters of experts"):
        export_gguf(folder, adapter, tmp_path / "a.gguf")


def test_an_architecture_of_unknown_rows_is_refused(tmp_path: Path) -> None:
    from tests.finetune.tiny import gpt2

    folder = save_model(tmp_path / "model", gpt2())
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapter = save_adapter(base, tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(UsageError, match=r"model: got gpt2, for which .* want one of .*llama"):
        export_gguf(folder, adapter, tmp_path / "a.gguf")


def test_an_adapter_is_replaced_and_no_other_file(file: Path, tmp_path: Path) -> None:
    base = load_base(file, torch.float32, torch.device("cpu"))
    adapter = save_adapter(base, tmp_path / "adapter")
    out = tmp_path / "a.gguf"
    for _ in range(2):
        assert str(export_gguf(file, adapter, out)) == f"{out}: 4 layers, 0.0 MB"
    data = file.read_bytes()
    for other, words in ((file, "is there already and is no adapter"), (adapter, "ends in .gguf")):
        with pytest.raises(UsageError, match=f"^gguf: .*{words}"):
            export_gguf(file, adapter, other)
    assert file.read_bytes() == data
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "a.gguf"}


def test_a_run_that_llama_cpp_cannot_serve_says_so(
    file: Path, chats: Path, tmp_path: Path, run: Any
) -> None:
    argv = ["finetune", "--model", file, "--data", chats, "--out", tmp_path / "o", *CHAT, "--dora"]
    shown = run(*argv)
    said(shown, r"not written for llama\.cpp: adapter: got DoRA's magnitudes")
    assert "llama-server" not in shown


def test_names_are_those_of_ggufs_map(tmp_path: Path) -> None:
    """Each architecture of the list is one that gguf knows, with names for its linear layers."""
    known = set(gguf.MODEL_ARCH_NAMES.values())
    assert set(export.ARCHITECTURES.values()) <= known


def test_skeleton_of_a_file_has_no_weights(file: Path) -> None:
    assert {p.device.type for p in build_skeleton(file).parameters()} == {"meta"}
