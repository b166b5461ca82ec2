from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lora_kernels import cli
from lora_kernels.bench import baselines, command, dense, timing


class Ran(NamedTuple):
    """The results of a run of `bench`."""

    status: int
    out: str
    data: dict[str, Any]
    csv: list[dict[str, str]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.data["rows"]
        return rows


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits take seconds to measure and are not looked at here. Lines stay whole."""
    monkeypatch.setattr(command, "wrap", str)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda **_: 1e9)
    monkeypatch.setattr(timing, "product_peak", lambda dtype, **_: 1e9)
    monkeypatch.setattr(timing, "read_bandwidth", lambda **_: 1e9)
    monkeypatch.setattr(timing, "peak", lambda dtype, reached: 1e9)
    monkeypatch.setattr(baselines, "no_compiler", lambda device: "torch.compile takes long")


@pytest.fixture
def no_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the measurement of a call's overhead."""
    taken = dict.fromkeys(("ours, forward", "eager, forward"), 0.0)
    monkeypatch.setattr(dense, "overhead", lambda *_: taken)


@pytest.fixture
def run(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `lora-kernels bench` with these options, --json and, where it takes it, --csv."""

    def call(*options: str) -> Ran:
        file, table = tmp_path / "new" / "here.json", tmp_path / "new" / "here.csv"
        extra = [] if "--count" in options else ["--csv", str(table)]
        status = cli.main(["bench", *options, "--json", str(file), *extra])
        rows = []
        if table.exists():
            with table.open(newline="") as text:
                rows = list(csv.DictReader(text))
        runs = json.loads(file.read_text()) if file.exists() else {"": {}}
        file.unlink(missing_ok=True)
        (data,) = runs.values()
        return Ran(status, capsys.readouterr().out, data, rows)

    return call
