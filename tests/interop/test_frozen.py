"""`fuse(model, linears=True)`: layers without an adapter, for few rows and without gradients."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_kernels
from lora_kernels.backends.cpu import heuristics as cpu_heuristics
from lora_kernels.backends.cpu import linear as cpu
from lora_kernels.backends.cpu import native
from lora_kernels.oracle import forms, tolerance
from lora_kernels.peft import StreamedLinear, explain, fuse, unfuse
from lora_kernels.peft.explain_rows import KERNELS, TORCH
from lora_kernels.peft.linear import set_class
from lora_kernels.quantization import quantize_4bit
from lora_kernels.quantization.packed_state import build_parameter
from tests.support.assertions import assert_as_exact, assert_bitwise_equal, assert_close_derived
from tests.support.clones import replica_of
from tests.support.engines import assert_within
from tests.support.models import skip_unless_few, watch_direct_calls

pytestmark = pytest.mark.skipif(native.module is None, reason="no native kernels")

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
K, N = 96, 131


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adapted = nn.Linear(K, K)
        self.head = nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.adapted(x))


def fused() -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Model(), LoraConfig(target_modules=["adapted"]))
    return fuse(model, linears=True)


@pytest.fixture
def head() -> Any:
    head = fused().base_model.model.head
    assert type(head) is StreamedLinear
    return head


def rows(M: int = 1, dtype: torch.dtype = f32) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)


def library(head: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x, head.weight, head.bias)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    return watch_direct_calls(monkeypatch)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("M", [1, 3, 70, 300])
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("quant", ["nf4-64-nested", "int4-32-half-shift", "int8-16-nested"])
@torch.no_grad()
def test_codes_are_read_by_the_kernels(
    quant: str, dtype: torch.dtype, M: int, bias: bool, answers: list[Tensor | None]
) -> None:
    """As exact as PyTorch over the decoded weight, beside float64."""
    torch.manual_seed(M)
    layer = nn.Linear(K, N, bias=bias).to(dtype)
    if quant.startswith("nf4"):
        weight = quantize_4bit(layer.weight.float())
    else:
        weight = forms.build(layer.weight.float(), quant)
    layer._parameters["weight"] = build_parameter(weight, dtype=dtype)
    set_class(layer, StreamedLinear)
    x = rows(M, dtype)
    got, want = layer(x), library(layer, x)
    assert got.dtype is dtype
    if M <= 3:
        assert answers.pop() is got
    dense = weight.dequantize(torch.float64)
    exact = x.double() @ dense.T + (layer.bias.double() if bias else 0.0)
    assert_as_exact({"y": got}, {"y": exact}, {"y": want})
    # With gradients, and for another dtype of x, PyTorch computes it, or refuses.
    with torch.enable_grad():
        assert not layer(x.requires_grad_()).isnan().any()
    if dtype is not f32:
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.detach().float())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("M", [1, 3, 6])
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@torch.no_grad()
def test_few_rows_are_streamed_within_tolerance(head, dtype, M, bias, answers) -> None:
    """Held to the tolerance beside the library GEMM; the same bits each time."""
    skip_unless_few(M, dtype)
    head.to(dtype)
    if not bias:
        head.bias = None
    x = rows(M, dtype).view(M, 1, K)
    y = head(x)
    assert y.shape == (M, 1, N) and y.dtype is dtype
    exact = nn.functional.linear(
        x.double(), head.weight.double(), head.bias.double() if bias else None
    )
    u = tolerance.unit_roundoff(dtype)
    assert_within(dtype, {"y": tolerance.compare(y, exact, library(head, x), u, sums=[K])})
    assert all(torch.equal(head(x), y) for _ in range(2))
    assert_bitwise_equal(head(x[:1]), y[:1])
    assert len(answers) == 4 and all(answer is not None for answer in answers)


def test_all_else_runs_the_librarys_product(head: Any, answers: list[Tensor | None]) -> None:
    x = rows(3)
    assert_bitwise_equal(head(x), library(head, x))  # with gradients
    head(x.requires_grad_()).sum().backward()
    assert head.weight.grad is None and x.grad is not None  # frozen by PEFT
    x = x.detach()
    with torch.no_grad():
        assert_bitwise_equal(head(rows(200)), library(head, rows(200)))
        with torch.autocast("cpu", bf16):
            assert_bitwise_equal(head(x), library(head, x))
        with lora_kernels.backend("eager"):
            assert_bitwise_equal(head(x), library(head, x))
        for wrong in (torch.ones(3, K + 1), torch.ones(3, K, dtype=bf16)):
            with pytest.raises(RuntimeError):
                head(wrong)
        assert all(answer is None for answer in answers)
        compiled = torch.compile(head, fullgraph=True, backend="eager")
        assert_bitwise_equal(compiled(x), library(head, x))
        head.weight = nn.Parameter(head.weight.t().contiguous().t())  # stored as [K, N]
        assert_bitwise_equal(head(x), library(head, x))
    assert all(answer is None for answer in answers)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "new_weight": lambda head: setattr(head, "weight", nn.Parameter(head.weight.flip(0))),
    "new_data": lambda head: setattr(head.weight, "data", head.weight.data.flip(0)),
    "in_place": lambda head: head.weight.mul_(2),
    "new_bias": lambda head: setattr(head, "bias", nn.Parameter(torch.ones(N))),
    "no_bias": lambda head: setattr(head, "bias", None),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_decoding_notices_a_change(head: Any, change: str) -> None:
    x = rows()
    before = head(x)
    CHANGES[change](head)
    assert_close_derived(head(x), library(head, x), terms=K, layers=1)
    assert not torch.allclose(head(x), before)


@torch.no_grad()
def test_copies_start_anew(head: Any) -> None:
    x = rows()
    y = head(x)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert type(other) is StreamedLinear
        head.weight.zero_()
        assert_bitwise_equal(other(x), y)
        head.weight.copy_(other.weight)


def test_fuse_takes_linears_without_adapter_only_if_asked() -> None:
    model = fused()
    classes = {name: type(module) for name, module in model.named_modules()}
    assert [name for name, cls in classes.items() if cls is StreamedLinear] == [
        "base_model.model.head"
    ]
    keys, head = model.state_dict().keys(), model.base_model.model.head
    with torch.no_grad():
        head(rows())
    assert type(unfuse(model).base_model.model.head) is nn.Linear
    assert model.state_dict().keys() == keys
    assert torch.equal(head(rows()), library(head, rows()))
    assert type(fuse(model).base_model.model.head) is nn.Linear
    head.forward = MethodType(lambda self, x: 2 * x, head)
    assert type(fuse(model, linears=True).base_model.model.head) is nn.Linear


@torch.no_grad()
def test_layer_that_gets_an_adapter_is_fused() -> None:
    model = fused()
    model.base_model.model.head(rows())
    model.add_adapter("more", LoraConfig(target_modules=["head"]))
    fuse(model, linears=True)
    layer = model.base_model.model.head
    assert type(layer).__name__ == "FusedLinear" and type(layer.base_layer) is nn.Linear
    model.set_adapter("more")
    assert explain(model).rows[-1].state == KERNELS


def test_explain_says_what_is_streamed(head: Any) -> None:
    model = nn.Sequential(head)
    here = explain(model).linears
    assert [row[:2] for row in here] == [("0", KERNELS)]
    few = cpu_heuristics.few_rows(f32, False, N * K)
    assert cpu.GEMV in here[0].strategy and "2048 rows: F.linear" in here[0].strategy
    assert "without gradients" in here[0].reason
    assert explain(fused()).linears[0].layer == "base_model.model.head"
    explain(fused()).assert_fused()  # which is about LoRA layers
    assert "our GEMV serves 1 of 1 linears without an adapter" in str(explain(fused()))
    assert json.loads(explain(model).json())["linears"] == [here[0]._asdict()]
    for rows, state in ((few, KERNELS), (few + 1, TORCH)):
        told = explain(fused(), rows=rows)
        assert told.linears[0].state == state and "head" in str(told)
    assert "too many rows" in told.linears[0].reason


@pytest.mark.parametrize(
    ("around", "x_dtype", "word"),
    [
        (lambda: torch.autocast("cpu", bf16), None, "autocast"),
        (lambda: lora_kernels.backend("eager"), None, "eager"),
        (contextlib.nullcontext, bf16, "bfloat16"),
    ],
    ids=["autocast", "eager", "dtype"],
)
def test_explain_says_why_not_streamed(head, around, x_dtype, word) -> None:
    with around():
        (row,) = explain(nn.Sequential(head), x_dtype=x_dtype).linears
    assert row[1:4] == (TORCH, "torch", "F.linear") and word in row.reason


class Seen(Tensor):
    """A subclass whose memory must not be read without the dispatcher."""


def test_explain_names_what_no_kernel_streams(head: Any) -> None:
    by_columns = copy.deepcopy(head)
    by_columns.weight.data = head.weight.t().contiguous().t()
    seen = copy.deepcopy(head)
    seen.weight = nn.Parameter(head.weight.detach().as_subclass(Seen), requires_grad=False)
    double, meta = (copy.deepcopy(head).to(other) for other in (torch.float64, "meta"))
    wants = (by_columns, "columns"), (seen, "subclass"), (double, "float64"), (meta, "meta")
    for layer, word in wants:
        (row,) = explain(nn.Sequential(layer)).linears
        assert row.state == TORCH and word in row.reason


def test_replica_of_data_parallel_runs_pytorchs_linear() -> None:
    model, x = fused(), rows(1)
    replica = replica_of(model)
    assert_close_derived(replica(x), model(x))
    with torch.no_grad():
        want = model.base_model.model.head(x)  # by a call that is prepared
        got = replica.base_model.model.head(x)
        assert torch.equal(got, library(model.base_model.model.head, x))
        assert torch.equal(model.base_model.model.head(x), want)
    (row,) = explain(replica).linears
    assert row.state == TORCH and "a replica of DataParallel" in row.reason
