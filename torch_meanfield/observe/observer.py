"""The observer: every torch function of one eager forward pass, in the order of execution.

Nothing is traced and nothing is replaced: the model runs as it always does, under a ``TorchFunctionMode`` that hands
each call to a watcher. The search for neuron populations watches how channels travel; the conversion of residual
branches can watch the additions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from inspect import BoundArguments
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_meanfield._torch import may_compile


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a torch function.

    Attributes:
        name: the plain name, the same for function, method and operator: ``"add"`` for ``torch.add``,
            ``Tensor.add``, ``x + y`` and ``y + x``; ``"add_"`` for ``x += y``; ``"linear"``, ``"conv2d"``, ...
        func: what was called.
        args, kwargs: as the caller gave them (after ``__radd__`` and the like, in the reversed order).
        result: what came back.
    """

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at ``position``, or called ``name``, or ``default``."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


class Observer(TorchFunctionMode):
    """Hand every torch function that runs inside the context to ``watch``, after it has run.

    Calls made by the watcher itself, and inside a function that torch treats as one, are not observed.
    """

    def __init__(self, watch: Callable[[Call], None]) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.watch(Call(plain_name(func), func, args, kwargs, result))
        return result


_OPERATORS = {"truediv": "div", "floordiv": "floor_divide", "and": "bitwise_and", "or": "bitwise_or"}


def plain_name(func: Callable[..., Any]) -> str:
    """``"add"`` for ``Tensor.__radd__``, ``"mul_"`` for ``Tensor.__imul__``, ``"get mT"`` for ``Tensor.mT.__get__``."""
    name = str(getattr(func, "__name__", func))
    if name in ("__get__", "__set__"):
        return f"{name[2:5]}_{getattr(getattr(func, '__self__', None), '__name__', '')}"
    if not (name.startswith("__") and name.endswith("__")):
        return name
    name = name[2:-2]
    reversed_, in_place = name[1:] if name[0] == "r" else "", name[1:] if name[0] == "i" else ""
    for stem, suffix in ((name, ""), (reversed_, ""), (in_place, "_")):
        stem = _OPERATORS.get(stem, stem)
        if stem and hasattr(torch, stem) and callable(getattr(torch, stem)):
            return stem + suffix
    return name


def run(model: nn.Module, example_input: Any) -> Any:
    """``model`` on the example: a tensor or any single object, a tuple of arguments, or a dict of keywords.

    Arguments of both kinds are ``inspect.signature(model.forward).bind(x, mask=mask)``.
    """
    if isinstance(example_input, BoundArguments):
        return model(*example_input.args, **example_input.kwargs)
    if isinstance(example_input, Mapping):
        return model(**example_input)
    if isinstance(example_input, tuple) and not hasattr(example_input, "_fields"):
        return model(*example_input)
    return model(example_input)


@contextmanager
def undisturbed(seed: int = 0) -> Iterator[None]:
    """Eager, without gradients and autocast, from the random state ``seed``; afterwards torch's is as it was."""
    devices = range(len(torch.cuda.default_generators))  # none before CUDA is initialised, and this does not do it
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if may_compile():  # else nothing can be compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.manual_seed(seed)
        yield


def tensors_in(value: Any, inside: tuple[int, ...] = ()) -> list[Tensor]:
    """Every tensor in nested lists, tuples, mappings and dataclasses, in order; ``inside``: what is being looked at."""
    if isinstance(value, Tensor):
        return [value]
    value = value.arguments if isinstance(value, BoundArguments) else value
    if isinstance(value, Mapping):
        parts: Any = value.values()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        parts = value
    elif hasattr(value, "__dataclass_fields__") and hasattr(value, "__dict__"):
        parts = vars(value).values()
    else:
        return []
    if id(value) in inside:  # it holds itself
        return []
    return [t for v in parts for t in tensors_in(v, (*inside, id(value)))]


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``change`` made to every tensor in its nested lists, tuples and mappings, which are made anew.

    Anything else is passed on as it is, shapes and named tuples too.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, BoundArguments):
        return BoundArguments(value.signature, OrderedDict(map_tensors(change, value.arguments)))
    if isinstance(value, Mapping):
        return {k: map_tensors(change, v) for k, v in value.items()}
    if isinstance(value, tuple) and not hasattr(value, "_fields") and not isinstance(value, torch.Size):
        return tuple(map_tensors(change, v) for v in value)
    return [map_tensors(change, v) for v in value] if isinstance(value, list) else value


def anew(change: Callable[[Tensor], Tensor], given: Any) -> Any:
    """A deep copy of what a module is given, ``change`` made to each tensor in it: the module may keep state there.

    Language models write keys and values into a cache that they are handed from block to block. Modules in it are not
    copied.
    """
    memo: dict[int, Any] = {}
    waiting = [given]
    while waiting:
        thing = waiting.pop()
        if id(thing) in memo or isinstance(thing, (str, bytes, type)):
            continue
        memo[id(thing)] = None  # seen
        if isinstance(thing, Tensor):
            memo[id(thing)] = change(thing)
        elif isinstance(thing, nn.Module):
            memo[id(thing)] = thing
        elif isinstance(thing, Mapping):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple, set)):
            waiting += thing
        elif isinstance(thing, BoundArguments):
            waiting.append(thing.arguments)
        if not isinstance(thing, (Tensor, nn.Module)):
            waiting += vars(thing).values() if hasattr(thing, "__dict__") else ()
    return deepcopy(given, {i: copied for i, copied in memo.items() if copied is not None})


def observe(model: nn.Module, example_input: Any, watch: Callable[[Call], None]) -> Any:
    """Run ``model`` once on ``example_input`` without gradients, each call handed to ``watch``; return its output.

    The model is run as it is: pass a :func:`.private_copy` to keep the original's buffers and caches untouched.
    The random state of torch is restored.
    """
    with undisturbed(), Observer(watch):
        return run(model, example_input)
