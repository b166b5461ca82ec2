"""A call that is traced, intercepted by a mode, or given a tensor subclass goes through the
dispatcher; and y is no view of another tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels
from lora_kernels.layers import LoRALinear
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case, run
from lora_kernels.oracle.experts_case import ExpertsCase
from lora_kernels.oracle.multi_case import MultiCase
from tests.support.functions import call as call_function
from tests.support.functions import every_function
from tests.support.peft_models import count_ops

FULL = {"gate": True, "column_scale": True, "bias": True}


def arguments(M: int = 5, **options: Any) -> dict[str, Any]:
    args = cases.inputs(Case(M, 33, 64, 3, **options))
    args.pop("dy")
    return args


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("quant", ["", "nf4-64"])
def test_mode_around_a_call_sees_the_op(quant: str, grad: bool) -> None:
    args = arguments(quant=quant)
    with torch.set_grad_enabled(grad):
        seen = count_ops(lambda: lora_kernels.lora_linear(**args))
    name = "lora_linear_quantized" if quant else "lora_linear"
    assert {op: n for op, n in seen.items() if op.startswith("lora_linear")} == {name: 1}


@pytest.mark.parametrize("quant", ["", "nf4-64"])
@pytest.mark.parametrize("rng", ["given", "drawn", "a mask"])
def test_gradients_of_dispatched_calls_with_dropout_are_those_of_direct_ones(
    rng: str, quant: str
) -> None:
    single = cases.inputs(Case(5, 33, 64, 3, quant=quant, dropout_p=0.25, **FULL))
    several = cases.inputs(MultiCase(9, 33, 64, rows="mixed", quant=quant, dropout_p=0.25))
    experts = cases.inputs(ExpertsCase((2, 0, 3), 32, 64, 8, quant=quant, dropout_p=0.25))
    for call, args in (
        (lora_kernels.lora_linear, single),
        (lora_kernels.multi_lora_linear, several),
        (lora_kernels.lora_experts_linear, experts),
    ):
        if rng != "given":
            args["rng"] = None
        if rng == "a mask":
            kept = torch.rand(args["x"].shape, generator=torch.Generator().manual_seed(1)) > 0.25
            args["dropout_mask"] = kept
        torch.manual_seed(0)
        direct = run(call, args)
        torch.manual_seed(0)
        with FlopCounterMode(display=False):
            dispatched = run(call, args)
        assert all(torch.equal(direct[name], dispatched[name]) for name in direct)


@pytest.mark.filterwarnings("ignore")  # which tracing is full of
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("M", [1, 40])
def test_trace_of_a_layer_holds_the_adapter(M: int, grad: bool) -> None:
    """This holds for a layer with a prepared call, too."""
    layer = LoRALinear(64, 33, r=3)
    nn.init.normal_(layer.lora_B)
    with torch.set_grad_enabled(grad):
        x = torch.randn(M, 64)
        layer(x), layer(x)
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        other = torch.randn(M, 64)
        torch.testing.assert_close(traced(other), layer(other))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("pre_dispatch", [True, False])
def test_make_fx_holds_the_adapter(pre_dispatch: bool, grad: bool) -> None:
    args = arguments(**FULL)
    x = args.pop("x").detach()
    with torch.set_grad_enabled(grad):
        traced = make_fx(lambda x: lora_kernels.lora_linear(x, **args), pre_dispatch=pre_dispatch)(
            x
        )
        other = torch.randn_like(x)
        assert torch.equal(traced(other), lora_kernels.lora_linear(other, **args))


@pytest.mark.parametrize("half", [False, True], ids=["SymInt", "SymFloat"])
def test_make_fx_of_symbolic_sizes_takes_one_as_scaling(half: bool) -> None:
    args = arguments()
    tensors = [args[name].detach() for name in WRAPPED["lora_linear"]]

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        rows = x.shape[0]
        return lora_kernels.lora_linear(x, *rest, scaling=rows / 2 if half else rows)

    with torch.no_grad():
        traced = make_fx(call, tracing_mode="symbolic")(*tensors)
        assert torch.equal(traced(*tensors), call(*tensors))


@pytest.mark.parametrize("grad", [True, False])
def test_x_that_memory_does_not_hold_is_taken_for_what_it_is(grad: bool) -> None:
    """A negated view, and the zeros of autograd's formulas, which have no memory."""
    args = arguments(**FULL)
    x = args.pop("x").detach()
    with torch.set_grad_enabled(grad):
        for lazy in (torch._neg_view(x), torch._efficientzerotensor(x.shape)):
            want = lora_kernels.lora_linear(lazy + 0.0, **args)
            assert torch.equal(lora_kernels.lora_linear(lazy, **args), want)


