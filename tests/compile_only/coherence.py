"""How the CUDA kernels read memory that the same launch writes: by their PTX and machine code.

`ld.global.nc` reads through a cache that no store reaches, so memory that a launch writes may not
be read by it. PTX names each pointer of a kernel's arguments, which `accesses` follows to the loads
and stores. In the machine code no pointer can be followed, but the kinds of loads can be counted:
LDG….CONSTANT is ld.global.nc, LDG….STRONG.GPU a load that sees other blocks' stores, and one before
CCTL.IVALL (which empties the L1 cache) an acquire.

Not seen: whether an acquire stands before the load, and whether two arguments are one tensor; the
emulator reports the former.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Kernels whose blocks read what others of the launch wrote, or of one that it overlaps.
COMMUNICATE = ("decode",)
# An argument is a byte offset into the kernel's parameters.
_FOLLOWED = ("add", "sub", "mov", "cvta", "selp")


@dataclass
class Accesses:
    """The pointers among a kernel's arguments, by how it accesses what they point to."""

    read_only: set[int] = field(default_factory=set)
    coherent: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)  # instructions whose pointer is not known


def entries(ptx: str) -> Iterator[tuple[str, str]]:
    """Yield the mangled name and the body of each kernel."""
    for found in re.finditer(r"^(?:\.\w+ )*\.entry (\w+)\((.*?)^\}", ptx, re.S | re.M):
        yield found[1], found[2]


def accesses(body: str) -> Accesses:
    """Follow the pointers of a kernel's arguments to its loads and stores of global memory.

    A register may have several of them; products and shifts have none, being indices.
    """
    instructions = [
        (found[1], found[2])
        for found in re.finditer(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]*)\s+([^;]*);", body, re.M)
    ]
    origins: dict[str, frozenset[int]] = {}
    bases: dict[str, int] = {}  # registers that point at an argument, and which
    changed = True
    while changed:
        changed = False
        for op, operands in instructions:
            registers = re.findall(r"%rd\d+", operands)
            if not registers:
                continue
            if op.startswith("ld.param"):
                found = _loaded(op, operands, bases)
            elif (offset := _base(op, operands, bases)) is not None:
                changed |= registers[0] not in bases
                bases[registers[0]] = offset
                continue
            elif op.startswith("mad"):
                found = {registers[0]: origins.get(operands.split(",")[-1].strip(), frozenset())}
            elif op.split(".")[0] in _FOLLOWED:
                sources = [origins.get(r, frozenset()) for r in registers[1:]]
                found = {registers[0]: frozenset().union(*sources)}
            else:
                continue
            for register, new in found.items():
                old = origins.get(register, frozenset())
                if not new <= old:
                    origins[register] = old | new
                    changed = True
    result = Accesses()
    for op, operands in instructions:
        if not re.match(r"(ld|st|atom|red)\.(\w+\.)*global|cp\.async\.c[ag]", op):
            continue
        addresses = re.findall(r"\[(%rd\d+)", operands)
        pointers = origins.get(addresses[-1], frozenset()) if addresses else frozenset()
        if len(pointers) != 1:
            result.unknown.append(f"{op} {operands}")
        elif op.startswith(("st.", "atom.", "red.")):
            result.written |= pointers
        elif ".nc" in op:
            result.read_only |= pointers
        else:
            result.coherent |= pointers
    return result


def _base(op: str, operands: str, bases: dict[str, int]) -> int | None:
    """The argument at which a mov or an add lets a register point, or None."""
    _, source, *rest = operands.split(", ")
    if op.startswith("mov") and source.endswith("_param_0"):
        return 0
    if source not in bases or not (op.startswith("mov") or (op.startswith("add") and rest)):
        return None
    if rest and rest[0].startswith("%"):
        return None
    return bases[source] + int(rest[0] if rest else 0)


def _loaded(op: str, operands: str, bases: dict[str, int]) -> dict[str, frozenset[int]]:
    """The 64-bit registers that an ld.param fills, and the argument of each."""
    found = re.match(r"(.*), \[(\S+?)(?:\+(-?\d+))?\]$", operands)
    if found is None or not op.endswith(("64", "b64")):
        return {}
    if "_param_0" not in found[2] and found[2] not in bases:
        return {}
    offset = bases.get(found[2], 0) + int(found[3] or 0)
    registers = re.findall(r"%rd\d+", found[1])
    return {register: frozenset({offset + 8 * i}) for i, register in enumerate(registers)}


def faults_of_ptx(kernel: str, body: str) -> list[str]:
    """Return what is wrong with the loads of a kernel."""
    found = accesses(body)
    both = sorted(found.read_only & found.written)
    return [
        *[f"ld.global.nc of what it writes: the argument at byte {offset}" for offset in both],
        *[
            f"cannot tell what {len(found.unknown)} instructions access, as {instruction}"
            for instruction in found.unknown[:1]
        ],
        *["reads nothing that it writes"]
        * (kernel in COMMUNICATE and not found.coherent & found.written),
    ]


def faults_of_sass(kernel: str, sass: str) -> list[str]:
    """Return what is wrong with the kinds of loads in a kernel's machine code."""
    ops = re.findall(r"\*/\s+(?:@!?U?P\w+ )?((?:LDG|LD|CCTL)\.[\w.]+)", sass)
    loads = [op for op in ops if not op.startswith("CCTL")]
    strong = [op for op in loads if ".STRONG.GPU" in op]
    acquires = sum(".STRONG.GPU" in a and b == "CCTL.IVALL" for a, b in itertools.pairwise(ops))
    other = sorted({op for op in loads if ".CONSTANT" not in op and ".STRONG.GPU" not in op})
    wrong = [f"neither ld.global.nc nor coherent: {op}" for op in other]
    if kernel not in COMMUNICATE:
        return wrong + ["a coherent load, in a kernel without a flag"] * bool(strong)
    return [
        *wrong,
        *["no acquire"] * (not acquires),
        *["no coherent load beside the acquire"] * (len(strong) <= acquires),
    ]
