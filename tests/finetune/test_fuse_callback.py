"""`FuseCallback` in transformers' and TRL's trainers: the unfused run, and a resumed one."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

import lora_kernels
from lora_kernels.backends.cpu import native
from lora_kernels.finetune import newest_checkpoint
from lora_kernels.integrations import FuseCallback
from lora_kernels.integrations.trainer import VerdictLog
from lora_kernels.layers import adaptable_experts
from lora_kernels.peft import explain
from lora_kernels.peft.explain_rows import KERNELS, LIBRARY
from lora_kernels.peft.frozen import StreamedLinear
from lora_kernels.peft.quantize import quantize
from tests.finetune.tiny import llama, weights
from tests.support.assertions import FLOAT64_RTOL, assert_bitwise_equal, assert_bytes
from tests.support.assertions import assert_close_derived as assert_same
from tests.support.peft_models import base_bytes, moe
from tests.support.processes import run_python

pytest.importorskip("trl", exc_type=ImportError)
from tests.finetune import test_trl as trl_tests
from tests.finetune.test_trl import fused_layers


def arguments(out: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(str(out), **trl_tests.SETTINGS | settings)


@pytest.mark.parametrize("make", [trl_tests.sft, trl_tests.dpo, trl_tests.grpo])
def test_fuse_callback_in_a_trl_trainer_equals_the_unfused_run(make: Any, tmp_path: Path) -> None:
    """Losses, each step's gradients, and what the adapters have become."""
    merging = make is trl_tests.grpo
    trl_tests.check(make, tmp_path, torch.float64, by_callback=True, merging=merging)


def test_fuse_callback_with_checkpointing_and_evaluation_equals_the_unfused_run(
    tmp_path: Path,
) -> None:
    """The losses of evaluations between the steps too."""
    evaluated = []

    def make(out: Path, dtype: torch.dtype, callbacks: Any) -> Any:
        trainer = trl_tests.sft(
            out, dtype, callbacks, gradient_checkpointing=True, eval_strategy="steps", eval_steps=1
        )
        evaluated.append(trainer)
        return trainer

    trl_tests.check(make, tmp_path, torch.float64, by_callback=True)
    for trainer in evaluated:
        losses = [line for line in trainer.state.log_history if "eval_loss" in line]
        assert [line["step"] for line in losses] == [1, 2]


def sft(out: Path, *callbacks: Any, **settings: Any) -> Any:
    """With dropout, whose masks a resumed run must draw as the whole one did."""
    callbacks = (FuseCallback(), *callbacks)
    config = trl_tests.lora(lora_dropout=0.1)
    return trl_tests.sft(out, torch.float32, callbacks, config, **settings)


CHECKPOINTS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
CHECKPOINTS |= {"optim": "adamw_torch"}


