"""The counts of experts by `bench --count`: what is derived, and that no row is lost."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch

from lora_kernels.bench import expert_peers, traffic
from lora_kernels.bench.command import has_failed
from lora_kernels.bench.counter import Traffic, count_layer
from lora_kernels.bench.expert_peers import TILE
from lora_kernels.bench.experts import Shape
from lora_kernels.bench.results import Row
from lora_kernels.bench.table import count_calls, exceeded_measures
from lora_kernels.bench.traffic import EXPERTS, TOKENS, expert_limits

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

LAYER = [Row(dtype="bf16", M=1, K=1, N=1, R=1, mode="step", moved={"ours": 1, "peft": 2})]
QWEN3, SMALL = EXPERTS[1], EXPERTS[5]


def count(
    name: str, shape: Shape, tokens: int, is_checkpointed: bool = False
) -> tuple[Traffic, Traffic]:
    """Forward and backward of a step."""
    call = traffic.expert_call(name, shape, tokens, is_checkpointed)
    return count_layer(call.forwards[0], call.leaves)


def count_step(name: str, shape: Shape, tokens: int) -> Traffic:
    forward, backward = count(name, shape, tokens)
    return forward.then(backward)


def expert_rows(shape: Shape, tokens: int) -> list[Row]:
    return [row for entry in traffic.expert_entries(shape, tokens) for row in count_calls(entry)]


def test_unavailable_reason_says_why_no_experts_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert expert_peers.unavailable_reason() is None
    monkeypatch.setattr(expert_peers, "qwen3_moe", lambda: None)
    assert expert_peers.unavailable_reason() == "want transformers 5, whose experts are parameters"
    monkeypatch.delattr(expert_peers.functional, "grouped_mm")
    want = f"torch {torch.__version__} has no grouped_mm to count"
    assert expert_peers.unavailable_reason() == want
    for name in ("CELLS", "E2M1_TYPES", "FORMS", "BLOCKS"):
        monkeypatch.setattr(traffic, name, ())
    entries = traffic.entries(argparse.Namespace(ranks=[16]))
    assert {entry.key.what for entry in entries} == {"head and loss"}


def test_expert_rows_have_every_call_of_each_size() -> None:
    rows = expert_rows(SMALL, 16)
    titles = ["qwen3_moe, 8 experts 2048→768, top 8"]
    titles.append(f"{titles[0]}, checkpointed")
    assert [(row.what, row.mode) for row in rows] == [
        (title, mode) for title in titles for mode in ("forward", "backward")
    ]
    for is_checkpointed in (False, True):
        steps = count("ours, NF4", SMALL, 16, is_checkpointed)
        for row, step in zip(rows[2 * is_checkpointed :], steps, strict=False):
            assert [*row.moved] == [*expert_peers.CALLS] and not row.misses
            counted = (row.moved, row.kernels, row.peak_bytes, row.flops)
            want = [step.bytes, step.kernels, step.peak, step.flops]
            assert [counts["ours, NF4"] for counts in counted] == want


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", EXPERTS, ids=str)
def test_experts_at_full_size_lose_no_row(
    shape: Shape, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(expert_peers.CALLS, "ours, NF4")
    for row in expert_rows(shape, tokens):
        assert not row.misses, str(row)
        # A step that PEFT takes moves more bytes too, and so does one of Unsloth's sequence.
        assert row.moved["ours"] < min(row.moved["peft"], row.moved["unsloth"])


def test_has_failed_is_true_of_a_lost_row_of_experts() -> None:
    rows = expert_rows(SMALL, 16)
    assert not has_failed(rows)
    *_, text = traffic.summary([*rows, *LAYER])
    assert text == "experts: 4 rows, ours loses 0 to a peer of no more FLOPs (0 in bytes)"
    assert has_failed([*rows, replace(rows[0], misses={"ours": "bytes"})])


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
        assert count_step(kind, QWEN3, 8192).flops == each, kind
    few = 2 * R * 8 * (UP + DOWN)
    assert count_step("ours", SMALL, 8192).flops == flops(2, 4, 2 * few)


def test_folding_changes_bytes_by_what_its_reason_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fold_rows` derives 4·M·(N + K) and 8·E·N·K elements of 2 bytes, and of the codes 4·E·N·K."""
    from lora_kernels.backends.eager import experts as eager_experts

    low_rank, folded = {}, {}
    for found, least in ((low_rank, 1 << 40), (folded, 1)):
        monkeypatch.setattr(eager_experts, "fold_rows", lambda *_, least=least: least)
        for kind in ("ours", "ours, NF4"):
            found[kind] = count_step(kind, SMALL, 8192).bytes
    update = 2 * 4 * M * (H + I2 + I1 + H)
    fold = 2 * 4 * 8 * (UP + DOWN)
    for kind, of_weights in (("ours", 2 * fold), ("ours, NF4", fold)):
        saved = low_rank[kind] - folded[kind]
        assert saved == pytest.approx(update - of_weights, rel=0.02)


def test_expert_limits_are_of_peers_of_no_more_flops() -> None:
    ours = {"ours": Traffic(500, 511, 9, 0, 70), "ours, NF4": Traffic(0, 0, 0, 0, 0)}
    for peft, want in (
        (Traffic(900, 101, 9, 0, 70), []),
        (Traffic(900, 100, 9, 0, 70), ["bytes"]),
        (Traffic(1, 1, 9, 0, 71), []),
    ):
        limits = expert_limits({**ours, "peft": peft}, "forward")
        assert exceeded_measures(ours["ours"], limits) == want
