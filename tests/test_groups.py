"""Searches whose logits cover groups of weights: what a group is, its gradient, and what is kept."""

from math import floor

import pytest
import torch
from problems import SIZE, problem, small_net
from torch.nn import functional as F

import sparse_gen as sg
from sparse_gen.engine.functional import run_experiments, training_copy
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.masks.groups import Groups, group_name
from sparse_gen.masks.logits import Logits
from sparse_gen.masks.sampled import SampledNetwork
from sparse_gen.ops.block_sparse_conv2d import BlockPattern, block_sparse_conv2d
from sparse_gen.ops.concrete_mask import kl_divergence, soft_mask_reference
from sparse_gen.ops.philox import Stream

GROUPS = ["kernel", "filter", "4x1", "8x1", (3, 2), "5x7", "64x64"]
# Neither 4, 8, 3, 2, 5 nor 7 divides the channels.
SHAPES = {"a": (11, 9, 3, 3), "bias": (11,), "head": (3, 11, 1, 1)}
may_disconnect = pytest.mark.filterwarnings("ignore::sparse_gen.DisconnectedMaskWarning")


def layout():
    return ParameterLayout({name: torch.Size(shape) for name, shape in SHAPES.items()})


def members(shapes, group):
    """The group of every weight by its definition, as a number from 0 on in the order of first appearance."""
    keys = []
    for name, shape in shapes.items():
        for place in torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape)).tolist():
            if len(shape) != 4:
                keys.append((name, *place))
            elif group == "kernel":
                keys.append((name, *place[:2]))
            elif group == "filter":
                keys.append((name, place[0]))
            else:
                height, width = group if isinstance(group, tuple) else map(int, group.split("x"))
                keys.append((name, place[0] // height, place[1] // width, *place[2:]))
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([number[key] for key in keys])


def means_by_group(values, of):
    """(E, N) to (E, N): every entry replaced by its group's mean."""
    sums = values.new_zeros(len(values), int(of.max()) + 1).index_add(1, of, values)
    return (sums / of.bincount())[:, of]


@pytest.mark.parametrize("group", GROUPS)
def test_the_groups_are_what_their_names_say(group):
    groups, of = Groups(layout(), group), members(SHAPES, group)
    assert len(groups) == int(of.max()) + 1
    mine = groups.expand(torch.arange(len(groups))[None])[0]
    # The same partition, in whatever order.
    assert len(torch.stack([mine, of]).unique(dim=1).T) == len(groups)
    assert torch.equal(groups.sizes, mine.bincount())


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shared", [True, False])
def test_products_by_group(group, shared):
    groups, of = Groups(layout(), group), members(SHAPES, group)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, len(of), generator=generator, dtype=torch.float64)
    weight = weight[0] if shared else weight
    gradient = torch.randn(2, len(of), generator=generator, dtype=torch.float64)
    values = torch.randn(2, len(groups), generator=generator, dtype=torch.float64)
    expected = means_by_group(gradient * weight, of)
    torch.testing.assert_close(groups.expand(groups.mean_product(gradient, weight)), expected, rtol=1e-13, atol=1e-13)
    # As in a search of one experiment, whose masked weights are a part of a longer vector.
    out = torch.full((2, len(of) + 3), torch.nan, dtype=torch.float64)[:, : len(of)]
    groups.multiply(weight, values, out)
    assert torch.equal(out, weight * groups.expand(values))


@pytest.mark.parametrize("group", ["kernel", "filter", "8x1", (3, 2)])
@pytest.mark.parametrize("prunable", ["conv_weights", "all"])
def test_the_gradient_of_a_logit_is_that_of_the_loss(group, prunable):
    """In double, two experiments: autograd through the shared soft mask, with the KL of every weight."""
    z, y = sg.noise_input(6, SIZE, seed=[3, 4]).double(), problem()[1].double()
    net = training_copy(small_net().double())
    own = ParameterLayout.of(net, [n for n, p in net.named_parameters() if prunable == "all" or p.ndim == 4])
    whole = ParameterLayout.of(net, [n for n, _ in net.named_parameters() if n not in own.shapes])
    values = dict(net.named_parameters())
    weight, kept_whole = own.flatten(values), whole.flatten(values)[None].double()
    seeds, temperature, prior, kl_weight = torch.tensor([5, 6]), 0.2, 0.1, 1e-3
    logits = Logits(
        own, group, weight, seeds, initial=0.3, temperature=temperature, prior=prior, kl_weight=kl_weight, lr=0.05,
        betas=(0.9, 0.999), eps=1e-300,
    )  # fmt: skip
    sampled = SampledNetwork(net, own, whole, kept_whole, z, 2, "reference", None)
    logits.sample(sampled.masked_weight)

    of = logits.groups.expand(torch.arange(len(logits.groups))[None]).expand(2, -1)
    leaf = torch.nn.Parameter(torch.full_like(logits.values, 0.3))
    optimiser = torch.optim.Adam([leaf], lr=0.05, eps=1e-300)
    for step in range(3):
        soft = soft_mask_reference(leaf, seeds, torch.tensor(step), int(Stream.MASK), temperature)
        masked = weight * soft.gather(1, of)
        torch.testing.assert_close(sampled.masked_weight, masked.detach(), rtol=1e-9, atol=1e-12)
        outputs = run_experiments(net, own.views(masked) | whole.views(kept_whole), z)
        loss = (outputs - y).square().mean(dim=(1, 2, 3))
        kl = kl_divergence(leaf.gather(1, of), prior)
        torch.testing.assert_close(logits.kl(), kl.detach(), rtol=1e-12, atol=0)
        optimiser.zero_grad()
        (loss + kl_weight * kl).sum().backward()

        before = logits.exp_avg.clone()
        logits.update(sampled.masked_weight, sampled.loss(y)[1], step)
        gradient = (logits.exp_avg - 0.9 * before) / 0.1 * logits.sizes
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-7, atol=1e-9 * leaf.grad.abs().max().item())
        optimiser.step()
        torch.testing.assert_close(logits.values, leaf.detach(), rtol=0, atol=1e-7)


