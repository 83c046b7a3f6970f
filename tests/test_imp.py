"""Iterative magnitude pruning, against the loop written out."""

import pytest
import torch
from tiny import flat_mask, tiny_net, tiny_problem, weights_of

import sparse_gen as sg
from sparse_gen.checkpoint import Checkpoints, OtherRunError, RunInterrupted

TOTAL = 71
WHOLE = 11
STEPS, LR = 12, 1e-2


def train(net, keep, z, targets, steps):
    """Masked gradients, the sum of the errors to all images."""
    adam = torch.optim.Adam(net.parameters(), lr=LR)
    for _ in range(steps):
        adam.zero_grad()
        output = net(z)
        sum((output - y).square().mean() for y in targets).backward()
        for name, parameter in net.named_parameters():
            if name in keep:
                parameter.grad *= keep[name]
        adam.step()


def written_out(counts, rewind=0, images=1):
    """Masks after each round, and the weights that the last is to be trained from."""
    z, targets = tiny_problem(images)
    names, _ = weights_of(tiny_net())
    keep = {n: torch.ones_like(p) for n, p in tiny_net().named_parameters() if n in names}
    early = tiny_net()
    train(early, keep, z, targets, rewind)
    masks = []
    for k, count in enumerate(counts):
        net = tiny_net()
        if k:
            net.load_state_dict(early.state_dict())
        with torch.no_grad():
            for name in names:
                dict(net.named_parameters())[name].mul_(keep[name])
        train(net, keep, z, targets, STEPS if k == 0 else STEPS - rewind)
        values = torch.cat([dict(net.named_parameters())[n].detach().flatten() for n in names]).abs()
        flat = torch.zeros_like(values)
        flat[values.argsort(descending=True)[:count]] = 1
        pieces = flat.split([k.numel() for k in keep.values()])
        keep = {n: piece.view(keep[n].shape) for n, piece in zip(names, pieces, strict=True)}
        masks.append(flat.bool())
    return masks, early


def find(images=1, density=0.5, **options):
    z, y = tiny_problem(images)
    return sg.masks.find("imp", tiny_net(), z, y, density=density, **{"steps": STEPS, "lr": LR, **options})


@pytest.mark.parametrize("rewind", [0, 5])
def test_it_is_the_loop_written_out(rewind):
    counts = [48, 38, 30, 24]  # ⌊0.8 · 60⌋ and so on, down to ⌊0.5 · 71⌋ - 11
    masks, early = written_out(counts, rewind)
    result = find(rewind=rewind)
    assert torch.equal(flat_mask(result.mask), masks[-1])
    for name, parameter in early.named_parameters():
        keep = result.mask.tensors.get(name, torch.ones(parameter.shape, dtype=torch.bool))
        # Two orders of adding up, STEPS steps of Adam in double.
        torch.testing.assert_close(result.mask.weights[name], parameter.detach()[keep], rtol=1e-8, atol=1e-10)
    assert (result.settings["rounds"], result.settings["rewind"]) == (4, rewind)
    assert result.mask.recipe["search"]["method"] == "imp"


def test_a_schedule_of_ones_own():
    masks, _ = written_out([45, 24])
    result = find(schedule=[0.8, 0.5])
    assert int(0.8 * TOTAL) - WHOLE == 45
    assert torch.equal(flat_mask(result.mask), masks[-1])
    assert result.settings["schedule"] == [0.8, 0.5]
    for schedule in ([0.5, 0.8], [0.8], []):
        with pytest.raises(ValueError, match="expected a schedule of falling densities that ends with the one asked"):
            find(schedule=schedule)


def test_several_images_share_a_mask():
    """The sum of the errors to three images is what is minimised, by their mean; Adam's eps alone tells them apart."""
    masks, _ = written_out([48, 38, 30, 24], images=3)
    result = find(images=3, multi_image=True)
    assert torch.equal(flat_mask(result.mask), masks[-1])
    assert result.mask.has_experiment_axis is False
    assert result.settings["images"] == 3
    alone = find()
    assert not torch.equal(flat_mask(alone.mask), masks[-1])


def test_pruned_weights_stay_pruned_and_history_spans_all_rounds():
    calls = []
    result = find(every=4, progress=lambda step, total, values: calls.append((step, total, values["loss"])))
    assert result.history.step == [12 * r + s for r in range(4) for s in (0, 4, 8, 11)]
    assert [step for step, _, _ in calls] == [s + 1 for s in result.history.step]
    assert {total for _, total, _ in calls} == {48}
    denser = find(density=0.6)
    assert (flat_mask(result.mask) <= flat_mask(denser.mask)).all()


