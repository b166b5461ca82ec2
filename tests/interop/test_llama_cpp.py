"""Exported adapters in llama.cpp, by llama-cpp-python, beside the same adapter in PyTorch.

llama.cpp rounds activations to 8 bits over quantized weights. So the exact comparison is over files
in float32, with a cache in float32.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("llama_cpp")
pytest.importorskip("transformers.quantizers.quantizer_gguf")
import gguf
import llama_cpp
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from lora_kernels.finetune import UsageError, demo, export, export_gguf
from lora_kernels.integrations import gguf as loader
from lora_kernels.integrations import load_gguf
from tests.support.assertions import assert_close_derived, derived_rtol
from tests.support.gguf_files import ARCHITECTURES, CONFIGS, llama3_factors, write

IDS = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(0))
# ggml computes GELU by a table in float16, which rounds each activation by 2^-11 of it.
GELU = {"gemma2", "gemma3"}
ROUNDOFF = 2.0**-11
THREADS = os.cpu_count() or 1


def logits(file: Path, ids: Tensor, lora: Path | None = None) -> Tensor:
    """llama.cpp's logits [L, vocabulary] of the ids [1, L]."""
    length = ids.shape[1]
    llama = llama_cpp.Llama(
        str(file),
        n_ctx=length,
        n_batch=length,
        n_threads=THREADS,
        n_threads_batch=THREADS,
        verbose=False,
        logits_all=True,
        lora_path=None if lora is None else str(lora),
        n_gpu_layers=0,
        type_k=0,
        type_v=0,
    )
    llama.eval(ids[0].tolist())
    found = torch.from_numpy(np.array(llama.scores[:length]))
    llama.close()
    return found


def adapted(model: Any, size: float = 0.02, **config: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 9, "target_modules": "all-linear"} | config
    peft = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_" in name:
                scale = size if "lora_B" in name else p.shape[1] ** -0.5
                p.copy_(scale * torch.randn(p.shape, generator=generator))
    return peft.eval()


