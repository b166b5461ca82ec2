"""`import lora_kernels` needs torch and nothing else."""

import importlib.machinery
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_kernels.backends import cuda, import_extension
from lora_kernels.backends.cpu import native


def new_packages(code: str, before: str = "") -> set[str]:
    """The packages outside the standard library that `code` imports, after `before` has run."""
    script = f"""
import sys
{before}
before = set(sys.modules)
{code}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*(new - set(sys.stdlib_module_names)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_import_adds_nothing_to_torch_but_the_package() -> None:
    assert new_packages("import lora_kernels", before="import torch") == {"lora_kernels"}


def test_import_leaves_optional_libraries_alone() -> None:
    """Not even torch's own imports count: what it might load on our account would be seen here."""
    packages = new_packages("import lora_kernels")
    assert not {"triton", "peft", "transformers", "safetensors", "rich"} & packages


def test_import_leaves_what_a_gpu_needs_until_it_is_requested() -> None:
    code = """
import sys, lora_kernels
late = {"lora_kernels.qualification", "lora_kernels.backends.triton.configs"}
assert not late & set(sys.modules)
assert {*lora_kernels.__all__} <= {*dir(lora_kernels)}
assert lora_kernels.qualify.__module__ == "lora_kernels.qualification"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_extension_of_another_checkout_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editable install of another checkout finds its own for a name that is missing here."""
    (tmp_path / "_emulator2.py").write_text("raise AssertionError")

    class Editable:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            return importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)])

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable])
    found = cuda._load.__wrapped__("_emulator2")
    assert found == (None, "the CUDA kernels were not built")
    if native.module is not None:
        assert import_extension("_native") is native.module
