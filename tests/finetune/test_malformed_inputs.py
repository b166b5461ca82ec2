"""Malformed inputs of every command and every loader: one line, no traceback, nothing written.

malformed_inputs.md lists them. A case that is further arguments of a command stands only there.
`python -m tests.finetune.test_malformed_inputs` prints the table of all, and with --write puts it
into that file, which the last test compares.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kernels import cli
from lora_kernels.finetune import (
    Preset,
    UsageError,
    add_lora_layers,
    load_chat,
    merge_adapter,
    read_labelled,
)
from lora_kernels.finetune.model import load_adapter, load_base, locate
from lora_kernels.finetune.options import read_run
from lora_kernels.finetune.presets import find_preset
from lora_kernels.finetune.trainer import training_arguments
from lora_kernels.layers import LoRALinear, RankAllocator, load_lora_weights, save_lora_weights
from lora_kernels.quantization import QuantizedWeight, quantize_4bit
from tests.finetune.tiny import TEMPLATE, chat, gpt2, llama, save_model, tokenizer, write_lines

TABLE = Path(__file__).with_name("malformed_inputs.md")
CPU = torch.device("cpu")
WORDS = ["a river rose", "the sun set", "rain fell all day", "it was noon"]


class Good(NamedTuple):
    """Inputs that are right, which each case spoils a copy of."""

    model: Path
    adapter: Path
    run: Path
    chats: Path
    labelled: Path


class Case(NamedTuple):
    """what: the command or loader. why: what is wrong with its input. said: words of the error.

    spoil: from the good inputs and an empty folder, a command's arguments, or a loader's call.
    """

    what: str
    why: str
    said: str
    spoil: Callable[[Good, Path], Any]


CASES: list[Case] = []
Spoil = Callable[[Path], Any]


def right(name: str, good: Good, at: Path) -> list[str]:
    out = ["--out", str(at / "out")]
    model, chats = ["--model", str(good.model)], ["--data", str(good.chats)]
    arguments = {
        "finetune": [*model, *chats, *out],
        "rank-search": [*model, *chats, "--ranks", "2", *out],
        "compare": f"--data {good.labelled} --train 2 --held-out 2".split() + model + out,
        "merge": ["--model", str(good.model), "--adapter", str(good.adapter), *out],
        "generate": [*model, "--adapter", str(good.adapter), "--prompt", "Hi"],
        "check": [str(good.adapter), *model],
        "export": [*model, "--adapter", str(good.adapter), "--gguf", str(at / "out" / "a.gguf")],
    }
    return [name, *arguments.get(name, [])]


def command(name: str, why: str, said: str, more: Callable[[Good, Path], Any]) -> None:
    """A case of a command's right arguments, followed by others."""
    CASES.append(
        Case(name, why, said, lambda good, at: [*right(name, good, at), *map(str, more(good, at))])
    )


def loader(name: str, why: str, said: str, call: Callable[..., Any], *make: Any) -> None:
    """A case of a call; make: its arguments, or what makes them of the good inputs and a folder."""

    def spoil(good: Good, at: Path) -> Any:
        made = (each(good, at) if callable(each) else each for each in make)
        return partial(call, *made)

    CASES.append(Case(name, why, said, spoil))


def both(
    of: tuple[str, str, str], call: Callable[..., Any], cases: Any, make: Callable[..., Any]
) -> None:
    """Cases of a command's option and of the loader that reads it.

    of: the command, its option and the loader. cases: why, what is said, and arguments of `make`.
    """
    name, option, read_by = of
    for why, said, *how in cases:
        bad = make(*how)
        command(name, f"{option}: {why}", said, given(option, bad))
        loader(read_by, why, said, call, bad)


# Ways to spoil a file in a copy of a folder.


def file(at: Path, name: str, content: str | bytes) -> Path:
    path = at / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def written(name: str, content: str | bytes) -> Spoil:
    return lambda folder: file(folder, name, content)


def cut(name: str, size: int = 100) -> Spoil:
    return lambda folder: file(folder, name, (folder / name).read_bytes()[:-size])


