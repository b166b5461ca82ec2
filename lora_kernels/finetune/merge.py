"""`lora-kernels merge`: merge an adapter into its base."""

from __future__ import annotations

import argparse
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..core.quiet import silence_libraries
from ..core.weights import parameter_bytes
from ..peft.kept import Kept, format_kept
from ..peft.modules import is_linear4bit
from ..peft.packed import decode_packed
from ..quantization import QuantizedWeight
from ..quantization.rounding import ROUNDINGS
from ..quantization.tensor import QuantizedTensor
from . import model as models
from .base_copies import FolderCopy, GgufCopy, check_adapter
from .chat import check_files
from .checkpoints import check_free, translate_errors, write_folder
from .errors import UsageError
from .model import DTYPES
from .options import MergeOptions, add_options, check_choice, check_out, fill_in_run, pick
from .rounding import Rounder, draw_batch


class Merged(NamedTuple):
    """The folder or GGUF file of a merged model, and its numbers of merged layers, files and bytes.

    kept: for each kind of layer, what the result keeps of the adapter's update. If the base was in
        4 bits and the result is dense, also what it would keep if it were quantized so again.
    unreached: with round="error" the layers, rounded to nearest, that were not rounded so: those
        that no token of the data reached, embeddings, convolutions and stacked experts.
    """

    out: Path
    layers: int
    shards: int
    nbytes: int
    kept: list[Kept]
    unreached: int = 0

    def __str__(self) -> str:
        lines = [format_kept(self.kept)] * bool(self.kept)
        if self.unreached:
            lines.append(f"{self.unreached} layers without inputs of the data: rounded to nearest")
        files = f"{self.shards} safetensors {'file' if self.shards == 1 else 'files'}, "
        files = files if self.shards else ""
        return "\n".join(
            [*lines, f"{self.out}: {self.layers} layers merged, {files}{self.nbytes / 1e6:.1f} MB"]
        )


