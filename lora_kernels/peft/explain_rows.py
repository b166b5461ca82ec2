"""The strategy of each layer's next call and its reason, as a `Row`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ..backends.cpu import heuristics as cpu_heuristics
from ..backends.cpu import linear as cpu
from ..backends.decode4bit import decoded_by
from ..backends.eager import experts as eager_experts
from ..backends.eager import gated_mlp as eager_mlp
from ..backends.eager.head import kernel_reason, loss_rows
from ..backends.eager.linear import UPCAST_ROWS
from ..backends.library import is_on_gpu_path
from ..choice import choose as selection
from ..core.call import ExpertsOperands, ExpertsSpec
from ..core.problem import MANY_ROWS, Choice, Layout, Problem
from ..layers import LoRAEmbedding, LoRALayer
from ..layers.experts import ExpertsAdapter, is_quantized, stack
from ..ops import context
from ..ops.arguments import FLOATS, base_dtype
from ..quantization import Weight4bit
from .adalora import FusedSVD
from .adapters import (
    Adapter,
    Call,
    adapters_of,
    calls,
    cast_call,
    casts_adapters,
    embedding_adapters_of,
    svd_adapters_of,
    svd_calls,
)
from .base import base_weight
from .direct import planned_state
from .eligibility import (
    embedding_reason,
    tensor_reason,
)
from .embedding import FusedEmbedding
from .experts import FusedParamWrapper, active_adapter, experts_reason
from .frozen import StreamedLinear
from .groups import Group
from .linear import Fused
from .loss import active_adapters, call_reason, model_reason
from .mlp import block_reason, mlp_reasons
from .modules import is_linear4bit
from .plan import plan_linear, plan_svd

KERNELS, LIBRARY, ADAPTER = "ours, kernels", "ours, library GEMMs", "adapter only"
PEFT, TORCH = "PEFT's", "PyTorch's"
SHARED, APART = "x is shared", "x is not shared"
MAX_ROWS = 1 << 17  # the largest M of `choose_by_rows`
EVERY_ROW = 256  # `choose_by_rows` tries each M up to here, and then steps by an eighth


class Row(NamedTuple):
    """How the next call of one layer will be computed, and why.

    The states are:

    - "ours, kernels": this package's kernels, in one call or in several.
    - "ours, library GEMMs": this package's order of PyTorch's GEMMs, the eager backend. Embeddings
      are never more, because a lookup has no GEMM to fuse the adapter's with.
    - "adapter only": the base layer is called as a module, and the adapter is one of the two above.
    - "PEFT's": PEFT's own forward.
    - "PyTorch's": PyTorch alone, for a layer of this package without an active adapter, for a loss
      with logits, for a block that is called layer by layer, or for a layer without an adapter that
      `fuse(model, linears=True)` took.
    - "x is shared", "x is not shared": whether layers of one module share their x. `layer` is the
      module's name.
    """

    layer: str
    state: str
    backend: str
    strategy: str
    reason: str


def _backend_state(backend: str) -> str:
    return LIBRARY if "eager" in backend else KERNELS


class _Description(NamedTuple):
    """A choice in words, of one number of rows or of all."""

    backend: str
    strategy: str
    reason: str


def choose_by_rows(problem: Problem) -> tuple[tuple[int, Choice | None], ...]:
    """Return pairs (M, choice): the choice from M rows up to the next pair's M.

    Tries M from one row to MAX_ROWS. A choice is None if a forced backend cannot run.
    """

    def choose(rows: int) -> Choice | None:
        try:
            return selection.choose(problem._replace(rows=rows))
        except RuntimeError:
            return None

    def is_change(a: Choice | None, b: Choice | None) -> bool:
        if a is None or b is None:
            return a is not b
        return (a.backend, a.strategy) != (b.backend, b.strategy)

    grid = [*range(1, EVERY_ROW + 1)]
    while grid[-1] < MAX_ROWS:
        grid.append(min(MAX_ROWS, grid[-1] * 9 // 8))
    found = [(1, choose(1))]
    for low, high in pairwise(grid):
        while is_change(choose(high), found[-1][1]):
            before, first = max(low, found[-1][0]), high  # bisect for the first M that differs
            while first - before > 1:
                middle = (before + first) // 2
                if is_change(choose(middle), found[-1][1]):
                    first = middle
                else:
                    before = middle
            found.append((first, choose(first)))
    return tuple(found)


def _describe(problem: Problem, rows: int | None) -> _Description:
    """Return the choice for `rows` rows in words, or if None the strategies of all M.

    The backend and the reason are then those of many rows.
    """
    if rows is not None:
        choice = selection.choose(problem._replace(rows=rows))
        return _Description(choice.backend, choice.strategy, choice.reason)
    found = choose_by_rows(problem)
    last = max((start for start, choice in found if choice), default=1)
    many = max(last, MANY_ROWS) if found[-1][0] == last else last
    choice = selection.choose(problem._replace(rows=many))
    ends = [start - 1 for start, _ in found[1:]] + [None]
    ways = [
        f"{_way(each, choice.backend)} {_span(start, end)}"
        for (start, each), end in zip(found, ends, strict=True)
        if each is not None
    ]
    strategies = choice.strategy if len(ways) == 1 else ", ".join(ways)
    return _Description(choice.backend, strategies, choice.reason)


def _way(choice: Choice, backend: str) -> str:
    """Return the strategy, after its backend if that differs from `backend`."""
    return choice.strategy if choice.backend == backend else f"{choice.backend} {choice.strategy}"


def _span(first: int, last: int | None) -> str:
    if last is None:
        return f"from {first} rows on"
    if first == last:
        return f"at {last} row{'s' * (last > 1)}"
    return f"up to {last} rows" if first == 1 else f"{first} to {last} rows"


def row_of_peft(
    name: str,
    layer: LoraLayer,
    reason: str | None,
    x_dtype: torch.dtype | None,
    rows: int | None,
) -> Row:
    """Return the row of one of PEFT's layers.

    reason: why `fuse` leaves the layer to PEFT; None if it is fused.
    """
    if reason is None:
        return _fused_layer(name, layer, x_dtype, rows)
    return _unfused_row(name, reason)


def _unfused_row(name: str, reason: str) -> Row:
    return Row(name, PEFT, "peft", "PEFT's own forward", reason)


def _fused_layer(name: str, layer: Any, x_dtype: torch.dtype | None, rows: int | None) -> Row:
    if isinstance(layer, FusedParamWrapper):
        return _experts_row(name, layer, x_dtype)
    if isinstance(layer, FusedEmbedding):
        weight = getattr(layer.base_layer, "weight", torch.empty(0))
        reason = embedding_reason(layer, embedding_adapters_of(layer), weight.device)
        return _embedding_row(name) if reason is None else _unfused_row(name, reason)
    return _fused_linear(name, layer, x_dtype, rows)


def _fused_linear(name: str, layer: Any, x_dtype: torch.dtype | None, rows: int | None) -> Row:
    names = layer.mixed_batch  # of the layer's last call, if that named its adapters
    is_svd = isinstance(layer, FusedSVD)
    found = svd_adapters_of(layer) if is_svd else adapters_of(layer, names)
    device, x_dtype = _expected_input(layer.base_layer, found, x_dtype)
    make_calls: Callable[..., list[Call]] = svd_calls if is_svd else calls
    if is_svd:
        plan = plan_svd(layer, device, x_dtype)
    else:
        plan = plan_linear(layer, device, x_dtype, names)
    adapters, reason, base_reason, of_dora = plan
    if reason is not None:
        return _unfused_row(name, reason)

    aloras = [adapter for adapter in adapters if getattr(adapter, "is_alora", False)]
    others = [adapter for adapter in adapters if not getattr(adapter, "is_alora", False)]
    names_rows = names is not None
    todo = make_calls(others, device.type, rows) if others and not names_rows else []
    is_rounded = casts_adapters(layer, device.type, x_dtype, rows)
    if is_rounded:
        todo = [cast(Call, cast_call(call, x_dtype)) for call in todo]
    alone = [[adapter] for adapter in aloras]  # one call for each
    mixed = [adapters] if names_rows else alone
    problems = _call_problems(layer.base_layer, todo, mixed, x_dtype, base_reason is None)
    choices = [_describe(problem, rows) for problem in problems]
    backend = " + ".join(dict.fromkeys(choice.backend for choice in choices))
    state, strategy = _backend_state(backend), choices[0].strategy
    reasons = list(dict.fromkeys(choice.reason for choice in choices))
    if names_rows:
        reasons.append(f"rows name their adapters, as in the last call: {len(adapters)} in one")
    reasons += _sharing_reasons(others, todo)
    if aloras:
        reasons.append("an aLoRA, which is active from its invocation tokens on")
    reasons += _frozen_reasons(adapters, layer.training)
    if len(problems) > 1:
        strategy = f"{strategy}; {len(problems)} calls"
    if of_dora:
        has_dropout = todo[0].dropout_p > 0
        if has_dropout:
            strategy = f"{strategy}; the base GEMM twice"
        reasons += _dora_reasons(has_dropout)
    is_decoded = base_reason is None and is_linear4bit(layer.base_layer)
    if state == LIBRARY and is_decoded and is_on_gpu_path(device.type):
        reasons.append(decoded_by(device))
    if is_rounded:
        reasons.append(f"adapters are rounded to {x_dtype} beside more than {UPCAST_ROWS} rows")
    if base_reason is not None:
        state, strategy = ADAPTER, "base layer as a module, adapter added"
        reasons.insert(0, f"base layer: {base_reason}")
    return Row(name, state, backend, strategy, "; ".join(reasons))


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
    rows = loss_rows(base.out_features, device, x_dtype)
    dtype = base_dtype(device.type, x_dtype, getattr(base, "compute_dtype", None))
    dtypes = x_dtype, a_dtype, a_dtype, dtype
    problem = Problem(
        *(device.type, *dtypes, rank, rows, is_linear4bit(base)),
        columns=base.out_features,
        inner=base.in_features,
        device_index=device.index,
        layout=_layout(device.type, _base_weight(base), dtype),
    )
    if todo and todo[0].dropout_p:
        problem = problem._replace(extra=("mask",))
    choice = selection.choose(problem)
    reason = f"in training {rows} rows of logits at a time"
    by_torch = kernel_reason(device, x_dtype)
    if is_on_gpu_path(device.type) and by_torch is not None:
        reason += f", the loss by PyTorch's ops: {by_torch}"
    reason += f"; {choice.reason}"
    return Row(name, _backend_state(choice.backend), choice.backend, choice.strategy, reason)


def row_of_group(name: str, group: Group, x_dtype: torch.dtype | None) -> Row:
    """Return the row of the layers that a module calls with one x."""
    reasons = []
    for each, layer in zip(group.names, group.layers, strict=True):
        if layer.__dict__.get("_group") is not group:
            reasons.append(f"{each}: it was fused or unfused by itself")
            continue
        device, dtype = _expected_input(layer.base_layer, adapters_of(layer), x_dtype)
        state = planned_state(layer, device, dtype)
        if isinstance(state, str):
            reasons.append(f"{each}: {state}")
        elif (reason := _kernel_reason(layer, device, dtype)) is not None:
            reasons.append(f"{each}: {reason}")
    names = ", ".join(group.names)
    if reasons:
        return Row(name, APART, "eager", f"{names} run their own calls", "; ".join(reasons))
    reason = f"for calls with the same x of more than {UPCAST_ROWS} rows"
    return Row(name, SHARED, "eager", f"one call for {names}", reason)


def rows_of_mlps(model: nn.Module, x_dtype: torch.dtype | None) -> Iterator[Row]:
    """Yield the row of each module on a GPU that may be a gated MLP."""
    for name, mlp, reason in mlp_reasons(model):
        if not any(is_on_gpu_path(p.device.type) for p in mlp.parameters()):
            continue
        if reason is None:
            reason = _find_block_reason(mlp, x_dtype)
        if reason is not None:
            yield Row(name, TORCH, "torch", "layer by layer", reason)
            continue
        yield Row(name, LIBRARY, "eager", "one block", _describe_block(mlp, x_dtype))


def _find_block_reason(mlp: Any, x_dtype: torch.dtype | None) -> str | None:
    """Return why the next call of a gated MLP on a GPU runs layer by layer."""
    for name in mlp._parts[:3]:
        layer = mlp._modules[name]
        if not isinstance(layer, Fused):
            return f"{name}: a {type(layer).__name__} is not a fused LoRA layer"
        device, dtype = _expected_input(layer.base_layer, adapters_of(layer), x_dtype)
        if (reason := block_reason(mlp, device, dtype)) is not None:
            return reason
        if (reason := _kernel_reason(layer, device, dtype)) is not None:
            return f"{name}: {reason}"
    return None


def _kernel_reason(layer: Any, device: torch.device, x_dtype: torch.dtype) -> str | None:
    """Return why another backend computes the layer for many rows; None for the eager backend."""
    todo = calls(adapters_of(layer), device.type, None)
    (problem,) = _call_problems(layer.base_layer, todo, [], x_dtype, True)
    choice = selection.choose(problem._replace(rows=MANY_ROWS))
    return None if choice.backend == "eager" else f"{choice.backend} computes it: {choice.reason}"


def _describe_block(mlp: Any, x_dtype: torch.dtype | None) -> str:
    down = mlp._modules[mlp._parts.down]
    device, x_dtype = _expected_input(down.base_layer, adapters_of(down), x_dtype)
    reason = "a gated MLP; the backward recomputes act(gate) * up by "
    found = eager_mlp.kernel_reason(device, x_dtype)
    return reason + ("one Triton kernel" if found is None else f"PyTorch's ops: {found}")


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


def _call_problems(
    base: Any,
    todo: Sequence[Call],
    mixed: Sequence[Sequence[Any]],
    x_dtype: torch.dtype,
    readable: bool,
) -> list[Problem]:
    """Return the calls that a fused forward makes; the first includes the base GEMM.

    Args:
        todo: calls of `lora_linear`.
        mixed: the adapters of each call of `multi_lora_linear`.
        readable: whether the base weight is read.
    """
    is_typed = is_linear4bit(base) and base.compute_type_is_set
    compute_dtype = base.compute_dtype if is_typed else None
    weight = _base_weight(base) if readable else None
    found: list[Problem] = []
    for call in todo:
        found.append(_problem(call, x_dtype, None if found else weight, compute_dtype))
    for adapters in mixed:
        found.append(_mixed_problem(adapters, x_dtype, None if found else weight, compute_dtype))
    return found


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


def _dora_reasons(has_dropout: bool) -> Iterator[str]:
    yield "DoRA: the row norm without a second weight"
    if has_dropout:
        yield "PEFT's DoRA drops x for the base GEMM too"


def row_of_layer(name: str, layer: LoRALayer, x_dtype: torch.dtype | None, rows: int | None) -> Row:
    """Return the row of one of this package's layers."""
    if layer.merged or not layer.enabled:
        reason = "the adapter is merged" if layer.enabled else "the adapter is disabled"
        product = "F.embedding" if isinstance(layer, LoRAEmbedding) else "F.linear"
        return Row(name, TORCH, "torch", product, reason)
    if isinstance(layer, LoRAEmbedding):
        return _embedding_row(name)
    weight = layer._base_weight()
    x_dtype = x_dtype or (layer.lora_A if isinstance(weight, Weight4bit) else weight).dtype
    dropout_p = layer.dropout if layer.training else 0.0
    call = Call(layer.lora_A, layer.lora_B, layer.scaling, None, dropout_p)
    problem = _problem(call, x_dtype, weight, layer.compute_dtype)
    choice = _describe(problem._replace(columns=layer.out_features), rows)
    state, reason = _backend_state(choice.backend), choice.reason
    device = layer.lora_A.device
    if state == LIBRARY and problem.four_bit and is_on_gpu_path(device.type):
        reason = f"{reason}; {decoded_by(device)}"
    return Row(name, state, choice.backend, choice.strategy, reason)


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
    elif not context.can_bypass_dispatcher(weight):
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


