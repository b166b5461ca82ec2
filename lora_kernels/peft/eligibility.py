"""Reasons for which one call of a fused layer is left to PEFT.

Each `…_reason` function returns the reason in words, or None if the layer is supported. `swap.py`
has the other reasons of `fuse`. A fused forward, and `explain`, call the function for their kind of
layer: `linear_reason`, `svd_reason` or `embedding_reason`. Then they call `unreadable_reason`, the
reason to call the base layer as a module and fuse only the adapters. These reasons depend on the
layer's state, on x's device and dtype, and on what observes the thread. `heavier_reason` alone is a
reason of `fuse`. The functions read `_modules` and `_parameters`, because
`nn.Module.__getattr__` takes ten times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..ops import context
from ..quantization.tensor4bit import Tensor4bit
from .adapters import (
    COLUMN_SCALE,
    RANK_GATE,
    ROW_INDEX,
    Adapter,
    EmbeddingAdapter,
    RowNames,
    SVDAdapter,
    dropout_p,
    operand_of,
    operand_reason,
    weight_of,
)
from .modules import (
    LINEAR_FORWARD,
    hooks_of,
    is_conv1d,
    is_linear4bit,
    library_forward,
    patched_reason,
)
from .packed import quantizes_input
from .zero3 import is_gathered, is_partitioned

_CONV1D_FORWARD = library_forward(Conv1D)
_EMBEDDING_FORWARD = library_forward(nn.Embedding)
_DROPOUT_FORWARD = library_forward(nn.Dropout)
_IDENTITY_FORWARD = library_forward(nn.Identity)
_MAGNITUDE_FORWARD = library_forward(DoraLinearLayer)
_DORA_FORWARD = library_forward(DoraLinearVariant)

# The operands of variants that a fused layer's own call takes, without adapter_names.
OPERANDS = (RANK_GATE, ROW_INDEX, COLUMN_SCALE)


def heavier_reason(layer: Any) -> str | None:
    """Return why PEFT's layer moves fewer bytes than PyTorch's GEMMs in our order; None if not.

    The rule approximates the bytes that `lora-kernels bench --count` counts, for a forward and a
    training step with x in the base's dtype. Our order draws dropout's mask again in the backward,
    and runs the base GEMM of a DoRA with dropout twice. It saves passes over y and adds passes over
    x. So PEFT's order moves fewer bytes if y is narrower than x, or if the ranks are as many as y's
    columns.
    """
    base = layer.get_base_layer()
    if not (isinstance(base, nn.Linear) or is_conv1d(base)):
        return None  # a base called as a module moves the same bytes in both orders
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names or any(operand_of(layer, name) == ROW_INDEX for name in names):
        return None  # an aLoRA's bytes depend on its active rows
    four_bit = is_linear4bit(base)
    dtype = (base.compute_dtype or torch.bfloat16) if four_bit else base.weight.dtype
    four_bit = four_bit or isinstance(base.weight, Tensor4bit)
    A = layer.lora_A[names[0]]
    is_wide = getattr(A, "weight", A).dtype.itemsize > dtype.itemsize
    has_dropout = any(getattr(layer.lora_dropout[name], "p", 0.0) for name in names)
    N, K, ranks = layer.out_features, layer.in_features, [layer.r[name] for name in names]
    uses_dora, R = is_dora(layer, names[0]), sum(ranks)
    if not has_dropout:
        is_heavier = N < K and R > N
    elif is_wide:  # from 64 ranks on, 512 rows of x are copied to float32 for each adapter
        is_heavier = N < K and (R > N or (len(names) > 1 and max(ranks) >= 64))
    elif uses_dora:
        has_many_ranks = (16 if four_bit else 8) * R >= min(N, K)
        is_heavier = N < K or has_many_ranks or dtype is torch.float16
    else:
        is_heavier = N < K and (len(names) > 1 or 8 * R >= N)
    if not is_heavier:
        return None
    description = (
        f"{len(names)} adapters" if len(names) > 1 else "DoRA" if uses_dora else "one adapter"
    )
    return (
        f"PEFT's own forward moves fewer bytes for {description}{' with dropout' * has_dropout}, "
        f"{R} ranks, {K} columns of x and {N} of y"
    )


def linear_reason(
    layer: Any,
    adapters: Sequence[Adapter],
    device: torch.device,
    x_dtype: torch.dtype,
    is_mixed: bool = False,
) -> str | None:
    """Return why a fused LoRA layer runs PEFT's forward for x on this device.

    is_mixed: whether the call names an adapter for each row.
    """
    reason = state_reason(layer, adapters)
    reason = reason or operand_reason(layer, adapters, OPERANDS, "a fused layer")
    if reason is not None:
        return reason
    for adapter in adapters:
        name, lora_A, lora_B, _, dropout, *_ = adapter
        if name in layer.lora_variant:
            variant = _variant_reason(layer, adapters, adapter, device)
            if variant is not None:
                return f"adapter {name!r} is a {variant}"
        reason = unreadable_reason(lora_A, device) or unreadable_reason(lora_B, device)
        if reason is not None:
            return f"adapter {name!r}: {reason}"
        if (x_dtype is torch.float64) is not (weight_of(lora_A).dtype is torch.float64):
            return f"adapter {name!r}: float64 goes with float64 alone"
        if reason := dropout_reason(dropout):
            return f"adapter {name!r}: {reason}"
    return _mixed_reason(layer, adapters) if is_mixed else None


def _variant_reason(
    layer: Any, adapters: Sequence[Adapter], adapter: Adapter, device: torch.device
) -> str | None:
    """Return a description of a variant whose state is left to PEFT, else None."""
    name, operand = adapter.name, operand_of(layer, adapter.name)
    if operand is None:
        return None
    if operand == RANK_GATE:
        if name in getattr(layer, "_lora_kasa_truncation_deferred", ()):
            return "KaSA, which truncates the base weight in PEFT's next forward"
        return tensor_reason(device, dim=1, lora_diag=adapter.diag)
    if operand == ROW_INDEX:
        if adapter.lora_B._parameters["bias"] is not None:
            return "variant of LoRA (aLoRA) with a lora_bias"
        is_swapped = isinstance(adapter.scaling, Tensor)
        return "variant of LoRA (aLoRA) prepared for hot-swapping" if is_swapped else None
    if len(adapters) > 1:
        return "DoRA beside other active adapters, over whose results PEFT takes it"
    if isinstance(adapters[0].scaling, Tensor):
        return "DoRA prepared for hot-swapping"
    reason = unreadable_reason(layer.base_layer, device)
    if reason is not None:
        return f"DoRA, which needs the base weight: {reason}"
    magnitude = layer.lora_magnitude_vector[name]
    is_plain = type(magnitude) is DoraLinearLayer and not has_hooks(magnitude)
    is_original = type(magnitude).forward is _MAGNITUDE_FORWARD
    is_original = is_original and DoraLinearVariant.forward is _DORA_FORWARD
    if not (is_plain and is_original) or patched_reason(magnitude):
        return "DoRA whose magnitude is no plain module of PEFT's"
    if magnitude.weight.device != device:
        return f"DoRA whose magnitude is on {magnitude.weight.device}, x on {device}"
    return None


def _mixed_reason(layer: Any, adapters: Sequence[Adapter]) -> str | None:
    """Return why a call with `adapter_names` cannot be one `multi_lora_linear`."""
    reason = operand_reason(layer, adapters, (ROW_INDEX,), "a call with adapter_names")
    if reason is not None:
        return reason
    for name, _, lora_B, scaling, *_ in adapters:
        if lora_B._parameters["bias"] is not None:
            return f"adapter {name!r} has a lora_bias, and rows name their adapters"
        if isinstance(scaling, Tensor):
            return f"adapter {name!r} is prepared for hot-swapping, and rows name their adapters"
    dtypes = {(weight_of(a.lora_A).dtype, weight_of(a.lora_B).dtype) for a in adapters}
    if len(dtypes) > 1 or len({dropout_p(a.dropout) for a in adapters}) > 1:
        return "adapters that rows name differ in dtype or dropout"
    return None


def has_invalid_sequences(adapters: Sequence[Adapter], x: Tensor, rows: RowNames) -> bool:
    """Return True if an aLoRA is active, and x is not [B, T, K] or [B, K] or alora_offsets not [B].

    PEFT's forward then computes the call or, for most shapes, raises.
    """
    if not any(adapter.is_alora for adapter in adapters):
        return False
    fits = rows.offsets is None or len(rows.offsets) == x.shape[0]
    return x.dim() not in (2, 3) or not fits


def svd_reason(
    layer: Any, adapters: Sequence[SVDAdapter], device: torch.device, x_dtype: torch.dtype
) -> str | None:
    """Return why a fused AdaLoRA layer runs PEFT's forward for x on this device."""
    reason = state_reason(layer, adapters) or operand_reason(layer, adapters, (), "AdaLoRA")
    if reason is not None:
        return reason
    for name, lora_A, lora_B, lora_E, ranknum, _, dropout in adapters:
        reason = tensor_reason(device, lora_A=lora_A, lora_B=lora_B, lora_E=lora_E)
        reason = reason or dropout_reason(dropout)
        if reason is None and ranknum.device != device:
            reason = f"its ranknum is on {ranknum.device}, x on {device}"
        if reason is None and not lora_A.shape[0]:
            reason = "every rank was taken from it"
        if reason is None and (x_dtype is torch.float64) is not (lora_A.dtype is torch.float64):
            reason = "float64 goes with float64 alone"
        if reason is not None:
            return f"adapter {name!r}: {reason}"
    return None


