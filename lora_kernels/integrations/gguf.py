"""GGUF files, llama.cpp's format, as models whose linear weights are the codes of the file."""

from __future__ import annotations

import copy
import functools
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import modeling_gguf_pytorch_utils as by_names
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import utils as by_conversions
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from ..peft.mergeable import refuse_merges
from ..quantization.packed_state import build_parameter, register_state_hooks
from ..quantization.readers.gguf import BLOCKS, read
from ..quantization.tensor import QuantizedTensor
from .quantizer import PackedQuantizer, quantizer_for

_CHUNK = 1 << 24  # elements that are decoded at a time
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN = 3  # names of a message
# Keys of files and attributes that transformers does not read for all architectures.
_SIZES = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
}
# Of architecture and layers, by which llama.cpp knows Gemma 2 and 3 of 27B.
_GEMMA_27B = (("gemma2", 46), ("gemma3", 62))
_ROPE_FACTORS = "rope_freqs.weight"
# Of all releases of Llama 3.1 to 3.3, by meta-llama's configurations.
_LLAMA_3: dict[str, Any] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def load_gguf(
    file: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> Any:
    """Load a GGUF file as a transformers model whose linear weights are the codes of the file.

    Each weight of an `nn.Linear` is a frozen `QuantizedTensor`, which decodes to the bits of
    `gguf.dequantize`. Embeddings, the output embedding and norms are decoded once. PEFT adapts the
    model as any other, and fused layers read the codes in the kernels. transformers' loader builds
    the model, so that the architectures are its own. Merging into the model and `save_pretrained`
    raise before they change or write anything.

    The types Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS and MXFP4
    stay packed. A linear weight in another one, or in another order than rows can express, is
    decoded, which a warning names. F32, F16 and BF16 are dense.

    The scaling of positions in the file is applied: Llama 3's factors, and linear and YaRN scaling.

    Args:
        file: the path of a GGUF file.
        dtype: of the decoded weights and of the activations: float32, bfloat16 or float16.
        kwargs: of transformers' `from_pretrained`, such as `attn_implementation` or `device_map`.

    Raises:
        TypeError: `dtype` is none of the three.
        ValueError: the file is cut short or damaged; its architecture is unknown to transformers;
            a tensor is unknown to the model, has another shape, has a type that `gguf` cannot
            decode, or is missing.

    >>> from lora_kernels.integrations import load_gguf
    >>> load_gguf("SmolLM2-135M-Instruct.gguf")
    Traceback (most recent call last):
    ValueError: file: there is no file SmolLM2-135M-Instruct.gguf
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype: got {dtype!r}, want float32, bfloat16 or float16")
    path = Path(file)
    reader = open_gguf(path)
    how: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    config = load_config(path, reader)
    with quantizer_for("gguf", functools.partial(PackedGgufQuantizer, reader=reader)):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.absolute().parent,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            **how,
            **kwargs,
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"file: {path} lacks {_some(missing)}")
    return model


def open_gguf(file: Path) -> Any:
    """Return gguf's reader of a file. Raises ValueError unless the file is whole and known."""
    if not file.is_file():
        is_folder = ": it is a folder, want a file in it" * file.is_dir()
        raise ValueError(f"file: there is no file {file}{is_folder}")
    try:
        reader = gguf.GGUFReader(file)
        architecture(reader)
    except Exception as error:  # whatever its indexing of damaged bytes raises
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"file: {file} is no GGUF file, cut short or damaged, want a whole one "
            f"({type(error).__name__}: {reason})"
        ) from error
    parts = reader.fields.get("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise ValueError(
            f"file: {file} is one of {int(parts.contents())} parts, want a whole one: "
            "llama-gguf-split --merge joins them"
        )
    for t in reader.tensors:
        if not _is_decodable(t.tensor_type):
            raise ValueError(
                f"file: {t.name} of {file} is in {t.tensor_type.name}, which gguf cannot decode, "
                f"want one of F32, F16, BF16, {', '.join(BLOCKS)}"
            )
    return reader


