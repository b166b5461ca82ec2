"""The tables of benchmarks/KERNELS.md: from budgets.json, and from the cost model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lora_kernels.backends.triton import configs
from lora_kernels.device import DeviceInfo

DOCUMENT = Path(__file__).parents[2] / "benchmarks" / "KERNELS.md"
NAMED = [(1024, "Llama-3-8B k, v"), (2048, "TinyLlama q, o"), (4096, "Llama-3-8B q, o, down")]
GPUS = {
    "A100": DeviceInfo("cuda", 80, 108, 163 << 10),
    "H100": DeviceInfo("cuda", 90, 132, 227 << 10),
}


def compiled(budgets: dict[str, Any]) -> str:
    lines = [
        "| kernel, tile M×N×K, call | target | registers | shared | matrix | loop | peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for target in ("sm80", "sm90", "sm100", "sm120", "gfx942"):
        for key, code in sorted(budgets["kernels"].get(target, {}).items()):
            if code["slice"]:
                peak = "–" if code["peak"] is None else f"{code['peak']:.0%}"
                loop = f"{code['loop']:.0%}" if code["loop"] else "–"
                lines.append(
                    f"| {key} | {target} | {code['registers']} | {code['shared']:,} "
                    f"| {code['matrix'] or '–'} | {loop} | {peak} |"
                )
    return "\n".join(lines)


def cuda(budgets: dict[str, Any]) -> str:
    lines = [
        "| kernel | target | registers | loop | peak | stream |",
        "|---|---|---|---|---|---|",
    ]
    for target, kernels in sorted(budgets["cuda"].items()):
        for key, code in sorted(kernels.items()):
            loop, peak, stream = (
                f"{code[name]:.0%}" if code[name] else "–" for name in ("loop", "peak", "stream")
            )
            lines.append(f"| {key} | {target} | {code['registers']} | {loop} | {peak} | {stream} |")
    return "\n".join(lines)


def strategies() -> str:
    lines = ["| N | layer | weight | GPU | R | choice | because |", "|---|---|---|---|---|---|---|"]
    for columns, layer in NAMED:
        for four_bit in (False, True):
            for gpu, target in GPUS.items():
                for rank in (16, 64):
                    choice, why = configs.strategy(target, 1024, columns, rank, 2, four_bit, False)
                    weight = "NF4" if four_bit else "dense"
                    lines.append(
                        f"| {columns} | {layer} | {weight} | {gpu} | {rank} | {choice} | {why} |"
                    )
    return "\n".join(lines)


def render(text: str, budgets: dict[str, Any]) -> str:
    """The document with its tables as they should be."""
    tables = {"compiled": compiled(budgets), "cuda": cuda(budgets), "strategies": strategies()}
    for name, table in tables.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, table=table: f"{found[1]}{table}\n{found[2]}",
            text,
            flags=re.DOTALL,
        )
    return text


def write(budgets: dict[str, Any]) -> None:
    """Write the tables into the document."""
    DOCUMENT.write_text(render(DOCUMENT.read_text(), budgets))
