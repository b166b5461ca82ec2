"""Base and adapter as one stock transformers folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..measure.outputs import unwritable_reason
from ..peft import fuse
from ..peft.base import is_linear4bit
from ..quantization import Weight4bit
from . import UsageError
from . import model as models
from .checkpoints import write_folder
from .compare import relative_rms
from .model import DTYPES


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


class _Refused(Exception):
    """The caller's `check` returned False."""


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

    Each sum is PEFT's own, in float32, and rounded once to `dtype`. The folder is written beside
    `out` and gets its name once it is whole.

    Args:
        base: transformers folder (dense or bitsandbytes' 4 bits), GGUF file or cached hub id.
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
        ("dtype", dtype, DTYPES),
        ("quant", quant, ("nf4", "fp4")),
        ("quant_dtype", quant_dtype, DTYPES),
    ):
        if value not in wanted:
            *rest, last = map(repr, wanted)
            raise UsageError(f"{name}: got {value!r}, want {', '.join(rest)} or {last}")
    base, adapter, out = Path(base), Path(adapter), Path(out)
    models.read_adapter_config(adapter)
    if reason := unwritable_reason(out, folder=True):
        raise UsageError(f"out: {reason}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"out: {out} is there already; give a folder that is not")
    folder, gguf_file = models.locate(base)
    four_bit = gguf_file is None and hasattr(models.load_config(base), "quantization_config")
    if four_bit and onto == "original":
        raise UsageError(
            f"onto: {base} holds 4-bit weights alone; give --onto dequantized, or the base as it "
            "was before"
        )
    quantized = quant if onto == "dequantized" and not four_bit else None
    models.check_quant(quantized)
    held = DTYPES[quant_dtype] if quantized else torch.float32
    dense: Any = models.load_base(base, held, torch.device("cpu"), quantized)
    decode(dense)
    words, head = dense.get_input_embeddings(), dense.get_output_embeddings()
    tied = head.weight if head is not None and head.weight is words.weight else None
    adapted = models.load_adapter(dense, adapter)
    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        if not hasattr(layer, "merge"):
            raise UsageError(f"adapter: PEFT cannot merge a {type(layer).__name__}")
        if layer.get_base_layer().weight is tied:
            raise UsageError("adapter: a weight that is tied to another one cannot be merged into")
    merged = adapted.merge_and_unload(safe_merge=True)  # raises where a sum is not finite
    models.cast_parameters(merged, DTYPES[dtype])
    try:
        with write_folder(out) as partial:
            size: Any = "5GB"
            if gguf_file is not None:
                models.load_tokenizer(base).save_pretrained(partial)
            else:
                size = max(file.stat().st_size for file in folder.glob("*.safetensors"))
                weights = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".index.json")
                for file in folder.iterdir():  # the tokenizer, and whatever else is no weight
                    if file.is_file() and not file.name.endswith(weights):
                        shutil.copy(file, partial / file.name)
            merged.save_pretrained(partial, max_shard_size=size)
            if not check(partial):
                raise _Refused
    except _Refused:
        return None
    shards = len(list(out.glob("*.safetensors")))
    return Merged(out, len(layers), shards, models.parameter_bytes(merged))


def decode(model: Any) -> None:
    """Make the whole model dense and float32 in place, its bitsandbytes 4-bit layers included."""
    for name, layer in list(model.named_modules()):
        if is_linear4bit(layer):
            linear = nn.Linear(*models.features(layer), bias=layer.bias is not None, device="meta")
            weight = Weight4bit.from_bitsandbytes(layer.weight).dequantize(torch.float32)
            linear.weight, linear.bias = nn.Parameter(weight), layer.bias
            model.set_submodule(name, linear.requires_grad_(False))
    for name in ("hf_quantizer", "quantization_method", "_weight_conversions"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    model.is_quantized = model.is_loaded_in_4bit = False
    models.cast_parameters(model, torch.float32)


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
    same = (got.argmax(-1) == want.argmax(-1)).double().mean()
    return Distance(relative_rms(got, want), same.item())


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
    folder: Path,
    base: Path,
    adapter: Path,
    *,
    dtype: str,
    quant: str | None,
    quant_dtype: str,
    ids: Tensor,
) -> Comparison:
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
