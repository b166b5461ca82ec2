"""Each operand of a record on each code path: PEFT's loss and gradients.

The path computes them itself or, with a reason in the operand's words, leaves them to PEFT's
forward. A variant of LoRA that a later PEFT may have is one entry of `VARIANTS`, by the recipe of
CONTRIBUTING.md. It is tested here for a rank gate, a column scale, and an operand that is new.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor

from lora_kernels.backends.library import as_on_gpu
from lora_kernels.core import record as records
from lora_kernels.core.record import PLAIN, CodePath, Record, operands_of, path_reason
from lora_kernels.layers import LoRALinear
from lora_kernels.ops import blocks
from lora_kernels.ops import direct as ops_direct
from lora_kernels.peft import direct, embedding, explain, fuse, head, read, row_adapters
from lora_kernels.peft.explain_rows import LIBRARY, PEFT, SHARED
from lora_kernels.peft.read import VARIANTS, Variant
from tests.support.assertions import assert_as_exact, assert_close_derived
from tests.support.clones import replica_of
from tests.support.peft_models import (
    R,
    add_adapter,
    gpt2,
    in_float64,
    llama,
    loss_and_gradients,
    permute_weights,
    randomize,
)

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
# 90 rows of x, more than a block needs. One sequence has the invocation tokens of an aLoRA.
IDS = torch.randint(8, 61, (3, 30), generator=torch.Generator().manual_seed(2))
IDS[1, 20:22] = torch.tensor([7, 3])
NAMES = ["default", "__base__", "default"]


def adapted(base: Any = None, config: Any = LoraConfig, **settings: Any) -> Any:
    """PEFT's model, by default a Llama."""
    targets = {"target_modules": [*PROJECTIONS, "lm_head"]}
    model = get_peft_model(llama() if base is None else base, config(r=R, **targets | settings))
    randomize(model)
    return model.train()


def hot_swapped() -> Any:
    model = adapted()
    prepare_model_for_compiled_hotswap(model, target_rank=R + 1)
    return model


def adaptive() -> Any:
    model = adapted(config=AdaLoraConfig, init_r=R, target_r=2, total_step=9)
    for layer in lora_layers(model):
        layer.ranknum.requires_grad_(False)  # a sum that cancels
    return model


def two_adapters(dropout: float = 0.0) -> Any:
    model = adapted(lora_dropout=dropout)
    add_adapter(model, lora_alpha=3)
    model.base_model.set_adapter(["default", "second"])
    return model


def called_bases() -> Any:
    model = adapted()
    for layer in lora_layers(model):
        layer.base_layer.register_forward_hook(lambda module, args, y: None)
    return model


def with_kasa() -> Any:
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "KasaConfig"):
        pytest.skip("PEFT is older than 0.21, without KaSA")
    return adapted(kasa_config=peft.KasaConfig())


def lora_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


class State(NamedTuple):
    """A state of a model's layers, and which code paths take it.

    Args:
        build: PEFT's model.
        words: the operand in a refusal.
        layer: whether a fused layer's own call takes it.
        block: q, k and v, and the gated MLP, on a GPU.
        loss: the loss without logits.
        rows: calls whose rows name their adapters.
    """

    build: Callable[[], Any]
    words: str = ""
    layer: bool = True
    block: bool = True
    loss: bool = True
    rows: bool = True


# Dropout of probability 1 draws nothing, so that both compute the same.
STATES = {
    "plain": State(adapted),
    "dropout": State(lambda: adapted(lora_dropout=1.0), "active dropout", block=False),
    "lora_bias": State(lambda: adapted(lora_bias=True), "lora_bias", rows=False),
    "scaling": State(hot_swapped, "scaling in a tensor", rows=False),
    "KaSA": State(with_kasa, "rank gate", rows=False),
    "AdaLoRA": State(adaptive, "no fused LoRA layer", block=False),
    "DoRA": State(
        lambda: adapted(use_dora=True), "column scale", block=False, loss=False, rows=False
    ),
    "DoRA with dropout": State(
        lambda: adapted(use_dora=True, lora_dropout=1.0),
        "column scale",
        block=False,
        loss=False,
        rows=False,
    ),
    "aLoRA": State(
        lambda: adapted(alora_invocation_tokens=[7, 3]), "row index", block=False, loss=False
    ),
    "two adapters": State(two_adapters, "other active adapters", block=False),
    "two with dropout": State(lambda: two_adapters(1.0), "dropout", block=False, loss=False),
    "called bases": State(called_bases, "called as a module", block=False, loss=False),
    "Conv1D": State(
        lambda: adapted(gpt2(**NO_DROPOUT), target_modules=GPT2, fan_in_fan_out=True),
        "[K, N]",
        block=False,
    ),
}


