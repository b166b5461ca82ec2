"""Graphs, streams, compilers, and peers: what surrounds the kernels on a GPU."""

from collections.abc import Callable
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels.oracle.case import Case, inputs

bf16, f32 = torch.bfloat16, torch.float32


def layer(M: int, quant: str = "") -> Callable[[], Tensor]:
    """A forward without gradients on tensors that stay where they are."""
    args = inputs(Case(M, 1024, 2048, 16, bf16, quant=quant, device="cuda"))
    args.pop("dy")

    def call() -> Tensor:
        with torch.no_grad():
            return lora_kernels.lora_linear(**args)

    return call


@pytest.mark.parametrize("M", [4, 300])
def test_graphs_are_captured_and_replayed(M: int) -> None:
    with lora_kernels.backend("triton"):
        call = layer(M, "nf4-64-nested")
        want = call()  # compiled before it is captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        for _ in range(3):
            y.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, want)


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_lora_linear_compiled_is_the_same(quant: str) -> None:
    args = inputs(Case(70, 256, 320, 8, bf16, quant=quant, device="cuda"))
    dy = args.pop("dy")
    names = ("x", "lora_A", "lora_B")
    compiled = torch.compile(lora_kernels.lora_linear, fullgraph=True, dynamic=True)
    for call in (lora_kernels.lora_linear, compiled):
        y = call(**args)
        grads = torch.autograd.grad(y, [args[name] for name in names], dy)
        if call is lora_kernels.lora_linear:
            want = (y, *grads)
    for got, expected in zip((y, *grads), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_backward_in_autograds_thread_follows_its_forward() -> None:
    """Autograd's thread runs the backward and knows nothing of a `with` around the forward."""
    from lora_kernels.backends.triton import launch

    args = inputs(Case(70, 256, 320, 8, bf16, device="cuda"))
    dy = args.pop("dy")
    with lora_kernels.backend("triton"):
        y = lora_kernels.lora_linear(**args)
    with mock.patch.object(launch, "run", wraps=launch.run) as run:
        y.backward(dy)
    assert "fused_kernel" in {call.args[0].__name__ for call in run.call_args_list}


@pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_peft_model_fused_has_stock_gradients(dtype: torch.dtype) -> None:
    """Gradients of every adapter as stock PEFT computes them."""
    from peft import LoraConfig, get_peft_model

    from lora_kernels.peft import fuse

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(320, 512), nn.GELU(), nn.Linear(512, 256)).to("cuda", dtype)
    config = LoraConfig(r=8, lora_alpha=20, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(base, config)
    x = torch.randn(4, 33, 320, device="cuda", dtype=dtype)
    dy = torch.randn(4, 33, 256, device="cuda", dtype=dtype)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(x).backward(dy)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    with lora_kernels.backend("triton"):
        fuse(model)
        got = gradients()
    assert len(got) == len(want) == 4
    limit = 1e-4 if dtype is f32 else 2e-2
    for name, grad in got.items():
        error = (grad.double() - want[name].double()).norm() / want[name].double().norm()
        assert want[name].abs().max() > 0 and error < limit, (name, error)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_bitsandbytes_weights_are_read_as_they_are() -> None:
    import bitsandbytes as bnb

    from lora_kernels.quantization import QuantizedWeight

    weight = torch.randn(512, 320, device="cuda", dtype=bf16)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    with lora_kernels.backend("triton"):
        ours = QuantizedWeight.from_bitsandbytes((packed, state)).dequantize(f32)
    state.dtype = f32
    assert torch.equal(ours, bnb.functional.dequantize_4bit(packed, state))
