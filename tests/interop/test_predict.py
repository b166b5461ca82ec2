"""`explain(model, rows=...)`: predicted times, their shares, and what another M would change."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

import lora_kernels
from lora_kernels import costs, cpu_costs, device, timing
from lora_kernels.backends import cpu, native, triton
from lora_kernels.backends.triton import measured
from lora_kernels.choice import choose as selection
from lora_kernels.core.problem import MANY_ROWS, Choice, Problem, Strategy
from lora_kernels.cpu_costs import Machine, Sizes
from lora_kernels.device import DeviceInfo
from lora_kernels.layers import DoRALinear, LoRAEmbedding, LoRALinear, QLoRALinear
from lora_kernels.peft import explain, fuse, predict
from lora_kernels.peft.predict import Part, Region
from tests.support.peft_models import (
    SIZES,
    R,
    batch,
    mlp,
)

f32, bf16 = torch.float32, torch.bfloat16
# Round figures: a second is 1e9 bytes, or 1e12 operations in float32 and twice as many in bfloat16.
MACHINE = Machine("test", 1e9, {f32: 1e12, bf16: 2e12})
RATES = 1.755e9, 3.35e12, 949e12, 59e12
H100 = DeviceInfo("cuda", 90, 132, 227 << 10, "H100", 80 << 30, *RATES)
GPU = Part(torch.device("cuda", 0), bf16, bf16, 4096, 14336, 16, bf16, bf16)
needs_native = pytest.mark.skipif(native.module is None, reason="no native kernels")


def part(**fields: Any) -> Part:
    return Part(torch.device("cpu"), f32, f32, 64, 48, 8)._replace(**fields)


def choices(monkeypatch: pytest.MonkeyPatch, *starts: tuple[int, str]) -> None:
    """`selection` answers each name from its number of rows on."""

    def choose(problem: Problem) -> Choice:
        rows = problem.rows or 1
        return Choice("cpu", next(name for at, name in reversed(starts) if rows >= at), "")

    monkeypatch.setattr(selection, "choose", choose)


def test_regions_start_at_the_very_row(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = ((1, "a"), (2, "b"), (129, "c"), (1003, "a"), (70_000, "d"))
    choices(monkeypatch, *starts)
    assert predict.regions(part()) == tuple(Region(at, "cpu", name) for at, name in starts)


def test_changes_are_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    choices(monkeypatch, (1, "a"), (2, "b"), (33, "c"), (64, "d"))
    found = predict.Prediction(None, None, False, None, predict.regions(part()))
    assert found.changes(40) == "at 1 row: a; 2 to 32 rows: b; from 64 rows on: d"
    assert found.changes(1) == "2 to 32 rows: b; 33 to 63 rows: c; from 64 rows on: d"
    assert found.changes(64).startswith("at 1 row: a; 2 to 32")
    choices(monkeypatch, (1, "a"), (2, "b"), (5, "c"), (6, "b"), (9, "a"))
    found = predict.Prediction(None, None, False, None, predict.regions(part()))
    assert found.changes(7) == "at 1 row and from 9 rows on: a; 2 to 4 rows: b; at 5 rows: c"
    other = predict.Prediction(
        None, None, False, None, (Region(1, "cuda", "s"), Region(9, "triton", "t"))
    )
    assert other.changes(4) == "from 9 rows on: triton t"


def test_the_row_has_the_strategy_of_so_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    choices(monkeypatch, (1, "few"), (64, "many"))
    for model in (fuse(sequential()), nn.Sequential(LoRALinear(48, 64, r=4))):
        cases = (63, "few", "from 64 rows on: many"), (64, "many", "up to 63 rows: few")
        for rows, strategy, other in cases:
            found = explain(model, rows=rows, machine=MACHINE)
            assert found.rows[0].strategy == strategy and other in str(found)


def test_a_strategy_that_was_asked_for_and_cannot_run_there_is_a_region() -> None:
    if native.module is None:
        pytest.skip("no native kernels")
    with lora_kernels.backend("cpu", cpu.GEMV_4BIT):
        first, second = predict.regions(part(four_bit=True))
        assert part(four_bit=True).describe(None).strategy == cpu.GEMV_4BIT
    assert first.strategy == cpu.GEMV_4BIT and second[1:] == ("none", "raises")


def test_reason_without_a_number_of_rows_is_that_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "choose", lambda p: Choice("cpu", "a", f"{p.rows} rows"))
    assert part().describe(None) == ("cpu", "a", f"{MANY_ROWS} rows")


@needs_native
@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("autocast", [None, bf16])
def test_prediction_asks_for_the_choice_that_the_op_asks_for(autocast, rows, asked) -> None:
    """Rows included."""
    model = fuse(mlp(f32))
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        explain(model, rows=rows, machine=MACHINE)
        by_explain = {*asked}
        asked.clear()
        up, down = model.base_model.model.up, model.base_model.model.down
        up(batch(f32).view(-1, SIZES[0])[:rows]), down(torch.ones(rows, SIZES[1]))
    assert len(asked) == 2 and {*asked} <= by_explain


def sequential(r: int = R, **config: Any) -> Any:
    linears = nn.Sequential(nn.Linear(48, 64, bias=False), nn.Linear(64, 48, bias=False))
    config = {"target_modules": ["0"], "r": r, "lora_alpha": 7} | config
    return get_peft_model(linears, LoraConfig(**config))


def test_shares_count_the_layers_without_an_adapter() -> None:
    model = fuse(sequential())
    found = explain(model, rows=100, machine=MACHINE)
    (row,), (prediction,) = found.rows, found.predictions.values()
    assert row.layer in found.predictions and not prediction.measured
    assert prediction.source == "the cost model"
    assert found.others is not None and found.others.layers == 1
    assert prediction.share is not None and found.others.share is not None
    assert prediction.share + found.others.share == pytest.approx(1)
    # The other linear: its product and dx's, by PyTorch.
    sizes = Sizes(100, 48, 64, 0, f32)
    both = sum(cpu_costs.predict(MACHINE, sizes, "", backward) for backward in (False, True))
    assert found.others.seconds == pytest.approx(both)
    text = str(found)
    assert f"{prediction.seconds * 1e3:.3g} ms predicted" in text
    assert f", {found.others.share:.1%} in 1 without an adapter" in text
    assert "measured" not in text.replace("measured in this process", "")
    assert "100 rows, forward and backward of all linear layers: " in text
    assert "test: a copy moves 1 GB/s" in text
    forward = explain(model.eval(), rows=100, machine=MACHINE)
    assert not forward.step and "100 rows, forward of all" in str(forward)
    assert forward.predictions[row.layer].seconds < prediction.seconds


def test_a_layer_that_peft_trains_a_copy_of_counts_once() -> None:
    """The copy, whose weight has a gradient, while it is in use."""
    plain, saved = (
        explain(sequential(modules_to_save=names), rows=100, machine=MACHINE).others
        for names in (None, ["1"])
    )
    assert plain is not None and saved is not None and plain.layers == saved.layers == 1
    weights = Sizes(100, 48, 64, 0, f32).base_flops / MACHINE.peaks[f32]
    assert saved.seconds == pytest.approx(plain.seconds + weights)
    model = sequential(modules_to_save=["1"])
    (wrapper,) = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    wrapper.modules_to_save["default"] = nn.Linear(480, 640)  # whose time would be another
    with model.disable_adapter():
        found = explain(model, rows=100, machine=MACHINE).others
    forward = explain(sequential().eval(), rows=100, machine=MACHINE).others
    assert found is not None and forward is not None and found.layers == 1
    assert found.seconds == pytest.approx(forward.seconds)


def test_explain_of_rows_sums_the_times_of_layers_that_are_alike() -> None:
    pairs = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 48), nn.Linear(48, 64))
    model = get_peft_model(pairs, LoraConfig(r=R, target_modules=["0", "2"]))
    found = explain(fuse(model), rows=100, machine=MACHINE)
    first, second = found.predictions.values()
    seconds, share = first.seconds + second.seconds, first.share + second.share
    line = str(found).splitlines()[1]
    assert line.startswith("2 × base_model.model.*  ")
    assert f"  {seconds * 1e3:.3g} ms predicted  {share:.1%}  " in line
    every = str(explain(model, rows=100, machine=MACHINE, all=True)).splitlines()[1:3]
    assert [line.split(" ")[0] for line in every] == [*found.predictions]
    # One that was measured does not hide among those that are predicted.
    one = dict(found.predictions) | {found.rows[0].layer: replace(first, measured=True, source="")}
    lines = str(replace(found, predictions=one)).splitlines()[1:3]
    assert " measured " in lines[0] and " predicted " in lines[1]


def test_json_holds_the_table() -> None:
    model = fuse(sequential())
    found = explain(model, rows=100, machine=MACHINE)
    data = json.loads(found.json())
    (layer,), (row,) = data["layers"], found.rows
    assert {key: layer[key] for key in row._fields} == row._asdict()
    assert layer["parameters"] == R * (48 + 64)
    assert layer["regions"][0]["rows"] == 1
    assert layer["seconds"] + data["others"]["seconds"] == pytest.approx(data["seconds"])
    assert (data["rows"], data["step"]) == (100, True)
    plain = json.loads(explain(model).json())
    assert list(plain) == ["layers"] and "seconds" not in plain["layers"][0]


def test_the_table_without_rows_stays_as_it_was() -> None:
    model = fuse(sequential())
    assert str(explain(model)).splitlines()[0].split() == [*explain(model).rows[0]._fields]


def seconds(model: nn.Module, rows: int = 512) -> float | None:
    (prediction,) = explain(model, rows=rows, machine=MACHINE).predictions.values()
    return prediction.seconds


def test_more_work_takes_longer() -> None:
    """More ranks, DoRA's norm, its second base GEMM with dropout, a base that trains."""
    plain = seconds(fuse(sequential()))
    assert plain is not None
    for config in ({"r": 40}, {"use_dora": True}):
        more = seconds(fuse(sequential(**config)))
        assert more is not None and more > plain, config
    dora, dropped = (seconds(fuse(sequential(use_dora=True, lora_dropout=p))) for p in (0.0, 0.1))
    product = Sizes(512, 64, 48, 0, f32)
    twice = sum(cpu_costs.predict(MACHINE, product, "", backward) for backward in (False, True))
    assert dora is not None and dropped == pytest.approx(dora + twice)
    unfused = sequential()
    unfused.base_model.model[0].base_layer.weight.requires_grad_()
    by_peft = seconds(sequential())
    assert by_peft is not None and by_peft >= plain
    assert seconds(unfused) == pytest.approx(by_peft + product.base_flops / 1e12)


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_layers_without_an_active_adapter_are_predicted_as_their_base(state: str) -> None:
    model = fuse(sequential())
    base = Sizes(512, 64, 48, 0, f32)
    alone = sum(cpu_costs.predict(MACHINE, base, "", backward) for backward in (False, True))
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    else:
        model.merge_adapter()
    model.base_model.model[0].base_layer.weight.requires_grad_(False)
    nn.Module.train(model)
    model.extra = nn.Parameter(torch.zeros(1))  # something trains
    assert seconds(model) == pytest.approx(alone)


