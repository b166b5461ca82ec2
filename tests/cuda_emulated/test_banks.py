"""Bank conflicts of each access to shared memory, counted from its addresses."""

from pathlib import Path

import pytest

import lora_kernels
from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import COOPERATIVE, TWO_PASS
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case
from tests.support.problems import UNDROPPED, bf16

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"

# Kernel and part of a line -> the wavefronts that an access there takes beyond those without
# conflicts, on average. All other accesses have none. A number that has become smaller is an error
# too: it is lowered here.
Budget = dict[tuple[str, str], float]

GEMM: Budget = {
    ("gemm", "sts(ss + "): 1,  # S and Q, once for each 16 ranks
    ("gemm", "sts(qs + "): 1,
    ("gemm", "lds<float>(at), v1 = lds<float>(at + 4)"): 2,  # of both
    ("gemm", "sts(xs + ((wm"): 1,  # y, once
}
# Two rows of x at a time, of tiles of 16 rows of W, once for each tile.
DECODE: Budget = {
    ("decode", "sum += lds<float>(at + i"): 1,
    ("decode", "sts(at, sum)"): 1,
    ("decode", "y = lds<float>(sums + "): 1,
}
FORWARD: Budget = GEMM | {("thin", "sts(vs + "): 3, ("thin", "sts(ys + "): 3}
BACKWARD: Budget = GEMM | {
    ("pair", "lds<Words4>(at)"): 4 / 5,  # one of lora_B in five; four of dy have none
    ("pair", "sts(at, w)"): 4,
    ("thin", "sts(at, w)"): 4,
}
# Four neighbouring lanes store chunks of one row; two of the four are in the same banks.
DX_OF_CODES: Budget = {("gemm", "sts(to + chunk_at<COLUMNS>"): 4}
RANK_16: Budget = {("pair", "sts(ss + "): 1, ("pair", "sts(bs + "): 1, ("thin", "sts(ys + "): 1}
RANK_64: Budget = {("pair", "sts(bs + "): 3}


def few_rows(M: int, quant: str) -> tuple[Case, str, str]:
    return Case(M, 64, 1024, 16, bf16, quant=quant), COOPERATIVE, "forward"


def rows(R: int, quant: str, direction: str) -> tuple[Case, str, str]:
    return Case(64, 128, 128, R, bf16, quant=quant, **UNDROPPED), TWO_PASS, direction


DENSE, CODES = "", "nf4-64-nested"
TABLE: list[tuple[tuple[Case, str, str], Budget]] = [
    *((few_rows(M, quant), {}) for M in (1, 9, 16) for quant in (DENSE, CODES)),
    (few_rows(8, CODES), {}),  # x is not in shared memory
    (few_rows(8, DENSE), DECODE),
    *((rows(R, quant, "forward"), FORWARD) for R in (16, 64) for quant in (DENSE, CODES)),
    (rows(16, DENSE, "backward"), BACKWARD | RANK_16),
    (rows(64, DENSE, "backward"), BACKWARD | RANK_64),
    (rows(16, CODES, "backward"), BACKWARD | RANK_16 | DX_OF_CODES),
    (rows(64, CODES, "backward"), BACKWARD | RANK_64 | DX_OF_CODES),
]


def conflicts(case: Case, strategy: str, direction: str) -> dict[tuple[str, str], float]:
    """Return the wavefronts too many of an access, for each kernel and line of csrc/cuda."""
    args = cases.inputs(case)
    dy = args.pop("dy")
    with cuda.emulate() as emulator, lora_kernels.backend("cuda", strategy):
        emulator.count_banks(direction == "forward")
        y = lora_kernels.lora_linear(**args)
        if direction == "backward":
            emulator.count_banks(True)
            y.backward(dy)
        sites = emulator.read_banks()
        emulator.count_banks(False)
    found: dict[tuple[str, str], float] = {}
    for kernel, _, file, line, accesses, extra, _ in sites:
        text = (CSRC / Path(file).name).read_text().splitlines()[line - 1].strip()
        found[kernel, text] = extra / accesses
    return found


@pytest.mark.parametrize(
    ("call", "budget"),
    [pytest.param(call, budget, id=f"{call[2]}-{call[0]}") for call, budget in TABLE],
)
def test_accesses_to_shared_memory_wait_for_banks_as_their_budget_says(
    call: tuple[Case, str, str], budget: Budget
) -> None:
    found, unseen, wrong = conflicts(*call), set(budget), []
    for (kernel, line), got in sorted(found.items()):
        named = [key for key in budget if key[0] == kernel and key[1] in line]
        unseen -= set(named)
        want = sum(budget[key] for key in named)
        if len(named) > 1 or got != want:
            wrong.append(f"{kernel}: {got:g} wavefronts too many, want {want:g}: {line}")
    assert not wrong, "\n".join(wrong)
    assert not unseen
