"""`explain`: for each LoRA layer, what its next call will do and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from .. import select
from ..functional import base_dtype
from ..layers import LoRAEmbedding, LoRALinear, QLoRALinear
from . import adalora, embedding, linear
from .linear import Call, Fused, dora, is_linear4bit, unreadable
from .swap import lora_layers


class Row(NamedTuple):
    """What the next call of one LoRA layer will do.

    state: "fused": one op of ours and no other matrix product; "composed": several of our ops;
    "adapter only": the base layer is called as a module; "not fused": PEFT's own forward, the base
    alone, or plain PyTorch: the eager backend, and every embedding, whose lookups are no product
    that an adapter's could be fused with.
    """

    layer: str
    state: str
    backend: str
    strategy: str
    reason: str


@dataclass(frozen=True, repr=False)
class Explanation:
    """A `Row` for each LoRA layer; `str()` is a table of them.

    parameters: of the adapters of each layer, by name, in elements. Where layers differ in state,
    the table ends in each state's share of them.
    """

    rows: list[Row]
    parameters: Mapping[str, int] = field(default_factory=dict)

    def assert_fused(self) -> None:
        """Raises RuntimeError that lists the layers not "fused", also where there is no layer."""
        rest = [row for row in self.rows if row.state != "fused"]
        if rest or not self.rows:
            lines = [f"  {row.layer}: {row.state} ({row.backend}): {row.reason}" for row in rest]
            raise RuntimeError("\n".join([f"want all fused, got {self._summary()}", *lines]))

    def _summary(self) -> str:
        states, sizes = Counter(row.state for row in self.rows), Counter[str]()
        for row in self.rows:
            sizes[row.state] += self.parameters.get(row.layer, 0)
        counts = [f"{n} {state}" for state, n in states.most_common()]
        if len(counts) > 1 and (total := sizes.total()):
            shares = [sizes[state] / total for state, _ in states.most_common()]
            counts = [f"{n} ({share:.1%})" for n, share in zip(counts, shares, strict=True)]
            counts[-1] += " of the LoRA parameters"
        return f"{len(self.rows)} LoRA layers: {', '.join(counts) or 'nothing to fuse'}"

    def __str__(self) -> str:
        table = [Row._fields, *self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join([*lines, self._summary()])

    __repr__ = __str__


def explain(model: nn.Module, *, x_dtype: torch.dtype | None = None) -> Explanation:
    """For each LoRA layer of `model`, fused or not, what its next call will do and why.

    Covers PEFT's layers and `lora_kernels.layers.LoRALinear` with its subclasses. The answer is for
    the state at hand: training or not, active adapters, hooks, and the autocast and backend in
    force.

    Args:
        x_dtype: of the layers' input; None stands for each base weight's dtype.

    Raises TypeError for anything but a module, RuntimeError if a backend is forced that cannot run.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    >>> print(explain(model))
    layer               state      backend  strategy            reason
    base_model.model.0  not fused  peft     PEFT's own forward  fuse() was not called
    1 LoRA layers: 1 not fused
    """
    rows: list[Row] = []

    def add(name: str, row: Callable[[], Row]) -> None:
        with as_in_forward(model, name) as sharded:
            rows.append(row())
        if sharded:
            reason = f"{rows[-1].reason}; FSDP2 gathers its parameters for the call"
            rows[-1] = rows[-1]._replace(reason=reason)

    for found in lora_layers(model):
        add(found[0], partial(_peft_row, *found, x_dtype))
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            add(name, partial(_dense_row, name, module, x_dtype))
    layers = {row.layer: model.get_submodule(row.layer) for row in rows}
    return Explanation(rows, {name: _lora_size(layer) for name, layer in layers.items()})


@contextmanager
def as_in_forward(model: nn.Module, name: str) -> Iterator[bool]:
    """Has the layer's parameters that FSDP2 shards as its forward will see them, plain and whole,
    but for their values. Yields whether there are any."""
    path = name.split(".")
    modules = [model.get_submodule(".".join(path[:i])) for i in range(len(path) + 1)]
    stored: list[tuple[nn.Module, str, Any]] = [
        (module, key, p)
        for module in modules[-1].modules()
        for key, p in module._parameters.items()
        if type(p).__name__ == "DTensor" and _gathered(modules, p)
    ]
    try:
        for module, key, p in stored:
            module._parameters[key] = nn.Parameter(_whole(p), requires_grad=p.requires_grad)
        yield bool(stored)
    finally:
        for module, key, p in stored:
            module._parameters[key] = p
            vars(getattr(module, "quant_state", None) or module).pop("_lora_kernels", None)


def _whole(p: Any) -> Tensor:
    """As p in all but values. No memory but for codes, whose bytes are looked at as they lie."""
    if p.is_floating_point():
        return torch.empty((), dtype=p.dtype, device=p.device).expand(p.shape)
    return torch.empty(p.shape, dtype=p.dtype, device=p.device)


def _gathered(modules: Sequence[nn.Module], p: Any) -> bool:
    """Whether one of the modules is FSDP2's, and sharding there is all that was done to p."""
    from torch.distributed.fsdp import FSDPModule

    *copies, last = p.placements
    alone = last.is_shard() and all(each.is_replicate() for each in copies)
    return alone and any(isinstance(module, FSDPModule) for module in modules)


