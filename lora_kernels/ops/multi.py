"""`multi_lora_linear`, rows with one of several adapters each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.cpu import linear as cpu
from ..backends.eager import linear as eager
from ..backends.library import is_on_gpu_path
from ..backends.protocol import MultiBackend
from ..backends.rows import rows_of, set_leading_dims_
from ..choice import choose as selection
from ..core.call import (
    MultiGrads,
    MultiNeeds,
    MultiOperands,
    MultiSpec,
    Saved,
)
from ..core.codes import CODES_TENSORS, Codes
from ..core.dtypes import stat_dtype
from ..core.forced import Forced
from ..core.problem import Choice, Problem
from ..quantization import QuantizedWeight
from . import context
from .arguments import (
    FLOATS,
    check_devices,
    check_dropout,
    check_dtypes,
    check_integers,
    check_scaling,
    check_tensor,
    check_vector,
    check_weight,
    matrix_shape,
)
from .autograd import differentiable_once, new_unsaved
from .registry import (
    call_backward,
    call_forward,
    define,
    draws_mask,
    fill_grads,
    mask_rows,
    new_grad,
    or_empty,
    split,
)

BACKENDS: dict[str, MultiBackend] = {"eager": eager, "cpu": cpu}


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight | None,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    index: Tensor,
    scaling: float | Sequence[float] = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Apply a frozen linear layer with one of E adapters, or none, for each row of x:

        y_m = W·x_m + scaling_e · B_e·(A_e·D(x)_m) + bias,    e = index_m

    One base GEMM serves all rows. No adapter is copied: contiguous rows of one adapter, such as
    those of a sequence, are read in place, and other rows are sorted by adapter. A NaN or an
    infinity in an adapter reaches its own rows alone. Triton and CUDA do not take the call.

    Args:
        x: [..., K], as in `lora_linear`.
        weight: [N, K], a `QuantizedWeight`, or None for the low-rank update alone.
        lora_A: [E, R, K], or E tensors [R_e, K] of any ranks and one dtype.
        lora_B: [E, N, R], or E tensors [N, R_e] of one dtype.
        index: integers of x's leading shape [...], or of its first dimensions, such as [B] for
            x [B, T, K]: 0 to E - 1, or -1 for no adapter. It may be on the CPU. One on a GPU is
            copied to the CPU, for which the host waits.
        scaling: alpha / r, one number for all adapters or one for each.
        bias, dropout_p, rng, dropout_mask, compute_dtype: as in `lora_linear`. The dropout mask
            does not depend on the adapters.

    Returns:
        y [..., N], in autocast's dtype if autocast is enabled for x's device, else in x's.
        Differentiable once in x, lora_A, lora_B and bias. The gradients of an adapter without rows
        are zero.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names the argument.
        RuntimeError: a forced backend cannot run here.

    >>> import torch, lora_kernels
    >>> x, W, A, B = torch.ones(3, 2), torch.eye(2), torch.ones(2, 1, 2), torch.ones(2, 2, 1)
    >>> lora_kernels.multi_lora_linear(x, W, A, B, torch.tensor([0, 1, -1]), scaling=[0.5, 2.0])
    tensor([[2., 2.],
            [5., 5.],
            [1., 1.]])
    """
    check_tensor("x", x)
    As, Bs = _adapters("lora_A", lora_A, "[E, R, K]"), _adapters("lora_B", lora_B, "[E, N, R]")
    E, device = len(As), x.device
    if len(Bs) != E:
        raise ValueError(f"lora_B: got {len(Bs)} adapters, want {E}, as many as of lora_A")
    device_type, _ = context.device_of(x)
    cast_dtype = context.autocast_dtype(device_type, x.dtype)
    y_dtype = cast_dtype or x.dtype
    K, N = As[0].shape[1], Bs[0].shape[0]
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(
            f"x: got shape {list(x.shape)}, want [..., {K}] for lora_A {list(As[0].shape)}"
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"x: got {x.dtype}, want float32, bfloat16, float16 or float64")
    a_dtype, b_dtype = As[0].dtype, Bs[0].dtype
    for e, (A, B) in enumerate(zip(As, Bs, strict=True)):
        if A.dim() != 2 or A.shape[1] != K:
            raise ValueError(f"lora_A[{e}]: got shape {list(A.shape)}, want [R, {K}]")
        if B.shape != (N, A.shape[0]):
            raise ValueError(f"lora_B[{e}]: got shape {list(B.shape)}, want [{N}, {A.shape[0]}]")
        if A.dtype is not a_dtype or B.dtype is not b_dtype:
            raise TypeError(
                f"lora_A[{e}], lora_B[{e}]: got {A.dtype}, {B.dtype}, want {a_dtype}, {b_dtype}, "
                "as the first have"
            )
        if A.device != device or B.device != device:
            check_devices("x", x, **{f"lora_A[{e}]": A, f"lora_B[{e}]": B})
    check_dtypes("x", x.dtype, lora_A=a_dtype, lora_B=b_dtype)
    check_integers("index", index)
    if index.shape != x.shape[:-1][: index.dim()]:
        raise ValueError(f"index: got shape {list(index.shape)}, want x's {list(x.shape[:-1])}")
    if not index.is_cpu:
        check_devices("x", x, index=index)
    factors = check_scaling(scaling, E)
    weight, codes, dtype = check_weight(x, weight, (N, K), compute_dtype, cast_dtype)
    if bias is not None:
        check_vector("bias", bias, N, x)
    if cast_dtype and is_on_gpu_path(device_type):  # a CPU's kernels keep the adapter's bits
        x, *both = (t.to(y_dtype) for t in (x, *As, *Bs))
        As, Bs = both[:E], both[E:]
        weight = weight.to(y_dtype) if isinstance(weight, Tensor) else weight
    dropout_p, rng, mask = check_dropout(x, dropout_p, rng, dropout_mask)
    options = Options(MultiSpec(factors, dropout_p, dtype, y_dtype), codes[CODES_TENSORS:])
    context.refuse_context()
    return MultiLoRALinearFunction.apply(  # type: ignore[no-any-return]
        x, weight, index.cpu(), bias, rng, mask, options, *As, *Bs, *codes[:CODES_TENSORS]
    )


