"""Scores of untrained weights, against what trying every weight gives."""

import pytest
import torch
from test_random_mask import random_mask
from tiny import flat_mask, flat_scores, largest, loss, put, tiny_net, tiny_problem, weights_of
from torch.func import functional_call
from torch.nn import functional as F

import sparse_gen as sg

DENSITY = 0.5
TOTAL = 3 * 2 * 9 + 3 + 6 + 6 + 2
COUNT = int(DENSITY * TOTAL) - 11  # biases and normalisation are kept


def find(method, **options):
    z, y = tiny_problem()
    return sg.masks.find(method, tiny_net(), z, y, density=DENSITY, **options)


def test_magnitude_keeps_the_largest_weights():
    _, weight = weights_of(tiny_net())
    result = find("magnitude")
    assert torch.equal(flat_scores(result), weight.abs())
    assert torch.equal(flat_mask(result.mask), largest(weight.abs(), COUNT))


def test_random_is_the_random_mask():
    net = tiny_net()
    expected = random_mask(net, DENSITY, seed=5)
    result = find("random", seed=5)
    assert torch.equal(flat_mask(result.mask), flat_mask(expected))


def test_snip_is_the_loss_of_removing_a_little_of_each_weight():
    net, (z, y) = tiny_net(), tiny_problem()
    names, weight = weights_of(net)
    epsilon = 1e-5
    derivative = torch.empty_like(weight)
    for i in range(len(weight)):
        scaled = [weight.clone(), weight.clone()]
        scaled[0][i] *= 1 + epsilon
        scaled[1][i] *= 1 - epsilon
        derivative[i] = (loss(net, names, scaled[0], z, y) - loss(net, names, scaled[1], z, y)) / (2 * epsilon)
    result = find("snip")
    # Central differences err by epsilon², 1e-10, and by rounding, 1e-16 / epsilon.
    torch.testing.assert_close(flat_scores(result), derivative.abs(), rtol=1e-6, atol=1e-10)
    assert torch.equal(flat_mask(result.mask), largest(derivative.abs(), COUNT))


def test_grasp_removes_what_adds_to_the_gradient_flow():
    net, (z, y) = tiny_net(), tiny_problem()
    names, weight = weights_of(net)
    hessian = torch.autograd.functional.hessian(lambda flat: loss(net, names, flat, z, y), weight)
    gradient = torch.autograd.functional.jacobian(lambda flat: loss(net, names, flat, z, y), weight)
    score = torch.tensor([-weight[i] * sum(hessian[i] * gradient) for i in range(len(weight))], dtype=weight.dtype)
    result = find("grasp")
    torch.testing.assert_close(flat_scores(result), -score, rtol=1e-9, atol=1e-15)
    assert torch.equal(flat_mask(result.mask), largest(-score, COUNT))


def test_grasps_score_is_the_change_of_the_squared_gradient():
    """A step of a weight towards 0 changes ‖g‖² by twice its score: those that raise it most go first."""
    net, (z, y) = tiny_net(), tiny_problem()
    names, weight = weights_of(net)

    def flow(flat):
        return torch.autograd.functional.jacobian(lambda v: loss(net, names, v, z, y), flat).square().sum()

    removed = flat_scores(find("grasp")).argmin()
    epsilon = 1e-6
    smaller = weight.clone()
    smaller[removed] *= 1 - epsilon
    change = (flow(smaller) - flow(weight)) / epsilon
    assert change > 0
    assert change.item() == pytest.approx(-2 * flat_scores(find("grasp"))[removed].item(), rel=1e-3)


def hand_written_flow(flat):
    """R of the tiny network: absolute weights, ones, normalisation that divides by √(1 + eps)."""
    net = tiny_net()
    names, _ = weights_of(net)
    values = {n: v.abs() for n, v in put(net, names, flat).items()}
    x = F.pad(torch.ones(1, 2, 5, 6, dtype=torch.float64), (1, 1, 1, 1), mode="reflect")
    x = F.conv2d(x, values["0.weight"], values["0.bias"]) / (1 + 1e-5) ** 0.5
    return F.conv2d(F.leaky_relu(x, 0.2), values["3.weight"], values["3.bias"]).sum()


@pytest.mark.parametrize("rounds", [1, 3, 7])
def test_synflow_is_the_flow_lost_with_each_weight_in_rounds(rounds):
    """R is linear in every single weight, so that w·∂R/∂w is what removing it takes away."""
    _, weight = weights_of(tiny_net())
    keep = torch.ones(len(weight), dtype=torch.bool)
    for k in range(1, rounds + 1):
        left = weight * keep
        lost = torch.zeros_like(weight)
        for i in keep.nonzero()[:, 0]:
            without = left.clone()
            without[i] = 0
            lost[i] = hand_written_flow(left) - hand_written_flow(without)
        count = COUNT if k == rounds else round(len(weight) * (COUNT / len(weight)) ** (k / rounds))
        keep = torch.zeros_like(keep)
        keep[lost.argsort(descending=True)[:count]] = True
    result = find("synflow", rounds=rounds)
    torch.testing.assert_close(flat_scores(result), lost, rtol=1e-9, atol=1e-9)
    assert torch.equal(flat_mask(result.mask), keep)


