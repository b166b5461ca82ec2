"""Dtypes: which one a result has, and that its value is as good as eager's in that dtype."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_kernels import backend, lora_experts_linear, lora_linear, multi_lora_linear
from lora_kernels.ops import context
from tests.autograd.cases import BACKENDS
from tests.support.functions import call, every_function

M, K, N, R = 33, 65, 37, 5
SCALING = 0.6
LOW = [torch.bfloat16, torch.float16]


def make_case(dtype):
    """float32 arguments that `dtype` can hold: autocast then rounds intermediates alone."""
    torch.manual_seed(0)
    shapes = {"x": (M, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R), "bias": (N,)}
    return {name: torch.randn(shape).to(dtype).float() for name, shape in shapes.items()}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("x_dtype", [torch.float32, *LOW])
def test_lora_linear_under_autocast_has_the_dtypes_of_pytorch(x_dtype, dtype, name):
    """y in autocast's dtype, each gradient in its argument's; backward may run outside."""
    case = make_case(dtype)
    case["x"] = case["x"].to(x_dtype)
    for key, t in case.items():
        t.requires_grad_(key != "weight")
    with backend(name):
        with torch.autocast("cpu", dtype):
            y = lora_linear(**case, scaling=SCALING)
        y.sum().backward()
    assert y.dtype is dtype
    for key, t in case.items():
        assert t.grad is None if key == "weight" else t.grad.dtype is t.dtype


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
@every_function
def test_base_under_autocast_is_multiplied_in_its_dtype(function, dtype, name):
    """Exactly the product of x and weight in that dtype, if lora_B is zero."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(M, K), torch.randn(N, K), torch.randn(N)
    rest = torch.randn(R, K), torch.zeros(N, R), 1.0, bias
    with backend(name):
        with torch.autocast("cpu", dtype):
            y = call(function, x, weight, *rest)
        assert torch.equal(y, call(function, x.to(dtype), weight.to(dtype), *rest))


@pytest.mark.parametrize("wide", ["x", "lora_A"])
@pytest.mark.parametrize("name", BACKENDS)
@every_function
def test_cpu_under_autocast_keeps_the_bits_of_the_adapters_branch(function, name, wide):
    """x·Aᵀ = (1 + 2⁻¹²) − 1, which is 0 if x or lora_A is rounded to bfloat16 before."""
    one, near = torch.tensor([[1.0, -1.0]]), torch.tensor([[1 + 2.0**-12, 1.0]])
    x, lora_A = (near, one) if wide == "x" else (one, near)
    with backend(name), torch.autocast("cpu", torch.bfloat16):
        y = call(function, x, torch.zeros(1, 2), lora_A, torch.ones(1, 1))
    assert y.item() == 2.0**-12


@pytest.mark.parametrize("name", BACKENDS)
@every_function
def test_backward_under_autocast_has_the_bits_of_one_outside(function, name):
    """The forward chose float32, whatever autocast says around the backward."""
    case = {n: t.requires_grad_(n != "weight") for n, t in make_case(torch.float32).items()}
    x, weight, A, B, bias = case.values()
    leaves = [x, A, B, bias]
    with backend(name):
        y = call(function, x, weight, A, B, SCALING, bias)
        want = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(map(torch.equal, got, want))


def test_lora_linear_of_float64_under_autocast_is_the_same():
    case = {name: t.double() for name, t in make_case(torch.bfloat16).items()}
    want = lora_linear(**case)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(**case)
    assert y.dtype is torch.float64 and torch.equal(y, want)


def test_lora_linear_under_nested_autocast_off_is_the_same():
    case = make_case(torch.bfloat16)
    want = lora_linear(**case)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        y = lora_linear(**case)
    assert y.dtype is torch.float32 and torch.equal(y, want)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("a_dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("b_dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("x_dtype", [torch.float32, *LOW])
def test_lora_linear_of_adapters_in_other_dtypes_has_xs_dtype(x_dtype, a_dtype, b_dtype, name):
    case = make_case(torch.float32)
    for key, dtype in dict.fromkeys(case, x_dtype).items():
        case[key] = case[key].to({"lora_A": a_dtype, "lora_B": b_dtype}.get(key, dtype))
        case[key].requires_grad_(key != "weight")
    with backend(name):
        y = lora_linear(**case, scaling=SCALING)
        y.sum().backward()
    assert y.dtype is x_dtype
    for key in ("x", "lora_A", "lora_B", "bias"):
        assert case[key].grad.dtype is case[key].dtype


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu", "mtia"])
def test_autocast_of_any_device_is_followed(device):
    """Shapes and dtypes alone, which need no such device."""
    with FakeTensorMode():
        x, W, A, B = (torch.empty(s, device=device) for s in ((4, 8), (6, 8), (2, 8), (6, 2)))
        half, index = W.to(torch.float16), torch.zeros(4, dtype=torch.int64, device=device)
        assert lora_linear(x, W, A, B).dtype is torch.float32
        before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, torch.float16)
        try:
            for weight in (W, half):
                assert lora_linear(x, weight, A, B).dtype is torch.float16
                y = multi_lora_linear(x, weight, [A], [B], index)
                assert y.dtype is torch.float16
            with context.no_autocast(x):
                assert not torch.is_autocast_enabled(device)
        finally:
            torch.set_autocast_enabled(device, before[0])
            torch.set_autocast_dtype(device, before[1])


@pytest.mark.parametrize("op", ["linear", "several", "experts"])
@pytest.mark.parametrize("dtype", LOW)
def test_gradient_of_x_beside_frozen_factors_is_rounded_once(dtype, op) -> None:
    """Frozen factors need no x, whose dtype the gradient has all the same."""
    case = make_case(dtype)
    x, weight, A, B, _ = case.values()
    index = torch.zeros(M, dtype=torch.int64)
    dy, found = torch.randn(M, N).to(dtype), []
    for trains in (True, False):
        leaf, A, B = x.clone().requires_grad_(), A.requires_grad_(trains), B.requires_grad_(trains)
        with torch.autocast("cpu", dtype):
            if op == "several":
                y = multi_lora_linear(leaf, weight, [A], [B], index, SCALING)
            elif op == "experts":
                stacks = weight[None], A[None], B[None]
                y = lora_experts_linear(leaf, *stacks, torch.tensor([M]), SCALING)
            else:
                y = lora_linear(leaf, weight, A, B, SCALING)
        found.append(torch.autograd.grad(y, leaf, dy)[0])
    assert found[0].dtype is torch.float32 and torch.equal(*found)
