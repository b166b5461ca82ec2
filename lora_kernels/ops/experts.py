"""`lora_experts_linear`, rows sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.cpu import experts as cpu_experts
from ..backends.eager import experts as eager_experts
from ..backends.experts import largest_rank
from ..backends.library import is_on_gpu_path
from ..backends.protocol import ExpertsBackend
from ..choice import choose as selection
from ..core.call import (
    ExpertsGrads,
    ExpertsNeeds,
    ExpertsOperands,
    ExpertsSpec,
    Saved,
)
from ..core.codes import CODES_TENSORS, Codes
from ..core.dtypes import stat_dtype
from ..core.forced import Forced
from ..core.problem import Choice, Problem
from ..quantization import QuantizedWeight
from . import context
from .arguments import (
    check_both_or_none,
    check_devices,
    check_dropout,
    check_dtypes,
    check_integers,
    check_scaling,
    check_tensor,
    check_weight,
    check_x_and_weight,
)
from .autograd import differentiable_once, new_unsaved
from .registry import (
    call_backward,
    call_forward,
    define,
    draws_mask,
    fill_grads,
    join_weight,
    new_grad,
    or_empty,
    split,
    tensors_of,
)

BACKENDS: dict[str, ExpertsBackend] = {"eager": eager_experts, "cpu": cpu_experts}


def lora_experts_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor | Sequence[Tensor] | None,
    lora_B: Tensor | Sequence[Tensor] | None,
    offsets: Tensor,
    scaling: float | Sequence[float] = 1.0,
    bias: Tensor | None = None,
    *,
    is_transposed: bool = False,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    has_tail: bool = True,
) -> Tensor:
    """Apply each expert's frozen linear layer and adapter, for rows sorted by expert:

        y_m = W_e·x_m + scaling · B_e·(A_e·D(x)_m) + bias_e,    offsets[e-1] <= m < offsets[e]

    Several tenants may share the experts, each with an adapter of its own in every expert. Their
    rows are then sorted by expert and tenant: e counts the pairs for A, B and the offsets, and the
    base GEMM runs once for all tenants of an expert. A NaN of a tenant stays in its rows and in its
    adapter.

    On a CPU neither direction copies a dense weight, and no tenant's A is copied. On a GPU
    W + scaling·B·A of all experts is computed where that moves fewer bytes and takes fewer FLOPs:
    from 2·E·N·K / (N + K) rows on, with one tenant and without dropout. A 4-bit weight is decoded
    one expert at a time, or on a GPU in pieces of at most 256 MiB.

    Args:
        x: [M, K], float32, bfloat16, float16 or float64.
        weight: [E, N, K], frozen, with any strides, in x's dtype unless autocast is on; or a
            `QuantizedWeight` of that shape.
        lora_A: [E, R, K]; of T tenants a sequence of such tensors, of any ranks and one dtype, or
            [E·T, R, K]. None, like lora_B: no adapters.
        lora_B: [E, N, R], any strides; of T tenants a sequence, or [E·T, N, R]. PEFT's weights
            [N, R·E] are `weight.view(N, R, E).permute(2, 0, 1)`.
        offsets: int32 or int64 [E] or [E·T], ascending: one past the last row of each expert, as in
            `torch.nn.functional.grouped_mm`, or of each pair, all tenants of an expert one after
            the other. Rows from offsets[-1] on belong to no expert, and y is zero. The values are
            checked on the CPU alone, because reading them would synchronize a GPU.
        scaling: alpha / r, one number for all tenants or one for each.
        bias: [E, N] or None.
        is_transposed: whether `weight` is [E, K, N].
        dropout_p, rng, dropout_mask, compute_dtype: as in `lora_linear`. The mask's rows are those
            of x.
        has_tail: whether rows of no expert may follow. False promises that offsets[-1] is M, and
            saves a GPU two passes over y and over dx: without zeros, such rows would be undefined.

    Returns:
        y [M, N], in autocast's dtype if autocast is enabled for x's device, else in x's.
        Differentiable once in x, lora_A, lora_B and bias. The gradients of a pair without rows are
        zero.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names the argument.
        RuntimeError: a forced backend cannot run here.

    >>> import torch, lora_kernels
    >>> x, W, A, B = torch.ones(3, 2), torch.ones(2, 1, 2), torch.ones(2, 1, 2), torch.ones(2, 1, 1)
    >>> lora_kernels.lora_experts_linear(x, W, A, B, torch.tensor([0, 2]), scaling=0.5).tolist()
    [[3.0], [3.0], [0.0]]
    """
    check_x_and_weight(x, weight)
    if len(weight.shape) != 3 or 0 in weight.shape:
        want = "[E, K, N]" if is_transposed else "[E, N, K]"
        raise ValueError(f"weight: got shape {list(weight.shape)}, want {want}, each at least 1")
    E, N, K = weight.shape
    N, K = (K, N) if is_transposed else (N, K)
    if x.dim() != 2 or x.shape[1] != K:
        raise ValueError(
            f"x: got shape {list(x.shape)}, want [M, {K}] for weight {list(weight.shape)}"
            + " and is_transposed=True" * is_transposed
        )
    check_both_or_none(lora_A, lora_B)
    if lora_A is None or lora_B is None:
        As, Bs = [x.new_empty(E, 0, K)], [x.new_empty(E, N, 0)]
    elif isinstance(lora_A, Tensor) and isinstance(lora_B, Tensor):
        _check_experts_adapter(x, lora_A, lora_B, (E, N, K))
        As, Bs = _unstack(lora_A, E), _unstack(lora_B, E)
    else:
        As, Bs = _check_tenants(x, lora_A, lora_B, (E, N, K))
    tenants = len(As)
    factors = check_scaling(scaling, tenants)
    _check_offsets(offsets, E * tenants, x)
    device_type, _ = context.device_of(x)
    cast_dtype = context.autocast_dtype(device_type, x.dtype)
    y_dtype = cast_dtype or x.dtype
    shape = tuple(weight.shape)
    base, codes, dtype = check_weight(x, weight, shape, compute_dtype, cast_dtype)
    if base is not None and is_transposed:
        base = base.mT
    if bias is not None:
        check_tensor("bias", bias)
        if bias.shape != (E, N):
            raise ValueError(f"bias: got shape {list(bias.shape)}, want [{E}, {N}]")
        check_dtypes("x", x.dtype, bias=bias.dtype)
        check_devices("x", x, bias=bias)
    if cast_dtype and is_on_gpu_path(device_type):
        x, *both = (t.to(y_dtype) for t in (x, *As, *Bs))
        As, Bs = both[:tenants], both[tenants:]
        base = None if base is None else base.to(y_dtype)
    dropout_p, rng, mask = check_dropout(x, dropout_p, rng, dropout_mask)
    others = bool(is_transposed), bool(has_tail)
    spec = ExpertsSpec(factors, dropout_p, dtype, y_dtype, *others)
    frozen = codes[:CODES_TENSORS] or (base,)
    operand = Codes(*codes) if codes else base
    operands = ExpertsOperands(x, operand, As, Bs, offsets, bias, rng, mask)
    if not torch.is_grad_enabled() and context.can_bypass_dispatcher(*tensors_of(operands)):
        return lora_experts_undispatched(operands, spec)[0]
    options = Options(spec, codes[CODES_TENSORS:])
    context.refuse_context()
    return LoRAExpertsFunction.apply(  # type: ignore[no-any-return]
        x, bias, offsets, options, rng, mask, *As, *Bs, *frozen
    )


def _unstack(t: Tensor, experts: int) -> list[Tensor]:
    """Return the T stacks of a tensor [E·T, ..]."""
    return [t] if t.shape[0] == experts else list(t.unflatten(0, (experts, -1)).unbind(1))


def _check_tenants(
    x: Tensor, lora_A: Any, lora_B: Any, sizes: tuple[int, int, int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the stacks of each tenant."""
    E, N, K = sizes
    for name, tensors in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(tensors, Sequence) or not tensors:
            want = "a sequence of a tensor for each tenant, as the other has"
            raise TypeError(f"{name}: got {type(tensors).__name__}, want {want}")
        for t, tensor in enumerate(tensors):
            check_tensor(f"{name}[{t}]", tensor)
    if len(lora_B) != len(lora_A):
        want = f"{len(lora_A)}, as many as of lora_A"
        raise ValueError(f"lora_B: got tensors of {len(lora_B)} tenants, want {want}")
    dtypes = lora_A[0].dtype, lora_B[0].dtype
    for t, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        names = f"lora_A[{t}]", f"lora_B[{t}]"
        if A.dim() != 3 or A.shape[::2] != (E, K):
            raise ValueError(f"{names[0]}: got shape {list(A.shape)}, want [{E}, R, {K}]")
        if B.shape != (E, N, A.shape[1]):
            want = f"[{E}, {N}, {A.shape[1]}]"
            raise ValueError(f"{names[1]}: got shape {list(B.shape)}, want {want}")
        if (A.dtype, B.dtype) != dtypes:
            raise TypeError(
                f"{names[0]}, {names[1]}: got {A.dtype}, {B.dtype}, want {dtypes[0]}, {dtypes[1]}, "
                "as the first have"
            )
        check_devices("x", x, **dict(zip(names, (A, B), strict=True)))
    check_dtypes("x", x.dtype, lora_A=dtypes[0], lora_B=dtypes[1])
    return list(lora_A), list(lora_B)


