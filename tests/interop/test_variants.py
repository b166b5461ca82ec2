"""PEFT's variants of LoRA that are this equation, fused: KaSA, aLoRA, MiCA, and LoRA-FA.

Properties of every kind of layer, of a KaSA and a MiCA too, are in test_layer_kinds.py.
"""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from lora_kernels.backends.library import as_on_gpu
from lora_kernels.peft import explain, fuse
from lora_kernels.peft.explain_rows import LIBRARY
from tests.support.assertions import assert_close_derived
from tests.support.peft_models import (
    ALPHA,
    IDS,
    MLP,
    SIZES,
    Masked,
    R,
    activate,
    add_adapter,
    add_lora,
    assert_trains_alike,
    batch,
    count_ops,
    draw_rng,
    kasa_mlp,
    llama,
    loss_and_gradients,
    mlp,
    output,
    pair,
    randomize,
    results,
)

try:
    from peft import KasaConfig
except ImportError:
    pytest.skip("PEFT is older than 0.21, without KaSA", allow_module_level=True)

f32, f64 = torch.float32, torch.float64
KASA: dict[str, Any] = {"kasa_config": KasaConfig()}
MICA: dict[str, Any] = {"init_lora_weights": "mica"}


def up(model: Any) -> Any:
    return model.base_model.model.up


@pytest.mark.parametrize(("r", "alpha"), [(3, 4), (R, ALPHA)])
def test_two_kasas_share_a_call(r: int, alpha: int) -> None:
    """Stacked along the rank: the gate has each one's scaling and diagonal. PEFT refuses a KaSA
    beside plain LoRA."""
    model = kasa_mlp()
    add_adapter(model, r=r, lora_alpha=alpha)
    stock, fused = pair(activate(model, "default", "second"))
    assert_close_derived(results(fused, batch()), results(stock, batch()))
    assert count_ops(lambda: fused(batch())) == {"lora_linear": 2}


def test_kasa_of_rows_that_name_adapters_is_pefts() -> None:
    stock, fused = pair(kasa_mlp().eval())
    names = ["default", "__base__", "default"]
    got, want = (results(m, batch(), adapter_names=names) for m in (fused, stock))
    assert_close_derived(got, want)
    path = "a call with adapter_names does not take"
    reason = f"adapter 'default' is a KaSA, whose rank gate {path}"
    assert explain(fused).rows[0].reason == reason


def test_kasa_loaded_on_meta_truncates_as_peft(tmp_path: Path) -> None:
    """PEFT then truncates the base weight in the layer's first forward, which stays PEFT's."""
    kasa_mlp(f32).save_pretrained(tmp_path)

    def loaded() -> Any:
        torch.manual_seed(0)
        return PeftModel.from_pretrained(MLP(), tmp_path, low_cpu_mem_usage=True)

    stock, fused = loaded(), fuse(loaded())
    assert "truncates the base weight in PEFT's next forward" in explain(fused).rows[0].reason
    for _ in range(2):
        assert_close_derived(fused(batch(f32)), stock(batch(f32)))
    assert_close_derived(up(fused).base_layer.weight, up(stock).base_layer.weight)
    assert count_ops(lambda: fused(batch(f32))) == {"lora_linear": 2}


def test_mica_of_an_embedding_equals_peft() -> None:
    from tests.support.peft_models import embedding_model, token_ids

    torch.manual_seed(0)
    stock, fused = pair(embedding_model(f32, **MICA))
    assert_close_derived(results(fused, token_ids(3, 4)), results(stock, token_ids(3, 4)))
    assert "a lookup" in explain(fused).rows[0].reason


# aLoRA: the adapter is active from a sequence's invocation tokens on

ALORA: dict[str, Any] = {"alora_invocation_tokens": [7, 3]}
OFFSETS: list[list[int | None] | None] = [
    [2, None, 3],
    [4, 9, 4],  # all rows; an offset may point before x, as in decoding
    [None, None, None],
    [1, 0, 0],
    None,
]


def alora_mlp(dtype: torch.dtype = f64, **config: Any) -> Any:
    return mlp(dtype, **ALORA, **config)


