"""Products of Jacobians in factored form: what one parameter adds to the tangent kernel.

The derivative by a weight is J[b, k] = sum_t delta[b, k, t] x[b, t]^T, with T terms of sizes m and n. Its inner
products are either taken from J itself, at a cost of m n for each pair of rows, or from the factors,

    <J[r], J[s]> = sum_tu <delta[r, t], delta[s, u]> <x[r, t], x[s, u]>,

at a cost of about T^2 m, whichever is less; a fully connected layer (T = 1) costs a width where J would cost its
square.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def add_product_(
    kernel: Tensor,
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    *,
    groups: int = 1,
    workspace: int = 1 << 28,
) -> None:
    """Add the inner products of two factored Jacobians to ``kernel``, in place.

    Args:
        kernel: ``(B k, B' k)``.
        left: Gradients ``(B, k, T, m)`` and inputs ``(B, T, n)``.
        right: The same for the other samples; the very object ``left`` if they are the same.
        groups: Number of groups of a convolution; block g of the m outputs sees block g of the n inputs.
        workspace: About how many bytes may be used at a time.
    """
    (d, x), (e, _) = left, right
    batch, outputs, terms, m = d.shape
    n, others = x.shape[-1], e.shape[2]
    by_factors = terms * others * (m + n / outputs**2 + 2)
    written_out = m * (n // groups) * (1 + 2 * terms / (batch * outputs))
    fits = 2 * batch * outputs * terms * outputs * others * d.element_size() <= workspace  # for one sample of the right
    if groups == 1 and by_factors < written_out and fits:
        _by_factors_(kernel, left, right, workspace)
    else:
        _written_out_(kernel, left, right, groups, workspace)


def _by_factors_(kernel: Tensor, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], workspace: int) -> None:
    (d, x), (e, z) = left, right
    (b, k, t, m), (c, _, u, _) = d.shape, e.shape
    rows = d.reshape(b * k * t, m)
    # twice: the product and its elementwise multiple
    step = max(1, workspace // (2 * b * k * t * k * u * d.element_size()))
    for j in range(0, c, step):
        part, inputs = e[j : j + step], z[j : j + step]
        s = len(part)
        gradients = (rows @ part.reshape(s * k * u, m).T).view(b, k, t, s, k, u)
        signals = (x.reshape(b * t, -1) @ inputs.reshape(s * u, -1).T).view(b, 1, t, s, 1, u)
        product = gradients.mul_(signals).sum((2, 5)) if t * u > 1 else gradients.mul_(signals)
        kernel[:, j * k : (j + s) * k] += product.reshape(b * k, s * k)


def _written_out_(
    kernel: Tensor, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], groups: int, workspace: int
) -> None:
    same = left is right
    (b, k, _, m), n = left[0].shape, left[1].shape[-1]
    per_channel = 2 * (b * k + (0 if same else right[0].shape[0] * k)) * (n // groups) * left[0].element_size()
    step = max(1, workspace // max(1, per_channel))
    width = m // groups
    # Whole groups at a time if several fit, else channels within one group.
    spans = (
        [(g, min(groups, g + step // width), 0, width) for g in range(0, groups, step // width)]
        if step >= width
        else [(g, g + 1, o, min(width, o + step)) for g in range(groups) for o in range(0, width, step)]
    )
    for span in spans:
        rows = jacobian(left, groups, span)
        others = rows if same else jacobian(right, groups, span)
        kernel.addmm_(rows, others.T)


def jacobian(factors: tuple[Tensor, Tensor], groups: int, span: tuple[int, int, int, int]) -> Tensor:
    """The derivative by a slice of the weight, ``(B k, size)``."""
    (first, last, begin, end), (d, x) = span, factors
    b, k, t, m = d.shape
    d = d.reshape(b, k, t, groups, m // groups)[:, :, :, first:last, begin:end]
    x = x.reshape(b, t, groups, -1)[:, :, first:last]
    g, o, n = last - first, end - begin, x.shape[-1]
    # one matrix product for each sample and group: (k o, t) @ (t, n)
    rows = d.permute(0, 3, 1, 4, 2).reshape(b * g, k * o, t)
    product = torch.bmm(rows, x.permute(0, 2, 1, 3).reshape(b * g, t, n))
    return product.view(b, g, k, o * n).transpose(1, 2).reshape(b * k, math.prod((g, o, n)))
