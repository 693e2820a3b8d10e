"""Training batches whose epoch can be repeated up to the batch at which it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from torch_meanfield.lightning.resume import generators


class Replay:
    """Stands between Lightning's fetcher and its loaders, which draw from generators that the training does not touch.

    Each epoch draws one number from torch's global generator when its first batch is asked for, and everything else
    that the loaders draw from the global generators follows from that number. An interrupted epoch is begun once more
    from the same number, and the batches that were used are loaded and thrown away: whatever else has a state (workers,
    a data set that draws) is then where it was. That costs the loading, not the training, of these batches.

    Args:
        loader: the loader of Lightning's fit loop.
        after_fetch: function called whenever a batch has been fetched, or the loaders had no more.

    Attributes:
        given: batches handed out in this epoch.
    """

    def __init__(self, loader: CombinedLoader, after_fetch: Callable[[], None]) -> None:
        self.loader, self.after_fetch = loader, after_fetch
        self.given = 0
        self._began: dict[str, Any] | None = None  # this epoch's number, and the loaders' own generators before it
        self._stream: dict[str, Any] | None = None  # the global generators as the loaders left them
        self._again: dict[str, Any] | None = None
        self._iterators_exist = False

    @property
    def stateful(self) -> list[bool]:
        """Which of the loaders know themselves where they are."""
        return [hasattr(each, "state_dict") and hasattr(each, "load_state_dict") for each in self.loader.flattened]

    # -- generators ----------------------------------------------------------------------------------------------

    def states(self) -> dict[str, Any]:
        """The loaders' own generators, attributes of them, of their samplers and data sets; by name."""
        return {name: generator.get_state() for name, generator in self._own().items()}

    def restore_(self, states: dict[str, Any]) -> None:
        """Set the loaders' own generators to what :meth:`states` found, as far as they have been made.

        Raises:
            ValueError: a generator was not there then. Nothing has been set.
        """
        ours = self._own()
        if not ours.keys() <= states.keys():
            raise ValueError(
                f"ExactResume: the training loaders draw from a generator {min(ours.keys() - states.keys())!r}, which "
                f"those of the checkpoint ({sorted(states) or 'none'}) had not; make the loaders as they were, or "
                f"resume without ExactResume, under other random numbers"
            )
        for name, generator in ours.items():
            generator.set_state(states[name].cpu())

    def _own(self) -> dict[str, torch.Generator]:
        found: dict[str, torch.Generator] = {}
        for i, loader in enumerate(self.loader.flattened):
            found |= dict(generators.inside(loader, str(i)))
        return found

    # -- interruption --------------------------------------------------------------------------------------------

    def state(self, ahead: int) -> dict[str, Any] | None:
        """Where this epoch is, of which ``ahead`` batches were fetched and not used yet; ``None`` before its first."""
        if self._began is None:
            return None
        stream = self._stream if any(self.stateful) else None
        return {**self._began, "given": self.given, "used": self.given - ahead, "stream": stream}

    def go_on(self, state: dict[str, Any], iterators_exist: bool = False) -> None:
        """Let the next iteration go on where ``state`` was taken.

        Args:
            state: from :meth:`state`.
            iterators_exist: whether loaders with a state have it and their iterators, which are not to be made anew.
        """
        self._again, self._iterators_exist = state, iterators_exist

    # -- what Lightning's fetcher asks for -----------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        again, self._again = self._again, None
        if again is None:
            again = {"number": int(torch.randint(2**62, ())), "own": self.states(), "given": 0, "used": 0}
        self._began = {"number": again["number"], "own": again["own"]}
        self.given, waiting = again["used"], self._apart(self._begin, again)
        while True:
            if not waiting:
                waiting = self._apart(self._fetch)
            self.after_fetch()
            if not waiting:
                return
            self.given += 1
            yield waiting.pop(0)

    def _apart(self, act: Callable[..., list[Any]], *args: Any) -> list[Any]:
        """Act with the loaders' generators in the place of the training's."""
        training = generators.collect(cuda=False)
        try:
            if self._stream is not None:
                generators.restore_(self._stream)
            return act(*args)
        finally:
            self._stream = generators.collect(cuda=False)
            generators.restore_(training)

    def _begin(self, epoch: dict[str, Any]) -> list[Any]:
        """Make the iterators, and repeat what was done; the batches that were fetched and not used."""
        if any(self.stateful) and epoch["given"]:
            generators.restore_(epoch["stream"])
            if not self._iterators_exist:
                iter(self.loader)
            return []
        if any(getattr(loader, "persistent_workers", False) for loader in self.loader.flattened):
            self.loader.reset()  # their generators go on from epoch to epoch, and cannot be read
        self.restore_(epoch["own"])
        generators.seed_(epoch["number"])
        iter(self.loader)
        return [next(self.loader) for _ in range(epoch["given"])][epoch["used"] :]

    def _fetch(self) -> list[Any]:
        # A CombinedLoader is its own iterator, and a `for` over it would begin anew.
        try:
            return [next(self.loader)]
        except StopIteration:
            return []

    def reset(self) -> None:
        """Shut down workers, as Lightning asks for at the end."""
        self.loader.reset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
