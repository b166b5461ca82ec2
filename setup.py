"""Compile csrc/ into lora_kernels/_native with ninja and pybind11, and without torch.

One translation unit an instruction set, each with flags of its own, so that no instruction of a
newer set leaks into code that runs everywhere. Which units exist is told to all of them by
-DLORA_KERNELS_HAVE_<ISA>=1. Everything else about the package is in pyproject.toml.

Environment:
    CXX                      the C++17 compiler (else the first of c++, g++, clang++ on PATH)
    LORA_KERNELS_NATIVE      0: build no extension. 1: an extension that does not build is an error.
                             Unset: it is a warning, and the package is pure Python.
    LORA_KERNELS_WERROR      1: compiler warnings are errors
    LORA_KERNELS_SANITIZE    1: AddressSanitizer and UndefinedBehaviorSanitizer
    LORA_KERNELS_OPTIMIZE    the compiler's -O level (3); 1 compiles in a third of the time
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = "lora_kernels._native"
ROOT = Path(__file__).resolve().parent

BASELINE = [
    "bindings.cpp",
    "cpu/cpuid.cpp",
    "cpu/dispatch.cpp",
    "cpu/layer.cpp",
    "cpu/threads.cpp",
    "cpu/kernels_scalar.cpp",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
X86_64 = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512bf16": AVX512BF16,
    "amxbf16": [*AVX512BF16, "-mamx-tile", "-mamx-bf16"],
}

# Contraction is off: a multiply-add that the compiler fuses rounds once where the source says two.
CXXFLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
WARNINGS = ["-Wall", "-Wextra"]
OPTIMIZE = [f"-O{os.environ.get('LORA_KERNELS_OPTIMIZE', '3')}", "-g0"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE_COMPILE = [*SANITIZE, "-fno-omit-frame-pointer", "-O1", "-g"]
LINK = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]


def enabled(name: str) -> bool:
    return os.environ.get(name) == "1"


def find_compiler() -> list[str]:
    """The compiler's command; CXX may carry a launcher or flags ("ccache g++ -m64")."""
    if command := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(command[0]):
            return command
        raise RuntimeError(f"CXX={os.environ['CXX']!r} is no program")
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("no C++ compiler: none of c++, g++, clang++ is on PATH and CXX is not set")


def accepts(cxx: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows these flags; an older one may lack the newest instruction set."""
    probe = [*cxx, "-std=c++17", *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(probe, capture_output=True).returncode == 0


def isa_units(cxx: list[str]) -> dict[str, list[str]]:
    """Instruction set -> its unit's flags; empty where only the scalar unit is built."""
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.maxsize < 2**32:
        return {}
    return {isa: flags for isa, flags in X86_64.items() if accepts(cxx, flags)}


def write_ninja_file(build_dir: Path, cxx: list[str], version: str) -> None:
    """build_dir/build.ninja; its paths are relative to ROOT, so that a copy of the tree is as
    incremental as the tree."""
    import pybind11
    from ninja import ninja_syntax

    isas = isa_units(cxx)
    common = [
        *(SANITIZE_COMPILE if enabled("LORA_KERNELS_SANITIZE") else OPTIMIZE),
        *CXXFLAGS,
        *WARNINGS,
        *(["-Werror"] if enabled("LORA_KERNELS_WERROR") else []),
        f'-DLORA_KERNELS_VERSION="{version}"',
        *(f"-DLORA_KERNELS_HAVE_{isa.upper()}={int(isa in isas)}" for isa in X86_64),
        "-Icsrc",
        # System headers: their warnings are not ours to mend.
        *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")),
    ]
    link = [*LINK, *(SANITIZE if enabled("LORA_KERNELS_SANITIZE") else [])]
    units: list[tuple[str, list[str]]] = [(source, []) for source in BASELINE]
    units += [(f"cpu/kernels_{isa}.cpp", flags) for isa, flags in isas.items()]

    with (build_dir / "build.ninja").open("w") as stream:
        ninja = ninja_syntax.Writer(stream)
        ninja.variable("builddir", ninja_syntax.escape(str(build_dir)))
        ninja.variable("cxx", ninja_syntax.escape(shlex.join(cxx)))
        ninja.variable("common", ninja_syntax.escape(shlex.join(common)))
        ninja.variable("link", ninja_syntax.escape(shlex.join(link)))
        ninja.rule(
            "compile",
            "$cxx $common $isa -MD -MF $out.d -c $in -o $out",
            description="compile $in",
            depfile="$out.d",
            deps="gcc",
        )
        ninja.rule("link", "$cxx $in $link -o $out", description="link $out")
        objects = []
        for source, flags in units:
            objects += ninja.build(
                str(build_dir / Path(source).with_suffix(".o")),
                "compile",
                f"csrc/{source}",
                variables={"isa": shlex.join(flags)},
            )
        ninja.build(str(build_dir / "_native.so"), "link", objects)


def compile_native(build_dir: Path, version: str) -> Path:
    """Bring build_dir/_native.so up to date; RuntimeError says why where that cannot be."""
    if sys.platform == "win32":
        raise RuntimeError("the native kernels are built on Linux and macOS only")
    cxx = find_compiler()
    build_dir.mkdir(parents=True, exist_ok=True)
    try:
        write_ninja_file(build_dir, cxx, version)
    except ImportError as error:
        raise RuntimeError(f"{error.name} is not installed: pip install pybind11 ninja") from error
    ninja = [sys.executable, "-m", "ninja", "-f", str(build_dir / "build.ninja")]
    if subprocess.run(ninja, cwd=ROOT).returncode != 0:
        raise RuntimeError(f"{shlex.join(cxx)} failed; its messages are above")
    return build_dir / "_native.so"


class NativeBuild(build_ext):
    def run(self) -> None:
        target = Path(self.get_ext_fullpath(NATIVE))
        if not self.extensions:  # LORA_KERNELS_NATIVE=0
            target.unlink(missing_ok=True)
            return
        # Sanitized objects stand apart, so that neither build undoes the other.
        name = "sanitize" if enabled("LORA_KERNELS_SANITIZE") else "native"
        build_dir = Path(self.build_temp) / name
        try:
            library = compile_native(build_dir, self.distribution.get_version())
        except RuntimeError as error:
            # An older extension beside newer Python is worse than none.
            target.unlink(missing_ok=True)
            if enabled("LORA_KERNELS_NATIVE"):
                raise CompileError(f"LORA_KERNELS_NATIVE=1, but {error}") from error
            self.warn(
                f"the native CPU kernels are left out: {error}\n"
                "The package works without them, slower on CPUs; `lora-kernels info` says how to "
                "add them."
            )
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".part{os.getpid()}")
        shutil.copyfile(library, part)
        part.replace(target)  # a process that has the old one mapped keeps it whole


setup(
    ext_modules=(
        []
        if os.environ.get("LORA_KERNELS_NATIVE") == "0"
        else [Extension(NATIVE, sources=[], optional=True)]
    ),
    cmdclass={"build_ext": NativeBuild},
)
