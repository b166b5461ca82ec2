"""The gated MLP of the eager backend: y = down(h), h = act(g) ⊙ u, without keeping h.

The backward computes dh first. One elementwise kernel then reads g, u and dh, and writes dg, du
and h, which takes dh's memory; dA follows from h. So g and u are read once, and h is never beside
dh. Where autograd frees the graph, dg and du take the memory of g and u.

The elementwise kernels are Triton's. On each device they are compared with PyTorch's ops before
their first use. Where they are not used, PyTorch's ops run, with two temporaries of h's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...core.call import Grads, Needs, Operands, Saved, Spec
from ...core.problem import KERNEL_DTYPES
from .. import checked
from . import linear as eager

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda g: functional.gelu(g, approximate="tanh"),
    "gelu": functional.gelu,
}
_GELUS = {"gelu_tanh": "tanh", "gelu": "none"}  # PyTorch's names of the two formulas


class Gated(NamedTuple):
    """The gradients of h = act(g) ⊙ u, and h, as `gated_backward` makes them."""

    g: Tensor
    u: Tensor
    h: Tensor


def gated(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """Return h = act(g) ⊙ u for contiguous g and u of one shape and dtype.

    >>> gated(torch.tensor([0.0, 50.0]), torch.tensor([3.0, 2.0]), "silu")
    tensor([  0., 100.])
    """
    if kernel_reason(g.device, g.dtype) is not None:
        return ACTIVATIONS[activation](g).mul_(u)
    if checked.is_dispatched(g):
        return torch.ops.lora_kernels.gated(g, u, activation)  # type: ignore[no-any-return]
    return _launch_gated(g, u, activation)


def gated_backward(g: Tensor, u: Tensor, dh: Tensor, in_place: bool, activation: str) -> Gated:
    """Return dg, du and h for dh, whose memory is overwritten. All are contiguous.

    in_place: whether g and u may be overwritten too.
    """
    if kernel_reason(g.device, g.dtype) is not None:
        return gated_backward_by_torch(g, u, dh, in_place, activation)
    grads = Gated(*((g, u) if in_place else (torch.empty_like(g), torch.empty_like(u))), dh)
    if checked.is_dispatched(g):
        outputs = {"dg": grads.g, "du": grads.u, "h": grads.h}
        torch.ops.lora_kernels.gated_backward(g, u, dh, activation, **outputs)
    else:
        _launch_gated_backward(g, u, dh, *grads, activation)
    return grads


def gated_backward_by_torch(
    g: Tensor, u: Tensor, dh: Tensor, in_place: bool, activation: str
) -> Gated:
    """`gated_backward` by PyTorch's ops; u is not overwritten."""
    a, da = ACTIVATIONS[activation](g), torch.mul(dh, u)
    du, h = dh.mul_(a), a.mul_(u)
    return Gated(_activation_backward(da, g, activation, out=g if in_place else da), du, h)


def split_gradient(
    g: Tensor, u: Tensor, dh: Tensor | None, activation: str
) -> tuple[Tensor | None, Tensor | None]:
    """Return dg and du for dh, or None for None, without writing to memory of the arguments."""
    if dh is None:
        return None, None
    dg = _activation_backward(dh * u, g, activation)
    return dg, dh * ACTIVATIONS[activation](g)


def _activation_backward(
    da: Tensor, g: Tensor, activation: str, out: Tensor | None = None
) -> Tensor:
    """Return dg for the gradient of act(g), in the memory of `out` unless it is None."""
    op: Any = torch.ops.aten.silu_backward
    how = {}
    if activation != "silu":
        op, how = torch.ops.aten.gelu_backward, {"approximate": _GELUS[activation]}
    return op(da, g, **how) if out is None else op.grad_input(da, g, **how, grad_input=out)  # type: ignore[no-any-return]


def general_down_backward(
    dy: Tensor,
    g: Tensor,
    u: Tensor,
    operands: Operands,
    saved: Saved,
    spec: Spec,
    needs: Needs,
    in_place: bool,
    activation: str,
) -> tuple[Tensor | None, Tensor | None, Grads]:
    """Compute dg and du [M, K], and the gradients of the down-projection, for dy [M, N].

    Args:
        g, u: [M, K], contiguous.
        operands: of the down-projection. x has h's shape and dtype, and its values are not read.
        needs: of the down-projection. x: whether dg and du are needed.
        in_place: whether g and u may be overwritten.
    """
    if not needs.x:
        if needs.lora_A:
            operands = operands._replace(x=gated(g, u, activation))
        return None, None, eager.lora_linear_backward(dy, operands, saved, spec, needs, "")
    gated_grads: list[Gated] = []

    def late_h(dh: Tensor) -> Tensor:
        gated_grads.append(gated_backward(g, u, dh, in_place, activation))
        return gated_grads[0].h

    grads = eager.lora_linear_backward(dy, operands, saved, spec, needs, "", late_h)
    return gated_grads[0].g, gated_grads[0].u, grads


