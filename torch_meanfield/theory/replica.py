r"""Replica theory of the generalisation gap: ridge regression on quenched features.

The features v(x) of a network are frozen and its read-out is fitted on n samples by

.. math:: \hat w = \arg\min_w \sum_{\mu=1}^n (y_\mu - w \cdot v_\mu)^2 + \lambda |w|^2.

In high dimension its errors depend on the features only through :math:`\Omega = E[v v^\top]`, :math:`\phi = E[v y]`
and :math:`\rho = E[y^2]`. Source: Ariosto, Pacelli, Ginelli, Gherardi, Rotondo 2022 (arXiv:2201.11022); Loureiro et al.
2021 for the saddle point with a teacher.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torch_meanfield.theory.activation import Activation, elementwise
from torch_meanfield.theory.gaussian import normal_rule


class FeatureMoments(NamedTuple):
    """What ridge regression sees of features and labels; float64.

    Attributes:
        covariance: :math:`\\Omega = E[v v^T]`, ``(p, p)``.
        correlation: :math:`\\phi = E[v y]`, ``(p,)``.
        power: :math:`\\rho = E[y^2]`, noise included.
    """

    covariance: Tensor
    correlation: Tensor
    power: Tensor


class Generalisation(NamedTuple):
    """Predictions for each number of samples, each ``(N,)``; errors are means of squares, noise included.

    Attributes:
        test: E (y - w . v)^2 on fresh samples.
        train: The same on the samples of the fit.
        overlap: m = w . phi.
        norm: q = w' Omega w; the test error is rho - 2 m + q.
        effective_ridge: kappa.
    """

    test: Tensor
    train: Tensor
    overlap: Tensor
    norm: Tensor
    effective_ridge: Tensor

    @property
    def gap(self) -> Tensor:
        """Test less training error."""
        return self.test - self.train


def ridge_generalisation(moments: FeatureMoments, samples: Tensor, ridge: float) -> Generalisation:
    r"""Test and training error of ridge regression on n samples, from the moments of the features.

    .. math::
        n &= \mathrm{tr}\,\Omega(\Omega + \kappa)^{-1} + \lambda/\kappa, \qquad
        w_\kappa = (\Omega + \kappa)^{-1}\phi \\
        \epsilon_g &= \frac{\rho - 2\,w_\kappa\!\cdot\phi + w_\kappa^\top\Omega\,w_\kappa}
        {1 - \mathrm{tr}\,\Omega^2(\Omega + \kappa)^{-2} / n}, \qquad
        \epsilon_t = \Big(\frac{\lambda}{n\kappa}\Big)^2 \epsilon_g

    This is the replica-symmetric saddle point without its conjugate variables: :math:`\kappa = \lambda / \hat V`, with
    :math:`\hat V = n / (1 + V)` and :math:`V = \mathrm{tr}\,\Omega(\lambda + \hat V\Omega)^{-1}`. With many samples the
    gap is :math:`2 p / n` times the error of the best read-out.

    Args:
        moments: Of the features, see :func:`random_feature_moments`; or measured ones.
        samples: Numbers n, ``(N,)``, positive.
        ridge: :math:`\lambda`, positive; as small as you like.

    Raises:
        ValueError: Moments whose shapes do not fit, a covariance that is not symmetric or has negative eigenvalues,
            moments of no joint law (an explained variance above the power), numbers out of their range.

    Example:
        >>> eye = torch.eye(100, dtype=torch.float64)  # white features, a pure noise label
        >>> moments = FeatureMoments(eye, 0 * eye[0], torch.tensor(1.0, dtype=torch.float64))
        >>> round(ridge_generalisation(moments, torch.tensor([200.0]), 1e-9).test.item(), 6)  # 1 / (1 - p / n)
        2.0

    Source: Ariosto et al. 2022, the saddle-point equations and the gap; Loureiro et al. 2021 (arXiv:2102.08127).
    """
    values, weights, rho = _spectrum(moments)
    n = samples.double()
    if n.dim() != 1 or not bool(torch.isfinite(n).all() and (n > 0).all()):
        raise ValueError(f"samples must be (N,), positive and finite, got shape {tuple(samples.shape)}")
    if not (math.isfinite(ridge) and ridge > 0):
        raise ValueError(f"ridge must be positive and finite, got {ridge!r}; a tiny one stands for none")
    kappa = _effective_ridge(values, n, ridge)
    shrunk = values + kappa[:, None]
    overlap = (weights / shrunk).sum(1)
    plain = rho - 2 * overlap + (weights * values / shrunk.square()).sum(1)
    test = plain / (1 - (values / shrunk).square().sum(1) / n)
    return Generalisation(test, (ridge / (n * kappa)).square() * test, overlap, test - rho + 2 * overlap, kappa)


def random_feature_moments(
    weights: Tensor, activation: Activation, teacher: Tensor, *, noise: float = 0.0, max_bytes: int = 2 << 30
) -> FeatureMoments:
    r"""The moments of :math:`v = \sigma(F x / \sqrt d)` with a linear teacher, by the Gaussian equivalence.

    .. math:: \Omega = \mu_0^2\,1 1^\top + \mu_1^2\,F F^\top / d + \mu_*^2\,I, \qquad \phi = \mu_1\,F\,\theta / d

    for x standard normal, :math:`y = \theta \cdot x / \sqrt d + \sqrt{\text{noise}}\,\epsilon`, and :math:`\mu_0 =
    E\sigma(z)`, :math:`\mu_1 = E z\sigma(z)`, :math:`\mu_*^2 = E\sigma^2 - \mu_0^2 - \mu_1^2`. What the activation adds
    beyond its linear part acts as independent noise, if rows of F are of length :math:`\sqrt d` and nearly orthogonal.

    Args:
        weights: F, ``(p, d)``; rows are divided to length :math:`\sqrt d`.
        activation: Element by element.
        teacher: :math:`\theta`, ``(d,)``.
        noise: Variance of the labels' noise, at least 0.
        max_bytes: A bound for the memory, here and in :func:`ridge_generalisation`: four matrices of p x p.

    Raises:
        ValueError: Shapes that do not fit, a row of zeros, a negative noise, an activation that is not element-wise;
            features that would need more memory than ``max_bytes``, with the number that fits.

    Source: Ariosto et al. 2022, the random-feature model; Gerace, Loureiro, Krzakala, Mézard, Zdeborová 2020
    (arXiv:2002.09339).
    """
    if weights.dim() != 2 or teacher.shape != weights.shape[1:]:
        raise ValueError(f"weights must be (p, d) and teacher (d,), got {tuple(weights.shape)}, {tuple(teacher.shape)}")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise is a variance: it must be finite and at least 0, got {noise!r}")
    if 32 * len(weights) ** 2 > max_bytes:
        raise ValueError(
            f"{len(weights)} features need {32 * len(weights) ** 2:,} bytes; max_bytes={max_bytes:,} is enough for "
            f"{math.isqrt(max(max_bytes, 0) // 32)}"
        )
    lengths = weights.double().norm(dim=1, keepdim=True)
    if not bool((lengths > 0).all()):
        raise ValueError(f"row {int((lengths == 0).nonzero()[0, 0])} of weights is zero: it has no direction")
    rows, theta, d = weights.double() / lengths, teacher.double(), weights.shape[1]
    z, w = (t.to(rows.device) for t in normal_rule())
    values = elementwise(activation)(z)
    mean, slope = values @ w, (z * values) @ w
    rest = (values.square() @ w - mean.square() - slope.square()).clamp(min=0)
    covariance = slope.square() * rows @ rows.T + mean.square()
    covariance.diagonal().add_(rest)
    return FeatureMoments(covariance, slope * rows @ theta / math.sqrt(d), theta.square().sum() / d + noise)


def _spectrum(moments: FeatureMoments) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of the covariance, squared coordinates of the correlation, the power; checked."""
    omega, phi, rho = (torch.as_tensor(m, dtype=torch.float64) for m in moments)
    if omega.dim() != 2 or omega.shape[0] != omega.shape[1] or phi.shape != omega.shape[:1] or rho.dim():
        raise ValueError(
            f"covariance must be (p, p), correlation (p,) and power a number, got {tuple(omega.shape)}, "
            f"{tuple(phi.shape)} and {tuple(rho.shape)}"
        )
    scale = float(omega.abs().max())
    if not math.isfinite(scale) or float((omega - omega.T).abs().max()) > 1e-8 * scale:
        raise ValueError("covariance must be finite and symmetric")
    values, vectors = torch.linalg.eigh(omega)
    if float(values[0]) < -1e-8 * scale:
        raise ValueError(f"covariance has the negative eigenvalue {float(values[0]):.3g}: no features have it")
    values, weights = values.clamp(min=0), (vectors.T @ phi).square()
    explained = float((weights / values.clamp(min=1e-12 * scale)).sum())
    if explained > float(rho) * (1 + 1e-6):
        raise ValueError(
            f"power is {float(rho):.6g}, but the features explain {explained:.6g} of it: no law has these moments"
        )
    return values, weights, rho


def _effective_ridge(values: Tensor, n: Tensor, ridge: float) -> Tensor:
    """Newton's steps from the left, on a function that is convex and falls: they never pass the root."""
    kappa = ridge / n
    for _ in range(500):
        shrunk = values + kappa[:, None]
        excess = (values / shrunk).sum(1) + ridge / kappa - n
        slope = (values / shrunk.square()).sum(1) + ridge / kappa.square()
        step = excess / slope
        kappa = kappa + step
        if bool((step.abs() <= 1e-14 * kappa).all()):
            break
    return kappa
