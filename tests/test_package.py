"""What is built and installed: setup.py's decisions, the wheel, the source distribution."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from setuptools.errors import OptionError

import sparse_gen

ROOT = Path(__file__).resolve().parent.parent
NAME = f"sparse_gen-{sparse_gen.__version__}"


def load_setup():
    spec = importlib.util.spec_from_file_location("sparse_gen_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_setup()

CPU_TORCH = script.Torch(Path("torch"), "2.13.0+cpu", None)
CUDA_TORCH = script.Torch(Path("torch"), "2.11.0+cu130", "13.0")
OLD_TORCH = script.Torch(Path("torch"), "2.9.1", None)
EVERYTHING = script.Tools("linux", "c++", "cmake", "ninja", "nvcc", CUDA_TORCH)

needs_compiler = pytest.mark.skipif(
    script.why_no_extension(None, script.find_tools()) is not None,
    reason="the extension cannot be built on this machine",
)


def test_switch_reads_zero_one_and_nothing():
    assert [script.read_switch("X", value) for value in (None, "", "0", "1")] == [
        None,
        None,
        False,
        True,
    ]
    with pytest.raises(OptionError, match="X: expected 0 or 1, got 'yes'"):
        script.read_switch("X", "yes")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n",
            ("2.13.0+cpu", None),
        ),
        ("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n", ("2.11.0+cu130", "13.0")),
        ('__version__: str = "2.12.0"\ncuda = "12.8"\n', ("2.12.0", "12.8")),
        # A ROCm build must not pass for a CUDA one.
        (
            "__version__ = '2.12.0'\ncuda: Optional[str] = None\nhip: Optional[str] = '7.0'\n",
            ("2.12.0", None),
        ),
    ],
)
def test_torch_version_is_read_from_text(text, expected):
    assert script.read_torch_version(text) == expected


def test_torch_is_found_as_import_finds_it():
    import torch

    found = script.find_torch()
    assert found.folder == Path(torch.__file__).parent
    assert found.version == torch.__version__
    assert (found.cuda is None) == (torch.version.cuda is None)


def test_extension_is_built_where_everything_is_there():
    assert script.why_no_extension(None, EVERYTHING) is None
    assert script.why_no_extension(True, EVERYTHING) is None
    assert script.why_no_extension(None, EVERYTHING._replace(platform="darwin", nvcc=None)) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"platform": "win32"}, "Linux and macOS"),
        ({"compiler": None}, "no C++ compiler"),
        ({"torch": None}, "torch was not found at build time: run `pip install torch "),
        ({"torch": OLD_TORCH}, "needs torch 2.10, and 2.9.1 was found at build time"),
        ({"cmake": None}, "cmake was not found"),
        ({"ninja": None}, "ninja was not found"),
    ],
)
def test_extension_is_left_out_with_a_reason(change, expected):
    tools = EVERYTHING._replace(**change)
    assert expected in script.why_no_extension(None, tools)
    with pytest.raises(OptionError, match="SPARSE_GEN_EXTENSION=1, but "):
        script.why_no_extension(True, tools)


def test_extension_is_left_out_on_request():
    assert "SPARSE_GEN_EXTENSION=0" in script.why_no_extension(False, EVERYTHING)


@pytest.mark.parametrize(
    ("wanted", "change", "sources", "built", "why"),
    [
        (None, {}, True, True, "nvcc and a build of torch for CUDA 13.0 were found"),
        (True, {}, True, True, "nvcc and a build of torch for CUDA 13.0 were found"),
        (False, {}, True, False, "SPARSE_GEN_CUDA=0 was set"),
        (None, {"nvcc": None}, True, False, "nvcc was not found"),
        (None, {"torch": CPU_TORCH}, True, False, "torch 2.13.0+cpu is not a CUDA build"),
        (None, {}, False, False, "csrc/cuda holds no sources"),
    ],
)
def test_cuda_decision(wanted, change, sources, built, why):
    decision, reason = script.decide_cuda(wanted, None, EVERYTHING._replace(**change), sources)
    assert decision is built
    assert why in reason


@pytest.mark.parametrize(
    ("no_extension", "change", "sources", "why"),
    [
        (None, {"nvcc": None}, True, "nvcc was not found"),
        (None, {"torch": CPU_TORCH}, True, "is not a CUDA build"),
        (None, {}, False, "holds no sources"),
        ("no C++ compiler was found", {}, True, "no C\\+\\+ compiler was found"),
    ],
)
def test_cuda_that_is_demanded_and_impossible_is_an_error(no_extension, change, sources, why):
    with pytest.raises(OptionError, match=f"SPARSE_GEN_CUDA=1, but .*{why}"):
        script.decide_cuda(True, no_extension, EVERYTHING._replace(**change), sources)


def test_written_file_leaves_an_open_old_one_alone(tmp_path):
    # A running process keeps the old library mapped; writing into it would crash that process.
    path = tmp_path / "library.so"
    script.write_atomically(path, b"old")
    with open(path, "rb") as running:
        script.write_atomically(path, b"new and longer")
        assert running.read() == b"old"
    assert path.read_bytes() == b"new and longer"
    assert list(tmp_path.iterdir()) == [path]


def copy_sources(target: Path) -> Path:
    """The files that git has or would take, so that a build leaves this tree as it is."""
    if not (ROOT / ".git").exists():
        pytest.skip("a git checkout tells which files belong to the project")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, output.split("\0")):
        if (ROOT / name).is_file():  # not so if it was deleted and that is not committed yet
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    return target


def run_python(*arguments: object, cwd: Path, check: bool = True, **environment: str):
    """Run Python with none of this project's variables set."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SPARSE_GEN_", "PYTHON"))}
    command = [sys.executable, *map(str, arguments)]
    run = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=600)
    if check and run.returncode:
        pytest.fail(f"{command} failed:\n{run.stdout}\n{run.stderr}")
    return run


