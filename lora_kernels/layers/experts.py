"""Mixtures of experts, with one `lora_experts_linear` for each projection."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops import context
from ..ops.arguments import check_finite, check_probability
from ..ops.experts import lora_experts_linear
from ..quantization import QuantizedWeight
from ..quantization.codebooks import BITSANDBYTES_TYPES
from ..quantization.tensor import QuantizedTensor, read_tensor

UP, GATE_UP, DOWN = "up_proj", "gate_up_proj", "down_proj"


class ExpertsAdapter(NamedTuple):
    """The adapter of one projection, or of one tenant for the projection.

    Args:
        lora_A: [E, R, in-features].
        lora_B: [E, out-features, R], any strides.
        scaling: alpha / r.
        dropout_p: probability of zeroing an element of the projection's input. Of several
            tenants, the first one's holds for all.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float = 0.0


class Experts(nn.Module):
    """Frozen experts, with the attributes of transformers' experts modules.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        activation: applied to the gate, or to the up-projection without a gate.
        has_gate: whether `gate_up_proj` [E, 2·I, H] holds gate and up-projection, and the input of
            `down_proj` [E, H, I] is activation(gate) · up. Otherwise `up_proj` is [E, I, H].
        bias: whether the projections have biases [E, out-features].
        is_transposed: whether the weights are [E, in-features, out-features].

    >>> import torch
    >>> from lora_kernels.layers import Experts
    >>> experts = Experts(4, 16, 32)
    >>> x, chosen, weights = torch.ones(3, 16), torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5)
    >>> experts(x, chosen, weights).shape
    torch.Size([3, 16])
    """

    has_post_expert_norm = False

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: Callable[[Tensor], Tensor] = functional.silu,
        *,
        has_gate: bool = True,
        bias: bool = False,
        is_transposed: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.act_fn = num_experts, activation
        self.has_gate, self.has_bias, self.is_transposed = has_gate, bias, is_transposed
        up = (GATE_UP, 2 * intermediate_size) if has_gate else (UP, intermediate_size)
        for (name, out_features), in_features in (
            (up, hidden_size),
            ((DOWN, hidden_size), intermediate_size),
        ):
            shape = (in_features, out_features) if is_transposed else (out_features, in_features)
            weight = torch.empty(num_experts, *shape, device=device, dtype=dtype)
            if not weight.is_meta:
                nn.init.normal_(weight, std=in_features**-0.5)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
            if bias:
                zeros = torch.zeros(num_experts, out_features, device=device, dtype=dtype)
                self.register_parameter(f"{name}_bias", nn.Parameter(zeros, requires_grad=False))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `experts_forward`."""
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


class LoRAExperts(nn.Module):
    """Frozen experts with an adapter for each expert and projection.

    Args:
        experts: `Experts`, or an experts module of transformers. Its weights are frozen. 4-bit
            weights (`quantize_experts`) are decoded inside the GEMM.
        r: rank of each expert's adapters.
        alpha: the adapters are scaled by alpha / r.
        dropout: probability of zeroing an element of a projection's input on the adapter's branch.

    Parameters: `lora_A[name]` [E, r, in-features] and `lora_B[name]` [E, out-features, r], for the
    names "gate_up_proj" ("up_proj" without a gate) and "down_proj". lora_B starts at zero.

    >>> import torch
    >>> from lora_kernels.layers import Experts, LoRAExperts
    >>> layer = LoRAExperts(Experts(4, 16, 32), r=2)
    >>> x, chosen, weights = torch.ones(3, 16), torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5)
    >>> layer(x, chosen, weights).shape, layer.lora_A["down_proj"].shape
    (torch.Size([3, 16]), torch.Size([4, 2, 32]))
    """

    def __init__(
        self, experts: nn.Module, r: int = 8, alpha: float = 16.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if (reason := unsupported_reason(experts)) is not None:
            raise TypeError(f"experts: {reason}")
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"r: got {r!r}, want an integer of at least 1")
        check_finite("alpha", alpha)
        check_probability("dropout", dropout)
        self.experts = experts.requires_grad_(False)
        self.r, self.alpha, self.scaling, self.dropout = r, alpha, alpha / r, dropout
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name in projections(experts):
            weight = stack(experts, name)
            E, N, K = weight.shape
            if has_transposed_stack(experts, name):
                N, K = K, N
            template = torch.empty(0, device=weight.device, dtype=torch.float32)
            self.lora_A[name] = nn.Parameter(template.new_empty(E, r, K))
            self.lora_B[name] = nn.Parameter(template.new_zeros(E, N, r))
        self.reset_lora_parameters()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Draw lora_A as `nn.Linear` draws its weights, and set lora_B to zero."""
        for name, lora_A in self.lora_A.items():
            bound = 1 / math.sqrt(lora_A.shape[2])
            nn.init.uniform_(lora_A, -bound, bound)
            nn.init.zeros_(self.lora_B[name])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `experts_forward`."""
        dropout_p = self.dropout if self.training else 0.0
        adapters = {
            name: [ExpertsAdapter(lora_A, self.lora_B[name], self.scaling, dropout_p)]
            for name, lora_A in self.lora_A.items()
        }
        return experts_forward(self.experts, hidden_states, top_k_index, top_k_weights, adapters)

    def adapter_config(self) -> dict[str, Any]:
        """See `LoRALayer.adapter_config`."""
        return {"r": self.r, "alpha": self.alpha, "scaling": self.scaling}

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}"


class QLoRAExperts(LoRAExperts):
    """`LoRAExperts` over 4-bit weights. Dense weights are quantized. Needs bitsandbytes.

    Args, in addition to those of `LoRAExperts`:
        quant_type, blocksize, double_quant: as in `quantize_experts`.

    >>> import torch
    >>> from lora_kernels.layers import Experts, QLoRAExperts
    >>> layer = QLoRAExperts(Experts(4, 64, 32), r=2)
    >>> x, chosen, weights = torch.ones(3, 64), torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5)
    >>> layer(x, chosen, weights).shape
    torch.Size([3, 64])
    """

    def __init__(
        self,
        experts: nn.Module,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> None:
        if unsupported_reason(experts) is None:
            quantize_experts(experts, quant_type, blocksize, double_quant)
        super().__init__(experts, r, alpha, dropout)


def unsupported_reason(experts: nn.Module) -> str | None:
    """Return why `experts_forward` does not support a module; None if it does."""
    for name in ("num_experts", "is_transposed", "has_gate", "has_bias", "has_post_expert_norm"):
        if not hasattr(experts, name):
            return (
                f"got {type(experts).__name__} without `{name}`, want an experts module of "
                "transformers 5 or lora_kernels.layers.Experts"
            )
    for name in projections(experts):
        if name not in experts._parameters and not is_quantized(experts, name):
            return f"got {type(experts).__name__} without a plain or 4-bit parameter {name}"
    return None


def projections(experts: nn.Module) -> tuple[str, str]:
    """Return the weight names of an experts module, in the order of their calls."""
    return GATE_UP if cast(Any, experts).has_gate else UP, DOWN


def is_quantized(experts: nn.Module, name: str) -> bool:
    """Return True if bitsandbytes' 4-bit parametrization is the only one of a parameter."""
    parametrizations = experts._modules.get("parametrizations")
    if not isinstance(parametrizations, nn.ModuleDict) or name not in parametrizations:
        return False
    return [
        type(parametrization).__name__ for parametrization in cast(Any, parametrizations[name])
    ] == ["Bnb4bitParametrization"]


