"""`check` finds each fault, finds none in sound models, and changes nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_kernels.peft import Check, check, experts, fuse, unfuse
from lora_kernels.peft.check import _roundoff
from lora_kernels.peft.linear import FusedLinear
from tests.support.peft_models import (
    IDS,
    MLP,
    SIZES,
    SIZES_4BIT,
    activate,
    adalora_mlp,
    add_adapter,
    add_lora,
    batch,
    conv1d_mlp,
    dora_mlp,
    embedding_model,
    four_bit_mlp,
    gpt2,
    kasa_mlp,
    llama,
    mica_mlp,
    mlp,
    moe,
    skip_without_kasa,
    token_ids,
    train_moe,
    two_adapters,
)

f32, bf16 = torch.float32, torch.bfloat16
ADAPTER = "adapter_model.safetensors"
LABELLED = {"input_ids": IDS, "labels": IDS}
either = pytest.mark.parametrize("fused", [False, True], ids=["peft", "fused"])


def lm(**config: Any) -> Any:
    return get_peft_model(
        llama(f32), LoraConfig(**{"r": 3, "target_modules": "all-linear"} | config)
    )


# Sound models


def convolutions() -> Any:
    base = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 4 * 4, 7))
    return get_peft_model(base, LoraConfig(r=3, target_modules=["0", "2"]))


def attention() -> Any:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(24, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x)[0]

    return get_peft_model(Attention(), LoraConfig(r=3, target_modules=["attn"]))


def with_norm() -> Any:
    base = nn.Sequential(nn.Linear(SIZES[0], 8), nn.BatchNorm1d(4), nn.Linear(8, 3))
    return get_peft_model(base, LoraConfig(r=3, target_modules=["0", "2"]))


x, x4 = batch(f32), batch(f32, SIZES_4BIT[0])
SOUND: dict[str, tuple[Callable[[], Any], Any]] = {
    "linear": (lambda: mlp(f32), x),
    "bfloat16": (lambda: mlp(bf16), x.to(bf16)),
    "float64": (mlp, batch()),
    "positional": (lambda: mlp(f32), (x,)),
    "untrained": (lambda: get_peft_model(MLP(), LoraConfig(target_modules=["up", "down"])), x),
    "dropout": (lambda: mlp(f32, lora_dropout=0.5), x),
    "patterns": (
        lambda: mlp(f32, use_rslora=True, rank_pattern={"up": 3}, alpha_pattern={"down": 9}),
        x,
    ),
    "bias": (lambda: mlp(f32, lora_bias=True, target_modules=["up"]), x),
    "two active": (lambda: two_adapters(mlp(f32)), x),
    "conv1d": (lambda: conv1d_mlp(f32), x),
    "dora": (lambda: dora_mlp(f32), x),
    "dora in bfloat16": (lambda: dora_mlp(bf16), x.to(bf16)),
    "mica": (mica_mlp, x),
    "adalora": (lambda: adalora_mlp(f32), x),
    "embedding": (lambda: embedding_model(f32), token_ids(3, 4)),
    "convolution": (convolutions, torch.randn(2, 3, 6, 6)),
    "attention": (attention, torch.randn(2, 5, 24)),
    "batch norm": (with_norm, x),
    "llama": (lm, LABELLED),
    "no labels": (lm, {"input_ids": IDS}),
    "gpt2": (
        lambda: get_peft_model(gpt2(f32), LoraConfig(target_modules=["c_attn", "wte", "lm_head"])),
        LABELLED,
    ),
    "head saved": (lambda: lm(target_modules=["q_proj"], modules_to_save=["lm_head"]), LABELLED),
    "tokens": (lambda: lm(target_modules=["q_proj"], trainable_token_indices=[1, 2]), LABELLED),
    "experts": (moe, LABELLED),
    "trained experts": (lambda: train_moe(moe()), LABELLED),
}


@either
@pytest.mark.parametrize("name", SOUND)
def test_check_of_a_sound_model_finds_no_fault(name: str, fused: bool) -> None:
    build, inputs = SOUND[name]
    if name == "mica":
        skip_without_kasa()  # or MiCA
    model = fuse(build()) if fused else build()
    found = check(model, inputs)
    assert found.ok, found
    found.assert_ok()
    # PEFT's forward of this layer reads the weights of its output projection and does not call it.
    rows = [row for row in found.rows if "out_proj" not in row.layer]
    assert {row[1:6] for row in rows} == {("✓",) * 5}
    assert 0 < found.change < 20 and found.merge_error < 0.05


@either
def test_check_of_4bit_layers_allows_for_quantization(fused: bool) -> None:
    pytest.importorskip("bitsandbytes")
    model = four_bit_mlp(loaded=True)
    codes = [p.data.clone() for p in model.parameters() if p.dtype == torch.uint8]
    found = check(fuse(model) if fused else model, x4)
    assert found.ok and {row.merge for row in found.rows} == {"✓"}, found
    assert 0.02 < found.merge_error < 0.2  # NF4's error of normal weights is 0.09
    after = [p.data for p in model.parameters() if p.dtype == torch.uint8]
    assert all(map(torch.equal, codes, after))


def test_check_of_kasa_finds_no_fault() -> None:
    skip_without_kasa()
    assert check(kasa_mlp(f32), x).ok


def test_check_of_a_layer_that_peft_does_not_merge_says_so() -> None:
    found = check(mlp(f32, lora_bias=True), x)  # "down" has no bias to merge into
    row = found.rows[1]
    assert found.ok and row.merge == "–" and row.reason.startswith("PEFT does not merge it: ")


def test_check_of_an_adapter_for_inference_lets_it_train(tmp_path: Path) -> None:
    mlp(f32).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(MLP(), tmp_path)
    assert not any(p.requires_grad for p in model.parameters())
    found = check(model, x, saved=tmp_path)
    assert found.ok and not found.untrained
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_check_under_checkpointing_sees_whether_gradients_arrive(reentrant: bool) -> None:
    """Reentrant checkpointing gives no gradients unless its input requires them."""

    class Checkpointed(MLP):
        def forward(self, x: Tensor) -> Tensor:
            run = super().forward
            return checkpoint(run, x, use_reentrant=reentrant) if self.training else run(x)

    model = get_peft_model(Checkpointed(), LoraConfig(target_modules=["up", "down"]))
    found = check(model, x)
    if reentrant:
        assert_faults(found, "gradient", reason="no gradient reaches lora_A")
    assert found.ok is not reentrant
    assert check(model, x.clone().requires_grad_()).ok


def test_check_of_a_loss_without_logits_finds_no_fault() -> None:
    assert check(fuse(lm(), loss=True), LABELLED).ok


def test_check_on_the_gpu_path_finds_no_fault(gpu_path: None) -> None:
    """If q, k and v share their x, and gated MLPs are blocks."""
    found = check(fuse(lm()), LABELLED)
    assert found.ok, found


@either
@pytest.mark.parametrize("name", SOUND)
def test_check_of_a_sound_model_under_autocast_finds_no_fault(name: str, fused: bool) -> None:
    """Its products are rounded to bfloat16, and the outputs of some layers are float32."""
    build, inputs = SOUND[name]
    if name == "mica":
        skip_without_kasa()  # or MiCA
    model = fuse(build()) if fused else build()
    with torch.autocast("cpu", bf16):
        found = check(model, inputs)
    assert found.ok, found


@either
@pytest.mark.parametrize("zeros", [0, 1])
def test_check_of_a_layer_called_twice_looks_at_both_calls(zeros: int, fused: bool) -> None:
    """Zeros pass through "up" without an effect of its adapter, before other rows or after."""

    class Twice(MLP):
        def forward(self, x: Tensor) -> Tensor:
            calls = [super(Twice, self).forward(x * (i != zeros)) for i in range(2)]
            return calls[0] + calls[1]

    torch.manual_seed(0)
    model = add_lora(Twice().to(f32), target_modules=["up", "down"])
    found = check(fuse(model) if fused else model, x)
    assert found.ok, found


def test_check_prints_a_line_for_each_kind_of_module() -> None:
    found = check(lm(), LABELLED)
    head, *lines = str(found).splitlines()
    assert head.split() == list(found.rows[0]._fields) and len(found.rows) == 14
    assert [line.split("  ")[0].split(".")[-1] for line in lines[:-2]] == (
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert all(line.startswith("2 × ") for line in lines[:-2])
    assert "with random values for lora_B" in lines[-2]
    assert lines[-1] == "14 LoRA layers, 0 with a fault"


# Faults


def assert_faults(found: Check, *columns: str, layers: int | None = None, reason: str = "") -> None:
    """Exactly these columns have "✗", in so many layers, whose reason has these words."""
    wrong = [row for row in found.rows if not row.ok]
    assert {c for row in wrong for c in row._fields if getattr(row, c) == "✗"} == {*columns}, found
    assert len(wrong) == (len(found.rows) if layers is None else layers), found
    assert all(reason in row.reason for row in wrong), found
    assert not found.ok
    with pytest.raises(RuntimeError, match="with a fault"):
        found.assert_ok()


# The smallest fault that a column must notice, and the nearest thing that it must excuse: a change
# of `mlp(f32)` of the layers "up" and "down", the columns with "✗", and in how many layers.


def part(model: Any, layer: str, kind: str, adapter: str = "default") -> nn.Module:
    """lora_A or lora_B of a layer."""
    return getattr(getattr(model.base_model.model, layer), kind)[adapter]  # type: ignore[no-any-return]


def freeze(*which: str, zero: tuple[str, ...] = (), adapter: str = "default") -> Any:
    """Freeze matrices, "up.lora_A" for one, and write zeros to some."""

    def change(model: Any) -> None:
        for name in (*which, *zero):
            weight = part(model, *name.split("."), adapter).weight
            weight.requires_grad_(name not in which)
            weight.data.mul_(name not in zero)

    return change


def rescale(factor: float, layer: str = "up") -> Any:
    def change(model: Any) -> None:
        getattr(model.base_model.model, layer).scaling["default"] *= factor

    return change


def change_output(call: Callable[[Tensor], Tensor], name: str = "down.lora_B") -> Any:
    """The output of a matrix in the forward alone, which a merge does not see."""

    def change(model: Any) -> None:
        part(model, *name.split(".")).register_forward_hook(lambda module, args, y: call(y))

    return change


def change_gradient(call: Callable[[Tensor], Tensor], name: str) -> Any:
    """The gradient of a matrix's output."""

    def watch(y: Tensor) -> Tensor:
        if y.requires_grad:
            y.register_hook(call)
        return y

    return change_output(watch, name)


