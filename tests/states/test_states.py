"""Each field of each state is changed alone once, and the change is seen."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_kernels
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.layers import AdaLoRALinear, QLoRALinear, RankAllocator
from lora_kernels.layers.cache import DoraNormCache, fingerprint
from lora_kernels.quantization import quantize_4bit

f32, bf16 = torch.float32, torch.bfloat16


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter(N: int, K: int) -> dict[str, Any]:
    return {"lora_A": drawn(3, K, seed=1), "lora_B": drawn(N, 3, seed=2), "scaling": 1.5}


# Keys of caches ----------------------------------------------------------------------------------

N = K = 12
NORM_CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "weight": lambda a: a["weight"].mul_(2),
    "weight without a version": lambda a: a["weight"].data.mul_(2),
    "weight's strides": lambda a: a.update(weight=a["weight"].t()),
    "weight's offset": lambda a: a.update(
        weight=a["weight"].as_strided(a["weight"].shape, a["weight"].stride(), 1)
    ),
    "weight's dtype": lambda a: a.update(weight=a["weight"].to(bf16)),
    "lora_A": lambda a: a["lora_A"].mul_(2),
    "lora_A without a version": lambda a: a["lora_A"].data.mul_(2),
    "lora_B": lambda a: a["lora_B"].mul_(2),
    "rank_gate": lambda a: a["rank_gate"].mul_(2),
    "no rank_gate": lambda a: a.update(rank_gate=None),
    "scaling": lambda a: a.update(scaling=3.0),
}


@pytest.mark.parametrize("change", NORM_CHANGES)
@torch.no_grad()
def test_dora_norm_cache_one_operand_changed_computes_anew(change: str) -> None:
    weight = drawn(N * K + 1).as_strided((N, K), (K, 1))
    args: dict[str, Any] = adapter(N, K) | {"weight": weight, "rank_gate": drawn(3, seed=3)}
    kept = DoraNormCache()
    before = kept(**args).clone()
    assert kept(**args).data_ptr() == kept(**args).data_ptr()  # until then
    NORM_CHANGES[change](args)
    got = kept(**args)
    want = lora_kernels.dora_norm(**args)
    assert torch.equal(got, want) and not torch.equal(got, before)


CODE_CHANGES = ("packed", "absmax", "code", "nested_absmax", "nested_code", "offset")


@pytest.mark.parametrize("field", CODE_CHANGES)
@torch.no_grad()
def test_dora_norm_cache_one_tensor_of_a_4bit_weight_changed_computes_anew(field: str) -> None:
    weight = quantize_4bit(drawn(16, 64), "nf4", 64, True)
    args: dict[str, Any] = adapter(16, 64) | {"weight": weight}
    cache = DoraNormCache()
    before = cache(**args).clone()
    tensor: Tensor = getattr(weight, field)
    tensor.copy_(tensor.flip(0) if tensor.dim() and tensor.dtype is torch.uint8 else tensor * 1.5)
    got, want = cache(**args), lora_kernels.dora_norm(**args)
    assert torch.equal(got, want) and not torch.equal(got, before)


BASE_CHANGES: dict[str, Callable[[Tensor], object]] = {
    "one element": lambda w: w[3, 5].mul_(2),
    "the last bit of one element": lambda w: w.view(torch.int16)[3, 5].bitwise_xor_(1),
    "the sign of a zero": lambda w: w[0, 0].neg_(),
    "a NaN": lambda w: w[3, 5].fill_(torch.nan),
    "two rows swapped": lambda w: w.copy_(w.index_select(0, permutation(w.shape[0], 2, 9))),
    "two columns swapped": lambda w: w.copy_(w.index_select(1, permutation(w.shape[1], 3, 11))),
    "two columns of one place in their words swapped": lambda w: w.copy_(
        w.index_select(1, permutation(w.shape[1], 3, 3 + 32))
    ),
    "two elements of a row that keep its sum": lambda w: w.view(torch.int16)[4, :2].add_(
        torch.tensor([1, -1], dtype=torch.int16)
    ),
    "rows rolled": lambda w: w.copy_(w.roll(1, 0)),
    "all rows but the last of the memory": lambda w: w[:-1].neg_(),
    "the last element": lambda w: w[-1, -1].mul_(2),
}


def permutation(size: int, i: int, j: int) -> Tensor:
    order = torch.arange(size)
    order[i], order[j] = j, i
    return order


@pytest.mark.parametrize("size", [(13, 47), (40, 1024)], ids=str)  # of one chunk, of two
@pytest.mark.parametrize("change", BASE_CHANGES)
def test_fingerprint_of_a_changed_base_is_another(change: str, size: tuple[int, int]) -> None:
    """Through `.data`, which counts no version. The values come back with their fingerprint."""
    weight = nn.Parameter(drawn(*size).to(bf16), requires_grad=False)
    weight.data[0, 0] = 0.0
    before, version, kept = fingerprint(weight), weight._version, weight.detach().clone()
    BASE_CHANGES[change](weight.data)
    assert fingerprint(weight) != before and weight._version == version
    weight.data.copy_(kept)
    assert fingerprint(weight) == before


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t(),
    "shape": lambda t: t.view(4, 9),
    "dtype": lambda t: t.view(torch.int32),
}


@pytest.mark.parametrize("change", LAYOUTS)
def test_fingerprint_of_another_layout_of_the_same_memory_is_another(change: str) -> None:
    t = drawn(6, 6)
    assert fingerprint(LAYOUTS[change](t)) not in (None, fingerprint(t))
    assert fingerprint(t.clone()) == fingerprint(t)


def test_fingerprint_is_the_same_for_every_number_of_threads() -> None:
    t, before, found = drawn(300, 257), torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(fingerprint(t))
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@torch.no_grad()
def test_dora_norm_cache_of_a_base_with_gaps_keeps_nothing() -> None:
    weight = drawn(N, K + 1)[:, :K]
    args: dict[str, Any] = adapter(N, K) | {"weight": weight}
    cache = DoraNormCache()
    assert fingerprint(weight) is None
    assert torch.equal(cache(**args), lora_kernels.dora_norm(**args)) and cache._entry is None


def test_dora_norm_cache_with_gradients_computes_what_it_would_keep() -> None:
    args: dict[str, Any] = adapter(N, K) | {"weight": drawn(N, K), "rank_gate": drawn(3)}
    assert torch.equal(DoraNormCache()(**args), lora_kernels.dora_norm(**args))


@torch.no_grad()
def test_dora_norm_cache_of_equal_values_in_another_dtype_is_the_same() -> None:
    args: dict[str, Any] = adapter(N, K) | {"weight": drawn(N, K)}
    args["lora_A"] = args["lora_A"].to(bf16).float()
    cache = DoraNormCache()
    before = cache(**args).clone()
    assert torch.equal(cache(**args | {"lora_A": args["lora_A"].to(bf16)}), before)


@torch.no_grad()
def test_dora_norm_cache_on_a_gpu_keeps_nothing() -> None:
    """Meta tensors stand for a GPU's; CPU tensors on a GPU's path are as good."""
    args: dict[str, Any] = adapter(N, K) | {"weight": drawn(N, K), "rank_gate": drawn(3)}
    cache = DoraNormCache()
    cache(**args)
    assert cache._entry is not None
    with as_on_gpu():
        cache(**args)
    assert cache._entry is None
    cache(**{n: a.to("meta") if isinstance(a, Tensor) else a for n, a in args.items()})
    assert cache._entry is None


# A requantized layer -----------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"r": 3, "alpha": 5.0, "dropout": 0.25, "bias": True}
SETTINGS |= {"init": "gaussian", "lora_dtype": bf16, "compute_dtype": bf16, "scaling": "rslora"}
SETTINGS |= {"quant_type": "fp4", "blocksize": 32, "double_quant": False, "dtype": torch.float16}
KEPT = ("r", "alpha", "scaling", "dropout", "init", "quant_type", "blocksize", "compute_dtype")
KEPT += ("weight_dtype", "training", "enabled", "merged")


@pytest.mark.parametrize("name", ["", *SETTINGS])
@pytest.mark.parametrize("training", [False, True])
def test_merged_layer_requantized_keeps_each_setting(name: str, training: bool) -> None:
    """Each alone beside the defaults of the others, so that none is another's."""
    settings = {name: SETTINGS[name]} if name else {}
    layer = QLoRALinear(64, 32, **settings).train(training)
    again = layer.merged_layer(requantize=True).layer
    assert isinstance(again, QLoRALinear)
    assert layer.merged_layer().layer.training is training
    for field in KEPT:
        assert getattr(again, field) == getattr(layer, field), field
    assert again.quantized.nested is layer.quantized.nested
    assert again.lora_A.dtype is layer.lora_A.dtype
    assert (again.bias is None) is (layer.bias is None)
    assert again.bias is None or torch.equal(again.bias, layer.bias)  # type: ignore[arg-type]
    x = drawn(4, 64).to(layer.weight_dtype)
    got, want = again.eval()(x), layer.eval()(x)
    assert got.dtype is want.dtype and (got - want).norm() < 0.3 * want.norm()


