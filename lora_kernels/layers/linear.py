"""LoRALinear: a frozen linear layer with a trainable low-rank adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fastpath import CallCache
from ..functional import lora_linear
from ..quantization import Weight4bit

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's own from Python 3.11 on

Init = str | Callable[[Tensor], object]
_INITS = ("kaiming", "gaussian", "xavier", "orthogonal")


def finite(merged: Tensor) -> Tensor:
    """What was given; RuntimeError where there is NaN or infinity in it."""
    if not merged.isfinite().all():
        raise RuntimeError(
            "merge: got NaN or infinity in the sum of weight and adapter, want finite values; "
            "nothing was merged"
        )
    return merged


class LoRALinear(nn.Module):
    """y = x·Wᵀ + bias + (alpha/r) · dropout(x)·Aᵀ·Bᵀ, with W and bias frozen, in one fused op.

    Deliberately no `nn.Linear`: tools that replace every `nn.Linear` (quantizers, FP8 converters)
    would drop the adapter without a word. So would code that reads `weight` instead of calling the
    layer, as `nn.TransformerEncoderLayer` does in eval mode without gradients: keep it from that
    with `torch.backends.mha.set_fastpath_enabled(False)`.

    Args:
        in_features, out_features: K and N.
        r: rank of the adapter, at least 1.
        alpha: the adapter is scaled by alpha / r (attribute `scaling`); see scaling.
        dropout: probability in [0, 1] of dropping an element of x, on the adapter's branch alone
            and in training mode alone.
        bias: whether the base has a bias [N]. It is frozen; `layer.bias.requires_grad_()` trains
            it.
        init: how lora_A starts: "kaiming" (or None; uniform in ±1/√K, as `nn.Linear`'s weight),
            "gaussian" (standard deviation 1/r), "xavier" (uniform in ±√(6/(r+K))), "orthogonal"
            (its rows orthonormal, r ≤ K), or a callable that fills the tensor [r, K] in place. It
            is kept for `reset_parameters`, so a layer to be pickled needs a picklable one. lora_B
            starts at zero: the new layer computes what its base does.
        device, dtype: of the base.
        lora_dtype: of lora_A and lora_B; None takes float32 beside a 16-bit base (small updates
            would be rounded away), else the base's dtype.
        scaling: "lora" for alpha / r, "rslora" for alpha / √r, which keeps the size of an update
            the same as the rank grows (Kalajdzievski, 2023).

    Parameters: weight [N, K], bias [N] or None, lora_A [r, K], lora_B [N, r].

    Raises ValueError or TypeError, naming the argument.

    >>> from lora_kernels.layers import LoRALinear
    >>> layer = LoRALinear(64, 32, r=4)
    >>> layer(torch.ones(2, 64)).shape, [n for n, p in layer.named_parameters() if p.requires_grad]
    (torch.Size([2, 32]), ['lora_A', 'lora_B'])
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    merged_weight: Tensor | None

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
        for name, number in (("alpha", alpha), ("dropout", dropout)):
            if not isinstance(number, (int, float)):
                raise TypeError(f"{name}: got {number!r}, want a number")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha: got {alpha}, want a finite number")
        if not 0.0 <= dropout <= 1.0:  # NaN fails this too
            raise ValueError(f"dropout: got {dropout}, want a probability in [0, 1]")
        init = self._default_init if init is None else init
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
        self._call_cache = CallCache()
        self.weight = _frozen(torch.empty(out_features, in_features, device=device, dtype=dtype))
        if not self.weight.is_floating_point():
            raise TypeError(f"dtype: got {dtype}, want a floating dtype")
        self.register_parameter(
            "bias", _frozen(self.weight.new_empty(out_features)) if bias else None
        )
        if lora_dtype is None:
            lora_dtype = torch.promote_types(self.weight.dtype, torch.float32)
        elif not lora_dtype.is_floating_point:
            raise TypeError(f"lora_dtype: got {lora_dtype}, want a floating dtype")
        self.lora_A = nn.Parameter(self.weight.new_empty(r, in_features, dtype=lora_dtype))
        self.lora_B = nn.Parameter(self.weight.new_empty(out_features, r, dtype=lora_dtype))
        self.register_buffer("merged_weight", None, persistent=False)
        self._make_parameters()
        self.reset_parameters()

    def _make_parameters(self) -> None:
        """A variant's own, empty, beside lora_A and lora_B."""

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
        """The same layer with an adapter; weight and bias are shared with `linear`, not copied.

        Being the same Parameters, they are frozen in `linear` too. Device, dtype and training
        mode are `linear`'s; options are the class's other ones. Raises TypeError for anything but
        a stock `nn.Linear`: what a subclass, a hook or a parametrization adds to the forward would
        be lost.

        >>> import torch
        >>> from lora_kernels.layers import LoRALinear
        >>> linear = torch.nn.Linear(8, 8)
        >>> LoRALinear.from_linear(linear, r=2, alpha=4).weight is linear.weight
        True
        """
        check_stock("linear", linear, nn.Linear, "torch.nn.Linear")
        weight = linear.weight
        (N, K), bias = weight.shape, linear.bias is not None
        layer = cls(
            K, N, r, alpha, dropout, bias, init, "meta", weight.dtype, lora_dtype, **options
        )
        layer.bias = linear.bias
        layer._take(weight)
        linear.requires_grad_(False)
        return layer.train(linear.training)

    def _take(self, weight: Tensor | Weight4bit) -> None:
        """A base in place of one on meta; the adapter starts on its device."""
        self._hold_base(weight)
        device = weight.device
        for name, param in list(self._parameters.items()):
            base = name == "bias" or name.startswith("weight")
            if param is not None and param.is_meta and not base:
                empty = torch.empty_like(param, device=device)
                setattr(self, name, nn.Parameter(empty, param.requires_grad))
        for name, buffer in list(self._buffers.items()):
            if buffer is not None and buffer.is_meta:
                setattr(self, name, torch.empty_like(buffer, device=device))
        self.reset_lora_parameters()

    def _hold_base(self, weight: Tensor | Weight4bit) -> None:
        assert isinstance(weight, nn.Parameter)
        self.weight = weight

    def _base_changed(self) -> None:
        """Called where another base lies beside an adapter that has started."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The base as `nn.Linear` starts it, the adapter as `reset_lora_parameters` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)
        self.reset_lora_parameters()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """lora_A by `init`, lora_B to zero. Meta tensors are left alone."""
        if self.lora_A.is_meta:
            return
        self._fill_lora_A()
        nn.init.zeros_(self.lora_B)

    def _fill_lora_A(self) -> None:
        self._start(self.lora_A)

    def _start(self, A: Tensor) -> None:
        """Fill an A [r, K] by `init`."""
        if callable(self.init):
            self.init(A)
        elif self.init == "gaussian":
            nn.init.normal_(A, std=1 / self.r)
        elif self.init == "xavier":
            nn.init.xavier_uniform_(A)
        elif self.init == "orthogonal":  # by a decomposition that 16-bit dtypes have not
            dtype = torch.promote_types(A.dtype, torch.float32)
            A.copy_(nn.init.orthogonal_(torch.empty_like(A, dtype=dtype)))
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))

    def _adapter_B(self) -> Tensor:
        """B [N, R] beside lora_A [R, K], as `lora_linear` takes it."""
        return self.lora_B

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> y [..., N], in autocast's dtype where autocast is on, else in x's."""
        if not self.enabled:
            return self._base(x)
        if self.merged_weight is not None:
            trainable = self.lora_A.requires_grad or self.lora_B.requires_grad
            if trainable and self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{type(self).__name__} is merged and in training mode, where lora_A and "
                    "lora_B would get no gradient: call unmerge() to train, or eval()"
                )
            return self._product(x, self.merged_weight)
        return self._fused(x, self._base_weight())

    def _fused(
        self, x: Tensor, weight: Tensor | Weight4bit, compute_dtype: torch.dtype | None = None
    ) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        gate, column_scale = self._gate(), self._column_scale(weight)
        lora_B = self._adapter_B()
        varied = gate is not None or column_scale is not None
        if varied or self._recompute or torch.compiler.is_compiling():
            return lora_linear(
                x,
                weight,
                self.lora_A,
                lora_B,
                self.scaling,
                self.bias,
                rank_gate=gate,
                column_scale=column_scale,
                dropout_p=dropout_p,
                compute_dtype=compute_dtype,
                recompute=self._recompute,
            )
        return self._call_cache(
            x, weight, self.lora_A, lora_B, self.scaling, self.bias, compute_dtype, dropout_p
        )

    _recompute = False  # see `lora_linear`
    _default_init: Init = "kaiming"

    def _gate(self) -> Tensor | None:
        """A variant's rank gate [r], which multiplies `scaling`."""
        return None

    def _column_scale(self, weight: Tensor | Weight4bit) -> Tensor | None:
        """A variant's column scale [N] over this base."""
        return None

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._call_cache = CallCache()  # whose tensors would stay in memory where these move
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _base(self, x: Tensor) -> Tensor:
        """The layer without its adapter."""
        return self._product(x, self._dense_weight())

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)

    def _dense_weight(self) -> Tensor:
        """W [N, K] as a floating tensor."""
        return self.weight

    def _base_weight(self) -> Tensor | Weight4bit:
        """W [N, K] as `lora_linear` takes it."""
        return self.weight

    @property
    def merged(self) -> bool:
        """Whether `merge` is in force."""
        return self.merged_weight is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with W + (alpha/r)·B·A from here on, as of now: one product, no dropout.

        The sum is taken in float32 (float64 for float64) and rounded once to W's dtype. W itself
        is kept beside it: `unmerge` gives back the same bits and a state dict is the same, merged
        or not, at the price of a second [N, K] tensor while merged. A second call merges afresh.
        Raises RuntimeError, and merges nothing, where the sum has NaN or infinity.
        """
        weight = self._dense_weight()
        self.merged_weight = finite(self._merged(weight).to(weight.dtype))

    def _merged(self, weight: Tensor) -> Tensor:
        """c ⊙ (weight + (B ⊙ g)·A) in float32 (float64 for float64)."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        gate, column_scale = self._gate(), self._column_scale(self._base_weight())
        lora_B = self._adapter_B().to(dtype)
        lora_B = lora_B if gate is None else lora_B * gate.to(dtype)
        with torch.autocast(weight.device.type, enabled=False):
            merged = torch.addmm(
                weight.to(dtype), lora_B, self.lora_A.to(dtype), alpha=self.scaling
            )
        return merged if column_scale is None else merged * column_scale.to(dtype)[:, None]

    def unmerge(self) -> None:
        """Undo `merge`; W never changed."""
        self.merged_weight = None

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.merged:  # of the weights before
            self.merge()

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, alpha={self.alpha:g}, "
            f"dropout={self.dropout:g}"
        )
        return text + ", merged" * self.merged + ", disabled" * (not self.enabled)


def check_stock(name: str, module: nn.Module, cls: type[nn.Module], of: str) -> None:
    """Raises TypeError for anything but a plain `cls`."""
    if type(module) is not cls:
        raise TypeError(f"{name}: got {type(module).__name__}, want exactly {of}")
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
    """Raises unless `size` is an int of at least 1."""
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name}: got {size!r}, want an int")
    if size < 1:
        raise ValueError(f"{name}: got {size}, want at least 1")


def _frozen(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)