def _experts_row(name: str, layer: Any, x_dtype: torch.dtype | None) -> Row:
    experts = layer.get_base_layer()
    weight = stack(experts, layer.parameter_name)
    reason = experts_reason(layer, weight.device)
    if reason is not None:
        return _unfused_row(name, reason)
    adapter = active_adapter(layer)
    if adapter is None:
        return Row(name, TORCH, "torch", "the base alone", "no active adapter on this layer")
    (_, R, K), N = adapter.lora_A.shape, adapter.lora_B.shape[1]
    dtypes = x_dtype or weight.dtype, adapter.lora_A.dtype, adapter.lora_B.dtype, weight.dtype
    problem = Problem(weight.device.type, *dtypes, R, columns=N, inner=K)
    problem = problem._replace(four_bit=is_quantized(experts, layer.parameter_name))
    choice = selection.choose_experts(problem)
    state, reason = _backend_state(choice.backend), f"experts; {choice.reason}"
    if choice.backend == "eager" and is_on_gpu_path(weight.device.type):
        reason += f"; {_experts_clause(weight, adapter, experts.is_transposed)}"
    return Row(name, state, choice.backend, choice.strategy, reason)


def _experts_clause(
    weight: Tensor | Weight4bit, adapter: ExpertsAdapter, is_transposed: bool
) -> str:
    """Return how the eager backend runs experts on a GPU, and what the host waits for."""
    A, B, is_4bit = adapter.lora_A, adapter.lora_B, isinstance(weight, Weight4bit)
    x = A.new_empty(0, A.shape[2], dtype=weight.dtype)
    stack = weight.codes if isinstance(weight, Weight4bit) else weight
    stack = stack.mT if isinstance(stack, Tensor) and is_transposed else stack
    operands = ExpertsOperands(x, stack, A, B, x)
    spec = ExpertsSpec(1.0, 0.0, weight.dtype, weight.dtype, is_transposed)
    if (why := eager_experts.loop_reason(operands, spec)) is not None:
        decoded = "decoded and multiplied" if is_4bit else "multiplied"
        said = f"one expert at a time is {decoded}, and the host waits for the GPU: {why}"
    elif (why := eager_experts.waits_reason(x.device, spec.dtype)) is not None:
        said = f"grouped_mm multiplies one expert at a time, and the host waits for the GPU: {why}"
    else:
        said = "grouped_mm multiplies all experts, and the host does not wait"
        said += f"; {decoded_by(x.device)}" * is_4bit
    return said


