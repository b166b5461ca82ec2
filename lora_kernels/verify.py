"""`lora-kernels verify`: every engine that can run here, against the float64 reference.

With --peer whole layers: PEFT's stock layer, over `nn.Linear` or over bitsandbytes' `Linear4bit`
(NF4, nested), and the same layer after `lora_kernels.peft.fuse`: y, dx, dA and dB of each against
the float64 oracle. Ours must be within the tolerance; the peer's error stands beside it. In
training mode without dropout, as the peers draw masks of their own; float32 adapters, as PEFT has
them.

With --function a function of the user's, with its gradients, against the same oracle.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from .backends import triton
from .backends.cpu import heuristics as cpu_heuristics
from .backends.cpu import linear as cpu
from .backends.cpu import native
from .backends.triton import configs
from .bench import baselines, functions
from .bench.functions import Function
from .choice import choose as selection
from .core import device as devices
from .oracle import case as cases
from .oracle.case import Case, Expected, dtype_name
from .oracle.experts_case import ExpertsCase
from .oracle.head_case import HeadCase
from .oracle.multi_case import MultiCase
from .oracle.tolerance import Comparison
from .quantization import Weight4bit
from .quantization.codebooks import E2M1_TYPES

Dtypes = tuple[torch.dtype, torch.dtype | None]  # of x, and of the adapter if it differs
Shapes = tuple[tuple[int, ...], ...]

_f32, _bf16, _f16 = torch.float32, torch.bfloat16, torch.float16
_PLAIN: tuple[Dtypes, ...] = ((_f32, None), (_bf16, None), (_f16, None))
DTYPE_NAMES = [dtype_name(dtype) for dtype, _ in _PLAIN]
DTYPES: tuple[Dtypes, ...] = (*_PLAIN, (_bf16, _f32), (_f16, _f32))
ALL = {"gate": True, "column_scale": True, "bias": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "gate": {"gate": True},
    "column scale": {"column_scale": True},
    "dropout": {"dropout_p": 0.1},
    "everything": {**ALL, "dropout_p": 0.1},
    "adapter only": {"base": False},
    "nf4": {"quant": "nf4-64-nested"},
    "fp4, all": {"quant": "fp4-32", **ALL, "dropout_p": 0.1},
    "mxfp4": {"quant": "mxfp4-32-nested"},
    "nvfp4, all": {"quant": "nvfp4-16-nested", **ALL, "dropout_p": 0.1},
    "adapters": {},  # of OTHERS, as are the rest
    "adapters nf4": {"quant": "nf4-64-nested"},
    "experts": {},
    "experts nf4": {"quant": "nf4-64"},
    "experts nvfp4": {"quant": "nvfp4-16-nested"},
    "head": {},
    "head nf4": {"quant": "nf4-64"},
}
GPU_ENGINES = ("triton ", "cuda ", cases.EAGER_CUDA)  # how their names begin
LINEAR_ONLY = ("triton ", "cuda ")  # engines without dropout and DoRA's norm
SHAPES: Shapes = ((70, 257, 100, 13), (1, 65, 63, 5))  # M, N, K, R: no multiples of a tile
FEW_ROWS = (5, 66, 96, 40)  # in place of the second, for 4-bit weights
CUDA_SHAPES: Shapes = ((70, 264, 192, 13), (5, 72, 64, 40))  # in place of both: whole rows
THOROUGH: Shapes = (*SHAPES, (515, 261, 259, 16), (33, 259, 257, 64), (130, 1536, 576, 100))
# Long sums over K (y and dB), N (dx and dA) and M (dA and dB), for `--function`. A base GEMM that
# is rounded to 16 bits after each 64 of these terms, 64 times, errs by 0.42 u · √(64 / 2) of itself
# (`tolerance`), which is 1.7 u of y; the limit is 1.2 u. In longer sums, float32 sums in blocks of
# 16 would be more than `tolerance.CHAIN`.
LONG: Shapes = ((33, 35, 4099, 9), (33, 4099, 35, 9), (4099, 33, 35, 9))
# First word of an option -> cases of other ops than `lora_linear`, whose tensors are on a CPU: rows
# with adapters of their own, rows sorted by expert, a head's losses and log-probabilities.
OTHERS: dict[str, tuple[Any, ...]] = {
    "adapters": (MultiCase(70, 65, 128, rows="mixed", dropout_p=0.1),),
    "experts": (ExpertsCase((3, 0, 1, 20), 64, 128, 8, dropout_p=0.1),),
    "head": tuple(
        HeadCase(23, 65, 64, 5, of, label_smoothing=0.1, logit_softcap=3.0, chunk_rows=5)
        for of in ("mean", "none", "log_probs")
    ),
}
# Peer -> the libraries that the comparison imports, and the type of its base.
PEERS = {"peft": (("peft",), ""), "bitsandbytes": (("peft", "bitsandbytes"), "nf4")}
# N and K multiples of 64, as bitsandbytes' CPU kernels are wrong where a block straddles rows; M·R
# at least tolerance.POOL, so that one seed is enough.
PEER_SHAPES = ((70, 192, 128, 13), (7, 128, 192, 40))

# The options whose operands a function of `--function` may take.
OPERANDS = {"bias": "bias", "gate": "rank_gate", "column scale": "column_scale"}

LEGEND = """\
A line is the output, y or a gradient, that uses most of its tolerance: its rms and largest error
against the float64 reference, those of plain PyTorch ("eager"), and the limits. u is the unit
roundoff of the output's dtype."""

