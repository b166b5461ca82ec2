"""What a merge writes: the sum itself, in a folder that stock transformers loads, or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_kernels.cli import main
from lora_kernels.finetune import UsageError
from lora_kernels.finetune.merge import compare_merged, merge_adapter
from lora_kernels.finetune.model import load_base
from lora_kernels.finetune.presets import add_lora_layers
from lora_kernels.quantization import Weight4bit
from tests.finetune.tiny import gpt2, llama, tokenizer

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


def four_bits(weight: Tensor) -> Weight4bit:
    bnb = pytest.importorskip("bitsandbytes")
    pair = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return Weight4bit.from_bitsandbytes(pair)


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=IDS).logits
    return out.float()


@pytest.mark.parametrize("onto", ["original", "dequantized"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_each_weight_is_the_sum_rounded_once(
    folders: tuple[Path, Path], tmp_path: Path, dtype: str, onto: str
) -> None:
    base, adapter = folders
    done = merge_adapter(base, adapter, tmp_path / "out", dtype=dtype, onto=onto)
    assert done.layers == 6
    to = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    before, after, lora = tensors(base), tensors(tmp_path / "out"), tensors(adapter)
    assert after.keys() == before.keys()
    changed = 0
    for name, weight in before.items():
        if onto == "dequantized" and "_proj" in name:
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
    """The same files, tokenizer and all; more than one shard; loads in its dtype without PEFT."""
    base, adapter = folders
    merge_adapter(base, adapter, tmp_path / "out")
    names = {file.name for file in base.iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in tensors(tmp_path / "out").values()
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype is torch.bfloat16
    assert not any("lora" in name for name, _ in model.named_modules())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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
    """`dequantized` is the fused NF4 + LoRA to rounding, `original` is not, and that is told."""
    pytest.importorskip("bitsandbytes")
    base, adapter = folders
    settings: dict[str, Any] = {"quant": "nf4", "quant_dtype": "fp32", "ids": IDS}
    for dtype in ("fp32", "bf16"):
        found = {}
        for onto in ("dequantized", "original"):
            out = tmp_path / f"{onto}-{dtype}"
            merge_adapter(base, adapter, out, dtype=dtype, onto=onto)
            found[onto] = compare_merged(out, base, adapter, dtype=dtype, **settings)
        assert found["dequantized"].ok, found
        assert not found["original"].ok
        assert found["original"].merged.logits > 2 * found["dequantized"].limit
        measured = found["dequantized"].original.logits
        assert found["original"].merged.logits == pytest.approx(measured, rel=0.25)


def test_a_folder_of_4bit_weights(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """As transformers saves them: decoded shard by shard, without bitsandbytes."""
    base, adapter = folders
    four_bit = tmp_path / "base4"
    four_bit.mkdir()
    state: dict[str, Tensor] = {}
    for name, weight in tensors(base).items():
        if "_proj" in name:
            state |= four_bits(weight).state_dict(name)
        else:
            state[name] = weight
    save_file({n: t.contiguous() for n, t in state.items()}, four_bit / "model.safetensors")
    (four_bit / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(UsageError, match="4-bit weights alone; give --onto dequantized"):
        merge_adapter(four_bit, adapter, tmp_path / "no")
    merge_adapter(four_bit, adapter, tmp_path / "a", onto="dequantized")
    merge_adapter(base, adapter, tmp_path / "b", onto="dequantized")
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_nothing_half_written(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    seen = []

    def refuse(folder: Path) -> bool:
        seen.append({path.name for path in tmp_path.iterdir()})
        return False

    def fail(folder: Path) -> bool:
        raise KeyboardInterrupt

    assert merge_adapter(base, adapter, tmp_path / "out", check=refuse) is None
    assert seen == [{".out.partial"}]
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(base, adapter, tmp_path / "out", check=fail)
    assert list(tmp_path.iterdir()) == []


def damaged(adapter: Path, folder: Path, damage: str) -> Path:
    """A copy of the adapter's folder, as a broken download or another tool may leave it."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    keys = sorted(key for key in state if ".layers.1." in key)
    if damage == "a missing layer":
        state = {key: t for key, t in state.items() if key not in keys}
    elif damage == "a missing key":
        del state[keys[0]]
    elif damage == "a key of no layer":
        state[keys[0].replace("layers.1", "layers.7")] = state[keys[0]].clone()
    elif damage == "another shape":
        state[keys[0]] = state[keys[0]][:, :-1].contiguous()
    save_file(state, file, metadata={"format": "pt"})
    if damage == "a truncated file":
        file.write_bytes(file.read_bytes()[:-100])
    return folder


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("a missing layer", r"does not fit the base: lacks \S*layers\.1\.\S* and \d+ more$"),
        ("a missing key", r"does not fit the base: lacks \S*layers\.1\.\S*$"),
        ("a key of no layer", r"holds, without a layer for it, \S*layers\.7\.\S*$"),
        ("another shape", r"holds \S*layers\.1\.\S* \[.*\], want \[.*\]$"),
        ("a truncated file", r"adapter: \S* cannot be read: .+$"),
    ],
)
def test_merge_of_a_damaged_adapter_writes_nothing(
    damage: str, said: str, folders: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    base, good = folders
    adapter = damaged(good, tmp_path / "adapter", damage)
    with pytest.raises(UsageError, match=said):
        merge_adapter(base, adapter, tmp_path / "out")
    common = ["--base", str(base), "--adapter", str(adapter)]
    assert main(["merge", *common, "--out", str(tmp_path / "out"), "--no-compare"]) == 2
    printed = capsys.readouterr()
    assert "adapter" in printed.out + printed.err and "Traceback" not in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_cannot_be_merged(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, words in (
        ((base, base, "out"), "adapter: .* holds no adapter_config.json"),
        ((tmp_path, adapter, "out"), "holds neither a config.json"),
        ((base, adapter, "full"), "out: .* is there already"),
    ):
        with pytest.raises(UsageError, match=words):
            merge_adapter(arguments[0], arguments[1], tmp_path / arguments[2])
    other, _ = saved(tmp_path / "other", llama(hidden_size=32))
    with pytest.raises(
        UsageError,
        match=r"does not fit the base: holds \S+ \[3, .*\], want \[3, 32\] and \d+ more$",
    ):
        merge_adapter(other, adapter, tmp_path / "out")
    another, _ = saved(tmp_path / "another", gpt2())
    with pytest.raises(UsageError, match="does not fit the base: "):
        merge_adapter(another, adapter, tmp_path / "out")
    tied = saved(tmp_path / "tied", llama(tie_word_embeddings=True), targets=["lm_head"])
    with pytest.raises(UsageError, match="a weight that is tied to another one cannot be merged"):
        merge_adapter(*tied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(folders: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("bitsandbytes")
    base, adapter = folders
    command = ["merge", "--base", str(base), "--adapter", str(adapter)]
    for onto, words in (
        ("dequantized", "✓"),
        ("original", "the adapter on the original weights: logits off by"),
    ):
        out = tmp_path / onto
        run = [*command, "--onto", onto, "--quant", "nf4", "--out", str(out)]
        assert main(run) == 0
        shown = capsys.readouterr().out
        assert "against nf4 base + adapter in fp32" in shown
        assert words in shown
        assert "6 layers merged" in shown
        assert (out / "config.json").is_file()
    assert main([*command, "--dtype", "fp32", "--out", str(tmp_path / "dense")]) == 0
    assert "against dense base" in capsys.readouterr().out
    assert main(["merge", "--base", str(base), "--out", "x"]) == 2
    assert "--adapter is missing" in capsys.readouterr().err


def test_the_quantized_weights_are_those_that_training_saw(folders: tuple[Path, Path]) -> None:
    """What `finetune --quant` holds and what a merge decodes are the same bits."""
    pytest.importorskip("bitsandbytes")
    base, _ = folders
    held = load_base(base, torch.bfloat16, torch.device("cpu"), "nf4")
    for name, weight in tensors(base).items():
        if "_proj" in name:
            layer = held.get_submodule(name.removesuffix(".weight"))
            want = Weight4bit.from_bitsandbytes(layer.weight).dequantize(torch.float32)
            got = four_bits(weight.bfloat16()).dequantize(torch.float32)
            assert torch.equal(got, want), name


def test_merge_onto_dequantized_rounds_to_the_quantized_dtype_first(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Of the dtype that training quantized from, bf16; a layer's sum is of these very codes."""
    pytest.importorskip("bitsandbytes")
    base, adapter = folders
    for dtype in ("fp32", "bf16"):
        merge_adapter(
            base, adapter, tmp_path / dtype, dtype="fp32", quant="nf4", onto="dequantized",
            quant_dtype=dtype,
        )  # fmt: skip
    before, got = tensors(base), {d: tensors(tmp_path / d) for d in ("fp32", "bf16")}
    name = next(n for n in before if n.endswith("up_proj.weight"))  # without an adapter
    if torch.equal(got["fp32"][name], got["bf16"][name]):
        pytest.fail("the dtypes give the same codes: the weight says nothing")
    want = four_bits(before[name].bfloat16()).dequantize(torch.float32)
    assert torch.equal(got["bf16"][name], want)
