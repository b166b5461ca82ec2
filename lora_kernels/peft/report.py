"""`explain`: for each LoRA layer, what its next call will do and why, and what it should take."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .. import ops, selection, timing
from ..backends import cpu, cpu_heuristics
from ..backends.decode4bit import decoded_by
from ..backends.library import follows_gpu
from ..core.problem import Layout, Problem
from ..cpu_costs import Machine
from ..functional import base_dtype
from ..layers import DoRALinear, LoRAEmbedding, LoRALayer
from ..quantization import Weight4bit
from . import adalora, embedding, linear, predict
from .frozen import StreamedLinear
from .linear import Call, Fused, dora, is_conv1d, is_linear4bit, unreadable
from .predict import Part, Prediction
from .swap import lora_layers


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


class Others(NamedTuple):
    """The linear layers that have no adapter, together; `seconds` and `share` as a Prediction's."""

    layers: int
    seconds: float | None
    share: float | None


@dataclass(frozen=True, repr=False)
class Explanation:
    """A `Row` for each LoRA layer; `str()` is a table of them, `json()` all there is.

    all: whether the table has a line for each layer. Else rows that differ only in the numbers of
    their names share a line, "30 × model.layers.*.mlp.up_proj", with the sums of times and shares.
    linears: a `Row` for each linear layer without an adapter that `fuse(model, linears=True)` has
    taken.
    parameters: of the adapters of each layer, by name, in elements. Where layers differ in state,
    the table ends in each state's share of them.
    rows_of_x, step, predictions, others: where `explain` was given a number of rows, that number,
    whether the times are of a forward and backward, a `Prediction` for each layer by name, and what
    the linear layers without an adapter take. `limits` names the figures of the CPU behind them.
    """

    rows: list[Row]
    parameters: Mapping[str, int] = field(default_factory=dict)
    rows_of_x: int | None = None
    step: bool = False
    predictions: Mapping[str, Prediction] = field(default_factory=dict)
    others: Others | None = None
    limits: str = ""
    linears: list[Row] = field(default_factory=list)
    all: bool = False

    def assert_fused(self) -> None:
        """Raises RuntimeError that lists the layers not "fused", also where there is no layer."""
        rest = [row for row in self.rows if row.state != "fused"]
        if rest or not self.rows:
            lines = [
                f"  {row.layer}: {row.state} ({row.backend}): {row.reason}"
                for row, _ in self._groups(rest)
            ]
            raise RuntimeError("\n".join([f"want all fused, got {self._summary()}", *lines]))

    def json(self) -> str:
        """Everything as JSON: "layers", each with its row's fields and `parameters`; with a number
        of rows also its prediction's, "rows", "step", "others", "limits" and "seconds" of all;
        "linears" where there are some.

        >>> json.loads(Explanation([Row("a", "fused", "cpu", "fused", "why")]).json())
        {'layers': [{'layer': 'a', 'state': 'fused', 'backend': 'cpu', 'strategy': 'fused', \
'reason': 'why', 'parameters': None}]}
        """
        layers: list[dict[str, Any]] = []
        for row in self.rows:
            facts = {**row._asdict(), "parameters": self.parameters.get(row.layer)}
            prediction = self.predictions.get(row.layer)
            layers.append(facts if prediction is None else facts | prediction.facts())
        data: dict[str, Any] = {"layers": layers}
        if self.linears:
            data["linears"] = [row._asdict() for row in self.linears]
        if self.rows_of_x is not None:
            others = self.others and self.others._asdict()
            data |= {"rows": self.rows_of_x, "step": self.step, "seconds": self._seconds()}
            data |= {"others": others, "limits": self.limits}
        return json.dumps(data, indent=1, ensure_ascii=False)

    def _groups(self, rows: Sequence[Row]) -> Iterator[tuple[Row, list[Prediction]]]:
        """Rows of the table: layers that are alike as one, which names their number, with the
        predictions of each."""
        groups: dict[tuple[Row, str | None], list[str]] = {}
        for row in rows:
            found = self.predictions.get(row.layer)
            if found is not None and self.rows_of_x is not None:
                changes = found.changes(self.rows_of_x)
                row = row._replace(reason="; ".join(filter(None, [row.reason, changes])))
            name = row.layer if self.all else re.sub(r"(?<![^.])\d+(?![^.])", "*", row.layer)
            key = row._replace(layer=name), None if found is None else found.source
            groups.setdefault(key, []).append(row.layer)
        for (row, _), names in groups.items():
            layer = names[0] if len(names) == 1 else f"{len(names)} × {row.layer}"
            predictions = [self.predictions[name] for name in names if name in self.predictions]
            yield row._replace(layer=layer), predictions

    def _seconds(self) -> float:
        """Of all that is predicted."""
        known = [prediction.seconds for prediction in self.predictions.values()]
        return sum(seconds or 0.0 for seconds in [*known, self.others and self.others.seconds])

    def _summary(self) -> str:
        states, sizes = Counter(row.state for row in self.rows), Counter[str]()
        for row in self.rows:
            sizes[row.state] += self.parameters.get(row.layer, 0)
        counts = [f"{n} {state}" for state, n in states.most_common()]
        if len(counts) > 1 and (total := sizes.total()):
            shares = [sizes[state] / total for state, _ in states.most_common()]
            counts = [f"{n} ({share:.1%})" for n, share in zip(counts, shares, strict=True)]
            counts[-1] += " of the LoRA parameters"
        text = f"{len(self.rows)} LoRA layers: {', '.join(counts) or 'nothing to fuse'}"
        if self.linears:
            streamed = sum(row.state == "streamed" for row in self.linears)
            text += f"; without an adapter {streamed} of {len(self.linears)} streamed"
        return text

    def _prediction(self) -> Iterator[str]:
        """The lines below the table of a call with a number of rows."""
        what = "forward and backward" if self.step else "forward"
        unknown = sum(prediction.seconds is None for prediction in self.predictions.values())
        rows = "1 row" if self.rows_of_x == 1 else f"{self.rows_of_x} rows"
        text = f"{rows}, {what} of all linear layers: {_duration(self._seconds())}"
        if self.others and self.others.layers:
            text += f", {self.others.share or 0:.1%} in {self.others.layers} without an adapter"
        yield text + (f"; {unknown} layers are not predicted" if unknown else "")
        yield "attention, norms and the loss are not in these times"
        if self.limits:
            yield self.limits

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [Row._fields]
        if self.rows_of_x is not None:
            table = [("layer", "state", "backend", "strategy", "time", "share", "reason")]
        for row, predictions in self._groups([*self.rows, *self.linears]):
            cells = () if self.rows_of_x is None else _time_and_share(predictions)
            table.append((*row[:4], *cells, row.reason))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        if self.rows_of_x is not None:
            lines += self._prediction()
        return "\n".join([*lines, self._summary()])

    __repr__ = __str__


