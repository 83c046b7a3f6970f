"""`fit`: it restores, records, repeats and refuses."""

import pytest
import torch
from problems import SIZE, problem, random_mask, small_net

import sparse_gen as sg


def test_it_restores_a_noisy_image():
    z, y, clean = problem()
    net = small_net()
    run = sg.fit(sg.compile(net, random_mask(net, 0.5), z), z, y, steps=200, clean=clean)
    assert sg.fitting.psnr(run.image, clean) > sg.fitting.psnr(y, clean) + 3
    assert run.stopped_at is None


def test_a_plain_module_is_trained_in_place():
    z, y, _ = problem()
    net = small_net()
    before = net.head.weight.clone()
    run = sg.fit(net, z, y, steps=2, lr=1e-3)
    assert run.module is net
    assert not torch.equal(net.head.weight, before)


def test_it_is_adam_on_the_mean_squared_error():
    z, y, _ = problem()
    ours, theirs = small_net().double(), small_net().double()
    z, y = z.double(), y.double()
    run = sg.fit(ours, z, y, steps=5, lr=1e-2, every=1)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.mse_loss(theirs(z), y)
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert run.history["loss"][:, 0].tolist() == pytest.approx(losses, rel=1e-9)
    torch.testing.assert_close(run.image, theirs(z).detach(), rtol=1e-7, atol=1e-7)


def test_history_has_every_nth_step_and_the_last():
    z, y, clean = problem()
    run = sg.fit(small_net(), z, y, steps=8, every=3, clean=clean)
    assert run.history.step == [0, 3, 6, 7]
    assert run.history["psnr"].shape == (4, 1)
    assert run.history.columns == ("loss", "psnr")
    with pytest.raises(KeyError, match="expected a column out of loss, psnr, got 'ssim'"):
        run.history["ssim"]


def test_two_runs_give_the_same_bits():
    z, y, _ = problem()
    images = [sg.fit(small_net(), z, y, steps=5, input_jitter=0.03, seed=2).image for _ in range(2)]
    assert torch.equal(*images)
    other = sg.fit(small_net(), z, y, steps=5, input_jitter=0.03, seed=3).image
    assert not torch.equal(images[0], other)


def test_several_experiments_are_several_fits():
    net, (_, y, clean) = small_net(), problem()
    z, mask = sg.noise_input(6, SIZE, seed=[0, 1]), random_mask(small_net(), experiments=2)
    together = sg.fit(sg.compile(net, mask, z), z, y, steps=4, every=1, clean=clean)
    assert together.image.shape[0] == 2
    for e in range(2):
        own = sg.Mask({name: keep[e] for name, keep in mask.tensors.items()}, whole=mask.whole)
        alone = sg.fit(sg.compile(net, own, z[e : e + 1]), z[e : e + 1], y, steps=4, every=1, clean=clean)
        assert torch.equal(together.image[e : e + 1], alone.image)
        assert torch.equal(together.history["psnr"][:, e], alone.history["psnr"][:, 0])


def test_a_stopping_rule_is_asked_and_selects_the_image():
    class AfterThree:
        def update(self, step, image):
            self.image = image.clone()
            return step == 2

    z, y, _ = problem()
    rule = AfterThree()
    run = sg.fit(small_net(), z, y, steps=50, stop=rule)
    assert run.stopped_at == 3
    assert torch.equal(run.image, rule.image)


def test_psnr_is_that_of_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio

    image, clean = torch.rand(2, 3, 20, 30), torch.rand(2, 3, 20, 30)
    expected = [
        peak_signal_noise_ratio(c.numpy(), i.numpy(), data_range=1.0) for i, c in zip(image, clean, strict=True)
    ]
    assert sg.fitting.psnr(image, clean).tolist() == pytest.approx(expected, rel=1e-5)
    assert sg.fitting.psnr(clean, clean).isposinf().all()


