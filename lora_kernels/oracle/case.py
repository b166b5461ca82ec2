"""One call of an op with all its gradients, as tests, `verify` and `bench` make it.

A `Case` fixes the shapes, dtypes and options of a call of `lora_linear`. `multi_case`,
`experts_case` and `head_case` define the cases of other ops. `judge` runs a case on the forced or
chosen backend, and compares each output with the float64 reference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ..backends import cuda, decoder, library, triton
from ..backends.cpu import linear as cpu
from ..backends.cpu import native
from ..backends.cuda import constraints
from ..backends.eager import products
from ..backends.triton import configs
from ..choice import choose as selection
from ..core import dropout
from ..core.call import Operands
from ..core.problem import MAX_KERNEL_RANK, Layout
from ..ops.linear import lora_linear
from ..ops.norm import dora_norm
from ..quantization import QuantizedWeight, quantize_4bit
from ..quantization.codebooks import BITSANDBYTES_TYPES, E2M1_TYPES
from . import forms, reference, tolerance
from .tolerance import Comparison, unit_roundoff

# argument -> name of its gradient in the results
GRADIENTS = {
    "x": "dx",
    "weight": "dW",
    "lora_A": "dA",
    "lora_B": "dB",
    "rank_gate": "dg",
    "column_scale": "dc",
    "bias": "dbias",
}
# Names of the results of an op that returns a tuple. The result of any other op is "y".
STATISTICS = ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs")
Allowances = dict[str, tuple[float, tuple[int, ...]]]


class Kind:
    """The interface of a kind of case, beside its fields.

    Attributes:
        op, equation, eager: this package's function, the reference's, and plain PyTorch as users
            write it without this package. All three take the same arguments.
        draw: returns dy and the arguments, except for those of dropout.
        allowances: returns, for each output, u of its coarsest rounding and the lengths of its
            sums. The backends' docstrings name the roundings. The shorter branch's sum is left out.
    """

    op: Callable[..., Any]
    equation: Callable[..., Any]
    eager: Callable[..., Any]
    draw: Callable[[Source], dict[str, Any]]
    allowances: Callable[[], Allowances]
    M: int
    R: int
    autocast: torch.dtype | None = None


@dataclass(frozen=True, kw_only=True)
class AnyCase(Kind):
    """A call of an op. Its fields and those of its kind determine all numbers."""

    # Of the weight: type, block size, whether nested: "nf4-64-nested", "fp4-32". Others: `forms`.
    quant: str = ""
    dropout_p: float = 0.0
    values: str = "normal"  # or "nonnegative", "integers"
    frozen: tuple[str, ...] = ()  # arguments that need no gradient
    trained_weight: bool = False
    device: str = "cpu"  # where it runs; the numbers are drawn on the CPU
    seed: int = 0

    @property
    def p_elements(self) -> int:
        """Number of differently rounded elements of P = D(x)·Aᵀ. A row of y shares their errors."""
        return self.M * self.R

    def __str__(self) -> str:
        return describe(self)


def plain_pytorch(
    *, scaling: float, dropout_p: float, compute_dtype: torch.dtype | None = None, **tensors: Any
) -> Tensor:
    """Compute y as users write it without this package; autograd computes the gradients.

    The adapter's branch runs in the wider of x's and the adapter's dtypes, as in PEFT.

    tensors: the fields of `Operands`.
    """
    weight: Any
    x, weight, lora_A, lora_B, rank_gate, column_scale, bias, rng, *_ = Operands(**tensors)
    wide_dtype = torch.promote_types(x.dtype, lora_A.dtype)
    if weight is None:
        weight = x.new_zeros(lora_B.shape[0], x.shape[-1])
    s = (masked(x, rng, dropout_p).to(wide_dtype) @ lora_A.to(wide_dtype).T) * scaling
    if rank_gate is not None:
        s = (s * rank_gate).to(wide_dtype)
    compute = compute_dtype or x.dtype
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize(compute)
    y: Tensor = x.to(compute) @ weight.T
    if not torch.is_autocast_enabled(x.device.type):
        y = y.to(x.dtype)
    dtype = y.dtype
    y = (y + s @ lora_B.to(wide_dtype).T).to(dtype)
    if column_scale is not None:
        y = y * column_scale
    if bias is not None:
        y = y + bias
    return y.to(dtype)


@dataclass(frozen=True)
class Case(AnyCase):
    """A call of `lora_linear`."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype = torch.float32  # of x, weight and bias; at most float32, see `oracle`
    adapter_dtype: torch.dtype | None = None  # of A and B; None for x's
    autocast: torch.dtype | None = None
    compute: torch.dtype | None = None  # of the GEMM with a quantized weight; None for x's
    base: bool = True  # False: the adapter alone, weight=None
    gate: bool = False  # [R] float32
    column_scale: bool = False  # [N] float32
    bias: bool = False
    scaling: float = 1.25  # neither 1 nor its own square or inverse
    x_layout: str = "rows"
    dy_layout: str = "rows"

    op = staticmethod(lora_linear)
    equation = staticmethod(reference.lora_linear)
    eager = staticmethod(plain_pytorch)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.autocast or self.dtype

    @property
    def p_elements(self) -> int:
        # Equal rows of x share the roundings of P.
        return self.R if self.x_layout == "expanded" else super().p_elements

    def draw(self, source: Source) -> dict[str, Any]:
        M, N, K, R = self.M, self.N, self.K, self.R
        adapter_dtype, f32 = self.adapter_dtype or self.dtype, torch.float32
        x = LAYOUTS[self.x_layout](source((M, K), 1.0, self.dtype))
        args: dict[str, Any] = {
            "x": x,
            "weight": source.weight((N, K), K**-0.5, self.dtype) if self.base else None,
            "lora_A": source((R, K), K**-0.5, adapter_dtype),
            "lora_B": source((N, R), R**-0.5, adapter_dtype),
            "scaling": 2.0 if self.values == "integers" else self.scaling,
            "bias": source((N,), 1.0, self.dtype) if self.bias else None,
            "rank_gate": source((R,), 0.3, f32, mean=1.0) if self.gate else None,
            "column_scale": source((N,), 0.3, f32, mean=1.0) if self.column_scale else None,
        }
        if self.quant:
            args["compute_dtype"] = self.compute
        dy = LAYOUTS[self.dy_layout](source((M, N), 1.0, self.compute_dtype))
        return {**args, "dy": dy.reshape(*x.shape[:-1], N)}

    def allowances(self) -> Allowances:
        M, N, K, x, f32 = self.M, self.N, self.K, self.dtype, torch.float32
        adapter, compute = self.adapter_dtype or x, self.compute or self.compute_dtype
        named: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
            "y": ((compute,), (K,)),
            "dx": ((x, compute), (N,)),  # the base GEMM is rounded to the compute dtype
            "dA": ((adapter,), (N, M)),  # dA sums over M; its operand dS sums over N
            "dB": ((adapter,), (K, M)),
            "dg": ((f32,), (K, N, M)),
            "dc": ((f32, compute), (K, M)),  # z is kept in the compute dtype
            "dbias": ((x,), (M,)),
        }
        parts = part_roundoff(self)
        return {
            name: (
                parts if parts and name in ("dA", "dB", "dg") else unit_roundoff(*dtypes),
                lengths,
            )
            for name, (dtypes, lengths) in named.items()
        }