def test_hooked_layers_are_not_predicted() -> None:
    hooked = fuse(sequential())
    hooked.base_model.model[0].base_layer.register_forward_hook(lambda *args: None)
    assert seconds(hooked) is None
    assert "1 layers are not predicted" in str(explain(hooked, rows=3, machine=MACHINE))


def test_dense_layers_are_predicted() -> None:
    classes = (LoRALinear, DoRALinear, QLoRALinear, LoRALinear)
    layers = nn.ModuleList([*(cls(64, 48, r=4) for cls in classes), LoRAEmbedding(9, 8, r=2)])
    layers[3].merge()
    found = explain(layers, rows=64, machine=MACHINE).predictions.values()
    lora, dora, four_bit, merged, embedding = (prediction.seconds for prediction in found)
    assert embedding is None and four_bit is not None and merged < lora < dora


def test_rows_that_name_their_adapters_are_predicted() -> None:
    model = fuse(sequential())
    model.add_adapter("second", LoraConfig(r=3, target_modules=["0"]))
    model.eval()
    model.base_model.model[0](torch.ones(2, 48), adapter_names=["default", "second"])
    (row,) = explain(model, rows=2, machine=MACHINE).rows
    assert "rows name their adapters" in row.reason
    assert seconds(model) is not None


@pytest.mark.parametrize("rows", [0, -1, True, 2.0, "2"])
def test_bad_rows_are_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"rows: got .*, want a whole number of at least 1"):
        explain(sequential(), rows=rows)


