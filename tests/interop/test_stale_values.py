"""No value that is kept between calls outlives what it was made of, whoever writes the parameters.

`torch.optim.AdamW(fused=True)`, bitsandbytes' optimizers, hot swap and writes through `.data` leave
`Tensor._version` alone. The lines of the first table are what keeps something between calls, the
columns who writes. Each cell evaluates before every step, steps under both kinds of activation
checkpointing, and is compared with PEFT. FSDP2 is in tests/finetune/test_distributed.py.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lora_kernels.backends.library import as_on_gpu
from lora_kernels.layers import (
    AdaLoRALinear,
    DoRALinear,
    Experts,
    LoRAExperts,
    LoRAGroup,
    LoRALinear,
    QDoRALinear,
)
from lora_kernels.peft import fuse
from tests.support.peft_models import (
    adalora_mlp,
    count_ops,
    dora_mlp,
    four_bit_mlp,
    kasa_mlp,
    llama,
    mlp,
    output,
    randomize,
    skip_without_kasa,
)

f32 = torch.float32
LR = 0.05  # of AdamW

# Layers that may keep something ------------------------------------------------------------------


def mixtral(**options: Any) -> Any:
    """One layer with LoRA on its experts and on q_proj, in float32."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    words = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    base = MixtralForCausalLM(
        MixtralConfig(**sizes, **words, num_local_experts=4, num_experts_per_tok=2)
    )
    config = LoraConfig(
        r=5,
        lora_alpha=7,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        **options,
    )
    model = get_peft_model(base, config)
    randomize(model)
    return model


def kasa() -> Any:
    skip_without_kasa()
    return kasa_mlp(f32)


def four_bit_dora() -> Any:
    pytest.importorskip("bitsandbytes")
    return four_bit_mlp(config={"use_dora": True})


KINDS: dict[str, Callable[[], Any]] = {
    "experts": mixtral,
    "dora": lambda: dora_mlp(f32),
    "dora on a GPU": lambda: dora_mlp(f32),  # that path, on CPU tensors
    "dora over 4 bits": four_bit_dora,
    "lora": lambda: mlp(f32),
    "kasa": kasa,
    "adalora": lambda: adalora_mlp(f32),
}


def inputs(model: Any, rows: int, seed: int) -> Tensor:
    base = model.base_model.model
    width = base.config.hidden_size if hasattr(base, "lm_head") else base.up.in_features
    return torch.randn(1, rows, width, generator=torch.Generator().manual_seed(seed))


def forward(model: Any, x: Tensor) -> Tensor:
    """The output for x, which a language model takes in place of its embeddings."""
    if hasattr(model.base_model.model, "lm_head"):
        logits: Tensor = model(inputs_embeds=x, use_cache=False).logits
        return logits
    return output(model, x)


# Who writes --------------------------------------------------------------------------------------

Write = Callable[[], object]


def by_optimizer(
    make: Callable[..., torch.optim.Optimizer], lr: float = 1.0, **options: Any
) -> Any:
    def writer(model: Any, folder: Path) -> Write:
        parameters = [p for p in model.parameters() if p.requires_grad]
        return make(parameters, lr=lr, **options).step

    return writer


def by_bitsandbytes(name: str) -> Any:
    def writer(model: Any, folder: Path) -> Write:
        optim = pytest.importorskip("bitsandbytes").optim
        # Above the gradients' rounding errors, which a small ε would make as large as a step.
        return by_optimizer(getattr(optim, name), LR, eps=EPS)(model, folder)

    return writer


