"""The entries of profilers (Proton, Nsight): a kernel's variant in its name, FLOPs and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

_BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R")


def profiled(name: str, *gemms: str) -> dict[str, Any]:
    """Return the arguments of `triton.jit` that name a kernel's variants and count its launches.

    FLOPs are those of the equation. Bytes are those of all operands, each read or written once.

    Args:
        name: of the kernel.
        gemms: the dimensions of each GEMM; "MNK", 2·M·N·K FLOPs, is the base GEMM.
    """

    def name_variant(specialization: Any) -> str:
        constants = specialization.constants  # None for operands that are missing
        words = [name]
        if "codes" in specialization.signature:
            words.append(_base(constants))
        if "TYPES" in constants:
            words.append(_dtype(constants["TYPES"], gemms))
        words.append("x".join(str(constants[b]) for b in _BLOCKS if b in constants))
        return "_".join(filter(None, words))

    def count(grid: Any, kernel: Any, args: Mapping[str, Any]) -> dict[str, int]:
        found = {"bytes": sum(t.numel() * t.element_size() for t in _tensors(tuple(args.values())))}
        if gemms:
            counted = [g for g in gemms if g != "MNK" or _base(args) != "update"]
            bits = 32 if _dtype(args["TYPES"], gemms) == "float32" else 16
            found[f"flops{bits}"] = 2 * sum(math.prod(args[n] for n in g) for g in counted)
        return found

    return {"repr": name_variant, "launch_metadata": count}


def _base(args: Mapping[str, Any]) -> str:
    if args.get("codes", "given") is not None:
        return "4bit"
    return "update" if args.get("w", "given") is None else "dense"


def _dtype(types: Any, gemms: tuple[str, ...]) -> str:
    compute, wider = types[:2]
    return str(compute if "MNK" in gemms else wider)


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from _tensors(arg)
