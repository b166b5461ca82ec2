"""QuantizedTensor: every op reads the decoded weight, few keep it packed, and none writes to it."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.nn.utils import parametrize

from lora_kernels.quantization import quantize_4bit
from lora_kernels.quantization.tensor import QuantizedTensor, read_tensor
from tests.support.assertions import assert_bitwise_equal

E, N, K = 3, 64, 32
FORMATS = ("mxfp4", "nvfp4")


def made(*shape: int, quant_type: str = "mxfp4", is_transposed: bool = False) -> QuantizedTensor:
    weight = torch.randn(shape or (N, K), generator=torch.Generator().manual_seed(0))
    return QuantizedTensor(quantize_4bit(weight.bfloat16(), quant_type), is_transposed)


def module_with(weight: Tensor) -> Any:
    linear = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@pytest.mark.parametrize("quant_type", FORMATS)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(N, K), (E, N, K)])
def test_quantized_tensor_looks_like_its_decoded_weight(
    shape: tuple[int, ...], is_transposed: bool, quant_type: str
) -> None:
    packed = made(*shape, quant_type=quant_type, is_transposed=is_transposed)
    dense = packed.quantized.dequantize()
    dense = dense.mT if is_transposed else dense
    assert (packed.shape, packed.dtype) == (dense.shape, dense.dtype)
    assert packed.stride() == dense.stride() and packed.device == dense.device
    assert_bitwise_equal(packed + 0, dense)
    assert_bitwise_equal(packed.mT + 0, dense.mT)
    assert_bitwise_equal(packed.float() + 0, packed.dequantize(torch.float32))
    for e in range(-1, E) if len(shape) == 3 else ():
        assert packed[e].decoded.shape == dense[e].shape  # decoded alone
        assert_bitwise_equal(packed[e] + 0, dense[e])
    assert_bitwise_equal(packed.contiguous() + 0, dense)
    assert packed.contiguous().is_contiguous()
    assert "QuantizedTensor([" in repr(packed)


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
def test_quantized_tensor_is_indexed_and_converted_as_its_decoded_weight(
    op: Any, is_transposed: bool
) -> None:
    packed = made(E, N, K, is_transposed=is_transposed)
    got, want = op(packed), op(packed.dequantize())
    assert got.shape == want.shape and got.dtype is want.dtype
    assert torch.equal(got + 0, want + 0)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_quantized_tensor_made_of_another_or_of_its_parts_is_that(
    dtype: torch.dtype, is_transposed: bool
) -> None:
    """As accelerate copies it, and `torch.compile`."""
    packed = made(E, N, K, is_transposed=is_transposed).to(dtype)
    names, rest = packed.__tensor_flatten__()
    parts = {name: getattr(packed, name) for name in names}
    unflattened = QuantizedTensor.__tensor_unflatten__(parts, rest, None, None)
    assert isinstance(
        QuantizedTensor(packed), nn.Parameter
    )  # accelerate's, by the parameter's class
    for again in (QuantizedTensor(packed), unflattened):
        assert (again.shape, again.stride()) == (packed.shape, packed.stride())
        assert_bitwise_equal(again + 0, packed + 0)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("made_in", [torch.enable_grad, torch.inference_mode])
def test_quantized_tensor_is_viewed_in_any_mode(made_in: Any, mode: Any) -> None:
    """PyTorch refuses a view that is an inference tensor of a tensor that is none."""
    with made_in():
        packed = nn.Parameter(made(E, N, K), requires_grad=False)
    dense = packed.dequantize()
    with mode():
        views = lambda t: t[1], lambda t: t.view(-1), lambda t: t[1:, 2], lambda t: t.unbind()
        for op in (*views, lambda t: t.chunk(2), lambda t: t.narrow(0, 1, 2)):
            got, want = op(packed), op(dense)
            for g, w in zip(got, want, strict=True):
                assert_bitwise_equal(g + 0, w)
        for kept in (packed.mT, packed.contiguous(), packed.detach(), packed.float()):
            assert type(kept) is QuantizedTensor
        assert_bitwise_equal(functional.linear(dense[0] + 0, packed[1]), dense[0] @ dense[1].t())
        x = torch.ones(2, K, dtype=torch.bfloat16, requires_grad=True)
        if made_in is torch.enable_grad:  # else autograd refuses to save it
            bias = nn.Parameter(torch.ones(N, dtype=torch.bfloat16))
            sums = torch.addmm(packed[0] + 0, torch.ones(N, 2, dtype=torch.bfloat16), x)
            for y in (functional.linear(x, packed[1], bias), x @ packed.mT, sums):
                assert y.requires_grad is (mode is torch.enable_grad)
                assert y.is_inference() is (mode is torch.inference_mode)


def test_quantized_tensor_saved_for_a_backward_is_packed() -> None:
    """By a linear layer, whose weight PyTorch transposes, and by a grouped GEMM."""
    linear, stack = module_with(made()), made(E, N, K, is_transposed=True)
    x = torch.randn(6, K, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(x)
        offsets = torch.tensor([1, 1, 6], dtype=torch.int32)
        z = functional.grouped_mm(x, stack, offs=offsets)
    assert {type(t) for t in saved if t.dim() == 3 or t.numel() == K * N} == {QuantizedTensor}
    (y.sum() + z.square().sum()).backward()
    grad, x.grad = x.grad, None
    dense = stack.dequantize()
    other = functional.grouped_mm(x, dense, offs=offsets)
    (functional.linear(x, linear.weight.dequantize()).sum() + other.square().sum()).backward()
    assert_bitwise_equal(grad, x.grad)


WRITES: dict[str, Any] = {
    "in place": lambda p: p.data.add_(1),
    "+=": lambda p: setattr(p, "data", p.data.__iadd__(torch.ones_like(p.dequantize()))),
    "out": lambda p: torch.add(p.dequantize(), 1, out=p),
    "copy_": lambda p: p.data.copy_(p.dequantize() + 1),
    "zero_": lambda p: p.data.zero_(),
    "[0] =": lambda p: p.__setitem__(0, 5),
    "[0, 0] +=": lambda p: p[0, 0].__iadd__(5),
    "[mask] =": lambda p: p.__setitem__(p > 0, 5),
    "[0].zero_": lambda p: p[0].zero_(),
    "[0].t().mul_": lambda p: p[0].t().mul_(2),
    "[1:3].mul_": lambda p: p[1:3].mul_(7),
    "view": lambda p: p.unsqueeze(0).view(1, *p.shape)[..., :4].fill_(9),
    "reshape": lambda p: p.reshape(1, *p.shape).zero_(),
    "contiguous": lambda p: (p if p.is_contiguous() else p.mT).contiguous()[0].zero_(),
    "diagonal": lambda p: p.diagonal().fill_(3),
    "mT": lambda p: p.mT.zero_(),
    "unbind": lambda p: p.unbind()[1].add_(1),
    "split": lambda p: p.split(2)[0].add_(1),
    "view of a cast": lambda p: p.float()[0].zero_(),
    "out is a view": lambda p: torch.add(p[0] + 0, 1, out=p[0]),
    "foreach": lambda p: torch._foreach_add_([torch.ones(2), p], 1.0),
    "SGD": lambda p: torch._foreach_add_([p], [p + 0], alpha=-0.1),
    "fused SGD": lambda p: torch._fused_sgd_(
        [p],
        [p + 0],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=0.1,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
    ),
    "init": lambda p: nn.init.normal_(p),
    "set_": lambda p: p.set_(torch.zeros(3).bfloat16()),
    "resize_": lambda p: p.resize_(3),
    "transpose_": lambda p: p.transpose_(-1, -2),
    "map2_": lambda p: p.map2_(p, p, lambda a, b, c: a),
    "unsafe_chunk": lambda p: p.unsafe_chunk(2)[0].zero_(),
    "kron": lambda p: torch.kron(p.new_ones(p.shape), p.new_ones([1] * p.dim()), out=p),
    "atleast_1d": lambda p: torch.atleast_1d(p)[0].zero_(),
    "eval dropout": lambda p: functional.dropout(p, training=False)[0].zero_(),
    "apply_": lambda p: p.apply_(lambda value: value + 1),
    "view.apply_": lambda p: p[0].apply_(lambda value: value + 1),
    ".data =": lambda p: setattr(p, "data", p.dequantize()),
    ".data = of another shape": lambda p: setattr(p, "data", torch.zeros(3)),
    "view.data =": lambda p: setattr(p[0], "data", torch.zeros(3)),
    "vector_to_parameters": lambda p: nn.utils.vector_to_parameters(torch.ones(p.numel()), [p]),
}


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(N, K), (E, N, K)])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_quantized_tensor_that_is_written_to_raises_and_keeps_its_values(
    write: Any, shape: tuple[int, ...], is_transposed: bool, grad_mode: Any
) -> None:
    p = nn.Parameter(made(*shape, is_transposed=is_transposed), requires_grad=False)
    want, seen = p.dequantize(), (p.shape, p.stride(), p.dtype)
    with grad_mode(), pytest.raises(RuntimeError, match="a frozen weight in mxfp4 to write to"):
        write(p)
    assert (p.shape, p.stride(), p.dtype) == seen
    assert_bitwise_equal(p.dequantize(), want)


OTHER_FORMS: dict[str, Any] = {
    "transposed": lambda: made(K, N, is_transposed=True),  # of the same shape, [N, K]
    "another shape": lambda: made(K, N),
    "another format": lambda: made(N, K, quant_type="nvfp4"),
    "decoded scales": lambda: QuantizedTensor(
        quantize_4bit(torch.ones(N, K), "mxfp4", None, False)
    ),
}


@pytest.mark.parametrize("write", [Tensor.copy_, lambda t, other: setattr(t, "data", other)])
@pytest.mark.parametrize("other", OTHER_FORMS.values(), ids=OTHER_FORMS)
def test_quantized_tensor_takes_no_other_form(other: Any, write: Any) -> None:
    tensor = made(N, K)
    want = tensor.dequantize()
    with pytest.raises(
        RuntimeError, match=r"got QuantizedTensor\(.*, want the form of QuantizedTensor\("
    ):
        write(tensor, other())
    assert tensor.shape == (N, K)
    assert_bitwise_equal(tensor.dequantize(), want)


def test_quantized_tensor_takes_its_own_form() -> None:
    """`load_state_dict` copies, and `prepare_model_for_kbit_training` sets `.data`."""
    other = QuantizedTensor(quantize_4bit(torch.ones(N, K), "mxfp4"))
    for write in (Tensor.copy_, lambda t, other: setattr(t, "data", other)):
        tensor = made(N, K)
        write(tensor, other)
        assert_bitwise_equal(tensor.dequantize(torch.float32), other.dequantize())
    assert tensor.dtype is torch.float32 and tensor.packed is other.packed  # as of `.data =`
    assert json.loads(bytes(tensor.form.tolist()))["dtype"] == "float32"
    tensor.data = tensor.data.bfloat16()
    assert json.loads(bytes(tensor.form.tolist()))["dtype"] == "bfloat16"
    tensor = made(N, K)
    tensor.copy_(tensor.dequantize())  # as DDP does
    with pytest.raises(RuntimeError, match="to write to"):
        tensor.copy_(tensor.dequantize().nextafter(torch.tensor(9.0).bfloat16()))


@pytest.mark.parametrize(
    "op",
    [
        lambda t: t.select(0, E),
        lambda t: t.select(0, -E - 1),
        lambda t: t.select(3, 0),
        lambda t: t.transpose(0, 5),
        lambda t: t.transpose(-1, -4),
        lambda t: t.t(),
        lambda t: t.view(7),
    ],
)
def test_quantized_tensor_refuses_the_arguments_that_pytorch_refuses(op: Any) -> None:
    packed = made(E, N, K)
    with pytest.raises((IndexError, RuntimeError)) as refused:
        op(packed.dequantize())
    with pytest.raises(type(refused.value)) as found:
        op(packed)
    assert str(found.value) == str(refused.value)


@pytest.mark.parametrize(
    "copied",
    [
        Tensor.clone,
        copy.deepcopy,
        lambda t: t.to(torch.float32),
        lambda t: t.to("cpu", copy=True),
        lambda t: t.clone(memory_format=torch.contiguous_format),
    ],
)
def test_copy_of_tensor4bit_shares_no_memory(copied: Any) -> None:
    tensor = made(N, K)
    snapshot = copied(tensor)
    want = snapshot.dequantize()
    assert_bitwise_equal(want.bfloat16(), tensor.dequantize())
    tensor.copy_(QuantizedTensor(quantize_4bit(torch.ones(N, K), "mxfp4")))
    assert_bitwise_equal(snapshot.dequantize(), want)


def test_quantized_tensor_copied_and_pickled_is_a_parameter_if_it_was() -> None:
    for weight in (made(N, K), nn.Parameter(made(N, K), requires_grad=False)):
        for again in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), copy.copy(weight)):
            assert isinstance(again, nn.Parameter) is isinstance(weight, nn.Parameter)
            assert (again.shape, again.dtype) == (weight.shape, weight.dtype)
            assert_bitwise_equal(again.dequantize(), weight.dequantize())
    both = copy.deepcopy([weight, weight])
    assert both[0] is both[1] and both[0].data_ptr() != weight.data_ptr()
    assert weight.data_ptr() == weight.mT.data_ptr() and weight.to("meta").data_ptr() == 0


def test_packed_weight_is_quantized_again_as_the_decoded_one() -> None:
    packed = made(N, K)
    for quant_type in ("nf4", "mxfp4"):
        want = quantize_4bit(packed.dequantize(), quant_type).dequantize()
        assert_bitwise_equal(quantize_4bit(packed, quant_type).dequantize(), want)


def test_quantized_tensor_of_a_dense_tensor_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"^weight: got Tensor of torch.float32, want a QuantizedWeight"
    ):
        QuantizedTensor(torch.zeros(N, K))  # type: ignore[arg-type]


def test_quantized_tensor_has_no_memory_to_hand_out() -> None:
    """DLPack would hand out a null pointer."""
    for tensor in (made(N, K).float(), made(N, K).float()[0]):
        with pytest.raises(BufferError, match=r"call dequantize\(\) first"):
            torch.from_dlpack(tensor)
        array, want = tensor.numpy(), tensor.dequantize()
        assert tensor.tolist() == want.tolist() and (array == want.numpy()).all()
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def by_func(op: Any) -> Any:
    return lambda x, weight: torch.func.linearize(lambda t: op(t, weight), x)[1](x)


def by_fx(op: Any) -> Any:
    return lambda x, weight: make_fx(lambda t: op(t, weight))(x)(x)


def by_grad(op: Any) -> Any:
    return lambda x, weight: torch.func.grad(lambda t: op(t, weight).square().sum())(x)


@pytest.mark.parametrize("trace", [by_func, by_fx, by_grad])
@pytest.mark.parametrize("op", [functional.linear, lambda x, w: x @ w.dequantize().t()])
def test_quantized_tensor_in_a_traced_function_is_decoded_by_it(op: Any, trace: Any) -> None:
    """The native decoder writes by address, which no trace records."""
    weight, x = made(N, K).float(), torch.randn(5, K)
    got = trace(op)(x, weight)
    want = trace(functional.linear)(x, weight.dequantize())
    assert_bitwise_equal(got, want)


def test_quantized_tensor_under_fake_tensors_has_the_decoded_shape() -> None:
    weight = made(N, K)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert (weight + 0).shape == (N, K)
    assert (mode.from_tensor(weight) + 0).shape == (N, K)


def test_quantized_tensor_in_a_collective_raises(tmp_path: Path) -> None:
    """The schemas of collectives do not say what they write."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    weight = made(N, K)
    try:
        for call in (
            lambda: dist.broadcast(weight, 0),
            lambda: dist.all_gather_into_tensor(weight, torch.ones(N, K).bfloat16()),
            lambda: dist.all_reduce(weight[0]),
            lambda: dist.reduce_scatter_tensor(weight, torch.ones(N, K).bfloat16()),
        ):
            with pytest.raises(RuntimeError, match="got a frozen weight in mxfp4 to write to"):
                call()
        gathered = torch.zeros(N, K).bfloat16()
        dist.all_gather_into_tensor(gathered, weight)
        assert_bitwise_equal(gathered, weight.dequantize())
    finally:
        dist.destroy_process_group()


