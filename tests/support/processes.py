"""Processes that a timeout ends, with their children, and a function in two of a gloo group."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
TIMEOUT = 300.0  # seconds: ten times what the longest one takes on two busy cores
# Imported once, in the process that is forked. Importing PEFT takes as long as most tests.
PRELOADED = ["torch.distributed.fsdp", "tests.support.peft_models"]


def run_python(*argv: object, timeout: float = TIMEOUT) -> subprocess.CompletedProcess[str]:
    """Run this Python in a process of its own, on one thread, with what this one can import.

    Raises subprocess.TimeoutExpired after it has ended the process and its children, such as the
    ranks that torchrun starts in sessions of their own.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *map(str, argv)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run_in_ranks(
    function: Callable[[int, str], None], folder: Path, timeout: float = TIMEOUT
) -> None:
    """Call function(rank, folder) in each rank. Raises what a rank has raised.

    Raises TimeoutError after it has ended ranks that wait for each other.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    ranks = mp.start_processes(
        _run_rank, (function, str(folder)), nprocs=RANKS, join=False, start_method="forkserver"
    )
    end = time.monotonic() + timeout
    while not ranks.join(timeout=max(0.0, end - time.monotonic())):
        if time.monotonic() >= end:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__}: ranks still run after {timeout:.0f} s")


def _run_rank(rank: int, function: Callable[[int, str], None], folder: str) -> None:
    faulthandler.enable()  # a rank that a signal ends says where
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    function(rank, folder)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in the usual way
