"""Where the mask comes from: the generator, a state. tests/ops compares it with the public one."""

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
