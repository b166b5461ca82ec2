"""Properties of a fused layer of each kind beside PEFT's own: results, training, and PEFT's life.

In float64, MiCA and over 4 bits in float32. The stock 4-bit model is called with gradients: in eval
mode, without them, bitsandbytes may repack its weight for a CPU, and rounds its scales for good.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor

from lora_kernels.backends.cpu import native
from lora_kernels.peft import explain, fuse, unfuse
from lora_kernels.peft.explain_rows import KERNELS, LIBRARY
from tests.support.assertions import assert_as_exact, assert_bitwise_equal, assert_close_derived
from tests.support.clones import CLONES
from tests.support.peft_models import (
    MLP,
    SIZES_4BIT,
    activate,
    adalora_mlp,
    add_adapter,
    assert_same_files,
    assert_trains_alike,
    batch,
    conv1d,
    conv1d_mlp,
    count_ops,
    dora_mlp,
    embedding_model,
    four_bit_mlp,
    in_float64,
    kasa_mlp,
    mica_mlp,
    mlp,
    pair,
    randomize,
    results,
    seeded_results,
    set_masks,
    several_adapters,
    skip_without_kasa,
    token_ids,
    two_adapters,
)

# Of a lora_bias beside a base without one, which cannot be merged; of merging into 4 bits.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.lora_bias=True", "ignore:Merge lora module", "ignore:Unmerge lora module"
)
needs_native = pytest.mark.skipif(native.module is None, reason="no native kernels")
f64, f32 = torch.float64, torch.float32


class Kind(NamedTuple):
    build: Callable[..., Any]  # of PEFT's settings
    fused: str = "FusedLinear"  # the class of its layers
    forward: dict[str, int] = {"lora_linear": 1}  # noqa: RUF012  # a layer's ops
    backward: dict[str, int] = {"lora_linear_backward": 1}  # noqa: RUF012
    base: str = "Linear"
    dtype: torch.dtype = f64

    def layer(self, model: Any) -> Any:
        inner = model.base_model.model
        return inner.tokens if hasattr(inner, "tokens") else inner.up

    def input(self, *shape: int) -> Tensor:
        """Make an input of this leading shape."""
        if self.base == "Embedding":
            return token_ids(*shape)
        generator = torch.Generator().manual_seed(2)
        width = SIZES_4BIT[0] if self.base == "Linear4bit" else batch().shape[-1]
        return torch.randn(*shape, width, generator=generator, dtype=f64).to(self.dtype)


def four_bit_kind(loaded: bool, compute_dtype: Any = f32, **config: Any) -> Any:
    return four_bit_mlp(loaded, config, compute_dtype=compute_dtype)


def adalora_conv1d(**config: Any) -> Any:
    torch.manual_seed(0)
    return adalora_mlp(base=MLP(conv1d), fan_in_fan_out=True, **config)


FOUR_BIT = {"lora_linear_quantized": 1}, {"lora_linear_backward_quantized": 1}, "Linear4bit", f32
KINDS = {
    "linear": Kind(mlp),
    "conv1d": Kind(conv1d_mlp, base="Conv1D"),
    "dora": Kind(dora_mlp, forward={"dora_norm": 1, "lora_linear": 1}),
    "adalora": Kind(adalora_mlp, "FusedSVDLinear"),
    "adalora_conv1d": Kind(adalora_conv1d, "FusedSVDLinear", base="Conv1D"),
    "embedding": Kind(embedding_model, "FusedEmbedding", {"addmm_": 1}, base="Embedding"),
    "kasa": Kind(kasa_mlp),
    "mica": Kind(mica_mlp, dtype=f32),  # whose singular vectors are PyTorch's in float32
    "nf4": Kind(partial(four_bit_kind, False), "FusedLinear", *FOUR_BIT),
    "nf4_loaded": Kind(partial(four_bit_kind, True), "FusedLinear4bit", *FOUR_BIT),
}


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param.startswith("nf4"):
        pytest.importorskip("bitsandbytes")
    if request.param in ("kasa", "mica"):
        skip_without_kasa()
    return KINDS[request.param]


def every_kind(*without: str) -> pytest.MarkDecorator:
    names = [name for name in KINDS if name not in without]
    return pytest.mark.parametrize("kind", names, indirect=True)


def kinds_with(*cases: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("kind", "config"), cases, indirect=["kind"], ids=str)


# Results


@every_kind()
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 1, 3), (2, 3, 4), (2, 0, 3)], ids=str)
def test_fused_layer_on_any_shape_equals_peft(kind: Kind, shape: tuple[int, ...]) -> None:
    stock, fused = pair(kind.build())
    assert type(kind.layer(fused)).__name__ == kind.fused
    if shape == () and "dora_norm" in kind.forward:
        shape = (1,)  # of a vector PEFT's DoRA makes a row
    x = kind.input(*shape)
    assert_close_derived(results(fused, x), results(stock, x))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("path", ["cpu", "gpu_path"])
@pytest.mark.parametrize("build", [mlp, dora_mlp, adalora_mlp, kasa_mlp])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_fused_layer_of_a_sparse_input_is_pefts_and_says_so(
    build: Callable[[], Any], path: str, layout: torch.layout, request: pytest.FixtureRequest
) -> None:
    """Kernels read rows at addresses, which a sparse x has not."""
    if build is kasa_mlp:
        skip_without_kasa()
    model = build()
    x = batch()[0].relu().to_sparse(layout=layout)
    want = results(copy.deepcopy(model), x)
    if path == "gpu_path":
        request.getfixturevalue(path)
    fuse(model)
    with pytest.warns(UserWarning, match=f"up: x has the layout {layout}: PEFT's forward"):
        got = results(model, x)
    assert_close_derived(got, want)


@every_kind("conv1d", "adalora_conv1d")  # whose stock layers want x contiguous
def test_fused_layer_on_strided_input_equals_peft(kind: Kind) -> None:
    stock, fused = pair(kind.build())
    x = kind.input(3, 4).transpose(0, 1)[:, ::2]
    assert not x.is_contiguous()
    assert_close_derived(fused(x), stock(x))


BIASED = [(name, {"lora_bias": True}) for name in ("linear", "nf4", "nf4_loaded")]
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    *BIASED,
    ("linear", {"bias": "all"}),
    ("adalora", {"init_r": 1, "target_r": 1}),
    ("adalora", {"lora_alpha": -1}),
    ("dora", {"lora_dropout": 0.3}),  # the same mask too: it is PEFT's own, drawn once
    ("embedding", {"lora_dropout": 0.3}),  # which PEFT's embedding does not call
    *(("embedding", {"base": base}) for base in ({"padding_idx": 3}, {"scale_grad_by_freq": True})),
    *((name, {"r": r}) for name in ("linear", "embedding", "nf4", "nf4_loaded") for r in (1, 300)),
    *((name, {"use_rslora": True}) for name in ("linear", "dora", "embedding", "mica")),
    *((name, {"use_rslora": True}) for name in ("nf4", "nf4_loaded")),
]


@kinds_with(*CONFIGS)
@pytest.mark.parametrize("training", [True, False])
def test_fused_layer_of_every_configuration_equals_peft(
    kind: Kind, config: Any, training: bool
) -> None:
    stock, fused = (model.train(training) for model in pair(kind.build(**config)))
    assert type(kind.layer(fused)).__name__ == kind.fused
    x = kind.input(3, 4)
    assert_close_derived(seeded_results(fused, x), seeded_results(stock, x), terms=300)


@every_kind("dora", "embedding")  # which draw PEFT's, and none
@pytest.mark.parametrize("dropouts", [[0.3], [0.3, 0.5, 0.0]], ids=str)
def test_each_adapter_draws_a_mask_of_its_own(kind: Kind, dropouts: list[float]) -> None:
    model = several_adapters(
        kind.build(lora_dropout=0.3), *({"lora_dropout": p} for p in dropouts[1:])
    )
    stock, fused = pair(model)
    layer, x = kind.layer(fused), kind.input(3, 4)
    want = results(stock.eval(), x)
    assert_close_derived(results(fused.eval(), x), want)
    assert count_ops(lambda: layer(x)) == kind.forward
    got = seeded_results(fused.train(), x)
    set_masks(stock.train(), dict(zip(("default", "second"), dropouts, strict=False)))
    assert_close_derived(got, results(stock, x))
    assert sum(count_ops(lambda: layer(x)).values()) == len(dropouts)
    row = explain(fused.float()).rows[0]
    assert row.state in (KERNELS, LIBRARY) or len(dropouts) == 1


CONV1D = [("conv1d", {"use_rslora": True, "lora_dropout": 0.0}), ("conv1d", {"use_dora": True})]


@kinds_with(*((name, {}) for name in KINDS if name != "embedding"), *BIASED, *CONV1D)
@pytest.mark.parametrize("grad", [True, False])
def test_fused_layer_runs_one_op_and_no_other_product(kind: Kind, config: Any, grad: bool) -> None:
    """Defines "fused". (float64 runs on the eager backend, which is inside the op too.)"""
    stock, fused = pair(kind.build(**config))
    layer, x = kind.layer(fused), kind.input(3)
    assert_close_derived(results(fused, x), results(stock, x))
    x.requires_grad_(grad)
    norm = {"dora_norm": 1} if config.get("use_dora") else {}
    with torch.set_grad_enabled(grad):
        assert count_ops(lambda: layer(x)) == kind.forward | norm
    if grad:
        y = layer(x)
        assert count_ops(lambda: y.sum().backward()) == kind.backward


@kinds_with(*((name, {}) for name in KINDS if name != "dora"), *BIASED)
def test_active_adapters_share_one_op(kind: Kind, config: Any) -> None:
    stock, fused = pair(two_adapters(kind.build(**config)))
    x = kind.input(3, 4)
    got = results(fused, x)
    assert_close_derived(got, results(stock, x))
    assert any(".second" in name for name in got) or kind.fused == "FusedSVDLinear"
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert count_ops(lambda: kind.layer(fused)(x)) == kind.forward
    if kind.base != "Embedding":
        y = kind.layer(fused)(x)
        assert count_ops(lambda: y.sum().backward()) == kind.backward


@needs_native
@every_kind("embedding")
@pytest.mark.parametrize("training", [True, False])
def test_fused_layer_in_float32_runs_on_kernels(kind: Kind, training: bool) -> None:
    model = kind.build() if "dora_norm" in kind.forward else two_adapters(kind.build())
    stock, fused = (each.float().train(training) for each in pair(model))
    explain(fused).assert_fused(kernels=True)
    x, exact = kind.input(3, 4).float(), in_float64(stock)
    assert_as_exact(results(fused, x), results(exact, x.double()), results(stock, x))
    for factor in (1.0, 1.5):
        for name, p in [*stock.named_parameters(), *fused.named_parameters()]:
            if ".lora_" in name:
                p.data.mul_(factor)
        want = results(stock, x[:1, :1])["y"]
        with torch.no_grad():
            for _ in range(2):  # a second token goes the shorter way
                assert_close_derived(fused(x[:1, :1]), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert results(fused, x)["y"].dtype is results(stock, x)["y"].dtype


@every_kind()
def test_change_between_calls_without_gradients_equals_peft(kind: Kind) -> None:
    """Nothing that is kept outlives a change: of each parameter, the scaling, or the adapters.

    In training mode, since in eval mode bitsandbytes repacks the stock model's weights.
    """
    stock, fused = (each.float().train() for each in pair(kind.build()))
    x = kind.input(1, 1)
    x = x.float() if x.is_floating_point() else x

    @torch.no_grad()
    def call() -> Tensor:
        for _ in range(2):  # the second is the shorter way's first
            got = fused(x)
            assert_close_derived(got, stock(x))
        return got

    y = call()
    parameters = dict(kind.layer(stock).named_parameters())
    written = [n for n, p in parameters.items() if p.is_floating_point() and "bias" not in n]
    for name in written:
        for model in (stock, fused):
            kind.layer(model).get_parameter(name).data.mul_(1.5)  # counts no version
        before, y = y, call()
        assert (y - before).norm() > 2**-8 * before.norm(), name
    for model in (stock, fused):
        kind.layer(model).set_scale("default", 3)
        activate(two_adapters(model), "default")
    for names in (["default"], ["second"], ["default"], ["default", "second"]):
        for model in (stock, fused):
            activate(model, *names)
        before, y = y, call()
        assert (y - before).norm() > 2**-8 * before.norm(), names
    with torch.no_grad():
        assert_bitwise_equal(copy.deepcopy(fused)(x), y)


OTHERS = [(name, {"compute_dtype": None}) for name in ("nf4", "nf4_loaded")]


@kinds_with(*((name, {}) for name in KINDS), ("dora", {"lora_dropout": 0.2}), *OTHERS)
@pytest.mark.parametrize("adapters", [1, 2])
def test_training_after_fuse_follows_peft(kind: Kind, config: Any, adapters: int) -> None:
    model = kind.build(**config)
    stock, fused = pair(model if adapters == 1 else two_adapters(model))
    x = kind.input(3, 4)
    steps = 20 if "dora_norm" in kind.forward else 5  # whose norm changes with each step
    assert_trains_alike(fused, stock, lambda model, step: model(x), steps=steps)


@every_kind("nf4", "nf4_loaded")
@pytest.mark.parametrize("dtype", [f64, f32], ids=str)
def test_scaling_as_a_tensor_equals_a_number(kind: Kind, dtype: torch.dtype) -> None:
    """PEFT's prepare_model_for_compiled_hotswap makes scaling a tensor."""
    stock, fused = pair(kind.build())
    x, scaling = kind.input(3, 4), kind.layer(fused).scaling
    scaling["default"] = torch.tensor(scaling["default"], dtype=dtype)
    rtol = 2**-23 if (dtype, kind.dtype) == (f32, f64) else None  # 7/5 in float32
    assert_close_derived(results(fused, x), results(stock, x), rtol)
    for model in (stock, fused):
        kind.layer(model).set_scale("default", 3.0)
    assert_close_derived(results(fused, x), results(stock, x), rtol)


