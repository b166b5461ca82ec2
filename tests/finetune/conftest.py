"""Models, texts and chats small enough that a whole run takes a second."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lora_kernels.cli import main
from lora_kernels.finetune.chat import ChatData, load_chat
from lora_kernels.finetune.data import token_blocks
from lora_kernels.finetune.model import load_base, load_tokenizer
from tests.finetune import tiny
from tests.support.threads import threads as threads


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    vocab = {byte: i for i, byte in enumerate(["<eos>", *sorted(bytes_)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)

    words = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    sizes = {"vocab_size": len(vocab), "intermediate_size": 128, "max_position_embeddings": 128}
    tiny.llama(**sizes, **words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "numbers.txt"
    file.write_text("".join(f"Line {i} says [the] square of {i} is {i * i}.\n" for i in range(60)))
    return file


@pytest.fixture
def base(model_folder: Path) -> nn.Module:
    return load_base(model_folder, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="session")
def blocks(model_folder: Path, text: Path) -> Tensor:
    return token_blocks(load_chat(text, load_tokenizer(model_folder)).rows, 16)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama that chats."""
    return tiny.save_model(tmp_path_factory.mktemp("model"), tiny.llama())


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_lines(tmp_path_factory.mktemp("data") / "chat.jsonl", tiny.squares(12))


@pytest.fixture(scope="session")
def data(lines: Path) -> ChatData:
    return load_chat(lines, tiny.tokenizer())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command, which has to end in the status; returns what it prints."""

    def run(*argv: object, status: int = 0) -> str:
        capsys.readouterr()
        ended = main([str(word) for word in argv])
        printed = capsys.readouterr()
        assert ended == status, printed
        return printed.out + printed.err

    return run
