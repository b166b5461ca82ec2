"""Which backend runs an op, and why: pure functions of shapes, dtypes and device facts.

A choice never depends on whether gradients are on, and is never revised by an exception: a
backend that is forced where it cannot run raises, naming what is missing.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from . import costs
from .backends import cpu, cuda, eager, forced, native, triton
from .backends.cuda import fit
from .backends.cuda.fit import Layout
from .backends.forced import Forced
from .backends.library import follows_gpu
from .backends.triton import configs, measured
from .core.call import Guard

MAX_KERNEL_RANK = 256
STRATEGIES = {
    "eager": (eager.LIBRARY,),
    "cpu": (cpu.SINGLE_PASS, cpu.LIBRARY, cpu.STREAMED, cpu.FEW_ROWS),
    "triton": triton.STRATEGIES,
    "cuda": cuda.STRATEGIES,
}
TWO_STEPS = {  # those of a GPU's in which P = D(x)·Aᵀ is at hand before the product starts
    "triton": (triton.SPLIT, triton.LIBRARY),
    "cuda": (cuda.SPLIT, cuda.ORDINARY),
}
BACKENDS = tuple(STRATEGIES)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Why a GPU's tensors go to the eager backend unless another is asked for; None lets the model of
# costs decide.
UNTRIED: str | None = (
    "PyTorch's GEMMs, in an order that moves no more bytes than PEFT's (lora-kernels bench "
    "--count); our Triton and CUDA kernels are compiled and tested on the CPU, but have run on no "
    "GPU yet: lora_kernels.backend('triton' or 'cuda') takes them"
)
# Where a dense product is the library's all the same: on Intel's own processors its library
# multiplies float32 faster than the single pass where M·N·K reaches MKL_PRODUCT, but for matrix
# registers (AMX), which take three bfloat16 for each from AMX_FLOAT_ROWS rows on. Of bfloat16,
# where both have AMX, it is faster where M·N·K reaches AMX_PRODUCT in more than AMX_ROWS rows.
# Measured on 2 threads of Intel family 6, for AMX model 167 (benchmarks/NOTES.md). Where the
# library alone has AMX, all bfloat16 is the library's.
MKL_PRODUCT = 280_000_000
AMX_PRODUCT, AMX_ROWS = 10_000_000_000, 512
AMX_FLOAT_ROWS = 128  # the kernel's own, FLOAT_ROWS in csrc/cpu/amx_impl.h
_ALL = range(sys.maxsize)
_ROWS, _CODES, _UNKNOWN = Layout(), Layout(64), 4096  # where nothing is said of a weight
# Up to how many rows of x the weight's rows pass once, dotted with all of x's: dense ones as they
# lie, and 4-bit codes decoded in registers or the L1 cache, measured on AMD families 25 and 26 and
# beside AMX on Intel family 6 (benchmarks/NOTES.md). AVX-512 takes more beside LARGE elements in 4
# bits. Beside AMX bfloat16 has its tiles; without any instruction set 16 bits take longer to widen
# than to multiply.
FEW_ROWS = {"scalar": 4, "avx2": 16, "avx512": 16, "avx512bf16": 16, "amxbf16": 16}
FEW_ROWS_4BIT = {"scalar": 8, "avx2": 32, "avx512": 16, "avx512bf16": 16, "amxbf16": 11}
FEW_ROWS_BESIDE_AMX = 6
LARGE, FEW_ROWS_OF_LARGE = 1 << 24, 32


@dataclass(frozen=True)
class Choice:
    """What `explain` shows: the backend, the strategy it follows, and the reason in words."""

    backend: str
    strategy: str
    reason: str


def _check_names(name: str, strategy: str | None = None) -> Forced:
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, want one of {', '.join(BACKENDS)}")
    if strategy is not None and strategy not in STRATEGIES[name]:
        want = ", ".join(map(repr, STRATEGIES[name]))
        raise ValueError(f"strategy: got {strategy!r}, want for backend {name!r} one of {want}")
    return Forced(name, strategy)


def forced_backend() -> str | None:
    """The backend that `backend(...)` or LORA_KERNELS_BACKEND, read at import, names, if any."""
    return forced.current.get().backend


# The mark that `torch.compiler.assume_constant_result` sets, without importing Dynamo. Dynamo of
# torch 2.8 cannot trace a ContextVar. A graph keeps the backend that was forced at compilation.
forced_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]

if (_named := forced_backend()) is not None:
    _check_names(_named)


@contextlib.contextmanager
def backend(name: str, strategy: str | None = None) -> Iterator[None]:
    """Force one backend inside a `with`; where it cannot run, the op raises RuntimeError.

    `strategy` forces also how it goes about it: for "cpu" "single pass", "library product + rank
    update", "streamed, few rows" or, on a 4-bit weight, "decoded as read, few rows"; for
    "triton" "single pass", "split", "publish first, consume last" or "library product + rank
    update"; for "cuda" "publish first, consume last", "publish, then consume", "split" or "split,
    ordinary multipliers". Left out, it is chosen.

    >>> import lora_kernels, torch
    >>> x, W, A, B = torch.ones(2, 3), torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)
    >>> with lora_kernels.backend("eager"):
    ...     lora_kernels.lora_linear(x, W, A, B).shape
    torch.Size([2, 3])
    """
    token = forced.current.set(_check_names(name, strategy))
    try:
        yield
    finally:
        forced.current.reset(token)


def lora_linear(
    device_type: str,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    dtype: torch.dtype,
    rank: int,
    rows: int | None = None,
    four_bit: bool = False,
    columns: int | None = None,
    inner: int | None = None,
    dropout: bool = False,
    device_index: int | None = None,
    layout: Layout | None = None,
) -> Choice:
    """The choice for `lora_linear` and its backward (one choice for both, always).

    rows: M; None asks for what holds of any M, and names both strategies where M decides. On a GPU
    N (`columns`), K (`inner`), dropout and how the weight lies in memory count too; layout None
    stands for rows as they come, and blocks of 64 codes.
    """
    asked = forced.current.get()
    layout = layout or (_CODES if four_bit else _ROWS)
    if asked.backend == "triton":
        target = configs.target(device_index) if device_type == "cuda" else None
        choice, key = _choose_triton(
            asked, triton.absence(), triton.interpreted(), target, device_type, x_dtype, a_dtype,
            b_dtype, dtype, rank, rows, four_bit, columns, inner, dropout,
        )  # fmt: skip
        known = None if key is None else measured.find(key)
        if known is None:
            return choice
        return Choice("triton", known.strategy, f"the triton backend was asked for; {known.source}")
    if asked.backend == "cuda":
        return _choose_cuda(
            asked, cuda.obstacle(device_type, device_index), x_dtype, a_dtype, b_dtype, dtype, rank,
            rows, columns, inner, layout,
        )  # fmt: skip
    if asked.backend is None and device_type == "cuda" and UNTRIED is None:
        found = _choose_gpu(
            _gpu(device_index), triton.absence(), cuda.obstacle(device_type, device_index),
            x_dtype, a_dtype, b_dtype, dtype, rank, rows, columns, inner, four_bit, dropout, layout,
        )  # fmt: skip
        if found is not None:
            target = configs.target(device_index)
            itemsize = max(d.itemsize for d in (x_dtype, a_dtype, b_dtype, dtype))
            return (
                _measured(target, rows, columns, inner, rank, itemsize, four_bit, dropout) or found
            )
    size = (columns or _UNKNOWN) * (inner or _UNKNOWN)
    few = few_rows(dtype, four_bit, size, layout.columns)
    many = None if rows is None else rows > few
    large = range(0) if four_bit else large_products(dtype, size)
    if rows is not None:  # so that the cache holds one entry for all rows
        large = _ALL if many and rows in large else range(0)
    gpu_obstacle = None
    if device_type == "cuda":
        gpu_obstacle = _gpu_obstacle(torch.bfloat16 in (x_dtype, dtype), device_index)
    return _choose(
        asked, native.isa, native.amx_bf16, large, native.reason, gpu_obstacle, device_type,
        x_dtype, a_dtype, b_dtype, dtype, rank, many, few, four_bit, layout.columns,
    )  # fmt: skip


def multi_lora_linear(
    device_type: str,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    dtype: torch.dtype,
    rank: int,
    rows: int | None = None,
    four_bit: bool = False,
    columns: int | None = None,
    inner: int | None = None,
    device_index: int | None = None,
    layout: Layout | None = None,
) -> Choice:
    """The choice for `multi_lora_linear` and its backward: `lora_linear`'s at the largest rank, on
    GPUs split, since a row's ranks are picked between D(x)·Aᵀ and the product."""
    asked = forced.current.get()
    if asked.strategy and asked.strategy not in TWO_STEPS.get(
        asked.backend or "", [asked.strategy]
    ):
        want = " or ".join(map(repr, TWO_STEPS[asked.backend or ""]))
        raise RuntimeError(
            f"strategy {asked.strategy!r} was asked for and cannot run here: for rows with "
            f"adapters of their own (multi_lora_linear) want {want}"
        )
    choice = lora_linear(
        device_type, x_dtype, a_dtype, b_dtype, dtype, rank, rows, four_bit, columns, inner, False,
        device_index, layout,
    )  # fmt: skip
    if choice.strategy in TWO_STEPS.get(choice.backend, [choice.strategy]):
        return choice
    if choice.backend == "triton":
        return replace(choice, strategy=triton.SPLIT)
    N, K = columns or _UNKNOWN, inner or _UNKNOWN
    layout = layout or (_CODES if four_bit else _ROWS)
    return Choice("cuda", *_cuda_strategy(dtype, None, N, K, layout, choice.reason))


