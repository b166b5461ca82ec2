"""`lora_linear`, from the public function down to the backends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import cuda, triton
from ..backends.cpu import linear as cpu
from ..backends.eager import linear as eager
from ..backends.library import is_on_gpu_path
from ..backends.protocol import Backend
from ..backends.rows import set_leading_dims_
from ..choice import choose as selection
from ..core.call import (
    Grads,
    Needs,
    Operands,
    Saved,
    Spec,
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
    check_number,
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
    join_weight,
    mask_rows,
    new_grad,
    or_empty,
    split,
)

BACKENDS: dict[str, Backend] = {"eager": eager, "cpu": cpu, "triton": triton, "cuda": cuda}


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    rank_gate: Tensor | None = None,
    column_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    recompute: bool = False,
) -> Tensor:
    """Apply a frozen linear layer with a low-rank adapter:

        y = c ⊙ (x·Wᵀ + ((D(x)·Aᵀ) ⊙ g)·Bᵀ) + bias,    g = scaling · rank_gate

    Args:
        x: [..., K], float32, bfloat16, float16 or float64. Any strides, any M including 0.
        weight: [N, K], frozen, in x's dtype unless autocast is on. A `QuantizedWeight` is decoded
            inside the GEMM. None: no base GEMM, y is the low-rank update alone.
        lora_A: [R, K], float32, bfloat16 or float16, independent of x's dtype; float64 only if all
            tensors are. GEMMs accumulate in float32. Under autocast a GPU casts x, W, A and B to
            its dtype; otherwise, and on a CPU, the adapter is not cast.
        lora_B: [N, R], as lora_A.
        scaling: alpha / r.
        bias: [N] or None, added after the column scale.
        rank_gate: [R] or None, multiplies `scaling` for each rank (AdaLoRA, hierarchical LoRA).
        column_scale: [N] or None (DoRA).
        dropout_p: probability in [0, 1] of zeroing an element of x on the adapter's branch.
        rng: int64[2], seed and offset of the dropout mask (see `dropout_mask`).
        dropout_mask: the mask itself, bool of x's shape, True for kept elements, instead of rng. If
            both are None and dropout_p > 0, the default generator of x's device draws a state. On a
            GPU that runs the eager backend, PyTorch's dropout kernel draws the mask.
        compute_dtype: of the base GEMM with a 4-bit weight without autocast: float32, bfloat16 or
            float16 (`Linear4bit.compute_dtype`). None: x's dtype.
        recompute: whether the backward recomputes D(x)·Aᵀ [M, R] instead of saving it.

    Returns:
        y [..., N], in autocast's dtype if autocast is enabled for x's device, else in x's.
        Differentiable once in x, lora_A, lora_B, rank_gate, column_scale and bias.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names the argument.
        RuntimeError: a forced backend cannot run here.

    >>> import torch, lora_kernels
    >>> x, W, A, B = torch.ones(2, 3), torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)
    >>> lora_kernels.lora_linear(x, W, A, B, scaling=0.5)
    tensor([[2.5000, 2.5000, 2.5000],
            [2.5000, 2.5000, 2.5000]])
    """
    check_tensor("x", x)
    R, K = matrix_shape("lora_A", lora_A, "[R, K]")
    N, ranks = matrix_shape("lora_B", lora_B, "[N, R]")
    x_dtype, a_dtype, b_dtype = x.dtype, lora_A.dtype, lora_B.dtype
    device_type, _ = context.device_of(x)
    cast_dtype = context.autocast_dtype(device_type, x_dtype)
    y_dtype = cast_dtype or x_dtype
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(
            f"x: got shape {list(x.shape)}, want [..., {K}] for lora_A {list(lora_A.shape)}"
        )
    if ranks != R:
        raise ValueError(f"lora_B: got shape {list(lora_B.shape)}, want [N, {R}] for rank {R}")
    if x_dtype not in FLOATS:
        raise TypeError(f"x: got {x_dtype}, want float32, bfloat16, float16 or float64")
    if not (x_dtype is a_dtype is b_dtype):
        check_dtypes("x", x_dtype, lora_A=a_dtype, lora_B=b_dtype)
    if not (x.is_cpu and lora_A.is_cpu and lora_B.is_cpu):
        check_devices("x", x, lora_A=lora_A, lora_B=lora_B)
    weight, codes, dtype = check_weight(x, weight, (N, K), compute_dtype, cast_dtype)
    if bias is not None:
        check_vector("bias", bias, N, x)
    if rank_gate is not None:
        check_vector("rank_gate", rank_gate, R, x)
    if column_scale is not None:
        check_vector("column_scale", column_scale, N, x)
    if cast_dtype and is_on_gpu_path(device_type):  # a CPU's kernels keep the adapter's bits
        x, lora_A, lora_B = (t.to(y_dtype) for t in (x, lora_A, lora_B))
        weight = weight.to(y_dtype) if isinstance(weight, Tensor) else weight
    mask = dropout_mask
    if dropout_p or rng is not None or mask is not None:
        dropout_p, rng, mask = check_dropout(x, dropout_p, rng, mask)
    scaling, dropout_p = check_number("scaling", scaling), float(dropout_p)
    spec = Spec(scaling, dropout_p, dtype, y_dtype)
    frozen = codes[:CODES_TENSORS] or (weight,)
    options = Options(spec, recompute, codes[CODES_TENSORS:])
    return _run(x, lora_A, lora_B, rank_gate, column_scale, bias, options, rng, mask, *frozen)


def _run(x: Tensor, lora_A: Tensor, lora_B: Tensor, *others: Any) -> Tensor:
    """Call the Function, or without gradients the implementation. Arguments as the Function's."""
    rank_gate, column_scale, bias, options, rng, mask, *frozen = others
    tensors = x, lora_A, lora_B, rank_gate, column_scale, bias, rng, mask, *frozen
    if not torch.is_grad_enabled() and context.can_bypass_dispatcher(*tensors):
        base = join_weight(frozen, options.blocksizes)
        operands = Operands(x, base, lora_A, lora_B, rank_gate, column_scale, bias, rng, mask)
        return lora_linear_undispatched(operands, options.spec)[0]
    context.refuse_context()
    return LoRALinearFunction.apply(x, lora_A, lora_B, *others)  # type: ignore[no-any-return]


