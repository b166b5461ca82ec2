"""Kernels cut into many parts, by two threads. Each case says the parts that it is there for."""

import pytest
import torch

import lora_kernels
from lora_kernels.backends.cpu import heuristics as cpu_heuristics
from lora_kernels.backends.cpu import linear as cpu
from lora_kernels.backends.eager import norm, products
from lora_kernels.oracle.case import Case
from lora_kernels.oracle.multi_case import MultiCase
from lora_kernels.quantization import quantize_4bit
from tests.ops import parts
from tests.ops.engines import every_engine, every_native_engine
from tests.support import codec, exact
from tests.support.engines import check, check_norm

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
two_threads = pytest.mark.parametrize("threads", [2], indirect=True)


def assert_cut(engine: str, names: tuple[str, ...], *found: dict[str, int]) -> None:
    """Fail unless the engine's kernels cut what the names say into two parts or more."""
    everything = {name: n for each in found for name, n in each.items()}
    uncut = [name for name in names if everything[name] < 2]
    assert not uncut, f"{engine}: in one part: {', '.join(uncut)}"


def unit(engine: str) -> str:
    """Return the instruction set whose constants count; AMX's own tiles are larger."""
    return engine.partition(" ")[0].replace("amxbf16", "avx512bf16")


def exact_case(*sizes: int, dtype: torch.dtype = f32) -> Case:
    return exact.integers(*sizes, dtype=dtype, **exact.OPTIONS)


ROWS = ("rows of product", "blocks of rows", "rows of expand", "ranks", "threads of y")
ROWS += ("threads of dx", "rows of P", "ranks of P", "threads of P", "rows of dS", "threads of dS")
ROWS += ("rows of dA", "threads of dA")
COLUMNS = ("columns of y", "columns of dx", "columns of dB", "columns of dA")
SUM_Y, SUM_DX = (*ROWS, "panels of y", "columns of dx"), (*ROWS, "panels of dx", "columns of y")


@two_threads
@every_native_engine
@pytest.mark.parametrize(
    ("sizes", "dtype", "blocksize", "names"),
    [
        ((970, 170, 170, 70), f32, 0, (*ROWS, *COLUMNS, "panels of y", "panels of dx")),
        ((970, 170, 170, 70), f32, 64, (*ROWS, *COLUMNS, "panels of y", "panels of dx")),
        ((970, 70, 2056, 70), bf16, 0, SUM_Y),
        ((970, 2056, 70, 70), bf16, 32, SUM_DX),
        ((970, 70, 2056, 70), bf16, 64, SUM_Y),
        ((70, 20, 4200, 5), f32, 0, ("spans of P",)),
        ((70, 4200, 20, 5), f32, 0, ("spans of dS",)),
    ],
    ids=lambda each: "" if isinstance(each, tuple) and isinstance(each[0], str) else str(each),
)
def test_lora_linear_of_many_parts_is_exact(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    blocksize: int,
    names: tuple[str, ...],
    threads: int,
    engine: str,
) -> None:
    if dtype is bf16 and cpu.FUSED not in engine:
        pytest.skip("the library makes the product")  # and rounds it
    isa, M, N, K, R = unit(engine), *sizes
    products = parts.of_products(isa, M, N, K, R, isa == "avx512bf16" and dtype is bf16)
    assert_cut(engine, names, products, parts.of_thin_products(isa, M, N, K, R))
    exact.check(exact_case(*sizes, dtype=dtype), blocksize)