def _time_and_share(predictions: Sequence[Prediction]) -> tuple[str, str]:
    """Of the layers of a line together, as text; dashes where they are not predicted."""
    seconds = [found.seconds for found in predictions if found.seconds is not None]
    if not seconds:
        return "–", "–"
    share = sum(found.share or 0.0 for found in predictions)
    by = "measured" if predictions[0].measured else "predicted"
    return f"{_duration(sum(seconds))} {by}", f"{share:.1%}"


def _duration(seconds: float) -> str:
    """
    >>> _duration(0.0123), _duration(3.4), _duration(5e-5)
    ('12.3 ms', '3.4 s', '0.05 ms')
    """
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def explain(
    model: nn.Module,
    *,
    x_dtype: torch.dtype | None = None,
    rows: int | None = None,
    machine: Machine | None = None,
    all: bool = False,
) -> Explanation:
    """For each LoRA layer of `model`, fused or not, what its next call will do and why.

    Covers PEFT's layers, `lora_kernels.layers.LoRALayer` with its subclasses, and the layers
    without an adapter that `fuse(model, linears=True)` has taken. The answer is for the state at
    hand: training or not, active adapters, hooks, and the autocast and backend in force.

    Args:
        x_dtype: of the layers' input; None stands for each base weight's dtype.
        rows: of each layer's input, batch size × length. The strategies are then those for so many,
            and each layer has a `Prediction`: seconds of a step (of the forward, where the model is
            in eval mode or nothing trains), its share of what all linear layers take, and from how
            many rows on it would be computed in another way. x is taken to need a gradient. A time
            is a model's, in which a measured row of `lora-kernels tune` goes first and is marked.
        machine: the CPU's bandwidth and peaks to predict with. None measures them once a process,
            in some seconds.
        all: whether the printed table has a line for each layer, instead of one line for layers
            that differ only in the numbers of their names.

    Raises TypeError for anything but a module, ValueError for rows that are no whole number of at
    least 1, RuntimeError if a backend is forced that cannot run.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    >>> print(explain(model))
    layer               state      backend  strategy            reason
    base_model.model.0  not fused  peft     PEFT's own forward  fuse() was not called
    1 LoRA layers: 1 not fused
    """
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
        raise ValueError(
            f"rows: got {rows!r}, want a whole number of at least 1, batch size × length"
        )
    found: list[Layer] = []

    def add(name: str, look: Callable[[], Layer]) -> None:
        with as_in_forward(model, name) as sharded:
            row, parts = look()
        if sharded:
            row = row._replace(reason=f"{row.reason}; FSDP2 gathers its parameters for the call")
        found.append((row, parts))

    layers_of_peft = list(lora_layers(model))
    was_fused = any(isinstance(layer, Fused) for _, layer, _ in layers_of_peft)
    for name, layer, reason in layers_of_peft:
        if reason is None and not isinstance(layer, Fused):
            reason = "adapted, or made fusable, after fuse(): call fuse again"
            reason = reason if was_fused else "fuse() was not called"
        add(name, partial(_peft_layer, name, layer, reason, x_dtype, rows))
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            add(name, partial(_dense_layer, name, module, x_dtype, rows))
    named = [row for row, _ in found]
    layers = {row.layer: model.get_submodule(row.layer) for row in named}
    sizes = {name: _lora_size(layer) for name, layer in layers.items()}
    linears = [
        _streamed_layer(name, module, x_dtype, rows)
        for name, module in model.named_modules()
        if isinstance(module, StreamedLinear)
    ]
    if rows is None:
        return Explanation(named, sizes, linears=linears, all=all)

    step = model.training and any(p.requires_grad for p in model.parameters())
    others = list(_others(model, list(layers.values()), x_dtype))
    parts = [part for _, own in found for part in own] + others
    if machine is None and any(part.device.type == "cpu" for part in parts):
        machine = timing.cpu_machine(frozenset(part.dtype for part in parts))
    time = cache(lambda part: predict.time(part, rows, machine, step))
    regions = cache(predict.regions)
    times = {row.layer: predict.total(map(time, own)) for row, own in found}
    rest = predict.total(map(time, others))
    total = sum(t.seconds for t in (*times.values(), rest) if t is not None)
    predictions = {}
    for row, own in found:
        ways = regions(own[0]) if own else (predict.Region(1, row.backend, row.strategy),)
        if row.state == "not fused" and row.backend == "peft":
            ways = (predict.Region(1, row.backend, row.strategy),)
        taken_by = times[row.layer]
        predictions[row.layer] = (
            Prediction(None, None, False, None, ways)
            if taken_by is None
            else Prediction(*taken_by, taken_by.seconds / total, ways)
        )
    limits = "" if machine is None else machine.describe()
    taken = None if rest is None else rest.seconds
    of_others = Others(len(others), taken, None if taken is None else taken / total)
    return Explanation(named, sizes, rows, step, predictions, of_others, limits, linears, all)