def embedding_reason(
    layer: Any, adapters: Sequence[EmbeddingAdapter], device: torch.device
) -> str | None:
    """Return why a fused embedding runs PEFT's forward for x on this device."""
    if layer.mixed_batch is not None:
        return "the last call named an adapter for each row (adapter_names)"
    reason = state_reason(layer, adapters) or _table_reason(layer.base_layer, device)
    reason = reason or operand_reason(layer, adapters, (), "an embedding")
    if reason is not None:
        return reason
    for name, lora_A, lora_B, _ in adapters:
        if getattr(layer, "input_fns", {}).get(name) or getattr(layer, "output_fns", {}).get(name):
            return f"adapter {name!r} is sharded over devices"
        reason = tensor_reason(device, lora_A=lora_A, lora_B=lora_B)
        if reason is not None:
            return f"adapter {name!r}: {reason}"
    return None


def _table_reason(base: nn.Module, device: torch.device) -> str | None:
    """Return why calling the base embedding may do more than `F.embedding`."""
    if type(base) is not nn.Embedding:
        return f"the base is a {type(base).__name__}, not exactly nn.Embedding"
    if has_hooks(base):
        return hook_reason(base, "its nn.Embedding")
    if nn.Embedding.forward is not _EMBEDDING_FORWARD:
        return "nn.Embedding.forward was replaced"
    if "forward" in base.__dict__ and (reason := patched_reason(base)):
        return reason
    if base.max_norm is not None:
        return "the base has max_norm, by which each lookup writes to what it looks up in"
    if base.sparse:
        return "the base asks for sparse gradients"
    if hasattr(base, "embed_scale"):
        return "the base has an embed_scale"
    return tensor_reason(device, weight=cast(Tensor, base._parameters["weight"]))


