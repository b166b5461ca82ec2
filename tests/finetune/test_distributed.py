"""`torchrun` with two processes is one process with the batch of both: DDP, FSDP2."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import MixtralConfig, MixtralForCausalLM

from lora_kernels.cli import main
from lora_kernels.finetune import LoRATrainer, load_chat, newest_checkpoint, training_arguments
from lora_kernels.integrations import FuseCallback
from lora_kernels.peft import explain, fuse
from lora_kernels.peft.explain_rows import KERNELS, PEFT
from lora_kernels.peft.quantize import quantize
from tests.finetune.test_trainer import adapted
from tests.finetune.tiny import llama, metrics, save_model, tokenizer, weights
from tests.support.assertions import assert_bitwise_equal, assert_close_derived
from tests.support.peft_models import OpCounter, count_ops, randomize
from tests.support.processes import run_python

NEEDS_GLOO = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="no gloo",
)

# One launch for all tests here: a process imports for longer than it computes.
SCRIPT = """
import gc, os, sys
import torch
from tests.finetune.test_distributed import command, flatten, shard, train
gc.freeze()  # Trainer collects garbage often, each time through all modules
torch.set_num_threads(1)
folder, file = sys.argv[1:]
train(f"{folder}/two", file)
command(folder, file)
shard(folder)
flatten(folder)
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort a process that ends in the usual way
"""


def train(out: str, file: str) -> None:
    model = adapted()
    batch = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    how = {
        "max_steps": 6,
        "per_device_train_batch_size": batch,
        "learning_rate": 0.5,
        "save_steps": 3,
    }
    args = training_arguments(out, **how, optim="sgd", use_cpu=True)
    trainer = LoRATrainer(
        model, args, train_dataset=load_chat(file, tokenizer()), processing_class=tokenizer()
    )
    trainer.train(resume_from_checkpoint=newest_checkpoint(out) is not None)
    if args.process_index == 0:
        torch.save(weights(model), Path(out, "weights.pt"))


def launch(code: str, folder: Path, *argv: str) -> str:
    """Run the code by torchrun in two processes, and return what they print."""
    script = folder / "script.py"
    script.write_text(code)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = run_python(*torchrun, script, *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def launched(lines: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of what two processes leave behind, and what they print."""
    folder = tmp_path_factory.mktemp("distributed")
    return folder, launch(SCRIPT, folder, str(folder), str(lines))


