"""Builds the compiled library with CMake and Ninja, where that is possible, and records the result.

The project's metadata is in pyproject.toml. Three environment variables steer the build:

    SPARSE_GEN_EXTENSION=0/1        leave the library out / fail where it cannot be built
    SPARSE_GEN_CUDA=0/1             leave the CUDA kernels out / fail where they cannot be built
    SPARSE_GEN_CUDA_ARCHITECTURES   CMake's list, such as "90" or "80-real;90"

Without a compiler or without torch the package is installed all the same and runs on its
plain-PyTorch references; sparse_gen/_build.json then says why. A compiler that fails, fails the
installation.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar, NamedTuple

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
LIBRARY = "_sparse_gen.so"
RECORD = "_build.json"
OLDEST_TORCH = (2, 10)
# CMake adds PTX to the last, for the GPUs that come after it.
CUDA_ARCHITECTURES = "80-real;86-real;89-real;90"


class Torch(NamedTuple):
    """The installed torch, as its files tell: under isolation it cannot be imported."""

    folder: Path
    version: str
    cuda: str | None  # the CUDA version it was built with


class Tools(NamedTuple):
    """What is on this machine to build with; None is not found."""

    platform: str
    compiler: str | None
    cmake: str | None
    ninja: str | None
    nvcc: str | None
    torch: Torch | None


def read_switch(name: str, value: str | None) -> bool | None:
    """True for "1", False for "0", None where the variable is unset or empty."""
    if not value:
        return None
    if value not in ("0", "1"):
        raise OptionError(f"{name}: expected 0 or 1, got {value!r}")
    return value == "1"


def read_torch_version(text: str) -> tuple[str, str | None]:
    """The version and CUDA version in the text of torch/version.py."""
    version = re.search(r"^__version__\b[^=]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return version[1] if version else "unknown", cuda[1] if cuda else None


def release(version: str) -> tuple[int, ...]:
    """(2, 13) for "2.13.0+cpu"; () where the version does not start with numbers."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, numbers.groups())) if numbers else ()


def why_no_extension(wanted: bool | None, tools: Tools) -> str | None:
    """The reason not to build the library, in one sentence, or None to build it.

    Raises:
        OptionError: the library is demanded and cannot be built.
    """
    again = "`pip install --no-build-isolation .`"
    if wanted is False:
        return "SPARSE_GEN_EXTENSION=0 was set when the package was installed"
    if not tools.platform.startswith(("linux", "darwin")):
        reason = f"the extension is built on Linux and macOS, and this is {tools.platform}"
    elif tools.compiler is None:
        reason = (
            "no C++ compiler was found on PATH or in CXX: install one, such as g++, "
            "then install the package again"
        )
    elif tools.torch is None:
        reason = (
            "torch was not found at build time: "
            f"run `pip install torch setuptools cmake ninja` first, then {again}"
        )
    elif release(tools.torch.version) < OLDEST_TORCH:
        reason = (
            f"the extension needs torch 2.10, and {tools.torch.version} was found at build time: "
            f"run `pip install 'torch>=2.10' setuptools cmake ninja` first, then {again}"
        )
    elif tools.cmake is None or tools.ninja is None:
        missing = "cmake" if tools.cmake is None else "ninja"
        reason = f"{missing} was not found: run `pip install cmake ninja` first, then {again}"
    else:
        return None
    if wanted:
        raise OptionError(f"SPARSE_GEN_EXTENSION=1, but {reason}")
    return reason


def decide_cuda(
    wanted: bool | None, no_extension: str | None, tools: Tools, has_sources: bool
) -> tuple[bool, str]:
    """Whether to compile the CUDA kernels, and why (not), in one sentence.

    No GPU is looked for: the machine that builds often has none.

    Raises:
        OptionError: the kernels are demanded and cannot be compiled.
    """
    if wanted is False:
        return False, "SPARSE_GEN_CUDA=0 was set when the package was installed"
    if no_extension is not None:
        reason = no_extension
    elif not has_sources:
        reason = "csrc/cuda holds no sources"
    elif tools.torch.cuda is None:
        reason = f"torch {tools.torch.version} is not a CUDA build"
    elif tools.nvcc is None:
        reason = "nvcc was not found: put it on PATH or set CUDA_HOME"
    else:
        return True, f"nvcc and a build of torch for CUDA {tools.torch.cuda} were found"
    if wanted:
        raise OptionError(f"SPARSE_GEN_CUDA=1, but {reason}")
    return False, reason


def find_torch() -> Torch | None:
    """The torch of the interpreter that runs the build.

    pip's isolated build hides its site-packages from `import` but runs the same interpreter, so
    that the path it would be installed at still leads there.
    """
    folders = [Path(sysconfig.get_path("platlib"), "torch")]
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        folders.append(Path(spec.origin).parent)
    for folder in folders:
        if all((folder / name).exists() for name in ("version.py", "include", "lib")):
            version, cuda = read_torch_version((folder / "version.py").read_text())
            has_cuda = any((folder / "lib").glob("libtorch_cuda.*"))
            return Torch(folder, version, (cuda or "of unknown version") if has_cuda else None)
    return None


def find_compiler() -> str | None:
    """The C++ compiler's command: $CXX with its arguments, or the first usual name on PATH."""
    if named := os.environ.get("CXX"):
        return named if shutil.which(shlex.split(named)[0]) else None
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def find_packaged(module: str, folder: str) -> str | None:
    """The executable that a PyPI package of the same name brings, or the one on PATH."""
    if importlib.util.find_spec(module):
        path = getattr(importlib.import_module(module), folder, None)
        if path and (found := shutil.which(module, path=path)):
            return found
    return shutil.which(module)


