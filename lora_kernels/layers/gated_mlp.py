"""LoRAGatedMLP: the gated MLP of three layers with adapters, as one block on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..backends.eager.gated_mlp import ACTIVATIONS
from ..backends.eager.linear import UPCAST_ROWS
from ..ops import context
from ..ops.arguments import base_dtype
from ..ops.gated_mlp import Hidden, gated_mlp
from ..ops.siblings import LinearArguments, can_run_block, is_eager, shared_linears
from ..quantization import Weight4bit
from .layer import LoRALayer
from .linear import LoRALinear
from .quantized import QLoRALinear


class LoRAGatedMLP(nn.Module):
    """y = down(act(gate(x)) ⊙ up(x)), of three layers with adapters.

    On a GPU it is one block, in PyTorch's GEMMs: gate and up read x together, and
    h = act(gate(x)) ⊙ up(x) is not kept for the backward, which makes it again. That holds for more
    than 64 rows of x and three layers that are `LoRALinear` or `QLoRALinear`, enabled, not merged,
    without active dropout and without hooks. Otherwise, and on a CPU, the layers are called one
    after the other.

    Args:
        gate, up: layers [..., K] -> [..., H].
        down: a layer [..., H] -> [..., N].
        activation: "silu", "gelu" or "gelu_tanh".

    x [..., K] -> y [..., N], in autocast's dtype under autocast, else in x's. Saving and loading
    adapters, merging and the rest are the three layers' own.

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
        linears = self._linears(x)
        if linears is None:
            h = ACTIVATIONS[self.activation](self.gate(x)) * self.up(x)
            y: Tensor = self.down(h)
            return y
        gate, up, down = linears
        g, u = shared_linears(x, (gate, up))
        hidden = Hidden(g, u, self.activation, is_private=True)
        compute_dtype = self.down.compute_dtype
        return gated_mlp(
            hidden, down.weight, down.lora_A, down.lora_B, down.scaling, down.bias, compute_dtype
        )

    def _linears(self, x: Tensor) -> list[LinearArguments] | None:
        """Return the operands of gate, up and down for the block; None if it does not run."""
        layers = self.gate, self.up, self.down
        if not isinstance(x, Tensor) or not can_run_block(x):
            return None
        if context.unsupported_context() is not None or _has_any_global_hook():
            return None
        K = self.gate.in_features
        if x.dim() == 0 or x.shape[-1] != K or x.numel() <= UPCAST_ROWS * K or x.is_inference():
            return None
        if self.gate.lora_A.dtype is not self.up.lora_A.dtype:
            return None
        linears = [_linear(layer, x) for layer in layers if _is_plain(layer, x)]
        found = [each for each in linears if each is not None]
        return found if len(found) == len(layers) else None

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def _is_plain(layer: LoRALayer, x: Tensor) -> bool:
    """Return True if calling the layer computes `lora_linear` on its parameters and no more."""
    parameters = [p for p in layer._parameters.values() if p is not None]
    hooks = (
        *(layer._forward_pre_hooks, layer._forward_hooks),
        *(layer._backward_pre_hooks, layer._backward_hooks),
    )
    return (
        type(layer) in (LoRALinear, QLoRALinear)
        and layer.enabled
        and not layer.merged
        and not (layer.training and layer.dropout)
        and not any(hooks)
        and "forward" not in vars(layer)
        and all(type(p) is nn.Parameter and p.device == x.device for p in parameters)
        and not layer.weight.requires_grad
    )


def _linear(layer: LoRALayer, x: Tensor) -> LinearArguments | None:
    """Return the layer's operands; None if its call is another backend's, or in other dtypes."""
    dtype = base_dtype(context.device_of(x)[0], x.dtype)
    weight = layer._base_weight()
    A, B = layer.lora_A, layer.lora_B
    if isinstance(weight, Weight4bit):
        if layer.compute_dtype not in (None, dtype):
            return None
    elif weight.dtype is not x.dtype:
        return None
    if (A.dtype is torch.float64) is not (x.dtype is torch.float64):
        return None
    rows = x.new_empty(()).expand(*x.shape[:-1], layer.in_features)
    if not is_eager(rows, weight, A, B):
        return None
    return LinearArguments(weight, A, B, layer.scaling, layer.bias)
