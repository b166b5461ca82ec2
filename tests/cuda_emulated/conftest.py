"""The CUDA kernels' sources, compiled for the host, run in the emulator; see csrc/emulator.

LORA_KERNELS_EMULATOR_SEEDS=20 runs each test that often, the threads of blocks in other orders.
"""

import os
import zlib
from collections.abc import Iterator

import pytest

import lora_kernels
from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import launch

if cuda.emulator_absence() is not None:
    collect_ignore_glob = ["test_*.py"]

SEEDS = int(os.environ.get("LORA_KERNELS_EMULATOR_SEEDS", "1"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if SEEDS > 1:
        metafunc.parametrize("seed", range(SEEDS), indirect=True)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Another for each test, the same whenever it runs."""
    return zlib.crc32(request.node.name.encode()) + getattr(request, "param", 0)


@pytest.fixture(autouse=True)
def emulated(seed: int) -> Iterator[None]:
    """The cuda backend is asked for, on four multiprocessors."""
    launch.traffic.clear()
    with cuda.emulate(seed), lora_kernels.backend("cuda"):
        yield
