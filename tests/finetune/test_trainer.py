"""Trained and frozen parameters, updates beside plain PyTorch's, and runs that break off."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import DataCollatorWithFlattening, TrainerCallback, TrainerState

from lora_kernels.bench import process_memory
from lora_kernels.finetune import TrainingError, UsageError, checkpoints
from lora_kernels.finetune.chat import ChatData, Collator, load_chat
from lora_kernels.finetune.checkpoints import (
    damage_reason,
    find_intact,
    named_write,
    newest_checkpoint,
    steps_done,
)
from lora_kernels.finetune.trainer import (
    PEAK,
    DeadRunCheck,
    LoRATrainer,
    PeakMemory,
    _saves_left,
    check_trainable,
    losses,
    training_arguments,
)
from tests.finetune.tiny import llama, metrics, tokenizer, weights, write_lines
from tests.support.processes import run_python

# A sum of a few hundred float32 products in another order, through two layers and four steps.
RTOL = 2.0**-15


def adapted(
    dropout: float = 0.0, seed: int = 0, adapter: str = "default", **config: Any
) -> PeftModel:
    """B random, since with B = 0 lora_A would get no gradient."""
    base = llama()
    torch.manual_seed(seed)
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    lora = LoraConfig(lora_dropout=dropout, **settings | config)
    model = get_peft_model(base, lora, adapter_name=adapter)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return model


def trainer(out: Path, data: Any, model: Any = None, **settings: Any) -> LoRATrainer:
    own = ("eval_dataset", "lora_plus_ratio", "patience", "callbacks", "data_collator")
    passed = {name: settings.pop(name) for name in own if name in settings}
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": 3,
        "use_cpu": True,
    } | settings
    return LoRATrainer(
        adapted(0.1) if model is None else model,
        training_arguments(out, **settings),
        train_dataset=data,
        processing_class=tokenizer(),
        **passed,
    )


def test_updates_are_plain_pytorchs(data: ChatData, tmp_path: Path) -> None:
    """Four steps of SGD with clipping, each of two forwards, beside an unfused PEFT model, with the
    loss per token, the clipping and warm-up and cosine written out."""
    model, steps, lr, clip = adapted(), 4, 0.5, 0.3
    stock = adapted()
    start = weights(model)
    order: list[list[int]] = []

    class Seen(Collator):
        def __call__(self, rows: Any) -> dict[str, Tensor]:
            order.append([data.rows.index(row) for row in rows])
            return super().__call__(rows)

    how: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": lr,
        "warmup_steps": 0.25,
    }
    args = training_arguments(tmp_path, **how, max_grad_norm=clip, optim="sgd", use_cpu=True)
    LoRATrainer(model, args, train_dataset=data, data_collator=Seen(0)).train()
    got, lines = weights(model), metrics(tmp_path)

    params = dict(stock.named_parameters())
    assert len(order) >= 2 * steps
    for step in range(steps):
        rows = [data[i] for batch in order[2 * step : 2 * step + 2] for i in batch]
        batch = Collator(0)(rows)
        logits = stock(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
        assert lines[step]["loss"] == pytest.approx(loss.item(), rel=RTOL)
        grads = torch.autograd.grad(loss, [params[name] for name in start])
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        assert norm > clip
        assert lines[step]["grad_norm"] == pytest.approx(norm, rel=RTOL)
        share = step if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / (steps - 1)))
        with torch.no_grad():
            for name, grad in zip(start, grads, strict=True):
                params[name] -= lr * share * grad * clip / norm
    for name, ref in weights(stock).items():
        moved, want = got[name] - start[name], ref - start[name]
        assert want.norm() > 0
        assert (moved - want).norm() <= RTOL * start[name].norm(), name
        assert (moved - want).norm() <= 2.0**-8 * want.norm(), name


def test_only_adapters_change(data: ChatData, tmp_path: Path) -> None:
    model = adapted(0.1)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = weights(model)
    made = trainer(tmp_path, data, model)
    assert made.trainable.startswith("trainable: 2,304 of ")
    assert "in 6 adapted layers; the rest is frozen" in made.trainable
    made.train()
    for name, p in model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name
        else:
            assert not torch.equal(p, before[name]), name


def test_what_may_not_train_is_named(tmp_path: Path, data: ChatData) -> None:
    model = adapted()
    model.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(UsageError, match=r"model: base_model.model.lm_head.weight would train bes"):
        check_trainable(model)
    with pytest.raises(UsageError, match="model: no adapter is trainable"):
        check_trainable(adapted().requires_grad_(False))
    with pytest.raises(UsageError, match="model: got LlamaForCausalLM, want a PEFT model"):
        trainer(tmp_path / "no", data, llama())
    check_trainable(adapted(modules_to_save=["lm_head"]))
    check_trainable(adapted(trainable_token_indices=[3, 5]))
    with pytest.raises(UsageError, match="train_dataset: got no row, want at least one"):
        trainer(tmp_path / "no", [])
    assert not (tmp_path / "no").exists()


class Break(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("ratio", [None, 4.0], ids=["lora", "lora+"])
def test_a_broken_run_goes_on_as_if_unbroken(
    data: ChatData, tmp_path: Path, ratio: float | None
) -> None:
    """The same bits: losses, norms, rates, weights, with dropout, over the end of an epoch."""
    runs = {}
    for name in ("once", "twice"):
        torch.manual_seed(len(name))  # what came before must not matter
        model, extra = adapted(0.1), {"lora_plus_ratio": ratio, "gradient_accumulation_steps": 2}
        if name == "twice":
            first = trainer(tmp_path / name, data, adapted(0.1), callbacks=[Break(5)], **extra)
            with pytest.raises(KeyboardInterrupt):
                first.train()
            assert newest_checkpoint(tmp_path / name) == tmp_path / name / "checkpoint-3"
            with pytest.raises(UsageError, match="resume_from_checkpoint=True goes on from it"):
                trainer(tmp_path / name, data, adapted(0.1), **extra).train()
        made = trainer(tmp_path / name, data, model, **extra)
        made.train(resume_from_checkpoint=name == "twice")
        runs[name] = (metrics(tmp_path / name), weights(model))
    lines, ref = runs["once"]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert runs["twice"][0] == lines
    assert all(torch.equal(runs["twice"][1][name], p) for name, p in ref.items())
    kept = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert kept == ["checkpoint-6", "checkpoint-8"]


def test_activations_computed_again_change_nothing(data: ChatData, tmp_path: Path) -> None:
    found, calls = [], [0, 0]
    for again in (False, True):
        model = adapted(0.1)

        def count(*args: Any, again: bool = again) -> None:
            calls[again] += 1

        layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
        layer.register_forward_hook(count)
        trainer(
            tmp_path / str(again), data, model, max_steps=3, gradient_checkpointing=again
        ).train()
        found.append(weights(model))
    assert all(torch.equal(found[1][name], p) for name, p in found[0].items())
    assert calls == [3, 6]


def test_lora_plus_moves_B_by_the_ratio(data: ChatData, tmp_path: Path) -> None:
    moved = []
    for ratio in (None, 4.0):
        model = adapted()
        before = weights(model)
        how = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "lora_plus_ratio": ratio}
        trainer(tmp_path / str(ratio), data, model, **how).train()
        moved.append({n: p - before[n] for n, p in weights(model).items()})
    for name, plain in moved[0].items():
        factor = 4.0 if "lora_B" in name else 1.0
        assert plain.norm() > 0
        # The update was rounded to the weight's spacing, at 2⁻²⁴ of some ten times its size.
        assert (moved[1][name] - factor * plain).norm() <= 2.0**-12 * (factor * plain).norm(), name


@pytest.mark.parametrize("decay", [0.0, 0.25])
def test_lora_plus_groups_have_the_arguments_weight_decay(
    data: ChatData, tmp_path: Path, decay: float
) -> None:
    """Not AdamW's own."""
    made = trainer(tmp_path, data, adapted(), max_steps=1, lora_plus_ratio=4.0, weight_decay=decay)
    groups = [group for group in made.create_optimizer().param_groups if group["params"]]
    assert len(groups) > 1 and {group["weight_decay"] for group in groups} == {decay}


