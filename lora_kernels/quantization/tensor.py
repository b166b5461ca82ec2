"""QuantizedTensor: a 4-bit weight as a tensor, for code that wants one."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

from ..backends import decoder
from .weight import QuantizedWeight, dtype_name

_aten = torch.ops.aten
INNER = "packed", "absmax", "code", "nested_absmax", "nested_code", "offset"
_DATA: Any = Tensor.data  # PyTorch's descriptor
FORMAT_VERSION = 1  # of the entries in a state dict
_NO_ADDRESS = 1 << 63
_DTYPES = None, torch.float32, torch.bfloat16, torch.float16, torch.float64


class _ReadOnly(Tensor):
    """A tensor that every op may read, decoded, and that no op writes to."""

    format: str

    def dequantize(self) -> Tensor:
        raise NotImplementedError

    # No op runs for these, so that `__torch_dispatch__` does not see them.

    @property
    def data(self) -> Tensor:
        return _DATA.__get__(self)  # type: ignore[no-any-return]

    @data.setter
    def data(self, value: Tensor) -> None:
        raise self.write_error(".data =")

    def apply_(self, *_: Any) -> NoReturn:
        raise self.write_error("apply_")

    map_ = map2_ = apply_  # type: ignore[assignment]

    def tolist(self) -> Any:
        return self.dequantize().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        array = self.dequantize().numpy(force=force)
        array.flags.writeable = False
        return array

    def __dlpack__(self, **_: Any) -> NoReturn:
        raise BufferError(
            f"__dlpack__: got a weight in {self.format}, want a dense one: call dequantize() first"
        )

    def write_error(self, func: object) -> RuntimeError:
        return RuntimeError(  # not TypeError, for which `+=` tries `+`
            f"{func}: got a frozen weight in {self.format} to write to, want a dense one: load "
            "the model decoded to merge into it or to train it"
        )

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an op on decoded copies. Raise for a write, and return views as `_DecodedView`s."""
        kwargs = kwargs or {}
        frozen = [t for t in tree_leaves((args, kwargs)) if isinstance(t, _ReadOnly)]
        is_collective = func.namespace == "c10d" and func._opname != "send"
        is_view = False
        for i, argument in enumerate(func._schema.arguments):
            alias = argument.alias_info
            # Collectives write their first argument, which their schemas do not say.
            if alias is None and (i or not is_collective):
                continue
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            for t in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(t, _ReadOnly):
                    if alias is None or alias.is_write:
                        raise t.write_error(func)
                    is_view = True
        if _has_composite(func):  # in inference mode; other modes call its ops one by one
            # Lazy conjugation is a key of the dispatcher, which is off in here. A view becomes one
            # above.
            with nullcontext() if is_view else enable_reentrant_dispatch():
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        with _mode_of(frozen):
            decoded = {id(t): t.dequantize() for t in frozen}
        args, kwargs = tree_map_only(_ReadOnly, lambda t: decoded[id(t)], (args, kwargs))
        result = func(*args, **kwargs)
        storages = {t.untyped_storage()._cdata for t in decoded.values()}
        format = frozen[0].format

        def freeze(t: Tensor) -> Tensor:
            # Some views, as of unsafe_split, are none by the op's schema.
            is_view = t.layout is torch.strided and t.untyped_storage()._cdata in storages
            return _DecodedView(t, format) if is_view else t

        with _mode_of(frozen):
            return tree_map_only(Tensor, freeze, result)


@functools.cache
def _has_composite(func: Any) -> bool:
    """Return True if PyTorch implements the op by other ops, which autograd sees."""
    name, key = func.name(), DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


@contextmanager
def _mode_of(frozen: Sequence[Tensor]) -> Iterator[None]:
    """Leave inference mode, since PyTorch refuses views in it of tensors that were made outside."""
    if not torch.is_inference_mode_enabled() or all(t.is_inference() for t in frozen):
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


