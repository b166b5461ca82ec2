"""CUDA kernels for GPUs and, compiled for the host, for an emulator on the CPU (for tests).

The strategies of the forward:

- "cooperative": one launch, for up to 16 rows. The first blocks compute partial sums of P = x·Aᵀ.
  All blocks read equal stripes of W; 4-bit codes are decoded on the way to the tensor cores. The
  epilogue adds S·Bᵀ.
- "two_pass": a kernel computes P. A GEMM on tensor cores then starts its sums at S·Bᵀ.

Both take bfloat16 and float16. The backward has two passes, whatever the forward's strategy: one
read of dY gives dS and dB; then dx is computed as y of "two_pass" is, and dA last. `constraints`
gives the reason if a strategy or the backward does not support a call.

Rounding points are documented at the kernels. P, dS and the sums of gradients are float32. Results
are deterministic on a GPU: atomics count blocks, never sum data, and partial sums are added in
order. Those of "cooperative" depend on how many blocks the GPU holds.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from ...core import device
from ...core.problem import Strategy
from ...version import __version__
from .. import import_extension, lazy_launchers

COOPERATIVE = Strategy.COOPERATIVE
TWO_PASS = Strategy.TWO_PASS
STRATEGIES = (COOPERATIVE, TWO_PASS)
DECODE_ROWS = 16  # the largest M of "cooperative"
MIN_CAPABILITY = 80  # cp.async, bfloat16 on tensor cores

emulated: ContextVar[ModuleType | None] = ContextVar("lora_kernels_cuda_emulated", default=None)


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    what, was, has = "the CUDA kernels", "were", "have"
    if name == "_emulator":
        what, was, has = "the emulator", "was", "has"
    try:
        module = import_extension(name)
    except ImportError as error:
        detail = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
        return None, f"{what} {was} not built{detail}"
    if module.__version__ != __version__:
        return None, f"{what} {has} version {module.__version__}, not {__version__}"
    return module, None


def module() -> ModuleType:
    """Return the compiled launchers: the GPU's, or inside `emulate` the emulator's."""
    found = emulated.get() or _load("_cuda")[0]
    assert found is not None
    return found


def is_emulated() -> bool:
    """Return True inside `emulate`."""
    return emulated.get() is not None


def unavailable_reason() -> str | None:
    """Return why there are no kernels; None if there are."""
    return None if is_emulated() else _load("_cuda")[1]


@contextlib.contextmanager
def emulate(seed: int = 0, multiprocessors: int = 4) -> Iterator[ModuleType]:
    """Run the backend's kernels on CPU tensors inside the context; each thread is a fiber.

    Args:
        seed: of the order in which threads are scheduled.
        multiprocessors: the number of blocks that run at once.

    Raises RuntimeError if the emulator was not built. A kernel raises RuntimeError for an invalid
    memory access or barrier.
    """
    found, reason = _load("_emulator")
    if found is None:
        raise RuntimeError(f"{reason}: LORA_KERNELS_EMULATOR=1 python setup.py build_ext --inplace")
    found.seed_scheduler(seed, multiprocessors)
    token = emulated.set(found)
    try:
        yield found
    finally:
        emulated.reset(token)


def unsupported_device_reason(device_type: str, device_index: int | None) -> str | None:
    """Return why kernels cannot run on the device; None if they can."""
    if (why := unavailable_reason()) is not None:
        return why
    if is_emulated():
        return None if device_type == "cpu" else f"the emulator takes no {device_type} tensors"
    if device_type != "cuda":
        return f"no CUDA kernels for device type {device_type!r}"
    if torch.version.hip:
        return "the CUDA kernels do not run on AMD's GPUs"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    index = torch.cuda.current_device() if device_index is None else device_index
    return unsupported_capability_reason(_capability(index)) or _driver_reason(index)


@functools.cache
def _capability(device_index: int) -> int:
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


@functools.cache
def _driver_reason(device_index: int) -> str | None:
    """Return why the driver cannot run this build's kernels on the GPU; None if it can."""
    try:
        module().probe(device_index)
    except RuntimeError as error:
        said = f"GPU {device_index} cannot run this build's CUDA kernels: {error}"
        if "insufficient" in str(error):
            version = device.driver_version()
            said += f"; the driver is {version}, want a newer one or kernels built with older CUDA"
        return said
    return None


def unsupported_capability_reason(capability: int) -> str | None:
    """Return why a compute capability (sm_80: 80) is unsupported; None if it is supported."""
    if capability < MIN_CAPABILITY:
        return (
            f"sm_{capability} is older than sm_{MIN_CAPABILITY}: no bfloat16 on its tensor cores "
            "and no asynchronous copies"
        )
    return None


if TYPE_CHECKING:
    from .linear import lora_linear as lora_linear
    from .linear import lora_linear_backward as lora_linear_backward

__getattr__ = lazy_launchers(__name__)
