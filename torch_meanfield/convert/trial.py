"""Numeric proof, in double precision on random weights, that blocks can change places and that parameters scale them.

Both are tested at a block's output. Fresh weights would prove nothing: layer scales of 1e-6 and gains of zero hide
whole branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_meanfield.convert.blocks import Block
from torch_meanfield.convert.residual import nested_additions
from torch_meanfield.convert.sites import Place, Site, attached, descend
from torch_meanfield.convert.trace import trace
from torch_meanfield.observe import map_tensors, run, tensors_in, undisturbed
from torch_meanfield.observe.randomise import Draws, randomise_
from torch_meanfield.particles.population import named_tensors

FACTORS = (0.0, 0.5, 2.0)
TOLERANCE = 1e-9  # relative to the largest output; true ones reach 1e-13
VISIBLE = 1e-6  # the least change when scaled by 0; below it the test has seen nothing


class BlockInputs:
    """The arguments that chosen modules are called with in one forward pass, by name."""

    def __init__(self, model: nn.Module, example_input: Any, names: Iterable[str]) -> None:
        self.by_name: dict[str, tuple[Any, Any]] = {}
        modules = dict(model.named_modules())
        handles = []
        for name in names:

            def keep(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self.by_name[name] = (map_tensors(_cloned, args), map_tensors(_cloned, kwargs))

            handles.append(modules[name].register_forward_pre_hook(keep, with_kwargs=True))
        try:
            model.train().eval()  # clears tables cached in eval mode
            with undisturbed():
                run(model, example_input)
        finally:
            for handle in handles:
                handle.remove()


class Trial:
    """A random double-precision copy of one block, on the input that the block had.

    Args:
        block: what is known of the block.
        module: its module, which is left as it is.
        inputs: the positional and the keyword arguments of its call.
    """

    def __init__(self, block: Block, module: nn.Module, inputs: tuple[Any, Any]) -> None:
        self.block = block
        self.module = deepcopy(module).double().eval()
        self.args, self.kwargs = map_tensors(_doubled, inputs[0]), map_tensors(_doubled, inputs[1])
        for scale in (1.0, 0.3, 0.1):
            randomise_(self.module, Draws(0), scale)
            self.output = self.run(self.module)
            if bool(self.output.isfinite().all()):
                break
        self.magnitude = max(float(self.output.abs().max()), 1e-30) if self.output.numel() else math.nan

    def run(self, module: nn.Module | Callable[..., Any], mode: TorchFunctionMode | None = None) -> Tensor:
        """All outputs as one vector."""
        if isinstance(module, nn.Module):
            module.train().eval()  # clears tables that some blocks cache in eval mode
        with undisturbed():
            args, kwargs = map_tensors(_cloned, self.args), map_tensors(_cloned, self.kwargs)
            if mode is None:
                out = module(*args, **kwargs)
            else:
                with mode:
                    out = module(*args, **kwargs)
        parts = [t.reshape(-1).double() for t in tensors_in(out) if t.is_floating_point()]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)

    def distance(self, one: Tensor, other: Tensor) -> float:
        """Largest difference in units of the largest output; infinite if not comparable."""
        if one.shape != other.shape or not one.numel():
            return math.inf
        change = float((one - other).abs().max()) / self.magnitude
        return math.inf if math.isnan(change) else change

    def same_function(self, other: nn.Module) -> str | None:
        """Whether ``other``, given this block's tensors, computes the same; the reason if it does not."""
        theirs = named_tensors(self.module)
        other.train().eval()
        try:
            out = self.run(lambda *a, **k: torch.func.functional_call(other, theirs, a, k))
        except Exception as error:
            return f"with equal tensors it fails ({type(error).__name__}: {error})"
        finally:
            other.train().eval()
        change = self.distance(out, self.output)
        return None if change <= TOLERANCE else f"with equal tensors its output differs by {change:.0e}"

    def scales(self) -> str | None:
        """Whether scaling the parameters is scaling the branches; the reason if it is not."""
        if not self.output.numel():
            return "its output holds no real floating-point numbers; a MeanFieldSequential takes complex branches"
        self.module.train().eval()
        graph = trace(_Called(self.module, self.args, self.kwargs), ())
        call = next(c for c in graph.calls if c.name == "module")
        found = nested_additions(call, graph.nodes)
        if len(found) != len(self.block.branches):
            return f"in double precision it shows {len(found)} additions, not {len(self.block.branches)}"
        stages = _Constant()
        for value in FACTORS:
            additions = {a.node.index - call.start: a.node.inputs.index(a.branch) for a in found}
            expected = self.run(self.module, _Scaling(additions, value))
            stages.value = self.output.new_tensor(value)
            places = make_places(self.block, self.module)
            with attached({descend(self.module, p.path): Site(stages, p) for p in places}):
                got = self.run(self.module)
            change = self.distance(got, expected)
            if change > TOLERANCE:
                what = self.block.scaled[0].path or self.block.scaled[0].site
                return f"scaling {what!r} by {value:g} differs from scaling the branch by {change:.0e}"
            if value == 0.0 and self.distance(got, self.output) < VISIBLE:
                return "its branch leaves no trace in its output on the example"
        return None


class _Constant:
    """Stands in for a stage whose every step is ``value``."""

    value: Tensor

    def step(self, slot: int) -> Tensor:
        return self.value


def make_places(block: Block, module: nn.Module, slot: int = 0, member: int = 0) -> list[Place]:
    """Where the step acts in one block; ``module`` is the block's own, or a copy of it."""
    places: dict[str, Place] = {}
    for s in block.scaled:
        kind = type(module.get_submodule(s.site))
        place = places.setdefault(s.site, Place(slot, member, s.site, kind, whole=s.whole, output=not s.name))
        if s.name:
            place.scaled += ((s.owner[len(s.site) :].lstrip("."), s.name, s.power),)
    return list(places.values())


class _Called(nn.Module):
    """A module with its arguments, so that a trace sees its call."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.module, self.given = module, (args, kwargs)
        self.eval()

    def forward(self) -> Any:
        args, kwargs = self.given
        return self.module(*map_tensors(_cloned, args), **map_tensors(_cloned, kwargs))


class _Scaling(TorchFunctionMode):
    """Scale the branch in chosen additions, counted as a trace counts calls."""

    def __init__(self, additions: Mapping[int, int], factor: float) -> None:
        super().__init__()
        self.additions, self.factor, self.count = additions, factor, -1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        branch = self.additions.get(self.count + 1)
        stream = None
        if branch is not None:
            operands = tensors_in(args) + tensors_in(kwargs)
            stream = operands[1 - branch].clone() if len(operands) == 2 else None
        result = func(*args, **kwargs)
        if tensors_in(result) or getattr(func, "__name__", "") == "__setitem__":
            self.count += 1
            if stream is not None and branch is not None:
                scaled = stream + self.factor * (result - stream)
                return result.copy_(scaled) if any(result is t for t in operands) else scaled
        return result


def _cloned(t: Tensor) -> Tensor:
    return t.detach().clone()


def _doubled(t: Tensor) -> Tensor:
    return t.detach().double() if t.is_floating_point() else t.detach().clone()
