"""One call of `lora_linear` with all its gradients, as tests, `verify` and `bench` make it.

A `Case` is a point in the space of shapes, dtypes and options. `judge` runs it on the backend that
is forced or chosen at the time, and compares each output with the float64 reference.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .. import functional, selection
from ..backends import cpu, cuda, decode4bit, eager, library, native, triton
from ..backends.cuda import fit
from ..backends.triton import configs
from ..core import reference
from ..core.problem import Layout
from ..quantization import Weight4bit, quantize_4bit
from . import tolerance
from .tolerance import Verdict

# argument -> name of its gradient in the results
GRADIENTS = {
    "x": "dx",
    "lora_A": "dA",
    "lora_B": "dB",
    "rank_gate": "dg",
    "column_scale": "dc",
    "bias": "dbias",
}


@dataclass(frozen=True)
class Case:
    """What `inputs` makes: every number of it is settled by these fields."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype = torch.float32  # of x, weight and bias; at most float32, see `oracle`
    adapter_dtype: torch.dtype | None = None  # of A and B; x's where None
    autocast: torch.dtype | None = None
    quant: str = ""  # of the weight: type, block size, whether nested: "nf4-64-nested", "fp4-32"
    compute: torch.dtype | None = None  # of the product with a quantized weight; x's where None
    base: bool = True  # False: the adapter's part alone, weight=None
    gate: bool = False  # [R] float32
    column_scale: bool = False  # [N] float32
    bias: bool = False
    dropout_p: float = 0.0
    scaling: float = 1.25  # neither 1 nor its own square or inverse
    x_layout: str = "rows"
    dy_layout: str = "rows"
    values: str = "normal"  # or "nonnegative", "integers"
    frozen: tuple[str, ...] = ()  # arguments that need no gradient
    device: str = "cpu"  # where it runs; the numbers are drawn on the CPU
    seed: int = 0

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.autocast or self.dtype

    def __str__(self) -> str:
        """M33-N65-K63-R5-bfloat16-A:float32-gate-dropout0.1: what differs from a plain case."""
        parts = [f"M{self.M}-N{self.N}-K{self.K}-R{self.R}", dtype_name(self.dtype)]
        parts += [f"A:{dtype_name(self.adapter_dtype)}"] if self.adapter_dtype else []
        parts += [f"autocast:{dtype_name(self.autocast)}"] if self.autocast else []
        parts += [self.quant] if self.quant else []
        parts += [f"compute:{dtype_name(self.compute)}"] if self.compute else []
        parts += [] if self.base else ["no_base"]
        parts += [name for name in ("gate", "column_scale", "bias") if getattr(self, name)]
        parts += [f"dropout{self.dropout_p}"] if self.dropout_p else []
        parts += [f"x:{self.x_layout}"] if self.x_layout != "rows" else []
        parts += [f"dy:{self.dy_layout}"] if self.dy_layout != "rows" else []
        parts += [self.values] if self.values != "normal" else []
        parts += [f"frozen:{','.join(self.frozen)}"] if self.frozen else []
        return "-".join(parts)


