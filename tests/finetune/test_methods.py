"""Several ways to train one classifier: what each trains, saves and scores, and what is said."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import namedtuple
from pathlib import Path
from shlex import split
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_kernels.bench import process_memory
from lora_kernels.finetune import TrainingError, UsageError, classify, provenance
from lora_kernels.finetune.classify import Outcome, Task, build, train_once
from lora_kernels.finetune.compare_command import largest_share, markdown
from lora_kernels.finetune.labelled import Labelled, read_labelled
from lora_kernels.finetune.methods import METHODS
from lora_kernels.finetune.provenance import quietness
from lora_kernels.peft import explain
from tests.finetune.tiny import bert, llama, save_model, tokenizer, write_lines

HIDDEN, INNER, LAYERS, VOCABULARY, POSITIONS = 64, 128, 2, 260, 64


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny-bert")
    return save_model(made, bert(HIDDEN, INNER, LAYERS, POSITIONS), tokenizer(None))


def records(count: int = 60) -> list[dict[str, Any]]:
    """Texts labelled by one letter, by authors of three texts each."""
    return [
        {"text": f"{'xy'[i % 2] * 3} {i}", "label": "xy"[i % 2], "author": f"author {i // 3}"}
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("labelled") / "letters.jsonl", records())


@pytest.fixture(scope="session")
def task(folder: Path, file: Path) -> Task:
    train, held_out = read_labelled(file).split(24, 16)
    return Task(folder, train, held_out, steps=12, batch=4)


# The layers: q, k, v, attention output, up, down in each, and the pooler.
LINEAR = LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER) + HIDDEN * HIDDEN
BIASES = LAYERS * (5 * HIDDEN + INNER) + HIDDEN
RANKS = LAYERS * (4 * 2 * HIDDEN + 2 * (HIDDEN + INNER)) + 2 * HIDDEN  # parameters a rank
HEAD = 2 * HIDDEN + 2
NORMS = (1 + 2 * LAYERS) * 2 * HIDDEN
EMBEDDINGS = (VOCABULARY + POSITIONS + 2) * HIDDEN
TRAINABLE = {
    "head": HEAD,
    "full": LINEAR + BIASES + NORMS + EMBEDDINGS + HEAD,
    "lora-8": 8 * RANKS + HEAD,
    "lora-16": 16 * RANKS + HEAD,
    "dora": 8 * RANKS + BIASES + HEAD,  # a magnitude for each output, as a bias has
    "qlora": 8 * RANKS + HEAD,
    "adalora": 12 * RANKS + 12 * (6 * LAYERS + 1) + HEAD,  # and E
    "lora-plus": 8 * RANKS + HEAD,
}


@pytest.mark.parametrize("name", METHODS)
def test_what_trains_is_fused_and_saved(name: str, task: Task) -> None:
    method = METHODS[name]
    model = build(task, method, 0, 0)
    head = model.get_submodule("classifier" if method.rank is None else "base_model.classifier")
    assert all(p.requires_grad for n, p in head.named_parameters() if "original" not in n)
    if method.rank is not None:
        explanation = explain(model)
        assert len(explanation.rows) == 6 * LAYERS + 1
        assert not any("peft" in row.backend for row in explanation.rows)
    run = train_once(task, method, 0)
    assert run.trainable == TRAINABLE[name]
    # AdaLoRA has taken ranks by the end, and a header says what is in the file.
    size = 4 * (TRAINABLE[name] if name != "adalora" else 8 * RANKS)
    assert size * 0.9 < run.saved_bytes < size * 1.25 + 8192
    assert 0.0 <= run.score <= 1.0
    assert run.step_seconds > 0
    assert (run.peak_memory is None) is (sys.platform != "linux")


def test_a_causal_model_without_padding_token(task: Task, tmp_path: Path) -> None:
    """Its head is called score, and stands on the last token."""
    llama(intermediate_size=128).save_pretrained(tmp_path)
    words = tokenizer(None)
    words.pad_token = None
    words.save_pretrained(tmp_path)
    for name in ("head", "qlora"):
        run = train_once(dataclasses.replace(task, model=tmp_path, steps=2), METHODS[name], 0)
        assert 0.0 <= run.score <= 1.0
    assert run.saved_bytes > 4 * 2 * 64  # the head is in the adapter's file


def test_a_task_that_can_be_learned_is(task: Task) -> None:
    longer = dataclasses.replace(task, steps=40)
    for name in ("full", "qlora"):
        method = dataclasses.replace(METHODS[name], lr=5e-3)
        assert train_once(longer, method, 0).score > 0.9, name


def test_the_score_is_of_the_held_out_texts(task: Task) -> None:
    """With their labels exchanged the right ones are the wrong ones."""
    labels = tuple(1 - label for label in task.held_out.labels)
    other = dataclasses.replace(task, held_out=dataclasses.replace(task.held_out, labels=labels))
    scores = [train_once(each, METHODS["head"], 0).score for each in (task, other)]
    assert sum(scores) == 1.0


def test_methods_start_alike_and_seeds_differ(task: Task) -> None:
    heads = [
        build(task, METHODS[name], seed, 0).state_dict()
        for name, seed in (("full", 0), ("lora-8", 0), ("full", 1))
    ]
    first = heads[0]["classifier.weight"]
    wrapped = heads[1]["base_model.model.classifier.modules_to_save.default.weight"]
    assert torch.equal(wrapped, first)
    assert not torch.equal(heads[2]["classifier.weight"], first)


def test_the_same_seed_gives_the_same_run(task: Task) -> None:
    runs = [
        dataclasses.replace(train_once(task, METHODS["lora-8"], 3), step_seconds=0, peak_memory=0)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert train_once(task, METHODS["lora-8"], 4).loss != runs[0].loss


def test_groups_stay_on_one_side(file: Path) -> None:
    data = read_labelled(file, group="author")
    assert data.names == ("x", "y") and len(data) == 60
    for seed in range(5):
        train, held_out = data.split(30, 14, seed)
        assert (len(train), len(held_out)) == (30, 14)
        assert not set(train.groups) & set(held_out.groups)
        assert not set(train.texts) & set(held_out.texts)
    with pytest.raises(UsageError, match="--train: got 46, want at most 45: groups stay on one"):
        data.split(46, 14)
    with pytest.raises(UsageError, match="--train and --held-out: got 60 and 1, want"):
        data.split(60, 1)


def test_a_table_and_lines_say_the_same(file: Path, tmp_path: Path) -> None:
    table = tmp_path / "letters.csv"
    rows = [f"{r['author']},{r['label']},{r['text']}" for r in records()]
    table.write_text("\n".join(["author,label,text", *rows, "more,z,left out", rows[0]]) + "\n")
    assert read_labelled(table, group="author", labels=("x", "y")) == read_labelled(
        file, group="author"
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a", "lable": "b"}', "line 1: no field 'label'; it has text, lable"),
        ("a.csv", "text,label\na\n", "line 2: label: got null, want a string"),
        ("a.csv", "text,label\na,x\nb,\nc,y\n", "line 3: label: got '', want a label; take the"),
        ("a.csv", "text,label\na,x\nb,NaN\n", "line 3: label: got 'NaN', want a label"),
        ("a.jsonl", "", "has the labels none"),
    ],
)
def test_bad_data(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=words):
        read_labelled(tmp_path / name)


@pytest.mark.usefixtures("in_this_process", "unmeasured")
def test_the_command(folder: Path, file: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "out"
    argv = ["compare", "--model", folder, "--data", file, "--out", out, "--group", "author"]
    argv += split("--steps 12 --batch 4 --train 24 --held-out 16 --seeds 2")
    shown = run(*argv, *split("--methods head qlora --lr qlora=3e-3"))
    assert "24 texts to train on, 16 held out, of which 62.5% have the commonest" in shown
    data = json.loads((out / "classification.json").read_text())
    assert [row["name"] for row in data["rows"]] == ["head", "qlora"]
    assert data["rows"][1]["lr"] == 3e-3
    for row in data["rows"]:
        scores = [run["score"] for run in row["runs"]]
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert row["score"] == pytest.approx(sum(scores) / 2)
        assert row["trainable"] == TRAINABLE[row["name"]]
    told = {"commit", "processor", "torch", "peft", "transformers", "others"}
    assert told <= data["provenance"].keys()
    text = (out / "classification.md").read_text()
    assert text == markdown(data)
    assert "| QLoRA (NF4), r = 8 |" in text
    assert (out / "classification.png").stat().st_size > 10_000


@pytest.mark.usefixtures("unmeasured")
def test_watch_counts_this_process_and_its_children_as_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 100 s of processors 60 are idle, 15 the run's, 15 its children's and 10 others'."""
    system = namedtuple("system", "user idle iowait")
    own = namedtuple("own", "user system children_user children_system")
    of_system = iter([system(7, 20, 3), system(47, 70, 13)])
    of_run = iter([own(1, 2, 3, 4), own(11, 7, 14, 8)])
    process = SimpleNamespace(cpu_times=lambda: next(of_run))
    times = SimpleNamespace(cpu_times=lambda: next(of_system), Process=lambda: process)
    monkeypatch.setattr(provenance, "psutil", times)
    finish = provenance.watch("cpu")
    facts = finish()
    assert facts["others"] == 0.1
    assert quietness(facts).startswith("Other programs took 10% of the processors beside it")


