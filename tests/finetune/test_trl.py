"""TRL's trainers on a fused model: two steps of each are the unfused model's.

Both runs start from the same adapters, B random, on the same data, under SGD. Their losses, each
step's gradient of each adapter and what each adapter has become are compared.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import TrainerCallback

from lora_kernels.finetune.compare import GRADIENT_LIMIT, UPDATE_LIMIT, relative_rms
from lora_kernels.integrations import FuseCallback
from lora_kernels.peft import FusedLinear, explain, fuse, merged_weights, unfuse
from lora_kernels.peft.quantize import quantize
from tests.finetune.tiny import llama, tokenizer
from tests.support.assertions import FLOAT64_RTOL, assert_bytes
from tests.support.assertions import assert_close_derived as assert_same
from tests.support.peft_models import base_bytes

pytest.importorskip("trl", exc_type=ImportError)
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

STEPS = 2
BF16_LIMIT = 1.25  # the fused error against float32 gradients, divided by stock PEFT's
SETTINGS: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 0.01, "optim": "sgd"}
SETTINGS |= {"per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "use_cpu": True}
SETTINGS |= {"bf16": False, "report_to": [], "logging_steps": 1, "save_strategy": "no"}
SETTINGS |= {"disable_tqdm": True}

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)

Results = dict[str, Tensor]


class Noted(TrainerCallback):
    """Each step's loss and gradients; before each step the adapters are merged and unmerged where
    `merging`, as GRPO does in order to hand the weights to an engine that generates.

    logged: the values of Trainer's log that are noted."""

    logged = frozenset({"loss", "eval_loss"})

    def __init__(self, model: Any, merging: bool = False) -> None:
        self.model, self.merging = model, merging
        self.results: Results = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.merging:
            return
        self.model.merge_adapter()
        for name, p in self.model.named_parameters():
            if name.endswith("base_layer.weight"):
                self.results[f"merged {state.global_step}: {name}"] = p.detach().clone()
        with torch.no_grad():
            logits = self.model(input_ids=torch.arange(12)[None]).logits
        self.results[f"merged {state.global_step}"] = logits
        self.model.unmerge_adapter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                self.results[f"gradient {state.global_step}: {name}"] = p.grad.clone()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name in self.logged & logs.keys():
            loss = torch.tensor(logs[name], dtype=torch.float64)
            self.results[f"{name} {state.global_step}"] = loss


def lora(**config: Any) -> LoraConfig:
    settings = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}
    return LoraConfig(**settings | config)


def base(dtype: torch.dtype, **changes: Any) -> Any:
    return llama(**changes).to(dtype)


