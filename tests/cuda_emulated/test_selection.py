"""The choice of a kernel for a GEMM, and the reason if it is not the fastest one."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_kernels
from lora_kernels import device, info, selection
from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import (
    COOPERATIVE,
    OVERLAPPED,
    TWO_PASS,
    TWO_PASS_SIMT,
    constraints,
    launch,
)
from lora_kernels.core.problem import Choice, Layout, Problem
from lora_kernels.layers import LoRALinear
from lora_kernels.peft import explain, fuse
from lora_kernels.quantization import quantize_4bit

f32, bf16 = torch.float32, torch.bfloat16
ROWS, CODES = Layout(), Layout(64)
COLUMNS, OFF = Layout(columns=True), Layout(unsupported_reason="the weight's rows are not whole")


def choose(M: int, N: int, K: int, layout: Layout = ROWS, dtype: torch.dtype = bf16) -> Choice:
    return selection.choose(
        Problem("cpu", dtype, dtype, dtype, dtype, 16, M, layout.blocksize > 0, N, K, layout=layout)
    )


@pytest.mark.parametrize(
    ("M", "N", "K", "layout", "strategy", "words"),
    [
        (16, 64, 64, ROWS, COOPERATIVE, []),
        (17, 64, 64, ROWS, TWO_PASS, []),
        (1, 64, 63, ROWS, TWO_PASS_SIMT, [f"not {COOPERATIVE!r}: K = 63 is no multiple of 8"]),
        (1, 65, 64, ROWS, COOPERATIVE, ["dx on CUDA cores: N = 65"]),
        (99, 65, 64, ROWS, TWO_PASS, ["dx on CUDA cores: N = 65"]),
        (1, 64, 96, CODES, TWO_PASS, [f"not {COOPERATIVE!r}: K = 96 is no multiple of 64"]),
        (1, 64, 64, Layout(32), TWO_PASS, ["blocks of 32 codes are less than 64"]),
        (99, 64, 72, CODES, TWO_PASS_SIMT, [f"not {TWO_PASS!r}: K = 72 is no multiple of 32"]),
        (1, 64, 64, COLUMNS, TWO_PASS, ["the weight is stored as [K, N]"]),
        (99, 63, 64, COLUMNS, TWO_PASS_SIMT, [f"not {TWO_PASS!r}: N = 63 is no multiple of 8"]),
        (1, 64, 64, OFF, TWO_PASS_SIMT, [f"not {COOPERATIVE!r}: the weight's rows are not whole"]),
    ],
    ids=str,
)
def test_choose_says_what_keeps_a_kernel_from_a_product(
    M: int, N: int, K: int, layout: Layout, strategy: str, words: list[str]
) -> None:
    choice = choose(M, N, K, layout)
    assert choice.strategy == strategy
    assert all(word in choice.reason for word in words), choice.reason
    assert words or choice.reason == "the cuda backend was requested"


def test_choose_of_float32_is_on_cuda_cores() -> None:
    choice = choose(1, 64, 64, dtype=f32)
    assert choice.strategy == TWO_PASS_SIMT and "float32 products need every bit" in choice.reason


@pytest.mark.parametrize("strategy", [COOPERATIVE, OVERLAPPED, TWO_PASS])
def test_strategy_requested_but_unsupported_raises(strategy: str) -> None:
    A, B = torch.ones(2, 63, dtype=bf16), torch.ones(8, 2, dtype=bf16)
    x, W = torch.ones(3, 63, dtype=bf16), torch.ones(8, 63, dtype=bf16)
    with (
        lora_kernels.backend("cuda", strategy),
        pytest.raises(RuntimeError, match=f"strategy '{strategy}' was requested .* K = 63"),
    ):
        lora_kernels.lora_linear(x, W, A, B)
    assert not launch.traffic


def test_layout_of_a_weight_says_how_it_lies() -> None:
    W = torch.zeros(16, 64, dtype=bf16)
    assert constraints.layout(W, bf16) == ROWS and constraints.layout(W.t(), bf16) == COLUMNS
    assert constraints.layout(None, bf16).unsupported_reason == constraints.NO_BASE
    for odd in (W.view(-1)[1:].as_strided((15, 64), (64, 1), 1), W[:, :63], W[:, ::2]):
        assert constraints.layout(odd, bf16).unsupported_reason == (
            None if odd.shape[1] == 63 else "the weight's rows are not whole and aligned 16 bytes"
        )
        assert constraints.layout(odd, f32).unsupported_reason is None  # it is converted, into rows
    codes = quantize_4bit(W, "nf4", 128).codes
    assert constraints.layout(codes, bf16) == Layout(128)
    off = torch.cat([codes.packed[:1], codes.packed])[1:]
    assert constraints.layout(codes._replace(packed=off), bf16).unsupported_reason is not None


@pytest.mark.parametrize("K", [64, 63])
def test_kernel_of_rows_that_fit_should_refuse_raises(
    K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraints, "forward_unsupported_reason", lambda *args: None)
    A, B = torch.ones(2, K, dtype=bf16), torch.ones(8, 2, dtype=bf16)
    x, W = torch.ones(33, K, dtype=bf16), torch.ones(8, K, dtype=bf16)
    with lora_kernels.backend("cuda", TWO_PASS), torch.no_grad():
        if K % 8:
            with pytest.raises(RuntimeError, match="gemm: x's rows are not whole"):
                lora_kernels.lora_linear(x, W, A, B)
        else:
            lora_kernels.lora_linear(x, W, A, B)


def test_explain_says_the_kernel_of_each_layer() -> None:
    config = LoraConfig(target_modules=["0", "1", "2"], init_lora_weights=False)
    layers = nn.Linear(64, 65), nn.Linear(65, 64), Conv1D(64, 64)
    model = fuse(get_peft_model(nn.Sequential(*layers).to(bf16), config))
    even, odd, columns = explain(model, x_dtype=bf16).rows
    assert even.strategy == f"{COOPERATIVE} up to 16 rows, {TWO_PASS} from 17 rows on"
    assert "dx on CUDA cores: N = 65" in even.reason
    assert odd.strategy == TWO_PASS_SIMT and "K = 65 is no multiple of 8" in odd.reason
    assert columns.strategy == TWO_PASS
    plain = explain(nn.Sequential(LoRALinear(65, 64, dtype=bf16)), x_dtype=bf16).rows[0]
    assert plain.strategy == TWO_PASS_SIMT and "K = 65" in plain.reason


NO_IMAGE = "the driver says: no kernel image is available for execution on the device"


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A machine with a B300 whose driver takes no kernel of the build; which GPUs were probed."""
    found: list[int] = []

    def probe(index: int) -> None:
        found.append(index)
        raise RuntimeError(NO_IMAGE)

    monkeypatch.setattr(cuda, "_load", lambda name: (SimpleNamespace(probe=probe), None))
    monkeypatch.setattr(cuda, "_capability", lambda index: 103)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    card = device.DeviceInfo("cuda", 103, 148, 227 << 10, "B300", 270 << 30)
    monkeypatch.setattr(device, "gpus", lambda: [card])
    cuda._driver_reason.cache_clear()
    token = cuda._emulated.set(None)
    yield found
    cuda._emulated.reset(token)
    cuda._driver_reason.cache_clear()


def test_unsupported_device_reason_driver_refuses_gives_its_words_and_asks_once(
    probed: list[int],
) -> None:
    for _ in range(2):
        assert (
            cuda.unsupported_device_reason("cuda", 0)
            == f"GPU 0 cannot run this build's CUDA kernels: {NO_IMAGE}"
        )
        assert (cuda.unsupported_device_reason("cuda", None) or "").startswith(
            "GPU 1 "
        )  # the current one
    assert probed == [0, 1]


def test_select_driver_refuses_raises_before_a_launch(probed: list[int]) -> None:
    with lora_kernels.backend("cuda"), pytest.raises(RuntimeError, match=NO_IMAGE):
        selection.choose(Problem("cuda", *(bf16,) * 4, 16, 1, False, 64, 64, device_index=0))
    assert probed == [0]


def test_info_driver_refuses_says_why(probed: list[int]) -> None:
    row = info._cuda_backend()
    assert row["available"] is False and NO_IMAGE in row["reason"]
