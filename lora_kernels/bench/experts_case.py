"""One call of `lora_experts_linear` with all its gradients, judged as a layer of `case` is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import selection
from ..backends import library
from ..backends.eager_experts import ALIGNED
from ..core import reference
from ..functional import lora_experts_linear
from ..quantization import Weight4bit
from . import case as cases
from .case import Case, Expected
from .tolerance import Verdict


@dataclass(frozen=True)
class ExpertsCase:
    """The fields that determine every number of `inputs`."""

    rows: tuple[int, ...]  # of each expert
    N: int
    K: int
    R: int
    tail: int = 2  # rows of no expert
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    quant: str = ""  # as `Case.quant`
    transposed: bool = False
    bias: bool = True
    dropout_p: float = 0.0
    peft_layout: bool = False  # of lora_B
    values: str = "normal"  # as `Case.values`
    frozen: tuple[str, ...] = ()
    device: str = "cpu"  # where it runs; the numbers are drawn on the CPU
    seed: int = 0

    def __str__(self) -> str:
        sizes = f"{'-'.join(map(str, self.rows))}x{self.N}x{self.K}"
        flags = [str(self.dtype).removeprefix("torch."), self.quant]
        flags += ["transposed"] * self.transposed + ["peft"] * self.peft_layout
        flags += [self.values] * (self.values != "normal")
        flags += [f"dropout{self.dropout_p}"] * bool(self.dropout_p) + ["no_bias"] * (not self.bias)
        flags += [str(self.adapter_dtype).removeprefix("torch.")] * bool(self.adapter_dtype)
        return "-".join([sizes, f"R{self.R}", *filter(None, flags), *self.frozen])


def inputs(case: ExpertsCase) -> dict[str, Any]:
    """The arguments of `lora_experts_linear` plus `dy`; those to be differentiated require it."""
    draw = cases.random_source(case.values, torch.Generator().manual_seed(case.seed))
    E, M, N, K, R = len(case.rows), sum(case.rows) + case.tail, case.N, case.K, case.R
    adapter = case.adapter_dtype or case.dtype
    weight: Any = draw((E, K, N) if case.transposed else (E, N, K), K**-0.5, case.dtype)
    lora_B = draw((N, R, E) if case.peft_layout else (E, N, R), R**-0.5, adapter)
    args: dict[str, Any] = {
        "x": draw((M, K), 1.0, case.dtype),
        "weight": weight,
        "lora_A": draw((E, R, K), K**-0.5, adapter),
        "lora_B": lora_B.permute(2, 0, 1) if case.peft_layout else lora_B,
        "offsets": torch.tensor(case.rows).cumsum(0),
        "scaling": 2.0 if case.values == "integers" else 1.25,
        "bias": draw((E, N), 1.0, case.dtype) if case.bias else None,
        "is_transposed": case.transposed,
        "dropout_p": case.dropout_p,
        "rng": cases.dropout_state(case.seed) if case.dropout_p else None,
        "dy": draw((M, N), 1.0, case.dtype),
    }
    args = {n: a.to(case.device) if isinstance(a, Tensor) else a for n, a in args.items()}
    if case.quant:
        args["weight"] = cases.quantize(args["weight"], case.quant)
    for name in ("x", "lora_A", "lora_B", "bias"):
        if args[name] is not None:
            args[name] = args[name].detach().requires_grad_(name not in case.frozen)
    return args


def equation(*, weight: Tensor, is_transposed: bool, **others: Any) -> Tensor:
    """The reference, which knows one layout."""
    return reference.lora_experts_linear(weight=weight.mT if is_transposed else weight, **others)


def plain_pytorch(*, weight: Any, is_transposed: bool, **others: Any) -> Tensor:
    """Compute the layer without this package, as a loop over experts.

    Where `grouped_mm` runs, the adapter is in x's dtype, as the backend's docstring says.
    """
    x, dtype = others["x"], others["x"].dtype
    if isinstance(weight, Weight4bit):
        weight = weight.dequantize(dtype)
    weight = weight.mT if is_transposed else weight
    A, B, bias = others["lora_A"], others["lora_B"], others["bias"]
    wide = torch.promote_types(dtype, A.dtype)
    dropped = cases.masked(x, others["rng"], others["dropout_p"]).to(wide)
    parts, start = [], 0
    for e, stop in enumerate(others["offsets"].tolist()):
        s = dropped[start:stop] @ A[e].to(wide).T * others["scaling"]
        y = (x[start:stop] @ weight[e].T + s @ B[e].to(wide).T).to(dtype)
        parts.append(y if bias is None else y + bias[e])
        start = stop
    return torch.cat([*parts, x.new_zeros(x.shape[0] - start, weight.shape[1])])


def narrowed(call: Any) -> Any:
    """Return a call that rounds the adapter to x's dtype before."""

    def run(**args: Any) -> Tensor:
        narrow = {name: args[name].to(args["x"].dtype) for name in ("lora_A", "lora_B")}
        y: Tensor = call(**{**args, **narrow})
        return y

    return run


def is_grouped(case: ExpertsCase) -> bool:
    """Return True if the engine in force runs the case in `grouped_mm`."""
    return (
        selection.forced_backend() == "eager"
        and library.is_on_gpu_path("cpu")
        and not case.quant
        and all(n * case.dtype.itemsize % ALIGNED == 0 for n in (case.N, case.K, case.R))
    )


def judge(case: ExpertsCase) -> dict[str, Verdict]:
    """Run `lora_experts_linear` on the case; a verdict for y and for each gradient.

    >>> all(verdict.ok for verdict in judge(ExpertsCase((3, 0, 5), N=33, K=17, R=3)).values())
    True
    """
    plain = narrowed(plain_pytorch) if is_grouped(case) else plain_pytorch

    def make(case: ExpertsCase) -> Expected:
        args = inputs(case)
        return Expected(args, cases.oracle(args, equation), cases.run(plain, args))

    M = sum(case.rows) + case.tail
    adapter = case.dtype if is_grouped(case) else case.adapter_dtype
    like = Case(M, case.N, case.K, case.R, case.dtype, adapter)
    found = cases.expected(case, M * case.R, make)
    return cases.verdicts(found, lora_experts_linear, like)
