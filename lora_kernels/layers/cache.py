"""Prepared calls of layers: work that is equal in every call is done once, behind guards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.cpu import native
from ..backends.cpu.heuristics import few_rows
from ..backends.cpu.linear import PreparedCall
from ..backends.library import is_on_gpu_path
from ..choice import choose as selection
from ..core.call import Guard
from ..core.packed4bit import PACKED4BIT_TENSORS
from ..ops import context, linear
from ..ops.arguments import base_dtype
from ..ops.linear import CheckedCall, lora_linear
from ..ops.norm import dora_norm
from ..quantization import Weight4bit


def prepare(
    x: Tensor,
    weight: Tensor | Weight4bit,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> PreparedCall | None:
    """Prepare `lora_linear` on one weight, adapter and bias for calls with few rows of x.

    `lora_linear` must have accepted the same arguments before, without gradients, dropout, gate and
    column scale. A prepared call skips argument checks, selection and packing, which take longer
    than a layer of a small model.

    Returns a function of x and the bias, or None if the CPU backend has no prepared call. Its
    result is bitwise equal to `lora_linear`'s. The function returns None if a guard fails, and then
    `lora_linear` must be called:

    - x has more rows than the GEMV kernels take, or another dtype, device or strides
    - gradients or autocast are enabled, or another backend was requested
    - a compiler, a dispatch mode or a transform is active
    - a tensor has another address or layout; values may change in place

    >>> import torch
    >>> from lora_kernels import lora_linear
    >>> from lora_kernels.layers import cache
    >>> x, W, A, B = torch.ones(1, 64), torch.eye(64), torch.ones(2, 64), torch.ones(64, 2)
    >>> with torch.no_grad():
    ...     y, call = lora_linear(x, W, A, B, 2.0), cache.prepare(x, W, A, B, 2.0)
    ...     call is None or torch.equal(call(x), y)
    True
    """
    if (
        torch.is_grad_enabled()
        or not x.is_cpu
        or is_on_gpu_path("cpu")
        or native.module is None
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    four_bit = isinstance(weight, Weight4bit)
    base = weight.codes if isinstance(weight, Weight4bit) else weight
    held = base if isinstance(base, Tensor) else base.packed
    if not context.can_bypass_dispatcher(x, held, lora_A, lora_B) or lora_A.stride(1) != 1:
        return None
    dtype = base_dtype("cpu", x.dtype, compute_dtype)
    if isinstance(base, Tensor):
        if base.dtype is not dtype or base.stride(1) != 1:
            return None
        frozen: tuple[Any, ...] = (base,)
    else:
        frozen = base[:PACKED4BIT_TENSORS]
    called_by_address = [t for t in (lora_A, lora_B, bias, *frozen) if t is not None]
    few = few_rows(dtype, four_bit, weight.shape[0] * weight.shape[1])
    if x.numel() > few * x.shape[-1]:
        return None
    guards = [
        Guard(None, torch.is_grad_enabled, False),
        *context.interception_guards(),
        Guard("cpu", torch.is_autocast_enabled, False),
        *selection.guards(),
        *map(_memory_guard, called_by_address),
        *(Guard(t, Tensor.is_neg, False) for t in called_by_address),
    ]
    return linear.build_prepared_call(x.dtype, base, lora_A, lora_B, scaling, dtype, few, guards)


def unchanged(
    targets: Sequence[Any],
    keys: Sequence[Any],
    expected: Sequence[object],
    hooks: Sequence[dict[int, Any]],
) -> bool:
    """Return True if all guards hold, given by the fields of `Guard`, and no hook is registered.

    The extension's `unchanged`, for an installation without it.
    """
    for target, key, want in zip(targets, keys, expected, strict=True):
        if isinstance(target, dict):
            if target.get(key) is not want:
                return False
            continue
        if isinstance(key, str):
            found = getattr(target, key)
        else:
            found = key() if target is None else key(target)
        if found is not want and found != want:
            return False
    return not any(hooks)


def _memory_guard(t: Tensor) -> Guard:
    """Guard a tensor that is passed by address: address, strides, dtype and shape."""
    assert native.module is not None
    describe: Any = native.module.where if native.exchange else _describe_memory
    return Guard(t, describe, describe(t))


def _describe_memory(t: Tensor) -> tuple[object, ...]:
    return t.data_ptr(), t.stride(), t.dtype, t.shape


class CallCache:
    """`lora_linear` for one layer without gate and column scale, which prepares the next calls.

    Without gradients and for few rows of x on a CPU, that is a `PreparedCall`; otherwise a
    `CheckedCall`, whose Function may use the `PreparedCall`. The cache is empty in a copy of the
    layer, and is not saved.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: _Kept | None = None

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
        self.renew(x, bias, tensors, numbers)
        return y

    def call(
        self, x: Tensor, bias: Tensor | None, tensors: _Tensors, numbers: _Numbers
    ) -> Tensor | None:
        """Return y by a prepared call, or None if there is none for these arguments."""
        kept = self._kept
        if kept is None:
            return None
        (weight, lora_A, lora_B), known_bias, known, few, checked = kept
        is_same = weight is tensors[0] and lora_A is tensors[1] and lora_B is tensors[2]
        if not is_same or known_bias is not bias or known != numbers:
            self._kept = None  # free the former tensors
            return None
        has_grad = torch.is_grad_enabled()
        if few is not None and not has_grad:
            y = few(x, bias)
            if y is not None:
                return y
        if checked is None or (y := checked(x)) is None:
            return None
        if not has_grad:
            few = _prepare_few(x, bias, tensors, numbers)
            if few is not None:
                self._kept = kept._replace(few=few, checked=checked.with_few(few))
        return y

    def renew(self, x: Tensor, bias: Tensor | None, tensors: _Tensors, numbers: _Numbers) -> None:
        """Prepare calls after `lora_linear` has returned for x.

        A tensor that is not a leaf is not cached, because its graph would stay in memory.
        """
        _, lora_A, lora_B = tensors
        if not (lora_A.is_leaf and lora_B.is_leaf and (bias is None or bias.is_leaf)):
            return
        few = _prepare_few(x, bias, tensors, numbers)
        scaling, compute_dtype, dropout_p = numbers
        checked = CheckedCall.build(x, *tensors, scaling, bias, compute_dtype, dropout_p)
        is_kept = few is not None or checked is not None
        checked = checked and checked.with_few(few)
        self._kept = _Kept(tensors, bias, numbers, few, checked) if is_kept else None

    def __reduce__(self) -> tuple[type[CallCache], tuple[()]]:
        return CallCache, ()


