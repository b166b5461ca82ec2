"""The strategy of each layer's next call and its reason, as a `Row`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ..backends.cpu import linear as cpu
from ..backends.decoder import decoded_by
from ..backends.eager import experts as eager_experts
from ..backends.eager import gated_mlp as eager_mlp
from ..backends.eager.head import kernel_reason, loss_rows
from ..backends.eager.products import MANY_ROWS
from ..backends.library import is_on_gpu_path
from ..choice import choose as selection
from ..core.call import ExpertsOperands, ExpertsSpec, MultiOperands, MultiSpec, Operands, Spec
from ..core.codes import Codes
from ..core.problem import Choice, Problem
from ..core.record import Record
from ..layers import LoRAEmbedding, LoRALayer
from ..layers.experts import has_transposed_stack, stack
from ..ops import blocks, context, experts, linear, multi
from ..ops.arguments import FLOATS, base_dtype
from ..ops.blocks import Block
from ..quantization import QuantizedWeight
from ..quantization.tensor import QuantizedTensor, read_tensor
from .adapters import Call, RowNames, cast_adapters, casts_adapters, stack_records
from .base import base_weight
from .direct import make_block, read_in_block
from .eligibility import tensor_reason
from .embedding import FusedEmbedding, read_embedding
from .experts import FusedParamWrapper, active_adapter, experts_reason
from .frozen import StreamedLinear, zero_adapter
from .groups import Group
from .head import has_active_adapter, read_head
from .linear import Fused
from .loss import call_reason, last_reason, model_reason
from .mlp import block_reason, mlp_reasons, tile_state_reason
from .modules import is_linear4bit
from .packed import remedy
from .read import active_names, read_call
from .sharded import gathered_parameters

KERNELS, LIBRARY, ADAPTER = "our kernels", "our library GEMMs", "adapter only"
PEFT, TORCH = "PEFT's", "PyTorch's"
SHARED, NOT_SHARED = "x is shared", "x is not shared"
ROWS = 1, 16, 2048  # the default row counts: a token, a batch of tokens, a training step


class Row(NamedTuple):
    """How the next call of one layer will be computed, and why.

    If row counts differ in backend, strategy or reason, the text names them: "1 and 16 rows: gemv;
    2048 rows: fused".

    The states are:

    - "our kernels": this package's kernels, in one call or in several. For a layer without an
      adapter, for at least one of the row counts.
    - "our library GEMMs": this package's order of PyTorch's GEMMs, the eager backend, for at least
      one of the row counts. Fused embeddings always have this state, because a lookup has no GEMM
      to fuse with the adapter's.
    - "adapter only": the base layer is called as a module. The adapter runs in one of the two ways
      above.
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


class _Execution(NamedTuple):
    """How a layer's call is computed for one row count.

    reason: clauses. `join_by_rows` prints a clause that holds for all row counts once.
    """

    backend: str
    strategy: str
    reason: Sequence[str]


def join_by_rows(rows: Sequence[int], clauses: Sequence[Sequence[str]]) -> str:
    """Return the clauses with their row counts. Clauses of all row counts come first, unnumbered.

    >>> join_by_rows((1, 16, 2048), (["gemv"], ["gemv"], ["fused"]))
    '1 and 16 rows: gemv; 2048 rows: fused'
    >>> join_by_rows((1, 16), (["a", "b"], ["b"]))
    'b; 1 row: a'
    """
    counts: dict[str, list[str]] = {}
    for M, row_clauses in zip(rows, clauses, strict=True):
        for clause in dict.fromkeys(row_clauses):
            counts.setdefault(clause, []).append(str(M))
    common = [clause for clause, row_counts in counts.items() if len(row_counts) == len(rows)]
    others = []
    for clause, row_counts in counts.items():
        if len(row_counts) < len(rows):
            *head, tail = row_counts
            numbers = f"{', '.join(head)} and {tail}" if head else tail
            others.append(f"{numbers} row{'s' * (row_counts != ['1'])}: {clause}")
    return "; ".join(common + others)


def _row(name: str, state: str, rows: Sequence[int], executions: Sequence[_Execution]) -> Row:
    return Row(
        name,
        state,
        join_by_rows(rows, [[execution.backend] for execution in executions]),
        join_by_rows(rows, [[execution.strategy] for execution in executions]),
        join_by_rows(rows, [execution.reason for execution in executions]),
    )