def quantized_projections(module: nn.Module) -> list[str]:
    """Return the names of a module's 4-bit projections; empty unless it is an experts module."""
    if unsupported_reason(module) is not None:
        return []
    return [name for name in projections(module) if is_quantized(module, name)]


def has_quantized_experts(model: nn.Module) -> bool:
    """Return True if a model has 4-bit experts."""
    return any(map(quantized_projections, model.modules()))


def stack(experts: nn.Module, name: str) -> Tensor | QuantizedWeight:
    """Return the weights of one projection; 4-bit weights stay packed.

    The weights are [E, out-features, in-features], or [E, in-features, out-features] if
    `has_transposed_stack`.
    """
    if not is_quantized(experts, name):
        weight = experts.get_parameter(name)
        return read_tensor(weight) if isinstance(weight, QuantizedTensor) else weight
    from ..quantization.bitsandbytes import cached_weight

    parametrizations = cast(Any, experts).parametrizations[name]
    return cached_weight(parametrizations.original, parametrizations[0].quant_state)


def has_transposed_stack(experts: nn.Module, name: str) -> bool:
    """Return True if the `stack` of a projection is [E, in-features, out-features]."""
    weight = experts._parameters.get(name)
    # A QuantizedTensor may have packed the transpose of the parameter.
    is_packed_transposed = isinstance(weight, QuantizedTensor) and weight.is_transposed
    return bool(cast(Any, experts).is_transposed) != is_packed_transposed


