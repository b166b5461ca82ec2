"""A base weight that may not be read is not read: the base layer is called as a module.

Likewise whatever somebody did to lora_A, lora_B or the layer itself is not bypassed.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import (
    AlignDevicesHook,
    CpuOffload,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lora_kernels.peft import FusedLinear, Row, explain, fuse, unfuse
from lora_kernels.peft.explain_rows import ADAPTER, PEFT
from tests.support.assertions import assert_bitwise_equal, assert_close_derived
from tests.support.peft_models import (
    MLP,
    SIZES,
    Tokens,
    activate,
    adalora_mlp,
    add_adapter,
    add_lora,
    batch,
    conv1d_mlp,
    count_ops,
    dora_mlp,
    embedding_model,
    fused_layers,
    mlp,
    pair,
    results,
    token_ids,
)

# PEFT, of a Conv1D.
pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")


def rows(model: nn.Module) -> dict[str, Row]:
    """`explain`'s rows by the layer's short name."""
    return {row.layer.rpartition(".")[2]: row for row in explain(model).rows}


def up(model: PeftModel) -> Any:
    return model.base_model.model.up


class ScaledLinear(nn.Linear):
    """A subclass whose forward is more than its weight says."""

    def forward(self, input: Tensor, factor: float = 2.0) -> Tensor:
        return factor * super().forward(input)


def patched_forward(base: nn.Linear) -> None:
    forward = base.forward
    base.forward = lambda x: 2 * forward(x)


def parametrized(base: nn.Linear) -> None:
    nn.utils.parametrizations.weight_norm(base)
    with torch.no_grad():
        base.parametrizations.weight.original0.mul_(2)
    base.requires_grad_(False)


def weight_subclass(base: nn.Linear) -> None:
    base.weight = type("Quantized", (nn.Parameter,), {})(base.weight.detach(), requires_grad=False)


def cpu_offloaded(base: nn.Linear) -> None:
    add_hook_to_module(base, AlignDevicesHook("cpu", offload=True))
    assert base.weight.is_meta


def scaled_subclass(layer: Any) -> None:
    layer.base_layer.__class__ = ScaledLinear


HOOK = "a hook sits on its nn.Linear"
CHANGES: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "subclassed": (
        lambda base: setattr(base, "__class__", ScaledLinear),
        "ScaledLinear is not exactly nn.Linear",
    ),
    "forward_hook": (lambda base: base.register_forward_hook(lambda m, x, y: 2 * y), HOOK),
    "forward_pre_hook": (
        lambda base: base.register_forward_pre_hook(lambda m, x: (2 * x[0],)),
        HOOK,
    ),
    "backward_hook": (
        lambda base: base.register_full_backward_hook(lambda m, gx, gy: (2 * gx[0],)),
        HOOK,
    ),
    "backward_pre_hook": (
        lambda base: base.register_full_backward_pre_hook(lambda m, gy: (2 * gy[0],)),
        HOOK,
    ),
    "patched_forward": (patched_forward, "its forward was replaced"),
    "parametrized": (parametrized, "ParametrizedLinear is not exactly nn.Linear"),
    "weight_subclass": (weight_subclass, "its weight is a Quantized"),
    "cpu_offloaded": (cpu_offloaded, "accelerate offloads its weights"),
    "other_hook_of_accelerate": (
        lambda base: add_hook_to_module(base, CpuOffload("cpu")),
        "accelerate's CpuOffload sits on it",
    ),
}


@pytest.mark.parametrize("after_fuse", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_base_layer_is_called_as_a_module(name: str, after_fuse: bool) -> None:
    change, reason = CHANGES[name]
    stock, fused = mlp(), mlp()
    if after_fuse:
        fuse(fused)
    for model in (stock, fused):
        change(up(model).base_layer)
    fuse(fused)
    assert_close_derived(results(fused, batch()), results(stock, batch()))
    assert count_ops(lambda: up(fused)(batch()))["lora_linear"] == 1
    row = rows(fused)["up"]
    assert row.state == ADAPTER
    assert row.reason.startswith(f"base layer: {reason}")
    assert rows(fused)["down"].state != ADAPTER
    with pytest.raises(RuntimeError, match=ADAPTER):
        explain(fused).assert_fused()


class Undifferentiable(nn.Linear):
    """A base whose result has no graph, like that of transformers' FbgemmFp8Linear."""

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


