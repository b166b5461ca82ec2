"""`lora-kernels qualify`: check and time our kernels on this GPU, and use what passes from then on.

With --dry-run, on any machine: what a qualification would do on cards known by their data sheets,
and how long that is expected to take.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from .. import qualification
from ..backends import library, triton
from ..backends.triton import configs, launch
from ..choice import verdicts
from ..choice.verdicts import Group, Point, Verdict
from ..core.device import DeviceInfo
from ..qualification import claims
from ..qualification.card import Card
from ..qualification.plan import CANDIDATES, DTYPES, Claim, plan
from . import progress

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
# Seconds, estimates: to start a worker, import torch and open the device; of a claim; of a timed
# point. CPU seconds of a compilation: 0.30 for sm_80, 0.62 for sm_89, 0.50 for sm_90, as the plan's
# kernels took with Triton 3.9 on an AVX-512 server.
START, CLAIM, POINT, COMPILATION = 3.0, 0.02, 0.06, 0.6
WIDTHS = (5, 13, 15, 15, 13, 7)  # of the table's columns
EVENTS = "*"  # marks times that are not of a CUDA graph
CORES = 8  # of the machine that a dry run assumes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check this package's GPU kernels on this card against the reference, time them against "
        "PyTorch's GEMMs, and cache the verdict: from then on what passed and is faster is used. "
        "Takes up to --budget seconds."
    )
    budget = qualification.BUDGET
    add = parser.add_argument
    add("--device", type=int, metavar="INDEX", help="of the GPU (default: the current one)")
    words = "of the base GEMM (default: both)"
    add("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES], help=words)
    add("--budget", type=float, default=budget, help="seconds (default: %(default)g)")
    add("--json", action="store_true", help="print the verdict, or the dry run, as JSON")
    add("--forget", action="store_true", help="remove all cached verdicts")
    known = ", ".join(SHEETS)
    add("--dry-run", action="store_true", help=f"print what would be done on {known}")


def run(args: argparse.Namespace) -> int:
    """0 where every group passed; 1 where one failed; 2 where it cannot start."""
    if args.forget:
        for file in verdicts.forget():
            print(f"removed {file}")
        return 0
    if args.dry_run:
        print(json.dumps(plans(args.dtypes), indent=1) if args.json else dry_run(args.dtypes))
        return 0
    try:
        qualification.index_of(args.device)
        with progress.printed(args.json, len(plan(args.dtypes))) as say:
            say("each claim on this card's kernels, and whether it holds")

            def report(claim: Claim, reason: str | None) -> None:
                why = "" if reason is None else f": {reason}"
                say(f"{'✓' if reason is None else '✗'} {claim.group}: {claim.name}{why}")

            verdict = qualification.qualify(
                args.device, dtypes=args.dtypes, budget_s=args.budget, report=report
            )
    except (RuntimeError, ValueError) as error:
        said = str(error).removeprefix("qualify: ")
        print(f"lora-kernels qualify: {said}", file=sys.stderr)
        return 2
    print(json.dumps(verdict.json(), indent=1) if args.json else table(verdict))
    return 1 if verdict.failed else 0


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
    if not all(s.is_captured for p in verdict.points for s in p[5:] if s is not None):
        lines.append(f"{EVENTS} not captured in a graph: timed in a busy stream")
    lines += [f"✗ {group!s:{width}}  {why}" for group, why in sorted(verdict.failed.items())]
    lines.append(
        f"{len(verdict.passed)} of {len(verdict.passed) + len(verdict.failed)} groups pass"
    )
    lines.append(str(verdicts.file_of(verdict.key)))
    return "\n".join(lines)


def _times(point: Point) -> str:
    """Return the cells of a point's row of the table."""
    cells, both = [str(point.rows), f"{point.columns}×{point.inner}"], (point[5], point[6])
    for which in ("device", "host"):
        ours, eager = (getattr(seconds, which) * 1e6 for seconds in both)
        cells.append(f"{ours:.1f} / {eager:.1f}")
    if not all(seconds.is_captured for seconds in both):
        cells[2] += EVENTS
    forward, step = point.ratios()
    cells += [f"{forward:.2f}", "" if step is None else f"{step:.2f}"]
    return " ".join(f"{cell:>{w}}" for cell, w in zip(cells, WIDTHS, strict=True)).rstrip()