def _adapters(name: str, tensors: Tensor | Sequence[Tensor], want: str) -> list[Tensor]:
    """Return E matrices, from a tensor of three dimensions or a sequence."""
    if isinstance(tensors, Tensor):
        check_tensor(name, tensors)
        if tensors.dim() != 3 or tensors.numel() == 0:
            raise ValueError(
                f"{name}: got shape {list(tensors.shape)}, want {want}, each at least 1, or a "
                "sequence of matrices"
            )
        return list(tensors.unbind())
    if not tensors:
        raise ValueError(f"{name}: got no adapter, want at least 1")
    for e, t in enumerate(tensors):
        check_tensor(f"{name}[{e}]", t)
    matrix_shape(f"{name}[0]", tensors[0], want.replace("E, ", ""))
    return list(tensors)


class Options(NamedTuple):
    """The arguments of `MultiLoRALinearFunction` that are not tensors; see `linear.Options`."""

    spec: MultiSpec
    blocksizes: tuple[Any, ...]


class MultiLoRALinearFunction(torch.autograd.Function):
    """The op `multi_lora_linear` with `multi_lora_linear_backward`.

    `tensors` are E of lora_A, E of lora_B and the tensors of a 4-bit weight. The backward reads the
    operands; x only if a dA is needed, and P [M, R] only if a dB is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        index: Tensor,
        bias: Tensor | None,
        rng: Tensor | None,
        mask: Tensor | None,
        options: Options,
        *tensors: Any,
    ) -> Tensor:
        spec, blocksizes = options
        E = len(spec.scaling)
        lora_A, lora_B, codes = tensors[:E], tensors[E : 2 * E], tensors[2 * E :]
        base = Codes(*codes, *blocksizes) if codes else weight
        operands = MultiOperands(x, base, lora_A, lora_B, index, bias, rng, mask)
        y, saved = call_forward(ctx, _MULTI, choose, multi_lora_linear_undispatched, operands, spec)
        mask = mask if saved.mask is None else saved.mask
        need = ctx.needs_input_grad[7:]  # of `tensors`
        need_A, need_B = need[:E], need[E : 2 * E]
        kept = x if any(need_A) else None, saved.p if any(need_B) else None
        ctx.save_for_backward(*kept, weight, index, rng, mask, *tensors)
        ctx.options, ctx.x_dtype = options, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, p, weight, index, rng, mask, *tensors = saved
        spec, blocksizes = ctx.options
        E, (need_x, _, _, need_bias, _, _, _, *need) = len(spec.scaling), ctx.needs_input_grad
        lora_A, lora_B, codes = tensors[:E], tensors[E : 2 * E], tensors[2 * E :]
        if x is None:
            x = new_unsaved(dy, lora_A[0].shape[1], ctx.x_dtype)
        if p is None:
            R = max(A.shape[0] for A in lora_A)
            p = new_unsaved(dy, R, stat_dtype(spec.dtype), flat=True)
        needs = MultiNeeds(need_x, need[:E], need[E : 2 * E], need_bias)
        base = Codes(*codes, *blocksizes) if codes else weight
        operands = MultiOperands(x, base, lora_A, lora_B, index, None, rng, mask)
        run = multi_lora_linear_backward_undispatched
        dx, dA, dB, dbias = call_backward(ctx, _BACKWARD, run, dy, operands, Saved(p), spec, needs)
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        nones = [None] * len(codes)
        return dx, None, None, dbias, None, None, None, *dA, *dB, *nones


def choose(operands: MultiOperands, spec: MultiSpec, requested: Forced | None = None) -> Choice:
    """Choose the backend and strategy of both directions, for several adapters."""
    x, weight, lora_A, lora_B, *_ = operands
    device_type, index = context.device_of(x)
    K, N, R = x.shape[-1], lora_B[0].shape[0], max(A.shape[0] for A in lora_A)
    M, is_quantized = x.numel() // K, isinstance(weight, Codes)
    dtypes = x.dtype, lora_A[0].dtype, lora_B[0].dtype, spec.dtype
    stored = selection.layout_of(device_type, weight, spec.dtype)
    extra = selection.extra_operands(operands, spec.dropout_p)
    problem = Problem(device_type, *dtypes, R, M, is_quantized, N, K, extra, index, stored)
    return selection.choose(problem._replace(mixed=True), requested)


def _flatten(operands: MultiOperands) -> MultiOperands:
    """Return the operands with x and a mask flattened to M rows, and the adapters' rows."""
    x, index = operands.x, operands.adapter_index
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(index, Tensor):
        index = rows_of(index.reshape(-1), len(operands.lora_A), flat)
    return operands._replace(x=flat, adapter_index=index, mask=mask_rows(operands.mask, x))