def _others(
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


Layer = tuple[Row, list[Part]]  # and the calls that it makes, none where they are not known


def _peft_layer(
    name: str,
    layer: LoraLayer,
    reason: str | None,
    x_dtype: torch.dtype | None,
    rows: int | None,
) -> Layer:
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
    if isinstance(layer, embedding.FusedEmbedding):
        reason = embedding.peft_reason(layer, embedding.adapters_of(layer), base.weight.device)
        if reason is None:
            return _embedding_row(name), []
        return _not_fused(name, reason, layer, x_dtype)
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
        return _not_fused(name, reason, layer, x_dtype)

    todo = kind.calls(adapters, near.device.type, rows) if layer.mixed_batch is None else []
    four_bit = is_linear4bit(base)
    compute_dtype = base.compute_dtype if four_bit and base.compute_type_is_set else None
    base_reason = unreadable(base, near.device)
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
    if dora(layer, adapters[0].name):
        parts[0] = parts[0]._replace(norm=layer.training)
        reasons.append("DoRA: the row norm without a second weight")
        if todo[0].dropout_p:
            state, strategy = "composed", f"{strategy}; the base product twice"
            parts.append(parts[0]._replace(R=0, norm=False, ours=False))
            reasons.append("PEFT's DoRA drops x for the base product too")
    if "eager" in backend:
        state = "not fused"
        if four_bit and follows_gpu(near.device.type):
            reasons.append(decoded_by(near.device))
    if base_reason is not None:
        state, strategy, parts = "adapter only", "base layer as a module, adapter added", []
        reasons.insert(0, f"base layer: {base_reason}")
    return Row(name, state, backend, strategy, "; ".join(reasons)), parts


def _dense_layer(
    name: str, layer: LoRALayer, x_dtype: torch.dtype | None, rows: int | None
) -> Layer:
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


def _streamed_layer(
    name: str, layer: StreamedLinear, x_dtype: torch.dtype | None, rows: int | None
) -> Row:
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


def _embedding_row(name: str) -> Row:
    reason = "an embedding: its base is a lookup, no product to fuse the adapter's with"
    return Row(name, "not fused", "torch", "lookups, then one product in place", reason)


def _base_weight(base: nn.Module) -> Tensor | Weight4bit:
    if is_linear4bit(base):
        from .base4bit import weight4bit  # which imports bitsandbytes

        return weight4bit(base)
    return linear.base_weight(base)


def _mixed_part(
    adapters: Sequence[linear.Adapter],
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
