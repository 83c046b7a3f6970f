"""`masks.find`: what holds for every method."""

from math import floor

import pytest
import torch
from problems import SIZE, problem, small_net
from tiny import flat_mask

import sparse_gen as sg
from sparse_gen.masks.pruning import choose, shares

FAST = {"oes": {"steps": 3}, "imp": {"steps": 3, "fraction": 0.6}, "synflow": {"rounds": 3}}
may_disconnect = pytest.mark.filterwarnings("ignore::sparse_gen.DisconnectedMaskWarning")


def find(method, net=None, **arguments):
    z, y, _ = problem()
    return sg.masks.find(method, net or small_net(), z, y, **{"density": 0.2, **FAST.get(method, {}), **arguments})


def test_the_methods():
    assert sg.masks.METHODS == ("oes", "imp", "magnitude", "random", "snip", "grasp", "synflow")


@may_disconnect
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("prunable", ["conv_weights", "all"])
@pytest.mark.parametrize("method", sg.masks.METHODS)
def test_every_method_keeps_exactly_the_density(method, scope, prunable):
    net = small_net()
    result = find(method, net, density=0.23, scope=scope, prunable=prunable)
    total = sum(p.numel() for p in net.parameters())
    assert (result.mask.kept, result.mask.total) == (floor(0.23 * total), total)
    assert (result.mask.whole == {}) == (prunable == "all")
    for name, parameter in net.named_parameters():
        keep = result.mask.tensors.get(name)
        kept = parameter.flatten() if keep is None else parameter[keep]
        assert torch.equal(result.mask.weights[name], kept.detach())
    assert isinstance(result.connected, bool)
    assert result.mask.recipe["net"] == net.recipe()
    assert result.mask.recipe["search"]["method"] == method
    if scope == "layer":
        share = result.mask.kept - sum(p.numel() for n, p in net.named_parameters() if n in result.mask.whole)
        share /= sum(keep.numel() for keep in result.mask.tensors.values())
        for keep in result.mask.tensors.values():
            assert abs(int(keep.sum()) - share * keep.numel()) < 1


@may_disconnect
@pytest.mark.parametrize("method", sg.masks.METHODS)
def test_a_floor_is_kept(method):
    result = find(method, floor=40, density=0.3)
    assert result.mask.kept == floor(0.3 * result.mask.total)
    assert all(int(keep.sum()) >= min(40, keep.numel()) for keep in result.mask.tensors.values())
    share = find(method, floor=0.1, density=0.3)
    assert all(keep.double().mean() >= 0.1 for keep in share.mask.tensors.values())
    assert result.mask.recipe["search"]["floor"] == 40


def test_without_a_floor_a_layer_can_be_empty():
    net = small_net()
    with torch.no_grad():
        net.head.weight.mul_(1e-3)
    with pytest.warns(sg.DisconnectedMaskWarning, match="disconnects the network at head"):
        result = find("magnitude", net)
    assert not result.connected and result.disconnected_at == "head"
    assert result.mask.tensors["head.weight"].sum() == 0
    assert find("magnitude", net, floor=1).mask.tensors["head.weight"].sum() == 1


@may_disconnect
@pytest.mark.parametrize("method", sg.masks.METHODS)
def test_the_seed_decides_ties_and_draws_and_nothing_else(method):
    same = [flat_mask(find(method, seed=1).mask) for _ in range(2)]
    assert torch.equal(*same)


def test_ties_are_broken_by_the_seed():
    net = small_net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.5)
    first, second = (flat_mask(find("magnitude", net, seed=seed).mask) for seed in (1, 2))
    assert not torch.equal(first, second)
    # 1,100 of 2,900 weights or so: two draws share that fraction, give or take.
    share = (first & second).sum() / first.sum()
    assert abs(share - first.double().mean()) < 0.1


