"""Autograd Functions of the eager backend's GPU path: a layer, layers that share their x, and the
gated MLP; no mathematics (see `backends.eager.blocks`).

One Function is a whole block, because the host's time for a Function and its node in the graph is
that of several launches. The backward reads weights and adapters as attributes of its context, not
as saved tensors: checkpointing would keep each of them in a slot, and offloading would copy them.
An error tells of a write to them in between, as autograd does. Copies of them in another dtype are
saved.

The code runs once a layer and direction, so it is written for few Python calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C import _dispatch_tls_local_include_set, _is_any_autocast_enabled
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch.autograd import forward_ad

from ..backends import library
from ..backends.eager import blocks as eager
from ..backends.eager import gated_mlp as eager_mlp
from ..backends.eager.blocks import BlockGrads, BlockNeeds, DropoutMask
from ..backends.eager.products import HALVES, MANY_ROWS
from ..backends.library import has_out_dtype
from ..backends.rows import set_leading_dims_
from ..choice import verdicts
from ..core import forced
from ..core.call import Grads, Needs, Operands, Saved, Spec
from ..core.codes import Codes
from ..core.dtypes import stat_dtype, to_dtype
from ..core.record import PLAIN, CodePath, Record
from . import context, linear
from .arguments import FLOATS, copies_rows, has_strides
from .autograd import differentiable_once, new_unsaved

# The operands that a block of several layers takes, computed.
BLOCK = CodePath("a block", (frozenset({"rank_gate"}),))
_PLAIN = context.TENSOR_TYPES
_BY_DEFAULT = None, "eager"
_KEYS = context.KEYS, context.INFERENCE_KEYS
_CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace "
    "operation: the weight or the adapter of a layer that lora_kernels computes"
)


def can_run(x: Any) -> bool:
    """Return True if x is a plain tensor on the eager backend's GPU path that nothing observes.

    A mode may replay single ops, as selective checkpointing does.
    """
    # Torch 2.8 cannot trace the ContextVar.
    if type(x) not in _PLAIN or torch.compiler.is_compiling() or not has_strides(x):
        return False
    # The backward's thread knows no other backend than the one entered last.
    if forced.entered not in _BY_DEFAULT or forced.current.get().backend not in _BY_DEFAULT:
        return False
    if x.is_cpu and not (library.emulates_gpu and forced.entered == "eager"):
        return False
    if forward_ad._current_level >= 0:
        return False
    if _dispatch_tls_local_include_set() in _KEYS:
        return True
    # `bench.counter` counts on meta tensors, by a mode.
    return x.is_meta and context.unfused_context() is None


def cast_dtype(x: Tensor) -> torch.dtype | None:
    """Return autocast's dtype for x; None if it is off."""
    if not _is_any_autocast_enabled():
        return None
    return context.autocast_dtype(context.device_of(x)[0], x.dtype)


class Block(NamedTuple):
    """The arguments of a block that are not differentiated.

    Args:
        layers: those of one x; of an MLP gate, up and down.
        dtype: of the base GEMMs, and of x in them.
        y_dtype: of each y.
        casts: whether an A, a B or a dense weight has to be cast to `dtype`.
        is_plain: whether all have `dtype` then, and there is no gate.
        is_stacked: whether one GEMM computes P of all layers of one x.
        has_others: whether a bias or a gate may need a gradient.
        activation: of an MLP: "silu", "gelu_tanh" or "gelu".
    """

    layers: Sequence[Record]
    dtype: torch.dtype
    y_dtype: torch.dtype
    casts: bool
    is_plain: bool
    is_stacked: bool
    has_others: bool
    activation: str

    @property
    def cast_to(self) -> torch.dtype | None:
        """The dtype of the copies of what is cast; None if nothing is."""
        return self.dtype if self.casts else None

    def tensors(self) -> list[Tensor | None]:
        """Return what may need a gradient: all A, all B, and then all biases and all gates."""
        layers = self.layers
        tensors = [layer.lora_A for layer in layers]
        tensors += [layer.lora_B for layer in layers]
        if self.has_others:
            return [*tensors, *(layer.bias for layer in layers), *(g.rank_gate for g in layers)]
        return tensors


