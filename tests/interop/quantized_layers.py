"""Quantized layers as libraries lay them out, of random codes, beside the weight they stand for.

A function of `LAYERS` returns a layer and its weight in float64, by the format's definition. Scales
are in bfloat16, so that the definition is exact in float32. `LIBRARIES` has those that the library
itself builds and decodes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

bf16, int32 = torch.bfloat16, torch.int32
Built = tuple[Any, Tensor]  # a layer and its weight


def random(*shape: int, seed: int = 0) -> Tensor:
    """Scales in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=generator) / 64 + 2**-9).to(bf16)


def codes(bits: int, *shape: int) -> Tensor:
    """Every code, the lowest and the highest first."""
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(1 << bits, shape, generator=generator)
    q.view(-1)[:2] = torch.tensor([0, (1 << bits) - 1])
    return q


def words(q: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 words of codes along a dimension, by their definition; short words end in zeros."""
    q = q.movedim(dim, -1)
    per_word = 32 // bits
    short = -q.shape[-1] % per_word
    q = torch.cat([q, q.new_zeros(*q.shape[:-1], short)], -1).unflatten(-1, (-1, per_word))
    word = torch.zeros(q.shape[:-1], dtype=torch.int64)
    for i in range(per_word):
        word |= q[..., i if order is None else order[i]] << bits * i
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(int32).movedim(-1, dim)


def spread(t: Tensor, group: int, K: int) -> Tensor:
    """A value for each column of those of groups, in float64."""
    return t.double().repeat_interleave(group, 1)[:, :K]


class Layer(nn.Module):
    """A library's layer, whose forward multiplies with its decoded weight."""

    def __init__(self, decoded: Tensor, **attributes: Any) -> None:
        super().__init__()
        self.decoded = decoded.to(bf16)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.decoded.to(x.dtype), bias)