def randomize(model: Any) -> None:
    """B too, since with B = 0 lora_A would get no gradient; of two adapters each another one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                std = 0.05 if "lora_B" in name else p.shape[1] ** -0.5
                p.copy_(std * torch.randn(p.shape, generator=generator))


def fused_layers(model: Any) -> int:
    return sum(isinstance(module, FusedLinear) for module in model.modules())


def run(trainer: Any, fused: bool, merging: bool = False, fresh: bool = True) -> Results:
    """Train; `fuse` it before unless a callback has."""
    model = trainer.model
    if fresh:
        randomize(model)
    if fused:
        by_callback = any(isinstance(c, FuseCallback) for c in trainer.callback_handler.callbacks)
        assert fused_layers(model) == (14 if by_callback else 0)
        fuse(model)
        explanation = explain(model)
        assert len(explanation.rows) == 14
        assert {row.backend for row in explanation.rows} <= {"cpu", "eager"}
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    noted = Noted(model, merging)
    trainer.add_callback(noted)
    trainer.train()
    results = noted.results
    for name, p in model.named_parameters():
        moved = p.detach() - start[name]
        if ".default" in name:
            assert moved.norm() > 0, name
            results[f"update: {name}"] = moved
        elif not merging:  # which leaves a rounding behind
            assert torch.equal(p, start[name]), name
    assert sum(name.startswith("loss") for name in results) == STEPS
    assert sum(name.startswith("gradient") for name in results) == STEPS * 28
    return results


def check(
    make: Any, tmp_path: Path, dtype: torch.dtype, by_callback: bool = False, **how: Any
) -> None:
    """Compare a fused run with an unfused one. make: the trainer, from its folder, the dtype and
    the callbacks; by_callback: whether FuseCallback fuses."""
    found = []
    for fused in (True, False):
        callbacks = [FuseCallback()] if fused and by_callback else []
        trainer = make(tmp_path / str(fused), dtype, callbacks)
        found.append(run(trainer, fused, **how))
        assert fused_layers(trainer.model) == (14 if fused else 0)
    got, want = found
    for name in got.keys() | want.keys():
        limit = UPDATE_LIMIT if name.startswith("update") else GRADIENT_LIMIT
        limit = FLOAT64_RTOL if dtype is torch.float64 else limit
        assert_same({name: got[name]}, {name: want[name]}, limit)


TEXTS = [f"{i} squared? It is {i * i}." for i in range(8)]
PAIRS = {
    "prompt": [f"{i} squared? " for i in range(8)],
    "chosen": [f"It is {i * i}." for i in range(8)],
    "rejected": [f"No, {i * i + 1}." for i in range(8)],
}


def parts(data: dict[str, list[str]], callbacks: Any = ()) -> dict[str, Any]:
    """The arguments of every trainer."""
    train, words = Dataset.from_dict(data), tokenizer()
    made = {"train_dataset": train, "processing_class": words, "peft_config": lora()}
    return made | {"callbacks": list(callbacks)}


def sft(out: Path, dtype: torch.dtype, callbacks: Any, config: Any = None, **settings: Any) -> Any:
    args = SFTConfig(str(out), max_length=64, **SETTINGS | settings)
    made = parts({"text": TEXTS}, callbacks) | {"peft_config": config or lora()}
    held_out = Dataset.from_dict({"text": TEXTS[:3]})
    return SFTTrainer(base(dtype), args, eval_dataset=held_out, **made)


def dpo(out: Path, dtype: torch.dtype, callbacks: Any, own: bool = False) -> Any:
    """own: the model comes with its adapter."""
    model = get_peft_model(base(dtype), lora()) if own else base(dtype)
    made = parts(PAIRS, callbacks) | ({"peft_config": None} if own else {})
    return DPOTrainer(model, args=DPOConfig(str(out), max_length=64, **SETTINGS), **made)


def grpo(out: Path, dtype: torch.dtype, callbacks: Any, beta: float = 0.0) -> Any:
    def reward(completions: Any, **kwargs: Any) -> list[float]:
        return [float(len(set(c))) for c in completions]

    how = {"max_completion_length": 6, "num_generations": 4, "beta": beta}
    made = parts({"prompt": [f"{i} squared?" for i in range(8)]}, callbacks)
    return GRPOTrainer(base(dtype), reward, GRPOConfig(str(out), **how, **SETTINGS), **made)


@DTYPES
def test_sft(tmp_path: Path, dtype: torch.dtype) -> None:
    check(sft, tmp_path, dtype)


def test_sft_of_a_4bit_model(tmp_path: Path) -> None:
    """Its adapters are cast to bfloat16: the gradients are as near to those of float32 ones as the
    unfused model's."""
    found = []
    for number, (fused, dtype) in enumerate(
        [(True, torch.bfloat16), (False, torch.bfloat16), (False, torch.float32)]
    ):
        # bitsandbytes' CPU kernel misreads scales where a row is no multiple of the block.
        quantized = base(torch.float32, intermediate_size=128)
        quantize(quantized, "nf4", torch.float32, torch.device("cpu"))
        args = SFTConfig(str(tmp_path / str(number)), max_length=64, **SETTINGS)
        trainer = SFTTrainer(quantized, args, **parts({"text": TEXTS}))
        adapters = [p for p in trainer.model.parameters() if p.requires_grad]
        assert {p.dtype for p in adapters} == {torch.bfloat16}
        randomize(trainer.model)  # rounded to bfloat16 in each
        for p in adapters:
            p.data = p.data.to(dtype)
        results = run(trainer, fused, fresh=False)
        grads = [g.float().flatten() for n, g in results.items() if n.startswith("gradient 0")]
        found.append(torch.cat(grads))
    ours, peft, exact = found
    assert relative_rms(ours, exact) <= BF16_LIMIT * relative_rms(peft, exact)
    assert relative_rms(peft, exact) < 0.1


