"""LoRAEmbedding against its formula in plain PyTorch: y, gradients, training, saving, merging."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lora_kernels.layers import (
    LoRAEmbedding,
    LoRALinear,
    load_lora_weights,
    lora_plus_parameter_groups,
    lora_state_dict,
    mark_only_lora_as_trainable,
    save_lora_weights,
)
from lora_kernels.measure import tolerance
from lora_kernels.peft import Row, explain

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
K, N, R = 53, 72, 5  # R·K and N·R, the smallest gradients, are more than tolerance.POOL
ALPHA = 7
SHAPES = [(), (1,), (7,), (2, 3), (2, 3, 4), (0,), (2, 0, 3)]


def make(seed=0, **options):
    """A layer whose adapter is no longer at its start."""
    torch.manual_seed(seed)
    layer = LoRAEmbedding(K, N, R, ALPHA, **options)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn_like(layer.lora_A) / 3)
    return layer


def make_exact(**options):
    """Integer-valued parameters and a scaling of 2: any order of summation gives the same bits."""
    layer = LoRAEmbedding(K, N, R, 2 * R, **options)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randint(-4, 5, param.shape))
    return layer


def formula(layer, x, A, B, dtype):
    """As PEFT writes it, each operation in the dtypes that it has there."""
    rows = layer.weight.detach().to(dtype)[x]
    return (rows + A.t()[x] @ B.t() * layer.scaling).to(dtype)


def indices(*shape, seed=3):
    """With repetitions: of 132 draws from 53 at least 79."""
    return torch.randint(K, shape, generator=torch.Generator().manual_seed(seed))


def gradients(layer, x, run=None):
    layer.zero_grad()
    y = (layer if run is None else run)(x)
    y.square().sum().backward()
    return [y.detach(), layer.lora_A.grad, layer.lora_B.grad]


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)


def test_starts_as_its_base():
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
    assert torch.equal(layer.lora_B.grad, (2 * layer.lora_A @ seen).expand(N, R))


def test_strided_indices():
    layer, x = make_exact(), indices(6, 4).t()
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize(
    ("dtype", "lora_dtype"),
    [(f32, f32), (bf16, f32), (f16, f32), (bf16, bf16), (f32, bf16)],
    ids=str,
)
def test_y_and_every_gradient(dtype, lora_dtype, scaling):
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
        sets.append([y, *torch.autograd.grad(y, [A, B], dy.to(y.dtype))])
    for name, got, ref, eager in zip(("y", "lora_A", "lora_B"), *sets, strict=True):
        assert got.dtype is eager.dtype, name
        # y is rounded to the weight's dtype, gradients to the adapter's; dP is made in the wider.
        u = tolerance.unit_roundoff(dtype if name == "y" else lora_dtype)
        verdict = tolerance.compare(got, ref, eager, u, (R,) if name == "y" else (4 * 33, N))
        assert verdict.ok, f"{name}: {verdict}"


def test_gradcheck():
    layer, x = make(dtype=f64), indices(3, 5)

    def call(A, B):
        return functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    assert torch.autograd.gradcheck(call, (layer.lora_A, layer.lora_B))


def test_fifty_steps_of_sgd_follow_the_formula():
    layer = make()
    exact = [p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B)]
    start = [p.detach().clone() for p in exact]
    ours = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.5)
    theirs = torch.optim.SGD(exact, lr=0.5)
    for step in range(50):
        torch.manual_seed(step)
        x, target = torch.randint(K, (33,)), torch.randn(33, N)
        for optimizer, y in ((ours, layer(x)), (theirs, formula(layer, x, *exact, f64))):
            optimizer.zero_grad()
            (y - target.to(y.dtype)).square().mean().backward()
            optimizer.step()
    for got, want, before in zip((layer.lora_A, layer.lora_B), exact, start, strict=True):
        moved = (want - before).detach()
        error = got.detach().double() - want.detach()
        # 50 roundings of a float32 parameter, each as large as its unit roundoff at most; sums of
        # at most 72 products err by less than 72 · 2⁻²⁴ < 2⁻¹⁷ of their terms, made of four.
        limit = 50 * 2.0**-24 * want.detach().norm() + 2.0**-14 * moved.norm()
        assert moved.norm() > 0.1 and error.norm() <= limit


@pytest.mark.parametrize("padding_idx", [3, -50])
def test_padding_idx(padding_idx):
    """No gradient for that column, which counts all the same."""
    layer, plain, x = make_exact(padding_idx=padding_idx), make_exact(), torch.tensor([3, 5, 3, 7])
    plain.load_state_dict(layer.state_dict())
    assert layer.padding_idx == 3
    y, dA, dB = gradients(layer, x)
    want = gradients(plain, x)
    assert want[1][:, 3].any()
    want[1][:, 3] = 0
    assert_same((y, dA, dB), want)


def test_scale_grad_by_freq():
    layer, plain, x = make_exact(scale_grad_by_freq=True), make_exact(), torch.tensor([3, 5, 3, 3])
    plain.load_state_dict(layer.state_dict())
    y, dA, dB = gradients(layer, x)
    want = gradients(plain, x)
    want[1][:, 3] /= 3
    # A third of each of three terms, or of their sum: three roundings apart.
    torch.testing.assert_close(dA, want[1], rtol=2.0**-22, atol=0)
    assert_same((y, dB), (want[0], want[2]))


@pytest.mark.parametrize("state", ["on", "disabled", "merged"])
@pytest.mark.parametrize("x", [torch.tensor([0, K]), torch.tensor(-1)])
def test_index_out_of_range(x, state):
    layer = make().eval()
    layer.enabled = state != "disabled"
    if state == "merged":
        layer.merge()
    with pytest.raises(IndexError, match="index out of range in self"):
        layer(x)


def test_indices_of_another_dtype():
    with pytest.raises(RuntimeError, match=r"scalar types?: Long, Int"):
        make()(torch.ones(3))


def test_trainable_weight_is_refused():
    layer = make()
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight: got requires_grad=True, want a frozen weight"):
        layer(indices(3))
    with torch.no_grad():
        layer(indices(3))


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_autocast_changes_nothing(dtype):
    """A lookup is none of autocast's operations, and the adapter rides on it."""
    layer, x = make(dtype=dtype), indices(5, 9)
    want = gradients(layer, x)
    with torch.autocast("cpu", bf16):
        y = layer(x)
    layer.zero_grad()
    y.square().sum().backward()
    assert y.dtype is dtype
    assert_same([y.detach(), layer.lora_A.grad, layer.lora_B.grad], want)