def _check_experts_adapter(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, sizes: tuple[int, int, int]
) -> None:
    E, N, K = sizes
    for name, t in (("lora_A", lora_A), ("lora_B", lora_B)):
        check_tensor(name, t)
    is_3d = lora_A.dim() == 3 and 0 not in lora_A.shape
    if not is_3d or lora_A.shape[0] % E or lora_A.shape[2] != K:
        raise ValueError(
            f"lora_A: got shape {list(lora_A.shape)}, want [{E}, R, {K}] with R at least 1, or "
            f"[{E}·T, R, {K}] for T tenants"
        )
    if lora_B.shape != (lora_A.shape[0], N, lora_A.shape[1]):
        want = f"[{lora_A.shape[0]}, {N}, {lora_A.shape[1]}]"
        raise ValueError(f"lora_B: got shape {list(lora_B.shape)}, want {want}")
    check_dtypes("x", x.dtype, lora_A=lora_A.dtype, lora_B=lora_B.dtype)
    check_devices("x", x, lora_A=lora_A, lora_B=lora_B)


def _check_offsets(offsets: Tensor, experts: int, x: Tensor) -> None:
    check_integers("offsets", offsets)
    if offsets.shape != (experts,):
        raise ValueError(f"offsets: got shape {list(offsets.shape)}, want [{experts}]")
    check_devices("x", x, offsets=offsets)


