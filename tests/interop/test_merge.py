"""`fuse(exact_merge=...)`, whose merges give the base back, and `merged_weights`."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn

from lora_kernels.bench.memory import peak
from lora_kernels.peft import check, explain, fuse, merge, merged_weights, unfuse
from lora_kernels.peft.kept import Tally, add_layer
from lora_kernels.peft.merge import ExactMerge, written_parameters
from lora_kernels.peft.quantize import quantize
from lora_kernels.peft.sharded import whole_parameters
from lora_kernels.peft.swap import lora_layers
from lora_kernels.quantization import QuantizedWeight
from tests.support.assertions import assert_bytes
from tests.support.peft_models import (
    activate,
    adalora_mlp,
    add_adapter,
    add_lora,
    base_bytes,
    batch,
    conv1d_mlp,
    dora_mlp,
    embedding_model,
    four_bit_mlp,
    in_float64,
    kasa_mlp,
    llama,
    mlp,
    moe,
    output,
    randomize,
    skip_without_kasa,
    token_ids,
    two_adapters,
)
from tests.support.processes import run_in_ranks

f32, bf16 = torch.float32, torch.bfloat16
PLACES = pytest.mark.parametrize("place", ["host", "device"])


def biased(dtype: torch.dtype) -> Any:
    model = add_lora(mlp(dtype).unload(), target_modules=["up"], lora_bias=True, bias="none")
    return model


def experts(dtype: torch.dtype, **config: Any) -> Any:
    model = moe(**config).to(dtype)
    randomize(model)
    return model


def experts_4bit(dtype: torch.dtype) -> Any:
    base = moe().unload()
    quantize(base, "nf4", dtype, torch.device("cpu"))
    from lora_kernels.layers import adaptable_experts

    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], target_parameters=parameters)
    with adaptable_experts(base):
        model = get_peft_model(base, config)
    randomize(model)
    return model


def tied(dtype: torch.dtype, **config: Any) -> Any:
    """Both embeddings have an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tied weights
        base = llama(dtype, tie_word_embeddings=True)
        return add_lora(base, target_modules=["embed_tokens", "lm_head", "q_proj"], **config)


class Convolution(nn.Module):
    """PEFT's layer over it is not fused."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.conv(x).mean((2, 3)))


def conv2d(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return add_lora(Convolution().to(dtype), target_modules=["conv", "up"])


def dora_4bit(dtype: torch.dtype) -> Any:
    return four_bit_mlp(True, {"use_dora": True}, compress_statistics=True)


def several_dora(dtype: torch.dtype) -> Any:
    """The second's norm is of the base, which PEFT unmerges for it."""
    return two_adapters(mlp(dtype), use_dora=True)


KINDS: dict[str, Callable[[torch.dtype], Any]] = {
    "linear": mlp,
    "biased": biased,
    "two adapters": lambda dtype: two_adapters(mlp(dtype)),
    "several DoRA": several_dora,
    "dora": dora_mlp,
    "kasa": lambda dtype: (skip_without_kasa(), kasa_mlp(dtype))[1],
    "adalora": adalora_mlp,
    "conv1d": conv1d_mlp,
    "conv1d dora": partial(conv1d_mlp, use_dora=True),
    "embedding": embedding_model,
    "embedding dora": partial(embedding_model, use_dora=True),
    "experts": experts,
    "experts in 4 bits": experts_4bit,
    "tied": tied,
    "conv2d": conv2d,
    "nf4": lambda dtype: four_bit_mlp(True, compress_statistics=True),
    "fp4": lambda dtype: four_bit_mlp(True, quant_type="fp4", compress_statistics=False),
    "nf4 in bfloat16 storage": lambda dtype: four_bit_mlp(True, quant_storage=bf16),
    "nf4 in blocks of 128": lambda dtype: four_bit_mlp(True, blocksize=128),
    "nf4 dora": dora_4bit,
    "nf4 two adapters": lambda dtype: two_adapters(four_bit_mlp(True)),
}
ALL = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _without_peft_s_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Unm|M)erge lora module to 4-bit")
        warnings.filterwarnings("ignore", "Already (following|unmerged)|All adapters are already")
        warnings.filterwarnings("ignore", ".*tie_word_embeddings=True")
        yield


def make(kind: str, dtype: torch.dtype = bf16) -> Any:
    if any(word in kind for word in ("4", "fp4")) and "conv" not in kind:
        pytest.importorskip("bitsandbytes")
    return KINDS[kind](dtype)


def assert_base(model: Any, want: dict[str, Tensor]) -> None:
    assert_bytes(base_bytes(model), want)


def copies(model: nn.Module) -> list[Tensor]:
    """The tensors that the layers hold as copies of their bases, each once."""
    found = {}
    for module in model.modules():
        exact = vars(module).get("exact_merge")
        for original in (exact.originals or ()) if exact is not None else ():
            t = original.values if hasattr(original, "values") else original.packed
            found[t.data_ptr()] = t
    return list(found.values())


def input_of(kind: str, model: Any) -> Tensor:
    if "embedding" in kind:
        return token_ids(3, 4)
    if kind in ("experts", "experts in 4 bits", "tied"):
        return torch.arange(12)[None]
    if kind == "conv2d":
        return torch.ones(2, 3, 5, 5, dtype=next(model.parameters()).dtype)
    up = model.get_base_model().up
    return batch(f32 if kind[:3] in ("nf4", "fp4") else up.base_layer.weight.dtype, up.in_features)


# Exact merges


@ALL
@pytest.mark.parametrize("safe_merge", [False, True])
def test_exact_merge_gives_peft_s_merged_weights_and_the_base_back(
    kind: str, safe_merge: bool
) -> None:
    """The merged base, the output over it and the adapters are PEFT's bits."""
    theirs = make(kind)
    ours = fuse(copy.deepcopy(theirs), exact_merge="host")
    before = base_bytes(ours)
    for each in (ours, theirs):
        each.merge_adapter(safe_merge=safe_merge)
    assert_base(ours, base_bytes(theirs))
    if kind != "experts in 4 bits":  # where PEFT's merge changes nothing
        changed = base_bytes(ours)
        assert any(not torch.equal(changed[name], before[name]) for name in before)
    x = input_of(kind, ours)
    with torch.no_grad():  # in eval mode bitsandbytes repacks PEFT's codes
        assert torch.equal(output(ours, x), output(theirs, x))
    ours.unmerge_adapter()
    assert_base(ours, before)
    assert not copies(ours)


@ALL
@PLACES
def test_exact_merge_of_changed_adapters_gives_the_base_back(kind: str, place: str) -> None:
    model = fuse(make(kind, f32), exact_merge=place)
    before = base_bytes(model)
    for cycle in range(3):
        model.merge_adapter()
        for adapter in list(model.peft_config):
            randomize(model, adapter, seed=cycle + 7)
        model.unmerge_adapter()
        assert_base(model, before)


