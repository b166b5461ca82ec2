"""`explain`'s table, its reasons, and `assert_fused`."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels
from lora_kernels.backends.cpu import linear as cpu
from lora_kernels.backends.cpu import native
from lora_kernels.choice import choose as selection
from lora_kernels.core.problem import MANY_ROWS, Choice, Problem
from lora_kernels.layers import LoRALinear
from lora_kernels.peft import Explanation, Row, explain, explain_rows, fuse
from tests.support.models import general_way
from tests.support.peft_models import (
    SIZES,
    SIZES_4BIT,
    activate,
    adalora_mlp,
    batch,
    count_ops,
    dora_mlp,
    embedding_model,
    four_bit_mlp,
    llama,
    mlp,
    two_adapters,
)

needs_native = pytest.mark.skipif(native.module is None, reason="no native kernels")


def test_table_has_columns_and_a_summary() -> None:
    table = Explanation([Row("a.up", "own", "cpu", "s", "why"), Row("b", "x", "y", "z", "w w")])
    assert str(table) == repr(table)
    assert str(table).splitlines() == [
        "layer  state  backend  strategy  reason",
        "a.up   own    cpu      s         why",
        "b      x      y        z         w w",
        "2 LoRA layers: 1 own; 1 x",
    ]


def deep() -> Any:
    """30 layers of 7 projections, as SmolLM2-135M has them."""
    base = llama(torch.float32, num_hidden_layers=30)
    return get_peft_model(base, LoraConfig(r=3, target_modules="all-linear"))


def test_explain_of_210_layers_prints_a_line_for_each_kind() -> None:
    explanation = explain(fuse(deep()))
    header, *lines, summary = str(explanation).splitlines()
    assert len(explanation.rows) == 210 and len(lines) == 7
    for line, name in zip(lines, ("q_proj", "k_proj", "v_proj", "o_proj"), strict=False):
        assert line.startswith(f"30 × base_model.model.model.layers.*.self_attn.{name}  ")
    assert header.split() == [*Row._fields] and summary.startswith("210 LoRA layers: ")


def test_explain_all_prints_every_layer() -> None:
    explanation = explain(deep(), all=True)
    lines = str(explanation).splitlines()
    names = [row.layer for row in explanation.rows]
    assert [line.split(" ")[0] for line in lines[1:-1]] == names and len(names) == 210


def test_explain_groups_only_what_is_alike() -> None:
    """One layer for another reason has a line of its own, and its own name."""
    rows = [Row(f"h.{i}.up1", "ours, kernels", "cpu", "s", "why") for i in range(12)]
    rows[10] = rows[10]._replace(state="PEFT's", backend="peft", reason="a hook")
    for i, e in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)):
        rows.append(Row(f"h.{i}.experts.{e}", "ours, kernels", "cpu", "s", ""))
    want = [
        "layer              state          backend  strategy  reason",
        "11 × h.*.up1       ours, kernels  cpu      s         why",
        "h.10.up1           PEFT's         peft     s         a hook",
        "6 × h.*.experts.*  ours, kernels  cpu      s",
    ]
    assert str(Explanation(rows)).splitlines()[:-1] == want
    with pytest.raises(RuntimeError) as error:
        Explanation([*rows[:11], rows[10]._replace(layer="h.11.up1")]).assert_fused()
    assert str(error.value).splitlines()[1:] == ["  2 × h.*.up1: PEFT's (peft): a hook"]


def test_summary_says_shares_of_the_parameters() -> None:
    rows = [Row(name, state, "", "", "") for name, state in zip("abc", "xxy", strict=True)]
    sizes = {"a": 1, "b": 4, "c": 11}
    summary = str(Explanation(rows, sizes)).splitlines()[-1]
    assert summary == "3 LoRA layers: 2 x (31.2%); 1 y (68.8%) of the LoRA parameters"
    assert str(Explanation(rows[:2], sizes)).splitlines()[-1] == "2 LoRA layers: 2 x"
    R, (K, hidden, N) = 5, SIZES
    want = {"up": R * (K + hidden), "down": R * (hidden + N)}
    got = explain(fuse(mlp(torch.float32))).parameters
    assert got == {f"base_model.model.{name}": n for name, n in want.items()}


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("state", ["ours, library GEMMs", "adapter only", "PEFT's", "PyTorch's"])
def test_assert_fused_with_a_layer_in_another_state_raises(state: str, kernels: bool) -> None:
    """Our order of PyTorch's GEMMs is enough, unless kernels are wanted."""
    rows = [Row(n, s, "cpu", "", "why") for n, s in (("a", "ours, kernels"), ("b", state))]
    if state == "ours, library GEMMs" and not kernels:
        Explanation(rows).assert_fused()
        return
    with pytest.raises(RuntimeError, match=rf"b: {state} \(cpu\): why"):
        Explanation(rows).assert_fused(kernels=kernels)