class WithOffsets(nn.Module):
    """Both layers of an MLP, called with the keyword arguments that PEFT's hooks add."""

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__()
        self.model, self.kwargs = model, kwargs

    def forward(self, x: Tensor) -> Tensor:
        m = self.model.base_model.model
        return m.down(torch.tanh(m.up(x, **self.kwargs)), **self.kwargs)


def assert_alora_equals_peft(model: Any, x: Tensor, **kwargs: Any) -> dict[str, int]:
    """Compare results; where no row is active PEFT gives zeros, as we do."""
    stock, fused = (WithOffsets(m, **kwargs) for m in pair(model))
    assert_close_derived(results(fused, x), results(stock, x))
    return count_ops(lambda: fused(x))


@pytest.mark.parametrize("dtype", [f64, f32])
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_alora_equals_peft_in_one_op(offsets: Any, dtype: torch.dtype) -> None:
    kwargs = {} if offsets is None else {"alora_offsets": offsets}
    ops = assert_alora_equals_peft(alora_mlp(dtype), batch(dtype), **kwargs)
    everywhere = offsets is not None and all(o is not None and o >= 4 for o in offsets)
    assert ops == {"lora_linear" if everywhere else "multi_lora_linear": 2}


@pytest.mark.parametrize("offsets", [[1, None, 5], [1, 1, 1], [0, 0, None]], ids=str)
@pytest.mark.parametrize("shape", [(3,), (3, 1)], ids=str)
def test_alora_of_single_rows_equals_peft(shape: tuple[int, ...], offsets: Any) -> None:
    torch.manual_seed(1)
    x = torch.randn(*shape, SIZES[0], dtype=f64)
    assert_alora_equals_peft(alora_mlp(), x, alora_offsets=offsets)


def test_alora_beside_other_adapters_equals_peft() -> None:
    model = alora_mlp()
    add_adapter(model, "second", 5, r=3, lora_alpha=4, alora_invocation_tokens=None)
    add_adapter(model, "third", 6, r=2, lora_alpha=5)
    activate(model, "default", "second", "third")
    ops = assert_alora_equals_peft(model, batch(), alora_offsets=[2, None, 3])
    assert ops == {"lora_linear": 2, "multi_lora_linear": 4}
    row = explain(fuse(model)).rows[0]
    assert (row.state, row.backend) == (LIBRARY, "eager")  # as float64 always is
    ops = assert_alora_equals_peft(model, batch(), alora_offsets=[4, 4, 4])
    assert ops == {"lora_linear": 2}


@pytest.mark.parametrize("offsets", [[2, None, 3], [4, 4, 4], None], ids=str)
def test_alora_among_rows_that_name_adapters_equals_peft(offsets: Any) -> None:
    model = alora_mlp()
    add_adapter(model, "second", 5, r=3, lora_alpha=4, alora_invocation_tokens=None)
    for name, p in model.named_parameters():
        p.requires_grad_(".lora_" in name)
    names = ["default", "second", "default"]
    kwargs = {} if offsets is None else {"alora_offsets": offsets}
    ops = assert_alora_equals_peft(model, batch(), adapter_names=names, **kwargs)
    assert ops == {"multi_lora_linear": 2}


def test_rows_that_name_adapters_are_found_beside_another_default_device() -> None:
    fused, x = fuse(alora_mlp()), batch()
    kwargs = {"adapter_names": ["default"] * 3, "alora_offsets": [2, None, 3]}
    want = WithOffsets(fused, **kwargs)(x)
    with torch.device("meta"):
        assert torch.equal(WithOffsets(fused, **kwargs)(x), want)


def test_alora_draws_its_mask_by_rows() -> None:
    """The row of x gives the row of the mask, wherever the adapter is active."""
    stock, fused = pair(alora_mlp(lora_dropout=0.3).train())
    x, offsets = batch(), [2, None, 3]
    torch.manual_seed(4)
    got = up(fused)(x, alora_offsets=offsets)
    torch.manual_seed(4)
    dropped = Masked(draw_rng(), 0.3)(x)
    layer = up(stock).eval()
    want = layer.base_layer(x)
    for i, count in enumerate(offsets):
        if count:
            update = layer.lora_B["default"](layer.lora_A["default"](dropped[i, -count:]))
            want[i, -count:] += update * layer.scaling["default"]
    assert_close_derived(got, want)


