"""A merge writes the sum itself, in a folder that stock transformers loads, or nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from lora_kernels.finetune import UsageError, checkpoints, merge
from lora_kernels.finetune.merge import merge_adapter
from lora_kernels.finetune.model import DTYPES, load_adapter, load_base
from lora_kernels.finetune.presets import add_lora_layers
from lora_kernels.peft import fuse
from lora_kernels.quantization import QuantizedWeight
from tests.finetune.tiny import gpt2, llama, save_model, tokenizer

IDS = torch.randint(4, 260, (1, 40), generator=torch.Generator().manual_seed(1))


def saved(folder: Path, base: Any, **adapter: Any) -> tuple[Path, Path]:
    """Folders of a base and of an adapter with a random B."""
    base.save_pretrained(folder / "base", max_shard_size="120KB")
    tokenizer().save_pretrained(folder / "base")
    model = add_lora_layers(base, "legal", rank=3, alpha=7, **adapter)
    with torch.no_grad():
        for name, p in model.named_parameters():
            of_base = p.requires_grad and name.endswith("bias")
            if of_base or "lora_B" in name or "modules_to_save" in name:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    return folder / "base", folder / "adapter"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    # bitsandbytes, whose the layers without an adapter are, misreads scales where a row is no
    # multiple of a block.
    return saved(tmp_path_factory.mktemp("merge"), llama(intermediate_size=128))


def four_bits(weight: Tensor) -> QuantizedWeight:
    bnb = pytest.importorskip("bitsandbytes")
    pair = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return QuantizedWeight.from_bitsandbytes(pair)


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=IDS).logits
    return out.float()


@pytest.mark.parametrize(
    ("onto", "quant_dtype"),
    [("original", "bf16"), ("dequantized", "fp32"), ("dequantized", "bf16")],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_each_weight_is_the_sum_rounded_once(
    folders: tuple[Path, Path], tmp_path: Path, dtype: str, onto: str, quant_dtype: str
) -> None:
    """The base that was quantized had the quantized dtype, which rounds no dense base."""
    base, adapter = folders
    out = tmp_path / "out"
    done = merge_adapter(base, adapter, out, dtype=dtype, onto=onto, quant_dtype=quant_dtype)
    assert done.layers == 6
    to, held = DTYPES[dtype], DTYPES[quant_dtype]
    before, after, lora = tensors(base), tensors(tmp_path / "out"), tensors(adapter)
    assert after.keys() == before.keys()
    changed = 0
    for name, weight in before.items():
        if onto == "dequantized":
            weight = weight.to(held)
            if "_proj" in name:
                weight = four_bits(weight).dequantize(torch.float32)
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        want = weight.double()
        if key.format("A") in lora:
            A, B = (lora[key.format(which)].double() for which in "AB")
            want = want + 7 / 3 * B @ A
            changed += 1
        assert after[name].dtype == to
        # One rounding of the sum to the dtype, after float32 sums of three products.
        unit = torch.finfo(to).eps / 2
        error = (after[name].double() - want).abs()
        assert (error <= (unit + 2.0**-21) * want.abs() + 2.0**-24).all(), name
    assert changed == 6
    assert done.nbytes == sum(t.nbytes for t in after.values())


def test_a_stock_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The base's files, tokenizer and all; more than one shard; loads in its dtype without PEFT."""
    stored, adapter = folders
    base = tmp_path / "base"
    shutil.copytree(stored, base)
    (base / "LICENSE").write_text("MIT")
    done = merge_adapter(base, adapter, tmp_path / "out")
    names = [
        {f.name for f in place.iterdir() if "-of-" not in f.name} for place in (base, done.out)
    ]
    assert names[0] == names[1]
    assert len(list(done.out.glob("*.safetensors"))) == done.shards > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in tensors(tmp_path / "out").values()
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype is torch.bfloat16
    assert not any("lora" in name for name, _ in model.named_modules())
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


