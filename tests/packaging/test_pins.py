"""The tools that judge the source have one version, wherever they are named."""

import re

from .conftest import ROOT


def pins(file: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r'"([\w-]+)==([\w.]+)"', (ROOT / file).read_text()):
        found.setdefault(name, set()).add(version)
    return found


def test_pre_commit_has_the_pins_of_the_dev_extra() -> None:
    dev = pins("pyproject.toml")
    hooks = pins(".pre-commit-config.yaml")
    assert {"ruff", "clang-format"} <= hooks.keys()
    assert hooks == {name: dev[name] for name in hooks}
