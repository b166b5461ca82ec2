"""gpt-oss from a checkpoint in its own format, trained packed as PEFT trains it decoded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config, Trainer, TrainingArguments
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.quantizers import auto

pytest.importorskip("transformers.core_model_loading")
from lora_kernels.integrations import FuseCallback, mxfp4, packed_mxfp4
from lora_kernels.integrations.mxfp4 import Pack
from lora_kernels.layers import quantize_experts
from lora_kernels.layers.experts import stack
from lora_kernels.peft import check, explain, fuse
from lora_kernels.peft.explain_rows import KERNELS
from lora_kernels.quantization import QuantizedWeight
from lora_kernels.quantization.tensor import QuantizedTensor
from tests.support import gpt_oss
from tests.support.assertions import assert_as_exact, assert_bitwise_equal, assert_close_derived
from tests.support.peft_models import in_float64, loss_and_gradients
from tests.support.processes import run_python

IDS = torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(2))
BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt_oss")
    gpt_oss.write_checkpoint(folder, **gpt_oss.TINY)
    return folder


def load(folder: Path, **options: Any) -> Any:
    with packed_mxfp4():
        return AutoModelForCausalLM.from_pretrained(folder, **options)


def load_decoded(folder: Path, **options: Any) -> Any:
    """As transformers decodes it, by its own code."""
    config = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def adapted(base: Any) -> Any:
    """With adapters on the attention and the experts, all of which have an effect."""
    return start(gpt_oss.adapted(base, r=4), 1)


def start(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def experts_of(model: Any) -> list[GptOssExperts]:
    return [module for module in model.modules() if type(module) is GptOssExperts]


def exact(model: PeftModel) -> Any:
    twin = in_float64(model)
    for module in twin.modules():  # transformers' grouped GEMM does not take float64
        if hasattr(config := getattr(module, "config", None), "_experts_implementation"):
            config._experts_implementation = "eager"
    return twin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_checkpoint_has_the_bits_of_the_decoded_one(
    checkpoint: Path, dtype: torch.dtype
) -> None:
    known = auto.AUTO_QUANTIZER_MAPPING["mxfp4"]
    packed = load(checkpoint, dtype=dtype)
    assert auto.AUTO_QUANTIZER_MAPPING["mxfp4"] is known
    decoded = load_decoded(checkpoint, dtype=dtype)
    assert len(experts_of(packed)) == 2
    for experts in experts_of(packed):
        for name in gpt_oss.PROJECTIONS:
            weight = experts.get_parameter(name)
            assert type(weight) is QuantizedTensor and not weight.requires_grad
            assert weight.quantized.nbytes < weight.numel() * 0.54 + 2000  # and two tables
    parameters = dict(packed.named_parameters())
    for name, want in decoded.named_parameters():
        got = parameters.pop(name)
        assert_bitwise_equal(got + 0, want)
    assert not parameters
    assert_close_derived(packed(IDS).logits, decoded(IDS).logits, layers=8)


def test_packed_mxfp4_ends_with_an_error_inside_of_it() -> None:
    known = auto.AUTO_QUANTIZER_MAPPING["mxfp4"]
    with pytest.raises(MemoryError), packed_mxfp4():
        raise MemoryError
    assert auto.AUTO_QUANTIZER_MAPPING["mxfp4"] is known


def test_device_map_counts_the_experts_alone_as_4_bit(checkpoint: Path) -> None:
    model = load(checkpoint)
    for name, p in model.named_parameters():
        found = model.hf_quantizer.param_element_size(model, name, p)
        assert found == (17 / 32 if name.endswith(gpt_oss.PROJECTIONS) else p.element_size()), name


def test_sharded_parameter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter is a DTensor here; transformers loads into those on meta."""
    monkeypatch.setattr(mxfp4, "DTensor", torch.nn.Parameter)
    files = {"w_blocks": torch.zeros(2, 4, 1, 16).byte(), "w_scales": torch.zeros(2, 4, 1).byte()}
    for device in ("meta", "cpu"):
        model = torch.nn.ParameterDict({"w": torch.empty(2, 32, 4, device=device)})
        with pytest.raises(NotImplementedError, match=r"^w: got tensor or expert parallelism"):
            Pack(None).convert(files, model, "w")


def test_packed_mxfp4_of_a_config_that_asks_to_decode_decodes(checkpoint: Path) -> None:
    with packed_mxfp4():
        model = load_decoded(checkpoint)
    assert {type(p) for p in model.parameters()} == {torch.nn.Parameter}
    assert not hasattr(model, "hf_quantizer")


def test_packed_checkpoint_trains_as_peft_over_the_decoded_one(checkpoint: Path) -> None:
    """Unfused and fused: the loss and all gradients, beside float64."""
    packed, decoded, seeds = adapted(load(checkpoint)), adapted(load_decoded(checkpoint)), range(4)
    peft = [loss_and_gradients(start(decoded, seed), IDS) for seed in seeds]
    refs = [loss_and_gradients(exact(start(decoded, seed)), IDS) for seed in seeds]
    assert len(refs[0]) == 25  # 24 matrices, and the loss
    assert_as_exact([loss_and_gradients(start(packed, seed), IDS) for seed in seeds], refs, peft)
    fuse(packed)
    rows = explain(packed).rows
    assert len(rows) == 12 and {row.state for row in rows} == {KERNELS}
    assert_as_exact([loss_and_gradients(start(packed, seed), IDS) for seed in seeds], refs, peft)
    assert all(type(experts.gate_up_proj) is QuantizedTensor for experts in experts_of(packed))


