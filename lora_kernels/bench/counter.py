"""Count the memory traffic of PyTorch code on a GPU, without a GPU.

`count` and `count_layer` run a call on meta tensors, which have shapes and no data, and add up the
bytes that each kernel reads and writes. The figures are counts, not timings. A kernel reads each
operand once from memory: caches are taken to hold its own re-reads, and nothing between kernels.

One op is one kernel, except that:

- Views and allocations cost nothing. An op without an element to write launches nothing.
- `addmm` out of place copies its first operand to the result before, unless it is a bias [N], which
  cuBLAS adds in its epilogue, or `beta` is 0. In place it reads and writes the result once.
- An op reads the arguments that it changes in place, whatever its name, but no `out`.
- `index_select` and other gathers read the indices, and of the table no more than they copy. A
  scatter reads and writes the elements that its indices name.
- A GEMM of a stack, `_grouped_mm`, reads no more of the stack's matrices than it has rows.
- `cross_entropy_` reads the logits twice.
- An op that has a kernel on CUDA and several ops in its place on meta is one kernel (SiLU's
  backward).
- Dropout is `native_dropout`, which CUDA runs in training. On meta, PyTorch would run several ops.
- An op of this package is what its eager implementation runs, or the kernel that it launches.
- FLOPs are those of GEMMs, of `embedding_bag`'s sums none.
- `bitsandbytes::gemm_4bit` is its fused kernel or the ops it falls back to, whichever bitsandbytes
  chooses on an H100.
- Autograd adds two gradients of one tensor in place, into the first that arrives. Under a dispatch
  mode PyTorch adds them out of place, which a GPU does not see.

Kernels that a library launches for one op (split-K reductions) and its workspaces do not count.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..backends import library
from ..choice import choose as selection
from ..ops import context, registry

# The card whose dispatch bitsandbytes' `gemm_4bit` follows: H100, sm_90 with 132 SMs.
H100 = (132, 9, 0)

# Allocations, and changes of a shape that the schema does not call views.
_FREE = {
    "_unsafe_view", "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty",
    "new_empty_strided", "resize_",
}  # fmt: skip
# Ops that use the shape, the dtype and the device of their first argument, and none of its data.
_READS_NOTHING = {
    "full_like", "new_full", "new_ones", "new_zeros", "ones_like", "rand_like", "randint_like",
    "randn_like", "zeros_like",
}  # fmt: skip
# In-place ops that overwrite their first argument unread.
_OVERWRITES = {
    "_foreach_copy_", "bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_",
    "log_normal_", "normal_", "random_", "uniform_", "zero_",
}  # fmt: skip
# Composite ops for which CUDA has a kernel. On meta PyTorch would run 7 ops for 1, 17 passes for 3.
_CUDA_KERNELS = {"silu_backward"}
_GATHERS = {"embedding", "gather", "index", "index_select", "take"}
_SCATTERS = {"scatter_", "scatter_add_"}
_READS_TWICE = {"cross_entropy_"}
_ADDS_TO_SELF = {"addbmm", "addmm", "addmv", "addr", "baddbmm"}
# GEMMs, and the names of their factors [.., M, K] and [.., K, N].
_GEMMS = {
    "_grouped_mm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"),
    "bmm": ("self", "mat2"), "mm": ("self", "mat2"),
}  # fmt: skip
# The functions that autocast casts, as far as layers call them.
_AUTOCAST = {
    F.linear, torch.addmm, torch.baddbmm, torch.bmm, torch.matmul, torch.mm, Tensor.matmul,
    Tensor.__matmul__, Tensor.__rmatmul__,
}  # fmt: skip


class Traffic(NamedTuple):
    """Memory traffic of a call.

    Args:
        read: bytes read.
        written: bytes written.
        kernels: kernels launched.
        peak: the most bytes that storages took at one time, of those that the call allocated.
        flops: multiplications and additions of GEMMs.
    """

    read: int
    written: int
    kernels: int
    peak: int
    flops: int = 0

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def then(self, other: Traffic) -> Traffic:
        """Return the traffic of this call and another after it."""
        read, written, kernels = (a + b for a, b in zip(self[:3], other[:3], strict=True))
        return Traffic(read, written, kernels, max(self.peak, other.peak), self.flops + other.flops)


class Kernel(NamedTuple):
    """Entry of a log: the op that a kernel runs, the bytes that it reads and writes, its FLOPs."""

    op: str
    read: int
    written: int
    flops: int = 0

    def __str__(self) -> str:
        return f"{self.read / 1e6:10.3f} MB read {self.written / 1e6:10.3f} MB written  {self.op}"


def count(call: Callable[[], object], log: list[Kernel] | None = None) -> Traffic:
    """Count the memory traffic of `call`, whose tensors are on meta.

    Args:
        call: takes no argument. Its result stays alive until the count ends.
        log: a list to which every kernel is appended.

    >>> x = torch.empty(8, 16, device="meta")
    >>> log = []
    >>> count(lambda: (x + x).t().mul_(2.0), log)
    Traffic(read=1024, written=1024, kernels=2, peak=512, flops=0)
    >>> [kernel.op for kernel in log]
    ['aten.add.Tensor', 'aten.mul_.Tensor']
    """
    counter = _Counter(log)
    result = counter.run(call)
    traffic = counter.traffic()
    del result
    return traffic


def count_layer(
    forward: Callable[[], Tensor | tuple[Tensor, ...]],
    wanted: Sequence[Tensor],
    log: list[Kernel] | None = None,
) -> tuple[Traffic, Traffic]:
    """Count the memory traffic of a layer's forward and of its backward.

    The backward is ``torch.autograd.grad(y, wanted, dy)``. dy counts as an input, as if the next
    layer owned it. y and what the forward saved are alive when the backward starts and count for
    its peak until they are freed; y is held to the end.

    Args:
        forward: returns y, or several of them in a tuple.
        wanted: tensors whose gradients the backward computes, x and the trainable parameters.
        log: a list to which every kernel is appended, the forward's before the backward's.

    >>> x, w = (torch.empty(4, 4, device="meta", requires_grad=True) for _ in range(2))
    >>> forward, backward = count_layer(lambda: x @ w, [x, w])
    >>> forward
    Traffic(read=128, written=64, kernels=1, peak=64, flops=128)
    >>> backward.bytes, backward.peak  # two GEMMs; y, dx and dw
    (384, 192)
    """
    counter = _Counter(log)
    y = counter.run(forward)
    forward_traffic = counter.traffic()
    ys = (y,) if isinstance(y, Tensor) else y
    dys = [torch.empty_like(y) for y in ys]
    grads = counter.run(lambda: torch.autograd.grad(ys, wanted, dys))
    backward_traffic = counter.traffic()
    del grads
    return forward_traffic, backward_traffic


class _Counter(TorchDispatchMode):
    """Dispatch mode that adds up the traffic of the ops it sees."""

    def __init__(self, log: list[Kernel] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._log: list[Kernel] = [] if log is None else log
        self._start = len(self._log)
        self._peak = 0
        library.has_meta_out_dtype()  # asked once a process, by an op that must not count
        # Bytes of the storages allocated under the mode.
        self._allocated: dict[StorageWeakRef, int] = {}

    def run(self, call: Callable[[], Any]) -> Any:
        """Run `call`, counting from zero, but with what earlier runs allocated and is alive."""
        self._start, self._peak = len(self._log), 0
        self._poll()
        with self, _NativeDropout():
            return call()

    def traffic(self) -> Traffic:
        """Return the traffic of the latest run."""
        kernels = self._log[self._start :]
        read, written = sum(k.read for k in kernels), sum(k.written for k in kernels)
        flops = sum(k.flops for k in kernels)
        return Traffic(read, written, len(kernels), self._peak, flops)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "lora_kernels" and _name(func) in registry.IMPLEMENTATIONS:
            return self._run_implementation(func, args, kwargs)
        if str(func) == "bitsandbytes.gemm_4bit.default":
            given = _by_name(func, args, kwargs)
            if not _is_gemm_4bit_fused(given["A"], given["shapeB"], given["blocksize"]):
                with self:
                    return _dequantize_and_multiply(given)
        if func.namespace == "aten" and _name(func) not in _CUDA_KERNELS:
            with self:  # composite ops are their parts, where autograd has not split them yet
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        # Not into dy, which is the caller's.
        adds_gradients = (
            _is_gradient_sum(func, args, kwargs)
            and StorageWeakRef(args[0].untyped_storage()) in self._allocated
        )
        result = args[0] if adds_gradients else func(*args, **kwargs)
        self._note_allocations(result, (args, kwargs))
        self._poll()
        if adds_gradients:
            self._log.append(Kernel("autograd, add_", _bytes(args[:2]), _bytes(args[:1])))
        else:
            self._log.extend(_kernels(func, args, kwargs, result))
        return result

    def _run_implementation(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run the eager implementation of an op of this package, counting what it calls."""
        implementation = registry.IMPLEMENTATIONS[_name(func)]
        with (
            self,
            _NativeDropout(),
            _set_meta_autocast(None),  # which an op switches off, see ops.py
            selection.backend("eager"),
            torch.no_grad(),
        ):
            kwargs = {name: value for name, value in kwargs.items() if name != "choice"}
            return implementation(*args, **kwargs)

    def _note_allocations(self, result: Any, given: Any) -> None:
        existing = {StorageWeakRef(t.untyped_storage()) for t in _tensors(given)}
        for t in _tensors(result):
            storage = StorageWeakRef(t.untyped_storage())
            if storage not in existing and storage not in self._allocated:
                self._allocated[storage] = t.untyped_storage().nbytes()

    def _poll(self) -> None:
        # A reference keeps the StorageImpl, so that no other can take its address.
        self._allocated = {s: n for s, n in self._allocated.items() if not s.expired()}
        self._peak = max(self._peak, sum(self._allocated.values()))


