"""Bytes, kernels and memory of every block equal block_counts.json."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

from tests.bench import block_counts


@pytest.mark.parametrize("block", block_counts.BUILD)
def test_counts_of_a_block_equal_the_table(block: str) -> None:
    """An intended change is accepted by `python -m tests.bench.block_counts --write`."""
    cases = [case for case in block_counts.cases() if case.block == block]
    if any("NF4" in case.dtypes for case in cases):
        pytest.importorskip("bitsandbytes")
    kept = block_counts.read()
    differ = {
        str(case): (kept.get(str(case)), found)
        for case in cases
        if (found := block_counts.count(case)) != kept.get(str(case))
    }
    assert not differ, differ
