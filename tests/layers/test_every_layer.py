"""Properties of every layer with one x: a table of layers × properties.

The lines are `KINDS` in tests/support/models.py, each with its formula; a new layer, or another
configuration of one, is a line there and gets all properties. Dense layers have integer-valued
parameters and a scaling of 2: any order of summation gives the same bits. Properties of one layer
are in the file of its name.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lora_kernels.layers import (
    DoRALinear,
    HierarchicalLoRALinear,
    LoRAAttention,
    LoRAConv1D,
    LoRAEmbedding,
    LoRAGroup,
    LoRALinear,
    QLoRALinear,
    StableLoRALinear,
    load_lora_weights,
    lora_state_dict,
    save_lora_weights,
)
from lora_kernels.quantization import quantize_4bit
from tests.support.assertions import assert_bitwise_equal, assert_close_derived
from tests.support.clones import CLONES
from tests.support.models import KINDS, Kind, concatenated, gradients, run
from tests.support.peft_models import Masked, draw_rng

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def kinds(condition: Callable[[Kind], bool] = lambda kind: True) -> pytest.MarkDecorator:
    """Parametrize by the kinds for which the condition is true."""
    found = {name: kind for name, kind in KINDS.items() if condition(kind)}
    return pytest.mark.parametrize("kind", found.values(), ids=found)


every_kind = kinds()
every_linear = kinds(lambda kind: not kind.is_embedding)
every_dense = kinds(lambda kind: not kind.is_quantized)


# Forward


@every_kind
def test_layer_starts_as_its_base(kind: Kind) -> None:
    torch.manual_seed(0)
    layer, x = kind.build(), kind.input(33)
    assert not getattr(layer, kind.start).any()
    if issubclass(kind.cls, DoRALinear):  # whose norm is that of W exactly
        assert (layer.record(layer.base_weight()).column_scale == 1).all()
    assert_close_derived(run(layer, x), kind.base(layer, x))


@every_linear
@pytest.mark.parametrize("shape", [(), (1,), (0,), (5,), (2, 0), (0, 2), (2, 3, 1)], ids=str)
def test_forward_of_any_shape_equals_the_formula(kind: Kind, shape: tuple[int, ...]) -> None:
    layer, x = kind.make(), kind.input(*shape)
    y = run(layer, x)
    assert y.shape == (*shape, kind.out_features)
    kind.assert_same(y, kind.result(layer, x))


@every_kind
def test_forward_of_strided_x_equals_that_of_contiguous_x(kind: Kind) -> None:
    layer, x = kind.make(), kind.input(6, 4).transpose(0, 1)
    kind.assert_same(run(layer, x), run(layer, x.contiguous()))


@every_linear
def test_dropout_is_applied_in_training_only(kind: Kind) -> None:
    """To the adapter's branch, by the mask of `dropout_mask`."""
    layer, x = kind.make(dropout=0.5), kind.input(7)
    assert not torch.equal(run(layer, x), run(layer, x))
    torch.manual_seed(3)
    y = run(layer, x)
    torch.manual_seed(3)
    kind.assert_same(y, kind.result(layer, x, Masked(draw_rng(), 0.5)(x)))
    layer.eval()
    for _ in range(2):
        kind.assert_same(run(layer, x), kind.result(layer, x))


@every_kind
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_forward_without_gradients_equals_that_with(kind: Kind, guard: Any) -> None:
    layer, x = kind.make(**{} if kind.is_embedding else {"dropout": 0.5}), kind.input(5)
    torch.manual_seed(0)
    want = run(layer, x)
    torch.manual_seed(0)
    with guard():
        y = run(layer, x)
    assert not y.requires_grad
    assert_bitwise_equal(y, want)


@every_kind
def test_training_after_inference_mode_is_possible(kind: Kind) -> None:
    """Cached tensors can be saved for a backward."""
    layer, x = kind.make(), kind.input(3)
    with torch.inference_mode():
        want = run(layer, x)
    y = run(layer, x)
    y.sum().backward()
    kind.assert_same(y, want)
    assert layer.lora_B.grad is not None


WRITES: dict[str, Callable[[Any, str, Tensor], object]] = {
    "in place": lambda layer, name, value: getattr(layer, name).copy_(value),
    ".data in place": lambda layer, name, value: getattr(layer, name).data.copy_(value),
    "new .data": lambda layer, name, value: setattr(getattr(layer, name), "data", value),
    "new parameter": lambda layer, name, value: setattr(layer, name, nn.Parameter(value, False)),
    "loaded": lambda layer, name, value: layer.load_state_dict({name: value}, strict=False),
}


