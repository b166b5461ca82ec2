"""`lora-kernels merge`: merge an adapter into its base."""

from __future__ import annotations

import argparse
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..core.quiet import silence_libraries
from ..core.weights import parameter_bytes
from ..peft.kept import Kept, Tally, format_kept, name_of
from ..peft.merge import written_parameters
from ..peft.modules import is_linear4bit
from ..peft.packed import decode_packed
from ..quantization import QuantizedWeight, quantize_4bit
from . import model as models
from .checkpoints import check_free, translate_errors, write_folder
from .errors import UsageError
from .model import DTYPES
from .options import MergeOptions, add_options, check_choice, check_out, fill_in_run, pick


class Merged(NamedTuple):
    """The folder of a merged model, and its numbers of merged layers, files and bytes.

    kept: for each kind of layer, what the folder's dtype keeps of the adapter's update. If the
        base was in 4 bits, also what it would keep if it were quantized so again.
    """

    out: Path
    layers: int
    shards: int
    nbytes: int
    kept: list[Kept]

    def __str__(self) -> str:
        return f"{format_kept(self.kept)}\n" * bool(self.kept) + (
            f"{self.out}: {self.layers} layers merged, {self.shards} safetensors "
            f"{'file' if self.shards == 1 else 'files'}, {self.nbytes / 1e6:.1f} MB"
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
) -> Merged:
    """Write W + ΔW of a PEFT adapter as a model that transformers loads without PEFT.

    PEFT computes each sum in float32, and the sum is rounded once to `dtype`. The folder is written
    under a temporary name and renamed when it is complete.

    Args:
        model: the base: transformers folder (dense or bitsandbytes' 4 bits), GGUF file or cached
            hub id.
        adapter: PEFT's folder, with any kind of LoRA and with `modules_to_save`.
        out: a folder that does not exist or is empty.
        dtype: "fp32", "bf16" or "fp16", of all floating tensors.
        onto: "original" adds ΔW to the base's weights. "dequantized" adds ΔW to quantized weights
            after decoding; dense weights are quantized first, as by `finetune --quant`.
        quant, quant_dtype: "nf4" or "fp4", and the dtype before quantization by bitsandbytes.

    Raises UsageError that names the argument before anything is written, and if the adapter lacks a
    key or does not fit the base.
    """
    check_choice("onto", onto, ("original", "dequantized"))
    check_choice("dtype", dtype, DTYPES)
    check_choice("quant", quant, ("nf4", "fp4"))
    check_choice("quant_dtype", quant_dtype, DTYPES)
    model, adapter, out = Path(model), Path(adapter), Path(out)
    models.read_adapter_config(adapter)
    check_out(out, "that is not there yet")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"out: {out} is there already; give a folder that is not")
    folder = models.locate(model)
    parameters = models.build_skeleton(model).parameters()
    check_free(out, sum(p.numel() for p in parameters) * DTYPES[dtype].itemsize, "the merged model")
    is_quantized = models.is_stored_quantized(model)
    if is_quantized and onto == "original":
        raise UsageError(
            f"onto: {model} holds quantized weights alone; give --onto dequantized, or the base as "
            "it was before"
        )
    quantized = quant if onto == "dequantized" and not is_quantized else None
    held = DTYPES[quant_dtype] if quantized else torch.float32
    dense: Any = models.load_base(model, held, torch.device("cpu"), quantized)
    dequantize(dense)
    words, head = dense.get_input_embeddings(), dense.get_output_embeddings()
    tied = head.weight if head is not None and head.weight is words.weight else None
    adapted = models.load_adapter(dense, adapter)
    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.get_base_layer().weight is tied for layer in layers):
        raise UsageError("adapter: a weight that is tied to another one cannot be merged into")
    is_gguf = models.is_gguf(folder)
    tally, four_bits = Tally(), quant if onto == "dequantized" and not is_gguf else None
    with translate_errors("adapter: cannot be merged", ValueError):  # a sum is not finite
        for name, layer in adapted.named_modules():
            if isinstance(layer, BaseTunerLayer):
                _merge(tally, name, layer, DTYPES[dtype], four_bits)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            merged = adapted.merge_and_unload()
    models.cast_parameters(merged, DTYPES[dtype])
    with write_folder(out) as partial:
        how: dict[str, Any] = {}
        if is_gguf:
            models.load_tokenizer(model).save_pretrained(partial)
        else:
            how["max_shard_size"] = max(f.stat().st_size for f in folder.glob("*.safetensors"))
            weights = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".index.json")
            for file in folder.iterdir():  # the tokenizer and other files without weights
                if file.is_file() and not file.name.endswith(weights):
                    shutil.copy(file, partial / file.name)
        merged.save_pretrained(partial, **how)
    shards = len(list(out.glob("*.safetensors")))
    return Merged(out, len(layers), shards, parameter_bytes(merged), tally.rows())


def _merge(tally: Tally, name: str, layer: Any, dtype: torch.dtype, quant_type: str | None) -> None:
    """Let PEFT merge a layer in float32, and add what `dtype` and 4 bits keep of it."""
    slot = next(iter(written_parameters(layer)), None)
    if slot is None:
        return layer.merge(safe_merge=True)  # type: ignore[no-any-return]
    module, parameter = slot
    before = module.get_parameter(parameter).detach().clone()
    layer.merge(safe_merge=True)
    exact = module.get_parameter(parameter).detach()
    if parameter != "weight":
        name = f"{name}.{parameter}"
    tally.add(name_of(dtype), name, before, exact, exact.to(dtype))
    if quant_type is not None and exact.dim() == 2:
        again = quantize_4bit(exact, quant_type).dequantize(torch.float32)
        tally.add(f"{quant_type}, quantized again", name, before, exact, again)


def dequantize(model: Any) -> Any:
    """Return the whole model made dense and float32 in place, bitsandbytes' 4-bit layers too."""
    decode_packed(model)
    for name, layer in list(model.named_modules()):
        if is_linear4bit(layer):
            linear = nn.Linear(*models.features(layer), bias=layer.bias is not None, device="meta")
            weight = QuantizedWeight.from_bitsandbytes(layer.weight).dequantize(torch.float32)
            linear.weight, linear.bias = nn.Parameter(weight), layer.bias
            model.set_submodule(name, linear.requires_grad_(False))
    for name in ("hf_quantizer", "quantization_method", "_weight_conversions"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    model.is_quantized = model.is_loaded_in_4bit = False
    return models.cast_parameters(model, torch.float32)


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
    how: Any = pick(options, "dtype onto quant_dtype") | {"quant": options.quant or "nf4"}
    print(merge_adapter(options.model, options.adapter, options.out, **how))
    return 0
