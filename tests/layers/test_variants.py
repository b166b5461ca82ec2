"""Each variant against its formula in plain PyTorch: gradients and training; starts, ranks, norms.

Properties of every layer are in test_every_layer.py.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from lora_kernels import layers, reference
from lora_kernels.layers import (
    AdaLoRALinear,
    DoRALinear,
    HierarchicalLoRALinear,
    LoRALinear,
    LoRAPlusLinear,
    StableLoRALinear,
    lora_plus_parameter_groups,
    mark_only_lora_as_trainable,
)
from lora_kernels.layers.layer import _FORMER_NAMES
from lora_kernels.oracle import tolerance
from tests.support.assertions import assert_close_derived, derived_rtol
from tests.support.models import (
    CLOSE,
    VARIANTS,
    K,
    M,
    N,
    adapter,
    check,
    every_variant,
    formula,
    make,
)
from tests.support.peft_models import count_ops

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16


@every_variant
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_y_and_every_gradient_follow_the_formula(name: str, dtype: torch.dtype) -> None:
    check(name, dtype)


@every_variant
def test_fifty_steps_of_sgd_follow_the_formula(name: str) -> None:
    layer = make(name)
    call, params = formula(name, layer, f64), adapter(layer, f64)
    start = {key: p.detach().clone() for key, p in params.items()}
    mark_only_lora_as_trainable(layer)
    ours = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    theirs = torch.optim.SGD(params.values(), lr=0.02)
    for step in range(50):
        torch.manual_seed(step)
        x, target = torch.randn(M, K), torch.randn(M, N)
        for optimizer, y in ((ours, layer(x)), (theirs, call(params, x.double()))):
            optimizer.zero_grad()
            (y - target.to(y.dtype)).square().mean().backward()
            optimizer.step()
    for key, param in params.items():
        moved = param.detach() - start[key]
        got = layer.get_parameter(key).detach().double() - start[key]
        # 50 roundings of a float32 parameter, each as large as its unit roundoff at most, and
        # gradients as CLOSE says.
        limit = 50 * 2.0**-24 * param.detach().norm() + CLOSE["rtol"] * moved.norm()
        assert moved.norm() > 0 and (got - moved).norm() <= limit, key


class ReversedQDoRALinear(layers.QLoRALinear, DoRALinear):
    """The parents of `QDoRALinear` in the other order."""


def test_variant_and_4_bit_base_combine_in_either_order() -> None:
    x, results = torch.randn(M, K), []
    for cls in (layers.QDoRALinear, ReversedQDoRALinear):
        torch.manual_seed(0)
        layer = cls(K, N, r=5)
        layer(x).square().sum().backward()
        results.append([*layer.state_dict().values(), layer.lora_B.grad, layer.magnitude.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


HOOKS = {
    "make_adapter",
    "reset_lora_parameters",
    "init_lora_A",
    "record",
    "forward_fused",
    "adapter_config",
}


@pytest.mark.parametrize(("former", "name"), _FORMER_NAMES.items())
def test_former_name_of_a_method_is_refused(former: str, name: str) -> None:
    """Nothing would call it: the layer would compute plain LoRA without a word."""
    assert hasattr(layers.LoRALayer, name)
    with pytest.raises(TypeError, match=f"Mine: got {former}, want its new name {name}$"):
        type("Mine", (LoRALinear,), {former: lambda self: None})


def test_layers_override_only_the_hooks() -> None:
    """Beside methods of `nn.Module`, and the base and the default init, which are no methods."""
    for name in layers.__all__:
        cls = getattr(layers, name)
        if not (isinstance(cls, type) and issubclass(cls, layers.LoRALayer)):
            continue
        for parent in cls.__mro__[: cls.__mro__.index(layers.LoRALayer)]:
            overridden = vars(parent).keys() & vars(layers.LoRALayer).keys()
            methods = {key for key in overridden if callable(getattr(parent, key))}
            methods -= {*vars(nn.Module), "default_init"}
            assert methods <= HOOKS, (parent, methods - HOOKS)


def test_variants_are_loralinears_and_other_layers_are_not() -> None:
    """Every layer is found as a LoRALayer; only those with a from_linear are LoRALinear."""
    for name in layers.__all__:
        cls = getattr(layers, name)
        if isinstance(cls, type) and name.startswith(("Q", "LoRA")) and hasattr(cls, "record"):
            assert issubclass(cls, layers.LoRALayer), name
            assert issubclass(cls, LoRALinear) is hasattr(cls, "from_linear"), name
    for name in VARIANTS:
        if name != "LoRAConv1D":
            quantized, dense = getattr(layers, f"Q{name}"), getattr(layers, name)
            assert issubclass(dense, LoRALinear) and issubclass(quantized, dense)
            assert issubclass(quantized, layers.QLoRALinear)


# Starts and scalings -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [f64, f32, bf16], ids=str)
def test_initialisers_have_their_deviations(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = {
        init: LoRALinear(512, 8, r=64, init=init, lora_dtype=dtype).lora_A.detach().float()
        for init in ("kaiming", "gaussian", "xavier", "orthogonal")
    }
    # Standard deviations to 5 %, of 32768 draws; of a uniform in ±a it is a/√3.
    stds = {"kaiming": (1 / 512) ** 0.5 / 3**0.5, "gaussian": 1 / 64}
    stds |= {"xavier": (6 / 576) ** 0.5 / 3**0.5, "orthogonal": 512**-0.5}
    for init, std in stds.items():
        assert abs(made[init].std() / std - 1) < 0.05, init
    rows = made["orthogonal"] @ made["orthogonal"].T
    # Sums of 512 products of two roundings of numbers of order 512^-1/2, each row's norm being 1.
    assert (rows - torch.eye(64)).abs().max() < (2.0**-17 if dtype is f32 else 2 * 2.0**-8)


def test_adalora_draws_a_and_b_from_narrow_normals() -> None:
    torch.manual_seed(0)
    layer = AdaLoRALinear(512, 512, r=64)
    for t in (layer.lora_A, layer.lora_B):  # to 5 %, as above
        assert abs(t.std() / 0.02 - 1) < 0.05
    assert not layer.lora_E.any()
    assert (AdaLoRALinear(8, 8, init=nn.init.ones_).lora_A == 1).all()
    found = [AdaLoRALinear(512, 8, r=64, init=init).lora_A.std() for init in (None, "kaiming")]
    assert abs(found[0] / 0.02 - 1) < 0.05 and abs(found[1] * (3 * 512) ** 0.5 - 1) < 0.05
    layer.update_rank(torch.arange(64.0))
    layer.reset_lora_parameters()
    assert layer.rank_mask.all()


@pytest.mark.parametrize(
    ("name", "vector"),
    [
        ("DoRALinear", "magnitude"),
        ("AdaLoRALinear", "lora_E"),
        ("HierarchicalLoRALinear", "level_weights"),
    ],
)
@pytest.mark.parametrize("dtype", [f64, bf16], ids=str)
def test_vectors_have_at_least_float32(name: str, vector: str, dtype: torch.dtype) -> None:
    layer = make(name, dtype=dtype, lora_dtype=dtype)
    assert layer.lora_A.dtype is layer.lora_B.dtype is dtype
    assert getattr(layer, vector).dtype is (f64 if dtype is f64 else f32)


def test_rslora_divides_by_the_root() -> None:
    levels = make("HierarchicalLoRALinear", scaling="rslora")  # alpha is 10, the ranks 4 and 3
    assert levels.level_scales == (10 / 4**0.5, 10 / 3**0.5) and levels.scaling == 1.0
    assert LoRALinear(8, 8, r=4, alpha=6, scaling="rslora").scaling == 3.0
    assert LoRALinear(8, 8, r=4, alpha=6).scaling == 1.5


# Stable, memory-efficient, LoRA+ -----------------------------------------------------------------


@pytest.mark.parametrize(("given", "limit"), [({}, 1.0), ({"max_grad_norm": 0.5}, 0.5)])
def test_gradients_are_clipped_together(given: dict[str, float], limit: float) -> None:
    layer = make("StableLoRALinear", **given)
    layer(torch.randn(M, K)).square().sum().backward()
    A, B = layer.lora_A.grad.clone(), layer.lora_B.grad.clone()
    norm = layer.clip_gradients()
    torch.testing.assert_close(norm, torch.cat([A.flatten(), B.flatten()]).norm())
    for got, before in ((layer.lora_A.grad, A), (layer.lora_B.grad, B)):
        # PyTorch adds 1e-6 to the norm, which is above 1; a few roundings beside it.
        torch.testing.assert_close(got, before * limit / norm, rtol=2e-6, atol=0)
    assert StableLoRALinear(8, 8).clip_gradients() == 0  # no gradients yet
    layer.lora_B.grad[0, 0] = float("inf")
    with pytest.raises(RuntimeError, match="non-finite"):
        layer.clip_gradients()


@pytest.mark.parametrize("autocast", [None, bf16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["MemoryEfficientLoRALinear", "QMemoryEfficientLoRALinear"])
@pytest.mark.parametrize("rows", [3, M])
def test_recomputed_gradients_are_the_same_bits(rows, name, dropout, autocast) -> None:
    layer, x = make(name, dropout=dropout), torch.randn(rows, K, requires_grad=True)
    assert layer.use_checkpoint and not make(name, use_checkpoint=False).use_checkpoint
    got = []
    for use_checkpoint in (True, False):
        layer.use_checkpoint = use_checkpoint
        torch.manual_seed(5)
        kept: list[tuple[int, ...]] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=kept: (kept.append(tuple(t.shape)), t)[1], lambda t: t
            ),
            torch.autocast("cpu", bf16, enabled=autocast is not None),
        ):
            y = layer(x)
        assert ((rows, layer.r) in kept) is not use_checkpoint
        got.append(torch.autograd.grad(y.float().square().sum(), [x, layer.lora_A, layer.lora_B]))
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


def test_lora_plus_moves_b_further() -> None:
    layer = make("LoRAPlusLinear")
    before = [p.detach().clone() for p in (layer.lora_A, layer.lora_B)]
    for param in (layer.lora_A, layer.lora_B):
        param.grad = torch.ones_like(param)
    torch.optim.SGD(layer.get_parameter_groups(lr=2.0**-10, ratio=8)).step()
    A, B = (p.detach() - b for p, b in zip((layer.lora_A, layer.lora_B), before, strict=True))
    # A sum with a parameter below 2 is rounded to 2⁻²⁴: of a step of 2⁻¹⁰, 2⁻¹⁴.
    torch.testing.assert_close(A, torch.full_like(A, -(2.0**-10)), rtol=2.0**-13, atol=0)
    torch.testing.assert_close(B, torch.full_like(B, -(2.0**-7)), rtol=2.0**-13, atol=0)


def test_lora_plus_of_a_whole_model() -> None:
    model = nn.Sequential(LoRAPlusLinear(8, 8), nn.LayerNorm(8), DoRALinear(8, 8), nn.Linear(8, 8))
    model[3].requires_grad_(False)
    slow, fast = lora_plus_parameter_groups(model, 0.1, 4)
    assert {id(p) for p in fast["params"]} == {id(model[0].lora_B), id(model[2].lora_B)}
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in (*slow["params"], *fast["params"])}
    assert (slow["lr"], fast["lr"]) == (0.1, 0.4)


def test_lora_plus_of_peft_s_embedding_has_its_b_in_the_fast_group() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8)),
        LoraConfig(r=2, target_modules=["0", "1"]),
    )
    _, fast = lora_plus_parameter_groups(model, 0.1, 4)
    found = {id(p) for p in fast["params"]}
    named = model.named_parameters()
    assert {name for name, p in named if id(p) in found} == {
        "base_model.model.0.lora_embedding_B.default",
        "base_model.model.1.lora_B.default.weight",
    }


# DoRA --------------------------------------------------------------------------------------------


def test_the_norm_that_is_kept_is_not_of_what_lay_there_before() -> None:
    """A new parameter often comes to lie where the old one did, with as many versions behind it;
    a square weight and its transpose share address and shape."""
    torch.manual_seed(0)
    layer, x = DoRALinear(64, 64, r=5).eval(), torch.randn(3, 64)
    memory = np.empty((64, 64), np.float32)
    with torch.no_grad():
        for i in range(1, 20):
            layer.lora_B = None
            layer.lora_B = nn.Parameter(torch.randn(64, 5) * i)
            assert torch.equal(layer(x), copy.deepcopy(layer)(x)), i
            layer.weight = None
            memory[:] = torch.randn(64, 64) * i
            layer.weight = nn.Parameter(torch.from_numpy(memory), requires_grad=False)
            assert torch.equal(layer(x), copy.deepcopy(layer)(x)), i
        layer.weight = nn.Parameter(layer.weight.detach().t(), requires_grad=False)
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_a_row_of_zeros_has_no_direction() -> None:
    linear = nn.Linear(8, 4)
    with torch.no_grad():
        linear.weight[2] = 0
    with pytest.raises(ValueError, match="weight: got row 2 all zeros"):
        DoRALinear.from_linear(linear)


def assert_is_pefts(layer: Any, peft: Any, pairs: dict[str, Any], rtol: float) -> None:
    """y and the gradients of parameters that are PEFT's, by name."""
    with torch.no_grad():
        for name, param in pairs.items():
            getattr(layer, name).copy_(param.view(getattr(layer, name).shape))
    dtype = layer.weight.dtype
    x, dy = torch.randn(M, K, dtype=dtype), torch.randn(M, N, dtype=dtype)
    y, want = layer(x), peft(x)
    grads = torch.autograd.grad(y, [layer.get_parameter(name) for name in pairs], dy)
    wants = torch.autograd.grad(want, list(pairs.values()), dy)
    for got, expected in zip((y, *grads), (want, *wants), strict=True):
        assert_close_derived(got.double().view(expected.shape), expected.double(), rtol)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_dora_is_pefts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, u = nn.Linear(K, N, dtype=dtype), tolerance.unit_roundoff(dtype)
    config = LoraConfig(r=5, lora_alpha=10, target_modules=["0"], use_dora=True)
    peft: Any = inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(linear)))[0]
    layer = DoRALinear.from_linear(linear, r=5, alpha=10)
    pairs = {
        "lora_A": peft.lora_A["default"].weight,
        "lora_B": peft.lora_B["default"].weight,
        "magnitude": peft.lora_magnitude_vector["default"].weight,
    }
    # A norm of K squares; PEFT's is rounded to the weight's dtype.
    rtol = derived_rtol(f32, terms=K, layers=1) + (u if dtype is bf16 else 0)
    assert_close_derived(layer.magnitude, pairs["magnitude"].float(), rtol)
    with torch.no_grad():
        pairs["lora_B"].copy_(torch.randn(N, 5))
    # PEFT rounds the weight's sum, its norm and two products to bfloat16.
    assert_is_pefts(layer, peft, pairs, derived_rtol(f32, N, 2) if dtype is f32 else 4 * u)


# AdaLoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "quantile", "kept"),
    [
        ([1.0, 5, 2, 4, 3], 0.5, [False, True, False, True, False]),  # strictly above 3
        ([2.0, 2, 2, 2, 2], 0.5, [True, False, False, False, False]),  # none is above: one stays
        ([1.0, 3, 2, 3, 3], 1.0, [False, True, False, False, False]),  # the first among equals
        ([1.0, 5, 2, 4, 3], 1.0, [False, True, False, False, False]),
        ([1.0, 5, 2, 4, 3], 0.0, [False, True, True, True, True]),
    ],
)
def test_update_rank_keeps_what_is_above_the_quantile(scores, quantile, kept) -> None:
    layer = make("AdaLoRALinear")
    mask, where = layer.rank_mask, layer.rank_mask.data_ptr()
    layer.update_rank(torch.tensor(scores), quantile)
    assert layer.rank_mask is mask and mask.data_ptr() == where
    assert mask.tolist() == kept
    assert layer.current_rank == sum(kept) and type(layer.current_rank) is int
    assert "rank_mask" in layer.state_dict()


def test_masked_ranks_count_for_nothing_and_learn_nothing() -> None:
    layer, x = make("AdaLoRALinear", dtype=f64), torch.randn(M, K, dtype=f64)
    layer.update_rank(torch.tensor([1.0, 5, 2, 4, 3]))
    kept = layer.rank_mask
    y = layer(x)
    A, B, E = layer.lora_A[kept], layer.lora_B[:, kept], layer.lora_E[kept]
    cut = reference.lora_linear(x, layer.weight, A, B, layer.scaling, rank_gate=E)
    assert_close_derived(y, cut, K * tolerance.unit_roundoff(f64))
    y.square().sum().backward()
    for grad in (layer.lora_A.grad, layer.lora_B.grad.T, layer.lora_E.grad):
        assert not grad[~kept].any() and grad[kept].all()