ONE = {"target_modules": ["up"]}  # a second layer is traced once more


@kinds_with(
    ("linear", {"lora_dropout": 0.3, "lora_bias": True} | ONE),
    ("embedding", {}),
    pytest.param("adalora", ONE, marks=pytest.mark.proof),
)
def test_compiled_model_equals_peft_without_a_graph_break(kind: Kind, config: Any) -> None:
    """A compiled model follows later changes: shapes, active adapters, train and eval."""
    torch.compiler.reset()  # of what other tests compiled there may only be so much
    stock, fused = pair(activate(two_adapters(kind.build(**config)), "default").eval())
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in (kind.input(3, 4), kind.input(2, 4)):
        assert_close_derived(results(compiled, x), results(stock, x))
    for model in (stock, fused):
        activate(model, "default", "second")
    assert_close_derived(results(compiled, x), results(stock, x))
    if config.get("lora_dropout"):
        fused.train()
        assert not torch.equal(compiled(x), compiled(x))


@every_kind("nf4", "nf4_loaded")
def test_functional_call_and_inference_mode_equal_peft(kind: Kind) -> None:
    stock, fused = pair(kind.build())
    x, other = kind.input(3, 4), {name: 2 * p.detach() for name, p in stock.named_parameters()}
    call = torch.func.functional_call
    with torch.no_grad():
        assert_close_derived(call(fused, other, (x,)), call(stock, other, (x,)))
    with torch.inference_mode():
        assert_close_derived(fused(x), stock(x))


