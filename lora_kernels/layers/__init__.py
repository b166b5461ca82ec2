"""Layers with adapters, on `lora_kernels.lora_linear`."""

from .attention import LoRAAttention
from .conv1d import LoRAConv1D
from .embedding import LoRAEmbedding
from .experts import (
    Experts,
    LoRAExperts,
    QLoRAExperts,
    adaptable_experts,
    quantize_experts,
)
from .gated_mlp import LoRAGatedMLP
from .group import LoRAGroup, QLoRAGroup
from .layer import LoRALayer
from .linear import LoRALinear
from .quantized import MergedLayer, QLoRALayer, QLoRALinear
from .rank_allocator import RankAllocator
from .state import (
    LoRAParameterCount,
    count_lora_parameters,
    load_lora_weights,
    lora_state_dict,
    mark_only_lora_as_trainable,
    save_lora_weights,
)
from .variants import (
    AdaLoRALinear,
    DoRALinear,
    HierarchicalLoRALinear,
    LoRAPlusLinear,
    MemoryEfficientLoRALinear,
    QAdaLoRALinear,
    QDoRALinear,
    QHierarchicalLoRALinear,
    QLoRAPlusLinear,
    QMemoryEfficientLoRALinear,
    QStableLoRALinear,
    StableLoRALinear,
    lora_plus_parameter_groups,
)

__all__ = [
    "AdaLoRALinear",
    "DoRALinear",
    "Experts",
    "HierarchicalLoRALinear",
    "LoRAAttention",
    "LoRAConv1D",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRAGatedMLP",
    "LoRAGroup",
    "LoRALayer",
    "LoRALinear",
    "LoRAParameterCount",
    "LoRAPlusLinear",
    "MemoryEfficientLoRALinear",
    "MergedLayer",
    "QAdaLoRALinear",
    "QDoRALinear",
    "QHierarchicalLoRALinear",
    "QLoRAExperts",
    "QLoRAGroup",
    "QLoRALayer",
    "QLoRALinear",
    "QLoRAPlusLinear",
    "QMemoryEfficientLoRALinear",
    "QStableLoRALinear",
    "RankAllocator",
    "StableLoRALinear",
    "adaptable_experts",
    "count_lora_parameters",
    "load_lora_weights",
    "lora_plus_parameter_groups",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "quantize_experts",
    "save_lora_weights",
]
