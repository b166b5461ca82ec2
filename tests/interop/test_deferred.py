"""`DeferredLogits` beside the logits that it stands for, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.peft.deferred import DeferredLogits, defer_logits
from tests.support.assertions import assert_close_derived

B, T, K, V = 2, 5, 8, 11
f64 = torch.float64


def head_and_x(bias: bool = True) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(K, V, bias=bias, dtype=f64).requires_grad_(False)
    return head, torch.randn(B, T, K, dtype=f64, requires_grad=True)


def labels() -> Tensor:
    found = torch.randint(V, (B * T,), generator=torch.Generator().manual_seed(1))
    found[1] = -100
    return found


def rows(z: Any) -> Any:
    return z.reshape(-1, V)


RECORDED: dict[str, Callable[[Any], Any]] = {
    "nothing": rows,
    "scale": lambda z: rows(0.25 * z * 3 / 2),
    "soft cap": lambda z: rows(torch.tanh(z / 3) * 3),
    "scale, then soft cap": lambda z: rows(3.0 * (z * 0.5 / 3).tanh()),
    "soft cap, then scale": lambda z: rows(torch.tanh(z / 3) * 3 * 0.5),
    "tanh alone": lambda z: rows(z.tanh()),
    "float": lambda z: rows(z.double().contiguous().to(z.device)),
    "view": lambda z: z.view(-1, z.shape[-1]),
    "view of a size": lambda z: z.contiguous().view(z.size(0) * z.size(1), z.size(-1)),
    "flatten": lambda z: z.flatten(0, 1),
    "negative scale": lambda z: rows(z * -0.5),
}


def loss_of(make: Callable[[Any], Any], z: Any, **how: Any) -> Tensor:
    return F.cross_entropy(make(z), labels(), **how)


@pytest.mark.parametrize("how", [{}, {"reduction": "sum"}, {"ignore_index": 3}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", RECORDED)
def test_cross_entropy_of_recorded_ops_needs_no_logits(name: str, bias: bool, how: Any) -> None:
    head, x = head_and_x(bias)
    if how.get("ignore_index") == 3:
        how = how | {"reduction": "sum"}
    target = labels().clamp(min=0) if "ignore_index" in how else labels()
    logits = defer_logits(head, x)
    got = F.cross_entropy(RECORDED[name](logits), target, **how)
    want = F.cross_entropy(RECORDED[name](head(x)), target, **how)
    assert logits.op is None and logits.call.has_loss
    assert got.dtype is want.dtype
    grads = [torch.autograd.grad(loss, x)[0] for loss in (got, want)]
    assert_close_derived({"y": got, "x": grads[0]}, {"y": want, "x": grads[1]}, 1e-12)


@pytest.mark.parametrize("index", [(slice(None), slice(0, -1)), (..., slice(1, None), slice(None))])
def test_slices_of_rows_are_recorded(index: Any) -> None:
    head, x = head_and_x()
    logits = defer_logits(head, x)
    part = logits[index]
    assert type(part) is DeferredLogits and part.shape == head(x)[index].shape
    target = labels().view(B, T)[:, 1:].reshape(-1)
    got, want = (F.cross_entropy(rows(z), target) for z in (part, head(x)[index]))
    assert logits.op is None
    assert_close_derived({"": got}, {"": want}, 1e-12)


def test_it_answers_as_the_tensor() -> None:
    head, x = head_and_x()
    logits, tensor = defer_logits(head, x), head(x)
    for name in ("shape", "ndim", "device", "dtype", "requires_grad"):
        assert getattr(logits, name) == getattr(tensor, name), name
    assert logits.size() == tensor.size() and logits.size(-1) == V
    assert logits.dim() == 3 and logits.numel() == tensor.numel() and len(logits) == B
    assert logits.is_floating_point() and logits.op is None
    with torch.no_grad():
        assert not defer_logits(head, x).requires_grad


COMPUTED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "argmax": (lambda z: z.argmax(-1), "argmax"),
    "add": (lambda z: z + 1, "add"),
    "a tensor's scale": (lambda z: z * torch.tensor(2.0, dtype=f64), "mul by a Tensor"),
    "columns": (lambda z: z[..., :3], "getitem"),
    "a row": (lambda z: z[:, 0], "getitem"),
    "a mask": (lambda z: z[torch.ones(B, T, dtype=torch.bool)], "getitem"),
    "view of columns": (lambda z: z.reshape(-1), "reshape"),
    "transpose": (lambda z: z.transpose(0, 1), "transpose"),
    "log_softmax": (lambda z: F.log_softmax(z, -1), "log_softmax"),
    "cat": (lambda z: torch.cat([z, z]), "cat"),
    "a second tanh": (lambda z: z.tanh().tanh(), "a second tanh"),
    "tanh, then a negative number": (lambda z: z.tanh() * -1.0, "mul by -1.0 after tanh"),
    "division by 0": (lambda z: z / 0, "div by a int"),
    "in place": (lambda z: z.mul_(2.0) + 0.0, "mul_"),
    "integers": (lambda z: z.to(torch.int64), "to"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_any_other_op_computes_the_logits_and_is_named(name: str) -> None:
    run, op = COMPUTED[name]
    head, x = head_and_x()
    logits = defer_logits(head, x)
    got, want = run(logits), run(head(x))
    assert logits.op == op
    assert torch.equal(got, want)
    if got.requires_grad and got.isfinite().all():
        grads = [torch.autograd.grad(t.square().sum(), x)[0] for t in (got, want)]
        assert torch.equal(*grads)


LOSSES: dict[str, tuple[dict[str, Any], str]] = {
    "class weights": ({"weight": torch.rand(V, dtype=f64)}, "cross_entropy with class weights"),
    "smoothing": ({"label_smoothing": 0.1}, "cross_entropy with label smoothing"),
    "none": ({"reduction": "none"}, "cross_entropy with reduction 'none'"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_another_loss_computes_the_logits(name: str) -> None:
    how, reason = LOSSES[name]
    head, x = head_and_x()
    logits = defer_logits(head, x)
    got, want = (loss_of(rows, z, **how) for z in (logits, head(x)))
    assert torch.equal(got, want) and logits.op == reason


def test_a_write_in_place_reaches_the_objects_made_before() -> None:
    head, x = head_and_x()
    logits = defer_logits(head, x)
    flat = rows(logits)
    logits[:, 0] = 0.0
    tensor = head(x)
    want = rows(tensor)
    tensor[:, 0] = 0.0
    assert torch.equal(F.cross_entropy(flat, labels()), F.cross_entropy(want, labels()))


def test_logits_are_computed_once() -> None:
    head, x = head_and_x()
    calls: list[int] = []
    forward = head.forward
    head.forward = lambda x: calls.append(1) or forward(x)  # type: ignore[func-returns-value]
    logits = defer_logits(head, x)
    assert not calls
    logits.argmax(-1), logits.softmax(-1), logits * 2.0
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_of_the_head_s_call_is_kept(dtype: torch.dtype) -> None:
    head, x = head_and_x()
    head, x = head.float(), x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits, tensor = defer_logits(head, x), head(x)
    assert logits.dtype is tensor.dtype is torch.bfloat16
    assert torch.equal(logits.to(dtype).argmax(-1), tensor.to(dtype).argmax(-1))
    with torch.autocast("cpu", torch.bfloat16):
        logits = defer_logits(head, x)
    got, want = (F.cross_entropy(rows(z.float()), labels()) for z in (logits, tensor))
    assert logits.op is None
    assert abs(got - want) <= 2.0**-7 * abs(want)