def multi_lora_linear_undispatched(
    operands: MultiOperands, spec: MultiSpec, choice: Choice | None = None
) -> tuple[Tensor, Saved]:
    """Run the forward without the dispatcher, and return y and the tensors for the backward."""
    choice = choice or choose(operands, spec)
    with context.no_autocast(operands.x):
        y, saved = BACKENDS[choice.backend].multi_lora_linear(
            _flatten(operands), spec, choice.strategy
        )
    return set_leading_dims_(y, operands.x.shape[:-1]), saved


def multi_lora_linear_backward_undispatched(
    dy: Tensor,
    operands: MultiOperands,
    saved: Saved,
    spec: MultiSpec,
    needs: MultiNeeds,
    choice: Choice | None = None,
) -> MultiGrads:
    """Run the backward without the dispatcher."""
    choice = choice or choose(operands, spec)
    x = operands.x
    with context.no_autocast(x):
        grads = BACKENDS[choice.backend].multi_lora_linear_backward(
            dy.reshape(-1, dy.shape[-1]), _flatten(operands), saved, spec, needs, choice.strategy
        )
    return grads if grads.x is None else grads._replace(x=grads.x.view(x.shape))


# The registered ops ----------------------------------------------------------------------------


def _multi_lora_linear(*args: Any, choice: str = "") -> tuple[Tensor, ...]:
    operands, spec = split(args, MultiOperands, MultiSpec)
    chosen = choose(operands, spec, selection.parse_request(choice))
    y, saved = multi_lora_linear_undispatched(operands, spec, chosen)
    return y, saved.p, or_empty(saved.mask, torch.bool, y)


