"""A run that was interrupted ends with the bits of one that was not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.finetune.model import adapters, add_adapters
from lora_kernels.finetune.train import learning_rate, newest_checkpoint, train
from lora_kernels.peft import fuse

LORA = {"rank": 3, "alpha": 8, "dropout": 0.1, "seed": 1}
LOOP = {"batch_size": 2, "steps": 7, "lr": 1e-2, "seed": 2}


def fresh(base: nn.Module):
    return fuse(add_adapters(base, **LORA))


@pytest.fixture
def unbroken(base: nn.Module, blocks: Tensor) -> tuple[list[float], dict[str, Tensor]]:
    model = fresh(base)
    return train(model, blocks, **LOOP), adapters(model)


def test_it_learns(unbroken) -> None:
    losses, _ = unbroken
    assert len(losses) == 7
    assert losses[-1] < losses[0] - 0.1


def test_resumed_equals_unbroken(base: nn.Module, blocks: Tensor, unbroken, tmp_path: Path) -> None:
    part = train(fresh(base), blocks, **LOOP, out=tmp_path, stop=lambda done: done == 3)
    assert part == unbroken[0][:3]
    torch.manual_seed(12345)  # whatever the process did in between
    model = fresh(base)
    steps = []
    losses = train(
        model, blocks, **LOOP, out=tmp_path, on_step=lambda step, loss: steps.append(step)
    )
    assert steps == [4, 5, 6, 7]
    assert losses == unbroken[0]
    for name, p in adapters(model).items():
        assert p.equal(unbroken[1][name]), name


def test_masks_take_part_in_that(base: nn.Module, blocks: Tensor, unbroken) -> None:
    """Otherwise the test above would not notice a lost random state."""
    model = fuse(add_adapters(base, **LORA | {"dropout": 0.0}))
    assert train(model, blocks, **LOOP) != unbroken[0]


def test_a_finished_run_is_not_trained_further(base, blocks, unbroken, tmp_path: Path) -> None:
    train(fresh(base), blocks, **LOOP, out=tmp_path)
    model = fresh(base)
    assert train(model, blocks, **LOOP, out=tmp_path) == unbroken[0]
    assert all(p.equal(unbroken[1][name]) for name, p in adapters(model).items())


def test_a_failed_save_leaves_the_checkpoint_before(base, blocks, tmp_path, monkeypatch) -> None:
    train(fresh(base), blocks, **LOOP, out=tmp_path, stop=lambda done: done == 2)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            train(fresh(base), blocks, **LOOP, out=tmp_path, save_every=1)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert len(train(fresh(base), blocks, **LOOP, out=tmp_path, save_every=2)) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    for step in (9, 100, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert max(rates) == rates[5] == 1.0
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.02
