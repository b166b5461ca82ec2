"""A kernel that every Triton compiles in an instant, and a function that launches it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton import launch
from lora_kernels.backends.triton.configs import ColumnTiles, Tiles

CONFIG = ColumnTiles(block_n=64, warps=4, stages=1)


@triton.jit
def scale_kernel(
    x_ptr, stride_xm, stride_xn, missing_ptr, y_ptr, n, scale, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if missing_ptr is None:
        values = tl.load(x_ptr + offs * stride_xn, mask=offs < n, other=0.0)
        tl.store(y_ptr + offs, values.to(DTYPE) * scale, mask=offs < n)


@launch.replayed
def scaled(x: Tensor, way: str) -> Tensor:
    """Return 2·x. way: what else is done, which a replay would leave out or get wrong."""
    x.new_empty(1 << 20)  # for nothing
    if way == "temporaries":
        for _ in range(2):
            scale(x, x.new_empty(x.numel() + 5))
    y = torch.empty_like(x)
    if way == "a result by columns":
        y = x.new_empty(*x.shape[::-1]).t()
    elif way == "an error":
        raise RuntimeError(way)
    elif way == "a result in place":
        y.zero_()
    elif way == "a part as result":
        y = x.new_empty(4, *x.shape)[0]
    if way != "no launch":
        scale(x[1:] if way == "a part as operand" else x, y)
    return y


def scale(x: Tensor, y: Tensor, config: Tiles = CONFIG) -> None:
    launch.run(
        scale_kernel,
        config,
        grid=(triton.cdiv(x.numel(), 64),),
        device=x.device,
        BLOCK=64,  # in another order than the kernel's
        DTYPE=tl.float32,
        y_ptr=y,
        missing_ptr=None,
        n=x.numel(),
        scale=2.0,
        **launch.matrix_arguments("x", x, "mn"),
    )