@two_threads
@every_native_engine
@pytest.mark.parametrize(
    ("K", "dtype", "blocksize"),
    [(2600, f32, 0), (2600, bf16, 0), (1408, f32, 64), (1408, bf16, 64)],
)
def test_few_rows_of_many_parts_are_exact(
    K: int, dtype: torch.dtype, blocksize: int, threads: int, engine: str
) -> None:
    """Rows of x in two passes, K in slabs or chains, and rows of W in two blocks a thread."""
    isa = engine.partition(" ")[0]
    rows = min(9, cpu_heuristics.few_rows(dtype, bool(blocksize), 0, isa=isa))
    if not rows:
        pytest.skip("the library makes the product")
    names = "threads", "ranks", "slabs", "rows of W", *["passes"] * (isa != "scalar")
    sizes, itemsize = (rows, 300, K, 70), 2 if isa == "avx512bf16" and dtype is bf16 else 4
    if isa != "amxbf16":  # which takes fewer rows
        assert_cut(engine, names, parts.of_few_rows(isa, *sizes, itemsize, bool(blocksize)))
    with lora_kernels.backend("cpu", cpu.GEMV_QUANTIZED if blocksize else cpu.GEMV):
        exact.check(exact_case(*sizes, dtype=dtype), blocksize)


@two_threads
@every_native_engine
@pytest.mark.parametrize("sizes", [(260, 140, 4200), (260, 4200, 140)], ids=str)
def test_adapters_of_many_parts_are_close(
    sizes: tuple[int, int, int], threads: int, engine: str
) -> None:
    """Both threads take part in each adapter's rows; one adapter has half."""
    M, N, K = sizes
    isa = unit(engine)
    products = parts.of_products(isa, M // 2, N, K, 70, pairs=False)
    names = "rows of expand", "ranks", "columns of y" if N > K else "columns of dx"
    names += ("spans of dS" if N > K else "spans of P", "rows of P", "rows of dS", "rows of dA")
    assert_cut(engine, names, products, parts.of_thin_products(isa, M // 2, N, K, 70))
    check(MultiCase(*sizes, (5, 3, 70), "mixed", bias=False, dropout_p=0.5))


@two_threads
@every_native_engine
def test_adapters_shared_among_threads_are_close(threads: int, engine: str) -> None:
    ranks = 4, 16, 7, 1, 5, 8
    assert len(ranks) // threads > 1  # adapters of a thread
    check(MultiCase(150, 130, 200, ranks, "mixed", dropout_p=0.5))


@every_engine
def test_several_adapters_are_close(engine: str) -> None:
    check(MultiCase(40, 65, 96, rows="mixed", quant="nf4-64", bias=False, dropout_p=0.5))


@two_threads
@every_native_engine
@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_dora_norm_of_many_parts_is_close(quant: str, threads: int, engine: str) -> None:
    found = parts.of_row_norm(unit(engine), 260, 530, 70)
    assert_cut(engine, (*found,), found)
    check_norm(Case(0, 260, 530, 70, f32, quant=quant, gate=True))


@two_threads
@every_native_engine
@pytest.mark.parametrize("last", codec.LAST_BLOCKS)
def test_quantize_of_many_parts_is_bitwise(last: str, threads: int, engine: str) -> None:
    values, isa = codec.weight_of_blocks(1094, last), unit(engine)
    counts = parts.threads_of(isa, values.numel(), 1094), parts.threads_of(isa, 70000, 100)
    assert counts == (2, 2)
    codec.check_quantize(values)
    codec.check_decode(quantize_4bit(values[:70000].view(100, 700), "nf4", 64, False), f32)


@every_native_engine
def test_panels_of_a_decoded_weight_are_exact(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "PANEL", 1)
    assert len([*cpu._panels(136, 140, f32)]) > 1 and len([*cpu._panels(140, 136, f32)]) > 1
    with lora_kernels.backend("cpu", cpu.LIBRARY):
        exact.check(exact_case(40, 136, 140, 5), 32)


@pytest.mark.parametrize("quant", ["", "nf4-64"])
def test_dora_norm_by_panels_is_close(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of 64 rows."""
    monkeypatch.setattr(norm, "PANEL", 1)
    with lora_kernels.backend("eager"):
        check_norm(Case(0, 256, 65, 3, f32, quant=quant, gate=True))


def test_column_dot_by_panels_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of eight rows, the last one short."""
    monkeypatch.setattr(products, "PANEL", 1)
    case = Case(53, 64, 40, 5, f16, column_scale=True)
    with lora_kernels.backend("eager"), products.upcast_rows(8):
        check(case)