def _backend_state(executions: Sequence[_Execution | Choice]) -> str:
    return LIBRARY if any("eager" in execution.backend for execution in executions) else KERNELS


def row_of_peft(
    name: str,
    layer: LoraLayer,
    reason: str | None,
    x_dtype: torch.dtype | None,
    rows: Sequence[int],
) -> Row:
    """Return the row of one of PEFT's layers.

    reason: why `fuse` leaves the layer to PEFT; None if it is fused.
    """
    if reason is None and isinstance(layer, FusedParamWrapper):
        return _experts_row(name, layer, x_dtype)
    if reason is None and isinstance(layer, FusedEmbedding):
        weight = getattr(layer.base_layer, "weight", torch.empty(0))
        records = read_embedding(layer, weight.device)
        return _unfused_row(name, records) if isinstance(records, str) else _embedding_row(name)
    if reason is None:
        return _linear_row(name, layer, x_dtype, rows)
    return _unfused_row(name, reason)


def _unfused_row(name: str, reason: str) -> Row:
    return Row(name, PEFT, "peft", "PEFT's own forward", reason)


def _linear_row(name: str, layer: Any, x_dtype: torch.dtype | None, rows: Sequence[int]) -> Row:
    names = layer.mixed_batch  # of the layer's last call, if that named its adapters
    x = _expected_input(layer, x_dtype, names)
    records = read_call(layer, x.device, x.dtype, names)
    if isinstance(records, str):
        return _unfused_row(name, records)
    executions = [_describe_call(layer, records, x.expand(M, -1), names) for M in rows]
    state = _backend_state(executions)
    called = records[0].called
    if called is not None:
        state, strategy = ADAPTER, "base layer as a module, adapter added"
        reason = f"base layer: {called}{remedy(layer.get_base_layer())}"
        executions = [
            _Execution(execution.backend, strategy, [reason, *execution.reason])
            for execution in executions
        ]
    return _row(name, state, rows, executions)


def _describe_call(
    layer: Any, records: Sequence[Record], x: Tensor, names: Sequence[str] | None
) -> _Execution:
    """Describe the call that the layer's forward would execute for its records."""
    calls, choices = _choose_calls(layer, records, x, names)
    backend = " + ".join(dict.fromkeys(choice.backend for choice in choices))
    strategy = str(choices[0].strategy)
    reasons = _clauses(choices)
    if names is not None:
        reasons.append(f"rows name their adapters, as in the last call: {len(records)} in one")
    stacks = [call.records for call in calls if call.row_index is None]
    if any(len(stacked) > 1 for stacked in stacks):
        reasons.append("adapters stacked along the rank")
    if len(stacks) > 1:
        has_dropout = any(stacked[0].dropout_p for stacked in stacks)
        reasons.append(
            "each adapter with dropout draws a mask of its own"
            if has_dropout
            else "stacking adapters would copy them for few rows"
        )
    if any(record.has_row_index for record in records):
        reasons.append("an aLoRA, which is active from its invocation tokens on")
    reasons += _frozen_reasons(records, layer.training)
    if len(choices) > 1:
        strategy = f"{strategy}, {len(choices)} calls"
    if records[0].magnitude is not None:
        reasons.append("DoRA: the row norm without a second weight")
        if records[0].dropout_p:
            strategy = f"{strategy}, the base GEMM twice"
            reasons.append("PEFT's DoRA drops x for the base GEMM too")
    base: Any = layer.base_layer
    weight = _base_weight(base) if records[0].called is None else None
    if isinstance(weight, QuantizedWeight):
        is_set = is_linear4bit(base) and base.compute_type_is_set
        reasons += _decoder_reasons(choices, x, weight, base.compute_dtype if is_set else None)
    if casts_adapters(layer, x.device.type, x.dtype, x.shape[0]):
        reasons.append(f"adapters are rounded to {x.dtype}")
    return _Execution(backend, strategy, reasons)


def _choose_calls(
    layer: Any, records: Sequence[Record], x: Tensor, names: Sequence[str] | None = None
) -> tuple[list[Call], list[Choice]]:
    """Return a layer's calls for x, and each call's choice. The first has the base GEMM."""
    M, has_magnitude = x.shape[0], records[0].magnitude is not None
    calls = layer.calls(records, x, RowNames(names and ([*names] * M)[:M]))
    weight, compute_dtype = None, None
    if records[0].called is None:
        base = layer.base_layer
        weight = _base_weight(base)
        if is_linear4bit(base) and base.compute_type_is_set:
            compute_dtype = base.compute_dtype
    choices = []
    for call in calls:
        if has_magnitude:  # dropout is applied to x before the call
            undropped = [record._replace(dropout_p=0.0) for record in call.records]
            call = call._replace(records=undropped)
        choices.append(_choose(x, weight, call, compute_dtype))
        weight, compute_dtype = None, None
    return calls, choices


