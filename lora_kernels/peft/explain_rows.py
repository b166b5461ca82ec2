"""The strategy of each layer's next call and its reason: a `Row`, and a `Part` for each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .. import ops, selection
from ..arguments import FLOATS, base_dtype
from ..backends import cpu, cpu_heuristics
from ..backends.decode4bit import decoded_by
from ..backends.head import chunk_rows
from ..backends.library import is_on_gpu_path
from ..core.problem import Layout, Problem
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
    tensor_reason,
    unreadable_reason,
)
from .embedding import FusedEmbedding
from .experts import FusedParamWrapper, active_adapter, experts_reason
from .frozen import StreamedLinear
from .linear import Fused
from .loss import active_adapters, call_reason, model_reason
from .predict import Part

KERNELS, LIBRARY, ADAPTER = "ours, kernels", "ours, library GEMMs", "adapter only"
PEFT, TORCH = "PEFT's", "PyTorch's"


class Row(NamedTuple):
    """How the next call of one layer will be computed, and why.

    The states are:

    - "ours, kernels": this package's kernels, in one call or in several.
    - "ours, library GEMMs": this package's order of PyTorch's GEMMs, the eager backend. Embeddings
      are never more, because a lookup has no GEMM to fuse the adapter's with.
    - "adapter only": the base layer is called as a module, and the adapter is one of the two above.
    - "PEFT's": PEFT's own forward.
    - "PyTorch's": PyTorch alone, for a layer of this package without an active adapter, for a loss
      with logits, or for a layer without an adapter that `fuse(model, linears=True)` took.
    """

    layer: str
    state: str
    backend: str
    strategy: str
    reason: str


class _Kind(NamedTuple):
    """The functions that differ between PEFT's LoRA and AdaLoRA layers."""

    adapters_of: Callable[[Any], list[Any]]
    reason: Callable[..., str | None]
    calls: Callable[..., list[Call]]


def _linear_adapters(layer: Any) -> list[Adapter]:
    """Return the adapters of the layer's last call if that named them, else the active ones."""
    return adapters_of(layer, layer.mixed_batch)


def _linear_reason(layer: Any, *args: Any) -> str | None:
    return linear_reason(layer, *args, layer.mixed_batch is not None)


def _backend_state(backend: str) -> str:
    return LIBRARY if "eager" in backend else KERNELS


_LINEAR = _Kind(_linear_adapters, _linear_reason, calls)
_SVD = _Kind(svd_adapters_of, svd_reason, svd_calls)

Layer = tuple[Row, list[Part]]  # a layer's row and its calls; no calls if they are unknown


def row_of_peft(
    name: str,
    layer: LoraLayer,
    reason: str | None,
    x_dtype: torch.dtype | None,
    rows: int | None,
) -> Layer:
    """Return the row and calls of one of PEFT's layers.

    reason: why `fuse` leaves the layer to PEFT; None if it is fused.
    """
    if reason is None:
        return _fused_layer(name, layer, x_dtype, rows)
    return _unfused_layer(name, reason, layer, x_dtype)


def _unfused_layer(name: str, reason: str, layer: Any, x_dtype: torch.dtype | None) -> Layer:
    ranks = 0
    if not (layer.disable_adapters or layer.merged):
        ranks = sum(layer.r.get(adapter, 0) for adapter in layer.active_adapters)
    parts = list(_base_part(layer.get_base_layer(), x_dtype, ranks))
    return Row(name, PEFT, "peft", "PEFT's own forward", reason), parts


def _fused_layer(name: str, layer: Any, x_dtype: torch.dtype | None, rows: int | None) -> Layer:
    if isinstance(layer, FusedParamWrapper):
        return _experts_row(name, layer, x_dtype, rows), []
    if isinstance(layer, FusedEmbedding):
        weight = getattr(layer.base_layer, "weight", torch.empty(0))
        reason = embedding_reason(layer, embedding_adapters_of(layer), weight.device)
        if reason is None:
            return _embedding_row(name), []
        return _unfused_layer(name, reason, layer, x_dtype)
    return _fused_linear(name, layer, x_dtype, rows)