def architecture(reader: Any) -> str:
    return str(reader.fields["general.architecture"].contents())


# Of the file that was read last, by path, time and bytes: transformers reads words one by one.
_configs: dict[tuple[str, int, int], Any] = {}


def load_config(file: Path, reader: Any = None) -> Any:
    """Return transformers' configuration of the file, with what transformers does not read.

    That is the scaling of positions, sizes of heads and experts, and Gemma's scale of attention.

    reader: of `open_gguf`, if there is one.

    Raises ValueError as `open_gguf`, and if transformers does not know the architecture or the
    scaling.
    """
    if file.is_file():
        found = file.stat()
        key = str(file.absolute()), found.st_mtime_ns, found.st_size
        if key not in _configs:
            config = _read_config(reader or open_gguf(file), file)
            _configs.clear()
            _configs[key] = config
        return copy.deepcopy(_configs[key])
    raise ValueError(f"file: there is no file {file}")


def _read_config(reader: Any, file: Path) -> Any:
    name = architecture(reader)
    try:
        config = AutoConfig.from_pretrained(
            file.absolute().parent, gguf_file=file.name, local_files_only=True
        )
    except (KeyError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"file: {file} has the architecture {name!r}, which transformers does not load from "
            f"GGUF ({str(error).partition(chr(10))[0]})"
        ) from error
    read_keys: Any = GGUF_CONFIG_MAPPING
    for key, attribute in _SIZES.items():
        size = reader.fields.get(f"{name}.{key}")
        is_read = key in read_keys.get(name, {})
        if size is not None and not is_read and getattr(config, attribute, None) is not None:
            setattr(config, attribute, int(size.contents()))
    if hasattr(config, "query_pre_attn_scalar"):  # not in the file: llama.cpp knows it by the size
        is_27b = (name, config.num_hidden_layers) in _GEMMA_27B
        width = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = width if is_27b else config.head_dim
    _scale_positions(config, reader, file)
    for t in reader.tensors:
        if t.name == _ROPE_FACTORS:
            _divide_frequencies(config, torch.from_numpy(np.array(t.data)), file)
    return config


def _divide_frequencies(config: Any, factors: Tensor, file: Path) -> None:
    """Write the scaling of positions of Llama 3 into the configuration.

    llama.cpp stores it as a tensor, by which it divides the rotary frequencies.
    """
    plain = ROPE_INIT_FUNCTIONS["llama3"](_with_scaling(config, 1.0), torch.device("cpu"))[0]
    factor = round(factors.max().item(), 3)
    scaled = _with_scaling(config, factor)
    found = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))[0]
    if found.shape != factors.shape or not torch.allclose(found * factors, plain, rtol=1e-4):
        raise ValueError(
            f"file: {file} has other factors in {_ROPE_FACTORS} than Llama 3's formula gives, "
            f"want those of {_LLAMA_3}"
        )
    config.rope_parameters = scaled.rope_parameters


def _with_scaling(config: Any, factor: float) -> Any:
    scaled = copy.deepcopy(config)
    scaled.rope_parameters |= {"rope_type": "llama3", "factor": factor} | _LLAMA_3
    return scaled


def _scale_positions(config: Any, reader: Any, file: Path) -> None:
    """Write the file's linear or YaRN scaling into the configuration, where it has none."""

    def field(name: str) -> Any:
        found = reader.fields.get(f"{architecture(reader)}.rope.scaling.{name}")
        return None if found is None else found.contents()

    kind = field("type")
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None)
    if kind in (None, "none") or parameters is None:
        return
    parameters = parameters.get("full_attention", parameters)
    if parameters.get("rope_type", "default") != "default":  # transformers has read it
        return
    if kind not in ("linear", "yarn") or field("attn_factor") not in (None, 1.0):
        raise ValueError(
            f"file: {file} scales positions by {kind!r} with a factor of attention of "
            f"{field('attn_factor') or 1}, want 'none', 'linear' or 'yarn' with 1"
        )
    parameters |= {"rope_type": kind, "factor": float(field("factor") or 1.0)}
    if kind == "yarn":
        length = field("original_context_length") or text.max_position_embeddings
        parameters["original_max_position_embeddings"] = int(length)


