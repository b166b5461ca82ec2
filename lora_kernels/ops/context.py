"""The state around a call: device, autocast, and compilers, modes and transforms that see an op."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _dispatch_tls_local_include_set
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.jit import is_tracing  # type: ignore[attr-defined]

from . import flops

NOTHING = contextlib.nullcontext()
WITHOUT_AUTOCAST = ("meta",)  # torch.is_autocast_enabled raises for it
TENSOR_TYPES = (Tensor, torch.nn.Parameter)


def device_of(t: Tensor) -> tuple[str, int | None]:
    """Return the device's type, and a GPU's index.

    After a large GEMM has evicted the cache, reading `t.device.type` costs as much as a small
    kernel.
    """
    if t.is_cpu:
        return "cpu", None
    return t.device.type, t.device.index


def autocast_dtype(device_type: str, x_dtype: torch.dtype) -> torch.dtype | None:
    """Return autocast's dtype, or None if it is off for the device or leaves x as it is."""
    if x_dtype is torch.float64 or device_type in WITHOUT_AUTOCAST:
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def no_autocast(t: Tensor) -> contextlib.AbstractContextManager[None]:
    """Disable autocast inside an op, whose dtypes are given by its arguments."""
    device_type, _ = device_of(t)
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return NOTHING
    return torch.autocast(device_type, enabled=False)


def _default_keys() -> list[Any]:
    """Return the dispatch keys that a thread includes by default, and in inference mode."""
    keys: list[Any] = []

    def read() -> None:  # runs in a new thread, because a mode may be active in this one
        for mode in (False, True):
            with torch.inference_mode(mode):
                keys.append(_dispatch_tls_local_include_set())

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    return keys


KEYS, INFERENCE_KEYS = _default_keys()


def is_intercepted() -> bool:
    """Return True if tracing, a compiler, a dispatch mode or a transform may observe an op.

    All but a compiler and forward-mode AD include dispatch keys in the thread's set.
    """
    if is_compiling() or forward_ad._current_level >= 0:
        return True
    return _dispatch_tls_local_include_set() not in (KEYS, INFERENCE_KEYS)


def unsupported_context() -> str | None:
    """Return the active context that the autograd Functions do not support, in words, or None."""
    if is_compiling():
        return None
    if peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    return "forward-mode AD is active" if forward_ad._current_level >= 0 else None


def unfused_context() -> str | None:
    """Return the context in which a library's layer runs its own forward, in words, or None."""
    if not is_compiling() and is_tracing():
        return "torch.jit.trace records the call"
    return unsupported_context()


def refuse_context() -> None:
    """Raise RuntimeError in a context that the autograd Functions do not support."""
    if (reason := unsupported_context()) is not None:
        raise RuntimeError(
            f"lora_kernels: {reason}, and its layers and functions are differentiable in reverse "
            "mode alone. Take the plain PyTorch expression "
            "F.linear(x, weight, bias) + scaling * (x @ lora_A.T) @ lora_B.T; layers that "
            "lora_kernels.peft has fused run PEFT's forward there"
        )


def can_bypass_dispatcher(*tensors: Tensor | None) -> bool:
    """Return True if calling the implementation is indistinguishable from dispatching the op.

    This holds if nothing intercepts ops and each tensor is a plain one: no subclass, and what is in
    its memory are its values. PyTorch negates a tensor lazily (`Tensor.is_neg`), and the dispatcher
    resolves that. The tensors must be on one device. Dispatching a Python op takes 8 µs with a
    warm cache, and 100 µs right after a large GEMM has evicted it.
    """
    if is_intercepted():
        if not is_compiling():
            flops.register_if_counted()
        return False
    try:  # raises for a tensor that `is_grads_batched=True` batched
        for t in tensors:
            if t is None:
                continue
            if type(t) not in TENSOR_TYPES or t.is_neg():
                return False
            if t.data_ptr() == 0 and t.numel():  # a meta tensor, lazy zeros, or freed memory
                return False
    except RuntimeError:
        return False
    return True


def check_memory(names: Sequence[str], arguments: Sequence[Any]) -> None:
    """Raise RuntimeError for an operand whose memory was freed, because kernels read addresses.

    arguments: tensors, lists of tensors, and others, which are skipped.
    """
    for name, value in zip(names, arguments, strict=False):
        values = value if isinstance(value, (list, tuple)) else (value,)
        for i, t in enumerate(values):
            if isinstance(t, Tensor) and not t.is_meta and t.numel() and t.data_ptr() == 0:
                place = f"{name}[{i}]" if len(values) > 1 else name
                raise RuntimeError(
                    f"{place}: got a tensor {list(t.shape)} whose "
                    "memory was freed (untyped_storage().resize_(0)), want one with its values"
                )


def is_batched(t: Tensor) -> bool:
    """Return True for one of several gradients that `is_grads_batched=True` computes at once.

    PyTorch slices it for an op that it calls, and for no op that writes to its arguments.
    """
    return is_legacy_batchedtensor(t)


def refuse_tangent(dy: Tensor) -> None:
    """Raise NotImplementedError if dy carries a tangent, which the op would drop."""
    if is_compiling() or forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(dy).tangent is not None:
        raise NotImplementedError(
            "lora_kernels: got a gradient with a forward-mode tangent, want one without: its "
            "layers and functions are differentiable once, in reverse mode"
        )
