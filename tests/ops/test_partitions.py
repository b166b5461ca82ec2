"""Kernels cut into many parts, by two threads. `python -m tests.partitions` counts them."""

import pytest
import torch

import lora_kernels
from lora_kernels.backends import cpu, cpu_heuristics, eager
from lora_kernels.bench.case import Case
from lora_kernels.bench.multi import MultiCase
from lora_kernels.quantization import quantize_4bit
from tests.ops.engines import every_engine, every_native_engine
from tests.support import codec, exact
from tests.support.engines import check, check_norm

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
two_threads = pytest.mark.parametrize("threads", [2], indirect=True)


def exact_case(*sizes: int, dtype: torch.dtype = f32) -> Case:
    return exact.integers(*sizes, dtype=dtype, **exact.OPTIONS)


# Of `expand` 96 rows and 128 columns, of `product` 960 rows, 64 columns and of the sum 160 float32
# or 2,048 bfloat16, of `shrink` and `backward_pair` a sum of 4,096, of all 64 ranks: and some more.
@two_threads
@every_native_engine
@pytest.mark.parametrize(
    ("sizes", "dtype", "blocksize"),
    [
        ((970, 170, 170, 70), f32, 0),
        ((970, 170, 170, 70), f32, 64),
        ((970, 70, 2056, 70), bf16, 0),
        ((970, 2056, 70, 70), bf16, 32),
        ((970, 70, 2056, 70), bf16, 64),
        ((70, 20, 4200, 5), f32, 0),
        ((70, 4200, 20, 5), f32, 0),
    ],
    ids=str,
)
def test_lora_linear_of_many_parts_is_exact(
    sizes: tuple[int, ...], dtype: torch.dtype, blocksize: int, threads: int, engine: str
) -> None:
    if dtype is bf16 and cpu.FUSED not in engine:
        pytest.skip("the library makes the product")  # and rounds it
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
    with lora_kernels.backend("cpu", cpu.GEMV_4BIT if blocksize else cpu.GEMV):
        exact.check(exact_case(rows, 300, K, 70, dtype=dtype), blocksize)


@two_threads
@every_native_engine
@pytest.mark.parametrize("sizes", [(260, 140, 4200), (260, 4200, 140)], ids=str)
def test_adapters_of_many_parts_are_close(
    sizes: tuple[int, int, int], threads: int, engine: str
) -> None:
    """Both threads take part in each adapter's rows; one adapter has half."""
    check(MultiCase(*sizes, (5, 3, 70), "mixed", bias=False, dropout_p=0.5))


@two_threads
@every_native_engine
def test_adapters_shared_among_threads_are_close(threads: int, engine: str) -> None:
    check(MultiCase(150, 130, 200, (4, 16, 7, 1, 5, 8), "mixed", dropout_p=0.5))


@every_engine
def test_several_adapters_are_close(engine: str) -> None:
    check(MultiCase(40, 65, 96, rows="mixed", quant="nf4-64", bias=False, dropout_p=0.5))


@two_threads
@every_native_engine
@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_dora_norm_of_many_parts_is_close(quant: str, threads: int, engine: str) -> None:
    check_norm(Case(0, 260, 530, 70, f32, quant=quant, gate=True))


@two_threads
@every_native_engine
@pytest.mark.parametrize("last", codec.LAST_BLOCKS)
def test_quantize_of_many_parts_is_bitwise(last: str, threads: int, engine: str) -> None:
    values = codec.weight_of_blocks(1094, last)
    codec.check_quantize(values)
    codec.check_decode(quantize_4bit(values[:70000].view(100, 700), "nf4", 64, False), f32)


@every_native_engine
def test_panels_of_a_decoded_weight_are_exact(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "PANEL", 1)
    with lora_kernels.backend("cpu", cpu.LIBRARY):
        exact.check(exact_case(40, 136, 140, 5), 32)


@pytest.mark.parametrize("quant", ["", "nf4-64"])
def test_dora_norm_by_panels_is_close(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "PANEL", 1)
    with lora_kernels.backend("eager"):
        check_norm(Case(0, 256, 65, 3, f32, quant=quant, gate=True))


def test_column_dot_by_panels_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of eight rows, the last one short."""
    monkeypatch.setattr(eager, "PANEL", 1)
    case = Case(53, 64, 40, 5, f16, column_scale=True)
    with lora_kernels.backend("eager"), eager.upcast_rows(8):
        check(case)
