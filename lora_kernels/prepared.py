"""`lora_linear` for a layer: what is the same for every token, or every step, is done once."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import ops, select
from .autograd import LoRALinearFunction
from .backends import native
from .backends.eager import row_squares
from .functional import base_dtype, dora_norm, drawn, lora_linear
from .ops import Fact, Prepared
from .quantization import Weight4bit
from .quantization.codes import CODES_TENSORS, Codes
from .select import Choice


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
    if torch.is_grad_enabled():
        return None
    bound = _bound(x, weight, lora_A, lora_B, compute_dtype)
    if bound is None:
        return None
    base, dtype, few, facts = bound
    if x.numel() > few * x.shape[-1]:
        return None
    off: Fact = (None, torch.is_grad_enabled, False)
    return ops.prepare(x.dtype, base, lora_A, lora_B, scaling, dtype, few, [off, *facts])


def _lies(t: Tensor) -> Fact:
    """That it lies where it does, as what it is: for a matrix that is called by its address."""
    assert native.module is not None
    where: Any = native.module.where if native.exchange else _where
    return t, where, where(t)


def _where(t: Tensor) -> tuple[object, ...]:
    return t.data_ptr(), t.stride(), t.dtype, t.shape


def _bound(
    x: Tensor,
    weight: Tensor | Weight4bit,
    lora_A: Tensor,
    lora_B: Tensor,
    compute_dtype: torch.dtype | None,
) -> tuple[Tensor | Codes, torch.dtype, int, list[Fact]] | None:
    """The base, the dtype of its product, how many rows are few, and what has to be as it is now;
    None for what no call is prepared for."""
    if not x.is_cpu or native.module is None or ops.autocast("cpu"):
        return None
    four_bit = isinstance(weight, Weight4bit)
    base = weight.codes if isinstance(weight, Weight4bit) else weight
    held = base if isinstance(base, Tensor) else base.packed
    if not ops.plain(x, held, lora_A, lora_B) or lora_A.stride(1) != 1:
        return None
    dtype = base_dtype("cpu", x.dtype, compute_dtype)
    called_by_address = [lora_A, lora_B]
    if isinstance(base, Tensor):
        if base.dtype is not dtype or base.stride(1) != 1:
            return None
        called_by_address.append(base)
    facts: list[Fact] = [
        *ops.UNWATCHED,
        (None, torch._C._is_any_autocast_enabled, False),
        *select.circumstances(),
        *map(_lies, called_by_address),
    ]
    return base, dtype, select.few_rows(dtype, four_bit, weight.shape[0] * weight.shape[1]), facts


class Step:
    """`lora_linear` with gradients on one weight and adapter, checked and chosen once, for calls
    like one that it has answered without gate and column scale.

    Called with x and a bias or None, it returns y, bit for bit `lora_linear`'s, and so are the
    gradients; or None where that is to be called, as `prepare`'s results do.
    """

    __slots__ = (
        "_args", "_call", "_choices", "_codes", "_few", "_numbers", "_of", "_wants", "_whats"
    )  # fmt: skip

    def __init__(
        self,
        call: Prepared,
        choices: tuple[Choice, Choice],
        few: int,
        args: tuple[Any, ...],
        numbers: tuple[Any, ...],
        codes: tuple[Any, ...],
        facts: list[Fact],
    ) -> None:
        self._call, self._choices, self._few = call, choices, few
        self._args, self._numbers, self._codes = args, numbers, codes
        of, self._whats, self._wants = zip(_batched, *facts, strict=True)
        self._of = of[1 : -2 if args[0] is None else -3]  # whatever is saved

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor | Weight4bit,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        compute_dtype: torch.dtype | None = None,
        dropout_p: float = 0.0,
    ) -> Step | None:
        """The next one, where there is a shorter way."""
        if not torch.is_grad_enabled():
            return None
        bound = _bound(x, weight, lora_A, lora_B, compute_dtype)
        if bound is None or bound[1] is not x.dtype:
            return None
        base, dtype, few, facts = bound
        codes: tuple[Any, ...] = () if isinstance(base, Tensor) else tuple(base)
        frozen: list[Fact] = [] if codes else [(base, "requires_grad", False)]
        if isinstance(base, Tensor) and base.requires_grad:
            return None
        prepared = ops.prepare_step(
            base, lora_A, lora_B, scaling, dtype, few, facts + frozen, dropout_p
        )
        if prepared is None:
            return None
        dense = None if codes else base
        numbers = (scaling, dropout_p, dtype, dtype, False, codes[CODES_TENSORS:])
        return cls(*prepared, few, (dense, lora_A, lora_B), numbers, codes[:CODES_TENSORS], facts)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        if not self._call.trains(x, bias):
            return None
        rng = drawn(x) if self._numbers[1] else None
        return LoRALinearFunction.apply(  # type: ignore[no-any-return]
            x, *self._args, None, None, bias, rng, (*self._numbers, self), *self._codes
        )

    def train(self, x: Tensor, bias: Tensor | None, rng: Tensor | None) -> tuple[Tensor, Tensor]:
        """y and P, as `LoRALinearFunction` wants them."""
        return self._call.train(x, bias, rng)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        p: Tensor,
        rng: Tensor | None,
        need_x: bool,
        need_A: bool,
        need_B: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
        """dx, dA and dB; None where any of these is not what it was."""
        of = (dy, *self._of, lora_A, lora_B, *([] if weight is None else [weight]))
        return self._call.backward(
            dy, x, lora_A, lora_B, p, rng, need_x, need_A, need_B, of, self._whats, self._wants
        )

    def choice(self, rows: int) -> Choice:
        """`ops.choose`'s when the call was made, for so many rows of x."""
        return self._choices[rows > self._few]


