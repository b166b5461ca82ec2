"""Results of bitsandbytes' default backend for a few weights: `python -m tests.quantization.golden`

writes it to golden.safetensors beside this file. The weights are not stored: they are integers
hashed, so that they are the same wherever they are computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".safetensors")


class Case(NamedTuple):
    shape: tuple[int, int]
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    nested: bool


CASES = {
    "nf4-nested": Case((24, 48), torch.bfloat16, "nf4", 64, True),
    "fp4": Case((24, 48), torch.float16, "fp4", 64, False),
    "odd": Case((11, 37), torch.float32, "nf4", 32, True),
    "tail": Case((5, 7), torch.bfloat16, "fp4", 4096, True),
    "two-nested-blocks": Case((65, 127), torch.bfloat16, "nf4", 32, True),
}


def weight(case: Case) -> Tensor:
    """Sums of four 16-bit hashes, nearly normal, of a magnitude a row; exact in float32."""
    N, K = case.shape
    words = (torch.arange(1, 4 * N * K + 1) * 2654435761) >> 8 & 0xFFFF
    values = (words.view(4, N, K).sum(0) - 2 * 0xFFFF).float()
    return (values * 2.0 ** (torch.arange(N) % 5 - 18)[:, None]).to(case.dtype)


def main() -> None:
    from safetensors.torch import save_file

    from tests.quantization import default_backend

    torch.set_num_threads(1)
    tensors = {}
    for name, case in CASES.items():
        packed, state = default_backend.quantize(
            weight(case), case.quant_type, case.blocksize, case.nested
        )
        tensors[name] = packed
        for key, value in state.as_dict(packed=True).items():
            tensors[f"{name}.{key}"] = value
        tensors[f"{name}.decoded"] = default_backend.dequantize(packed, state, case.dtype)
    save_file(tensors, FILE)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
