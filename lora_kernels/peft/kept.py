"""The share of the adapter's update that survives the rounding of a merge.

With the base W, the adapter's update D, and the merged weight M as it is stored:

    share = (M - W)·D / ||D||²          rounding = ||M - (W + D)|| / ||D||

W lies on the target's grid, so an update below half a unit in W's last place is lost. For normal
updates with a standard deviation of s units the share is the sum over k of the density at k + 1/2:
0.99 for s = 0.5, and 0.18 for s = 0.2. For x in the row space of A, the merged layer lacks the
fraction 1 − share of the adapter's output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from .merge import is_params4bit, is_plain, merged_copies, written_parameters
from .report import format_table

MIN_SHARE = 0.9  # a smaller share gives a warning
_CHUNK = 1 << 22  # elements that are float64 at a time


class Kept(NamedTuple):
    """The share of the update that merges into layers of one kind keep.

    Attributes:
        target: the format of the merged weights, such as "bfloat16" or "nf4".
        kind: the layers' name in their module, such as "q_proj".
        layers: their number.
        share: the fraction of the update that is in the merged weights; 1 is all of it.
        rounding: the norm of the error of rounding, divided by the update's.
    """

    target: str
    kind: str
    layers: int
    share: float
    rounding: float


class Tally:
    """Sums over the layers of each kind and target."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], list[float]] = {}

    def add(self, target: str, name: str, base: Tensor, exact_sum: Tensor, merged: Tensor) -> None:
        """Add a layer's W, its unrounded W + D and its M, of one shape."""
        kind = name.rpartition(".")[2]
        sums = self._sums.setdefault((target, kind), [0.0] * 4)
        chunks = (t.detach().flatten().split(_CHUNK) for t in (base, exact_sum, merged))
        for parts in zip(*chunks, strict=True):
            w, want, got = (t.double() for t in parts)
            delta = want - w
            for i, product in enumerate(((got - w) * delta, delta * delta, (got - want) ** 2)):
                sums[i] += float(product.sum())
        sums[3] += 1

    def share(self) -> float:
        """Return the share of the update that is kept, over all layers; NaN without an update."""
        dot, square, _, _ = (sum(column) for column in zip(*self._sums.values(), strict=True))
        return dot / square if square else math.nan

    def rows(self) -> list[Kept]:
        """Return a row for each target and kind whose update is finite and not 0."""
        return [
            Kept(target, kind, int(layers), dot / square, (error / square) ** 0.5)
            for (target, kind), (dot, square, error, layers) in self._sums.items()
            if 0 < square < math.inf
        ]


def format_kept(rows: Sequence[Kept]) -> str:
    """Return the lines of a table, with a warning for the kinds below `MIN_SHARE`.

    >>> print(format_kept([Kept("bfloat16", "q_proj", 2, 0.87, 0.74)]))
    merged into bfloat16  layers  update kept  rounding / update
    q_proj                2       0.870        0.74
    warning: bfloat16 keeps less than 0.9 of the update of q_proj (0.870)
    """
    lines = []
    for target in dict.fromkeys(row.target for row in rows):
        target_rows = [row for row in rows if row.target == target]
        header = f"merged into {target}", "layers", "update kept", "rounding / update"
        cells = [
            (x.kind, str(x.layers), f"{x.share:.3f}", f"{x.rounding:.2g}") for x in target_rows
        ]
        lines.append(format_table(header, cells))
        if below := [f"{x.kind} ({x.share:.3f})" for x in target_rows if x.share < MIN_SHARE]:
            names = ", ".join(below)
            lines.append(f"warning: {target} keeps less than {MIN_SHARE} of the update of {names}")
    return "\n".join(lines)


def add_layer(tally: Tally, name: str, layer: Any) -> None:
    """Add a layer to the tally, merged by PEFT into its base's own format.

    The layer does not change. Formats other than dense and bitsandbytes' 4 bits are left out, and
    so are several adapters over 4 bits with a variant such as DoRA.
    """
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        name = layer.parameter_name
    else:
        weight = base._parameters.get("weight")
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        is_sum = len(names) == 1 or not layer.lora_variant
        if weight is None or not (is_plain(weight) or (is_params4bit(weight) and is_sum)):
            return
    weight_before = _decoded(layer)
    with merged_copies([layer], written_parameters(layer)):
        weight_after = _decoded(layer)
    tally.add(_format(layer), name, weight_before, _exact_sum(layer, weight_before), weight_after)


def _format(layer: Any) -> str:
    """Return the format of the layer's weight."""
    base = layer.get_base_layer()
    if not isinstance(layer, ParamWrapper):
        quant_type = getattr(base.weight, "quant_type", None)
        return quant_type or name_of(base.weight.dtype)
    if layer.parameter_name in base._parameters:
        return name_of(_decoded(layer).dtype)
    parametrization = base.parametrizations[layer.parameter_name][0]
    return str(parametrization.quant_state.quant_type)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _decoded(layer: Any) -> Any:
    """Return the layer's weight, decoded if it is in 4 bits."""
    if isinstance(layer, ParamWrapper):
        return layer.get_param().detach()  # type: ignore[no-untyped-call]
    base = layer.get_base_layer()
    if is_params4bit(base.weight):
        from .base4bit import quantized_weight  # imports bitsandbytes

        return quantized_weight(base).dequantize(torch.float32)
    return base.weight.detach()


def _exact_sum(layer: Any, base_weight: Tensor) -> Tensor:
    """Return W + D by PEFT's merge into a weight of more precision than W's."""
    dtype = torch.float64 if base_weight.dtype is torch.float32 else torch.float32
    base: Any = layer.get_base_layer()
    if isinstance(layer, ParamWrapper) and layer.parameter_name not in base._parameters:
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        get_delta: Any = layer.get_delta_weight
        deltas = [get_delta(name).detach() for name in names]
        return sum(deltas, base_weight.to(dtype))
    if isinstance(layer, ParamWrapper) or not is_params4bit(base.weight):
        with merged_copies([layer], written_parameters(layer), dtype=dtype):
            return cast(Tensor, _decoded(layer))
    N, K = base_weight.shape
    dense = nn.Linear(K, N, bias=base.bias is not None, device="meta")
    dense.weight, dense.bias = nn.Parameter(base_weight, requires_grad=False), base.bias
    layer.base_layer = dense
    try:
        with merged_copies(
            [layer], written_parameters(layer), dtype=dtype, merge=lora.Linear.merge
        ):
            return dense.weight.detach()
    finally:
        layer.base_layer = base
