"""One call of `multi_lora_linear` with all its gradients, judged as `case.judge` does a layer's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import functional, selection
from ..core import reference
from ..quantization import Weight4bit, quantize_4bit
from . import tolerance
from .case import Case, dtype_name, give_mask, part_roundoffs
from .tolerance import Verdict


@dataclass(frozen=True)
class MultiCase:
    """What `inputs` makes: every number of it is settled by these fields."""

    M: int
    N: int
    K: int
    ranks: tuple[int, ...] = (3, 5, 8, 1)  # of each adapter
    rows: str = "grouped"  # or "mixed": each adapter's together or not; some have none
    dtype: torch.dtype = torch.float32  # of x, weight and bias
    adapter_dtype: torch.dtype | None = None  # of A and B; x's where None
    quant: str = ""  # as `Case.quant`
    base: bool = True
    bias: bool = True
    dropout_p: float = 0.0
    values: str = "normal"  # or "nonnegative"
    frozen: tuple[str, ...] = ()
    seed: int = 0

    def __str__(self) -> str:
        ranks = "-".join(map(str, self.ranks))
        parts = [f"M{self.M}-N{self.N}-K{self.K}-R{ranks}-{self.rows}-{dtype_name(self.dtype)}"]
        parts += [f"A:{dtype_name(self.adapter_dtype)}"] if self.adapter_dtype else []
        parts += [self.quant] if self.quant else []
        parts += [] if self.base else ["no_base"]
        parts += [] if self.bias else ["no_bias"]
        parts += [f"dropout{self.dropout_p}"] if self.dropout_p else []
        parts += [self.values] if self.values != "normal" else []
        parts += [f"frozen:{','.join(self.frozen)}"] if self.frozen else []
        return "-".join(parts)


def inputs(case: MultiCase) -> dict[str, Any]:
    """The arguments of `multi_lora_linear` plus `dy`; those to be differentiated require it.

    Where there are three adapters or more, no row has the last but one.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def draw(shape: tuple[int, ...], std: float, dtype: torch.dtype) -> Tensor:
        t = std * torch.randn(shape, generator=generator)
        return (t.abs() if case.values == "nonnegative" else t).to(dtype)

    M, N, K, E = case.M, case.N, case.K, len(case.ranks)
    adapter_dtype = case.adapter_dtype or case.dtype
    index = torch.randint(-1, E, (M,), generator=generator)
    if E > 2:
        index[index == E - 2] = E - 1
    if case.rows == "grouped":  # in falling order, which is not that of the adapters
        index = index.sort(descending=True).values
    weight: Any = draw((N, K), K**-0.5, case.dtype) if case.base else None
    if case.quant:
        kind, blocksize, *nested = case.quant.split("-")
        weight = quantize_4bit(weight, kind, int(blocksize), bool(nested))
    args: dict[str, Any] = {
        "x": draw((M, K), 1.0, case.dtype),
        "weight": weight,
        "lora_A": [draw((R, K), K**-0.5, adapter_dtype) for R in case.ranks],
        "lora_B": [draw((N, R), R**-0.5, adapter_dtype) for R in case.ranks],
        "index": index,
        "scaling": [1.25 + e / 2 for e in range(E)],
        "bias": draw((N,), 1.0, case.dtype) if case.bias else None,
        "dropout_p": case.dropout_p,
        "rng": torch.tensor([case.seed + 2**40 + 11, -(2**33) - 5]) if case.dropout_p else None,
        "dy": draw((M, N), 1.0, case.dtype),
    }
    for name in ("x", "lora_A", "lora_B", "bias"):
        for t in args[name] if isinstance(args[name], list) else [args[name]]:
            if t is not None:
                t.requires_grad_(name not in case.frozen)
    return args


