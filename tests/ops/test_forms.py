"""Weights of 4 and 8 bits, with shifts and without: the definition's bits, float64's results."""

import dataclasses
import itertools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels import lora_linear
from lora_kernels.backends import decoder
from lora_kernels.backends.cpu import linear as cpu
from lora_kernels.backends.cpu import native
from lora_kernels.core import coding
from lora_kernels.oracle import forms
from lora_kernels.oracle.case import Case
from lora_kernels.quantization import QuantizedWeight
from tests.ops.engines import engines_in_turn, every_engine, every_native_engine, ways
from tests.support.codec import same_bits
from tests.support.engines import check
from tests.support.problems import FULL, bf16, f16, f32, with_rank
from tests.support.processes import run_python

# Blocks of 16 in every kernel; scales as files have them.
FORMS = (
    "int4-32-half-shift",
    "int4-16-shift",
    "int4-32-nested-shift",
    "signed4-32-half",
    "signed4-16",
    "int8-32-half",
    "int8-16-nested",
    "int8-32-shift",
    "uint8-16-half-shift",
    "e4m3-32",
    "e5m2-16-half",
)
every_form = pytest.mark.parametrize("form", FORMS)


def some_cases() -> list[Case]:
    chosen = []
    for form, dtype in itertools.product(FORMS, (f32, bf16)):
        # one row, few, more than are looked up in registers, a GEMM of several panels
        for M, N, K in ((1, 33, 160), (4, 7, 96), (9, 30, 1184), (33, 65, 96), (140, 40, 1152)):
            options: dict[str, Any] = FULL if M in (4, 33) else {}
            chosen.append(Case(M, N, K, 5, dtype, quant=form, values="nonnegative", **options))
    for form in FORMS[:2] + FORMS[5:8]:
        chosen += [Case(M, 65, 3232, 5, bf16, quant=form, dropout_p=0.1) for M in (2, 3, 11)]
        chosen += [Case(M, 30, 128, 5, f16, quant=form, bias=True) for M in (2, 33)]
        chosen += [Case(9, 65, 96, 5, f32, quant=form, compute=bf16)]
        chosen += [Case(70, 1152, 32, 5, f32, quant=form, frozen=("x",))]
    return [*map(with_rank, chosen)]


@engines_in_turn(some_cases())
def test_results_are_within_tolerance(case: Case, engine: str) -> None:
    check(case, ways(engine, case.M, case.compute or case.compute_dtype, True))


