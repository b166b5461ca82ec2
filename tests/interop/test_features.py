"""Each feature of PEFT on a stock model and a fused one: the same numbers, states, files, warnings.

Copies and what each kind of layer does are in test_layer_kinds.py, "all-linear" in test_zoo.py.

On a tiny Llama in float64 (see test_zoo for what it rounds). A feature is a configuration, or a
change to a model that is fused already.
"""

from __future__ import annotations

import copy
import dataclasses
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

from lora_kernels.backends.cpu import native
from lora_kernels.peft import explain, fuse, unfuse
from lora_kernels.peft.explain_rows import ADAPTER, KERNELS, LIBRARY, PEFT
from tests.support.assertions import (
    assert_as_exact,
    assert_bitwise_equal,
    assert_close_derived,
    derived_rtol,
)
from tests.support.peft_models import (
    ALPHA,
    IDS,
    TINY,
    R,
    activate,
    add_adapter,
    count_ops,
    fused_layers,
    in_float64,
    llama,
    output,
    pair,
    randomize,
    results,
    seeded_results,
)

f32 = torch.float32
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def base_model(dtype: torch.dtype = torch.float64) -> Any:
    model = llama(f32, attention_bias=True)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return model.to(dtype)


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": TARGETS} | settings)


def model(dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    peft_model = get_peft_model(base_model(dtype), config(**settings))
    randomize(peft_model)
    return peft_model


def assert_same_models(fused: Any, stock: Any) -> None:
    """State, what is trained, output and gradients, in training mode or not."""
    assert_bitwise_equal(fused.state_dict(), stock.state_dict())
    assert [p.requires_grad for p in fused.parameters()] == [
        p.requires_grad for p in stock.parameters()
    ]
    for training in (True, False):
        stock.train(training), fused.train(training)
        assert_close_derived(seeded_results(fused, IDS), seeded_results(stock, IDS))


def assert_explained(fused: nn.Module, stock: nn.Module) -> None:
    """In float32 a layer is fused, or the reason says what else it is; so many ops run, and a
    token goes the shorter way."""
    stock, fused = (copy.deepcopy(each).to(f32).eval() for each in (stock, fused))
    rows = explain(fused).rows
    assert all(row.reason and row.strategy for row in rows)
    ours = [row for row in rows if row.backend != "peft"]
    assert {row.state for row in ours} <= {LIBRARY if native.module is None else KERNELS}
    assert count_ops(lambda: fused(IDS)).get("lora_linear", 0) == len(ours)
    with torch.no_grad():
        for _ in range(2):
            got, want = output(fused, IDS[:1, :1]), output(stock, IDS[:1, :1])
            assert_close_derived(got, want, layers=14)


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
    "patterns": {
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 11},
        "alpha_pattern": {"v_proj": 2},
    },
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 3}},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "bias lora_only": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
    "regular expression": {"target_modules": r".*\.layers\.0\..*(q|up)_proj"},
    "target_parameters": {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"]},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "trainable_token_indices": {"trainable_token_indices": [3, 5, 53]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "inference_mode": {"inference_mode": True},
}


@pytest.mark.filterwarnings("ignore:.*target_parameters")
@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_configuration_equals_peft(settings: dict[str, Any], tmp_path: Path) -> None:
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
def test_initialization_equals_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    """Initialization may change the base weight; for the first adapter and a later one."""
    torch.manual_seed(3)
    stock, fused = pair(get_peft_model(base_model(f32), config(**settings)))
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


def test_pissa_saved_as_lora_equals_peft(tmp_path: Path) -> None:
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
    # The difference of two adapters of nearly the same size, in float32, loses 2**4 of its parts.
    rtol = 2**4 * derived_rtol(f32, layers=14)
    assert_close_derived(output(loaded, IDS), output(fused.eval(), IDS), rtol)


# Changes to a model: of the model and a folder; what one returns takes the model's place.


def two(model: Any, *active: str) -> Any:
    """A second adapter of another rank, scaling and set of layers, which PEFT does not activate."""
    add_adapter(model, r=3, lora_alpha=4, target_modules={"q_proj", "up_proj"})
    if active:
        activate(model, *active)
    return model


def another(folder: Path, **settings: Any) -> Path:
    """A saved adapter."""
    other = get_peft_model(base_model(), config(**settings))
    randomize(other, seed=7)
    other.save_pretrained(folder)
    return folder


