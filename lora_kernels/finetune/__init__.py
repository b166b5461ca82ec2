"""Fine-tune causal language models with fused LoRA: recipes on transformers, accelerate and PEFT.

The names below are imported at their first use, because transformers and PEFT import slowly.
"""

# ruff: noqa: F401 (the names of `__all__`, for type checkers)

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import TrainingError, UsageError

if TYPE_CHECKING:
    from .chat import ChatData, Collator, check_flattening, load_chat
    from .checkpoints import newest_checkpoint
    from .classify import Outcome, Task, compare_methods
    from .export import export_gguf
    from .labelled import Labelled, read_labelled
    from .merge import merge_adapter
    from .methods import METHODS, Method
    from .presets import PRESETS, Preset, add_lora_layers, create_domain_model
    from .rank import RankSearch, find_optimal_rank
    from .trainer import LoRATrainer, training_arguments

_NAMES = {
    "chat": ["ChatData", "Collator", "check_flattening", "load_chat"],
    "checkpoints": ["newest_checkpoint"],
    "classify": ["Outcome", "Task", "compare_methods"],
    "export": ["export_gguf"],
    "labelled": ["Labelled", "read_labelled"],
    "merge": ["merge_adapter"],
    "methods": ["METHODS", "Method"],
    "presets": ["PRESETS", "Preset", "add_lora_layers", "create_domain_model"],
    "rank": ["RankSearch", "find_optimal_rank"],
    "trainer": ["LoRATrainer", "training_arguments"],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["TrainingError", "UsageError", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
