#!/usr/bin/env python3
"""A planted ReLU teacher: plain gradient descent against birth and death, with the wrapper's defaults.

    python recipes/births/planted_teacher.py [--seeds 5] [--out runs/planted_teacher]

The experiment of Rotskoff et al. 2019 and Rotskoff 2020. The teacher is (1/10) sum_k c_k [x . z_k]_+ with directions
z_k on the unit sphere of R^50 and signs c_k; the student has 50 such units, (1/50) sum_i c_i [x . w_i]_+. Fresh batches
of 100 standard normal x, SGD with learning rate 0.02 on half of the squared error. From a good start, all directions
random, 40,000 steps; from a bad one, all students near one direction, 16,000 steps. Both methods start from the same
weights and see the same batches. About 5 minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from recipes.births.comparison import Curve, arguments, draw, save, table, timed
from torch_meanfield.width import BirthDeathOptimizer

DIM, TEACHERS, STUDENTS, BATCH, LR = 50, 10, 50, 100, 0.02
STEPS = {"good start": 40_000, "bad start": 16_000}
MEASUREMENTS = 80  # points of a curve
METHODS: dict[str, dict[str, Any] | None] = {"gradient descent": None, "birth-death": {}}


class Student(nn.Module):
    """f(x) = (1/n) sum_i c_i [x . w_i]_+, Rotskoff 2020, (1) and (5)."""

    def __init__(self, directions: Tensor, weights: Tensor) -> None:
        super().__init__()
        n, d = directions.shape
        self.hidden = nn.Linear(d, n, bias=False)
        self.out = nn.Linear(n, 1, bias=False)
        with torch.no_grad():
            self.hidden.weight.copy_(directions)
            self.out.weight.copy_(weights[None])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(x))).squeeze(1) / self.hidden.out_features


def start(setting: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Directions ``(50, 50)`` and outgoing weights ``(50,)`` of the students."""
    if setting == "good start":
        directions = torch.randn(STUDENTS, DIM, generator=generator)
    else:
        directions = torch.randn(1, DIM, generator=generator) + 0.1 * torch.randn(STUDENTS, DIM, generator=generator)
    return directions / DIM**0.5, torch.randn(STUDENTS, generator=generator)


def train(setting: str, seed: int, wrapped: dict[str, Any] | None) -> tuple[Curve, dict[str, Any]]:
    """One training; the curve of the mean squared error on 20,000 points."""
    generator = torch.Generator().manual_seed(seed)
    z = nn.functional.normalize(torch.randn(TEACHERS, DIM, generator=generator), dim=1)
    c = torch.randn(TEACHERS, generator=generator).sign()
    model = Student(*start(setting, generator))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    replaced = 0
    if wrapped is not None:
        slices = [(model.hidden.weight, 0), (model.out.weight, 1)]
        optimizer = BirthDeathOptimizer(optimizer, model, populations=slices, seed=seed, **wrapped)

        def count(event: Any) -> None:
            nonlocal replaced
            replaced += len(event.born)

        optimizer.register_event_hook(count)

    def teach(x: Tensor) -> Tensor:
        return torch.relu(x @ z.T) @ c / TEACHERS

    test_x = torch.randn(20_000, DIM, generator=generator)
    test_y = teach(test_x)
    steps, curve = STEPS[setting], []
    for step in range(steps + 1):
        if step % (steps // MEASUREMENTS) == 0:
            with torch.no_grad():
                curve.append((step, (model(test_x) - test_y).square().mean().item()))
        if step == steps:
            break
        x = torch.randn(BATCH, DIM, generator=generator)
        loss = (model(x) - teach(x)).square().mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return curve, {} if wrapped is None else {"replaced": replaced}


def main() -> None:
    args = arguments("planted_teacher", __doc__).parse_args()
    torch.set_num_threads(1)  # the tensors are small: a second thread only waits
    runs = [
        timed(setting, method, seed, lambda s=setting, k=seed, w=wrapped: train(s, k, w))
        for setting in STEPS
        for seed in range(args.seeds)
        for method, wrapped in METHODS.items()
    ]
    text = table(runs, "gradient descent", "mean squared error on 20,000 points")
    save(args.out, "planted_teacher", text, runs, {"steps": STEPS, "batch": BATCH, "lr": LR})
    draw(args.out, "planted_teacher", runs, "step", "mean squared error")


if __name__ == "__main__":
    main()
