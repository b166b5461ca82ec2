"""`bench --compare`: what got slower is named, what did not is not, and other files are refused."""

import copy
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels import cli
from lora_kernels.bench import command, compare, dense, timing
from lora_kernels.bench.results import Result, Row
from lora_kernels.bench.timing import Ratio, Times
from lora_kernels.oracle.case import Case

PROVENANCE = {"processor": "A", "threads": 2, "torch": "2.8", "isa": "avx2", "peft": "0.17"}


SWITCHING = {"what": "switching", "M": 0, "K": 48, "N": 32, "R": 3, "seconds": {}}


def times(p50: Any, ratio: float, bound: float = 0.04, rounds: int = 50) -> dict[str, Any]:
    """bound: how far the median of the ratios may be off."""
    over = {"p20": ratio / 2, "p50": ratio, "p80": ratio * 2}
    over |= {"low": ratio / (1 + bound), "high": ratio * (1 + bound)}
    return {"p20": p50, "p50": p50, "p80": p50, "rounds": rounds, "over": over}


def layer(R: int, ours: float, **kwargs: Any) -> dict[str, Any]:
    row = {"M": 8, "K": 48, "N": 32, "R": R, "dropout_p": 0.0, "dtype": "float32", "mode": "step"}
    seconds = {"frozen": times(1e-3, 1.0), "ours": times(1e-3, ours, **kwargs)}
    return {**row, "seconds": {**seconds, "peft": times(1e-3, 3.0)}}


