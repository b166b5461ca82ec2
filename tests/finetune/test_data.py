from pathlib import Path

import torch

from lora_kernels.finetune.chat import load_chat
from lora_kernels.finetune.data import batch, token_blocks
from lora_kernels.finetune.model import load_tokenizer


def test_blocks_hold_the_text(model_folder: Path, text: Path) -> None:
    tokenizer = load_tokenizer(model_folder)
    blocks = token_blocks(load_chat([text, text], tokenizer, max_length=37).rows, 50)
    assert blocks.dtype is torch.int64
    assert blocks.shape[1] == 50
    written = text.read_text()
    joined = f"{written}<eos>{written}<eos>"
    assert joined.startswith(tokenizer.decode(blocks.flatten()))
    assert blocks.shape[0] == 2 * (len(written) + 1) // 50  # a token a byte


def test_blocks_of_less_than_one_are_all_of_it() -> None:
    assert token_blocks([{"input_ids": [5, 6, 7]}], 50).tolist() == [[5, 6, 7]]


def test_every_epoch_reads_every_block_once() -> None:
    blocks = torch.arange(14).view(7, 2)
    read = torch.cat([batch(blocks, step, 3, seed=5) for step in range(7)])  # three epochs
    epochs = read[:, 0].view(3, 7).tolist()
    assert all(sorted(epoch) == list(range(0, 14, 2)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_may_be_larger_than_the_text() -> None:
    assert batch(torch.zeros(2, 3), step=4, size=9, seed=0).shape == (9, 3)


def test_the_seed_settles_the_order() -> None:
    blocks = torch.arange(100).view(50, 2)
    assert batch(blocks, 3, 8, seed=1).equal(batch(blocks, 3, 8, seed=1))
    assert not batch(blocks, 3, 8, seed=1).equal(batch(blocks, 3, 8, seed=2))
