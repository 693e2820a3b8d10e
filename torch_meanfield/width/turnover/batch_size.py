"""How many samples a step's gradient is the mean of: without it, noise does not tell what removing a unit costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torch_meanfield._torch import in_backward, takes_hooks, untransformed
from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.particles.population import homes
from torch_meanfield.particles.ranks import of_all_ranks
from torch_meanfield.width.births.recorder import Tap
from torch_meanfield.width.turnover.blocks import Blocks


class BatchCounter:
    """Counts what goes through one module in the steps before an event.

    Args:
        seen: a layer that sees every sample once, and a parameter of it whose gradient tells whether it did since the
            gradients were thrown away; ``None``: then nothing is known but what is given.
        given: the number itself, if the user said it.
    """

    def __init__(self, seen: tuple[nn.Module, Tensor] | None, given: int | None) -> None:
        # The parameter as the optimizer has it: FSDP2 puts another in its place while the layer computes.
        self.module: nn.Module | None = None if seen is None else seen[0]
        self._parameter: Tensor | None = None if seen is None else seen[1]
        self.given = given
        self.wanted = False
        self.steps = 0
        self._taken = 0  # samples of steps that were taken
        self._behind = 0  # those whose gradients have been there since the last such step
        self._ahead = 0  # those that wait for theirs; loops differ in whether gradients are zeroed meanwhile
        self._agreed: float | None = None  # among ranks, of the present count
        self._handle: RemovableHandle | None = None

    @property
    def known(self) -> bool:
        """Whether :meth:`size` need not be counted anew."""
        return self.given is not None or self.module is None or self.steps > 0

    def start(self) -> None:
        """Begin anew."""
        self._agreed = None
        self.steps = self._taken = self._behind = self._ahead = 0
        self.wanted = self.given is None and self.module is not None
        self.resume()

    def resume(self) -> None:
        """Put the hook in place if it should be and is not (after a copy, or after loading)."""
        if not self.wanted or self._handle is not None or self.module is None:
            return
        if takes_hooks(self.module):
            self._handle = self.module.register_forward_hook(Tap(self, "_see"))

    def step(self) -> None:
        """One optimizer step is taken."""
        if self.wanted:
            self.steps += 1
            self._agreed = None
        self._taken += self._behind + self._ahead
        self._behind = self._ahead = 0

    def missed(self, samples: int) -> None:
        """Count samples of this step that passed before the hook was there."""
        self._behind += samples

    def forget(self) -> None:
        """It is not: drop the samples whose gradients are thrown away."""
        self._behind = 0

    def stop(self) -> None:
        """Leave no trace in the model."""
        self.wanted = False
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def size(self) -> float | None:
        """Samples in a step, over all data-parallel ranks, which ask together; ``None`` if one does not know it.

        They agree once on what was counted: later calls are free of communication.
        """
        if self.given is not None:
            return float(self.given)
        if self._agreed is None:
            mine = self._taken / self.steps if self.steps and self._taken else None
            sizes: list[float | None] = of_all_ranks(mine)
            if any(s is None for s in sizes):
                self.steps = self._taken = 0  # on every rank: counted anew before the next event
                return None
            self._agreed = sum(s for s in sizes if s is not None)
        return self._agreed

    def state(self) -> list[int]:
        """What has been counted so far; whether it is being counted."""
        return [self._taken, self.steps, int(self.wanted)]

    def load(self, state: Sequence[int]) -> None:
        """Go on from :meth:`state`."""
        self.stop()
        self._agreed = None
        self._taken, self.steps = int(state[0]), int(state[1])
        self._behind = self._ahead = 0
        self.wanted = bool(state[2]) and self.given is None and self.module is not None
        self.resume()

    def _see(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.is_grad_enabled() or not isinstance(output, Tensor) or untransformed(output) is None:
            return  # under vmap it is one sample of many
        if output.requires_grad and output.ndim > 1:
            if in_backward():  # recomputed from a checkpoint: with reentrant autograd it is first seen now
                cast(Any, output).register_hook(self._arrive_late)
                return
            if self._parameter is not None and self._parameter.grad is None:
                self.forget()  # the gradients were thrown away: a step that was skipped
            self._ahead += len(output)
            cast(Any, output).register_hook(self._arrive)

    def _arrive(self, gradient: Tensor) -> None:
        arrived = min(len(gradient), self._ahead)  # a second backward pass through one graph counts no sample twice
        self._ahead -= arrived
        self._behind += arrived

    def _arrive_late(self, gradient: Tensor) -> None:
        self._behind += len(gradient)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}


def seen_at(populations: Sequence[Neurons | Blocks], model: nn.Module | None) -> tuple[nn.Module, Tensor] | None:
    """A module inside ``model`` that every sample passes once: one that reads some population's units, or a layer.

    With it, the parameter of it that gets a gradient whenever it does.
    """
    modules = {} if model is None else homes(model)
    for population in populations:
        if isinstance(population, Neurons):
            for column in population.outgoing:
                if isinstance(column.tensor, nn.Parameter) and id(column.tensor) in modules:
                    return modules[id(column.tensor)], column.tensor
        elif model is not None:
            return population.module, population.parameter
    return None