def dtype_name(dtype: torch.dtype) -> str:
    """
    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def describe(case: Any) -> str:
    """Return the name of a case: sizes, dtype, and the fields that are not the default.

    >>> describe(Case(3, 5, 4, 2, base=False, frozen=("x", "bias")))
    'M3-N5-K4-R2-float32-no_base-frozen:x,bias'
    """
    parts = []
    for field in sorted(dataclasses.fields(case), key=lambda field: field.kw_only is True):
        value = getattr(case, field.name)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        text = text.removeprefix("torch.")
        if field.name == "dtype":
            parts.append(text)
        elif field.default is dataclasses.MISSING:
            parts.append(f"{field.name}{text}")
        elif isinstance(value, bool) and value != field.default:
            parts.append(field.name if value else f"no_{field.name}")
        elif value != field.default:
            parts.append(f"{field.name}:{text}")
    return "-".join(parts)


def in_words(case: Any) -> str:
    """Return the sizes, dtypes and operands of a case, in words; `describe` of other ops' cases.

    >>> in_words(Case(3, 5, 4, 2, torch.bfloat16, torch.float32, bias=True))
    'M = 3, K = 4, N = 5, R = 2; x bfloat16, adapters float32; bias'
    """
    if not isinstance(case, Case):
        return describe(case)
    sizes = ", ".join(f"{name} = {getattr(case, name)}" for name in "MKNR")
    dtypes = dtype_name(case.dtype), dtype_name(case.adapter_dtype or case.dtype)
    operands = operand_names(case)
    words = [
        sizes,
        f"x {dtypes[0]}, adapters {dtypes[1]}",
        *([", ".join(operands)] * bool(operands)),
    ]
    return "; ".join(words)


def operand_names(case: Case) -> list[str]:
    """Return the names of the optional operands of a case.

    >>> operand_names(Case(3, 5, 4, 2, base=False, gate=True, dropout_p=0.5))
    ['no weight', 'rank_gate', 'dropout 0.5']
    """
    named = {
        "no weight": not case.base,
        f"weight in {case.quant}": case.quant,
        "bias": case.bias,
        "rank_gate": case.gate,
        "column_scale": case.column_scale,
        f"dropout {case.dropout_p:g}": case.dropout_p,
    }
    return [name for name, is_given in named.items() if is_given]


# How x or dy, a contiguous [M, K], is laid out in memory and in dimensions.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t,
    "padded": lambda t: torch.nn.functional.pad(t, (2, 5))[:, 2:-5],  # row stride > K
    "columns": lambda t: t.t().contiguous().t(),
    "every_other": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda t: t[:1].expand_as(t),  # row stride 0
    "1d": lambda t: t[0],
    "3d": lambda t: t.view(_groups(t.shape[0]), -1, t.shape[1]),
    "3d_swapped": lambda t: t.view(_groups(t.shape[0]), -1, t.shape[1]).transpose(0, 1),
    "4d": lambda t: t.view(1, _groups(t.shape[0]), -1, t.shape[1]),
}


def _groups(M: int) -> int:
    return next((d for d in (2, 3, 5, 7) if M % d == 0), 1)


# Largest M for which "eager-gpu" copies x to float32. A small number makes small cases take the
# adapter in parts.
GPU_UPCAST_ROWS = 4
# bitsandbytes' CPU kernel reads wrong scales where a block straddles two rows of the weight.
_GEMM_REASON = "its CPU kernel is wrong where a block straddles rows"
_CPU_GEMM = {("cpu", None, quant_type): _GEMM_REASON for quant_type in BITSANDBYTES_TYPES}


class Source:
    """Draws the tensors of a case on the CPU, and moves them to the case's device."""

    def __init__(self, case: AnyCase) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)

    def __call__(
        self, shape: tuple[int, ...], std: float, dtype: torch.dtype, mean: float = 0.0
    ) -> Tensor:
        """Draw a tensor of the values that `Case.values` names."""
        if self.case.values == "integers":
            t = self.integers(-1, 2, *shape)
        else:
            t = mean + std * torch.randn(shape, generator=self.generator)
            t = t.abs() if self.case.values == "nonnegative" else t
        return t.to(dtype).to(self.case.device)

    def weight(self, shape: tuple[int, ...], std: float, dtype: torch.dtype) -> Any:
        """Draw a weight, quantized if `Case.quant` names a format or a form."""
        t = self(shape, std, dtype)
        if not self.case.quant:
            return t
        if forms.is_form(self.case.quant):
            return forms.build(t, self.case.quant)
        kind, blocksize, *nested = self.case.quant.split("-")
        return quantize_4bit(t, kind, int(blocksize), bool(nested))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw integers from low to high - 1, which stay on the CPU."""
        return torch.randint(low, high, shape, generator=self.generator)


def inputs(case: AnyCase) -> dict[str, Any]:
    """Return the arguments of the case's op, and `dy`. Tensors with a gradient require it.

    x ~ N(0, 1); weight, A and B are scaled so that base GEMM and update both have order 1.
    """
    # Two 64-bit words with non-zero high halves; one is negative.
    rng = torch.tensor([case.seed + 2**40 + 11, -(2**33) - 5], device=case.device)
    args = case.draw(Source(case))
    args |= {"dropout_p": case.dropout_p, "rng": rng if case.dropout_p else None}
    frozen = case.frozen if case.trained_weight else (*case.frozen, "weight")
    for name in GRADIENTS.keys() - frozen:
        for t in _list(args.get(name)):
            t.requires_grad_()
    return args


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def dropout_mask(x: Tensor, rng: Tensor, dropout_p: float) -> Tensor:
    """Return the dropout mask of a state, in x's shape."""
    K = x.shape[-1]
    return dropout.dropout_mask(rng, x.numel() // K, K, dropout_p).view(x.shape)


def masked(x: Tensor, rng: Tensor | None, dropout_p: float) -> Tensor:
    """Return x under the reference's dropout, or x itself without a state."""
    if rng is None:
        return x
    return x * dropout_mask(x, rng, dropout_p) * dropout.dropout_scale(dropout_p)


def run(
    call: Callable[..., Any], args: dict[str, Any], autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Run `call` forward and backward on the arguments of `inputs`; return results and gradients.

    Scalar results are left out, because their gradients tell more. `dy` belongs to the first
    results. The gradients of a list of tensors are concatenated to one vector.
    """
    args = dict(args)
    dy = _list(args.pop("dy"))
    with torch.autocast(args["x"].device.type, dtype=autocast, enabled=autocast is not None):
        y = call(**args)
    outputs = dict(zip(STATISTICS, y, strict=False)) if isinstance(y, tuple) else {"y": y}
    results = {name: t.detach() for name, t in outputs.items() if t.dim()}
    leaves = {name: _list(args.get(name)) for name in GRADIENTS}
    trainable = {n: ts for n, ts in leaves.items() if ts and getattr(ts[0], "requires_grad", False)}
    if trainable:
        ys = [*outputs.values()][: len(dy)]
        grads = iter(torch.autograd.grad(ys, [*itertools.chain(*trainable.values())], dy))
        for name, tensors in trainable.items():
            grad, *others = (next(grads) for _ in tensors)
            if isinstance(args[name], list):
                grad = torch.cat([t.flatten() for t in (grad, *others)])
            results[GRADIENTS[name]] = grad
    return results


def widen(value: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Return an argument in a wider dtype, a 4-bit weight decoded; index and mask unchanged."""
    if isinstance(value, QuantizedWeight):
        return value.dequantize(torch.float32).to(dtype)
    if isinstance(value, list):
        return [widen(element, dtype) for element in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(dtype).requires_grad_(value.requires_grad)
    return value


def widened(args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the reference: float64, and zeros for a weight that is None."""
    wide_args = {name: widen(arg) for name, arg in args.items() if name != "compute_dtype"}
    if wide_args["weight"] is None:
        wide_args["weight"] = torch.zeros(args["dy"].shape[-1], wide_args["x"].shape[-1]).double()
    return wide_args


def oracle(
    args: dict[str, Any], equation: Callable[..., Tensor] = reference.lora_linear
) -> dict[str, Tensor]:
    """Return the outputs of `run` in float64, by autograd through the reference's equation."""
    return run(equation, widened(args))


def part_roundoff(case: Case) -> float | None:
    """Return u of dA, dB and dg for adapters that eager rounds on a GPU, else None.

    Autocast rounds the adapter to its dtype. For many rows of a 16-bit x, a float32 adapter is
    split into two 16-bit parts. dA reads B and dS in parts, dB reads A and P in parts, and each is
    rounded by 0.42 u rms. Plain PyTorch rounds neither, so u/4 alone has to admit √2 · 0.42 u.
    Hence the factor 4.
    """
    adapter, device = case.adapter_dtype or case.dtype, torch.empty(0, device=case.device)
    if selection.forced_backend() != "eager" or not library.has_out_dtype(device):
        return None
    if case.autocast and case.dtype is not torch.float64:
        return unit_roundoff(case.autocast)
    in_parts = adapter is torch.float32 and case.M > products.UPCAST_ROWS
    u = products.PART_ROUNDOFF.get(case.dtype)
    return 4 * u if in_parts and u else None


def give_mask(args: dict[str, Any]) -> dict[str, Any]:
    """Replace the dropout state by its mask for a backend that takes masks alone."""
    rng, x = args["rng"], args["x"]
    if rng is None or not selection.is_eager_on_gpu(x.device.type):
        return args
    return args | {"rng": None, "dropout_mask": dropout_mask(x, rng, args["dropout_p"])}


# The eager backend, its GPU path on CPU tensors, and each instruction set of the native kernels
# with each of its strategies.
EAGERS = ("eager", "eager-gpu")
EAGER_CUDA = "eager cuda"  # on a GPU's tensors
ENGINES = (*EAGERS, *native.ISAS, *(f"{isa} {cpu.FUSED}" for isa in cpu.FUSED_ISAS))


def engines() -> list[str]:
    """Return the members of ENGINES that can run here."""
    names = [*EAGERS]
    if native.isa is not None:
        initial_isa = native.isa
        available = [isa for isa in native.ISAS if native.use_isa(isa) == isa]
        native.use_isa(initial_isa)
        names += [name for name in ENGINES if name.split(" ")[0] in available]
    return names


def gpu_engines() -> list[str]:
    """Return the engines of the eager, Triton and CUDA backends that can run on a GPU here.

    Triton's engines run in its interpreter too.
    """
    names = [EAGER_CUDA] if torch.cuda.is_available() else []
    if configs.unsupported_reason(configs.target(), "cpu") is None:
        names += [f"triton {strategy}" for strategy in selection.STRATEGIES["triton"]]
    if torch.cuda.is_available() and cuda.unsupported_device_reason("cuda", None) is None:
        names += [f"cuda {strategy}" for strategy in selection.STRATEGIES["cuda"]]
    return names


def fits_cuda(case: Case, strategy: str) -> bool:
    """Return True if a strategy of the CUDA backend supports the case."""
    return not case.dropout_p and cuda_unsupported_reason(case, strategy) is None


def cuda_unsupported_reason(case: Case, strategy: str) -> str | None:
    """Return why a strategy of the CUDA backend cannot run the case's sizes or dtype, or None."""
    blocksize = int(case.quant.split("-")[1]) if case.quant else 0
    layout = Layout(blocksize, unsupported_reason=None if case.base else constraints.NO_BASE)
    dtype, sizes = case.compute or case.compute_dtype, (case.M, case.N, case.K)
    return constraints.unsupported_reason(strategy, dtype, layout, *sizes)


def unsupported_reason(name: str, case: Case) -> str | None:
    """Return why an engine cannot run a case, or None. Dropout is not asked about.

    >>> unsupported_reason("avx2", Case(3, 5, 40, 2, quant="mxfp4-32"))
    "K = 40 is no multiple of mxfp4's blocks of 32"
    """
    kind, *block = case.quant.split("-")[:2]
    if (kind in E2M1_TYPES or forms.is_form(case.quant)) and case.K % int(block[0]):
        return f"K = {case.K} is no multiple of {kind}'s blocks of {block[0]}"
    if name not in (*EAGERS, EAGER_CUDA) and case.R > MAX_KERNEL_RANK:
        return f"R = {case.R} is above the kernels' {MAX_KERNEL_RANK}"
    if name == f"triton {triton.FUSED}" and case.R > configs.MAX_RANK:
        return f"R = {case.R} is above {configs.MAX_RANK}"
    if name.startswith("cuda "):
        return cuda_unsupported_reason(case, name.removeprefix("cuda "))
    return None


def triton_device() -> str:
    """Return the device type on which a Triton engine runs."""
    return "cpu" if triton.is_interpreted() else "cuda"


def kernels(device: str, dropout_p: float = 0.0) -> contextlib.AbstractContextManager[None]:
    """Select the kernels that are timed as this package's: Triton's on a GPU, unless dropout_p > 0.

    All other calls run the default.
    """
    is_triton = device == "cuda" and not dropout_p
    return selection.backend("triton") if is_triton else contextlib.nullcontext()


@contextlib.contextmanager
def engine(name: str) -> Iterator[None]:
    """Force one of the engines named above; RuntimeError if it cannot run here."""
    backend, _, strategy = name.partition(" ")
    with contextlib.ExitStack() as stack:
        if name in (*EAGERS, EAGER_CUDA):
            stack.enter_context(selection.backend("eager"))
            if name != "eager":
                stack.enter_context(products.upcast_rows(GPU_UPCAST_ROWS))
            if name == "eager-gpu":
                stack.enter_context(library.as_on_gpu())
                reasons = decoder.bitsandbytes_reasons
                stack.enter_context(mock.patch.dict(reasons, _CPU_GEMM))
        elif backend in ("triton", "cuda"):
            stack.enter_context(selection.backend(backend, strategy))
        else:
            if native.isa is not None:
                stack.callback(native.use_isa, native.isa)
            if native.use_isa(backend) != backend:
                raise RuntimeError(f"engine: got {name!r}, this processor stops at {native.isa!r}")
            stack.enter_context(selection.backend("cpu", strategy or cpu.LIBRARY))
        yield


class Expected(NamedTuple):
    """The arguments of one seed, and the results of the reference and of plain PyTorch."""

    args: dict[str, Any]
    ref: dict[str, Tensor]
    eager: dict[str, Tensor]


def expected(case: Any, p_elements: int, make: Callable[[Any], Expected]) -> list[Expected]:
    """Run `make` on the case under as many seeds as must be pooled.

    p_elements: as of `AnyCase`.
    """
    samples: list[Expected] = []
    seeds = 1
    while len(samples) < seeds:
        with selection.backend("eager"):  # the judged kernels must not run here
            samples.append(make(replace(case, seed=case.seed + len(samples))))
        sizes = [p_elements, *(t.numel() for t in samples[0].ref.values())]
        seeds = math.ceil(tolerance.POOL / min((n for n in sizes if n), default=tolerance.POOL))
    return samples


def comparisons(
    samples: list[Expected], call: Callable[..., Any], case: AnyCase
) -> dict[str, Comparison]:
    """Run `call` on the arguments of each seed of the case, and judge its outputs."""
    return verdicts(results(samples, call, case), samples, case)


def results(
    samples: list[Expected], call: Callable[..., Any], case: AnyCase
) -> list[dict[str, Tensor]]:
    """Run `call` on the arguments of each seed of the case; return its outputs."""
    return [run(call, give_mask(sample.args), case.autocast) for sample in samples]


def verdicts(
    results: list[dict[str, Tensor]], samples: list[Expected], case: AnyCase
) -> dict[str, Comparison]:
    """Judge each output of the case, given the outputs of each seed."""
    allowed = case.allowances()
    return {
        name: tolerance.compare(
            [result[name] for result in results],
            [sample.ref[name] for sample in samples],
            [sample.eager[name] for sample in samples],
            *allowed[name],
        )
        for name in samples[0].ref
    }


@functools.lru_cache(maxsize=2)  # enough for a loop over engines; the tensors may be large
def _expected(case: AnyCase, eager: Callable[..., Any]) -> list[Expected]:
    def make(case: AnyCase) -> Expected:
        args = inputs(case)
        return Expected(args, oracle(args, case.equation), run(eager, args, case.autocast))

    return expected(case, case.p_elements, make)


def expected_results(case: AnyCase) -> list[Expected]:
    """Return what `judge` compares the outputs of the case with, for each seed."""
    return _expected(case, case.eager)


def judge(case: AnyCase, call: Callable[..., Any] | None = None) -> dict[str, Comparison]:
    """Run `call`, by default the case's op; return a verdict for each result and each gradient.

    >>> verdicts = judge(Case(M=5, N=33, K=17, R=3, gate=True))
    >>> list(verdicts), all(verdict.ok for verdict in verdicts.values())
    (['y', 'dx', 'dA', 'dB', 'dg'], True)
    """
    return comparisons(expected_results(case), call or case.op, case)


NORM_ARGUMENTS = ("weight", "lora_A", "lora_B", "scaling", "rank_gate")


def judge_norm(case: Case, call: Callable[..., Tensor] = dora_norm) -> dict[str, Comparison]:
    """Run `dora_norm` on the weight, adapter and gate of the case; return its verdict.

    >>> judge_norm(Case(M=0, N=33, K=17, R=3, gate=True))["norm"].ok
    True
    """

    def make(case: Case) -> Expected:
        args = {name: arg for name, arg in inputs(case).items() if name in NORM_ARGUMENTS}
        in_64, in_32 = (
            reference.dora_norm(**{name: widen(arg, dtype) for name, arg in args.items()})
            for dtype in (torch.float64, torch.float32)
        )
        return Expected(args, {"norm": in_64}, {"norm": in_32})

    samples = expected(case, case.N, make)
    refs, eagers = ([sample[field]["norm"] for sample in samples] for field in (1, 2))
    got = [call(**sample.args) for sample in samples]
    # The products over the rank and the sum of squares are rounded to float32 alone.
    u = unit_roundoff(torch.float32)
    return {"norm": tolerance.compare(got, refs, eagers, u, (case.R, case.K))}