MODES: dict[str, tuple[Any, ...]] = {
    "no_grad": (torch.no_grad,),
    "inference_mode": (torch.inference_mode,),
    "both": (torch.no_grad, torch.inference_mode),
}


@every_kind
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("modes", MODES, ids=MODES)
def test_call_without_gradients_reads_every_value(kind: Kind, write: str, modes: str) -> None:
    """A copy has nothing that is kept, and computes the same bits."""
    layer, x = kind.make().eval().requires_grad_(False), kind.input(1)

    def results(layer: Any) -> list[Tensor]:
        found = []
        for mode in MODES[modes] * 2:
            with mode():
                found.append(run(layer, x).nan_to_num())  # of scales whose bytes are reversed
        return found

    for name, p in list(layer.named_parameters()):
        if name in ("weight_code", "weight_nested_code"):  # floats as bytes
            continue
        before, value = results(layer), p.detach()
        value = value * 2 if p.is_floating_point() else value.flip(0)
        with torch.no_grad():
            WRITES[write](layer, name, value.clone())
        got = results(layer)
        assert_bitwise_equal(got, results(copy.deepcopy(layer)))
        assert not torch.equal(got[0], before[0]) or name.startswith("weight_"), name
        assert all(torch.equal(y, got[0]) for y in got)
    assert_bitwise_equal(results(layer.double().float()), got)


@every_dense  # the other's weight is bytes
def test_trainable_weight_is_refused_with_gradients(kind: Kind) -> None:
    layer = kind.make()
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight: got requires_grad=True, want a frozen weight"):
        layer(kind.input(3))
    with torch.no_grad():
        layer(kind.input(3))


@every_linear
@pytest.mark.parametrize("mode", ["on", "disabled", "merged"])
def test_autocast_decides_the_dtype_of_y(kind: Kind, mode: str) -> None:
    layer, x = kind.make().eval(), kind.input(5)
    layer.enabled = mode != "disabled"
    if mode == "merged":
        layer.merge()
    with torch.autocast("cpu", bf16):
        assert run(layer, x).dtype is bf16
    assert run(layer, x).dtype is f32


# Disabling and merging


@every_kind
def test_disabled_layer_is_its_base_merged_or_not(kind: Kind) -> None:
    layer, x = kind.make(), kind.input(5, 2)
    layer.enabled = False
    want = kind.base(layer, x)
    assert_bitwise_equal(run(layer, x), want)
    layer.merge()
    assert_bitwise_equal(run(layer, x), want)
    layer.unmerge()
    layer.enabled = True
    assert not torch.equal(run(layer.eval(), x), want)


@every_kind
def test_merge_and_unmerge_leave_y_and_state(kind: Kind) -> None:
    layer, x = kind.make().eval(), kind.input(5, 2)
    y, state = run(layer, x), copy.deepcopy(layer.state_dict())
    layer.merge()
    assert layer.merged and layer.merged_weight.dtype is f32
    assert layer.merged_weight.is_contiguous() or kind.cls is LoRAConv1D
    kind.assert_same(run(layer, x), y)
    assert_bitwise_equal(layer.state_dict(), state)
    layer.unmerge()
    assert not layer.merged
    assert_bitwise_equal(layer.state_dict(), state)
    assert_bitwise_equal(run(layer, x), y)


@every_kind
def test_merge_again_and_loading_follow_the_adapter(kind: Kind) -> None:
    layer, other, x = kind.make().eval(), kind.make(seed=7).eval(), kind.input(5, 2)
    layer.merge()
    with torch.no_grad():
        layer.lora_B.neg_()
    layer.merge()
    y = run(layer, x)
    layer.unmerge()
    kind.assert_same(run(layer, x), y)
    layer.merge()
    layer.load_state_dict(other.state_dict())
    assert layer.merged
    kind.assert_same(run(layer, x), run(other, x))


@every_kind
def test_merged_layer_refuses_to_train(kind: Kind) -> None:
    layer, x = kind.make(), kind.input(5)
    layer.merge()
    words = rf"{kind.cls.__name__} is merged and in training mode.*unmerge\(\)"
    with pytest.raises(RuntimeError, match=words):
        layer(x)
    for frozen in (layer.lora_A, layer.lora_B):
        frozen.requires_grad_(False)
        with pytest.raises(RuntimeError, match=words):
            layer(x)
        frozen.requires_grad_(True)
    with torch.no_grad():
        layer(x)
    layer.requires_grad_(False)
    layer(x)


