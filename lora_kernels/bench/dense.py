"""`lora-kernels bench`: the LoRA tax of this package and of its peers.

The LoRA tax is the time of forward, or of a step (forward and backward), with the adapter over the
time of the frozen linear alone. In both, x needs a gradient if anything does. Its lower bound is
the ratio of FLOPs:

    forward 1 + R·(1/K + 1/N)      backward 1 + 2·R·(1/K + 1/N)      step 1 + 1.5·R·(1/K + 1/N)

Forward and backward are timed within the steps. Up to STREAMED_ROWS rows of x, decoding is timed
too: the forward without gradients, with a warm and with a cold cache, over more weights in turn
than the last-level cache holds. Ours is called as a layer calls it, with prepared calls after the
first; with dropout `lora_linear` is called. Before the timing, the results of each candidate's
second call are compared with the tolerance, and those of ours in decoding. A miss of ours gets ✗
instead of a time; a peer's gets ✗ and its errors beside its time. Float32 adapters beside a
bfloat16 x are PEFT's default. torch.compile gets each shape as a static one.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..choice import choose as selection
from ..core.problem import Problem
from ..layers.cache import CallCache
from ..ops.linear import lora_linear
from ..oracle import case as cases
from ..oracle.case import Case
from . import baselines, models, results, roofline, timing
from .baselines import Call
from .functions import one_line
from .memory import held, peak
from .results import STREAMED_ROWS, Facts, Result, Row, Suite
from .roofline import Sizes
from .timing import Machine, Parts

CHECKED_ROWS = 512  # on a GPU; the float64 reference of more rows takes longer than the timing
SHAPES = (  # M, K, N
    (1, 4096, 4096),
    (256, 2048, 2048),
    (512, 2048, 5632),
    (1024, 576, 1536),
    (2048, 4096, 4096),
)
MODES = ("decoding", "forward", "backward", "step")

Make = Callable[[dict[str, Any]], Call]  # from the arguments of `lora_linear`
Candidate = tuple[Make, dict[str, Any]]


def ours(args: dict[str, Any]) -> Call:
    """`lora_linear` as a layer calls it; on a CPU a layer prepares its call for the next token."""
    device, dropout_p, cache = args["x"].device.type, args["dropout_p"], CallCache()

    def on_cpu(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, **rest: Any) -> Tensor:
        return cache(x, weight, lora_A, lora_B, rest["scaling"], rest["bias"])

    def on_gpu(*args: Any, **kwargs: Any) -> Tensor:
        with cases.kernels(device, dropout_p):
            return lora_linear(*args, **kwargs)

    if device == "cpu":  # a given mask is not for the cache
        return lora_linear if dropout_p else on_cpu
    return on_gpu


def candidates(case: Case) -> dict[str, tuple[Make, Case]]:
    """Return, by name, how each candidate is built, and its case with the adapters' dtype."""
    sixteen_bit = case.dtype is not torch.float32
    wide = replace(case, adapter_dtype=torch.float32) if sixteen_bit else case
    found: dict[str, tuple[Make, Case]] = {"ours": (ours, case)}
    if not case.dropout_p:
        found["addmm"] = (baselines.addmm, case)
    found |= {"eager": (baselines.eager, case), "peft": (baselines.peft, wide)}
    if baselines.no_compiler(case.device) is None:
        found["torch.compile"] = (baselines.compiled, case)
    if sixteen_bit:
        found["ours, fp32 adapters"] = (ours, wide)
        found["peft, 16-bit adapters"] = (baselines.peft, case)
    return found


def floor(case: Case, mode: str) -> float:
    """Return the lower bound of the LoRA tax, from FLOPs.

    >>> floor(Case(M=256, N=2048, K=2048, R=16), "step")
    1.0234375
    """
    products = {"backward": 2.0, "step": 1.5}.get(mode, 1.0)
    return 1 + products * case.R * (1 / case.K + 1 / case.N)


def target(case: Case, mode: str) -> float | None:
    """Return 1 % and twice the tax of `floor`; None above rank 16, and for a backward."""
    return 1 + 2 * (floor(case, mode) - 1) + 0.01 if case.R <= 16 and mode != "backward" else None


def least_seconds(case: Case, mode: str, machine: Machine, cache: str = "cold") -> float:
    """Return the roofline: bytes at memory's bandwidth, or FLOPs at the processor's peak.

    A warm call may find `timing.cold_bytes` of its operands in a cache.
    """
    itemsize = (case.adapter_dtype or case.dtype).itemsize
    sizes = Sizes(case.M, case.N, case.K, case.R, case.dtype, itemsize)
    bytes_, flops = (
        count(sizes, mode in ("backward", "step")) - (count(sizes) if mode == "backward" else 0)
        for count in (roofline.moved, roofline.flops)
    )
    if cache == "warm":
        bytes_ = max(0.0, bytes_ - timing.cold_bytes(case.device))
    return max(bytes_ / machine.bandwidth, flops / machine.peaks[case.dtype])


