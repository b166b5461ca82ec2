"""Whole models in blocks, siblings and gated MLPs, on the path that a GPU takes, beside PEFT's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor

import lora_kernels
from lora_kernels.backends.eager import gated_mlp as eager_mlp
from lora_kernels.backends.eager import siblings as eager_siblings
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.peft import explain, fuse
from tests.support.assertions import assert_as_exact, assert_bitwise_equal
from tests.support.peft_models import TINY, randomize
from tests.support.processes import run_in_ranks

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
R, ALPHA, LAYERS = 5, 7, TINY["num_hidden_layers"]
pytestmark = pytest.mark.usefixtures("gpu_path")
IDS = torch.randint(3, TINY["vocab_size"], (12, 13), generator=torch.Generator().manual_seed(6))


class Kind(NamedTuple):
    """A language model of transformers, and what is shared in each layer's forward.

    Args:
        config: of the model.
        mlps: gated MLPs that run as a block, each with two siblings.
        siblings: layers of the attention that share x.
    """

    config: dict[str, Any]
    mlps: int = 1
    siblings: int = 3


KINDS = {
    "Llama": Kind({}),
    "Llama with biases": Kind({"attention_bias": True, "mlp_bias": True}),
    "Qwen2": Kind({}),  # biases of q, k and v
    "Qwen3": Kind({"head_dim": 8}),
    "Gemma": Kind({"head_dim": 8}),
    "Gemma2": Kind({"head_dim": 8}),
    "Gemma3Text": Kind({"head_dim": 8}),
    "Mistral": Kind({}),
    "Phi3": Kind({}, mlps=0, siblings=0),  # qkv_proj and gate_up_proj are one layer each
}


def language_model(kind: str, dtype: torch.dtype = f64, seed: int = 0, **settings: Any) -> Any:
    """A PEFT model as if trained, with biases that are not zero."""
    torch.manual_seed(seed)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{kind.split(' ')[0]}Config")
    model = transformers.AutoModelForCausalLM.from_config(
        config(**TINY | ids | KINDS[kind].config), dtype=f32
    )
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": "all-linear"} | settings
    model = get_peft_model(model.to(dtype), LoraConfig(**settings))
    randomize(model, seed=seed + 1)
    return model.to(dtype).train()


class Counts:
    """How many layers took P from `down_projections` of several, and how many blocks ran."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.siblings = self.mlps = 0
        project, gated = eager_siblings.down_projections, eager_mlp.gated_backward

        def count_projections(x: Tensor, lora_A: Any, is_rounded: bool) -> Any:
            self.siblings += len(lora_A) * (len(lora_A) > 1)
            return project(x, lora_A, is_rounded)

        def count_mlps(*args: Any) -> Any:
            self.mlps += 1
            return gated(*args)

        patch.setattr(eager_siblings, "down_projections", count_projections)
        patch.setattr(eager_mlp, "gated_backward", count_mlps)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


