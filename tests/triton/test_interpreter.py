"""Errors of tests/support/interpreter.py for kernels with a mistake."""

import pytest
import torch
import triton
import triton.language as tl

from lora_kernels.backends.triton import is_interpreted
from tests.support import interpreter

BLOCK = 16
N = 2 * BLOCK + 3


@triton.jit
def faulty_kernel(y_ptr, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add 1 to n elements, with one mistake."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    if FAULT == "a store twice":
        tl.store(y_ptr + at, at.to(tl.float32), mask=mask)
    if FAULT == "two programs in one place":
        at = at - tl.program_id(0)
    if FAULT == "an element too many":
        mask = at < n + 1
    if FAULT == "an element too few":
        mask = at < n - 1
    y = tl.load(y_ptr + at, mask=mask, other=0.0)
    if FAULT == "a neighbour's element":
        y = tl.load(y_ptr + at + 1, mask=at + 1 < n, other=0.0)
    tl.store(y_ptr + at, y + 1.0, mask=mask)
    if FAULT == "a load after the store":
        tl.load(y_ptr + at, mask=mask, other=0.0)


@pytest.mark.skipif(not is_interpreted(), reason="a GPU does not say what it stores")
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("", None),
        ("a store twice", r"programs \(0, 0, 0\) and \(0, 0, 0\) store to one address"),
        ("two programs in one place", r"programs \(0, 0, 0\) and \(1, 0, 0\) store to one address"),
        ("an element too many", "stores 1 elements outside of its outputs"),
        ("an element too few", f"1 of {N} elements not stored"),
        ("a neighbour's element", r"program \(0, 0, 0\) loads what is stored by another program"),
        ("a load after the store", "loads what .* was stored before"),
    ],
)
def test_launch_that_stores_or_loads_the_wrong_elements_raises(
    fault: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(interpreter.OUTPUTS, "faulty", lambda a: [a["y_ptr"]])
    memory = torch.zeros(N + 1)

    def launch() -> None:
        faulty_kernel[(3,)](y_ptr=memory[:N], n=N, FAULT=fault, BLOCK=BLOCK)

    with interpreter.programs_run_in(range):
        if said is None:
            launch()
            assert memory.tolist() == [1.0] * N + [0.0]
            return
        with pytest.raises(RuntimeError, match=said):
            launch()
