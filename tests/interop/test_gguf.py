"""GGUF files, trained packed as PEFT trains them decoded by transformers."""

from __future__ import annotations

import copy
import gc
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

pytest.importorskip("gguf")
pytest.importorskip("transformers.quantizers.quantizer_gguf")
import gguf

from lora_kernels.finetune import UsageError
from lora_kernels.finetune.demo import demo_model
from lora_kernels.integrations import FuseCallback, load_gguf
from lora_kernels.integrations import gguf as loader
from lora_kernels.peft import explain, fuse
from lora_kernels.peft.explain_rows import KERNELS
from lora_kernels.quantization.readers.gguf import BLOCKS
from lora_kernels.quantization.tensor import QuantizedTensor
from tests.support.assertions import (
    assert_as_exact,
    assert_bitwise_equal,
    assert_close_derived,
    derived_rtol,
)
from tests.support.gguf_files import (
    ARCHITECTURES,
    CONFIGS,
    MIXTURE,
    hybrid,
    llama3_factors,
    random_blocks,
    write,
)
from tests.support.peft_models import in_float64, loss_and_gradients, randomize
from tests.support.processes import run_python

IDS = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(2))
KINDS = [*BLOCKS, "TQ2_0", "F32"]
EPSILON = 1e-2


def file_of(folder: Path, name: str, kind: str = "Q4_K", **how: Any) -> Path:
    return write(
        folder / f"{name}-{kind}.gguf", CONFIGS[name], ARCHITECTURES.get(name, name), kind, **how
    )


