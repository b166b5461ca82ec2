"""`python -m benchmarks.gpu`: what it keeps of parts that end, fail, or are stopped."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from lora_kernels.bench.results import Row
from lora_kernels.bench.timing import Times
from lora_kernels.choice.verdicts import Group, Verdict, read_verdict

WRITES = (
    "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('[1]'); print('done', *sys.argv[2:])"
)


def test_every_part_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = [sys.executable, "-c"]
    parts = [
        ("whole", 0.5, [*python, WRITES, "{json}", "{device}"]),
        ("broken", 0.2, [*python, "raise SystemExit('no kernel')"]),
        ("endless", 0.3, [*python, "import time; print('on', flush=True); time.sleep(60)"]),
    ]
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "provenance", lambda dtypes, device: {"card": device})
    out = tmp_path / "results" / "gpu.json"
    assert gpu.measure(out, argparse.Namespace(minutes=0.05, only=None), "cpu") == 1
    data = json.loads(out.read_text())
    assert data["provenance"] == {"card": "cpu"}
    assert data["whole"]["exit"] == 0 and data["whole"]["json"] == [1]
    assert data["whole"]["tail"] == "done cpu\n"
    assert data["broken"]["exit"] == 1 and "no kernel" in data["broken"]["tail"]
    assert data["endless"]["exit"] is None and data["endless"]["tail"] == "on\n"
    assert str(tmp_path) not in out.read_text() and sys.executable not in out.read_text()
    report = out.with_suffix(".md").read_text()
    assert "| endless | stopped |" in report and "broken: exit status 1" in report
    assert "Nothing was timed." in report


def test_one_part_has_all_minutes_and_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [sys.executable, "-c", "print('said')"]
    monkeypatch.setattr(gpu, "PARTS", [("a", 0.9, said), ("b", 0.06, said), ("c", 0.04, said)])
    monkeypatch.setattr(gpu, "provenance", lambda dtypes, device: {"card": device})
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "A Card")
    monkeypatch.setattr(gpu, "info", lambda: {"backends": {}})  # which caches what it finds
    monkeypatch.setattr(sys, "argv", ["gpu", "--minutes", "2", "--only", "b", "c"])
    assert gpu.main() == 0
    printed = capsys.readouterr().out
    assert "b: at most 72 s" in printed and "c: at most 1" in printed and "a: at" not in printed
    data = json.loads((tmp_path / "benchmarks/results/gpu-a-card-b-c.json").read_text())
    assert set(data) == {"provenance", "b", "c"}


def test_parts_of_kernels_that_are_not_there_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [sys.executable, "-c", "print('said')"]
    monkeypatch.setattr(gpu, "PARTS", [("verify-cuda", 0.5, said), ("verify-triton", 0.5, said)])
    monkeypatch.setattr(gpu, "provenance", lambda dtypes, device: {"card": device})
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "A Card")
    backends = {"cuda": {"available": False, "reason": "not built"}, "triton": {"available": True}}
    monkeypatch.setattr(gpu, "info", lambda: {"backends": backends})
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 0
    assert "without the cuda kernels: not built" in capsys.readouterr().out
    data = json.loads((tmp_path / "benchmarks/results/gpu-a-card.json").read_text())
    assert set(data) == {"provenance", "verify-triton"}


def test_a_torn_file_of_a_stopped_part_stops_no_other() -> None:
    torn = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('[1')"
    found = gpu.run([sys.executable, "-c", torn, "{json}"], 60.0, "cpu")
    assert found["exit"] == 0 and "json" not in found


def test_the_verdict_is_kept_whole_and_shown_as_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = (
        Group("cuda", "two_pass", "bfloat16", a, "4bit") for a in ("bfloat16", "float32")
    )
    verdict = Verdict({"name": "card", "driver": "1"}, frozenset({right}), {wrong: "sizes: y"}, [])
    file = tmp_path / "verdict.json"
    file.write_text(json.dumps(verdict.json()))
    prints = f"import sys; print(open({str(file)!r}).read()); sys.exit('one fails')"
    monkeypatch.setattr(gpu, "PARTS", [("qualify", 1.0, [sys.executable, "-c", prints, "--json"])])
    monkeypatch.setattr(gpu, "provenance", lambda dtypes, device: {"card": device})
    out = tmp_path / "gpu.json"
    assert gpu.measure(out, argparse.Namespace(minutes=1.0, only=None), "cpu") == 1
    assert read_verdict(json.loads(out.read_text())["qualify"]["json"]).passed == {right}
    report = out.with_suffix(".md").read_text()
    assert f"✗ {wrong}" in report and "sizes: y" in report and "1 of 2 groups pass" in report
    assert "one fails" in report


def test_every_test_of_a_part_is_collected() -> None:
    files = [word for *_, command in gpu.PARTS for word in command if word.startswith("tests/")]
    found = gpu.run([*gpu.PYTEST, *files, "--collect-only"], 120.0, "cpu")
    assert found["exit"] == 0, found["tail"]


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert "no GPU" in capsys.readouterr().out


def test_dry_run_tries_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert abs(sum(share for _, share, _ in gpu.PARTS) - 1) < 1e-9
    assert gpu.PARTS[0][0] == gpu.ORDERS and 15 * 60 * gpu.PARTS[0][1] <= 120
    tests = [*gpu.PYTEST, "tests/gpu/test_cuda.py"]
    monkeypatch.setattr(gpu, "PARTS", [gpu.PARTS[2], ("tests", 0.5, tests)])
    monkeypatch.setattr(gpu.qualify, "dry_run", lambda dtypes: "the plan")
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--minutes", "10"])
    assert gpu.main() == 0
    printed = capsys.readouterr().out
    assert "qualify: at most 54 s: python -m lora_kernels.cli qualify" in printed
    assert "tests: at most 300 s" in printed and printed.endswith("the plan\n")
    wrong = [("typo", 0.5, [*gpu.CLI, "qualify", "--budgit", "3"])]
    wrong += [("lost", 0.5, [*gpu.PYTEST, "tests/gpu/test_lost.py"])]
    monkeypatch.setattr(gpu, "PARTS", wrong)
    assert gpu.main() == 1
    captured = capsys.readouterr()
    assert "unrecognized arguments: --budgit" in captured.err
    assert "test_lost.py" in captured.out.partition("lost: at most")[2].partition("\n")[2]
    assert captured.out.endswith("2 of 2 parts would fail, as said above\n")


def test_report_has_the_losses_first() -> None:
    names = ("minimum", "p20", "p50", "p80")
    times = {
        name: dict.fromkeys(names, seconds) | {"rounds": 5}
        for name, seconds in (("ours", 3.0), ("peft", 2.0))
    }
    row = {"what": "host layer", "dtype": "float32", "M": 64, "mode": "step", "seconds": times}
    device = {name: dict(times["ours"], p50=1.0) for name in times}
    row |= {"device_seconds": device, "misses": {"ours": "1.5 times PEFT's"}}
    part: dict[str, Any] = {"exit": 0, "seconds": 1.0, "tail": ""}
    said = gpu.report(
        {
            "provenance": {"gpu": {"name": "a card"}, "torch": "2.15", "commit": "c1"},
            "host": part | {"exit": 1, "json": {"host": {"rows": [row]}}},
            "qualify": part | {"tail": "the verdict"},
            "orders": part | {"tail": "the orders"},
        }
    )
    assert said.startswith("# lora_kernels on a card\n") and "commit c1" in said
    assert "| host | host layer float32 64×0×0 r=0 step | peft | 1.50 |" in said
    assert "peft 1.50 (3e+03 / 2e+03 ms) | ours 1e+03, peft 1e+03 |" in said
    assert "| host | host layer float32 64×0×0 r=0 step | ours | 1.5 times PEFT's |" in said
    assert (
        said.index("## orders")
        < said.index("## Losses")
        < said.index("## qualify")
        < said.index("## host")
    )
    assert "host: exit status 1; what it found is below." in said


def test_report_has_the_times_of_the_adapters_that_its_ratio_compares() -> None:
    """PEFT's float32 adapters beside ours in float32, and not beside ours in bfloat16."""
    seconds = {"ours": 1.0, "ours, fp32 adapters": 3.0, "peft": 2.0, "frozen": 0.5}
    times = {name: Times(s, s, s, s, 5) for name, s in seconds.items()}
    row = Row(dtype="bfloat16", M=64, mode="step", seconds=times)
    said = gpu.line_of(row).split(" | ")[1]
    assert said == "peft 1.50 (3e+03 / 2e+03 ms), frozen 2.00 (1e+03 / 500 ms)"
