"""The pictures of README.md and RESULTS.md, as the bytes of PNG files.

The same JSON and the same matplotlib give the same bytes. Each file names in its text chunk SOURCE
the digest of the JSON it was drawn from, which `source` reads without matplotlib. Names are told
apart by their markers, not by colour alone.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import struct
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from lora_kernels.bench import roofline as least
from lora_kernels.bench.results import limits
from lora_kernels.bench.roofline import Sizes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Row = dict[str, Any]
Look = tuple[str, str, str, dict[str, Any]]  # legend, marker, colour, and how it is filled

SOURCE = "Source"  # one of PNG's own keywords
STYLE = {
    "figure.dpi": 200,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # which comes with matplotlib
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
FILLED, HOLLOW = {"mew": 1.0}, {"mfc": "white", "mew": 1.2}
# Name in the JSON -> its look; dark ones are ours.
TAX: dict[str, Look] = {
    "ours": ("ours", "o", "black", FILLED),
    "ours, fp32 adapters": ("ours, fp32 A B", "o", "black", HOLLOW),
    "addmm": ("in-place addmm_", "^", "#0072b2", FILLED),
    "torch.compile": ("torch.compile", "D", "#56b4e9", FILLED),
    "eager": ("eager", "s", "#e69f00", HOLLOW),
    "peft": ("PEFT (fp32 A B)", "X", "#d55e00", FILLED),
}
BYTES = {
    "ours": TAX["ours"],
    "peft": TAX["peft"],
    "unsloth": ("Unsloth's order", "v", "#009e73", HOLLOW),
    "axolotl": ("axolotl's order", "s", "#cc79a7", HOLLOW),
}
LAYERS = {
    "ours": ("ours, dense", "o", "black", FILLED),
    "frozen": ("frozen linear", "+", "#0072b2", {"mew": 1.4}),
    "peft": ("PEFT, dense", "X", "#d55e00", HOLLOW),
}
CODES = {
    "ours": ("ours, NF4", "s", "black", FILLED),
    "bitsandbytes, eval": ("bitsandbytes eval, NF4", "s", "#009e73", HOLLOW),
    "bitsandbytes, train": ("bitsandbytes train, NF4", "v", "#cc79a7", HOLLOW),
}


def digest(*runs: Row) -> str:
    """Hash the runs that a picture is drawn from."""
    return hashlib.sha256(json.dumps(runs, sort_keys=True).encode()).hexdigest()


def source(png: bytes) -> str | None:
    """Return the digest stored in a picture; None if there is none or it is no PNG."""
    offset, key = 8, SOURCE.encode() + b"\0"
    while png.startswith(b"\x89PNG\r\n\x1a\n") and offset + 12 <= len(png):
        length, kind = struct.unpack(">I4s", png[offset : offset + 8])
        text = png[offset + 8 : offset + 8 + length]
        if kind == b"tEXt" and text.startswith(key):
            return text.removeprefix(key).decode("latin-1")
        offset += 12 + length
    return None


def lora_tax(data: Row, caption: str, named: str) -> bytes:
    """Time of a step over the frozen linear's, for each layer of the results and each candidate.

    caption: date and machine; named: the `digest` of the JSON.
    """
    steps = [row for row in data["rows"] if row["mode"] == "step"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in steps))
    shapes = list(dict.fromkeys((row["M"], row["K"], row["N"], row["R"]) for row in steps))
    place = {shape: len(shapes) - 1 - i for i, shape in enumerate(shapes)}
    present = {name for row in steps for name in row["tax"]}

    def draw(figure: Figure) -> None:
        all_axes = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
        for axes, dtype in zip(all_axes, dtypes, strict=True):
            axes.set_title(f"{dtype} x and W")
            axes.axvline(1.0, color="black", lw=0.8)
            axes.grid(axis="both", color="0.88", lw=0.5)
            for row in (row for row in steps if row["dtype"] == dtype):
                y = place[row["M"], row["K"], row["N"], row["R"]]
                axes.plot(row["floor"], y, "|", color="0.45", ms=11, mew=1.5)
                for name, (_, marker, color, fill) in reversed(TAX.items()):
                    if name in row["tax"]:
                        axes.plot(row["tax"][name], y, marker, color=color, ms=5.5, **fill)
                    elif name in row["misses"]:
                        side = axes.get_yaxis_transform()
                        axes.text(1.0, y, f" ✗ {name}", transform=side, va="center", fontsize=7)
            axes.set_xlabel("times the frozen linear alone (less is better)")
        labels = [f"{m}×{k}×{n}  r={r}" for m, k, n, r in place]
        all_axes[0].set_yticks(list(place.values()), labels)
        _legend(
            figure,
            [("floor (arithmetic)", "|", "0.45", {"mew": 1.5})]
            + [look for name, look in TAX.items() if name in present],
        )
        _title(figure, "LoRA tax: time of a training step with the adapter", caption)

    return _png(draw, named, height=1.9 + 0.27 * len(shapes))


def overview(
    times: dict[str, dict[str, float]],
    machines: dict[str, str],
    moved: dict[str, dict[str, float]],
    named: str,
) -> bytes:
    """Times on CPUs, and bytes counted on a GPU, both of training steps and beside PEFT's.

    Args:
        times: layer -> name in `machines`, or "peft" -> our time over PEFT's on that machine.
        machines: name -> legend.
        moved: step -> candidate of BYTES -> its bytes over PEFT's.
    """
    marks = itertools.product("oD^", (FILLED, HOLLOW))
    ours = {
        name: (f"ours, {label}", marker, "black", fill)
        for (name, label), (marker, fill) in zip(machines.items(), marks, strict=False)
    }
    fp32, bf16 = (("peft", (f"PEFT, {t} A B", *TAX["peft"][1:])) for t in ("fp32", "bf16"))

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.set_title("CPU, training step, measured", fontsize=9)
        left.set_xlabel("time over PEFT's (less is better)", fontsize=8)
        right.set_title("GPU, training step, counted", fontsize=9)
        right.set_xlabel("bytes over PEFT's (less is better)", fontsize=8)
        shown = (left, times, ours | dict([fp32])), (right, moved, BYTES | dict([bf16]))
        for axes, rows, looks in shown:
            axes.axvline(1.0, color="black", lw=0.8)
            axes.grid(axis="both", color="0.88", lw=0.5)
            axes.set_yticks(range(len(rows)), list(rows))
            axes.invert_yaxis()
            axes.set_xlim(0.0, 1.1)
            for y, row in enumerate(rows.values()):
                for name, (_, marker, color, fill) in reversed(looks.items()):
                    if name in row:
                        axes.plot(row[name], y, marker, color=color, ms=5.5, **fill)
            axes.legend(
                handles=_handles(looks.values()),
                loc="upper center",
                bbox_to_anchor=(0.4, -0.2),
                ncols=2,
                fontsize=8,
                columnspacing=1.0,
                handletextpad=0.1,
            )

    return _png(draw, named, height=3.6)


def roofline(layers: Row, codes: Row | None, caption: str, named: str) -> bytes:
    """Operations a second over operations a byte, below what memory and the processor allow.

    Bytes are those that must move, each operand once a direction (`roofline.moved`), so that to
    move one twice shows as a point further down. layers: dense layers' forwards and steps; codes:
    4-bit layers', cold.
    """
    here = limits(layers["provenance"])
    assert here is not None

    def draw(figure: Figure) -> None:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in here.peaks]
        all_axes = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
        for axes, dtype in zip(all_axes, dtypes, strict=True):
            peak, bandwidth = here.peaks[getattr(torch, dtype)], here.bandwidth
            ridge = peak / bandwidth
            roof = [bandwidth * x / 1e9 for x in (0.4, ridge)]
            axes.plot([0.4, ridge, 4000], [*roof, roof[1]], "k-", lw=1)
            axes.text(0.45, peak / 1e9, f"peak\n{peak / 1e9:.0f} GFLOP/s", va="center", fontsize=7)
            memory = f"memory {bandwidth / 1e9:.0f} GB/s"
            axes.text(0.6, 0.45 * bandwidth / 1e9, memory, va="top", fontsize=7)
            for data, looks in ((layers, LAYERS), (codes, CODES)):
                for name, x, y in _points(data, dtype) if data else ():
                    if name in looks:
                        _, marker, color, fill = looks[name]
                        axes.plot(x, y / 1e9, marker, color=color, ms=5, **fill)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"{dtype} x")
            axes.grid(which="major", color="0.88", lw=0.5)
            axes.set_xlabel("operations a byte that must move")
        all_axes[0].set_ylabel("GFLOP/s (more is better)")
        looks = [*LAYERS.values(), *(CODES.values() if codes else ())]
        _legend(figure, looks)
        _title(figure, "Roofline: what layers reach of what the machine allows", caption)

    return _png(draw, named, height=4.9)


def _points(data: Row, dtype: str) -> Iterator[tuple[str, float, float]]:
    """Name, operations a byte, operations a second."""
    for row in data["rows"]:
        four_bit = "quant_type" in row
        shown = ("decoding", "step") if four_bit else ("forward", "step")
        if row["dtype"] != dtype or row["mode"] not in shown:
            continue
        if four_bit and row["cache"] != "cold":
            continue
        torch_dtype = getattr(torch, dtype)
        for name, times in row["seconds"].items():
            R = 0 if name == "frozen" else row["R"]
            adapter_itemsize = 4 if name == "peft" else torch_dtype.itemsize
            sizes = Sizes(row["M"], row["N"], row["K"], R, torch_dtype, adapter_itemsize, four_bit)
            step = row["mode"] == "step"
            work = least.flops(sizes, step)
            yield name, work / least.moved(sizes, step), work / times["p50"]


def _handles(looks: Iterable[Look]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], marker=marker, color=color, ls="", ms=6, label=label, **fill)
        for label, marker, color, fill in looks
    ]


def _legend(figure: Figure, looks: Iterable[Look]) -> None:
    handles = _handles(looks)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4))


def _title(figure: Figure, text: str, caption: str) -> None:
    figure.suptitle("\n".join([text, *textwrap.wrap(caption, 125)]), fontsize=8)


def _png(draw: Any, named: str, height: float) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = Figure(figsize=(8.3, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        out = io.BytesIO()
        # Software would name matplotlib's version.
        figure.savefig(out, format="png", metadata={SOURCE: named, "Software": None})
    return out.getvalue()
