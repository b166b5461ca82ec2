"""`explain`'s table, its reasons, and `assert_fused`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels
from lora_kernels.backends.cpu import linear as cpu
from lora_kernels.backends.cpu import native
from lora_kernels.choice import choose as selection
from lora_kernels.core.problem import Choice, Problem
from lora_kernels.layers import LoRALinear
from lora_kernels.peft import Explanation, Row, explain, explain_rows, fuse
from lora_kernels.peft.explain_rows import ADAPTER, KERNELS, LIBRARY, PEFT, TORCH
from tests.support.models import general_way
from tests.support.peft_models import (
    SIZES,
    SIZES_4BIT,
    activate,
    adalora_mlp,
    add_adapter,
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
    rows = [Row(f"h.{i}.up1", KERNELS, "cpu", "s", "why") for i in range(12)]
    rows[10] = rows[10]._replace(state=PEFT, backend="peft", reason="a hook")
    for i, e in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)):
        rows.append(Row(f"h.{i}.experts.{e}", KERNELS, "cpu", "s", ""))
    want = [
        "layer              state        backend  strategy  reason",
        "11 × h.*.up1       our kernels  cpu      s         why",
        "h.10.up1           PEFT's       peft     s         a hook",
        "6 × h.*.experts.*  our kernels  cpu      s",
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
@pytest.mark.parametrize("state", [LIBRARY, ADAPTER, PEFT, TORCH])
def test_assert_fused_with_a_layer_in_another_state_raises(state: str, kernels: bool) -> None:
    """Our order of PyTorch's GEMMs is enough, unless kernels are wanted."""
    rows = [Row(n, s, "cpu", "", "why") for n, s in (("a", KERNELS), ("b", state))]
    if state == LIBRARY and not kernels:
        Explanation(rows).assert_fused()
        return
    with pytest.raises(RuntimeError, match=rf"b: {state} \(cpu\): why"):
        Explanation(rows).assert_fused(kernels=kernels)


@pytest.mark.parametrize("state", [KERNELS, LIBRARY, TORCH])
def test_assert_fused_of_a_loss_without_lora_layers_is_about_the_loss(state: str) -> None:
    """Of a model whose whole weights train."""
    explanation = Explanation([], losses=[Row("loss", state, "cpu", "", "why")])
    for kernels in (False, True):
        if state == TORCH or (state == LIBRARY and kernels):
            with pytest.raises(RuntimeError, match=rf"loss: {state} \(cpu\): why"):
                explanation.assert_fused(kernels)
        else:
            explanation.assert_fused(kernels)
    with pytest.raises(RuntimeError, match="nothing to fuse"):
        Explanation([]).assert_fused()


def test_summary_counts_the_streamed_layers() -> None:
    linears = [Row(n, s, "", "", "") for n, s in (("a", KERNELS), ("b", TORCH))]
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
    assert {(row.state, row.backend) for row in explanation.rows} == {(LIBRARY, "eager")}
    explanation.assert_fused()
    with pytest.raises(RuntimeError, match="eager backend was requested"):
        explanation.assert_fused(kernels=True)


@needs_native
def test_reasons_are_those_of_the_choice_of_backend() -> None:
    """Rank, dtype of x, and autocast, which makes y another dtype."""
    assert "rank 300" in explain(fuse(mlp(torch.float32, r=300))).rows[0].reason
    model = fuse(mlp(torch.float32))
    assert explain(model, x_dtype=torch.bfloat16).rows[0].state == KERNELS
    assert "float64" in explain(fuse(mlp(torch.float64))).rows[0].reason
    with torch.autocast("cpu", dtype=torch.bfloat16):
        explain(model).assert_fused(kernels=True)


BUILDS = {
    "mlp": mlp,
    "AdaLoRA": adalora_mlp,
    "DoRA": dora_mlp,
    "dropout": partial(mlp, lora_dropout=0.5),
    "DoRA, dropout": partial(dora_mlp, lora_dropout=0.5),
    "two adapters": lambda dtype: two_adapters(mlp(dtype)),
    "two of AdaLoRA": lambda dtype: two_adapters(adalora_mlp(dtype)),
    "adapter_names": lambda dtype: two_adapters(mlp(dtype)),
}