@DTYPES
@pytest.mark.parametrize("adapter", ["peft_config", "PEFT model"])
def test_dpo(tmp_path: Path, dtype: torch.dtype, adapter: str) -> None:
    """The reference is the model with its adapter disabled where the trainer made the adapter, and
    a second adapter, which it copies, where the model came with one."""
    check(partial(dpo, own=adapter == "PEFT model"), tmp_path, dtype)


@DTYPES
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo(tmp_path: Path, dtype: torch.dtype, beta: float) -> None:
    check(partial(grpo, beta=beta), tmp_path, dtype, merging=True)


class Engine:
    """A stub of vLLM beside the trainer: a model of its own, which takes streamed weights."""

    def __init__(self, trained: Any) -> None:
        self.trained, self.model = trained, base(torch.bfloat16)
        self.received: Results = {}
        self.syncs = 0
        part = SimpleNamespace(model=self)
        for name in ("model_runner", "driver_worker", "model_executor", "llm_engine"):
            part = SimpleNamespace(**{name: part})
        self.llm_engine = part.llm_engine

    def load_weights(self, named: Any) -> None:
        self.received |= {name: t.clone() for name, t in named}

    def reset_prefix_cache(self) -> None:
        self.model.load_state_dict(self.received)
        self.received, self.syncs = {}, self.syncs + 1


def engine_generation(by_stream: bool) -> Any:
    """TRL's calls around the engine, or, if `by_stream`, `merged_weights` in their place."""

    class Generation(VLLMGeneration):  # type: ignore[misc]
        def _init_vllm(self) -> None:
            self.llm = Engine(self.model)

        def _iter_named_params(self) -> Any:
            return merged_weights(self.model) if by_stream else super()._iter_named_params()

        def sync_weights(self) -> None:
            before = base_bytes(self.model)
            with torch.random.fork_rng([]):
                theirs = unfuse(copy.deepcopy(self.model)).merge_and_unload()
            super().sync_weights()
            assert_bytes(self.llm.model.state_dict(), theirs.state_dict())
            assert_bytes(base_bytes(self.model), before)

        def generate(self, prompts: Any, *args: Any, **kwargs: Any) -> Any:
            ids = []
            for i, prompt in enumerate(prompts):  # greedy, but for the first token
                start = torch.tensor([[*prompt, 40 + i]])
                with torch.no_grad():
                    done = self.llm.model.generate(start, max_new_tokens=5, do_sample=False)
                ids.append(done[0, len(prompt) :].tolist())
            return prompts, ids, [[[0.0]] * len(each) for each in ids], None

    return Generation


@pytest.mark.parametrize("by_stream", [False, True])
def test_grpo_with_an_engine_gets_peft_s_merged_weights_and_keeps_the_base(
    by_stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of its syncs, with AdamW's steps between."""
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", engine_generation(by_stream))

    def reward(completions: Any, **kwargs: Any) -> list[float]:
        return [float(len(set(c))) for c in completions]

    how = {"max_completion_length": 6, "num_generations": 4, "use_vllm": True, "beta": 0.0}
    how |= {"vllm_mode": "colocate", "vllm_importance_sampling_correction": False, "max_steps": 4}
    made = parts({"prompt": [f"{i} squared?" for i in range(8)]})
    made["callbacks"] = [FuseCallback(exact_merge=None if by_stream else "host")]
    config = GRPOConfig(str(tmp_path), **SETTINGS | how | {"optim": "adamw_torch"})
    trainer = GRPOTrainer(base(torch.bfloat16), reward, config, **made)
    randomize(trainer.model)
    before = base_bytes(trainer.model)
    trainer.train()
    assert trainer.vllm_generation.llm.syncs == 4
    assert_bytes(base_bytes(trainer.model), before)