def _choose(
    x: Tensor,
    weight: Tensor | QuantizedWeight | None,
    call: Call,
    compute_dtype: torch.dtype | None = None,
    has_mask: bool = False,
) -> Choice:
    """Return the choice of `lora_linear`, or `multi_lora_linear`, for the call.

    has_mask: whether the call gets a dropout mask.
    """
    records, row_index = call
    device_type = x.device.type
    dtype = base_dtype(device_type, x.dtype, compute_dtype)
    if is_on_gpu_path(device_type) and context.autocast_dtype(device_type, x.dtype):
        x, records = x[:1].to(dtype).expand_as(x), cast_adapters(records, dtype)
    base = weight.codes if isinstance(weight, QuantizedWeight) else weight
    p, mask = records[0].dropout_p, x if has_mask else None
    is_drawn = mask is None and "rng" in selection.dropout_operand(device_type, p)
    rng = x.new_empty(2, dtype=torch.int64) if is_drawn else None
    if row_index is not None:
        A, B = [r.lora_A for r in records], [r.lora_B for r in records]
        mixed = MultiOperands(x, base, A, B, row_index, None, rng)
        return multi.choose(mixed, MultiSpec([1.0] * len(A), p, dtype, dtype))
    record = stack_records(records)
    operands = Operands(x, base, record.lora_A, record.lora_B, record.rank_gate, rng=rng, mask=mask)
    return linear.choose(operands, Spec(1.0, p, dtype, dtype))


def _clauses(choices: Sequence[Choice]) -> list[str]:
    return [clause for choice in choices for clause in choice.reason.split("; ")]


def _decoder_reasons(
    choices: Sequence[Choice], x: Tensor, weight: Any, compute_dtype: torch.dtype | None
) -> Iterator[str]:
    """Yield a clause that names the decoder of a 4-bit weight for library GEMMs on a GPU."""
    if _backend_state(choices) == LIBRARY and is_on_gpu_path(x.device.type):
        dtype = base_dtype(x.device.type, x.dtype, compute_dtype)
        yield decoded_by(x.device, weight.codes, x.shape[-1], dtype)


def _frozen_reasons(records: Sequence[Record], training: bool) -> Iterator[str]:
    """Yield a clause for each tensor that is not saved for backward because a factor is frozen."""
    needs = [(record.lora_A.requires_grad, record.lora_B.requires_grad) for record in records]
    if not training or not any(any(need) for need in needs):
        return
    if not any(need_A for need_A, _ in needs):
        yield "lora_A is frozen: the forward does not save x"
    if not any(need_B for _, need_B in needs):
        yield "lora_B is frozen: the forward does not save x·Aᵀ"


def _expected_input(
    layer: Any, x_dtype: torch.dtype | None, names: Sequence[str] | None = None
) -> Tensor:
    """Return an x [1, K] on the adapters' device, by default in the base's dtype.

    If the base is stored in a dtype that no x has, such as float8 or uint8, x gets the adapters'
    dtype.

    layer: a layer of PEFT, or one without an adapter.
    names: of the adapters; None for the active ones.
    """
    base, lora_A = layer, torch.empty(0)
    if isinstance(layer, LoraLayer):
        base = layer.get_base_layer()
        for name in active_names(layer, names)[:1]:
            matrix: Any = layer.lora_A[name]
            matrix = getattr(matrix, "weight", None) if isinstance(matrix, nn.Module) else matrix
            lora_A = matrix if isinstance(matrix, Tensor) else lora_A  # FSDP1 may have removed it
    if x_dtype is None:
        weight_dtype = getattr(getattr(base, "weight", None), "dtype", None)
        x_dtype = weight_dtype if weight_dtype in FLOATS else lora_A.dtype
    return torch.empty(1, lora_A.shape[-1], dtype=x_dtype, device=lora_A.device)


def _base_weight(base: nn.Module) -> Tensor | QuantizedWeight:
    if is_linear4bit(base):
        from .base4bit import quantized_weight  # imports bitsandbytes, hence not at the top

        return quantized_weight(base)
    weight = base_weight(base)
    return read_tensor(weight) if isinstance(weight, QuantizedTensor) else weight


