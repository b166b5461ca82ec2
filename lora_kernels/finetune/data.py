"""Plain text to blocks of tokens, blocks to batches."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import UsageError


def token_blocks(files: Iterable[Path], tokenizer: Any, seq_len: int) -> Tensor:
    """The files' text as int64 [blocks, seq_len]; what does not fill a block is left out.

    Files are joined with the tokenizer's end-of-sequence token, if it has one. Raises UsageError
    for a file that is missing, not UTF-8 or empty, and for less text than one block.

    >>> import pathlib, tempfile, types
    >>> file = pathlib.Path(tempfile.mkdtemp(), "abc.txt")
    >>> _ = file.write_text("abcd")
    >>> by_letter = types.SimpleNamespace(encode=lambda s, **_: list(map(ord, s)), eos_token_id=0)
    >>> token_blocks([file], by_letter, seq_len=2)
    tensor([[ 97,  98],
            [ 99, 100]])
    """
    files = list(files)
    ids: list[int] = []
    for file in files:
        # verbose=False: the warning about sequences longer than the model's context does not
        # apply, since the sequence is cut into blocks.
        ids += tokenizer.encode(read_text(file), add_special_tokens=False, verbose=False)
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    blocks = len(ids) // seq_len
    if blocks == 0:
        raise UsageError(
            f"--data: {' '.join(map(str, files))} holds {len(ids)} tokens, less than one block of "
            f"{seq_len}; give more text or a smaller --seq-len"
        )
    return torch.tensor(ids[: blocks * seq_len]).view(blocks, seq_len)


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, or a UsageError that says why there is none."""
    if not file.is_file():
        raise UsageError(f"--data: there is no file {file}; give the path of a plain text file")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--data: {file} is not UTF-8 text (byte {error.start}); convert it to plain UTF-8"
        ) from None
    if not text.strip():
        raise UsageError(f"--data: {file} is empty; give a file with text in it")
    return text


def batch(blocks: Tensor, step: int, size: int, seed: int) -> Tensor:
    """The batch of one step: int64 [size, seq_len].

    A pure function of its arguments, so a resumed run needs no loader state: the blocks are
    read in one shuffled order per epoch, drawn from (seed, epoch).

    >>> batch(torch.arange(6).view(3, 2), step=0, size=3, seed=0).sort(0).values.tolist()
    [[0, 1], [2, 3], [4, 5]]
    """
    n = len(blocks)
    places = (divmod(i, n) for i in range(step * size, (step + 1) * size))
    return blocks[[_order(n, seed, epoch)[i] for epoch, i in places]]


@functools.lru_cache(maxsize=2)  # a batch touches two epochs at most, unless it holds them all
def _order(n: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(n), n)
