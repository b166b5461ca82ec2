"""QLoRALinear: a frozen quantized linear layer with a trainable low-rank adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.arguments import base_dtype
from ..quantization import QuantizedWeight, quantize_4bit
from .layer import Base, Init, LoRALayer
from .linear import LoRALinear

if TYPE_CHECKING:
    from typing_extensions import Self

# Field of QuantizedWeight -> name of the parameter that holds its bytes.
_PARAMETERS = {
    "packed": "weight",
    "absmax": "weight_absmax",
    "code": "weight_code",
    "nested_absmax": "weight_nested_absmax",
    "nested_code": "weight_nested_code",
    "offset": "weight_offset",
}


class Base4bit(Base):
    """W [N, K], quantized, stored in parameters of dtype uint8."""

    @torch.no_grad()
    def reset(self, layer: QLoRALayer) -> None:  # type: ignore[override]
        """Initialize as `nn.Linear` does and quantize. A weight on meta gets no values."""
        weight = layer.weight
        if not weight.is_floating_point():
            if weight.is_meta:
                return
            sizes, dtype = (layer.out_features, layer.in_features), layer.weight_dtype
            dense = torch.empty(sizes, dtype=dtype, device=weight.device)
            layer.weight = nn.Parameter(dense, requires_grad=False)
        super().reset(layer)
        self.set_weight(layer, layer.weight)

    def set_weight(self, layer: QLoRALayer, weight: Tensor | QuantizedWeight) -> None:  # type: ignore[override]
        if not isinstance(weight, QuantizedWeight):
            quantize = _quantize_on_meta if weight.is_meta else quantize_4bit
            weight = quantize(weight, layer.quant_type, layer.blocksize, layer.double_quant)
        layer.views = {}
        for field, name in _PARAMETERS.items():
            t: Tensor | None = getattr(weight, field)
            if t is None:
                layer.register_parameter(name, None)
                continue
            layer.views[field] = t.dtype, t.shape[1:]
            t = t.detach().reshape(-1).view(torch.uint8)
            layer.register_parameter(name, nn.Parameter(t, False))
        layer.quant_type, layer.blocksize = weight.quant_type, weight.blocksize
        layer.nested_blocksize, layer.format = weight.nested_blocksize, weight.format
        layer.double_quant, layer.weight_dtype = weight.nested, weight.dtype
        layer._cache.quantized = None

    def align(self, layer: QLoRALayer) -> None:  # type: ignore[override]
        for name in _PARAMETERS.values():
            t = layer._parameters[name]
            if t is not None and (t.storage_offset() % 4 or t.data_ptr() % 4):
                # A view of a memory-mapped file, which is not aligned for float32.
                t.data = t.data.clone()

    def operand(self, layer: QLoRALayer) -> QuantizedWeight:  # type: ignore[override]
        parameters = layer._parameters
        tensors = {field: parameters[name] for field, name in _PARAMETERS.items()}
        if torch.compiler.is_compiling():  # addresses cannot be traced
            return _view_weight(layer, tensors)
        addresses = tuple(0 if t is None else t.data_ptr() for t in tensors.values())
        cached = layer._cache.quantized
        if cached is None or cached[0] != addresses or 0 in addresses[:3]:
            with torch.inference_mode(False):  # inference tensors cannot be saved for a backward
                cached = layer._cache.quantized = addresses, _view_weight(layer, tensors)
        return cached[1]

    def multiply(self, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
        # As in `lora_linear`, x's dtype decides. The weight's dtype is that before quantization,
        # but the module and its bias may have been moved to another dtype since.
        dtype = base_dtype(x.device.type, x.dtype)
        dense = (
            weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)
        )
        return F.linear(x, dense, None if bias is None else bias.to(dtype))


def _view_weight(layer: QLoRALayer, tensors: Mapping[str, Tensor | None]) -> QuantizedWeight:
    """Return a `QuantizedWeight` that shares the memory of the byte tensors."""
    views: dict[str, Any] = {}  # Dynamo cannot trace `dict[str, Any]()`
    for field, t in tensors.items():
        if t is not None:
            dtype, sizes = layer.views[field]
            t = t.detach() if dtype is torch.uint8 else t.detach().view(dtype)
            views[field] = t.view(-1, *sizes) if sizes else t
    return QuantizedWeight(
        quant_type=layer.quant_type,
        blocksize=cast(int, layer.blocksize),
        shape=(layer.out_features, layer.in_features),
        dtype=layer.weight_dtype,
        nested_blocksize=layer.nested_blocksize,
        **views,
    )


def _quantize_on_meta(
    weight: Tensor, quant_type: str, blocksize: int | None, nested: bool
) -> QuantizedWeight:
    """Return a quantized weight on meta with the shape of `weight`."""
    row = torch.zeros(1, weight.shape[1], dtype=weight.dtype)
    quantized_row = quantize_4bit(row, quant_type, blocksize, nested)
    numel, blocks = weight.numel(), -(-weight.numel() // quantized_row.blocksize)

    def empty_on_meta(t: Tensor | None, *shape: int) -> Tensor | None:
        return None if t is None else t.new_empty(shape or t.shape, device="meta")

    sizes = {"packed": -(-numel // 2), "absmax": blocks, "nested_absmax": -(-blocks // 256)}
    fields = {
        name: empty_on_meta(getattr(quantized_row, name), size) for name, size in sizes.items()
    }
    others = {
        name: empty_on_meta(getattr(quantized_row, name))
        for name in ("code", "nested_code", "offset")
    }
    shape = (weight.shape[0], weight.shape[1])
    return dataclasses.replace(quantized_row, shape=shape, **fields, **others)  # type: ignore[arg-type]


class QLoRALayer(LoRALayer):
    """The base class of all layers over a quantized base.

    `class QMine(Mine, QLoRALayer)` is the layer `Mine` over a quantized base. The constructor takes
    the arguments of `quantize_4bit` and passes the others on.
    """

    base = Base4bit()
    double_quant: bool
    weight_dtype: torch.dtype  # before quantization
    views: dict[str, tuple[torch.dtype, torch.Size]]  # of the fields, which are kept as bytes
    nested_blocksize: int
    format: str

    def __init__(
        self,
        *args: Any,
        quant_type: str = "nf4",
        blocksize: int | None = None,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        self.quant_type, self.blocksize, self.double_quant = quant_type, blocksize, double_quant
        self.compute_dtype = compute_dtype
        super().__init__(*args, **options)

    @property
    def quantized(self) -> QuantizedWeight:
        """The base weight, which shares the parameters' memory."""
        return self.base.operand(self)

    def extra_repr(self) -> str:
        nested = ", nested" * self.double_quant
        return f"{super().extra_repr()}, {self.format}, blocksize={self.blocksize}{nested}"


