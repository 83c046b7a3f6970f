"""Captured steps on a real GPU against the same steps call by call."""

import warnings

import pytest
import torch
from problems import SIZE, problem, random_mask, small_net

import sparse_gen as sg
from sparse_gen.engine import capture

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to capture on"),
]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    for name, value in {"deterministic": True, "benchmark": False}.items():
        monkeypatch.setattr(torch.backends.cudnn, name, value)


@pytest.fixture
def replays(monkeypatch):
    """Counts captures, and makes one that fails an error instead of a warning."""
    count = []
    capturing = capture.CudaGraphs.capture
    monkeypatch.setattr(capture.CudaGraphs, "capture", lambda self, body: count.append(1) or capturing(self, body))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="steps run call by call")
        yield count


def on_gpu(experiments=1):
    _, y, clean = problem()
    z = sg.noise_input(6, SIZE, seed=list(range(experiments)), device="cuda")
    # In double, where another order of adding up is far below any tolerance.
    return small_net().to("cuda").double(), z.double(), y.to("cuda").double(), clean.to("cuda").double()


def fit(experiments=1, plain=False, **arguments):
    net, z, y, clean = on_gpu(experiments)
    mask = random_mask(small_net(), 0.5, experiments=experiments if experiments > 1 else None)
    module = net if plain else sg.compile(net, mask, z, plan="rule")
    run = sg.fit(module, z, y, **{"steps": 40, "every": 5, "clean": clean, **arguments})
    parameters = torch.cat([p.detach().flatten() for p in module.parameters()])
    return [run.image, parameters, run.history["loss"], run.history["psnr"]], run


FITS = {
    "plain module": {"plain": True, "lr": 1e-3},
    "compiled": {},
    "experiments": {"experiments": 3},
    "jitter": {"input_jitter": 0.03},
    "langevin and average": {"langevin": 0.5, "average": 0.9},
    "rule": {"stop": lambda: sg.stop.WMV(4, 1000)},
    "rule that ends it": {"stop": lambda: sg.stop.EMV(0.5, 3), "lr": 0.2, "steps": 300},
}


@pytest.mark.parametrize("options", FITS.values(), ids=FITS)
def test_a_captured_fit_is_the_fit(monkeypatch, replays, options):
    def made():
        return {name: value() if callable(value) else value for name, value in options.items()}

    captured, run = fit(**made())
    assert replays == [1]
    monkeypatch.setenv("SPARSE_GEN_CAPTURE", "0")
    expected, other = fit(**made())
    assert run.history.step == other.history.step
    assert run.stopped_at == other.stopped_at
    for got, want in zip(captured, expected, strict=True):
        # Double, 40 steps of Adam: a γ whose gradient is 0 goes where its rounding points.
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("group", [None, "kernel"])
@pytest.mark.parametrize("experiments", [1, 2])
def test_a_captured_search_is_the_search(monkeypatch, replays, group, experiments):
    net, z, y, _ = on_gpu(experiments)

    def search():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sg.DisconnectedMaskWarning)
            return sg.search_mask(
                net, z, y, steps=30, density=0.2, group=group, seed=list(range(experiments)), plan="rule"
            )

    captured = search()
    assert replays == [1]
    monkeypatch.setenv("SPARSE_GEN_CAPTURE", "0")
    expected = search()
    torch.testing.assert_close(captured.history["loss"], expected.history["loss"], rtol=1e-6, atol=1e-8)
    for name, logits in expected.logits.items():
        torch.testing.assert_close(captured.logits[name], logits, rtol=1e-6, atol=1e-6)
