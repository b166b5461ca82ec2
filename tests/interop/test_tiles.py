"""Gated MLPs in tiles of rows, on a CPU and on the path of a GPU, beside PEFT's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lora_kernels.integrations import FuseCallback
from lora_kernels.ops import tiles
from lora_kernels.peft import explain, fuse, mlp, unfuse
from tests.interop import test_mlp
from tests.interop.test_groups import parent_of
from tests.interop.test_mlp import K, adapted, input_of, transformers_mlp
from tests.support.assertions import assert_as_exact, assert_bitwise_equal, assert_close_derived
from tests.support.peft_models import activate, add_adapter, in_float64

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
ROWS = 7


@pytest.fixture(params=["cpu", "gpu path"], autouse=True)
def path(request: Any) -> Iterator[str]:
    """On the GPU path each tile is a block."""
    if request.param == "gpu path":
        request.getfixturevalue("gpu_path")
    yield request.param


def pair(dtype: torch.dtype = f64, rows: Any = ROWS, act: str = "silu", **options: Any) -> Any:
    stock = adapted(transformers_mlp(act=act, bias=options.pop("bias", False)), dtype, **options)
    return stock, fuse(copy.deepcopy(stock), mlp_tile_rows=rows)


def step(
    model: Any, x: Tensor, call: Callable[..., Tensor] | None = None, autocast: bool = False
) -> dict[str, Tensor]:
    """y, dx and the gradients of all trained parameters."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    with torch.autocast("cpu", bf16, enabled=autocast):
        y = model(x) if call is None else call(model, x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=f64).to(y.dtype)
    y.backward(dy)
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return {name: t.clone() for name, t in found.items() if t is not None}


def assert_pefts(stock: Any, fused: Any, x: Tensor, *args: Any) -> None:
    got, want = step(fused, x, *args), step(stock, x, *args)
    if x.dtype is f64:
        assert_close_derived(got, want, 1e-12)
    else:
        exact = x.detach().double().requires_grad_(x.requires_grad)
        assert_as_exact(got, step(in_float64(stock), exact, *args[:1]), want)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the rows of each tile that a forward or a backward computes."""
    found: list[int] = []
    for name in ("forward", "again"):
        run = getattr(mlp._Rows, name)

        def record(self: Any, x: Tensor, *kept: Any, run: Any = run) -> Any:
            found.append(x.shape[-2])
            return run(self, x, *kept)

        monkeypatch.setattr(mlp._Rows, name, record)
    return found


SHAPES = [(2, 40), (15,), (8,), (1, 8), (3, 1, 5), (7,), (1,), (0,), ()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_of_any_rows_have_pefts_gradients(shape: tuple[int, ...], calls: list[int]) -> None:
    stock, fused = pair()
    x = torch.ones(K, dtype=f64) if not shape else input_of(f64, *shape)
    assert_pefts(stock, fused, x.requires_grad_())
    M = x.shape[:-1].numel()
    assert calls == (tiles.tile_rows(M, ROWS) * 2 if M > ROWS and shape else [])


@pytest.mark.parametrize("of", ["float64", "float32", "bf16", "autocast", "nf4"])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("needs_x", [True, False], ids=["dx", "no dx"])
def test_gradients_are_as_exact_as_pefts(of: str, act: str, needs_x: bool, calls: Any) -> None:
    if of == "nf4":
        pytest.importorskip("bitsandbytes")
    dtype = {"float64": f64, "bf16": bf16}.get(of, f32)
    stock, fused = pair(dtype, act=act, bias=True, nf4=of == "nf4")
    x = input_of(dtype).requires_grad_(needs_x)
    assert_pefts(stock, fused, x, None, of == "autocast")
    assert len(calls) == 2 * 12


@pytest.mark.parametrize("change", test_mlp.TRAINED)
def test_frozen_parts_have_no_gradient(change: str) -> None:
    stock, fused = pair(bias=True)
    for model in (stock, fused):
        test_mlp.TRAINED[change](model)
    assert_pefts(stock, fused, input_of(f64))


@pytest.mark.parametrize("config", [{"lora_bias": True}, {"use_dora": True}], ids=str)
def test_other_adapters_have_pefts_gradients(config: dict[str, Any]) -> None:
    stock = get_peft_model(
        nn.Sequential(transformers_mlp(bias=True)).double(),
        LoraConfig(r=5, target_modules=["gate_proj", "up_proj", "down_proj"], **config),
    )
    for p in stock.parameters():
        p.data = torch.randn_like(p) * 0.2
    fused = fuse(copy.deepcopy(stock), mlp_tile_rows=ROWS)
    assert_pefts(stock, fused, input_of(f64).requires_grad_())


def test_two_adapters_and_a_switch_between_calls() -> None:
    stock, fused = pair()
    for model in (stock, fused):
        torch.manual_seed(1)
        add_adapter(model, "second", 5, r=3)
    fuse(fused, mlp_tile_rows=ROWS)
    for names in (["second"], ["default", "second"], ["default"]):
        for model in (stock, fused):
            activate(model, *names)
        assert_pefts(stock, fused, input_of(f64).requires_grad_())


class InTiles(nn.Module):
    """The same tiles, by a loop."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        parts = x.view(-1, K).split(tiles.tile_rows(x.shape[:-1].numel(), ROWS))
        return torch.cat([self.model(t[None])[0] for t in parts]).view(x.shape)


