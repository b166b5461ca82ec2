"""The watch in `FuseCallback` over processes that train one adapter: planted faults, no others."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from lora_kernels.integrations import FuseCallback, ranks
from lora_kernels.integrations.ranks import RankWatch
from lora_kernels.peft import explain, fuse
from lora_kernels.peft.explain_rows import PEFT
from tests.finetune.test_distributed import NEEDS_GLOO, ids_of, launch
from tests.finetune.tiny import llama
from tests.support.peft_models import dora_mlp, mlp, randomize
from tests.support.processes import run_in_ranks

A, B = "0.lora_A.default.weight", "2.lora_B.default.weight"


def make(**config: Any) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    settings = {"r": 2, "target_modules": ["0", "2"]} | config
    model = get_peft_model(base, LoraConfig(**settings))
    randomize(model)
    return fuse(model)


def named(model: Any, end: str) -> Any:
    return next(p for name, p in model.named_parameters() if name.endswith(end))


@contextmanager
def said() -> Iterator[list[str]]:
    """What the watch logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    ranks.logger.addHandler(handler)
    try:
        yield lines
    finally:
        ranks.logger.removeHandler(handler)


def args_of(*names: str) -> Any:
    """Arguments with a mesh of the two ranks."""
    sizes = (2,) + (1,) * (len(names) - 1)
    mesh = dist.init_device_mesh("cpu", sizes, mesh_dim_names=names) if names else None
    return SimpleNamespace(parallelism_config=SimpleNamespace(device_mesh=mesh))


NO_MESH = SimpleNamespace()


def step(model: Any, seed: int, wrapped: Any = None) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    (wrapped or model)(x).square().sum().backward()


def save(model: Any, folder: Path) -> None:
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()


