"""Arguments of `lora_linear` for these tests: small, odd sizes, every option by name."""

import torch

from lora_kernels.backends.cpu import native

BACKENDS = ["eager"] if native.module is None else ["eager", "cpu"]
M, K, N, R = 6, 7, 5, 3  # no powers of two
OPTIONS = {
    "plain": (),
    "bias": ("bias",),
    "gate": ("rank_gate",),
    "column_scale": ("column_scale",),
    "dropout": ("dropout_p",),
    "adapter_only": ("weight",),
    "all": ("bias", "rank_gate", "column_scale", "dropout_p"),
}
DIFFERENTIABLE = ("x", "lora_A", "lora_B", "bias", "rank_gate", "column_scale")


def make_case(option="all", dtype=torch.float64, x_shape=(M, K), seed=0):
    """All arguments by name; `option` is a key of OPTIONS."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    wanted = OPTIONS[option]
    return {
        "x": randn(*x_shape),
        "weight": None if "weight" in wanted else randn(N, K),
        "lora_A": randn(R, K),
        "lora_B": randn(N, R),
        "scaling": 1.5,
        "bias": randn(N) if "bias" in wanted else None,
        "rank_gate": randn(R) if "rank_gate" in wanted else None,
        "column_scale": randn(N) if "column_scale" in wanted else None,
        "dropout_p": 0.25 if "dropout_p" in wanted else 0.0,
        "rng": torch.tensor([3, 4]) if "dropout_p" in wanted else None,
    }


def require_grad(case, names=DIFFERENTIABLE):
    """Turn gradients on for the named arguments that the case has; returns them by name."""
    return {n: case[n].requires_grad_() for n in names if case[n] is not None}
