"""`fuse(model, loss=True)`: transformers' losses and gradients, and the rest as before."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_kernels.core.problem import Choice
from lora_kernels.ops import linear
from lora_kernels.peft import StreamedLinear, explain, fuse, unfuse
from lora_kernels.peft.explain_rows import KERNELS, LIBRARY, TORCH
from tests.support.assertions import assert_as_exact
from tests.support.peft_models import (
    ALPHA,
    IDS,
    TINY,
    R,
    activate,
    add_adapter,
    in_float64,
    permute_weights,
    randomize,
)

LABELS = IDS.clone()
LABELS[0, :4] = -100
# A soft cap, a scale, a divisor, a bias, and none of them; test_loss_classes.py has every class.
CLASSES = [f"{name}ForCausalLM" for name in ("Llama", "Gemma2", "Cohere", "Granite", "Phi")]


def causal_model(
    name: str = "LlamaForCausalLM", dtype: Any = torch.float32, **settings: Any
) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    more = {"pad_token_id": 0, "head_dim": 6, "logit_scale": 0.5, "logits_scaling": 3.0}
    if cls.config_class.model_type.startswith(("gemma2", "gemma3", "vault")):
        more["final_logit_softcapping"] = 2.0
    if name == "PhiForCausalLM":
        more = {"hidden_size": 32}  # half of a head of 8 is rotated
    if name == "SeedOssForCausalLM":
        more |= {"attention_dropout": 0.0, "residual_dropout": 0.0}
    config = cls.config_class(**TINY | more | settings)
    config._attn_implementation = "eager"
    model = cls(config).to(dtype)
    if model.lm_head.bias is not None:  # which starts at zero
        nn.init.normal_(model.lm_head.bias)
    return model


def adapted(model: Any, targets: Any = ("lm_head", "q_proj"), **config: Any) -> Any:
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": [*targets]} | config
    peft_model = get_peft_model(model, LoraConfig(**settings))
    randomize(peft_model)
    return peft_model


def step(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, and each gradient by name."""
    model.zero_grad()
    given = {"input_ids": IDS, "labels": LABELS} | inputs
    loss = model(**given).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_same_step(ours: Any, theirs: Any, exact: Any = None, **inputs: Any) -> None:
    """Pooled over four batches, each with other weights. exact: theirs in float64."""
    exact = in_float64(theirs) if exact is None else exact
    found: list[list[dict[str, Tensor]]] = [[], [], []]
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        permute_weights((ours, exact, theirs), generator)
        given = {"input_ids": torch.randint(61, IDS.shape, generator=generator)} | inputs
        for results, model in zip(found, (ours, exact, theirs), strict=True):
            loss, grads = step(model, **given)
            assert grads
            results.append({"loss": loss} | grads)
    assert_as_exact(*found)


def is_logit_free(model: Any) -> bool:
    return model(input_ids=IDS, labels=LABELS).logits is None


def pair(model: Any, **options: Any) -> tuple[Any, Any]:
    return fuse(copy.deepcopy(model), loss=True, **options), model


def with_every_layer(name: str) -> Any:
    model = causal_model(name)
    targets = [n for n, m in model.named_modules() if n == "lm_head" or "layers.0" in n]
    return adapted(model, [n for n in targets if isinstance(model.get_submodule(n), nn.Linear)])


def with_two_adapters(name: str) -> Any:
    """Each with a bias of lora_B; Phi's head has one of its own too."""
    model = adapted(causal_model(name), lora_bias=True)
    add_adapter(model, r=3, lora_alpha=4)
    return activate(model, "default", "second")


def with_head(*targets: str, tied: bool = False) -> Any:
    model = causal_model(tie_word_embeddings=tied)
    return adapted(model, targets)


def with_trained_norm() -> Any:
    """x of the head trains, so that there is a gradient without an adapter."""
    model = with_head("lm_head")
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def merge(model: Any) -> None:
    model.merge_adapter()


def disable(model: Any) -> None:
    model.base_model.disable_adapter_layers()