class _DecodedView(_ReadOnly):
    """A decoded copy, in place of a view of a `QuantizedTensor`. A write to it would be lost."""

    decoded: Tensor

    @staticmethod
    def __new__(cls, decoded: Tensor, format: str) -> _DecodedView:
        if decoded.is_conj() or decoded.is_neg():
            raise NotImplementedError(
                f"got a conj() or negative view of a weight in {format}, want one of a dense "
                "weight: call dequantize() first"
            )
        self: _DecodedView = Tensor._make_wrapper_subclass(
            cls,
            decoded.shape,
            strides=decoded.stride(),
            storage_offset=decoded.storage_offset(),
            dtype=decoded.dtype,
            device=decoded.device,
        )
        self.decoded, self.format = decoded, format
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.decoded!r}, decoded from {self.format}"

    def dequantize(self) -> Tensor:
        return self.decoded

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["decoded"], self.format

    @staticmethod
    def __tensor_unflatten__(inner: Any, format: Any, size: Any, stride: Any) -> _DecodedView:
        return _DecodedView(inner["decoded"], format)


class QuantizedTensor(_ReadOnly):
    """A frozen `QuantizedWeight` with the shape and the dtype of the decoded weight.

    Every op may read it. The op decodes it and drops the result, so that only one is decoded at a
    time. What a linear layer or a grouped GEMM saves for the backward is packed. Detaching,
    copying, moving, casting and transposing keep it packed. A cast changes the dtype that ops
    decode to, with one rounding. Selecting an expert decodes that one alone, as any other view.

    A write raises RuntimeError before anything changes: in place, through a view, by `out=` and by
    `.data =`. There are three exceptions: `copy_` and `.data =` take a `QuantizedTensor` of the
    same form (shape, orientation, format, block sizes), and `copy_` takes the decoded values. Views
    other than transposes are decoded copies that may be read and not written.

    `packed_state.pack_parameter` gives one to a module, whose `state_dict` then saves the codes.

    Args:
        weight: [N, K], or [E, N, K] for E experts.
        is_transposed: whether the tensor is [K, N], or [E, K, N].
        dtype: float32, bfloat16, float16 or float64; None: the weight's.

    >>> import torch
    >>> from lora_kernels.quantization import quantize_4bit
    >>> from lora_kernels.quantization.tensor import QuantizedTensor
    >>> weight = QuantizedTensor(quantize_4bit(torch.eye(32, 64), "mxfp4"))
    >>> torch.ones(1, 64) @ weight.T
    tensor([[1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1.,
             1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1.]])
    >>> weight[0] = 5
    Traceback (most recent call last):
    RuntimeError: aten.fill_.Scalar: got a frozen weight in mxfp4 to write to, want a dense one: ...
    """

    quantized: QuantizedWeight
    is_transposed: bool
    _form: Tensor

    @staticmethod
    def __new__(
        cls,
        weight: QuantizedWeight | QuantizedTensor,
        is_transposed: bool = False,
        dtype: torch.dtype | None = None,
        requires_grad: bool = False,
    ) -> QuantizedTensor:
        is_param = False
        if isinstance(weight, QuantizedTensor):  # accelerate makes a parameter by its class
            given, is_param = weight, True
            weight, is_transposed, dtype = given.quantized, given.is_transposed, given.dtype
        if not isinstance(weight, QuantizedWeight):
            got = f"{type(weight).__name__} of {getattr(weight, 'dtype', None)}"
            raise TypeError(f"weight: got {got}, want a QuantizedWeight or a packed weight")
        *experts, N, K = weight.shape
        shape, strides = [*experts, N, K], [N * K, K, 1][-len(weight.shape) :]
        if is_transposed:
            shape[-2:], strides[-2:] = shape[:-3:-1], strides[:-3:-1]
        self: QuantizedTensor = Tensor._make_wrapper_subclass(
            cls,
            shape,
            strides=strides,
            dtype=dtype or weight.dtype,
            device=weight.device,
            requires_grad=requires_grad,
        )
        self.quantized, self.is_transposed = weight, is_transposed
        return _with_attributes(self, {"_is_param": is_param})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        shown = ", transposed" * self.is_transposed
        return f"QuantizedTensor({list(self.shape)}, {self.quantized!r}{shown})"

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode the weight, rounded once to `dtype`; None: the tensor's."""
        dense = self.quantized.dequantize(dtype or self.dtype)
        return dense.mT if self.is_transposed else dense

    def replace(self, dtype: torch.dtype | None = None, **inner: Any) -> QuantizedTensor:
        """Return a tensor with another dtype, or of other tensors."""
        weight = dataclasses.replace(self.quantized, **inner) if inner else self.quantized
        return QuantizedTensor(weight, self.is_transposed, dtype or self.dtype)

    def inner_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the `QuantizedWeight` by the names of their fields."""
        found = {name: getattr(self.quantized, name) for name in INNER}
        return {name: t for name, t in found.items() if t is not None}

    @property
    def format(self) -> str:  # type: ignore[override]
        return self.quantized.format

    @property
    def data(self) -> Tensor:
        return _DATA.__get__(self)  # type: ignore[no-any-return]

    @data.setter
    def data(self, value: Tensor) -> None:
        _check_form(".data =", self, value)
        _DATA.__set__(self, value)  # the dtype and the device
        self.quantized = value.quantized  # type: ignore[attr-defined]
        vars(self).pop("_form", None)

    def data_ptr(self) -> int:
        """Return a number that tells weights apart, and is no address to read; 0 on meta.

        accelerate takes parameters with one `data_ptr` for one parameter.
        """
        address = self.quantized.packed.data_ptr()
        return address and address | _NO_ADDRESS

    # PyTorch's own copy and pickle look for data at `data_ptr`.

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        weight = copy.deepcopy(self.quantized, memo)
        copied = QuantizedTensor(weight, self.is_transposed, self.dtype, self.requires_grad)
        memo[id(self)] = _with_attributes(copied, vars(self))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        fields = self.quantized, self.is_transposed, self.dtype, self.requires_grad
        return QuantizedTensor, fields, {"_is_param": isinstance(self, nn.Parameter)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _with_attributes(self, state)

    @property
    def form(self) -> Tensor:
        """The fields of the `QuantizedWeight` that are no tensors: JSON in uint8, on a CPU."""
        if "_form" not in vars(self):  # one tensor, as safetensors drops tied ones by their memory
            fields = fields_of(self) | {"is_transposed": self.is_transposed}
            fields |= {"dtype": dtype_name(self.dtype), "of": dtype_name(self.quantized.dtype)}
            text = bytearray(json.dumps({"version": FORMAT_VERSION} | fields), "utf-8")
            self._form = torch.frombuffer(text, dtype=torch.uint8)
        return self._form

    def share_memory_(self) -> QuantizedTensor:
        for t in self.inner_tensors().values():
            t.share_memory_()
        return self

    def is_shared(self) -> bool:
        return all(t.is_shared() for t in self.inner_tensors().values())

    # By these PyTorch swaps the tensor in `nn.Module.to`, and `torch.compile` traces it.

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.inner_tensors()), (fields_of(self), self.is_transposed, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: Any, rest: Any, size: Any, stride: Any) -> QuantizedTensor:
        fields, *others = rest
        return QuantizedTensor(QuantizedWeight(**inner, **fields), *others)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _PACKED and type(args[0]) is cls:
            with _mode_of(args[:1]):
                found = _PACKED[func](*args, **(kwargs or {}))
            if found is not None:
                return found
        return super().__torch_dispatch__(func, types, args, kwargs)


def _with_attributes(tensor: QuantizedTensor, attributes: dict[str, Any]) -> QuantizedTensor:
    """Let a tensor be a parameter if its original was one."""
    if attributes.get("_is_param", False):
        tensor._is_param = True
    return tensor


def fields_of(tensor: QuantizedTensor) -> dict[str, Any]:
    """Return the fields of the `QuantizedWeight` that are no tensors, by name."""
    weight = tensor.quantized
    names = [f.name for f in dataclasses.fields(weight)]
    return {name: getattr(weight, name) for name in names if name not in INNER}


def _form(tensor: QuantizedTensor) -> Any:
    """Return what two tensors have in common if one may be copied into the other."""
    fields = {name: value for name, value in fields_of(tensor).items() if name != "dtype"}
    inner = {name: (t.dtype, t.shape) for name, t in tensor.inner_tensors().items()}
    return fields, inner, tensor.is_transposed


def _check_form(func: object, target: QuantizedTensor, source: object) -> None:
    """Raise RuntimeError unless the source is a `QuantizedTensor` of the target's form."""
    if not isinstance(source, QuantizedTensor):
        raise target.write_error(func)
    if _form(source) != _form(target):
        raise RuntimeError(f"{func}: got {source!r}, want the form of {target!r}")


