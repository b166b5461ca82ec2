"""`lora-kernels export`: write an adapter as GGUF, which llama.cpp adds to its model."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.quiet import silence_libraries
from . import model as models
from .checkpoints import named_write
from .errors import UsageError
from .options import ExportOptions, add_options, check_out, fill_in_run

# llama.cpp's names of architectures, by transformers' `model_type`. Its converter keeps the rows of
# their linear weights, but for q and k of "llama".
ARCHITECTURES = {
    "cohere": "command-r",
    "cohere2": "cohere2",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "lfm2": "lfm2",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "starcoder2": "starcoder2",
}
# Fields of PEFT's configuration that the format has no place for.
_FIELDS = {
    "use_dora": "DoRA's magnitudes",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable tokens",
    "lora_bias": "biases of lora_B",
    "target_parameters": "adapters of experts",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "tokens that switch the adapter on",
}
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq")  # initializations that change the base


# A greedy answer of a model with an adapter, through the file's chat template.
_ASK = """
import sys, llama_cpp
model, adapter, prompt, tokens = sys.argv[1:]
llama = llama_cpp.Llama(model, lora_path=adapter, n_ctx=512, verbose=False)
said = llama.create_chat_completion(
    [{"role": "user", "content": prompt}], temperature=0.0, max_tokens=int(tokens)
)
print(said["choices"][0]["message"]["content"])
"""
_OF_BASE = "dtype", "quant"  # what a run says of its base, besides the model


class Exported(NamedTuple):
    """The file of an adapter, and its numbers of layers and bytes."""

    file: Path
    layers: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.file}: {self.layers} layers, {self.nbytes / 1e6:.1f} MB"


def export_gguf(model: str | Path, adapter: str | Path, file: str | Path) -> Exported:
    """Write a LoRA adapter in PEFT's format as GGUF, llama.cpp's format.

    llama.cpp adds alpha / r · B(Ax) to each layer, in the file's order of rows. Scalings that one
    alpha cannot express, such as those of `alpha_pattern`, are multiplied into B. The tensors are
    float32.

    Args:
        model: the base, whose weights are not read: transformers folder, GGUF file or cached hub
            id.
        adapter: PEFT's folder.
        file: the file to write. An adapter that is there is replaced, and nothing else.

    Raises UsageError that names the argument before anything is written: for an architecture whose
    order of rows is not known; for DoRA, biases, `modules_to_save`, trained tokens and experts, for
    which the format has no place; for embeddings and tied heads, which llama.cpp does not take; and
    if the adapter lacks a key or does not fit the base.

    >>> from lora_kernels.finetune import export_gguf
    >>> export_gguf("SmolLM2-135M-Instruct", "RUN/adapter", "adapter.gguf")
    Traceback (most recent call last):
    lora_kernels.finetune.UsageError: adapter: RUN/adapter holds no adapter_config.json; give a ...
    """
    model, adapter, file = Path(model), Path(adapter), Path(file)
    check_config(models.read_adapter_config(adapter))
    check_file(file)
    models.locate(model)
    names = FileNames.of(models.load_config(model))
    stock, state = models.adapt(models.build_skeleton(model), adapter)
    tensors, alpha = gguf_tensors(stock, state, names)
    with named_write(file):
        write_adapter(file, names.architecture, tensors, alpha)
    return Exported(file, len(tensors) // 2, file.stat().st_size)


def check_config(config: Any) -> None:
    """Raise UsageError if the format cannot express an adapter of PEFT's configuration."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise UsageError(f"adapter: got {kind}, want LORA: llama.cpp adds no other adapters")
    for name, what in _FIELDS.items():
        if getattr(config, name, None):
            raise UsageError(
                f"adapter: got {what} ({name}), for which GGUF's adapters have no place; merge it"
            )
    if config.bias != "none":
        raise UsageError(
            f"adapter: got bias={config.bias!r}, want 'none': the format has no biases"
        )
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(_CHANGED_BASE):
        raise UsageError(
            f"adapter: got init_lora_weights={start!r}, which changes the base's weights: save it "
            "with PEFT's path_initial_model_for_weight_conversion"
        )


def check_file(file: Path) -> None:
    """Raise UsageError if the file cannot be written, or is something else than an adapter."""
    if not file.name.endswith(".gguf"):
        raise UsageError(f"gguf: got {file}, want a name that ends in .gguf")
    check_out(file.absolute().parent)
    if not file.exists():
        return
    import gguf

    try:
        kind = gguf.GGUFReader(file).fields["general.type"].contents()
    except Exception:  # no GGUF, or a damaged one
        kind = None
    if kind != "adapter":
        raise UsageError(f"gguf: {file} is there already and is no adapter; give another name")