def find_nvcc() -> str | None:
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(home, "bin")) for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))


def find_tools() -> Tools:
    return Tools(
        platform=sys.platform,
        compiler=find_compiler(),
        cmake=find_packaged("cmake", "CMAKE_BIN_DIR"),
        ninja=find_packaged("ninja", "BIN_DIR"),
        nvcc=find_nvcc(),
        torch=find_torch(),
    )


def compile_library(tools: Tools, cuda: bool, architectures: str, sanitize: bool = False) -> tuple[Path, dict]:
    """Run CMake and Ninja; with `sanitize`, the library reports bad addresses and undefined behaviour when it runs.

    Returns:
        The library, and what CMake knows about it: "compiler" and "instruction_sets".

    Raises:
        CompileError: either failed; its own message stands above.
    """
    configuration = {
        "SPARSE_GEN_TORCH": tools.torch.folder,
        "SPARSE_GEN_CUDA": "ON" if cuda else "OFF",
        "CMAKE_BUILD_TYPE": "Release",
    }
    if sanitize:
        configuration["SPARSE_GEN_SANITIZE"] = "ON"
    if cuda:
        configuration |= {
            "CMAKE_CUDA_COMPILER": tools.nvcc,
            "CMAKE_CUDA_ARCHITECTURES": architectures,
        }
    # The folder is kept, so that the next build compiles only what changed. CMake cannot change a
    # compiler in an existing folder, hence one folder per configuration; CMake and Ninja do not
    # count, since every isolated build brings them in another temporary folder.
    key = json.dumps([tools.compiler, tools.torch.version, configuration], default=str)
    folder = ROOT / "build" / f"cmake-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    configuration["CMAKE_MAKE_PROGRAM"] = tools.ninja

    definitions = [f"-D{name}={value}" for name, value in configuration.items()]
    configure = [tools.cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", *definitions]
    environment = os.environ | {"CXX": tools.compiler}
    for command in (configure, [tools.cmake, "--build", folder]):
        if subprocess.run(list(map(str, command)), env=environment).returncode:
            raise CompileError(
                "the extension could not be compiled (the compiler's message stands above); "
                "SPARSE_GEN_EXTENSION=0 installs the package without it"
            )
    return folder / LIBRARY, json.loads((folder / "facts.json").read_text())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file in one step: a running process may have the old library mapped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class BuildLibrary(Command):
    """Puts the library and the build record into the package.

    That is the source tree's package if the installation is editable, else the one to be installed.
    """

    description = "build the compiled library where that is possible"
    user_options: ClassVar = []

    def initialize_options(self) -> None:
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        environment = os.environ
        tools = find_tools()
        wanted = read_switch("SPARSE_GEN_EXTENSION", environment.get("SPARSE_GEN_EXTENSION"))
        wanted_cuda = read_switch("SPARSE_GEN_CUDA", environment.get("SPARSE_GEN_CUDA"))
        architectures = environment.get("SPARSE_GEN_CUDA_ARCHITECTURES") or CUDA_ARCHITECTURES

        reason = why_no_extension(wanted, tools)
        has_sources = any((ROOT / "csrc" / "cuda").glob("*.cu"))
        cuda, cuda_reason = decide_cuda(wanted_cuda, reason, tools, has_sources)
        if reason is None:
            library, facts = compile_library(tools, cuda, architectures)
        else:
            library, facts = None, {"compiler": None, "instruction_sets": []}
            self.warn(f"sparse-gen is installed without its compiled extension: {reason}")

        target = (ROOT if self.editable_mode else Path(self.build_lib)) / "sparse_gen"
        if library is None:
            (target / LIBRARY).unlink(missing_ok=True)
        else:
            write_atomically(target / LIBRARY, library.read_bytes())
        record = {
            "library": LIBRARY if library else None,
            "reason": reason,
            "compiler": facts["compiler"],
            "instruction_sets": facts["instruction_sets"],
            "cuda": cuda,
            "cuda_reason": cuda_reason,
            "torch": tools.torch.version if tools.torch else None,
        }
        write_atomically(target / RECORD, (json.dumps(record, indent=2) + "\n").encode())

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in names them

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib, "sparse_gen")
        return [str(path) for name in (LIBRARY, RECORD) if (path := package / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_library", None)]

    def run(self) -> None:
        # setuptools packs whatever lies here, modules deleted since the last build included.
        shutil.rmtree(Path(self.build_lib, "sparse_gen"), ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    """Tagged for the platform if the library is inside, and for any Python: it links to none."""

    def run(self) -> None:
        self.run_command("build")
        build_library = self.get_finalized_command("build_library")
        has_library = Path(build_library.build_lib, "sparse_gen", LIBRARY).exists()
        # The tag and the folder that `install` fills are decided apart; they have to agree.
        self.root_is_pure = not has_library
        self.distribution.has_ext_modules = lambda: has_library
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def all_packages() -> list[str]:
    kernels = [f"sparse_gen.kernels.{name}" for name in find_packages(str(ROOT / "kernels"))]
    return [*find_packages(str(ROOT), include=["sparse_gen*"]), "sparse_gen.kernels", *kernels]


if __name__ == "__main__":
    setup(
        packages=all_packages(),
        # PyPI has a package whose module is called `kernels`: ours is not installed as that.
        package_dir={"sparse_gen.kernels": "kernels"},
        cmdclass={"build": Build, "build_library": BuildLibrary, "bdist_wheel": Wheel},
    )
