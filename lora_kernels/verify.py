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
from typing import Any, NamedTuple

import torch
from torch import nn

from .backends import triton
from .backends.cpu import heuristics as cpu_heuristics
from .backends.cpu import linear as cpu
from .backends.cpu import native
from .bench import baselines, functions, models
from .bench.functions import Function
from .choice import choose as selection
from .core import device as devices
from .oracle import case as cases
from .oracle import diagnosis
from .oracle.case import AnyCase, Case, Expected, dtype_name
from .oracle.diagnosis import Diagnosis
from .oracle.experts_case import ExpertsCase
from .oracle.head_case import HeadCase
from .oracle.multi_case import MultiCase
from .oracle.tolerance import Comparison
from .quantization import QuantizedWeight
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

RANK = 16  # of --shapes

# The options whose operands a function of `--function` may take.
OPERANDS = {"bias": "bias", "gate": "rank_gate", "column scale": "column_scale"}

LEGEND = """\
A line is the output, y or a gradient, that uses most of its tolerance: its rms and largest error
against the float64 reference, those of plain PyTorch ("eager"), and the limits. u is the unit
roundoff of the output's dtype."""

NOTE_BF16 = (
    "note: Triton's interpreter (TRITON_INTERPRET=1) multiplies the bits of bfloat16 operands of "
    "tl.dot, not\n    their values. If the function has such operands, float32, float16 or a GPU "
    "decides."
)

Line = tuple[dict[str, Any], str]  # a row of --json, and as text
Check = Callable[[], Line | None]


