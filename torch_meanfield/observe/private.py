"""The private copy that searches and proofs work on: a model without the hooks of its user, but with its own."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

from torch import Tensor, nn

from torch_meanfield._torch import backward_hooks, backward_pre_hooks, forward_hooks, forward_pre_hooks
from torch_meanfield.observe.observer import tensors_in

_KINDS = (forward_pre_hooks, forward_hooks, backward_hooks, backward_pre_hooks)
_PLAIN = set(nn.Module().__dict__)


def private_copy(
    model: nn.Module, *, share_parameters: bool = False, parameters: Mapping[int, nn.Parameter] | None = None
) -> nn.Module:
    """A deep copy in ``eval()`` without the hooks of its user; whatever is done to it, ``model`` does not notice.

    The model's own hooks stay, since its forward pass may need them: those of ``torch.nn.utils``, and those that are
    methods of the model, of its modules or of what they hold, or functions that refer to one of these. They act on
    the copy.

    Args:
        model: any module.
        share_parameters: let the copy hold the parameters of ``model`` themselves, for a look that changes none.
        parameters: what the copy is to hold instead of the parameters with these ``id``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` cannot be deep-copied.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if share_parameters else {}
    memo.update(parameters or {})
    memo.update((id(t), t.detach().clone()) for t in _left_over(model))
    try:
        copy = deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error}); the search works on a "
            f"copy. Tensors with a history kept as attributes are the usual cause: detach them. The hooks of "
            f"torch.nn.utils (weight_norm, spectral_norm, prune) keep such; torch.nn.utils.parametrizations does not"
        ) from error
    held = _held(model)
    kept = {(name, kind, key) for name, kind, key, hook in _hooks(model) if _is_own(hook, held)}
    for name, kind, key, hook in list(_hooks(copy)):
        if (name, kind, key) in kept:
            kind(copy.get_submodule(name))[key] = _rebound(hook, memo)
        else:
            del kind(copy.get_submodule(name))[key]
    return copy.eval()


def left_out(model: nn.Module) -> str:
    """Words for an error: on which modules hooks were taken for the user's and left out of a private copy."""
    held = _held(model)
    names = sorted({name or "the model itself" for name, *_, hook in _hooks(model) if not _is_own(hook, held)})
    if not names:
        return ""
    return (
        f". The copy that is run has not the hooks on {', '.join(names)}: a hook that the forward pass needs must be a "
        f"method of the model or of one of its modules"
    )


def _hooks(model: nn.Module) -> Iterator[tuple[str, Callable[..., Any], int, Any]]:
    for name, module in model.named_modules():
        for kind in _KINDS:
            for key, hook in kind(module).items():
                yield name, kind, key, hook


def _left_over(model: nn.Module) -> Iterator[Tensor]:
    """Results with a history that the model's own hooks keep, which cannot be deep-copied.

    Not what the hooks of ``torch.nn.utils`` compute: such a model is refused by the copy.
    """
    for module in model.modules():
        normed = any(type(hook).__module__.startswith("torch.nn.utils") for hook in forward_pre_hooks(module).values())
        own = {} if normed else {key: value for key, value in module.__dict__.items() if key not in _PLAIN}
        for value in [*own.values(), *(vars(v) for v in own.values() if hasattr(v, "__dict__"))]:
            yield from (t for t in tensors_in(value) if not t.is_leaf)


def _held(model: nn.Module) -> set[int]:
    """The ``id`` of every module, and of the objects and containers that they hold as attributes."""
    held: set[int] = set()
    for module in model.modules():
        own = [value for key, value in module.__dict__.items() if key not in _PLAIN]
        for value in (module, *own, *(v for o in own if isinstance(o, (list, tuple)) for v in o)):
            if isinstance(value, (list, dict, set)) or (
                hasattr(value, "__dict__") and not isinstance(value, (type, types.FunctionType, types.ModuleType))
            ):
                held.add(id(value))
    return held


def _is_own(hook: Any, held: set[int]) -> bool:
    if type(hook).__module__.startswith("torch.nn.utils"):
        return True
    if isinstance(hook, partial):
        return any(_is_own(part, held) or id(part) in held for part in (hook.func, *hook.args, *hook.keywords.values()))
    if isinstance(hook, types.FunctionType):
        return any(id(thing) in held for thing in _referred(hook))
    return id(getattr(hook, "__self__", hook)) in held


def _referred(function: types.FunctionType) -> list[Any]:
    """What a function holds besides its code: its closure and its defaults."""
    things = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            things.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return things


def _rebound(hook: Any, memo: dict[int, Any]) -> Any:
    """A function that was copied with its model, referring to the copy: ``deepcopy`` leaves functions as they are."""
    if isinstance(hook, partial):
        return partial(_rebound(hook.func, memo), *hook.args, **hook.keywords)
    if not isinstance(hook, types.FunctionType):
        return hook

    def theirs(thing: Any) -> Any:
        return memo.get(id(thing), thing)

    cells = tuple(_cell(cell, theirs) for cell in hook.__closure__ or ())
    defaults = tuple(map(theirs, hook.__defaults__ or ()))
    new = types.FunctionType(hook.__code__, hook.__globals__, hook.__name__, defaults, cells)
    new.__kwdefaults__ = {name: theirs(value) for name, value in (hook.__kwdefaults__ or {}).items()}
    return new


def _cell(cell: types.CellType, theirs: Callable[[Any], Any]) -> types.CellType:
    try:
        return types.CellType(theirs(cell.cell_contents))
    except ValueError:
        return types.CellType()