class Broken(TrainerCallback):
    """Ends the run within the third step, when its gradients are there and its update is not."""

    def __init__(self, end: Callable[[], None]) -> None:
        self.end = end

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.end()


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def train_until_killed(out: str) -> None:
    torch.set_num_threads(1)
    end = Broken(lambda: os.kill(os.getpid(), signal.SIGKILL))
    sft(Path(out), end, **CHECKPOINTS).train()


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fuse_callback_in_a_broken_and_resumed_run_ends_in_the_same_bits(
    killed: bool, tmp_path: Path
) -> None:
    """A run that SIGKILL ends has a process of its own, most of whose time the imports take."""
    if killed:
        module = "tests.finetune.test_fuse_callback"
        code = f"import sys; from {module} import train_until_killed as train; train(sys.argv[1])"
        done = run_python("-c", code, tmp_path / "killed")
        assert done.returncode == -signal.SIGKILL, done.stderr
    else:
        with pytest.raises(KeyboardInterrupt):
            sft(tmp_path / "killed", Broken(raise_interrupt), **CHECKPOINTS).train()
    whole = sft(tmp_path / "whole", **CHECKPOINTS)
    whole.train()
    assert newest_checkpoint(tmp_path / "killed").name == "checkpoint-2"  # type: ignore[union-attr]
    resumed = sft(tmp_path / "killed", **CHECKPOINTS)
    resumed.train(resume_from_checkpoint=True)
    assert fused_layers(whole.model) == fused_layers(resumed.model) == 14
    losses = [[line.get("loss") for line in t.state.log_history] for t in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4  # three steps and a summary
    assert_bitwise_equal(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("kind", [FuseCallback, VerdictLog])
def test_callback_added_to_a_resumed_run_is_saved_with_it(kind: Any, tmp_path: Path) -> None:
    """Trainer looks up each callback in the checkpoint's state when it saves the next one."""
    make = partial(trl_tests.sft, tmp_path, torch.float32, config=trl_tests.lora())
    make((), **CHECKPOINTS | {"max_steps": 1}).train()
    resumed = make((kind(),), **CHECKPOINTS | {"max_steps": 2})
    resumed.train(resume_from_checkpoint=True)
    saved = TrainerState.load_from_json(f"{newest_checkpoint(tmp_path)}/trainer_state.json")
    assert saved.global_step == 2 and kind.__name__ in (saved.stateful_callbacks or {})


def test_fuse_callback_restored_from_a_checkpoint_has_its_settings(tmp_path: Path) -> None:
    """Trainer makes a new callback of the state that the checkpoint has."""
    settings = {"linears": True, "loss": True, "qualify": "off"}
    settings |= {"blocks": False, "cast_adapters": True, "exact_merge": "device"}
    settings |= {"mlp_tile_rows": 64}
    make = partial(trl_tests.sft, tmp_path, torch.float32, config=trl_tests.lora())
    for steps in (1, 2):
        how = CHECKPOINTS | {"max_steps": steps, "restore_callback_states_from_checkpoint": True}
        given = FuseCallback(**settings)
        trainer = make((given,), **how)
        trainer.train(resume_from_checkpoint=steps > 1)
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, FuseCallback)]
    assert len(found) == 1 and found[0] is not given and found[0].settings == settings


OURS = KERNELS if native.module else LIBRARY


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("lora_kernels: ")]


def test_fuse_callback_says_why_layers_run_library_gemms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    data = [{"input_ids": ids, "labels": ids} for ids in torch.arange(96).view(8, 12)]
    callbacks = [FuseCallback(loss=True)]
    trainer = Trainer(model, arguments(tmp_path), train_dataset=data, callbacks=callbacks)
    with lora_kernels.backend("eager"):
        trainer.train()
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("lora_kernels: "))
    assert lines[at : at + 2] == [
        f"lora_kernels: 4 LoRA layers: 4 {LIBRARY}; the loss is {LIBRARY}",
        f"  4 {LIBRARY}: the eager backend was requested",
    ]


def test_fuse_callback_refuses_another_word_before_a_trainer_has_it() -> None:
    with pytest.raises(ValueError, match="qualify: got 'nope', want one of 'cached'"):
        FuseCallback(qualify="nope")
    with pytest.raises(ValueError, match="exact_merge: got 'nope', want 'host' or 'device'"):
        FuseCallback(exact_merge="nope")