def call_linear(
    x: Tensor,
    layer: Record,
    compute_dtype: torch.dtype | None,
    casts_adapters: bool = False,
    keeps_x_dtype: bool = False,
) -> Tensor | None:
    """Return y [..., N] of one layer; None if `lora_linear` must be called.

    Args:
        layer: whose weight is frozen.
        compute_dtype, casts_adapters, keeps_x_dtype: as in `make_block`.
    """
    if not can_run(x):
        return None
    weight, A, B, bias, _, p = layer[:PLAIN]
    dtype, is_packed = x.dtype, type(weight) is Codes
    if (
        p
        or casts_adapters
        or not (type(A) in _PLAIN and type(B) in _PLAIN and A.dtype is B.dtype is dtype)
        or not (compute_dtype in (None, dtype) if is_packed else type(weight) in _PLAIN)
        or not (is_packed or (weight.dtype is dtype and not weight.requires_grad))
        or (bias is not None and bias.requires_grad)
        or not _fits(x, dtype, A)
    ):
        if A is None or B is None or weight is None:
            return None
        block = make_block(x, (layer,), (compute_dtype,), casts_adapters, keeps_x_dtype)
        return None if block is None else linears(x, block)[0]
    # One plain layer: a step of a block of one took 1.2 of its host time (emulated on a CPU).
    if torch.is_grad_enabled():
        return LinearFunction.apply(x, A, B, layer)  # type: ignore[no-any-return]
    return _linear(x, layer)


def plain_block(x: Tensor, layers: Sequence[Record], activation: str = "") -> Block | None:
    """Return the block of plain layers whose dtypes are x's; None if `make_block` has to decide.

    For q, k and v `make_block` executes a tenth more Python opcodes (counted).
    """
    dtype, device = x.dtype, x.device
    for layer in layers[1:]:
        if layer.lora_A.device != device:
            return None
    if not _fits(x, dtype, layers[0].lora_A):
        return None
    is_stacked = x.numel() > MANY_ROWS * x.shape[-1]
    return Block(layers, dtype, dtype, False, True, is_stacked, False, activation)


def _fits(x: Tensor, dtype: torch.dtype, lora_A: Tensor) -> bool:
    """Return True if autocast keeps x's dtype, no kernel was qualified for x's rows, and x has the
    device and the columns of lora_A [R, K]."""
    return not (
        (_is_any_autocast_enabled() and cast_dtype(x) not in (None, dtype))
        or (x.is_cuda and _has_verdict(x))
        or lora_A.device != x.device
        or dtype not in FLOATS
        or x.shape[-1:] != lora_A.shape[1:]
    )


def make_block(
    x: Tensor,
    layers: Sequence[Record],
    compute_dtypes: Sequence[torch.dtype | None],
    casts_adapters: bool = False,
    keeps_x_dtype: bool = False,
    activation: str = "",
) -> Block | None:
    """Return the block that computes the layers for an x of `can_run`; None if there is none.

    Args:
        layers: whose weights are frozen, and whose operands are computed (see
            `backends.eager.blocks`). A layer alone in its block may have dropout.
        compute_dtypes: of each layer's base GEMM without autocast, over a 4-bit weight.
        casts_adapters: whether A and B are cast to x's dtype.
        keeps_x_dtype: whether a layer over 4 bits returns x's dtype under autocast too, as
            bitsandbytes' does.
        activation: of a gated MLP, whose layers are gate, up and down.
    """
    shape, x_dtype, device = x.shape, x.dtype, x.device
    if x_dtype not in FLOATS or shape[-1:] != layers[0].lora_A.shape[1:]:
        return None
    autocast = cast_dtype(x) if _is_any_autocast_enabled() else None
    dtype, may_cast = autocast or x_dtype, casts_adapters or autocast is not None
    is_plain, casts, has_others, has_dropout, packed, i = True, False, False, False, 0, 0
    for layer in layers:
        weight, A, B, bias, _, p = layer[:PLAIN]
        has_dropout = has_dropout or bool(p)
        if not (type(A) in _PLAIN and type(B) in _PLAIN and A.device == device):
            return None
        if type(weight) in _PLAIN:
            if weight.requires_grad:
                return None
            if weight.dtype is not dtype:
                if autocast is None:
                    return None
                casts = True
        elif isinstance(weight, Codes):
            packed += 1
            if autocast is None and compute_dtypes[i] not in (None, dtype):
                return None
        else:
            return None
        if layer.rank_gate is not None:
            is_plain, has_others = False, True
        elif bias is not None and bias.requires_grad:
            has_others = True
        if not A.dtype is B.dtype is dtype:
            if may_cast:
                casts = True
            elif A.dtype is layers[0].lora_A.dtype and torch.float64 not in (
                dtype,
                A.dtype,
                B.dtype,
            ):
                is_plain = False
            else:
                return None
        i += 1
    is_alone = i == 1
    if not is_plain and is_alone:
        return None
    if has_dropout and (not is_alone or copies_rows(x)):
        return None  # the mask is drawn for x itself
    if x.is_cuda and _has_verdict(x) and not all(_is_eager(x, layer, dtype) for layer in layers):
        return None
    y_dtype = dtype
    if keeps_x_dtype and packed and dtype is not x_dtype:
        if packed < i and not activation:
            return None  # the results have two dtypes
        # An MLP's h has autocast's dtype over a dense gate and up, and then y.
        if type(weight) is Codes and (packed > 1 or not activation):
            y_dtype = x_dtype
    is_stacked = not is_alone and x.numel() > MANY_ROWS * shape[-1]
    return Block(layers, dtype, y_dtype, casts, is_plain, is_stacked, has_others, activation)


