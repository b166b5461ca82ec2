"""The documents name files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "csrc", "docs", "lora_kernels", "tests")
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
DOCUMENTS += ROOT.glob("lora_kernels/*/README.md")
NAMED = re.compile(r"`([\w/.]+\.(?:py|toml|txt|md|cpp|cuh?|h))`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_point_to_files(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8"))
    assert not [link for link in links if not (document.parent / link).exists()]


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "benchmarks/KERNELS.md"])
def test_named_source_files_exist(document: str) -> None:
    files = [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    named = set(NAMED.findall((ROOT / document).read_text(encoding="utf-8")))
    assert not [
        name for name in named if not any(file.as_posix().endswith(f"/{name}") for file in files)
    ]
