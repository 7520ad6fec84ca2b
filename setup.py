"""Builds the compiled libraries next to the Python package; the rest of the metadata is in pyproject.toml.

    pip install -e .                 builds everything there is a compiler for
    python setup.py build_native     rebuilds the libraries in place after a change of csrc, nothing else
    CXX=aarch64-linux-gnu-g++ python setup.py build_native --build-lib FOLDER    builds for another processor, elsewhere

csrc is plain C++17 and CUDA behind a C ABI and includes no torch header, so the build needs a C++ compiler and nothing more,
and one library serves every PyTorch and every Python. Files of csrc/*/cpu are compiled once; files of csrc/*/cpu/kernels once
per instruction set (the choice is made at run time). A missing compiler or a failing build does not fail the installation: a
warning says what is missing, `python -m comp_kernels.info` repeats it, and the reference backend serves.

csrc/*/cuda is compiled where nvcc and a CUDA driver are found; COMP_KERNELS_BUILD_CUDA=1 does without the driver (a build
machine), =0 leaves it out. Neither torch nor a GPU is needed for that.

A wheel is tagged py3-none-PLATFORM. `.ci/wheel` builds the one that is given away: every architecture, for old systems too.

Environment: CXX (default c++ or g++), CXXFLAGS (appended), MAX_JOBS (compiler processes, default all cores), CUDA_HOME (where
bin/nvcc is, default PATH), TORCH_CUDA_ARCH_LIST (default "8.0;9.0a+PTX"), NVCC_APPEND_FLAGS (nvcc's own;
-lineinfo for a profiler).
"""

from __future__ import annotations

import ctypes.util
import hashlib
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
known = runpy.run_path(str(ROOT / "comp_kernels" / "_sources.py"))
fingerprint, INCLUDES = known["fingerprint"], known["INCLUDES"]
CXX_FLAGS, X86_FLAGS, PAIRS_FLAGS = (known[f"{name}_FLAGS"] for name in ("CXX", "X86", "PAIRS"))

NVCC_FLAGS = ["-std=c++17", "-O3", *INCLUDES, "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
CUDA_ARCHITECTURES = "8.0;9.0a+PTX"
HEAD_SIZES = {
    "forward": (32, 64, 72, 80, 96, 128, 192, 256),
    "backward": (32, 64, 72, 80, 96, 128, 192, 256),
    "forward_f32": (32, 64, 80, 128, 256),
    "backward_f32": (32, 64, 80, 128, 256),
    "forward_sm90": (64, 72, 80, 96, 128),
    "backward_sm90": (64, 72, 80, 96, 128),
    "persistent_sm90": (64, 72, 80, 96, 128),
    "short_forward": (64, 72, 80, 96, 128),
    "short_backward": (64, 72, 80, 96, 128),
}
"""Files of csrc/rope_attention/cuda that are compiled once per head size, with -DHEAD_DIM."""


class MissingCompiler(Exception):
    """A library cannot be built here; the message says what is missing."""


class LeftOut(Exception):
    """A library is not built because nobody asked for it; the message says how to ask."""


def target(compiler: list[str]) -> str:
    """The processor that `compiler` compiles for, x86_64 or aarch64, say; a cross compiler's is not this machine's."""
    result = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True)
    return (result.stdout if result.returncode == 0 else platform.machine()).strip().lower().split("-")[0]


def instruction_sets(processor: str) -> dict[str, list[str]]:
    """Compiler flags by instruction set; other machines than x86-64 have one set, the architecture's own (NEON)."""
    return X86_FLAGS if processor in ("x86_64", "amd64") else {"baseline": []}


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows these flags."""
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def newer(target: Path, sources: list[Path]) -> bool:
    return target.exists() and all(target.stat().st_mtime > source.stat().st_mtime for source in sources)


def name_of(source: Path) -> str:
    """A name for what is made of a file of csrc: files of two operators may be called alike."""
    return "-".join(source.relative_to(CSRC).with_suffix("").parts)


def run_all(commands: list[list[str]]) -> None:
    """Run compiler commands side by side; the first failure is raised with the compiler's words."""

    def run(command: list[str]) -> None:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}\n{result.stdout}{result.stderr}")
        if result.stderr:
            print(result.stderr, file=sys.stderr)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(run, commands))