Line = tuple[dict[str, Any], str]  # a row of --json, and as text
Check = Callable[[], Line | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare what every kernel that runs on this machine computes, results and gradients, with "
        "the float64 reference; exit status 1 where one misses the tolerance."
    )
    parser.add_argument("--thorough", action="store_true", help="more and larger shapes")
    parser.add_argument(
        "--engines", metavar="NAME", help='only those whose name begins so, such as "triton"'
    )
    parser.add_argument(
        "--peer",
        action="append",
        choices=list(PEERS),
        help="compare whole layers instead, the peer's own beside ours with the same adapter, each "
        "with the float64 reference; may be given twice",
    )
    parser.add_argument(
        "--function",
        metavar="MODULE:NAME",
        help="check a function of your own instead, (x, weight, lora_A, lora_B, scaling, bias) -> "
        "y, with its gradients; the current folder is looked in first",
    )
    text = "of the function's x and weight (default: all)"
    parser.add_argument("--dtypes", nargs="+", choices=DTYPE_NAMES, help=text)
    text = "of its lora_A and lora_B (default: that of x)"
    parser.add_argument("--adapter-dtype", choices=DTYPE_NAMES, help=text)
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        help="of the function's tensors (default: a GPU if there is one)",
    )
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")


def run(args: argparse.Namespace) -> int:
    """Return 0 if every output is within the tolerance, else 1; 2 if the run cannot start."""
    names = [*cases.engines(), *cases.gpu_engines()]
    names = [name for name in names if name.startswith(args.engines or "")]
    why = _unstartable_reason(args, names)
    if why is not None:
        print(f"lora-kernels verify: {why}", file=sys.stderr)
        return 2
    checks: list[Check]
    shapes = THOROUGH if args.thorough else SHAPES
    table = f"{LEGEND}\n{'engine':34} {'x':9} {'adapters':9} {'option':13} worst output"
    if args.function:
        head = table
        try:
            function = functions.load(args.function)
        except ValueError as error:
            print(f"lora-kernels verify: --function: {error}", file=sys.stderr)
            return 2
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        adapter = args.adapter_dtype and getattr(torch, args.adapter_dtype)
        dtypes = [(getattr(torch, name), adapter) for name in args.dtypes or DTYPE_NAMES]
        each = itertools.product(dtypes, _options_of(function))
        checks = [partial(judge_function, function, device, shapes, *one) for one in each]
    elif args.peer:
        head = "rms errors of whole layers in unit roundoffs: ours, the peer's, the limit for ours"
        pairs = itertools.product(dict.fromkeys(args.peer), peer_cases())
        checks = [partial(compare_with_peer, peer, case) for peer, case in pairs]
    else:
        head = table
        # Engines follow each other, so that a reference is computed once.
        engines = itertools.product(DTYPES, OPTIONS, names)
        checks = [partial(judge_option, shapes, *one) for one in engines]
    rows, begun = [], time.perf_counter()
    if not args.json:
        print(f"{len(checks)} checks\n{head}", flush=True)
    for row, line in filter(None, (check() for check in checks)):
        rows.append(row)
        if not args.json:
            print(line, flush=True)
    missed = sum(not row["ok"] for row in rows)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        seconds = f"{time.perf_counter() - begun:.0f} s"
        print(f"{len(rows) - missed} of {len(rows)} within the tolerance, {seconds}")
    return 1 if missed else 0


