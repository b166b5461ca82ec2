"""The counts of experts by `bench --count`: what is derived, and that no row is lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_kernels.bench import experts_traffic
from lora_kernels.bench.blocks import Count
from lora_kernels.bench.experts_traffic import (
    KINDS,
    SHAPES,
    TILE,
    TOKENS,
    count_experts,
    judge,
    title,
)
from lora_kernels.bench.results import Row
from lora_kernels.bench.traffic import both

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

LAYER = [Row(dtype="bf16", M=1, K=1, N=1, R=1, mode="step", moved={"ours": 1, "peft": 2})]
QWEN3, FEW = SHAPES[1], SHAPES[5]


def test_missing_says_why_no_experts_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert experts_traffic.missing() is None
    monkeypatch.setattr(experts_traffic, "qwen3_moe", lambda: None)
    assert experts_traffic.missing() == "want transformers 5, whose experts are parameters"
    monkeypatch.delattr(experts_traffic.functional, "grouped_mm")
    assert experts_traffic.missing() == f"torch {torch.__version__} has no grouped_mm to count"
    assert not [*experts_traffic.rows()]


def test_rows_have_every_kind_of_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_traffic, "SHAPES", (FEW,))
    monkeypatch.setattr(experts_traffic, "TOKENS", (16,))
    rows = [*experts_traffic.rows()]
    names = [title(FEW), title(FEW, is_checkpointed=True)]
    assert [(row.what, row.mode) for row in rows] == [
        (name, mode) for name in names for mode in ("forward", "backward")
    ]
    for again in (False, True):
        steps = count_experts("ours, NF4", FEW, 16, is_checkpointed=again)
        for row, step in zip(rows[2 * again :], steps, strict=False):
            assert tuple(row.moved) == KINDS and not row.misses
            found = (row.moved, row.kernels, row.peak_bytes, row.flops)
            want = [step.bytes, step.kernels, step.peak, step.flops]
            assert [each["ours, NF4"] for each in found] == want


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=title)
def test_experts_at_full_size_lose_no_row(
    shape: experts_traffic.Shape, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_traffic, "SHAPES", (shape,))
    monkeypatch.setattr(experts_traffic, "TOKENS", (tokens,))
    monkeypatch.setattr(experts_traffic, "KINDS", KINDS[1:])
    for row in experts_traffic.rows():
        assert not row.misses, str(row)
        # A step that PEFT takes moves more bytes too, and so does one of Unsloth's order.
        assert row.moved["ours"] < min(row.moved["peft"], row.moved["unsloth"])


def test_has_failed_is_true_of_a_lost_row_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_traffic, "SHAPES", (FEW,))
    monkeypatch.setattr(experts_traffic, "TOKENS", (16,))
    rows = [*experts_traffic.rows()]
    assert not Count().has_failed(rows)
    *_, said = Count().summary([*rows, *LAYER])
    assert said == "experts: 4 rows, ours loses 0 to a peer of no more FLOPs (0 in bytes)"
    assert Count().has_failed([*rows, replace(rows[0], misses={"ours": "bytes"})])


M, H, I2, I1, E, R = 8192 * 8, 2048, 1536, 768, 128, 16
UP, DOWN = H * I2, I1 * H


def flops(base: int, low_rank: int, more: int = 0) -> int:
    """A step's FLOPs.

    Args:
        base: GEMMs of M rows by the weight.
        low_rank: the same by A, or by B.
        more: all else.
    """
    return 2 * M * (base * (UP + DOWN) + low_rank * R * (H + I2 + I1 + H) // 2) + more


def test_flops_of_each_order_are_those_derived() -> None:
    """The low-rank way has a pair of GEMMs for P and the update, for dB and dA, and for dS and dx.

    PEFT folds each weight twice, once when it registers the parametrization, and has a gradient of
    W in place of the three. Its dA and dB are GEMMs of the weights' size. axolotl's forward and dx
    compute their first factor again in each tile, and the backward once more for dA and dB. Its
    weighted sum of a token's rows is a GEMM too.
    """
    fold = 2 * R * E * (UP + DOWN)
    tiles = 2 * M * R * (H * I2 + I1 * H + H * I2 + I1 * H) // TILE
    want = {
        "ours": flops(2, 6),
        "unsloth": flops(2, 6),
        "peft": flops(3, 0, 4 * fold),
        "axolotl": flops(2, 6, tiles + 3 * 2 * M * H),
    }
    for kind, each in want.items():
        assert both(*count_experts(kind, QWEN3, 8192)).flops == each, kind
    few = 2 * R * 8 * (UP + DOWN)
    assert both(*count_experts("ours", FEW, 8192)).flops == flops(2, 4, 2 * few)


def test_folding_changes_bytes_by_what_its_reason_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fold_rows` derives 4·M·(N + K) and 8·E·N·K elements of 2 bytes, and of the codes 4·E·N·K."""
    from lora_kernels.backends.eager import experts as eager_experts

    low_rank, folded = {}, {}
    for found, least in ((low_rank, 1 << 40), (folded, 1)):
        monkeypatch.setattr(eager_experts, "fold_rows", lambda *_, least=least: least)
        for kind in ("ours", "ours, NF4"):
            found[kind] = both(*count_experts(kind, FEW, 8192)).bytes
    update = 2 * 4 * M * (H + I2 + I1 + H)
    fold = 2 * 4 * 8 * (UP + DOWN)
    for kind, of_weights in (("ours", 2 * fold), ("ours, NF4", fold)):
        saved = low_rank[kind] - folded[kind]
        assert saved == pytest.approx(update - of_weights, rel=0.02)


def test_judge_compares_with_peers_of_no_more_flops() -> None:
    Traffic = experts_traffic.Traffic
    ours = {"ours": Traffic(500, 511, 9, 0, 70), "ours, NF4": Traffic(0, 0, 0, 0, 0)}
    assert judge({**ours, "peft": Traffic(900, 101, 9, 0, 70)}, "forward") == []
    assert judge({**ours, "peft": Traffic(900, 100, 9, 0, 70)}, "forward") == ["bytes"]
    assert judge({**ours, "peft": Traffic(1, 1, 9, 0, 71)}, "forward") == []
