"""Which checkpoint a run goes on from: the newest that can be read, and none that cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels.finetune import UsageError, checkpoints
from lora_kernels.finetune.chat import ChatData
from lora_kernels.finetune.checkpoints import damage, find_intact, named_write, newest_checkpoint
from tests.finetune.test_trainer import adapted, data, metrics, trainer

__all__ = ["data"]  # the fixture


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip(file: Path) -> None:
    """Of a hundred bytes, since the 64 between two tensors count for nothing."""
    content = bytearray(file.read_bytes())
    for i in range(len(content) // 2, len(content) // 2 + 100):
        content[i] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Any] = {
    "adapter cut": lambda c: cut(c / "adapter_model.safetensors"),
    "optimizer cut": lambda c: cut(c / "optimizer.pt"),
    "optimizer of text": lambda c: (c / "optimizer.pt").write_text("no tensors"),
    "optimizer gone": lambda c: (c / "optimizer.pt").unlink(),
    "scheduler empty": lambda c: (c / "scheduler.pt").write_bytes(b""),
    "random state cut": lambda c: cut(c / "rng_state.pth"),
    "bytes of the optimizer": lambda c: flip(c / "optimizer.pt"),
    "state cut": lambda c: cut(c / "trainer_state.json"),
    "state a list": lambda c: (c / "trainer_state.json").write_text("[]"),
    "adapter gone": lambda c: (c / "adapter_model.safetensors").unlink(),
}


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    for step in (9, 100, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_damaged_newest_checkpoint_resume_takes_the_one_before(
    data: ChatData, tmp_path: Path
) -> None:
    """Each damage is told, the older checkpoint is found, and the resumed run is the unbroken
    one's, bit for bit."""
    trainer(tmp_path, data, steps=6, save_every=2, keep=3).train()
    want = metrics(tmp_path)
    newest, older = tmp_path / "checkpoint-6", tmp_path / "checkpoint-4"
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
    with pytest.warns(UserWarning, match=r"checkpoint-6 cannot be read: .*going on from .*-4$"):
        trainer(tmp_path, data, steps=6, save_every=2, keep=3).train(resume_from_checkpoint=True)
    assert metrics(tmp_path) == want
    assert (tmp_path / "damaged-checkpoint-6").is_dir()
    assert damage(tmp_path / "checkpoint-6") is None


def test_all_checkpoints_damaged_resume_is_refused(tmp_path: Path, data: ChatData) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(UsageError, match=r"out: \S*checkpoint-4 and 1 more cannot be read: "):
        find_intact(tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        trainer(tmp_path, data, adapted()).train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}


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
    made = trainer(tmp_path, data, steps=4, save_every=2)
    usual = torch.save

    def save(*args: Any, **kwargs: Any) -> None:
        if made.state.global_step == 4:
            raise error
        usual(*args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"out: \S*checkpoint-4 cannot be written: .+"):
        made.train()
    assert find_intact(tmp_path) == (tmp_path / "checkpoint-2", {})
    assert not (tmp_path / ".partial").exists()


def test_named_write_passes_on_errors_of_the_work() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes$"), named_write(Path("x")):
        raise RuntimeError("shapes")
    assert checkpoints.first_line(ValueError()) == "ValueError"