def gone(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def changed(name: str, **fields: Any) -> Spoil:
    return lambda at: file(at, name, json.dumps(json.loads((at / name).read_text()) | fields))


def tensors(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Spoil:
    def spoil(at: Path) -> None:
        save_file(change(load_file(at / name)), at / name, metadata={"format": "pt"})

    return spoil


def copy_of(kind: str, spoil: Spoil) -> Callable[[Good, Path], Path]:
    """A spoiled copy of one of the good folders."""

    def make(good: Good, at: Path) -> Path:
        folder = Path(shutil.copytree(getattr(good, kind), at / kind))
        spoil(folder)
        return folder

    return make


def given(option: str, make: Callable[[Good, Path], Any]) -> Callable[[Good, Path], Any]:
    return lambda good, at: [option, make(good, at)]


def lines_with(record: Any) -> Callable[[Good, Path], Path]:
    """Good examples and this behind them."""
    return lambda good, at: write_lines(at / "bad.jsonl", [*[chat("a", "b")] * 3, record])


def content(name: str, text: str | bytes) -> Callable[[Good, Path], Path]:
    return lambda good, at: file(at, name, text)


for line in TABLE.read_text().splitlines():  # the cases that are arguments alone
    cells = line.strip("| ").split(" | ")
    if line.endswith("` |"):
        name, why, said, more = cells
        make = partial(lambda good, at, more: shlex.split(more), more=more.strip("`"))
        command(name.strip("`"), why, said, make)
BY_ARGUMENTS = len(CASES)

# bench
command("bench", "--json is a folder", "it is a folder, want a file", lambda _, at: ["--json", at])

# finetune
ENDLESS = '{"text": ' + "9" * 5000 + "}"
USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
LINES: list[tuple[str, str, Any]] = [
    ("a line cut short", ":4: invalid JSON", '{"messages": [{"role"'),
    ("brackets without end", ":4: invalid JSON", "[" * 100_000),
    ("a number without end", ":4: invalid JSON", ENDLESS),
    ("a line that is a list", "got a JSON list", "[1]"),
    ("none of the forms", "got the keys question", {"question": "?"}),
    (
        "Alpaca's keys",
        'put "instruction", and "input" below it, into "prompt"',
        {"instruction": "Add", "input": "1, 2", "output": "3"},
    ),
    ("messages of text", "messages: got a JSON str", {"messages": "hello"}),
    ("messages of numbers", "messages[0]: want", {"messages": [1, 2]}),
    (
        "no such role",
        "did you mean 'assistant'?",
        {"messages": [USER, ANSWER | {"role": "asistant"}]},
    ),
    (
        "content that is a list",
        "content: got list",
        {"messages": [USER | {"content": [1]}, ANSWER]},
    ),
    ("a number in place of a prompt", "prompt: got a JSON int", {"prompt": 1, "completion": "x"}),
    ("half of a surrogate pair", "half of a surrogate pair", '{"text": "\\ud800"}'),
]
of = "finetune", "--data", "finetune.load_chat"
both(of, lambda path: load_chat(path, tokenizer()), LINES, lines_with)
command("finetune", "--data: blanks", "is empty", given("--data", content("blank.txt", " \n")))
command("finetune", "--data: no UTF-8", "not UTF-8", given("--data", content("latin.txt", b"\xe9")))
command("finetune", "--data is a folder", "is a folder; give", lambda _, at: ["--data", at])
for name in ("data.csv", "data.tsv", "data.parquet"):
    table = given("--data", content(name, "prompt,completion\na,b\n"))
    command("finetune", f"--data: {name}", "is a table, which would be read as plain", table)

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MODELS: list[tuple[str, str, Spoil]] = [
    ("a configuration cut short", "transformers cannot load", cut(CONFIG)),
    ("a configuration that is a list", "transformers cannot load", written(CONFIG, "[]")),
    ("no such architecture", "transformers cannot load", changed(CONFIG, model_type="lama")),
    ("sizes of text", "transformers cannot", changed(CONFIG, hidden_size="wide")),
    ("weights cut short", "transformers cannot load", cut(WEIGHTS, 5000)),
    ("weights that are no safetensors", "transformers cannot load", written(WEIGHTS, b"\0" * 999)),
    ("no weights", "transformers cannot load", gone(WEIGHTS)),
    (
        "a weight missing",
        "lacks the weight",
        tensors(WEIGHTS, lambda state: {k: v for k, v in state.items() if "up_proj" not in k}),
    ),
    ("weights of other sizes", "transformers cannot load", changed(CONFIG, intermediate_size=80)),
]
of = "finetune", "--model", "finetune.model.load_base"
load = partial(load_base, dtype=torch.float32, device=CPU)
both(of, load, MODELS, partial(copy_of, "model"))
LEFT_OPEN = TEMPLATE.replace("{% endfor %}", "", 1)
GGUF_HEAD = b"GGUF" + (3).to_bytes(4, "little") + (2).to_bytes(8, "little") * 2
for why, said, make in (
    ("a tokenizer cut short", "transformers cannot load", copy_of("model", cut("tokenizer.json"))),
    (
        "a chat template that is none",
        "the chat template refuses",
        copy_of("model", lambda folder: tokenizer(LEFT_OPEN).save_pretrained(folder)),
    ),
    ("a folder without a model", "holds no config.json", lambda good, at: at),
    ("a GGUF file cut short", "cut short or damaged", content("model.gguf", GGUF_HEAD)),
):
    command("finetune", f"--model: {why}", said, given("--model", make))


def with_run(good: Good, at: Path, text: str) -> list[str]:
    """--out with a checkpoint and such a run.json."""
    (at / "out" / "checkpoint-2").mkdir(parents=True)
    file(at / "out", "run.json", text)
    return []


for why, said, text in (
    ("run.json cut short", "run.json is damaged", "{"),
    ("run.json of a list", "run.json is damaged", "[]"),
    ("a checkpoint of no run", "holds a run with another --model", "{}"),
):
    command("finetune", f"--out: {why}", said, partial(with_run, text=text))

# rank-search, compare
command(
    "rank-search", "--eval: a line cut short", ":4: invalid JSON", given("--eval", lines_with("{"))
)
LABELLED: list[tuple[str, str, str, bytes]] = [
    ("no JSON", "line 2: no JSON", "a.jsonl", b'{"text": "a", "label": "b"}\n{'),
    ("brackets without end", "line 1: no JSON", "a.jsonl", b"[" * 100_000),
    ("no object", "line 1: got no object", "a.jsonl", b"1"),
    ("a label that is a list", "label: got []", "a.jsonl", b'{"text": "a", "label": []}'),
    ("an empty label", "line 2: label: got ''", "a.csv", b"text,label\na,\nb,x\nc,y\n"),
    ("a label of nan", "line 3: label: got 'nan'", "a.csv", b"text,label\na,x\nb,nan\n"),
    ("one label", "want two at least", "a.csv", b"text,label\na,b\n"),
    ("a field without end", "larger than field limit", "a.csv", b"text,label\n" + b"x" * 140_000),
    ("no bzip2", "cannot be decompressed", "a.csv.bz2", b"text,label"),
    ("no UTF-8", "is not UTF-8", "a.csv", b"\xff\xfe"),
    ("no known ending", "want JSON lines (.jsonl) or a .csv", "a.xls", b"x"),
]
both(("compare", "--data", "finetune.read_labelled"), read_labelled, LABELLED, content)

# merge, generate, and what reads adapters
LORA, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
NO_LAYER = {"base_model.model.x.lora_A.weight": torch.ones(1)}
ADAPTERS: list[tuple[str, str, Spoil]] = [
    ("weights cut short", "cannot be read", cut(LORA)),
    ("weights that are no safetensors", "cannot be read", written(LORA, b"x" * 99)),
    ("no weights", f"holds no {LORA}", gone(LORA)),
    ("no configuration", f"holds no {LORA_CONFIG}", gone(LORA_CONFIG)),
    ("a configuration cut short", f"{LORA_CONFIG} cannot be read", cut(LORA_CONFIG, 9)),
    ("a configuration that is a list", f"{LORA_CONFIG} cannot be", written(LORA_CONFIG, "[]")),
    ("no such kind of adapter", f"{LORA_CONFIG} cannot", changed(LORA_CONFIG, peft_type="LORE")),
    ("rank 0 in the configuration", "does not fit the base", changed(LORA_CONFIG, r=0)),
    ("a rank of text", "does not fit the base", changed(LORA_CONFIG, r="x")),
    (
        "another rank than the weights'",
        "[3, 64], want [5, 64] and 11 more",
        changed(LORA_CONFIG, r=5),
    ),
    (
        "layers that the base lacks",
        "does not fit the base",
        changed(LORA_CONFIG, target_modules=["c_attn"]),
    ),
]


def without_a_layer(state: dict[str, Any]) -> dict[str, Any]:
    return {key: t for key, t in state.items() if "layers.1.self_attn.q_proj" not in key}


KEYS: list[tuple[str, str, Spoil]] = [
    ("a key missing", "lacks ", tensors(LORA, lambda state: dict(list(state.items())[1:]))),
    ("a layer missing", "q_proj.lora_A.weight and 1 more", tensors(LORA, without_a_layer)),
    ("a key of no layer", "holds, without a layer for", tensors(LORA, lambda s: s | NO_LAYER)),
]
for name in ("merge", "generate", "export"):
    for why, said, spoil in ADAPTERS + KEYS:
        command(name, f"--adapter: {why}", said, given("--adapter", copy_of("adapter", spoil)))
    for why, said, spoil in (
        ("cut short", "run.json is damaged", cut("run.json", 9)),
        ("without a model", "names no model and dtype", written("run.json", "{}")),
    ):
        command(name, f"--run: run.json {why}", said, given("--run", copy_of("run", spoil)))
    other = given("--model", lambda good, at: save_model(at / "gpt2", gpt2(), tokenizer()))
    said = "got gpt2, for which" if name == "export" else "does not fit the base"
    command(name, "an adapter of another model", said, other)
for why, said, spoil in ADAPTERS:
    base_of, bad = (lambda good, at: load(good.model)), copy_of("adapter", spoil)
    loader("finetune.model.load_adapter", why, said, load_adapter, base_of, bad)
for why, said, spoil in (
    ("weights cut short", "transformers cannot load", cut(WEIGHTS, 5000)),
    (
        "an index of files that are not there",
        "transformers cannot load",
        lambda folder: (
            gone(WEIGHTS)(folder),
            file(folder, f"{WEIGHTS}.index.json", '{"weight_map": {"w": "a.safetensors"}}'),
        ),
    ),
    (
        "an index of text",
        "transformers cannot load",
        lambda folder: (gone(WEIGHTS)(folder), file(folder, f"{WEIGHTS}.index.json", "{")),
    ),
):
    command("merge", f"--model: {why}", said, given("--model", copy_of("model", spoil)))


def check_of(spoil: Spoil) -> Callable[[Good, Path], Any]:
    bad = copy_of("adapter", spoil)
    return lambda good, at: ["check", str(bad(good, at)), "--model", str(good.model)]


for why, said, spoil in ADAPTERS:
    said = "does not fit the base" if said.startswith("[") else said
    CASES.append(Case("check", f"ADAPTER: {why}", said, check_of(spoil)))
command("check", "no such model", "there is no /nowhere", lambda good, at: ["--model", "/nowhere"])
full = given("--out", lambda good, at: file(at, "full/file", "x").parent)
command("merge", "--out is a folder with files", "is there already", full)


# loaders that no command has
def layer_state(good: Good, at: Path, spoil: Spoil) -> Path:
    save_lora_weights(LoRALinear(8, 8, r=2), at / "layer")
    spoil(at)
    return at / "layer"


LAYER_STATES: list[tuple[str, str, Spoil]] = [
    ("cut short", "is no whole safetensors", cut("layer", 9)),
    ("empty", "is no whole safetensors", written("layer", b"")),
    ("a key missing", "missing lora_B", tensors("layer", lambda s: {"lora_A": s["lora_A"]})),
    (
        "another shape",
        "lora_A is [3, 8], want [2, 8]",
        tensors("layer", lambda state: state | {"lora_A": torch.ones(3, 8)}),
    ),
    ("a key of no layer", "unexpected x", tensors("layer", lambda s: s | {"x": torch.ones(1)})),
]
for why, said, spoil in LAYER_STATES:
    read = partial(load_lora_weights, LoRALinear(8, 8, r=2))
    loader("layers.load_lora_weights", why, said, read, partial(layer_state, spoil=spoil))

QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"
CODES: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
    ("no scales", "got no 'weight.absmax'", lambda s: s.pop("weight.absmax")),
    ("no JSON", "got 0 keys", lambda s: s.pop(QUANT_STATE)),
    (
        "JSON cut short",
        QUANT_STATE[7:],
        lambda s: s.update({QUANT_STATE: torch.tensor([123]).byte()}),
    ),
    ("fewer codes than the shape", "packed", lambda s: s.update(weight=s["weight"][:-1])),
]
for why, said, change in CODES:
    state = quantize_4bit(torch.eye(64), "nf4").state_dict()
    change(state)
    name = "quantization.QuantizedWeight.from_state_dict"
    loader(name, why, said, QuantizedWeight.from_state_dict, state)


def folder_of(good: Good, at: Path) -> Path:
    return at


NOBODY = object.__new__(RankAllocator)
HOME = "finetune."
LOADERS: list[Any] = [
    (f"{HOME}options.read_run", "no run.json", "holds no run.json", read_run, folder_of),
    (f"{HOME}model.locate", "a name that is no hub id", "there is no a..b", locate, Path("a..b")),
    (f"{HOME}presets.find_preset", "a list", "preset: got []", find_preset, []),
]
for each in LOADERS:
    loader(*each)
loader(
    f"{HOME}merge_adapter",
    "no such way",
    "onto: got 'x'",
    lambda good: merge_adapter(good.model, good.adapter, "o", onto="x"),
    lambda good, at: good,
)
RANKLESS = Preset(0, 1, ("q",), 0.0)
loader(
    f"{HOME}add_lora_layers", "rank 0", "rank: got 0", lambda: add_lora_layers(llama(), RANKLESS)
)
for why, said, settings in (
    ("a negative seed", "seed: got -1", {"seed": -1}),
    ("no such schedule", "lr_scheduler_type: got 'up'", {"lr_scheduler_type": "up"}),
):
    loader(f"{HOME}training_arguments", why, said, partial(training_arguments, "o", **settings))
name = "layers.RankAllocator.load_state_dict"
loader(name, "a key missing", "got no 'sensitivity'", NOBODY.load_state_dict, {"steps": 1})


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    at = tmp_path_factory.mktemp("good")
    base = llama()
    save_model(at / "model", base, tokenizer())
    adapted = add_lora_layers(base, "legal", rank=3)
    adapted.save_pretrained(str(at / "adapter"), save_embedding_layers=False)
    shutil.copytree(at / "adapter", at / "run" / "adapter")
    file(at, "run/run.json", json.dumps({"model": str(at / "model"), "dtype": "fp32"}))
    labelled = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(WORDS)]
    return Good(
        at / "model",
        at / "adapter",
        at / "run",
        write_lines(at / "chat.jsonl", [chat(f"{i}?", f"{i}!") for i in range(8)]),
        write_lines(at / "labelled.jsonl", labelled),
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
    names = {case.what for case in CASES}
    commands = names & cli.COMMANDS.keys()
    head = (
        f"# Malformed inputs\n\n{len(CASES)} inputs of {len(commands)} commands and "
        f"{len(names - commands)} loaders: each is told in one line, which holds these words, and "
        "nothing is written. Tried by test_malformed_inputs.py.\n\n"
        "| of | input | the error says | by |\n|---|---|---|---|\n"
    )
    kept = [line for line in TABLE.read_text().splitlines() if line.endswith("` |")]
    made: dict[tuple[str, str], list[str]] = {}
    for case in CASES[BY_ARGUMENTS:]:  # a row for several commands and loaders
        made.setdefault((case.why.split(": ")[-1], case.said), []).append(f"`{case.what}`")
    rows = [f"| {', '.join(of)} | {why} | {said} | |" for (why, said), of in made.items()]
    return head + "\n".join(kept + rows) + "\n"


def test_malformed_inputs_table_lists_every_command_and_case() -> None:
    assert cli.COMMANDS.keys() <= {case.what for case in CASES}
    assert TABLE.read_text() == table(), "python -m tests.finetune.test_malformed_inputs --write"


if __name__ == "__main__":
    if "--write" in sys.argv:
        TABLE.write_text(table())
    print(table(), end="")