def element(value: float, name: str, alone: bool = False) -> Any:
    """One element of a matrix; alone: the others are 0."""

    def change(model: Any) -> None:
        weight = part(model, *name.split(".")).weight.data
        weight.mul_(not alone)
        weight[-1, -1] = value

    return change


def spoil_one(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(g: Tensor) -> Tensor:
        g = g.clone()
        g.view(-1)[-1] = value
        return g

    return spoil


def last_column(t: Tensor) -> Tensor:
    """1 in the last column, else 0."""
    return nn.functional.one_hot(torch.tensor(t.shape[-1] - 1), t.shape[-1])


def last_row(t: Tensor) -> Tensor:
    return last_column(t.flatten(0, -2).t()).view(*t.shape[:-1], 1)


def exchange_rows(model: Any) -> None:
    """The norm of the output stays."""
    layer = model.base_model.model.down
    forward = layer.forward
    layer.forward = lambda x: forward(x) if layer.merged else forward(x).flip(0)


def freeze_second(*which: str) -> Any:
    """Freeze matrices of a second adapter, beside the first, which trains."""

    def change(model: Any) -> None:
        two_adapters(model)
        freeze(*which, adapter="second")(model)

    return change


EVERY_A, EVERY_B = ("up.lora_A", "down.lora_A"), ("up.lora_B", "down.lora_B")
NEAREST: dict[str, tuple[Callable[[Any], None], tuple[str, ...], int]] = {
    "frozen: lora_A of every layer": (freeze(*EVERY_A), (), 0),
    "frozen: lora_B of every layer": (freeze(*EVERY_B), (), 0),
    "frozen: lora_B of every layer while 0": (freeze(*EVERY_B, zero=EVERY_B), ("gradient",), 2),
    "frozen: lora_B of every layer, 0 in one": (
        freeze(*EVERY_B, zero=EVERY_B[1:]),
        ("gradient", "effect"),
        1,
    ),
    "frozen: lora_A of one layer": (freeze("down.lora_A"), ("gradient",), 1),
    "frozen: lora_B of one layer while 0": (
        freeze("up.lora_B", zero=("up.lora_B",)),
        ("gradient", "effect"),
        1,
    ),
    "frozen: lora_A of one layer, lora_B of the other": (
        freeze("up.lora_A", "down.lora_B"),
        ("gradient",),
        2,
    ),
    "frozen: lora_A of every layer and lora_B of one": (
        freeze(*EVERY_A, "down.lora_B"),
        ("gradient",),
        1,
    ),
    "frozen: all": (freeze(*EVERY_A, *EVERY_B), ("gradient",), 2),
    "frozen: lora_A of every layer of one of two adapters": (freeze_second(*EVERY_A), (), 0),
    "frozen: lora_A of one layer of one of two adapters": (
        freeze_second("up.lora_A"),
        ("gradient",),
        1,
    ),
    "gradient: none of one matrix": (
        change_gradient(torch.zeros_like, "up.lora_A"),
        ("gradient",),
        1,
    ),
    "gradient: of one rank": (change_gradient(lambda g: g * last_column(g), "up.lora_A"), (), 0),
    "gradient: tiny": (change_gradient(lambda g: g * 1e-30, "up.lora_A"), (), 0),
    "gradient: one NaN": (change_gradient(spoil_one(torch.nan), "up.lora_A"), ("gradient",), 1),
    "gradient: one −∞": (change_gradient(spoil_one(-torch.inf), "down.lora_B"), ("gradient",), 2),
    "effect: of one element": (element(0.1, "up.lora_B", alone=True), (), 0),
    "effect: of one negative element": (element(-0.1, "up.lora_A", alone=True), (), 0),
    "effect: lora_A of one layer is 0": (
        element(0.0, "up.lora_A", alone=True),
        ("effect",),
        1,
    ),
    "effect: one element is infinite": (
        element(-torch.inf, "down.lora_B"),
        ("effect",),
        1,
    ),
    "scaling: within its digits": (rescale(1 + 5e-7), (), 0),
    "scaling: larger": (rescale(1 + 5e-6), ("scaling",), 1),
    "scaling: smaller": (rescale(1 - 5e-6), ("scaling",), 1),
    "scaling: of the other sign": (rescale(-1.0, "down"), ("scaling",), 1),
    "merge: rounding": (change_output(lambda y: y * (1 + 2e-7)), (), 0),
    "merge: a thousandth more": (change_output(lambda y: y * 1.001), ("merge",), 1),
    "merge: a thousandth less": (change_output(lambda y: y / 1.001), ("merge",), 1),
    "merge: the other sign": (change_output(torch.neg), ("merge",), 1),
    "merge: rows exchanged": (exchange_rows, ("merge",), 1),
    "merge: one column": (change_output(lambda y: y * (1 + 0.01 * last_column(y))), ("merge",), 1),
    "merge: one row": (change_output(lambda y: y * (1 + 0.01 * last_row(y))), ("merge",), 1),
}


@either
@pytest.mark.parametrize("name", NEAREST)
def test_check_notices_the_smallest_fault_and_excuses_the_nearest_thing(
    name: str, fused: bool
) -> None:
    change, columns, layers = NEAREST[name]
    model = fuse(mlp(f32)) if fused else mlp(f32)
    change(model)
    found = check(model, x)
    if columns:
        assert_faults(found, *columns, layers=layers)
    else:
        assert found.ok, found


@either
@pytest.mark.parametrize(("factor", "is_fault"), [(1 + 2.0**-11, False), (1.1, True)])
def test_check_under_tf32_excuses_its_rounding_and_notices_more(
    factor: float, is_fault: bool, fused: bool
) -> None:
    """After this setting, PyTorch refuses to read its older one of float32 GEMMs."""
    model = fuse(mlp(f32)) if fused else mlp(f32)
    change_output(lambda y: y * factor)(model)
    with torch.backends.flags(fp32_precision="tf32"):
        found = check(model, x)
    if is_fault:
        assert_faults(found, "merge", layers=1)
    else:
        assert found.ok, found


@pytest.mark.parametrize("is_old", [False, True], ids=["newest", "torch 2.8"])
@pytest.mark.parametrize(
    ("setting", "roundoff"), [("highest", 2.0**-20), ("high", 2.0**-11), ("medium", 2.0**-8)]
)
def test_roundoff_of_float32_layers_is_that_of_the_setting_of_gemms(
    setting: str, roundoff: float, is_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs, "medium" is bfloat16. torch 2.8 has no setting of a device's own."""
    before = torch.get_float32_matmul_precision()
    if is_old:
        monkeypatch.delattr(torch.backends.mkldnn.m, "matmul", raising=False)
    torch.set_float32_matmul_precision(setting)
    try:
        assert _roundoff(torch.empty(3), nn.Linear(2, 3)) == roundoff
    finally:
        torch.set_float32_matmul_precision(before)


@either
@pytest.mark.parametrize(
    "kinds", [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",)], ids=" ".join
)
def test_check_finds_experts_stacked_in_the_other_order(
    kinds: tuple[str, ...], fused: bool
) -> None:
    model = train_moe(moe())
    assert {row.experts for row in check(model, LABELLED).rows if "experts" in row.layer} == {"✓"}
    for layer in model.modules():
        if isinstance(layer, ParamWrapper) and layer.parameter_name in kinds:
            B, E = layer.lora_B["default"].weight, layer.num_experts
            B.data = B.data.view(B.shape[0], -1, E).transpose(1, 2).reshape(B.shape)
    found = check(fuse(model) if fused else model, LABELLED)
    assert_faults(found, "experts", layers=2 * len(kinds), reason="PEFT reads it rank by rank")
    verdicts = [row.experts for row in found.rows if "experts" in row.layer]
    assert verdicts.count("✓") == 4 - 2 * len(kinds)  # each kind for itself


def test_check_cannot_tell_the_order_of_random_experts() -> None:
    model = moe()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    assert {row.experts for row in check(model, LABELLED).rows} == {"–"}


def test_check_finds_a_forward_that_reads_experts_in_another_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def transposed(wrapper: Any, name: str) -> Any:
        A, B, E = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts
        lora_B = B.view(B.shape[0], E, -1).transpose(0, 1)
        scaling = wrapper.scaling[name]
        return experts.ExpertsAdapter(A.view(E, -1, A.shape[1]), lora_B, scaling)

    model = fuse(train_moe(moe()))
    monkeypatch.setattr(experts, "_factors", transposed)
    assert_faults(check(model, LABELLED), "merge", layers=4, reason="merged, it is off by")
    assert check(unfuse(model), LABELLED).ok


@either
def test_check_finds_an_adapter_without_effect(fused: bool) -> None:
    model = mlp(f32)
    model.base_model.model.up.lora_B["default"].weight.data.zero_()
    found = check(fuse(model) if fused else model, x)
    assert_faults(found, "effect", layers=1, reason="lora_B is 0")


def test_check_finds_a_forward_that_ignores_the_adapter() -> None:
    model = mlp(f32)
    layer = model.base_model.model.down
    layer.forward = layer.base_layer.forward
    found = check(model, x)
    assert_faults(found, "effect", "gradient", layers=1, reason="the adapter has no effect")


def test_check_finds_a_module_that_the_batch_does_not_reach() -> None:
    model = mlp(f32)
    model.base_model.model.add_module("other", nn.Linear(3, 3))
    model.delete_adapter("default")
    model = get_peft_model(model.base_model.model, LoraConfig(target_modules=["up", "other"]))
    found = check(model, x)
    assert_faults(found, "gradient", layers=1, reason="the batch does not reach it")


def test_check_finds_disabled_adapters() -> None:
    model = mlp(f32)
    model.base_model.disable_adapter_layers()
    found = check(model, x)
    assert_faults(found, "gradient", "effect", reason="the adapters are disabled")
    assert found.problems == ["the active adapters do not change the model's output"]


@either
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_check_finds_a_matrix_that_is_frozen_by_mistake(part: str, fused: bool) -> None:
    model = mlp(f32)
    getattr(model.base_model.model.up, part)["default"].weight.requires_grad_(False)
    found = check(fuse(model) if fused else model, x)
    assert_faults(found, "gradient", layers=1, reason=f"{part} is frozen")


def test_check_finds_a_model_that_was_frozen_after_the_adapter_was_added() -> None:
    """`prepare_model_for_kbit_training` does so if it is called too late."""
    model = mlp(f32).requires_grad_(False)
    assert_faults(check(model, x), "gradient", reason="lora_A is frozen; lora_B is frozen")


def test_check_accepts_lora_fa_and_says_what_is_frozen() -> None:
    model = mlp(f32)
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    found = check(model, x)
    assert found.ok and {row.reason for row in found.rows} == {"lora_A is frozen in every layer"}


class FbgemmFp8Linear(nn.Linear):
    """A layer for inference, whose result has no graph."""

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


@either
def test_check_finds_a_base_that_passes_no_gradient_on(fused: bool) -> None:
    """PEFT leaves out its part of the gradients before it in silence; a fused layer raises."""
    model = add_lora(MLP())
    for name in ("up", "down"):  # nothing before up needs a gradient
        getattr(model.base_model.model, name).base_layer.__class__ = FbgemmFp8Linear
    found = check(fuse(model) if fused else model, batch(f32))
    up, down = found.rows
    assert up.ok and "merge" not in up.reason, str(found)
    assert down.gradient == "✗" and down.reason.startswith("its base FbgemmFp8Linear passes no ")
    assert [down.effect, down.scaling, down.merge, down.file] == ["✓"] * 4
    assert not any(m._forward_hooks for m in model.modules())


def test_check_finds_a_gradient_that_is_not_finite() -> None:
    model = mlp(f32)
    model.base_model.model.down.base_layer.weight.data[0, 0] = torch.nan
    found = check(model, x)
    assert "the gradient of lora_B is not finite" in found.rows[0].reason
    assert not found.ok


@either
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_check_names_the_one_matrix_with_nan(part: str, fused: bool) -> None:
    """The other layers, whose outputs and gradients it would make NaN, are checked without it."""
    model = mlp(f32)
    getattr(model.base_model.model.up, part)["default"].weight.data[0, 0] = torch.nan
    found = check(fuse(model) if fused else model, x)
    assert_faults(found, "effect", layers=1, reason=f"{part} is not finite")


@either
def test_check_finds_a_scaling_that_was_applied_twice(fused: bool) -> None:
    model = mlp(f32)
    layer = model.base_model.model.up
    layer.scaling["default"] *= layer.scaling["default"]
    found = check(fuse(model) if fused else model, x)
    assert_faults(found, "scaling", layers=1, reason="scaling 1.96, the configuration says 1.4")


@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["large", "small"])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=["fp32", "bf16"])
def test_check_finds_a_forward_that_scales_twice(dtype: torch.dtype, size: float) -> None:
    """Also if the adapter's part of the output is smaller than the merge's rounding."""
    model = mlp(dtype)
    layer = model.base_model.model.up
    layer.lora_B["default"].weight.data *= size
    assert check(model, x.to(dtype)).ok
    layer.lora_B["default"].register_forward_hook(lambda module, args, y: 1.4 * y)
    found = check(model, x.to(dtype))
    assert_faults(found, "merge", layers=1, reason="merged, it is off by")


@either
def test_check_finds_a_merge_that_scales_twice(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fuse(mlp(f32)) if fused else mlp(f32)
    kind = FusedLinear if fused else peft.tuners.lora.Linear
    delta = kind.get_delta_weight
    monkeypatch.setattr(kind, "get_delta_weight", lambda self, name: 1.4 * delta(self, name))
    assert_faults(check(model, x), "merge")


def test_check_finds_keys_that_saving_drops() -> None:
    model = mlp(f32)
    down = model.base_model.model.down

    def drop(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
        del state[f"{prefix}lora_B.default.weight"]

    down.register_state_dict_post_hook(drop)
    found = check(model, x)
    assert_faults(found, "file", layers=1, reason="lora_B.default.weight is not in the file")


def an_ulp_off(t: Tensor) -> Tensor:
    """Its last element; that of the other sign for a zero."""
    t = t.clone()
    t.view(torch.int32 if t.dtype is f32 else torch.int16).view(-1)[-1] ^= 1
    return t


def first_nan(t: Tensor) -> Tensor:
    return torch.where(torch.arange(t.numel()).view_as(t) > 0, t, torch.nan)


KEY = "base_model.model.up.lora_A.weight"
FILES: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], str]] = {
    "dropped": (lambda t: {}, "is not in the file"),
    "renamed": (lambda t: {KEY.replace("up", "upp"): t}, "is not in the file"),
    "of the other sign": (lambda t: {KEY: -t}, "loads to other values"),
    "an ulp off": (lambda t: {KEY: an_ulp_off(t)}, "loads to other values"),
    "one NaN": (lambda t: {KEY: first_nan(t)}, "loads to other values"),
    "rounded": (lambda t: {KEY: t.to(bf16)}, "loads to other values"),
    "wider": (lambda t: {KEY: t.double()}, ""),
    "as the last": (lambda t: {KEY: t}, ""),
}


