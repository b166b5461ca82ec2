"""Launch kernels, with the compiler's options and the co-resident programs of a launch."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...device import DeviceInfo
from .. import replay
from ..replay import STREAM, current_recorder, forget, tensors_of
from . import configs, is_interpreted
from .arguments import Format, Types
from .configs import GemmTiles, Tiles

if TYPE_CHECKING:
    from ...core.packed4bit import Packed4bit

_NAME = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def target(x: Tensor) -> DeviceInfo:
    """Return the properties of the device that x is on."""
    found = configs.target(x.device.type, x.device.index)
    assert found is not None
    return found


def format_4bit(codes: Packed4bit | None, row: int, target: DeviceInfo) -> Format:
    """Return the layout of the codes of a weight with `row` elements per row."""
    if codes is None:
        return Format(0, False, False, False)
    whole_words = row % 8 == 0 and codes.packed.data_ptr() % 4 == 0
    asm = target.kind == "cuda" and not is_interpreted()
    return Format(codes.blocksize.bit_length() - 1, row % codes.blocksize == 0, whole_words, asm)


def build_types(
    target: DeviceInfo, wider: torch.dtype, wide: bool, compute: torch.dtype = torch.float32
) -> Types:
    """Return how a kernel rounds and addresses its operands."""
    return Types(_NAME[compute], _NAME[wider], configs.precision(target), wide)


def promote_dtypes(x: Tensor, a: Tensor) -> torch.dtype:
    """Return the dtype in which x and the adapter are multiplied."""
    return torch.promote_types(x.dtype, a.dtype)


def options(config: Tiles) -> dict[str, Any]:
    """Return the compiler's options. No FMA contraction: a nested scale is rounded twice."""
    chosen = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False}
    return chosen | ({"launch_cooperative_grid": True} if config.cooperative else {})


def run(
    kernel: Any,
    config: Tiles,
    *args: Any,
    grid: tuple[int, ...],
    device: torch.device,
    **meta: Any,
) -> None:
    """Launch the kernel on the device and torch's current stream."""
    if _compiles_only is not None:
        _compiles_only(kernel, config, args, meta)
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        compiled = kernel[grid](*args, **meta, **options(config))
    if (recorder := current_recorder()) is not None:
        if (reason := unreplayable_reason()) is not None:
            recorder.reason = reason
            return
        blocks, image = (*grid, 1, 1)[:3], (compiled.function, compiled.packed_metadata)
        constants = (meta[name] for name in kernel.arg_names[len(args) :])
        launched = *blocks, STREAM, *image, None, None, None, *args, *constants
        recorder.add(compiled.run, launched, tensors_of(args))


@functools.cache
def unreplayable_reason() -> str | None:
    """Return why compiled kernels cannot be launched without `JITFunction.run`, or None.

    Its last lines are the only description of how Triton launches a compiled kernel.
    """
    if is_interpreted():
        return "Triton's interpreter compiles nothing"
    import triton  # first imported by the kernels, after TRITON_INTERPRET is set

    source = " ".join(inspect.getsource(triton.JITFunction.run).split())
    if _LAUNCH in source:
        return None
    return f"Triton {triton.__version__} launches compiled kernels in a way not known here"


_LAUNCH = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, "
    "launch_metadata, knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, "
    "*bound_args.values())"
)


def has_hooks() -> bool:
    """Return True while a profiler's hook gets the tensors of each launch."""
    import triton

    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


replayed = functools.partial(replay.replayed, has_hooks=has_hooks)


_compiles_only: Callable[..., None] | None = None


@contextlib.contextmanager
def compile_only(part: int, parts: int) -> Iterator[None]:
    """Compile every `parts`-th kernel inside the context, from the `part`-th on; launch none.

    Triton keeps what it compiles in its cache, in which other processes find it.
    """
    global _compiles_only
    seen: set[tuple[Any, ...]] = set()

    def compile_kernel(kernel: Any, config: Tiles, args: Any, meta: dict[str, Any]) -> None:
        key = (kernel, config, *map(_kind, args), *meta.values())
        if key not in seen and len(seen) % parts == part:
            kernel.warmup(*args, grid=(1,), **meta, **options(config))
        seen.add(key)

    _compiles_only = compile_kernel
    forget()
    try:
        yield
    finally:
        _compiles_only = None
        forget()


def choose_stages(
    programs: int,
    target: DeviceInfo,
    kernel: Any,
    config: GemmTiles,
    device: torch.device,
    *args: Any,
    **meta: Any,
) -> GemmTiles | None:
    """Return the config with the most stages at which all programs are co-resident, or None.

    Compiles the kernel to read its shared memory and registers.
    """
    if is_interpreted():  # runs programs in order; assume two co-resident per multiprocessor
        return config if programs <= 2 * target.multiprocessors else None
    if target.kind != "cuda":
        return config if programs <= target.multiprocessors else None
    kinds = [_kind(a) for a in args]
    for stages in range(config.stages, 0, -1):
        fewer = replace(config, stages=stages)
        key = (kernel, fewer, device, *kinds, *meta.values())
        if key not in _resources:
            _resources[key] = read_resources(kernel, fewer, device, *args, **meta)
        if programs <= configs.count_co_resident(target, *_resources[key], config.warps):
            return fewer
    return None


def _kind(argument: Any) -> Any:
    """Return the properties of an argument on which the compiled kernel depends, or its value."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    return float if type(argument) is float else argument


_resources: dict[tuple[Any, ...], tuple[int, int]] = {}


def read_resources(
    kernel: Any, config: GemmTiles, device: torch.device, *args: Any, **meta: Any
) -> tuple[int, int]:
    """Compile the kernel; return the shared memory of a program and the registers of a thread."""
    with torch.cuda.device(device):
        compiled = kernel.warmup(*args, grid=(1,), **meta, **options(config))
        compiled._init_handles()  # loads it and counts its registers, as Triton's tutorials do
    return compiled.metadata.shared, compiled.n_regs


def is_wide(t: Tensor) -> bool:
    """Return True if an element's offset from the first is 2³¹ elements or more."""
    return sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) >= 1 << 31