def test_merge_without_exact_merge_is_peft_s() -> None:
    """PEFT's own drifts: the tests above would pass over a model that does not."""
    model = fuse(mlp(bf16))
    before = base_bytes(model)
    model.merge_adapter()
    model.unmerge_adapter()
    after = base_bytes(model)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert not [each for each in model.modules() if "exact_merge" in vars(each)]


def test_exact_merge_copies_two_bytes_a_weight_until_it_is_unmerged() -> None:
    model = fuse(mlp(bf16), exact_merge="device")
    parameters = [p for n, p in model.named_parameters() if "lora_" not in n]
    model.merge_adapter()
    assert sum(t.nbytes for t in copies(model)) == sum(2 * p.numel() for p in parameters)
    kept = [weakref.ref(t) for t in copies(model)]
    model.unmerge_adapter()
    gc.disable()
    try:  # no cycle holds a copy
        assert not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


def test_exact_merge_leaves_no_cycle_that_keeps_a_model() -> None:
    model = fuse(mlp(bf16), exact_merge="host")
    layer = weakref.ref(model.get_base_model().up)
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()


def test_exact_merge_of_4_bits_copies_packed_bytes_and_scales() -> None:
    pytest.importorskip("bitsandbytes")
    model = fuse(four_bit_mlp(True), exact_merge="host")
    up = model.get_base_model().up.base_layer
    packed = up.weight.data
    model.merge_adapter()
    (original, _) = vars(model.get_base_model().up)["exact_merge"].originals
    assert original.packed.nbytes == packed.nbytes == 64 * 192 // 2
    assert original.state.absmax.nbytes == 192  # a block of 64 each, in 8 bits
    model.unmerge_adapter()
    assert up.quant_state is up.weight.quant_state and up.weight.bnb_quantized
    assert up.weight.module is up


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4 in bfloat16 storage"])
def test_exact_merge_of_4_bits_gives_the_parameter_s_attributes_back(kind: str) -> None:
    """Each attribute has in one of the kinds another value than bitsandbytes' default."""
    model = fuse(make(kind), exact_merge="host")

    def attributes() -> dict[str, Any]:
        weight = model.get_base_model().up.base_layer.weight
        found = {name: value for name, value in vars(weight).items() if name != "quant_state"}
        return found | {"class": type(weight), "requires_grad": weight.requires_grad}

    before = attributes()
    model.merge_adapter()
    model.unmerge_adapter()
    assert attributes() == before and before["module"] is model.get_base_model().up.base_layer


def test_exact_merge_of_a_later_adapter_keeps_the_first_copy() -> None:
    model = mlp(bf16)
    add_adapter(model)
    theirs = copy.deepcopy(model)
    fuse(model, exact_merge="host")
    before = base_bytes(model)
    for each in (model, theirs):
        each.merge_adapter(["default"])
        each.merge_adapter(["second"])
    assert_base(model, base_bytes(theirs))
    model.merge_adapter()  # nothing is left to merge
    model.unmerge_adapter()
    assert_base(model, before)


@PLACES
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("first", ["embed_tokens", "lm_head"])
def test_exact_merge_of_tied_weights_copies_them_once(
    place: str, safe_merge: bool, first: str
) -> None:
    """Whichever of the layers is unmerged first, the last one gives the base back."""
    model = fuse(tied(bf16), exact_merge=place)
    base = model.get_base_model()
    embedding, head = base.model.embed_tokens, base.lm_head
    weight = embedding.base_layer.weight
    assert head.base_layer.weight is weight
    before = base_bytes(model)
    model.merge_adapter(safe_merge=safe_merge)
    assert sum(t.numel() == weight.numel() for t in copies(model)) == 1
    one, other = (embedding, head) if first == "embed_tokens" else (head, embedding)
    one.unmerge()
    assert other.merged and not torch.equal(weight, before["lm_head.weight"])
    one.merge()  # over the same copy
    one.unmerge()
    other.unmerge()
    assert head.base_layer.weight is weight
    model.unmerge_adapter()
    assert_base(model, before)
    assert not copies(model)


@pytest.mark.parametrize("ties", [False, True])
def test_fuse_again_with_exact_merge_follows_the_ties_of_today(ties: bool) -> None:
    """A tied layer's base comes back with the last layer, and an untied one's at once."""
    model = fuse(tied(bf16), exact_merge="host")
    head, embedding = model.get_base_model().lm_head, model.get_base_model().model.embed_tokens
    shared = head.base_layer.weight
    head.base_layer.weight = nn.Parameter(shared.detach().clone(), requires_grad=False)
    fuse(model, exact_merge="host")
    if ties:
        head.base_layer.weight = shared
        fuse(model, exact_merge="host")
    before = base_bytes(model)
    model.merge_adapter()
    head.unmerge()
    assert torch.equal(base_bytes(model)["lm_head.weight"], before["lm_head.weight"]) is not ties
    embedding.unmerge()
    model.unmerge_adapter()
    assert_base(model, before)


@pytest.mark.parametrize("first", ["embed_tokens", "lm_head"])
def test_exact_merge_over_a_tied_weight_that_raises_keeps_the_first_layer_s(first: str) -> None:
    model = fuse(tied(bf16), exact_merge="host")
    before, base = base_bytes(model), model.get_base_model()
    one, other = base.model.embed_tokens, base.lm_head
    if first == "lm_head":
        one, other = other, one
    with torch.no_grad():
        next(iter((other.lora_B or other.lora_embedding_B).parameters())).fill_(torch.nan)
    one.merge()
    merged = base_bytes(model)
    with pytest.raises(ValueError, match="NaN"):
        other.merge(safe_merge=True)
    assert_base(model, merged)
    one.unmerge()
    assert_base(model, before)
    assert not copies(model)


def test_exact_merge_of_views_of_one_storage_copies_them_once() -> None:
    """Parameters of their own, over the same memory."""
    model = mlp(bf16, target_modules=["up", "down"], linear=lambda K, N, **kwargs: nn.Linear(8, 8))
    base = model.get_base_model()
    up, down = base.up.base_layer, base.down.base_layer
    down.weight = nn.Parameter(up.weight.data, requires_grad=False)
    fuse(model, exact_merge="device")
    before = base_bytes(model)
    model.merge_adapter()
    assert len(copies(model)) == 3  # with two biases
    model.unmerge_adapter()
    assert_base(model, before)


def test_exact_merge_of_slices_of_one_storage_are_not_tied() -> None:
    """As a file that is mapped into memory gives them."""
    model = mlp(bf16)
    base = model.get_base_model()
    parts = [base.up.base_layer.weight, base.down.base_layer.weight]
    flat = torch.cat([p.data.flatten() for p in parts])
    for p, part in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
        p.data = part.view(p.shape)
    fuse(model, exact_merge="device")
    before = base_bytes(model)
    model.merge_adapter()
    base.up.unmerge()
    after = base_bytes(model)
    assert torch.equal(after["up.weight"], before["up.weight"])
    assert not torch.equal(after["down.weight"], before["down.weight"])


