"""Drivers that launch nothing: the GPU backends run on CPU tensors down to the last launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from lora_kernels.backends import cuda, launches
from lora_kernels.bench import stub_drivers

STREAM = stub_drivers.STREAM
CUDA_LAUNCHERS = ("gemm", "decode", "thin", "pair", "column_sums", "reduce")


@dataclass
class Log:
    """The launches: name, grid (None for CUDA kernels), stream, arguments.

    bound: how often Triton bound the arguments of a call to a kernel's parameters.
    hooks: the hooks of each launch of a Triton kernel, at its start and its end.
    """

    launches: list[tuple[str, Any, int, Any]] = field(default_factory=list)
    bound: int = 0
    hooks: list[tuple[Any, Any]] = field(default_factory=list)


@contextmanager
def fake_triton() -> Iterator[Log]:
    """Compile Triton kernels for an H100, and launch none."""
    from triton import JITFunction

    log, run = Log(), JITFunction.run

    def take(name: str, args: tuple[Any, ...]) -> None:
        log.launches.append((name, args[:3], args[3], args[9:]))
        log.hooks.append(args[7:9])

    def counted(*args: Any, **kwargs: Any) -> Any:
        log.bound += 1
        return run(*args, **kwargs)

    with stub_drivers.stub_triton(take), pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", counted)
        yield log


@contextmanager
def fake_cuda() -> Iterator[Log]:
    """Launch no CUDA kernels."""
    from lora_kernels.backends.cuda import launch
    from lora_kernels.backends.cuda import linear as equation

    log = Log()
    sizes = {"PAIR_ROWS": 64, "PAIR_MAX_RANK": 64, "decode_plan": lambda args: (True, 1)}
    module = SimpleNamespace(**sizes)

    def launcher(name: str) -> Any:
        def launch(args: Any, at: tuple[int, int]) -> None:
            assert at[0] == launches.current_stream(at[1]), f"launched on device {at[1]}"
            log.launches.append((name, None, at[0], args))

        return launch

    for name in CUDA_LAUNCHERS:
        setattr(module, name, launcher(name))
    with stub_drivers.stub_launches(), pytest.MonkeyPatch.context() as patch:
        for user in (cuda, equation, launch):
            patch.setattr(user, "module", lambda: module)
        yield log