@pytest.mark.parametrize("name", FILES)
def test_check_finds_a_file_that_is_not_the_model_s(name: str, tmp_path: Path) -> None:
    model = mlp(f32)
    model.save_pretrained(tmp_path)
    assert check(model, x, saved=tmp_path).ok
    state = load_file(tmp_path / ADAPTER)
    change, reason = FILES[name]
    state |= change(state.pop(KEY))
    save_file(state, tmp_path / ADAPTER)
    found = check(model, x, saved=tmp_path)
    if not reason:
        assert found.ok, found
        return
    assert_faults(found, "file", layers=1, reason=f"lora_A.default.weight {reason}")
    extra = ["default: the model has no parameter for 1 keys of the file: "]
    assert [text[: len(extra[0])] for text in found.problems] == extra * (name == "renamed")


def test_check_of_a_damaged_file_says_what_loading_raises(tmp_path: Path) -> None:
    model = mlp(f32)
    model.save_pretrained(tmp_path)
    (tmp_path / ADAPTER).write_bytes(b"no tensors")
    found = check(model, x, saved=tmp_path)
    assert_faults(found, "file")
    assert found.problems[0].startswith("default: saving and loading raises ")


def test_check_finds_a_saved_adapter_that_was_never_trained(tmp_path: Path) -> None:
    model = get_peft_model(MLP(), LoraConfig(target_modules=["up", "down"]))
    model.save_pretrained(tmp_path)
    assert check(model, x).untrained
    assert_faults(check(model, x, saved=tmp_path), "effect", reason="lora_B is 0")


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("target_modules", ["up", "down", "gate"], "gate"),
        ("rank_pattern", {"gate": 3}, "gate"),
        ("alpha_pattern", {"up": 3, "gate": 3}, "gate"),
        ("modules_to_save", ["head"], "head"),
        # A name within another's.
        ("target_modules", ["up", "down", "own"], "own"),
        ("rank_pattern", {"p": 3}, "p"),
        ("alpha_pattern", {"up.": 3, "down": 3}, "up."),
    ],
)
@either
def test_check_finds_a_target_that_matches_nothing(
    option: str, value: Any, named: str, fused: bool
) -> None:
    model = mlp(f32, **{option: value})
    found = check(fuse(model) if fused else model, x)
    assert found.problems == [f"{option}: {named!r} matches nothing"] and not found.ok
    assert all(row.ok for row in found.rows)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ".*(up|own)"},
        {"target_modules": ["up", "down"], "rank_pattern": {"u.": 3, "^down$": 2}},
        {"modules_to_save": ["own"], "target_modules": ["up"]},  # PEFT takes the end of a name
        {"modules_to_save": ["score"], "task_type": "SEQ_CLS"},
    ],
    ids=str,
)
def test_check_of_patterns_that_match_finds_no_fault(config: dict[str, Any]) -> None:
    if "task_type" not in config:
        model = mlp(f32, **config)
    else:
        model = mlp(f32)
        for name, value in config.items():
            setattr(model.peft_config["default"], name, value)
    assert not check(model, x).problems


