"""`fuse(model, loss=True)` of transformers' classes: their loss and gradients."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lora_kernels.peft import explain, fuse
from lora_kernels.peft.explain_rows import TORCH
from tests.support.causal_classes import VOCAB, causal_classes, small_model

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
LABELS = IDS.clone()
LABELS[0, :3] = -100
FAMILIES = (
    *("Cohere", "DeepseekV3", "Gemma2", "Gemma3", "Gemma4", "GptOss", "Granite", "Llama"),
    *("Qwen3Next", "Qwen3_5"),
)
MULTIMODAL = [
    f"{name}ForConditionalGeneration"
    for name in ("Gemma3", "Llava", "Mllama", "PaliGemma", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
]
# Classes whose loss computes logits, and words of the reason.
COMPUTED = {
    "ClvpForCausalLM": "it has no output embedding",
    "CsmDepthDecoderForCausalLM": "it has no output embedding",
    "DoryForCausalLM": "its head: DoryLMHead is not exactly nn.Linear",
    "ErgoForCausalLM": "its head: ErgoLinearWithFP32Output is not exactly nn.Linear",
    "ProphetNetForCausalLM": "getitem",
}


def step(model: Any, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return the outputs of a training step, and the loss and each gradient by name."""
    torch.manual_seed(3)  # some models draw numbers in training
    outputs = model(**{"input_ids": IDS, "labels": LABELS} | inputs)
    outputs.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return outputs, {"loss": outputs.loss.detach()} | grads


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Compare gradients in float32, whose roundoff is u = 2⁻²⁴.

    Two orders of sums through two layers differ by less than 2⁸ u of a gradient, and by less than
    2⁸ u of the largest one where a gradient cancels. A gradient that is doubled, or without the
    shift, differs by more than half of it.
    """
    assert got.keys() == want.keys()
    largest = max(float(t.norm()) for t in want.values())
    for name, t in want.items():
        error = float((got[name] - t).norm())
        assert error <= 2**-12 * float(t.norm()) + 2**-16 * largest, f"{name}: {error}"


def assert_same_step(name: str, **inputs: Any) -> Any:
    """Compare a step of two models of the class, and return the fused one's outputs and row."""
    want_outputs, want = step(small_model(name), **inputs)
    ours = fuse(small_model(name), loss=True)
    outputs, got = step(ours, **inputs)
    assert_close(got, want)
    row = next(row for row in explain(ours).losses if row.layer == "loss")
    assert (outputs.logits is None) is (row.state != TORCH), row
    assert [*outputs] == [key for key in want_outputs if key in outputs]
    assert {*want_outputs} - {*outputs} <= {"logits"}
    return outputs, row


@pytest.mark.parametrize(
    "name", [*(f"{name}ForCausalLM" for name in FAMILIES), "GPT2LMHeadModel", *MULTIMODAL]
)
def test_loss_of_a_class_needs_no_logits(name: str) -> None:
    if not hasattr(transformers, name):
        pytest.skip("transformers is older than the class")
    outputs, _ = assert_same_step(name)
    assert outputs.logits is None
    outputs, _ = assert_same_step(name, num_items_in_batch=torch.tensor(5))
    assert outputs.logits is None


def test_loss_of_a_mixture_keeps_its_router_loss() -> None:
    outputs, _ = assert_same_step("MixtralForCausalLM", output_router_logits=True)
    assert outputs.logits is None and outputs.aux_loss > 0 and len(outputs.router_logits) == 2


def test_loss_of_a_head_of_another_class_computes_logits() -> None:
    if not hasattr(transformers, "DoryForCausalLM"):
        pytest.skip("transformers is older than the class")
    outputs, row = assert_same_step("DoryForCausalLM")
    assert outputs.logits is not None and row.reason == COMPUTED["DoryForCausalLM"]


@pytest.mark.slow
def test_loss_of_every_class_is_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()
    for name in [*causal_classes(), *MULTIMODAL]:
        try:
            step(small_model(name))
        except Exception as error:  # this configuration is none of the class
            counts["not built"] += 1
            print(f"{name}: not built: {error}"[:200])
            continue
        outputs, row = assert_same_step(name)
        counts["equal without logits" if outputs.logits is None else "computed"] += 1
        if outputs.logits is not None:
            print(f"{name}: {row.reason}")
            assert COMPUTED[name] in row.reason
    with capsys.disabled():
        print(f"\ntransformers {transformers.__version__}: {dict(counts)}")
    assert counts["equal without logits"] > 0.75 * counts.total()
