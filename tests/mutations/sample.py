"""Score the tests on a sample of mutants: `python -m tests.mutations.sample`.

Cosmic Ray makes mutants (`pip install cosmic-ray`): another operator, comparison, number or
Boolean; a decorator, an exception or a loop removed. operators.py makes others: an operand of a
condition, an argument or a step left out. Each place in the files below is as likely as another.
Mutants that differ from the code in annotations alone are left out.

All tests must pass without a mutation. Surviving mutants are printed with their line. Those in
equivalent.toml change no result and do not count. It ends with 1 if the tests notice fewer than
--score percent of the others.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from . import operators
from .__main__ import Copy
from .table import ROOT, Mutation, tomllib

# The mutated files, and tests that must notice the mutants, the quickest first. Each selection
# takes at most two minutes, and pytest stops at the first test that fails.
PEFT = (
    "tests/interop/test_layer_kinds.py tests/interop/test_equivalence.py "
    "tests/interop/test_features.py"
)
ARGUMENTS = (
    "tests/ops/test_arguments.py tests/autograd/test_bad_input.py "
    "tests/ops/test_multi_lora_linear.py::test_multi_lora_linear_of_bad_arguments_raises "
    "tests/ops/test_lora_experts.py::test_lora_experts_linear_of_bad_input_names_the_argument "
    "tests/autograd/test_autocast.py tests/ops/test_dora_norm.py tests/ops/test_eager_gpu.py "
    "tests/ops/test_exact.py tests/ops/test_lora_experts.py"
)
COUNTS = "tests/bench/test_block_counts.py"
TESTS = {
    "ops/arguments.py": ARGUMENTS,
    **dict.fromkeys(
        ("ops/linear.py", "ops/multi.py", "ops/experts.py", "ops/norm.py"),
        f"{ARGUMENTS} tests/autograd tests/ops/test_multi_lora_linear.py",
    ),
    **dict.fromkeys(
        ("ops/registry.py", "ops/context.py", "ops/autograd.py"),
        "tests/ops/test_schemas.py tests/ops/test_dora_norm.py tests/ops/test_exact.py "
        "tests/autograd tests/ops/test_multi_lora_linear.py tests/ops/test_lora_experts.py",
    ),
    "choice/choose.py": "tests/ops/test_selection.py tests/qualification/test_verdicts.py "
    "tests/ops/test_exact.py tests/ops/test_eager_gpu.py",
    "oracle/reference.py": "tests/reference tests/ops/test_head.py",
    **dict.fromkeys(
        ("backends/eager/linear.py", "backends/eager/products.py"),
        "tests/ops/test_exact.py tests/ops/test_eager_gpu.py "
        "tests/ops/test_multi_lora_linear.py tests/bench/test_traffic.py",
    ),
    "backends/eager/norm.py": "tests/ops/test_dora_norm.py tests/ops/test_eager_gpu.py "
    "tests/ops/test_partitions.py",
    **dict.fromkeys(
        ("backends/eager/blocks.py", "ops/blocks.py", "peft/groups.py", "peft/direct.py"),
        "tests/interop/test_groups.py tests/interop/test_mlp.py "
        f"tests/interop/test_gates_and_biases.py {COUNTS}",
    ),
    **dict.fromkeys(
        ("backends/eager/gated_mlp.py", "peft/mlp.py"),
        f"tests/interop/test_mlp.py tests/layers/test_gated_mlp.py {COUNTS}",
    ),
    "layers/gated_mlp.py": f"tests/layers/test_gated_mlp.py {COUNTS}",
    "layers/group.py": f"tests/layers/test_group.py {COUNTS}",
    "ops/in_place.py": "tests/interop/test_in_place.py tests/interop/test_cast_adapters.py "
    f"{COUNTS}",
    "quantization/readers/gguf.py": "tests/quantization/test_gguf.py",
    "integrations/gguf.py": "tests/interop/test_gguf.py",
    "finetune/export.py": "tests/finetune/test_gguf.py",
    "peft/frozen.py": "tests/interop/test_frozen.py",
    "peft/foreign.py": "tests/interop/test_other_formats.py tests/interop/test_foreign_base.py",
    "peft/check.py": "tests/interop/test_check.py",
    "backends/cpu/linear.py": "tests/ops/test_exact.py tests/ops/test_multi_lora_linear.py",
    "peft/linear.py": f"{PEFT} tests/interop/test_mixed_batch.py tests/interop/test_decoding.py "
    "tests/interop/test_linear4bit.py",
    "core/record.py": "tests/interop/test_code_paths.py",
    **dict.fromkeys(
        ("peft/read.py", "peft/adapters.py"),
        f"{PEFT} tests/interop/test_code_paths.py tests/interop/test_variants.py "
        "tests/interop/test_mixed_batch.py tests/interop/test_gates_and_biases.py",
    ),
    "peft/eligibility.py": f"{PEFT} tests/interop/test_foreign_base.py "
    "tests/interop/test_frozen.py tests/interop/test_mixed_batch.py tests/interop/test_variants.py",
    "peft/experts.py": "tests/interop/test_experts.py",
    "layers/experts.py": "tests/layers/test_experts.py tests/interop/test_experts.py",
    "backends/cpu/experts.py": "tests/ops/test_lora_experts.py",
    **dict.fromkeys(
        ("backends/eager/experts.py", "backends/eager/quantized_stack.py"),
        "tests/ops/test_lora_experts.py tests/ops/test_quantized_stack.py",
    ),
    "peft/swap.py": f"{PEFT} tests/interop/test_lifecycle.py tests/interop/test_frozen.py",
    "peft/adalora.py": "tests/interop/test_equivalence.py tests/interop/test_layer_kinds.py",
    "peft/report.py": "tests/interop/test_explain.py tests/interop/test_gpu_path.py",
    "peft/explain_rows.py": "tests/interop/test_explain.py tests/interop/test_gpu_path.py",
}
T = TypeVar("T")
OURS = "operators.py"
LEFT_OUT = ("VariableReplacer", "VariableInserter")  # they want arguments


@dataclass(frozen=True)
class Mutant:
    """One mutant of a file: its whole text, and the line that differs."""

    file: str
    line: int
    before: str
    after: str
    text: str


def mutants_of(file: str, chooser: random.Random) -> Iterator[Mutant]:
    """Yield mutants of a file in random order, at most one for each place."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / file).read_text()
    nodes = list(ast_nodes(get_ast(source)))
    places: dict[tuple[int, int], list[tuple[str, Any]]] = {}
    for edit in operators.edits(ast.parse(source), source):
        node: Any = edit[0]
        places.setdefault((node.lineno, node.col_offset), []).append((OURS, edit))
    for name in operator_names():
        if name.endswith(LEFT_OUT):
            continue
        operator, occurrence = get_operator(name)(), 0
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                places.setdefault(start, []).append((name, occurrence))
                occurrence += 1
    order = sorted(places)
    chooser.shuffle(order)
    for place in order:
        name, occurrence = chooser.choice(places[place])
        if name == OURS:
            text = operators.apply(source, occurrence)
        else:
            text = mutate_code(source, get_operator(name)(), occurrence)
        if text is not None and code_of(text) != code_of(source):
            yield Mutant(file, place[0], *changed_lines(source, text), text)


