"""The registered ops of a language model's head; see `backends.head` for the equation.

They take x as M rows. The logits of a chunk are computed by the backend that `choice` chooses
for that many rows; with dropout, by the eager backend, which takes a mask's rows. The ops draw no
random numbers, and are deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import decode4bit
from ..backends.eager import head
from ..backends.eager.linear import stat_dtype
from ..core.call import (
    HeadGrads,
    HeadNeeds,
    HeadOperands,
    HeadOutputs,
    HeadRows,
    HeadSpec,
    Operands,
    Spec,
)
from ..core.packed4bit import Packed4bit
from . import registry as ops

_OPERANDS = (
    "Tensor x, {weight}, Tensor lora_A, Tensor lora_B, Tensor labels, Tensor? bias, Tensor? rng"
)
_SPEC = (
    "float scaling, float dropout_p, ScalarType dtype, ScalarType y_dtype, float logit_scale, "
    "float softcap, float inverse_temperature, float label_smoothing, int ignore_index, "
    "int chunk_rows"
)
_NEEDS = "bool need_x, bool need_weight, bool need_lora_A, bool need_lora_B, bool need_bias"
_OUTPUTS = "bool entropy, bool mean_logits, bool log_sum_sq_probs, bool is_top1"
_GRADS = "Tensor dx, Tensor dweight, Tensor dA, Tensor dB, Tensor dbias"
_CROSS_ENTROPY = f"({_OPERANDS}, {_SPEC}, {_NEEDS}) -> (Tensor loss, {_GRADS})"
_LOG_PROBS = (
    f"({_OPERANDS}, {_SPEC}, {_OUTPUTS}) -> (Tensor log_probs, Tensor entropy, Tensor mean_logits, "
    "Tensor log_sum_sq_probs, Tensor is_top1, Tensor largest_logit, Tensor sum_exp)"
)
_BACKWARD = (
    "(Tensor dlog_probs, Tensor? dentropy, Tensor largest_logit, Tensor sum_exp, Tensor? entropy, "
    f"{_OPERANDS}, {_SPEC}, {_NEEDS}) -> ({_GRADS})"
)


def _decode_once(operands: HeadOperands, spec: HeadSpec) -> HeadOperands:
    """Return the operands with a dense weight if the eager backend would decode each chunk's."""
    x, weight, lora_A, lora_B = operands[:4]
    if not isinstance(weight, Packed4bit):
        return operands
    own = Operands(x, weight, lora_A, lora_B, rng=operands.rng)
    has_mask = operands.rng is not None and spec.dropout_p > 0
    if not has_mask and ops.choose(own, Spec(*spec[:4])).backend != "eager":
        return operands
    shape = lora_B.shape[0], x.shape[1]
    return operands._replace(weight=decode4bit.dense(weight, shape, spec.dtype))


def _cross_entropy(operands: HeadOperands, spec: HeadSpec, needs: HeadNeeds) -> tuple[Tensor, ...]:
    with ops.no_autocast(operands.x):
        loss, grads = head.cross_entropy(
            _decode_once(operands, spec),
            spec,
            needs,
            ops.lora_linear_direct,
            ops.lora_linear_backward_direct,
        )
    return loss, *_fill(grads, operands)


def _fill(grads: HeadGrads, operands: HeadOperands) -> tuple[Tensor, ...]:
    """Return an empty tensor for None, because an op cannot return optional tensors."""
    x, stat = operands.x, stat_dtype(operands.x.dtype)
    dtypes = x.dtype, *[stat] * 4
    return tuple(
        x.new_empty(0, dtype=dtype) if t is None else t
        for t, dtype in zip(grads, dtypes, strict=True)
    )


def _grads_fake(operands: HeadOperands, needs: HeadNeeds) -> tuple[Tensor, ...]:
    x, lora_B = operands.x, operands.lora_B
    (V, R), K = lora_B.shape, x.shape[1]
    shapes, stat = ((V, K), (R, K), (V, R), (V,)), stat_dtype(x.dtype)
    dx = x.new_empty((x.shape[0], K) if needs.x else (0,))
    rest = (
        x.new_empty(shape if need else (0,), dtype=stat)
        for shape, need in zip(shapes, needs[1:], strict=True)
    )
    return dx, *rest