def definition(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    fields = weight.packed, weight.scales(), weight.code, weight.blocksize
    return coding.dequantize(*fields, weight.shape, dtype)


@every_native_engine
@every_form
def test_decoded_bits_are_the_definitions(form: str, engine: str) -> None:
    weight = forms.build(torch.randn(37, 224), form)
    for dtype in (f32, bf16, f16):
        want = definition(weight, dtype)
        assert same_bits(weight.dequantize(dtype), want)
        rows, columns = slice(5, 30), slice(16, 101)
        part = decoder.dense(weight.codes, weight.matrix_shape, dtype, rows=rows, columns=columns)
        assert same_bits(part, want[rows, columns].contiguous())
        part = decoder.dense(
            weight.codes, weight.matrix_shape, dtype, rows=rows, columns=slice(7, 90)
        )
        assert same_bits(part, want[rows, 7:90].contiguous())


@every_form
def test_pytorchs_ops_decode_to_the_definition(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = forms.build(torch.randn(3, 11, 96), form)
    want = definition(weight, f32)
    monkeypatch.setattr(native, "module", None)
    for dtype in (f32, bf16, f16, torch.float64):
        assert same_bits(weight.dequantize(dtype), want.to(dtype))
    for rows in (slice(0, 11), slice(5, 20), slice(11, 33)):  # of one expert, and of several
        part = decoder.dense(weight.codes, weight.matrix_shape, f32, rows=rows)
        assert same_bits(part, want.view(33, 96)[rows])
    plain = decoder.with_plain_scales(weight.codes)
    assert plain.absmax.dtype is f32 and plain.nested_code is plain.nested_absmax is None
    assert same_bits(plain.absmax, weight.scales())


@every_form
def test_operands_name_what_a_kernel_must_take(form: str) -> None:
    said = forms.build(torch.randn(4, 64), form).codes.operands()
    assert said == [
        *["shift"] * form.endswith("shift"),
        *["codes of 8 bits"] * (form.split("-")[0] in ("int8", "uint8", "e4m3", "e5m2")),
        *["scales in float16"] * ("half" in form),
    ]


@pytest.mark.parametrize("blocksize", [0, 8, 48, -16, "32", 32.0, True])
def test_block_size_of_a_form_is_a_power_of_two_of_16_or_more(blocksize: Any) -> None:
    weight = forms.build(torch.randn(4, 96), "int8-32-half-shift")
    with pytest.raises(ValueError, match=r"blocksize: got .*, want a power of two, 16 or more"):
        dataclasses.replace(weight, blocksize=blocksize)


@every_native_engine
@pytest.mark.parametrize("name", ["uint8", "e5m2", "int8", "e4m3"])
@pytest.mark.parametrize("M", [1, 2])
def test_one_or_two_rows_round_no_code_to_bfloat16(M: int, name: str, engine: str) -> None:
    """Terms cancel, so that a rounding of code times scale would be most of the sum."""
    weight = forms.build(torch.randn(32, 64).abs() + 1, f"{name}-32")
    x = torch.ones(M, 64, dtype=bf16)
    x[:, 1::2] = -1
    with lora_kernels.backend("cpu", cpu.GEMV_QUANTIZED):
        y = lora_linear(x, weight, torch.zeros(1, 64), torch.zeros(32, 1))
    w = definition(weight, torch.float64)
    # 17 bits of each code times scale, and y in bfloat16; the sums lose less.
    limit = 2.0**-16 * w.abs().sum(1) + 2.0**-8 * (x.double() @ w.t()).abs()
    assert bool(((y.double() - x.double() @ w.t()).abs() <= limit).all())


@every_engine
@pytest.mark.parametrize("name", forms.CODES)
@pytest.mark.parametrize("M", [1, 3, 40])
def test_every_code_beside_every_scale(M: int, name: str, engine: str) -> None:
    """Each code in each place of a register, with scales of both ends of float16, and zeros."""
    table = forms.code(name)
    codes = torch.arange(len(table)).to(torch.uint8).where(table.isfinite(), 0)
    scales = torch.tensor([0.0, 2.0**-24, -(2.0**-14), 1.0, 65504.0, -0.5]).half()
    shifts = torch.tensor([0.0, -1.0, 65504.0, 2.0**-24, -3.0, 0.5]).half()
    K = 256
    q = torch.stack([codes.repeat(K // len(codes)).roll(n) for n in range(len(scales) * 3)])
    packed = q if len(table) == 256 else (q[:, ::2] << 4) | q[:, 1::2]
    pairs = torch.stack([scales, shifts], 1).repeat_interleave(K // 16 * 3, dim=0)
    for has_shift in (False, True):
        weight = QuantizedWeight(
            packed=packed.flatten(),
            absmax=pairs if has_shift else pairs[:, 0].contiguous(),
            code=table,
            quant_type="",
            blocksize=16,
            shape=tuple(q.shape),
            dtype=f32,
        )
        want = definition(weight, torch.float64)
        assert same_bits(weight.dequantize(f32), want.float())
        # One element of x at a time: a product with no sum to hide in.
        x = torch.zeros(M, K)
        x[torch.arange(M), torch.arange(M) * 37 % K] = 1.0
        A, B = torch.zeros(2, K), torch.zeros(len(q), 2)
        error = (lora_linear(x, weight, A, B, scaling=1.0).double() - x.double() @ want.T).abs()
        # Product and shift are rounded, or centred and summed, three times between them.
        absolute = dataclasses.replace(weight, code=table.abs(), absmax=weight.absmax.abs())
        bound = 4 * 2.0**-24 * x.double() @ definition(absolute, torch.float64).T
        assert (error <= bound + 2.0**-126).all()


TABLES = {"int8": (0, 127, 128, 255), "e4m3": (0, 1, 7, 126, 127, 128, 129, 255)}


@every_native_engine
@pytest.mark.parametrize("name", TABLES)
def test_table_that_differs_in_one_value_is_looked_up(name: str, engine: str) -> None:
    """Kernels convert the codes of a table that they know, and NaN among them."""
    built = forms.build(torch.randn(8, 256), f"{name}-32")
    q = torch.arange(256, dtype=torch.uint8).expand(8, 256).reshape(-1)
    built = dataclasses.replace(built, packed=q.clone())
    x, A, B = torch.ones(1, 256), torch.zeros(1, 256), torch.zeros(8, 1)
    for index in TABLES[name]:
        code = built.code.clone()
        code[index] = 3.0
        weight = dataclasses.replace(built, code=code)
        want = definition(weight, f32)
        assert same_bits(weight.dequantize(f32), want)
        for M in (1, 5, 40):
            y = lora_linear(x.expand(M, -1), weight, A, B)
            exact = want.double().sum(1)
            assert torch.equal(y.isnan(), exact.isnan().expand(M, -1))
            if not exact.isnan().any():
                # 256 sums of products that are rounded, as their shifts are.
                limit = (256 + 3) * 2.0**-24 * want.double().abs().sum(1)
                assert bool(((y - exact).abs() <= limit).all())


@every_native_engine
def test_nan_code_of_one_row_is_in_that_row_alone(engine: str) -> None:
    """At each place of a vector, and in a last block of 16."""
    weight = forms.build(torch.randn(70, 48), "e4m3-16")
    A, B = torch.zeros(1, 48), torch.zeros(70, 1)
    for n, k, byte in ((0, 0, 0x7F), (3, 17, 0xFF), (66, 31, 0x7F), (69, 47, 0xFF), (40, 32, 0x7F)):
        packed = weight.packed.clone()
        packed[n * 48 + k] = byte
        spoiled = dataclasses.replace(weight, packed=packed)
        for M in (1, 3, 4, 9, 40):
            y = lora_linear(torch.randn(M, 48), spoiled, A, B)
            assert torch.equal(y.isnan().all(0), torch.arange(70) == n)
            assert torch.equal(y.isnan().any(0), torch.arange(70) == n)


HELD_MEMORY = """
import torch
from lora_kernels import lora_linear
from lora_kernels.oracle import forms

def pages(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024

def rise(call):
    # Resets the peak. More than 32 MiB are mapped, and unmapped when they are freed.
    open("/proc/self/clear_refs", "w").write("5")
    before = pages("VmRSS")
    call()
    return pages("VmHWM") - before

N, K = 8192, 4096
for dtype in (torch.float32, torch.bfloat16):
    for form in ("int4-32-half-shift", "e4m3-64"):
        weight = forms.build(torch.rand(64, K).to(dtype).repeat(N // 64, 1), form)
        x = torch.randn(300, K, dtype=dtype, requires_grad=True)
        A, B = (torch.randn(n, k, requires_grad=True) for n, k in ((8, K), (N, 8)))
        step = lambda: lora_linear(x, weight, A, B, scaling=1.0).sum().backward()
        few = lambda: lora_linear(x[:2], weight, A, B, scaling=1.0).sum().backward()
        step(), few()  # the libraries' pages, and the gradients
        decoded = lambda: x.detach() @ weight.dequantize(dtype).T
        print(dtype, form, N * K * dtype.itemsize, *map(rise, (step, few, decoded)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(native.module is None, reason="no native kernels")
def test_step_on_a_cpu_holds_no_decoded_weight() -> None:
    done = run_python("-c", HELD_MEMORY)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        size, step, few, decoded = map(int, line.split()[2:])
        # y, x's gradient and dY of 300 rows take 0.18 of the decoded weight.
        assert decoded > 0.9 * size and max(step, few) < 0.25 * size, line