def dora_norm(
    device_type: str,
    weight_dtype: torch.dtype,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    rank: int,
    device_index: int | None = None,
) -> Choice:
    """The choice for `dora_norm`."""
    asked = forced.current.get()
    dtypes = weight_dtype, a_dtype, b_dtype, torch.float32, rank
    if asked.backend == "triton":
        target = configs.target(device_index) if device_type == "cuda" else None
        _triton_target(triton.absence(), triton.interpreted(), target, device_type, *dtypes)
        return Choice("triton", triton.SINGLE_PASS, "the triton backend was asked for")
    if asked.backend == "cuda":
        _cuda_obstacle(cuda.obstacle(device_type, device_index), *dtypes)
        return Choice("cuda", cuda.SPLIT, "the cuda backend was asked for")
    if asked.backend == "eager":
        return Choice("eager", eager.PANELS, "the eager backend was asked for")
    obstacle: str | None
    if device_type == "cuda":
        obstacle = _gpu_obstacle(weight_dtype is torch.bfloat16, device_index)
    else:
        obstacle = _cpu_obstacle(native.reason, device_type, *dtypes)
    if obstacle is None:
        return Choice("cpu", cpu.SINGLE_PASS, f"native kernels, {native.isa}")
    if asked.backend == "cpu":
        raise RuntimeError(f"backend 'cpu' was asked for and cannot run here: {obstacle}")
    return Choice("eager", eager.PANELS, obstacle)


