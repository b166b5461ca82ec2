"""`lora-kernels qualify`: check and time our kernels on this GPU, and use what passes from then on.

With --dry-run, on any machine: what a qualification would do on cards known by their data sheets,
and how long that is expected to take.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from .. import qualification
from ..choice import verdicts
from ..choice.verdicts import Point, Verdict
from ..core.device import DeviceInfo
from ..qualification import compiling
from ..qualification.plan import CANDIDATES, DTYPES, KNOWN_DTYPES, Claim, list_claims, list_orders

# Clock, bandwidth, FLOP/s of tensor and of CUDA cores, by the data sheets.
SHEETS = {
    name: DeviceInfo("cuda", *numbers, name, 0, *rates)
    for name, numbers, rates in (
        ("A100", (80, 108, 163 << 10), (1.41e9, 2.04e12, 312e12, 19.5e12)),
        ("RTX 4090", (89, 128, 99 << 10), (2.52e9, 1.01e12, 165e12, 82.6e12)),
        ("H100", (90, 132, 227 << 10), (1.755e9, 3.35e12, 949e12, 59e12)),
        ("B200", (100, 148, 227 << 10), (1.965e9, 8.0e12, 2382e12, 74e12)),
    )
}
# Seconds, estimates: to import torch; of a claim; of a timed point. CPU seconds of a compilation:
# 0.30 for sm_80, 0.62 for sm_89, 0.50 for sm_90, as the claims' kernels took with Triton 3.9 on an
# AVX-512 server.
START, CLAIM, POINT, COMPILATION = 3.0, 0.02, 0.06, 0.6
WIDTHS = (5, 13, 15, 15, 13, 7)  # of the table's columns
EVENTS = "*"  # marks times that are not of a CUDA graph
USED = "used"  # marks an order, or a skinny GEMM's kernel, that training steps take
CORES = (2, 4, 16)  # of the machines that a dry run assumes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check this package's GPU kernels on this card against the reference, time them against "
        "PyTorch's GEMMs, and cache the verdict: from then on what passed and is faster is used. "
        "Takes up to --budget seconds, after Triton's kernels were compiled."
    )
    budget = qualification.BUDGET
    add = parser.add_argument
    add("--device", type=int, metavar="INDEX", help="of the GPU (default: the current one)")
    words = f"of the base GEMM (default: {', '.join(DTYPES)})"
    add("--dtypes", nargs="+", choices=KNOWN_DTYPES, default=[*DTYPES], help=words)
    add("--budget", type=float, default=budget, help="seconds (default: %(default)g)")
    add("--json", action="store_true", help="print the verdict, or the dry run, as JSON")
    add("--forget", action="store_true", help="remove all cached verdicts")
    words = "measure the orders and the skinny GEMMs of a training step alone, and cache nothing"
    add("--orders", action="store_true", help=words)
    known = ", ".join(SHEETS)
    add("--dry-run", action="store_true", help=f"print what would be done on {known}")


def run(args: argparse.Namespace) -> int:
    """0 where every group passed; 1 where one failed or was left; 2 where it cannot start."""
    if args.forget:
        for file in verdicts.forget():
            print(f"removed {file}")
        return 0
    if args.dry_run:
        print(
            json.dumps(dry_run_json(args.dtypes), indent=1) if args.json else dry_run(args.dtypes)
        )
        return 0
    try:
        qualification.index_of(args.device)
        claims = (list_orders if args.orders else list_claims)(args.dtypes)
        if not args.json:
            count = len(claims)
            print(f"{count} claims on this card's kernels, and whether each holds")
        report = None if args.json else _print_claim
        measure = qualification.measure_orders if args.orders else qualification.qualify
        verdict = measure(args.device, dtypes=args.dtypes, budget_s=args.budget, report=report)
    except (RuntimeError, ValueError) as error:
        reason = str(error).removeprefix("qualify: ")
        print(f"lora-kernels qualify: {reason}", file=sys.stderr)
        return 2
    end = "nothing was cached" if args.orders else str(verdicts.file_of(verdict.key))
    print(json.dumps(verdict.json(), indent=1) if args.json else f"{table(verdict)}\n{end}")
    known = verdict.passed | verdict.failed.keys()
    left = {str(claim.group) for claim in claims if claim.group not in known}
    for group in sorted(left):
        print(f"– {group}  not checked: give it more --budget", file=sys.stderr)
    return 1 if verdict.failed or left else 0


def _print_claim(claim: Claim, reason: str | None) -> None:
    text = "" if reason is None else f": {reason}"
    print(f"{'✓' if reason is None else '✗'} {claim.group}: {claim.name}{text}", flush=True)


def table(verdict: Verdict) -> str:
    """Return a line for each measured point of a group that passed, or why the group failed.

    The device's and the host's columns are a forward's µs, ours and eager's.
    """
    lines = [f"{verdict.key['name']}, driver {verdict.key['driver']}"]
    width = max((len(str(group)) for group in [*verdict.passed, *verdict.failed]), default=0)
    columns = ("M", "N×K", "device, µs", "host, µs", "over eager's", "step's")
    head = " ".join(f"{name:>{w}}" for name, w in zip(columns, WIDTHS, strict=True))
    if verdict.points:
        lines.append(f"  {'':{width}} {head}")
    for group in sorted(verdict.passed):
        points = [point for point in verdict.points if point.group == group]
        lines += [f"✓ {group!s:{width}} {_times(point)}" for point in points] or [f"✓ {group}"]
    times = [(p.forward, p.eager_forward, p.step, p.eager_step) for p in verdict.points]
    if not all(s.is_captured for of_point in times for s in of_point if s is not None):
        lines.append(f"{EVENTS} not captured in a graph: timed in a busy stream")
    lines += [f"✗ {group!s:{width}}  {why}" for group, why in sorted(verdict.failed.items())]
    lines.append(
        f"{len(verdict.passed)} of {len(verdict.passed) + len(verdict.failed)} groups pass"
    )
    return "\n".join(lines)


def _times(point: Point) -> str:
    """Return the cells of a point's row of the table."""
    cells = [str(point.rows), f"{point.columns}×{point.inner}"]
    both = point.forward, point.eager_forward
    for which in ("device", "host"):
        ours, eager = (getattr(seconds, which) * 1e6 for seconds in both)
        cells.append(f"{ours:.1f} / {eager:.1f}")
    if not all(seconds.is_captured for seconds in both):
        cells[2] += EVENTS
    forward, step = point.ratios()
    cells += [f"{forward:.2f}", "" if step is None else f"{step:.2f}"]
    if verdicts.wins(point):
        cells[-1] = USED
    return " ".join(f"{cell:>{w}}" for cell, w in zip(cells, WIDTHS, strict=True)).rstrip()