@pytest.mark.parametrize("how", ["a part", "transposed"])
def test_exact_merge_of_overlapping_weights_raises(how: str) -> None:
    model = mlp(bf16, linear=lambda K, N, **kwargs: nn.Linear(8, 8))
    base = model.get_base_model()
    up, down = base.up.base_layer, base.down.base_layer
    if how == "a part":
        down.weight = nn.Parameter(up.weight.data[2:5], requires_grad=False)
    else:
        down.weight = nn.Parameter(up.weight.data.t(), requires_grad=False)
    with pytest.raises(ValueError, match=r"exact_merge: got bases of shapes .* that overlap"):
        fuse(model, exact_merge="host")
    assert type(base.up).__name__ == "Linear"


@pytest.mark.parametrize("dtype", [f32, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "experts", "dora", "tied"])
def test_exact_merge_and_cast_gives_the_base_cast(kind: str, dtype: torch.dtype) -> None:
    model = fuse(make(kind), exact_merge="host")
    want = {name: t.to(dtype) for name, t in base_bytes(model).items()}
    model.merge_adapter()
    model.to(dtype)
    model.unmerge_adapter()
    found = base_bytes(model)
    names = [n for n in want if "lora" not in n and want[n].dtype is found[n].dtype]
    assert len(names) > len(want) / 2
    assert_bytes({n: found[n] for n in names}, {n: want[n] for n in names})


def test_exact_merge_of_a_model_cast_over_4_bits_gives_its_codes_back() -> None:
    pytest.importorskip("bitsandbytes")
    model = fuse(four_bit_mlp(True), exact_merge="host")
    before = base_bytes(model)
    model.merge_adapter()
    model.to(bf16)
    model.unmerge_adapter()
    found = base_bytes(model)
    for name, t in before.items():
        if not name.endswith("bias"):
            assert torch.equal(found[name], t)


def test_exact_merge_of_a_deleted_adapter_gives_the_base_back() -> None:
    model = mlp(bf16)
    add_adapter(model)
    fuse(activate(model, "default", "second"), exact_merge="host")
    before = base_bytes(model)
    model.merge_adapter()
    for name in ("up", "down"):  # the model's own method refuses it
        getattr(model.get_base_model(), name).delete_adapter("second")
    model.unmerge_adapter()
    assert_base(model, before)


def test_exact_merge_and_another_adapter_set_gives_the_base_back() -> None:
    """PEFT unmerges for it, as for a call with the adapters disabled."""
    model = mlp(bf16)
    add_adapter(model)
    fuse(model, exact_merge="host")
    before = base_bytes(model)
    model.merge_adapter()
    model.set_adapter("second")
    assert_base(model, before)
    model.merge_adapter()
    with model.disable_adapter():
        model(batch(bf16))
    assert_base(model, before)
    assert not copies(model)


@pytest.mark.parametrize("kind", ["linear", "dora", "nf4", "nf4 dora", "experts", "embedding"])
def test_exact_merge_that_raises_gives_the_base_back(kind: str) -> None:
    """A NaN in the second of two layers: PEFT merges the first, and raises at the second."""
    model = fuse(make(kind, f32), exact_merge="host")
    before = base_bytes(model)
    layers = [each for each in model.modules() if isinstance(getattr(each, "merged", None), bool)]
    last = layers[-1].lora_B or layers[-1].lora_embedding_B
    with torch.no_grad():
        next(iter(last.parameters())).fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert not layers[-1].merged and vars(layers[-1])["exact_merge"].originals is None
    assert [each.merged for each in layers[:-1]] == [True] * (len(layers) - 1)
    model.unmerge_adapter()
    assert_base(model, before)
    assert not copies(model)


def test_exact_merge_that_peft_breaks_off_gives_the_base_back() -> None:
    """PEFT adds to the weight before it finds that there is no bias to add to."""
    model = mlp(bf16)
    down = model.get_base_model().down
    down.lora_bias["default"] = True
    fuse(model, exact_merge="host")
    before = base_bytes(model)
    with pytest.raises((RuntimeError, AttributeError), match=r"bias|data"):
        down.merge()
    assert_base(model, before)
    assert not down.merged and not copies(model)


def test_exact_merge_of_the_second_adapter_that_raises_keeps_the_copy() -> None:
    model = two_adapters(mlp(bf16))
    fuse(model, exact_merge="host")
    before = base_bytes(model)
    up = model.get_base_model().up
    with torch.no_grad():
        up.lora_B["second"].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        up.merge(safe_merge=True)
    assert up.merged_adapters == ["default"]
    up.unmerge()
    assert_base(model, before)