@pytest.mark.slow
def test_in_processes_of_their_own(task: Task) -> None:
    """The same as in this one, except for times and memory."""
    methods = {name: METHODS[name] for name in ("full", "lora-8")}
    seen: list[str] = []
    found = classify.compare_methods(task, methods, (0,), lambda done: seen.append(done.name))
    assert seen == list(methods)
    for outcome in found:
        here = train_once(task, outcome.method, 0)
        own = {"step_seconds": here.step_seconds, "peak_memory": here.peak_memory}
        assert dataclasses.replace(outcome.runs[0], **own) == here


def test_outcome_summarizes_its_runs() -> None:
    """Memory and sizes are the first run's, the time is the median and the score the mean."""
    runs = [
        classify.Run(
            seed, score, loss=1.0, step_seconds=s, trainable=7, saved_bytes=9, peak_memory=m
        )
        for seed, score, s, m in ((0, 0.5, 3.0, 11), (1, 0.75, 1.0, 22), (2, 1.0, 9.0, 33))
    ]
    row = Outcome("lora-8", METHODS["lora-8"], runs).as_dict()
    assert (row["score"], row["spread"], row["step_seconds"]) == (0.75, 0.25, 3.0)
    assert (row["peak_memory"], row["trainable"], row["saved_bytes"]) == (11, 7, 9)
    assert (row["title"], row["lr"], row["rank"]) == ("LoRA, r = 8", 1e-3, 8)
    assert Outcome("full", METHODS["full"], runs[:1]).spread == 0.0


