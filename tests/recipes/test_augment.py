"""The batch augmentation against torchvision's transforms: every window possible, each as often as it should be."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from recipes.augment import crop_padding, normalise, pad_crop_mirror


def _windows(image, padding):
    """All images that pad, crop and mirror can make of one, keyed by their pixels: the (dy, dx, mirrored) of each."""
    c, h, w = image.shape
    padded = F.pad(image, (padding,) * 4)
    found = {}
    for dy in range(2 * padding + 1):
        for dx in range(2 * padding + 1):
            window = padded[:, dy : dy + h, dx : dx + w]
            found[window.numpy().tobytes()] = (dy, dx, False)
            found[window.flip(2).contiguous().numpy().tobytes()] = (dy, dx, True)
    return found


def _counts(outputs, windows):
    counts = dict.fromkeys(windows.values(), 0)
    for out in outputs:
        counts[windows[out.contiguous().numpy().tobytes()]] += 1  # KeyError: an impossible image
    return torch.tensor(list(counts.values()), dtype=torch.float64)


def _chi_square(counts):
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_every_window_is_as_likely_as_under_torchvision():
    image = torch.randint(1, 256, (3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    windows, n = _windows(image, 2), 20_000
    assert len(windows) == 50
    ours = pad_crop_mirror(image.expand(n, -1, -1, -1), 2, True, torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    reference = v2.Compose([v2.RandomCrop((6, 5), padding=2), v2.RandomHorizontalFlip()])
    theirs = [reference(image) for _ in range(n // 4)]
    # 49 degrees of freedom: mean 49, standard deviation 10. Five of them is chance one time in a million.
    assert _chi_square(_counts(ours, windows)) < 100
    assert _chi_square(_counts(theirs, windows)) < 100


def test_the_draws_of_different_images_and_directions_are_independent():
    images = torch.arange(1, 82, dtype=torch.uint8).view(1, 1, 9, 9).expand(4000, 1, 9, 9)
    out = pad_crop_mirror(images, 2, False, torch.Generator().manual_seed(0))
    centre = out[:, 0, 4, 4].long() - 1  # tells the offset: row and column of the pixel that came to the centre
    dy, dx = centre // 9 - 4, centre % 9 - 4
    assert sorted(dy.unique().tolist()) == sorted(dx.unique().tolist()) == [-2, -1, 0, 1, 2]
    for a, b in ((dy, dx), (dy[:-1], dy[1:]), (dx[:-1], dx[1:])):
        assert abs(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1]) < 5 / 4000**0.5


def test_no_mirror_and_no_padding_leave_the_images_as_they_are():
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(pad_crop_mirror(images, 0, False), images)


def test_a_generator_decides_alone():
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)
    before = torch.get_rng_state()
    first = pad_crop_mirror(images, 1, True, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, pad_crop_mirror(images, 1, True, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, pad_crop_mirror(images, 1, True, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize(("side", "padding"), [(32, 4), (8, 1), (28, 4), (64, 8), (4, 1)])
def test_the_padding_is_the_published_one_in_proportion(side, padding):
    assert crop_padding(side) == padding


def test_normalise_is_what_torchvision_does():
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean.tolist(), std.tolist())])
    torch.testing.assert_close(normalise(images, mean, std), reference(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("images", "padding"), [(torch.zeros(3, 8, 8), 1), (torch.zeros(1, 3, 8, 8), -1)])
def test_bad_arguments_are_named(images, padding):
    with pytest.raises(ValueError, match="images must have shape|padding must be"):
        pad_crop_mirror(images, padding, True)
