"""Newborn units placed where the loss is steep: incoming weights chosen among candidates, outgoing ones given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_meanfield.particles import Neurons
from torch_meanfield.particles.copying import whole
from torch_meanfield.width.births.landscape import Placed, landscape, place
from torch_meanfield.width.births.recorder import LandscapeRecorder, surroundings_of
from torch_meanfield.width.births.reinject import Reinject
from torch_meanfield.width.births.rule import Vacancies
from torch_meanfield.width.draws import Draws

BUDGET = 2**28  # multiplications that trying candidates out may take, for one population in one event
FEWEST = 64  # candidates, whatever that takes
ROWS = 4096  # sampled rows for the landscape, per population


@dataclass(frozen=True)
class Steep(Reinject):
    r"""``births="reinject"`` with ``steep=True``: drawn newborn units are overwritten with steep ones where possible.

    Units that replace harmful ones take over mass at once: outgoing weights against the slope of the loss,

    .. math:: a = -\text{mass}\; \mathrm{median}_i |a_i|\; \rho\; G / |G|

    with rho in 0..1 the agreement of the rows on G, so that mass is teleported to where it is wanted, and little where
    few rows want it. Measured on a planted teacher (rho about 0.3) and on an MLP on Fashion-MNIST (0.03), where full
    mass cost up to one point of test error. The others replace units that reached nothing, or lie behind a norm; their
    outgoing weights stay 0 and the network's function stays what it was.

    Args:
        mass: outgoing weights of a unit born in a harmful one's place if all rows agreed, in medians of the population.
        candidates: draws of which the steepest are taken; fewer in wide layers, so that an event stays cheap.
        steps: over how many of the steps before an event the landscape is sampled.
    """

    mass: float = 2.0
    candidates: int = 1024
    steps: int = 40

    def watch(self, population: Neurons, model: nn.Module | None) -> LandscapeRecorder | None:
        """See :meth:`.BirthRule.watch`."""
        around = surroundings_of(population, model)
        return None if around is None else LandscapeRecorder(around, ROWS, self.steps)

    def newborns(self, vacancies: Vacancies, draws: Draws) -> dict[int, Tensor]:
        """See :meth:`.BirthRule.newborns`."""
        generator = draws.on(vacancies.population.outgoing[0].tensor.device)
        values = self.draw(vacancies, generator)
        if vacancies.recorder is not None:
            self.steepen_(vacancies, vacancies.recorder, values, generator)
        return values

    def steepen_(
        self,
        vacancies: Vacancies,
        recorder: LandscapeRecorder,
        values: dict[int, Tensor],
        generator: torch.Generator,
    ) -> None:
        """Overwrite drawn ``values``, in place, with steep ones where the landscape was seen."""
        land = landscape(recorder)
        if land is None:
            return
        columns, roles = vacancies.population.slices(vacancies.population.columns), vacancies.population.roles
        first = next(i for i, c in enumerate(columns) if c.tensor is recorder.around.incoming)
        bias_at = next((i for i, r in enumerate(roles) if r == "in" and i != first), None)
        like = columns[first].tensor.detach()
        # An event must stay small beside the steps between two of them: wide layers get fewer candidates.
        price = land.x.numel() // land.x.shape[1] * (like.shape[1:].numel() + land.g.shape[1])
        tried = min(self.candidates, max(FEWEST, BUDGET // max(1, price)))
        # Refining has a price for each unit: beyond a share of the candidates the rest stay as they were drawn.
        count = min(values[first].shape[1], max(1, tried // 4))
        weight = vacancies.initialisers[first].draw((tried, *like.shape[1:]), like, generator)
        bias = None if bias_at is None else vacancies.initialisers[bias_at].draw((tried,), like, generator)
        placed = place(land, weight, bias, count)
        values[first][0, :count, 0] = placed.weight.to(like.dtype)
        if bias_at is not None and placed.bias is not None:
            values[bias_at][0, :count, 0] = placed.bias.to(like.dtype)
        norm = recorder.around.norm
        kept = land.statistics(placed.weight, placed.bias) if norm is not None else ()
        for name, statistic in zip(("running_mean", "running_var"), kept, strict=False):
            # In evaluation the unit is normalised by these; the norm's own start, 0 and 1, is far off for long.
            for i, column in enumerate(columns):
                if column.tensor is getattr(norm, name, None):
                    values[i][0, :count, 0] = statistic.to(column.tensor.dtype)
        # Behind a batch norm there is usually another, whose statistics know nothing of a unit that has mass at once.
        given = min(vacancies.harmful, count) if norm is None else 0
        if given and self.mass:
            out = roles.index("out")
            values[out][:, 0, :given, 0] = self._outgoing(columns[out].tensor, placed, given).to(like.dtype)

    def _outgoing(self, outgoing: Tensor, placed: Placed, given: int) -> Tensor:
        """Outgoing weights of the first ``given`` placed units, ``(outputs, given, *kernel)``."""
        a = whole(outgoing).float().transpose(0, 1).flatten(1).norm(dim=1)
        slope = placed.slope[:, :given].to(a.dtype)
        size = slope.transpose(0, 1).flatten(1).norm(dim=1).clamp_min(torch.finfo(a.dtype).tiny)
        amount = self.mass * a.median() * placed.agreement[:given].to(a.dtype) / size
        out: Tensor = -slope * amount.view(1, -1, *[1] * (slope.ndim - 2))
        return out
