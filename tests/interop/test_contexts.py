"""Contexts where PEFT's forward runs: transforms, forward-mode AD, tracing, replaced classes.

The fused model's results there are PEFT's bits, `explain` gives the reason, and afterwards the ops
run again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lora_kernels
from lora_kernels.layers import LoRALinear
from lora_kernels.peft import explain, fuse, zero3
from lora_kernels.peft.explain_rows import ADAPTER, PEFT, TORCH
from tests.support.assertions import assert_bitwise_equal, assert_close_derived
from tests.support.peft_models import (
    IDS,
    adalora_mlp,
    add_lora,
    batch,
    conv1d_mlp,
    count_ops,
    dora_mlp,
    f32,
    llama,
    loss_and_gradients,
    mlp,
    pair,
    seeded_results,
    two_adapters,
)

Call = Callable[[Any, Tensor], Any]


def gathered_layer() -> Any:
    """A layer as under ZeRO-3; no DeepSpeed is needed here."""
    layer = nn.Sequential(nn.Linear(4, 4, bias=False))
    weight: Any = layer[0].weight
    weight.ds_id = 0
    layer.forward = lambda x: x @ layer[0].weight.t()  # type: ignore[method-assign]
    layer._external_params = {id(weight): weight}  # type: ignore[assignment]
    zero3.gather_in_call([layer])
    return layer


def test_gathered_layer_whose_forward_raises_leaves_nothing_behind() -> None:
    layer = gathered_layer()
    with pytest.raises(RuntimeError):
        layer(torch.ones(2, 5))
    assert not zero3.is_gathered(layer[0])
    assert _top_saved_tensors_default_hooks(True) is None


def test_layer_that_is_gathered_no_more_has_only_the_parameters_that_others_registered() -> None:
    layer = gathered_layer()
    other = nn.Parameter(torch.ones(1))
    layer._external_params[id(other)] = other
    zero3.stop_gathering(layer)
    assert layer._external_params == {id(other): other}
    assert not zero3.is_gathered_in_call(layer)
    assert not (layer._forward_hooks or layer._forward_hooks_always_called)


def test_x_that_changes_before_the_backward_of_a_gathered_layer_raises() -> None:
    """Under ZeRO-3 a layer saves what makes its parameters again."""
    layer = gathered_layer()
    weight, x = layer[0].weight, torch.ones(2, 4)
    layer(x).sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 4), 2.0))
    y = layer(x)
    x.mul_(100.0)
    with pytest.raises(RuntimeError, match="modified in place: got version 1, want 0"):
        y.sum().backward()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
    y: Tensor = functional_call(model, values, (x,))
    return y.square().mean()


def per_sample(model: nn.Module, x: Tensor) -> Any:
    one = grad(functools.partial(loss_of, model))
    return vmap(one, in_dims=(None, 0))(parameters(model), x)


def ensemble(model: nn.Module, x: Tensor) -> Any:
    values, buffers = stack_module_state([model, copy.deepcopy(model)])
    call = functools.partial(functional_call, model)
    return vmap(lambda p, b: call((p, b), (x,)))(values, buffers)


def forward_mode(model: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS: dict[str, Call] = {
    "vmap": lambda model, x: vmap(model)(x),
    "grad": lambda model, x: grad(lambda x: model(x).square().mean())(x),
    "jvp": lambda model, x: jvp(model, (x,), (torch.ones_like(x),)),
    "jacrev": lambda model, x: jacrev(model)(x[0, 0]),
    "per-sample gradients": per_sample,
    "ensemble": ensemble,
    "forward-mode AD": forward_mode,
}
MODELS = {"lora": mlp, "two": lambda dtype: two_adapters(mlp(dtype)), "dora": dora_mlp}
MODELS |= {"adalora": adalora_mlp}


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_fused_model_in_a_transform_equals_peft(name: str, kind: str, no_grad: bool) -> None:
    stock, fused = pair(MODELS[kind](f32).eval())
    x, call = batch(f32), TRANSFORMS[name]
    with torch.no_grad():
        before = [fused(x[:1, 0]) for _ in range(3)][-1]  # by a call that is prepared
    with torch.no_grad() if no_grad else contextlib.nullcontext():
        assert_bitwise_equal(call(fused, x), call(stock, x))
    with torch.no_grad():
        assert_bitwise_equal(fused(x[:1, 0]), before)
        assert count_ops(lambda: fused(x)).get("lora_linear") == 2


def test_explain_in_a_transform_says_so() -> None:
    model, seen = fuse(mlp(f32)), []

    def forward(x: Tensor) -> Tensor:
        seen.append(explain(model).rows[0])
        y: Tensor = model(x)
        return y

    vmap(forward)(batch(f32))
    with forward_ad.dual_level():
        forward(batch(f32))
    reasons = ["a transform of torch.func is active", "forward-mode AD is active"]
    assert [(row.state, row.reason) for row in seen] == [(PEFT, reason) for reason in reasons]


def test_language_model_with_a_fused_loss_in_a_transform_equals_peft() -> None:
    stock = add_lora(llama(f32), target_modules="all-linear").train()
    fused = fuse(copy.deepcopy(stock), loss=True)

    def gradients(model: Any) -> Any:
        def loss(values: dict[str, Tensor], ids: Tensor) -> Tensor:
            kwargs = {"input_ids": ids, "labels": ids, "use_cache": False}
            found: Tensor = functional_call(model, values, (), kwargs).loss
            return found

        return grad(loss)(parameters(model), IDS)

    assert_bitwise_equal(gradients(fused), gradients(stock))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, W, A, B: lora_kernels.lora_linear(x, W, A, B),
        lambda x, W, A, B: lora_kernels.multi_lora_linear(x, W, [A], [B], torch.zeros(4).int()),
        lambda x, W, A, B: lora_kernels.lora_linear_cross_entropy(x, W, A, B, torch.arange(4)),
        lambda x, W, A, B: lora_kernels.lora_experts_linear(
            x, W[None], A[None], B[None], torch.tensor([4])
        ),
        lambda x, W, A, B: LoRALinear(8, 6, r=3)(x),
    ],
)
def test_function_in_a_transform_raises_the_remedy(call: Any) -> None:
    W, A, B = torch.randn(6, 8), torch.randn(3, 8), torch.randn(6, 3)
    with pytest.raises(RuntimeError, match=r"a transform of torch.func is active.*Take the plain"):
        grad(lambda x: call(x, W, A, B).sum())(torch.randn(4, 8))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode AD is active"):
        call(torch.randn(4, 8), W, A, B)


@pytest.mark.parametrize("no_grad", [False, True])
def test_fused_model_in_torchscript_equals_peft(no_grad: bool) -> None:
    """Saved and loaded."""
    stock, fused = pair(mlp(f32).eval())
    x = batch(f32)
    with torch.no_grad() if no_grad else contextlib.nullcontext():
        fused(x), fused(x)
        traced = torch.jit.trace(fused, (x,))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        assert_bitwise_equal(torch.jit.load(file)(x), stock(x))
    assert count_ops(lambda: fused(x)).get("lora_linear") == 2


def test_fused_model_in_a_graph_for_onnx_is_peft_s() -> None:
    """`torch.onnx.export(dynamo=False)` makes its graph by this function."""
    stock, fused = pair(mlp(f32).eval())
    graphs = [torch.jit._get_trace_graph(each, (batch(f32),))[0] for each in (stock, fused)]
    kinds = [[node.kind() for node in graph.nodes()] for graph in graphs]
    assert kinds[0] == kinds[1] and not any("Python" in kind for kind in kinds[1])


# Classes whose forward is replaced


@contextlib.contextmanager
def replaced(cls: Any) -> Iterator[None]:
    """Double what the class's forward returns; the new function has the old one's names."""
    own = cls.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return 2 * own(*args, **kwargs)

    cls.forward = forward
    try:
        yield
    finally:
        cls.forward = own


def trained_mlp(**config: Any) -> Any:
    return mlp(f32, lora_dropout=0.3, **config).train()


CLASSES = {
    "PEFT's layer": (lora.Linear, trained_mlp),
    "nn.Linear": (nn.Linear, trained_mlp),
    "nn.Dropout": (nn.Dropout, trained_mlp),
    "Conv1D": (Conv1D, lambda: conv1d_mlp(f32)),
    "the magnitude": (DoraLinearLayer, lambda: dora_mlp(f32)),
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_class_with_a_replaced_forward_is_called(name: str, before: bool) -> None:
    cls, build = CLASSES[name]
    x = batch(f32)
    stock, fused = pair(build())
    if before:
        fused = copy.deepcopy(stock)
    with torch.no_grad():
        fused(x[0, :1]), fused(x[0, :1])  # by a call that is prepared
        plain = stock(x[0, :1])
    with replaced(cls):
        fuse(fused)
        assert_close_derived(seeded_results(fused, x), seeded_results(stock, x))
        for model in (stock, fused):
            model.eval()
        with torch.no_grad():
            want = stock(x[0, :1])
            assert_close_derived(fused(x[0, :1]), want)
        assert not torch.allclose(want, plain)
        row = explain(fused).rows[0]
        assert "replaced" in row.reason or "no plain module" in row.reason, row
        assert row.state in (PEFT, ADAPTER)


@pytest.mark.parametrize("before", [True, False])
def test_language_model_class_with_a_replaced_forward_is_called(before: bool) -> None:
    """A z-loss that a class is given, before `fuse` or after."""
    own = LlamaForCausalLM.forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = own(self, *args, **kwargs)
        found.loss = found.loss + found.logits.logsumexp(-1).square().mean()
        return found

    stock = add_lora(llama(f32), target_modules="all-linear").train()
    fused = copy.deepcopy(stock)
    if not before:
        loss_and_gradients(fuse(fused, loss=True))
    LlamaForCausalLM.forward = forward  # type: ignore[method-assign]
    try:
        got, want = (loss_and_gradients(m) for m in (fuse(fused, loss=True), stock))
        (row,) = explain(fused).losses
    finally:
        LlamaForCausalLM.forward = own  # type: ignore[method-assign]
    # Float32 sums in two orders, through two layers.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (row.state, row.reason) == (TORCH, "LlamaForCausalLM.forward was replaced")
