"""`lora-kernels verify --peer`: whole layers, a peer's own beside ours with the same adapter.

PEFT's stock layer, over `nn.Linear` or over bitsandbytes' `Linear4bit` (NF4, nested), and the same
layer after `lora_kernels.peft.fuse`: y, dx, dA and dB of each against the float64 oracle. Ours must
be within the tolerance; the peer's error stands beside it. In training mode without dropout, as the
peers draw masks of their own; float32 adapters, as PEFT has them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .. import selection
from ..quantization import Weight4bit
from . import case as cases
from . import tolerance
from .case import Case
from .tolerance import Verdict

# Peer -> the libraries that the comparison imports, and how to install them.
PEERS = {
    "peft": (("peft",), "pip install 'lora-kernels[peft]'"),
    "bitsandbytes": (("peft", "bitsandbytes"), "pip install 'lora-kernels[peft]' bitsandbytes"),
}
QUANTIZED = {"peft": False, "bitsandbytes": True}
# M, N, K, R: N and K multiples of 64, as bitsandbytes' CPU kernels are wrong where a block
# straddles rows; M·R at least tolerance.POOL, so that one seed is enough.
SHAPES = ((70, 192, 128, 13), (7, 128, 192, 40))
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Compared:
    """One shape, dtype and choice of bias: the verdict on each output of ours and of the peer's."""

    peer: str
    case: Case
    ours: dict[str, Verdict]
    theirs: dict[str, Verdict]
    reason: str | None  # why the layer was not fused, and so is the peer's own

    @property
    def ok(self) -> bool:
        return self.reason is None and all(verdict.ok for verdict in self.ours.values())


def missing(peer: str) -> str | None:
    """What to install before the peer can be compared with, as a sentence; None: it is there."""
    libraries, command = PEERS[peer]
    lacking = [name for name in libraries if find_spec(name) is None]
    return f"--peer {peer} needs {' and '.join(lacking)}: {command}" if lacking else None


def cases_of() -> Iterator[Case]:
    """Each shape in float32 and bfloat16, with and without bias."""
    for dtype, bias, shape in itertools.product(DTYPES, (False, True), SHAPES):
        yield Case(*shape, dtype, torch.float32, bias=bias, frozen=("bias",))


def compare(peer: str, case: Case) -> Compared:
    """Both layers on one case of `cases_of`; the reference decodes what the peer has quantized."""
    from ..peft import explain, fuse
    from ..peft.linear import Fused

    args = cases.inputs(case)
    theirs = stock(args, QUANTIZED[peer])
    if QUANTIZED[peer]:
        args["weight"] = Weight4bit.from_bitsandbytes(theirs.get_base_layer().weight)
    model: Any = fuse(nn.Sequential(copy.deepcopy(theirs)))
    reason = None if isinstance(model[0], Fused) else explain(model).rows[0].reason
    with selection.backend("eager"):  # not by the kernels that are judged
        ref, eager = cases.oracle(args), cases.run(cases.plain_pytorch, args)
    u, lengths = cases.unit_roundoffs(case), cases.sums(case)
    results = {"ours": outputs(model[0], args), "theirs": outputs(theirs, args)}
    verdicts = {
        who: {
            name: tolerance.compare(got[name], ref[name], eager[name], u[name], lengths[name])
            for name in ref
        }
        for who, got in results.items()
    }
    return Compared(peer, case, **verdicts, reason=reason)


def stock(args: dict[str, Any], quantized: bool) -> Any:
    """PEFT's own layer in training mode, with these numbers; the base quantized by the peer."""
    from peft import LoraConfig, inject_adapter_in_model

    (R, K), N = args["lora_A"].shape, len(args["weight"])
    base = nn.Linear(K, N, args["bias"] is not None, dtype=args["weight"].dtype)
    base.weight.data = args["weight"]
    if args["bias"] is not None:
        base.bias.data = args["bias"].detach().clone()
    model: Any = nn.ModuleDict({"base": _quantized(base) if quantized else base})
    model.requires_grad_(False)
    model.is_loaded_in_4bit = quantized  # as transformers says it
    config = LoraConfig(r=R, lora_alpha=1, target_modules=["base"])
    layer: Any = inject_adapter_in_model(config, model)["base"]  # type: ignore[index]
    layer.scaling["default"] = args["scaling"]
    for held, name in ((layer.lora_A, "lora_A"), (layer.lora_B, "lora_B")):
        held["default"].weight = nn.Parameter(args[name].detach().clone())
    return layer.train()


def _quantized(linear: nn.Linear) -> nn.Module:
    import bitsandbytes

    bnb: Any = bitsandbytes.nn
    N, K = linear.weight.shape
    has_bias, dtype = linear.bias is not None, linear.weight.dtype
    base = bnb.Linear4bit(K, N, bias=has_bias, compute_dtype=dtype, quant_type="nf4")
    base.weight = bnb.Params4bit(
        linear.weight.detach(), requires_grad=False, quant_type="nf4", module=base
    )
    base.bias = linear.bias
    return base.to("cpu")  # type: ignore[no-any-return]  # which quantizes


def outputs(layer: Any, args: dict[str, Any]) -> dict[str, Tensor]:
    """y and the gradients of x, A and B, by name."""
    x = args["x"].detach().clone().requires_grad_()
    y = layer(x)
    leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    grads = torch.autograd.grad(y, leaves, args["dy"])
    return {"y": y.detach(), **dict(zip(("dx", "dA", "dB"), grads, strict=True))}
