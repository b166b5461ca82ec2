"""`lora-kernels bench --compare OLD.json [NEW.json]`: regressions and gains above the noise.

Seconds of two runs do not compare: the machine may be busier, or its clock lower. So each time is
divided by the baseline of its own row, which took turns with it in the same run. The baseline is
the frozen layer. For 4-bit bases it is a plain read of the codes (up to 16 rows of x, which are
memory-bandwidth-bound) or the dense layer; for variants it is PEFT's equivalent. Only calls that
run this package's kernels are compared, no peers.

The noise of a row comes from its samples, the ratios of single rounds: their median is uncertain by
how far apart the samples of ranks n/2 ± 2√n lie, which bound it to four standard errors whatever
the distribution (`timing.Ratio`). A standard deviation, or p20 and p80, would not do: if other
programs use the cores, every third round takes twice its time and the median stays. Two runs
differ if their medians lie further apart than

    max(5 %, √(bound² of the old + bound² of the new))          in logarithms

Four errors, because a comparison has a hundred rows and neighbouring rounds are not independent. At
least 5 %, because medians of one build scatter by 2 to 3 % from run to run even if the samples of
each say a tenth of that: memory addresses and other programs differ. Noise above 20 % means that
threads waited for other programs. Such a row is reported as too noisy and does not count.

Another program that runs for longer than a row is in all of the row's samples. So a run measures
some rows again, after all other rows and up to LOOKS times in all: rows that seem slower by half of
the 5 %, or are too noisy. It takes the mean of the logarithms, weighed by 1 / (bound² + 2.5 %²).

A file of an earlier version has no ratios of rounds. Then the ratio of medians is taken, with four
errors of both calls, each 1.253·σ/√n, as if its times were normal: σ = ln(p80/p20)/1.683.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from .results import Result, Row, is_ours
from .timing import Times

LOOKS = 3  # at a row that is not clear
LEAST, MOST = 0.05, 0.20  # noise: the smallest threshold, and the largest at which a row counts
VERDICTS = ("slower", "faster", "too noisy", "same")
# A median of n normal samples has an error of √(π/2)·σ/√n, and ln p80 − ln p20 is 2·0.8416·σ.
MEDIAN_ERROR, QUINTILES_APART = math.sqrt(math.pi / 2), 1.683

# Facts that must agree for ratios to be comparable, and their names.
MACHINE = {
    "processor": "processor",
    "machine": "architecture",
    "isa": "instruction set",
    "threads": "threads",
    "gpu": "GPU",
    "torch": "torch",
    "peft": "PEFT",
}


@dataclass(frozen=True)
class Measured:
    """A time over its baseline's, and the bound on its logarithm's error: four standard errors."""

    ratio: float
    bound: float

    @classmethod
    def from_times(cls, times: Times, baseline: Times) -> Measured:
        """Build the ratio from the times of a call and of its baseline.

        >>> from lora_kernels.bench.timing import Ratio
        >>> call = Times(1.0, 1.1, 1.2, 100, Ratio(2.0, 2.0, 2.0, 2.0, 2.0))
        >>> Measured.from_times(call, call)
        Measured(ratio=2.0, bound=0.0)
        """
        if over := times.over:
            return cls(over.p50, math.log(max(over.high / over.p50, over.p50 / over.low)))
        sigmas = [math.log(t.p80 / t.p20) / QUINTILES_APART for t in (times, baseline)]
        error = MEDIAN_ERROR * math.hypot(*sigmas) / math.sqrt(times.rounds)
        return cls(times.p50 / baseline.p50, 4 * error)

    @classmethod
    def mean(cls, looks: Sequence[Measured]) -> Measured:
        """Return the mean of several runs, weighed by their precision.

        >>> Measured.mean([Measured(1.0, 0.02), Measured(1.21, 0.02)])
        Measured(ratio=1.1, bound=0.014142135623730952)
        """
        weights = [1 / (look.bound**2 + (LEAST / 2) ** 2) for look in looks]
        logarithm = sum(w * math.log(m.ratio) for w, m in zip(weights, looks, strict=True))
        bounds = [w * m.bound for w, m in zip(weights, looks, strict=True)]
        return cls(math.exp(logarithm / sum(weights)), math.hypot(*bounds) / sum(weights))


@dataclass(frozen=True)
class Change:
    """One of our calls in both files: its row in words, and its name there."""

    row: str
    call: str
    old: Measured
    new: Measured

    @property
    def factor(self) -> float:
        """The new ratio over the old one; above 1 is slower."""
        return self.new.ratio / self.old.ratio

    @property
    def noise(self) -> float:
        """The noise threshold: how far `factor` may be from 1 without meaning."""
        return max(LEAST, math.expm1(math.hypot(self.old.bound, self.new.bound)))

    @property
    def verdict(self) -> str:
        """One of VERDICTS, by the same threshold for slower and faster."""
        if self.noise > MOST:
            return "too noisy"
        if max(self.factor, 1 / self.factor) <= 1 + self.noise:
            return "same"
        return "slower" if self.factor > 1 else "faster"

    def __str__(self) -> str:
        return (
            f"{self.row}, {self.call}: {self.old.ratio:.3f} -> {self.new.ratio:.3f}, "
            f"{self.factor - 1:+.1%} (noise {self.noise:.1%})"
        )


class NotComparable(ValueError):
    """The files hold no times, or times of different things."""


def read(path: Path) -> Result:
    """Read a file that `bench --json` wrote; NotComparable for any other file."""
    try:
        data = json.loads(path.read_text())
        rows = [Row.from_json(row) for row in data["rows"]]
        if len(kinds := sorted({row.kind for row in rows})) != 1:
            raise ValueError(f"got {len(rows)} rows of {kinds}, want rows of one kind")
        for name, times in ((name, t) for row in rows for name, t in row.seconds.items()):
            numbers = [times.p20, times.p50, times.p80, times.rounds]
            numbers += astuple(times.over) if times.over else ()
            if not all(0 < n < math.inf for n in numbers):
                raise ValueError(f"{name!r}: got {times}, want quintiles and rounds above 0")
        return Result({**data["provenance"]}, rows)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise NotComparable(f"{path}: got {error!r}, want a file of `bench --json`") from None


def warnings(old: Result, new: Result) -> Iterator[str]:
    """Yield a warning for each fact in which the machines of two files differ."""
    for key, name in MACHINE.items():
        values = [result.provenance.get(key) for result in (old, new)]
        if key == "gpu":
            values = [gpu and gpu["name"] for gpu in values]
        if values[0] == values[1]:
            continue
        if key == "processor" and None in values:
            said = "old" if values[0] is None else "new"
            yield f"warning: the {said} file does not say its processor"
        else:
            yield f"warning: {name}: old {values[0]}, new {values[1]}: ratios may differ for that"
    # Files from before decoding was timed have cold forwards.
    cold = ("layers", "forward", "cold")
    alone = [any((r.kind, r.mode, r.cache) == cold for r in both.rows) for both in (old, new)]
    if alone[0] != alone[1]:
        said = "old" if alone[0] else "new"
        yield f"warning: the {said} file's forwards were timed by themselves, the other's in steps"


Key = tuple[str, str]  # the row in words, the call's name


def changes(old: Result, *new: Result) -> tuple[list[Change], list[Key], list[Key]]:
    """Return our calls in both files, those only in the old file, and those only in the new.

    new: a file, and rows of it that were measured again.
    """
    kinds = [result.rows[0].kind for result in (old, *new)]
    if len(set(kinds)) > 1:
        raise NotComparable(f"compare: the old file is of {kinds[0]}, the new of {kinds[1]}")
    before, looks = _ours(old), [_ours(result) for result in new]
    after = {key: Measured.mean([look[key] for look in looks if key in look]) for key in looks[0]}
    both = [Change(*key, before[key], after[key]) for key in before if key in after]
    return both, [k for k in before if k not in after], [k for k in after if k not in before]


def suspects(old: Result, *new: Result) -> set[str]:
    """Return the rows, in words, to measure again; none after LOOKS. new: as for `changes`."""
    if len(new) >= LOOKS:
        return set()
    both, _, _ = changes(old, *new)
    return {c.row for c in both if c.factor > 1 + LEAST / 2 or c.verdict == "too noisy"}


def _ours(result: Result) -> dict[Key, Measured]:
    return {
        (row.identity, name): Measured.from_times(times, row.seconds[row.baseline])
        for row in result.rows
        for name, times in row.seconds.items()
        if is_ours(name) and row.baseline in row.seconds
    }


def report(old: Result, *new: Result) -> tuple[list[str], int]:
    """Return lines to print, and the exit status: 1 for a regression or a wrong result.

    Raises NotComparable if no row is in both.

    new: as for `changes`.
    """
    both, gone, added = changes(old, *new)
    both.sort(key=lambda change: -change.factor)
    by_verdict = {verdict: [c for c in both if c.verdict == verdict] for verdict in VERDICTS}
    misses = {(row.identity, name) for row in new[0].rows for name in row.misses}
    wrong = [key for key in gone if key in misses]
    if not both and not wrong:
        raise NotComparable("compare: the files have no row of ours in common")
    lines = [*warnings(old, new[0])]
    for verdict in VERDICTS[:-1]:
        lines += [f"{verdict}: {change}" for change in by_verdict[verdict]]
    for said, keys in (
        ("misses the tolerance now", wrong),
        ("only in the old file", [key for key in gone if key not in misses]),
        ("only in the new file", added),
    ):
        lines += [f"{said}: {row}, {call}" for row, call in keys]
    slower, faster, noisy, same = (len(found) for found in by_verdict.values())
    lines.append(
        f"{len(both)} compared, each over its own baseline: {slower} slower, {faster} faster, "
        f"{noisy} too noisy to say, {same} the same within the noise"
    )
    return lines, 1 if slower or wrong else 0
