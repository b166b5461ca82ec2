"""LoRALayer: a frozen base weight W, and a trainable adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.record import Record, path_reason
from ..ops import direct
from ..ops.arguments import check_finite, check_probability
from ..quantization import QuantizedWeight
from .cache import DoraNormCache

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's own from Python 3.11 on

Init = str | Callable[[Tensor], object]
_INITS = ("kaiming", "gaussian", "xavier", "orthogonal")
# Methods that a subclass may override, under the names that they had: nothing would call them.
_FORMER_NAMES = {
    "_make_adapter": "make_adapter",
    "_init_": "init_lora_A",
    "_adapter": "record",
    "_forward_fused": "forward_fused",
    "_adapter_config": "adapter_config",
    "_base": "base",
    "_default_init": "default_init",
    "_base_weight": "base_weight",
    "_dense_weight": "dense_weight",
}


def merge_into(record: Record, weight: Tensor) -> Tensor:
    """Return c ⊙ (weight + s·(B ⊙ g)·A) in float32 (float64 for float64)."""
    if (reason := path_reason([record], direct.LAYER)) is not None:
        raise ValueError(reason)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    gate, column_scale = record.rank_gate, record.column_scale
    lora_A, lora_B = record.lora_A.to(dtype), record.lora_B.to(dtype)
    lora_B = lora_B if gate is None else lora_B * gate.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        merged = torch.addmm(weight.to(dtype), lora_B, lora_A, alpha=record.scaling)
    return merged if column_scale is None else merged * column_scale.to(dtype)[:, None]


class Base:
    """Storage of a layer's frozen W in one parameter `weight` [N, K], and multiplication by W.

    A base has no state. The parameters belong to the layer, so they are sharded, saved and loaded
    with the layer under short names.
    """

    transposed = False  # whether `weight` is [K, N]

    @torch.no_grad()
    def reset(self, layer: LoRALayer) -> None:
        """Initialize weight and bias as `nn.Linear` does."""
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        if layer.bias is not None:
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.bias, -bound, bound)

    def set_weight(self, layer: LoRALayer, weight: Tensor | QuantizedWeight) -> None:
        """Set the layer's weight, which shares the memory of `weight` if the format allows."""
        assert isinstance(weight, nn.Parameter)
        layer.weight = weight

    def align(self, layer: LoRALayer) -> None:
        """Copy loaded parameters that are not aligned for the kernels. A dense base has none."""

    def operand(self, layer: LoRALayer) -> Tensor | QuantizedWeight:
        """Return W as an argument of `lora_linear`."""
        return layer.weight

    def multiply(self, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
        """Return the layer's output without the adapter. weight: the operand or a merged weight."""
        assert isinstance(weight, Tensor)
        return F.linear(x, weight, bias)


class LayerCache:
    """A layer's cache of values that are computed from its tensors.

    The cache is empty in a copy of the layer, after unpickling, and after a move.
    """

    def __init__(self) -> None:
        self.norm = DoraNormCache()
        self.quantized: tuple[tuple[int, ...], QuantizedWeight] | None = None

    def __reduce__(self) -> tuple[type[LayerCache], tuple[()]]:
        return LayerCache, ()


class LoRALayer(nn.Module):
    """The base class of all layers with an adapter.

    A subclass chooses a base, in `base`, and an adapter, in at most six methods:

        make_adapter            registers the adapter's parameters, uninitialized
        reset_lora_parameters   initializes them
        init_lora_A             fills lora_A by `init`
        record                  returns the operands that derive from the parameters
        forward_fused           computes base and adapter together, by `lora_linear` by default
        adapter_config          returns the numbers that a saved adapter is checked for

    `LoRALinear` documents the arguments that all layers share.
    """

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    merged_weight: Tensor | None

    base: ClassVar[Base] = Base()
    default_init: ClassVar[Any] = "kaiming"
    compute_dtype: torch.dtype | None = None  # of the base GEMM without autocast
    use_checkpoint = False  # see `MemoryEfficientLoRALinear`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for former, name in _FORMER_NAMES.items():
            if hasattr(cls, former):
                raise TypeError(f"{cls.__name__}: got {former}, want its new name {name}")

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
        scaling: str = "lora",
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features), ("r", r)):
            check_size(name, size)
        check_finite("alpha", alpha)
        check_probability("dropout", dropout)
        init = self.default_init if init is None else init
        if not callable(init) and init not in _INITS:
            want = ", ".join(map(repr, _INITS))
            raise ValueError(f"init: got {init!r}, want one of {want}, or a callable")
        if init == "orthogonal" and r > in_features:
            raise ValueError(f"r: got {r}, want at most in_features = {in_features} for orthogonal")
        if scaling not in ("lora", "rslora"):
            raise ValueError(f"scaling: got {scaling!r}, want 'lora' or 'rslora'")
        self.in_features, self.out_features = in_features, out_features
        self.r, self.alpha = r, alpha
        self.scaling = alpha / (r if scaling == "lora" else math.sqrt(r))
        self.dropout = dropout
        self.init = init
        self.enabled = True  # False: the base alone, exactly `F.linear`
        self._cache = LayerCache()
        sizes = (out_features, in_features)
        shape = sizes[::-1] if self.base.transposed else sizes
        self.weight = _frozen_parameter(torch.empty(shape, device=device, dtype=dtype))
        if not self.weight.is_floating_point():
            raise TypeError(f"dtype: got {dtype}, want a floating dtype")
        self.register_parameter(
            "bias", _frozen_parameter(self.weight.new_empty(out_features)) if bias else None
        )
        if lora_dtype is None:
            lora_dtype = torch.promote_types(self.weight.dtype, torch.float32)
        elif not lora_dtype.is_floating_point:
            raise TypeError(f"lora_dtype: got {lora_dtype}, want a floating dtype")
        self.make_adapter(lora_dtype)
        self.register_buffer("merged_weight", None, persistent=False)
        self.reset_parameters()

    # The adapter

    def make_adapter(self, dtype: torch.dtype) -> None:
        """Register the adapter's parameters on the base's device. dtype: of the matrices."""
        self.lora_A = self.empty(self.r, self.in_features, dtype=dtype)
        self.lora_B = self.empty(self.out_features, self.r, dtype=dtype)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Set lora_A by `init` and lora_B to zero. Meta tensors are left alone."""
        if not self.lora_A.is_meta:
            self.init_lora_A(self.lora_A)
            nn.init.zeros_(self.lora_B)

    def record(self, weight: Tensor | QuantizedWeight) -> Record:
        """Return the operands of the next call; a gate and a column scale may be computed.

        weight: the base's operand.
        """
        p = self.dropout if self.training else 0.0
        return Record(weight, self.lora_A, self.lora_B, self.bias, self.scaling, p)

    def forward_fused(self, x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
        """Return the layer's output. weight: the base's operand."""
        return direct.compute(x, self.record(weight), self.compute_dtype, self.use_checkpoint)

    def adapter_config(self) -> dict[str, Any]:
        """Return the numbers that change the output and are no parameters, as JSON values.

        `save_lora_weights` stores them, and `load_lora_weights` compares them with the model's.
        """
        return {"r": self.r, "alpha": self.alpha, "scaling": self.scaling}

    def empty(self, *shape: int, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(self.weight.new_empty(shape, dtype=dtype))

    def empty_vector(self, size: int, dtype: torch.dtype) -> nn.Parameter:
        """Return an uninitialized vector of the adapter, in at least float32."""
        return self.empty(size, dtype=torch.promote_types(dtype, torch.float32))

    def init_lora_A(self, A: Tensor) -> None:
        """Fill a lora_A [r, K] by `init`."""
        if callable(self.init):
            self.init(A)
        elif self.init == "gaussian":
            nn.init.normal_(A, std=1 / self.r)
        elif self.init == "xavier":
            nn.init.xavier_uniform_(A)
        elif self.init == "orthogonal":  # PyTorch has no 16-bit QR decomposition
            dtype = torch.promote_types(A.dtype, torch.float32)
            A.copy_(nn.init.orthogonal_(torch.empty_like(A, dtype=dtype)))
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))

    # The base

    def _set_base(self, weight: Tensor | QuantizedWeight, bias: nn.Parameter | None) -> Self:
        """Replace the base on meta by `weight` and `bias`, and initialize the adapter there."""
        self.base.set_weight(self, weight)
        self.bias = bias
        if weight.device.type != "meta":
            for name, p in self._parameters.items():
                if p is not None and p.is_meta:
                    empty = torch.empty_like(p, device=weight.device)
                    self._parameters[name] = nn.Parameter(empty, p.requires_grad)
            for name, t in self._buffers.items():
                if t is not None:
                    self._buffers[name] = torch.empty_like(t, device=weight.device)
        self.reset_lora_parameters()
        return self

    def reset_parameters(self) -> None:
        """Initialize the base by `Base.reset` and the adapter by `reset_lora_parameters`."""
        self.base.reset(self)
        self.reset_lora_parameters()

    def base_weight(self) -> Tensor | QuantizedWeight:
        """Return the base's operand: W [N, K], or [K, N] for an embedding."""
        return self.base.operand(self)

    def dense_weight(self) -> Tensor:
        """Return the base's operand as a floating tensor."""
        weight = self.base_weight()
        return weight if isinstance(weight, Tensor) else weight.dequantize()

    # The layer

    def forward(self, x: Tensor) -> Tensor:
        """Compute x [..., K] -> y [..., N], in autocast's dtype under autocast, else in x's."""
        if not self.enabled:
            return self.base.multiply(x, self.base_weight(), self.bias)
        if self.merged_weight is None:
            return self.forward_fused(x, self.base_weight())
        is_trainable = self.lora_A.requires_grad or self.lora_B.requires_grad
        if is_trainable and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__} is merged and in training mode, where lora_A and "
                "lora_B would get no gradient: call unmerge() to train, or eval()"
            )
        return self.base.multiply(x, self.merged_weight, self.bias)

    @property
    def merged(self) -> bool:
        """True between `merge` and `unmerge`."""
        return self.merged_weight is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the adapter: compute with W + (alpha/r)·B·A, in one GEMM and without dropout.

        The sum is computed in float32 (float64 for float64) and rounded once to W's dtype. The
        layer keeps W, so `unmerge` is exact and the state dict does not change. This takes a second
        [N, K] tensor while merged. A second call merges the current adapter.

        Raises RuntimeError, and merges nothing, if the sum has NaN or infinity.
        """
        self.merged_weight = self._merge_into(self.dense_weight())

    def _merge_into(self, weight: Tensor) -> Tensor:
        """Return `weight` with the adapter merged into it; RuntimeError if it is not finite."""
        merged = merge_into(self.record(self.base_weight()), weight).to(weight.dtype)
        if not merged.isfinite().all():
            raise RuntimeError(
                "merge: got NaN or infinity in the sum of weight and adapter, want finite values; "
                "nothing was merged"
            )
        return merged

    def unmerge(self) -> None:
        """Undo `merge`: compute with W and the adapter again."""
        self.merged_weight = None

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._cache = LayerCache()  # free the tensors on the former device
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.base.align(self)
        if self.merged:  # merged_weight is derived from the weights before loading
            self.merge()

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, alpha={self.alpha:g}, "
            f"dropout={self.dropout:g}"
        )
        return text + ", merged" * self.merged + ", disabled" * (not self.enabled)


def check_stock(name: str, module: nn.Module, cls: type[nn.Module], cls_name: str) -> None:
    """Raise TypeError unless `module` is exactly a `cls`, without hooks or a patched forward."""
    if type(module) is not cls:
        raise TypeError(f"{name}: got {type(module).__name__}, want exactly {cls_name}")
    if type(module.weight) is not nn.Parameter:
        raise TypeError(f"{name}: got a weight of {type(module.weight)}, want torch.nn.Parameter")
    if (
        "forward" in vars(module)
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    ):
        raise TypeError(f"{name}: got one with hooks or a patched forward, want a stock one")


def check_size(name: str, size: int) -> None:
    """Raise unless `size` is an int of at least 1."""
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name}: got {size!r}, want an int")
    if size < 1:
        raise ValueError(f"{name}: got {size}, want at least 1")


def _frozen_parameter(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)
