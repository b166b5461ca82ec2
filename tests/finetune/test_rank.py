"""The rank search: one data and seed for each rank, and a base model that is left as it was."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels.finetune import Preset, TrainingError, UsageError
from lora_kernels.finetune.chat import ChatData, Collator, load_chat
from lora_kernels.finetune.rank import (
    CAVEAT,
    RankRow,
    RankSearch,
    add_adalora,
    find_optimal_rank,
    plot_ranks,
)
from lora_kernels.finetune.trainer import check_trainable
from tests.finetune.tiny import gpt2, llama, metrics, squares, tokenizer, write_lines
from tests.support.assertions import assert_bitwise_equal

SETTINGS: dict[str, Any] = {"ranks": (5, 2, 3), "steps": 12}
SETTINGS |= {"per_device_train_batch_size": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatData, ChatData]:
    file = tmp_path_factory.mktemp("rank") / "chat.jsonl"
    write_lines(file, squares(16))
    return load_chat(file, tokenizer()).split(0.25)


@pytest.fixture(scope="session")
def searched(
    data: tuple[ChatData, ChatData], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any, RankSearch, Path]:
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    before, out = copy.deepcopy(model), tmp_path_factory.mktemp("out")
    return model, before, find_optimal_rank(model, *data, **SETTINGS, out=out), out


def test_the_base_model_is_left_as_it_was(searched: Any) -> None:
    model, before, _, _ = searched
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert model.config.use_cache == before.config.use_cache
    assert model.training == before.training
    assert not hasattr(model, "peft_config")
    for of in (type(model).named_parameters, type(model).named_buffers):
        assert_bitwise_equal(dict(of(model)), dict(of(before)))
    for p, was in zip(model.parameters(), before.parameters(), strict=True):
        assert p.requires_grad == was.requires_grad and p.grad is None


def test_rows(searched: Any) -> None:
    """Scores and efficiencies are computed again in acceptance/test_rank_search.py."""
    _, _, found, _ = searched
    assert [row.rank for row in found.rows] == [5, 2, 3]
    for row in found.rows:
        # q, o: 64 + 64; k, v: 64 + 32; two layers.
        assert row.parameters == 2 * row.rank * (2 * 128 + 2 * 96)
        assert row.seconds > 0
        assert row.score > found.base  # trained on the same kind of thing


def test_the_base_score_is_the_models_own(searched: Any, data: tuple[ChatData, ChatData]) -> None:
    model, _, found, _ = searched
    total, count = 0.0, 0
    with torch.no_grad():
        for row in data[1]:
            batch = Collator(0)([row])
            learnt = int((batch["labels"] != -100).sum())
            total += model.eval()(**batch).loss.item() * learnt
            count += learnt
    model.train()
    assert found.base == pytest.approx(math.exp(-total / count), rel=2.0**-15)


def test_each_rank_sees_the_same_batches_and_start(searched: Any) -> None:
    """The first loss is that of B = 0, whatever the rank: one for all, so the batch was one."""
    *_, out = searched
    first = {metrics(out / f"rank-{r}")[0]["loss"] for r in (2, 3, 5)}
    assert max(first) - min(first) <= 2.0**-18 * max(first)
    assert {path.name for path in out.iterdir()} >= {"rank-2", "rank-3", "rank-5", "adalora"}


def test_every_rank_has_the_presets_scale(data: tuple[ChatData, ChatData]) -> None:
    scales = []

    def score(model: Any, loss: float) -> float:
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        scales.append(layer.scaling["default"])
        return 1.0

    settings = SETTINGS | {"ranks": (2, 3), "steps": 1}
    find_optimal_rank(llama(), *data, **settings, adalora=False, score=score)
    assert scales == [2.0, 2.0, 2.0]  # chat: alpha 32 at rank 16


def test_adalora_stands_beside_it(searched: Any) -> None:
    _, _, found, _ = searched
    assert len(found.allocation) == 8
    assert sum(found.allocation.values()) == 3 * 8  # the middle rank is their mean
    assert max(found.allocation.values()) <= 5  # 1.5 × 3, rounded up
    sizes = {"q_proj": 129, "k_proj": 97, "v_proj": 97, "o_proj": 129}
    want = sum(r * sizes[name.rpartition(".")[2]] for name, r in found.allocation.items())
    assert found.adalora.parameters == want
    # Its loss holds no penalty: near the ranks' own losses, whose range is smaller.
    assert found.adalora.loss < -math.log(found.base) + 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adaloras_triplets_train_and_nothing_else(dtype: torch.dtype) -> None:
    model = add_adalora(llama().to(dtype), Preset(3, 6.0, ("q", "v"), 0.0), steps=20)
    kinds = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert kinds == {"lora_A", "lora_B", "lora_E"}
    assert "in 4 adapted layers" in check_trainable(model)


def test_the_same_again(data: tuple[ChatData, ChatData]) -> None:
    found = [
        find_optimal_rank(llama(), *data, **SETTINGS | {"ranks": (3,)}, adalora=False)
        for _ in range(2)
    ]
    assert found[0].rows[0].loss == found[1].rows[0].loss
    other = find_optimal_rank(llama(), *data, **SETTINGS | {"ranks": (3,)}, adalora=False, seed=1)
    assert other.rows[0].loss != found[0].rows[0].loss


def test_gpt2_and_a_score_of_ones_own(data: tuple[ChatData, ChatData]) -> None:
    seen = []

    def score(model: Any, loss: float) -> float:
        seen.append(model.peft_config["default"].peft_type.value)
        return -loss

    found = find_optimal_rank(
        gpt2(), *data, **SETTINGS | {"ranks": (2,)}, preset="legal", score=score
    )
    assert found.rows[0].score == -found.rows[0].loss
    assert seen == ["LORA", "LORA", "ADALORA"]
    assert set(found.allocation) == {f"transformer.h.{i}.attn.c_attn" for i in range(2)}


def test_a_rank_that_diverges_is_an_error(data: tuple[ChatData, ChatData]) -> None:
    settings = SETTINGS | {"ranks": (2,), "learning_rate": 1e18, "max_grad_norm": 0.0}
    with pytest.raises(TrainingError, match=r"rank-2, step \d+: the loss is nan; .*lower learning"):
        find_optimal_rank(llama(), *data, **settings)


def test_table_and_curve(tmp_path: Path) -> None:
    rows = [RankRow(4, 0.5, 0.69, 1000, 1.0), RankRow(8, 0.6, 0.51, 2000, 1.5)]
    rows.append(RankRow(16, 0.6, 0.51, 4000, 2.0))
    found = RankSearch(rows, 0.25, RankRow(8, 0.61, 0.49, 1900, 2.5), {"a.q": 6, "b.q": 10})
    text = str(found)
    lines = text.splitlines()
    assert lines[1].endswith("most efficient")
    assert lines[2].endswith("best score")  # of equals the smallest
    assert "8 (AdaLoRA)" in lines[4]
    assert "without an adapter: 0.25" in text
    assert "6.144e-06" in str(RankSearch([RankRow(2, 6.14421e-6, 12.0, 900, 1.0)], 1e-6))
    assert "AdaLoRA left q 8.0 (6 to 10)" in text
    assert CAVEAT in text
    assert "favours small ranks" in text
    plot_ranks(tmp_path / "ranks.png", found, "a title")
    assert (tmp_path / "ranks.png").stat().st_size > 10_000
    saved = json.loads(json.dumps(found.as_dict()))
    assert (saved["best"], saved["most_efficient"]) == (8, 4)
    assert saved["rows"][0]["efficiency"] == 500.0
    assert RankSearch(rows[::-1], 0.25).best.rank == 8  # in whatever order they were trained


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ranks": ()}, r"ranks: got \(\), want different ones"),
        ({"ranks": (0, 4)}, r"ranks: got \(0, 4\)"),
        ({"train": []}, "train: got no row, want at least one"),
        ({"val": []}, "val: got no row, want at least one"),
        ({"steps": 9}, "steps: got 9, want at least 10"),
        ({"stpes": 12, "adalora": False}, "stpes: no such setting; did you mean"),
        ({"preset": "chta"}, "did you mean 'chat'"),
        ({"targets": ["gate"]}, "its linear layers are c_attn"),
    ],
)
def test_bad_settings(data: tuple[ChatData, ChatData], settings: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        find_optimal_rank(
            gpt2(), **dict(zip(("train", "val"), data, strict=True)) | SETTINGS | settings
        )
