"""Native kernels write all of their outputs and nothing beside them."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case
from tests.ops.engines import every_native_engine, every_thread_count

GUARD = 64  # elements: the longest vector of the narrowest dtype, twice over
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """`new_empty` hands out the middle of a larger buffer of NaN; the buffers' ends are listed."""
    ends: list[Tensor] = []

    def new_empty(like: Tensor, *shape: object, dtype: torch.dtype | None = None) -> Tensor:
        want = plain(like, *shape, dtype=dtype)
        buffer = torch.full((want.numel() + 2 * GUARD,), float("nan"), dtype=want.dtype)
        ends.extend((buffer[:GUARD], buffer[-GUARD:]))
        return buffer[GUARD:-GUARD].view(want.shape)

    plain: Callable[..., Tensor] = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    yield ends


@every_native_engine
@every_thread_count
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (7, 65, 63, 5), (33, 17, 31, 16), (130, 100, 257, 64)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_written_whole_and_nothing_else(
    dtype: torch.dtype, shape: tuple[int, ...], guarded: list[Tensor], threads: int, engine: str
) -> None:
    case = Case(*shape, dtype, gate=True, column_scale=True, bias=True, dropout_p=0.1)
    results = cases.run(lora_kernels.lora_linear, cases.inputs(case))
    assert guarded
    for name, result in results.items():
        assert not result.isnan().any(), name
    for end in guarded:
        assert end.isnan().all()


@every_native_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_among_nan_give_the_same_bits(dtype: torch.dtype, engine: str) -> None:
    """NaN before, after and between the rows of each matrix reaches no result."""
    args = cases.inputs(Case(7, 65, 63, 5, dtype, dropout_p=0.1))

    def surrounded(t: Tensor) -> Tensor:
        wide = torch.full((t.shape[0] + 2, t.shape[1] + 2 * GUARD), float("nan"), dtype=t.dtype)
        wide[1:-1, GUARD:-GUARD] = t.detach()
        return wide[1:-1, GUARD:-GUARD].requires_grad_(t.requires_grad)

    names = ("x", "weight", "lora_A", "lora_B", "dy")
    results = cases.run(lora_kernels.lora_linear, args)
    among_nan = {**args, **{name: surrounded(args[name]) for name in names}}
    for name, result in cases.run(lora_kernels.lora_linear, among_nan).items():
        assert torch.equal(result, results[name]), name