def row_of_layer(
    name: str, layer: LoRALayer, x_dtype: torch.dtype | None, rows: Sequence[int]
) -> Row:
    """Return the row of one of this package's layers."""
    if layer.merged or not layer.enabled:
        reason = "the adapter is merged" if layer.enabled else "the adapter is disabled"
        product = "F.embedding" if isinstance(layer, LoRAEmbedding) else "F.linear"
        return Row(name, TORCH, "torch", product, reason)
    if isinstance(layer, LoRAEmbedding):
        return _embedding_row(name)
    weight, A, B = layer.base_weight(), layer.lora_A, layer.lora_B
    is_quantized = isinstance(weight, QuantizedWeight)
    x_dtype = x_dtype or (A if is_quantized else weight).dtype
    x = torch.empty(1, A.shape[1], dtype=x_dtype, device=A.device)
    # Variants differ in lora_B's shape.
    lora_B = B.new_empty(1, 1).expand(layer.out_features, A.shape[0])
    dropout_p = layer.dropout if layer.training else 0.0
    call = Call([Record(weight, A, lora_B, dropout_p=dropout_p)])
    executions = []
    for M in rows:
        choice = _choose(x.expand(M, -1), weight, call, layer.compute_dtype)
        reasons = _clauses([choice])
        if is_quantized:
            reasons += _decoder_reasons([choice], x, weight, layer.compute_dtype)
        executions.append(_Execution(choice.backend, choice.strategy, reasons))
    return _row(name, _backend_state(executions), rows, executions)


def row_of_streamed(
    name: str, layer: StreamedLinear, x_dtype: torch.dtype | None, rows: Sequence[int]
) -> Row:
    """Return the row of a `StreamedLinear`, a layer without an adapter."""
    weight: Tensor | None = layer._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        reason = tensor_reason(torch.device("cpu"), weight=weight)
        return Row(name, TORCH, "torch", "F.linear", f"no adapter; {reason}")
    (N, K), dtype, reason = weight.shape, x_dtype or weight.dtype, None
    if weight.device.type != "cpu":
        reason = f"its weight is on {weight.device}"
    elif dtype is not weight.dtype:
        reason = f"x has {dtype}, its weight {weight.dtype}"
    elif torch.is_autocast_enabled("cpu"):
        reason = "autocast is on"
    elif type(weight) is not QuantizedTensor and not context.can_bypass_dispatcher(weight):
        reason = "a subclass or a mode looks at each call with its weight"
    elif weight.stride(1) != 1:
        reason = "its weight is stored by columns"
    elif dtype is torch.float64:
        reason = "no kernel computes in float64"
    if reason is not None:
        return Row(name, TORCH, "torch", "F.linear", f"no adapter; {reason}")
    state, executions = TORCH, []
    x, packed = torch.empty(1, K, dtype=dtype), None
    if type(weight) is QuantizedTensor:
        packed = read_tensor(weight)
        call = Call([Record(packed, *zero_adapter(x, N, K))])
    for M in rows:
        if packed is not None:
            choice = _choose(x.expand(M, -1), packed, call, None)
        else:
            problem = Problem("cpu", dtype, dtype, dtype, dtype, 0, M, columns=N, inner=K)
            choice = selection.choose(problem)
        if choice.backend == "cpu" and (packed is not None or choice.strategy == cpu.GEMV):
            state, reason = KERNELS, f"without gradients, {choice.reason}"
            executions.append(_Execution("cpu", choice.strategy, ["no adapter", reason]))
        else:
            reason = "too many rows for the GEMV" if choice.backend == "cpu" else choice.reason
            executions.append(_Execution("torch", "F.linear", ["no adapter", reason]))
    return _row(name, state, rows, executions)


