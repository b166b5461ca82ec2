"""Layers of experts against a loop over tokens in float64; 4-bit stacks in bitsandbytes' format."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.layers import (
    Experts,
    LoRAExperts,
    QLoRAExperts,
    adaptable_experts,
    quantize_experts,
)
from lora_kernels.layers.experts import (
    ExpertsAdapter,
    experts_forward,
    has_quantized_experts,
    stack,
    unsupported_reason,
)
from lora_kernels.quantization import QuantizedWeight, quantize_4bit
from lora_kernels.quantization.tensor import QuantizedTensor
from tests.support.assertions import assert_as_exact, assert_close_derived

T, E, H, INNER, R, K = 9, 4, 24, 20, 3, 2
KINDS: dict[str, dict[str, Any]] = {
    "gated": {},
    "plain": {"has_gate": False, "activation": torch.tanh},
    "bias": {"bias": True},
    "transposed": {"is_transposed": True, "bias": True},
}


def make(r: int = R, **options: Any) -> LoRAExperts:
    torch.manual_seed(0)
    experts = Experts(E, H, INNER, **options)
    with torch.no_grad():
        for name, p in experts.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    layer = LoRAExperts(experts, r=r, alpha=5.0)
    with torch.no_grad():
        for lora_B in layer.lora_B.values():
            lora_B.normal_(std=0.3)
    return layer


def routed(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts and weights; no token chooses the last but one."""
    torch.manual_seed(seed)
    x = torch.randn(T, H)
    scores = torch.rand(T, E)
    scores[:, E - 2] = -1.0
    weights, index = scores.topk(K)
    return x, index, weights