def test_adalora_is_pefts() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    settings = {"init_r": 5, "target_r": 2, "lora_alpha": 10, "total_step": 10}
    config = AdaLoraConfig(**settings, lora_dropout=0.0, target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(copy.deepcopy(linear)), config)
    peft = model.base_model.model[0]
    layer = AdaLoRALinear.from_linear(linear, r=5, alpha=10)
    pairs = {name: getattr(peft, name)["default"] for name in ("lora_A", "lora_B", "lora_E")}
    nn.init.normal_(pairs["lora_E"])
    # PEFT divides by its rank and 1e-5: 2e-6 of the update.
    assert_is_pefts(layer, peft, pairs, derived_rtol(f32, N, 2) + 2e-6)


def test_the_allocator_takes_the_least_important_of_all_layers() -> None:
    """Scores as the paper has them, computed here by hand from the gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(*(make("AdaLoRALinear", seed) for seed in range(1)), nn.Linear(N, K))
    model.append(make("AdaLoRALinear", 3))
    layers_ = [model[0], model[2]]
    allocator = layers.RankAllocator(
        model, target_rank=2, total=12, warmup=2, final=3, interval=2, beta1=0.8, beta2=0.6
    )
    averages: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    masks = []
    for step in range(12):
        model.zero_grad()
        model(torch.randn(M, K)).square().mean().backward()
        for i, layer in enumerate(layers_):
            for name in ("lora_A", "lora_B", "lora_E"):
                param = layer.get_parameter(name)
                now = (param * param.grad).abs().detach()
                S, U = averages.get((i, name), (torch.zeros_like(now), torch.zeros_like(now)))
                S = 0.8 * S + 0.2 * now
                averages[i, name] = S, 0.6 * U + 0.4 * (S - now).abs()
        kept = allocator.step()
        budget = allocator.budget(step)
        if step >= 2 and (step <= 9):
            drawn = step % 2 == 0 or step == 9
            scores = [
                (S * U).view(5) + (SA * UA).mean(1) + (SB * UB).mean(0)
                for (S, U), (SA, UA), (SB, UB) in (
                    (averages[i, "lora_E"], averages[i, "lora_A"], averages[i, "lora_B"])
                    for i in range(2)
                )
            ]
            for got, want in zip(allocator.scores(), scores, strict=True):
                # Scores of 1e-7: twenty float32 roundings, and a difference that loses a digit.
                torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
            if drawn:
                best = torch.cat(scores).topk(budget).indices.sort().values
                mask = torch.cat([layer.rank_mask for layer in layers_])
                assert torch.equal(mask.nonzero().flatten(), best), step
                assert kept == budget
        masks.append(torch.cat([layer.rank_mask.clone() for layer in layers_]))
    assert masks[1].all() and masks[-1].sum() == 4
    assert all(torch.equal(mask, masks[9]) for mask in masks[9:])


def test_the_allocator_of_unequal_ranks_takes_the_first_among_equals() -> None:
    model = nn.Sequential(make("AdaLoRALinear", r=3), nn.Linear(N, K), make("AdaLoRALinear", r=5))
    allocator = layers.RankAllocator(model, target_rank=3, total=2)
    assert allocator.budget(0) == 8 and allocator.target == 6
    for layer in allocator.layers:
        for param in layer.parameters():
            param.grad = torch.zeros_like(param)
    allocator.steps = 1  # with a budget between all and the target
    assert allocator.budget(1) == 7 and allocator.step() == 7
    assert model[0].rank_mask.tolist() == [True] * 3
    assert model[2].rank_mask.tolist() == [True] * 4 + [False]
    with pytest.raises(ValueError, match="target_rank: got 4, want 1 to the layers' r, 3"):
        layers.RankAllocator(model, 4, 10)
    want = (model[0].orthogonality() + model[2].orthogonality()) / 2
    torch.testing.assert_close(allocator.penalty(), want)


def test_scores_of_bfloat16_are_kept_in_float32() -> None:
    model = make("AdaLoRALinear", lora_dtype=bf16)
    allocator = layers.RankAllocator(model, 5, 10)
    model(torch.randn(M, K)).square().mean().backward()
    allocator.step()
    assert allocator.scores()[0].dtype is f32
    assert all(t.dtype is f32 for t in allocator.state_dict()["sensitivity"][0].values())
    assert model.orthogonality().dtype is f32


def test_allocator_state_is_copied_when_loaded_and_checked_before() -> None:
    model = make("AdaLoRALinear")
    first, second = (layers.RankAllocator(model, 2, 10) for _ in range(2))
    model(torch.randn(M, K)).square().mean().backward()
    first.step()
    before, state = first.scores()[0].clone(), first.state_dict()
    second.load_state_dict(state)
    second.step()
    assert torch.equal(first.scores()[0], before) and second.steps == 2
    for bad, words in (
        ({"steps": 7, "sensitivity": [{}]}, "got no 'uncertainty'"),
        ({"steps": 7, "uncertainty": [{}]}, "got no 'sensitivity'"),
        ({"uncertainty": [{}], "sensitivity": [{}]}, "got no 'steps'"),
        (state | {"steps": 7, "sensitivity": []}, "got 0 layers, want 1"),
        (state | {"steps": 7, "sensitivity": [{}, {}]}, "got 2 layers, want 1"),
    ):
        with pytest.raises(ValueError, match=f"state: {words}"):
            second.load_state_dict(bad)
    assert second.steps == 2


def test_allocator_state_of_another_device_is_moved_to_that_of_the_layers() -> None:
    """Torch's optimizers move theirs too. Meta stands for a GPU."""
    trained, found = make("AdaLoRALinear"), make("AdaLoRALinear").to("meta")
    first, second = (layers.RankAllocator(model, 2, 10) for model in (trained, found))
    trained(torch.randn(M, K)).square().mean().backward()
    first.step()
    second.load_state_dict(first.state_dict())
    averages = [*second._sensitivity, *second._uncertainty]
    assert all(t.is_meta for each in averages for t in each.values()) and averages[0]
    assert not any(t.is_meta for t in first._sensitivity[0].values())


