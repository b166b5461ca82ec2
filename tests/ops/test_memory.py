"""Native kernels write all of their outputs and nothing beside them."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels.backends import native
from lora_kernels.measure import case as cases
from lora_kernels.measure.case import Case
from tests.ops.engines import every_isa, every_thread_count

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


@every_isa
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


@every_isa
@pytest.mark.parametrize("N", [1, 15, 33, 64, 100, 257])
@pytest.mark.parametrize("M", [1, 5, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expand_keeps_within_its_columns(dtype: torch.dtype, M: int, N: int, engine: str) -> None:
    """y as columns of a wider matrix: what lies beside them and between the rows stays."""
    R = 5
    s, b = torch.ones(M, R), torch.ones(N, R)
    wide = torch.full((M + 2, N + 2 * GUARD), 7.0, dtype=dtype)
    y = wide[1:-1, GUARD:-GUARD]
    y.zero_()
    native.module.expand(
        y.data_ptr(), DTYPES[dtype], y.stride(0), M, N, s.data_ptr(), R,
        b.data_ptr(), DTYPES[b.dtype], b.stride(1), b.stride(0), 1.0, 0, 0, 0, 0, 0, 1,
    )  # fmt: skip
    assert y.eq(R).all()
    y.fill_(7.0)
    assert wide.eq(7.0).all()