def loaded(model: Any, folder: Path) -> None:
    model.load_adapter(another(folder, r=6, lora_alpha=3), "second", is_trainable=True)
    model.set_adapter("second")


def loaded_from_meta(model: Any, folder: Path) -> None:
    another(folder, r=6, lora_alpha=3)
    model.load_adapter(folder, "second", low_cpu_mem_usage=True)
    model.set_adapter("second", inference_mode=True)


def weighted(combination: str, **settings: Any) -> Callable[[Any, Path], None]:
    def change(model: Any, folder: Path) -> None:
        add_adapter(model, r=R, lora_alpha=4)
        torch.manual_seed(3)
        names, weights = ["default", "second"], [0.3, 0.9]
        model.add_weighted_adapter(names, weights, "mix", combination, **settings)
        model.set_adapter("mix")

    return change


def disabled_and_enabled(model: Any, folder: Path) -> None:
    with model.disable_adapter():
        output(model, IDS)
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()


def disabled_while_merged(model: Any, folder: Path) -> None:
    """The forward of a disabled layer takes the adapter out of the weight again."""
    model.merge_adapter()
    with model.disable_adapter():
        output(model, IDS)


def several_merged(model: Any, folder: Path) -> None:
    two(model, "default", "second").merge_adapter(safe_merge=True)


def unmerged(model: Any, folder: Path) -> None:
    several_merged(model, folder)
    model.unmerge_adapter()


def hotswapped_to_another_rank(model: Any, folder: Path) -> None:
    """The scaling is a tensor in float32 from here on."""
    prepare_model_for_compiled_hotswap(model, target_rank=11)
    hotswap_adapter(model, another(folder, r=6, lora_alpha=3), "default")
    scalings = [m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)]
    assert all(isinstance(scaling, Tensor) for scaling in scalings)


def checkpointed(model: Any, folder: Path) -> None:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})


def half_frozen(model: Any, folder: Path) -> None:
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)


def scaled(model: Any, folder: Path) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(3.0)
            layer.unscale_layer(2.0)


def merged_and_unloaded(model: Any, folder: Path) -> Any:
    return two(model).merge_and_unload(safe_merge=True, adapter_names=["default", "second"])


def injected(model: Any, folder: Path) -> Any:
    """Without a PeftModel around it, as diffusers and transformers hold their adapters."""
    torch.manual_seed(3)
    settings = config(r=6, lora_alpha=3, init_lora_weights=False)
    return inject_adapter_in_model(settings, model.get_base_model(), "second")


CHANGES: dict[str, Callable[[Any, Path], Any]] = {
    "set_adapter": lambda model, folder: two(model).set_adapter("second"),
    "several_active": lambda model, folder: two(model, "default", "second"),
    "several_merged": several_merged,
    "one_of_two_merged": lambda model, folder: two(model).merge_adapter(["second"]),
    "unmerged": unmerged,
    # PEFT warns, and activates the other.
    "deleted": lambda model, folder: two(model).delete_adapter("default"),
    "loaded": loaded,
    "loaded_from_meta": loaded_from_meta,
    "weighted_linear": weighted("linear"),
    "weighted_cat": weighted("cat"),
    "weighted_svd": weighted("svd", svd_rank=4),
    "weighted_ties": weighted("ties", density=0.5),
    "disabled": lambda model, folder: model.base_model.disable_adapter_layers(),
    "disabled_and_enabled": disabled_and_enabled,
    "disabled_while_merged": disabled_while_merged,
    "hotswapped": lambda model, folder: hotswap_adapter(
        model, another(folder, r=R, lora_alpha=3), "default"
    ),
    "hotswapped_to_another_rank": hotswapped_to_another_rank,
    "checkpointed": checkpointed,
    "frozen": lambda model, folder: model.set_requires_grad("default", False),
    "half_frozen": half_frozen,
    "scaled": scaled,
    "pickled": lambda model, folder: pickle.loads(pickle.dumps(two(model))),
    "unloaded": lambda model, folder: model.unload(),
    "merged_and_unloaded": merged_and_unloaded,
    "injected": injected,
}
SAME_OUTPUT = {"disabled_and_enabled", "disabled_while_merged", "checkpointed", "frozen"}
SAME_OUTPUT |= {"half_frozen", "pickled"}


