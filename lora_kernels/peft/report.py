"""`explain`: the strategy of each LoRA layer's next call, its reason and its predicted time."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import timing
from ..layers import LoRALayer
from ..timing import Machine
from . import predict
from .explain_rows import (
    KERNELS,
    LIBRARY,
    PEFT,
    Layer,
    Row,
    other_parts,
    row_of_layer,
    row_of_loss,
    row_of_peft,
    row_of_streamed,
)
from .frozen import StreamedLinear
from .linear import Fused
from .loss import requested_losses
from .predict import Prediction
from .sharded import gathered_parameters
from .swap import lora_layers


class OtherLayers(NamedTuple):
    """The number, time and share of the linear layers without an adapter, as in `Prediction`."""

    layers: int
    seconds: float | None
    share: float | None


@dataclass(frozen=True, repr=False)
class Explanation:
    """The result of `explain`: `str()` prints a table, `json()` returns all fields.

    Attributes:
        rows: a `Row` for each LoRA layer.
        parameters: the number of adapter parameters of each layer, by name. If layers differ in
            state, the table ends in each state's share of the parameters.
        rows_of_x: the number of rows that `explain` was given, or None. Without it there are no
            predictions.
        step: whether the times include the backward.
        predictions: a `Prediction` for each layer, by name.
        others: the time of the linear layers without an adapter.
        limits: the bandwidth and peaks of the CPU that the predictions use.
        linears: a `Row` for each layer without an adapter that `fuse(model, linears=True)` took.
        losses: a `Row` for each causal language model that `fuse(model, loss=True)` was given.
        all: whether the table has a line for each layer. Otherwise layers whose names differ only
            in numbers share a line, "30 × model.layers.*.mlp.up_proj", with the sums of their times
            and shares.
    """

    rows: list[Row]
    parameters: Mapping[str, int] = field(default_factory=dict)
    rows_of_x: int | None = None
    step: bool = False
    predictions: Mapping[str, Prediction] = field(default_factory=dict)
    others: OtherLayers | None = None
    limits: str = ""
    linears: list[Row] = field(default_factory=list)
    all: bool = False
    losses: list[Row] = field(default_factory=list)

    def assert_fused(self, kernels: bool = False) -> None:
        """Raise RuntimeError with a list of the layers and losses that are not ours.

        "adapter only" is not enough, and neither is a model without any of them.

        kernels: whether our order of PyTorch's GEMMs ("ours, library GEMMs") is not enough either,
            and our kernels are wanted. An embedding has none, so it raises.

        >>> ours = Row("a", "ours, library GEMMs", "eager", "reference", "float64")
        >>> Explanation([ours]).assert_fused()
        >>> Explanation([ours]).assert_fused(kernels=True)
        Traceback (most recent call last):
        RuntimeError: want our kernels in all, got 1 LoRA layer: 1 ours, library GEMMs
          a: ours, library GEMMs (eager): float64
        """
        wanted = (KERNELS,) if kernels else (KERNELS, LIBRARY)
        rest = [row for row in [*self.rows, *self.losses] if row.state not in wanted]
        if rest or not (self.rows or self.losses):
            lines = [
                f"  {row.layer}: {row.state} ({row.backend}): {row.reason}"
                for row, _ in self._groups(rest)
            ]
            want = "our kernels in all" if kernels else "all ours"
            raise RuntimeError("\n".join([f"want {want}, got {self.summary()}", *lines]))

    def json(self) -> str:
        """Return all fields as JSON.

        "layers" has the fields of each layer's row and its number of parameters, and "linears" the
        rows of layers without an adapter. With a number of rows, each layer has the fields of its
        prediction too, and "rows", "step", "seconds", "others" and "limits" are added.

        >>> json.loads(Explanation([Row("a", "ours, kernels", "cpu", "fused", "why")]).json())
        {'layers': [{'layer': 'a', 'state': 'ours, kernels', 'backend': 'cpu', \
'strategy': 'fused', 'reason': 'why', 'parameters': None}]}
        """
        layers: list[dict[str, Any]] = []
        for row in self.rows:
            facts = {**row._asdict(), "parameters": self.parameters.get(row.layer)}
            prediction = self.predictions.get(row.layer)
            layers.append(facts if prediction is None else facts | prediction.facts())
        data: dict[str, Any] = {"layers": layers}
        if self.linears:
            data["linears"] = [row._asdict() for row in self.linears]
        if self.losses:
            data["losses"] = [row._asdict() for row in self.losses]
        if self.rows_of_x is not None:
            others = self.others and self.others._asdict()
            data |= {"rows": self.rows_of_x, "step": self.step, "seconds": self._seconds()}
            data |= {"others": others, "limits": self.limits}
        return json.dumps(data, indent=1, ensure_ascii=False)

    def _groups(self, rows: Sequence[Row]) -> Iterator[tuple[Row, list[Prediction]]]:
        """Yield the rows of the table, each with the predictions of the layers that it covers.

        Layers that are alike share a row, whose name starts with their number.
        """
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
        """Return the sum of all predicted times."""
        known = [prediction.seconds for prediction in self.predictions.values()]
        return sum(seconds or 0.0 for seconds in [*known, self.others and self.others.seconds])

    def summary(self) -> str:
        """Return the number of layers in each state, in one line."""
        states, sizes = Counter(row.state for row in self.rows), Counter[str]()
        for row in self.rows:
            sizes[row.state] += self.parameters.get(row.layer, 0)
        counts = [f"{n} {state}" for state, n in states.most_common()]
        if len(counts) > 1 and (total := sizes.total()):
            shares = [sizes[state] / total for state, _ in states.most_common()]
            counts = [f"{n} ({share:.1%})" for n, share in zip(counts, shares, strict=True)]
            counts[-1] += " of the LoRA parameters"
        layers = "1 LoRA layer" if len(self.rows) == 1 else f"{len(self.rows)} LoRA layers"
        text = f"{layers}: {'; '.join(counts) or 'nothing to fuse'}"
        if self.linears:
            served = sum(row.state == KERNELS for row in self.linears)
            text += f"; without an adapter {served} of {len(self.linears)} by our GEMV"
        return text

    def _prediction(self) -> Iterator[str]:
        """Yield the lines on predicted times below the table."""
        directions = "forward and backward" if self.step else "forward"
        unknown = sum(prediction.seconds is None for prediction in self.predictions.values())
        rows = "1 row" if self.rows_of_x == 1 else f"{self.rows_of_x} rows"
        text = f"{rows}, {directions} of all linear layers: {_duration(self._seconds())}"
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
        for row, predictions in self._groups([*self.rows, *self.linears, *self.losses]):
            cells = () if self.rows_of_x is None else _time_and_share(predictions)
            table.append((*row[:4], *cells, row.reason))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        if self.rows_of_x is not None:
            lines += self._prediction()
        return "\n".join([*lines, self.summary()])

    __repr__ = __str__


def _time_and_share(predictions: Sequence[Prediction]) -> tuple[str, str]:
    """Return the layers' total time and share as text; dashes if they are not predicted."""
    seconds = [found.seconds for found in predictions if found.seconds is not None]
    if not seconds:
        return "–", "–"
    share = sum(found.share or 0.0 for found in predictions)
    source = "measured" if predictions[0].measured else "predicted"
    return f"{_duration(sum(seconds))} {source}", f"{share:.1%}"


