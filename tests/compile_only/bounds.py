"""Static bounds on the speed of a kernel: what its machine code, tiles and launch allow at best.

    python -m tests.compile_only.bounds [--write]

Compiles the Triton kernels of `calls.SLICE`, reads the CUDA kernels of the build, and prints every
bound. --write puts the tables into benchmarks/KERNELS.md and docs/gpu.md.

Each bound is a share of the roofline (memory bandwidth or the tensor cores' peak, whichever takes
longer) at K = 4096, N = 4096 (14336 for decode) and the rows of the kernel's name, 4096 if it has
none:

- issue: four warps of a multiprocessor issue an instruction a clock;
- shared: 128 bytes of shared memory a clock, without bank conflicts;
- L2: the bytes that tiles load from the L2 cache;
- in flight: bytes on their way per multiprocessor over the latency (Little's law);
- waves: whole tiles on the units that the kernel uses, and idle multiprocessors in the last wave;
- trips: a launch, then the round trips before and after the loop that depend on each other.

The least share is an upper bound. The kernel reaches less.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_kernels.core.device import DeviceInfo
from tests.compile_only import cuda, targets
from tests.compile_only.calls import SLICE
from tests.compile_only.machine_code import Code
from tests.support.gpus import A100, B200, H100, RTX3090, RTX4090, RTX5090

GPUS = {"sm80": A100, "sm86": RTX3090, "sm89": RTX4090, "sm90": H100, "sm100": B200}
GPUS |= {"sm120": RTX5090}
ROOT = Path(__file__).parents[2]
DOCUMENTS = ROOT / "benchmarks" / "KERNELS.md", ROOT / "docs" / "gpu.md"
SERVED = {"A100": "sm80", "RTX 4090": "sm89", "H100": "sm90", "B200": "sm100"}
# Calls of docs/gpu.md and of qualification's candidates, at 14336×4096: kernel, rows.
CALLS = {
    "cuda cooperative, 1 row in 4 bits": ("decode bfloat16 codes M8 x in shared memory", 1),
    "cuda cooperative, 16 rows in 4 bits": ("decode bfloat16 codes M16 x from caches", 16),
    "cuda cooperative, 1 row dense": ("decode bfloat16 dense M8 x in shared memory", 1),
    "cuda cooperative, 16 rows dense": ("decode bfloat16 dense M16 x from caches", 16),
    "cuda two_pass, 17 rows in 4 bits": ("gemm bfloat16 codes y", 17),
    "cuda two_pass, 128 rows in 4 bits": ("gemm bfloat16 codes y", 128),
    "triton fused, 16 rows in 4 bits": ("codes:whole", 16),
    "triton fused, 128 rows in 4 bits": ("codes:whole", 128),
    "triton fused, 16 rows dense": ("bfloat16 fused forward", 16),
}

N = K = 4096
DECODE_N = 14336
RANK = 16
CODES = 0.5 + 1 / 64  # bytes of a 4-bit weight's element: code and scale
# Of a multiprocessor from sm_80 on, from the CUDA programming guide. Its shared memory is the limit
# of one block plus the bytes that the system reserves per block.
RESERVED, REGISTERS = 1 << 10, 64 << 10
# Seconds from one small kernel's start to the next one's, in a stream. An estimate: at 4096² a
# launch takes 1.4 of the 4.3 µs that a GEMV of codes takes on H100.
LAUNCH = 1.4e-6
# Seconds of a load from memory and from the L2 cache, beside others. Idle, 470 to 540 and 260 to
# 275 clocks on A100, RTX 4090 and H100 (arXiv 2402.13499). Under load is an estimate.
LATENCY, L2_LATENCY = 0.6e-6, 0.3e-6
# Bytes a clock that the L2 cache gives a multiprocessor: 7.4 TB/s on H100, 5.2 on RTX 4090. An
# estimate within a quarter.
L2_BYTES = {80: 32, 90: 32, 100: 32, 103: 32, 86: 16, 89: 16, 120: 16}


@dataclass(frozen=True)
class Work:
    """A launch at its representative size.

    Args:
        bytes, flops: the least of memory and of GEMMs, for any kernel.
        executed: FLOPs with padding; None for no more.
        on: the units that execute them, "tensor", "tf32" (three products) or "fp32".
        float32: whether operands are.
        steps: turns of a warp's loop, on average.
        longest: the most turns, if programs differ.
        ahead: turns whose loads are on their way at a time.
        loaded: bytes that all programs load from the L2 cache.
        trips: seconds of the round trips before and after the loop.
        step_trips: seconds of a turn's round trips after its loads from memory.
    """

    bytes: float
    loaded: float
    programs: int
    warps: int
    steps: float
    registers: int
    shared: int = 0
    flops: float = 0.0
    executed: float | None = None
    on: str = "tensor"
    float32: bool = False
    ahead: float = 1
    trips: float = 2 * LATENCY + L2_LATENCY  # the first tiles; P and B; the last sums
    step_trips: float = 0.0
    longest: float = 0.0


def bounds(gpu: DeviceInfo, work: Work, loop: dict[str, int]) -> dict[str, float]:
    """Return each bound as a share of the roofline.

    loop: instructions and wavefronts of a warp's turn, zeros if there is no loop with a GEMM.
    """
    count, clocks = gpu.multiprocessors, gpu.multiprocessors * gpu.clock
    rates = {"tensor": gpu.tensor_flops, "tf32": gpu.tensor_flops / 6, "fp32": gpu.fp32_flops}
    best = max(rates["tf32"], rates["fp32"]) if work.float32 else rates["tensor"]
    roofline = max(work.bytes / gpu.bandwidth, work.flops / best)
    executed = work.flops if work.executed is None else work.executed
    busy = work.programs / (_tiles(work.programs, count) * count)
    turns = work.programs * work.warps * work.steps
    resident = count * _occupancy(gpu, work.shared, work.registers, work.warps)
    first = min(1.0, work.bytes / work.loaded)  # of the loads, from memory
    latency = (L2_LATENCY + first * (LATENCY - L2_LATENCY)) / work.ahead + work.step_trips
    waits = _tiles(work.programs, resident) * max(work.steps, work.longest)
    seconds = {
        "issue": turns * loop["instructions"] / 4 / clocks / busy,
        "shared": turns * loop["wavefronts"] / clocks / busy,
        "L2": work.loaded / (L2_BYTES[gpu.capability] * clocks) / busy,
        "in flight": waits * latency,
        "waves": executed / rates[work.on] / busy,
    }
    seconds["trips"] = LAUNCH + work.trips + max(roofline, seconds["in flight"])
    return {name: min(1.0, roofline / time) if time else 1.0 for name, time in seconds.items()}


def tightest(found: dict[str, float]) -> tuple[str, float]:
    """Return the bound of the least share; of equal ones the first."""
    return min(found.items(), key=lambda item: item[1])


def of_triton(target: str, kernel: targets.Found, N: int = N) -> dict[str, float] | None:
    """Return the bounds of a Triton kernel, or None if its sizes are not known."""
    key, code, config = kernel.key, kernel.code, kernel.launch.config
    found = re.match(r"(\w+)_kernel(?: #\d)? (?:(\d+)x)?(\d+)x(\d+)", key)
    if target not in GPUS or found is None or found[1] == "reduce":
        return None
    name, (m, n, k) = found[1], (int(size or 0) for size in found.groups()[1:])
    M = _number(key, "M", 4096)
    item, codes, programs = (4 if "float32" in key else 2), "codes" in key, kernel.launch.programs
    of_weight = CODES if codes else item
    tiles = _tiles(M, m) if m else 0  # of rows
    x, y, weight = M * K * item, M * N * item, N * K * of_weight
    work = Work(
        bytes=x, loaded=x, programs=programs, warps=config.warps, steps=1,
        registers=code.registers, shared=code.shared, ahead=max(1, config.stages - 1),
        on="tf32" if item == 4 else "tensor", float32=item == 4,
    )  # fmt: skip
    if name == "fused":
        columns = _tiles(N, n)
        # Codes are loaded into registers and decoded in the same turn.
        work = replace(
            work, bytes=x + y + weight, loaded=x * columns + tiles * weight, steps=_tiles(K, k),
            programs=tiles * columns,
            flops=2.0 * M * N * K, executed=2.0 * tiles * m * columns * n * K,
            ahead=1 if codes else work.ahead,
        )  # fmt: skip
    elif name == "shrink":
        a, steps = RANK * K * item, tiles * _tiles(K, k) / programs
        work = replace(work, bytes=x + a, loaded=x + tiles * a, steps=max(1, steps))
    elif name == "outer":
        work = replace(work, steps=max(1, _tiles(M, m) * _tiles(N, n) / programs))
    else:  # dequantize
        work = replace(work, bytes=N * K * (2 + CODES), loaded=N * K * (2 + CODES))
    # One thread starts tcgen05.mma, in a block apart, so that the loop is not found.
    is_found = not code.matrix.startswith("tcgen05")
    loop = code.measure_loop() if is_found else {"instructions": 0, "wavefronts": 0}
    return bounds(GPUS[target], work, loop)


def of_cuda(target: str, key: str, code: Code, M: int = 4096) -> dict[str, float] | None:
    """Return the bounds of a CUDA kernel, or None if it is only an epilogue.

    M: of gemm, whose N is 4096 there and 14336 for fewer rows; 4096 for others but decode.
    """
    kernel, codes, registers = key.split()[0], "codes" in key, code.registers
    loop = code.measure_loop()
    R, size = _number(key, "R", RANK), N * K  # elements of x, of W and of y
    if kernel == "decode":
        return bounds(GPUS[target], _decode(GPUS[target], key, registers), loop)
    if kernel == "gemm":  # three stages of x; codes are loaded a turn ahead, decoded into two
        n, rows = (N if M == 4096 else DECODE_N), _tiles(M, 64)
        weight, shared = (n * K * CODES, 57 << 10) if codes else (n * K * 2, 72 << 10)
        tiles = rows * (n // 128)
        splits = max(1, min(8, 264 // tiles))  # as `_Linear.run`
        work = Work(
            bytes=2 * M * (K + n) + weight,
            loaded=2 * M * K * (n // 128) + weight * rows + 8 * M * n * splits * (splits > 1),
            programs=tiles * splits, warps=4, steps=K // 64 / splits, registers=registers,
            shared=shared, flops=2.0 * M * n * K, executed=2.0 * 64 * rows * n * (K + 3 * R),
            ahead=1 if codes else 2,
            # P is computed and added before, by two launches.
            trips=2 * LATENCY + L2_LATENCY + 2 * (LAUNCH + LATENCY),
        )  # fmt: skip
        return bounds(GPUS[target], work, loop)
    update = size * R * 2  # bytes of A, or FLOPs of x·Aᵀ, in each
    # Bytes, bytes from the L2 cache, programs, steps, FLOPs on CUDA cores. thin and pair share K
    # among four programs. sums has the loads of four rows on their way at a time.
    sizes: dict[str, tuple[float, float, int, int, float]] = {
        "thin": (2 * size, 2 * size + update / 64, 256, 1024 // 32, update),
        "pair": (2 * size, 2 * size + 2 * update / 64, 256, 1024 // 64, 2 * update),
        "sums": (2 * size, 2 * size, 256, 4096 // 8 // 4, 0.0),
    }
    if kernel not in sizes:  # finish, reduce
        return None
    moved, loaded, programs, steps, flops = sizes[kernel]
    work = Work(moved, loaded, programs, 4, steps, registers, flops=flops, on="fp32")
    return bounds(GPUS[target], work, loop)


def _decode(gpu: DeviceInfo, key: str, registers: int) -> Work:
    """Return decode.cu's launch: for 1 row if x is in shared memory, else for as many as it takes.

    A turn is a chunk of a warp, and the units of all tiles are cut into equal stripes.
    """
    codes, resident, wide = "codes" in key, "shared" in key, "M16" in key
    n, M, width = DECODE_N, 1 if resident else 16 if wide else 8, 16 if wide else 8
    slices = 8 if resident else 2  # of K; the warps of a slice read x once from the L2 cache
    tile, parts = 8 // slices * 16, _tiles(K / 128, slices)
    shared = (64 << 10 if codes else 32 << 10) + slices * width * (tile + 4) * 4 + 16
    shared += M * RANK * 4 + (2 * M * K if resident else 0)
    units, blocks = _tiles(n, tile) * parts, _occupancy(gpu, shared, registers, 8)
    stripe = max(_tiles(units, gpu.multiprocessors * blocks), min(parts, 4 if codes else 2))
    programs, weight = _tiles(units, stripe), n * K * (CODES if codes else 2)
    # The first loads, behind which P is computed. After the last: the sums of a tile that blocks
    # share are stored, counted and loaded; B.
    shares = 3 * L2_LATENCY if stripe % parts else 0.0
    return Work(
        bytes=weight + 2 * M * (K + n),
        loaded=weight + 2 * M * K * (programs if resident else n / tile),
        programs=programs, warps=8, steps=units / programs, longest=stripe, registers=registers,
        shared=shared, executed=2.0 * (2 if codes else 1) * width * n * K,
        # Four loads, less the one that is read; a chunk of a dense W is four.
        ahead=3 if codes else 0.75, trips=LATENCY + shares + LATENCY,
        step_trips=0.0 if resident else L2_LATENCY,  # x
    )  # fmt: skip


def _occupancy(gpu: DeviceInfo, shared: int, registers: int, warps: int) -> int:
    """Return the blocks that a multiprocessor holds."""
    of_memory = (gpu.shared_memory + RESERVED) // (shared + RESERVED)
    of_registers = REGISTERS // (32 * warps * _tiles(registers, 8) * 8)
    threads = 1536 if gpu.capability in (86, 89, 120) else 2048
    return max(1, min(of_memory, of_registers, threads // (32 * warps)))


def _number(key: str, letter: str, default: int) -> int:
    found = re.search(rf" {letter}(\d+)", key)
    return int(found[1]) if found else default


def _tiles(size: float, tile: float) -> int:
    return int(-(-size // tile))


def describe(found: dict[str, float] | None) -> str:
    """Return the least bound as "29% trips"; "–" if none is known."""
    if found is None:
        return "–"
    name, share = tightest(found)
    return f"{share:.0%} {name}"


def table(head: str, columns: Sequence[str], rows: dict[str, dict[str, str]]) -> str:
    """Lay out the cells of each row, by column."""
    lines = [f"| {head} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row, cells in rows.items():
        lines.append(f"| {row} | {' | '.join(cells.get(name, '') for name in columns)} |")
    return "\n".join(lines)


def _print(target: str, key: str, found: dict[str, float] | None) -> None:
    if found is not None:
        shares = "  ".join(f"{name} {share:4.0%}" for name, share in found.items())
        print(f"{target:6} {shares}  {key}", flush=True)


def triton_table(calls: dict[str, dict[str, str]]) -> str:
    """Print the bounds of Triton's kernels, and return the least of each as a table.

    calls: gets the shares of CALLS, by target.
    """
    rows = defaultdict[str, dict[str, str]](dict)
    for target in [*targets.TARGETS, "sm89"]:  # the latter for `calls`
        for kernel in targets.kernels(target, SLICE):
            found, code = of_triton(target, kernel), kernel.code
            _print(target, kernel.key, found)
            matrix = (code.matrix or "–").split(".")[0]
            cell = f"{code.registers} {matrix} {describe(found)}"
            count, programs = targets.ALL[target][0].multiprocessors, kernel.launch.programs
            if target in GPUS and programs < count:
                cell += f" ({programs} of {count} SMs)"
            rows[kernel.key][target] = cell
            for call, (word, M) in CALLS.items():
                if "triton" in call and kernel.key.endswith(word) and f" M{M} " in kernel.key:
                    found = of_triton(target, kernel, DECODE_N)
                    calls[call][target] = describe(found).split()[0]
    return table("kernel", list(targets.TARGETS), dict(sorted(rows.items())))


def cuda_table(library: Path, calls: dict[str, dict[str, str]]) -> str:
    """Print the bounds of the CUDA kernels, and return the least of each as a table.

    calls: gets the shares of CALLS, by target.
    """
    rows = defaultdict[str, dict[str, str]](dict)
    for kernel in sorted(cuda.kernels(library), key=lambda kernel: (kernel.target, kernel.key)):
        found = of_cuda(kernel.target, kernel.key, kernel.code)
        _print(kernel.target, kernel.key, found)
        rows[kernel.key][kernel.target] = f"{kernel.code.registers} {describe(found)}"
        for call, (key, M) in CALLS.items():
            if key == kernel.key:
                found = of_cuda(kernel.target, key, kernel.code, M)
                calls[call][kernel.target] = describe(found).split()[0]
    return table("kernel", sorted(cuda.TARGETS), dict(sorted(rows.items())))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.compile_only.bounds", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--write", action="store_true", help="write the tables into the documents")
    write = parser.parse_args().write
    calls: dict[str, dict[str, str]] = {call: {} for call in CALLS}
    tables = {"compiled": triton_table(calls)}
    library = cuda.library()
    if library is not None:
        tables["cuda"] = cuda_table(library, calls)
    served = {
        call: {gpu: shares.get(target, "") for gpu, target in SERVED.items()}
        for call, shares in calls.items()
    }
    tables["bounds"] = table("forward, 14336×4096", list(SERVED), served)
    print(tables["bounds"])
    for path in DOCUMENTS if write else ():
        text = path.read_text()
        for name, rows in tables.items():
            marks = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
            text = marks.sub(lambda _, rows=rows: f"{rows}\n", text)
        path.write_text(text)


if __name__ == "__main__":
    main()
