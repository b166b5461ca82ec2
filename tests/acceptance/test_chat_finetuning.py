"""Chat fine-tuning: the loss on the assistant's tokens alone, and a fact that is learnt."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from lora_kernels.finetune import (
    Collator,
    LoRATrainer,
    add_lora_layers,
    load_chat,
    training_arguments,
)
from tests.finetune.tiny import chat, llama, tokenizer, write_lines


def test_a_fact_is_learnt_and_the_base_kept(tmp_path: Path) -> None:
    tok = tokenizer()
    facts = {"Who rows?": "Ada", "Who sails?": "Bo"}
    file = write_lines(tmp_path / "chat.jsonl", [chat(q, a) for q, a in facts.items()])
    data = load_chat(file, tok)
    for row, answer in zip(data, facts.values(), strict=True):
        learnt = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0]
        assert tok.decode(learnt) == f"{answer}<end>"

    base = llama()
    batch = Collator.from_tokenizer(tok)(list(data))
    with torch.no_grad():
        before = base.eval()(**batch).logits
    model = add_lora_layers(base, "chat", rank=8, alpha=16, dropout=0.0, targets="all-linear")
    args = training_arguments(
        tmp_path / "out",
        max_steps=100,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        save_strategy="no",
    )
    LoRATrainer(model, args, train_dataset=data, processing_class=tok).train()

    # The loss, written out over the labelled tokens, and the answer that greedy decoding gives.
    model.eval()
    with torch.no_grad():
        out = model(**batch)
        logp = out.logits[:, :-1].double().log_softmax(-1)
        targets = batch["labels"][:, 1:]
        taken = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets >= 0]
        assert out.loss.item() == pytest.approx(-taken.mean().item(), rel=2.0**-15)
        assert out.loss < 0.3  # from 5.6; a frozen head of width 64 allows no 0.2
        for question, answer in facts.items():
            ids = tok.apply_chat_template(
                chat(question)["messages"],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )["input_ids"]
            said = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert tok.decode(said[0, ids.shape[1] :]).startswith(f"{answer}<end>")
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, before)
