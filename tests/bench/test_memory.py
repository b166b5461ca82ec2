"""Bytes held from forward to backward: ours are the formula, and nothing is held beside."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lora_kernels import cli
from lora_kernels.bench import memory
from lora_kernels.bench.memory import DTYPES, VARIANTS, held

pytest.importorskip("peft")

SIZES, R = (24, 33, 47), 5  # M, K, N
M, K, N = SIZES


def vectors(variant: str, dtype: torch.dtype) -> int:
    """Bytes of what PyTorch keeps of the expressions of c and g, which are small.

    DoRA: c, and the norm that the magnitude is divided by, [N] float32 each. AdaLoRA: the gate [R]
    float32, in 16 bits a second [R], and the count of ranks that are left.
    """
    if variant == "DoRA":
        return 2 * 4 * N
    if variant == "gate":
        return 4 * R * (1 if dtype is torch.float32 else 2) + 4
    return 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ours_hold_the_formula(dtype: torch.dtype, variant: str) -> None:
    row = memory.layer_row(variant, dtype, SIZES, R)
    want = M * K * dtype.itemsize + M * R * 4  # x, and D(x)·Aᵀ in float32
    want += {"dropout": 16, "DoRA": M * N * dtype.itemsize}.get(variant, 0)
    assert row.minimum == want
    assert row.bytes["ours"] == want + vectors(variant, dtype)
    assert row.bytes["peft"] >= row.minimum
    for name, total in row.bytes.items():
        assert sum(row.tensors[name].values()) == total


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_else_is_alive(dtype: torch.dtype, variant: str) -> None:
    """The forward leaves y and the saved tensors except x allocated, with and without hooks."""
    from lora_kernels.peft import fuse

    layer = fuse(nn.Sequential(memory.stock(variant, dtype, SIZES, R)))[0]
    x = torch.randn(M, K).to(dtype).requires_grad_()
    kept = sum(held(lambda: layer(x), layer).values())  # and a first call, which may make buffers
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        y = layer(x)
    alive = sum(event.self_cpu_memory_usage for event in profiled.events())
    # Of AdaLoRA's E·s PyTorch keeps s, a float64 for which it calls no hook.
    number = 8 if variant == "gate" else 0
    assert alive == y.numel() * y.itemsize + kept + number - x.numel() * x.itemsize


def test_storages_are_counted_once_and_whole() -> None:
    """A view holds all of its storage, two views no more; those of parameters are there anyway."""
    module = nn.Linear(6, 6, bias=False)
    x = torch.randn(8, 12, requires_grad=True)

    def call() -> torch.Tensor:
        left, right = x[:, :6], x[:, 6:]
        return (left * right) @ module.weight

    found = 8 * 12 * 4 + 8 * 6 * 4  # x, left * right
    assert held(call, module) == {"[8, 6] float32": found}
    assert sum(held(call).values()) == found + 6 * 6 * 4


def test_a_small_llama_holds_nothing_above_the_minimum() -> None:
    """The minimum is counted of the frozen model, and by hand of its adapters."""
    pytest.importorskip("transformers")
    sizes = dict(zip(memory.SMOLLM2, (64, 192, 2, 4, 2, 256), strict=True))
    for dtype in DTYPES:
        row = memory.step_row(dtype, sizes)
        assert row.what == "Llama's step"
        assert 0 < row.minimum == row.bytes["ours"] < row.bytes["peft"]


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "find_spec", lambda name: None)  # no Llama
    ran = run("--memory")
    assert ran.status == 0 and [row["what"] for row in ran.rows] == [*VARIANTS, *VARIANTS]
    assert set(ran.data["provenance"]) == {"version", "torch", "peft", "transformers"}
    assert "dropout bfloat16 512×2048×2048 r=16: ours 2,129,936 bytes" in ran.out
    assert cli.main(["bench", "--memory", "--device", "cuda"]) == 2
    assert "want no --device cuda" in capsys.readouterr().out
