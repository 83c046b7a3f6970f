"""Without the compiled library everything runs on the reference, and says so once."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import pytest
import torch

import sparse_gen
from sparse_gen.ops import dispatch
from sparse_gen.ops.dispatch import backends, operators
from sparse_gen.ops.extension import status

CODE = """
import json, sys, warnings
import torch
import sparse_gen as sg
from sparse_gen.ops.extension import status
assert sg.__file__.startswith(sys.argv[1]), sg.__file__
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    z = sg.noise_input(4, (12, 13), seed=3)
    net = sg.generators.Hourglass(4, 1, channels=(3, 4), seed=0)
    found = sg.search_mask(net, z, torch.full((1, 1, 12, 13), 0.5), density=0.5, steps=3)
    sg.noise_input(4, (12, 13), seed=3)
print(json.dumps({
    "said": [str(w.message) for w in caught if "plain-PyTorch reference" in str(w.message)],
    "available": status().available,
    "z": z.double().sum().item(),
    "logits": found.logits["head.weight"].flatten().tolist(),
}))
"""


@pytest.fixture(scope="module")
def without_library(tmp_path_factory):
    """The package copied to a folder of its own, as an installation without a compiler leaves it."""
    folder = tmp_path_factory.mktemp("pure")
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(Path(sparse_gen.__file__).parent, folder / "sparse_gen", ignore=ignore)
    record = {"library": None, "reason": "no C++ compiler was found"}
    (folder / "sparse_gen" / "_build.json").write_text(json.dumps(record))
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(folder)], capture_output=True, text=True, cwd=folder, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def test_it_is_said_once_and_why(without_library):
    assert not without_library["available"]
    expected = "sparse-gen runs on its plain-PyTorch reference, which is slower: no C++ compiler was found"
    assert without_library["said"] == [expected]


def test_the_reference_gives_the_same_numbers(without_library):
    z = sparse_gen.noise_input(4, (12, 13), seed=3)
    net = sparse_gen.generators.Hourglass(4, 1, channels=(3, 4), seed=0)
    y = torch.full((1, 1, 12, 13), 0.5)
    found = sparse_gen.search_mask(net, z, y, density=0.5, steps=3)
    assert without_library["z"] == z.double().sum().item()
    ours = found.logits["head.weight"].flatten()
    torch.testing.assert_close(torch.tensor(without_library["logits"]), ours, rtol=1e-3, atol=1e-4)


def test_every_operator_says_where_it_runs():
    assert {"concrete_mask", "concrete_mask_backward", "concrete_mask_update", "philox", "sparse_conv2d"} <= set(
        operators()
    )
    for name in operators():
        found = backends(name)
        assert found["reference"] is None
        assert found["cpu"] == status().reason
        assert torch.cuda.is_available() or (found["triton"] and found["cuda"])
    with pytest.raises(ValueError, match="expected an operator out of apply_load"):
        backends("convolution")


def test_a_compiled_cuda_kernel_is_preferred_to_python(monkeypatch):
    # The compiled library registers its kernels when it loads, before the operators are defined.
    compiled = torch.library.Library("sparse_gen", "IMPL")
    monkeypatch.setattr(dispatch, "_stems", dict(dispatch._stems))
    operators = {name: f"{name}(Tensor x) -> Tensor" for name in ("compiled_on_cuda", "python_on_cuda")}
    compiled.impl("compiled_on_cuda", lambda x: x, "CUDA", allow_override=True)
    for name, schema in operators.items():
        dispatch.register_operator(schema, reference=lambda x: x, fake=torch.empty_like, stem="none")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_gen::{name}", "CUDA")
    assert backends("compiled_on_cuda")["cuda"] == (None if torch.cuda.is_available() else "no CUDA device")
    assert backends("python_on_cuda")["cuda"] not in (None, "no CUDA device")


def test_every_triton_launcher_takes_what_its_operator_takes():
    pytest.importorskip("triton", reason="triton is not installed")
    cpu_only = {
        f"masked_conv2d_{layout}{way}"
        for layout in ("taps", "tiles", "split", "split_taps", "split_kept")
        for way in ("", "_backward")
    } | {"masked_conv2d_split_parts"}
    for name, stem in dispatch._stems.items():
        if find_spec(f"sparse_gen.kernels.{stem}") and name not in cpu_only:
            launcher = getattr(import_module(f"sparse_gen.kernels.{stem}"), name)
            schema = getattr(torch.ops.sparse_gen, name).default._schema
            assert len(signature(launcher).parameters) == len(schema.arguments), name


def test_a_lower_instruction_set_can_be_asked_for_but_not_a_higher(monkeypatch):
    if not status().available:
        pytest.skip(f"no compiled library: {status().reason}")
    best = status().instruction_set
    monkeypatch.setenv("SPARSE_GEN_ISA", "baseline")
    assert status().instruction_set == "baseline"
    for higher in ("amx", "nonsense"):
        monkeypatch.setenv("SPARSE_GEN_ISA", higher)
        assert status().instruction_set == best
