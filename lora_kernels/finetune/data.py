"""Read files of data; split tokens into blocks, and draw batches of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import UsageError
from .checkpoints import translate_errors


def read_file(file: Path, argument: str, wanted: str) -> bytes:
    """Return the file's bytes. Raises UsageError that names the argument if it is missing."""
    if not file.is_file():
        raise UsageError(f"{argument}: there is no file {file}; give {wanted}")
    return file.read_bytes()


def decode_text(raw: bytes, file: Path, argument: str) -> str:
    """Return the file's text. Raises UsageError if it is not UTF-8."""
    with translate_errors(f"{argument}: {file} is not UTF-8 text; convert it", UnicodeDecodeError):
        return raw.decode("utf-8")


def token_blocks(rows: Iterable[Mapping[str, Sequence[int]]], length: int) -> Tensor:
    """Concatenate the rows' tokens, and split them into blocks, int64 [blocks, length].

    Tokens that do not fill the last block are dropped. Fewer than `length` tokens are one block.

    >>> token_blocks([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}], length=2)
    tensor([[1, 2],
            [3, 4]])
    """
    ids = [token for row in rows for token in row["input_ids"]]
    length = min(length, len(ids))
    blocks = len(ids) // length
    return torch.tensor(ids[: blocks * length]).view(blocks, length)


def batch(blocks: Tensor, step: int, size: int, seed: int) -> Tensor:
    """Draw the batch of one step, int64 [size, seq_len], as determined by (seed, step)."""
    generator = torch.Generator().manual_seed((seed << 16) + step)
    return blocks[torch.randint(len(blocks), (size,), generator=generator)]
