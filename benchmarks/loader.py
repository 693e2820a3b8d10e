#!/usr/bin/env python3
"""The device-resident loader against torchvision's way: a ``DataLoader`` whose workers transform image by image.

    python benchmarks/loader.py [--data cifar10 | folder:PATH | digits] [--repeats 5] [--device cpu]

1. The loaders alone, over the same images: bar at least 10.
2. The same with a training step of ResNet-20 on every batch: bar at least 1.0 on the CPU, 5 on a GPU.

Both sides have the images decoded in memory before the clock starts, as torchvision's CIFAR10 holds them. Theirs makes
a PIL image of each and applies RandomCrop, RandomHorizontalFlip, ToTensor and Normalize, in workers that stay alive.
Time is taken by the wall, since workers are other processes; beside it stands the processor time of all processes
together, the start of the workers included. The two take turns; figures are medians of ratios within one turn.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout's packages are found beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.timing import clock_of, compared, in_turns, table, training_step, written
from recipes.errors import BadInput, leave
from recipes.images.augment import crop_padding
from recipes.images.data import channel_statistics
from recipes.images.order import Order
from recipes.images.resident import ResidentLoader
from recipes.images.source import Images, Source
from recipes.images.sources import open_source
from recipes.record import provenance
from torch_meanfield import MeanFieldResNet

BARS = {"loader": 10.0, "end to end, cpu": 1.0, "end to end, gpu": 5.0}


class Pictures(Dataset[tuple[Tensor, int]]):
    """Decoded images, each handed out as torchvision's CIFAR10 does it: a PIL image, transformed."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor]) -> None:
        pixels = images.pixels.permute(0, 2, 3, 1).contiguous().numpy()
        self.pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        self.labels, self.transform = images.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


def loaders(
    images: Images, mirror: bool, batch: int, device: torch.device, workers: int
) -> tuple[ResidentLoader, DataLoader[Any]]:
    """Ours and theirs over the same images."""
    side, channels = images.pixels.shape[-1], images.pixels.shape[1]
    mean, std = channel_statistics([images.pixels], channels)
    padding, generator = crop_padding(side), torch.Generator().manual_seed(0)
    order = Order(len(images), generator, padding=padding, mirror=mirror)
    ours = ResidentLoader(images, batch, order, mean, std, device)
    flip = [transforms.RandomHorizontalFlip()] if mirror else []
    steps = [transforms.RandomCrop(side, padding), *flip, transforms.ToTensor()]
    theirs: DataLoader[Any] = DataLoader(
        Pictures(images, transforms.Compose([*steps, transforms.Normalize(mean.tolist(), std.tolist())])),
        batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    return ours, theirs


def epoch(
    loader: Iterable[tuple[Tensor, Tensor]], device: torch.device, use: Callable[[Tensor, Tensor], None]
) -> Callable[[], None]:
    """One pass over ``loader``, each batch on the device and handed to ``use``."""

    def run() -> None:
        for images, labels in loader:
            use(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))

    return run


def network(source: Source, device: torch.device) -> nn.Module:
    """ResNet-20 with the same weights each time."""
    torch.manual_seed(0)
    return MeanFieldResNet(20, source.num_classes, source.in_chans).to(device)


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(
    source: Source,
    images: Images,
    args: argparse.Namespace,
    make_use: Callable[[], Callable[[Tensor, Tensor], None]],
    label: str,
) -> dict[str, Any]:
    """Theirs over ours: seconds for an epoch of ``images`` by the wall, and processor time."""
    device = torch.device(args.device)
    ours, theirs = loaders(images, source.mirror, args.batch, device, args.workers)
    contenders = {
        "DataLoader": epoch(theirs, device, make_use()),
        "resident": epoch(ours, device, make_use()),
    }
    seconds = in_turns(contenders, args.repeats, clock_of(device, processor=False), label)
    out = {"images": len(images), "batches": len(ours), **compared(seconds, "DataLoader", "resident")}
    del theirs, contenders  # ends the workers, whose time is counted from then on
    processor = {}
    for name in ("DataLoader", "resident"):
        spent = []
        for _ in range(max(1, args.repeats // 3)):
            ours, theirs = loaders(images, source.mirror, args.batch, device, args.workers)
            run = epoch(theirs if name == "DataLoader" else ours, device, make_use())
            begin = processor_seconds()
            run()
            del run, theirs, ours
            spent.append(processor_seconds() - begin)
        processor[name] = statistics.median(spent)
    out["processor_seconds"] = processor
    out["processor_ratio"] = processor["DataLoader"] / processor["resident"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="digits, cifar10, cifar100, fashion-mnist or folder:PATH")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision keeps what it downloads")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=25600, help="in an epoch of the loaders alone (at most)")
    parser.add_argument("--trained", type=int, help="in an epoch with training; 1024 on the CPU, else --images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of the processor; torch's choice by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loader.json")
    args = parser.parse_args()
    for name in ("batch", "repeats", "images", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    try:
        source = open_source(args.data, args.root)
        source.download()
        everything = source.decode("train")
    except BadInput as error:
        leave("loader.py", error)
    images = everything.select(torch.arange(min(args.images, len(everything))))
    trained = args.trained or (1024 if device.type == "cpu" else args.images)
    fewer = images.select(torch.arange(min(trained, len(images))))
    autocast = torch.bfloat16 if device.type == "cuda" else None
    alone = measure(source, images, args, lambda: lambda images, labels: None, "loaders alone")
    whole = measure(source, fewer, args, lambda: training_step(network(source, device), autocast), "with ResNet-20")
    result = {
        **provenance(device),
        "data": source.name,
        "batch": args.batch,
        "workers": args.workers,
        "bars": BARS,
        "loader": alone,
        "end to end": whole,
    }
    bar = BARS["end to end, cpu" if device.type == "cpu" else "end to end, gpu"]
    rows = [
        (
            name,
            *(f"{1e3 * row['seconds'][side] / row['batches']:.2f}" for side in ("DataLoader", "resident")),
            f"{row['ratio']:.2f} ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})",
            f"{row['processor_ratio']:.2f}",
            f"{limit:g}",
        )
        for name, row, limit in (("loader alone", alone, BARS["loader"]), ("with ResNet-20", whole, bar))
    ]
    head = ("", "DataLoader, ms/batch", "resident", "ratio (quartiles)", "of processor time", "bar")
    print(table(head, rows))
    written(result, args.out)


if __name__ == "__main__":
    main()