@pytest.mark.parametrize("build", [mlp, adalora_mlp])
def test_base_layer_without_a_graph_raises_if_x_needs_a_gradient(build: Callable[[], Any]) -> None:
    model = fuse(build())
    up(model).base_layer.__class__ = Undifferentiable
    x = batch()
    model(x).sum().backward()  # nothing before the layer trains
    with torch.no_grad():
        model(x.requires_grad_())
    words = r"^base_model.model.up: its base layer Undifferentiable got an x that requires a grad"
    with pytest.raises(RuntimeError, match=words):
        model(x)


@pytest.mark.filterwarnings("ignore:.lora_bias=True")
def test_adapter_only_in_every_way_equals_peft() -> None:
    """With a bias on lora_B, several adapters, and a result in another dtype than x."""
    stock, fused = mlp(torch.bfloat16, lora_bias=True), mlp(torch.bfloat16, lora_bias=True)
    for model in (stock, fused):
        add_adapter(model)
        activate(model, "default", "second")
        up(model).base_layer.register_forward_hook(lambda module, args, y: y.half())
    fuse(fused)
    x = batch(torch.bfloat16)
    got, want = up(fused)(x), up(stock)(x)
    assert want.dtype is torch.float16
    # The adapter's part is rounded to bfloat16 before it is added, PEFT's is not.
    assert_close_derived(got, want, 2.0**-8)


@pytest.mark.parametrize("build", [mlp, adalora_mlp])
def test_extra_arguments_reach_the_base_layer(build: Callable[[], Any]) -> None:
    stock, fused = build(), build()
    for model in (stock, fused):
        scaled_subclass(up(model))
    fuse(fused)
    for args, kwargs in (((3.0,), {}), ((), {"factor": 3.0})):
        got, want = (up(model)(batch(), *args, **kwargs) for model in (fused, stock))
        assert_close_derived(got, want)
    assert count_ops(lambda: up(fused)(batch(), 3.0))["lora_linear"] == 1
    with pytest.raises(TypeError):  # a stock base layer takes x alone
        fused.base_model.model.down(batch(), 3.0)


# accelerate


