"""Read labelled texts from a file, and split them for training and evaluation."""

from __future__ import annotations

import bz2
import csv
import io
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints import translate_errors
from .data import decode_text, read_file
from .errors import UsageError

HELD_OUT = 1000  # a share of right labels is then known to 1.6 points (standard error) or better
MISSING = ("", "nan")  # what an empty cell is in a table, and what pandas writes for one


@dataclass(frozen=True)
class Labelled:
    """Texts with labels.

    Attributes:
        texts: the texts.
        labels: for each text, the index of its label in `names`.
        names: the names of the labels.
        groups: for each text, the name of its group. A split does not divide a group.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, places: Sequence[int]) -> Labelled:
        """Return the texts at these indices."""
        return Labelled(
            tuple(self.texts[i] for i in places),
            tuple(self.labels[i] for i in places),
            self.names,
            tuple(self.groups[i] for i in places),
        )

    def split(
        self, train: int | None = None, held_out: int | None = None, seed: int = 0
    ) -> tuple[Labelled, Labelled]:
        """Return `train` texts, and `held_out` others that share no group with them.

        The default of `held_out` is `HELD_OUT`, or a third of the texts if there are fewer. That of
        `train` is twice as many, as far as groups allow.

        >>> data = Labelled(("a", "b", "c"), (0, 1, 0), ("no", "yes"), ("x", "y", "x"))
        >>> [part.texts for part in data.split(2, 1, seed=1)]
        [('a', 'c'), ('b',)]
        """
        default = train is None
        if held_out is None:
            held_out = max(1, min(HELD_OUT, (len(self) - (train or 0)) // (1 if train else 3)))
        if train is None:
            train = max(1, min(2 * HELD_OUT, len(self) - held_out))
        if train < 1 or held_out < 1 or train + held_out > len(self):
            raise UsageError(
                f"--train and --held-out: got {train} and {held_out}, want at least one each and "
                f"at most {len(self)} together, which is what the data has"
            )
        draw = random.Random(seed)
        groups = sorted(set(self.groups))
        draw.shuffle(groups)
        size, taken, count = Counter(self.groups), set[str](), 0
        for group in groups:
            if count < held_out:
                taken.add(group)
                count += size[group]
        parts = []
        for name, wanted, held in (("--train", train, False), ("--held-out", held_out, True)):
            found = [i for i, group in enumerate(self.groups) if (group in taken) is held]
            if default and not held:
                wanted = max(1, min(wanted, len(found)))
            if len(found) < wanted:
                raise UsageError(
                    f"{name}: got {wanted}, want at most {len(found)}: groups stay on one side"
                )
            parts.append(self.take(sorted(draw.sample(found, wanted))))
        return parts[0], parts[1]


def read_labelled(
    file: str | Path,
    text: str = "text",
    label: str = "label",
    group: str | None = None,
    labels: Sequence[str] | None = None,
) -> Labelled:
    """Read labelled texts: JSON lines (.jsonl) or a table with a header (.csv, .csv.bz2).

    Repeated texts are skipped.

    Args:
        file: the file to read.
        text, label, group: names of fields. Without `group` each text is its own group.
        labels: the labels to keep. None: all.

    Raises UsageError that names the line if a field is missing, the JSON is invalid, or a label is
    blank or "nan" and `labels` is None. Raises UsageError if fewer than two labels are left.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "mail.csv")
    >>> _ = file.write_text("text,label\\nBuy now,spam\\nSee you at six,ham\\n")
    >>> read_labelled(file).names
    ('ham', 'spam')
    """
    wanted = [name for name in (text, label, group) if name is not None]
    seen: dict[str, tuple[str, str]] = {}
    for number, record in _records(Path(file)):
        where = f"data: {file}, line {number}"
        for field in wanted:
            if field not in record:
                raise UsageError(
                    f"{where}: no field {field!r}; it has {', '.join(map(str, record)) or 'none'}; "
                    "--text, --label and --group name others"
                )
            if not isinstance(record[field], str | int):
                raise UsageError(
                    f"{where}: {field}: got {json.dumps(record[field])[:40]}, want a string or a "
                    "whole number"
                )
        name = str(record[label])
        if labels is None and name.strip().lower() in MISSING:
            raise UsageError(
                f"{where}: {label}: got {name!r}, want a label; take the line out, or name the "
                "labels to keep by --labels"
            )
        if labels is None or name in labels:
            seen.setdefault(str(record[text]), (name, str(record[group] if group else number)))
    names = sorted({name for name, _ in seen.values()})
    if len(names) < 2:
        raise UsageError(
            f"data: {file} has the labels {', '.join(names) or 'none'}; want two at least"
        )
    found, groups = zip(*seen.values(), strict=True)
    return Labelled(tuple(seen), tuple(map(names.index, found)), tuple(names), groups)


def _records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the file's records, each with the number of its last line."""
    data = read_file(file, "data", "JSON lines (.jsonl) or a .csv")
    if file.suffix == ".bz2":
        with translate_errors(f"data: {file} cannot be decompressed", OSError, ValueError):
            data = bz2.decompress(data)
    content = decode_text(data, file, "data")
    kind = file.name.removesuffix(".bz2").rpartition(".")[2]
    if kind == "csv":
        reader = csv.DictReader(io.StringIO(content))
        with translate_errors(f"data: {file} is no table", csv.Error):
            yield from ((reader.line_num, record) for record in reader)
    elif kind == "jsonl":
        # str.splitlines would also break at separators that JSON allows in a string.
        for number, line in enumerate(content.split("\n"), 1):
            if not line.strip():
                continue
            where = f"data: {file}, line {number}"
            with translate_errors(f"{where}: no JSON", ValueError, RecursionError):
                record = json.loads(line)
            if not isinstance(record, dict):
                raise UsageError(f"{where}: got no object, want one")
            yield number, record
    else:
        raise UsageError(f"data: got {file}, want JSON lines (.jsonl) or a .csv")