def gptq(bits: int, group: int, symmetric: bool, version: int) -> Callable[[int, int], Built]:
    def build(N: int, K: int) -> Built:
        size = K if group == -1 else group
        q, scale = codes(bits, N, K), random(N, -(-K // size))
        zero = torch.full_like(scale, 1 << (bits - 1)).long()
        if not symmetric:
            zero = codes(bits, *scale.shape)
        decoded = (q - spread(zero, size, K)) * spread(scale, size, K)
        stored = (zero - 1) % (1 << bits) if version == 1 else zero
        layer = Layer(
            decoded,
            bits=bits,
            group_size=group,
            qweight=words(q.t(), bits, 0),
            qzeros=words(stored.t(), bits, 1),
            scales=scale.t().contiguous(),
            g_idx=torch.arange(K, dtype=int32) // size,
            bias=None,
        )
        if version == 2:
            layer.qzero_format = lambda: 2
        return layer, decoded

    return build


def awq(group: int) -> Callable[[int, int], Built]:
    def build(N: int, K: int) -> Built:
        size = K if group == -1 else group
        q, scale, zero = codes(4, N, K), random(N, K // size), codes(4, N, K // size)
        decoded = (q - spread(zero, size, K)) * spread(scale, size, K)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return Layer(
            decoded,
            w_bit=4,
            group_size=group,
            qweight=words(q.t(), 4, 1, order),
            qzeros=words(zero.t(), 4, 1, order),
            scales=scale.t().contiguous(),
            bias=None,
        ), decoded

    return build


def hqq(bits: int, group: int | None, how: str = "") -> Callable[[int, int], Built]:
    """how: "quantized" zeros and scales, or "together" in one tensor, beside codes as float16."""

    def build(N: int, K: int) -> Built:
        size = group or K
        q, scale = codes(bits, N, K), random(N, K // size)
        zero = (random(N, K // size, seed=2) * 64 * ((1 << bits) - 1)).clamp_min(0.25)
        if how == "quantized":  # zeros in groups of 4, scales with one for all
            zero_q, scale_q = (
                codes(8, zero.numel()).view(-1, 4),
                codes(8, scale.numel()).view(-1, 1),
            )
            outer, low = random(len(zero_q), 1, seed=4), random(len(zero_q), 1, seed=5) * 8
            zero = ((zero_q - low.double()) * outer.double()).view(zero.shape)
            scale = ((scale_q + 3.0) * 2.0**-14).view(scale.shape)
        decoded = (q - spread(zero, size, K)) * spread(scale, size, K)
        parts = q.view(-1, size).chunk(8 // bits)
        packed = sum(part << 8 - bits * (i + 1) for i, part in enumerate(parts))
        meta = {
            "nbits": bits, "shape": torch.Size([N, K]), "group_size": group, "axis": 1,
            "packing": f"{bits}bit_u8", "view_as_float": False, "compute_dtype": bf16,
            "scale": scale.view(-1, 1), "zero": zero.view(-1, 1),
            "quant_scale": False, "quant_zero": False,
        }  # fmt: skip
        bytes_ = packed.to(torch.uint8)
        if how == "together":
            meta["zero_scale"] = torch.stack([meta.pop("zero"), meta.pop("scale")])
            meta |= {"view_as_float": True, "unpack_view_dtype": torch.uint8}
            bytes_ = bytes_.view(torch.float16)
        if how == "quantized":
            common = {"nbits": 8, "packing": "8bit_u8", "shape": (N * (K // size), 1)}
            meta["zero_q"], meta["scale_q"] = zero_q.to(torch.uint8), scale_q.to(torch.uint8)
            meta["meta_zero"] = common | {"zero": low, "scale": outer}
            meta["meta_scale"] = common | {
                "zero": torch.tensor(-3.0), "scale": torch.tensor(2.0**-14)
            }  # fmt: skip
            meta |= {"quant_zero": True, "quant_scale": True}
            del meta["zero"], meta["scale"]
        W_q = nn.Parameter(bytes_, requires_grad=False)
        return Layer(decoded, W_q=W_q, meta=meta, bias=None), decoded

    return build


def compressed(layer: nn.Linear, args: dict[str, Any], **tensors: Tensor) -> nn.Linear:
    """The state of a layer that compressed-tensors has loaded."""
    del layer.weight
    for name, t in tensors.items():
        layer.register_parameter(name, nn.Parameter(t, requires_grad=False))
    given: Any = {"actorder": None, "symmetric": True, "group_size": None} | args
    scheme: Any = {"input_activations": None, "output_activations": None}
    layer.quantization_scheme = SimpleNamespace(weights=SimpleNamespace(**given), **scheme)
    layer.quantization_status = "compressed"
    return layer


def pack_quantized(bits: int, group: int | None, symmetric: bool) -> Callable[[int, int], Built]:
    def build(N: int, K: int) -> Built:
        size, middle = group or K, 1 << (bits - 1)
        q, scale = codes(bits, N, K), random(N, -(-K // size))
        zero = torch.full_like(scale, middle).long() if symmetric else codes(bits, *scale.shape)
        decoded = (q - spread(zero, size, K)) * spread(scale, size, K)
        args = {"num_bits": bits, "type": "int", "symmetric": symmetric}
        args |= {"strategy": "group" if group else "channel", "group_size": group}
        tensors = {"weight_packed": words(q, bits, 1), "weight_scale": scale}
        tensors["weight_shape"] = torch.tensor([N, K])
        if not symmetric:
            tensors["weight_zero_point"] = words(zero, bits, 0)
        return compressed(nn.Linear(K, N, dtype=bf16), args, **tensors), decoded

    return build


def int_quantized(symmetric: bool) -> Callable[[int, int], Built]:
    """Codes in bytes, signed."""

    def build(N: int, K: int) -> Built:
        q, scale = codes(8, N, K) - 128, random(N, 1)
        zero = torch.zeros(N, 1) if symmetric else codes(8, N, 1) - 128
        args = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "channel"}
        tensors = {"weight": q.to(torch.int8), "weight_scale": scale}
        if not symmetric:
            tensors["weight_zero_point"] = zero.to(torch.int8)
        return compressed(nn.Linear(K, N, dtype=bf16), args, **tensors), (q - zero) * scale.double()

    return build


class _OfTorchao(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


_TORCHAO = {
    name: type(name, (_OfTorchao,), {"__module__": "torchao.quantization.quantize_.workflows"})
    for name in ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor", "Float8Tensor")
}


def torchao_linear(name: str, decoded: Tensor, **attributes: Any) -> nn.Linear:
    """A layer whose weight has the attributes of torchao's class."""
    weight: Any = Tensor._make_subclass(_TORCHAO[name], decoded.to(bf16))
    for key, value in attributes.items():
        setattr(weight, key, value)
    layer = nn.Linear(*reversed(decoded.shape), dtype=bf16)
    layer._parameters["weight"] = weight
    return layer


def torchao_integers(bits: int, group: int | None) -> Callable[[int, int], Built]:
    """Signed codes in bytes; int8 without zeros."""

    def build(N: int, K: int) -> Built:
        size, low = group or K, -(1 << bits - 1)
        q, scale = codes(bits, N, K) + low, random(N, K // size)
        zero = codes(bits, *scale.shape) + low if group else None
        decoded = (q - (spread(zero, size, K) if group else 0)) * spread(scale, size, K)
        given: dict[str, Any] = {"qdata": q.to(torch.int8), "scale": scale, "block_size": [1, size]}
        given["zero_point"] = None if zero is None else zero.to(torch.int8)
        if bits == 8:
            return torchao_linear("Int8Tensor", decoded, **given), decoded
        target = getattr(torch, f"int{bits}")
        return torchao_linear(
            "IntxUnpackedToInt8Tensor", decoded, target_dtype=target, **given
        ), decoded

    return build


def int4_tensor(N: int, K: int) -> Built:
    """By its layout: the even element low, and a shift for each group."""
    q, scale, shift = codes(4, N, K) - 8, random(N, K // 32), random(N, K // 32, seed=3)
    decoded = q * spread(scale, 32, K) + spread(shift, 32, K)
    low, high = (q[:, i::2] & 15 for i in (0, 1))
    qdata = (low | high << 4).to(torch.uint8).view(torch.int8)
    scales = {"scale": scale.t().contiguous(), "zero_point": shift.t().contiguous()}
    return torchao_linear("Int4Tensor", decoded, qdata=qdata, block_size=[1, 32], **scales), decoded


def float8_tensor(N: int, K: int) -> Built:
    qdata, scale = float8(N, K), random(N, 1)
    decoded = qdata.double() * scale.double()
    given = {"qdata": qdata, "scale": scale.float(), "block_size": [1, K]}
    return torchao_linear("Float8Tensor", decoded, **given), decoded


def float8(N: int, K: int) -> Tensor:
    """All finite bytes."""
    q = torch.arange(N * K).remainder(254)
    q = torch.where(q >= 127, q + 1, q).to(torch.uint8)
    return q.view(torch.float8_e4m3fn).view(N, K)


def compressed_float8(strategy: str) -> Callable[[int, int], Built]:
    def build(N: int, K: int) -> Built:
        rows, columns = {"channel": (1, K), "tensor": (N, K), "block": (64, 32)}[strategy]
        weight, scale = float8(N, K), random(-(-N // rows), -(-K // columns))
        decoded = weight.double() * spread(scale, columns, K).repeat_interleave(rows, 0)[:N]
        args = {"num_bits": 8, "type": "float", "strategy": strategy, "block_structure": [64, 32]}
        layer = nn.Linear(K, N, dtype=bf16)
        scale = scale.view(1) if strategy == "tensor" else scale
        return compressed(layer, args, weight=weight, weight_scale=scale), decoded

    return build


class FP8Linear(nn.Linear):
    """As of transformers: an nn.Linear, whose forward rounds x too."""

    def __init__(self, weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
        self.block_size = block

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("FP8Linear rounds x")


def fp8_linear(block: tuple[int, int] | None, library: bool = False) -> Callable[[int, int], Built]:
    def build(N: int, K: int) -> Built:
        rows, columns = block or (N, K)
        weight, scale = float8(N, K), random(-(-N // rows), -(-K // columns))
        decoded = weight.double() * spread(scale, columns, K).repeat_interleave(rows, 0)[:N]
        stored = scale.float() if block else scale.float().view(())
        if not library:
            return FP8Linear(weight, stored, block), decoded
        name = "transformers.integrations.finegrained_fp8"
        module = pytest.importorskip(name, exc_type=ImportError)
        layer = module.FP8Linear(K, N, block_size=block)
        layer.weight.data, layer.weight_scale_inv.data = weight, stored
        return layer, decoded

    return build


LAYERS: dict[str, Callable[[int, int], Built]] = {
    "GPTQ of 4 bits, version 1": gptq(4, 32, False, 1),
    "GPTQ of 4 bits, version 2": gptq(4, 32, False, 2),
    "GPTQ of 4 bits, symmetric": gptq(4, 16, True, 1),
    "GPTQ of 8 bits": gptq(8, 96, False, 1),
    "GPTQ of 8 bits, a row": gptq(8, -1, True, 2),
    "AWQ": awq(32),
    "AWQ, a row": awq(-1),
    "HQQ of 4 bits": hqq(4, 32),
    "HQQ of 8 bits, a row": hqq(8, None),
    "HQQ of 2 bits": hqq(2, 16),
    "HQQ, quantized zeros": hqq(4, 16, "quantized"),
    "HQQ, zeros beside scales": hqq(4, 32, "together"),
    "W4A16": pack_quantized(4, 32, True),
    "W4A16, asymmetric": pack_quantized(4, 48, False),
    "W8A16, asymmetric, a row": pack_quantized(8, None, False),
    "W8A16": pack_quantized(8, 64, True),
    "int8 of weights": int_quantized(True),
    "int8 of weights, asymmetric": int_quantized(False),
    "int8 of torchao, a row": torchao_integers(8, None),
    "int8 of torchao": torchao_integers(8, 32),
    "int4 of torchao in bytes": torchao_integers(4, 16),
    "int6 of torchao in bytes": torchao_integers(6, 32),
    "int4 of torchao": int4_tensor,
    "float8 of torchao": float8_tensor,
    "float8, a row": compressed_float8("channel"),
    "float8, a tensor": compressed_float8("tensor"),
    "float8 in blocks": compressed_float8("block"),
    "FP8Linear": fp8_linear((128, 128)),
    "FP8Linear, a tensor": fp8_linear(None),
}


# The libraries


def gptqmodel(N: int, K: int) -> Built:
    module = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", exc_type=ImportError)
    sizes: Any = {"in_features": K, "out_features": N}
    layer = module.TorchLinear(4, 32, False, False, **sizes)
    like, decoded = gptq(4, 32, False, 2)(N, K)
    for name in ("qweight", "qzeros", "scales"):
        getattr(layer, name).data = getattr(like, name)
    layer.qzero_format(2)
    layer.post_init()
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(layer.dequantize_weight().t(), decoded.to(bf16))
    return layer.eval(), decoded


def gptqmodel_awq(N: int, K: int) -> Built:
    module = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq", exc_type=ImportError)
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    sizes: Any = {"in_features": K, "out_features": N, "register_buffers": True}
    layer = module.AwqTorchLinear(4, 32, False, False, **sizes)
    like, decoded = awq(32)(N, K)
    for name in ("qweight", "qzeros", "scales"):
        getattr(layer, name).data = getattr(like, name)
    layer.post_init()
    found = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 32).t()
    assert torch.equal(found, decoded.to(bf16))
    return layer.eval(), decoded


def hqq_library(N: int, K: int) -> Built:
    module = pytest.importorskip("hqq.core.quantize", exc_type=ImportError)
    torch.manual_seed(0)
    config = module.BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    given: Any = {"compute_dtype": torch.float32, "device": "cpu"}
    layer = module.HQQLinear(nn.Linear(K, N), config, **given)
    # Its own arithmetic in float64, with the zeros and scales that it stores in 16 bits.
    meta = layer.meta | {"compute_dtype": torch.float64}
    for name in ("zero", "scale"):
        layer.meta[name] = layer.meta[name].to(bf16).float()
        meta[name] = layer.meta[name].double()
    layer.meta["compute_dtype"] = layer.compute_dtype = bf16
    for name in ("zero", "scale"):
        layer.meta[name] = layer.meta[name].to(bf16)
    return layer, module.Quantizer.dequantize(layer.W_q, meta)


def torchao(config: str, **options: Any) -> Callable[[int, int], Built]:
    def build(N: int, K: int) -> Built:
        module = pytest.importorskip("torchao.quantization", exc_type=ImportError)
        granularity = options.get("granularity")
        given = options | ({"granularity": module.PerGroup(granularity)} if granularity else {})
        if "mapping_type" in given:
            from torchao.quantization.quant_primitives import MappingType

            given["mapping_type"] = MappingType[given["mapping_type"]]
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(K, N, dtype=bf16))
        module.quantize_(net, getattr(module, config)(**given))
        return net[0], net[0].weight.dequantize().double()

    return build


def compressed_tensors(**args: Any) -> Callable[[int, int], Built]:
    def build(N: int, K: int) -> Built:
        ct = pytest.importorskip("compressed_tensors.quantization", exc_type=ImportError)
        from compressed_tensors.compressors import ModelCompressor

        torch.manual_seed(0)
        scheme = ct.QuantizationScheme(targets=["Linear"], weights=ct.QuantizationArgs(**args))
        config = ct.QuantizationConfig(config_groups={"group": scheme})
        net = nn.Sequential(nn.Linear(K, N, dtype=bf16))
        ct.apply_quantization_config(net, config)
        layer = net[0]
        layer.weight_scale.data = random(*layer.weight_scale.shape)
        if not args.get("symmetric", True):
            zero = codes(args["num_bits"], *layer.weight_zero_point.shape)
            zero -= 1 << (args["num_bits"] - 1)
            layer.weight_zero_point.data = zero.to(layer.weight_zero_point.dtype)
        compressor = ModelCompressor(quantization_config=config)
        compressor.compress_model(net)
        twin = copy.deepcopy(net)
        compressor.decompress_model(twin)
        return layer, twin[0].weight.detach().double()

    return build


LIBRARIES: dict[str, Callable[[int, int], Built]] = {
    "gptqmodel, GPTQ": gptqmodel,
    "gptqmodel, AWQ": gptqmodel_awq,
    "compressed-tensors, W4A16": compressed_tensors(
        num_bits=4, strategy="group", group_size=32, symmetric=False
    ),
    "compressed-tensors, W8A16": compressed_tensors(num_bits=8, strategy="channel"),
    "compressed-tensors, float8": compressed_tensors(num_bits=8, type="float", strategy="channel"),
    "FP8Linear of transformers": fp8_linear((128, 128), library=True),
    "FP8Linear of transformers, a tensor": fp8_linear(None, library=True),
    "hqq": hqq_library,
    "torchao, int8 a row": torchao("Int8WeightOnlyConfig"),
    "torchao, int8": torchao("Int8WeightOnlyConfig", granularity=32),
    "torchao, float8": torchao("Float8WeightOnlyConfig"),
    "torchao, int4 kept in int8": torchao(
        "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=16, mapping_type="ASYMMETRIC"
    ),
    "torchao, int8 with zeros": torchao(
        "IntxWeightOnlyConfig", weight_dtype=torch.int8, granularity=32, mapping_type="ASYMMETRIC"
    ),
}
