#!/usr/bin/env python3
"""A network half of whose ReLUs are dead at the start, on real images: who brings them back, and what it is worth.

    python recipes/births/dead_neurons.py [--data digits] [--root data] [--epochs 2] [--seeds 5]
                                          [--out runs/dead_neurons]

An MLP with two hidden layers of 256; in each, the biases of half of the units begin at -10, so that no image reaches
them and no gradient wakes them. Adam, batches of 128. The peer re-initialises, at the same steps, units whose mean
activation is below 0.025 of the layer's mean and zeroes their outgoing weights (ReDo: Sokar et al. 2023,
arXiv:2302.12902). Birth-death finds the dead units by itself, at the wrapper's defaults but for the number of steps
between events, and with ``scheme="plastic"``, of which nothing is set. All start from the same weights and see the same
batches.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from recipes.births.comparison import Curve, Run, arguments, draw, save, table, timed
from recipes.errors import BadInput, leave
from recipes.images.data import channel_statistics
from recipes.images.source import Images
from recipes.images.sources import open_source
from torch_meanfield.width import BirthDeathOptimizer

WIDTH, BATCH, LR, SHARE = 256, 128, 1e-3, 0.5
EVENTS = 10  # in each epoch: the first can come when potentials have been watched for half of that
THRESHOLD = 0.025  # of the peer
METHODS = ("plain", "peer (ReDo)", "birth-death", "birth-death, plastic")


class Mlp(nn.Module):
    """Two hidden layers, a share of whose units is dead."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(inputs, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, classes)])
        with torch.no_grad():
            for layer in self.hidden():
                layer.bias[: int(SHARE * WIDTH)] -= 10

    def hidden(self) -> list[Any]:
        """The layers whose outputs are hidden units."""
        return list(self.layers)[:-1]

    def activations(self, x: Tensor) -> list[Tensor]:
        """The hidden units' values, layer by layer."""
        out = []
        for layer in self.hidden():
            x = torch.relu(layer(x))
            out.append(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[-1](self.activations(x)[-1])

    def populations(self) -> list[list[tuple[Tensor, int]]]:
        """Each hidden layer's units: incoming weights and bias, then what reads them."""
        pairs = zip(self.hidden(), list(self.layers)[1:], strict=True)
        return [[(a.weight, 0), (a.bias, 0), (b.weight, 1)] for a, b in pairs]


@torch.no_grad()
def redo_(model: Mlp, x: Tensor, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    """The peer method: units with a small mean activation are re-initialised, outgoing weights and state zeroed."""
    for values, layer, reader in zip(model.activations(x), model.hidden(), list(model.layers)[1:], strict=True):
        mean = values.abs().mean(0)
        dormant = (mean <= THRESHOLD * mean.mean()).nonzero().flatten()
        bound = layer.in_features**-0.5
        layer.weight[dormant] = torch.empty(len(dormant), layer.in_features).uniform_(
            -bound, bound, generator=generator
        )
        layer.bias[dormant] = torch.empty(len(dormant)).uniform_(-bound, bound, generator=generator)
        reader.weight[:, dormant] = 0
        for p, rows in ((layer.weight, (dormant,)), (layer.bias, (dormant,)), (reader.weight, (slice(None), dormant))):
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[p][key][rows] = 0


@torch.no_grad()
def alive(model: Mlp, x: Tensor) -> float:
    """Of the units that began dead, the percentage that some image reaches now."""
    began = int(SHARE * WIDTH)
    reached = [(values > 0).any(0)[:began] for values in model.activations(x)]
    return 100 * float(torch.cat(reached).float().mean())


def images(split: Images, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised pixels, flattened; shape ``(N, C * H * W)``."""
    return ((split.pixels.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).flatten(1)


def train(
    method: str, seed: int, data: tuple[Tensor, Tensor, Tensor, Tensor], epochs: int
) -> tuple[Curve, dict[str, Any]]:
    """One training; the curve of the test error in percent, and how many dead units live after the first epoch."""
    x, y, test_x, test_y = data
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Mlp(x.shape[1], int(y.max()) + 1)
    inner = torch.optim.Adam(model.parameters(), lr=LR)
    optimizer: torch.optim.Optimizer = inner
    steps = len(x) // BATCH
    every = max(1, steps // EVENTS)
    if method.startswith("birth-death"):
        settings: dict[str, Any] = {"scheme": "plastic"} if method.endswith("plastic") else {"every": every}
        optimizer = BirthDeathOptimizer(inner, model, populations=model.populations(), seed=seed, **settings)
    curve, living, count = [], 0.0, 0
    order_of = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=order_of)
        for batch in order[: steps * BATCH].view(steps, BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            count += 1
            if method == "peer (ReDo)" and count % every == 0:
                redo_(model, x[batch], inner, generator)
        with torch.no_grad():
            error = 100 * (model(test_x).argmax(1) != test_y).float().mean().item()
        curve.append((float(epoch + 1), error))
        if epoch == 0:
            living = alive(model, x)
    return curve, {"alive after one epoch, %": round(living, 1)}


def main() -> None:
    parser = arguments("dead_neurons", __doc__)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, cifar10, or folder:PATH")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision keeps what it downloads")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as fast, and the sums come out the same on every machine
    try:
        source = open_source(args.data, args.root, 32)
        source.download()
        splits = source.decode("train"), source.decode("test")
    except BadInput as error:
        leave("dead_neurons.py", error)
    mean, std = channel_statistics(splits[0].pixels.split(5000), source.in_chans)
    data = (images(splits[0], mean, std), splits[0].labels, images(splits[1], mean, std), splits[1].labels)
    setting = f"MLP on {source.name}"
    runs = [
        timed(setting, method, seed, lambda m=method, k=seed: train(m, k, data, args.epochs))
        for seed in range(args.seeds)
        for method in METHODS
    ]
    save(
        args.out, "dead_neurons", report(runs), runs, {"width": WIDTH, "batch": BATCH, "lr": LR, "epochs": args.epochs}
    )
    draw(args.out, "dead_neurons", runs, "epoch", "test error, %")


def report(runs: list[Run]) -> str:
    """The table of errors, and below it how many of the dead units came back."""
    lines = [
        table(runs, "plain", "test error, %"),
        "| method | dead units alive after one epoch, %, by seed |",
        "| --- | --- |",
    ]
    for method in METHODS:
        values = [str(r.extra["alive after one epoch, %"]) for r in runs if r.method == method]
        lines.append(f"| {method} | {', '.join(values)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