def _name(func: Any) -> str:
    """Return the name of an op without its namespace and overload."""
    name: str = func.name().partition("::")[2].partition(".")[0]
    return name


def _kernels(func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> list[Kernel]:
    """Return the kernels that an op launches on a GPU."""
    name = _name(func)
    if name in _FREE or func.is_view or torch.Tag.inplace_view in func.tags:
        return []
    given = _by_name(func, args, kwargs)
    mutated = [a for a in func._schema.arguments if _is_written(a)]
    written = _tensors([[given[a.name] for a in mutated], result])
    if not _bytes(written):
        return []
    unwritten = [given[a.name] for a in func._schema.arguments if not _is_written(a)]
    read: list[Any] = [] if name in _READS_NOTHING else unwritten
    if name not in _OVERWRITES:  # a keyword is an `out`, which is not read
        read = [*(given[a.name] for a in mutated if not a.kwarg_only), *read]
    kernels = []
    if name.removesuffix("_") in _ADDS_TO_SELF:
        addend = given["self"]
        if given.get("beta") == 0:
            read = [t for t in read if t is not addend]
        elif addend.dim() > 1 and not _is_same(addend, written[0]):
            # CUDA copies it to the result, which the GEMM then updates.
            kernels.append(Kernel(f"{func} (copy)", _bytes([addend]), _bytes(written)))
            read = [written[0] if t is addend else t for t in read]
    read_bytes, written_bytes = _bytes(_tensors(read)), _bytes(written)
    if name in _READS_TWICE:
        read_bytes += _bytes(_tensors([given[a.name] for a in mutated]))
    if name in _SCATTERS:
        written_bytes = given["index"].numel() * given["self"].itemsize
        read_bytes += written_bytes - _bytes([given["self"]])
    if name in _GATHERS:
        table, *indices = _tensors(read)
        read_bytes = min(_bytes([table]), _bytes(written)) + _bytes(indices)
    if name == "_grouped_mm" and given["mat2"].dim() == 3:
        (rows, _), stack = given["self"].shape, given["mat2"]
        read_bytes -= _bytes([stack]) * max(0, stack.shape[0] - rows) // stack.shape[0]
    return [*kernels, Kernel(str(func), read_bytes, written_bytes, _flops(name, given))]


def _flops(name: str, given: dict[str, Any]) -> int:
    """Return the FLOPs of an op; 0 for what is no GEMM.

    A kernel of a peer has an argument of that name.
    """
    if isinstance(given.get("flops"), int):
        return cast(int, given["flops"])
    if (factors := _GEMMS.get(name.removesuffix("_"))) is None:
        return 0
    first, second = (given[factor] for factor in factors)
    return 2 * int(first.numel()) * int(second.shape[-1])


def _by_name(func: Any, args: tuple[Any, ...], kwargs: Any) -> dict[str, Any]:
    """Return the arguments of an op by their names in its schema, defaults left out as None."""
    return {
        a.name: args[i] if i < len(args) else kwargs.get(a.name)
        for i, a in enumerate(func._schema.arguments)
    }


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dictionaries, as ops take and return them."""
    if isinstance(tree, Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree
    return (
        [t for b in branches for t in _tensors(b)] if isinstance(tree, tuple | list | dict) else []
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct elements of distinct tensors.

    >>> x = torch.ones(4, 1)
    >>> _bytes([x.expand(4, 9), x, x.t()])
    16
    """
    return sum({_elements(t): _nbytes(t) for t in tensors}.values())


def _nbytes(t: Tensor) -> int:
    total = t.itemsize
    for size, stride in zip(t.shape, t.stride(), strict=True):
        total *= size if stride or not size else 1
    return total


def _elements(t: Tensor) -> tuple[object, ...]:
    """Return a key that is the same for tensors with the same elements in memory."""
    dims = zip(t.stride(), t.shape, strict=True)
    dims_of_elements = tuple(sorted(d for d in dims if d[0] and d[1] != 1))
    return StorageWeakRef(t.untyped_storage()), t.storage_offset(), t.dtype, dims_of_elements


def _is_same(a: Tensor, b: Tensor) -> bool:
    return _elements(a) == _elements(b) and a.shape == b.shape


def _is_gradient_sum(func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    """True if autograd's engine calls the op to add two gradients of one tensor."""
    if str(func) != "aten.add.Tensor" or kwargs or not isinstance(args[1], Tensor):
        return False
    if args[0].shape != args[1].shape or args[0].dtype is not args[1].dtype:
        return False
    # Between the engine and the mode lie only Dynamo's wrappers around __torch_dispatch__.
    frame = sys._getframe(1).f_back
    while frame is not None and frame.f_code.co_name in ("_fn", "inner"):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


class _NativeDropout(TorchFunctionMode):
    """Make `F.dropout` in training call the op that CUDA runs for it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            x, p, training, inplace = _dropout_arguments(*args, **kwargs)
            if training and not inplace and 0.0 < p < 1.0:
                return torch.native_dropout(x, p, True)[0]
        return func(*args, **kwargs)


def _dropout_arguments(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, float, bool, bool]:
    return input, p, training, inplace


# The dtype that autocast has on meta; None: it is off.
_autocast_dtype: ContextVar[torch.dtype | None] = ContextVar("_autocast_dtype", default=None)


@contextlib.contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """Emulate ``torch.autocast("cuda", dtype)`` for meta tensors, which PyTorch's leaves alone.

    GEMMs get their floating operands in `dtype`. Trainable leaves are cast once, as autocast's
    cache does. Code that asks whether autocast is on for CUDA, or this package for meta, is told
    so. Enter it for the forward alone.

    >>> x, w = torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta")
    >>> with autocast(torch.bfloat16):
    ...     F.linear(x, w).dtype
    torch.bfloat16
    """
    was_on, old_dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        with _set_meta_autocast(dtype), _CastOperands(dtype):
            yield
    finally:
        torch.set_autocast_enabled("cuda", was_on)
        torch.set_autocast_dtype("cuda", old_dtype)


@contextlib.contextmanager
def _set_meta_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Answer questions after autocast on meta, which PyTorch refuses: it is on in `dtype`, or off
    if that is None."""
    is_enabled, get_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    def is_enabled_on_meta(*device_type: str) -> bool:
        if device_type == ("meta",):
            return _autocast_dtype.get() is not None
        return is_enabled(*device_type)

    def get_dtype_on_meta(device_type: str) -> torch.dtype:
        on_meta = _autocast_dtype.get()
        return on_meta if device_type == "meta" and on_meta else get_dtype(device_type)

    token = _autocast_dtype.set(dtype)
    try:
        with (
            mock.patch.object(torch, "is_autocast_enabled", is_enabled_on_meta),
            mock.patch.object(torch, "get_autocast_dtype", get_dtype_on_meta),
            mock.patch.object(context, "WITHOUT_AUTOCAST", ()),
        ):
            yield
    finally:
        _autocast_dtype.reset(token)


class _CastOperands(TorchFunctionMode):
    """Cast the floating operands of GEMMs to autocast's dtype where autocast is on."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}  # id -> a trainable leaf and its copy

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _AUTOCAST and _autocast_dtype.get() is not None:
            args = tuple(self._cast(a) for a in args)
            kwargs = {name: self._cast(a) for name, a in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, a: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point() or a.dtype is self._dtype:
            return a
        if not (a.is_leaf and a.requires_grad and a.dtype is torch.float32):
            return a.to(self._dtype)
        if id(a) not in self._cache:
            self._cache[id(a)] = a, a.to(self._dtype)
        return self._cache[id(a)][1]


def _is_gemm_4bit_fused(x: Tensor, shape: Sequence[int], blocksize: int) -> bool:
    """True if bitsandbytes' `gemm_4bit` runs its fused kernel on an H100, as its CUDA op chooses.

    Else it dequantizes the weight and calls `F.linear`. The thresholds are bitsandbytes' own
    (backends/cuda/ops.py, `_gemm_4bit_use_custom_cuda`).

    Args:
        x: [..., K].
        shape: [N, K] of the weight.
        blocksize: of the weight.
    """
    import bitsandbytes.backends.cuda.ops as cuda

    N, K = shape
    M = x.numel() // K
    if cuda._gemm_4bit_custom_max_m < M or K % blocksize:
        return False
    with mock.patch.object(cuda, "_gpu_dispatch_props", lambda device_index: H100):
        uncached = cuda._gemm_4bit_use_custom_cuda.__wrapped__
        return bool(uncached(0, x.dtype, M, N, K))


def _dequantize_and_multiply(given: dict[str, Any]) -> Tensor:
    """Call the ops that `_dequant_linear_fallback` of bitsandbytes' backends/cuda/ops.py calls.

    Args:
        given: the arguments of `bitsandbytes::gemm_4bit` by name.
    """
    bnb: Any = torch.ops.bitsandbytes
    x, absmax = given["A"], given["absmax"]
    if given["absmax_8bit"] is not None:
        dequantized = bnb.dequantize_blockwise(
            given["absmax_8bit"], absmax, given["absmax_code"], 256, torch.float32
        )
        absmax = dequantized + given["absmax_offset"]
    weight = bnb.dequantize_4bit(
        given["B"], absmax, given["blocksize"], given["quant_type"], given["shapeB"], x.dtype
    )
    return F.linear(x, weight, given["bias"])