class Largest(TorchDispatchMode):
    """The most elements in a result that is no view, and the matrix products."""

    def __init__(self):
        super().__init__()
        self.numel, self.products = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            new = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.numel = max([self.numel, *(t.numel() for t in new)])
        if "mm" in func.name():
            self.products.append(func.name().split("::")[1])
        return out


def test_nothing_of_the_tables_size():
    layer = LoRAEmbedding(4096, 64, 3, 6)
    x = torch.randint(4096, (2, 9))
    with Largest() as forward:
        y = layer(x)
    assert forward.products == ["addmm_"]
    with Largest() as backward:
        y.sum().backward()
    assert max(forward.numel, backward.numel) <= 4096 * 3  # a gradient for lora_A


def test_checkpoint():
    layer, x = make(), indices(5, 9)
    got = gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False))
    assert_same(got, gradients(layer, x))


def test_compile():
    torch._dynamo.reset()
    layer, x = make(), indices(5, 9)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same(gradients(layer, x, compiled), gradients(layer, x))
    layer.eval()
    for change in (layer.merge, layer.unmerge):
        change()
        assert torch.equal(compiled(x), layer(x))
    with torch.autocast("cpu", bf16):
        assert torch.equal(compiled(x), layer(x))


def test_enabled():
    layer, x = make_exact().eval(), indices(5, 2)
    y = layer(x)
    for merged in (False, True):
        layer.enabled = False
        assert torch.equal(layer(x), F.embedding(x, layer.weight))
        layer.enabled = True
        assert torch.equal(layer(x), y)
        if not merged:
            layer.merge()


