"""Calls of two parts: what is timed of the whole and of each, by the clock and by a GPU's
events; and which weights a cold forward takes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lora_kernels.backends.cpu import native
from lora_kernels.bench import dense, timing
from lora_kernels.bench.results import FROZEN
from lora_kernels.bench.timing import Parts, interleave_parts
from lora_kernels.core.dtypes import DTYPE_NUMBERS
from lora_kernels.ops.linear import lora_linear
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case


class Clock:
    """Time that passes only where somebody says so."""

    now = 0.0

    def passes(self, seconds: float) -> float:
        self.now += seconds
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: clock.passes(100.0))  # not timed
    return clock


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("repeat", [1, 3])
def test_the_parts_are_timed_by_themselves(clock: Clock, device: str, repeat: int) -> None:
    got: list[object] = []

    def second(first: object) -> None:
        got.append(first)
        clock.passes(3.0)

    calls = {
        "both": Parts(lambda: clock.passes(2.0) and "graph", second),
        "one": lambda: clock.passes(10.0),
    }
    whole, before, after = interleave_parts(
        calls, seconds=0.0, min_rounds=4, repeat=repeat, device=device
    )
    assert set(got) == {"graph"} and len(got) == 5 * repeat  # one round is not counted
    assert (whole["both"].p50, whole["one"].p50, after["both"].p50) == (5.0, 10.0, 3.0)
    assert set(before) == set(after) == {"both"} and before["both"].p50 == 2.0


def test_the_first_round_may_take_long(clock: Clock) -> None:
    """The first round compiles; neither it nor its time is counted."""
    takes = itertools.chain([100.0], itertools.repeat(0.125))
    found = timing.interleave({"one": lambda: clock.passes(next(takes))}, seconds=2.0)
    assert found["one"].rounds == 16 and found["one"].p80 == 0.125


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_first_round_of_parts_is_not_counted(clock: Clock, device: str) -> None:
    takes = itertools.chain([100.0, 100.0], itertools.repeat(0.125))

    def part(*first: object) -> None:
        clock.passes(next(takes))

    found = interleave_parts({"both": Parts(part, part)}, seconds=0.0, min_rounds=4, device=device)
    whole, *parts = ((each["both"].rounds, each["both"].p80) for each in found)
    assert whole == (4, 0.25) and parts == [(4, 0.125)] * 2


def test_a_cold_forward_goes_through_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are more weights than the cache holds, and each result is right."""
    args = cases.inputs(Case(2, 8, 16, 3, frozen=("lora_A", "lora_B")))
    monkeypatch.setattr(timing, "COLD_BYTES", 4 * 8 * 16 * 4)  # the weight has a quarter
    seen: list[int] = []

    def make(args: dict[str, Any]) -> Any:
        def call(x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> torch.Tensor:
            seen.append(weight.data_ptr())
            return x @ weight.T

        return call

    monkeypatch.setattr(dense.baselines, "frozen", make)
    calls = dense.entry(Case(2, 8, 16, 3)).calls
    assert {len(call.forwards) for call in calls.values()} == {5}  # four copies, and its own
    want = calls["eager"].forwards[0]()
    for name, call in calls.items():
        cold = call.forward("cold")
        for _ in range(10):
            got = cold()
            torch.testing.assert_close(
                got, args["x"] @ args["weight"].T if name == FROZEN else want
            )
    assert len(set(seen[:5])) == 5 and seen == 2 * seen[:5]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_few_rows_are_timed_as_they_are_decoded(dropout_p: float) -> None:
    """The prepared call of a layer runs, if there is one; its result is checked too."""
    case = Case(2, 8, 16, 3, dropout_p=dropout_p)
    args = cases.inputs(case)
    call = dense._forward(dense.ours(args), args)
    with torch.no_grad():
        assert torch.equal(call(), dense._forward(lora_linear, args)())
    assert dense._decoding_misses(case) == []


@pytest.mark.parametrize(
    ("M", "is_wrong", "rows", "said"),
    [
        (2, lambda call: not torch.is_grad_enabled(), 5, "without gradients"),
        (32, lambda call: call > 0, 3, "y MISS"),  # a layer's first call prepares the others
    ],
    ids=["decoding", "second calls"],
)
def test_ours_that_is_wrong_in_some_calls_is_not_timed(
    M: int, is_wrong: Any, rows: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dense.ours

    def ours(args: dict[str, Any]) -> Any:
        call, calls = plain(args), itertools.count()
        return lambda **rest: call(**rest) + is_wrong(next(calls))

    monkeypatch.setattr(dense, "ours", ours)
    found = dense.measure(Case(M, 8, 16, 3), 0.0)
    assert len(found) == rows and all(said in row.misses["ours"] for row in found)
    assert all("ours" not in row.tax and "eager" in row.tax for row in found)


def test_long_rounds_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()  # a second each time it is looked at
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(now)))
    for seconds, rounds in ((1.0, 5), (16.0, 9), (60.0, 20), (1e4, 201)):
        assert timing.interleave({"one": int}, seconds=seconds)["one"].rounds == rounds