def test_every_checkpoint_is_kept_without_a_limit(data: ChatData, tmp_path: Path) -> None:
    trainer(tmp_path, data, max_steps=4, save_steps=1, save_total_limit=None).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in (1, 2, 3, 4)
    ]


def test_a_trainer_goes_on_by_itself(data: ChatData, tmp_path: Path) -> None:
    """A second call of `train` is no run that would mix its checkpoints with another's."""
    made = trainer(tmp_path, data, max_steps=2, save_steps=1)
    made.train()
    made.train()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_bf16_is_autocast(data: ChatData, tmp_path: Path) -> None:
    model, seen = adapted(), set()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.register_forward_hook(lambda module, x, y: seen.add(y.dtype))
    trainer(tmp_path, data, model, max_steps=2, bf16=True).train()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_early_stop_goes_back_to_the_best(data: ChatData, tmp_path: Path) -> None:
    """Broken off in between it still waits no longer, and once over it stays so."""
    train, val = data.split(0.25)
    last = 0
    for name in ("once", "twice"):
        out = tmp_path / name
        settings: dict[str, Any] = {
            "max_steps": 40,
            "learning_rate": 0.5,
            "max_grad_norm": 0.0,
            "warmup_steps": 0.5,
        }
        settings |= {"eval_steps": 1, "save_steps": 1, "patience": 2, "eval_dataset": val}
        if name == "twice":
            with pytest.raises(KeyboardInterrupt):
                trainer(out, train, adapted(), **settings, callbacks=[Break(last)]).train()
        made = trainer(out, train, adapted(), **settings)
        made.train(resume_from_checkpoint=name == "twice")
        if name == "twice":  # a run that was over stays so
            made = trainer(out, train, adapted(), **settings)
            assert made.train(resume_from_checkpoint=True).global_step == last
        held_out = losses(made.state.log_history, "eval_loss")
        last = last or max(held_out)
        assert 2 < last < 40
        best = min(held_out, key=lambda step: held_out[step])
        assert max(held_out) == last == best + 2
        assert made.evaluate()["eval_loss"] == held_out[best]
        assert Path(made.state.best_model_checkpoint) == out / f"checkpoint-{best}"
        state = (out / f"checkpoint-{last}" / "trainer_state.json").read_text()
        assert f'checkpoint-{best}"' in state


