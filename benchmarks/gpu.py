"""One command for a machine with a GPU: the tests, `verify` and the benchmarks, in one file.

    python -m benchmarks.gpu [--minutes 9] [--out benchmarks/results/gpu-<card>.json]

Needs torch and Triton, and pytest for the tests; no network. Each part has a share of the time and
is stopped at its end; the file is written after each of them, and says what was stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lora_kernels.bench.results import provenance

ROOT = Path(__file__).parents[1]
BENCH = [sys.executable, "-m", "lora_kernels.cli", "bench", "--device"]
# Name, share of the minutes, command; "{json}" is a file that the command writes.
VERIFY = [sys.executable, "-m", "lora_kernels.cli", "verify", "--engines"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not proof"]
TAX = "--dtypes bfloat16 --ranks 16 64 --model llama3-8b --seconds 0.4 --json {json}"
NF4 = "--quant nf4 --dtypes bfloat16 --seconds 0.4 --json {json}"
PARTS: list[tuple[str, float, list[str]]] = [
    ("tests", 0.3, [*PYTEST, "tests/gpu", "tests/triton"]),
    ("verify", 0.1, [*VERIFY, "triton"]),
    ("verify-cuda", 0.1, [*VERIFY, "cuda"]),
    ("tax", 0.3, [*BENCH, "{device}", *TAX.split()]),
    ("nf4", 0.2, [*BENCH, "{device}", *NF4.split()]),
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-<card>.json")
    parser.add_argument("--only", nargs="+", choices=[name for name, *_ in PARTS])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU that this torch can use")
        return 2
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return measure(args.out or ROOT / f"benchmarks/results/gpu-{card}.json", args, "cuda")


def measure(out: Path, args: argparse.Namespace, device: str) -> int:
    """Run the parts; 0 where all of them succeeded in their time."""
    data: dict[str, Any] = {"provenance": provenance(["bfloat16", "float32"], device)}
    end, left = time.monotonic() + 60 * args.minutes, 1.0
    for name, share, command in PARTS:
        if args.only and name not in args.only:
            continue
        limit = max(1.0, (end - time.monotonic()) * share / left)  # what others left over, too
        left -= share
        print(f"{name}: at most {limit:.0f} s", flush=True)
        data[name] = run(command, limit, device)
        print(data[name]["tail"], flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    results = [part for name, part in data.items() if name != "provenance"]
    return 0 if all(part["exit"] == 0 for part in results) else 1


def run(command: list[str], limit: float, device: str) -> dict[str, Any]:
    """Exit status (None: stopped at the limit), seconds, the end of what it printed, its JSON."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as printed:
        file = Path(directory) / "part.json"
        command = [part.format(json=file, device=device) for part in command]
        status: int | None
        try:
            status = subprocess.run(
                command, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        printed.seek(0)
        found: dict[str, Any] = {
            "command": " ".join(["python", *command[1:]]).replace(directory, ""),
            "exit": status,
            "seconds": round(time.monotonic() - begun, 1),
            "tail": printed.read()[-4000:],
        }
        if file.exists():
            found["json"] = json.loads(file.read_text())
    return found


if __name__ == "__main__":
    sys.exit(main())
