"""`lora-kernels info`: this machine, its backends, why one is missing, and how to add it."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from typing import Any

import torch

from .backends import cuda, triton
from .backends.cpu import native
from .backends.triton import configs
from .choice import verdicts
from .core import device
from .version import __version__

_ON_GPU = "for calls that qualified on the card (see the GPU's line), or that ask for it"
_OPTIONAL = ("triton", "peft", "transformers", "bitsandbytes")


def info() -> dict[str, Any]:
    """Facts for a bug report, of types that JSON knows.

    Keys: `version`, `python`, `platform`; `versions` (distribution -> version or None); `cpu`
    (device.Cpu's fields; `isa`, the instruction set in use, None without the extension;
    `torch_threads`, whether it runs on PyTorch's threads); `compiler`; `gpus` (device.DeviceInfo's
    fields and `qualification`, a sentence, each); `backends` (name -> `available`, `reason`, and
    `add`, how to get it, or None).

    >>> from lora_kernels.info import info
    >>> info()["backends"]["eager"]["available"]
    True
    """
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {
            "torch": torch.__version__,
            **{name: device.version(name) for name in _OPTIONAL},
        },
        "cpu": {**asdict(device.cpu()), "isa": native.isa, "torch_threads": native.threaded},
        "compiler": device.compiler(),
        "gpus": [
            asdict(gpu) | {"qualification": _qualification(index)}
            for index, gpu in enumerate(device.gpus())
        ],
        "backends": {
            "eager": _backend(True, "plain PyTorch, on every torch device"),
            "cpu": _cpu_backend(),
            "triton": _triton_backend(),
            "cuda": _cuda_backend(),
        },
    }


def report(facts: dict[str, Any]) -> str:
    """The dict of `info` as the text that `lora-kernels info` prints."""
    cpu = facts["cpu"]
    cores = f"{cpu['cores']} core{'s' * (cpu['cores'] != 1)}"
    rows = [
        ("python", f"{facts['python']} on {facts['platform']}"),
        *((name, version or "not installed") for name, version in facts["versions"].items()),
        ("processor", f"{cpu['name']} ({cpu['architecture']}), {cores}"),
        ("threads", f"{cpu['threads']}; OpenMP runtime: {cpu['openmp'] or 'unknown'}"),
        ("compiler", facts["compiler"] or "none found"),
    ]
    for index, gpu in enumerate(facts["gpus"]):
        memory, capability = f"{gpu['memory'] / 2**30:.0f} GiB", gpu["capability"] / 10
        shape = f"capability {capability}, {gpu['multiprocessors']} SMs, {memory}"
        rows.append((f"GPU {index}", f"{gpu['name']}, {shape}; {gpu['qualification']}"))
    if not facts["gpus"]:
        rows.append(("GPU", "none that torch can use"))

    lines = [f"lora_kernels {facts['version']}", ""]
    lines += [f"  {name:<13}{value}" for name, value in rows]
    lines += ["", "backends"]
    for name, backend in facts["backends"].items():
        lines.append(f"  {name:<9}{'yes' if backend['available'] else 'no':<4}{backend['reason']}")
        if backend["add"]:
            lines.append(f"{'':<15}to add it: {backend['add']}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say what this machine is, which backends it can run, why not the others, and how to add "
        "them."
    )
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: argparse.Namespace) -> int:
    facts = info()
    print(json.dumps(facts, indent=2) if args.json else report(facts))
    return 0


def _backend(available: bool, reason: str, add: str | None = None) -> dict[str, Any]:
    return {"available": available, "reason": reason, "add": add}


def _qualification(index: int) -> str:
    """Return what is known of our kernels on a GPU, in a sentence."""
    found = verdicts.current(index)
    if isinstance(found, str):
        return found
    total = len(found.passed) + len(found.failed)
    return f"qualified on {found.date[:10]}: {len(found.passed)} of {total} groups of calls pass"


def _cpu_backend() -> dict[str, Any]:
    if native.module is not None:
        threads = "on torch's threads" if native.threaded else "on one thread: torch has no OpenMP"
        return _backend(True, f"{native.isa} kernels, {threads}")
    install = f"LORA_KERNELS_NATIVE=1 {_INSTALL} {device.origin()}"
    if device.compiler() is None:
        install = (
            "install a C++ compiler (apt install g++, dnf install gcc-c++, "
            f"xcode-select --install), then {install}"
        )
    return _backend(False, native.reason or "not built", install)


def _triton_backend() -> dict[str, Any]:
    if (reason := triton.unavailable_reason()) is not None:
        return _backend(False, reason, "pip install --upgrade triton")
    if triton.is_interpreted():
        return _backend(True, "in Triton's interpreter, on the CPU")
    gpus = device.gpus()
    if not gpus:
        return _backend(False, "no GPU; TRITON_INTERPRET=1 runs it in Triton's interpreter")
    reasons = [configs.capability_unsupported_reason(gpu) for gpu in gpus]
    if None not in reasons:
        return _backend(False, reasons[0] or "")
    return _backend(True, _ON_GPU)


def _cuda_backend() -> dict[str, Any]:
    reason = cuda.unavailable_reason()
    if reason is not None and not device.gpus():
        return _backend(False, f"no GPU, and {reason}")
    old = [cuda.unsupported_capability_reason(gpu.capability) for gpu in device.gpus()]
    if old and None not in old:
        return _backend(False, old[0] or "")
    if reason is not None:
        install = f"{_INSTALL} {device.origin()}"
        compiler = "" if device.nvcc() else "install CUDA's nvcc 12 or newer, then "
        return _backend(False, reason, f"{compiler}LORA_KERNELS_CUDA=1 {install}")
    reasons = [cuda.unsupported_device_reason("cuda", index) for index in range(len(device.gpus()))]
    if not reasons:
        return _backend(False, "the kernels are built, and qualified on no GPU: there is none")
    if None not in reasons:
        return _backend(False, reasons[0] or "")
    return _backend(True, _ON_GPU)


# A wheel that was built without the kernels sits in pip's cache and would come back.
_INSTALL = "pip install --force-reinstall --no-deps --no-cache-dir"