def stepped(model: Any) -> dict[str, Tensor]:
    """New values of all trainable parameters, by name."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: p.detach() - _gradient(p) for n, p in named.items()}


def _gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def by_data(model: Any, folder: Path) -> Write:
    def write() -> None:
        for name, value in stepped(model).items():
            model.get_parameter(name).data.copy_(value)

    return write


def by_load_state_dict(model: Any, folder: Path) -> Write:
    return lambda: model.load_state_dict(stepped(model), strict=False)


def by_checkpoint(model: Any, folder: Path) -> Write:
    """A run that is resumed from its file."""

    def write() -> None:
        file, twin = folder / "adapter.pt", copy.deepcopy(model)
        twin.load_state_dict(stepped(model), strict=False)
        torch.save(get_peft_model_state_dict(twin), file)
        set_peft_model_state_dict(model, torch.load(file))

    return write


def by_hot_swap(model: Any, folder: Path) -> Write:
    def write() -> None:
        twin = copy.deepcopy(model)
        twin.load_state_dict(stepped(model), strict=False)
        twin.save_pretrained(str(folder))
        hotswap_adapter(model, str(folder), "default", torch_device="cpu")

    return write


EPS = 1e-2
WRITERS: dict[str, Callable[[Any, Path], Write]] = {
    "fused AdamW": by_optimizer(torch.optim.AdamW, LR, fused=True, eps=EPS),
    "foreach AdamW": by_optimizer(torch.optim.AdamW, LR, foreach=True, eps=EPS),
    "SGD": by_optimizer(torch.optim.SGD),
    "fused SGD": by_optimizer(torch.optim.SGD, fused=True),
    "bitsandbytes' AdamW": by_bitsandbytes("AdamW"),
    ".data": by_data,
    "load_state_dict": by_load_state_dict,
    "a checkpoint": by_checkpoint,
    "hotswap_adapter": by_hot_swap,
}
SWAPPED = {"experts", "lora"}  # PEFT's `hotswap_adapter` refuses the others
CELLS = [
    (kind, writer)
    for kind in KINDS
    for writer in WRITERS
    if writer != "hotswap_adapter" or kind in SWAPPED
]

# The table ---------------------------------------------------------------------------------------


def run(model: Any, write: Write, slope: float) -> dict[str, Tensor]:
    """The results of four steps: without checkpointing, with it, and with the reentrant one, whose
    first forward runs without gradients. Before each step the model is evaluated, in training mode:
    in the other one bitsandbytes repacks PEFT's weights."""
    found: dict[str, Tensor] = {}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def evaluate(when: object) -> None:
        for rows in (1, 6):
            for again in range(2):  # the second call may be one that was prepared
                with torch.no_grad():
                    found[f"{rows} rows, {when}, {again}"] = forward(model, inputs(model, rows, 1))
        with torch.inference_mode():
            found[f"inference, {when}"] = forward(model, inputs(model, 1, 1)).clone()

    for step, reentrant in enumerate((None, False, True, True)):
        evaluate(step)
        x, call = inputs(model, 6, 2 + step).requires_grad_(), partial(forward, model)
        y = call(x) if reentrant is None else checkpoint(call, x, use_reentrant=reentrant)
        assert isinstance(y, Tensor)
        model.zero_grad()
        loss = slope * (y - 1).square().mean()
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        for name, p in model.named_parameters():
            if p.grad is not None:
                found[f"{name}.grad {step}"] = p.grad.clone()
        write()
    evaluate("at the end")
    return found | {
        f"{n} update": p.detach() - before[n]
        for n, p in model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize(("kind", "writer"), CELLS)
def test_fused_layer_whose_parameters_are_written_equals_peft(
    kind: str, writer: str, tmp_path: Path
) -> None:
    stock = KINDS[kind]()
    fused = fuse(copy.deepcopy(stock))
    slope = 100.0 if kind == "experts" else 0.1  # of the loss, which moves the layers by so much
    gpu = as_on_gpu() if kind == "dora on a GPU" else contextlib.nullcontext()
    want = run(stock, WRITERS[writer](stock, tmp_path), slope)
    with gpu:
        got = run(fused, WRITERS[writer](fused, tmp_path), slope)
    assert got.keys() == want.keys()
    for name, ref in want.items():
        # float32 sums in another order, of four steps: 2⁻¹³ is 2,000 roundings. A step moves the
        # results by more than a hundredth.
        assert (got[name] - ref).norm() <= 2.0**-13 * ref.norm(), name
    for rows in (1, 6):
        moved = [want[f"{rows} rows, {when}, 0"] for when in (0, 1, 2, 3, "at the end")]
        for one, other in itertools.pairwise(moved):
            assert (one - other).norm() > 2.0**-9 * one.norm()


def test_every_kind_of_the_table_is_computed_by_our_kernels() -> None:
    """So that each of them may keep something; PEFT's forward would equal PEFT's."""
    for kind, build in KINDS.items():
        model = fuse(build())
        with torch.no_grad():
            ops = count_ops(lambda model=model: forward(model, inputs(model, 1, 1)))
        ours = sum(n for name, n in ops.items() if name.startswith("lora_"))
        assert ours == (3 if kind == "experts" else 2), (kind, ops)


# A base that is written --------------------------------------------------------------------------


def merged_and_unmerged(layer: Any) -> None:
    """PEFT writes `weight.data`, so that the weight is another by some roundings."""
    layer.merge()
    layer.unmerge()


def swap_columns(layer: Any) -> None:
    weight = layer.base_layer.weight.data
    weight[:, :2] = weight[:, :2].flip(1)


def flip(t: Tensor) -> None:
    t.copy_(t.flip(0))


BASE_WRITERS: dict[str, Callable[[Any], object]] = {
    "weight.data": lambda layer: layer.base_layer.weight.data.mul_(1.5),
    "merge of another adapter": lambda layer: layer.base_layer.weight.data.add_(0.1),
    "two columns": swap_columns,
    "merge and unmerge": merged_and_unmerged,
    "load_state_dict": lambda layer: layer.base_layer.load_state_dict(
        {name: t * 0.5 for name, t in layer.base_layer.state_dict().items()}
    ),
    "scales": lambda layer: flip(layer.base_layer.weight.quant_state.absmax.data),
    "codes": lambda layer: flip(layer.base_layer.weight.data),
}
DENSE, CODES = [*BASE_WRITERS][:5], [*BASE_WRITERS][5:]


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(
    ("kind", "writer"),
    [("dora", w) for w in DENSE] + [("dora over 4 bits", w) for w in CODES],
)
@torch.no_grad()
def test_fused_dora_whose_base_is_written_equals_peft(kind: str, writer: str, gpu: bool) -> None:
    stock = KINDS[kind]()
    fused = fuse(copy.deepcopy(stock))
    x = inputs(stock, 1, 1)
    with as_on_gpu() if gpu else contextlib.nullcontext():
        for _ in range(2):
            before = fused(x)
        for model in (stock, fused):
            BASE_WRITERS[writer](model.base_model.model.up)
        for _ in range(2):
            got, want = fused(x), stock(x)
            assert (got - want).norm() <= 2.0**-18 * want.norm()  # roundings of float32
    changed = (got - before).norm() > 2.0**-14 * before.norm()  # 16 times what is a rounding above
    assert changed or writer == "merge and unmerge"


# Layers without PEFT -----------------------------------------------------------------------------


def group() -> LoRAGroup:
    return LoRAGroup(32, {"q": 24, "k": 8, "v": 8}, r=3, alpha=7, targets=["q", "v"])


def experts_layer() -> LoRAExperts:
    return LoRAExperts(Experts(4, 32, 24), r=3, alpha=7)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LoRALinear": lambda: LoRALinear(32, 24, r=3, alpha=7),
    "DoRALinear": lambda: DoRALinear(32, 24, r=3, alpha=7),
    "QDoRALinear": lambda: QDoRALinear(64, 24, r=3, alpha=7),
    "AdaLoRALinear": lambda: AdaLoRALinear(32, 24, r=3, alpha=7),
    "LoRAGroup": group,
    "LoRAExperts": experts_layer,
}


