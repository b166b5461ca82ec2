"""`bench --merge` in small sizes."""

from __future__ import annotations

from typing import Any

import pytest

from lora_kernels.bench import merges
from lora_kernels.bench.command import has_failed
from lora_kernels.bench.results import Row

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


def test_merge_suite_has_ours_beside_peft_s_with_memory_and_time(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merges, "SIZE", 128)
    monkeypatch.setattr(merges, "LAYERS", 2)
    ran = run("--merge", "--seconds", "0.01")
    assert [(row["what"], row["dtype"]) for row in ran.rows] == [
        ("merge linear", "float32"),
        ("merge linear", "bfloat16"),
        ("merge DoRA", "bfloat16"),
        ("merge linear", "bfloat16"),
        ("merge experts", "bfloat16"),
    ]
    calls = {"peft", "ours, device", "ours, host", "ours, stream"}
    for row in ran.rows:
        assert row["seconds"].keys() == row["peak_bytes"].keys() == calls
        assert row["misses"].keys() == {"peft"}  # whose base drifts
        layers = 2 * 128 * (128 if row["what"] != "merge experts" else 8 * 64)
        size = 0.5 if row.get("quant_type") else 4 if row["dtype"] == "float32" else 2
        # Of 4 bits also a byte a block of 64, and the 4 bytes of each 256 of these.
        scales = layers // 64 + 2 * 4 * -(-layers // 2 // 64 // 256) if size == 0.5 else 0
        want = {"ours, device": layers * size + scales, "ours, host": layers * size + scales}
        assert row["bytes"] == want | {"peft": 0, "ours, stream": 0}
    assert ran.status == 0 and "0 of 5 rows in which a merge of ours changed its base" in ran.out


def test_merge_suite_fails_if_ours_changes_the_base() -> None:
    row = Row(what="merge linear", misses={"peft": "1%"})
    assert not has_failed([row])
    row.misses["ours, host"] = "1%"
    assert has_failed([row]) and row.kind == "merge" and row.baseline == "peft"


def test_merge_suite_takes_another_length_for_a_change() -> None:
    (a, b) = (merges.stored(merges.build(base, "cpu")) for base in merges.BASES[:2])
    assert merges.differing(a[0], a[0]) == 0 and merges.differing(a[0], b[0]) == a[0].numel()


def test_merge_suite_times_calls_of_models_that_are_not_merged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing would be left for a call to merge."""
    monkeypatch.setattr(merges, "SIZE", 128)
    monkeypatch.setattr(merges, "LAYERS", 2)
    merged: list[int] = []

    def interleave(calls: Any, **_: Any) -> dict[str, float]:
        for call in calls.values():
            (model,) = call.args
            merged.append(sum(getattr(each, "merged", False) for each in model.modules()))
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(merges.timing, "interleave", interleave)
    merges.row_of(merges.BASES[0], "cpu", 0.01)
    assert merged == [0] * 4
