"""Batches from the device: what each of them is, given the draws, and that little is done for each."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DistributedSampler

from recipes.images.augment import draw_windows
from recipes.images.order import Order
from recipes.images.resident import ResidentLoader, fits
from recipes.images.source import Images

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


def _images(n=20, side=6):
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator), torch.arange(n))


def _order(n=20, seed=3, **kwargs):
    return Order(n, torch.Generator().manual_seed(seed), **kwargs)


def _one_by_one(images, order, windows, padding):
    """The plain reference: each image padded, cut and mirrored by itself."""
    choices, (h, w) = 2 * padding + 1, images.pixels.shape[2:]
    for i, window in zip(order.tolist(), windows.tolist(), strict=True):
        padded = F.pad(images.pixels[i], (padding,) * 4)
        mirrored, dy, dx = window // choices**2, window // choices % choices, window % choices
        pixels = padded[:, dy : dy + h, dx : dx + w]
        pixels = pixels.flip(2) if mirrored else pixels
        yield (pixels / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1), int(images.labels[i])


@pytest.mark.parametrize("mirror", [True, False])
def test_batches_are_what_the_draws_say(mirror):
    images, padding = _images(), 2
    loader = ResidentLoader(images, 8, _order(padding=padding, mirror=mirror), MEAN, STD)
    twin = _order(padding=padding, mirror=mirror)
    for _ in range(2):
        order, windows = twin.draw()
        assert bool((windows >= 25).any()) == mirror
        batches = list(loader)
        assert [len(labels) for _, labels in batches] == [8, 8, 4]
        expected = list(_one_by_one(images, order, windows, padding))
        assert torch.cat([labels for _, labels in batches]).tolist() == [label for _, label in expected]
        pixels = torch.cat([pixels for pixels, _ in batches])
        torch.testing.assert_close(pixels, torch.stack([p for p, _ in expected]), rtol=0, atol=1e-5)


def test_without_padding_images_are_whole_and_without_a_generator_they_come_as_they_lie():
    images = _images()
    ((pixels, labels),) = ResidentLoader(images, 20, Order(20), MEAN, STD)
    assert labels.tolist() == list(range(20))
    torch.testing.assert_close(pixels * STD.view(3, 1, 1) + MEAN.view(3, 1, 1), images.pixels / 255)


def test_an_epoch_draws_one_number_and_only_when_it_is_begun():
    order = _order(padding=1, mirror=True)
    loader = ResidentLoader(_images(), 8, order, MEAN, STD)
    before, everywhere = order.generator.get_state(), torch.get_rng_state()
    iter(loader)  # Lightning makes iterators that it never uses
    assert torch.equal(order.generator.get_state(), before)
    list(loader)
    expected = torch.Generator().manual_seed(3)
    torch.randint(2**62, (1,), generator=expected)
    assert torch.equal(order.generator.get_state(), expected.get_state())
    assert torch.equal(torch.get_rng_state(), everywhere)


@pytest.mark.parametrize(("n", "world_size"), [(20, 1), (20, 3), (21, 4), (3, 8)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shares_are_those_of_the_distributed_sampler(n, world_size, shuffle):
    whole, _ = _order(n, shuffle=shuffle).draw()
    for rank in range(world_size):
        order = _order(n, shuffle=shuffle, rank=rank, world_size=world_size)
        reference = DistributedSampler(whole, world_size, rank, shuffle=False)
        assert len(order) == len(reference)
        assert order.draw()[0].tolist() == whole[list(reference)].tolist()
    assert (whole.tolist() == list(range(n))) != shuffle


def test_processes_draw_windows_of_their_own_and_a_sampler_gives_them_away():
    windows = []
    for rank in range(3):
        order = _order(rank=rank, world_size=3, padding=2, mirror=True)
        state = order.generator.get_state()
        numbers, drawn = order.draw()
        windows.append(drawn.tolist())
        order.generator.set_state(state)
        assert list(order) == list(zip(numbers.tolist(), drawn.tolist(), strict=True))
    assert windows[0] != windows[1] != windows[2] != windows[0]
    number = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(3)))
    assert windows[1] == draw_windows(7, 2, True, torch.Generator().manual_seed(number + 2)).tolist()


class _Operations(TorchDispatchMode):
    """Which operations a batch takes."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_batch_waits_for_nothing_and_takes_as_much_work_whatever_its_size():
    counts = []
    for batch_size in (5, 10):
        batches = iter(ResidentLoader(_images(), batch_size, _order(padding=2, mirror=True), MEAN, STD))
        next(batches)
        with _Operations() as seen:
            next(batches)
        # What reads from the device, or copies to it, makes the host wait.
        assert not {"_local_scalar_dense", "item", "nonzero", "masked_select", "randint", "randperm"} & set(seen.names)
        assert seen.names.count("_to_copy") == 1  # to float32
        counts.append(len(seen.names))
    assert counts[0] == counts[1] < 60


def test_a_gpu_takes_what_half_of_its_free_memory_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    assert fits(500, torch.device("cuda", 0))
    assert not fits(501, torch.device("cuda", 0))
    assert fits(10**18, torch.device("cpu"))
    assert not fits(1, torch.device("meta"))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        ResidentLoader(_images(), 0, _order(), MEAN, STD)
    with pytest.raises(ValueError, match="order is of 7 images, but there are 20"):
        ResidentLoader(_images(), 4, _order(7), MEAN, STD)
