"""The elementwise kernels of a gated MLP beside float64, and their check on a device."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.errors import OutOfResources

import lora_kernels
from lora_kernels.backends import checked
from lora_kernels.backends.eager import gated_mlp as eager_mlp
from lora_kernels.backends.eager.gated_mlp import ACTIVATIONS, Gated
from lora_kernels.backends.triton import elementwise, gated, launch
from lora_kernels.core import forced
from lora_kernels.core.problem import KERNEL_DTYPES
from lora_kernels.core.record import Record
from lora_kernels.ops import blocks
from tests.support.interpreter import set_program
from tests.triton.device import DEVICE

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


def sample(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    """g, u and dh; every third g is large, so that activations saturate."""
    generator = torch.Generator().manual_seed(4)
    g, u, dh = (torch.randn(shape, generator=generator) for _ in range(3))
    g.view(-1)[::3] *= 8
    return [t.to(DEVICE, dtype) for t in (g, u, dh)]


def exact(g: Tensor, u: Tensor, dh: Tensor, activation: str) -> Gated:
    """dg, du and h by autograd in float64."""
    g, u = (t.double().requires_grad_() for t in (g, u))
    h = ACTIVATIONS[activation](g) * u
    return Gated(*torch.autograd.grad(h, (g, u), dh.double()), h.detach())


def empty(like: Tensor) -> Gated:
    """Memory that a kernel which leaves elements out would leave NaN in."""
    return Gated(*(torch.full_like(like, torch.nan) for _ in range(3)))


@pytest.mark.parametrize("n", [1, 5, 1023, 1025])
def test_kernels_write_nothing_behind_the_end(n: int) -> None:
    memory = [torch.full((n + 4096,), 7.0, device=DEVICE) for _ in range(3)]
    out = Gated(*(t[:n] for t in memory))
    elementwise.gated_backward(*sample(n, dtype=torch.float32), *out, "silu")
    assert all((t[n:] == 7.0).all() for t in memory)


@every_dtype
@every_activation
@pytest.mark.parametrize("shape", [(5,), (2, 3, 333), (4, 1024)], ids=str)
def test_kernels_are_close_to_float64(
    shape: tuple[int, ...], activation: str, dtype: torch.dtype
) -> None:
    g, u, dh = sample(*shape, dtype=dtype)
    want, got = exact(g, u, dh, activation), empty(g)
    elementwise.gated_backward(g, u, dh, *got, activation)
    assert torch.equal(elementwise.gated(g, u, activation), got.h)
    # act(g) and the result are rounded, dg once: 2 · eps/2. In float32, an exponential, an error
    # function and quotients are off by a few units of their terms, of at most (1 + |g|) times the
    # other factors.
    eps = torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).smallest_normal * eps
    factors = Gated(dh.double() * u.double(), dh.double(), u.double())
    for found, exactly, factor in zip(got, want, factors, strict=True):
        terms = factor.abs() * (1 + g.double().abs())
        bound = 1.01 * eps * exactly.abs() + 16 * 2.0**-24 * terms + 2 * tiny
        error = (found.double() - exactly).abs()
        assert (error <= bound).all(), (error / bound).max()


@every_dtype
@every_activation
def test_backward_in_place_has_the_same_bits(activation: str, dtype: torch.dtype) -> None:
    operands = sample(7, 300, dtype=dtype)
    got = empty(operands[0])
    elementwise.gated_backward(*operands, *got, activation)
    elementwise.gated_backward(*operands, *operands, activation)
    assert all(map(torch.equal, got, operands))


def test_kernels_of_no_elements_launch_nothing() -> None:
    g, u, dh = sample(0, 8, dtype=torch.bfloat16)
    assert elementwise.gated(g, u, "silu").shape == (0, 8)
    elementwise.gated_backward(g, u, dh, g, u, dh, "silu")


def test_kernels_pass_their_check() -> None:
    device = torch.device(DEVICE)
    for activation, dtype, is_even in itertools.product(ACTIVATIONS, KERNEL_DTYPES, (True, False)):
        assert eager_mlp.compare_kernels(activation, dtype, is_even, device) is None
    eager_mlp.kernel_reasons.clear()
    assert eager_mlp.kernel_reason(device, torch.bfloat16, "silu") is None
    reason = eager_mlp.kernel_reason(device, torch.float64, "silu")
    assert reason == "Triton's kernels do not take torch.float64"


def test_each_kernel_that_is_compiled_is_checked_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles for a number of elements that 16 divides, and for any."""
    compared: list[Any] = []
    monkeypatch.setattr(eager_mlp, "kernel_reasons", {})
    monkeypatch.setattr(eager_mlp, "compare_kernels", lambda *args: compared.append(args[:3]))
    kinds = [("silu", torch.bfloat16, 32), ("silu", torch.bfloat16, 33)]
    kinds += [("gelu", torch.bfloat16, 32), ("silu", torch.float16, 32)]
    for activation, dtype, elements in kinds * 2:
        device = torch.device(DEVICE)
        assert eager_mlp.kernel_reason(device, dtype, activation, elements) is None
    assert compared == [(act, dtype, elements == 32) for act, dtype, elements in kinds]