def test_summary_counts_the_streamed_layers() -> None:
    linears = [Row(n, s, "", "", "") for n, s in (("a", "ours, kernels"), ("b", "PyTorch's"))]
    summary = str(Explanation([], linears=linears)).splitlines()[-1]
    assert summary.endswith("our GEMV serves 1 of 2 linears without an adapter")


def test_unfused_model_fails_assert_fused() -> None:
    explanation = explain(mlp(torch.float32))
    assert [row.reason for row in explanation.rows] == ["not fused: call fuse()"] * 2
    with pytest.raises(RuntimeError) as error:
        explanation.assert_fused()
    assert str(error.value) == (
        "want all ours, got 2 LoRA layers: 2 PEFT's\n"
        "  base_model.model.up: PEFT's (peft): not fused: call fuse()\n"
        "  base_model.model.down: PEFT's (peft): not fused: call fuse()"
    )


def test_explain_of_the_eager_backend_says_library_gemms() -> None:
    model = fuse(mlp(torch.float32))
    with lora_kernels.backend("eager"):
        explanation = explain(model)
    assert {(row.state, row.backend) for row in explanation.rows} == {
        ("ours, library GEMMs", "eager")
    }
    explanation.assert_fused()
    with pytest.raises(RuntimeError, match="eager backend was requested"):
        explanation.assert_fused(kernels=True)


@needs_native
def test_reasons_are_those_of_the_choice_of_backend() -> None:
    """Rank, dtype of x, and autocast, which makes y another dtype."""
    assert "rank 300" in explain(fuse(mlp(torch.float32, r=300))).rows[0].reason
    model = fuse(mlp(torch.float32))
    assert explain(model, x_dtype=torch.bfloat16).rows[0].state == "ours, kernels"
    assert "float64" in explain(fuse(mlp(torch.float64))).rows[0].reason
    with torch.autocast("cpu", dtype=torch.bfloat16):
        explain(model).assert_fused(kernels=True)