def is_eager_on_gpu(device_type: str) -> bool:
    """Return True if such a device runs the eager backend's GPU path.

    PyTorch's kernel draws the dropout masks there. Every other path makes them from a state.

    >>> is_eager_on_gpu("cpu")
    False
    """
    return follows_gpu(device_type) and forced_backend() in (None, "eager")


def choose_for_mask() -> Choice:
    """Return the choice for a dropout mask that is given or drawn in the op: the eager backend.

    Raises RuntimeError if another backend is forced, since those take the mask's state.
    """
    name = forced_backend()
    if name not in (None, "eager"):
        raise RuntimeError(
            f"backend {name!r} was asked for and cannot run here: got rng as a dropout mask, want "
            "the state of one: seed and offset, int64 [2]"
        )
    return Choice("eager", eager.LIBRARY, "the dropout mask is given, not its state")


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _gpu_obstacle(bfloat16: bool, device_index: int | None) -> str:
    """Why a GPU's tensors go to the eager backend."""
    if _has_gpu():
        target = configs.target(device_index)
        obstacle = configs.obstacle(target.arch)
        if obstacle is not None:
            slow = f"; sm_{target.arch} has no bfloat16 either, and emulates it: want float16"
            return obstacle + slow * bfloat16
    return UNTRIED or "the model of costs does not know this GPU"


def few_rows(
    dtype: torch.dtype, four_bit: bool, size: int, columns: bool = False, isa: str | None = None
) -> int:
    """Up to how many rows of x the strategy is the one for few, 0 for an `isa` that is none.

    size: elements of the weight. columns: it is stored as [K, N], for which there is none but the
    library's, of one row.
    """
    isa = native.isa or "" if isa is None else isa
    if columns:
        return 1
    if isa == "amxbf16" and dtype is torch.bfloat16:
        return FEW_ROWS_BESIDE_AMX
    if four_bit and isa in ("avx512", "avx512bf16") and size >= LARGE:
        return FEW_ROWS_OF_LARGE
    if four_bit:
        return FEW_ROWS_4BIT.get(isa, 0)
    return 0 if isa == "scalar" and dtype is not torch.float32 else FEW_ROWS.get(isa, 0)