@pytest.mark.parametrize("change", CHANGES)
def test_change_of_a_fused_model_equals_peft(change: str, tmp_path: Path) -> None:
    said: list[list[str]] = []
    models: list[Any] = list(pair(model()))
    for i, each in enumerate(models):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            models[i] = CHANGES[change](each, tmp_path / str(i)) or each
        said.append([str(warning.message) for warning in caught])
    stock, fused = models
    assert said[0] == said[1]
    if isinstance(fused, PeftModel):
        assert status(fused) == status(stock)
    assert_same_models(fused, stock)
    if any(isinstance(layer, LoraLayer) for layer in fused.modules()):
        assert_explained(fused, stock)
        assert_same_models(unfuse(fused), stock)


@pytest.mark.parametrize("change", CHANGES)
def test_change_between_tokens_equals_peft(change: str, tmp_path: Path) -> None:
    """A layer's prepared call (float32, not float64) does not outlive the change."""
    models: list[Any] = [each.eval() for each in pair(model(f32))]
    with torch.no_grad():
        for i, each in enumerate(models):
            for _ in range(2):
                before = output(each, IDS[:1, :1])
            models[i] = (CHANGES[change](each, tmp_path / str(i)) or each).eval()
        for _ in range(2):
            want, got = (output(each, IDS[:1, :1]) for each in models)
            assert_close_derived(got, want, layers=14)
    if change not in SAME_OUTPUT:
        assert (want - before).norm() > 8 * derived_rtol(f32, layers=14) * want.norm()


def test_rescaled_between_tokens_equals_peft() -> None:
    """PEFT gives each layer another dictionary of scalings, and the first one back."""
    stock, fused = (each.eval() for each in pair(model(f32)))
    for multiplier in (1.0, 0.25, 1.0):
        with (
            torch.no_grad(),
            rescale_adapter_scale(stock, multiplier),
            rescale_adapter_scale(fused, multiplier),
        ):
            for _ in range(2):
                assert_close_derived(
                    output(fused, IDS[:1, :1]), output(stock, IDS[:1, :1]), layers=14
                )


def status(peft_model: PeftModel) -> list[Any]:
    """PEFT's report of a model, without the names of the layers' classes."""
    layers = [
        dataclasses.replace(layer, module_type=layer.module_type.replace("Fused", ""))
        for layer in peft_model.get_layer_status()
    ]
    whole = peft_model.get_model_status()
    counts = json.dumps(peft_model.get_nb_trainable_parameters())
    return [layers, whole, counts, peft_model.active_adapters, sorted(peft_model.peft_config)]


@pytest.mark.parametrize("lora_first", [True, False])
def test_mixed_with_loha_equals_peft(lora_first: bool) -> None:
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
        inside = LIBRARY if lora_first else ADAPTER
        if ("default" if lora_first else "second") not in active:
            inside = PEFT
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
    assert_close_derived(output(empty, IDS), output(stock, IDS))


def prepared_for_kbit_training(compute: torch.dtype, seed: int) -> tuple[Any, Any, Any]:
    """Norms, head and x in float32, checkpointing on, over weights in 4 bits; in training mode, for
    in eval mode bitsandbytes may repack the stock model's weights. Fused, stock, in float64."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 64}
    base: Any = LlamaForCausalLM(LlamaConfig(**TINY | sizes)).to(torch.bfloat16)
    for name, linear in [(n, m) for n, m in base.model.named_modules() if type(m) is nn.Linear]:
        sizes = linear.in_features, linear.out_features
        four_bit = bnb.nn.Linear4bit(*sizes, False, compute_dtype=compute, quant_type="nf4")
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
    return fused, stock, in_float64(stock)


@pytest.mark.parametrize("compute", [f32, torch.bfloat16], ids=str)
def test_prepared_for_kbit_training_loses_no_more_than_peft(compute: torch.dtype) -> None:
    """PEFT's backward rounds the weights to bfloat16 in any case."""
    draws = [prepared_for_kbit_training(compute, seed) for seed in range(4)]
    assert_as_exact(*([results(draw[i], IDS) for draw in draws] for i in (0, 2, 1)))
    fused = draws[-1][0]
    ops = count_ops(lambda: results(fused, IDS))
    assert ops["lora_linear_quantized"] == 2 * ops["lora_linear_backward_quantized"] == 28
    if native.module is not None:
        explain(fused, x_dtype=f32).assert_fused(kernels=True)