def test_repeated_texts_have_their_first_label_and_names_are_sorted(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text,label\na,y\nb,x\na,x\n")
    data = read_labelled(file)
    assert (data.texts, data.labels, data.names) == (("a", "b"), (1, 0), ("x", "y"))
    assert data.groups == ("2", "3")  # lines: each text is a group


def test_labels_that_are_named_may_leave_empty_ones_out(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xef\xbb\xbftext,label\na,x\nb,\nc,y\nd,nan\n")  # as Excel writes
    assert read_labelled(file, labels=("x", "y")).texts == ("a", "c")
    assert read_labelled(file, labels=("x", "nan")).names == ("nan", "x")


@pytest.mark.parametrize(
    ("given", "want"), [({}, (40, 20)), ({"train": 50}, (50, 10)), ({"held_out": 6}, (54, 6))]
)
def test_split_without_sizes_takes_a_third_for_the_score(
    file: Path, given: dict[str, int], want: tuple[int, int]
) -> None:
    train, held_out = read_labelled(file).split(**given)
    assert (len(train), len(held_out)) == want


def test_split_without_sizes_takes_what_the_groups_leave() -> None:
    texts = tuple(map(str, range(9)))
    data = Labelled(texts, (0, 1, 0) * 3, ("x", "y"), ("one",) * 5 + ("two",) * 4)
    train, held_out = data.split()
    assert len(held_out) == 3 and len(train) in (4, 5)
    assert not set(train.groups) & set(held_out.groups)


@pytest.mark.parametrize("name", ["full", "lora-8"])
def test_train_once_that_diverges_names_method_and_step(task: Task, name: str) -> None:
    method = dataclasses.replace(METHODS[name], lr=1e30)
    with pytest.raises(TrainingError, match=rf"^{re.escape(method.title)}, seed 0, step"):
        train_once(task, method, 0)


def test_separators_that_json_allows_in_a_string_end_no_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    text = "one\u2028two\x85"
    records = [{"text": text, "label": "x"}, {"text": "b", "label": "y"}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    file.write_text("\r\n".join(lines) + "\n\n", encoding="utf-8", newline="")
    assert read_labelled(file).texts == (text, "b")


def test_what_is_said() -> None:
    assert quietness({"others": 0.02}).startswith("Other programs took 2% of the processors")
    assert quietness({"others": 0.01}) == "The machine had next to nothing else to do."
    assert largest_share([0, 0, 1]) == 2 / 3
    many = Labelled(("a", "b"), (0, 1), ("x", "y"), ("1", "2"))
    assert many.take([1]) == Labelled(("b",), (1,), ("x", "y"), ("2",))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_counts_what_is_freed_before_it_is_read() -> None:
    MB, cpu = 2**20, torch.device("cpu")
    left_behind = [torch.ones(MB, dtype=torch.uint8) for _ in range(100)]
    del left_behind

    def peak(size: int) -> int:
        before = process_memory.reset_peak(cpu)
        assert before is not None
        torch.ones(size, dtype=torch.uint8)
        return process_memory.peak(cpu) - before

    assert 195 * MB < peak(200 * MB) < 230 * MB  # the kernel counts resident pages in batches
    assert peak(1) < 30 * MB