def test_the_allocator_goes_on_where_it_stopped() -> None:
    def train(model: nn.Module, allocator: Any, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            model.zero_grad()
            model(torch.randn(M, K)).square().mean().backward()
            with torch.no_grad():
                for param in model.parameters():
                    if param.requires_grad:
                        param -= 0.1 * param.grad
            allocator.step()

    whole, broken = make("AdaLoRALinear"), make("AdaLoRALinear")
    options = {"target_rank": 2, "total": 10, "warmup": 1, "final": 2}
    train(whole, layers.RankAllocator(whole, **options), range(10))
    first = layers.RankAllocator(broken, **options)
    train(broken, first, range(4))
    second = layers.RankAllocator(broken, **options)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    train(broken, second, range(4, 10))
    assert torch.equal(whole.rank_mask, broken.rank_mask) and whole.current_rank == 2
    assert torch.equal(whole.lora_E, broken.lora_E)


def test_orthogonality_is_the_distance_and_has_gradients() -> None:
    layer = AdaLoRALinear(16, 16, r=4)
    with torch.no_grad():
        nn.init.orthogonal_(layer.lora_A)
        nn.init.orthogonal_(layer.lora_B)
    assert layer.orthogonality() < 1e-9
    with torch.no_grad():
        layer.lora_A.mul_(2)
    torch.testing.assert_close(layer.orthogonality(), torch.tensor(4 * 9.0))
    layer.orthogonality().backward()
    assert layer.lora_A.grad is not None and layer.lora_A.grad.any()


# Hierarchical ------------------------------------------------------------------------------------


def test_levels_are_three_adapters_over_one_base_product() -> None:
    layer = HierarchicalLoRALinear(K, N, dtype=f64)  # ranks 8, 16, 32, weights 0.6, 0.3, 0.1
    assert layer.level_scales == (2.0, 1.0, 0.5)
    assert layer.level_weights.requires_grad
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(M, K, dtype=f64)
    want, first = x @ layer.weight.T, 0
    for rank, weight, scale in zip((8, 16, 32), (0.6, 0.3, 0.1), (2.0, 1.0, 0.5), strict=True):
        part = slice(first, first + rank)
        update = (x @ layer.lora_A[part].T) @ layer.lora_B[:, part].T
        want = want + layer.level_weights.new_tensor(weight) * scale * update
        first += rank
    # level_weights are float32 numbers no more than lora_A's dtype makes them.
    torch.testing.assert_close(layer(x), want, rtol=2.0**-36, atol=2.0**-36)  # 72 · 2⁻⁵³, amply


@pytest.mark.parametrize("suffix", ["", "_quantized"])
@pytest.mark.parametrize("name", ["HierarchicalLoRALinear", "AdaLoRALinear", "DoRALinear"])
def test_one_op_and_no_other_product(name: str, suffix: str) -> None:
    layer, x = make("Q" * bool(suffix) + name), torch.randn(M, K)
    want = ["lora_linear", *["dora_norm"] * ("DoRA" in name)]
    assert count_ops(lambda: layer(x)) == dict.fromkeys((op + suffix for op in want), 1)


# Bad input ---------------------------------------------------------------------------------------


def update_rank(scores: Tensor, *quantile: float) -> None:
    make("AdaLoRALinear").update_rank(scores, *quantile)


def allocate(*args: Any, **options: Any) -> Any:
    return layers.RankAllocator(make("AdaLoRALinear"), *args, **options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: update_rank(torch.ones(4)), r"scores: got shape \[4\]"),
        (lambda: update_rank(torch.ones(5), 2), "quantile: got 2"),
        (lambda: update_rank(torch.ones(5), -0.5), "quantile: got -0.5"),
        (lambda: update_rank(torch.full((5,), float("nan"))), "scores: got NaN"),
        (lambda: update_rank(torch.full((5,), float("inf"))), "scores: got NaN or infinity"),
        (lambda: lora_plus_parameter_groups(nn.Linear(4, 4), 0.1), "model: got none with a train"),
        (lambda: lora_plus_parameter_groups(make("LoRALinear"), 0), "lr: got 0, want more than 0"),
        (lambda: layers.RankAllocator(nn.Linear(4, 4), 2, 10), "model: got none with an AdaLoRA"),
        (lambda: lora_plus_parameter_groups(make("LoRALinear"), 1, 0), "ratio: got 0, want more"),
        (lambda: allocate(6, 10), "target_rank: got 6, want 1 to"),
        (lambda: allocate(0, 10), "target_rank: got 0, want 1 to"),
        (lambda: allocate(2, 10, 6, 4), r"total: got 10, want more than warmup \+ final, 10"),
        (lambda: allocate(2, 10, beta1=1.0), "beta1: got 1.0"),
        (lambda: allocate(2, 10, beta2=1.0), "beta2: got 1.0"),
        (lambda: allocate(2, 10, beta2=-0.1), "beta2: got -0.1"),
        (lambda: allocate(2, 9, -1), "warmup: got -1"),
        (lambda: allocate(2, 9, final=-1), "final: got -1"),
        (lambda: allocate(2, 9, interval=0), "interval: got 0"),
    ],
)
def test_bad_input_is_named_in_the_error(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_allocator_step_before_any_backward_is_an_error() -> None:
    allocator = allocate(2, 10)
    with pytest.raises(RuntimeError, match="lora_A: got no gradient"):
        allocator.step()
    for param in allocator.layers[0].parameters():
        param.grad = None if param is allocator.layers[0].lora_E else torch.ones_like(param)
    with pytest.raises(RuntimeError, match="lora_E: got no gradient"):
        allocator.step()
    assert allocator.state_dict() == layers.RankAllocator(make("AdaLoRALinear"), 2, 10).state_dict()


def test_adalora_on_meta_has_a_repr() -> None:
    assert "current_rank" not in repr(AdaLoRALinear(8, 8, device="meta"))
    assert "current_rank=8" in repr(AdaLoRALinear(8, 8))


class Halved(LoRALinear):
    """A layer whose record has a scaling of its own."""

    def record(self, weight: Any) -> Any:
        return super().record(weight)._replace(scaling=self.scaling / 2)


class HalvedDoRA(DoRALinear, Halved):
    pass


def test_dora_takes_the_scaling_of_the_record() -> None:
    layer, plain = (cls(K, N, r=5, dtype=f64) for cls in (HalvedDoRA, DoRALinear))
    for p in layer.parameters():
        nn.init.normal_(p)
    plain.load_state_dict(layer.state_dict())
    plain.scaling /= 2
    x = torch.randn(M, K, dtype=f64)
    assert_close_derived(layer(x), plain(x), terms=K)