def data(*rows: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return {"provenance": {**PROVENANCE, **facts}, "rows": list(rows)}


def result(*rows: dict[str, Any], **facts: Any) -> Result:
    return Result({**PROVENANCE, **facts}, list(map(Row.from_json, rows)))


def test_slower_and_faster_beyond_the_noise_and_not_within() -> None:
    # exp(√2 · ln 1.04) = 1.057
    old = result(layer(1, 1.0), layer(2, 1.0), layer(3, 1.0), layer(4, 1.0))
    new = result(layer(1, 1.1), layer(2, 1.055), layer(3, 1 / 1.1), layer(4, 1 / 1.055))
    lines, status = compare.report(old, new)
    assert status == 1
    assert lines[0] == "slower: float32 8×48×32 r=1 step, ours: 1.000 -> 1.100, +10.0% (noise 5.7%)"
    assert lines[1].startswith("faster: float32 8×48×32 r=3 step, ours: 1.000 -> 0.909")
    assert lines[2].endswith("1 slower, 1 faster, 0 too noisy to say, 2 the same within the noise")
    assert len(lines) == 3
    assert compare.report(old, old)[1] == 0


def test_the_noise_is_that_of_both_files() -> None:
    def noise(old: dict[str, Any], new: dict[str, Any]) -> float:
        (change,), _, _ = compare.changes(result(old), result(new))
        return math.log1p(change.noise)

    quiet, loud = layer(3, 1.0, bound=0.0), layer(3, 1.0, bound=0.3)
    assert noise(quiet, quiet) == pytest.approx(math.log1p(compare.LEAST))
    assert noise(quiet, loud) == noise(loud, quiet) == pytest.approx(math.log(1.3))
    assert noise(loud, loud) == pytest.approx(math.sqrt(2) * math.log(1.3))


def test_rounds_that_scatter_too_far_say_nothing() -> None:
    """However far the medians lie apart: they may be those of two schedules."""
    steady, unsteady = layer(3, 1.0), layer(3, 3.0, bound=0.25)
    for old, new in ((steady, unsteady), (unsteady, steady)):
        lines, status = compare.report(result(old), result(new))
        assert lines[0].startswith("too noisy: float32 8×48×32 r=3 step, ours") and status == 0
        assert "0 slower, 0 faster, 1 too noisy to say" in lines[-1]


def test_what_is_not_clear_is_measured_again_and_the_mean_counts() -> None:
    old, slow, little = (result(layer(3, ours)) for ours in (1.0, 1.08, 1.03))
    noisy = result(layer(3, 1.0, bound=0.3))
    row = {"float32 8×48×32 r=3 step"}
    for new in (slow, little, noisy):
        assert compare.suspects(old, new) == row
    assert not compare.suspects(old, old) and not compare.suspects(slow, old)
    assert compare.suspects(old, slow, slow) == row and not compare.suspects(old, *3 * [slow])
    assert compare.report(old, slow, slow)[1] == 1
    assert compare.report(old, slow, old)[1] == 0  # 1.04, once as fast as before
    assert "ours: 1.000 -> 1.079" in compare.report(old, noisy, slow, slow)[0][0]
    # Rows that were not measured again stay what they were.
    assert compare.report(old, slow, result(layer(4, 1.0)))[1] == 1


def test_the_bounds_hold_the_median() -> None:
    """Each of 400 runs has 400 rounds, and every third round takes twice its time and more."""
    generator = torch.Generator().manual_seed(0)
    inside, width = 0, 0.0
    for _ in range(400):
        u = torch.rand(400, generator=generator)
        late = torch.rand(400, generator=generator) < 1 / 3
        found = timing.Ratio.from_ratios((1 + 0.1 * u + 5 * u * late).tolist())
        # P(ratio < t) = 2/3·10·(t − 1) + 1/3·(t − 1)/5.1 is 1/2 there.
        inside += found.low <= 1 + 0.5 / (20 / 3 + 1 / 15.3) <= found.high
        width += found.high / found.low / 400
    # Four errors: a miss in 16,000. The samples of ranks 160 and 240, where a per cent holds 27.
    assert inside == 400 and width == pytest.approx(1.03, abs=0.005)


def test_a_slower_machine_changes_nothing() -> None:
    old = result(layer(3, 1.0))
    new = copy.deepcopy(old)
    for name, call in new.rows[0].seconds.items():
        thrice = {key: 3 * getattr(call, key) for key in ("p20", "p50", "p80")}
        new.rows[0].seconds[name] = replace(call, **thrice)
    assert compare.report(old, new)[0] == compare.report(old, old)[0]


def test_peers_do_not_count() -> None:
    changed = layer(3, 1.0)
    changed["seconds"]["peft"] = times(1e-3, 9.0)
    assert compare.report(result(layer(3, 1.0)), result(changed))[1] == 0


def test_rows_of_one_file_alone_are_named() -> None:
    lines, status = compare.report(
        result(layer(1, 1.0), layer(2, 1.0)), result(layer(1, 1.0), layer(3, 1.0))
    )
    assert lines[:2] == [
        "only in the old file: float32 8×48×32 r=2 step, ours",
        "only in the new file: float32 8×48×32 r=3 step, ours",
    ]
    assert status == 0


def test_what_has_no_time_for_being_wrong_is_named() -> None:
    new = result({**layer(3, 1.0), "misses": {"ours": "dA MISS"}})
    del new.rows[0].seconds["ours"]
    lines, status = compare.report(result(layer(3, 1.0)), new)
    assert lines[0] == "misses the tolerance now: float32 8×48×32 r=3 step, ours" and status == 1


def test_each_kind_has_its_baseline() -> None:
    few = {"quant_type": "nf4", "M": 1, "mode": "forward"}
    assert Row(**few).baseline == "stream"
    assert Row(**{**few, "M": 512}).baseline == Row(**{**few, "mode": "step"}).baseline == "dense"
    assert Row(what="DoRA step").baseline == "PEFT's LoRA"
    assert Row(what="switching").baseline == "PEFT's"
    assert Row(M=1, mode="step").baseline == "frozen"


def test_files_of_an_earlier_version_have_the_spread_of_both_times() -> None:
    """No ratios of rounds: those of medians, and the errors of both times."""
    row = layer(3, 1.0)
    for call in row["seconds"].values():
        del call["over"]
        call |= {"p20": 0.95e-3, "p80": 1.05e-3}
    seconds = Row.from_json(row).seconds
    found = compare.Measured.from_times(seconds["ours"], seconds["frozen"])
    # σ = ln(1.05/0.95)/1.683 = 0.0595, an error of 1.253·σ/√50 = 0.0105 for each of the two.
    assert found.ratio == 1.0
    assert found.bound == pytest.approx(4 * math.sqrt(2) * 0.0105, rel=0.01)


def test_bound_covers_the_wider_side_of_the_spread() -> None:
    for low, high in ((1.6, 2.2), (1.8, 2.5)):
        times = Times(1.0, 1.1, 1.2, 100, Ratio(1.9, 2.0, 2.1, low, high))
        assert compare.Measured.from_times(times, times).bound == pytest.approx(math.log(1.25))


def test_another_machine_is_a_warning() -> None:
    lines, status = compare.report(
        result(layer(3, 1.0)), result(layer(3, 1.0), threads=8, torch="2.9")
    )
    assert lines[0] == "warning: threads: old 2, new 8: ratios may differ for that"
    assert lines[1].startswith("warning: torch: old 2.8, new 2.9") and status == 0
    lines, _ = compare.report(result(layer(3, 1.0), processor=None), result(layer(3, 1.0)))
    assert lines[0] == "warning: the old file does not say its processor"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "JSONDecodeError"),
        ("[]", "want a file of `bench --json`"),
        ('{"rows": [], "provenance": {}}', "got 0 rows of [], want rows of one kind"),
        ('{"rows": [{"M": 1}], "provenance": {}}', "KeyError('K')"),
        ('{"rows": [1], "provenance": {}}', "want a file of `bench --json`"),
        (json.dumps({"rows": [layer(3, 1.0)]}), "KeyError('provenance')"),
        (json.dumps(data(layer(3, 1.0), SWITCHING)), "2 rows of ['layers', 'variants']"),
        (json.dumps(data(layer(3, 1.0, rounds=0))), "want quintiles and rounds above 0"),
        (json.dumps(data({**layer(3, 1.0), "seconds": {"ours": {"p50": 1}}})), "TypeError"),
        (json.dumps(data({**layer(3, 1.0), "seconds": {"ours": times("1", 1.0)}})), "TypeError"),
        (json.dumps(data(SWITCHING)), "is of variants"),
    ],
)
def test_files_that_cannot_be_compared(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is run for them, and the message names the file."""
    file = tmp_path / "old.json"
    if text is not None:
        file.write_text(text)
    assert cli.main(["bench", "--compare", str(file)]) == 2
    out = capsys.readouterr().out
    assert str(file) in out and said in out and len(out.splitlines()) == 1


def test_a_run_measures_again_what_seems_slower(
    no_overhead: None, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only suspects run again, and the file holds the first run."""
    asked: list[int] = []

    def measured(case: Case, *rest: object) -> list[Row]:
        asked.append(case.R)
        first = asked.count(case.R) == 1
        row = layer(case.R, 1.06 if case.R == 2 and first else 1.0)
        return [Row.from_json({**row, "mode": mode}) for mode in ("forward", "step")]

    monkeypatch.setattr(dense, "measure", measured)
    monkeypatch.setattr(dense.Layers, "line", lambda self, row: "")
    old, rows = tmp_path / "old.json", [layer(R, 1.0) for R in (1, 2, 3)]
    old.write_text(json.dumps(data(*rows, *({**row, "mode": "forward"} for row in rows))))
    options = f"--shapes 8x48x32 --dtypes float32 --ranks 1 2 3 --compare {old}"
    ran = run(*options.split())
    assert ran.status == 0
    assert asked == [1, 2, 3, 2, 2]  # after the second the mean is 1.03, after the third 1.02
    assert "2 rows may be slower" in ran.out and "0 slower, 0 faster, 0 too noisy" in ran.out
    assert 1.06 in [row["seconds"]["ours"]["over"]["p50"] for row in ran.rows]


def test_two_files_are_compared_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "measure", None)
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(data(layer(3, 1.0))))
    new.write_text(json.dumps(data(layer(3, 1.2))))
    assert cli.main(["bench", "--compare", str(old), str(new)]) == 1
    assert "slower: float32 8×48×32 r=3 step, ours: 1.000 -> 1.200" in capsys.readouterr().out
    assert cli.main(["bench", "--compare", str(new), str(old)]) == 0
    assert cli.main(["bench", "--compare", str(old), str(new), str(new)]) == 2
    new.write_text(json.dumps(data(layer(4, 1.0))))
    assert cli.main(["bench", "--compare", str(old), str(new)]) == 2
    assert "no row of ours in common" in capsys.readouterr().out


