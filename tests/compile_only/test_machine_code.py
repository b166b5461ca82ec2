"""How machine code is read. Nothing is compiled."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("triton")

from tests.compile_only import machine_code


def test_loop_counts_wavefronts_of_shared_memory() -> None:
    ops = ["LDS", "LDS.64", "LDS.128", "STS.128", "LDSM.16.M88.4", "LDSM.16.MT88.2"]
    ops += ["LDGSTS.E.BYPASS.LTC128B.128", "LDG.E.128.CONSTANT", "FFMA"]
    code = machine_code.Code(32, 0, 0, 0, "", True, Counter(ops))
    assert code.measure_loop() == {"instructions": 9, "wavefronts": 1 + 2 + 4 + 4 + 4 + 2 + 4}
    # Four warps read 128 columns of 16 bfloat16 together: 4 KB, eight wavefronts a warp.
    code = machine_code.Code(32, 0, 0, 0, "", True, Counter(["HGMMA.64x128x16.F32.BF16"]))
    assert code.measure_loop()["wavefronts"] == 8


SASS = """
.L_x_1:
        /*0000*/                   LDS R3, [R2] ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   FADD R3, R3, R3 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   STG.E [R2], R3 ;
        /*0050*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/              @!P0 BRA `(.L_x_2) ;
"""


def test_loop_is_the_longest_of_those_apart_and_no_detour() -> None:
    """The first loop, without the cold block behind it that jumps back."""
    loop, spills = machine_code._loop(SASS)
    assert loop == Counter(["LDS", "HMMA.16816.F32.BF16", "FADD", "BRA"]) and not spills


def test_loop_counts_no_wavefront_of_a_load_that_never_happens() -> None:
    """`@!PT LDS RZ, [RZ]` stands before a copy to shared memory."""
    loop, _ = machine_code._loop(SASS.replace("FADD R3, R3, R3", "@!PT LDS RZ, [RZ]"))
    assert loop == Counter(["LDS", "HMMA.16816.F32.BF16", "NOP", "BRA"])


def test_faults_of_a_spill_in_a_loop_excuse_no_bytes() -> None:
    usage = "REG:32 STACK:16 SHARED:0 LOCAL:0"
    after = "        /*0080*/                   STL [R1], R3 ;\n"
    outside = machine_code.parse(usage, SASS + after, "mma.sync")
    inside = machine_code.parse(usage, SASS.replace("FADD", "STL"), "mma.sync")
    assert outside.faults(True, False, few=32) == []
    assert outside.faults(True, False) == inside.faults(True, False, few=32) == ["spills 16"]
