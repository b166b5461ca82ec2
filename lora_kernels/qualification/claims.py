"""The worker of `lora_kernels.qualify`: checks the claims on one card.

    python -m lora_kernels.qualification.claims MODULE:CARD

Prints a line of JSON for each thing that happens:

    {"ready": key of the card}      or {"refused": why}, and it ends
    {"begin": number of the claim}
    {"end": number, "failed": why or null, "points": [...], "retry": why it can hold another time}

When it is ready it reads its order from stdin, JSON with "claims" and "end" (by time.time).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..backends import cuda, launches, triton
from ..backends.triton import configs
from ..choice import choose as selection
from ..choice import verdicts
from ..choice.verdicts import Group
from ..core.call import Needs, Operands, Spec
from ..oracle import case as cases
from ..oracle.case import AnyCase, Case
from ..quantization import QuantizedWeight
from . import orders, timing
from .card import Card
from .plan import CANDIDATES, STEP_ROWS, Claim

GUARD = 4096  # bytes before and after each tensor of "memory"
BROKEN = 3  # the exit status after an error that the device may not recover from


def check(card: Card, claim: Claim) -> tuple[str | None, Any]:
    """Return why the claim does not hold or None, and the points of "time"."""
    group = claim.group
    if group.weight in verdicts.ORDERS:
        return _check_order(card, claim)
    if claim.name == "time":
        return None, list(timing.measure(card, group, claim.sizes))
    with card.engine(group):
        if claim.name in _CASES:
            judged = map(judge, _CASES[claim.name](card, group))
            return next((reason for reason in judged if reason is not None), None), ()
        return _CHECKS[claim.name](card, group), ()


def _check_order(card: Card, claim: Claim) -> tuple[str | None, Any]:
    """`check` of an order or a skinny GEMM of a training step."""
    if claim.name == "time":
        return orders.time(card, claim)
    if claim.name == "odd sizes":
        return orders.odd_sizes(card, claim.group), ()
    call = orders.Call(card, claim.group, *orders.WHOLE)
    call.operands[0] = [surround(t) for t in call.operands[0]]
    return _find_write(card, lambda: {call.name: call.ours(0)}, call.operands[0]), ()


def _case(card: Card, group: Group, M: int, N: int, K: int, **fields: Any) -> Case:
    dtype, adapter = (getattr(torch, name) for name in (group.dtype, group.adapter))
    quant = fields.pop("quant", "nf4-64-nested")
    quant = quant if group.weight == "4bit" else ""
    options = {"R": timing.RANK, "adapter_dtype": adapter, "quant": quant, "device": card.device}
    return Case(M, N, K, dtype=dtype, **(options | fields))


def _rows(card: Card, group: Group) -> tuple[int, int]:
    """Return the smallest and the largest M for which the group is timed, at most `card.many`'s."""
    which = group.backend, group.strategy, group.weight
    (rows,) = (each.rows for each in CANDIDATES if each[:3] == which)
    return rows[0], min(rows[-1], card.many[0])


def odd_sizes(card: Card, group: Group) -> list[Case]:
    """Return a case with every option and no size a multiple of a tile, and one of few rows.

    Triton compiles a kernel for each set of options: the second case, and those of the other
    claims, have the options of the timed calls, so that the claims share their kernels.
    """
    few, most = _rows(card, group)
    N, K = (203, 99) if group.backend == "triton" else (200, 192)  # CUDA loads whole 16 bytes
    rank = configs.MAX_RANK if group.backend == "triton" else verdicts.MAX_RANK
    options = {"R": rank, "gate": True, "column_scale": True, "bias": True, "quant": "fp4-128"}
    return [_case(card, group, most - 3, N, K, **options), _case(card, group, few, *card.whole)]


def many_blocks(card: Card, group: Group) -> list[Case]:
    _, N, K = card.many
    return [_case(card, group, _rows(card, group)[1], N, K)]