def row_of_loss(name: str, module: Any, x_dtype: torch.dtype | None) -> Row:
    """Return the row of a causal language model's loss."""
    name = f"{name}.loss" if name else "loss"
    if (head := module.get_output_embeddings()) is None:
        return Row(name, TORCH, "torch", "F.cross_entropy", "it has no output embedding")
    base: Any = head.get_base_layer() if isinstance(head, LoraLayer) else head
    is_adapted = isinstance(head, Fused) and has_active_adapter(head)
    x_dtype = _expected_input(head if is_adapted else base, x_dtype).dtype
    device = getattr(base, "weight", torch.empty(0)).device
    reason = model_reason(module) or call_reason(module, device, x_dtype) or last_reason(module)
    if reason is not None:
        return Row(name, TORCH, "torch", "F.cross_entropy", reason)
    K, N = base.in_features, base.out_features
    x, rows = torch.empty(1, K, dtype=x_dtype, device=device), loss_rows(N, device, x_dtype)
    records = cast(list[Record], read_head(head, device, x_dtype))
    record = stack_records(records)
    if record.lora_A is None:
        record = record._replace(lora_A=x, lora_B=x[:, :1].expand(N, 1))  # shapes alone
    compute_dtype = getattr(base, "compute_dtype", None)
    weight = _base_weight(base)
    call = Call([record])
    choice = _choose(x.expand(rows, -1), weight, call, compute_dtype, record.dropout_p > 0)
    reason = f"in training {rows} rows of logits at a time"
    triton_reason = kernel_reason(device, x_dtype)
    if is_on_gpu_path(device.type) and triton_reason is not None:
        reason += f", the loss by PyTorch's ops: {triton_reason}"
    reason += f"; {choice.reason}"
    return Row(name, _backend_state([choice]), choice.backend, choice.strategy, reason)


NO_BLOCK = "the dtypes of x, the bases and the adapters fit no block"


def row_of_group(name: str, group: Group, x_dtype: torch.dtype | None, rows: Sequence[int]) -> Row:
    """Return the row of the layers that a module calls with one x, for the largest row count."""
    reasons = []
    for layer_name, layer in zip(group.names, group.layers, strict=True):
        if getattr(layer, "_group", None) is not group:
            reasons.append(f"{layer_name}: it was fused or unfused by itself")
            continue
        x = _expected_input(layer, x_dtype)
        record = read_in_block(layer, x.device, x.dtype)
        reason = (
            record
            if isinstance(record, str)
            else _other_backend_reason(layer, x.expand(max(rows), -1))
        )
        if reason is not None:
            reasons.append(f"{layer_name}: {reason}")
    if not reasons and make_block(group.layers, x.expand(max(rows), -1)) is None:
        reasons.append(NO_BLOCK)
    names = ", ".join(group.names)
    if reasons:
        return Row(name, NOT_SHARED, "eager", f"{names} run their own calls", "; ".join(reasons))
    reason = (
        f"for calls with the same x of more than {MANY_ROWS} rows; in training x needs a gradient"
    )
    return Row(name, SHARED, "eager", f"one call for {names}", reason)


def rows_of_mlps(
    model: nn.Module, x_dtype: torch.dtype | None, rows: Sequence[int]
) -> Iterator[Row]:
    """Yield the row of each module on a GPU, or with rows of a tile, that may be a gated MLP, for
    the largest row count."""
    for name, mlp, reason in mlp_reasons(model):
        is_on_gpu = any(is_on_gpu_path(p.device.type) for p in mlp.parameters())
        tile_rows = getattr(mlp, "_tile_rows", None)
        if not (is_on_gpu or tile_rows):
            continue
        block: Block | str = reason or "a CPU runs its layers one by one"
        with gathered_parameters(model, name):
            if is_on_gpu and reason is None:
                block = _find_block(mlp, x_dtype, max(rows))
            tiles, clause = _tile_clause(mlp, tile_rows)
        if isinstance(block, str):
            yield Row(name, TORCH, "torch", f"layer by layer{tiles}", block + clause)
            continue
        clause = f"a gated MLP; {_mlp_clause(block)}{clause}"
        yield Row(name, LIBRARY, "eager", f"one block{tiles}", clause)


def _tile_clause(mlp: Any, rows: int | None) -> tuple[str, str]:
    """Return what the row of a gated MLP says of its tiles, in its strategy and in its reason."""
    if rows is None:
        return "", ""
    if (reason := tile_state_reason(mlp)) is not None:
        return "", f"; not in tiles: {reason}"
    text = "; of more rows only x is kept, and the backward computes each tile's forward again"
    return f", in tiles of at most {rows} rows", text


def _mlp_clause(block: Block) -> str:
    """Return which kernels compute act(gate) * up of a gated MLP, and why no others."""
    device, activation = block.layers[0].lora_A.device, block.activation
    if (reason := blocks.updates_reason(block, device)) is None:
        return "its kernels add the low-rank updates and sum three gradients from the same tiles"
    columns = block.layers[0].lora_B.shape[0]
    by_torch = eager_mlp.kernel_reason(device, block.dtype, activation, columns)
    how = "one Triton kernel" if by_torch is None else f"PyTorch's ops: {by_torch}"
    text = f"the backward recomputes act(gate) * up by {how}"
    return text if by_torch == reason else f"{text}; GEMMs add the low-rank updates: {reason}"


