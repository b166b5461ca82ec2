"""`lora-kernels rank-search`: train the same adapter at each rank, and AdaLoRA."""

from __future__ import annotations

import argparse

from ..core.quiet import silence_libraries
from .chat import check_files, load_chat
from .inputs import check_inputs, read_inputs
from .lock import FolderLock
from .options import RankOptions, add_options, check_out, pick


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train an adapter of each rank on the same data from the same seed, and AdaLoRA beside "
        "them; print score, parameters, seconds and efficiency of each, and draw the curve."
    )
    add_options(parser, RankOptions)


def run(args: argparse.Namespace) -> int:
    """Return the exit status, 0. Raises UsageError before the model's weights are read."""
    import pandas  # type: ignore[import-untyped, unused-ignore] # noqa: F401 (RankSearch's table)

    options = RankOptions(**vars(args))
    check_inputs(options)
    if options.eval:
        check_files(options.eval)
    check_out(options.out)
    with FolderLock(options.out) as lock:
        return _search(options, lock)


def _search(options: RankOptions, lock: FolderLock) -> int:
    from . import model as models
    from .checkpoints import write_json
    from .plots import draw_or_explain
    from .presets import find_preset
    from .provenance import watch
    from .rank import find_optimal_rank, plot_ranks

    silence_libraries()
    targets = options.target_modules or find_preset(options.preset).targets
    device, tokenizer, length, train = read_inputs(options, targets, max(options.ranks), "ranks")
    print(train.report)
    if 0 < options.examples < len(train):
        _, train = train.split(options.examples / len(train), options.seed)
    if options.eval:
        val = load_chat(options.eval, tokenizer, max_length=length)
    else:
        train, val = train.split(0.2, options.seed)
    print(f"trained on {len(train)} examples, scored on {len(val)} held out")
    lock.acquire()
    base = models.load_base(options.model, models.DTYPES[options.dtype], device, options.quant)

    provenance = watch(str(device))
    found = find_optimal_rank(
        base,
        train,
        val,
        options.ranks,
        **pick(options, "preset steps seed adalora out"),
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr,
        targets=options.target_modules or None,
        tokenizer=tokenizer,
        on_rank=lambda row: print(
            f"rank {row.rank}: score {row.score:.4g} in {row.seconds:.1f} s", flush=True
        ),
    )
    print(found)
    name = models.display_name(options.model)
    task = {"model": name, "data": [file.name for file in options.data], "train": len(train)}
    task |= {"held_out": len(val), "max_length": length}
    task |= pick(options, "steps batch lr dtype quant seed")
    result = {"provenance": provenance(), "task": task} | found.as_dict()
    write_json(options.out / "ranks.json", result)
    title = f"{name}, {options.steps} steps a rank"
    print(f"curve: {draw_or_explain(plot_ranks, options.out / 'ranks.png', found, title)}")
    return 0
