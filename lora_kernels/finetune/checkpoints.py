"""Find the newest checkpoint that can be read; write files and folders atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError, safe_open

from .errors import UsageError

STATE = "trainer_state.json"  # the last file of a checkpoint that Trainer writes


def newest_checkpoint(out: str | Path) -> Path | None:
    """Return the newest checkpoint in a run's folder, or None."""
    return max(checkpoints(Path(out)), key=steps_done, default=None)


def checkpoints(out: Path) -> list[Path]:
    return [path for path in out.glob("checkpoint-*") if path.name[11:].isdigit()]


def steps_done(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_intact(out: str | Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest checkpoint that can be read, or None, and the damage of each newer one."""
    damaged: dict[Path, str] = {}
    for checkpoint in sorted(checkpoints(Path(out)), key=steps_done, reverse=True):
        reason = damage_reason(checkpoint)
        if reason is None:
            return checkpoint, damaged
        damaged[checkpoint] = reason
    return None, damaged


def damage_reason(checkpoint: Path) -> str | None:
    """Return why the checkpoint cannot be read; None if it can."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or "global_step" not in state:
            return "trainer_state.json names no step"
        # PEFT's file, in a subfolder unless the adapter is named "default", or FSDP's shards.
        held = [*checkpoint.rglob("adapter_model.*"), *checkpoint.glob("pytorch_model*")]
        if not held:
            return "it holds no adapter_model.safetensors"
        # Trainer would silently start a fresh optimizer, schedule or random generator. DeepSpeed
        # has the first two in a folder of its own.
        # A run may go on with another number of processes.
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        needed = [f"rng_state_{i}.pth" for i in range(processes)]
        states = {file.name for file in checkpoint.glob("rng_state*.pth")}
        if processes == 1 or "rng_state.pth" in states:
            needed = [] if states else ["rng_state.pth"]
        if not any(checkpoint.glob("global_step*")):
            needed += ["scheduler.pt"]
            if not any(checkpoint.glob("optimizer*")):
                return "it holds no optimizer.pt"
        if missing := [name for name in needed if not (checkpoint / name).is_file()]:
            return f"it holds no {count_more(missing)}"
        for file in held:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as tensors:
                    tensors.keys()
        for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
            with ZipFile(file) as saved:  # torch.save writes zip files, which have checksums
                if saved.testzip() is not None:
                    return f"{file.name} does not match its checksum"
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, BadZipFile) as error:
        return first_line(error)
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if there is none.

    A line that ends with a colon, as torch's on a state dict, announces the next one.

    >>> first_line(RuntimeError("Error(s) in loading:\\n\\tsize mismatch for w\\n\\tfor v"))
    'Error(s) in loading: size mismatch for w'
    """
    line, _, rest = str(error).strip().partition("\n")
    if line.endswith(":"):
        line = f"{line} {rest.strip().partition(chr(10))[0]}".strip()
    return line or type(error).__name__


@contextmanager
def translate_errors(message: str, *errors: type[Exception]) -> Iterator[None]:
    """Raise UsageError that starts with `message` in place of these errors (default: any)."""
    kinds = errors or (Exception,)
    try:
        yield
    except (UsageError, ModuleNotFoundError):
        raise
    except kinds as error:
        raise UsageError(f"{message}: {first_line(error)}") from error


def count_more(found: list[Any]) -> str:
    """Return the first element of a list and the number of others: "a and 2 more"."""
    return f"{found[0]} and {len(found) - 1} more" if len(found) > 1 else str(found[0])


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the file system that holds the folder, or is to hold it."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def check_free(
    folder: Path, wanted: int, what: str, remedy: str = "or give another folder"
) -> None:
    """Raise UsageError if there is no room in the folder for so many bytes of `what`."""
    if (free := free_bytes(folder)) < wanted:
        has = f"{folder} has {free:,} bytes free, want {wanted:,} for {what}"
        raise UsageError(f"out: {has}; make room, {remedy}")


@contextmanager
def named_write(target: Path) -> Iterator[None]:
    """Raise OSError that names `target` for the errors of the libraries on a full disk."""
    try:
        yield
    except Exception as error:
        reason = first_line(error)
        # torch's zip writer does not pass on the system's reason.
        if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):
            reason = f"torch.save failed with {free_bytes(target) / 1e6:.1f} MB free"
        # tokenizers raises a bare Exception: "No space left on device (os error 28)".
        elif not isinstance(error, OSError | SafetensorError) and "(os error " not in reason:
            raise
        raise OSError(f"out: {target} cannot be written: {reason}") from error


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` at the end, or removed on an error."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with named_write(folder):
            yield partial
        if folder.exists():
            folder.rmdir()  # fails unless the folder is empty
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_file(file: Path, text: str) -> None:
    """Write the file atomically."""
    partial = file.with_name(f".{file.name}.partial")
    with named_write(file):
        partial.write_text(text)
        partial.replace(file)


def write_json(file: Path, value: Any) -> None:
    replace_file(file, json.dumps(value, indent=1))