def run_hook(source: Path, hook: str, output: Path, check: bool = True, **environment: str):
    """Build as pip does without isolation, through the hooks of the declared build backend."""
    code = f"from setuptools import build_meta; build_meta.{hook}({str(output)!r})"
    output.mkdir()
    return run_python("-c", code, cwd=source, check=check, **environment)


def unpack(wheel: Path, target: Path) -> dict:
    """Unpack the wheel and return the build record in it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return json.loads((target / "sparse_gen" / "_build.json").read_text())


IMPORT_AND_TELL = """
import json, sparse_gen, sparse_gen.kernels
from sparse_gen.ops import extension
status = extension.status()
print(json.dumps({
    "package": sparse_gen.__file__,
    "kernels": sparse_gen.kernels.__file__,
    "available": status.available,
    "reason": status.reason,
}))
"""


def import_from(folder: Path, elsewhere: Path) -> dict:
    """Import the package of that folder in a new process, and only that one."""
    run = run_python("-c", IMPORT_AND_TELL, cwd=elsewhere, PYTHONPATH=str(folder))
    told = json.loads(run.stdout.splitlines()[-1])
    # An editable installation would serve the source tree's package instead.
    assert Path(told["package"]) == folder / "sparse_gen" / "__init__.py"
    assert Path(told["kernels"]) == folder / "sparse_gen" / "kernels" / "__init__.py"
    return told


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return copy_sources(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run_python(*("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", folder), cwd=source)
    (path,) = folder.iterdir()
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel, source):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    outside = {name for name in names if name.split("/")[0] != "sparse_gen"}
    assert {name.split("/")[0] for name in outside} == {f"{NAME}.dist-info"}

    # Every module, including those of a folder whose __init__.py was forgotten.
    package = {
        path.relative_to(source).as_posix()
        for pattern in ("*.py", "*.pyi", "py.typed")
        for path in (source / "sparse_gen").rglob(pattern)
    }
    kernels = {f"sparse_gen/{path.relative_to(source).as_posix()}" for path in (source / "kernels").rglob("*.py")}
    built = {"sparse_gen/_build.json", "sparse_gen/_sparse_gen.so"}
    assert kernels and "sparse_gen/py.typed" in package
    assert names - outside - built == package | kernels


@needs_compiler
def test_wheel_holds_a_library_that_loads_elsewhere(wheel, source, tmp_path):
    assert wheel.name.startswith(f"{NAME}-py3-none-")
    assert not wheel.name.endswith("-any.whl")
    unpacked = tmp_path / "unpacked"
    record = unpack(wheel, unpacked)
    assert record["library"] == "_sparse_gen.so"
    assert record["reason"] is None
    assert record["torch"] == script.find_torch().version
    assert record["instruction_sets"][0] == "baseline"
    assert import_from(unpacked, tmp_path)["available"]

    library = (unpacked / "sparse_gen" / "_sparse_gen.so").read_bytes()
    assert str(source).encode() not in library
    assert str(Path(sys.prefix)).encode() not in library


def test_without_a_compiler_the_package_is_built_and_says_so(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns("build"))
    # What an earlier build left in the tree must not be taken for a result of this one.
    (copy / "sparse_gen" / "_sparse_gen.so").write_bytes(b"stale")
    output = tmp_path / "output"
    run_hook(copy, "build_wheel", output, PATH=str(tmp_path), CC="", CXX="", CUDACXX="")
    (built,) = output.iterdir()
    assert built.name == f"{NAME}-py3-none-any.whl"

    unpacked = tmp_path / "unpacked"
    record = unpack(built, unpacked)
    assert record["library"] is None
    assert "no C++ compiler" in record["reason"]
    assert record["instruction_sets"] == []
    assert record["cuda"] is False
    assert not (unpacked / "sparse_gen" / "_sparse_gen.so").exists()
    told = import_from(unpacked, tmp_path)
    assert not told["available"]
    assert told["reason"] == record["reason"]


def with_other_csrc(source: Path, target: Path, **files: str) -> Path:
    """The sources with another csrc/, quick to compile; keys are paths, "__" for the slash."""
    copy = shutil.copytree(source, target, ignore=shutil.ignore_patterns("csrc", "build"))
    for name, text in files.items():
        path = copy / "csrc" / (name.replace("__", "/") + ".cpp")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return copy


# One function an instruction set, whose name says which set the compiler was told to use.
TINY_KERNEL = """
#if defined(__AVX512F__)
#define FLAGS 512
#elif defined(__AVX2__) && defined(__FMA__)
#define FLAGS 2
#else
#define FLAGS 0
#endif
namespace sparse_gen::SPARSE_GEN_ISA { int flags() { return FLAGS; } }
"""

TINY_BINDING = """
namespace sparse_gen {
namespace baseline { int flags(); }
#ifdef SPARSE_GEN_X86
namespace avx2 { int flags(); }
namespace avx512 { int flags(); }
#endif
}
extern "C" __attribute__((visibility("default"))) int flags() {
#ifdef SPARSE_GEN_X86
  using namespace sparse_gen;
  return baseline::flags() == 0 && avx2::flags() == 2 && avx512::flags() == 512 ? 3 : -1;
#else
  return sparse_gen::baseline::flags() == 0 ? 1 : -1;
#endif
}
"""


@needs_compiler
def test_compile_error_fails_the_build(source, tmp_path):
    sources = {"binding": TINY_BINDING, "cpu__kernel": "#error not today\n"}
    broken = with_other_csrc(source, tmp_path / "copy", **sources)
    run = run_hook(broken, "build_wheel", tmp_path / "failed", check=False)
    assert run.returncode
    assert "not today" in run.stdout + run.stderr
    assert "SPARSE_GEN_EXTENSION=0 installs the package without it" in run.stderr

    output = tmp_path / "output"
    run_hook(broken, "build_wheel", output, SPARSE_GEN_EXTENSION="0")
    (built,) = output.iterdir()
    assert "SPARSE_GEN_EXTENSION=0" in unpack(built, tmp_path / "unpacked")["reason"]


@needs_compiler
def test_editable_build_takes_new_sources_as_they_come(source, tmp_path):
    sources = {"binding": TINY_BINDING, "cpu__kernel": TINY_KERNEL}
    tree = with_other_csrc(source, tmp_path / "copy", **sources)
    run_hook(tree, "build_editable", tmp_path / "first")
    package = tree / "sparse_gen"
    record = json.loads((package / "_build.json").read_text())
    count = len(record["instruction_sets"])
    call = "import ctypes, sys, torch; print(ctypes.CDLL(sys.argv[1]).{}())"
    run = run_python("-c", call.format("flags"), package / "_sparse_gen.so", cwd=tmp_path)
    assert run.stdout.strip() == str(count)

    new = 'extern "C" __attribute__((visibility("default"))) int added() { return 7; }'
    (tree / "csrc" / "added.cpp").write_text(new)
    run_hook(tree, "build_editable", tmp_path / "second")
    run = run_python("-c", call.format("added"), package / "_sparse_gen.so", cwd=tmp_path)
    assert run.stdout.strip() == "7"


def test_source_distribution_can_build_the_library(source, tmp_path):
    run_hook(source, "build_sdist", tmp_path / "output")
    (built,) = (tmp_path / "output").iterdir()
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    for folder in ("csrc", "kernels", "sparse_gen"):
        files = (path for path in (source / folder).rglob("*") if path.is_file())
        needed |= {path.relative_to(source).as_posix() for path in files}
    assert needed <= names
    assert not any(name.startswith(("tests", "bench")) for name in names)
