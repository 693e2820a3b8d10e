#!/usr/bin/env python3
"""A Gaussian mixture in one dimension (Rotskoff 2020): the exact scheme of birth and death on exact potentials.

    python recipes/births/gaussian_mixture.py [--seeds 5] [--out runs/gaussian_mixture]

Target f(x) = (1/3) sum_k c_k N(x; y_k, s_k) with c = (1, -2, 1), y = (-2, 0, 2) and variances s = (0.5, 1, 0.5); 200
units c N(x; y, 0.5), of which the network is the mean. The energy E = 1/2 int (f - f_n)^2 dx is a sum of Gaussian
integrals in closed form, so there is no noise. Gradient descent with time step 0.01;
alpha = 5 per unit of time (0.05 in a step); 10,000 steps from the bad start, in which all units stand at N(-2, 0.1^2),
the last 1,000 without events; 1,000 steps from the good one, U(-2, 2). Reinjection draws positions from U(-4, 4).
About 2 minutes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from recipes.births.comparison import Curve, arguments, draw, save, table, timed
from torch_meanfield.width import BirthDeathOptimizer

UNITS, DT, VARIANCE = 200, 0.01, 0.5
ALPHA = 5.0  # per unit of time: 0.05 in each time step
STEPS = {"bad start": 10_000, "good start": 1_000}
REST = {"bad start": 1_000, "good start": 0}  # last steps, without events
MEASUREMENTS = 100
TARGET_C, TARGET_Y, TARGET_S = (
    torch.tensor([1.0, -2.0, 1.0]),
    torch.tensor([-2.0, 0.0, 2.0]),
    torch.tensor([0.5, 1.0, 0.5]),
)
# Potentials are exact and read at one step, so that an event at every tenth step is ten time steps of (34).
EVERY = 10
METHODS: dict[str, dict[str, Any] | None] = {
    "gradient descent": None,
    "birth-death": {"rate": ALPHA},
    "with reinjection": {"rate": ALPHA, "reinject": 1e-3},
}


def normal(distance: Tensor, variance: Tensor | float) -> Tensor:
    """The integral of two Gaussians, ``distance`` apart, whose variances sum to ``variance``."""
    variance = torch.as_tensor(variance)
    return torch.exp(-distance.square() / (2 * variance)) / torch.sqrt(2 * math.pi * variance)


def energy(c: Tensor, y: Tensor) -> Tensor:
    """Rotskoff 2020, (24): E = C - (1/n) sum_i F(theta_i) + (1/2n^2) sum_ij K(theta_i, theta_j)."""
    n = len(c)
    pairs = TARGET_C[:, None] * TARGET_C * normal(TARGET_Y[:, None] - TARGET_Y, TARGET_S[:, None] + TARGET_S)
    constant = pairs.sum() / 18
    forces = normal(y[:, None] - TARGET_Y, VARIANCE + TARGET_S) @ TARGET_C / 3
    kernel = normal(y[:, None] - y, 2 * VARIANCE)
    return constant - c @ forces / n + c @ kernel @ c / (2 * n * n)


def everywhere(rows: Sequence[Tensor], generator: torch.Generator) -> None:
    """The measure of full support that newborn units are drawn from: y ~ U(-4, 4)."""
    rows[0].uniform_(-4, 4, generator=generator)


def train(setting: str, seed: int, wrapped: dict[str, Any] | None) -> tuple[Curve, dict[str, Any]]:
    """One training; the curve of the energy."""
    generator = torch.Generator().manual_seed(seed)
    if setting == "bad start":
        y = -2 + 0.1 * torch.randn(UNITS, generator=generator)
    else:
        y = 4 * torch.rand(UNITS, generator=generator) - 2
    c = torch.randn(UNITS, generator=generator)
    y.requires_grad_()
    c.requires_grad_()
    # Gradients of the energy carry the 1/n of the mean; the time step DT is therefore a learning rate of n DT.
    optimizer: torch.optim.Optimizer = torch.optim.SGD([c, y], lr=UNITS * DT)
    if wrapped is not None:
        optimizer = BirthDeathOptimizer(
            optimizer,
            populations=[(y, 0), (c, 0)],
            scheme="exact",
            every=EVERY,
            initializer=everywhere,
            seed=seed,
            **wrapped,
        )
    steps, curve = STEPS[setting], []
    for step in range(steps + 1):
        if isinstance(optimizer, BirthDeathOptimizer) and step == steps - REST[setting]:
            optimizer.enabled = REST[setting] == 0
        loss = energy(c, y)
        if step % (steps // MEASUREMENTS) == 0:
            curve.append((step * DT, loss.item()))
        if step == steps:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return curve, {}


def main() -> None:
    args = arguments("gaussian_mixture", __doc__).parse_args()
    torch.set_num_threads(1)  # the tensors are small: a second thread only waits
    runs = [
        timed(setting, method, seed, lambda s=setting, k=seed, w=wrapped: train(s, k, w))
        for setting in STEPS
        for seed in range(args.seeds)
        for method, wrapped in METHODS.items()
    ]
    save(
        args.out,
        "gaussian_mixture",
        table(runs, "gradient descent", "energy"),
        runs,
        {"units": UNITS, "dt": DT, "alpha": ALPHA, "steps": STEPS, "rest": REST, "every": EVERY},
    )
    draw(args.out, "gaussian_mixture", runs, "time", "energy")


if __name__ == "__main__":
    main()