def test_merge():
    layer, x = make_exact().eval(), indices(5, 2)
    y, base, state = layer(x), layer.weight.clone(), copy.deepcopy(layer.state_dict())
    layer.merge()
    assert layer.merged and layer.merged_weight.shape == (K, N)
    assert torch.equal(layer(x), y) and layer.merged_weight.is_contiguous()
    assert_same(layer.state_dict().values(), state.values())
    other = make_exact().eval()
    layer.load_state_dict(other.state_dict())
    assert layer.merged and torch.equal(layer(x), other(x))
    layer.load_state_dict(state)
    layer.train()
    with pytest.raises(RuntimeError, match="LoRAEmbedding is merged and in training mode"):
        layer(x)
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.weight, base) and torch.equal(layer(x), y)


def test_merge_rounds_once_to_the_base_dtype_whatever_autocast_says():
    layer = make(dtype=bf16)
    update = (layer.lora_B.double() @ layer.lora_A.double()).t()
    want = layer.weight.double() + layer.scaling * update
    with torch.autocast("cpu", bf16):
        layer.merge()
    # One rounding to 8 significand bits, after a float32 sum whose error is 2^15 times smaller.
    error = (layer.merged_weight.double() - want.detach()).abs()
    assert (error <= (2**-8 + 2**-20) * want.abs() + 2**-20).all()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(clone, merged):
    layer, x = make(padding_idx=2).eval(), indices(5, 2)
    if merged:
        layer.merge()
    other = clone(layer)
    y = layer(x)
    assert repr(other) == repr(layer) and torch.equal(other(x), y)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.zero_()
    layer.unmerge()
    assert torch.equal(other(x), y)


def test_saved_and_loaded(tmp_path):
    layer, x = make(dtype=bf16), indices(5, 2)
    assert list(layer.state_dict()) == ["weight", "lora_A", "lora_B"]
    assert list(layer.state_dict()) == list(LoRALinear(K, N).state_dict())
    assert list(lora_state_dict(layer)) == ["lora_A", "lora_B"]
    fresh = LoRAEmbedding(K, N, R, ALPHA, dtype=bf16)
    fresh.weight = layer.weight
    save_lora_weights(layer, tmp_path / "adapter.safetensors")
    load_lora_weights(fresh, tmp_path / "adapter.safetensors")
    assert_same(fresh.state_dict().values(), layer.state_dict().values())
    assert torch.equal(fresh(x), layer(x))


def test_training_helpers():
    model = nn.ModuleDict({"tokens": make(), "head": nn.Linear(N, K)})
    mark_only_lora_as_trainable(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == ["tokens.lora_A", "tokens.lora_B"]
    slow, fast = lora_plus_parameter_groups(model, lr=1.0, ratio=4.0)
    assert slow["params"] == [model["tokens"].lora_A] and fast["params"] == [model["tokens"].lora_B]


def test_explain():
    model = nn.ModuleDict({"a": make(), "b": make().eval(), "c": make()})
    model["b"].merge()
    model["c"].enabled = False
    a, b, c = explain(model).rows
    assert a == Row(
        "a", "not fused", "torch", "lookups, then one product in place",
        "an embedding: its base is a lookup, no product to fuse the adapter's with",
    )  # fmt: skip
    assert b == Row("b", "not fused", "torch", "F.embedding", "the adapter is merged")
    assert c == Row("c", "not fused", "torch", "F.embedding", "the adapter is disabled")


# Over an embedding that is there


def test_from_embedding_shares_the_base():
    base = nn.Embedding(K, N, padding_idx=3, scale_grad_by_freq=True, dtype=bf16).eval()
    layer = LoRAEmbedding.from_embedding(base, r=3, alpha=6, scaling="rslora")
    assert layer.weight is base.weight and not base.weight.requires_grad and not layer.training
    assert layer.lora_A.shape == (3, K) and layer.lora_B.shape == (N, 3)
    assert layer.lora_A.dtype is layer.lora_B.dtype is f32 and layer.scaling == 6 / math.sqrt(3)
    assert layer.padding_idx == 3 and layer.scale_grad_by_freq
    assert not layer.lora_A.any() and layer.lora_B.all()
    assert layer.lora_A.requires_grad and layer.lora_B.requires_grad
    x = indices(5, 2)
    assert torch.equal(layer(x), base(x))


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


def test_meta():
    layer = LoRAEmbedding.from_embedding(nn.Embedding(K, N, device="meta"), r=3)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(5, 2, dtype=torch.int64, device="meta")).shape == (5, 2, N)
    layer = LoRAEmbedding(K, N, padding_idx=1, device="meta").to_empty(device="cpu")
    for param in layer.parameters():
        nn.init.constant_(param, math.nan)
    layer.reset_parameters()
    assert not layer.weight[1].any() and not layer.lora_A.any() and layer.lora_B.isfinite().all()


