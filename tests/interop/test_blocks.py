"""Whole models in blocks, on the path that a GPU takes, beside PEFT's."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)

import lora_kernels
from lora_kernels.backends.eager import blocks as eager_blocks
from lora_kernels.backends.eager import gated_mlp as eager_mlp
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.peft import explain, fuse
from tests.support.assertions import assert_as_exact, assert_bitwise_equal
from tests.support.clones import replica_of
from tests.support.peft_models import TINY, pair, randomize
from tests.support.processes import run_in_ranks

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
R, ALPHA, LAYERS = 5, 7, TINY["num_hidden_layers"]
pytestmark = pytest.mark.usefixtures("gpu_path")
IDS = torch.randint(3, TINY["vocab_size"], (12, 13), generator=torch.Generator().manual_seed(6))


# Of Llama, where x of the first q, k and v needs no gradient.
GROUPED = 5 * LAYERS - 3


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=f64)


class Kind(NamedTuple):
    """A model of transformers, and what is computed together in a forward.

    Args:
        config: of the model.
        mlps: gated MLPs that run as a block.
        grouped: layers that are computed with others of their x, gate and up among them.
        auto: the class that builds the model.
        inputs: of a forward; floating-point ones in float64.
        lora: settings of the adapters.
    """

    config: dict[str, Any]
    mlps: int = LAYERS
    grouped: int = 5 * LAYERS
    auto: Any = transformers.AutoModelForCausalLM
    inputs: dict[str, Any] = {"input_ids": IDS, "labels": IDS}  # noqa: RUF012
    lora: dict[str, Any] = {}  # noqa: RUF012


CAUSAL = {
    "Llama": Kind({}),
    "Llama with biases": Kind({"attention_bias": True, "mlp_bias": True}),
    "Qwen2": Kind({}),  # biases of q, k and v
    "Qwen3": Kind({"head_dim": 8}),
    "Gemma": Kind({"head_dim": 8}),
    "Gemma2": Kind({"head_dim": 8}),
    "Gemma3Text": Kind({"head_dim": 8}),
    "Mistral": Kind({}),
    "Phi3": Kind({}, mlps=0, grouped=0),  # qkv_proj and gate_up_proj are one layer each
}
TOWER = {**TINY, "eos_token_id": 2, "bos_token_id": 1}
SPEECH = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3)}
SPEECH |= {"num_feat_extract_layers": 2, "conv_depthwise_kernel_size": 3}
SPEECH |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
PAIR = {"encoder_layers": LAYERS, "encoder_attention_heads": 4, "encoder_ffn_dim": 40}
PAIR |= {name.replace("encoder", "decoder"): n for name, n in PAIR.items()}
RESNET: Any = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
RESNET = transformers.ResNetConfig(**RESNET, out_features=["stage2"])
KINDS = CAUSAL | {
    # The second MLP is sparse. k and v are called in a condition.
    "Gemma3nText": Kind(
        {"head_dim": 8, "num_kv_shared_layers": 0, "laurel_rank": 5, "altup_num_inputs": 2}
        | {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 61}
        | {"activation_sparsity_pattern": [0.0, 0.95]},
        mlps=1,
        grouped=8,
        # In training it is called without its adapter, by PEFT too.
        lora={"exclude_modules": ["correction_coefs"]},
    ),
    "MiniCPM3": Kind(  # MLA, whose q_a_proj is called in a condition
        {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6}
        | {"v_head_dim": 8, "num_key_value_heads": 4},
        grouped=4 * LAYERS,
    ),
    "T5": Kind(  # wi_0 and wi_1; k and v are called in a condition; large scores would saturate
        {"d_kv": 6, "d_ff": 40, "feed_forward_proj": "gated-gelu", "initializer_factor": 0.3}
        | {"decoder_start_token_id": 0},
        mlps=0,
        grouped=10 * LAYERS,
        auto=transformers.AutoModelForSeq2SeqLM,
    ),
    "Whisper": Kind(  # k and v are called in a condition
        PAIR | {"num_mel_bins": 8, "max_source_positions": 12, "decoder_start_token_id": 1},
        mlps=0,
        grouped=6 * LAYERS,
        auto=transformers.AutoModelForSpeechSeq2Seq,
        inputs={"input_features": numbers(12, 8, 24), "labels": IDS},
    ),
    "Detr": Kind(  # q and k of self-attention
        PAIR | {"backbone_config": RESNET, "num_queries": 13},
        mlps=0,
        grouped=4 * (LAYERS - 1),  # in the first layers x needs no gradient
        auto=transformers.AutoModel,
        # Without decoder_inputs_embeds the first gradients are zero.
        inputs={"pixel_values": numbers(8, 3, 32, 32), "decoder_inputs_embeds": numbers(8, 13, 24)},
    ),
    "CLIP": Kind(
        {"text_config": TOWER, "vision_config": TINY | {"image_size": 16, "patch_size": 4}},
        mlps=0,
        grouped=6 * LAYERS,
        auto=transformers.AutoModel,
        inputs={"input_ids": IDS, "pixel_values": numbers(12, 3, 16, 16), "return_loss": True},
    ),
    "Bert": Kind({}, mlps=0, grouped=3 * LAYERS, auto=transformers.AutoModelForMaskedLM),
    "Wav2Vec2Conformer": Kind(  # q and k, whose x is rotated
        SPEECH | {"position_embeddings_type": "rotary", "apply_spec_augment": False},
        mlps=0,
        grouped=2 * LAYERS,
        auto=transformers.AutoModel,
        inputs={"input_values": numbers(8, 64)},
    ),
}
NO_DROPOUT = (
    *("activation_dropout", "attention_dropout", "attention_probs_dropout_prob", "dropout"),
    *("conformer_conv_dropout", "dropout_rate", "feat_proj_dropout", "hidden_dropout"),
    *("hidden_dropout_prob", "layerdrop"),
)
COMMON = TINY | dict.fromkeys(NO_DROPOUT, 0.0)
COMMON |= {"d_model": 24, "num_layers": LAYERS, "num_heads": 4}  # T5's and DETR's names
COMMON |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def model_of(kind: str, dtype: torch.dtype = f64, seed: int = 0, **settings: Any) -> Any:
    """A PEFT model as if trained, without weights that are all zero."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind.split(' ')[0]}Config")
    model = KINDS[kind].auto.from_config(config(**COMMON | KINDS[kind].config), dtype=f32)
    for name, p in model.named_parameters():
        if name.endswith("bias") or not p.any():
            torch.nn.init.normal_(p, std=0.3)
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": "all-linear"} | settings
    model = get_peft_model(model.to(dtype), LoraConfig(**KINDS[kind].lora | settings))
    randomize(model, seed=seed + 1)
    return model.to(dtype).train()


