"""A language model's head with an adapter: its cross-entropy, and its tokens' log-probabilities.

The logits [M, V] are never in memory: a chunk of rows at a time is. See `backends.eager.head`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import decoder
from ..backends.eager import head as eager_head
from ..backends.library import is_on_gpu_path
from ..choice import choose as selection
from ..core.call import (
    Grads,
    HeadGrads,
    HeadNeeds,
    HeadOperands,
    HeadOutputs,
    HeadSpec,
    Needs,
    Operands,
    Saved,
    Spec,
)
from ..core.codes import CODES_TENSORS, Codes
from ..core.dtypes import stat_dtype
from ..core.forced import Forced
from ..quantization import QuantizedWeight
from . import context, flops, linear
from .arguments import (
    check_both_or_none,
    check_devices,
    check_dropout,
    check_dtypes,
    check_integers,
    check_number,
    check_tensor,
    check_vector,
    check_weight,
    check_x_and_weight,
    matrix_shape,
)
from .autograd import differentiable_once
from .registry import call_op, define, join_weight, mask_rows, needed, new_grad, or_empty, split

REDUCTIONS = ("mean", "sum", "none")


class TokenLogProbs(NamedTuple):
    """The results of `lora_linear_log_probs`, each of labels' shape; None if not requested.

    Args:
        log_probs: log p of the label.
        entropy: -Σ p·log p. Words whose logit is -inf count as 0.
        mean_logits: the mean of the scaled logits over the vocabulary, without a gradient.
        log_sum_sq_probs: log Σ p², without a gradient.
        is_top1: bool, whether the label has the largest logit, and is the first that has it.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    is_top1: Tensor | None = None


class _Inputs(NamedTuple):
    """The tensors that both functions take, as the user gives them."""

    x: Tensor
    weight: Tensor | QuantizedWeight
    lora_A: Tensor | None
    lora_B: Tensor | None
    labels: Tensor
    bias: Tensor | None
    rng: Tensor | None
    mask: Tensor | None


class Options(NamedTuple):
    """The arguments of the Functions that are not tensors.

    blocksizes: the fields of `Codes` that are not tensors; () for a dense weight.
    """

    spec: HeadSpec
    blocksizes: tuple[Any, ...]