@pytest.mark.parametrize("kind", ["linear", "experts", "nf4", "tied"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload_makes_no_copy(
    kind: str, safe_merge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make(kind)
    ours = fuse(copy.deepcopy(theirs), exact_merge="host")
    monkeypatch.setattr(ExactMerge, "_copy_base", lambda self: pytest.fail("a copy"))
    got, want = (each.merge_and_unload(safe_merge=safe_merge) for each in (ours, theirs))
    assert_bytes(got.state_dict(), want.state_dict())
    assert not [each for each in got.modules() if "exact_merge" in vars(each)]


def test_merge_of_an_adapter_that_the_layer_lacks_makes_no_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mlp(bf16)
    add_adapter(model, target_modules={"down"})
    fuse(model, exact_merge="host")
    kept: list[str] = []
    keep = ExactMerge._copy_base
    monkeypatch.setattr(
        ExactMerge, "_copy_base", lambda self: (kept.append(self.layer.layer_name), keep(self))[1]
    )
    model.merge_adapter(["second"])
    assert kept == ["base_model.model.down"] and model.get_base_model().down.merged


@pytest.mark.parametrize("kind", ["linear", "conv2d", "tied"])  # fused, left to PEFT, of one base
def test_exact_merge_turned_off_while_merged_gives_the_base_back(kind: str) -> None:
    for off in (fuse, unfuse):
        model = fuse(make(kind), exact_merge="host")
        before = base_bytes(model)
        model.merge_adapter()
        off(model)
        model.unmerge_adapter()
        assert_base(model, before)
        assert not [each for each in model.modules() if "exact_merge" in vars(each)]
        model.merge_adapter()
        assert not copies(model)


def test_exact_merge_again_changes_the_place_and_takes_new_layers() -> None:
    model = fuse(mlp(bf16, target_modules=["up"]), exact_merge="host")
    model.merge_adapter()
    fuse(model, exact_merge="device")
    model.unmerge_adapter()
    up = model.get_base_model().up
    assert vars(up)["exact_merge"].location == "device"
    model.add_adapter("more", LoraConfig(r=2, target_modules=["down"]))
    fuse(model, exact_merge="device")
    assert "exact_merge" in vars(model.get_base_model().down)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["linear", "nf4", "tied"])
def test_copy_of_a_merged_model_gives_the_base_back(kind: str, how: str) -> None:
    model = fuse(make(kind), exact_merge="host")
    before = base_bytes(model)
    model.merge_adapter()
    merged = base_bytes(model)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    other.unmerge_adapter()
    assert_base(other, before)
    assert_base(model, merged)
    model.unmerge_adapter()
    assert_base(model, before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copy_of_tied_exact_merges_ties_the_copies(how: str) -> None:
    """A copy whose layers do not know each other keeps a base, or gives back a merged one."""
    model = fuse(tied(bf16), exact_merge="host")
    model = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    base = model.get_base_model()
    embedding, head = base.model.embed_tokens, base.lm_head
    assert embedding.exact_merge.tied == [head.exact_merge]
    assert head.exact_merge.tied == [embedding.exact_merge]
    before, lora_B = base_bytes(model), embedding.lora_embedding_B["default"]
    values = lora_B.detach().clone()
    head.merge()
    with torch.no_grad():
        lora_B.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        embedding.merge(safe_merge=True)
    with torch.no_grad():
        lora_B.copy_(values)
    head.unmerge()
    assert_base(model, before)
    assert not copies(model)


def test_copy_of_a_layer_whose_tied_layer_is_gone_gives_the_base_back() -> None:
    model = fuse(tied(bf16), exact_merge="host")
    base = model.get_base_model()
    base.lm_head = base.lm_head.base_layer
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = base_bytes(other)
        other.merge_adapter()
        unfuse(other)
        other.unmerge_adapter()
        assert_base(other, before)


# A base that is loaded while it is merged

# PEFT's merge of experts in 4 bits changes nothing. Assigning unties, and drops 4-bit scales.
LOADED = [(kind, False) for kind in KINDS if kind != "experts in 4 bits"]
LOADED += [(kind, True) for kind in ("linear", "dora", "embedding", "experts")]
NOTICE = "exact_merge: weights were loaded into a merged base"


def new_base(model: Any) -> dict[str, Tensor]:
    """Other values for the base's parameters, by their keys."""
    keys = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    state = {key: t for key, t in model.state_dict().items() if key in keys and "lora_" not in key}
    return {key: t.flip(0).clone() for key, t in state.items()}


@pytest.mark.parametrize(("kind", "assign"), LOADED)
def test_exact_merge_of_a_base_loaded_while_merged_unmerges_it_as_peft_does(
    kind: str, assign: bool
) -> None:
    theirs = make(kind)
    ours = fuse(copy.deepcopy(theirs), exact_merge="host")
    old, state = base_bytes(ours), new_base(ours)
    for model in (ours, theirs):
        model.merge_adapter()
    with pytest.warns(UserWarning, match=NOTICE):
        ours.load_state_dict(state, strict=False, assign=assign)
    theirs.load_state_dict(state, strict=False, assign=assign)
    assert not copies(ours)
    for model in (ours, theirs):
        model.unmerge_adapter()
    found = base_bytes(ours)
    assert_bytes(found, base_bytes(theirs))
    assert any(not torch.equal(found[name], old[name]) for name in old)
    ours.merge_adapter()  # with a copy again
    ours.unmerge_adapter()
    assert_base(ours, found)
    assert not any(module._load_state_dict_pre_hooks for module in ours.modules())


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("how", ["model", "module"])
def test_exact_merge_of_a_base_loaded_by_a_tied_module_unmerges_it(target: str, how: str) -> None:
    """The other module has no adapter. Files of tied weights have one of their keys."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tied weights
        theirs = add_lora(llama(bf16, tie_word_embeddings=True), target_modules=[target])
    ours = fuse(copy.deepcopy(theirs), exact_merge="host")
    other = "lm_head" if target == "embed_tokens" else "model.embed_tokens"
    for model in (ours, theirs):
        base: Any = model.get_base_model()
        model.merge_adapter()
        state = {"weight": base.get_submodule(other).weight.detach().flip(0)}
        with pytest.warns(UserWarning, match=NOTICE) if model is ours else nullcontext():
            if how == "module":
                base.get_submodule(other).load_state_dict(state)
            else:
                base.load_state_dict({f"{other}.weight": state["weight"]}, strict=False)
        model.unmerge_adapter()
    assert_base(ours, base_bytes(theirs))


def test_exact_merge_of_another_adapter_after_a_load_keeps_no_copy() -> None:
    """The copy would be of a base with the first adapter in it."""
    theirs = two_adapters(mlp(bf16))
    ours = fuse(copy.deepcopy(theirs), exact_merge="host")
    state = new_base(ours)
    for model in (ours, theirs):
        model.merge_adapter(["default"])
        with pytest.warns(UserWarning, match=NOTICE) if model is ours else nullcontext():
            model.load_state_dict(state, strict=False)
        model.merge_adapter(["second"])
        assert not copies(model)
        model.unmerge_adapter()
    assert_base(ours, base_bytes(theirs))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_exact_merge_of_a_copy_that_is_loaded_leaves_the_original_exact(how: str) -> None:
    model = fuse(mlp(bf16), exact_merge="host")
    before = base_bytes(model)
    model.merge_adapter()
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    with pytest.warns(UserWarning, match=NOTICE):
        other.load_state_dict(new_base(other), strict=False)
    assert not copies(other)
    model.unmerge_adapter()
    assert_base(model, before)


def test_exact_merge_and_a_load_of_other_tensors_gives_the_base_back() -> None:
    """An adapter, and another layer's base."""
    model = fuse(mlp(bf16), exact_merge="host")
    before, base = base_bytes(model), model.get_base_model()
    base.up.merge()
    adapter = {key: t.flip(0) for key, t in model.state_dict().items() if "lora_" in key}
    model.load_state_dict(adapter, strict=False)
    down = {"weight": base.down.base_layer.weight.detach().flip(0)}
    base.down.base_layer.load_state_dict(down)
    base.up.unmerge()
    found = base_bytes(model)
    assert_bytes(found, before | {"down.weight": down["weight"]})


@pytest.mark.parametrize("off", [fuse, unfuse])
def test_exact_merge_turned_off_and_loaded_while_merged_unmerges_as_peft_does(off: Any) -> None:
    theirs = mlp(bf16)
    ours = fuse(copy.deepcopy(theirs), exact_merge="host")
    for model in (ours, theirs):
        model.merge_adapter()
    off(ours)
    with pytest.warns(UserWarning, match=NOTICE):
        ours.load_state_dict(new_base(ours), strict=False)
    theirs.load_state_dict(new_base(theirs), strict=False)
    for model in (ours, theirs):
        model.unmerge_adapter()
    assert_base(ours, base_bytes(theirs))
    assert not [module for module in ours.modules() if "exact_merge" in vars(module)]


def test_exact_merge_of_a_resized_base_raises_and_stays_merged() -> None:
    model = fuse(embedding_model(bf16), exact_merge="host")
    layer = model.get_base_model().tokens
    layer.merge()
    layer.base_layer.weight = nn.Parameter(torch.zeros(50, 23, dtype=bf16), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"got a base's weight of shape \[50, 23\], want \[41"):
        layer.unmerge()
    assert layer.merged


def test_fuse_of_a_merged_model_with_exact_merge_raises() -> None:
    model = mlp(bf16)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"exact_merge: base_model.model.up is merged already"):
        fuse(model, exact_merge="host")
    assert "exact_merge" not in vars(model.get_base_model().up)


def test_fuse_with_an_unknown_place_raises() -> None:
    with pytest.raises(ValueError, match="exact_merge: got 'gpu', want 'host' or 'device'"):
        fuse(mlp(bf16), exact_merge="gpu")


def test_fuse_over_a_format_without_copies_raises() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = nn.Sequential(bitsandbytes.nn.Linear8bitLt(8, 8, has_fp16_weights=False))
    base.is_loaded_in_8bit = True  # type: ignore[assignment]
    model = get_peft_model(base, LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"exact_merge: got .*0, over a Linear8bitLt"):
        fuse(model, exact_merge="host")


def test_check_of_experts_with_exact_merges_leaves_no_copy() -> None:
    model = fuse(experts(f32), exact_merge="host")
    ids = torch.arange(12)[None]
    assert check(model, {"input_ids": ids, "labels": ids}).ok
    assert not copies(model)
    before = base_bytes(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_base(model, before)


@pytest.mark.parametrize("kind", ["dora", "several DoRA", "nf4", "nf4 dora"])
def test_exact_merge_leaves_nothing_of_peft_s_for_its_own_unmerge(kind: str) -> None:
    model = fuse(make(kind, f32), exact_merge="host")
    up = model.get_base_model().up
    model.merge_adapter()
    model.unmerge_adapter()
    assert not up._caches and not up.merged_adapters
    assert getattr(up, "merge_loss", None) is None


@pytest.mark.parametrize("sharded", [False, True])
def test_merges_of_a_model_that_fsdp2_or_accelerate_manages(sharded: bool) -> None:
    """FSDP2's parameters are DTensors; accelerate loads offloaded ones for PEFT's merge."""
    model = fuse(mlp(bf16), exact_merge="host")
    before, want = base_bytes(model), unloaded(model)
    if not sharded:
        cpu_offload(model, execution_device="cpu")
        layers = {name: getattr(model.get_base_model(), name).base_layer for name in ("up", "down")}

        def stored() -> dict[str, Tensor]:
            maps = {name: layer._hf_hook.weights_map for name, layer in layers.items()}
            return {f"{n}.{key}": t.clone() for n, of in maps.items() for key, t in of.items()}

        model.merge_adapter()
        assert_bytes(stored(), want)
        model.unmerge_adapter()
        assert_bytes(stored(), before)
        with pytest.raises(ValueError, match=r"model: got .* offloaded"):
            merged_weights(model)
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        assert_bytes(dict(merged_weights(model)), want)
        model.merge_adapter()
        merged = {name: t.full_tensor() for name, t in base_bytes(model).items()}  # type: ignore[attr-defined]
        assert_bytes(merged, want)
        model.unmerge_adapter()
        back = {name: t.full_tensor() for name, t in base_bytes(model).items()}  # type: ignore[attr-defined]
        assert_bytes(back, before)
    finally:
        torch.distributed.destroy_process_group()


SHARDED_4BIT = r"got \S*up, whose 4-bit weight FSDP2 shards .* want .* exact_merge=.host"


@pytest.fixture
def one_rank() -> Iterator[Any]:
    """A mesh of this process."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_merges_of_4_bits_that_fsdp2_shards_raise_before_a_layer_changes(one_rank: Any) -> None:
    """A dense layer comes before the 4-bit one."""
    pytest.importorskip("bitsandbytes")
    base = nn.ModuleDict({"first": nn.Linear(8, 8), "up": four_bit_mlp(True).unload().up})
    base.is_loaded_in_4bit = True  # type: ignore[assignment]
    model: Any = fuse(add_lora(base, target_modules=["first", "up"]))
    model = torch.distributed.fsdp.fully_shard(model, mesh=one_rank)  # type: ignore[attr-defined]
    before = {
        name: t.to_local().clone() for name, t in base_bytes(model).items() if name[-6:] == "weight"
    }
    calls = model.merge_adapter, model.merge_and_unload
    for call in (*calls, model.get_base_model()["up"].merge):
        with pytest.raises(ValueError, match=SHARDED_4BIT):
            call()
        layers = [layer for _, layer, _ in lora_layers(model)]
        assert len(layers) == 2 and not any(layer.merged for layer in layers)
        after = base_bytes(model)
        assert_bytes({name: after[name].to_local() for name in before}, before)  # type: ignore[attr-defined]
    unfuse(model)
    for call in calls:
        with pytest.raises(ValueError, match=SHARDED_4BIT):
            call()


def merge_flattened(rank: int, folder: str) -> None:
    """Compare `merged_weights` of models in FSDP1's wrappers with those of the whole model."""
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = LlamaDecoderLayer.__name__
    below = r"model: got .* by FSDP1, want .*summon_full"
    layers = ModuleWrapPolicy({LlamaDecoderLayer})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of FSDP on a CPU
        for keeps_parameters, policy in ((True, None), (True, layers), (False, None), (False, 0)):
            model = fuse(add_lora(llama(f32), target_modules=["q_proj", "down_proj", "lm_head"]))
            model.requires_grad_(keeps_parameters)
            if policy == 0:  # as PEFT advises: each trained matrix in a wrapper of its own
                model.set_requires_grad("default")
                policy = fsdp_auto_wrap_policy(model)
            want = {name: t.clone() for name, t in merged_weights(model)}
            wrapped = FullyShardedDataParallel(
                model,
                auto_wrap_policy=policy,
                use_orig_params=keeps_parameters,
                device_id=torch.device("cpu"),
            )
            ids = torch.arange(6)[None]
            for _ in range(2):  # before the first forward, and after it
                assert_bytes(dict(merged_weights(wrapped)), want)
                logits = wrapped(input_ids=ids).logits
            stream = merged_weights(wrapped)
            next(stream)  # a stream that is not read to its end
            torch.testing.assert_close(wrapped(input_ids=ids).logits, logits, rtol=0, atol=0)
            del stream
            for each in (model, model.get_base_model()):
                with pytest.raises(ValueError, match=below):
                    merged_weights(each)
            for call in (model.merge_adapter, model.merge_and_unload):
                with pytest.raises(ValueError, match=r"flattened by FSDP1.*merged_weights"):
                    call()
            with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
                for each in (wrapped, model, model.get_base_model()):
                    assert_bytes(dict(merged_weights(each)), want)


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="no gloo",
)
def test_merged_weights_under_fsdp1_are_those_of_the_whole_model(tmp_path: Path) -> None:
    run_in_ranks(merge_flattened, tmp_path)


def whole(model: Any) -> dict[str, Tensor]:
    """`base_bytes` of all ranks."""
    found = base_bytes(model)
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in found.items()}


def merge_sharded(rank: int, folder: str) -> None:
    """`merged_weights` and exact merges of each kind under FSDP2, beside those of one process."""
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for kind, late in itertools.product(SHARDED, (False, True)):
        model = fuse(make(kind, f32 if kind == "tied" else bf16))
        want = {name: t.clone() for name, t in merged_weights(model)}
        before = base_bytes(model)
        if not late:
            fuse(model, exact_merge="host")
        for module in list(model.get_base_model().children()):
            if kind != "tied" and next(module.parameters(), None) is not None:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if late:
            fuse(model, exact_merge="host")
        explain(model)  # has views of placeholders
        states = [getattr(m, "quant_state", None) for m in model.modules()]
        assert not any(hasattr(state, "_lora_kernels") for state in states)
        names = [n for n, p in model.named_parameters() if not hasattr(p, "full_tensor")]
        assert not names, names
        got = dict(merged_weights(model))
        assert_bytes(got, want)
        assert [*got] == [*want], kind
        codes = {n for n in before if n.endswith("weight")}
        was = whole(model)
        for _ in range(2):
            model.merge_adapter()
            merged = whole(model)
            assert_bytes({n: merged[n] for n in codes}, {n: want[n] for n in codes})
            for name, module in model.get_base_model().named_modules():
                if (state := getattr(module, "quant_state", None)) is not None:
                    scales = {f"{name}.weight.{k}": v for k, v in state.as_dict(True).items()}
                    scales = {n.replace(".base_layer", ""): t for n, t in scales.items()}
                    assert_bytes(scales, {n: want[n] for n in scales})
            held = sum(t.nbytes for t in copies(model))
            model.unmerge_adapter()
            assert_bytes(whole(model), was)
        written = {id(m._parameters[n]): m._parameters[n] for m, n in slots_of(model)}
        assert held == sum(p.to_local().nbytes for p in written.values()), kind
        assert_bytes(dict(merged_weights(model)), want)  # the scales are the base's again
        assert_failed_write_is_lost(model)
    assert_layer_by_layer(mesh)


def assert_failed_write_is_lost(model: Any) -> None:
    """Shards keep their values if an exception leaves `whole_parameters`."""
    slots = slots_of(model)
    was = whole(model)
    with pytest.raises(ZeroDivisionError), whole_parameters([m for m, _ in slots], slots):
        for module, name in slots:
            module._parameters[name].detach().view(torch.uint8).fill_(1)
        raise ZeroDivisionError
    assert_bytes(whole(model), was)


def assert_layer_by_layer(mesh: Any) -> None:
    """Each parameter is gathered once, and those of one layer at a time."""
    from torch.distributed.fsdp import fully_shard

    gathered: list[int] = []

    @contextmanager
    def record(modules: Any, *args: Any) -> Iterator[None]:
        modules = list(modules)
        gathered.append(
            sum(p.numel() for m in modules for p in m._parameters.values() if p is not None)
        )
        with whole_parameters(modules, *args):
            yield

    model = add_lora(llama(f32, num_hidden_layers=5), target_modules="all-linear")
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "whole_parameters", record)
        for _ in merged_weights(model):
            pass
    assert sum(gathered) == sum(p.numel() for p in model.parameters())
    tied = model.get_base_model().lm_head.weight.numel()
    layers = [layer for _, layer, _ in lora_layers(model)]
    assert max(gathered) == max(tied, *(sum(p.numel() for p in x.parameters()) for x in layers))