def test_init():
    calls = []
    init = lambda B: calls.append(B.fill_(7))  # noqa: E731
    layer = LoRAEmbedding.from_embedding(nn.Embedding(K, N), init=init)
    assert len(calls) == 1 and (layer.lora_B == 7).all() and not layer.lora_A.any()


def test_repr():
    layer = make(padding_idx=3)
    text = f"LoRAEmbedding({K}, {N}, r=5, alpha=7, padding_idx=3"
    assert repr(layer) == text + ")"
    layer.merge()
    layer.enabled = False
    assert repr(layer) == text + ", merged, disabled)"


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"num_embeddings": 0}, ValueError, r"num_embeddings: got 0, want at least 1"),
        ({"embedding_dim": 2.0}, TypeError, r"embedding_dim: got 2\.0, want an int"),
        ({"r": 0}, ValueError, r"r: got 0, want at least 1"),
        ({"alpha": math.nan}, ValueError, r"alpha: got nan, want a finite number"),
        ({"padding_idx": 53}, ValueError, r"padding_idx: got 53, want an index of 53 embeddings"),
        ({"padding_idx": -54}, ValueError, r"padding_idx: got -54, want an index of 53"),
        ({"init": "kaiming"}, TypeError, r"init: got 'kaiming', want a callable that fills lora_B"),
        ({"dtype": torch.int64}, TypeError, r"dtype: got torch\.int64, want a floating dtype"),
        ({"scaling": "x"}, ValueError, r"scaling: got 'x', want 'lora' or 'rslora'"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=f"^{message}"):
        LoRAEmbedding(**{"num_embeddings": K, "embedding_dim": N, **kwargs})


class Scaled(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    embedding = nn.Embedding(K, N)
    embedding.register_forward_hook(lambda *args: None)
    return embedding


@pytest.mark.parametrize(
    ("embedding", "error", "message"),
    [
        (lambda: nn.Linear(4, 4), TypeError, "got Linear, want exactly torch.nn.Embedding"),
        (lambda: Scaled(K, N), TypeError, "got Scaled, want exactly torch.nn.Embedding"),
        (hooked, TypeError, "got one with hooks or a patched forward"),
        (
            lambda: nn.Embedding(K, N, max_norm=1.5),
            ValueError,
            "got max_norm=1.5, want None: looking rows up would renormalize the frozen weight",
        ),
    ],
)
def test_from_embedding_refuses(embedding, error, message):
    embedding = embedding()
    with pytest.raises(error, match=f"^embedding: {message}"):
        LoRAEmbedding.from_embedding(embedding)
    assert embedding.weight.requires_grad
    with pytest.raises(TypeError, match=r"linear: want an nn\.Embedding"):
        LoRAEmbedding.from_linear(nn.Linear(4, 4))
