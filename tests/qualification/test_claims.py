"""Each claim notices a kernel of the kind that it is for. The kernels are CUDA's, made wrong."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import launch
from lora_kernels.choice import choose as selection
from lora_kernels.choice import verdicts
from lora_kernels.choice.verdicts import Group, Seconds
from lora_kernels.ops import linear
from lora_kernels.qualification import card as cards
from lora_kernels.qualification import claims, timing
from lora_kernels.quantization import quantize_4bit
from tests.support import fake_card as fake_card_times
from tests.support.emulator import emulator_unavailable_reason
from tests.support.fake_card import FakeCard

if emulator_unavailable_reason():
    pytest.skip("the emulator was not built", allow_module_level=True)

DECODE = Group("cuda", "cooperative", "bfloat16", "bfloat16", "dense")
TWO_PASS = Group("cuda", "two_pass", "bfloat16", "float32", "4bit")
NESTED = "nf4-64-nested"
Forward = Callable[..., Any]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensor, Any], Tensor]], None]:
    """Replace y of the CUDA backend by a function of y and the operands."""
    right = cuda.lora_linear

    def plant(change: Callable[[Tensor, Any], Tensor]) -> None:
        def wrong(operands: Any, spec: Any, strategy: str) -> Any:
            y, saved = right(operands, spec, strategy)
            return change(y, operands), saved

        monkeypatch.setattr(cuda, "lora_linear", wrong, raising=False)

    return plant


def fake_card(kind: type[FakeCard] = FakeCard) -> Any:
    """A card that does not read the environment."""
    return kind.__new__(kind)


def memory(group: Group = DECODE) -> str | None:
    card = fake_card()
    with card.engine(group):
        return claims.memory(card, group)


def test_memory_of_right_kernels_holds() -> None:
    assert memory() is None


# A change of the kernel's y in call `number` of ten, and the reason that the claim gives.
UNWRITTEN = "y has NaN from memory that was not written"
Change = Callable[[Tensor, Any, int], Tensor]


def write_beyond(at: int) -> Change:
    """Write an element at this distance from the start of a result of eight."""

    def change(y: Tensor, operands: Any, number: int) -> Tensor:
        beyond = torch.empty(8).fill_(0.0)
        if number == 0:
            storage = torch.empty(0, dtype=beyond.dtype).set_(beyond.untyped_storage())
            storage[beyond.storage_offset() + at] = 1.0
        return y

    return change


def set_last(value: Callable[[Tensor], Any]) -> Change:
    def change(y: Tensor, operands: Any, number: int) -> Tensor:
        y[-1, -1] = value(y)
        return y

    return change


def differ_in(call: int, factor: float = 1 + 2.0**-7) -> Change:
    """One element is an ulp of bfloat16 larger in one call."""

    def change(y: Tensor, operands: Any, number: int) -> Tensor:
        y[-1, -1] = factor if number == call else 1.0
        return y

    return change


def in_one_buffer(change: Change) -> Change:
    """The result lies where that of the call before does."""
    kept: list[Tensor] = []

    def changed(y: Tensor, operands: Any, number: int) -> Tensor:
        kept.append(y.clone())
        return kept[0].copy_(change(y, operands, number))

    return changed


def through_scratch(y: Tensor, operands: Any, number: int) -> Tensor:
    return y + torch.empty_like(y).zero_()


MEMORY: dict[str, tuple[Change, str | None]] = {
    "written behind": (write_beyond(8), "4 bytes outside of its results were written"),
    "written before": (write_beyond(-1), "4 bytes outside of its results were written"),
    "written last": (write_beyond(7), None),
    "far behind": (
        write_beyond(7 + claims.GUARD // 4),
        "4 bytes outside of its results were written",
    ),
    "far before": (write_beyond(-claims.GUARD // 4), "4 bytes outside of its results were written"),
    "read uninitialised": (lambda y, o, n: y + torch.empty_like(y) * 1e-9, UNWRITTEN),
    "one element uninitialised": (set_last(lambda y: torch.empty_like(y)[0, 0]), UNWRITTEN),
    "one element infinite": (set_last(lambda y: -torch.inf), UNWRITTEN),
    "scratch memory that was written": (through_scratch, None),
    "an ulp in the second repeat": (differ_in(1), "y has other bits in repeat 1"),
    "an ulp in the last repeat": (differ_in(9), "y has other bits in repeat 9"),
    "an ulp in the first": (differ_in(0), "y has other bits in repeat 1"),
    "an ulp less": (differ_in(6, 1 - 2.0**-8), "y has other bits in repeat 6"),
    "an ulp in one buffer": (in_one_buffer(differ_in(6)), "y has other bits in repeat 6"),
    "one buffer": (in_one_buffer(differ_in(99)), None),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_notices_one_element_and_excuses_what_is_right(name: str, plant: Any) -> None:
    change, reason = MEMORY[name]
    number = itertools.count()
    plant(lambda y, operands: change(y, operands, next(number)))
    assert memory() == reason


@pytest.mark.parametrize("name", ["lora_A", "weight"])
def test_operand_that_is_written_is_noticed(name: str, plant: Any) -> None:
    def change(y: Tensor, operands: Any) -> Tensor:
        written = getattr(operands, name)
        (written.absmax if name == "weight" else written).view(-1)[0] += 1
        return y.zero_()

    plant(change)
    assert memory(TWO_PASS) == "an operand was written"


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "dy"])
def test_gradient_that_is_not_written_and_dy_that_is_are_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cuda.lora_linear_backward

    def wrong(dy: Tensor, *args: Any) -> Any:
        grads = right(dy, *args)
        if name != "dy":
            return grads._replace(**{name: torch.empty_like(getattr(grads, name))})
        dy[0, 0] += 1
        return grads

    monkeypatch.setattr(cuda, "lora_linear_backward", wrong, raising=False)
    not_written = f"d{name} has NaN from memory that was not written"
    assert memory() == ("an operand was written" if name == "dy" else not_written)


@pytest.mark.parametrize("at", [-1, 8])
@pytest.mark.parametrize(
    "make",
    [
        lambda t: torch.empty(8),
        torch.empty_like,
        lambda t: t.new_empty(8),
        lambda t: t.new_empty_strided((8,), (1,)),
    ],
)
def test_new_memory_is_nan_between_guards(make: Callable[[Tensor], Tensor], at: int) -> None:
    with claims.GuardedMemory() as guarded:
        t = make(torch.ones(8))
    assert t.isnan().all() and guarded.written() == 0
    t.as_strided((1,), (1,), t.storage_offset() + at).fill_(1.0)
    assert guarded.written() == 4


def test_operands_lie_between_nan() -> None:
    inner = claims.surround(torch.arange(6.0).view(2, 3))
    around = torch.empty(0).set_(inner.untyped_storage())
    assert torch.equal(inner, torch.arange(6.0).view(2, 3))
    count = claims.GUARD // 4
    assert around[:count].isnan().all() and around[-count:].isnan().all()
    assert around.numel() == 2 * count + 6
    codes = claims.surround(quantize_4bit(torch.randn(2, 64), "nf4", 64, True).codes)
    assert codes.packed.storage_offset() == codes.absmax.storage_offset() == claims.GUARD


def judged(name: str, plant: Any, change: Callable[[Tensor, Any], Tensor]) -> str | None:
    plant(change)
    return claims.check(fake_card(), claims.Claim(DECODE, name, 1))[0]


@pytest.mark.parametrize("name", ["odd sizes", "many blocks", "autocast"])
def test_result_off_the_reference_is_noticed(name: str, plant: Any) -> None:
    def change(y: Tensor, operands: Any) -> Tensor:
        y[:, -1] *= 1.05  # the last column, which a tile of its own has
        return y

    found = judged(name, plant, change)
    assert found is not None and found.startswith("y MISS")


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B"])
def test_gradient_off_the_reference_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cuda.lora_linear_backward

    def wrong(*args: Any) -> Any:
        grads = right(*args)
        getattr(grads, name)[-1] *= 1.05
        return grads

    monkeypatch.setattr(cuda, "lora_linear_backward", wrong, raising=False)
    found = claims.check(fake_card(), claims.Claim(TWO_PASS, "odd sizes", 1))[0]
    assert found is not None and found.startswith(f"d{name.removeprefix('lora_')} MISS")


def test_cases_have_the_sizes_and_options_that_their_claims_name() -> None:
    card = fake_card()
    fused = TWO_PASS._replace(backend="triton", strategy="fused")
    for group, columns, rank in ((TWO_PASS, 200, 128), (DECODE, 200, 128), (fused, 203, 64)):
        odd, few = claims.odd_sizes(card, group)
        assert odd.gate and odd.column_scale and odd.bias
        assert (columns, rank) == (odd.N, odd.R) and odd.M % 16 and few.M <= 17
        assert (odd.quant, few.quant) == (("", "") if group is DECODE else ("fp4-128", NESTED))
    assert verdicts.MAX_RANK == 128
    (many,), (few,) = (claims.many_blocks(card, group) for group in (TWO_PASS, DECODE))
    assert card.many == (many.M, many.N, many.K) and (16, card.many[1]) == (few.M, few.N)
    for case in (*claims.odd_sizes(card, TWO_PASS), many):
        assert (case.dtype, case.adapter_dtype) == (torch.bfloat16, torch.float32)
        assert case.quant
    (cast,) = claims.autocast(card, TWO_PASS)
    assert (cast.dtype, cast.adapter_dtype) == (torch.float32, torch.float32)
    assert cast.autocast == torch.bfloat16


def test_any_case_of_a_claim_may_fail_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = iter([None, "y MISS"])
    monkeypatch.setattr(claims, "judge", lambda case: next(reasons))
    assert claims.check(fake_card(), claims.Claim(DECODE, "odd sizes", 1)) == ("y MISS", ())


@pytest.mark.parametrize("repeat", [0, 3])
def test_stream_that_sees_another_is_noticed(repeat: int, plant: Any) -> None:
    seen: list[Tensor] = []

    def change(y: Tensor, operands: Any) -> Tensor:
        seen.append(y)
        return y if len(seen) < 4 + 2 * repeat else seen[-2]

    found = judged("two streams", plant, change)
    assert found == f"a call beside another had other bits in repeat {repeat}"


def test_streams_that_share_a_result_are_noticed(
    plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However their kernels run, one after the other here."""
    monkeypatch.setattr(FakeCard, "concurrently", lambda self, calls: [call() for call in calls])
    change = in_one_buffer(lambda y, operands, number: y)
    found = judged("two streams", plant, lambda y, operands: change(y, operands, 0))
    assert found == "a call beside another had other bits in repeat 0"


