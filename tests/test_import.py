"""What an import and `--help` load: nothing heavy until it is used."""

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "numpy", "scipy", "skimage", "matplotlib", "PIL", "triton", "safetensors", "yaml"]
LOADED = f"import json, sys; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"


def loaded_after(code: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", f"{code}\n{LOADED}"], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_after("import sparse_gen; sparse_gen.__version__; dir(sparse_gen)") == []


def test_using_the_package_loads_torch_but_no_plots_and_no_triton():
    code = "import sparse_gen as sg; sg.noise_input(1, (4, 4)); sg.search_mask; sg.fit; sg.compile"
    loaded = loaded_after(code)
    assert "torch" in loaded
    assert not {"matplotlib", "skimage", "scipy", "triton", "PIL"} & set(loaded)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["denoise", "--help"], ["mask", "show", "--help"], ["info", "--help"]]
)
def test_help_loads_nothing_heavy(arguments):
    code = f"""
import sys
from sparse_gen.cli import main
sys.argv = ["sparse-gen", *{arguments}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    assert loaded_after(code) == []


def test_an_import_does_not_initialise_cuda():
    code = "import sparse_gen as sg, torch; sg.noise_input(1, (4, 4)); assert not torch.cuda.is_initialized()"
    assert "torch" in loaded_after(code)


def test_every_public_name_is_there():
    import sparse_gen as sg

    for name in ["compile", "fit", "search_mask", "Mask", "noise_input", "masked_output"]:
        assert callable(getattr(sg, name))
    with pytest.raises(AttributeError):
        sg.no_such_name  # noqa: B018
