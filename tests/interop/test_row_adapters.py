"""`row_adapters`: each row of a training batch has an adapter of its own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import logging
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from lora_kernels.peft import explain, fuse, row_adapters
from tests.support.assertions import assert_close_derived
from tests.support.peft_models import (
    adalora_mlp,
    batch,
    count_ops,
    llama,
    mlp,
    pair,
    randomize,
)

IDS = torch.randint(61, (4, 9), generator=torch.Generator().manual_seed(6))
NAMES = ["law", "code", "__base__", "law"]


def tenants(dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """A language model with two adapters that both train."""
    settings = {"r": 5, "lora_alpha": 7, "target_modules": "all-linear"} | config
    model = get_peft_model(llama(dtype), LoraConfig(**settings), adapter_name="law")
    model.add_adapter("code", LoraConfig(**settings | {"r": 3, "lora_alpha": 4}))
    for i, name in enumerate(("law", "code")):
        randomize(model, name, 1 + i)
    model.set_requires_grad(["law", "code"])
    return model.train()


def rows_loss(model: Any, ids: Tensor) -> Tensor:
    """A loss that is a sum over rows, so that a row's part does not depend on the others."""
    logits = model(input_ids=ids, use_cache=False).logits
    weights = ((torch.arange(logits[0].numel()) % 7 - 3) / 4).view(logits[0].shape)
    return (logits * weights.to(logits.dtype)).sum() + logits.square().sum() / 50


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def mixed_gradients(model: Any, names: Sequence[str], ids: Tensor = IDS) -> dict[str, Tensor]:
    with row_adapters(model, names):
        rows_loss(model, ids).backward()
    return gradients(model)


def gradients_alone(model: Any, names: Sequence[str], ids: Tensor = IDS) -> dict[str, Tensor]:
    """Each adapter's gradients from a batch of its own rows alone, by PEFT."""
    found = {}
    for adapter in ("law", "code"):
        rows = [i for i, name in enumerate(names) if name == adapter]
        model.set_adapter(adapter)
        if rows:
            rows_loss(model, ids[rows]).backward()
        found |= gradients(model)
    model.set_requires_grad(["law", "code"])
    return found