class Judged(NamedTuple):
    """The verdicts of a case, and a function that diagnoses the named outputs of those."""

    case: AnyCase
    verdicts: dict[str, Comparison]
    diagnose: Callable[[list[str]], dict[str, Diagnosis]]
    suffix: str = ""

    @property
    def name(self) -> str:
        return f"{self.case}{self.suffix}"

    @property
    def missed(self) -> list[str]:
        return [name for name, verdict in self.verdicts.items() if not verdict.ok]

    @property
    def used_allowance(self) -> float:
        return max(map(_used_allowance, self.verdicts.values()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare what every kernel that runs on this machine computes, results and gradients, with "
        "the float64 reference; exit status 1 where one misses the tolerance."
    )
    parser.add_argument("--thorough", action="store_true", help="more and larger shapes")
    text = "these rows of x, in-features and out-features instead, such as 64x4096x4096; with "
    text += "--function without its long sums, else without adapters, experts and head"
    parser.add_argument(
        "--shapes", nargs="+", type=models.sizes("MxKxN"), metavar="MxKxN", help=text
    )
    text = f"of --shapes (default: {RANK})"
    parser.add_argument("--ranks", nargs="+", type=models.positive, metavar="R", help=text)
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
    """Return 0 if every output is within the tolerance, else 1; 2 if nothing could be checked."""
    names = [*cases.engines(), *cases.gpu_engines()]
    names = [name for name in names if name.startswith(args.engines or "")]
    why = _unstartable_reason(args, names)
    if why is not None:
        print(f"lora-kernels verify: {why}", file=sys.stderr)
        return 2
    checks: list[Check]
    is_named = bool(args.shapes)
    shapes = _named_shapes(args) if is_named else THOROUGH if args.thorough else SHAPES
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
        checks = [
            partial(judge_function, function, device, shapes, *one, is_named=is_named)
            for one in each
        ]
    elif args.peer:
        head = "rms errors of whole layers in unit roundoffs: ours, the peer's, the limit for ours"
        pairs = itertools.product(dict.fromkeys(args.peer), peer_cases())
        checks = [partial(compare_with_peer, peer, case) for peer, case in pairs]
    else:
        head = table
        # Engines follow each other, so that a reference is computed once.
        engines = itertools.product(DTYPES, OPTIONS, names)
        checks = [partial(judge_option, shapes, *one, is_named=is_named) for one in engines]
    rows, begun = [], time.perf_counter()
    if not args.json:
        print(f"{len(checks)} checks\n{head}", flush=True)
    for row, line in filter(None, (check() for check in checks)):
        rows.append(row)
        if not args.json:
            print(line, flush=True)
    checked = [row for row in rows if row["ok"] is not None]
    missed = sum(not row["ok"] for row in checked)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        seconds = f"{time.perf_counter() - begun:.0f} s"
        left_out = sum(len(row.get("left_out", ())) for row in rows)
        words = f", {left_out} left out" if left_out else ""
        print(f"{len(checked) - missed} of {len(checked)} within the tolerance{words}, {seconds}")
    if not checked:
        print("lora-kernels verify: nothing was checked", file=sys.stderr)
        return 2
    return 1 if missed else 0


def _named_shapes(args: argparse.Namespace) -> Shapes:
    """Return M, N, K, R of --shapes and --ranks."""
    ranks = args.ranks or (RANK,)
    return tuple((M, N, K, R) for (M, K, N), R in itertools.product(args.shapes, ranks))


def _unstartable_reason(args: argparse.Namespace, names: list[str]) -> str | None:
    """Return why the run cannot start, or None."""
    for peer in args.peer or ():
        libraries, _ = PEERS[peer]
        command = " ".join([devices.install_command("peft"), *libraries[1:]])
        if lacking := [name for name in libraries if find_spec(name) is None]:
            return f"--peer {peer} needs {' and '.join(lacking)}: {command}"
    given_options = {
        "--engines": args.engines,
        "--thorough": args.thorough,
        "--shapes": args.shapes,
        "--ranks": args.ranks,
    }
    for option, given in given_options.items():
        if args.peer and given:
            return (
                "--peer has shapes of its own and takes the engine that a layer chooses, want no "
                f"{option}"
            )
    for given, option in ((args.engines, "--engines"), (args.peer, "--peer")):
        if args.function and given:
            return f"--function checks that function alone, want no {option}"
    if args.shapes and args.thorough:
        return "--shapes: want no --thorough beside it, which names other shapes"
    if args.ranks and not args.shapes:
        return "--ranks: want --shapes beside it, whose ranks they are"
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
    function: Function,
    device: str,
    shapes: Shapes,
    dtypes: Dtypes,
    option: str,
    *,
    is_named: bool = False,
) -> Line:
    """Judge y and the gradients of a function on the option's cases.

    is_named: whether the user named the shapes; if not, long sums are judged too.
    """

    def call(**arguments: Any) -> torch.Tensor:
        return function(**arguments)

    judged: list[Judged] = []
    has_long = option == "plain" and not is_named
    try:
        for M, N, K, R in (*shapes, *LONG) if has_long else shapes:
            case = Case(M, N, K, R, *dtypes, **OPTIONS[option], device=device)
            verdicts = cases.judge(case, call)
            judged.append(Judged(case, verdicts, partial(diagnosis.diagnose, case, call=call)))
        return _line(function.name, dtypes, option, judged, _note(dtypes))
    except Exception as error:  # whatever the function raises, in its backward too
        said = functions.one_line(error)
        names = dtype_name(dtypes[0]), dtype_name(dtypes[1] or dtypes[0])
        row: dict[str, Any] = {"engine": function.name, "dtype": names[0]}
        row |= {"adapter_dtype": names[1], "option": option, "ok": False}
        row |= {"worst": str(case), "verdict": said}
        head = f"{function.name:34} {names[0]:9} {names[1]:9} {option:13} ✗ {said}"
        return row, f"{head}\n    {cases.in_words(case)}"


def _note(dtypes: Dtypes) -> str:
    """Return what stands under a miss of a function in Triton's interpreter."""
    return NOTE_BF16 if triton.is_interpreted() and torch.bfloat16 in dtypes else ""


