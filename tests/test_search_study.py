"""The study of the search's constants: its trials against the search and against autograd, and resumable."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch
from problems import problem, small_net

import sparse_gen as sg
from sparse_gen.ops.concrete_mask import kl_divergence, soft_mask_reference
from sparse_gen.ops.philox import Stream, seed_tensor

pytestmark = pytest.mark.filterwarnings("ignore::sparse_gen.DisconnectedMaskWarning")


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "bench")
        yield importlib.import_module


@pytest.fixture(scope="module")
def trial(bench):
    return bench("search_trials").trial


def by_hand(net, z, y, soft_masks, *, steps, lr=0.05, kl_weight=1e-3, density=0.2, eps=1e-8, rates=None):
    """Logits after `steps`, by autograd through the plain network and torch.optim.Adam.

    `soft_masks(step, logits)` gives the soft masks of a step, over all convolution weights in one vector.
    """
    parameters = dict(net.named_parameters())
    names = [name for name, p in parameters.items() if p.ndim == 4]
    logits = torch.zeros(1, sum(parameters[n].numel() for n in names), dtype=z.dtype, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=lr, eps=eps)
    for step in range(steps):
        soft, weight_of_kl = soft_masks(step, logits)
        losses = []
        for one in soft:
            parts = one[0].split([parameters[n].numel() for n in names])
            masked = {
                n: parameters[n].detach() * part.view_as(parameters[n]) for n, part in zip(names, parts, strict=True)
            }
            losses.append((torch.func.functional_call(net, masked, (z,)) - y).square().mean())
        adam.zero_grad()
        (torch.stack(losses).mean() + kl_weight * weight_of_kl * kl_divergence(logits, density).sum()).backward()
        if rates is not None:
            adam.param_groups[0]["lr"] = lr * rates[step]
        adam.step()
    return logits.detach()


def sample(logits, step, tau=0.2, antithetic=False):
    """sigmoid((l + logistic)/tau), with 1 - u for u where it is antithetic."""
    noise = soft_mask_reference(torch.zeros_like(logits), seed_tensor(3), torch.tensor(step), Stream.MASK, 1.0).logit()
    return torch.sigmoid((logits + (-noise if antithetic else noise)) / tau)


CASES = {
    "plain": ({}, lambda s, x: ([sample(x, s)], 1.0)),
    "temperature": (
        {"temperature": 1.0, "final_temperature": 0.2},
        lambda s, x: ([sample(x, s, 0.2 ** (s / 4))], 1.0),
    ),
    "ramp": ({"kl_ramp": 1.0}, lambda s, x: ([sample(x, s)], s / 4)),
    "mean field": (
        {"mean_field": 0.5},
        lambda s, x: ([torch.sigmoid(x) if s < 2 else sample(x, s)], 1.0),
    ),
    "antithetic": ({"antithetic": True}, lambda s, x: ([sample(x, s // 2, antithetic=s % 2 == 1)], 1.0)),
    "samples": ({"samples": 3}, lambda s, x: ([sample(x, 3 * s + i) for i in range(3)], 1.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_trial_is_what_autograd_and_adam_make_of_its_formula(trial, name):
    options, soft_masks = CASES[name]
    z, y, _ = (tensor.double() for tensor in problem())
    net = small_net().double()
    # An eps beside which no gradient is rounding: Adam would make whole steps of it.
    given = {"steps": 4, "kl_weight": 1e-3, "lr": 0.05, "eps": 1e-4}
    ((steps, logits),) = trial(net, z, y, density=0.2, seed=3, **given, **options)
    assert steps == 4
    expected = by_hand(net, z, y, soft_masks, **given)
    # The search's KL gradient leaves the offset of 1e-6 out of the logarithms.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_a_falling_rate_falls_over_the_second_half(trial):
    z, y, _ = (tensor.double() for tensor in problem())
    net = small_net().double()
    given = {"steps": 4, "kl_weight": 1e-3, "lr": 0.05, "eps": 1e-4}
    ((_, logits),) = trial(net, z, y, density=0.2, seed=3, decay=True, **given)
    expected = by_hand(net, z, y, CASES["plain"][1], **given, rates=[1, 1, 1, 0.5])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_a_trial_without_options_is_the_search(trial):
    z, y, _ = (tensor.double() for tensor in problem())
    net = small_net().double()
    ((_, logits),) = trial(net, z, y, density=0.2, steps=10, lr=0.05, seed=3)
    search = sg.search_mask(net, z, y, density=0.2, steps=10, lr=0.05, seed=3, plan="rule")
    expected = torch.cat([logit.flatten() for logit in search.logits.values()])
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-8)


@pytest.fixture(scope="module")
def study(bench, tmp_path_factory):
    module, folder = bench("search_study"), tmp_path_factory.mktemp("study")
    preset = module.Preset(
        "reduced", 24, (4, 6), tried_steps=4, judged_at=(2, 4, 8), finalists=("quick",), fit_steps=220,
        paper_at=(2, 6), seeds=(3, 4), photographs=("astronaut", "coffee"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DENSITY", 0.5)
        patch.setattr(module, "SETTINGS", {name: module.SETTINGS[name] for name in ("quick", "all", "x4")})
        study = module.Study(preset, folder / "search_study-cpu.json", folder / "build")
        study.measure()
        yield study


def test_the_study_tries_one_photograph_and_judges_on_both(study):
    found = [(r["case"].split()[0], r["provider"], r["steps_search"], r["seed"]) for r in study.records()]
    assert found == [
        *(("astronaut", "quick", steps, seed) for steps, seed in ((2, 3), (2, 4), (4, 3), (4, 4), (8, 3), (8, 4))),
        ("astronaut", "all", 4, 3), ("astronaut", "x4", 4, 3),
        *(("coffee", "quick", steps, seed) for steps, seed in ((2, 3), (2, 4), (4, 3), (4, 4), (8, 3), (8, 4))),
        *(("coffee", paper, steps, 3) for paper in ("paper", "paper_conv") for steps in (2, 6)),
    ]  # fmt: skip


def test_a_record_is_the_search_and_the_fit_that_it_says(study):
    record = next(r for r in study.records() if r["provider"] == "paper_conv" and r["steps_search"] == 2)
    z, y, clean, net = study.problem("coffee", 3)
    mask = sg.search_mask(
        net, z, y, density=0.5, preset="paper", prunable="conv_weights", steps=2, seed=3, plan="rule"
    ).mask
    assert record["layer_density"]["head.weight"] == round(mask.tensors["head.weight"].double().mean().item(), 5)
    fit = sg.fit(sg.compile(net, mask, z, plan="rule"), z, y, steps=220, lr=1e-2, clean=clean, seed=3, every=10)
    psnr = fit.history["psnr"][:, 0]
    assert record["psnr_last"] == pytest.approx(sg.fitting.psnr(fit.module(z), clean).item(), abs=1e-3)
    assert record["psnr_tail"] == pytest.approx(psnr[-20:].mean().item(), abs=1e-3)
    assert record["psnr_oracle_peak"] == pytest.approx(psnr.max().item(), abs=1e-3)


def test_finished_runs_are_not_done_again(study):
    assert study.todo() == []
    records = study.records()
    gone = [r for r in records if r["provider"] == "paper" and r["steps_search"] == 6]
    study.results.write_text(json.dumps([r for r in records if r not in gone]))
    assert study.todo() == [("coffee", "paper", 6, 3)]
    assert study.todo(("quick",)) == []
    study.measure(stored=True)
    again = [r for r in study.records() if r["provider"] == "paper" and r["steps_search"] == 6]
    assert again == gone
    assert study.records() == records


def test_what_a_search_that_was_cut_short_has_stored_is_judged(study, tmp_path):
    other = type(study)(dataclasses.replace(study.preset, seeds=(5,)), tmp_path / "r.json", tmp_path / "build")
    assert list(other.run("coffee", "paper", 6, 5, stored=True)) == []
    list(other.run("coffee", "paper", 6, 5))
    next(other.build.glob("*paper, seed 5, 6 steps*")).unlink()
    assert [r["steps_search"] for r in other.run("coffee", "paper", 6, 5, stored=True)] == [2]


def test_table_and_picture(bench, study, tmp_path):
    records, report = study.records(), bench("search_report")
    cut = {**records[0], "seed": 9, "disconnected_at": "head"}
    for column in ("psnr_untrained", "psnr_last", "psnr_tail", "psnr_wmv", "psnr_oracle_peak"):
        cut.pop(column, None)
    shown = report.table([*records, cut])
    assert shown.count("(reduced)") == 2
    rows = [row for row in shown.splitlines() if row.startswith("|")]
    assert all(row.count("|") == rows[0].count("|") for row in rows)
    assert len(rows) == 2 * 2 + 3 + 2 + 3 + 4
    assert sum("(1 of 3 cut at head)" in row for row in rows) == 1
    report.draw([*records, cut], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_every_setting_has_a_name(bench):
    module, report = bench("search_study"), bench("search_report")
    assert {"paper", "paper_conv"} < set(report.LABELS)
    assert set(module.FINALISTS) <= set(report.LABELS)
    for preset in (module.FULL, module.NARROW, module.REDUCED):
        assert all(job[1] in report.LABELS for job in preset.jobs())