def test_known_gpu_is_predicted_by_the_model_of_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu", lambda index: H100)
    library = next(c for c in costs.predict(H100, GPU.problem(512)) if c.backend == "eager")
    monkeypatch.setattr(selection, "choose", lambda *args: Choice("eager", "", ""))
    found = predict.time(GPU, 512, None, False)
    assert found == (library.seconds, "the cost model for H100", False)
    step = predict.time(GPU, 512, None, True)
    # dx is a product of the same size.
    assert step is not None and step.seconds > 1.9 * found.seconds
    monkeypatch.setattr(selection, "choose", lambda *args: Choice("cuda", Strategy.TWO_PASS, ""))
    predicted = costs.predict(H100, GPU.problem(512))
    split = next(c for c in predicted if (c.backend, c.strategy) == ("cuda", Strategy.TWO_PASS))
    assert predict.time(GPU, 512, None, False) == (split.seconds, found.source, False)
    for cost in predicted:
        if cost.backend in ("triton", "cuda"):  # also those that are not its fastest
            answer = Choice(cost.backend, cost.strategy, "")
            monkeypatch.setattr(selection, "choose", lambda *args, answer=answer: answer)
            assert predict.time(GPU, 512, None, False) == (cost.seconds, found.source, False)
    monkeypatch.setattr(device, "gpu", lambda index: replace(H100, clock=0.0))
    assert predict.time(GPU, 512, None, False) is None