def quantize_experts(
    model: nn.Module, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> nn.Module:
    """Quantize all experts modules of a model to 4 bits in place, and return the model.

    bitsandbytes' `replace_parameter_4bit` replaces the weights, so a state dict has its format.
    Weights that are in 4 bits already are left as they are. Needs bitsandbytes. Add PEFT's adapters
    before this call, or inside `adaptable_experts`.

    Args:
        model: contains experts modules, or is one.
        quant_type: "nf4" or "fp4".
        blocksize, double_quant: as in `lora_kernels.quantization.quantize_4bit`.

    Raises ValueError if the model has no experts modules, or for another `quant_type`.

    >>> from lora_kernels.layers import Experts, quantize_experts
    >>> experts = quantize_experts(Experts(2, 64, 64))
    >>> experts.parametrizations.down_proj.original.dtype
    torch.uint8
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    if quant_type not in BITSANDBYTES_TYPES:
        raise ValueError(f"quant_type: got {quant_type!r}, want 'nf4' or 'fp4'")
    modules = [m for m in model.modules() if unsupported_reason(m) is None]
    if not modules:
        raise ValueError(f"model: got {type(model).__name__} without experts modules")
    for module in modules:
        for name in projections(module):
            is_packed = isinstance(module._parameters.get(name), QuantizedTensor)
            if not is_packed and not is_quantized(module, name):
                replace_parameter_4bit(
                    module,
                    name,
                    compress_statistics=double_quant,
                    quant_type=cast(Any, quant_type),
                    blocksize=blocksize,
                )
    return model


@contextlib.contextmanager
def adaptable_experts(model: nn.Module) -> Iterator[None]:
    """Replace 4-bit experts by parameters without memory inside the context, for PEFT.

    PEFT finds 4-bit parameters only by their full names, and decodes them to read a shape. This
    context spares it both. Call `peft.get_peft_model`, `add_adapter` or `PeftModel.from_pretrained`
    inside, but no forward.

    >>> from lora_kernels.layers import Experts, adaptable_experts, quantize_experts
    >>> experts = quantize_experts(Experts(2, 64, 64))
    >>> with adaptable_experts(experts):
    ...     experts.down_proj.shape
    torch.Size([2, 64, 64])
    """
    replaced: list[tuple[nn.Module, Any, Any, list[str]]] = []
    try:
        for module in list(model.modules()):
            names = quantized_projections(module)
            if not names:
                continue
            replaced.append((module, type(module), module._modules["parametrizations"], names))
            for name in names:
                weight = stack(module, name)
                template = torch.empty((), dtype=weight.dtype, device=weight.device)
                placeholder = nn.Parameter(template.expand(weight.shape), requires_grad=False)
                module._parameters[name] = placeholder
            del module._modules["parametrizations"]
            module.__class__ = type(module).__bases__[0]  # drop the properties that decode
        yield
    finally:
        for module, cls, parametrizations, names in replaced:
            module.__class__ = cls
            module._modules["parametrizations"] = parametrizations
            for name in names:
                del module._parameters[name]


class _Gather(torch.autograd.Function):
    """Gather rows `permutation // k` of x; the backward sums the k copies of a row in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, permutation: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, permutation // k)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        bags = inverse.view(inverse.shape[0] // ctx.k, ctx.k)
        return functional.embedding_bag(bags, dy, mode="sum"), None, None, None


class _Combine(torch.autograd.Function):
    """Add the k rows of each token with their weights: y_t = Σ_j weights[t, j] · x[inverse[t, j]].

    One kernel each computes y, dx and dweights. It reads a row once and rounds no intermediate row.
    x [T·k, H] and weights [T, k] have one dtype. inverse [T·k], read as [T, k], is the inverse of
    `permutation`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, permutation: Tensor, inverse: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weights, permutation, inverse)
        bags = inverse.view(weights.shape)
        return functional.embedding_bag(bags, x, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, permutation, inverse = ctx.saved_tensors
        k, dx, dweights = weights.shape[1], None, None
        if ctx.needs_input_grad[0]:
            # A bag of one row gathers it and multiplies it by its weight in one kernel.
            bags, factors = (permutation // k)[:, None], weights.reshape(-1)[permutation][:, None]
            dx = functional.embedding_bag(bags, dy, mode="sum", per_sample_weights=factors)
        if x is not None:
            places = torch.arange(inverse.shape[0], dtype=inverse.dtype, device=inverse.device)
            starts, tokens, mode_sum = places[::k].contiguous(), places // k, 0
            dweights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                dy.contiguous(), x, inverse, starts, tokens, mode_sum
            ).view(weights.shape)
        return dx, dweights, None, None


def experts_forward(
    experts: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapters: Mapping[str, Sequence[ExpertsAdapter]] | None = None,
    tenants: Tensor | None = None,
) -> Tensor:
    """Compute the experts of each token and add them with their routing weights.

    Args:
        experts: `Experts`, or an experts module of transformers.
        hidden_states: [T, H].
        top_k_index: int64 or int32 [T, k], each token's experts. Values of at least E are skipped:
            with expert parallelism they are experts of other devices. Negative values are refused
            on a CPU alone, because reading them would synchronize a GPU.
        top_k_weights: [T, k].
        adapters: for the name of a projection its adapters, one for each tenant. A projection
            without adapters is missing.
        tenants: int64 [T], each token's tenant, or None for one tenant.

    Returns:
        [T, H] in hidden_states' dtype. The result is deterministic.

    Raises ValueError or TypeError that names the argument.
    """
    context.refuse_context()
    module, adapters = cast(Any, experts), adapters or {}
    _check_routing(hidden_states, top_k_index, top_k_weights)
    T, k = top_k_index.shape
    # A pair is an expert and a tenant. Rows are sorted by pair.
    pairs_per_expert, pair_index = 1, top_k_index
    if tenants is not None and adapters:
        pairs_per_expert = max(len(per_tenant) for per_tenant in adapters.values())
        pair_index = top_k_index * pairs_per_expert + tenants[:, None]
    num_pairs = module.num_experts * pairs_per_expert
    sorted_pairs, permutation = torch.sort(pair_index.reshape(-1), stable=True)
    is_readable = (
        sorted_pairs.is_cpu and sorted_pairs.numel() and context.can_bypass_dispatcher(sorted_pairs)
    )
    if is_readable and (min_pair := sorted_pairs[0].item()) < 0:
        raise ValueError(
            f"top_k_index: got {min_pair // pairs_per_expert}, want 0 to "
            f"{module.num_experts - 1}, or more for experts of other devices"
        )
    inverse = torch.empty_like(permutation).scatter_(
        0, permutation, torch.arange(T * k, dtype=permutation.dtype, device=permutation.device)
    )
    pair_ids = torch.arange(num_pairs, dtype=sorted_pairs.dtype, device=sorted_pairs.device)
    offsets = torch.searchsorted(sorted_pairs, pair_ids, right=True, out_int32=True)
    up, down = projections(experts)
    x = _project(
        experts, up, _Gather.apply(hidden_states, permutation, inverse, k), offsets, adapters
    )
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = _project(experts, down, x, offsets, adapters)
    if module.has_post_expert_norm:
        x = module.post_expert_norm(x)
    weights = top_k_weights.masked_fill(pair_index >= num_pairs, 0)
    dtype = torch.promote_types(x.dtype, weights.dtype)
    y: Tensor = _Combine.apply(x.to(dtype), weights.to(dtype), permutation, inverse)
    return y.to(hidden_states.dtype)


def _check_routing(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    """Raise ValueError or TypeError unless the shapes and the index's dtype fit."""
    if top_k_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"top_k_index: got {top_k_index.dtype}, want int64 or int32")
    if top_k_index.dim() != 2 or top_k_index.shape[0] != hidden_states.shape[0]:
        got, T = list(top_k_index.shape), hidden_states.shape[0]
        raise ValueError(f"top_k_index: got shape {got}, want [{T}, k] for hidden_states")
    T, k = top_k_index.shape
    if top_k_weights.shape != top_k_index.shape:
        got = list(top_k_weights.shape)
        raise ValueError(f"top_k_weights: got shape {got}, want top_k_index's [{T}, {k}]")


