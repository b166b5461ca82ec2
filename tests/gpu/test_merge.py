"""Copies of exact merges on a GPU, and models that move while they are merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_kernels.peft import fuse, merged_weights
from tests.support.assertions import assert_bytes
from tests.support.peft_models import base_bytes, four_bit_mlp, mlp, randomize

MODELS = {"bfloat16": lambda: mlp(torch.bfloat16), "nf4": lambda: four_bit_mlp(True)}


def on_cpu(model: Any) -> dict[str, torch.Tensor]:
    return {name: t.cpu() for name, t in base_bytes(model).items()}


@pytest.mark.filterwarnings("ignore:.*erge lora module to 4-bit")
@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("kind", MODELS)
def test_exact_merge_on_a_gpu_keeps_the_copy_in_its_place(kind: str, place: str) -> None:
    model = fuse(MODELS[kind]().cuda(), exact_merge=place)
    before = on_cpu(model)
    want = {name: t.cpu() for name, t in merged_weights(model)}
    for moved in (False, True):
        model.cuda()
        model.merge_adapter()
        assert_bytes(on_cpu(model), want)
        for exact in (vars(each).get("exact_merge") for each in model.modules()):
            for original in exact.originals if exact is not None else ():
                t = original.values if hasattr(original, "values") else original.packed
                assert t.device.type == ("cpu" if place == "host" else "cuda")
        if moved:
            model.cpu()
        randomize(model, seed=9)
        model.unmerge_adapter()
        assert_bytes(on_cpu(model), before)
        assert {p.device.type for p in model.parameters()} == {"cpu" if moved else "cuda"}


def test_exact_merge_to_the_host_holds_no_second_base_on_the_gpu() -> None:
    pytest.importorskip("bitsandbytes")
    for kind in MODELS:
        model = fuse(MODELS[kind]().cuda(), exact_merge="host")
        model.merge_adapter()  # cuBLAS allocates its workspace
        model.unmerge_adapter()
        before = torch.cuda.memory_allocated()
        model.merge_adapter()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before + 1024, kind
        model.unmerge_adapter()
        assert torch.cuda.memory_allocated() <= before + 1024, kind