def merge_adapter(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: str = "bf16",
    onto: str = "original",
    quant: str = "nf4",
    quant_dtype: str = "fp32",
    into: str = "dense",
    round: str = "nearest",
    data: Sequence[str | Path] = (),
    seed: int = 0,
) -> Merged:
    """Write W + ΔW of a PEFT adapter as a model that needs no PEFT.

    PEFT computes each sum in float32, and the sum is rounded once: to `dtype`, or to the values
    that the base's codes can take. A folder is written under a temporary name, as a file is, and
    renamed when it is complete.

    Rounding to nearest loses an update that is small beside the distance of two stored values.
    "error" keeps more of it: each layer's values are chosen for a small output error over inputs
    from `data`, see `lora_kernels.quantization.round_weight`. "stochastic" needs no data, and adds
    more noise. Where the update is 0, each gives the base's bytes.

    Args:
        model: the base: transformers folder (dense or bitsandbytes' 4 bits), GGUF file or cached
            hub id.
        adapter: PEFT's folder, with any kind of LoRA and with `modules_to_save`.
        out: a folder that does not exist or is empty; a new GGUF file for a GGUF base and
            into="base".
        dtype: "fp32", "bf16" or "fp16", of all floating tensors, unless into="base".
        onto: "original" adds ΔW to the base's weights. "dequantized" adds ΔW to quantized weights
            after decoding; dense weights are quantized first, as by `finetune --quant`.
        quant, quant_dtype: "nf4" or "fp4", and the dtype before quantization by bitsandbytes.
        into: "dense" writes a dense folder. "base" writes the formats of the base's own tensors,
            with the scales that they have and new codes: a copy of the GGUF file, in each type
            that `load_gguf` keeps packed, F32, F16 and BF16; a folder in NF4 or FP4, which
            transformers loads with bitsandbytes; or a dense folder in its tensors' dtypes.
        round: "nearest", "stochastic" or "error".
        data: files for "error", as `load_chat` reads them: up to 8,192 tokens pass through the
            model, best of those that the adapter was trained on.
        seed: of the random numbers and of the choice of rows. Equal seeds give equal files.

    Raises UsageError that names the argument before anything is written, and if the adapter lacks a
    key or does not fit the base.
    """
    check_choice("onto", onto, ("original", "dequantized"))
    check_choice("dtype", dtype, DTYPES)
    check_choice("quant", quant, ("nf4", "fp4"))
    check_choice("quant_dtype", quant_dtype, DTYPES)
    check_choice("into", into, ("dense", "base"))
    check_choice("round", round, ROUNDINGS)
    model, adapter, out = Path(model), Path(adapter), Path(out)
    files = [Path(file) for file in data]
    check_rounding(round, files, dtype if into == "dense" else None)
    adapter_config = models.read_adapter_config(adapter)
    folder = models.locate(model)
    is_gguf = models.is_gguf(folder)
    check_new(out, is_file=is_gguf and into == "base")
    parameters = models.build_skeleton(model).parameters()
    size = sum(p.numel() for p in parameters) * DTYPES[dtype].itemsize
    if into == "base":
        check_adapter(adapter_config)
        size = sum(f.stat().st_size for f in ([folder] if is_gguf else folder.iterdir()))
    check_free(out, size, "the merged model")
    is_quantized = models.is_stored_quantized(model)
    if is_quantized and onto == "original":
        raise UsageError(
            f"onto: {model} holds quantized weights alone; give --onto dequantized, or the base as "
            "it was before"
        )
    quantized = quant if onto == "dequantized" and not is_quantized else None
    held = DTYPES[quant_dtype] if quantized else torch.float32
    dense: Any = models.load_base(model, held, torch.device("cpu"), quantized)
    weights = dequantize(dense)
    words, head = dense.get_input_embeddings(), dense.get_output_embeddings()
    tied = head.weight if head is not None and head.weight is words.weight else None
    adapted = models.load_adapter(dense, adapter)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    if any(layer.get_base_layer().weight is tied for layer in layers.values()):
        raise UsageError("adapter: a weight that is tied to another one cannot be merged into")
    copied: FolderCopy | GgufCopy | None = None
    if into == "base" and is_gguf:
        rows = {name: _out_features(layer) for name, layer in layers.items()}
        copied = GgufCopy(folder, rows, weights)
    elif into == "base":
        how_quantized = describe_quantization(quantized, held) if quantized else None
        copied = FolderCopy(folder, layers, weights, how_quantized)
    again = quant if onto == "dequantized" and not is_gguf and into == "dense" else None
    stored = copied.stored if copied else {}
    rounder = Rounder(round, seed, DTYPES[dtype], stored, again)
    left = layers
    with translate_errors("adapter: cannot be merged", ValueError):  # a sum is not finite
        if round == "error":
            batch = draw_batch(files, models.load_tokenizer(model), dense.config, seed)
            left = rounder.visit(adapted, layers, batch)
        for name, layer in left.items():
            rounder.merge(name, layer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            merged = adapted.merge_and_unload()
    if copied is not None:
        shards, nbytes = copied.write(out, rounder.chosen)
    else:
        models.cast_parameters(merged, DTYPES[dtype])
        shards, nbytes = _write_dense(merged, model, folder, out), parameter_bytes(merged)
    unreached = len(left) if round == "error" else 0
    return Merged(out, len(layers), shards, nbytes, rounder.tally.rows(), unreached)


def _out_features(layer: Any) -> int:
    return len(layer.get_base_layer().weight)


def check_rounding(round: str, files: Sequence[Path], dtype: str | None) -> None:
    """Raise UsageError unless the rounding has the data that it needs, and something to do.

    dtype: of a dense result, or None.
    """
    if round == "error" and not files:
        raise UsageError("data: got none, which round='error' needs: give the adapter's own data")
    if round != "error" and files:
        raise UsageError(f"data: got files, which round={round!r} does not read")
    if round != "nearest" and dtype == "fp32":
        raise UsageError(f"round: got {round!r} for fp32, which holds the sum: want 'nearest'")
    check_files(files)


def check_new(out: Path, is_file: bool) -> None:
    """Raise UsageError unless `out` can be made as a folder, or as a GGUF file."""
    if is_file and out.suffix != ".gguf":
        raise UsageError(f"out: got {out}, want a file's name that ends in .gguf")
    check_out(out.absolute().parent if is_file else out, "that is not there yet")
    if out.exists() and (is_file or not out.is_dir() or any(out.iterdir())):
        kind = "file" if is_file else "folder"
        raise UsageError(f"out: {out} is there already; give a {kind} that is not")


def describe_quantization(quant: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return transformers' `quantization_config` of what `models.load_base` quantizes."""
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    described: dict[str, Any] = make(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    ).to_dict()
    return described


def _write_dense(merged: Any, model: Path, folder: Path, out: Path) -> int:
    """Write a folder that transformers loads; return the number of its safetensors files."""
    with write_folder(out) as partial:
        how: dict[str, Any] = {}
        if models.is_gguf(folder):
            models.load_tokenizer(model).save_pretrained(partial)
        else:
            how["max_shard_size"] = max(f.stat().st_size for f in folder.glob("*.safetensors"))
            weights = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".index.json")
            for file in folder.iterdir():  # the tokenizer and other files without weights
                if file.is_file() and not file.name.endswith(weights):
                    shutil.copy(file, partial / file.name)
        merged.save_pretrained(partial, **how)
    return len(list(out.glob("*.safetensors")))


def dequantize(model: Any) -> dict[str, QuantizedWeight]:
    """Make the whole model dense and float32 in place, bitsandbytes' 4-bit layers too.

    Returns the codes of the layers that were quantized, by name.
    """
    weights: dict[str, QuantizedWeight] = {}
    for name, layer in model.named_modules():
        packed = getattr(layer, "weight", None)
        if isinstance(packed, QuantizedTensor):
            weights[name] = packed.quantized
    decode_packed(model)
    for name, layer in list(model.named_modules()):
        if is_linear4bit(layer):
            linear = nn.Linear(*models.features(layer), bias=layer.bias is not None, device="meta")
            weights[name] = QuantizedWeight.from_bitsandbytes(layer.weight)
            linear.weight = nn.Parameter(weights[name].dequantize(torch.float32))
            linear.bias = layer.bias
            model.set_submodule(name, linear.requires_grad_(False))
    for name in ("hf_quantizer", "quantization_method", "_weight_conversions"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    model.is_quantized = model.is_loaded_in_4bit = False
    models.cast_parameters(model, torch.float32)
    return weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write base + adapter as a model folder that transformers loads without PEFT. An adapter "
        "that was trained over a 4-bit base is merged into the decoded weights. --onto original "
        "merges it into the weights before quantization, to which it does not belong. An adapter "
        "that lacks a key is refused before anything is written."
    )
    add_options(parser, MergeOptions)


def choose_weights(options: MergeOptions) -> tuple[MergeOptions, str]:
    """Fill in `onto` and `quant`; return the options, and a sentence on the weights.

    Without a choice these are the weights that the adapter was trained over.
    """
    is_quantized = models.is_stored_quantized(options.model)
    onto = options.onto or ("dequantized" if options.quant or is_quantized else "original")
    is_gguf = models.is_gguf(options.model)
    quant = options.quant or ("nf4" if onto == "dequantized" and not is_gguf else None)
    words = "the base's weights"
    if onto == "dequantized" and is_gguf:
        words = f"the weights of {options.model}, decoded, over which the adapter was trained"
    elif onto == "dequantized":
        words = f"the weights that {quant} holds, decoded, over which the adapter was trained"
    elif quant:
        words += f" before {quant} quantization, over which the adapter was not trained"
    return replace(options, onto=onto, quant=quant), f"merging into {words}"


def run(args: argparse.Namespace) -> int:
    """Return the exit status, 0. Raises UsageError for bad arguments."""
    options = MergeOptions(**fill_in_run(vars(args), "quant_dtype"))
    models.locate(options.model)
    models.check_quant(options.quant, options.model)
    options, said = choose_weights(options)
    silence_libraries()
    print(said)
    how: Any = pick(options, "dtype onto quant_dtype into round data seed")
    how["quant"] = options.quant or "nf4"
    print(merge_adapter(options.model, options.adapter, options.out, **how))
    return 0