_batched: Fact = (None, ops.batched, False)


class Calls:
    """The calls prepared for one weight and adapter, with gradients and without."""

    __slots__ = ("_decode", "_left", "_numbers", "_step", "_tensors")

    def __init__(
        self,
        weight: Tensor | Weight4bit,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        compute_dtype: torch.dtype | None = None,
        dropout_p: float = 0.0,
    ) -> None:
        self._tensors = weight, lora_A, lora_B
        self._numbers = scaling, compute_dtype, dropout_p
        self._decode: Prepared | None = None
        self._step: Step | None = None
        self._left = 8  # steps yet to be prepared: in vain where none fits, or tensors move

    def of(
        self, tensors: tuple[Tensor | Weight4bit, Tensor, Tensor], numbers: tuple[object, ...]
    ) -> bool:
        """Whether they are for these very tensors, weight, A and B, and for this scaling, compute
        dtype and dropout."""
        return all(map(operator.is_, self._tensors, tensors)) and self._numbers == numbers

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """`lora_linear`'s y, or None where that is to be called, and `renew` then."""
        call = self._step if torch.is_grad_enabled() else self._decode
        return None if call is None else call(x, bias)

    def renew(self, x: Tensor) -> bool:
        """After `lora_linear` has answered for x; false where these are not to be kept, since an
        adapter's graph would stay in memory with them."""
        _, lora_A, lora_B = self._tensors
        if not (lora_A.is_leaf and lora_B.is_leaf):
            return False
        if not torch.is_grad_enabled():
            scaling, compute_dtype, dropout_p = self._numbers
            if not dropout_p:
                new = prepare(x, *self._tensors, scaling, compute_dtype)
                self._decode = new or self._decode
        elif self._left:
            self._left -= 1
            self._step = Step.of(x, *self._tensors, *self._numbers) or self._step
        return True


class Latest:
    """`lora_linear` for one layer, without gate and column scale, which prepares the call that it
    answers and takes the prepared one for the next with the same weight, adapter and numbers.

    Copied or saved, it starts anew.
    """

    __slots__ = ("_calls",)

    def __init__(self) -> None:
        self._calls: Calls | None = None

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
        calls, numbers = self._calls, (scaling, compute_dtype, dropout_p)
        if calls is not None and calls.of((weight, lora_A, lora_B), numbers):
            y = calls(x, bias)
            if y is not None:
                return y
        else:  # whose tensors would stay in memory
            self._calls, calls = None, Calls(weight, lora_A, lora_B, *numbers)
        y = lora_linear(
            x, weight, lora_A, lora_B, scaling, bias,
            compute_dtype=compute_dtype, dropout_p=dropout_p,
        )  # fmt: skip
        self._calls = calls if calls.renew(x) else None
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
        self._squares: tuple[tuple[object, ...], Tensor] | None = None

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
            squares = self._row_squares(weight, base, lora_A, lora_B)
            return dora_norm(
                weight, lora_A, lora_B, scaling, rank_gate=rank_gate, row_squares=squares
            )
        compared = adapter if lora_A.is_cpu else ()
        known = base if lora_A.is_cpu else (*base, *adapter)
        key = (scaling, *map(_state, known), *(t.dtype for t in adapter))
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
            not select.is_eager_on_gpu(lora_A.device.type)
            or torch.compiler.is_compiling()
            or any(t.is_inference() for t in base)
            or _distributed()
        ):
            return None
        key = (*map(_state, base), lora_A.dtype)
        if self._squares is None or self._squares[0] != key:
            held = weight.codes if isinstance(weight, Weight4bit) else weight
            with torch.no_grad():
                self._squares = key, row_squares(held, lora_A, lora_B)
        return self._squares[1]

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
