"""One command for a machine with a GPU: qualification, `verify`, tests, benchmarks, and a report.

    python -m benchmarks.gpu [--minutes 15] [--out FILE] [--only PART ...] [--dry-run]

Needs torch and Triton, `.[bench]` and transformers for the benchmarks, and pytest for the tests; it
says first what is missing. No network. The parts run in order of what is learned in a minute: the
orders of a training step's GEMMs come first, and the report prints them first; the qualification
compiles on all cores and checks what would be used. Each has a share of the minutes
and is stopped at its end; what it leaves goes to the others. The parts of a backend that cannot run
here are left out. The JSON file, and a report in Markdown beside it, are written after each part,
and say what was stopped. They are benchmarks/results/gpu-<card>.json and .md.

--only: these parts share all the minutes. Their files have the parts' names too, so that the files
of a whole run stay.

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
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lora_kernels import cli, qualification
from lora_kernels.bench import qualify
from lora_kernels.bench.results import FROZEN, Row, is_ours, provenance, ratios, under_load
from lora_kernels.choice.verdicts import read_verdict
from lora_kernels.info import info

ROOT = Path(__file__).parents[1]
CLI = [sys.executable, "-m", "lora_kernels.cli"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not proof"]
BENCH = "--device {device} --dtypes bfloat16 --seconds 0.4 --json {json}"
# Name, share of the minutes, command. "{json}" is a file that the command writes; what a command
# that ends in "--json" prints is that file. The budget of `qualify` begins when it has compiled.
PARTS: list[tuple[str, float, list[str]]] = [
    ("orders", 0.13, [*CLI, "qualify", "--orders", "--budget", "90", "--json"]),
    ("info", 0.02, [*CLI, "info"]),
    ("qualify", 0.09, [*CLI, "qualify", "--budget", "45", "--json"]),
    (
        "model",
        0.14,
        [*CLI, "bench", "--end-to-end", "--device", "{device}", "--json", "{json}"],
    ),
    ("host", 0.08, [*CLI, "bench", "--host", "--device", "{device}", "--json", "{json}"]),
    ("verify-cuda", 0.05, [*CLI, "verify", "--engines", "cuda"]),
    ("nf4", 0.10, [*CLI, "bench", "--quant", "nf4", *BENCH.split()]),
    ("tax", 0.10, [*CLI, "bench", "--ranks", "16", "64", "--model", "llama3-8b", *BENCH.split()]),
    ("tests-cuda", 0.05, [*PYTEST, "tests/gpu/test_cuda.py", "tests/gpu/test_eager.py"]),
    ("tests-layers", 0.08, [*PYTEST, "tests/gpu/test_layers.py", "tests/gpu/test_large.py"]),
    ("verify-triton", 0.09, [*CLI, "verify", "--engines", "triton"]),
    ("tests-triton", 0.07, [*PYTEST, "tests/triton"]),
]
# Package -> what is left out without it.
WANTED = {
    "bitsandbytes": "NF4",
    "peft": "PEFT's times",
    "transformers": "the model",
    "pandas": "bench and the model",
    "pytest": "tests",
}
# Characters of the end of what a part printed: in the JSON file, of a failure in the report.
KEPT, SHOWN = 20000, 1500
ORDERS = "orders"  # the part whose text is first in the report
BELOW = ("info", "qualify")  # parts whose text is in the report, after the losses


LEGEND = """\
Below, a row is what was timed: dtype, M×K×N (M rows of x, K in, N out), rank and mode. A ratio is
ours over the peer's time, below 1 where ours is faster, with both times beside it: medians, of
"host" minima until all is launched. "frozen" is the same layer without an adapter."""


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
    parts = [name for name, *_ in PARTS]
    for name, backend in info()["backends"].items():
        if not backend["available"]:
            print(f"benchmarks.gpu: without the {name} kernels: {backend['reason']}", flush=True)
            parts = [part for part in parts if not part.endswith(f"-{name}")]
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    file = "-".join(["gpu", card, *(args.only or ())])
    args.only = args.only or parts
    return measure(args.out or ROOT / f"benchmarks/results/{file}.json", args, "cuda")


def try_commands(minutes: float) -> int:
    """Print each part and try its command without its work; 0 where each is understood."""
    failures = 0
    for name, share, command in PARTS:
        words = [word.format(json="FILE", device="cuda") for word in command[1:]]
        print(f"{name}: at most {60 * minutes * share:.0f} s: python {' '.join(words)}", flush=True)
        if words[1] == "pytest":
            result = run([*command, "--collect-only"], 120.0, "cuda")
            failures += result["exit"] != 0
            print(end_of(result, SHOWN) if result["exit"] != 0 else last_line(result))
            continue
        parser = cli.Parser(prog=f"lora-kernels {words[2]}")
        importlib.import_module(cli.COMMANDS[words[2]][0]).add_arguments(parser)
        try:
            parser.parse_args(words[3:])
        except SystemExit:
            failures += 1
    print(qualify.dry_run(qualification.DTYPES))
    if failures:
        print(f"benchmarks.gpu: {failures} of {len(PARTS)} parts would fail, as said above")
    return 1 if failures else 0


def measure(out: Path, args: argparse.Namespace, device: str) -> int:
    """Run the parts; 0 where all of them succeeded in their time."""
    data: dict[str, Any] = {"provenance": provenance(["bfloat16", "float32"], device)}
    parts = [part for part in PARTS if not args.only or part[0] in args.only]
    end, left = time.monotonic() + 60 * args.minutes, sum(share for _, share, _ in parts)
    for name, share, command in parts:
        limit = max(1.0, (end - time.monotonic()) * share / left)  # with what earlier parts left
        left -= share
        print(f"{name}: at most {limit:.0f} s", flush=True)
        data[name] = run(command, limit, device)
        if name in (ORDERS, "qualify") and "json" in data[name]:
            data[name]["tail"] += qualify.table(read_verdict(data[name]["json"]))
        print(end_of(data[name], 4000), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        out.with_suffix(".md").write_text(report(data))
    print(f"benchmarks.gpu: the report is {out.with_suffix('.md')}, every number is in {out}")
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
        + f"; {facts.get('date')}, commit {facts.get('commit')}, sources {facts.get('sources')}.",
        "",
        "| part | exit status | seconds | its last line |",
        "|---|---|---|---|",
    ]
    for name, part in parts.items():
        status = "stopped" if part["exit"] is None else part["exit"]
        lines.append(f"| {name} | {status} | {part['seconds']} | {cell(last_line(part))} |")
    timed = {name: rows_of(part) for name, part in parts.items()}
    lines += text_of(parts, ORDERS)
    lines += ["", "## Losses", "", *losses(parts, timed)]
    for name in BELOW:
        lines += text_of(parts, name)
    if any(timed.values()):
        lines += ["", LEGEND]
    for name, rows in timed.items():
        if rows:
            lines += ["", f"## {name}", "", "| row | ours over each peer | ms on the GPU |"]
            lines += ["|---|---|---|", *map(line_of, rows)]
            lines += [line for warning in under_load(rows) for line in ("", f"{warning}.")]
    return "\n".join(lines) + "\n"


def text_of(parts: dict[str, Any], name: str) -> list[str]:
    """Return a section with what a part printed; nothing if it did not run."""
    if name not in parts or not parts[name]["tail"].strip():
        return []
    return ["", f"## {name}", "", "```", end_of(parts[name], KEPT), "```"]


def losses(parts: dict[str, Any], timed: dict[str, list[Row]]) -> list[str]:
    """Return what is wrong, what a peer does faster, and what each part that failed said last."""
    wrong = [
        f"| {name} | {row.identity} | {call} | {cell(what)} |"
        for name, rows in timed.items()
        for row in rows
        for call, what in row.misses.items()
        if is_ours(call)
    ]
    lines = []
    if wrong:
        lines += ["Ours misses the tolerance, or the limit of its time:", ""]
        lines += ["| part | row | call | what |", "|---|---|---|---|", *wrong, ""]
    lost = [
        (ratio, f"| {name} | {row.identity} | {peer} | {ratio:.2f} |")
        for name, rows in timed.items()
        for peer, pairs in ratios(rows).items()
        for ratio, row in pairs
        if ratio > 1
    ]
    if lost:
        lines += ["Ours takes longer than the peer:", "", "| part | row | peer | ours over it |"]
        lines += ["|---|---|---|---|", *(line for _, line in sorted(lost, reverse=True))]
    else:
        lines.append("None among what was timed." if any(timed.values()) else "Nothing was timed.")
    for name, part in parts.items():
        if part["exit"] == 0:
            continue
        how = "stopped at its limit" if part["exit"] is None else f"exit status {part['exit']}"
        if timed[name] or name in (ORDERS, *BELOW):
            lines += ["", f"{name}: {how}; what it found is below."]
        else:
            lines += ["", f"{name}: {how}", "", "```", end_of(part, SHOWN), "```"]
    return lines


def cell(text: str) -> str:
    """Return a text for a cell of a table."""
    return text.replace("|", "/").replace("\n", "; ")


def end_of(part: dict[str, Any], most: int) -> str:
    """Return the last lines of what a part printed, at most so many characters."""
    text = str(part["tail"]).strip()
    return text if len(text) <= most else text[-most:].partition("\n")[2]


def last_line(part: dict[str, Any]) -> str:
    return str(part["tail"]).strip().rpartition("\n")[2].strip()[:120]


def line_of(row: Row) -> str:
    """Return the row's line: each ratio with the milliseconds that it is of."""
    ratio_of = {peer: pairs[0][0] for peer, pairs in ratios([row]).items()}
    if FROZEN in row.tax and "ours" in row.tax:
        ratio_of[FROZEN] = row.tax["ours"]
    seconds = row.compared
    cells = [
        f"{peer} {ratio:.2f} ({ratio * seconds[peer] * 1e3:.3g} / {seconds[peer] * 1e3:.3g} ms)"
        for peer, ratio in ratio_of.items()
    ]
    cells += [f"✗ {name}: {cell(why)}" for name, why in row.misses.items() if name not in seconds]
    device = [f"{name} {times.p50 * 1e3:.3g}" for name, times in row.device_seconds.items()]
    return f"| {cell(row.identity)} | {', '.join(cells) or '–'} | {', '.join(device) or '–'} |"


