"""Tensor4bit: a 4-bit weight as a tensor, for code that wants one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..backends import decode4bit
from .weight4bit import Weight4bit

_aten = torch.ops.aten
_INNER = "packed", "absmax", "code", "nested_absmax", "nested_code", "offset"
_DTYPES = None, torch.float32, torch.bfloat16, torch.float16, torch.float64


class Tensor4bit(Tensor):
    """A frozen `Weight4bit` with the shape and the dtype of the decoded weight.

    Every op may read it. The op decodes it and drops the result, so that only one is decoded at a
    time, and what autograd saves for the backward is packed. Detaching, copying, moving, casting
    and transposing keep it packed. A cast changes the dtype that ops decode to, with one rounding.
    Selecting an expert decodes that one alone. Ops that write to it raise RuntimeError, unless they
    write what it holds.

    Args:
        weight: [N, K], or [E, N, K] for E experts.
        is_transposed: whether the tensor is [K, N], or [E, K, N].
        dtype: float32, bfloat16, float16 or float64; None: the weight's.

    >>> import torch
    >>> from lora_kernels.quantization import quantize_4bit
    >>> from lora_kernels.quantization.tensor4bit import Tensor4bit
    >>> weight = Tensor4bit(quantize_4bit(torch.eye(32, 64), "mxfp4"))
    >>> torch.ones(1, 64) @ weight.T
    tensor([[1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1.,
             1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1.]])
    """

    weight4bit: Weight4bit
    is_transposed: bool

    @staticmethod
    def __new__(
        cls,
        weight: Weight4bit | Tensor4bit,
        is_transposed: bool = False,
        dtype: torch.dtype | None = None,
        requires_grad: bool = False,
    ) -> Tensor4bit:
        if isinstance(weight, Tensor4bit):  # accelerate copies a parameter by its class
            given, weight = weight, weight.weight4bit
            is_transposed, dtype = given.is_transposed, given.dtype
        *experts, N, K = weight.shape
        shape, strides = [*experts, N, K], [N * K, K, 1][-len(weight.shape) :]
        if is_transposed:
            shape[-2:], strides[-2:] = shape[:-3:-1], strides[:-3:-1]
        self: Tensor4bit = Tensor._make_wrapper_subclass(
            cls,
            shape,
            strides=strides,
            dtype=dtype or weight.dtype,
            device=weight.device,
            requires_grad=requires_grad,
        )
        self.weight4bit, self.is_transposed = weight, is_transposed
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        shown = ", transposed" * self.is_transposed
        return f"Tensor4bit({list(self.shape)}, {self.weight4bit!r}{shown})"

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode the weight, rounded once to `dtype`; None: the tensor's."""
        dense = self.weight4bit.dequantize(dtype or self.dtype)
        return dense.mT if self.is_transposed else dense

    def replace(self, dtype: torch.dtype | None = None, **inner: Any) -> Tensor4bit:
        """Return a tensor with another dtype, or of other tensors."""
        weight = dataclasses.replace(self.weight4bit, **inner) if inner else self.weight4bit
        return Tensor4bit(weight, self.is_transposed, dtype or self.dtype)

    def inner_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the `Weight4bit` by the names of their fields."""
        found = {name: getattr(self.weight4bit, name) for name in _INNER}
        return {name: t for name, t in found.items() if t is not None}

    # By these PyTorch swaps the tensor in `nn.Module.to`, and `torch.compile` traces it.

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        weight = self.weight4bit
        rest = {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}
        rest = {name: value for name, value in rest.items() if name not in _INNER}
        return list(self.inner_tensors()), (rest, self.is_transposed, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: Any, rest: Any, size: Any, stride: Any) -> Tensor4bit:
        fields, *others = rest
        return Tensor4bit(Weight4bit(**inner, **fields), *others)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PACKED and type(args[0]) is cls:
            found = _PACKED[func](*args, **kwargs)
            if found is not None:
                return found
        for i, argument in enumerate(func._schema.arguments):
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            if type(given) is cls and argument.alias_info and argument.alias_info.is_write:
                raise RuntimeError(  # not TypeError, for which `+=` tries `+`
                    f"{func}: got a frozen weight in {given.weight4bit.quant_type} to write to, "
                    "want a dense one: load the model decoded to merge into it or to train it"
                )
        args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs))
        return func(*args, **kwargs)


def read(tensor: Tensor4bit) -> Weight4bit:
    """Return the weight, with the tensor's dtype unless that is float64."""
    # No method: Dynamo takes a tensor's methods for ops.
    weight = tensor.weight4bit  # which `tensor.data = ...` does not replace
    if tensor.dtype in (weight.dtype, torch.float64):
        return weight
    return dataclasses.replace(weight, dtype=tensor.dtype)


for _name in _INNER:
    setattr(Tensor4bit, _name, property(attrgetter(f"weight4bit.{_name}")))


# The ops that give a packed result, or None for one that they decode for.


def _detach(self: Tensor4bit) -> Tensor4bit:
    return self.replace()


def _clone(self: Tensor4bit, memory_format: Any = None) -> Tensor4bit | None:
    if self.is_transposed and memory_format is torch.contiguous_format:
        return None
    return self.replace(None, **{name: t.clone() for name, t in self.inner_tensors().items()})


def _to_copy(
    self: Tensor4bit, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor4bit | None:
    if dtype not in _DTYPES:
        return None
    moved = {name: t.to(device) for name, t in self.inner_tensors().items()} if device else {}
    return self.replace(dtype, **moved)


def _transpose(self: Tensor4bit, dim0: int = 0, dim1: int = 1) -> Tensor4bit | None:
    dims = {dim0 % self.dim(), dim1 % self.dim()}
    if dims != {self.dim() - 2, self.dim() - 1}:
        return None
    return Tensor4bit(self.weight4bit, not self.is_transposed, self.dtype)


def _select(self: Tensor4bit, dim: int, index: int) -> Tensor | None:
    if self.dim() != 3 or dim % 3:
        return None
    weight = self.weight4bit
    E, N, _ = weight.shape
    rows = slice(index % E * N, (index % E + 1) * N)
    dense = decode4bit.dense(weight.codes, weight.matrix_shape, self.dtype, rows=rows)
    return dense.t() if self.is_transposed else dense


def _copy_(self: Tensor4bit, source: Tensor, non_blocking: bool = False) -> Tensor4bit | None:
    if isinstance(source, Tensor4bit):
        target, source_fields = self.inner_tensors(), source.inner_tensors()
        for name, t in target.items():
            t.copy_(source_fields[name])
        return self
    # DDP writes what it has broadcast.
    return self if torch.equal(self.dequantize(), source) else None


_PACKED: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _detach,
    _aten.alias.default: _detach,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.t.default: _transpose,
    _aten.transpose.int: _transpose,
    _aten.select.int: _select,
    _aten.copy_.default: _copy_,
    _aten.is_pinned.default: lambda self, *_, **__: False,
}
