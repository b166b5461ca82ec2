"""Train, count, save and load the adapters of a model's LoRA layers."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from .layer import LoRALayer
from .variants import AdaLoRALinear


class LoRAParameterCount(NamedTuple):
    """The number of parameters in the adapters, and in the rest of the model.

    >>> from lora_kernels.layers import LoRAParameterCount
    >>> print(LoRAParameterCount(65_536, 16_777_216))
    65,536 of 16,777,216 (0.39 %)
    """

    lora: int
    base: int

    def __str__(self) -> str:
        return f"{self.lora:,} of {self.base:,} ({100 * self.lora / self.base:.2f} %)"


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Freeze all parameters of `model` except the adapters', which become trainable.

    Adapters are the parameters that this package's LoRA layers own, whatever their names. A module
    that is named `lora_query` but is no such layer is frozen.

    Raises ValueError if the model has no LoRA layer.

    >>> from torch import nn
    >>> from lora_kernels.layers import LoRALinear, mark_only_lora_as_trainable
    >>> model = nn.Sequential(nn.Linear(8, 8), LoRALinear(8, 8))
    >>> mark_only_lora_as_trainable(model)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['1.lora_A', '1.lora_B']
    """
    lora = dict(_lora_parameters(model))
    model.requires_grad_(False)
    for param in lora.values():
        param.requires_grad_(True)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the entries of `model.state_dict()` for adapters and rank masks, sharing memory.

    Raises ValueError if the model has no LoRA layer.

    >>> from lora_kernels.layers import LoRALinear, lora_state_dict
    >>> {key: tuple(t.shape) for key, t in lora_state_dict(LoRALinear(4, 6, r=2)).items()}
    {'lora_A': (2, 4), 'lora_B': (6, 2)}
    """
    found = {name: param.detach() for name, param in _lora_parameters(model)}
    for prefix, layer in model.named_modules():
        if isinstance(layer, AdaLoRALinear):
            found[f"{prefix}.rank_mask".lstrip(".")] = layer.rank_mask
    return found


def count_lora_parameters(model: nn.Module) -> LoRAParameterCount:
    """Count the parameters of the adapters and of the rest: `(lora, base)`.

    Raises ValueError if the model has no LoRA layer.

    >>> from lora_kernels.layers import LoRALinear, count_lora_parameters
    >>> print(count_lora_parameters(LoRALinear(4096, 4096, r=8, device="meta")))
    65,536 of 16,777,216 (0.39 %)
    """
    lora = sum(param.numel() for _, param in _lora_parameters(model))
    return LoRAParameterCount(lora, sum(p.numel() for p in model.parameters()) - lora)


def save_lora_weights(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Save `lora_state_dict(model)` as safetensors; print and return the file's size in bytes.

    Each tensor is saved in its own dtype. The write is atomic: if the process ends early, `path`
    is unchanged. Raises ValueError if the model has no LoRA layer, and OSError if the file cannot
    be written.

    >>> import tempfile
    >>> from lora_kernels.layers import LoRALinear, save_lora_weights
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save_lora_weights(LoRALinear(64, 64, r=4), f"{folder}/adapter.safetensors")
    saved 2,224 bytes to ...adapter.safetensors
    """
    from safetensors.torch import save

    path = Path(path)
    tensors = {name: t.contiguous() for name, t in lora_state_dict(model).items()}
    data = save(tensors, metadata={"format": "pt"})
    # A rename is atomic only within a file system, hence a file in the same folder.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    print(f"saved {len(data):,} bytes to {path}")
    return len(data)


def load_lora_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the adapters of `model` from a file that `save_lora_weights` wrote.

    Parameters keep their devices and dtypes; values in a wider dtype are rounded. A merged layer
    is merged again.

    Raises:
        ValueError: the model has no LoRA layer, a key is missing, unexpected or of another shape,
            or the file is not in safetensors format. The model is unchanged.
        OSError: the file cannot be read.

    >>> import tempfile, torch
    >>> from lora_kernels.layers import LoRALinear, load_lora_weights, save_lora_weights
    >>> trained, fresh = LoRALinear(8, 8), LoRALinear(8, 8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_lora_weights(trained, f"{folder}/adapter.safetensors")
    ...     load_lora_weights(fresh, f"{folder}/adapter.safetensors")
    saved ...
    >>> torch.equal(fresh.lora_A, trained.lora_A)
    True
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    want = lora_state_dict(model)
    try:
        have = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    problems = [f"missing {key}" for key in want if key not in have]
    problems += [f"unexpected {key}" for key in have if key not in want]
    problems += [
        f"{key} is {list(have[key].shape)}, want {list(want[key].shape)}"
        for key in want
        if key in have and have[key].shape != want[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems[:8])}{more}")
    model.load_state_dict(have, strict=False)


def _lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the adapters' parameters with their full names; ValueError without LoRA layers."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALayer)]
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without a LoRA layer, want one or more"
        )
    for prefix, layer in layers:
        for name, param in layer.named_parameters(prefix, recurse=False):
            base = name.rpartition(".")[2] in ("weight", "bias") or not param.is_floating_point()
            if not base:
                yield name, param
