"""Models, texts and chats small enough that a whole run takes a second."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_kernels.bench import timing
from lora_kernels.cli import main
from lora_kernels.finetune import classify
from lora_kernels.finetune.chat import ChatData, load_chat
from lora_kernels.finetune.model import load_base
from tests.finetune import tiny
from tests.support.threads import threads as threads


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama without a chat template."""
    model = tiny.llama(intermediate_size=128, max_position_embeddings=128)
    return tiny.save_model(tmp_path_factory.mktemp("tiny-llama"), model, tiny.tokenizer(None))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "numbers.txt"
    file.write_text("".join(f"Line {i} says [the] square of {i} is {i * i}.\n" for i in range(60)))
    return file


@pytest.fixture
def base(model_folder: Path) -> nn.Module:
    return load_base(model_folder, torch.float32, torch.device("cpu"))


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


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the measurement of the machine's bandwidth and FLOP/s, which takes seconds."""
    for name in ("copy_bandwidth", "read_bandwidth", "product_peak", "peak"):
        monkeypatch.setattr(timing, name, lambda *args, **kwargs: 1e9)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `compare_methods` train in this process, one method after the other."""
    monkeypatch.setattr(classify, "ProcessPoolExecutor", ThreadPoolExecutor)