def test_alora_over_a_4bit_base_equals_peft() -> None:
    linear = partial(pytest.importorskip("bitsandbytes").nn.Linear4bit, compute_dtype=f32)
    torch.manual_seed(0)
    model = add_lora(MLP(partial(linear, quant_type="nf4"), (64, 128, 40)).to("cpu"), **ALORA)
    stock, fused = (WithOffsets(m, alora_offsets=[2, None, 3]) for m in pair(model))
    x = torch.randn(3, 4, 64)
    # PEFT multiplies by a decoded weight, we decode in the kernel: two orders of the same sums.
    assert_close_derived(results(fused, x), results(stock, x), layers=4)
    assert count_ops(lambda: fused(x)) == {"multi_lora_linear_quantized": 2}


@pytest.mark.parametrize(
    ("config", "shape", "offsets", "reason"),
    [
        ({"lora_bias": True}, (3, 4), [2, None, 3], "an aLoRA, whose row index beside a lora_bias"),
        ({}, (3, 2, 2), None, None),
        ({}, (1, 4), [2, 2], None),
    ],
)
def test_other_aloras_are_pefts(
    config: Any, shape: tuple[int, ...], offsets: Any, reason: str | None
) -> None:
    """PEFT's result, or PEFT's error."""
    stock, fused = pair(alora_mlp(**config))
    x = torch.randn(*shape, SIZES[0], dtype=f64)
    found: list[Any] = []
    for model in (stock, fused):
        try:
            found.append(up(model)(x, alora_offsets=offsets))
        except (RuntimeError, IndexError) as error:
            found.append(str(error))
    if isinstance(found[0], str):
        assert found[1] == found[0]
    else:
        assert_close_derived(found[1], found[0])
    assert not any("lora" in op for op in count_ops_of(fused, x, offsets))
    if reason is not None:
        assert reason in explain(fused).rows[0].reason


def count_ops_of(model: Any, x: Tensor, offsets: Any) -> dict[str, int]:
    def call() -> None:
        with contextlib.suppress(RuntimeError, IndexError):
            up(model)(x, alora_offsets=offsets)

    return count_ops(call)


def test_an_alora_prepared_for_hot_swapping_is_pefts() -> None:
    stock, fused = pair(alora_mlp())
    for model in (stock, fused):
        up(model).scaling["default"] = torch.tensor(up(model).scaling["default"])
    x = batch()
    got, want = (up(model)(x, alora_offsets=[2, None, 3]) for model in (fused, stock))
    assert_close_derived(got, want)
    assert "an aLoRA, whose row index beside a scaling in a tensor" in explain(fused).rows[0].reason


def alora_llama(dtype: torch.dtype = f64) -> Any:
    config = LoraConfig(
        r=R, lora_alpha=ALPHA, task_type="CAUSAL_LM", target_modules="all-linear", **ALORA
    )
    model = get_peft_model(llama(dtype), config)
    randomize(model)
    return model


def invoked_ids() -> Tensor:
    """Return two sequences. The second has the invocation tokens, twice."""
    ids = IDS.clone()
    ids[ids == 7] = 8
    ids[1, 2:4] = ids[1, 5:7] = torch.tensor([7, 3])
    return ids


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=str)
def test_a_model_with_alora_trains_as_peft(checkpointing: bool | None) -> None:
    """checkpointing: transformers', with use_reentrant."""
    stock, fused = pair(alora_llama())
    for model in (stock, fused):
        model.train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    ids = invoked_ids()

    def loss(model: Any, step: int) -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    assert_trains_alike(fused, stock, loss, steps=3)


def test_alora_generates_as_peft() -> None:
    stock, fused = (model.eval() for model in pair(alora_llama()))
    tokens = [
        model.generate(input_ids=invoked_ids(), max_new_tokens=6, do_sample=False, pad_token_id=0)
        for model in (stock, fused)
    ]
    assert torch.equal(*tokens)
    with stock.disable_adapter():
        assert not torch.equal(output(stock, invoked_ids()), output(fused, invoked_ids()))


def with_head(**config: Any) -> tuple[Any, Any]:
    """Models with the variant on the output embedding: PEFT's, and one with a fused loss."""
    model = get_peft_model(llama(f32), LoraConfig(r=R, target_modules=["lm_head"], **config))
    randomize(model)
    return model.train(), fuse(copy.deepcopy(model), loss=True)