def autocast(card: Card, group: Group) -> list[Case]:
    case = _case(
        card, group, _rows(card, group)[1], *card.whole, autocast=getattr(torch, group.dtype)
    )
    return [replace(case, dtype=torch.float32, adapter_dtype=torch.float32)]


def judge(case: AnyCase) -> str | None:
    """Return the first output that misses the tolerance, in words, or None."""
    found = cases.judge(case).items()
    return next((f"{name} {verdict}" for name, verdict in found if not verdict.ok), None)


class _GuardedLayer:
    """The backend's forward and backward on tensors that lie between guard zones."""

    def __init__(self, card: Card, group: Group, seed: int = 0) -> None:
        with selection.backend("eager"):
            args = cases.inputs(_case(card, group, _rows(card, group)[1], *card.whole, seed=seed))
        dtype, weight = args["x"].dtype, args["weight"]
        base = weight.codes if isinstance(weight, QuantizedWeight) else weight
        tensors = (args["x"], base, args["lora_A"], args["lora_B"])
        self.operands = Operands(*map(surround, tensors))
        self.dy, self.group = surround(args["dy"]), group
        self.spec = Spec(args["scaling"], 0.0, dtype, dtype)
        self.backend: Any = {"cuda": cuda, "triton": triton}[group.backend]

    def forward(self) -> tuple[Tensor, Any]:
        found: tuple[Tensor, Any] = self.backend.lora_linear(
            self.operands, self.spec, self.group.strategy
        )
        return found

    def y(self) -> Tensor:
        return self.forward()[0]

    def run(self) -> dict[str, Tensor]:
        """Return y and the gradients."""
        y, saved = self.forward()
        grads = self.backend.lora_linear_backward(
            self.dy, self.operands, saved, self.spec, Needs(True, True, True), self.group.strategy
        )
        named = {f"d{name}": t for name, t in grads._asdict().items() if t is not None}
        return {"y": y} | named


def surround(value: Any) -> Any:
    """Return a tensor's copy between bytes that read as NaN; a 4-bit weight's tensors likewise."""
    if isinstance(value, tuple):
        return value._replace(**{n: surround(t) for n, t in value._asdict().items()})  # type: ignore[attr-defined]
    if not isinstance(value, Tensor):
        return value
    value = value.detach().contiguous()
    bytes_ = torch.full((2 * GUARD + value.nbytes,), 0xFF, dtype=torch.uint8, device=value.device)
    inner = bytes_[GUARD : GUARD + value.nbytes].view(value.dtype).view(value.shape)
    return inner.copy_(value)


_UNINITIALISED = ("empty", "empty_like", "new_empty", "new_empty_strided")


class GuardedMemory(TorchFunctionMode):
    """Makes each new uninitialised tensor NaN, between guard zones that `written` compares."""

    def __init__(self) -> None:
        super().__init__()
        self._guards: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") not in _UNINITIALISED:
            return found
        if not found.is_contiguous() or found.is_meta:
            return found
        size = found.nbytes
        bytes_ = torch.full((2 * GUARD + size,), 0xFF, dtype=torch.uint8, device=found.device)
        self._guards += [bytes_[:GUARD].fill_(0xA5), bytes_[GUARD + size :].fill_(0xA5)]
        return bytes_[GUARD : GUARD + size].view(found.dtype).view(found.shape)

    def written(self) -> int:
        """Return the number of bytes of the guard zones that changed."""
        return sum(int((guard != 0xA5).sum()) for guard in self._guards)


def memory(card: Card, group: Group) -> str | None:
    layer = _GuardedLayer(card, group)
    return _find_write(card, layer.run, launches.tensors_of((layer.operands, layer.dy)))


def _find_write(
    card: Card, run: Callable[[], dict[str, Tensor]], operands: Sequence[Tensor]
) -> str | None:
    """Return what `run` writes outside of its results, or which bits differ in a repeat; or None.

    operands: between guard zones (`surround`).
    """
    before = [t.clone() for t in operands]
    first: dict[str, Tensor] = {}
    for number in range(card.repeats):
        with GuardedMemory() as guarded:
            found = run()
        card.synchronize()
        if written := guarded.written():
            return f"{written} bytes outside of its results were written"
        if not all(map(torch.equal, before, operands)):
            return "an operand was written"
        for name, t in found.items():
            if not torch.isfinite(t).all():
                return f"{name} has NaN from memory that was not written"
            if not torch.equal(t, first.setdefault(name, t.clone())):
                return f"{name} has other bits in repeat {number}"
    return None


