"""`lora-kernels bench --count`: memory traffic of LoRA on the experts of a mixture.

Counted on meta tensors by `counter`, as `traffic` counts layers: a step of one experts module of
Qwen3-MoE's sizes with rank 16 on both projections, everything in bfloat16. Ours is what `fuse`
makes of PEFT's module, over a dense and over a 4-bit stack (NF4, nested scales). PEFT's is over the
dense stack: over 4 bits its forward leaves the adapter out.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

from ..layers import quantize_experts
from .baselines import make_code_of_scales
from .counter import Kernel, Traffic, count_layer
from .experts import RANK, Shape, adapted, experts_module, fused
from .results import Row
from .traffic import count_rows

EXPERTS, TOKENS = (8, 32, 128), (8192, 1)
TOP_K, HIDDEN, INTERMEDIATE = 8, 2048, 768
KINDS = ("ours, NF4", "ours", "peft")


def title(experts: int) -> str:
    return f"{experts} experts {HIDDEN}→{INTERMEDIATE}, top {TOP_K}"


# Rows that are known to be lost, by their name, M and lost measures: PEFT's order, which computes
# W + s·B·A, is another algorithm, and moves less where the experts are few beside the tokens.
KNOWN_LOSSES = {(title(experts), 8192, "bytes") for experts in (8, 32)}


def qwen3_moe() -> Any:
    """Import transformers' module of the model."""
    return importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")


def build(kind: str, experts: int) -> nn.Module:
    """Build an experts module of `KINDS` on meta."""
    shape = Shape("qwen3_moe", experts, TOP_K, HIDDEN, INTERMEDIATE)
    with torch.device("meta"):
        layer = adapted(experts_module(shape, torch.bfloat16)).bfloat16()
    if kind == "ours, NF4":
        make_code_of_scales()
        quantize_experts(layer)
    return layer if kind == "peft" else fused(layer)


def count_experts(
    kind: str, experts: int, tokens: int, log: list[Kernel] | None = None
) -> tuple[Traffic, Traffic]:
    """Count forward and backward of a step.

    Args:
        kind: of `KINDS`.
        experts: how many the module has; a token takes `TOP_K`.
        log: as `counter.count_layer`'s.

    >>> forward, backward = count_experts("ours", 8, 16)
    >>> forward.kernels, backward.kernels
    (44, 36)
    """
    layer: Any = build(kind, experts)
    x = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device="meta", requires_grad=True)
    index = torch.empty(tokens, TOP_K, dtype=torch.int64, device="meta")
    weights = torch.empty(tokens, TOP_K, dtype=torch.bfloat16, device="meta")
    adapters = [p for p in layer.parameters() if p.requires_grad]
    # PEFT switches autocast off, which knows no meta device.
    with mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()):
        return count_layer(lambda: layer(x, index, weights), [x, *adapters], log)


def missing() -> str | None:
    """Return why no experts are counted, or None."""
    if not hasattr(functional, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm to count"
    if find_spec("transformers") is None or not hasattr(qwen3_moe(), "Qwen3MoeExperts"):
        return "want transformers 5, whose experts are parameters"
    return None


def rows(judge: Callable[[dict[str, Traffic], str], list[str]]) -> Iterator[Row]:
    """Yield the rows of each number of experts and of tokens; none if something is missing.

    judge: as in `count_rows`. Ours over the dense stack is judged, beside PEFT's.
    """
    if missing() is not None:
        return
    has_bitsandbytes = find_spec("bitsandbytes") is not None
    kinds = [kind for kind in KINDS if kind != "ours, NF4" or has_bitsandbytes]
    for tokens, experts in itertools.product(TOKENS, EXPERTS):
        yield from count_rows(
            {kind: count_experts(kind, experts, tokens) for kind in kinds},
            lambda counts, direction: judge(
                {name: counts[name] for name in ("ours", "peft")}, direction
            ),
            what=title(experts),
            dtype="bf16, bf16 adapters",
            M=tokens,
            K=HIDDEN,
            N=INTERMEDIATE,
            R=RANK,
        )