def test_index_of_the_base_s_shards_is_not_copied(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """A base in shards, merged into one: its index would name files that are not there."""
    stored, adapter = folders
    base, largest = tmp_path / "base", "model-00001-of-00001.safetensors"
    shutil.copytree(stored, base)
    for file in base.glob("model*"):
        file.unlink()
    weights = tensors(stored)
    save_file(weights, base / largest, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, largest)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    done = merge_adapter(base, adapter, tmp_path / "out")
    assert done.shards == 1 and not list(done.out.glob("*.index.json"))
    AutoModelForCausalLM.from_pretrained(done.out)


def biased() -> Any:
    return llama(attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize(
    ("make", "adapter"),
    [
        (llama, {"use_rslora": True, "rank_pattern": {"v_proj": 5}}),
        (llama, {"use_dora": True}),
        (llama, {"modules_to_save": ["lm_head"]}),
        (biased, {"bias": "lora_only"}),
        (biased, {"bias": "all"}),
        (gpt2, {}),
        (gpt2, {"use_dora": True, "targets": ["q", "up"]}),
    ],
    ids=["rslora", "dora", "modules_to_save", "lora_only", "all biases", "conv1d", "dora-conv1d"],
)
def test_every_kind_of_lora(make: Any, adapter: Any, tmp_path: Path) -> None:
    """Beside PEFT's own model on the whole base; float32 sums in another order."""
    base, folder = saved(tmp_path, make(), **adapter)
    merge_adapter(base, folder, tmp_path / "out", dtype="fp32")
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    plain = AutoModelForCausalLM.from_pretrained(base)
    unadapted = logits(plain)
    want = logits(PeftModel.from_pretrained(plain, str(folder)))
    assert (got - want).norm() <= 2.0**-15 * want.norm()
    assert (unadapted - want).norm() > 2.0**-8 * want.norm()


def test_logits_over_a_4bit_base(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """`dequantized` is NF4 + LoRA in float32 to the order of sums, and `original` is not."""
    pytest.importorskip("bitsandbytes")
    base, adapter = folders
    over = load_base(base, torch.float32, torch.device("cpu"), "nf4")
    want = logits(fuse(load_adapter(over, adapter)))
    for onto in ("dequantized", "original"):
        merge_adapter(base, adapter, tmp_path / onto, dtype="fp32", onto=onto)
        got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / onto))
        off = ((got - want).norm() / want.norm()).item()
        assert off <= 2.0**-15 if onto == "dequantized" else off > 2.0**-8


def test_a_folder_of_4bit_weights(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Transformers saves such folders."""
    pytest.importorskip("bitsandbytes")
    base, adapter = folders
    four_bit = tmp_path / "base4"
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    how = {"quantization_config": config, "dtype": torch.float32, "device_map": "cpu"}
    save_model(four_bit, AutoModelForCausalLM.from_pretrained(base, **how))
    with pytest.raises(UsageError, match="quantized weights alone; give --onto dequantized"):
        merge_adapter(four_bit, adapter, tmp_path / "no")
    merge_adapter(four_bit, adapter, tmp_path / "a", onto="dequantized")
    merge_adapter(base, adapter, tmp_path / "b", onto="dequantized")
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_merge_of_a_sum_that_is_not_finite_is_one_line(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    base = llama(intermediate_size=128)
    base.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    broken = save_model(tmp_path / "base", base)
    with pytest.raises(UsageError, match=r"^adapter: cannot be merged: .*NaN"):
        merge_adapter(broken, folders[1], tmp_path / "out")


def test_nothing_half_written(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fail(self: Any, folder: Path, **kwargs: Any) -> None:
        seen.append({path.name for path in tmp_path.iterdir()})
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(*folders, tmp_path / "out")
    assert seen == [{".out.partial"}]
    assert list(tmp_path.iterdir()) == []


def test_merged_prints_megabytes_of_the_files_tensors(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    done = merge_adapter(*folders, tmp_path / "out")
    assert done.nbytes == sum(t.nbytes for t in tensors(tmp_path / "out").values())
    large = done._replace(out=Path("out"), nbytes=12_345_678, shards=2, kept=[])
    assert str(large) == "out: 6 layers merged, 2 safetensors files, 12.3 MB"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merge_without_room_for_the_model_is_refused_before_it_is_loaded(
    dtype: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_adapter(*folders, tmp_path / "out", dtype=dtype)
    want = sum(t.nbytes for t in tensors(tmp_path / "out").values())
    usage = SimpleNamespace(free=want)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
    merge_adapter(*folders, tmp_path / "again", dtype=dtype)
    monkeypatch.setattr(merge.models, "load_base", lambda *args: pytest.fail("loaded"))
    usage.free -= 1
    out = tmp_path / "no" / "out"
    words = f"{out} has {want - 1:,} bytes free, want {want:,} for the merged model; make room, or"
    with pytest.raises(UsageError, match=f"^out: {words} give another folder$"):
        merge_adapter(*folders, out, dtype=dtype)
    assert not out.parent.exists()


def test_what_cannot_be_merged(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other, _ = saved(tmp_path / "other", llama(hidden_size=32))
    words = r"does not fit the base: holds \S+ \[3, .*\], want \[3, 32\] and \d+ more$"
    with pytest.raises(UsageError, match=words):
        merge_adapter(other, folders[1], tmp_path / "out")
    tied = saved(tmp_path / "tied", llama(tie_word_embeddings=True), targets=["lm_head"])
    with pytest.raises(UsageError, match="a weight that is tied to another one cannot be merged"):
        merge_adapter(*tied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(folders: tuple[Path, Path], tmp_path: Path, run: Any) -> None:
    """Without --run; with it, and 4 bits, in test_commands.py."""
    command = ["merge", "--model", folders[0], "--adapter", folders[1]]
    shown = run(*command, "--dtype", "fp32", "--out", tmp_path / "dense")
    assert "merging into the base's weights" in shown and "6 layers merged" in shown
    assert "--adapter is missing" in run(*command[:3], "--out", "x", status=2)


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_merge_says_what_its_dtype_keeps_of_the_update(
    onto: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Beside the folder's weights and float64's sums; over 4 bits, also NF4's share."""
    base, adapter = folders
    done = merge_adapter(base, adapter, tmp_path / "out", onto=onto)
    before, after, parts = tensors(base), tensors(tmp_path / "out"), tensors(adapter)
    again_4bit = "nf4, quantized again"
    targets = ("bfloat16",) if onto == "original" else ("bfloat16", again_4bit)
    kinds = ("q_proj", "k_proj", "v_proj")
    rows = {(row.target, row.kind): row for row in done.kept}
    assert rows.keys() == {(target, kind) for target in targets for kind in kinds}
    assert all(row.layers == 2 for row in done.kept)
    for kind in kinds:
        sums = torch.zeros(2, dtype=torch.float64)
        again = torch.zeros(2, dtype=torch.float64)
        for name, weight in before.items():
            if not name.endswith(f"{kind}.weight"):
                continue
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
            delta = 7 / 3 * parts[key.format("B")].double() @ parts[key.format("A")].double()
            if onto == "dequantized":
                weight = four_bits(weight).dequantize(torch.float32)
                requantized = four_bits((weight.double() + delta).float())
                moved = requantized.dequantize(torch.float32).double() - weight.double()
                again += torch.stack([(moved * delta).sum(), (delta**2).sum()])
            moved = after[name].double() - weight.double()
            sums += torch.stack([(moved * delta).sum(), (delta**2).sum()])
        assert rows["bfloat16", kind].share == pytest.approx(float(sums[0] / sums[1]), rel=1e-5)
        if onto == "dequantized":  # a float32 sum may fall to the other side of a code's threshold
            share = float(again[0] / again[1])
            assert rows[again_4bit, kind].share == pytest.approx(share, rel=1e-3)
    shown = str(done)
    assert re.search(r"^merged into bfloat16 +layers +update kept +rounding", shown, re.MULTILINE)
    assert "warning: bfloat16" not in shown
    assert shown.splitlines()[-1].endswith("MB")


def test_merge_of_an_update_below_bfloat16_s_rounding_warns(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """lora_B divided by 2,000; float32 keeps the rest."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(folders[0], base)
    shutil.copytree(folders[1], adapter)
    for file in base.glob("*.safetensors"):  # on bfloat16's grid
        weights = {name: t.bfloat16().float() for name, t in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})
    file = adapter / "adapter_model.safetensors"
    parts = {name: t / (2000 if "lora_B" in name else 1) for name, t in load_file(file).items()}
    save_file(parts, file, {"format": "pt"})
    warned = str(merge_adapter(base, adapter, tmp_path / "bf16"))
    assert re.search(r"warning: bfloat16 keeps less than 0.9 of the update of .*q_proj \(", warned)
    fine = merge_adapter(base, adapter, tmp_path / "fp32", dtype="fp32")
    assert "warning" not in str(fine) and all(row.share > 0.999 for row in fine.kept)
