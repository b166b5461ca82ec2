"""What the next call of each layer will do, and why: a `Row` and the calls that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .. import ops, selection
from ..backends import cpu, cpu_heuristics
from ..backends.decode4bit import decoded_by
from ..backends.library import follows_gpu
from ..core.problem import Layout, Problem
from ..functional import base_dtype
from ..layers import DoRALinear, LoRAEmbedding, LoRALayer
from ..layers.experts import is_quantized, stack
from ..quantization import Weight4bit
from . import traffic
from .adalora import FusedSVD
from .adapters import (
    Adapter,
    Call,
    adapters_of,
    calls,
    embedding_adapters_of,
    svd_adapters_of,
    svd_calls,
)
from .base import base_weight, is_conv1d, is_linear4bit
from .eligibility import (
    embedding_reason,
    is_dora,
    linear_reason,
    svd_reason,
    unreadable_reason,
)
from .embedding import FusedEmbedding
from .experts import FusedParamWrapper, active_adapter, experts_reason
from .frozen import StreamedLinear
from .predict import Part


class Row(NamedTuple):
    """What the next call of one LoRA layer will do.

    state: "fused": one op of ours and no other matrix product; "composed": several of our ops;
    "adapter only": the base layer is called as a module; "not fused": PEFT's own forward, the base
    alone, or plain PyTorch: the eager backend, and every embedding, whose lookups are no product
    that an adapter's could be fused with. Of a linear layer without an adapter that
    `fuse(model, linears=True)` has taken: "streamed" or "not streamed".
    """

    layer: str
    state: str
    backend: str
    strategy: str
    reason: str


class _Kind(NamedTuple):
    """What differs between PEFT's LoRA and AdaLoRA layers."""

    adapters_of: Callable[[Any], list[Any]]
    reason: Callable[..., str | None]
    calls: Callable[..., list[Call]]


_LINEAR = _Kind(adapters_of, linear_reason, calls)
_SVD = _Kind(svd_adapters_of, svd_reason, svd_calls)

Layer = tuple[Row, list[Part]]  # and the calls that it makes, none where they are not known


def row_of_peft(
    name: str,
    layer: LoraLayer,
    reason: str | None,
    x_dtype: torch.dtype | None,
    rows: int | None,
) -> Layer:
    """Return the row of one of PEFT's layers; reason: why `fuse` leaves it PEFT's own."""
    if reason is None:
        return _fused_layer(name, layer, x_dtype, rows)
    return _not_fused(name, reason, layer, x_dtype)


def _not_fused(name: str, reason: str, layer: Any, x_dtype: torch.dtype | None) -> Layer:
    ranks = 0
    if not (layer.disable_adapters or layer.merged):
        ranks = sum(layer.r.get(adapter, 0) for adapter in layer.active_adapters)
    parts = list(_base_part(layer.get_base_layer(), x_dtype, ranks))
    return Row(name, "not fused", "peft", "PEFT's own forward", reason), parts


