"""`lora-kernels rank-search`: one training a rank, a table and a curve."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from . import UsageError
from .command import quiet
from .options import MAX_LENGTH, check_seed, flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train an adapter of each rank on the same data from the same seed, and AdaLoRA beside "
        "them; print score, parameters, seconds and efficiency of each, and draw the curve."
    )
    parser.add_argument(
        "--demo", action="store_true", help="SmolLM2-135M-Instruct on Hamlet, where none is given"
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR|GGUF|ID",
        help="transformers model folder, GGUF file, or a cached hub id",
    )
    parser.add_argument(
        "--data", type=Path, nargs="+", metavar="FILE",
        help="JSON lines (.jsonl) of chats, prompts with completions or text, or plain text",
    )  # fmt: skip
    parser.add_argument(
        "--eval", type=Path, nargs="+", metavar="FILE",
        help="held-out data on which ranks are scored (default: a fifth of --data)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("rank-search-out"), metavar="DIR",
        help="folder for ranks.json, ranks.png and each rank's metrics (default rank-search-out)",
    )  # fmt: skip
    ranks = (4, 8, 16, 32, 64)
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=ranks, metavar="R", help="(default 4 8 16 32 64)"
    )
    parser.add_argument(
        "--preset", default="chat", help="medical, legal, chat or code: which layers (default chat)"
    )
    parser.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="other layers than the preset's"
    )
    parser.add_argument("--steps", type=int, default=100, help="for each rank (default 100)")
    parser.add_argument("--batch", type=int, default=4, help="examples a step (default 4)")
    parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate (default 2e-4)")
    parser.add_argument(
        "--max-length",
        type=int,
        help=f"tokens of an example (default {MAX_LENGTH}, or the model's positions if fewer)",
    )
    parser.add_argument(
        "--examples", type=int, default=0, metavar="N",
        help="take so many of the data's, drawn by --seed (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--on-bad-line", choices=("error", "skip"), default="error", help="(default error)"
    )
    parser.add_argument(
        "--no-adalora", dest="adalora", action="store_false", help="leave AdaLoRA out"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the model (default fp32)"
    )
    parser.add_argument(
        "--quant", choices=("nf4", "fp4"), help="hold the linear layers in 4 bits, by bitsandbytes"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument(
        "--device", default="", help="torch device (default: a GPU if there is one)"
    )


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 2 for bad arguments, 130 if interrupted."""
    quiet()
    try:
        check(args)
        search(args)
        return 0
    except KeyboardInterrupt:
        print("\nlora-kernels rank-search: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for whatever can be told without the model's weights."""
    from ..measure.outputs import unwritable_reason
    from .inputs import demo_model, demo_text
    from .model import check_quant, locate
    from .presets import find_preset

    if args.demo:
        args.model, args.data = args.model or demo_model(), args.data or [demo_text()]
    for name in ("model", "data"):
        if getattr(args, name) is None:
            raise UsageError(f"--{name} is missing; give it, or try --demo")
    locate(args.model)
    check_quant(args.quant)
    find_preset(args.preset)
    check_seed(args.seed)
    ranks = tuple(args.ranks)
    if len(set(ranks)) < len(ranks) or min(ranks) < 1:
        raise UsageError(f"--ranks: got {ranks}, want different ones, each at least 1")
    least = {"batch": 1, "steps": 10 if args.adalora else 1, "max_length": 2}
    for name, wanted in least.items():
        value = getattr(args, name)
        if value is not None and value < wanted:
            hint = ", or --no-adalora" if name == "steps" and value > 0 else ""
            raise UsageError(f"{flag(name)}: got {value}, want at least {wanted}{hint}")
    if not 0.0 < args.lr < float("inf"):
        raise UsageError(f"--lr: got {args.lr}, want a positive number")
    if args.examples < 0 or args.examples == 1:
        raise UsageError(f"--examples: got {args.examples}, want at least 2, or 0 for all")
    if reason := unwritable_reason(args.out, folder=True):
        raise UsageError(f"--out: {reason}; give a folder that can be written")


def search(args: argparse.Namespace) -> None:
    from . import model
    from .chat import load_chat
    from .presets import check_adapter, find_preset
    from .provenance import Provenance
    from .rank import RankRow, find_optimal_rank, plot_ranks
    from .recipe import write_json

    device = model.usable_device(args.device)
    skeleton = model.build_skeleton(args.model)
    targets = args.target_modules or find_preset(args.preset).targets
    check_adapter(skeleton, targets, max(args.ranks), "--ranks")
    length = model.check_length(args.max_length, skeleton)
    del skeleton
    dtype = model.DTYPES[args.dtype]
    tokenizer = model.load_tokenizer(args.model)
    reading: dict[str, Any] = {"max_length": length, "on_bad_line": args.on_bad_line}
    train = load_chat(args.data, tokenizer, **reading)
    print(train.report)
    if 0 < args.examples < len(train):
        _, train = train.split(args.examples / len(train), args.seed)
    if args.eval:
        val = load_chat(args.eval, tokenizer, **reading)
    else:
        train, val = train.split(0.2, args.seed)
    print(f"trained on {len(train)} examples, scored on {len(val)} held out")
    base = model.load_base(args.model, dtype, device, args.quant)

    provenance = Provenance(str(device))

    def done(row: RankRow) -> None:
        print(f"rank {row.rank}: score {row.score:.4f} in {row.seconds:.1f} s", flush=True)

    found = find_optimal_rank(
        base, train, val, args.ranks, preset=args.preset, targets=args.target_modules,
        steps=args.steps, seed=args.seed, adalora=args.adalora, out=args.out, tokenizer=tokenizer,
        on_rank=done, batch=args.batch, lr=args.lr,
    )  # fmt: skip
    print(found)
    name = model.display_name(args.model)
    task = {
        "model": name, "data": [file.name for file in args.data], "train": len(train),
        "held_out": len(val), "max_length": length, "steps": args.steps,
        "batch": args.batch, "lr": args.lr, "dtype": args.dtype, "quant": args.quant,
        "seed": args.seed,
    }  # fmt: skip
    result = {"provenance": provenance.facts(), "task": task} | found.as_dict()
    write_json(args.out / "ranks.json", result)
    png = args.out / "ranks.png"
    plot_ranks(png, found, f"{name}, {args.steps} steps a rank")
    print(f"curve: {png}")
