"""Image folders: the same pixels as torchvision's ImageFolder, and what is wrong with a folder said at once."""

import shutil

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from recipes.errors import BadInput
from recipes.images.folder import Folder


@pytest.mark.parametrize("split", ["train", "test"])
def test_decoded_and_streamed_images_are_those_of_image_folder(image_folder, split):
    reference = ImageFolder(str(image_folder / split), transform=v2.PILToTensor())
    folder = Folder(image_folder)
    decoded, streamed = folder.decode(split), folder.stream(split, v2.Identity())
    assert len(decoded) == len(streamed) == len(reference)
    for i, (pixels, label) in enumerate(reference):
        assert torch.equal(decoded.pixels[i], pixels)
        assert torch.equal(streamed[i][0], pixels)
        assert int(decoded.labels[i]) == streamed[i][1] == label
    assert (folder.num_classes, folder.in_chans, folder.name) == (3, 3, "folder:images")
    assert folder.nbytes() == (24 + 12) * 3 * 16 * 16


def test_images_of_other_sizes_and_modes_are_brought_to_one(image_folder):
    Image.new("L", (20, 31), 200).save(image_folder / "train" / "cat" / "grey.png")
    with pytest.raises(BadInput, match=r"grey.png is 20x31 pixels, but the first training image is 16x16; pass --data"):
        Folder(image_folder).decode("train")
    pixels = Folder(image_folder, size=12).decode("train").pixels
    assert pixels.shape == (25, 3, 12, 12)
    assert (pixels[8] == 200).all()  # the grey one, in all three channels


def test_a_first_image_that_is_not_square_asks_for_a_size(image_folder):
    Image.new("RGB", (20, 31)).save(image_folder / "train" / "cat" / "0.png")
    with pytest.raises(BadInput, match=r"not square; pass --data.size PIXELS"):
        Folder(image_folder).side()


def _without(name):
    return lambda root: shutil.rmtree(root / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root), "there is no such folder"),
        (_without("train"), "no train/ in it"),
        (_without("test"), "no test/ in it; images are expected as .*/train/CLASS/FILE"),
        (_without("test/owl"), "must hold the same classes; owl only in train/"),
        (_without("train/owl"), "must hold the same classes; owl only in test/"),
        (lambda root: [f.unlink() for f in (root / "train" / "owl").iterdir()], "no valid file for the classes owl"),
        (lambda root: [shutil.rmtree(d) for d in (root / "test").iterdir()], "find any class folder"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_when_it_is_opened(image_folder, damage, message):
    damage(image_folder)
    with pytest.raises(BadInput, match=message):
        Folder(image_folder)


def test_a_size_that_is_none_is_refused(image_folder):
    with pytest.raises(BadInput, match="--data.size 0"):
        Folder(image_folder, size=0)


@pytest.mark.parametrize("content", [b"", b"no image at all", "half"])
def test_an_unreadable_image_is_named(image_folder, content):
    path = image_folder / "train" / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:200] if content == "half" else content)
    with pytest.raises(BadInput, match=r"dog.3\.png is not a readable image"):
        Folder(image_folder).decode("train")
    with pytest.raises(BadInput, match=r"dog.3\.png is not a readable image"):
        list(Folder(image_folder).stream("train", v2.Identity()))
