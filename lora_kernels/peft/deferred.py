"""The logits of a head as an object that computes them if an op needs them.

A model's own forward runs on the object in a training step. `F.cross_entropy` of it is
`lora_linear_cross_entropy`, which keeps no logits in memory. Scalar factors, `tanh`, casts, views
and slices of rows are recorded. Any other op computes the logits, and its name is the reason that
`explain` gives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..ops import context
from ..ops.head import lora_linear_cross_entropy
from .head import operands_of_head

Number = float  # which is the name of a method below


class HeadCall:
    """A call of a head, which all logits made from it share.

    Args:
        head: a module that `read_head` reads.
        x: [..., K].
        needs_grad: whether gradients were on in the call.
        autocast: whether autocast was on for x's device, and its dtype.
        nodes: the logits, and each object made from them.
        reason: the op that computed the logits; None if none has.
        has_loss: whether a loss was computed from them without logits in memory.
    """

    def __init__(self, head: Any, x: Tensor) -> None:
        self.head, self.x = head, x
        self.needs_grad = torch.is_grad_enabled()
        self.autocast = _autocast(x)
        self.nodes: list[DeferredLogits] = []
        self.reason: str | None = None
        self.has_loss = False

    def in_its_autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return a context with the autocast of the head's call."""
        if self.autocast == _autocast(self.x):
            return context.NOTHING
        is_enabled, dtype = self.autocast
        return torch.autocast(self.x.device.type, dtype=dtype, enabled=is_enabled)


def _autocast(x: Tensor) -> tuple[bool, torch.dtype | None]:
    device_type = x.device.type
    if device_type in context.WITHOUT_AUTOCAST:
        return False, None
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


class DeferredLogits:
    """The logits `cap · tanh(scale · head(x) / cap)` [..., V], which are not in memory.

    It answers as the tensor would. An op that it does not record computes the logits, with every
    object made from them, and then runs on tensors.

    Args:
        call: of the head.
        x: [..., K], the head's input, with the rows and the shape of these logits.
        dtype: of the logits.
        compute: returns the tensor.
        scale: factor of the head's result; of tanh's argument, if there is a cap.
        cap: factor of tanh, or None without one.

    >>> head, x = torch.nn.Linear(3, 5), torch.ones(2, 4, 3)
    >>> logits = defer_logits(head, x)
    >>> labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, -100])
    >>> loss = functional.cross_entropy((logits * 0.5).float().view(-1, 5), labels)
    >>> torch.allclose(loss, functional.cross_entropy(head(x).view(-1, 5) * 0.5, labels))
    True
    >>> logits.shape, logits.op
    (torch.Size([2, 4, 5]), None)
    >>> logits.argmax(-1).shape, logits.op
    (torch.Size([2, 4]), 'argmax')
    """

    def __init__(
        self,
        call: HeadCall,
        x: Tensor,
        dtype: torch.dtype,
        compute: Callable[[], Tensor],
        scale: float = 1.0,
        cap: float | None = None,
    ) -> None:
        self.call, self.x, self.dtype = call, x, dtype
        self.scale, self.cap = scale, cap
        self._compute = compute
        self._tensor: Tensor | None = None
        call.nodes.append(self)

    # What a tensor answers ---------------------------------------------------------------------

    @property
    def op(self) -> str | None:
        """The op that computed the logits; None if they are not in memory."""
        return self.call.reason

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.x.shape[:-1], self.call.head.out_features))

    @property
    def ndim(self) -> int:
        return self.x.ndim

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def requires_grad(self) -> bool:
        trains = self.x.requires_grad or any(p.requires_grad for p in self.call.head.parameters())
        return self.call.needs_grad and trains

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def is_floating_point(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={list(self.shape)}, dtype={self.dtype}, op={self.op})"

    # Recorded ops ------------------------------------------------------------------------------

    def __mul__(self, other: Any) -> Any:
        return self._multiply("mul", other, lambda t: t * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._multiply("div", other, lambda t: t / other)

    mul = multiply = __mul__
    div = divide = true_divide = __truediv__

    def _multiply(self, op: str, number: Any, run: Callable[[Tensor], Tensor]) -> Any:
        """Return the logits times a number, or divided by it.

        After tanh a factor that is not positive is no soft cap.
        """
        if type(number) not in (int, float) or (number == 0 and op == "div"):
            return run(self.computed(f"{op} by a {type(number).__name__}"))
        factor = number if op == "mul" else 1 / number
        if self.cap is None:
            return self._record(run, scale=self.scale * factor)
        if not self.cap * factor > 0:
            return run(self.computed(f"{op} by {number} after tanh"))
        return self._record(run, cap=self.cap * factor)

    def tanh(self) -> Any:
        if self.cap is not None:
            return self.computed("a second tanh").tanh()
        return self._record(torch.tanh, cap=1.0)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        target = args[0] if len(args) == 1 and not kwargs else kwargs.get("dtype")
        if isinstance(target, torch.dtype) and len(args) + len(kwargs) == 1:
            if target.is_floating_point:
                return self._record(lambda t: t.to(target), dtype=target)
        elif isinstance(target, (str, torch.device)) and torch.device(target) == self.device:
            return self
        return self.computed("to").to(*args, **kwargs)

    def float(self) -> Any:
        return self.to(torch.float32)

    def double(self) -> Any:
        return self.to(torch.float64)

    def contiguous(self) -> Any:
        return self._record(Tensor.contiguous)

    def reshape(self, *shape: Any) -> Any:
        sizes = shape[0] if isinstance(shape[0], (tuple, list)) else shape
        if sizes[-1] != self.shape[-1]:
            return self.computed("reshape").reshape(*shape)
        x = self.x.reshape(*sizes[:-1], self.x.shape[-1])
        return self._record(lambda t: t.reshape(*sizes), x=x)

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        if end_dim % self.ndim == self.ndim - 1:
            return self.computed("flatten").flatten(start_dim, end_dim)
        x = self.x.flatten(start_dim, end_dim)
        return self._record(lambda t: t.flatten(start_dim, end_dim), x=x)

    def __getitem__(self, index: Any) -> Any:
        if not _keeps_columns(index, self.ndim):
            return self.computed("getitem")[index]
        return self._record(lambda t: t[index], x=self.x[index])

    def _record(
        self,
        run: Callable[[Tensor], Tensor],
        *,
        x: Tensor | None = None,
        dtype: torch.dtype | None = None,
        scale: Number | None = None,
        cap: Number | None = None,
    ) -> Any:
        """Return the logits after one more op, which `run` does to a tensor."""
        if self._tensor is not None:
            return run(self._tensor)
        if torch.is_grad_enabled() is not self.call.needs_grad:
            return run(self.computed("an op in another gradient mode"))
        return DeferredLogits(
            self.call,
            self.x if x is None else x,
            self.dtype if dtype is None else dtype,
            lambda: run(self._get()),
            self.scale if scale is None else scale,
            self.cap if cap is None else cap,
        )

    # Every other op ----------------------------------------------------------------------------

    def computed(self, op: str) -> Tensor:
        """Return the tensor, because of an op.

        All objects made from the logits are computed, so that an op in place meets their values.
        """
        call = self.call
        call.reason = call.reason or op
        with torch.set_grad_enabled(call.needs_grad), call.in_its_autocast():
            for node in call.nodes:
                node._get()
            return self._get()

    def _get(self) -> Tensor:
        if self._tensor is None:
            self._tensor = self._compute()
        return self._tensor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.computed(name), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.cross_entropy:
            return _cross_entropy(*args, **kwargs)
        if function is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        name = getattr(function, "__name__", str(function))
        args, kwargs = _with_tensors(args, name), _with_tensors(kwargs, name)
        return function(*args, **kwargs)


def defer_logits(head: Any, x: Tensor) -> DeferredLogits:
    """Return `head(x)` without computing it.

    head: a module that `read_head` reads for x.
    """
    call = HeadCall(head, x)
    dtype = context.autocast_dtype(x.device.type, x.dtype) or x.dtype
    return DeferredLogits(call, x, dtype, lambda: head.forward(x))


def _keeps_columns(index: Any, ndim: int) -> bool:
    """Return True if an index of slices takes rows of [..., V], and each whole."""
    entries = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(entry, slice) or entry is Ellipsis for entry in entries):
        return False
    slices = [entry for entry in entries if entry is not Ellipsis]
    is_last = len(slices) == ndim or (len(slices) < len(entries) and entries[-1] is not Ellipsis)
    return not is_last or slices[-1] == slice(None)


