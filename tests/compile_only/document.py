"""The tables of benchmarks/KERNELS.md and docs/gpu.md, from budgets.json and `configs.strategy`.

python -m tests.compile_only.document

It compiles nothing. It prints every bound (see `bounds`) of the kernels in budgets.json, in percent
of the roofline, and writes the tables.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from lora_kernels.backends.triton import configs
from tests.compile_only import bounds
from tests.compile_only.budgets import read
from tests.support.gpus import A100, H100

ROOT = Path(__file__).parents[2]
DOCUMENTS = ROOT / "benchmarks" / "KERNELS.md", ROOT / "docs" / "gpu.md"
NAMED = [(1024, "Llama-3-8B k, v"), (2048, "TinyLlama q, o"), (4096, "Llama-3-8B q, o, down")]
GPUS = {"A100": A100, "H100": H100}
SERVED = {"A100": "sm80", "RTX 4090": "sm89", "H100": "sm90", "B200": "sm100"}
# Percent, by the bounds.py and machine code of commit 021e06b with its N = 14336.
BEFORE = {
    "decode bfloat16 codes M8 x in shared memory": (58, 80, 42, 18),
    "decode bfloat16 codes M8 x from caches": (55, 72, 40, 17),
    "decode bfloat16 codes M16 x from caches": (47, 65, 34, 14),
    "decode bfloat16 dense M8 x in shared memory": (88, 94, 83, 66),
    "decode bfloat16 dense M16 x from caches": (77, 88, 68, 47),
}
CALLS = {  # of docs/gpu.md
    "1 row, 14336×4096 in 4 bits": "decode bfloat16 codes M8 x in shared memory",
    "16 rows, 14336×4096 in 4 bits": "decode bfloat16 codes M16 x from caches",
    "1 row, 14336×4096 dense": "decode bfloat16 dense M8 x in shared memory",
    "16 rows, 14336×4096 dense": "decode bfloat16 dense M16 x from caches",
    "4096 rows, 4096×4096 in 4 bits": "gemm bfloat16 codes y",
    "4096 rows, 4096×4096 dense": "gemm bfloat16 dense y",
}


def describe(found: dict[str, float] | None) -> str:
    """Return the least bound as "29% trips"; "–" if none is known."""
    if found is None:
        return "–"
    name, share = bounds.tightest(found)
    return f"{share:.0%} {name}"


def _by_target(kernels: dict[str, dict[str, str]]) -> str:
    """Lay out cells by kernel and target as a table, a row for each kernel."""
    rows = sorted({key for cells in kernels.values() for key in cells})
    lines = [f"| kernel | {' | '.join(kernels)} |", "|---" * (len(kernels) + 1) + "|"]
    for row in rows:
        cells = (cells.get(row, "") for cells in kernels.values())
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _blocks(target: str, code: dict[str, Any]) -> str:
    """Return a clause if a launch has fewer programs than the GPU has multiprocessors."""
    count = bounds.GPUS[target].multiprocessors if target in bounds.GPUS else 0
    return f" ({code['programs']} of {count} SMs)" if code["programs"] < count else ""


def compiled(budgets: dict[str, Any]) -> str:
    kernels = {
        target: {
            key: f"{code['registers']} {(code['matrix'] or '–').split('.')[0]} "
            f"{describe(bounds.of_triton(target, key, code))}{_blocks(target, code)}"
            for key, code in budgets["kernels"].get(target, {}).items()
            if code["slice"]
        }
        for target in ("sm80", "sm90", "sm100", "sm120", "gfx942")
    }
    return _by_target(kernels)


def cuda(budgets: dict[str, Any]) -> str:
    kernels = {
        target: {
            key: f"{code['registers']} {describe(bounds.of_cuda(target, key, code))}"
            for key, code in found.items()
        }
        for target, found in sorted(budgets["cuda"].items())
    }
    return _by_target(kernels)


def strategies() -> str:
    lines = ["| N | layer | weight | GPU | R | choice | because |", "|---|---|---|---|---|---|---|"]
    for (columns, layer), (gpu, target), rank in itertools.product(NAMED, GPUS.items(), (16, 64)):
        weights: dict[tuple[str, str], list[str]] = {}
        for four_bit in (False, True):
            found = configs.strategy(target, 1024, columns, rank, 2, four_bit)
            weights.setdefault(found, []).append("NF4" if four_bit else "dense")
        for (choice, why), names in weights.items():
            weight = ", ".join(names)
            lines.append(f"| {columns} | {layer} | {weight} | {gpu} | {rank} | {choice} | {why} |")
    return "\n".join(lines)


def served(budgets: dict[str, Any]) -> str:
    """Lay out the least bound of each call in bfloat16 on each GPU as a table."""
    lines = [f"| forward | {' | '.join(SERVED)} |", "|---" * (len(SERVED) + 1) + "|"]
    for call, key in CALLS.items():
        found = (
            describe(bounds.of_cuda(target, key, budgets["cuda"][target][key])).split()[0]
            for target in SERVED.values()
        )
        lines.append(f"| {call} | {' | '.join(found)} |")
    return "\n".join(lines)


def decode(budgets: dict[str, Any]) -> str:
    """Lay out the bounds of `decode` before it streamed W, and now, as a table."""
    lines = [f"| W, rows, x | {' | '.join(SERVED)} |", "|---" * (len(SERVED) + 1) + "|"]
    for key, before in BEFORE.items():
        now = (bounds.of_cuda(t, key, budgets["cuda"][t][key]) for t in SERVED.values())
        cells = (
            f"{was} → {bounds.tightest(found)[1]:.0%}"
            for was, found in zip(before, now, strict=True)
            if found is not None
        )
        lines.append(f"| {key.removeprefix('decode bfloat16 ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def render(text: str, budgets: dict[str, Any]) -> str:
    """The document with its tables as they should be."""
    tables = {"compiled": compiled(budgets), "cuda": cuda(budgets), "strategies": strategies()}
    tables |= {"bounds": served(budgets), "decode": decode(budgets)}
    for name, table in tables.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, table=table: f"{found[1]}{table}\n{found[2]}",
            text,
            flags=re.DOTALL,
        )
    return text


def write(budgets: dict[str, Any]) -> None:
    """Write the tables into the documents."""
    for path in DOCUMENTS:
        path.write_text(render(path.read_text(), budgets))


def main() -> None:
    kept = read()
    for section, of in (("cuda", bounds.of_cuda), ("kernels", bounds.of_triton)):
        for target, kernels in sorted(kept[section].items()):
            for key, code in sorted(kernels.items()):
                if found := of(target, key, code):
                    shares = "  ".join(f"{name} {share:4.0%}" for name, share in found.items())
                    print(f"{target:6} {shares}  {key}")
    write(kept)


if __name__ == "__main__":
    main()
