"""The gated MLP of the eager backend: y = down(h), h = act(g) ⊙ u, without keeping h.

The backward computes dh first. One elementwise kernel then reads g, u and dh, and writes dg, du
and h, which takes dh's memory; dA follows from h. So g and u are read once, and h is never beside
dh. Where autograd frees the graph, dg and du take the memory of g and u.

Where `updates_reason` is None the kernels also add the low-rank updates of gate and up to g and u,
and that of the down-projection to dh, in the tiles that they hold. They sum dA of the
down-projection and dB of gate and up from the same tiles. g and u are then kept without the
updates, no GEMM reads or writes them for an update or for one of these gradients, and the backward
writes no h.

The kernels are Triton's. On each device each of them is compared with PyTorch's ops before its
first use. Where they are not used, PyTorch's ops run, with two temporaries of h's size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from ...core.call import Grads, Needs, Operands, Saved, Spec
from ...core.device import DeviceInfo
from ...core.dtypes import to_dtype
from ...core.record import Record
from .. import checked
from ..triton import configs
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


class Updates(NamedTuple):
    """The low-rank updates scale · S·Bᵀ of gate and up, which kernels add to g and u.

    Args:
        s_gate, s_up: S [M, R], contiguous in its rows.
        b_gate, b_up: lora_B [H, R], contiguous.
        scale_gate, scale_up: the scaling.
    """

    s_gate: Tensor
    s_up: Tensor
    b_gate: Tensor
    b_up: Tensor
    scale_gate: float
    scale_up: float


class UpdatedGrads(NamedTuple):
    """What `gated_update_backward` makes: dg and du, and h or the partial sums of three gradients
    if they are needed."""

    g: Tensor
    u: Tensor
    h: Tensor | None
    partials: Tensor | None


class UpdateSums(NamedTuple):
    """dA of the down-projection, and dB of gate and up."""

    lora_A: Tensor
    b_gate: Tensor
    b_up: Tensor


def updates_of(layers: Sequence[Record], ps: Sequence[Tensor], dtype: torch.dtype) -> Updates:
    """Return the updates of gate and up from their P [M, R]."""
    s_gate, s_up = (_s(p, layer.rank_gate, dtype) for p, layer in zip(ps, layers, strict=False))
    gate, up = layers[:2]
    B = gate.lora_B.contiguous(), up.lora_B.contiguous()
    return Updates(s_gate, s_up, *B, cast(float, gate.scaling), cast(float, up.scaling))


def _s(p: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return S [M, R] in `dtype`, contiguous in its rows."""
    s = p if gate is None else to_dtype(p * gate, dtype)
    return s if s.stride(1) == 1 else s.contiguous()


