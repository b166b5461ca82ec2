"""Base and adapter as one stock transformers folder, written a shard at a time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..measure.outputs import unwritable_reason
from ..peft import fuse
from ..quantization import Weight4bit
from . import UsageError
from . import model as models
from .checkpoints import first_line, named_write
from .model import DTYPES

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_OF_PEFT = re.compile(r"\.(lora_\w+|modules_to_save)\.")  # in a name: a part that PEFT made


@dataclass(frozen=True)
class Merged:
    """What was written: how many layers took an adapter, how many files, and their bytes."""

    out: Path
    layers: int
    shards: int
    nbytes: int

    def __str__(self) -> str:
        return (
            f"{self.out}: {self.layers} layers merged, {self.shards} safetensors "
            f"{'file' if self.shards == 1 else 'files'}, {self.nbytes / 1e6:.1f} MB"
        )


class Shards:
    """The tensors of a transformers folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        index, single = folder / _INDEX, folder / _SINGLE
        if not index.is_file() and not single.is_file():
            raise UsageError(
                f"base: {folder} holds no {_SINGLE} and no {_INDEX}; save the model with "
                "transformers' save_pretrained"
            )
        self.folder = folder
        try:
            if index.is_file():
                self.files: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
            else:
                with safe_open(single, "pt") as file:
                    self.files = dict.fromkeys(file.keys(), _SINGLE)
            for name in sorted(set(self.files.values())):  # before anything is written
                with safe_open(folder / name, "pt") as file:
                    held = set(file.keys())
                lacking = sorted(k for k, f in self.files.items() if f == name and k not in held)
                if lacking:
                    raise UsageError(f"base: {folder / name} lacks {lacking[0]}")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"base: {folder} cannot be read: {first_line(error)}") from error

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.folder / self.files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: str = "bf16",
    onto: str = "original",
    quant: str = "nf4",
    quant_dtype: str = "fp32",
    check: Callable[[Path], bool] = lambda folder: True,
) -> Merged | None:
    """Write W + ΔW of a PEFT adapter as a model that transformers loads without PEFT.

    Each sum is PEFT's own, in float32, and rounded once to `dtype`. No more than one file's tensors
    are in memory. The folder is written beside `out` and gets its name once it is whole.

    Args:
        base: transformers folder (safetensors, dense or bitsandbytes' 4 bits) or GGUF file.
        adapter: PEFT's folder; LoRA of any kind, `modules_to_save` too.
        out: must not exist, or be an empty folder.
        dtype: "fp32", "bf16" or "fp16", of all floating tensors.
        onto: "original" adds to the base's weights as they are. "dequantized" adds to what an
            adapter trained over a 4-bit base has seen: the weights quantized, as `finetune --quant`
            does it, and decoded; those of a 4-bit folder are only decoded.
        quant, quant_dtype: "nf4" or "fp4", and the dtype that was quantized; by bitsandbytes.
        check: gets the whole folder before it has its name; False leaves nothing written.

    Returns what was written, None where `check` said no. Raises UsageError, naming the argument,
    before anything is written.

    >>> from lora_kernels.finetune.merge import merge_adapter
    >>> merge_adapter("base", "adapter", "out", onto="orignal")
    Traceback (most recent call last):
    lora_kernels.finetune.UsageError: onto: got 'orignal', want 'original' or 'dequantized'
    """
    for name, value, wanted in (
        ("onto", onto, ("original", "dequantized")),
        ("dtype", dtype, tuple(DTYPES)),
        ("quant", quant, ("nf4", "fp4")),
        ("quant_dtype", quant_dtype, tuple(DTYPES)),
    ):
        if value not in wanted:
            *rest, last = map(repr, wanted)
            raise UsageError(f"{name}: got {value!r}, want {', '.join(rest)} or {last}")
    base, adapter, out = Path(base), Path(adapter), Path(out)
    lora = models.read_adapter_config(adapter)
    if reason := unwritable_reason(out, folder=True):
        raise UsageError(f"out: {reason}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"out: {out} is there already; give a folder that is not")
    with _as_folder(base) as folder:
        shards = Shards(folder)
        config = models.load_config(folder)
        four_bit = any(".quant_state.bitsandbytes__" in name for name in shards.files)
        if four_bit and onto == "original":
            raise UsageError(
                f"onto: {base} holds 4-bit weights alone; give --onto dequantized, or the base as "
                "it was before"
            )
        if onto == "dequantized" and not four_bit:
            models.check_quant(quant)
        adapted = _adapted(config, lora, adapter, shards)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            to = DTYPES[dtype]
            of = quant if onto == "dequantized" and not four_bit else None
            with named_write(out):
                nbytes = _write(shards, adapted, partial, to, of, DTYPES[quant_dtype])
                _write_rest(folder, partial, config, to)
            if not check(partial):
                return None
            if out.exists():
                out.rmdir()
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Merged(out, len(adapted.layers), len(set(shards.files.values())), nbytes)


@contextmanager
def _as_folder(base: Path) -> Iterator[Path]:
    """A transformers folder with safetensors: `base`, or what its GGUF file holds."""
    folder, gguf_file = models.locate(base)
    if gguf_file is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        loaded: Any = models.load_base(base, torch.float32, torch.device("cpu"))
        loaded.save_pretrained(name)
        models.load_tokenizer(base).save_pretrained(name)
        del loaded
        yield Path(name)


@dataclass(frozen=True)
class _Adapted:
    """What changes, by the names of the shards.

    Args:
        layers: with an adapter; names without ".weight".
        trained: biases of the base that the adapter's file holds (PEFT's `bias` option).
        replaced: tensors of modules that are saved whole.
        quantized: weights that QLoRA holds in 4 bits.
    """

    layers: Mapping[str, Any]
    trained: Mapping[str, Tensor]
    replaced: Mapping[str, Tensor]
    quantized: frozenset[str]


def _adapted(config: Any, lora: Any, adapter: Path, shards: Shards) -> _Adapted:
    """The adapter, whose configuration is `lora`, on a model without weights."""
    from_config: Any = AutoModelForCausalLM.from_config
    lora.inference_mode = False  # so that what the adapter brings is what would train
    try:
        with torch.device("meta"):
            bare: Any = from_config(config)
            quantized = list(models.quantized_layers(bare))
            prefix = bare.base_model_prefix
            peft_model = get_peft_model(bare, lora)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"adapter: {adapter} does not fit the base: {first_line(error)}"
        ) from error
    for module in peft_model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.requires_grad:
                module._parameters[name] = nn.Parameter(torch.empty_like(p, device="cpu"))
    set_peft_model_state_dict(peft_model, models.read_adapter(adapter, peft_model))

    def stored(name: str) -> str:
        """As the shards call it; some hold a model without its head, and leave its prefix out."""
        for candidate in (name, name.removeprefix(f"{prefix}.")):
            if candidate in shards.files:
                return candidate
        raise UsageError(
            f"base: {shards.folder} holds no {name}, which the adapter changes; a weight that is "
            "tied to another one cannot be merged into"
        )

    layers: dict[str, Any] = {}
    trained: dict[str, Tensor] = {}
    replaced: dict[str, Tensor] = {}
    for name, p in peft_model.get_base_model().named_parameters():
        if p.requires_grad and name.endswith(".bias") and not _OF_PEFT.search(name):
            trained[stored(name.replace(".base_layer.", "."))] = p.detach()
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            if not hasattr(module, "merge"):
                raise UsageError(f"adapter: PEFT cannot merge a {type(module).__name__}")
            layers[stored(f"{name}.weight").removesuffix(".weight")] = module
        elif isinstance(module, ModulesToSaveWrapper):
            kept: Any = module.modules_to_save[module.active_adapters[0]]
            replaced |= {stored(f"{name}.{key}"): t for key, t in kept.state_dict().items()}
    names = set()
    for name in quantized:  # a name may be absent where the weight is tied
        with contextlib.suppress(UsageError):
            names.add(stored(f"{name}.weight"))
    return _Adapted(layers, trained, replaced, frozenset(names))


