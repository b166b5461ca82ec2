"""setup.py: what it compiles, with which flags, and what it leaves behind where it cannot."""

import json
import os
import platform
import pty
import re
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

from lora_kernels.core import device

from .conftest import ROOT, Project

NO_COMPILER = {"CXX": "/nonexistent/c++", "PATH": ""}
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
X86_64 = platform.machine() in ("x86_64", "AMD64")
AVX2 = {"-mavx2", "-mfma", "-mf16c", "-mbmi2"}
AVX512 = AVX2 | {"-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"}
X86_64_UNITS = {
    "kernels_avx2.cpp": AVX2,
    "kernels_avx512.cpp": AVX512,
    "kernels_avx512bf16.cpp": AVX512 | {"-mavx512bf16"},
    "kernels_amxbf16.cpp": AVX512 | {"-mavx512bf16", "-mamx-tile", "-mamx-bf16"},
}
BASELINE_UNITS = ("bindings", "direct", "codes", "cpuid", "dispatch", "fingerprint", "layer")
BASELINE_UNITS += ("threads", "kernels_scalar")


def machine_flags(project: Project) -> dict[str, set[str]]:
    """Source name -> the -m flags of its compile command."""
    ninja_file = str(project.object_file("build.ninja"))
    database = subprocess.run(
        [sys.executable, "-m", "ninja", "-f", ninja_file, "-t", "compdb", "compile_native"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {
        entry["file"].rpartition("/")[2]: {
            word for word in entry["command"].split() if word.startswith("-m")
        }
        for entry in json.loads(database)
    }


def test_without_a_compiler_the_package_is_pure_python(project: Project) -> None:
    said = project.setup("build", **NO_COMPILER)
    assert "native CPU kernels are left out: CXX='/nonexistent/c++'" in said
    assert project.extensions() == []
    assert list(project.root.glob("build/lib*/lora_kernels/py.typed"))


def test_without_a_compiler_native_1_is_an_error(project: Project) -> None:
    said = project.setup("build", status=1, LORA_KERNELS_NATIVE="1", **NO_COMPILER)
    assert "error: LORA_KERNELS_NATIVE=1, but CXX='/nonexistent/c++'" in said
    assert project.extensions() == []


@pytest.mark.parametrize("command", [["build"], ["build_ext", "--inplace"]])
def test_native_0_builds_nothing_and_says_nothing(project: Project, command: list[str]) -> None:
    if "--inplace" in command:
        for stale in (EXT_SUFFIX, ".abi3.so"):
            (project.root / "lora_kernels" / f"_native{stale}").touch()
    assert "native" not in project.setup(*command, LORA_KERNELS_NATIVE="0")
    assert project.extensions() == []


@pytest.mark.parametrize("native", ["", "1"])
def test_a_failed_build_leaves_no_extension_behind(project: Project, native: str) -> None:
    project.setup("build_ext", "--inplace")
    assert len(project.extensions()) == 1
    (project.csrc / "cpu" / "dispatch.cpp").write_text("int no_semicolon = 1")
    environment = {"LORA_KERNELS_NATIVE": native} if native else {}
    said = project.setup("build_ext", "--inplace", status=1 if native else 0, **environment)
    assert "no_semicolon" in said, "the compiler's own message is shown"
    assert project.extensions() == []


def fake_nvcc(project: Project, *known: int) -> str:
    """CUDA_HOME of a compiler that knows these GPUs, and compiles nothing."""
    home = project.root / "cuda"
    (home / "bin").mkdir(parents=True)
    listed = "; ".join(f"echo sm_{gpu}" for gpu in known or (80, 90))
    (home / "bin" / "nvcc").write_text(
        f'#!/bin/sh\ncase "$*" in --list-gpu-code) {listed}; exit 0;; esac\n'
        'echo "asked: $*"; exit 1\n'
    )
    (home / "bin" / "nvcc").chmod(0o755)
    return str(home)


def fake_nvidia_smi(project: Project, *lines: str) -> str:
    """PATH with an nvidia-smi that prints these lines; without lines it fails."""
    folder = project.root / "smi"
    folder.mkdir()
    printed = "; ".join(f"echo '{line}'" for line in lines) or "exit 9"
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{printed}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_cuda_kernels_that_do_not_build_are_said_to_be_left_out(project: Project) -> None:
    environment = {"CUDA_HOME": fake_nvcc(project), "LORA_KERNELS_NATIVE": "0"}
    asked = project.setup("build", status=1, LORA_KERNELS_CUDA="1", **environment)
    assert "error: LORA_KERNELS_CUDA=1, but" in asked
    # Those of the default that this nvcc knows, and the last of them for GPUs to come.
    for flag in ("code=[sm_80]", "code=[sm_90,compute_90]"):
        assert flag in asked
    assert "sm_120" not in asked
    unasked = project.setup("build", LORA_KERNELS_CUDA="", **environment)
    assert "the CUDA kernels are left out" not in unasked


def test_build_with_nvcc_says_that_cuda_kernels_are_built_and_how_not_to(project: Project) -> None:
    environment = {"CUDA_HOME": fake_nvcc(project), "LORA_KERNELS_NATIVE": "0"}
    environment["PATH"] = fake_nvidia_smi(project, "9.0")
    note = "/nvcc was found: the CUDA kernels are built too, in minutes; LORA_KERNELS_CUDA=0 leaves"
    assert note in project.setup("--quiet", "build", LORA_KERNELS_CUDA=None, **environment)
    assert note not in project.setup("--quiet", "build", LORA_KERNELS_CUDA="0", **environment)


@pytest.mark.parametrize(
    ("cards", "variables", "codes"),
    [
        (["9.0", "8.0", "9.0"], {}, ["sm_80", "sm_90"]),
        (["13.0"], {}, ["sm_80", "sm_90,compute_90"]),  # newer than nvcc: PTX of the last it knows
        (["9.0"], {"TORCH_CUDA_ARCH_LIST": "8.0"}, ["sm_80"]),
        ([], {"TORCH_CUDA_ARCH_LIST": "8.0"}, ["sm_80"]),
        ([], {"LORA_KERNELS_PORTABLE": "1"}, ["sm_80", "sm_90,compute_90"]),
        ([], {}, None),
        (["No devices were found"], {}, None),
        (["7.5"], {}, None),  # older than the kernels need
        (["7.5", "9.0"], {}, ["sm_90"]),
    ],
)
def test_cuda_kernels_by_default_are_for_the_gpus_of_the_machine(
    project: Project, cards: list[str], variables: dict[str, str], codes: list[str] | None
) -> None:
    environment = {"CUDA_HOME": fake_nvcc(project), "LORA_KERNELS_NATIVE": "0"}
    environment |= {"PATH": fake_nvidia_smi(project, *cards), **variables}
    status = 1 if "LORA_KERNELS_PORTABLE" in variables else 0
    said = project.setup("build", status=status, LORA_KERNELS_CUDA=None, **environment)
    found = re.findall(r"code=\[(\S+?)\]", said)
    assert list(dict.fromkeys(found)) == (codes or []), said


def test_cuda_archs_every_rated_gpu_has_an_image_or_ptx(project: Project) -> None:
    """An image runs on its major version from its minor one on, PTX on all that came later."""
    nvcc = fake_nvcc(project, 75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)  # 13.0's
    environment = {"CUDA_HOME": nvcc, "TORCH_CUDA_ARCH_LIST": "", "LORA_KERNELS_NATIVE": "0"}
    asked = project.setup("build", status=1, LORA_KERNELS_CUDA="1", **environment)
    codes = re.findall(r"\b(sm|compute)_(\w+)", " ".join(re.findall(r"code=(\S+)", asked)))
    assert codes and all(number.isdigit() for _, number in codes), codes  # 90a runs on 9.0 alone
    images = {int(number) for kind, number in codes if kind == "sm"}
    ptx = {int(number) for kind, number in codes if kind == "compute"}
    thor, spark = 110, 121  # which are not rated
    for gpu in (*device._OPERATIONS, thor, spark):
        own = [image for image in images if image // 10 == gpu // 10 and image <= gpu]
        assert own or [oldest for oldest in ptx if oldest <= gpu], f"nothing runs on sm_{gpu}"
    assert max(ptx) == max(images)  # a card to come


def test_gpus_that_nvcc_does_not_know_are_an_error(project: Project) -> None:
    environment = {"CUDA_HOME": fake_nvcc(project), "TORCH_CUDA_ARCH_LIST": "8.0;12.1+PTX"}
    environment |= {"LORA_KERNELS_NATIVE": "0", "LORA_KERNELS_CUDA": "1"}
    said = project.setup("build", status=1, **environment)
    assert "TORCH_CUDA_ARCH_LIST" in said and "does not know '12.1+PTX'" in said


def test_build_in_a_log_prints_two_lines_an_extension_and_one_in_ten_seconds(
    project: Project,
) -> None:
    *progress, line = project.setup("--quiet", "build_ext", "--inplace").splitlines()
    seconds = int(line.split()[-2])
    assert 1 <= len(progress) <= 1 + seconds // 10 and all(
        "steps left" in each for each in progress
    )
    steps = len(machine_flags(project)) + 1  # and the link
    assert re.fullmatch(rf"Compiled the native CPU kernels: {steps} steps in \d+ s", line)
    assert project.setup("--quiet", "build_ext", "--inplace") == "", "nothing was to be done"


def test_build_on_a_terminal_rewrites_one_line_that_says_how_many_steps_are_left(
    project: Project,
) -> None:
    (project.csrc / "cpu" / "layer.cpp").write_text("#warning seen\n")
    ours, terminal = pty.openpty()
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = os.environ | {"LORA_KERNELS_CUDA": "0", "LORA_KERNELS_EMULATOR": "0"}
    with subprocess.Popen(command, cwd=project.root, env=environment, stdout=terminal):
        os.close(terminal)
        printed = b""
        try:
            while some := os.read(ours, 4096):
                printed += some
        except OSError:  # what Linux says where the last writer has closed
            pass
    os.close(ours)
    rewritten = printed.decode().split("\r\x1b[K")
    steps = len(machine_flags(project)) + 1
    left = [f"Compiling the native CPU kernels: {n} of {steps} steps left" for n in range(steps)]
    assert [line for line in rewritten if line.startswith("Compiling")] == left[::-1]
    assert any("#warning" in line for line in rewritten), "a compiler's message is shown"
    assert rewritten[-1].startswith(f"Compiled the native CPU kernels: {steps} steps in ")


def test_each_unit_has_the_flags_of_its_instruction_set_alone(built_project: Project) -> None:
    expected: dict[str, set[str]] = {f"{unit}.cpp": set() for unit in BASELINE_UNITS}
    assert machine_flags(built_project) == expected | (X86_64_UNITS if X86_64 else {})


@pytest.mark.skipif(not X86_64, reason="only x86-64 has units that a compiler may not know")
def test_a_unit_that_the_compiler_does_not_know_is_left_out(project: Project) -> None:
    old_compiler = project.root / "old-c++"
    old_compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-mavx512bf16*) exit 1;; esac\nexec c++ "$@"\n'
    )
    old_compiler.chmod(0o755)
    cxx = shlex.quote(str(old_compiler))
    project.setup("build_ext", "--inplace", CXX=cxx, LORA_KERNELS_NATIVE="1")
    assert "kernels_avx512bf16.cpp" not in machine_flags(project)
    call = "from _native import isa_built; print([isa_built(i) for i in range(5)])"
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=project.root / "lora_kernels",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[True, True, True, False, False]"


