"""Readers of other libraries' quantized layers, a file for each library.

A reader has two functions. `matches(layer)` says, by the layer's attributes and without a copy,
whether the layer is its library's. `read(layer)` returns a `Reading`, or in a string why the layer
stays as it is. It raises ValueError or TypeError for tensors that no form has. No reader imports
its library.
"""

from __future__ import annotations

from types import ModuleType

from torch import nn

from . import awq, bitsandbytes, compressed_tensors, gptq, hqq, torchao, transformers
from .form import Reading

READERS: dict[str, ModuleType] = {
    "compressed-tensors": compressed_tensors,
    "torchao": torchao,
    "GPTQ": gptq,
    "AWQ": awq,
    "HQQ": hqq,
    "FP8": transformers,
    "bitsandbytes' 8 bits": bitsandbytes,
}
# A forward of these rounds x too, so that its results are not those of the decoded weight.
ROUNDS_X = frozenset({"FP8", "bitsandbytes' 8 bits"})


def library_of(layer: nn.Module) -> str | None:
    """Return the name in `READERS` of the layer's format; None if no reader takes it."""
    return next((name for name, reader in READERS.items() if reader.matches(layer)), None)


def read(layer: nn.Module) -> Reading | str | None:
    """Return what the layer's reader finds, why it cannot read it, or None without a reader."""
    library = library_of(layer)
    if library is None:
        return None
    try:
        found: Reading | str = READERS[library].read(layer)
    except (TypeError, ValueError) as error:  # a layout that no form has
        return str(error)
    return found
