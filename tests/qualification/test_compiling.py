"""Kernels are compiled ahead of a qualification: all of them, without a GPU, and found again."""

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lora_kernels.backends import triton
from lora_kernels.choice.verdicts import Group
from lora_kernels.core import device
from lora_kernels.qualification import Claim, compiling, list_claims, list_orders, timing
from lora_kernels.quantization import QuantizedWeight
from tests.support.gpus import H100

if triton.unavailable_reason() or triton.is_interpreted():
    pytest.skip("nothing is compiled", allow_module_level=True)

FUSED = Group("triton", "fused", "bfloat16", "bfloat16", "dense")
compile_ahead = compiling.compile_ahead  # the fixture `card` replaces it


def keys(claims: list[Claim]) -> set[str]:
    """The kernels that the claims compile, by Triton's keys."""
    from triton import knobs

    found: set[str] = set()

    def note(*, key: Any, fn: Any, **_: Any) -> bool:
        found.add(f"{fn.name} {key}")
        return True

    with mock.patch.object(knobs.runtime, "jit_cache_hook", note):
        assert compiling.compile_part(claims, H100, 0, 1) == []
    return found


@pytest.mark.parametrize("weight", ["dense", "4bit"])
def test_small_weights_compile_the_kernels_of_the_timed_ones(
    weight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cold_weights(card: Any, dtype: torch.dtype, kind: str, N: int, K: int) -> list[Any]:
        if kind == "dense":
            return [torch.empty(N, K, dtype=dtype)] * 2
        tensors = torch.empty(N * K // 2, dtype=torch.uint8), torch.empty(N * K // 64)
        small = right(card, dtype, kind, 64, 64)[0]
        assert isinstance(small, QuantizedWeight)
        absmax = tensors[1].to(torch.uint8)
        nested = torch.empty(-(-N * K // 64 // 256))
        fields = {"packed": tensors[0], "absmax": absmax, "nested_absmax": nested}
        return [timing.replace(small, shape=(N, K), **fields)] * 2

    right = timing.cold_weights
    claims = [c for c in list_claims() if c.group.backend == "triton" and c.group.weight == weight]
    timed = [claim for claim in claims if claim.name == "time"]
    want = keys(timed)
    monkeypatch.setattr(timing, "cold_weights", cold_weights)
    monkeypatch.setattr(compiling, "small", lambda claim: claim)
    assert keys(timed) == want and len(want) > 3


def test_small_skinny_gemms_compile_the_kernels_of_the_timed_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claims = [claim for claim in list_orders() if claim.group.weight == "skinny"]
    compiled = keys(claims)
    monkeypatch.setattr(compiling, "small", lambda claim: claim)
    # The timed sizes, in memory that is not touched.
    monkeypatch.setattr(
        torch, "randn", lambda shape, device, dtype: torch.empty(shape, dtype=dtype)
    )
    monkeypatch.setattr(torch.Tensor, "__truediv__", lambda t, number: t)
    timed = keys([claim for claim in claims if claim.name == "time"])
    assert timed <= compiled and len(timed) > 3


def test_processes_compile_each_kernel_once_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(device, "processors", lambda: 2)
    started: list[dict[str, str]] = []
    popen = subprocess.Popen

    def start(command: list[str], **given: Any) -> Any:
        started.append(given["env"])
        return popen(command, **given)

    monkeypatch.setattr(compiling.subprocess, "Popen", start)
    claims = [Claim(FUSED, name, 0) for name in ("graph", "memory")]
    claims.append(Claim(FUSED._replace(backend="cuda"), "memory", 0))
    compile_ahead(claims, H100)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in started] == ["", ""]
    count = len(list(tmp_path.rglob("*.cubin")))
    assert count == compiling.count(claims, H100) == len(keys(claims[:2])) > 2
    compile_ahead(claims, H100)
    assert len(list(tmp_path.rglob("*.cubin"))) == count


def test_compiler_that_never_ends_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[subprocess.Popen[Any]] = []
    popen = subprocess.Popen

    def start(command: list[str], **given: Any) -> Any:
        workers.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **given))
        return workers[-1]

    monkeypatch.setattr(compiling.subprocess, "Popen", start)
    monkeypatch.setattr(compiling, "LIMIT", 0.5)
    compile_ahead([Claim(FUSED, "memory", 0)], H100)
    assert [worker.returncode for worker in workers] == [-9]


def test_kernel_that_does_not_compile_is_an_error_of_its_claim_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def launch_all(card: Any, claim: Claim) -> None:
        seen.append(claim.name)
        if claim.name == "graph":
            raise ValueError("no instruction")

    seen: list[str] = []
    monkeypatch.setattr(compiling, "launch_all", launch_all)
    claims = [Claim(FUSED, name, 0) for name in ("graph", "memory")]
    errors = compiling.compile_part(claims, H100, 0, 1)
    assert [str(error) for error in errors] == ["no instruction"] and seen == ["graph", "memory"]
    with pytest.raises(ValueError, match="no instruction"):
        compiling.count(claims, H100)


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({"cgroup.controllers": "", "cpu.max": "max 100000"}, 8),
        ({"cgroup.controllers": "", "cpu.max": "250000 100000"}, 2),
        ({"cgroup.controllers": "", "cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
    ids=str,
)
def test_processors_are_those_of_the_cgroup(
    files: dict[str, str], want: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    cpu = device.Cpu("", "", 8, 1, None)
    monkeypatch.setattr(device, "cpu", lambda: cpu)
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    assert device.processors() == want
