"""The arguments and results of one call of the equation, in all backends.

    y = c ⊙ (x·Wᵀ + ((D(x)·Aᵀ) ⊙ g)·Bᵀ) + bias,    g = scaling · rank_gate

The schemas of the ops list these fields in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..core.packed4bit import Packed4bit


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
        rng: the dropout mask's state, int64 [2], or the mask, bool of x's shape. If it is None and
            dropout_p > 0, the eager backend draws the mask.
    """

    x: Tensor
    weight: Tensor | Packed4bit | None
    lora_A: Tensor
    lora_B: Tensor
    rank_gate: Tensor | None = None
    column_scale: Tensor | None = None
    bias: Tensor | None = None
    rng: Tensor | None = None


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
            `Operands.rng`.
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


class MultiOperands(NamedTuple):
    """The tensors of a call in which each row of x has one of E adapters, or none.

    Args:
        x, weight, bias, rng: as in `Operands`.
        lora_A: E tensors [R_e, K].
        lora_B: E tensors [N, R_e].
        adapter_index: [M], the adapter of each row, -1 for none.
    """

    x: Tensor
    weight: Tensor | Packed4bit | None
    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    adapter_index: Tensor
    bias: Tensor | None = None
    rng: Tensor | None = None


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
            (E·K if `ExpertsSpec.transposed`).
        lora_A: [E, R, K]; R is 0 for experts without adapters.
        lora_B: [E, N, R], any strides.
        offsets: [E], one past each expert's last row. Later rows belong to no expert.
        bias: [E, N] or None. The backward gets None.
        rng: as in `Operands`; the mask's rows are those of the sorted x.
    """

    x: Tensor
    weight: Tensor | Packed4bit | None
    lora_A: Tensor
    lora_B: Tensor
    offsets: Tensor
    bias: Tensor | None = None
    rng: Tensor | None = None


class ExpertsSpec(NamedTuple):
    """The other arguments, as in `Spec`.

    transposed: whether a 4-bit weight is packed as [E, K, N].
    """

    scaling: float
    dropout_p: float
    dtype: torch.dtype
    y_dtype: torch.dtype
    transposed: bool = False


class ExpertsNeeds(NamedTuple):
    """The gradients that the backward computes."""

    x: bool
    lora_A: bool
    lora_B: bool
    bias: bool = False


class ExpertsGrads(NamedTuple):
    """The gradients, as in `Grads`; zeros for an expert without rows, and for rows of no expert."""

    x: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    bias: Tensor | None = None


class Guard(NamedTuple):
    """A condition under which a prepared call is valid.

    `key` is the name of an attribute of `target`, or a function of it. If `target` is a dictionary,
    `key` is a key. If `target` is None, `key` is a function without arguments. The guard holds if
    the value equals `expected`, or for a dictionary if it is the same object.
    """

    target: object
    key: object
    expected: object