def state_reason(layer: Any, adapters: Sequence[object]) -> str | None:
    """Return why any kind of fused layer runs PEFT's forward in the layer's state."""
    if (reason := context.unfused_context() or replaced_reason(type(layer))) is not None:
        return reason
    if layer.disable_adapters:
        return "adapters are disabled: the base layer's own forward"
    if layer.merged:
        loss = getattr(layer, "merge_loss", None)
        return "adapters are merged: the base layer's own forward" + (f"; {loss}" if loss else "")
    if not adapters:
        return "no active adapter on this layer: the base layer's own forward"
    if is_base_trainable(layer):
        return "the base weight is trainable"
    return None


def replaced_reason(fused_class: Any) -> str | None:
    """Return why PEFT's class, which the fused class overrides, may do more than PEFT's forward."""
    cls = fused_class.peft_class
    if cls.forward is fused_class.peft_forward:
        return None
    return f"{cls.__name__}.forward was replaced"


def dropout_reason(dropout: nn.Module) -> str | None:
    """Return why calling the module may do more than dropout."""
    if type(dropout) is not nn.Dropout and type(dropout) is not nn.Identity:
        return f"its dropout is a {type(dropout).__name__}"
    original_forward = _DROPOUT_FORWARD if type(dropout) is nn.Dropout else _IDENTITY_FORWARD
    if type(dropout).forward is not original_forward:
        return f"{type(dropout).__name__}.forward was replaced"
    if has_hooks(dropout):
        return "a hook sits on its dropout"
    return f"{reason} (its dropout's)" if (reason := patched_reason(dropout)) else None