def slots_of(model: Any) -> list[Any]:
    return [slot for _, layer, _ in lora_layers(model) for slot in written_parameters(layer)]


# Not those that PEFT merges into a decoded copy, and FSDP2 does not shard convolutions' channels.
SHARDED = ["linear", "biased", "two adapters", "several DoRA", "dora", "kasa", "adalora", "conv1d"]
SHARDED += ["embedding", "embedding dora", "experts", "tied", "nf4", "fp4", "nf4 dora"]
SHARDED += ["nf4 in bfloat16 storage", "nf4 in blocks of 128", "nf4 two adapters", "conv2d"]


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="no gloo",
)
def test_merges_under_fsdp2_are_those_of_one_process(tmp_path: Path) -> None:
    run_in_ranks(merge_sharded, tmp_path)


# merged_weights


def unloaded(model: Any, **how: Any) -> dict[str, Tensor]:
    return {
        n: t.clone() for n, t in copy.deepcopy(model).merge_and_unload(**how).state_dict().items()
    }


def everything(model: Any) -> dict[str, Any]:
    """All bytes of the model, and the objects that its parameters, states and caches are."""
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    states = {name: vars(m).get("quant_state") for name, m in model.named_modules()}
    parameters = dict(model.named_parameters())
    caches = {
        f"{name}.{key}": cached
        for name, module in model.named_modules()
        for key, cached in getattr(module, "_caches", {}).items()
    }
    return {"tensors": tensors, "parameters": parameters, "states": states, "caches": caches}


