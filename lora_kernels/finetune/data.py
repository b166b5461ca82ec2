"""Rows of tokens to blocks, blocks to batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import UsageError
from .checkpoints import translate_errors


def token_blocks(rows: Iterable[Mapping[str, Sequence[int]]], length: int) -> Tensor:
    """The rows' tokens one after another as int64 [blocks, length], at least one block; what does
    not fill a block is left out, and fewer tokens than `length` are one block of them all.

    >>> token_blocks([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}], length=2)
    tensor([[1, 2],
            [3, 4]])
    """
    ids = [token for row in rows for token in row["input_ids"]]
    length = min(length, len(ids))
    blocks = len(ids) // length
    return torch.tensor(ids[: blocks * length]).view(blocks, length)


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, or a UsageError that says why there is none."""
    if not file.is_file():
        raise UsageError(f"--data: there is no file {file}; give the path of a plain text file")
    with translate_errors(f"--data: {file} is not UTF-8 text; convert it", UnicodeDecodeError):
        text = file.read_text(encoding="utf-8")
    if not text.strip():
        raise UsageError(f"--data: {file} is empty; give a file with text in it")
    return text


def batch(blocks: Tensor, step: int, size: int, seed: int) -> Tensor:
    """The batch of one step: int64 [size, seq_len], blocks drawn by (seed, step).

    >>> batch(torch.arange(6).view(3, 2), step=0, size=4, seed=0).shape
    torch.Size([4, 2])
    """
    generator = torch.Generator().manual_seed((seed << 16) + step)
    return blocks[torch.randint(len(blocks), (size,), generator=generator)]
