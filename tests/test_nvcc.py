"""The CUDA sources compile for every GPU of a release build, within limits on what a thread needs; no GPU is needed."""

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
BINDINGS = sorted((ROOT / "csrc/cuda").glob("*.cpp"))
GPUS = ("sm_80", "sm_86", "sm_89", "sm_90")


def _setup():
    spec = importlib.util.spec_from_file_location("sparse_gen_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NVCC = _setup().find_nvcc()
pytestmark = [pytest.mark.nvcc, pytest.mark.skipif(NVCC is None, reason="nvcc was not found")]


@dataclass(frozen=True)
class Usage:
    """What one kernel needs on one GPU: registers a thread, bytes of shared memory a block, of stack and of spills."""

    kernel: str  # mangled
    registers: int
    shared: int
    stack: int
    spilled: int


def _run(*command):
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def _flags():
    warnings = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]
    return ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", *warnings]


@cache
def usage(source: Path, folder: Path) -> dict[str, list[Usage]]:
    """Compile for all GPUs at once, PTX of the last included, and read what ptxas says of every kernel."""
    # The sources use nothing that sm_86 or sm_89 have and sm_80 has not: one front end serves the three.
    codes = ["-gencode=arch=compute_80,code=[sm_80,sm_86,sm_89]", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
    said = _run(NVCC, *_flags(), *codes, "--resource-usage", "-c", source, "-o", folder / f"{source.stem}.o")
    found = {}
    for kernel, gpu, rest in re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'\n((?:(?!.*Compiling).*\n?)*)", said
    ):
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) .*, (\d+) bytes", rest).groups())
        shared = re.search(r"(\d+) bytes smem", rest)
        registers = int(re.search(r"Used (\d+) registers", rest)[1])
        found.setdefault(gpu, []).append(
            Usage(kernel, registers, int(shared[1]) if shared else 0, stack, stores + loads)
        )
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nvcc")


@cache
def ptx(source: Path, folder: Path) -> dict[str, str]:
    """The PTX of every kernel by its mangled name."""
    path = folder / f"{source.stem}.ptx"
    _run(NVCC, *_flags(), "-arch=compute_90", "-ptx", source, "-o", path)
    return dict(re.findall(r"\.entry (\w+)\((.*?)^}", path.read_text(), re.MULTILINE | re.DOTALL))


def test_a_release_build_is_for_these_gpus():
    # CMake's words: "real" leaves the PTX out, and the last has it.
    assert _setup().CUDA_ARCHITECTURES == "80-real;86-real;89-real;90"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_source_compiles_for_every_gpu(source, folder):
    found = usage(source, folder)
    assert set(found) == set(GPUS)
    kernels = {u.kernel for u in found["sm_90"]}
    assert kernels
    assert all({u.kernel for u in found[gpu]} == kernels for gpu in GPUS)


# Registers a thread and bytes of shared memory on sm_90, by a pattern in the kernel's mangled name ("f" is float, "d"
# double). The convolutions promise the compiler six blocks of 128 threads, the weights' gradient five; they stage 128
# weights of 16 bytes (24 in double) and a byte, or of 36 (64) with their loads. Those of the tap fold promise three
# blocks of 256 threads forward and nearest, otherwise two, and one in double; how much they share, the launch says. The
# mask's float kernels leave room for four blocks of 256 threads, those of the block-sparse convolution for
# two; how much the latter share, the launch says, and tests/block_on_host.cpp bounds.
LIMITS = {
    "HaloConvolutionI": (128, 0),
    "HaloWeightGradientI": (128, 0),
    "PackBodyI|PlaceBody|FoldPadding": (48, 0),
    r"ForwardBlockIfLi\dENS0_6NoLoad": (80, 2176),
    r"ForwardBlockIdLi\dENS0_6NoLoad": (80, 3200),
    r"ForwardBlockIfLi\dENS0_4Load": (80, 4608),
    r"ForwardBlockIdLi\dENS0_4Load": (80, 8192),
    "InputGradientBlockIf": (80, 2176),
    "InputGradientBlockId": (80, 3200),
    "WeightGradientWarpI": (96, 0),
    "add_chunksI": (64, 4096),
    "UpForwardIfLb0": (80, 0),
    "UpForwardIfLb1": (128, 0),
    "UpForwardId": (255, 0),
    "UpBackwardIfLb.ELi1": (128, 0),
    "UpBackwardIfLb.ELi4": (128, 0),
    "UpBackwardId": (255, 0),
    "updateILb0Ef": (64, 8),
    "updateILb1Ef": (64, 8),
    "updateILb0Ed": (96, 16),
    "updateILb1Ed": (96, 16),
    "SampleBodyIf": (32, 0),
    "SampleBodyId": (64, 0),
    "GradientBodyIf": (32, 0),
    "GradientBodyId": (64, 0),
}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_registers_and_shared_memory_stay_within_limits(source, folder):
    for found in usage(source, folder)["sm_90"]:
        (limits,) = (limits for name, limits in LIMITS.items() if re.search(name, found.kernel))
        assert found.registers <= limits[0], found
        assert found.shared <= limits[1], found


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_nothing_spills(source, gpu, folder):
    assert [u for u in usage(source, folder)[gpu] if u.spilled or u.stack] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_sums_have_a_fixed_order(source, folder):
    found = ptx(source, folder)
    assert found
    for kernel, code in found.items():
        assert not re.search(r"\b(atom|red)\.", code), kernel


