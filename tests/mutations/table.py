"""The table of mutations of csrc/, and where each applies."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).parent / "table.toml"


@dataclass(frozen=True)
class Mutation:
    """One small mistake in one function.

    Args:
        id: its name.
        description: what the mutant does wrong.
        file: path from the repository's root.
        find: text that occurs once in `inside`.
        replace: what stands there in the mutant.
        tests: arguments of pytest, after variables for its environment.
        inside: function or class; "" for the whole file.
        needs: instruction set without which no test can notice the mutant, or "".
    """

    id: str
    description: str
    file: str
    find: str
    replace: str
    tests: str
    inside: str = ""
    needs: str = ""

    @property
    def is_native(self) -> bool:
        """True if the mutant has to be compiled."""
        return self.file.startswith("csrc/")

    def apply(self, text: str) -> str:
        """Return the mutant of the file's text; ValueError if `find` does not occur once."""
        start, end = function_span(text, self.inside)
        count = text.count(self.find, start, end)
        if count != 1:
            where = f"{self.file}, {self.inside or 'the whole file'}"
            raise ValueError(f"{self.id}: `find` occurs {count} times in {where}, want once")
        return text[:start] + text[start:end].replace(self.find, self.replace) + text[end:]


def read(path: Path = TABLE) -> list[Mutation]:
    """Read the table; ValueError for a repeated id or another file."""
    found = []
    for name, entry in tomllib.loads(path.read_text()).items():
        file, _, inside = entry.pop("file").partition("::")
        if not file.startswith("csrc/"):
            raise ValueError(f"{name}: file: got {file}, want one in csrc/")
        found.append(Mutation(name, file=file, inside=inside, **entry))
    return found


def function_span(text: str, name: str) -> tuple[int, int]:
    """Return where the function or class of this name starts and ends; the whole text for "".

    Raises ValueError unless it is defined once.

    >>> text = "int f(int n) { return n; }\\nint g() { return f(2); }"
    >>> start, end = function_span(text, "f")
    >>> text[start:end]
    'f(int n) { return n; }'
    """
    if not name:
        return 0, len(text)
    spans = _spans(text, name)
    if len(spans) != 1:
        raise ValueError(f"{name} is defined {len(spans)} times, want once")
    return spans[0]


def _spans(text: str, name: str) -> list[tuple[int, int]]:
    """Find definitions `name(...) ... {...}` and `struct name {...}` by matching brackets."""
    spans = []
    for match in re.finditer(rf"\b{re.escape(name)}\s*\(", text):
        after = _match_bracket(text, match.end() - 1)
        body = re.compile(r"\s*(?:const\b|noexcept\b|->\s*[\w:<>]+|:[^;{]*)?\s*\{").match(
            text, after
        )
        if body:
            spans.append((match.start(), _match_bracket(text, body.end() - 1)))
    for match in re.finditer(rf"\b(?:struct|class)\s+{re.escape(name)}\b[^;{{(]*\{{", text):
        spans.append((match.start(), _match_bracket(text, match.end() - 1)))
    return spans


def _match_bracket(text: str, start: int) -> int:
    """Return the place after the bracket that closes the one at `start`.

    Brackets in strings and comments count too; the sources keep them balanced.
    """
    pair, depth = {"(": ")", "{": "}"}[text[start]], 0
    for at in range(start, len(text)):
        if text[at] == text[start]:
            depth += 1
        elif text[at] == pair:
            depth -= 1
            if not depth:
                return at + 1
    raise ValueError(f"no bracket closes the one at {start}")
