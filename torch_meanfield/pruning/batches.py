"""Batches as a score takes them: inputs, targets, and the loss between the two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_meanfield.observe import map_tensors, tensors_in

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """One batch: what the model is called with, what is expected (``None`` if nothing is), and how many samples."""

    inputs: Any
    targets: Any
    size: int

    @property
    def few(self) -> Any:
        """The inputs of two samples, which do for an example."""
        return map_tensors(lambda t: t[:2] if t.ndim and len(t) == self.size else t, self.inputs)


def read_batches(batches: Any, model: nn.Module, caller: str) -> list[Batch]:
    """All of ``batches``, on the device of ``model``.

    Args:
        batches: each a pair (inputs, targets), where inputs are what :func:`.convert` takes as an example; inputs
            alone; or a mapping of keywords, which is handed to the loss too.
        model: where to.
        caller: named in errors.

    Raises:
        TypeError: no iterable. ValueError: none, or one without a sample.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{caller}: batches must be an iterable of (inputs, targets), such as a DataLoader or a list, got "
            f"{type(batches).__name__}"
        )
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    found = []
    for i, batch in enumerate(batches):
        if isinstance(batch, (tuple, list)) and len(batch) > 2:
            raise ValueError(
                f"{caller}: batch {i} holds {len(batch)} things; pass (inputs, targets), with inputs a tuple where the "
                f"model takes several"
            )
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        inputs, targets = batch if pair else (batch, batch if isinstance(batch, Mapping) else None)
        inputs = inputs[0] if isinstance(inputs, list) and len(inputs) == 1 else inputs
        inputs = inputs[0] if isinstance(batch, (tuple, list)) and len(batch) == 1 else inputs
        tensors = tensors_in(inputs)
        if not tensors or tensors[0].ndim == 0 or not len(tensors[0]):
            raise ValueError(f"{caller}: batch {i} holds no sample; leave it out")
        found.append(Batch(_to(inputs, device), _to(targets, device), len(tensors[0])))
    if not found:
        raise ValueError(f"{caller}: batches is empty (an iterator that was read already, perhaps); pass a list")
    return found


def _to(value: Any, device: torch.device | None) -> Any:
    return value if device is None else map_tensors(lambda t: t.to(device), value)


def checked_loss(loss: Loss | None, batches: list[Batch], caller: str) -> Loss:
    """``loss``, or cross-entropy, if the batches have what it needs.

    Raises:
        TypeError: no function. ValueError: batches without targets.
    """
    if loss is not None and not callable(loss):
        raise TypeError(f"{caller}: loss must be a function of (outputs, targets), got {type(loss).__name__}")
    for i, batch in enumerate(batches):
        if batch.targets is None:
            raise ValueError(
                f"{caller}: batch {i} has no targets, which a loss needs; pass (inputs, targets), or score by "
                f"'cosine', 'ratio' or 'step'"
            )
        if loss is None and not isinstance(batch.targets, Tensor):
            raise ValueError(
                f"{caller}: the targets of batch {i} are a {type(batch.targets).__name__}, not a tensor; pass "
                f"loss=function of (outputs, targets)"
            )
    return F.cross_entropy if loss is None else loss


def loss_of(loss: Loss, outputs: Any, targets: Any, caller: str) -> Tensor:
    """The loss of one batch, a tensor of shape ``()``.

    Raises:
        ValueError, TypeError: the loss could not be computed, or is no number; with the way out.
    """
    try:
        value = loss(outputs, targets)
    except Exception as error:
        raise ValueError(
            f"{caller}: the loss failed on outputs of type {type(outputs).__name__} ({type(error).__name__}: {error}); "
            f"pass loss=function of (outputs, targets)"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{caller}: loss must give one number for a batch (its mean), got {what}")
    return value.reshape(())