@every_dtype
@every_activation
def test_du_is_of_the_rounded_activation(activation: str, dtype: torch.dtype) -> None:
    """PyTorch writes act(g) and reads it. With dh = u, du and h are one product, bit for bit."""
    g, u, _ = sample(4, 1024, dtype=dtype)
    got = empty(g)
    elementwise.gated_backward(g, u, u, *got, activation)
    assert torch.equal(got.u, got.h)


@pytest.mark.parametrize("at", ["under a mode", "in a graph's capture"])
def test_check_that_is_put_off_is_made_later(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager_mlp, "kernel_reasons", {})
    device = torch.device(DEVICE)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return op(*args, **(kwargs or {}))

    with monkeypatch.context() as patch, Mode() if at == "under a mode" else nullcontext():
        if at != "under a mode":
            patch.setattr(checked.workspace, "is_capturing", lambda device: True)
        assert eager_mlp.kernel_reason(device, torch.bfloat16, "silu") == checked.UNCHECKED
    assert eager_mlp.kernel_reason(device, torch.bfloat16, "silu") is None


def test_gated_mlp_by_the_kernels_repeats_its_backward() -> None:
    """Kernels write to saved tensors unseen by autograd, which would not complain."""
    generator = torch.Generator().manual_seed(0)
    K, R, H = 9, 5, 33

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    layers = [
        Record(draw(n, k), draw(R, k).requires_grad_(), draw(n, R).requires_grad_(), None, 0.7)
        for k, n in ((K, H), (K, H), (H, K))
    ]
    x, dy = draw(4, K).requires_grad_(), draw(4, K)
    leaves = [x, *(t for layer in layers for t in layer[1:3])]
    block = blocks.Block(layers, x.dtype, x.dtype, False, True, False, False, "silu")
    y = blocks.gated_mlp(x, block)
    _, g, *_ = y.grad_fn.saved_tensors  # type: ignore[union-attr]
    before = g.clone()
    first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    assert torch.equal(g, before)
    third = torch.autograd.grad(y, leaves, dy)
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, first, third))
    assert not torch.equal(g, before)  # the last one needs no third tensor

    def apply(layer: Record, x: Tensor) -> Tensor:
        return x @ layer.weight.T + layer.scaling * (x @ layer.lora_A.T) @ layer.lora_B.T

    gate, up, down = layers
    h = torch.nn.functional.silu(apply(gate, x)) * apply(up, x)
    want = torch.autograd.grad(apply(down, h), leaves, dy)
    for got, exact in zip(first, want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


def swapped(*args: Any) -> None:
    g, u, dh, dg, du, h, activation = args
    elementwise.gated_backward(g, u, dh, du, dg, h, activation)


def scaled(*args: Any) -> None:
    elementwise.gated_backward(*args)
    args[3].mul_(1 + 2.0**-6)


def nearly(*args: Any) -> None:
    elementwise.gated_backward(*args)
    args[3].mul_(1 + 2.0**-12)


def of_float16(*args: Any) -> None:
    elementwise.gated_backward(*args)
    if args[0].dtype is torch.float16:
        args[4].mul_(1 + 2.0**-6)


def at_the_end(*args: Any) -> None:
    """Leaves out what a second program computes."""
    elementwise.gated_backward(*args)
    args[4].view(-1)[1024:] = torch.nan


def saturated(*args: Any) -> None:
    g = args[0].clone()
    elementwise.gated_backward(*args)
    args[3][g > 8] = 0


def of_tanh(*args: Any) -> None:
    elementwise.gated_backward(*args[:-1], args[-1].replace("gelu_tanh", "gelu"))


def overwriting(*args: Any) -> None:
    """Stores h before it loads all of dh."""
    g, u, dh, dg, du, h, activation = args
    if h is dh:
        h.copy_(eager_mlp.ACTIVATIONS[activation](g) * u)
    elementwise.gated_backward(g, u, dh, dg, du, h, activation)


def failing(*args: Any) -> None:
    raise RuntimeError("no kernel image")


def unlaunchable(*args: Any) -> None:
    raise OutOfResources(1 << 20, 1 << 16, "shared memory")  # no RuntimeError, as CompilationError


FAULTS: dict[str, tuple[Any, ...]] = {
    "dg and du swapped": (swapped, "differs from PyTorch's ops in dg"),
    "dg off by two units": (scaled, "differs from PyTorch's ops in dg"),
    "dg off by many units of float32": (nearly, "silu in torch.float32 differs from PyTorch's"),
    "du wrong in float16 alone": (
        of_float16,
        "Triton's elementwise kernel of silu in torch.float16 differs from PyTorch's ops in du",
        "silu",
        torch.float16,
    ),
    "the last elements": (at_the_end, "in torch.float32 makes other bits in place"),
    "where the activation saturates": (saturated, "silu in torch.float32 differs from PyTorch's"),
    "the other GELU": (of_tanh, "gelu_tanh in torch.float32 ", "gelu_tanh", torch.float32),
    "wrong in place": (overwriting, "makes other bits in place"),
    "an exception": (failing, "Triton's kernels raised RuntimeError: no kernel image"),
    "an exception of Triton's": (unlaunchable, "raised OutOfResources: out of resource"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_kernels_that_fail_their_check_are_not_used(fault, monkeypatch) -> None:
    broken, said, *kind = FAULTS[fault]
    activation, dtype = kind or ("silu", torch.float32)
    monkeypatch.setattr(eager_mlp, "_launch_gated_backward", broken)
    monkeypatch.setattr(eager_mlp, "kernel_reasons", {})
    g, u, dh = sample(3, 50, dtype=dtype)
    reason = eager_mlp.kernel_reason(g.device, dtype, activation, g.numel())
    assert reason is not None and said in reason
    want = eager_mlp.gated_backward_by_torch(g, u, dh.clone(), False, activation)
    assert all(map(torch.equal, eager_mlp.gated_backward(g, u, dh, False, activation), want))


def test_forward_kernel_that_fails_its_check_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward's kernel makes h too, and its gradients are right."""
    launch = eager_mlp._launch_gated
    monkeypatch.setattr(eager_mlp, "_launch_gated", lambda g, u, act: launch(g, u, act) * 2)
    monkeypatch.setattr(eager_mlp, "kernel_reasons", {})
    reason = eager_mlp.kernel_reason(torch.device(DEVICE), torch.bfloat16, "silu")
    assert reason is not None and "makes another h in the backward" in reason


@every_activation
def test_product_of_dh_and_u_does_not_overflow(activation: str) -> None:
    """The product of dh and u is above float16's range; times a slope near 0 it is not."""
    values = (-30.0, 600.0, 600.0)
    g, u, dh = (torch.full((8,), t, dtype=torch.float16, device=DEVICE) for t in values)
    got = empty(g)
    elementwise.gated_backward(g, u, dh, *got, activation)
    assert got.g.isfinite().all()


@pytest.mark.parametrize("n", [2**31 - 1, 2**31])
def test_offsets_that_32_bits_do_not_hold_are_64_bits_wide(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[dict[str, Any]] = []
    monkeypatch.setattr(launch, "run", lambda kernel, config, plan, **given: launched.append(given))
    t = torch.empty((), dtype=torch.bfloat16, device=DEVICE).expand(n)
    elementwise.gated_backward(t, t, t, t, t, t, "silu")
    (given,) = launched
    assert given["n"] == n and given["WIDE"] is (n == 2**31)


def test_check_sees_nothing_of_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward asks for it, and the answer holds for all others."""
    seen: list[Any] = []

    def compare(activation: str, dtype: torch.dtype, is_even: bool, device: torch.device) -> None:
        modes = torch.is_autocast_enabled(DEVICE), torch.is_inference_mode_enabled()
        seen.append((*modes, torch.is_grad_enabled(), forced.current.get().backend))

    monkeypatch.setattr(eager_mlp, "kernel_reasons", {})
    monkeypatch.setattr(eager_mlp, "compare_kernels", compare)
    forced_too = lora_kernels.backend("eager")
    with torch.autocast(DEVICE, torch.bfloat16), forced_too, torch.inference_mode():
        assert eager_mlp.kernel_reason(torch.device(DEVICE), torch.bfloat16, "silu") is None
    assert seen == [(False, False, False, None)]


def test_each_device_has_a_check_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards of one machine may differ."""
    asked: list[int | None] = []

    def compare(*args: Any) -> str | None:
        device = args[-1]
        asked.append(device.index)
        return "differs" if device.index == 1 else None

    monkeypatch.setattr(eager_mlp, "kernel_reasons", {})
    monkeypatch.setattr(checked, "_unavailable_reason", lambda device: None)
    monkeypatch.setattr(checked.workspace, "is_capturing", lambda device: False)
    monkeypatch.setattr(eager_mlp, "compare_kernels", compare)
    cards = [torch.device("cuda", index) for index in (0, 1, 0, 1)]
    found = [eager_mlp.kernel_reason(card, torch.bfloat16, "silu") for card in cards]
    assert found == [None, "differs", None, "differs"] and asked == [0, 1]


@triton.jit
def offsets_kernel(out_ptr, n, WIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    at, _ = gated.offsets(n, WIDE, BLOCK_N)
    tl.store(out_ptr + tl.arange(0, BLOCK_N), at)


def test_offsets_of_a_late_program_are_64_bits_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product overflows 32 bits before the sum does: the number is widened first."""
    set_program(1 << 21, monkeypatch)
    out = torch.zeros(1024, dtype=torch.int64)
    offsets_kernel[(1,)](out, (1 << 31) + 1024, WIDE=True, BLOCK_N=1024)
    assert torch.equal(out, torch.arange(1024) + (1 << 31))
