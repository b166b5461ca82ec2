import copy
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels.layers import (
    LoRAAttention,
    LoRALinear,
    count_lora_parameters,
    load_lora_weights,
    lora_state_dict,
    mark_only_lora_as_trainable,
    save_lora_weights,
)

KEYS = ["up.lora_A", "up.lora_B", "attention.qkv_proj.lora_A", "attention.qkv_proj.lora_B"]


class Model(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.lora_query = nn.Linear(8, 8)  # no adapter, whatever the names say
        self.lora_query.lora_A = nn.Parameter(torch.ones(8))
        self.up = LoRALinear(8, 12, r=3, bias=True, **kwargs)
        self.attention = LoRAAttention(8, 2, r=3, targets=("v",), **kwargs)
        for key, t in lora_state_dict(self).items():
            if key.endswith("B"):
                nn.init.normal_(t)


class Gated(LoRALinear):
    """A variant with a parameter more."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(torch.ones(self.r))


def test_mark_only_lora_as_trainable():
    model = Model()
    model.requires_grad_(True)
    model.up.lora_A.requires_grad_(False)
    mark_only_lora_as_trainable(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == KEYS


def test_variants_own_their_parameters():
    layer = Gated(8, 8, r=3, bias=True)
    assert list(lora_state_dict(layer)) == ["lora_A", "lora_B", "gate"]
    assert count_lora_parameters(layer) == (3 * 8 + 8 * 3 + 3, 72)


@pytest.mark.parametrize(
    "function",
    [
        mark_only_lora_as_trainable,
        lora_state_dict,
        count_lora_parameters,
        lambda model: save_lora_weights(model, "unwritten.safetensors"),
    ],
)
def test_model_without_lora_is_refused(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="model: got Sequential without a LoRA layer"):
        function(model)
    assert model[0].weight.requires_grad and not os.listdir()


@pytest.mark.parametrize("merged", [False, True])
def test_lora_state_dict_shares_the_adapters(merged):
    model = Model()
    if merged:
        model.up.merge()
    state = lora_state_dict(model)
    assert list(state) == KEYS
    for key, tensor in state.items():
        assert not tensor.requires_grad
        assert tensor.data_ptr() == model.state_dict()[key].data_ptr()


def test_count_lora_parameters_counts_shared_layers_once():
    count = count_lora_parameters(LoRALinear(4096, 4096, r=8, device="meta"))
    assert count == (65_536, 16_777_216)
    assert str(count) == "65,536 of 16,777,216 (0.39 %)"
    layer = LoRALinear(8, 8, r=2)
    assert count_lora_parameters(nn.Sequential(layer, layer)) == (32, 64)


def test_saved_file_loads_into_a_fresh_model(tmp_path, capsys):
    model, path = Model(), tmp_path / "adapter.safetensors"
    size = save_lora_weights(model, path)
    assert size == path.stat().st_size
    assert capsys.readouterr().out == f"saved {size:,} bytes to {path}\n"
    assert os.listdir(tmp_path) == ["adapter.safetensors"]
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(KEYS) and file.metadata() == {"format": "pt"}

    fresh = Model()
    base = {k: t.clone() for k, t in fresh.state_dict().items() if k not in KEYS}
    load_lora_weights(fresh, str(path))
    for key in KEYS:
        assert torch.equal(fresh.state_dict()[key], model.state_dict()[key])
    for key, tensor in base.items():
        assert torch.equal(fresh.state_dict()[key], tensor)


def test_the_file_is_as_readable_as_any(tmp_path):
    save_lora_weights(Model(), tmp_path / "adapter.safetensors")
    (tmp_path / "plain").touch()
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_load_into_another_dtype(tmp_path):
    model, path = Model(), tmp_path / "adapter.safetensors"
    save_lora_weights(model, path)
    narrow = Model(lora_dtype=torch.bfloat16)
    load_lora_weights(narrow, path)
    for key in KEYS:
        got = narrow.state_dict()[key]
        assert got.dtype is torch.bfloat16
        assert torch.equal(got, model.state_dict()[key].bfloat16())
    assert all(p.requires_grad for p in (narrow.up.lora_A, narrow.up.lora_B))

    save_lora_weights(narrow, path)
    assert {t.dtype for t in load_file(path).values()} == {torch.bfloat16}
    load_lora_weights(model, path)
    assert model.up.lora_A.dtype is torch.float32
    assert torch.equal(model.up.lora_A, narrow.up.lora_A.float())


def test_load_into_a_merged_model(tmp_path):
    model, other, x = Model(), Model(), torch.randn(5, 8)
    other.load_state_dict({**model.state_dict(), **lora_state_dict(other)})
    save_lora_weights(other, tmp_path / "a")
    for m in (model.up, other.up):
        m.eval().merge()
    load_lora_weights(model, tmp_path / "a")
    assert torch.equal(model.up(x), other.up(x))


def test_strided_parameters_are_saved_as_numbers(tmp_path):
    layer = LoRALinear(8, 8, r=3)
    layer.lora_A = nn.Parameter(torch.randn(8, 3).T)
    save_lora_weights(layer, tmp_path / "a")
    assert torch.equal(load_file(tmp_path / "a")["lora_A"], layer.lora_A)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    model, path = Model(), tmp_path / "adapter.safetensors"
    save_lora_weights(model, path)
    before = path.read_bytes()

    def fail(*args):
        raise error

    monkeypatch.setattr(os, step, fail)
    nn.init.zeros_(model.up.lora_A)
    with pytest.raises(type(error)):
        save_lora_weights(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["adapter.safetensors"]


def drop(tensors):
    del tensors["up.lora_A"]


def rename(tensors):
    tensors["down.lora_A"] = tensors.pop("up.lora_A")


def add(tensors):
    tensors["up.bias"] = torch.zeros(12)


def reshape(tensors):
    tensors["attention.qkv_proj.lora_B"] = torch.zeros(8, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "missing up.lora_A"),
        (rename, "missing up.lora_A; unexpected down.lora_A"),
        (add, "unexpected up.bias"),
        (reshape, r"attention.qkv_proj.lora_B is \[8, 4\], want \[8, 3\]"),
    ],
)
def test_misfits_change_nothing(tmp_path, change, message):
    model, path = Model(), tmp_path / "adapter.safetensors"
    tensors = {key: t + 1 for key, t in lora_state_dict(model).items()}
    change(tensors)
    save_file(tensors, path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"adapter.safetensors does not fit the model: {message}$"):
        load_lora_weights(model, path)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_many_misfits_are_counted(tmp_path):
    save_file({f"layer.{i}": torch.zeros(1) for i in range(20)}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"and 16 more$"):
        load_lora_weights(Model(), tmp_path / "a")


def test_load_or_save_without_a_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_lora_weights(Model(), tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        save_lora_weights(Model(), tmp_path / "no folder" / "a")