def outcome(model: Any, names: list[str] | None) -> Any:
    """The loss and gradients, or the class of the error."""
    with row_adapters(model, names) if names else contextlib.nullcontext():
        try:
            return loss_and_gradients(model, IDS)
        except (ValueError, TypeError) as error:
            return type(error)


def assert_same(fused: Any, stock: Any, names: list[str] | None = None) -> None:
    got, want = outcome(fused, names), outcome(stock, names)
    if isinstance(want, dict):
        assert_close_derived(got, want)
    else:
        assert got is want


def assert_loss(stock: Any, state: State) -> None:
    """The loss without logits is as exact as PEFT's in float32; or `explain` says why it is not
    computed. Pooled over four draws of the weights."""
    stock = stock.float()
    fused, exact = fuse(copy.deepcopy(stock), loss=True), in_float64(stock)
    models, found = (fused, exact, stock), [list[Any](), list[Any](), list[Any]()]
    for seed in range(4):
        permute_weights(models, torch.Generator().manual_seed(seed))
        for results, model in zip(found, models, strict=True):
            results.append(loss_and_gradients(model, IDS))
    assert_as_exact(*found)
    (row,) = explain(fused).losses
    assert (row.strategy != "F.cross_entropy") is state.loss, row
    assert state.loss or state.words in row.reason or "not covered" in row.reason


def assert_paths(fused: Any, state: State, on_gpu: bool) -> None:
    """`explain` says which code paths take the state, and why the others do not."""
    found = explain(fused)
    for row in found.rows:
        assert (row.state != PEFT) is state.layer, row
        assert state.layer or state.words in row.reason
    for row in found.blocks if on_gpu else ():
        is_block = row.state in (SHARED, LIBRARY)
        assert is_block is state.block, row
        assert is_block or state.words in row.reason, row


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", STATES)
def test_each_operand_on_each_path_is_pefts_result(name: str, on_gpu: bool) -> None:
    state = STATES[name]
    stock = state.build()
    fused = fuse(copy.deepcopy(stock))  # on a GPU some are left to PEFT, by their bytes
    with as_on_gpu() if on_gpu else contextlib.nullcontext():
        assert_same(fused, stock)
        assert_paths(fused, state, on_gpu)
        assert_loss(stock, state)


@pytest.mark.parametrize("name", [name for name in STATES if name != "AdaLoRA"])
def test_each_operand_of_rows_that_name_adapters_is_pefts_result(name: str) -> None:
    state = STATES[name]
    stock = state.build()
    fused = fuse(copy.deepcopy(stock))
    names = [*NAMES[:2], "second" if name.startswith("two") else "default"]
    assert_same(fused, stock, names)
    if not isinstance(outcome(stock, names), dict):
        return  # PEFT raises
    for row in explain(fused).rows:
        assert (row.state != PEFT) is state.rows, row
        assert state.rows or state.words in row.reason


# A variant that PEFT may add


class Scaled(DoraLinearVariant):
    """y = c ⊙ z + bias, with DoRA's parameter as c itself."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Any:
        bias = module.base_layer.bias
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        z = result if bias is None else result - bias
        dropped = module.lora_dropout[active_adapter](x)
        z = z + module.scaling[active_adapter] * B(A(dropped))
        y = module.lora_magnitude_vector[active_adapter].weight * z
        return y if bias is None else y + bias


class Gated(Scaled):
    """z = x·Wᵀ + s · ((x·Aᵀ) ⊙ g)·Bᵀ, with the first ranks of DoRA's parameter as g."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Any:
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        gate = module.lora_magnitude_vector[active_adapter].weight[:R]
        return result + module.scaling[active_adapter] * B(A(x) * gate)


def with_variant(variant: Any) -> Any:
    model = adapted(use_dora=True)
    for layer in lora_layers(model):
        layer.lora_variant["default"] = variant()
        layer.use_dora["default"] = False  # else PEFT refuses rows that name their adapters
    return model


