"""LoRAEmbedding's own: its formula in plain PyTorch, training, saving, the base that it shares.

Properties of every layer are in test_every_layer.py.
"""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lora_kernels.layers import (
    LoRAEmbedding,
    LoRALinear,
    lora_plus_parameter_groups,
    lora_state_dict,
    mark_only_lora_as_trainable,
)
from lora_kernels.oracle import tolerance
from lora_kernels.peft import Row, explain
from lora_kernels.peft.explain_rows import LIBRARY, TORCH
from tests.support.allocations import Results
from tests.support.assertions import (
    assert_bitwise_equal,
    assert_close_to_reference,
)
from tests.support.models import KINDS, gradients
from tests.support.peft_models import count_ops

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
K, N, R = 53, 72, 5  # R·K and N·R, the smallest gradients, are more than tolerance.POOL
ALPHA = 7
SHAPES = [(), (1,), (7,), (2, 3), (2, 3, 4), (0,), (2, 0, 3)]
# With repetitions: of 132 draws from 53 at least 79.
indices = KINDS["embedding"].input
make_exact = KINDS["embedding"].make  # integers, a rank of 3 and a scaling of 2


def make(seed=0, **options):
    """A layer whose adapter is no longer at its start."""
    torch.manual_seed(seed)
    layer = LoRAEmbedding(K, N, R, ALPHA, **options)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn_like(layer.lora_A) / 3)
    return layer


def formula(layer, x, A, B, dtype):
    """Compute PEFT's formula, each operation in the dtypes that it has there."""
    rows = layer.weight.detach().to(dtype)[x]
    return (rows + A.t()[x] @ B.t() * layer.scaling).to(dtype)


def test_layer_starts_as_its_base():
    torch.manual_seed(0)
    base = nn.Embedding(1000, 40, padding_idx=2)
    torch.manual_seed(0)
    layer = LoRAEmbedding(1000, 40, padding_idx=2)
    assert torch.equal(layer.weight, base.weight) and not layer.weight[2].any()
    assert not layer.lora_A.any()
    # The deviation of n normals is known to 1/sqrt(2n): 4 % for 40 x 8.
    assert abs(layer.lora_B.std() - 1) < 5 * 0.04
    x = torch.arange(1000)
    assert torch.equal(layer(x), base(x))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_empty_indices(shape, dtype):
    layer, x = make_exact(), indices(*shape).to(dtype)
    y = layer(x)
    assert y.shape == (*shape, N)
    assert torch.equal(y, (layer.weight + 2 * (layer.lora_B @ layer.lora_A).t())[x.long()])
    y.sum().backward()
    seen = torch.bincount(x.flatten(), minlength=K).float()
    assert torch.equal(layer.lora_A.grad, 2 * layer.lora_B.sum(0)[:, None] * seen)
    assert torch.equal(layer.lora_B.grad, (2 * layer.lora_A @ seen).expand(N, 3))


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize(
    ("dtype", "lora_dtype"),
    [(f32, f32), (bf16, f32), (f16, f32), (bf16, bf16), (f32, bf16)],
    ids=str,
)
def test_y_and_every_gradient_follow_the_formula(dtype, lora_dtype, scaling):
    layer = make(dtype=dtype, lora_dtype=lora_dtype, scaling=scaling)
    assert layer.scaling == ALPHA / (R if scaling == "lora" else math.sqrt(R))
    x, dy = indices(4, 33), torch.randn(4, 33, N).to(dtype)
    sets = []
    for wide in (None, f64, lora_dtype):
        A, B = (
            p.detach().to(wide or p.dtype).requires_grad_() for p in (layer.lora_A, layer.lora_B)
        )
        if wide is None:
            y = functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))
        else:
            y = formula(layer, x, A, B, f64 if wide is f64 else dtype)
        found = [y, *torch.autograd.grad(y, [A, B], dy.to(y.dtype))]
        sets.append(dict(zip(("y", "lora_A", "lora_B"), found, strict=True)))
    # y is rounded to the weight's dtype, gradients to the adapter's; dP is made in the wider.
    assert_close_to_reference(
        *sets,
        lambda name, _: tolerance.unit_roundoff(dtype if name == "y" else lora_dtype),
        lambda name: (R,) if name == "y" else (4 * 33, N),
    )


@pytest.mark.parametrize("padding_idx", [3, -50])
def test_padding_idx_gets_no_gradient(padding_idx):
    """No gradient for that column, which counts all the same."""
    layer, plain, x = make_exact(padding_idx=padding_idx), make_exact(), torch.tensor([3, 5, 3, 7])
    plain.load_state_dict(layer.state_dict())
    assert layer.padding_idx == 3
    got, want = gradients(layer, x), gradients(plain, x)
    assert want["lora_A"][:, 3].any()
    want["lora_A"][:, 3] = 0
    assert_bitwise_equal(got, want)


