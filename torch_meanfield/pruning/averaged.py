"""The averaged copies of a model, which lose the same blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_meanfield.particles.averages import averages_of, follow, is_followed
from torch_meanfield.pruning.blocks import layers_by_name


@dataclass(frozen=True)
class Average:
    """An averaged copy.

    Attributes:
        root: the whole averaged module.
        prefix: what the names in the model begin with that the names in it lack.
    """

    root: nn.Module
    prefix: str

    def name(self, name: str) -> str:
        """What ``name`` of the model is called in it."""
        return name.removeprefix(self.prefix)


def follow_given(model: nn.Module, given: Iterable[Any]) -> None:
    """Let the averages of ``model`` that are given follow it, where they do not yet.

    Raises:
        TypeError: what is no average. ValueError: one of another structure.
    """
    for average in [given] if isinstance(given, (nn.Module, Mapping)) else list(given):
        copy: Any
        if isinstance(average, nn.Module):
            inner = getattr(average, "module", None)
            copy = inner if isinstance(inner, nn.Module) and type(inner) is type(model) else average
        elif isinstance(average, (Sequence, Mapping)) and not isinstance(average, str):
            copy = average
        else:
            raise TypeError(
                f"prune_depth_: averages must be averaged models or lists of averaged tensors, got "
                f"{type(average).__name__}"
            )
        if not is_followed(copy):
            follow(copy, model)


def averages_in(model: nn.Module, given: Iterable[Any]) -> list[Average]:
    """Every averaged copy that moves with a layer of ``model``.

    Raises:
        ValueError: one of which it is not known in which model it is.
    """
    roots = [m for m in ([given] if isinstance(given, nn.Module) else list(given)) if isinstance(m, nn.Module)]
    roots = [m.module if isinstance(getattr(m, "module", None), nn.Module) else m for m in roots]  # type: ignore[misc]
    found: dict[int, Average] = {}
    for name, layer in layers_by_name(model).items():
        for copy, known in averages_of(layer):
            root = next((r for r in roots if any(m is copy for m in r.modules())), known)
            if root is None:
                raise ValueError(
                    f"prune_depth_: an averaged copy of {name or 'the model'} moves with it, but the averaged model "
                    f"around it is not known; pass averages=[...]"
                )
            inside = next(n for n, m in root.named_modules() if m is copy)
            if not name.endswith(inside):
                raise ValueError(
                    f"prune_depth_: an averaged copy of {name!r} is called {inside!r} in its own model; pass the part "
                    f"of the model that it averages"
                )
            found[id(root)] = Average(root, name.removesuffix(inside) if inside else name)
    return list(found.values())