def read_parameter(layer: Any, name: str, device: torch.device) -> Tensor:
    parameter: Tensor = layer.lora_magnitude_vector[name].weight
    return parameter


def read_gate(layer: Any, name: str, device: torch.device) -> Tensor:
    return read_parameter(layer, name, device)[:R]


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    ("cls", "variant", "state"),
    [
        (
            Scaled,
            Variant("a Scaled", "column_scale", read_parameter),
            State(adapted, "is a Scaled, whose column scale", block=False, loss=False, rows=False),
        ),
        (
            Gated,
            Variant("a Gated", "rank_gate", read_gate),
            State(adapted, "is a Gated, whose rank gate", rows=False),
        ),
        (
            Scaled,
            Variant("a Scaled", "phase", read_parameter),
            State(adapted, "is a Scaled, whose phase", False, False, False, False),
        ),
        (
            Scaled,
            None,
            State(adapted, "(Scaled), whose formula", False, False, False, False),
        ),
    ],
    ids=["column scale", "gate", "new operand", "unknown"],
)
def test_variant_is_computed_by_the_paths_that_take_its_operand(
    cls: Any, variant: Any, state: State, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variant is not None:
        monkeypatch.setitem(VARIANTS, cls, variant)
    add_operand(monkeypatch)
    stock = with_variant(cls)
    with as_on_gpu() if on_gpu else contextlib.nullcontext():
        fused = fuse(copy.deepcopy(stock))
        assert_same(fused, stock)
        assert_paths(fused, state, on_gpu)
        assert_same(fused, stock, NAMES)
        for row in explain(fused).rows:
            assert (row.state != PEFT) is state.rows
            assert state.words in row.reason
        assert_loss(stock, state)


# The record


def add_operand(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the reader's records one more operand, `phase`."""
    fields: Any = [(name, Any) for name in (*Record._fields, "phase")]
    extended: Any = NamedTuple("Record", fields)
    extended.__new__.__defaults__ = (*Record.__new__.__defaults__, None)
    monkeypatch.setattr(read, "Record", extended)
    return extended


PATHS = {
    f"{module.__name__.removeprefix('lora_kernels.')}.{name}": path
    for module in (read, direct, head, embedding, blocks, ops_direct)
    for name, path in vars(module).items()
    if isinstance(path, CodePath)
}


@pytest.mark.parametrize("name", PATHS)
def test_operand_that_a_record_gets_is_refused_by_every_path(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = add_operand(monkeypatch)(None, None, None, name="law", phase=torch.ones(1))
    assert operands_of(record) == ["phase"]
    want = f"adapter 'law' has a phase, which {PATHS[name].name} does not take"
    assert path_reason([record], PATHS[name]) == want
    assert path_reason([record._replace(phase=None)], PATHS[name]) is None


def test_paths_take_operands_that_records_have() -> None:
    assert len(PATHS) == 7
    known = {*Record._fields[PLAIN:], "dropout_p", "scaling", "others"}
    for path in PATHS.values():
        assert path.taken and frozenset().union(*path.taken) <= known
    assert set(records._WORDS) <= known


def test_state_of_the_fast_reader_is_the_prefix_of_a_record() -> None:
    plain = "weight", "lora_A", "lora_B", "bias", "scaling", "dropout_p"
    assert Record._fields[:PLAIN] == plain
    model = fuse(adapted(lora_dropout=0.5))
    layer = lora_layers(model)[0]
    state = direct.read(layer)
    (record,) = read.read(layer, torch.device("cpu"), torch.float64)
    assert state is not None and isinstance(record, Record)
    assert all(a is b or a == b for a, b in zip(state, record[:PLAIN], strict=True))


VECTOR = torch.ones(1)
REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"lora_bias": VECTOR, "has_row_index": True}, 1, "a row index beside a lora_bias"),
    ({"magnitude": VECTOR, "lora_bias": VECTOR}, 1, "a column scale beside a lora_bias"),
    ({"rank_gate": VECTOR, "has_row_index": True}, 1, "a row index beside a rank gate"),
    ({"magnitude": VECTOR, "called": "why"}, 1, "beside a base that is called as a module (why)"),
    ({"magnitude": VECTOR, "scaling": VECTOR}, 1, "a column scale beside a scaling in a tensor"),
    # Dropout goes with each of the two.
    ({"magnitude": VECTOR, "dropout_p": 0.5}, 2, "a column scale beside other active adapters"),
    (
        {"magnitude": VECTOR, "dropout_p": 0.5, "called": "why"},
        1,
        "a column scale beside a base that is called as a module (why)",
    ),
    (
        {"has_row_index": True, "dropout_p": 0.5, "lora_bias": VECTOR},
        1,
        "a row index beside a lora_bias",
    ),
]


