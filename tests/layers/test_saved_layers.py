"""State dicts of version 0.1 load into today's layers, which compute the same bits.

`python -m tests.layers.test_saved_layers` writes `data/layers.safetensors` with the layers at hand.
All values are small integers or powers of two, and each row of W + s·B·A has norm 4: every sum is
exact, so any backend and any order of summation gives the bits in the file.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_kernels
from lora_kernels import layers
from tests.support import SEED_SHIFT

PATH = Path(__file__).parent / "data" / "layers.safetensors"
K, N, R, M = 16, 12, 3, 5
LEVELS = {"ranks": (2, 1), "weights": (0.5, 2.0)}
MEMBERS = {"members": {"q": 4, "k": 3, "v": 5}, "targets": ("q", "v")}
# The arguments of each class beside in-features, r = 3 and alpha = 6.
OPTIONS: dict[str, dict[str, Any]] = {
    "LoRALinear": {"bias": True, "dropout": 0.5},
    "StableLoRALinear": {},
    "MemoryEfficientLoRALinear": {"dropout": 0.5},
    "LoRAPlusLinear": {},
    "DoRALinear": {"bias": True},
    "AdaLoRALinear": {"bias": True},
    "HierarchicalLoRALinear": LEVELS,
    "LoRAGroup": {"bias": True} | MEMBERS,
    "LoRAConv1D": {},
    "LoRAEmbedding": {"padding_idx": 2},
    "LoRAAttention": {"num_heads": 2, "targets": ("q", "v", "o")},
}
OPTIONS |= {f"Q{name}": options for name, options in OPTIONS.items() if hasattr(layers, f"Q{name}")}


def build(name: str) -> Any:
    options = dict(OPTIONS[name])
    if name == "LoRAAttention":
        return layers.LoRAAttention(K, r=R, alpha=6, **options)
    second = options.pop("members", N)
    rank = {} if "ranks" in options else {"r": R}
    return getattr(layers, name)(K, second, alpha=6, **rank, **options)


def batch(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(-SEED_SHIFT)  # the file's, 0
    if name == "LoRAEmbedding":
        return torch.randint(K, (M,), generator=generator)
    rows = (4, K) if name == "LoRAAttention" else (M, K)  # softmax of 4 equal scores is 1/4
    return torch.randint(-2, 3, rows, generator=generator).float()


def results(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """y in training, with every gradient, in eval mode, merged and disabled."""
    torch.manual_seed(-SEED_SHIFT)
    x = x.clone().requires_grad_(x.is_floating_point())
    y = layer.train()(x)
    ys = y if isinstance(y, tuple) else (y,)
    sum(
        (part * (torch.arange(part.numel()).view(part.shape) % 5 - 2)).sum() for part in ys
    ).backward()
    found = {"y": torch.cat(ys, dim=-1).detach()}
    leaves = [("x", x), *layer.named_parameters()]
    found |= {f"{name}.grad": t.grad for name, t in leaves if t.grad is not None}

    @torch.no_grad()
    def call() -> Tensor:
        y = layer(x)
        return torch.cat(y, dim=-1) if isinstance(y, tuple) else y

    layer.eval()
    found["y.eval"] = call()
    if not isinstance(layer, layers.LoRAAttention):
        layer.merge()
        found["y.merged"] = call()
        layer.unmerge()
        layer.enabled = False
        found["y.disabled"] = call()
        layer.enabled = True
    return found


@pytest.mark.parametrize("backend", ["chosen", "eager"])
@pytest.mark.parametrize("name", OPTIONS)
def test_state_dict_of_version_0_1_gives_the_same_bits(name: str, backend: str) -> None:
    saved = {
        key.removeprefix(f"{name}/"): t
        for key, t in load_file(PATH).items()
        if key.startswith(f"{name}/")
    }
    state = {key.removeprefix("state/"): t for key, t in saved.items() if key.startswith("state/")}
    layer = build(name)
    layer.load_state_dict(state)
    with lora_kernels.backend("eager") if backend == "eager" else nullcontext():
        got = results(layer, batch(name))
    want = {key: t for key, t in saved.items() if not key.startswith("state/")}
    assert got.keys() == want.keys()
    for key, t in want.items():
        assert got[key].dtype is t.dtype and torch.equal(got[key], t), key


@pytest.mark.parametrize("name", ["LoRALinear", "QAdaLoRALinear", "LoRAGroup"])
def test_adapter_of_version_0_1_loads_with_a_warning(name: str, tmp_path: Path) -> None:
    """Files of version 0.1 tell no alpha."""
    layer, prefix = build(name), f"{name}/state/"
    keys, saved = layers.lora_state_dict(layer), load_file(PATH)
    adapter = {key: saved[prefix + key] for key in keys}
    save_file(adapter, tmp_path / "adapter", {"format": "pt"})
    with pytest.warns(UserWarning, match="does not tell the alpha of the layer: it is loaded"):
        layers.load_lora_weights(layer, tmp_path / "adapter")
    assert all(torch.equal(t, adapter[key]) for key, t in layers.lora_state_dict(layer).items())


# Writing the file


@torch.no_grad()
def set_exact(layer: Any, name: str) -> None:
    """W of ±1, A of ±1 on a block of columns each, B that turns the signs of some blocks."""
    if name == "LoRAAttention":
        for module, part in ((layer.qkv_proj, 3), (layer.o_proj, 1)):
            for param in module.parameters():
                param.copy_(torch.arange(param.numel()).view(param.shape) % (2 + part) - 1)
        layer.qkv_proj.weight[: 2 * K] = 0  # q and k, whose scores are then equal
        layer.qkv_proj.member("q").lora_B.zero_()
        return
    blocks = torch.tensor([0] * 5 + [1] * 5 + [2] * 6)
    v = 1.0 - 2 * (torch.arange(K) % 3 == 0)
    u = 1.0 - 2 * (torch.arange(N)[:, None] % torch.tensor([2, 3, 5]) == 0)  # [N, R]
    W = u[:, blocks] * v
    A = (blocks == torch.arange(R)[:, None]) * v
    B = -u * (torch.arange(N * R).view(N, R) % 2)
    is_group = "Group" in name
    A = A.repeat(2, 1) if is_group else A
    B = torch.cat([B[:4], B[7:]]) if is_group else B
    W = W if name not in ("LoRAConv1D", "LoRAEmbedding") else W.t()
    layer.base.set_weight(layer, nn.Parameter(W.contiguous(), requires_grad=False))
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)
    if layer.bias is not None:
        layer.bias.copy_(torch.arange(N) % 4 - 1)
    if "AdaLoRA" in name:
        layer.lora_E.copy_(torch.tensor([1.0, -2.0, 0.5]))
        layer.rank_mask[1] = False
    if "DoRA" in name:
        layer.magnitude.copy_(2.0 ** (torch.arange(N) % 4))


def write() -> None:
    tensors = {}
    for name in OPTIONS:
        layer = build(name)
        set_exact(layer, name)
        found = {f"state/{key}": t for key, t in layer.state_dict().items()}
        found |= results(layer, batch(name))
        tensors |= {f"{name}/{key}": t.contiguous().clone() for key, t in found.items()}
    save_file(tensors, PATH)
    print(f"wrote {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    write()
