"""The reader of PEFT's adapted layers: a `Record` for each active adapter, or the reason (a string)
why PEFT's own forward computes the call.

It reads the live layer in each call, keeps nothing, and refuses what it does not know. This file
alone knows PEFT's variants of LoRA by name. The code paths know operands (`core/record.py`).
`direct.read` is the fast reader of the common state. The functions read `_modules` and
`_parameters`, because `nn.Module.__getattr__` takes ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from ..core.record import CodePath, Record, path_reason
from .eligibility import (
    dropout_reason,
    has_hooks,
    state_reason,
    tensor_reason,
    unreadable_reason,
)
from .modules import is_conv1d, original_forward, patched_reason

_MAGNITUDE_FORWARD = original_forward(DoraLinearLayer)
_DORA_FORWARD = original_forward(DoraLinearVariant)

_COMMON = {"dropout_p", "others", "is_transposed", "called"}
# The operands that a fused layer's own call takes.
LAYER = CodePath(
    "a fused layer",
    (
        frozenset({*_COMMON, "scaling", "lora_bias", "rank_gate", "ranknum"}),
        frozenset({*_COMMON, "has_row_index"}),
        # PEFT computes DoRA over the sum of all adapters, and needs the base's weight.
        frozenset({"dropout_p", "is_transposed", "magnitude"}),
        frozenset({"dropout_p", "is_transposed", "column_scale", "rank_gate"}),
    ),
)
# Those of a call whose rows name their adapters.
NAMED_ROWS = CodePath("a call with adapter_names", (frozenset({*_COMMON, "has_row_index"}),))


class Variant(NamedTuple):
    """A variant of LoRA.

    Args:
        title: its name, with an article.
        operand: the field of `Record` that it fills; None for plain LoRA's formula.
        read: (layer, adapter's name, x's device) -> the operand, or the reason (a string) why it
            cannot be read.
    """

    title: str
    operand: str | None = None
    read: Callable[[Any, str, torch.device], Any] | None = None


def read_magnitude(layer: Any, name: str, device: torch.device) -> Tensor | str:
    """Return DoRA's magnitude."""
    magnitude = layer.lora_magnitude_vector[name]
    is_plain = type(magnitude) is DoraLinearLayer and not has_hooks(magnitude)
    is_original = type(magnitude).forward is _MAGNITUDE_FORWARD
    is_original = is_original and DoraLinearVariant.forward is _DORA_FORWARD
    if not (is_plain and is_original) or patched_reason(magnitude):
        return "its magnitude is no plain module of PEFT's"
    weight: Tensor = magnitude.weight
    return tensor_reason(device, dim=1, magnitude=weight) or weight


def read_diag(layer: Any, name: str, device: torch.device) -> Tensor | str:
    """Return KaSA's factors of the ranks."""
    if name in getattr(layer, "_lora_kasa_truncation_deferred", ()):
        return "KaSA truncates the base weight in PEFT's next forward"
    diag: Tensor = layer.lora_diag[name]
    return tensor_reason(device, dim=1, lora_diag=diag) or diag


# The variants that are read, by PEFT's class. Older releases of PEFT lack some classes.
VARIANTS: dict[Any, Variant] = {
    getattr(variants, name, None): variant
    for name, variant in {
        "DoraLinearVariant": Variant("a DoRA", "magnitude", read_magnitude),
        "KasaLinearVariant": Variant("a KaSA", "rank_gate", read_diag),
        "ALoraLinearVariant": Variant("an aLoRA", "has_row_index", lambda *_: True),
        # Plain LoRA with lora_B frozen.
        "MiCALinearVariant": Variant("a MiCA"),
        "MiCAEmbeddingVariant": Variant("a MiCA"),
    }.items()
}


def variant_of(layer: Any, name: str) -> Variant | None:
    """Return an adapter's variant, whose operand no code path takes if unknown; None for LoRA."""
    variant = layer.lora_variant.get(name)
    if variant is None:
        return None
    cls = type(variant)
    unknown = Variant(f"a variant of LoRA ({cls.__name__})", "formula", lambda *_: cls.__name__)
    return VARIANTS.get(cls) or unknown


def has_operand(layer: Any, name: str, operand: str) -> bool:
    """Return True if the adapter's variant fills this field of `Record`."""
    variant = variant_of(layer, name)
    return variant is not None and variant.operand == operand


def active_names(layer: Any, names: Sequence[str] | None = None) -> list[str]:
    """Return the adapters that the layer has, of these names; None for the active ones."""
    lora_A = layer._modules["lora_A"]  # a replica of DataParallel keeps the keys of no parameter
    held = lora_A._modules or lora_A._parameters
    return [name for name in names or layer.active_adapters if name in held]


