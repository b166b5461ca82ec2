"""Each feature of PEFT on a stock model and a fused one: the same numbers, states, files, warnings.

On a tiny Llama in float64 (see test_zoo for what it rounds). A feature is a configuration, or a
change to a model that is fused already.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    EvaConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels.backends import native
from lora_kernels.measure import tolerance
from lora_kernels.peft import explain, fuse, unfuse
from lora_kernels.quantization import Weight4bit

from .tiny import (
    ALPHA,
    IDS,
    TINY,
    R,
    assert_same,
    count_ops,
    fused_layers,
    output,
    pair,
    randomize,
    results,
)

f32 = torch.float32
# test_linear4bit's 2**-17 is of two linear layers; a Llama here has fourteen.
FLOAT32_RTOL = 2.0**-14
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def base_model(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, attention_bias=True))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return model.to(dtype)


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": TARGETS} | settings)


def model(dtype: torch.dtype = torch.float64, **settings: Any) -> PeftModel:
    peft_model = get_peft_model(base_model(dtype), config(**settings))
    randomize(peft_model, "default")
    return peft_model


def assert_same_models(fused: Any, stock: Any) -> None:
    """State, what is trained, output and gradients, in training mode or not."""
    a, b = stock.state_dict(), fused.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [p.requires_grad for p in fused.parameters()] == [
        p.requires_grad for p in stock.parameters()
    ]
    for training in (True, False):
        stock.train(training), fused.train(training)
        torch.manual_seed(4)
        want = results(stock, IDS)
        torch.manual_seed(4)
        assert_same(results(fused, IDS), want)


def assert_explained(fused: nn.Module, stock: nn.Module) -> None:
    """In float32 a layer is fused, or the reason says what else it is; so many ops run, and a
    token goes the shorter way."""
    stock, fused = (copy.deepcopy(each).to(f32).eval() for each in (stock, fused))
    rows = explain(fused).rows
    assert all(row.reason and row.strategy for row in rows)
    ours = [row for row in rows if row.backend != "peft"]
    assert {row.state for row in ours} <= {"not fused" if native.module is None else "fused"}
    assert count_ops(lambda: fused(IDS)).get("lora_linear", 0) == len(ours)
    with torch.no_grad():
        for _ in range(2):
            got, want = output(fused, IDS[:1, :1]), output(stock, IDS[:1, :1])
            assert (got - want).norm() <= FLOAT32_RTOL * want.norm()


def saved(peft_model: PeftModel, folder: Path) -> dict[str, bytes]:
    """The adapters' bytes; PEFT writes a configuration's sets in any order."""
    peft_model.save_pretrained(folder)
    files = {str(file.relative_to(folder)): file for file in folder.rglob("adapter_*")}
    return {
        name: bytes(sorted(file.read_bytes())) if name.endswith("json") else file.read_bytes()
        for name, file in files.items()
    }


# Configurations

CONFIGS: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "patterns": {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 11},
                 "alpha_pattern": {"v_proj": 2}},
    "rslora": {"use_rslora": True},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 3}},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "bias lora_only": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*\.layers\.0\..*(q|up)_proj"},
    "target_parameters": {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"]},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "trainable_token_indices": {"trainable_token_indices": [3, 5, 53]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "inference_mode": {"inference_mode": True},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*target_parameters")
@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_configuration(settings: dict[str, Any], tmp_path: Path) -> None:
    stock, fused = pair(model(**settings))
    assert len(fused_layers(fused)) >= 2
    assert_same_models(fused, stock)
    assert_explained(fused, stock)
    assert saved(fused, tmp_path / "fused") == saved(stock, tmp_path / "stock")
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "fused", is_trainable=True)
    if settings.get("inference_mode"):
        loaded.requires_grad_(False)
    if settings.get("bias", "none") == "none":  # PEFT's loading leaves base biases frozen
        assert_same_models(fused, loaded)
    for each in (stock, fused):
        each.merge_adapter()
    assert_same_models(fused, stock)


INITS: dict[str, dict[str, Any]] = {
    "default": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 6},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.5)},
}


@pytest.mark.parametrize("settings", INITS.values(), ids=INITS)
def test_initialization(settings: dict[str, Any], tmp_path: Path) -> None:
    """Which may change the base weight; of the first adapter, and of one for a fused model."""
    torch.manual_seed(3)
    stock = get_peft_model(base_model(f32), config(**settings))
    stock, fused = pair(stock)
    if "eva_config" in settings:
        for each in (stock, fused):
            torch.manual_seed(3)
            batches = [
                {"input_ids": IDS.flip(i), "attention_mask": torch.ones_like(IDS)} for i in (0, 1)
            ]
            initialize_lora_eva_weights(each, batches, show_progress_bar=False)
    for each in (stock, fused):
        torch.manual_seed(4)
        each.add_adapter("second", config(**settings | {"r": 4, "lora_alpha": 3}))
        each.set_adapter("second")
    assert_same_models(fused.double(), stock.double())
    for each in (stock, fused):
        each.set_adapter("default")
    assert_same_models(fused, stock)


def test_pissa_saved_as_lora(tmp_path: Path) -> None:
    """The difference of two adapters, for which PEFT loads the first one beside the second."""
    torch.manual_seed(3)
    stock = get_peft_model(base_model(f32), config(init_lora_weights="pissa"))
    stock.peft_config["default"].init_lora_weights = True
    stock.save_pretrained(tmp_path / "first")
    stock.peft_config["default"].init_lora_weights = "pissa"
    _, fused = pair(stock)
    files = []
    for name, each in (("stock", stock), ("fused", fused)):
        randomize(each, "default")
        each.save_pretrained(
            tmp_path / name, path_initial_model_for_weight_conversion=tmp_path / "first"
        )
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    loaded = fuse(PeftModel.from_pretrained(base_model(f32), tmp_path / "fused")).eval()
    # Two orders of a rank of 15 in float32, through two layers.
    torch.testing.assert_close(
        output(loaded, IDS), output(fused.eval(), IDS), rtol=2**-12, atol=2**-12
    )


# Changes to a model


def two(peft_model: PeftModel) -> None:
    """A second adapter of another rank, scaling and set of layers, which PEFT does not activate."""
    peft_model.add_adapter(
        "second", config(r=3, lora_alpha=4, target_modules=["q_proj", "up_proj"])
    )
    randomize(peft_model, "second", seed=5)


def set_adapter(peft_model: PeftModel, folder: Path) -> None:
    two(peft_model)
    peft_model.set_adapter("second")


def several_active(peft_model: PeftModel, folder: Path) -> None:
    two(peft_model)
    peft_model.base_model.set_adapter(["default", "second"])


def several_merged(peft_model: PeftModel, folder: Path) -> None:
    several_active(peft_model, folder)
    peft_model.merge_adapter(safe_merge=True)


def one_of_two_merged(peft_model: PeftModel, folder: Path) -> None:
    two(peft_model)
    peft_model.merge_adapter(["second"])


def unmerged(peft_model: PeftModel, folder: Path) -> None:
    several_merged(peft_model, folder)
    peft_model.unmerge_adapter()


def deleted(peft_model: PeftModel, folder: Path) -> None:
    two(peft_model)
    peft_model.delete_adapter("default")  # of which PEFT warns, and activates the other


def another(folder: Path, **settings: Any) -> Path:
    other = get_peft_model(base_model(), config(**settings))
    randomize(other, "default", seed=7)
    other.save_pretrained(folder)
    return folder


def loaded(peft_model: PeftModel, folder: Path) -> None:
    peft_model.load_adapter(another(folder, r=6, lora_alpha=3), "second", is_trainable=True)
    peft_model.set_adapter("second")


def loaded_from_meta(peft_model: PeftModel, folder: Path) -> None:
    another(folder, r=6, lora_alpha=3)
    peft_model.load_adapter(folder, "second", low_cpu_mem_usage=True)
    peft_model.set_adapter("second", inference_mode=True)


def weighted(combination: str, **settings: Any) -> Callable[[PeftModel, Path], None]:
    def change(peft_model: PeftModel, folder: Path) -> None:
        peft_model.add_adapter("second", config(r=R, lora_alpha=4))
        randomize(peft_model, "second", seed=5)
        torch.manual_seed(3)
        peft_model.add_weighted_adapter(
            ["default", "second"], [0.3, 0.9], "mix", combination, **settings
        )
        peft_model.set_adapter("mix")

    change.__name__ = f"weighted_{combination}"
    return change


def disabled(peft_model: PeftModel, folder: Path) -> None:
    peft_model.base_model.disable_adapter_layers()


def disabled_and_enabled(peft_model: PeftModel, folder: Path) -> None:
    with peft_model.disable_adapter():
        output(peft_model, IDS)
    peft_model.base_model.disable_adapter_layers()
    peft_model.base_model.enable_adapter_layers()


def disabled_while_merged(peft_model: PeftModel, folder: Path) -> None:
    """The forward of a disabled layer takes the adapter out of the weight again."""
    peft_model.merge_adapter()
    with peft_model.disable_adapter():
        output(peft_model, IDS)


def hotswapped(peft_model: PeftModel, folder: Path) -> None:
    hotswap_adapter(peft_model, another(folder, r=R, lora_alpha=3), "default")


def hotswapped_to_another_rank(peft_model: PeftModel, folder: Path) -> None:
    """The scaling is a tensor in float32 from here on."""
    prepare_model_for_compiled_hotswap(peft_model, target_rank=11)
    hotswap_adapter(peft_model, another(folder, r=6, lora_alpha=3), "default")
    for layer in peft_model.modules():
        if isinstance(layer, LoraLayer):
            assert isinstance(layer.scaling["default"], Tensor)


def checkpointed(peft_model: PeftModel, folder: Path) -> None:
    peft_model.enable_input_require_grads()
    peft_model.gradient_checkpointing_enable({"use_reentrant": False})


def frozen(peft_model: PeftModel, folder: Path) -> None:
    peft_model.set_requires_grad("default", False)


def half_frozen(peft_model: PeftModel, folder: Path) -> None:
    for name, p in peft_model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)


def scaled(peft_model: PeftModel, folder: Path) -> None:
    for layer in peft_model.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(3.0)
            layer.unscale_layer(2.0)


def copied(peft_model: PeftModel, folder: Path) -> PeftModel:
    return copy.deepcopy(peft_model)


def pickled(peft_model: PeftModel, folder: Path) -> Any:
    two(peft_model)
    return pickle.loads(pickle.dumps(peft_model))


def saved_whole(peft_model: PeftModel, folder: Path) -> Any:
    file = io.BytesIO()
    torch.save(peft_model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def unloaded(peft_model: PeftModel, folder: Path) -> Any:
    return peft_model.unload()


def merged_and_unloaded(peft_model: PeftModel, folder: Path) -> Any:
    two(peft_model)
    return peft_model.merge_and_unload(safe_merge=True, adapter_names=["default", "second"])


def injected(peft_model: PeftModel, folder: Path) -> Any:
    """Without a PeftModel around it, as diffusers and transformers hold their adapters."""
    torch.manual_seed(3)
    inner = peft_model.get_base_model()
    settings = config(r=6, lora_alpha=3, init_lora_weights=False)
    return inject_adapter_in_model(settings, inner, "second")


CHANGES = [
    set_adapter, several_active, several_merged, one_of_two_merged, unmerged, deleted, loaded,
    loaded_from_meta, weighted("linear"), weighted("cat"), weighted("svd", svd_rank=4),
    weighted("ties", density=0.5), disabled, disabled_and_enabled, disabled_while_merged,
    hotswapped, hotswapped_to_another_rank, checkpointed, frozen,
    half_frozen, scaled, copied, pickled, saved_whole, unloaded, merged_and_unloaded, injected,
]  # fmt: skip

NO_OTHER_OUTPUT = {
    disabled_and_enabled, disabled_while_merged, checkpointed, frozen, half_frozen, copied,
    pickled, saved_whole,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change(change: Callable[[PeftModel, Path], Any], tmp_path: Path) -> None:
    said: list[list[str]] = []
    models: list[Any] = list(pair(model()))
    for i, each in enumerate(models):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            models[i] = change(each, tmp_path / str(i)) or each
        said.append([str(warning.message) for warning in caught])
    stock, fused = models
    assert said[0] == said[1]
    if isinstance(fused, PeftModel):
        assert status(fused) == status(stock)
    assert_same_models(fused, stock)
    if any(isinstance(layer, LoraLayer) for layer in fused.modules()):
        assert_explained(fused, stock)
        assert_same_models(unfuse(fused), stock)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change_between_tokens(change: Callable[[PeftModel, Path], Any], tmp_path: Path) -> None:
    """What a layer keeps for decoding (in float32, not in float64) does not outlive it."""
    models: list[Any] = [each.eval() for each in pair(model(f32))]
    with torch.no_grad():
        for i, each in enumerate(models):
            for _ in range(2):
                before = output(each, IDS[:1, :1])
            models[i] = (change(each, tmp_path / str(i)) or each).eval()
        for _ in range(2):
            want, got = (output(each, IDS[:1, :1]) for each in models)
            error = (got - want).norm() / want.norm()
            assert error <= FLOAT32_RTOL, f"relative error {error:.3g}"
    if change not in NO_OTHER_OUTPUT:
        assert (want - before).norm() > 8 * FLOAT32_RTOL * want.norm()


def test_rescaled_between_tokens() -> None:
    """PEFT gives each layer another dictionary of scalings, and the first one back."""
    stock, fused = (each.eval() for each in pair(model(f32)))
    for multiplier in (1.0, 0.25, 1.0):
        with (
            torch.no_grad(),
            rescale_adapter_scale(stock, multiplier),
            rescale_adapter_scale(fused, multiplier),
        ):
            for _ in range(2):
                got, want = output(fused, IDS[:1, :1]), output(stock, IDS[:1, :1])
                assert (got - want).norm() <= FLOAT32_RTOL * want.norm()


def status(peft_model: PeftModel) -> list[Any]:
    """What PEFT reports of a model, but the names of the layers' classes."""
    layers = [
        dataclasses.replace(layer, module_type=layer.module_type.replace("Fused", ""))
        for layer in peft_model.get_layer_status()
    ]
    whole = peft_model.get_model_status()
    counts = json.dumps(peft_model.get_nb_trainable_parameters())
    return [layers, whole, counts, peft_model.active_adapters, sorted(peft_model.peft_config)]


