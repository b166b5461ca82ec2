"""TRL's trainers after `patch()`, with LoRA on lm_head, beside logits that PEFT's head computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.finetune.tiny import llama

pytest.importorskip("trl", exc_type=ImportError)
import trl as their_trl
from datasets import Dataset
from peft import LoHaConfig, LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import dpo_trainer, sft_trainer, utils

from lora_kernels.integrations import trl
from lora_kernels.peft import fuse, unfuse
from tests.finetune import test_trl as trl_tests

STEPS, SETTINGS = trl_tests.STEPS, trl_tests.SETTINGS | {"max_length": 64}
MODULES = (sft_trainer, dpo_trainer, utils)


@pytest.fixture
def patched() -> Iterator[None]:
    trl.patch()
    yield
    trl.unpatch()


class PlainHead:
    """The log-probabilities of the logits that the head, an unfused module of PEFT, returns."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Any,
        targets: Tensor,
        temperature: float,
        chunk: int,
        cap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        assert temperature == scale == 1.0 and cap is None
        head = trl._head.get()
        z = unfuse(head)(hidden)
        log_p = z.log_softmax(-1)
        return (
            log_p.gather(1, targets[:, None])[:, 0],
            -(log_p.exp() * log_p).sum(1),
            (2 * log_p).logsumexp(1).detach(),
            z.mean(1).detach(),
            z.argmax(1) == targets,
        )


class Noted(trl_tests.Noted):
    logged = frozenset({"loss", "entropy", "mean_token_accuracy", "logits/chosen", "eval_loss"})


def parts(data: dict[str, list[str]], **config: Any) -> dict[str, Any]:
    adapter = trl_tests.lora(target_modules=["q_proj", "lm_head"], **config)
    return trl_tests.parts(data) | {"peft_config": adapter}


def sft(out: Path, **changes: Any) -> Any:
    args = SFTConfig(str(out), completion_only_loss=True, **SETTINGS)
    data = {"prompt": trl_tests.PAIRS["prompt"], "completion": ["It is."] * 8}
    held_out = Dataset.from_dict(data).select(range(3))
    return SFTTrainer(llama(), args, eval_dataset=held_out, **parts(data, **changes))


def dpo(out: Path, **changes: Any) -> Any:
    args = DPOConfig(str(out), loss_type=["sigmoid"], use_weighting=True, **SETTINGS)
    return DPOTrainer(llama(), args=args, **parts(trl_tests.PAIRS, **changes))


def results(trainer: Any) -> dict[str, Tensor]:
    trl_tests.randomize(trainer.model)
    noted = Noted(trainer.model)
    trainer.add_callback(noted)
    trainer.train()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    return noted.results