def read(
    layer: Any, device: torch.device, x_dtype: torch.dtype, names: Sequence[str] | None = None
) -> list[Record] | str:
    """Return a record for each active adapter of a fused linear layer, or the reason.

    Args:
        layer: a `Fused` layer over a linear base.
        device, x_dtype: of x.
        names: the adapters that the rows of x name; None for the active ones.
    """
    reason = state_reason(layer)
    if reason is not None:
        return reason
    adapters = active_names(layer, names)
    if not adapters:
        return NO_ADAPTER
    base = read_base(layer._modules["base_layer"], device)
    records = []
    for name in adapters:
        record = layer.read_adapter(name, device, base)
        if isinstance(record, str):
            return f"adapter {name!r}: {record}"
        if (x_dtype is torch.float64) is not (record.lora_A.dtype is torch.float64):
            return f"adapter {name!r}: float64 goes with float64 alone"
        records.append(record)
    return records


def read_call(
    layer: Any, device: torch.device, x_dtype: torch.dtype, names: Sequence[str] | None = None
) -> list[Record] | str:
    """Return the records of a fused linear layer's own call, or the reason. Args as in `read`."""
    records = read(layer, device, x_dtype, names)
    if isinstance(records, str):
        return records
    if names is None:
        return path_reason(records, LAYER) or records
    return path_reason(records, NAMED_ROWS) or _mixed_reason(records) or records


def _mixed_reason(records: Sequence[Record]) -> str | None:
    """Return why one `multi_lora_linear` cannot compute the adapters that rows name."""
    if len({(r.lora_A.dtype, r.lora_B.dtype, r.dropout_p) for r in records}) > 1:
        return "adapters that rows name differ in dtype or dropout"
    return None


NO_ADAPTER = "no active adapter on this layer: the base layer's own forward"


def read_base(base: Any, device: torch.device) -> Record:
    """Return the record of a linear layer without an adapter."""
    reason = unreadable_reason(base, device)
    if reason is not None:
        return Record(None, None, None, called=reason)
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    return Record(weight, None, None, bias, is_transposed=is_conv1d(base))


def read_adapter(layer: Any, name: str, device: torch.device, base: Record) -> Record | str:
    """Return the base's record with an adapter of LoRA or of a variant, or the reason."""
    modules = cast(dict[str, Any], layer._modules)
    lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    record = Record(  # torch 2.8 cannot trace `_replace`
        base.weight,
        lora_A._parameters.get("weight"),
        lora_B._parameters.get("weight"),
        base.bias,
        layer.scaling[name],
        dropout_p(dropout),
        name,
        lora_bias=lora_B._parameters.get("bias"),
        is_transposed=base.is_transposed,
        called=base.called,
    )
    if layer.lora_variant:
        described = add_variant(layer, record, device)
        if isinstance(described, str):
            return described
        record = described
    reason = unreadable_reason(lora_A, device) or unreadable_reason(lora_B, device)
    return reason or dropout_reason(dropout) or record


def add_variant(layer: Any, record: Record, device: torch.device) -> Record | str:
    """Return an adapter's record with the operand of its variant, or the reason."""
    variant = variant_of(layer, record.name)
    if variant is None:
        return record
    record = record._replace(variant=variant.title)
    if variant.operand is None:
        return record
    assert variant.read is not None
    operand = variant.read(layer, record.name, device)
    if isinstance(operand, str) and variant.operand != "formula":
        return f"it is {variant.title}, and {operand}"
    return record._replace(**{variant.operand: operand})


def read_svd_adapter(layer: Any, name: str, device: torch.device, base: Record) -> Record | str:
    """Return the base's record with an adapter of AdaLoRA, or the reason."""
    modules = layer._modules
    lora_A, lora_B, lora_E, ranknum = (
        modules[field]._parameters[name] for field in ("lora_A", "lora_B", "lora_E", "ranknum")
    )
    dropout = modules["lora_dropout"]._modules[name]
    reason = tensor_reason(device, lora_A=lora_A, lora_B=lora_B, lora_E=lora_E)
    reason = reason or dropout_reason(dropout)
    if reason is None and ranknum.device != device:
        reason = f"its ranknum is on {ranknum.device}, x on {device}"
    if reason is None and not lora_A.shape[0]:
        reason = "every rank was taken from it"
    if reason is not None:
        return reason
    record = Record(
        base.weight,
        lora_A,
        lora_B,
        base.bias,
        layer.scaling[name],
        dropout_p(dropout),
        name,
        rank_gate=lora_E,
        ranknum=ranknum,
        is_transposed=base.is_transposed,
        called=base.called,
    )
    variant = variant_of(layer, name) if layer.lora_variant else None
    if variant is not None:  # PEFT has no variant of AdaLoRA
        record = record._replace(variant=variant.title, formula=variant.title)
    return record


def dropout_p(dropout: nn.Module) -> float:
    """Return the dropout probability of the module, which is 0 in eval mode."""
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