def _write(
    shards: Shards,
    adapted: _Adapted,
    out: Path,
    dtype: torch.dtype,
    quant: str | None,
    quant_dtype: torch.dtype,
) -> int:
    """The shards' files again, with the sums; returns their bytes."""
    files: dict[str, list[str]] = {}
    for name, file in shards.files.items():
        files.setdefault(file, []).append(name)
    weight_map, total = {}, 0

    def dense(name: str) -> Tensor:
        """The tensor that the adapter is added to."""
        if name in adapted.trained:
            return adapted.trained[name]
        codes = [key for key in shards.files if key.startswith(f"{name}.quant_state.bitsandbytes")]
        if codes:
            state = {
                key: shards[key]
                for key in shards.files
                if key == name or key.startswith(f"{name}.")
            }
            return Weight4bit.from_state_dict(state, name).dequantize(torch.float32)
        tensor = shards[name]
        if quant is not None and name in adapted.quantized:
            return _decoded(tensor.to(quant_dtype), quant)
        return tensor

    def merged(name: str) -> Tensor:
        layer_name, _, kind = name.rpartition(".")
        if name in adapted.replaced:
            return adapted.replaced[name]
        layer = adapted.layers.get(layer_name)
        if layer is None or kind not in ("weight", "bias"):
            return dense(name)
        below = layer.get_base_layer()
        bare = dict(below._parameters)
        for key, p in bare.items():
            if p is not None:
                value = dense(f"{layer_name}.{key}").float()
                below._parameters[key] = nn.Parameter(value, requires_grad=False)
        layer.merge(safe_merge=True)  # which also raises where a sum is not finite
        result: Tensor = below._parameters[kind].detach()
        layer.merged_adapters.clear()
        below._parameters.update(bare)
        return result

    for file, names in files.items():
        tensors = {}
        for name in names:
            if any(f".weight.{part}" in name for part in _OF_4BIT):
                continue
            tensor = merged(name)
            tensors[name] = (
                tensor.to(dtype) if tensor.is_floating_point() else tensor
            ).contiguous()
            weight_map[name] = file
        save_file(tensors, out / file, metadata={"format": "pt"})
        with (out / file).open("rb") as written:
            os.fsync(written.fileno())
        total += sum(t.nbytes for t in tensors.values())
    if (shards.folder / _INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / _INDEX).write_text(json.dumps(index, indent=2))
    return total