@pytest.mark.parametrize("adapter", ["default", "legal"])
def test_early_stop_restores_the_best_adapter_of_any_name(
    data: ChatData, tmp_path: Path, adapter: str
) -> None:
    """PEFT saves an adapter of another name in a subfolder. A run that is over is restored too."""
    train, val = data.split(0.25)
    settings: dict[str, Any] = {
        **{"max_steps": 40, "learning_rate": 0.5, "max_grad_norm": 0.0, "warmup_steps": 0.5},
        **{"eval_steps": 1, "save_steps": 1, "patience": 1, "eval_dataset": val},
    }
    for is_over in (False, True):
        made = trainer(tmp_path, train, adapted(adapter=adapter), **settings)
        made.train(resume_from_checkpoint=is_over)
        held_out = losses(made.state.log_history, "eval_loss")
        best = min(held_out, key=lambda step: held_out[step])
        assert made.evaluate()["eval_loss"] == held_out[best] and max(held_out) == best + 1


def test_the_held_out_loss_is_the_mean_over_tokens(tmp_path: Path) -> None:
    """Trainer's own mean depends on how rows fall into batches."""
    texts = ["a", "the second one is a good deal longer", "middling", "x" * 30, "ab"]
    file = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    val = load_chat(file, tokenizer())
    model, total, count = adapted(), 0.0, 0
    with torch.no_grad():
        for row in val:
            logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
            targets = torch.tensor(row["labels"][1:])
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            total, count = total + loss.item(), count + int((targets != -100).sum())
    found = []
    for batch, collator in ((1, None), (2, None), (5, None), (2, DataCollatorWithFlattening())):
        how: Any = {
            "eval_dataset": val,
            "per_device_train_batch_size": batch,
            "data_collator": collator,
        }
        made = trainer(tmp_path / f"{len(found)}", val, adapted(), **how)
        found.append(made.evaluate()["eval_loss"])
    assert found == pytest.approx([total / count] * 4, rel=RTOL)
    made = trainer(
        tmp_path / "named", val, adapted(), eval_dataset=val, per_device_train_batch_size=2
    )
    named = made.evaluate(metric_key_prefix="test")
    assert named["test_loss"] == pytest.approx(total / count, rel=RTOL)


