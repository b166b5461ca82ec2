"""bfloat16 in two processes: gradients beside float32's, and stock PEFT's beside float32's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from lora_kernels.peft import fuse
from tests.finetune.test_distributed import NEEDS_GLOO, whole
from tests.finetune.tiny import llama
from tests.support.peft_models import randomize
from tests.support.processes import run_in_ranks

IDS = [torch.randint(260, (4, 32), generator=torch.Generator().manual_seed(r)) for r in range(2)]


def make(fused: bool, seed: int) -> Any:
    base = llama(hidden_size=128, intermediate_size=256)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=4, target_modules="all-linear"))
    randomize(model, seed=seed)
    return fuse(model) if fused else model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    return {name: whole(p.grad).float() for name, p in named.items() if p.requires_grad}


def stepped(kind: str, fused: bool, rank: int, seed: int) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, ids = make(fused, seed), IDS[rank]
    if kind == "DDP":
        wrapped = DistributedDataParallel(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        return gradients(wrapped)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model(input_ids=ids, labels=ids).loss.backward()
    return gradients(model)


def compare(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    for kind in ("DDP", "FSDP2"):
        errors = {False: 0.0, True: 0.0}
        for seed in range(3):
            model = make(False, seed)
            for ids in IDS:
                (model(input_ids=ids, labels=ids).loss / len(IDS)).backward()
            want = gradients(model)
            norm = sum(float(t.square().sum()) for t in want.values())
            for fused in errors:
                got = stepped(kind, fused, rank, seed)
                off = sum(float((got[name] - t).square().sum()) for name, t in want.items())
                errors[fused] += (off / norm) ** 0.5 / 3
        assert 2.0**-10 < errors[True] <= 1.1 * errors[False] < 0.1, (kind, errors)


@NEEDS_GLOO
def test_fused_layers_in_bfloat16_are_as_near_to_float32_as_peft_s(tmp_path: Path) -> None:
    run_in_ranks(compare, tmp_path)