def code_of(source: str) -> str | None:
    """Return what the source does as a string, without annotations; None if it does not parse."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if getattr(node, field, None) is not None:
                setattr(node, field, ast.Constant(None))
    return ast.dump(tree)


def changed_lines(source: str, text: str) -> tuple[str, str]:
    """Return the lines that differ, of each text, joined.

    >>> changed_lines("a = 1\\nb = 2\\n", "a = 1\\nb = 3\\n")
    ('b = 2', 'b = 3')
    """
    found = list(difflib.ndiff(source.splitlines(), text.splitlines()))
    before, after = (" ".join(x[2:].strip() for x in found if x[0] == sign) for sign in "-+")
    return before, after


def sample(count: int, seed: int, names: Sequence[str]) -> list[Mutant]:
    """Choose mutants of the files; each has a share that grows with its length."""
    chooser = random.Random(seed)
    length = {name: len((ROOT / "lora_kernels" / name).read_text()) for name in names}
    found = []
    for name in names:
        share = round(count * length[name] / sum(length.values()))
        made = mutants_of(f"lora_kernels/{name}", chooser)
        found += [mutant for mutant, _ in zip(made, range(share), strict=False)]
    return found


def equivalents() -> set[tuple[str, str, str]]:
    """Return file, line before and line after of the mutants that change no result."""
    table = Path(__file__).parent / "equivalent.toml"
    entries = tomllib.loads(table.read_text()).get("equivalent", [])
    return {(entry["file"], entry["before"], entry["after"]) for entry in entries}


def take(items: list[T], lock: threading.Lock) -> Iterator[T]:
    """Yield the items that no other thread has taken from the list."""
    while True:
        with lock:
            if not items:
                return
            item = items.pop(0)
        yield item


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations.sample", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", choices=[*TESTS, []], metavar="FILE", help="(all)")
    parser.add_argument("--count", type=int, default=200, help="mutants (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="copies at work (default: 2)")
    parser.add_argument("--score", type=float, default=85, help="percent noticed (default: 85)")
    args = parser.parse_args()
    known = equivalents()
    chosen = sample(args.count, args.seed, args.names or list(TESTS))
    work = [m for m in chosen if (m.file, m.before, m.after) not in known]
    total, surviving, lock = len(work), list[Mutant](), threading.Lock()
    selections = sorted({TESTS[m.file.removeprefix("lora_kernels/")] for m in work})

    def worker(folder: Path) -> None:
        copy = Copy(folder)
        for tests in take(selections, lock):
            status, said = copy.test(tests)
            if status:
                raise SystemExit(f"{tests}: got {said!r} without a mutation, want no failure")
        for mutant in take(work, lock):
            start = time.monotonic()
            tests = TESTS[mutant.file.removeprefix("lora_kernels/")]
            outcome = copy.try_out(
                Mutation("", "", mutant.file, (ROOT / mutant.file).read_text(), mutant.text, tests)
            )
            with lock:
                if not outcome.noticed:
                    surviving.append(mutant)
                mark = "✓" if outcome.noticed else "✗"
                print(f"{mark} {time.monotonic() - start:4.0f} s  {mutant.file}:{mutant.line}")
                print(f"    {mutant.before}\n    {mutant.after}\n    {outcome.said}", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutants-") as name, ThreadPoolExecutor() as pool:
        folders = [Path(name) / str(job) for job in range(args.jobs)]
        for done in [pool.submit(worker, folder) for folder in folders]:
            done.result()
    noticed = 100 * (total - len(surviving)) / max(1, total)
    left_out = len(chosen) - total
    print(f"{total} mutants (and {left_out} that change no result), seed {args.seed}:")
    print(f"{len(surviving)} survived, {noticed:.1f} % noticed, want {args.score:g} %")
    return noticed < args.score


if __name__ == "__main__":
    sys.exit(main())