def dtype_name(dtype: torch.dtype) -> str:
    """
    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


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


# The most rows for which "eager-gpu" copies x to float32. Few, so that small cases take the adapter
# in parts.
GPU_UPCAST_ROWS = 4
# bitsandbytes' CPU kernel reads wrong scales where a block straddles two rows of the weight.
_CPU_DECODER = {("cpu", None): "its CPU kernel is wrong where a block straddles rows"}


def inputs(case: Case) -> dict[str, Any]:
    """The arguments of `lora_linear` plus `dy`; those to be differentiated require it.

    x ~ N(0, 1); weight, A and B are scaled so that base product and adapter both come to order 1.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def draw(shape: tuple[int, ...], std: float, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
        if case.values == "integers":
            return torch.randint(-1, 2, shape, generator=generator).to(dtype)
        t = mean + std * torch.randn(shape, generator=generator)
        return (t.abs() if case.values == "nonnegative" else t).to(dtype)

    M, N, K, R = case.M, case.N, case.K, case.R
    adapter_dtype = case.adapter_dtype or case.dtype
    x = LAYOUTS[case.x_layout](draw((M, K), 1.0, case.dtype).to(case.device))
    args: dict[str, Any] = {
        "x": x,
        "weight": draw((N, K), K**-0.5, case.dtype) if case.base else None,
        "lora_A": draw((R, K), K**-0.5, adapter_dtype),
        "lora_B": draw((N, R), R**-0.5, adapter_dtype),
        "scaling": 2.0 if case.values == "integers" else case.scaling,
        "bias": draw((N,), 1.0, case.dtype) if case.bias else None,
        "rank_gate": draw((R,), 0.3, torch.float32, mean=1.0) if case.gate else None,
        "column_scale": draw((N,), 0.3, torch.float32, mean=1.0) if case.column_scale else None,
        "dropout_p": case.dropout_p,
        # Both 64-bit words have high halves that are not zero, and one is negative.
        "rng": torch.tensor([case.seed + 2**40 + 11, -(2**33) - 5]) if case.dropout_p else None,
    }
    args = {n: a.to(case.device) if isinstance(a, Tensor) else a for n, a in args.items()}
    for name in GRADIENTS:
        if args[name] is not None:
            # Detached, a view is a leaf that keeps its strides.
            args[name] = args[name].detach().requires_grad_(name not in case.frozen)
    if case.quant:
        kind, blocksize, *nested = case.quant.split("-")
        args["weight"] = quantize_4bit(args["weight"], kind, int(blocksize), bool(nested))
        args["compute_dtype"] = case.compute
    dy = LAYOUTS[case.dy_layout](draw((M, N), 1.0, case.compute_dtype).to(case.device))
    return {**args, "dy": dy.reshape(*x.shape[:-1], N)}


def plain_pytorch(
    x: Tensor,
    weight: Tensor | Weight4bit | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    *,
    rank_gate: Tensor | None,
    column_scale: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """What one writes without this package; autograd does the rest.

    The adapter's branch runs in the wider of x's and the adapter's dtypes, as PEFT has it.
    """
    wide = torch.promote_types(x.dtype, lora_A.dtype)
    if weight is None:
        weight = x.new_zeros(lora_B.shape[0], x.shape[-1])
    dropped = x
    if rng is not None:
        K = x.shape[-1]
        mask = reference.dropout_mask(rng, x.numel() // K, K, dropout_p).view(x.shape)
        dropped = x * mask * reference.dropout_scale(dropout_p)
    s = (dropped.to(wide) @ lora_A.to(wide).T) * scaling
    if rank_gate is not None:
        s = (s * rank_gate).to(wide)
    compute = compute_dtype or x.dtype
    if isinstance(weight, Weight4bit):
        weight = weight.dequantize(compute)
    base = x.to(compute) @ weight.T
    if not torch.is_autocast_enabled(x.device.type):
        base = base.to(x.dtype)
    y = (base + s @ lora_B.to(wide).T).to(base.dtype)
    if column_scale is not None:
        y = y * column_scale
    if bias is not None:
        y = y + bias
    return y.to(base.dtype)


def run(
    call: Callable[..., Tensor], args: dict[str, Any], autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """`call` on the arguments of `inputs`, forward and backward: y and the gradients asked for."""
    args = dict(args)
    dy = args.pop("dy")
    with torch.autocast(args["x"].device.type, dtype=autocast, enabled=autocast is not None):
        y = call(**args)
    wanted = [name for name in GRADIENTS if args[name] is not None and args[name].requires_grad]
    grads = torch.autograd.grad(y, [args[name] for name in wanted], dy) if wanted else ()
    return {"y": y.detach(), **{GRADIENTS[n]: g for n, g in zip(wanted, grads, strict=True)}}


def oracle(args: dict[str, Any]) -> dict[str, Tensor]:
    """The same outputs in float64, by autograd through `reference.lora_linear`."""
    wide = {
        name: arg.detach().double().requires_grad_(arg.requires_grad)
        if isinstance(arg, Tensor) and arg.is_floating_point()
        else arg
        for name, arg in args.items()
    }
    wide.pop("compute_dtype", None)
    if isinstance(wide["weight"], Weight4bit):
        wide["weight"] = wide["weight"].dequantize(torch.float32).double()
    if wide["weight"] is None:
        wide["weight"] = torch.zeros(wide["lora_B"].shape[0], wide["x"].shape[-1]).double()
    return run(reference.lora_linear, wide)


def unit_roundoffs(case: Case) -> dict[str, float]:
    """Output -> u of the coarsest rounding that the backends' docstrings name for it."""
    adapter, x, compute = case.adapter_dtype or case.dtype, case.dtype, case.compute_dtype
    compute = case.compute or compute
    coarsest = {
        "y": (compute,),
        "dx": (x, compute),  # the base product is rounded to the compute dtype
        "dA": (adapter,),
        "dB": (adapter,),
        "dg": (torch.float32,),
        "dc": (torch.float32, compute),  # z is kept in the compute dtype
        "dbias": (x,),
    }
    return {name: tolerance.unit_roundoff(*dtypes) for name, dtypes in coarsest.items()}


def part_roundoffs(case: Case) -> dict[str, float]:
    """Return what replaces `unit_roundoffs` for adapters that eager rounds on a GPU.

    Autocast rounds it to its dtype. A float32 adapter beside many rows of 16 bits is taken as two
    parts. dA passes B and dS in parts, dB passes A and P, each rounded by 0.42 u rms. Plain PyTorch
    rounds neither, so u/4 alone has to admit √2 · 0.42 u: four times u is what stands here.
    """
    adapter, device = case.adapter_dtype or case.dtype, torch.empty(0, device=case.device)
    if selection.forced_backend() != "eager" or not library.has_out_dtype(device):
        return {}
    if case.autocast and case.dtype is not torch.float64:
        u = tolerance.unit_roundoff(case.autocast)
    elif (
        case.M > eager.UPCAST_ROWS
        and adapter is torch.float32
        and case.dtype in eager.PART_ROUNDOFF
    ):
        u = 4 * eager.PART_ROUNDOFF[case.dtype]
    else:
        return {}
    return {"dA": u, "dB": u, "dg": u}


def give_mask(args: dict[str, Any]) -> dict[str, Any]:
    """Replace the state of a dropout mask by the mask, for a backend that takes no state."""
    rng, x = args["rng"], args["x"]
    if rng is None or rng.dtype is torch.bool or not selection.is_eager_on_gpu(x.device.type):
        return args
    K = x.shape[-1]
    mask = reference.dropout_mask(rng, x.numel() // K, K, args["dropout_p"])
    return args | {"rng": mask.view(x.shape)}


def sums(case: Case) -> dict[str, tuple[int, ...]]:
    """Output -> lengths of the sums behind it; that of the shorter branch counts for nothing."""
    M, N, K = case.M, case.N, case.K
    return {
        "y": (K,),
        "dx": (N,),
        "dA": (N, M),  # dAᵀ sums over rows what dS sums over columns
        "dB": (K, M),
        "dg": (K, N, M),
        "dc": (K, M),
        "dbias": (M,),
    }


# "eager", its GPU path on CPU tensors, and the native kernels' instruction sets with each strategy
# that they have.
EAGERS = ("eager", "eager-gpu")
EAGER_CUDA = "eager cuda"  # on a GPU's tensors
ENGINES = (
    *EAGERS,
    *(isa for isa in native.ISAS),
    *(f"{isa} {cpu.SINGLE_PASS}" for isa in cpu.SINGLE_PASS_ISAS),
)


def engines() -> list[str]:
    """Those of ENGINES that can run here."""
    found = [*EAGERS]
    if native.isa is not None:
        before = native.isa
        here = [isa for isa in native.ISAS if native.use_isa(isa) == isa]
        native.use_isa(before)
        found += [name for name in ENGINES if name.split(" ")[0] in here]
    return found


def triton_engines() -> list[str]:
    """The Triton kernels' strategies, where a GPU (or Triton's interpreter) can run them."""
    if configs.unsupported_reason(configs.target(), "cpu") is not None:
        return []
    return [f"triton {strategy}" for strategy in selection.STRATEGIES["triton"]]


def eager_cuda_engines() -> list[str]:
    """The eager backend on a GPU, where there is one."""
    return [EAGER_CUDA] if torch.cuda.is_available() else []


def cuda_engines() -> list[str]:
    """The CUDA kernels' strategies, where a GPU can run them."""
    if not torch.cuda.is_available() or cuda.obstacle("cuda", None) is not None:
        return []
    return [f"cuda {strategy}" for strategy in selection.STRATEGIES["cuda"]]


def fits_cuda(case: Case, strategy: str) -> bool:
    """Whether that one of the CUDA kernels' strategies takes the case's base product."""
    blocksize = int(case.quant.split("-")[1]) if case.quant else 0
    layout = Layout(blocksize, obstacle=None if case.base else fit.NO_BASE)
    dtype = case.compute or case.compute_dtype
    return not case.M or fit.forward(strategy, dtype, layout, case.M, case.N, case.K) is None


def triton_device() -> str:
    """Where a case of `triton_engines` runs."""
    return "cpu" if triton.interpreted() else "cuda"


def kernels(device: str) -> contextlib.AbstractContextManager[None]:
    """What is timed as ours: on a GPU the Triton kernels, whether or not they are the default."""
    return selection.backend("triton") if device == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def engine(name: str) -> Iterator[None]:
    """Force one of the engines named above; RuntimeError where it cannot run here."""
    if name == "eager":
        with selection.backend("eager"):
            yield
        return
    if name == EAGER_CUDA:
        with selection.backend("eager"), eager.upcast_rows(GPU_UPCAST_ROWS):
            yield
        return
    if name == "eager-gpu":
        with (
            selection.backend("eager"), library.as_on_gpu(), eager.upcast_rows(GPU_UPCAST_ROWS),
            mock.patch.dict(decode4bit.bitsandbytes_reasons, _CPU_DECODER),
        ):  # fmt: skip
            yield
        return
    backend, _, strategy = name.partition(" ")
    if backend in ("triton", "cuda"):
        with selection.backend(backend, strategy):
            yield
        return
    before, isa = native.isa, backend
    try:
        if native.use_isa(isa) != isa:
            raise RuntimeError(f"engine: got {name!r}, this processor stops at {native.isa!r}")
        with selection.backend("cpu", strategy or cpu.LIBRARY):
            yield
    finally:
        if before is not None:
            native.use_isa(before)


@functools.lru_cache(maxsize=2)  # enough for a loop over engines; the tensors may be large
def _expected(case: Case) -> tuple[list[Any], list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Arguments, reference and plain PyTorch's results for as many seeds as must be pooled."""
    arguments: list[Any] = []
    refs: list[dict[str, Tensor]] = []
    eagers: list[dict[str, Tensor]] = []
    seeds = 1
    while len(arguments) < seeds:
        with selection.backend("eager"):  # not by the kernels that are judged
            args = inputs(replace(case, seed=case.seed + len(arguments)))
            arguments.append(args)
            refs.append(oracle(args))
            eagers.append(run(plain_pytorch, args, case.autocast))
        # A rounding of P = D(x)·Aᵀ [M, R] is shared by a whole row of y: its elements count too.
        # Equal rows of x share it among them.
        sizes = [
            case.R if case.x_layout == "expanded" else case.M * case.R,
            *(t.numel() for t in refs[0].values()),
        ]
        seeds = math.ceil(tolerance.POOL / min((n for n in sizes if n), default=tolerance.POOL))
    return arguments, refs, eagers


def judge(case: Case, call: Callable[..., Tensor] = functional.lora_linear) -> dict[str, Verdict]:
    """Run `call` on the case; a verdict for y and for each gradient.

    >>> verdicts = judge(Case(M=5, N=33, K=17, R=3, gate=True))
    >>> list(verdicts), all(verdict.ok for verdict in verdicts.values())
    (['y', 'dx', 'dA', 'dB', 'dg'], True)
    """
    arguments, refs, eagers = _expected(case)
    results = [run(call, give_mask(args), case.autocast) for args in arguments]
    u, lengths = unit_roundoffs(case) | part_roundoffs(case), sums(case)
    return {
        name: tolerance.compare(
            [result[name] for result in results],
            [ref[name] for ref in refs],
            [eager[name] for eager in eagers],
            u[name],
            lengths[name],
        )
        for name in refs[0]
    }


NORM_ARGUMENTS = ("weight", "lora_A", "lora_B", "scaling", "rank_gate")


def judge_norm(
    case: Case, call: Callable[..., Tensor] = functional.dora_norm
) -> dict[str, Verdict]:
    """Run `dora_norm` on the weight, adapter and gate of the case; its verdict.

    >>> judge_norm(Case(M=0, N=33, K=17, R=3, gate=True))["norm"].ok
    True
    """
    got: list[Tensor] = []
    refs: list[Tensor] = []
    eagers: list[Tensor] = []
    while sum(ref.numel() for ref in refs) < tolerance.POOL:
        with selection.backend("eager"):
            args = inputs(replace(case, seed=case.seed + len(refs)))
            args = {name: args[name] for name in NORM_ARGUMENTS}
            wide: dict[str, Any] = {
                name: t.double() if isinstance(t, Tensor) else t for name, t in args.items()
            }
            if isinstance(args["weight"], Weight4bit):
                wide["weight"] = args["weight"].dequantize(torch.float32).double()
            single: dict[str, Any] = {
                name: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t
                for name, t in wide.items()
            }
        refs.append(reference.dora_norm(**wide))
        eagers.append(reference.dora_norm(**single))
        got.append(call(**args))
    # All that is rounded is rounded to float32, in products of ranks and in the sum of squares.
    u = tolerance.unit_roundoff(torch.float32)
    return {"norm": tolerance.compare(got, refs, eagers, u, (case.R, case.K))}
