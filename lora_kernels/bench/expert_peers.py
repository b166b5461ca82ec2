"""The sequences of GEMMs in which others compute LoRA on the experts of a mixture, on meta tensors.

- "peft" writes W + s·B·A of all experts by one `baddbmm`, and goes through a dense gradient of W.
- "peft, unfolded" is PEFT before that (its PR 3577): it writes B·A, s·B·A and the sum.
- "unsloth" is its split LoRA: x·Wᵀ and s·(x·Aᵀ)·Bᵀ by `grouped_mm`, added in place, and
  differentiated by autograd. All else is transformers' forward.
- "axolotl" is its ScatterMoE LoRA: one kernel from x to y, and one from dY to dx, which read and
  write rows by their index, so that no sorted copy of x or y exists. P = x·Aᵀ never leaves the
  kernel: each tile of `TILE` out-features computes it again. The backward writes P and dY·B once,
  for dA and dB.

Unsloth's and axolotl's are written here from the published formulas, and every choice that these
leave open is taken in the peer's favour; no source of theirs is in them. All are over the dense
stack: over 4 bits PEFT's forward leaves the adapter out.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..layers import quantize_experts
from ..layers.experts import projections, stack
from .baselines import make_code_of_scales
from .experts import Shape, adapted, experts_module, fused

TILE = 128  # out-features of a tile of axolotl's kernels


class Routing(NamedTuple):
    """The permutation that sorts rows by expert: T tokens, M = T·k rows.

    Args:
        permutation: [M], the row of each sorted row.
        inverse: [M], the sorted row of each row.
        expert: [M], of each sorted row.
        offsets: int32 [E].
    """

    permutation: Tensor
    inverse: Tensor
    expert: Tensor
    offsets: Tensor


def route(index: Tensor, experts: int) -> Routing:
    """Sort the rows as transformers does. index: [T, k]."""
    expert, permutation = torch.sort(index.reshape(-1))
    rows = torch.histc(expert.int(), bins=experts, min=0, max=experts - 1)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.shape[0], device=permutation.device)
    return Routing(permutation, inverse, expert, torch.cumsum(rows, 0, dtype=torch.int32))


class Projection(NamedTuple):
    """A frozen weight [E, K, N] with its adapter A [E, R, K] and B [E, N, R]."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None


def projections_of(layer: nn.Module) -> list[Projection]:
    """Return the projections of PEFT's experts in the sequence of their calls."""
    from ..peft.experts import active_adapter, wrappers_of

    wrappers = wrappers_of(layer)
    base: Any = wrappers[-1].base_layer
    adapters = {wrapper.parameter_name: active_adapter(wrapper) for wrapper in wrappers}
    results = []
    for name in projections(base):
        weight, adapter = stack(base, name), adapters[name]
        assert isinstance(weight, Tensor) and adapter is not None
        weight = weight if base.is_transposed else weight.mT
        bias = getattr(base, f"{name}_bias") if base.has_bias else None
        results.append(Projection(weight, adapter.lora_A, adapter.lora_B, bias))
    return results