def test_conj_view_of_tensor4bit_raises() -> None:
    """PyTorch's lazy conjugation is below the dispatch of subclasses."""
    weight = made(N, K).float()
    with pytest.raises(NotImplementedError, match=r"got a conj\(\) or negative view"):
        torch.view_as_complex(weight.view(N, -1, 2)).conj()
    with torch.inference_mode():
        assert_bitwise_equal(torch.fft.hfft2(weight), torch.fft.hfft2(weight.dequantize()))
        sizes = {"size": 50, "mode": "linear"}
        got, want = (
            functional.interpolate(t, **sizes) for t in (weight[None], weight.dequantize()[None])
        )
        assert_bitwise_equal(got, want)


def test_transposed_tensor4bit_stays_packed() -> None:
    stack = made(E, N, K)
    for packed in (made(N, K).T, made(N, K).permute(1, 0), stack.mT, stack.permute(0, -1, 1)):
        assert type(packed) is QuantizedTensor and packed.is_transposed
    assert type(stack.permute(2, 1, 0)) is type(stack.permute(1, 0, 2)) is type(stack[0])


def test_nan_that_tensor4bit_holds_is_copied_into_it() -> None:
    weight = made(N, K)
    weight.absmax[0] = 255
    assert weight.isnan().any()
    weight.copy_(weight.dequantize())


