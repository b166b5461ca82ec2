"""QLoRALinear: a frozen 4-bit linear layer with a trainable low-rank adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import base_dtype
from ..quantization import Weight4bit, quantize_4bit
from ..quantization.weight4bit import check_decoder
from .linear import Init, LoRALinear, finite

if TYPE_CHECKING:
    from typing_extensions import Self

# Field of Weight4bit -> name of the parameter that holds its bytes.
_BYTES = {
    "packed": "weight",
    "absmax": "weight_absmax",
    "code": "weight_code",
    "nested_absmax": "weight_nested_absmax",
    "nested_code": "weight_nested_code",
    "offset": "weight_offset",
}


class MergedLayer(NamedTuple):
    """What `QLoRALinear.merged_layer` returns.

    layer: an `nn.Linear`, or, requantized, a `QLoRALinear` whose adapter starts anew.
    change: ‖held − merged‖ / ‖merged‖, how far the weight that the layer holds is from
        W̃ + (alpha/r)·B·A in float32.
    """

    layer: nn.Module
    change: float


class QLoRALinear(LoRALinear):
    """`LoRALinear` over a base in bitsandbytes' 4-bit format, decoded as it is multiplied.

    Args, beside those of `LoRALinear`:
        dtype: of the weight before quantization, in which `merge` holds the sum; float32, bfloat16
            or float16.
        quant_type: "nf4" or "fp4".
        blocksize: elements that share a scale; a power of two, 32 to 4096.
        double_quant: keep the scales in 8 bits.
        compute_dtype: of the base product where autocast is off; None is x's.

    Packed codes, scales, tables and offset are parameters of dtype uint8 without a gradient: so
    they shard, save and load with the module, and `.to(bfloat16)`, `.half()` and mixed-precision
    policies leave their bits alone. lora_A, lora_B and bias are as in `LoRALinear`.

    Raises ValueError or TypeError, naming the argument.

    >>> from lora_kernels.layers import QLoRALinear
    >>> layer = QLoRALinear(64, 32, r=4).to(torch.bfloat16)
    >>> layer.weight4bit
    Weight4bit([32, 64], nf4 of float32, blocksize=64, nested, 2,152 bytes)
    >>> layer(torch.ones(2, 64, dtype=torch.bfloat16)).dtype
    torch.bfloat16
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        bias: bool = False,
        init: Init | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        lora_dtype: torch.dtype | None = None,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        options = {"init": init, "device": device, "dtype": dtype, **options}
        super().__init__(
            in_features, out_features, r, alpha, dropout, bias, lora_dtype=lora_dtype, **options
        )
        self.compute_dtype = compute_dtype
        self.quant_type, self.blocksize, self._nested = quant_type, blocksize, double_quant
        if self.weight.is_meta:  # there is nothing to quantize; `from_linear` and loading fill it
            self._hold(_empty(self.weight, quant_type, blocksize, double_quant))
        else:
            self._hold_base(self.weight)
            self._base_changed()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        init: Init | None = None,
        lora_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """The same layer with its weight quantized and an adapter; the bias is shared.

        `linear` keeps its weight, frozen. options: quant_type and the others of the class. Raises
        as `LoRALinear.from_linear` and `quantize_4bit`.

        >>> import torch
        >>> from lora_kernels.layers import QLoRALinear
        >>> QLoRALinear.from_linear(torch.nn.Linear(64, 64), r=2, quant_type="fp4")
        QLoRALinear(in_features=64, out_features=64, bias=True, r=2, ..., fp4, blocksize=64, nested)
        """
        return super().from_linear(linear, r, alpha, dropout, init, lora_dtype, **options)

    @classmethod
    def from_weight4bit(
        cls,
        weight: Weight4bit,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        bias: Tensor | None = None,
        init: Init | None = None,
        lora_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """A layer over a weight that is quantized already, sharing its memory.

        options: compute_dtype and the others of the class.

        >>> import torch
        >>> from lora_kernels.quantization import quantize_4bit
        >>> QLoRALinear.from_weight4bit(quantize_4bit(torch.eye(64)), r=2).out_features
        64
        """
        N, K = weight.shape
        layer = cls(
            K,
            N,
            r,
            alpha,
            dropout,
            bias is not None,
            init,
            "meta",
            weight.dtype,
            lora_dtype,
            quant_type=weight.quant_type,
            blocksize=weight.blocksize,
            double_quant=weight.nested,
            **options,
        )
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        layer._take(weight)
        return layer

    def _hold_base(self, weight: Tensor | Weight4bit) -> None:
        if not isinstance(weight, Weight4bit):
            weight = quantize_4bit(weight, self.quant_type, self.blocksize, self._nested)
        self._hold(weight)

    def _hold(self, weight: Weight4bit) -> None:
        for field, name in _BYTES.items():
            t: Tensor | None = getattr(weight, field)
            t = None if t is None else t.detach().reshape(-1).view(torch.uint8)
            self.register_parameter(name, None if t is None else nn.Parameter(t, False))
        self.quant_type, self.blocksize = weight.quant_type, weight.blocksize
        self.weight_dtype = weight.dtype
        self._weight4bit: tuple[tuple[int, ...], Weight4bit] | None = None
        check_decoder(weight.device)

    @property
    def weight4bit(self) -> Weight4bit:
        """The base weight, sharing the parameters' memory."""
        parameters = self._parameters
        tensors = {field: parameters[name] for field, name in _BYTES.items()}
        if torch.compiler.is_compiling():  # which can compare no addresses
            return self._view(tensors)
        where = tuple(0 if t is None else t.data_ptr() for t in tensors.values())
        if self._weight4bit is None or self._weight4bit[0] != where or 0 in where[:3]:
            with torch.inference_mode(False):  # whose views could not be saved for a backward
                self._weight4bit = where, self._view(tensors)
        return self._weight4bit[1]

    def _view(self, tensors: Mapping[str, Tensor | None]) -> Weight4bit:
        in_bytes = {"packed"} if tensors["nested_absmax"] is None else {"packed", "absmax"}
        views = {
            field: t if t is None or field in in_bytes else t.detach().view(torch.float32)
            for field, t in tensors.items()
        }
        return Weight4bit(
            quant_type=self.quant_type,
            blocksize=self.blocksize,
            shape=(self.out_features, self.in_features),
            dtype=self.weight_dtype,
            **{f: t if t is None else t.detach() for f, t in views.items()},  # type: ignore[arg-type]
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A new base as `nn.Linear` starts it, quantized, and the adapter; nothing on meta."""
        if self.weight.is_floating_point():  # as yet: in __init__
            return super().reset_parameters()
        if self.weight.is_meta:
            return
        dense = torch.empty(
            self.out_features, self.in_features, dtype=self.weight_dtype, device=self.weight.device
        )
        self.weight = nn.Parameter(dense, requires_grad=False)
        super().reset_parameters()
        self._hold_base(self.weight)
        self._base_changed()

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name in _BYTES.values():  # of a mapped file, bytes may lie where no float32 can be read
            t = self._parameters[name]
            if t is not None and (t.storage_offset() % 4 or t.data_ptr() % 4):
                t.data = t.data.clone()

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._weight4bit = None
        super()._apply(*args, **kwargs)
        check_decoder(self.weight.device)
        return self

    def __getstate__(self) -> dict[str, object]:
        # The views are made anew: deepcopy and pickle would keep the old memory.
        return {**self.__dict__, "_weight4bit": None}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> y [..., N], in autocast's dtype where autocast is on, else in x's."""
        if not self.enabled or self.merged:
            return super().forward(x)
        return self._fused(x, self.weight4bit, self.compute_dtype)

    def _base(self, x: Tensor) -> Tensor:
        return self._product(x, self.weight4bit.dequantize(base_dtype(x.device.type, x.dtype)))

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        # As in `lora_linear`, x's dtype is the one that counts: the weight's is that before
        # quantization, whatever the module was moved to since, and the bias has moved.
        dtype = base_dtype(x.device.type, x.dtype)
        return F.linear(x, weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def _dense_weight(self) -> Tensor:
        return self.weight4bit.dequantize()

    def _base_weight(self) -> Tensor | Weight4bit:
        return self.weight4bit if self.weight.dtype is torch.uint8 else self.weight

    @torch.no_grad()
    def merged_layer(self, requantize: bool = False) -> MergedLayer:
        """A new layer that computes with W̃ + (alpha/r)·B·A, and how exactly it does.

        requantize: False returns an `nn.Linear` in the dtype of the weight before quantization;
        True a `QLoRALinear` in the same 4-bit format, whose rounding is of the size of a trained
        adapter: look at `change`, and at the outputs, before you part with the adapter. To compute
        with the sum and be able to take it back, call `merge`.

        >>> from lora_kernels.layers import QLoRALinear
        >>> layer = QLoRALinear(64, 64, r=2)
        >>> layer.merged_layer().change < 1e-7 < layer.merged_layer(requantize=True).change
        True
        """
        exact = finite(self._merged(self.weight4bit.dequantize(torch.float32)))
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, "meta", self.weight_dtype
        )
        linear.weight = nn.Parameter(exact.to(self.weight_dtype), requires_grad=False)
        if self.bias is not None:
            bias = self.bias.detach().to(self.weight_dtype, copy=True)
            linear.bias = nn.Parameter(bias, requires_grad=False)
        layer: nn.Module = linear.train(self.training)
        held: Tensor = linear.weight
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
                double_quant=self.weight4bit.nested,
                compute_dtype=self.compute_dtype,
            )
            layer.scaling = self.scaling
            held = layer.weight4bit.dequantize(torch.float32)
        change = (held.float() - exact).norm() / exact.norm()
        return MergedLayer(layer, change.item())

    def extra_repr(self) -> str:
        nested = ", nested" * (self._parameters["weight_offset"] is not None)
        return f"{super().extra_repr()}, {self.quant_type}, blocksize={self.blocksize}{nested}"


def _empty(weight: Tensor, quant_type: str, blocksize: int, nested: bool) -> Weight4bit:
    """A weight of this one's shape on meta."""
    one = quantize_4bit(torch.zeros(1, 1, dtype=weight.dtype), quant_type, blocksize, nested)
    n, blocks = weight.numel(), -(-weight.numel() // blocksize)

    def meta(t: Tensor | None, *shape: int) -> Tensor | None:
        return None if t is None else t.new_empty(shape or t.shape, device="meta")

    sizes = {"packed": -(-n // 2), "absmax": blocks, "nested_absmax": -(-blocks // 256)}
    fields = {name: meta(getattr(one, name), size) for name, size in sizes.items()}
    rest = {name: meta(getattr(one, name)) for name in ("code", "nested_code", "offset")}
    shape = (weight.shape[0], weight.shape[1])
    return dataclasses.replace(one, shape=shape, **fields, **rest)  # type: ignore[arg-type]
