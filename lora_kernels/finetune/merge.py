"""`lora-kernels merge`: merge an adapter into its base, and compare the logits before saving."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..peft import fuse
from ..peft.modules import is_linear4bit
from ..quantization import Weight4bit
from . import UsageError
from . import model as models
from .checkpoints import translate_errors, write_folder
from .command import silence_libraries
from .compare import relative_rms
from .data import decode_text, read_file
from .model import DTYPES
from .options import MergeOptions, add_options, check_choice, check_out, fill_in_run

# The text on which logits are compared without --text.
TEXT = (
    "The river rose all night. By morning the lower meadow was a lake, and the miller's boat, "
    "which had lain upside down since harvest, was the only way to the bridge. Nobody had seen "
    "the water so high since the year the old church lost its door."
)


class Merged(NamedTuple):
    """The folder of a merged model, and its numbers of merged layers, files and bytes."""

    out: Path
    layers: int
    shards: int
    nbytes: int

    def __str__(self) -> str:
        return (
            f"{self.out}: {self.layers} layers merged, {self.shards} safetensors "
            f"{'file' if self.shards == 1 else 'files'}, {self.nbytes / 1e6:.1f} MB"
        )


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

    PEFT computes each sum in float32, and the sum is rounded once to `dtype`. The folder is written
    under a temporary name and renamed when it is complete.

    Args:
        base: transformers folder (dense or bitsandbytes' 4 bits), GGUF file or cached hub id.
        adapter: PEFT's folder, with any kind of LoRA and with `modules_to_save`.
        out: a folder that does not exist or is empty.
        dtype: "fp32", "bf16" or "fp16", of all floating tensors.
        onto: "original" adds ΔW to the base's weights. "dequantized" adds ΔW to 4-bit weights after
            decoding; dense weights are quantized first, as by `finetune --quant`.
        quant, quant_dtype: "nf4" or "fp4", and the dtype before quantization by bitsandbytes.
        check: called with the temporary folder. If it returns False, the folder is removed.

    Returns None if `check` returned False. Raises UsageError that names the argument before
    anything is written.
    """
    check_choice("onto", onto, ("original", "dequantized"))
    check_choice("dtype", dtype, DTYPES)
    check_choice("quant", quant, ("nf4", "fp4"))
    check_choice("quant_dtype", quant_dtype, DTYPES)
    base, adapter, out = Path(base), Path(adapter), Path(out)
    models.read_adapter_config(adapter)
    check_out(out, "that is not there yet")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"out: {out} is there already; give a folder that is not")
    folder, gguf_file = models.locate(base)
    four_bit = models.is_stored_in_4bit(base)
    if four_bit and onto == "original":
        raise UsageError(
            f"onto: {base} holds 4-bit weights alone; give --onto dequantized, or the base as it "
            "was before"
        )
    quantized = quant if onto == "dequantized" and not four_bit else None
    held = DTYPES[quant_dtype] if quantized else torch.float32
    dense: Any = models.load_base(base, held, torch.device("cpu"), quantized)
    dequantize(dense)
    words, head = dense.get_input_embeddings(), dense.get_output_embeddings()
    tied = head.weight if head is not None and head.weight is words.weight else None
    adapted = models.load_adapter(dense, adapter)
    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.get_base_layer().weight is tied for layer in layers):
        raise UsageError("adapter: a weight that is tied to another one cannot be merged into")
    with translate_errors("adapter: cannot be merged", ValueError):  # a sum is not finite
        merged = adapted.merge_and_unload(safe_merge=True)
    models.cast_parameters(merged, DTYPES[dtype])
    with write_folder(out) as partial:
        size: Any = "5GB"
        if gguf_file is not None:
            models.load_tokenizer(base).save_pretrained(partial)
        else:
            size = max(file.stat().st_size for file in folder.glob("*.safetensors"))
            weights = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".index.json")
            for file in folder.iterdir():  # the tokenizer and other files without weights
                if file.is_file() and not file.name.endswith(weights):
                    shutil.copy(file, partial / file.name)
        merged.save_pretrained(partial, max_shard_size=size)
        if not check(partial):
            shutil.rmtree(partial)
            return None
    shards = len(list(out.glob("*.safetensors")))
    return Merged(out, len(layers), shards, models.parameter_bytes(merged))


def dequantize(model: Any) -> None:
    """Make the whole model dense and float32 in place, including bitsandbytes' 4-bit layers."""
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


class Distance(NamedTuple):
    """Relative rms error of logits, and the share of positions with the same most likely token."""

    logits: float
    same_token: float

    @classmethod
    def from_logits(cls, got: Tensor, want: Tensor) -> Distance:
        """Return the distance of logits [..., vocabulary].

        >>> Distance.from_logits(torch.tensor([[1.0, 2.2]]), torch.tensor([[1.0, 2.0]])).same_token
        1.0
        """
        same = (got.argmax(-1) == want.argmax(-1)).double().mean()
        return cls(relative_rms(got, want), same.item())

    def __str__(self) -> str:
        if math.isnan(self.logits):
            return "logits that are all 0 or not finite: nothing to compare"
        return f"logits off by {self.logits:.3g} (relative rms), likeliest token the same in " + (
            f"{self.same_token:.1%}"
        )