def read_tensor(tensor: QuantizedTensor) -> QuantizedWeight:
    """Return the weight, with the tensor's dtype unless that is float64."""
    # No method: Dynamo takes a tensor's methods for ops.
    weight = tensor.quantized
    if tensor.dtype in (weight.dtype, torch.float64):
        return weight
    return dataclasses.replace(weight, dtype=tensor.dtype)


for _name in INNER:
    setattr(QuantizedTensor, _name, property(attrgetter(f"quantized.{_name}")))


# The ops that give a packed result, or None for one that they decode for. PyTorch then checks the
# arguments.


def _detach(self: QuantizedTensor) -> QuantizedTensor:
    return self.replace()


def _to_copy(
    self: QuantizedTensor,
    dtype: Any = None,
    device: Any = None,
    non_blocking: bool = False,
    memory_format: Any = None,
    **_: Any,
) -> QuantizedTensor | None:
    if dtype not in _DTYPES:
        return None
    if memory_format not in (None, torch.preserve_format) and (
        self.is_transposed or memory_format is not torch.contiguous_format
    ):
        return None
    copies = {
        name: t.to(device or t.device, non_blocking=non_blocking, copy=True)
        for name, t in self.inner_tensors().items()
    }
    return self.replace(dtype, **copies)


def _clone(self: QuantizedTensor, memory_format: Any = None) -> QuantizedTensor | None:
    return _to_copy(self, memory_format=memory_format)