@pytest.mark.parametrize("kernel", ["updateILb1Ef", "updateILb0Ef"])
def test_concrete_mask_update_moves_36_bytes_a_logit(kernel, folder):
    """Five arrays read and four written: for rows of whole fours as one vector each, else element by element."""
    found = ptx(ROOT / "csrc/cuda/concrete_mask.cu", folder)
    (code,) = (code for name, code in found.items() if kernel in name)
    reads = re.findall(r"ld\.global\.(?:nc\.)?(v4\.)?[fb]32", code)
    writes = re.findall(r"st\.global\.(?:wb\.)?(v4\.)?[fb]32", code)
    if kernel == "updateILb1Ef":
        assert (reads, writes) == (["v4."] * 5, ["v4."] * 4)
    else:
        assert (reads, writes) == ([""] * 20, [""] * 16)


@pytest.mark.parametrize("kernel", ["HaloConvolution", "HaloWeightGradient"])
def test_block_sparse_conv2d_multiplies_on_tensor_cores(kernel, folder):
    """Of a group of 8, 16 or 32 channels two products an eight forward, one for the gradient; without TF32 none."""
    found = ptx(ROOT / "csrc/cuda/block_sparse_conv2d.cu", folder)
    products = {
        tuple(re.search(r"(TensorCores|ThreadByThread)ELi(\d)", name).groups()): len(
            re.findall(r"mma\.sync\.\S*tf32", code)
        )
        for name, code in found.items()
        if kernel in name
    }
    assert {key for key, count in products.items() if count == 0} == {("ThreadByThread", "1"), ("ThreadByThread", "2")}
    for (product, eights), count in products.items():
        if product == "TensorCores":
            assert count % (int(eights) * (2 if kernel == "HaloConvolution" else 1)) == 0


@pytest.mark.parametrize(
    ("body", "kib"),
    [
        ("UpForward<float, false>", 227 // 3),  # three blocks on a multiprocessor of sm_90
        ("UpBackward<float, false, 4>", 227 // 4),
        ("UpForward<double, true>", 99),  # the most that a block may have on sm_86
    ],
)
def test_what_the_blocks_of_the_tap_fold_share(body, kib, folder):
    program = folder / "shared.cpp"
    lines = (
        '#include "cuda/sparse_upsample_conv2d_gradient_body.h"',
        f"static_assert(sizeof(sparse_gen::cuda::{body}::Shared) <= {kib} * 1024);",
    )
    program.write_text("\n".join([*lines, ""]))
    _run(_setup().find_compiler(), "-std=c++20", f"-I{ROOT / 'csrc'}", "-fsyntax-only", program)


def test_the_tap_fold_reads_and_writes_whole_pairs(folder):
    """The output has two pixels a lane and row: eight stores of two; the gradient's rows are read likewise."""
    found = ptx(ROOT / "csrc/cuda/sparse_upsample_conv2d.cu", folder)
    (forward,) = (code for name, code in found.items() if "UpForwardIfLb0" in name)
    assert re.findall(r"st\.global\.(v2\.)?[fb]32", forward) == ["v2."] * 8
    (backward,) = (code for name, code in found.items() if "UpBackwardIfLb0ELi4" in name)
    assert len(re.findall(r"ld\.global\.nc\.v2\.[fb]32", backward)) >= 8


@pytest.mark.parametrize("source", BINDINGS, ids=lambda path: path.stem)
def test_bindings_compile_against_the_stable_headers(source, folder):
    """Only a CUDA build of torch links them; their declarations are in every build's headers."""
    definitions = ["-DUSE_CUDA", "-DSPARSE_GEN_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = [f"-I{ROOT / 'csrc'}", "-isystem", Path(torch.__file__).parent / "include"]
    compiler = _setup().find_compiler()
    _run(
        compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-fsyntax-only", *definitions,
        *includes, source,
    )  # fmt: skip