class Options(NamedTuple):
    """The arguments of `LoRALinearFunction` that are not tensors.

    They are one argument, because a Function's call takes time for each argument.

    Args:
        spec: of the call.
        recompute: whether the backward recomputes P instead of saving it.
        blocksizes: the fields of `Codes` that are not tensors; () for a dense weight.
    """

    spec: Spec
    recompute: bool
    blocksizes: tuple[Any, ...]


class LoRALinearFunction(torch.autograd.Function):
    """The op `lora_linear` with `lora_linear_backward`; no mathematics of its own.

    `weight` is a dense weight or None, or the tensors of a 4-bit weight. The backward reads the
    operands, x only for dA or to recompute P; P [M, R] for dB and dg, unless `Options.recompute`
    makes it from x; and z [M, N] if the column scale needs a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        rank_gate: Tensor | None,
        column_scale: Tensor | None,
        bias: Tensor | None,
        options: Options,
        *frozen: Any,  # rng and mask, then the weight
    ) -> Tensor:
        rng, mask, *weight = frozen
        spec, recompute, blocksizes = options
        base = join_weight(weight, blocksizes)
        operands = Operands(x, base, lora_A, lora_B, rank_gate, column_scale, bias, rng, mask)
        _, need_A, need_B, need_gate, need_scale, *_ = ctx.needs_input_grad
        if column_scale is not None and need_scale:
            spec = spec._replace(save_z=True)
        run = lora_linear_undispatched
        y, (p, z, drawn) = call_forward(ctx, _LINEAR, choose, run, operands, spec)
        reads_p = need_B or need_gate
        reads_x = need_A or (reads_p and recompute)
        kept_x, kept_p = x if reads_x else None, p if reads_p and not recompute else None
        adapter = lora_A, lora_B, rank_gate, column_scale
        mask = mask if drawn is None else drawn
        ctx.save_for_backward(kept_x, *adapter, rng, mask, kept_p, z, *weight)
        ctx.options, ctx.x_dtype = options, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, tensors: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, rank_gate, column_scale, rng, mask, p, z, *weight = tensors
        spec, _, blocksizes = ctx.options
        needs = Needs(*ctx.needs_input_grad[:6])
        base = join_weight(weight, blocksizes)
        R, K = lora_A.shape
        if x is None:
            x = new_unsaved(dy, K, ctx.x_dtype)
        operands = Operands(x, base, lora_A, lora_B, rank_gate, column_scale, None, rng, mask)
        if p is None and not (needs.lora_B or needs.rank_gate):
            p = new_unsaved(dy, R, stat_dtype(spec.dtype), flat=True)
        elif p is None:
            backend, _, _ = str(ctx.choice).partition(" ")  # the strategy depends on N, here 1
            p = _down_projection(operands, spec, backend)
        dx, dA, dB, dgate, dscale, dbias = call_linear_backward(
            ctx, dy, operands, Saved(p, z), spec, needs
        )
        dgate = None if dgate is None else dgate.to(rank_gate.dtype)
        dscale = None if dscale is None else dscale.to(column_scale.dtype)
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        return dx, dA, dB, dgate, dscale, dbias, *[None] * (3 + len(weight))


def call_linear_backward(
    ctx: Any, dy: Tensor, operands: Operands, saved: Saved, spec: Spec, needs: Needs
) -> Iterable[Any]:
    """Call the op `lora_linear_backward` or its implementation; see `call_backward`."""
    run = lora_linear_backward_undispatched
    return call_backward(ctx, _BACKWARD, run, dy, operands, saved, spec, needs)


def choose(operands: Operands, spec: Spec, requested: Forced | None = None) -> Choice:
    """Choose the backend and strategy of both directions.

    requested: None for the backend in force.
    """
    x, weight, lora_A, lora_B, *_ = operands
    device_type, index = context.device_of(x)
    (R, K), N, dtype = lora_A.shape, lora_B.shape[0], spec.dtype
    M, is_quantized = x.numel() // K, isinstance(weight, Codes)
    dtypes = x.dtype, lora_A.dtype, lora_B.dtype, dtype
    stored = selection.layout_of(device_type, weight, dtype)
    extra = selection.extra_operands(operands, spec.dropout_p)
    problem = Problem(device_type, *dtypes, R, M, is_quantized, N, K, extra, index, stored)
    return selection.choose(problem, requested)


def lora_linear_undispatched(
    operands: Operands, spec: Spec, choice: Choice | None = None
) -> tuple[Tensor, Saved]:
    """Run the forward without the dispatcher, and return y and the tensors for the backward."""
    choice = choice or choose(operands, spec)
    x, backend = operands.x, BACKENDS[choice.backend]
    with context.no_autocast(x):
        if choice.backend == "cpu":  # takes any leading dimensions
            return cpu.lora_linear(operands, spec, choice.strategy)
        if x.dim() == 2:
            return backend.lora_linear(operands, spec, choice.strategy)
        rows = operands._replace(x=x.reshape(-1, x.shape[-1]), mask=mask_rows(operands.mask, x))
        y, saved = backend.lora_linear(rows, spec, choice.strategy)
    return set_leading_dims_(y, x.shape[:-1]), saved


def lora_linear_backward_undispatched(
    dy: Tensor,
    operands: Operands,
    saved: Saved,
    spec: Spec,
    needs: Needs,
    choice: Choice | None = None,
) -> Grads:
    """Run the backward without the dispatcher."""
    choice = choice or choose(operands, spec)
    x = operands.x
    if not (choice.backend == "cpu" or x.dim() == 2):
        dy = dy.reshape(-1, dy.shape[-1])
        operands = operands._replace(x=x.reshape(-1, x.shape[-1]), mask=mask_rows(operands.mask, x))
    with context.no_autocast(x):
        grads = BACKENDS[choice.backend].lora_linear_backward(
            dy, operands, saved, spec, needs, choice.strategy
        )
    dx = grads.x
    return grads if dx is None or dx.dim() == x.dim() else grads._replace(x=dx.view(x.shape))


# The registered ops ----------------------------------------------------------------------------


def _lora_linear(*args: Any, choice: str = "") -> tuple[Tensor, ...]:
    operands, spec = split(args, Operands, Spec)
    chosen = choose(operands, spec, selection.parse_request(choice))
    y, saved = lora_linear_undispatched(operands, spec, chosen)
    z, mask = or_empty(saved.z, spec.y_dtype, y), or_empty(saved.mask, torch.bool, y)
    return y, saved.p, z, mask


def _lora_linear_fake(*args: Any, choice: str = "") -> tuple[Tensor, ...]:
    operands, spec = split(args, Operands, Spec)
    x, (N, R) = operands.x, operands.lora_B.shape
    M, K = x.numel() // x.shape[-1], x.shape[-1]
    draws = draws_mask(operands, spec)
    return (
        x.new_empty(*x.shape[:-1], N, dtype=spec.y_dtype),
        x.new_empty(M, R, dtype=stat_dtype(spec.dtype)),
        x.new_empty((M, N) if spec.save_z else (0,), dtype=spec.y_dtype),
        x.new_empty((M, K) if draws else (0,), dtype=torch.bool),
    )


_LINEAR = define(
    "lora_linear",
    "(Tensor x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? rank_gate, "
    "Tensor? column_scale, Tensor? bias, Tensor? rng, Tensor? mask, float scaling, "
    "float dropout_p, ScalarType dtype, ScalarType y_dtype, bool save_z, *, "
    'str choice="") -> (Tensor y, Tensor p, Tensor z, Tensor mask)',
    _lora_linear,
    _lora_linear_fake,
    tags=(torch.Tag.nondeterministic_seeded,),  # it may draw a dropout mask
)


def _lora_linear_backward(
    dy: Tensor, p: Tensor, z: Tensor | None, *args: Any, choice: str = ""
) -> tuple[Tensor, ...]:
    operands, spec, needs = split(args, Operands, Spec, Needs)
    chosen = choose(operands, spec, selection.parse_request(choice))
    grads = lora_linear_backward_undispatched(dy, operands, Saved(p, z), spec, needs, chosen)
    return tuple(fill_grads(grads, (operands.x, operands.lora_A, operands.lora_B, p, p, p), dy))


def _lora_linear_backward_fake(
    dy: Tensor, p: Tensor, z: Tensor | None, *args: Any, choice: str = ""
) -> tuple[Tensor, ...]:
    operands, _, needs = split(args, Operands, Spec, Needs)
    x, lora_A, lora_B = operands.x, operands.lora_A, operands.lora_B
    N, R = lora_B.shape
    return (
        new_grad(needs.x, x.shape, x.dtype, x),
        new_grad(needs.lora_A, lora_A.shape, lora_A.dtype, x),
        new_grad(needs.lora_B, lora_B.shape, lora_B.dtype, x),
        new_grad(needs.rank_gate, (R,), p.dtype, x),
        new_grad(needs.column_scale, (N,), p.dtype, x),
        new_grad(needs.bias, (N,), p.dtype, x),
    )


_BACKWARD = define(
    "lora_linear_backward",
    "(Tensor dy, Tensor p, Tensor? z, Tensor x, Tensor? weight, Tensor lora_A, Tensor lora_B, "
    "Tensor? rank_gate, Tensor? column_scale, Tensor? bias, Tensor? rng, Tensor? mask, "
    "float scaling, float dropout_p, ScalarType dtype, ScalarType y_dtype, bool save_z, "
    "bool need_x, bool need_lora_A, bool need_lora_B, bool need_rank_gate, "
    'bool need_column_scale, bool need_bias, *, str choice="") -> '
    "(Tensor grad_x, Tensor grad_lora_A, Tensor grad_lora_B, Tensor grad_rank_gate, "
    "Tensor grad_column_scale, Tensor grad_bias)",
    _lora_linear_backward,
    _lora_linear_backward_fake,
)


def _down_projection(operands: Operands, spec: Spec, backend: str) -> Tensor:
    """Compute P = D(x)·Aᵀ [M, R] by `lora_linear` without a base GEMM and with N = 1.

    On the CPU, P is bitwise equal to P of a call with a base GEMM. Triton may choose another
    strategy for this call, which sums in another order. The eager backend computes it for CUDA,
    whose kernels need a base GEMM.

    backend: "" for the one in force.
    """
    x, lora_A = operands.x, operands.lora_A
    operands = operands._replace(
        weight=None, lora_B=lora_A.new_zeros(1, lora_A.shape[0]), rank_gate=None, column_scale=None
    )
    spec = Spec(1.0, spec.dropout_p, spec.dtype, x.dtype)
    backend = backend or selection.format_request().partition(" ")[0]
    backend = "eager" if backend == "cuda" else backend
    if context.can_bypass_dispatcher(x, lora_A):
        choice = choose(operands, spec, selection.parse_request(backend))
        return lora_linear_undispatched(operands, spec, choice)[1].p
    p: Tensor
    _, p, *_ = torch.ops.lora_kernels.lora_linear.default(*operands, *spec, choice=backend)
    return p
