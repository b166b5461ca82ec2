"""Attributes set on a context by hand are no tensors but a layer's own, by the source and after a
call."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from lora_kernels import lora_linear, multi_lora_linear, ops
from lora_kernels.quantization import quantize_4bit
from tests.support.models import hidden

# Numbers, shapes, dtypes and the choice of a kernel; of a new name, look at what it holds. A block
# and a layer have the layers' own tensors, with the sum of their versions.
ALLOWED = {
    *("choice", "options", "spec", "call", "needs", "weights", "block", "layer", "version"),
    *("bias_dtype", "x_dtype", "dtypes", "x_shape", "numbers", "blocksizes"),
}


def test_sources_of_the_functions_set_only_allowed_names() -> None:
    """Also by setattr or through __dict__, which do not occur."""
    found = set()
    for path in sorted(Path(ops.__path__[0]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if (of := ast.unparse(node.value)) == "ctx":
                    found.add(node.attr)
                else:
                    assert of in ("cls", "cls._backward_cls")  # of a Function
            if isinstance(node, ast.Name):
                assert node.id != "setattr", path
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("__dict__", "__setattr__")
    assert found == ALLOWED


@pytest.mark.parametrize("four_bit", [False, True])
def test_context_of_a_call_holds_no_tensor(four_bit: bool) -> None:
    M, N, K, R = 6, 64, 64, 3
    W = torch.randn(N, K)
    base = quantize_4bit(W) if four_bit else W
    A, B = (torch.randn(s, requires_grad=True) for s in ((R, K), (N, R)))
    x = torch.randn(M, K, requires_grad=True)
    bias, g, c = (torch.ones(n, requires_grad=True) for n in (N, R, N))
    y = lora_linear(x, base, A, B, 2.0, bias, rank_gate=g, column_scale=c, dropout_p=0.1)
    assert not hidden(y)
    assert vars(y.grad_fn).keys() >= {"choice", "options", "bias_dtype", "x_dtype"}
    index = torch.tensor([0, 1, -1, 1, 0, 0])
    y = multi_lora_linear(x, base, [A, A], [B, B], index, [2.0, 0.5], bias, dropout_p=0.1)
    assert not hidden(y)
