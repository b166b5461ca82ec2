import copy
import json
import os
import signal
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels.layers import (
    Experts,
    HierarchicalLoRALinear,
    LoRAAttention,
    LoRAConv1D,
    LoRAEmbedding,
    LoRAExperts,
    LoRAGroup,
    LoRALinear,
    count_lora_parameters,
    load_lora_weights,
    lora_state_dict,
    mark_only_lora_as_trainable,
    save_lora_weights,
)
from tests.support.processes import run_python

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


KILLED_SAVE = """
import os, signal, sys
from lora_kernels.layers import LoRALinear, save_lora_weights
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
save_lora_weights(LoRALinear(8, 8, r=2), sys.argv[1])
"""


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
        assert sorted(file.keys()) == sorted(KEYS)
        config = json.loads(file.metadata().pop("lora_layers"))
    assert config["up"] == {"r": 3, "alpha": 16.0, "scaling": 16 / 3}

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


def test_save_removes_the_file_of_a_killed_save_and_no_other(tmp_path):
    """A process that is killed by SIGKILL before the rename leaves its temporary file."""
    others = [tmp_path / ".adapter.safetensors.note", tmp_path / f".other.{'0' * 32}"]
    for other in others:
        other.touch()
    path = tmp_path / "adapter.safetensors"
    killed = run_python("-c", KILLED_SAVE, path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(os.listdir(tmp_path)) == 3 and not path.exists()
    save_lora_weights(Model(), path)
    assert sorted(tmp_path.iterdir()) == sorted([*others, path])


def test_save_keeps_a_file_whose_name_begins_as_that_of_a_temporary_one(tmp_path):
    other = tmp_path / f".a.safetensors.{'0' * 32}.bak"
    other.touch()
    save_lora_weights(LoRALinear(8, 4, r=2), tmp_path / "a.safetensors")
    assert other.exists()


def test_save_beside_another_process_s_save_leaves_one_whole_file(tmp_path, monkeypatch):
    """Each save begins while the other one has written its file, and not yet renamed it."""
    first, second, path = Model(), Model(), tmp_path / "adapter.safetensors"
    usual, saves = os.replace, iter([second])

    def replace(source, target):
        if (model := next(saves, None)) is not None:
            save_lora_weights(model, path)
            assert torch.equal(load_file(path)["up.lora_B"], second.up.lora_B)
        usual(source, target)

    monkeypatch.setattr(os, "replace", replace)
    save_lora_weights(first, path)
    assert torch.equal(load_file(path)["up.lora_B"], first.up.lora_B)
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


def hierarchical(**options):
    return HierarchicalLoRALinear(8, 8, **{"ranks": (2, 1), "weights": (1, 1), **options})


def group(**options):
    members = {"q": 8, "k": 8, "v": 8}
    return LoRAGroup(8, **{"members": members, "targets": ("q", "v"), "r": 2, **options})


# The layer, the argument that its file was saved with, the model's, and the message.
OTHER_CONFIGS = {
    "alpha": (
        lambda **options: LoRALinear(8, 12, 2, **options),
        *({"alpha": 8}, {"alpha": 64}),
        r"up.alpha was saved as 8, want the model's 64; "
        r"up.scaling was saved as 4.0, want the model's 32.0$",
    ),
    "rslora": (
        lambda **options: LoRAConv1D(8, 12, 4, alpha=8, **options),
        *({"scaling": "rslora"}, {}),
        "up.scaling was saved as 4.0, want the model's 2.0$",
    ),
    "embedding": (
        lambda **options: LoRAEmbedding(8, 12, 2, **options),
        *({"alpha": 8}, {"alpha": 4}),
        "up.alpha was saved as 8, want the model's 4; up.scaling",
    ),
    "alpha of levels": (
        hierarchical,
        *({"alpha": 2}, {"alpha": 4}),
        r"up.level_scales was saved as \[1.0, 2.0\], want the model's \[2.0, 4.0\]$",
    ),
    "levels": (
        hierarchical,
        *({}, {"ranks": (1, 2)}),
        r"up.ranks was saved as \[2, 1\], want the model's \[1, 2\]; up.level_scales",
    ),
    "targets": (group, {}, {"targets": ("q", "k")}, "up.targets was saved as .'q', 'v'"),
    "order": (
        group,
        *({}, {"members": {"v": 8, "k": 8, "q": 8}}),
        r"up.members was saved as \[\['q', 8\], \['k', 8\], \['v', 8\]\], want",
    ),
    "experts": (
        lambda **options: LoRAExperts(Experts(2, 8, 8), 2, **options),
        *({"alpha": 8}, {"alpha": 64}),
        "up.alpha was saved as 8, want the model's 64; up.scaling",
    ),
}


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_load_lora_weights_saved_with_another_scaling_raises_and_changes_nothing(name, tmp_path):
    build, saved_with, loaded_into, message = OTHER_CONFIGS[name]
    saved, model = (
        nn.ModuleDict({"up": build(**options)}) for options in (saved_with, loaded_into)
    )
    save_lora_weights(saved, tmp_path / "a")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"a does not fit the model: {message}"):
        load_lora_weights(model, tmp_path / "a")
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_lora_weights(saved, tmp_path / "a")