def change(model: Any) -> None:
    """As a step of training would."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5)


def watch_initial(rank: int) -> None:
    for name in (A, B):
        model = make()
        with said() as lines:
            watch = RankWatch()
            watch.compare_initial(model, NO_MESH)
            assert not lines
            if rank == 1:
                with torch.no_grad():
                    p = named(model, name)
                    p.view(-1)[-1] = torch.nextafter(p.view(-1)[-1], torch.tensor(9.0))
            for _ in range(2):  # it is said once
                watch.compare_initial(model, NO_MESH)
        if rank == 0:
            (line,) = lines
            assert f"different values of base_model.model.{name} (ranks 0 and 1)" in line
            assert "set_seed" in line
        else:
            assert not lines
        with pytest.raises(RuntimeError, match=name):
            RankWatch("raise").compare_initial(model, NO_MESH)
        RankWatch(None).compare_initial(model, NO_MESH)
        for silent in (("pp",), ("tp",), ("ep", "dp_shard"), ("unknown",)):
            RankWatch("raise").compare_initial(model, args_of(*silent))
        for loud in (("dp_replicate",), ("dp_shard", "tp"), ("cp",), ("sp",), ("fsdp",)):
            with pytest.raises(RuntimeError, match=name):
                RankWatch("raise").compare_initial(model, args_of(*loud))
        named(model, name).allreduce = False  # an expert of one rank
        RankWatch("raise").compare_initial(model, NO_MESH)
    # Stages have tensors of different names or shapes.
    RankWatch("raise").compare_initial(make(target_modules=["02"[rank]]), NO_MESH)
    many = make()
    if rank == 1:
        change(many)
    with pytest.raises(RuntimeError, match=r"0.lora_A.\S+, \S+, \S+ and 1 more \(ranks 0 and 1\)"):
        RankWatch("raise").compare_initial(many, NO_MESH)


def watch_gradients(rank: int) -> None:
    def gradients(change: Callable[[Any], None] = lambda model: None, averaged: bool = True) -> Any:
        model = make()
        wrapped = DistributedDataParallel(model) if averaged else None
        for number in range(ranks.GRADIENT_STEPS + 2):
            step(model, 2 * number + rank, wrapped)
            change(model)
            yield model

    def double(model: Any) -> None:
        named(model, B).grad.mul_(1 + rank)

    def drop(model: Any) -> None:
        if rank:
            named(model, A).grad = None

    watch = RankWatch("raise")
    gathered: list[int] = []
    gather = ranks._gather

    def record(entry: Any) -> Any:
        gathered.append(watch._steps)
        return gather(entry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_gather", record)
        for model in gradients():
            watch.compare_gradients(model, NO_MESH)
    assert gathered == [1, 2]
    watch.begin(model)  # another training
    with pytest.raises(RuntimeError, match=r"step 1: nothing averages them"):
        watch.compare_gradients(next(gradients(averaged=False)), NO_MESH)
    for fault, name in ((double, B), (drop, A)):
        with pytest.raises(RuntimeError, match=rf"different gradients of \S+{name} \(ranks 0 and"):
            RankWatch("raise").compare_gradients(next(gradients(fault)), NO_MESH)
    late = RankWatch("raise")
    model, second = itertools.islice(gradients(averaged=False), 2)
    model.zero_grad()  # as dA is while B is 0
    late.compare_gradients(model, NO_MESH)
    step(second, rank)
    with pytest.raises(RuntimeError, match="before optimizer step 2"):
        late.compare_gradients(second, NO_MESH)


def watch_saved(rank: int, folder: Path) -> None:
    def compare(model: Any, how: str, change: Callable[[], None] = lambda: None) -> str:
        watch = RankWatch()
        watch.begin(model)
        change()
        with said() as lines:
            for _ in range(2):
                watch.compare_saved(model, NO_MESH, folder / how)
        assert len(lines) <= 1 and not (rank and lines), lines
        return "".join(lines)

    model = make(modules_to_save=["2"], target_modules=["0"], bias="lora_only")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
    save(model, folder / "whole")
    assert not compare(model, "whole", lambda: change(model))
    assert not compare(model, "nowhere")  # nothing has changed, as while a warm-up's rate is 0
    for lost in ("lora_A.weight", "0.base_layer.bias", "model.2.weight"):
        save(model, folder / lost)
        file = folder / lost / "adapter_model.safetensors"
        saved = {key: t.clone() for key, t in load_file(file).items()}
        dist.barrier()  # before one rank writes
        key = next(key for key in saved if key.endswith(lost))
        for value in (None, torch.empty(0)):
            if rank == 0:
                rest = {k: t for k, t in saved.items() if k != key}
                save_file(rest if value is None else rest | {key: value}, file)
            dist.barrier()
            line = compare(model, lost)
            assert rank or line == f"{folder / lost} lacks {key}", line
    for kind in (dora_mlp(), mlp()):
        save(kind, folder / "kinds")
        assert not compare(kind, "kinds", lambda kind=kind: change(kind))  # type: ignore[misc]

    def change_rank_1() -> None:
        change(model)
        if rank:
            with torch.no_grad():
                named(model, "0.lora_B.default.weight").add_(1)

    line = compare(model, "whole", change_rank_1)
    assert rank or "lora_B.default.weight (ranks 0 and 1): rank 0's are saved" in line, line

    def change_one(model: Any, end: str) -> None:
        with torch.no_grad():
            named(model, end).mul_(1.5)

    model = make()
    line = compare(model, "nowhere", lambda: change_one(model, "0.lora_B.default.weight"))
    assert rank or line == "no rank has changed base_model.model.2 since the training began", line
    model = make()  # dA is 0 in the first step
    both = ("0.lora_B.default.weight", "2.lora_B.default.weight")
    assert not compare(model, "nowhere", lambda: [change_one(model, end) for end in both])  # type: ignore[arg-type,func-returns-value]
    model = make()
    for p in model.parameters():
        p.allreduce = False

    def change_own() -> None:  # each rank trains its expert
        change_one(model, ("0.lora_B.default.weight", "2.lora_B.default.weight")[rank])

    assert not compare(model, "nowhere", change_own)


def watch_sharded(rank: int) -> None:
    """No copy is left to compare."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    for sizes in ((2, 1), (1, 2)):  # HSDP
        mesh = dist.init_device_mesh("cpu", sizes, mesh_dim_names=("dp_replicate", "dp_shard"))
        args = SimpleNamespace(parallelism_config=SimpleNamespace(device_mesh=mesh))
        watch, model = RankWatch("raise"), make()
        watch.compare_initial(model, args)
        fully_shard(model, mesh=mesh)
        watch.begin(model)
        for number in range(2):
            step(model, 2 * number + rank)
            watch.compare_gradients(model, args)
            change(model)
        watch.compare_saved(model, args, Path("nowhere"))

    for shards in (True, False):
        model = make()
        if shards:
            fully_shard(model)
        else:
            FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        assert not ranks._own(model)
    model = make()
    model.to("meta")
    assert not ranks._own(model)


