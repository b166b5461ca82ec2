"""How many kernels a layer compiles as the rows of x vary, counted without compiling any.

python -m tests.compile_only.specializations
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from triton import knobs

from tests.compile_only.calls import Call
from tests.compile_only.targets import compiled

ROWS = (1, 2, 3, 7, 8, 16, 17, 33, 48, 64, 65, 100, 128, 250, 1000, 4096)


def count(call: Call, target: str = "sm90") -> Counter[str]:
    """Kernel -> how many of it the forward and the backward of this layer compile over ROWS."""
    found: set[tuple[str, str]] = set()

    def note(*, key: Any, fn: Any, **_: Any) -> bool:
        found.add((fn.name, str(key)))
        return True  # no need to compile it

    knobs.runtime.jit_cache_hook = note
    try:
        for M in ROWS:
            for backward in (False, True):
                for _ in compiled(target, replace(call, M=M, backward=backward).run):
                    pass
    finally:
        knobs.runtime.jit_cache_hook = None
    return Counter(name for name, _ in found)


def main() -> None:
    print(f"kernels compiled for a 4096×4096 layer over {len(ROWS)} values of M")
    for quant in ("", "whole"):
        kernels = count(Call(0, quant=quant))
        each = ", ".join(f"{name} {n}" for name, n in sorted(kernels.items()))
        print(f"{'4-bit' if quant else 'dense'}: {kernels.total()} ({each})")


if __name__ == "__main__":
    main()
