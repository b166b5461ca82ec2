"""A copy of the package with the real setup.py and cpuid.cpp, and kernels small enough to compile
in a second: what is tested here is the build, not what it builds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BINDINGS = """
#include <Python.h>
#include "cpu/cpuid.h"

using namespace lora_kernels;

static PyObject* isa_of_words(PyObject*, PyObject* args) {
  CpuFeatures f;
  unsigned long long xcr0;
  if (!PyArg_ParseTuple(args, "IIIIK", &f.leaf1_ecx, &f.leaf7_ebx, &f.leaf7_edx,
                        &f.leaf7_1_eax, &xcr0)) {
    return nullptr;
  }
  f.xcr0 = xcr0;
  return PyLong_FromLong(static_cast<long>(isa_of(f)));
}

static PyObject* detected(PyObject*, PyObject*) {
  return PyLong_FromLong(static_cast<long>(detect_isa()));
}

static PyObject* built(PyObject*, PyObject* isa) {
  return PyBool_FromLong(isa_built(static_cast<Isa>(PyLong_AsLong(isa))));
}

static PyMethodDef methods[] = {{"isa_of", isa_of_words, METH_VARARGS, nullptr},
                                {"detect_isa", detected, METH_NOARGS, nullptr},
                                {"isa_built", built, METH_O, nullptr},
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__native() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddStringConstant(module, "version", LORA_KERNELS_VERSION);
  return module;
}
"""


class Project:
    """Runs setup.py in a copy of the package."""

    def __init__(self, root: Path) -> None:
        self.root = root / "a space"  # paths are quoted
        self.root.mkdir()
        root = self.root
        for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE"):
            shutil.copy(ROOT / name, root)
        package = root / "lora_kernels"
        package.mkdir()
        for name in ("__init__.py", "version.py", "py.typed"):
            shutil.copy(ROOT / "lora_kernels" / name, package)
        (root / "README.md").write_text("# lora_kernels\n")
        self.csrc = root / "csrc"
        (self.csrc / "cpu").mkdir(parents=True)
        for name in ("cpuid.h", "cpuid.cpp"):
            shutil.copy(ROOT / "csrc" / "cpu" / name, self.csrc / "cpu")
        (self.csrc / "bindings.cpp").write_text(BINDINGS)
        (self.csrc / "direct.cpp").write_text("int direct_marker = 1;\n")
        isas = ("scalar", "avx2", "avx512", "avx512bf16", "amxbf16")
        kernels = (f"kernels_{isa}" for isa in isas)
        for unit in ("codes", "dispatch", "fingerprint", "layer", "threads", *kernels):
            (self.csrc / "cpu" / f"{unit}.cpp").write_text(f"int {unit}_marker = 1;\n")

        (self.csrc / "cuda").mkdir()
        for unit in ("bindings.cpp", "decode.cu", "gemm.cu", "thin.cu"):
            (self.csrc / "cuda" / unit).write_text("int marker = 1;\n")

    def setup(self, *arguments: str, status: int = 0, **environment: str | None) -> str:
        """Run setup.py with these arguments, which has to exit so; stdout and stderr together.

        The environment has no LORA_KERNELS_* or CXX but the ones given, and nothing of a `make -j`
        around the tests, whose jobs ninja would count and report. None leaves a variable out.
        """
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("LORA_KERNELS_")}
        for name in ("CXX", "MAKEFLAGS", "MFLAGS"):
            inherited.pop(name, None)
        inherited["LORA_KERNELS_CUDA"] = "0"
        done = subprocess.run(
            [sys.executable, "setup.py", *arguments],
            cwd=self.root,
            env={k: v for k, v in (inherited | environment).items() if v is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def extensions(self) -> list[Path]:
        """Every extension, and every part of one, outside the objects' folder."""
        objects = self.root / "build"
        found = [p for p in self.root.rglob("_native*") if not p.is_relative_to(objects)]
        return found + [p for p in objects.glob("lib*/**/_native*")]

    def object_file(self, name: str) -> Path:
        (path,) = self.root.glob(f"build/temp.*/native/{name}")
        return path


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture(scope="session")
def built_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One that is built in place; tests only look at it."""
    project = Project(tmp_path_factory.mktemp("built"))
    project.setup("build_ext", "--inplace", LORA_KERNELS_NATIVE="1")
    return project
