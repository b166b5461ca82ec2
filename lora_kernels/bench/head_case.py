"""One call of the head's functions with all its gradients, judged as a layer of `case` is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import reference
from ..head import lora_linear_cross_entropy, lora_linear_log_probs
from ..quantization import Weight4bit
from . import case as cases
from .case import Expected
from .tolerance import Verdict, compare, unit_roundoff

IGNORED = -7  # not the default
STATISTICS = ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs")
GRADIENTS = {"x": "dx", "weight": "dW", "lora_A": "dA", "lora_B": "dB", "bias": "dbias"}
Results = dict[str, Tensor]


@dataclass(frozen=True)
class HeadCase:
    """The fields that determine every number of `inputs`.

    of: a reduction of the cross-entropy, or "log_probs".
    """

    M: int
    V: int
    K: int
    R: int
    of: str = "mean"
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None
    quant: str = ""  # as `Case.quant`
    adapter: bool = True
    bias: bool = True
    trained_weight: bool = False
    ignored: float = 0.3  # the share of rows without a label
    label_smoothing: float = 0.0
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    dropout_p: float = 0.0
    chunk_rows: int | None = None
    frozen: tuple[str, ...] = ()
    seed: int = 0

    def __str__(self) -> str:
        return cases.describe(self)


def inputs(case: HeadCase) -> dict[str, Any]:
    """The arguments of the case's function, plus `dy`; those to be differentiated require it."""
    generator = torch.Generator().manual_seed(case.seed)
    draw = cases.random_source("normal", generator)
    M, V, K, R = case.M, case.V, case.K, case.R
    adapter = case.adapter_dtype or case.dtype
    labels = torch.randint(0, V, (M,), generator=generator)
    labels[torch.rand(M, generator=generator) < case.ignored] = IGNORED
    weight: Any = draw((V, K), K**-0.5, case.dtype)
    args: dict[str, Any] = {
        "x": draw((M, K), 1.0, case.dtype),
        "weight": cases.quantize(weight, case.quant) if case.quant else weight,
        "lora_A": draw((R, K), K**-0.5, adapter) if case.adapter else None,
        "lora_B": draw((V, R), R**-0.5, adapter) if case.adapter else None,
        "labels": labels,
        "scaling": 1.25,
        "bias": draw((V,), 1.0, case.dtype) if case.bias else None,
        "ignore_index": IGNORED,
        "logit_softcap": case.logit_softcap,
        "logit_scale": case.logit_scale,
        "dropout_p": case.dropout_p,
        "rng": cases.dropout_state(case.seed) if case.dropout_p else None,
        "chunk_rows": case.chunk_rows,
    }
    if case.of == "log_probs":
        args |= {"temperature": case.temperature, "outputs": STATISTICS[1:]}
    else:
        args |= {"reduction": case.of, "label_smoothing": case.label_smoothing}
    frozen = case.frozen + (() if case.trained_weight else ("weight",))
    for name in GRADIENTS:
        if isinstance(args[name], Tensor):
            args[name] = args[name].detach().requires_grad_(name not in frozen)
    wide = torch.float64 if case.dtype is torch.float64 else torch.float32
    return {**args, "dy": [draw((M,), 1.0, wide), draw((M,), 1.0, wide)]}


def ours(*, rng: Tensor | None, **args: Any) -> Any:
    """The case's function."""
    rng = cases.give_mask({**args, "rng": rng})["rng"]
    if "reduction" in args:
        return lora_linear_cross_entropy(rng=rng, **args)
    return lora_linear_log_probs(rng=rng, **args)[: len(STATISTICS)]


def equation(**args: Any) -> Any:
    """The reference."""
    del args["chunk_rows"]
    if "reduction" in args:
        return reference.lora_linear_cross_entropy(**args)
    del args["outputs"]
    return reference.lora_linear_log_probs(**args)[: len(STATISTICS)]