def test_a_changed_header_recompiles_what_includes_it(project: Project) -> None:
    project.setup("build_ext", "--inplace")
    names = ("cpu/cpuid.o", "bindings.o", "cpu/kernels_scalar.o")
    before = [project.object_file(name).stat().st_mtime_ns for name in names]
    with (project.csrc / "cpu" / "cpuid.h").open("a") as header:
        header.write("// changed\n")
    project.setup("build_ext", "--inplace")
    after = [project.object_file(name).stat().st_mtime_ns for name in names]
    assert [a != b for a, b in zip(after, before, strict=True)] == [True, True, False]


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="free-threaded: no limited C API"
)
def test_build_makes_one_file_of_the_cpu_kernels_for_every_python(project: Project) -> None:
    for_one = project.root / "lora_kernels" / f"_native{EXT_SUFFIX}"
    for_one.touch()  # which Python would import first
    project.setup("build_ext", "--inplace", LORA_KERNELS_NATIVE="1")
    assert [path.name for path in project.extensions()] == ["_native.abi3.so"]
    project.setup("bdist_wheel", "--dist-dir=dist", LORA_KERNELS_NATIVE="1")
    (wheel,) = (project.root / "dist").glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    assert "lora_kernels/_native.abi3.so" in zipfile.ZipFile(wheel).namelist()


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="free-threaded: no limited C API"
)
@pytest.mark.skipif(sys.platform != "linux", reason="not Linux")
def test_a_portable_wheel_is_tagged_for_an_old_glibc(project: Project) -> None:
    project.setup("bdist_wheel", LORA_KERNELS_PORTABLE="1", LORA_KERNELS_EMULATOR="1")
    (wheel,) = project.root.glob("dist/*.whl")
    assert wheel.name.endswith(f"-cp310-abi3-manylinux_2_28_{platform.machine()}.whl")
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert libraries == ["lora_kernels/_native.abi3.so"]


