"""`lora-kernels tune`: which strategy and tiles are fastest on this GPU, shape by shape.

For each shape the tiles of the fused kernel are tried in both directions, then the strategies
against each other by the time of a step, forward and backward. A candidate whose results are not
the eager backend's (to the rounding of their dtype) is dropped, and said. Eager's time stands in
each row, and a row that does not beat it is used only where the triton backend is requested. The
file that is written is read where LORA_KERNELS_MEASURED names it.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__, functional, timing
from .. import device as devices
from ..backends.triton import COOPERATIVE, FUSED, LIBRARY, STRATEGIES, configs, measured
from ..backends.triton.configs import GemmTiles
from ..backends.triton.measured import Measured, Shape
from ..choice import choose as selection
from ..device import DeviceInfo
from . import case as cases
from . import models, outputs, tolerance
from .case import Case

ROWS = (1, 16, 512, 4096, 16384)
DTYPES = ("bfloat16", "float16", "float32")

# Tiles worth trying beside the default's: block_m, block_n, block_k, warps, stages.
FEW_ROWS_TILES = [
    *((16, 32, 128, 4, 4), (16, 32, 256, 4, 3), (16, 64, 64, 4, 5), (16, 64, 128, 4, 3)),
    *((16, 64, 128, 8, 4), (16, 64, 256, 8, 3), (16, 128, 64, 4, 4), (16, 128, 128, 8, 3)),
]
TILES = [
    *((64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4)),
    *((128, 128, 32, 4, 4), (128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4)),
    *((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3)),
]


@dataclass
class Trial:
    """A shape's forward and step ("backward"), and what is measured with them."""

    case: Case
    key: Shape
    seconds: float
    calls: dict[str, Callable[[], Any]]
    want: dict[str, Tensor]  # eager's results

    def run_eager(self) -> Any:
        """Return a step's results of the eager backend."""
        with selection.backend("eager"):
            return self.calls["backward"]()

    def run(self, row: Measured, direction: str = "backward") -> Any:
        """Return the result of the call with this row in the table."""
        with measured.override_row(self.key, row), selection.backend("triton"):
            return self.calls[direction]()

    def flaw(self, row: Measured) -> str | None:
        """Return why a row is left out: an exception, or a result that differs; None if neither."""
        try:
            got = self.run(row)
        except Exception as problem:  # of whatever the compiler, the driver or the launch raises
            return f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
        for name, want in self.want.items():
            # Two roundings, of the one result and of the other, and sums in another order.
            f32 = tolerance.unit_roundoff(torch.float32)
            limit = 4 * max(tolerance.unit_roundoff(want.dtype), 16 * f32)
            off = tolerance.rms_error(got[name], want.double())
            if not off <= limit:  # NaN is not
                return f"{name} differs by {off:.2g}"
        return None

    def fastest(
        self, rows: dict[str, Measured], direction: str = "backward"
    ) -> tuple[str, dict[str, float]]:
        """The name of the fastest of those without a flaw, and their seconds, by turns."""
        flaws = {name: self.flaw(row) for name, row in rows.items()}
        for name, flaw in flaws.items():
            if flaw is not None:
                print(f"    {name}: left out, {flaw}", flush=True)
        calls: dict[str, Callable[[], Any]] = {
            n: partial(self.run, row, direction) for n, row in rows.items() if not flaws[n]
        }
        if not calls:
            raise RuntimeError(f"{self.case}: no candidate gave eager's results")
        names = list(calls)
        if direction == "backward":
            calls["eager"] = self.run_eager
        times = timing.interleave(calls, seconds=self.seconds, device=self.case.device)
        seconds = {name: taken.p50 for name, taken in times.items()}
        return min(names, key=lambda name: seconds[name]), seconds


def tune(
    case: Case, target: DeviceInfo, seconds: float
) -> tuple[Shape, Measured, dict[str, float]]:
    """The fastest row for a shape; microseconds of its step, of the default's and of eager's."""
    args = cases.inputs(case)
    itemsize = max(case.dtype.itemsize, (case.adapter_dtype or case.dtype).itemsize)
    four_bit, dtypes = bool(case.quant), (case.dtype, case.adapter_dtype or case.dtype)
    key = measured.shape(target, case.M, case.N, case.K, case.R, *dtypes, four_bit)
    chosen, _ = configs.strategy(target, case.M, case.N, case.R, itemsize, four_bit, False)
    default = Measured(chosen)
    forward = partial(functional.lora_linear, **{n: v for n, v in args.items() if n != "dy"})
    step = partial(cases.run, functional.lora_linear, args)
    calls: dict[str, Callable[[], Any]] = {"forward": forward, "backward": step}
    trial = Trial(case, key, seconds, calls, {})
    trial.want = trial.run_eager()

    rows = {"default": default}
    for strategy in STRATEGIES:
        if strategy == FUSED and case.R > configs.MAX_FUSED_RANK:
            continue
        if strategy == COOPERATIVE and case.M > configs.FEW_ROWS:
            continue
        row = Measured(strategy)
        for direction in calls if strategy != LIBRARY else ():
            tried = {"default tiles": row}
            for tiles in _candidates(target, case, strategy, itemsize):
                sizes = f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k}"
                name = f"{direction} {sizes}, {tiles.warps} warps, {tiles.stages} stages"
                found: dict[str, Any] = {direction: tiles}
                tried[name] = replace(row, **found)
            row = tried[trial.fastest(tried, direction)[0]]
        rows[strategy] = row
    best, taken = trial.fastest(rows)
    named = {"": best, "default_": "default", "eager_": "eager"}
    times = {f"{of}microseconds": taken.get(name, 0.0) * 1e6 for of, name in named.items()}
    return key, rows[best], times


