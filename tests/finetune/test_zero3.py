"""Fused layers under DeepSpeed's ZeRO-3, in two processes, train as PEFT's."""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lora_kernels.backends.library import as_on_gpu
from lora_kernels.integrations import FuseCallback
from lora_kernels.peft import adapter_weights, check, explain, fuse, merged_weights, unfuse
from lora_kernels.peft.merge import written_parameters
from lora_kernels.peft.quantize import quantize
from lora_kernels.peft.swap import fused_layers
from tests.finetune.test_distributed import NEEDS_GLOO, experts_to_shard, ids_of, launch
from tests.finetune.tiny import gpt2, llama
from tests.support.assertions import assert_bytes
from tests.support.peft_models import OpCounter, randomize

pytest.importorskip("deepspeed", exc_type=ImportError)
pytestmark = NEEDS_GLOO

STEPS = 2
GATHERED = "DeepSpeed's ZeRO-3 gathers its parameters for the call"
ZERO: dict[str, Any] = {
    "stage": 3,
    # Everything is partitioned, and freed after each call.
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def config(**zero: Any) -> dict[str, Any]:
    return {
        "zero_optimization": ZERO | zero,
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": "all-linear"} | settings)


def adapted_llama(layers: int = 2, **settings: Any) -> Any:
    base = llama(intermediate_size=128, num_hidden_layers=layers)
    return get_peft_model(base, lora(**settings))


def four_bit(**settings: Any) -> Any:
    base = llama(intermediate_size=128).requires_grad_(False)
    quantize(base, "nf4", torch.float32, torch.device("cpu"))
    return get_peft_model(base, lora(**settings))


def adalora() -> Any:
    schedule = {"total_step": 9, "tinit": 3, "tfinal": 3}
    names = {"init_r": 3, "target_r": 2, "lora_alpha": 7, "target_modules": "all-linear"}
    return get_peft_model(llama(), AdaLoraConfig(**schedule | names))


# Of each model, how many calls of our ops one forward makes. Most have one layer, because each
# parameter is gathered by both processes, which take turns on a busy machine.
MODELS: dict[str, tuple[Any, int]] = {
    "dense": (adapted_llama, 14),
    "one layer": (lambda: adapted_llama(1), 7),
    "dora": (lambda: adapted_llama(1, use_dora=True), 7),
    "bias": (lambda: adapted_llama(1, lora_bias=True), 7),
    "head": (lambda: adapted_llama(1, target_modules=["q_proj", "lm_head"]), 2),
    # An embedding runs PyTorch's ops.
    "embedding": (lambda: adapted_llama(1, target_modules=["q_proj", "embed_tokens"]), 1),
    "conv1d": (lambda: get_peft_model(gpt2(n_layer=1), lora(fan_in_fan_out=True)), 4),
    "experts": (experts_to_shard, 6),
    "4-bit": (four_bit, 14),
    "adalora": (adalora, 14),
    "dropout": (lambda: adapted_llama(1, lora_dropout=0.1), 7),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "called twice": {"calls": 2},
    "non-reentrant": {"reentrant": False},
    "reentrant": {"reentrant": True},
    "offload": {"zero": {"offload_param": {"device": "cpu"}}},
    # PEFT's AdaLoRA works for persistent parameters alone.
    "persistent": {"zero": {"stage3_param_persistence_threshold": 100_000}},
    "prefetch": {"zero": {"stage3_prefetch_bucket_size": 100_000}},
    "fused late": {"late": True},
    "zero3_init": {"init": True},
    "gpu path": {"on_gpu": True},
    "tiles": {"rows": 5},
    "tiles, called twice": {"rows": 5, "calls": 2},
    "tiles, non-reentrant": {"rows": 5, "reentrant": False},
    "tiles, reentrant": {"rows": 5, "reentrant": True},
    "tiles, ZeRO-2": {"rows": 5, "zero": {"stage": 2}},
    "tiles, ZeRO-1": {"rows": 5, "zero": {"stage": 1}},
}
QUICK = [("dense", "reentrant"), ("dora", "plain"), ("experts", "plain"), ("4-bit", "fused late")]
QUICK += [("one layer", name) for name in ("called twice", "zero3_init")]
QUICK += [("one layer", f"tiles{how}") for how in ("", ", ZeRO-2")]
MORE = [(name, "plain") for name in ("dense", "head", "conv1d", "4-bit", "bias", "embedding")]
MORE += [("one layer", "offload")]
MORE += [("dense", name) for name in ("persistent", "prefetch", "fused late", "called twice")]
# On a GPU's path our masks are PEFT's.
MORE += [(name, "gpu path") for name in ("dense", "dora", "experts", "conv1d", "dropout")]
MORE += [("adalora", "persistent"), ("4-bit", "offload")]
MORE += [(name, "zero3_init") for name in ("conv1d", "experts")]
MORE += [(m, o) for m in ("dora", "4-bit", "experts") for o in ("non-reentrant", "reentrant")]
MORE += [("dense", "non-reentrant")]
MORE += [(name, "tiles") for name in ("dense", "4-bit", "dora", "bias")]
MORE += [
    *(("dense", f"tiles, {how}") for how in ("called twice", "non-reentrant", "reentrant")),
    *(("dense", f"tiles, {how}") for how in ("ZeRO-1", "ZeRO-2")),
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]

SCRIPT = """
import os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
from tests.finetune.test_zero3 import train
train(*sys.argv[1:])
"""


def build(model: str, folder: str, init: bool = False) -> Any:
    """Make the PEFT model, with DeepSpeed's `zero.Init` if its configuration is alive."""
    import deepspeed

    if init:
        base = AutoModelForCausalLM.from_pretrained(f"{folder}/{model}").requires_grad_(False)
        assert all(hasattr(p, "ds_id") for p in base.parameters())
        peft_model = get_peft_model(base, LoraConfig.from_pretrained(f"{folder}/{model}/lora"))
    else:
        torch.manual_seed(0)
        peft_model = MODELS[model][0]()
    adapters = [p for n, p in peft_model.named_parameters() if ".lora_" in n]
    with deepspeed.zero.GatheredParameters(adapters, modifier_rank=0):
        randomize(peft_model)
        with torch.no_grad():
            for name, p in peft_model.named_parameters():
                if ".lora_" in name and "magnitude" not in name:
                    p.mul_(0.3)
    return peft_model


class Storages:
    """The memory of the parameters that were gathered in the calls of some layers."""

    def __init__(self, layers: list[Any]) -> None:
        self.seen: list[Any] = []
        self.handles = [layer.register_forward_hook(self.look, prepend=True) for layer in layers]

    def look(self, layer: nn.Module, *_: Any) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        for p in layer.parameters():
            assert p.numel() == p.ds_numel  # type: ignore[attr-defined]
            self.seen.append(StorageWeakRef(p.untyped_storage()))

    def alive(self) -> int:
        gc.collect()
        return sum(not each.expired() for each in self.seen)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def run(
    model: str,
    folder: str,
    fused: bool,
    calls: int = 1,
    reentrant: bool | None = None,
    zero: dict[str, Any] | None = None,
    late: bool = False,
    init: bool = False,
    rows: int | None = None,
) -> dict[str, Any]:
    """Steps of SGD, an evaluation before each; return what there is to compare."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    from transformers.integrations import HfDeepSpeedConfig

    rank, settings = torch.distributed.get_rank(), config(**zero or {})
    # transformers refers to it weakly.
    alive = None if late else HfDeepSpeedConfig(settings)
    peft_model = build(model, folder, init)
    if reentrant is not None:
        peft_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            peft_model.enable_input_require_grads()
    if fused and not late:
        fuse(peft_model, mlp_tile_rows=rows)
    trained = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    engine, *_ = deepspeed.initialize(
        model=peft_model, optimizer=torch.optim.SGD(trained.values(), lr=0.05), config=settings
    )
    if late:
        alive = HfDeepSpeedConfig(settings)
    if fused and late:
        before = {row.reason for row in explain(peft_model).rows}
        assert before == {"not fused: call fuse()"}, before
        fuse(peft_model)
    found: dict[str, Any] = {}
    if fused and rows:
        tiled = [row for row in explain(peft_model).blocks if "in tiles" in row.strategy]
        assert len(tiled) == MODELS[model][1] // 7, explain(peft_model)
    if fused and settings["zero_optimization"]["stage"] == 3:
        stored = dict(peft_model.named_parameters())
        explanation = explain(peft_model)
        assert all(p is stored[name] for name, p in peft_model.named_parameters())
        explanation.assert_fused()
        assert all(row.reason.endswith(GATHERED) for row in explanation.rows), explanation
        # The adapters' sizes are those of the whole parameters.
        size = sum(p.ds_numel for n, p in stored.items() if ".lora_" in n)
        assert sum(explanation.parameters.values()) >= size
    if fused and zero is None:  # the training after it equals the one without it
        stored = dict(peft_model.named_parameters())
        adapter = {key: t.clone() for key, t in adapter_weights(peft_model).items()}
        checked = check(peft_model, {"input_ids": ids_of(rank), "labels": ids_of(rank)})
        assert checked.ok, checked
        assert all(p is stored[name] for name, p in peft_model.named_parameters())
        assert not any(p.numel() for p in stored.values())
        assert_bytes(adapter_weights(peft_model), adapter)
    is_observed = fused and zero is None and rows is None  # tiles are not computed beside hooks
    storages = Storages(fused_layers(peft_model) if is_observed else [])
    for step in range(STEPS):
        engine.eval()
        for disabled in (False, True):
            with torch.no_grad(), peft_model.disable_adapter() if disabled else nullcontext():
                found[f"logits {step} {disabled}"] = engine(input_ids=ids_of(0)).logits
        engine.train()
        torch.manual_seed(step)
        ids = [ids_of(rank + 2 * call) for call in range(calls)]
        with OpCounter() as counter:
            loss = torch.stack([engine(input_ids=x, labels=x).loss for x in ids]).sum()
        counts = Counter({n: c for n, c in counter.counts.items() if n.startswith("lora_")})
        want = calls * MODELS[model][1] if fused else 0
        assert counts.total() > 2 * want if rows and fused else counts.total() == want, counts
        if is_observed:
            assert storages.seen and not storages.alive()
        found[f"loss {step}"] = loss.detach()
        engine.backward(loss)
        found |= {f"gradient {step} {n}": safe_get_full_grad(p).clone() for n, p in trained.items()}
        engine.step()
    storages.remove()
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        found |= {f"trained {n}": p.detach().clone() for n, p in trained.items()}
    if zero is None:  # all parameters are partitioned
        found |= merged(peft_model, fused)
    if fused:
        unfuse(peft_model)
    engine.eval()
    with torch.no_grad():
        found["unfused"] = engine(input_ids=ids_of(0)).logits
    engine.destroy()
    del alive
    return found


def merged(peft_model: Any, is_fused: bool) -> dict[str, Any]:
    """Compare `merged_weights` of partitioned parameters with those of gathered ones, and merge
    exactly."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(peft_model.parameters())):
        want = {name: t.clone() for name, t in merged_weights(peft_model)}
        adapter = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        adapter = {key: t.clone() for key, t in adapter.items()}
    assert_bytes(adapter_weights(peft_model), adapter)
    assert not any(p.numel() for p in peft_model.parameters())
    assert_bytes(dict(merged_weights(peft_model)), want)
    assert not any(p.numel() for p in peft_model.parameters())
    if not is_fused:
        return {f"merged {name}": t for name, t in want.items() if t.is_floating_point()}
    for call in (peft_model.merge_adapter, peft_model.merge_and_unload):
        with pytest.raises(ValueError, match=r"ZeRO-3 partitions .* want .*merged_weights"):
            call()
    fuse(peft_model, exact_merge="host")
    slots = [slot for layer in fused_layers(peft_model) for slot in written_parameters(layer)]

    def values() -> list[Any]:
        with deepspeed.zero.GatheredParameters([m._parameters[n] for m, n in slots]):
            return [m._parameters[n].detach().clone() for m, n in slots]

    before = values()
    for _ in range(2):
        peft_model.merge_adapter()
        layers = [m for m in peft_model.modules() if hasattr(m, "merged_adapters")]
        assert all(layer.merged for layer in layers)
        changed = [not torch.equal(a, b) for a, b in zip(values(), before, strict=True)]
        assert any(changed)
        for module, name in slots:  # in 4 bits, with the merged weight's scales
            state = getattr(module._parameters[name], "quant_state", None)
            assert getattr(module, "quant_state", None) is (state if name == "weight" else None)
        with deepspeed.zero.GatheredParameters(list(peft_model.parameters())):
            assert_bytes(dict(merged_weights(peft_model)), want)  # adapters that are merged stay
        peft_model.unmerge_adapter()
        assert all(torch.equal(a, b) for a, b in zip(values(), before, strict=True))
    assert_bytes(dict(merged_weights(peft_model)), want)
    fuse(peft_model)
    return {f"merged {name}": t for name, t in want.items() if t.is_floating_point()}


def train(folder: str, group: str) -> None:
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.comm.torch.build_shm_op = lambda: None  # which a compiler would build
    deepspeed.init_distributed("gloo", verbose=False)
    gc.freeze()  # DeepSpeed collects garbage often, each time through all modules
    for model, option in QUICK if group == "quick" else MORE:
        if OPTIONS[option].get("init") and torch.distributed.get_rank() == 0:
            peft_model = MODELS[model][0]()
            peft_model.peft_config["default"].save_pretrained(f"{folder}/{model}/lora")
            peft_model.unload().save_pretrained(f"{folder}/{model}")
        torch.distributed.barrier()
        options = dict(OPTIONS[option])
        with as_on_gpu() if options.pop("on_gpu", False) else nullcontext():
            found = [run(model, folder, fused, **options) for fused in (False, True)]
        torch.save(found, f"{folder}/{model} {option} {torch.distributed.get_rank()}.pt")
    if group == "quick":
        train_by_trainer(folder)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process that ends in the usual way


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Return the folder with the results of a group of cases, and what was printed. One launch
    computes the group."""

    @functools.cache
    def run_group(group: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("zero3")
        return folder, launch(SCRIPT, folder, str(folder), group)

    return run_group


@pytest.mark.parametrize(("model", "option"), CASES)
def test_fused_layers_under_zero3_equal_peft_s(
    model: str, option: str, trained: Callable[[str], tuple[Path, str]]
) -> None:
    """Losses, each gradient and update, evaluations, and PEFT's forward after `unfuse`."""
    folder, _ = trained("quick" if (model, option) in QUICK else "more")
    for rank in (0, 1):
        want, got = torch.load(folder / f"{model} {option} {rank}.pt", weights_only=True)
        assert got.keys() == want.keys()
        for name, ref in want.items():
            # Sums of a few hundred float32 terms, through two layers and two steps.
            assert (got[name] - ref).norm() <= 2.0**-14 * ref.norm(), name
            assert ref.norm() > 0, name


FILES = ("adapter_config.json", "adapter_model.safetensors")


def train_by_trainer(folder: str) -> None:
    """With gradient checkpointing and checkpoints, as a user would."""
    settings = config() | {"train_micro_batch_size_per_gpu": "auto"}
    ids = torch.randint(260, (12, 12), generator=torch.Generator().manual_seed(0))
    for fused in (False, True):
        out = f"{folder}/{fused}"
        args = TrainingArguments(
            out,
            use_cpu=True,
            deepspeed=settings,
            per_device_train_batch_size=2,
            max_steps=3,
            save_steps=3,
            learning_rate=0.02,
            optim="adamw_torch",
            logging_steps=1,
            gradient_checkpointing=True,
            report_to=[],
            disable_tqdm=True,
        )
        torch.manual_seed(0)
        model = adapted_llama()
        randomize(model)
        trainer = Trainer(
            model,
            args,
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            callbacks=[FuseCallback(differing_ranks="raise")] if fused else [],
        )
        with OpCounter() as counter:
            trainer.train()
        # Three steps, and as many forwards that checkpointing runs again.
        assert counter.counts["lora_linear"] == (14 * 6 if fused else 0), counter.counts
        trainer.save_model(f"{out}/final")
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        if torch.distributed.get_rank() == 0:
            Path(out, "losses.json").write_text(json.dumps(losses))


def test_fuse_callback_under_zero3_trains_and_saves_as_peft(
    trained: Callable[[str], tuple[Path, str]],
) -> None:
    folder, shown = trained("quick")
    lines = [line for line in shown.splitlines() if line.startswith("lora_kernels: ")]
    assert len(lines) == 1 and lines[0].startswith("lora_kernels: 14 LoRA layers: 14 our "), lines
    stock, fused = (json.loads((folder / f"{f}/losses.json").read_text()) for f in (False, True))
    assert len(stock) == 3 and fused == pytest.approx(stock, rel=2.0**-12)
    for saved in ("checkpoint-3", "final"):
        folders = [folder / str(fused) / saved for fused in (False, True)]
        config_of_stock, config_of_fused = ((each / FILES[0]).read_text() for each in folders)
        assert config_of_fused == config_of_stock
        want, got = (load_file(each / FILES[1]) for each in folders)
        assert list(got) == list(want) and len(want) == 28
        for name, ref in want.items():
            # AdamW divides by a gradient's own size, which makes its roundings larger.
            assert (got[name] - ref).norm() <= 2.0**-10 * ref.norm(), name