def gated(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """Return h = act(g) ⊙ u for contiguous g and u of one shape and dtype.

    >>> gated(torch.tensor([0.0, 50.0]), torch.tensor([3.0, 2.0]), "silu")
    tensor([  0., 100.])
    """
    if kernel_reason(g.device, g.dtype, activation, g.numel()) is not None:
        return ACTIVATIONS[activation](g).mul_(u)
    if checked.is_dispatched(g):
        return torch.ops.lora_kernels.gated(g, u, activation)  # type: ignore[no-any-return]
    return _launch_gated(g, u, activation)


def gated_backward(g: Tensor, u: Tensor, dh: Tensor, in_place: bool, activation: str) -> Gated:
    """Return dg, du and h for dh, whose memory is overwritten. All are contiguous.

    in_place: whether g and u may be overwritten too.
    """
    if kernel_reason(g.device, g.dtype, activation, g.numel()) is not None:
        return gated_backward_by_torch(g, u, dh, in_place, activation)
    grads = Gated(*((g, u) if in_place else (torch.empty_like(g), torch.empty_like(u))), dh)
    if checked.is_dispatched(g):
        outputs = {"dg": grads.g, "du": grads.u, "h": grads.h}
        torch.ops.lora_kernels.gated_backward(g, u, dh, activation, **outputs)
    else:
        _launch_gated_backward(g, u, dh, *grads, activation)
    return grads


def gated_update(g: Tensor, u: Tensor, updates: Updates, activation: str) -> Tensor:
    """Return h [M, H] of g and u with their updates, which float32 sums hold until h.

    g, u: [M, H], contiguous, without the updates.
    """
    if not g.numel():
        return torch.empty_like(g)
    if checked.is_dispatched(g):
        return torch.ops.lora_kernels.gated_update(g, u, *updates, activation)  # type: ignore[no-any-return]
    return _launch("gated_update", g, u, *updates, activation)  # type: ignore[no-any-return]


def gated_update_backward(
    g: Tensor,
    u: Tensor,
    dh: Tensor,
    updates: Updates,
    ds: Tensor,
    lora_A: Tensor,
    needs_gradients: bool,
    in_place: bool,
    activation: str,
) -> UpdatedGrads:
    """Return dg and du for dh + dS·A, and partial sums of the gradients that read the same tiles.

    Args:
        g, u, dh: [M, H], contiguous, without the updates. dh's memory is overwritten.
        ds, lora_A: dS [M, R] and A [R, H] of the down-projection.
        needs_gradients: whether dA of the down-projection, or dB of gate or up, is needed. Where
            the kernel cannot sum them, the result has h.
        in_place: whether g and u may be overwritten too.
    """
    dg, du = (g, u) if in_place else (torch.empty_like(g), torch.empty_like(u))
    ranks = lora_A.shape[0], updates.b_gate.shape[1], updates.b_up.shape[1]
    (M, H), target = g.shape, target_of(g.device)
    _, rows, has_sums = configs.gated_update_backward(target, M, H, g.itemsize, max(ranks))
    h = partials = None
    if needs_gradients and not has_sums:
        h = dh
    elif needs_gradients:
        partials = g.new_empty(-(-M // rows), sum(ranks), H, dtype=torch.float32)
    grads = UpdatedGrads(dg, du, h, partials)
    if not g.numel():
        return grads
    args = g, u, dh, *updates[:4], ds.contiguous(), lora_A.contiguous(), *updates[4:], activation
    if checked.is_dispatched(g):
        out = {"dg": dg, "du": du, "h": h, "partials": partials}
        torch.ops.lora_kernels.gated_update_backward(*args, **out)
    else:
        _launch("gated_update_backward", *args, *grads)
    return grads


def sum_partials(partials: Tensor, ranks: Sequence[int], dtype: torch.dtype) -> UpdateSums:
    """Return the gradients [R, H], [H, R] and [H, R] in `dtype`.

    Args:
        partials: of `gated_update_backward`; a call of its own, so that dh can be freed before.
        ranks: of down, gate and up.
    """
    H, (R_down, R_gate, R_up) = partials.shape[2], ranks
    shapes = (R_down, H), (H, R_gate), (H, R_up)
    sums = UpdateSums(*[partials.new_empty(shape, dtype=dtype) for shape in shapes])
    if not partials.numel():
        for t in sums:
            t.zero_()
    elif checked.is_dispatched(partials):
        out = {"dA": sums.lora_A, "dB_gate": sums.b_gate, "dB_up": sums.b_up}
        torch.ops.lora_kernels.gated_gradients(partials, **out)
    else:
        _launch("gated_gradients", partials, *sums)
    return sums


@functools.cache
def target_of(device: torch.device) -> DeviceInfo:
    """Return the GPU whose tiles a device's tensors take; for meta tensors an H100."""
    return configs.target(device.type, device.index) or configs.H100


def add_updates(g: Tensor, u: Tensor, updates: Updates) -> tuple[Tensor, Tensor]:
    """Return g and u with their updates, without writing to them."""
    s_gate, s_up, b_gate, b_up, scale_gate, scale_up = updates
    g = torch.addmm(g, s_gate, b_gate.t(), alpha=scale_gate)
    return g, torch.addmm(u, s_up, b_up.t(), alpha=scale_up)


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


def _launch(name: str, *args: Any) -> Any:
    """Call a function of `triton.elementwise`, which is imported where kernels run."""
    from ..triton import elementwise

    return getattr(elementwise, name)(*args)


def _launch_gated(g: Tensor, u: Tensor, activation: str) -> Tensor:
    return _launch("gated", g, u, activation)  # type: ignore[no-any-return]


def _launch_gated_backward(*args: Any) -> None:
    _launch("gated_backward", *args)


# Ops that are one kernel each, for modes: `bench.counter` counts the operands that they name.
# Outputs that are keywords are not read.
_LIB = torch.library.Library("lora_kernels", "FRAGMENT")
_OUTPUTS = "*, Tensor(a!) dg, Tensor(b!) du"
_UPDATES = "Tensor s_gate, Tensor s_up, Tensor b_gate, Tensor b_up"
_SCALES = "float scale_gate, float scale_up, str activation"


def _define(schema: str, fake: Callable[..., Any]) -> None:
    """Define an op that is the function of its name, whose last arguments are the outputs."""
    name = schema.partition("(")[0]

    def run(*args: Any, **out: Any) -> Any:
        return _launch(name, *args, *out.values())

    _LIB.define(schema)
    torch.library.register_kernel(f"lora_kernels::{name}", None, run, lib=_LIB)
    torch.library.register_fake(f"lora_kernels::{name}", fake, lib=_LIB)


def _like_first(g: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(g)


def _nothing(*args: Any, **out: Any) -> None:
    return None


_define("gated(Tensor g, Tensor u, str activation) -> Tensor", _like_first)
_define(f"gated_update(Tensor g, Tensor u, {_UPDATES}, {_SCALES}) -> Tensor", _like_first)
_define(
    "gated_backward(Tensor g, Tensor u, Tensor dh, str activation, "
    f"{_OUTPUTS}, Tensor(c!) h) -> ()",
    _nothing,
)
_define(
    f"gated_update_backward(Tensor g, Tensor u, Tensor dh, {_UPDATES}, Tensor ds, Tensor a, "
    f"{_SCALES}, {_OUTPUTS}, Tensor(c!)? h, Tensor(d!)? partials) -> ()",
    _nothing,
)
_define(
    "gated_gradients(Tensor partials, *, Tensor(a!) dA, Tensor(b!) dB_gate, Tensor(c!) dB_up) "
    "-> ()",
    _nothing,
)

# What a kernel is compiled for, beside the device -> why it is not used there; None after it passed
# its check. So what is checked is what runs.
kernel_reasons: dict[tuple[Any, ...], checked.Reasons] = {}


def kernel_reason(
    device: torch.device, dtype: torch.dtype, activation: str, elements: int = 0
) -> str | None:
    """Return why PyTorch's ops make h, dg and du on this device; None if Triton's kernels do.

    elements: of h; Triton compiles for its divisibility by 16.
    """
    is_even = elements % 16 == 0
    reasons = kernel_reasons.setdefault((activation, dtype, is_even), {})
    compare = functools.partial(compare_kernels, activation, dtype, is_even)
    return checked.kernel_reason(reasons, compare, device, dtype)


def updates_reason(
    layers: Sequence[Record], device: torch.device, dtype: torch.dtype, activation: str
) -> str | None:
    """Return why the updates of gate and up are GEMMs of their own; None if the kernels add them.

    layers: gate, up and down, computed in `dtype`.
    """
    for layer in layers:
        for name, factor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            if factor.dtype is not dtype:
                return f"{name} is in {factor.dtype}, not in x's {dtype}"
    ranks = tuple([layer.lora_A.shape[0] for layer in layers])
    reason = configs.gated_update_reason(dtype.itemsize, max(ranks))
    if reason is not None:
        return reason
    is_even = layers[0].lora_B.shape[0] % 16 == 0
    reasons = kernel_reasons.setdefault((activation, dtype, is_even, ranks), {})
    compare = functools.partial(compare_updates, activation, dtype, is_even, ranks)
    return checked.kernel_reason(reasons, compare, device, dtype)


def compare_kernels(
    activation: str, dtype: torch.dtype, is_even: bool, device: torch.device
) -> str | None:
    """Compare Triton's elementwise kernels with PyTorch's ops on `device`, and synchronize."""
    generator = torch.Generator().manual_seed(0)
    elements = 1040 if is_even else 1037  # more than a program's, the last one's not whole
    sample = torch.randn(3, elements, generator=generator, dtype=torch.float64)
    sample[0, ::3] *= 8  # where the activations saturate
    g, u, dh = sample.to(device, dtype).unbind()
    reason = _find_difference(g, u, dh, activation)
    return reason and f"Triton's elementwise kernel of {activation} in {dtype} {reason}"


def compare_updates(
    activation: str,
    dtype: torch.dtype,
    is_even: bool,
    ranks: tuple[int, int, int],
    device: torch.device,
) -> str | None:
    """Compare the kernels that add updates with float64 on the CPU."""
    target = target_of(device)
    if target.kind != "cuda":
        return "Triton's kernels that add updates to g and u are compiled for NVIDIA's GPUs alone"
    # GEMMs compute the gradients of few rows, the kernel those of many.
    for M in (20, max(100, 4 * max(ranks))):
        reason = _find_wrong_update(activation, dtype, is_even, ranks, M, device)
        if reason is not None:
            what = f"{activation} with updates of ranks {ranks} in {dtype}"
            return f"Triton's kernel of {what} differs from float64 in {reason}"
    return None


def _find_wrong_update(
    activation: str,
    dtype: torch.dtype,
    is_even: bool,
    ranks: tuple[int, int, int],
    M: int,
    device: torch.device,
) -> str | None:
    """Return the name of a result that is not within its bound for M rows, or None."""
    generator = torch.Generator().manual_seed(0)
    (R_gate, R_up, R_down), H = ranks, 144 if is_even else 137  # the last tiles are not whole

    def sample(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    g, u, dh, P = sample(M, H), sample(M, H), sample(M, H), sample(M, R_gate + R_up)
    b_gate, b_up, ds, a = sample(H, R_gate), sample(H, R_up), sample(M, R_down), sample(R_down, H)
    s_gate, s_up = P.split([R_gate, R_up], 1)
    updates = Updates(s_gate, s_up, b_gate, b_up, 0.5, 0.25)
    h = gated_update(g, u, updates, activation)
    grads = gated_update_backward(g, u, dh.clone(), updates, ds, a, True, False, activation)
    found = {"h": h, "g": grads.g, "u": grads.u, "h of the backward": grads.h}
    if grads.partials is not None:
        found |= sum_partials(grads.partials, (R_down, R_gate, R_up), dtype)._asdict()
    bounds = _bound_updates(g, u, dh, updates, ds, a, activation)
    for name, got in found.items():
        if got is not None:
            want, bound = bounds[name.removesuffix(" of the backward")]
            if not bool(((got.double().cpu() - want).abs() <= bound).all()):
                return name
    return None


def _bound_updates(
    g: Tensor, u: Tensor, dh: Tensor, updates: Updates, ds: Tensor, lora_A: Tensor, activation: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return h, dg, du and `UpdateSums` in float64 on the CPU, each with a bound of the error.

    A result is rounded to the dtype once, and dg, du and h once more before they are multiplied.
    Between, sums in float32 are off by 2⁻¹⁶ of their terms at most: 256 rows, products of 3×TF32.
    """
    eps, tiny = torch.finfo(g.dtype).eps, torch.finfo(g.dtype).tiny
    s_gate, s_up, b_gate, b_up = (t.double().cpu() for t in updates[:4])
    g, u, dh, ds, lora_A = (t.double().cpu() for t in (g, u, dh, ds, lora_A))
    s_gate, s_up = s_gate * updates.scale_gate, s_up * updates.scale_up

    def add(t: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return t + s @ b, 1 + t.abs() + s.abs() @ b.abs()  # the sum, and above the terms' sum

    (g, g_terms), (u, u_terms) = add(g, s_gate, b_gate.t()), add(u, s_up, b_up.t())
    dh, dh_terms = add(dh, ds, lora_A)
    dg, du = cast(tuple[Tensor, Tensor], split_gradient(g, u, dh, activation))
    found = {
        "h": (ACTIVATIONS[activation](g) * u, g_terms * u_terms),
        "g": (dg, g_terms * u_terms * dh_terms),
        "u": (du, g_terms * dh_terms),
    }
    bounds = {
        name: (want, eps * want.abs() + 2.0**-16 * terms + tiny)
        for name, (want, terms) in found.items()
    }
    for name, factor, of in (("lora_A", ds, "h"), ("b_gate", s_gate, "g"), ("b_up", s_up, "u")):
        (want, terms), factor = found[of], factor.t()
        total = factor @ want
        bound = eps * total.abs() + factor.abs() @ bounds[of][1] + 2.0**-16 * (factor.abs() @ terms)
        is_A = name == "lora_A"
        bounds[name] = (total, bound + tiny) if is_A else (total.t(), bound.t() + tiny)
    return bounds


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