@pytest.mark.parametrize("stale", [None, 1, 2])
def test_graph_whose_replay_keeps_old_operands_is_noticed(
    stale: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x is another one in the second replay, and of the other sign in the third."""

    def replays(self: FakeCard, call: Callable[[], Tensor], count: int) -> Any:
        y = call()
        for number in range(count):
            y = y if number == stale else call()
            yield y

    monkeypatch.setattr(FakeCard, "replays", replays)
    card = fake_card()
    with card.engine(DECODE):
        found = claims.graph(card, DECODE)
    said = f"replay {stale} has other bits than a call by itself"
    assert found == (None if stale is None else said)


def test_times_are_of_every_shape_and_row() -> None:
    group = DECODE._replace(strategy="two_pass")
    sizes = (8, 64, 128), (7, 128, 64)
    _, points = claims.check(fake_card(), claims.Claim(group, "time", 3, sizes))
    assert [point[:4] for point in points] == [(8, 64, 128, 16), (7, 128, 64, 16)]
    times = fake_card_times.SECONDS, fake_card_times.EAGER_SECONDS
    assert [point[4:] for point in points] == [times * 2, (*times, None, None)]


def test_times_are_medians_of_turns_after_one_to_warm_up() -> None:
    """The group and eager take turns, each forced; the host's seconds are medians of fewer."""
    turns = iter([100, 100, 7, 8, 1, 2, 6, 9, 2, 1, 5, 5, 3, 3, 4, 6])
    hosts, seen = iter([100, 100, 70, 80, 10, 20, 60, 90]), []

    def clocks(name: str, call: Any, count: int) -> cards.Clocks:
        def clock(times: Iterator[int], which: str) -> float:
            seen.append((selection.forced_backend(), call(0), which))
            return float(next(times)) * count

        device, host = partial(clock, turns, "device"), partial(clock, hosts, "host")
        return cards.Clocks(device, host, name == "eager")

    card: Any = SimpleNamespace(engine=fake_card().engine, clocks=clocks)
    ours, eager = timing.by_group(card, DECODE, lambda number: "called", 3)
    assert (ours, eager) == (Seconds(4.0, 60.0, False), Seconds(5.0, 80.0, True))
    both = [("cuda", "called", "device"), ("cuda", "called", "host")]
    both += [("eager", "called", "device"), ("eager", "called", "host")]
    rounds = timing.ROUNDS - timing.HOST_ROUNDS
    assert seen == both * (timing.HOST_ROUNDS + 1) + both[::2] * rounds


def test_steps_have_gradients_and_calls_cold_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, gradients, counts = [], [], []

    def lora_linear(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        weights.append(weight.data_ptr())
        gradients.append(torch.is_grad_enabled())
        return x @ weight.t() + sum(t.sum() for t in args[:2])

    class Card(FakeCard):
        def clocks(self, name: str, call: Any, count: int) -> Any:
            counts.append(count)
            call(0), call(1)
            return cards.Clocks(lambda: 1.0, lambda: 1.0, True)

    monkeypatch.setattr(linear, "lora_linear", lora_linear)
    group = DECODE._replace(strategy="two_pass")
    claims.check(fake_card(Card), claims.Claim(group, "time", 3, ((20, 32, 128),)))
    half = len(gradients) // 2
    assert gradients == [False] * half + [True] * half
    assert len(set(weights)) == 2 and weights[::2].count(weights[0]) == half
    assert counts == [12, 12, 2, 2]  # forwards of few rows go through the weights six times


@pytest.mark.parametrize("name", ["autocast", "memory", "time"])
def test_kernels_compiled_ahead_are_those_of_the_claim(name: str) -> None:
    card, launched = fake_card(), []
    card.whole, card.many, card.repeats = (16, 32), (5, 16, 32), 1
    claim = claims.Claim(TWO_PASS, name, 1, ((1, 64, 128), (8, 64, 128)))
    for call in (claims.launch_all, claims.check):
        launch.traffic.clear()
        with card.engine(TWO_PASS):
            call(card, claim)
        launched.append({kernel for kernel, _ in launch.traffic})
    assert launched[0] == launched[1] and launched[0]


def test_every_case_of_a_claim_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    monkeypatch.setattr(claims.cases, "run", lambda op, args, *_: rows.append(len(args["x"])))
    card = fake_card()
    claims.launch_all(card, claims.Claim(TWO_PASS, "odd sizes", 1))
    assert rows == [case.M for case in claims.odd_sizes(card, TWO_PASS)]


GONE = torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
ERROR = RuntimeError("no kernel\nimage")
# Reasons of three claims, two of one group and one of another; whether the device is broken after
# the first; the lines that end a claim, and the exit status.
CHECKED: dict[str, tuple[list[Any], bool, list[tuple[int, str | None, str | None]], int]] = {
    "hold": ([None] * 3, False, [(0, None, None), (1, None, None), (2, None, None)], 0),
    "the first fails": (["no", None, None], False, [(0, "no", None), (2, None, None)], 0),
    "the second fails": (
        [None, "no", None],
        False,
        [(0, None, None), (1, "no", None), (2, None, None)],
        0,
    ),
    "an error": (
        [ERROR, None, None],
        False,
        [(0, "RuntimeError: no kernel", None), (2, None, None)],
        0,
    ),
    "no memory": (
        [GONE, None, None],
        False,
        [(0, None, "CUDA out of memory."), (1, None, None), (2, None, None)],
        0,
    ),
    "broken": ([None] * 3, True, [(0, "illegal", None)], claims.BROKEN),
    "fails and broken": (["no", None, None], True, [(0, "no", None)], claims.BROKEN),
}


@pytest.mark.parametrize("name", CHECKED)
def test_claims_that_fail_end_their_group_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, is_broken, ends, status = CHECKED[name]
    said: list[dict[str, Any]] = []

    def check(card: Any, claim: claims.Claim) -> tuple[str | None, Any]:
        reason = found[order.index(claim)]
        if isinstance(reason, Exception):
            raise reason
        return reason, ()

    def synchronize() -> None:
        if is_broken:
            raise RuntimeError("illegal\naccess")

    order = [claims.Claim(DECODE, "memory", 1), claims.Claim(DECODE, "graph", 1)]
    order.append(claims.Claim(TWO_PASS, "memory", 1))
    monkeypatch.setattr(claims, "check", check)
    card: Any = SimpleNamespace(before=lambda claim: None, synchronize=synchronize)
    assert claims._check_all(card, order, 9e99, lambda **line: said.append(line)) == status
    lines = [line for line in said if "end" in line]
    assert [(line["end"], line["failed"], line.get("retry")) for line in lines] == ends
    assert [line["begin"] for line in said if "begin" in line] == [end[0] for end in ends]
    assert claims._check_all(card, order, 0.0, lambda **line: pytest.fail("too late")) == 0


def test_weights_are_cold_and_equal() -> None:
    card = fake_card()
    card.cold_bytes = 10 * 64 * 32 * 2
    dense = timing.cold_weights(card, torch.bfloat16, "dense", 64, 32)
    assert len(dense) == 10 and len({w.data_ptr() for w in dense}) == 10
    packed = timing.cold_weights(card, torch.bfloat16, "4bit", 64, 32)
    assert len(packed) == 40 and len({w.packed.data_ptr() for w in packed}) == 40
    assert torch.equal(packed[0].dequantize(), packed[-1].dequantize())
    assert len(timing.cold_weights(fake_card(), torch.bfloat16, "dense", 64, 32)) == 2


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU whose calls are noted: `said()` returns and forgets them. `fails`: captures do."""
    noted = SimpleNamespace(log=[], fails=False, ticks=itertools.count())
    numbers = itertools.count(1)

    @contextmanager
    def enter(stream: Any) -> Iterator[None]:
        noted.log.append(f"on {stream.name}")
        yield
        noted.log.append("back")

    def note(what: str) -> Callable[..., None]:
        return lambda *args: noted.log.append(" ".join([what, *map(str, args)]))

    def event(enable_timing: bool = False) -> Any:
        calls = {name: note(name) for name in ("record", "wait")}
        return SimpleNamespace(synchronize=note("done"), elapsed_time=lambda end: 3000.0, **calls)

    def capture_end() -> None:
        noted.log.append("captured")
        if noted.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    def graph() -> Any:
        begin = note("capture")
        return SimpleNamespace(capture_begin=begin, capture_end=capture_end, replay=note("replay"))

    def said() -> str:
        text = ", ".join(noted.log)
        noted.log.clear()
        return text

    noted.said, noted.note = said, note
    stream = lambda: SimpleNamespace(name=f"stream {next(numbers)}")  # noqa: E731
    fakes = {"synchronize": note("synchronize"), "Stream": stream, "Event": event, "stream": enter}
    fakes |= {"CUDAGraph": graph, "_sleep": note("sleep")}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = SimpleNamespace(perf_counter=lambda: float(next(noted.ticks)))
    monkeypatch.setattr(cards, "time", clock)
    return noted


def test_calls_at_once_are_launched_while_their_streams_wait(driver: Any) -> None:
    """All wait for one event, and nothing synchronizes before the last is launched."""
    gpu = cards.Card.__new__(cards.Card)
    gpu.concurrently([driver.note("a"), driver.note("b")])
    gate = f"on stream 1, sleep {cards.BUSY}, record, back"
    calls = "on stream 2, wait, a, back, on stream 3, wait, b, back"
    assert driver.said() == f"synchronize, {gate}, {calls}, synchronize"


WARM_UP = "synchronize, on stream 1, {0}, {0}, synchronize, capture, {0}, captured, back"


def test_replays_are_of_one_capture_after_a_warm_up_aside(driver: Any) -> None:
    gpu = cards.Card.__new__(cards.Card)
    assert len(list(gpu.replays(driver.note("call"), 2))) == 2
    replays = "replay, synchronize, replay, synchronize"
    assert driver.said() == f"{WARM_UP.format('call')}, {replays}"


def test_clocks_capture_once_replay_and_time_the_host_apart(driver: Any) -> None:
    gpu = cards.Card.__new__(cards.Card)
    clocks = gpu.clocks("eager", driver.note("call"), 2)
    assert clocks.is_captured and driver.said() == WARM_UP.format("call 0, call 1")
    for _ in range(2):
        assert clocks.device() == 3.0
        launched = f"sleep {cards.FILL}, record, replay, record, done"
        assert driver.said() == f"synchronize, {launched}"
        assert clocks.host() == 1.0
        assert driver.said() == f"synchronize, sleep {cards.BUSY}, call 0, call 1"


def test_clocks_of_what_cannot_be_captured_launch_it_into_a_busy_stream(driver: Any) -> None:
    driver.fails = True
    gpu = cards.Card.__new__(cards.Card)
    clocks = gpu.clocks("eager", driver.note("call"), 2)
    assert not clocks.is_captured
    driver.said()
    assert clocks.device() == 3.0
    cycles = cards.BUSY + int(2 * cards.CLOCK)  # of twice the host's second
    launched = f"sleep {cycles}, record, call 0, call 1, record, done"
    assert driver.said() == f"synchronize, {launched}"
    assert clocks.host() == 1.0


def test_clocks_of_a_call_that_raises_raise(driver: Any) -> None:
    def broken(number: int) -> None:
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        cards.Card.__new__(cards.Card).clocks("eager", broken, 2)


def test_gpu_without_free_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free = cards.FREE - 1
    properties = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    with pytest.raises(RuntimeError, match="2047 MiB of the card's memory are free, want 2048 MiB"):
        cards.Card()
    free += 1
    assert cards.Card().cold_bytes == 100 << 20