def _transpose(self: QuantizedTensor, dim0: int = 0, dim1: int = 1) -> QuantizedTensor | None:
    n = self.dim()
    if {dim + n if dim < 0 else dim for dim in (dim0, dim1)} != {n - 2, n - 1}:
        return None
    return QuantizedTensor(self.quantized, not self.is_transposed, self.dtype)


def _permute(self: QuantizedTensor, dims: Sequence[int]) -> QuantizedTensor | None:
    n = self.dim()
    if [dim + n if dim < 0 else dim for dim in dims] != [*range(n - 2), n - 1, n - 2]:
        return None
    return QuantizedTensor(self.quantized, not self.is_transposed, self.dtype)


def _select(self: QuantizedTensor, dim: int, index: int) -> Tensor | None:
    weight = self.quantized
    E, N = weight.shape[0], weight.shape[-2]
    if self.dim() != 3 or dim not in (0, -3) or not -E <= index < E:
        return None
    rows = slice(index % E * N, (index % E + 1) * N)
    dense = decoder.dense(weight.codes, weight.matrix_shape, self.dtype, rows=rows)
    return _DecodedView(dense.t() if self.is_transposed else dense, weight.format)


def _copy_(
    self: QuantizedTensor, source: Tensor, non_blocking: bool = False
) -> QuantizedTensor | None:
    if isinstance(source, QuantizedTensor):
        _check_form("aten.copy_.default", self, source)
        source_tensors = source.inner_tensors()
        for name, t in self.inner_tensors().items():
            t.copy_(source_tensors[name], non_blocking)
        return self
    dense = self.dequantize()  # DDP writes what it has broadcast, NaN too
    is_same = dense.shape == source.shape and torch.allclose(
        dense, source.to(dense.dtype), rtol=0, atol=0, equal_nan=True
    )
    return self if is_same else None


def _record_stream(self: QuantizedTensor, stream: Any) -> QuantizedTensor:
    for t in self.inner_tensors().values():
        t.record_stream(stream)
    return self


_PACKED: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _detach,
    _aten.alias.default: _detach,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.t.default: _transpose,
    _aten.transpose.int: _transpose,
    _aten.permute.default: _permute,
    _aten.select.int: _select,
    _aten.copy_.default: _copy_,
    _aten.record_stream.default: _record_stream,
    _aten.is_pinned.default: lambda self, *_, **__: False,
}
