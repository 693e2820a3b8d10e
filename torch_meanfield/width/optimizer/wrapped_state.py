"""The wrapped optimizer's part of a checkpoint, checked in full before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_NEEDED = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg"}
_UNSHAPED = ("Adafactor", "LBFGS", "SparseAdam")  # factored, one history for all parameters, other layouts


def check_wrapped(state_dict: Any, optimizer: Optimizer) -> None:
    """Raise for a state that torch would load, to stumble over it at a later step or to broadcast it silently.

    What belongs to a parameter is checked for the optimizers of torch that keep tensors of its shape and single
    numbers; of others no more is known than that it is a dict.

    Raises:
        ValueError: no optimizer's state, or one of another model; the entry is named. Nothing has been loaded then.
    """
    parts = optimizer.state_dict().keys()
    if not {"state", "param_groups"} <= parts:  # an optimizer around another may have a form of its own
        if not parts <= state_dict.keys():
            raise ValueError(
                f"state_dict has no {sorted(parts - state_dict.keys())}, which {type(optimizer).__name__} saves; it is "
                f"of another optimizer"
            )
        return
    for name, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(name), kind):
            raise ValueError(
                f"state_dict[{name!r}] must be a {kind.__name__}, got {type(state_dict.get(name)).__name__}; this is "
                f"no optimizer's state_dict"
            )
    theirs, ours = state_dict["param_groups"], optimizer.param_groups
    if len(theirs) != len(ours):
        raise ValueError(
            f"state_dict['param_groups'] has {len(theirs)} groups, the optimizer {len(ours)}; make the optimizer with "
            f"the groups of the one that was saved"
        )
    shaped = type(optimizer).__module__.startswith("torch.optim") and type(optimizer).__name__ not in _UNSHAPED
    state: dict[Any, Any] = state_dict["state"]
    seen: set[Any] = set()
    for key, entry in state.items():
        if not isinstance(entry, dict) and shaped:
            raise ValueError(f"state_dict['state'][{key!r}] must be a dict, got {type(entry).__name__}")
    for i, (group, own) in enumerate(zip(theirs, ours, strict=True)):
        ids = _check_group(group, own, optimizer.defaults, f"state_dict['param_groups'][{i}]")
        if {*ids} & seen:
            raise ValueError(f"state_dict['param_groups'][{i}]['params'] holds parameters of another group: {ids}")
        seen.update(ids)
        if shaped:
            present = {k: p for k, p in zip(ids, own["params"], strict=True) if k in state}
            names = {name: all(state[k].get(name) is None for k in present) for k in present for name in state[k]}
            for option, name in _NEEDED.items():
                if group.get(option) and names and name not in names:
                    raise ValueError(f"state_dict['param_groups'][{i}][{option!r}] is True, but {name!r} is not saved")
            for k, parameter in present.items():
                known = optimizer.state[parameter] if parameter in optimizer.state else {}
                _check_entry(state[k], names, parameter, known, f"state_dict['state'][{k!r}]")
    strangers = [k for k in state if k not in seen]
    if shaped and strangers:
        raise ValueError(f"state_dict['state'][{strangers[0]!r}] belongs to no parameter of state_dict['param_groups']")


def _check_group(group: Any, own: dict[str, Any], defaults: dict[str, Any], where: str) -> Sequence[Any]:
    ids = group.get("params") if isinstance(group, dict) else None
    if not isinstance(ids, list) or len(ids) != len(own["params"]):
        raise ValueError(f"{where}['params'] must list {len(own['params'])} parameters, got {_short(ids)}")
    if not all(isinstance(k, (int, str)) for k in ids) or len({*ids}) < len(ids):
        raise ValueError(f"{where}['params'] must name each parameter once, got {_short(ids)}")
    for name in defaults.keys() & own.keys():  # not what schedulers have added
        value = own[name]
        unset = defaults[name] is None and group.get(name) is None
        if _is_number(value) and not _is_number(group.get(name)) and not unset:
            raise ValueError(f"{where}[{name!r}] must be a finite number, got {_short(group.get(name))}")
        given = group.get(name)
        if defaults[name] is None and _is_number(given):
            continue  # a step may have put a number where there was none: Adafactor's own learning rate
        if (value is None or isinstance(value, bool)) and not (given is None or isinstance(given, bool)):
            raise ValueError(f"{where}[{name!r}] must be True, False or None, got {_short(given)}")
        if isinstance(value, tuple) and all(map(_is_number, value)):
            same = isinstance(given, (tuple, list)) and len(given) == len(value) and all(map(_is_number, given))
            if not same:
                raise ValueError(f"{where}[{name!r}] must be {len(value)} finite numbers, got {_short(given)}")
    if group.get("capturable") and any(p.device.type == "cpu" for p in own["params"]):
        raise ValueError(f"{where}['capturable'] is True, which parameters on the CPU cannot have; set it to False")
    if bool(group.get("differentiable")) != bool(own.get("differentiable")):
        raise ValueError(f"{where}['differentiable'] is {group.get('differentiable')}; make the optimizer with that")
    return ids


def _check_entry(
    entry: dict[str, Any], names: dict[str, bool], parameter: Tensor, known: dict[str, Any], where: str
) -> None:
    """``names``: what the entries of the group hold, and whether it is ``None`` in all of them."""
    for name in names.keys() - entry.keys():
        raise ValueError(f"{where} has no {name!r}, which others of its group have; the file is damaged")
    for name in known.keys() - entry.keys():
        raise ValueError(f"{where} has no {name!r}, which this optimizer keeps; it is of another optimizer")
    for name, value in entry.items():
        if value is None and (name == "momentum_buffer" or (names[name] and known.get(name) is None)):
            continue  # SGD has none before its second step
        if _is_number(value) and not isinstance(value, Tensor) and not isinstance(known.get(name), Tensor):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}[{name!r}] must be a tensor, got {_short(value)}")
        if value.shape != parameter.shape and not (value.ndim == 0 and name not in _LIKE_PARAMETER):
            raise ValueError(
                f"{where}[{name!r}] has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}; the state "
                f"is of another model"
            )
        if value.is_meta or value.layout != parameter.layout:
            raise ValueError(f"{where}[{name!r}] is {value.layout} on {value.device}, which holds no plain values")
        if value.is_complex() != parameter.is_complex() and value.ndim:
            raise ValueError(f"{where}[{name!r}] is {value.dtype}, its parameter {parameter.dtype}")


# Single numbers by any other name (step, eta, mu_product) have a shape of their own.
_LIKE_PARAMETER = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "exp_inf")


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_meta and not value.is_complex() and bool(value.isfinite())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    return repr(value)[:60]