def assert_nonzero_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Equal, but that an adapter without rows has zeros, or None."""
    got = {name: t for name, t in got.items() if name in want or t.any()}
    assert_close_derived(got, want, layers=8)


@pytest.mark.parametrize("names", [NAMES, ["code"] * 4, ["code", "law", "code", "law"]], ids=str)
def test_each_adapter_trains_as_alone(names: list[str]) -> None:
    stock, fused = pair(tenants())
    for seed in (7, 8):  # a second step has other adapters
        for model in (stock, fused):
            randomize(model, "law", seed)
        got, want = mixed_gradients(fused, names), gradients_alone(stock, names)
        assert all(any(f".{name}." in n for n in want) for name in set(names) - {"__base__"})
        assert_nonzero_equal(got, want)
        assert_nonzero_equal(mixed_gradients(stock, names), want)  # PEFT's own layers too


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_keeps_the_adapters(reentrant: bool, within: bool) -> None:
    """With backward in the context, after it, and in the context of other rows."""
    stock, fused = pair(tenants())
    fused.enable_input_require_grads()
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    want = gradients_alone(stock, NAMES)
    if within:
        assert_nonzero_equal(mixed_gradients(fused, NAMES), want)
        return
    with row_adapters(fused, NAMES):
        loss = rows_loss(fused, IDS)
    loss.backward()
    assert_nonzero_equal(gradients(fused), want)
    with row_adapters(fused, NAMES):
        loss = rows_loss(fused, IDS)
    with row_adapters(fused, ["code"] * 4):
        loss.backward()
    assert_nonzero_equal(gradients(fused), want)


def test_accumulated_batches_add_up() -> None:
    stock, fused = pair(tenants())
    other = ["code", "__base__", "law", "code"]
    for names in (NAMES, other):
        with row_adapters(fused, names):
            rows_loss(fused, IDS).backward()
    want = [gradients_alone(stock, names) for names in (NAMES, other)]
    assert_close_derived(gradients(fused), {n: want[0][n] + want[1][n] for n in want[0]}, layers=8)


def test_one_op_a_layer_and_explained() -> None:
    model = fuse(tenants(torch.float32))
    with row_adapters(model, NAMES):
        ops = count_ops(lambda: model(input_ids=IDS, use_cache=False))
        layers = len(explain(model).rows)
        assert ops["multi_lora_linear"] == layers and "lora_linear" not in ops
        assert all("rows name their adapters" in row.reason for row in explain(model).rows)


def test_the_context_leaves_nothing_behind() -> None:
    """After an error too."""
    stock, fused = pair(tenants())
    fused.gradient_checkpointing_enable()
    functions = [vars(m).get("_gradient_checkpointing_func") for m in fused.modules()]
    assert any(functions)
    for error in (False, True):
        try:
            with row_adapters(fused, NAMES):
                fused(input_ids=IDS, use_cache=False)
                if error:
                    raise KeyError
        except KeyError:
            pass
        assert [vars(m).get("_gradient_checkpointing_func") for m in fused.modules()] == functions
        assert not any(m._forward_pre_hooks for m in fused.modules())
    with torch.no_grad():
        assert_close_derived(fused(input_ids=IDS).logits, stock(input_ids=IDS).logits, layers=8)


def test_contexts_nest() -> None:
    stock, fused = pair(tenants().eval())
    with torch.no_grad(), row_adapters(fused, NAMES):
        with row_adapters(fused, NAMES[::-1]):
            inner = fused(input_ids=IDS).logits
        outer = fused(input_ids=IDS).logits
        want = [stock(input_ids=IDS, adapter_names=n).logits for n in (NAMES[::-1], NAMES)]
    assert_close_derived([inner, outer], want, layers=8)


def test_modules_to_save_and_embeddings_follow_their_rows() -> None:
    """Layers that stay PEFT's: a trained copy for each adapter, and LoRA on an embedding."""
    config = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "embed_tokens"]}
    model = tenants(**config)
    for i, name in enumerate(("law", "code")):
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save[name].weight += 0.1 * (i + 1)
    stock, fused = pair(model)
    names = ["law", "code", "code", "law"]  # PEFT has no copy for "__base__"
    assert_nonzero_equal(mixed_gradients(fused, names), gradients_alone(stock, names))


@pytest.mark.parametrize("head", [True, False])
def test_fused_loss_follows_its_rows(head: bool) -> None:
    """With LoRA on the head too, whose rows then have logits."""
    targets = {"target_modules": ["q_proj", *["lm_head"] * head]}
    found = []
    for loss in (False, True):
        model = fuse(tenants(torch.float32, **targets), loss=loss)
        with row_adapters(model, NAMES):
            out = model(input_ids=IDS, labels=IDS, use_cache=False)
        out.loss.backward()
        assert (out.logits is None) is (loss and not head)
        found.append(gradients(model))
    assert any(".lora_A.code." in name for name in found[0])
    assert_close_derived(*found, layers=8)


def test_a_frozen_adapter_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = fuse(tenants())
    model.set_adapter("law")
    name = f"frozen {id(model)}"  # a name of its own: a warning is logged once a process
    model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("law")
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        for _ in range(2):
            with row_adapters(model, ["law", name, "law", "law"]):
                pass
        model.set_requires_grad(["law", name])
        for parameter in (n for n in model.state_dict() if f".lora_A.{name}." in n):
            model.get_parameter(parameter).requires_grad_(False)  # LoRA-FA trains lora_B
        with row_adapters(model, ["law", name, "law", "law"]):
            pass
        model.set_adapter("law")
        with row_adapters(model.eval(), ["law", name, "law", "law"]):
            pass
    assert [r.getMessage().partition(": ")[2].partition(" is ")[0] for r in caplog.records] == [
        f"adapter {name!r}"
    ]


def merged() -> Any:
    model = tenants()
    model.merge_adapter(["law"])
    return model