def test_flattened_rows_of_a_model_that_mixes_them_are_refused(
    data: ChatData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any) -> None:
        raise UsageError("padding_free")

    monkeypatch.setattr("lora_kernels.finetune.trainer.check_flattening", refuse)
    with pytest.raises(UsageError, match="padding_free"):
        trainer(tmp_path, data, data_collator=DataCollatorWithFlattening())
    trainer(tmp_path, data, eval_dataset=data)


def test_flattened_rows_train_as_padded_ones(data: ChatData, tmp_path: Path) -> None:
    found = []
    for name, collator in (("padded", None), ("flat", DataCollatorWithFlattening())):
        made = trainer(tmp_path / name, data, adapted(), max_steps=3, data_collator=collator)
        assert made.model.config.use_cache is False
        made.train()
        found.append([line["loss"] for line in metrics(tmp_path / name)])
    assert found[0] == pytest.approx(found[1], rel=RTOL)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"per_device_train_batch_size": 0}, "train_batch_size: got 0, want at least 1"),
        ({"learning_rat": 2}, "learning_rat: no such setting; did you mean learning_rate"),
        ({"steps": 2}, "steps: want max_steps, the field of TrainingArguments"),
        ({"learning_rate": math.nan}, "learning_rate: got nan, want a positive number"),
        ({"warmup_steps": -1.0}, "warmup_steps: got -1.0, want 0 or a positive number"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: got -1.0"),
        ({"lora_plus_ratio": 0.0}, "lora_plus_ratio: got 0.0, want a positive number"),
        ({"patience": 2}, "patience: needs evaluations; give eval_steps and eval_dataset"),
        (
            {"patience": 2, "eval_steps": 2, "save_steps": 3, "eval_dataset": [{}]},
            "patience: got save_steps 3, want a multiple of eval_steps 2",
        ),
    ],
)
def test_bad_settings(data: ChatData, tmp_path: Path, settings: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        trainer(tmp_path / "out", data, **settings)
    assert not (tmp_path / "out").exists()


KILLS = """
import io, os, random, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import TrainerState
from lora_kernels.cli import main
from lora_kernels.finetune import recipe  # what the command imports, once for all children
from lora_kernels.finetune.checkpoints import find_intact, steps_done
from lora_kernels.finetune.trainer import LoRATrainer
from tests.finetune.tiny import metrics

out, model, file, moments = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
STEPS = 6 * moments
FILES = ["trainer_state.json", "optimizer.pt", "adapter_model.safetensors", "rng_state.pth"]
ARGS = "--batch 2 --rank 3 --dropout 0.1 --lr 0.01 --save-steps 1 --save-total-limit 1".split()
torch.set_num_threads(1)

def finetune(folder, at=None, name=""):
    # Dies in the checkpoint of step `at`, when half of the file of this name is written.
    def write(path, content):
        if Path(path).parts[-2:] == (f"checkpoint-{at}", name):
            Path(path).write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        Path(path).write_bytes(content)

    def save(value, path):
        buffer = io.BytesIO()
        usual(value, buffer)
        write(path, buffer.getvalue())

    def save_state(state, path):
        usual_json(state, path)
        write(path, Path(path).read_bytes())

    def save_adapter(trainer, folder, state_dict=None):
        usual_adapter(trainer, folder, state_dict)
        path = Path(folder, "adapter_model.safetensors")
        write(path, path.read_bytes())

    usual, torch.save = torch.save, save
    usual_json, TrainerState.save_to_json = TrainerState.save_to_json, save_state
    usual_adapter, LoRATrainer._save = LoRATrainer._save, save_adapter
    where = ["--model", model, "--data", file, "--out", str(folder)]
    return main(["finetune", *where, "--steps", str(STEPS), *ARGS])

def child(*args):
    # Forked before any threads: the imports, which take most of a process's time, are done once.
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(finetune(*args))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid

def intact():
    found = find_intact(out / "broken")[0]
    return steps_done(found) if found else 0

assert os.waitpid(child(out / "once"), 0)[1] == 0
draw = random.Random(0)
for moment in range(moments):
    # Two or three steps on; the first kill is inside of the first checkpoint's write.
    target = intact() + draw.choice((2, 3)) if moment else 1
    name = FILES[moment // 2 % len(FILES)]
    if moment % 2 == 0:
        pid = child(out / "broken", target, name)
    else:
        pid = child(out / "broken")
        deadline = time.monotonic() + 60
        while not (out / "broken" / f"checkpoint-{target}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.04))
        os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    if moment % 2 == 0:
        assert intact() == target - 1, name
        assert (out / "broken" / f"checkpoint-{target}").is_dir()
assert os.waitpid(child(out / "broken"), 0)[1] == 0
assert metrics(out / "broken") == metrics(out / "once")
assert len(metrics(out / "once")) == STEPS
ours, want = (load_file(out / n / "adapter/adapter_model.safetensors") for n in ("broken", "once"))
assert ours.keys() == want.keys() and all(torch.equal(ours[n], p) for n, p in want.items())
assert any(p.any() for n, p in want.items() if "lora_B" in n)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.slow
def test_command_killed_at_any_moment_goes_on_to_the_same_bits(
    folder: Path, lines: Path, tmp_path: Path
) -> None:
    """SIGKILL inside of a checkpoint's write, and at any other moment. The same command goes on,
    and ends with the losses and the adapter of the unbroken run."""
    done = run_python("-c", KILLS, tmp_path, folder, lines, 10)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prediction_step_counts_the_tokens_that_are_predicted(
    data: ChatData, tmp_path: Path
) -> None:
    """The first label of a row is predicted by nothing, whether or not it is ignored."""
    made = trainer(tmp_path, data, adapted())
    inputs = dict(made.data_collator([data[0], data[1]]))
    inputs["labels"] = inputs["input_ids"].clone()
    made._token_losses = [0.0, 0]
    made.prediction_step(made.model, inputs, True)
    assert made._token_losses[1] == inputs["labels"][:, 1:].numel()


# Which checkpoint a run goes on from.


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip(file: Path) -> None:
    """Flip a hundred bytes, since the 64 between two tensors count for nothing."""
    content = bytearray(file.read_bytes())
    for i in range(len(content) // 2, len(content) // 2 + 100):
        content[i] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Any] = {
    "adapter cut": lambda c: cut(c / "adapter_model.safetensors"),
    "optimizer cut": lambda c: cut(c / "optimizer.pt"),
    "optimizer of text": lambda c: (c / "optimizer.pt").write_text("no tensors"),
    "optimizer gone": lambda c: (c / "optimizer.pt").unlink(),
    "scheduler gone": lambda c: (c / "scheduler.pt").unlink(),
    "random state gone": lambda c: (c / "rng_state.pth").unlink(),
    "state gone": lambda c: (c / "trainer_state.json").unlink(),
    "scheduler empty": lambda c: (c / "scheduler.pt").write_bytes(b""),
    "random state cut": lambda c: cut(c / "rng_state.pth"),
    "bytes of the optimizer": lambda c: flip(c / "optimizer.pt"),
    "state cut": lambda c: cut(c / "trainer_state.json"),
    "state a list": lambda c: (c / "trainer_state.json").write_text("[]"),
    "adapter gone": lambda c: (c / "adapter_model.safetensors").unlink(),
    "loss scale cut": lambda c: cut(c / "scaler.pt"),
    "loss scale empty": lambda c: (c / "scaler.pt").write_bytes(b""),
    "bytes of the loss scale": lambda c: flip(c / "scaler.pt"),
}


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    """The number decides, not the name: 100, then 50, then 9."""
    for step in (9, 100, 50):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-last").mkdir()  # not the trainer's
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    found, damaged = find_intact(tmp_path)
    assert found is None and [steps_done(path) for path in damaged] == [100, 50, 9]


def test_damaged_newest_checkpoint_resume_takes_the_one_before(
    data: ChatData, tmp_path: Path
) -> None:
    """Each damage is told, the older checkpoint is found, and the resumed run is the unbroken
    one's, bit for bit."""
    trainer(tmp_path, data, max_steps=6, save_steps=2, save_total_limit=3).train()
    want = metrics(tmp_path)
    newest, older = tmp_path / "checkpoint-6", tmp_path / "checkpoint-4"
    # As Trainer writes it beside the others under fp16, which a CPU has not.
    torch.save(torch.amp.GradScaler("cpu").state_dict(), newest / "scaler.pt")
    kept = {file: file.read_bytes() for file in newest.iterdir() if file.is_file()}
    assert find_intact(tmp_path) == (newest, {})
    for name, spoil in DAMAGES.items():
        spoil(newest)
        found, damaged = find_intact(tmp_path)
        assert found == older and list(damaged) == [newest], name
        assert "\n" not in damaged[newest]
        for file, content in kept.items():
            file.write_bytes(content)
    cut(newest / "optimizer.pt")
    with pytest.warns(UserWarning, match=r"-6 cannot be read: .* and \S*checkpoint-4 is taken$"):
        trainer(tmp_path, data, max_steps=6, save_steps=2, save_total_limit=3).train(
            resume_from_checkpoint=True
        )
    assert metrics(tmp_path) == want
    assert (tmp_path / "damaged-checkpoint-6").is_dir()
    assert damage_reason(tmp_path / "checkpoint-6") is None


def test_resume_with_all_checkpoints_damaged_starts_from_step_0(
    tmp_path: Path, data: ChatData
) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert find_intact(tmp_path)[0] is None and len(find_intact(tmp_path)[1]) == 2
    with pytest.warns(UserWarning, match="cannot be read: .* and training starts from step 0$"):
        trainer(tmp_path, data, adapted(), max_steps=2).train(resume_from_checkpoint=True)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "damaged-checkpoint-4").is_dir()


