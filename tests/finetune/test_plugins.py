"""The plugins for axolotl and LLaMA-Factory, by the hooks that those call.

Both are larger than this project's development dependencies. Where one is installed its own classes
run. Classes with the same signatures stand in for the other contract of LLaMA-Factory, and for what
is not installed:

    pip install --no-deps --target plugins axolotl addict llamafactory
    PYTHONPATH=plugins python -m pytest tests/finetune/test_plugins.py
"""

from __future__ import annotations

import importlib
import runpy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_kernels.peft.linear import Fused
from tests.support.assertions import assert_close_derived
from tests.support.peft_models import IDS, llama, loss_and_gradients, randomize

AXOLOTL = "lora_kernels.integrations.axolotl"
LLAMA_FACTORY = "lora_kernels.integrations.llama_factory"
LAUNCHER = "llamafactory.v1.launcher"


def peft_model() -> Any:
    model = get_peft_model(
        llama(torch.float32), LoraConfig(r=5, lora_alpha=7, target_modules="all-linear")
    )
    randomize(model)
    return model.train()


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """Make an importable module of this name."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)


class BasePlugin:
    """The hooks of axolotl's class of this name that ours overrides, and its constructor."""

    def __init__(self) -> None: ...

    def register(self, cfg: dict[str, Any]) -> None: ...

    def get_input_args(self) -> str | None: ...

    def post_lora_load(self, cfg: Any, model: Any) -> None: ...

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return []


class PluginManager:
    """axolotl's: loads a plugin by name and calls every plugin's hooks."""

    def __init__(self) -> None:
        self.plugins: dict[str, Any] = {}

    def register(self, name: str) -> None:
        module, _, cls = name.rpartition(".")
        self.plugins[name] = getattr(importlib.import_module(module), cls)()

    def get_input_args(self) -> list[str]:
        return [plugin.get_input_args() for plugin in self.plugins.values()]

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        for plugin in self.plugins.values():
            plugin.post_lora_load(cfg, model)

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        plugins = self.plugins.values()
        return [c for plugin in plugins for c in plugin.add_callbacks_pre_trainer(cfg, model)]


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """axolotl's plugin manager with our plugin."""
    pytest.importorskip("pydantic")
    if find_spec("axolotl") is None:
        classes = {"BasePlugin": BasePlugin, "PluginManager": PluginManager}
        stand_in(monkeypatch, "axolotl.integrations.base", **classes)
    sys.modules.pop(AXOLOTL, None)
    base = importlib.import_module("axolotl.integrations.base")
    manager = base.PluginManager()
    manager.plugins.clear()
    manager.register(f"{AXOLOTL}.FusePlugin")
    yield manager
    manager.plugins.clear()
    sys.modules.pop(AXOLOTL, None)


def register(manager: Any, cfg: dict[str, Any]) -> None:
    """Do as axolotl's prepare_plugins does with the configuration that it has read."""
    for plugin in manager.plugins.values():
        plugin.register(cfg)


@pytest.mark.parametrize(
    "cfg",
    [
        {},
        {"lora_kernels_loss": True, "lora_kernels_qualify": "off"},
        {"lora_kernels_exact_merge": "host"},
    ],
)
def test_axolotl_fuses_after_the_adapter_is_loaded(
    cfg: dict[str, Any], manager: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = {"lora_mlp_kernel": None, "lora_o_kernel": False} | cfg
    register(manager, cfg)
    # axolotl turns on a kernel that is None.
    assert all(cfg[f"lora_{name}_kernel"] is False for name in ("mlp", "qkv", "o", "embedding"))
    model = peft_model()
    want = loss_and_gradients(model)
    manager.post_lora_load(cfg, model)
    places = {
        vars(each)["exact_merge"].location
        for each in model.modules()
        if "exact_merge" in vars(each)
    }
    assert places == {cfg[key] for key in cfg if key == "lora_kernels_exact_merge"}
    assert_close_derived(loss_and_gradients(model), want, layers=8)
    logits = model(input_ids=IDS, labels=IDS, use_cache=False).logits
    assert (logits is None) is cfg.get("lora_kernels_loss", False)
    verdicts, report = manager.add_callbacks_pre_trainer(cfg, model)
    assert "verdicts" in verdicts.state()["attributes"]
    assert "LoRA layers" not in capsys.readouterr().out
    report.on_train_begin(None, SimpleNamespace(is_world_process_zero=True), None, model=model)
    assert "lora_kernels: 14 LoRA layers: 14 our " in capsys.readouterr().out


def test_axolotl_finds_the_keys_of_the_configuration(manager: Any) -> None:
    """The path is dotted, and from it axolotl makes a base of its configuration's class."""
    (path,) = manager.get_input_args()
    module, _, cls = path.rpartition(".")
    arguments = getattr(importlib.import_module(module), cls)
    assert arguments().model_dump() == {
        "lora_kernels_linears": False,
        "lora_kernels_loss": False,
        "lora_kernels_qualify": "cached",
        "lora_kernels_exact_merge": None,
        "lora_kernels_mlp_tile_rows": None,
    }
    with pytest.raises(ValueError, match="lora_kernels_qualify"):
        arguments(lora_kernels_qualify="later")


@pytest.mark.parametrize("name", ["mlp", "qkv", "o", "embedding"])
def test_axolotl_with_its_own_kernels_raises(name: str, manager: Any) -> None:
    with pytest.raises(ValueError, match=f"lora_{name}_kernel: got true, want false"):
        register(manager, {f"lora_{name}_kernel": True})


def test_axolotl_without_an_adapter_raises(manager: Any) -> None:
    with pytest.raises(ValueError, match="without LoRA layers"):
        manager.post_lora_load({}, torch.nn.Linear(2, 2))


class KernelPlugin:
    """LLaMA-Factory 0.9.5's class of this name: a registry of functions by name and method."""

    _registry: ClassVar[dict[str, dict[str, Callable[..., Any]]]] = defaultdict(dict)

    def __init__(self, name: str | None = None) -> None:
        self.name: Any = name

    def register(self, method_name: str = "__call__") -> Callable[..., Any]:
        def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
            self._registry[self.name][method_name] = function
            return function

        return decorator

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._registry[self.name]["__call__"](*args, **kwargs)


class RoutingKernelPlugin:
    """The class of LLaMA-Factory after 0.9.5: an object by name, whose attributes it has."""

    _registry: ClassVar[dict[str, Any]] = {}

    def __init__(self, name: str | None = None) -> None:
        self.name: Any = name

    def register(self) -> Callable[..., Any]:
        return lambda registered: self._registry.setdefault(self.name, registered)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry[self.name], name)


