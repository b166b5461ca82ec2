"""Read and write budgets.json: a line for each kernel and call, in it a list for each target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.compile_only.machine_code import Code

FILE = Path(__file__).with_name("budgets.json")
FIELDS = ("registers", "shared")  # of a list; nvcc's kernels take their shared memory at launch


def read() -> dict[str, Any]:
    """Return the compilers' versions, "triton" and "nvcc", and "kernels" (Triton's) and "cuda".

    Those are dictionaries: kernel and call -> target -> numbers of FIELDS.
    """
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def excess(code: Code, limits: list[int] | None) -> list[str]:
    """Return what is above the budgets of a kernel."""
    if limits is None:
        return ["no budget: run with --write"]
    named = zip(FIELDS, limits, strict=False)
    return [f"{name} over {limit}" for name, limit in named if getattr(code, name) > limit]


def write(budgets: dict[str, Any]) -> None:
    """Write what `read` returns."""
    parts = [f'"{name}": {json.dumps(budgets[name])}' for name in ("triton", "nvcc")]
    for name in ("kernels", "cuda"):
        section = sorted(budgets[name].items())
        lines = (f"{json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in section)
        parts.append(f'"{name}": {{\n' + ",\n".join(lines) + "\n}")
    FILE.write_text("{\n" + ",\n".join(parts) + "\n}\n")
