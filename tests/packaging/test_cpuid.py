"""The instruction set that a processor and its operating system allow."""

import importlib.util
import platform
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from .conftest import ROOT, Project

SCALAR, AVX2, AVX512, AVX512BF16, AMXBF16 = range(5)

# Intel SDM volume 2, CPUID: leaf 1 ecx; leaf 7 ebx and edx; leaf 7 sub-leaf 1 eax. Volume 1, XCR0.
FMA, OSXSAVE, AVX, F16C = 1 << 12, 1 << 27, 1 << 28, 1 << 29
AVX2_BIT, BMI2, F512, DQ512, BW512, VL512 = 1 << 5, 1 << 8, 1 << 16, 1 << 17, 1 << 30, 1 << 31
BF16 = 1 << 5
AMX_BF16, AMX_TILE = 1 << 22, 1 << 24
SSE_STATE, YMM_STATE, OPMASK, ZMM_LOW, ZMM_HIGH = 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 7

LEAF1 = FMA | OSXSAVE | AVX | F16C
LEAF7_AVX2 = AVX2_BIT | BMI2
LEAF7 = LEAF7_AVX2 | F512 | DQ512 | BW512 | VL512
YMM = SSE_STATE | YMM_STATE
ZMM = YMM | OPMASK | ZMM_LOW | ZMM_HIGH
AMX, TILE_STATES = AMX_BF16 | AMX_TILE, (1 << 17, 1 << 18)
ALL = ZMM | sum(TILE_STATES)


@pytest.fixture(scope="module")
def native(built_project: Project) -> ModuleType:
    (path,) = built_project.extensions()
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_isa_with_everything_present_is_the_highest(native: ModuleType) -> None:
    assert native.isa_of(LEAF1, LEAF7, AMX, BF16, ALL) == AMXBF16
    assert native.isa_of(LEAF1, LEAF7, 0, BF16, ZMM) == AVX512BF16
    assert native.isa_of(LEAF1, LEAF7, 0, 0, ZMM) == AVX512
    assert native.isa_of(LEAF1, LEAF7, AMX, 0, ALL) == AVX512
    assert native.isa_of(LEAF1, LEAF7_AVX2, 0, 0, YMM) == AVX2
    assert native.isa_of(0, 0, 0, 0, 0) == SCALAR


@pytest.mark.parametrize("bit", [AMX_BF16, AMX_TILE, *TILE_STATES])
def test_isa_without_a_feature_of_tiles_is_avx512bf16(native: ModuleType, bit: int) -> None:
    assert native.isa_of(LEAF1, LEAF7, AMX & ~bit, BF16, ALL & ~bit) == AVX512BF16


@pytest.mark.parametrize("bit", [FMA, OSXSAVE, AVX, F16C])
def test_isa_without_a_feature_of_leaf_1_is_scalar(native: ModuleType, bit: int) -> None:
    assert native.isa_of(LEAF1 & ~bit, LEAF7, AMX, BF16, ALL) == SCALAR


@pytest.mark.parametrize(
    ("bit", "isa"),
    [(AVX2_BIT, SCALAR), (BMI2, SCALAR), *((b, AVX2) for b in (F512, DQ512, BW512, VL512))],
)
def test_isa_without_a_feature_of_leaf_7_is_lower(native: ModuleType, bit: int, isa: int) -> None:
    assert native.isa_of(LEAF1, LEAF7 & ~bit, AMX, BF16, ALL) == isa


@pytest.mark.parametrize(
    ("bit", "isa"),
    [(SSE_STATE, SCALAR), (YMM_STATE, SCALAR), (OPMASK, AVX2), (ZMM_LOW, AVX2), (ZMM_HIGH, AVX2)],
)
def test_isa_without_saved_registers_is_lower(native: ModuleType, bit: int, isa: int) -> None:
    assert native.isa_of(LEAF1, LEAF7, AMX, BF16, ALL & ~bit) == isa


def test_detect_isa_agrees_with_the_kernel_of_linux(native: ModuleType) -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists():
        pytest.skip("needs /proc/cpuinfo of an x86-64 machine")
    line = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    flags = set(line.split(":", 1)[1].split())
    has: Callable[[str], bool] = lambda names: set(names.split()) <= flags  # noqa: E731
    expected = SCALAR
    if has("avx fma f16c avx2 bmi2"):
        expected = AVX2
        if has("avx512f avx512bw avx512dq avx512vl"):
            expected = AVX512BF16 if has("avx512_bf16") else AVX512
            if has("avx512_bf16 amx_bf16 amx_tile"):
                expected = AMXBF16
    assert native.detect_isa() == expected


def test_the_package_and_the_extension_have_one_version(native: ModuleType) -> None:
    text = (ROOT / "lora_kernels" / "version.py").read_text()
    assert f'__version__ = "{native.version}"' in text
