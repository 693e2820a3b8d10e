r"""Policy gradient for networks in the mean-field regime.

The policy is :math:`\pi_\nu(a|s) \propto \exp\int f(\theta, s, a)\,\nu(d\theta)`, the softmax of a network whose units
are the particles of :math:`\nu`. Maximised is its worth less an entropy of the particles,

.. math:: J(\nu) - \frac{\sigma^2}2\,\mathrm{KL}(\nu \,|\, N(0, I/\kappa)),

by noisy gradient ascent,

.. math:: d\theta = \nabla \frac{\delta J}{\delta\nu}\,dt - \frac{\sigma^2\kappa}2 \theta\,dt + \sigma\,dW,

which is :class:`~torch_meanfield.theory.langevin.MeanFieldLangevin` with the loss -J, temperature
:math:`\sigma^2/2` and weight decay :math:`\sigma^2\kappa/2`. Source: Kerimkulov, Leahy, Siska, Szpruch 2022
(arXiv:2201.07296).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torch_meanfield.theory.decisions import Decisions, soft_worth


class GibbsLaw(NamedTuple):
    """The stationary law of the particles, on points that stand for the prior.

    Attributes:
        weights: Of the points, ``(P,)``, of sum 1.
        logits: Of the policy, ``(S, A)``.
        total: What the policy is worth.
        iterations: How many it took.
    """

    weights: Tensor
    logits: Tensor
    total: Tensor
    iterations: int


def first_variation(decisions: Decisions, logits: Tensor, features: Tensor, temperature: float) -> Tensor:
    r"""How the worth of the policy follows the particles' law: n times the derivative by one particle's output.

    .. math:: \frac{\delta J}{\delta\nu}(\theta) = \sum_s d(s) \sum_a \pi(a|s)\,A(s, a)\,f(\theta, s, a)

    with d the discounted visits and A the advantage, entropy included.

    Args:
        decisions: The problem.
        logits: ``(S, A)``, the mean of the features under the law.
        features: f at P points, ``(S, A, P)``.
        temperature: :math:`\tau`, at least 0.

    Returns:
        ``(P,)``. Its gradient by theta is the velocity of a particle there.

    Raises:
        ValueError: As :func:`~torch_meanfield.theory.decisions.soft_worth`; features of another shape.

    Source: Kerimkulov, Leahy, Siska, Szpruch 2022, the functional derivative of the value.
    """
    worth = soft_worth(decisions, logits, temperature)
    if features.shape[:-1] != logits.shape:
        raise ValueError(f"features must be {(*logits.shape, 'P')}, got shape {tuple(features.shape)}")
    strength = worth.visits[:, None] * torch.softmax(logits.double(), -1) * worth.advantage
    found: Tensor = torch.tensordot(strength, features.double(), 2)
    return found


def gibbs_law(
    decisions: Decisions,
    features: Tensor,
    *,
    temperature: float,
    noise: float,
    damping: float = 0.1,
    tolerance: float = 1e-10,
    max_iterations: int = 2000,
) -> GibbsLaw:
    r"""The law at which noisy policy gradient comes to rest, without training.

    .. math:: \nu_*(d\theta) \propto \exp\left(\frac2{\sigma^2} \frac{\delta J}{\delta\nu}(\nu_*, \theta)\right)
              N(0, I/\kappa)(d\theta)

    For large :math:`\sigma` the right-hand side contracts in :math:`\nu_*`, and there is one such law.

    Args:
        decisions: The problem.
        features: f at P points that stand for the prior, ``(S, A, P)``; take
            :func:`~torch_meanfield.theory.fluctuations.gaussian_particles` divided by the root of kappa.
        temperature: :math:`\tau`, at least 0.
        noise: :math:`\sigma`, positive.
        damping: The share of the new law in each turn, in (0, 1].
        tolerance: Of the logits.
        max_iterations: Of turns.

    Raises:
        ValueError: As :func:`first_variation`, or a number out of its range.
        RuntimeError: No fixed point within ``max_iterations``.

    Source: Kerimkulov, Leahy, Siska, Szpruch 2022, the fixed point that characterises maximisers.
    """
    if not (math.isfinite(noise) and noise > 0):
        raise ValueError(f"noise must be positive and finite, got {noise!r}: without it the prior says nothing")
    if not 0 < damping <= 1:
        raise ValueError(f"damping must be in (0, 1], got {damping!r}")
    features = features.double()
    weights = features.new_full((features.shape[-1],), 1 / features.shape[-1])
    logits, gap = features @ weights, math.inf
    for turn in range(1, max_iterations + 1):
        variation = first_variation(decisions, logits, features, temperature)
        weights = (1 - damping) * weights + damping * torch.softmax(2 / noise**2 * variation, 0)
        previous, logits = logits, features @ weights
        gap = float((logits - previous).abs().max()) / damping
        if gap < tolerance:
            return GibbsLaw(weights, logits, soft_worth(decisions, logits, temperature).total, turn)
    raise RuntimeError(
        f"no fixed point after {max_iterations} turns (the logits still change by {gap:.1e}); noise={noise!r} may be "
        f"too small for it to be unique: try damping={damping / 4:g}"
    )