def watch_parallel(rank: int, folder: Path) -> None:
    """Tensor and expert parallelism of transformers: `explain` says so, and the watch is silent."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.distributed import DistributedConfig

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    sizes = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    if rank == 0:
        llama(num_hidden_layers=1).save_pretrained(folder / "dense")
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads)).save_pretrained(folder / "experts")
    dist.barrier()

    def reasons(kind: str, targets: dict[str, Any], **how: Any) -> tuple[Any, set[str]]:
        config = DistributedConfig(tp_size=2, **how)
        base = AutoModelForCausalLM.from_pretrained(folder / kind, distributed_config=config)
        torch.manual_seed(0)
        model = fuse(get_peft_model(base, LoraConfig(r=2, **targets)))
        RankWatch("raise").compare_initial(model, NO_MESH)
        return model, {row.reason for row in explain(model).rows if row.state == PEFT}

    _, said = reasons("dense", {"target_modules": ["q_proj", "down_proj"]})
    assert said == {"tensor parallel: its weight is sharded over devices"}
    attention = ["q_proj", "o_proj"]
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    both = {"target_modules": attention, "target_parameters": experts}
    _, said = reasons("experts", both, enable_expert_parallel=True)
    assert said == {"expert parallel: its weight is sharded over devices"}
    alone = {"target_modules": attention}
    model, said = reasons("experts", alone, enable_expert_parallel=True)
    assert not said and len(ranks._copies(model)) == 4
    watch = RankWatch("raise")
    watch.begin(model)
    for number in range(2):
        model(input_ids=ids_of(number), labels=ids_of(number)).loss.backward()
        watch.compare_gradients(model, NO_MESH)
    assert all(p.grad.any() for name, p in ranks._copies(model).items() if "lora_B" in name)


def watch_partitioned(rank: int) -> None:
    """What ZeRO-3 owns is not compared, even beside parameters that it leaves whole."""
    model = make()
    partitioned: Any = named(model, A)
    partitioned.ds_id = 0  # DeepSpeed's mark
    partitioned.data = torch.full((3,), float(rank))
    RankWatch("raise").compare_initial(model, NO_MESH)
    named(model, B).data += rank
    with pytest.raises(RuntimeError, match=re.escape(B)):
        RankWatch("raise").compare_initial(model, NO_MESH)


def watch_stages(rank: int) -> None:
    """Stages of a pipeline train parts of one model, by names of their own, or of a mesh."""
    from torch.distributed import pipelining

    schedules: Any = {
        pipelining.ScheduleGPipe: [[0], [1]],
        pipelining.Schedule1F1B: [[0], [1]],
        pipelining.ScheduleInterleaved1F1B: [[0, 2], [1, 3]],
        pipelining.ScheduleInterleavedZeroBubble: [[0, 2], [1, 3]],
        pipelining.ScheduleZBVZeroBubble: [[0, 3], [1, 2]],
    }
    for schedule, placed in schedules.items():
        stages = placed[rank]
        torch.manual_seed(0)
        whole = nn.ModuleDict({f"layer{i}": nn.Linear(8, 8) for i in range(4)})
        config = LoraConfig(r=2, target_modules=[f"layer{i}" for i in stages])
        model: Any = get_peft_model(whole, config)
        randomize(model)
        fuse(model)
        layers = [model.base_model.model[f"layer{i}"] for i in stages]
        parts = [
            pipelining.PipelineStage(layer, i, max(*placed[0], *placed[1]) + 1, torch.device("cpu"))
            for i, layer in zip(stages, layers, strict=True)
        ]
        many = len(parts) > 1
        run = schedule(parts if many else parts[0], 4, loss_fn=nn.MSELoss(), scale_grads=False)
        watch = RankWatch("raise")
        watch.begin(model)
        for args in (NO_MESH, args_of("pp")):
            x, is_last = torch.randn(8, 8), any(part.is_last for part in parts)
            run.step(*[x] * any(part.is_first for part in parts), target=x if is_last else None)
            assert all(layer.lora_B["default"].weight.grad.any() for layer in layers), schedule
            watch.compare_gradients(model, args)


def watch_all(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    watch_initial(rank)
    watch_gradients(rank)
    watch_saved(rank, Path(folder))
    watch_sharded(rank)
    watch_partitioned(rank)
    watch_parallel(rank, Path(folder))
    watch_stages(rank)


@NEEDS_GLOO
def test_watch_names_what_differs_and_nothing_else(tmp_path: Path) -> None:
    run_in_ranks(watch_all, tmp_path)


def test_watch_of_one_process_is_silent() -> None:
    watch, model = RankWatch("raise"), make()
    watch.compare_initial(model, NO_MESH)
    watch.begin(model)
    watch.compare_gradients(model, NO_MESH)
    watch.compare_saved(model, NO_MESH, Path("nowhere"))


def test_fuse_callback_refuses_another_action() -> None:
    with pytest.raises(ValueError, match=r"differing_ranks: got 'x', want 'warn' or 'raise', or N"):
        FuseCallback(differing_ranks="x")
    assert FuseCallback(differing_ranks="raise").state()["args"]["differing_ranks"] == "raise"


# Trainer

SCRIPT = """
import os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import torch
from tests.finetune.test_ranks import train_all
torch.set_num_threads(1)
train_all(sys.argv[1])
"""

FSDP = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "reshard_after_forward": True}}


def zero(stage: int, **offload: str) -> dict[str, Any]:
    settings = {f"offload_{what}": {"device": device} for what, device in offload.items()}
    return {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": {"stage": stage} | settings,
            "zero_force_ds_cpu_optimizer": False,
        }
    }


# Of each run, how it is made, and the beginnings of what is logged.
RUNS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ddp": ({}, []),
    "ddp, accumulating": ({"gradient_accumulation_steps": 2}, []),
    "ddp, checkpointing": ({"gradient_checkpointing": True}, []),
    "ddp, warm-up": ({"warmup_steps": 2, "save_steps": 1}, []),
    "ddp, unused": ({"ddp_find_unused_parameters": True}, []),
    "ddp, bfloat16": ({"bf16": True}, []),
    "ddp, buckets": ({"ddp_bucket_cap_mb": 1, "ddp_broadcast_buffers": False}, []),
    "fsdp2": (FSDP, []),
    "fsdp2, accumulating": (FSDP | {"gradient_accumulation_steps": 2}, []),
    "fsdp2, bfloat16": (FSDP | {"bf16": True}, []),
    "zero 1": (zero(1), []),
    "zero 2": (zero(2), []),
    "zero 2, offloaded": (zero(2, optimizer="cpu"), []),
    "zero 3": (zero(3), []),
    "zero 3, offloaded": (zero(3, optimizer="cpu", param="cpu"), []),
    "other seed": ({"fault": "seed"}, ["the ranks begin with different values of base_model"]),
    "other seed, fsdp2": (FSDP | {"fault": "seed"}, ["the ranks begin with different values of"]),
    "alone": (
        {"fault": "alone"},
        ["the ranks have different gradients of ", "the ranks hold different values of base_model"],
    ),
    "doubled": (
        {"fault": "doubled"},
        [
            "the ranks have different gradients of base_model.model.model.layers.0.self_attn",
            "the ranks hold different values of base_model.model.model.layers.0.self_attn",
        ],
    ),
    "lost": ({"fault": "lost"}, ["/checkpoint-2 lacks base_model.model.model.layers.0."]),
}


class Faulty(Trainer):
    fault = ""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.fault == "lost" and dist.get_rank() == 0:
            file = Path(str(output_dir), "adapter_model.safetensors")
            saved = {key: t.clone() for key, t in sorted(load_file(file).items())[1:]}
            save_file(saved, file)


class Double(TrainerCallback):
    """Double a gradient on rank 1."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named(kwargs["model"], "0.self_attn.q_proj.lora_B.default.weight").grad.mul_(
            1 + dist.get_rank()
        )


