"""Each claim notices a kernel of the kind that it is for. The kernels are CUDA's, made wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.backends import cuda
from lora_kernels.bench import claims
from lora_kernels.verdicts import Group
from tests.support.fake_card import FakeCard

if cuda.emulator_unavailable_reason():
    pytest.skip("the emulator was not built", allow_module_level=True)

DECODE = Group("cuda", "cooperative", "bfloat16", "bfloat16", "dense")
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


def memory() -> str | None:
    card = FakeCard.__new__(FakeCard)
    card.broken = False
    with card.engine(DECODE):
        return claims.memory(card, DECODE)


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
        return y + (next(calls) == 6)

    plant(change)
    assert memory() == "y has other bits in repeat 6"


def test_operand_that_is_written_is_noticed(plant: Any) -> None:
    def change(y: Tensor, operands: Any) -> Tensor:
        operands.lora_A[0, 0] += 1
        return y.zero_()

    plant(change)
    assert memory() == "an operand was written"


def test_operands_lie_between_nan() -> None:
    inner = claims.surround(torch.arange(6.0).view(2, 3))
    around = torch.empty(0).set_(inner.untyped_storage())
    assert torch.equal(inner, torch.arange(6.0).view(2, 3))
    count = claims.GUARD // 4
    assert around[:count].isnan().all() and around[-count:].isnan().all()
    assert around.numel() == 2 * count + 6


def judged(name: str, plant: Any, change: Callable[[Tensor, Any], Tensor]) -> str | None:
    plant(change)
    card = FakeCard.__new__(FakeCard)
    card.broken = False
    return claims.check(card, claims.Claim(DECODE, name, 1), ())[0]


@pytest.mark.parametrize("name", ["odd sizes", "many blocks", "autocast"])
def test_result_off_the_reference_is_noticed(name: str, plant: Any) -> None:
    def change(y: Tensor, operands: Any) -> Tensor:
        y[:, -1] *= 1.05  # the last column, which a tile of its own has
        return y

    found = judged(name, plant, change)
    assert found is not None and found.startswith("y MISS")


def test_stream_that_sees_another_is_noticed(plant: Any) -> None:
    seen: list[Tensor] = []

    def change(y: Tensor, operands: Any) -> Tensor:
        seen.append(y)
        return y if len(seen) < 4 else seen[-2]

    found = judged("two streams", plant, change)
    assert found == "a call beside another had other bits in repeat 0"


def test_graph_whose_replay_keeps_old_operands_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def replays(self: FakeCard, call: Callable[[], Tensor], count: int) -> Any:
        y = call()
        for _ in range(count):
            yield y

    monkeypatch.setattr(FakeCard, "replays", replays)
    card = FakeCard.__new__(FakeCard)
    card.broken = False
    with card.engine(DECODE):
        found = claims.graph(card, DECODE)
    assert found == "replay 1 has other bits than a call by itself"


def test_times_are_of_every_shape_and_row() -> None:
    card: Any = FakeCard.__new__(FakeCard)
    group = DECODE._replace(strategy="two_pass")
    _, points = claims.check(card, claims.Claim(group, "time", 3), [(64, 128), (128, 64)])
    assert [point[:4] for point in points] == [(20, 64, 128, 16), (20, 128, 64, 16)]
    assert all(point[4:] == (0.5e-3, 1e-3, 0.5e-3, 1e-3) for point in points)


def test_weights_are_cold_and_equal() -> None:
    card: Any = FakeCard.__new__(FakeCard)
    card.cold_bytes = 10 * 64 * 32 * 2
    dense = claims._weights(card, torch.bfloat16, "dense", 64, 32)
    assert len(dense) == 10 and len({w.data_ptr() for w in dense}) == 10
    packed = claims._weights(card, torch.bfloat16, "4bit", 64, 32)
    assert len(packed) == 40 and len({w.packed.data_ptr() for w in packed}) == 40
    assert torch.equal(packed[0].dequantize(), packed[-1].dequantize())