@pytest.mark.parametrize("dtype", [f64, f32], ids=str)
def test_dropout_draws_the_masks_of_the_forward_again(dtype: torch.dtype) -> None:
    stock = adapted(transformers_mlp(), dtype, lora_dropout=0.5).train()
    fused = fuse(copy.deepcopy(stock), mlp_tile_rows=ROWS)
    loop = InTiles(fuse(copy.deepcopy(stock)))
    x = input_of(dtype).requires_grad_()
    found = []
    for model in (fused, loop):
        torch.manual_seed(3)
        got = step(model, x)
        found.append({name.removeprefix("model."): t for name, t in got.items()})
        found[-1]["next"] = torch.rand(3)  # the backward leaves the generator as it was
    assert_close_derived(*found, 1e-12 if dtype is f64 else 1e-5)
    assert (found[0]["y"] - step(fused.eval(), x)["y"]).norm() > 0.1


def reentrant(model: Any, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=True)  # type: ignore[no-any-return]


def not_reentrant(model: Any, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)  # type: ignore[no-any-return]


def selective(model: Any, x: Tensor) -> Tensor:
    from functools import partial

    saved = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    return checkpoint(model, x, use_reentrant=False, context_fn=saved)  # type: ignore[no-any-return]


def offloaded(model: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("call", [reentrant, not_reentrant, selective, offloaded])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpoints_have_the_same_gradients(call: Any, dropout: float, calls: Any) -> None:
    stock = adapted(transformers_mlp(), f64, lora_dropout=dropout).train()
    fused = fuse(stock, mlp_tile_rows=ROWS)
    x = input_of(f64).requires_grad_()
    torch.manual_seed(3)
    want = step(fused, x)
    calls.clear()
    torch.manual_seed(3)
    assert_close_derived(step(fused, x, call), want, 1e-12)
    # A checkpoint that is not reentrant stops at x, before the second forward.
    assert len(calls) == 12 * (3 if call is reentrant else 2)


def test_only_x_is_saved() -> None:
    _, fused = pair()
    x, saved = input_of(f64).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(x)
    assert len(saved) == 1 and saved[0].data_ptr() == x.data_ptr()


def test_second_backward_equals_the_first() -> None:
    _, fused = pair()
    x = input_of(f64).requires_grad_()
    y = fused(x)
    wanted = [x, *(p for p in fused.parameters() if p.requires_grad)]
    first, second = (torch.autograd.grad(y.sum(), wanted, retain_graph=True) for _ in range(2))
    assert_bitwise_equal([*first], [*second])
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_bitwise_equal([dx], [first[0]])


def test_backward_that_is_differentiated_raises_the_remedy() -> None:
    _, fused = pair()
    x = input_of(f64).requires_grad_()
    (dx,) = torch.autograd.grad(fused(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="unfuse"):
        dx.sum().backward()


def test_several_dy_at_once() -> None:
    _, fused = pair()
    x = input_of(f64).requires_grad_()
    wanted = [x, *(p for p in fused.parameters() if p.requires_grad)]
    y = fused(x)
    dys = torch.randn(2, *y.shape, generator=torch.Generator().manual_seed(5), dtype=f64)
    found = torch.autograd.grad(y, wanted, dys, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, wanted, dy, retain_graph=True) for dy in dys]
    for got, *want in zip(found, *each, strict=True):
        assert_close_derived({"": got}, {"": torch.stack(want)}, 1e-12)


@pytest.mark.parametrize("operand", test_mlp.OPERANDS)
@pytest.mark.parametrize("projection", test_mlp.PROJECTIONS)
def test_write_to_an_operand_before_the_backward_raises(projection: str, operand: str) -> None:
    _, fused = pair()
    y = fused(input_of(f64))
    with torch.no_grad():
        parent_of(fused).get_submodule(f"{projection}.{operand}").weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_write_to_x_before_the_backward_raises_and_to_y_changes_nothing() -> None:
    _, fused = pair()
    x = input_of(f64).requires_grad_()
    want = step(fused, x)
    h = x * 1.0
    y = fused(h)
    y += 1
    h.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

    def add(model: Any, x: Tensor) -> Tensor:
        y: Tensor = model(x)
        y += 1
        return y

    got = step(fused, x, add)
    assert_bitwise_equal(got | {"y": want["y"]}, want)


class Rows:
    """A function of rows by PyTorch's ops, whose parameter autocast casts."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def like(self, x: Tensor) -> tuple[int, torch.dtype]:
        y = self.again(x[:1], None)
        return y.shape[-1], y.dtype

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.again(x, None), None

    def again(self, x: Tensor, kept: None) -> Tensor:
        return torch.nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_caches_no_cast_without_a_graph(backward_inside: bool) -> None:
    """A later call of the same parameter in the region has its gradient too."""
    weight = torch.randn(4, K, requires_grad=True)
    x, f = input_of(f32), Rows(weight)
    with torch.autocast("cpu", bf16):
        tiled = tiles.call(f, x, ROWS, [weight])
        whole = f.again(x, None)
        assert tiled.dtype is whole.dtype is bf16
        if backward_inside:
            grads = [torch.autograd.grad(y.sum(), weight)[0] for y in (tiled, whole)]
    if not backward_inside:
        grads = [torch.autograd.grad(y.sum(), weight)[0] for y in (tiled, whole)]
    assert (grads[0] - grads[1]).norm() <= 2.0**-7 * grads[1].norm()


def test_gradients_of_many_tiles_add_up_in_float32() -> None:
    """As positive numbers, whose sum outgrows bfloat16's last digit of each."""
    x = torch.rand(64 * ROWS, K, generator=torch.Generator().manual_seed(0)).to(bf16)
    weight = torch.zeros(4, K, dtype=bf16, requires_grad=True)
    tiles.call(Rows(weight), x, ROWS, [weight]).sum().backward()
    exact = x.double().sum(0).expand(4, K)
    assert weight.grad is not None
    # Each tile's gradient is rounded once, and their sum once.
    assert (weight.grad - exact).abs().max() <= 2.0**-8 * exact.max()


def test_a_parameter_that_the_call_leaves_out_has_no_gradient(calls: list[int]) -> None:
    """As an adapter that is trained by other calls."""
    stock, fused = pair()
    for model in (stock, fused):
        torch.manual_seed(1)
        add_adapter(model, "second", 5, r=3)
        activate(model, "default")
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.requires_grad_()
    fuse(fused, mlp_tile_rows=ROWS)
    assert_pefts(stock, fused, input_of(f64).requires_grad_())
    assert len(calls) == 24
    x, weight, other = input_of(f64), torch.randn(4, K, dtype=f64), torch.zeros(3, dtype=f64)
    parameters = [weight.requires_grad_(), other.requires_grad_()]
    tiles.call(Rows(weight), x, ROWS, parameters).sum().backward()
    assert weight.grad is not None and other.grad is None


def test_without_gradients_a_tile_at_a_time(calls: list[int]) -> None:
    stock, fused = pair()
    x = input_of(f64)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_close_derived({"": fused(x)}, {"": stock(x)}, 1e-12)
    assert len(calls) == 24


def test_training_follows_peft_step_by_step() -> None:
    """With an evaluation between steps; the fused optimizer moves no version counter."""
    stock, fused = pair(f64)
    x = input_of(f64)
    for model in (stock, fused):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 0.01, fused=True)
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.eval()(x)
            model.train()
    found, want = ({n: p.detach() for n, p in m.named_parameters()} for m in (fused, stock))
    assert_close_derived(found, want, 1e-9)


