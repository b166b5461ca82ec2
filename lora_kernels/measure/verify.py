"""`lora-kernels verify`: every engine that can run here, against the float64 reference."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .. import select
from ..backends import cpu, triton
from ..backends.triton import configs
from . import multi
from .case import (
    Case,
    cuda_engines,
    engine,
    engines,
    judge,
    judge_norm,
    triton_device,
    triton_engines,
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
SHAPES = ((70, 257, 100, 13), (1, 65, 63, 5))  # M, N, K, R: no multiples of a tile
FEW_ROWS = (5, 66, 96, 40)  # in place of the second, for 4-bit weights
THOROUGH = (*SHAPES, (515, 261, 259, 16), (33, 259, 257, 64), (130, 1536, 576, 100))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--thorough", action="store_true", help="more and larger shapes")
    parser.add_argument(
        "--engines", metavar="NAME", help='only those whose name begins so, such as "triton"'
    )
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")


def run(args: argparse.Namespace) -> int:
    """0 where every output of every case is within the tolerance, else 1."""
    shapes = THOROUGH if args.thorough else SHAPES
    results: list[dict[str, Any]] = []
    names = [*engines(), *triton_engines(), *cuda_engines()]
    if args.engines:
        names = [name for name in names if name.startswith(args.engines)]
        if not names:
            print(f"lora-kernels verify: no engine here begins with {args.engines!r}")
            return 2
    if not args.json:
        print(f"{'engine':34} {'x':9} {'adapters':9} {'option':13} worst of y and its gradients")
    for name, dtype, adapter, option, verdicts in _judged(names, shapes):
        where, worst = max(verdicts.items(), key=lambda item: _excess(item[1]))
        row = {
            "engine": name,
            "dtype": _name(dtype),
            "adapter_dtype": _name(adapter or dtype),
            "option": option,
            "ok": all(verdict.ok for verdict in verdicts.values()),
            "worst": where,
            "verdict": str(worst),
        }
        results.append(row)
        if not args.json:
            print(
                f"{name:34} {row['dtype']:9} {row['adapter_dtype']:9} {option:13} "
                f"{'✓' if row['ok'] else '✗'} {where.rpartition('/')[2]} {worst}",
                flush=True,
            )
    missed = sum(not row["ok"] for row in results)
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        print(f"{len(results) - missed} of {len(results)} within the tolerance")
    return 1 if missed else 0


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
                elif name.startswith("cuda "):
                    case = replace(case, device="cuda")
                for forced in _ways(name, case):
                    with engine(forced):
                        judged = judge(case)
                        if not case.dropout_p and case.base and not case.column_scale:
                            judged |= judge_norm(case)
                    few = ", few rows" if forced != name else ""
                    verdicts |= {f"{case}{few}/{output}": v for output, v in judged.items()}
            yield name, dtype, adapter, option, verdicts
    for (dtype, adapter), quant in itertools.product(DTYPES, ("", "nf4-64-nested")):
        for name in names:
            if name.startswith(("triton ", "cuda ")):  # which have no kernels for it
                continue
            several = multi.MultiCase(
                70, 65, 128, rows="mixed", dtype=dtype, adapter_dtype=adapter, quant=quant,
                dropout_p=0.1,
            )  # fmt: skip
            with engine(name):
                verdicts = {f"{several}/{k}": v for k, v in multi.judge(several).items()}
            yield name, dtype, adapter, f"adapters {quant[:3]}".strip(), verdicts


def _ways(name: str, case: Case) -> list[str]:
    """The engine, unless the rank is too large for it, and where the case has few rows on a 4-bit
    weight, its kernel for them."""
    if name == f"triton {triton.SINGLE_PASS}" and case.R > configs.MAX_SINGLE_PASS_RANK:
        return []
    few = case.quant and select.FEW_ROWS_4BIT.get(name, 0) >= case.M
    return [name, f"{name} {cpu.FEW_ROWS}"] if few else [name]


def _excess(verdict: Any) -> float:
    """How much of its allowance a verdict uses; NaN counts as all of it and more."""
    shares = [
        error / limit if limit else (0.0 if error == 0 else float("inf"))
        for error, limit in ((verdict.rms, verdict.rms_limit), (verdict.max, verdict.max_limit))
    ]
    return max(float("inf") if share != share else share for share in shares)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