def assert_untouched(model: Any, before: dict[str, Any]) -> None:
    after = everything(model)
    assert_bytes(after["tensors"], before["tensors"])
    assert_same_objects(after, before)


def assert_same_objects(after: dict[str, Any], before: dict[str, Any]) -> None:
    for kind in ("parameters", "states", "caches"):
        assert after[kind].keys() == before[kind].keys()
        assert all(after[kind][name] is found for name, found in before[kind].items())


@ALL
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("exact_merge", [None, "device"])
def test_merged_weights_are_those_of_merge_and_unload(
    kind: str, safe_merge: bool, exact_merge: str | None
) -> None:
    model = make(kind)
    want = unloaded(model, safe_merge=safe_merge)
    for each in (model, fuse(model, exact_merge=exact_merge)):
        before = everything(each)
        got = dict(merged_weights(each, safe_merge=safe_merge))
        assert_bytes(got, want)
        assert not any(t.requires_grad for t in got.values())
        assert_untouched(each, before)
        assert not any(getattr(module, "merged", False) for module in each.modules())


def test_merged_weights_of_one_of_two_adapters() -> None:
    model = mlp(bf16)
    add_adapter(model)
    want = unloaded(model, adapter_names=["second"])
    assert_bytes(dict(merged_weights(model, ["second"])), want)