def _find_block(mlp: Any, x_dtype: torch.dtype | None, M: int) -> Block | str:
    """Return the block of a gated MLP's next call on a GPU, or why it runs layer by layer."""
    for name in mlp._parts[:3]:
        layer = mlp._modules[name]
        if not isinstance(layer, Fused):
            return f"{name}: a {type(layer).__name__} is not a fused LoRA layer"
        x = _expected_input(layer, x_dtype)
        if (reason := block_reason(mlp, x.device, x.dtype)) is not None:
            return reason
        if (reason := _other_backend_reason(layer, x.expand(M, -1))) is not None:
            return f"{name}: {reason}"
    gate, up, down = (mlp._modules[name] for name in mlp._parts[:3])
    x = _expected_input(gate, x_dtype).expand(M, -1)
    found = make_block((gate, up, down), x, mlp._parts.activation)
    return NO_BLOCK if found is None else found[0]


def _other_backend_reason(layer: Any, x: Tensor) -> str | None:
    """Return why another backend computes the layer for x; None for the eager backend."""
    records = cast(list[Record], read_call(layer, x.device, x.dtype))
    _, (choice,) = _choose_calls(layer, records, x)
    return None if choice.is_eager else f"{choice.backend} computes it: {choice.reason}"


def _experts_row(name: str, layer: Any, x_dtype: torch.dtype | None) -> Row:
    base = layer.get_base_layer()
    weight = stack(base, layer.parameter_name)
    device, dtype = weight.device, weight.dtype
    is_transposed = has_transposed_stack(base, layer.parameter_name)
    reason = experts_reason(layer, device)
    if reason is not None:
        return _unfused_row(name, reason)
    adapter = active_adapter(layer)
    if adapter is None:
        return Row(name, TORCH, "torch", "the base alone", "no active adapter on this layer")
    A, B = adapter.lora_A, adapter.lora_B
    x = A.new_empty(0, A.shape[2], dtype=x_dtype or dtype)
    if isinstance(weight, QuantizedWeight):
        operand: Tensor | Codes = weight.codes
    else:
        operand = weight.mT if is_transposed else weight
    operands = ExpertsOperands(x, operand, [A], [B], x)
    spec = ExpertsSpec((1.0,), 0.0, dtype, dtype, is_transposed)
    choice = experts.choose(operands, spec)
    reason = f"experts; {choice.reason}"
    if choice.is_eager and is_on_gpu_path(device.type):
        reason += f"; {_experts_clause(operands, spec)}{_fold_clause(operands, spec)}"
    return Row(name, _backend_state([choice]), choice.backend, choice.strategy, reason)


def _experts_clause(operands: ExpertsOperands, spec: ExpertsSpec) -> str:
    """Return how the eager backend runs experts on a GPU, and why the host waits, if it does."""
    device, weight = operands.x.device, operands.weight
    is_quantized = isinstance(weight, Codes)
    if (blocking_reason := eager_experts.loop_reason(operands, spec)) is not None:
        verb = "decoded and multiplied" if is_quantized else "multiplied"
        return f"one expert at a time is {verb}, and the host waits for the GPU: {blocking_reason}"
    if (blocking_reason := eager_experts.waits_reason(device, spec.dtype)) is not None:
        return (
            "grouped_mm multiplies one expert at a time, and the host waits for the GPU: "
            f"{blocking_reason}"
        )
    decoder = ""
    if isinstance(weight, Codes):
        decoder = f"; {decoded_by(device, weight, operands.x.shape[-1], spec.dtype)}"
    return f"grouped_mm multiplies all experts, and the host does not wait{decoder}"


def _fold_clause(operands: ExpertsOperands, spec: ExpertsSpec) -> str:
    """Return from how many rows on the eager backend computes W + s·B·A of experts, or ""."""
    if (min_rows := eager_experts.fold_rows(operands, spec)) is None:
        return ""
    return f"; from {min_rows:,} rows of experts on, W + s·B·A, with fewer bytes and FLOPs"


def _embedding_row(name: str) -> Row:
    reason = "an embedding: its base is a lookup, no GEMM to fuse the adapter's with"
    return Row(name, LIBRARY, "torch", "lookups, then one GEMM in place", reason)
