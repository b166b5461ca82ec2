"""LoRA on SmolLM2's lm_head, on prose: gradients of the whole model, memory of the head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F

import lora_kernels
from lora_kernels.bench.memory import peak
from lora_kernels.finetune.demo import demo_model
from lora_kernels.finetune.merge import dequantize
from lora_kernels.finetune.model import load_base, load_tokenizer
from lora_kernels.peft import explain, fuse

V, K, R, SCALING = 49152, 576, 16, 2.0
PROSE = Path(__file__).parents[2] / "LICENSE"


@pytest.mark.slow
def test_gradients_of_smollm2_with_lora_on_its_head_are_pefts() -> None:
    """To 1e-4 of each gradient's norm; the embeddings are tied to the head.

    PEFT's logits get their loss in float64. In float32 the log_softmax of PyTorch, over 49,152
    terms, moves PEFT's own gradients: from those, ours may differ by as much more.
    """
    torch.manual_seed(0)
    base = dequantize(load_base(demo_model(), torch.float32, torch.device("cpu")))
    config = LoraConfig(r=R, lora_alpha=32, target_modules=["q_proj", "down_proj", "lm_head"])
    stock: Any = get_peft_model(base, config)
    with torch.no_grad():
        for name, p in stock.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    text = PROSE.read_text(encoding="utf-8")[2_000:4_000]
    ids = load_tokenizer(demo_model())(text, return_tensors="pt")["input_ids"][:, :96].view(2, 48)
    labels = ids.clone()
    labels[0, :20] = -100
    ours = fuse(copy.deepcopy(stock), loss=True)
    explain(ours).assert_fused()

    def loss_of(model: Any) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=labels).loss
        return loss

    def loss_in_float64(model: Any) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1].double()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    found = []
    for model, call in ((ours, loss_of), (stock, loss_in_float64), (stock, loss_of)):
        model.train().zero_grad()
        loss = call(model)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), grads))
    (loss, grads), (want, wanted), (_, pefts) = found
    assert loss == pytest.approx(want, rel=1e-5)
    assert grads.keys() == wanted.keys() and any("lm_head.lora_A" in name for name in grads)
    for name, grad in wanted.items():
        error = (grads[name] - grad).norm()
        assert error <= 1e-4 * grad.norm(), name
    # The error that float32 adds to PEFT's is the larger one.
    assert total(pefts, wanted) > total(grads, wanted)


def total(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Return the norm of all relative errors."""
    errors = [(found[name] - grad).norm() / grad.norm() for name, grad in want.items()]
    return float(torch.stack(errors).norm())


def head_inputs(M: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    return {
        "x": draw(M, K).requires_grad_(),
        "weight": draw(V, K),
        "lora_A": draw(R, K).requires_grad_(),
        "lora_B": draw(V, R).requires_grad_(),
        "labels": torch.randint(0, V, (M,), generator=generator),
    }


def loss_of_logits(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, labels: Any) -> Any:
    logits = x @ weight.T + (x @ lora_A.T) @ lora_B.T * SCALING
    return F.cross_entropy(logits, labels)


def ours(**args: Any) -> Tensor:
    return lora_kernels.lora_linear_cross_entropy(**args, scaling=SCALING)


def ours_log_probs(**args: Any) -> Tensor:
    found = lora_kernels.lora_linear_log_probs(**args, scaling=SCALING, outputs=())
    return -found.log_probs.mean()


@pytest.mark.parametrize("M", [512, pytest.param(2048, marks=pytest.mark.proof)])
def test_peak_memory_of_smollm2s_head_falls_by_most_of_three_times_its_logits(M: int) -> None:
    args = head_inputs(M)

    def step(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [args[name] for name in ("x", "lora_A", "lora_B")]
        return torch.autograd.grad(loss(**args), leaves)

    theirs = peak(lambda: step(loss_of_logits))
    for call in (ours, ours_log_probs):
        assert theirs - peak(lambda call=call: step(call)) >= 0.6 * 3 * M * V * 4  # type: ignore[misc]
