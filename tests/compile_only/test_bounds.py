"""Static bounds: figures that counting instructions alone hides. Nothing is compiled."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from tests.compile_only import bounds, budgets, machine_code
from tests.compile_only.bounds import L2_LATENCY, LATENCY
from tests.support.gpus import A100, H100

KEPT = budgets.read()
NO_LOOP = {"instructions": 0, "wavefronts": 0}


def cuda(target: str, key: str) -> dict[str, float]:
    found = bounds.of_cuda(target, key, KEPT["cuda"][target][key])
    assert found is not None
    return found


def triton(target: str, start: str) -> tuple[dict[str, float], int]:
    """The bounds of the kernel whose name starts so, and its programs."""
    (key,) = (key for key, code in KEPT["kernels"][target].items() if key.startswith(start))
    code = KEPT["kernels"][target][key]
    found = bounds.of_triton(target, key, code)
    assert found is not None
    return found, code["programs"]


def test_dense_gemm_is_bound_by_the_l2_cache_on_h100() -> None:
    """A tile of 64 × 128 loads 384 bytes for 16384 FLOPs: 42.7 a byte, at 7.4 TB/s."""
    found = cuda("sm90", "gemm bfloat16 dense y")
    assert bounds.tightest(found)[0] == "L2" and found["issue"] == 1.0
    assert 280e12 < found["L2"] * H100.tensor_flops <= 320e12


def test_gemm_of_codes_is_bound_by_shared_memory_on_h100() -> None:
    """A step of 2 · 64 · 128 · 64 FLOPs has 832 wavefronts or a few more: 256 look up codes, 128
    store them, 384 load operands, 64 copy x."""
    found = cuda("sm90", "gemm bfloat16 codes y")
    assert bounds.tightest(found)[0] == "shared"
    assert found["shared"] == pytest.approx(2 * 64 * 128 * 64 / 832 / 4096, rel=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_decoding_gemv_streams_codes(dtype: str) -> None:
    """14336×4096 of NF4: the launch and the last tile cost a quarter on H100, a fifth on A100.

    By hand: 33 bytes for 64 weights; for M rows, x and y in 16 bits. Then a launch of 1.4 µs, the
    first loads and B of 0.6 µs each, and the sums of a shared tile, three times 0.3 µs through L2.
    """
    for M, rows in ((1, "M8 x in shared memory"), (16, "M16 x from caches")):
        for target, gpu in (("sm80", A100), ("sm90", H100)):
            found = cuda(target, f"decode {dtype} codes {rows}")
            stream = (14336 * 4096 * 33 / 64 + 2 * M * (14336 + 4096)) / gpu.bandwidth
            assert found["trips"] == pytest.approx(stream / (stream + 3.5e-6), rel=1e-6)
            assert found["in flight"] == 1.0
            name, share = bounds.tightest(found)
            assert (name == "trips" and 0.7 < share < 0.75) if gpu is H100 else 0.8 <= share < 0.85


BASIC = bounds.Work(1e8, 2e8, programs=528, warps=8, steps=64, registers=64)  # 4 · 132 programs
COMPUTING = replace(BASIC, flops=1e12)
LOOP = {"instructions": 5000, "wavefronts": 3000}
CLOCKS = H100.multiprocessors * H100.clock
TURNS = 528 * 8 * 64


@pytest.mark.parametrize(
    ("work", "name", "seconds"),
    [
        (BASIC, "issue", TURNS * 5000 / 4 / CLOCKS),
        (BASIC, "shared", TURNS * 3000 / CLOCKS),
        (replace(BASIC, loaded=1e10), "L2", 1e10 / 32 / CLOCKS),
        (replace(BASIC, programs=529), "issue", 529 * 8 * 64 * 5000 / 4 / CLOCKS * 660 / 529),
        (replace(COMPUTING, executed=3e12), "waves", 3e12 / H100.tensor_flops),
        (replace(COMPUTING, on="tf32"), "waves", 6e12 / H100.tensor_flops),
        (replace(COMPUTING, on="fp32"), "waves", 1e12 / H100.fp32_flops),
        (replace(BASIC, trips=1e-3), "trips", 1.4e-6 + 1e-3 + 1e8 / H100.bandwidth),
        (replace(COMPUTING, trips=1e-3), "trips", 1.4e-6 + 1e-3 + 1e12 / H100.tensor_flops),
    ],
    ids=str,
)
def test_each_bound_is_the_roofline_over_the_seconds_of_its_unit(
    work: bounds.Work, name: str, seconds: float
) -> None:
    roofline = max(1e8 / H100.bandwidth, work.flops / H100.tensor_flops)
    found = bounds.bounds(H100, work, LOOP)[name]
    assert found < 1.0 and found == pytest.approx(roofline / seconds)


def test_decoding_two_pass_waits_on_64_of_132_multiprocessors() -> None:
    """Each of 32 steps waits for its codes. Issue on all multiprocessors would allow 40 %."""
    found, programs = triton("sm90", "two_pass_kernel 16x64x128 M16")
    assert programs == 64
    assert found["trips"] < found["in flight"] < 0.2 and found["issue"] * 132 / 64 > 0.4


def test_a_block_more_than_multiprocessors_halves_the_wave() -> None:
    work = bounds.Work(1.0, 1.0, programs=132, warps=8, steps=64, registers=64, flops=1e12)
    assert bounds.bounds(H100, work, NO_LOOP)["waves"] == 1.0
    half = bounds.bounds(H100, replace(work, programs=133), NO_LOOP)["waves"]
    assert half == pytest.approx(133 / 264)


def test_bytes_in_flight_bound_a_loop_that_waits() -> None:
    """256 steps that wait for memory, in four blocks a multiprocessor, of eight that fit."""
    work = bounds.Work(1e8, 1e8, programs=132 * 4, warps=4, steps=256, registers=64)

    def in_flight(changed: bounds.Work) -> float:
        return bounds.bounds(H100, changed, NO_LOOP)["in flight"]

    assert in_flight(work) == pytest.approx(1e8 / H100.bandwidth / (256 * LATENCY))
    assert in_flight(replace(work, ahead=3, steps=768)) == pytest.approx(in_flight(work))
    two_fit = replace(work, shared=100 << 10)  # so that there are two waves
    assert in_flight(two_fit) == pytest.approx(in_flight(work) / 2)
    from_cache = replace(work, loaded=1e12)
    assert in_flight(from_cache) == pytest.approx(in_flight(work) * LATENCY / L2_LATENCY, rel=0.01)


def test_loop_counts_wavefronts_of_shared_memory() -> None:
    ops = ["LDS", "LDS.64", "LDS.128", "STS.128", "LDSM.16.M88.4", "LDSM.16.MT88.2"]
    ops += ["LDGSTS.E.BYPASS.LTC128B.128", "LDG.E.128.CONSTANT", "FFMA"]
    code = machine_code.Code(32, 0, 0, 0, "", True, None, Counter(ops))
    assert code.measure_loop() == {"instructions": 9, "wavefronts": 1 + 2 + 4 + 4 + 4 + 2 + 4}
    # Four warps read 128 columns of 16 bfloat16 together: 4 KB, eight wavefronts a warp.
    code = machine_code.Code(32, 0, 0, 0, "", True, None, Counter(["HGMMA.64x128x16.F32.BF16"]))
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


def test_skinny_kernels_state_units_that_limit_them() -> None:
    """64 ranks on CUDA cores take longer than reading the activations does on H100."""
    for key in ("thin R64", "pair R64"):
        assert bounds.tightest(cuda("sm90", key))[0] == "waves"


def test_no_bound_is_zero_or_above_one() -> None:
    for section, of in (("cuda", bounds.of_cuda), ("kernels", bounds.of_triton)):
        for target, kernels in KEPT[section].items():
            known = [found for key, code in kernels.items() if (found := of(target, key, code))]
            assert known or target not in bounds.GPUS
            assert all(0 < share <= 1 for found in known for share in found.values())
            # Not all of a kernel's bounds are the cap of 1: a launch takes time at least.
            assert all(0 < found["trips"] < 1 for found in known)
