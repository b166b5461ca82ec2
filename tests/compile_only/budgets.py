"""Read and write budgets.json: a line for each kernel and call, in it a list for each target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.compile_only.machine_code import LOOP

FILE = Path(__file__).with_name("budgets.json")
# The fields of a list, of the Triton kernels and of the CUDA ones. Triton's outside of the slice
# have the first six, since `bounds` needs the others.
_LAUNCH = ("warps", "stages", "programs")
FIELDS = {
    "kernels": ("registers", "shared", "matrix", "loop", "peak", "slice", *_LAUNCH, *LOOP),
    "cuda": ("registers", "matrix", "loop", "peak", *LOOP),
}


def read() -> dict[str, Any]:
    """Return the compilers' versions, "triton" and "nvcc", and for each of FIELDS a dictionary:
    target -> kernel and call -> field -> number."""
    budgets = json.loads(FILE.read_text())
    for section, fields in FIELDS.items():
        found: dict[str, dict[str, Any]] = {}
        for key, targets in budgets[section].items():
            for target, values in targets.items():
                found.setdefault(target, {})[key] = dict(zip(fields, values, strict=False))
        budgets[section] = found
    return budgets


def excess(entry: dict[str, Any], limit: dict[str, Any] | None) -> list[str]:
    """Return what is above the budgets of a kernel, as far as it has any."""
    if limit is None:
        return ["no budget: run with --write"]
    limits = {name: limit[name] for name in ("registers", "shared") if name in limit}
    return [f"{name} over {most}" for name, most in limits.items() if entry[name] > most]


def write(budgets: dict[str, Any]) -> None:
    """Write what `read` returns."""
    parts = [f'"{name}": {json.dumps(budgets[name])}' for name in ("triton", "nvcc")]
    for section, fields in FIELDS.items():
        by_key: dict[str, dict[str, list[Any]]] = {}
        for target, kernels in sorted(budgets[section].items()):
            for key, code in kernels.items():
                by_key.setdefault(key, {})[target] = [
                    code[field] for field in fields if field in code
                ]
        lines = (f"{json.dumps(key)}: {json.dumps(by_key[key])}" for key in sorted(by_key))
        parts.append(f'"{section}": {{\n' + ",\n".join(lines) + "\n}")
    FILE.write_text("{\n" + ",\n".join(parts) + "\n}\n")
