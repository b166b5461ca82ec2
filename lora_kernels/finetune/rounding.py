"""What `merge` rounds a layer's sum to, and the inputs by which it can choose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..peft.kept import Tally, name_of
from ..peft.merge import written_parameters
from ..quantization import QuantizedWeight, quantize_4bit, round_weight
from ..quantization.rounding import gram_matrix
from . import model as models
from .chat import Collator, load_chat

TOKENS = 8192  # of the data at most that pass through the model for round="error"


class Rounder:
    """Merges layers one by one: PEFT computes the sum in float32, and the sum is rounded.

    Attributes:
        tally: what the result keeps of the updates.
        chosen: the new weights of the layers that `stored` names, in their formats.
    """

    def __init__(
        self,
        how: str,
        seed: int,
        dtype: torch.dtype,
        stored: Mapping[str, QuantizedWeight | torch.dtype],
        quant_type: str | None,
    ) -> None:
        """Keep the settings.

        Args:
            dtype: of layers that `stored` does not name.
            stored: the dtype, or the codes whose scales are kept, of layers by name.
            quant_type: of 4 bits, to tell what they would keep if the sum were quantized again.
        """
        self.how, self.dtype, self.stored, self.quant_type = how, dtype, stored, quant_type
        self.layers = 1
        self.generator = torch.Generator().manual_seed(seed)
        self.tally = Tally()
        self.chosen: dict[str, QuantizedWeight | Tensor] = {}

    def merge(self, name: str, layer: Any, x: Tensor | None = None) -> None:
        """Merge a layer; x: its inputs [T, K] for "error". Without them it is rounded to nearest.

        The layer's weight becomes the rounded sum, still in float32.
        """
        slot = next(iter(written_parameters(layer)), None)
        if slot is None:
            layer.merge(safe_merge=True)
            return
        module, parameter = slot
        before = module.get_parameter(parameter).detach().clone()
        layer.merge(safe_merge=True)
        weight = module.get_parameter(parameter)
        exact = weight.detach().clone()
        label = name if parameter == "weight" else f"{name}.{parameter}"
        stored = self.stored.get(name, self.dtype)
        target = name_of(stored) if isinstance(stored, torch.dtype) else stored.format
        if stored is not torch.float32:
            weight.data = self._round(name, stored, before, exact, _is_transposed(module), x)
        elif name in self.stored:
            self.chosen[name] = exact
        self.tally.add(target, label, before, exact, weight.detach())
        if self.quant_type is not None and exact.dim() == 2:
            again = quantize_4bit(exact, self.quant_type).dequantize(torch.float32)
            self.tally.add(f"{self.quant_type}, quantized again", label, before, exact, again)

    def _round(
        self,
        name: str,
        stored: QuantizedWeight | torch.dtype,
        before: Tensor,
        exact: Tensor,
        is_transposed: bool,
        x: Tensor | None,
    ) -> Tensor:
        how = "nearest" if self.how == "error" and x is None else self.how
        gram = None if x is None else gram_matrix(x)
        if isinstance(stored, torch.dtype) and how == "nearest":
            rounded: QuantizedWeight | Tensor = exact.to(stored)
        elif isinstance(stored, torch.dtype):
            shape = exact.shape
            if is_transposed:
                exact, before = exact.t(), before.t()
            exact, before = (t.reshape(-1, t.shape[-1]) for t in (exact, before))
            dense: Any = round_weight(exact, before, stored, how, gram, self.generator, self.layers)
            rounded = (dense.t() if is_transposed else dense).reshape(shape).contiguous()
        else:
            rounded = round_weight(
                exact, stored, stored.dtype, how, gram, self.generator, self.layers
            )
        if name in self.stored:
            self.chosen[name] = rounded
        if isinstance(rounded, QuantizedWeight):
            return rounded.dequantize(torch.float32)
        return rounded.float()

    def visit(
        self, model: Any, layers: Mapping[str, Any], batch: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Merge linear layers, each with the inputs that the layers before it give; return others.

        batch: input_ids and attention_mask, for one forward of the model.
        """
        linear = {name: layer for name, layer in layers.items() if is_linear(layer)}
        self.layers = len(linear)
        unreached = visit_inputs(model, linear, batch, self.merge)
        return {n: m for n, m in layers.items() if n not in linear or n in unreached}


def _is_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_linear(layer: Any) -> bool:
    """Return True for a LoRA layer whose output is a product of its weight and one input."""
    from peft.tuners.lora.layer import ParamWrapper

    base = layer.get_base_layer()
    return not isinstance(layer, ParamWrapper) and (type(base) is nn.Linear or _is_transposed(base))


def draw_batch(
    files: Iterable[Path], tokenizer: Any, config: Any, seed: int, tokens: int = TOKENS
) -> dict[str, Tensor]:
    """Return rows of the data in random order, as one batch of at most `tokens` with padding."""
    data = load_chat(files, tokenizer, max_length=models.check_length(None, config))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    rows, longest = [data[order[0]]], len(data[order[0]]["input_ids"])
    for i in order[1:]:
        longest = max(longest, len(data[i]["input_ids"]))
        if longest * (len(rows) + 1) > tokens:
            break
        rows.append(data[i])
    batch = Collator.from_tokenizer(tokenizer)(rows)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


class _Done(Exception):
    """The last layer was visited."""


@torch.no_grad()
def visit_inputs(
    model: Any, layers: Mapping[str, Any], batch: Mapping[str, Tensor], visit: Callable[..., None]
) -> dict[str, Any]:
    """Call `visit(name, layer, x)` before each layer's forward, in one forward of the model.

    x [T, K] are the layer's inputs without padding. A layer that `visit` changes passes the change
    on to the layers behind it, so that each is visited with the inputs that it will have.

    Returns the layers that no token reached.
    """
    left = dict(layers)
    mask = batch["attention_mask"].bool()
    handles = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            rows = x[mask] if x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])
            if name in left and len(rows):
                visit(name, left.pop(name), rows)
            if not left:
                raise _Done

        return before

    try:
        handles += [m.register_forward_pre_hook(hook(name)) for name, m in layers.items()]
        model.eval()(**batch, use_cache=False)
    except _Done:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return left
