"""The batch augmentation against torchvision's transforms: every window possible, each as often as it should be."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from recipes.images.augment import crop_padding, cut_windows, draw_windows, normalise, pad_crop_mirror


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


def test_crops_and_mirror_images_are_as_often_as_under_the_published_transforms():
    # Each pixel tells its place: row and column of the first one, and its neighbour, are offset and mirroring.
    place = torch.arange(1, 40 * 40 + 1, dtype=torch.int32).view(1, 40, 40)
    inner, n, offsets = place[:, 4:36, 4:36], 40_000, []
    ours = pad_crop_mirror(inner.expand(n, 1, 32, 32), 4, True, torch.Generator().manual_seed(0))[:, 0]
    torch.manual_seed(0)
    reference = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    theirs = torch.stack([reference(inner)[0] for _ in range(n // 4)])
    for images in (ours, theirs):
        centre, right = images[:, 15, 15].long(), images[:, 15, 16].long()
        mirrored = (right < centre).long()
        left = torch.where(mirrored == 1, images[:, 15, 16].long(), centre) - 1
        offsets.append(torch.stack([left // 40 - 15, left % 40 - 15, mirrored]))
        dy, dx, mirrored = offsets[-1]
        for values, count in ((dy, 9), (dx, 9), (mirrored, 2), ((dy * 9 + dx) * 2 + mirrored, 162)):
            counts = torch.bincount(values, minlength=count).double()
            assert len(counts) == count
            # Mean count - 1, standard deviation sqrt(2 count - 2); five of them is chance one time in a million.
            assert _chi_square(counts) < count - 1 + 5 * (2 * count - 2) ** 0.5
    first, second = (o.double() for o in offsets)
    assert float((first.mean(1) - second.mean(1)).abs().max()) < 5 * 2.6 / (n // 4) ** 0.5


def test_drawn_at_once_or_batch_by_batch_the_windows_are_the_same():
    whole = draw_windows(1000, 4, True, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(torch.cat([draw_windows(k, 4, True, generator) for k in (128, 1, 7, 864)]), whole)
    assert int(whole.min()) >= 0 and int(whole.max()) < 162


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_a_window_is_where_its_number_says(dtype):
    images = torch.randint(1, 256, (50, 2, 5, 4), generator=torch.Generator().manual_seed(0)).to(dtype)
    windows = torch.arange(50)  # every one there is: padding 2, mirrored and not
    padded = F.pad(images, (2,) * 4)
    for image, window, out in zip(padded, windows.tolist(), cut_windows(images, 2, windows), strict=True):
        dy, dx = window // 5 % 5, window % 5
        expected = image[:, dy : dy + 5, dx : dx + 4]
        assert torch.equal(out, expected.flip(2) if window >= 25 else expected)
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[10:]  # channels last, and not from the start
    assert torch.equal(cut_windows(strided, 2, windows[10:]), cut_windows(images, 2, windows)[10:])


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


def test_windows_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"windows must have shape \(2,\), got \(3,\)"):
        cut_windows(torch.zeros(2, 3, 8, 8), 1, torch.zeros(3, dtype=torch.int64))
