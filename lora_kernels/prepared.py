"""`lora_linear` for decoding: what is the same for every token is done once."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import ops, select
from .functional import base_dtype, dora_norm, lora_linear
from .ops import Prepared
from .quantization import Weight4bit


def prepare(
    x: Tensor,
    weight: Tensor | Weight4bit,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    compute_dtype: torch.dtype | None = None,
) -> Prepared | None:
    """`lora_linear` on one weight and adapter, checked and chosen once, for a few rows of x: for
    calls like one that it has answered without dropout, gate and column scale. None where there is
    no shorter way.

    The result, called with x and a bias or None, returns y, bit for bit `lora_linear`'s; or None
    where that is to be called: for more rows, another dtype, device or strides of x, a bias of
    another length, with gradients on, under autocast, before the eyes of a compiler, a dispatch
    mode or a transform, after another backend was asked for, and where lora_A, lora_B or a dense
    weight has moved in memory. Values may change in place. What it leaves out takes longer than a
    layer of a small model (benchmarks/NOTES.md).

    >>> import torch
    >>> from lora_kernels import lora_linear, prepared
    >>> x, W, A, B = torch.ones(1, 64), torch.eye(64), torch.ones(2, 64), torch.ones(64, 2)
    >>> with torch.no_grad():
    ...     y, call = lora_linear(x, W, A, B, 2.0), prepared.prepare(x, W, A, B, 2.0)
    ...     call is None or torch.equal(call(x), y)
    True
    """
    if torch.is_grad_enabled() or not x.is_cpu or ops.autocast("cpu"):
        return None
    tensor = weight.packed if isinstance(weight, Weight4bit) else weight
    if not ops.plain(x, tensor, lora_A, lora_B) or lora_A.stride(1) != 1:
        return None
    dtype = base_dtype("cpu", x.dtype, compute_dtype)
    called_by_address = [lora_A, lora_B]
    if tensor is weight:
        if tensor.dtype is not dtype or tensor.stride(1) != 1:
            return None
        called_by_address.append(tensor)
    rows = select.few_rows(dtype, isinstance(weight, Weight4bit), weight.shape[0] * weight.shape[1])
    if x.numel() > rows * x.shape[-1]:
        return None
    base = weight.codes if isinstance(weight, Weight4bit) else weight
    facts = [
        (None, torch.is_grad_enabled, False),
        (None, ops.watched, False),
        ("cpu", ops.autocast, False),
        (None, select.circumstances, select.circumstances()),
        *((t, what, _said(t, what)) for t in called_by_address for what in _WHERE),
    ]
    return ops.prepare(x.dtype, base, lora_A, lora_B, scaling, dtype, rows, facts)


# Of a matrix that is called by its address: a name or a function.
_WHERE: tuple[str | Callable[[Tensor], object], ...] = (
    Tensor.data_ptr,
    Tensor.stride,
    "dtype",
    "shape",
)


def _said(t: Tensor, what: str | Callable[[Tensor], object]) -> object:
    return getattr(t, what) if isinstance(what, str) else what(t)


class Latest:
    """`lora_linear` for one layer, which prepares the call that it answers and takes the prepared
    one for the next with the same weight, adapter and scaling.

    Copied or saved, it starts anew.
    """

    __slots__ = ("_call", "_numbers", "_tensors")

    def __init__(self) -> None:
        self._call: Prepared | None = None
        self._tensors: tuple[object, ...] = ()
        self._numbers: tuple[object, ...] = ()

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | Weight4bit,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None,
        compute_dtype: torch.dtype | None = None,
    ) -> Tensor:
        tensors, numbers = (weight, lora_A, lora_B), (scaling, compute_dtype, _kind(weight))
        if self._call is not None:
            if all(map(operator.is_, self._tensors, tensors)) and self._numbers == numbers:
                y = self._call(x, bias)
                if y is not None:
                    return y
            else:  # which would keep their memory
                self._call, self._tensors = None, ()
        y = lora_linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype=compute_dtype)
        call = prepare(x, weight, lora_A, lora_B, scaling, compute_dtype)
        if call is not None:
            self._call, self._tensors, self._numbers = call, tensors, numbers
        return y

    def __reduce__(self) -> tuple[type[Latest], tuple[()]]:
        return Latest, ()


class Rankless:
    """x·Wᵀ + bias for one layer without an adapter, by the call that `prepare` makes of no ranks;
    None where there is none for such an x or weight.

    Copied or saved, it starts anew.
    """

    __slots__ = ("_call", "_weight")

    def __init__(self) -> None:
        self._call: Prepared | None = None
        self._weight: Tensor | None = None

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
        if self._call is not None and self._weight is weight:
            y = self._call(x, bias)
            if y is not None:
                return y
        self._call = self._weight = None  # which would keep its memory
        if weight is None or weight.is_meta:
            return None
        A, B = weight.new_empty(0, weight.shape[1]), weight.new_empty(weight.shape[0], 0)
        call = prepare(x, weight, A, B, 0.0)
        if call is None:
            return None
        self._call, self._weight = call, weight
        return call(x, bias)

    def __reduce__(self) -> tuple[type[Rankless], tuple[()]]:
        return Rankless, ()


def _kind(weight: Tensor | Weight4bit) -> tuple[object, ...]:
    """What a weight may change without being another object: nothing of a Weight4bit."""
    return () if isinstance(weight, Weight4bit) else (weight.dtype, weight.shape)


class KeptNorm:
    """`dora_norm`, kept without gradients from call to call until what it was made of changes.

    The base's changes are known by its storages, which weak references tell from others that come
    to lie at the same address, and by version counters. Not every change of an adapter counts as a
    version: not one through `.data`, nor FSDP2's, which puts other values into the same storage. On
    a CPU it is therefore compared with a copy. On a GPU, for which a comparison would have to
    wait, it is known as the base is, and where there are several processes nothing is kept.
    Nothing of it is copied or pickled.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[object, ...], tuple[Tensor, ...], Tensor] | None = None

    def __call__(
        self,
        weight: Tensor | Weight4bit,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        rank_gate: Tensor | None = None,
    ) -> Tensor:
        """As `dora_norm`."""
        base = (weight.packed, weight.absmax) if isinstance(weight, Weight4bit) else (weight,)
        adapter = (lora_A, lora_B, *(() if rank_gate is None else (rank_gate,)))
        if (
            torch.is_grad_enabled()  # in training they change every time
            or torch.compiler.is_compiling()
            or any(t.is_inference() for t in (*base, *adapter))  # which tell nobody of changes
            or (not lora_A.is_cpu and _distributed())
        ):
            return dora_norm(weight, lora_A, lora_B, scaling, rank_gate=rank_gate)
        compared = adapter if lora_A.is_cpu else ()
        known = base if lora_A.is_cpu else (*base, *adapter)
        key = (scaling, *map(_state, known), *(t.dtype for t in adapter))
        kept = self._kept
        if kept is None or kept[0] != key or not _equal(kept[1], compared):
            norm = dora_norm(weight, lora_A, lora_B, scaling, rank_gate=rank_gate)
            self._kept = kept = key, tuple(t.detach().clone() for t in compared), norm
        return kept[2]

    def __reduce__(self) -> tuple[type[KeptNorm], tuple[()]]:
        return KeptNorm, ()


def _state(t: Tensor) -> tuple[object, ...]:
    """What differs wherever an element may."""
    storage = StorageWeakRef(t.untyped_storage())  # equal to another while both live
    return storage, t.storage_offset(), t.shape, t.stride(), t.dtype, t._version


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _equal(kept: tuple[Tensor, ...], now: tuple[Tensor, ...]) -> bool:
    return len(kept) == len(now) and all(map(torch.equal, kept, now))
