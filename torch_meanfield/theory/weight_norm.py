r"""Weight normalisation: what its gains must be at the start for a deep network to train.

A weight-normalised row :math:`g\,v / \|v\|` has length g exactly, so g is the sigma_w of the signal maps: with unit
inputs of mean square p the pre-activations have variance :math:`q = g^2 p`. Torch's default takes g from the length of
the default weights, :math:`g^2 = 1/3`, deep in the ordered phase.

Source: Arpit, Campos, Bengio 2019 (arXiv:1906.02341), sections 3.1 and 3.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def weight_norm_(
    layer: nn.Module, gain: float = math.sqrt(2), *, blocks: int | None = None, generator: torch.Generator | None = None
) -> nn.Module:
    r"""Initialise a weight-normalised linear or convolutional layer: orthogonal directions, gains that keep lengths.

    .. math:: g = \text{gain}\,\sqrt{n_\text{in} / n_\text{out}}, \qquad b = 0

    keeps :math:`\|h\|` on average through a layer and its activation when gain is the activation's critical sigma_w
    (:math:`\sqrt 2` for ReLU). With ``blocks``, for the last layer of a residual branch, g is divided by the root of
    the number of branches, so that B of them together multiply squared lengths by :math:`(1 + 1/B)^B < e`, whatever
    the depth.

    Args:
        layer: Normalised by ``torch.nn.utils.parametrizations.weight_norm`` or the older one of ``torch.nn.utils``,
            over output units (``dim=0``).
        gain: As above, positive.
        blocks: Number of residual branches in the stage.
        generator: Source of randomness.

    Returns:
        ``layer``, initialised in place.

    Raises:
        TypeError: The layer is not weight-normalised.
        ValueError: Gains that are not one for each output unit, a gain or number that is not positive.

    Source: Arpit et al. 2019, eqs. (5) and (8); there g is :math:`\sqrt{2 n_{l-1} / n_l}`.

    Example:
        >>> layer = weight_norm_(torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)))
        >>> round(layer.weight.norm(dim=1).mean().item(), 4)
        1.4142
    """
    found = _parameters(layer)
    if found is None:
        raise TypeError(
            f"{type(layer).__name__} is not weight-normalised; apply torch.nn.utils.parametrizations.weight_norm"
        )
    g, v = found
    if g.numel() != len(v):
        raise ValueError(f"gains have shape {tuple(g.shape)}, one is needed for each of {len(v)} output units (dim=0)")
    if not (math.isfinite(gain) and gain > 0):
        raise ValueError(f"gain must be positive and finite, got {gain!r}")
    if blocks is not None and (isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1):
        raise ValueError(f"blocks must be an integer of at least 1, got {blocks!r}")
    nn.init.orthogonal_(v, generator=generator)
    if v[0].numel() < len(v):  # more units than inputs: columns are orthonormal, rows must be made unit vectors
        v.div_(v.flatten(1).norm(dim=1).view(-1, *(1,) * (v.ndim - 1)))
    g.fill_(gain * math.sqrt(v.shape[1] / len(v)) / math.sqrt(blocks or 1))
    bias = getattr(layer, "bias", None)
    if isinstance(bias, Tensor):
        bias.zero_()
    return layer


def _parameters(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    parametrizations = getattr(layer, "parametrizations", None)
    if parametrizations is not None and "weight" in parametrizations:
        held = parametrizations["weight"]
        if type(held[0]).__name__ == "_WeightNorm":
            return held.original0, held.original1
        return None
    g, v = getattr(layer, "weight_g", None), getattr(layer, "weight_v", None)
    return (g, v) if isinstance(g, Tensor) and isinstance(v, Tensor) else None
