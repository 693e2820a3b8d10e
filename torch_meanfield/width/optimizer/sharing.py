"""An optimizer around an optimizer: one ``param_groups``, one ``state`` and one ``defaults`` for both."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torch_meanfield._torch import init_optimizer_hooks, mark_hooked, optimizer_hooks, patch_step, steps_under_amp
from torch_meanfield.observe import map_tensors
from torch_meanfield.particles.optimizer_state import check_undivided
from torch_meanfield.width.optimizer.wrapped_state import check_wrapped


def with_own_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """Run the hooks registered on the wrapper itself around ``step``, as torch does, but not the global ones.

    torch patches ``step`` of every optimizer class so that hooks run around it. A wrapper's ``step`` calls the
    wrapped one, around which the global hooks run already: they would see every step twice.
    """

    @functools.wraps(step)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        self = args[0]
        for pre in list(optimizer_hooks(self, "step_pre").values()):
            result = pre(self, args, kwargs)
            if result is not None:
                if not isinstance(result, tuple) or len(result) != 2:
                    raise RuntimeError(f"step: a pre-hook must return None or (new_args, new_kwargs), got {result!r}")
                args, kwargs = result
        out = step(*args, **kwargs)
        for post in list(optimizer_hooks(self, "step_post").values()):
            post(self, args, kwargs)
        return out

    return mark_hooked(hooked)


class Lent:
    """An attribute that others set on the wrapper and that the wrapped optimizer needs: it is kept there only."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, wrapper: SharingOptimizer | None, owner: type) -> Any:
        if wrapper is None:
            return self
        return getattr(wrapper.optimizer, self.name)

    def __set__(self, wrapper: SharingOptimizer, value: Any) -> None:
        setattr(wrapper.optimizer, self.name, value)

    def __delete__(self, wrapper: SharingOptimizer) -> None:
        delattr(wrapper.optimizer, self.name)


class SharingOptimizer(Optimizer):
    """Shares everything with the optimizer it wraps, and is one itself.

    Learning-rate schedulers, gradient scalers, clipping and checkpointing read and write ``param_groups``, ``state``
    and ``defaults`` of whichever of the two they were given: they are the same objects.

    Args:
        optimizer: the wrapped optimizer.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``, or divides its state among ranks.
    """

    param_groups = Lent()
    state = Lent()
    defaults = Lent()
    # A GradScaler sets these two on what it is given, for fused optimizers to read in their step.
    grad_scale = Lent()
    found_inf = Lent()

    optimizer: Optimizer

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        check_undivided(optimizer)
        self.optimizer = optimizer
        # Not Optimizer.__init__, which would make groups and state of its own; what else it makes is made here, also
        # for other wrappers that left it out, whose state_dict() torch could not make otherwise.
        for each in (self, *optimizers_inside(optimizer)):
            init_optimizer_hooks(each)
        patch_step(self)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether the wrapped optimizer unscales gradients in its own step (fused ones do)."""
        return steps_under_amp(self.optimizer)

    def __getattr__(self, name: str) -> Any:
        # Only what is not found otherwise. Optimizers have attributes and methods of their own (``train``/``eval`` of
        # schedule-free ones); "optimizer" itself is missing only while an instance is being made.
        if name == "optimizer" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to both: see :meth:`torch.optim.Optimizer.add_param_group`."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See :meth:`torch.optim.Optimizer.zero_grad`."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def _own_state(self) -> dict[str, Any]:
        """What the wrapper adds to the wrapped optimizer's state dict."""
        return {}

    def _take_own(self, state_dict: dict[str, Any]) -> Callable[[], None]:
        """Take out of ``state_dict`` what :meth:`_own_state` added, check it, and return what loads it."""
        return lambda: None

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, whole, and what the wrapper adds (``"birth_death"``).

        ``"state"`` and ``"param_groups"`` stay where every tool looks for them, so a bare optimizer loads this dict as
        it is (torch ignores the key), and this wrapper loads a bare optimizer's; then averages begin anew. Of what
        data-parallel ranks see each for itself it holds this rank's part.
        """
        for pre in list(optimizer_hooks(self, "state_dict_pre").values()):
            pre(self)
        theirs = self.optimizer.state_dict()
        _warn_of_unsaved(self.optimizer, theirs)
        out = {**theirs, **self._own_state()}
        for post in list(optimizer_hooks(self, "state_dict_post").values()):
            result = post(self, out)
            out = out if result is None else result
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, whole or not at all; ``param_groups`` and ``state`` stay those objects.

        Raises:
            ValueError: the state is damaged or of another model; the entry is named. Nothing has been loaded then.
        """
        if not isinstance(state_dict, dict):
            raise ValueError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        state_dict = dict(state_dict)
        for pre in list(optimizer_hooks(self, "load_state_dict_pre").values()):
            result = pre(self, state_dict)
            state_dict = state_dict if result is None else result
        load_own = self._take_own(state_dict)
        check_wrapped(state_dict, self.optimizer)
        self._load_wrapped(state_dict)
        load_own()
        for post in list(optimizer_hooks(self, "load_state_dict_post").values()):
            post(self)

    def _load_wrapped(self, state_dict: dict[str, Any]) -> None:
        """Load the wrapped optimizer; groups and states of it and of those inside it stay the objects they were.

        torch makes new ones, and whoever held the old ones, an optimizer inside or a scheduler, would drive nothing.
        """
        nest = optimizers_inside(self.optimizer)
        before = [(o, o.param_groups, o.state) for o in nest]
        self.optimizer.load_state_dict(state_dict)
        replaced: dict[int, Any] = {}  # what lies in the place of a new object: the old one, with its contents
        for optimizer, groups, state in reversed(before):
            loaded, values = optimizer.param_groups, optimizer.state
            if loaded is not groups and id(loaded) not in replaced:
                for old, new in zip(groups, loaded, strict=True):
                    _refill(old, new)
                replaced[id(loaded)] = groups
            if values is not state and id(values) not in replaced:
                _refill(state, values)
                replaced[id(values)] = state
        for optimizer in nest:
            held = vars(optimizer)
            held.update({name: replaced[id(value)] for name, value in held.items() if id(value) in replaced})
        _check_shared(before)


