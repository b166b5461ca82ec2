"""Guarded, prepared calls for decoding: what is equal for every token is done once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import ops, selection
from .backends import native
from .backends.cpu import PreparedCall
from .backends.cpu_heuristics import few_rows
from .backends.eager import row_squares
from .core.call import Guard
from .functional import base_dtype, dora_norm, lora_linear
from .quantization import Weight4bit


def prepare(
    x: Tensor,
    weight: Tensor | Weight4bit,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    compute_dtype: torch.dtype | None = None,
) -> PreparedCall | None:
    """Prepare `lora_linear` on one weight and adapter for calls with few rows of x.

    For calls like one that `lora_linear` has answered without gradients, dropout, gate and column
    scale. Checks, choice and argument packing, which the prepared call leaves out, take longer than
    a layer of a small model.

    Returns a call of x and a bias or None, or None if the CPU backend has no such call. Its y has
    the bits of `lora_linear`'s. It returns None if `lora_linear` has to be called: for more rows;
    for another dtype, device or strides of x; for a bias of another length; with gradients on;
    under autocast; while a compiler, a dispatch mode or a transform is active; after another
    backend was requested; and if lora_A, lora_B or a dense weight has moved in memory. Values may
    change in place.

    >>> import torch
    >>> from lora_kernels import fastpath, lora_linear
    >>> x, W, A, B = torch.ones(1, 64), torch.eye(64), torch.ones(2, 64), torch.ones(64, 2)
    >>> with torch.no_grad():
    ...     y, call = lora_linear(x, W, A, B, 2.0), fastpath.prepare(x, W, A, B, 2.0)
    ...     call is None or torch.equal(call(x), y)
    True
    """
    if (
        torch.is_grad_enabled()
        or not x.is_cpu
        or native.module is None
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    four_bit = isinstance(weight, Weight4bit)
    base = weight.codes if isinstance(weight, Weight4bit) else weight
    held = base if isinstance(base, Tensor) else base.packed
    if not ops.can_bypass_dispatcher(x, held, lora_A, lora_B) or lora_A.stride(1) != 1:
        return None
    dtype = base_dtype("cpu", x.dtype, compute_dtype)
    called_by_address = [lora_A, lora_B]
    if isinstance(base, Tensor):
        if base.dtype is not dtype or base.stride(1) != 1:
            return None
        called_by_address.append(base)
    few = few_rows(dtype, four_bit, weight.shape[0] * weight.shape[1])
    if x.numel() > few * x.shape[-1]:
        return None
    guards = [
        Guard(None, torch.is_grad_enabled, False),
        *ops.interception_guards(),
        Guard("cpu", torch.is_autocast_enabled, False),
        *selection.guards(),
        *map(_memory_guard, called_by_address),
    ]
    return ops.prepare(x.dtype, base, lora_A, lora_B, scaling, dtype, few, guards)


def _memory_guard(t: Tensor) -> Guard:
    """Guard a matrix that is called by its address: address, strides, dtype and shape."""
    assert native.module is not None
    where: Any = native.module.where if native.exchange else _where
    return Guard(t, where, where(t))


def _where(t: Tensor) -> tuple[object, ...]:
    return t.data_ptr(), t.stride(), t.dtype, t.shape


class CallCache:
    """`lora_linear` for one layer, which prepares the call for the next token.

    For layers without gate and column scale. A cache is not copied or saved with its layer; the
    copy starts empty.
    """

    __slots__ = ("_call", "_key")

    def __init__(self) -> None:
        self._call: PreparedCall | None = None
        self._key: tuple[Any, ...] | None = None

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | Weight4bit,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None,
        compute_dtype: torch.dtype | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        tensors, numbers = (weight, lora_A, lora_B), (scaling, compute_dtype, dropout_p)
        y = self.call(x, bias, tensors, numbers)
        if y is not None:
            return y
        y = lora_linear(
            x, *tensors, scaling, bias, compute_dtype=compute_dtype, dropout_p=dropout_p
        )
        self.renew(x, tensors, numbers)
        return y

    def matches(
        self, tensors: tuple[Tensor | Weight4bit, Tensor, Tensor], numbers: tuple[object, ...]
    ) -> bool:
        """Return True if the prepared call is for these very tensors and these numbers."""
        if self._key is None:
            return False
        (weight, lora_A, lora_B), kept = self._key
        return (
            weight is tensors[0]
            and lora_A is tensors[1]
            and lora_B is tensors[2]
            and kept == numbers
        )

    def call(
        self,
        x: Tensor,
        bias: Tensor | None,
        tensors: tuple[Tensor | Weight4bit, Tensor, Tensor],
        numbers: tuple[object, ...],
    ) -> Tensor | None:
        """Return y if a call is prepared for these arguments, or None."""
        if self._call is None:
            return None
        if not self.matches(tensors, numbers):
            self._call = self._key = None  # which would keep other tensors in memory
            return None
        return None if torch.is_grad_enabled() else self._call(x, bias)

    def renew(
        self,
        x: Tensor,
        tensors: tuple[Tensor | Weight4bit, Tensor, Tensor],
        numbers: tuple[Any, ...],
    ) -> None:
        """Prepare a call after `lora_linear` has answered for x.

        numbers: scaling, compute dtype and dropout_p. An adapter that was computed from others is
        not kept, since its graph would stay in memory.
        """
        scaling, compute_dtype, dropout_p = numbers
        if dropout_p or torch.is_grad_enabled():
            return
        call = None
        if tensors[1].is_leaf and tensors[2].is_leaf:
            call = prepare(x, *tensors, scaling, compute_dtype)
        if call is not None:
            self._call, self._key = call, (tensors, numbers)

    def __reduce__(self) -> tuple[type[CallCache], tuple[()]]:
        return CallCache, ()


class PreparedLinear:
    """x·Wᵀ + bias for one layer without an adapter, by a prepared call of rank 0.

    Returns None if there is no such call for x or the weight. Not copied or saved with its layer.
    """

    __slots__ = ("_call", "_weight")

    def __init__(self) -> None:
        self._call: PreparedCall | None = None
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

    def __reduce__(self) -> tuple[type[PreparedLinear], tuple[()]]:
        return PreparedLinear, ()


class DoraNormCache:
    """`dora_norm` without gradients, kept until an operand changes.

    Changes of the base are seen by its storages and version counters; a weak reference tells a
    storage from another that comes to lie at the same address. A change of an adapter through
    `.data`, or by FSDP2, counts no version: on a CPU the adapter is therefore compared with a copy.
    On a GPU a comparison would wait for the device: there the version decides, and in a
    distributed run nothing is kept. Not copied or pickled with its layer.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[object, ...], tuple[Tensor, ...], Tensor] | None = None
        self._squares: tuple[tuple[object, ...], Tensor] | None = None

    def __call__(
        self,
        weight: Tensor | Weight4bit,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        rank_gate: Tensor | None = None,
    ) -> Tensor:
        """Compute `dora_norm`, or return the cached norm if nothing has changed."""
        base: tuple[Tensor, ...] = (
            (weight,) if isinstance(weight, Tensor) else tuple(weight._tensors().values())
        )
        adapter = (lora_A, lora_B, *(() if rank_gate is None else (rank_gate,)))
        if (
            torch.is_grad_enabled()  # in training they change every time
            or torch.compiler.is_compiling()
            or any(t.is_inference() for t in (*base, *adapter))  # which tell nobody of changes
            or (not lora_A.is_cpu and _distributed())
        ):
            squares = self._row_squares(weight, base, lora_A, lora_B)
            return dora_norm(
                weight, lora_A, lora_B, scaling, rank_gate=rank_gate, row_squares=squares
            )
        compared = adapter if lora_A.is_cpu else ()
        known = base if lora_A.is_cpu else (*base, *adapter)
        key = (scaling, *map(tensor_state, known), *(t.dtype for t in adapter))
        kept = self._kept
        if kept is None or kept[0] != key or not _equal(kept[1], compared):
            norm = dora_norm(weight, lora_A, lora_B, scaling, rank_gate=rank_gate)
            self._kept = kept = key, tuple(t.detach().clone() for t in compared), norm
        return kept[2]

    def _row_squares(
        self,
        weight: Tensor | Weight4bit,
        base: tuple[Tensor, ...],
        lora_A: Tensor,
        lora_B: Tensor,
    ) -> Tensor | None:
        """‖W‖² of each row for the eager backend on a GPU, until the base changes; else None."""
        if (
            not selection.is_eager_on_gpu(lora_A.device.type)
            or torch.compiler.is_compiling()
            or any(t.is_inference() for t in base)
            or _distributed()
        ):
            return None
        key = (*map(tensor_state, base), lora_A.dtype)
        if self._squares is None or self._squares[0] != key:
            held = weight.codes if isinstance(weight, Weight4bit) else weight
            with torch.no_grad():
                self._squares = key, row_squares(held, lora_A, lora_B)
        return self._squares[1]

    def __reduce__(self) -> tuple[type[DoraNormCache], tuple[()]]:
        return DoraNormCache, ()


def tensor_state(t: Tensor) -> tuple[object, ...]:
    """Return a key that changes whenever an element may have changed."""
    storage = StorageWeakRef(t.untyped_storage())  # equal to another while both live
    return storage, t.storage_offset(), t.shape, t.stride(), t.dtype, t._version


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _equal(kept: tuple[Tensor, ...], now: tuple[Tensor, ...]) -> bool:
    return len(kept) == len(now) and all(map(torch.equal, kept, now))