_Tensors = tuple[Tensor | Weight4bit, Tensor, Tensor]  # weight, lora_A and lora_B
_Numbers = tuple[float, torch.dtype | None, float]  # scaling, compute_dtype and dropout_p


class _Kept(NamedTuple):
    """Two prepared calls, and the tensor objects and numbers that they are for."""

    tensors: _Tensors
    bias: Tensor | None
    numbers: _Numbers
    few: PreparedCall | None
    checked: CheckedCall | None


def _prepare_few(
    x: Tensor, bias: Tensor | None, tensors: _Tensors, numbers: _Numbers
) -> PreparedCall | None:
    scaling, compute_dtype, dropout_p = numbers
    if dropout_p:
        return None
    with torch.no_grad():
        return prepare(x, *tensors, scaling, bias, compute_dtype)


@dataclasses.dataclass(eq=False)
class PreparedForward:
    """The prepared call of another library's layer, behind guards on the state it depends on.

    Each call checks all guards. No attribute refers to the layer, which would be a reference cycle.

    Args:
        cache: holds the prepared call.
        tensors, scaling, compute_dtype: arguments of `lora_linear`.
        dropout: the adapter's, whose mode and probability may change; None without one.
        parameters: the base layer's. The call reads "bias" in it.
        x_dtype, device: of the first call. None for the CPU, because x.is_cpu is faster than
            x.device.
        layouts: `linear.layouts` of the adapter, the bias and the weight.
        attributes: names of attributes of the layer, and their values.
        guards: objects, keys and expected values of `Guard`s.
        hooks: of the modules that the call passes over. All are empty.
    """

    cache: CallCache
    tensors: _Tensors
    scaling: float
    compute_dtype: torch.dtype | None
    dropout: nn.Dropout | None
    parameters: dict[str, Any]
    x_dtype: torch.dtype
    device: torch.device | None
    layouts: tuple[object, ...]
    attributes: tuple[tuple[str, object], ...]
    guards: tuple[tuple[Any, ...], ...]
    hooks: tuple[dict[int, Any], ...]

    def _is_valid(self, layer: Any) -> bool:
        """Return True if no guard has changed. `__call__` checks x and the tensors' layouts."""
        check: Any = unchanged if native.module is None else native.module.unchanged
        for name, want in self.attributes:
            found = getattr(layer, name)
            if found is not want and found != want:
                return False
        return check(*self.guards, self.hooks)  # type: ignore[no-any-return]

    def __call__(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return y, or None if a guard fails and the layer's forward must run."""
        if not self._is_valid(layer):
            return None
        bias, dropout, tensors = self.parameters["bias"], self.dropout, self.tensors
        p = dropout.p if dropout is not None and dropout.training else 0.0
        numbers = self.scaling, self.compute_dtype, p
        y = self.cache.call(x, bias, tensors, numbers)
        if y is not None:
            return y
        weight, lora_A, lora_B = tensors
        if (
            context.unfused_context() is not None
            or x.dtype is not self.x_dtype
            or not (x.is_cpu if self.device is None else x.device == self.device)
            or linear.layouts(lora_A, lora_B, bias, weight) != self.layouts
        ):
            return None
        y = lora_linear(
            x, *tensors, self.scaling, bias, dropout_p=p, compute_dtype=self.compute_dtype
        )
        self.cache.renew(x, bias, tensors, numbers)
        # bitsandbytes returns x's dtype, under autocast too.
        return y.to(x.dtype) if isinstance(weight, Weight4bit) else y

    def __reduce__(self) -> tuple[type[None], tuple[()]]:  # not copied or pickled with a layer
        return type(None), ()


class PreparedLinear:
    """x·Wᵀ + bias for one layer without an adapter, by a prepared call of rank 0.

    A call returns None if x or the weight is unsupported. The object is not copied or saved with
    its layer.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: tuple[PreparedCall, Tensor, Tensor | None] | None = None

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
        kept = self._kept
        if kept is not None and kept[1] is weight and kept[2] is bias:
            y = kept[0](x, bias)
            if y is not None:
                return y
        self._kept = None  # free the former weight
        if weight is None:
            return None
        A, B = weight.new_empty(0, weight.shape[1]), weight.new_empty(weight.shape[0], 0)
        call = prepare(x, weight, A, B, 0.0, bias)
        if call is None:
            return None
        self._kept = call, weight, bias
        return call(x, bias)

    def __reduce__(self) -> tuple[type[PreparedLinear], tuple[()]]:
        return PreparedLinear, ()


class DoraNormCache:
    """`dora_norm`, cached on a CPU without gradients until an operand changes.

    Every call compares the operands, because no version counter tells of all writes: fused
    optimizers, bitsandbytes, ZeRO, FSDP2 and `.data` change values and leave it alone. lora_A,
    lora_B and rank_gate are compared with copies, the base by `fingerprint`. On a GPU a comparison
    would wait for the device, so nothing is cached there. The cache is empty in a copy or pickle of
    its layer.
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
        """Compute `dora_norm`, or return the cached norm if nothing has changed."""
        adapter = (lora_A, lora_B, *(() if rank_gate is None else (rank_gate,)))
        base = _fingerprints(weight, adapter)
        if base is None:
            self._kept = None
            return dora_norm(weight, lora_A, lora_B, scaling, rank_gate=rank_gate)
        key = (scaling, selection.forced_backend(), base, *(t.dtype for t in adapter))
        kept = self._kept
        if kept is None or kept[0] != key or not all(map(torch.equal, kept[1], adapter)):
            norm = dora_norm(weight, lora_A, lora_B, scaling, rank_gate=rank_gate)
            self._kept = kept = key, tuple(t.detach().clone() for t in adapter), norm
        return kept[2]

    def __reduce__(self) -> tuple[type[DoraNormCache], tuple[()]]:
        return DoraNormCache, ()


def _fingerprints(
    weight: Tensor | Weight4bit, adapter: tuple[Tensor, ...]
) -> tuple[object, ...] | None:
    """Return the fingerprints of the base's tensors; None if the norm must not be cached."""
    if (
        torch.is_grad_enabled()  # in training the adapter changes every time
        or native.module is None
        or not adapter[0].is_cpu
        or selection.is_eager_on_gpu("cpu")
    ):
        return None
    base = (weight,) if isinstance(weight, Tensor) else tuple(weight._tensors().values())
    if not context.can_bypass_dispatcher(*base, *adapter):
        return None
    found = tuple(map(fingerprint, base))
    return None if None in found else found


def fingerprint(t: Tensor) -> tuple[object, ...] | None:
    """Return a value that changes if an element or the layout of `t`, on a CPU, changes.

    The elements are hashed to 64 bits by their position in memory, in one read. Returns None unless
    a matrix is contiguous, or its transpose.
    """
    if not (t.is_contiguous() or (t.dim() == 2 and t.t().is_contiguous())):
        return None
    assert native.module is not None
    elements = native.module.fingerprint(t.data_ptr(), t.nbytes, torch.get_num_threads())
    return t.shape, t.stride(), t.dtype, elements
