"""The arguments and results of one call of the equation, in all backends.

    y = c ⊙ (x·Wᵀ + ((D(x)·Aᵀ) ⊙ g)·Bᵀ) + bias,    g = scaling · rank_gate

The schemas of the ops list these fields in the same order.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .codes import Codes


class Operands(NamedTuple):
    """The tensors of a call.

    Args:
        x: [M, K]; [..., K] above the backends and for the CPU backend.
        weight: W [N, K], dense or packed in 4 bits. None: no base GEMM.
        lora_A: [R, K].
        lora_B: [N, R].
        rank_gate: [R] or None.
        column_scale: c, [N] or None.
        bias: [N] or None. The backward gets None.
        rng: the dropout mask's state, int64 [2].
        mask: the dropout mask, bool of x's shape. If rng and mask are None and dropout_p > 0, the
            eager backend draws one.
    """

    x: Tensor
    weight: Tensor | Codes | None
    lora_A: Tensor
    lora_B: Tensor
    rank_gate: Tensor | None = None
    column_scale: Tensor | None = None
    bias: Tensor | None = None
    rng: Tensor | None = None
    mask: Tensor | None = None


class Spec(NamedTuple):
    """The other arguments of a call.

    Args:
        scaling: alpha / r.
        dropout_p: probability of zeroing an element of x.
        dtype: of the base GEMM.
        y_dtype: of y.
        save_z: whether the forward returns z, y before column scale and bias.
    """

    scaling: float
    dropout_p: float
    dtype: torch.dtype
    y_dtype: torch.dtype
    save_z: bool = False


class Saved(NamedTuple):
    """The tensors that the forward saves for the backward.

    Args:
        p: D(x)·Aᵀ [M, R] in float32 (float64 for float64).
        z: [M, N] in y's dtype if `Spec.save_z`, or None.
        mask: the dropout mask [M, K] if the forward drew one, or None. The backward gets it as
            `Operands.mask`.
    """

    p: Tensor
    z: Tensor | None = None
    mask: Tensor | None = None


class Needs(NamedTuple):
    """The gradients that the backward computes."""

    x: bool
    lora_A: bool
    lora_B: bool
    rank_gate: bool = False
    column_scale: bool = False
    bias: bool = False


class Grads(NamedTuple):
    """The gradients; None for a gradient that is not needed.

    x, lora_A and lora_B have the dtype of the tensor. The others have P's dtype, and the caller
    rounds them once.
    """

    x: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    rank_gate: Tensor | None = None
    column_scale: Tensor | None = None
    bias: Tensor | None = None


class Rows(NamedTuple):
    """An order of x's rows in which each adapter's rows are contiguous.

    Args:
        order: int64 [M] on x's device; None if the rows are contiguous already.
        runs: (adapter, its first row in that order, one past its last). Rows of no adapter are in
            no run.
    """

    order: Tensor | None
    runs: list[tuple[int, int, int]]

    def each(self) -> Iterator[tuple[int, slice | Tensor]]:
        """Yield each adapter that has rows, and an index of its rows."""
        for e, start, stop in self.runs:
            yield e, slice(start, stop) if self.order is None else self.order[start:stop]


class MultiOperands(NamedTuple):
    """The tensors of a call in which each row of x has one of E adapters, or none.

    Args:
        x, weight, bias, rng, mask: as in `Operands`.
        lora_A: E tensors [R_e, K].
        lora_B: E tensors [N, R_e].
        adapter_index: [I], the adapter of each M / I rows, -1 for none; or `Rows`.
    """

    x: Tensor
    weight: Tensor | Codes | None
    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    adapter_index: Tensor | Rows
    bias: Tensor | None = None
    rng: Tensor | None = None
    mask: Tensor | None = None


class MultiSpec(NamedTuple):
    """The other arguments, as in `Spec`; one scaling for each adapter."""

    scaling: Sequence[float]
    dropout_p: float
    dtype: torch.dtype
    y_dtype: torch.dtype


class MultiNeeds(NamedTuple):
    """The gradients that the backward computes, of lora_A and lora_B for each adapter."""

    x: bool
    lora_A: Sequence[bool]
    lora_B: Sequence[bool]
    bias: bool = False


class MultiGrads(NamedTuple):
    """The gradients, as in `Grads`; zeros for an adapter without rows."""

    x: Tensor | None
    lora_A: list[Tensor | None]
    lora_B: list[Tensor | None]
    bias: Tensor | None = None


class ExpertsOperands(NamedTuple):
    """The tensors of a call in which the rows of x are sorted by expert.

    Args:
        x: [M, K].
        weight: W [E, N, K], dense with any strides, or packed in 4 bits as one matrix of E·N rows
            (E·K if `ExpertsSpec.transposed`). None for the low-rank update alone.
        lora_A: of T tenants [E, R_t, K]; the rank may be 0.
        lora_B: of T tenants [E, N, R_t], any strides.
        offsets: [E·T], one past the last row of each pair of expert and tenant, an expert's next to
            each other. Later rows belong to no expert.
        bias: [E, N] or None. The backward gets None.
        rng, mask: as in `Operands`; the mask's rows are those of the sorted x.
    """

    x: Tensor
    weight: Tensor | Codes | None
    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    offsets: Tensor
    bias: Tensor | None = None
    rng: Tensor | None = None
    mask: Tensor | None = None


class ExpertsSpec(NamedTuple):
    """The other arguments, as in `Spec`.

    Args:
        scaling: of each tenant.
        transposed: whether a 4-bit weight is packed as [E, K, N].
        has_tail: whether rows of no expert may follow the last expert's.
    """

    scaling: Sequence[float]
    dropout_p: float
    dtype: torch.dtype
    y_dtype: torch.dtype
    transposed: bool = False
    has_tail: bool = True


class ExpertsNeeds(NamedTuple):
    """The gradients that the backward computes, of lora_A and lora_B for each tenant."""

    x: bool
    lora_A: Sequence[bool]
    lora_B: Sequence[bool]
    bias: bool = False


class ExpertsGrads(NamedTuple):
    """The gradients, as in `Grads`; zeros for a pair without rows, and for rows of no expert."""

    x: Tensor | None
    lora_A: Sequence[Tensor | None]
    lora_B: Sequence[Tensor | None]
    bias: Tensor | None = None


class HeadOperands(NamedTuple):
    """The tensors of a language model's head: a linear layer whose logits are compared with labels.

    Args:
        x: [M, K].
        weight: W [V, K], dense or packed in 4 bits; V is the vocabulary's size.
        lora_A: [R, K].
        lora_B: [V, R].
        labels: int64 [M], 0 to V - 1, or `HeadSpec.ignore_index`.
        bias: [V] or None.
        rng: the dropout mask's state, int64 [2].
        mask: the dropout mask, bool [M, K].
    """

    x: Tensor
    weight: Tensor | Codes
    lora_A: Tensor
    lora_B: Tensor
    labels: Tensor
    bias: Tensor | None = None
    rng: Tensor | None = None
    mask: Tensor | None = None


class HeadSpec(NamedTuple):
    """The other arguments. Logits are z = cap(logit_scale · y) · inverse_temperature.

    Args:
        scaling, dropout_p, dtype, y_dtype: as in `Spec`, of the linear layer's y.
        logit_scale: factor of y.
        softcap: c in cap(y) = c · tanh(y / c); 0 for no cap.
        inverse_temperature: factor of the capped logits.
        label_smoothing: weight of the mean over the vocabulary beside the label, in [0, 1].
        ignore_index: the label of rows that count for nothing.
        chunk_rows: rows of x whose logits exist at a time; 0 for a number that the backend
            derives.
    """

    scaling: float
    dropout_p: float
    dtype: torch.dtype
    y_dtype: torch.dtype
    logit_scale: float = 1.0
    softcap: float = 0.0
    inverse_temperature: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    chunk_rows: int = 0


class HeadNeeds(NamedTuple):
    """The gradients that are computed."""

    x: bool
    weight: bool
    lora_A: bool
    lora_B: bool
    bias: bool


class HeadGrads(NamedTuple):
    """The gradients; None for a gradient that is not needed.

    x has its own dtype. The others have the dtype of P, and the caller rounds them once.
    """

    x: Tensor | None = None
    weight: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    bias: Tensor | None = None


class HeadOutputs(NamedTuple):
    """The statistics that are computed for each row beside the label's log-probability."""

    entropy: bool = False
    mean_logits: bool = False
    log_sum_sq_probs: bool = False
    is_top1: bool = False


class HeadRows(NamedTuple):
    """The statistics of each row, [M]; zeros in rows whose label is ignored.

    Float32 (float64 for float64), and bool for is_top1. None for one that is not requested.

    Args:
        log_probs: (1 - ε)·log p_label + ε·mean(log p), with ε = `HeadSpec.label_smoothing`.
        entropy: -Σ p·log p.
        mean_logits: the mean of z over the vocabulary.
        log_sum_sq_probs: log Σ p².
        is_top1: whether the label has the largest logit, and is the first that has it.
        largest_logit: max z, for the backward.
        sum_exp: Σ exp(z − max z), for the backward.
    """

    log_probs: Tensor
    entropy: Tensor | None
    mean_logits: Tensor | None
    log_sum_sq_probs: Tensor | None
    is_top1: Tensor | None
    largest_logit: Tensor
    sum_exp: Tensor
