"""What readers refuse, what `keep_packed` leaves as it is, and what a repacking holds."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_kernels.bench import memory
from lora_kernels.peft import explain, fuse, keep_packed
from lora_kernels.peft import packed as packed_module
from lora_kernels.peft.packed import pack_layer
from lora_kernels.quantization import readers
from lora_kernels.quantization.readers import form
from lora_kernels.quantization.tensor import QuantizedTensor
from tests.interop import quantized_layers
from tests.interop.quantized_layers import LAYERS, Layer, bf16, codes, random, words
from tests.support.assertions import assert_as_exact, assert_bitwise_equal
from tests.support.peft_models import randomize

N, K = 64, 96
float32_eps = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def is_packed(layer: Any) -> bool:
    return type(layer) is nn.Linear and type(layer.weight) is QuantizedTensor


@pytest.mark.parametrize("name", LAYERS)
def test_no_reader_takes_a_layer_of_another_library(name: str) -> None:
    layer, _ = LAYERS[name](N, K)
    assert [reader for reader in readers.READERS.values() if reader.matches(layer)] != []
    assert len([reader for reader in readers.READERS.values() if reader.matches(layer)]) == 1
    assert readers.library_of(nn.Linear(K, N)) is None
    assert readers.read(nn.Linear(K, N)) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_of_float32_are_within_two_roundings_of_the_definition(bits: int) -> None:
    """The shift -zero · scale is rounded once, and the sum once."""
    q, generator = codes(bits, N, K), torch.Generator().manual_seed(1)
    scale = torch.rand(N, K // 32, generator=generator)
    zero = codes(bits, N, K // 32)
    weight = form.read_integers(q.to(torch.uint8), bits, scale, zero, 32, torch.float32)
    spread = [t.double().repeat_interleave(32, 1) for t in (scale, zero)]
    error = (weight.dequantize().double() - (q - spread[1]) * spread[0]).abs()
    assert bool((error <= float32_eps * spread[0] * (1 << bits)).all())
    assert weight.absmax.dtype is torch.float32


def test_scales_that_float16_has_are_stored_in_it() -> None:
    q = codes(4, N, K).to(torch.uint8)
    for scale, dtype in ((random(N, 1), torch.float16), (random(N, 1) * 1e-7, torch.float32)):
        for zero in (8, 3):
            weight = form.read_integers(q, 4, scale, zero, K, bf16)
            assert weight.absmax.dtype is dtype


@pytest.mark.parametrize("group", [3, 8, 24, 40])
def test_groups_without_blocks_of_16_are_refused_by_name(group: int) -> None:
    layer, _ = LAYERS["GPTQ of 4 bits, symmetric"](N, 120)
    layer.group_size, layer.g_idx = group, torch.arange(120) // group
    layer.scales = random(120 // group, N)
    with pytest.raises(ValueError, match=f"group: got groups of {group} in rows of 120"):
        keep_packed(layer)


class ThreeBits(nn.Module):
    """A made-up library's layer: codes of 3 bits in bytes, and a zero for each row."""

    def __init__(self, N: int, K: int, group: int) -> None:
        super().__init__()
        self.three_bits, self.scale = codes(3, N, K).to(torch.uint8), random(N, -(-K // group))
        self.zero, self.group = codes(3, N, 1), group

    def decoded(self) -> Tensor:
        scale = self.scale.double().repeat_interleave(self.group, 1)[:, : self.three_bits.shape[1]]
        return (self.three_bits.double() - self.zero) * scale

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.decoded().t().to(x.dtype)


def step(model: nn.Module, dtype: torch.dtype = bf16) -> dict[str, Tensor]:
    x = torch.randn(7, K, generator=torch.Generator().manual_seed(0)).to(bf16).to(dtype)
    y = model(x.requires_grad_())
    y.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return grads | {"y": y.detach(), "x": cast(Tensor, x.grad)}


def read_three_bits(layer: Any) -> form.Reading:
    zero = layer.zero.expand_as(layer.scale)
    given = layer.three_bits, 3, layer.scale, zero, layer.group, bf16
    return form.Reading(form.read_integers(*given))


def test_a_made_up_format_is_one_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING's recipe, with 3-bit codes kept in 4, and groups of 48 as blocks of 16."""
    reader: Any = SimpleNamespace(
        matches=lambda layer: hasattr(layer, "three_bits"), read=read_three_bits
    )
    monkeypatch.setitem(readers.READERS, "three bits", reader)
    layers = [ThreeBits(K, K, 48), ThreeBits(N, K, 48)]
    decoded = [layer.decoded() for layer in layers]
    packed: Any = keep_packed(nn.Sequential(*layers))
    for each in packed:
        assert (each.weight.quantized.codes.bits, each.weight.quantized.blocksize) == (4, 16)
    dense = nn.Sequential(nn.Linear(K, K, bias=False), nn.Linear(K, N, bias=False))
    for each, weight, got in zip(dense, decoded, packed, strict=True):
        each.weight.data = weight.to(bf16)
        assert_bitwise_equal(got.weight.dequantize(), weight.to(bf16))
    config = {"r": 4, "target_modules": ["0", "1"], "init_lora_weights": False}
    peft, ours = (get_peft_model(each, LoraConfig(**config)) for each in (dense, packed))
    for model in (peft, fuse(ours)):
        randomize(model)
    exact = copy.deepcopy(peft).double()
    assert_as_exact(step(ours), step(exact, torch.float64), step(peft))
    with pytest.raises(ValueError, match="group: got groups of 24 in rows of 96"):
        keep_packed(ThreeBits(N, K, 24))


REFUSED: dict[str, tuple[str, Any, str]] = {
    "act order": (
        "GPTQ of 4 bits, version 2",
        lambda layer: setattr(layer, "g_idx", layer.g_idx.flip(0)),
        "act order",
    ),
    "three bits": ("GPTQ of 8 bits", lambda layer: setattr(layer, "bits", 3), "3 bits"),
    "axis 0": ("HQQ of 4 bits", lambda layer: layer.meta.update(axis=0), "axis=0"),
    "3 bits of HQQ": ("HQQ of 4 bits", lambda layer: layer.meta.update(nbits=3), "3 bits"),
    "a hook": (
        "AWQ",
        lambda layer: layer.register_forward_hook(lambda module, args, y: y),
        "a hook sits on it",
    ),
    "a replaced forward": (
        "AWQ",
        lambda layer: setattr(layer, "forward", lambda x: x),
        "its forward was replaced",
    ),
    "g_idx": (
        "W4A16",
        lambda layer: layer.register_parameter(
            "weight_g_idx", nn.Parameter(torch.zeros(K, dtype=torch.int32), requires_grad=False)
        ),
        "its parameters are not those",
    ),
    "order by activation": (
        "W4A16",
        lambda layer: setattr(layer.quantization_scheme.weights, "actorder", "group"),
        "permuted columns",
    ),
    "rounds x": (
        "W8A16",
        lambda layer: setattr(layer.quantization_scheme, "input_activations", SimpleNamespace()),
        "rounds its x or y too",
    ),
    "another FP8 layer of transformers": (
        "FP8Linear",
        lambda layer: setattr(layer, "__class__", type("FP8GroupedLinear", (type(layer),), {})),
        "FP8GroupedLinear may be more than a linear layer",
    ),
    "rounds x to FP8": ("FP8Linear", lambda layer: None, "exact_x=True"),
    "codes in another order": (
        "GPTQ of 4 bits, version 2",
        lambda layer: setattr(layer, "qweight", layer.qweight.flip(0)),
        "differs from the weight that was read",
    ),
    "zeros of another version": (
        "GPTQ of 8 bits",
        lambda layer: setattr(layer, "qzero_format", lambda: 2),
        "differs from the weight that was read",
    ),
    "a forward that raises": (
        "AWQ",
        lambda layer: setattr(layer, "decoded", None),
        "its forward raised AttributeError",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_layer_that_cannot_be_read_stays_as_it_is_with_the_reason(case: Any) -> None:
    name, change, reason = case
    layer, _ = LAYERS[name](N, K)
    change(layer)
    before = [dict(vars(layer)), dict(layer._parameters), dict(layer._buffers)]
    with pytest.raises(ValueError, match=reason):
        keep_packed(nn.Sequential(layer))
    assert [dict(vars(layer)), dict(layer._parameters), dict(layer._buffers)] == before
    model = nn.Sequential(layer, LAYERS["AWQ"](N, K)[0])
    with pytest.warns(UserWarning, match=f"keep_packed: 0 stays as it is: .*{reason}"):
        keep_packed(model)
    assert model[0] is layer and is_packed(model[1])


def test_layer_under_two_names_is_packed_once_and_a_layer_alone_is_returned() -> None:
    layer, decoded = LAYERS["AWQ"](N, K)
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": layer, "c": nn.Linear(K, N)})
    dense = model["c"]
    assert keep_packed(model) is model
    assert model["a"][0] is model["b"] and is_packed(model["b"]) and model["c"] is dense
    alone: Any = keep_packed(LAYERS["AWQ"](N, K)[0].eval())
    assert is_packed(alone) and not alone.training
    assert_bitwise_equal(alone.weight.dequantize(), decoded.to(bf16))


def test_weight_has_the_models_dtype_and_is_rounded_once() -> None:
    for dtype in (torch.float32, torch.float16, bf16):
        layer, decoded = LAYERS["GPTQ of 4 bits, version 2"](N, K)
        layer.bias = nn.Parameter(random(N))
        model: Any = nn.Sequential(layer)
        model.dtype = dtype
        keep_packed(model)
        assert model[0].weight.dtype is model[0].bias.dtype is dtype
        assert_bitwise_equal(model[0].weight + 0, decoded.to(dtype))
        model(torch.ones(2, K, dtype=dtype))
    model = nn.Sequential(LAYERS["AWQ"](N, K)[0])
    model.dtype = torch.float8_e4m3fn  # as of a model whose first parameter is quantized
    assert keep_packed(model)[0].weight.dtype is bf16


def test_8_bits_of_bitsandbytes_are_the_decoded_weight_to_a_rounding() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = torch.randn(N, K, dtype=torch.float16)
    for is_called in (False, True):
        layer = bitsandbytes.nn.Linear8bitLt(K, N, has_fp16_weights=False)
        given: Any = {"has_fp16_weights": False, "requires_grad": False}
        layer.weight = bitsandbytes.nn.Int8Params(dense.clone(), **given)._quantize("cpu")
        codes, rows = layer.weight.CB, layer.weight.SCB
        if is_called:  # which moves them
            layer(torch.ones(2, K, dtype=torch.float16))
        want = torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, rows)
        with pytest.raises(ValueError, match="exact_x=True"):
            keep_packed(nn.Sequential(layer))
        packed: Any = keep_packed(nn.Sequential(layer), exact_x=True)[0]
        got = packed.weight.quantized.dequantize(torch.float32)
        # Each rounds twice, by half an eps, and bitsandbytes' 1 / 127 once.
        assert bool(((got - want).abs() <= 2.5 * float32_eps * want.abs()).all())


def test_explain_names_keep_packed_for_a_layer_that_is_called() -> None:
    net = nn.Sequential(LAYERS["FP8Linear"](N, K)[0])
    model = fuse(get_peft_model(net, LoraConfig(r=4, target_modules=["0"])))
    (row,) = explain(model).rows
    assert "keep_packed(model, exact_x=True) before PEFT" in row.reason


@pytest.mark.parametrize("name", LAYERS)
def test_repacking_holds_no_more_than_the_decoded_layer_twice(name: str) -> None:
    layer, decoded = LAYERS[name](256, 1024)
    held = memory.peak(lambda: pack_layer(layer, exact_x=True))
    assert held <= 2 * decoded.numel() * bf16.itemsize


OF_X = ("act_quant_kwargs", "activation_quantization", "act_pre_scale", "act_quant_scale")


@pytest.mark.parametrize("name", OF_X)
def test_weight_of_torchao_that_changes_x_is_not_read(name: str) -> None:
    layer, _ = LAYERS["int4 of torchao"](N, K)
    setattr(layer._parameters["weight"], name, torch.ones(1))
    with pytest.raises(ValueError, match="rounds or scales x too"):
        keep_packed(layer)


def test_former_layers_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of modules that are replaced, and the tensors of those that change in place."""
    for name in ("AWQ", "W4A16", "HQQ of 4 bits"):
        model: Any = nn.Sequential(*(LAYERS[name](N, K)[0] for _ in range(3)))
        held = [
            weakref.ref(t)
            for layer in model
            for t in (*vars(layer).values(), *layer.parameters())
            if isinstance(t, Tensor) and t.dim() == 2 and t.dtype is not bf16
        ]
        each, alive = len(held) // 3, list[int]()

        def counted(*args: Any, held: Any = held, alive: Any = alive) -> Any:
            gc.collect()
            alive.append(sum(ref() is not None for ref in held))
            return pack_layer(*args)

        monkeypatch.setattr(packed_module, "pack_layer", counted)
        keep_packed(model)
        assert each and alive == [3 * each, 3 * each, 2 * each, each], name  # the model first


def test_words_of_the_stand_ins_are_unpacked() -> None:
    for bits in (4, 8):
        q = codes(bits, 8, 16)
        for dim in (0, 1):
            assert torch.equal(form.unpack(words(q, bits, dim), bits, dim).long(), q)
    assert quantized_layers.words(torch.tensor([[15] * 8]), 4, 1).item() == -1
    assert copy.deepcopy(Layer(torch.ones(1, 1), bias=None)) is not None
