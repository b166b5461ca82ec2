"""The check of loads, on kernels of a few instructions."""

import pytest

from tests.compile_only.coherence import Accesses, accesses, entries, faults_of_ptx, faults_of_sass

# partials at byte 0, y at 8 and N at 16 of the arguments; the first is read as LOAD says.
PTX = """
.entry _ZN3one13decode_kernelE4Args(
.param .align 8 .b8 _ZN3one13decode_kernelE4Args_param_0[24]
)
{
mov.b64 %rd1, _ZN3one13decode_kernelE4Args_param_0;
mov.u64 %rd2, %rd1;
add.s64 %rd10, %rd1, 24;
ld.param.v2.u64 {%rd3, %rd4}, [%rd2];
ld.param.u64 %rd5, [%rd10+-8];
cvta.to.global.u64 %rd6, %rd3;
mul.wide.s32 %rd7, %r1, 4;
mad.lo.s64 %rd8, %rd5, 4, %rd6;
add.s64 %rd9, %rd8, %rd7;
@%p1 bra $L1;
st.global.f32 [%rd9], %f1;
$L1:
LOAD %f2, [%rd9+128];
st.global.f32 [%rd4], %f2;
ret;
}
"""
COHERENT, READ_ONLY = (PTX.replace("LOAD", f"ld.global.{how}.f32") for how in ("cg", "nc"))
# An acquire, two loads, a store.
SASS = """
        /*0010*/                   LDG.E.STRONG.GPU R0, desc[UR4][R2.64] ;
        /*0020*/                   CCTL.IVALL ;
        /*0030*/              @!P0 LDG.E.STRONG.GPU R1, desc[UR4][R4.64] ;
        /*0040*/                   LDG.E.128.CONSTANT R8, desc[UR4][R6.64] ;
        /*0050*/                   STG.E desc[UR4][R6.64], R1 ;
"""


def body(ptx: str) -> str:
    ((_, found),) = entries(ptx)
    return found


def test_accesses_of_a_pointer_are_followed_to_its_argument() -> None:
    assert accesses(body(COHERENT)) == Accesses(coherent={0}, written={0, 8})
    assert accesses(body(READ_ONLY)) == Accesses(read_only={0}, written={0, 8})


def test_accesses_of_two_pointers_in_one_register_are_unknown() -> None:
    mixed = COHERENT.replace("%rd9, %rd8, %rd7", "%rd9, %rd8, %rd4")
    assert accesses(body(mixed)).unknown == [
        "st.global.f32 [%rd9], %f1",
        "ld.global.cg.f32 %f2, [%rd9+128]",
    ]


@pytest.mark.parametrize(
    ("ptx", "want"),
    [
        (COHERENT, []),
        (
            READ_ONLY,
            [
                "ld.global.nc of what it writes: the argument at byte 0",
                "reads nothing that it writes",
            ],
        ),
    ],
    ids=["coherent", "read-only"],
)
def test_ptx_with_a_load_of_each_kind_is_faulted(ptx: str, want: list[str]) -> None:
    assert faults_of_ptx("decode", body(ptx)) == want


@pytest.mark.parametrize(
    ("kernel", "old", "new", "want"),
    [
        ("decode", "", "", []),
        ("decode", "STRONG.GPU R1", "CONSTANT R1", ["no coherent load beside the acquire"]),
        ("decode", "CCTL.IVALL", "NOP", ["no acquire"]),
        ("decode", "128.CONSTANT", "128", ["neither ld.global.nc nor coherent: LDG.E.128"]),
        ("gemm", "", "", ["a coherent load, in a kernel without a flag"]),
    ],
)
def test_sass_with_loads_of_each_kind_is_faulted(
    kernel: str, old: str, new: str, want: list[str]
) -> None:
    assert faults_of_sass(kernel, SASS.replace(old, new) if old else SASS) == want