@pytest.mark.parametrize("to_disk", [False, True])
def test_whole_model_offloaded_is_left_to_peft(to_disk: bool, tmp_path: Path) -> None:
    """lora_A and lora_B are offloaded too, so all is PEFT's own."""
    stock, fused = pair(mlp())
    want = stock(batch())
    if to_disk:
        accelerate.disk_offload(fused, tmp_path, execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(fused, execution_device=torch.device("cpu"))
    assert_close_derived(fused(batch()), want)
    reason = "adapter 'default': accelerate offloads its weights"
    row = Row("base_model.model.up", PEFT, "peft", "PEFT's own forward", reason)
    assert rows(fused)["up"] == row


def test_base_model_offloaded_before_peft_is_adapter_only() -> None:
    torch.manual_seed(0)
    base = MLP().double()
    accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    fused = fuse(add_lora(base))
    for layer in fused_layers(fused):  # PEFT puts new adapters beside a weight on meta
        for part in (layer.lora_A, layer.lora_B):
            part.to_empty(device="cpu")
    stock = mlp()
    fused.load_state_dict(
        {n: p for n, p in stock.state_dict().items() if ".lora_" in n}, strict=False
    )
    assert_close_derived(fused(batch()), stock(batch()))
    assert rows(fused)["up"].state == ADAPTER


@pytest.mark.parametrize("hooked", ["base", "layer"])
@pytest.mark.parametrize("order", ["before fuse", "after fuse"])
@pytest.mark.parametrize("in_sequence", [False, True], ids=["alone", "in a sequence"])
def test_device_hook_is_harmless(in_sequence: bool, hooked: str, order: str) -> None:
    """device_map="auto" puts such a hook on every module of a model spread over GPUs."""
    stock, fused = pair(mlp())
    unfuse(fused)
    if order == "after fuse":
        fuse(fused)
    module = up(fused).base_layer if hooked == "base" else up(fused)
    hook = AlignDevicesHook("cpu", io_same_device=True)
    add_hook_to_module(module, SequentialHook(hook) if in_sequence else hook)
    fuse(fused)
    assert_close_derived(results(fused, batch()), results(stock, batch()))
    assert count_ops(lambda: up(fused)(batch())) == {"lora_linear": 1}
    assert rows(fused)["up"].backend != "peft"
    remove_hook_from_module(module)  # leaves a bound method in its place
    assert count_ops(lambda: up(fused)(batch())) == {"lora_linear": 1}
    unfuse(fused)
    assert count_ops(lambda: up(fused)(batch()[0])) == {"addmm": 1, "mm": 2}


def test_unfuse_under_a_device_hook_gives_pefts_forward() -> None:
    fused = fuse(mlp())
    add_hook_to_module(up(fused), AlignDevicesHook("cpu"))
    unfuse(fused)
    assert count_ops(lambda: up(fused)(batch()[0])) == {"addmm": 1, "mm": 2}


# The layer and its adapter


@pytest.mark.parametrize("order", ["before fuse", "after fuse"])
def test_trainable_base_is_left_to_peft(order: str) -> None:
    stock, fused = mlp(), mlp()
    if order == "after fuse":
        fuse(fused)
    for model in (stock, fused):
        up(model).base_layer.weight.requires_grad_()
    fuse(fused)
    assert (type(up(fused)) is lora.Linear) is (order == "before fuse")
    assert rows(fused)["up"].reason == "the base weight is trainable"
    got = results(fused, batch())
    assert any(name.endswith("up.base_layer.weight") for name in got)
    assert_close_derived(got, results(stock, batch()))


def part_of(layer: Any, part: str) -> Any:
    module = getattr(layer, part)
    return module if part == "base_layer" else module["default"]


def hook_on(part: str) -> Callable[[Any], Any]:
    return lambda layer: part_of(layer, part).register_forward_hook(lambda m, args, y: 1.5 * y)


def patched(part: str) -> Callable[[Any], Any]:
    """A forward of the part that is not its class's."""

    def change(layer: Any) -> None:
        module = part_of(layer, part)
        forward = module.forward
        module.forward = lambda *args, **kwargs: 1.5 * forward(*args, **kwargs)

    return change


def replaced_dropout(dropout: nn.Module) -> Callable[[Any], Any]:
    return lambda layer: layer.lora_dropout.update({"default": dropout})


def tensor_scaling(layer: Any) -> None:
    layer.scaling["default"] = torch.tensor(layer.scaling["default"], dtype=torch.float64)


def no_product(layer: Any) -> None:
    layer.forward = lambda x: x @ torch.ones(SIZES[0], SIZES[1], dtype=x.dtype)


def trainable(layer: Any) -> None:
    layer.base_layer.weight.requires_grad_()


def unchanged(layer: Any) -> None:
    """Change nothing: the layer is another one from the start."""


def scaled_embedding() -> Any:
    torch.manual_seed(0)
    inner = Tokens()
    inner.tokens = Gemma3TextScaledWordEmbedding(SIZES[1], SIZES[0], 0, embed_scale=3.0)
    return add_lora(inner.double(), target_modules=["tokens"])


def embedding_over(**base: Any) -> Callable[[], Any]:
    return lambda: embedding_model(base=base)


BY_PEFT, BY_ADAPTER = (PEFT, "peft"), (ADAPTER, "eager")  # eager as float64 always is
MAGNITUDE = "it is a DoRA, and its magnitude is no plain module"
# Kind of model and change of its first layer -> who computes it, and why.
CHANGED: dict[tuple[Any, Callable[[Any], Any]], tuple[tuple[str, str], str]] = {
    (mlp, hook_on("lora_A")): (BY_PEFT, "adapter 'default': a hook sits on its nn.Linear"),
    (mlp, hook_on("lora_B")): (BY_PEFT, "adapter 'default': a hook sits on its nn.Linear"),
    (mlp, hook_on("lora_dropout")): (BY_PEFT, "adapter 'default': a hook sits on its dropout"),
    (mlp, patched("lora_dropout")): (BY_PEFT, "its forward was replaced (its dropout's)"),
    (mlp, patched("lora_A")): (BY_PEFT, "adapter 'default': its forward was replaced"),
    (mlp, replaced_dropout(nn.Tanh())): (BY_PEFT, "its dropout is a Tanh"),
    # PEFT casts x to the adapter's dtype; `lora_linear` wants float64 alone or not at all.
    (mlp, lambda layer: (layer.lora_A.float(), layer.lora_B.float())): (
        BY_PEFT,
        "float64 goes with float64 alone",
    ),
    (conv1d_mlp, hook_on("base_layer")): (BY_ADAPTER, "a hook sits on its Conv1D"),
    (dora_mlp, hook_on("base_layer")): (
        BY_PEFT,
        "column scale beside a base that is called as a module (a hook sits on its nn.Linear)",
    ),
    (dora_mlp, hook_on("lora_magnitude_vector")): (BY_PEFT, MAGNITUDE),
    (dora_mlp, patched("lora_magnitude_vector")): (BY_PEFT, MAGNITUDE),
    (dora_mlp, tensor_scaling): (
        BY_PEFT,
        "a DoRA, whose column scale beside a scaling in a tensor",
    ),
    (adalora_mlp, hook_on("base_layer")): (BY_ADAPTER, "base layer: "),
    (adalora_mlp, scaled_subclass): (BY_ADAPTER, "base layer: "),
    (adalora_mlp, replaced_dropout(nn.AlphaDropout(0.5).eval())): (
        BY_PEFT,
        "adapter 'default': its dropout is a AlphaDropout",
    ),
    (adalora_mlp, no_product): (BY_PEFT, "its forward was replaced"),
    (adalora_mlp, trainable): (BY_PEFT, "the base weight is trainable"),
    (embedding_model, hook_on("base_layer")): (BY_PEFT, "a hook sits on its nn.Embedding"),
    (embedding_model, patched("base_layer")): (BY_PEFT, "its forward was replaced"),
    (embedding_model, trainable): (BY_PEFT, "the base weight is trainable"),
    (embedding_model, lambda layer: setattr(layer.base_layer, "embed_scale", 3.0)): (
        BY_PEFT,
        "the base has an embed_scale",
    ),
    (scaled_embedding, unchanged): (
        BY_PEFT,
        "is a Gemma3TextScaledWordEmbedding, not exactly nn.Embedding",
    ),
    (embedding_over(max_norm=1.0), unchanged): (BY_PEFT, "the base has max_norm"),
    (embedding_over(sparse=True), unchanged): (BY_PEFT, "the base asks for sparse gradients"),
    (lambda: embedding_model(use_dora=True), unchanged): (
        BY_PEFT,
        "adapter 'default' is a variant of LoRA (DoraEmbeddingVariant)",
    ),
}


def first_layer(model: Any) -> tuple[Any, Tensor]:
    """The layer, and an input for the model."""
    inner = model.base_model.model
    return (inner.tokens, token_ids(5, 7)) if hasattr(inner, "tokens") else (inner.up, batch())


@pytest.mark.parametrize(("case", "want"), CHANGED.items())
def test_change_of_a_layer_is_obeyed_and_named(case: Any, want: Any) -> None:
    (build, change), (who, reason) = case, want
    stock, fused = pair(build())
    for model in (stock, fused):
        layer, x = first_layer(model)
        change(layer)
    with torch.set_grad_enabled("sparse" not in reason):  # whose backward PEFT has not
        for _ in range(2):  # a max_norm has changed lora_A by then
            assert_close_derived(results(fused, x), results(stock, x))
    row = explain(fused).rows[0]
    assert (row.state, row.backend) == who and reason in row.reason


@pytest.mark.parametrize("order", ["before fuse", "after fuse"])
def test_layer_patched_by_someone_else_is_obeyed(order: str) -> None:
    model = mlp()
    if order == "after fuse":
        fuse(model)

    def forward(self: lora.Linear, x: Tensor) -> Tensor:
        return self.base_layer(x)

    layer = up(model)
    layer.forward = types.MethodType(forward, layer)
    fuse(model)
    assert (type(layer) is FusedLinear) is (order == "after fuse")
    assert rows(model)["up"].state == PEFT
    assert rows(model)["up"].reason == "its forward was replaced"
    assert_bitwise_equal(layer(batch()), layer.base_layer(batch()))


@pytest.mark.parametrize(
    ("build", "cls"), [(mlp, nn.Linear), (conv1d_mlp, Conv1D), (embedding_model, nn.Embedding)]
)
def test_class_patched_as_a_whole_is_obeyed(build: Any, cls: Any, monkeypatch: Any) -> None:
    stock, fused = pair(build())
    forward, (_, x) = cls.forward, first_layer(stock)
    monkeypatch.setattr(cls, "forward", lambda self, x: 2 * forward(self, x))
    assert_close_derived(results(fused, x), results(stock, x))
    assert f"{cls.__name__}.forward was replaced" in explain(fused).rows[0].reason


def flattened(layer: Any) -> None:
    """Leave the weight as FSDP1 does between forwards."""
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.flatten(), requires_grad=False)


