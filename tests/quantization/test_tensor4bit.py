"""Tensor4bit: every op reads the decoded weight, few keep it packed, and none writes to it."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from lora_kernels.quantization import quantize_4bit
from lora_kernels.quantization.tensor4bit import Tensor4bit, read
from tests.support.assertions import assert_bitwise_equal

E, N, K = 3, 64, 32
FORMATS = ("mxfp4", "nvfp4")


def made(*shape: int, quant_type: str = "mxfp4", is_transposed: bool = False) -> Tensor4bit:
    weight = torch.randn(shape or (N, K), generator=torch.Generator().manual_seed(0))
    return Tensor4bit(quantize_4bit(weight.bfloat16(), quant_type), is_transposed)


def module_with(weight: Tensor) -> Any:
    linear = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@pytest.mark.parametrize("quant_type", FORMATS)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(N, K), (E, N, K)])
def test_tensor4bit_looks_like_its_decoded_weight(
    shape: tuple[int, ...], is_transposed: bool, quant_type: str
) -> None:
    packed = made(*shape, quant_type=quant_type, is_transposed=is_transposed)
    dense = packed.weight4bit.dequantize()
    dense = dense.mT if is_transposed else dense
    assert (packed.shape, packed.dtype) == (dense.shape, dense.dtype)
    assert packed.stride() == dense.stride() and packed.device == dense.device
    assert_bitwise_equal(packed + 0, dense)
    assert_bitwise_equal(packed.mT + 0, dense.mT)
    assert_bitwise_equal(packed.float() + 0, packed.dequantize(torch.float32))
    for e in range(-1, E) if len(shape) == 3 else ():
        assert type(packed[e]) is Tensor  # decoded alone
        assert_bitwise_equal(packed[e], dense[e])
    assert_bitwise_equal(packed.contiguous() + 0, dense)
    assert packed.contiguous().is_contiguous()
    assert "Tensor4bit([" in repr(packed)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(
    "op",
    [
        lambda t: t.transpose(0, 1),
        lambda t: t.transpose(-1, 0),
        lambda t: t.transpose(2, -2),
        lambda t: t.transpose(1, 1),
        lambda t: t.select(1, 5),
        lambda t: t.select(-1, -3),
        lambda t: t.select(-3, 1),
        lambda t: t.to(torch.int32),
    ],
)
def test_tensor4bit_is_indexed_and_converted_as_its_decoded_weight(
    op: Any, is_transposed: bool
) -> None:
    packed = made(E, N, K, is_transposed=is_transposed)
    got, want = op(packed), op(packed.dequantize())
    assert got.shape == want.shape and got.dtype is want.dtype
    assert torch.equal(got + 0, want + 0)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tensor4bit_made_of_another_or_of_its_parts_is_that(
    dtype: torch.dtype, is_transposed: bool
) -> None:
    """As accelerate copies it, and `torch.compile`."""
    packed = made(E, N, K, is_transposed=is_transposed).to(dtype)
    names, rest = packed.__tensor_flatten__()
    parts = {name: getattr(packed, name) for name in names}
    unflattened = Tensor4bit.__tensor_unflatten__(parts, rest, None, None)
    for again in (Tensor4bit(packed), unflattened):
        assert (again.shape, again.stride()) == (packed.shape, packed.stride())
        assert_bitwise_equal(again + 0, packed + 0)


def test_tensor4bit_saved_for_a_backward_is_packed() -> None:
    """By a linear layer, whose weight PyTorch transposes, and by a grouped GEMM."""
    linear, stack = module_with(made()), made(E, N, K, is_transposed=True)
    x = torch.randn(6, K, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(x)
        offsets = torch.tensor([1, 1, 6], dtype=torch.int32)
        z = functional.grouped_mm(x, stack, offs=offsets)
    assert {type(t) for t in saved if t.dim() == 3 or t.numel() == K * N} == {Tensor4bit}
    (y.sum() + z.square().sum()).backward()
    grad, x.grad = x.grad, None
    dense = stack.dequantize()
    other = functional.grouped_mm(x, dense, offs=offsets)
    (functional.linear(x, linear.weight.dequantize()).sum() + other.square().sum()).backward()
    assert_bitwise_equal(grad, x.grad)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.data.add_(1),
        lambda p: setattr(p, "data", p.data.__iadd__(torch.ones_like(p.dequantize()))),
        lambda p: torch.add(p.dequantize(), 1, out=p),
        lambda p: p.data.copy_(p.dequantize() + 1),
        lambda p: p.data.zero_(),
    ],
)
def test_tensor4bit_that_is_written_to_raises(write: Any) -> None:
    linear = module_with(made())
    want = linear.weight.dequantize()
    with pytest.raises(RuntimeError, match=r"got a frozen weight in mxfp4 to write to"):
        write(linear.weight)
    assert_bitwise_equal(linear.weight.dequantize(), want)


def test_tensor4bit_survives_what_modules_do_with_parameters() -> None:
    linear = module_with(made())
    want = linear.weight.dequantize()
    twin = copy.deepcopy(linear)
    assert type(twin.weight) is Tensor4bit and isinstance(twin.weight, nn.Parameter)
    assert twin.weight.packed.data_ptr() != linear.weight.packed.data_ptr()
    assert twin.to(torch.float16).weight.dtype is torch.float16
    assert_bitwise_equal(twin.weight + 0, want.half())
    assert read(twin.weight).dtype is torch.float16
    assert_bitwise_equal(twin.double().weight + 0, linear.weight.dequantize(torch.float64))
    assert twin.to("meta").weight.packed.is_meta
    linear.weight.data = linear.weight.data.to(torch.float32)  # prepare_model_for_kbit_training
    assert read(linear.weight).dtype is torch.float32
    assert_bitwise_equal(linear.weight.dequantize(), want.float())
    file = io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    again = module_with(Tensor4bit(quantize_4bit(torch.ones(N, K).bfloat16(), "mxfp4")))
    again.load_state_dict(torch.load(file, weights_only=False))
    assert_bitwise_equal(again.weight.dequantize(), want)
    assert_bitwise_equal(linear.weight.dequantize(), want.float())


def test_tensor4bit_under_a_parametrization_is_added_to() -> None:
    """PEFT adds its update so, to a parameter of experts."""

    class Plus(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + 1

    linear = module_with(made())
    parametrize.register_parametrization(linear, "weight", Plus())
    assert_bitwise_equal(linear.weight, linear.parametrizations.weight.original.dequantize() + 1)
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
    assert type(linear.weight) is Tensor4bit and not linear.weight.requires_grad


@pytest.mark.parametrize("offload", [False, True])
def test_tensor4bit_under_accelerates_hooks_gives_the_same_result(offload: bool) -> None:
    linear, x = module_with(made()), torch.randn(2, K, dtype=torch.bfloat16)
    want = linear(x)
    add_hook_to_module(linear, AlignDevicesHook("cpu", offload=offload, io_same_device=True))
    assert linear.weight.is_meta is offload
    assert_bitwise_equal(linear(x), want)


def test_tensor4bit_under_ddp_is_left_as_it_is(tmp_path: Path) -> None:
    """DDP broadcasts all parameters, and writes the frozen ones too."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = module_with(made())
            self.shift = nn.Parameter(torch.zeros(N, dtype=torch.bfloat16))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.shift

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Shifted()
        nn.parallel.DistributedDataParallel(model)(torch.ones(2, K).bfloat16()).sum().backward()
    finally:
        dist.destroy_process_group()
    assert type(model.linear.weight) is Tensor4bit
    assert_bitwise_equal(model.shift.grad, torch.full((N,), 2.0).bfloat16())


def test_tensor4bit_compiled_whole_equals_itself() -> None:
    linear, x = module_with(made()), torch.randn(2, K, dtype=torch.bfloat16)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(x), linear(x))