def _candidates(
    target: DeviceInfo, case: Case, strategy: str, itemsize: int
) -> Iterator[GemmTiles]:
    """Tiles that fit the shared memory."""
    block_r = configs.block_of_ranks(case.R) if strategy == FUSED else 0
    for tiles in FEW_ROWS_TILES if case.M <= configs.FEW_ROWS else TILES:
        config = GemmTiles(*tiles)
        if configs.shared_memory(config, itemsize, block_r) <= target.shared_memory:
            yield config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Find the fastest strategy and tiles of the Triton kernels on this GPU, shape by shape, "
        "and write them to a file that LORA_KERNELS_MEASURED=FILE has them taken from."
    )

    def add(name: str, text: str, **options: Any) -> None:
        parser.add_argument(f"--{name}", help=text, **options)

    default, positive = "(default: %(default)s)", models.positive
    of_shapes = "in-features and out-features, such as 4096x14336, in place of a model's"
    of_rows = f"of x (default: {' '.join(map(str, ROWS))})"
    of_quant = "kinds of the base weight (default: none nf4)"
    kinds = ["none", "nf4", "fp4"]
    model = f"whose linear layers' shapes {default}"
    add("model", model, choices=models.NAMES, default="llama3-8b")
    add("shapes", of_shapes, nargs="+", type=models.sizes("KxN"), metavar="KxN")
    add("rows", of_rows, nargs="+", type=positive, metavar="M", default=ROWS)
    add("ranks", "(default: 16)", nargs="+", type=positive, metavar="R", default=[16])
    add("dtype", f"of x {default}", choices=DTYPES, default=DTYPES[0])
    add("quant", of_quant, nargs="+", choices=kinds, default=kinds[:2])
    add("seconds", f"for a comparison {default}", type=models.seconds, default=0.3)
    add("out", "to be added to, or made", type=Path, required=True, metavar="FILE")


def run(args: argparse.Namespace) -> int:
    """0; 2 where --out cannot be added to, or no GPU is there that the Triton kernels run on."""
    kept: list[dict[str, Any]] = []
    try:  # before hours are spent on what could not be added to it
        if (reason := outputs.unwritable_reason(args.out)) is not None:
            raise ValueError(reason)
        if args.out.exists():
            measured.read(args.out)
            kept = json.loads(args.out.read_text())["rows"]
    except ValueError as error:
        print(f"lora-kernels tune: --out: {error}")
        return 2
    target = configs.target()
    why = configs.unsupported_reason(target, "cpu")
    if why is not None or target is None:
        print(f"lora-kernels tune: {why}")
        return 2
    provenance = {
        "device": devices.gpus()[0].name if torch.cuda.is_available() else "Triton's interpreter",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "version": __version__,
        "torch": torch.__version__,
        "triton": devices.version("triton"),
    }
    shapes, dtype = args.shapes or models.linear_shapes(args.model), getattr(torch, args.dtype)
    for (K, N), kind, R, M in itertools.product(shapes, args.quant, args.ranks, args.rows):
        quant = "" if kind == "none" else f"{kind}-64-nested"
        case = Case(M, N, K, R, dtype, quant=quant, device=cases.triton_device())
        print(case, flush=True)
        key, row, times = tune(case, target, args.seconds)
        took, default, eager = times.values()
        print(
            f"    {row.strategy}: {took:.0f} µs a step, {default:.0f} by default, {eager:.0f} eager"
        )
        found = measured.entry(key, row, rank=R, **provenance, **times)
        same = asdict(key).items()
        kept = [old for old in kept if any(old[name] != value for name, value in same)] + [found]
        _write(args.out, kept)
    print(f"{args.out}: to use it, set LORA_KERNELS_MEASURED={args.out.resolve()}")
    return 0


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps({"rows": rows}, indent=1, ensure_ascii=False) + "\n")
    partial.replace(file)