def test_packed_checkpoint_on_a_gpus_path_trains_as_peft_over_the_decoded_one(
    checkpoint: Path, gpu_path: None
) -> None:
    packed, decoded, seeds = adapted(load(checkpoint)), adapted(load_decoded(checkpoint)), range(4)
    fuse(packed)
    assert {row.backend for row in explain(packed).rows} == {"eager"}
    gots = [loss_and_gradients(start(packed, seed), IDS) for seed in seeds]
    peft = [loss_and_gradients(start(decoded, seed), IDS) for seed in seeds]
    refs = [loss_and_gradients(exact(start(decoded, seed)), IDS) for seed in seeds]
    assert_as_exact(gots, refs, peft)


@pytest.mark.slow
def test_fused_packed_model_compiled_whole_equals_itself(checkpoint: Path) -> None:
    model = fuse(adapted(load(checkpoint, dtype=torch.float32)))
    want = model(IDS, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close_derived(compiled(IDS, use_cache=False).logits, want, layers=8)


def test_packed_experts_without_adapters_pass_the_gradient_on(checkpoint: Path) -> None:
    """By each of transformers' implementations, and by ours, to the embeddings before them."""
    decoded = load_decoded(checkpoint, experts_implementation="eager")
    want = loss_and_gradients(decoded, IDS)["model.embed_tokens.weight"]
    for implementation in ("eager", "grouped_mm", "batched_mm", "lora_kernels"):
        packed = load(checkpoint, experts_implementation=implementation)
        got = loss_and_gradients(packed, IDS)
        assert not any(name.endswith(gpt_oss.PROJECTIONS) for name in got)
        assert_close_derived(got["model.embed_tokens.weight"], want, layers=8)


def test_adapters_of_a_packed_model_load_in_stock_peft(checkpoint: Path, tmp_path: Path) -> None:
    model = fuse(adapted(load(checkpoint, dtype=torch.float32)))
    want = model(IDS).logits
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(load_decoded(checkpoint, dtype=torch.float32), tmp_path)
    assert_close_derived(stock(IDS).logits, want, layers=8)
    again = fuse(PeftModel.from_pretrained(load(checkpoint, dtype=torch.float32), tmp_path))
    assert_bitwise_equal(again(IDS).logits, want)
    with model.disable_adapter():
        assert_bitwise_equal(model(IDS).logits, load(checkpoint, dtype=torch.float32)(IDS).logits)


def test_check_of_a_packed_model_says_that_it_does_not_merge(checkpoint: Path) -> None:
    model = fuse(adapted(load(checkpoint)))
    found = check(model, BATCH)
    assert found.ok, str(found)
    reasons = {row.reason for row in found.rows if "experts" in row.layer}
    assert len(reasons) == 1 and "got a frozen weight in mxfp4 to write to" in reasons.pop()
    before = model.state_dict()
    with pytest.raises(
        ValueError, match=r"^model: got model.layers.0.mlp.experts, .*load the model decoded"
    ):
        model.merge_and_unload()
    assert model.state_dict().keys() == before.keys()


def test_trainer_takes_a_packed_model(checkpoint: Path, tmp_path: Path) -> None:
    model = adapted(load(checkpoint))
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    settings = {"max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    settings |= {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
    arguments = TrainingArguments(str(tmp_path), save_strategy="no", **settings)
    before = copy.deepcopy(model)
    Trainer(model, arguments, train_dataset=rows, callbacks=[FuseCallback()]).train()
    explain(model).assert_fused()
    for (name, p), (_, old) in zip(
        model.named_parameters(), before.named_parameters(), strict=True
    ):
        assert torch.equal(p + 0, old + 0) is not p.requires_grad, name


def test_packed_model_is_not_saved_or_quantized_again(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    with pytest.raises(ValueError, match="is not serializable"):
        model.save_pretrained(tmp_path)
    save_file(state := model.state_dict(), tmp_path / "state.safetensors")
    assert f"model.layers.1.mlp.experts.{gpt_oss.PROJECTIONS[0]}.form" in state
    other = load(checkpoint)
    for experts in experts_of(other):
        experts.down_proj.copy_(experts_of(model)[0].down_proj)
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert_bitwise_equal(other(IDS).logits, model(IDS).logits)
    weight = stack(experts_of(model)[0], "down_proj")
    quantize_experts(model)
    assert (
        isinstance(weight, QuantizedWeight) and stack(experts_of(model)[0], "down_proj") is weight
    )


def test_checkpoint_without_scales_is_named(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    del tensors[f"{name}_scales"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(RuntimeError, match="CONVERSION"):  # transformers prints what it caught
        load(tmp_path)
    with pytest.raises(
        ValueError, match=f"{name}: got .'down_proj_blocks'. in the checkpoint, want"
    ):
        Pack(None).convert({"down_proj_blocks": [torch.zeros(1)]}, None, name)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_and_training_packed_take_little_more_memory_than_the_file(tmp_path: Path) -> None:
    """At gpt-oss-20b's widths, one layer of 2 experts."""
    sizes = gpt_oss.WIDTHS | {
        "num_hidden_layers": 1,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    size = gpt_oss.write_checkpoint(tmp_path, **sizes)
    done = run_python("-m", "tests.support.gpt_oss", "fused", tmp_path, 32, 1)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.4 * size < found["loading"] < 1.2 * size  # the rest of the file stays mapped
    # Where no native GEMM reads bfloat16, one expert at a time is decoded.
    expert = 2 * 3 * 2880 * 2880
    assert found["training"] < 1.2 * size + 2 * expert