def _fused_linear(name: str, layer: Any, x_dtype: torch.dtype | None, rows: int | None) -> Layer:
    kind = _SVD if isinstance(layer, FusedSVD) else _LINEAR
    adapters = kind.adapters_of(layer)
    device, x_dtype = _expected_input(layer.base_layer, adapters, x_dtype)
    reason = kind.reason(layer, adapters, device, x_dtype)
    if reason is not None:
        return _unfused_layer(name, reason, layer, x_dtype)

    base_reason = unreadable_reason(layer.base_layer, device)
    aloras = [adapter for adapter in adapters if getattr(adapter, "is_alora", False)]
    others = [adapter for adapter in adapters if not getattr(adapter, "is_alora", False)]
    names_rows = layer.mixed_batch is not None
    todo = kind.calls(others, device.type, rows) if others and not names_rows else []
    alone = [[adapter] for adapter in aloras]  # one call for each
    mixed = [adapters] if names_rows else alone
    parts = _call_parts(layer.base_layer, todo, mixed, x_dtype, readable=base_reason is None)
    choices = [part.describe(rows) for part in parts]
    backend = " + ".join(dict.fromkeys(choice.backend for choice in choices))
    state, strategy = _backend_state(backend), choices[0].strategy
    reasons = list(dict.fromkeys(choice.reason for choice in choices))
    if names_rows:
        reasons.append(f"rows name their adapters, as in the last call: {len(adapters)} in one")
    reasons += _sharing_reasons(others, todo)
    if aloras:
        reasons.append("an aLoRA, which is active from its invocation tokens on")
    reasons += _frozen_reasons(adapters, layer.training)
    if len(parts) > 1:
        strategy = f"{strategy}; {len(parts)} calls"
    if is_dora(layer, adapters[0].name):
        has_dropout = todo[0].dropout_p > 0
        if has_dropout:
            strategy = f"{strategy}; the base GEMM twice"
        parts = _dora_parts(parts[0], layer.training, has_dropout)
        reasons += _dora_reasons(has_dropout)
    if state == LIBRARY:
        is_counted = bool(todo) and base_reason is None
        reasons += _eager_reasons(layer, device, rows or 512, is_counted)
    if base_reason is not None:
        state, strategy, parts = ADAPTER, "base layer as a module, adapter added", []
        reasons.insert(0, f"base layer: {base_reason}")
    return Row(name, state, backend, strategy, "; ".join(reasons)), parts


def row_of_loss(name: str, module: Any, x_dtype: torch.dtype | None) -> Row:
    """Return the row of a causal language model's loss."""
    name = f"{name}.loss" if name else "loss"
    head = module.get_output_embeddings()
    is_adapted = isinstance(head, LoraLayer)
    base = head.get_base_layer() if is_adapted else head
    adapters = active_adapters(head) if isinstance(head, Fused) else []
    _, x_dtype = _expected_input(base, adapters, x_dtype)
    device = getattr(base, "weight", torch.empty(0)).device
    reason = model_reason(module)
    if reason is None:
        reason = call_reason(module, device, x_dtype)
    if reason is not None:
        return Row(name, TORCH, "torch", "F.cross_entropy", reason)
    todo = calls(adapters, device.type, None)
    a_dtype = todo[0].lora_A.dtype if todo else x_dtype
    rank = todo[0].lora_A.shape[0] if todo else 1
    rows = chunk_rows(base.out_features, is_on_gpu_path(device.type))
    dtype = base_dtype(device.type, x_dtype, getattr(base, "compute_dtype", None))
    dtypes = x_dtype, a_dtype, a_dtype, dtype
    choice = selection.choose(Problem(device.type, *dtypes, rank, rows, is_linear4bit(base)))
    if todo and todo[0].dropout_p:
        choice = selection.choose_for_mask()
    reason = f"in training {rows} rows of logits at a time; {choice.reason}"
    return Row(name, _backend_state(choice.backend), choice.backend, choice.strategy, reason)


