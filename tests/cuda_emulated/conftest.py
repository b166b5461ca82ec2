"""The CUDA kernels' sources, compiled for the host, run in the emulator; see csrc/emulator.

LORA_KERNELS_EMULATOR_ORDERS=20 repeats each test until each of its launches has run that often, the
threads of its blocks in another order each time.
"""

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

import lora_kernels
from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import launch
from tests.support.emulator import emulator_unavailable_reason

if emulator_unavailable_reason() is not None:
    collect_ignore_glob = ["test_*.py"]

ORDERS = int(os.environ.get("LORA_KERNELS_EMULATOR_ORDERS", "1"))
launches: Counter[object] = Counter()
# By launcher, what its kernels store.
# "decode" stores as much of tile_partials as its blocks share.
OUTPUTS = {
    "gemm": ("y", "z", "partials"),
    "decode": ("y", "z", "partials", "p"),
    "thin": ("out",),
    "pair": ("ds_partials", "db_partials"),
    "column_sums": ("partials",),
    "reduce": ("out",),
}


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Force the cuda backend, on four multiprocessors; the first order is drawn from the
    test's name, each other from the one before. A launch must store its outputs as a whole."""
    launch.traffic.clear()
    launches.clear()
    emulate = launch.emulate

    def checked(name: str, touched: dict[str, Tensor], args: Any) -> None:
        launches[name, tuple((key, t.shape) for key, t in touched.items())] += 1
        emulate(name, touched, args)
        if launch._waiting is None:
            require_whole_outputs(name, touched)

    monkeypatch.setattr(launch, "emulate", checked)
    with cuda.emulate(zlib.crc32(request.node.name.encode())), lora_kernels.backend("cuda"):
        yield


def require_whole_outputs(name: str, touched: dict[str, Tensor]) -> None:
    """AssertionError unless the launch stored each byte of its outputs, and no other.

    The emulator lets no kernel store a byte twice, so that their number is enough.
    """
    stored: Counter[str] = Counter()
    for _, ranges in cuda.module().read_traffic():
        stored.update({key: written for key, (_, written) in ranges.items()})
    for key, t in touched.items():
        if key == "tile_partials":
            continue
        want = t.numel() * t.element_size() if key in OUTPUTS[name] else 0
        assert stored[key] == want, f"{name} stores {stored[key]} bytes of {key}, want {want}"


@pytest.fixture
def device() -> str:
    """The device of a test's tensors."""
    return "cpu"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if ORDERS == 1:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    for _ in range(ORDERS):
        launch.traffic.clear()
        pyfuncitem.obj(**arguments)
        if min(launches.values(), default=ORDERS) >= ORDERS:
            break
    return True
