"""The registered ops: schema, fake (shape) implementation and dispatch to a backend.

All ops are functional, and x may have any leading dimensions. Backends get x flattened to M rows,
except for `lora_linear` on the CPU. The backend is chosen inside the op, so a compiled graph does
not contain the choice.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _dispatch_tls_local_include_set
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ..backends import cuda, triton
from ..backends.cpu import experts as cpu_experts
from ..backends.cpu import linear as cpu
from ..backends.cuda import constraints
from ..backends.eager import experts as eager_experts
from ..backends.eager import linear as eager
from ..backends.protocol import Backend, ExpertsBackend, MultiBackend, NormBackend
from ..backends.rows import like_rows_of
from ..choice import choose as selection
from ..core import forced
from ..core.call import (
    ExpertsGrads,
    ExpertsNeeds,
    ExpertsOperands,
    ExpertsSpec,
    Grads,
    Guard,
    MultiGrads,
    MultiNeeds,
    MultiOperands,
    MultiSpec,
    Needs,
    Operands,
    Saved,
    Spec,
)
from ..core.forced import Forced
from ..core.packed4bit import Packed4bit
from ..core.problem import Choice, Layout, Problem, Strategy
from . import flops

_LIB = torch.library.Library("lora_kernels", "DEF")
_BACKENDS: dict[str, Backend] = {"eager": eager, "cpu": cpu, "triton": triton, "cuda": cuda}
_MULTI_BACKENDS: dict[str, MultiBackend] = {"eager": eager, "cpu": cpu}
_EXPERTS_BACKENDS: dict[str, ExpertsBackend] = {"eager": eager_experts, "cpu": cpu_experts}
_NORM_BACKENDS: dict[str, NormBackend] = {"eager": eager, "cpu": cpu}

_WEIGHT = "Tensor? weight"
CODES = (
    "Tensor packed, Tensor absmax, Tensor code, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? offset, int blocksize, int nested_blocksize, str quant_type"
)
_OPERANDS = (
    "Tensor x, {weight}, Tensor lora_A, Tensor lora_B, Tensor? rank_gate, Tensor? column_scale, "
    "Tensor? bias, Tensor? rng"
)
_SPEC = "float scaling, float dropout_p, ScalarType dtype, ScalarType y_dtype, bool save_z"
_NEEDS = (
    "bool need_x, bool need_lora_A, bool need_lora_B, bool need_rank_gate, "
    "bool need_column_scale, bool need_bias"
)
_MULTI_OPERANDS = (
    "Tensor x, {weight}, Tensor[] lora_A, Tensor[] lora_B, Tensor adapter_index, Tensor? bias, "
    "Tensor? rng"
)
_MULTI_SPEC = "float[] scaling, float dropout_p, ScalarType dtype, ScalarType y_dtype"
_MULTI_NEEDS = "bool need_x, bool[] need_lora_A, bool[] need_lora_B, bool need_bias"
_EXPERTS_OPERANDS = (
    "Tensor x, {weight}, Tensor lora_A, Tensor lora_B, Tensor offsets, Tensor? bias, Tensor? rng"
)
_EXPERTS_SPEC = (
    "float scaling, float dropout_p, ScalarType dtype, ScalarType y_dtype, bool transposed"
)
_EXPERTS_NEEDS = "bool need_x, bool need_lora_A, bool need_lora_B, bool need_bias"
# The backend, and the strategy after a space, as if `backend(...)` named them: a backward gets its
# forward's. Empty for what is in force.
_CHOICE = '*, str choice=""'
_FORWARD = f"({_OPERANDS}, {_SPEC}, {_CHOICE}) -> (Tensor y, Tensor p, Tensor z, Tensor mask)"
_BACKWARD = (
    f"(Tensor dy, {_OPERANDS}, Tensor p, Tensor? z, {_SPEC}, {_NEEDS}, {_CHOICE}) "
    "-> (Tensor dx, Tensor dA, Tensor dB, Tensor dg, Tensor dc, Tensor dbias)"
)
_MULTI_FORWARD = f"({_MULTI_OPERANDS}, {_MULTI_SPEC}) -> (Tensor y, Tensor p, Tensor mask)"
_MULTI_BACKWARD = (
    f"(Tensor dy, {_MULTI_OPERANDS}, Tensor p, {_MULTI_SPEC}, {_MULTI_NEEDS}, {_CHOICE}) "
    "-> (Tensor dx, Tensor[] dA, Tensor[] dB, Tensor dbias)"
)
_EXPERTS_FORWARD = f"({_EXPERTS_OPERANDS}, {_EXPERTS_SPEC}) -> (Tensor y, Tensor p, Tensor mask)"
_EXPERTS_BACKWARD = (
    f"(Tensor dy, {_EXPERTS_OPERANDS}, Tensor p, {_EXPERTS_SPEC}, {_EXPERTS_NEEDS}, {_CHOICE}) "
    "-> (Tensor dx, Tensor dA, Tensor dB, Tensor dbias)"
)
_NORM = "({weight}, Tensor lora_A, Tensor lora_B, float scaling, Tensor? rank_gate) -> Tensor"


_NOTHING = contextlib.nullcontext()


def device_of(t: Tensor) -> tuple[str, int | None]:
    """Return the device's type, and a GPU's index.

    After a large GEMM has evicted the cache, reading `t.device.type` costs as much as a small
    kernel.
    """
    if t.is_cpu:
        return "cpu", None
    return t.device.type, t.device.index


def no_autocast(t: Tensor) -> contextlib.AbstractContextManager[None]:
    """Disable autocast inside an op, whose dtypes are given by its arguments."""
    device_type, _ = device_of(t)
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return _NOTHING
    return torch.autocast(device_type, enabled=False)


def layout(
    device_type: str, weight: Tensor | Packed4bit | None, dtype: torch.dtype
) -> Layout | None:
    """Return the weight's layout for a GEMM in `dtype`; None if every backend accepts it."""
    if device_type != "cpu" or cuda.is_emulated():
        return constraints.layout(weight, dtype)
    if not isinstance(weight, Tensor) or weight.stride(1) == 1 or weight.stride(0) != 1:
        return None
    return _COLUMNS


