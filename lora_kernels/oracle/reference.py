"""The reference: the equation in PyTorch, in any dtype up to float64, for readability.

    z = x·W̃ᵀ + ((D(x)·Aᵀ) ⊙ g)·Bᵀ          y = c ⊙ z + bias

Tests compare all backends with these functions, and their gradients with those of
`torch.autograd`. The functions are not optimized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a·b, for unsigned 32-bit values in int64."""
    hi = (b * (a >> 16) + ((b * (a & 0xFFFF)) >> 16)) >> 16
    return hi & _MASK32, (a * b) & _MASK32  # a·b wraps modulo 2⁶⁴, which keeps its low 32 bits


def philox4x32(counter: list[Tensor], key: list[Tensor], rounds: int = 10) -> list[Tensor]:
    """Generate four 32-bit words per counter by Philox4x32 (Salmon et al., SC'11).

    Args:
        counter: four broadcastable int64 tensors of 32-bit values.
        key: two such tensors.
        rounds: the number of rounds.

    Returns four int64 tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(rounds):
        if i:
            k0, k1 = (k0 + _PHILOX_W[0]) & _MASK32, (k1 + _PHILOX_W[1]) & _MASK32
        hi0, lo0 = _mul_hi_lo(_PHILOX_M[0], c0)
        hi1, lo1 = _mul_hi_lo(_PHILOX_M[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
    return [c0, c1, c2, c3]


def dropout_threshold(p: float) -> int:
    """Return the smallest 32-bit word that keeps its element.

    For p = 1 one word in 2³² still keeps it, and `dropout_scale` is 0.
    """
    return min(round(p * 2**32), _MASK32)


def dropout_scale(p: float) -> float:
    """Return 1/(1−p), or 0 for p = 1, as in `torch.nn.Dropout`."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def dropout_mask(rng: Tensor, M: int, K: int, p: float, rows: Tensor | None = None) -> Tensor:
    """Return the dropout mask that every backend applies to x [M, K], True for kept elements.

    The words are those of Philox4x32-10 with key = seed and
    counter = (k >> 2, m, offset_lo, offset_hi). Element (m, k) has word k & 3, and is kept if
    word >= dropout_threshold(p). Returns bool[M, K] on rng's device.

    rng: int64[2], seed and offset.
    rows: int64[M], the mask's rows to return; None for rows 0 to M - 1.

    >>> mask = dropout_mask(torch.tensor([1, 2]), 64, 64, p=0.25)
    >>> mask.shape, 0.7 < mask.double().mean().item() < 0.8
    (torch.Size([64, 64]), True)
    """
    seed, offset = rng[0], rng[1]
    groups = torch.arange((K + 3) // 4, device=rng.device)[None, :]
    if rows is None:
        rows = torch.arange(M, device=rng.device)
    counter = [
        groups.expand(M, -1),
        rows[:, None].expand(-1, groups.shape[1]),
        (offset & _MASK32).expand(M, groups.shape[1]),
        ((offset >> 32) & _MASK32).expand(M, groups.shape[1]),
    ]
    words = torch.stack(philox4x32(counter, [seed & _MASK32, (seed >> 32) & _MASK32]), dim=-1)
    return words.flatten(1)[:, :K] >= dropout_threshold(p)


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
        is_own = ((rows >= start) & (rows < stop))[:, None]
        found = x @ weight[e].T + ((dropped @ lora_A[e].T) * scaling) @ lora_B[e].T
        y, start = torch.where(is_own, found if bias is None else found + bias[e], y), stop
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
    kept = labels.flatten() != ignore_index
    target = log_p.gather(1, labels.flatten().where(kept, 0)[:, None])[:, 0]
    smoothed = (1 - label_smoothing) * target + label_smoothing * log_p.mean(dim=1)
    losses = -smoothed.where(kept, 0.0)
    if reduction == "none":
        return losses.view(labels.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / kept.sum()


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
    log_p, kept = z.log_softmax(dim=1), labels.flatten() != ignore_index
    target = labels.flatten().where(kept, 0)
    found = (
        log_p.gather(1, target[:, None])[:, 0],
        -(log_p.exp() * log_p).sum(dim=1),
        z.mean(dim=1),
        (2 * log_p).logsumexp(dim=1),
        z.argmax(dim=1) == target,
    )
    log_prob, entropy, mean, sq, top1 = (t.where(kept, 0).view(labels.shape) for t in found)
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


SMALLEST_SCALE = 1e-38  # the smallest divisor of a block


def _scale_blocks(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return float32[n] divided by its block's absmax, in [-1, 1], and the absmax, float32[blocks].

    The results are bitwise equal to bitsandbytes' default backend, which treats a short last block
    differently. Full blocks are multiplied by the reciprocal, and absmax is 0 for zeros. A short
    block is divided, and its absmax is at least `SMALLEST_SCALE`.
    """
    count = values.numel() // blocksize
    full, tail = values[: count * blocksize].view(count, blocksize), values[count * blocksize :]
    absmax = full.abs().amax(dim=1)
    scaled = (full * (1.0 / absmax.clamp(min=SMALLEST_SCALE))[:, None]).flatten()
    if tail.numel():
        tail_absmax = tail.abs().amax().clamp(min=SMALLEST_SCALE)
        absmax = torch.cat([absmax, tail_absmax[None]])
        scaled = torch.cat([scaled, tail / tail_absmax])
    return scaled.clamp(-1, 1), absmax


def quantize_4bit(
    weight: Tensor, thresholds: Tensor, order: Tensor, blocksize: int
) -> tuple[Tensor, Tensor]:
    """Quantize a weight to 4-bit codes and one scale per block, as bitsandbytes does.

    Blocks divide the flattened weight, and the last block may be short.

    Args:
        weight: float32, bfloat16 or float16, finite, of any shape with n elements.
        thresholds, order: float32[15] and uint8[16] from `quantization.codebooks`.
        blocksize: the number of elements per block.

    Returns:
        packed uint8[⌈n/2⌉], with even elements in the high nibble, and absmax
        float32[⌈n/blocksize⌉]. If n is odd, the last low nibble is the code of 0.

    >>> packed, absmax = quantize_4bit(torch.tensor([[1.0, -2.0, 0.5]]),
    ...     torch.linspace(-0.9375, 0.9375, 15), torch.arange(16, dtype=torch.uint8), 32)
    >>> packed.tolist(), absmax.tolist()  # codes 11, 0, 9, and 7 for nothing
    ([176, 151], [2.0])
    """
    scaled, absmax = _scale_blocks(weight.flatten().float(), blocksize)
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    codes = order[torch.bucketize(scaled, thresholds)]
    return (codes[::2] << 4) | codes[1::2], absmax


def dequantize_4bit(
    packed: Tensor,
    scales: Tensor,
    code: Tensor,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Decode a weight: code × scale in float32, rounded once to `dtype`.

    packed uint8[⌈n/2⌉], scales float32[⌈n/blocksize⌉], code float32[16], for n elements in shape.

    >>> packed, scales = torch.tensor([0x21, 0x30], dtype=torch.uint8), torch.tensor([0.5])
    >>> dequantize_4bit(packed, scales, torch.arange(16.0), 32, (1, 3), torch.float32)
    tensor([[1.0000, 0.5000, 1.5000]])
    """
    n = math.prod(shape)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:n]
    return (code[codes.long()] * scales.repeat_interleave(blocksize)[:n]).view(shape).to(dtype)


def quantize_scales(
    absmax: Tensor, nested_code: Tensor, nested_blocksize: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize scales minus their mean to 8 bits, with nested scales (double quantization).

    absmax float32[blocks], nested_code float32[256] ascending. Returns codes uint8[blocks],
    nested_absmax float32[⌈blocks/nested_blocksize⌉] and the mean, float32[]. PyTorch computes the
    mean, in an order that depends on the thread count for very large weights.

    >>> codes, nested_absmax, offset = quantize_scales(
    ...     torch.tensor([1.0, 2.0, 3.0]), torch.linspace(-1, 1, 256), 256)
    >>> codes.tolist(), nested_absmax.tolist(), offset.item()
    ([0, 127, 255], [1.0], 2.0)
    """
    offset = absmax.mean()
    scaled, nested_absmax = _scale_blocks(absmax - offset, nested_blocksize)
    thresholds = (nested_code[:-1] + nested_code[1:]) / 2
    return torch.bucketize(scaled, thresholds).to(torch.uint8), nested_absmax, offset


def dequantize_scales(
    codes: Tensor,
    nested_absmax: Tensor,
    nested_code: Tensor,
    offset: Tensor,
    nested_blocksize: int,
) -> Tensor:
    """Decode nested scales, float32[blocks]: code × nested scale, rounded, + offset, rounded.

    >>> dequantize_scales(torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([4.0]),
    ...     torch.linspace(-1, 1, 256), torch.tensor(5.0), 256)
    tensor([1., 9.])
    """
    nested_scales = nested_absmax.repeat_interleave(nested_blocksize)[: codes.numel()]
    product = nested_code[codes.long()] * nested_scales
    return product + offset