def loop(layer: LoRAExperts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The definition, a token and an expert at a time."""
    experts: Any = layer.experts
    names = list(layer.lora_A)

    def project(name: str, e: int, row: Tensor) -> Tensor:
        W = getattr(experts, name)[e]
        W = W.T if experts.is_transposed else W
        y = W @ row + layer.scaling * (layer.lora_B[name][e] @ (layer.lora_A[name][e] @ row))
        return y + getattr(experts, f"{name}_bias")[e] if experts.has_bias else y

    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[t])
        for e, weight in zip(index[t].tolist(), weights[t], strict=True):
            if e >= experts.num_experts:
                continue
            h = project(names[0], e, x[t])
            if experts.has_gate:
                gate, up = h.chunk(2)
                h = experts.act_fn(gate) * up
            else:
                h = experts.act_fn(h)
            total = total + weight * project(names[1], e, h)
        rows.append(total)
    return torch.stack(rows)


def results(call: Any, layer: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """y and the gradients of x, of the routing weights and of every adapter."""
    x, index, weights = inputs
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    layer.zero_grad()
    y = call(x, index, weights)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    found = {"y": y.detach(), "x": x.grad, "weights": weights.grad}
    trained = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    return {name: t for name, t in (found | trained).items() if t is not None}


def assert_matches_the_loop(layer: LoRAExperts, *inputs: Tensor) -> None:
    assert_as_exact(results(layer, layer, *inputs), *by_loop(layer, *inputs))


def by_loop(layer: LoRAExperts, *inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The loop's results in float64, and in the layer's dtype."""
    x, index, weights = inputs
    wide = copy.deepcopy(layer).double()
    ref = results(lambda *args: loop(wide, *args), wide, x.double(), index, weights.double())
    return ref, results(lambda *args: loop(layer, *args), layer, *inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_experts_equals_a_loop_over_tokens(kind: str) -> None:
    assert_matches_the_loop(make(**KINDS[kind]), *routed())


def test_lora_experts_skips_experts_of_other_devices() -> None:
    """Numbers of E and more: no contribution, no gradient, whatever their weight is."""
    x, index, weights = routed()
    index[2, 1] = E + 3
    index[5] = E
    weights[5] = torch.inf
    layer = make(bias=True)
    assert_matches_the_loop(layer, x, index, weights)
    got = results(layer, layer, x, index, weights)
    assert not got["y"][5].any() and not got["x"][5].any() and not got["weights"][5].any()


@pytest.mark.parametrize("flag", [None, True, False])  # transformers' of expert parallelism
def test_lora_experts_on_a_gpu_s_path_skip_experts_of_other_devices(flag: bool | None) -> None:
    """Uninitialized rows are NaN. A module without expert parallelism has no such rows."""
    x, index, weights = routed()
    layer = make(r=4, bias=True)
    if flag is not None:
        cast(Any, layer.experts)._is_expert_parallel = flag
    if flag is not False:
        index[5], weights[5] = E, torch.inf
    torch.use_deterministic_algorithms(True)
    try:
        with as_on_gpu(), lora_kernels.backend("eager"):
            got = results(layer, layer, x, index, weights)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_as_exact(got, *by_loop(layer, x, index, weights))


def test_lora_experts_without_tokens_returns_none_and_zero_gradients() -> None:
    x, index, weights = routed()
    layer = make()
    got = results(layer, layer, x[:0], index[:0], weights[:0])
    assert got["y"].shape == (0, H)
    assert all(not t.any() for name, t in got.items() if "lora" in name)


def test_lora_experts_starts_as_its_base() -> None:
    layer = LoRAExperts(Experts(E, H, INNER).requires_grad_(True), r=R)
    x, index, weights = routed()
    assert_close_derived(layer(x, index, weights), layer.experts(x, index, weights))
    assert not any(p.requires_grad for p in layer.experts.parameters())
    assert all(p.requires_grad for p in layer.lora_A.parameters())


@pytest.mark.parametrize("has_gate", [True, False])
def test_experts_have_the_dtype_and_the_deviation_of_their_inputs(has_gate: bool) -> None:
    torch.manual_seed(0)
    experts = Experts(8, 256, 64, has_gate=has_gate, bias=True, dtype=torch.bfloat16)
    assert {p.dtype for p in experts.parameters()} == {torch.bfloat16}
    up = "gate_up_proj" if has_gate else "up_proj"
    for name, inner in ((up, 256), ("down_proj", 64)):  # 131072 draws at least, to 5 %
        assert abs(experts.get_parameter(name).float().std() * inner**0.5 - 1) < 0.05
    on_meta = Experts(8, 256, 64, has_gate=has_gate, bias=True, device="meta")
    assert all(p.is_meta for p in on_meta.parameters())


def test_lora_experts_over_16_bits_are_float32_and_drawn_as_linears_are() -> None:
    layer = LoRAExperts(Experts(E, H, INNER, dtype=torch.bfloat16), r=16)
    for name, inner in (("gate_up_proj", H), ("down_proj", INNER)):
        assert layer.lora_A[name].dtype is layer.lora_B[name].dtype is torch.float32
        bound = inner**-0.5  # of some 1280 draws
        assert 0.98 * bound < layer.lora_A[name].abs().max() <= bound
        nn.init.ones_(layer.lora_B[name])
    layer.reset_lora_parameters()
    assert not any(lora_B.any() for lora_B in layer.lora_B.values())
    meta = LoRAExperts(Experts(E, H, INNER, device="meta"), r=R)
    assert all(p.is_meta for p in meta.parameters())
    x, index, weights = routed()  # whose weights are float32
    assert layer(x.bfloat16(), index, weights).dtype is torch.bfloat16
    layer = make()
    want = layer(x, index, weights)
    with torch.autocast("cpu", torch.bfloat16):  # which would copy all weights
        assert torch.equal(layer(x, index, weights), want)


def test_lora_experts_compute_in_the_dtype_of_their_weights() -> None:
    """transformers' grouped_mm does so too; the result has x's dtype."""
    layer = LoRAExperts(Experts(E, H, INNER, dtype=torch.bfloat16), r=R)
    x, index, weights = routed()
    y = layer(x, index, weights)
    assert y.dtype is torch.float32
    assert torch.equal(y.bfloat16(), layer(x.bfloat16(), index, weights))


def test_lora_experts_in_16_bits_do_not_round_float32_routing_weights() -> None:
    """Each token's only expert: y is its result times the weight, rounded once."""
    layer = LoRAExperts(Experts(E, H, INNER, dtype=torch.bfloat16), r=R)
    x, index, _ = routed()
    x, index, weights = x.bfloat16(), index[:, :1], 1 + torch.rand(T, 1)
    of_experts = layer(x, index, torch.ones(T, 1)).float()
    y = layer(x, index, weights)
    assert torch.equal(y, (of_experts * weights).bfloat16())
    assert not torch.equal(y, (of_experts * weights.bfloat16().float()).bfloat16())


def test_qlora_experts_have_every_argument() -> None:
    layer = QLoRAExperts(
        Experts(E, 64, 128), 3, 5.0, 0.25, quant_type="fp4", blocksize=128, double_quant=False
    )
    assert (layer.r, layer.alpha, layer.scaling, layer.dropout) == (3, 5.0, 5 / 3, 0.25)
    weight = stack(layer.experts, "down_proj")
    assert isinstance(weight, QuantizedWeight)
    assert (weight.quant_type, weight.blocksize, weight.nested) == ("fp4", 128, False)
    quantize_experts(layer)  # which are quantized already
    assert stack(layer.experts, "down_proj") is weight


def test_adaptable_experts_of_a_model_take_no_memory() -> None:
    """Each of them, wherever it is; the model counts as quantized before and after."""
    model = nn.ModuleList([nn.ModuleList([Experts(E, 64, 128)]), Experts(E, 64, 128)])
    assert not has_quantized_experts(model)
    quantize_experts(model)
    assert has_quantized_experts(model)
    with adaptable_experts(model):
        weights = list(model.parameters())
        assert [p.shape for p in weights] == [(E, 256, 64), (E, 64, 128)] * 2
        assert all(p.untyped_storage().nbytes() == 4 and not p.requires_grad for p in weights)
    assert has_quantized_experts(model)


def test_adaptable_experts_are_quantized_again_after_an_error() -> None:
    experts = quantize_experts(Experts(E, 64, 128, dtype=torch.bfloat16))
    cls, names = type(experts), list(experts.state_dict())
    with pytest.raises(KeyError), adaptable_experts(experts):
        assert experts.down_proj.dtype is torch.bfloat16
        raise KeyError
    assert type(experts) is cls and list(experts.state_dict()) == names
    assert isinstance(stack(experts, "down_proj"), QuantizedWeight)


def test_lora_experts_drops_in_training_alone() -> None:
    layer, inputs = make(), routed()
    layer.dropout = 0.5
    want = layer.eval()(*inputs)
    assert torch.equal(layer(*inputs), want)
    layer.train()
    torch.manual_seed(1)
    first = layer(*inputs)
    torch.manual_seed(1)
    assert torch.equal(layer(*inputs), first) and not torch.equal(first, want)


def test_lora_experts_norms_after_the_last_projection() -> None:
    """The norm comes before the routing weights, as in transformers."""
    layer, (x, index, weights) = make(), routed()
    experts: Any = layer.experts
    before = experts(x, index, torch.ones_like(weights))
    experts.has_post_expert_norm, experts.post_expert_norm = True, lambda t: 3 * t
    torch.testing.assert_close(experts(x, index, torch.ones_like(weights)), 3 * before)


def test_lora_experts_compiled_whole_equals_itself() -> None:
    layer, inputs = make(), routed()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_as_exact(results(compiled, layer, *inputs), *by_loop(layer, *inputs))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_quantize_experts_has_the_bits_of_quantize_4bit(
    double_quant: bool, quant_type: str
) -> None:
    experts = Experts(E, 64, 32)
    want = {
        name: quantize_4bit(getattr(experts, name), quant_type, 64, double_quant)
        for name in ("gate_up_proj", "down_proj")
    }
    quantize_experts(experts, quant_type, 64, double_quant)
    for name, weight in want.items():
        got = stack(experts, name)
        assert isinstance(got, QuantizedWeight) and got.shape == weight.shape
        for field in ("packed", "absmax", "code", "nested_absmax", "nested_code", "offset"):
            a, b = getattr(got, field), getattr(weight, field)
            assert (a is None) == (b is None)
            if double_quant and field == "absmax":  # bitsandbytes' CPU kernel rounds ties its way
                assert (a.int() - b.int()).abs().max() <= 1
            else:
                assert a is None or torch.equal(a.flatten(), b.flatten())


def test_quantized_experts_save_as_bitsandbytes_does() -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    experts = Experts(E, 64, 32)
    other = copy.deepcopy(experts)
    quantize_experts(experts, double_quant=True)
    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(other, name, compress_statistics=True, blocksize=64)
    got, want = experts.state_dict(), other.state_dict()
    assert got.keys() == want.keys() and "down_proj.absmax" in got
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_qlora_experts_are_lora_experts_over_the_decoded_base() -> None:
    torch.manual_seed(0)
    base = Experts(E, 64, 32)
    layer = QLoRAExperts(copy.deepcopy(base), r=R, alpha=5.0)
    dense = LoRAExperts(base, r=R, alpha=5.0)
    with torch.no_grad():
        for name in layer.lora_A:
            weight = stack(layer.experts, name)
            assert isinstance(weight, QuantizedWeight)
            getattr(base, name).copy_(weight.dequantize())
            dense.lora_A[name].copy_(layer.lora_A[name])
            dense.lora_B[name].copy_(layer.lora_B[name].normal_(std=0.3))
    x, index, weights = torch.randn(T, 64), *routed()[1:]
    assert_as_exact(results(layer, layer, x, index, weights), *by_loop(dense, x, index, weights))


def test_lora_experts_of_bad_input_names_the_argument() -> None:
    experts = Experts(E, H, INNER)
    for options, message in (
        ({"r": 0}, "r: got 0, want an integer of at least 1"),
        ({"r": True}, "r: got True, want an integer"),
        ({"dropout": 1.5}, "dropout: got 1.5, want a probability"),
        ({"dropout": -0.5}, "dropout: got -0.5, want a probability"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRAExperts(experts, **options)
    assert LoRAExperts(experts, dropout=1.0).dropout == 1.0
    with pytest.raises(TypeError, match="experts: got Linear without `num_experts`"):
        LoRAExperts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: got Linear without experts modules"):
        quantize_experts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="quant_type: got 'mxfp4', want 'nf4' or 'fp4'"):
        quantize_experts(experts, "mxfp4")
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    twice = quantize_experts(Experts(E, 64, 128))
    nn.utils.parametrize.register_parametrization(twice, "down_proj", nn.Identity(), unsafe=True)
    for module in (experts, twice):
        reason = unsupported_reason(module) or ""
        assert "without a plain or 4-bit parameter down_proj" in reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": math.nan}, "alpha: got nan, want a finite number"),
        ({"alpha": "16"}, "alpha: got '16', want a number"),
        ({"dropout": 1.5}, "dropout: got 1.5, want a probability"),
        ({"dropout": "0.1"}, "dropout: got '0.1', want a number"),
    ],
)
def test_experts_of_a_wrong_number_name_the_argument(options: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        LoRAExperts(Experts(E, H, INNER), **options)


BAD_ROUTES = {
    "negative": ("top_k_index", lambda t: t - 1, "top_k_index: got -1, want 0 to 3, or more"),
    "floats": ("top_k_index", torch.Tensor.float, "top_k_index: got torch.float32, want int64"),
    "bools": ("top_k_index", torch.Tensor.bool, "top_k_index: got torch.bool, want int64"),
    "rows": ("top_k_index", lambda t: t[1:], r"top_k_index: got shape \[8, 2\], want \[9, k\]"),
    "flat": ("top_k_index", lambda t: t[:, 0], r"top_k_index: got shape \[9\], want \[9, k\]"),
    "weights": (
        "top_k_weights",
        lambda t: t[:, :1],
        r"top_k_weights: got shape \[9, 1\], want top_k_index's \[9, 2\]",
    ),
}


@pytest.mark.parametrize("name", BAD_ROUTES)
def test_experts_forward_of_bad_routes_names_the_argument(name: str) -> None:
    argument, change, message = BAD_ROUTES[name]
    args = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), routed(), strict=True))
    args[argument] = change(args[argument])
    for layer in (make(), make().experts):
        with pytest.raises((TypeError, ValueError), match=message):
            layer(**args)


