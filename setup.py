"""Compile csrc/ into lora_kernels with ninja, and without torch.

_native: the CPU kernels. One translation unit an instruction set, each with flags of its own, so
that no instruction of a newer set leaks into code that runs everywhere. Which units exist is told
to all of them by -DLORA_KERNELS_HAVE_<ISA>=1. Its bindings use the limited C API alone, where a
call takes a quarter of pybind11's time: one file serves all Pythons from 3.10 on.
_cuda: the CUDA kernels, where a GPU and nvcc are found (nvcc by CUDA_HOME, CUDA_PATH, PATH or in
/usr/local/cuda), for that GPU. cudart is inside, so that it loads on a machine without a driver.
pybind11 binds it, for the Python that builds it.
_emulator: the same kernels compiled for the host, for tests.
Everything else about the package is in pyproject.toml.

Environment:
    CXX                      the C++20 compiler (else the first of c++, g++, clang++ on PATH)
    LORA_KERNELS_NATIVE      0: build no extension. 1: an extension that does not build is an error.
                             Unset: it is a warning, and the package is pure Python.
    LORA_KERNELS_CUDA        the same for the CUDA kernels. Unset, they are built where nvcc and a
                             GPU are, or TORCH_CUDA_ARCH_LIST, or LORA_KERNELS_PORTABLE=1
    LORA_KERNELS_EMULATOR    1: build the emulator of the CUDA kernels too
    TORCH_CUDA_ARCH_LIST     for which GPUs, as torch reads it ("8.0;9.0+PTX"). Unset, for those of
                             this machine; without any, and for a portable wheel, for those of
                             CUDA_ARCHS that nvcc knows, and PTX of the last
    LORA_KERNELS_WERROR      1: compiler warnings are errors
    LORA_KERNELS_PORTABLE    1: a wheel for any Linux with glibc 2.28 or newer; with CUDA kernels
                             that are built on glibc 2.34 or newer, for those. That its extensions
                             need more is an error
    LORA_KERNELS_SANITIZE    1: AddressSanitizer and UndefinedBehaviorSanitizer
    LORA_KERNELS_OPTIMIZE    the compiler's -O level (3); 1 compiles in half of the time
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

PACKAGE = "lora_kernels"
ROOT = Path(__file__).resolve().parent

BASELINE = [
    "bindings.cpp",
    "direct.cpp",
    "cpu/codes.cpp",
    "cpu/cpuid.cpp",
    "cpu/dispatch.cpp",
    "cpu/fingerprint.cpp",
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
CXXFLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
WARNINGS = ["-Wall", "-Wextra"]
OPTIMIZE = [f"-O{os.environ.get('LORA_KERNELS_OPTIMIZE', '3')}", "-g0"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE_COMPILE = [*SANITIZE, "-fno-omit-frame-pointer", "-O1", "-g"]
# The most that libraries in a wheel for manylinux_2_28 and 2_34 may need: PEP 600, and auditwheel's
# table.
PORTABLE = {
    28: {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)},
    34: {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)},
}
PORTABLE_LIBRARIES = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1"}
# The static cudart needs these too, or, where it is linked on glibc 2.34 or newer, 2.34's libc. It
# opens the driver, libcuda, where there is one.
CUDA_LIBRARIES = PORTABLE_LIBRARIES | {"libdl.so.2", "libpthread.so.0", "librt.so.1"}
CUDA_LIBRARIES |= {"libcuda.so.1"}
LIBC = tuple(int(part) for part in platform.libc_ver()[1].split(".") if part.isdigit())
CUDA_GLIBC = 34 if LIBC >= (2, 34) else 28
LINK = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]

CUDA_BINDINGS = "cuda/bindings.cpp"
CUDA_SOURCES = [
    "cuda/decode.cu",
    "cuda/gemm.cu",
    "cuda/thin.cu",
]
# An image runs on its major version from its minor one on; one for a single GPU ("9.0a") on no
# other, and no kernel needs what only those have. +PTX: newer GPUs compile it at the first launch.
CUDA_ARCHS = ["8.0", "8.6", "8.9", "9.0", "10.0+PTX", "12.0+PTX"]
NVCCFLAGS = ["-std=c++20", "-O3", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# A sanitizer watches what the kernels do through the emulator; its checks make it slow without -O2.
EMULATOR = ["-x", "c++", "-O2", "-DLORA_KERNELS_EMULATED=1", "-Wno-unknown-pragmas"]

# A free-threaded Python has no limited API yet: there all extensions are for that Python alone.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
LIMITED_API = [] if FREE_THREADED else ["-DPy_LIMITED_API=0x030A0000"]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
LIMITED_SUFFIX = SUFFIX if FREE_THREADED else ".abi3.so"

CUDA_NOTE = "the CUDA kernels are built too, in minutes; LORA_KERNELS_CUDA=0 leaves them out"
LOG_SECONDS = 10  # between two lines of progress where these are not rewritten


def enabled(name: str) -> bool:
    return os.environ.get(name) == "1"


IS_PORTABLE = enabled("LORA_KERNELS_PORTABLE")


def say(text: bytes) -> None:
    """Write bytes, a compiler's among them, to where its own would go."""
    sys.stdout.flush()
    os.write(1, text)


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
    """Return whether the compiler knows these flags; an older one may lack the newest set."""
    probe = [*cxx, "-std=c++20", *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(probe, capture_output=True).returncode == 0


def check_portable(library: Path, glibc: int, libraries: set[str]) -> None:
    """RuntimeError if the library needs more of the system than PORTABLE[glibc], or others.

    The names of the needed libraries and symbol versions are in the dynamic string table.
    """
    most = PORTABLE[glibc]
    names = re.findall(rb"\0([\w.+-]+)(?=\0)", library.read_bytes())
    for name in sorted({name.decode() for name in names}):
        family, _, version = name.partition("_")
        numbers = tuple(int(part) for part in version.split(".") if part.isdigit())
        if numbers > most.get(family, numbers):
            newest = ".".join(map(str, most[family]))
            raise RuntimeError(f"{library.name} needs {name}, want {family}_{newest} or older")
        if re.fullmatch(r"lib[\w+-]+\.so(\.\d+)*", name) and name not in libraries:
            raise RuntimeError(f"{library.name} needs {name}, want the C and C++ libraries alone")


def isa_units(cxx: list[str]) -> dict[str, list[str]]:
    """Instruction set -> its unit's flags; empty where only the scalar unit is built."""
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.maxsize < 2**32:
        return {}
    return {isa: flags for isa, flags in X86_64.items() if accepts(cxx, flags)}


def find_nvcc() -> str | None:
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))
    names = [*(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, names)), None)