COMMITTED = Path(__file__).parents[2] / "benchmarks/results"


@pytest.mark.parametrize("name", ["dense.json", "4bit.json", "variants.json"])
def test_the_committed_results_compare_with_themselves(name: str) -> None:
    files = list(COMMITTED.glob(f"*/{name}"))
    assert files, f"no {name}, want the results that the report is made of"
    for both in map(compare.read, files):
        lines, status = compare.report(both, both)
        assert status == 0 and "0 slower, 0 faster" in lines[-1] and not lines[-1].startswith("0 ")


def test_a_run_writes_what_a_comparison_needs(no_overhead: None, run: Any, tmp_path: Path) -> None:
    options = "--shapes 8x48x32 --ranks 3 --seconds 0 --dtypes float32"
    assert run(*options.split()).status == 0
    new = compare.read(tmp_path / "new" / "here.json")
    assert new.provenance["processor"]
    for row in new.rows:
        assert row.seconds["frozen"].over == timing.Ratio(1.0, 1.0, 1.0, 1.0, 1.0)
        over = row.seconds["ours"].over
        assert over is not None and 0 < over.low <= over.p50 <= over.high
    assert compare.report(new, new)[1] == 0


class Machine:
    """A clock that calls advance, on a machine that other programs use too.

    The pace changes over minutes, for all calls. Each call's time scatters by 5 %, and one of three
    takes twice its time. In each run a call has other memory addresses, and its time changes by
    1 %.
    """

    def __init__(self, seed: int) -> None:
        self.now, self._random = 0.0, random.Random(seed)

    def perf_counter(self) -> float:
        return self.now

    def call(self, seconds: float) -> Callable[[], None]:
        seconds *= self._random.lognormvariate(0.0, 0.01)

        def call() -> None:
            pace = 1 + 0.3 * math.sin(self.now / 20)
            late = 1 + (self._random.random() < 1 / 3)
            self.now += seconds * pace * late * self._random.lognormvariate(0.0, 0.05)

        return call

    def run(self, ours: float) -> Result:
        calls = {"frozen": self.call(0.002), "ours": self.call(0.002 * ours)}
        times, _, _ = timing.interleave_parts(calls, seconds=5.0, most=1001, baseline="frozen")
        return Result(PROVENANCE, [replace(Row.from_json(layer(3, 1.0)), seconds=times)])


