"""The recipe as a function, and small data sets in the layouts of the real ones: a folder, archives from a server."""

import gzip
import hashlib
import pickle
import struct
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from recipes.cifar import main as cifar_main


@pytest.fixture
def cifar(monkeypatch, tmp_path):
    """Run ``recipes/cifar.py`` with these arguments, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["cifar.py", *map(str, args)])
        return cifar_main()

    return run


@pytest.fixture
def image_folder(tmp_path):
    """PATH/{train,test}/CLASS/*.png: 3 classes, 8 training and 4 test images each, 16x16 RGB, lossless."""
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for split, count in (("train", 8), ("test", 4)):
        for c, name in enumerate(("cat", "dog", "owl")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                pixels[..., c] |= 128  # so that the classes differ
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Say nothing: a client that hangs up early is what some tests are about."""


@pytest.fixture
def web(tmp_path):
    """A folder, and the address at which this machine serves it."""
    folder = tmp_path / "web"
    folder.mkdir()
    server = _Server(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def _md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def _publish_cifar(monkeypatch, web, kind, batches, labels, classes):
    """Point torchvision's class ``kind`` to an archive of the published layout, 4 images a batch; their pixels."""
    (folder, address), rng = web, np.random.default_rng(0)
    base = folder / kind.base_folder
    base.mkdir()
    pixels = {}
    for name in batches:
        data = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": data, labels: [0, 1, 2, 3]}))
        pixels[name] = torch.from_numpy(data).view(-1, 3, 32, 32)
    meta = dict(kind.meta)
    (base / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: [str(i) for i in range(classes)]}))
    archive = folder / kind.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(base, arcname=kind.base_folder)
    monkeypatch.setattr(kind, "url", f"{address}/{archive.name}")
    monkeypatch.setattr(kind, "tgz_md5", _md5(archive))
    monkeypatch.setattr(kind, "train_list", [[n, _md5(base / n)] for n in batches if "test" not in n])
    monkeypatch.setattr(kind, "test_list", [[n, _md5(base / n)] for n in batches if "test" in n])
    monkeypatch.setattr(kind, "meta", meta | {"md5": _md5(base / meta["filename"])})
    return pixels


@pytest.fixture
def cifar10_online(monkeypatch, web):
    """CIFAR-10 with 20 training and 4 test images for download; the pixels by batch file."""
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return _publish_cifar(monkeypatch, web, datasets.CIFAR10, batches, "labels", 10)


@pytest.fixture
def cifar100_online(monkeypatch, web):
    """CIFAR-100 with 4 training and 4 test images for download; the pixels by batch file."""
    return _publish_cifar(monkeypatch, web, datasets.CIFAR100, ["train", "test"], "fine_labels", 100)


@pytest.fixture
def fashion_mnist_online(monkeypatch, web):
    """Fashion-MNIST with 5 training and 5 test images for download; the pixels by split."""
    (folder, address), rng = web, np.random.default_rng(0)
    resources, pixels = [], {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        data = rng.integers(0, 256, (5, 1, 28, 28), dtype=np.uint8)
        images = struct.pack(">IIII", 0x803, 5, 28, 28) + data.tobytes()
        labels = struct.pack(">II", 0x801, 5) + bytes(range(5))
        for name, content in ((f"{prefix}-images-idx3-ubyte.gz", images), (f"{prefix}-labels-idx1-ubyte.gz", labels)):
            (folder / name).write_bytes(gzip.compress(content))
            resources.append((name, _md5(folder / name)))
        pixels[split] = torch.from_numpy(data)
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [address + "/"])
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    return pixels
