"""The tile sizes of each kernel: pure functions of sizes, dtypes and the device's properties.

No config was measured on a GPU. The sizes follow from the registers and shared memory of a
multiprocessor. tests/compile_only compiles every config and checks its resources.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...core.device import DeviceInfo, gpu, has_gpu
from ...core.problem import require_supported
from .. import triton

if TYPE_CHECKING:
    import torch


class Tiles:
    """The tile sizes of a kernel family, and the compiler's options."""

    warps: int
    stages: int

    @property
    def blocks(self) -> dict[str, int]:
        """The sizes as the kernel's compile-time constants, BLOCK_M and so on."""
        fields = vars(self).items()
        return {name.upper(): size for name, size in fields if name.startswith("block_")}


@dataclass(frozen=True)
class GemmTiles(Tiles):
    """Tiles of y, block_m × block_n, and a step of K: the kernels of linear.py."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8


@dataclass(frozen=True)
class ShrinkTiles(Tiles):
    """Tiles of P or dS, block_m × block_r, and a step of K."""

    block_m: int
    block_r: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class OuterTiles(Tiles):
    """Tiles of dA or dB, block_n × block_r, and a step of rows."""

    block_m: int
    block_n: int
    block_r: int
    warps: int
    stages: int


@dataclass(frozen=True)
class RowTiles(Tiles):
    """block_n rows and block_k columns of a weight: `dequantize_kernel`."""

    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ReduceTiles(Tiles):
    """Tiles of a gradient, block_r × block_n: `reduce_kernel`."""

    block_r: int
    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class UpdateTiles(Tiles):
    """block_m rows and block_n columns of g and u, and block_r ranks: the gated kernels that add
    the low-rank updates."""

    block_m: int
    block_n: int
    block_r: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ColumnTiles(Tiles):
    """block_n elements of the kernels in gated.py, or columns of those in softmax.py."""

    block_n: int
    warps: int
    stages: int


MIN_CAPABILITY = 80
MIN_BLOCK = 16  # the smallest dimension of `tl.dot`
MAX_RANK = 64  # above, the accumulators of P and y together spill registers
MAX_SPLITS = 16
INTERPRETER = DeviceInfo("cuda", 80, 4, 160 << 10)  # the device of the interpreter
H100 = DeviceInfo("cuda", 90, 132, 227 << 10)  # the device of meta tensors, which are counted


def target(device_type: str = "cuda", index: int | None = None) -> DeviceInfo | None:
    """Return the properties of the device that kernels run on, or None if it is not a GPU.

    index: None for the current GPU.
    """
    if triton.is_interpreted():
        return INTERPRETER
    return gpu(index) if device_type == "cuda" and has_gpu() else None


# Tensor cores of these read operands from shared memory, which leaves registers for accumulators.
WIDE_TILES = (90, 100)


def unsupported_reason(target: DeviceInfo | None, device_type: str = "cuda") -> str | None:
    """Return why kernels cannot run on a device, or None.

    target: None for a device that is not a GPU, of type `device_type`.
    """
    if (missing := triton.unavailable_reason()) is not None:
        return missing
    if target is None:
        return (
            f"no Triton kernels for device type {device_type!r}, want a GPU (or TRITON_INTERPRET=1 "
            "in the environment, which runs them in Triton's interpreter)"
        )
    return capability_unsupported_reason(target)


def capability_unsupported_reason(target: DeviceInfo) -> str | None:
    """Return why a GPU's compute capability is too old, or None."""
    if 0 < target.capability < MIN_CAPABILITY:
        return (
            f"the GPU is sm_{target.capability}, for which Triton has no matrix instructions; "
            f"want sm_{MIN_CAPABILITY} or newer"
        )
    return None


def precision(target: DeviceInfo) -> str:
    """Return the precision of float32 GEMMs: on NVIDIA 3×TF32, which has float32's error."""
    return "tf32x3" if target.kind == "cuda" else "ieee"


def block_of_ranks(rank: int) -> int:
    """Return BLOCK_R, the ranks that a program processes at a time: a power of two, 16 to 64."""
    return min(max(MIN_BLOCK, power_of_two(rank)), MAX_RANK)


def linear(
    target: DeviceInfo,
    M: int,
    itemsize: int,
    codes: bool,
    rank: int,
    in_registers: bool = False,
    scattered: bool = False,
) -> GemmTiles:
    """Return the tiles of `fused_kernel`.

    Args:
        itemsize: bytes of the main loop's widest operand.
        codes: whether the weight is packed in 4 bits.
        in_registers: whether scales or a float32 adapter need registers too.
        scattered: whether codes are loaded element by element.
    """
    if M <= 16:
        config = GemmTiles(16, 64, 128 if itemsize == 2 else 32, 4, 4)
    elif M <= 64 or itemsize > 2:
        config = GemmTiles(64, 64, 64 if itemsize == 2 else 32, 4, 4)
    elif M <= 256 or rank > 32 or (target.kind == "hip" and in_registers):
        config = GemmTiles(128, 64, 64, 8, 3)
    elif target.capability in WIDE_TILES and not (codes or in_registers):
        config = GemmTiles(128, 256, 64, 8, 3)
    else:
        config = GemmTiles(128, 128, 64, 8, 3)
    if scattered:
        config = GemmTiles(config.block_m if M <= 16 else 64, 64, 32, 4, 1)
    block_r = block_of_ranks(rank)
    while config.stages > 1 and shared_memory(config, itemsize, block_r) > target.shared_memory:
        config = replace(config, stages=config.stages - 1)
    return config


