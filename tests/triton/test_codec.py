"""Decoding by Triton's kernel: the bits of the reference, every one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels
from lora_kernels import lora_experts_linear, lora_linear
from lora_kernels.backends import checked, decoder
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.backends.triton import codec
from lora_kernels.core import coding
from lora_kernels.oracle import forms
from lora_kernels.quantization import QuantizedWeight, codebooks, quantize_4bit
from tests.support.codec import check_decode, same_bits
from tests.triton.device import DEVICE

every_type = pytest.mark.parametrize("quant_type", codebooks.QUANT_TYPES)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors take the GPU path; no decoder was checked yet."""
    monkeypatch.setattr(decoder, "decoder_reasons", {})
    monkeypatch.setattr(decoder, "bitsandbytes_reasons", {})
    with as_on_gpu():
        yield


def reason_of(weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
    kind = decoder.Decoding.of(weight.codes, weight.shape[-1])
    return decoder.kernel_reason(torch.device(DEVICE), kind, dtype)


@every_type
def test_decoder_that_passed_its_check_decodes(quant_type: str, unchecked: None) -> None:
    device = torch.device(DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((40, 96), (3, 16, 64)):
            weight = quantize_4bit(torch.randn(shape), quant_type).to(DEVICE)
            said = decoder.decoded_by(device, weight.codes, shape[-1], dtype)
            assert said == "our kernel decodes"
            w = weight.to("cpu")
            want = coding.dequantize(w.packed, w.scales(), w.code, w.blocksize, shape, dtype)
            assert same_bits(weight.dequantize(dtype), want)


FORMS = ("int4-32-half-shift", "int4-16-nested-shift", "signed4-64", "int8-16", "uint8-32-shift",
         "e4m3-32-half")  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_decoder_passes_its_check_for_a_form_and_decodes_it(form: str, unchecked: None) -> None:
    dtype = torch.bfloat16
    for shape in ((40, 128), (3, 16, 64)):
        weight = forms.build(torch.randn(shape), form)
        assert reason_of(weight, dtype) is None
        want = coding.dequantize(
            weight.packed, weight.scales(), weight.code, weight.blocksize, shape, dtype
        )
        assert same_bits(weight.to(DEVICE).dequantize(dtype), want)


@pytest.mark.parametrize("nested", [False, True])
@every_type
def test_one_differing_code_takes_its_type_alone(
    quant_type: str, nested: bool, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least bit of one of a weight's elements, in one of the dtypes."""
    dtype = torch.bfloat16

    def spoiled(codes: Any, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        w = dequantize(codes, shape, dtype)
        is_it = codes.quant_type == quant_type and dtype is torch.bfloat16
        if is_it and (codes.nested_code is not None) is nested:
            w.view(torch.int16)[-1, -1] ^= 1
        return w

    dequantize = codec.dequantize
    monkeypatch.setattr(codec, "dequantize", spoiled)

    def weight_of(quant_type: str, nested: bool) -> QuantizedWeight:
        return quantize_4bit(torch.ones(16, 64), quant_type, double_quant=nested)

    weight = weight_of(quant_type, nested)
    want = f"Triton's decoder of {'nested ' * nested}{quant_type} in {dtype} differs from"
    reason = reason_of(weight, dtype)
    assert reason is not None and reason.startswith(want)
    said = decoder.decoded_by(torch.device(DEVICE), weight.codes, 64, dtype)
    assert reason in said
    assert reason_of(weight, torch.float16) is None
    assert reason_of(weight_of(quant_type, not nested), dtype) is None
    other = {"nf4": "fp4", "fp4": "nf4", "mxfp4": "nvfp4", "nvfp4": "mxfp4"}[quant_type]
    assert reason_of(weight_of(other, nested), dtype) is None


def test_decoder_that_raises_is_not_used(unchecked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no kernel image")

    weight = quantize_4bit(torch.randn(16, 64), "mxfp4").to(DEVICE)
    monkeypatch.setattr(codec, "dequantize", fail)
    want = coding.dequantize(
        weight.packed, weight.scales(), weight.code, 32, weight.shape, torch.float32
    )
    assert same_bits(weight.dequantize(torch.float32), want)
    reason = reason_of(weight, torch.float32)
    assert reason == "Triton's kernels raised RuntimeError: no kernel image"


class Names(TorchDispatchMode):
    """Records the ops that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_decoder_is_one_op_for_a_mode_and_unchecked_inside_of_one(unchecked: None) -> None:
    weight = quantize_4bit(torch.randn(16, 64), "nvfp4").to(DEVICE)
    other = quantize_4bit(torch.randn(16, 64), "mxfp4").to(DEVICE)
    with Names() as modes:
        first = weight.dequantize()
    assert "lora_kernels.decode.default" not in modes.seen
    assert reason_of(weight, torch.float32) is None
    with Names() as modes:
        second = weight.dequantize()
        reason = reason_of(other, torch.float32)
        assert reason == checked.UNCHECKED
    assert "lora_kernels.decode.default" in modes.seen and same_bits(first, second)
    with Names() as modes:
        decoder.dense(weight.codes, weight.matrix_shape, torch.float32)
    assert modes.seen == ["lora_kernels.decode.default"]  # no slice to no effect


@every_type
def test_layers_decode_once_a_direction_by_the_kernel(
    quant_type: str, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a linear layer and of experts, whose stack is one launch."""
    launched: list[str] = []
    dequantize = codec.dequantize

    def counted(codes: Any, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        launched.append(codes.quant_type)
        return dequantize(codes, shape, dtype)

    on: Any = {"dtype": torch.bfloat16, "device": DEVICE}
    linear = quantize_4bit(torch.randn(32, 64), quant_type).to(DEVICE)
    stack = quantize_4bit(torch.randn(2, 32, 64), quant_type).to(DEVICE)
    for weight in (linear, stack):
        reason_of(weight, torch.bfloat16)  # which launches too
    decoder.bitsandbytes_reason(torch.device(DEVICE), quant_type)
    monkeypatch.setattr(codec, "dequantize", counted)
    x = torch.randn(600, 64, **on).requires_grad_()  # more rows than `gemm_4bit` takes
    with lora_kernels.backend("eager"):
        y = lora_linear(x, linear, torch.ones(3, 64, **on), torch.ones(32, 3, **on))
        assert launched == [quant_type]
        y.sum().backward()
        assert launched == [quant_type] * 2
        offsets = torch.tensor([5, 600], dtype=torch.int32, device=DEVICE)
        A, B = torch.ones(2, 8, 64, **on), torch.ones(2, 32, 8, **on)
        lora_experts_linear(x, stack, A, B, offsets).sum().backward()
        assert launched == [quant_type] * 4


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(70, 256), (37, 333), (16, 72)], ids=str)
def test_dequantize_rows_is_bitwise(shape: tuple[int, int], nested: bool, device: str) -> None:
    """Whole runs of codes, and rows that begin within a byte."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    weight = quantize_4bit(values.to(device), "nf4", 64, nested)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_decode(weight, dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(70, 256), (3, 5, 96)], ids=str)
def test_dequantize_of_e2m1_is_bitwise(
    shape: tuple[int, ...], quant_type: str, nested: bool, device: str
) -> None:
    """A table of scales for all experts, or one for each."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    values *= torch.logspace(-5, 5, shape[0]).view(-1, *[1] * (len(shape) - 1))
    weight = quantize_4bit(values.to(device), quant_type, None, nested)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_decode(weight, dtype)


@pytest.mark.parametrize("quant_type, K", [("mxfp4", 96), ("nvfp4", 16), ("nvfp4", 80)])
def test_scale_that_is_nan_stays_in_its_row(quant_type: str, K: int, device: str) -> None:
    """The scales after a row that ends inside of a tile are the next row's."""
    weight = quantize_4bit(torch.randn(5, K), quant_type)
    weight.absmax.view(5, -1)[2] = 255 if quant_type == "mxfp4" else 127
    weight = weight.to(device)
    x = torch.ones(3, K, device=device)
    A, B = torch.ones(2, K, device=device), torch.zeros(5, 2, device=device)
    is_nan = lora_linear(x, weight, A, B).isnan().tolist()
    assert is_nan == [[False, False, True, False, False]] * 3


def test_quantize_with_triton_forced_has_the_bits_of_eager(device: str) -> None:
    values = torch.randn(37, 333, generator=torch.Generator().manual_seed(3)).to(device)
    got = quantize_4bit(values)
    with lora_kernels.backend("eager"):
        want = quantize_4bit(values)
    assert torch.equal(got.packed, want.packed) and torch.equal(got.absmax, want.absmax)
