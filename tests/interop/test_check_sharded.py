"""`check` of models that FSDP2 shards, beside the check of one process; ZeRO-3's: test_zero3."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.peft import Check, check, fuse
from tests.finetune.test_distributed import NEEDS_GLOO
from tests.support.peft_models import (
    adalora_mlp,
    add_lora,
    batch,
    dora_mlp,
    embedding_model,
    four_bit_mlp,
    llama,
    mlp,
    moe,
    randomize,
    two_adapters,
)
from tests.support.processes import run_in_ranks

f32 = torch.float32
IDS = torch.arange(12).view(2, 6)


def of_llama(**config: Any) -> Any:
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"]} | config
    return add_lora(llama(f32), **targets)


def experts() -> Any:
    model = moe()
    randomize(model)
    return model


def silent() -> Any:
    """A layer's lora_B is 0."""
    model = of_llama()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).zero_()
    return model


def scaled() -> Any:
    model = mlp(f32)
    next(m for m in model.modules() if hasattr(m, "scaling")).scaling["default"] *= 2
    return model


# Of each model, its batch; None for that of `mlp`.
MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "linear": (partial(mlp, f32), None),
    "two adapters": (lambda: two_adapters(mlp(f32)), None),
    "dora": (partial(dora_mlp, f32), None),
    "adalora": (partial(adalora_mlp, f32), None),
    "nf4": (lambda: four_bit_mlp(True), batch(f32, 64)),
    "embedding": (lambda: embedding_model(f32), IDS),
    "llama": (of_llama, {"input_ids": IDS, "labels": IDS}),
    "head to save": (partial(of_llama, modules_to_save=["lm_head"]), {"input_ids": IDS}),
    "experts": (experts, {"input_ids": IDS, "labels": IDS}),
    "silent": (silent, {"input_ids": IDS}),
    "scaled": (scaled, None),
}
FAULTY = {"silent": "effect", "scaled": "scaling"}


def state(model: Any) -> dict[str, Any]:
    """What the check must leave alone."""
    found: dict[str, Any] = {name: p for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]
        found[f"{name}."] = (type(module), hooks, module.training, type(module._parameters))
    return found


def values(model: Any) -> dict[str, Tensor]:
    return {n: p.full_tensor().clone() for n, p in model.named_parameters()}


def run(model: Any, given: Any) -> Any:
    result = model(**given) if isinstance(given, dict) else model(given)
    return getattr(result, "logits", result)


def compare(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    warnings.simplefilter("ignore")
    for kind, (make, given) in MODELS.items():
        model = fuse(make())
        given = batch(f32) if given is None else given
        want: Check = check(model, given)
        assert want.ok is (kind not in FAULTY), want
        for module in list(model.get_base_model().children()):
            if next(module.parameters(), None) is not None:
                fully_shard(module)
        fully_shard(model)
        for _ in range(2):  # before the first forward, after which the outermost stays gathered
            got: Check = check(model, given)
            assert got.rows == want.rows and got.problems == want.problems, (kind, got)
            assert [got.change, got.merge_error] == pytest.approx([want.change, want.merge_error])
            assert [row[:2] for row in got.kept] == [row[:2] for row in want.kept], (got, want)
            before, stored = state(model), values(model)
            check(model, given)
            assert state(model) == before, kind
            assert all(torch.equal(t, stored[n]) for n, t in values(model).items())
            assert all(p.grad is None for p in model.parameters())
            with torch.no_grad():
                y = run(model, given)
            assert torch.equal(run(model, given), y)
        if kind in FAULTY:
            assert any(getattr(row, FAULTY[kind]) == "✗" for row in got.rows), got
        run(model, given).float().square().sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(hasattr(p, "full_tensor") for p in trained)
        assert any(p.grad is not None for p in trained)
    for keeps_parameters in (True, False):
        model = fuse(mlp(f32)).requires_grad_(keeps_parameters)
        wrapped = FullyShardedDataParallel(
            model, use_orig_params=keeps_parameters, device_id=torch.device("cpu")
        )
        with pytest.raises(ValueError, match="FSDP1's, want a model before FSDP1 wraps it"):
            check(wrapped.module, batch(f32))


@NEEDS_GLOO
def test_check_under_fsdp2_is_that_of_one_process(tmp_path: Path) -> None:
    run_in_ranks(compare, tmp_path)


def shard_alone(rank: int, folder: str) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    model = fuse(mlp(f32))
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    up = model.get_base_model().up.base_layer
    up.weight = nn.Parameter(distribute_tensor(up.weight.data, mesh, [Shard(0)]), False)
    with pytest.raises(ValueError, match=r"up\S+ is sharded by another API than FSDP2 or ZeRO-3"):
        check(model, batch(f32))


@NEEDS_GLOO
def test_check_of_what_fsdp2_does_not_gather_raises(tmp_path: Path) -> None:
    run_in_ranks(shard_alone, tmp_path)