def test_a_limit_is_what_neighbours_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the rounds beside other work would halve the peak that the median tells."""
    undisturbed = 1e-3
    rounds = timing.Times.from_seconds([undisturbed] * 4 + [2 * undisturbed] * 6)
    monkeypatch.setattr(timing, "interleave", lambda calls, **_: dict.fromkeys(calls, rounds))
    assert timing.product_peak(torch.float32, n=8) == pytest.approx(2 * 8**3 / undisturbed)
    assert timing.copy_bandwidth(megabytes=1) == pytest.approx((2 << 20) / undisturbed)
    assert timing.read_bandwidth(megabytes=1) == pytest.approx((1 << 20) / undisturbed)


# FLOPs of a round of `multiply_add` on one thread: 12 instructions, or 4 pairs of AMX tiles.
ROUND = {
    "scalar": (12 * 2 * 4, 12 * 2 * 4),
    "avx2": (12 * 2 * 8, 12 * 2 * 8),
    "avx512": (12 * 2 * 16, 12 * 2 * 16),
    "avx512bf16": (12 * 2 * 16, 12 * 4 * 16),
    "amxbf16": (12 * 2 * 16, 4 * 2 * 16 * 16 * 32),
}


@pytest.mark.parametrize("isa", ROUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_multiply_add_on_each_instruction_set_returns_its_flops(
    isa: str, dtype: torch.dtype
) -> None:
    if native.module is None:
        pytest.skip("no native kernels")
    before = native.isa or ""
    try:
        if native.use_isa(isa) != isa:
            pytest.skip("this machine or build lacks the instruction set")
        found = native.module.multiply_add(DTYPE_NUMBERS[dtype], 3, 2)
    finally:
        native.use_isa(before)
    assert found == 3 * 2 * ROUND[isa][dtype is torch.bfloat16]


def test_peak_is_of_registers_and_no_less_than_a_gemm_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Extension:
        """A processor of 8 FLOPs a round in float32 and 96 in bfloat16."""

        @staticmethod
        def multiply_add(dtype: int, rounds: int, threads: int) -> float:
            return float((8, 96, 8)[dtype] * rounds)

    second = timing.Times.from_seconds([1.0] * 5)
    monkeypatch.setattr(timing, "interleave", lambda calls, **_: dict.fromkeys(calls, second))
    monkeypatch.setattr(native, "module", Extension)
    f32, bf16 = torch.float32, torch.bfloat16
    for isa, dtype, flops in (
        ("avx512bf16", f32, 8),
        ("avx512bf16", bf16, 96),
        ("amxbf16", f32, 16),  # six products of bfloat16
        ("amxbf16", torch.float16, 8),
    ):
        monkeypatch.setattr(native, "isa", isa)
        assert timing.peak(dtype, 1.0) == flops * 2**20
        assert timing.peak(dtype, 1e12) == 1e12
    monkeypatch.setattr(native, "module", None)
    assert timing.peak(f32, 1e12) is None


def test_least_seconds_of_a_warm_call_may_read_its_weight_from_a_cache() -> None:
    """512 MiB of weight: a cache may hold 64 of them, and a call with little holds all."""
    machine = timing.Machine(1e9, {torch.float32: 1e15})
    large, small = Case(1, 16384, 8192, 4), Case(1, 64, 64, 4)
    cold, warm = (dense.least_seconds(large, "forward", machine, c) for c in ("cold", "warm"))
    assert cold - warm == pytest.approx(timing.COLD_BYTES / 1e9)
    assert dense.least_seconds(small, "forward", machine, "warm") == 0.0  # of a cache, unmeasured
    many = Case(10**6, 64, 64, 4)
    slow = timing.Machine(1e9, {torch.float32: 1e9})
    assert dense.least_seconds(many, "forward", slow, "warm") > 0.0
