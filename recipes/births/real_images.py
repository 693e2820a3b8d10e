#!/usr/bin/env python3
"""Networks that train well as they are, on real images: what does birth and death change?

    python recipes/births/real_images.py [--data cifar10] [--root data] [--networks resnet20 vit] [--epochs 4]
                                         [--seeds 3] [--out runs/real_images]

ResNet-20 (no learnable times) under SGD with momentum, the learning rate divided by 10 at 50 % and 75 % of the steps,
and a small timm ViT (patches of 4 pixels, width 64, depth 6) under AdamW with warm-up and a cosine. Batches of 128, pad
4, crop, mirror. Bare and wrapped start from the same weights and see the same batches; the wrapper is
`BirthDeathOptimizer(optimizer, model)`, its populations found by itself, its settings the defaults. A run that has
finished is kept in the output folder and not done again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR

from recipes.births.comparison import Curve, Run, arguments, draw, save, table, timed
from recipes.errors import BadInput, leave
from recipes.images.augment import crop_padding, normalise, pad_crop_mirror
from recipes.images.data import channel_statistics
from recipes.images.source import Images, Source
from recipes.images.sources import open_source
from recipes.record import write_json
from torch_meanfield import BirthDeathOptimizer, MeanFieldResNet

BATCH = 128
METHODS = ("bare", "wrapped")
Recipe = tuple[nn.Module, Optimizer, LRScheduler]


def resnet20(source: Source, side: int, steps: int) -> Recipe:
    """The published protocol of ResNet-20, its schedule shortened in proportion."""
    model = MeanFieldResNet(20, source.num_classes, source.in_chans, learn_tau=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    return model, optimizer, MultiStepLR(optimizer, [max(1, steps // 2), max(1, 3 * steps // 4)], gamma=0.1)


def vit(source: Source, side: int, steps: int) -> Recipe:
    """A small vision transformer and the usual way to train one."""
    import timm

    patch = 4 if side >= 16 else 2
    if side % patch:
        raise BadInput(f"--networks vit: images of {side} pixels do not divide into patches of {patch}")
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=side,
        patch_size=patch,
        in_chans=source.in_chans,
        num_classes=source.num_classes,
        embed_dim=64,
        depth=6,
        num_heads=4,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    warm = max(1, steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))

    return model, optimizer, LambdaLR(optimizer, rate)


NETWORKS: dict[str, Callable[[Source, int, int], Recipe]] = {"resnet20": resnet20, "vit": vit}


class Data:
    """Both splits in memory, and the batches of an epoch as a seed orders and crops them."""

    def __init__(self, source: Source) -> None:
        source.download()
        self.train, self.test = source.decode("train"), source.decode("test")
        self.mean, self.std = channel_statistics(self.train.pixels.split(5000), source.in_chans)
        self.mirror = source.mirror
        self.steps = len(self.train) // BATCH
        if not self.steps:
            raise BadInput(f"--data {source.name}: {len(self.train)} training images do not fill a batch of {BATCH}")

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Cropped, mirrored and normalised images ``(BATCH, C, H, W)`` and their labels."""
        pixels = self.train.pixels[index]
        pixels = pad_crop_mirror(pixels, crop_padding(pixels.shape[-1]), self.mirror, generator)
        return normalise(pixels, self.mean, self.std), self.train.labels[index]

    @torch.no_grad()
    def error(self, model: nn.Module, images: Images) -> float:
        """The share of ``images`` that ``model`` gets wrong, in percent."""
        model.eval()
        wrong = 0
        for pixels, labels in zip(images.pixels.split(500), images.labels.split(500), strict=True):
            wrong += int((model(normalise(pixels, self.mean, self.std)).argmax(1) != labels).sum())
        model.train()
        return 100 * wrong / len(images)


