"""A language model's head: losses and log-probabilities without logits [M, V] in memory.

    y = x·W̃ᵀ + s·(D(x)·Aᵀ)·Bᵀ + bias        z = cap(logit_scale · y) / temperature
    loss_m = log Σ_v exp(z_mv) − (1 − ε)·z_m,label − ε·mean_v z_mv

The rows of x are taken in chunks. `linear`, the forward of the chosen backend, computes the
logits of a chunk. They become the gradient of the logits in place, and `linear_backward` turns that
into dx of these rows and a part of dA, dB and dbias. The parts are added in float32.

    dz = w·(p − (1 − ε)·onehot(label) − ε/V)        p = softmax(z)

A chunk costs two GEMMs of 2·rows·V·K FLOPs, and a third for the gradient of the weight. Between
them a Triton kernel reads the logits twice and writes dz once. Each device compares it with
PyTorch's ops before its first use. Where it is not used, these take more passes, over a float32
copy. Rows whose label is ignored are left out before the GEMMs. On a GPU, the host waits for their
number.

Rounding points: those of the backend's `lora_linear` and `lora_linear_backward`; the logits to
`y_dtype`; dz to it; dx to x's dtype. Everything between the logits and dz is float32 (float64 for
float64). In float16, dz is multiplied by a factor, as `GradScaler` does for a whole model, because
probabilities below 6e-8 would vanish. Large weights make it smaller, so that dx does not overflow,
and dx is float32 without it: after the mean over rows it may be a float16 number again.

Deterministic: chunks are added in order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...core.call import (
    Grads,
    HeadGrads,
    HeadNeeds,
    HeadOperands,
    HeadOutputs,
    HeadRows,
    HeadSpec,
    Needs,
    Operands,
    Saved,
    Spec,
)
from ...core.codes import Codes
from ...core.dropout import dropout_mask, dropout_scale
from ...core.dtypes import stat_dtype
from ...core.problem import KERNEL_DTYPES
from .. import checked, triton
from ..library import is_on_gpu_path, mm_fp32

Linear = Callable[[Operands, Spec], tuple[Tensor, Saved]]
LinearBackward = Callable[[Tensor, Operands, Saved, Spec, Needs], Grads]

# Bytes of a chunk's logits, and the fewest rows of a chunk. PyTorch's ops compute the loss in
# float32, with up to three such tensors at a time; the kernel works in the logits' own memory.
CHUNK_BYTES = 32 << 20
CHUNK_BYTES_ON_GPU = 256 << 20
FEWEST_ROWS = 128
_LARGEST_DZ = 256.0  # of float16 gradients of logits, unless the weight is large
# exp of this is 0 in float32 and float64. A logit of -inf becomes this much less than the largest,
# so that p · log p is 0 where p is.
_LEAST_LOG_PROB = -1e4


def chunk_rows(vocab_size: int, on_gpu: bool = False, itemsize: int = 4) -> int:
    """Return the default number of rows of a chunk for a vocabulary of `vocab_size`.

    itemsize: bytes of a logit.

    >>> chunk_rows(49152), chunk_rows(151936, on_gpu=True), chunk_rows(151936, True, 2)
    (170, 441, 883)
    """
    rows = (CHUNK_BYTES_ON_GPU if on_gpu else CHUNK_BYTES) // (itemsize * vocab_size)
    return max(FEWEST_ROWS, rows)


def loss_rows(vocab_size: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return the default number of rows of a chunk of `cross_entropy`, for logits of `dtype`."""
    itemsize = dtype.itemsize if kernel_reason(device, dtype) is None else 4
    return chunk_rows(vocab_size, is_on_gpu_path(device.type), itemsize)


class _Chunk(NamedTuple):
    """Some rows of the call. positions: of these rows among all M."""

    positions: slice | Tensor
    operands: Operands
    labels: Tensor  # [rows, 1]