@pytest.mark.parametrize("lora_first", [True, False])
def test_mixed_with_loha(lora_first: bool) -> None:
    """The LoRA layers inside another tuner's, and around them."""
    models: list[Any] = []
    for _ in range(2):
        torch.manual_seed(3)
        loha = LoHaConfig(r=3, alpha=2, target_modules=TARGETS, init_weights=False)
        first, second = (config(), loha) if lora_first else (loha, config())
        mixed: Any = get_peft_model(base_model(), first, mixed=True)
        mixed.add_adapter("second", second)
        randomize(mixed, "default" if lora_first else "second")
        models.append(mixed)
    stock, fused = models[0], fuse(models[1])
    for active in (["default", "second"], ["second"], ["default"]):
        for each in models:
            each.set_adapter(active)
        assert_same_models(fused, stock)
        inside = "adapter only" if not lora_first and "second" in active else "not fused"
        assert {row.state for row in explain(fused).rows} == {inside}
    assert_same_models(fused.merge_and_unload(), stock.merge_and_unload())


def test_loaded_from_meta_and_fused(tmp_path: Path) -> None:
    """Fused while its adapter has no memory yet, which `explain` says."""
    another(tmp_path, r=6, lora_alpha=3)
    stock = PeftModel.from_pretrained(base_model(), tmp_path, low_cpu_mem_usage=True)
    assert_same_models(fuse(copy.deepcopy(stock)), stock)
    empty = fuse(get_peft_model(base_model(), config(r=6, lora_alpha=3), low_cpu_mem_usage=True))
    assert {p.device.type for n, p in empty.named_parameters() if "lora_" in n} == {"meta"}
    assert all(row.reason for row in explain(empty).rows)
    empty.load_adapter(tmp_path, "default", low_cpu_mem_usage=True)
    torch.testing.assert_close(output(empty, IDS), output(stock, IDS))


