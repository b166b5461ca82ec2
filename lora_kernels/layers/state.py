"""Train, count, save and load the adapters of a model's LoRA layers."""

from __future__ import annotations

import json
import os
import re
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from .experts import LoRAExperts
from .layer import LoRALayer
from .variants import AdaLoRALinear

CONFIG = "lora_layers"  # the file's metadata: JSON, layer -> its `adapter_config`


class LoRAParameterCount(NamedTuple):
    """The number of parameters in the adapters, and of all other parameters.

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

    The entries do not contain alpha. Load them into a model that was built with the same arguments,
    or use `save_lora_weights`, which stores alpha.

    Raises ValueError if the model has no LoRA layer.

    >>> from lora_kernels.layers import LoRALinear, lora_state_dict
    >>> {key: tuple(t.shape) for key, t in lora_state_dict(LoRALinear(4, 6, r=2)).items()}
    {'lora_A': (2, 4), 'lora_B': (6, 2)}
    """
    state = {name: param.detach() for name, param in _lora_parameters(model)}
    for prefix, layer in model.named_modules():
        if isinstance(layer, AdaLoRALinear):
            state[f"{prefix}.rank_mask".lstrip(".")] = layer.rank_mask
    return state


def count_lora_parameters(model: nn.Module) -> LoRAParameterCount:
    """Return the number of adapter parameters and of all others, `(lora, base)`.

    Raises ValueError if the model has no LoRA layer.

    >>> from lora_kernels.layers import LoRALinear, count_lora_parameters
    >>> print(count_lora_parameters(LoRALinear(4096, 4096, r=8, device="meta")))
    65,536 of 16,777,216 (0.39 %)
    """
    lora = sum(param.numel() for _, param in _lora_parameters(model))
    return LoRAParameterCount(lora, sum(p.numel() for p in model.parameters()) - lora)


def save_lora_weights(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Save `lora_state_dict(model)` as safetensors; print and return the file's size in bytes.

    Each tensor is saved in its own dtype. The metadata holds each layer's r, alpha and scaling,
    which `load_lora_weights` checks. The write is atomic: if the process ends early, `path` is
    unchanged, and the next save to it removes the temporary file. Raises ValueError if the model
    has no LoRA layer, and OSError if the file cannot be written.

    >>> import tempfile
    >>> from lora_kernels.layers import LoRALinear, save_lora_weights
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save_lora_weights(LoRALinear(64, 64, r=4), f"{folder}/adapter.safetensors")
    saved 2,296 bytes to ...adapter.safetensors
    """
    from safetensors.torch import save

    path = Path(path)
    tensors = {name: t.contiguous() for name, t in lora_state_dict(model).items()}
    config = {name: layer.adapter_config() for name, layer in _lora_layers(model)}
    data = save(tensors, metadata={"format": "pt", CONFIG: json.dumps(config)})
    _replace_file(path, data)
    print(f"saved {len(data):,} bytes to {path}")
    return len(data)


def _replace_file(path: Path, data: bytes) -> None:
    """Write the file by a rename, which is atomic only within a folder's file system.

    Temporary files of earlier saves are removed first. A save that runs in another process may lose
    its temporary file so, and then writes another one: saves need no lock, which some file systems
    lack, and none of them sees a part of another one's data.
    """
    temporary = re.compile(re.escape(f".{path.name}.") + "[0-9a-f]{32}")
    for other in path.parent.iterdir():
        if temporary.fullmatch(other.name):
            with suppress(OSError):  # another user's, or removed meanwhile
                other.unlink()
    while True:
        temp_file = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with open(temp_file, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileNotFoundError):  # another save has removed it
                os.replace(temp_file, path)
                return
        except BaseException:
            temp_file.unlink(missing_ok=True)
            raise


def load_lora_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the adapters of `model` from a file that `save_lora_weights` wrote.

    Parameters keep their devices and dtypes; values in a wider dtype are rounded. A merged layer
    is merged again. A file without a layer's alpha, as older ones, is loaded with a warning.

    Raises:
        ValueError: the model has no LoRA layer, a key is missing, unexpected or of another shape,
            a layer's alpha or another argument differs from the saved one, or the file is not in
            safetensors format. The model is unchanged.
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
    from safetensors import SafetensorError, safe_open

    want = lora_state_dict(model)
    try:
        with safe_open(path, "pt") as file:
            loaded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            saved_configs = json.loads((file.metadata() or {}).get(CONFIG, "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    if not (
        isinstance(saved_configs, dict)
        and all(isinstance(config, dict) for config in saved_configs.values())
    ):
        raise ValueError(
            f"{path}: its metadata has {CONFIG} {saved_configs!r:.80}, want an object of arguments "
            "by layer"
        )
    problems = [f"missing {key}" for key in want if key not in loaded]
    problems += [f"unexpected {key}" for key in loaded if key not in want]
    problems += [
        f"{key} is {list(loaded[key].shape)}, want {list(want[key].shape)}"
        for key in want
        if key in loaded and loaded[key].shape != want[key].shape
    ]
    layers = list(_lora_layers(model))
    if not problems:  # a shape mismatch explains more than a different r
        for name, layer in layers:
            problems += _different_config(name, saved_configs.get(name, {}), layer.adapter_config())
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems[:8])}{more}")
    unchecked = [name or "the layer" for name, _ in layers if name not in saved_configs]
    if unchecked:
        more = f" and {len(unchecked) - 1} more" if len(unchecked) > 1 else ""
        warnings.warn(
            f"{path} does not tell the alpha of {unchecked[0]}{more}: it is loaded with the "
            "model's. Save it again to have it checked",
            stacklevel=2,
        )
    model.load_state_dict(loaded, strict=False)


def _different_config(name: str, saved: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each saved value that differs from the current one."""
    for key, want in current.items():
        got = saved.get(key, want)
        # A different alpha with equal scaling (alpha / r, or alpha / √r) computes the same.
        if got != want and (key != "alpha" or saved.get("scaling") != current["scaling"]):
            yield f"{name}.{key} was saved as {got}, want the model's {want}".lstrip(".")


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer | LoRAExperts]]:
    """Yield the LoRA layers with their full names."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer | LoRAExperts):
            yield name, module


def _lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the adapters' parameters with their full names; ValueError without LoRA layers."""
    layers = list(_lora_layers(model))
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without a LoRA layer, want one or more"
        )
    for prefix, layer in layers:
        if isinstance(layer, LoRAExperts):
            for attribute in ("lora_A", "lora_B"):
                full_name = f"{prefix}.{attribute}".lstrip(".")
                yield from layer.get_submodule(attribute).named_parameters(full_name)
            continue
        for name, param in layer.named_parameters(prefix, recurse=False):
            is_base = name.rpartition(".")[2] in ("weight", "bias") or not param.is_floating_point()
            if not is_base:
                yield name, param
