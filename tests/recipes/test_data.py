"""The data module: what a batch is, in memory and streamed, and that order and crops follow the seed alone."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, Subset

from recipes.errors import BadInput, one_line
from recipes.images.data import ImageData, InMemory, channel_statistics
from recipes.images.resident import ResidentLoader


def _trainer(training=True, rank=0, world_size=1, **kwargs):
    return SimpleNamespace(
        training=training,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size} if world_size > 1 else None,
        **kwargs,
    )


def _set_up(name="digits", seed=0, rank=0, world_size=1, overfit_batches=0, **kwargs):
    seed_everything(seed, verbose=False)
    data = ImageData(name, **kwargs)
    data.trainer = _trainer(rank=rank, world_size=world_size, overfit_batches=overfit_batches)
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


def test_processes_of_one_run_share_the_images_and_draw_different_crops_also_after_resuming():
    for resident in (True, False):
        shares = [_images(_set_up(rank=r, world_size=3, resident=resident, augment=False)) for r in range(3)]
        assert [len(share) for share in shares] == [433] * 3  # 1,297 images and two of them twice
        assert len({image for share in shares for image in share}) == len(set(_images(_set_up(augment=False))))
        ranks = [_set_up(rank=r, world_size=3, resident=resident) for r in range(3)]
        for d in ranks:
            _batches(d)
        state = ranks[0].state_dict()
        second = [_batches(d) for d in ranks]
        resumed = [_set_up(seed=7, rank=r, world_size=3, resident=resident) for r in range(3)]
        for d, expected in zip(resumed, second, strict=True):
            d.load_state_dict(state)  # what rank 0 has written
            assert _same(_batches(d), expected)


def _images(data):
    return [tuple(x.flatten().tolist()) for batch, _ in _batches(data) for x in batch]


def test_processes_crop_the_same_image_differently(image_folder):
    images = []
    for rank in range(2):
        data = _set_up(f"folder:{image_folder}", rank=rank, world_size=2, batch_size=12)
        data._data["train"].images.pixels[:] = data._data["train"].images.pixels[0]
        images.append(_batches(data)[0][0])
    assert not torch.equal(*images)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("digits", {}), ("digits", {"workers": 1}), ("folder", {"batch_size": 7}), ("folder", {"mirror": False})],
)
def test_resident_batches_are_those_of_the_data_loader(name, kwargs, image_folder):
    name = f"folder:{image_folder}" if name == "folder" else name
    resident, loaded = (_set_up(name, resident=r, **kwargs) for r in (True, False))
    assert isinstance(resident.train_dataloader(), ResidentLoader)
    assert isinstance(loaded.train_dataloader(), DataLoader)
    for _ in range(2):
        assert _same(_batches(resident), _batches(loaded))
        assert torch.equal(resident.state_dict()["generator"], loaded.state_dict()["generator"])
    for data in (resident, loaded):
        data.trainer = _trainer(training=False)
    assert _same(_batches(resident, "val_dataloader"), _batches(loaded, "val_dataloader"))


def test_the_images_stay_on_the_device_unless_told_otherwise(image_folder):
    assert isinstance(_set_up().train_dataloader(), ResidentLoader)
    assert isinstance(_set_up(resident=False).train_dataloader(), DataLoader)
    streamed = _set_up(f"folder:{image_folder}", memory_limit_gib=1e-9, workers=0)
    assert isinstance(streamed.train_dataloader(), DataLoader)
    data = _set_up()
    assert data.val_dataloader().pixels.data_ptr() == data.test_dataloader().pixels.data_ptr()
    assert data.train_dataloader().pixels.data_ptr() == data._data["train"].images.pixels.data_ptr()


def test_what_does_not_fit_the_device_is_loaded_and_refused_if_insisted_on(monkeypatch):
    asked = []
    monkeypatch.setattr("recipes.images.data.fits", lambda nbytes, device: asked.append(nbytes))
    assert isinstance(_set_up().train_dataloader(), DataLoader)
    assert asked == [1797 * 64]  # the test images, which are those of the validation, once
    with pytest.raises(BadInput, match=r"--data.resident true: 0.00 GiB of images .* free on cpu"):
        _set_up(resident=True).train_dataloader()


def test_streamed_images_cannot_be_resident(image_folder):
    with pytest.raises(BadInput, match=r"--data.resident true: the images are too many for memory"):
        _set_up(f"folder:{image_folder}", memory_limit_gib=1e-9, resident=True)


@pytest.mark.parametrize("resident", [True, False])
def test_overfitting_sees_the_images_as_they_lie(resident):
    data = _set_up(resident=resident, overfit_batches=1, augment=False)
    first, again = _batches(data), _batches(data)
    assert _same(first, again)
    plain = data.source.decode("train")
    assert torch.equal(torch.cat([labels for _, labels in first]), plain.labels)


@pytest.mark.parametrize("resident", [True, False])
def test_a_resumed_training_is_the_uninterrupted_one(resident, tmp_path):
    class Sums(LightningModule):
        """Remembers what it was shown."""

        def __init__(self):
            super().__init__()
            self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

        def training_step(self, batch, batch_idx):
            self.seen.append((batch[0].double().sum().item(), batch[1].sum().item()))
            return self.weight * 0.0

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(epochs, ckpt_path=None, **kwargs):
        seed_everything(0, verbose=False)
        task, data = Sums(), ImageData(resident=resident)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **kwargs,
        )
        trainer.fit(task, data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return task.seen

    for limits in ({}, {"limit_train_batches": 3}):
        whole, first = fit(3, **limits), fit(1, **limits)
        assert len(whole) == 3 * len(first) == (9 if limits else 33)
        assert whole == first + fit(3, tmp_path / "1.ckpt", **limits)
        assert len(set(whole)) == len(whole)


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