def test_dy_of_lazy_zeros_gives_zeros() -> None:
    args = cases.inputs(Case(5, 33, 64, 3, **FULL))  # type: ignore[arg-type]
    want = run(lora_kernels.lora_linear, {**args, "dy": torch.zeros(5, 33)})
    args["dy"] = torch._efficientzerotensor((5, 33))
    for name, grad in run(lora_kernels.lora_linear, args).items():
        assert torch.equal(grad, want[name]), name


@pytest.mark.parametrize("layout", ["rows", "padded", "1d", "3d", "3d_swapped"])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("several", [False, True])
def test_y_changed_in_place_is_nobodys_view(
    several: bool, grad: bool, backend: str, layout: str
) -> None:
    """An activation in place writes to y."""
    with lora_kernels.backend(backend), torch.set_grad_enabled(grad):
        args = arguments(1 if layout == "1d" else 6, x_layout=layout)
        x, A, B = args["x"], args["lora_A"], args["lora_B"]

        def call() -> Tensor:
            if not several:
                return lora_kernels.lora_linear(x, args["weight"], A, B)
            index = torch.zeros(x.shape[:-1], dtype=torch.int64)
            return lora_kernels.multi_lora_linear(x, args["weight"], [A], [B], index)

        want, y = call().relu(), call()
        assert y._base is None and torch.equal(y.relu_(), want)
        if grad:
            got = torch.autograd.grad(y.square().sum(), (x, A, B))
            for one, other in zip(
                got, torch.autograd.grad(want.square().sum(), (x, A, B)), strict=True
            ):
                assert torch.equal(one, other)


@pytest.mark.parametrize("r", [3, 300])  # which the eager backend takes
def test_activation_in_place_behind_a_layer_differentiates(r: int) -> None:
    model = nn.Sequential(LoRALinear(64, 33, r=r), nn.ReLU(inplace=True))
    model(torch.randn(2, 5, 64)).sum().backward()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B"])
def test_lora_linear_of_a_tangent_raises(name: str, grad: bool) -> None:
    """Forward-mode derivatives are not computed, and not left out in silence."""
    args = {key: t.detach() if isinstance(t, Tensor) else t for key, t in arguments().items()}
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        args[name] = forward_ad.make_dual(args[name], torch.ones_like(args[name]))
        with pytest.raises(RuntimeError, match="forward-mode AD is active"):
            lora_kernels.lora_linear(**args)


@every_function
def test_backward_of_a_dy_with_a_tangent_raises(function: str) -> None:
    args = arguments()
    y = call_function(function, *(args[n] for n in ("x", "weight", "lora_A", "lora_B")))
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(NotImplementedError, match="forward-mode tangent"):
            torch.autograd.grad(y, args["x"], dy, retain_graph=True)
        torch.autograd.grad(y, args["x"], torch.ones_like(y))


class Wrapper(Tensor):
    """A tensor without memory of its own, as DTensor is: the dispatcher alone finds its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapper:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device
        )
        made.held = held
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda t: t.held, (args, kwargs or {}))
        return func(*args, **kwargs)


WRAPPED = {
    "lora_linear": ("x", "weight", "lora_A", "lora_B"),
    "multi_lora_linear": ("x", "weight", "lora_A", "lora_B", "index"),
    "lora_experts_linear": ("x", "weight", "lora_A", "lora_B", "offsets"),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("function", "name"), [(f, name) for f, names in WRAPPED.items() for name in names]
)
def test_wrapper_in_any_place_is_dispatched_in_both_directions(
    function: str, name: str, grad: bool
) -> None:
    args: dict[str, Any] = {
        "lora_linear": lambda: arguments(bias=True),
        "multi_lora_linear": lambda: cases.inputs(MultiCase(5, 33, 64)),
        "lora_experts_linear": lambda: cases.inputs(ExpertsCase((2, 3), 33, 64, 3, tail=0)),
    }[function]()
    args.pop("dy", None)
    bias = args["bias"] = args["bias"].detach()
    call = getattr(lora_kernels, function)
    wrapped = tree_map_only(Tensor, lambda t: Wrapper(t.detach()), args[name])
    if isinstance(wrapped, list):  # the last one alone
        wrapped = [*args[name][:-1], wrapped[-1]]
    with torch.set_grad_enabled(grad):
        bias.requires_grad_(grad)
        want, got = call(**args), call(**{**args, name: wrapped})
        assert torch.equal(got, want)
        if grad:
            dy, leaves = torch.ones_like(want), [bias, *([args["x"]] if name != "x" else [])]
            expected = torch.autograd.grad(want, leaves, dy, retain_graph=True)
            for y, given in ((got, dy), (want, Wrapper(dy))):
                found = torch.autograd.grad(y, leaves, given)
                assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_dora_norm_of_a_wrapper_is_dispatched(name: str) -> None:
    args = {name: t.detach() for name, t in arguments().items() if name in WRAPPED["lora_linear"]}
    args.pop("x")
    want = lora_kernels.dora_norm(**args)
    assert torch.equal(lora_kernels.dora_norm(**{**args, name: Wrapper(args[name])}), want)