def _launch_gated(g: Tensor, u: Tensor, activation: str) -> Tensor:
    from ..triton import elementwise

    return elementwise.gated(g, u, activation)


def _launch_gated_backward(
    g: Tensor, u: Tensor, dh: Tensor, dg: Tensor, du: Tensor, h: Tensor, activation: str
) -> None:
    from ..triton import elementwise

    elementwise.gated_backward(g, u, dh, dg, du, h, activation)


def _gated_backward_op(g: Tensor, u: Tensor, dh: Tensor, activation: str, **out: Tensor) -> None:
    _launch_gated_backward(g, u, dh, out["dg"], out["du"], out["h"], activation)


# Ops that are one kernel each, for modes: `bench.counter` counts the operands that they name.
# Outputs that are keywords are not read.
_LIB = torch.library.Library("lora_kernels", "FRAGMENT")
_OUTPUTS = "Tensor(a!) dg, Tensor(b!) du, Tensor(c!) h"
_LIB.define("gated(Tensor g, Tensor u, str activation) -> Tensor")
_LIB.define(f"gated_backward(Tensor g, Tensor u, Tensor dh, str activation, *, {_OUTPUTS}) -> ()")
for _name, _run, _fake in (
    ("gated", _launch_gated, lambda g, u, activation: torch.empty_like(g)),
    ("gated_backward", _gated_backward_op, lambda *args, **out: None),
):
    torch.library.register_kernel(f"lora_kernels::{_name}", None, _run, lib=_LIB)
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=_LIB)


kernel_reasons: checked.Reasons = {}


def kernel_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why PyTorch's ops make h, dg and du on this device; None if Triton's kernels do."""
    return checked.kernel_reason(kernel_reasons, compare_kernels, device, dtype)


def compare_kernels(device: torch.device) -> str | None:
    """Compare Triton's elementwise kernels with PyTorch's ops on `device`, and synchronize."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(3, 1037, generator=generator, dtype=torch.float64)
    sample[0, ::3] *= 8  # where the activations saturate
    for activation in ACTIVATIONS:
        for dtype in KERNEL_DTYPES:
            g, u, dh = sample.to(device, dtype).unbind()
            reason = _find_difference(g, u, dh, activation)
            if reason is not None:
                return f"Triton's elementwise kernel of {activation} in {dtype} {reason}"
    return None


def _find_difference(g: Tensor, u: Tensor, dh: Tensor, activation: str) -> str | None:
    want = gated_backward_by_torch(g, u, dh.clone(), False, activation)
    got = Gated(*(torch.empty_like(g) for _ in range(3)))
    _launch_gated_backward(g, u, dh, *got, activation)
    in_place = Gated(g.clone(), u.clone(), dh.clone())
    _launch_gated_backward(*in_place, *in_place, activation)
    if not all(map(torch.equal, got, in_place)):
        return "makes other bits in place"
    if not torch.equal(_launch_gated(g, u, activation), got.h):
        return "makes another h in the backward"
    # Each result is rounded to the dtype at most twice on either side. In float32, act(g) and its
    # slope are sums of terms up to 1 + |g|, each off by a few units.
    eps, tiny = torch.finfo(g.dtype).eps, torch.finfo(g.dtype).smallest_normal
    wide_g, wide_u, wide_dh = (t.double().abs() for t in (g, u, dh))
    terms = (1 + wide_g) * (wide_u + wide_dh + wide_u * wide_dh)
    for name, got_grad, want_grad in zip(Gated._fields, got, want, strict=True):
        bound = 4 * eps * want_grad.double().abs() + 2.0**-20 * terms + 4 * tiny * eps
        if not bool(((got_grad.double() - want_grad.double()).abs() <= bound).all()):
            return f"differs from PyTorch's ops in {'h' if name == 'h' else f'd{name}'}"
    return None