def test_synflow_sees_no_data():
    z, y = tiny_problem()
    masks = [sg.masks.find("synflow", tiny_net(), z * s, 1 - s * y, density=DENSITY).mask for s in (0.3, 1.0)]
    assert torch.equal(flat_mask(masks[0]), flat_mask(masks[1]))


def test_synflow_of_a_deep_network_has_no_score_lost_to_the_sigmoid():
    net = sg.generators.Hourglass(in_channels=4, channels=(6, 8), depth=2)
    z = sg.noise_input(4, (16, 16))
    result = sg.masks.find("synflow", net, z, torch.full((1, 3, 16, 16), 0.5), density=0.3, rounds=4)
    kept = flat_mask(result.mask)
    assert (flat_scores(result)[kept] > 0).all()
    assert result.connected


# -- as the OES repository has it


def published(method, density, scope="global"):
    z, y = tiny_problem()
    return sg.masks.find(method, tiny_net(), z, y, density=density, scope=scope, variant="as_published")


def raw_gradient(output_only=False):
    net, (z, y) = tiny_net(), tiny_problem()
    output = net(z)
    scalar = output.sum() if output_only else (output - y).square().mean()
    return net, torch.autograd.grad(scalar, list(net.parameters()), create_graph=True)


@pytest.mark.filterwarnings("ignore::sparse_gen.DisconnectedMaskWarning")
@pytest.mark.parametrize("density", [0.25, 0.4])
@pytest.mark.parametrize("method", ["snip", "synflow"])
def test_the_published_keepers_keep_what_others_remove(method, density):
    _, gradients = raw_gradient(output_only=method == "synflow")
    score = torch.cat([g.detach().abs().flatten() for g in gradients])
    sparse = 1 - density
    expected = score > score.sort(descending=True).values[int(sparse * TOTAL) - 1]
    result = published(method, density)
    assert torch.equal(flat_mask(result.mask), expected)
    assert result.mask.kept == int(sparse * TOTAL) - 1  # and not ⌊density · N⌋
    assert (result.settings["sparse"], result.settings["keeps"]) == (sparse, "sparse")


@pytest.mark.filterwarnings("ignore::sparse_gen.DisconnectedMaskWarning")
def test_the_published_grasp_ranks_the_derivative_of_g_times_w():
    net, gradients = raw_gradient()
    product = sum((g * w).sum() for g, w in zip(gradients, net.parameters(), strict=True))
    score = torch.cat([s.flatten() for s in torch.autograd.grad(product, list(net.parameters()), retain_graph=True)])
    result = published("grasp", 0.25)
    gone = int(0.75 * TOTAL) - 1
    assert torch.equal(flat_mask(result.mask), ~largest(score, gone))
    assert result.settings["keeps"] == "1 - sparse"

    local = published("grasp", 0.25, scope="layer")
    for (name, w), g in zip(net.named_parameters(), gradients, strict=True):
        (own,) = torch.autograd.grad(product, w, retain_graph=True)
        ratio = (g.abs() / (own.abs() + 1e-10)).flatten().detach()
        expected = ratio > ratio.sort(descending=True).values[int(0.75 * len(ratio)) - 1]
        assert torch.equal(local.mask.tensors[name].flatten(), expected), name


@pytest.mark.filterwarnings("ignore::sparse_gen.DisconnectedMaskWarning")
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_the_published_removers_count_only_what_is_not_zero(method):
    _, weight = weights_of(tiny_net(), all_parameters=True)
    result = published(method, 0.25)
    kept = flat_mask(result.mask)
    nonzero = int((weight != 0).sum())
    assert nonzero == TOTAL - 3  # every β starts at 0
    assert kept.sum() == nonzero - -(-nonzero * 3 // 4)
    assert not kept[weight == 0].any()
    if method == "magnitude":
        assert weight[kept].abs().min() > weight[~kept].abs().max()


def test_the_published_variants_that_do_not_exist():
    z, y = tiny_problem()
    with pytest.raises(ValueError, match="scope='global' for the published magnitude"):
        published("magnitude", 0.25, scope="layer")
    with pytest.raises(ValueError, match="prunable='all' for variant='as_published', got 'conv_weights'"):
        sg.masks.find("snip", tiny_net(), z, y, density=0.5, prunable="conv_weights", variant="as_published")
    with pytest.raises(ValueError, match="of which it takes none and then fails"):
        published("snip", 0.75, scope="layer")


def test_the_hand_written_flow_is_positive_and_the_tiny_network_has_a_normalisation():
    """What the tests above lean on."""
    net, (z, _) = tiny_net(), tiny_problem()
    names, weight = weights_of(net)
    assert hand_written_flow(weight) > 0
    assert torch.equal(functional_call(net, put(net, names, weight), (z,)), net(z))
    assert sum(p.numel() for p in net.parameters()) == TOTAL