def _duration(seconds: float) -> str:
    """Format seconds with three significant digits.

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
    """Explain how the next call of each LoRA layer in `model` will be computed, and why.

    Covers PEFT's layers, with `fuse` or without, `lora_kernels.layers.LoRALayer` with its
    subclasses, and the layers without an adapter that `fuse(model, linears=True)` took. The result
    holds for the current state: training mode, active adapters, hooks, autocast and the forced
    backend. On a GPU a fused layer's reason has the bytes that it and PEFT's layer move, for `rows`
    or 512 rows.

    Args:
        x_dtype: the dtype of the layers' input. None: the dtype of each base weight.
        rows: the number of rows of each layer's input, batch size × length. It selects the
            strategies, and adds a `Prediction` for each layer. Its time is of a step, or of the
            forward if the model is in eval mode or nothing trains. x is assumed to need a gradient.
            Times are from a cost model; rows that `lora-kernels tune` measured take precedence and
            are marked.
        machine: the CPU's bandwidth and peaks, for the cost model. None measures them once a
            process, in some seconds.
        all: whether the printed table has a line for each layer. Otherwise layers whose names
            differ only in numbers share a line.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `rows` is not a whole number of at least 1.
        RuntimeError: a forced backend cannot run.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    >>> print(explain(model))
    layer               state   backend  strategy            reason
    base_model.model.0  PEFT's  peft     PEFT's own forward  fuse() was not called
    1 LoRA layer: 1 PEFT's
    """
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
        raise ValueError(
            f"rows: got {rows!r}, want a whole number of at least 1, batch size × length"
        )
    found: list[Layer] = []

    def add(name: str, explain_layer: Callable[[], Layer]) -> None:
        with gathered_parameters(model, name) as sharded:
            row, parts = explain_layer()
        if sharded:
            row = row._replace(reason=f"{row.reason}; FSDP2 gathers its parameters for the call")
        found.append((row, parts))

    layers_of_peft = list(lora_layers(model))
    was_fused = any(isinstance(layer, Fused) for _, layer, _ in layers_of_peft)
    for name, layer, reason in layers_of_peft:
        if reason is None and not isinstance(layer, Fused):
            reason = "adapted, or made fusable, after fuse(): call fuse again"
            reason = reason if was_fused else "fuse() was not called"
        add(name, partial(row_of_peft, name, layer, reason, x_dtype, rows))
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            add(name, partial(row_of_layer, name, module, x_dtype, rows))
    named = [row for row, _ in found]
    layers = {row.layer: model.get_submodule(row.layer) for row in named}
    sizes = {name: _lora_size(layer) for name, layer in layers.items()}
    linears = [
        row_of_streamed(name, module, x_dtype, rows)
        for name, module in model.named_modules()
        if isinstance(module, StreamedLinear)
    ]
    losses = [row_of_loss(name, module, x_dtype) for name, module in requested_losses(model)]
    if rows is None:
        return Explanation(named, sizes, linears=linears, all=all, losses=losses)

    step = model.training and any(p.requires_grad for p in model.parameters())
    others = list(other_parts(model, list(layers.values()), x_dtype))
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
        if row.state == PEFT:
            ways = (predict.Region(1, row.backend, row.strategy),)
        taken_by = times[row.layer]
        predictions[row.layer] = (
            Prediction(None, None, False, None, ways)
            if taken_by is None
            else Prediction(*taken_by, taken_by.seconds / total, ways)
        )
    limits = "" if machine is None else machine.describe()
    taken = None if rest is None else rest.seconds
    summed = OtherLayers(len(others), taken, None if taken is None else taken / total)
    found_times = predictions, summed, limits
    return Explanation(named, sizes, rows, step, *found_times, linears, all, losses)


def _lora_size(layer: nn.Module) -> int:
    """Return the number of parameters of the layer's adapters: names that start with "lora_"."""
    parameters = layer.named_parameters()
    return sum(p.numel() for name, p in parameters if name.startswith("lora_"))