def lora_linear_cross_entropy(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    labels: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the cross-entropy of a head with a low-rank adapter, without its logits in memory:

        z = cap(logit_scale · lora_linear(x)),    cap(y) = logit_softcap · tanh(y / logit_softcap)
        loss_m = log Σ_v exp(z_mv) − (1 − ε)·z_m,label − ε·mean_v z_mv,    ε = label_smoothing

    The forward computes the gradients too if one is needed, except for reduction="none", whose
    backward computes the logits again.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64, not shifted against the labels.
        weight: [V, K] in x's dtype unless autocast is on, or a `QuantizedWeight`. A dense one may
            require a gradient, as an embedding's that is tied to the head.
        lora_A: [R, K]. None, like lora_B: no adapter.
        lora_B: [V, R]. Dtypes as in `lora_linear`.
        labels: int64 or int32 [...], 0 to V - 1, or ignore_index. On a GPU another label makes the
            loss NaN, or fails PyTorch's own assertion where its ops compute the loss.
        scaling: alpha / r.
        bias: [V] or None.
        ignore_index: the label of rows that count for nothing. They are left out of the GEMMs.
        label_smoothing: in [0, 1].
        logit_softcap: positive, or None for no cap.
        logit_scale: factor of the logits.
        reduction: "mean" over the rows that are not ignored, "sum" or "none".
        chunk_rows: rows of x whose logits exist at a time. None: 32 MiB of float32 logits on a CPU,
            256 MiB of logits on a GPU, and at least 128 rows.
        dropout_p, rng, dropout_mask, compute_dtype: as in `lora_linear`. The mask's rows are those
            of x, and the eager backend computes the logits.

    Returns:
        float32 (float64 for float64), [] or labels' shape for reduction="none". NaN for a mean over
        no rows, as in PyTorch. Differentiable once in x, weight, lora_A, lora_B and bias.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names the argument.
        RuntimeError: a forced backend cannot run here.

    >>> import torch, lora_kernels
    >>> x, W, A, B = torch.ones(2, 3), torch.eye(3), torch.ones(1, 3), torch.zeros(3, 1)
    >>> lora_kernels.lora_linear_cross_entropy(x, W, A, B, torch.tensor([0, -100])).exp()
    tensor(3.)
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, want one of {', '.join(REDUCTIONS)}")
    label_smoothing = check_number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, want a number in [0, 1]")
    inputs = _Inputs(x, weight, lora_A, lora_B, labels, bias, rng, dropout_mask)
    operands, spec = _prepare(inputs, scaling, dropout_p, compute_dtype)
    spec = _check_logits(spec, ignore_index, logit_softcap, logit_scale, chunk_rows)
    options, tensors = _flatten(operands, spec._replace(label_smoothing=label_smoothing))
    if reduction == "none":
        losses = _LogProbsFunction.apply(options, HeadOutputs(), *tensors)[0]
        return -losses.view(labels.shape)  # type: ignore[no-any-return]
    grad = torch.is_grad_enabled()
    needs = HeadNeeds(*(t is not None and t.requires_grad and grad for t in _trainable(operands)))
    loss: Tensor = _CrossEntropyFunction.apply(options, needs, *tensors)
    if reduction == "sum":
        return loss
    count = (operands.labels != ignore_index).sum()
    # No rows have zero gradients and a loss of NaN, which a quotient 0 / 0 would give both.
    return (loss / count.clamp(min=1)).masked_fill(count == 0, torch.nan)


def lora_linear_log_probs(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    labels: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    outputs: Collection[str] = ("entropy", "is_top1"),
    ignore_index: int = -100,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> TokenLogProbs:
    """Return each label's log-probability, and statistics that trainers log, without the logits:

        p = softmax(cap(logit_scale · lora_linear(x)) / temperature)

    The backward computes the logits again, a chunk of rows at a time.

    Args:
        temperature: positive; the capped logits are divided by it.
        outputs: some of "entropy", "mean_logits", "log_sum_sq_probs" and "is_top1", which are
            computed beside the log-probabilities.
        Others: as in `lora_linear_cross_entropy`.

    Returns:
        `TokenLogProbs`, whose tensors have labels' shape, in float32 (float64 for float64), and are
        zero where the label is ignored. log_probs and entropy are differentiable once in x, weight,
        lora_A, lora_B and bias.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names the argument.
        RuntimeError: a forced backend cannot run here.

    >>> import torch, lora_kernels
    >>> x, W = torch.zeros(2, 3), torch.eye(4, 3)
    >>> result = lora_kernels.lora_linear_log_probs(x, W, None, None, torch.tensor([0, 1]))
    >>> result.log_probs.exp(), result.is_top1
    (tensor([0.2500, 0.2500]), tensor([ True, False]))
    """
    temperature = check_number("temperature", temperature)
    if not temperature > 0.0:
        raise ValueError(f"temperature: got {temperature}, want a positive number")
    for name in outputs:
        if name not in HeadOutputs._fields:
            want = ", ".join(HeadOutputs._fields)
            raise ValueError(f"outputs: got {name!r}, want some of {want}")
    inputs = _Inputs(x, weight, lora_A, lora_B, labels, bias, rng, dropout_mask)
    operands, spec = _prepare(inputs, scaling, dropout_p, compute_dtype)
    spec = _check_logits(spec, ignore_index, logit_softcap, logit_scale, chunk_rows)
    options, tensors = _flatten(operands, spec._replace(inverse_temperature=1.0 / temperature))
    requested = HeadOutputs(*(name in outputs for name in HeadOutputs._fields))
    results = _LogProbsFunction.apply(options, requested, *tensors)
    is_given = True, *requested
    rows: Any = (
        t.view(labels.shape) if g else None for t, g in zip(results, is_given, strict=True)
    )
    return TokenLogProbs(*rows)


def _trainable(operands: HeadOperands) -> tuple[Tensor | None, ...]:
    """Return the tensors in the order of `HeadNeeds`; None for a 4-bit weight."""
    x, weight, lora_A, lora_B, _, bias, *_ = operands
    return x, weight if isinstance(weight, Tensor) else None, lora_A, lora_B, bias


def _flatten(operands: HeadOperands, spec: HeadSpec) -> tuple[Options, list[Any]]:
    """Return the arguments of the Functions: the tensors in order, but the weight's last."""
    x, weight, *others = list(operands)
    # As a list: Dynamo of torch 2.8 cannot slice a NamedTuple.
    base = list(weight) if isinstance(weight, Codes) else [weight]
    options = Options(spec, tuple(base[CODES_TENSORS:]))
    return options, [x, *others, *base[:CODES_TENSORS]]


def _prepare(
    inputs: _Inputs, scaling: float, dropout_p: float, compute_dtype: torch.dtype | None
) -> tuple[HeadOperands, HeadSpec]:
    """Check the linear layer's arguments; return the operands, with x as rows, and the spec."""
    x, weight, lora_A, lora_B, labels, bias, rng, mask = inputs
    context.refuse_context()
    if context.is_intercepted() and not torch.compiler.is_compiling():
        flops.register_if_counted()
    check_x_and_weight(x, weight)
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise ValueError(f"weight: got shape {list(weight.shape)}, want [V, K], each at least 1")
    V, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        want = f"[..., {K}] for weight {list(weight.shape)}"
        raise ValueError(f"x: got shape {list(x.shape)}, want {want}")
    check_both_or_none(lora_A, lora_B)
    if lora_A is None or lora_B is None:
        # One rank of zeros, so that every backend takes the call.
        lora_A, lora_B = x.new_zeros(1, K), x.new_zeros(V, 1)
    R, inner = matrix_shape("lora_A", lora_A, "[R, K]")
    if inner != K:
        raise ValueError(f"lora_A: got shape {list(lora_A.shape)}, want [R, {K}]")
    check_tensor("lora_B", lora_B)
    if lora_B.shape != (V, R):
        raise ValueError(f"lora_B: got shape {list(lora_B.shape)}, want [{V}, {R}]")
    check_dtypes("x", x.dtype, lora_A=lora_A.dtype, lora_B=lora_B.dtype)
    check_devices("x", x, lora_A=lora_A, lora_B=lora_B)
    _check_labels(labels, x)
    device_type, _ = context.device_of(x)
    cast_dtype = context.autocast_dtype(device_type, x.dtype)
    y_dtype = cast_dtype or x.dtype
    frozen = weight.detach() if isinstance(weight, Tensor) else weight  # it may train here
    _, codes, dtype = check_weight(x, frozen, (V, K), compute_dtype, cast_dtype)
    if bias is not None:
        check_vector("bias", bias, V, x)
    base = weight if isinstance(weight, Tensor) else Codes(*codes)
    dropout_p, rng, mask = check_dropout(x, dropout_p, rng, mask)
    if dropout_p and rng is None and mask is None:  # PyTorch's kernel's, for the backward too
        mask = torch.native_dropout(x.detach(), dropout_p, True)[1]
    mask = mask_rows(mask, x)
    if cast_dtype and is_on_gpu_path(device_type):  # a CPU's kernels keep the adapter's bits
        x, lora_A, lora_B = (t.to(y_dtype) for t in (x, lora_A, lora_B))
        base = base.to(y_dtype) if isinstance(base, Tensor) else base
    rows, flat = x.reshape(-1, K), labels.reshape(-1).to(torch.int64)
    spec = HeadSpec(check_number("scaling", scaling), dropout_p, dtype, y_dtype)
    return HeadOperands(rows, base, lora_A, lora_B, flat, bias, rng, mask), spec


def _check_logits(
    spec: HeadSpec,
    ignore_index: int,
    logit_softcap: float | None,
    logit_scale: float,
    chunk_rows: int | None,
) -> HeadSpec:
    """Return the spec with the checked arguments of the logits."""
    scale, cap = check_number("logit_scale", logit_scale), 0.0
    if logit_softcap is not None:
        cap = check_number("logit_softcap", logit_softcap)
        if not cap > 0.0:
            raise ValueError(f"logit_softcap: got {logit_softcap}, want a positive number, or None")
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"chunk_rows: got {chunk_rows!r}, want an integer, at least 1, or None")
    return spec._replace(
        logit_scale=scale, softcap=cap, ignore_index=ignore_index, chunk_rows=chunk_rows or 0
    )


def _check_labels(labels: Tensor, x: Tensor) -> None:
    check_integers("labels", labels)
    if labels.shape != x.shape[:-1]:
        raise ValueError(f"labels: got shape {list(labels.shape)}, want x's {list(x.shape[:-1])}")
    check_devices("x", x, labels=labels)


def _cast(grad: Tensor | None, like: torch.dtype) -> Tensor | None:
    return None if grad is None else grad.to(like)


class _CrossEntropyFunction(torch.autograd.Function):
    """The op `lora_cross_entropy`, whose forward computes the gradients that are needed.

    The backward multiplies them by the gradient of the loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        needs: HeadNeeds,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        rng: Tensor | None,
        mask: Tensor | None,
        *weight: Tensor,
    ) -> Tensor:
        spec, blocksizes = options
        base = join_weight(weight, blocksizes)
        operands = HeadOperands(x, base, lora_A, lora_B, labels, bias, rng, mask)
        loss: Tensor
        loss, *grads = call_op(_CROSS_ENTROPY, (), operands, *spec, *needs)
        ctx.save_for_backward(*grads)
        ctx.needs, ctx.weights = needs, len(weight)
        tensors = x, weight[0], lora_A, lora_B, bias
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dA, dB, dbias = (
            (grad * dloss).to(dtype) if need else None
            for grad, need, dtype in zip(saved, ctx.needs, ctx.dtypes, strict=True)
        )
        nones = [None] * (ctx.weights - 1)
        return None, None, dx, dA, dB, None, dbias, None, None, dweight, *nones


class _LogProbsFunction(torch.autograd.Function):
    """The op `lora_log_probs` with `lora_log_probs_backward`.

    Returns log_probs and the fields of `HeadOutputs`, empty if not requested. The backward needs
    the operands, the largest logit and Σ exp [M], and entropy [M] if it was requested.
    """

    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        outputs: HeadOutputs,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        rng: Tensor | None,
        mask: Tensor | None,
        *weight: Tensor,
    ) -> tuple[Tensor, ...]:
        spec, blocksizes = options
        base = join_weight(weight, blocksizes)
        operands = HeadOperands(x, base, lora_A, lora_B, labels, bias, rng, mask)
        *results, largest_logit, sum_exp = call_op(_LOG_PROBS, (), operands, *spec, *outputs)
        entropy = results[1] if outputs.entropy else None
        ctx.save_for_backward(
            x, lora_A, lora_B, labels, bias, rng, mask, largest_logit, sum_exp, entropy, *weight
        )
        ctx.options = options
        ctx.choice = selection.format_request()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[2:])
        if not outputs.entropy:
            ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any,
        saved: tuple[Any, ...],
        dlog_probs: Tensor | None,
        dentropy: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, labels, bias, rng, mask, largest_logit, sum_exp, entropy, *weight = saved
        spec, blocksizes = ctx.options
        _, _, need_x, need_A, need_B, _, need_bias, _, _, need_weight, *_ = ctx.needs_input_grad
        needs = HeadNeeds(need_x, need_weight and not blocksizes, need_A, need_B, need_bias)
        if dlog_probs is None:
            dlog_probs = torch.zeros_like(largest_logit)
        if entropy is None or dentropy is None:
            entropy = dentropy = None
        rows = dlog_probs, dentropy, largest_logit, sum_exp, entropy
        base = join_weight(weight, blocksizes)
        operands = HeadOperands(x, base, lora_A, lora_B, labels, bias, rng, mask)
        results = call_op(_LOG_PROBS_BACKWARD, rows, operands, *spec, *needs, choice=ctx.choice)
        grads = HeadGrads(*needed(results, needs))
        dA, dB = _cast(grads.lora_A, lora_A.dtype), _cast(grads.lora_B, lora_B.dtype)
        dbias = None if bias is None else _cast(grads.bias, bias.dtype)
        dweight = _cast(grads.weight, weight[0].dtype)
        nones = [None] * (len(weight) - 1)
        dx = _cast(grads.x, x.dtype)
        return None, None, dx, dA, dB, None, dbias, None, None, dweight, *nones


# The registered ops ----------------------------------------------------------------------------

# They take x as M rows. The logits of a chunk are computed by the backend that `linear.choose`
# chooses for that many rows; with dropout, by the eager backend, which takes a mask's rows. The ops
# draw no random numbers, and are deterministic.


def _decode_once(
    operands: HeadOperands, spec: HeadSpec, requested: Forced | None = None
) -> HeadOperands:
    """Return the operands with a dense weight if the eager backend would decode each chunk's."""
    x, weight, lora_A, lora_B = operands[:4]
    if not isinstance(weight, Codes):
        return operands
    of_linear = Operands(x, weight, lora_A, lora_B, rng=operands.rng, mask=operands.mask)
    if not spec.dropout_p and not linear.choose(of_linear, Spec(*spec[:4]), requested).is_eager:
        return operands
    shape = lora_B.shape[0], x.shape[1]
    return operands._replace(weight=decoder.dense(weight, shape, spec.dtype))


def _cross_entropy(*args: Any) -> tuple[Tensor, ...]:
    operands, spec, needs = split(args, HeadOperands, HeadSpec, HeadNeeds)
    with context.no_autocast(operands.x):
        loss, grads = eager_head.cross_entropy(
            _decode_once(operands, spec),
            spec,
            needs,
            linear.lora_linear_undispatched,
            linear.lora_linear_backward_undispatched,
        )
    return loss, *_fill(grads, operands, spec)


def _fill(grads: HeadGrads, operands: HeadOperands, spec: HeadSpec) -> tuple[Tensor, ...]:
    """Return the gradients as the op does, those that are not needed as empty tensors."""
    x, stat = operands.x, stat_dtype(operands.x.dtype)
    return or_empty(grads.x, eager_head.dx_dtype(x.dtype, spec), x), *(
        or_empty(t, stat, x) for t in grads[1:]
    )


def _grads_fake(operands: HeadOperands, spec: HeadSpec, needs: HeadNeeds) -> tuple[Tensor, ...]:
    x, stat = operands.x, stat_dtype(operands.x.dtype)
    (V, R), K = operands.lora_B.shape, x.shape[1]
    return (
        new_grad(needs.x, x.shape, eager_head.dx_dtype(x.dtype, spec), x),
        new_grad(needs.weight, (V, K), stat, x),
        new_grad(needs.lora_A, (R, K), stat, x),
        new_grad(needs.lora_B, (V, R), stat, x),
        new_grad(needs.bias, (V,), stat, x),
    )


def _cross_entropy_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, spec, needs = split(args, HeadOperands, HeadSpec, HeadNeeds)
    loss = operands.x.new_empty((), dtype=stat_dtype(operands.x.dtype))
    return loss, *_grads_fake(operands, spec, needs)


_CROSS_ENTROPY = define(
    "lora_cross_entropy",
    "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor labels, Tensor? bias, "
    "Tensor? rng, Tensor? mask, float scaling, float dropout_p, ScalarType dtype, "
    "ScalarType y_dtype, float logit_scale, float softcap, float inverse_temperature, "
    "float label_smoothing, int ignore_index, int chunk_rows, bool need_x, bool need_weight, "
    "bool need_lora_A, bool need_lora_B, bool need_bias) -> "
    "(Tensor loss, Tensor grad_x, Tensor grad_weight, Tensor grad_lora_A, Tensor grad_lora_B, "
    "Tensor grad_bias)",
    _cross_entropy,
    _cross_entropy_fake,
)


def _log_probs(*args: Any) -> tuple[Tensor, ...]:
    operands, spec, outputs = split(args, HeadOperands, HeadSpec, HeadOutputs)
    with context.no_autocast(operands.x):
        rows = eager_head.log_probs(
            _decode_once(operands, spec), spec, outputs, linear.lora_linear_undispatched
        )
    fakes = _rows_fake(operands.x, outputs)
    return tuple(fake if t is None else t for t, fake in zip(rows, fakes, strict=True))


def _rows_fake(x: Tensor, outputs: HeadOutputs) -> tuple[Tensor, ...]:
    M, stat = x.shape[0], stat_dtype(x.dtype)
    return (
        x.new_empty(M, dtype=stat),
        x.new_empty(M if outputs.entropy else 0, dtype=stat),
        x.new_empty(M if outputs.mean_logits else 0, dtype=stat),
        x.new_empty(M if outputs.log_sum_sq_probs else 0, dtype=stat),
        x.new_empty(M if outputs.is_top1 else 0, dtype=torch.bool),
        x.new_empty(M, dtype=stat),
        x.new_empty(M, dtype=stat),
    )


def _log_probs_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, _, outputs = split(args, HeadOperands, HeadSpec, HeadOutputs)
    return _rows_fake(operands.x, outputs)


_LOG_PROBS = define(
    "lora_log_probs",
    "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor labels, Tensor? bias, "
    "Tensor? rng, Tensor? mask, float scaling, float dropout_p, ScalarType dtype, "
    "ScalarType y_dtype, float logit_scale, float softcap, float inverse_temperature, "
    "float label_smoothing, int ignore_index, int chunk_rows, bool entropy, bool mean_logits, "
    "bool log_sum_sq_probs, bool is_top1) -> "
    "(Tensor log_probs, Tensor entropy, Tensor mean_logits, Tensor log_sum_sq_probs, "
    "Tensor is_top1, Tensor largest_logit, Tensor sum_exp)",
    _log_probs,
    _log_probs_fake,
)


def _log_probs_backward(
    dlog_probs: Tensor,
    dentropy: Tensor | None,
    largest_logit: Tensor,
    sum_exp: Tensor,
    entropy: Tensor | None,
    *args: Any,
    choice: str = "",
) -> tuple[Tensor, ...]:
    operands, spec, needs = split(args, HeadOperands, HeadSpec, HeadNeeds)
    requested = selection.parse_request(choice)

    def forward(operands: Operands, spec: Spec) -> tuple[Tensor, Saved]:
        chosen = linear.choose(operands, spec, requested)
        return linear.lora_linear_undispatched(operands, spec, chosen)

    def backward(dy: Tensor, operands: Operands, saved: Saved, spec: Spec, needs: Needs) -> Grads:
        chosen = linear.choose(operands, spec, requested)
        return linear.lora_linear_backward_undispatched(dy, operands, saved, spec, needs, chosen)

    with context.no_autocast(operands.x):
        grads = eager_head.log_probs_backward(
            dlog_probs,
            dentropy,
            (largest_logit, sum_exp, entropy),
            _decode_once(operands, spec, requested),
            spec,
            needs,
            forward,
            backward,
        )
    return _fill(grads, operands, spec)


def _log_probs_backward_fake(
    dlog_probs: Tensor,
    dentropy: Tensor | None,
    largest_logit: Tensor,
    sum_exp: Tensor,
    entropy: Tensor | None,
    *args: Any,
    choice: str = "",
) -> tuple[Tensor, ...]:
    operands, spec, needs = split(args, HeadOperands, HeadSpec, HeadNeeds)
    return _grads_fake(operands, spec, needs)


_LOG_PROBS_BACKWARD = define(
    "lora_log_probs_backward",
    "(Tensor dlog_probs, Tensor? dentropy, Tensor largest_logit, Tensor sum_exp, "
    "Tensor? entropy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor labels, "
    "Tensor? bias, Tensor? rng, Tensor? mask, float scaling, float dropout_p, ScalarType dtype, "
    "ScalarType y_dtype, float logit_scale, float softcap, float inverse_temperature, "
    "float label_smoothing, int ignore_index, int chunk_rows, bool need_x, bool need_weight, "
    'bool need_lora_A, bool need_lora_B, bool need_bias, *, str choice="") -> '
    "(Tensor grad_x, Tensor grad_weight, Tensor grad_lora_A, Tensor grad_lora_B, "
    "Tensor grad_bias)",
    _log_probs_backward,
    _log_probs_backward_fake,
)
