"""The autograd Function: gradients against finite differences, and what it saves and returns."""

import pytest
import torch

from lora_kernels import backend, lora_linear
from tests.autograd.cases import (
    BACKENDS,
    DIFFERENTIABLE,
    OPTIONS,
    K,
    M,
    N,
    R,
    make_case,
    require_grad,
)
from tests.support.functions import call, every_function


@pytest.mark.parametrize("x_shape", [(M, K), (K,), (2, 3, K)])
@pytest.mark.parametrize("option", OPTIONS)
def test_lora_linear_passes_gradcheck(option, x_shape):
    case = make_case(option, x_shape=x_shape)
    leaves = require_grad(case)

    def function(*tensors):
        return lora_linear(**{**case, **dict(zip(leaves, tensors, strict=True))})

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_lora_linear_of_strided_operands_passes_gradcheck():
    case = make_case(x_shape=(K, 2, 3))
    leaves = require_grad(case)
    lora_A, lora_B = case["lora_A"].detach().mT, case["lora_B"].detach().mT  # [K, R], [R, N]
    leaves["lora_A"], leaves["lora_B"] = (t.clone().requires_grad_() for t in (lora_A, lora_B))
    case["weight"] = case["weight"].mT.contiguous().mT

    def function(*tensors):
        call = {**case, **dict(zip(leaves, tensors, strict=True))}
        call |= {"x": call["x"].movedim(0, -1), "lora_A": call["lora_A"].mT}
        y = lora_linear(**call | {"lora_B": call["lora_B"].mT})
        return y.movedim(-1, 0)  # and so a dy with strides

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_lora_linear_of_an_expanded_x_passes_gradcheck():
    case = make_case()
    row = torch.randn(1, K, dtype=torch.float64, requires_grad=True)

    def function(row):
        return lora_linear(**{**case, "x": row.expand(M, K)}).sum(0)  # dy expanded as well

    assert torch.autograd.gradcheck(function, (row,))


def run(case, leaves, retain_graph=False):
    y = lora_linear(**case)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y, dy, torch.autograd.grad(y, leaves.values(), dy, retain_graph=retain_graph)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", DIFFERENTIABLE)
def test_gradient_alone_is_that_among_all(wanted, dtype, name):
    """The set of requested gradients does not change their values."""
    case = make_case(dtype=dtype)
    with backend(name):
        leaves = require_grad(case)
        grads = dict(zip(leaves, run(case, leaves)[2], strict=True))
        for leaf in leaves.values():
            leaf.requires_grad_(False)
        (alone,) = run(case, require_grad(case, [wanted]))[2]
    assert alone.dtype is dtype and alone.shape == case[wanted].shape
    assert torch.equal(alone, grads[wanted])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_backward_a_second_time_is_the_same(option, name):
    case = make_case(option, dtype=torch.float32)
    leaves = require_grad(case)
    with backend(name):
        y, dy, first = run(case, leaves, retain_graph=True)
        second = torch.autograd.grad(y, leaves.values(), dy)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@every_function
def test_double_backward_raises(function):
    leaves = [make_case()[n].requires_grad_() for n in ("x", "lora_A", "lora_B")]
    x, lora_A, lora_B = leaves
    y = call(function, x, make_case()["weight"], lora_A, lora_B)
    grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grads[0].sum().backward()


def penalized(case, leaves):
    """A gradient penalty of a loss that is linear in y, so that dy needs no gradient."""
    (dx,) = torch.autograd.grad(lora_linear(**case).sum(), leaves["x"], create_graph=True)
    return case["x"].sum() + dx.square().sum()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_second_derivative_by_every_way_raises():
    """Raises by every way from a gradient back to its inputs."""
    case = make_case()
    leaves = require_grad(case)
    for wanted in ("lora_A", "lora_B"):
        with pytest.raises(RuntimeError, match="differentiate twice"):
            torch.autograd.grad(penalized(case, leaves), leaves[wanted], allow_unused=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        penalized(case, leaves).backward()

    y = lora_linear(**case)
    dy = torch.ones_like(y, requires_grad=True)  # a product with a vector differentiates in it
    (dx,) = torch.autograd.grad(y, leaves["x"], dy, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(dx.sum(), dy)

    def loss(x):
        return lora_linear(**{**case, "x": x}).square().sum()

    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.functional.hessian(loss, case["x"].detach())
    loss(leaves["x"]).backward(create_graph=True)  # without a second derivative
    first = {name: t.grad for name, t in leaves.items() if t.grad is not None}
    for name, grad in zip(
        first, torch.autograd.grad(loss(leaves["x"]), [leaves[n] for n in first]), strict=True
    ):
        assert torch.equal(first[name], grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_of_several_dy_at_once_are_those_of_each(option, dtype):
    case = make_case(option, dtype=dtype)
    leaves = require_grad(case)
    y = lora_linear(**case)
    dys = torch.linspace(-1, 1, 3 * y.numel(), dtype=dtype).view(3, *y.shape)
    of_y = {"outputs": y, "inputs": list(leaves.values()), "retain_graph": True}
    together = torch.autograd.grad(**of_y, grad_outputs=dys, is_grads_batched=True)
    for i, dy in enumerate(dys):
        for all_of_it, alone in zip(
            together, torch.autograd.grad(**of_y, grad_outputs=dy), strict=True
        ):
            assert torch.equal(all_of_it[i], alone)


@pytest.mark.parametrize("name", BACKENDS)
def test_forward_of_a_frozen_column_scale_saves_no_z(name):
    case = make_case("column_scale", dtype=torch.float32)
    require_grad(case, ("x", "lora_A", "lora_B"))
    shapes = []
    with (
        backend(name),
        torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, id),
    ):
        lora_linear(**case)
    assert (M, R) in shapes and (M, N) not in shapes


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_of_no_rows_are_zeros(name):
    case = make_case(dtype=torch.float32, x_shape=(2, 0, K))
    leaves = require_grad(case)
    with backend(name):
        y = lora_linear(**case)
        y.sum().backward()
    assert y.shape == (2, 0, N)
    for leaf in leaves.values():
        assert leaf.grad.shape == leaf.shape and not leaf.grad.any()


def test_lora_linear_on_meta_has_shapes_and_dtypes():
    case = {
        key: t.to("meta") if isinstance(t, torch.Tensor) else t
        for key, t in make_case(dtype=torch.bfloat16, x_shape=(2, 3, K)).items()
    }
    leaves = require_grad(case)
    y = lora_linear(**case)
    y.sum().backward()
    assert y.is_meta and y.shape == (2, 3, N) and y.dtype is torch.bfloat16
    for leaf in leaves.values():
        assert leaf.grad.is_meta and leaf.grad.shape == leaf.shape