def test_merged_weights_of_a_merged_model_merge_the_rest() -> None:
    model = fuse(mlp(bf16), exact_merge="host")
    add_adapter(model)
    model.merge_adapter()
    want = unloaded(model, adapter_names=["second"])
    before = everything(model)
    assert_bytes(dict(merged_weights(model)), base_bytes(model))
    assert_bytes(dict(merged_weights(model, ["second"])), want)
    assert_untouched(model, before)


@pytest.mark.parametrize("active", ["default", "second", "without"])
def test_merged_weights_of_modules_to_save_are_the_active_adapter_s(active: str) -> None:
    """They are the base's own under an adapter that saves none."""
    model = add_lora(llama(bf16), target_modules=["q_proj"], modules_to_save=["lm_head"])
    add_adapter(model)
    add_adapter(model, "without", modules_to_save=None)
    heads = model.get_base_model().lm_head.modules_to_save
    with torch.no_grad():
        for i, head in enumerate(heads.values()):
            head.weight.add_(i + 1.0)
    assert len(heads) == 2
    model.set_adapter(active)
    assert_bytes(dict(merged_weights(model)), unloaded(model))


def test_merged_weights_with_trainable_tokens_are_those_of_merge_and_unload() -> None:
    model = add_lora(llama(bf16), target_modules=["q_proj"], trainable_token_indices=[1, 3])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "trainable_tokens_delta" in name:
                p.add_(1.0)
    assert_bytes(dict(merged_weights(model)), unloaded(model))


def test_merged_weights_of_an_adapter_on_one_of_two_tied_weights_change_both() -> None:
    """As `merge_adapter` does, which writes into the memory of both."""
    model = add_lora(llama(bf16, tie_word_embeddings=True), target_modules=["embed_tokens"])
    got = dict(merged_weights(model))
    assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    model.merge_adapter()
    assert_bytes(got, base_bytes(model))


def test_merged_weights_that_raise_or_stop_leave_the_model_as_it_was() -> None:
    model = mlp(bf16)
    before = everything(model)
    stream = merged_weights(model)
    next(stream)
    assert_untouched(model, before)
    stream.close()
    with torch.no_grad():
        model.get_base_model().down.lora_B["default"].weight.fill_(torch.nan)
    before = everything(model)
    with pytest.raises(ValueError, match="NaN"):
        dict(merged_weights(model, safe_merge=True))
    assert_same_objects(everything(model), before)
    assert not model.get_base_model().down.merged_adapters


def test_merged_weights_hold_at_most_a_layer_at_a_time() -> None:
    """Its merged copy and what PEFT's sum takes, whatever the number of layers."""

    def most(layers: int) -> int:
        torch.manual_seed(0)
        base = nn.Sequential(*[nn.Linear(128, 128, bias=False) for _ in range(layers)])
        model = get_peft_model(base, LoraConfig(r=2, target_modules=r"\d+"))

        def consume() -> None:
            stream = merged_weights(model)
            while next(stream, None) is not None:  # the consumer lets each go
                pass

        return peak(consume)

    one, many = most(1), most(6)
    assert many <= one + 4096 and one <= 3 * 128 * 128 * 4 + 8192


def test_merged_weights_visit_modules_in_proportion_to_the_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice as many further layers take twice as many further visits."""
    visits = 0
    named_modules = nn.Module.named_modules

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
        nonlocal visits
        for each in named_modules(self, *args, **kwargs):
            visits += 1
            yield each

    def visits_of(layers: int) -> int:
        nonlocal visits
        base = nn.Sequential(*[nn.Linear(8, 8) for _ in range(layers)])
        model = get_peft_model(base, LoraConfig(r=2, target_modules=r"\d+"))
        visits = 0
        assert len(list(merged_weights(model))) == 2 * layers
        return visits

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    few, more, most = (visits_of(layers) for layers in (4, 8, 16))
    assert few > 0 and most - more == 2 * (more - few)


def test_merged_weights_of_checkpointed_layers_are_those_without_a_wrapper() -> None:
    """The wrapper is in the modules' names, and not in the state dict's."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = add_lora(llama(bf16), target_modules=["q_proj", "down_proj"])
    want = {name: t.clone() for name, t in merged_weights(model)}
    layers = model.get_base_model().model.layers
    layers[1] = checkpoint_wrapper(layers[1])
    assert_bytes(dict(merged_weights(model)), want)
    assert_bytes(dict(merged_weights(nn.DataParallel(model))), want)