def test_quantized_tensor_in_shared_memory_is_read_by_another_process(tmp_path: Path) -> None:
    linear = module_with(made(N, K))
    assert not linear.weight.is_shared()
    linear.share_memory()
    assert linear.weight.is_shared()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_put_decoded, args=(linear, queue))
    process.start()
    got = torch.tensor(queue.get(timeout=120))
    process.join(60)
    assert process.exitcode == 0
    assert_bitwise_equal(got, linear.weight.dequantize(torch.float32))


def _put_decoded(linear: Any, queue: Any) -> None:
    queue.put(linear.weight.dequantize(torch.float32).tolist())


def test_quantized_tensor_survives_what_modules_do_with_parameters() -> None:
    linear = module_with(made())
    want = linear.weight.dequantize()
    twin = copy.deepcopy(linear)
    assert type(twin.weight) is QuantizedTensor and isinstance(twin.weight, nn.Parameter)
    assert twin.weight.packed.data_ptr() != linear.weight.packed.data_ptr()
    assert twin.to(torch.float16).weight.dtype is torch.float16
    assert_bitwise_equal(twin.weight + 0, want.half())
    assert read_tensor(twin.weight).dtype is torch.float16
    assert_bitwise_equal(twin.double().weight + 0, linear.weight.dequantize(torch.float64))
    assert twin.to("meta").weight.packed.is_meta
    linear.weight.data = linear.weight.data.to(torch.float32)  # prepare_model_for_kbit_training
    assert read_tensor(linear.weight).dtype is torch.float32
    assert_bitwise_equal(linear.weight.dequantize(), want.float())