class MergedLayer(NamedTuple):
    """The result of `QLoRALinear.merged_layer`.

    Attributes:
        layer: an `nn.Linear`, or if requantized a `QLoRALinear` with a new adapter.
        change: the relative error ‖W' − W*‖ / ‖W*‖ of the layer's weight W', where W* is
            W̃ + (alpha/r)·B·A in float32.
    """

    layer: nn.Module
    change: float


class QLoRALinear(QLoRALayer, LoRALinear):
    """`LoRALinear` over a quantized base, which kernels decode in the GEMM.

    Args, in addition to those of `LoRALinear`:
        dtype: of the weight before quantization, and of the merged weight: float32, bfloat16 or
            float16.
        quant_type, blocksize, double_quant: as in `lora_kernels.quantization.quantize_4bit`.
        compute_dtype: of the base GEMM without autocast. None: x's dtype.

    Packed codes, absmax, codebooks and offset are parameters of dtype uint8 without a gradient. So
    they shard, save and load with the module, and `.to(bfloat16)`, `.half()` and mixed-precision
    policies do not change them. lora_A, lora_B and bias are as in `LoRALinear`.

    Raises ValueError or TypeError that names the argument.

    >>> from lora_kernels.layers import QLoRALinear
    >>> layer = QLoRALinear(64, 32, r=4).to(torch.bfloat16)
    >>> layer.quantized
    QuantizedWeight([32, 64], nf4 of float32, blocksize=64, nested, 2,152 bytes)
    >>> layer(torch.ones(2, 64, dtype=torch.bfloat16)).dtype
    torch.bfloat16
    >>> QLoRALinear.from_linear(torch.nn.Linear(64, 64), r=2, quant_type="fp4")
    QLoRALinear(in_features=64, out_features=64, bias=True, r=2, ..., fp4, blocksize=64, nested)
    """

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        bias: Tensor | None = None,
        init: Init | None = None,
        lora_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Build the layer from a quantized weight, whose memory is shared.

        options: compute_dtype and the other arguments of the class.

        >>> import torch
        >>> from lora_kernels.quantization import quantize_4bit
        >>> QLoRALinear.from_quantized(quantize_4bit(torch.eye(64)), r=2).out_features
        64
        """
        N, K = weight.shape
        sizes, factory_args = (K, N, r, alpha), ("meta", weight.dtype, lora_dtype)
        layer = cls(*sizes, dropout, bias is not None, init, *factory_args, **options)
        return layer._set_base(weight, None if bias is None else nn.Parameter(bias, False))

    @torch.no_grad()
    def merged_layer(self, requantize: bool = False) -> MergedLayer:
        """Return a new layer with the weight W̃ + (alpha/r)·B·A, and its rounding error.

        `merge` is the reversible way to compute with the sum.

        requantize: False returns an `nn.Linear` in the dtype of the weight before quantization.
            True returns a `QLoRALinear` in the same format. Its rounding error is as large as
            a trained adapter, so check `change` and the outputs before deleting the adapter.
            ValueError for a format that this package does not quantize to.

        >>> from lora_kernels.layers import QLoRALinear
        >>> layer = QLoRALinear(64, 64, r=2)
        >>> layer.merged_layer().change < 1e-7 < layer.merged_layer(requantize=True).change
        True
        """
        if requantize and not self.quant_type:
            raise ValueError(
                f"requantize: got a weight of {self.format}, want False: only nf4, fp4, mxfp4 and "
                "nvfp4 are quantized here"
            )
        merged = self._merge_into(self.quantized.dequantize(torch.float32))
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, "meta", self.weight_dtype
        )
        linear.weight = nn.Parameter(merged.to(self.weight_dtype), requires_grad=False)
        if self.bias is not None:
            bias = self.bias.detach().to(self.weight_dtype, copy=True)
            linear.bias = nn.Parameter(bias, requires_grad=False)
        layer: nn.Module = linear.train(self.training)
        new_weight: Tensor = linear.weight
        if requantize:
            layer = QLoRALinear.from_linear(
                linear,
                self.r,
                self.alpha,
                self.dropout,
                self.init,
                self.lora_A.dtype,
                quant_type=self.quant_type,
                blocksize=self.blocksize,
                double_quant=self.double_quant,
                compute_dtype=self.compute_dtype,
            )
            layer.scaling = self.scaling
            new_weight = layer.quantized.dequantize(torch.float32)
        change = (new_weight.float() - merged).norm() / merged.norm()
        return MergedLayer(layer, change.item())
