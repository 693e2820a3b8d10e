"""What an optimizer keeps for a particle that is new, found by letting a copy of it begin on a small stand-in."""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_meanfield._torch import init_optimizer_hooks
from torch_meanfield.particles.columns import Slice
from torch_meanfield.particles.copying import whole
from torch_meanfield.particles.optimizer_state import unremembered
from torch_meanfield.particles.slices import read_rows, write_rows_

MOMENT_SHARE = 0.01

# By the state's key: the number that fills it at the start, or how it starts otherwise.
COPY, MOMENT = "a copy of the parameter", "0, and above whatever the gradient's sign is"
Beginning = dict[str, float | str]

_known: weakref.WeakKeyDictionary[Optimizer, dict[Any, Beginning]] = weakref.WeakKeyDictionary()


def begin_anew_(
    column: Slice, places: Tensor, optimizers: Iterable[Optimizer], moment_share: float = MOMENT_SHARE
) -> None:
    """Give the particles at ``places`` a past of nothing: gradient 0, and the state that their optimizers begin with.

    Second moments (what begins at 0 and rises whatever the gradient's sign is) begin at ``moment_share`` of their mean
    instead. The count of steps by which Adam corrects its moments is one for the whole parameter: from 0, the first
    updates of a newborn particle would be several times the learning rate.

    Args:
        column: of the population; what the newborn particles own has been written there already.
        places: int64 ``(k,)``.
        optimizers: those whose state is to be written.
        moment_share: at least 0.

    Raises:
        TypeError: an optimizer begins in a way that cannot be told for a part of a parameter.
    """
    column.change_gradient_(lambda grad: write_rows_(grad, places, 0.0))
    for optimizer in optimizers:
        state = optimizer.state[column.tensor] if column.tensor in optimizer.state else {}
        kept = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == column.tensor.shape}
        begins = beginning(optimizer, column.tensor) if kept else {}
        for key, value in kept.items():
            begin, rows = begins.get(key, 0.0), column.on(value)
            if begin == COPY:
                write_rows_(rows, places, read_rows(column, places))
            elif begin == MOMENT:
                write_rows_(rows, places, moment_share * whole(value).mean())  # no read
            else:
                write_rows_(rows, places, float(begin))


def beginning(optimizer: Optimizer, parameter: Tensor) -> Beginning:
    """How what ``optimizer`` keeps for ``parameter`` begins, for each key whose value has the parameter's shape.

    Raises:
        TypeError: with neither one number nor a copy of the parameter.
    """
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)
    if group is None:
        return {}
    known = _known.setdefault(optimizer, {})
    options = tuple((k, v) for k, v in group.items() if k != "lr" and isinstance(v, (bool, int, float, str)))
    key = (options, parameter.dtype, parameter.device, tuple(min(2, s) for s in parameter.shape))
    if key in known:
        return known[key]
    # A scheduler changes the learning rate at every step; a beginning that depends on it (Rprop's) is found anew.
    rate = group.get("lr")
    begins = _found(optimizer, group, parameter, rate)
    fixed = not isinstance(rate, (int, float)) or begins == _found(optimizer, group, parameter, 2 * rate + 1)
    if fixed:
        known[key] = begins
    return begins


def _found(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, rate: Any) -> Beginning:
    begins = _begun(optimizer, group, parameter, rate, 0.0)
    if 0.0 in begins.values():
        pushed = _begun(optimizer, group, parameter, rate, -1.0)
        begins |= {k: MOMENT for k, v in begins.items() if v == 0 and _number(pushed.get(k)) > 0}
    for key, begin in begins.items():
        if begin is None:
            raise TypeError(
                f"{type(optimizer).__name__} begins {key!r} with neither one number nor a copy of the parameter, so "
                f"that the state of a newborn unit cannot be told; use an optimizer whose state begins so (SGD, AdamW, "
                f"RMSprop, ...), or births='clone', which inherits it"
            )
    return begins


def _number(value: float | str | None) -> float:
    return value if isinstance(value, float) else 0.0


