"""`lora-kernels verify`: every engine that can run here, against the float64 reference.

Where stdout is a terminal and rich is installed, a bar below the lines says how much is left.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

import torch

from ..backends import cpu, cpu_heuristics, triton
from ..backends.triton import configs
from . import multi, peers
from .case import (
    EAGER_CUDA,
    Case,
    dtype_name,
    engine,
    engines,
    fits_cuda,
    gpu_engines,
    judge,
    judge_norm,
    triton_device,
)
from .tolerance import Verdict

_f32, _bf16, _f16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = ((_f32, None), (_bf16, None), (_bf16, _f32), (_f16, None), (_f16, _f32))  # x, adapters
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "gate": {"gate": True},
    "column scale": {"column_scale": True},
    "dropout": {"dropout_p": 0.1},
    "everything": {"gate": True, "column_scale": True, "bias": True, "dropout_p": 0.1},
    "adapter only": {"base": False},
    "nf4": {"quant": "nf4-64-nested"},
    "fp4, all": {
        "quant": "fp4-32",
        "gate": True,
        "column_scale": True,
        "bias": True,
        "dropout_p": 0.1,
    },
}
MULTI_QUANTS = ("", "nf4-64-nested")  # of the base that several adapters share
# They begin so, and get no `MultiCase`, whose tensors are on a CPU; tests/gpu has others.
GPU_ENGINES = ("triton ", "cuda ", EAGER_CUDA)
SHAPES = ((70, 257, 100, 13), (1, 65, 63, 5))  # M, N, K, R: no multiples of a tile
FEW_ROWS = (5, 66, 96, 40)  # in place of the second, for 4-bit weights
THOROUGH = (*SHAPES, (515, 261, 259, 16), (33, 259, 257, 64), (130, 1536, 576, 100))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare what every kernel that runs on this machine computes, results and gradients, with "
        "the float64 reference; exit status 1 where one misses the tolerance."
    )
    parser.add_argument("--thorough", action="store_true", help="more and larger shapes")
    parser.add_argument(
        "--engines", metavar="NAME", help='only those whose name begins so, such as "triton"'
    )
    parser.add_argument(
        "--peer",
        action="append",
        choices=list(peers.PEERS),
        help="compare whole layers instead, the peer's own beside ours with the same adapter, each "
        "with the float64 reference; may be given twice",
    )
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")


def run(args: argparse.Namespace) -> int:
    """0 where every output of every case is within the tolerance, else 1; 2: it cannot start."""
    if args.peer:
        return _run_peers(args)
    shapes = THOROUGH if args.thorough else SHAPES
    results: list[dict[str, Any]] = []
    names = [*engines(), *gpu_engines()]
    if args.engines:
        names = [name for name in names if name.startswith(args.engines)]
        if not names:
            print(f"lora-kernels verify: no engine here begins with {args.engines!r}")
            return 2
    with _lines(args.json, _count(names)) as say:
        say(f"{'engine':34} {'x':9} {'adapters':9} {'option':13} worst of y and its gradients")
        for name, dtype, adapter, option, verdicts in _judged(names, shapes):
            where, worst = max(verdicts.items(), key=lambda item: _excess(item[1]))
            row = {
                "engine": name,
                "dtype": dtype_name(dtype),
                "adapter_dtype": dtype_name(adapter or dtype),
                "option": option,
                "ok": all(verdict.ok for verdict in verdicts.values()),
                "worst": where,
                "verdict": str(worst),
            }
            results.append(row)
            say(
                f"{name:34} {row['dtype']:9} {row['adapter_dtype']:9} {option:13} "
                f"{'✓' if row['ok'] else '✗'} {where.rpartition('/')[2]} {worst}"
            )
    return _end(results, args.json)


def _run_peers(args: argparse.Namespace) -> int:
    if lacking := [text for peer in args.peer if (text := peers.missing(peer))]:
        print(f"lora-kernels verify: {lacking[0]}")
        return 2
    for given, option in ((args.engines, "--engines"), (args.thorough, "--thorough")):
        if given:
            print(
                "lora-kernels verify: --peer has shapes of its own and takes the engine that a "
                f"layer chooses, want no {option}"
            )
            return 2
    todo = [(peer, case) for peer in dict.fromkeys(args.peer) for case in peers.cases_of()]
    results: list[dict[str, Any]] = []
    with _lines(args.json, len(todo)) as say:
        say("rms errors of whole layers in unit roundoffs: ours, the peer's, the limit for ours")
        for peer, case in todo:
            found = peers.compare(peer, case)
            row = {
                "peer": peer,
                "dtype": dtype_name(case.dtype),
                "M": case.M, "N": case.N, "K": case.K, "R": case.R,
                "bias": case.bias,
                "ok": found.ok,
                "not_fused": found.reason,
                "ours": {name: asdict(verdict) for name, verdict in found.ours.items()},
                "theirs": {name: asdict(verdict) for name, verdict in found.theirs.items()},
            }  # fmt: skip
            results.append(row)
            words = [f"not fused: {found.reason}"] if found.reason else []
            for name, ours in found.ours.items():
                u, theirs = ours.unit_roundoff, found.theirs[name]
                words.append(
                    f"{name} {ours.rms / u:.3g} ({theirs.rms / u:.3g}, {ours.rms_limit / u:.3g})"
                    + ("" if ours.ok else f" {ours}")
                )
            shape = f"{case.M}×{case.K}×{case.N} r={case.R}{', bias' if case.bias else ''}"
            mark = "✓" if found.ok else "✗"
            say(f"{peer:13} {row['dtype']:9} {shape:23} {mark} {'  '.join(words)}")
    return _end(results, args.json)


def _end(results: list[dict[str, Any]], as_json: bool) -> int:
    missed = sum(not row["ok"] for row in results)
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        print(f"{len(results) - missed} of {len(results)} within the tolerance")
    return 1 if missed else 0


@contextlib.contextmanager
def _lines(silent: bool, total: int) -> Iterator[Callable[[str], None]]:
    """Prints lines, of which a head and `total` more are expected; with a bar on a terminal."""
    if silent:
        yield lambda line: None
    elif not sys.stdout.isatty() or find_spec("rich") is None:
        yield lambda line: print(line, flush=True)
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("", total=total, completed=-1)  # the head is the first line

            def say(line: str) -> None:
                bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
                bar.advance(task)

            yield say


def _count(names: list[str]) -> int:
    """How many rows `_judged` will make."""
    several = [name for name in names if not name.startswith(GPU_ENGINES)]
    return len(DTYPES) * (len(OPTIONS) * len(names) + len(MULTI_QUANTS) * len(several))


Judged = tuple[str, torch.dtype, torch.dtype | None, str, dict[str, Verdict]]


def _judged(names: list[str], shapes: tuple[tuple[int, int, int, int], ...]) -> Iterator[Judged]:
    """Engine, dtypes, option, and the verdict on each output of each case."""
    for (dtype, adapter), (option, fields) in itertools.product(DTYPES, OPTIONS.items()):
        used: tuple[tuple[int, int, int, int], ...] = (
            (shapes[0], FEW_ROWS, *shapes[2:]) if "quant" in fields else shapes
        )
        cases = [Case(*shape, dtype, adapter, **fields) for shape in used]
        for name in names:
            verdicts: dict[str, Verdict] = {}
            for case in cases:
                if name.startswith("triton "):
                    case = replace(case, device=triton_device())
                elif name.startswith("cuda ") or name == EAGER_CUDA:
                    case = replace(case, device="cuda")
                for forced in _ways(name, case):
                    with engine(forced):
                        judged = judge(case)
                        if not case.dropout_p and case.base and not case.column_scale:
                            judged |= judge_norm(case)
                    few = ", few rows" if forced != name else ""
                    verdicts |= {f"{case}{few}/{output}": v for output, v in judged.items()}
            if verdicts:  # float32 has no kernel on the CUDA backend's matrix units
                yield name, dtype, adapter, option, verdicts
    for (dtype, adapter), quant in itertools.product(DTYPES, MULTI_QUANTS):
        for name in names:
            if name.startswith(GPU_ENGINES):
                continue
            several = multi.MultiCase(
                70, 65, 128, rows="mixed", dtype=dtype, adapter_dtype=adapter, quant=quant,
                dropout_p=0.1,
            )  # fmt: skip
            with engine(name):
                verdicts = {f"{several}/{k}": v for k, v in multi.judge(several).items()}
            yield name, dtype, adapter, f"adapters {quant[:3]}".strip(), verdicts


def _ways(name: str, case: Case) -> list[str]:
    """The engine, unless rank, sizes or dtype are not for it, and where the case has few rows its
    kernel for them."""
    if name == f"triton {triton.SINGLE_PASS}" and case.R > configs.MAX_SINGLE_PASS_RANK:
        return []
    if name.startswith("cuda ") and not fits_cuda(case, name.removeprefix("cuda ")):
        return []
    few = cpu_heuristics.few_rows(
        case.compute or case.compute_dtype, bool(case.quant), case.N * case.K, isa=name
    )
    strategy = cpu.FEW_ROWS if case.quant else cpu.STREAMED
    return [name, f"{name} {strategy}"] if 0 < case.M <= few else [name]


def _excess(verdict: Any) -> float:
    """How much of its allowance a verdict uses; NaN counts as all of it and more."""
    shares = [
        error / limit if limit else (0.0 if error == 0 else float("inf"))
        for error, limit in ((verdict.rms, verdict.rms_limit), (verdict.max, verdict.max_limit))
    ]
    return max(float("inf") if share != share else share for share in shares)