@torch.no_grad()
def pairs(file: Path, tmp_path: Path, ids: Tensor = IDS, **config: Any) -> dict[str, Tensor]:
    """The logits of llama.cpp and of PyTorch, without and with an adapter."""
    model = load_gguf(file)
    found = {"llama.cpp": logits(file, ids), "ours": model(ids).logits[0]}
    model = adapted(model, **config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    export_gguf(file, tmp_path / "adapter", tmp_path / "adapter.gguf")
    found["llama.cpp, adapter"] = logits(file, ids, tmp_path / "adapter.gguf")
    found["ours, adapter"] = model(ids).logits[0]
    return found


def effect_of(found: dict[str, Tensor], name: str) -> Tensor:
    return found[f"{name}, adapter"] - found[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_adapter_has_the_effect_of_ours(name: str, tmp_path: Path) -> None:
    """With ranks and alphas of their own for some layers, and rsLoRA."""
    file = tmp_path / "a.gguf"
    write(file, CONFIGS[name], ARCHITECTURES.get(name, name), "F32", embedding="F32")
    config = {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"down_proj": 3}}
    found = pairs(file, tmp_path, use_rslora=True, **config)
    rtol = ROUNDOFF if name in GELU else derived_rtol(torch.float32, layers=8)
    for with_adapter in ("", ", adapter"):
        got, want = (found[f"{whose}{with_adapter}"] for whose in ("llama.cpp", "ours"))
        assert_close_derived(got, want, rtol)
    # The effect is the difference of two logits, each with that error.
    got, want = (effect_of(found, whose) for whose in ("llama.cpp", "ours"))
    size = found["ours"].norm() + found["ours, adapter"].norm()
    assert (got - want).norm() <= rtol * size < 0.05 * want.norm()


def test_rows_that_are_not_permuted_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: the limits notice q's and k's rows in transformers' order."""
    file = write(tmp_path / "a.gguf", CONFIGS["llama"], "llama", "F32", embedding="F32")
    found = pairs(file, tmp_path)
    assert_close_derived(found["llama.cpp, adapter"], found["ours, adapter"], layers=8)
    monkeypatch.setattr(loader, "row_order", lambda processor, name, rows: torch.arange(rows))
    adapter = tmp_path / "adapter"
    export_gguf(file, adapter, tmp_path / "wrong.gguf")
    model = adapted(load_gguf_in_order(file, monkeypatch))
    with torch.no_grad():
        want = model(IDS).logits[0]
    with pytest.raises(AssertionError, match="relative error"):
        assert_close_derived(logits(file, IDS, tmp_path / "wrong.gguf"), want, layers=8)


def load_gguf_in_order(file: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.undo()
    return load_gguf(file)


def positions(kind: str) -> Any:
    def change(writer: Any, tensors: Any) -> None:
        if kind == "factors":
            tensors["rope_freqs.weight"] = llama3_factors(8.0), "F32"
        else:
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(4.0)
            writer.add_rope_scaling_orig_ctx_len(32)

    return change


@pytest.mark.parametrize(
    "name, kind",
    [
        *(("llama", kind) for kind in ("linear", "yarn", "factors")),
        *((name, kind) for name in ("qwen2", "gemma3") for kind in ("linear", "yarn")),
    ],
)
def test_scaled_positions_are_llama_cpps(name: str, kind: str, tmp_path: Path) -> None:
    ids = torch.randint(3, 96, (1, 120), generator=torch.Generator().manual_seed(0))
    found = []
    for change in (positions(kind), None):
        file = tmp_path / "a.gguf"
        write(file, CONFIGS[name], name, "F32", embedding="F32", change=change)
        with torch.no_grad():
            found.append(load_gguf(file)(ids).logits[0])
        if change is not None:
            want = logits(file, ids)
    rtol = ROUNDOFF if name in GELU else derived_rtol(torch.float32, layers=24)
    assert_close_derived(found[0], want, rtol)
    with pytest.raises(AssertionError, match="relative error"):  # without the scaling
        assert_close_derived(found[1], want, 2 * rtol)


# Quantized files


def quantize(source: Path, kind: str) -> Path:
    """Quantize a file by llama.cpp; return the other one."""
    to = source.with_name(f"{source.stem}.{kind}.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    assert not llama_cpp.llama_model_quantize(
        str(source).encode(), str(to).encode(), ctypes.byref(params)
    )
    return to


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in float32: a width of 512 has K-quants for all layers, q and k too."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 512}
    config = LlamaConfig(**sizes, max_position_embeddings=256, tie_word_embeddings=True)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    file = tmp_path_factory.mktemp("wide") / "wide.gguf"
    return write(file, config, "llama", "F32", embedding="F32")


def assert_adapter_costs_little(found: dict[str, Tensor]) -> None:
    """llama.cpp's rounding of activations with the adapter is at most 1.3 of that without."""
    plain = (found["llama.cpp"] - found["ours"]).square().mean().sqrt().item()
    with_adapter = (found["llama.cpp, adapter"] - found["ours, adapter"]).square().mean().sqrt()
    assert 0 < with_adapter.item() <= 1.3 * plain


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"])
def test_adapter_over_quantized_weights(kind: str, wide: Path, tmp_path: Path) -> None:
    file = quantize(wide, kind)
    types = {t.tensor_type.name for t in gguf.GGUFReader(file).tensors if "attn_q.w" in t.name}
    assert types == {kind.removesuffix("_M")}
    assert_adapter_costs_little(pairs(file, tmp_path))


@pytest.mark.slow
def test_adapter_over_the_demos_model(tmp_path: Path) -> None:
    try:
        file = demo.demo_model()
    except UsageError:
        pytest.skip("`make demo` installs SmolLM2")
    ids = torch.randint(49152, (1, 40), generator=torch.Generator().manual_seed(3))
    assert_adapter_costs_little(pairs(file, tmp_path, ids, size=0.004))


def test_answer_of_llama_cpp(tmp_path: Path) -> None:
    """An error of llama.cpp, here of a file without a model, is returned as the answer."""
    (tmp_path / "none.gguf").write_bytes(b"GGUF")
    said = export.ask_llama_cpp(tmp_path / "none.gguf", tmp_path / "none.gguf", "Hi", 2)
    assert said.startswith("exit status 1: ")