def plain_pytorch(
    *, x: Tensor, weight: Any, lora_A: Any, lora_B: Any, labels: Tensor, bias: Any, **args: Any
) -> Any:
    """Compute as one writes it without this package: logits in x's dtype, a loss in float32."""
    if isinstance(weight, Weight4bit):
        weight = weight.dequantize(x.dtype)
    y = x @ weight.T
    dtype = y.dtype
    if lora_A is not None:
        wide = torch.promote_types(x.dtype, lora_A.dtype)
        dropped = cases.masked(x, args["rng"], args["dropout_p"]).to(wide)
        y = (y + (dropped @ lora_A.to(wide).T * args["scaling"]) @ lora_B.to(wide).T).to(dtype)
    if bias is not None:
        y = (y + bias).to(dtype)
    y = y.float() * args["logit_scale"]
    if (cap := args["logit_softcap"]) is not None:
        y = torch.tanh(y / cap) * cap
    if "reduction" in args:
        names = "reduction", "label_smoothing", "ignore_index"
        options = {name: args[name] for name in names}
        return torch.nn.functional.cross_entropy(y, labels, **options)
    z = y / args["temperature"]
    log_p, kept = z.log_softmax(1), labels != IGNORED
    found = (
        log_p.gather(1, labels.where(kept, 0)[:, None])[:, 0],
        -(log_p.exp() * log_p).sum(1),
        z.mean(1),
        (2 * log_p).logsumexp(1),
    )
    return tuple(t.where(kept, 0.0) for t in found)


def run(
    call: Callable[..., Any], args: dict[str, Any], autocast: torch.dtype | None = None
) -> Results:
    """`call` on the arguments of `inputs`, forward and backward."""
    args = dict(args)
    dy = args.pop("dy")
    with torch.autocast(args["x"].device.type, dtype=autocast, enabled=autocast is not None):
        found = call(**args)
    y = [found] if isinstance(found, Tensor) else list(found)
    results = dict(zip(STATISTICS, (t.detach() for t in y), strict=False))
    if not y[0].dim():  # a loss of one element is compared with that of "none" alone
        results, y, dy = {}, [y[0]], [dy[0].new_full((), 1.75)]
    leaves = {n: args[n] for n in GRADIENTS if getattr(args[n], "requires_grad", False)}
    if leaves:
        y = y[:2]  # log_probs and entropy; the rest is without a gradient
        given = [dt.to(t.dtype) for t, dt in zip(y, dy, strict=False)]
        grads = torch.autograd.grad(y, [*leaves.values()], given)
        results |= {GRADIENTS[name]: g for name, g in zip(leaves, grads, strict=True)}
    return results


def judge(case: HeadCase) -> dict[str, Verdict]:
    """Run the case's function; a verdict for the results of each row and for each gradient.

    >>> all(verdict.ok for verdict in judge(HeadCase(M=9, V=33, K=17, R=3)).values())
    True
    """

    def make(case: HeadCase) -> Expected:
        args = inputs(case)
        wide = {name: arg if name == "dy" else cases.widen(arg) for name, arg in args.items()}
        return Expected(args, run(equation, wide), run(plain_pytorch, args, case.autocast))

    found = cases.expected(case, case.M * case.R, make)
    results = [run(ours, each.args, case.autocast) for each in found]
    allowed = allowances(case)
    return {
        name: compare(
            [result[name] for result in results],
            [each.ref[name] for each in found],
            [each.eager[name] for each in found],
            *allowed[name],
        )
        for name in found[0].ref
    }


def allowances(case: HeadCase) -> dict[str, tuple[float, tuple[int, ...]]]:
    """Return u of the coarsest rounding and lengths of the sums, as `case.allowances`.

    The logits and their gradient are rounded to the dtype of y before everything else, so u is that
    dtype's or a coarser one. Rows sum over the vocabulary.
    """
    M, V, K = case.M, case.V, case.K
    compute = case.autocast or case.dtype
    adapter = case.adapter_dtype or case.dtype
    u = unit_roundoff(compute)
    return {
        **{name: (u, (K, V)) for name in STATISTICS},
        "dx": (unit_roundoff(case.dtype, compute), (K, V, V)),
        "dW": (u, (K, V, M)),
        "dA": (unit_roundoff(adapter, compute), (K, V, V, M)),
        "dB": (unit_roundoff(adapter, compute), (K, V, M)),
        "dbias": (u, (K, V, M)),
    }