def test_load_lora_weights_with_alpha_of_the_same_scaling_loads(tmp_path):
    save_lora_weights(LoRALinear(8, 8, 4, 8), tmp_path / "a")  # 8 / 4, and 4 / √4
    load_lora_weights(LoRALinear(8, 8, 4, 4, scaling="rslora"), tmp_path / "a")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"lora_layers": "{}"}])
def test_load_lora_weights_of_a_file_without_alpha_warns(tmp_path, metadata):
    model = Model()
    save_file({key: t + 1 for key, t in lora_state_dict(model).items()}, tmp_path / "a", metadata)
    want = {key: t + 1 for key, t in lora_state_dict(model).items()}
    with pytest.warns(UserWarning, match="a does not tell the alpha of up and 1 more") as caught:
        load_lora_weights(model, tmp_path / "a")
    assert caught[0].filename == __file__
    assert all(torch.equal(t, want[key]) for key, t in lora_state_dict(model).items())


def test_load_lora_weights_of_broken_metadata_raises(tmp_path):
    save_file(lora_state_dict(Model()), tmp_path / "a", {"lora_layers": "{"})
    with pytest.raises(ValueError, match="a is no whole safetensors file: Expecting"):
        load_lora_weights(Model(), tmp_path / "a")


@pytest.mark.parametrize("config", ["[1, 2]", "3", "null", '{"": 3}', '{"up": null}'])
def test_load_lora_weights_of_metadata_that_is_no_table_raises(tmp_path, config):
    save_file(lora_state_dict(Model()), tmp_path / "a", {"lora_layers": config})
    with pytest.raises(ValueError, match=r"a: its metadata has lora_layers .*, want an object of"):
        load_lora_weights(Model(), tmp_path / "a")


def test_adapter_functions_know_the_adapters_of_experts(tmp_path):
    """Beside another LoRA layer they would be left out without a word."""
    model = nn.ModuleDict(
        {"up": LoRALinear(8, 8, 2), "moe": LoRAExperts(Experts(2, 8, 8, bias=True), 2)}
    )
    mark_only_lora_as_trainable(model)
    names = ["gate_up_proj", "down_proj"]
    keys = [f"moe.lora_{part}.{name}" for part in "AB" for name in names]
    assert sorted(lora_state_dict(model)) == sorted(["up.lora_A", "up.lora_B", *keys])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == lora_state_dict(model).keys()
    assert count_lora_parameters(model).lora == 2 * 2 * 8 + 2 * 2 * (8 + 16 + 8 + 8)
    save_lora_weights(model, tmp_path / "a")
    want = copy.deepcopy(lora_state_dict(model))
    for t in lora_state_dict(model).values():
        t.zero_()
    load_lora_weights(model, tmp_path / "a")
    assert all(torch.equal(t, want[key]) for key, t in lora_state_dict(model).items())