class PackedGgufQuantizer(PackedQuantizer, GgufHfQuantizer):
    """transformers' quantizer of GGUF, which leaves the model's own modules and packs weights.

    For most architectures transformers maps names, and `TensorProcessor`s change values
    (`by_names`). For those in `GGUF_ARCHS` it has conversions (`by_conversions`).
    """

    def __init__(self, *args: Any, reader: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.reader = reader
        self.file = ""
        self.conversions: list[Any] | None = None

    def read_header(self, gguf_file: str) -> None:
        self.file = gguf_file
        self.supported = architecture(self.reader) in GGUF_ARCHS

    def get_new_dtype(self, *args: Any) -> None:
        return None  # the entries have the dtype

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        pass

    def get_state_dict(self, checkpoint_file: str, model: nn.Module) -> dict[str, Any]:
        """Return the entries of the file, which are read when the loader asks for them."""
        plan: Any = _by_conversions if self.supported else _by_names
        entries, self.conversions = plan(self.reader, model, self.dtype)
        linear = [e for e in entries.values() if isinstance(e, Entry) and e.is_linear]
        decoded = [e.source for e in linear if not e.is_packed]
        decoded += [t for t in self.reader.tensors if len(t.shape) > 2]  # of experts
        quantized = [t for t in decoded if t.tensor_type.name not in DENSE]
        if quantized:
            types = ", ".join(sorted({t.tensor_type.name for t in quantized}))
            names = _some([t.name for t in quantized])
            warnings.warn(f"load_gguf: got {names} ({types}), which is decoded", stacklevel=2)
        return dict(entries)

    def update_weight_conversions(self, weight_conversions: Any, *_: Any) -> Any:
        return self.conversions if self.supported else weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            for p in module._parameters.values():
                if isinstance(p, QuantizedTensor):
                    p.requires_grad_(False)
                    register_state_hooks(module)
        refuse_merges()
        model._weight_conversions = None
        self.reader = self.conversions = None  # the model keeps the quantizer
        # Of adapters' base: the file instead of its folder.
        model.name_or_path = model.config.name_or_path = str(Path(self.file).absolute())
        return model

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self, *_: Any) -> bool:
        raise ValueError(
            f"model: got one whose weights are in the codes of {self.file}, want a decoded one to "
            "save: AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE) decodes it"
        )


@dataclass(frozen=True)
class Entry:
    """A tensor of the file as the loader wants it: `entry[...]` reads it.

    Attributes:
        source: gguf's tensor.
        dtype: of the result.
        is_linear: whether it is the weight of an `nn.Linear` that is not the output embedding.
        is_packed: whether the result is a packed weight; with `is_raw`, the file's bytes.
        order: rows of the file in the order of the model, int64 [N]; None: as they are.
        process: a function of the decoded NumPy array, or None.
    """

    source: Any
    dtype: torch.dtype
    is_linear: bool
    is_packed: bool
    order: Tensor | None = None
    process: Any = None
    is_raw: bool = False

    def __getitem__(self, _: Any) -> Tensor:
        if self.is_packed:
            rows = torch.from_numpy(np.array(self.source.data))
            if self.is_raw:
                return rows
            rows = rows if self.order is None else rows[self.order]
            return build_parameter(read(rows, self.source.tensor_type.name, self.dtype))
        if self.process is None:
            decoded = decode(self.source, self.dtype)
            return decoded if self.order is None else decoded[self.order]
        values = self.process(decode(self.source, torch.float32).numpy())
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.dtype)


