"""Each claim notices a kernel of the kind that it is for. The kernels are CUDA's, made wrong."""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import functional, selection, verdicts
from lora_kernels.backends import cuda, decode4bit
from lora_kernels.backends.cuda import launch
from lora_kernels.bench import claims
from lora_kernels.quantization import quantize_4bit
from lora_kernels.verdicts import Group
from tests.support.fake_card import FakeCard

if cuda.emulator_unavailable_reason():
    pytest.skip("the emulator was not built", allow_module_level=True)

DECODE = Group("cuda", "cooperative", "bfloat16", "bfloat16", "dense")
TWO_PASS = Group("cuda", "two_pass", "bfloat16", "float32", "4bit")
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


def test_memory_written_outside_is_noticed(plant: Any) -> None:
    def change(y: Tensor, operands: Any) -> Tensor:
        beyond = torch.empty(8)  # a result of the kernel; the write goes one element past it
        storage = torch.empty(0, dtype=beyond.dtype).set_(beyond.untyped_storage())
        storage[beyond.storage_offset() + 8] = 1.0
        return y

    plant(change)
    assert memory() == "4 bytes outside of its results were written"


def test_memory_read_uninitialised_is_noticed(plant: Any) -> None:
    plant(lambda y, operands: y + torch.empty_like(y) * 1e-9)
    assert memory() == "y has NaN from memory that was not written"


def test_other_bits_in_a_repeat_are_noticed(plant: Any) -> None:
    calls = iter(range(100))

    def change(y: Tensor, operands: Any) -> Tensor:
        y[0, 0] = 1e-9 * (next(calls) == 6)
        return y

    plant(change)
    assert memory() == "y has other bits in repeat 6"


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
    return claims.check(fake_card(), claims.Claim(DECODE, name, 1), ())[0]


@pytest.mark.parametrize("name", ["odd sizes", "many blocks", "autocast"])
def test_result_off_the_reference_is_noticed(name: str, plant: Any) -> None:
    def change(y: Tensor, operands: Any) -> Tensor:
        y[:, -1] *= 1.05  # the last column, which a tile of its own has
        return y

    found = judged(name, plant, change)
    assert found is not None and found.startswith("y MISS")


def test_cases_have_the_sizes_and_options_that_their_claims_name() -> None:
    card = fake_card()
    odd, even = claims.odd_sizes(card, TWO_PASS)
    assert (odd.N % 16, odd.R, odd.quant) == (8, 13, "fp4-128") and odd.bias
    assert even.gate and even.column_scale and even.bias and even.quant == "nf4-64-nested"
    assert even.R == verdicts.MAX_RANK
    (many,), (few,) = (claims.many_blocks(card, group) for group in (TWO_PASS, DECODE))
    assert card.many == (many.M, many.N, many.K) and (16, card.many[1]) == (few.M, few.N)
    for case in (odd, even, many):
        assert (case.dtype, case.adapter_dtype) == (torch.bfloat16, torch.float32)
        assert case.quant
    (cast,) = claims.autocast(card, TWO_PASS)
    assert (cast.dtype, cast.adapter_dtype) == (torch.float32, torch.float32)
    assert cast.autocast == torch.bfloat16