@pytest.mark.parametrize("make", [sft, dpo])
def test_trainer_of_a_head_with_lora_has_the_losses_and_gradients_of_its_logits(
    make: Any, tmp_path: Path, patched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = results(make(tmp_path / "ours"))
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", PlainHead)
    want = results(make(tmp_path / "plain"))
    assert got.keys() == want.keys()
    assert sum("lm_head.lora_" in name for name in got) == 2 * STEPS
    for name, value in want.items():
        scale = value.abs().max().item()
        assert value.norm() > 0 or "accuracy" in name, name
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_patch_is_undone_and_may_be_called_again() -> None:
    before = [vars(module).copy() for module in MODULES]
    trl.patch()
    trl.patch()
    assert sft_trainer.add_fused_lm_head is not before[0]["add_fused_lm_head"]
    trl.unpatch()
    trl.unpatch()
    assert all(vars(module) == was for module, was in zip(MODULES, before, strict=True))


@pytest.mark.parametrize("make", [sft, dpo])
def test_trainer_without_patch_refuses_a_head_with_lora(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make(tmp_path)


def test_trainer_refuses_an_adapter_that_is_not_covered(tmp_path: Path, patched: None) -> None:
    with pytest.raises(ValueError, match=r"on its head, which is not covered: .* is a DoRA"):
        sft(tmp_path, use_dora=True)


def test_unpatch_before_training_raises(tmp_path: Path) -> None:
    trl.patch()
    trainer = sft(tmp_path)
    trl.unpatch()
    with pytest.raises(RuntimeError, match="unpatch was called"):
        trainer.train()


class OtherKernel:
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> None: ...


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({}, None),
        ({"_ChunkedLogProbFunction": OtherKernel}, "takes hidden, weight, targets in place of"),
        ({"add_fused_lm_head": lambda model: None}, "head does not call _ChunkedLogProbFunction"),
        ({"_use_triton": None}, "head does not call _use_triton"),
    ],
)
def test_patch_of_a_later_trl_with_another_head_raises(
    changed: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(their_trl, "__version__", "1.17.2")
    for name, value in changed.items():
        if value is None:
            monkeypatch.delattr(utils, name)
        else:
            monkeypatch.setattr(utils, name, value)
    if reason is None:
        trl.patch()
        return trl.unpatch()
    with pytest.raises(RuntimeError, match=rf"got TRL 1\.17\.2, whose .*{reason}"):
        trl.patch()
    assert not trl._replaced


def heads(seed: int = 0, **config: Any) -> Any:
    """A model whose only module is a head with an adapter, fused."""
    torch.manual_seed(seed)
    config = {"r": 3, "lora_alpha": 7, "init_lora_weights": False} | config
    linear = nn.ModuleDict({"head": nn.Linear(8, 11)})
    return fuse(get_peft_model(linear, LoraConfig(target_modules=["head"], **config)))


@contextmanager
def known(head: Any) -> Iterator[None]:
    """Let `_LogProbs` know this head, as a call of a trainer's model does."""
    token = trl._head.set(head)
    try:
        yield
    finally:
        trl._head.reset(token)


def call(function: Any, weight: Tensor, bias: Any, dtype: Any = torch.float32) -> Any:
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs = "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"
    return function.apply(hidden, weight, bias, torch.arange(5), 0.7, 2, 3.0, 1.5, outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_known", [False, True])
def test_log_probs_of_a_head_without_lora_are_trls(is_known: bool, dtype: torch.dtype) -> None:
    """With TRL's temperature, cap, scale and bias, and its cast of a float32 weight."""
    head = nn.Linear(8, 11).requires_grad_(False)
    want = call(utils._ChunkedLogProbFunction, head.weight, head.bias, dtype)
    with known(head if is_known else None):
        got = call(trl._LogProbs, head.weight, head.bias, dtype)
    error = 1e-5 if dtype is torch.float32 else 0.03  # TRL rounds the logits before the bias
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=error, atol=error)


def test_log_probs_drop_elements_of_the_adapters_input_in_training() -> None:
    head = heads(lora_dropout=0.5).base_model.model["head"]
    with known(head.train()):
        first, second = (call(trl._LogProbs, head.weight, head.bias)[0] for _ in range(2))
        head.eval()
        third, fourth = (call(trl._LogProbs, head.weight, head.bias)[0] for _ in range(2))
    assert not torch.equal(first, second) and torch.equal(third, fourth)


def test_log_probs_of_a_head_with_lora_bias_have_it() -> None:
    model = heads(lora_bias=True)
    head = model.base_model.model["head"]
    torch.nn.init.normal_(head.lora_B["default"].bias)
    hidden, targets = torch.randn(5, 8), torch.arange(5)
    with known(head):
        got = trl._LogProbs.apply(hidden, head.weight, head.bias, targets, 1.0, 2)[0]
    want = head(hidden).log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_log_probs_of_an_adapter_that_is_not_covered_raise() -> None:
    """A hook that was added after the trainer was made: the adapter is not left out in silence."""
    head = heads().base_model.model["head"]
    head.register_forward_hook(lambda *args: None)
    with known(head), pytest.raises(RuntimeError, match=r"adapter .* is not covered: a hook"):
        call(trl._LogProbs, head.weight, head.bias)


def test_trainer_of_another_adapter_on_the_head_is_refused(tmp_path: Path, patched: None) -> None:
    made = parts({"prompt": ["1?"] * 4, "completion": ["It is."] * 4})
    made["peft_config"] = LoHaConfig(r=3, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        SFTTrainer(llama(), SFTConfig(str(tmp_path), **SETTINGS), **made)


def test_other_calls_of_a_trainers_model_have_logits(tmp_path: Path, patched: None) -> None:
    trainer = sft(tmp_path)
    assert trainer.model(torch.tensor([[5, 6, 7]])).logits.shape[:2] == (1, 3)


def test_rows_without_a_label_are_left_out_on_a_cpu(
    tmp_path: Path, patched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    apply = trl._LogProbs.apply

    def note(hidden: Tensor, *args: Any) -> Any:
        counted.append(len(hidden))
        assert len(hidden) == len(args[2])
        return apply(hidden, *args)

    monkeypatch.setattr(trl._LogProbs, "apply", note)
    trainer = sft(tmp_path)
    rows = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model(**rows, fused_lm_head=True)
    assert counted == [int((rows["labels"][:, 1:] >= 0).sum())]
    assert trl._head.get() is None
