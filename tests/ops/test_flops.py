"""FLOPs that PyTorch's counter sees: those of the plain PyTorch expression."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels
from lora_kernels.ops.norm import dora_norm
from lora_kernels.quantization.weight import quantize_4bit

M, K, N, R, E = 6, 64, 35, 5, 3


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def flops(call: Callable[[], Tensor]) -> int:
    """Count a forward and a backward."""
    with FlopCounterMode(display=False) as counter:
        call().sum().backward()
    found: int = counter.get_total_flops()
    return found


def plain_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return functional.linear(x, weight) + functional.linear(functional.linear(x, A), B)


@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_flops_of_lora_linear_equal_the_plain_expression(quantized: bool, need_x: bool) -> None:
    x, weight = torch.randn(2, 3, K, requires_grad=need_x), torch.randn(N, K)
    A, B = leaf(R, K), leaf(N, R)
    packed: Any = quantize_4bit(weight) if quantized else weight
    got = flops(lambda: lora_kernels.lora_linear(x, packed, A, B, 0.5))
    assert got == flops(lambda: plain_linear(x, weight, A, B)) > 0


def test_flops_of_several_adapters_are_those_of_one_for_all_rows() -> None:
    x, weight, index = leaf(M, K), torch.randn(N, K), torch.tensor([0, 1, 1, 2, 0, 0])
    As, Bs = [leaf(R, K) for _ in range(E)], [leaf(N, R) for _ in range(E)]
    got = flops(lambda: lora_kernels.multi_lora_linear(x, weight, As, Bs, index))
    assert got == flops(lambda: plain_linear(x, weight, As[0], Bs[0]))


def test_flops_of_adapters_of_different_ranks_are_those_of_the_largest() -> None:
    # Which rows have which adapter is not in the shapes.
    x, weight, index = leaf(M, K), torch.randn(N, K), torch.ones(M, dtype=torch.int64)
    As, Bs = ([leaf(rank, K) for rank in (1, R, 2)], [leaf(N, rank) for rank in (1, R, 2)])
    got = flops(lambda: lora_kernels.multi_lora_linear(x, weight, As, Bs, index))
    assert got == flops(lambda: plain_linear(x, weight, As[1], Bs[1]))


def test_flops_of_experts_are_those_of_one_for_all_rows() -> None:
    x, weight, offsets = leaf(M, K), torch.randn(E, N, K), torch.tensor([1, 4, M])
    A, B = leaf(E, R, K), leaf(E, N, R)
    got = flops(lambda: lora_kernels.lora_experts_linear(x, weight, A, B, offsets.int()))
    one = [t[0].detach().requires_grad_() for t in (A, B)]
    assert got == flops(lambda: plain_linear(x, weight[0], *one))


def test_flops_of_a_head_equal_its_logits_and_their_gradients() -> None:
    x, weight, A, B = leaf(M, K), torch.randn(N, K), leaf(R, K), leaf(N, R)
    labels = torch.arange(M)
    loss = flops(lambda: lora_kernels.lora_linear_cross_entropy(x, weight, A, B, labels))
    plain_loss = flops(lambda: functional.cross_entropy(plain_linear(x, weight, A, B), labels))
    recomputed = 2 * M * (K * N + K * R + N * R)
    assert loss == plain_loss
    scores = flops(
        lambda: lora_kernels.lora_linear_log_probs(x, weight, A, B, labels, outputs=()).log_probs
    )
    assert scores == plain_loss + recomputed


def test_flops_of_a_dora_norm_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        dora_norm(torch.randn(N, K), torch.randn(R, K), torch.randn(N, R), 0.5)
    assert counter.get_total_flops() == 2 * R * (N * K + R * K + N * R)


def test_flop_counter_is_not_imported_by_lora_kernels() -> None:
    """A counter that is open before the first op counts too."""
    code = """
import sys, torch, lora_kernels
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    lora_kernels.lora_linear(*(torch.ones(s) for s in ((2, 8), (6, 8), (3, 8), (6, 3))))
assert counter.get_total_flops() == 2 * 2 * (8 * 6 + 8 * 3 + 3 * 6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_flops_of_a_head_are_counted_where_no_other_op_was_counted() -> None:
    """In a new process, whose first op it is."""
    script = """
import torch
from torch.utils.flop_counter import FlopCounterMode
from lora_kernels import lora_linear_cross_entropy
x, W, A, B = (torch.randn(s) for s in ((4, 8), (16, 8), (2, 8), (16, 2)))
with FlopCounterMode(display=False) as counter:
    lora_linear_cross_entropy(x, W, A, B, torch.zeros(4, dtype=torch.int64))
assert counter.get_total_flops() == 2 * 4 * (8 * 16 + 8 * 2 + 2 * 16), counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
