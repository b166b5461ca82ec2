"""One command for a machine with a GPU: qualification, `verify`, tests and benchmarks, in one file.

    python -m benchmarks.gpu [--minutes 9] [--out benchmarks/results/gpu-<card>.json] [--dry-run]

Needs torch and Triton, and pytest for the tests; no network. The parts run in order of what is
learned in a minute: the qualification compiles on all cores and checks what would be used. Each has
a share of the minutes and is stopped at its end; what it leaves goes to the others. The file is
written after each part, and says what was stopped.

--dry-run, on any machine: prints each part's limit and command, parses the command's options or
collects its tests, so that a typing error costs no minute of a GPU; then the qualification's plan.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lora_kernels import cli, qualification
from lora_kernels.bench import qualify
from lora_kernels.bench.results import provenance

ROOT = Path(__file__).parents[1]
CLI = [sys.executable, "-m", "lora_kernels.cli"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not proof"]
BENCH = "--device {device} --dtypes bfloat16 --seconds 0.4 --json {json}"
# Name, share of the minutes, command; "{json}" is a file that the command writes.
PARTS: list[tuple[str, float, list[str]]] = [
    ("qualify", 0.10, [*CLI, "qualify", "--budget", "60", "--json"]),
    ("verify-cuda", 0.08, [*CLI, "verify", "--engines", "cuda"]),
    ("nf4", 0.15, [*CLI, "bench", "--quant", "nf4", *BENCH.split()]),
    ("tax", 0.20, [*CLI, "bench", "--ranks", "16", "64", "--model", "llama3-8b", *BENCH.split()]),
    ("tests-cuda", 0.08, [*PYTEST, "tests/gpu/test_cuda.py", "tests/gpu/test_eager.py"]),
    ("tests-layers", 0.12, [*PYTEST, "tests/gpu/test_layers.py", "tests/gpu/test_large.py"]),
    ("verify-triton", 0.15, [*CLI, "verify", "--engines", "triton"]),
    ("tests-triton", 0.12, [*PYTEST, "tests/triton"]),
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-<card>.json")
    parser.add_argument("--only", nargs="+", choices=[name for name, *_ in PARTS])
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        return try_commands(args.minutes)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU that this torch can use")
        return 2
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return measure(args.out or ROOT / f"benchmarks/results/gpu-{card}.json", args, "cuda")


def try_commands(minutes: float) -> int:
    """Print each part and try its command without its work; 0 where each is understood."""
    failures = 0
    for name, share, command in PARTS:
        words = [word.format(json="FILE", device="cuda") for word in command[1:]]
        print(f"{name}: at most {60 * minutes * share:.0f} s: python {' '.join(words)}", flush=True)
        if words[1] == "pytest":
            found = run([*command, "--collect-only"], 120.0, "cuda")
            failures += found["exit"] != 0
            print(found["tail"].strip().rpartition("\n")[2])
            continue
        parser = cli.Parser(prog=f"lora-kernels {words[2]}")
        importlib.import_module(cli.COMMANDS[words[2]][0]).add_arguments(parser)
        try:
            parser.parse_args(words[3:])
        except SystemExit:
            failures += 1
    print(qualify.dry_run(qualification.DTYPES))
    return 1 if failures else 0


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
