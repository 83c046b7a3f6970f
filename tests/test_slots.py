"""Parameters that are read from the kept values, and the gradients that get back into them."""

import pytest
import torch

from sparse_gen.engine.collect import sources
from sparse_gen.engine.slots import Slots

KEPT = 40
# Of three experiments, each with places of its own.
INDICES = {
    "spans": [torch.arange(3, 9).view(1, 2, 3), torch.arange(20, 30).view(1, 10)],
    "a span read twice": [torch.arange(3, 9).view(1, 2, 3), torch.arange(5, 15).view(1, 10)],
    "scattered": [torch.tensor([[[4, -1, 7], [0, 39, 5]]]), torch.arange(20, 30).view(1, 10), torch.tensor([[1, 2]])],
    "read by up to five": [
        torch.tensor([[7, 7, -1, 8]]),
        torch.arange(5, 15).view(1, 2, 5),
        torch.tensor([[8, 7, 7, 1]]),
    ],
    "each its own": [torch.tensor([[7, 7, -1], [0, 39, 8], [-1, -1, 3]]), torch.tensor([[7, 1], [0, 0], [3, 3]])],
    "nothing": [torch.full((1, 2, 3), -1)],
}


# Where every experiment has its own places, there is no run of one alone.
@pytest.mark.parametrize(
    ("name", "experiments"), [(n, e) for n in INDICES for e in (1, 3) if e > 1 or n != "each its own"]
)
def test_what_is_read_and_its_gradient(name, experiments):
    slots = Slots(KEPT)
    for index in INDICES[name]:
        slots.add(index)
    slots.finish(torch.device("cpu"))
    reader = slots.of(experiments)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(experiments, KEPT, generator=generator, dtype=torch.float64, requires_grad=True)
    extended = torch.cat([values, values.new_zeros(experiments, 1)], dim=1)
    # -1 is the last place, the zero.
    want = [torch.stack([extended[e][i[e % len(i)]] for e in range(experiments)]) for i in INDICES[name]]
    got = reader.read(values.detach())
    assert all(map(torch.equal, got, want))
    gradients = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in want]
    (expected,) = torch.autograd.grad(want, values, gradients, retain_graph=True)
    torch.testing.assert_close(reader.write(gradients, values), expected, rtol=1e-14, atol=1e-15)
    # A parameter without a gradient.
    (expected,) = torch.autograd.grad(want[:1], values, gradients[:1])
    written = reader.write([gradients[0], *[None] * len(want[1:])], values)
    torch.testing.assert_close(written, expected, rtol=1e-14, atol=1e-15)


def test_additions_to_a_value_have_one_order():
    """The last reader's gradient, then those of the others from the first on; no addition meets another of its turn."""
    generator = torch.Generator().manual_seed(0)
    used = torch.randint(0, 30, (400,), generator=generator)  # 29 stands for a zero
    gradients = torch.randn(401, generator=generator)
    gradients[-1] = 0
    source, more = sources(used, 29)
    assert len(more) > 5
    total = gradients[source]
    for values, places in more:
        assert len(values.unique()) == len(values)
        total[values] += gradients[places]
    for value in range(29):
        *others, last = (used == value).nonzero()[:, 0].tolist()
        expected = gradients[last]
        for place in others:
            expected = expected + gradients[place]
        assert torch.equal(total[value], expected)


def test_a_value_that_nothing_reads_has_no_gradient():
    source, more = sources(torch.tensor([2, 0]), 3)
    assert source.tolist() == [1, 2, 0] and not more