@every_kind("adalora", "adalora_conv1d")
def test_arguments_that_only_variants_read_do_not_reach_the_base(kind: Kind) -> None:
    """PEFT's hooks hand them to every layer."""
    stock, fused = (kind.layer(model) for model in pair(kind.build()))
    names = ["adapter_names"]
    if "dora_norm" not in kind.forward:  # the variant, which reads the others
        names += getattr(lora.layer, "VARIANT_KWARG_KEYS", [])
    x, kwargs = kind.input(3), dict.fromkeys(names)
    assert_close_derived(fused(x, **kwargs), stock(x, **kwargs))
    assert count_ops(lambda: fused(x, **kwargs)) == kind.forward


# PEFT's life goes on


@every_kind()
@pytest.mark.parametrize("clone", CLONES)
def test_copy_of_a_fused_model_shares_nothing(kind: Kind, clone: Callable[[Any], Any]) -> None:
    model, x = fuse(kind.build()), kind.input(3, 4)
    other, want = clone(model), results(model, x)
    assert type(kind.layer(other)).__name__ == kind.fused
    assert_bitwise_equal(results(other, x), want)
    assert len(pickle.dumps(model)) < 1.1 * len(pickle.dumps(kind.build()))  # nothing is kept
    randomize(other, "default", seed=7)
    assert_bitwise_equal(results(model, x), want)
    changed = results(other, x)
    assert not torch.equal(changed["y"], want["y"])
    for t in model.state_dict().values():
        t.zero_()
    assert_bitwise_equal(results(other, x), changed)