@pytest.mark.parametrize("padding_idx", [0, -K, K - 1])
def test_padding_idx_may_be_any_index(padding_idx):
    layer = LoRAEmbedding(K, N, padding_idx=padding_idx)
    assert layer.padding_idx == padding_idx % K
    assert (~layer.weight.any(1)).nonzero().tolist() == [[padding_idx % K]]


def test_scale_grad_by_freq_divides_the_gradient():
    layer, plain, x = make_exact(scale_grad_by_freq=True), make_exact(), torch.tensor([3, 5, 3, 3])
    plain.load_state_dict(layer.state_dict())
    got, want = gradients(layer, x), gradients(plain, x)
    want["lora_A"][:, 3] /= 3
    # A third of each of three terms, or of their sum: three roundings apart.
    torch.testing.assert_close(got.pop("lora_A"), want.pop("lora_A"), rtol=2.0**-22, atol=0)
    assert_bitwise_equal(got, want)


@pytest.mark.parametrize("state", ["on", "disabled", "merged"])
@pytest.mark.parametrize("x", [torch.tensor([0, K]), torch.tensor(-1)])
def test_index_out_of_range_is_refused(x, state):
    layer = make().eval()
    layer.enabled = state != "disabled"
    if state == "merged":
        layer.merge()
    with pytest.raises(IndexError, match="index out of range in self"):
        layer(x)


def test_indices_of_another_dtype_are_refused():
    with pytest.raises(RuntimeError, match=r"scalar types?: Long, Int"):
        make()(torch.ones(3))


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_autocast_changes_nothing(dtype):
    """A lookup is none of autocast's operations, and the adapter rides on it."""
    layer, x = make(dtype=dtype), indices(5, 9)
    want = gradients(layer, x)

    def autocast(x):
        with torch.autocast("cpu", bf16):
            return layer(x)

    got = gradients(layer, x, autocast)
    assert got["y"].dtype is dtype
    assert_bitwise_equal(got, want)


def test_nothing_of_the_tables_size_is_made():
    layer = LoRAEmbedding(4096, 64, 3, 6)
    x = torch.randint(4096, (2, 9))
    assert count_ops(lambda: layer(x)) == {"addmm_": 1}
    with Results() as found:
        layer(x).sum().backward()
    assert max(found.sizes) <= 4096 * 3  # a gradient for lora_A


def test_training_helpers_find_the_adapter():
    model = nn.ModuleDict({"tokens": make(), "head": nn.Linear(N, K)})
    mark_only_lora_as_trainable(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == list(lora_state_dict(model)) == ["tokens.lora_A", "tokens.lora_B"]
    assert list(model["tokens"].state_dict()) == list(LoRALinear(K, N).state_dict())
    slow, fast = lora_plus_parameter_groups(model, lr=1.0, ratio=4.0)
    assert slow["params"] == [model["tokens"].lora_A] and fast["params"] == [model["tokens"].lora_B]


def test_explain_tells_the_states_apart():
    model = nn.ModuleDict({"a": make(), "b": make().eval(), "c": make()})
    model["b"].merge()
    model["c"].enabled = False
    a, b, c = explain(model).rows
    reason = "an embedding: its base is a lookup, no GEMM to fuse the adapter's with"
    assert a == Row("a", LIBRARY, "torch", "lookups, then one GEMM in place", reason)
    assert b == Row("b", TORCH, "torch", "F.embedding", "the adapter is merged")
    assert c == Row("c", TORCH, "torch", "F.embedding", "the adapter is disabled")


# Over an embedding that is there


def test_from_embedding_takes_the_options_of_its_base():
    base = nn.Embedding(K, N, padding_idx=3, scale_grad_by_freq=True)
    layer = LoRAEmbedding.from_embedding(base, r=3)
    assert layer.lora_A.shape == (3, K) and layer.lora_B.shape == (N, 3)
    assert layer.padding_idx == 3 and layer.scale_grad_by_freq


def test_from_embedding_takes_an_option_of_its_own():
    base = nn.Embedding(K, N, scale_grad_by_freq=True)
    assert not LoRAEmbedding.from_embedding(base, scale_grad_by_freq=False).scale_grad_by_freq


def test_tied_weights_stay_tied():
    tokens, head = nn.Embedding(K, N), nn.Linear(N, K, bias=False)
    head.weight = tokens.weight
    model = nn.ModuleDict({"tokens": LoRAEmbedding.from_embedding(tokens, r=3), "head": head})
    assert model["tokens"].weight is head.weight and not head.weight.requires_grad
    model["head"] = LoRALinear.from_linear(head, r=3)
    model.to(bf16)
    assert model["tokens"].weight is model["head"].weight
    model["head"](model["tokens"](indices(5))).sum().backward()
    assert model["head"].lora_B.grad.any() and model["tokens"].lora_A.grad is not None


def test_a_sparse_base_has_no_gradient_to_be_sparse():
    layer = LoRAEmbedding.from_embedding(nn.Embedding(K, N, sparse=True), r=3)
    layer(indices(5)).sum().backward()
    assert layer.lora_A.grad.layout is torch.strided and layer.lora_A.grad.any()
