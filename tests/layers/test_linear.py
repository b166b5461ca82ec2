"""LoRALinear's wiring. Its arithmetic is `lora_linear`'s, so results are compared bit for bit."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_linear
from lora_kernels.layers import LoRALinear


def make_layer(K=12, N=10, r=3, alpha=6, **kwargs):
    """Integer-valued parameters and a scaling of 2: any order of summation gives the same bits."""
    layer = LoRALinear(K, N, r, alpha, **kwargs)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randint(-4, 5, param.shape))
    return layer


def integers(*shape):
    return torch.randint(-4, 5, shape).float()


def gradients(layer, x, run):
    """y and the gradients of x and of all trainable parameters, from the same random state."""
    torch.manual_seed(1)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_starts_as_its_base():
    torch.manual_seed(0)
    linear = nn.Linear(12, 10)
    torch.manual_seed(0)
    layer = LoRALinear(12, 10, r=3, bias=True)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    assert torch.count_nonzero(layer.lora_B) == 0 and torch.count_nonzero(layer.lora_A) == 36
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (0, 12), (5, 12), (2, 0, 12), (2, 3, 1, 12)])
def test_forward(shape, bias):
    layer, x = make_layer(bias=bias), integers(*shape)
    y = layer(x)
    want = F.linear(x, layer.weight + 2 * layer.lora_B @ layer.lora_A, layer.bias)
    assert y.shape == (*shape[:-1], 10)
    assert torch.equal(y, want)


def test_strided_x():
    layer, x = make_layer(), integers(4, 12, 6)
    assert torch.equal(layer(x.mT), layer(x.mT.contiguous()))


def test_trainable_bias():
    layer, x = make_layer(bias=True), integers(5, 12)
    layer(x).sum().backward()
    assert layer.bias.grad is None and layer.weight.grad is None
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((10,), 5.0))


def test_trainable_weight_is_refused():
    layer = make_layer()
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight: got requires_grad=True"):
        layer(integers(2, 12))


def test_dropout_in_training_only():
    layer, x = make_layer(dropout=0.5), integers(7, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    want = lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, 2.0)
    assert torch.equal(layer(x), want) and torch.equal(layer(x), want)


class Masks(nn.Module):
    """Two layers whose outputs are their dropout masks of ones."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (LoRALinear(16, 16, r=16, alpha=16, dropout=0.5) for _ in range(2))
        for layer in (self.a, self.b):
            nn.init.zeros_(layer.weight)
            nn.init.eye_(layer.lora_A)
            nn.init.eye_(layer.lora_B)

    def forward(self, x):
        return self.a(x), self.b(x)


@pytest.mark.parametrize("mode", ["eager", "aot_eager", "inductor"])
def test_masks_differ_between_calls_and_layers(mode):
    model, x = Masks(), torch.ones(8, 16)
    run = model if mode == "eager" else torch.compile(model, fullgraph=True, backend=mode)
    masks = [*run(x), *run(x)]
    for i, mask in enumerate(masks):
        assert mask.unique().tolist() == [0, 2]
        # 128 fair coins agree throughout with probability 2^-128.
        assert not any(torch.equal(mask, other) for other in masks[:i])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpoint_gives_the_same_gradients(dropout, use_reentrant):
    layer, x = make_layer(bias=True, dropout=dropout), torch.randn(33, 12)
    layer.bias.requires_grad_()
    want = gradients(layer, x, layer)
    got = gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    assert_same(got, want)


def test_enabled():
    layer, x = make_layer(bias=True, dropout=0.5), integers(5, 12)
    layer.enabled = False
    want = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), want)
    layer.merge()
    assert torch.equal(layer(x), want)
    layer.unmerge()
    layer.enabled = True
    layer.eval()
    assert not torch.equal(layer(x), want)


@pytest.mark.parametrize("bias", [False, True])
def test_merge(bias):
    layer, x = make_layer(bias=bias, dropout=0.5).eval(), integers(5, 12)
    y, base, state = layer(x), layer.weight.clone(), copy.deepcopy(layer.state_dict())
    layer.merge()
    assert layer.merged
    assert torch.equal(layer(x), y)
    assert layer.state_dict().keys() == state.keys()
    assert_same(layer.state_dict().values(), state.values())
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.weight, base) and torch.equal(layer(x), y)