def test_a_fused_loss_leaves_an_alora_on_the_head_to_transformers() -> None:
    """The aLoRA is active in some rows; the sum of the loss's errors is one of 16 terms."""
    found = []
    for model in with_head(**ALORA):
        ids = invoked_ids()
        found.append(loss_and_gradients(model, ids))
        if found[1:]:
            (row,) = explain(model).losses
            path = "the loss without logits does not take"
            assert row.reason == f"its head: adapter 'default' is an aLoRA, whose row index {path}"
    assert found[0]["loss"] != loss_and_gradients(model, IDS)["loss"]
    assert_close_derived(*found, layers=4)


def test_a_fused_loss_takes_a_kasa_on_the_head() -> None:
    stock, fused = with_head(**KASA)
    assert fused(input_ids=IDS, labels=IDS, use_cache=False).logits is None
    got, want = (loss_and_gradients(model) for model in (fused, stock))
    assert any(".lora_diag." in name for name in got)
    assert_close_derived(got, want, layers=4)


# LoRA-FA: lora_A is frozen


def saved_sizes(model: Any, x: Tensor) -> list[tuple[int, ...]]:
    """Shapes that a forward saves beside parameters."""
    parameters, shapes = {p.data_ptr() for p in model.parameters()}, []

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in parameters and t.numel():
            shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return shapes


def one_layer(dtype: torch.dtype = f32, **config: Any) -> Any:
    torch.manual_seed(0)
    config = {"target_modules": ["0"], "r": R, "lora_alpha": ALPHA} | config
    return get_peft_model(nn.Sequential(nn.Linear(*SIZES[:2])).to(dtype), LoraConfig(**config))


def lora_fa(model: Any) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(model=model, r=R, lora_alpha=ALPHA, lr=1e-2)


def test_lora_fa_saves_no_input_and_mica_no_p() -> None:
    """One layer of fp32 rows: LoRA saves x and P, LoRA-FA P, and MiCA x."""
    x, rows = batch(f32), 3 * 4
    x_shape, p_shape = tuple(x.shape), (rows, R)
    stock, plain = pair(one_layer())
    assert sorted(saved_sizes(plain, x)) == sorted([x_shape, p_shape])
    lora_fa(stock), lora_fa(plain)
    assert saved_sizes(plain, x) == [p_shape]
    assert x_shape not in saved_sizes(stock, x)
    mica = fuse(one_layer(**MICA))
    assert saved_sizes(mica, x) == [x_shape]


def test_lora_fa_trains_as_peft() -> None:
    """PEFT's optimizer freezes lora_A and corrects the gradient of lora_B."""
    stock, fused = pair(mlp())

    def losses(model: Any) -> dict[str, Tensor]:
        optimizer, found = lora_fa(model), {}
        for step in range(4):
            loss = (model(batch()) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            found |= {f"{step} {n}": g for n, g in grads.items()} | {f"{step} loss": loss.detach()}
        return found

    got, want = losses(fused), losses(stock)
    assert got.keys() == want.keys() and any(".lora_B." in name for name in got)
    assert not any(".lora_A." in name for name in got)
    assert_close_derived(got, want, layers=8)


def test_alora_without_offsets_is_in_no_block() -> None:
    """Then it is active in no row."""
    names = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        r=4, task_type="CAUSAL_LM", target_modules=names, alora_invocation_tokens=[1, 2]
    )
    stock = get_peft_model(llama(), config)
    randomize(stock)
    ids = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(2))
    with as_on_gpu(), torch.no_grad():
        fused = fuse(copy.deepcopy(stock))
        want, got = (model.get_base_model()(ids).logits for model in (stock, fused))
        reasons = [row.reason for row in explain(fused).blocks]
    assert reasons and all("row index a block does not take" in reason for reason in reasons)
    assert_close_derived(got, want, layers=8)


def test_adalora_refuses_a_variant() -> None:
    """PEFT has none for it yet."""
    config = AdaLoraConfig(target_modules=["0"], init_r=4, target_r=2, total_step=10)
    model = fuse(get_peft_model(nn.Sequential(nn.Linear(64, 64)), config))
    model.base_model.model[0].lora_variant["default"] = DoraLinearVariant()
    (row,) = explain(model).rows
    assert "is a DoRA, whose formula a fused layer does not take" in row.reason
