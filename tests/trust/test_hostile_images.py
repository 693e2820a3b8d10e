"""Data folders with images that are none, or that are bombs: the file is named, before or while it is read."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from recipes.cifar import main
from recipes.errors import BadInput
from recipes.images.folder import Folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """PATH/{train,test}/{cat,dog}/{0,1,2}.png, 8x8 pixels."""
    for split in ("train", "test"):
        for c, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (80 * c, 40 * i, 9)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kB that says it has width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    lines = zlib.compress(bytes(width + 1) * 64)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.png")


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "zero bytes": lambda p: p.write_bytes(b""),
    "a text": lambda p: p.write_text("an image of a dog\n" * 50),
    "a pickle": lambda p: p.write_bytes(b"\x80\x04cposix\nsystem\n(S'true'\ntR."),
    "half a file": _half,
    "a page of the web": lambda p: p.write_text("<!DOCTYPE html><html><body>404</body></html>"),
    "a link to nothing": _link,
    "a bomb": lambda p: p.write_bytes(bomb(60_000, 60_000)),
    "a giant": lambda p: p.write_bytes(bomb(12_000, 12_000)),  # under Pillow's limit, but over its warning
    "no pixels": lambda p: p.write_bytes(bomb(0, 5)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_file_is_named_when_decoded_and_when_streamed(kind: str, images: Path) -> None:
    path = images / "train" / "dog" / "1.png"
    DAMAGE[kind](path)
    with pytest.raises(BadInput, match=r"dog.1\.png is not a readable image.*; replace or remove it"):
        Folder(images).decode("train")
    with pytest.raises(BadInput, match=r"dog.1\.png is not a readable image"):
        list(Folder(images).stream("train", v2.Identity()))
    assert Folder(images).decode("test").pixels.shape == (6, 3, 8, 8)  # what is whole is read


def test_a_workers_complaint_is_the_same_one(images: Path) -> None:
    (images / "train" / "cat" / "2.png").write_bytes(b"")
    loader = torch.utils.data.DataLoader(Folder(images).stream("train", v2.Identity()), batch_size=2, num_workers=1)
    with pytest.raises(BadInput, match=r"cat.2\.png is not a readable image"):
        list(loader)


def test_the_command_ends_with_2_and_names_the_file(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "train" / "cat" / "0.png").write_text("no image")
    monkeypatch.chdir(images)
    command = ["cifar.py", "fit", "--data", f"folder:{images}", "--trainer.accelerator", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--trainer.max_epochs", "1", "--model.depth", "8"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "cat/0.png is not a readable image" in said and len(said.splitlines()) == 1
    assert not (images / "runs").exists()