def _embedding_row(name: str) -> Row:
    reason = "an embedding: its base is a lookup, no GEMM to fuse the adapter's with"
    return Row(name, LIBRARY, "torch", "lookups, then one GEMM in place", reason)


def _base_weight(base: nn.Module) -> Tensor | Weight4bit:
    if is_linear4bit(base):
        from .base4bit import weight4bit  # imports bitsandbytes, hence not at the top

        return weight4bit(base)
    return base_weight(base)


def _mixed_problem(
    adapters: Sequence[Adapter],
    x_dtype: torch.dtype,
    weight: Tensor | Weight4bit | None,
    compute_dtype: torch.dtype | None,
) -> Problem:
    """Return the call of `multi_lora_linear` for x on the adapters' device."""
    A, B = adapters[0].lora_A.weight, adapters[0].lora_B.weight
    rank = max(adapter.lora_A.weight.shape[0] for adapter in adapters)
    call = Call(A, B, 1.0, None, 0.0)
    return _problem(call, x_dtype, weight, compute_dtype)._replace(rank=rank, mixed=True)


def _problem(
    call: Call,
    x_dtype: torch.dtype,
    weight: Tensor | Weight4bit | None,
    compute_dtype: torch.dtype | None,
) -> Problem:
    """Return the call of `lora_linear` for x on the adapter's device."""
    (R, K), N, device = call.lora_A.shape, call.lora_B.shape[0], call.lora_A.device
    dtype = base_dtype(device.type, x_dtype, compute_dtype)
    return Problem(
        device.type,
        x_dtype,
        call.lora_A.dtype,
        call.lora_B.dtype,
        dtype,
        R,
        four_bit=isinstance(weight, Weight4bit),
        columns=N,
        inner=K,
        extra=selection.dropout_operand(device.type, call.dropout_p),
        device_index=device.index,
        layout=_layout(device.type, weight, dtype),
    )


def _layout(
    device_type: str, weight: Tensor | Weight4bit | None, dtype: torch.dtype
) -> Layout | None:
    if isinstance(weight, Weight4bit):
        return selection.layout_of(device_type, weight.codes, dtype)
    if weight is not None and not any(weight.stride()):  # `sharded._stand_in`'s
        return None
    return selection.layout_of(device_type, weight, dtype)
