"""Linear layers of compressed-tensors and torchao in MXFP4 and NVFP4, trained as those decoded.

`make matrix` installs the libraries; stand-ins with their attributes are tested everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from enum import Enum
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels.peft import check, explain, fuse, keep_packed, merged_weights, unfuse
from lora_kernels.peft.explain_rows import ADAPTER, KERNELS, LIBRARY
from lora_kernels.quantization import QuantizedWeight, pack_parameter, quantize_4bit
from lora_kernels.quantization.e2m1 import swap_nibbles
from lora_kernels.quantization.readers.torchao import unswizzle
from lora_kernels.quantization.tensor import QuantizedTensor
from tests.interop.quantized_layers import LAYERS, LIBRARIES, Built
from tests.support.assertions import assert_as_exact, assert_bitwise_equal
from tests.support.peft_models import MLP, loss_and_gradients, randomize

SIZES = (96, 192, 64)  # rows and columns of scales that torchao's swizzled blocks pad
bf16 = torch.bfloat16
X = torch.randn(3, 11, SIZES[0], generator=torch.Generator().manual_seed(0)).to(bf16)
pytestmark = pytest.mark.filterwarnings("ignore")

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA_IDS = torch.randint(64, (3, 29), generator=torch.Generator().manual_seed(0))

Decoded = dict[str, Tensor]  # by the name of the layer, as its library decodes it


# Stand-ins with the attributes of compressed-tensors 0.20.1 and torchao 0.18.0


class Status(str, Enum):
    COMPRESSED = "compressed"
    DECOMPRESSED = "decompressed"


def quantized_forward(self: Any, input: Tensor) -> Tensor:
    raise AssertionError("a compressed layer has no weight to multiply with")


FORWARD = FunctionType(
    quantized_forward.__code__, {"__name__": "compressed_tensors.quantization.lifecycle.forward"}
)


def parts_of(weight: Tensor, group_size: int) -> tuple[Tensor, ...]:
    """Codes with the even element low, scales, and NVFP4's global scale, which multiplies."""
    found = quantize_4bit(weight, "mxfp4" if group_size == 32 else "nvfp4")
    (N, K), table = found.shape, found.nested_code
    packed, scale = swap_nibbles(found.packed).view(N, K // 2), found.absmax.view(N, -1)
    assert table is not None
    if group_size == 32:
        return packed, scale
    return packed, scale.view(torch.float8_e4m3fn), table[56].clone()  # byte 56 is 1


def like_compressed_tensors(group_size: int, **scheme: Any) -> Callable[[MLP], Decoded]:
    def quantize(net: MLP) -> Decoded:
        decoded = {}
        for name in ("up", "down"):
            linear: Any = getattr(net, name)
            packed, scale, *outer = parts_of(linear.weight.detach(), group_size)
            del linear.weight
            tensors = {"weight_packed": packed, "weight_scale": scale}
            if outer:
                tensors["weight_global_scale"] = 1 / outer[0].view(1)
                decoded[name] = QuantizedWeight.from_nvfp4(
                    packed, scale, tensors["weight_global_scale"], global_op="divide"
                ).dequantize()
            else:
                decoded[name] = QuantizedWeight.from_mxfp4(packed, scale).dequantize()
            for key, t in tensors.items():
                linear.register_parameter(key, nn.Parameter(t, requires_grad=False))
            weights = SimpleNamespace(
                num_bits=4, type="float", symmetric=True, group_size=group_size, actorder=None
            )
            given = {"weights": weights, "input_activations": None, "output_activations": None}
            linear.quantization_scheme = SimpleNamespace(**given | scheme)
            linear.quantization_status = Status.COMPRESSED
            linear.forward = MethodType(FORWARD, linear)
        net.ct_decompress_hook = net.register_forward_pre_hook(decompress)
        return decoded

    return quantize


def decompress(module: nn.Module, args: Any) -> None:
    raise AssertionError("compressed-tensors decodes the model")


class NVFP4Tensor(Tensor):
    """torchao's, as far as it is read."""

    @staticmethod
    def __new__(cls, dense: Tensor, **_: Any) -> Any:
        return Tensor._make_subclass(cls, dense)

    def __init__(self, dense: Tensor, **attributes: Any) -> None:
        vars(self).update(attributes)

    __torch_function__ = torch._C._disabled_torch_function_impl

    def get_hp_scales(self: Any) -> Tensor:
        return self.per_tensor_scale * self.row_scales.float()


class MXTensor(NVFP4Tensor):
    pass


for _cls, _module in ((NVFP4Tensor, "nvfp4_tensor"), (MXTensor, "mx_tensor")):
    _cls.__module__ = f"torchao.prototype.mx_formats.{_module}"


def swizzle(scales: Tensor) -> Tensor:
    """Rows in blocks of 128 × 4, by their definition."""
    rows, columns = scales.shape
    row_blocks, column_blocks = -(-rows // 128), -(-columns // 4)
    out = torch.zeros(row_blocks * column_blocks * 512, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            block = row // 128 * column_blocks + column // 4
            at = block * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
            out[at] = scales.view(torch.uint8)[row, column]
    return out.view(row_blocks * 128, column_blocks * 4).view(scales.dtype)


def like_torchao(group_size: int, **attributes: Any) -> Callable[[MLP], Decoded]:
    def quantize(net: MLP) -> Decoded:
        decoded = {}
        for name in ("up", "down"):
            linear: Any = getattr(net, name)
            qdata, scale, *outer = parts_of(linear.weight.detach(), group_size)
            given = {"qdata": qdata, "block_size": group_size, "orig_dtype": bf16}
            given |= {"act_quant_kwargs": None, "is_swizzled_scales": group_size == 16}
            if outer:
                decoded[name] = QuantizedWeight.from_nvfp4(
                    qdata, scale, outer[0], global_op="multiply"
                ).dequantize()
                given |= {
                    "scale": swizzle(scale),
                    "row_scales": scale,
                    "per_tensor_scale": outer[0],
                }
                weight: Any = NVFP4Tensor(decoded[name], **given | attributes)
            else:
                decoded[name] = QuantizedWeight.from_mxfp4(qdata, scale).dequantize()
                given |= {"scale": scale, "elem_dtype": "torch.float4_e2m1fn_x2"}
                weight = MXTensor(decoded[name], **given | attributes)
            linear._parameters["weight"] = weight
        return decoded

    return quantize


# The libraries


def compressed_tensors(group_size: int, name: str = "") -> Callable[[MLP], Decoded]:
    def quantize(net: MLP) -> Decoded:
        ct = pytest.importorskip("compressed_tensors.quantization", exc_type=ImportError)
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

        format = name or {16: "NVFP4A16", 32: "MXFP4A16"}[group_size]
        given = preset_name_to_scheme(format, ["Linear"])
        config = ct.QuantizationConfig(config_groups={"group": given})
        ct.apply_quantization_config(net, config)
        for linear in (net.up, net.down):
            blocks = linear.weight.float().view(linear.out_features, -1, group_size)
            absmax = blocks.abs().amax(-1)
            if group_size == 16:
                outer = 448 * 6 / absmax.max()
                linear.weight_global_scale.data.fill_(outer)
                linear.weight_scale.data.copy_((absmax / 6 * outer).to(torch.float8_e4m3fn))
            else:
                linear.weight_scale.data.copy_(torch.exp2(absmax.log2().floor() - 2))
            if hasattr(linear, "input_global_scale"):
                linear.input_global_scale.data.fill_(448 * 6 / 4)
        compressor = ModelCompressor(quantization_config=config)
        compressor.compress_model(net)
        twin = copy.deepcopy(net)
        compressor.decompress_model(twin)
        return {name: getattr(twin, name).weight.detach() for name in ("up", "down")}

    return quantize


def torchao(net: MLP) -> Decoded:
    pytest.importorskip("torchao.quantization", exc_type=ImportError)
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    quantize_(net, NVFP4WeightOnlyConfig())
    return {name: getattr(net, name).weight.dequantize() for name in ("up", "down")}


def built(name: str, build: Callable[[int, int], Built]) -> Callable[[MLP], Decoded]:
    def quantize(net: MLP) -> Decoded:
        decoded = {}
        for name in ("up", "down"):
            linear = getattr(net, name)
            layer, weight = build(linear.out_features, linear.in_features)
            for members in (vars(layer), layer._parameters, layer._buffers):
                members.pop("bias", None)
            layer.register_parameter("bias", linear.bias)
            setattr(net, name, layer)
            decoded[name] = weight.to(bf16)
        return decoded

    quantize.exact_x = name.startswith("FP8Linear")  # type: ignore[attr-defined]
    return quantize


def keep(net: MLP, quantize: Callable[[MLP], Decoded]) -> Any:
    return keep_packed(net, exact_x=getattr(quantize, "exact_x", False))


CASES: dict[str, Callable[[MLP], Decoded]] = {
    "like compressed-tensors, NVFP4": like_compressed_tensors(16),
    "like compressed-tensors, MXFP4": like_compressed_tensors(32),
    "like torchao, NVFP4": like_torchao(16),
    "like torchao, MXFP4": like_torchao(32),
    "compressed-tensors, NVFP4": compressed_tensors(16),
    "compressed-tensors, MXFP4": compressed_tensors(32),
    "torchao, NVFP4": torchao,
    **{name: built(name, build) for name, build in (LAYERS | LIBRARIES).items()},
}


def net_of() -> Any:
    torch.manual_seed(0)
    return MLP(sizes=SIZES).to(bf16)


def adapted(net: Any, **options: Any) -> Any:
    config = LoraConfig(r=5, lora_alpha=7, target_modules=["up", "down"], **options)
    return get_peft_model(net, config)


def step(model: nn.Module, seed: int, dtype: torch.dtype = bf16) -> dict[str, Tensor]:
    """The output and all gradients, with adapters of this seed."""
    torch.manual_seed(seed)
    randomize(model)
    x = X.to(dtype, copy=True).requires_grad_()
    y = model.train()(x)
    y.square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found | {"y": y.detach(), "x": x.grad}


def decoded_steps(decoded: Decoded, seeds: range) -> tuple[list[Any], list[Any]]:
    """Steps of PEFT over the decoded weights, and the same in float64."""
    net = net_of()
    for name, weight in decoded.items():
        getattr(net, name).weight = nn.Parameter(weight, requires_grad=False)
    model = adapted(net)
    exact = copy.deepcopy(model).double()
    return [step(model, seed) for seed in seeds], [
        step(exact, seed, torch.float64) for seed in seeds
    ]


@pytest.mark.parametrize("quantize", CASES.values(), ids=CASES)
def test_packed_layers_have_the_librarys_bits_and_train_as_those_decoded(
    quantize: Callable[[MLP], Decoded],
) -> None:
    net, seeds = net_of(), range(4)
    decoded = quantize(net)
    assert keep(net, quantize) is net
    for name, want in decoded.items():
        layer = getattr(net, name)
        assert type(layer.weight) is QuantizedTensor and type(layer) is nn.Linear
        assert {key for key, _ in layer.named_parameters()} <= {"weight", "bias"}
        assert "forward" not in vars(layer)
        assert_bitwise_equal(layer.weight.dequantize(), want)
    peft, refs = decoded_steps(decoded, seeds)
    model = adapted(net)
    assert_as_exact([step(model, seed) for seed in seeds], refs, peft)
    fuse(model)
    assert {row.state for row in explain(model).rows} == {KERNELS}
    assert_as_exact([step(model, seed) for seed in seeds], refs, peft)
    with torch.no_grad(), model.disable_adapter():
        assert_bitwise_equal(model(X), unfuse(model)(X))
    assert type(net.up.base_layer.weight) is QuantizedTensor
    found = check(fuse(model), X)
    assert found.ok, str(found)
    assert all("got a frozen weight in" in row.reason for row in found.rows)


def three_steps(model: nn.Module, seed: int, dtype: torch.dtype = bf16) -> dict[str, Tensor]:
    """The losses and the adapters of three steps, evaluated between them."""
    torch.manual_seed(seed)
    randomize(model, seed=seed)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3, momentum=0.9)
    x, found = X.to(dtype), {}
    for i in range(3):
        loss = model.train()(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            found[f"loss {i}"], found[f"y {i}"] = loss, model.eval()(x)
    return found | {n: p.detach().clone() for n, p in trained.items()}


@pytest.mark.parametrize("quantize", CASES.values(), ids=CASES)
def test_three_steps_over_packed_layers_are_those_over_the_decoded(
    quantize: Callable[[MLP], Decoded],
) -> None:
    net, dense, seeds = net_of(), net_of(), range(4)
    for name, weight in quantize(net).items():
        getattr(dense, name).weight = nn.Parameter(weight, requires_grad=False)
    peft, ours = adapted(dense), fuse(adapted(keep(net, quantize)))
    exact = copy.deepcopy(peft).double()
    got, want = ([three_steps(model, seed) for seed in seeds] for model in (ours, peft))
    assert_as_exact(got, [three_steps(exact, seed, torch.float64) for seed in seeds], want)


@pytest.mark.parametrize("quantize", CASES.values(), ids=CASES)
def test_packed_layers_on_a_gpus_path_train_as_those_decoded(
    quantize: Callable[[MLP], Decoded], gpu_path: None
) -> None:
    net, seeds = net_of(), range(4)
    decoded = quantize(net)
    model = fuse(adapted(keep(net, quantize)))
    assert {row.state for row in explain(model).rows} == {LIBRARY}
    got = [step(model, seed) for seed in seeds]
    peft, refs = decoded_steps(decoded, seeds)
    assert_as_exact(got, refs, peft)


def decoder_of(quant_type: str, is_packed: bool, **options: Any) -> Any:
    """A Llama of two layers with adapters, whose linear layers are 4-bit or decoded."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).to(bf16)
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            weight = QuantizedTensor(quantize_4bit(linear.weight.detach(), quant_type))
            held = weight if is_packed else weight.dequantize()
            linear.weight = nn.Parameter(held, requires_grad=False)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **options))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("quant_type", ["mxfp4", "nvfp4"])
def test_blocks_over_packed_layers_train_as_those_decoded(
    quant_type: str, use_dora: bool, gpu_path: None
) -> None:
    """q, k and v in one call, and the gated MLP in one; DoRA layer by layer."""

    def step(model: Any, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        return loss_and_gradients(model, LLAMA_IDS)

    stock = decoder_of(quant_type, False, use_dora=use_dora)
    fused = fuse(decoder_of(quant_type, True, use_dora=use_dora))
    exact = copy.deepcopy(stock).double()
    strategies = {row.strategy for row in explain(fused).blocks}
    assert ("one block" in strategies) is not use_dora
    assert any("one call for q_proj, k_proj" in each for each in strategies) is not use_dora
    assert_as_exact(*([step(model, seed) for seed in range(4)] for model in (fused, exact, stock)))


@pytest.mark.parametrize("name", ["like torchao, NVFP4", "like torchao, MXFP4", "torchao, NVFP4"])
def test_fuse_reads_torchaos_layers_that_have_adapters(name: str) -> None:
    net, seeds = net_of(), range(4)
    decoded = CASES[name](net)
    model = fuse(adapted(net))
    assert {row.state for row in explain(model).rows} == {KERNELS}
    got = [step(model, seed) for seed in seeds]
    peft, refs = decoded_steps(decoded, seeds)
    assert_as_exact(got, refs, peft)


MERGES: dict[str, Callable[[Any, bool], Any]] = {
    "merge_and_unload": lambda model, safe: model.merge_and_unload(safe_merge=safe),
    "merge_adapter": lambda model, safe: model.merge_adapter(safe_merge=safe),
    "of one adapter": lambda model, safe: model.merge_adapter(["default"], safe),
    "merged_weights": lambda model, safe: next(merged_weights(model, safe_merge=safe)),
}


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_merge_over_a_packed_layer_is_refused_before_the_first_layer(
    merge: Callable[[Any, bool], Any], is_fused: bool, use_dora: bool, safe_merge: bool
) -> None:
    """`up` is dense, and PEFT would merge it before it comes to `down`."""
    net = net_of()
    like_torchao(16)(net)
    net.up = nn.Linear(SIZES[0], SIZES[1], dtype=bf16)
    model = adapted(keep_packed(net), use_dora=use_dora)
    randomize(model)
    if is_fused:
        fuse(model)
    want, state = model(X), {name: t.clone() for name, t in model.state_dict().items()}
    message = (
        r"^model: got \S*down, whose weight is frozen in nvfp4, want a dense .* and merge there"
    )
    with pytest.raises(ValueError, match=message):
        merge(model, safe_merge)
    assert model.state_dict().keys() == state.keys()
    for name, t in model.state_dict().items():
        # In bytes: a table of scales ends in NaN.
        assert torch.equal(t.view(-1).view(torch.uint8), state[name].view(-1).view(torch.uint8))
    assert_bitwise_equal(model(X), want)
    with pytest.raises(RuntimeError, match="got a frozen weight in nvfp4 to write to"):
        model.base_model.model.down.merge(safe_merge)
    assert_bitwise_equal(model(X), want)


def test_merge_of_a_mixed_model_is_refused_before_the_first_layer() -> None:
    net = net_of()
    like_torchao(16)(net)
    net.up = nn.Linear(SIZES[0], SIZES[1], dtype=bf16)
    config = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    model: Any = get_peft_model(keep_packed(net), config, mixed=True)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"^model: got down, whose weight is frozen in nvfp4"):
            merge()
        assert not model.base_model.model.up.merged
    assert type(model.unload().up) is nn.Linear


def test_merge_again_of_what_was_merged_before_it_was_packed_is_peft_s() -> None:
    model = fuse(adapted(net_of()))
    model.merge_adapter()
    for name in ("up", "down"):
        base = model.base_model.model.get_submodule(name).base_layer
        pack_parameter(base, "weight", quantize_4bit(base.weight, "mxfp4"))
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()


@pytest.mark.parametrize("is_fused", [False, True])
def test_merge_of_adapters_that_no_packed_layer_has_is_peft_s(is_fused: bool) -> None:
    net = net_of()
    like_torchao(16)(net)
    net.up = nn.Linear(SIZES[0], SIZES[1], dtype=bf16)
    model = get_peft_model(keep_packed(net), LoraConfig(r=4, target_modules=["up", "down"]))
    model.add_adapter("dense", LoraConfig(r=4, target_modules=["up"], init_lora_weights=False))
    if is_fused:
        fuse(model)
    model.merge_adapter(["dense"])
    assert model.base_model.model.up.merged_adapters == ["dense"]
    model.unmerge_adapter()
    model.set_adapter("dense")
    assert "down.weight.packed" in model.merge_and_unload().state_dict()


OTHERS: dict[str, Callable[[MLP], Any]] = {
    "dense": lambda net: None,
    "rounds x": like_compressed_tensors(16, input_activations=SimpleNamespace(num_bits=4)),
    "rounds y": like_compressed_tensors(32, output_activations=SimpleNamespace(num_bits=8)),
    "rounds x (compressed-tensors)": compressed_tensors(16, "NVFP4"),
    "rounds x (torchao)": like_torchao(16, act_quant_kwargs=object()),
    "MXFP8": like_torchao(32, elem_dtype="torch.float8_e4m3fn"),
}


@pytest.mark.parametrize("quantize", OTHERS.values(), ids=OTHERS)
def test_other_layers_are_left_as_they_are(quantize: Callable[[MLP], Any]) -> None:
    net = net_of()
    quantize(net)
    before = {name: dict(vars(m)) for name, m in net.named_modules()}
    with pytest.raises(ValueError, match=r"^model: got no quantized linear layer that can be read"):
        keep_packed(net)
    assert {name: dict(vars(m)) for name, m in net.named_modules()} == before


def decompressed(linear: Any) -> None:
    linear.quantization_status = Status.DECOMPRESSED


@pytest.mark.parametrize(
    "change",
    [
        decompressed,
        lambda linear: setattr(linear.quantization_scheme.weights, "num_bits", 8),
        lambda linear: setattr(linear.quantization_scheme.weights, "type", "int"),
        lambda linear: setattr(linear.quantization_scheme.weights, "symmetric", False),
        lambda linear: setattr(linear.quantization_scheme.weights, "actorder", "group"),
        lambda linear: setattr(linear, "forward", lambda x: x),
        lambda linear: linear.register_forward_hook(lambda module, args, y: y),
        lambda linear: setattr(linear, "weight_scale", linear.weight_global_scale),
        lambda linear: setattr(linear, "__class__", type("Other", (nn.Linear,), {})),
    ],
)
def test_layer_in_another_state_is_left_as_it_is(change: Callable[[Any], Any]) -> None:
    net = net_of()
    like_compressed_tensors(16)(net)
    change(net.up)
    keep_packed(net)
    assert "weight_packed" in net.up._parameters and type(net.down.weight) is QuantizedTensor
    assert hasattr(net, "ct_decompress_hook")


def test_hook_that_decodes_stays_while_a_layer_at_any_depth_needs_it() -> None:
    for change in (decompressed, None):
        net = net_of()
        like_compressed_tensors(16)(net)
        if change is not None:
            change(net.up)
        model: Any = nn.Sequential(nn.Sequential(net))
        model.ct_decompress_hook = model.register_forward_pre_hook(decompress)
        keep_packed(model)
        assert hasattr(model, "ct_decompress_hook") is (change is not None)
        assert bool(model._forward_pre_hooks) is (change is not None)


def test_nvfp4_layer_without_a_global_scale_is_read_and_keeps_nothing_else() -> None:
    net = net_of()
    like_compressed_tensors(16)(net)
    for layer in (net.up, net.down):
        del layer.weight_global_scale
        zeros = torch.zeros_like(layer.weight_scale, dtype=torch.int8)
        layer.register_parameter("weight_zero_point", nn.Parameter(zeros, requires_grad=False))
    want = QuantizedWeight.from_nvfp4(net.up.weight_packed, net.up.weight_scale).dequantize()
    keep_packed(net)
    assert_bitwise_equal(net.up.weight.dequantize(), want)
    names = {name.split(".")[1] for name in net.state_dict()}
    assert names <= {"weight", "bias"} and "up.weight.form" in net.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group_size", [16, 32])
def test_torchaos_layers_keep_their_dtype(group_size: int, dtype: torch.dtype) -> None:
    net = net_of()
    like_torchao(group_size, orig_dtype=dtype)(net)
    keep_packed(net)
    assert net.up.weight.dtype is net.up.weight.quantized.dtype is dtype


def test_scales_that_torchao_multiplies_in_bfloat16_are_rounded() -> None:
    net = net_of()
    like_torchao(16, get_hp_scales=lambda: torch.ones(1, dtype=bf16))(net)
    given: Any = net.up.weight
    parts = given.qdata, given.row_scales, given.per_tensor_scale
    exact, rounded = (
        QuantizedWeight.from_nvfp4(*parts, global_op="multiply", scale_dtype=dtype).scales()
        for dtype in (torch.float32, bf16)
    )
    keep_packed(net)
    assert not torch.equal(exact, rounded)
    assert_bitwise_equal(net.up.weight.quantized.scales(), rounded)


def test_layer_that_rounds_x_is_called_and_named() -> None:
    """PEFT takes it once the first forward has decoded it."""
    net = net_of()
    compressed_tensors(16, "NVFP4")(net)
    with torch.no_grad():
        net(X)
    model = fuse(adapted(net))
    rows = explain(model).rows
    assert {row.state for row in rows} == {ADAPTER}
    assert all("compressed-tensors rounds its x or y too" in row.reason for row in rows)
    with pytest.raises(RuntimeError, match="Gradients of the layers before it would lack"):
        step(model, 0)


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (129, 5), (300, 17)])
def test_unswizzle_inverts_the_layout_of_tensor_cores(shape: tuple[int, int]) -> None:
    scales = torch.randint(0, 127, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    got = unswizzle(swizzle(scales), *shape)
    assert got.dtype is torch.float8_e4m3fn
    assert_bitwise_equal(got.view(torch.uint8), scales.view(torch.uint8))