_COLUMNS = Layout(columns=True)


def requested() -> str:
    """Return the backend and strategy in force as an op's `choice`, which a backward may be given.

    While a function is compiled the strategy is not known.
    """
    if is_compiling():
        return selection.forced_backend() or ""
    return " ".join(filter(None, forced.current.get()))


def _read_choice(choice: str) -> Forced | None:
    """Return the request that an op's `choice` is, or None."""
    backend, _, strategy = choice.partition(" ")
    return Forced(backend, Strategy(strategy) if strategy else None) if backend else None


def choose(operands: Operands, spec: Spec, requested: Forced | None = None) -> Choice:
    """Choose the backend and strategy of both directions.

    requested: None for the backend in force.
    """
    x, weight, lora_A, lora_B, _, _, _, rng = operands
    if _has_mask(rng, spec.dropout_p):
        return selection.choose_for_mask(requested)
    device_type, index = device_of(x)
    (R, K), N, dtype, four_bit = lora_A.shape, lora_B.shape[0], spec.dtype, _is_4bit(weight)
    stored, M, dropout = layout(device_type, weight, dtype), x.numel() // K, rng is not None
    x_dtype, a_dtype, b_dtype = x.dtype, lora_A.dtype, lora_B.dtype
    problem = Problem(
        device_type, x_dtype, a_dtype, b_dtype, dtype, R, M, four_bit, N, K, dropout, index, stored
    )
    return selection.choose(problem, requested)


def _is_4bit(weight: Tensor | Packed4bit | None) -> bool:
    return isinstance(weight, Packed4bit)


def _has_mask(rng: Tensor | None, dropout_p: float) -> bool:
    """Return True if the op gets or draws a dropout mask; False if it gets the mask's state."""
    return dropout_p > 0 if rng is None else rng.dtype is torch.bool