def test_random_state_of_a_process_missing_is_damage(
    data: ChatData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on with fewer processes, or with more than one."""
    trainer(tmp_path, data, adapted(), max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert damage_reason(checkpoint) is None
    state = (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    assert damage_reason(checkpoint) == "it holds no rng_state_1.pth"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert state.exists() and damage_reason(checkpoint) is None


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
    ids=["system", "torch"],
)
def test_full_disk_save_names_the_checkpoint_and_leaves_the_one_before(
    error: Exception, data: ChatData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, data, max_steps=4, save_steps=2)
    usual = torch.save

    def save(*args: Any, **kwargs: Any) -> None:
        if made.state.global_step == 4:
            raise error
        usual(*args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"out: \S*checkpoint-4 cannot be written: .+"):
        made.train()
    found, damaged = find_intact(tmp_path)
    assert found == tmp_path / "checkpoint-2" and list(damaged) == [tmp_path / "checkpoint-4"]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("logs", "stops", "words"),
    [
        ([{"loss": 3.0, "grad_norm": 1.0}, {"loss": NAN}], 2, "x, step 2: the loss is nan; start"),
        ([{"loss": INF}], 1, "step 1: the loss is inf; no update came before it"),
        ([{"loss": 3.0}] * 3 + [{"eval_loss": NAN}], 4, "step 4: the held-out loss is nan"),
        ([{"loss": 3.0, "grad_norm": 0.0}] * 11, 10, "steps 1 to 10: every gradient is 0"),
        (
            [{"grad_norm": 0.0}] * 9 + [{"grad_norm": 1e-30}] + [{"grad_norm": 0.0}] * 10,
            20,
            "steps 11 to 20: every gradient is 0, so that nothing is learnt; start again with a l",
        ),
        ([{"loss": 3.0}] * 30 + [{"train_loss": NAN}], None, ""),
    ],
    ids=["nan", "first", "evaluation", "dead", "dead again", "alive"],
)
def test_dead_run_check_stops_at_the_step_and_says_what_to_do(
    logs: list[dict[str, float]], stops: int | None, words: str
) -> None:
    check, state = DeadRunCheck("x"), TrainerState()
    check.on_train_begin(None, state, None)
    for step, line in enumerate(logs, 1):
        state.global_step = step
        if step == stops:
            with pytest.raises(TrainingError, match=words):
                check.on_log(None, state, None, line)
            return
        check.on_log(None, state, None, line)
    assert stops is None


def test_train_that_cannot_learn_raises_at_the_tenth_step(data: ChatData, tmp_path: Path) -> None:
    """A head of zeros passes no gradient on."""
    model = adapted()
    model.base_model.model.lm_head.weight.data.zero_()
    made = trainer(tmp_path, data, model, max_steps=20)
    with pytest.raises(TrainingError, match=r"^steps 1 to 10: every gradient is 0"):
        made.train()
    assert len(losses(made.state.log_history)) == 10


@pytest.mark.parametrize("quiet", [False, True])
def test_train_in_a_script_shows_its_progress_unless_told_not_to(
    quiet: bool, data: ChatData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, data, max_steps=3, disable_tqdm=quiet).train()
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("training: step ")]
    assert len(lines) == (0 if quiet else 3)
    assert quiet or re.search(r"^training: step 3/3  loss \d\.\d{4}  \d+ tokens/s$", lines[-1])
    assert "it/s" not in out + err and "{'loss'" not in out


def test_named_write_names_a_full_disk_under_tokenizers(tmp_path: Path) -> None:
    full = Exception("No space left on device (os error 28)")  # a bare one
    words = r"out: \S+ cannot be written: No space left"
    with pytest.raises(OSError, match=words), named_write(tmp_path / "adapter"):
        raise full


def test_named_write_passes_on_errors_of_the_work() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes$"), named_write(Path("x")):
        raise RuntimeError("shapes")
    assert checkpoints.first_line(ValueError()) == "ValueError"


def test_peak_memory_is_logged_at_each_checkpoint_and_at_the_end(
    data: ChatData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on keeps the entries of the one before, and adds its own."""
    peaks = iter(range(10, 100))
    resets = list[torch.device]()
    monkeypatch.setattr(process_memory, "reset_peak", lambda device: resets.append(device) or 0)
    monkeypatch.setattr(process_memory, "peak", lambda device: next(peaks))
    trainer(tmp_path, data, max_steps=6, callbacks=[PeakMemory()]).train()
    made = trainer(tmp_path, data, max_steps=8, callbacks=[PeakMemory()])
    made.train(resume_from_checkpoint=True)
    want = {3: [10], 6: [11], 8: [13, 14]}  # 12 is the end of the first run, after its checkpoint
    log = made.state.log_history
    assert losses(log, PEAK) == {step: found[-1] for step, found in want.items()}
    assert [line[PEAK] for line in log if PEAK in line] == [
        n for found in want.values() for n in found
    ]
    assert list(losses(log)) == list(range(1, 9))
    assert resets == [torch.device("cpu")] * 2


def test_peak_memory_counts_from_the_start_of_the_training() -> None:
    """What the process held before does not count, nor what it freed before."""
    size, callback = 200_000_000, PeakMemory()
    args: Any = SimpleNamespace(device=torch.device("cpu"))
    state = TrainerState()
    torch.ones(2 * size, dtype=torch.uint8)
    for kept in (0, size):
        callback.on_train_begin(args, state, None)
        torch.ones(kept, dtype=torch.uint8)
        callback.on_train_end(args, state, None)
    without, with_it = (line[PEAK] for line in state.log_history)
    assert 0.95 * size < with_it - without < 1.15 * size  # resident pages are counted in batches


@pytest.mark.parametrize(("epochs", "want"), [(3, 3), (2.5, 3), (0.5, 1)])
def test_saves_left_counts_the_last_part_of_an_epoch(epochs: float, want: int) -> None:
    args: Any = SimpleNamespace(save_strategy="epoch", num_train_epochs=epochs)
    for done in (0, 1):
        state: Any = SimpleNamespace(epoch=float(done) or None)
        assert _saves_left(args, state) == want - done
