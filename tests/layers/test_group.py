"""LoRAGroup: several projections of one x as one layer.

Properties of every layer are in test_every_layer.py.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_kernels import reference
from lora_kernels.layers import (
    LoRAGroup,
    QLoRAGroup,
    QLoRALayer,
    load_lora_weights,
    save_lora_weights,
)
from lora_kernels.oracle import tolerance
from tests.support.assertions import assert_bitwise_equal, assert_close_derived
from tests.support.peft_models import count_ops

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
K, R, ALPHA = 40, 5, 7
MEMBERS = {"q": 33, "k": 9, "v": 12}
CLASSES = [LoRAGroup, QLoRAGroup]


def make(cls: Any = LoRAGroup, dtype: torch.dtype = f32, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"targets": ("q", "v"), "bias": True} | options
    group = cls(K, MEMBERS, R, ALPHA, dtype=dtype, **options)
    nn.init.normal_(group.lora_B)
    return group


def leaves(group: Any) -> list[Tensor]:
    return [group.lora_A, group.lora_B]


def oracle(group: Any, x: Tensor, dys: list[Tensor], rng: Tensor | None = None) -> list[Tensor]:
    """Each member by itself in float64: outputs, dx, dA and dB of the targets."""
    weight = group.dense_weight().detach().double()
    x, outs, grads, dx = x.detach().double().requires_grad_(), [], [], 0
    for (name, size), dy in zip(MEMBERS.items(), dys, strict=True):
        _, bias, A, B = group.member(name)
        w, weight = weight[:size], weight[size:]
        if A is None:
            A, B = torch.zeros(1, K), torch.zeros(size, 1)
        A, B = (t.detach().double().requires_grad_() for t in (A, B))
        dropout = {"rng": rng, "dropout_p": group.dropout} if rng is not None else {}
        y = reference.lora_linear(x, w, A, B, ALPHA / R, bias.detach().double(), **dropout)
        gx, gA, gB = torch.autograd.grad(y, [x, A, B], dy.double())
        outs.append(y.detach())
        dx = dx + gx
        if name in group.targets:
            grads.append((gA, gB))
    return [*outs, dx, torch.cat([a for a, _ in grads]), torch.cat([b for _, b in grads])]


def results(group: Any, x: Tensor, dys: list[Tensor]) -> list[Tensor]:
    ys = group(x)
    grads = torch.autograd.grad(ys, [x, *leaves(group)], dys)
    return [*(y.detach() for y in ys), *grads]


def draw(M: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(M, K).to(dtype).requires_grad_()
    return x, [torch.randn(M, size).to(dtype) for size in MEMBERS.values()]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [f64, f32, bf16], ids=str)
@pytest.mark.parametrize("targets", [("q", "v"), ("k",), None], ids=str)
def test_outputs_and_gradients(targets: Any, dtype: torch.dtype, cls: Any) -> None:
    if cls is QLoRAGroup and dtype is f64:
        pytest.skip("4-bit codes stand for float32, bfloat16 or float16")
    check(targets, dtype, cls)


def check(targets: Any, dtype: torch.dtype, cls: Any) -> None:
    """Compare on the forced backend."""
    group = make(cls, dtype, targets=targets, lora_dtype=dtype)
    x, dys = draw(70, dtype)
    got, want = results(group, x, dys), oracle(group, x, dys)
    # PyTorch's own error member by member; dx is the sum of three rounded products there.
    eager = results_apart(group, x, dys)
    u = tolerance.unit_roundoff(dtype)
    if dtype is f64:  # sums of at most 124 terms, in another order
        assert_close_derived(got, want, 124 * tolerance.unit_roundoff(f64))
        return
    for a, b, e in zip(got, want, eager, strict=True):
        assert tolerance.compare(a, b, e, u, (K, sum(MEMBERS.values()), 70)).ok


def results_apart(group: Any, x: Tensor, dys: list[Tensor]) -> list[Tensor]:
    """In plain PyTorch, each member by itself."""
    weight, ys = group.dense_weight().detach().to(x.dtype), []
    for name, size in MEMBERS.items():
        w, weight = weight[:size], weight[size:]
        _, bias, A, B = group.member(name)
        y = nn.functional.linear(x, w, bias)
        ys.append(y if A is None else y + (x @ A.T) * (ALPHA / R) @ B.T)
    grads = torch.autograd.grad(ys, [x, *leaves(group)], dys)
    return [*(y.detach() for y in ys), *grads]


@pytest.mark.parametrize("cls", CLASSES)
def test_one_op_and_x_is_read_once(cls: Any) -> None:
    group, (x, dys) = make(cls), draw(6, f32)
    op = "lora_linear_quantized" if cls is QLoRAGroup else "lora_linear"
    backward = op.replace("linear", "linear_backward")
    assert count_ops(lambda: group(x)) == {op: 1}
    assert count_ops(lambda: results(group, x, dys)) == {op: 1, backward: 1}


def test_members_share_a_mask() -> None:
    group, (x, dys) = make(dtype=f64, dropout=0.5), draw(9, f64)
    torch.manual_seed(3)
    got = results(group, x, dys)
    torch.manual_seed(3)
    rng = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)
    assert_close_derived(got, oracle(group, x, dys, rng))


def test_from_linears_shares_members_in_order() -> None:
    linears = {name: nn.Linear(K, size) for name, size in MEMBERS.items()}
    x = torch.randn(4, K)
    group = LoRAGroup.from_linears(linears, R, ALPHA, targets=("k",), init="orthogonal")
    assert_close_derived(group(x), [linear(x) for linear in linears.values()])
    for name, linear in linears.items():
        weight, bias, A, B = group.member(name)
        assert torch.equal(weight, linear.weight) and torch.equal(bias, linear.bias)
        assert (A is None) is (B is None) is (name != "k")
    A = group.member("k").lora_A
    torch.testing.assert_close(A @ A.T, torch.eye(R))
    q = QLoRAGroup.from_linears(linears, R, quant_type="fp4")
    assert q.quant_type == "fp4" and isinstance(q, QLoRALayer)
    assert q.member("q").weight is None


def test_each_target_starts_by_the_rule() -> None:
    group = LoRAGroup(K, MEMBERS, R, init="xavier")
    bound = (6 / (R + K)) ** 0.5  # of one member's A, not of all that lie together
    assert 0.96 * bound < group.lora_A.abs().max() <= bound
    assert LoRAGroup(K, MEMBERS, 16, 8, scaling="rslora").scaling == 8 / 4


def test_targets_are_in_the_order_of_members() -> None:
    group, same = (make(targets=targets) for targets in (("v", "q"), ("q", "v")))
    assert group.targets == ("q", "v") and "targets=('q', 'v')" in repr(group)
    x, dys = draw(3, f32)
    assert_bitwise_equal(results(group, x, dys), results(same, x, dys))


def test_from_linears_refuses_what_does_not_fit() -> None:
    linear = nn.Linear(K, 8)
    for other, error, message in (
        (nn.Linear(K, 8, bias=False), ValueError, r"linears\['b'\]: got in_features, dtype"),
        (nn.Linear(K + 1, 8), ValueError, r"linears\['b'\]: got"),
        (nn.Linear(K, 8, dtype=bf16), ValueError, r"linears\['b'\]: got in_features, dtype"),
        (nn.Linear(K, 8, device="meta"), ValueError, r"linears\['b'\]: got in_features, dtype"),
        (nn.Bilinear(2, 2, 2), TypeError, r"linears\['b'\]: got Bilinear"),
    ):
        with pytest.raises(error, match=message):
            LoRAGroup.from_linears({"a": linear, "b": other})
    with pytest.raises(ValueError, match="linears: got none"):
        LoRAGroup.from_linears({})
    with pytest.raises(KeyError, match="want one of"):
        make().member("o")


def test_adapter_of_members_in_another_order_is_refused(tmp_path: Path) -> None:
    """Keys and shapes are the same: without the order, q's adapter would become k's."""
    saved = LoRAGroup(8, {"q": 6, "k": 6}, r=2)
    save_lora_weights(saved, tmp_path / "adapter.safetensors")
    load_lora_weights(LoRAGroup(8, {"q": 6, "k": 6}, r=2), tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="members"):
        load_lora_weights(LoRAGroup(8, {"k": 6, "q": 6}, r=2), tmp_path / "adapter.safetensors")


@torch.no_grad()
def test_adapters_of_another_dtype_are_not_rounded_to_the_former() -> None:
    """The wide lora_B of a call without gradients has the dtype that lora_B has now."""
    group = make(lora_dtype=bf16).eval()
    x = torch.randn(2, K)
    group(x)
    for p in (group.lora_A, group.lora_B):
        p.data = torch.randn(p.shape)
    got = group(x)
    group._cache.wide_B = None
    assert_bitwise_equal(got, group(x))
    want = [y.float() for y in copy.deepcopy(group).double()(x.double())]
    assert_close_derived(list(got), want)  # bfloat16 factors would err by 2**-9


def test_group_is_called_in_inference_mode_and_out_of_it() -> None:
    """Each call writes the tensor that is kept for the next."""
    group, x = make().eval(), torch.randn(2, K)
    for _ in range(2):
        with torch.inference_mode():
            inside = group(x)
        with torch.no_grad():
            assert_bitwise_equal([y.clone() for y in inside], list(group(x)))


@torch.no_grad()
def test_group_on_meta_has_shapes() -> None:
    y = make().eval().to("meta")(torch.empty(2, K, device="meta"))
    assert [tuple(each.shape) for each in y] == [(2, size) for size in MEMBERS.values()]


def test_members_have_one_call_of_their_sizes_and_names() -> None:
    """A member has views of the parameters of the group."""
    group = make()
    assert (group.members, group.targets) == (MEMBERS, ("q", "v"))
    assert repr(group).endswith(f"members={MEMBERS}, targets=('q', 'v'))")
    start = of_B = 0
    for name, size in MEMBERS.items():
        weight, bias, A, B = group.member(name)
        assert weight.data_ptr() == group.weight[start].data_ptr() and len(weight) == size
        assert bias.data_ptr() == group.bias[start:].data_ptr() and len(bias) == size
        start += size
        if name in group.targets:
            rank = R * group.targets.index(name)
            assert A.data_ptr() == group.lora_A[rank].data_ptr() and A.shape == (R, K)
            assert B.data_ptr() == group.lora_B[of_B].data_ptr() and B.shape == (size, R)
            of_B += size
    want = r"name: got 'o', want one of \('q', 'k', 'v'\)"
    with pytest.raises(KeyError, match=want):
        group.member("o")
    assert make(bias=False).member("q").bias is None


@pytest.mark.parametrize("training", [True, False])
def test_from_linears_copies_and_keeps_the_mode(training: bool) -> None:
    linears = {name: nn.Linear(K, size).train(training) for name, size in MEMBERS.items()}
    group = LoRAGroup.from_linears(linears, R, ALPHA, dropout=0.5, lora_dtype=bf16)
    assert group.training is training and group.dropout == 0.5
    assert (group.lora_A.dtype, group.weight.dtype) == (bf16, f32)
    assert group.r == R and group.scaling == ALPHA / R
    assert not (group.weight.requires_grad or group.bias.requires_grad)
    for name, linear in linears.items():
        assert group.member(name).weight.data_ptr() != linear.weight.data_ptr()
    bare = {name: nn.Linear(K, size, bias=False) for name, size in MEMBERS.items()}
    assert LoRAGroup.from_linears(bare).bias is None


def test_group_called_with_fake_tensors_keeps_none() -> None:
    group, x = LoRAGroup(8, {"q": 8, "k": 4}, r=2), torch.ones(2, 8)
    torch.nn.init.normal_(group.lora_B)
    want = group(x)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        group(torch.empty(2, 8))
    with torch.no_grad():
        got = group(x)
    assert all(type(y) is Tensor for y in got)
    torch.testing.assert_close(got, tuple(y.detach() for y in want))