@NEEDS_GLOO
def test_two_processes_and_one(lines: Path, launched: tuple[Path, str]) -> None:
    """Losses, norms and weights; and what two have saved one goes on with."""
    file, (tmp_path, _) = str(lines), launched

    def results(out: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        saved = torch.load(tmp_path / out / "weights.pt", weights_only=True)
        return metrics(tmp_path / out), saved

    train(str(tmp_path / "one"), file)
    alone, both = results("one"), results("two")
    shutil.copytree(tmp_path / "two" / "checkpoint-3", tmp_path / "three" / "checkpoint-3")
    train(str(tmp_path / "three"), file)
    for steps, found in (both, results("three")):
        # A gradient is the sum of two halves, each of a few hundred float32 terms.
        for got, want in zip(steps, alone[0], strict=True):
            for name in ("loss", "grad_norm", "learning_rate"):
                assert got[name] == pytest.approx(want[name], rel=2.0**-15), (got["step"], name)
        assert_close_derived(found, alone[1], rtol=2.0**-15)


COMMAND = ["--steps", "4", "--rank", "3", "--lr", "0.01", "--save-steps", "2"]


def command(folder: str, file: str) -> None:
    """Run `finetune`; its exit status has to be 0 in each process."""
    out, base = Path(folder, "command"), Path(folder, "base")
    batch = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    if os.environ.get("RANK", "0") == "0":
        save_model(base, llama())
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    argv = ["finetune", "--model", base, "--data", file, "--out", out, "--batch", batch, *COMMAND]
    assert main([str(word) for word in argv]) == 0


@NEEDS_GLOO
def test_command_in_two_processes_is_one_run(launched: tuple[Path, str], lines: Path) -> None:
    """Both processes write to one folder, which the first one locks."""
    folder, shown = launched
    assert "4/4" in shown
    assert len(metrics(folder / "command")) == 4


# FSDP2

CASES: dict[str, dict[str, Any]] = {"dense": {}, "4-bit": {}, "dora": {"use_dora": True}}
CASES["tiles"] = {}
TILES: dict[str, dict[str, Any]] = {"tiles": {"mlp_tile_rows": 5}}  # of 24 rows
FSDP_STEPS = 2
SGD = partial(torch.optim.SGD, lr=0.5)
# Above the gradients' rounding errors, which a small ε would make as large as a step.
FUSED_ADAMW = partial(torch.optim.AdamW, lr=0.05, eps=1e-2, fused=True)


def to_shard(case: str) -> Any:
    # bitsandbytes' CPU kernel misreads scales where a row is no multiple of the block.
    base = llama(intermediate_size=128).requires_grad_(False)
    if case == "4-bit":
        quantize(base, "nf4", torch.float32, torch.device("cpu"))
    config = LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", **CASES[case])
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


ON_EXPERTS = {"SGD": SGD, "AdamW": FUSED_ADAMW}


def experts_to_shard() -> Any:
    """LoRA on the experts of a mixture, unfused. Gathered values come to lie where others lay."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    names = [f"mlp.experts.{name}_proj" for name in ("gate_up", "down")]
    lora = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], target_parameters=names)
    model = get_peft_model(MixtralForCausalLM(config), lora)
    randomize(model)
    return model


def ids_of(rank: int) -> torch.Tensor:
    return torch.randint(260, (2, 12), generator=torch.Generator().manual_seed(rank))


def evaluated(model: Any) -> torch.Tensor:
    """Twice: the second call may be one that was prepared."""
    model.eval()
    with torch.no_grad():
        logits = torch.stack([model(input_ids=ids_of(0)).logits for _ in range(2)])
    model.train()
    return logits


def stepped(
    model: Any, ranks: Iterable[int], optimizer_of: Callable[..., torch.optim.Optimizer] = SGD
) -> dict[str, torch.Tensor]:
    """Steps of an optimizer on the mean of these ranks' losses, with an evaluation before each, and
    what there is to compare of them."""
    found: dict[str, torch.Tensor] = {}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = optimizer_of(trained.values())
    ranks = list(ranks)
    for step in range(FSDP_STEPS):
        found[f"logits {step}"] = evaluated(model)
        losses = [model(input_ids=ids_of(r), labels=ids_of(r)).loss for r in ranks]
        torch.stack(losses).mean().backward()
        found |= {f"loss {step} of {r}": x.detach() for r, x in zip(ranks, losses, strict=True)}
        found |= {f"gradient {step} of {n}": whole(p.grad) for n, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
    found |= {f"trained {n}": whole(p.detach()) for n, p in trained.items()}
    return found


def whole(t: Any) -> torch.Tensor:
    full: torch.Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return full.clone()


def assert_explained(model: Any) -> None:
    """Between forwards `explain` says what it says within one."""
    stored = dict(model.named_parameters())
    before, inside = explain(model), []
    assert all(p is stored[name] for name, p in model.named_parameters())
    name = "base_model.model.model.layers.1.mlp.up_proj"
    hook = model.get_submodule(name).register_forward_hook(
        lambda layer, x, y: inside.append(explain(layer).rows[0])
    )
    ops = count_ops(lambda: model(input_ids=ids_of(0)))
    assert ops.get("lora_linear", 0) + ops.get("lora_linear_quantized", 0) == 14
    hook.remove()
    said = next(row for row in before.rows if row.layer == name)
    assert said.reason == f"{inside[0].reason}; FSDP2 gathers its parameters for the call"
    assert said[1:4] == inside[0][1:4]
    assert {row.state for row in before.rows} == {KERNELS}, before


def shard(folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    rank = torch.distributed.get_rank()
    for case in CASES:
        model = to_shard(case)
        if case != "dense":  # which is fused when it is sharded already
            fuse(model, **TILES.get(case, {}))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
        fuse(model, **TILES.get(case, {}))
        local = [p.to_local().numel() for p in model.parameters()]
        found = {"local": torch.tensor(local)}
        if case == "tiles":
            tiled = [row for row in explain(model).blocks if "in tiles" in row.strategy]
            assert len(tiled) == 2, explain(model)
        else:
            assert_explained(model)
        found |= stepped(model, [rank])
        codes = {n: p for n, p in model.named_parameters() if not p.is_floating_point()}
        found |= {f"codes of {n}": whole(p) for n, p in codes.items()}
        found["logits after"] = evaluated(model)
        checkpoint.save(model.state_dict(), checkpoint_id=f"{folder}/{case}")
        torch.save(found, f"{folder}/{case}-{rank}.pt")
    for name, optimizer in ON_EXPERTS.items():
        model = fuse(experts_to_shard())
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
        torch.save(stepped(model, [rank], optimizer), f"{folder}/experts-{name}-{rank}.pt")
    replicated = DistributedDataParallel(fuse(to_shard("tiles"), **TILES["tiles"]))
    found = {n.replace("module.", ""): t for n, t in stepped(replicated, [rank]).items()}
    torch.save(found, f"{folder}/ddp-{rank}.pt")


@NEEDS_GLOO
def test_fully_sharded(launched: tuple[Path, str]) -> None:
    """Two ranks of FSDP2 are one process: losses, gradients, updates, evaluations in between; the
    codes of a 4-bit base keep every bit; and one process loads what two have saved."""
    tmp_path, _ = launched
    for case in CASES:
        found = [torch.load(tmp_path / f"{case}-{r}.pt", weights_only=True) for r in (0, 1)]
        model = fuse(to_shard(case))
        first, second = (each.pop("local") for each in found)
        assert (first + second).tolist() == [p.numel() for p in model.parameters()]
        assert 0.45 < first.sum() / (first + second).sum() < 0.55
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        want = stepped(model, (0, 1))
        both = found[1] | found[0]
        after, codes = both.pop("logits after"), {n for n in both if n.startswith("codes of ")}
        assert len(codes) == (14 if case == "4-bit" else 0)
        for name in codes:
            assert torch.equal(both.pop(name), start[name.removeprefix("codes of ")]), name
        assert both.keys() == want.keys()
        for name, ref in want.items():
            got = both[name]
            if name.startswith("trained "):
                before = start[name.removeprefix("trained ")]
                got, ref = got - before, ref - before
            # A gradient is the sum of two halves, each of a few hundred float32 terms.
            assert (got - ref).norm() <= 2.0**-15 * ref.norm(), (case, name)
            other = found[1].get(name)
            assert other is None or "logits" in name or torch.equal(other, both[name]), name

        loaded = fuse(to_shard(case), **TILES.get(case, {}))
        saved = checkpoint.FileSystemReader(tmp_path / case).read_metadata().state_dict_metadata
        state = {n: t for n, t in loaded.state_dict().items() if n in saved}
        assert {n for n, _ in loaded.named_parameters()} <= state.keys()
        with torch.no_grad():
            for name, p in loaded.named_parameters():
                if "lora_" in name:
                    p.zero_()
        checkpoint.load(state, checkpoint_id=tmp_path / case)
        for name, p in loaded.named_parameters():
            if p.requires_grad:
                assert torch.equal(p, both[f"trained {name}"]), name
        assert torch.equal(evaluated(loaded), after)
    found = [torch.load(tmp_path / f"ddp-{r}.pt", weights_only=True) for r in (0, 1)]
    want, both = stepped(to_shard("tiles"), (0, 1)), found[1] | found[0]
    assert both.keys() == want.keys()
    for name, ref in want.items():
        assert (both[name] - ref).norm() <= 2.0**-15 * ref.norm(), name
    for name, optimizer in ON_EXPERTS.items():
        found = [torch.load(tmp_path / f"experts-{name}-{r}.pt", weights_only=True) for r in (0, 1)]
        want, both = stepped(experts_to_shard(), (0, 1), optimizer), found[1] | found[0]
        assert both.keys() == want.keys()
        for key, ref in want.items():
            # AdamW divides by a gradient's own size, which makes its roundings larger.
            rtol = 2.0**-10 if name == "AdamW" else 2.0**-15
            assert (both[key] - ref).norm() <= rtol * ref.norm(), (name, key)
        first, last = want["logits 0"], want["logits 1"]
        assert (last - first).norm() > 2.0**-7 * first.norm()


# FSDP1


def flatten(folder: str) -> None:
    """Compare a fused model with stock PEFT's, both wrapped as a whole or as PEFT advises."""
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    rank = torch.distributed.get_rank()
    state = SimpleNamespace(is_world_process_zero=rank == 0, stateful_callbacks={}, global_step=0)
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = LlamaDecoderLayer.__name__
    found = {}
    for case in ("whole", "advised"):
        logits: list[list[torch.Tensor]] = []
        for fused in (False, True):
            model, callback = to_shard("dense"), FuseCallback(linears=True)
            if fused:
                callback.on_init_end(None, state, None, model=model)
            policy = fsdp_auto_wrap_policy(model) if case == "advised" else None
            model = FullyShardedDataParallel(
                model,
                auto_wrap_policy=policy,
                use_orig_params=case == "whole",
                device_id=torch.device("cpu"),
            )
            if fused:
                callback.on_train_begin(None, state, None, model=model)
                assert {row.state for row in explain(model).rows} == {PEFT}
            logits.append([])
            for no_grad in (False, True):
                with torch.set_grad_enabled(not no_grad), OpCounter() as counter:
                    logits[-1].append(model(input_ids=ids_of(0)).logits.detach())
                assert not {name for name in counter.counts if name.startswith("lora_")}
        found[case] = logits
    torch.save(found, f"{folder}/{rank}.pt")


@NEEDS_GLOO
def test_fuse_callback_under_fsdp1_says_peft_s_forward_runs(launched: tuple[Path, str]) -> None:
    """The line is printed after wrapping; PEFT's forward does run, with PEFT's bits."""
    tmp_path, shown = launched
    lines = [line for line in shown.splitlines() if line.startswith("lora_kernels: ")]
    assert len(lines) == 2  # of the main process
    for line in lines:
        assert line.startswith("lora_kernels: 14 LoRA layers: 14 PEFT's; our GEMV serves 0 of 1")
    for rank in (0, 1):
        for stock, fused in torch.load(tmp_path / f"{rank}.pt", weights_only=True).values():
            assert_bitwise_equal(fused, stock)