@pytest.mark.parametrize("named", ["mlp.experts.up_proj", "up_proj"])
def test_check_finds_an_experts_target_that_matches_nothing(named: str) -> None:
    """PEFT takes whole words: up_proj is not gate_up_proj, which has an adapter."""
    both = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    found = check(moe(target_parameters=[*both, named]), LABELLED)
    assert found.problems == [f"target_parameters: {named!r} matches nothing"]


# Arguments


def test_check_refuses_what_it_cannot_check(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model: got Linear, want a peft\.PeftModel"):
        check(nn.Linear(2, 2), x)
    ia3 = get_peft_model(MLP(), peft.IA3Config(target_modules=["up"], feedforward_modules=["up"]))
    with pytest.raises(ValueError, match="a PEFT model of IA3 without LoRA layers"):
        check(ia3, x)
    with pytest.raises(ValueError, match="saved: got one folder for the active adapters"):
        check(two_adapters(mlp(f32)), x, saved=tmp_path)
    merged = mlp(f32)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="an adapter is merged"):
        check(merged, x)


# Nothing changes


def state_of(model: Any, versions: bool = True) -> dict[str, Any]:
    """Everything that `check` promises to leave, with the objects themselves.

    versions: whether version counters are included. PEFT's forward of experts moves them.
    """
    found: dict[str, Any] = {
        "random": (torch.get_rng_state().tolist(), random.getstate()),
        "names": [name for name, _ in model.named_parameters()],
        "configs": {name: copy.deepcopy(vars(c)) for name, c in model.peft_config.items()},
    }
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if p.grad is None else (id(p.grad), p.grad.tolist())
        bits = p.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        hooks = len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ())
        version = p._version if versions else None
        found[name] = (id(p), p.data_ptr(), bits, p.requires_grad, grad, version, hooks)
    for name, module in model.named_modules():
        layer = vars(module)
        active = layer.get("_active_adapter"), layer.get("merged_adapters")
        settings = [
            dict(value) if type(value) is dict else value
            for value in map(layer.get, ("scaling", "r", "_disable_adapters"))
        ]
        hooks = [len(layer[key]) for key in layer if key.endswith("_hooks")]
        keys = [*layer, *module._parameters, *module._modules]
        found[f"module {name}"] = (type(module), module.training, active, settings, hooks, keys)
    return copy.deepcopy(found)