def asked_archs() -> list[str]:
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()


def machine_archs() -> list[str]:
    """Return the compute capabilities of this machine's GPUs, such as "9.0", in rising order.

    Those that are older than the kernels need are left out.
    """
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = set(re.findall(r"^\d+\.\d+$", listed.stdout, re.MULTILINE))
    able = [name for name in found if float(name) >= float(CUDA_ARCHS[0])]
    return sorted(able, key=float) if listed.returncode == 0 else []


def cuda_archs(nvcc: str) -> list[str]:
    """Return nvcc's flags for the requested GPUs; RuntimeError if it knows none of them."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    known = {line.strip().removeprefix("sm_") for line in listed.splitlines()}
    asked = asked_archs()
    # An nvcc that does not know a GPU of this machine makes PTX for it.
    machine = [] if IS_PORTABLE else machine_archs()
    is_known = bool(machine) and all(name.replace(".", "") in known for name in machine)
    wanted = asked or (machine if is_known else CUDA_ARCHS)
    images: dict[str, bool] = {}  # and whether PTX beside
    for name in wanted:
        number = name.removesuffix("+PTX").replace(".", "")
        # A list of nvcc's may leave out what is for one GPU alone ("90a").
        if number not in known and number.rstrip("af") not in known:
            if asked:
                raise RuntimeError(f"TORCH_CUDA_ARCH_LIST: {nvcc} does not know {name!r}")
            continue
        images[number] = name.endswith("+PTX")
    if not images:
        raise RuntimeError(f"{nvcc} knows none of {', '.join(wanted)}")
    if wanted is CUDA_ARCHS:
        images[next(reversed(images))] = True
    flags = []
    for number, ptx in images.items():
        codes = f"sm_{number},compute_{number}" if ptx else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code=[{codes}]"]
    return flags


class Ninja:
    """build_dir/build.ninja; its paths are relative to ROOT, so that a copy of the tree is as
    incremental as the tree."""

    def __init__(self, build_dir: Path, version: str) -> None:
        try:
            from ninja import ninja_syntax
        except ImportError as error:
            raise RuntimeError("ninja is not installed: pip install ninja") from error
        self.build_dir = build_dir
        build_dir.mkdir(parents=True, exist_ok=True)
        self.file = build_dir / "build.ninja"
        self.stream = self.file.open("w")
        self.writer = ninja_syntax.Writer(self.stream)
        self.writer.variable("builddir", ninja_syntax.escape(str(build_dir)))
        self.define = [f'-DLORA_KERNELS_VERSION="{version}"', "-Icsrc"]
        # System headers: their warnings are not ours to mend.
        self.include = ["-isystem", sysconfig.get_path("include")]

    def objects(
        self, name: str, units: list[tuple[str, list[str]]], compile: list[str]
    ) -> list[str]:
        """The objects of these sources, each with its flags."""
        command = shlex.join([*compile, *self.define, *self.include]).replace("$", "$$")
        self.writer.rule(
            f"compile{name}",
            f"{command} $isa -MD -MF $out.d -c $in -o $out",
            description="compile $in",
            depfile="$out.d",
            deps="gcc",
        )
        found: list[str] = []
        for source, flags in units:
            found += self.writer.build(
                str(self.build_dir / Path(source).with_suffix(".o")),
                f"compile{name}",
                f"csrc/{source}",
                variables={"isa": shlex.join(flags)},
            )
        return found

    def link(self, name: str, objects: list[str], link: list[str]) -> Path:
        """The library of these objects; where it will lie."""
        shared = self.build_dir / f"{name}.so"
        self.writer.rule(f"link{name}", f"{shlex.join(link)} $in -o $out", description="link $out")
        self.writer.build(str(shared), f"link{name}", objects)
        return shared

    def run(self, what: str, compiler: str) -> None:
        """Compile and link what is out of date. One line says how many steps are left: rewritten on
        a terminal, else printed again every LOG_SECONDS."""
        self.stream.close()
        command = [sys.executable, "-m", "ninja", "-f", str(self.file)]
        environment = os.environ | {"NINJA_STATUS": "step %f of %t: "}
        out, err = subprocess.PIPE, subprocess.STDOUT
        terminal, steps, start = os.isatty(1), 0, time.monotonic()
        clear, shown = b"\r\x1b[K" if terminal else b"", start - LOG_SECONDS
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err) as ninja:
            assert ninja.stdout is not None
            for line in ninja.stdout:
                if done := re.match(rb"step (\d+) of (\d+): ", line):
                    steps = int(done[2])
                    if terminal or time.monotonic() - shown >= LOG_SECONDS:
                        shown, left = time.monotonic(), steps - int(done[1])
                        progress = f"Compiling {what}: {left} of {steps} steps left"
                        say(clear + progress.encode() + (b"" if terminal else b"\n"))
                elif line != b"ninja: no work to do.\n":  # a compiler's message
                    say(clear + line)
        if ninja.returncode != 0:
            raise RuntimeError(f"{compiler} failed; its messages are above")
        if steps:
            seconds = time.monotonic() - start
            say(clear + f"Compiled {what}: {steps} steps in {seconds:.0f} s\n".encode())


def native(ninja: Ninja, cxx: list[str]) -> Path:
    isas = isa_units(cxx)
    units: list[tuple[str, list[str]]] = [(source, []) for source in BASELINE]
    units += [(f"cpu/kernels_{isa}.cpp", flags) for isa, flags in isas.items()]
    have = [f"-DLORA_KERNELS_HAVE_{isa.upper()}={int(isa in isas)}" for isa in X86_64]
    optimize = SANITIZE_COMPILE if enabled("LORA_KERNELS_SANITIZE") else OPTIMIZE
    objects = ninja.objects("_native", units, host(cxx, [*optimize, *have, *LIMITED_API]))
    return ninja.link("_native", objects, host_link(cxx))


def emulator(ninja: Ninja, cxx: list[str]) -> Path:
    sources = [CUDA_BINDINGS, *CUDA_SOURCES, "emulator/runtime.cpp"]
    optimize = SANITIZE_COMPILE if enabled("LORA_KERNELS_SANITIZE") else ["-g1"]
    units: list[tuple[str, list[str]]] = [(source, []) for source in sources]
    objects = ninja.objects("_emulator", units, host(cxx, [*optimize, *EMULATOR, *pybind11()]))
    return ninja.link("_emulator", objects, host_link(cxx))


def cuda(ninja: Ninja, cxx: list[str], nvcc: str) -> Path:
    # It makes host code with the first compiler on PATH unless told; CXX may carry a launcher.
    common = [nvcc, "-ccbin", cxx[-1], *NVCCFLAGS]
    objects = ninja.objects(
        "_cuda", [(source, []) for source in CUDA_SOURCES], [*common, *cuda_archs(nvcc)]
    )
    bindings = host(cxx, ["-O2", "-g0", *pybind11()])
    objects += ninja.objects("_cuda_bindings", [(CUDA_BINDINGS, [])], bindings)
    return ninja.link("_cuda", objects, [*common, "-shared", *(["-Xlinker=-s"] * IS_PORTABLE)])


def pybind11() -> list[str]:
    try:
        from pybind11 import get_include
    except ImportError as error:
        raise RuntimeError("pybind11 is not installed: pip install pybind11") from error
    return ["-isystem", get_include()]


def host(cxx: list[str], flags: list[str]) -> list[str]:
    werror = ["-Werror"] if enabled("LORA_KERNELS_WERROR") else []
    return [*cxx, *CXXFLAGS, *WARNINGS, *werror, *flags]


def host_link(cxx: list[str]) -> list[str]:
    more = SANITIZE if enabled("LORA_KERNELS_SANITIZE") else []
    return [*cxx, *LINK, *more, *(["-s"] if IS_PORTABLE else [])]


class NativeBuild(build_ext):
    def run(self) -> None:
        self.build("_native", native)
        self.build("_emulator", emulator)
        self.build("_cuda", cuda)

    def build(self, name: str, rules: Callable[..., Path]) -> None:
        package = Path(self.get_ext_fullpath(f"{PACKAGE}.{name}")).parent
        target = package / f"{name}{LIMITED_SUFFIX if name in LIMITED else SUFFIX}"
        for other in package.glob(f"{name}.*.so"):  # for one Python, and imported first
            if other != target:
                other.unlink()
        if not any(extension.name == f"{PACKAGE}.{name}" for extension in self.extensions):
            target.unlink(missing_ok=True)
            return
        # Sanitized objects stand apart, so that neither build undoes the other.
        kind = ("sanitize" if enabled("LORA_KERNELS_SANITIZE") else "") + name
        kind += "portable" * IS_PORTABLE
        try:
            if sys.platform == "win32":
                raise RuntimeError("the native kernels are built on Linux and macOS only")
            cxx, arguments = find_compiler(), []
            if name == "_cuda":
                nvcc = find_nvcc()
                if nvcc is None:
                    raise RuntimeError("nvcc was not found: set CUDA_HOME, or PATH")
                arguments = [nvcc]
                if not target.exists() and "LORA_KERNELS_CUDA" not in os.environ:
                    say(f"{nvcc} was found: {CUDA_NOTE}\n".encode())
            build_dir = Path(self.build_temp) / kind.removeprefix("_")
            ninja = Ninja(build_dir, self.distribution.get_version())
            library = rules(ninja, cxx, *arguments)
            ninja.run(WHAT[name], shlex.join(arguments or cxx))
            if IS_PORTABLE and name == "_native":
                check_portable(library, 28, PORTABLE_LIBRARIES)
            elif IS_PORTABLE:
                check_portable(library, CUDA_GLIBC, CUDA_LIBRARIES)
        except RuntimeError as error:
            # An older extension beside newer Python is worse than none.
            target.unlink(missing_ok=True)
            if IS_PORTABLE or enabled(SWITCHES[name]):
                switch = "LORA_KERNELS_PORTABLE" if IS_PORTABLE else SWITCHES[name]
                raise CompileError(f"{switch}=1, but {error}") from error
            self.warn(
                f"{WHAT[name]} are left out: {error}\n"
                "The package works without them, slower; `lora-kernels info` says how to add them."
            )
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".part{os.getpid()}")
        shutil.copyfile(library, part)
        part.replace(target)  # a process that has the old one mapped keeps it whole


LIMITED = {"_native"}  # use the limited C API alone
SWITCHES = {
    "_native": "LORA_KERNELS_NATIVE",
    "_emulator": "LORA_KERNELS_EMULATOR",
    "_cuda": "LORA_KERNELS_CUDA",
}
WHAT = {
    "_native": "the native CPU kernels",
    "_emulator": "the emulated CUDA kernels",
    "_cuda": "the CUDA kernels",
}


def wanted() -> list[str]:
    """Name the extensions to build: the CPU's unless switched off, the GPU's where they can run."""
    names = ["_native"] if IS_PORTABLE or os.environ.get("LORA_KERNELS_NATIVE") != "0" else []
    if enabled("LORA_KERNELS_EMULATOR") and not IS_PORTABLE:
        names.append("_emulator")
    switch = os.environ.get("LORA_KERNELS_CUDA")
    if switch is None and find_nvcc() and (IS_PORTABLE or asked_archs() or machine_archs()):
        switch = "1"
    if switch == "1":
        names.append("_cuda")
    return names


def wheel_options() -> dict[str, str]:
    """One wheel for all Pythons if it has no CUDA kernels; a portable one is tagged for the glibc
    that it needs."""
    if FREE_THREADED:
        return {}
    is_limited = LIMITED.issuperset(wanted())
    options = {"py_limited_api": "cp310"} if is_limited else {}
    if IS_PORTABLE:
        glibc = 28 if is_limited else CUDA_GLIBC
        options["plat_name"] = f"manylinux_2_{glibc}_{platform.machine()}"
    return options


setup(
    ext_modules=[
        Extension(
            f"{PACKAGE}.{name}",
            sources=[],
            optional=True,
            py_limited_api=name in LIMITED and not FREE_THREADED,
        )
        for name in wanted()
    ],
    cmdclass={"build_ext": NativeBuild},
    options={"bdist_wheel": wheel_options()},
)