def test_step_on_a_gpu_is_the_sum_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward, one with N and K exchanged, and what follows of each field of the call."""
    monkeypatch.setattr(device, "gpu", lambda index: H100)
    monkeypatch.setattr(selection, "choose", lambda *args: Choice("cuda", Strategy.TWO_PASS, ""))

    def predicted(rows: int = 512, step: bool = True, **fields: Any) -> float:
        found = predict.time(GPU._replace(**fields), rows, None, step)
        assert found is not None
        return found.seconds

    x, y = (512 * n * 2 for n in (GPU.K, GPU.N))
    orders = (GPU.N, GPU.K), (GPU.K, GPU.N)
    bandwidth = H100.bandwidth * costs.BANDWIDTH_SHARE
    forward, exchanged = (predicted(step=False, N=n, K=k) for n, k in orders)
    assert forward != exchanged
    streams = (x + y) / bandwidth + 2 * costs.LAUNCH
    step = forward + exchanged + streams
    assert predicted() == pytest.approx(step)
    pefts = [predicted(step=False, ours=False, N=n, K=k) for n, k in orders]
    assert predicted(ours=False) == pytest.approx(sum(pefts) + streams + 3 * costs.LAUNCH)
    both = [predicted(step=False, R=0, N=n, K=k) for n, k in orders]
    assert predicted(R=0) == pytest.approx(sum(both))
    weights = 2 * 512 * GPU.N * GPU.K / (H100.tensor_flops * costs.LIBRARY_SHARE)
    assert predicted(frozen=False) == pytest.approx(step + weights)
    assert predicted(step=False, frozen=False) == pytest.approx(forward)
    norm = GPU.N * GPU.K * 2 / bandwidth + costs.LAUNCH
    assert predicted(norm=True) == pytest.approx(step + norm)
    adapter = (x + 2 * y) / bandwidth + 2 * costs.LAUNCH
    assert predicted(base=False, step=False) == pytest.approx(adapter)
    assert predicted(base=False) == pytest.approx(3 * adapter)


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({"dtype": bf16, "x_dtype": bf16}, {"dtype": bf16}),
        ({"dtype": bf16, "a_dtype": bf16}, {"dtype": bf16}),  # B is in float32
        ({"four_bit": True}, {"four_bit": True}),
        ({"base": False}, {"base": False}),
    ],
    ids=str,
)
def test_fields_of_a_call_on_a_cpu_count(
    fields: dict[str, Any], sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row, whose time is that of the bytes."""
    choices(monkeypatch, (1, cpu.FUSED))
    found = predict.time(part(N=2000, K=1000, **fields), 1, MACHINE, False)
    given = {"dtype": f32, "adapter_itemsize": 4} | sizes
    want = cpu_costs.predict(MACHINE, Sizes(1, 2000, 1000, 8, **given), cpu.FUSED)
    assert found is not None and found.seconds == pytest.approx(want, rel=1e-9)


