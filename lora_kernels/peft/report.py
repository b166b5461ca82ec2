"""`explain`: the strategy of each LoRA layer's next call, and the reason for it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..backends.library import is_on_gpu_path
from ..layers import LoRALayer
from .explain_rows import (
    KERNELS,
    LIBRARY,
    ROWS,
    Row,
    row_of_group,
    row_of_layer,
    row_of_loss,
    row_of_peft,
    row_of_streamed,
    rows_of_mlps,
)
from .frozen import StreamedLinear
from .groups import groups_of
from .linear import Fused
from .loss import requested_losses
from .sharded import gathered_parameters
from .swap import lora_layers


def group_rows(rows: Iterable[Any], all: bool = False) -> Iterator[Any]:
    """Yield the rows of a table: named tuples with a field `layer`.

    Layers with equal rows share a row, whose name starts with the number of layers.

    all: whether layers whose names differ only in numbers get separate rows.
    """
    groups: dict[Any, list[str]] = {}
    for row in rows:
        name = row.layer if all else re.sub(r"(?<![^.])\d+(?![^.])", "*", row.layer)
        groups.setdefault(row._replace(layer=name), []).append(row.layer)
    for row, names in groups.items():
        layer = names[0] if len(names) == 1 else f"{len(names)} × {row.layer}"
        yield row._replace(layer=layer)


def format_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return the lines of a table with aligned columns."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


@dataclass(frozen=True, repr=False)
class Explanation:
    """The result of `explain`: `str()` prints a table, `json()` returns all fields.

    Attributes:
        rows: a `Row` for each LoRA layer.
        parameters: the number of adapter parameters of each layer, by name. If layers differ in
            state, the table ends in each state's share of the parameters.
        linears: a `Row` for each layer without an adapter that `fuse(model, linears=True)` took.
        losses: a `Row` for each causal language model that `fuse(model, loss=True)` was given.
        all: whether the table has a line for each layer. Otherwise layers whose names differ only
            in numbers share a line, "30 × model.layers.*.mlp.up_proj".
        blocks: a `Row` for each module on a GPU that may be a gated MLP, and one for each whose
            layers may share their x.
    """

    rows: list[Row]
    parameters: Mapping[str, int] = field(default_factory=dict)
    linears: list[Row] = field(default_factory=list)
    all: bool = False
    losses: list[Row] = field(default_factory=list)
    blocks: list[Row] = field(default_factory=list)

    def assert_fused(self, kernels: bool = False) -> None:
        """Raise RuntimeError with a list of the layers and losses that this package does not run.

        "adapter only" raises too, and so does a model without LoRA layers and losses.

        kernels: whether "our library GEMMs" raise too, so that only "our kernels" pass. An
            embedding has no kernels, so it raises.

        >>> ours = Row("a", "our library GEMMs", "eager", "reference", "float64")
        >>> Explanation([ours]).assert_fused()
        >>> Explanation([ours]).assert_fused(kernels=True)
        Traceback (most recent call last):
        RuntimeError: want our kernels in all, got 1 LoRA layer: 1 our library GEMMs
          a: our library GEMMs (eager): float64
        """
        accepted = (KERNELS,) if kernels else (KERNELS, LIBRARY)
        unfused = [row for row in [*self.rows, *self.losses] if row.state not in accepted]
        if unfused or not (self.rows or self.losses):
            lines = [
                f"  {row.layer}: {row.state} ({row.backend}): {row.reason}"
                for row in group_rows(unfused, self.all)
            ]
            want = "our kernels in all" if kernels else "all ours"
            raise RuntimeError("\n".join([f"want {want}, got {self.summary()}", *lines]))

    def json(self) -> str:
        """Return all fields as JSON.

        "layers" has the fields of each layer's row and its number of parameters, and "linears" the
        rows of layers without an adapter.

        >>> json.loads(Explanation([Row("a", "our kernels", "cpu", "fused", "why")]).json())
        {'layers': [{'layer': 'a', 'state': 'our kernels', 'backend': 'cpu', \
'strategy': 'fused', 'reason': 'why', 'parameters': None}]}
        """
        data: dict[str, Any] = {
            "layers": [
                {**row._asdict(), "parameters": self.parameters.get(row.layer)} for row in self.rows
            ]
        }
        if self.linears:
            data["linears"] = [row._asdict() for row in self.linears]
        if self.losses:
            data["losses"] = [row._asdict() for row in self.losses]
        if self.blocks:
            data["blocks"] = [row._asdict() for row in self.blocks]
        return json.dumps(data, indent=1, ensure_ascii=False)

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
            text += f"; our GEMV serves {served} of {len(self.linears)} linears without an adapter"
        for row in self.losses:
            text += f"; the loss is {row.state}"
        return text

    def __str__(self) -> str:
        rows = [*self.rows, *self.linears, *self.losses, *self.blocks]
        return "\n".join([format_table(Row._fields, group_rows(rows, self.all)), self.summary()])

    __repr__ = __str__


def explain(
    model: nn.Module,
    *,
    x_dtype: torch.dtype | None = None,
    rows: int | Sequence[int] | None = None,
    all: bool = False,
) -> Explanation:
    """Explain how the next call of each LoRA layer in `model` will be computed, and why.

    Covers PEFT's layers, fused or not, `lora_kernels.layers.LoRALayer` with its subclasses, and the
    layers without an adapter that `fuse(model, linears=True)` changed. The result holds for the
    current state: training mode, active adapters, hooks, autocast and the forced backend. On a GPU
    the reason contains the verdict of `lora_kernels.qualify`.

    Args:
        x_dtype: the dtype of the layers' input. None: the dtype of each base weight.
        rows: numbers of rows of each layer's input, batch size × length, or one. None: 1, 16 and
            2048 rows.
        all: whether the printed table has a line for each layer. Otherwise layers whose names
            differ only in numbers share a line.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `rows` is no whole number of at least 1, and no sequence of them.
        RuntimeError: a forced backend or strategy cannot run one of the row counts.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    >>> print(explain(model))
    layer               state   backend  strategy            reason
    base_model.model.0  PEFT's  peft     PEFT's own forward  not fused: call fuse()
    1 LoRA layer: 1 PEFT's
    """
    counts = _row_counts(rows)
    layer_rows: list[Row] = []

    def add(name: str, explain_layer: Callable[[], Row], table: list[Row] = layer_rows) -> None:
        with gathered_parameters(model, name) as sharded:
            row = explain_layer()
        if sharded:
            row = row._replace(
                reason=f"{row.reason}; {sharded} gathers its parameters for the call"
            )
        table.append(row)

    layers_of_peft = list(lora_layers(model))
    was_fused = any(isinstance(layer, Fused) for _, layer, _ in layers_of_peft)
    for name, layer, reason in layers_of_peft:
        if reason is None and not isinstance(layer, Fused):
            reason = "adapted, or made fusable, after fuse(): call fuse again"
            reason = reason if was_fused else "not fused: call fuse()"
        add(name, partial(row_of_peft, name, layer, reason, x_dtype, counts))
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            add(name, partial(row_of_layer, name, module, x_dtype, counts))
    sizes = {row.layer: _lora_size(model.get_submodule(row.layer)) for row in layer_rows}
    linears = [
        row_of_streamed(name, module, x_dtype, counts)
        for name, module in model.named_modules()
        if isinstance(module, StreamedLinear)
    ]
    losses = [row_of_loss(name, module, x_dtype) for name, module in requested_losses(model)]
    blocks = list(rows_of_mlps(model, x_dtype, counts))
    for name, group in groups_of(model):
        if any(is_on_gpu_path(p.device.type) for layer in group.layers for p in layer.parameters()):
            add(name, partial(row_of_group, name, group, x_dtype, counts), blocks)
    return Explanation(layer_rows, sizes, linears, all, losses, blocks)


def _row_counts(rows: Any) -> tuple[int, ...]:
    """Return the different row counts of `explain`'s argument."""
    if rows is None:
        return ROWS
    counts = rows if isinstance(rows, (list, tuple, range)) else [rows]
    if not counts or any(type(M) is not int or M < 1 for M in counts):
        raise ValueError(
            f"rows: got {rows!r}, want a whole number of at least 1, batch size × length, or a "
            "list of them"
        )
    return tuple(dict.fromkeys(counts))


def _lora_size(layer: nn.Module) -> int:
    """Return the number of parameters of the layer's adapters: names that start with "lora_"."""
    parameters = layer.named_parameters()
    return sum(
        getattr(p, "ds_numel", p.numel()) for name, p in parameters if name.startswith("lora_")
    )