def _lora_size(layer: nn.Module) -> int:
    """Elements of the layer's own adapters, whose names begin alike in PEFT's layers and ours."""
    parameters = layer.named_parameters()
    return sum(p.numel() for name, p in parameters if name.startswith("lora_"))


def _peft_row(name: str, layer: LoraLayer, reason: str | None, x_dtype: torch.dtype | None) -> Row:
    if reason is None:
        if isinstance(layer, Fused):
            return _fused_row(name, layer, x_dtype)
        reason = "fuse() was not called"
    return _not_fused(name, reason)


def _not_fused(name: str, reason: str) -> Row:
    return Row(name, "not fused", "peft", "PEFT's own forward", reason)


def _fused_row(name: str, layer: Any, x_dtype: torch.dtype | None) -> Row:
    base = layer.base_layer
    if isinstance(layer, embedding.FusedEmbedding):
        reason = embedding.peft_reason(layer, embedding.adapters_of(layer), base.weight.device)
        return _embedding_row(name) if reason is None else _not_fused(name, reason)
    kind: Any = adalora if isinstance(layer, adalora.FusedSVD) else linear
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
    reason = kind.peft_reason(layer, adapters, near.device, x_dtype)
    if reason is not None:
        return _not_fused(name, reason)

    todo = kind.calls(adapters) if layer.mixed_batch is None else []
    four_bit = is_linear4bit(base)
    compute_dtype = base.compute_dtype if four_bit and base.compute_type_is_set else None
    choices = [
        _choice(call, x_dtype, four_bit and not i, compute_dtype)
        for i, call in enumerate(todo)  # the base rides on the first
    ] or [_mixed_choice(adapters, x_dtype, four_bit, compute_dtype)]
    backend = " + ".join(dict.fromkeys(choice.backend for choice in choices))
    state, strategy = "fused", choices[0].strategy
    reasons = list(dict.fromkeys(choice.reason for choice in choices))
    if not todo:
        reasons.append(f"rows name their adapters, as in the last call: {len(adapters)} in one")
    elif len(todo) < len(adapters):
        reasons.append("adapters stacked along the rank")
    if len(todo) > 1:
        state, strategy = "composed", f"{strategy}; {len(todo)} calls"
        reasons.append("each adapter with dropout draws a mask of its own")
    if dora(layer, adapters[0].name):
        reasons.append("DoRA: the row norm without a second weight")
        if todo[0].dropout_p:
            state, strategy = "composed", f"{strategy}; the base product twice"
            reasons.append("PEFT's DoRA drops x for the base product too")
    if "eager" in backend:
        state = "not fused"
    if (base_reason := unreadable(base, near.device)) is not None:
        state, strategy = "adapter only", "base layer as a module, adapter added"
        reasons.insert(0, f"base layer: {base_reason}")
    return Row(name, state, backend, strategy, "; ".join(reasons))


def _dense_row(name: str, layer: LoRALinear, x_dtype: torch.dtype | None) -> Row:
    if layer.merged or not layer.enabled:
        reason = "the adapter is merged" if layer.enabled else "the adapter is disabled"
        product = "F.embedding" if isinstance(layer, LoRAEmbedding) else "F.linear"
        return Row(name, "not fused", "torch", product, reason)
    if isinstance(layer, LoRAEmbedding):
        return _embedding_row(name)
    four_bit = isinstance(layer, QLoRALinear)
    compute_dtype = layer.compute_dtype if isinstance(layer, QLoRALinear) else None
    x_dtype = x_dtype or (layer.lora_A if four_bit else layer.weight).dtype
    dropout_p = layer.dropout if layer.training else 0.0
    call = Call(layer.lora_A, layer._adapter_B(), layer.scaling, None, dropout_p)
    choice = _choice(call, x_dtype, four_bit, compute_dtype)
    state = "not fused" if choice.backend == "eager" else "fused"
    return Row(name, state, choice.backend, choice.strategy, choice.reason)


def _embedding_row(name: str) -> Row:
    reason = "an embedding: its base is a lookup, no product to fuse the adapter's with"
    return Row(name, "not fused", "torch", "lookups, then one product in place", reason)


def _mixed_choice(
    adapters: Sequence[linear.Adapter],
    x_dtype: torch.dtype,
    four_bit: bool,
    compute_dtype: torch.dtype | None,
) -> select.Choice:
    """What `multi_lora_linear` will choose for an x of this dtype beside the adapters."""
    A, B = adapters[0].lora_A.weight, adapters[0].lora_B.weight
    rank = max(adapter.lora_A.weight.shape[0] for adapter in adapters)
    dtype = base_dtype(A.device.type, x_dtype, compute_dtype)
    return select.multi_lora_linear(
        A.device.type, x_dtype, A.dtype, B.dtype, dtype, rank, None, four_bit, A.device.index
    )


def _choice(
    call: Call, x_dtype: torch.dtype, four_bit: bool, compute_dtype: torch.dtype | None
) -> select.Choice:
    """What `lora_linear` will choose for an x of this dtype beside the adapter."""
    (R, K), N, device = call.lora_A.shape, call.lora_B.shape[0], call.lora_A.device
    dtype = base_dtype(device.type, x_dtype, compute_dtype)
    return select.lora_linear(
        device.type, x_dtype, call.lora_A.dtype, call.lora_B.dtype, dtype, R, None, four_bit, N, K,
        call.dropout_p > 0, device.index,
    )  # fmt: skip