def test_quantized_tensor_under_a_parametrization_is_added_to() -> None:
    """PEFT adds its update so, to a parameter of experts."""

    class Plus(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + 1

    linear = module_with(made())
    parametrize.register_parametrization(linear, "weight", Plus())
    assert_bitwise_equal(linear.weight, linear.parametrizations.weight.original.dequantize() + 1)
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
    assert type(linear.weight) is QuantizedTensor and not linear.weight.requires_grad


@pytest.mark.parametrize("offload", [False, True])
def test_quantized_tensor_under_accelerates_hooks_gives_the_same_result(offload: bool) -> None:
    linear, x = module_with(made()), torch.randn(2, K, dtype=torch.bfloat16)
    want = linear(x)
    add_hook_to_module(linear, AlignDevicesHook("cpu", offload=offload, io_same_device=True))
    assert linear.weight.is_meta is offload
    assert_bitwise_equal(linear(x), want)


def test_quantized_tensor_under_ddp_is_left_as_it_is(tmp_path: Path) -> None:
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
    assert type(model.linear.weight) is QuantizedTensor
    assert_bitwise_equal(model.shift.grad, torch.full((N,), 2.0).bfloat16())


def test_quantized_tensor_compiled_whole_equals_itself() -> None:
    linear, x = module_with(made()), torch.randn(2, K, dtype=torch.bfloat16)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(x), linear(x))