@pytest.mark.skipif(sys.platform != "linux", reason="not Linux")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GLIBC_2.29", "needs GLIBC_2.29, want GLIBC_2.28 or older"),
        ("GLIBCXX_3.4.29", "needs GLIBCXX_3.4.29, want GLIBCXX_3.4.24 or older"),
        ("libgomp.so.1", "needs libgomp.so.1, want the C and C++ libraries alone"),
    ],
)
def test_a_portable_wheel_that_needs_more_is_an_error(
    project: Project, name: str, message: str
) -> None:
    """The linker writes such names among the strings of the library, where this one is put."""
    text = f'extern "C" __attribute__((used)) const char text[] = "\\0{name}";\n'
    (project.csrc / "direct.cpp").write_text(text)
    said = project.setup("bdist_wheel", status=1, LORA_KERNELS_PORTABLE="1")
    assert f"LORA_KERNELS_PORTABLE=1, but _native.so {message}" in said
    assert project.extensions() == []


def test_the_source_distribution_holds_what_the_build_needs(built_project: Project) -> None:
    built_project.setup("sdist", "--formats=tar", "--dist-dir=dist")
    (archive,) = (built_project.root / "dist").glob("*.tar")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {p.relative_to(built_project.root) for p in built_project.csrc.rglob("*.*")}
    assert {str(p) for p in sources} | {"setup.py", "pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]


def test_instruction_set_units_share_no_inline_function() -> None:
    """A weak function of the AVX-512 unit could be the copy that the linker keeps for every unit,
    and then it faults on an older processor."""
    objects = sorted(ROOT.glob("build/temp.*/native/cpu/kernels_*.o"))
    if not objects:
        pytest.skip("the native kernels are not built")
    for path in objects:
        symbols = subprocess.run(
            ["nm", "--defined-only", "--demangle", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        weak = [line for line in symbols.splitlines() if line.split()[1] in ("W", "V", "u")]
        assert [line for line in weak if "DW.ref.__gxx_personality" not in line] == [], path.name
