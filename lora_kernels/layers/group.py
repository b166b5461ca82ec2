"""LoRAGroup: several projections of one x, such as q, k and v, as one layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.record import Record
from ..quantization import QuantizedWeight
from .layer import Init, LoRALayer, check_size, check_stock
from .quantized import QLoRALayer

if TYPE_CHECKING:
    from typing_extensions import Self


class Member(NamedTuple):
    """Views of the parameters of one projection in a group."""

    weight: Tensor | None  # None if packed
    bias: Tensor | None
    lora_A: Tensor | None  # None, like lora_B, if the projection has no adapter
    lora_B: Tensor | None


class LoRAGroup(LoRALayer):
    """Projections y_i = x·W_iᵀ + bias_i + (alpha/r)·dropout(x)·A_iᵀ·B_iᵀ of one x, as one layer.

    The members' weights are concatenated along N, the sum of their sizes, and the A of the targets
    along the rank. Forward and backward read x once for all members, and run one GEMM each for y,
    dx and dA. The members share one dropout mask. On a CPU a group is no faster than separate
    layers (benchmarks/RESULTS.md), because its GEMM multiplies the zeros of B outside of a member's
    ranks too.

    Args, in addition to those of `LoRALinear`:
        members: name -> out-features, in order.
        r: rank of each member's adapter. Kernels need r times the number of targets ≤ 256.
        targets: the members with an adapter. None: all members.

    Parameters: weight [N, K], bias [N] or None, and the concatenated adapters of the T targets,
    lora_A [T·r, K] and lora_B [N_T, r]. `member(name)` returns views of one member's.

    x [..., K] -> a tuple of [..., N_i], in the order of members.

    Raises ValueError or TypeError that names the argument.

    >>> import torch
    >>> from lora_kernels.layers import LoRAGroup
    >>> qkv = LoRAGroup(64, {"q": 64, "k": 16, "v": 16}, r=4, targets=("q", "v"))
    >>> [tuple(y.shape) for y in qkv(torch.ones(2, 64))], tuple(qkv.lora_A.shape)
    ([(2, 64), (2, 16), (2, 16)], (8, 64))
    """

    def __init__(
        self,
        in_features: int,
        members: Mapping[str, int],
        r: int = 8,
        alpha: float = 16.0,
        *args: Any,
        targets: Collection[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not members:
            raise ValueError("members: got none, want at least one")
        for name, size in members.items():
            check_size(f"members[{name!r}]", size)
        targets = tuple(members) if targets is None else tuple(targets)
        if not targets or len(set(targets)) < len(targets) or not set(targets) <= members.keys():
            raise ValueError(f"targets: got {targets}, want some of {tuple(members)}, each once")
        self.members = dict(members)
        self.targets = tuple(name for name in members if name in targets)
        super().__init__(in_features, sum(members.values()), r, alpha, *args, **kwargs)

    @classmethod
    def from_linears(
        cls,
        linears: Mapping[str, nn.Linear],
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        init: Init | None = None,
        lora_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Build the group from `nn.Linear` layers, whose weights and biases are copied.

        options: targets and the other arguments of the class. Raises TypeError if a layer is not a
        stock `nn.Linear`, and ValueError if layers differ in in-features, dtype, device, or in
        having a bias.

        >>> import torch
        >>> from lora_kernels.layers import LoRAGroup
        >>> gate, up = torch.nn.Linear(8, 12), torch.nn.Linear(8, 12)
        >>> x, group = torch.randn(3, 8), LoRAGroup.from_linears({"gate": gate, "up": up}, r=2)
        >>> torch.allclose(group(x)[1], up(x), atol=1e-6)
        True
        """
        if not linears:
            raise ValueError("linears: got none, want at least one")

        def format_of(linear: nn.Linear) -> tuple[object, ...]:
            """Return in_features, dtype, device, and whether there is a bias."""
            weight = linear.weight
            return linear.in_features, weight.dtype, weight.device, linear.bias is not None

        first_linear = next(iter(linears.values()))
        for name, linear in linears.items():
            check_stock(f"linears[{name!r}]", linear, nn.Linear, "torch.nn.Linear")
            if (got := format_of(linear)) != (want := format_of(first_linear)):
                raise ValueError(
                    f"linears[{name!r}]: got in_features, dtype, device and bias {got}, "
                    f"want the first one's {want}"
                )
        sizes = {name: linear.out_features for name, linear in linears.items()}

        def join(name: str) -> nn.Parameter:
            tensors = [getattr(linear, name).detach() for linear in linears.values()]
            return nn.Parameter(torch.cat(tensors), requires_grad=False)

        weight, bias = join("weight"), None if first_linear.bias is None else join("bias")
        layer = cls(
            first_linear.in_features,
            sizes,
            r=r,
            alpha=alpha,
            dropout=dropout,
            bias=bias is not None,
            init=init,
            device="meta",
            dtype=weight.dtype,
            lora_dtype=lora_dtype,
            **options,
        )
        layer._set_base(weight, bias)
        return layer.train(first_linear.training)

    def make_adapter(self, dtype: torch.dtype) -> None:
        self.lora_A = self.empty(len(self.targets) * self.r, self.in_features, dtype=dtype)
        self.lora_B = self.empty(sum(self._target_sizes()), self.r, dtype=dtype)

    def init_lora_A(self, A: Tensor) -> None:
        for member in A.split(self.r):
            super().init_lora_A(member)

    def member(self, name: str) -> Member:
        """Return views of the member's parameters. Raises KeyError for an unknown name."""
        if name not in self.members:
            raise KeyError(f"name: got {name!r}, want one of {tuple(self.members)}")
        i, sizes = list(self.members).index(name), list(self.members.values())
        rows = slice(sum(sizes[:i]), sum(sizes[: i + 1]))
        _, B, rank = self._split_B()[i]
        A = None if B is None else self.lora_A[rank : rank + self.r]
        weight = self.weight[rows] if self.weight.is_floating_point() else None
        return Member(weight, None if self.bias is None else self.bias[rows], A, B)

    def _split_B(self) -> list[tuple[int, Tensor | None, int]]:
        """Return each member's size, its rows of lora_B or None, and its first rank.

        Without an adapter the rank is that of the next target.
        """
        targets_B, rank, parts = iter(self.lora_B.split(self._target_sizes())), 0, []
        for name, size in self.members.items():
            is_target = name in self.targets
            parts.append((size, next(targets_B) if is_target else None, rank))
            rank += self.r * is_target
        return parts

    def _target_sizes(self) -> list[int]:
        return [self.members[name] for name in self.targets]

    def record(self, weight: Tensor | QuantizedWeight) -> Record:
        return super().record(weight)._replace(lora_B=self._padded_B())

    def _padded_B(self) -> Tensor:
        """Return lora_B as [N, T·r]: each target's B in its own rows and ranks, zero elsewhere."""
        width = len(self.targets) * self.r
        if not torch.is_grad_enabled():  # writing in place saves copies of the padded parts
            padded, n = self.lora_B.new_zeros(self.out_features, width), 0
            for size, B, rank in self._split_B():
                if B is not None:
                    padded[n : n + size, rank : rank + self.r] = B
                n += size
            return padded
        return torch.cat(
            [
                self.lora_B.new_zeros(size, width)
                if B is None
                else F.pad(B, (rank, width - rank - self.r))
                for size, B, rank in self._split_B()
            ]
        )

    def adapter_config(self) -> dict[str, Any]:
        members = [list(member) for member in self.members.items()]  # a list keeps the order
        return super().adapter_config() | {"members": members, "targets": list(self.targets)}

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Compute x [..., K] -> y_i [..., N_i], views of one [..., N]."""
        y: Tensor = super().forward(x)
        return tuple(y.split(list(self.members.values()), dim=-1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, members={self.members}, targets={self.targets}"


class QLoRAGroup(LoRAGroup, QLoRALayer):
    """`LoRAGroup` over a 4-bit base; see `QLoRALinear`.

    >>> import torch
    >>> from lora_kernels.layers import QLoRAGroup
    >>> [y.shape[-1] for y in QLoRAGroup(64, {"gate": 96, "up": 96}, r=4)(torch.ones(2, 64))]
    [96, 96]
    """