def measure(
    case: Case,
    seconds: float,
    machine: Machine | None = None,
    functions: Mapping[str, Call] = MappingProxyType({}),
) -> list[Row]:
    """Return a row for each of MODES, decoding only if x has few rows.

    Every candidate is checked, then timed beside the frozen linear.

    Args:
        case: without bias and gate.
        seconds: to spend on what is timed in turns.
        machine: for `floor_ms`, or None.
        functions: other candidates by name: functions of `lora_linear`'s arguments, by keyword.

    >>> from lora_kernels.oracle.case import Case
    >>> def mine(x, weight, lora_A, lora_B, scaling, **rest):
    ...     return x @ weight.T + scaling * (x @ lora_A.T) @ lora_B.T
    >>> rows = measure(Case(M=32, N=64, K=64, R=4), 0.01, functions={"mine": mine})
    >>> [(row.mode, "mine" in row.seconds, row.misses) for row in rows]
    [('forward', True, {}), ('backward', True, {}), ('step', True, {})]
    """
    torch.compiler.reset()  # else it would compile a third shape as a dynamic one
    args = cases.inputs(replace(case, frozen=("lora_A", "lora_B")))
    made: dict[str, Candidate] = {"frozen": (baselines.frozen, args)}
    misses = {}
    others = {name: (_always(function), case) for name, function in functions.items()}
    for name, (make, own) in {**candidates(case), **others}.items():
        try:
            wrong = _tolerance_misses(make, own)
        except Exception as error:  # whatever a function of the user's raises
            if name not in functions:
                raise
            misses[name] = one_line(error)
            continue
        if wrong:
            misses[name] = "; ".join(wrong)
        if not wrong or make is not ours:
            made[name] = (make, {**cases.inputs(own), "rng": None})  # drawing it is timed

    calls = {name: (make(args), args) for name, (make, args) in made.items()}
    timed = partial(
        timing.interleave_parts,
        seconds=seconds,
        most=1001,  # more rounds than another program disturbs in a second
        device=case.device,
    )
    found = {}
    found["step", "warm"], found["forward", "warm"], found["backward", "warm"] = timed(
        {name: _parts(*call) for name, call in calls.items()}
    )
    if case.M <= STREAMED_ROWS:
        forwards = {name: _forward(make(args), args) for name, (make, args) in made.items()}
        with torch.no_grad():
            found["decoding", "warm"] = timed(forwards)[0]
            found["decoding", "cold"] = timed(_cold(made, case.device))[0]
    A = case.adapter_dtype or case.dtype
    problem = Problem(case.device, case.dtype, A, A, case.compute_dtype, case.R, case.M)
    with cases.kernels(case.device, case.dropout_p):
        choice = selection.choose(
            problem._replace(
                columns=case.N,
                inner=case.K,
                extra=selection.dropout_operand(case.device, case.dropout_p),
            )
        )
    rows = []
    for (mode, cache), times in sorted(found.items(), key=lambda item: MODES.index(item[0][0])):
        row = _row(case, mode, cache)
        row.backend, row.strategy = choice.backend, choice.strategy
        row.misses, row.seconds = misses, times
        row.floor = floor(case, mode)
        if machine is not None:
            row.floor_ms = least_seconds(case, mode, machine, cache) * 1e3
        row.target = target(case, mode) if cache == "warm" else None
        if mode == "step":
            row.bytes, row.peak_bytes = _memory(calls, case.device)
        rows.append(row)
    return rows


def _always(function: Call) -> Make:
    return lambda args: function


def _tolerance_misses(make: Make, case: Case) -> list[str]:
    """Return what misses the tolerance in a candidate's results."""
    # Peers draw dropout masks of their own, so they are checked without.
    checked = case if make is ours else replace(case, dropout_p=0.0)
    if case.device != "cpu":
        checked = replace(checked, M=min(case.M, CHECKED_ROWS))
    verdicts = cases.judge(checked, partial(_second, make))
    wrong = [f"{output} {verdict}" for output, verdict in verdicts.items() if not verdict.ok]
    if make is ours and case.M <= STREAMED_ROWS:
        wrong += _decoding_misses(case)
    return wrong


def _second(make: Make, **args: Any) -> Tensor:
    """y of the second call: the first may prepare it."""
    call = make(args)
    call(**args)
    return call(**args)


