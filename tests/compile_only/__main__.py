"""Compile the Triton kernels for GPUs that are not here, and hold them to their budgets.

    python -m tests.compile_only [--target sm90 ...] [--all] [--write]

A kernel that spills in a loop (or more than 32 bytes outside of loops), lacks its matrix
instruction, reads no 128 bits at a time though all is aligned, or takes more shared memory than
there is fails, and one that takes more registers or shared memory than budgets.json says (for the
Triton that they were written with). `loop` is matrix instructions over all of the inner loop,
`peak` the share of the tensor cores' peak that issuing that loop allows: a static roofline, and an
upper bound.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from tests.compile_only import budgets, document, machine_code
from tests.compile_only.calls import SLICE, every_call
from tests.compile_only.targets import ALL, TARGETS, VERSION, Compiled, compiled

MATRIX = dict.fromkeys(ALL, "mma.sync")
MATRIX |= {"sm90": "wgmma.mma_async", "gfx942": "mfma"}
MATRIX |= dict.fromkeys(("sm100", "sm103", "sm110"), "tcgen05.mma")
# Of stack, touched once a tile, outside of all loops: ptxas buys occupancy with them. 32 bytes a
# thread are 8 KiB a tile of 128×256, whose operands are 3 MB at K = 4096; they stay in L1.
FEW_BYTES = 32
ELEMENTWISE = ("gated_kernel", "gated_backward_kernel", "cross_entropy_kernel")
NO_PRODUCT = ("reduce_kernel", "dequantize_kernel", *ELEMENTWISE)
LINEAR = ("fused_kernel", "two_pass_kernel")
WIDE_LOADS = (*LINEAR, "shrink_outer_kernel", *ELEMENTWISE)
WARPGROUP = 64  # rows of wgmma and tcgen05; with fewer, mma.sync


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compile_only", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--target", nargs="+", choices=ALL, default=list(TARGETS))
    parser.add_argument("--call", help="of every config, those whose name has this in it")
    parser.add_argument("--all", action="store_true", help="every config (default: one a kernel)")
    parser.add_argument("--write", action="store_true", help="write the budgets of what is seen")
    args = parser.parse_args()
    kept = budgets.read()
    every = list(every_call())
    failures = seen = 0
    if kept["triton"] != VERSION and not args.write:
        print(f"no budgets compared: they are of Triton {kept['triton']}, this is {VERSION}")
    print("registers, shared memory, matrix instruction, loop, peak; then kernel and tiles, call")
    for target in args.target:
        known: set[str] = set()
        calls = every if (args.all or args.call) and target in TARGETS else SLICE
        for call in (call for call in calls if (args.call or "") in str(call)):
            launched: Counter[str] = Counter()
            for found in compiled(target, call.run):
                tiles = "x".join(map(str, found.config.blocks.values()))
                launched[found.name] += 1
                which = f" #{launched[found.name]}" if launched[found.name] > 1 else ""
                key = f"{found.name}{which} {tiles} {call}"
                if found.kernel.hash in known:
                    continue
                known.add(found.kernel.hash)
                seen += 1
                code = machine_code.read(found.kernel, target, found.config.warps)
                wrong = _wrong(code, target, found, call.aligned)
                limit = kept["kernels"].get(target, {}).get(key)
                if args.write:
                    entry = kept["kernels"].setdefault(target, {})
                    entry[key] = code.entry() | {"slice": call in SLICE}
                    if call in SLICE:
                        entry[key] |= {
                            "warps": found.config.warps,
                            "stages": found.config.stages,
                            "programs": found.programs,
                            **code.measure_loop(),
                        }
                # With --call, a kernel may be known by a call that was left out.
                elif kept["triton"] == VERSION and (limit or not args.call):
                    wrong += budgets.excess(code.entry(), limit)
                peak = "" if code.share is None else f"{code.share:4.0%}"
                line = (
                    f"{'✗' if wrong else '✓'} {target:6} {code.registers:3} {code.shared:6} "
                    f"{code.matrix:15} {code.matrix_share:4.0%} {peak:4}  {key}"
                )
                few = f"({code.spills} bytes of stack)" if code.spills and not wrong else ""
                print("  ".join(filter(None, [line, few, *wrong])), flush=True)
                failures += bool(wrong)
    if args.write:
        kept["triton"] = VERSION
        budgets.write(kept)
        document.write(kept)
    print(f"{seen} kernels compiled with Triton {VERSION}, {failures} failures")
    return 1 if failures else 0


def _wrong(code: machine_code.Code, target: str, found: Compiled, aligned: bool) -> list[str]:
    here, kernel, config = ALL[target][0], found.name, found.config
    wrong = code.faults(kernel not in NO_PRODUCT, kernel in WIDE_LOADS and aligned, FEW_BYTES)
    if code.shared > here.shared_memory:
        wrong.append(f"shared memory over {here.shared_memory}")
    if kernel in LINEAR and config.block_m >= WARPGROUP and code.matrix != MATRIX[target]:
        wrong.append(f"no {MATRIX[target]}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
