"""How large the tensors are that a call makes."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

MAKES = ("empty", "zeros", "full", "new_", "mm", "_to_copy")


class Allocations(TorchDispatchMode):
    """Notes how many elements each new tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(part in str(func) for part in MAKES):
            self.sizes.append(out.numel())
        return out