def loss_and_gradients(model: Any, ids: Tensor = IDS) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {
        name.replace("module.", ""): p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return {"loss": loss.detach(), **grads}


def train(model: Any, steps: int = 3) -> dict[str, Tensor]:
    """The trained parameters after steps of SGD. A step moves them by a tenth or so."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), 0.5)
    for _ in range(steps):
        loss_and_gradients(model)
        optimizer.step()
    return {name: p.detach().clone() for name, p in trained.items()}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], within: float) -> None:
    """The rms error of each tensor, relative to its own rms."""
    assert got.keys() == want.keys()
    for name, exact in want.items():
        assert got[name].dtype is exact.dtype and got[name].shape == exact.shape, name
        error, size = (got[name].double() - exact.double()).norm(), exact.double().norm()
        assert size > 0 and error <= within * size, (name, float(error / size))


def enable_checkpointing(model: Any, reentrant: bool | None) -> None:
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [None, False, True], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_language_model_has_pefts_gradients(kind, reentrant, counts) -> None:
    stock = language_model(kind)
    enable_checkpointing(stock, reentrant)
    fused = fuse(copy.deepcopy(stock))
    assert_close(loss_and_gradients(fused), loss_and_gradients(stock), 1e-12)
    forwards = 1 if reentrant is None else 2
    shared = KINDS[kind].siblings + 2 * KINDS[kind].mlps
    assert counts.siblings == LAYERS * forwards * shared
    assert counts.mlps == LAYERS * KINDS[kind].mlps


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_of_sgd_equal_pefts(kind) -> None:
    stock = language_model(kind)
    before = {n: p.detach().clone() for n, p in stock.named_parameters() if p.requires_grad}
    fused = fuse(copy.deepcopy(stock))
    want, got = train(stock), train(fused)
    moved = {name: t - before[name] for name, t in want.items()}
    assert_close({name: t - before[name] for name, t in got.items()}, moved, 1e-10)


def assert_models_are_as_exact(stocks: list[Any]) -> None:
    """Draws of one kind of model, fused, beside themselves and float64."""
    ref = [loss_and_gradients(copy.deepcopy(stock).to(f64)) for stock in stocks]
    fused = [loss_and_gradients(fuse(copy.deepcopy(stock))) for stock in stocks]
    assert_as_exact(fused, ref, [loss_and_gradients(stock) for stock in stocks])


@pytest.mark.parametrize("kind", KINDS)
def test_language_model_in_float32_is_as_exact_as_pefts(kind) -> None:
    assert_models_are_as_exact([language_model(kind, f32, seed) for seed in range(6)])


@pytest.mark.parametrize("adapter", [f32, bf16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_language_model_in_bfloat16_is_as_exact_as_pefts(kind, adapter) -> None:
    """The update is a tenth of y or so: ours rounds it and the sum, PEFT's x·Wᵀ and the sum."""
    stocks = [language_model(kind, bf16, seed) for seed in range(6)]
    for stock in stocks:
        for name, p in stock.named_parameters():
            if "lora_" in name:
                p.data = (p.data * 0.1 if "lora_B" in name else p.data).to(adapter)
    assert_models_are_as_exact(stocks)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache_equals_pefts(kind) -> None:
    stock = language_model(kind).eval()
    fused = fuse(copy.deepcopy(stock))
    settings = {"max_new_tokens": 6, "do_sample": False}
    for ids in (IDS[:1, :5], IDS):
        assert_bitwise_equal(fused.generate(ids, **settings), stock.generate(ids, **settings))
    with torch.no_grad():
        assert_close({"": fused(IDS).logits}, {"": stock(IDS).logits}, 1e-12)


def test_experts_of_gpt_oss_are_no_blocks_and_its_attention_is() -> None:
    """Its MLP has no linear layers; q, k and v share x."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**TINY, num_local_experts=4, head_dim=8, pad_token_id=0)
    model = transformers.GptOssForCausalLM(config).to(f64)
    model.set_experts_implementation("eager")  # the grouped product knows no float64
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    stock: Any = get_peft_model(model, LoraConfig(r=R, target_modules=attention))
    randomize(stock)
    stock = stock.to(f64).train()
    fused = fuse(copy.deepcopy(stock))
    assert not any(row.strategy == "one block" for row in explain(fused).blocks)
    assert_close(loss_and_gradients(fused), loss_and_gradients(stock), 1e-10)


def test_reason_for_phi3_is_its_merged_layer() -> None:
    fused = fuse(language_model("Phi3"))
    rows = [row for row in explain(fused).blocks if row.layer.endswith("mlp")]
    assert len(rows) == LAYERS
    assert all("gate and up are one linear layer" in row.reason for row in rows)


@pytest.mark.parametrize("when", ["before fuse", "after fuse"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_model_that_accelerate_dispatches_has_pefts_gradients(offloaded, when, counts) -> None:
    """`device_map` puts a hook on each module, and keeps the forward that it found on it."""
    from accelerate import dispatch_model

    stock = language_model("Llama")
    names = ["embed_tokens", "rotary_emb", "norm", *(f"layers.{i}" for i in range(LAYERS))]
    device_map: dict[str, Any] = {f"base_model.model.model.{name}": "cpu" for name in names}
    device_map["base_model.model.lm_head"] = "cpu"
    model = copy.deepcopy(stock)
    model = fuse(model) if when == "after fuse" else model
    model = dispatch_model(model, device_map, force_hooks=True)
    if offloaded:  # a base layer's weight is on meta between its calls
        base = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
        add_hook_to_module(base, AlignDevicesHook("cpu", offload=True))
    fused = fuse(model) if when == "before fuse" else model
    mlps = [row for row in explain(fused).blocks if row.strategy == "one block"]
    assert len(mlps) == LAYERS
    assert_close(loss_and_gradients(fused), loss_and_gradients(stock), 1e-12)
    assert (counts.mlps, counts.siblings) == (LAYERS, 5 * LAYERS - 2 * offloaded)


WAYS = ["DDP", "DDP, checkpointed", "FSDP2", "FSDP2, checkpointed"]


def train_in_every_way(rank: int, folder: str) -> None:
    """Train as one process of two, each with half of the batch; the first one writes what both
    found."""
    for way in WAYS:
        train_sharded(way, rank, f"{folder}/{way}.pt")


def train_sharded(way: str, rank: int, out: str) -> None:
    from torch.distributed.fsdp import fully_shard

    with as_on_gpu(), lora_kernels.backend("eager"), pytest.MonkeyPatch.context() as patch:
        counts = Counts(patch)
        model: Any = language_model("Llama")
        if "checkpointed" in way:
            enable_checkpointing(model, False)
        fuse(model)
        if "DDP" in way:
            wrapped: Any = torch.nn.parallel.DistributedDataParallel(model)
        else:
            wrapped = model
            for layer in model.base_model.model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        half = IDS.chunk(2)[rank]
        found = loss_and_gradients(wrapped, half)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), 0.5)
        optimizer.step()
        for _ in range(2):
            loss_and_gradients(wrapped, half)
            optimizer.step()

    def whole(t: Tensor) -> Tensor:
        return t.full_tensor() if hasattr(t, "full_tensor") else t.detach()

    grads = {name: whole(t) for name, t in found.items() if name != "loss"}
    after = {name: whole(p) for name, p in trained.items()}
    if rank == 0:
        torch.save({"grads": grads, "after": after, "counts": vars(counts)}, out)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes found, a file for each of WAYS."""
    folder = tmp_path_factory.mktemp("sharded")
    run_in_ranks(train_in_every_way, folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_pefts_gradients(way, sharded: Path) -> None:
    """Each with half of the batch, beside PEFT's model in one with all of it."""
    found = torch.load(sharded / f"{way}.pt", weights_only=True)
    stock = language_model("Llama")
    want = loss_and_gradients(stock)
    want.pop("loss")
    assert_close(found["grads"], want, 1e-11)
    assert_close(found["after"], train(stock), 1e-11)
    forwards = 3 * LAYERS * (2 if "checkpointed" in way else 1)
    assert found["counts"] == {"siblings": forwards * 5, "mlps": 3 * LAYERS}