class Comparison(NamedTuple):
    """Distances of logits from those of base + adapter in float32.

    Attributes:
        merged: of the merged folder, loaded in its dtype.
        itself: of base + adapter, computed in that dtype.
        original: of the adapter on the dense base in float32. None if that is the reference.
        limit: the largest allowed `merged`. It is 1.25 times `itself`, plus a quarter of the
            dtype's unit roundoff. In float32, in which only the order of sums differs, it is 1e-4.
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
    """Compare a merged folder, loaded by transformers, with base + adapter, fused.

    Args:
        folder: the merged model.
        base, adapter, dtype, quant_dtype: as in `merge_adapter`.
        quant: "nf4" or "fp4" for a 4-bit base (needs bitsandbytes), None for a dense base.
        ids: int64 [1, tokens].
    """
    to = DTYPES[dtype]

    def logits(model: Any) -> Tensor:
        out: Tensor = model(input_ids=ids, use_cache=False).logits
        return out.float()

    def compute_adapted(quant: str | None, compute: torch.dtype) -> Tensor:
        # Quantize from the training's dtype, then cast to the compute dtype.
        held = DTYPES[quant_dtype] if quant else torch.float32
        model = models.load_base(base, held, torch.device("cpu"), quant)
        models.cast_parameters(model, compute)
        return logits(fuse(models.load_adapter(model, adapter)).eval())

    want = compute_adapted(quant, torch.float32)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
    if plain.dtype != to:
        raise UsageError(f"dtype: {folder} loads in {plain.dtype}, want {to}")
    merged = Distance.from_logits(logits(plain.eval()), want)
    del plain
    itself = Distance.from_logits(compute_adapted(quant, to), want)
    original = Distance.from_logits(compute_adapted(None, torch.float32), want) if quant else None
    unit = torch.finfo(to).eps / 2
    limit = 1e-4 if to is torch.float32 else 1.25 * itself.logits + unit / 4
    return Comparison(merged, itself, original, limit)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write base + adapter as a model folder that transformers loads without PEFT. Before the "
        "folder gets its name, its logits are compared with those of base + adapter; a folder that "
        "is off by more than rounding is not written. An adapter that was trained over a 4-bit "
        "base is merged into the decoded weights. --onto original merges it into the weights "
        "before quantization; how far that is off is printed, and the folder is written."
    )
    add_options(parser, MergeOptions)


def choose_weights(options: MergeOptions) -> tuple[MergeOptions, str]:
    """Fill in `onto` and `quant`; return the options, and a sentence on the weights.

    Without a choice these are the weights that the adapter was trained over.
    """
    four_bit = models.is_stored_in_4bit(options.base)
    onto = options.onto or ("dequantized" if options.quant or four_bit else "original")
    quant = options.quant or ("nf4" if onto == "dequantized" else None)
    words = "the base's weights"
    if onto == "dequantized":
        words = f"the weights that {quant} holds, decoded, over which the adapter was trained"
    elif quant:
        words += f" before {quant} quantization, over which the adapter was not trained"
    return replace(options, onto=onto, quant=quant), f"merging into {words}"


def read_text(file: Path | None) -> str:
    """Return the file's text, or a paragraph. Raises UsageError if the file cannot be read."""
    if file is None:
        return TEXT
    text = decode_text(read_file(file, "text", "the path of a plain text file"), file, "text")
    if not text.strip():
        raise UsageError(f"text: {file} is empty; give a file with text in it")
    return text


def run(args: argparse.Namespace) -> int:
    """Return the exit status: 0, or 1 if the logits were off and nothing was written."""
    options = MergeOptions(**fill_in_run(vars(args), "base", "quant_dtype"))
    if options.compare:
        models.check_quant(options.quant)
    text = read_text(options.text)
    models.locate(options.base, "base")
    options, said = choose_weights(options)
    silence_libraries()
    print(said)
    ids = models.load_tokenizer(options.base)(text, return_tensors="pt")["input_ids"][:, :256]
    base, adapter, quant = options.base, options.adapter, options.quant
    same: Any = {"dtype": options.dtype, "quant_dtype": options.quant_dtype}

    def check(folder: Path) -> bool:
        if not options.compare:
            return True
        held = f"{quant} base" if quant else "dense base"
        print(f"against {held} + adapter in fp32, on {ids.numel()} tokens:")
        found = compare_merged(folder, base, adapter, quant=quant, ids=ids, **same)
        print(f"  base + adapter in {options.dtype}: {found.itself}")
        if found.original:
            print(f"  the adapter on the original weights: {found.original}")
        if options.onto == "original" and quant and not math.isnan(found.merged.logits):
            print(f"  this merge: {found.merged}; --onto dequantized is off by rounding alone")
            return True  # requested, and off by the distance printed above
        verdict = "✓" if found.ok else "✗ nothing is written"
        print(f"  this merge: {found.merged}, at most {found.limit:.3g} {verdict}")
        return found.ok

    how = same | {"onto": options.onto, "quant": quant or "nf4"}
    done = merge_adapter(base, adapter, options.out, check=check, **how)
    if done is not None:
        print(done)
    return 0 if done is not None else 1
