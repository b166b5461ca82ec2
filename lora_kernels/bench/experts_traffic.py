"""`lora-kernels bench --count`: memory traffic and FLOPs of LoRA on the experts of a mixture.

Counted on meta tensors by `counter`, as `traffic` counts layers: a step of one experts module of a
well-known model, rank 16 on both projections, everything in bfloat16. Ours is what `fuse` makes of
PEFT's module, over a dense and over a 4-bit stack (NF4, nested scales). The peers are over the
dense stack: over 4 bits PEFT's forward leaves the adapter out.

- "peft" writes W + s·B·A of all experts by one `baddbmm`, and goes through a dense gradient of W.
- "peft, unfolded" is PEFT before that (its PR 3577): it writes B·A, s·B·A and the sum.
- "unsloth" is the order of its split LoRA: x·Wᵀ and s·(x·Aᵀ)·Bᵀ by `grouped_mm`, added in place,
  and differentiated by autograd. All else is transformers' forward.
- "axolotl" is that of its ScatterMoE LoRA: one kernel from x to y, and one from dY to dx, which
  read and write rows by their index, so that no sorted copy of x or y exists. P = x·Aᵀ never
  leaves the kernel: each tile of `TILE` out-features computes it again. The backward writes P and
  dY·B once, for dA and dB.

Both orders are written here from the published formulas, and every choice that these leave open is
taken in the peer's favour; no source of theirs is in them.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..layers import quantize_experts
from ..layers.experts import projections, stack
from .baselines import make_code_of_scales
from .counter import Kernel, Traffic, count_layer
from .experts import RANK, Shape, adapted, experts_module, fused
from .results import Row
from .traffic import count_rows

SHAPES = (
    Shape("mixtral", 8, 2, 4096, 14336),  # 8x7B
    Shape("qwen3_moe", 128, 8, 2048, 768),  # 30B-A3B
    Shape("gpt_oss", 32, 4, 2880, 2880),  # 20b
    Shape("olmoe", 64, 8, 2048, 1024),  # 1B-7B
    Shape("deepseek_v3", 256, 8, 7168, 2048),
    Shape("qwen3_moe", 8, 8, 2048, 768),  # few experts, every row to all, and to two
    Shape("qwen3_moe", 8, 2, 2048, 768),
    Shape("qwen3_moe", 32, 8, 2048, 768),
)
TOKENS = (512, 8192)
CHECKPOINTED = ", checkpointed"
KINDS = ("ours, NF4", "ours", "peft", "peft, unfolded", "unsloth", "axolotl")
MOST_BYTES = 1.01
TILE = 128  # out-features of a tile of axolotl's kernels


def title(shape: Shape, is_checkpointed: bool = False) -> str:
    """Return the name of a row.

    >>> title(SHAPES[1])
    'qwen3_moe, 128 experts 2048→768, top 8'
    """
    sizes = f"{shape.hidden}→{shape.intermediate}"
    name = f"{shape.model}, {shape.experts} experts {sizes}, top {shape.top_k}"
    return name + CHECKPOINTED * is_checkpointed


# ---- The peers' orders ----


class Routing(NamedTuple):
    """Where the rows of the tokens' experts are: T tokens, M = T·k rows.

    Args:
        order: [M], the row of each sorted row.
        place: [M], the sorted row of each row.
        expert: [M], of each sorted row.
        offsets: int32 [E].
    """

    order: Tensor
    place: Tensor
    expert: Tensor
    offsets: Tensor


def route(index: Tensor, experts: int) -> Routing:
    """Sort the rows as transformers does. index: [T, k]."""
    expert, order = torch.sort(index.reshape(-1))
    rows = torch.histc(expert.int(), bins=experts, min=0, max=experts - 1)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    return Routing(order, place, expert, torch.cumsum(rows, 0, dtype=torch.int32))


class Projection(NamedTuple):
    """A frozen weight [E, K, N] with its adapter A [E, R, K] and B [E, N, R]."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None


def projections_of(layer: nn.Module) -> list[Projection]:
    """Return the projections of PEFT's experts in the order of their calls."""
    from ..peft.experts import active_adapter, wrappers_of

    wrappers = wrappers_of(layer)
    base: Any = wrappers[-1].base_layer
    adapters = {wrapper.parameter_name: active_adapter(wrapper) for wrapper in wrappers}
    found = []
    for name in projections(base):
        weight, adapter = stack(base, name), adapters[name]
        assert isinstance(weight, Tensor) and adapter is not None
        weight = weight if base.is_transposed else weight.mT
        bias = getattr(base, f"{name}_bias") if base.has_bias else None
        found.append(Projection(weight, adapter.lora_A, adapter.lora_B, bias))
    return found