def _chunks(operands: HeadOperands, spec: HeadSpec, rows: int = 0) -> Iterator[_Chunk]:
    """Yield chunks of nearly equal size of the rows whose label is not ignored.

    rows: of a chunk, if the spec has no number; 0 for `chunk_rows`.
    """
    x, weight, lora_A, lora_B = operands[:4]
    labels, bias = operands.labels, operands.bias
    counted = _counted_rows(labels, spec.ignore_index, lora_B.shape[0])
    if counted is not None:
        x, labels = x[counted], labels[counted]
    rows = spec.chunk_rows or rows or chunk_rows(lora_B.shape[0], is_on_gpu_path(x.device.type))
    if isinstance(weight, Tensor):
        weight = weight.to(spec.dtype)  # once, not for each chunk
    count = -(-x.shape[0] // rows)
    for i in range(count):
        start, stop = i * x.shape[0] // count, (i + 1) * x.shape[0] // count
        part = slice(start, stop)
        index = part if counted is None else counted[part]
        mask = _mask(operands, index, stop - start, spec.dropout_p)
        chunk_operands = Operands(x[part], weight, lora_A, lora_B, bias=bias, mask=mask)
        yield _Chunk(index, chunk_operands, labels[part, None])


def _counted_rows(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor | None:
    """Return the indices of the rows that count; None for all. ValueError for a wrong label."""
    if labels.is_meta:
        return None
    is_counted = labels != ignore_index
    indices = is_counted.nonzero()[:, 0]
    counts_all = indices.numel() == labels.numel()
    if labels.is_cpu:  # a GPU does not wait: its gather asserts it, the kernel makes NaN of the row
        wrong = is_counted & ((labels < 0) | (labels >= vocab_size))
        if bool(wrong.any()):
            raise ValueError(
                f"labels: got {int(labels[wrong][0])}, want 0 to {vocab_size - 1}, or "
                f"{ignore_index} (ignore_index)"
            )
    return None if counts_all else indices


def _mask(
    operands: HeadOperands, index: slice | Tensor, rows: int, dropout_p: float
) -> Tensor | None:
    """Return the rows of the dropout mask, bool; None without dropout."""
    rng, mask = operands.rng, operands.mask
    if not dropout_p or (rng is None and mask is None):
        return None
    if rng is None:
        assert mask is not None
        return mask[index]
    if isinstance(index, slice):
        index = torch.arange(index.start, index.stop, device=rng.device)
    return dropout_mask(rng, rows, operands.x.shape[1], dropout_p, rows=index)


def _linear_spec(spec: HeadSpec) -> Spec:
    return Spec(spec.scaling, spec.dropout_p, spec.dtype, spec.y_dtype)


def _logits(y: Tensor, spec: HeadSpec) -> Tensor:
    """Return z of y [rows, V] in float32 (float64 for float64), in place if y has that dtype."""
    z = y.to(stat_dtype(y.dtype))
    if spec.softcap:
        return (
            z.mul_(spec.logit_scale / spec.softcap)
            .tanh_()
            .mul_(spec.softcap * spec.inverse_temperature)
        )
    factor = spec.logit_scale * spec.inverse_temperature
    return z if factor == 1.0 else z.mul_(factor)


def _slope(z: Tensor, spec: HeadSpec) -> Tensor | None:
    """Return 1 − tanh², by which the gradient of a capped logit is multiplied; None for no cap."""
    if not spec.softcap:
        return None
    tanh = z / (spec.softcap * spec.inverse_temperature)
    return tanh.square_().neg_().add_(1.0)


def _float16_factor(operands: HeadOperands, spec: HeadSpec, mass: float = 1.0) -> float | Tensor:
    """Return the factor of gradients in float16, with which neither dz nor dx overflows.

    It is a scalar tensor, or a number if the operands have no values.

    mass: the largest sum of a row's positive dz, and of its negative dz, without the factor and the
        logits' scales. That of p − onehot is 1.
    """
    scale = max(1.0, abs(spec.logit_scale) * spec.inverse_temperature)
    if operands.x.is_meta:
        return _LARGEST_DZ / scale
    # |dx| ≤ mass · (max W − min W, beside 0) + the adapter's part, and |dS| as that part.
    _, weight, lora_A, lora_B, *_ = operands
    lowest, highest = (t.float() for t in _extrema(weight))
    ranks = lora_B.abs().sum(1, dtype=torch.float32).amax()
    widest = torch.linalg.vector_norm(lora_A, torch.inf).float() * dropout_scale(spec.dropout_p)
    spread = highest.clamp(min=0.0) - lowest.clamp(max=0.0)
    bound = spread + 2 * abs(spec.scaling) * ranks * widest.clamp(min=1.0)
    # 1 % less, for the roundings of dz and of the parts of dx.
    largest: Tensor = 0.99 * torch.finfo(torch.float16).max / (mass * bound)
    return largest.clamp(max=_LARGEST_DZ) / scale


def _extrema(weight: Tensor | Codes) -> tuple[Tensor, Tensor]:
    """Return bounds of the smallest and the largest element, without a copy of a dense weight."""
    if isinstance(weight, Tensor):
        return torch.aminmax(weight)
    largest = weight.scales().abs().amax() * weight.code.abs().amax()
    return -largest, largest


def dx_dtype(x_dtype: torch.dtype, spec: HeadSpec) -> torch.dtype:
    """Return the dtype of the ops' dx: float32 for float16 logits, whose sum's dx may overflow."""
    return stat_dtype(x_dtype) if spec.y_dtype is torch.float16 else x_dtype


class _Sums:
    """The gradients of all chunks, each divided by `factor` at the end."""

    def __init__(
        self,
        operands: HeadOperands,
        spec: HeadSpec,
        needs: HeadNeeds,
        backward: LinearBackward,
        factor: float | Tensor | None,
    ) -> None:
        x, lora_B = operands.x, operands.lora_B
        stat = stat_dtype(x.dtype)

        def zeros(need: bool, *shape: int) -> Tensor | None:
            return x.new_zeros(shape, dtype=stat) if need else None

        (V, R), K = lora_B.shape, x.shape[1]
        self.dx = x.new_zeros(x.shape, dtype=dx_dtype(x.dtype, spec)) if needs.x else None
        self.dweight = zeros(needs.weight, V, K)
        self.dA, self.dB = zeros(needs.lora_A, R, K), zeros(needs.lora_B, V, R)
        self.dbias = zeros(needs.bias, V)
        self.spec, self.backward, self.factor = spec, backward, factor
        # In float16 the sum of a chunk's rows may overflow; it has the adapter's dtype.
        adapter = {"lora_A": operands.lora_A, "lora_B": operands.lora_B}
        is_wide = factor is not None
        self.adapter = {name: t.float() if is_wide else t for name, t in adapter.items()}
        self.needs = Needs(needs.x, needs.lora_A, needs.lora_B, bias=needs.bias)

    def add(self, chunk: _Chunk, dy: Tensor, saved: Saved) -> None:
        """Add the gradients of a chunk, for dy [rows, V] in the logits' dtype."""
        operands = chunk.operands._replace(bias=None, **self.adapter)
        spec = _linear_spec(self.spec)
        if any(self.needs):
            grads = self.backward(dy, operands, saved, spec, self.needs)
            if self.dx is not None:
                self.dx[chunk.positions] = cast(Tensor, grads.x).to(self.dx.dtype)
            for total, part in (
                (self.dA, grads.lora_A),
                (self.dB, grads.lora_B),
                (self.dbias, grads.bias),
            ):
                if total is not None:
                    total += cast(Tensor, part)
        if self.dweight is not None:
            x, dtype = operands.x, spec.dtype
            if self.dweight.dtype is dtype:
                self.dweight.addmm_(dy.to(dtype).t(), x.to(dtype))
            else:
                self.dweight += mm_fp32(dy.to(dtype).t(), x.to(dtype))

    def result(self) -> HeadGrads:
        grads = HeadGrads(self.dx, self.dweight, self.dA, self.dB, self.dbias)
        if self.factor is None:
            return grads
        return HeadGrads(*(t if t is None else t.div_(self.factor) for t in grads))


def cross_entropy(
    operands: HeadOperands,
    spec: HeadSpec,
    needs: HeadNeeds,
    linear: Linear,
    linear_backward: LinearBackward,
) -> tuple[Tensor, HeadGrads]:
    """Return the sum of the rows' losses, and its gradients."""
    x = operands.x
    factor = None
    if spec.y_dtype is torch.float16 and any(needs):
        factor = float(_float16_factor(operands, spec))  # a GPU waits, as for the rows that count
    sums = _Sums(operands, spec, needs, linear_backward, factor)
    weight = (factor or 1.0) * spec.logit_scale * spec.inverse_temperature
    losses = [x.new_zeros(1, dtype=stat_dtype(x.dtype))]
    rows = loss_rows(operands.lora_B.shape[0], x.device, spec.y_dtype)
    for chunk in _chunks(operands, spec, rows):
        y, saved = linear(chunk.operands, _linear_spec(spec))
        losses.append(loss_of_logits_(y, chunk.labels, spec, weight, any(needs)))
        if any(needs):
            sums.add(chunk, y, saved)
        del y
    return torch.cat(losses).sum(), sums.result()


def loss_of_logits_(
    y: Tensor, labels: Tensor, spec: HeadSpec, weight: float, has_gradient: bool
) -> Tensor:
    """Return the loss of each row in float32 (float64 for float64), and overwrite y.

    Args:
        y: [rows, V], contiguous. It becomes the gradient of `weight` times the loss with
            has_gradient, and nothing of use without.
        labels: [rows, 1].
    """
    if kernel_reason(y.device, y.dtype) is not None or not y.is_contiguous():
        return loss_of_logits_by_torch_(y, labels, spec, weight, has_gradient)
    args = (
        labels[:, 0].contiguous(),
        *_scale_and_cap(spec),
        weight,
        spec.label_smoothing,
        has_gradient,
    )
    if checked.is_dispatched(y):
        return torch.ops.lora_kernels.cross_entropy_(y, *args)  # type: ignore[no-any-return]
    return _launch_cross_entropy(y, *args)


def loss_of_logits_by_torch_(
    y: Tensor, labels: Tensor, spec: HeadSpec, weight: float, has_gradient: bool
) -> Tensor:
    """`loss_of_logits_` by PyTorch's ops."""
    eps = spec.label_smoothing
    z = _logits(y, spec)
    target = z.gather(1, labels)
    if eps:
        target = target * (1 - eps) + z.mean(1, keepdim=True) * eps
    slope = _slope(z, spec) if has_gradient else None
    top = z.amax(1, keepdim=True)
    total = z.sub_(top).exp_().sum(1, keepdim=True)
    loss = (total.log() + (top - target))[:, 0]
    if has_gradient:
        z.mul_(weight / total)
        z.scatter_add_(1, labels, torch.full_like(top, -(1 - eps) * weight))
        if eps:
            z.sub_(eps / y.shape[1] * weight)
        if slope is not None:
            z.mul_(slope)
        _rounded(z, y)
    return loss


kernel_reasons: checked.Reasons = {}


def kernel_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why PyTorch's ops compute the loss on this device; None if Triton's kernel does."""
    if not is_on_gpu_path(device.type) and not triton.is_interpreted():
        return "a CPU runs PyTorch's ops"
    return checked.kernel_reason(kernel_reasons, compare_kernel, device, dtype)


def compare_kernel(device: torch.device) -> str | None:
    """Compare the kernel with PyTorch's ops on `device`, and synchronize."""
    generator = torch.Generator().manual_seed(0)
    # Rows of whole 16 bytes, as most vocabularies have, are another compilation.
    sizes = 5003, 5008
    samples = [torch.randn(3, V, generator=generator, dtype=torch.float64) * 4 for V in sizes]
    specs = [
        HeadSpec(1.0, 0.0, torch.float32, torch.float32, *options)
        for options in ((0.7,), (0.7, 5.0, 1.5, 0.1))  # each is compiled for each dtype and size
    ]
    for spec, dtype, sample in itertools.product(specs, KERNEL_DTYPES, samples):
        labels = torch.tensor([[0], [sample.shape[1] - 1], [4096]]).to(device)
        reason = _find_difference(sample.to(device, dtype), labels, spec)
        if reason is not None:
            cap, eps = spec.softcap, spec.label_smoothing
            return f"Triton's kernel of the loss in {dtype} (cap {cap}, smoothing {eps}) {reason}"
    return None


def _find_difference(y: Tensor, labels: Tensor, spec: HeadSpec) -> str | None:
    weight = 2.0 * spec.logit_scale * spec.inverse_temperature
    want, got, same = y.double(), y.clone(), y.clone()
    loss = loss_of_logits_by_torch_(want, labels, spec, weight, True)
    args = labels[:, 0], *_scale_and_cap(spec), weight, spec.label_smoothing
    losses = [_launch_cross_entropy(t, *args, g) for t, g in ((got, True), (same, False))]
    if not torch.equal(*losses) or not torch.equal(same, y):
        return "makes another loss with the gradient, or changes logits without it"
    # In units of 2⁻²⁴: a sum of 5008 positive terms by lanes and a tree is off by 16, and z, of at
    # most 20, and its exponential by 40. 2⁻¹⁷ is 128; the gradient has p's error twice, and a
    # rounding.
    if not bool(((losses[0] - loss).abs() <= 2.0**-17 * (1 + loss.abs())).all()):
        return "differs from PyTorch's ops in the loss"
    bound = 2.0**-16 * want.abs() + torch.finfo(y.dtype).eps * want.abs() + 2.0**-24 * weight
    tiny = torch.finfo(y.dtype).smallest_normal
    if not bool(((got.double() - want).abs() <= bound + tiny).all()):
        return "differs from PyTorch's ops in the gradient"
    return None


def _scale_and_cap(spec: HeadSpec) -> tuple[float, float]:
    """Return the kernel's arguments: z is scale·y, or cap·tanh(scale·y) if cap is not 0."""
    if spec.softcap:
        return spec.logit_scale / spec.softcap, spec.softcap * spec.inverse_temperature
    return spec.logit_scale * spec.inverse_temperature, 0.0


def _launch_cross_entropy(*args: Any) -> Tensor:
    from ..triton import elementwise

    return elementwise.cross_entropy(*args)


# An op that is one kernel, for modes.
_LIB = torch.library.Library("lora_kernels", "FRAGMENT")
_LIB.define(
    "cross_entropy_(Tensor(a!) y, Tensor labels, float scale, float cap, float weight, "
    "float smoothing, bool has_gradient) -> Tensor"
)
torch.library.register_kernel("lora_kernels::cross_entropy_", None, _launch_cross_entropy, lib=_LIB)
torch.library.register_fake(
    "lora_kernels::cross_entropy_",
    lambda y, *args: y.new_empty(y.shape[0], dtype=torch.float32),
    lib=_LIB,
)


def _rounded(dz: Tensor, y: Tensor) -> Tensor:
    """Return dz in y's dtype and memory."""
    return dz if dz is y else y.copy_(dz)


def log_probs(
    operands: HeadOperands, spec: HeadSpec, outputs: HeadOutputs, linear: Linear
) -> HeadRows:
    """Return the statistics of each row."""
    labels, dtype = operands.labels, stat_dtype(operands.x.dtype)
    statistics = {name: labels.new_zeros(labels.shape, dtype=dtype) for name in HeadRows._fields}
    statistics["is_top1"] = labels.new_zeros(labels.shape, dtype=torch.bool)
    for chunk in _chunks(operands, spec):
        y, _ = linear(chunk.operands, _linear_spec(spec))
        for name, values in _statistics_(y, chunk.labels, spec, outputs).items():
            statistics[name][chunk.positions] = values
        del y  # before the next chunk's
    requested: dict[str, bool] = outputs._asdict()
    fields: Any = (t if requested.get(name, True) else None for name, t in statistics.items())
    return HeadRows(*fields)


def _statistics_(
    y: Tensor, labels: Tensor, spec: HeadSpec, outputs: HeadOutputs
) -> dict[str, Tensor]:
    """Return fields of `HeadRows` for the rows of y [rows, V], and overwrite y."""
    statistics, z, eps = {}, _logits(y, spec), spec.label_smoothing
    target = z.gather(1, labels)[:, 0]
    if eps or outputs.mean_logits:
        mean = statistics["mean_logits"] = z.mean(1)
        if eps:
            target = target * (1 - eps) + mean * eps
    if outputs.is_top1:
        statistics["is_top1"] = z.argmax(1) == labels[:, 0]
    top = z.amax(1)
    z.sub_(top[:, None])
    p = z.exp() if outputs.entropy else z.exp_()
    total = p.sum(1)
    log_total = total.log()
    if outputs.entropy:  # z is log p + log_total
        statistics["entropy"] = log_total - z.clamp_(_LEAST_LOG_PROB).mul_(p).sum(1) / total
    if outputs.log_sum_sq_probs:
        statistics["log_sum_sq_probs"] = p.square_().sum(1).log() - 2 * log_total
    statistics["log_probs"] = (target - top) - log_total
    return statistics | {"largest_logit": top, "sum_exp": total}


def log_probs_backward(
    dlog_probs: Tensor,
    dentropy: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor | None],
    operands: HeadOperands,
    spec: HeadSpec,
    needs: HeadNeeds,
    linear: Linear,
    linear_backward: LinearBackward,
) -> HeadGrads:
    """Return the gradients for those of log_probs and entropy [M]; recompute the logits.

    rows: largest_logit, sum_exp and entropy, as `log_probs` returned them.
    """
    largest_logit, sum_exp, entropy = rows
    V, eps = operands.lora_B.shape[0], spec.label_smoothing
    weight: float | Tensor = spec.logit_scale * spec.inverse_temperature
    factor = None
    if spec.y_dtype is torch.float16:
        largest = dlog_probs
        if dentropy is not None:
            largest = torch.maximum(dlog_probs.abs(), dentropy.abs())
        largest = largest.abs().where(operands.labels != spec.ignore_index, 0.0)
        steepest = largest.amax() if largest.numel() else largest.new_ones(())
        # Half of Σ |p·(log p + H)|, the entropy's, is at most H ≤ log V.
        mass = 1.0 if dentropy is None else 1.0 + math.log(V)
        factor = _float16_factor(operands, spec, mass) / steepest.clamp(min=2.0**-100)
        weight = factor * weight

    def differentiate_(y: Tensor, labels: Tensor, index: slice | Tensor) -> Tensor:
        """Return dy of a chunk in y's dtype and memory."""
        z = _logits(y, spec)
        slope = _slope(z, spec)
        g = dlog_probs[index, None] * weight
        z.sub_(largest_logit[index, None])
        total = sum_exp[index, None]
        if dentropy is None or entropy is None:
            dz = z.exp_().mul_(-g / total)
        else:  # log p = z - log(total)
            h = dentropy[index, None] * weight
            shift = entropy[index, None] - total.log()
            part = torch.addcmul((g + h * shift) / total, z.clamp_(_LEAST_LOG_PROB), h / total)
            dz = z.exp_().mul_(part.neg_())
        dz.scatter_add_(1, labels, g * (1 - eps))
        if eps:
            dz.add_(g, alpha=eps / V)
        if slope is not None:
            dz.mul_(slope)
        return _rounded(dz, y)

    sums = _Sums(operands, spec, needs, linear_backward, factor)
    for chunk in _chunks(operands, spec):
        y, saved = linear(chunk.operands, _linear_spec(spec))
        sums.add(chunk, differentiate_(y, chunk.labels, chunk.positions), saved)
        del y  # before the next chunk's
    return sums.result()
