"""Copies of a base's files with an adapter merged into them, in the formats that the base has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..quantization import QuantizedWeight
from ..quantization.rounding import unpack_codes
from .checkpoints import named_write, write_folder
from .errors import UsageError
from .export import FileNames
from .model import load_config

Formats = dict[str, QuantizedWeight | torch.dtype]
_INDEX = "model.safetensors.index.json"
# Of PEFT's configuration, what changes more of a base than weights of layers.
_FIELDS = ["modules_to_save", "trainable_token_indices", "lora_bias", "target_parameters"]
_FIELDS += ["layer_replication"]


def check_adapter(config: Any) -> None:
    """Raise UsageError if the adapter changes more of a base than weights of layers."""
    found = [name for name in _FIELDS if getattr(config, name, None)]
    found += ["bias"] if getattr(config, "bias", "none") != "none" else []
    if found:
        raise UsageError(
            f"adapter: got {', '.join(found)}, want weights of layers alone to write the base's "
            "own format: give --into dense"
        )


class FolderCopy:
    """A transformers folder whose merged tensors keep their dtypes or 4-bit codes' scales.

    Attributes:
        stored: of each merged layer the codes or the dtype of its weight.
    """

    def __init__(
        self,
        folder: Path,
        names: Iterable[str],
        weights: Mapping[str, QuantizedWeight],
        quantization: Any,
    ) -> None:
        """Find the layers' tensors.

        Args:
            names: of the merged layers.
            weights: of all layers that are quantized, by name.
            quantization: the configuration of weights that the folder has in another dtype, or
                None.

        Raises UsageError for a layer whose weight has another name in the files.
        """
        self.folder, self.weights, self.quantization = folder, weights, quantization
        dtypes: dict[str, torch.dtype] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (no mapping)
                    dtypes[key] = tensors.get_slice(key)[:0].dtype
        for name in (*names, *weights):
            if f"{name}.weight" not in dtypes:
                raise UsageError(f"into: {folder} has no {name}.weight; give --into dense")
        self.stored: Formats = {n: weights.get(n, dtypes[f"{n}.weight"]) for n in names}

    def write(self, out: Path, merged: Mapping[str, QuantizedWeight | Tensor]) -> tuple[int, int]:
        """Write the folder. Returns the numbers of its safetensors files and of their bytes."""
        changed: dict[str, QuantizedWeight | Tensor] = {}
        if self.quantization is not None:  # the files hold dense weights
            changed |= self.weights
        changed |= merged
        new = {f"{name}.weight": weight for name, weight in changed.items()}
        places: dict[str, str] = {}
        nbytes = 0
        config = json.loads((self.folder / "config.json").read_text())
        # transformers casts nothing of a folder in 4 bits.
        name = config.get("dtype") or config.get("torch_dtype")
        dtype = getattr(torch, name or "float32") if self.quantization is not None else None
        with write_folder(out) as partial:
            for file in self.folder.iterdir():
                if file.suffix == ".safetensors":
                    state = load_file(file)
                    with safe_open(file, "pt") as tensors:
                        metadata = tensors.metadata()
                    if dtype is not None:
                        state = {n: t.to(dtype) for n, t in state.items()}
                    for key in [key for key in state if key in new]:
                        weight = new[key]
                        if isinstance(weight, QuantizedWeight):
                            state |= weight.state_dict(key)
                        else:
                            state[key] = weight
                    save_file(state, partial / file.name, metadata)
                    places |= dict.fromkeys(state, file.name)
                    nbytes += sum(t.nbytes for t in state.values())
                elif file.is_file() and not file.name.endswith((".bin", ".gguf", ".pt", ".pth")):
                    shutil.copy(file, partial / file.name)
            if self.quantization is not None:
                config["quantization_config"] = self.quantization
                (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            if (index := partial / _INDEX).exists():
                content = json.loads(index.read_text())
                content["weight_map"] = places
                content.setdefault("metadata", {})["total_size"] = nbytes
                index.write_text(json.dumps(content, indent=2) + "\n")
        return len(set(places.values())), nbytes


class GgufCopy:
    """A GGUF file whose merged tensors keep their types and their blocks' scales.

    Attributes:
        stored: of each merged layer the codes or the dtype of its weight.
    """

    def __init__(
        self, file: Path, layers: Mapping[str, int], weights: Mapping[str, QuantizedWeight]
    ) -> None:
        """Find the layers' tensors.

        Args:
            layers: the merged layers' names and out-features.
            weights: of all layers whose codes were loaded, by name.

        Raises UsageError for a layer that the file has under no name, or in other rows.
        """
        from ..integrations.gguf import DENSE, open_gguf

        self.file = file
        reader = open_gguf(file)
        tensors = {t.name: t for t in reader.tensors}
        places = FileNames.of(load_config(file))
        self.stored: Formats = {}
        self.found: dict[str, tuple[str, Tensor]] = {}
        for name, rows in layers.items():
            self.found[name] = places.find(name, rows)
            to = self.found[name][0]
            t = tensors.get(to)
            if t is None or int(t.shape[-1]) != rows:
                raise UsageError(f"adapter: got {name}, whose {to} {file} does not have")
            kind = t.tensor_type.name
            if kind in DENSE:
                self.stored[name] = DENSE[kind]
            elif name in weights:
                self.stored[name] = weights[name]
                self._check(t, name, weights[name])
            else:
                raise UsageError(
                    f"into: {t.name} of {file} is in {kind}, whose codes were decoded; give --into "
                    "dense"
                )

    def _check(self, t: Any, name: str, weight: QuantizedWeight) -> None:
        """Raise UsageError unless the file's rows, moved, are the weight."""
        from ..quantization.readers.gguf import read

        rows = torch.from_numpy(np.array(t.data))[self.found[name][1]]
        if not torch.equal(read(rows, t.tensor_type.name, weight.dtype).packed, weight.packed):
            raise UsageError(f"into: {t.name} of {self.file} has other rows; give --into dense")

    def write(self, out: Path, merged: Mapping[str, QuantizedWeight | Tensor]) -> tuple[int, int]:
        """Write the file. Returns 0, the number of safetensors files, and its bytes."""
        import gguf

        from ..quantization.readers.gguf import replace_codes

        partial = out.with_name(f".{out.name}.partial")
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with named_write(out):
                shutil.copyfile(self.file, partial)
                tensors = {t.name: t for t in gguf.GGUFReader(partial, "r+").tensors}
                for name, new in merged.items():
                    to, order = self.found[name]
                    t = tensors[to]
                    if isinstance(new, QuantizedWeight):
                        q = unpack_codes(new)
                        in_file = torch.empty_like(q).index_copy_(0, order, q)
                        rows = torch.from_numpy(t.data)
                        rows.copy_(replace_codes(rows, t.tensor_type.name, in_file))
                    else:
                        values = torch.empty_like(new).index_copy_(0, order, new)
                        t.data.view("uint8").reshape(-1)[:] = values.view(-1).view(torch.uint8)
                del tensors
                partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
        return 0, out.stat().st_size
