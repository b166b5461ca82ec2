"""The mask: the documented one on every backend, in the forward, in dx and in dA."""

import pytest
import torch

from lora_kernels import (
    backend,
    dropout_mask,
    lora_experts_linear,
    lora_linear,
    multi_lora_linear,
)
from tests.autograd.cases import BACKENDS

M, K = 5, 11
RNG = torch.tensor([-7, 1 << 40])


def make_case(dtype=torch.float32, **kwargs):
    """With W = 0 and A = B = 1 the layer is its dropout: y = D(x)."""
    eye = torch.eye(K, dtype=dtype)
    return {
        "x": torch.ones(M, K, dtype=dtype),
        "weight": torch.zeros(K, K, dtype=dtype),
        "lora_A": eye,
        "lora_B": eye.clone(),
        "dropout_p": 0.5,
        **kwargs,
    }


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.5, 0.75])  # 1/(1−p) is a power of two: no rounding anywhere
def test_lora_linear_with_dropout_sees_the_public_mask(p, dtype, name):
    mask = dropout_mask(RNG, M, K, p)
    assert mask.any() and not mask.all()
    case = make_case(dtype, dropout_p=p, rng=RNG)
    case["x"].requires_grad_()
    case["lora_A"].requires_grad_()
    dy = torch.arange(1.0, 1 + M * K, dtype=dtype).view(M, K)
    with backend(name):
        y = lora_linear(**case)
        y.backward(dy)
    assert torch.equal(y, mask / (1 - p))
    assert torch.equal(case["x"].grad, dy * mask / (1 - p))
    assert torch.equal(case["lora_A"].grad, (dy.double().T @ (mask / (1 - p)).double()).to(dtype))


@pytest.mark.parametrize("name", BACKENDS)
def test_mask_of_leading_dimensions_is_that_of_rows(name):
    x = torch.randn(2, 3, 4, K)
    with backend(name):
        y = lora_linear(**make_case(x=x, rng=RNG))
        flat = lora_linear(**make_case(x=x.view(24, K), rng=RNG))
    assert torch.equal(y.view(24, K), flat)


@pytest.mark.parametrize("name", BACKENDS)
def test_base_product_sees_no_dropout(name):
    with backend(name):
        y = lora_linear(**make_case(weight=torch.eye(K), rng=RNG))
    assert torch.equal(y, 1 + 2.0 * dropout_mask(RNG, M, K, 0.5))


@pytest.mark.parametrize("name", BACKENDS)
def test_dropout_of_everything_is_the_base(name):
    case = make_case(weight=torch.eye(K), dropout_p=1.0)
    for key in ("x", "lora_A", "lora_B"):
        case[key].requires_grad_()
    with backend(name):
        y = lora_linear(**case)
        y.sum().backward()
    assert torch.equal(y, case["x"]) and torch.equal(case["x"].grad, torch.ones(M, K))
    assert not case["lora_A"].grad.any() and not case["lora_B"].grad.any()


@pytest.mark.parametrize("name", BACKENDS)
def test_generator_is_used_the_same_with_and_without_gradients(name):
    case = make_case()
    results = []
    for requires_grad in (False, True):
        for guard in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            case["lora_A"] = torch.eye(K, requires_grad=requires_grad)
            torch.manual_seed(5)
            with backend(name), guard():
                y = lora_linear(**case)
            results.append((y.detach(), torch.get_rng_state()))
    for y, state in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(state, results[0][1])


@pytest.mark.parametrize("kwargs", [{"dropout_p": 0.0}, {"rng": RNG}])
def test_generator_is_left_alone(kwargs):
    before = torch.get_rng_state()
    lora_linear(**make_case(**kwargs))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_call_has_its_own_mask():
    masks = [lora_linear(**make_case()) for _ in range(4)]
    # 55 fair coins agree with probability 2^-55.
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_without_dropout_rng_has_no_effect():
    y = lora_linear(**make_case(dropout_p=0.0, rng=RNG))
    assert torch.equal(y, torch.ones(M, K))


@pytest.mark.parametrize("function", [lora_linear, multi_lora_linear, lora_experts_linear])
@pytest.mark.parametrize("grad", [True, False])
def test_mask_without_dropout_changes_no_choice(grad, function):
    """The native kernels take the state of a mask alone, so a mask would choose the eager ones."""
    x, W, A, B = torch.randn(5, 11), torch.randn(7, 11), torch.randn(3, 11), torch.randn(7, 3)
    args = {
        lora_linear: (x, W, A, B),
        multi_lora_linear: (x, W, [A], [B], torch.zeros(5, dtype=torch.int64)),
        lora_experts_linear: (x, W[None], A[None], B[None], torch.tensor([5])),
    }[function]
    with torch.set_grad_enabled(grad), backend(BACKENDS[-1]):
        want = function(*args)
        assert torch.equal(function(*args, rng=torch.zeros(5, 11, dtype=torch.bool)), want)


@pytest.mark.parametrize("function", [lora_linear, multi_lora_linear, lora_experts_linear])
@pytest.mark.parametrize("name", BACKENDS)
def test_state_of_a_mask_in_a_column_is_read_as_it_lies(name, function):
    """Kernels read seed and offset by address: the second one is not the first's neighbour."""
    state = torch.tensor([[5, 1], [7, 2]])[:, 1]
    case = make_case(rng=state)
    x, W, A, B = (case[n] for n in ("x", "weight", "lora_A", "lora_B"))
    args = {
        lora_linear: (x, W, A, B),
        multi_lora_linear: (x, W, [A], [B], torch.zeros(M, dtype=torch.int64)),
        lora_experts_linear: (x, W[None], A[None], B[None], torch.tensor([M])),
    }[function]
    with backend(name):
        y = function(*args, dropout_p=0.5, rng=state)
    assert torch.equal(y, 2.0 * dropout_mask(torch.tensor([1, 2]), M, K, 0.5))