# A model, and changes to it after `fuse`.
MODELS: dict[str, tuple[Callable[[], Any], tuple[Callable[[Any], None], ...]]] = {
    **{name: (partial(with_every_layer, name), ()) for name in CLASSES},
    "no adapter on the head": (partial(with_head, "q_proj"), ()),
    "none on a tied head": (partial(with_head, "q_proj", tied=True), ()),
    "head alone": (partial(with_head, "lm_head"), ()),
    "tied head alone": (partial(with_head, "lm_head", tied=True), ()),
    # Embeddings that are tied have a gradient of two parts; Phi's head has a bias.
    "Llama, whole": (partial(causal_model, tie_word_embeddings=True), ()),
    "Phi, whole": (partial(causal_model, "PhiForCausalLM", tie_word_embeddings=True), ()),
    "Llama, two adapters": (partial(with_two_adapters, "LlamaForCausalLM"), ()),
    "Phi, two adapters": (partial(with_two_adapters, "PhiForCausalLM"), ()),
    "merged": (with_trained_norm, (merge,)),
    "disabled": (with_trained_norm, (disable,)),
    # PEFT takes the adapter out of the weight in its next forward.
    "merged, then disabled": (with_trained_norm, (merge, disable)),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_of_each_model_and_its_gradients_are_transformers(name: str) -> None:
    build, changes = MODELS[name]
    ours, theirs = pair(build().train())
    for model, change in itertools.product((ours, theirs), changes):
        change(model)
    assert_same_step(ours, theirs)
    assert is_logit_free(ours)
    assert_same_step(ours, theirs, num_items_in_batch=torch.tensor(31))


def test_loss_of_a_streamed_head_needs_no_logits() -> None:
    ours, theirs = pair(with_head("q_proj").train(), linears=True)
    assert type(ours.get_base_model().lm_head) is StreamedLinear and is_logit_free(ours)
    assert_same_step(ours, theirs)


def test_loss_arguments_are_passed_on() -> None:
    ours, theirs = pair(adapted(causal_model()).train())
    shifted = torch.nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:].contiguous()
    shifted[1, 3] = 7
    for inputs in (
        {"shift_labels": shifted},
        {"labels": IDS, "ignore_index": int(IDS[1, 2])},
        {"num_items_in_batch": 5},
        {"attention_mask": (torch.arange(9) < 7).long().expand(2, -1)},
        {"use_cache": False},
    ):
        assert is_logit_free(ours)
        assert_same_step(ours, theirs, **inputs)


def test_positional_arguments_and_outputs_are_transformers() -> None:
    ours, theirs = (m.get_base_model() for m in pair(adapted(causal_model()).train()))
    got, want = (m(IDS, None, labels=LABELS, output_hidden_states=True) for m in (ours, theirs))
    assert [*got] == [name for name in want if name != "logits"]
    torch.testing.assert_close(got.hidden_states[-1], want.hidden_states[-1])
    first, *rest = ours(IDS, labels=LABELS, return_dict=False)
    assert torch.equal(first, got.loss) and all(value is not None for value in rest)
    assert len(rest) == len(theirs(IDS, labels=LABELS, return_dict=False)) - 2
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)


def test_evaluation_and_logits_to_keep_have_logits_as_before() -> None:
    ours, theirs = pair(adapted(causal_model()).train())
    for inputs in ({"input_ids": IDS}, {"input_ids": IDS, "logits_to_keep": 2}):
        torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits)
    kept = {"input_ids": IDS, "labels": LABELS[:, -3:], "logits_to_keep": 3}
    torch.testing.assert_close(ours(**kept).logits, theirs(**kept).logits)
    kept |= {"logits_to_keep": torch.tensor([0]), "labels": LABELS[:, :1]}
    torch.testing.assert_close(ours(**kept).logits, theirs(**kept).logits)
    got, want = (m.eval()(input_ids=IDS, labels=LABELS) for m in (ours, theirs))
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.loss, want.loss)


def test_loss_of_dropout_on_the_head_draws_a_mask() -> None:
    model = fuse(adapted(causal_model(), ["lm_head"], lora_dropout=0.5).train(), loss=True)
    torch.manual_seed(3)
    first, grads = step(model)
    again, _ = step(model)
    torch.manual_seed(3)
    third, wanted = step(model)
    assert first != again and torch.equal(first, third)
    assert all(torch.equal(grads[name], wanted[name]) for name in grads)


def _hooked(model: Any) -> None:
    model.base_model.model.lm_head.register_forward_hook(lambda *args: None)


def _double(module: Any, args: Any, y: Tensor) -> Tensor:
    return 2 * y


def _hooked_base(model: Any) -> None:
    model.base_model.model.lm_head.base_layer.register_forward_hook(_double)


def _hooked_A(model: Any) -> None:
    model.base_model.model.lm_head.lora_A["default"].register_forward_hook(_double)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _plain_head_of_another_class(model: Any) -> None:
    head = model.base_model.unload().lm_head
    head.__class__ = Doubled
    model.base_model.model.model.norm.weight.requires_grad_(True)


def _patched(model: Any) -> None:
    head = model.base_model.model.lm_head
    head.forward = lambda x: type(head).forward(head, x)


