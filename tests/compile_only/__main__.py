"""Compile the Triton kernels for GPUs that are not here, and hold them to their budgets.

    python -m tests.compile_only [--target sm90 ...] [--all] [--write]

A kernel that spills in a loop (or more than 32 bytes outside of loops), lacks its matrix
instruction, reads no 128 bits at a time though all is aligned, or takes more shared memory than
there is fails, and one that takes more registers or shared memory than budgets.json says (for the
Triton that they were written with).
"""

from __future__ import annotations

import argparse
import sys

from tests.compile_only import budgets
from tests.compile_only.calls import SLICE, every_call
from tests.compile_only.targets import ALL, TARGETS, VERSION, Found, kernels

MATRIX = dict.fromkeys(ALL, "mma.sync")
MATRIX |= {"sm90": "wgmma.mma_async", "gfx942": "mfma"}
MATRIX |= dict.fromkeys(("sm100", "sm103", "sm110"), "tcgen05.mma")
# Of stack, touched once a tile, outside of all loops: ptxas buys occupancy with them. 32 bytes a
# thread are 8 KiB a tile of 128×256, whose operands are 3 MB at K = 4096; they stay in L1.
FEW_BYTES = 32
ELEMENTWISE = ("gated_kernel", "gated_backward_kernel", "cross_entropy_kernel")
NO_PRODUCT = ("reduce_kernel", "gated_gradients_kernel", "dequantize_kernel", *ELEMENTWISE)
LINEAR = ("fused_kernel",)
WIDE_LOADS = (*LINEAR, *ELEMENTWISE)
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
    print("registers, shared memory, matrix instruction; then kernel and tiles, call")
    for target in args.target:
        calls = every if (args.all or args.call) and target in TARGETS else SLICE
        for found in kernels(target, [call for call in calls if (args.call or "") in str(call)]):
            seen += 1
            code, limits = found.code, kept["kernels"].get(found.key, {}).get(target)
            wrong = _wrong(found, target)
            if args.write:
                numbers = [code.registers, code.shared]
                kept["kernels"].setdefault(found.key, {})[target] = numbers
            # With --call, a kernel may be known by a call that was left out.
            elif kept["triton"] == VERSION and (limits or not args.call):
                wrong += budgets.excess(code, limits)
            line = (
                f"{'✗' if wrong else '✓'} {target:6} {code.registers:3} {code.shared:6} "
                f"{code.matrix:15}  {found.key}"
            )
            few = f"({code.spills} bytes of stack)" if code.spills and not wrong else ""
            print("  ".join(filter(None, [line, few, *wrong])), flush=True)
            failures += bool(wrong)
    if args.write:
        kept["triton"] = VERSION
        budgets.write(kept)
    print(f"{seen} kernels compiled with Triton {VERSION}, {failures} failures")
    return 1 if failures else 0


def _wrong(found: Found, target: str) -> list[str]:
    code, kernel, config = found.code, found.launch.name, found.launch.config
    here, wide = ALL[target][0], kernel in WIDE_LOADS and found.call.aligned
    wrong = code.faults(kernel not in NO_PRODUCT, wide, FEW_BYTES)
    if code.shared > here.shared_memory:
        wrong.append(f"shared memory over {here.shared_memory}")
    if kernel in LINEAR and config.block_m >= WARPGROUP and code.matrix != MATRIX[target]:
        wrong.append(f"no {MATRIX[target]}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