def build_cpu(lib: Path, objects: Path) -> None:
    """csrc/*/cpu -> libcomp_kernels_cpu.so; objects that are newer than their sources are kept."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]
    if not shutil.which(compiler[0]):
        raise MissingCompiler("no C++ compiler found: install g++ or clang++, or set CXX")
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    objects = objects / hashlib.sha256(shlex.join([*compiler, *CXX_FLAGS, *extra]).encode()).hexdigest()[:12]
    objects.mkdir(exist_ok=True)
    headers = [*CSRC.glob("include/**/*.h"), *CSRC.glob("*/cpu/**/*.h"), Path(__file__)]
    jobs: list[tuple[Path, Path, list[str]]] = [
        (source, objects / f"{name_of(source)}.o", []) for source in CSRC.glob("*/cpu/*.cpp")
    ]
    sets = {isa: (flags, sorted(CSRC.glob("*/cpu/kernels/*.cpp"))) for isa, flags in instruction_sets(target(compiler)).items()}
    defines = []
    if "avx512" in sets and all(accepts(compiler, flags) for flags in PAIRS_FLAGS.values()):
        sources = sorted(CSRC.glob("rope_attention/cpu/kernels/*.cpp"))
        sets |= {isa: (flags, sources) for isa, flags in PAIRS_FLAGS.items()}
        defines.append("-DCOMP_KERNELS_HAS_PAIRS")
    for isa, (flags, sources) in sets.items():
        flags = [*flags, f"-DCOMP_KERNELS_ISA={isa}"]
        jobs += [(source, objects / f"{name_of(source)}.{isa}.o", flags) for source in sources]
    run_all(
        [
            [*compiler, *CXX_FLAGS, *defines, *flags, *extra, "-c", str(source), "-o", str(target)]
            for source, target, flags in jobs
            if not newer(target, [source, *headers])
        ]
    )
    run_all(
        [[*compiler, "-shared", *extra, *(str(target) for _, target, _ in jobs), "-o", str(lib / "libcomp_kernels_cpu.so")]]
    )


def find_nvcc() -> str:
    """nvcc, when the CUDA library is to be built; raises LeftOut when it is not, MissingCompiler when it cannot be."""
    wish = os.environ.get("COMP_KERNELS_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        raise MissingCompiler(f"COMP_KERNELS_BUILD_CUDA must be 0, 1 or not set, got {wish!r}")
    command = "COMP_KERNELS_BUILD_CUDA=1 pip install -e ."
    if wish == "0":
        raise LeftOut(f"left out by COMP_KERNELS_BUILD_CUDA=0; `{command}` builds it")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        kind = MissingCompiler if wish == "1" else LeftOut
        raise kind(f"no nvcc found: install the CUDA toolkit or set CUDA_HOME, then `{command}`")
    driver = ctypes.util.find_library("cuda") or Path("/proc/driver/nvidia/version").exists()
    if wish == "" and not driver:
        raise LeftOut(f"nvcc is here but no CUDA driver; `{command}` builds it all the same")
    return nvcc


def architectures() -> dict[str, bool]:
    """Compute capabilities of TORCH_CUDA_ARCH_LIST as {"80": False, "90a": True}: whether PTX is kept for later devices too."""
    listed = [item for item in re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES) if item]
    numbers = [re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item) for item in listed]
    if not numbers or None in numbers:
        raise RuntimeError(f"TORCH_CUDA_ARCH_LIST must hold numbers like 8.0, 9.0a or 9.0+PTX, got {listed}")
    known = {found[1] + found[2] + found[3]: bool(found[4]) for found in numbers if int(found[1]) >= 8}
    if not known:
        raise RuntimeError(f"TORCH_CUDA_ARCH_LIST must name a compute capability of 8.0 or later, got {listed}")
    return known


def generated_code(source: Path, capabilities: dict[str, bool]) -> list[str]:
    """nvcc's -gencode flags. Files named *_sm90 use wgmma: sm_90a alone has it. The others run everywhere from sm_80 on."""
    if source.stem.endswith("_sm90"):
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    flags = []
    for capability, ptx in capabilities.items():
        number = capability.rstrip("af")  # what is made for 90a runs on 9.0 alone, for 90 on 9.x, and its PTX on all later ones
        flags += [f"-gencode=arch=compute_{number},code=sm_{number}"]
        flags += [f"-gencode=arch=compute_{number},code=compute_{number}"] if ptx else []
    return list(dict.fromkeys(flags))