def _with_tensors(value: Any, op: str) -> Any:
    """Return an op's arguments with the tensors of all logits."""
    if type(value) is DeferredLogits:
        return value.computed(op)
    if type(value) in (list, tuple):
        return type(value)(_with_tensors(entry, op) for entry in value)
    if type(value) is dict:
        return {key: _with_tensors(entry, op) for key, entry in value.items()}
    return value


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return `F.cross_entropy`, without logits if it is a sum or mean over rows [M, V]."""
    reason = None
    if weight is not None:
        reason = "cross_entropy with class weights"
    elif label_smoothing:
        reason = "cross_entropy with label smoothing"
    elif reduction not in ("mean", "sum") or not size_average is reduce is None:
        reason = f"cross_entropy with reduction {reduction!r}"
    elif type(input) is not DeferredLogits or type(target) is not Tensor:
        reason = "cross_entropy of other classes of tensors"
    elif input.ndim != 2 or target.dtype is not torch.int64 or target.shape != input.shape[:1]:
        reason = f"cross_entropy of targets {list(target.shape)} in {target.dtype}"
    elif target.device != input.device:
        reason = "cross_entropy of targets on another device"
    if reason is not None or input._tensor is not None:
        logits, target, weight = _with_tensors((input, target, weight), reason or "")
        return functional.cross_entropy(
            logits, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    call, cap = input.call, input.cap
    with call.in_its_autocast():
        record, compute_dtype = operands_of_head(call.head, input.x)
        loss = lora_linear_cross_entropy(
            input.x,
            record.weight,
            record.lora_A,
            record.lora_B,
            target,
            record.scaling,
            record.bias,
            ignore_index=ignore_index,
            logit_softcap=cap,
            logit_scale=input.scale if cap is None else input.scale * cap,
            reduction=reduction,
            dropout_p=record.dropout_p,
            compute_dtype=compute_dtype,
        )
    call.has_loss = True
    # Autocast computes a cross-entropy of any logits in float32.
    return loss if _autocast(input.x)[0] else loss.to(input.dtype)


def _computing(name: str) -> Callable[..., Any]:
    def run(self: DeferredLogits, *args: Any) -> Any:
        operands = _with_tensors(args, name)
        return getattr(self.computed(name.strip("_")), name)(*operands)

    return run


# Python looks operators up in the class, so that `__getattr__` does not get them.
_OPERATORS = (
    "add radd sub rsub rtruediv floordiv mod pow rpow matmul rmatmul neg abs iter bool "
    "eq ne lt le gt ge invert and or setitem iadd isub imul itruediv"
)
for _name in _OPERATORS.split():
    setattr(DeferredLogits, f"__{_name}__", _computing(f"__{_name}__"))