def _replaced_loss(model: Any) -> None:
    causal = model.base_model.model
    causal.loss_function = lambda *args, **kwargs: 2 * losses_of(*args, **kwargs)


def losses_of(*args: Any, **kwargs: Any) -> Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    found: Tensor = ForCausalLMLoss(*args, **kwargs)
    return found


@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        (_hooked, {}, "a hook sits on it"),
        (_hooked_base, {}, "a hook sits on it"),
        (_hooked_A, {}, "adapter 'default': a hook sits on it"),
        (_plain_head_of_another_class, {}, "Doubled"),
        (_patched, {}, "its forward was replaced"),
        (_replaced_loss, {}, "its loss_function was replaced"),
        (
            None,
            {"use_dora": True},
            "DoRA, whose column scale the loss without logits does not take",
        ),
    ],
)
@pytest.mark.parametrize("name", ["CohereForCausalLM", "Gemma2ForCausalLM"])
def test_loss_that_needs_logits_computes_them_and_explain_says_why(
    name: str, change: Any, config: Any, reason: str
) -> None:
    model = adapted(causal_model(name), **config)
    ours, theirs = pair(model.train())
    exact = in_float64(theirs)
    for model in (ours, theirs, exact):
        if change is not None:
            change(model)
    assert not is_logit_free(ours)
    assert_same_step(ours, theirs, exact)
    assert_same_step(ours, theirs, exact, num_items_in_batch=5)
    (row,) = explain(ours).losses
    assert (row.layer, row.state) == ("base_model.model.loss", TORCH)
    assert reason in row.reason


