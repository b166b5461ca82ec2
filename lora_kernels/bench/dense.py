"""`lora-kernels bench`: the LoRA tax of this package and of its peers.

The LoRA tax is the time of forward, or of a step (forward and backward), with the adapter over the
time of the frozen linear alone. In both, x needs a gradient if anything does. Its lower bound is
the ratio of FLOPs:

    forward 1 + R·(1/K + 1/N)      backward 1 + 2·R·(1/K + 1/N)      step 1 + 1.5·R·(1/K + 1/N)

Forward and backward are timed within the steps. Up to STREAMED_ROWS rows of x, decoding is timed
too: the forward without gradients, with a warm and with a cold cache, over more weights in turn
than the last-level cache holds. Ours is called as a layer calls it; with dropout `lora_linear` is
called. Before the timing, the results of each candidate's second call are compared with the
tolerance, and those of ours in decoding. A miss of ours gets ✗ instead of a time; a peer's gets ✗
and its errors beside its time. Float32 adapters beside a bfloat16 x are PEFT's default.
torch.compile gets each shape as a static one.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..choice import choose as selection
from ..core.problem import Choice, Problem
from ..core.record import Record
from ..ops.direct import compute
from ..ops.linear import lora_linear
from ..oracle import case as cases
from ..oracle.case import Case
from . import baselines, models, results, roofline, timing
from .baselines import Baseline
from .results import FROZEN, STREAMED_ROWS, Facts, Result, Row
from .roofline import Sizes
from .table import STEP, Accuracy, Call, Entry, Suite, time_calls, timed
from .timing import Machine

CHECKED_ROWS = 512  # on a GPU; the float64 reference of more rows takes longer than the timing
SHAPES = (  # M, K, N
    (1, 4096, 4096),
    (256, 2048, 2048),
    (512, 2048, 5632),
    (1024, 576, 1536),
    (2048, 4096, 4096),
)

Make = Callable[[dict[str, Any]], Baseline]  # from the arguments of `lora_linear`


def ours(args: dict[str, Any]) -> Baseline:
    """Return `lora_linear` as a layer calls it."""
    device, dropout_p = args["x"].device.type, args["dropout_p"]

    def on_cpu(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, **others: Any) -> Tensor:
        return compute(x, Record(weight, lora_A, lora_B, others["bias"], others["scaling"]))

    def on_gpu(*args: Any, **kwargs: Any) -> Tensor:
        with cases.kernels(device, dropout_p):
            return lora_linear(*args, **kwargs)

    if device == "cpu":  # a given mask is not for a layer's call
        return lora_linear if dropout_p else on_cpu
    return on_gpu


def candidates(case: Case) -> dict[str, tuple[Make, Case]]:
    """Return, by name, how each candidate is built, and its case with the adapters' dtype."""
    sixteen_bit = case.dtype is not torch.float32
    wide = replace(case, adapter_dtype=torch.float32) if sixteen_bit else case
    candidates: dict[str, tuple[Make, Case]] = {"ours": (ours, case)}
    if not case.dropout_p:
        candidates["addmm"] = (baselines.addmm, case)
    candidates |= {"eager": (baselines.eager, case), "peft": (baselines.peft, wide)}
    if baselines.no_compiler(case.device) is None:
        candidates["torch.compile"] = (baselines.compiled, case)
    if sixteen_bit:
        candidates["ours, fp32 adapters"] = (ours, wide)
        candidates["peft, 16-bit adapters"] = (baselines.peft, case)
    return candidates


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


def least_seconds(case: Case, mode: str, machine: Machine, cache: str | None = "cold") -> float:
    """Return the roofline: bytes at memory's bandwidth, or FLOPs at the processor's peak.

    A warm call may find `timing.cold_bytes` of its operands in a cache. 0 if that is all of them
    and they, not the FLOPs, would limit a cold call: the cache's bandwidth is not measured.
    """
    itemsize = (case.adapter_dtype or case.dtype).itemsize
    sizes = Sizes(case.M, case.N, case.K, case.R, case.dtype, itemsize)
    bytes_, flops = (
        count(sizes, mode in ("backward", "step")) - (count(sizes) if mode == "backward" else 0)
        for count in (roofline.moved, roofline.flops)
    )
    computing, moving = flops / machine.peaks[case.dtype], bytes_ / machine.bandwidth
    if cache == "warm":
        bytes_ = max(0.0, bytes_ - timing.cold_bytes(case.device))
        if not bytes_ and computing < moving:
            return 0.0
    return max(bytes_ / machine.bandwidth, computing)


