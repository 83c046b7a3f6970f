"""`philox`: the same bits on every backend."""

import pytest
import torch

from sparse_gen.ops.philox import (
    Stream,
    normal,
    philox_4x32_10,
    philox_reference,
    seed_tensor,
    uniform,
    uniform_from_words,
)

# Known answers of Philox-4x32-10 from Random123's kat_vectors: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = [0, 1, -5, 2**62 + 12345, 2**63 - 1]


def words(seed, step, stream, count):
    return torch.ops.sparse_gen.philox(torch.tensor(seed), torch.tensor(step), stream, count)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    counter, key = ([torch.tensor(int(word, 16)) for word in words.split()] for words in (counter, key))
    assert " ".join(f"{word:08x}" for word in philox_4x32_10(counter, key).tolist()) == expected


def test_index_step_and_stream_are_the_counter():
    seed = 0x299F31D0A4093822
    got = philox_reference(torch.tensor([seed]), torch.tensor(7), 3, 24)[0, 20:24]
    counter, key = (
        [torch.tensor(x) for x in (5, 7, 3, 0)],
        [torch.tensor(x) for x in (0xA4093822, 0x299F31D0)],
    )
    assert [word & 0xFFFFFFFF for word in got.tolist()] == philox_4x32_10(counter, key).tolist()


@pytest.mark.parametrize("count", [0, 1, 3, 4, 31, 32, 33, 1000, 16383, 16385, 40001])
def test_cpu_has_the_reference_bits(instruction_set, count):
    for step, stream in [(0, 0), (7, 3), (2**31, 5)]:
        got = words(SEEDS, step, stream, count)
        assert torch.equal(got, philox_reference(torch.tensor(SEEDS), torch.tensor(step), stream, count))


@pytest.mark.interpreter
@pytest.mark.parametrize("count", [0, 1, 5, 1023, 1024, 2051])
def test_triton_has_the_reference_bits(count):
    kernel = pytest.importorskip("sparse_gen.kernels.philox", reason="triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed, step = torch.tensor(SEEDS, device=device), torch.tensor(7, device=device)
    assert torch.equal(kernel.philox(seed, step, 3, count), philox_reference(seed, step, 3, count))


def test_numbers_depend_on_nothing_but_their_index():
    long = words([3, 9], 2, Stream.NOISE, 1000)
    assert torch.equal(words([9], 2, Stream.NOISE, 10)[0], long[1, :10])
    assert not torch.equal(words([9], 3, Stream.NOISE, 10)[0], long[1, :10])
    assert not torch.equal(words([9], 2, Stream.MASK, 10)[0], long[1, :10])


def test_uniform_never_reaches_its_ends():
    ends = uniform_from_words(torch.tensor([0, -1, 0x7FFFFFFF, -(2**31)], dtype=torch.int32))
    assert ends.tolist() == [2.0**-24, 1 - 2.0**-24, 0.5 - 2.0**-24, 0.5 + 2.0**-24]


def test_uniform_and_normal_have_their_moments():
    seed = seed_tensor([0, 1])
    u, n = uniform(seed, 0, Stream.Z, 200_000), normal(seed, 0, Stream.Z, 200_000)
    # Four standard errors of each moment at 400,000 numbers.
    assert u.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / 4e5) ** 0.5)
    assert u.var().item() == pytest.approx(1 / 12, abs=4 * (1 / 180 / 4e5) ** 0.5)
    assert n.mean().item() == pytest.approx(0, abs=4 * (1 / 4e5) ** 0.5)
    assert n.var().item() == pytest.approx(1, abs=4 * (2 / 4e5) ** 0.5)
    assert n.isfinite().all()


@pytest.mark.parametrize("seed", [1.5, "0", [], [0.5], [[0]], True, 2**63, None])
def test_a_seed_is_one_or_several_integers(seed):
    with pytest.raises(ValueError, match="expected a seed"):
        seed_tensor(seed)


def test_opcheck():
    torch.library.opcheck(torch.ops.sparse_gen.philox, (torch.tensor([0, 5]), torch.tensor(3), 1, 37))