@needs_native
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BUILDS)
def test_explain_asks_for_the_choices_that_the_ops_ask_for(
    kind: str, dtype: torch.dtype, autocast: Any, asked: list[Problem]
) -> None:
    model = fuse(BUILDS[kind](dtype)).train("dropout" in kind)
    kwargs: dict[str, Any] = {}
    if kind == "adapter_names":
        kwargs = {"adapter_names": [*["default"] * 11, "second"]}
    elif "two" in kind:
        activate(model, "default", "second")
    layers = model.base_model.model.up, model.base_model.model.down
    xs = [torch.ones(12, K, dtype=dtype) for K in SIZES[:2]]

    def run() -> None:
        with general_way():  # a direct call chooses by the same rules in C++
            for layer, x in zip(layers, xs, strict=True):
                layer(x, **kwargs)

    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        run()
        by_ops = {*asked}
        asked.clear()
        explain(model, x_dtype=dtype, rows=12)
        assert {*asked} == by_ops
        asked.clear()
        explain(model, x_dtype=dtype)
    assert {*asked} == {each._replace(rows=M) for each in by_ops for M in explain_rows.ROWS}


def frozen(name: str) -> Any:
    model = mlp(torch.float32)
    for key, p in model.named_parameters():
        if name in key:
            p.requires_grad_(False)
    return model


def alora_beside_lora(dtype: torch.dtype) -> Any:
    model = mlp(dtype, alora_invocation_tokens=[1])
    add_adapter(model, alora_invocation_tokens=None)
    return model


def hooked_base(dtype: torch.dtype) -> Any:
    model = mlp(dtype)
    model.base_model.model.up.base_layer.register_forward_hook(lambda *_: None)
    return model