class Syncing(TrainerCallback):
    """Merges and unmerges before each step, as a trainer that hands its weights to an engine."""

    def __init__(self, model: Any) -> None:
        self.model, self.cycles = model, 0
        self.before = base_bytes(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.merge_adapter()
        merged = base_bytes(self.model)
        is_changed = any(not torch.equal(merged[n], t) for n, t in self.before.items())
        assert is_changed or self.cycles == 0  # where lora_B is 0
        self.model.unmerge_adapter()
        assert_bytes(base_bytes(self.model), self.before)
        self.cycles += 1


@pytest.mark.filterwarnings("ignore:.*erge lora module to 4-bit")
@pytest.mark.parametrize("base", ["bfloat16", "float32", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_fuse_callback_with_exact_merges_trains_as_without_merges(
    kind: str, base: str, tmp_path: Path
) -> None:
    """20 cycles, with Trainer's default optimizer in between."""
    dtype = torch.bfloat16 if base == "bfloat16" else torch.float32
    data = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(80 * 12) % 61).view(80, 12)]
    found = []
    for merging in (True, False):
        model = moe().unload() if kind == "mixtral" else llama(intermediate_size=128)
        model = model.to(dtype)
        if base == "nf4":
            pytest.importorskip("bitsandbytes")
            quantize(model, "nf4", dtype, torch.device("cpu"))
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules=["q_proj", "v_proj"],
            target_parameters=experts if kind == "mixtral" else None,
        )
        torch.manual_seed(1)
        with adaptable_experts(model):
            model = get_peft_model(model, config)
        settings = {"max_steps": 20, "use_cpu": True, "report_to": [], "save_strategy": "no"}
        settings |= {"logging_steps": 1, "learning_rate": 0.01, "disable_tqdm": True}
        args = TrainingArguments(str(tmp_path), **settings)
        trainer = Trainer(
            model, args, train_dataset=data, callbacks=[FuseCallback(exact_merge="host")]
        )
        syncing = Syncing(model)
        if merging:
            trainer.add_callback(syncing)
        trainer.train()
        assert syncing.cycles == (20 if merging else 0)
        assert_bytes(base_bytes(model), syncing.before)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        found.append((losses, weights(model)))
    (losses, adapters), (want, unmerged) = found
    assert losses == want and len(losses) == 20 and losses[0] != losses[-1]
    assert_bitwise_equal(adapters, unmerged)


def test_fuse_callback_prints_one_line_that_explain_and_assert_fused_agree_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line is visible where logging is as Python sets it up, and not repeated."""
    trainer = sft(tmp_path, max_steps=1)
    assert not printed(capsys)
    trainer.train()
    trainer.train()
    assert printed(capsys) == [f"lora_kernels: 14 LoRA layers: 14 {OURS}"]
    explain(trainer.model).assert_fused()
    with lora_kernels.backend("eager"):
        trainer.train()
        assert printed(capsys) == [f"lora_kernels: 14 LoRA layers: 14 {LIBRARY}"]
        explain(trainer.model).assert_fused()


@pytest.mark.parametrize("main", [True, False])
def test_fuse_callback_speaks_in_the_main_process_alone(
    main: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"]))
    state = SimpleNamespace(is_world_process_zero=main)
    callback = FuseCallback()
    callback.on_init_end(None, state, None, model=model)
    callback._report(model, state)
    assert printed(capsys) == [f"lora_kernels: 2 LoRA layers: 2 {OURS}"] * main
    assert fused_layers(model) == 2


def test_fuse_callback_warns_once_of_many_layers_left_to_peft(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if what leaves them to PEFT comes after the trainer's `__init__`, as FSDP1 does."""
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    first, second = (layer.self_attn for layer in model.base_model.model.model.layers)
    first.q_proj.base_layer.weight.requires_grad_()
    data = [{"input_ids": ids, "labels": ids} for ids in torch.arange(96).view(8, 12)]
    callbacks = [FuseCallback(loss=True)]
    trainer = Trainer(model, arguments(tmp_path), train_dataset=data, callbacks=callbacks)
    second.q_proj.lora_A.default.register_forward_pre_hook(lambda *_: None)
    model.get_output_embeddings().register_forward_hook(lambda *_: None)
    trainer.train()
    shares = f"2 PEFT's (57.1%); 2 {OURS} (42.9%) of the LoRA parameters"
    loss = "; the loss is PyTorch's"
    lines = capsys.readouterr().out.splitlines()
    at = lines.index(f"lora_kernels: 4 LoRA layers: {shares}{loss}")
    hook = "adapter 'default': a hook sits on its nn.Linear"
    reasons = [f"  1 PEFT's: {reason}" for reason in ("the base weight is trainable", hook)]
    assert [line for line in lines[at + 1 :] if " PEFT's: " in line] == reasons
    trainer.train()
    said = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "lora_kernels"]
    remedy = "as fast as without lora_kernels: lora_kernels.peft.explain(model) has the reasons"
    loss = "base_model.model.loss is transformers' own: its head: a hook sits on it"
    assert said == [
        ("WARNING", f"2 of 4 LoRA layers are PEFT's, {remedy}"),
        ("WARNING", loss),
    ]