def prepared_for_kbit_training(compute: torch.dtype, seed: int) -> tuple[Any, Any, Any]:
    """Norms, head and x in float32, checkpointing on, over weights in 4 bits; in training mode, for
    in eval mode bitsandbytes may repack the stock model's weights. Fused, stock, in float64."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 64}
    base: Any = LlamaForCausalLM(LlamaConfig(**TINY | sizes)).to(torch.bfloat16)
    for name, linear in [(n, m) for n, m in base.model.named_modules() if type(m) is nn.Linear]:
        four_bit = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=compute,
            quant_type="nf4",
        )  # fmt: skip
        four_bit.weight = bnb.nn.Params4bit(linear.weight.data, False, quant_type="nf4")
        base.model.set_submodule(name, four_bit)
    base.to("cpu").is_loaded_in_4bit = True
    prepared: Any = prepare_model_for_kbit_training(
        base, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert prepared.model.norm.weight.dtype is f32
    stock = get_peft_model(prepared, config(target_modules="all-linear"))
    randomize(stock, "default")
    stock, fused = pair(stock.train())
    exact: Any = unfuse(copy.deepcopy(fused))
    for name, four_bit in list(exact.named_modules()):
        if type(four_bit) is bnb.nn.Linear4bit:
            dense = nn.Linear(four_bit.in_features, four_bit.out_features, bias=False)
            dense.weight.data = Weight4bit.from_bitsandbytes(four_bit.weight).dequantize(f32)
            exact.set_submodule(name, dense.requires_grad_(False))
    return fused, stock, exact.double()


@pytest.mark.parametrize("compute", [f32, torch.bfloat16], ids=str)
def test_prepared_for_kbit_training(compute: torch.dtype) -> None:
    """Whose rounding errors are the larger is luck in one model, so that four count."""
    errors: tuple[list[Tensor], list[Tensor]] = ([], [])
    for seed in range(4):
        fused, stock, exact = prepared_for_kbit_training(compute, seed)
        got, want, ref = (results(each, IDS) for each in (fused, stock, exact))
        assert got.keys() == want.keys() == ref.keys()
        assert all(got[name].dtype is want[name].dtype for name in ref)
        for each, found in zip(errors, (got, want), strict=True):
            each.append(torch.stack([(found[n] - ref[n]).norm() / ref[n].norm() for n in ref]))
    # Like tolerance, of whole tensors. PEFT's backward rounds the weights to bfloat16 in any case.
    (ours, theirs), u = map(torch.stack, errors), tolerance.unit_roundoff(compute)
    assert ours[:, 0].mean() <= 1.25 * theirs[:, 0].mean() + u / 4, "y"
    assert ours.mean() <= 1.25 * theirs.mean() + u / 4 and ours.max() <= 2 * theirs.max()
    ops = count_ops(lambda: results(fused, IDS))
    assert ops["lora_linear_4bit"] == 2 * ops["lora_linear_backward_4bit"] == 28
    if native.module is not None:
        explain(fused, x_dtype=f32).assert_fused()