def layer_output(layer: Any, rows: int, seed: int) -> Tensor:
    width = getattr(layer, "in_features", 32)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    if isinstance(layer, LoRAExperts):
        chosen = torch.arange(2 * rows).view(rows, 2) % 4
        y: Tensor = layer(x, chosen, torch.full((rows, 2), 0.5))
        return y
    y = layer(x)
    return torch.cat(y, dim=-1) if isinstance(y, tuple) else y


@pytest.mark.parametrize(
    "writer", [w for w in WRITERS if w not in ("a checkpoint", "hotswap_adapter")]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_whose_parameters_are_written_computes_as_a_copy_of_it(
    kind: str, writer: str, tmp_path: Path
) -> None:
    """A copy has nothing that is kept, and computes the same bits."""
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    write = WRITERS[writer](layer, tmp_path)
    outputs = []
    for step in range(3):
        for rows in (1, 6):
            with torch.no_grad():
                for _ in range(2):
                    got = layer_output(layer, rows, 1)
                    assert torch.equal(got, layer_output(copy.deepcopy(layer), rows, 1)), step
        outputs.append(got)
        layer.zero_grad()
        (0.1 * (layer_output(layer, 6, 2) - 1).square().mean()).backward()
        write()
    assert all((a - b).norm() > 2.0**-9 * a.norm() for a, b in itertools.pairwise(outputs))


# transformers' Trainer on its defaults -----------------------------------------------------------


class Generations(TrainerCallback):
    """The logits from which the model generates after each step."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        training = model.training
        out = model.eval().generate(
            input_ids=torch.tensor([[5, 6, 7]]),
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        model.train(training)
        self.found.append(torch.stack(out.logits))


LANGUAGE_MODELS: dict[str, Callable[[], Any]] = {
    "experts": mixtral,
    "dora": lambda: dora_llama(),
    "dora on a GPU": lambda: dora_llama(),
}


def dora_llama() -> Any:
    config = LoraConfig(r=5, lora_alpha=7, use_dora=True, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(llama(f32), config)
    randomize(model)
    return model


def trained(model: Any, out: Path, **options: Any) -> tuple[dict[str, Tensor], Any]:
    ids = torch.randint(3, 48, (4, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        str(out),
        max_steps=3,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=1,
        learning_rate=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_steps=2,
        **options,
    )
    kept = Generations()
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[kept])
    resumed = out / "checkpoint-2" if (out / "checkpoint-2").exists() else None
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    found = {f"generated {i}": t for i, t in enumerate(kept.found)}
    for line in trainer.state.log_history:
        for name in ("loss", "eval_loss", "grad_norm"):
            if name in line:
                found[f"{name} {line['step']}"] = torch.tensor(line[name])
    return found, trainer


CHECKPOINTINGS: dict[str, dict[str, Any]] = {
    "without": {},
    "reentrant": {"use_reentrant": True},
}


@pytest.mark.parametrize("checkpointing", CHECKPOINTINGS)
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_trainer_on_its_defaults_with_evaluations_and_generations_equals_peft(
    kind: str, checkpointing: str, tmp_path: Path
) -> None:
    """adamw_torch_fused counts no version. The third step is repeated from a checkpoint."""
    options: dict[str, Any] = {}
    if settings := CHECKPOINTINGS[checkpointing]:
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": settings}
    want, _ = trained(LANGUAGE_MODELS[kind](), tmp_path / "stock", **options)
    with as_on_gpu() if kind == "dora on a GPU" else contextlib.nullcontext():
        fused = fuse(LANGUAGE_MODELS[kind]())
        got, trainer = trained(fused, tmp_path / "fused", **options)
        assert trainer.args.optim == "adamw_torch_fused"
        resumed, _ = trained(fused, tmp_path / "fused", **options)
    assert {"eval_loss 1", "eval_loss 3", "generated 2", "loss 3"} <= got.keys() == want.keys()
    for name, ref in want.items():
        # AdamW divides by a gradient's own size, which makes its roundings larger.
        assert (got[name] - ref).norm() <= 2.0**-11 * ref.norm(), name
    assert abs(want["eval_loss 3"] - want["eval_loss 1"]) > 2.0**-7 * want["eval_loss 1"]
    assert torch.equal(resumed["eval_loss 3"], got["eval_loss 3"])