DEQUANTIZE = RowTiles(32, 128, 4, 1)
REDUCE = ReduceTiles(16, 32, 4, 1)


def shared_memory(config: GemmTiles, itemsize: int, block_r: int) -> int:
    """Return the bytes of shared memory for the tiles of all stages."""
    rows = config.block_m + config.block_n + block_r
    return config.stages * rows * config.block_k * itemsize


def shrink(target: DeviceInfo, M: int, K: int, R: int, itemsize: int) -> tuple[ShrinkTiles, int]:
    """Return the tiles of `shrink_kernel`, and the length of a split of K."""
    block_k = 32 if itemsize > 2 else 64
    config = ShrinkTiles(16 if M <= 16 else 64, block_of_ranks(R), block_k, 4, 4)
    programs = _tiles(M, config.block_m) * _tiles(R, config.block_r)
    chunks = _tiles(K, config.block_k)
    num_splits = max(1, min(MAX_SPLITS, target.multiprocessors // programs, chunks // 4))
    return config, _tiles(chunks, num_splits) * config.block_k


def outer(target: DeviceInfo, M: int, N: int, R: int, itemsize: int) -> tuple[OuterTiles, int]:
    """Return the tiles of `outer_kernel`, and the rows of one partial sum.

    itemsize: of the operands. Registers do not hold 64 rows of 64 ranks in float32.
    """
    ranks = block_of_ranks(R)
    config = OuterTiles(32 if itemsize > 2 and ranks > 32 else 64, 64, ranks, 4, 3)
    programs = _tiles(N, config.block_n) * _tiles(R, config.block_r)
    chunks = _tiles(M, config.block_m)
    num_splits = max(1, min(chunks // 2, 2 * target.multiprocessors // programs))
    return config, _tiles(chunks, num_splits) * config.block_m


def elementwise(target: DeviceInfo) -> ColumnTiles:
    """Return the elements of a program of gated.py: 128 bits of 16-bit elements a thread."""
    return ColumnTiles(2048 if target.kind == "hip" else 1024, 4, 1)


def gated_update(target: DeviceInfo, M: int, itemsize: int, rank: int) -> UpdateTiles:
    """Return the tiles of `gated_update_kernel`."""
    columns = 128 if itemsize == 2 else 64
    return UpdateTiles(MIN_BLOCK if M <= MIN_BLOCK else 32, columns, block_of_ranks(rank), 8, 1)


def gated_update_backward(
    target: DeviceInfo, M: int, N: int, itemsize: int, rank: int
) -> tuple[UpdateTiles, int, bool]:
    """Return the tiles of `gated_update_backward_kernel`, a program's rows, and whether it sums
    the three gradients.

    It does not where they would spill registers, or where partial sums move more bytes than h, dg
    and du do between kernels: it then writes h, from which GEMMs compute them.
    """
    ranks = block_of_ranks(rank)
    has_gradients = ranks == MIN_BLOCK if itemsize > 2 else ranks <= 32
    has_gradients = has_gradients or (itemsize == 2 and target.capability in WIDE_TILES)
    has_gradients = has_gradients and 3 * rank < M
    columns = 64 if itemsize > 2 or (ranks > MIN_BLOCK and has_gradients) else 128
    config = UpdateTiles(MIN_BLOCK if M <= MIN_BLOCK else 32, columns, ranks, 8, 2)
    programs, chunks = _tiles(N, config.block_n), _tiles(M, config.block_m)
    num_splits = min(chunks // 2, 2 * target.multiprocessors // programs)
    if has_gradients:
        num_splits = min(num_splits, M // (6 * rank))
    rows = _tiles(chunks, max(1, num_splits)) * config.block_m
    return config, max(rows, config.block_m), has_gradients


def gated_update_reason(itemsize: int, rank: int) -> str | None:
    """Return why the gated kernels do not add updates of this rank, or None."""
    most = MAX_RANK if itemsize == 2 else 32  # above, registers spill
    return f"rank {rank} is above {most}" if rank > most else None


def softmax(target: DeviceInfo, columns: int) -> ColumnTiles:
    """Return the columns that a program of softmax.py holds at a time: 16 a thread at most."""
    threads = 8 * (64 if target.kind == "hip" else 32)
    return ColumnTiles(min(16 * threads, max(1024, power_of_two(columns))), 8, 1)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def require(device: torch.device) -> None:
    """Raise RuntimeError if no kernel runs on the device."""
    require_supported("triton", unsupported_reason(target(device.type, device.index), device.type))
