"""The documents name files that exist, and CI runs the README's test command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "csrc", "docs", "lora_kernels", "tests")
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
DOCUMENTS += ROOT.glob("lora_kernels/*/README.md")
NAMED = re.compile(r"`([\w/.]+\.(?:py|toml|txt|md|cpp|cuh?|h))`")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(document: Path) -> set[str]:
    """Return the names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_point_to_files_and_headings(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", document.read_text(encoding="utf-8"))
    for link, heading in links:
        target = document.parent / link if link else document
        assert target.exists(), link
        assert not heading or heading in anchors(target), f"{link}#{heading}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_named_source_files_exist(document: Path) -> None:
    files = [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    named = set(NAMED.findall(document.read_text(encoding="utf-8"))) - {"mine.py"}
    assert not [
        name for name in named if not any(file.as_posix().endswith(f"/{name}") for file in files)
    ]


def test_ci_runs_the_readme_s_test_command() -> None:
    last = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    command = last.removeprefix("exec ")
    assert f"    {command} " in (ROOT / "README.md").read_text(encoding="utf-8")


def test_contributing_lists_each_environment_variable() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "lora_kernels").rglob("*.py")]
    sources += (ROOT / "tests").rglob("*.py")
    read = {
        name
        for source in sources
        for name in re.findall(r"[\"'](LORA_KERNELS_[A-Z_]+)\b", source.read_text("utf-8"))
    }
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    listed = re.findall(r"^\| `(LORA_KERNELS_\w+)` \| (?:build|run|tests) \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(read)