REQUESTED, FROZEN = "the eager backend was requested", "is frozen: the forward does not save"
OWN_MASKS = "each adapter with dropout draws a mask of its own"
DORA = "DoRA: the row norm without a second weight"
# Kind of a layer in training -> the model's builder; state, strategy and reason.
SENTENCES: dict[str, tuple[Callable[..., Any], str, str, str]] = {
    "plain": (mlp, LIBRARY, "library", REQUESTED),
    "base called": (
        hooked_base, ADAPTER, "base layer as a module, adapter added",
        f"base layer: a hook sits on its nn.Linear; {REQUESTED}",
    ),
    "stacked": (
        BUILDS["two adapters"], LIBRARY, "library",
        f"{REQUESTED}; adapters stacked along the rank",
    ),
    "two masks": (
        lambda dtype: two_adapters(mlp(dtype, lora_dropout=0.5)), LIBRARY, "library, 2 calls",
        f"{REQUESTED}; {OWN_MASKS}",
    ),
    "DoRA": (dora_mlp, LIBRARY, "library", f"{REQUESTED}; {DORA}"),
    "DoRA, dropout": (
        BUILDS["DoRA, dropout"], LIBRARY, "library, the base GEMM twice",
        f"{REQUESTED}; {DORA}; PEFT's DoRA drops x for the base GEMM too",
    ),
    "frozen A": (
        lambda _: frozen("lora_A"), LIBRARY, "library", f"{REQUESTED}; lora_A {FROZEN} x"
    ),
    "frozen B": (
        lambda _: frozen("lora_B"), LIBRARY, "library", f"{REQUESTED}; lora_B {FROZEN} x·Aᵀ"
    ),
    "aLoRA beside LoRA": (
        alora_beside_lora, LIBRARY, "library, 2 calls",
        f"{REQUESTED}; an aLoRA, which is active from its invocation tokens on",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SENTENCES)
def test_explain_says_how_a_layer_is_called(kind: str) -> None:
    build, *want = SENTENCES[kind]
    model = build(torch.float32)
    if len(model.peft_config) > 1:
        activate(model, *model.peft_config)
    with lora_kernels.backend("eager"):
        row = explain(fuse(model.train())).rows[0]
    assert [row.state, row.strategy, row.reason] == want


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_explain_says_that_a_factor_is_frozen_if_it_is_in_every_adapter(name: str) -> None:
    """The forward saves what the gradient of one adapter's factor reads."""
    model = activate(two_adapters(mlp(torch.float32)), "default", "second")
    fuse(model.train())
    for adapter in model.peft_config:
        assert FROZEN not in explain(model).rows[0].reason
        for key, p in model.named_parameters():
            if f"{name}.{adapter}." in key:
                p.requires_grad_(False)
    assert f"{name} {FROZEN}" in explain(model).rows[0].reason


@pytest.mark.parametrize(
    ("starts", "rows", "want"),
    [
        ({1: "cpu a"}, None, ("cpu", "a", "by a")),
        (
            {1: "cpu a", 2: "cpu b"},
            None,
            ("cpu", "1 row: a; 16 and 2048 rows: b", "1 row: by a; 16 and 2048 rows: by b"),
        ),
        (
            {1: "cuda a", 64: "eager b"},
            (64, 3, 64, 1),
            (
                "64 rows: eager; 3 and 1 rows: cuda",
                "64 rows: b; 3 and 1 rows: a",
                "64 rows: by b; 3 and 1 rows: by a",
            ),
        ),
        ({1: "cpu a", 64: "cpu b"}, 63, ("cpu", "a", "by a")),
        ({1: "cpu a", 64: "cpu b"}, [64], ("cpu", "b", "by b")),
    ],
    ids=str,
)
def test_explain_names_the_row_counts_that_differ(
    starts: dict[int, str], rows: Any, want: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(problem: Problem, requested: Any = None) -> Choice:
        backend, name = starts[max(M for M in starts if problem.rows >= M)].split()
        return Choice(backend, name, f"by {name}")  # type: ignore[arg-type]

    monkeypatch.setattr(selection, "choose", choose)
    for model in (fuse(mlp(torch.float32)), nn.Sequential(LoRALinear(48, 64, r=4))):
        row = explain(model, rows=rows).rows[0]
        assert row[2:] == want and row.state == (LIBRARY if "eager" in want[0] else KERNELS)


@needs_native
def test_explain_of_a_forced_strategy_of_few_rows_alone_says_it() -> None:
    model = fuse(mlp(torch.float32))
    with lora_kernels.backend("cpu", cpu.GEMV):
        assert explain(model, rows=(1, 2)).rows[0].strategy == cpu.GEMV
        with pytest.raises(RuntimeError, match="rows"):
            explain(model)


@pytest.mark.parametrize("rows", [0, -1, True, 2.0, "2", (), (1, 0), [[1]], "12"])
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
    kernels = (KERNELS, "cpu") if native.module else (LIBRARY, "eager")
    assert (a.state, a.backend) == kernels
    assert a.reason and a.strategy
    assert b == Row("b", TORCH, "torch", "F.linear", "the adapter is merged")
    assert c == Row("c", TORCH, "torch", "F.linear", "the adapter is disabled")


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
            assert row.state == now.state != ADAPTER, row.reason
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
    assert {(row.state, row.reason) for row in explanation.rows} == {(PEFT, f"adapter {zero3}")}
    assert {row.state for row in [*explanation.linears, *explanation.losses]} == {TORCH}
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
        assert row.state == PEFT, row


def test_explain_over_a_float8_base_takes_x_dtype_from_the_adapter() -> None:
    model = fuse(mlp(torch.float32))
    base = model.base_model.model.up.base_layer
    base.weight = nn.Parameter(base.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    base.register_forward_pre_hook(lambda *_: None)  # of a module that decodes it
    row, _ = explain(model).rows
    assert row.state == ADAPTER and "float8" not in row.reason