def graph(card: Card, group: Group) -> str | None:
    layer = _GuardedLayer(card, group)
    other = _GuardedLayer(card, group, seed=1)
    for number, y in enumerate(card.replays(layer.y, 3)):
        want = layer.y()
        card.synchronize()
        if not torch.equal(y, want):
            return f"replay {number} has other bits than a call by itself"
        x = other.operands.x if number % 2 == 0 else layer.operands.x.neg()
        layer.operands.x.copy_(x)
    return None


def two_streams(card: Card, group: Group) -> str | None:
    layers = [_GuardedLayer(card, group, seed) for seed in range(2)]
    want = [layer.y().clone() for layer in layers]
    for number in range(card.repeats):
        got = card.concurrently([layer.y for layer in layers])
        if not all(map(torch.equal, got, want)):
            return f"a call beside another had other bits in repeat {number}"
    return None


_CASES: dict[str, Callable[[Card, Group], Sequence[AnyCase]]] = {
    "odd sizes": odd_sizes,
    "many blocks": many_blocks,
    "autocast": autocast,
}
_CHECKS: dict[str, Callable[[Card, Group], str | None]] = {
    "memory": memory,
    "two streams": two_streams,
    "graph": graph,
}


def main(arguments: Sequence[str]) -> int:
    module, _, name = arguments[0].partition(":")
    with os.fdopen(os.dup(1), "w") as lines:
        os.dup2(2, 1)  # what libraries print is no line of ours

        def say(**line: Any) -> None:
            print(json.dumps(line), file=lines, flush=True)

        try:
            card = getattr(importlib.import_module(module), name)()
        except RuntimeError as error:
            say(refused=_first_line(error))
            return 1
        say(ready=card.key())
        order = json.load(sys.stdin)
        claims = [Claim(Group(*group), *rest) for group, *rest in order["claims"]]
        return _check_all(card, claims, order["end"], say)


def _check_all(card: Card, claims: Sequence[Claim], end: float, say: Callable[..., None]) -> int:
    failed = set[Group]()
    for number, claim in enumerate(claims):
        if claim.group in failed:
            continue
        if time.time() >= end:
            break
        say(begin=number)
        reason, points, retry = None, (), None
        try:
            card.before(claim)
            reason, points = check(card, claim)
        except torch.cuda.OutOfMemoryError as error:
            retry = _first_line(error)
        except Exception as error:  # of the compiler, the driver or the launch
            reason = f"{type(error).__name__}: {_first_line(error)}"
        try:
            card.synchronize()
        except RuntimeError as error:  # an illegal access; every later call would raise it too
            say(end=number, failed=reason or _first_line(error))
            return BROKEN
        say(end=number, failed=reason, points=points, retry=retry)
        if reason is not None:
            failed.add(claim.group)
    return 0


def launch_all(card: Card, claim: Claim) -> None:
    """Launch what the claim launches, each call once, and judge nothing."""
    group, name = claim.group, claim.name
    if group.weight in verdicts.ORDERS:
        orders.launch_all(card, claim)
    elif name in _CASES:
        for case in _CASES[name](card, group):
            with selection.backend("eager"):
                args = cases.inputs(case)
            with card.engine(group):
                cases.run(case.op, args, case.autocast)
    elif name == "time":
        for M, N, K in claim.sizes:
            call = timing.Timed(card, group, M, N, K)
            with card.engine(group):
                call.forward(0)
                if M >= STEP_ROWS:
                    call.step(0)
    elif name == "memory":  # "graph" and "two streams" launch the same
        with card.engine(group):
            _GuardedLayer(card, group).run()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
