"""LoRAGatedMLP: the gated MLP of three layers with adapters, as one block on a GPU."""

from __future__ import annotations

from itertools import takewhile
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..backends.eager.gated_mlp import ACTIVATIONS
from ..core.record import Record, path_reason
from ..ops import blocks
from ..quantization import QuantizedWeight
from .layer import LoRALayer


class LoRAGatedMLP(nn.Module):
    """y = down(act(gate(x)) ⊙ up(x)), of three layers with adapters.

    On a GPU the MLP is one block of PyTorch's GEMMs. For more than 64 rows gate and up share one
    GEMM of x. h = act(gate(x)) ⊙ up(x) is not saved for the backward, which recomputes it. The
    block needs three layers that are enabled and not merged, without a column scale, active dropout
    or hooks. Otherwise, and on a CPU, the layers are called in turn.

    Args:
        gate, up: layers [..., K] -> [..., H].
        down: a layer [..., H] -> [..., N].
        activation: "silu", "gelu" or "gelu_tanh".

    x [..., K] -> y [..., N], in autocast's dtype under autocast, else in x's. Call the methods of
    the three layers to save, load and merge adapters.

    Raises:
        TypeError: a layer is not a `LoRALayer`.
        ValueError: the sizes of the layers do not fit, or there is no such activation.

    >>> import torch
    >>> from lora_kernels.layers import LoRAGatedMLP, LoRALinear
    >>> gate, up, down = (torch.nn.Linear(*sizes) for sizes in ((8, 24), (8, 24), (24, 8)))
    >>> mlp = LoRAGatedMLP(*(LoRALinear.from_linear(each, r=2) for each in (gate, up, down)))
    >>> x = torch.ones(3, 8)
    >>> torch.allclose(mlp(x), down(torch.nn.functional.silu(gate(x)) * up(x)), atol=1e-6)
    True
    """

    def __init__(
        self, gate: LoRALayer, up: LoRALayer, down: LoRALayer, activation: str = "silu"
    ) -> None:
        super().__init__()
        for name, layer in (("gate", gate), ("up", up), ("down", down)):
            if not isinstance(layer, LoRALayer):
                raise TypeError(f"{name}: got {type(layer).__name__}, want a LoRALayer")
        sizes = gate.in_features, gate.out_features
        if (up.in_features, up.out_features) != sizes:
            raise ValueError(
                f"up: got {up.in_features} -> {up.out_features} features, want gate's "
                f"{sizes[0]} -> {sizes[1]}"
            )
        if down.in_features != sizes[1]:
            raise ValueError(
                f"down: got {down.in_features} in-features, want gate's {sizes[1]} out-features"
            )
        if activation not in ACTIVATIONS:
            want = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activation: got {activation!r}, want one of {want}")
        self.gate, self.up, self.down, self.activation = gate, up, down, activation

    def forward(self, x: Tensor) -> Tensor:
        """Compute x [..., K] -> y [..., N]."""
        layers = self.gate, self.up, self.down
        if blocks.can_run(x) and not _has_any_global_hook():
            records = list(takewhile(lambda record: record is not None, map(_read, layers)))
            if len(records) == len(layers):
                dtypes = [layer.compute_dtype for layer in layers]
                block = blocks.make_block(
                    x, cast(list[Record], records), dtypes, activation=self.activation
                )
                if block is not None:
                    return blocks.gated_mlp(x, block)
        h = ACTIVATIONS[self.activation](self.gate(x)) * self.up(x)
        y: Tensor = self.down(h)
        return y

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def _read(layer: LoRALayer) -> Record | None:
    """Return the layer's record; None if its call may do more than a block computes."""
    hooks = (
        *(layer._forward_pre_hooks, layer._forward_hooks),
        *(layer._backward_pre_hooks, layer._backward_hooks),
    )
    cls = type(layer)
    if (
        cls.forward is not LoRALayer.forward
        or cls.forward_fused is not LoRALayer.forward_fused
        or not layer.enabled
        or layer.merged
        or layer.use_checkpoint
        or any(hooks)
        or "forward" in vars(layer)
    ):
        return None
    record = layer.record(layer.base_weight())
    if path_reason([record], blocks.BLOCK) is not None:
        return None
    weight = record.weight
    return record._replace(weight=weight.codes) if isinstance(weight, QuantizedWeight) else record