def train(
    network: str, method: str, seed: int, source: Source, data: Data, epochs: int
) -> tuple[Curve, dict[str, Any]]:
    """One training; the curve of the test error in percent, and what birth and death did."""
    torch.manual_seed(seed)
    side = data.train.pixels.shape[-1]
    model, optimizer, schedule = NETWORKS[network](source, side, epochs * data.steps)
    model.train()
    extra: dict[str, Any] = {}
    if method == "wrapped":
        example = torch.zeros(1, source.in_chans, side, side)
        optimizer = wrapper = BirthDeathOptimizer(optimizer, model, example_input=example, seed=seed)
        populations = wrapper.populations
        extra = {"populations": len(populations), "units": sum(p.size for p in populations), "replaced": 0}
        wrapper.register_event_hook(lambda event: extra.update(replaced=extra["replaced"] + len(event.born)))
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for epoch in range(epochs):
        order = torch.randperm(len(data.train), generator=generator)[: data.steps * BATCH]
        for i, index in enumerate(order.view(data.steps, BATCH)):
            images, labels = data.batch(index, generator)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            if sys.stderr.isatty() and i % 10 == 0:
                print(f"\r{network} {method} epoch {epoch} step {i}/{data.steps}", end="", file=sys.stderr, flush=True)
        curve.append((float(epoch + 1), data.error(model, data.test)))
    return curve, extra


def report(runs: list[Run]) -> str:
    """The table of errors, and below it the paired difference for each network."""
    lines = [
        table(runs, "bare", "test error, %"),
        "| network | wrapped - bare, points, by seed | mean |",
        "|---|---|---|",
    ]
    for setting in dict.fromkeys(r.setting for r in runs):
        of = {(r.method, r.seed): r.final for r in runs if r.setting == setting}
        differences = [of["wrapped", s] - of["bare", s] for s in sorted({seed for _, seed in of})]
        mean = sum(differences) / len(differences)
        lines.append(f"| {setting} | {', '.join(f'{d:+.2f}' for d in differences)} | {mean:+.2f} |")
    lines.append("\n| network | populations | units | replaced over the training, by seed |\n|---|---|---|---|")
    for setting in dict.fromkeys(r.setting for r in runs):
        told = [r.extra for r in runs if r.setting == setting and r.method == "wrapped"]
        replaced = ", ".join(str(e["replaced"]) for e in told)
        lines.append(f"| {setting} | {told[0]['populations']} | {told[0]['units']} | {replaced} |")
    return "\n".join(lines) + "\n"


def kept(folder: Path, settings: dict[str, Any], setting: str, method: str, seed: int, run: Callable[[], Run]) -> Run:
    """The finished run in ``folder``, or ``run()``, written there.

    Raises:
        BadInput: ``folder`` holds a run of other settings.
    """
    path = folder / f"{setting}-{method}-{seed}.json".replace(" ", "_")
    if path.exists():
        old = json.loads(path.read_text())
        if old["settings"] != settings:
            raise BadInput(f"--out {folder} holds runs of other settings ({old['settings']}); pass another folder")
        return Run(**{**old["run"], "curve": [tuple(at) for at in old["run"]["curve"]]})
    done = run()
    write_json(path, {"settings": settings, "run": asdict(done)})
    return done


def main() -> None:
    parser = arguments("real_images", __doc__)
    parser.set_defaults(seeds=3)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, cifar10, or folder:PATH")
    parser.add_argument("--label", help="how the table names the data set; its own name by default")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision keeps what it downloads")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="threads of the processor (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = {"data": args.data, "epochs": args.epochs, "batch": BATCH}
    runs = []
    try:
        source = open_source(args.data, args.root, None)
        data = Data(source)
        for network in args.networks:
            setting = f"{network} on {args.label or source.name}"
            for seed in range(args.seeds):
                for method in METHODS:
                    runs.append(
                        kept(
                            args.out / "runs",
                            settings,
                            setting,
                            method,
                            seed,
                            lambda n=network, w=setting, m=method, s=seed: timed(
                                w, m, s, lambda: train(n, m, s, source, data, args.epochs)
                            ),
                        )
                    )
    except BadInput as error:
        leave("real_images.py", error)
    save(args.out, "real_images", report(runs), runs, settings)
    draw(args.out, "real_images", runs, "epoch", "test error, %")


if __name__ == "__main__":
    main()
