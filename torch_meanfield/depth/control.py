"""What a user calls about re-sorting: by hand, and whether optimizer steps do it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from torch_meanfield.depth.layer import MeanFieldLayer
from torch_meanfield.depth.sorting import sort_
from torch_meanfield.particles import Motion


def resort_(model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] = ()) -> list[Motion]:
    """Re-sort every mean-field layer of ``model`` by hand, whatever its mode and whether it does so by itself.

    Args:
        model: a module that holds mean-field layers, or is one.
        optimizer: optimizers whose state must move along, beside those that have stepped in this process: one whose
            state was loaded but that has not stepped yet.

    Returns:
        the motions made, one for each layer whose order changed.

    Raises:
        TypeError: ``model`` is not a module, or ``optimizer`` is neither an optimizer nor several.
        ValueError: ``model`` holds no mean-field layer, or one whose blocks share a tensor with another module.
    """
    layers = layers_of(model, "resort_")
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for o in optimizers:
        if not isinstance(o, Optimizer):
            raise TypeError(f"resort_: optimizer must be a torch.optim.Optimizer or several, got {type(o).__name__}")
    motions = [sort_(layer, cause="resort", optimizers=optimizers) for layer in layers]
    return [m for m in motions if m is not None]


def set_automatic_resort(model: nn.Module, enabled: bool) -> None:
    """Switch the re-sorting after optimizer steps on or off for every mean-field layer of ``model``.

    While it is off the branches, or the blocks of a converted model, still execute in the order of tau, read from the
    device at each forward pass. Compiled code (and FSDP2, in a converted model) runs them by slot, with the steps of
    that order.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` holds no mean-field layer.
    """
    for layer in layers_of(model, "set_automatic_resort"):
        layer.auto_resort = bool(enabled)


def layers_of(model: nn.Module, caller: str) -> list[MeanFieldLayer]:
    """Every mean-field layer in ``model``, or an error in the name of ``caller``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    layers = [m for m in model.modules() if isinstance(m, MeanFieldLayer)]
    if not layers:
        raise ValueError(
            f"{caller}: {type(model).__name__} holds no MeanFieldSequential or converted stage, so there is nothing to "
            f"sort; pass the model that holds one"
        )
    for layer in layers:
        layer.check_untied(model)
    return layers
