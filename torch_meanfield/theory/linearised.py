"""Training as the linearised network predicts it, and the linear rate of two-layer networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class LinearisedTraining:
    r"""Gradient flow, or gradient descent, on the squared loss of a network frozen in its tangent plane.

    The loss is :math:`R = \frac{1}{2n}\sum_i |h(x_i) - y_i|^2`. With K the tangent kernel at the start the error
    :math:`e = h - y` obeys :math:`\dot e = -K e / n`, and anywhere else

    .. math:: h(x; t) = h(x; 0) - K(x, X)\,K^{-1}\left(I - e^{-K t / n}\right)(h(X; 0) - y).

    With a learning rate, t counts steps and :math:`e^{-K t/n}` becomes :math:`(I - \eta K / n)^t`.

    Args:
        kernel: Kernel of the training samples, ``(n k, n k)``, as
            :func:`~torch_meanfield.theory.ntk.empirical_ntk` returns it for k outputs.
        outputs: Outputs of the network at the start, ``(n,)`` or ``(n, k)``.
        targets: Targets of the same shape.
        learning_rate: Learning rate of gradient descent; ``None``: the flow.

    Raises:
        ValueError: Shapes that do not fit, or a kernel that is not symmetric.

    Source: Yang 2022, "Linear ODE with a solution"; Lee et al. 2019 (arXiv:1902.06720).

    Example:
        >>> training = LinearisedTraining(torch.eye(2), torch.ones(2), torch.zeros(2))
        >>> training.outputs_at(2 * math.log(2.0))  # n = 2: e falls like exp(-t / 2)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, kernel: Tensor, outputs: Tensor, targets: Tensor, *, learning_rate: float | None = None) -> None:
        if outputs.shape != targets.shape or outputs.dim() not in (1, 2):
            raise ValueError(
                f"outputs and targets must both be (n,) or (n, k), got {tuple(outputs.shape)} and "
                f"{tuple(targets.shape)}"
            )
        size = outputs.numel()
        if kernel.shape != (size, size):
            raise ValueError(f"kernel must be ({size}, {size}) for these outputs, got {tuple(kernel.shape)}")
        if (kernel - kernel.T).abs().max() > 1e-4 * kernel.abs().max():
            raise ValueError("kernel must be symmetric: it is that of the training samples with themselves")
        if learning_rate is not None and not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ValueError(f"learning_rate must be positive and finite, or None; got {learning_rate!r}")
        kernel = kernel.detach().double()
        self.n = len(outputs)
        self.learning_rate = learning_rate
        self._shape, self._targets = outputs.shape, targets.detach().double()
        #: Eigenvalues of the kernel, ascending; float64 ``(n k,)``.
        self.eigenvalues, self._vectors = torch.linalg.eigh((kernel + kernel.T) / 2)
        self._coefficients = self._vectors.T @ (outputs.detach().double() - self._targets).flatten()

    def outputs_at(self, time: float) -> Tensor:
        """The outputs on the training samples at a time, or after a number of steps; float64, shaped as given."""
        error = self._vectors @ (self._decay(time) * self._coefficients)
        outputs: Tensor = self._targets + error.view(self._shape)
        return outputs

    def loss_at(self, time: float) -> float:
        """R at a time, or after a number of steps."""
        return float((self._decay(time) * self._coefficients).square().sum() / (2 * self.n))

    def predict(self, time: float, cross_kernel: Tensor, outputs: Tensor) -> Tensor:
        """The outputs on other samples.

        Args:
            time: Or the number of steps.
            cross_kernel: Kernel of the other samples with the training samples, ``(m k, n k)``.
            outputs: There at the start, ``(m,)`` or ``(m, k)``.

        Returns:
            float64, shaped like ``outputs``.

        Raises:
            ValueError: Shapes that do not fit.
        """
        expected = (outputs.numel(), len(self.eigenvalues))
        if cross_kernel.shape != expected:
            raise ValueError(f"cross_kernel must be {expected}, got {tuple(cross_kernel.shape)}")
        # (1 - exp(-lambda t)) / lambda, which is t where lambda is 0: no inverse of K is needed
        scaled = self.eigenvalues / self.n
        safe = torch.where(scaled == 0, torch.ones_like(scaled), scaled)
        duration = time * (self.learning_rate or 1.0)
        gain = torch.where(scaled == 0, duration, (1 - self._decay(time)) / safe) / self.n
        change = cross_kernel.detach().double() @ (self._vectors @ (gain * self._coefficients))
        predicted: Tensor = outputs.detach().double() - change.view(outputs.shape)
        return predicted

    def _decay(self, time: float) -> Tensor:
        if not (math.isfinite(time) and time >= 0):
            raise ValueError(f"time must be finite and at least 0, got {time!r}")
        if self.learning_rate is None:
            return torch.exp(-self.eigenvalues * time / self.n)
        decay: Tensor = (1 - self.learning_rate * self.eigenvalues / self.n) ** time
        return decay


def linear_rate_bound(times: Tensor, *, loss: float, width: int, smallest_eigenvalue: float, samples: int) -> Tensor:
    r"""The bound on the training loss of a wide two-layer ReLU network under gradient flow.

    .. math:: R_S(\theta(t)) \le \exp\left(-\frac{N\lambda_S t}{n}\right) R_S(\theta(0))

    for :math:`h(x) = \sum_{k=1}^N a_k\sigma(w_k\cdot x)`, :math:`R_S = \frac{1}{2n}\sum_i (h(x_i) - y_i)^2` and
    :math:`\lambda_S = \lambda_{\min}(K^{(a)})`, with high probability once N is large.

    Args:
        times: Any shape.
        loss: :math:`R_S(\theta(0))`.
        width: N.
        smallest_eigenvalue: :math:`\lambda_S`, of :func:`~torch_meanfield.theory.arc_cosine.outer_kernel`.
        samples: n.

    Returns:
        float64, of the shape of ``times``.

    Raises:
        ValueError: A number out of its range.

    Source: Yang 2022, theorem "Linear convergence rate" (arXiv:2106.06682).
    """
    if not (math.isfinite(loss) and loss >= 0):
        raise ValueError(f"loss must be finite and at least 0, got {loss!r}")
    if width < 1 or samples < 1:
        raise ValueError(f"width and samples must be at least 1, got {width} and {samples}")
    if not (math.isfinite(smallest_eigenvalue) and smallest_eigenvalue >= 0):
        raise ValueError(f"smallest_eigenvalue must be finite and at least 0, got {smallest_eigenvalue!r}")
    return loss * torch.exp(-width * smallest_eigenvalue * times.double() / samples)