class FileNames:
    """llama.cpp's names of a model's layers, and its order of their rows.

    Attributes:
        architecture: llama.cpp's name.
    """

    def __init__(self, architecture: str, config: Any) -> None:
        import gguf

        from ..integrations.gguf import processor_of

        self.architecture, self.config = architecture, config
        arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        self._names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self._processor = processor_of(architecture, config)

    @classmethod
    def of(cls, config: Any) -> FileNames:
        """Return the names for transformers' configuration. Raises UsageError if unknown."""
        architecture = ARCHITECTURES.get(config.model_type)
        if architecture is None:
            raise UsageError(
                f"model: got {config.model_type}, for which llama.cpp's order of rows is not known "
                f"here, want one of {', '.join(ARCHITECTURES)}"
            )
        return cls(architecture, config)

    def find(self, name: str, rows: int) -> tuple[str, Tensor]:
        """Return the tensor of a linear layer, and the file's rows in the order of the model.

        Raises UsageError for a layer that llama.cpp does not have, or does not have in such rows.
        """
        from ..integrations.gguf import row_order

        to = self._names.get_name(name)
        if to is None:
            raise UsageError(
                f"adapter: got {name}, for which llama.cpp's {self.architecture} has no name"
            )
        if to == "output" and self.config.tie_word_embeddings:
            raise UsageError(f"adapter: got {name}, which is tied: llama.cpp has no such tensor")
        order = row_order(self._processor, f"{to}.weight", rows)
        if order is None:
            raise UsageError(
                f"adapter: got {name}, whose rows llama.cpp's {self.architecture} changes"
            )
        return f"{to}.weight", order


def gguf_tensors(
    stock: Any, state: dict[str, Tensor], names: FileNames
) -> tuple[dict[str, Tensor], float]:
    """Return the tensors by llama.cpp's names, and alpha.

    Args:
        stock: PEFT's model, which may be on meta: for layers, scalings and shapes.
        state: the adapter's tensors, by PEFT's names.
    """
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    for key in sorted(state):
        name, part, rest = key.removeprefix("base_model.model.").partition(".lora_")
        if part + rest == ".lora_B.weight" or name.endswith(".base_layer.weight"):
            continue  # PEFT saves an adapted embedding's own weight too
        if "embedding" in rest:
            raise UsageError(
                f"adapter: got {name}, an embedding: llama.cpp aborts with such a file"
            )
        if part + rest != ".lora_A.weight":
            raise UsageError(f"adapter: got {key}, want lora_A and lora_B of linear layers")
        A, B = state[key].float(), state[key.replace("lora_A", "lora_B")].float()
        to, order = names.find(name, len(B))
        if A.dim() != 2:
            raise UsageError(f"adapter: got {name}, want linear layers: its A is {list(A.shape)}")
        layer = stock.get_submodule(f"base_model.model.{name}")
        scaling = float(layer.scaling["default"]) * len(A)  # llama.cpp divides by the rank
        found[to] = A, torch.empty_like(B).index_copy_(0, order, B), scaling
    # llama.cpp takes an alpha of 0 for one that is not there.
    alpha = next((scaling for _, _, scaling in found.values() if scaling), 1.0)
    tensors: dict[str, Tensor] = {}
    for to, (A, B, scaling) in found.items():
        tensors[f"{to}.lora_a"] = A.contiguous()
        tensors[f"{to}.lora_b"] = B if scaling == alpha else B * (scaling / alpha)
    return tensors, alpha


def write_adapter(file: Path, architecture: str, tensors: dict[str, Tensor], alpha: float) -> None:
    """Write the file under another name, and rename it."""
    import gguf

    partial = file.with_name(f".{file.name}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(partial, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, t in tensors.items():
            writer.add_tensor(name, t.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(file)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def serving_command(model: Path, file: Path) -> str:
    """Return the command by which llama.cpp serves a GGUF file with an adapter."""
    return f"llama-server -m {shlex.quote(str(model))} --lora {shlex.quote(str(file))}"


def ask_llama_cpp(model: Path, adapter: Path, prompt: str, tokens: int) -> str:
    """Return llama.cpp's answer to a prompt, by llama-cpp-python in a process of its own.

    An error is returned as the answer: llama.cpp aborts for some files.
    """
    said = subprocess.run(
        [sys.executable, "-c", _ASK, str(model), str(adapter), prompt, str(tokens)],
        capture_output=True,
        text=True,
        check=False,
    )
    if said.returncode:
        last = said.stderr.strip().splitlines()[-1:]
        return f"exit status {said.returncode}: {''.join(last)}"
    return said.stdout.strip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a LoRA adapter as a GGUF file, which llama.cpp adds to the model's own file. What "
        "the format or llama.cpp cannot take is refused before anything is written."
    )
    add_options(parser, ExportOptions)


def run(args: argparse.Namespace) -> int:
    """Return the exit status, 0. Raises UsageError for bad arguments."""
    given = fill_in_run(vars(args))
    options = ExportOptions(**{name: given[name] for name in given if name not in _OF_BASE})
    silence_libraries()
    print(export_gguf(options.model, options.adapter, options.gguf))
    model = options.model if models.is_gguf(options.model) else Path("FILE.gguf")
    print(f"to serve it: {serving_command(model, options.gguf)}")
    return 0