def _fused_layer(name: str, layer: Any, x_dtype: torch.dtype | None, rows: int | None) -> Layer:
    base = layer.base_layer
    if isinstance(layer, FusedParamWrapper):
        return _experts_row(name, layer, x_dtype, rows), []
    if isinstance(layer, FusedEmbedding):
        reason = embedding_reason(layer, embedding_adapters_of(layer), base.weight.device)
        if reason is None:
            return _embedding_row(name), []
        return _not_fused(name, reason, layer, x_dtype)
    kind = _SVD if isinstance(layer, FusedSVD) else _LINEAR
    adapters = kind.adapters_of(layer)
    # x is taken to be where the adapters are.
    near = torch.empty(0)
    if adapters:
        near = adapters[0].lora_A
        near = near if isinstance(near, Tensor) else near.weight
    if x_dtype is None:
        x_dtype, weight = near.dtype, getattr(base, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            x_dtype = weight.dtype
    reason = kind.reason(layer, adapters, near.device, x_dtype)
    if reason is not None:
        return _not_fused(name, reason, layer, x_dtype)

    todo = kind.calls(adapters, near.device.type, rows) if layer.mixed_batch is None else []
    four_bit = is_linear4bit(base)
    compute_dtype = base.compute_dtype if four_bit and base.compute_type_is_set else None
    base_reason = unreadable_reason(base, near.device)
    weight = None if base_reason else _base_weight(base)
    parts = [
        _part(call, x_dtype, None if i else weight, compute_dtype)._replace(base=not i)
        for i, call in enumerate(todo)  # the base rides on the first
    ] or [_mixed_part(adapters, x_dtype, weight, compute_dtype)]
    choices = [part.describe(rows) for part in parts]
    backend = " + ".join(dict.fromkeys(choice.backend for choice in choices))
    state, strategy = "fused", choices[0].strategy
    reasons = list(dict.fromkeys(choice.reason for choice in choices))
    if not todo:
        reasons.append(f"rows name their adapters, as in the last call: {len(adapters)} in one")
    elif len(todo) < len(adapters):
        reasons.append("adapters stacked along the rank")
    if len(todo) > 1:
        state, strategy = "composed", f"{strategy}; {len(todo)} calls"
        drops = any(call.dropout_p for call in todo)
        own, copies = "each adapter with dropout draws a mask of its own", "stacking adapters"
        reasons.append(own if drops else f"{copies} would copy them for few rows")
    if is_dora(layer, adapters[0].name):
        parts[0] = parts[0]._replace(norm=layer.training)
        reasons.append("DoRA: the row norm without a second weight")
        if todo[0].dropout_p:
            state, strategy = "composed", f"{strategy}; the base product twice"
            parts.append(parts[0]._replace(R=0, norm=False, ours=False))
            reasons.append("PEFT's DoRA drops x for the base product too")
    if "eager" in backend:
        state = "not fused"
        if todo and not base_reason and selection.is_eager_on_gpu(near.device.type):
            reasons += filter(None, [traffic.describe(layer, rows or 512)])
        if four_bit and follows_gpu(near.device.type):
            reasons.append(decoded_by(near.device))
    if base_reason is not None:
        state, strategy, parts = "adapter only", "base layer as a module, adapter added", []
        reasons.insert(0, f"base layer: {base_reason}")
    return Row(name, state, backend, strategy, "; ".join(reasons)), parts


def row_of_layer(
    name: str, layer: LoRALayer, x_dtype: torch.dtype | None, rows: int | None
) -> Layer:
    """Return the row of one of this package's layers."""
    if isinstance(layer, LoRAEmbedding) and layer.enabled and not layer.merged:
        return _embedding_row(name), []
    weight = layer._base_weight()
    x_dtype = x_dtype or (layer.lora_A if isinstance(weight, Weight4bit) else weight).dtype
    dropout_p = layer.dropout if layer.training else 0.0
    call = Call(layer.lora_A, layer.lora_B, layer.scaling, None, dropout_p)
    part = _part(call, x_dtype, weight, layer.compute_dtype)._replace(N=layer.out_features)
    if layer.merged or not layer.enabled:
        reason = "the adapter is merged" if layer.enabled else "the adapter is disabled"
        product = "F.embedding" if isinstance(layer, LoRAEmbedding) else "F.linear"
        parts = [] if isinstance(layer, LoRAEmbedding) else [part._replace(R=0)]
        return Row(name, "not fused", "torch", product, reason), parts
    choice = part.describe(rows)
    state = "not fused" if choice.backend == "eager" else "fused"
    reason = choice.reason
    if state == "not fused" and part.four_bit and follows_gpu(part.device.type):
        reason = f"{reason}; {decoded_by(part.device)}"
    part = part._replace(norm=isinstance(layer, DoRALinear) and layer.training)
    return Row(name, state, choice.backend, choice.strategy, reason), [part]


def row_of_streamed(
    name: str, layer: StreamedLinear, x_dtype: torch.dtype | None, rows: int | None
) -> Row:
    """Return the row of a linear layer without an adapter."""
    weight = layer.weight
    (N, K), dtype = weight.shape, x_dtype or weight.dtype
    few = 0
    if weight.device.type != "cpu":
        reason = f"its weight is on {weight.device}"
    elif dtype is not weight.dtype:
        reason = f"x has {dtype}, its weight {weight.dtype}"
    elif torch.is_autocast_enabled("cpu"):
        reason = "autocast is on"
    elif not ops.can_bypass_dispatcher(weight):
        reason = "a subclass or a mode looks at each call with its weight"
    elif weight.stride(1) != 1:
        reason = "its weight is stored by columns"
    else:
        choice = selection.choose(Problem("cpu", dtype, dtype, dtype, dtype, 0, 1))
        reason = choice.reason
        if (choice.backend, choice.strategy) == ("cpu", cpu.GEMV):
            few = cpu_heuristics.few_rows(dtype, False, N * K)
    if few >= (rows or 1):
        reason = f"no adapter; up to {few} rows without gradients; {reason}"
        return Row(name, "streamed", "cpu", cpu.GEMV, reason)
    reason = f"no adapter; {f'more than {few} rows' if few else reason}"
    return Row(name, "not streamed", "torch", "F.linear", reason)


def _experts_row(name: str, layer: Any, x_dtype: torch.dtype | None, rows: int | None) -> Row:
    experts = layer.get_base_layer()
    weight = stack(experts, layer.parameter_name)
    reason = experts_reason(layer, weight.device)
    if reason is not None:
        return Row(name, "not fused", "peft", "PEFT's own forward", reason)
    adapter = active_adapter(layer)
    if adapter is None:
        return Row(name, "not fused", "torch", "the base alone", "no active adapter on this layer")
    (_, R, K), N, four_bit = adapter.lora_A.shape, adapter.lora_B.shape[1], is_quantized
    dtypes = x_dtype or weight.dtype, adapter.lora_A.dtype, adapter.lora_B.dtype, weight.dtype
    problem = Problem(weight.device.type, *dtypes, R, columns=N, inner=K)
    problem = problem._replace(four_bit=four_bit(experts, layer.parameter_name))
    choice = selection.choose_experts(problem)
    state = "not fused" if choice.backend == "eager" else "fused"
    return Row(name, state, choice.backend, choice.strategy, f"experts; {choice.reason}")


def _embedding_row(name: str) -> Row:
    reason = "an embedding: its base is a lookup, no product to fuse the adapter's with"
    return Row(name, "not fused", "torch", "lookups, then one product in place", reason)


def other_parts(
    model: nn.Module, layers: Sequence[nn.Module], x_dtype: torch.dtype | None
) -> Iterator[Part]:
    """Linear layers outside of these, each as a product of its weight's dtype; of one that PEFT
    trains a copy of, the copy that is in use."""
    within = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            names, copies = module.active_adapter, module.modules_to_save
            names = [names] if isinstance(names, str) else list(names or ())
            used = [copies[name] for name in names if name in copies]
            if module.disable_adapters or not used:
                used = [module.original_module]
            within |= {id(child) for child in module.modules()}
            within -= {id(child) for chosen in used for child in chosen.modules()}
    for module in model.modules():
        if id(module) not in within and not isinstance(module, LoRALayer):
            yield from _base_part(module, x_dtype, 0)


def _base_part(base: Any, x_dtype: torch.dtype | None, R: int) -> Iterator[Part]:
    """The product of a linear layer by PyTorch, with R ranks beside it by PEFT; none where the
    module is something else."""
    if not (isinstance(base, nn.Linear) or is_conv1d(base)) or base.weight.device.type == "meta":
        return
    four_bit = is_linear4bit(base)
    compute = base.compute_dtype if four_bit and base.compute_type_is_set else None
    weight: Tensor = base.weight
    if four_bit:
        N, K = base.out_features, base.in_features
    else:
        N, K = reversed(weight.shape) if is_conv1d(base) else weight.shape
    x_dtype = x_dtype or (weight.dtype if weight.is_floating_point() else torch.float32)
    dtype = base_dtype(weight.device.type, x_dtype, compute)
    part = Part(weight.device, x_dtype, dtype, N, K, R, four_bit=four_bit, ours=False)
    yield part._replace(frozen=not weight.requires_grad)


def _base_weight(base: nn.Module) -> Tensor | Weight4bit:
    if is_linear4bit(base):
        from .base4bit import weight4bit  # which imports bitsandbytes

        return weight4bit(base)
    return base_weight(base)


def _mixed_part(
    adapters: Sequence[Adapter],
    x_dtype: torch.dtype,
    weight: Tensor | Weight4bit | None,
    compute_dtype: torch.dtype | None,
) -> Part:
    """The call of `multi_lora_linear` for an x of this dtype beside the adapters."""
    A, B = adapters[0].lora_A.weight, adapters[0].lora_B.weight
    rank = max(adapter.lora_A.weight.shape[0] for adapter in adapters)
    dtype = base_dtype(A.device.type, x_dtype, compute_dtype)
    four_bit, layout = isinstance(weight, Weight4bit), _layout(A.device.type, weight, dtype)
    sizes = B.shape[0], A.shape[1], rank
    part = Part(A.device, x_dtype, dtype, *sizes, A.dtype, B.dtype, four_bit)
    return part._replace(mixed=True, layout=layout)


def _part(
    call: Call,
    x_dtype: torch.dtype,
    weight: Tensor | Weight4bit | None,
    compute_dtype: torch.dtype | None,
) -> Part:
    """The call of `lora_linear` for an x of this dtype beside the adapter."""
    (R, K), N, device = call.lora_A.shape, call.lora_B.shape[0], call.lora_A.device
    dtype = base_dtype(device.type, x_dtype, compute_dtype)
    dtypes, four_bit = (call.lora_A.dtype, call.lora_B.dtype), isinstance(weight, Weight4bit)
    part = Part(device, x_dtype, dtype, N, K, R, *dtypes, four_bit)
    return part._replace(dropout=call.dropout_p > 0, layout=_layout(device.type, weight, dtype))


def _layout(
    device_type: str, weight: Tensor | Weight4bit | None, dtype: torch.dtype
) -> Layout | None:
    if isinstance(weight, Weight4bit):
        return ops.layout(device_type, weight.codes, dtype)
    if weight is not None and not any(weight.stride()):  # `_whole`'s, which is not there yet
        return None
    return ops.layout(device_type, weight, dtype)
