"""The source of the mask: the generator, or a state. tests/ops compares it with the public one."""

import pytest
import torch

from lora_kernels import (
    backend,
    dropout_mask,
    lora_linear,
)
from tests.autograd.cases import BACKENDS
from tests.support.functions import call, every_function

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


@every_function
@pytest.mark.parametrize("grad", [True, False])
def test_mask_without_dropout_changes_no_choice(grad, function):
    """The native kernels take the state of a mask alone, so a mask would choose the eager ones."""
    tensors = torch.randn(5, 11), torch.randn(7, 11), torch.randn(3, 11), torch.randn(7, 3)
    with torch.set_grad_enabled(grad), backend(BACKENDS[-1]):
        want = call(function, *tensors)
        mask = torch.zeros(5, 11, dtype=torch.bool)
        assert torch.equal(call(function, *tensors, dropout_mask=mask), want)


@every_function
@pytest.mark.parametrize("name", BACKENDS)
def test_state_of_a_mask_in_a_column_is_read_as_it_lies(name, function):
    """Kernels read seed and offset by address: the second one is not the first's neighbour."""
    state = torch.tensor([[5, 1], [7, 2]])[:, 1]
    tensors = (make_case()[n] for n in ("x", "weight", "lora_A", "lora_B"))
    with backend(name):
        y = call(function, *tensors, dropout_p=0.5, rng=state)
    assert torch.equal(y, 2.0 * dropout_mask(torch.tensor([1, 2]), M, K, 0.5))