def test_experts_forward_of_a_negative_index_beside_tenants_names_the_index() -> None:
    layer, (x, index, weights) = make(), routed()
    adapter = {name: ExpertsAdapter(A, layer.lora_B[name], 1.0) for name, A in layer.lora_A.items()}
    adapters = {name: [each] * 3 for name, each in adapter.items()}
    index[4, 1] = -2
    for tenant in range(3):
        tenants = torch.full((T,), tenant)
        with pytest.raises(ValueError, match="top_k_index: got -2, want 0 to 3, or more"):
            experts_forward(layer.experts, x, index, weights, adapters, tenants)


def test_experts_forward_reads_no_index_of_another_device() -> None:
    """Reading a value would synchronize a GPU; a meta tensor has none to read."""
    layer = LoRAExperts(Experts(E, H, INNER, device="meta"), r=R)
    y = layer(*(t.to("meta") for t in routed()))
    assert y.shape == (T, H) and y.is_meta


@pytest.mark.parametrize("is_packed_transposed", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("quant_type", ["mxfp4", "nvfp4"])
def test_experts_in_tensor4bit_are_those_decoded(
    quant_type: str, is_transposed: bool, is_packed_transposed: bool
) -> None:
    """Square weights, whose transpose has the same shape."""
    torch.manual_seed(0)
    packed = LoRAExperts(Experts(E, 32, 32, has_gate=False, is_transposed=is_transposed), r=R)
    for lora_B in packed.lora_B.values():
        nn.init.normal_(lora_B, std=0.3)
    decoded = copy.deepcopy(packed)
    for name in packed.lora_A:
        weight = packed.experts.get_parameter(name).detach()
        weight = (weight.mT if is_packed_transposed else weight).contiguous()
        held = QuantizedTensor(quantize_4bit(weight, quant_type), is_packed_transposed)
        packed.experts._parameters[name] = nn.Parameter(held, requires_grad=False)
        dense = nn.Parameter(held.dequantize(), requires_grad=False)
        decoded.experts._parameters[name] = dense
    x, index, weights = torch.randn(T, 32), torch.randint(E, (T, K)), torch.rand(T, K)
    assert_close_derived(packed(x, index, weights), decoded(x, index, weights), layers=2)
