"""A pytest plugin that counts the parts of each launch: `pytest -p tests.partitions.record`.

It stands before the launchers of the backends and writes what each test ran to the file that
LORA_KERNELS_PARTITIONS names: {"backend/kernel/partition/option": {instruction set: test}}.
The instruction set is "" except for the CPU's kernels. The sizes of their parts are read from csrc.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lora_kernels.backends import cpu, cuda, eager, native, triton
from lora_kernels.core.call import MultiOperands
from lora_kernels.core.packed4bit import Packed4bit

from .kernels import KERNELS, OPTIONS

ROOT = Path(__file__).resolve().parents[2]
found: dict[str, dict[str, str]] = defaultdict(dict)
largest: dict[str, int] = defaultdict(int)  # "backend/kernel/partition" -> the most parts of one
_test = ""
_several_adapters = _backward = False


Count = int | tuple[int, int]  # of parts; or a size and a part's size


def note(backend: str, kernel: str, options: set[str], isa: str = "", **parts: Count) -> None:
    """One launch of the kernel, cut into so many parts."""
    known = KERNELS[backend][kernel]
    if _several_adapters:
        options |= {"adapters"}
    for name, part in parts.items():
        partition = name.replace("_", " ")
        count = part if isinstance(part, int) else _tiles(*part)
        assert partition in known.partitions, (backend, kernel, partition)
        key = f"{backend}/{kernel}/{partition}"
        largest[key] = max(largest[key], count)
        for option in options if count > 1 and _test else ():
            assert option in OPTIONS, option
            found[f"{key}/{option}"].setdefault(isa, _test)


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _some(**given: object) -> set[str]:
    """The options that are there: not None, not a null pointer, not False."""
    return {name.replace("_", " ").replace("four bit", "4-bit") for name, v in given.items() if v}


def _wrap(owner: Any, name: str, before: Callable[..., None]) -> None:
    call = getattr(owner, name)

    @functools.wraps(call)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        return call(*args, **kwargs)

    setattr(owner, name, recorded)


def _inside(owner: Any, name: str, adapters: bool, backward: bool) -> None:
    """Mark launches inside this function as of several adapters, or of a backward."""
    call = getattr(owner, name)

    @functools.wraps(call)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        global _several_adapters, _backward
        before = _several_adapters, _backward
        _several_adapters, _backward = adapters, backward
        try:
            return call(*args, **kwargs)
        finally:
            _several_adapters, _backward = before

    setattr(owner, name, recorded)


def _record_op(owner: Any, *names: str) -> None:
    for name in ("lora_linear", *names):
        _inside(owner, name, name.startswith("multi"), False)
        _inside(owner, f"{name}_backward", name.startswith("multi"), True)


# Triton ------------------------------------------------------------------------------------------


def _triton_launch(kernel: Any, config: Any, *, grid: Any, device: Any, **a: Any) -> None:
    given = {key.removesuffix("_ptr"): value is not None for key, value in a.items()}
    name = kernel.__name__.removesuffix("_kernel")
    if name in ("fused", "two_pass"):
        _triton_linear(name, a, given)
    elif name == "shrink":
        options = _some(column_scale=given["in_scale"])
        parts = dict(zip(("rows", "ranks", "splits"), grid, strict=True))
        note("triton", name, options, **parts, sum=(a["k_per_split"], a["BLOCK_K"]))
    elif name == "outer":
        options = _some(column_scale=given["v_scale"])
        parts = dict(zip(("columns", "ranks", "splits"), grid, strict=True))
        note("triton", name, options, **parts, sum=(min(a["M"], a["m_per_split"]), a["BLOCK_M"]))
    elif name == "shrink_outer":
        parts = dict(zip(("rows", "splits"), grid, strict=True))
        options = _some(column_scale=given["v_scale"])
        note("triton", name, options, **parts, sum=(a["n_per_split"], a["BLOCK_N"]))
    elif name == "reduce":
        options = _some(gate=given["gate"], column_scale=given["sum_z"])
        note("triton", name, options, columns=grid[0], splits=a["num_splits"])
    elif name == "dequantize":
        note("triton", name, {"4-bit"}, rows=grid[0], columns=grid[1])


def _triton_linear(way: str, a: dict[str, Any], given: dict[str, bool]) -> None:
    forward = a["K_INNER"]
    scale = given["out_scale"] if forward else given["in_scale"]
    options = _some(gate=given["gate"], four_bit=given["packed"], column_scale=scale)
    rows = _tiles(a["M"], a["BLOCK_M"])
    parts: dict[str, Count] = {"rows": rows, "columns": (a["N"], a["BLOCK_N"])}
    parts["sum"] = (a["K"], a["BLOCK_K"]) if given["w"] or given["packed"] else 1
    if way == "fused":
        parts["groups_of_rows"] = rows, a["GROUP_M"]
    else:
        parts |= {"splits": a["num_splits"], "ranks": (a["R"], a["BLOCK_R"])}
    note("triton", f"linear, {way}" + ("" if forward else ", dx"), options, **parts)


def _record_triton() -> None:
    if triton.unavailable_reason() is not None:
        return
    from lora_kernels.backends.triton import equation, launch

    _wrap(launch, "run", _triton_launch)
    _record_op(equation)


# CUDA --------------------------------------------------------------------------------------------

_MULTIPROCESSORS = 4  # of the emulator, with one block at a time each


def _cuda_launch(name: str, at: Tensor, touched: dict[str, Tensor | None], *args: Any) -> None:
    t = {key: value for key, value in touched.items() if value is not None}
    if name in ("gemm", "decode"):
        _cuda_base(name, t, *args)
    elif name == "thin":
        over_rows, (size, J, R, per_split, splits) = args[2], args[5:]
        parts = {"columns" if over_rows else "rows": (size, 64), "ranks": (R, 64 if R > 16 else 16)}
        kernel, options = (
            "thin, over rows" if over_rows else name,
            _some(column_scale="v_scale" in t),
        )
        note("cuda", kernel, options, **parts, splits=splits, sum=(min(J, per_split), 32))
    elif name == "pair":
        N, R, per_split, splits, rows = args[7:]
        options, steps = _some(column_scale="v_scale" in t), _tiles(min(N, per_split), 64)
        note("cuda", name, options, rows=rows, ranks=(R, 16), splits=splits, sum=steps)
    elif name == "column_sums":
        _, N, _, splits = args[3:]
        note("cuda", name, _some(column_scale="z" in t), columns=(N, 128), splits=splits)
    elif name == "reduce":
        splits, rows, ranks = t["partials"].shape
        note("cuda", name, _some(gate="gate" in t), elements=(rows * ranks, 128), splits=splits)


def _cuda_base(name: str, t: dict[str, Tensor], *args: Any) -> None:
    """A kernel that makes the base GEMM."""
    (M, N), K, R = t["y"].shape, t["x"].shape[1], t["q"].shape[0]
    options = _some(gate="gate" in t, column_scale="out_scale" in t, four_bit="packed" in t)
    kernel = name + (", dx" if _backward else "")
    if name == "gemm":
        _, splits, _, per_split = args
        parts = {"rows": (M, 64), "columns": (N, 128), "ranks": (R, 16)}
        note("cuda", kernel, options, **parts, sum=(min(K, per_split), 64), splits=splits)
        if splits > 1:
            note("cuda", "finish", options & {"column scale"}, elements=(M * N, 128), splits=splits)
    else:
        splits = t["partials"].shape[0]
        parts = {"tiles": (_tiles(N, 16), _MULTIPROCESSORS), "rows": (M, 8), "chunks": (K, 8 * 128)}
        note("cuda", name, options, **parts, splits=splits, sum=(_tiles(K, splits), 256))


def _record_cuda() -> None:
    if cuda.emulator_unavailable_reason() is not None:
        return
    from lora_kernels.backends.cuda import equation, launch

    _wrap(launch, "run", _cuda_launch)
    _record_op(equation)


# CPU ---------------------------------------------------------------------------------------------


@functools.cache
def _constants(isa: str) -> dict[str, int]:
    """The sizes of parts, as the unit of this instruction set was compiled with."""
    values: dict[str, int] = {}
    vector = "avx512" if isa.startswith("avx512") else isa
    units = ("kernels", "streamed", "few_rows", "row_norm", "product")
    for file in (f"vec_{vector}", "kernels", *(f"{unit}_impl" for unit in units)):
        text = (ROOT / f"csrc/cpu/{file}.h").read_text()
        for name, value in re.findall(r"^constexpr \w+ (\w+) = ([^;?<]+);", text, re.MULTILINE):
            expression = re.sub(r"\b[A-Za-z_]\w*", lambda m: str(values.get(m[0], "")), value)
            if re.fullmatch(r"[\d\s*+<()-]+", expression):
                values[name] = eval(expression)
    # Elements of the longest sum of `product`: of float32, or of pairs of bfloat16.
    values["CHAIN"], values["PAIR_CHAIN"] = 160, 2 * 1024
    return values


_F32, _BF16 = 0, 1


def _threads(work: int, threads: int, parts: int) -> int:
    return 1 if work < 1 << 16 else min(threads, parts)


def _cpu(kernel: str, options: set[str], **parts: Count) -> None:
    assert native.isa is not None
    if native.isa != "amxbf16":  # whose kernels are others
        note("cpu", kernel, options, native.isa, **parts)


class _Sizes(NamedTuple):
    """The sizes of a GEMM: M rows, N columns, K elements of the sum, R ranks, and its threads."""

    M: int
    N: int
    K: int
    R: int
    threads: int

    def share(self, work: int, parts: int) -> int:
        return _threads(work, self.threads, parts)


def _shrink(s: _Sizes, options: set[str]) -> None:
    c = _constants(str(native.isa))
    rows = _tiles(s.M, c["DOT_ROWS"])
    threads = s.share(s.M * s.K * s.R, rows)
    options = options & {"dropout", "adapters"}
    _cpu("shrink", options, threads=threads, rows=rows, spans=(s.K, 256 * c["W"]), ranks=(s.R, 4))


def _product(s: _Sizes, pairs: bool, options: set[str], dx: bool) -> None:
    c = _constants(str(native.isa))
    rows, columns = _tiles(s.M, c["Y_ROWS"]), _tiles(s.N, c["V"] * c["W"])
    parts: dict[str, Count] = {"rows": rows, "columns": columns, "ranks": (s.R, c["RANKS"])}
    parts["threads"] = s.share(s.M * s.N * s.K, rows * columns)
    parts["blocks_of_rows"] = s.M, c["BLOCK_ROWS"]
    parts["panels"] = s.K, c["PAIR_CHAIN" if pairs else "CHAIN"]
    _cpu("product" + ", dx" * dx, options, **parts)


def _expand(s: _Sizes, options: set[str], dx: bool) -> None:
    c = _constants(str(native.isa))
    rows, columns = _tiles(s.M, c["ROWS"]), _tiles(s.N, c["PANEL"])
    parts = {"threads": s.share(s.M * s.N * s.R, rows * columns), "rows": rows, "columns": columns}
    _cpu("expand" + ", dx" * dx, options, **parts, ranks=(s.R, c["RANKS"]))


def _few_rows(s: _Sizes, itemsize: int, options: set[str]) -> None:
    c = _constants(str(native.isa))
    threads, four_bit = s.share(s.M * s.N * s.K, s.N), "4-bit" in options
    parts: dict[str, Count] = {"threads": threads, "ranks": (s.R, c["RANKS"])}
    parts["slabs"] = (s.M * s.K * itemsize, c["SLAB"]) if four_bit else (s.K, 160 * c["W"])
    parts["passes"] = s.M, c["CODED_PASS" if four_bit else "PASS"]
    parts["rows_of_W"] = s.N // threads, c["STREAMS"] * c["BLOCK"]
    _cpu("few_rows", options, **parts)


def _backward_pair(s: _Sizes, options: set[str]) -> None:
    c = _constants(str(native.isa))
    parts: dict[str, Count] = {"rows": (s.M, c["PAIR_ROWS"]), "columns": (s.N, 64)}
    parts["threads"] = s.share(s.M * s.N * s.R, max(1, s.M // c["PAIR_ROWS"]))
    options = options & {"gate", "column scale", "adapters"}
    _cpu("backward_pair", options, **parts, spans=(s.N, 256 * c["W"]), ranks=(s.R, 4))


def _grad_a(s: _Sizes, options: set[str]) -> None:
    c = _constants(str(native.isa))
    columns, ranks = _tiles(s.K, c["STRIP"]), _tiles(s.R, 4)
    parts = {"columns": columns, "ranks": ranks}
    threads = s.share(s.M * s.K * s.R, columns * ranks)
    options = options & {"dropout", "adapters"}
    _cpu("grad_a", options, **parts, threads=threads, rows=(s.M, c["DEPTH"]))


def _pairs(dtype: int) -> bool:
    return native.isa == "avx512bf16" and dtype == _BF16


class _Layer:
    """The arguments that the backend's `_pack_layer` packs."""

    def __init__(self, packed: Any) -> None:
        weight, codes, M, K, N, R, _, _, _, gate, c, _, mask, _, threads = packed
        self.sizes, self.transposed = _Sizes(M, N, K, R, threads), _Sizes(M, K, N, R, threads)
        self.base, self.dropout = bool(weight or codes), _some(dropout=mask[0])
        self.factors, self.four_bit = _some(gate=gate, column_scale=c), _some(four_bit=codes)


