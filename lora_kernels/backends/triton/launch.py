"""Launch kernels, with the compiler's options; arguments that several kernels have."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core import device
from ...core.device import DeviceInfo
from .. import launches
from ..launches import STREAM, Plan
from . import configs, is_interpreted
from .configs import Tiles

if TYPE_CHECKING:
    from ...core.codes import Codes

_TABLES = ("packed", "absmax", "code", "nested_absmax", "nested_code", "offset")


def target(device: torch.device) -> DeviceInfo:
    """Return the properties of a device that has kernels."""
    found = configs.target(device.type, device.index)
    assert found is not None
    return found


def matrix_arguments(name: str, t: Tensor | None, dims: str) -> dict[str, Any]:
    """Return a kernel's arguments for a matrix: the pointer and the strides, None without it.

    >>> matrix_arguments("x", torch.ones(2, 3), "mk")
    {'x_ptr': tensor([[1., 1., 1.],
            [1., 1., 1.]]), 'stride_xm': 3, 'stride_xk': 1}
    """
    strides = (None, None) if t is None else t.stride()
    named = {f"stride_{name[0]}{dim}": s for dim, s in zip(dims, strides, strict=True)}
    return {f"{name}_ptr": t, **named}


def codes_arguments(codes: Codes | None, row: int, target: DeviceInfo) -> dict[str, Any]:
    """Return a kernel's arguments for codes: pointers, and the format; see `load_codes`.

    row: elements of a row of the weight.
    """
    pointers = {f"{name}_ptr": getattr(codes, name, None) for name in _TABLES}
    log2_block, whole, words, asm = 0, False, False, False
    if codes is not None:
        log2_block, whole = codes.blocksize.bit_length() - 1, row % codes.blocksize == 0
        words = row % 8 == 0 and codes.packed.data_ptr() % 4 == 0
        asm = target.kind == "cuda" and not is_interpreted()
    return {**pointers, "LOG2_BLOCK": log2_block, "WHOLE": whole, "WORDS": words, "ASM": asm}


def dtype_arguments(
    target: DeviceInfo, wider: torch.dtype, wide: bool, compute: torch.dtype | None = None
) -> dict[str, Any]:
    """Return a kernel's compile-time constants of dtypes and addresses.

    Args:
        wider: of the operands of the adapter's GEMMs.
        wide: whether offsets exceed 2³¹.
        compute: of the base GEMM's operands, if there is one.
    """
    found = {"WIDER": _dtype(wider), "PRECISION": configs.precision(target), "WIDE": wide}
    return found if compute is None else found | {"COMPUTE": _dtype(compute)}


def _dtype(dtype: torch.dtype) -> Any:
    """Return Triton's dtype."""
    import triton.language as tl  # first imported by the kernels, after TRITON_INTERPRET is set

    return getattr(tl, str(dtype).removeprefix("torch."))


def promote_dtypes(x: Tensor, a: Tensor) -> torch.dtype:
    """Return the dtype in which x and the adapter are multiplied."""
    return torch.promote_types(x.dtype, a.dtype)


def options(config: Tiles) -> dict[str, Any]:
    """Return the compiler's options. No FMA contraction: a nested scale is rounded twice."""
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False}


def run(
    kernel: Any,
    config: Tiles,
    plan: Plan | None = None,
    /,
    *,
    grid: tuple[int, ...],
    device: torch.device,
    **arguments: Any,
) -> None:
    """Launch the kernel on the device and torch's current stream, in each call of a plan if given.

    arguments: by the names of the kernel's parameters. None stands for a missing operand.
    """
    if _compiles_only is not None:
        _compiles_only(kernel, config, arguments)
    elif plan is None:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](**arguments, **options(config))
    elif is_interpreted():
        names = (*arguments, *options(config))
        values = (*arguments.values(), *options(config).values())
        plan.call(lambda *args: kernel[grid](**dict(zip(names, args, strict=True))), *values)
    else:
        compiled = kernel.warmup(grid=grid, **arguments, **options(config))
        blocks, bound = (*grid, 1, 1)[:3], (arguments[name] for name in kernel.arg_names)
        if is_known_launcher() and not has_hooks():
            run, image = compiled.run, (compiled.function, compiled.packed_metadata)
            plan.add(run, *blocks, STREAM, *image, None, None, None, *bound)
        else:
            launcher = compiled[blocks]
            plan.add(lambda stream, *args: launcher(*args, stream=stream), STREAM, *bound)


@functools.cache
def is_known_launcher() -> bool:
    """Return True if a compiled kernel's launcher takes what `run` gives it.

    `CompiledKernel.__getitem__` gives it the same in every Triton, and takes 2 µs more a launch.
    """
    version = device.version("triton")  # None of a build under another name
    return version is not None and tuple(map(int, version.split(".")[:2])) <= (3, 9)


def has_hooks() -> bool:
    """Return True while a profiler's hook is called at each launch."""
    import triton

    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def is_kept() -> bool:
    """Return True if a plan that is made now holds for later calls."""
    return _compiles_only is None and not has_hooks()


planned = functools.partial(launches.planned, is_kept=is_kept)


_compiles_only: Callable[..., None] | None = None


@contextlib.contextmanager
def compile_only(part: int, parts: int) -> Iterator[None]:
    """Compile every `parts`-th kernel inside the context, from the `part`-th on; launch none.

    Triton keeps what it compiles in its cache, in which other processes find it.
    """
    global _compiles_only
    seen: set[tuple[Any, ...]] = set()

    def compile_kernel(kernel: Any, config: Tiles, arguments: dict[str, Any]) -> None:
        key = (kernel, config, *map(_kind, arguments.values()))
        if key not in seen and len(seen) % parts == part:
            kernel.warmup(grid=(1,), **arguments, **options(config))
        seen.add(key)

    _compiles_only = compile_kernel
    try:
        yield
    finally:
        _compiles_only = None


def _kind(argument: Any) -> Any:
    """Return the properties of an argument on which the compiled kernel depends, or its value."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return float if type(argument) is float else argument


def is_wide(t: Tensor) -> bool:
    """Return True if an element's offset from the first is 2³¹ elements or more."""
    return sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) >= 1 << 31
