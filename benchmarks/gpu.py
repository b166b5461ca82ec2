"""One command for a machine with a GPU: qualification, `verify`, tests, benchmarks, and a report.

    python -m benchmarks.gpu [--minutes 15] [--out benchmarks/results/gpu-<card>.json] [--dry-run]

Needs torch and Triton, `.[bench]` and transformers for the benchmarks, and pytest for the tests; it
says first what is missing. No network. The parts run in order of what is learned in a minute: the
qualification compiles on all cores and checks what would be used. Each has a share of the minutes
and is stopped at its end; what it leaves goes to the others. The JSON file, and a report in
Markdown beside it, are written after each part, and say what was stopped.

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
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lora_kernels import cli, qualification
from lora_kernels.bench import qualify
from lora_kernels.bench.results import Row, provenance, ratios
from lora_kernels.bench.timing import Times

ROOT = Path(__file__).parents[1]
CLI = [sys.executable, "-m", "lora_kernels.cli"]
MODEL = [sys.executable, "-m", "benchmarks.gpu_model"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not proof"]
BENCH = "--device {device} --dtypes bfloat16 --seconds 0.4 --json {json}"
# Name, share of the minutes, command; "{json}" is a file that the command writes.
PARTS: list[tuple[str, float, list[str]]] = [
    ("qualify", 0.08, [*CLI, "qualify", "--budget", "60", "--json"]),
    ("model", 0.16, [*MODEL, "--device", "{device}", "--json", "{json}"]),
    ("host", 0.10, [*CLI, "bench", "--host", "--device", "{device}", "--json", "{json}"]),
    ("verify-cuda", 0.06, [*CLI, "verify", "--engines", "cuda"]),
    ("nf4", 0.11, [*CLI, "bench", "--quant", "nf4", *BENCH.split()]),
    ("tax", 0.15, [*CLI, "bench", "--ranks", "16", "64", "--model", "llama3-8b", *BENCH.split()]),
    ("tests-cuda", 0.06, [*PYTEST, "tests/gpu/test_cuda.py", "tests/gpu/test_eager.py"]),
    ("tests-layers", 0.09, [*PYTEST, "tests/gpu/test_layers.py", "tests/gpu/test_large.py"]),
    ("verify-triton", 0.11, [*CLI, "verify", "--engines", "triton"]),
    ("tests-triton", 0.08, [*PYTEST, "tests/triton"]),
]
# Package -> what is left out without it.
WANTED = {
    "bitsandbytes": "NF4",
    "peft": "PEFT's times",
    "transformers": "the model",
    "pandas": "bench",
    "pytest": "tests",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-<card>.json")
    parser.add_argument("--only", nargs="+", choices=[name for name, *_ in PARTS])
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        return try_commands(args.minutes)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU that this torch can use")
        return 2
    for name, what in WANTED.items():
        if find_spec(name) is None:
            print(f"benchmarks.gpu: no {name}, so without {what}: pip install {name}", flush=True)
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return measure(args.out or ROOT / f"benchmarks/results/gpu-{card}.json", args, "cuda")


def try_commands(minutes: float) -> int:
    """Print each part and try its command without its work; 0 where each is understood."""
    failures = 0
    for name, share, command in PARTS:
        words = [word.format(json="FILE", device="cuda") for word in command[1:]]
        print(f"{name}: at most {60 * minutes * share:.0f} s: python {' '.join(words)}", flush=True)
        if words[1] in ("pytest", MODEL[2]):
            is_test = words[1] == "pytest"
            tried = [*command, "--collect-only"] if is_test else [*MODEL, "--help"]
            found = run(tried, 120.0, "cuda")
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
        out.with_suffix(".md").write_text(report(data))
    results = [part for name, part in data.items() if name != "provenance"]
    return 0 if all(part["exit"] == 0 for part in results) else 1


def report(data: dict[str, Any]) -> str:
    """Return the report of what was measured, losses first."""
    facts = data["provenance"]
    parts = {name: part for name, part in data.items() if name != "provenance"}
    libraries = ("torch", "triton", "peft", "transformers", "bitsandbytes", "cuda")
    lines = [
        f"# lora_kernels on {(facts.get('gpu') or {}).get('name', 'a GPU')}",
        "",
        f"{facts.get('nvidia_smi') or ''} (driver, clocks in MHz, power limit); "
        + ", ".join(f"{name} {facts[name]}" for name in libraries if facts.get(name))
        + f"; {facts.get('date')}, commit {facts.get('commit')}.",
        "",
        "| part | exit status | seconds |",
        "|---|---|---|",
    ]
    for name, part in parts.items():
        status = "stopped" if part["exit"] is None else part["exit"]
        lines.append(f"| {name} | {status} | {part['seconds']} |")
    timed = {name: rows_of(part) for name, part in parts.items()}
    lines += ["", "## Losses", ""]
    lost = [
        (ratio, f"| {name} | {row.identity} | {peer} | {ratio:.2f} |")
        for name, rows in timed.items()
        for peer, found in ratios(rows).items()
        for ratio, row in found
        if ratio > 1
    ]
    if lost:
        lines += ["Ours takes longer than the peer:", "", "| part | row | peer | ours over it |"]
        lines += ["|---|---|---|---|", *(line for _, line in sorted(lost, reverse=True))]
    else:
        lines.append("None among what was timed." if any(timed.values()) else "Nothing was timed.")
    lines += [
        f"\n{name} failed:\n\n```\n{part['tail'].strip()[-1500:]}\n```"
        for name, part in parts.items()
        if part["exit"]
    ]
    for name, rows in timed.items():
        if rows:
            lines += ["", f"## {name}", "", "| row | ours, ms | GPU's ms | peers: ours over each |"]
            lines += ["|---|---|---|---|", *map(line_of, rows)]
    if "qualify" in parts:
        lines += ["", "## qualify", "", "```", parts["qualify"]["tail"].strip(), "```"]
    return "\n".join(lines) + "\n"


def line_of(row: Row) -> str:
    ours, device = row.seconds.get("ours"), row.device_seconds.get("ours")
    over = ", ".join(f"{peer} {found[0][0]:.2f}" for peer, found in ratios([row]).items())
    times = [f"{t.p50 * 1e3:.3g}" if t else "✗" for t in (ours,)]
    times.append(f"{device.p50 * 1e3:.3g}" if device else "–")
    return f"| {row.identity} | {' | '.join(times)} | {over or '–'} |"


def rows_of(part: dict[str, Any]) -> list[Row]:
    """Return the rows of the suites in a part's JSON."""
    suites = part.get("json")
    if not isinstance(suites, dict) or not all("rows" in suite for suite in suites.values()):
        return []
    names = {field.name for field in fields(Row)}
    rows = []
    for found in (row for suite in suites.values() for row in suite["rows"]):
        row = {name: value for name, value in found.items() if name in names}
        for key in ("seconds", "device_seconds"):
            row[key] = {name: Times(**each) for name, each in row.get(key, {}).items()}
        rows.append(Row(**row))
    return rows


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