@pytest.mark.parametrize(("quant_type", "blocksize"), [("nf4", 64), ("fp4", 128)])
def test_weight_that_is_decoded_wrong_is_noticed(
    quant_type: str, blocksize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = decode4bit.dense

    def wrong(weight: Any, *args: Any) -> Tensor:
        decoded = right(weight, *args)
        decoded[-1, -1] += weight.blocksize == blocksize
        return decoded

    monkeypatch.setattr(decode4bit, "dense", wrong)
    found = claims.check(fake_card(), claims.Claim(TWO_PASS, "dequantize", 1), ())[0]
    assert found == f"1 elements of {quant_type} differ from the reference's"


def test_any_case_of_a_claim_may_fail_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = iter([None, "y MISS"])
    monkeypatch.setattr(claims, "judge", lambda case: next(reasons))
    assert claims.check(fake_card(), claims.Claim(DECODE, "odd sizes", 1), ()) == ("y MISS", ())


@pytest.mark.parametrize("repeat", [0, 3])
def test_stream_that_sees_another_is_noticed(repeat: int, plant: Any) -> None:
    seen: list[Tensor] = []

    def change(y: Tensor, operands: Any) -> Tensor:
        seen.append(y)
        return y if len(seen) < 4 + 2 * repeat else seen[-2]

    found = judged("two streams", plant, change)
    assert found == f"a call beside another had other bits in repeat {repeat}"


def test_graph_whose_replay_keeps_old_operands_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def replays(self: FakeCard, call: Callable[[], Tensor], count: int) -> Any:
        y = call()
        for _ in range(count):
            yield y

    monkeypatch.setattr(FakeCard, "replays", replays)
    card = fake_card()
    with card.engine(DECODE):
        found = claims.graph(card, DECODE)
    assert found == "replay 1 has other bits than a call by itself"


def test_times_are_of_every_shape_and_row() -> None:
    group = DECODE._replace(strategy="two_pass")
    _, points = claims.check(fake_card(), claims.Claim(group, "time", 3), [(64, 128), (128, 64)])
    assert [point[:4] for point in points] == [(20, 64, 128, 16), (20, 128, 64, 16)]
    assert all(point[4:] == (0.5e-3, 1e-3, 0.5e-3, 1e-3) for point in points)


def test_times_are_medians_of_turns_after_one_to_warm_up() -> None:
    """The group and eager take turns, each forced."""
    turns, seen = iter([100, 100, 7, 8, 1, 2, 6, 9, 2, 1, 5, 5, 3, 3, 4, 6]), []

    def seconds(name: str, call: Any, count: int) -> float:
        seen.append((selection.forced_backend(), call(0)))
        return float(next(turns)) * count

    card: Any = SimpleNamespace(engine=fake_card().engine, seconds=seconds)
    assert claims._interleave(card, DECODE, lambda number: "called", 3) == (4.0, 5.0)
    assert seen == [("cuda", "called"), ("eager", "called")] * (claims.ROUNDS + 1)


def test_steps_have_gradients_and_calls_cold_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, gradients = [], []

    def lora_linear(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        weights.append(weight.data_ptr())
        gradients.append(torch.is_grad_enabled())
        return x @ weight.t() + sum(t.sum() for t in args[:2])

    class Card(FakeCard):
        def seconds(self, name: str, call: Any, count: int) -> float:
            call(0), call(1)
            return 1.0

    monkeypatch.setattr(functional, "lora_linear", lora_linear)
    group = DECODE._replace(strategy="two_pass")
    claims.check(fake_card(Card), claims.Claim(group, "time", 3), [(32, 128)])
    half = len(gradients) // 2
    assert gradients == [False] * half + [True] * half
    assert len(set(weights)) == 2 and weights[::2].count(weights[0]) == half


@pytest.mark.parametrize("name", ["autocast", "memory", "time"])
def test_kernels_compiled_ahead_are_those_of_the_claim(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_sizes", lambda group: [(5, 24, 32), (5, 16, 32)])
    monkeypatch.setattr(claims, "REPEATS", 1)
    card, claim, launched = fake_card(), claims.Claim(TWO_PASS, name, 1), []
    for call in (claims.launch_all, claims.check):
        launch.traffic.clear()
        with card.engine(TWO_PASS):
            call(card, claim, [(64, 128)])
        launched.append({kernel for kernel, _ in launch.traffic})
    assert launched[0] == launched[1] and launched[0]


def test_weights_are_cold_and_equal() -> None:
    card = fake_card()
    card.cold_bytes = 10 * 64 * 32 * 2
    dense = claims._weights(card, torch.bfloat16, "dense", 64, 32)
    assert len(dense) == 10 and len({w.data_ptr() for w in dense}) == 10
    packed = claims._weights(card, torch.bfloat16, "4bit", 64, 32)
    assert len(packed) == 40 and len({w.packed.data_ptr() for w in packed}) == 40
    assert torch.equal(packed[0].dequantize(), packed[-1].dequantize())
    assert len(claims._weights(fake_card(), torch.bfloat16, "dense", 64, 32)) == 2


def test_gpu_s_work_is_waited_for_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls at once have a stream each; a graph is warmed up on a stream aside."""
    log: list[str] = []
    numbers = itertools.count(1)

    @contextmanager
    def within(name: str) -> Iterator[None]:
        log.append(f"on {name}")
        yield

    def note(what: str) -> Callable[[], None]:
        return lambda: log.append(what)

    def event(enable_timing: bool) -> Any:
        elapsed = {"elapsed_time": lambda end: 3000.0}
        return SimpleNamespace(record=note("record"), synchronize=note("wait for it"), **elapsed)

    def stream() -> Any:
        name = f"stream {next(numbers)}"
        return SimpleNamespace(name=name, synchronize=note(f"wait for {name}"))

    fakes: dict[str, Any] = {"synchronize": note("wait"), "Stream": stream, "Event": event}
    fakes |= {"CUDAGraph": lambda: SimpleNamespace(replay=note("replay"))}
    fakes |= {"stream": lambda s: within(s.name), "graph": lambda g: within("graph")}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def said() -> str:
        text = ", ".join(log)
        log.clear()
        return text

    gpu = claims.Card.__new__(claims.Card)
    gpu.concurrently([note("a"), note("b")])  # type: ignore[list-item]
    assert said() == "wait, on stream 1, a, on stream 2, b, wait"
    assert len(list(gpu.replays(note("call"), 2))) == 2  # type: ignore[arg-type]
    warm = "on stream 3, call, wait for stream 3"
    assert said() == f"{warm}, on graph, call, replay, wait, replay, wait"
    assert gpu.seconds("", lambda number: log.append(f"call {number}"), 2) == 3.0
    assert said() == "wait, record, call 0, call 1, record, wait for it"


def test_gpu_without_free_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free = claims.FREE - 1
    properties = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    with pytest.raises(RuntimeError, match="2047 MiB of the card's memory are free, want 2048 MiB"):
        claims.Card()
    free += 1
    assert claims.Card().cold_bytes == 100 << 20


def test_gpu_compiles_triton_s_claims_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    orders, waited = [], []

    class Worker:
        def __init__(self, command: list[str], stdin: int, **_: Any) -> None:
            self.stdin = SimpleNamespace(close=lambda: None)
            self.stdin.write = lambda text: orders.append(json.loads(text))

        def wait(self) -> None:
            waited.append(len(orders))

    monkeypatch.setattr(claims.subprocess, "Popen", Worker)
    monkeypatch.setattr(claims.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    gpu = claims.Card.__new__(claims.Card)
    ours = claims.Claim(TWO_PASS, "memory", 1)
    gpu.compile([ours], [(64, 128)])
    assert not orders
    theirs = ours._replace(group=TWO_PASS._replace(backend="triton"))
    gpu.compile([ours, theirs], [(64, 128)])
    assert [order["part"] for order in orders] == [[0, 3], [1, 3], [2, 3]]
    assert [order["claims"] for order in orders] == [[json.loads(json.dumps(theirs))]] * 3
    assert waited == [3, 3, 3]  # all run at once