def judge_option(
    shapes: Shapes, dtypes: Dtypes, option: str, name: str, *, is_named: bool = False
) -> Line | None:
    """Judge each output of the option's cases; None if the engine supports none.

    is_named: whether the user named the shapes. They are taken as they are, and those that the
        engine cannot run are named in the line.
    """
    fields, device = OPTIONS[option], "cpu"
    judged: list[Judged] = []
    if (others := OTHERS.get(option.partition(" ")[0])) is not None:
        for other in () if is_named or name.startswith(GPU_ENGINES) else others:
            case = replace(other, dtype=dtypes[0], adapter_dtype=dtypes[1], **fields)
            judged.append(_judge_case(case, name))
        return _line(name, dtypes, option, judged) if judged else None
    if name.startswith(LINEAR_ONLY):
        if option == "dropout":
            return None
        fields = fields | {"dropout_p": 0.0}
    if name.startswith(GPU_ENGINES):
        device = cases.triton_device() if name.startswith("triton ") else "cuda"
    left_out: dict[str, str] = {}
    for M, N, K, R in shapes if is_named else _default_shapes(shapes, name, fields):
        case = Case(M, N, K, R, *dtypes, **fields, device=device)
        if reason := cases.unsupported_reason(name, case):
            left_out[f"{M}x{K}x{N} rank {R}"] = reason
            continue
        judged += [
            _judge_case(case, forced, forced != name) for forced in _forced_engines(name, case)
        ]
    if not is_named:
        return _line(name, dtypes, option, judged) if judged else None
    if not judged and _supports_nothing(dtypes, fields, name):
        return None
    return _line(name, dtypes, option, judged, left_out=left_out)


def _supports_nothing(dtypes: Dtypes, fields: dict[str, Any], name: str) -> bool:
    """Return True if an engine supports no default shape of an option either."""
    shapes = _default_shapes(SHAPES, name, fields)
    found = (Case(M, N, K, R, *dtypes, **fields) for M, N, K, R in shapes)
    return all(cases.unsupported_reason(name, case) for case in found)