def decode(t: Any, dtype: torch.dtype) -> Tensor:
    """Return the decoded tensor, with the bits of `gguf.dequantize` rounded once to `dtype`."""
    kind, shape = t.tensor_type.name, shape_of(t)
    if kind in DENSE:
        stored = torch.from_numpy(np.array(t.data).view(np.uint8)).view(DENSE[kind])
        return stored.reshape(shape).to(dtype)
    rows = t.data.reshape(-1, t.data.shape[-1])
    decoded = torch.empty(len(rows), shape[-1], dtype=dtype)
    step = max(1, _CHUNK // shape[-1])
    for start in range(0, len(rows), step):
        some = np.array(rows[start : start + step])
        if kind in BLOCKS:
            dense = read(torch.from_numpy(some), kind, torch.float32).dequantize()
        else:
            dense = torch.from_numpy(gguf.dequantize(some, t.tensor_type))
        decoded[start : start + step] = dense
    return decoded.reshape(shape)


@functools.cache
def _is_decodable(kind: Any) -> bool:
    if kind.name in DENSE:
        return True
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _linear_weights(model: Any) -> set[str]:
    """Return the names of the weights that may be packed: of linear layers, without the head."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    }


def processor_of(name: str, config: Any) -> Any:
    """Return transformers' processor of the tensors of an architecture, by llama.cpp's name."""
    settings = config.to_dict()
    if settings.get("num_key_value_heads") is None:  # or Llama's leaves the rows as they are
        settings["num_key_value_heads"] = settings.get("num_attention_heads")
    made: Any = by_names.TENSOR_PROCESSORS.get(name, by_names.TensorProcessor)
    return made(config=settings)


def row_order(processor: Any, name: str, rows: int) -> Tensor | None:
    """Return the file's rows in the order of the model, int64 [rows], for a tensor of the file.

    None if a processor of transformers transposes, splits or changes the tensor. Found by running
    it on a column of row numbers.
    """
    column = np.arange(rows)[:, None]
    try:
        done = processor.process(
            column, name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
        )
    except Exception:  # a processor that reads more of the tensor, as Bloom's
        return None
    if done.name != name or done.weights.shape != column.shape:
        return None
    order = done.weights[:, 0]
    if not np.array_equal(np.sort(order), column[:, 0]):
        return None
    return torch.from_numpy(order.copy())


def _by_names(reader: Any, model: Any, dtype: torch.dtype) -> tuple[dict[str, Any], None]:
    """Return the entries by the model's names, for transformers' processors."""
    name = architecture(reader)
    processor = processor_of(name, model.config)
    names = by_names.get_gguf_hf_weights_map(model, processor, model_type=name)
    linear = _linear_weights(model)
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    entries: dict[str, Any] = {}
    others = []
    for t in reader.tensors:
        key = names.get(t.name)
        if key is None:
            others.append(t)
            continue
        N, *rest = shape_of(t)
        order = row_order(processor, t.name, N) if len(rest) == 1 else None
        _check_shape(t, key, shapes[key], is_exact=order is not None)
        is_packed = order is not None and key in linear and t.tensor_type.name in BLOCKS
        process = None
        if order is None:
            process = functools.partial(_process, processor, t.name, names)
        elif torch.equal(order, torch.arange(N)):
            order = None
        entries[key] = Entry(t, dtype, key in linear, is_packed, order, process)
    unknown = []
    for t in others:  # of experts, whose tensors a processor writes into one
        values = decode(t, torch.float32).numpy()
        merged: dict[str, Any] = {"tensors": entries}
        done = processor.process(values, t.name, tensor_key_mapping=names, parsed_parameters=merged)
        if done.name is not None:
            unknown.append(t)
    _check_known(reader, model, unknown)
    for key, value in entries.items():
        if isinstance(value, Tensor):
            entries[key] = value.to(dtype)
    return entries, None


def _process(processor: Any, name: str, names: dict[str, str], values: Any) -> Any:
    """Return what a processor of transformers makes of a decoded tensor."""
    written: dict[str, Any] = {}
    done = processor.process(
        values, name, tensor_key_mapping=names, parsed_parameters={"tensors": written}
    )
    return next(iter(written.values())).numpy() if done.name is None else done.weights


class Pack(ConversionOps):
    """The last conversion of a tensor: the file's bytes become a packed weight."""

    def __init__(self, kinds: dict[str, str], dtype: torch.dtype) -> None:
        self.kinds, self.dtype = kinds, dtype

    def convert(
        self, input_dict: dict[str, Any], *_: Any, full_layer_name: str = "", **__: Any
    ) -> dict[str, Any]:
        (value,) = input_dict.values()
        t = value[0] if isinstance(value, list) else value
        kind = self.kinds.get(full_layer_name)
        if kind is None:
            return {full_layer_name: t.to(self.dtype)}
        return {full_layer_name: build_parameter(read(t, kind, self.dtype))}


def _by_conversions(
    reader: Any, model: Any, dtype: torch.dtype
) -> tuple[dict[str, Any], list[Any]]:
    """Return the entries by the file's names, and transformers' conversions, which end in `Pack`.

    A weight stays packed if its conversions only move rows.
    """
    conversions = by_conversions.get_gguf_conversion_mapping(architecture(reader), model.config)
    tried = copy.deepcopy(conversions)  # a conversion remembers that it has matched a name
    renamings = [c for c in tried if isinstance(c, WeightRenaming)]
    converters = [c for c in tried if isinstance(c, WeightConverter)]
    by_pattern: dict[Any, Any] = {pattern: c for c in converters for pattern in c.source_patterns}
    linear = _linear_weights(model)
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    entries: dict[str, Any] = {}
    kinds, unknown = dict[str, str](), []
    for t in reader.tensors:
        key, pattern = rename_source_key(t.name, renamings, converters)
        if key not in shapes:
            unknown += [] if key.startswith("mtp.") else [t]
            continue
        operations = getattr(by_pattern.get(pattern), "operations", ())
        moves_rows = all(
            getattr(op, "supports_packed", False) and not hasattr(op, "input_permutation")
            for op in operations
        )
        is_packed = moves_rows and key in linear and t.tensor_type.name in BLOCKS
        _check_shape(t, key, shapes[key], is_exact=is_packed)
        if is_packed:
            kinds[key] = t.tensor_type.name
        entries[t.name] = Entry(t, torch.float32, key in linear, is_packed, is_raw=True)
    _check_known(reader, model, unknown)
    header: Any = SimpleNamespace(ggml_types=dict.fromkeys(entries))
    conversions = by_conversions.add_gguf_load_ops(conversions, {}, header, dtype)
    for conversion in conversions:
        if isinstance(conversion, WeightConverter):
            conversion.operations[-1] = Pack(kinds, dtype)  # instead of a cast
    return entries, conversions


def shape_of(t: Any) -> tuple[int, ...]:
    """Return the shape of a file's tensor as PyTorch has it."""
    return tuple(int(n) for n in reversed(t.shape))


def _check_shape(t: Any, key: str, wanted: tuple[int, ...], is_exact: bool) -> None:
    """Raise ValueError unless a tensor has the parameter's shape.

    is_exact: False if a conversion changes the shape, so that only the number of elements counts.
    """
    shape = shape_of(t)
    if shape == wanted or (not is_exact and math.prod(shape) == math.prod(wanted)):
        return
    raise ValueError(f"file: got {t.name} of {list(shape)}, want {list(wanted)}, as {key}")


def _check_known(reader: Any, model: Any, unknown: Sequence[Any]) -> None:
    """Raise ValueError for tensors that no parameter takes, but those of layers of prediction."""
    layers = model.config.get_text_config().num_hidden_layers
    names = []
    for t in unknown:
        block = t.name.removeprefix("blk.").partition(".")[0]
        is_prediction = t.name.startswith("blk.") and block.isdecimal() and int(block) >= layers
        if t.name != _ROPE_FACTORS and not is_prediction:
            names.append(t.name)
    if names:
        raise ValueError(
            f"file: got {_some(names)}, for which transformers' {type(model).__name__} has no "
            f"parameter: it would compute something else than llama.cpp's {architecture(reader)}"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else ""
    return ", ".join(names[:_SHOWN]) + more