def plans(dtypes: Sequence[str]) -> list[dict[str, Any]]:
    """Return what a qualification would do on each of SHEETS, for JSON.

    Keys: `name`, `capability`, `groups` (group -> names of its claims), `points` (group -> M, N and
    K of its timed calls), `compilations`, and the expected seconds on CORES cores, `cold_s` and
    `warm_s`.
    """
    cards = []
    for name, gpu in SHEETS.items():
        wanted = plan(dtypes)
        compilations = count_compilations(gpu, wanted)
        groups: dict[str, list[str]] = {}
        for claim in wanted:
            groups.setdefault(str(claim.group), []).append(claim.name)
        points = {str(claim.group): claim.sizes for claim in wanted if claim.sizes}
        card = {"name": name, "capability": gpu.capability, "groups": groups, "points": points}
        card |= {"compilations": compilations, "cold_s": seconds(wanted, compilations)}
        cards.append(card | {"warm_s": seconds(wanted, 0)})
    return cards


def dry_run(dtypes: Sequence[str]) -> str:
    """Return the claims and points, and the compilations and expected seconds on each of SHEETS."""
    cards = plans(dtypes)
    groups, points = cards[0]["groups"], cards[0]["points"]
    lines = [
        f"{sum(map(len, groups.values()))} claims on {len(groups)} groups, "
        f"{sum(map(len, points.values()))} timed points"
    ]
    lines += [
        f"{card['name']}, sm_{card['capability']}: {card['compilations']} compilations, "
        f"{card['cold_s']:.1f} s cold, {card['warm_s']:.1f} s warm"
        for card in cards
    ]
    lines.append(f"on {CORES} cores; seconds are estimates")
    lines += [f"  {group}: {', '.join(names)}" for group, names in groups.items()]
    lines.append("M×N×K of the timed calls, for each of these dtypes")
    for each in CANDIDATES:
        sizes = (f"{M}×{N}×{K}" for N, K in each.shapes for M in each.rows)
        lines.append(f"  {each.backend} {each.strategy} {each.weight}: {', '.join(sizes)}")
    return "\n".join(lines)


def seconds(wanted: Sequence[Claim], compilations: int) -> float:
    """Return the expected seconds of a qualification."""
    timed = sum(len(claim.sizes) for claim in wanted)
    compiling = compilations * COMPILATION / CORES + (START if compilations else 0.0)
    return START + compiling + len(wanted) * CLAIM + timed * POINT


def count_compilations(gpu: DeviceInfo, wanted: Sequence[Claim], compiles: bool = False) -> int:
    """Return how many Triton kernels the claims compile for a GPU; needs none.

    compiles: whether to compile them.
    """
    mine = [claim for claim in wanted if claim.group.backend == "triton"]
    if not mine or triton.unavailable_reason() is not None or triton.is_interpreted():
        return 0
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    found: set[tuple[str, str]] = set()

    def note(*, key: Any, fn: Any, **_: Any) -> bool:
        found.add((fn.name, str(key)))
        return not compiles

    class Driver:  # what compiling asks of one
        get_current_device = staticmethod(lambda: gpu.capability)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", gpu.capability, 32))

    active = "_active" if hasattr(driver, "_active") else "active"  # the latter in Triton 3.4
    card = _Absent()
    with (
        mock.patch.object(configs, "target", lambda *args: gpu),
        mock.patch.object(knobs.runtime, "jit_cache_hook", note),
        mock.patch.object(driver, active, Driver()),
        launch.compile_only(0, 1),
    ):
        for claim in mine:
            sizes = tuple(dict.fromkeys((M, 1024, 1024) for M, _, _ in claim.sizes))
            claims.launch_all(card, claim._replace(sizes=sizes))
    return len(found)


class _Absent(Card):
    """A card whose tensors are on the CPU, where nothing is launched. Sizes that decide no tile are
    small."""

    device = "cpu"
    many = (304, 4096, 576)
    cold_bytes = 1

    def __init__(self) -> None:
        pass

    @contextlib.contextmanager
    def engine(self, group: Group) -> Iterator[None]:
        with library.as_on_gpu(), super().engine(group):
            yield