def hooked(model: Any) -> None:
    parent_of(model).up_proj.register_forward_hook(lambda *args: None)


def hooked_inside(model: Any) -> None:
    parent_of(model).up_proj.base_layer.register_forward_pre_hook(lambda *args: None)


def replaced(model: Any) -> None:
    layer = parent_of(model).down_proj
    layer.forward = lambda x: type(layer).forward(layer, x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "up_proj: a hook sits on it, which would see the tiles"),
        (hooked_inside, "up_proj.base_layer: a hook sits on it, which would see the tiles"),
        (replaced, "down_proj: its forward was replaced"),
    ],
)
def test_what_would_see_the_tiles_sees_all_rows(change: Any, reason: str, calls: Any) -> None:
    stock, fused = pair()
    change(fused)
    assert_pefts(stock, fused, input_of(f64).requires_grad_())
    assert not calls
    assert any(reason in row.reason for row in explain(fused).blocks)


def test_compiled_call_computes_all_rows(calls: list[int]) -> None:
    stock, fused = pair(f32)
    x = input_of(f32).requires_grad_()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_pefts(stock, fused, x, lambda model, x: (compiled if model is fused else model)(x))
    assert not calls


def test_transforms_compute_all_rows(calls: list[int]) -> None:
    stock, fused = pair()
    x = input_of(f64)
    assert_close_derived({"": vmap(fused)(x)}, {"": vmap(stock)(x)}, 1e-12)
    assert not calls


