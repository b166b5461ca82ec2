"""The gated MLP whose kernels add the low-rank updates, beside float64 and PyTorch's order."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_kernels.backends import checked
from lora_kernels.backends.eager import gated_mlp as eager_mlp
from lora_kernels.backends.eager.gated_mlp import ACTIVATIONS, Updates
from lora_kernels.backends.triton import configs, elementwise
from lora_kernels.core.problem import KERNEL_DTYPES
from lora_kernels.core.record import Record
from lora_kernels.ops import blocks
from tests.triton.device import DEVICE


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernels without their check, which takes seconds in the interpreter."""
    monkeypatch.setattr(checked, "kernel_reason", lambda *args: None)


every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
K = 24  # columns of x and y


class Sample(NamedTuple):
    """x, dy and the layers gate, up and down of a gated MLP."""

    x: Tensor
    dy: Tensor
    layers: list[Record]

    @property
    def leaves(self) -> list[Tensor]:
        found = [self.x]
        for layer in self.layers:
            found += [layer.lora_A, layer.lora_B]
            found += [t for t in (layer.bias, layer.rank_gate) if t is not None]
        return found

    def to(self, dtype: torch.dtype) -> Sample:
        """Return a copy in another dtype."""

        def copied(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            return t.detach().to(dtype).requires_grad_(t.requires_grad)

        layers = [Record(*map(copied, layer)) for layer in self.layers]
        return Sample(copied(self.x), copied(self.dy), layers)


def draw(
    M: int, H: int, ranks: tuple[int, int, int], dtype: torch.dtype, options: bool = False
) -> Sample:
    """options: gates and biases, which need gradients too."""
    generator = torch.Generator().manual_seed(sum(ranks) + M)

    def normal(*shape: int, grad: bool = True) -> Tensor:
        t = torch.randn(shape, generator=generator).to(DEVICE, dtype)
        return t.requires_grad_(grad)

    layers = []
    for (k, n), R, scaling in zip(((K, H), (K, H), (H, K)), ranks, (2.0, 0.5, 1.0), strict=True):
        W = (torch.randn(n, k, generator=generator) * k**-0.5).to(DEVICE, dtype)
        A = (torch.randn(R, k, generator=generator) * k**-0.5).to(DEVICE, dtype).requires_grad_()
        B = (torch.randn(n, R, generator=generator) * R**-0.5).to(DEVICE, dtype).requires_grad_()
        record = Record(W, A, B, normal(n) if options else None, scaling)
        layers.append(record._replace(rank_gate=normal(R)) if options else record)
    return Sample(normal(M, K), normal(M, K, grad=False), layers)


def reference(sample: Sample, activation: str) -> tuple[Tensor, ...]:
    """y and the gradients by autograd, in the dtype of the sample."""

    def apply(layer: Record, x: Tensor) -> Tensor:
        p = x @ layer.lora_A.T
        s = p if layer.rank_gate is None else p * layer.rank_gate
        y = x @ layer.weight.T + layer.scaling * (s @ layer.lora_B.T)
        return y if layer.bias is None else y + layer.bias

    gate, up, down = sample.layers
    h = ACTIVATIONS[activation](apply(gate, sample.x)) * apply(up, sample.x)
    y = apply(down, h)
    return y, *torch.autograd.grad(y, sample.leaves, sample.dy)


def block_of(sample: Sample, activation: str, is_stacked: bool = False) -> blocks.Block:
    x, has_others = sample.x, sample.layers[0].bias is not None
    is_plain = sample.layers[0].rank_gate is None
    return blocks.Block(
        sample.layers, x.dtype, x.dtype, False, is_plain, is_stacked, has_others, activation
    )


def ours(sample: Sample, activation: str, is_stacked: bool = False) -> tuple[Tensor, ...]:
    y = blocks.gated_mlp(sample.x, block_of(sample, activation, is_stacked))
    return y, *torch.autograd.grad(y, sample.leaves, sample.dy)


def by_torch(sample: Sample, activation: str) -> tuple[Tensor, ...]:
    """`ours` in today's order, by PyTorch's ops."""
    with mock.patch.object(checked, "kernel_reason", lambda *args: "by PyTorch's ops"):
        return ours(sample, activation)


def assert_as_exact(
    found: tuple[Tensor, ...], other: tuple[Tensor, ...], exact: tuple[Tensor, ...]
) -> None:
    """The error of each result is at most 1.5 of the other's, beside the rounding of one result.

    In float32 an exponential's rounded argument t is off by |t| units, and t is up to 8 here.
    """
    for i, (got, peer, want) in enumerate(zip(found, other, exact, strict=True)):
        units = 8 if got.dtype is torch.float32 else 1
        rounding = units * torch.finfo(got.dtype).eps * want.norm()
        error, peers = ((t.double() - want).norm() for t in (got, peer))
        assert error <= 1.5 * peers + rounding, (i, float(error), float(peers), float(rounding))


# Those that differ: gate, up and down in turn are in a larger block of 16 ranks than the others.
RANKS = (
    *((R, R, R) for R in (1, 8, 16, 32, 64)),
    *((24, 5, 16), (5, 24, 16), (8, 8, 40)),
)


@pytest.mark.usefixtures("unchecked")
@every_activation
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_values_and_gradients_are_as_exact_as_todays(
    dtype: torch.dtype, ranks: tuple[int, int, int], activation: str
) -> None:
    if dtype is torch.float32 and max(ranks) > 32:
        return  # by PyTorch's GEMMs
    for M, H in ((1, 33), (110, 130)):
        sample = draw(M, H, ranks, dtype)
        exact = reference(sample.to(torch.float64), activation)
        found = ours(sample, activation, is_stacked=M > 1)
        assert_as_exact(found, by_torch(sample, activation), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_and_biases(dtype: torch.dtype) -> None:
    sample = draw(70, 130, (8, 5, 16), dtype, options=True)
    exact = reference(sample.to(torch.float64), "silu")
    assert_as_exact(ours(sample, "silu"), by_torch(sample, "silu"), exact)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("frozen", [(1, 0, 0), (0, 1, 1), (1, 1, 1)], ids=str)
def test_gradients_of_what_is_not_frozen_are_the_same(frozen: tuple[int, ...]) -> None:
    """Layers are frozen, then all A, then all B, then x."""
    sample = draw(40, 72, (8, 8, 8), torch.float32)
    want = dict(zip(map(id, sample.leaves), ours(sample, "silu")[1:], strict=True))
    layers = sample.layers
    tensors = [t for layer, off in zip(layers, frozen, strict=True) if off for t in layer[1:3]]
    for group in (tensors, [t[1] for t in layers], [t[2] for t in layers], [sample.x]):
        for t in group:
            t.requires_grad_(False)
        leaves = [t for t in sample.leaves if t.requires_grad]
        y = blocks.gated_mlp(sample.x, block_of(sample, "silu"))
        for t, grad in zip(leaves, torch.autograd.grad(y, leaves, sample.dy), strict=True):
            assert torch.equal(grad, want[id(t)])
        for t in group:
            t.requires_grad_()


@pytest.mark.parametrize("trained", ["lora_A lora_B", "lora_B", "bias", "rank_gate"])
def test_all_operands_frozen_but_some_of_down(trained: str) -> None:
    """dh is then needed by nothing."""
    sample = draw(40, 72, (8, 8, 8), torch.float32, options=True)
    want = dict(zip(map(id, sample.leaves), ours(sample, "silu")[1:], strict=True))
    for t in sample.leaves:
        t.requires_grad_(False)
    leaves = [getattr(sample.layers[2], name).requires_grad_() for name in trained.split()]
    y = blocks.gated_mlp(sample.x, block_of(sample, "silu"))
    for t, got in zip(leaves, torch.autograd.grad(y, leaves, sample.dy), strict=True):
        torch.testing.assert_close(got, want[id(t)], rtol=1e-5, atol=1e-5)


def test_few_rows_leave_the_gradients_to_gemms() -> None:
    """Partial sums would move more bytes than dg, du and h; splits of rows are as many as pay."""
    _, _, has_sums = configs.gated_update_backward(configs.H100, 48, 14336, 2, 16)
    assert not has_sums
    for M in (49, 512, 8192):
        _, rows, has_sums = configs.gated_update_backward(configs.H100, M, 4864, 2, 16)
        assert has_sums and (-(-M // rows) == 1 or -(-M // rows) * 48 <= M)


@pytest.mark.parametrize("ranks", [(8, 8, 8), (64, 64, 64)], ids=str)
def test_backward_repeats_and_then_works_in_place(ranks: tuple[int, int, int]) -> None:
    sample = draw(40, 72, ranks, torch.bfloat16)
    y = blocks.gated_mlp(sample.x, block_of(sample, "silu"))
    _, g, *_ = y.grad_fn.saved_tensors  # type: ignore[union-attr]
    before = g.clone()
    args = y, sample.leaves, sample.dy
    first, second = (torch.autograd.grad(*args, retain_graph=True) for _ in range(2))
    assert torch.equal(g, before)
    third = torch.autograd.grad(*args)
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, first, third))
    assert not torch.equal(g, before)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(*args)


def test_several_dy_at_once() -> None:
    sample = draw(20, 40, (8, 8, 8), torch.float32)
    y = blocks.gated_mlp(sample.x, block_of(sample, "silu"))
    dys = torch.stack([sample.dy, 2 * sample.dy])
    found = torch.autograd.grad(y, sample.leaves, dys, is_grads_batched=True)
    for got, want in zip(found, ours(sample, "silu")[1:], strict=True):
        torch.testing.assert_close(got, torch.stack([want, 2 * want]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(reentrant: bool) -> None:
    sample = draw(40, 72, (8, 8, 8), torch.bfloat16)
    want, block = ours(sample, "silu"), block_of(sample, "silu")
    gated = elementwise.gated_update
    with mock.patch.object(elementwise, "gated_update", side_effect=gated) as forwards:
        y = checkpoint(lambda x: blocks.gated_mlp(x, block), sample.x, use_reentrant=reentrant)
        y.backward(sample.dy)
    assert torch.equal(y, want[0])
    assert all(torch.equal(t.grad, g) for t, g in zip(sample.leaves, want[1:], strict=True))
    # Without reentrance the second forward stops at what it saves, before h.
    assert forwards.call_count == 1 + reentrant


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_where_pytorch_has_it(value: float) -> None:
    """In a row of g, in a column of A, and in S: no other element of a tile is touched."""
    for where in ("x", "weight", "lora_A"):
        sample = draw(40, 72, (8, 8, 8), torch.float32)
        with torch.no_grad():
            place = sample.x[3] if where == "x" else getattr(sample.layers[1], where)[2]
            place[5] = value
        for got, want in zip(ours(sample, "silu"), by_torch(sample, "silu"), strict=True):
            assert torch.equal(got.isfinite(), want.isfinite()), where


def test_update_keeps_float32_until_h() -> None:
    """An update below half a unit of g's rounding, which g + update in bfloat16 would lose."""
    g = torch.full((4, 16), 1.0, dtype=torch.bfloat16, device=DEVICE)
    u = torch.full((4, 16), 256.0, dtype=torch.bfloat16, device=DEVICE)
    S, zero = torch.ones(4, 1).to(g), torch.zeros(4, 1).to(g)
    B = torch.full((16, 1), 2.0**-8).to(g)  # an eighth of u's units at 256, scaled by 0.75 more
    h = eager_mlp.gated_update(g, u, Updates(S, zero, B, B, 0.75, 1.0), "silu")
    exact = torch.nn.functional.silu(torch.tensor(1 + 0.75 * 2.0**-8).double()) * 256
    assert (h.double() - exact).abs().max() <= exact * 2.0**-9
    without = torch.nn.functional.silu(torch.tensor(1.0).double()) * 256
    assert (without - exact).abs() > exact * 2.0**-9


def test_no_rows_launch_nothing() -> None:
    sample = draw(0, 33, (8, 8, 8), torch.bfloat16)
    y, dx, *grads = ours(sample, "silu")
    assert y.shape == dx.shape == (0, K)
    assert not any(grad.any() for grad in grads)


def test_reasons_for_the_other_order() -> None:
    device = torch.device(DEVICE)
    layers = draw(4, 33, (8, 8, 65), torch.bfloat16).layers
    assert eager_mlp.updates_reason(layers, device, torch.bfloat16, "silu") == "rank 65 is above 64"
    reason = eager_mlp.updates_reason(layers, device, torch.float32, "silu")
    assert reason == "lora_A is in torch.bfloat16, not in x's torch.float32"
    for name in ("lora_A", "lora_B"):
        wide = [layer._replace(**{name: getattr(layer, name).double()}) for layer in layers]
        reason = eager_mlp.updates_reason(wide, device, torch.bfloat16, "silu")
        assert reason == f"{name} is in torch.float64, not in x's torch.bfloat16"


def test_each_kernel_that_is_compiled_is_checked_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles for the ranks, the dtype and a number of columns that 16 divides."""
    compared: list[Any] = []
    monkeypatch.setattr(eager_mlp, "kernel_reasons", {})
    monkeypatch.setattr(eager_mlp, "compare_updates", lambda *args: compared.append(args[:4]))
    device = torch.device(DEVICE)
    kinds = [
        *(("silu", torch.bfloat16, H, (8, 8, 8)) for H in (32, 33)),
        ("gelu", torch.bfloat16, 32, (8, 8, 8)),
        ("silu", torch.float16, 32, (8, 8, 8)),
        *(("silu", torch.bfloat16, 32, R) for R in ((16, 8, 8), (8, 16, 8), (8, 8, 16))),
    ]
    for activation, dtype, H, ranks in kinds * 2:
        layers = draw(1, H, ranks, dtype).layers
        assert eager_mlp.updates_reason(layers, device, dtype, activation) is None
    assert compared == [(act, dtype, H == 32, ranks) for act, dtype, H, ranks in kinds]


def test_amd_keeps_the_other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    amd = configs.INTERPRETER.__class__("hip", 0, 304, 64 << 10)
    monkeypatch.setattr(eager_mlp, "target_of", lambda device: amd)
    reason = eager_mlp.compare_updates(
        "silu", torch.bfloat16, True, (8, 8, 8), torch.device(DEVICE)
    )
    assert reason is not None and "NVIDIA's GPUs alone" in reason


def _swap_gradients(*args: Any) -> None:
    partials, dA, dB_gate, dB_up = args
    elementwise.gated_gradients(partials, dA, dB_up, dB_gate)


def _double_dA(*args: Any) -> None:
    elementwise.gated_gradients(*args)
    args[1].mul_(2)


def _without_scale(*args: Any) -> Tensor:
    return elementwise.gated_update(*args[:6], 1.0, *args[7:])


def _without_dS(*args: Any) -> None:
    elementwise.gated_update_backward(*args[:7], torch.zeros_like(args[7]), *args[8:])


def _without_the_last_rows(*args: Any) -> None:
    elementwise.gated_update_backward(*args)
    args[13][-1] = 0


FAULTS = {
    "gradients swapped": ("gated_gradients", _swap_gradients, "b_gate"),
    "dA doubled": ("gated_gradients", _double_dA, "lora_A"),
    "the gate's scale left out": ("gated_update", _without_scale, "h"),
    "the update of dh left out": ("gated_update_backward", _without_dS, "g"),
    "the last row left out": ("gated_update_backward", _without_the_last_rows, "u"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_kernels_that_fail_their_check_are_not_used(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, broken, said = FAULTS[fault]
    launch = eager_mlp._launch

    def broken_launch(which: str, *args: Any) -> Any:
        return broken(*args) if which == name else launch(which, *args)

    monkeypatch.setattr(eager_mlp, "_launch", broken_launch)
    monkeypatch.setattr(eager_mlp, "kernel_reasons", {})
    sample = draw(20, 40, (8, 8, 8), torch.bfloat16)
    block = block_of(sample, "silu")
    assert said in str(blocks.updates_reason(block, sample.x.device)).split()[-1]
    exact = reference(sample.to(torch.float64), "silu")
    assert_as_exact(ours(sample, "silu"), by_torch(sample, "silu"), exact)


@pytest.mark.parametrize("rank", [16, 32, 64])
def test_kernels_pass_their_check(rank: int) -> None:
    for dtype, is_even in itertools.product((torch.bfloat16, torch.float16), (True, False)):
        args = "gelu", dtype, is_even, (rank, rank, rank), torch.device(DEVICE)
        assert eager_mlp.compare_updates(*args) is None