@every_kind()
def test_unfuse_leaves_no_trace(kind: Kind) -> None:
    model, x = kind.build().eval().float(), kind.input(3, 4)
    x = x.float() if x.is_floating_point() else x
    layer, want, stock = kind.layer(model), model(x), copy.deepcopy(model)
    takes_names = kind.forward.keys() <= {"lora_linear", "addmm_"} and "SVD" not in kind.fused
    before, keys = (type(layer), vars(layer).copy()), list(model.state_dict())
    parameters = {name: id(p) for name, p in model.named_parameters()}
    for _ in range(2):  # fusing twice changes nothing
        assert fuse(model) is model and type(layer).__name__ == kind.fused
        assert list(model.state_dict()) == keys
        assert {name: id(p) for name, p in model.named_parameters()} == parameters
        assert {name: vars(layer)[name] for name in before[1]} == before[1]
        if takes_names:
            model(x, adapter_names=["default"] * 3)
        with torch.no_grad():
            for _ in range(2):  # the second is the shorter way's first
                model(x[:1, :1])
        model.train()(x).sum().backward()
        model.eval().zero_grad()
    assert unfuse(model) is model
    assert (type(layer), vars(layer)) == before and list(model.state_dict()) == keys
    assert_bitwise_equal(model(x), want)
    for each in (model, stock):
        randomize(each, seed=7)
    assert_bitwise_equal(model(x), stock(x))


