"""Several adapters as one whose ranks are all of theirs, each row of x taking part in its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import Rows, rows_of


class Stacked(NamedTuple):
    """lora_A [ΣR, K], lora_B [N, ΣR], gate float32 [ΣR]: each adapter's scaling on its ranks.

    own: bool [M, ΣR], which ranks a row has. columns: int64 [M, R], where in ΣR a row's own ranks
    lie, R the largest rank; past a smaller one's, and where there is none, 0. some: bool [M, R],
    whether there is one. starts: of each adapter in ΣR. rows: which rows an adapter has.
    """

    lora_A: Tensor
    lora_B: Tensor
    gate: Tensor
    own: Tensor
    columns: Tensor
    some: Tensor
    starts: list[int]
    rows: Rows

    def kept(self, p: Tensor) -> Tensor:
        """[M, ΣR], 0 where a row has not the rank, whatever was there."""
        return torch.where(self.own, p, 0.0)

    def compact(self, p: Tensor) -> Tensor:
        """[M, ΣR] -> [M, R]: each row's own ranks, then zeros."""
        return torch.where(self.some, p.gather(1, self.columns), 0.0)


def stack(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], index: Tensor, scaling: Sequence[float]
) -> Stacked:
    """ValueError for an index that no adapter has.

    >>> A, B = [torch.ones(1, 3), torch.ones(2, 3)], [torch.ones(4, 1), torch.ones(4, 2)]
    >>> stack(A, B, torch.tensor([1, -1, 0]), [0.5, 2.0]).own.int().tolist()
    [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
    """
    rows = rows_of(index, len(lora_A))
    ranks, device = [A.shape[0] for A in lora_A], index.device
    starts = [sum(ranks[:e]) for e in range(len(ranks))]
    adapter_of = torch.cat(
        [torch.full((r,), e, dtype=torch.int64, device=device) for e, r in enumerate(ranks)]
    )
    gate = torch.tensor(scaling, dtype=torch.float32, device=device)[adapter_of]
    # One more for rows without an adapter: index -1 is the last.
    first = torch.tensor([*starts, 0], device=device)[index]
    count = torch.tensor([*ranks, 0], device=device)[index]
    within = torch.arange(max(ranks), device=device)[None, :]
    some = within < count[:, None]
    A, B = torch.cat(tuple(lora_A)), torch.cat(tuple(lora_B), dim=1)
    own, columns = index[:, None] == adapter_of, torch.where(some, first[:, None] + within, 0)
    return Stacked(A, B, gate, own, columns, some, starts, rows)
