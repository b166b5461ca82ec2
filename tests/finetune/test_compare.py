"""The comparison passes for the fused model, and for nothing that is wrong."""

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.finetune import Preset, TrainingError
from lora_kernels.finetune import compare as module
from lora_kernels.finetune.chat import ChatData, load_chat
from lora_kernels.finetune.compare import (
    GRADIENT_LIMIT,
    UPDATE_LIMIT,
    Row,
    build_pair,
    compare,
    draw_batch,
    largest_rms,
    peak_memory,
    relative_rms,
    scale_dA,
    train_sgd,
)
from lora_kernels.finetune.model import load_tokenizer

LORA = {"preset": Preset(3, 8, ("all-linear",), 0.0), "seed": 0}
SMALL = {"batch_size": 2, "sgd_steps": 3, "timed_steps": 2}
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def data(model_folder: Path, text: Path) -> ChatData:
    """Read plain text, in place of chats."""
    return load_chat(text, load_tokenizer(model_folder), max_length=16)


@pytest.fixture
def draw(data: ChatData) -> module.Draw:
    return partial(draw_batch, data, size=2, seed=0, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_agrees_and_controls_are_seen(base: nn.Module, data: ChatData, dtype) -> None:
    for p in base.parameters():
        p.data = p.data.to(dtype)
    rows = compare(base, data, lora=LORA, **SMALL)
    checked = {row.what: row.ok for row in rows if row.limit is not None}
    assert checked == {
        "gradients of 28 adapters": True,
        "updates in 3 SGD steps": True,
        "dx with dropout 0.1": True,
        "bf16 gradients, off fp32": True,
        "dA doubled": True,
        "dA zeroed": True,
        "mask off dx": True,
    }
    assert sum(row.control for row in rows) == 3
    assert {p.dtype for p in base.parameters()} == {dtype}
    assert not any(m._forward_hooks for m in base.modules())


@pytest.mark.parametrize(("weight", "words"), [(float("nan"), "loss is nan"), (0.0, "are all 0")])
def test_compare_on_a_base_without_gradients_is_an_error(base, data, weight, words: str) -> None:
    """Two zeros, or two NaN, would agree."""
    base.get_output_embeddings().weight.data.fill_(weight)
    with pytest.raises(TrainingError, match=words):
        compare(base, data, lora=LORA, **SMALL)


@pytest.mark.parametrize("factor", [2.0, 0.0])
def test_a_wrong_fused_model_fails(base, data, factor: float, monkeypatch) -> None:
    def fuse_wrongly(model: nn.Module, linears: bool = False) -> nn.Module:
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.register_hook(lambda grad: grad * factor)
        return model

    monkeypatch.setattr(module, "fuse", fuse_wrongly)
    rows = compare(base, data, lora=LORA, **SMALL)
    failed = {row.what for row in rows if row.ok is False}
    assert {"gradients of 28 adapters", "updates in 3 SGD steps"} <= failed


def test_updates_notice_what_losses_hide(base: nn.Module, draw: module.Draw) -> None:
    stock, fused = build_pair(base, **LORA)
    losses, want = train_sgd(stock, draw, 3)
    with scale_dA(fused, 2.0):
        broken_losses, got = train_sgd(fused, draw, 3)
    assert largest_rms(got, want) > 100 * UPDATE_LIMIT
    assert max(abs(a - b) / b for a, b in zip(broken_losses, losses, strict=True)) < 0.01


def test_b_is_random_so_that_dA_counts(base: nn.Module, draw: module.Draw) -> None:
    stock, _ = build_pair(base, **LORA)
    gradients = module.loss_and_gradients(stock, draw(0))[1]
    assert all(g.abs().max() > 0 for g in gradients.values())


def test_the_distance_in_bf16_is_that_of_several_batches(base, draw, monkeypatch) -> None:
    """One batch's is luck: stock PEFT's median is 2, ours 3, and the far ones are not heard."""
    steps = []

    def count(step: int) -> Any:
        steps.append(step)
        return draw(step)

    def distance(peft: list[float], ours: list[float]) -> Row:
        errors = iter([e for both in zip(peft, ours, strict=True) for e in both])
        monkeypatch.setattr(module, "relative_rms", lambda got, want: next(errors))
        return module.compare_bf16(base, count, LORA)

    row = distance([2.0, 1.0, 90.0, 1.0, 2.5], [70.0, 3.0, 3.5, 1.0, 2.0])
    assert steps == [0, 1, 2, 3, 4]
    assert row.difference == pytest.approx(1.5)
    assert row.ok is False
    assert distance([1.0] * 5, [1.0, 1.0, 1.0, float("nan"), 1.0]).ok is False


def test_nan_fails_and_is_not_taken_for_a_control_that_was_seen() -> None:
    nan = torch.full((3,), float("nan"))
    assert Row("x", relative_rms(nan, torch.ones(3)), GRADIENT_LIMIT).ok is False
    assert Row("x", float("nan"), GRADIENT_LIMIT, control=True).ok is False
    many = {"a": torch.ones(3), "b": torch.ones(3)}
    assert not largest_rms({"a": nan, "b": torch.ones(3)}, many) <= GRADIENT_LIMIT
    assert not largest_rms({"a": torch.ones(3), "b": nan}, many) <= GRADIENT_LIMIT


def test_a_row_at_its_limit_is_within_and_a_control_is_not_seen() -> None:
    assert Row("x", 0.5, 0.5).ok is True
    assert Row("x", 0.5, 0.5, control=True).ok is False
    assert Row("x", 0.5).ok is Row("x", None, 0.5).ok is None
    worst = module.loss_row("losses", [1.0, 1.8, 4.0], [1.0, 2.0, 4.0])
    assert worst.difference == pytest.approx(0.1) and worst.limit is None
    worst = module.loss_row("losses", [3.0, 4.0], [2.0, 4.0])
    assert (worst.difference, worst.peft, worst.fused) == (0.5, "4.00000", "4.00000")


def test_seed_and_step_settle_a_batch(data: ChatData) -> None:
    def drawn(step: int, seed: int) -> Tensor:
        return draw_batch(data, step, 8, seed, CPU)["input_ids"]

    assert drawn(3, 1).equal(drawn(3, 1))
    assert not drawn(3, 1).equal(drawn(3, 2))
    assert not drawn(3, 1).equal(drawn(2, 1))


def test_relative_rms_by_hand() -> None:
    assert relative_rms(torch.tensor([0.0, 6.0]), torch.tensor([0.0, 4.0])) == 0.5
    assert math.isnan(relative_rms(torch.zeros(2), torch.zeros(2)))
    zero, one = torch.zeros(1), torch.ones(1)
    assert largest_rms({"a": zero, "b": one}, {"a": zero, "b": one}) == 0.0
    assert math.isnan(largest_rms({"a": zero}, {"a": zero}))
    assert relative_rms(torch.ones(2), torch.zeros(2)) == float("inf")
    with pytest.raises(ValueError, match="other names"):
        largest_rms({"a": torch.ones(1)}, {"b": torch.ones(1)})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_counts_what_is_freed_within_the_step() -> None:
    MB = 2**20

    class Spike(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.w, self.size = nn.Parameter(torch.ones(1)), size

        def forward(self, input_ids: Tensor, **kwargs: object):
            torch.ones(self.size, dtype=torch.uint8)
            self.loss = self.w.sum()
            return self

    batch = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
    left_behind = [torch.ones(MB, dtype=torch.uint8) for _ in range(100)]
    del left_behind
    peak = peak_memory(Spike(200 * MB), batch)
    assert peak is not None
    assert 195 * MB < peak < 230 * MB  # the kernel counts resident pages in batches
    assert peak_memory(Spike(1), batch) < 30 * MB