def _begun(
    optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, rate: Any, gradient: float
) -> dict[str, Any]:
    """By key, what is kept after one step on a stand-in under a constant gradient; ``None`` if it is neither kind."""
    shape = [min(2, s) for s in parameter.shape]
    # uneven numbers without a draw: the user's random numbers stay as they are
    values = torch.arange(1, 1 + torch.Size(shape).numel(), device=parameter.device).view(shape).sqrt()
    stand_in = nn.Parameter(values.to(parameter.dtype))
    stand_in.grad = torch.full_like(stand_in, gradient)
    before = stand_in.detach().clone()
    options = {**group, "lr": rate} if "lr" in group else dict(group)
    for decay in ("weight_decay", "wd"):  # of a gradient of 0 nothing may be left but the beginning
        if isinstance(options.get(decay), (int, float)):
            options[decay] = 0.0
    twin = _twin(optimizer, group, {**options, "params": [stand_in]}, {})
    name = type(optimizer).__name__
    try:
        # whatever the default device is: AdamW of torch 2.6 counts its steps there
        with unremembered(), torch.enable_grad(), torch.device("cpu"):
            try:
                _step(twin)
            except KeyError:  # its state is made with it, not at the first step (Adagrad of torch 2.6)
                twin = _made_anew(optimizer, stand_in, options)
                _step(twin)
    except Exception as error:
        warnings.warn(
            f"{name} could not be begun on a stand-in ({type(error).__name__}: {error}), so the state of newborn "
            f"units begins at 0; tell its authors, or use an optimizer of torch if newborn units do not train",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}
    begins: dict[str, Any] = {}
    state: dict[str, Any] = twin.state[stand_in] if stand_in in twin.state else {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != stand_in.shape:
            continue
        same = bool((value == value.flatten()[0]).all())
        copied = any(torch.equal(value, p.to(value.dtype)) for p in (before, stand_in))
        begins[key] = COPY if copied else float(value.flatten()[0]) if same else None
    return begins


def _step(optimizer: Optimizer) -> None:
    step: Any = optimizer.step
    try:
        step()
    except TypeError:  # it wants a closure
        step(lambda: torch.zeros(()))


def _made_anew(optimizer: Optimizer, parameter: nn.Parameter, options: dict[str, Any]) -> Optimizer:
    """An optimizer of this class over ``parameter``, with those of ``options`` that its constructor takes."""
    taken = inspect.signature(type(optimizer)).parameters
    return type(optimizer)([parameter], **{k: v for k, v in options.items() if k in taken and k != "params"})


def _twin(optimizer: Optimizer, group: dict[str, Any], options: dict[str, Any], memo: dict[int, Any]) -> Optimizer:
    """The same optimizer at its start, holding ``options`` in place of ``group`` and nothing else; ones inside it too.

    What it holds besides is shared, containers copied: a model among it is neither copied nor stepped.
    """
    if id(optimizer) in memo:
        return memo[id(optimizer)]  # type: ignore[no-any-return]
    twin: Optimizer = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    ours = set(map(id, group["params"]))

    def begun(name: str, value: Any) -> Any:
        if isinstance(value, Optimizer):
            return _twin(value, group, options, memo)
        if id(value) in memo:
            return memo[id(value)]
        if name == "state":
            memo[id(value)] = defaultdict(dict)
        elif name == "param_groups":
            held = next((g for g in value if ours & set(map(id, g["params"]))), None)
            kept = options if held is group else {**(held or {}), "params": options["params"]}
            memo[id(value)] = [] if held is None else [kept]
        else:
            return copy.copy(value) if isinstance(value, (list, dict, set)) else value
        return memo[id(value)]

    skipped = {"step", "_opt_called"}  # a scheduler has put its own on the instance, bound to the one it counts
    for name, value in vars(optimizer).items():
        if name not in skipped and not name.startswith("_optimizer_"):
            vars(twin)[name] = begun(name, value)
    init_optimizer_hooks(twin)
    return twin


def check_beginnings(optimizer: Optimizer, tensors: Sequence[Tensor]) -> None:
    """Raise ``TypeError`` if the state of a newborn particle could not be told; see :func:`beginning`."""
    for tensor in tensors:
        if tensor in optimizer.state:
            beginning(optimizer, tensor)