def _unstartable_reason(args: argparse.Namespace, names: list[str]) -> str | None:
    """Return why the run cannot start, or None."""
    for peer in args.peer or ():
        libraries, _ = PEERS[peer]
        command = " ".join([devices.install_command("peft"), *libraries[1:]])
        if lacking := [name for name in libraries if find_spec(name) is None]:
            return f"--peer {peer} needs {' and '.join(lacking)}: {command}"
    for given, option in ((args.engines, "--engines"), (args.thorough, "--thorough")):
        if args.peer and given:
            return (
                "--peer has shapes of its own and takes the engine that a layer chooses, want no "
                f"{option}"
            )
    for given, option in ((args.engines, "--engines"), (args.peer, "--peer")):
        if args.function and given:
            return f"--function checks that function alone, want no {option}"
    for name in ("device", "dtypes", "adapter_dtype"):
        if getattr(args, name) and not args.function:
            return f"--{name.replace('_', '-')}: want --function beside it, of whose tensors it is"
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: no GPU that this torch can use"
    return None if names else f"no engine here begins with {args.engines!r}"


def _options_of(function: Function) -> list[str]:
    """Return the options of the operands that a function takes."""
    names = [option for option, name in OPERANDS.items() if name in function.operands]
    return ["plain", *names]


def judge_function(
    function: Function, device: str, shapes: Shapes, dtypes: Dtypes, option: str
) -> Line:
    """Judge y and the gradients of a function on the option's cases."""
    verdicts: dict[str, Comparison] = {}
    for M, N, K, R in (*shapes, *LONG) if option == "plain" else shapes:
        case = Case(M, N, K, R, *dtypes, **OPTIONS[option], device=device)
        try:
            judged = cases.judge(case, lambda **arguments: function(**arguments))
        except Exception as error:  # whatever the function raises, in its backward too
            said = functions.one_line(error)
            names = dtype_name(dtypes[0]), dtype_name(dtypes[1] or dtypes[0])
            row: dict[str, Any] = {
                "engine": function.name,
                "dtype": names[0],
                "adapter_dtype": names[1],
            }
            row |= {"option": option, "ok": False, "worst": str(case), "verdict": said}
            return row, f"{function.name:34} {names[0]:9} {names[1]:9} {option:13} ✗ {said}"
        verdicts |= {f"{case}/{output}": v for output, v in judged.items()}
    return _line(function.name, dtypes, option, verdicts)


def judge_option(shapes: Shapes, dtypes: Dtypes, option: str, name: str) -> Line | None:
    """Judge each output of the option's cases; None if the engine supports none."""
    fields, device = OPTIONS[option], "cpu"
    verdicts: dict[str, Comparison] = {}
    if (others := OTHERS.get(option.partition(" ")[0])) is not None:
        for other in () if name.startswith(GPU_ENGINES) else others:
            case = replace(other, dtype=dtypes[0], adapter_dtype=dtypes[1], **fields)
            with cases.engine(name):
                verdicts |= {f"{case}/{output}": v for output, v in cases.judge(case).items()}
        return _line(name, dtypes, option, verdicts) if verdicts else None
    if name.startswith(LINEAR_ONLY):
        if option == "dropout":
            return None
        fields = fields | {"dropout_p": 0.0}
    if name.startswith(GPU_ENGINES):
        device = cases.triton_device() if name.startswith("triton ") else "cuda"
    if name.startswith("cuda "):
        shapes = *CUDA_SHAPES, *shapes[2:]
    elif "quant" in fields:
        shapes = shapes[0], FEW_ROWS, *shapes[2:]
    for M, N, K, R in shapes:
        if fields.get("quant", "").startswith(E2M1_TYPES):  # rows of whole blocks
            K = K // 32 * 32
        case = Case(M, N, K, R, *dtypes, **fields, device=device)
        for forced in _forced_engines(name, case):
            with cases.engine(forced):
                judged = cases.judge(case)
                has_norm = case.base and not name.startswith(LINEAR_ONLY)
                if has_norm and not case.dropout_p and not case.column_scale:
                    judged |= cases.judge_norm(case)
            few = ", few rows" if forced != name else ""
            verdicts |= {f"{case}{few}/{output}": v for output, v in judged.items()}
    return _line(name, dtypes, option, verdicts) if verdicts else None


