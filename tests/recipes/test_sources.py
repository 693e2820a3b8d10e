"""Each data set by name; torchvision's own download code runs, on small archives in the layout of the real ones."""

from pathlib import Path

import pytest
import torch
from torchvision import datasets

from recipes.errors import BadInput
from recipes.images.sources import open_source


def _check_cifar(source, pixels, train, num_classes):
    source.download()
    images = source.decode("train")
    assert torch.equal(images.pixels, torch.cat([pixels[name] for name in train]))
    assert images.labels.tolist() == list(range(4)) * len(train)
    assert len(source.decode("test")) == 4
    assert (source.num_classes, source.in_chans, source.mirror) == (num_classes, 3, True)


def test_cifar10_is_downloaded_and_decoded(tmp_path, cifar10_online):
    train = [f"data_batch_{i}" for i in range(1, 6)]
    _check_cifar(open_source("cifar10", tmp_path / "data"), cifar10_online, train, 10)


def test_cifar100_is_downloaded_and_decoded(tmp_path, cifar100_online):
    _check_cifar(open_source("cifar100", tmp_path / "data"), cifar100_online, ["train"], 100)


def test_fashion_mnist_is_downloaded_and_decoded(tmp_path, fashion_mnist_online):
    source = open_source("fashion-mnist", tmp_path / "data")
    source.download()
    for split in ("train", "test"):
        images = source.decode(split)
        assert torch.equal(images.pixels, fashion_mnist_online[split])
        assert images.labels.tolist() == [0, 1, 2, 3, 4]
    assert (source.num_classes, source.in_chans) == (10, 1)


def test_a_download_that_fails_names_the_data_set_and_the_folder(tmp_path, web, monkeypatch):
    _, address = web
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}/nowhere.tar.gz")
    with pytest.raises(BadInput, match=r"cifar10.*data.*digits, which needs no download"):
        open_source("cifar10", tmp_path / "data").download()


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_a_partial_archive_is_deleted_named_and_downloaded_anew(tmp_path, request, web, capsys, kind):
    request.getfixturevalue(f"{kind}_online")
    source = open_source(kind, tmp_path)
    archive = tmp_path / getattr(datasets, kind.upper()).filename
    archive.write_bytes((web[0] / archive.name).read_bytes()[:300])
    source.download()
    told = capsys.readouterr().err.splitlines()[0]  # before torchvision's bar
    assert told == f"--data {kind}: downloading anew; deleted what was damaged: {archive}"
    assert len(source.decode("test")) == 4
    source.download()
    assert capsys.readouterr().err == ""


def test_a_download_broken_off_by_hand_leaves_no_partial_file(tmp_path, cifar10_online, monkeypatch):
    from torchvision.datasets import utils

    def broken(url, path, chunk_size=1):
        Path(path).write_bytes(b"some of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "_urlretrieve", broken)
    with pytest.raises(KeyboardInterrupt):
        open_source("cifar10", tmp_path / "data").download()
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("damage", ["archive", "unpacked", "header"])
def test_half_of_fashion_mnist_is_never_read(tmp_path, fashion_mnist_online, capsys, damage):
    source = open_source("fashion-mnist", tmp_path)
    source.download()
    raw = tmp_path / "FashionMNIST" / "raw"
    unpacked = raw / "train-images-idx3-ubyte"
    unpacked.write_bytes(unpacked.read_bytes()[: 3 if damage == "header" else 2000])
    named = [unpacked]
    if damage == "archive":  # an interruption while it was fetched: there is no unpacked file
        unpacked.unlink()
        named = [raw / "train-images-idx3-ubyte.gz"]
        named[0].write_bytes(named[0].read_bytes()[:-50])
    capsys.readouterr()
    source.download()
    assert ", ".join(map(str, named)) in capsys.readouterr().err
    assert torch.equal(source.decode("train").pixels, fashion_mnist_online["train"])


def test_digits_split_is_fixed_balanced_and_disjoint():
    from sklearn.datasets import load_digits

    source = open_source("digits", Path("unused"))
    train, test = source.decode("train"), source.decode("test")
    assert (len(train), len(test)) == (1297, 500)
    assert train.pixels.shape[1:] == (1, 8, 8)
    assert train.pixels.dtype == torch.uint8
    assert int(train.pixels.max()) == 255
    counts = test.labels.bincount()
    assert counts.min() >= 45
    assert counts.max() <= 55
    torch.manual_seed(99)
    assert torch.equal(open_source("digits", Path("unused")).decode("test").pixels, test.pixels)
    both = torch.cat([train.pixels, test.pixels]).flatten(1)
    whole = torch.from_numpy(load_digits().images).mul(255 / 16).round().to(torch.uint8).flatten(1)
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, whole.tolist()))  # none twice, none missing
    assert not source.mirror


@pytest.mark.parametrize("name", ["mnist", "", "folder:", "CIFAR10"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(BadInput, match=r"digits, cifar10, cifar100, fashion-mnist, or folder:PATH"):
        open_source(name, Path("data"))
