"""QLoRALinear under FSDP: bytes, scales and tables shard like any parameter, and keep every bit."""

from __future__ import annotations

import copy
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels.layers import QLoRALinear
from tests.support.processes import RANKS, run_in_ranks, run_python
from tests.support.threads import threads as threads  # one, as each rank has

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="no gloo"
)

POLICIES = (None, torch.bfloat16)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(QLoRALinear(96, 65, r=3, bias=True), QLoRALinear(65, 33, r=3))
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    return layers


def inputs(rank: int) -> Tensor:
    return torch.randn(5, 96, generator=torch.Generator().manual_seed(rank))


def train(layers: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layers(x)
    y.float().square().sum().backward()
    return y.detach()


def shard(rank: int, folder: str) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    for number, dtype in enumerate(POLICIES):
        sharded = model()
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for module in (*sharded, sharded):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        local = sum(p.to_local().numel() for p in sharded.parameters())  # type: ignore[attr-defined]
        results = {"y": train(sharded, inputs(rank))}
        for name, p in sharded.named_parameters():
            if p.grad is not None:
                results[name] = p.grad.full_tensor()  # type: ignore[attr-defined]
        with torch.no_grad():  # twice: the second call may be the prepared one
            results["again"] = torch.stack([sharded(inputs(rank)) for _ in range(2)])
        options = StateDictOptions(full_state_dict=True)
        state = get_model_state_dict(sharded, options=options)
        torch.save((local, results, state), f"{folder}/{number}-{rank}.pt")


def test_fully_sharded_layers_train_as_whole_ones(tmp_path: Path) -> None:
    run_in_ranks(shard, tmp_path)
    saved = model().state_dict()
    for number, dtype in enumerate(POLICIES):
        grads: dict[str, Tensor] = {}
        whole = model() if dtype is None else model().to(dtype)
        for rank in range(RANKS):
            mine = copy.deepcopy(whole)
            y = train(mine, inputs(rank) if dtype is None else inputs(rank).to(dtype))
            local, results, state = torch.load(tmp_path / f"{number}-{rank}.pt")
            assert local < sum(p.numel() for p in mine.parameters()) * 0.6
            assert results["y"].dtype is (dtype or torch.float32)
            assert torch.equal(results.pop("y"), y)
            assert all(torch.equal(again, y) for again in results.pop("again"))
            for name, p in mine.named_parameters():
                if p.requires_grad:
                    assert p.grad is not None
                    grads[name] = grads.get(name, torch.zeros(())) + p.grad.float() / RANKS
            if rank == 0:
                assert state.keys() == saved.keys()
                assert all(torch.equal(state[name], t) for name, t in saved.items())
        assert results.keys() == grads.keys() == {f"{i}.lora_{n}" for i in (0, 1) for n in "AB"}
        for name, grad in grads.items():
            assert torch.equal(results[name], grad), name


def wait_in_one_rank(rank: int, folder: str) -> None:
    while rank:
        time.sleep(1.0)


def test_processes_that_hang_are_ended_with_their_children(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"^wait_in_one_rank: ranks still run after 2 s"):
        run_in_ranks(wait_in_one_rank, tmp_path, timeout=2.0)
    child = "import time; time.sleep(600)"
    code = f"import subprocess as s, sys; s.run([sys.executable, '-c', {child!r}, '{tmp_path}'])"
    with pytest.raises(subprocess.TimeoutExpired):
        run_python("-c", code, timeout=2.0)
    end = time.monotonic() + 30  # a process that was killed ends when it next has a processor
    while (running := running_with(tmp_path)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not running


def running_with(argument: Path) -> list[psutil.Process]:
    """Return the processes that have the argument in their command line, without zombies."""
    every = psutil.process_iter(["cmdline", "status"])
    named = [each for each in every if str(argument) in str(each.info["cmdline"])]
    return [each for each in named if each.info["status"] != psutil.STATUS_ZOMBIE]
