"""`lora-kernels bench`: what LoRA costs over the frozen linear, for this package and its peers.

The LoRA tax is the time of forward, or of a step (forward and backward), with the adapter over the
time of the frozen linear alone, x needing a gradient in both where anything does. Nobody pays less
than the arithmetic:

    forward 1 + R·(1/K + 1/N)      backward 1 + 2·R·(1/K + 1/N)      step 1 + 1.5·R·(1/K + 1/N)

Forward and backward are the parts of the steps that are timed. Up to STREAMED_ROWS rows of x are
also decoded: the forward without gradients, once warm and once cold, over more weights in turn than
the last-level cache holds. Ours is called as a layer calls it, which prepares the calls after the
first (with dropout as `lora_linear` is). Every candidate's results are checked before it is timed,
those of its second call, and ours decoding too, all by the same limit: a result of ours that misses
it gets ✗ instead of a time, a peer's gets ✗ and its errors beside its time. Float32 adapters beside
a bfloat16 x are PEFT's default. torch.compile gets each shape as a static one.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import subprocess
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import __version__, cpu_costs, functional, selection, timing
from .. import device as devices
from ..backends import native
from ..core.problem import Problem
from ..cpu_costs import Machine, Sizes
from ..fastpath import CallCache
from ..timing import Parts
from . import bench_summary, compare, flat, models, outputs
from . import case as cases
from .case import Case

ROWS = {"cpu": [1, 16, 512], "cuda": [1, 16, 512, 4096, 16384]}  # where the shapes are a model's
QUICK_ROWS, QUICK_RANKS, QUICK_SECONDS = [1, 512], [16], 0.25
CHECKED_ROWS = 512  # there; the float64 reference of more takes longer than all that is timed
SHAPES = [  # M, K, N
    (1, 4096, 4096), (256, 2048, 2048), (512, 2048, 5632), (1024, 576, 1536), (2048, 4096, 4096)
]  # fmt: skip
RANKS = [8, 16, 64]
DTYPES = ["float32", "bfloat16"]
SECONDS = 2.5
MODES = ("decoding", "forward", "backward", "step")

# A candidate is made from the arguments of `lora_linear`, then called with them again and again.
Call = Callable[..., Tensor]
Make = Callable[[dict[str, Any]], Call]


class AddmmLoRA(torch.autograd.Function):
    """The strongest form in PyTorch's own calls: `addmm_` adds the rank updates in place to the
    library's products; x, S and the parameters are saved and nothing else.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        s = torch.mm(x, lora_A.t()).mul_(scaling)
        ctx.save_for_backward(x, weight, lora_A, lora_B, s)
        ctx.scaling = scaling
        return torch.mm(x, weight.t()).addmm_(s, lora_B.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, s = ctx.saved_tensors
        ds = torch.mm(dy, lora_B).mul_(ctx.scaling)
        dx = torch.mm(dy, weight).addmm_(ds, lora_A)
        return dx, None, torch.mm(ds.t(), x), torch.mm(dy.t(), s), None


def ours(args: dict[str, Any]) -> Call:
    """`lora_linear` as a layer calls it; on a CPU a layer prepares its call for the next token."""
    device, cache = args["x"].device.type, CallCache()

    def on_cpu(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, **rest: Any) -> Tensor:
        return cache(x, weight, lora_A, lora_B, rest["scaling"], rest["bias"])

    def on_gpu(*args: Any, **kwargs: Any) -> Tensor:
        with cases.kernels(device):
            return functional.lora_linear(*args, **kwargs)

    if device == "cpu":  # a given mask is not for the cache
        return functional.lora_linear if args["dropout_p"] else on_cpu
    return on_gpu


def addmm(args: dict[str, Any]) -> Call:
    def call(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, **rest: Any) -> Tensor:
        y: Tensor = AddmmLoRA.apply(x, weight, lora_A, lora_B, rest["scaling"])
        return y

    return call


def eager(args: dict[str, Any]) -> Call:
    def call(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, **rest: Any) -> Tensor:
        p, scaling = rest["dropout_p"], float(rest["scaling"])
        dropped = F.dropout(x, p) if p else x
        return F.linear(x, weight) + F.linear(F.linear(dropped, lora_A), lora_B) * scaling

    return call


def compiled(args: dict[str, Any]) -> Call:
    call: Call = torch.compile(eager(args), dynamic=False)
    return call


def no_compiler(device: str) -> str | None:
    """Why torch.compile is no candidate; None where it is."""
    if device == "cuda":
        return None if devices.version("triton") else "torch.compile needs Triton on a GPU"
    return None if devices.compiler() else "torch.compile needs a C++ compiler"


def peft(args: dict[str, Any]) -> Call:
    """PEFT's own layer in train mode, holding these very tensors."""
    from peft import LoraConfig, inject_adapter_in_model

    R, K = args["lora_A"].shape
    config = LoraConfig(
        r=R,
        lora_alpha=args["scaling"] * R,  # which PEFT divides by R again
        lora_dropout=args["dropout_p"],
        target_modules=["base"],
    )
    base = torch.nn.Linear(K, len(args["weight"]), bias=False).requires_grad_(False)
    model: Any = inject_adapter_in_model(config, torch.nn.ModuleDict({"base": base}))
    layer = model.train()["base"]
    for linear, weight in (
        (layer.base_layer, args["weight"]),
        (layer.lora_A["default"], args["lora_A"]),
        (layer.lora_B["default"], args["lora_B"]),
    ):
        del linear.weight  # a parameter, which a plain tensor cannot replace
        linear.weight = weight
    return lambda x, **rest: layer(x)


def frozen(args: dict[str, Any]) -> Call:
    return lambda x, weight, **rest: F.linear(x, weight)


def candidates(case: Case) -> dict[str, tuple[Make, Case]]:
    """Name -> how it is made, and the case with its adapters' dtype."""
    sixteen_bit = case.dtype is not torch.float32
    wide = replace(case, adapter_dtype=torch.float32) if sixteen_bit else case
    found: dict[str, tuple[Make, Case]] = {"ours": (ours, case)}
    if not case.dropout_p:
        found["addmm"] = (addmm, case)
    found |= {"eager": (eager, case), "peft": (peft, wide)}
    if no_compiler(case.device) is None:
        found["torch.compile"] = (compiled, case)
    if sixteen_bit:
        found |= {"ours, fp32 adapters": (ours, wide), "peft, 16-bit adapters": (peft, case)}
    return found


def floor(case: Case, mode: str) -> float:
    """The least LoRA tax that the arithmetic allows.

    >>> floor(Case(M=256, N=2048, K=2048, R=16), "step")
    1.0234375
    """
    products = {"backward": 2.0, "step": 1.5}.get(mode, 1.0)
    return 1 + products * case.R * (1 / case.K + 1 / case.N)


def target(case: Case, mode: str) -> float | None:
    """Twice the arithmetic's tax and one per cent; none is set above rank 16, nor of a backward."""
    return 1 + 2 * (floor(case, mode) - 1) + 0.01 if case.R <= 16 and mode != "backward" else None


def least_seconds(case: Case, mode: str, machine: Machine) -> float:
    """Nothing takes less on this machine: what must move at a copy's rate, or the operations at
    that of the library's product."""
    itemsize = (case.adapter_dtype or case.dtype).itemsize
    sizes = Sizes(case.M, case.N, case.K, case.R, case.dtype, itemsize)
    bytes_, flops = (
        cpu_costs.moved(sizes, mode in ("backward", "step")),
        cpu_costs.flops(sizes, mode in ("backward", "step")),
    )
    if mode == "backward":
        bytes_, flops = bytes_ - cpu_costs.moved(sizes), flops - cpu_costs.flops(sizes)
    return max(bytes_ / machine.bandwidth, flops / machine.peaks[case.dtype])


def measure(case: Case, seconds: float, machine: Machine | None = None) -> list[dict[str, Any]]:
    """Rows for each of MODES, decoding where x is of few rows: every candidate checked, then timed
    beside the frozen linear. machine: for `floor_ms`, else None."""
    torch._dynamo.reset()  # or it would take a third shape for a dynamic one
    args = cases.inputs(replace(case, frozen=("lora_A", "lora_B")))
    made: dict[str, tuple[Make, dict[str, Any]]] = {"frozen": (frozen, args)}
    misses = {}
    for name, (make, own) in candidates(case).items():
        # Peers draw dropout masks of their own, so they are checked without.
        checked = own if make is ours else replace(own, dropout_p=0.0)
        if case.device != "cpu":
            checked = replace(checked, M=min(case.M, CHECKED_ROWS))
        verdicts = cases.judge(checked, partial(_second, make))
        wrong = [f"{output} {verdict}" for output, verdict in verdicts.items() if not verdict.ok]
        if make is ours and case.M <= compare.STREAMED_ROWS:
            wrong += _decoded_otherwise(own)
        if wrong:
            misses[name] = "; ".join(wrong)
        if not wrong or make is not ours:
            made[name] = (make, {**cases.inputs(own), "rng": None})  # to draw it takes part

    calls = {name: (make(args), args) for name, (make, args) in made.items()}
    timed = partial(
        timing.interleave_parts,
        seconds=seconds,
        most=1001,  # so that what neighbours do for a second is not all that is seen
        device=case.device,
        yardstick=compare.FROZEN,
    )
    found = {}
    found["step", "warm"], found["forward", "warm"], found["backward", "warm"] = timed(
        {name: _parts(*call) for name, call in calls.items()}
    )
    if case.M <= compare.STREAMED_ROWS:
        forwards = {name: _forward(make(args), args) for name, (make, args) in made.items()}
        with torch.no_grad():
            found["decoding", "warm"] = timed(forwards)[0]
            found["decoding", "cold"] = timed(_cold(made, case.device))[0]
    facts = {
        **_choice(case),
        "correct": "ours" not in misses,
        "misses": misses,
    }
    rows = []
    for (mode, cache), times in sorted(found.items(), key=lambda item: MODES.index(item[0][0])):
        row = {
            **_row(case, mode, cache),
            **facts,
            "floor": floor(case, mode),
            "floor_ms": machine and least_seconds(case, mode, machine) * 1e3,
            "target": target(case, mode) if cache == "warm" else None,
            "frozen_ms": times["frozen"].p50 * 1e3,
            "tax": {name: t.p50 / times["frozen"].p50 for name, t in times.items()},
            "seconds": {name: asdict(t) for name, t in times.items()},
        }
        if mode == "step":
            row |= _memory(calls, case.device)
        rows.append(row)
    return rows


def _choice(case: Case) -> dict[str, str]:
    """The backend and strategy that ours takes."""
    with cases.kernels(case.device):
        A = case.adapter_dtype or case.dtype
        choice = selection.choose(Problem(
            case.device, case.dtype, A, A, case.compute_dtype, case.R, case.M, False, case.N,
            case.K, case.dropout_p > 0,
        ))  # fmt: skip
    return {"backend": choice.backend, "strategy": choice.strategy}


def _second(make: Make, **args: Any) -> Tensor:
    """y of the second call: the first may prepare it."""
    call = make(args)
    call(**args)
    return call(**args)


def _decoded_otherwise(case: Case) -> list[str]:
    """What is wrong with ours as it is when decoding, beside what has been checked."""
    args = cases.inputs(case)
    call = _forward(ours(args), args)
    want = call()
    with torch.no_grad():
        same = [torch.equal(call(), want) for _ in range(3)]  # of which the first prepares
    return [] if all(same) else ["y MISS: without gradients it is not what it is with them"]


def _cold(
    made: dict[str, tuple[Make, dict[str, Any]]], device: str
) -> dict[str, Callable[[], object]]:
    """Forwards, without gradients, that take another copy of the weight each time."""
    weight = made["frozen"][1]["weight"]
    size = weight.numel() * weight.itemsize
    count = max(2, min(64, -(-timing.cold_bytes(device) // size)))
    weights = [weight.clone() for _ in range(count)]

    def rotated(make: Make, args: dict[str, Any]) -> Callable[[], object]:
        each = [{**args, "weight": copy} for copy in weights]
        calls = [_forward(make(args), args) for args in each]
        for call in calls:  # the first may prepare the others
            call()
        turns = itertools.cycle(calls)
        return lambda: next(turns)()

    return {name: rotated(make, args) for name, (make, args) in made.items()}


def _memory(calls: dict[str, tuple[Call, dict[str, Any]]], device: str) -> dict[str, Any]:
    """Bytes that each candidate holds for its backward, beside weight and adapter, and the most
    that a step takes beyond its arguments."""
    from .bench_memory import held, peak

    bytes_, peaks = {}, {}
    for name, (call, args) in calls.items():
        there = [args[key] for key in ("weight", "lora_A", "lora_B")]
        bytes_[name] = held(_forward(call, args), there=there).bytes
        peaks[name] = peak(partial(_whole, _parts(call, args)), device)
    return {"bytes": bytes_, "peak_bytes": peaks}


def _whole(parts: Parts) -> object:
    return parts.second(parts.first())


def _row(case: Case, mode: str, cache: str = "warm") -> dict[str, Any]:
    """What tells the row from another."""
    sizes = {key: getattr(case, key) for key in ("M", "K", "N", "R", "dropout_p")}
    return {**sizes, "dtype": cases.dtype_name(case.dtype), "mode": mode, "cache": cache}


def _forward(call: Call, args: dict[str, Any]) -> Callable[[], Tensor]:
    forward = {name: value for name, value in args.items() if name != "dy"}
    return lambda: call(**forward)


def _parts(call: Call, args: dict[str, Any]) -> Parts:
    """A step: forward, backward."""
    wanted = [
        args[name]
        for name in cases.GRADIENTS
        if args[name] is not None and args[name].requires_grad
    ]
    return Parts(_forward(call, args), lambda y: torch.autograd.grad(y, wanted, args["dy"]))


def overhead(seconds: float, device: str = "cpu") -> dict[str, float]:
    """Microseconds of one call where there is next to nothing to compute, gradients on."""
    args = cases.inputs(Case(M=1, N=64, K=64, R=8, device=device))
    made = {make.__name__: make(args) for make in (frozen, ours, addmm, eager)}
    taken = {}
    only_x = {**args, "lora_A": args["lora_A"].detach(), "lora_B": args["lora_B"].detach()}
    for mode, timed in (("forward", _forward), ("step", _parts)):
        calls = {name: timed(call, args) for name, call in made.items()}
        calls["frozen"] = timed(made["frozen"], only_x)
        for name, times in timing.interleave(
            calls, seconds=seconds, repeat=200, device=device
        ).items():
            taken[f"{name}, {mode}"] = times.p50 * 1e6
    return taken


def provenance(dtypes: list[str], device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge the numbers or to take them again."""
    cpu, f32 = devices.cpu(), torch.float32
    facts = {
        "version": __version__,
        "commit": _output("git", "-C", str(Path(__file__).parent), *GIT),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "backend": selection.choose(Problem(device, f32, f32, f32, f32, RANKS[0])).backend,
        "isa": native.isa,
        "machine": cpu.architecture,
        "processor": cpu.name,
        "cores": cpu.cores,
        "threads": cpu.threads,
        "clocks_mhz": devices.clocks_mhz(),
        "load": os.getloadavg()[0],  # at the start
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{
            name: devices.version(name)
            for name in ("peft", "transformers", "bitsandbytes", "triton", "numpy")
        },
        "copy_bandwidth": timing.copy_bandwidth(device=device),
        "product_peak": {
            name: timing.product_peak(getattr(torch, name), device=device) for name in dtypes
        },
    }
    if device == "cuda":
        query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        facts |= {
            "backend": "triton",
            "gpu": asdict(devices.gpus()[0]),
            "cuda": torch.version.cuda,
            "nvidia_smi": _output("nvidia-smi", query, "--format=csv,noheader"),
        }
    return facts


GIT = ("describe", "--always", "--dirty", "--exclude=*")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time a LoRA layer's kernels against what others use: PEFT, plain PyTorch, bitsandbytes. A "
        "row gives the layer's time over that of its frozen linear alone; results that miss the "
        "tolerance are marked, and lost rows are printed like won ones."
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--shapes", nargs="+", type=models.sizes("MxKxN"), metavar="MxKxN",
        help="rows of x, in-features, out-features, such as 512x2048x5632 (default: five, with "
        "--quant others; on a GPU llama3-8b's)",
    )  # fmt: skip
    parser.add_argument("--model", choices=models.NAMES, help="the shapes of its linear layers")
    parser.add_argument(
        "--rows", nargs="+", type=models.positive, metavar="M",
        help=f"of x, in a model's layers (default: {_words(ROWS['cpu'])}; on a GPU "
        f"{_words(ROWS['cuda'])})",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", nargs="+", type=models.positive, metavar="R",
        help=f"(default: {_words(RANKS)}; with --quant and --variants 16)",
    )  # fmt: skip
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_SECONDS} seconds for a row, rank {QUICK_RANKS[0]}, and in a model's layers "
        f"{_words(QUICK_ROWS, ' and ')} rows, unless others are named",
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=[*DTYPES, "float16"], default=DTYPES,
        help=f"of weight and x (default: {_words(DTYPES)})",
    )  # fmt: skip
    parser.add_argument(
        "--dropout", type=_probability, metavar="P", default=0.0,
        help="on the adapter's input (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=models.seconds, metavar="S",
        help=f"to spend on what is timed in turns (default: {SECONDS})",
    )  # fmt: skip
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--quant", choices=["nf4", "fp4"], help="time the layer over a 4-bit base instead"
    )
    instead.add_argument(
        "--variants",
        action="store_true",
        help="time DoRA and its row norm, groups, several adapters and hierarchical levels "
        "instead, on a CPU",
    )
    instead.add_argument(
        "--memory",
        action="store_true",
        help="count the bytes that layers, and a small Llama, hold for the backward instead",
    )
    instead.add_argument(
        "--count",
        action="store_true",
        help="count the memory traffic, kernels and peak memory of a layer on a GPU instead, ours "
        "beside PEFT's, without a GPU; exit status 1 where ours loses",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write the times and bytes there, a call a line"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar=("OLD.json", "NEW.json"),
        help="print what got slower or faster than in OLD.json, which --json wrote: in this run, "
        "or with NEW.json in that, running nothing. Each time counts as its ratio to a yardstick "
        "of its own row (the frozen layer; a read of the codes; the dense layer; PEFT's). The "
        "noise is 4 standard errors of the two medians over rounds, from the samples around them, "
        "and at least 5 %%; what may be slower is measured again. Exit status 1 where something "
        "got slower.",
    )


# Kind of run -> the options that it has no use for.
UNUSED = {
    "quant": ("ranks", "dropout"),
    "variants": ("shapes", "model", "rows", "ranks", "dropout", "device"),
    "memory": (
        "compare", "device", "shapes", "model", "rows", "ranks", "quick", "dtypes", "dropout",
        "seconds",
    ),
    "count": (
        "compare", "device", "shapes", "model", "rows", "ranks", "quick", "dtypes", "dropout",
        "seconds", "csv",
    ),
}  # fmt: skip


def unused(args: argparse.Namespace) -> str | None:
    """What is to be left out, since the run would take no account of it; None: nothing."""
    defaults = {"device": "cpu", "dtypes": DTYPES, "dropout": 0.0, "quick": False}

    def given(name: str) -> bool:
        return bool(getattr(args, name) != defaults.get(name))

    for kind, names in UNUSED.items():
        for name in names if getattr(args, kind) else ():
            if given(name):
                value = f" {args.device}" if name == "device" else ""
                return f"--{kind}: want no --{name}{value} beside it, of which it has no use"
    if given("shapes") and given("model"):
        return "--shapes: want no --model beside it, which names other shapes"
    of_model = given("model") or (args.device == "cuda" and not (args.shapes or args.quant))
    if given("rows") and not of_model:
        return "--rows: want --model beside it, whose layers take them"
    return None


def run(args: argparse.Namespace) -> int:
    """0; 1 where a result of ours misses the tolerance, got slower, or loses with --count; 2 where
    it cannot start."""
    if (why := unused(args)) is not None:
        print(f"lora-kernels bench: {why}")
        return 2
    for name in ("json", "csv"):
        file = getattr(args, name)
        if file is not None and (why := outputs.unwritable_reason(file)) is not None:
            print(f"lora-kernels bench: --{name}: {why}")
            return 2
    quick = args.quick
    if args.seconds is None:
        args.seconds = QUICK_SECONDS if quick else SECONDS
    args.ranks = args.ranks or (QUICK_RANKS if quick else RANKS)
    args.rows = args.rows or (QUICK_ROWS if quick else None)
    if args.memory:
        return _count_memory(args)
    if args.count:
        from . import bench_traffic

        return bench_traffic.run(args.json)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("lora-kernels bench: no GPU that this torch can use, want one for --device cuda")
        return 2
    if not args.compare:
        return _measure(args)[1]
    try:
        if len(args.compare) > 2:
            raise compare.NotComparable(f"--compare: got {len(args.compare)} files, want 1 or 2")
        old, *rest = map(compare.read, args.compare)  # before minutes are spent
        asked = "4-bit" if args.quant else "variants" if args.variants else "layers"
        if not rest and compare.kind(old["rows"][0]) != asked:
            raise compare.NotComparable(
                f"{args.compare[0]}: is of {compare.kind(old['rows'][0])}, the run would be of "
                f"{asked}: want {KINDS[compare.kind(old['rows'][0])]}"
            )
        runs, status = rest, 0
        if not rest:
            new, status = _measure(args)
            runs = [new]
            args.json = args.csv = None  # which hold the first, as without --compare
            while only := compare.suspects(old, *runs):
                print(f"{len(only)} rows may be slower or are too noisy, and are measured again")
                runs.append(_measure(args, only)[0])
        lines, slower = compare.report(old, *runs)
    except compare.NotComparable as error:
        print(f"lora-kernels bench: {error}")
        return 2
    print(*lines, sep="\n")
    return status or slower


def _count_memory(args: argparse.Namespace) -> int:
    from . import bench_memory

    data: dict[str, Any] = {"provenance": bench_memory.provenance(), "rows": []}
    for row in bench_memory.rows():
        data["rows"].append(row)
        print(bench_memory.line(row), flush=True)
    _write(args, data)
    return 0


# A kind of rows -> the option that asks for it.
KINDS = {"4-bit": "--quant", "variants": "--variants", "layers": "neither --quant nor --variants"}


def _measure(args: argparse.Namespace, only: Collection[str] = ()) -> tuple[dict[str, Any], int]:
    """What was measured and written, and 0 or, where a result misses the tolerance, 1.

    only: of the layers, those with a row of such an identity, and nothing beside; all where there
    are none. 4-bit bases and variants are measured as a whole.
    """
    facts = {} if only else provenance(args.dtypes, args.device)
    data: dict[str, Any] = {"provenance": facts, "rows": []}
    rows: Iterator[dict[str, Any]]
    if args.quant:
        from . import bench_4bit

        shapes = list(dict.fromkeys((K, N) for _, K, N in _shapes(args) or ()))
        counts = sorted({M for M, _, _ in _shapes(args) or ()})
        rows, line = (
            bench_4bit.rows(
                args.quant, args.dtypes, args.seconds, args.device, shapes or bench_4bit.SHAPES,
                counts or bench_4bit.ROWS,
            ),
            bench_4bit.line,
        )  # fmt: skip
    elif args.variants:
        from . import bench_variants

        rows, line = bench_variants.rows(args.dtypes, args.seconds), bench_variants.line
    else:
        if not only:
            _print_overhead(data, args)
        rows, line = _layers(args, facts, only), _line
    for row in rows:
        row |= bench_summary.load()
        data["rows"].append(row)
        first, *rest = line(row).split("\n")
        print(first + bench_summary.load_mark(row), *rest, sep="\n", flush=True)
        _write(args, data)
    _write(args, data)
    if not only:
        for text in bench_summary.lines(data["rows"]):
            print(text)
    ours = [name for row in data["rows"] for name in row["misses"] if compare.is_ours(name)]
    return data, 1 if ours else 0


def _print_overhead(data: dict[str, Any], args: argparse.Namespace) -> None:
    taken = data["overhead_us"] = overhead(args.seconds / 2, args.device)
    extra = taken["ours, forward"] - taken["eager, forward"]
    print(f"a call at M=1, K=N=64, r=8, gradients on: {extra:+.1f} µs against the eager expression")
    for name, us in taken.items():
        print(f"    {name:16} {us:6.1f} µs")


def _layers(
    args: argparse.Namespace, facts: dict[str, Any], only: Collection[str]
) -> Iterator[dict[str, Any]]:
    if (absence := no_compiler(args.device)) is not None:
        print(absence)
    machine = None
    if facts:
        peaks = {getattr(torch, name): peak for name, peak in facts["product_peak"].items()}
        machine = Machine("", facts["copy_bandwidth"], peaks)
    shapes = _shapes(args) or (SHAPES if args.device == "cpu" else _of_model("llama3-8b", args))
    for dtype, (M, K, N), R in itertools.product(args.dtypes, shapes, args.ranks):
        case = Case(
            M, N, K, R, getattr(torch, dtype), dropout_p=args.dropout, device=args.device
        )  # fmt: skip
        caches = itertools.product(MODES, ("warm", "cold"))
        if only and not any(compare.identity(_row(case, *each)) in only for each in caches):
            continue
        yield from measure(case, args.seconds, machine)


def _shapes(args: argparse.Namespace) -> list[tuple[int, int, int]] | None:
    """M, K, N of those that were asked for; None where none was."""
    return args.shapes or (_of_model(args.model, args) if args.model else None)


def _of_model(name: str, args: argparse.Namespace) -> list[tuple[int, int, int]]:
    rows = args.rows or ROWS[args.device]
    return [(M, K, N) for M in rows for K, N in models.linear_shapes(name)]


def _write(args: argparse.Namespace, data: dict[str, Any]) -> None:
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    if args.csv:
        flat.write(args.csv, data)


def _line(row: dict[str, Any]) -> str:
    goal = "" if row["target"] is None else f", target {row['target']:.3f}"
    words = [
        f"{row['dtype']} {row['M']}×{row['K']}×{row['N']} r={row['R']} {row['mode']}"
        f"{', cold' if row['cache'] == 'cold' else ''}: "
        f"frozen {row['frozen_ms']:.3g} ms, floor {row['floor']:.3f}{goal}; tax:"
    ]
    for name, tax in row["tax"].items():
        if name == "ours" and row["target"] is not None:
            words.append(f"{name} {tax:.3f} {'✓' if tax <= row['target'] else 'over target'} ")
        elif name in row["misses"]:
            words.append(f"{name} {tax:.3f} ✗ ({row['misses'][name]}) ")
        elif name != "frozen":
            words.append(f"{name} {tax:.3f} ")
    untimed = {name: text for name, text in row["misses"].items() if name not in row["tax"]}
    words += [f"{name} ✗ ({text}) " for name, text in untimed.items()]
    lines = [" ".join(words).rstrip()]
    if times := row["seconds"].get("ours"):
        three = "/".join(f"{times[key] * 1e3:.3g}" for key in ("p20", "p50", "p80"))
        text = f"    ours: {row['backend']}, {row['strategy']}; {three} ms (p20/p50/p80)"
        if row["floor_ms"]:
            text += f", {row['floor_ms'] / times['p50'] / 1e3:.0%} of what the machine allows"
        lines.append(text)
    if row.get("bytes"):
        each = (
            f"{name} {held / 2**20:.3g} + {row['peak_bytes'][name] / 2**20:.3g}"
            for name, held in row["bytes"].items()
        )
        lines.append(f"    MiB held for the backward + most in a step: {', '.join(each)}")
    return "\n".join(lines)


def _words(values: Sequence[object], between: str = " ") -> str:
    return between.join(map(str, values))


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a probability in [0, 1)")
    return value
