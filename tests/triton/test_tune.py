"""`lora-kernels tune` from end to end: what it tries, drops, writes, and that it is obeyed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels import cli
from lora_kernels.backends.triton import LIBRARY, TWO_PASS, configs, launch, measured
from lora_kernels.bench import tune
from lora_kernels.choice import choose as selection
from lora_kernels.core.problem import Problem
from lora_kernels.device import DeviceInfo
from tests.triton.device import DEVICE

f32 = torch.float32
ARGUMENTS = ["tune", "--shapes", "64x32", "--rows", "33", "--dtype", "float32"]
ARGUMENTS += ["--seconds", "0", "--quant"]


@pytest.fixture
def few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TILES", [(32, 32, 32, 4, 1)])
    monkeypatch.setattr(tune, "STRATEGIES", (TWO_PASS, LIBRARY))
    monkeypatch.setattr(tune.timing, "interleave", _by_name)


def _by_name(calls: dict[str, Any], **_: Any) -> dict[str, Any]:
    """No clock: what is in the names decides, so that a test knows what is fastest."""
    order = ["backward 32x32x32", "forward 32x32x32", TWO_PASS]
    times = {}
    for name, call in calls.items():
        call()
        rank = next((i for i, part in enumerate(order) if part in name), len(order))
        times[name] = tune.timing.Times(rank + 1.0, rank + 1.0, rank + 1.0, 1)
    return times


@pytest.mark.usefixtures("few_tiles")
def test_tune_writes_what_choose_then_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "here.json"
    assert cli.main([*ARGUMENTS, "none", "nf4", "--out", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["four_bit"] for row in rows] == [False, True]
    assert cli.main([*ARGUMENTS, "none", "--out", str(file)]) == 0  # measured again, kept once
    assert len(json.loads(file.read_text())["rows"]) == 2
    assert "set LORA_KERNELS_MEASURED=" in capsys.readouterr().out
    for row in rows:
        assert row["strategy"] == TWO_PASS and row["rank"] == 16 and row["rows"] == 64
        assert row["forward"]["block_m"] == row["backward"]["block_m"] == 32

    monkeypatch.setenv("LORA_KERNELS_MEASURED", str(file))
    tiles, run = [], launch.run

    def record(kernel: Any, config: Any, *args: Any, **meta: Any) -> None:
        tiles.append((kernel.__name__, getattr(config, "block_m", 0)))
        run(kernel, config, *args, **meta)

    monkeypatch.setattr(launch, "run", record)
    args = [torch.randn(s, device=DEVICE) for s in ((33, 64), (32, 64), (16, 64), (32, 16))]
    with lora_kernels.backend("triton"):
        choice = selection.choose(Problem(DEVICE, f32, f32, f32, f32, 16, 33, False, 32, 64))
        assert choice.strategy == TWO_PASS and "measured on " in choice.reason
        lora_kernels.lora_linear(*args)
        assert ("two_pass_kernel", 32) in tiles
        other = selection.choose(Problem(DEVICE, f32, f32, f32, f32, 16, 33, False, 32, 65))
        assert "measured" not in other.reason
    with lora_kernels.backend("triton", LIBRARY):  # what is named goes before what was measured
        assert (
            selection.choose(Problem(DEVICE, f32, f32, f32, f32, 16, 33, False, 32, 64)).strategy
            == LIBRARY
        )


@pytest.mark.usefixtures("few_tiles")
def test_tune_of_a_wrong_or_broken_candidate_leaves_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launch.run

    def broken(kernel: Any, config: Any, *args: Any, **meta: Any) -> None:
        is_changed = isinstance(config, configs.GemmTiles) and config.block_m == 32
        if is_changed and meta["K_INNER"]:
            raise RuntimeError("no place\nfor it")
        run(kernel, config, *args, **meta)
        if is_changed:
            y = args[kernel.arg_names.index("y_ptr")]
            y[0, 0] += 0.1

    monkeypatch.setattr(launch, "run", broken)
    file = tmp_path / "here.json"
    assert cli.main([*ARGUMENTS, "none", "--out", str(file)]) == 0
    out = capsys.readouterr().out
    assert "left out, RuntimeError: no place" in out and "left out, dx differs by" in out
    for row in json.loads(file.read_text())["rows"]:
        assert row["forward"] is None and row["backward"] is None


def test_tune_into_a_file_of_something_else_leaves_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.json"
    for text in ("hello", "{}", '{"rows": [{"strategy": "split"}]}'):
        file.write_text(text)
        assert cli.main([*ARGUMENTS, "none", "--out", str(file)]) == 2
        said = "".join(capsys.readouterr())
        assert "--out:" in said and "want a file that `lora-kernels tune` wrote" in said
        assert file.read_text() == text


GOOD: dict[str, Any] = {"arch": 90, "multiprocessors": 132, "rows": 1, "columns": 64, "inner": 64}
GOOD |= {"block_r": 16, "dtype": "bfloat16", "adapter": "bfloat16", "four_bit": False}
GOOD |= {"platform": measured._platform(), "strategy": TWO_PASS, "forward": None}
GOOD |= {"backward": None, "device": "none", "microseconds": 1.0, "eager_microseconds": 2.0}
TILES = {"block_m": 16, "block_n": 64, "block_k": 64, "warps": 4, "stages": 3}


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"rows": [',
        "\x00\xff",
        "[]",
        '{"rows": null}',
        '{"rows": ["split"]}',
        json.dumps({"rows": [GOOD | {"microseconds": "fast"}]}),
        json.dumps({"rows": [GOOD | {"arch": [90]}]}),
        json.dumps({"rows": [GOOD | {"dtype": 2}]}),
        json.dumps({"rows": [GOOD | {"strategy": "guess"}]}),
        json.dumps({"rows": [GOOD | {"forward": {"block_m": 16}}]}),
        json.dumps({"rows": [GOOD | {"forward": TILES | {"block_n": 48}}]}),
        json.dumps({"rows": [GOOD | {"forward": TILES | {"block_n": "64"}}]}),
        json.dumps({"rows": [GOOD | {"backward": TILES | {"warps": 3}}]}),
        json.dumps({"rows": [GOOD | {"backward": TILES | {"stages": 0}}]}),
        None,
    ],
)
def test_find_damaged_table_warns_once_and_leaves_it_out(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "here.json"
    if text is not None:
        file.write_text(text, encoding="latin-1")
    monkeypatch.setenv("LORA_KERNELS_MEASURED", str(file))
    bf16 = torch.bfloat16
    key = measured.shape(DeviceInfo("cuda", 90, 132, 227 << 10), 1, 64, 64, 16, bf16, bf16, False)
    with pytest.warns(UserWarning) as told:
        assert [measured.find(key) for _ in range(3)] == [None] * 3
    assert len(told) == 1 and str(file) in str(told[0].message)
    good = tmp_path / "good.json"
    good.write_text(json.dumps({"rows": [GOOD | {"forward": TILES}]}))
    monkeypatch.setenv("LORA_KERNELS_MEASURED", str(good))
    found = measured.find(key)
    assert found is not None and found.forward == configs.GemmTiles(16, 64, 64, 4, 3)
    assert found.beats_eager
    for field, other in (("dtype", "float16"), ("adapter", "float32"), ("platform", "Triton 1")):
        assert measured.find(replace(key, **{field: other})) is None  # type: ignore[arg-type]


def test_shape_tells_calls_apart_that_are_measured_apart() -> None:
    """Rows count up to a power of two, ranks in blocks."""
    target, bf16, f16 = DeviceInfo("cuda", 90, 132, 227 << 10), torch.bfloat16, torch.float16
    call: tuple[Any, ...] = (target, 100, 64, 32, 17, bf16, bf16, False)
    key = measured.shape(*call)
    assert key == measured.shape(*call[:1], 128, *call[2:4], 32, *call[5:])
    fewer = replace(target, multiprocessors=114)
    changes = [(fewer,), (replace(target, capability=80),), (target, 129), (target, 64)]
    changes += [(target, 100, 65), (target, 100, 64, 33), (*call[:4], 16), (*call[:5], f16)]
    changes += [(*call[:6], f32), (*call[:7], True), (target, 100, 32, 64)]
    found = {measured.shape(*change, *call[len(change) :]) for change in changes}
    assert len(found) == len(changes) and key not in found


def test_rows_of_another_driver_torch_or_triton_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    here = measured._platform.__wrapped__()
    for owner, name, value in (
        (measured.verdicts, "driver_version", lambda: "1.2"),
        (torch, "__version__", "1.2"),
        (measured.device, "version", lambda package: f"{package} 1.2"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            there = measured._platform.__wrapped__()
        assert there != here and "1.2" in there


def test_candidates_fit_the_shared_memory() -> None:
    case = tune.Case(4096, 4096, 4096, 16, torch.bfloat16)
    for size, least in ((227 << 10, 9), (99 << 10, 3)):
        target = DeviceInfo("cuda", 90, 132, size)
        tried = list(tune._candidates(target, case, TWO_PASS, 2))
        assert len(tried) >= least
        assert all(configs.shared_memory(tiles, 2, 0) <= size for tiles in tried)