def _has_verdict(x: Tensor) -> bool:
    """Return True if kernels of this package were measured on x's GPU with as many rows as x's.

    `choose` gives calls of more rows to eager: a training step then costs what it does without a
    verdict.
    """
    verdict = verdicts.current(x.get_device())
    if not isinstance(verdict, verdicts.Verdict):
        return False
    return x.numel() <= verdict.max_rows * x.shape[-1:].numel()


def _is_eager(x: Tensor, layer: Record, dtype: torch.dtype) -> bool:
    """Return True if no verdict gives the layer's call to a kernel of this package."""
    K = layer.lora_A.shape[1]
    rows = x.new_empty((), dtype=dtype).expand(x.numel() // x.shape[-1], K)
    operands = Operands(rows, layer.weight, layer.lora_A, layer.lora_B, layer.rank_gate)
    return linear.choose(operands, Spec(1.0, 0.0, dtype, dtype)).is_eager


def linears(x: Tensor, block: Block) -> Sequence[Tensor]:
    """Return each y_i [..., N_i] for x [..., K]."""
    if torch.is_grad_enabled():
        return LinearsFunction.apply(x, block, *block.tensors())  # type: ignore[no-any-return]
    layers, is_plain, rows = _cast(block), block.is_plain, _rows(x, block.dtype)
    if len(layers) == 1:
        ys = [eager.linear_output(rows, layers[0])[0]]
    else:
        with context.NOTHING if is_plain else context.no_autocast(x):
            ys, _ = eager.linears(rows, layers, is_plain, block.is_stacked)
    leading = x.shape[:-1]
    return [set_leading_dims_(to_dtype(y, block.y_dtype), leading) for y in ys]


def gated_mlp(x: Tensor, block: Block) -> Tensor:
    """Return y = down(act(gate(x)) ⊙ up(x)) [..., N] for x [..., K]."""
    if not torch.is_grad_enabled():
        return _gated_mlp_output(x, block, [_gate_and_up(x, block, _cast(block))])
    unfinished: list[Any] = []
    y = GatedMLPFunction.apply(x, block, unfinished, *block.tensors())
    # A checkpoint that computes the forward again, for what it saves alone, stops before this.
    with torch.no_grad():
        y.data = _gated_mlp_output(x, block, unfinished)
    return cast(Tensor, y)


def gated_mlp_like(block: Block) -> tuple[int, torch.dtype]:
    """Return N and the dtype of `gated_mlp`'s result."""
    return block.layers[2].lora_B.shape[0], block.y_dtype


def gated_mlp_forward(x: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Return `gated_mlp`'s y, without a graph, and P of the down-projection."""
    unfinished: list[Any] = [_gate_and_up(x, block, _cast(block))]
    y = _gated_mlp_output(x, block, unfinished)
    return y, unfinished[0]


def gated_mlp_again(x: Tensor, block: Block, p: Tensor) -> Tensor:
    """Return `gated_mlp`'s y with its graph and without values, from P of the down-projection.

    The down-projection does not run. What the backward needs of it is P.
    """
    unfinished: list[Any] = []
    y = GatedMLPFunction.apply(x, block, unfinished, *block.tensors())
    unfinished[:] = [p]
    return cast(Tensor, y)


class _GateAndUp(NamedTuple):
    """g and u of a gated MLP, before h.

    Args:
        g, u: [M, H], with `updates` without the low-rank updates.
        ps: P of gate and up.
        updates: those that the kernels add; None if g and u have them.
        down: the down-projection.
    """

    g: Tensor
    u: Tensor
    ps: Sequence[Tensor]
    updates: eager_mlp.Updates | None
    down: Record


def updates_reason(block: Block, device: torch.device) -> str | None:
    """Return why GEMMs of their own add the updates of an MLP's gate and up; None if kernels do."""
    return eager_mlp.updates_reason(_cast(block), device, block.dtype, block.activation)


def _gate_and_up(x: Tensor, block: Block, layers: Sequence[Record]) -> _GateAndUp:
    """Compute g and u for x [..., K]. layers: the block's, cast."""
    rows, is_plain, gate_and_up = _rows(x, block.dtype), block.is_plain, layers[:2]
    reason = eager_mlp.updates_reason(layers, x.device, block.dtype, block.activation)
    with context.NOTHING if is_plain else context.no_autocast(x):
        if reason is not None:
            (g, u), ps = eager.linears(rows, gate_and_up, is_plain, block.is_stacked)
            return _GateAndUp(g, u, ps, None, layers[2])
        ps = eager.low_ranks(rows, gate_and_up, is_plain, block.is_stacked)
        g, u = (eager.base_output(rows, layer) for layer in gate_and_up)
        updates = eager_mlp.updates_of(gate_and_up, ps, block.dtype)
        return _GateAndUp(g, u, ps, updates, layers[2])


def _gated_mlp_output(x: Tensor, block: Block, unfinished: list[Any]) -> Tensor:
    """Return y [..., N] from the `_GateAndUp` in a list, in whose place P of down is then."""
    g, u, _, updates, down = unfinished.pop()
    is_plain = block.is_plain
    with context.NOTHING if is_plain else context.no_autocast(x):
        if updates is None:
            h = eager_mlp.gated(g, u, block.activation)
        else:
            h = eager_mlp.gated_update(g, u, updates, block.activation)
        del g, u
        y, p = _down(h, down, is_plain)
    unfinished.append(p)
    return set_leading_dims_(to_dtype(y, block.y_dtype), x.shape[:-1])


def _linear(x: Tensor, layer: Record) -> Tensor:
    """Return y of one plain layer."""
    shape = x.shape
    if len(shape) == 2:
        return eager.linear_output(x, layer)[0]
    rows = x.reshape(-1, shape[-1])
    return set_leading_dims_(eager.linear_output(rows, layer)[0], shape[:-1])


def _down(h: Tensor, layer: Record, is_plain: bool) -> tuple[Tensor, Tensor]:
    """Return y and P of the down-projection."""
    if is_plain:
        return eager.linear_output(h, layer)[:2]
    (y,), (p,) = eager.linears(h, (layer,), False, False)
    return y, p


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype is not dtype:
        x = x.to(dtype)
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _cast(block: Block) -> Sequence[Record]:
    """Return the block's layers with A, B and a dense weight in its dtype.

    One kernel casts all A and B. A of layers of one x are then rows of one tensor, which
    `eager.stack` finds.
    """
    layers, dtype = block.layers, block.dtype
    if not block.casts:
        return layers
    n, shared = len(layers), 2 if block.activation else len(layers)
    adapters = [layer.lora_A for layer in layers] + [layer.lora_B for layer in layers]
    if any([t.dtype is not dtype for t in adapters]):
        copies: list[Tensor] = []
        if shared > 1:
            ranks, A = [A.shape[0] for A in adapters[:shared]], adapters[0]
            stacked = A.new_empty(sum(ranks), A.shape[1], dtype=dtype)
            copies = [*stacked.split_with_sizes(ranks)]
        copies += [t.new_empty(t.shape, dtype=dtype) for t in adapters[len(copies) :]]
        torch._foreach_copy_(copies, adapters)
        adapters = copies
    found = []
    for i, layer in enumerate(layers):
        weight, _, _, *others = layer
        if type(weight) is not Codes:
            weight = to_dtype(weight, dtype)
        found.append(Record(weight, adapters[i], adapters[n + i], *others))
    return found


def _versions(
    layers: Sequence[Record], needs_input: Sequence[bool], cast_to: torch.dtype | None
) -> list[int]:
    """Return for each layer the sum of the versions of what the backward reads, which only grow.

    Empty if one of them is an inference tensor, which has none.

    Args:
        needs_input: whether the backward computes the gradient of each layer's input.
        cast_to: the dtype of the copies that `_cast` made and the backward reads; None without.
    """
    versions = []
    try:
        for layer, need_x in zip(layers, needs_input, strict=True):
            weight, A, B, gate = layer.weight, layer.lora_A, layer.lora_B, layer.rank_gate
            total = 0
            if need_x:
                if type(weight) is Codes:
                    total += weight[0]._version
                elif cast_to in (None, weight.dtype):
                    total += weight._version
            if cast_to is None:
                total += B._version + A._version if need_x else B._version
            if gate is not None:
                total += gate._version
            versions.append(total)
    except RuntimeError:
        return []
    return versions


def _needs_inputs(needs: Sequence[bool]) -> tuple[bool, bool, bool]:
    """Return whether a gated MLP's backward computes dx, dx and dh, the inputs' gradients of gate,
    up and down.

    needs: `ctx.needs_input_grad`. An operand of gate or up needs dh, whether or not x does.
    """
    need_x, _, _, *of_layers = needs
    return need_x, need_x, need_x or any([need for i, need in enumerate(of_layers) if i % 3 != 2])


def _layer_tensors(ctx: Any) -> list[Any]:
    """Return what a backward may read of its context, and what may need a gradient."""
    layers = ctx.block.layers if hasattr(ctx, "block") else (ctx.layer,)
    return [t for layer in layers for t in (layer.lora_A, layer.lora_B, layer.rank_gate)]


class _BlockFunction(torch.autograd.Function):
    """A Function whose `finish(ctx, *compute(ctx, saved, *dys))` is its backward.

    Autocast is disabled in it, and the results raise if they are differentiated. The saved tensors
    are freed before `finish` casts the gradients.
    """

    finish: Any = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        compute: Any = cls.compute  # type: ignore[attr-defined]
        finish = cls.finish

        def compute_and_finish(ctx: Any, saved: Any, *dys: Any) -> Any:
            grads = compute(ctx, saved, *dys)
            return grads if finish is None else finish(ctx, *grads)

        run = differentiable_once(compute_and_finish, _layer_tensors)

        def backward(ctx: Any, *dys: Any) -> Any:
            if torch.is_grad_enabled() or _is_any_autocast_enabled():
                dy = next((dy for dy in dys if dy is not None), None)
                if dy is not None:
                    with context.no_autocast(dy):
                        return run(ctx, *dys)
            grads = compute(ctx, ctx.saved_tensors, *dys)
            if finish is None:
                return grads
            ctx.maybe_clear_saved_tensors()
            return finish(ctx, *grads)

        cls.backward = staticmethod(backward)  # type: ignore[method-assign]
        # Without asking in each call which of backward and vjp the class has.
        cls._backward_cls.apply = backward  # type: ignore[attr-defined]


def _layer_backward_by_op(
    ctx: Any,
    dy: Tensor,
    x: Tensor | None,
    p: Tensor | None,
    layer: Record,
    needs: Needs,
    mask: Tensor | None = None,
) -> Grads:
    """Compute one layer's gradients by a registered op, for several dy at once.

    PyTorch slices a batched dy for the op, but for no kernel that writes to its arguments, as those
    of `eager.linears_backward` do (see `context.is_batched`).

    x, p, mask: as the Function saved them. None for an x or P that no gradient reads.
    """
    (R, K), stat = layer.lora_A.shape, stat_dtype(dy.dtype)
    x = new_unsaved(dy, K, dy.dtype) if x is None else x
    p = new_unsaved(dy, R, stat, flat=True) if p is None else p.to(stat)
    weight, lora_A, lora_B = layer.weight, layer.lora_A, layer.lora_B
    operands = Operands(x, weight, lora_A, lora_B, layer.rank_gate, mask=mask)
    spec = Spec(cast(float, layer.scaling), layer.dropout_p, dy.dtype, dy.dtype)
    ctx.choice = "eager"  # of the op, for which PyTorch slices dy
    return Grads(*linear.call_linear_backward(ctx, dy, operands, Saved(p), spec, needs))


def _backward_by_op(
    ctx: Any,
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    ps: Sequence[Tensor | None],
    layers: Sequence[Record],
    needs: BlockNeeds,
    mask: Tensor | None = None,
) -> BlockGrads:
    """Compute the gradients of layers of one x, layer by layer, for several dy at once."""
    grads, none = BlockGrads(None, [], [], [], []), (False,) * len(layers)
    need_bias, need_gate = needs.bias or none, needs.rank_gate or none
    dx: Tensor | None = None
    for i, dy in enumerate(dys):
        need = Needs(needs.x, needs.lora_A[i], needs.lora_B[i], need_gate[i], bias=need_bias[i])
        found = Grads()
        if dy is not None:
            found = _layer_backward_by_op(ctx, dy, x, ps[i], layers[i], need, mask)
        if found.x is not None:
            dx = found.x if dx is None else dx + found.x
        grads.lora_A.append(found.lora_A)
        grads.lora_B.append(found.lora_B)
        grads.bias.append(found.bias)
        grads.rank_gate.append(found.rank_gate)
    return grads._replace(x=dx)


class LinearFunction(_BlockFunction):
    """One plain layer: x [..., K] -> y [..., N]. Saves x for dA, and P [M, R]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, layer: Record) -> Tensor:
        shape = x.shape
        rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
        y, p, _ = eager.linear_output(rows, layer)
        need_x, need_A, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_A else None, p)
        ctx.layer, ctx.version, ctx.x_shape = layer, _versions((layer,), (need_x,), None), shape
        return y if len(shape) == 2 else set_leading_dims_(y, shape[:-1])

    @staticmethod
    def compute(ctx: Any, saved: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, p = saved
        layer, shape = ctx.layer, ctx.x_shape
        need_x, need_A, need_B, _ = ctx.needs_input_grad
        if ctx.version != _versions((layer,), (need_x,), None):
            raise RuntimeError(_CHANGED)
        if context.is_batched(dy):
            needs = Needs(need_x, need_A, need_B)
            dx, dA, dB, *_ = _layer_backward_by_op(ctx, dy, x, p, layer, needs)
            return dx, dA, dB, None
        if len(shape) == 2:
            dx, dA, dB = eager.linear_backward(dy, x, p, layer, need_x, need_A, need_B)
            return dx, dA, dB, None
        dy = dy.reshape(-1, dy.shape[-1])
        x = None if x is None else x.reshape(-1, shape[-1])
        dx, dA, dB = eager.linear_backward(dy, x, p, layer, need_x, need_A, need_B)
        return None if dx is None else dx.view(shape), dA, dB, None


def _copies(layers: Sequence[Record], originals: Sequence[Record]) -> list[Any]:
    """Return the copies that `_cast` made of each layer's tensors; None for a weight that was not
    copied."""
    copies: list[Any] = []
    for layer, original in zip(layers, originals, strict=True):
        weight = layer.weight if layer.weight is not original.weight else None
        copies += weight, layer.lora_A, layer.lora_B
    return copies


def _load(
    ctx: Any,
    copies: Sequence[Any],
    needs_input: Sequence[bool],
    dys: Sequence[Tensor | None] | None = None,
) -> Sequence[Record]:
    """Return the layers as the forward had them. RuntimeError if their tensors have changed.

    needs_input: as in `_versions`.
    dys: the gradient of each layer's y. A layer whose y has none is not checked: after a write to
        its tensors, its own call has computed another y.
    """
    block: Block = ctx.block
    layers, casts = block.layers, block.casts
    versions = _versions(layers, needs_input, block.cast_to)
    if ctx.version != versions:
        compared = zip(ctx.version, versions, dys or versions, strict=True)
        if any(saved != current and dy is not None for saved, current, dy in compared):
            raise RuntimeError(_CHANGED)
    if not casts:
        return layers
    copied = zip(layers, copies[::3], copies[1::3], copies[2::3], strict=True)
    return [
        layer._replace(weight=layer.weight if weight is None else weight, lora_A=A, lora_B=B)
        for layer, weight, A, B in copied
    ]


def _used(ps: Sequence[Tensor], needs: Sequence[bool], n: int) -> Sequence[Tensor | None]:
    """Return each P whose dB or gate's gradient is needed.

    needs: of all A, all B and others, of n layers.
    """
    return [p if _needs_p(i, needs, n) else None for i, p in enumerate(ps)]


def _needs_p(i: int, needs: Sequence[bool], n: int) -> bool:
    """Return True if the i-th layer's dB or gate's gradient is needed; needs, n: as in `_used`."""
    return needs[n + i] or (len(needs) > 3 * n and needs[3 * n + i])


def _input_grads(
    ctx: Any, dx: Tensor | None, dA: list[Any], dB: list[Any], dbias: list[Any], dg: list[Any]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the Function's arguments, each in its tensor's shape and dtype."""
    block: Block = ctx.block
    if dx is not None:
        if block.dtype is not ctx.x_dtype:
            dx = dx.to(ctx.x_dtype)
        if len(ctx.x_shape) != 2:
            dx = dx.view(ctx.x_shape)
    if block.casts:
        _cast_grads(dB, [layer.lora_B for layer in block.layers])
        _cast_grads(dA, [layer.lora_A for layer in block.layers])
    if not block.has_others:
        return dx, None, *dA, *dB
    _cast_grads(dbias, [layer.bias for layer in block.layers])
    _cast_grads(dg, [layer.rank_gate for layer in block.layers])
    return dx, None, *dA, *dB, *dbias, *dg


def _grad_dtype(block: Block, dys: Sequence[Tensor | None]) -> torch.dtype:
    """Return the dtype of dA and dB of plain layers: float32 if all A and B have it, and the GEMMs
    of the 16-bit dy can write it."""
    if block.casts and block.dtype in HALVES:
        adapters = [t for layer in block.layers for t in (layer.lora_A, layer.lora_B)]
        dy = next((dy for dy in dys if dy is not None), None)
        are_float32 = all([t.dtype is torch.float32 for t in adapters])
        if are_float32 and dy is not None and has_out_dtype(dy):
            return torch.float32
    return block.dtype


def _cast_grads(grads: list[Any], tensors: Sequence[Any]) -> None:
    """Cast each gradient in the list to its tensor's dtype."""
    for i, t in enumerate(tensors):
        if grads[i] is not None:
            grads[i] = to_dtype(grads[i], t.dtype)


class LinearsFunction(_BlockFunction):
    """x [..., K] -> each y_i [..., N_i]. Saves x for dA, and P [M, R] for dB and dg."""

    finish = staticmethod(_input_grads)

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        layers, dtype, casts, is_plain = _cast(block), block.dtype, block.casts, block.is_plain
        shape, mask = x.shape, None
        rows = x if len(shape) == 2 and x.dtype is dtype else _rows(x, dtype)
        ys: list[Tensor]
        ps: Sequence[Tensor]
        if len(layers) == 1:  # which is plain
            y, p, mask = eager.linear_output(rows, layers[0])
            ys, ps = [y], [p]
        else:
            with context.NOTHING if is_plain else context.no_autocast(x):
                ys, ps = eager.linears(rows, layers, is_plain, block.is_stacked)
        needs = ctx.needs_input_grad[2:]
        saved_x = None
        if any(needs[: len(layers)]):
            saved_x = x if x.dtype is dtype else rows
        copies = _copies(layers, block.layers) if casts else ()
        ctx.save_for_backward(saved_x, mask, *_used(ps, needs, len(layers)), *copies)
        ctx.block, ctx.x_shape, ctx.x_dtype = block, shape, x.dtype
        needs_input = (ctx.needs_input_grad[0],) * len(layers)
        ctx.version = _versions(block.layers, needs_input, block.cast_to)
        if len(shape) != 2 or block.y_dtype is not dtype:
            ys = [set_leading_dims_(to_dtype(y, block.y_dtype), shape[:-1]) for y in ys]
        return tuple(ys)

    @staticmethod
    def compute(ctx: Any, saved: Any, *dys: Any) -> BlockGrads:
        ctx.has_run = True  # what it saved may be freed
        block: Block = ctx.block
        n, dtype = len(block.layers), block.dtype
        x, mask, *others = saved
        need_x, _, *needs = ctx.needs_input_grad
        layers = _load(ctx, others[n:], (need_x,) * n, dys)
        is_batched = any([dy is not None and context.is_batched(dy) for dy in dys])
        dys = tuple([None if dy is None else _rows(dy, dtype) for dy in dys])
        x, ps = None if x is None else _rows(x, dtype), others[:n]
        need = BlockNeeds(need_x, needs[:n], needs[n : 2 * n], needs[2 * n : 3 * n], needs[3 * n :])
        if is_batched:
            return _backward_by_op(ctx, dys, x, ps, layers, need, mask)
        dropped = None if mask is None else DropoutMask(mask, layers[0].dropout_p)
        args = layers, need, block.is_plain, _grad_dtype(block, dys), dropped
        return eager.linears_backward(dys, x, ps, *args)


def _mlp_input_grads(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    """`_input_grads` for a Function with one more argument after its block."""
    dx, *others = _input_grads(ctx, *grads)
    return dx, None, *others


class GatedMLPFunction(_BlockFunction):
    """x [..., K] -> y [..., N], whose values `gated_mlp` computes after it.

    Saves x for dA, g and u, and P of gate and up for dB and dg. Tensors are saved after a
    Function's forward, and a checkpoint that computes the forward again stops at the last one. So
    what no saved tensor needs is computed after the Function: h, and y, whose GEMM is a third of
    the forward's. P of the down-projection, [M, R], is kept from the first forward on, in the list
    that the forward gets.
    """

    finish = staticmethod(_mlp_input_grads)

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, unfinished: list[Any], *tensors: Any) -> Tensor:
        layers, dtype, casts = _cast(block), block.dtype, block.casts
        found = _gate_and_up(x, block, layers)
        unfinished.append(found)
        needs = ctx.needs_input_grad[3:]
        saved_x = None if not (needs[0] or needs[1]) else x if x.dtype is dtype else _rows(x, dtype)
        ps = found.ps if found.updates is not None else _used(found.ps, needs, 3)
        copies = _copies(layers, block.layers) if casts else ()
        ctx.save_for_backward(saved_x, found.g, found.u, *ps, *copies)
        ctx.block, ctx.x_shape, ctx.x_dtype = block, x.shape, x.dtype
        ctx.unfinished, ctx.adds_updates = unfinished, found.updates is not None
        ctx.version = _versions(block.layers, _needs_inputs(ctx.needs_input_grad), block.cast_to)
        shape = *x.shape[:-1], layers[2].lora_B.shape[0]
        return x.new_empty_strided(shape, (0,) * len(shape), dtype=block.y_dtype)

    @staticmethod
    def compute(ctx: Any, saved: Any, dy: Tensor) -> BlockGrads:
        block: Block = ctx.block
        dtype, is_plain, activation = block.dtype, block.is_plain, block.activation
        x, g, u, p_gate, p_up, *copies = saved
        need_x, _, _, *needs = ctx.needs_input_grad
        needs_input = _needs_inputs(ctx.needs_input_grad)
        layers = _load(ctx, copies, needs_input)
        is_batched, dy = context.is_batched(dy), _rows(dy, dtype)
        x, ps = None if x is None else _rows(x, dtype), (p_gate, p_up)
        p_down = ctx.unfinished[0] if _needs_p(2, needs, 3) else None
        need_A, need_B, need_bias, need_gate = needs[:3], needs[3:6], needs[6:9], needs[9:]
        need_gate_of_down, need_bias_of_down = any(need_gate[2:]), any(need_bias[2:])
        down_needs = Needs(
            needs_input[2], need_A[2], need_B[2], need_gate_of_down, False, need_bias_of_down
        )
        need = BlockNeeds(need_x, need_A[:2], need_B[:2], need_bias[:2], need_gate[:2])
        gate_and_up, grad_dtype = (x, ps, layers[:2]), _grad_dtype(block, (dy,))
        # Else a second backward reads g and u.
        in_place = not _get_current_graph_task_keep_graph()
        updates = eager_mlp.updates_of(layers, ps, dtype) if ctx.adds_updates else None
        if is_batched:
            if updates is not None:
                g, u = eager_mlp.add_updates(g, u, updates)
            h = eager_mlp.gated(g, u, activation)
            down = _layer_backward_by_op(ctx, dy, h, p_down, layers[2], down_needs)
            dgu = eager_mlp.split_gradient(g, u, down.x, activation)
            grads = _backward_by_op(ctx, dgu, *gate_and_up, need)
        elif updates is None:
            down_args = g, u, p_down, layers[2], down_needs, is_plain, in_place, activation
            dg, du, down = eager.down_backward(dy, *down_args, grad_dtype)
            grads = eager.linears_backward((dg, du), *gate_and_up, need, is_plain, grad_dtype)
        else:
            dg, du, dBs, down = eager.updated_down_backward(
                dy, g, u, updates, p_down, layers[2], down_needs, any(need.lora_B), in_place,
                activation, grad_dtype,
            )  # fmt: skip
            if dBs:
                need = need._replace(lora_B=(False, False))
            grads = eager.linears_backward((dg, du), *gate_and_up, need, is_plain, grad_dtype)
            for i, dB in enumerate(dBs):
                if need_B[i]:
                    grads.lora_B[i] = dB
        grads.lora_A.append(down.lora_A)
        grads.lora_B.append(down.lora_B)
        if need_bias:
            grads.bias.append(down.bias)
            grads.rank_gate.append(down.rank_gate)
        if in_place:
            ctx.unfinished.clear()
        return grads