def _default_shapes(shapes: Shapes, name: str, fields: dict[str, Any]) -> Shapes:
    """Return shapes that an engine and an option take, in place of some of the given ones."""
    if name.startswith("cuda "):
        shapes = *CUDA_SHAPES, *shapes[2:]
    elif "quant" in fields:
        shapes = shapes[0], FEW_ROWS, *shapes[2:]
    if fields.get("quant", "").startswith(E2M1_TYPES):  # rows of whole blocks
        shapes = tuple((M, N, K // 32 * 32, R) for M, N, K, R in shapes)
    return shapes


def _judge_case(case: AnyCase, name: str, is_few: bool = False) -> Judged:
    """Judge a case by an engine, with DoRA's norm where the engine has one."""
    with cases.engine(name):
        verdicts = cases.judge(case)
        if isinstance(case, cases.Case) and _has_norm(case, name):
            verdicts |= cases.judge_norm(case)

    def diagnose(names: list[str]) -> dict[str, Diagnosis]:
        with cases.engine(name):
            return diagnosis.diagnose(case, names)

    return Judged(case, verdicts, diagnose, ", few rows" if is_few else "")


def _has_norm(case: Case, name: str) -> bool:
    is_plain = case.base and not case.dropout_p and not case.column_scale
    return is_plain and not name.startswith(LINEAR_ONLY)


def _line(
    name: str,
    dtypes: Dtypes,
    option: str,
    judged: list[Judged],
    note: str = "",
    left_out: dict[str, str] | None = None,
) -> Line:
    """Return the row and the line of an engine and an option, and what is under it.

    judged: none if the engine can run no named shape.
    left_out: why the engine cannot run a shape.
    """
    row: dict[str, Any] = {
        "engine": name,
        "dtype": dtype_name(dtypes[0]),
        "adapter_dtype": dtype_name(dtypes[1] or dtypes[0]),
        "option": option,
        "ok": all(not each.missed for each in judged) if judged else None,
    }
    text = f"{name:34} {row['dtype']:9} {row['adapter_dtype']:9} {option:13} "
    if judged:
        verdicts = {f"{each.name}/{n}": v for each in judged for n, v in each.verdicts.items()}
        where, worst = max(verdicts.items(), key=lambda item: _used_allowance(item[1]))
        row |= {"worst": where, "verdict": str(worst)}
        text += f"{'✓' if row['ok'] else '✗'} {where.rpartition('/')[2]} {worst}"
    else:
        text += "– not checked"
    lines = [text]
    if row["ok"] is False:
        missed = [each for each in judged if each.missed]
        shown = [_miss(each) for each in _shown(missed)]
        names = [each["case"] for each in shown]
        others = [each.name for each in missed if each.name not in names]
        row |= {"misses": shown, "other_misses": others, "note": note or None}
        lines += [line for each in shown for line in _miss_in_words(each)]
        if others:
            lines.append(
                f"    {len(others)} more of its {len(judged)} cases miss, in no other output"
            )
        lines += [f"    {note}"] if note else []
    if left_out:
        row["left_out"] = left_out
        lines += [f"    left out: {shape}: {reason}" for shape, reason in left_out.items()]
    return row, "\n".join(lines)


def _shown(missed: list[Judged]) -> list[Judged]:
    """Return the worst case, and for outputs that it does not miss the worst that does."""
    shown: list[Judged] = []
    seen: set[str] = set()
    for each in sorted(missed, key=lambda each: each.used_allowance, reverse=True):
        if not seen.issuperset(each.missed):
            shown.append(each)
            seen.update(each.missed)
    return shown


def _miss(judged: Judged) -> dict[str, Any]:
    """Return the facts of a case that misses, diagnosed, for --json."""
    case, found = judged.case, judged.diagnose(judged.missed)
    facts: dict[str, Any] = {"case": judged.name, "in_words": cases.in_words(case) + judged.suffix}
    if isinstance(case, cases.Case):
        sizes = {name: getattr(case, name) for name in "MKNR"}
        options = f"--shapes {case.M}x{case.K}x{case.N} --ranks {case.R}"
        facts |= {**sizes, "operands": cases.operand_names(case), "options": options}
    facts["outputs"] = {
        name: {
            "ok": verdict.ok,
            **asdict(verdict),
            "cause": found[name].cause if name in found else None,
            "largest": found[name].largest if name in found else None,
        }
        for name, verdict in judged.verdicts.items()
    }
    return facts


def _miss_in_words(facts: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a case that misses: its outputs, each with its relative rms error."""
    options = f" ({facts['options']})" if "options" in facts else ""
    yield f"    {facts['in_words']}{options}"
    for name, output in facts["outputs"].items():
        names = ("rms", "eager_rms", "rms_limit", "max", "max_limit")
        rms, eager, limit, largest, max_limit = (output[each] for each in names)
        line = f"      {'✓' if output['ok'] else '✗'} {name:5} {diagnosis.in_words(rms):>8}"
        line += f"  eager {diagnosis.in_words(eager)}, limit {diagnosis.in_words(limit)}"
        if rms <= limit and not output["ok"]:
            line += f"; largest error {largest:.3g}, limit {max_limit:.3g}"
        yield line
        if output["cause"] or output["largest"]:
            yield f"          {output['cause'] or 'largest error at ' + output['largest']}"


def _forced_engines(name: str, case: Case) -> list[str]:
    """Return the engine, and its GEMV kernel if the case has few rows."""
    compute = case.compute or case.compute_dtype
    few = 0
    if name in native.ISAS:
        few = cpu_heuristics.few_rows(compute, bool(case.quant), case.N * case.K, isa=name)
    strategy = cpu.GEMV_QUANTIZED if case.quant else cpu.GEMV
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
        args["weight"] = QuantizedWeight.from_bitsandbytes(layers["theirs"].base_layer.weight)
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
