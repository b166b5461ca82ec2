"""Find the idioms of idioms.toml in comments, strings and prose: `python -m tests.lint`."""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "csrc", "docs", "lora_kernels", "tests")
C_PROSE = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", re.DOTALL)
PYTHON_PROSE = ("COMMENT", "STRING", "FSTRING_MIDDLE")
SUFFIXES = (".cpp", ".cu", ".cuh", ".h", ".md", ".py")


def python_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield where each comment and string of a Python file starts and ends."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if tokenize.tok_name[token.type] in PYTHON_PROSE:
            (row, column), (end_row, end_column) = token.start, token.end
            yield starts[row - 1] + column, starts[end_row - 1] + end_column


def prose(text: str, suffix: str) -> str:
    """Return the text with code masked by "\\0", and with blanks for the marks of comments.

    Positions stay the same. A phrase is found across the lines of a comment, but not across code.
    """
    if suffix == ".md":
        return text
    spans = python_spans(text) if suffix == ".py" else (m.span() for m in C_PROSE.finditer(text))
    masked, end = [], 0
    for start, stop in spans:
        masked.append(re.sub(r"\S", "\0", text[end:start]))
        masked.append(re.sub(r"^(#|//)", lambda mark: " " * len(mark[0]), text[start:stop]))
        end = stop
    return "".join(masked) + re.sub(r"\S", "\0", text[end:])


def find_idioms(path: str, text: str, idioms: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a message for each idiom that the text of a file contains."""
    sentences = prose(text, Path(path).suffix)
    for idiom in idioms:
        searched = text if idiom.get("identifiers") else sentences
        pattern = idiom["find"].replace(" ", r"\s+")
        for found in re.finditer(pattern, searched, re.IGNORECASE):
            first = text.rfind("\n", 0, found.start()) + 1
            last = text.find("\n", found.end())
            if not any(allowed in text[first:last] for allowed in idiom.get("allow", ())):
                line = text.count("\n", 0, found.end()) + 1
                phrase = " ".join(found[0].replace("\0", "").split())
                yield f'{path}:{line}: "{phrase}": say "{idiom["say"]}"'


def main() -> int:
    settings = tomllib.loads(Path(__file__).with_name("idioms.toml").read_text(encoding="utf-8"))
    files = [*ROOT.glob("*"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))]
    messages = []
    for file in sorted(file for file in files if file.suffix in SUFFIXES):
        path = file.relative_to(ROOT).as_posix()
        if not path.startswith(tuple(settings["exclude"])):
            messages += find_idioms(path, file.read_text(encoding="utf-8"), settings["idiom"])
    print("\n".join(messages) or "no idioms")
    return int(bool(messages))


if __name__ == "__main__":
    sys.exit(main())
