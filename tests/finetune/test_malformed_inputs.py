"""Malformed inputs of every command and every loader: one line, no traceback, nothing written.

`python -m tests.finetune.test_malformed_inputs` prints the table of them, and with --write puts it
into malformed_inputs.md beside this file, which the last test compares.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kernels import cli
from lora_kernels.backends.triton import measured
from lora_kernels.finetune import (
    Preset,
    UsageError,
    add_lora_layers,
    load_chat,
    merge_adapter,
    read_labelled,
)
from lora_kernels.finetune.checkpoints import find_intact
from lora_kernels.finetune.model import load_adapter, load_base, locate
from lora_kernels.finetune.options import read_run
from lora_kernels.finetune.presets import find_preset
from lora_kernels.finetune.trainer import read_metrics, training_arguments
from lora_kernels.layers import LoRALinear, RankAllocator, load_lora_weights, save_lora_weights
from lora_kernels.measure import compare
from lora_kernels.quantization import Weight4bit, quantize_4bit
from tests.finetune.tiny import TEMPLATE, chat, gpt2, llama, tokenizer, write_lines

TABLE = Path(__file__).with_name("malformed_inputs.md")
CPU = torch.device("cpu")
WORDS = ["a river rose", "the sun set", "rain fell all day", "it was noon"]


class Good(NamedTuple):
    """Inputs that are right, which each case spoils a copy of."""

    model: Path
    adapter: Path
    run: Path
    chats: Path
    text: Path
    labelled: Path
    bench: Path
    tuned: Path


Spoil = Callable[[Good, Path], Any]


class Case(NamedTuple):
    """what: the command or loader. why: what is wrong with its input. said: words of the error.

    spoil: from the good inputs and an empty folder, a command's arguments, or a loader's call.
    """

    what: str
    why: str
    said: str
    spoil: Spoil


CASES: list[Case] = []


def command(name: str, why: str, said: str, *extra: Any) -> None:
    """A case of the right arguments of a command, followed by others."""
    CASES.append(Case(name, why, said, lambda good, at: [*right(name, good, at), *extra]))


def spoiled(name: str, why: str, said: str) -> Callable[[Spoil], Spoil]:
    """A case of a command whose further arguments the decorated function makes."""

    def add(make: Spoil) -> Spoil:
        CASES.append(
            Case(name, why, said, lambda good, at: [*right(name, good, at), *make(good, at)])
        )
        return make

    return add


def loader(name: str, why: str, said: str, make: Spoil) -> None:
    CASES.append(Case(name, why, said, make))


def right(name: str, good: Good, at: Path) -> list[str]:
    lora = ["--adapter", str(good.adapter)]
    out = ["--out", str(at / "out")]
    model = ["--model", str(good.model)]
    arguments = {
        "finetune": [*model, "--data", str(good.chats), *out],
        "rank-search": [*model, "--data", str(good.chats), "--ranks", "2", *out],
        "compare": [*model, "--data", str(good.labelled), "--train", "2", "--held-out", "2", *out],
        "merge": ["--base", str(good.model), *lora, *out],
        "generate": [*model, *lora, "--prompt", "Hi"],
        "tune": ["--out", str(at / "tuned.json")],
    }
    return [name, *arguments.get(name, [])]


def file(at: Path, name: str, content: str | bytes) -> str:
    path = at / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def copied(folder: Path, at: Path) -> Path:
    return Path(shutil.copytree(folder, at / folder.name))


def cut(path: Path, size: int = 100) -> Path:
    path.write_bytes(path.read_bytes()[:-size])
    return path


def lines(at: Path, *records: Any) -> list[str]:
    """--data with good examples and these behind them."""
    return ["--data", str(write_lines(at / "bad.jsonl", [chat("a", "b")] * 3 + list(records)))]


def changed_json(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path


def adapter_with(
    change: Callable[[dict[str, Any]], dict[str, Any]],
) -> Spoil:
    def make(good: Good, at: Path) -> list[str]:
        folder = copied(good.adapter, at)
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
        return ["--adapter", str(folder)]

    return make


def on_gpt2(good: Good, at: Path) -> Path:
    folder = at / "gpt2"
    gpt2().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


# info, verify
command("info", "a word that it has no use for", "belongs to no option", "more")
command("info", "an option that does not exist", "did you mean --json?", "--jsno")
command("verify", "no such engine", "no engine here begins with 'abacus'", "--engines", "abacus")
command("verify", "no such peer", "invalid choice: 'nobody'", "--peer", "nobody")
command("verify", "--thorough with --peer", "want no --thorough", "--peer", "peft", "--thorough")

# bench
for why, said, extra in (
    ("two sizes in place of three", "want MxKxN", ["--shapes", "1x2"]),
    ("no such model", "invalid choice", ["--model", "nobody"]),
    ("rank 0", "want a whole number", ["--ranks", "0"]),
    ("dropout 1", "want a probability in [0, 1)", ["--dropout", "1"]),
    ("seconds that are none", "'nan'", ["--seconds", "nan"]),
    ("--rows without --model", "--rows: want --model beside it", ["--rows", "4"]),
    ("--json below a file", "--json: /dev/null/x.json cannot", ["--json", "/dev/null/x.json"]),
    ("--csv below a file", "--csv: /dev/null/x.csv cannot", ["--csv", "/dev/null/x.csv"]),
    ("--compare with a file that is not there", "No such file", ["--compare", "nowhere.json"]),
    ("three files to compare", "got 3 files, want 1 or 2", ["--compare", "a", "b", "c"]),
):
    command("bench", why, said, *extra)


@spoiled("bench", "--json is a folder", "it is a folder, want a file")
def _(good: Good, at: Path) -> list[str]:
    return ["--json", str(at)]


for why, said, content in (
    ("--compare: no JSON", "is no JSON", b"{"),
    ("--compare: bytes that are no text", "is no JSON", b"\xff\xfe\x00"),
    ("--compare: brackets without end", "is no JSON", b"[" * 100_000),
    ("--compare: a list", "want provenance and rows", b"[]"),
    ("--compare: no rows", "has no rows", b'{"provenance": {}, "rows": []}'),
    ("--compare: a row of text", "a row without seconds", b'{"provenance": {}, "rows": ["x"]}'),
    ("--compare: a row without times", "a row without", b'{"provenance": {}, "rows": [{}]}'),
):
    CASES.append(
        Case("bench", why, said, lambda good, at, c=content: ["bench", "--compare",
             file(at, "old.json", c)])
    )  # fmt: skip

BAD_ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("--compare: a time of text", "above 0", {"seconds": {"ours": {"p20": "x"}}}),
    ("--compare: a time of NaN", "above 0", {"seconds": {"ours": dict.fromkeys(
        ("p20", "p50", "p80", "rounds"), float("nan"))}}),
    ("--compare: times in a list", "above 0", {"seconds": {"ours": [1, 2, 3]}}),
    ("--compare: a row without sizes", "a row without M, want", {"M": None}),
    ("--compare: a ratio of text", "'over'", {"seconds": {"ours": {
        "p20": 1, "p50": 1, "p80": 1, "rounds": 9, "over": {"p50": "x"}}}}),
]  # fmt: skip
for why, said, fields in BAD_ROWS:

    @spoiled("bench", why, said)
    def _(good: Good, at: Path, fields: dict[str, Any] = fields) -> list[str]:
        data = json.loads(good.bench.read_text())
        row = {key: value for key, value in (data["rows"][0] | fields).items() if value is not None}
        return ["--compare", file(at, "old.json", json.dumps(data | {"rows": [row]})),
                str(good.bench)]  # fmt: skip


# tune, and what reads its file
command("tune", "--out below a file", "--out: /dev/null/t.json cannot", "--out", "/dev/null/t.json")
command("tune", "a size without a second one", "want KxN", "--shapes", "4096")
TUNED: list[tuple[str, str, Any]] = [
    ("no JSON", "want a file that `lora-kernels tune` wrote", "{"),
    ("rows that are a number", "want a file that `lora-kernels tune`", '{"rows": 5}'),
    ("a list", "want a file that `lora-kernels tune` wrote", "[]"),
    ("a row without a field", "KeyError('arch')", '{"rows": [{}]}'),
    ("no such strategy", "strategy", {"strategy": "guess"}),
    ("tiles of text", "want powers of two", {"forward": {"block_m": "x", "block_n": 1, "block_k": 1,
                                              "warps": 4, "stages": 2}}),
    ("a negative size", "columns -1", {"columns": -1}),
]  # fmt: skip
for why, said, content in TUNED:

    def write(good: Good, at: Path, content: Any = content) -> str:
        if isinstance(content, dict):
            (row,) = json.loads(good.tuned.read_text())["rows"]
            content = json.dumps({"rows": [row | content]})
        return file(at, "bad-tuned.json", content)

    CASES.append(
        Case("tune", f"--out: {why}", said,
             lambda good, at, write=write: ["tune", "--out", write(good, at)])
    )  # fmt: skip
    loader(
        "backends.triton.measured.read", why, said,
        lambda good, at, write=write: (lambda path: lambda: measured.read(Path(path)))(
            write(good, at)
        ),
    )  # fmt: skip

# finetune
for why, said, extra in (
    ("no such model", "there is no /nowhere", ["--model", "/nowhere"]),
    ("a hub id that is not in the cache", "there is no no/body", ["--model", "no/body"]),
    ("no such data", "there is no file /nowhere", ["--data", "/nowhere.jsonl"]),
    ("--out below a file", "--out: /dev/null/out cannot be written", ["--out", "/dev/null/out"]),
    ("a negative seed", "--seed: got -1", ["--seed", "-1"]),
    ("a seed of more than 32 bits", "--seed: got 4294967296", ["--seed", "4294967296"]),
    ("rank above the layers' width", "--rank: got 65, want at most 32", ["--rank", "65"]),
    ("a rank of text", "invalid int value: 'x'", ["--rank", "x"]),
    ("a learning rate of NaN", "--lr: got nan", ["--lr", "nan"]),
    ("an infinite weight decay", "--weight-decay: got inf", ["--weight-decay", "inf"]),
    ("warm-up of all steps", "--warmup: got 1.0", ["--warmup", "1"]),
    ("steps and epochs", "--epochs: want no --steps", ["--epochs", "1", "--steps", "3"]),
    ("no such schedule", "invalid choice: 'up'", ["--scheduler", "up"]),
    ("no such start", "invalid choice: 'zeros'", ["--init", "zeros"]),
    ("no such service", "--report-to: got fax", ["--report-to", "fax"]),
    ("longer examples than positions", "--max-length: got 257", ["--max-length", "257"]),
    ("no such preset", "did you mean 'medical'?", ["--preset", "medcial"]),
    ("no such layer", "did you mean q_proj?", ["--target-modules", "q_prj"]),
    ("no such device", "--device: got abacus", ["--device", "abacus"]),
):
    command("finetune", why, said, *extra)

LINES: list[tuple[str, str, Any]] = [
    ("a line cut short", ":4: invalid JSON", '{"messages": [{"role"'),
    ("brackets without end", ":4: invalid JSON", "[" * 100_000),
    ("a number without end", ":4: invalid JSON", '{"text": ' + "9" * 5000 + "}"),
    ("a line that is a list", "got a JSON list", "[1]"),
    ("none of the forms", "got the keys question", {"question": "?"}),
    ("messages of text", "messages: got a JSON str", {"messages": "hello"}),
    ("messages of numbers", "messages[0]: want", {"messages": [1, 2]}),
    ("no such role", "did you mean 'assistant'?", {"messages": [
        {"role": "user", "content": "x"}, {"role": "asistant", "content": "y"}]}),
    ("content that is a list", "content: got list", {"messages": [
        {"role": "user", "content": [1]}, {"role": "assistant", "content": "y"}]}),
    ("a number in place of a prompt", "prompt: got a JSON int", {"prompt": 1, "completion": "x"}),
    ("half of a surrogate pair", "half of a surrogate pair", '{"text": "\\ud800"}'),
]  # fmt: skip
for why, said, record in LINES:

    @spoiled("finetune", f"--data: {why}", said)
    def _(good: Good, at: Path, record: Any = record) -> list[str]:
        return lines(at, record)

    loader(
        "finetune.load_chat", why, said,
        lambda good, at, record=record: (lambda path: lambda: load_chat(path, tokenizer()))(
            lines(at, record)[1]
        ),
    )  # fmt: skip


@spoiled("finetune", "--data: no UTF-8", "not UTF-8")
def _(good: Good, at: Path) -> list[str]:
    return ["--data", file(at, "latin.txt", b"caf\xe9")]


@spoiled("finetune", "--data is a folder", "there is no file")
def _(good: Good, at: Path) -> list[str]:
    return ["--data", str(at)]


MODELS: list[tuple[str, str, Spoil]] = [
    ("a configuration cut short", "transformers cannot load",
     lambda good, m: cut(m / "config.json")),
    ("a configuration that is a list", "transformers cannot load",
     lambda good, m: (m / "config.json").write_text("[]")),
    ("no such architecture", "transformers cannot load",
     lambda good, m: changed_json(m / "config.json", model_type="lama")),
    ("sizes of text", "transformers cannot", lambda good, m: changed_json(
        m / "config.json", hidden_size="wide")),
    ("weights cut short", "transformers cannot load",
     lambda good, m: cut(m / "model.safetensors", 5000)),
    ("weights that are no safetensors", "transformers cannot load",
     lambda good, m: (m / "model.safetensors").write_bytes(b"\x00" * 999)),
    ("no weights", "transformers cannot load", lambda good, m: (m / "model.safetensors").unlink()),
    ("a weight missing", "lacks the weight", lambda good, m: save_file(
        {k: v for k, v in load_file(m / "model.safetensors").items() if "up_proj" not in k},
        m / "model.safetensors", metadata={"format": "pt"})),
    ("weights of other sizes", "transformers cannot load", lambda good, m: changed_json(
        m / "config.json", intermediate_size=80)),
]  # fmt: skip
for why, said, spoil in MODELS:

    @spoiled("finetune", f"--model: {why}", said)
    def _(good: Good, at: Path, spoil: Spoil = spoil) -> list[str]:
        model = copied(good.model, at)
        spoil(good, model)
        return ["--model", str(model)]

    def load(good: Good, at: Path, spoil: Spoil = spoil) -> Any:
        model = copied(good.model, at)
        spoil(good, model)
        return lambda: load_base(model, torch.float32, CPU)

    loader("finetune.model.load_base", why, said, load)


@spoiled("finetune", "--model: a tokenizer cut short", "transformers cannot load")
def _(good: Good, at: Path) -> list[str]:
    model = copied(good.model, at)
    cut(model / "tokenizer.json")
    return ["--model", str(model)]


@spoiled("finetune", "--model: a chat template that is none", "the chat template refuses")
def _(good: Good, at: Path) -> list[str]:
    model = copied(good.model, at)
    made = tokenizer(TEMPLATE.replace("{% endfor %}", "", 1))
    made.save_pretrained(model)
    return ["--model", str(model)]


GGUF: list[tuple[str, str, bytes]] = [
    ("a GGUF file of text", "transformers cannot load", b"no gguf at all, but text" * 9),
    ("an empty GGUF file", "transformers cannot load", b""),
    ("a GGUF file cut short", "transformers cannot load",
     b"GGUF" + (3).to_bytes(4, "little") + (2).to_bytes(8, "little") * 2),
]  # fmt: skip
for why, said, content in GGUF:

    @spoiled("finetune", f"--model: {why}", said)
    def _(good: Good, at: Path, content: bytes = content) -> list[str]:
        pytest.importorskip("gguf")
        return ["--model", file(at, "model.gguf", content)]


def with_run(good: Good, at: Path, name: str, content: str) -> list[str]:
    """--out with a checkpoint and a file of such a content."""
    (at / "out" / "checkpoint-2").mkdir(parents=True)
    file(at / "out", name, content)
    return []


RUNS: list[tuple[str, str, str, str]] = [
    ("run.json cut short", "run.json is damaged", "run.json", "{"),
    ("run.json of a list", "run.json is damaged", "run.json", "[]"),
    ("a checkpoint of no run", "holds a run with another --model", "run.json", "{}"),
]
for why, said, name, content in RUNS:

    @spoiled("finetune", f"--out: {why}", said)
    def _(good: Good, at: Path, name: str = name, content: str = content) -> list[str]:
        return with_run(good, at, name, content)


# rank-search
for why, said, extra in (
    ("fewer steps than AdaLoRA needs", "--steps: got 4, want at least 10", ["--steps", "4"]),
    ("a rank twice", "--ranks: got (2, 2)", ["--ranks", "2", "2"]),
    ("rank above the layers' width", "--ranks: got 64, want at most 32", ["--ranks", "2", "64"]),
    ("--out below a file", "--out: /dev/null/out cannot be", ["--out", "/dev/null/out"]),
    ("a negative seed", "--seed: got -1", ["--seed", "-1"]),
    ("one example", "--examples: got 1, want at least 2", ["--examples", "1"]),
    ("no such preset", "did you mean 'chat'?", ["--preset", "chta"]),
    ("longer examples than positions", "--max-length: got 257", ["--max-length", "257"]),
    ("a learning rate of 0", "--lr: got 0.0", ["--lr", "0"]),
    ("no such model", "there is no /nowhere", ["--model", "/nowhere"]),
):
    command("rank-search", why, said, *extra)


@spoiled("rank-search", "--eval: a line cut short", ":4: invalid JSON")
def _(good: Good, at: Path) -> list[str]:
    return ["--eval", lines(at, "{")[1]]


# compare
for why, said, extra in (
    ("no such method", "did you mean 'qlora'?", ["--methods", "qlra"]),
    ("a rate of text", "--lr: got full=x", ["--lr", "full=x"]),
    ("more texts than there are", "--train and --held-out: got 99", ["--train", "99"]),
    ("no such field", "no field 'sentiment'", ["--label", "sentiment"]),
    ("--out below a file", "--out: /dev/null/out cannot be", ["--out", "/dev/null/out"]),
    ("no such device", "--device: got abacus", ["--device", "abacus"]),
    ("no steps", "--steps: got 0", ["--steps", "0"]),
    ("longer texts than positions", "--max-length: got 257", ["--max-length", "257"]),
):
    command("compare", why, said, *extra)

LABELLED: list[tuple[str, str, str, bytes]] = [
    ("no JSON", "line 2: no JSON", "a.jsonl", b'{"text": "a", "label": "b"}\n{'),
    ("brackets without end", "line 1: no JSON", "a.jsonl", b"[" * 100_000),
    ("no object", "line 1: got no object", "a.jsonl", b"1"),
    ("a label that is a list", "no field 'label'", "a.jsonl", b'{"text": "a", "label": []}'),
    ("one label", "want two at least", "a.csv", b"text,label\na,b\n"),
    ("a field without end", "field larger than field limit", "a.csv",
     b"text,label\n" + b"x" * 140_000 + b",b\n"),
    ("no bzip2", "cannot be decompressed", "a.csv.bz2", b"text,label"),
    ("no UTF-8", "is not UTF-8", "a.csv", b"\xff\xfe"),
    ("no known ending", "want JSON lines (.jsonl) or a .csv", "a.xls", b"x"),
]  # fmt: skip
for why, said, name, content in LABELLED:

    @spoiled("compare", f"--data: {why}", said)
    def _(good: Good, at: Path, name: str = name, content: bytes = content) -> list[str]:
        return ["--data", file(at, name, content)]

    loader(
        "finetune.read_labelled", why, said,
        lambda good, at, name=name, content=content: (lambda path: lambda: read_labelled(path))(
            file(at, name, content)
        ),
    )  # fmt: skip

# merge, generate, and what reads adapters
ADAPTERS: list[tuple[str, str, Spoil]] = [
    ("weights cut short", "cannot be read",
     lambda good, a: cut(a / "adapter_model.safetensors")),
    ("weights that are no safetensors", "cannot be read",
     lambda good, a: (a / "adapter_model.safetensors").write_bytes(b"x" * 99)),
    ("no weights", "holds no adapter_model.safetensors",
     lambda good, a: (a / "adapter_model.safetensors").unlink()),
    ("no configuration", "holds no adapter_config.json",
     lambda good, a: (a / "adapter_config.json").unlink()),
    ("a configuration cut short", "adapter_config.json cannot be read",
     lambda good, a: cut(a / "adapter_config.json", 9)),
    ("a configuration that is a list", "adapter_config.json cannot be read",
     lambda good, a: (a / "adapter_config.json").write_text("[]")),
    ("no such kind of adapter", "adapter_config.json cannot be read",
     lambda good, a: changed_json(a / "adapter_config.json", peft_type="LORE")),
    ("rank 0 in the configuration", "does not fit the base",
     lambda good, a: changed_json(a / "adapter_config.json", r=0)),
    ("a rank of text", "does not fit the base",
     lambda good, a: changed_json(a / "adapter_config.json", r="x")),
    ("another rank than the weights'", "and 11 more",
     lambda good, a: changed_json(a / "adapter_config.json", r=5)),
    ("layers that the base lacks", "does not fit the base",
     lambda good, a: changed_json(a / "adapter_config.json", target_modules=["c_attn"])),
]  # fmt: skip
for name in ("merge", "generate"):
    for why, said, spoil in ADAPTERS:

        @spoiled(name, f"--adapter: {why}", said)
        def _(good: Good, at: Path, spoil: Spoil = spoil) -> list[str]:
            adapter = copied(good.adapter, at)
            spoil(good, adapter)
            return ["--adapter", str(adapter)]

    for why, said, change in (
        ("a key missing", "lacks ", lambda s: dict(list(s.items())[1:])),
        ("a key of no layer", "holds, without a layer for it,",
         lambda s: s | {"base_model.model.x.lora_A.weight": torch.ones(1)}),
    ):  # fmt: skip
        spoiled(name, f"--adapter: {why}", said)(adapter_with(change))
    command(name, "a folder that is no run's", "holds no run.json", "--run", "/dev")

    @spoiled(name, "--run: run.json cut short", "run.json is damaged")
    def _(good: Good, at: Path) -> list[str]:
        run = copied(good.run, at)
        cut(run / "run.json", 9)
        return ["--run", str(run)]

    @spoiled(name, "--run: run.json without a model", "names no model and dtype")
    def _(good: Good, at: Path) -> list[str]:
        run = copied(good.run, at)
        (run / "run.json").write_text("{}")
        return ["--run", str(run)]

    @spoiled(name, "an adapter of another model", "does not fit the base")
    def _(good: Good, at: Path, name: str = name) -> list[str]:
        return ["--base" if name == "merge" else "--model", str(on_gpt2(good, at))]


def load_spoiled(spoil: Spoil) -> Spoil:
    def make(good: Good, at: Path) -> Any:
        adapter = copied(good.adapter, at)
        spoil(good, adapter)
        base = load_base(good.model, torch.float32, CPU)
        return lambda: load_adapter(base, adapter)

    return make


for why, said, spoil in ADAPTERS:
    loader("finetune.model.load_adapter", why, said, load_spoiled(spoil))

command("merge", "--out below a file", "--out: /dev/null/out cannot be", "--out", "/dev/null/out")
command("merge", "no such text", "there is no file /nowhere", "--text", "/nowhere")
command("generate", "an empty prompt", "--prompt: got none", "--prompt", "")
command("generate", "no tokens", "--max-new-tokens: got 0", "--max-new-tokens", "0")
command("generate", "a temperature of NaN", "--temperature: got nan", "--temperature", "nan")
command("generate", "a negative seed", "--seed: got -1", "--seed", "-1")


@spoiled("merge", "--out is a folder with files", "is there already")
def _(good: Good, at: Path) -> list[str]:
    file(at, "full/file", "x")
    return ["--out", str(at / "full")]


@spoiled("merge", "--base: weights cut short", "cannot be read")
def _(good: Good, at: Path) -> list[str]:
    model = copied(good.model, at)
    cut(model / "model.safetensors", 5000)
    return ["--base", str(model)]


@spoiled("merge", "--base: an index of files that are not there", "cannot be read")
def _(good: Good, at: Path) -> list[str]:
    model = copied(good.model, at)
    (model / "model.safetensors").unlink()
    file(model, "model.safetensors.index.json", '{"weight_map": {"w": "a.safetensors"}}')
    return ["--base", str(model)]


@spoiled("merge", "--base: an index of text", "cannot be read")
def _(good: Good, at: Path) -> list[str]:
    model = copied(good.model, at)
    file(model, "model.safetensors.index.json", "{")
    return ["--base", str(model)]


# loaders that no command has
def layer_state(change: Callable[[Path], Any]) -> Spoil:
    def make(good: Good, at: Path) -> Any:
        path = at / "layer.safetensors"
        save_lora_weights(LoRALinear(8, 8, r=2), path)
        change(path)
        return lambda: load_lora_weights(LoRALinear(8, 8, r=2), path)

    return make


LAYER_STATES: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("cut short", "is no whole safetensors", lambda p: cut(p, 9)),
    ("empty", "is no whole safetensors", lambda p: p.write_bytes(b"")),
    ("a key missing", "missing lora_B",
     lambda p: save_file({"lora_A": load_file(p)["lora_A"]}, p)),
    ("another shape", "lora_A is [3, 8], want [2, 8]",
     lambda p: save_file(load_file(p) | {"lora_A": torch.ones(3, 8)}, p)),
    ("a key of no layer", "unexpected x",
     lambda p: save_file(load_file(p) | {"x": torch.ones(1)}, p)),
]  # fmt: skip
for why, said, change in LAYER_STATES:
    loader("layers.load_lora_weights", why, said, layer_state(change))

CODES: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
    ("no scales", "got no 'weight.absmax'", lambda s: s.pop("weight.absmax")),
    ("no JSON", "got 0 keys", lambda s: s.pop("weight.quant_state.bitsandbytes__nf4")),
    ("JSON cut short", "quant_state.bitsandbytes__nf4", lambda s: s.update(
        {"weight.quant_state.bitsandbytes__nf4": torch.tensor(list(b"{"), dtype=torch.uint8)})),
    ("fewer codes than the shape", "packed",
     lambda s: s.update(weight=s["weight"][:-1])),
]  # fmt: skip
for why, said, change in CODES:

    def codes(good: Good, at: Path, change: Callable[[dict[str, Any]], Any] = change) -> Any:
        state = quantize_4bit(torch.eye(64), "nf4").state_dict()
        change(state)
        return lambda: Weight4bit.from_state_dict(state)

    loader("quantization.Weight4bit.from_state_dict", why, said, codes)


def cut_checkpoint(good: Good, at: Path) -> Any:
    file(at, "checkpoint-3/trainer_state.json", "{")
    return lambda: find_intact(at)


loader("finetune.checkpoints.find_intact", "a state cut short", "cannot be read", cut_checkpoint)
for why, said, content in (
    ("a line of text", "is damaged", "loss\n"),
    ("a line without a step", "a line names no step", "{}\n"),
):
    loader(
        "finetune.trainer.read_metrics", why, said,
        lambda good, at, c=content: (lambda p: lambda: read_metrics(Path(p)))(
            file(at, "metrics.jsonl", c)
        ),
    )  # fmt: skip
loader("finetune.options.read_run", "no run.json", "holds no run.json",
       lambda good, at: lambda: read_run(at))  # fmt: skip
loader("finetune.model.locate", "a name that is no hub id", "there is no a..b",
       lambda good, at: lambda: locate(Path("a..b")))  # fmt: skip
loader("finetune.merge_adapter", "no such way", "onto: got 'x'",
       lambda good, at: lambda: merge_adapter(
           good.model, good.adapter, at / "o", onto="x"))  # fmt: skip
loader("finetune.presets.find_preset", "a list", "preset: got []",
       lambda good, at: lambda: find_preset([]))  # fmt: skip
loader("finetune.add_lora_layers", "a preset of rank 0", "rank: got 0",
       lambda good, at: lambda: add_lora_layers(llama(), Preset(0, 1, ("q",), 0.0)))  # fmt: skip
loader("finetune.training_arguments", "a negative seed", "seed: got -1",
       lambda good, at: lambda: training_arguments(at / "o", seed=-1))  # fmt: skip
loader("finetune.training_arguments", "no such schedule", "scheduler: got 'up'",
       lambda good, at: lambda: training_arguments(at / "o", scheduler="up"))  # fmt: skip
loader("layers.RankAllocator.load_state_dict", "a key missing", "got no 'sensitivity'",
       lambda good, at: lambda: RankAllocator.load_state_dict(
           object.__new__(RankAllocator), {"steps": 1}))  # fmt: skip
loader("measure.compare.read", "a folder", "want a file of `bench --json`",
       lambda good, at: lambda: compare.read(at))  # fmt: skip


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    at = tmp_path_factory.mktemp("good")
    base = llama()
    base.save_pretrained(at / "model")
    tokenizer().save_pretrained(at / "model")
    adapted = add_lora_layers(base, "legal", rank=3)
    adapted.save_pretrained(str(at / "adapter"), save_embedding_layers=False)
    shutil.copytree(at / "adapter", at / "run" / "adapter")
    file(at, "run/run.json", json.dumps({"model": str(at / "model"), "dtype": "fp32"}))
    labelled = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(WORDS)]
    times = {"p20": 1.0, "p50": 1.0, "p80": 1.1, "rounds": 9}
    row = {"M": 1, "K": 8, "N": 8, "R": 2, "dtype": "float32", "mode": "step",
           "seconds": {"frozen": times, "ours": times}}  # fmt: skip
    shape = {"arch": 90, "multiprocessors": 4, "rows": 1, "columns": 8, "inner": 8, "block_r": 16,
             "itemsize": 2, "four_bit": False}  # fmt: skip
    tuned = {**shape, "strategy": measured.STRATEGIES[0], "forward": None, "backward": None,
             "device": "x", "microseconds": 1.0}  # fmt: skip
    return Good(
        at / "model",
        at / "adapter",
        at / "run",
        write_lines(at / "chat.jsonl", [chat(f"{i}?", f"{i}!") for i in range(8)]),
        Path(file(at, "text.txt", "Some words. " * 40)),
        write_lines(at / "labelled.jsonl", labelled),
        Path(file(at, "bench.json", json.dumps({"provenance": {}, "rows": [row]}))),
        Path(file(at, "tuned.json", json.dumps({"rows": [tuned]}))),
    )


def snapshot(*folders: Path) -> dict[Path, tuple[int, int]]:
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


@pytest.mark.parametrize("case", CASES, ids=[f"{c.what}: {c.why}" for c in CASES])
def test_malformed_input_is_one_line_and_writes_nothing(
    case: Case, good: Good, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)  # where a default --out would be
    made = case.spoil(good, tmp_path)
    capsys.readouterr()
    before = snapshot(tmp_path, good.model.parent)
    if callable(made):
        with pytest.raises((UsageError, ValueError)) as raised:
            made()
        said = str(raised.value)
        assert said.count("\n") == 0
    else:
        try:
            status = cli.main(made)
        except SystemExit as stop:  # argparse's
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        said = printed.out + printed.err
        assert status == 2, said
        assert "Traceback" not in printed.err
        assert printed.err.count("\n") <= 1, printed.err
        errors = [line for line in said.splitlines() if line.startswith("lora-kernels ")]
        assert len(errors) == 1 and len(errors[0]) < 600, said
        said = errors[0]
    assert case.said in said
    assert snapshot(tmp_path, good.model.parent) == before


def table() -> str:
    """All cases as Markdown."""
    rows = [f"| `{case.what}` | {case.why} | {case.said} |" for case in CASES]
    commands = {case.what for case in CASES} & cli.COMMANDS.keys()
    head = (
        f"# Malformed inputs\n\n{len(CASES)} inputs of {len(commands)} commands and "
        f"{len({case.what for case in CASES}) - len(commands)} loaders: each is told in one line, "
        "which holds these words, and nothing is written. Written by `python -m "
        "tests.finetune.test_malformed_inputs --write`.\n\n| of | input | the error says |\n"
        "|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def test_malformed_inputs_table_lists_every_command_and_case() -> None:
    assert cli.COMMANDS.keys() <= {case.what for case in CASES}
    assert len(CASES) >= 60
    assert TABLE.read_text() == table(), "python -m tests.finetune.test_malformed_inputs --write"


if __name__ == "__main__":
    if "--write" in sys.argv:
        TABLE.write_text(table())
    print(table(), end="")
