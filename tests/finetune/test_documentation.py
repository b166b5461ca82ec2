"""Every Python example of the READMEs, docs/ and CONTRIBUTING.md runs as it stands, by itself.

Commands are taken as far as their arguments, targets, modules and files.

One rule stands for missing inputs: a model or a file that an example names is a tiny one of that
name in the working folder, where transformers looks before it asks the hub. Beside that,
`compare_methods` trains in this process.
"""

from __future__ import annotations

import importlib
import re
import shlex
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lora_kernels import cli
from tests.finetune.tiny import (
    bert,
    llama,
    save_model,
    squares,
    tokenizer,
    write_gguf,
    write_lines,
)
from tests.support.emulator import emulator_unavailable_reason
from tests.support.gpt_oss import TINY, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *ROOT.glob("docs/*.md"),
    *sorted(ROOT.glob("lora_kernels/*/README.md")),
]


def examples() -> Iterator[tuple[str, int, str]]:
    """The file, the line on which the example begins, and its text."""
    for file in sorted(FILES):
        text = file.read_text(encoding="utf-8")
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, found.start(1)) + 1
            yield str(file.relative_to(ROOT)), line, found[1]


def commands() -> Iterator[tuple[str, str]]:
    """The file, and each command in an indented block or in backticks."""
    programs = re.compile(r"(?:[A-Z_]+=\S+ )?(?:[\w.]+/)*((?:lora-kernels|make|python|pytest) .+)")
    for file in sorted([*FILES, *ROOT.glob("benchmarks/*.md")]):
        text = re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
        found = re.findall(r"^ {4}(\S.*)$|`([^`]+)`", text, re.MULTILINE)
        lines = (" ".join("".join(each).split()) for each in found)
        parts = {programs.match(part) for line in lines for part in line.split(" && ")}
        for command in sorted({part[1].replace("…", "") for part in parts if part}):
            yield str(file.relative_to(ROOT)), command


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and files that the examples name."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("SmolLM2-135M", "SmolLM2-135M-Instruct"):
        save_model(folder / "HuggingFaceTB" / name, llama())
    save_model(folder / "all-MiniLM-L6-v2", bert(), tokenizer(None))
    write_checkpoint(folder / "openai" / "gpt-oss-20b", **TINY)
    if find_spec("gguf") is not None:
        write_gguf(folder / "FILE.gguf")
    for name in ("chat", "law", "code"):
        write_lines(folder / f"{name}.jsonl", squares(8))
    mail = [
        f"{'Buy' if i % 2 else 'Dear'} {i},{'spam' if i % 2 else 'ham'},{i}" for i in range(280)
    ]
    write_lines(folder / "mail.csv", ["text,label,author", *mail])
    return folder


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set torchrun's environment for one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("no gloo")
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    values = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("file", "line", "text"),
    [pytest.param(*each, id=f"{each[0]}:{each[1]}") for each in examples()],
)
def test_example_runs_as_it_stands(
    file: str,
    line: int,
    text: str,
    reader_folder: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "load_gguf" in text:
        pytest.importorskip("transformers.quantizers.quantizer_gguf")
    if "trl" in text:
        pytest.importorskip("trl", exc_type=ImportError)
    if "cuda.emulate" in text and emulator_unavailable_reason() is not None:
        pytest.skip("the native kernels are not built")
    if "torch.distributed" in text:
        request.getfixturevalue("launched")
    for each in reader_folder.iterdir():
        (tmp_path / each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)
    code = compile("\n" * (line - 1) + text, ROOT / file, "exec")
    exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize(("file", "command"), [*commands()])
def test_command_of_a_page_exists_and_takes_its_arguments(
    file: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *words = shlex.split(command, comments=True)
    if program == "lora-kernels":
        (tmp_path / "mine.py").write_text("def fused(x, weight, lora_A, lora_B, scaling): ...\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(importlib.import_module(cli.COMMANDS[words[0]][0]), "run", lambda _: 0)
        assert cli.main(words) == 0
        return
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = set(re.findall(r"^([\w ]+):(?!=)", makefile, re.MULTILINE))
        assert {word for word in words if "=" not in word} <= set(" ".join(targets).split())
    if program == "python" and words[0] == "-m":
        assert find_spec(words[1]) is not None
    assert all((ROOT / word).exists() for word in words if "/" in word)