# AdaLoRA -----------------------------------------------------------------------------------------


def trained(steps: int) -> RankAllocator:
    """Train two layers whose scores all differ, for so many steps of 10."""
    torch.manual_seed(0)
    layers = [AdaLoRALinear(6, 5, r=4), AdaLoRALinear(5, 6, r=4)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for layer in layers:
            layer.lora_E.normal_()
            layer.lora_A.normal_()
            layer.lora_B.normal_()
    allocator = RankAllocator(model, 2, 10, warmup=1, final=3, interval=2, beta1=0.8, beta2=0.6)
    for step in range(steps):
        more(allocator, step)
    return allocator


def more(allocator: RankAllocator, step: int) -> int:
    model = nn.Sequential(*allocator.layers)
    model.zero_grad()
    model(drawn(7, 6, seed=step)).square().mean().backward()
    return allocator.step()


def states(allocator: RankAllocator) -> dict[tuple[str, int, str], Tensor]:
    """sensitivity and uncertainty by layer and parameter."""
    return {
        (kind, i, name): t
        for kind in ("sensitivity", "uncertainty")
        for i, layer in enumerate(allocator.state_dict()[kind])
        for name, t in layer.items()
    }


FIELDS = sorted(states(trained(1)))


def test_allocator_step_leaves_a_loaded_state_alone() -> None:
    allocator, state = trained(0), trained(4).state_dict()
    before = copy.deepcopy(state)
    allocator.load_state_dict(state)
    more(allocator, 4)
    torch.testing.assert_close(state, before, rtol=0, atol=0)


def test_allocator_of_a_loaded_state_goes_on_as_if_nothing_had_happened() -> None:
    whole, broken = trained(9), trained(4)
    state = pickle.loads(pickle.dumps(broken.state_dict()))
    other = trained(0)
    for layer, of in zip(other.layers, broken.layers, strict=True):
        layer.load_state_dict(of.state_dict())
    other.load_state_dict(state)
    for step in range(4, 9):
        more(other, step)
    for got, want in zip(other.scores(), whole.scores(), strict=True):
        assert torch.equal(got, want)
    for got, want in zip(other.layers, whole.layers, strict=True):
        assert torch.equal(got.rank_mask, want.rank_mask)


@pytest.mark.parametrize("field", [("steps", 0, ""), *FIELDS], ids=str)
def test_allocator_state_one_field_changed_is_seen(field: tuple[str, int, str]) -> None:
    """Each is loaded, and each counts for what comes after."""
    kind, i, name = field

    def after(change: bool) -> tuple[list[Tensor], int]:
        allocator = trained(4)
        state = copy.deepcopy(allocator.state_dict())
        if change and kind == "steps":
            state["steps"] += 3
        elif change:
            state[kind][i][name].mul_(2)
        allocator.load_state_dict(state)
        scores = [t.clone() for t in allocator.scores()]
        return scores, more(allocator, 4) if kind == "steps" else 0

    (scores, kept), (others, other_kept) = after(False), after(True)
    if kind == "steps":
        assert kept != other_kept
    else:
        assert [torch.equal(a, b) for a, b in zip(scores, others, strict=True)] == [i != 0, i != 1]


def test_merge_adapter_adds_the_adapters_bias(tmp_path: Path) -> None:
    """With `lora_bias`, alpha/r times it is added to the base's bias."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from lora_kernels.finetune.merge import merge_adapter
    from tests.finetune.tiny import llama

    base = llama(attention_bias=True)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_()
    model.save_pretrained(str(tmp_path / "adapter"))
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="fp32")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = 0
    for name, bias in before.items():
        if not name.endswith(".bias"):
            continue
        own = adapter.get(f"base_model.model.{name.removesuffix('.bias')}.lora_B.bias")
        want = bias if own is None else bias + 7 / 3 * own
        torch.testing.assert_close(after[name], want)
        changed += own is not None
    assert changed