def unsloth(layer: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute PEFT's experts as Unsloth's split LoRA."""
    base: Any = layer.get_base_layer()  # type: ignore[operator]
    (T, k), routing = index.shape, route(index, base.num_experts)

    def project(x: Tensor, p: Projection) -> Tensor:
        y = functional.grouped_mm(x, p.weight, offs=routing.offsets)
        s = functional.grouped_mm(x, p.lora_A.mT, offs=routing.offsets) * 2.0
        y.add_(functional.grouped_mm(s, p.lora_B.mT.contiguous(), offs=routing.offsets))
        return y if p.bias is None else y.add_(p.bias[routing.expert])

    up, down = projections_of(layer)
    h = base._apply_gate(project(x[routing.permutation // k], up))
    rows = project(h, down) * weights.reshape(-1)[routing.permutation].unsqueeze(-1)
    y: Tensor = rows[routing.inverse].view(T, k, -1).sum(1)
    return y


# Custom ops, so that the counter sees one kernel. They have no implementation.
@torch.library.custom_op("lora_kernels_bench::scatter_lora", mutates_args=())
def scatter_lora(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, permutation: Tensor, flops: int
) -> Tensor:
    """Return x·W + s·(x·Aᵀ)·Bᵀ by each row's expert; x has M rows or T."""
    raise NotImplementedError


@scatter_lora.register_fake
def _(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, permutation: Tensor, flops: int
) -> Tensor:
    return x.new_empty(permutation.shape[0], weight.shape[2])


@torch.library.custom_op("lora_kernels_bench::scatter_down", mutates_args=())
def scatter_down(x: Tensor, down: Tensor, permutation: Tensor, flops: int) -> Tensor:
    """Return x·down [M, R] by each row's expert."""
    raise NotImplementedError


@scatter_down.register_fake
def _(x: Tensor, down: Tensor, permutation: Tensor, flops: int) -> Tensor:
    return x.new_empty(permutation.shape[0], down.shape[2])


@torch.library.custom_op("lora_kernels_bench::scatter_gram", mutates_args=())
def scatter_gram(a: Tensor, b: Tensor, like: Tensor, permutation: Tensor, flops: int) -> Tensor:
    """Return aᵀ·b of each expert's rows, of the shape of `like`."""
    raise NotImplementedError


@scatter_gram.register_fake
def _(a: Tensor, b: Tensor, like: Tensor, permutation: Tensor, flops: int) -> Tensor:
    return torch.empty_like(like)


class ScatterProjection(torch.autograd.Function):
    """A projection of axolotl's ScatterMoE LoRA."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, permutation: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, A, B, permutation)
        ctx.weight = weight
        flops = _fused_flops(permutation, weight, A)
        y: Tensor = scatter_lora(x, weight, A, B, permutation, flops)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, permutation = ctx.saved_tensors
        M, (_, R, K), N = permutation.shape[0], A.shape, B.shape[1]
        ds = scatter_down(dy, B, permutation, 2 * M * N * R)
        p = scatter_down(x, A.mT, permutation, 2 * M * K * R)
        dA = scatter_gram(ds, x, A, permutation, 2 * M * K * R)
        dB = scatter_gram(p, dy, B, permutation, 2 * M * N * R)
        weight = ctx.weight.mT
        flops = _fused_flops(permutation, weight, A)
        dx = scatter_lora(dy, weight, B.mT, A.mT, permutation, flops)
        if x.shape[0] < M:
            dx = dx.view(x.shape[0], -1, K).sum(1)
        return dx, None, dA, dB, None


def _fused_flops(permutation: Tensor, weight: Tensor, A: Tensor) -> int:
    (_, K, N), R = weight.shape, A.shape[1]
    return 2 * permutation.shape[0] * (K * N + R * N + R * K * -(-N // TILE))


def axolotl(layer: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute PEFT's experts as axolotl's ScatterMoE LoRA."""
    base: Any = layer.get_base_layer()  # type: ignore[operator]
    (T, k), routing = index.shape, route(index, base.num_experts)
    up, down = projections_of(layer)
    h = base._apply_gate(ScatterProjection.apply(x, *up[:3], routing.permutation))
    rows = ScatterProjection.apply(h, *down[:3], routing.permutation).view(T, k, -1)
    y: Tensor = torch.bmm(weights[:, None], rows)[:, 0]
    return y


class _Unfolded(nn.Module):
    """PEFT's parametrization before its PR 3577."""

    def __init__(self, left: Tensor, right: Tensor, scaling: float) -> None:
        super().__init__()
        self.left, self.right, self.scaling = left, right, scaling

    def forward(self, W: Tensor) -> Tensor:
        return W + torch.bmm(self.left, self.right) * self.scaling


# Name in the JSON -> the forward of PEFT's module, or None for the module's own.
CALLS: dict[str, Callable[..., Tensor] | None] = {
    "ours, NF4": None,
    "ours": None,
    "peft": None,
    "peft, unfolded": None,
    "unsloth": unsloth,
    "axolotl": axolotl,
}


def build(name: str, shape: Shape) -> nn.Module:
    """Build the experts module of a call of `CALLS`, on meta."""
    with torch.device("meta"):
        layer = adapted(experts_module(shape, torch.bfloat16)).bfloat16()
    if name == "ours, NF4":
        make_code_of_scales()
        quantize_experts(layer)
    return fused(layer) if name.startswith("ours") else layer


def forward_of(name: str, layer: nn.Module) -> Callable[..., Any]:
    """Return the forward (x, index, weights) -> y of a call of `CALLS`."""
    function = CALLS[name]

    def forward(*args: Tensor) -> Any:
        unfolded: Any = contextlib.nullcontext()
        if name == "peft, unfolded":
            unfolded = mock.patch("peft.tuners.lora.layer._LoraFactorsProxy", _Unfolded)
        # PEFT switches autocast off, which knows no meta device.
        null = mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        with null, unfolded:
            return layer(*args) if function is None else function(layer, *args)

    return forward


def unavailable_reason() -> str | None:
    """Return why no experts can be counted, or None."""
    if not hasattr(functional, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm to count"
    if find_spec("transformers") is None or not hasattr(qwen3_moe(), "Qwen3MoeExperts"):
        return "want transformers 5, whose experts are parameters"
    return None


def qwen3_moe() -> Any:
    """Import transformers' module of the model."""
    return importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