def _project(
    experts: nn.Module,
    name: str,
    x: Tensor,
    offsets: Tensor,
    adapters: Mapping[str, Sequence[ExpertsAdapter]],
) -> Tensor:
    """Return the projection of x, whose rows are sorted by pair. offsets: ends of the pairs."""
    module, per_tenant = cast(Any, experts), adapters.get(name)
    weight = stack(experts, name)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    lora_A, lora_B, scaling, dropout_p = None, None, [1.0], [0.0]
    if per_tenant is not None:
        lora_A, lora_B, scaling, dropout_p = map(list, zip(*per_tenant, strict=True))
    else:  # one tenant
        pairs_per_expert = offsets.shape[0] // module.num_experts
        offsets = offsets[pairs_per_expert - 1 :: pairs_per_expert]
    # Compute in the weight's dtype, as transformers' grouped_mm does. autocast would copy the
    # weights of all experts.
    with context.no_autocast(x):
        return lora_experts_linear(
            *(x.to(weight.dtype), weight, lora_A, lora_B, offsets, scaling, bias),
            is_transposed=has_transposed_stack(experts, name),
            dropout_p=dropout_p[0],
            # transformers says whether experts of other devices can be chosen.
            has_tail=getattr(module, "_is_expert_parallel", True),
        )