@may_disconnect
@pytest.mark.parametrize("method", sg.masks.METHODS)
def test_several_experiments_are_several_runs(method):
    net, (_, y, _) = small_net(), problem()
    z = sg.noise_input(6, SIZE, seed=[3, 4])
    options = {"density": 0.2, **FAST.get(method, {})}
    together = sg.masks.find(method, net, z, y, seed=[5, 6], **options)
    assert together.mask.experiments == 2
    for e in range(2):
        alone = sg.masks.find(method, net, z[e : e + 1], y, seed=5 + e, **options)
        for name, keep in alone.mask.tensors.items():
            assert torch.equal(together.mask.tensors[name][e], keep)
        for column in alone.history.columns:
            assert torch.equal(together.history[column][:, e], alone.history[column][:, 0])
    sg.compile(net, together.mask, z)


@may_disconnect
@pytest.mark.parametrize("method", ["magnitude", "snip", "imp"])
def test_a_stack_has_a_mask_for_each_network(method):
    nets, (z, y, _) = [small_net(1), small_net(2)], problem()
    options = {"density": 0.2, **FAST.get(method, {})}
    together = sg.masks.find(method, sg.stack(nets), z, y, **options)
    for e, net in enumerate(nets):
        alone = sg.masks.find(method, net, z, y, **options).mask
        assert all(torch.equal(together.mask.tensors[n][e], keep) for n, keep in alone.tensors.items())
    assert [r["arguments"]["seed"] for r in together.mask.recipe["net"]] == [1, 2]
    sg.compile(sg.stack(nets), together.mask, z)


def test_snip_of_everything_cuts_an_hourglass_where_a_norm_follows_a_norm():
    """Only an activation and up-sampling part these γ from the next normalisation, which removes their scale."""
    z, y, _ = problem()
    net = small_net().double()
    with pytest.warns(sg.DisconnectedMaskWarning, match="disconnects the network at encoder.2.norm2"):
        result = sg.masks.find("snip", net, z.double(), y.double(), density=0.5, prunable="all")
    scores = {name: score.max().item() for name, score in result.scores.items() if name.endswith("norm2.weight")}
    without = {"encoder.2.norm2.weight", "decoder.0.norm2.weight", "decoder.1.norm2.weight"}
    assert {name for name in scores if not result.mask.tensors[name].any()} == without
    # BN's eps leaves 1e-5 over the variance of what was a gradient.
    assert max(scores[name] for name in without) < 1e-3 * min(scores[name] for name in scores.keys() - without)


def test_oes_is_the_search():
    z, y, _ = problem()
    found = find("oes")
    searched = sg.search_mask(small_net(), z, y, density=0.2, steps=3)
    assert all(torch.equal(found.mask.tensors[n], k) for n, k in searched.mask.tensors.items())
    assert found.mask.recipe == searched.mask.recipe
    layered = find("oes", scope="layer")
    assert all(torch.equal(layered.logits[n], logits) for n, logits in searched.logits.items())


@pytest.mark.parametrize("how", [{}, {"scope": "layer"}, {"floor": 40}])
def test_oes_takes_a_density_an_experiment(how):
    found = find("oes", density=[0.3, 0.5], seed=[0, 1], **how)
    for e, density in enumerate([0.3, 0.5]):
        alone = find("oes", density=density, seed=e, **how)
        assert alone.mask.kept == floor(density * alone.mask.total)
        assert all(torch.equal(found.mask.tensors[n][e], k) for n, k in alone.mask.tensors.items())
    with pytest.raises(ValueError, match="density above 0 and at most 1, got"):
        find("snip", density=[0.3, 0.5])


def test_masks_go_through_their_file_and_the_engine(tmp_path):
    net, (z, y, _) = small_net(), problem()
    mask = find("snip", net, recipe={"target": "noisy"}).mask
    mask.save(tmp_path / "m.safetensors")
    again = sg.Mask.load(tmp_path / "m.safetensors")
    assert again.recipe == mask.recipe
    assert again.recipe["target"] == "noisy"
    run = sg.fit(sg.compile(net, again, z), z, y, steps=2)
    assert run.image.shape == y.shape


def test_the_network_is_left_alone():
    for method in sg.masks.METHODS:
        net = small_net()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        find(method, net, density=0.5)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), method
        assert all(p.grad is None and p.requires_grad for p in net.parameters()), method


