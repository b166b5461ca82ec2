"""Merges that keep small updates, and merges into the formats of the base's own tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lora_kernels.finetune import UsageError
from lora_kernels.finetune.merge import merge_adapter
from lora_kernels.finetune.model import load_adapter, load_base
from lora_kernels.finetune.presets import add_lora_layers
from tests.finetune.tiny import (
    gpt2,
    llama,
    save_model,
    squares,
    tokenizer,
    write_gguf,
    write_lines,
)

# Tokens of the data by which layers are rounded: random models do not generalize to others.
IDS = tokenizer()("".join(f"{i} squared? It is {i * i}. " for i in range(8)), return_tensors="pt")[
    "input_ids"
]


def save_adapter(folder: Path, base: Any, size: float, **config: Any) -> Path:
    """An adapter of rank 3 whose updates are about `size` times the weights."""
    model = add_lora_layers(base, "chat", rank=3, alpha=3, targets="all-linear", **config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(size * torch.randn(p.shape, generator=generator))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "chats.jsonl", squares(30))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in bfloat16, in several files, with a layer norm in float32; and an adapter."""
    folder = tmp_path_factory.mktemp("dense")
    base = llama(intermediate_size=128).bfloat16()
    save_model(folder / "base", base)
    (file,) = (folder / "base").glob("*.safetensors")
    state = load_file(file)
    state["model.norm.weight"] = state["model.norm.weight"].float() + 1e-6
    save_file(state, file, {"format": "pt"})
    return folder / "base", save_adapter(folder / "adapter", llama(intermediate_size=128), 0.002)


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model.eval()(input_ids=IDS).logits
    return out.double()


def error(got: Any, want: Tensor, base: Tensor) -> float:
    """The difference to the unmerged model's logits, over the adapter's effect."""
    return float((logits(got) - want).norm() / (want - base).norm())


@pytest.mark.parametrize("into", ["dense", "base"])
def test_error_keeps_more_of_a_small_update_in_bfloat16(
    dense: tuple[Path, Path], chats: Path, tmp_path: Path, into: str
) -> None:
    base, adapter = dense
    start = load_base(base, torch.float32, torch.device("cpu"))
    plain = logits(start)
    want = logits(load_adapter(start, adapter))
    errors = {}
    for how in ("nearest", "stochastic", "error"):
        data = [chats] if how == "error" else []
        out = tmp_path / how
        done = merge_adapter(base, adapter, out, into=into, round=how, data=data)
        assert done.unreached == 0
        assert done.layers == 14
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        errors[how] = error(model, want, plain)
        assert AutoTokenizer.from_pretrained(out).chat_template
        if into == "base":  # only the layers' weights change, and no dtype
            before, after = tensors(base), tensors(out)
            assert before.keys() == after.keys()
            for name, t in before.items():
                assert t.dtype is after[name].dtype
                assert ("_proj" in name) is not torch.equal(t, after[name]), name
    assert errors["error"] < 0.7 * errors["nearest"], errors
    assert errors["error"] < errors["stochastic"], errors


def test_equal_seeds_give_equal_files(
    dense: tuple[Path, Path], chats: Path, tmp_path: Path
) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        merge_adapter(*dense, tmp_path / name, round="error", data=[chats], seed=seed)
        found.append(tensors(tmp_path / name))
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())
    assert not all(torch.equal(t, found[2][name]) for name, t in found[0].items())