def _check_rows(operands: ExpertsOperands) -> None:
    """Raise ValueError for offsets that are not rows of x in rising order.

    Both directions check them: kernels read where they point, and `.data` may change them between
    forward and backward. Reading a GPU's would synchronize.
    """
    offsets, M, start = operands.offsets, operands.x.shape[0], 0
    if not offsets.is_cpu:
        return
    for e, stop in enumerate(offsets.tolist()):
        if not start <= stop <= M:
            raise ValueError(
                f"offsets[{e}]: got {stop}, want {start} to {M}: rising, up to x's rows"
            )
        start = stop


class Options(NamedTuple):
    """The arguments of `LoRAExpertsFunction` that are not tensors."""

    spec: ExpertsSpec
    blocksizes: tuple[Any, ...]


class LoRAExpertsFunction(torch.autograd.Function):
    """The op `lora_experts` with `lora_experts_backward`.

    `tensors` are lora_A of each tenant, lora_B of each, and a dense weight or the tensors of a
    4-bit weight. The backward needs the operands and P [M, R], but x for dA alone, and P for dB.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        offsets: Tensor,
        options: Options,
        rng: Tensor | None,
        mask: Tensor | None,
        *tensors: Any,
    ) -> Tensor:
        spec, blocksizes = options
        T = len(spec.scaling)
        lora_A, lora_B, base = tensors[:T], tensors[T : 2 * T], tensors[2 * T :]
        base = join_weight(base, blocksizes)
        operands = ExpertsOperands(x, base, lora_A, lora_B, offsets, bias, rng, mask)
        y, saved = call_forward(ctx, _EXPERTS, choose, lora_experts_undispatched, operands, spec)
        mask = mask if saved.mask is None else saved.mask
        need = ctx.needs_input_grad[6:]  # of `tensors`
        need_A, need_B = need[:T], need[T : 2 * T]
        kept = x if any(need_A) else None, saved.p if any(need_B) else None
        ctx.save_for_backward(*kept, offsets, rng, mask, *tensors)
        ctx.options, ctx.x_dtype = options, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, tensors: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, p, offsets, rng, mask, *tensors_of_weights = tensors
        spec, blocksizes = ctx.options
        T, (need_x, need_bias, _, _, _, _, *need) = len(spec.scaling), ctx.needs_input_grad
        lora_A, lora_B = tensors_of_weights[:T], tensors_of_weights[T : 2 * T]
        base = join_weight(tensors_of_weights[2 * T :], blocksizes)
        R, K = largest_rank(lora_A), lora_A[0].shape[2]
        x = new_unsaved(dy, K, ctx.x_dtype) if x is None else x
        p = new_unsaved(dy, R, stat_dtype(spec.dtype)) if p is None else p
        needs = ExpertsNeeds(need_x, need[:T], need[T : 2 * T], need_bias)
        operands = ExpertsOperands(x, base, lora_A, lora_B, offsets, None, rng, mask)
        run = lora_experts_backward_undispatched
        dx, dA, dB, dbias = call_backward(ctx, _BACKWARD, run, dy, operands, Saved(p), spec, needs)
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        nones = [None] * (len(tensors_of_weights) - 2 * T)
        return dx, dbias, None, None, None, None, *dA, *dB, *nones


def choose(operands: ExpertsOperands, spec: ExpertsSpec, requested: Forced | None = None) -> Choice:
    """Choose the backend and strategy of both directions, for rows sorted by expert."""
    x, weight, lora_A, lora_B, *_ = operands
    (device_type, index), (M, K), N = context.device_of(x), x.shape, lora_B[0].shape[1]
    R, is_quantized = largest_rank(lora_A), isinstance(weight, Codes)
    dtypes = x.dtype, lora_A[0].dtype, lora_B[0].dtype, spec.dtype
    extra = selection.extra_operands(operands, spec.dropout_p)
    problem = Problem(device_type, *dtypes, R, M, is_quantized, N, K, extra, index)
    return selection.choose_experts(problem, requested)


def lora_experts_undispatched(
    operands: ExpertsOperands, spec: ExpertsSpec, choice: Choice | None = None
) -> tuple[Tensor, Saved]:
    """Run the forward without the dispatcher, and return y and the tensors for the backward."""
    _check_rows(operands)
    choice = choice or choose(operands, spec)
    with context.no_autocast(operands.x):
        return BACKENDS[choice.backend].lora_experts(operands, spec, choice.strategy)


def lora_experts_backward_undispatched(
    dy: Tensor,
    operands: ExpertsOperands,
    saved: Saved,
    spec: ExpertsSpec,
    needs: ExpertsNeeds,
    choice: Choice | None = None,
) -> ExpertsGrads:
    """Run the backward without the dispatcher."""
    _check_rows(operands)
    choice = choice or choose(operands, spec)
    with context.no_autocast(operands.x):
        return BACKENDS[choice.backend].lora_experts_backward(
            dy, operands, saved, spec, needs, choice.strategy
        )


# The registered ops ----------------------------------------------------------------------------


def _lora_experts(*args: Any, choice: str = "") -> tuple[Tensor, ...]:
    operands, spec = split(args, ExpertsOperands, ExpertsSpec)
    chosen = choose(operands, spec, selection.parse_request(choice))
    y, saved = lora_experts_undispatched(operands, spec, chosen)
    return y, saved.p, or_empty(saved.mask, torch.bool, y)


def _lora_experts_fake(*args: Any, choice: str = "") -> tuple[Tensor, ...]:
    operands, spec = split(args, ExpertsOperands, ExpertsSpec)
    x, (M, K), N = operands.x, operands.x.shape, operands.lora_B[0].shape[1]
    R = largest_rank(operands.lora_A)
    draws = draws_mask(operands, spec)
    return (
        x.new_empty(M, N, dtype=spec.y_dtype),
        x.new_empty(M, R, dtype=stat_dtype(spec.dtype)),
        x.new_empty((M, K) if draws else (0,), dtype=torch.bool),
    )


_EXPERTS = define(
    "lora_experts",
    "(Tensor x, Tensor? weight, Tensor[] lora_A, Tensor[] lora_B, Tensor offsets, Tensor? bias, "
    "Tensor? rng, Tensor? mask, float[] scaling, float dropout_p, ScalarType dtype, "
    'ScalarType y_dtype, bool transposed, bool has_tail, *, str choice="") -> '
    "(Tensor y, Tensor p, Tensor mask)",
    _lora_experts,
    _lora_experts_fake,
    tags=(torch.Tag.nondeterministic_seeded,),  # it may draw a dropout mask
)


def _lora_experts_backward(
    dy: Tensor, p: Tensor, *args: Any, choice: str = ""
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    operands, spec, needs = split(args, ExpertsOperands, ExpertsSpec, ExpertsNeeds)
    chosen = choose(operands, spec, selection.parse_request(choice))
    grads = lora_experts_backward_undispatched(dy, operands, Saved(p), spec, needs, chosen)
    likes = operands.x, operands.lora_A, operands.lora_B, p
    dx, dA, dB, dbias = fill_grads(grads, likes, dy)
    return dx, dA, [t.contiguous() for t in dB], dbias  # as the fake says


def _lora_experts_backward_fake(
    dy: Tensor, p: Tensor, *args: Any, choice: str = ""
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    operands, _, needs = split(args, ExpertsOperands, ExpertsSpec, ExpertsNeeds)
    x, lora_A, lora_B = operands.x, operands.lora_A, operands.lora_B
    return (
        new_grad(needs.x, x.shape, x.dtype, x),
        [new_grad(n, A.shape, A.dtype, x) for n, A in zip(needs.lora_A, lora_A, strict=True)],
        [new_grad(n, B.shape, B.dtype, x) for n, B in zip(needs.lora_B, lora_B, strict=True)],
        new_grad(needs.bias, lora_B[0].shape[:2], p.dtype, x),
    )


_BACKWARD = define(
    "lora_experts_backward",
    "(Tensor dy, Tensor p, Tensor x, Tensor? weight, Tensor[] lora_A, Tensor[] lora_B, "
    "Tensor offsets, Tensor? bias, Tensor? rng, Tensor? mask, float[] scaling, float dropout_p, "
    "ScalarType dtype, ScalarType y_dtype, bool transposed, bool has_tail, "
    'bool need_x, bool[] need_lora_A, bool[] need_lora_B, bool need_bias, *, str choice="") -> '
    "(Tensor grad_x, Tensor[] grad_lora_A, Tensor[] grad_lora_B, Tensor grad_bias)",
    _lora_experts_backward,
    _lora_experts_backward_fake,
)
