"""The kernel of a head's loss beside float64, and its check on a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

import lora_kernels
from lora_kernels.backends.eager import head
from lora_kernels.backends.eager.head import KERNEL_DTYPES
from lora_kernels.backends.triton import (
    configs,
    elementwise,
    launch,
    softmax,
)
from lora_kernels.core.call import HeadSpec
from lora_kernels.oracle.case import judge
from lora_kernels.oracle.head_case import HeadCase
from tests.support.engines import assert_within
from tests.support.interpreter import set_program
from tests.triton.device import DEVICE

every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
BLOCK = configs.softmax(configs.INTERPRETER, 10**6).block_n
# In float32: sums of some thousand terms and exponentials of logits up to 16, as in the check.
CLOSE: Any = {"rtol": 2.0**-17, "atol": 2.0**-17}
SIZES = (1, 1023, 1024, 1025, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7)


def sample(columns: int, dtype: torch.dtype, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Logits, and labels in the first and the last column and between."""
    generator = torch.Generator().manual_seed(4)
    y = 4 * torch.randn(rows, columns, generator=generator)
    labels = torch.tensor([0, columns - 1, columns // 2] * rows)[:rows]
    return y.to(DEVICE, dtype), labels.to(DEVICE)


def exact(
    y: Tensor, labels: Tensor, scale: float, cap: float, weight: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    """The loss, and `weight` times its gradient in z times the cap's slope, in float64."""
    a = (scale * y.double()).requires_grad_()
    z = cap * torch.tanh(a) if cap else a
    loss = F.cross_entropy(z, labels, label_smoothing=smoothing, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), a)
    return loss.detach(), gradient * (weight / (cap or 1.0))


@every_dtype
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize(("scale", "cap"), [(0.7, 0.0), (0.2, 3.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_kernel_is_close_to_float64(
    columns: int, dtype: torch.dtype, scale: float, cap: float, smoothing: float
) -> None:
    y, labels = sample(columns, dtype)
    args = scale, cap, 2.0, smoothing
    loss, gradient = exact(y, labels, *args)
    got = y.clone()
    found = elementwise.cross_entropy(got, labels, *args, True)
    # z has a rounding and tanh's few of cap; a sum of `columns` positive terms is off by the units
    # of one lane's sum and the tree's, which is 2 · columns / BLOCK + 12.
    unit = 2.0**-24
    sums = (2 * columns / BLOCK + 24) * unit
    of_z = 8 * unit * (cap or float(y.abs().max()) * scale)
    assert ((found.double() - loss).abs() <= sums + 2 * of_z + 4 * unit * loss.abs()).all()
    error, eps = (got.double() - gradient).abs(), torch.finfo(dtype).eps
    a = scale * y.double()
    terms = (cap * torch.tanh(a) if cap else a).softmax(1) + smoothing / columns
    terms += F.one_hot(labels, columns)
    bound = 0.51 * eps * gradient.abs() + 2.0 * (sums + 4 * of_z) * terms
    bound += torch.finfo(dtype).smallest_normal * eps
    assert (error <= bound).all(), (error / bound).max()


@every_dtype
def test_kernel_without_gradient_leaves_the_logits(dtype: torch.dtype) -> None:
    y, labels = sample(2 * BLOCK + 7, dtype)
    before, written = y.clone(), y.clone()
    loss = elementwise.cross_entropy(y, labels, 0.7, 0.0, 0.0, 0.1, False)
    assert torch.equal(y, before)
    assert torch.equal(loss, elementwise.cross_entropy(written, labels, 0.7, 0.0, 1.0, 0.1, True))
    assert not torch.equal(written, before)


@pytest.mark.parametrize("columns", SIZES)
def test_kernel_writes_no_row_but_its_own(columns: int) -> None:
    memory = torch.full((5, columns), 7.0, device=DEVICE)
    memory[1:4], labels = sample(columns, torch.float32)
    elementwise.cross_entropy(memory[1:4], labels, 1.0, 0.0, 1.0, 0.0, True)
    assert (memory[[0, 4]] == 7.0).all() and not (memory[1:4] == 7.0).any()


def test_kernel_of_no_rows_launches_nothing() -> None:
    y, labels = torch.empty(0, 8, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert elementwise.cross_entropy(y, labels, 1.0, 0.0, 1.0, 0.0, True).shape == (0,)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 5, BLOCK + 3])
def test_logits_that_are_not_finite_give_what_pytorch_gives(value: float, at: int) -> None:
    y, labels = sample(BLOCK + 9, torch.float32)
    y[1, at] = value  # not row 1's label
    want = y.double().requires_grad_()
    loss = F.cross_entropy(want, labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), want)
    found = elementwise.cross_entropy(y, labels, 1.0, 0.0, 1.0, 0.0, True)
    torch.testing.assert_close(found.double(), loss, **CLOSE, equal_nan=True)
    torch.testing.assert_close(y.double(), gradient, **CLOSE, equal_nan=True)


@pytest.mark.parametrize("label", [-1, BLOCK + 9, 2**32])
def test_row_with_a_wrong_label_is_nan(label: int) -> None:
    y, labels = sample(BLOCK + 9, torch.float32)
    right, want = y.clone(), labels.clone()
    labels[1] = label
    loss = elementwise.cross_entropy(y, labels, 1.0, 0.0, 1.0, 0.0, True)
    expected = elementwise.cross_entropy(right, want, 1.0, 0.0, 1.0, 0.0, True)
    assert loss[1].isnan() and y[1].isnan().all()
    assert torch.equal(loss[[0, 2]], expected[[0, 2]]) and torch.equal(y[[0, 2]], right[[0, 2]])


def test_first_logits_of_minus_infinity_count_for_nothing() -> None:
    y, labels = sample(BLOCK + 9, torch.float32)
    y[1, : BLOCK + 3] = -math.inf
    loss, _ = exact(y, labels, 1.0, 0.0, 1.0, 0.0)
    found = elementwise.cross_entropy(y, labels, 1.0, 0.0, 1.0, 0.0, True)
    torch.testing.assert_close(found.double(), loss, **CLOSE)
    assert (y[1, : BLOCK + 3] == 0).all() and y.isfinite().all()


@pytest.mark.parametrize(("rows", "columns"), [(2**15, 2**16 - 1), (2**15, 2**16)])
def test_offsets_that_32_bits_do_not_hold_are_64_bits_wide(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[dict[str, Any]] = []
    monkeypatch.setattr(launch, "run", lambda kernel, config, **given: launched.append(given))
    y = torch.empty((), dtype=torch.bfloat16, device=DEVICE).expand(rows, columns)
    elementwise.cross_entropy(y, y[:, 0], 1.0, 0.0, 1.0, 0.0, True)
    (given,) = launched
    assert given["columns"] == columns and given["grid"] == (rows,)
    assert given["WIDE"] is (rows * columns >= 2**31)


@triton.jit
def offset_kernel(out_ptr, columns, WIDE: tl.constexpr):
    tl.store(out_ptr, softmax.offset(tl.program_id(0), columns, WIDE))


def test_offset_of_a_late_row_is_64_bits_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    set_program(1 << 16, monkeypatch)
    out = torch.zeros(1, dtype=torch.int64)
    offset_kernel[(1,)](out, 1 << 16, WIDE=True)
    assert out.item() == 1 << 32


# The check


def test_kernel_passes_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "kernel_reasons", {})
    assert head.kernel_reason(torch.device(DEVICE), torch.bfloat16) is None
    reason = head.kernel_reason(torch.device(DEVICE), torch.float64)
    assert reason == "Triton's kernels do not take torch.float64"


def wrong_loss(y: Tensor, *args: Any) -> Tensor:
    return elementwise.cross_entropy(y, *args) * (1 + 2.0**-12)


def wrong_gradient(y: Tensor, *args: Any) -> Tensor:
    loss = elementwise.cross_entropy(y, *args)
    if args[-1]:
        y.mul_(1 + 2.0**-6)
    return loss


def nan_in_the_gradient(y: Tensor, *args: Any) -> Tensor:
    loss = elementwise.cross_entropy(y, *args)
    if args[-1]:
        y[1, 7] = math.nan
    return loss


def without_label(y: Tensor, labels: Tensor, *args: Any) -> Tensor:
    return elementwise.cross_entropy(y, labels.flip(0), *args)


def without_smoothing(y: Tensor, *args: Any) -> Tensor:
    return elementwise.cross_entropy(y, *args[:4], 0.0, args[-1])


def always_in_place(y: Tensor, *args: Any) -> Tensor:
    return elementwise.cross_entropy(y, *args[:-1], True)


def failing(*args: Any) -> Tensor:
    raise RuntimeError("no kernel image")


FAULTS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "the loss off by 2⁻¹²": (wrong_loss, "differs from PyTorch's ops in the loss"),
    "the gradient off by two units": (wrong_gradient, "in the gradient"),
    "a NaN in the gradient": (nan_in_the_gradient, "in the gradient"),
    "another label": (without_label, "in the loss"),
    "no smoothing": (without_smoothing, "smoothing 0.1) differs"),
    "a gradient without has_gradient": (always_in_place, "changes logits without it"),
    "an exception": (failing, "raised RuntimeError: no kernel image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_kernel_that_fails_its_check_is_not_used(fault, monkeypatch) -> None:
    broken, said = FAULTS[fault]
    monkeypatch.setattr(head, "_launch_cross_entropy", broken)
    monkeypatch.setattr(head, "kernel_reasons", {})
    reason = head.kernel_reason(torch.device(DEVICE), torch.bfloat16)
    assert reason is not None and said in reason
    monkeypatch.setattr(head, "_launch_cross_entropy", None)  # is not called
    y, labels = sample(50, torch.bfloat16)
    spec, want = HeadSpec(1.0, 0.0, torch.bfloat16, torch.bfloat16), y.clone()
    found = head.loss_of_logits_(y, labels[:, None], spec, 1.0, True)
    loss = head.loss_of_logits_by_torch_(want, labels[:, None], spec, 1.0, True)
    assert torch.equal(found, loss) and torch.equal(y, want)


# The op


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by whether a gradient is wanted, at each launch of a call of the op."""
    found: list[bool] = []
    launch_loss = head._launch_cross_entropy

    def record(*args: Any) -> Tensor:
        found.append(args[-1])
        return launch_loss(*args)

    assert head.kernel_reason(torch.device(DEVICE), torch.float32) is None
    monkeypatch.setattr(head, "_launch_cross_entropy", record)
    return found


@every_dtype
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapter_dtype": torch.float32, "logit_softcap": 3.0, "logit_scale": 0.75},
        {"label_smoothing": 0.1, "logit_scale": 1.5, "trained_weight": True},
        {"frozen": ("x", "lora_A", "lora_B", "bias")},
    ],
    ids=str,
)
def test_cross_entropy_by_the_kernel_is_within_tolerance(
    options: dict[str, Any], dtype: torch.dtype, launches: list[bool]
) -> None:
    case = replace(HeadCase(23, 65, 40, 5, chunk_rows=5), dtype=dtype, **options)
    with lora_kernels.backend("eager"):
        assert_within(case, judge(case))
    assert len(launches) >= 4 and launches[0] is ("frozen" not in options)


def test_labels_with_strides_are_read_as_they_are(launches: list[bool]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 16, generator=generator).to(DEVICE) for n in (6, 50))
    A, B = torch.ones(2, 16, device=DEVICE), torch.ones(50, 2, device=DEVICE)
    labels = torch.arange(12, device=DEVICE)[::2]
    with lora_kernels.backend("eager"):
        got, want = (
            lora_kernels.lora_linear_cross_entropy(x, W, A, B, each)
            for each in (labels, labels.clone())
        )
    assert torch.equal(got, want) and len(launches) == 2


def test_chunk_of_the_kernel_has_the_bytes_of_its_logits(launches: list[bool]) -> None:
    device = torch.device(DEVICE)
    for dtype, itemsize in ((torch.bfloat16, 2), (torch.float32, 4), (torch.float64, 4)):
        limit = head.CHUNK_BYTES_ON_GPU if DEVICE == "cuda" else head.CHUNK_BYTES
        assert head.loss_rows(20_000, device, dtype) == limit // (itemsize * 20_000)


def test_gradient_of_saturated_logits_is_close_relatively() -> None:
    """1 − tanh² by tanh cancels where the cap is reached."""
    y = torch.tensor([[6.0, -7.0, 8.0, 0.5]], device=DEVICE)
    labels, wide = torch.tensor([0], device=DEVICE), y.double()
    p = (3.0 * torch.tanh(wide)).softmax(1)
    p[0, 0] -= 1
    e = torch.exp(-2 * wide.abs())
    elementwise.cross_entropy(y, labels, 1.0, 3.0, 1.0, 0.0, True)
    torch.testing.assert_close(y.double(), p * 4 * e / (1 + e) ** 2, rtol=2.0**-17, atol=0)


def test_small_loss_of_large_logits_keeps_its_bits() -> None:
    y = torch.tensor([[1000.0, 990.0, 985.0, -3.0]], device=DEVICE)
    labels = torch.tensor([0], device=DEVICE)
    want = F.cross_entropy(y.double(), labels, reduction="none")
    found = elementwise.cross_entropy(y, labels, 1.0, 0.0, 1.0, 0.0, False)
    torch.testing.assert_close(found.double(), want, rtol=0, atol=4 * 2.0**-24)


@pytest.mark.parametrize("level", [-1e5, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_large_negative_logits_have_a_finite_loss(dtype: torch.dtype, level: float) -> None:
    y = torch.tensor([[1.0, 1.0, 1.25, 1.5]]).mul(level).to(DEVICE, dtype)
    labels = torch.tensor([0], device=DEVICE)
    want = F.cross_entropy(y.double(), labels, reduction="none")
    found = elementwise.cross_entropy(y, labels, 1.0, 0.0, 1.0, 0.0, True)
    torch.testing.assert_close(found.double(), want, rtol=2.0**-17, atol=2.0**-17)
    assert torch.equal(y.double().cpu(), torch.tensor([[-0.5, 0.5, 0.0, 0.0]], dtype=torch.float64))


# A class of faults


def by_pytorch(
    y: Tensor, labels: Tensor, scale: float, cap: float, weight: float, eps: float, gradient: bool
) -> Tensor:
    """A right kernel, in float32."""
    spec = HeadSpec(1.0, 0.0, y.dtype, y.dtype, scale * (cap or 1.0), cap, 1.0, eps)
    of_y = y if gradient else y.clone()
    return head.loss_of_logits_by_torch_(of_y, labels[:, None], spec, weight, gradient)


@pytest.mark.parametrize("has_cap", [False, True])
@every_dtype
def test_check_notices_one_element_that_is_off(
    dtype: torch.dtype, has_cap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few bounds, in any row and column, in one dtype, with a cap or without."""
    fault: tuple[str, int, int | None, float]

    def kernel(y: Tensor, *args: Any) -> Tensor:
        before, (labels, _, cap, weight, _, has_gradient) = y.clone(), args
        loss = by_pytorch(y, *args)
        if y.dtype is not dtype or bool(cap) is not has_cap:
            return loss
        what, row, column, sign = fault
        at, info = (row, int(labels[row]) if column is None else column), torch.finfo(dtype)
        if what == "loss":
            loss[row] += sign * 2.0**-16 * (1 + loss[row])
        elif what == "a bit of one loss" and has_gradient is (sign > 0):
            loss[row] *= 1 + 2.0**-22
        elif what == "gradient" and has_gradient:
            bound = (2.0**-16 + info.eps) * y[at].abs() + 2.0**-24 * weight + info.smallest_normal
            y[at] += sign * 3 * bound
        elif what == "logits" and not has_gradient:
            y[at] = before[at] * (1 + 2 * info.eps)
        return loss

    monkeypatch.setattr(head, "_launch_cross_entropy", kernel)
    device, random = torch.device("cpu"), Random(f"{dtype} {has_cap}")
    said = {"loss": "in the loss", "gradient": "in the gradient"}
    columns = None, 0, 1, 4095, 4096, 5001, 5002
    for what in ("loss", "gradient", "gradient", "gradient", "logits", "a bit of one loss"):
        fault = what, random.randrange(3), random.choice(columns), random.choice((-1.0, 1.0))
        found = str(head.compare_kernel(device))
        assert said.get(what, "another loss with the gradient, or changes logits") in found, fault
        assert f"{dtype} (cap {5.0 * has_cap}" in found, fault
    fault = "none", 0, 0, 1.0
    assert head.compare_kernel(device) is None


def test_logits_with_gaps_are_left_to_pytorchs_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's rows follow one another."""
    assert head.kernel_reason(torch.device(DEVICE), torch.float32) is None
    monkeypatch.setattr(head, "_launch_cross_entropy", None)  # is not called
    y, labels = sample(50, torch.float32)
    spec, want = HeadSpec(1.0, 0.0, torch.float32, torch.float32), y.clone()
    loss = head.loss_of_logits_by_torch_(want, labels[:, None], spec, 1.0, True)
    for wide in (F.pad(y, (0, 3), value=7.0), F.pad(y, (0, 50), value=7.0).view(6, 50)):
        got = wide[:, :50] if wide.shape[1] > 50 else wide[::2]
        assert torch.equal(head.loss_of_logits_(got, labels[:, None], spec, 1.0, True), loss)
        assert torch.equal(got, want) and (wide.flatten() == 7.0).sum() == wide.numel() - 150


# A class of calls


class Draw(NamedTuple):
    """A call of the loss, by the kernel or by PyTorch's ops. weight: of the gradient."""

    y: Tensor
    labels: Tensor
    spec: HeadSpec
    weight: float


LEVELS = (0.0, 1e3, -1e3, 1e5, -1e5, 1e30, -1e30, torch.finfo(torch.float32).min)


def draw(random: Random, dtype: torch.dtype, block: int) -> Draw:
    """Draw rows of logits around one level, with holes of -inf, and options beside."""
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    seams = {1, 2, block - 1, block, block + 1, 2 * block, 2 * block + 1, 4 * block - 3}
    rows, columns = random.randint(1, 3), random.choice(sorted(seams))
    level = random.choice(LEVELS) if random.random() < 0.6 else 0.0
    if dtype is torch.float16:
        level = min(max(level, -6e4), 6e4)
    spread = 2.0 ** random.uniform(-10, 12) + abs(level) * random.choice((0.0, 2.0**-7))
    y = level + spread * torch.randn(rows, columns, generator=generator).clamp(-4, 4)
    y = y.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    labels = torch.randint(0, columns, (rows,), generator=generator)
    labels[0] = random.choice((0, columns - 1, min(block, columns) - 1, columns // 2))
    if random.random() < 0.3:  # the label has the largest logit, so that the loss is small
        labels = y.argmax(1)
    eps = random.choice((0.0, 0.0, 1e-3, 0.5, 1.0)) if abs(level) < 1e38 else 0.0  # or Σz is inf
    if not eps and random.random() < 0.3:
        y[torch.rand(rows, columns, generator=generator) < random.choice((0.1, 0.9))] = -math.inf
        y[range(rows), labels] = max(level, torch.finfo(dtype).min)
    # Powers of two where a rounding of scale·y would be larger than the spread.
    exponents = random.choice((-3, 0, 0, 2)), random.choice((-1, 0, 1))
    scale, inverse_temperature = (2.0**e for e in exponents)
    if not level and random.random() < 0.5:
        scale, inverse_temperature = scale * 0.7, inverse_temperature * 1.3
    if abs(level) > 1e38:
        scale = inverse_temperature = 1.0
    cap = random.choice((0.0, 0.0, 3.0, 30.0, 1e3))
    weight = 2.0 ** random.randint(-20, 14) if dtype is not torch.float16 else 256.0
    if dtype is torch.float32 and random.random() < 0.2:
        weight = 256.0 * 300.0
    spec = HeadSpec(1.0, 0.0, dtype, dtype, scale, cap, inverse_temperature, eps)
    return Draw(y.to(DEVICE), labels.to(DEVICE), spec, weight)


def judge_draw(given: Draw, loss: Tensor, gradient: Tensor, lanes: int, by_kernel: bool) -> None:
    """Compare with float64 within bounds of each element, derived from float32's roundings.

    lanes: the number of parts of a sum. by_kernel: the slope of a cap is close relatively,
    where PyTorch's ops subtract tanh² from one.
    """
    y, labels, spec, weight = given
    unit, eps, columns = 2.0**-24, spec.label_smoothing, y.shape[1]
    scale, cap = head._scale_and_cap(spec)
    a = y.double() * scale
    z, slope = (cap * torch.tanh(a), 1 / torch.cosh(a).square()) if cap else (a, torch.ones(()))
    is_exact = math.frexp(scale)[0] == 0.5 and not cap
    of_z = cap * 8 * unit + (torch.zeros_like(z) if is_exact else z.abs() * 2 * unit)
    top, at = z.max(1, keepdim=True)
    below = top - z
    p, target = z.softmax(1), z.gather(1, labels[:, None])
    # Of exp(z − top): the difference, exp and its argument's reduction, and each rescaling.
    of_exp = unit * (4 + 4 * below) + of_z + of_z.gather(1, at)
    sums = (8 * columns / lanes + 24) * unit
    of_whole = (p * of_exp.where(p > 0, 0.0)).sum(1, keepdim=True) + sums
    mean = z.mean(1, keepdim=True) if eps else torch.zeros(())
    wanted = (1 - eps) * target + eps * mean
    want = ((z - top).exp().sum(1, keepdim=True).log() + (top - wanted))[:, 0]
    of_loss = of_whole + of_z.gather(1, at) + of_z.gather(1, labels[:, None])
    of_loss = of_loss + unit * (4 * (top - wanted).abs() + 4 * want[:, None].abs() + 4)
    if eps:
        of_loss = of_loss + (sums + 8 * unit) * z.abs().mean(1, keepdim=True)
        of_loss = of_loss + 4 * unit * target.abs()
    assert ((loss.double() - want).abs() <= of_loss[:, 0]).all(), (given, loss, want)
    one = F.one_hot(labels, columns) * (1 - eps)
    dz = weight * (p - one - eps / columns)
    error = p * (of_exp.where(p > 0, 0.0) + of_whole + 8 * unit) + 4 * unit * (one + eps / columns)
    error = error * slope * weight + dz.abs() * slope * (
        16 + 8 * a.abs().clamp(max=1e3)
    ) * unit * bool(cap)
    if not by_kernel and cap:
        error = error + dz.abs() * 8 * unit
    dtype = torch.finfo(gradient.dtype)
    error = error + 0.51 * dtype.eps * (dz * slope).abs() + dtype.smallest_normal * dtype.eps
    error = error + 2.0**-120 * weight  # exponentials below float32's normal numbers
    is_close = (gradient.double() - dz * slope).abs() <= error
    assert is_close.all(), (given, gradient[~is_close], (dz * slope)[~is_close])


def run_draws(
    dtype: torch.dtype, seed: int, count: int, lanes: int,
    call: Callable[[Tensor, Tensor, HeadSpec, float, bool], Tensor], by_kernel: bool,
) -> None:  # fmt: skip
    random = Random(seed)
    for _ in range(count):
        given = draw(random, dtype, lanes)
        (rows, columns), labels = given.y.shape, given.labels
        memory = torch.full((rows + 2, columns), 7.0, dtype=dtype, device=DEVICE)
        y = memory[1 : rows + 1].copy_(given.y)
        apart = torch.stack([labels, labels - columns], 1)[:, :1]
        loss = call(y, apart, given.spec, given.weight, True)
        assert loss.shape == (rows,) and loss.dtype is torch.float32
        assert (memory[[0, -1]] == 7.0).all()
        judge_draw(given, loss, y, lanes, by_kernel)
        same = given.y.clone()
        assert torch.equal(call(same, apart, given.spec, given.weight, False), loss)
        assert not by_kernel or torch.equal(same, given.y)


@every_dtype
@pytest.mark.parametrize("block", [16, 256])
def test_kernel_of_drawn_calls_is_close_to_float64(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small block has several passes over few columns, each with its seams."""
    assert head.kernel_reason(torch.device(DEVICE), dtype) is None
    tiles = configs.ColumnTiles(block, 4, 1)
    monkeypatch.setattr(configs, "softmax", lambda target, columns: tiles)
    monkeypatch.setattr(head, "loss_of_logits_by_torch_", None)  # is not called
    run_draws(dtype, 11 + block, 10, block, head.loss_of_logits_, True)


@every_dtype
def test_pytorchs_ops_of_drawn_calls_are_close_to_float64(dtype: torch.dtype) -> None:
    """The same formula a second time."""
    for block in (16, 256):
        run_draws(dtype, 12 + block, 20, block, head.loss_of_logits_by_torch_, False)