def dry_run_json(dtypes: Sequence[str]) -> list[dict[str, Any]]:
    """Return what a qualification would do on each of SHEETS, as JSON types.

    Keys: `name`, `capability`, `groups` (group -> names of its claims), `points` (group -> M, N and
    K of its timed calls), `compilations`, and the expected seconds: `compiling_s`, by CORES, and
    `checking_s`, which the budget limits.
    """
    wanted, cards = list_claims(dtypes), []
    timed = sum(len(claim.sizes) for claim in wanted)
    groups: dict[str, list[str]] = {}
    for claim in wanted:
        groups.setdefault(str(claim.group), []).append(claim.name)
    for name, gpu in SHEETS.items():
        count = compiling.count(wanted, gpu)
        cards.append(
            {
                "name": name,
                "capability": gpu.capability,
                "groups": groups,
                "points": {str(claim.group): claim.sizes for claim in wanted if claim.sizes},
                "compilations": count,
                "compiling_s": {n: START + count * COMPILATION / n for n in CORES},
                "checking_s": len(wanted) * CLAIM + timed * POINT,
            }
        )
    return cards


def dry_run(dtypes: Sequence[str]) -> str:
    """Return the claims and points, and the compilations and expected seconds on each of SHEETS."""
    cards = dry_run_json(dtypes)
    groups, points = cards[0]["groups"], cards[0]["points"]
    lines = [
        f"{sum(map(len, groups.values()))} claims on {len(groups)} groups, "
        f"{sum(map(len, points.values()))} timed points",
        f"seconds are estimates; compiling is for {', '.join(map(str, CORES))} processors",
    ]
    for card in cards:
        compiling_s = ", ".join(f"{s:.1f}" for s in card["compiling_s"].values())
        lines.append(
            f"{card['name']}, sm_{card['capability']}: {card['compilations']} compilations in "
            f"{compiling_s} s, then {card['checking_s']:.1f} s of {qualification.BUDGET:g}"
        )
    lines += [f"  {group}: {', '.join(names)}" for group, names in groups.items()]
    lines.append("M of the timed calls, for weights of 4096×4096 and 14336×4096")
    for candidate in CANDIDATES:
        rows = ", ".join(map(str, candidate.rows))
        kernel = f"{candidate.backend} {candidate.strategy} {candidate.weight}"
        lines.append(f"  {kernel}: {rows}; {candidate.bound}")
    lines.append("M×N×K of a training step's GEMMs; of a skinny one M×wide dimension×rank")
    for claim in list_orders(dtypes):
        if claim.sizes:
            sizes = ", ".join("×".join(map(str, size)) for size in claim.sizes)
            lines.append(f"  {claim.group}: {sizes}")
    return "\n".join(lines)