def load_decoded(file: Path, dtype: torch.dtype = torch.float32) -> Any:
    """As transformers decodes it, with the configuration that `load_gguf` reads."""
    config = loader.load_config(file)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=config, dtype=dtype
    )
    # Into one that does not say that it is quantized, which Trainer refuses.
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def packed_weights(model: nn.Module) -> dict[str, QuantizedTensor]:
    return {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def assert_same_weights(packed: Any, decoded: Any) -> None:
    wanted = dict(decoded.named_parameters())
    for name, got in packed.named_parameters():
        assert_bitwise_equal(got + 0, wanted.pop(name) + 0, name)
    assert not wanted


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_each_type_have_the_bits_of_the_decoded_model(kind: str, tmp_path: Path) -> None:
    """With q's and k's rows in Llama's order, and those of a type without a form."""
    file = file_of(tmp_path, "llama", kind)
    if kind == "TQ2_0":
        names = r"blk\.0\.attn_q\.weight, .* and 11 more \(TQ2_0\), which is decoded"
        with pytest.warns(UserWarning, match=names) as warned:
            packed = load_gguf(file)
        assert sum("load_gguf" in str(w.message) for w in warned) == 1
    else:
        packed = load_gguf(file)
    decoded = load_decoded(file)
    assert_same_weights(packed, decoded)
    assert len(packed_weights(packed)) == (14 if kind in BLOCKS else 0)
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    with torch.no_grad():
        assert_close_derived(packed(IDS).logits, decoded(IDS).logits, layers=8)
    # The rows of q are not those of the file, so that the comparison has seen the order.
    (q,) = (t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.attn_q.weight")
    stored = torch.from_numpy(gguf.dequantize(np.array(q.data), q.tensor_type))
    assert not torch.equal(stored, packed.model.layers[0].self_attn.q_proj.weight + 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_each_architecture_have_the_bits_of_the_decoded_model(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings are decoded in pieces, the last one of fewer rows."""
    monkeypatch.setattr(loader, "_CHUNK", 25 * 256)
    file = file_of(tmp_path, name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "load_gguf")
        packed = load_gguf(file, dtype=dtype)
    decoded = load_decoded(file)
    assert_same_weights(packed, decoded.to(dtype))  # rounded once
    linear = [m for m in decoded.modules() if type(m) is nn.Linear and m is not decoded.lm_head]
    assert len(packed_weights(packed)) == len(linear) > 7
    if dtype is torch.float32:
        with torch.no_grad():
            assert_close_derived(packed(IDS).logits, decoded(IDS).logits, layers=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_decoded_and_named_once(dtype: torch.dtype, tmp_path: Path) -> None:
    file = write(tmp_path / "a.gguf", MIXTURE, "qwen3moe", "Q8_0")
    names = r"got blk\.0\.ffn_gate_exps\.weight, .* and 3 more \(Q8_0\), which is decoded"
    with pytest.warns(UserWarning, match=names):
        packed = load_gguf(file, dtype=dtype)
    decoded = load_decoded(file)
    assert_same_weights(packed, decoded.to(dtype))  # rounded once
    assert len(packed_weights(packed)) == 8
    with torch.no_grad():
        assert_close_derived(packed(IDS).logits, decoded(IDS).logits, layers=8)


def test_rows_move_with_their_codes_where_transformers_has_conversions(tmp_path: Path) -> None:
    """Of Qwen3.5; its out_proj, whose columns move, is decoded."""
    file = write(tmp_path / "a.gguf", hybrid(), "qwen35", "Q4_K")
    with pytest.warns(UserWarning, match=r"got blk\.0\.ssm_out\.weight \(Q4_K\), which is decoded"):
        packed = load_gguf(file)
    decoded = load_decoded(file)
    assert_same_weights(packed, decoded)
    assert len(packed_weights(packed)) == 14
    assert isinstance(packed.model.layers[0].linear_attn.in_proj_qkv.weight, QuantizedTensor)
    with torch.no_grad():
        assert_close_derived(packed(IDS).logits, decoded(IDS).logits, layers=8)


class Processor:
    """One of transformers' processors, made up."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def process(self, weights: Any, name: str, **_: Any) -> Any:
        return SimpleNamespace(weights=self.change(weights), name=name)


def test_order_of_rows_is_found_and_other_changes_are_not_taken_for_one() -> None:
    order = loader.row_order(Processor(lambda w: w[::-1]), "a", 4)
    assert order is not None and order.tolist() == [3, 2, 1, 0]
    for change in (
        lambda w: w.T,
        lambda w: w + 1,
        lambda w: w[[0, 0, 1, 2]],
        lambda w: w[:3],
        lambda w: 1 / 0,
    ):
        assert loader.row_order(Processor(change), "a", 4) is None


def test_state_dict_has_plain_tensors_and_loads(tmp_path: Path) -> None:
    for name in ("llama", "lfm2"):
        model = load_gguf(file_of(tmp_path, name))
        state = model.state_dict()
        assert {type(t) for t in state.values()} == {torch.Tensor}
        torch.save(state, tmp_path / "state.pt")
        other = load_gguf(file_of(tmp_path, name, seed=1))
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert_same_weights(other, model)


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "MXFP4", "TQ2_0"])
def test_types_that_transformers_reader_lacks_are_read(kind: str, tmp_path: Path) -> None:
    """Of LFM2, which has a reader of its own in transformers."""
    with torch.no_grad():
        if kind == "TQ2_0":
            with pytest.warns(UserWarning, match="TQ2_0"):
                model = load_gguf(file_of(tmp_path, "lfm2", kind))
        else:
            model = load_gguf(file_of(tmp_path, "lfm2", kind))
    for t in gguf.GGUFReader(tmp_path / f"lfm2-{kind}.gguf").tensors:
        if t.name == "blk.1.attn_q.weight":
            want = torch.from_numpy(gguf.dequantize(np.array(t.data), t.tensor_type))
    got = model.model.layers[1].self_attn.q_proj.weight
    assert isinstance(got, QuantizedTensor) is (kind != "TQ2_0")
    assert_bitwise_equal((got + 0).detach(), want)


def adapted(base: Any, seed: int) -> Any:
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    randomize(model, seed=seed)
    with torch.no_grad():  # larger ones would hide a doubled gradient behind bfloat16's roundings
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.mul_(0.1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_gradients_are_as_exact_as_pefts_over_the_decoded_model(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    file = file_of(tmp_path, name)
    seeds = range(4)
    peft = [adapted(load_decoded(file, dtype), seed) for seed in seeds]
    refs = [loss_and_gradients(in_float64(model), IDS) for model in peft]
    wanted = [loss_and_gradients(model, IDS) for model in peft]
    packed = [adapted(load_gguf(file, dtype=dtype), seed) for seed in seeds]
    assert len(refs[0]) == 29  # 28 matrices, and the loss
    for model in packed:
        fuse(model)
        rows = explain(model).rows
        assert len(rows) == 14 and {row.state for row in rows} == {KERNELS}
    got = [loss_and_gradients(model, IDS) for model in packed]
    assert_as_exact(got, refs, wanted)
    doubled = [{n: g * (2 if "lora_A" in n else 1) for n, g in each.items()} for each in got]
    with pytest.raises(AssertionError):
        assert_as_exact(doubled, refs, wanted)


def sgd_steps(model: Any, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    """Take three steps of SGD; return how far each adapter has moved, and the last loss."""
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([model.get_parameter(n) for n in start], lr=0.05)
    for _ in range(3):
        found = loss_and_gradients(model, ids)
        optimizer.step()
    moved = {n: model.get_parameter(n).detach() - p for n, p in start.items()}
    return moved | {"loss": found["loss"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_three_steps_are_as_exact_as_pefts_over_the_decoded_model(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    file, seeds = file_of(tmp_path, name), range(4)
    peft = [adapted(load_decoded(file, dtype), seed) for seed in seeds]
    refs = [sgd_steps(in_float64(model)) for model in peft]
    packed = [fuse(adapted(load_gguf(file, dtype=dtype), seed)) for seed in seeds]
    assert_as_exact(
        [sgd_steps(model) for model in packed], refs, [sgd_steps(model) for model in peft]
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smollm2_trains_as_exactly_as_pefts_over_the_decoded_model(dtype: torch.dtype) -> None:
    """Its file in Q4_1: logits, gradients, and three steps."""
    try:
        file = demo_model()
    except UsageError:
        pytest.skip("`make demo` installs SmolLM2")
    ids = torch.randint(49152, (1, 32), generator=torch.Generator().manual_seed(5))
    peft = adapted(load_decoded(file, dtype), 0)
    packed = fuse(adapted(load_gguf(file, dtype=dtype), 0))
    assert len(packed_weights(packed)) == 210
    ref = in_float64(peft)
    models = packed, ref, peft
    with torch.no_grad():
        found = [{"logits": model(ids).logits} for model in models]
    assert_as_exact(*found)
    assert_as_exact(*(loss_and_gradients(model, ids) for model in models))
    assert_as_exact(*(sgd_steps(model, ids) for model in models))


def steps_of(model: Any, out: Path, **how: Any) -> dict[str, torch.Tensor]:
    """Train three steps by Trainer's default optimizer; return how far each adapter has moved."""
    start = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(3, 1)]
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    rest = {"report_to": [], "use_cpu": True, "save_steps": 2, "seed": 1, "data_seed": 1}
    rest["adam_epsilon"] = EPSILON
    args = TrainingArguments(str(out), **settings | rest | how)
    Trainer(model, args, train_dataset=rows, callbacks=[FuseCallback()]).train()
    return {n: model.get_parameter(n).detach().double() - p for n, p in start.items()}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_three_steps_move_adapters_as_pefts_over_the_decoded_model(
    name: str, tmp_path: Path
) -> None:
    """AdamW, with an ε above the gradients' rounding, which would else be as large as a step."""
    file = file_of(tmp_path, name)
    want = steps_of(adapted(load_decoded(file), 0), tmp_path / "peft")
    model = adapted(load_gguf(file), 0)
    got = steps_of(model, tmp_path / "ours")
    assert {row.state for row in explain(model).rows} == {KERNELS}
    assert_close_derived(got, want, derived_rtol(torch.float32, layers=24))
    # A run that goes on from its checkpoint, with the layers computed again, ends where it ended.
    again = adapted(load_gguf(file), 0)
    args = {"resume_from_checkpoint": str(tmp_path / "ours" / "checkpoint-2")}
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(3, 1)]
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    rest = {"report_to": [], "use_cpu": True, "save_strategy": "no", "seed": 1, "data_seed": 1}
    more = {"gradient_checkpointing": True, "adam_epsilon": EPSILON}
    trainer = Trainer(
        again,
        TrainingArguments(str(tmp_path / "again"), **settings | rest | more),
        train_dataset=rows,
        callbacks=[FuseCallback()],
    )
    trainer.train(**args)
    for n in want:
        assert_close_derived(again.get_parameter(n), model.get_parameter(n), layers=8)


def test_the_model_generates_and_its_adapter_loads_into_peft(tmp_path: Path) -> None:
    file = file_of(tmp_path, "llama", "Q4_1")
    model = adapted(load_gguf(file), 1)
    fuse(model, linears=True)
    model.save_pretrained(tmp_path / "adapter")
    config = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert str(file) in config  # the file, not its folder
    peft = PeftModel.from_pretrained(load_decoded(file), str(tmp_path / "adapter"))
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    how |= {"return_dict_in_generate": True}
    assert_generates_as(model.eval().generate(input_ids=IDS[:1], **how), peft.eval())
    assert_close_derived(copy.deepcopy(model)(IDS).logits, model(IDS).logits, layers=8)


@torch.no_grad()
def assert_generates_as(got: Any, model: Any) -> None:
    """Each token's logits are those of the model in one forward over the same tokens."""
    want = model(got.sequences[:, :-1]).logits[:, -len(got.logits) :]
    assert_close_derived(torch.stack(got.logits, 1), want, layers=16)


def test_layers_without_an_adapter_read_the_codes_in_generation(tmp_path: Path) -> None:
    file = file_of(tmp_path, "llama", "Q5_K")
    model = get_peft_model(load_gguf(file), LoraConfig(r=4, target_modules=["q_proj"])).eval()
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    how |= {"return_dict_in_generate": True}
    peft = copy.deepcopy(model)
    fuse(model, linears=True)
    linears = explain(model).linears
    assert len(linears) == 13 and {row.state for row in linears} == {KERNELS}
    assert_generates_as(model.generate(input_ids=IDS[:1], **how), peft)


def test_merging_and_saving_the_base_are_refused_with_the_remedy(tmp_path: Path) -> None:
    model = adapted(load_gguf(file_of(tmp_path, "llama")), 0)
    before = model(IDS).logits
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"frozen in 4 bits with a shift.*load the model dec"):
            merge()
    with pytest.raises(ValueError, match=r"codes of .*gguf_file=FILE\) decodes it"):
        model.get_base_model().save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists() or not any((tmp_path / "base").iterdir())
    assert_bitwise_equal(model(IDS).logits, before)


def test_merging_is_refused_without_fuse_too(tmp_path: Path) -> None:
    """In a process of its own: that PEFT's methods check holds for the whole process."""
    code = """
import sys
from peft import LoraConfig, get_peft_model
from lora_kernels.integrations import load_gguf
model = get_peft_model(load_gguf(sys.argv[1]), LoraConfig(target_modules=["q_proj"]))
try:
    model.merge_and_unload()
except ValueError as error:
    print(error)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    done = run_python(script, file_of(tmp_path, "llama"))
    assert "load the model decoded" in done.stdout, done.stderr


def test_other_code_that_loads_gguf_still_decodes(tmp_path: Path) -> None:
    file = file_of(tmp_path, "llama")
    load_gguf(file)
    assert not packed_weights(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name))


def test_the_model_keeps_nothing_of_the_file_open(tmp_path: Path) -> None:
    file = file_of(tmp_path, "llama")
    model = load_gguf(file)
    assert not any(isinstance(each, gguf.GGUFReader) for each in gc.get_objects())
    want = model(IDS).logits
    file.write_bytes(b"")
    assert_bitwise_equal(model(IDS).logits, want)


def test_another_file_of_the_same_name_has_its_own_configuration(tmp_path: Path) -> None:
    file = file_of(tmp_path, "llama")
    assert load_gguf(file).config.num_key_value_heads == 2
    size = file.stat().st_size
    file_of(tmp_path, "llama", change=lambda writer, tensors: writer.add_rope_freq_base(500.0))
    assert file.stat().st_size == size
    assert load_gguf(file).config.rope_parameters["rope_theta"] == 500.0
    config = loader.load_config(file)
    config.rope_parameters["rope_theta"] = config.num_hidden_layers = 3
    again = loader.load_config(file)
    assert (again.rope_parameters["rope_theta"], again.num_hidden_layers) == (500.0, 2)


# What transformers does not read of a file, and llama.cpp does. tests/interop/test_llama_cpp.py
# compares the logits.


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rotary_frequencies_are_divided_by_the_files_factors(factor: float, tmp_path: Path) -> None:
    """By the configuration, so that a merged model has them too."""
    factors = llama3_factors(factor)
    assert len(np.unique(factors)) > 4

    def change(writer: Any, tensors: Any) -> None:
        tensors["rope_freqs.weight"] = factors, "F32"

    plain = load_gguf(file_of(tmp_path, "llama")).model.rotary_emb.inv_freq
    model = load_gguf(file_of(tmp_path, "llama", change=change))
    want = plain / torch.from_numpy(factors)
    assert_close_derived(model.model.rotary_emb.inv_freq, want)
    assert model.config.rope_parameters["factor"] == factor


def test_other_factors_of_frequencies_are_refused(tmp_path: Path) -> None:
    def change(writer: Any, tensors: Any) -> None:
        tensors["rope_freqs.weight"] = np.linspace(1, 8, 32).astype(np.float32), "F32"

    with pytest.raises(ValueError, match=r"has other factors in rope_freqs\.weight than Llama 3"):
        load_gguf(file_of(tmp_path, "llama", change=change))


@pytest.mark.parametrize("kind", ["linear", "yarn", "longrope", "attention"])
def test_scaling_of_positions_is_the_files(kind: str, tmp_path: Path) -> None:
    def change(writer: Any, tensors: Any) -> None:
        name = "yarn" if kind == "attention" else kind
        writer.add_rope_scaling_type(gguf.RopeScalingType(name))
        if kind == "attention":
            writer.add_rope_scaling_attn_factors(1.2)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    file = file_of(tmp_path, "qwen2", change=change)
    if kind in ("longrope", "attention"):
        with pytest.raises(ValueError, match=r"scales positions by '\w+' with a factor of atten"):
            load_gguf(file)
        return
    parameters = load_gguf(file).config.rope_parameters
    assert (parameters["rope_type"], parameters["factor"]) == (kind, 4.0)
    assert parameters.get("original_max_position_embeddings") == (32 if kind == "yarn" else None)


@pytest.mark.parametrize(
    "name, layers, want",
    [
        ("gemma2", 2, 64),
        ("gemma2", 46, 32),
        ("gemma2", 62, 64),
        ("gemma3", 6, 64),
        ("gemma3", 62, 32),
    ],
)
def test_gemmas_scale_of_attention_is_llama_cpps(
    name: str, layers: int, want: int, tmp_path: Path
) -> None:
    """Of 27B, which has 46 or 62 layers, it is the width over the heads."""
    config = copy.deepcopy(CONFIGS[name])
    config.num_attention_heads, config.num_hidden_layers = 8, layers
    config.layer_types = ["full_attention"] * layers
    write(tmp_path / "a.gguf", config, name, "Q8_0")
    assert loader.load_config(tmp_path / "a.gguf").query_pre_attn_scalar == want


def test_gemma_3_scales_the_positions_of_its_full_attention_alone(tmp_path: Path) -> None:
    def change(writer: Any, tensors: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    found = loader.load_config(file_of(tmp_path, "gemma3", change=change)).rope_parameters
    assert (found["full_attention"]["rope_type"], found["full_attention"]["factor"]) == (
        "linear",
        8.0,
    )
    assert found["sliding_attention"]["rope_type"] == "default"


def test_a_llama_without_grouped_heads_has_its_rows_in_order(tmp_path: Path) -> None:
    """Older files do not say how many key heads there are; transformers then moves no row."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.num_key_value_heads = 4
    file = write(tmp_path / "a.gguf", config, "llama", "Q8_0")
    want = load_gguf(file).model.layers[0].self_attn.k_proj.weight + 0

    def change(writer: Any, tensors: Any) -> None:
        del writer.kv_data[0]["llama.attention.head_count_kv"]

    got = load_gguf(write(file, config, "llama", "Q8_0", change=change))
    assert_bitwise_equal(got.model.layers[0].self_attn.k_proj.weight + 0, want)


# Files that are refused, before weights are allocated


@pytest.fixture
def no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        pytest.fail("a tensor of the file was read")

    monkeypatch.setattr(loader.Entry, "__getitem__", fail)


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.99])
def test_a_file_cut_short_is_refused(share: float, tmp_path: Path) -> None:
    data = file_of(tmp_path, "llama").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"^file: .*cut\.gguf is no GGUF file, cut short or dam"):
        load_gguf(cut)


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize("name", ["llama", "lfm2"])
@pytest.mark.parametrize(
    "change, match",
    [
        ("type", r"cut short or damaged.*99\)? is not a valid GGMLQuantizationType"),
        ("undecodable", r"blk\.1\.attn_q\.weight of .* is in Q8_K, which gguf cannot decode"),
        ("architecture", r"has the architecture 'unknown', which transformers does not load"),
        ("rows", r"got blk\.0\.ffn_up\.weight of \[256, 256\], want \[512, 256\], as model\.lay"),
        ("swapped", r"got blk\.0\.ffn_up\.weight of \[256, 512\], want \[512, 256\], as model\.l"),
        ("embedding", r"got token_embd\.weight of \[95, 256\], want \[96, 256\]"),
        ("part", r"is one of 3 parts, want a whole one: llama-gguf-split --merge"),
        ("bias", r"got blk\.1\.attn_q\.bias, for which transformers' \w+ForCausalLM has no par"),
    ],
)
def test_a_file_of_another_model_is_refused(
    name: str, change: str, match: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)

    def edit(writer: Any, tensors: Any) -> None:
        if change == "rows":
            tensors["blk.0.ffn_up.weight"] = random_blocks("Q4_K", 256, 256, 0.1, rng), "Q4_K"
        if change == "swapped":
            tensors["blk.0.ffn_up.weight"] = random_blocks("Q4_K", 256, 512, 0.1, rng), "Q4_K"
        if change == "embedding":
            tensors["token_embd.weight"] = random_blocks("Q8_0", 95, 256, 0.1, rng), "Q8_0"
        if change == "bias":
            tensors["blk.1.attn_q.bias"] = np.zeros(256, dtype=np.float32), "F32"
        if change == "part":
            writer.add_uint16("split.count", 3)
        if change == "undecodable":
            tensors["blk.1.attn_q.weight"] = np.zeros((256, 292), dtype=np.uint8), "Q8_K"

    file = file_of(tmp_path, name, change=edit)
    data = file.read_bytes()
    if change == "architecture":
        value, other = name.encode(), b"unknown"
        lengths = (len(word).to_bytes(8, "little") for word in (value, other))
        old, new = (length + word for length, word in zip(lengths, (value, other), strict=True))
        file.write_bytes(data.replace(old, new, 1))
    if change == "type":
        at = data.index(b"blk.1.attn_q.weight") + len(b"blk.1.attn_q.weight") + 4 + 16
        file.write_bytes(data[:at] + (99).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ValueError, match=match):
        load_gguf(file)


@pytest.mark.parametrize("name, key", [("llama", r"mlp\.up_proj"), ("lfm2", r"feed_forward\.w3")])
def test_a_missing_tensor_is_named(name: str, key: str, tmp_path: Path) -> None:
    file = file_of(tmp_path, name, change=lambda _, tensors: tensors.pop("blk.1.ffn_up.weight"))
    with pytest.raises(ValueError, match=rf"lacks model\.layers\.1\.{key}\.weight"):
        load_gguf(file)


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"file: there is no file .*none\.gguf"):
        load_gguf(tmp_path / "none.gguf")
    with pytest.raises(TypeError, match=r"dtype: got torch\.float64, want float32"):
        load_gguf(file_of(tmp_path, "llama"), dtype=torch.float64)
    shutil.copy(__file__, tmp_path / "text.gguf")
    with pytest.raises(ValueError, match=r"no GGUF file.*magic"):
        load_gguf(tmp_path / "text.gguf")


def test_a_layer_of_prediction_is_left_out(tmp_path: Path) -> None:
    """llama.cpp stores it behind the model's last layer, and does not run it either."""

    def change(writer: Any, tensors: Any) -> None:
        tensors["blk.2.nextn.eh_proj.weight"] = np.zeros((256, 512), dtype=np.float32), "F32"

    model = load_gguf(file_of(tmp_path, "llama", change=change))
    assert len(packed_weights(model)) == 14