def test_auto_is_the_columns_of_x_and_at_least_1024() -> None:
    _, fused = pair(rows="auto")
    assert parent_of(fused)._tile_rows == 1024
    with torch.device("meta"):
        stock = adapted(transformers_mlp(K=2048), f32)
    assert parent_of(fuse(stock, mlp_tile_rows="auto"))._tile_rows == 2048


@pytest.mark.parametrize("rows", [0, -1, True, 1.5, "all"])
def test_rows_that_are_no_number_raise_before_anything_changes(rows: Any) -> None:
    stock = adapted(transformers_mlp(), f64)
    before = type(parent_of(stock))
    want = 'mlp_tile_rows: got .*, want a positive number, "auto" or None'
    with pytest.raises(ValueError, match=want):
        fuse(stock, mlp_tile_rows=rows)
    assert type(parent_of(stock)) is before
    with pytest.raises(ValueError, match=want):
        FuseCallback(mlp_tile_rows=rows)


def test_the_last_fuse_decides_and_unfuse_restores(calls: list[int]) -> None:
    stock, fused = pair()
    x = input_of(f64)
    fuse(fused)
    assert_pefts(stock, fused, x)
    assert not calls
    FuseCallback(mlp_tile_rows=ROWS).on_init_end(None, None, None, model=fused)
    assert_pefts(stock, fused, x)
    assert calls
    unfuse(fused)
    assert vars(parent_of(fused)).keys() == vars(parent_of(stock)).keys()


def test_tiles_without_blocks(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    stock = adapted(transformers_mlp(), f64)
    fused = fuse(copy.deepcopy(stock), blocks=False, mlp_tile_rows=ROWS)
    monkeypatch.setattr(mlp.direct, "make_block", None)
    assert_pefts(stock, fused, input_of(f64))
    assert len(calls) == 24


def test_copies_keep_their_tiles(calls: list[int]) -> None:
    stock, fused = pair()
    assert_pefts(stock, copy.deepcopy(fused), input_of(f64))
    assert len(calls) == 24


def test_explain_says_how_many_rows_a_tile_has() -> None:
    _, fused = pair()
    (row,) = [row for row in explain(fused).blocks if "tiles" in row.strategy]
    assert row.strategy.endswith(", in tiles of at most 7 rows")
    assert "computes each tile's forward again" in row.reason
