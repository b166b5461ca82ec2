"""A module's `state_dict` keeps packed weights packed, and `load_state_dict` takes it."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from lora_kernels.oracle import forms
from lora_kernels.quantization import QuantizedWeight, pack_parameter, quantize_4bit
from lora_kernels.quantization.tensor import QuantizedTensor
from tests.support.assertions import assert_bitwise_equal
from tests.support.processes import run_python

N, K = 64, 32
FORMATS = ("nf4", "fp4", "mxfp4", "nvfp4")
FORMS = ("int4-32-half-shift", "signed4-16", "int8-16-nested-shift", "e4m3-32-shift")


def quantize(dense: Tensor, format: str, double_quant: bool = True) -> QuantizedWeight:
    if forms.is_form(format):
        return forms.build(dense.float(), format)
    return quantize_4bit(dense, format, double_quant=double_quant)


class Experts(nn.Module):
    """Two packed parameters of one module, the second [E, K, N]."""

    def __init__(self, seed: int = 0, quant_type: str = "mxfp4", double_quant: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, is_transposed in (("up", False), ("down", True)):
            dense = torch.randn(3, N, K, generator=generator).bfloat16()
            shaped = dense.mT.contiguous() if is_transposed else dense
            setattr(self, name, nn.Parameter(shaped, requires_grad=False))
            weight = quantize(dense, quant_type, double_quant)
            pack_parameter(
                self, name, dataclasses.replace(weight, dtype=dense.dtype), is_transposed
            )
        self.bias = nn.Parameter(torch.randn(N, generator=generator))

    def decoded(self) -> dict[str, Tensor]:
        return {name: p + 0 for name, p in self.named_parameters()}


def through_safetensors(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    save_file(state, folder / "model.safetensors")
    return load_file(folder / "model.safetensors")


def through_torch(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Tensor] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("store", [through_safetensors, through_torch])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", FORMATS + FORMS)
def test_state_dict_of_packed_weights_saved_and_loaded_is_that(
    quant_type: str, double_quant: bool, store: Any, assign: bool, tmp_path: Path
) -> None:
    saved, other = (Experts(seed, quant_type, double_quant) for seed in (1, 2))
    model, target = nn.Sequential(saved), nn.Sequential(other)
    state = store(model.state_dict(), tmp_path)
    assert all(type(t) is Tensor for t in state.values())
    assert sum(t.nbytes for t in state.values()) < sum(p.nbytes for p in saved.parameters())
    target.load_state_dict(state, assign=assign)
    for name, want in saved.decoded().items():
        got = other.get_parameter(name)
        assert type(got) is type(saved.get_parameter(name))
        assert not got.requires_grad or name == "bias"
        assert_bitwise_equal(got + 0, want)
    assert_bitwise_equal(other.down.dequantize(), saved.down.dequantize())


def test_state_dict_of_a_copied_cast_or_nested_module_is_packed() -> None:
    model = nn.ModuleDict({"experts": copy.deepcopy(Experts())}).to(torch.float16)
    state = model.state_dict(prefix="model.")
    assert "model.experts.up.form" in state and "model.experts.up" not in state
    other = nn.ModuleDict({"experts": Experts(1)})
    state = {k.removeprefix("model."): t for k, t in state.items()}
    other.load_state_dict(state)
    assert other["experts"].up.dtype is torch.bfloat16  # as a dense parameter's
    assigned = nn.ModuleDict({"experts": Experts(1)})
    assigned.load_state_dict(state, assign=True)
    assert assigned["experts"].up.dtype is torch.float16
    assert_bitwise_equal(other["experts"].up.dequantize().half(), model["experts"].up.dequantize())


def test_snapshot_of_a_state_dict_is_loaded_back() -> None:
    model = Experts()
    want, snapshot = model.decoded(), {k: t.clone() for k, t in model.state_dict().items()}
    model.load_state_dict(Experts(1).state_dict())
    assert not torch.equal(model.up + 0, want["up"])
    model.load_state_dict(snapshot)
    for name, got in model.decoded().items():
        assert_bitwise_equal(got, want[name])


def form_with(**changes: Any) -> Any:
    def change(state: dict[str, Tensor]) -> None:
        form = json.loads(bytes(state["up.form"].tolist())) | changes
        form = {key: value for key, value in form.items() if value is not None}
        text = bytearray(json.dumps(form), "utf-8")
        state["up.form"] = torch.frombuffer(text, dtype=torch.uint8)

    return change


def dense_up(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for name in [name for name in state if name.startswith("up.")]:
        del state[name]
    return {"up": torch.zeros(3, N, K)}


def without(name: str) -> Any:
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (form_with(version=2), r"up\.form: got version 2, want 1: another release"),
        (form_with(version=None), r"up\.form: got version None, want 1"),
        (form_with(is_transposed=None), "up: got entries of no packed weight, 'is_transposed'"),
        (form_with(is_transposed="false"), "up: got entries of no packed weight, got is_transpos"),
        (form_with(dtype="int99"), "up: got entries of no packed weight, .*int99"),
        (form_with(blocksize=64), "up: got entries of no packed weight, blocksize: got 64"),
        (form_with(zero_point=1), "up: got entries of no packed weight, .*zero_point"),
        (without("up.packed"), "up: got entries of no packed weight, .*packed"),
        (without("up.form"), r"up: got \[.*\], want up.form beside them"),
        (lambda state: state.update({"up.form": torch.zeros(3)}), r"up\.form: got torch.float32"),
        (lambda state: state.update({"up.packed": state["up.packed"][1:]}), "packed: got shape"),
        (
            lambda state: state.update(Experts(1, "nvfp4").state_dict()),
            "want the form of QuantizedT",
        ),
        (
            lambda state: state.update({"up.form": None}),
            r"up\.form: got NoneType, want a JSON",
        ),
        (lambda state: state.update({"up": torch.ones(3, N, K)}), r"up: got it and \['up.absmax'"),
        (lambda state: state.update(dense_up(state)), "got a frozen weight in mxfp4"),
    ],
)
def test_incomplete_or_other_entries_are_refused(change: Any, message: str) -> None:
    model = Experts()
    want, state = model.decoded(), dict(Experts(1).state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    assert_bitwise_equal(model.up + 0, want["up"])


def test_missing_packed_weight_is_a_missing_key() -> None:
    model = Experts()
    state = {k: t for k, t in model.state_dict().items() if not k.startswith("up.")}
    found = model.load_state_dict(state, strict=False)
    names = ["packed", "absmax", "code", "nested_code", "form"]
    assert found.missing_keys == [f"up.{name}" for name in names] and not found.unexpected_keys


def test_packed_state_in_a_dense_module_is_unexpected() -> None:
    linear = nn.Linear(K, N)
    packed = nn.Linear(K, N)
    pack_parameter(packed, "weight", quantize_4bit(packed.weight, "mxfp4"))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight\.packed"):
        linear.load_state_dict(packed.state_dict())


@pytest.mark.parametrize("quant_type", FORMATS + FORMS)
def test_entries_of_a_state_dict_are_the_weights_memory(quant_type: str, tmp_path: Path) -> None:
    """PyTorch's distributed checkpoints load into them. NVFP4's table has the global scale."""
    model, other = Experts(0, quant_type), Experts(1, quant_type)
    with torch.no_grad():
        weight = quantize(7 * torch.randn(3, N, K).bfloat16(), quant_type)
        pack_parameter(other, "up", dataclasses.replace(weight, dtype=torch.bfloat16))
    checkpoint.save(other.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    checkpoint.load(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    for name, want in other.decoded().items():
        assert_bitwise_equal(model.get_parameter(name) + 0, want)
    other = Experts(2, quant_type)
    state = get_model_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    set_model_state_dict(other, state)
    assert_bitwise_equal(other.up + 0, model.up + 0)


@pytest.mark.parametrize("quant_type", FORMATS)
def test_modules_packed_with_one_weight_share_no_table(quant_type: str) -> None:
    """Tables of one format are one tensor, and safetensors refuses tensors that share memory."""
    weight, linears = (
        quantize_4bit(torch.ones(N, K), quant_type),
        [nn.Linear(K, N), nn.Linear(K, N)],
    )
    for linear in linears:
        pack_parameter(linear, "weight", weight)
    for name in ("code", "nested_code"):
        a, b = (getattr(linear.weight, name) for linear in linears)
        assert a.data_ptr() != b.data_ptr()


def tied() -> Any:
    model = nn.ModuleDict({"a": Experts(0), "b": Experts(1)})
    model["b"].up = model["a"].up
    return model


def test_tied_packed_weights_are_saved_once_and_loaded(tmp_path: Path) -> None:
    model, other = tied(), tied()
    model["a"].load_state_dict(Experts(2).state_dict())
    save_model(model, str(tmp_path / "model.safetensors"))
    load_model(other, str(tmp_path / "model.safetensors"))
    for name, p in model.named_parameters():
        assert_bitwise_equal(other.get_parameter(name) + 0, p + 0)
    assert other["a"].up is other["b"].up


def layers() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(K, K) for _ in range(3)))
    for i in (0, 1):
        pack_parameter(model[i], "weight", quantize_4bit(model[i].weight, "nvfp4"))
    return model


@pytest.mark.parametrize(
    "offload",
    [
        lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
        lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu"),
        lambda model, folder: accelerate.dispatch_model(
            model, {"0": "disk", "1": "cpu", "2": "cpu"}, "cpu", offload_dir=folder
        ),
    ],
    ids=["cpu", "disk", "dispatched"],
)
def test_packed_weights_that_accelerate_offloads_give_the_same(
    offload: Any, tmp_path: Path
) -> None:
    model, x = layers(), torch.randn(5, K)
    want = model(x)
    offload(model, str(tmp_path))
    for _ in range(2):
        assert_bitwise_equal(model(x), want)


def test_tied_packed_weights_that_accelerate_dispatches_are_no_other_weights() -> None:
    """accelerate takes parameters with one `data_ptr` for one parameter."""
    model, x = layers(), torch.randn(5, K)
    model[2].weight = model[1].weight
    want = model(x)
    places = {"0": "cpu", "1": "cpu", "2": "cpu"}
    accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert_bitwise_equal(model(x), want)
    assert model[0].weight is not model[1].weight


@pytest.mark.parametrize("safe_serialization", [False, True])
def test_accelerates_state_of_a_packed_model_is_loaded(
    tmp_path: Path, safe_serialization: bool
) -> None:
    def peft_model(seed: int) -> Any:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(K, N))
        pack_parameter(model[0], "weight", quantize_4bit(model[0].weight, "mxfp4"))
        return get_peft_model(model, LoraConfig(r=5, target_modules=["0"], init_lora_weights=False))

    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(peft_model(0))
    x = torch.randn(3, K)
    want = model(x)
    accelerator.save_state(str(tmp_path), safe_serialization=safe_serialization)
    with torch.no_grad():
        for p in model.parameters():
            if not isinstance(p, QuantizedTensor):
                p.add_(1)
    model.base_model.model[0].base_layer.weight.copy_(
        QuantizedTensor(quantize_4bit(torch.ones(N, K), "mxfp4"))
    )
    accelerator.load_state(str(tmp_path))
    assert_bitwise_equal(model(x), want)


def test_state_dict_is_loaded_without_the_package(tmp_path: Path) -> None:
    torch.save(Experts().state_dict(), tmp_path / "state.pt")
    code = "import sys, torch; print(len(torch.load(sys.argv[1])), 'lora_kernels' in sys.modules)"
    done = run_python("-c", code, tmp_path / "state.pt")
    assert done.stdout.split() == [str(len(Experts().state_dict())), "False"], done.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("weight", torch.ones(N, K)), TypeError, "weight: got Tensor, want a QuantizedWeight"),
        (("bias", None), ValueError, r"weight: got \[64, 32\], want \[64\], the shape of bias"),
        (("w", None), ValueError, "name: got 'w', want one of the module's parameters: weight, b"),
        (("weight", None, True), ValueError, r"weight: got \[32, 64\], want \[64, 32\]"),
    ],
)
def test_pack_parameter_refuses_other_arguments(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(ValueError, match=r"^module: got an nn\.MultiheadAttention"):
        pack_parameter(
            nn.MultiheadAttention(K, 4), "in_proj_weight", quantize_4bit(torch.ones(2, K))
        )
    linear = nn.Linear(K, N)
    name, weight, *rest = arguments
    weight: QuantizedWeight | Tensor = (
        weight if weight is not None else quantize_4bit(torch.ones(N, K))
    )
    with pytest.raises(error, match=message):
        pack_parameter(linear, name, weight, *rest)  # type: ignore[arg-type]
    assert type(linear.weight) is nn.Parameter and not linear._state_dict_hooks
