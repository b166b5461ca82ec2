"""The reference: the equation in PyTorch, in any dtype up to float64, for readability.

    z = x·W̃ᵀ + ((D(x)·Aᵀ) ⊙ g)·Bᵀ          y = c ⊙ z + bias

Tests compare all backends with these functions, and their gradients with those of
`torch.autograd`. The functions are not optimized.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.dropout import dropout_mask, dropout_scale


def _drop(x: Tensor, dropout_p: float, rng: Tensor | None) -> Tensor:
    """Return D(x) = mask ⊙ x / (1 − p)."""
    if dropout_p == 0:
        return x
    assert rng is not None
    K = x.shape[-1]
    mask = dropout_mask(rng, x.numel() // K, K, dropout_p).view(x.shape)
    return x * mask.to(x.dtype) * dropout_scale(dropout_p)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    rank_gate: Tensor | None = None,
    column_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """Compute y = c ⊙ (x·W̃ᵀ + ((D(x)·Aᵀ) ⊙ g)·Bᵀ) + bias, g = scaling · rank_gate.

    x [..., K], weight [N, K], lora_A [R, K], lora_B [N, R], bias [N], rank_gate [R],
    column_scale [N]; all of one dtype. Differentiable in every argument by autograd.

    >>> x, W, A, B = torch.ones(2, 3), torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)
    >>> lora_linear(x, W, A, B, scaling=0.5)
    tensor([[2.5000, 2.5000, 2.5000],
            [2.5000, 2.5000, 2.5000]])
    """
    dropped = _drop(x, dropout_p, rng)
    gate = scaling if rank_gate is None else scaling * rank_gate
    z = x @ weight.T + ((dropped @ lora_A.T) * gate) @ lora_B.T
    y = z if column_scale is None else z * column_scale
    return y if bias is None else y + bias


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    index: Tensor,
    scaling: Sequence[float],
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """Compute `lora_linear` with one adapter for each row of x, or none (-1):

        y_m = W̃·x_m + s_e·B_e·(A_e·D(x)_m) + bias,    e = index_m

    x [..., K], index integers [...], lora_A[e] [R_e, K], lora_B[e] [N, R_e], one scaling each.

    >>> x, W, A, B = torch.ones(2, 3), torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)
    >>> multi_lora_linear(x, W, [A], [B], torch.tensor([0, -1]), [0.5])
    tensor([[2.5000, 2.5000, 2.5000],
            [1.0000, 1.0000, 1.0000]])
    """
    dropped = _drop(x, dropout_p, rng)
    y = x @ weight.T
    for e, (A, B, s) in enumerate(zip(lora_A, lora_B, scaling, strict=True)):
        update = ((dropped @ A.T) * s) @ B.T
        y = y + torch.where((index == e)[..., None], update, 0.0)
    return y if bias is None else y + bias


def lora_experts_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    offsets: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """Compute `lora_linear` with the weight and adapter of each row's expert:

        y_m = W̃_e·x_m + s·B_e·(A_e·D(x)_m) + bias_e,    offsets[e-1] <= m < offsets[e]

    x [M, K], weight [E, N, K], lora_A [E, R, K], lora_B [E, N, R], offsets [E], bias [E, N]. Rows
    from offsets[E-1] on have no expert, and y is 0.

    >>> x, W, A, B = torch.ones(3, 2), torch.ones(2, 1, 2), torch.ones(2, 1, 2), torch.ones(2, 1, 1)
    >>> lora_experts_linear(x, W, A, B, torch.tensor([0, 2]), scaling=0.5).tolist()
    [[3.0], [3.0], [0.0]]
    """
    dropped = _drop(x, dropout_p, rng)
    rows = torch.arange(x.shape[0], device=x.device)
    y, start = x.new_zeros(x.shape[0], weight.shape[1]), 0
    for e, stop in enumerate(offsets.tolist()):
        is_of_expert = ((rows >= start) & (rows < stop))[:, None]
        expert_y = x @ weight[e].T + ((dropped @ lora_A[e].T) * scaling) @ lora_B[e].T
        y, start = (
            torch.where(is_of_expert, expert_y if bias is None else expert_y + bias[e], y),
            stop,
        )
    return y


def _head_logits(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    dropout: dict[str, Any],
) -> Tensor:
    """Compute cap(logit_scale · lora_linear(x)) [M, V], cap(y) = t·tanh(y/t), t = logit_softcap."""
    if lora_A is None or lora_B is None:
        y = x @ weight.T if bias is None else x @ weight.T + bias
    else:
        y = lora_linear(x, weight, lora_A, lora_B, scaling, bias, **dropout)
    y = y.flatten(0, -2) * logit_scale
    return y if logit_softcap is None else logit_softcap * torch.tanh(y / logit_softcap)


def lora_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
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
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """Compute the cross-entropy of softmax(cap(logit_scale · lora_linear(x))) with the labels.

    x [..., K], weight [V, K], lora_A [R, K], lora_B [V, R] or None for both, labels [...]. Label
    smoothing ε takes (1 − ε)·log p + ε·mean_v log p_v. Returns a scalar, or labels' shape for
    reduction "none".

    >>> x, W = torch.zeros(2, 3), torch.ones(4, 3)
    >>> lora_linear_cross_entropy(x, W, None, None, torch.tensor([0, 1])).exp()
    tensor(4.)
    """
    assert reduction in ("none", "sum", "mean")
    dropout = {"dropout_p": dropout_p, "rng": rng}
    z = _head_logits(x, weight, lora_A, lora_B, scaling, bias, logit_scale, logit_softcap, dropout)
    log_p = z.log_softmax(dim=1)
    is_counted = labels.flatten() != ignore_index
    target = log_p.gather(1, labels.flatten().where(is_counted, 0)[:, None])[:, 0]
    smoothed = (1 - label_smoothing) * target + label_smoothing * log_p.mean(dim=1)
    losses = -smoothed.where(is_counted, 0.0)
    if reduction == "none":
        return losses.view(labels.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / is_counted.sum()


def lora_linear_log_probs(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    labels: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute statistics of p = softmax(cap(logit_scale · lora_linear(x)) / temperature).

    Returns log p of the label, the entropy, the mean of the logits after the temperature, log Σ p²,
    and whether the label has the largest logit, each of labels' shape, and zero where the label is
    ignored.

    >>> x, W = torch.zeros(2, 3), torch.ones(4, 3)
    >>> lora_linear_log_probs(x, W, None, None, torch.tensor([0, 1]))[0].exp()
    tensor([0.2500, 0.2500])
    """
    dropout = {"dropout_p": dropout_p, "rng": rng}
    z = _head_logits(x, weight, lora_A, lora_B, scaling, bias, logit_scale, logit_softcap, dropout)
    z = z / temperature
    log_p, is_counted = z.log_softmax(dim=1), labels.flatten() != ignore_index
    target = labels.flatten().where(is_counted, 0)
    statistics = (
        log_p.gather(1, target[:, None])[:, 0],
        -(log_p.exp() * log_p.clamp(torch.finfo(log_p.dtype).min)).sum(dim=1),
        z.mean(dim=1),
        (2 * log_p).logsumexp(dim=1),
        z.argmax(dim=1) == target,
    )
    log_prob, entropy, mean, sq, top1 = (
        t.where(is_counted, 0).view(labels.shape) for t in statistics
    )
    return log_prob, entropy, mean, sq, top1.bool()


def dora_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    rank_gate: Tensor | None = None,
) -> Tensor:
    """Return the norm [N] of each row of W + (B ⊙ g)·A, g = scaling · rank_gate.

    weight [N, K], lora_A [R, K], lora_B [N, R], rank_gate [R]; all of one dtype.

    >>> dora_norm(torch.eye(2), torch.ones(1, 2), torch.tensor([[1.0], [0.0]]), scaling=2.0)
    tensor([3.6056, 1.0000])
    """
    gate = scaling if rank_gate is None else scaling * rank_gate
    return (weight + (lora_B * gate) @ lora_A).square().sum(dim=1).sqrt()