def awkward(model: Any) -> Any:
    """The model in the middle of a training, with modes of its own and hooks that would write."""
    for module in list(model.modules())[::3]:
        module.training = not module.training
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
            p.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    return model


def nothing(model: Any) -> None:
    pass


def failing_call(model: Any) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    model.get_base_model().register_forward_hook(fail)


def failing_merged(model: Any) -> None:
    layer = [module for module in model.modules() if isinstance(module, LoraLayer)][-1]
    forward = layer.forward

    def fail(*args: Any) -> Any:
        if layer.merged:
            raise ZeroDivisionError
        return forward(*args)

    layer.forward = fail


def failing_backward(model: Any) -> None:
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            raise ZeroDivisionError

    model.get_base_model().register_forward_hook(
        lambda module, args, y: Fail.apply(y if isinstance(y, Tensor) else y.logits)
    )


@either
@pytest.mark.parametrize("fault", [nothing, failing_call, failing_backward, failing_merged])
@pytest.mark.parametrize(
    "name", ["linear", "untrained", "two active", "dora", "adalora", "batch norm", "head saved"]
)
def test_check_leaves_the_model_as_it_was(
    name: str, fault: Callable[[Any], None], fused: bool
) -> None:
    build, inputs = SOUND[name]
    model = awkward(fuse(build()) if fused else build())
    fault(model)
    before = state_of(model)
    if fault is nothing:
        assert check(model, inputs).rows
    else:
        with pytest.raises(ZeroDivisionError):
            check(model, inputs)
    assert state_of(model) == before