def large_products(dtype: torch.dtype, size: int) -> range:
    """The numbers of rows for which a dense product is the library's, of `size` elements of W."""
    amx = native.isa == "amxbf16"
    if native.intel and dtype is torch.float32:
        return range(-(-MKL_PRODUCT // size), AMX_FLOAT_ROWS if amx else _ALL.stop)
    if amx and dtype is torch.bfloat16:
        return range(max(AMX_ROWS + 1, -(-AMX_PRODUCT // size)), _ALL.stop)
    return range(0)


def _any_rows(many: str, few: str, few_rows: int, large: range) -> str:
    """The strategy in words, where the number of rows decides; `large` numbers are the library's.

    >>> _any_rows("single pass", "streamed", 16, range(300, 400))
    'single pass; under 17 rows streamed; from 300 to 399 library product + rank update'
    """
    if few_rows and few == many:
        few_rows = 0
    start, ends = max(large.start, few_rows + 1), large.stop < _ALL.stop
    if large and start == few_rows + 1 and not ends:
        many, large = cpu.LIBRARY, range(0)
    parts = [many]
    if few_rows and few != many:
        parts.append(f"under {few_rows + 1} rows {few}")
    if large:
        parts.append(f"from {start} {f'to {large.stop - 1}' if ends else 'on'} {cpu.LIBRARY}")
    return "; ".join(parts)


def guards() -> tuple[Guard, Guard]:
    """Return guards of what a choice depends on beside its arguments: backend and ISA in force."""
    requested = forced.current.get
    return Guard(None, requested, requested()), Guard(vars(native), "isa", native.isa)


@functools.lru_cache(maxsize=1024)
def _choose(
    asked: Forced,
    isa: str | None,
    amx_bf16: bool,
    large: range,
    native_absence: str | None,
    gpu_obstacle: str | None,
    device_type: str,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    dtype: torch.dtype,
    rank: int,
    many_rows: bool | None,
    few_rows: int,
    four_bit: bool,
    columns: bool,
) -> Choice:
    if asked.backend == "eager":
        return Choice("eager", eager.LIBRARY, "the eager backend was asked for")
    obstacle = gpu_obstacle or _cpu_obstacle(
        native_absence, device_type, x_dtype, a_dtype, b_dtype, dtype, rank
    )
    if obstacle is None:
        return _cpu_choice(
            asked, isa, amx_bf16, large, dtype, many_rows, few_rows, four_bit, columns
        )
    if asked.backend == "cpu":
        raise RuntimeError(f"backend 'cpu' was asked for and cannot run here: {obstacle}")
    return Choice("eager", eager.LIBRARY, obstacle)


def _cpu_choice(
    asked: Forced,
    isa: str | None,
    amx_bf16: bool,
    large: range,
    dtype: torch.dtype,
    many_rows: bool | None,
    few_rows: int,
    four_bit: bool,
    columns: bool,
) -> Choice:
    reason = f"native kernels, {isa}"
    if asked.backend:
        reason = "the cpu backend was asked for"
    few = cpu.FEW_ROWS if four_bit else cpu.LIBRARY if columns else cpu.STREAMED
    if asked.strategy:
        _check_cpu_strategy(asked.strategy, isa, few, few_rows, bool(many_rows))
        return Choice("cpu", asked.strategy, reason)
    if many_rows is False:
        return Choice("cpu", few, reason)
    many = cpu.SINGLE_PASS
    if isa == "amxbf16" and dtype is torch.float32:
        reason += f"; float32 as three bfloat16 from {AMX_FLOAT_ROWS} rows on"
    if isa not in cpu.SINGLE_PASS_ISAS:
        many, large = cpu.LIBRARY, range(0)
    elif amx_bf16 and dtype is torch.bfloat16 and isa != "amxbf16":
        many, reason = cpu.LIBRARY, f"{reason}; the library multiplies with AMX"
    elif large:
        reason += f"; large {str(dtype).removeprefix('torch.')} products are the library's"
    return Choice("cpu", _any_rows(many, few, 0 if many_rows else few_rows, large), reason)


def _check_cpu_strategy(
    strategy: str, isa: str | None, few: str, few_rows: int, many_rows: bool
) -> None:
    want = None
    if strategy == cpu.SINGLE_PASS and isa not in cpu.SINGLE_PASS_ISAS:
        want = f"one of {', '.join(cpu.SINGLE_PASS_ISAS)} as the instruction set, which is {isa}"
    elif strategy in cpu.OF_FEW_ROWS and strategy != few:
        four_bit = strategy == cpu.FEW_ROWS
        want = "a 4-bit weight" if four_bit else "a dense weight whose rows are contiguous"
    elif strategy in cpu.OF_FEW_ROWS and many_rows:
        want = f"at most {few_rows} rows"
    if want is not None:
        raise RuntimeError(f"strategy {strategy!r} was asked for and cannot run here: want {want}")


@functools.lru_cache(maxsize=4096)
def _choose_triton(
    asked: Forced,
    absence: str | None,
    interpreted: bool,
    target: configs.Target | None,
    device_type: str,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    dtype: torch.dtype,
    rank: int,
    rows: int | None,
    four_bit: bool,
    columns: int | None,
    inner: int | None,
    dropout: bool,
) -> tuple[Choice, measured.Shape | None]:
    """What the model of costs says, and what a measured row that goes before it is looked up by;
    None where the strategy is named, or no such row can be."""
    target = _triton_target(
        absence, interpreted, target, device_type, x_dtype, a_dtype, b_dtype, dtype, rank
    )
    if asked.strategy == triton.SINGLE_PASS and rank > configs.MAX_SINGLE_PASS_RANK:
        raise RuntimeError(
            f"strategy {asked.strategy!r} was asked for and cannot run here: rank {rank} is above "
            f"{configs.MAX_SINGLE_PASS_RANK}"
        )
    if asked.strategy:
        return Choice("triton", asked.strategy, "the triton backend was asked for"), None
    itemsize = max(d.itemsize for d in (x_dtype, a_dtype, b_dtype, dtype))
    strategy, why = configs.strategy(target, rows, columns, rank, itemsize, four_bit, dropout)
    key = None
    if not (rows is None or columns is None or inner is None or dropout):
        key = measured.shape(target, rows, columns, inner, rank, itemsize, four_bit)
    return Choice("triton", strategy, f"the triton backend was asked for; {why}"), key


def _gpu(device_index: int | None) -> costs.Gpu | None:
    return costs.here(device_index) if _has_gpu() else None


def _measured(
    target: configs.Target,
    rows: int | None,
    columns: int | None,
    inner: int | None,
    rank: int,
    itemsize: int,
    four_bit: bool,
    dropout: bool,
) -> Choice | None:
    """What `lora-kernels tune` found to be the fastest there, which goes before the model."""
    if rows is None or columns is None or inner is None or dropout:
        return None
    known = measured.find(measured.shape(target, rows, columns, inner, rank, itemsize, four_bit))
    return None if known is None else Choice("triton", known.strategy, known.source)


@functools.lru_cache(maxsize=4096)
def _choose_gpu(
    gpu: costs.Gpu | None,
    triton_absence: str | None,
    cuda_obstacle: str | None,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    dtype: torch.dtype,
    rank: int,
    rows: int | None,
    columns: int | None,
    inner: int | None,
    four_bit: bool,
    dropout: bool,
    layout: Layout,
) -> Choice | None:
    """The fastest by the model of costs, of those that are here. None where our kernels cannot run,
    or the GPU is not known."""
    if gpu is None or costs.obstacle(gpu) is not None:
        return None
    if _kernel_obstacle(x_dtype, a_dtype, b_dtype, dtype, rank) is not None:
        return None
    missing = {"triton": triton_absence, "cuda": cuda_obstacle}
    M, N, K = (size or _UNKNOWN for size in (rows, columns, inner))
    predicted = costs.predict(gpu, M, N, K, rank, dtype.itemsize, four_bit, dropout)
    fitting = (
        cost for cost in predicted
        if cost.backend != "cuda" or fit.forward(cost.strategy, dtype, layout, M, N, K) is None
    )  # fmt: skip
    best = next(cost for cost in fitting if missing.get(cost.backend) is None)
    eagers = next(cost for cost in predicted if cost.backend == "eager")
    share = f"{best.seconds / eagers.seconds:.2f} of eager's {eagers.seconds * 1e6:.0f} µs"
    why = f"the model of costs expects {share}, most of it {best.because}"
    if best.backend == "cuda":
        why += _dx(best.strategy, dtype, layout, N, K)
    return Choice(best.backend, best.strategy, why)


@functools.lru_cache(maxsize=1024)
def _choose_cuda(
    asked: Forced,
    obstacle: str | None,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    dtype: torch.dtype,
    rank: int,
    rows: int | None,
    columns: int | None,
    inner: int | None,
    layout: Layout,
) -> Choice:
    _cuda_obstacle(obstacle, x_dtype, a_dtype, b_dtype, dtype, rank)
    reason, N, K = "the cuda backend was asked for", columns or _UNKNOWN, inner or _UNKNOWN
    if asked.strategy and layout.obstacle != fit.NO_BASE:
        why = None if rows == 0 else fit.forward(asked.strategy, dtype, layout, rows, N, K)
        if why is not None:
            raise RuntimeError(
                f"strategy {asked.strategy!r} was asked for and cannot run here: {why}"
            )
        return Choice("cuda", asked.strategy, reason + _dx(asked.strategy, dtype, layout, N, K))
    strategy, reason = _cuda_strategy(dtype, rows, N, K, layout, reason)
    if rows is None:
        few, _ = _cuda_strategy(dtype, 1, N, K, layout, "")
        if few != strategy:
            strategy = f"{strategy}; up to {cuda.DECODE_ROWS} rows {few}"
    return Choice("cuda", strategy, reason)


def _cuda_strategy(
    dtype: torch.dtype, M: int | None, N: int, K: int, layout: Layout, reason: str
) -> tuple[str, str]:
    """The first strategy that takes such a product, and the reason with what kept others from it.
    M None: many rows."""
    wanted = [cuda.COOPERATIVE] * (M is not None and M <= cuda.DECODE_ROWS) + [cuda.SPLIT]
    for strategy in wanted:
        why = fit.forward(strategy, dtype, layout, M, N, K)
        if why is None:
            return strategy, reason + _dx(strategy, dtype, layout, N, K)
        if why not in reason:
            reason = f"{reason}; not {strategy!r}: {why}"
    return cuda.ORDINARY, reason


def _dx(strategy: str, dtype: torch.dtype, layout: Layout, N: int, K: int) -> str:
    """What is to be said of dx where it is made otherwise than y."""
    why = None if strategy == cuda.ORDINARY else fit.backward(dtype, layout, N, K)
    return "" if why is None else f"; dx on the ordinary multipliers: {why}"


def _cuda_obstacle(
    obstacle: str | None,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    dtype: torch.dtype,
    rank: int,
) -> None:
    """RuntimeError where the CUDA kernels cannot run."""
    obstacle = obstacle or _kernel_obstacle(x_dtype, a_dtype, b_dtype, dtype, rank)
    if obstacle is not None:
        raise RuntimeError(f"backend 'cuda' was asked for and cannot run here: {obstacle}")


def _triton_target(
    absence: str | None,
    interpreted: bool,
    target: configs.Target | None,
    device_type: str,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    dtype: torch.dtype,
    rank: int,
) -> configs.Target:
    """The device that Triton's kernels will run on; RuntimeError where they cannot."""
    if interpreted:
        target = configs.INTERPRETER
    obstacle = configs.unfit(absence, target, device_type)
    obstacle = obstacle or _kernel_obstacle(x_dtype, a_dtype, b_dtype, dtype, rank)
    if obstacle is not None:
        raise RuntimeError(f"backend 'triton' was asked for and cannot run here: {obstacle}")
    assert target is not None
    return target


def _cpu_obstacle(
    native_absence: str | None,
    device_type: str,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    dtype: torch.dtype,
    rank: int,
) -> str | None:
    if device_type != "cpu":
        return f"no kernels for device type {device_type!r} in this version"
    if native_absence is not None:
        return native_absence
    return _kernel_obstacle(x_dtype, a_dtype, b_dtype, dtype, rank)


def _kernel_obstacle(
    x_dtype: torch.dtype,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    dtype: torch.dtype,
    rank: int,
) -> str | None:
    for name, d in (("x", x_dtype), ("lora_A", a_dtype), ("lora_B", b_dtype), ("y", dtype)):
        if d not in _KERNEL_DTYPES:
            got = str(d).removeprefix("torch.")
            return f"{name} is {got}; the kernels take float32, bfloat16, float16"
    if rank > MAX_KERNEL_RANK:
        return f"rank {rank} is above the kernels' {MAX_KERNEL_RANK}"
    return None