@every_kind
def test_merge_rounds_once_to_the_base_dtype_whatever_autocast_says(kind: Kind) -> None:
    layer = kind.make(dtype=bf16)
    if not issubclass(kind.cls, DoRALinear):
        nn.init.normal_(layer.lora_A)
    rows = torch.arange(53) if kind.is_embedding else torch.eye(kind.sizes[0], dtype=f64)
    want = kind.result(layer, rows, dtype=f64)  # Wᵀ with the adapter
    if getattr(layer, "bias", None) is not None:
        want = want - layer.bias.double()
    with torch.autocast("cpu", bf16):
        layer.merge()
    merged = layer.merged_weight
    assert merged.dtype is bf16
    merged = merged if kind.is_embedding else merged.T
    # One rounding to 8 significand bits, after a float32 sum whose error is 2^15 times smaller.
    error = (merged.double() - want).abs()
    assert (error <= (2**-8 + 2**-20) * want.abs() + 2**-20).all()


@every_kind
def test_merge_of_a_broken_adapter_is_refused(kind: Kind) -> None:
    layer = kind.make()
    with torch.no_grad():
        layer.lora_A[0, 1] = float("nan")
    with pytest.raises(RuntimeError, match="NaN or infinity in the sum"):
        layer.merge()
    assert not layer.merged
    if hasattr(layer, "merged_layer"):
        with pytest.raises(RuntimeError, match="NaN or infinity in the sum"):
            layer.merged_layer()


@every_kind
@pytest.mark.parametrize("mode", ["on", "disabled", "merged"])
@pytest.mark.parametrize("dtype", [bf16, f64], ids=str)
def test_layer_moves_to_another_dtype(kind: Kind, mode: str, dtype: torch.dtype) -> None:
    layer, x = kind.make().eval(), kind.input(5)
    layer.enabled = mode != "disabled"
    if mode == "merged":
        layer.merge()
    want = run(layer, x)
    assert layer.to(dtype) is layer
    assert {p.dtype for p in layer.parameters() if p.is_floating_point()} == {dtype}
    x = x.to(dtype) if x.is_floating_point() else x
    if kind.is_quantized and dtype is f64:
        if mode == "on":
            with pytest.raises(TypeError, match="float64"):
                layer(x)
        return
    y = run(layer, x)
    assert y.dtype is dtype
    if dtype is f64:
        kind.assert_same(y.float(), want)


# Copies and compilers


@every_kind
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("clone", CLONES)
def test_copy_shares_nothing(kind: Kind, clone: Any, merged: bool) -> None:
    layer, x = kind.make().eval(), kind.input(5, 2)
    if merged:
        layer.merge()
    with torch.no_grad():
        layer(x)  # by which a layer may keep something
    other, y = clone(layer), run(layer, x)
    assert repr(other) == repr(layer)
    assert_bitwise_equal(run(other, x), y)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.zero_()
    layer.unmerge()
    assert_bitwise_equal(run(other, x), y)


@every_kind
def test_functional_call_takes_the_other_parameters(kind: Kind) -> None:
    layer, other, x = kind.make(), kind.make(seed=7), kind.input(5)
    params = {name: p.detach().clone() for name, p in other.named_parameters()}
    params["lora_A"].requires_grad_()
    before, y = run(layer, x), concatenated(functional_call(layer, params, x))
    assert_bitwise_equal(y, run(other, x))
    y.sum().backward()
    run(other, x).sum().backward()
    assert_bitwise_equal(params["lora_A"].grad, other.lora_A.grad)
    assert layer.lora_A.grad is None
    assert_bitwise_equal(run(layer, x), before)


@every_kind
def test_saved_layer_and_adapter_give_the_same_bits(kind: Kind, tmp_path: Path) -> None:
    layer, x = kind.make(), kind.input(33)
    want = gradients(layer, x)
    other = kind.make(seed=7)
    other.load_state_dict(layer.state_dict())
    assert_bitwise_equal(gradients(other, x), want)
    third = kind.make()  # the adapter by itself, over the same base
    third.reset_lora_parameters()
    assert not torch.equal(run(third, x), want["y"])
    save_lora_weights(layer, tmp_path / "adapter.safetensors")
    load_lora_weights(third, tmp_path / "adapter.safetensors")
    assert_bitwise_equal(gradients(third, x), want)