@needs_native
@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_explain_of_rows_asks_for_the_choice_that_the_op_asks_for(autocast, rows, asked) -> None:
    """Rows included."""
    model = fuse(mlp(torch.float32))
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        explain(model, rows=rows)
        by_explain = {*asked}
        asked.clear()
        up, down = model.base_model.model.up, model.base_model.model.down
        with general_way():  # a direct call chooses by the same rules in C++
            up(batch(torch.float32).view(-1, SIZES[0])[:rows]), down(torch.ones(rows, SIZES[1]))
    assert len(asked) == 2 and {*asked} == by_explain


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [["default"], ["default", "second"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [mlp, adalora_mlp])
def test_explain_asks_for_the_choice_that_the_op_asks_for(
    build, dtype, adapters, autocast, asked
) -> None:
    model = activate(fuse(two_adapters(build(dtype))), *adapters)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        explain(model, x_dtype=dtype)
        by_explain = [*asked]
        asked.clear()
        up, down = model.base_model.model.up, model.base_model.model.down
        with general_way():
            up(batch(dtype)), down(torch.ones(2, SIZES[1], dtype=dtype))
    # explain, which does not know the number of rows, asks for many.
    by_op = [problem._replace(rows=0) for problem in asked]
    of_any_rows = dict.fromkeys(problem._replace(rows=0) for problem in by_explain)
    assert len(by_op) == 2 and list(of_any_rows) == by_op


PROBLEM = Problem("cpu", *4 * (torch.float32,), 8, columns=64, inner=48)


def choices(monkeypatch: pytest.MonkeyPatch, *starts: tuple[int, str]) -> None:
    """`selection` answers each name from its number of rows on, by backend "cpu" or "BACKEND S"."""

    def choose(problem: Problem) -> Choice:
        rows = problem.rows
        name = next(name for at, name in reversed(starts) if rows >= at)
        if name == "raises":
            raise RuntimeError("it cannot")
        backend, _, strategy = name.rpartition(" ")
        return Choice(backend or "cpu", strategy, f"{rows} rows")

    monkeypatch.setattr(selection, "choose", choose)


def test_choose_by_rows_starts_at_the_very_row(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = ((1, "a"), (2, "b"), (129, "c"), (1003, "a"), (70_000, "d"))
    choices(monkeypatch, *starts)
    found = explain_rows.choose_by_rows(PROBLEM)
    assert tuple((at, choice and choice.strategy) for at, choice in found) == starts


@pytest.mark.parametrize(
    ("starts", "backend", "want"),
    [
        (((1, "a"),), "cpu", "a"),
        (
            ((1, "a"), (2, "b"), (33, "c"), (34, "b")),
            "cpu",
            "a at 1 row, b 2 to 32 rows, c at 33 rows, b from 34 rows on",
        ),
        (((1, "cuda s"), (9, "triton t")), "triton", "cuda s up to 8 rows, t from 9 rows on"),
        (((1, "a"), (17, "raises")), "cpu", "a"),
        (((1, "raises"), (17, "a")), "cpu", "a"),
    ],
    ids=str,
)
def test_explain_without_rows_says_the_strategies_of_all(
    starts: Any, backend: str, want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices(monkeypatch, *starts)
    row = explain(fuse(mlp(torch.float32))).rows[0]
    assert (row.backend, row.strategy) == (backend, want)
    many = 1 if starts[-1][1] == "raises" else MANY_ROWS
    assert row.reason == f"{many} rows"


def test_explain_without_rows_whose_strategies_all_raise_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choices(monkeypatch, (1, "raises"))
    with pytest.raises(RuntimeError, match="it cannot"):
        explain(fuse(mlp(torch.float32)))


def test_explain_of_rows_says_their_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    choices(monkeypatch, (1, "few"), (64, "many"))
    for model in (fuse(mlp(torch.float32)), nn.Sequential(LoRALinear(48, 64, r=4))):
        for rows, strategy in (63, "few"), (64, "many"):
            row = explain(model, rows=rows).rows[0]
            assert (row.strategy, row.reason) == (strategy, f"{rows} rows")


@needs_native
def test_explain_of_a_forced_strategy_of_few_rows_alone_says_it() -> None:
    model = fuse(mlp(torch.float32))
    with lora_kernels.backend("cpu", cpu.GEMV):
        assert explain(model).rows[0].strategy == cpu.GEMV
        with pytest.raises(RuntimeError, match="rows"):
            explain(model, rows=512)


@pytest.mark.parametrize("rows", [0, -1, True, 2.0, "2"])
def test_explain_of_bad_rows_raises(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"rows: got .*, want a whole number of at least 1"):
        explain(mlp(torch.float32), rows=rows)


def test_json_holds_the_table() -> None:
    found = explain(fuse(mlp(torch.float32)), rows=100)
    (up, down), (row, _) = json.loads(found.json())["layers"], found.rows
    assert up == {**row._asdict(), "parameters": found.parameters[row.layer]}
    assert down["layer"] == "base_model.model.down"


def test_rows_that_name_their_adapters_are_explained_by_the_last_call() -> None:
    model = two_adapters(fuse(mlp(torch.float32))).eval()
    model.base_model.model.up(torch.ones(2, SIZES[0]), adapter_names=["default", "second"])
    row = explain(model, rows=2).rows[0]
    assert "rows name their adapters, as in the last call: 2 in one" in row.reason


def test_dense_layers_have_rows() -> None:
    model = nn.ModuleDict({"a": LoRALinear(8, 8), "b": LoRALinear(8, 8), "c": LoRALinear(8, 8)})
    model["b"].merge()
    model["c"].enabled = False
    a, b, c = explain(model).rows
    kernels = ("ours, kernels", "cpu") if native.module else ("ours, library GEMMs", "eager")
    assert (a.state, a.backend) == kernels
    assert a.reason and a.strategy
    assert b == Row("b", "PyTorch's", "torch", "F.linear", "the adapter is merged")
    assert c == Row("c", "PyTorch's", "torch", "F.linear", "the adapter is disabled")


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
def test_4bit_layers_that_fsdp2_shards_are_fused(storage: torch.dtype) -> None:
    """The codes have any dtype of storage, and explain keeps no copy of them."""
    pytest.importorskip("bitsandbytes")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        model = fuse(four_bit_mlp(quant_storage=storage, compute_dtype=torch.float32))
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        before = explain(sharded).rows
        for layer in (model.base_model.model.up, model.base_model.model.down):
            assert "_lora_kernels" not in vars(layer.base_layer.quant_state)
        with torch.no_grad():
            sharded(torch.randn(3, SIZES_4BIT[0]))
        for row, now in zip(before, explain(sharded).rows, strict=True):
            assert row.state == now.state != "adapter only", row.reason
    finally:
        torch.distributed.destroy_process_group()


def partition(model: nn.Module) -> None:
    """Do as DeepSpeed's ZeRO-3: parameters are empty, except in the call of their module."""

    def gather(module: nn.Module, _: Any) -> None:
        for p in module._parameters.values():
            if p is not None:
                p.data = p.ds_tensor  # type: ignore[attr-defined]

    def release(module: nn.Module, *_: Any) -> None:
        for p in module._parameters.values():
            if p is not None:
                p.data = torch.empty(0, dtype=p.dtype)

    for i, p in enumerate(model.parameters()):
        p.ds_id, p.ds_tensor = i, p.data  # type: ignore[attr-defined]
    for module in model.modules():
        if any(p is not None for p in module._parameters.values()):
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
            release(module)


def test_explain_under_zero3_says_peft_s_and_why() -> None:
    """The loss and the layers without an adapter are PyTorch's."""
    targets = ["q_proj", "v_proj", "up_proj", "lm_head"]
    stock = get_peft_model(llama(torch.float32), LoraConfig(r=3, target_modules=targets))
    fused = fuse(copy.deepcopy(stock), linears=True, loss=True)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        want = stock(input_ids=ids).logits
    partition(fused)
    explanation = explain(fused)
    zero3 = "'default': DeepSpeed's ZeRO-3 gathers its nn.Linear by hooks: call fuse again"
    assert {(row.state, row.reason) for row in explanation.rows} == {("PEFT's", f"adapter {zero3}")}
    assert {row.state for row in [*explanation.linears, *explanation.losses]} == {"PyTorch's"}
    with torch.no_grad():
        got = []
        ops = count_ops(lambda: got.append(fused(input_ids=ids).logits))
    assert not {name for name in ops if name.startswith("lora_")}
    assert torch.equal(got[0], want)
    explain(fused, rows=4)


@pytest.mark.parametrize("build", [mlp, adalora_mlp, dora_mlp, embedding_model])
def test_explain_of_partitioned_layers_says_peft_s(build: Any) -> None:
    model = fuse(build(torch.float32))
    partition(model)
    for row in explain(model).rows:
        assert row.state == "PEFT's", row


def test_explain_over_a_float8_base_takes_x_dtype_from_the_adapter() -> None:
    model = fuse(mlp(torch.float32))
    base = model.base_model.model.up.base_layer
    base.weight = nn.Parameter(base.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    base.register_forward_pre_hook(lambda *_: None)  # of a module that decodes it
    row, _ = explain(model).rows
    assert row.state == "adapter only" and "float8" not in row.reason