@every_kind()
def test_saved_files_are_the_same_and_load(kind: Kind, tmp_path: Path) -> None:
    stock, fused = pair(kind.build())
    x = kind.input(3, 4)
    stock(x), fused(x)
    base = copy.deepcopy(stock).unload()
    assert_same_files(stock, fused, tmp_path, save_embedding_layers=False)
    if kind.base == "Linear4bit":  # loaded for inference, bitsandbytes' kernel rounds to bfloat16
        return
    want, got = (
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        for name in ("stock", "fused")
    )
    assert type(kind.layer(fuse(got))).__name__ == kind.fused
    assert_close_derived(got(x), want(x))
    # PEFT trains AdaLoRA's ranknum but does not save it, and truncates a KaSA's base once more.
    if kind.fused != "FusedSVDLinear" and kind.build is not kasa_mlp:
        assert_close_derived(got(x), stock(x))


@every_kind("nf4")  # which PEFT cannot merge
@pytest.mark.parametrize("adapters", [1, 2])
def test_merge_and_disable_are_pefts(kind: Kind, adapters: int) -> None:
    model = kind.build()
    if adapters == 2 and "dora_norm" not in kind.forward:
        two_adapters(model)
    stock, fused = pair(model)
    x, want, exact = kind.input(3, 4), stock(kind.input(3, 4)), kind.base != "Linear4bit"
    base = copy.deepcopy(stock).unload()(x)
    before = copy.deepcopy(stock.state_dict())

    def disabled() -> None:
        with stock.disable_adapter(), fused.disable_adapter():
            assert_bitwise_equal(fused(x), stock(x))
            assert all("disabled" in row.reason for row in explain(fused).rows)
            if exact:
                assert_close_derived(fused(x), base)

    disabled()
    for merged_when_disabled in (False, True):
        for model in (stock, fused):
            model.merge_adapter()
        assert_bitwise_equal(fused(x), stock(x))
        assert all("merged" in row.reason for row in explain(fused).rows)
        ops = count_ops(lambda: kind.layer(fused)(kind.input(3)))
        assert not ops.keys() & kind.forward.keys() and sum(ops.values()) <= 1  # the base's own
        if merged_when_disabled:  # whose forward takes the adapter out of the weight again
            disabled()
        else:
            for model in (stock, fused):
                model.unmerge_adapter()
        assert count_ops(lambda: kind.layer(fused)(kind.input(3))) == kind.forward
        assert_bitwise_equal(fused.state_dict(), stock.state_dict())
        assert_close_derived(fused(x), stock(x))
        if exact:
            assert_close_derived(fused(x), want)
            assert_close_derived(fused.state_dict(), before)
    got, want = fused.merge_and_unload(), stock.merge_and_unload()
    assert [type(module) for module in got.modules()] == [type(m) for m in want.modules()]
    assert_bitwise_equal(got(x), want(x))


@every_kind()
@pytest.mark.parametrize(("deleted", "left"), [("default", "second"), ("second", "default")])
def test_adapters_added_switched_and_deleted_equal_peft(kind, deleted, left) -> None:
    stock, fused = pair(kind.build())
    x = kind.input(3, 4)

    def results_equal_stock() -> dict[str, Tensor]:
        got = results(fused, x)
        assert_close_derived(got, results(stock, x))
        return got

    for model in (stock, fused):
        activate(two_adapters(model), "default")
    results_equal_stock()
    for active in (["second"], ["default"], ["default", "second"]):
        for model in (stock, fused):
            activate(model, *active)
        got = results_equal_stock()
        if kind.fused != "FusedSVDLinear":  # which trains one
            assert {a for a in ("default", "second") if any(f".{a}" in n for n in got)} == {*active}
    for model in (stock, fused):
        activate(model, left)
        model.delete_adapter(deleted)
    results_equal_stock()


@every_kind("embedding")
def test_all_linear_targets_the_bases_of_fused_layers(kind: Kind) -> None:
    """PEFT tells its own layers by "Linear" in the name of their class."""
    stock, fused = pair(kind.build())
    inference = {"inference_mode": True} if kind.fused == "FusedSVDLinear" else {}
    for model in (stock, fused):
        add_adapter(model, target_modules="all-linear", **inference)
    assert list(fused.state_dict()) == list(stock.state_dict())
