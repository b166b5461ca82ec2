"""Triton kernels that are compared with PyTorch's ops before a device uses them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..core.problem import KERNEL_DTYPES
from . import triton, workspace

UNCHECKED = "Triton's kernels are unchecked: the first call outside of a graph does it"
# Device type and index -> why the kernels are not used there; None after they passed.
Reasons = dict[tuple[str, int | None], str | None]


def kernel_reason(
    reasons: Reasons,
    compare: Callable[[torch.device], str | None],
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """Return why PyTorch's ops run in place of the kernels on this device; None if they do not.

    The first question about a device runs `compare`, unless a graph is captured or traced at that
    time.

    Args:
        reasons: what is known, to which the answer is added.
        compare: compares the kernels with PyTorch's ops; returns None, or what differs.
        dtype: of the tensors.
    """
    if dtype not in KERNEL_DTYPES:
        return f"Triton's kernels do not take {dtype}"
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = (device.type, device.index)
    if key in reasons:
        return reasons[key]
    reason = _unavailable_reason(device)
    if reason is None and device.type != "meta":  # meta tensors have no values to compare
        if workspace.is_capturing(device) or _get_current_dispatch_mode() is not None:
            return UNCHECKED
        # Another thread has none of the caller's autocast, modes, transforms and forced backend.
        with ThreadPoolExecutor(1) as thread:
            reason = thread.submit(_compare, compare, device).result()
    reasons[key] = reason
    return reason


@torch.no_grad()
def _compare(compare: Callable[[torch.device], str | None], device: torch.device) -> str | None:
    try:
        return compare(device)
    except Exception as error:  # whatever the compiler or the driver raises
        return f"Triton's kernels raised {type(error).__name__}: {error}"


def _unavailable_reason(device: torch.device) -> str | None:
    if device.type == "meta":  # stands for a GPU
        return triton.unavailable_reason()
    configs = importlib.import_module(".configs", triton.__name__)
    target = configs.target(device.type, device.index)
    reason: str | None = configs.unsupported_reason(target, device.type)
    return reason


def is_dispatched(t: Tensor) -> bool:
    """Return True if a mode counts or fakes what runs, or there are no values to run on."""
    return t.is_meta or _get_current_dispatch_mode() is not None