def test_merge_rounds_once_to_the_base_dtype_whatever_autocast_says():
    layer = make_layer(dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_A)
    want = (layer.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        layer.merge()
    # One rounding to 8 significand bits, after a float32 sum whose error is 2^15 times smaller.
    error = (layer.merged_weight.double() - want).abs()
    assert (error <= (2**-8 + 2**-20) * want.abs() + 2**-20).all()


def test_merge_again_follows_the_adapter():
    layer, x = make_layer().eval(), integers(5, 12)
    layer.merge()
    with torch.no_grad():
        layer.lora_B.neg_()
    layer.merge()
    y = layer(x)
    layer.unmerge()
    assert torch.equal(layer(x), y)


def test_loading_into_a_merged_layer_merges_afresh():
    layer, other, x = make_layer().eval(), make_layer().eval(), integers(5, 12)
    layer.merge()
    layer.load_state_dict(other.state_dict())
    assert layer.merged and torch.equal(layer(x), other(x))


def test_merged_layer_refuses_to_train():
    layer, x = make_layer(), integers(5, 12)
    layer.merge()
    with pytest.raises(RuntimeError, match=r"merged and in training mode.*unmerge\(\)"):
        layer(x)
    with torch.no_grad():
        layer(x)
    layer.requires_grad_(False)
    layer(x)


def test_merged_layer_moves_with_its_module():
    layer = make_layer().eval()
    layer.merge()
    layer.to(torch.float64)
    x = integers(5, 12).double()
    y = layer(x)
    layer.unmerge()
    assert y.dtype is torch.float64 and torch.equal(layer(x), y)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(clone, merged):
    layer, x = make_layer(bias=True, dropout=0.25).eval(), integers(5, 12)
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


def test_to_dtype():
    layer = make_layer(bias=True).to(torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(integers(5, 12).bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "lora_dtype", "want"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_adapter_dtype(dtype, lora_dtype, want):
    layer = make_layer(bias=True, dtype=dtype, lora_dtype=lora_dtype)
    assert layer.weight.dtype is layer.bias.dtype is dtype
    assert layer.lora_A.dtype is layer.lora_B.dtype is want
    y = layer(integers(5, 12).to(dtype))
    y.sum().backward()
    assert y.dtype is dtype and layer.lora_A.grad.dtype is layer.lora_B.grad.dtype is want


@pytest.mark.parametrize("mode", ["on", "disabled", "merged"])
def test_autocast_dtype(mode):
    layer, x = make_layer(bias=True).eval(), integers(5, 12)
    layer.enabled = mode != "disabled"
    if mode == "merged":
        layer.merge()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert layer(x).dtype is torch.float32


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients(guard):
    layer, x = make_layer(dropout=0.5), integers(5, 12)
    torch.manual_seed(0)
    want = layer(x)
    torch.manual_seed(0)
    with guard():
        y = layer(x)
    assert not y.requires_grad and torch.equal(y, want)


def test_functional_call():
    layer, other, x = make_layer(bias=True), make_layer(bias=True), integers(5, 12)
    params = {name: p.detach().clone() for name, p in other.named_parameters()}
    params["lora_A"].requires_grad_()
    y = torch.func.functional_call(layer, params, x)
    assert torch.equal(y, other(x))
    y.sum().backward()
    other(x).sum().backward()
    assert torch.equal(params["lora_A"].grad, other.lora_A.grad) and layer.lora_A.grad is None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compile(dropout):
    torch._dynamo.reset()
    layer, x = make_layer(bias=True, dropout=dropout), integers(5, 12)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    got = gradients(layer, x, compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        gradients(layer, integers(9, 12), compiled)
    if not dropout:
        assert_same(got, gradients(layer, x, layer))
    layer.eval()
    for change in ("eval", "merge", "unmerge"):
        if change != "eval":
            getattr(layer, change)()
        assert torch.equal(compiled(x), layer(x))
    layer.enabled = False
    assert torch.equal(compiled(x), F.linear(x, layer.weight, layer.bias))


def test_from_linear_shares_the_base():
    linear = nn.Linear(12, 10, dtype=torch.bfloat16).eval()
    layer = LoRALinear.from_linear(linear, r=3, alpha=6, dropout=0.5)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not linear.weight.requires_grad and not linear.bias.requires_grad
    assert not layer.training and layer.lora_A.requires_grad and layer.lora_B.requires_grad
    assert layer.lora_A.dtype is torch.float32 and layer.scaling == 2
    assert torch.count_nonzero(layer.lora_A) == 36 and torch.count_nonzero(layer.lora_B) == 0
    linear = nn.Linear(12, 10, bias=False)
    layer, x = LoRALinear.from_linear(linear), torch.randn(5, 12)
    assert layer.bias is None
    torch.testing.assert_close(layer(x), linear(x))


def test_from_linear_on_meta():
    layer = LoRALinear.from_linear(nn.Linear(12, 10, device="meta"), r=3)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(5, 12, device="meta")).shape == (5, 10)


def test_meta_then_reset():
    layer = LoRALinear(12, 10, bias=True, device="meta").to_empty(device="cpu")
    for param in layer.parameters():
        nn.init.constant_(param, math.nan)
    layer.reset_parameters()
    for param in (layer.weight, layer.bias, layer.lora_A):
        assert 0 < param.abs().max() <= 12**-0.5
    assert torch.count_nonzero(layer.lora_B) == 0


def test_init():
    # 1/r = 0.25; the deviation of n = 40,000 normals is known to 1/sqrt(2n) = 0.35 %.
    gaussian = LoRALinear(10_000, 2, r=4, init="gaussian").lora_A
    assert abs(gaussian.std().item() / 0.25 - 1) < 5 * 0.0036
    calls = []
    layer = LoRALinear.from_linear(nn.Linear(12, 10), init=lambda A: calls.append(A.fill_(7)))
    assert len(calls) == 1 and (layer.lora_A == 7).all() and layer.lora_A.requires_grad


def test_repr():
    layer = LoRALinear(12, 10, r=3, alpha=6, dropout=0.1)
    text = "LoRALinear(in_features=12, out_features=10, bias=False, r=3, alpha=6, dropout=0.1"
    assert repr(layer) == text + ")"
    layer.merge()
    layer.enabled = False
    assert repr(layer) == text + ", merged, disabled)"


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"r": 0}, ValueError, r"r: got 0, want at least 1"),
        ({"r": 4.0}, TypeError, r"r: got 4\.0, want an int"),
        ({"in_features": 0}, ValueError, r"in_features: got 0, want at least 1"),
        ({"out_features": -1}, ValueError, r"out_features: got -1, want at least 1"),
        ({"alpha": math.inf}, ValueError, r"alpha: got inf, want a finite number"),
        ({"alpha": math.nan}, ValueError, r"alpha: got nan, want a finite number"),
        ({"alpha": "16"}, TypeError, r"alpha: got '16', want a number"),
        ({"dropout": math.nan}, ValueError, r"dropout: got nan, want a probability in \[0, 1\]"),
        ({"dropout": 1.5}, ValueError, r"dropout: got 1\.5, want a probability in \[0, 1\]"),
        ({"dropout": -0.1}, ValueError, r"dropout: got -0\.1, want a probability"),
        ({"dropout": None}, TypeError, r"dropout: got None, want a number"),
        (
            {"init": "kaming"},
            ValueError,
            r"init: got 'kaming', want one of 'kaiming', ",
        ),
        ({"dtype": torch.int64}, TypeError, r"dtype: got torch\.int64, want a floating dtype"),
        ({"lora_dtype": torch.int8}, TypeError, r"lora_dtype: got torch\.int8, want a floating"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=f"^{message}"):
        LoRALinear(**{"in_features": 12, "out_features": 10, **kwargs})


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(register):
    linear = nn.Linear(12, 10)
    getattr(linear, register)(lambda *args: None)
    return linear


def patched():
    linear = nn.Linear(12, 10)
    linear.forward = lambda x: x
    return linear


def parametrized():
    return nn.utils.parametrizations.weight_norm(nn.Linear(12, 10))


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        (lambda: nn.Conv1d(12, 10, 1), "linear: got Conv1d, want exactly torch.nn.Linear"),
        (lambda: LoRALinear(12, 10), "linear: got LoRALinear, want exactly"),
        (lambda: Doubled(12, 10), "linear: got Doubled, want exactly"),
        (parametrized, "linear: got ParametrizedLinear, want exactly"),
        (patched, "linear: got one with hooks or a patched forward, want a stock one"),
        (lambda: hooked("register_forward_hook"), "linear: got one with hooks"),
        (lambda: hooked("register_forward_pre_hook"), "linear: got one with hooks"),
        (lambda: hooked("register_full_backward_hook"), "linear: got one with hooks"),
        (lambda: hooked("register_full_backward_pre_hook"), "linear: got one with hooks"),
    ],
)
def test_from_linear_refuses(linear, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        LoRALinear.from_linear(linear())


def test_from_linear_checks_its_arguments_before_freezing():
    linear = nn.Linear(12, 10)
    with pytest.raises(ValueError, match="r: got 0"):
        LoRALinear.from_linear(linear, r=0)
    assert linear.weight.requires_grad