def test_norm_and_weight_gradient_on_a_cpu_have_their_own_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choices(monkeypatch, (1, cpu.FUSED))

    def predicted(rows: int, step: bool, **fields: Any) -> float:
        found = predict.time(part(N=2000, K=1000, dtype=bf16, **fields), rows, MACHINE, step)
        assert found is not None
        return found.seconds

    weight = 2000 * 1000
    for step in (False, True):  # the norm reads the weight once in each
        added = predicted(1, step, norm=True) - predicted(1, step)
        assert added == pytest.approx(2 * weight / 1e9)
    added = predicted(1, False, norm=True, R=4096) - predicted(
        1, False, R=4096
    )  # bound by products
    assert added == pytest.approx(2 * weight * 4096 / 1e12)
    assert predicted(64, True, frozen=False) - predicted(64, True) == pytest.approx(
        2 * weight * 64 / 2e12
    )


def test_interpreted_kernels_are_not_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced Triton or CUDA backend on a CPU runs in an interpreter or emulator."""
    for backend in ("triton", "cuda"):
        answer = Choice(backend, "", "")
        monkeypatch.setattr(selection, "choose", lambda *args, answer=answer: answer)
        assert predict.time(part(), 8, MACHINE, False) is None


def test_no_cpu_is_measured_for_a_model_that_is_not_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cpu_machine", None)
    found = explain(sequential().to("meta"), rows=8)
    assert not found.limits and [p.seconds for p in found.predictions.values()] == [None]


def test_x_dtype_counts_for_the_layers_without_an_adapter() -> None:
    fp32, narrow = (
        explain(sequential(), rows=4096, machine=MACHINE, x_dtype=dtype).others
        for dtype in (f32, bf16)
    )
    assert fp32 is not None and narrow is not None
    assert narrow.seconds is not None and narrow.seconds < fp32.seconds


def test_layers_of_pefts_have_its_forward_for_any_number_of_rows() -> None:
    (prediction,) = explain(sequential(), rows=8, machine=MACHINE).predictions.values()
    assert prediction.regions == (Region(1, "peft", "PEFT's own forward"),)


def test_what_was_measured_goes_before_the_model_and_says_so(monkeypatch) -> None:
    monkeypatch.setattr(device, "gpu", lambda index: H100)
    key = measured.shape(H100, 512, 4096, 14336, 16, bf16, bf16, False)
    row = measured.Measured(
        triton.TWO_PASS, source="measured on H100: 250 µs a step", microseconds=250
    )
    answer = Choice("triton", triton.TWO_PASS, row.source)
    monkeypatch.setattr(selection, "choose", lambda *args: answer)
    with measured.override_row(key, row):
        assert predict.time(GPU, 512, None, True) == (250e-6, row.source, True)
        # Neither another shape, nor a forward, nor another strategy was measured.
        others = [GPU._replace(dropout=True), GPU._replace(R=100), GPU._replace(base=False)]
        others += [GPU._replace(mixed=True), GPU._replace(a_dtype=f32, b_dtype=f32)]
        cases = (GPU, 2048, True), (GPU, 512, False), *((other, 512, True) for other in others)
        for other, rows, step in cases:
            found = predict.time(other, rows, None, step)
            assert found is not None and not found.measured
        answer = Choice("triton", triton.LIBRARY, "")
        found = predict.time(GPU, 512, None, True)
        assert found is not None and not found.measured
    answer = Choice("triton", triton.TWO_PASS, row.source)
    with measured.override_row(key, replace(row, microseconds=None)):
        found = predict.time(GPU, 512, None, True)
        assert found is not None and not found.measured
    assert predict.total(iter([predict.Time(1.0, "a"), None])) is None
    whole = predict.total(iter([predict.Time(1.0, "a", True), predict.Time(2.0, "b")]))
    assert whole == (3.0, "a; b", False)
    assert predict.total(iter([])) is None


def test_the_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: counted.append("copy") or 1e9)
    monkeypatch.setattr(timing, "product_peak", lambda dtype: counted.append(str(dtype)) or 1e12)
    timing._cpu_machine.cache_clear()
    try:
        for _ in range(2):
            found = explain(sequential(), rows=8)
        assert counted == ["torch.float32", "copy"]
        assert re.search(r"measured in this process: a copy moves 1 GB/s, .* float32", str(found))
    finally:
        timing._cpu_machine.cache_clear()