def _warn_of_unsaved(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Say which optimizer inside ``optimizer`` keeps a state that is not in what ``optimizer`` saves, as in SAM."""
    inside = optimizers_inside(optimizer)[1:]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    if inside:
        map_tensors(keep, saved)
    ids = {id(tensor) for tensor in kept}
    for each in inside:
        tensors = [v for state in each.state.values() for v in state.values() if isinstance(v, Tensor)]
        if tensors and not any(id(t) in ids for t in tensors):
            warnings.warn(
                f"state_dict: {type(optimizer).__name__} does not save the state of the {type(each).__name__} inside "
                f"it, so that loading cannot restore it; save and load that one's state_dict() beside",
                RuntimeWarning,
                stacklevel=3,
            )


def _refill(old: Any, new: Any) -> None:
    """Make ``old``, a dict, hold what ``new`` holds."""
    if old is not new:
        contents = dict(new)
        old.clear()
        old.update(contents)


def _check_shared(before: list[tuple[Optimizer, Any, Any]]) -> None:
    """Raise if an optimizer has other groups or another state than before, so that settings would not reach it."""
    for optimizer, groups, state in before:
        if optimizer.param_groups is not groups or optimizer.state is not state:
            raise RuntimeError(
                f"load_state_dict: {type(optimizer).__name__} keeps its loaded groups or state where they cannot be "
                f"put back into those that others share, so that a learning rate would not reach it; load "
                f"the state before it is wrapped"
            )


def optimizers_inside(optimizer: Optimizer) -> list[Optimizer]:
    """``optimizer`` and those that it, or one inside it, holds as attributes or in lists or dicts; each once."""
    found: list[Optimizer] = []
    waiting: list[Any] = [optimizer]
    while waiting:
        thing = waiting.pop(0)
        if isinstance(thing, Optimizer) and not any(thing is o for o in found):
            found.append(thing)
            attributes = [v for name, v in vars(thing).items() if name not in ("param_groups", "state")]
            for value in attributes:
                waiting += [value, *(value.values() if isinstance(value, dict) else ())]
                waiting += value if isinstance(value, (list, tuple)) else ()
    return found