def _expected_input(
    base: Any, adapters: Sequence[Any], x_dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of x: the adapters' device, and the base's dtype by default.

    A base that is stored in a dtype that no x has, such as float8 or uint8, does not tell it: the
    adapters' dtype is then returned.
    """
    found: Any = adapters[0].lora_A if adapters else None
    if isinstance(found, nn.Module):
        found = getattr(found, "weight", None)  # FSDP1 may have taken it
    lora_A = found if isinstance(found, Tensor) else torch.empty(0)
    if x_dtype is None:
        stored = getattr(getattr(base, "weight", None), "dtype", None)
        x_dtype = stored if stored in FLOATS else lora_A.dtype
    return lora_A.device, x_dtype


def _call_parts(
    base: Any,
    todo: Sequence[Call],
    mixed: Sequence[Sequence[Any]],
    x_dtype: torch.dtype,
    readable: bool,
) -> list[Part]:
    """Return the calls that a fused forward makes; the first includes the base GEMM.

    Args:
        todo: calls of `lora_linear`.
        mixed: the adapters of each call of `multi_lora_linear`.
        readable: whether the base weight is read.
    """
    is_typed = is_linear4bit(base) and base.compute_type_is_set
    compute_dtype = base.compute_dtype if is_typed else None
    weight = _base_weight(base) if readable else None
    parts: list[Part] = []
    for call in todo:
        parts.append(_part(call, x_dtype, None if parts else weight, compute_dtype))
    for adapters in mixed:
        parts.append(_mixed_part(adapters, x_dtype, None if parts else weight, compute_dtype))
    first, *others = parts
    return [first, *(part._replace(base=False) for part in others)]


def _frozen_reasons(adapters: Sequence[Any], training: bool) -> Iterator[str]:
    """Yield what the forward does not save for the backward because a factor is frozen."""
    needs = [tuple(getattr(t, "weight", t).requires_grad for t in a[1:3]) for a in adapters]
    if not training or not any(any(need) for need in needs):
        return
    if not any(need_A for need_A, _ in needs):
        yield "lora_A is frozen: the forward does not save x"
    if not any(need_B for _, need_B in needs):
        yield "lora_B is frozen: the forward does not save x·Aᵀ"


def _sharing_reasons(adapters: Sequence[Any], todo: Sequence[Call]) -> Iterator[str]:
    """Yield why the adapters share calls, and why they need several."""
    if len(todo) < len(adapters) and todo:
        yield "adapters stacked along the rank"
    if len(todo) > 1:
        if any(call.dropout_p for call in todo):
            yield "each adapter with dropout draws a mask of its own"
        else:
            yield "stacking adapters would copy them for few rows"


def _dora_parts(part: Part, training: bool, has_dropout: bool) -> list[Part]:
    """Return the calls of a DoRA; with dropout PyTorch runs the base GEMM once more."""
    parts = [part._replace(norm=training)]
    if has_dropout:
        parts.append(part._replace(R=0, norm=False, ours=False))
    return parts


def _dora_reasons(has_dropout: bool) -> Iterator[str]:
    yield "DoRA: the row norm without a second weight"
    if has_dropout:
        yield "PEFT's DoRA drops x for the base GEMM too"


def _eager_reasons(layer: Any, device: torch.device, rows: int, counted: bool) -> Iterator[str]:
    """Yield the bytes that the eager backend moves on a GPU, and the decoder of 4-bit weights."""
    if counted and selection.is_eager_on_gpu(device.type):
        description = traffic.describe(layer, rows)
        if description:
            yield description
    if is_linear4bit(layer.base_layer) and is_on_gpu_path(device.type):
        yield decoded_by(device)


def row_of_layer(
    name: str, layer: LoRALayer, x_dtype: torch.dtype | None, rows: int | None
) -> Layer:
    """Return the row and calls of one of this package's layers."""
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
        return Row(name, TORCH, "torch", product, reason), parts
    choice = part.describe(rows)
    state, reason = _backend_state(choice.backend), choice.reason
    if state == LIBRARY and part.four_bit and is_on_gpu_path(part.device.type):
        reason = f"{reason}; {decoded_by(part.device)}"
    part = part._replace(norm=isinstance(layer, DoRALinear) and layer.training)
    return Row(name, state, choice.backend, choice.strategy, reason), [part]


def row_of_streamed(
    name: str, layer: StreamedLinear, x_dtype: torch.dtype | None, rows: int | None
) -> Row:
    """Return the row of a linear layer without an adapter that `fuse` has taken."""
    few, weight = 0, layer._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        reason = tensor_reason(torch.device("cpu"), weight=weight) or ""
        return Row(name, TORCH, "torch", "F.linear", f"no adapter; {reason}")
    (N, K), dtype = weight.shape, x_dtype or weight.dtype
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
        return Row(name, KERNELS, "cpu", cpu.GEMV, reason)
    reason = f"no adapter; {f'more than {few} rows' if few else reason}"
    return Row(name, TORCH, "torch", "F.linear", reason)


def _experts_row(name: str, layer: Any, x_dtype: torch.dtype | None, rows: int | None) -> Row:
    experts = layer.get_base_layer()
    weight = stack(experts, layer.parameter_name)
    reason = experts_reason(layer, weight.device)
    if reason is not None:
        return Row(name, PEFT, "peft", "PEFT's own forward", reason)
    adapter = active_adapter(layer)
    if adapter is None:
        return Row(name, TORCH, "torch", "the base alone", "no active adapter on this layer")
    (_, R, K), N = adapter.lora_A.shape, adapter.lora_B.shape[1]
    dtypes = x_dtype or weight.dtype, adapter.lora_A.dtype, adapter.lora_B.dtype, weight.dtype
    problem = Problem(weight.device.type, *dtypes, R, columns=N, inner=K)
    problem = problem._replace(four_bit=is_quantized(experts, layer.parameter_name))
    choice = selection.choose_experts(problem)
    state, reason = _backend_state(choice.backend), f"experts; {choice.reason}"
    if problem.four_bit and choice.backend == "eager" and is_on_gpu_path(weight.device.type):
        reason += "; one 4-bit expert is decoded at a time, and the host waits for the GPU"
    return Row(name, state, choice.backend, choice.strategy, reason)


def _embedding_row(name: str) -> Row:
    reason = "an embedding: its base is a lookup, no GEMM to fuse the adapter's with"
    return Row(name, LIBRARY, "torch", "lookups, then one GEMM in place", reason)


def other_parts(
    model: nn.Module, layers: Sequence[nn.Module], x_dtype: torch.dtype | None
) -> Iterator[Part]:
    """Yield the base GEMM of each linear layer outside of `layers`.

    If PEFT trains copies of a module (`modules_to_save`), only those in use count.
    """
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
    """Yield the GEMM that PyTorch runs for a linear layer, with PEFT's update of rank R.

    Yields nothing if the module is not a linear layer.
    """
    weight = getattr(base, "weight", None)
    if not (isinstance(base, nn.Linear) or is_conv1d(base)) or not isinstance(weight, Tensor):
        return
    if weight.is_meta or weight.dim() != 2:  # ZeRO-3 and FSDP1 flatten it between forwards
        return
    four_bit = is_linear4bit(base)
    compute = base.compute_dtype if four_bit and base.compute_type_is_set else None
    if four_bit:
        N, K = base.out_features, base.in_features
    else:
        N, K = reversed(weight.shape) if is_conv1d(base) else weight.shape
    x_dtype = x_dtype or (weight.dtype if weight.dtype in FLOATS else torch.float32)
    dtype = base_dtype(weight.device.type, x_dtype, compute)
    part = Part(weight.device, x_dtype, dtype, N, K, R, four_bit=four_bit, ours=False)
    yield part._replace(frozen=not weight.requires_grad)


def _base_weight(base: nn.Module) -> Tensor | Weight4bit:
    if is_linear4bit(base):
        from .base4bit import weight4bit  # imports bitsandbytes, hence not at the top

        return weight4bit(base)
    return base_weight(base)


def _mixed_part(
    adapters: Sequence[Adapter],
    x_dtype: torch.dtype,
    weight: Tensor | Weight4bit | None,
    compute_dtype: torch.dtype | None,
) -> Part:
    """Return the call of `multi_lora_linear` for x on the adapters' device."""
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
    """Return the call of `lora_linear` for x on the adapter's device."""
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
    if weight is not None and not any(weight.stride()):  # `sharded._stand_in`'s
        return None
    return ops.layout(device_type, weight, dtype)