def search(net=None, seed=0, **arguments):
    z, y, _ = problem()
    net = net or small_net()
    return sg.search_mask(net, z, y, seed=seed, **{"density": 0.3, "steps": 4, "lr": 0.2, **arguments})


def of_groups(result, group):
    """For the mask of one experiment: kept or not, and the group, of every prunable weight."""
    shapes = {name: tuple(keep.shape) for name, keep in result.mask.tensors.items()}
    return torch.cat([keep.flatten() for keep in result.mask.tensors.values()]), members(shapes, group)


@may_disconnect
@pytest.mark.parametrize("group", GROUPS[:-1])
@pytest.mark.parametrize("prunable", ["conv_weights", "all"])
def test_whole_groups_are_kept_the_best_that_fit(group, prunable):
    result = search(group=group, prunable=prunable)
    keep, of = of_groups(result, group)
    size = of.bincount()
    kept = keep.double().new_zeros(len(size)).index_add(0, of, keep.double())
    assert ((kept == 0) | (kept == size)).all()

    score = torch.cat([logits.flatten() for logits in result.logits.values()])
    by_group = torch.empty(len(size)).scatter(0, of, score)
    assert torch.equal(by_group[of], score)
    out = by_group[kept == 0]
    assert by_group[kept > 0].min() >= out.max()
    # Neither more than asked for, nor would the next group have fitted.
    allowed = floor(0.3 * result.mask.total)
    assert result.mask.kept <= allowed
    ties = (kept == 0) & (by_group == out.max())
    assert result.mask.kept + size[ties].max() > allowed
    assert result.mask.recipe["search"]["group"] == group_name(group)


def test_a_group_of_one_weight_is_no_group():
    alone = search()
    for group in ("weight", "1x1", (1, 1)):
        grouped = search(group=group)
        assert all(torch.equal(grouped.logits[name], logits) for name, logits in alone.logits.items())
        assert grouped.settings == alone.settings


def test_groups_of_one_weight_each_give_the_same_bits():
    """The head's kernel planes are its weights, so both ways of computing have the same numbers to deal with."""
    given = {"prunable": ["head.weight"], "density": 0.9995, "steps": 12}
    alone, grouped = search(**given), search(group="kernel", **given)
    assert torch.equal(grouped.logits["head.weight"], alone.logits["head.weight"])
    assert torch.equal(grouped.mask.tensors["head.weight"], alone.mask.tensors["head.weight"])
    assert torch.equal(grouped.history["loss"], alone.history["loss"])
    assert grouped.groups is not None and alone.groups is None


def test_groups_learn():
    loss = search(group="4x1", steps=150).history["loss"]
    assert loss[-3:].mean() < 0.8 * loss[:3].mean()