@pytest.mark.parametrize(
    ("build", "change", "reason"),
    [
        (mlp, flattened, "its weight is flattened, as by FSDP1 or ZeRO-3"),
        (mlp, lambda layer: layer.lora_B.to("meta"), "'default': its weight is on meta, x on cpu"),
        (
            dora_mlp,
            lambda layer: layer.lora_magnitude_vector.to("meta"),
            "it is a DoRA, and its magnitude is on meta, x on cpu",
        ),
        (adalora_mlp, lambda layer: layer.lora_B.to("meta"), "'default': its lora_B is on meta"),
        (adalora_mlp, lambda layer: layer.lora_E.to("meta"), "'default': its lora_E is on meta"),
        (
            embedding_model,
            lambda layer: layer.lora_embedding_B.to("meta"),
            "'default': its lora_B is on meta, x on cpu",
        ),
        (
            embedding_model,
            lambda layer: setattr(layer, "output_fns", {"default": abs}),
            "'default' is sharded over devices",
        ),
        (
            embedding_model,
            lambda layer: setattr(layer, "input_fns", {"default": abs}),
            "'default' is sharded over devices",
        ),
        (adalora_mlp, lambda layer: layer.ranknum.to("meta"), "'default': its ranknum is on meta"),
        (
            adalora_mlp,
            lambda layer: [getattr(layer, f"lora_{name}").float() for name in "ABE"],
            "adapter 'default': float64 goes with float64 alone",
        ),
        (mlp, lambda layer: layer.base_layer.to("meta"), "its weight is on meta, x on cpu"),
    ],
)
def test_layer_whose_tensors_lie_elsewhere_is_named(build: Any, change: Any, reason: str) -> None:
    fused = fuse(build())
    layer, _ = first_layer(fused)
    assert reason not in explain(fused).rows[0].reason
    change(layer)
    row = explain(fused).rows[0]
    assert reason in row.reason
    assert row.state == (PEFT if "'default'" in reason or "DoRA" in reason else ADAPTER)


def test_transposed_adapter_over_a_linear_is_left_to_peft() -> None:
    model = mlp()
    up(model).fan_in_fan_out = True
    fuse(model)
    assert type(up(model)) is lora.Linear
    assert rows(model)["up"].reason.startswith("fan_in_fan_out beside a base that is not")


def test_model_on_the_meta_device_has_shapes() -> None:
    fused = fuse(mlp()).to("meta")
    y = fused(batch().to("meta"))
    assert y.is_meta and y.shape == (3, 4, 9)
    assert "device type 'meta'" in rows(fused)["up"].reason
