"""Helpers of several packages of tests, and the shift of all seeds that tests set."""

import os

# Added to every seed, so that models and inputs are other draws; see CONTRIBUTING's "Numbers".
# Imported here, so that processes that a test starts draw alike.
SEED_SHIFT = int(os.environ.get("LORA_KERNELS_TEST_SEED", "0"))

if SEED_SHIFT:
    import torch

    _set_seed = torch.manual_seed

    class _Generator(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(seed + SEED_SHIFT)

    torch.manual_seed = lambda seed: _set_seed(seed + SEED_SHIFT)
    torch.Generator = _Generator  # type: ignore[misc]