def _cross_entropy_fake(
    operands: HeadOperands, spec: HeadSpec, needs: HeadNeeds
) -> tuple[Tensor, ...]:
    x = operands.x
    return x.new_empty((), dtype=stat_dtype(x.dtype)), *_grads_fake(operands, needs)


def _log_probs(operands: HeadOperands, spec: HeadSpec, outputs: HeadOutputs) -> tuple[Tensor, ...]:
    with ops.no_autocast(operands.x):
        rows = head.log_probs(_decode_once(operands, spec), spec, outputs, ops.lora_linear_direct)
    fakes = _log_probs_fake(operands, spec, outputs)
    return tuple(fake if t is None else t for t, fake in zip(rows, fakes, strict=True))


def _log_probs_fake(
    operands: HeadOperands, spec: HeadSpec, outputs: HeadOutputs
) -> tuple[Tensor, ...]:
    x, wanted = operands.x, outputs._asdict()
    return tuple(
        x.new_empty(
            x.shape[:1] if wanted.get(name, True) else (0,),
            dtype=torch.bool if name == "is_top1" else stat_dtype(x.dtype),
        )
        for name in HeadRows._fields
    )


def _log_probs_backward(
    dlog_probs: Tensor,
    dentropy: Tensor | None,
    largest_logit: Tensor,
    sum_exp: Tensor,
    entropy: Tensor | None,
    operands: HeadOperands,
    spec: HeadSpec,
    needs: HeadNeeds,
) -> tuple[Tensor, ...]:
    with ops.no_autocast(operands.x):
        grads = head.log_probs_backward(
            dlog_probs,
            dentropy,
            (largest_logit, sum_exp, entropy),
            _decode_once(operands, spec),
            spec,
            needs,
            ops.lora_linear_direct,
            ops.lora_linear_backward_direct,
        )
    return _fill(grads, operands)


def _log_probs_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, _, needs = args[5:]
    return _grads_fake(operands, needs)


def _define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    types: tuple[Any, ...],
    before: int = 0,
) -> None:
    """Register the op for a dense weight, and `name` + "_4bit" for one packed in 4 bits.

    types: the call types of the arguments that follow the first `before`.
    """
    counts = [len(each._fields) for each in types]
    for suffix, weight in (("", "Tensor weight"), ("_4bit", ops.CODES)):
        layout = types, counts, before, bool(suffix)
        run, run_fake = (ops.pack_arguments(each, *layout) for each in (implementation, fake))
        ops.register(name + suffix, schema.format(weight=weight), run, run_fake)


CROSS_ENTROPY_TYPES = HeadOperands, HeadSpec, HeadNeeds
LOG_PROBS_TYPES = HeadOperands, HeadSpec, HeadOutputs
_define(
    "lora_cross_entropy", _CROSS_ENTROPY, _cross_entropy, _cross_entropy_fake, CROSS_ENTROPY_TYPES
)
_define("lora_log_probs", _LOG_PROBS, _log_probs, _log_probs_fake, LOG_PROBS_TYPES)
_define(
    "lora_log_probs_backward",
    _BACKWARD,
    _log_probs_backward,
    _log_probs_backward_fake,
    CROSS_ENTROPY_TYPES,
    before=5,
)

lora_cross_entropy = torch.ops.lora_kernels.lora_cross_entropy.default
lora_cross_entropy_4bit = torch.ops.lora_kernels.lora_cross_entropy_4bit.default
lora_log_probs = torch.ops.lora_kernels.lora_log_probs.default
lora_log_probs_4bit = torch.ops.lora_kernels.lora_log_probs_4bit.default
lora_log_probs_backward = torch.ops.lora_kernels.lora_log_probs_backward.default
lora_log_probs_backward_4bit = torch.ops.lora_kernels.lora_log_probs_backward_4bit.default