@may_disconnect
def test_several_experiments_are_several_runs():
    net, (_, y, _) = small_net(), problem()
    z = sg.noise_input(6, SIZE, seed=[3, 4])
    given = {"density": 0.3, "steps": 4, "group": "4x1", "prunable": "all"}
    together = sg.search_mask(net, z, y, seed=[5, 6], **given)
    for e in range(2):
        alone = sg.search_mask(net, z[e : e + 1], y, seed=5 + e, **given)
        for name, keep in alone.mask.tensors.items():
            assert torch.equal(together.mask.tensors[name][e], keep)
            assert torch.equal(together.logits[name][e], alone.logits[name])
        for column in ("loss", "kl"):
            assert torch.equal(together.history[column][:, e], alone.history[column][:, 0])
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    of = members(shapes, "4x1")
    sample = torch.cat([keep.flatten(1) for keep in together.sample_masks(1)[0].tensors.values()], dim=1).double()
    torch.testing.assert_close(means_by_group(sample, of), sample, rtol=0, atol=1e-12)
    assert 0.2 < sample.mean() < 0.8


def test_a_strong_kl_pulls_every_probability_to_the_prior_whatever_the_size():
    logits = search(group="4x1", kl_weight=10.0, lr=0.2, steps=150, prior=0.1).logits
    assert torch.cat([logit.flatten() for logit in logits.values()]).sigmoid().mean().item() == pytest.approx(
        0.1, abs=0.01
    )


def test_such_a_mask_is_a_pattern_of_blocks():
    net = small_net()
    mask = search(net, group="8x1").mask
    name = "encoder.1.conv1.1.weight"
    pattern = BlockPattern.of(mask.tensors[name], (8, 1))
    weight = dict(net.named_parameters())[name].detach() * mask.tensors[name]
    x = torch.rand(1, weight.shape[1], 13, 9)
    found = block_sparse_conv2d(x, weight.flatten()[pattern.index][None], pattern)
    torch.testing.assert_close(found, F.conv2d(x, weight))


def test_a_settled_search_counts_weights_not_groups():
    rule = sg.stop.Settled(window=1, tolerance=0.1)
    sizes = torch.tensor([8, 1, 8, 1, 1])
    rule.update(0, torch.tensor([[5.0, 4, 3, 2, 1]]), 9, sizes)
    assert not rule.over
    # The 8 stays and a 1 goes for another: 1 of 9 kept weights, then none.
    assert not rule.update(1, torch.tensor([[5.0, 3, 2, 4, 1]]), 9, sizes)
    assert rule.update(2, torch.tensor([[5.0, 2, 1, 4, 1]]), 9, sizes)
    result = search(group="4x1", steps=400, stop=sg.stop.Settled(10, 0.2))
    assert result.settled_at < 400
    keep, of = of_groups(result, "4x1")
    torch.testing.assert_close(means_by_group(keep[None].double(), of)[0], keep.double())


def test_a_search_goes_on_where_it_was(tmp_path):
    given = {"group": "4x1", "steps": 6, "every": 3, "plan": "rule"}
    through = search(**given)
    stopper = sg.Checkpoints(tmp_path)
    with pytest.raises(sg.RunInterrupted):
        search(**given, checkpoints=stopper, progress=lambda *_: stopper.request_stop())
    with pytest.raises(ValueError, match="group"):
        search(**{**given, "group": None}, checkpoints=sg.Checkpoints(tmp_path, resume=True))
    resumed = search(**given, checkpoints=sg.Checkpoints(tmp_path, resume=True))
    assert all(torch.equal(resumed.logits[name], logits) for name, logits in through.logits.items())
    assert all(torch.equal(resumed.mask.tensors[name], keep) for name, keep in through.mask.tensors.items())


@pytest.mark.parametrize("group", ["column", "8", "8x", "0x1", (8,), (8, 0), (8.0, 1), 8, [True, 1], "8x1x1", ""])
def test_no_such_group(group):
    with pytest.raises(ValueError, match="expected group as 'weight', 'kernel', 'filter', or a block"):
        search(group=group)


def test_a_density_below_the_smallest_group():
    with pytest.raises(ValueError, match="expected a density that keeps a group 64x64, got one that allows"):
        search(group="64x64", density=0.79, prunable=["encoder.2.conv2.1.weight"], steps=1)
    z, y, _ = problem()
    with pytest.raises(ValueError, match="expected scope='global' and no floor for groups, got 'layer'"):
        sg.masks.find("oes", small_net(), z, y, density=0.3, scope="layer", group="8x1", steps=1)
    with pytest.raises(ValueError, match="expected options of 'snip' out of none, got 'group'"):
        sg.masks.find("snip", small_net(), z, y, density=0.3, group="8x1")
