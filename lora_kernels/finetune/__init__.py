"""Fine-tune causal language models with fused LoRA: recipes on transformers, accelerate and PEFT.

The names below are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import ChatData, Collator, check_packing, load_chat, pack
    from .checkpoints import newest_checkpoint
    from .classify import Outcome, Task, compare_methods
    from .labelled import Labelled, read_labelled
    from .merge import compare_merged, merge_adapter
    from .methods import METHODS, Method
    from .presets import PRESETS, Preset, add_lora_layers, create_domain_model
    from .rank import RankSearch, find_optimal_rank
    from .trainer import LoRATrainer, training_arguments

_HOMES = {
    "ChatData": "chat",
    "Collator": "chat",
    "check_packing": "chat",
    "load_chat": "chat",
    "pack": "chat",
    "Outcome": "classify",
    "Task": "classify",
    "compare_methods": "classify",
    "Labelled": "labelled",
    "read_labelled": "labelled",
    "METHODS": "methods",
    "Method": "methods",
    "compare_merged": "merge",
    "merge_adapter": "merge",
    "PRESETS": "presets",
    "Preset": "presets",
    "add_lora_layers": "presets",
    "create_domain_model": "presets",
    "RankSearch": "rank",
    "find_optimal_rank": "rank",
    "LoRATrainer": "trainer",
    "newest_checkpoint": "checkpoints",
    "training_arguments": "trainer",
}

__all__ = [
    "METHODS",
    "PRESETS",
    "ChatData",
    "Collator",
    "Labelled",
    "LoRATrainer",
    "Method",
    "Outcome",
    "Preset",
    "RankSearch",
    "Task",
    "UsageError",
    "add_lora_layers",
    "check_packing",
    "compare_merged",
    "compare_methods",
    "create_domain_model",
    "find_optimal_rank",
    "load_chat",
    "merge_adapter",
    "newest_checkpoint",
    "pack",
    "read_labelled",
    "training_arguments",
]


class UsageError(ValueError):
    """What was requested cannot be done; the message is one line that says what to do instead."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