@pytest.mark.parametrize(("operands", "count", "words"), REFUSED)
def test_operands_of_no_set_together_are_refused_by_a_layer(
    operands: Any, count: int, words: str
) -> None:
    record = Record(None, None, None, name="law")._replace(**operands)
    reason = path_reason([record] * count, read.LAYER)
    assert reason is not None and words in reason


def test_reason_blames_a_variant_for_its_own_operand_alone() -> None:
    record = Record(None, None, None, name="law", variant="a KaSA", rank_gate=VECTOR)
    reasons = [path_reason([record], read.NAMED_ROWS), path_reason([record] * 2, direct.BLOCK)]
    assert reasons == [
        "adapter 'law' is a KaSA, whose rank gate a call with adapter_names does not take",
        "adapter 'law' stands beside other active adapters, which a block does not take",
    ]


class Biased(LoRALinear):
    """A layer whose record has an operand that no layer of this package computes."""

    def record(self, weight: Any) -> Record:
        return super().record(weight)._replace(lora_bias=self.lora_B[:, 0])


@pytest.mark.parametrize("name", PATHS)
def test_reason_is_of_any_adapter(name: str) -> None:
    """A path takes the operands of each adapter, not of the first alone."""
    law = Record(None, None, None, name="law")
    code = Record(None, None, None, name="code", formula="New")
    assert path_reason([law, code], PATHS[name]) is not None
    assert path_reason([code, law], PATHS[name]) is not None


@pytest.mark.parametrize("dora_first", [True, False])
def test_dora_beside_another_adapter_is_pefts(dora_first: bool) -> None:
    stock = adapted(use_dora=dora_first)
    add_adapter(stock, use_dora=not dora_first)
    stock.base_model.set_adapter(["default", "second"])
    fused = fuse(copy.deepcopy(stock))
    assert_same(fused, stock)
    for row in explain(fused).rows:
        assert row.state == PEFT and "column scale beside other active adapters" in row.reason


def test_dropout_beside_a_scaling_in_a_tensor_is_pefts() -> None:
    """With a probability of 1 all masks are the same: only the bases' results are left."""
    stock = adapted(lora_dropout=1.0)
    prepare_model_for_compiled_hotswap(stock, target_rank=R + 1)
    assert_same(fuse(copy.deepcopy(stock)), stock)


def test_replaced_formula_of_a_variant_is_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = adapted(use_dora=True)
    fused, own = fuse(copy.deepcopy(stock)), DoraLinearVariant.forward
    doubled = staticmethod(lambda *args, **kwargs: 2 * own(*args, **kwargs))
    monkeypatch.setattr(DoraLinearVariant, "forward", doubled)
    assert_same(fused, stock)
    for row in explain(fused).rows:
        assert row.state == PEFT and "no plain module" in row.reason


def test_replaced_class_of_a_disabled_head_is_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = adapted(target_modules=["lm_head"])
    stock.get_base_model().model.norm.weight.requires_grad_(True)
    stock.base_model.disable_adapter_layers()
    fused, own = fuse(copy.deepcopy(stock), loss=True), lora.Linear.forward
    monkeypatch.setattr(lora.Linear, "forward", lambda *args, **kwargs: 2 * own(*args, **kwargs))
    assert_same(fused, stock)
    (row,) = explain(fused).losses
    assert "Linear.forward was replaced" in row.reason


@pytest.mark.parametrize("call", [lambda layer: layer(torch.ones(2, 8)), LoRALinear.merge])
def test_record_with_an_operand_that_a_layer_does_not_take_raises(call: Any) -> None:
    with pytest.raises(ValueError, match="has a lora_bias, which LoRALayer does not take"):
        call(Biased(8, 8))


def test_replica_of_an_adalora_is_pefts() -> None:
    """A replica of DataParallel holds its tensors as attributes, and no parameters."""
    layer = next(layer for layer in lora_layers(fuse(adaptive())))
    found = read.read(replica_of(layer), torch.device("cpu"), torch.float64)
    assert found == read.NO_ADAPTER