class Counts:
    """How many layers were computed with others of one x, and how many MLPs ran as blocks."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.grouped = self.mlps = 0
        low_ranks = eager_blocks.low_ranks

        def count_layers(x: Tensor, layers: Any, *rest: Any) -> Any:
            self.grouped += len(layers) * (len(layers) > 1)
            return low_ranks(x, layers, *rest)

        def counted(backward: Any) -> Any:
            def count_mlps(*args: Any) -> Any:
                self.mlps += 1
                return backward(*args)

            return count_mlps

        patch.setattr(eager_blocks, "low_ranks", count_layers)
        for name in ("gated_backward", "gated_update_backward"):  # by PyTorch's ops; by kernels
            patch.setattr(eager_mlp, name, counted(getattr(eager_mlp, name)))


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


def loss_and_gradients(model: Any, inputs: dict[str, Any] = CAUSAL["Llama"].inputs) -> Any:
    """The model's own loss if it has one, and the gradient of each parameter that trains."""
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    floating = {name: t.to(dtype) for name, t in inputs.items() if getattr(t, "dtype", 0) is f64}
    found = model(**inputs | floating)
    loss = found.get("loss")
    if loss is None:
        y = found.last_hidden_state
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)).sum()
    loss.backward()
    grads = {
        name.replace("module.", ""): p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return {"loss": loss.detach(), **grads}


def train(model: Any, inputs: dict[str, Any] = CAUSAL["Llama"].inputs) -> dict[str, Tensor]:
    """The trained parameters after three steps of SGD. A step moves them by a tenth or so."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), 0.5)
    for _ in range(3):
        loss_and_gradients(model, inputs)
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


# Reentrant checkpoints of DETR have no gradients in PEFT either: no x of a layer needs one.
WAYS_OF_KINDS = [(kind, way) for kind in KINDS for way in (None, False, True)]
WAYS_OF_KINDS.remove(("Detr", True))


@pytest.mark.parametrize(("kind", "reentrant"), WAYS_OF_KINDS, ids=str)
def test_model_has_pefts_gradients(kind, reentrant, counts) -> None:
    stock, inputs = model_of(kind), KINDS[kind].inputs
    enable_checkpointing(stock, reentrant)
    stock.enable_input_require_grads()  # else the first layers share no x
    fused = fuse(copy.deepcopy(stock))
    got, want = loss_and_gradients(fused, inputs), loss_and_gradients(stock, inputs)
    # A loss that is a weighted mean of outputs may cancel to a thousandth of them.
    assert_close(got, want, 1e-12 if kind in CAUSAL else 1e-10)
    forwards = 1 if reentrant is None else 2
    assert counts.grouped == forwards * KINDS[kind].grouped
    assert counts.mlps == KINDS[kind].mlps


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_of_sgd_equal_pefts(kind) -> None:
    stock, inputs = model_of(kind), KINDS[kind].inputs
    before = {n: p.detach().clone() for n, p in stock.named_parameters() if p.requires_grad}
    fused = fuse(copy.deepcopy(stock))
    want, got = train(stock, inputs), train(fused, inputs)
    moved = {name: t - before[name] for name, t in want.items()}
    assert_close({name: t - before[name] for name, t in got.items()}, moved, 1e-10)


def assert_models_are_as_exact(kind: str, stocks: list[Any]) -> None:
    """Draws of one kind of model, fused, beside themselves and float64."""
    inputs = KINDS[kind].inputs
    ref = [loss_and_gradients(copy.deepcopy(stock).to(f64), inputs) for stock in stocks]
    fused = [loss_and_gradients(fuse(copy.deepcopy(stock)), inputs) for stock in stocks]
    assert_as_exact(fused, ref, [loss_and_gradients(stock, inputs) for stock in stocks])


@pytest.mark.parametrize("kind", KINDS)
def test_model_in_float32_is_as_exact_as_pefts(kind) -> None:
    assert_models_are_as_exact(kind, [model_of(kind, f32, seed) for seed in range(6)])


@pytest.mark.parametrize("adapter", [f32, bf16], ids=str)
@pytest.mark.parametrize("kind", CAUSAL)
def test_language_model_in_bfloat16_is_as_exact_as_pefts(kind, adapter) -> None:
    """The update is a tenth of y or so: ours rounds it and the sum, PEFT's x·Wᵀ and the sum."""
    stocks = [model_of(kind, bf16, seed) for seed in range(6)]
    for stock in stocks:
        for name, p in stock.named_parameters():
            if "lora_" in name:
                p.data = (p.data * 0.1 if "lora_B" in name else p.data).to(adapter)
    assert_models_are_as_exact(kind, stocks)


@pytest.mark.parametrize("when", ["before fuse", "after fuse"])
@pytest.mark.parametrize("implementation", CheckpointImpl)
def test_q_proj_checkpointed_alone_has_pefts_gradients(implementation, when, counts) -> None:
    def wrap(model: Any) -> Any:
        for layer in model.base_model.model.model.layers:
            of = layer.self_attn
            of.q_proj = checkpoint_wrapper(of.q_proj, checkpoint_impl=implementation)
        return model

    stock = model_of("Llama")
    stock.enable_input_require_grads()
    fused = copy.deepcopy(stock)
    fused = fuse(wrap(fused)) if when == "before fuse" else wrap(fuse(fused))
    assert_close(loss_and_gradients(fused), loss_and_gradients(wrap(stock)), 1e-12)
    # Each call of q_proj in a group computes k and v too, which cannot take their results.
    assert counts.grouped == LAYERS * (4 if when == "before fuse" else 2 * 3 + 2)
    loss_and_gradients(fuse(model_of("Llama")))  # drops the results of the last one


@pytest.mark.parametrize("kind", CAUSAL)
def test_generation_with_a_cache_and_with_beams_equals_pefts(kind) -> None:
    stock = model_of(kind).eval()
    fused = fuse(copy.deepcopy(stock))
    settings: Any = {"max_new_tokens": 6, "do_sample": False}
    for ids in (IDS[:1, :5], IDS):
        for settings["num_beams"] in (1, 3):
            assert_bitwise_equal(fused.generate(ids, **settings), stock.generate(ids, **settings))
    with torch.no_grad():
        assert_close({"": fused(IDS).logits}, {"": stock(IDS).logits}, 1e-12)


def test_compiled_model_has_pefts_gradients_and_no_blocks(counts) -> None:
    stock = model_of("Llama")
    compiled = torch.compile(fuse(copy.deepcopy(stock)), backend="aot_eager", fullgraph=True)
    got = loss_and_gradients(compiled)
    got = {name.removeprefix("_orig_mod."): t for name, t in got.items()}
    assert_close(got, loss_and_gradients(stock), 1e-12)
    assert counts.grouped == counts.mlps == 0


@pytest.mark.parametrize("replicated", [False, True])
def test_model_in_two_threads_has_pefts_gradients(replicated, counts) -> None:
    """Each has half of the batch, and the model itself or a replica of DataParallel's."""
    grads = []
    for model in pair(model_of("Llama")):
        models = [replica_of(model) if replicated else model for _ in range(2)]
        with ThreadPoolExecutor(2) as threads:
            run = threads.map(lambda model, ids: model(ids).logits, models, IDS.chunk(2))
            first, second = (logits.square().mean() for logits in run)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(first + 2 * second, list(trained.values()))
        grads.append(dict(zip(trained, found, strict=True)))
    assert_close(grads[1], grads[0], 1e-12)
    # A replica's parameters are attributes, which a block does not read.
    forwards = 0 if replicated else 2
    assert (counts.grouped, counts.mlps) == (GROUPED * forwards, LAYERS * forwards)


def test_model_after_an_exception_between_q_and_k_has_pefts_gradients(counts) -> None:
    stock, fused = pair(model_of("Qwen3"))

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    norm = fused.base_model.model.model.layers[1].self_attn.q_norm
    handle = norm.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        fused(IDS)
    assert (counts.grouped, counts.mlps) == (5, 0)  # gate and up, and then q, k and v
    handle.remove()
    assert_close(loss_and_gradients(fused), loss_and_gradients(stock), 1e-12)


def test_gradients_differentiated_again_raise_the_remedy() -> None:
    fused = fuse(model_of("Llama"))
    trained = [p for p in fused.parameters() if p.requires_grad]
    loss = fused(input_ids=IDS, labels=IDS).loss
    grads = torch.autograd.grad(loss, trained, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(sum(t.square().sum() for t in grads), trained)


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


@pytest.mark.parametrize("when", ["before fuse", "after fuse"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_model_that_accelerate_dispatches_has_pefts_gradients(offloaded, when, counts) -> None:
    """`device_map` puts a hook on each module, and keeps the forward that it found on it."""
    from accelerate import dispatch_model

    stock = model_of("Llama")
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
    assert len(mlps) == LAYERS - offloaded
    assert_close(loss_and_gradients(fused), loss_and_gradients(stock), 1e-12)
    assert (counts.mlps, counts.grouped) == (len(mlps), GROUPED - 2 * offloaded)


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
        model: Any = model_of("Llama")
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
        ids = IDS.chunk(2)[rank]
        half = {"input_ids": ids, "labels": ids}
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
    stock = model_of("Llama")
    want = loss_and_gradients(stock)
    want.pop("loss")
    assert_close(found["grads"], want, 1e-11)
    assert_close(found["after"], train(stock), 1e-11)
    # Of a checkpointed model x needs a gradient in the first layer too.
    grouped = 2 * 5 * LAYERS if "checkpointed" in way else GROUPED
    assert found["counts"] == {"grouped": 3 * grouped, "mlps": 3 * LAYERS}