@every_kind
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpoint_gives_the_same_gradients(kind, dropout, use_reentrant) -> None:
    layer, x = kind.make(**{} if kind.is_embedding else {"dropout": dropout}), kind.input(33)
    if getattr(layer, "bias", None) is not None:
        layer.bias.requires_grad_()
    want = gradients(layer, x)
    reentrant = use_reentrant and not kind.is_embedding  # which wants an x with a gradient
    got = gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert_bitwise_equal(got, want)


def forwards() -> dict[str, Kind]:
    """Return the kinds whose forward is another function than that of a kind before."""
    found: dict[Any, str] = {}
    for name, kind in KINDS.items():
        parts = [getattr(kind.cls, part) for part in ("forward", "forward_fused", "record")]
        key = (*parts, type(kind.cls.base), "MemoryEfficient" in name)
        found[key] = found.get(key, name) if "bias" not in name else name
    return {name: KINDS[name] for name in found.values()}


DENSE_BASES = ("linear_bias", "conv1d", "embedding")
BASES = (*DENSE_BASES, "quantized_bias")
WITH_DROPOUT = [name for name in BASES if name != "embedding"]


@pytest.mark.parametrize(
    ("name", "dropout"),
    [
        *(
            # A variant with a dense base is compiled as that with a base in 4 bits is.
            pytest.param(name, 0.0, marks=[pytest.mark.proof] if f"Q{name}" in forwards() else [])
            for name in forwards()
        ),
        *((name, 0.1) for name in BASES if name != "embedding"),
    ],
)
def test_compiled_layer_gives_the_same_gradients(name: str, dropout: float) -> None:
    """Compiled once for any number of rows."""
    torch._dynamo.reset()
    kind, is_dynamic = KINDS[name], name in DENSE_BASES
    layer, x = kind.make(**{"dropout": dropout} if dropout else {}), kind.input(5)
    compiled = torch.compile(layer, fullgraph=True, dynamic=is_dynamic, backend="aot_eager")
    first = run(layer, x)  # which leaves a view of 4-bit codes that a compiler cannot compare
    got = gradients(layer, x, compiled)
    if is_dynamic:
        with torch._dynamo.config.patch(error_on_recompile=True):
            gradients(layer, kind.input(9), compiled)
    if not dropout:
        assert_bitwise_equal(got, gradients(layer, x))
        assert_bitwise_equal(got["y"], first)


@pytest.mark.parametrize("name", BASES)
def test_compiled_layer_follows_its_state(name: str) -> None:
    """The states: eval mode, merged, loaded, under autocast and disabled."""
    torch._dynamo.reset()
    kind = KINDS[name]
    layer = kind.make()
    x, autocast = kind.input(5), torch.autocast("cpu", bf16)
    layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer.eval()
    for change in (lambda: None, layer.merge, layer.unmerge):
        change()
        assert_bitwise_equal(compiled(x), layer(x))
    layer.load_state_dict(kind.make(seed=7).state_dict(), assign=True)
    assert_bitwise_equal(compiled(x), layer(x))
    with autocast:
        assert_bitwise_equal(compiled(x), layer(x))
    layer.enabled = False
    assert_bitwise_equal(compiled(x), kind.base(layer, x))


def test_compiled_layer_keeps_its_compute_dtype() -> None:
    torch._dynamo.reset()
    layer, x = KINDS["quantized"].make(compute_dtype=bf16), KINDS["quantized"].input(5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(x / 3), layer(x / 3))