def rows_of(part: dict[str, Any]) -> list[Row]:
    """Return the rows of the suites in a part's JSON."""
    suites = part.get("json")
    if not isinstance(suites, dict) or not all("rows" in suite for suite in suites.values()):
        return []
    return [Row.from_json(row) for suite in suites.values() for row in suite["rows"]]


def run(command: list[str], limit: float, device: str) -> dict[str, Any]:
    """Exit status (None: stopped at the limit), seconds, the end of what it printed, its JSON."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as printed:
        file = Path(directory) / "part.json"
        command = [part.format(json=file, device=device) for part in command]
        status: int | None
        with file.open("w") if command[-1] == "--json" else nullcontext(printed) as out:
            try:
                status = subprocess.run(
                    command, cwd=ROOT, stdout=out, stderr=printed, timeout=limit
                ).returncode
            except subprocess.TimeoutExpired:
                status = None
        printed.seek(0)
        result: dict[str, Any] = {
            "command": " ".join(["python", *command[1:]]).replace(directory, ""),
            "exit": status,
            "seconds": round(time.monotonic() - begun, 1),
            "tail": printed.read()[-KEPT:],
        }
        with suppress(FileNotFoundError, ValueError):  # torn or empty, if the part was stopped
            result["json"] = json.loads(file.read_text())
    return result


if __name__ == "__main__":
    sys.exit(main())
