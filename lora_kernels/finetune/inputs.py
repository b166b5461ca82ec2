"""The model and the data of a command, read before weights are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .chat import ChatData


def check_inputs(options: Any) -> None:
    """Raise UsageError for a model or data that cannot be read, before the slow imports."""
    from .chat import check_files
    from .model import check_quant, locate

    locate(options.model)
    check_quant(getattr(options, "quant", None), options.model)
    check_files(options.data)


def read_inputs(
    options: Any, targets: Iterable[str], rank: int, argument: str = "rank"
) -> tuple[torch.device, Any, int, ChatData]:
    """Return the device, the tokenizer, the maximum length of an example, and the data.

    Reads no weights. Raises UsageError if the options or the data do not fit the model.
    """
    from . import model
    from .chat import load_chat
    from .presets import check_adapter

    device = model.usable_device(options.device)
    skeleton = model.build_skeleton(options.model)
    check_adapter(skeleton, targets, rank, argument)
    tokenizer = model.load_tokenizer(options.model)
    length = model.check_length(options.max_length, skeleton)
    data = load_chat(options.data, tokenizer, max_length=length)
    return device, tokenizer, length, data
