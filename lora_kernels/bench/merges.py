"""`lora-kernels bench --merge`: time and memory of merges that give the base back, beside PEFT's.

A row is a model of `LAYERS` layers that are alike: M weights of K × N. Its calls:

- "peft": `merge_adapter` and `unmerge_adapter` of PEFT's layers;
- "ours, device" and "ours, host": the same of fused ones with `exact_merge`;
- "ours, stream": `merged_weights`, each tensor let go before the next.

Held is what a copy of the base takes while the adapter is merged, wherever it is. Peak is that of
a whole call, copies and PEFT's sums; on a GPU without what is on the host. A ✗ says which share of
the base's stored numbers a call has changed at its end: weights, or bytes of 4-bit codes with their
scales. Ours lose if there is any.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import memory, timing
from .results import Facts, Row, environment, is_ours
from .table import Suite

LAYERS, RANK, SIZE, EXPERTS = 4, 16, 1024, 8
PEFT = "peft"


class Base(NamedTuple):
    """A kind of layer: its name, the dtype of its base, and options of PEFT's configuration."""

    name: str
    dtype: torch.dtype
    quant_type: str | None = None
    config: dict[str, Any] = {}  # noqa: RUF012


BASES = (
    Base("linear", torch.float32),
    Base("linear", torch.bfloat16),
    Base("DoRA", torch.bfloat16, config={"use_dora": True}),
    Base("linear", torch.bfloat16, "nf4"),
    Base("experts", torch.bfloat16),
)


def build(base: Base, device: str) -> Any:
    """Build PEFT's model of `LAYERS` layers with random adapters."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    if base.name == "experts":
        layers: list[nn.Module] = [_Experts(base.dtype) for _ in range(LAYERS)]
        config: Any = {"target_modules": [], "target_parameters": ["weight"]}
    elif base.quant_type:
        from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]

        options: Any = {"bias": False, "quant_type": base.quant_type, "compute_dtype": base.dtype}
        make: Any = Linear4bit
        layers = [make(SIZE, SIZE, **options) for _ in range(LAYERS)]
        config = {"target_modules": r"\d+"}
    else:
        layers = [nn.Linear(SIZE, SIZE, bias=False, dtype=base.dtype) for _ in range(LAYERS)]
        config = {"target_modules": r"\d+"}
    model = nn.Sequential(*layers).requires_grad_(False).to(device)
    if base.quant_type:
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    settings = {"r": RANK, "lora_alpha": 2 * RANK} | config | base.config
    peft = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.normal_(std=0.02)
    return peft


class _Experts(nn.Module):
    """The stacked weights of a mixture's projection."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, SIZE, SIZE // 2, dtype=dtype) / 32)


def calls_of(model: Any) -> dict[str, tuple[Any, Callable[[], object]]]:
    """Return each call with its model, a copy."""
    from ..peft import fuse, merged_weights

    def cycle(model: Any) -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    def stream(model: Any) -> None:
        tensors = merged_weights(model)
        while next(tensors, None) is not None:
            pass

    calls: dict[str, tuple[Any, Callable[[], object]]] = {}
    for name, place in ((PEFT, None), ("ours, device", "device"), ("ours, host", "host")):
        copied = copy.deepcopy(model)
        if place is not None:
            fuse(copied, exact_merge=place, qualify="off")
        calls[name] = copied, partial(cycle, copied)
    calls["ours, stream"] = model, partial(stream, model)
    return calls


def row_of(base: Base, device: str, seconds: float) -> Row:
    """Check, time and count the calls of a base."""
    key = Row(what=f"merge {base.name}", M=LAYERS, K=SIZE, N=SIZE, R=RANK)
    key.dtype, key.quant_type = str(base.dtype).removeprefix("torch."), base.quant_type
    if base.name == "experts":
        key.M, key.N = LAYERS * EXPERTS, SIZE // 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*erge lora module to 4-bit")
        calls = calls_of(build(base, device))
        for name, (model, call) in calls.items():
            numbers = stored(model)
            key.peak_bytes[name] = memory.peak(call, device)
            changed = sum(map(differing, numbers, stored(model)))
            if changed:
                share = changed / sum(t.numel() for t in numbers)
                key.misses[name] = f"{share:.1%} of the base's stored numbers changed"
            key.bytes[name] = held(model) if name in ("ours, device", "ours, host") else 0
        key.seconds = timing.interleave(
            {name: call for name, (_, call) in calls.items()}, seconds=seconds, device=device
        )
    return key


def stored(model: Any) -> list[Tensor]:
    """Return copies of the base's stored numbers, as integers of their sizes."""
    state = model.get_base_model().state_dict()
    tensors = [t.detach().cpu().flatten() for name, t in state.items() if "lora_" not in name]
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return [t.clone().view(integers[t.element_size()]) for t in tensors]


def differing(a: Tensor, b: Tensor) -> int:
    """Return in how many numbers they differ; a 4-bit format's text may change length."""
    return int((a != b).sum()) if a.shape == b.shape else max(a.numel(), b.numel())


def held(model: Any) -> int:
    """Return the bytes that copies take while the adapter is merged."""
    model.merge_adapter()
    copies = [vars(module).get("exact_merge") for module in model.modules()]
    nbytes: int = sum(exact.nbytes for exact in copies if exact is not None)
    model.unmerge_adapter()
    return nbytes


def rows(args: argparse.Namespace, facts: Facts) -> Iterator[Row]:
    """Yield a row for each base, that of NF4 with bitsandbytes alone."""
    for base in BASES:
        if base.quant_type is None or find_spec("bitsandbytes") is not None:
            yield row_of(base, args.device, args.seconds)


def summary(rows: list[Row]) -> Iterator[str]:
    """Yield in how many rows a merge of ours changed its base."""
    lost = sum(any(is_ours(name) for name in row.misses) for row in rows)
    yield f"{lost} of {len(rows)} rows in which a merge of ours changed its base"


SUITE = Suite(
    kind="merge",
    option="merge",
    unused="shapes model rows ranks quick dtypes dropout baseline",
    rows=rows,
    provenance=lambda args: environment(args.device),
    summary=summary,
)
