r"""Placing newborn units where the potential is steep.

The gradient that the outgoing weights of a unit with incoming weights w would get,

.. math:: G(w) = \partial E / \partial a = E[\,\partial E/\partial y \; \varphi(x; w)\,],

is the slope of the potential in the direction of the mass at w (Rotskoff 2020, (29): at a minimum it must not be
negative anywhere outside the support). It needs the inputs x of the layer before and the gradients dE/dy behind the
layer after, both of which a training step computes anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_meanfield._torch import convolve
from torch_meanfield.particles.ranks import of_all_ranks, rows_of_all_ranks
from torch_meanfield.width.births.activations import Activation, recognise
from torch_meanfield.width.births.recorder import LandscapeRecorder, Surroundings

ROUNDS = 8  # in how many portions the newborn units of one event are chosen
ASCENTS = 5  # steps of refinement
CHUNK = 256  # candidates tried at once


@dataclass(frozen=True)
class Placed:
    """Chosen newborn units.

    Attributes:
        weight: incoming weights, ``(k, *fan_in)``.
        bias: ``(k,)``, if the layer has one.
        slope: the gradient their outgoing weights would get, ``(outputs, k, *kernel)``.
        agreement: how much the sampled rows agree on it, in 0..1, ``(k,)``.
    """

    weight: Tensor
    bias: Tensor | None
    slope: Tensor
    agreement: Tensor


class Landscape:
    """The slope of the potential, from what a :class:`.LandscapeRecorder` saw.

    Args:
        around: the layers.
        inputs: sampled inputs of the first layer, ``(rows, fan_in)`` or ``(images, channels, *size)``.
        gradients: dE/dy at the output of the last, for the same rows.
        activation: what lies between, behind the norm if there is one.
    """

    def __init__(self, around: Surroundings, inputs: Tensor, gradients: Tensor, activation: Activation) -> None:
        self.around, self.activation = around, activation
        wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        self.x, self.g = inputs.to(wide), gradients.to(wide)
        # A step that overflowed says nothing.
        bad = ~self.g.flatten(1).isfinite().all(1)
        self.g = torch.where(bad.view(-1, *[1] * (self.g.ndim - 1)), 0, self.g)

    def before(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """w . x for all rows and candidates: ``(rows, k)`` or ``(images, k, *size)``."""
        if self.around.linear:
            return F.linear(self.x, weight, bias)
        h: Tensor = convolve(self.around.first, self.x, weight, bias)
        return h

    def statistics(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and variance of w . x over the rows, what a batch norm would keep of these units; ``(k,)`` each."""
        h = self.before(weight, bias).transpose(0, 1).flatten(1)
        return h.mean(1), h.var(1, correction=min(1, h.shape[1] - 1))

    def units(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """phi(x; w) for all rows and candidates: ``(rows, k)`` or ``(images, k, *size)``."""
        h = self.before(weight, bias)
        if self.around.norm is not None:
            h = F.batch_norm(h, None, None, training=True)
        return self.activation(h)

    def slope(self, units: Tensor) -> Tensor:
        """G for each candidate: ``(outputs, k)`` or ``(outputs, k, *kernel)``."""
        if self.around.linear:
            return self.g.T @ units
        m = self.around.last
        with torch.enable_grad():
            kernel = units.new_zeros((m.out_channels, units.shape[1], *m.kernel_size), requires_grad=True)
            # the layer's own padding, stride and dilation, with other weights
            y = convolve(m, units, kernel, None)
            (out,) = torch.autograd.grad(y, kernel, self.g, create_graph=units.requires_grad)
        return out

    def agreement(self, units: Tensor, slope: Tensor) -> Tensor:
        r"""Root mean square over mean of what each row's loss would lose, inverted: ``(k,)``, in 0..1.

        With outgoing weights along -G the loss of row r changes by :math:`u_r = -g_r \cdot G\, \varphi(x_r)`; the
        agreement is :math:`|\sum_r u_r| / (R \sum_r u_r^2)^{1/2}`: 1 if every row gains alike, small if a few rows
        gain at the expense of the others. Between convolutions, rows are whole images.
        """
        if self.around.linear:
            u = (self.g @ slope) * units
        else:
            u = torch.stack(
                [
                    (convolve(self.around.last, units[:, j : j + 1], slope[:, j : j + 1], None) * self.g)
                    .flatten(1)
                    .sum(1)
                    for j in range(units.shape[1])
                ],
                1,
            )
        size = (len(u) * u.square().sum(0)).sqrt().clamp_min(torch.finfo(u.dtype).tiny)
        return u.sum(0).abs() / size

    def score(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """|G| of each candidate, ``(k,)``."""
        return _norms(self.slope(self.units(weight, bias)))

    def flatten_(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take out of dE/dy what these units will take care of, so that the next ones look elsewhere.

        The least-squares projection: what is left is what no outgoing weights of these units could reduce, whatever
        the curvature of the loss. Between convolutions the gradient is left as it is.
        """
        if self.around.linear:
            units = self.units(weight, bias)
            gram = units.T @ units
            gram.diagonal().add_(1e-6 * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
            left = self.g - units @ torch.linalg.solve_ex(gram, units.T @ self.g).result
            # Units that coincide make a singular system; a projection never lengthens, and that is how it shows.
            self.g = torch.where(left.norm() <= self.g.norm(), left, self.g)


def landscape(recorder: LandscapeRecorder) -> Landscape | None:
    """What was recorded, gathered from all data-parallel ranks; ``None`` if nothing usable was."""
    before, after = recorder.before, recorder.after
    usable = bool(recorder.inputs) and before is not None and after is not None
    if not all(of_all_ranks(usable)) or before is None or after is None:
        return None
    if recorder.activation is None:
        # By what all ranks saw: few rows can fit two activations, and every rank must settle on the same one.
        recorder.activation = recognise(rows_of_all_ranks(before), rows_of_all_ranks(after))
    if recorder.activation is None:
        return None
    inputs, gradients = (rows_of_all_ranks(torch.cat(rows)) for rows in (recorder.inputs, recorder.gradients))
    return Landscape(recorder.around, inputs, gradients, recorder.activation)


@torch.no_grad()
def place(land: Landscape, weight: Tensor, bias: Tensor | None, count: int) -> Placed:
    """The ``count`` steepest among candidates, each refined by ascending the slope at constant length.

    Args:
        land: where to look; flattened where the chosen ones are.
        weight, bias: candidates drawn from the layer's law, ``(candidates, *fan_in)`` and ``(candidates,)``.
        count: at most the number of candidates.
    """
    portion = -(-count // min(ROUNDS, count)) if land.around.linear else count
    chosen: list[Placed] = []
    wide = land.x.dtype
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    tried = [land.units(w, b) for w, b in _chunks(weight, bias)]  # the rounds differ in dE/dy only
    while (left := count - sum(len(p.weight) for p in chosen)) > 0:
        scores = torch.cat([_norms(land.slope(units)) for units in tried])
        best = scores.topk(min(portion, left)).indices
        w, b = refine(land, weight[best], None if bias is None else bias[best])
        units = land.units(w, b)
        slope = land.slope(units)
        chosen.append(Placed(w, b, slope, land.agreement(units, slope)))
        land.flatten_(w, b)
    biases = None if bias is None else torch.cat([p.bias for p in chosen if p.bias is not None])
    slope, agreement = torch.cat([p.slope for p in chosen], 1), torch.cat([p.agreement for p in chosen])
    return Placed(torch.cat([p.weight for p in chosen]), biases, slope, agreement)


def refine(land: Landscape, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Ascend |G|: go where its gradient points, at the candidate's own length, and keep what is no better away."""
    w = torch.cat([weight.flatten(1), *([] if bias is None else [bias[:, None]])], 1)
    length = w.norm(dim=1, keepdim=True)

    def parts(v: Tensor) -> tuple[Tensor, Tensor | None]:
        return (v.view_as(weight), None) if bias is None else (v[:, :-1].reshape(weight.shape), v[:, -1])

    best, score = w, land.score(*parts(w))
    for _ in range(ASCENTS if land.around.linear else 1):
        with torch.enable_grad():
            leaf = best.detach().requires_grad_()
            (uphill,) = torch.autograd.grad(land.score(*parts(leaf)).sum(), leaf)
        # |G| is nearly homogeneous in w: its gradient points at the direction in which it would be largest
        step = F.normalize(best, dim=1) + 4 * F.normalize(uphill, dim=1)
        new = F.normalize(step, dim=1) * length
        new_score = land.score(*parts(new))
        better = new_score > score
        best, score = torch.where(better[:, None], new, best), torch.where(better, new_score, score)
    return parts(best)


def _norms(slope: Tensor) -> Tensor:
    # the tiny summand keeps the derivative of the norm finite at 0 (candidates that reach nothing)
    return (slope.transpose(0, 1).flatten(1).square().sum(1) + torch.finfo(slope.dtype).tiny).sqrt()


def _chunks(weight: Tensor, bias: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    starts = range(0, len(weight), CHUNK)
    return [(weight[i : i + CHUNK], None if bias is None else bias[i : i + CHUNK]) for i in starts]
