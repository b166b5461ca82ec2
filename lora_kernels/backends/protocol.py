"""The functions of a backend. Each is a module; `ops` calls the one that `choice` names."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..core.call import (
    ExpertsGrads,
    ExpertsNeeds,
    ExpertsOperands,
    ExpertsSpec,
    Grads,
    MultiGrads,
    MultiNeeds,
    MultiOperands,
    MultiSpec,
    Needs,
    Operands,
    Saved,
    Spec,
)
from ..core.codes import Codes


class Backend(Protocol):
    """The equation and its gradients. x and dy are matrices of M rows, except for the CPU
    backend's `lora_linear`, which takes any leading dimensions.

    strategy: a `Strategy` that the backend's `heuristics` chose or the user requested.
    """

    def lora_linear(
        self, operands: Operands, spec: Spec, strategy: str
    ) -> tuple[Tensor, Saved]: ...

    def lora_linear_backward(
        self,
        dy: Tensor,
        operands: Operands,
        saved: Saved,
        spec: Spec,
        needs: Needs,
        strategy: str,
    ) -> Grads: ...


class NormBackend(Protocol):
    """DoRA's norm."""

    def dora_norm(
        self,
        weight: Tensor | Codes,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        rank_gate: Tensor | None,
    ) -> Tensor: ...


class MultiBackend(Protocol):
    """The equation and its gradients for rows with adapters of their own; x and dy are matrices."""

    def multi_lora_linear(
        self, operands: MultiOperands, spec: MultiSpec, strategy: str
    ) -> tuple[Tensor, Saved]: ...

    def multi_lora_linear_backward(
        self,
        dy: Tensor,
        operands: MultiOperands,
        saved: Saved,
        spec: MultiSpec,
        needs: MultiNeeds,
        strategy: str,
    ) -> MultiGrads: ...


class ExpertsBackend(Protocol):
    """The equation and its gradients for rows sorted by expert; x and dy as in `Backend`."""

    def lora_experts(
        self, operands: ExpertsOperands, spec: ExpertsSpec, strategy: str
    ) -> tuple[Tensor, Saved]: ...

    def lora_experts_backward(
        self,
        dy: Tensor,
        operands: ExpertsOperands,
        saved: Saved,
        spec: ExpertsSpec,
        needs: ExpertsNeeds,
        strategy: str,
    ) -> ExpertsGrads: ...