def _decoding_misses(case: Case) -> list[str]:
    """Return what differs in ours without gradients from ours with them."""
    args = cases.give_mask(cases.inputs(case))
    call = _forward(ours(args), args)
    want = call()
    with torch.no_grad():
        same = [torch.equal(call(), want) for _ in range(3)]  # the first call prepares
    return [] if all(same) else ["y MISS: without gradients it is not what it is with them"]


def _cold(made: dict[str, Candidate], device: str) -> dict[str, Callable[[], object]]:
    """Forwards, without gradients, that take another copy of the weight each time."""
    weight = made["frozen"][1]["weight"]
    size = weight.numel() * weight.itemsize
    count = max(2, min(64, -(-timing.cold_bytes(device) // size)))
    weights = [weight.clone() for _ in range(count)]
    found = {}
    for name, (make, args) in made.items():
        each = [{**args, "weight": copy} for copy in weights]
        calls = [_forward(make(args), args) for args in each]
        for call in calls:  # the first may prepare the others
            call()
        found[name] = baselines.cycle_through(calls)
    return found


def _memory(
    calls: dict[str, tuple[Call, dict[str, Any]]], device: str
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes that each candidate holds for its backward, and the peak of a step.

    Weight and adapter do not count for the first, arguments not for the second.
    """
    bytes_, peaks = {}, {}
    for name, (call, args) in calls.items():
        there = [args[key] for key in ("weight", "lora_A", "lora_B")]
        bytes_[name] = sum(held(_forward(call, args), there=there).values())
        peaks[name] = peak(_parts(call, args).__call__, device)
    return bytes_, peaks


def _row(case: Case, mode: str, cache: str = "warm") -> Row:
    """Return a row with the fields that identify it."""
    sizes = {key: getattr(case, key) for key in ("M", "K", "N", "R", "dropout_p")}
    return Row(**sizes, dtype=cases.dtype_name(case.dtype), mode=mode, cache=cache)


def _forward(call: Call, args: dict[str, Any]) -> Callable[[], Tensor]:
    forward = {name: value for name, value in args.items() if name != "dy"}
    return lambda: call(**forward)


def _parts(call: Call, args: dict[str, Any]) -> Parts:
    """Return forward and backward of a step."""
    tensors = (args[name] for name in cases.GRADIENTS if args[name] is not None)
    wanted = [t for t in tensors if t.requires_grad]
    return Parts(_forward(call, args), lambda y: torch.autograd.grad(y, wanted, args["dy"]))


def overhead(seconds: float, device: str = "cpu") -> dict[str, float]:
    """Return the microseconds of a call with next to nothing to compute, gradients on."""
    args = cases.inputs(Case(M=1, N=64, K=64, R=8, device=device))
    only_x = {**args, "lora_A": args["lora_A"].detach(), "lora_B": args["lora_B"].detach()}
    makes: tuple[Make, ...] = (baselines.frozen, ours, baselines.addmm, baselines.eager)
    made = {make.__name__: (make(args), args if i else only_x) for i, make in enumerate(makes)}
    taken = {}
    for mode, timed in (("forward", _forward), ("step", _parts)):
        calls = {name: timed(*call) for name, call in made.items()}
        for name, times in timing.interleave(
            calls, seconds=seconds, repeat=200, device=device
        ).items():
            taken[f"{name}, {mode}"] = times.p50 * 1e6
    return taken


class Layers(Suite):
    """Dense layers."""

    kind = "layers"

    def head(self, args: argparse.Namespace, result: Result) -> Iterator[str]:
        taken = result.overhead_us = overhead(args.seconds / 2, args.device)
        extra = taken["ours, forward"] - taken["eager, forward"]
        at = "a call at M=1, K=N=64, r=8, gradients on"
        yield f"{at}: {extra:+.1f} µs against the eager expression"
        yield from (f"    {name:16} {us:6.1f} µs" for name, us in taken.items())
        if (reason := baselines.no_compiler(args.device)) is not None:
            yield reason

    def rows(self, args: argparse.Namespace, facts: Facts) -> Iterator[Row]:
        machine, baseline = results.limits(facts), args.baseline
        functions = {baseline.name: baseline} if baseline else {}
        shapes = models.requested_shapes(args) or SHAPES
        for dtype, (M, K, N), R in itertools.product(args.dtypes, shapes, args.ranks):
            options = {"dropout_p": args.dropout, "device": args.device}
            case = Case(M, N, K, R, getattr(torch, dtype), **options)
            yield from measure(case, args.seconds, machine, functions)