def compression(nvcc: str) -> list[str]:
    """The smallest form of device code that every driver of this CUDA can read. CUDA 12 has it too, from 12.8 on, but its first
    drivers cannot read it (before 550): there NVCC_APPEND_FLAGS=--compress-mode=size asks for it."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)", version)
    return ["--compress-mode=size"] if found and int(found[1]) >= 13 else []


def build_cuda(lib: Path, objects: Path) -> None:
    """csrc/*/cuda -> libcomp_kernels_cuda.so, CUDA runtime inside; objects newer than their sources are kept."""
    shared = [*CSRC.glob("include/**/*.h"), *CSRC.glob("common/cuda/*.*h"), Path(__file__)]
    library = lib / "libcomp_kernels_cuda.so"
    try:
        nvcc = find_nvcc()
    except LeftOut:
        built_from = lib / "cuda.sources"  # a library of an earlier build stays only while it is the right one
        if not (library.exists() and built_from.exists() and built_from.read_text() == fingerprint("cuda")):
            library.unlink(missing_ok=True)
            raise
        return
    capabilities = architectures()
    wgmma = "90a" in capabilities
    names = " ".join(f"sm_{capability}" + (" PTX" if ptx else "") for capability, ptx in capabilities.items())
    defines = [f'-DCOMP_KERNELS_ARCHITECTURES="{names}"', f"-DCOMP_KERNELS_SM90A={int(wgmma)}"]
    common = [*NVCC_FLAGS, *compression(nvcc), *defines]
    kept_by = shlex.join([nvcc, *common, os.environ.get("NVCC_APPEND_FLAGS", "")])
    objects = objects / hashlib.sha256(kept_by.encode()).hexdigest()[:12]
    objects.mkdir(exist_ok=True)
    jobs: list[tuple[Path, Path, list[str]]] = []
    for source in sorted(CSRC.glob("*/cuda/*.cu"), reverse=True):  # sinkhorn's small matrices first: they take longest
        if source.stem.endswith("_sm90") and not wgmma:
            continue
        flags = [*common, *generated_code(source, capabilities)]
        for size in HEAD_SIZES.get(source.stem, ("",)):
            target = objects / f"{name_of(source)}{size}.o"
            jobs.append((source, target, [*flags, f"-DHEAD_DIM={size}"] if size else flags))
    run_all(
        [
            [nvcc, *flags, "-c", str(source), "-o", str(target)]
            for source, target, flags in jobs
            if not newer(target, [source, *source.parent.glob("*.*h"), *shared])
        ]
    )
    run_all([[nvcc, "-shared", "-cudart=static", *(str(target) for _, target, _ in jobs), "-o", str(library)]])


LIBRARIES = {"cpu": build_cpu, "cuda": build_cuda}


class BuildNative(Command):
    """Build the libraries of LIBRARIES into comp_kernels/lib, in place or under build_lib for a wheel."""

    description = "compile csrc into comp_kernels/lib"
    user_options = [  # noqa: RUF012 (setuptools reads it from the class)
        ("build-lib=", "b", "folder for the libraries, under comp_kernels/lib"),
        ("build-temp=", "t", "folder for the object files"),
    ]
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = None
        self.build_temp = str(ROOT / "build")

    def finalize_options(self) -> None:
        in_place = self.editable_mode or "build_native" in sys.argv
        if self.build_lib is None:
            self.build_lib = str(ROOT) if in_place else self.get_finalized_command("build").build_lib

    def run(self) -> None:
        lib = Path(self.build_lib) / "comp_kernels" / "lib"
        lib.mkdir(parents=True, exist_ok=True)
        for name, build_library in LIBRARIES.items():
            objects = Path(self.build_temp) / f"native-{name}-{platform.machine()}"
            objects.mkdir(parents=True, exist_ok=True)
            reason = lib / f"{name}.missing"  # read by comp_kernels._native to explain itself
            reason.unlink(missing_ok=True)
            try:
                build_library(lib, objects)
                (lib / f"{name}.sources").write_text(fingerprint(name))
            except LeftOut as error:
                reason.write_text(str(error))
            except (MissingCompiler, RuntimeError, OSError) as error:
                if "build_native" in sys.argv or os.environ.get(f"COMP_KERNELS_BUILD_{name.upper()}") == "1":
                    raise  # asked for by name: a failure is a failure
                reason.write_text(str(error))
                self.warn(f"the {name} library was not built: {error}")

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "comp_kernels" / "lib").glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]


class WithLibraries(Distribution):
    """What setuptools has to know of the libraries: this is no package for every platform."""

    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    """A wheel for this platform that fits every Python 3: the libraries know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    build.sub_commands.append(("build_native", None))
    setup(distclass=WithLibraries, cmdclass={"build_native": BuildNative, "bdist_wheel": PlatformWheel})