def test_merged_weights_of_a_base_in_a_wrapper_of_its_own_raise() -> None:
    """PEFT's merge would write into the model's own weight."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = mlp(bf16)
    up = model.get_base_model().up
    up.base_layer = checkpoint_wrapper(up.base_layer)
    with pytest.raises(ValueError, match=r"model: got up, whose base is wrapped in CheckpointW"):
        merged_weights(model)


def test_merges_of_multihead_attention_raise() -> None:
    """PEFT merges and unmerges it in every forward."""
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    model = add_lora(base, target_modules=["attention", "up"])
    with pytest.raises(ValueError, match=r"exact_merge: got .*attention, an nn.MultiheadAttention"):
        fuse(model, exact_merge="host")
    with pytest.raises(ValueError, match=r"model: got attention, an nn.MultiheadAttention"):
        merged_weights(model)
    assert not [each for each in model.modules() if "exact_merge" in vars(each)]


def test_merged_weights_of_offloaded_weights_raise() -> None:
    model = mlp(bf16)
    base = model.get_base_model().up.base_layer
    base.weight = nn.Parameter(base.weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"model: got up.base_layer.weight offloaded"):
        merged_weights(model)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "model"])
def test_merged_weights_of_what_is_no_peft_model_raise(model: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="model: got"):
        merged_weights(model)


def test_merged_weights_load_into_the_base() -> None:
    model = mlp(bf16)
    base = mlp(bf16).unload()
    base.load_state_dict(dict(merged_weights(model)))
    assert_bytes(base.state_dict(), unloaded(model))


# What a merge keeps


def sharing(dtype: torch.dtype, std: float) -> Any:
    """A layer with weights from 1 to 2, on bfloat16's grid, and updates of this size."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(384, 256, bias=False))
    with torch.no_grad():
        base[0].weight.copy_((1 + torch.rand(256, 384)).bfloat16().clamp(max=1.9))
    model = get_peft_model(base.to(dtype), LoraConfig(r=64, lora_alpha=64, target_modules=["0"]))
    layer = model.get_base_model()[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.normal_()
        layer.lora_B["default"].weight.normal_(std=std / 8)  # √64 sums
    return model.float() if dtype is f32 else model


@pytest.mark.parametrize("dtype", [bf16, torch.float16, f32])
@pytest.mark.parametrize("units", [0.1, 0.2, 0.3, 0.5, 1.0])
def test_check_gives_the_share_of_an_update_that_a_dtype_keeps(
    units: float, dtype: torch.dtype
) -> None:
    """Σ_k φ(k + ½; s) for normal updates of s units. An update is a sum of 64 products, which are
    not quite normal; their number is 98,304."""
    model = sharing(dtype, units * torch.finfo(dtype).eps)
    k = torch.arange(-40, 40, dtype=torch.float64) + 0.5
    want = float(torch.exp(-0.5 * (k / units) ** 2).sum() / (units * (2 * torch.pi) ** 0.5))
    (row,) = check(model, torch.randn(4, 384, dtype=dtype)).kept
    assert (row.target, row.kind, row.layers) == (str(dtype).removeprefix("torch."), "0", 1)
    assert row.share == pytest.approx(want, abs=0.04)


def dense_weights(model: Any) -> dict[str, Tensor]:
    """The base weights of PEFT's layers, decoded, in float64."""
    found = {}
    for name, layer, _ in lora_layers(model):
        weight = layer.get_base_layer().weight
        if type(weight).__name__ == "Params4bit":
            weight = QuantizedWeight.from_bitsandbytes(weight).dequantize(f32)
        found[name.rpartition(".")[2]] = weight.detach().double()
    return found


@pytest.mark.parametrize(
    ("kind", "dtype", "target"),
    [
        ("linear", bf16, "bfloat16"),
        ("two adapters", bf16, "bfloat16"),
        ("dora", bf16, "bfloat16"),
        ("conv1d", torch.float16, "float16"),
        ("embedding", f32, "float32"),
        ("adalora", f32, "float32"),
        ("nf4", f32, "nf4"),
        ("fp4", f32, "fp4"),
        ("nf4 dora", f32, "nf4"),
        ("nf4 two adapters", f32, "nf4"),
    ],
)
def test_kept_share_of_a_layer_is_that_of_its_merged_weight(
    kind: str, dtype: torch.dtype, target: str
) -> None:
    """Beside the sum that PEFT makes of a float64 model of the same weights."""
    model, tally = make(kind, dtype), Tally()
    exact, state = in_float64(model), everything(model)
    for name, layer, _ in lora_layers(model):
        add_layer(tally, name, layer)
    assert_untouched(model, state)
    before = dense_weights(model)
    for _, layer, _ in lora_layers(exact):
        if type(layer).__name__ == "Linear4bit":
            layer.__class__ = lora.Linear
    for each in (model, exact):
        each.merge_adapter()
    after, sums = dense_weights(model), dense_weights(exact)
    rows = tally.rows()
    assert {row.kind for row in rows} == sums.keys()
    for row in rows:
        delta = sums[row.kind] - before[row.kind]
        moved = after[row.kind] - before[row.kind]
        assert (row.target, row.layers) == (target, 1)
        # Adapters in 16 bits have their product rounded, to a part in 256.
        share = float((moved * delta).sum() / (delta**2).sum())
        assert row.share == pytest.approx(share, abs=2.0**-8)
        assert row.rounding == pytest.approx(float((moved - delta).norm() / delta.norm()), abs=0.02)


def test_check_warns_of_experts_in_4_bits_whose_merge_changes_nothing() -> None:
    model = make("experts in 4 bits", f32)
    ids = torch.arange(12)[None]
    found = check(fuse(model), {"input_ids": ids, "labels": ids})
    tally = Tally()
    for name, layer, _ in lora_layers(model):
        add_layer(tally, name, layer)
    rows = {row.kind: row for row in tally.rows()}
    assert rows["gate_up_proj"][:4] == ("nf4", "gate_up_proj", 2, 0.0)
    assert rows["down_proj"].rounding == pytest.approx(1.0)
    assert not found.ok and "merge" in str(found)


def test_check_of_experts_says_what_their_merge_keeps() -> None:
    model = fuse(experts(bf16), exact_merge="host")
    ids = torch.arange(12)[None]
    text = str(check(model, {"input_ids": ids, "labels": ids}))
    for kind in ("gate_up_proj", "down_proj", "q_proj"):
        assert re.search(rf"^{kind} +2 +1\.00\d +0\.0", text, re.MULTILINE), text
    assert "warning" not in text


def test_check_of_an_untrained_adapter_prints_no_share() -> None:
    model = get_peft_model(mlp(bf16).unload(), LoraConfig(target_modules=["up"]))
    found = check(model, batch(bf16))
    assert found.untrained and not found.kept and "merged into" not in str(found)


def test_share_of_several_doras_over_4_bits_is_left_out() -> None:
    """PEFT merges the second into codes that hold the first, which float32 sums do not."""
    pytest.importorskip("bitsandbytes")
    model, tally = two_adapters(dora_4bit(f32), use_dora=True), Tally()
    state = everything(model)
    for name, layer, _ in lora_layers(model):
        add_layer(tally, name, layer)
    assert not tally.rows()
    assert_untouched(model, state)


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_kept_share_of_a_weight_in_chunks_is_that_of_the_whole(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp(bf16)
    rows = []
    for size in (1 << 22, chunk):
        monkeypatch.setattr("lora_kernels.peft.kept._CHUNK", size)
        tally = Tally()
        for name, layer, _ in lora_layers(model):
            add_layer(tally, name, layer)
        rows.append(tally.rows())
    for whole, parts in zip(*rows, strict=True):
        assert whole[:3] == parts[:3] and whole.layers == 1
        assert whole[3:] == pytest.approx(parts[3:], rel=1e-12)


@pytest.mark.parametrize("update", [0.0, torch.inf, torch.nan])
def test_tally_has_no_row_of_an_update_without_a_share(update: float) -> None:
    tally, before = Tally(), torch.ones(3)
    exact = torch.tensor([1.0, 1.0, 1.0 + update])
    tally.add("float32", "up", before, exact, exact)
    assert not tally.rows()


@pytest.mark.parametrize("kind", ["linear", "experts", "experts in 4 bits", "nf4", "nf4 dora"])
def test_share_of_a_layer_that_lacks_an_active_adapter_is_that_of_its_own(kind: str) -> None:
    model = make(kind, f32)

    def rows() -> dict[str, Any]:
        tally = Tally()
        for name, layer, _ in lora_layers(model):
            add_layer(tally, name, layer)
        return {row.kind: row for row in tally.rows()}

    alone, other = rows(), "q_proj" if kind.startswith("experts") else "down"
    add_adapter(model, target_modules={other}, target_parameters=None)
    activate(model, "default", "second")
    names, both = alone.keys() - {other}, rows()
    assert names and {n: both.get(n) for n in names} == {n: alone[n] for n in names}