def test_methods_without_logits_draw_no_masks():
    with pytest.raises(ValueError, match="expected a result with logits"):
        find("magnitude").sample_masks(1)


@pytest.mark.parametrize(
    ("sizes", "count", "least", "expected"),
    [
        ([10, 10], 6, [0, 0], [3, 3]),
        ([10, 20, 30], 6, [0, 0, 0], [1, 2, 3]),
        ([10, 10, 10], 4, [0, 0, 0], [2, 1, 1]),
        ([100, 10, 1], 11, [1, 1, 1], [9, 1, 1]),
        ([100, 10], 20, [0, 10], [10, 10]),
        ([3, 7], 10, [0, 0], [3, 7]),
    ],
)
def test_shares(sizes, count, least, expected):
    assert shares(sizes, count, least) == expected


def test_choosing_within_candidates_with_a_floor():
    from sparse_gen.engine.layout import ParameterLayout

    layout = ParameterLayout({"a": torch.Size([4]), "b": torch.Size([3])})
    scores = torch.tensor([9.0, 8, 7, 6, 3, 2, 1])
    everything, seed = torch.ones(7, dtype=torch.bool), torch.tensor([0])

    def kept(count, candidates=everything, **how):
        arguments = {"scope": "global", "floor": None, **how}
        return choose(scores, candidates, count, layout, seed=seed, **arguments).nonzero()[:, 0].tolist()

    assert kept(3) == [0, 1, 2]
    assert kept(3, floor=1) == [0, 1, 4]
    assert kept(4, scope="layer") == [0, 1, 4, 5]
    within = torch.tensor([False, True, True, True, False, True, True])
    assert kept(3, within) == [1, 2, 3]
    assert kept(3, within, floor=1) == [1, 2, 5]
    assert kept(5, within, floor=2) == [1, 2, 3, 5, 6]


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("oess", {}, "expected method as one of oes, imp, magnitude, random, snip, grasp, synflow, got 'oess'"),
        ("snip", {"scope": "local"}, "expected scope as one of global, layer, got 'local'"),
        ("snip", {"variant": "paper"}, "expected variant as None or 'as_published', got 'paper'"),
        ("oes", {"variant": "as_published"}, "got 'as_published', use preset='paper'"),
        ("snip", {"steps": 3}, "expected options of 'snip' out of none, got 'steps'"),
        ("synflow", {"rounds": 0}, "rounds as an integer of at least 1, got 0"),
        ("oes", {"rounds": 3}, "expected options of 'oes' out of"),
        ("snip", {"density": 0.001}, "parameters are always kept"),
        ("snip", {"density": 1.5}, "density above 0 and at most 1"),
        ("snip", {"floor": 0}, "expected floor as a count of weights or a share"),
        ("snip", {"floor": 1.5}, r"expected floor as a share of a layer in \(0, 1\)"),
        ("oes", {"floor": -1}, "expected floor as a count"),
        ("snip", {"floor": 10_000}, "expected a floor that .* kept weights allow"),
        ("snip", {"floor": 10_000, "scope": "layer"}, "expected a floor that .* kept weights allow"),
        ("snip", {"prunable": "weights"}, "expected prunable as"),
        ("snip", {"seed": 0.5}, "expected a seed"),
    ],
)
def test_bad_arguments(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        find(method, **arguments)


def test_tensors_that_do_not_fit():
    z, y, _ = problem()
    with pytest.raises(ValueError, match="network's output shape"):
        sg.masks.find("snip", small_net(), z, y[:, :1], density=0.2)
    with pytest.raises(ValueError, match=r"expected 3 experiments \(or 1\) in z, got 2"):
        sg.masks.find("snip", small_net(), z.expand(2, -1, -1, -1), y.expand(3, -1, -1, -1), density=0.2)
    with pytest.raises(ValueError, match="in evaluation mode"):
        sg.masks.find("snip", small_net().eval(), z, y, density=0.2)
    net = small_net()
    with torch.no_grad():
        net.head.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="expected finite scores"):
        sg.masks.find("snip", net, z, y, density=0.2)
