"""gpt-oss in the MXFP4 of its checkpoint, without transformers' `kernels` package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

from ..layers.experts import DOWN, GATE_UP
from ..peft.mergeable import refuse_merges
from ..quantization import QuantizedWeight
from ..quantization.packed_state import build_parameter, register_state_hooks
from ..quantization.tensor import QuantizedTensor
from .quantizer import PackedQuantizer, quantizer_for

PROJECTIONS = GATE_UP, DOWN
_BYTES_PER_ELEMENT = 17 / 32  # half a byte of code, and one byte of scale for 32 codes


@contextmanager
def packed_mxfp4() -> Iterator[None]:
    """Load checkpoints in MXFP4 (gpt-oss) packed inside the context, to train adapters on them.

    `from_pretrained` then keeps the experts in 4 bits, on CPUs and GPUs, and without transformers'
    `kernels` package. Without the context transformers decodes them, 13 GB to 40 GB for
    gpt-oss-20b, or keeps them in a form that does not train. The modules are the usual ones. Each
    of the experts' parameters is a `QuantizedTensor` of the usual dtype and shape, [E, K, N]. Other
    code that reads it gets a temporary decoded copy. So PEFT's `target_parameters` finds it, and a
    PEFT model is correct with `fuse` and without. Fused layers read the 4 bits in the kernels.
    transformers' Trainer accepts the model.

    `quantization_config=Mxfp4Config(dequantize=True)` still decodes. Adapters are saved as usual.
    `state_dict` has the codes, which `load_state_dict` takes, and `save_pretrained` refuses the
    model. Merging into it raises an error before the first layer changes. Tensor and expert
    parallelism are refused, and FSDP2 shards decoded experts. The context applies to the whole
    process.

    >>> from transformers import AutoModelForCausalLM
    >>> from lora_kernels.integrations import packed_mxfp4
    >>> with packed_mxfp4():  # doctest: +SKIP
    ...     model = AutoModelForCausalLM.from_pretrained("openai/gpt-oss-20b")
    """
    with quantizer_for("mxfp4", PackedMxfp4Quantizer):
        yield


class Pack(ConversionOps):
    """Conversion of a checkpoint's blocks [E, N, K/32, 16] and scales [E, N, K/32] to [E, K, N]."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer  # its presence stops transformers from casting tensors

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, nn.Parameter]:
        parts = {key.rpartition("_")[2]: value for key, value in input_dict.items()}
        blocks, scales = (
            value[0] if isinstance(value, list) else value
            for value in (parts.get("blocks"), parts.get("scales"))
        )
        if blocks is None or scales is None:
            raise ValueError(
                f"{full_layer_name}: got {sorted(input_dict)} in the checkpoint, want blocks and "
                "scales"
            )
        parameter = model.get_parameter(full_layer_name)
        if isinstance(parameter, DTensor):
            raise NotImplementedError(
                f"{full_layer_name}: got tensor or expert parallelism, which packed MXFP4 lacks: "
                "load it outside of packed_mxfp4()"
            )
        packed = QuantizedWeight.from_mxfp4(blocks, scales, parameter.dtype)
        return {full_layer_name: build_parameter(packed, is_transposed=True)}


class PackedMxfp4Quantizer(PackedQuantizer, Mxfp4HfQuantizer):
    """transformers' quantizer with `Pack` instead of the modules and weights of its kernels."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return not self.is_packed and super().param_needs_quantization(model, param_name, **kwargs)

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        is_packed = self.is_packed and param_name.endswith(PROJECTIONS)
        return (
            _BYTES_PER_ELEMENT
            if is_packed
            else super().param_element_size(model, param_name, param)
        )

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if not self.is_packed:
            super()._process_model_before_weight_loading(model, *args, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        super()._process_model_after_weight_loading(model, **kwargs)
        for module in model.modules() if self.is_packed else ():
            if any(isinstance(p, QuantizedTensor) for p in module._parameters.values()):
                register_state_hooks(module)
                refuse_merges()

    def get_weight_conversions(self) -> Any:
        conversions: Any = super().get_weight_conversions()  # type: ignore[no-untyped-call]
        for conversion in conversions if self.is_packed else ():
            conversion.operations = [Pack(self)]
        return conversions

    @property
    def is_trainable(self) -> bool:
        return True