def unsloth(layer: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute PEFT's experts in the order of Unsloth's split LoRA."""
    base: Any = layer.get_base_layer()  # type: ignore[operator]
    (T, k), routing = index.shape, route(index, base.num_experts)

    def project(x: Tensor, p: Projection) -> Tensor:
        y = functional.grouped_mm(x, p.weight, offs=routing.offsets)
        s = functional.grouped_mm(x, p.lora_A.mT, offs=routing.offsets) * 2.0
        y.add_(functional.grouped_mm(s, p.lora_B.mT.contiguous(), offs=routing.offsets))
        return y if p.bias is None else y.add_(p.bias[routing.expert])

    up, down = projections_of(layer)
    h = base._apply_gate(project(x[routing.order // k], up))
    rows = project(h, down) * weights.reshape(-1)[routing.order].unsqueeze(-1)
    y: Tensor = rows[routing.place].view(T, k, -1).sum(1)
    return y


# Ops of their own, so that the counter sees one kernel. They have no implementation.
@torch.library.custom_op("lora_kernels_bench::scatter_lora", mutates_args=())
def scatter_lora(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, place: Tensor, flops: int
) -> Tensor:
    """Return x·W + s·(x·Aᵀ)·Bᵀ by each row's expert; x has M rows or T."""
    raise NotImplementedError


@scatter_lora.register_fake
def _(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, place: Tensor, flops: int
) -> Tensor:
    return x.new_empty(place.shape[0], weight.shape[2])


@torch.library.custom_op("lora_kernels_bench::scatter_down", mutates_args=())
def scatter_down(x: Tensor, down: Tensor, place: Tensor, flops: int) -> Tensor:
    """Return x·down [M, R] by each row's expert."""
    raise NotImplementedError


@scatter_down.register_fake
def _(x: Tensor, down: Tensor, place: Tensor, flops: int) -> Tensor:
    return x.new_empty(place.shape[0], down.shape[2])


@torch.library.custom_op("lora_kernels_bench::scatter_gram", mutates_args=())
def scatter_gram(a: Tensor, b: Tensor, like: Tensor, place: Tensor, flops: int) -> Tensor:
    """Return aᵀ·b of each expert's rows, of the shape of `like`."""
    raise NotImplementedError


@scatter_gram.register_fake
def _(a: Tensor, b: Tensor, like: Tensor, place: Tensor, flops: int) -> Tensor:
    return torch.empty_like(like)


class ScatterProjection(torch.autograd.Function):
    """A projection of axolotl's ScatterMoE LoRA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(x, A, B, place)
        ctx.weight = weight
        y: Tensor = scatter_lora(x, weight, A, B, place, _fused_flops(place, weight, A))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, place = ctx.saved_tensors
        M, (_, R, K), N = place.shape[0], A.shape, B.shape[1]
        ds = scatter_down(dy, B, place, 2 * M * N * R)
        p = scatter_down(x, A.mT, place, 2 * M * K * R)
        dA = scatter_gram(ds, x, A, place, 2 * M * K * R)
        dB = scatter_gram(p, dy, B, place, 2 * M * N * R)
        back = ctx.weight.mT
        dx = scatter_lora(dy, back, B.mT, A.mT, place, _fused_flops(place, back, A))
        if x.shape[0] < M:
            dx = dx.view(x.shape[0], -1, K).sum(1)
        return dx, None, dA, dB, None


def _fused_flops(place: Tensor, weight: Tensor, A: Tensor) -> int:
    (_, K, N), R = weight.shape, A.shape[1]
    return 2 * place.shape[0] * (K * N + R * N + R * K * -(-N // TILE))


def axolotl(layer: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute PEFT's experts in the order of axolotl's ScatterMoE LoRA."""
    base: Any = layer.get_base_layer()  # type: ignore[operator]
    (T, k), routing = index.shape, route(index, base.num_experts)
    up, down = projections_of(layer)
    h = base._apply_gate(ScatterProjection.apply(x, *up[:3], routing.order))
    rows = ScatterProjection.apply(h, *down[:3], routing.order).view(T, k, -1)
    y: Tensor = torch.bmm(weights[:, None], rows)[:, 0]
    return y


class _Unfolded(nn.Module):
    """PEFT's parametrization before its PR 3577."""

    def __init__(self, left: Tensor, right: Tensor, scaling: float) -> None:
        super().__init__()
        self.left, self.right, self.scaling = left, right, scaling

    def forward(self, W: Tensor) -> Tensor:
        return W + torch.bmm(self.left, self.right) * self.scaling


ORDERS: dict[str, Callable[..., Tensor]] = {"unsloth": unsloth, "axolotl": axolotl}

# ---- Rows ----


def build(kind: str, shape: Shape) -> nn.Module:
    """Build an experts module of `KINDS` on meta."""
    with torch.device("meta"):
        layer = adapted(experts_module(shape, torch.bfloat16)).bfloat16()
    if kind == "ours, NF4":
        make_code_of_scales()
        quantize_experts(layer)
    return fused(layer) if kind.startswith("ours") else layer


def count_experts(
    kind: str,
    shape: Shape,
    tokens: int,
    log: list[Kernel] | None = None,
    is_checkpointed: bool = False,
) -> tuple[Traffic, Traffic]:
    """Count forward and backward of a step.

    Args:
        kind: of `KINDS`.
        log: as `counter.count_layer`'s.
        is_checkpointed: whether the backward computes the forward again, and nothing but x is kept.

    >>> forward, backward = count_experts("ours", SHAPES[0], 16)
    >>> forward.flops < backward.flops
    True
    """
    layer: Any = build(kind, shape)
    x = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    index = torch.empty(tokens, shape.top_k, dtype=torch.int64, device="meta")
    weights = torch.empty(tokens, shape.top_k, dtype=torch.bfloat16, device="meta")
    weights.requires_grad_()  # the router takes the model's x
    adapters = [p for p in layer.parameters() if p.requires_grad]
    order = ORDERS.get(kind)

    def run(x: Tensor, weights: Tensor) -> Any:
        return layer(x, index, weights) if order is None else order(layer, x, index, weights)

    def forward() -> Any:
        if is_checkpointed:
            return checkpoint(run, x, weights, use_reentrant=False, preserve_rng_state=False)
        return run(x, weights)

    with contextlib.ExitStack() as patches:
        # PEFT switches autocast off, which knows no meta device.
        nothing = mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        patches.enter_context(nothing)
        if kind == "peft, unfolded":
            name = "peft.tuners.lora.layer._LoraFactorsProxy"
            patches.enter_context(mock.patch(name, _Unfolded))
        return count_layer(forward, [x, weights, *adapters], log)


def missing() -> str | None:
    """Return why no experts are counted, or None."""
    if not hasattr(functional, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm to count"
    if find_spec("transformers") is None or not hasattr(qwen3_moe(), "Qwen3MoeExperts"):
        return "want transformers 5, whose experts are parameters"
    return None


def qwen3_moe() -> Any:
    """Import transformers' module of the model."""
    return importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")


def judge(counts: dict[str, Traffic], _: str) -> list[str]:
    """Return the measures in which ours over the dense stack loses, "bytes" or none.

    It loses to a peer that moves fewer bytes, by more than 1 %, and takes no more FLOPs.

    >>> judge({"ours": Traffic(99, 9, 9, 0, 50), "peft": Traffic(90, 9, 7, 0, 50)}, "forward")
    ['bytes']
    >>> judge({"ours": Traffic(99, 9, 9, 0, 49), "peft": Traffic(90, 9, 7, 0, 50)}, "forward")
    []
    """
    ours = counts["ours"]
    peers = [traffic for name, traffic in counts.items() if not name.startswith("ours")]
    lost = any(ours.bytes > MOST_BYTES * peer.bytes and ours.flops >= peer.flops for peer in peers)
    return ["bytes"] * lost


def rows() -> Iterator[Row]:
    """Yield the rows of each shape and number of tokens; none if something is missing."""
    if missing() is not None:
        return
    has_bitsandbytes = find_spec("bitsandbytes") is not None
    kinds = [kind for kind in KINDS if kind != "ours, NF4" or has_bitsandbytes]
    for tokens, shape, again in itertools.product(TOKENS, SHAPES, (False, True)):
        steps = {kind: count_experts(kind, shape, tokens, is_checkpointed=again) for kind in kinds}
        sizes: dict[str, Any] = {"K": shape.hidden, "N": shape.intermediate, "R": RANK}
        key = {"what": title(shape, again), "dtype": "bf16, bf16 adapters", "M": tokens, **sizes}
        for i, row in enumerate(count_rows(steps, judge, **key)):
            row.flops = {kind: step[i].flops for kind, step in steps.items()}
            yield row