def _multi_lora_linear_fake(*args: Any, choice: str = "") -> tuple[Tensor, ...]:
    operands, spec = split(args, MultiOperands, MultiSpec)
    x, N, R = operands.x, operands.lora_B[0].shape[0], max(A.shape[0] for A in operands.lora_A)
    M, K = x.numel() // x.shape[-1], x.shape[-1]
    draws = draws_mask(operands, spec)
    return (
        x.new_empty(*x.shape[:-1], N, dtype=spec.y_dtype),
        x.new_empty(M, R, dtype=stat_dtype(spec.dtype)),
        x.new_empty((M, K) if draws else (0,), dtype=torch.bool),
    )


_MULTI = define(
    "multi_lora_linear",
    "(Tensor x, Tensor? weight, Tensor[] lora_A, Tensor[] lora_B, Tensor adapter_index, "
    "Tensor? bias, Tensor? rng, Tensor? mask, float[] scaling, float dropout_p, "
    'ScalarType dtype, ScalarType y_dtype, *, str choice="") -> '
    "(Tensor y, Tensor p, Tensor mask)",
    _multi_lora_linear,
    _multi_lora_linear_fake,
    tags=(torch.Tag.nondeterministic_seeded,),  # it may draw a dropout mask
)


def _multi_lora_linear_backward(
    dy: Tensor, p: Tensor, *args: Any, choice: str = ""
) -> tuple[Any, ...]:
    operands, spec, needs = split(args, MultiOperands, MultiSpec, MultiNeeds)
    chosen = choose(operands, spec, selection.parse_request(choice))
    grads = multi_lora_linear_backward_undispatched(dy, operands, Saved(p), spec, needs, chosen)
    return tuple(fill_grads(grads, (operands.x, operands.lora_A, operands.lora_B, p), dy))


def _multi_lora_linear_backward_fake(
    dy: Tensor, p: Tensor, *args: Any, choice: str = ""
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    operands, _, needs = split(args, MultiOperands, MultiSpec, MultiNeeds)
    x, lora_A, lora_B = operands.x, operands.lora_A, operands.lora_B
    return (
        new_grad(needs.x, x.shape, x.dtype, x),
        [new_grad(n, A.shape, A.dtype, x) for n, A in zip(needs.lora_A, lora_A, strict=True)],
        [new_grad(n, B.shape, B.dtype, x) for n, B in zip(needs.lora_B, lora_B, strict=True)],
        new_grad(needs.bias, lora_B[0].shape[:1], p.dtype, x),
    )


_BACKWARD = define(
    "multi_lora_linear_backward",
    "(Tensor dy, Tensor p, Tensor x, Tensor? weight, Tensor[] lora_A, Tensor[] lora_B, "
    "Tensor adapter_index, Tensor? bias, Tensor? rng, Tensor? mask, float[] scaling, "
    "float dropout_p, ScalarType dtype, ScalarType y_dtype, bool need_x, bool[] need_lora_A, "
    'bool[] need_lora_B, bool need_bias, *, str choice="") -> '
    "(Tensor grad_x, Tensor[] grad_lora_A, Tensor[] grad_lora_B, Tensor grad_bias)",
    _multi_lora_linear_backward,
    _multi_lora_linear_backward_fake,
)