def apply_kernels(model: Any, config: dict[str, Any], require_logits: bool = False) -> Any:
    """Do as LLaMA-Factory after 0.9.5 with a configuration that names one kernel."""
    plugin = RoutingKernelPlugin(config["name"])
    return plugin.apply(model=model, config=config, require_logits=require_logits)


CONTRACTS: dict[str, dict[str, Any]] = {
    "0.9.5": {"KernelPlugin": KernelPlugin},
    "main": {"KernelPlugin": RoutingKernelPlugin, "apply_kernels": apply_kernels},
}


@pytest.fixture(params=CONTRACTS)
def interface(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """LLaMA-Factory's module of kernels, with ours registered."""
    name = "llamafactory.v1.plugins.model_plugins.kernels.interface"
    module = importlib.import_module(name) if find_spec("llamafactory") else None
    if module is None or hasattr(module, "apply_kernels") is not (request.param == "main"):
        stand_in(monkeypatch, name, **CONTRACTS[request.param])
        monkeypatch.setitem(sys.modules, LAUNCHER, ModuleType(LAUNCHER))
        module = importlib.import_module(name)
    sys.modules.pop(LLAMA_FACTORY, None)
    importlib.import_module(LLAMA_FACTORY)
    yield module
    sys.modules.pop(LLAMA_FACTORY, None)


def apply(interface: Any, model: Any, include: Any = None) -> Any:
    """Do as LLaMA-Factory's model engine does for `kernel_config` before it trains."""
    if hasattr(interface, "apply_kernels"):
        config = {"name": "lora_kernels", "include_kernels": include}
        return interface.apply_kernels(model, config, require_logits=True)
    return interface.KernelPlugin("lora_kernels")(model=model, include_kernels=include)


@pytest.mark.parametrize("include", [None, "auto", True, "linears, auto"])
def test_llama_factory_fuses_the_model(
    include: Any, interface: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = peft_model()
    want = loss_and_gradients(model)
    fused = apply(interface, model, include)
    assert fused is model and sum(isinstance(m, Fused) for m in model.modules()) == 14
    for said in (1, 0):  # at the first forward alone
        assert_close_derived(loss_and_gradients(model), want, layers=8)
        assert capsys.readouterr().out.count("lora_kernels: 14 LoRA layers: 14 our ") == said
    assert model(input_ids=IDS, labels=IDS, use_cache=False).logits is not None


def test_llama_factory_with_a_loss_without_logits_raises(interface: Any) -> None:
    """LLaMA-Factory's trainers read `outputs.logits`, which would be None."""
    with pytest.raises(ValueError, match="include_kernels: got 'loss', which computes no logits"):
        apply(interface, peft_model(), "linears,loss")
    if hasattr(interface, "apply_kernels"):  # for a model that does not train
        config = {"name": "lora_kernels", "include_kernels": "loss"}
        model = interface.apply_kernels(peft_model(), config, require_logits=False)
        assert model(input_ids=IDS, labels=IDS, use_cache=False).logits is None


def test_llama_factory_with_an_unknown_kernel_raises(interface: Any) -> None:
    with pytest.raises(ValueError, match="include_kernels: got 'rope'"):
        apply(interface, peft_model(), "loss,rope")
    with pytest.raises(ValueError, match="without LoRA layers"):
        apply(interface, torch.nn.Linear(2, 2))


def test_llama_factory_starts_by_our_module(
    interface: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m`, which registers the plugin before LLaMA-Factory reads its configuration."""
    found: list[Any] = []

    def main() -> None:
        found.append(apply(interface, peft_model()))

    monkeypatch.setattr(importlib.import_module(LAUNCHER), "main", main, raising=False)
    monkeypatch.delitem(sys.modules, LLAMA_FACTORY)
    interface.KernelPlugin._registry.clear()
    runpy.run_module(LLAMA_FACTORY, run_name="__main__")
    assert any(isinstance(m, Fused) for m in found[0].modules())