@pytest.mark.parametrize(("ours", "least", "most"), [(0.6, 0, 1), (0.66, 59, 60)])
def test_ten_per_cent_are_seen_and_nothing_else(
    ours: float, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many of 60 comparisons with a call that takes 0.6 of the baseline say "slower"."""
    slower = 0
    for seed in range(60):
        machine = Machine(seed)
        monkeypatch.setattr(timing, "time", machine)
        old, looks = machine.run(0.6), [machine.run(ours)]
        while compare.suspects(old, *looks):
            looks.append(machine.run(ours))
        slower += compare.report(old, *looks)[1]
    assert least <= slower <= most


def test_interleaved_ratios_are_of_one_round() -> None:
    """The ratio stays the same even if every round takes ten times the last one's time."""
    first = [10.0**i for i in range(9)]
    found = timing.Times.from_seconds([2 * t for t in first], first)
    assert found.over == timing.Ratio(2.0, 2.0, 2.0, 2.0, 2.0) and found.p50 == 2e4
    assert torch.tensor(found.p20) < torch.tensor(found.p80)


def test_forwards_timed_otherwise_are_a_warning() -> None:
    """Before decoding was timed, forwards ran by themselves: then some were cold."""
    forward = {**layer(3, 1.0), "mode": "forward"}
    alone = result({**forward, "cache": "warm"}, {**forward, "cache": "cold"})
    parts = result({**forward, "cache": "warm"}, {**forward, "mode": "decoding", "cache": "cold"})
    said = "warning: the {} file's forwards were timed by themselves, the other's in steps"
    assert compare.report(alone, parts)[0][0] == said.format("old")
    assert compare.report(parts, alone)[0][0] == said.format("new")
    assert not any("warning" in line for line in compare.report(alone, alone)[0])
