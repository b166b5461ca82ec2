"""`lora-kernels rank-search`: an adapter of each rank on one data set, a table and a curve."""

from __future__ import annotations

import argparse
from typing import Any

from .command import quiet
from .options import RankOptions, add_options, check_out, fill_in_demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train an adapter of each rank on the same data from the same seed, and AdaLoRA beside "
        "them; print score, parameters, seconds and efficiency of each, and draw the curve."
    )
    add_options(parser, RankOptions)


def run(args: argparse.Namespace) -> int:
    """Exit status: 0; UsageError for whatever can be told without the model's weights."""
    from .model import check_quant, locate
    from .presets import find_preset

    quiet()
    options = RankOptions(**fill_in_demo(vars(args)))
    locate(options.model)
    check_quant(options.quant)
    find_preset(options.preset)
    check_out(options.out)
    search(options)
    return 0


def search(options: RankOptions) -> None:
    from . import model
    from .chat import load_chat
    from .checkpoints import write_json
    from .presets import check_adapter, find_preset
    from .provenance import Provenance
    from .rank import find_optimal_rank, plot_ranks

    device = model.usable_device(options.device)
    skeleton = model.build_skeleton(options.model)
    targets = options.target_modules or find_preset(options.preset).targets
    check_adapter(skeleton, targets, max(options.ranks), "--ranks")
    length = model.check_length(options.max_length, skeleton)
    del skeleton
    tokenizer = model.load_tokenizer(options.model)
    reading: dict[str, Any] = {"max_length": length, "on_bad_line": options.on_bad_line}
    train = load_chat(options.data, tokenizer, **reading)
    print(train.report)
    if 0 < options.examples < len(train):
        _, train = train.split(options.examples / len(train), options.seed)
    if options.eval:
        val = load_chat(options.eval, tokenizer, **reading)
    else:
        train, val = train.split(0.2, options.seed)
    print(f"trained on {len(train)} examples, scored on {len(val)} held out")
    base = model.load_base(options.model, model.DTYPES[options.dtype], device, options.quant)

    provenance = Provenance(str(device))
    same = ("preset", "steps", "seed", "adalora", "out", "batch", "lr")
    found = find_optimal_rank(
        base,
        train,
        val,
        options.ranks,
        **{name: getattr(options, name) for name in same},
        targets=options.target_modules or None,
        tokenizer=tokenizer,
        on_rank=lambda row: print(
            f"rank {row.rank}: score {row.score:.4f} in {row.seconds:.1f} s", flush=True
        ),
    )
    print(found)
    name = model.display_name(options.model)
    settings = ("steps", "batch", "lr", "dtype", "quant", "seed")
    task = {"model": name, "data": [file.name for file in options.data], "train": len(train)}
    task |= {"held_out": len(val), "max_length": length}
    task |= {setting: getattr(options, setting) for setting in settings}
    result = {"provenance": provenance.facts(), "task": task} | found.as_dict()
    write_json(options.out / "ranks.json", result)
    png = options.out / "ranks.png"
    plot_ranks(png, found, f"{name}, {options.steps} steps a rank")
    print(f"curve: {png}")
