"""How large the tensors are that a call makes."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAKES = ("empty", "zeros", "full", "new_", "mm", "_to_copy")


class Allocations(TorchDispatchMode):
    """Notes how many elements each new tensor has, but for meta tensors, which have no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(part in str(func) for part in MAKES) and not out.is_meta:
            self.sizes.append(out.numel())
        return out


class Casts(TorchDispatchMode):
    """Notes how many elements each cast to another dtype has; see `Results` about our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy" and out.dtype is not args[0].dtype:
            self.sizes.append(out.numel())
        return out


class Results(TorchDispatchMode):
    """Notes the tensors that operations return, views aside: elements, and bytes of their storage.

    Inside an op of this package a mode sees nothing: implementations are to be called directly.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and not func.is_view:
                self.sizes.append(t.numel())
                self.bytes.append(t.untyped_storage().nbytes())
        return out