def unreadable_reason(module: nn.Module, device: torch.device) -> str | None:
    """Return why calling the module may do more than `F.linear` on parameters on this device."""
    four_bit, conv1d = is_linear4bit(module), is_conv1d(module)
    if type(module).__name__ == "FullyShardedDataParallel":
        return "FSDP1 gathers its weight when it is called"
    if type(module) is not nn.Linear and not four_bit and not conv1d:
        return f"{type(module).__name__} is not exactly nn.Linear"
    if has_hooks(module):
        return hook_reason(module, f"its {'Conv1D' if conv1d else 'nn.Linear'}")
    if nn.Linear.forward is not LINEAR_FORWARD:
        return "nn.Linear.forward was replaced"
    if conv1d and type(module).forward is not _CONV1D_FORWARD:
        return "Conv1D.forward was replaced"
    if quantizes_input(module):
        return "compressed-tensors rounds its x or y too"
    if "forward" in module.__dict__ and (reason := patched_reason(module)):
        return reason
    weight = module._parameters.get("weight")
    if four_bit:
        from .base4bit import unreadable_4bit

        return unreadable_4bit(module, device)
    return tensor_reason(device, weight=weight)


def tensor_reason(device: torch.device, dim: int = 2, **tensors: Any) -> str | None:
    """Return why one of the tensors is not a plain matrix, or vector, on this device."""
    for name, tensor in tensors.items():
        if tensor is None:
            return f"its {name} is no parameter, as under FSDP1 or in a replica of DataParallel"
        if type(tensor) not in (nn.Parameter, Tensor, Tensor4bit):
            return f"its {name} is a {type(tensor).__name__}"
        if tensor.device != device:
            return f"its {name} is on {tensor.device}, x on {device}"
        if tensor.dim() != dim:
            return f"its {name} is flattened, as by FSDP1 or ZeRO-3"
    return None


def is_base_trainable(layer: Any) -> bool:
    weight = cast(nn.Module, layer._modules["base_layer"])._parameters.get("weight")
    return weight is not None and weight.requires_grad


def is_dora(layer: Any, name: str) -> bool:
    """Return True if the adapter has a column scale, as DoRA has."""
    return operand_of(layer, name) == COLUMN_SCALE


def has_hooks(module: nn.Module) -> bool:
    """Return True if the module's call runs hooks.

    The hooks by which ZeRO-3 gathers parameters do not count while the parameters are gathered.
    """
    return any(hooks_of(module)) and not is_gathered(module)


def hook_reason(module: nn.Module, description: str) -> str:
    """Return the reason to call a module that has hooks. description: of the module."""
    if is_partitioned(module._parameters.get("weight")):
        return f"DeepSpeed's ZeRO-3 gathers {description} by hooks: call fuse again"
    return f"a hook sits on {description}"
