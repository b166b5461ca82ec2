"""QuantizedWeight: a weight of 4- or 8-bit codes, and of scales and shifts of blocks."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..backends import decoder, triton
from ..core import coding, forced
from ..core.codes import Codes
from . import codebooks, e2m1

NESTED_BLOCKSIZE = 256  # bitsandbytes writes no other size, and its kernels assume it
_NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPES = tuple(_NAMED.values())  # torch 2.8's Dynamo cannot trace a dictionary view
_NESTED = ("nested_absmax", "nested_code", "offset")


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class QuantizedWeight:
    """A weight of 4- or 8-bit codes q, with a scale for each block, and a shift or none.

        W[n, k] = code[q[n, k]] · scale + shift

    The product and the sum are rounded to float32. So a format is data: bits, codebook, block size,
    and how scales and shifts are stored. `quant_type` names the formats that this package writes;
    any other has "". NF4 and FP4 are bitsandbytes' format, bit for bit. Their blocks divide the
    flattened weight: they may straddle rows, and the last one may be short. All others have whole
    blocks in each row. `quantize_4bit`, `from_bitsandbytes`, `from_state_dict`, `from_mxfp4` and
    `from_nvfp4` create the object.

    Args:
        packed: 4-bit codes, uint8[⌈N·K/2⌉], with even elements in the high nibble; or 8-bit codes,
            uint8[N·K].
        absmax: the scales of ⌈N·K/blocksize⌉ blocks: float32, float16, or uint8 codes of scales in
            a table (nested). With shifts it is [blocks, 2], the scale and the shift of each block.
            Nested scales are nested_code[absmax], which double quantization rounds after
            · nested_absmax[block // nested_blocksize] and after + offset.
        code: the codebook: float32[16] for 4 bits, float32[256] for 8.
        quant_type: "nf4", "fp4", "mxfp4", "nvfp4", or "" for another form.
        blocksize: a power of two: 32 to 4096 for NF4 and FP4, 32 for MXFP4, 16 for NVFP4, and 16 or
            more, a divisor of K, for another form.
        shape: (N, K), or (E, N, K) for the weights of E experts.
        dtype: of the weight before quantization: float32, bfloat16 or float16.
        nested_code: float32[256], or None if absmax is no uint8. Of E experts in NVFP4 it may be
            float32[E, 256], a table for each.
        nested_absmax: float32[⌈blocks/nested_blocksize⌉] for nested NF4 and FP4, or None. Another
            form may have it, with shifts as [⌈blocks/nested_blocksize⌉, 2].
        offset: float32 with one element for nested NF4 and FP4, or None.
        nested_blocksize: 8, 16 or 256; 256 for NF4 and FP4.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names the argument.

    >>> import torch
    >>> from lora_kernels.quantization import quantize_4bit
    >>> quantize_4bit(torch.eye(64), double_quant=False)
    QuantizedWeight([64, 64], nf4 of float32, blocksize=64, 2,368 bytes)
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    quant_type: str
    blocksize: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None
    nested_blocksize: int = NESTED_BLOCKSIZE

    def __post_init__(self) -> None:
        shape = self.shape
        if not (
            isinstance(shape, tuple)
            and len(shape) in (2, 3)
            and all(type(size) is int and size > 0 for size in shape)
        ):
            raise ValueError(f"shape: got {shape!r}, want (N, K) or (E, N, K), each at least 1")
        object.__setattr__(self, "shape", tuple(shape))  # torch.Size is a tuple too
        if self.quant_type != "":
            codebooks.check_type(self.quant_type)
        _check_blocksize(self.quant_type, self.blocksize)
        _check_rows("shape", shape, self.quant_type, self.blocksize)
        sizes = (NESTED_BLOCKSIZE,) if self.quant_type else _NESTED_BLOCKSIZES
        if self.nested_blocksize not in sizes:
            want = " or ".join(map(str, sizes))
            raise ValueError(f"nested_blocksize: got {self.nested_blocksize!r}, want {want}")
        if self.dtype not in _DTYPES:
            raise TypeError(f"dtype: got {self.dtype!r}, want float32, bfloat16 or float16")

        n = math.prod(shape)
        blocks = -(-n // self.blocksize)
        purpose = f"for a weight of {list(shape)}"
        per_block = f"{purpose} in blocks of {self.blocksize}"
        is_other = not self.quant_type
        is_bytes = is_other and isinstance(self.code, Tensor) and self.code.numel() == 256
        bits = 8 if is_bytes else 4
        _check_tensor("packed", self.packed, torch.uint8, -(-n * bits // 8), purpose)
        dtypes = (torch.uint8, torch.float16) if is_other else (torch.uint8,)
        scale_dtype: torch.dtype = getattr(self.absmax, "dtype", torch.float32)
        if scale_dtype not in dtypes:
            scale_dtype = torch.float32
        pairs = 2 * (is_other and isinstance(self.absmax, Tensor) and self.absmax.dim() == 2)
        _check_tensor("absmax", self.absmax, scale_dtype, blocks, per_block, pairs=pairs)
        _check_tensor("code", self.code, torch.float32, 1 << bits, f"for {bits} bits")
        is_double = self.nested and self.quant_type in codebooks.BITSANDBYTES_TYPES
        has_nested_absmax = is_double or (
            is_other and self.nested and self.nested_absmax is not None
        )
        wanted = {
            "nested_code": (self.nested, 256, "for 8 bits"),
            "nested_absmax": (
                has_nested_absmax,
                -(-blocks // self.nested_blocksize),
                f"for {blocks} scales in blocks of {self.nested_blocksize}",
            ),
            "offset": (is_double, 1, "the scales' mean"),
        }
        for name, (is_wanted, count, why) in wanted.items():
            t = getattr(self, name)
            if is_wanted:
                tables = self._experts_with_tables
                of_pairs = pairs * (name == "nested_absmax")
                _check_tensor(name, t, torch.float32, count, why, tables, of_pairs)
            elif t is not None:
                beside = f"{self.quant_type} absmax in {dtype_name(scale_dtype)}".strip()
                raise ValueError(f"{name}: got a tensor, want None beside {beside}")
        for name, t in self._tensors().items():
            if t.device != self.packed.device:
                raise ValueError(f"{name}: got {t.device}, want {self.packed.device}, as packed")

    def __repr__(self) -> str:
        nested = ", nested" if self.nested else ""
        return (
            f"QuantizedWeight({list(self.shape)}, {self.format} of {dtype_name(self.dtype)}, "
            f"blocksize={self.blocksize}{nested}, {self.nbytes:,} bytes)"
        )

    @property
    def format(self) -> str:
        """The format's name, or its bits and whether it has a shift, for messages.

        >>> from lora_kernels.quantization import quantize_4bit
        >>> quantize_4bit(torch.eye(64)).format
        'nf4'
        """
        shift = " with a shift" if self.codes.has_shift else ""
        return self.quant_type or f"{self.codes.bits} bits{shift}"

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nested(self) -> bool:
        """True if the scales are bytes: of double quantization, E8M0 or E4M3."""
        return self.absmax.dtype is torch.uint8

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors, including codebooks."""
        return sum(t.nbytes for t in self._tensors().values())

    def scales(self) -> Tensor:
        """Return the decoded scale of each block, float32[blocks]; no copy unless nested.

        >>> import torch
        >>> from lora_kernels.quantization import quantize_4bit
        >>> quantize_4bit(torch.full((2, 64), 3.0)).scales()
        tensor([3., 3.])
        """
        return self.codes.scales()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode the weight, rounded once to `dtype`.

        dtype: float32, bfloat16, float16 or float64, else TypeError. None: the weight's dtype.

        >>> import torch
        >>> from lora_kernels.quantization import quantize_4bit
        >>> quantize_4bit(torch.tensor([[0.5, -2.0, 0.0]])).dequantize()
        tensor([[ 0.4922, -2.0000,  0.0000]])
        """
        dtype = self.dtype if dtype is None else dtype
        if dtype is not torch.float64 and dtype not in _DTYPES:
            raise TypeError(f"dtype: got {dtype!r}, want float32, bfloat16, float16 or float64")
        if dtype in _DTYPES and (kernels := _kernels(self.device)) is not None:
            dense = kernels.dequantize(self.codes, self.matrix_shape, dtype)
        else:
            dense = decoder.dense(self.codes, self.matrix_shape, dtype)
        return cast(Tensor, dense.view(self.shape))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape of the weight as one matrix: (E·N, K) for E experts."""
        return math.prod(self.shape[:-1]), self.shape[-1]

    @property
    def codes(self) -> Codes:
        """The weight as an argument of ops."""
        nested = self.nested_absmax, self.nested_code, self.offset
        form = self.blocksize, self.nested_blocksize, self.quant_type
        return Codes(self.packed, self.absmax, self.code, *nested, *form)

    def to(self, device: torch.device | str | int) -> QuantizedWeight:
        """Move the weight to a device; tensors that are on the device are shared."""
        moved = {name: t.to(device) for name, t in self._tensors().items()}
        return dataclasses.replace(self, **moved)  # type: ignore[arg-type]

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """Return the state dict that bitsandbytes' Linear4bit saves, with equal keys and bytes.

        The codebooks are copies, and the other tensors share memory.

        >>> import torch
        >>> from lora_kernels.quantization import quantize_4bit
        >>> for key, t in quantize_4bit(torch.eye(64), double_quant=False).state_dict().items():
        ...     print(key, list(t.shape))
        weight [2048, 1]
        weight.absmax [64]
        weight.quant_map [16]
        weight.quant_state.bitsandbytes__nf4 [77]
        """
        if self.quant_type not in codebooks.BITSANDBYTES_TYPES:
            raise ValueError(
                f"weight: got {self.quant_type}, want nf4 or fp4: bitsandbytes' format has no other"
            )
        rest: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": dtype_name(self.dtype),
            "shape": self.shape,
        }
        state = {
            prefix: self.packed[:, None],
            f"{prefix}.absmax": self.absmax,
            f"{prefix}.quant_map": self.code.clone(),
        }
        if self.nested_absmax is not None and self.nested_code is not None:
            assert self.offset is not None
            state[f"{prefix}.nested_absmax"] = self.nested_absmax
            state[f"{prefix}.nested_quant_map"] = self.nested_code.clone()
            rest["nested_blocksize"] = self.nested_blocksize
            rest["nested_dtype"] = "float32"
            rest["nested_offset"] = self.offset.item()
        text = bytearray(json.dumps(rest), "utf-8")
        key = f"{prefix}.quant_state.bitsandbytes__{self.quant_type}"
        state[key] = torch.frombuffer(text, dtype=torch.uint8)
        return state

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], prefix: str = "weight"
    ) -> QuantizedWeight:
        """Build the weight from a `state_dict`, of this class or of bitsandbytes' Linear4bit.

        Keys without `prefix` are ignored. The packed bytes may be stored as uint8, bfloat16,
        float16 or float32, and are not copied. Raises ValueError or TypeError if a key is missing,
        or if a tensor or the JSON differs from bitsandbytes' format.

        >>> import torch
        >>> from lora_kernels.quantization import QuantizedWeight, quantize_4bit
        >>> QuantizedWeight.from_state_dict(quantize_4bit(torch.eye(64), "fp4").state_dict())
        QuantizedWeight([64, 64], fp4 of float32, blocksize=64, nested, 3,208 bytes)
        """

        def get(name: str) -> Tensor:
            key = f"{prefix}.{name}" if name else prefix
            if key not in state:
                raise ValueError(f"state: got no {key!r}, want it beside the other keys")
            return state[key]

        kinds = [f"quant_state.bitsandbytes__{kind}" for kind in codebooks.BITSANDBYTES_TYPES]
        found = [kind for kind in kinds if f"{prefix}.{kind}" in state]
        if len(found) != 1:
            raise ValueError(
                f"state: got {len(found)} keys '{prefix}.quant_state.bitsandbytes__*', want one, "
                "__nf4 or __fp4"
            )
        key = f"{prefix}.{found[0]}"
        rest = parse_json(key, get(found[0]))

        def field(name: str) -> Any:
            if name not in rest:
                raise ValueError(f"{key}: got JSON without {name!r}, want it")
            return rest[name]

        quant_type = field("quant_type")
        if not found[0].endswith(f"__{quant_type}"):
            raise ValueError(f"{key}: got quant_type {quant_type!r} in it, want the key's")
        shape, packed, absmax = field("shape"), get(""), get("absmax")
        fields: dict[str, Any] = {
            "packed": as_bytes(packed),
            "absmax": absmax,
            "code": standard_code(quant_type, get("quant_map")),
            "quant_type": quant_type,
            "blocksize": field("blocksize"),
            "shape": tuple(shape) if isinstance(shape, list) else shape,
            "dtype": _NAMED.get(field("dtype"), field("dtype")),
        }
        if absmax.dtype is torch.uint8:
            if field("nested_dtype") != "float32":
                raise ValueError(
                    f"{key}: got nested_dtype {field('nested_dtype')!r}, want 'float32' (16-bit "
                    "scales come from a weight that bitsandbytes repacked for its CPU kernel: "
                    "save it before the first eval forward)"
                )
            offset = field("nested_offset")
            if not isinstance(offset, (int, float)):
                raise TypeError(f"{key}: got nested_offset {offset!r}, want a number")
            fields["nested_absmax"] = get("nested_absmax")
            fields["nested_code"] = get("nested_quant_map")
            fields["offset"] = torch.tensor(offset, dtype=torch.float32, device=absmax.device)
            fields["nested_blocksize"] = field("nested_blocksize")
        return cls(**fields)

    @classmethod
    def from_mxfp4(
        cls, blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16
    ) -> QuantizedWeight:
        """Build the weight from a checkpoint in MXFP4 (OCP Microscaling Formats 1.0).

        Args:
            blocks: uint8 or float4_e2m1fn_x2: [N, K/2] or [E, N, K/2] (compressed-tensors'
                `weight_packed`, torchao's `qdata`), or [N, K/32, 16] or [E, N, K/32, 16] (gpt-oss'
                `*_blocks`), with even elements in the low nibble. K is a multiple of 32.
            scales: uint8 or float8_e8m0fnu, [N, K/32] or [E, N, K/32]; byte i is 2^(i - 127), and
                255 is NaN.
            dtype: of the weight before quantization: float32, bfloat16 or float16.

        The codes are copied, and the scales are not. Decoding gives the bits of transformers'
        `convert_moe_packed_tensors` for each scale but 255, for which it computes codes × 2^128.

        Raises ValueError or TypeError that names the argument.

        >>> import torch
        >>> from lora_kernels.quantization import QuantizedWeight
        >>> blocks = torch.full((2, 1, 16), 0x21, dtype=torch.uint8)
        >>> weight = QuantizedWeight.from_mxfp4(blocks, torch.full((2, 1), 128, dtype=torch.uint8))
        >>> weight
        QuantizedWeight([2, 32], mxfp4 of bfloat16, blocksize=32, nested, 1,122 bytes)
        >>> weight.dequantize()[0, :4].tolist()
        [1.0, 2.0, 1.0, 2.0]
        """
        return cls._from_e2m1("mxfp4", e2m1.read_mxfp4(blocks, scales), dtype)

    @classmethod
    def from_nvfp4(
        cls,
        packed: Tensor,
        scale: Tensor,
        global_scale: Tensor | None = None,
        *,
        global_op: Literal["divide", "multiply"] | None = None,
        scale_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.bfloat16,
    ) -> QuantizedWeight:
        """Build the weight from a checkpoint in NVFP4.

        Args:
            packed: uint8 or float4_e2m1fn_x2, [N, K/2] or [E, N, K/2], with even elements in the
                low nibble (compressed-tensors' `weight_packed`, torchao's `qdata`). K is a multiple
                of 16.
            scale: float8_e4m3fn, [N, K/16] or [E, N, K/16], in the order of rows (not swizzled).
            global_scale: float32 with one element, or one for each of E experts. None: 1.
            global_op: "divide" if a block's scale is scale / global_scale (compressed-tensors'
                `weight_global_scale`), and "multiply" if it is global_scale · scale (torchao's
                `per_tensor_scale`). Required beside a global_scale.
            scale_dtype: in which that is computed: float32, or the weight's dtype in older releases
                of torchao.
            dtype: of the weight before quantization: float32, bfloat16 or float16.

        The codes are copied, and the scales are not. Each global scale makes a table of the 256
        scales, so that decoding gives the bits of compressed-tensors or torchao.

        Raises ValueError or TypeError that names the argument.

        >>> import torch
        >>> from lora_kernels.quantization import QuantizedWeight
        >>> packed = torch.full((2, 8), 0x21, dtype=torch.uint8)
        >>> scale = torch.ones(2, 1).to(torch.float8_e4m3fn)
        >>> global_scale = torch.tensor(4.0)
        >>> weight = QuantizedWeight.from_nvfp4(packed, scale, global_scale, global_op="divide")
        >>> weight
        QuantizedWeight([2, 16], nvfp4 of bfloat16, blocksize=16, nested, 1,106 bytes)
        >>> weight.dequantize()[0, :4].tolist()
        [0.125, 0.25, 0.125, 0.25]
        """
        if scale_dtype not in _DTYPES:
            raise TypeError(f"scale_dtype: got {scale_dtype!r}, want float32, bfloat16 or float16")
        blocks = e2m1.read_nvfp4(packed, scale, global_scale, global_op, scale_dtype)
        return cls._from_e2m1("nvfp4", blocks, dtype)

    @classmethod
    def _from_e2m1(
        cls, quant_type: str, blocks: e2m1.Blocks, dtype: torch.dtype, nested: bool = True
    ) -> QuantizedWeight:
        """nested: whether the scales stay bytes."""
        weight = cls(
            packed=blocks.packed,
            absmax=blocks.scales,
            code=codebooks.code(quant_type, blocks.packed.device),
            quant_type=quant_type,
            blocksize=codebooks.BLOCKSIZES[quant_type][0],
            shape=blocks.shape,
            dtype=dtype,
            nested_code=blocks.table,
        )
        if nested:
            return weight
        return dataclasses.replace(weight, absmax=weight.scales(), nested_code=None)

    @classmethod
    def from_bitsandbytes(cls, weight: Any) -> QuantizedWeight:
        """Build the weight from a bitsandbytes weight, sharing its memory.

        weight: a quantized `Params4bit`, or a pair (tensor, QuantState).

        Raises ValueError if the weight is not quantized yet, or if an eval forward of bitsandbytes
        has repacked it for the CPU, which loses the scales. Raises TypeError for other types.

        >>> import bitsandbytes, torch
        >>> from lora_kernels.quantization import QuantizedWeight
        >>> QuantizedWeight.from_bitsandbytes(bitsandbytes.functional.quantize_4bit(torch.eye(64)))
        QuantizedWeight([64, 64], fp4 of float32, blocksize=64, 2,368 bytes)
        """
        from . import bitsandbytes_format

        fields = bitsandbytes_format.fields(weight)
        fields["packed"] = as_bytes(fields["packed"])
        fields["code"] = standard_code(fields["quant_type"], fields["code"])
        return cls(**fields)

    @property
    def _experts_with_tables(self) -> int:
        """The experts that may have a table of scales each: 1 but for stacks in NVFP4."""
        is_stack = self.quant_type == "nvfp4" and len(self.shape) == 3
        return self.shape[0] if is_stack else 1

    def _tensors(self) -> dict[str, Tensor]:
        names = ("packed", "absmax", "code", *_NESTED)
        return {name: t for name in names if (t := getattr(self, name)) is not None}


def quantize_4bit(
    weight: Tensor,
    quant_type: str = "nf4",
    blocksize: int | None = None,
    double_quant: bool = True,
) -> QuantizedWeight:
    """Quantize a weight to 4 bits.

    NF4 and FP4 are bitwise equal to those of bitsandbytes' `default` backend. Of the nested scales,
    the CPU op of bitsandbytes 0.50 rounds about 1 in 600 to the second nearest code; here each has
    the nearest. MXFP4 follows the OCP's rule (Microscaling Formats 1.0, 6.3), and NVFP4 torchao's
    `nvfp4_quantize` with the scale of `absmax / (448 · 6)`, of the weight or of each expert.

    Args:
        weight: [N, K], or [E, N, K] for E experts, in float32, bfloat16 or float16, finite, on any
            device and with any strides. Blocks of NF4 and FP4 divide the flattened weight, so they
            may straddle rows and experts. K is a multiple of 32 for MXFP4, and of 16 for NVFP4.
        quant_type: "nf4", "fp4", "mxfp4" or "nvfp4".
        blocksize: the number of elements that share a scale: a power of two, 32 to 4096; 32 for
            MXFP4, and 16 for NVFP4. None: 64, or the format's.
        double_quant: whether the scales are 8 bits (nested): NF4's and FP4's are quantized, and
            False decodes those of MXFP4 and NVFP4. PyTorch computes NF4's and FP4's mean, whose
            last bit depends on the number of threads for very large weights.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names the argument.

    >>> import torch
    >>> from lora_kernels.quantization import quantize_4bit
    >>> quantize_4bit(torch.ones(4096, 64, dtype=torch.bfloat16))
    QuantizedWeight([4096, 64], nf4 of bfloat16, blocksize=64, nested, 136,324 bytes)
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: got {type(weight).__name__}, want a tensor")
    if weight.dtype not in _DTYPES:
        raise TypeError(f"weight: got {weight.dtype}, want float32, bfloat16 or float16")
    if weight.dim() not in (2, 3) or weight.numel() == 0:
        got = list(weight.shape)
        raise ValueError(f"weight: got shape {got}, want [N, K] or [E, N, K], each at least 1")
    codebooks.check_type(quant_type)
    blocksize = default_blocksize(quant_type) if blocksize is None else blocksize
    _check_blocksize(quant_type, blocksize)
    _check_rows("weight", tuple(weight.shape), quant_type, blocksize)
    if weight.device.type == "meta":
        raise ValueError("weight: got a tensor on meta, want one with data")
    weight = weight.detach()
    if type(weight) is not Tensor:  # a packed weight, which has no memory to read
        weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device).copy_(weight)
    device = weight.device
    if quant_type not in codebooks.BITSANDBYTES_TYPES:
        if not weight.isfinite().all():
            raise ValueError("weight: got NaN or infinity in it, want finite values")
        quantize = e2m1.quantize_mxfp4 if quant_type == "mxfp4" else e2m1.quantize_nvfp4
        return QuantizedWeight._from_e2m1(quant_type, quantize(weight), weight.dtype, double_quant)
    thresholds = codebooks.thresholds(quant_type, device)
    order = codebooks.order(quant_type, device)
    packed, absmax = decoder.encode(weight, thresholds, order, blocksize)
    if not absmax.isfinite().all():  # absmax propagates NaN and inf
        raise ValueError("weight: got NaN or infinity in it, want finite values")
    nested: dict[str, Any] = {}
    if double_quant:
        nested_code = codebooks.dynamic_map(device)
        absmax, nested_absmax, offset = coding.quantize_scales(
            absmax, nested_code, NESTED_BLOCKSIZE
        )
        nested = {"nested_absmax": nested_absmax, "nested_code": nested_code, "offset": offset}
    return QuantizedWeight(
        packed=packed,
        absmax=absmax,
        code=codebooks.code(quant_type, device),
        quant_type=quant_type,
        blocksize=blocksize,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        **nested,
    )


def as_bytes(packed: Tensor) -> Tensor:
    """Return a view of packed codes, of any shape and storage dtype, as uint8[n].

    >>> import torch
    >>> as_bytes(torch.ones(1, 1, dtype=torch.bfloat16))
    tensor([128,  63], dtype=torch.uint8)
    """
    if packed.dtype is not torch.uint8 and packed.dtype not in _DTYPES:
        raise TypeError(f"packed: got {packed.dtype}, want uint8, bfloat16, float16 or float32")
    if not packed.is_contiguous():
        raise ValueError(f"packed: got strides {list(packed.stride())}, want a contiguous tensor")
    return packed.detach().view(-1).view(torch.uint8)


def standard_code(quant_type: str, stored: Tensor) -> Tensor:
    """Return the codebook of the type, float32[16]; ValueError if `stored` has other values.

    bitsandbytes decodes by the type and ignores the stored codebook. As in bitsandbytes, codebooks
    are equal if they differ by less than 1e-6.

    >>> import torch
    >>> standard_code("nf4", torch.zeros(16))
    Traceback (most recent call last):
    ValueError: quant_map: got values other than nf4's, want nf4's
    """
    if stored.dtype is not torch.float32 or stored.shape != (16,):
        got = f"{stored.dtype} {list(stored.shape)}"
        raise ValueError(f"quant_map: got {got}, want torch.float32 [16]")
    code = codebooks.code(quant_type, stored.device)
    if torch.compiler.is_compiling() or stored.is_meta:  # a graph must not depend on values
        return code
    if not (stored - code).abs().max() < 1e-6:
        raise ValueError(f"quant_map: got values other than {quant_type}'s, want {quant_type}'s")
    return code


def _kernels(device: torch.device) -> ModuleType | None:
    """Return the forced backend if it has a kernel that decodes, or None.

    Raises RuntimeError if the backend cannot run on the device.
    """
    if forced.current.get().backend != "triton" or torch.compiler.is_compiling():
        return None
    from ..backends.triton import configs

    configs.require(device)
    return triton


_NESTED_BLOCKSIZES = 8, 16, NESTED_BLOCKSIZE


def default_blocksize(quant_type: str) -> int:
    """Return the block size of MXFP4 and NVFP4, and 64 for NF4 and FP4."""
    return 64 if quant_type in codebooks.BITSANDBYTES_TYPES else codebooks.BLOCKSIZES[quant_type][0]


def _check_blocksize(quant_type: str, blocksize: Any) -> None:
    if not quant_type:
        if type(blocksize) is not int or blocksize < 16 or blocksize & (blocksize - 1):
            raise ValueError(f"blocksize: got {blocksize!r}, want a power of two, 16 or more")
        return
    sizes = codebooks.BLOCKSIZES[quant_type]
    if type(blocksize) is not int or blocksize not in sizes:
        want = f"{sizes[0]} for {quant_type}" if len(sizes) == 1 else "a power of two, 32 to 4096"
        raise ValueError(f"blocksize: got {blocksize!r}, want {want}")


def _check_rows(name: str, shape: tuple[int, ...], quant_type: str, size: int) -> None:
    """Raise ValueError unless rows consist of whole blocks, or blocks may straddle rows."""
    if quant_type in codebooks.BITSANDBYTES_TYPES or shape[-1] % size == 0:
        return
    of = f" of {quant_type}" if quant_type else ""
    raise ValueError(
        f"{name}: got {list(shape)}, want a last dimension that is a multiple of {size}, the block "
        f"size{of}"
    )


def _check_tensor(
    name: str,
    t: Any,
    dtype: torch.dtype,
    count: int,
    why: str,
    tables: int = 1,
    pairs: int = 0,
) -> None:
    """Raise TypeError or ValueError unless t has the dtype and `count` elements.

    Args:
        tables: how many the codes of scales may have, as [tables, count].
        pairs: 2 for [count, 2], pairs of a scale and a shift; 0 for [count].
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, want a tensor")
    if t.dtype is not dtype:
        raise TypeError(f"{name}: got {t.dtype}, want {dtype}")
    scalar = name == "offset" and t.dim() == 0
    has_tables = name == "nested_code" and tables > 1 and t.shape == (tables, count)
    want = (count, pairs) if pairs else (count,)
    if not scalar and not has_tables and t.shape != want:
        raise ValueError(f"{name}: got shape {list(t.shape)}, want {list(want)} {why}")
    if not t.is_contiguous():
        raise ValueError(f"{name}: got strides {list(t.stride())}, want a contiguous tensor")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parse_json(key: str, t: Tensor) -> dict[str, Any]:
    if not isinstance(t, Tensor) or t.dtype is not torch.uint8 or t.dim() != 1:
        got = f"{t.dtype} {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{key}: got {got}, want a JSON text in uint8[n]")
    text = bytes(t.tolist())
    try:
        rest = json.loads(text)
    except ValueError:  # invalid JSON or invalid UTF-8
        rest = None
    if not isinstance(rest, dict):
        raise ValueError(f"{key}: got {text!r}, want a whole JSON object")
    return rest
