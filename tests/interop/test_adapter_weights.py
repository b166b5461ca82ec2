"""`adapter_weights`, beside the file that PEFT writes in one process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_kernels.peft import adapter_state, adapter_weights, fuse
from lora_kernels.peft.sharded import whole_parameters
from tests.support.assertions import assert_bytes
from tests.support.peft_models import (
    adalora_mlp,
    add_adapter,
    add_lora,
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
NO_GLOO = not (torch.distributed.is_available() and torch.distributed.is_gloo_available())
RANKS = pytest.mark.skipif(NO_GLOO, reason="no gloo")


def biased(bias: str) -> Any:
    torch.manual_seed(0)
    base = nn.ModuleDict({"up": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "down": nn.Linear(8, 4)})
    model = add_lora(base, target_modules=["up"], bias=bias)
    randomize(model)
    return model


def experts() -> Any:
    model = moe()
    randomize(model)
    return model


def of_llama(**config: Any) -> Any:
    model = add_lora(llama(f32), target_modules=["q_proj", "down_proj"], **config)
    randomize(model)
    return model


KINDS: dict[str, Callable[[], Any]] = {
    "linear": mlp,
    "two adapters": lambda: two_adapters(mlp(f32)),
    "dora": dora_mlp,
    "adalora": adalora_mlp,
    "embedding": lambda: embedding_model(f32),
    "experts": experts,
    "nf4": lambda: four_bit_mlp(True),
    "biases": partial(biased, "all"),
    "biases of layers": partial(biased, "lora_only"),
    "llama": of_llama,
    "head to save": partial(of_llama, modules_to_save=["lm_head"]),
    "tokens": partial(of_llama, trainable_token_indices=[1, 3]),
}
ALL = pytest.mark.parametrize("kind", KINDS)


def make(kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fuse(KINDS[kind]())


def of_peft(model: Any, name: str = "default") -> dict[str, Tensor]:
    found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: t.clone() for key, t in found.items()}


@ALL
def test_adapter_weights_are_those_of_peft_s_file(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    for name in model.peft_config:
        model.save_pretrained(tmp_path, selected_adapters=[name], save_embedding_layers=False)
        folder = tmp_path if name == "default" else tmp_path / name
        got = adapter_weights(model, name)
        assert_bytes(got, load_file(folder / "adapter_model.safetensors"))
        assert not any(t.requires_grad for t in got.values())


def test_adapter_weights_of_an_inactive_adapter() -> None:
    model = two_adapters(mlp())
    second = of_peft(model, "second")
    model.set_adapter("default")
    assert_bytes(adapter_weights(model, "second"), second)


def test_adapter_weights_of_what_has_none_raise() -> None:
    with pytest.raises(TypeError, match=r"model: got str, want a torch.nn.Module"):
        adapter_weights("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model: got Linear, want a peft.PeftModel, or"):
        adapter_weights(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"adapter_name: got 'x', want one of \['default'\]"):
        adapter_weights(mlp(), "x")


def shard(rank: int, folder: str) -> None:
    """The adapters of each kind under DDP and FSDP2."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    warnings.simplefilter("ignore")
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for kind in KINDS:
        model = make(kind)
        want = {name: of_peft(model, name) for name in model.peft_config}
        if any(p.requires_grad for p in model.parameters()):
            wrapped = DistributedDataParallel(model)
            assert_bytes(adapter_weights(wrapped), want["default"])
        for module in list(model.get_base_model().children()):
            if kind != "tokens" and next(module.parameters(), None) is not None:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(hasattr(p, "full_tensor") for p in model.parameters())
        gathered: list[nn.Module] = []

        @contextmanager
        def record(
            modules: Any, *args: Any, gathered: list[nn.Module] = gathered
        ) -> Iterator[None]:
            gathered += modules
            assert len(modules) == 1
            with whole_parameters(modules, *args):
                yield

        before = {n: p for n, p in model.named_parameters()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapter_state, "whole_parameters", record)
            for name, tensors in want.items():
                assert_bytes(adapter_weights(model, name), tensors)
        assert all(p is before[n] for n, p in model.named_parameters())
        if kind == "llama":
            names = {n.rpartition(".")[0] for n in before if ".lora_" in n}
            holders = {m for m in gathered if m._parameters}
            assert holders == {model.get_submodule(n) for n in names}


@RANKS
def test_adapter_weights_under_ddp_and_fsdp2_are_those_of_one_process(tmp_path: Path) -> None:
    run_in_ranks(shard, tmp_path)


def flatten(rank: int, folder: str) -> None:
    """Adapters in FSDP1's units."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    warnings.simplefilter("ignore")
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = LlamaDecoderLayer.__name__
    for kind in ("llama", "head to save"):
        for how in ("root", "layers", "each matrix"):
            model = make(kind)
            add_adapter(model, r=2, target_modules={"v_proj"})
            want = {name: of_peft(model, name) for name in model.peft_config}
            policy: Any = {"root": None, "layers": ModuleWrapPolicy({LlamaDecoderLayer})}.get(
                how, fsdp_auto_wrap_policy(model)
            )
            if how != "each matrix":
                model.requires_grad_(True)
            wrapped = FullyShardedDataParallel(
                model,
                auto_wrap_policy=policy,
                use_orig_params=how != "each matrix",
                device_id=torch.device("cpu"),
            )
            with pytest.raises(ValueError, match=r"model: got .* by FSDP1, want .*summon_full"):
                adapter_weights(model)
            for _ in range(2):  # before the first forward, and after it
                for name, tensors in want.items():
                    assert_bytes(adapter_weights(wrapped, name), tensors)
                logits = wrapped(input_ids=torch.arange(6)[None]).logits
            again = wrapped(input_ids=torch.arange(6)[None]).logits
            torch.testing.assert_close(again, logits, rtol=0, atol=0)


@RANKS
def test_adapter_weights_under_fsdp1_are_those_of_one_process(tmp_path: Path) -> None:
    run_in_ranks(flatten, tmp_path)
