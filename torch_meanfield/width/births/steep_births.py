"""Newborn units placed where the potential is steep: incoming weights chosen among candidates, outgoing ones given."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_meanfield.particles.copying import whole
from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.width.births.initialisers import Law
from torch_meanfield.width.births.landscape import landscape, place
from torch_meanfield.width.births.recorder import Recorder
from torch_meanfield.width.optimizer.settings import Settings

BUDGET = 2**28  # multiplications that trying candidates out may take, for one population in one event
FEWEST = 64  # candidates, whatever that takes


def steep_values(
    population: Neurons,
    recorder: Recorder,
    laws: dict[int, Law],
    values: dict[int, Tensor],
    harmful: int,
    settings: Settings,
    generator: torch.Generator,
) -> None:
    r"""Overwrite drawn newborn units with steep ones, in place, where the landscape was seen.

    The first ``harmful`` of them replace units that did harm. They take over mass at once: outgoing weights against
    the slope of the loss,

    .. math:: a = -\text{mass}\; \mathrm{median}_i |a_i|\; \rho\; G / |G|

    with rho in 0..1 the agreement of the rows on G, so that mass is teleported to where it is wanted, and little where
    few rows want it. Measured on a planted teacher (rho about 0.3) and on an MLP on Fashion-MNIST (0.03), where full
    mass cost up to one point of test error. The others replace units that reached nothing, or lie behind a norm; their
    outgoing weights stay 0 and the network's function stays what it was.

    Args:
        population: whose newborn units.
        recorder: what has been seen around it.
        laws: by column; candidates are drawn from them.
        values: by column, as drawn; changed in place.
        harmful: how many newborn units replace harmful ones.
        settings: number of candidates, mass.
        generator: on the device of the population.
    """
    columns = population.slices(population.columns)
    roles = population.roles
    first = next(i for i, c in enumerate(columns) if c.tensor is recorder.site.incoming)
    biases = [i for i, r in enumerate(roles) if r == "in" and i != first]
    out = next(i for i, r in enumerate(roles) if r == "out")
    count = values[first].shape[1]
    land = landscape(recorder)
    if land is None:
        return
    like = columns[first].tensor.detach()
    # An event must stay small beside the steps between two of them: wide layers get fewer candidates.
    price = land.x.numel() // land.x.shape[1] * (like.shape[1:].numel() + land.g.shape[1])
    tried = min(settings.candidates, max(FEWEST, BUDGET // max(1, price)))
    # Refining has a price for each unit: beyond a share of the candidates the rest stay as they were drawn.
    count = min(count, max(1, tried // 4))
    weight = laws[first].draw((tried, *like.shape[1:]), like, generator)
    bias = laws[biases[0]].draw((tried,), like, generator) if biases else None
    placed = place(land, weight, bias, count)
    values[first][0, :count, 0] = placed.weight.to(like.dtype)
    if biases and placed.bias is not None:
        values[biases[0]][0, :count, 0] = placed.bias.to(like.dtype)
    norm = recorder.site.norm
    for name, kept in zip(
        ("running_mean", "running_var"), land.statistics(placed.weight, placed.bias) if norm else (), strict=False
    ):
        # In evaluation the unit is normalised by these; the norm's own start, 0 and 1, is far off for tens of steps.
        for i, column in enumerate(columns):
            if column.tensor is getattr(norm, name, None):
                values[i][0, :count, 0] = kept.to(column.tensor.dtype)
    # Behind a batch norm there is usually another, whose statistics know nothing of a unit that has mass at once.
    given = min(harmful, count) if norm is None else 0
    if given and settings.mass:
        a = whole(columns[out].tensor).float().transpose(0, 1).flatten(1).norm(dim=1)
        slope = placed.slope[:, :given].to(a.dtype)
        size = slope.transpose(0, 1).flatten(1).norm(dim=1).clamp_min(torch.finfo(a.dtype).tiny)
        shape = (1, -1, *[1] * (slope.ndim - 2))
        amount = settings.mass * a.median() * placed.agreement[:given].to(a.dtype) / size
        values[out][:, 0, :given, 0] = (-slope * amount.view(shape)).to(like.dtype)
