"""Compile the Triton kernels of claims for a GPU, before a worker launches them.

    python -m lora_kernels.qualification.compiling

The calls run on CPU tensors with a driver that launches nothing, so a process needs no CUDA
context. Triton keeps what it compiles in its cache, where the worker finds it. Reads its order from
stdin, JSON with "gpu", "claims" and "part".
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

from ..backends import library, triton
from ..backends.triton import configs, launch
from ..choice.verdicts import Group
from ..core import device
from ..core.device import DeviceInfo
from .card import Card
from .claims import launch_all
from .plan import Claim

LIMIT = 300.0  # seconds; what is not compiled by then, the worker compiles
PACKAGE = Path(__file__).parents[2]


def compile_ahead(claims: Sequence[Claim], gpu: DeviceInfo) -> None:
    """Compile what the claims launch, in as many processes as this one's cgroup has processors."""
    mine = [claim for claim in claims if claim.group.backend == "triton"]
    if gpu.kind != "cuda" or triton.unavailable_reason() is not None or triton.is_interpreted():
        return
    count = min(device.processors(), len(mine))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    workers: list[Any] = []
    end = time.monotonic() + LIMIT
    try:
        for number in range(count):
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", __name__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=environment,
                    cwd=PACKAGE,
                )
            )
            order = {"gpu": asdict(gpu), "claims": mine, "part": [number, count]}
            with contextlib.suppress(BrokenPipeError), workers[-1].stdin as stdin:
                stdin.write(json.dumps(order))
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(max(0.0, end - time.monotonic()))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def count(claims: Sequence[Claim], gpu: DeviceInfo) -> int:
    """Return how many Triton kernels the claims compile for a GPU; needs none."""
    mine = [claim for claim in claims if claim.group.backend == "triton"]
    if triton.unavailable_reason() is not None or triton.is_interpreted():
        return 0
    from triton import knobs

    found: set[tuple[str, str]] = set()

    def note(*, key: Any, fn: Any, **_: Any) -> bool:
        found.add((fn.name, str(key)))
        return True  # not compiled

    with mock.patch.object(knobs.runtime, "jit_cache_hook", note):
        errors = compile_part(mine, gpu, 0, 1)
    if errors:
        raise errors[0]
    return len(found)


def compile_part(
    claims: Sequence[Claim], gpu: DeviceInfo, part: int, parts: int
) -> list[Exception]:
    """Compile every `parts`-th kernel that the claims launch, from the `part`-th on.

    Returns the errors of claims that were left at a kernel that does not compile.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Driver:  # what compiling asks of one
        get_current_device = staticmethod(lambda: gpu.capability)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", gpu.capability, 32))

    active = "_active" if hasattr(driver, "_active") else "active"  # the latter in Triton 3.4
    card, errors = _Absent(), list[Exception]()
    with (
        mock.patch.object(configs, "target", lambda *args: gpu),
        mock.patch.object(driver, active, Driver()),
        launch.compile_only(part, parts),
    ):
        for claim in claims:
            try:
                launch_all(card, small(claim))
            except Exception as error:  # of the compiler; the claim's check will meet it
                errors.append(error)
    return errors


def small(claim: Claim) -> Claim:
    """Return the claim with weights of a size that compiles the same kernels."""
    if claim.group.weight == "skinny":  # one split of the rows, and several
        ranks = dict.fromkeys(rank for *_, rank in claim.sizes)
        return claim._replace(sizes=tuple((M, 1024, R) for R in ranks for M in (128, 1024)))
    return claim._replace(sizes=tuple(dict.fromkeys((M, 1024, 1024) for M, _, _ in claim.sizes)))


class _Absent(Card):
    """A card whose tensors are on the CPU, where nothing is launched. Sizes that decide no tile are
    small."""

    device = "cpu"
    many = (304, 4096, 576)
    cold_bytes = 1

    def __init__(self) -> None:
        pass

    @contextlib.contextmanager
    def engine(self, group: Group) -> Iterator[None]:
        with library.as_on_gpu(), super().engine(group):
            yield


def main() -> None:
    order = json.load(sys.stdin)
    claims = [Claim(Group(*group), *rest) for group, *rest in order["claims"]]
    compile_part(claims, DeviceInfo(**order["gpu"]), *order["part"])


if __name__ == "__main__":
    main()