class Metered(transformers.LlamaForCausalLM):
    """Reads its own logits in a training step."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> Any:
        logits: Any = self.lm_head(self.model(input_ids).last_hidden_state)
        self.entropy = -logits.softmax(-1).logsumexp(-1).mean()
        loss = None if labels is None else self.loss_function(logits, labels, 61)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def test_op_that_reads_the_logits_is_named_after_the_step() -> None:
    base = causal_model()
    base.__class__ = Metered
    ours, theirs = pair(adapted(base).train())
    assert explain(ours).losses[0].state == KERNELS
    assert not is_logit_free(ours)
    assert_same_step(ours, theirs)
    (row,) = explain(ours).losses
    assert (row.state, "softmax" in row.reason) == (TORCH, True), row


def test_head_is_itself_after_a_forward_that_raised() -> None:
    """Before the model has called it."""
    ours, theirs = pair(adapted(causal_model()).train())
    norm = ours.get_base_model().model.norm

    def fail(*args: Any) -> None:
        raise KeyError("norm")

    handle = norm.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="norm"):
        ours(input_ids=IDS, labels=LABELS)
    handle.remove()
    assert "forward" not in vars(ours.get_base_model().lm_head)
    logits = ours(input_ids=IDS).logits
    assert type(logits) is Tensor
    torch.testing.assert_close(logits, theirs(input_ids=IDS).logits)


def test_replaced_loss_function_gets_what_transformers_gives_it() -> None:
    """Not the model's own arguments."""

    def mine(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
        return logits[:, :-1].flatten(0, 1)[:, :vocab_size].logsumexp(1).mean() + labels.sum()

    model = adapted(causal_model())
    model.base_model.model.loss_function = mine
    ours, theirs = pair(model.train())
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": LABELS}
    models = (ours, in_float64(theirs), theirs)
    assert_as_exact(*({"loss": each(**inputs, use_cache=False).loss} for each in models))


def test_loss_of_two_dropouts_on_the_head_computes_logits() -> None:
    model = adapted(causal_model(), ["lm_head"], lora_dropout=0.1)
    add_adapter(model, lora_dropout=0.2)
    model = fuse(activate(model, "default", "second").train(), loss=True)
    assert not is_logit_free(model)
    assert "each with dropout of its own" in explain(model).losses[0].reason
    activate(model, "default")
    assert is_logit_free(model)


@pytest.mark.parametrize("names", ["second", "__base__"])
def test_adapters_that_rows_of_evaluation_named_do_not_train(names: str) -> None:
    """The step after it has the active adapter again."""
    model = adapted(causal_model(), ["lm_head"])
    add_adapter(model, r=3)
    ours, theirs = pair(activate(model, "default"))
    ours.eval()(input_ids=IDS, adapter_names=[names] * len(IDS))
    assert_same_step(ours.train(), theirs.train())
    assert is_logit_free(ours)


def test_loss_of_a_4bit_head_is_computed_in_its_compute_dtype() -> None:
    from bitsandbytes.nn import Linear4bit

    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = causal_model(hidden_size=64)
        head = model.lm_head
        model.lm_head = Linear4bit(64, head.out_features, bias=False, compute_dtype=dtype)
        model.lm_head.load_state_dict(head.state_dict())
        model.lm_head.to("cpu")  # quantizes
        ours = fuse(adapted(model).train(), loss=True)
        assert is_logit_free(ours)
        found.append(ours(input_ids=IDS, labels=LABELS).loss.detach())
        ours.base_model.disable_adapter_layers()
        found.append(ours(input_ids=IDS, labels=LABELS).loss.detach())
    torch.testing.assert_close(found[2:], found[:2], rtol=2**-7, atol=0)
    assert found[0] != found[2] and found[1] != found[3]


def test_forward_that_was_replaced_before_fuse_stays() -> None:
    model = adapted(causal_model()).train()
    causal = model.get_base_model()
    causal.forward = mine = lambda **inputs: type(causal).forward(causal, **inputs)
    fuse(model, loss=True)
    assert causal.forward is mine and not is_logit_free(model)
    assert explain(model).losses[0].reason == "its forward was replaced"


def test_explain_and_json_have_the_loss() -> None:
    model = adapted(causal_model())
    assert explain(model).losses == []
    fuse(model, loss=True)
    (row,) = explain(model).losses
    assert (row.state, row.backend) == (KERNELS, "cpu")
    assert "rows of logits at a time" in row.reason
    assert "base_model.model.loss" in str(explain(model)) and '"losses"' in explain(model).json()
    explain(model).assert_fused()
    (row,) = explain(model, x_dtype=torch.float64).losses
    assert "float64 goes with float64 alone" in row.reason
    assert explain(unfuse(model)).losses == []


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_explain_names_the_backend_that_computes_the_loss(
    dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head's dropout has a mask of rows, which the eager backend alone takes."""
    model = fuse(adapted(causal_model(), ["lm_head"], lora_dropout=dropout_p).train(), loss=True)
    found, choose = set(), linear.choose

    def record(*args: Any) -> Choice:
        choice = choose(*args)
        found.add(choice.backend)
        return choice

    monkeypatch.setattr(linear, "choose", record)
    step(model)
    monkeypatch.undo()
    (row,) = explain(model).losses
    assert found == {row.backend} and (row.state == LIBRARY) == ("eager" in found)
    assert found == {"eager"} or not dropout_p


def test_loss_of_a_subclass_with_the_same_forward_needs_no_logits() -> None:
    class Mine(transformers.LlamaForCausalLM):
        pass

    mine = adapted(Mine(transformers.LlamaConfig(**TINY))).train()
    assert is_logit_free(fuse(mine, loss=True))


def test_loss_of_a_forward_that_calls_transformers_needs_no_logits() -> None:
    class Mine(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    torch.manual_seed(0)
    ours, theirs = pair(adapted(Mine(transformers.LlamaConfig(**TINY))).train())
    assert is_logit_free(ours)
    assert_same_step(ours, theirs)
    with pytest.raises(ValueError, match="without a causal language model"):
        fuse(nn.Linear(2, 2), loss=True)


@pytest.mark.parametrize("hooked", [False, True])
def test_unfuse_restores_the_forward_below_a_hook_of_accelerate_too(hooked: bool) -> None:
    model = fuse(adapted(causal_model(), ["q_proj"]).train(), loss=True)
    causal = model.get_base_model()
    if hooked:
        add_hook_to_module(causal, ModelHook())
    assert is_logit_free(model)
    assert is_logit_free(fuse(model))  # fused before
    unfuse(model)
    assert not is_logit_free(model)
    if hooked:
        remove_hook_from_module(causal)
        assert not is_logit_free(model)
    else:
        assert "forward" not in vars(causal)


def test_copy_of_a_fused_model_is_fused_by_itself() -> None:
    model = fuse(adapted(causal_model()).train(), loss=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_base_model().lm_head.base_layer.weight.zero_()
    assert is_logit_free(other) and step(other)[0] != step(model)[0]


def test_loss_compiled_whole_has_the_same_gradients() -> None:
    model = fuse(adapted(causal_model(num_hidden_layers=1)).train(), loss=True)
    want, wanted = step(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(input_ids=IDS, labels=LABELS, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), want)
    for name, p in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(p.grad, wanted[name])


def test_loss_under_autocast_is_transformers_in_its_dtype() -> None:
    """u of bfloat16 is 2⁻⁸; losses of 4.1 are averages of errors of some u."""
    ours, theirs = pair(adapted(causal_model()).train())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = (m(input_ids=IDS, labels=LABELS).loss for m in (ours, theirs))
    assert got.dtype is want.dtype is torch.float32
    torch.testing.assert_close(got, want, rtol=2**-8, atol=0)
