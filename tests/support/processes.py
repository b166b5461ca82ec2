"""A function in two processes of a gloo group."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
# Imported once, in the process that is forked. Importing PEFT takes as long as most tests.
PRELOADED = ["torch.distributed.fsdp", "tests.support.peft_models"]


def run_in_ranks(function: Callable[[int, str], None], folder: Path) -> None:
    """Call function(rank, folder) in each rank. Raises what a rank has raised."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(_run_rank, (function, str(folder)), nprocs=RANKS, start_method="forkserver")


def _run_rank(rank: int, function: Callable[[int, str], None], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    function(rank, folder)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in the usual way