def test_gpt2_s_transposed_weights(chats: Path, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", gpt2().bfloat16())
    adapter = save_adapter(tmp_path / "adapter", gpt2(), 0.002)
    start = load_base(base, torch.float32, torch.device("cpu"))
    plain = logits(start)
    want = logits(load_adapter(start, adapter))
    errors = {}
    for how in ("nearest", "error"):
        data = [chats] if how == "error" else []
        done = merge_adapter(base, adapter, tmp_path / how, round=how, data=data)
        assert done.unreached == 0
        model = AutoModelForCausalLM.from_pretrained(tmp_path / how, dtype=torch.float32)
        errors[how] = error(model, want, plain)
    assert errors["error"] < 0.7 * errors["nearest"], errors


@pytest.mark.parametrize("is_stored", [True, False])
def test_four_bits_that_bitsandbytes_loads(
    dense: tuple[Path, Path], chats: Path, tmp_path: Path, is_stored: bool
) -> None:
    """Over a folder in NF4, and over a dense one that `--quant nf4` trains over."""
    pytest.importorskip("bitsandbytes")
    base, _ = dense
    adapter = save_adapter(tmp_path / "adapter", llama(intermediate_size=128), 0.1)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    how: Any = {"quantization_config": config, "dtype": torch.float32, "device_map": "cpu"}
    four_bit = AutoModelForCausalLM.from_pretrained(base, **how)
    if is_stored:
        base = save_model(tmp_path / "base4", four_bit)
    quant = None if is_stored else "nf4"
    start = load_base(base, torch.float32, torch.device("cpu"), quant)
    plain = logits(start)
    want = logits(load_adapter(start, adapter))
    done = merge_adapter(
        base, adapter, tmp_path / "out", onto="dequantized", into="base", round="error",
        data=[chats],
    )  # fmt: skip
    assert {row.target for row in done.kept} == {"nf4"}
    before, after = tensors(base), tensors(tmp_path / "out")
    changed = {
        name for name in after if not torch.equal(before.get(name, after[name][:0]), after[name])
    }
    if is_stored:  # nothing but codes
        assert before.keys() == after.keys()
        assert changed == {name for name in before if name.endswith("_proj.weight")}
    else:
        assert after["model.norm.weight"].dtype is torch.bfloat16  # of the configuration
        assert after["model.embed_tokens.weight"].dtype is torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    assert type(loaded.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert error(loaded, want, plain) < 0.9
    nearest = merge_adapter(base, adapter, tmp_path / "near", onto="dequantized", into="base")
    assert nearest.kept[0].share < done.kept[0].share


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_1", "F16"])
def test_a_copy_of_a_gguf_file(kind: str, chats: Path, tmp_path: Path) -> None:
    """Its adapted tensors alone change, in their types; gguf decodes to the merged weights."""
    gguf = pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "tiny.gguf", kind)
    start = load_base(file, torch.float32, torch.device("cpu"))
    size = 0.003 if kind == "F16" else 0.1
    adapter = save_adapter(
        tmp_path / "adapter", load_base(file, torch.float32, torch.device("cpu")), size
    )
    plain = logits(start)
    want = logits(load_adapter(start, adapter))
    how: Any = {"onto": "dequantized", "into": "base", "round": "error", "data": [chats]}
    out = tmp_path / "merged.gguf"
    done = merge_adapter(file, adapter, out, **how)
    assert done.layers == 14
    assert str(done).endswith(f"14 layers merged, {out.stat().st_size / 1e6:.1f} MB")
    before, after = (gguf.GGUFReader(f) for f in (file, out))
    assert len(file.read_bytes()) == len(out.read_bytes())
    for a, b in zip(before.tensors, after.tensors, strict=True):
        assert (a.name, a.tensor_type, a.data_offset) == (b.name, b.tensor_type, b.data_offset)
        is_adapted = any(
            word in a.name for word in ("attn_q", "attn_k", "attn_v", "attn_o", "ffn_")
        )
        is_adapted &= "norm" not in a.name
        assert (a.data.tobytes() != b.data.tobytes()) is is_adapted, a.name
    head = file.read_bytes()[: before.data_offset]
    assert out.read_bytes()[: before.data_offset] == head
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=torch.float32)
    assert error(loaded, want, plain) < (0.2 if kind == "F16" else 0.9)
    near = tmp_path / "near.gguf"
    merge_adapter(file, adapter, near, **how | {"round": "nearest", "data": []})
    nearest = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=near.name, dtype=torch.float32
    )
    assert error(loaded, want, plain) < error(nearest, want, plain)


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True}])
def test_variants_into_a_gguf_file(kind: dict[str, bool], chats: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    start, other = (load_base(file, torch.float32, torch.device("cpu")) for _ in range(2))
    adapter = save_adapter(tmp_path / "adapter", other, 0.1, **kind)
    plain = logits(start)
    want = logits(load_adapter(start, adapter))
    out = tmp_path / "merged.gguf"
    how: Any = {"onto": "dequantized", "into": "base", "round": "error", "data": [chats]}
    merge_adapter(file, adapter, out, **how)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=torch.float32)
    assert error(loaded, want, plain) < 0.3


def test_an_adapter_of_zeros_gives_the_file_s_bytes(chats: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "tiny.gguf", "Q4_1")
    base = load_base(file, torch.float32, torch.device("cpu"))
    adapter = save_adapter(tmp_path / "adapter", base, 0.0)
    for how in ("nearest", "stochastic", "error"):
        out = tmp_path / f"{how}.gguf"
        data = [chats] if how == "error" else []
        merge_adapter(file, adapter, out, onto="dequantized", into="base", round=how, data=data)
        assert out.read_bytes() == file.read_bytes()


def test_the_command(chats: Path, tmp_path: Path, run: Any) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "tiny.gguf", "Q4_1")
    base = load_base(file, torch.float32, torch.device("cpu"))
    adapter = save_adapter(tmp_path / "adapter", base, 0.1)
    argv = ["merge", "--model", file, "--adapter", adapter, "--into", "base"]
    shown = run(*argv, "--round", "error", "--data", chats, "--out", tmp_path / "m.gguf")
    assert "14 layers merged" in shown
    assert (tmp_path / "m.gguf").stat().st_size == file.stat().st_size
    shown = run(*argv, "--round", "error", "--out", tmp_path / "n.gguf", status=2)
    assert "--data: got none, which --round error needs" in shown or "data: got none" in shown


@pytest.mark.parametrize(
    "given, words",
    [
        ({"round": "error"}, "data: got none, which round='error' needs"),
        ({"round": "best"}, "round: got 'best', want 'nearest', 'stochastic' or 'error'"),
        ({"into": "nf4"}, "into: got 'nf4', want 'dense' or 'base'"),
        ({"round": "stochastic", "dtype": "fp32"}, "round: got 'stochastic' for fp32"),
        ({"data": ["CHATS"]}, "data: got files, which round='nearest' does not read"),
        ({"round": "error", "data": ["no.jsonl"]}, "data: .*no.jsonl"),
    ],
)
def test_refused_before_anything_is_written(
    given: dict[str, Any],
    words: str,
    dense: tuple[Path, Path],
    chats: Path,
    tmp_path: Path,
) -> None:
    given = given | {"data": [chats if f == "CHATS" else f for f in given.get("data", [])]}
    with pytest.raises(UsageError, match=words):
        merge_adapter(*dense, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_changes_more_than_layers_is_refused(
    dense: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = dense
    other = tmp_path / "adapter"
    shutil.copytree(adapter, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"bias": "all"}))
    with pytest.raises(UsageError, match="adapter: got bias, want weights of layers alone"):
        merge_adapter(base, other, tmp_path / "out", into="base")