def _line(name: str, dtypes: Dtypes, option: str, verdicts: dict[str, Comparison]) -> Line:
    where, worst = max(verdicts.items(), key=lambda item: _used_allowance(item[1]))
    row = {
        "engine": name,
        "dtype": dtype_name(dtypes[0]),
        "adapter_dtype": dtype_name(dtypes[1] or dtypes[0]),
        "option": option,
        "ok": all(verdict.ok for verdict in verdicts.values()),
        "worst": where,
        "verdict": str(worst),
    }
    head = f"{name:34} {row['dtype']:9} {row['adapter_dtype']:9} {option:13}"
    return row, f"{head} {'✓' if row['ok'] else '✗'} {where.rpartition('/')[2]} {worst}"


def _forced_engines(name: str, case: Case) -> list[str]:
    """Return the engine, and its GEMV kernel if the case has few rows; [] if it supports none."""
    if name == f"triton {triton.FUSED}" and case.R > configs.MAX_RANK:
        return []
    if name.startswith("cuda ") and not cases.fits_cuda(case, name.removeprefix("cuda ")):
        return []
    compute = case.compute or case.compute_dtype
    few = 0
    if name in native.ISAS:
        few = cpu_heuristics.few_rows(compute, bool(case.quant), case.N * case.K, isa=name)
    strategy = cpu.GEMV_4BIT if case.quant else cpu.GEMV
    return [name, f"{name} {strategy}"] if 0 < case.M <= few else [name]


def _used_allowance(verdict: Comparison) -> float:
    """Return the share of its allowance that a verdict uses, inf for NaN and without a limit."""
    pairs = ((verdict.rms, verdict.rms_limit), (verdict.max, verdict.max_limit))
    shares = [
        error / limit if 0 < limit < math.inf else error and math.inf for error, limit in pairs
    ]
    return max(math.inf if share != share else share for share in shares)


def peer_cases() -> Iterator[Case]:
    """Yield each shape in float32 and bfloat16, with and without bias."""
    for dtype, bias, shape in itertools.product((_f32, _bf16), (False, True), PEER_SHAPES):
        yield Case(*shape, dtype, _f32, bias=bias, frozen=("bias",))


def compare_with_peer(peer: str, case: Case) -> Line:
    """Judge both layers on one of `peer_cases`; the reference decodes the peer's 4-bit weight."""
    from .peft import explain, fuse
    from .peft.linear import Fused

    args, quant_type = cases.inputs(case), PEERS[peer][1]
    args |= {name: nn.Parameter(args[name].detach()) for name in ("lora_A", "lora_B")}
    layers = {who: baselines.build_layer(args, quant_type) for who in ("ours", "theirs")}
    if quant_type:
        args["weight"] = Weight4bit.from_bitsandbytes(layers["theirs"].base_layer.weight)
    model: Any = fuse(nn.Sequential(layers["ours"]))
    layers["ours"] = model[0]
    reason = None if isinstance(model[0], Fused) else explain(model).rows[0].reason
    with selection.backend("eager"):  # not by the kernels that are judged
        found = [Expected(args, cases.oracle(args), cases.run(cases.plain_pytorch, args))]
    verdicts = {
        who: cases.comparisons(found, lambda x, layer=layer, **rest: layer(x), case)
        for who, layer in layers.items()
    }
    row: dict[str, Any] = {
        **{"peer": peer, "dtype": dtype_name(case.dtype)},
        **{name: getattr(case, name) for name in ("M", "N", "K", "R", "bias")},
        # A layer that is not fused is the peer's own, so it fails.
        "ok": reason is None and all(verdict.ok for verdict in verdicts["ours"].values()),
        "not_fused": reason,
        **{who: {n: asdict(v) for n, v in each.items()} for who, each in verdicts.items()},
    }
    words = [f"not fused: {reason}"] if reason else []
    for name, ours in verdicts["ours"].items():
        three = (ours.rms, verdicts["theirs"][name].rms, ours.rms_limit)
        rms = [each / ours.unit_roundoff for each in three]
        words.append("{} {:.3g} ({:.3g}, {:.3g})".format(name, *rms))
        words[-1] += "" if ours.ok else f" {ours}"
    shape = f"{case.M}×{case.K}×{case.N} r={case.R}{', bias' if case.bias else ''}"
    mark = "✓" if row["ok"] else "✗"
    return row, f"{peer:13} {row['dtype']:9} {shape:23} {mark} {'  '.join(words)}"
