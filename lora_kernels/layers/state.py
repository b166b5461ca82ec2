"""What is trained, counted, saved and loaded of a model's LoRA layers, and nothing else of it."""

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
    """Elements in the adapters, and in all else of the model.

    >>> from lora_kernels.layers import LoRAParameterCount
    >>> print(LoRAParameterCount(65_536, 16_777_216))
    65,536 of 16,777,216 (0.39 %)
    """

    lora: int
    base: int

    def __str__(self) -> str:
        return f"{self.lora:,} of {self.base:,} ({100 * self.lora / self.base:.2f} %)"


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Freeze every parameter of `model` but its adapters', and unfreeze those.

    An adapter's parameter is one that a LoRA layer of this package owns, whatever its name; a
    module that happens to be called `lora_query` is frozen. Raises ValueError without such layers.

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
    """The adapters' part of `model.state_dict()`, masks of ranks too: the same keys and memory.

    Raises ValueError where the model has no LoRA layer.

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
    """How small the adapters are: `(lora, base)`, printed as "lora of base (share)".

    Raises ValueError where the model has no LoRA layer.

    >>> from lora_kernels.layers import LoRALinear, count_lora_parameters
    >>> print(count_lora_parameters(LoRALinear(4096, 4096, r=8, device="meta")))
    65,536 of 16,777,216 (0.39 %)
    """
    lora = sum(param.numel() for _, param in _lora_parameters(model))
    return LoRAParameterCount(lora, sum(p.numel() for p in model.parameters()) - lora)


def save_lora_weights(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write `lora_state_dict(model)` as safetensors; prints and returns the file's size in bytes.

    Each tensor in its own dtype. Atomic: `path` holds either what it held before or the whole new
    file, whenever the process ends. Raises ValueError where the model has no LoRA layer, OSError
    where the file cannot be written.

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
    # In the same folder, since a rename is atomic only within a file system.
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
    """Copy the adapters that `save_lora_weights` wrote into `model`'s.

    The model's devices and dtypes stay: values are rounded to the parameter's dtype where the
    file's is wider. A merged layer is merged afresh. Raises ValueError, with the model unchanged,
    where the model has no LoRA layer, a key is missing, unexpected or of another shape,
    or the file is no safetensors; OSError where it cannot be read.

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
    """What the LoRA layers own beside their base, by its full name."""
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