def run(call: Callable[..., Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """y and the gradients asked for; dA and dB are those of all adapters, one after another."""
    args = dict(args)
    dy, y = args.pop("dy"), call(**args)
    results = {"y": y.detach()}
    names = {"x": "dx", "lora_A": "dA", "lora_B": "dB", "bias": "dbias"}
    asked = {
        name: leaves
        for name in names
        for leaves in [args[name] if isinstance(args[name], list) else [args[name]]]
        if leaves[0] is not None and leaves[0].requires_grad
    }
    grads = iter(torch.autograd.grad(y, [t for leaves in asked.values() for t in leaves], dy))
    for name, leaves in asked.items():
        results[names[name]] = torch.cat([next(grads).flatten() for _ in leaves])
    return results


def plain_pytorch(
    x: Tensor,
    weight: Any,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    index: Tensor,
    scaling: list[float],
    bias: Tensor | None,
    *,
    dropout_p: float,
    rng: Tensor | None,
) -> Tensor:
    """What one writes without this package, as PEFT has it: a loop over adapters, rows picked."""
    wide = torch.promote_types(x.dtype, lora_A[0].dtype)
    dropped = x
    if rng is not None:
        mask = reference.dropout_mask(rng, x.shape[0], x.shape[1], dropout_p)
        dropped = x * mask * reference.dropout_scale(dropout_p)
    if weight is None:
        weight = x.new_zeros(lora_B[0].shape[0], x.shape[1])
    if isinstance(weight, Weight4bit):
        weight = weight.dequantize(x.dtype)
    y = torch.nn.functional.linear(x, weight, bias)
    for e, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        rows = (index == e).nonzero()[:, 0]
        s = (dropped[rows].to(wide) @ A.to(wide).T) * scaling[e]
        y = y.index_put((rows,), (y[rows] + s @ B.to(wide).T).to(y.dtype))
    return y


def oracle(args: dict[str, Any]) -> dict[str, Tensor]:
    """The same outputs in float64, by autograd through `reference.multi_lora_linear`."""

    def wide(value: Any) -> Any:
        if isinstance(value, Weight4bit):
            return value.dequantize(torch.float32).double()
        if isinstance(value, list):
            return [wide(t) for t in value]
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    wider = {name: wide(value) for name, value in args.items()}
    if wider["weight"] is None:
        wider["weight"] = torch.zeros(args["lora_B"][0].shape[0], args["x"].shape[1]).double()
    return run(reference.multi_lora_linear, wider)


def judge(
    case: MultiCase, call: Callable[..., Tensor] = functional.multi_lora_linear
) -> dict[str, Verdict]:
    """Run `call` on the case; a verdict for y and for each gradient.

    >>> all(verdict.ok for verdict in judge(MultiCase(M=9, N=33, K=17)).values())
    True
    """
    got: list[dict[str, Tensor]] = []
    refs: list[dict[str, Tensor]] = []
    eagers: list[dict[str, Tensor]] = []
    seeds = 1
    while len(got) < seeds:
        args = inputs(replace(case, seed=case.seed + len(got)))
        with selection.backend("eager"):  # not by the kernels that are judged
            refs.append(oracle(args))
            eagers.append(run(plain_pytorch, args))
        got.append(run(call, give_mask(args)))
        # A rounding of P is shared by a whole row of y: its elements count too.
        of_p = case.M * sum(case.ranks) // len(case.ranks)
        sizes = [of_p, *(t.numel() for t in refs[0].values())]
        seeds = math.ceil(tolerance.POOL / min((n for n in sizes if n), default=tolerance.POOL))
    M, N, K, adapter = case.M, case.N, case.K, case.adapter_dtype or case.dtype
    # y and dx: also the base product, which an adapter's part is added to in place.
    u = {"dA": adapter, "dB": adapter}
    parts = part_roundoffs(Case(M, N, K, 1, case.dtype, adapter))
    sums = {"y": (K,), "dx": (N,), "dA": (N, M), "dB": (K, M), "dbias": (M,)}
    return {
        name: tolerance.compare(
            [result[name] for result in got],
            [ref[name] for ref in refs],
            [eager[name] for eager in eagers],
            parts.get(name) or tolerance.unit_roundoff(u.get(name, case.dtype)),
            sums[name],
        )
        for name in refs[0]
    }
