"""Drivers that launch nothing: the GPU backends run on CPU tensors down to the last launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_kernels.backends import cuda, launches, workspace
from tests.support.gpus import H100

STREAM = 7
_current: list[Log] = []  # kernels outlive the driver that they were compiled for
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
def cpu_as_gpu() -> Iterator[pytest.MonkeyPatch]:
    """Plan calls on CPU tensors, whose device has the index -1, as a GPU's."""
    flags = torch.zeros(2, dtype=torch.int32)
    launches.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "is_on_gpu", lambda t: True)
        patch.setattr(launches, "is_current_device", lambda index: index == -1)
        patch.setattr(launches, "current_stream", lambda index: {-1: STREAM}[index])
        patch.setattr(workspace, "flags", lambda device: flags)
        yield patch
    launches.forget()


@contextmanager
def fake_triton() -> Iterator[Log]:
    """Compile Triton kernels for an H100, and launch none."""
    from triton import JITFunction
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from lora_kernels.backends.triton import configs

    _current[:] = [log := Log()]

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            self.name = metadata.name

        def __call__(self, *args: Any) -> None:
            _current[0].launches.append((self.name, args[:3], args[3], args[9:]))
            _current[0].hooks.append(args[7:9])

    fake = SimpleNamespace(
        launcher_cls=Launcher,
        utils=SimpleNamespace(
            load_binary=lambda *args: (1, 2, 64, 0, 1024),  # module, function, registers, spills
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": H100.shared_memory},
        ),
        get_current_device=lambda: -1,
        get_current_stream=lambda device: STREAM,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    run = JITFunction.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        log.bound += 1
        return run(*args, **kwargs)

    with cpu_as_gpu() as patch:
        patch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", fake)
        patch.setattr(configs, "target", lambda *device: H100)
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
    with cpu_as_gpu() as patch:
        for user in (cuda, equation, launch):
            patch.setattr(user, "module", lambda: module)
        yield log
