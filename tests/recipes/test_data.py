"""The data module: what a batch is, in memory and streamed, and that order and crops follow the seed alone."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import seed_everything
from torch.utils.data import Subset

from recipes.data import ImageData, InMemory, channel_statistics
from recipes.errors import BadInput, one_line


def _trainer(training=True, rank=0):
    return SimpleNamespace(
        training=training, global_rank=rank, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )


def _set_up(name="digits", seed=0, rank=0, **kwargs):
    seed_everything(seed, verbose=False)
    data = ImageData(name, **kwargs)
    data.trainer = _trainer(rank=rank)
    data.setup("fit")
    return data


def _batches(data, loader="train_dataloader"):
    return [data.on_after_batch_transfer(batch, 0) for batch in getattr(data, loader)()]


def _same(first, second):
    return all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_an_epoch_holds_every_training_image_once_normalised():
    data = _set_up(augment=False)
    images = torch.cat([pixels for pixels, _ in _batches(data)])
    assert images.shape == (1297, 1, 8, 8)
    assert images.dtype == torch.float32
    assert abs(float(images.mean())) < 1e-5
    assert abs(float(images.std()) - 1) < 1e-3
    plain = data.source.decode("train").pixels.flatten(1)
    seen = (images * data._std + data._mean).mul(255).round().to(torch.uint8).flatten(1)
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, plain.tolist()))


def test_evaluation_images_are_neither_shuffled_nor_augmented():
    data = _set_up()
    data.trainer = _trainer(training=False)
    for loader in ("val_dataloader", "test_dataloader"):
        images = torch.cat([pixels for pixels, _ in _batches(data, loader)])
        plain = data.source.decode("test").pixels
        torch.testing.assert_close(images * data._std + data._mean, plain / 255, rtol=0, atol=1e-5)


def test_training_images_are_augmented_but_digits_are_never_mirrored():
    data = _set_up()
    plain, cropped = _batches(_set_up(augment=False))[0][0], _batches(data)[0][0]
    assert not torch.equal(cropped, plain)
    padded = torch.nn.functional.pad(plain, (1,) * 4, value=float(-data._mean / data._std))
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)
    matches = (windows.flatten(2, 3) - cropped[:, :, None]).abs().amax(dim=(1, 3, 4)) < 1e-5  # (128, 9)
    assert matches.any(1).all()


def test_order_and_crops_follow_the_seed_and_nothing_the_model_draws():
    first, again = _set_up(), _set_up()
    torch.randn(1000)  # a model that draws more than its twin
    assert _same(_batches(first), _batches(again))
    assert not _same(_batches(first), _batches(_set_up()))  # the second epoch is another one
    assert not _same(_batches(_set_up()), _batches(_set_up(seed=1)))


def test_state_continues_the_order_where_it_stopped():
    data = _set_up()
    _batches(data)
    state = data.state_dict()
    second = _batches(data)
    resumed = _set_up(seed=5)
    resumed.load_state_dict(state)
    assert _same(_batches(resumed), second)


def test_processes_of_one_run_draw_different_crops_also_after_resuming():
    ranks = [_set_up(rank=r) for r in range(3)]
    state = ranks[0].state_dict()
    assert len({d._generator.initial_seed() for d in ranks}) == 3
    for d in ranks:
        d.load_state_dict(state)
    draws = [torch.rand(4, generator=d._generator).tolist() for d in ranks]
    assert draws[0] != draws[1] != draws[2] != draws[0]


def test_a_folder_too_large_for_memory_is_streamed_with_the_same_statistics(image_folder):
    memory = _set_up(f"folder:{image_folder}", batch_size=8)
    streamed = _set_up(f"folder:{image_folder}", batch_size=8, memory_limit_gib=1e-9, workers=0)
    assert isinstance(memory._data["train"], InMemory)
    assert not isinstance(streamed._data["train"], InMemory)
    assert (memory.streamed, streamed.streamed) == (False, True)
    torch.testing.assert_close(memory._mean, streamed._mean)
    torch.testing.assert_close(memory._std, streamed._std)
    for data in (memory, streamed):
        data.trainer = _trainer(training=False)
    assert _same(_batches(memory, "val_dataloader"), _batches(streamed, "val_dataloader"))


def test_both_paths_draw_from_one_distribution_of_augmented_images(image_folder):
    name = f"folder:{image_folder}"
    moments = []
    for limit in (2.0, 1e-9):
        data = _set_up(name, batch_size=24, memory_limit_gib=limit, workers=0)
        images = torch.cat([pixels for _ in range(150) for pixels, _ in _batches(data)])
        moments.append((images.mean(0), images.square().mean(0)))
    # 3,600 draws: the mean of a pixel of unit scale is known to 0.017; five of that.
    for ours, theirs in zip(*moments, strict=True):
        assert float((ours - theirs).abs().max()) < 0.2
        assert float((ours - theirs).abs().mean()) < 0.03


def test_streaming_in_workers_names_an_unreadable_image(image_folder):
    data = _set_up(f"folder:{image_folder}", memory_limit_gib=1e-9, workers=1, batch_size=24)
    (image_folder / "train" / "owl" / "2.png").write_bytes(b"")
    with pytest.raises(BadInput) as error:
        _batches(data)
    assert one_line(error.value).startswith(f"{image_folder}/train/owl/2.png is not a readable image")


@pytest.mark.parametrize("limit", [2.0, 1e-9])
def test_val_fraction_holds_back_training_images_by_the_seed(image_folder, limit):
    def parts(seed):
        data = _set_up(
            f"folder:{image_folder}", seed=seed, val_fraction=0.25, memory_limit_gib=limit, workers=0, augment=False
        )
        assert len(data._data["train"]) == 18
        assert len(data._data["val"]) == 6
        assert isinstance(data._data["val"], InMemory if limit > 1 else Subset)
        return [
            {image.numpy().tobytes() for pixels, _ in _batches(data, loader) for image in pixels}
            for loader in ("train_dataloader", "val_dataloader")
        ]

    train, val = parts(0)
    assert len(train | val) == 24
    assert not train & val
    assert parts(0)[1] == val
    assert parts(1)[1] != val


def test_channel_statistics_are_exact_and_a_constant_channel_is_harmless():
    pixels = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8)
    pixels[:, 2] = 7
    mean, std = channel_statistics(pixels.split(3), 3)
    flat = pixels.double().div(255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), flat.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(std[:2].double(), flat[:2].std(1, correction=0), rtol=1e-6, atol=1e-7)
    assert float(std[2]) == pytest.approx(1 / 255)


def test_the_label_names_the_data_set_in_results(image_folder):
    assert ImageData(f"folder:{image_folder}").label == "folder:images"
    assert ImageData(f"folder:{image_folder}", label="cifar10-jpeg").label == "cifar10-jpeg"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "--data.batch_size 0"),
        ({"eval_batch_size": -1}, "--data.eval_batch_size -1"),
        ({"padding": -1}, "--data.padding -1"),
        ({"workers": -2}, "--data.workers -2"),
        ({"val_fraction": 1.0}, "--data.val_fraction 1.0"),
    ],
)
def test_numbers_out_of_range_are_named(kwargs, message):
    with pytest.raises(BadInput, match=message):
        ImageData(**kwargs)


def test_a_val_fraction_that_leaves_nothing_is_refused():
    with pytest.raises(BadInput, match=r"val_fraction 0.0001 of 1297 training images leaves one part empty"):
        _set_up(val_fraction=1e-4)