def _decoded(weight: Tensor, quant: str) -> Tensor:
    """Through 4 bits and back, in float32. By bitsandbytes, as `finetune --quant` does it: where a
    scale lies half way between two codes, its CPU kernel and ours may take one each."""
    from bitsandbytes.functional import quantize_4bit

    pair = quantize_4bit(weight, quant_type=quant, compress_statistics=True)
    return Weight4bit.from_bitsandbytes(pair).dequantize(torch.float32)


_OF_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.")


def _write_rest(folder: Path, out: Path, config: Any, dtype: torch.dtype) -> None:
    """Configuration, tokenizer and whatever else is no weight."""
    for file in folder.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".gguf", ".pt", ".pth") or (
            file.name.endswith(".index.json")
        )
        if file.is_file() and not weights and not file.name.startswith("."):
            shutil.copy(file, out / file.name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    config.save_pretrained(out)


@dataclass(frozen=True)
class Distance:
    """Relative rms of the logits, and the share of places where the likeliest token is the same."""

    logits: float
    same_token: float

    def __str__(self) -> str:
        return f"logits off by {self.logits:.3g} (relative rms), likeliest token the same in " + (
            f"{self.same_token:.1%}"
        )


def distance(got: Tensor, want: Tensor) -> Distance:
    """Of logits [..., vocabulary].

    >>> distance(torch.tensor([[1.0, 2.2]]), torch.tensor([[1.0, 2.0]])).same_token
    1.0
    """
    error = (got.double() - want.double()).norm() / want.double().norm()
    same = (got.argmax(-1) == want.argmax(-1)).double().mean()
    return Distance(error.item(), same.item())


@dataclass(frozen=True)
class Comparison:
    """What a merged model's logits are off from those of base + adapter, computed in float32.

    merged: the folder's, loaded in its dtype. itself: base + adapter computed in that dtype.
    original: the adapter on the dense base in float32, None where the reference is that itself.
    limit: on `merged`, the house's: 1.25 times what PyTorch itself loses in that dtype, and a
    quarter of its unit roundoff; in float32, where only the order of sums differs, 1e-4.
    """

    merged: Distance
    itself: Distance
    original: Distance | None
    limit: float

    @property
    def ok(self) -> bool:
        return self.merged.logits <= self.limit


@torch.no_grad()
def compare_merged(
    folder: Path, base: Path, adapter: Path, *, dtype: str, quant: str | None, quant_dtype: str,
    ids: Tensor,
) -> Comparison:  # fmt: skip
    """Load the folder with plain transformers, and base + adapter fused, on ids int64 [1, tokens].

    quant: "nf4" or "fp4" for an adapter over a 4-bit base (needs bitsandbytes), None for a dense
    one.
    """
    cpu, to = torch.device("cpu"), DTYPES[dtype]

    def with_adapter(quant: str | None, compute: torch.dtype) -> Tensor:
        # What is quantized has the dtype of the training; what it computes in comes after that.
        held: Any = models.load_base(
            base, DTYPES[quant_dtype] if quant else torch.float32, cpu, quant
        )
        models.cast_parameters(held, compute)
        fused = fuse(models.load_adapter(held, adapter)).eval()
        return _logits(fused, ids)

    want = with_adapter(quant, torch.float32)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
    if plain.dtype != to:
        raise UsageError(f"dtype: {folder} loads in {plain.dtype}, want {to}")
    merged = distance(_logits(plain.eval(), ids), want)
    del plain
    itself = distance(with_adapter(quant, to), want)
    original = distance(with_adapter(None, torch.float32), want) if quant else None
    unit = torch.finfo(to).eps / 2
    limit = 1e-4 if to is torch.float32 else 1.25 * itself.logits + unit / 4
    return Comparison(merged, itself, original, limit)


def _logits(model: Any, ids: Tensor) -> Tensor:
    out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out.float()
