"""Ring energies against the whole spectrum, and what they say of known images."""

import pytest
import torch

from sparse_gen.analysis import ring_energies


def direct(image, rings):
    """Straight from the shifted spectrum, frequency by frequency."""
    height, width = image.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(image.double()), dim=(-2, -1)) / (height * width)
    energy = torch.zeros(len(image), rings, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            frequency = ((row - height // 2) / height) ** 2 + ((column - width // 2) / width) ** 2
            ring = min(int(2 * frequency**0.5 * rings), rings - 1)
            energy[:, ring] += spectrum[..., row, column].abs().square().mean(dim=1)
    return energy


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (12, 5), (1, 6), (16, 10)])
@pytest.mark.parametrize("rings", [1, 5, 13])
def test_they_are_the_whole_spectrums(size, rings):
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(ring_energies(image, rings), direct(image, rings), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("size", [(33, 20), (64, 64)])
def test_they_sum_to_the_mean_square(size):
    image = torch.rand(2, 3, *size)
    torch.testing.assert_close(ring_energies(image, 7).sum(dim=1), image.square().mean(dim=(1, 2, 3)))


def test_a_wave_lies_in_the_ring_of_its_frequency():
    columns = torch.arange(64) / 64
    for cycles in (0, 4, 10, 17, 23, 31):
        wave = torch.cos(2 * torch.pi * cycles * columns).expand(1, 1, 64, 64)
        energy = ring_energies(wave, 5)[0]
        assert int(energy.argmax()) == int(2 * cycles / 64 * 5)
        assert energy.max() / energy.sum() > 0.999


def test_white_noise_fills_rings_by_their_area():
    torch.manual_seed(0)
    energy = ring_energies(torch.randn(20, 3, 64, 64), 4).mean(dim=0)
    assert energy[0] / energy[1] == pytest.approx(1 / 3, rel=0.1)
    assert energy[1] / energy[2] == pytest.approx(3 / 5, rel=0.1)
