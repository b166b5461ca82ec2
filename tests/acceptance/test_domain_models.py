"""Domain models: a preset each, trained on one base, switched, and mixed in one batch."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from lora_kernels.finetune import PRESETS, create_domain_model
from tests.acceptance.formula import assert_same
from tests.finetune.tiny import llama, tokenizer, write_lines


def test_two_domains(tmp_path: Path) -> None:
    assert (PRESETS["medical"].rank, PRESETS["legal"].rank) == (32, 16)
    model, ids = llama().eval(), torch.arange(4, 20)[None]
    with torch.no_grad():
        base = model(ids).logits
    for domain in ("medical", "legal"):
        records = [
            {"prompt": f"{domain} {i}: ", "completion": f"{i} {domain[0]}"} for i in range(4)
        ]
        model = create_domain_model(
            model,
            domain,
            write_lines(tmp_path / f"{domain}.jsonl", records),
            out=tmp_path / domain,
            tokenizer=tokenizer(),
            training={
                "max_steps": 3,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "use_cpu": True,
            },
        )
    with torch.no_grad():
        alone = {"__base__": base}
        for domain in ("medical", "legal"):
            model.set_adapter(domain)
            alone[domain] = model(ids).logits
        names = ["legal", "__base__", "medical"]
        mixed = model(ids.expand(3, -1), adapter_names=names, use_cache=False).logits
    for name, row in zip(names, mixed, strict=True):
        # Through two layers, so a hundred roundings.
        assert_same(row[None], alone[name], rtol=2.0**-15, what=name)
    assert (alone["medical"] - alone["legal"]).norm() > 2.0**-8 * base.norm()