def test_fuse_callback_of_few_layers_left_to_peft_prints_them_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules="all-linear"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.weight.requires_grad_()
    data = [{"input_ids": ids, "labels": ids} for ids in torch.arange(96).view(8, 12)]
    callbacks = [FuseCallback()]
    Trainer(model, arguments(tmp_path), train_dataset=data, callbacks=callbacks).train()
    shown = capsys.readouterr().out
    assert "14 LoRA layers: 13" in shown and "  1 PEFT's: the base weight is trainable" in shown
    assert not [r for r in caplog.records if r.name == "lora_kernels"]


def test_fuse_callback_of_a_model_without_adapters_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without LoRA layers.*peft_config"):
        Trainer(llama(), arguments(tmp_path), callbacks=[FuseCallback()])
    ia3 = get_peft_model(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="a PEFT model of IA3 without LoRA layers"):
        Trainer(ia3, arguments(tmp_path), callbacks=[FuseCallback()])


def test_fuse_callback_merges_and_unloads(tmp_path: Path) -> None:
    trainer = sft(tmp_path, max_steps=1, gradient_checkpointing=True)
    trainer.train()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        want = trainer.model.eval()(input_ids=ids).logits
        merged = trainer.model.merge_and_unload()
        got = merged(input_ids=ids).logits
    assert fused_layers(merged) == 0
    # Sums of at most 2**8 float32 products in two orders, through two layers.
    torch.testing.assert_close(got, want, rtol=2.0**-14, atol=2.0**-14)


@pytest.fixture
def one_process_group() -> Iterator[None]:
    """Set up a group of this process alone, without a port."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fuse_callback_before_fsdp2_equals_the_unsharded_run(
    tmp_path: Path, one_process_group: None
) -> None:
    """Sharded as accelerate's `fsdp2_prepare_model` does between the trainer's `__init__` and its
    first step; accelerate itself refuses FSDP on a CPU."""
    from torch.distributed.fsdp import fully_shard

    found = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(llama().double(), trl_tests.lora())
        trl_tests.randomize(model)
        data = [{"input_ids": ids, "labels": ids} for ids in torch.arange(96).view(8, 12)]
        trainer = Trainer(
            model, arguments(tmp_path), train_dataset=data, callbacks=[FuseCallback()]
        )
        if sharded:
            for layer in model.get_base_model().model.layers:
                fully_shard(layer)
            fully_shard(model)
        trainer.train()
        assert fused_layers(model) == 14
        found.append({n: p.full_tensor() if sharded else p for n, p in weights(model).items()})
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        found[-1]["losses"] = torch.tensor(losses, dtype=torch.float64)
    assert_same(*found, rtol=FLOAT64_RTOL)


def test_fuse_callback_with_linears_streams_plain_layers_too(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    plain = [name for name, m in model.named_modules() if type(m) is torch.nn.Linear]
    Trainer(model, arguments(tmp_path), callbacks=[FuseCallback(linears=True)])
    kinds = {name: type(m) for name, m in model.named_modules()}
    found = {name for name in kinds if kinds[name] is StreamedLinear}
    assert found and found == {name for name in plain if not re.search("lora_|base_layer", name)}