@pytest.mark.parametrize(
    ("make", "names", "error", "message"),
    [
        (tenants, "law", TypeError, "names: got 'law', want a sequence of strings"),
        (tenants, ["law", 3], TypeError, r"names: got \['law', 3\], want a sequence of strings"),
        (tenants, ["la"] * 4, ValueError, "names: got 'la', want one of 'code', 'law', '__base__'"),
        (lambda: torch.nn.Linear(2, 2), ["law"], ValueError, "got Linear without LoRA layers"),
        (lambda: 3, ["law"], TypeError, "model: got int, want a torch.nn.Module"),
        (adalora_mlp, ["default"], ValueError, "model: got AdaLoRA layers"),
        (merged, NAMES, ValueError, "model: got merged adapters"),
    ],
)
def test_bad_arguments_raise_before_anything_changes(
    make: Any, names: Any, error: type[Exception], message: str
) -> None:
    model = make()
    with pytest.raises(error, match=message), row_adapters(model, names):
        raise AssertionError("entered")
    if isinstance(model, torch.nn.Module):
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_an_adapter_of_an_embedding_alone_is_known() -> None:
    model = tenants(target_modules=["embed_tokens"])
    with row_adapters(fuse(model), NAMES):
        rows_loss(model, IDS).backward()
    assert any(".lora_embedding_A.code" in name for name in gradients(model))


def test_another_number_of_rows_is_pefts_error() -> None:
    model = fuse(tenants())
    with row_adapters(model, ["law", "code"]), pytest.raises(ValueError, match="4 respectively"):
        model(input_ids=IDS)


def test_dora_is_pefts_error() -> None:
    model = fuse(mlp(use_dora=True))
    with row_adapters(model, ["default"] * 3), pytest.raises(ValueError, match="DoRA"):
        model(batch())


def test_a_copied_model_inside_the_context_is_its_own() -> None:
    """Hooks of the context are on the model that it was given."""
    model = fuse(tenants().eval())
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        other = copy.deepcopy(model)
        with row_adapters(model, ["__base__"] * 4):
            assert torch.equal(other(input_ids=IDS).logits, want)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_threads_train_with_names_of_their_own(checkpointed: bool) -> None:
    """One of them without names, by the active adapters; each with its own copy of the weights'
    gradients."""
    model = fuse(tenants())
    if checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    batches = [NAMES, NAMES[::-1], ["code"] * 4, None]

    def step(names: Any) -> dict[str, Tensor]:
        with contextlib.nullcontext() if names is None else row_adapters(model, names):
            loss = rows_loss(model, IDS)
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return {n: g for n, g in zip(trained, found, strict=True) if g is not None}

    wants = [step(names) for names in batches]
    functions = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    start = threading.Barrier(len(batches))

    def run(i: int) -> list[dict[str, Tensor]]:
        start.wait()
        return [step(batches[i]) for _ in range(10)]

    with concurrent.futures.ThreadPoolExecutor(len(batches)) as pool:
        results = list(pool.map(run, range(len(batches))))
    for want, found in zip(wants, results, strict=True):
        for got in found:
            assert_nonzero_equal(got, want)
    assert not any(m._forward_pre_hooks for m in model.base_model.model.model.layers.modules())
    assert [vars(m).get("_gradient_checkpointing_func") for m in model.modules()] == functions


def test_a_backward_in_another_thread_recomputes_the_rows_of_its_forward() -> None:
    """On a GPU a backward runs in a thread of autograd's."""
    stock, fused = pair(tenants())
    fused.enable_input_require_grads()
    fused.gradient_checkpointing_enable({"use_reentrant": False})
    with row_adapters(fused, NAMES):
        loss = rows_loss(fused, IDS)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert_nonzero_equal(gradients(fused), gradients_alone(stock, NAMES))


def test_a_replica_of_data_parallel_is_an_error() -> None:
    model = fuse(mlp())
    with row_adapters(model, ["default"] * 3), pytest.raises(RuntimeError, match="DataParallel"):
        replica = model.base_model.model.up._replicate_for_data_parallel()
        replica(batch())