def entry(
    case: Case,
    machine: Machine | None = None,
    functions: Mapping[str, Baseline] = MappingProxyType({}),
) -> Entry:
    """Return the entry of a case; arguments as of `measure`."""
    torch.compiler.reset()  # else it would compile a third shape as a dynamic one
    args = cases.inputs(replace(case, frozen=("lora_A", "lora_B")))
    weights = [args["weight"]]
    is_decoded = case.M <= STREAMED_ROWS
    if is_decoded:  # more than the last-level cache holds
        size = args["weight"].numel() * args["weight"].itemsize
        count = max(2, min(64, -(-timing.cold_bytes(case.device) // size)))
        weights += [args["weight"].clone() for _ in range(count)]
    others = {name: (_always(function), case) for name, function in functions.items()}
    calls = {FROZEN: call(baselines.frozen, args, weights)}
    for name, (make, case_of) in {**candidates(case), **others}.items():
        drawn = {**cases.inputs(case_of), "rng": None}  # drawing it is timed
        calls[name] = call(make, drawn, [drawn["weight"], *weights[1:]])
        calls[name].check = partial(_check, make, case_of)

    def goals(mode: str, cache: str | None) -> dict[str, Any]:
        return {
            "floor": floor(case, mode),
            "floor_ms": machine and least_seconds(case, mode, machine, cache) * 1e3,
            "target": target(case, mode) if cache == "warm" else None,
        }

    choice = _choice(case)
    fields: dict[str, Any] = {key: getattr(case, key) for key in ("M", "K", "N", "R", "dropout_p")}
    fields |= {"backend": choice.backend, "strategy": choice.strategy}
    caches = [("decoding", "warm"), ("decoding", "cold")] if is_decoded else []
    return Entry(
        key=Row(**fields, dtype=cases.dtype_name(case.dtype)),
        calls=calls,
        modes=[*caches, *((mode, "warm") for mode in STEP)],
        goals=goals,
        foreign=[*functions],
        device=case.device,
        max_rounds=1001,  # more rounds than another program disturbs in a second
    )


def call(make: Make, args: dict[str, Any], weights: Sequence[Tensor]) -> Call:
    """Return the call of a candidate over these weights, which it computes y of in turn."""
    arguments = ({**args, "weight": weight} for weight in weights)
    forwards = [_forward(make(with_weight), with_weight) for with_weight in arguments]
    tensors = {name: args[name] for name in cases.GRADIENTS if args[name] is not None}
    leaves = [t for t in tensors.values() if t.requires_grad]
    existing = [t for name, t in tensors.items() if name != "x"]
    return Call(forwards=forwards, leaves=leaves, dy=args["dy"], existing=[*existing, *weights])


def measure(
    case: Case,
    seconds: float,
    machine: Machine | None = None,
    functions: Mapping[str, Baseline] = MappingProxyType({}),
) -> list[Row]:
    """Return a row for each mode: decoding only if x has few rows, forward, backward and step.

    Every candidate is checked, then timed beside the frozen linear.

    Args:
        case: without bias and gate.
        seconds: to spend on what is timed in turns.
        machine: for `floor_ms`, or None.
        functions: other candidates by name: functions of `lora_linear`'s arguments, by keyword.

    >>> from lora_kernels.oracle.case import Case
    >>> def mine(x, weight, lora_A, lora_B, scaling, **others):
    ...     return x @ weight.T + scaling * (x @ lora_A.T) @ lora_B.T
    >>> rows = measure(Case(M=32, N=64, K=64, R=4), 0.01, functions={"mine": mine})
    >>> [(row.mode, "mine" in row.seconds, row.misses) for row in rows]
    [('forward', True, {}), ('backward', True, {}), ('step', True, {})]
    """
    return [*time_calls(entry(case, machine, functions), seconds)]


def _choice(case: Case) -> Choice:
    """Return what computes the case as ours."""
    A = case.adapter_dtype or case.dtype
    problem = Problem(case.device, case.dtype, A, A, case.compute_dtype, case.R, case.M)
    mask = selection.dropout_operand(case.device, case.dropout_p)
    with cases.kernels(case.device, case.dropout_p):
        return selection.choose(problem._replace(columns=case.N, inner=case.K, extra=mask))


def _always(function: Baseline) -> Make:
    return lambda args: function


def _check(make: Make, case: Case) -> Accuracy:
    """Compare a candidate's results and gradients with the oracle."""
    # Peers draw dropout masks of their own, so they are checked without.
    checked = case if make is ours else replace(case, dropout_p=0.0)
    if case.device != "cpu":
        checked = replace(checked, M=min(case.M, CHECKED_ROWS))
    verdicts = cases.judge(checked, partial(_second, make))
    wrong = [f"{output} {verdict}" for output, verdict in verdicts.items() if not verdict.ok]
    if make is ours and case.M <= STREAMED_ROWS:
        wrong += _decoding_misses(case)
    return Accuracy(verdicts["y"].rms, "; ".join(wrong))


def _second(make: Make, **args: Any) -> Tensor:
    """Return y of the second call: the first may fill a cache."""
    call = make(args)
    call(**args)
    return call(**args)


def _decoding_misses(case: Case) -> list[str]:
    """Return what differs in ours without gradients from ours with them."""
    args = cases.give_mask(cases.inputs(case))
    call = _forward(ours(args), args)
    want = call()
    with torch.no_grad():
        same = [torch.equal(call(), want) for _ in range(3)]
    return [] if all(same) else ["y MISS: without gradients it is not what it is with them"]


def _forward(call: Baseline, args: dict[str, Any]) -> Callable[[], Tensor]:
    forward = {name: value for name, value in args.items() if name != "dy"}
    return lambda: call(**forward)


def overhead(seconds: float, device: str = "cpu") -> dict[str, float]:
    """Return the microseconds of a call with next to nothing to compute, gradients on."""
    args = cases.inputs(Case(M=1, N=64, K=64, R=8, device=device))
    only_x = {**args, "lora_A": args["lora_A"].detach(), "lora_B": args["lora_B"].detach()}
    makes: tuple[Make, ...] = (baselines.frozen, ours, baselines.addmm, baselines.eager)
    overheads = {}
    made = {
        make.__name__: call(make, args if i else only_x, [args["weight"]])
        for i, make in enumerate(makes)
    }
    for mode in ("forward", "step"):
        calls = {n: c.step("warm") if mode == "step" else c.forwards[0] for n, c in made.items()}
        for name, times in timing.interleave(
            calls, seconds=seconds, repeat=200, device=device
        ).items():
            overheads[f"{name}, {mode}"] = times.p50 * 1e6
    return overheads


def head(args: argparse.Namespace, result: Result) -> Iterator[str]:
    """Yield a call's overhead, and why torch.compile is left out."""
    overheads = result.overhead_us = overhead(args.seconds / 2, args.device)
    extra = overheads["ours, forward"] - overheads["eager, forward"]
    case = "a call at M=1, K=N=64, r=8, gradients on"
    yield f"{case}: {extra:+.1f} µs against the eager expression"
    yield from (f"    {name:16} {us:6.1f} µs" for name, us in overheads.items())
    if (reason := baselines.no_compiler(args.device)) is not None:
        yield reason


def entries(args: argparse.Namespace, facts: Facts) -> Iterator[Entry]:
    """Yield the dense layers."""
    machine, baseline = results.limits(facts), args.baseline
    functions = {baseline.name: baseline} if baseline else {}
    shapes = models.requested_shapes(args) or SHAPES
    for dtype, (M, K, N), R in itertools.product(args.dtypes, shapes, args.ranks):
        options = {"dropout_p": args.dropout, "device": args.device}
        yield entry(Case(M, N, K, R, getattr(torch, dtype), **options), machine, functions)


SUITE = Suite(kind="layers", option="", unused="", rows=timed(entries), head=head)
