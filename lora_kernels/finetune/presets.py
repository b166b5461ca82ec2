"""Presets: add adapters for a domain by name, and several adapters to one base."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..layers import adaptable_experts
from ..layers.experts import projections, unsupported_reason
from ..peft import fuse
from .errors import UsageError
from .model import ALL_LINEAR, features, linear_layers
from .options import check_numbers, suggest


@dataclass(frozen=True)
class Preset:
    """The settings of an adapter.

    targets: roles of `ROLES`, names of layers, or "all-linear" for every linear layer.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float


PRESETS = {
    "medical": Preset(32, 32, ("q", "v", "gate", "up"), 0.1),
    "legal": Preset(16, 16, ("q", "k", "v"), 0.05),
    "chat": Preset(16, 32, ("q", "k", "v", "o"), 0.05),
    "code": Preset(32, 64, ("q", "k", "v", "o", "gate", "up", "down"), 0.05),
}

# Names of each projection, in order of preference: Llama's and similar models', BERT's, and layers
# that combine several projections, as in GPT-2.
_QKV = ("attn.c_attn", "qkv_proj", "query_key_value", "Wqkv")
ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "q_lin", *_QKV),
    "k": ("k_proj", "key", "k_lin", *_QKV),
    "v": ("v_proj", "value", "v_lin", *_QKV),
    "o": ("o_proj", "out_proj", "out_lin", "attention.output.dense", "attn.c_proj"),
    "gate": ("gate_proj", "gate_up_proj"),
    "up": ("up_proj", "gate_up_proj", "mlp.c_fc", "fc1", "intermediate.dense", "dense_h_to_4h"),
    "down": ("down_proj", "mlp.c_proj", "fc2", "dense_4h_to_h"),
}


def find_preset(name: str | Preset) -> Preset:
    """Return the preset of that name. Raises UsageError with the closest name.

    >>> find_preset("medcial")
    Traceback (most recent call last):
    lora_kernels.finetune.UsageError: preset: got 'medcial'; did you mean 'medical'?
    """
    if isinstance(name, Preset):
        return name
    if not isinstance(name, str) or name not in PRESETS:
        raise UsageError(f"preset: got {name!r}; {suggest(name, PRESETS)}")
    return PRESETS[name]


def find_targets(
    model: nn.Module, targets: str | Iterable[str], argument: str = "targets"
) -> tuple[str | list[str], list[str]]:
    """Return PEFT's `target_modules`, and the roles for which the model has no layer.

    targets: as in `Preset`.

    Raises UsageError with the model's layer names if no target matches, or if a target is neither a
    role nor a layer.

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "up_proj": nn.Linear(2, 2)})
    >>> find_targets(model, ("q", "up", "gate"))
    (['q_proj', 'up_proj'], ['gate'])
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    if targets == (ALL_LINEAR,):
        return ALL_LINEAR, []
    have = list(dict.fromkeys(name.rpartition(".")[2] for name in linear_layers(model)))
    found, missing = dict[str, None](), []
    for target in targets:
        names = ROLES.get(target, (target,))
        match = next((name for name in names if target_layers(model, [name])), None)
        if match is not None:
            found[match] = None
        elif target in ROLES:
            missing.append(target)
        else:
            close = difflib.get_close_matches(target, have, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UsageError(
                f"{argument}: no linear layer is named {target}; {hint}this model has "
                f"{', '.join(have)}"
            )
    if not found and not experts_parameters(model, targets):
        raise UsageError(
            f"{argument}: got {', '.join(targets) or 'none'}, which no layer of this "
            f"{type(model).__name__} matches; its linear layers are {', '.join(have) or 'none'}: "
            "name some of them"
        )
    return list(found), missing


def target_layers(model: nn.Module, names: str | Iterable[str]) -> dict[str, nn.Module]:
    """Return the layers that PEFT adapts for these `target_modules`, by full name."""
    layers = linear_layers(model)
    if names == ALL_LINEAR:
        return layers
    ends = tuple(f".{name}" for name in names)
    return {name: layer for name, layer in layers.items() if f".{name}".endswith(ends)}


def check_adapter(
    skeleton: nn.Module, targets: str | Iterable[str], rank: int, argument: str = "rank"
) -> None:
    """Raise UsageError if the model lacks the targets, or if the rank exceeds a layer's width."""
    layers = target_layers(skeleton, find_targets(skeleton, targets, "target_modules")[0])
    name = min(layers, key=lambda name: min(features(layers[name])), default=None)
    if name is not None and rank > (least := min(features(layers[name]))):
        sizes = "×".join(map(str, features(layers[name])))
        raise UsageError(f"{argument}: got {rank}, want at most {least}: {name} is {sizes}")


