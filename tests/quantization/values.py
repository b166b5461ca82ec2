"""Weights that make a quantizer show its mistakes, and the comparison that tells."""

import torch

from lora_kernels.quantization import codebooks


def special(quant_type: str) -> torch.Tensor:
    """Zeros, subnormals, an outlier in each block, values on the thresholds and beside them."""
    generator = torch.Generator().manual_seed(0)
    thresholds = codebooks.thresholds(quant_type)
    near = [thresholds, torch.nextafter(thresholds, torch.tensor(1.0)), -thresholds]
    # Thresholds times any scale, whose quotients and products with a reciprocal round apart.
    scales = 0.5 + torch.rand(128, 1, generator=generator)
    scaled = torch.cat([scales, scales * thresholds, scales * thresholds * (1 + 2**-23)], dim=1)
    rows = [
        torch.nn.functional.pad(scaled, (0, 32 - scaled.shape[1])).flatten(),
        torch.zeros(4096),
        torch.randn(4096, generator=generator) * 1e-40,
        torch.randn(4096, generator=generator).where(torch.arange(4096) % 32 != 5, 1e30),
        torch.cat(near).repeat(100)[:4096].where(torch.arange(4096) % 32 != 7, 1.0),
        torch.randn(4096, generator=generator) * 1e-3,
    ]
    return torch.cat(rows)


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    return got.dtype is want.dtype and torch.equal(
        got.cpu().view(torch.uint8), want.cpu().view(torch.uint8)
    )