def test_the_published_variant_starts_without_zeros_and_rounds_up():
    z, y = tiny_problem()
    _, weight = weights_of(tiny_net(), all_parameters=True)
    result = sg.masks.find(
        "imp", tiny_net(), z, y, density=0.5, variant="as_published", steps=3, fraction=0.3, prunable="all"
    )
    kept = flat_mask(result.mask)
    # 68 of 71 are not 0; then ⌈0.3 · 68⌉ = 21 and ⌈0.3 · 47⌉ = 15 go, which is the first time below 35.
    assert kept.sum() == 32
    assert not kept[weight == 0].any()
    assert result.mask.whole == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps as an integer of at least 1, got 0"),
        ({"rewind": 12}, "expected rewind below the 12 steps of a round, got 12"),
        ({"rewind": -1}, "rewind as an integer of at least 0, got -1"),
        ({"fraction": 1}, r"expected fraction in \(0, 1\), got 1"),
        ({"every": 0}, "every as an integer"),
        ({"rounds": 3}, "expected options of 'imp' out of steps, fraction, schedule, rewind"),
        ({"published": True}, "expected options of 'imp' out of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        find(**options)


def test_with_skip_at_small_size():
    net = sg.generators.Skip(in_channels=4, channels=(6, 6), skip_channels=2)
    z = sg.noise_input(4, (16, 18))
    y = torch.rand(2, 3, 16, 18, generator=torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in net.parameters()]
    result = sg.masks.find("imp", net, z, y, density=0.4, steps=6, multi_image=True, input_jitter=1 / 30)
    total = sum(p.numel() for p in net.parameters())
    assert result.mask.kept == int(0.4 * total)
    assert result.connected
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert sg.fit(sg.compile(net, result.mask, z), z, y[:1], steps=2).image.shape == (1, 3, 16, 18)


def test_with_skip_at_its_defaults():
    """2,217,831 parameters; only convolution weights are pruned, in two rounds of two steps."""
    net, z = sg.generators.Skip(), sg.noise_input(32, (48, 40))
    y = torch.rand(1, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    result = sg.masks.find("imp", net, z, y, density=0.66, steps=2)
    assert (result.mask.kept, result.mask.total) == (int(0.66 * 2_217_831), 2_217_831)
    assert all(len(keep.shape) == 4 for keep in result.mask.tensors.values())
    assert result.settings["rounds"] == 2
    assert result.connected


def test_pixels_without_weight_do_not_count():
    """An image that is wrong where nothing was measured gives the same mask, and another one where it counts."""
    z, y = tiny_problem()
    weight = torch.ones_like(y[:, :1])
    weight[..., ::2] = 0
    wrong = torch.where(weight > 0, y, torch.zeros_like(y))
    find = [
        sg.masks.find("imp", tiny_net(), z, image, density=0.5, steps=STEPS, lr=LR, pixel_weight=given)
        for image, given in ((y, weight), (wrong, weight), (wrong, None))
    ]
    kept = [flat_mask(found.mask) for found in find]
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])
    assert torch.equal(find[0].history["loss"], find[1].history["loss"])
    assert len(find[0].settings["pixel_weight"]) == 64 and "pixel_weight" not in find[2].settings


def test_history_tells_the_clean_image_and_the_average():
    _, y = tiny_problem()
    result = find(clean=y, average=0.9, every=4)
    assert set(result.history.columns) == {"loss", "psnr", "psnr_average"}
    mse = 10 ** (-result.history["psnr"] / 10)
    # PSNR is taken of the output in [0, 1] against y itself: the loss, in double.
    torch.testing.assert_close(mse, result.history["loss"], rtol=1e-6, atol=0)


def test_every_training_tells_its_layouts_and_flops():
    result = find(rewind=5, plan="rule")
    assert len(result.settings["layouts"]) == len(result.settings["flops"]) == 5
    assert result.settings["flops"] == sorted(result.settings["flops"], reverse=True)
    assert result.settings["flops"][0] == result.settings["flops"][1] > result.settings["flops"][-1] > 0
    assert result.mask.recipe["search"]["layouts"] == result.settings["layouts"]
    with pytest.raises(ValueError, match="expected plan as None, 'measure' or 'rule', as every round has its own"):
        find(plan="m.json")


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [3, 12, 14, 37])
@pytest.mark.parametrize("rewind", [0, 5])
def test_a_kill_loses_no_round_and_no_bit(tmp_path, rewind, killed_at):
    """Killed in the first round, at its end, in the second and in the last, and gone on with."""
    whole = find(plan="rule", rewind=rewind, every=1)
    seen = []

    def progress(step, total, values):
        seen.append(step)
        if len(seen) == killed_at:
            raise Killed

    with pytest.raises(Killed):
        find(plan="rule", rewind=rewind, every=1, progress=progress, checkpoints=Checkpoints(tmp_path))
    done = seen[-1] - 1
    seen.clear()
    resumed = find(
        plan="rule",
        rewind=rewind,
        every=1,
        progress=lambda step, *_: seen.append(step),
        checkpoints=Checkpoints(tmp_path, resume=True),
    )
    lengths = [rewind] * bool(rewind) + [STEPS] + [STEPS - rewind] * 3
    ends = [sum(lengths[:n]) for n in range(len(lengths))]
    assert seen[0] == max(end for end in ends if end <= done) + 1  # finished rounds are not done again
    assert torch.equal(flat_mask(resumed.mask), flat_mask(whole.mask))
    assert all(torch.equal(v, resumed.mask.weights[n]) for n, v in whole.mask.weights.items())
    assert resumed.history.step == whole.history.step
    assert torch.equal(resumed.history["loss"], whole.history["loss"])
    assert resumed.settings == whole.settings


def test_a_stop_is_stored_at_once_and_a_finished_search_is_only_read(tmp_path):
    first = Checkpoints(tmp_path)
    with pytest.raises(RunInterrupted, match="after step 5 of the fit"):
        find(every=1, progress=lambda step, *_: step == 5 and first.request_stop(), checkpoints=first)
    seen = []
    result = find(every=1, progress=lambda step, *_: seen.append(step), checkpoints=Checkpoints(tmp_path, resume=True))
    assert seen[0] == 6 and torch.equal(flat_mask(result.mask), flat_mask(find().mask))
    again = find(
        progress=lambda *_: pytest.fail("trained again"), every=1, checkpoints=Checkpoints(tmp_path, resume=True)
    )
    assert torch.equal(flat_mask(again.mask), flat_mask(result.mask))
    with pytest.raises(OtherRunError, match=r"has lr = 0\.01, got 0\.02"):
        find(lr=0.02, every=1, checkpoints=Checkpoints(tmp_path, resume=True))
    Checkpoints(tmp_path).clear()
    assert list(tmp_path.iterdir()) == []