@pytest.mark.parametrize("size", [(3, 9), (4, 20), (7, 7), (40, 30)])
def test_ssim_is_one_for_equal_images_and_less_otherwise(size):
    clean = torch.rand(2, 3, *size)
    assert sg.fitting.ssim(clean, clean).tolist() == pytest.approx([1, 1])
    assert (sg.fitting.ssim(1 - clean, clean) < 0.9).all()
    with pytest.raises(ValueError, match="at least 3 pixels a side"):
        sg.fitting.ssim(clean[..., :2, :], clean[..., :2, :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps as an integer of at least 1"),
        ({"steps": True}, "steps as an integer"),
        ({"lr": 0}, "lr above 0"),
        ({"every": -1}, "every as an integer"),
        ({"clean": torch.zeros(1, 3, 5, 5)}, "clean and z of one size"),
        ({"seed": "a"}, "expected a seed"),
    ],
)
def test_bad_arguments(change, message):
    z, y, _ = problem()
    with pytest.raises(ValueError, match=message):
        sg.fit(small_net(), z, y, **{"steps": 2, **change})


def test_a_plain_module_takes_one_experiment():
    _, y, _ = problem()
    with pytest.raises(ValueError, match=r"one experiment for a plain module.*use sg.compile"):
        sg.fit(small_net(), sg.noise_input(6, SIZE, seed=[0, 1]), y)


def test_a_loss_that_is_not_finite_stops_with_the_step_named():
    z, y, _ = problem()
    net = small_net()
    with torch.no_grad():
        net.head.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="at step 0"):
        sg.fit(net, z, y, steps=3)


def test_two_compiled_runs_give_the_same_bits():
    z, y, _ = problem()
    net = small_net()
    threads, runs = torch.get_num_threads(), []
    torch.set_num_threads(2)
    for _ in range(2):
        fast = sg.compile(net, random_mask(net, 0.2), z, plan="rule")
        assert any("sparse" in stage.kernel for stage in fast.plan.stages)
        fit = sg.fit(fast, z, y, steps=5, every=1, input_jitter=0.03, seed=2)
        runs.append((fit.image, fit.history["loss"], fast.values.detach()))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *runs))
    assert not torch.equal(runs[0][2], sg.compile(net, random_mask(net, 0.2), z).values)


def test_pixel_weight_is_the_weighted_mean_of_squared_errors():
    """Adam on (1/N) Σ w·(x − y)², by a compiled and a plain module; what has no weight is free."""
    z, y, clean = problem()
    net = small_net().double()
    z, y = z.double(), y.double()
    weight = torch.rand(1, 1, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).round()
    theirs, losses = small_net().double(), []
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for _ in range(4):
        loss = (weight * (theirs(z) - y).square()).sum() / y.numel()
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
    for module in (net, sg.compile(small_net().double(), example_input=z)):
        free = torch.where(weight > 0, y, torch.rand_like(y))
        run = sg.fit(module, z, free, steps=4, every=1, pixel_weight=weight, clean=clean.double())
        assert run.history["loss"][:, 0].tolist() == pytest.approx(losses, rel=1e-9)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(1, 1, 3, 3), r"expected pixel_weight as a tensor that broadcasts to \(1, 3, .*got \(1, 1, 3, 3\)"),
        (0.5, "expected pixel_weight as a tensor that broadcasts to .*, got float"),
        (torch.ones(1, 1, 1, 1, dtype=torch.float64), "expected pixel_weight as torch.float32 on cpu like y"),
        (torch.zeros(1, 1, 1, 1), "above 0 somewhere, got values from 0 to 0"),
        (-torch.ones(1, 1, 1, 1), "finite and from 0 on, above 0 somewhere, got values from -1 to -1"),
    ],
)
def test_bad_pixel_weights(weight, message):
    z, y, _ = problem()
    with pytest.raises(ValueError, match=message):
        sg.fit(small_net(), z, y, steps=1, pixel_weight=weight)
