"""Gradients of weights beside those that others wait for: nothing is read, overwritten or given back too early."""

import pytest
import torch
from equality import scattered_mask
from parallel import MAIN, SIDE, PretendedStreams
from problems import SIZE, small_net

import sparse_gen as sg
from sparse_gen.engine.branches import AHEAD, Branch, branching, parallel_branches, side_streams
from sparse_gen.engine.layouts import candidates
from sparse_gen.ops.extension import status

compiled = pytest.mark.skipif(not status().available, reason="no compiled library: nothing runs in stages")


def blocks(net):
    """A mask whose blocks of 4 output channels are kept or pruned as a whole."""
    mask = scattered_mask(net, 0.5)
    for kept in mask.tensors.values():
        if kept.ndim == 4:
            kept.copy_(kept[::4].repeat_interleave(4, 0)[: len(kept)])
    return mask


@compiled
@pytest.mark.parametrize("experiments", [1, 3])
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@pytest.mark.parametrize("layout", ["sparse", "taps", "blocks", "dense", "dense fused"])
def test_gradients_of_both_sides_of_the_forks(layout, upsample, experiments):
    net = small_net(upsample=upsample, skip_channels=2, channels=(8, 8, 12))
    mask = blocks(net) if layout == "blocks" else scattered_mask(net, 0.4)
    z = sg.noise_input(6, SIZE, seed=list(range(experiments)))
    fast = sg.compile(net, mask, z, plan="rule")
    convolutions = fast._sparse_run.program(0).convolutions.values()
    able = [stage.name for stage, own in convolutions if own in (layouts := candidates(stage)) and layout in layouts]
    if able:
        fast = sg.compile(net, mask, z, plan=fast.plan.replace(dict.fromkeys(able, layout)))

    def gradient():
        fast.values.grad = None
        output = fast(z)
        (output.square() + output).sum().backward()
        return fast.values.grad.clone()

    expected, streams = gradient(), PretendedStreams()
    with streams, parallel_branches(streams):
        got = gradient()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert any("conv" in name for name in streams.calls[SIDE])
    assert any("conv" in name for name in streams.calls[MAIN])


@compiled
def test_a_search_step_of_a_zero_padded_network_has_branches_too():
    net = sg.generators.Skip(4, channels=(4, 6), padding="zero", upsample="nearest")
    z = sg.noise_input(4, SIZE).requires_grad_()
    fast = sg.compile(net, None, z.detach(), plan="rule")
    convolutions = fast._sparse_run.program(0).convolutions.values()
    dense = {stage.name: "dense" for stage, own in convolutions if own in candidates(stage)}
    fast = sg.compile(net, None, z.detach(), plan=fast.plan.replace(dense))
    expected = torch.autograd.grad(fast(z).square().sum(), [z, fast.values])
    streams = PretendedStreams()
    with streams, parallel_branches(streams):
        got = torch.autograd.grad(fast(z).square().sum(), [z, fast.values])
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * theirs.norm().item())
    assert streams.calls[SIDE].count("aten::convolution_backward") >= 3


def test_the_stand_in_sees_what_comes_too_early():
    x = torch.ones(4)

    def late(change):
        streams = PretendedStreams()
        branch = Branch(streams)
        with streams:
            change(streams, branch)

    def read(_streams, branch):
        branch.run(lambda: x + 1, x) + 1

    def overwritten(_streams, branch):
        own = x + 1
        branch.run(lambda: own + 1, own)
        own.zero_()

    def given_back(_streams, branch):
        own = x + 1
        branch.run(lambda own=own: own + 1, None)
        del own
        x + 1

    def not_forked(streams, _branch):
        own = x + 1
        with streams.beside():
            own + 1

    for change in (read, overwritten, given_back, not_forked):
        with pytest.raises(AssertionError, match=r"for which the (main|side) stream did not wait"):
            late(change)

    def joined(_streams, branch):
        own = x + 1
        result = branch.run(lambda own=own: own + 1, own)
        branch.join()
        own.zero_()
        del own
        assert torch.equal(result + 1, torch.full((4,), 4.0))

    late(joined)


def test_what_a_branch_reads_is_held_until_it_was_waited_for():
    """And no longer: the main stream waits once the branch is so far behind."""
    waited = []

    class Counting(PretendedStreams):
        def wait(self, event):
            if self._current == MAIN:
                waited.append(event)
            super().wait(event)

    streams = Counting()
    branch = Branch(streams)
    with streams:
        for number in range(AHEAD + 2):
            own = torch.ones(4) + number
            branch.run(lambda own=own: own + 1, own)
            del own
            assert len(waited) == max(0, number + 1 - AHEAD)
        branch.join()
    assert len(waited) == AHEAD + 2


def test_branches_are_there_where_steps_are_captured_alone(monkeypatch):
    assert branching() is None
    with parallel_branches("streams"):
        assert branching() == "streams"
        with parallel_branches(None):
            assert branching() is None
        assert branching() == "streams"
    assert branching() is None
    monkeypatch.setenv("SPARSE_GEN_BRANCHES", "0")
    assert side_streams(torch.device("cuda")) is None
