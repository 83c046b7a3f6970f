"""Triton's `conv_norm` and `norm_conv_backward`: every output against float64, and the machine code."""

import pytest
import torch
from ahead_of_time import compile_for_sm_90
from test_conv_norm import ARGUMENTS, backward_problem, doubles, forward, problem

from sparse_gen.ops.conv_norm import conv_norm_reference

# DESIGN's "ieee": a float32 operator's norm-wise error against float64.
TOLERANCE = 5e-6
# Rows that one program holds or not, of sums that are split or not: one of these pairs shows both of both.
WAYS = (("whole", "tiles split"), ("whole split", "tiles"))
# Each with one normalisation or two, and one of the pairs, of which both see both: the interpreter takes its time.
CASES = [
    (way, arguments, number % 2 == 0)
    for number, arguments in enumerate([*ARGUMENTS, ARGUMENTS[0]])
    for way in WAYS[number // 2 % 2]
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernel(poisoned, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return pytest.importorskip("sparse_gen.kernels.conv_norm", reason="triton is not installed")


@pytest.fixture
def kernel_of(request, kernel, monkeypatch):
    if "split" in request.param:
        monkeypatch.setattr("sparse_gen.kernels.splits.MIN_ITERATIONS", 1)
    else:
        monkeypatch.setattr("sparse_gen.kernels.splits.PROGRAMS", 1)
    if "tiles" in request.param:
        monkeypatch.setattr("sparse_gen.kernels.norm_act.ROW", 16)
        monkeypatch.setattr("sparse_gen.kernels.norm_act.MAX_SPLITS", 3)
    return kernel


def there(given):
    return [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in given]


@pytest.mark.interpreter
@pytest.mark.parametrize(("kernel_of", "arguments", "second"), CASES, ids=str, indirect=["kernel_of"])
def test_output_load_and_moments(kernel_of, arguments, second):
    x, weight, bias, load, norms = problem(2, arguments, second, (11, 9))
    wanted = forward(
        conv_norm_reference, *doubles([x, weight, bias, load]), doubles(norms), arguments
    )  # fmt: skip
    got = forward(kernel_of.conv_norm, *there([x, weight, bias, load]), there(norms), arguments)
    for g, want in zip(got, wanted, strict=True):
        assert g.shape == want.shape
        assert (g.cpu().double() - want).norm() <= TOLERANCE * want.norm()


@pytest.mark.interpreter
@pytest.mark.parametrize(("kernel_of", "arguments", "second"), CASES, ids=str, indirect=["kernel_of"])
def test_gradients(kernel_of, arguments, second):
    given, wanted = backward_problem(2, arguments, second)
    # In front of a second normalisation the exact gradients of the first γ and β nearly vanish; see `norm_load`.
    floor = wanted[3].norm() if second else 0
    for g, want in zip(kernel_of.norm_conv_backward(*there(given)), wanted, strict=True):
        assert g.shape == want.shape
        assert (g.cpu().double() - want).norm() <= TOLERANCE * max(want.norm(), floor)


@pytest.mark.interpreter
def test_the_same_bits_beside_other_experiments(kernel, monkeypatch):
    monkeypatch.setattr("sparse_gen.kernels.splits.MIN_ITERATIONS", 1)
    given, _ = backward_problem(3, (1, 1, 1, 1, False), True, (5, 4))
    alone = [t[1:2].contiguous() if isinstance(t, torch.Tensor) else t for t in given]
    for own, all_of_them in zip(
        kernel.norm_conv_backward(*there(alone)), kernel.norm_conv_backward(*there(given)), strict=True
    ):
        assert torch.equal(own, all_of_them[1:2])


@pytest.mark.aot
def test_compiles_for_sm_90_without_spills():
    norm_act = pytest.importorskip("sparse_gen.kernels.norm_act", reason="triton is not installed")
    tables = {f"p_{name}_{axis}": "*i32" for name in ("place", "count") for axis in "yx"}
    scalars, row = {"eps": "fp32", "slope": "fp32", "eps2": "fp32"}, norm_act.ROW
    gradient = {"ADD": True, "SECOND": True, "SPLITS2": 256, "SPLITS": 64, "BLOCK": row, "ADD_BLOCK": 1024}
    configurations = [
        ("_folded_sums_kernel", scalars | tables, {"SECOND": second, "BLOCK_H": 16, "BLOCK_W": 64}, {"num_warps": 4})
        for second in (False, True)
    ] + [
        ("_gradient_kernel", scalars | tables, gradient | {"FOLD": whole, "WHOLE": whole}, {"num_warps": warps})
        for whole, warps in ((False, 8), (True, 16))
    ]  # fmt: skip
    for code in compile_for_sm_90("norm_load_gradient", configurations):
        # Shared memory joins the warps' sums; 128 registers leave room for 512 threads.
        code.assert_within(shared=4096, registers=128)
    (code,) = compile_for_sm_90(
        "norm_load",
        [("_row_load_kernel", scalars, {"SECOND": True, "ADD": True, "BIAS": True, "BLOCK": row}, {"num_warps": 8})],
    )
    code.assert_within(shared=512, registers=128)
