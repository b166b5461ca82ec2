"""`python -m benchmarks.gpu`: what it keeps of parts that end, fail, or are stopped."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_model

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
    assert "| endless | stopped |" in report and "broken failed:" in report
    assert "Nothing was timed." in report
    assert gpu.measure(out, argparse.Namespace(minutes=1.0, only=["whole"]), "cpu") == 0
    assert set(json.loads(out.read_text())) == {"provenance", "whole"}


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert "no GPU" in capsys.readouterr().out


def test_dry_run_tries_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert abs(sum(share for _, share, _ in gpu.PARTS) - 1) < 1e-9
    tests = [*gpu.PYTEST, "tests/gpu/test_cuda.py"]
    monkeypatch.setattr(gpu, "PARTS", [gpu.PARTS[0], ("tests", 0.5, tests)])
    monkeypatch.setattr(gpu.qualify, "dry_run", lambda dtypes: "the plan")
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--minutes", "10"])
    assert gpu.main() == 0
    printed = capsys.readouterr().out
    assert "qualify: at most 48 s: python -m lora_kernels.cli qualify" in printed
    assert "tests: at most 300 s" in printed and printed.endswith("the plan\n")
    wrong = [("typo", 1.0, [*gpu.CLI, "qualify", "--budgit", "3"])]
    monkeypatch.setattr(gpu, "PARTS", wrong)
    assert gpu.main() == 1 and "unrecognized arguments: --budgit" in capsys.readouterr().err


def test_report_has_the_losses_first() -> None:
    names = ("minimum", "p20", "p50", "p80")
    times = {
        name: dict.fromkeys(names, seconds) | {"rounds": 5}
        for name, seconds in (("ours", 3.0), ("peft", 2.0))
    }
    row = {"what": "host layer", "dtype": "float32", "M": 64, "mode": "step", "seconds": times}
    part = {"exit": 0, "seconds": 1.0, "tail": ""}
    said = gpu.report(
        {
            "provenance": {"gpu": {"name": "a card"}, "torch": "2.15", "commit": "c1"},
            "host": part | {"json": {"host": {"rows": [row]}}},
            "qualify": part | {"tail": "the verdict"},
        }
    )
    assert said.startswith("# lora_kernels on a card\n") and "commit c1" in said
    assert "| host | host layer float32 64×0×0 r=0 step | peft | 1.50 |" in said
    assert said.index("## Losses") < said.index("## host") < said.index("the verdict")


def test_model_runs_in_small_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    file = tmp_path / "model.json"
    options = ["--device", "cpu", "--tiny", "--seconds", "0", "--json", str(file)]
    assert gpu_model.main(options) == 0
    (run,) = json.loads(file.read_text()).values()
    bases = {row["dtype"] for row in run["rows"]}
    assert {"ours", "peft"} == {name for row in run["rows"] for name in row["seconds"]}
    assert "bf16" in bases and len(run["rows"]) == 3 * len(bases)
