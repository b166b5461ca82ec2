"""A pytest plugin that counts the parts of each launch: `pytest -p tests.partitions.record`.

It stands before the launchers of the backends and writes what each test ran to the file that
LORA_KERNELS_PARTITIONS names: {"backend/kernel/partition/option": {instruction set: test}}.
The instruction set is "" but for the CPU's kernels. The sizes of their parts are read from csrc.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lora_kernels.backends import cpu, cuda, eager, native, triton
from lora_kernels.core.packed4bit import Packed4bit

from .kernels import KERNELS, OPTIONS

ROOT = Path(__file__).resolve().parents[2]
found: dict[str, dict[str, str]] = defaultdict(dict)
largest: dict[str, int] = defaultdict(int)  # "backend/kernel/partition" -> the most parts of one
_test = ""
_several_adapters = _backward = False


def note(backend: str, kernel: str, options: set[str], isa: str = "", **parts: int) -> None:
    """One launch of the kernel, cut into so many parts."""
    known = KERNELS[backend][kernel]
    if _several_adapters:
        options |= {"adapters"}
    for name, count in parts.items():
        partition = name.replace("_", " ")
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
    """What is launched by this function is of several adapters, of a backward."""
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


def _record_op(owner: Any) -> None:
    for name in ("lora_linear", "multi_lora_linear"):
        _inside(owner, name, name.startswith("multi"), False)
        _inside(owner, f"{name}_backward", name.startswith("multi"), True)


# Triton ------------------------------------------------------------------------------------------


def _triton_launch(kernel: Any, grid: Any, config: Any, device: Any, *args: Any, **m: Any) -> None:
    a = dict(zip(kernel.arg_names, args, strict=False)) | m
    name = kernel.__name__.removesuffix("_kernel")
    adapters = _some(adapters=_several_adapters)
    if name == "linear":
        _triton_linear(a)
    elif name == "shrink":
        options = _some(dropout=a["MASK_IN"], column_scale=a["IN_SCALE"])
        rows, ranks, slots = grid
        steps = _tiles(a["k_share"], a["BLOCK_K"])
        note("triton", name, options, rows=rows, ranks=ranks, slots=slots, sum=steps)
    elif name == "outer":
        options = _some(dropout=a["MASK"], column_scale=a["V_SCALE"])
        columns, ranks, slots = grid
        steps = _tiles(min(a["M"], a["m_share"]), a["BLOCK_M"])
        note("triton", name, options, columns=columns, ranks=ranks, slots=slots, sum=steps)
    elif name == "shrink_outer":
        rows, slots = grid
        steps = _tiles(a["n_share"], a["BLOCK_N"])
        note("triton", name, _some(column_scale=a["V_SCALE"]), rows=rows, slots=slots, sum=steps)
    elif name == "reduce":
        options = _some(gate=a["GATE"], column_scale=a["SUM_Z"]) | adapters
        note("triton", name, options, columns=grid[0], slots=a["parts"])
    elif name == "row_norm":
        note(
            "triton", name, _some(gate=a["GATE"], four_bit=a["CODES"]), rows=grid[0],
            slots=grid[1], sum=_tiles(min(a["K"], a["k_share"]), a["BLOCK_K"]),
            ranks=1 if a["ONE_BLOCK"] else _tiles(a["R"], a["BLOCK_R"]),
        )  # fmt: skip
    elif name == "dequantize":
        note("triton", name, {"4-bit"}, rows=grid[0], columns=grid[1])
    elif name == "quantize":
        note("triton", name, {"4-bit"}, blocks=grid[0])


def _triton_linear(a: dict[str, Any]) -> None:
    forward = a["K_INNER"]
    rows, columns = _tiles(a["M"], a["BLOCK_M"]), _tiles(a["N"], a["BLOCK_N"])
    steps, ranks = _tiles(a["K"], a["BLOCK_K"]), _tiles(a["R"], a["BLOCK_R"])
    if a["BASE"] == "none":
        steps = 1
    way, parts = "split", {"rows": rows, "columns": columns, "sum": steps, "ranks": ranks}
    options = _some(
        dropout=a["MASK_OUT"], gate=a["GATE"], four_bit=a["BASE"] == "codes",
        column_scale=a["OUT_SCALE"] if forward else a["IN_SCALE"],
    )  # fmt: skip
    slots = a["slots"]
    if a["PUBLISH"] and not a["CONSUME"]:
        way, parts = "publish", {"slots": slots, "sum": _tiles(a["k_share"], a["BLOCK_K"])}
        options = _some(dropout=a["MASK_IN"], column_scale=a["IN_SCALE"])
    elif a["CONSUME"]:
        way, parts = "consume", {"columns": columns, "sum": steps, "slots": slots}
    elif a["SINGLE_PASS"]:
        parts.pop("ranks")
        way, groups = "single pass", _tiles(rows, a["GROUP_M"])
        parts["groups_of_rows"] = groups
        options |= _some(dropout=a["MASK_IN"])
    elif a["BASE"] == "library":
        way = "library"
        parts.pop("sum")
        parts["slots"] = slots
        options -= {"column scale"} if not forward else set()
    else:
        parts["slots"] = slots
    note("triton", f"linear, {way}" + ("" if forward else ", dx"), options, **parts)


def _record_triton() -> None:
    if triton.absence() is not None:
        return
    from lora_kernels.backends.triton import equation, launch

    _wrap(launch, "run", _triton_launch)
    _record_op(equation)


# CUDA --------------------------------------------------------------------------------------------

_MULTIPROCESSORS = 4  # of the emulator, each of which has one block at a time


def _cuda_launch(name: str, at: Tensor, touched: dict[str, Tensor | None], *args: Any) -> None:
    t = {key: value for key, value in touched.items() if value is not None}
    dx = ", dx" if _backward else ""
    four_bit = "packed" in t
    if name in ("linear", "gemm", "decode"):
        (M, N), K, R = t["y"].shape, t["x"].shape[1], t["q"].shape[0]
        options = _some(
            dropout="mask" in t or "rng" in t, gate="gate" in t, column_scale="out_scale" in t,
            four_bit=four_bit,
        )  # fmt: skip
    if name == "linear":
        steps = _tiles(K, 32) if "w" in t or four_bit else 1
        note(
            "cuda", name + dx, options, rows=_tiles(M, 64), columns=_tiles(N, 64), sum=steps,
            ranks=_tiles(R, 32), spans=_tiles(steps, 4),
        )  # fmt: skip
    elif name == "gemm":
        _, splits, _, share = args
        note(
            "cuda", name + dx, options, rows=_tiles(M, 64), columns=_tiles(N, 128),
            sum=_tiles(min(K, share), 64), ranks=_tiles(R, 16), splits=splits,
        )  # fmt: skip
        if splits > 1:
            options &= {"column scale"}
            note("cuda", "finish", options, elements=_tiles(M * N, 128), splits=splits)
    elif name == "decode":
        slots = t["slots"].shape[0]
        tiles = _tiles(N, 16)
        note(
            "cuda", name + ("" if args[1] else ", two launches"), options,
            tiles=_tiles(tiles, _MULTIPROCESSORS), rows=_tiles(M, 8), chunks=_tiles(K, 8 * 128),
            slots=slots, sum=_tiles(_tiles(K, slots), 256),
        )  # fmt: skip
    elif name == "thin":
        over_rows, (size, J, R, share, slots) = args[3], args[6:]
        parts = {"columns" if over_rows else "rows": _tiles(size, 64)}
        note(
            "cuda", "thin, over rows" if over_rows else name,
            _some(dropout="rng" in t, column_scale="v_scale" in t), **parts,
            ranks=_tiles(R, 64 if R > 16 else 16), slots=slots, sum=_tiles(min(J, share), 32),
        )  # fmt: skip
    elif name == "pair":
        M, N, R, share, slots, rows = args[6:]
        note(
            "cuda", name, _some(column_scale="v_scale" in t), rows=rows, ranks=_tiles(R, 16),
            slots=slots, sum=_tiles(min(N, share), 64),
        )  # fmt: skip
    elif name == "column_sums":
        _, N, _, slots = args[3:]
        note("cuda", name, _some(column_scale="z" in t), columns=_tiles(N, 128), slots=slots)
    elif name == "reduce":
        slots, rows, ranks = t["slots"].shape
        note("cuda", name, _some(gate="gate" in t), elements=_tiles(rows * ranks, 128), slots=slots)
    elif name == "row_norm":
        slots, N = t["slots"].shape
        K = t["a"].shape[1]
        note(
            "cuda", name, _some(gate="gate" in t, four_bit=four_bit), rows=_tiles(N, 8),
            slots=slots, sum=_tiles(args[-2], 256),
        )  # fmt: skip
    elif name == "dequantize":
        note("cuda", name, {"4-bit"}, elements=_tiles(t["w"].numel(), 1024))
    elif name == "quantize":
        note("cuda", name, {"4-bit"}, blocks=_tiles(t["absmax"].numel(), 4))


def _record_cuda() -> None:
    if cuda.emulator_absence() is not None:
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
    for file in (
        f"vec_{vector}.h", "kernels.h", "kernels_impl.h", "streamed_impl.h", "few_rows_impl.h",
        "row_norm_impl.h", "product_impl.h",
    ):  # fmt: skip
        text = (ROOT / "csrc/cpu" / file).read_text()
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


def _cpu(kernel: str, options: set[str], **parts: int) -> None:
    assert native.isa is not None
    if native.isa != "amxbf16":  # whose kernels are others
        note("cpu", kernel, options, native.isa, **parts)


def _shrink(M: int, K: int, R: int, threads: int, options: set[str]) -> None:
    c = _constants(str(native.isa))
    rows = _tiles(M, c["DOT_ROWS"])
    _cpu(
        "shrink", options & {"dropout", "adapters"}, threads=_threads(M * K * R, threads, rows),
        rows=rows, spans=_tiles(K, 256 * c["W"]), ranks=_tiles(R, 4),
    )  # fmt: skip


def _product(
    M: int, N: int, K: int, R: int, pairs: bool, threads: int, options: set[str], dx: bool
) -> None:
    c = _constants(str(native.isa))
    rows, columns = _tiles(M, c["Y_ROWS"]), _tiles(N, c["V"] * c["W"])
    _cpu(
        "product" + ", dx" * dx, options, rows=rows, columns=columns,
        threads=_threads(M * N * K, threads, rows * columns),
        blocks_of_rows=_tiles(M, c["BLOCK_ROWS"]),
        panels=_tiles(K, c["PAIR_CHAIN"] if pairs else c["CHAIN"]), ranks=_tiles(R, c["RANKS"]),
    )  # fmt: skip


def _expand(M: int, N: int, R: int, threads: int, options: set[str], dx: bool) -> None:
    c = _constants(str(native.isa))
    rows, columns = _tiles(M, c["ROWS"]), _tiles(N, c["PANEL"])
    _cpu(
        "expand" + ", dx" * dx, options, rows=rows, columns=columns,
        threads=_threads(M * N * R, threads, rows * columns), ranks=_tiles(R, c["RANKS"]),
    )  # fmt: skip


def _few_rows(
    M: int, N: int, K: int, R: int, itemsize: int, threads: int, options: set[str]
) -> None:
    c = _constants(str(native.isa))
    threads = _threads(M * N * K, threads, N)
    four_bit = "4-bit" in options
    slabs = _tiles(M * K * itemsize, c["SLAB"]) if four_bit else _tiles(K, 160 * c["W"])
    _cpu(
        "few_rows", options, threads=threads, slabs=slabs, ranks=_tiles(R, c["RANKS"]),
        passes=_tiles(M, c["CODED_PASS"] if four_bit else c["PASS"]),
        rows_of_W=_tiles(N // threads, c["STREAMS"] * c["BLOCK"]),
    )  # fmt: skip


def _backward_pair(M: int, N: int, R: int, threads: int, options: set[str]) -> None:
    c = _constants(str(native.isa))
    rows = _tiles(M, c["PAIR_ROWS"])
    _cpu(
        "backward_pair", options & {"gate", "column scale", "adapters"}, rows=rows,
        threads=_threads(M * N * R, threads, max(1, M // c["PAIR_ROWS"])), columns=_tiles(N, 64),
        spans=_tiles(N, 256 * c["W"]), ranks=_tiles(R, 4),
    )  # fmt: skip


def _grad_a(M: int, K: int, R: int, threads: int, options: set[str]) -> None:
    c = _constants(str(native.isa))
    columns, ranks = _tiles(K, c["STRIP"]), _tiles(R, 4)
    _cpu(
        "grad_a", options & {"dropout", "adapters"}, columns=columns, ranks=ranks,
        threads=_threads(M * K * R, threads, columns * ranks), rows=_tiles(M, c["DEPTH"]),
    )  # fmt: skip


def _pairs(dtype: int) -> bool:
    return native.isa == "avx512bf16" and dtype == _BF16


class _Layer:
    """What `_pack_layer` of the backend packs."""

    def __init__(self, packed: Any) -> None:
        weight, self.codes, *sizes, _, _, _, self.gate, self.c, _, mask, _, self.threads = packed
        self.sizes, self.dropout, self.base = sizes, _some(dropout=mask[0]), weight or self.codes
        self.four_bit = _some(four_bit=self.codes)


def _lora_linear(layer: Any, forward: Any) -> None:
    a, (_, xs, few_rows, *_) = _Layer(layer), forward
    M, K, N, R = a.sizes
    options = _some(gate=a.gate, column_scale=a.c) | a.four_bit
    if few_rows:
        itemsize = 2 if _pairs(xs[1]) else 4
        _few_rows(M, N, K, R, itemsize, a.threads, options | a.dropout)
        return
    _shrink(M, K, R, a.threads, a.dropout)
    if a.base:
        _product(M, N, K, R, _pairs(xs[1]), a.threads, options, False)
    else:
        _expand(M, N, R, a.threads, options, False)


def _lora_linear_backward(layer: Any, backward: Any) -> None:
    a, (_, dz, _, _, _, dx, dA, *_) = _Layer(layer), backward
    M, K, N, R = a.sizes
    _backward_pair(M, N, R, a.threads, _some(gate=a.gate, column_scale=a.c))
    if dA:
        _grad_a(M, K, R, a.threads, a.dropout)
    if dx and a.base:
        _product(M, K, N, R, _pairs(dz[1]), a.threads, a.dropout | a.four_bit, True)
    elif dx:
        _expand(M, K, R, a.threads, a.dropout, True)


def _adapters(adapters: Any, a: _Layer) -> Iterator[Any]:
    """Rows, rank and threads of what the kernels take of each."""
    (M, K, N, R), threads = a.sizes, a.threads
    shared = threads > 1 and len(adapters) >= 2 * threads and M * (K + N) * R >= 1 << 16
    for start, stop, _, _, rank, *_ in adapters:
        yield stop - start, rank, 1 if shared else threads
    if shared:
        _cpu("multi_lora_linear", _shared, adapters_of_a_thread=len(adapters) // threads)


_shared: set[str] = set()


def _multi_lora_linear(layer: Any, adapters: Any, forward: Any) -> None:
    global _shared
    a, (_, xs, few_rows, *_) = _Layer(layer), forward
    (M, K, N, _), _shared = a.sizes, a.dropout
    if few_rows:
        _few_rows(M, N, K, 0, 4, a.threads, a.four_bit)
    elif a.base:
        _product(M, N, K, 0, _pairs(xs[1]), a.threads, a.four_bit, False)
    for rows, rank, own in _adapters(adapters, a):
        _shrink(rows, K, rank, own, a.dropout)
        _expand(rows, N, rank, own, set(), False)


def _multi_lora_linear_backward(layer: Any, adapters: Any, backward: Any) -> None:
    global _shared
    a, (_, dz, _, _, _, dx, *_) = _Layer(layer), backward
    (M, K, N, _), _shared = a.sizes, a.dropout
    if dx and a.base:
        _product(M, K, N, 0, _pairs(dz[1]), a.threads, a.four_bit, True)
    for rows, rank, own in _adapters(adapters, a):
        _backward_pair(rows, N, rank, own, set())
        _grad_a(rows, K, rank, own, a.dropout)
        if dx:
            _expand(rows, K, rank, own, a.dropout, True)


def _row_norm(args: Any) -> None:
    _, codes, _, _, gate, N, K, R, *_, threads = args
    c = _constants(str(native.isa))
    _cpu(
        "row_norm", _some(gate=gate, four_bit=codes), rows=_tiles(N, 16 * c["Y_ROWS"]),
        threads=_threads(N * K * R, threads, _tiles(N, c["Y_ROWS"])),
        columns=_tiles(K, c["NORM_COLUMNS"]), ranks=_tiles(R, c["RANKS"]),
    )  # fmt: skip


def _quantize(*a: Any) -> None:
    _cpu("quantize", {"4-bit"}, threads=_threads(a[2], a[-1], a[2] // a[3]))


def _dequantize(*a: Any) -> None:
    _cpu("dequantize", {"4-bit"}, threads=_threads(a[2] * a[4], a[-1], a[2]))


def _panels_of(size: int, length: int, dtype: Any) -> int:
    return len(list(cpu._panels(size, length, dtype)))


def _library_base(xs: Tensor, weight: Any, shape: Any, dtype: Any, y_dtype: Any) -> None:
    if isinstance(weight, Packed4bit):
        N, K = shape
        _cpu("library product", {"4-bit"}, panels=_panels_of(N, K, dtype))


def _library_dx(dz: Tensor, weight: Any, shape: Any, dtype: Any, x_dtype: Any) -> None:
    if isinstance(weight, Packed4bit):
        N, K = shape
        _cpu("library product, dx", {"4-bit"}, panels=_panels_of(K, N, dtype))


def _record_cpu() -> None:
    if native.module is None:
        return
    for name, before in {
        "lora_linear": _lora_linear,
        "lora_linear_backward": _lora_linear_backward,
        "multi_lora_linear": _multi_lora_linear,
        "multi_lora_linear_backward": _multi_lora_linear_backward,
        "row_norm": _row_norm,
        "quantize": _quantize,
        "dequantize": _dequantize,
    }.items():
        _wrap(native.module, name, before)
    _wrap(cpu, "_library_base", _library_base)
    _wrap(cpu, "_library_dx", _library_dx)
    _record_op(cpu)


# eager -------------------------------------------------------------------------------------------


def _norm_by_panels(weight: Any, A: Tensor, B: Tensor, scaling: float) -> None:
    step = max(64, eager.PANEL // (A.shape[1] * A.dtype.itemsize))
    options = _some(gate=_gated, four_bit=isinstance(weight, Packed4bit))
    note("eager", "dora_norm", options, panels=_tiles(B.shape[0], step))


_gated = False


def _dora_norm(weight: Any, A: Any, B: Any, scaling: Any, gate: Any, squares: Any = None) -> None:
    global _gated
    _gated = gate is not None


def _column_dot(dy: Tensor, z: Tensor, dtype: Any) -> None:
    if dy.dtype is z.dtype and dy.dtype in (cpu.torch.bfloat16, dtype):
        return
    rows = max(eager.UPCAST_ROWS, 4 * eager.PANEL // max(1, dy.shape[1] * dtype.itemsize))
    note("eager", "column_dot", {"column scale"}, panels=_tiles(dy.shape[0], rows))


def _multi(x: Tensor, weight: Any, lora_A: Any, lora_B: Any, index: Tensor, *rest: Any) -> None:
    options = _some(dropout=rest[2], four_bit=isinstance(weight, Packed4bit), adapters=True)
    note("eager", "multi_lora_linear", options, adapters=len(set(index.tolist()) - {-1}))


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