def _rows(rng: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a mask of x's shape as rows [M, K], and the state of a mask unchanged."""
    if rng is None or rng.dtype is torch.int64:
        return rng
    return rng.reshape(-1, x.shape[-1])


def lora_linear_direct(
    operands: Operands, spec: Spec, choice: Choice | None = None
) -> tuple[Tensor, Saved]:
    """Run the forward without the dispatcher, and return y and the tensors for the backward."""
    choice = choice or choose(operands, spec)
    x, rng, backend = operands.x, operands.rng, _BACKENDS[choice.backend]
    with no_autocast(x):
        if choice.backend == "cpu":  # takes any leading dimensions
            return cpu.lora_linear(operands, spec, choice.strategy)
        rows = operands._replace(x=x.reshape(-1, x.shape[-1]), rng=_rows(rng, x))
        y, saved = backend.lora_linear(rows, spec, choice.strategy)
    return like_rows_of(x, y), saved


def lora_linear_dispatched(
    operands: Operands, spec: Spec, choice: str = ""
) -> tuple[Tensor, Saved]:
    """Run the forward by its op."""
    weight = operands.weight
    if isinstance(weight, Packed4bit):
        y, p, z, mask = lora_linear_4bit(operands.x, *weight, *operands[2:], *spec, choice=choice)
    else:
        y, p, z, mask = lora_linear(*operands, *spec, choice=choice)
    drawn = spec.dropout_p and operands.rng is None
    return y, Saved(p, z if spec.save_z else None, mask if drawn else None)


def _lora_linear_op(
    operands: Operands, spec: Spec, choice: str = ""
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = choose(operands, spec, _read_choice(choice))
    y, (p, z, mask) = lora_linear_direct(operands, spec, chosen)
    return y, p, _empty_if_none(z, y.dtype, y), _empty_if_none(mask, torch.bool, y)


def _lora_linear_fake(
    operands: Operands, spec: Spec, choice: str = ""
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, (N, R) = operands.x, operands.lora_B.shape
    M = x.numel() // x.shape[-1]
    y = x.new_empty(*x.shape[:-1], N, dtype=spec.y_dtype)
    p = x.new_empty(M, R, dtype=eager.stat_dtype(spec.dtype))
    z = x.new_empty((M, N) if spec.save_z else (0,), dtype=spec.y_dtype)
    return y, p, z, _mask_fake(x, spec.dropout_p, operands.rng)


def _mask_fake(x: Tensor, dropout_p: float, rng: Tensor | None) -> Tensor:
    shape = (x.numel() // x.shape[-1], x.shape[-1]) if dropout_p and rng is None else (0,)
    return x.new_empty(shape, dtype=torch.bool)


def _empty_if_none(t: Tensor | None, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return t, or an empty tensor for None, because an op cannot return optional tensors."""
    return like.new_empty(0, dtype=dtype) if t is None else t


def down_projection(
    x: Tensor,
    lora_A: Tensor,
    dropout_p: float,
    rng: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Compute P = D(x)·Aᵀ [M, R] by `lora_linear` without a base GEMM and with N = 1.

    On the CPU, P is bitwise equal to P of a call with a base GEMM. Triton may choose another
    strategy for this call, which sums in another order. The eager backend computes it for CUDA,
    whose kernels need a base GEMM.

    backend: "" for the one in force.
    """
    operands = Operands(x, None, lora_A, lora_A.new_zeros(1, lora_A.shape[0]), rng=rng)
    spec = Spec(1.0, dropout_p, dtype, x.dtype)
    backend = backend or requested().partition(" ")[0]
    backend = "eager" if backend == "cuda" else backend
    if can_bypass_dispatcher(x, lora_A):
        choice = choose(operands, spec, _read_choice(backend))
        return lora_linear_direct(operands, spec, choice)[1].p
    return lora_linear_dispatched(operands, spec, backend)[1].p


def prepare(
    x_dtype: torch.dtype,
    weight: Tensor | Packed4bit,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    rows: int,
    guards: Sequence[Guard],
) -> cpu.PreparedCall | None:
    """Prepare `lora_linear_direct` for up to `rows` rows of x, at most `cpu_heuristics.few_rows`.

    y has x's dtype. A dense weight has contiguous rows. Returns None if the chosen backend has no
    prepared calls.
    """
    dtypes, four_bit = (x_dtype, lora_A.dtype, lora_B.dtype, dtype), isinstance(weight, Packed4bit)
    choice = selection.choose(Problem(lora_A.device.type, *dtypes, lora_A.shape[0], 1, four_bit))
    if choice.backend != "cpu" or choice.strategy not in cpu.GEMVS:
        return None
    return cpu.PreparedCall(weight, lora_A, lora_B, scaling, x_dtype, dtype, rows, guards)


def lora_linear_backward_direct(
    dy: Tensor,
    operands: Operands,
    saved: Saved,
    spec: Spec,
    needs: Needs,
    choice: Choice | None = None,
) -> Grads:
    """Run the backward without the dispatcher."""
    choice = choice or choose(operands, spec)
    x, rng = operands.x, operands.rng
    if not (choice.backend == "cpu" or x.dim() == 2):
        dy = dy.reshape(-1, dy.shape[-1])
        operands = operands._replace(x=x.reshape(-1, x.shape[-1]), rng=_rows(rng, x))
    with no_autocast(x):
        grads = _BACKENDS[choice.backend].lora_linear_backward(
            dy, operands, saved, spec, needs, choice.strategy
        )
    dx = grads.x
    return grads if dx is None or dx.dim() == x.dim() else grads._replace(x=dx.view(x.shape))


def lora_linear_backward_dispatched(
    dy: Tensor, operands: Operands, saved: Saved, spec: Spec, needs: Needs, choice: str
) -> Grads:
    """Run the backward by its op."""
    _refuse_tangent(dy)
    weight, rest = operands.weight, (saved.p, saved.z, *spec, *needs)
    if isinstance(weight, Packed4bit):
        found = lora_linear_backward_4bit(
            dy, operands.x, *weight, *operands[2:], *rest, choice=choice
        )
    else:
        found = lora_linear_backward(dy, *operands, *rest, choice=choice)
    return Grads(*(grad if need else None for grad, need in zip(found, needs, strict=True)))


def _refuse_tangent(dy: Tensor) -> None:
    """Raise NotImplementedError if dy carries a tangent, which the op would drop."""
    if is_compiling() or forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(dy).tangent is not None:
        raise NotImplementedError(
            "lora_kernels: got a gradient with a forward-mode tangent, want one without: its "
            "layers and functions are differentiable once, in reverse mode"
        )


def _lora_linear_backward_op(
    dy: Tensor, operands: Operands, saved: Saved, spec: Spec, needs: Needs, choice: str = ""
) -> tuple[Tensor, ...]:
    chosen = choose(operands, spec, _read_choice(choice))
    grads = lora_linear_backward_direct(dy, operands, saved, spec, needs, chosen)
    dtypes = _grad_dtypes(operands, saved)
    return tuple(_empty_if_none(t, d, dy) for t, d in zip(grads, dtypes, strict=True))


def _lora_linear_backward_fake(
    dy: Tensor, operands: Operands, saved: Saved, spec: Spec, needs: Needs, choice: str = ""
) -> tuple[Tensor, ...]:
    x, _, lora_A, lora_B, *_ = operands
    N, R = lora_B.shape
    shapes = (tuple(x.shape), tuple(lora_A.shape), (N, R), (R,), (N,), (N,))
    return tuple(
        x.new_empty(shape if need else (0,), dtype=dtype)
        for need, shape, dtype in zip(needs, shapes, _grad_dtypes(operands, saved), strict=True)
    )


def _grad_dtypes(operands: Operands, saved: Saved) -> tuple[torch.dtype, ...]:
    stat = saved.p.dtype
    return operands.x.dtype, operands.lora_A.dtype, operands.lora_B.dtype, stat, stat, stat


def choose_multi(
    operands: MultiOperands, spec: MultiSpec, requested: Forced | None = None
) -> Choice:
    """Choose the backend and strategy of both directions, for several adapters."""
    x, weight, lora_A, lora_B, *_, rng = operands
    if _has_mask(rng, spec.dropout_p):
        return selection.choose_for_mask(requested)
    device_type, index = device_of(x)
    K, N, dtype, four_bit = x.shape[-1], lora_B[0].shape[0], spec.dtype, _is_4bit(weight)
    R, M, stored = (
        max(A.shape[0] for A in lora_A),
        x.numel() // K,
        layout(device_type, weight, dtype),
    )
    x_dtype, a_dtype, b_dtype = x.dtype, lora_A[0].dtype, lora_B[0].dtype
    problem = Problem(
        device_type, x_dtype, a_dtype, b_dtype, dtype, R, M, four_bit, N, K, False, index, stored
    )
    return selection.choose(problem._replace(mixed=True), requested)


def _flatten(operands: MultiOperands) -> MultiOperands:
    """Return the operands with x, index and a mask flattened to M rows."""
    x = operands.x
    return operands._replace(
        x=x.reshape(-1, x.shape[-1]),
        adapter_index=operands.adapter_index.reshape(-1),
        rng=_rows(operands.rng, x),
    )


def multi_lora_linear_direct(
    operands: MultiOperands, spec: MultiSpec, choice: Choice | None = None
) -> tuple[Tensor, Saved]:
    """Run the forward without the dispatcher, and return y and the tensors for the backward."""
    choice = choice or choose_multi(operands, spec)
    with no_autocast(operands.x):
        y, saved = _MULTI_BACKENDS[choice.backend].multi_lora_linear(
            _flatten(operands), spec, choice.strategy
        )
    return like_rows_of(operands.x, y), saved


def multi_lora_linear_dispatched(operands: MultiOperands, spec: MultiSpec) -> tuple[Tensor, Saved]:
    """Run the forward by its op."""
    weight = operands.weight
    if isinstance(weight, Packed4bit):
        y, p, mask = multi_lora_linear_4bit(operands.x, *weight, *operands[2:], *spec)
    else:
        y, p, mask = multi_lora_linear(*operands, *spec)
    return y, Saved(p, None, mask if spec.dropout_p and operands.rng is None else None)


def _multi_lora_linear_op(
    operands: MultiOperands, spec: MultiSpec
) -> tuple[Tensor, Tensor, Tensor]:
    y, saved = multi_lora_linear_direct(operands, spec)
    return y, saved.p, _empty_if_none(saved.mask, torch.bool, y)


def _multi_lora_linear_fake(
    operands: MultiOperands, spec: MultiSpec
) -> tuple[Tensor, Tensor, Tensor]:
    x, N = operands.x, operands.lora_B[0].shape[0]
    M, R = x.numel() // x.shape[-1], max(A.shape[0] for A in operands.lora_A)
    y = x.new_empty(*x.shape[:-1], N, dtype=spec.y_dtype)
    p = x.new_empty(M, R, dtype=eager.stat_dtype(spec.dtype))
    return y, p, _mask_fake(x, spec.dropout_p, operands.rng)


def multi_lora_linear_backward_direct(
    dy: Tensor,
    operands: MultiOperands,
    saved: Saved,
    spec: MultiSpec,
    needs: MultiNeeds,
    choice: Choice | None = None,
) -> MultiGrads:
    """Run the backward without the dispatcher."""
    choice = choice or choose_multi(operands, spec)
    x = operands.x
    with no_autocast(x):
        grads = _MULTI_BACKENDS[choice.backend].multi_lora_linear_backward(
            dy.reshape(-1, dy.shape[-1]), _flatten(operands), saved, spec, needs, choice.strategy
        )
    return grads if grads.x is None else grads._replace(x=grads.x.view(x.shape))


def multi_lora_linear_backward_dispatched(
    dy: Tensor,
    operands: MultiOperands,
    saved: Saved,
    spec: MultiSpec,
    needs: MultiNeeds,
    choice: str,
) -> MultiGrads:
    """Run the backward by its op."""
    _refuse_tangent(dy)
    weight, rest = operands.weight, (saved.p, *spec, *needs)
    if isinstance(weight, Packed4bit):
        found = multi_lora_linear_backward_4bit(
            dy, operands.x, *weight, *operands[2:], *rest, choice=choice
        )
    else:
        found = multi_lora_linear_backward(dy, *operands, *rest, choice=choice)
    dx, dA, dB, dbias = found
    return MultiGrads(
        dx if needs.x else None,
        [grad if need else None for grad, need in zip(dA, needs.lora_A, strict=True)],
        [grad if need else None for grad, need in zip(dB, needs.lora_B, strict=True)],
        dbias if needs.bias else None,
    )


def _multi_lora_linear_backward_op(
    dy: Tensor,
    operands: MultiOperands,
    saved: Saved,
    spec: MultiSpec,
    needs: MultiNeeds,
    choice: str = "",
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    chosen = choose_multi(operands, spec, _read_choice(choice))
    dx, dA, dB, dbias = multi_lora_linear_backward_direct(dy, operands, saved, spec, needs, chosen)
    return (
        _empty_if_none(dx, operands.x.dtype, dy),
        [_empty_if_none(t, A.dtype, dy) for t, A in zip(dA, operands.lora_A, strict=True)],
        [_empty_if_none(t, B.dtype, dy) for t, B in zip(dB, operands.lora_B, strict=True)],
        _empty_if_none(dbias, saved.p.dtype, dy),
    )


def _multi_lora_linear_backward_fake(
    dy: Tensor,
    operands: MultiOperands,
    saved: Saved,
    spec: MultiSpec,
    needs: MultiNeeds,
    choice: str = "",
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    def new_gradient(need: bool, t: Tensor) -> Tensor:
        return t.new_empty(t.shape if need else (0,))

    x, _, lora_A, lora_B, *_ = operands
    return (
        new_gradient(needs.x, x),
        [new_gradient(need, A) for need, A in zip(needs.lora_A, lora_A, strict=True)],
        [new_gradient(need, B) for need, B in zip(needs.lora_B, lora_B, strict=True)],
        x.new_empty(lora_B[0].shape[0] if needs.bias else 0, dtype=saved.p.dtype),
    )


def choose_experts(
    operands: ExpertsOperands, spec: ExpertsSpec, requested: Forced | None = None
) -> Choice:
    """Choose the backend and strategy of both directions, for rows sorted by expert."""
    x, weight, lora_A, lora_B, _, _, rng = operands
    if _has_mask(rng, spec.dropout_p):
        return selection.choose_for_mask(requested)
    (device_type, index), (M, K), (_, N, R) = device_of(x), x.shape, lora_B.shape
    dtypes, is_4bit = (x.dtype, lora_A.dtype, lora_B.dtype, spec.dtype), _is_4bit(weight)
    problem = Problem(device_type, *dtypes, R, M, is_4bit, N, K, rng is not None, index)
    return selection.choose_experts(problem, requested)


def lora_experts_direct(
    operands: ExpertsOperands, spec: ExpertsSpec, choice: Choice | None = None
) -> tuple[Tensor, Saved]:
    """Run the forward without the dispatcher, and return y and the tensors for the backward."""
    choice = choice or choose_experts(operands, spec)
    with no_autocast(operands.x):
        return _EXPERTS_BACKENDS[choice.backend].lora_experts(operands, spec, choice.strategy)


def lora_experts_dispatched(operands: ExpertsOperands, spec: ExpertsSpec) -> tuple[Tensor, Saved]:
    """Run the forward by its op."""
    weight = operands.weight
    if isinstance(weight, Packed4bit):
        y, p, mask = lora_experts_4bit(operands.x, *weight, *operands[2:], *spec)
    else:
        y, p, mask = lora_experts(*operands, *spec)
    return y, Saved(p, None, mask if spec.dropout_p and operands.rng is None else None)


def _lora_experts_op(operands: ExpertsOperands, spec: ExpertsSpec) -> tuple[Tensor, Tensor, Tensor]:
    y, saved = lora_experts_direct(operands, spec)
    return y, saved.p, _empty_if_none(saved.mask, torch.bool, y)


def _lora_experts_fake(
    operands: ExpertsOperands, spec: ExpertsSpec
) -> tuple[Tensor, Tensor, Tensor]:
    x, (_, N, R) = operands.x, operands.lora_B.shape
    y = x.new_empty(x.shape[0], N, dtype=spec.y_dtype)
    p = x.new_empty(x.shape[0], R, dtype=eager.stat_dtype(spec.dtype))
    return y, p, _mask_fake(x, spec.dropout_p, operands.rng)


def lora_experts_backward_direct(
    dy: Tensor,
    operands: ExpertsOperands,
    saved: Saved,
    spec: ExpertsSpec,
    needs: ExpertsNeeds,
    choice: Choice | None = None,
) -> ExpertsGrads:
    """Run the backward without the dispatcher."""
    choice = choice or choose_experts(operands, spec)
    with no_autocast(operands.x):
        return _EXPERTS_BACKENDS[choice.backend].lora_experts_backward(
            dy, operands, saved, spec, needs, choice.strategy
        )


def lora_experts_backward_dispatched(
    dy: Tensor,
    operands: ExpertsOperands,
    saved: Saved,
    spec: ExpertsSpec,
    needs: ExpertsNeeds,
    choice: str,
) -> ExpertsGrads:
    """Run the backward by its op."""
    _refuse_tangent(dy)
    weight, rest = operands.weight, (saved.p, *spec, *needs)
    if isinstance(weight, Packed4bit):
        found = lora_experts_backward_4bit(
            dy, operands.x, *weight, *operands[2:], *rest, choice=choice
        )
    else:
        found = lora_experts_backward(dy, *operands, *rest, choice=choice)
    return ExpertsGrads(*(grad if need else None for grad, need in zip(found, needs, strict=True)))


def _lora_experts_backward_op(
    dy: Tensor,
    operands: ExpertsOperands,
    saved: Saved,
    spec: ExpertsSpec,
    needs: ExpertsNeeds,
    choice: str = "",
) -> tuple[Tensor, ...]:
    chosen = choose_experts(operands, spec, _read_choice(choice))
    grads = lora_experts_backward_direct(dy, operands, saved, spec, needs, chosen)
    dtypes = operands.x.dtype, operands.lora_A.dtype, operands.lora_B.dtype, saved.p.dtype
    return tuple(_empty_if_none(t, d, dy) for t, d in zip(grads, dtypes, strict=True))


def _lora_experts_backward_fake(
    dy: Tensor,
    operands: ExpertsOperands,
    saved: Saved,
    spec: ExpertsSpec,
    needs: ExpertsNeeds,
    choice: str = "",
) -> tuple[Tensor, ...]:
    x, _, lora_A, lora_B, *_ = operands
    shapes = tuple(x.shape), tuple(lora_A.shape), tuple(lora_B.shape), tuple(lora_B.shape[:2])
    dtypes = x.dtype, lora_A.dtype, lora_B.dtype, saved.p.dtype
    return tuple(
        x.new_empty(shape if need else (0,), dtype=dtype)
        for need, shape, dtype in zip(needs, shapes, dtypes, strict=True)
    )


def dora_norm_direct(
    weight: Tensor | Packed4bit | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
) -> Tensor:
    """Compute the norms without the dispatcher."""
    assert weight is not None
    device_type, index = device_of(lora_A)
    weight_dtype = torch.float32 if isinstance(weight, Packed4bit) else weight.dtype
    dtypes = weight_dtype, lora_A.dtype, lora_B.dtype, torch.float32
    choice = selection.choose_norm(
        Problem(device_type, *dtypes, lora_A.shape[0], device_index=index)
    )
    norm: Tensor
    with no_autocast(lora_A):
        norm = _NORM_BACKENDS[choice.backend].dora_norm(weight, lora_A, lora_B, scaling, rank_gate)
    return norm


def _dora_norm_fake(
    weight: Tensor | Packed4bit | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
) -> Tensor:
    return lora_A.new_empty(lora_B.shape[0], dtype=eager.stat_dtype(lora_A.dtype))


# Op name -> implementation, for `bench.counter`, which counts the kernels inside an op.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
_FORWARD_TYPES = (Operands, Spec)
_BACKWARD_TYPES = (Operands, Saved, Spec, Needs)
_MULTI_FORWARD_TYPES = (MultiOperands, MultiSpec)
_MULTI_BACKWARD_TYPES = (MultiOperands, Saved, MultiSpec, MultiNeeds)
_EXPERTS_FORWARD_TYPES = (ExpertsOperands, ExpertsSpec)
_EXPERTS_BACKWARD_TYPES = (ExpertsOperands, Saved, ExpertsSpec, ExpertsNeeds)
# The number of fields of each type in the schemas. Saved.mask is passed as `rng`, and the backward
# of several adapters has no z.
_FIELDS: dict[tuple[type, ...], tuple[int, ...]] = {
    _FORWARD_TYPES: (8, 5),
    _BACKWARD_TYPES: (8, 2, 5, 6),
    _MULTI_FORWARD_TYPES: (7, 4),
    _MULTI_BACKWARD_TYPES: (7, 1, 4, 4),
    _EXPERTS_FORWARD_TYPES: (7, 5),
    _EXPERTS_BACKWARD_TYPES: (7, 1, 5, 4),
}


def pack_arguments(
    function: Callable[..., Any],
    types: Sequence[Any],
    counts: Sequence[int],
    before: int,
    is_4bit: bool,
) -> Callable[..., Any]:
    """Wrap `function`, which takes the call types, as a function of an op's flat arguments.

    Args:
        types, counts: the call types, and the number of fields of each in the schema.
        before: the number of arguments that stand before them.
        is_4bit: whether the weight is passed as the fields of `Packed4bit`.
    """

    def flat(*args: Any, **kwargs: Any) -> Any:
        head, rest = args[:before], list(args[before:])
        if is_4bit:  # the fields of Packed4bit follow x
            rest[1 : 1 + len(Packed4bit._fields)] = [
                Packed4bit(*rest[1 : 1 + len(Packed4bit._fields)])
            ]
        packed = []
        for each, count in zip(types, counts, strict=True):
            packed.append(each(*rest[:count]))
            del rest[:count]
        return function(*head, *packed, **kwargs)

    return flat


def _pack_weight(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap `function`, which takes a `Packed4bit` first, as a function of its fields."""
    count = len(Packed4bit._fields)
    return lambda *args: function(Packed4bit(*args[:count]), *args[count:])


def _define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    types: tuple[type, ...] = (),
) -> None:
    is_4bit, is_forward = name.endswith("_4bit"), bool(types) and Saved not in types
    # A forward may draw a dropout mask.
    tags = (torch.Tag.nondeterministic_seeded,) if is_forward else ()
    if types:
        layout = types, _FIELDS[types], 0 if is_forward else 1, is_4bit  # 1: dy
        implementation = pack_arguments(implementation, *layout)
        fake = pack_arguments(fake, *layout)
    elif is_4bit:
        implementation, fake = _pack_weight(implementation), _pack_weight(fake)
    schema = schema.format(weight=CODES if is_4bit else _WEIGHT)
    register(name, schema, implementation, fake, tags)


def register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    tags: tuple[torch.Tag, ...] = (),
) -> None:
    """Register the op `lora_kernels::name` for every device."""
    _LIB.define(name + schema, tags=tags)
    IMPLEMENTATIONS[name] = implementation
    # Autograd must not record the ops inside; the Functions define the gradients. register_kernel
    # keeps Dynamo out of the op: Dynamo would separate the native call from the tensors whose
    # addresses it gets.
    qualified = f"lora_kernels::{name}"
    torch.library.register_kernel(qualified, None, torch.no_grad()(implementation), lib=_LIB)
    torch.library.register_fake(qualified, fake, lib=_LIB)


_forward = _lora_linear_op, _lora_linear_fake, _FORWARD_TYPES
_backward = _lora_linear_backward_op, _lora_linear_backward_fake, _BACKWARD_TYPES
_multi_forward = _multi_lora_linear_op, _multi_lora_linear_fake, _MULTI_FORWARD_TYPES
_multi_backward = (
    _multi_lora_linear_backward_op,
    _multi_lora_linear_backward_fake,
    _MULTI_BACKWARD_TYPES,
)
_define("lora_linear", _FORWARD, *_forward)
_define("lora_linear_4bit", _FORWARD, *_forward)
_define("lora_linear_backward", _BACKWARD, *_backward)
_define("lora_linear_backward_4bit", _BACKWARD, *_backward)
_define("multi_lora_linear", _MULTI_FORWARD, *_multi_forward)
_define("multi_lora_linear_4bit", _MULTI_FORWARD, *_multi_forward)
_define("multi_lora_linear_backward", _MULTI_BACKWARD, *_multi_backward)
_define("multi_lora_linear_backward_4bit", _MULTI_BACKWARD, *_multi_backward)
_experts_forward = _lora_experts_op, _lora_experts_fake, _EXPERTS_FORWARD_TYPES
_experts_backward = (
    _lora_experts_backward_op,
    _lora_experts_backward_fake,
    _EXPERTS_BACKWARD_TYPES,
)
_define("lora_experts", _EXPERTS_FORWARD, *_experts_forward)
_define("lora_experts_4bit", _EXPERTS_FORWARD, *_experts_forward)
_define("lora_experts_backward", _EXPERTS_BACKWARD, *_experts_backward)
_define("lora_experts_backward_4bit", _EXPERTS_BACKWARD, *_experts_backward)
_define("dora_norm", _NORM, dora_norm_direct, _dora_norm_fake)
_define("dora_norm_4bit", _NORM, dora_norm_direct, _dora_norm_fake)

lora_linear = torch.ops.lora_kernels.lora_linear.default
lora_linear_backward = torch.ops.lora_kernels.lora_linear_backward.default
dora_norm = torch.ops.lora_kernels.dora_norm.default
dora_norm_4bit = torch.ops.lora_kernels.dora_norm_4bit.default
lora_linear_4bit = torch.ops.lora_kernels.lora_linear_4bit.default
multi_lora_linear = torch.ops.lora_kernels.multi_lora_linear.default
multi_lora_linear_backward = torch.ops.lora_kernels.multi_lora_linear_backward.default
multi_lora_linear_4bit = torch.ops.lora_kernels.multi_lora_linear_4bit.default
multi_lora_linear_backward_4bit = torch.ops.lora_kernels.multi_lora_linear_backward_4bit.default
lora_linear_backward_4bit = torch.ops.lora_kernels.lora_linear_backward_4bit.default
lora_experts = torch.ops.lora_kernels.lora_experts.default
lora_experts_4bit = torch.ops.lora_kernels.lora_experts_4bit.default
lora_experts_backward = torch.ops.lora_kernels.lora_experts_backward.default
lora_experts_backward_4bit = torch.ops.lora_kernels.lora_experts_backward_4bit.default
_TENSOR_TYPES = (Tensor, torch.nn.Parameter)


def _default_keys() -> list[Any]:
    """Return the dispatch keys that a thread includes by default, and in inference mode."""
    found: list[Any] = []

    def read() -> None:  # runs in a new thread, because a mode may be active in this one
        for mode in (False, True):
            with torch.inference_mode(mode):
                found.append(_dispatch_tls_local_include_set())

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    return found


_KEYS, _INFERENCE_KEYS = _default_keys()


def is_intercepted() -> bool:
    """Return True if tracing, a compiler, a dispatch mode or a transform may observe an op.

    All but a compiler and forward-mode AD include dispatch keys in the thread's set.
    """
    if is_compiling() or forward_ad._current_level >= 0:
        return True
    return _dispatch_tls_local_include_set() not in (_KEYS, _INFERENCE_KEYS)


def unsupported_context() -> str | None:
    """Return the active context that the autograd Functions do not support, in words, or None."""
    if is_compiling():
        return None
    if peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    return "forward-mode AD is active" if forward_ad._current_level >= 0 else None


def refuse_context() -> None:
    """Raise RuntimeError in a context that the autograd Functions do not support."""
    if (reason := unsupported_context()) is not None:
        raise RuntimeError(
            f"lora_kernels: {reason}, and its layers and functions are differentiable in reverse "
            "mode alone. Take the plain PyTorch expression "
            "F.linear(x, weight, bias) + scaling * (x @ lora_A.T) @ lora_B.T; layers that "
            "lora_kernels.peft has fused run PEFT's forward there"
        )


def interception_guards() -> tuple[Guard, ...]:
    """Return the conditions of `is_intercepted` as guards of a prepared call."""
    return (
        Guard(None, is_compiling, False),
        Guard(vars(forward_ad), "_current_level", -1),
        Guard(None, _dispatch_tls_local_include_set, _dispatch_tls_local_include_set()),
    )


def can_bypass_dispatcher(*tensors: Tensor | None) -> bool:
    """Return True if calling the implementation is indistinguishable from dispatching the op.

    This holds if nothing intercepts ops, no tensor is of a subclass, and the first tensor's memory
    has its values. The tensors must be on one device. Dispatching a Python op takes 8 µs with a
    warm cache, and 100 µs right after a large GEMM has evicted it.
    """
    if is_intercepted():
        if not is_compiling():
            flops.register_if_counted()
        return False
    for t in tensors:
        if t is not None and type(t) not in _TENSOR_TYPES:
            return False
    first = tensors[0]
    if first is None:
        return True
    try:  # 0 for meta and zero tensors; raises for a tensor that `is_grads_batched=True` batched
        return first.data_ptr() != 0 and not first.is_neg()
    except RuntimeError:
        return False
