"""`lora-kernels verify --peer`: whole layers, a peer's own beside ours with the same adapter.

PEFT's stock layer, over `nn.Linear` or over bitsandbytes' `Linear4bit` (NF4, nested), and the same
layer after `lora_kernels.peft.fuse`: y, dx, dA and dB of each against the float64 oracle. Ours must
be within the tolerance; the peer's error stands beside it. In training mode without dropout, as the
peers draw masks of their own; float32 adapters, as PEFT has them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from .. import selection
from ..quantization import Weight4bit
from . import baselines
from . import case as cases
from .case import Case, Expected
from .tolerance import Verdict

# Peer -> the libraries that the comparison imports, and how to install them.
PEERS = {
    "peft": (("peft",), "pip install 'lora-kernels[peft]'"),
    "bitsandbytes": (("peft", "bitsandbytes"), "pip install 'lora-kernels[peft]' bitsandbytes"),
}
QUANT_TYPE = {"peft": "", "bitsandbytes": "nf4"}
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
    args |= {name: nn.Parameter(args[name].detach()) for name in ("lora_A", "lora_B")}
    layers = {who: baselines.layer_of(args, QUANT_TYPE[peer]) for who in ("ours", "theirs")}
    if QUANT_TYPE[peer]:
        args["weight"] = Weight4bit.from_bitsandbytes(layers["theirs"].base_layer.weight)
    model: Any = fuse(nn.Sequential(layers["ours"]))
    layers["ours"] = model[0]
    reason = None if isinstance(model[0], Fused) else explain(model).rows[0].reason
    with selection.backend("eager"):  # not by the kernels that are judged
        found = [Expected(args, cases.oracle(args), cases.run(cases.plain_pytorch, args))]
    u, lengths = cases.unit_roundoffs(case), cases.sums(case)
    verdicts = {
        who: cases.verdicts(found, lambda x, layer=layer, **rest: layer(x), u, lengths)
        for who, layer in layers.items()
    }
    return Compared(peer, case, **verdicts, reason=reason)