def experts_parameters(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Return PEFT's `target_parameters` for the roles "gate", "up" and "down": full names.

    "all-linear" stands for all of an experts module's projections.
    """
    chosen = {targets} if isinstance(targets, str) else {*targets}
    found = []
    for name, module in model.named_modules():
        if unsupported_reason(module) is None:
            up, down = projections(module)
            found += [f"{name}.{up}"] * bool(chosen & {"gate", "up", ALL_LINEAR})
            found += [f"{name}.{down}"] * bool(chosen & {"down", ALL_LINEAR})
    return found


def add_lora_layers(
    model: Any,
    preset: str | Preset = "chat",
    *,
    adapter_name: str = "default",
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    targets: str | Sequence[str] | None = None,
    seed: int = 0,
    fused: bool = True,
    **config: Any,
) -> Any:
    """Add an adapter of PEFT to `model` in place, fuse its layers, and return the PEFT model.

    On a PEFT model, the new adapter becomes the only active and trainable adapter.

    Args:
        model: a transformers model, or a PEFT model of one.
        preset: "medical", "legal", "chat" or "code", or a `Preset`.
        adapter_name: the adapter's name in PEFT, for `model.set_adapter(name)` and
            `adapter_names=[...]`.
        rank, alpha, dropout: override the preset.
        targets: overrides the preset: roles ("q", "k", "v", "o", "gate", "up", "down"), names of
            layers, or "all-linear". In a mixture of experts the last three roles are the experts'
            projections, which PEFT adapts without dropout.
        seed: of lora_A's initialization. The global random state does not change.
        fused: whether to fuse the layers.
        config: other fields of PEFT's `LoraConfig`.

    Warns of roles for which the model has no layer. Raises UsageError that names the argument.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from lora_kernels.finetune.presets import add_lora_layers
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=9, num_hidden_layers=1, **sizes))
    >>> add_lora_layers(base, "legal").peft_config["default"].r
    16
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    given = {"rank": rank, "alpha": alpha, "dropout": dropout}
    changes: Any = {name: value for name, value in given.items() if value is not None}
    chosen = replace(find_preset(preset), **changes)
    check_numbers(vars(chosen))
    peft_model = model if isinstance(model, PeftModel) else None
    if peft_model is not None and adapter_name in peft_model.peft_config:
        raise UsageError(
            f"adapter_name: {adapter_name!r} is on the model already; give another name, or "
            "model.set_adapter() to go on with it"
        )
    base = model if peft_model is None else peft_model.get_base_model()
    targets = chosen.targets if targets is None else targets
    names, missing = find_targets(base, targets)
    experts = experts_parameters(base, targets)
    missing = [] if experts else missing
    if experts and chosen.dropout:
        if dropout is not None:
            raise UsageError(f"dropout: got {dropout}, want 0: PEFT adapts experts without dropout")
        warnings.warn("PEFT adapts experts without dropout: 0 is used", stacklevel=2)
        chosen = replace(chosen, dropout=0.0)
    if missing:
        warnings.warn(
            f"this {type(base).__name__} has no layer for {', '.join(missing)}; the adapter is "
            f"on {', '.join(names)}",
            stacklevel=2,
        )
    any_alpha: Any = chosen.alpha  # PEFT's annotation is int, but it accepts float
    config = peft_settings(base, names) | {"lora_alpha": any_alpha} | config
    if experts and names != ALL_LINEAR:  # with ALL_LINEAR PEFT finds the experts
        config = {"target_parameters": experts} | config
    lora = LoraConfig(r=chosen.rank, lora_dropout=chosen.dropout, target_modules=names, **config)
    with torch.random.fork_rng(), adaptable_experts(base):
        torch.manual_seed(seed)
        if peft_model is None:
            peft_model = get_peft_model(model, lora, adapter_name)
        else:
            peft_model.add_adapter(adapter_name, lora)
            peft_model.set_adapter(adapter_name)
    return fuse(peft_model) if fused else peft_model


def peft_settings(base: Any, names: str | Iterable[str]) -> dict[str, Any]:
    """Return the fields of PEFT's configuration that depend on the model and its layers."""
    from transformers.pytorch_utils import Conv1D

    task = {"task_type": "CAUSAL_LM"} if hasattr(base, "generate") else {}
    layers = target_layers(base, names).values()
    return task | {
        "fan_in_fan_out": bool(layers) and all(isinstance(layer, Conv1D) for layer in layers)
    }


def create_domain_model(
    model: Any,
    preset: str | Preset,
    data: Any,
    *,
    out: str | Path,
    tokenizer: Any = None,
    val: Any = None,
    adapter_name: str | None = None,
    adapter: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    **trainer: Any,
) -> Any:
    """Add a domain's adapter to `model`, train it on `data`, save it, and return the PEFT model.

    Training resumes from the last checkpoint in `out`, if there is one. A call with the returned
    model and another preset adds a second domain to the same base.

    Args:
        model, preset: as in `add_lora_layers`.
        data, val: `ChatData`, or files for `load_chat`, which needs the tokenizer.
        out: folder of the checkpoints. The adapter is saved to out/adapter, in a
            subfolder of its name unless that is "default".
        tokenizer: saved with the checkpoints.
        adapter_name: None for the preset's name.
        adapter: settings of `add_lora_layers`.
        training: settings of `training_arguments`.
        trainer: settings of `LoRATrainer`.

    Raises UsageError that names the argument.
    """
    from .chat import ChatData, load_chat
    from .checkpoints import named_write, newest_checkpoint
    from .trainer import LoRATrainer, training_arguments

    find_preset(preset)
    name = adapter_name or (preset if isinstance(preset, str) else "default")
    if not isinstance(data, ChatData) and tokenizer is None:
        raise UsageError("tokenizer: got none, want the model's, by which data is read")
    args = training_arguments(out, **training or {})
    train, held_out = (
        part if part is None or isinstance(part, ChatData) else load_chat(part, tokenizer)
        for part in (data, val)
    )
    peft_model = add_lora_layers(model, preset, adapter_name=name, **adapter or {})
    trainer |= {"train_dataset": train, "eval_dataset": held_out, "processing_class": tokenizer}
    made = LoRATrainer(peft_model, args, **trainer)
    made.train(resume_from_checkpoint=newest_checkpoint(out) is not None)
    folder = Path(out, "adapter")
    with named_write(folder):
        peft_model.save_pretrained(
            str(folder), selected_adapters=[name], save_embedding_layers=False
        )
    return peft_model.eval()
