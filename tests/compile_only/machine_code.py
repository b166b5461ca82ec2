"""The machine code of a compiled kernel: registers, spills, memory, and its inner loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Code:
    registers: int
    spills: int  # bytes of stack or local memory; on AMD vector registers
    spills_in_loops: int  # instructions that read or write those
    shared: int
    matrix: str  # the kind of matrix instruction; "" where there is none
    wide: bool  # whether global memory is read 128 bits at a time
    loop: Counter[str]  # instructions of the loop that multiplies, see `_loop`

    def faults(self, needs_matrix: bool, needs_wide: bool, few: int = 0) -> list[str]:
        """Return what is wrong; few: bytes of stack that may be touched outside of loops."""
        return [
            *([f"spills {self.spills}"] if self.spills > few or self.spills_in_loops else []),
            *["no matrix instruction"] * (needs_matrix and not self.matrix),
            *["no load of 128 bits"] * (needs_wide and not self.wide),
        ]

    def measure_loop(self) -> dict[str, int]:
        """Return what a warp does in one turn of the loop.

        instructions: that it issues. wavefronts: of 128 bytes of shared memory, if no banks
        conflict and all lanes access bytes of their own.
        """
        wavefronts = 0
        for op, n in self.loop.items():
            if found := re.match(r"(?:LDSM|STSM)\S*\.(\d)$", op):
                wavefronts += n * int(found[1])
            elif op.startswith(("LDS", "STS", "LDGSTS")):
                wavefronts += n * (4 if op.endswith(".128") else 2 if op.endswith(".64") else 1)
            elif found := re.match(r"HGMMA\.64x(\d+)x(\d+)", op):  # four warps read once
                wavefronts += n * int(found[1]) * int(found[2]) * 2 // 128 // 4
        return {"instructions": sum(self.loop.values()), "wavefronts": wavefronts}


def read(kernel: Any) -> Code:
    """Read the machine code of a compiled Triton kernel."""
    if "amdgcn" in kernel.asm:
        return _read_amd(kernel)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = output("cuobjdump", "--dump-resource-usage", file.name)
        sass = output("nvdisasm", "-c", file.name)
    ptx = kernel.asm["ptx"]
    kinds = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
    code = parse(usage, sass, next((kind for kind in kinds if kind in ptx), ""))
    return replace(code, shared=kernel.metadata.shared)


def parse(usage: str, sass: str, matrix: str) -> Code:
    """Parse what NVIDIA's tools say of a kernel: the resources that it uses, and its code."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, usage
    loop, spills_in_loops = _loop(sass)
    return Code(
        registers=int(found[1]),
        spills=int(found[2]) + int(found[4]),
        spills_in_loops=spills_in_loops,
        shared=int(found[3]),
        matrix=matrix,
        wide=bool(re.search(r"LDG\S*\.128|LDGSTS\S*\.128", sass)),
        loop=loop,
    )


def _read_amd(kernel: Any) -> Code:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    return Code(
        registers=field("vgpr_count"),
        spills=field("vgpr_spill_count"),  # scalar registers spill to lanes of these, not to memory
        spills_in_loops=field("vgpr_spill_count"),  # wherever they are
        shared=kernel.metadata.shared,
        matrix="mfma" if "v_mfma" in text else "",
        wide="load_dwordx4" in text,
        loop=Counter(),
    )


def output(tool: str, *arguments: str) -> str:
    """Return what a tool prints, of Triton's if it is not named by an absolute path."""
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _loop(sass: str) -> tuple[Counter[str], int]:
    """The loop with the most matrix instructions; in all loops, what spills.

    Of loops with as many: the shortest of those that overlap, since the others go round it; the
    longest of those apart, since x·Aᵀ has a shorter loop than x·Wᵀ of codes.
    """
    lines = [line for line in sass.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/|^\.L", line)]
    labels = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if line[0] == "."}
    # An instruction that no lane executes takes an issue slot and nothing else.
    lines = [re.sub(r"@!PT\s+\w[\w.]*", "NOP", line) for line in lines]
    ops = [
        found[1] if (found := re.search(r"\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*[\w.]*)", line)) else ""
        for line in lines
    ]
    loops, spilled = list[tuple[int, range]](), set[int]()
    for end, line in enumerate(lines):
        jump = re.search(r"BRA.*`\((\.L\w+)\)", line)
        body = range(labels.get(jump[1], end + 1) if jump else end + 1, end + 1)
        spilled.update(i for i in body if ops[i].startswith(("LDL", "STL")))
        if count := sum(_is_matrix(ops[i]) for i in body):
            loops.append((count, body))
    most = max((count for count, _ in loops), default=0)
    chosen, apart = range(0), list[range]()
    for body in sorted((body for count, body in loops if count == most), key=len):
        if all(body.stop <= other.start or other.stop <= body.start for other in apart):
            apart.append(body)
            chosen = body
    return Counter(ops[i] for i in chosen if ops[i]), len(spilled)


def _is_matrix(op: str) -> bool:
    return op.startswith(("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA"))
