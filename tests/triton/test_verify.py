"""`lora-kernels verify` by the Triton kernels."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from lora_kernels import verify
from lora_kernels.backends.triton import is_interpreted
from lora_kernels.bench.functions import Function
from tests.triton.device import DEVICE

ENGINE, DTYPES = "triton fused", (torch.float32, None)


@pytest.mark.parametrize("option", ["plain", "everything", "nf4"])
def test_verify_judges_what_the_kernels_take(option: str) -> None:
    found = verify.judge_option(((70, 65, 64, 13),), DTYPES, option, ENGINE)
    assert found is not None and found[0]["ok"], found


@pytest.mark.parametrize("option", ["dropout", "adapters", "experts", "head"])
def test_verify_leaves_out_what_they_refuse(option: str) -> None:
    assert verify.judge_option(((70, 65, 64, 13),), DTYPES, option, ENGINE) is None


@triton.jit
def gemm_kernel(x_ptr, w_ptr, y_ptr, M, N, K, UPCAST: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """y [M, N] = x [M, K]·w [N, K]ᵀ in float32."""
    m, n = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1) * B + tl.arange(0, B)
    acc = tl.zeros((B, B), tl.float32)
    for start in range(0, K, B):
        k = start + tl.arange(0, B)
        x = tl.load(x_ptr + m[:, None] * K + k, mask=(m[:, None] < M) & (k < K), other=0.0)
        w = tl.load(w_ptr + n * K + k[:, None], mask=(n < N) & (k[:, None] < K), other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    tl.store(y_ptr + m[:, None] * N + n, acc, mask=(m[:, None] < M) & (n < N))


@pytest.mark.parametrize("upcast", [True, False], ids=["float32", "bfloat16"])
def test_note_about_bfloat16_stands_under_a_miss_in_the_interpreter(upcast: bool) -> None:
    """If "bfloat16" fails here, the interpreter was mended: the note and docs/kernels.md go."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, w)
            (M, K), N = x.shape, w.shape[0]
            y = torch.empty(M, N, device=x.device)
            grid = triton.cdiv(M, 16), triton.cdiv(N, 16)
            gemm_kernel[grid](x.contiguous(), w.contiguous(), y, M, N, K, UPCAST=upcast, B=16)
            return y

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> Any:  # type: ignore[override]
            x, w = ctx.saved_tensors
            return dy.to(x.dtype) @ w, None

    def call(x: Any, weight: Any, lora_A: Any, lora_B: Any, scaling: float) -> Any:
        return (Product.apply(x, weight) + scaling * (x @ lora_A.T) @ lora_B.T).to(x.dtype)

    function, dtypes = Function("mine", call, frozenset()), (torch.bfloat16, None)
    how = {"is_named": True}
    row, text = verify.judge_function(function, DEVICE, ((20, 33, 40, 5),), dtypes, "plain", **how)
    assert row["ok"] is (upcast or not is_interpreted())
    assert (verify.NOTE_BF16 in text) is (not row["ok"]) and row.get("note") in (
        None,
        verify.NOTE_BF16,
    )
    row, text = verify.judge_function(function, DEVICE, ((20, 33, 40, 5),), DTYPES, "plain", **how)
    assert row["ok"] and verify.NOTE_BF16 not in text
