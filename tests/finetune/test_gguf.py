"""`lora-kernels` on GGUF files: training, answers, checks, merges, rank search, export."""

from __future__ import annotations

import copy
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
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lora_kernels.finetune import UsageError, compare, export, export_gguf, load_chat, recipe
from lora_kernels.finetune.model import build_skeleton, load_base, load_tokenizer
from lora_kernels.finetune.options import Options
from lora_kernels.finetune.report import Row, new_console
from lora_kernels.integrations import FuseCallback, load_gguf
from lora_kernels.peft import explain
from lora_kernels.peft.explain_rows import KERNELS
from lora_kernels.peft.packed import decode_packed, has_packed
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
    model.save_pretrained(folder)  # as a user: PEFT then saves adapted embeddings too
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


def test_each_field_without_a_place_and_each_start_that_changes_the_base_is_refused() -> None:
    plain = LoraConfig(target_modules=["q_proj"])
    assert export._FIELDS.keys() <= vars(plain).keys()
    for name in export._FIELDS:
        config = copy.deepcopy(plain)
        setattr(config, name, [1])
        with pytest.raises(UsageError, match=rf"\({name}\), for which .* no place; merge it"):
            export.check_config(config)
    for start in ("pissa", "pissa_niter_16", "olora", "corda", "loftq"):
        config = copy.deepcopy(plain)
        config.init_lora_weights = start
        with pytest.raises(UsageError, match=f"got init_lora_weights='{start}'"):
            export.check_config(config)
    for start in (True, "gaussian", "eva", "orthogonal"):
        config = copy.deepcopy(plain)
        config.init_lora_weights = start
        export.check_config(config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_are_float32_whatever_the_adapters_dtype(
    dtype: torch.dtype, file: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(load_base(file, torch.float32, torch.device("cpu")), tmp_path / "a")
    state = load_file(adapter / "adapter_model.safetensors")
    rounded = {key: t.to(dtype) for key, t in state.items()}
    save_file(rounded, adapter / "adapter_model.safetensors", {"format": "pt"})
    export_gguf(file, adapter, tmp_path / "a.gguf")
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        assert t.tensor_type is gguf.GGMLQuantizationType.F32
        if t.name == "blk.1.ffn_down.weight.lora_a":
            assert torch.equal(torch.from_numpy(t.data.copy()), rounded[key].float())


@pytest.mark.parametrize("name", ["write_header_to_file", "write_tensors_to_file"])
def test_an_error_while_writing_leaves_what_was_there(
    name: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(load_base(file, torch.float32, torch.device("cpu")), tmp_path / "a")
    out = tmp_path / "out" / "a.gguf"
    export_gguf(file, adapter, out)
    data = out.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(gguf.GGUFWriter, name, fail)
    with pytest.raises(OSError, match="no space"):
        export_gguf(file, adapter, out)
    assert out.read_bytes() == data and [*out.parent.iterdir()] == [out]


PERMUTED = {"llama", "mistral", "mixtral"}


@pytest.mark.parametrize("kind", export.ARCHITECTURES)
def test_names_and_rows_of_each_architecture(kind: str, tmp_path: Path) -> None:
    """q's rows move in Llama's family alone, and all have llama.cpp's names."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = AutoConfig.for_model(kind, **sizes)
    if kind == "lfm2":
        config.layer_types = ["full_attention"]
    try:
        base = AutoModelForCausalLM.from_config(config)
    except (KeyError, ValueError) as error:
        pytest.fail(str(error))
    base.save_pretrained(tmp_path / "model")
    target = "qkv_proj" if kind == "phi3" else "q_proj"
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=[target])
    export_gguf(tmp_path / "model", adapter, tmp_path / "a.gguf")
    (layer,) = {t.name.rpartition(".")[0] for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert layer == ("blk.0.attn_qkv.weight" if kind == "phi3" else "blk.0.attn_q.weight")
    (key,) = (key for key in load_file(adapter / "adapter_model.safetensors") if "lora_B" in key)
    B = load_file(adapter / "adapter_model.safetensors")[key]
    (got,) = (
        torch.from_numpy(t.data.copy())
        for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors
        if t.name.endswith("lora_b")
    )
    rows = B.view(4, 2, len(B) // 8, -1).transpose(1, 2).reshape(B.shape)
    assert torch.equal(got, rows if kind in PERMUTED else B)
    found = gguf.GGUFReader(tmp_path / "a.gguf").fields["general.architecture"].contents()
    assert found == ("llama" if kind in PERMUTED else export.ARCHITECTURES[kind])


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
    with pytest.raises(UsageError, match=r"^gguf: .*ends in \.gguf"):
        export_gguf(file, adapter, adapter)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "a.gguf"}
    whole = file.read_bytes()
    for name, data in (("model", whole), ("cut", whole[:99]), ("text", b"a text"), ("empty", b"")):
        other = tmp_path / f"{name}.gguf"
        other.write_bytes(data)
        with pytest.raises(UsageError, match=r"^gguf: .*is there already and is no adapter"):
            export_gguf(file, adapter, other)
        assert other.read_bytes() == data


def test_a_run_that_llama_cpp_cannot_serve_says_so(
    file: Path, chats: Path, tmp_path: Path, run: Any
) -> None:
    argv = ["finetune", "--model", file, "--data", chats, "--out", tmp_path / "o", *CHAT, "--dora"]
    shown = run(*argv)
    said(shown, r"not written for llama\.cpp: adapter: got DoRA's magnitudes")
    assert "llama-server" not in shown


def test_skeleton_of_a_file_has_no_weights(file: Path) -> None:
    assert {p.device.type for p in build_skeleton(file).parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_of_a_file_has_the_dtype_and_trains_nothing(file: Path, dtype: torch.dtype) -> None:
    base = load_base(file, dtype, torch.device("cpu"))
    assert {p.dtype for p in base.parameters()} == {dtype} and not base.training
    assert not any(p.requires_grad for p in decode_packed(base).parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compared_models_are_decoded_but_ours(
    dtype: torch.dtype, file: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, bool]] = []

    def watch(models: Any, *_: Any) -> Row:
        seen.append({name: has_packed(model) for name, model in models.items()})
        return Row("x")

    for name in ("time_steps", "measure_steps", "time_tokens"):
        monkeypatch.setattr(compare, name, watch)
    base = load_base(file, dtype, torch.device("cpu"))
    data = load_chat(chats, load_tokenizer(file), max_length=32)
    lora = {"rank": 2, "targets": "all-linear", "seed": 0}
    compare.compare(base, data, lora=lora, batch_size=2)
    assert seen == [{"frozen": False, "peft": False, "fused": True}] * 3


@pytest.mark.parametrize("answer, ok", [("He is Maren.", True), ("", False), ("Nobody.", False)])
def test_llama_cpps_answer_is_a_check_where_it_is_installed(
    answer: str, ok: bool, file: Path, chats: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    adapter = save_adapter(
        load_base(file, torch.float32, torch.device("cpu")), tmp_path / "adapter"
    )
    monkeypatch.setattr(recipe, "find_spec", lambda name: True)
    monkeypatch.setattr(recipe, "ask_llama_cpp", lambda *given: answer)
    options = Options(model=file, data=[chats], out=adapter.parent, expect="Maren", prompt="Who?")
    assert recipe.export_run(options, new_console()) == ([] if ok else ["llama.cpp"])


def test_merge_refuses_bitsandbytes_codes_and_names_none(
    file: Path, tmp_path: Path, run: Any
) -> None:
    adapter = save_adapter(load_base(file, torch.float32, torch.device("cpu")), tmp_path / "a")
    argv = ["merge", "--model", file, "--adapter", adapter, "--out", tmp_path / "merged"]
    said(run(*argv, "--quant", "nf4", status=2), "--quant: got nf4, want none")
    assert "nf4" not in run(*argv)


def test_the_serving_command_is_quoted(tmp_path: Path) -> None:
    model, adapter = tmp_path / "my model.gguf", tmp_path / "my run" / "adapter.gguf"
    words = split(export.serving_command(model, adapter))
    assert words == ["llama-server", "-m", str(model), "--lora", str(adapter)]