def _lora_linear(layer: Any, forward: Any) -> None:
    a, (_, xs, few_rows, *_) = _Layer(layer), forward
    options = a.factors | a.four_bit
    if few_rows:
        _few_rows(a.sizes, 2 if _pairs(xs[1]) else 4, options | a.dropout)
        return
    _shrink(a.sizes, a.dropout)
    if a.base:
        _product(a.sizes, _pairs(xs[1]), options, False)
    else:
        _expand(a.sizes, options, False)


def _lora_linear_backward(layer: Any, backward: Any) -> None:
    a, (_, dz, _, _, _, dx, dA, *_) = _Layer(layer), backward
    _backward_pair(a.sizes, a.factors)
    if dA:
        _grad_a(a.sizes, a.dropout)
    if dx and a.base:
        _product(a.transposed, _pairs(dz[1]), a.dropout | a.four_bit, True)
    elif dx:
        _expand(a.transposed, a.dropout, True)


def _adapters(adapters: Any, s: _Sizes, options: set[str]) -> Iterator[_Sizes]:
    """Rows, rank and threads of what the kernels take of each."""
    threads, work = s.threads, s.M * (s.K + s.N) * s.R
    shared = threads > 1 and len(adapters) >= 2 * threads and work >= 1 << 16
    for start, stop, _, _, rank, *_ in adapters:
        yield s._replace(M=stop - start, R=rank, threads=1 if shared else threads)
    if shared:
        _cpu("multi_lora_linear", options, adapters_of_a_thread=len(adapters) // threads)


def _multi_lora_linear(layer: Any, adapters: Any, forward: Any) -> None:
    a, (_, xs, few_rows, *_) = _Layer(layer), forward
    if few_rows:
        _few_rows(a.sizes._replace(R=0), 4, a.four_bit)
    elif a.base:
        _product(a.sizes._replace(R=0), _pairs(xs[1]), a.four_bit, False)
    for own in _adapters(adapters, a.sizes, a.dropout):
        _shrink(own, a.dropout)
        _expand(own, set(), False)


def _multi_lora_linear_backward(layer: Any, adapters: Any, backward: Any) -> None:
    a, (_, dz, _, _, _, dx, *_) = _Layer(layer), backward
    if dx and a.base:
        _product(a.transposed._replace(R=0), _pairs(dz[1]), a.four_bit, True)
    for own in _adapters(adapters, a.sizes, a.dropout):
        _backward_pair(own, set())
        _grad_a(own, a.dropout)
        if dx:
            _expand(own._replace(N=own.K, K=own.N), a.dropout, True)


def _row_norm(args: Any) -> None:
    _, codes, _, _, gate, N, K, R, *_, threads = args
    c = _constants(str(native.isa))
    parts: dict[str, Count] = {"rows": (N, 16 * c["Y_ROWS"]), "columns": (K, c["NORM_COLUMNS"])}
    parts["threads"] = _threads(N * K * R, threads, _tiles(N, c["Y_ROWS"]))
    _cpu("row_norm", _some(gate=gate, four_bit=codes), **parts, ranks=(R, c["RANKS"]))


def _quantize(*a: Any) -> None:
    _cpu("quantize", {"4-bit"}, threads=_threads(a[2], a[-1], a[2] // a[3]))


def _dequantize(*a: Any) -> None:
    _cpu("dequantize", {"4-bit"}, threads=_threads(a[2] * a[4], a[-1], a[2]))


def _library_base(xs: Tensor, weight: Any, shape: Any, dtype: Any, y_dtype: Any) -> None:
    _library("", weight, shape, dtype)


def _library_dx(dz: Tensor, weight: Any, shape: Any, dtype: Any, x_dtype: Any) -> None:
    _library(", dx", weight, shape[::-1], dtype)


def _library(dx: str, weight: Any, shape: tuple[int, int], dtype: Any) -> None:
    if isinstance(weight, Packed4bit):
        _cpu(f"library product{dx}", {"4-bit"}, panels=len(list(cpu._panels(*shape, dtype))))


_NATIVE = (_lora_linear, _lora_linear_backward, _multi_lora_linear, _multi_lora_linear_backward)
_NATIVE += (_row_norm, _quantize, _dequantize)


def _record_cpu() -> None:
    if native.module is None:
        return
    for before in _NATIVE:
        _wrap(native.module, before.__name__.removeprefix("_"), before)
    _wrap(cpu, "_library_base", _library_base)
    _wrap(cpu, "_library_dx", _library_dx)
    _record_op(cpu, "multi_lora_linear")


# eager -------------------------------------------------------------------------------------------


def _norm_by_panels(weight: Any, A: Tensor, B: Tensor, scaling: float) -> None:
    step = max(64, eager.PANEL // (A.shape[1] * A.dtype.itemsize))
    options = _some(gate=_gated, four_bit=isinstance(weight, Packed4bit))
    note("eager", "dora_norm", options, panels=_tiles(B.shape[0], step))


_gated = False


def _dora_norm(weight: Any, A: Any, B: Any, scaling: Any, gate: Any) -> None:
    global _gated
    _gated = gate is not None


def _column_dot(dy: Tensor, z: Tensor, dtype: Any) -> None:
    if dy.dtype is z.dtype and dy.dtype in (torch.bfloat16, dtype):
        return
    rows = max(eager.UPCAST_ROWS, 4 * eager.PANEL // max(1, dy.shape[1] * dtype.itemsize))
    note("eager", "column_dot", {"column scale"}, panels=_tiles(dy.shape[0], rows))


def _multi(operands: MultiOperands, *_: Any) -> None:
    four_bit = isinstance(operands.weight, Packed4bit)
    options = _some(dropout=operands.rng is not None, four_bit=four_bit, adapters=True)
    note(
        "eager",
        "multi_lora_linear",
        options,
        adapters=len(set(operands.adapter_index.tolist()) - {-1}),
    )


def _record_eager() -> None:
    _wrap(eager, "dora_norm", _dora_norm)
    _wrap(eager, "_norm_by_panels", _norm_by_panels)
    _wrap(eager, "_column_dot", _column_dot)
    _wrap(eager, "multi_lora_linear", _multi)


# pytest ------------------------------------------------------------------------------------------


def pytest_configure() -> None:
    for record in (_record_triton, _record_cuda, _record_cpu, _record_eager):
        record()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    global _test
    _test = item.nodeid.partition("[")[0]
    try:
        return (yield)
    finally:
        _test = ""


def pytest_sessionfinish() -> None:
    if path := os.environ.get("LORA_KERNELS_PARTITIONS"):
        Path(path).write_text(json.dumps({"found": found, "largest": largest}, indent=1))