def train_all(folder: str) -> None:
    from accelerate.state import AcceleratorState, PartialState

    found: dict[str, list[str]] = {}
    environment = dict(os.environ)
    for run, (settings, _) in RUNS.items():
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]  # such as ACCELERATE_USE_FSDP
        AcceleratorState._reset_state(reset_partial_state=True)
        how = dict(settings)
        fault = how.pop("fault", "")
        args = TrainingArguments(
            f"{folder}/{run}",
            use_cpu=True,
            per_device_train_batch_size=2,
            max_steps=2,
            optim="adamw_torch",
            report_to=[],
            disable_tqdm=True,
            **{"save_steps": 2} | how,
        )
        rank = PartialState().process_index
        base = llama(intermediate_size=128)
        torch.manual_seed(rank if fault == "seed" else 0)
        model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
        with said() as lines:
            trainer = Faulty(
                model,
                args,
                train_dataset=[{"input_ids": x, "labels": x} for i in range(8) for x in ids_of(i)],
                callbacks=[*([Double()] if fault == "doubled" else []), callback := FuseCallback()],
            )
            assert callback.state()["args"]["differing_ranks"] == "warn"
            trainer.fault = fault
            if fault == "alone":  # as a loop that calls what DDP wraps
                trainer._wrap_model = lambda model, *_, **__: model  # type: ignore[method-assign]
                trainer.accelerator.prepare_model = lambda model, *_, **__: model  # type: ignore[method-assign]
            trainer.train()
        found[run] = lines
        dist.barrier()
    if dist.get_rank() == 0:
        Path(folder, "lines.json").write_text(json.dumps(found))
    else:
        assert not any(found.values()), found
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in the usual way


@NEEDS_GLOO
def test_trainer_in_two_processes_is_watched(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    launch(SCRIPT, tmp_path, str(tmp_path))
    found = json.loads((tmp_path / "lines.json").read_text())
    for run, (_, want) in RUNS.items():
        assert len(found[run]) == len(want), (run, found[run])
        for line, begin in zip(found[run], want, strict=True):
            assert begin in line, (run, line)
