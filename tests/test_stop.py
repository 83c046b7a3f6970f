"""Stopping rules against a direct computation of their papers' formulas."""

from itertools import pairwise

import pytest
import torch
from problems import SIZE, problem, random_mask, small_net

import sparse_gen as sg


def outputs(steps=160, experiments=2):
    """Images whose spread falls and rises again, at another time in each experiment."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(steps, experiments, 3, 6, 7, generator=generator)
    turn = torch.tensor([60.0, 90.0])[:experiments]
    spread = 0.2 + (torch.arange(steps)[:, None] - turn).abs() / 100
    return 0.5 + (noise - 0.5) * spread.clamp_max(1)[:, :, None, None, None]


def feed(rule, images):
    """Feed until the rule says stop; returns how many it took."""
    for step, image in enumerate(images):
        if rule.update(step, image):
            return step + 1
    return len(images)


def direct_wmv(images, window):
    """var_t over the last `window` outputs, recomputed from all of them."""
    statistic = torch.full(images.shape[:2], torch.inf, dtype=torch.float64)
    for t in range(window - 1, len(images)):
        last = images[t - window + 1 : t + 1].double()
        statistic[t] = (last - last.mean(dim=0)).square().mean(dim=(0, 2, 3, 4))
    return statistic


def direct_emv(images, alpha):
    average, variance, rows = torch.zeros_like(images[0]).double(), torch.zeros(images.shape[1]).double(), []
    for image in images.double():
        difference = image - average
        average = average + alpha * difference
        variance = (1 - alpha) * (variance + alpha * difference.square().mean(dim=(1, 2, 3)))
        rows.append(variance)
    return torch.stack(rows)


def expected_stop(statistic, patience):
    """Algorithm 1 for one experiment: the selected step, and after how many steps it stops (None: never)."""
    best, selected = float("inf"), None
    for step, value in enumerate(statistic.tolist()):
        if value < best:
            best, selected = value, step
        if selected is not None and step - selected >= patience:
            return selected, step + 1
    return selected, None


@pytest.mark.parametrize(("window", "patience"), [(2, 5), (10, 30), (25, 40), (10, 1000)])
def test_wmv_is_the_papers(window, patience):
    images = outputs()
    rule = sg.stop.WMV(window, patience)
    feed(rule, images)
    statistic = direct_wmv(images, window)
    for e in range(2):
        selected, stopped = expected_stop(statistic[:, e], patience)
        assert rule.selected_step[e] == selected
        assert (rule.stopped_after()[e]) == stopped
        assert torch.equal(rule.image[e], images[selected, e])


def test_wmv_running_update_keeps_its_digits():
    images = 0.5 + 1e-4 * outputs(steps=400)
    rule = sg.stop.WMV(50, 1000)
    feed(rule, images)
    assert rule._smallest.tolist() == pytest.approx(direct_wmv(images, 50).min(dim=0).values.tolist(), rel=1e-6)


@pytest.mark.parametrize(("alpha", "patience"), [(0.1, 20), (0.3, 8), (0.1, 1000)])
def test_emv_is_the_papers(alpha, patience):
    images = outputs()
    rule = sg.stop.EMV(alpha, patience)
    feed(rule, images)
    statistic = direct_emv(images, alpha)
    for e in range(2):
        selected, stopped = expected_stop(statistic[:, e], patience)
        assert rule.selected_step[e] == selected
        assert rule.stopped_after()[e] == stopped
        assert torch.equal(rule.image[e], images[selected, e])


@pytest.mark.parametrize("make", [lambda: sg.stop.WMV(10, 15), lambda: sg.stop.EMV(0.1, 15)])
def test_each_experiment_stops_as_if_alone(make):
    images, together = outputs(), make()
    steps = feed(together, images)
    alone = [make(), make()]
    assert steps == max(feed(rule, images[:, e : e + 1]) for e, rule in enumerate(alone))
    for e in range(2):
        assert together.stopped_after()[e] == alone[e].stopped_after()
        assert torch.equal(together.image[e : e + 1], alone[e].image)


@pytest.mark.parametrize("make", [lambda: sg.stop.WMV(10, 30), lambda: sg.stop.EMV(0.1, 30)])
def test_state_goes_on_where_it_was(make):
    images, whole, first, second = outputs(experiments=1), make(), make(), make()
    steps = feed(whole, images)
    feed(first, images[:40])
    second.restore({name: value.clone() for name, value in first.state().items()}, "cpu")
    for step in range(40, steps):
        second.update(step, images[step])
    assert second.stopped_after() == whole.stopped_after()
    assert torch.equal(second.image, whole.image)


def test_before_there_is_a_statistic_the_newest_output_is_selected():
    images, rule = outputs(experiments=1), sg.stop.WMV(50, 100)
    feed(rule, images[:20])
    assert torch.equal(rule.image, images[19])
    assert rule.stopped_after() is None


def test_a_rule_that_saw_nothing_has_no_image():
    with pytest.raises(RuntimeError, match="at least one update"):
        sg.stop.WMV().image  # noqa: B018


def test_fit_stops_and_returns_the_selected_output():
    z, y, _ = problem()
    rule = sg.stop.EMV(0.5, 3)
    run = sg.fit(small_net(), z, y, steps=200, lr=0.1, input_jitter=0.1, stop=rule, every=1)
    assert run.stopped_at is not None
    assert run.stopped_at == rule.stopped_after() == int(rule.selected_step) + 4
    assert torch.equal(run.image, rule.image)
    assert len(run.history) == run.stopped_at


def test_fit_reports_each_experiments_stop():
    net, (_, y, _) = small_net(), problem()
    z = sg.noise_input(6, SIZE, seed=[0, 1])
    mask = random_mask(net)
    arguments = {"steps": 60, "lr": 0.1}
    run = sg.fit(sg.compile(net, mask, z), z, y, stop=sg.stop.EMV(0.5, 2), **arguments)
    assert None not in run.stopped_at
    for e in range(2):
        one = sg.compile(net, mask, z[e : e + 1])
        alone = sg.fit(one, z[e : e + 1], y, stop=sg.stop.EMV(0.5, 2), **arguments)
        assert run.stopped_at[e] == alone.stopped_at
        assert torch.equal(run.image[e : e + 1], alone.image)


def test_settled_stops_when_the_kept_set_does_not_change():
    generator = torch.Generator().manual_seed(0)
    final = torch.randn(1, 1000, generator=generator)
    rule = sg.stop.Settled(window=5, tolerance=0.02)
    for step in range(200):
        noise = torch.randn(1, 1000, generator=generator) * 0.9**step
        if rule.update(step, final + noise, 50):
            break
    assert 10 <= step < 199
    assert (step + 1) % 5 == 0
    assert rule.stopped_after() == step + 1
    assert torch.equal(rule.selected(torch.zeros_like(final)), final + noise)


@pytest.mark.parametrize("sizes", [None, torch.arange(1000) % 4 + 1])
def test_settled_counts_each_experiment_by_its_own(sizes):
    generator = torch.Generator().manual_seed(0)
    final, counts = torch.randn(3, 1000, generator=generator), [50, 700, 51]
    together, single = sg.stop.Settled(5, 0.02), [sg.stop.Settled(5, 0.02) for _ in counts]
    for step in range(100):
        logits = final + torch.randn(3, 1000, generator=generator) * 0.9**step
        together.update(step, logits, torch.tensor(counts), sizes)
        for e, (rule, count) in enumerate(zip(single, counts, strict=True)):
            rule.update(step, logits[e : e + 1], count, sizes)
            assert together.exchanged[e] == rule.exchanged[0] or rule.over
    assert together.stopped_after() == [rule.stopped_after() for rule in single]
    assert len(set(together.stopped_after())) > 1


def test_search_stops_when_settled():
    z, y, _ = problem()
    arguments = {"density": 0.2, "lr": 0.02}
    result = sg.search_mask(small_net(), z, y, steps=400, stop=sg.stop.Settled(10, 0.2), **arguments)
    assert result.settled_at is not None
    assert result.settled_at < 400
    assert result.mask.recipe["search"]["settled_at"] == result.settled_at
    assert result.settings["stop"] == {"window": 10, "tolerance": 0.2}
    same = sg.search_mask(small_net(), z, y, steps=result.settled_at, **arguments)
    assert all(torch.equal(result.logits[name], same.logits[name]) for name in same.logits)
    assert same.settled_at is None
    assert "exchanged" not in same.history
    # The step that settled it has a row of its own, whatever `every` is.
    assert result.history.step[-1] == result.settled_at - 1
    assert result.history["exchanged"][-1] <= 0.2 < result.history["exchanged"][-2]


def test_a_search_whose_steps_are_not_given_ends_by_itself():
    z, y, _ = problem()
    net, arguments = small_net(), {"density": 0.2, "every": 50}
    result = sg.search_mask(net, z, y, **arguments)
    assert result.settings["steps"] == 1000
    assert result.settings["stop"] == {"window": 100, "tolerance": 0.1}
    assert result.settled_at is not None
    assert result.settled_at < 1000
    same = sg.search_mask(net, z, y, steps=result.settled_at, **arguments)
    assert same.settled_at is None
    assert "stop" not in same.settings
    assert all(torch.equal(result.logits[name], same.logits[name]) for name in same.logits)
    # Given steps are the steps.
    assert sg.search_mask(net, z, y, steps=1000, **arguments).history.step[-1] == 999


def test_the_history_tells_what_each_window_exchanged():
    z, y, _ = problem()
    net, arguments = small_net(), {"density": 0.2, "lr": 0.05, "every": 1}
    rule = sg.stop.Settled(4, 0.0)
    result = sg.search_mask(net, z, y, steps=13, stop=rule, **arguments)
    # A search is the same up to a step whatever its length is, so that its masks are those of shorter ones.
    kept = [
        torch.cat([k.flatten() for k in sg.search_mask(net, z, y, steps=n, **arguments).mask.tensors.values()])
        for n in (4, 8, 12)
    ]
    new = [1.0] + [((b & ~a).sum() / b.sum()).item() for a, b in pairwise(kept)]
    assert 0 < new[2] < new[1] < 1
    shown = result.history["exchanged"][:, 0].tolist()
    assert shown == pytest.approx([1.0] * 7 + [new[1]] * 4 + [new[2]] * 2, abs=1e-7)
    assert result.settled_at is None
    assert rule.exchanged.item() == shown[-1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sg.stop.WMV(window=1), "window as an integer of at least 2"),
        (lambda: sg.stop.WMV(patience=0), "patience as an integer of at least 1"),
        (lambda: sg.stop.EMV(alpha=1), "alpha between 0 and 1"),
        (lambda: sg.stop.EMV(alpha="0.1"), "alpha between 0 and 1"),
        (lambda: sg.stop.Settled(window=0), "window as an integer"),
        (lambda: sg.stop.Settled(tolerance=1.0), "tolerance from 0 to below 1"),
        (lambda: sg.search_mask(small_net(), *problem()[:2], stop="settled"), "stop as a rule .* got 'settled'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