def test_check_leaves_numpy_s_generator_to_a_model_that_draws_from_it() -> None:
    """SpecAugment masks so."""

    class Masks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * int(np.random.randint(1, 3))

    model = get_peft_model(nn.Sequential(Masks(8, 8)), LoraConfig(target_modules=["0"]))
    np.random.seed(0)
    want = np.random.randint(1 << 30, size=3)
    np.random.seed(0)
    check(model, torch.randn(4, 8))
    assert np.array_equal(np.random.randint(1 << 30, size=3), want)


@either
def test_check_leaves_experts_and_inactive_adapters_as_they_were(fused: bool) -> None:
    model = moe(r=3)
    add_adapter(model)
    activate(model, "second")
    before = state_of(awkward(fuse(model) if fused else model), versions=fused)
    assert check(model, LABELLED).rows
    assert state_of(model, versions=fused) == before


def test_check_leaves_a_saved_forward_and_a_faulty_file_without_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT writes into the model while it loads a file that is not this model's."""
    model = lm(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / ADAPTER)
    assert any("embed_tokens.base_layer" in key or "lm_head" in key for key in state)
    save_file({key: t + 1 for key, t in state.items()}, tmp_path / ADAPTER)
    before = state_of(model)
    assert not check(model, LABELLED, saved=tmp_path).ok
    assert state_of(model) == before


def test_check_leaves_the_gradients_of_a_training_as_they_would_have_been() -> None:
    model, twin = fuse(lm(lora_dropout=0.1)), fuse(lm(lora_dropout=0.1))
    for each, checked in ((model, True), (twin, False)):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            if checked:
                check(each, LABELLED)
            optimizer.zero_grad()
            each(**LABELLED).loss.backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
