"""Saving and loading: the adapters alone, bit for bit, and PEFT's own files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_kernels.layers import LoRALinear, load_lora_weights, lora_state_dict, save_lora_weights
from tests.acceptance.formula import ALPHA, K, M, N, R, inputs, randomize


def model(seed: int) -> nn.Module:
    torch.manual_seed(0)
    layers = (LoRALinear(K, N, r=R, alpha=ALPHA), nn.ReLU(), LoRALinear(N, K, r=R, alpha=ALPHA))
    return randomize(nn.Sequential(*layers), seed).eval()


def test_adapters_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained, fresh, x = model(1), model(2), inputs(M, K)
    file = tmp_path / "adapter.safetensors"
    size = save_lora_weights(trained, file)
    assert f"saved {size:,} bytes" in capsys.readouterr().out
    saved = load_file(file)
    assert saved.keys() == lora_state_dict(trained).keys()
    assert sum(t.numel() for t in saved.values()) == 2 * R * (K + N)
    assert not torch.equal(fresh(x), trained(x))
    load_lora_weights(fresh, file)
    assert torch.equal(fresh(x), trained(x))


def test_fused_peft_model(tmp_path: Path) -> None:
    """Stock PEFT loads the files of a fused model, under its plain keys."""
    peft = pytest.importorskip("peft")
    from lora_kernels.peft import fuse

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))
    state = {n: t.clone() for n, t in base.state_dict().items()}
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0", "2"])
    fused = randomize(fuse(peft.get_peft_model(base, config))).eval()
    fused.save_pretrained(str(tmp_path))
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert keys == {f"base_model.model.{i}.lora_{w}.weight" for i in (0, 2) for w in "AB"}

    other = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))
    other.load_state_dict(state)
    stock = peft.PeftModel.from_pretrained(other, str(tmp_path)).eval()
    x = inputs(M, K)
    torch.testing.assert_close(stock(x), fused(x))