@every_kind
def test_layer_on_meta_has_shapes_and_starts_when_reset(kind: Kind) -> None:
    layer = kind.build(device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert run(layer, kind.input(5).to("meta")).shape == (5, kind.out_features)
    layer.to_empty(device="cpu")
    for param in layer.parameters():
        nn.init.constant_(param, math.nan if param.is_floating_point() else 1)
    layer.reset_parameters()
    for name in ("lora_A", "lora_B", kind.start):
        param = getattr(layer, name)
        assert not param.any() if name == kind.start else param.isfinite().all() and param.all()
    if issubclass(kind.cls, DoRALinear):
        assert_close_derived(layer.magnitude, kind.weight(layer).norm(dim=1))
    x = kind.input(5)
    assert_close_derived(run(layer, x), kind.base(layer, x))
    if kind.cls is LoRALinear:
        for param in (p for p in (layer.weight, layer.bias, layer.lora_A) if p is not None):
            assert 0 < param.abs().max() <= 12**-0.5


def test_init_may_be_a_callable() -> None:
    for make, name in (
        (lambda init: LoRALinear.from_linear(nn.Linear(12, 10), init=init), "lora_A"),
        (lambda init: LoRAEmbedding.from_embedding(nn.Embedding(12, 10), init=init), "lora_B"),
    ):
        calls: list[Tensor] = []
        layer = make(lambda t, calls=calls: calls.append(t.fill_(7)))
        other = {"lora_A": layer.lora_B, "lora_B": layer.lora_A}[name]
        assert len(calls) == 1 and (getattr(layer, name) == 7).all() and not other.any()
        assert getattr(layer, name).requires_grad


def over_a_base(kind: Kind, base: Any, **options: Any) -> Any:
    """Build the kind's layer over a module that is there, or over a group's modules."""
    builders = ("from_linears", "from_conv1d", "from_embedding", "from_linear")
    build = next(getattr(kind.cls, name) for name in builders if hasattr(kind.cls, name))
    own = {name: value for name, value in kind.options.items() if name != "bias"}
    return build(base, kind.rank, 6, **own | options)


def stock_base(kind: Kind, dtype: torch.dtype) -> Any:
    K, N = kind.sizes
    if isinstance(N, dict):
        return {name: nn.Linear(K, size, dtype=dtype) for name, size in N.items()}
    if kind.cls is LoRAConv1D:
        return Conv1D(N, K).to(dtype)
    return (nn.Embedding if kind.is_embedding else nn.Linear)(K, N, dtype=dtype)


@every_kind
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_layer_over_a_base_shares_it_and_starts_as_it(kind: Kind, dtype: torch.dtype) -> None:
    """A group copies its bases, and a 4-bit layer shares the bias alone."""
    torch.manual_seed(0)
    base = stock_base(kind, dtype)
    x = kind.input(33, dtype=dtype)
    if isinstance(base, dict):
        want = torch.cat([module(x) for module in base.values()], dim=-1)
        assert torch.equal(over_a_base(kind, base).bias, torch.cat([m.bias for m in base.values()]))
    else:
        base.eval()
        want = base(x)
    layer = over_a_base(kind, base)
    if not isinstance(base, dict):
        assert not layer.training and not any(p.requires_grad for p in base.parameters())
        assert layer.bias is getattr(base, "bias", None)
        assert (layer.weight is base.weight) is not kind.is_quantized
        assert base.weight.dtype is dtype
    if kind.is_quantized:  # no more than 4 bits apart
        assert (run(layer, x) - want).norm() < 0.3 * want.norm()
        want = kind.base(layer, x)
    # The library GEMM and ours round sums to the dtype in orders of their own.
    assert_close_derived(run(layer, x), want)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    assert trained.keys() == lora_state_dict(layer).keys() - {"rank_mask"}
    assert lora_state_dict(layer).keys() == lora_state_dict(kind.build()).keys()
    assert {p.dtype for p in trained.values()} == {f32}
    assert layer.scaling == (1 if issubclass(kind.cls, HierarchicalLoRALinear) else 2)
    assert not getattr(layer, kind.start).any()


def frozen_4bit() -> Any:
    return quantize_4bit(torch.randn(10, 12, dtype=f16), "fp4", 32, True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("build", "base", "own"),
    [
        (LoRALinear.from_linear, lambda: nn.Linear(12, 10), {"dropout": 0.25}),
        (LoRAConv1D.from_conv1d, lambda: Conv1D(10, 12), {"dropout": 0.25}),
        (LoRAEmbedding.from_embedding, lambda: nn.Embedding(12, 10), {}),
        (LoRAGroup.from_linears, lambda: {"q": nn.Linear(12, 10)}, {"dropout": 0.25}),
        (
            QLoRALinear.from_linear,
            lambda: nn.Linear(12, 10),
            {"dropout": 0.25, "compute_dtype": bf16, "blocksize": 32, "quant_type": "fp4"},
        ),
        (QLoRALinear.from_quantized, frozen_4bit, {"dropout": 0.25, "compute_dtype": bf16}),
    ],
    ids=["linear", "conv1d", "embedding", "linears", "quantized", "from_quantized"],
)
def test_layer_over_a_base_has_every_argument(build, base, own, training) -> None:
    made = base()
    modules = list(made.values()) if isinstance(made, dict) else [made]
    modules = [m.to(f16).train(training) for m in modules if isinstance(m, nn.Module)]
    options = {"init": nn.init.ones_, "lora_dtype": bf16, "scaling": "rslora"} | own
    layer = build(made, 3, 7, **options)
    assert (layer.r, layer.alpha, layer.init) == (3, 7, nn.init.ones_)
    assert layer.scaling == 7 / math.sqrt(3)
    assert {name: getattr(layer, name) for name in own} == own
    assert layer.lora_A.dtype is layer.lora_B.dtype is bf16
    assert layer.dense_weight().dtype is f16
    assert layer.training is (training or not modules)
    assert not any(p.requires_grad for p in (layer.weight, *layer.parameters()) if p.dtype is f16)
    if build != LoRAGroup.from_linears:  # which copies
        assert not any(p.requires_grad for m in modules for p in m.parameters())


@pytest.mark.parametrize(
    ("build", "base"),
    [
        (LoRALinear.from_linear, nn.Linear(12, 10, dtype=f64)),
        (LoRAConv1D.from_conv1d, Conv1D(10, 12).double()),
        (LoRAEmbedding.from_embedding, nn.Embedding(12, 10, dtype=f64)),
        (LoRAGroup.from_linears, {"q": nn.Linear(12, 10, dtype=f64)}),
    ],
    ids=["linear", "conv1d", "embedding", "linears"],
)
def test_adapter_over_a_float64_base_is_float64(build, base) -> None:
    layer = build(base)
    assert layer.lora_A.dtype is layer.lora_B.dtype is f64


LINEAR_REPR = "LoRALinear(in_features=12, out_features=10, bias=False, r=3, alpha=6, dropout=0.1"


@pytest.mark.parametrize(
    ("make", "start", "end"),
    [
        (lambda: LoRALinear(12, 10, 3, 6, 0.1), LINEAR_REPR, ""),
        (lambda: QLoRALinear(12, 10, 3, 6, 0.1), f"Q{LINEAR_REPR}", ", nf4, blocksize=64, nested"),
        (
            lambda: QLoRALinear(
                12, 10, 3, 6, 0.1, quant_type="fp4", blocksize=32, double_quant=False
            ),
            f"Q{LINEAR_REPR}",
            ", fp4, blocksize=32",
        ),
        (
            lambda: LoRAEmbedding(53, 72, 5, 7, padding_idx=3),
            "LoRAEmbedding(53, 72, r=5, alpha=7, padding_idx=3",
            "",
        ),
        (
            lambda: LoRAEmbedding(53, 72, 5, 7, padding_idx=-53),
            "LoRAEmbedding(53, 72, r=5, alpha=7, padding_idx=0",
            "",
        ),
        (lambda: LoRAEmbedding(53, 72, 5, 7), "LoRAEmbedding(53, 72, r=5, alpha=7", ""),
    ],
)
def test_repr_says_sizes_and_state(make: Any, start: str, end: str) -> None:
    layer = make()
    assert repr(layer) == f"{start}{end})"
    layer.merge()
    layer.enabled = False
    assert repr(layer) == f"{start}, merged, disabled{end})"


# Refused input

SIZES = {
    LoRALinear: {"in_features": 12, "out_features": 10},
    QLoRALinear: {"in_features": 12, "out_features": 10},
    LoRAEmbedding: {"num_embeddings": 53, "embedding_dim": 72},
    LoRAAttention: {"hidden_size": 24, "num_heads": 3},
    LoRAGroup: {"in_features": 40, "members": {"q": 33, "k": 9, "v": 12}},
    StableLoRALinear: {"in_features": 8, "out_features": 8},
    HierarchicalLoRALinear: {"in_features": 8, "out_features": 8},
}
BAD = [
    (LoRALinear, "r", 0, ValueError, r"r: got 0, want at least 1"),
    (LoRALinear, "r", 4.0, TypeError, r"r: got 4\.0, want an int"),
    (LoRALinear, "r", True, TypeError, r"r: got True, want an int"),
    (LoRALinear, "in_features", 0, ValueError, r"in_features: got 0, want at least 1"),
    (LoRALinear, "out_features", -1, ValueError, r"out_features: got -1, want at least 1"),
    (LoRALinear, "alpha", math.inf, ValueError, r"alpha: got inf, want a finite number"),
    (LoRALinear, "alpha", math.nan, ValueError, r"alpha: got nan, want a finite number"),
    (LoRALinear, "alpha", "16", TypeError, r"alpha: got '16', want a number"),
    (LoRALinear, "dropout", math.nan, ValueError, r"dropout: got nan, want a probability in \[0,"),
    (LoRALinear, "dropout", 1.5, ValueError, r"dropout: got 1\.5, want a probability in \[0, 1\]"),
    (LoRALinear, "dropout", -0.1, ValueError, r"dropout: got -0\.1, want a probability"),
    (LoRALinear, "dropout", None, TypeError, r"dropout: got None, want a number"),
    (LoRALinear, "init", "kaming", ValueError, r"init: got 'kaming', want one of 'kaiming', "),
    (LoRALinear, "dtype", torch.int64, TypeError, r"dtype: got torch\.int64, want a floating dtyp"),
    (LoRALinear, "lora_dtype", torch.int8, TypeError, r"lora_dtype: got torch\.int8, want a float"),
    (LoRALinear, "scaling", "rs", ValueError, "scaling: got 'rs', want 'lora' or 'rslora'"),
    (LoRAEmbedding, "num_embeddings", 0, ValueError, r"num_embeddings: got 0, want at least 1"),
    (LoRAEmbedding, "embedding_dim", 2.0, TypeError, r"embedding_dim: got 2\.0, want an int"),
    (LoRAEmbedding, "r", 0, ValueError, r"r: got 0, want at least 1"),
    (LoRAEmbedding, "alpha", math.nan, ValueError, r"alpha: got nan, want a finite number"),
    (LoRAEmbedding, "padding_idx", 53, ValueError, r"padding_idx: got 53, want an index of 53 emb"),
    (LoRAEmbedding, "padding_idx", -54, ValueError, r"padding_idx: got -54, want an index of 53"),
    (LoRAEmbedding, "init", "kaiming", TypeError, r"init: got 'kaiming', want a callable that fil"),
    (LoRAEmbedding, "dtype", torch.int64, TypeError, r"dtype: got torch\.int64, want a floating d"),
    (LoRAEmbedding, "scaling", "x", ValueError, r"scaling: got 'x', want 'lora' or 'rslora'"),
    (
        QLoRALinear,
        "quant_type",
        "int4",
        ValueError,
        "quant_type: got 'int4', want 'nf4', 'fp4'",
    ),
    (QLoRALinear, "blocksize", 48, ValueError, "blocksize: got 48, want a power of two, 32 to 409"),
    (QLoRALinear, "blocksize", 16, ValueError, "blocksize: got 16, want"),
    (QLoRALinear, "blocksize", 64.0, ValueError, r"blocksize: got 64\.0, want"),
    (QLoRALinear, "r", 0, ValueError, "r: got 0, want at least 1"),
    (QLoRALinear, "dtype", f64, TypeError, r"weight: got torch\.float64, want float32"),
    (QLoRALinear, "dtype", torch.int64, TypeError, r"dtype: got torch\.int64, want a floating dty"),
    (QLoRALinear, "dropout", 1.5, ValueError, r"dropout: got 1\.5, want a probability"),
    (LoRAAttention, "num_heads", 5, ValueError, "hidden_size: got 24, want a multiple of num_head"),
    (LoRAAttention, "num_heads", 0, ValueError, "num_heads: got 0, want at least 1"),
    (LoRAAttention, "num_heads", 2.0, TypeError, "num_heads: got 2.0, want an int"),
    (LoRAAttention, "hidden_size", 0, ValueError, "hidden_size: got 0, want at least 1"),
    (
        LoRAAttention,
        "targets",
        ("q_proj",),
        ValueError,
        "targets: got 'q_proj', .*; did you mean 'q",
    ),
    (
        LoRAAttention,
        "targets",
        ("Value",),
        ValueError,
        "targets: got 'Value', .*; did you mean 'v'",
    ),
    (
        LoRAAttention,
        "targets",
        ("gate",),
        ValueError,
        r"targets: got 'gate', want some of .*'o'\)$",
    ),
    (LoRAAttention, "targets", (), ValueError, "targets: got none, want some of"),
    (LoRAAttention, "r", 0, ValueError, "r: got 0, want at least 1"),
    (LoRAAttention, "dropout", 2, ValueError, "dropout: got 2, want a probability"),
    (LoRAGroup, "members", {}, ValueError, "members: got none"),
    (LoRAGroup, "members", {"q": 0}, ValueError, r"members\['q'\]: got 0, want at least 1"),
    (LoRAGroup, "targets", ("o",), ValueError, r"targets: got \('o',\), want some of \('q', 'k', "),
    (LoRAGroup, "targets", (), ValueError, r"targets: got \(\), want some of"),
    (LoRAGroup, "targets", ("q", "q"), ValueError, "targets: got .*, each once"),
    (LoRAGroup, "r", 0, ValueError, "r: got 0"),
    (StableLoRALinear, "max_grad_norm", 0, ValueError, "max_grad_norm: got 0, want more"),
    (StableLoRALinear, "max_grad_norm", math.nan, ValueError, "max_grad_norm: got nan"),
    (HierarchicalLoRALinear, "ranks", (), ValueError, "ranks: got none"),
    (HierarchicalLoRALinear, "ranks", (4, 0), ValueError, r"ranks\[1\]: got 0, want at least 1"),
    (HierarchicalLoRALinear, "ranks", (4, 2), ValueError, "weights: got .*, want 2 finite numbers"),
    (
        HierarchicalLoRALinear,
        "weights",
        (1, math.nan, 1),
        ValueError,
        "weights: got .*, want 3 fin",
    ),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("cls", "name", "value", "error", "message"), BAD)
def test_bad_argument_is_named_in_the_error(cls, name, value, error, message, device) -> None:
    with pytest.raises(error, match=f"^{message}"):
        cls(**{**SIZES[cls], "device": device, name: value})
    if cls is QLoRALinear and name != "dtype":
        with pytest.raises(error, match=f"^{message}"):
            QLoRALinear.from_linear(nn.Linear(12, 10), **{name: value})


def test_rank_beyond_the_size_cannot_be_orthogonal() -> None:
    with pytest.raises(ValueError, match=r"^r: got 5, want at most in_features = 4"):
        LoRALinear(4, 8, r=5, init="orthogonal")
    A = LoRALinear(4, 8, r=4, init="orthogonal", dtype=f64).lora_A
    assert (A @ A.T - torch.eye(4)).abs().max() < 16 * 2.0**-53  # not float32's 2⁻²⁴


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(module, register="register_forward_hook"):
    getattr(module, register)(lambda *args: None)
    return module


def patched():
    linear = nn.Linear(12, 10)
    linear.forward = lambda x: x
    return linear


def subclassed_weight():
    linear = nn.Linear(12, 10)
    linear.weight = type("Quantized", (nn.Parameter,), {})(linear.weight.detach())
    return linear


def linear(cls=nn.Linear):
    return cls(12, 10)


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
MAX_NORM = "got max_norm=1.5, want None: looking rows up would renormalize the frozen weight"


NOT_LINEAR = [
    (lambda: nn.Conv1d(12, 10, 1), "got Conv1d, want exactly torch.nn.Linear"),
    (lambda: LoRALinear(12, 10), "got LoRALinear, want exactly"),
    (lambda: Doubled(12, 10), "got Doubled, want exactly"),
    (
        lambda: nn.utils.parametrizations.weight_norm(linear()),
        "got ParametrizedLinear, want exactly",
    ),
    (patched, "got one with hooks or a patched forward, want a stock one"),
    (subclassed_weight, "got a weight of <class .*Quantized'>, want torch.nn.Parameter"),
    *((lambda h=h: hooked(linear(), f"register_{h}"), "got one with hooks") for h in HOOKS),
]
NO_CONV1D = "conv: got Linear, want exactly transformers' Conv1D"
NO_EMBEDDING = "want exactly torch.nn.Embedding"


@pytest.mark.parametrize(
    ("build", "base", "error", "message"),
    [
        *((LoRALinear.from_linear, base, TypeError, f"linear: {why}") for base, why in NOT_LINEAR),
        *((QLoRALinear.from_linear, base, TypeError, f"linear: {why}") for base, why in NOT_LINEAR),
        (LoRAConv1D.from_conv1d, linear, TypeError, NO_CONV1D),
        (LoRAConv1D.from_conv1d, lambda: hooked(Conv1D(4, 4)), TypeError, "conv: got one with hoo"),
        (LoRAEmbedding.from_embedding, linear, TypeError, f"embedding: got Linear, {NO_EMBEDDING}"),
        (
            LoRAEmbedding.from_embedding,
            lambda: Scaled(53, 72),
            TypeError,
            f"embedding: got Scaled, {NO_EMBEDDING}",
        ),
        (
            LoRAEmbedding.from_embedding,
            lambda: hooked(nn.Embedding(53, 72)),
            TypeError,
            "embedding: got one with hooks or a patched forward",
        ),
        (
            LoRAEmbedding.from_embedding,
            lambda: nn.Embedding(53, 72, max_norm=1.5),
            ValueError,
            f"embedding: {MAX_NORM}",
        ),
        (
            LoRAEmbedding.from_embedding,
            lambda: nn.Embedding(53, 72, max_norm=0.0),
            ValueError,
            "embedding: got max_norm=0.0",
        ),
    ],
)
def test_layer_over_what_is_not_stock_is_refused(build, base, error, message) -> None:
    module = base()
    with pytest.raises(error, match=f"^{message}"):
        build(module)
    assert any(p.requires_grad for p in module.parameters())
