"""Numeric proof, in double precision on random weights, that blocks can change places and that parameters scale them.

Both are tested at a block's output. Fresh weights would prove nothing: layer scales of 1e-6 and gains of zero hide
whole branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_meanfield.convert.blocks import Block
from torch_meanfield.convert.description import attributes_of, ignored
from torch_meanfield.convert.residual import nested_additions
from torch_meanfield.convert.sites import Place, Site, attached, descend
from torch_meanfield.convert.trace import trace
from torch_meanfield.observe import anew, run, tensors_in, undisturbed
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
                self.by_name[name] = anew(_cloned, (args, kwargs))

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
        part: the name of one of its modules.
        module: that module, which is left as it is.
        inputs: the positional and the keyword arguments of its call.
    """

    def __init__(self, block: Block, part: str, module: nn.Module, inputs: tuple[Any, Any]) -> None:
        self.block = block
        self.module = deepcopy(module).double().eval()
        self.args, self.kwargs = anew(_doubled, inputs)
        if block.output is not None and part == block.name:
            self.module = _Added(self.module, block.output)
            self.args = (tensors_in(inputs)[0].new_zeros((), dtype=torch.float64), *self.args)
        for scale in (1.0, 0.3, 0.1):
            randomise_(self.module, Draws(0), scale)
            self.output = self.run(self.module)
            if bool(self.output.isfinite().all()):
                break
        self.magnitude = max(float(self.output.abs().max()), 1e-30) if self.output.numel() else math.nan

    def run(
        self,
        module: nn.Module | Callable[..., Any],
        mode: TorchFunctionMode | None = None,
        *,
        training: bool = False,
    ) -> Tensor:
        """All outputs as one vector."""
        if isinstance(module, nn.Module):
            module.train().train(training)  # clears tables that some blocks cache in eval mode
        with undisturbed():
            args, kwargs = anew(_cloned, (self.args, self.kwargs))
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

    def same_function(
        self, other: nn.Module, ignore: Sequence[str] = (), equal: Sequence[str] = (), *, training: bool = False
    ) -> str | None:
        """Whether ``other``, given this block's tensors, computes the same; the reason if it does not.

        Args:
            ignore: patterns of attributes that are made equal before.
            equal: attributes that are made equal before, by qualified name.
            training: whether to compare in ``train()`` too, with the same random numbers.
        """
        theirs = named_tensors(self.module)
        other = deepcopy(other) if ignore or equal or training else other
        for key in equal:
            owner, _, name = key.rpartition(".")
            setattr(other.get_submodule(owner), name, getattr(self.module.get_submodule(owner), name))
        if isinstance(self.module, _Added):
            other = _Added(other, self.module.output)
        for mine, its in zip(self.module.modules(), other.modules(), strict=True) if ignore else ():
            its.__dict__.update({n: v for n, v in attributes_of(mine).items() if ignored(n, ignore)})

        def with_theirs(*args: Any, **kwargs: Any) -> Any:
            tensors = {name: t.clone() for name, t in theirs.items()} if training else theirs
            return torch.func.functional_call(other, tensors, args, kwargs)

        try:
            for mode in (False, True) if training else (False,):
                here = self.run(deepcopy(self.module), training=True) if mode else self.output
                other.train().train(mode)
                change = self.distance(self.run(with_theirs), here)
                if not change <= TOLERANCE:
                    return f"with equal tensors its output differs by {change:.0e}" + " in training" * mode
        except Exception as error:
            return f"with equal tensors it fails ({type(error).__name__}: {error})"
        finally:
            other.train().eval()
        return None

    def makes_up(self, key: str, value: float) -> str | None:
        """Whether parameters make up for another ``value`` of the attribute ``key``; the reason if they do not."""
        owner, _, name = key.rpartition(".")
        module = deepcopy(self.module)
        own = getattr(module.get_submodule(owner), name)
        setattr(module.get_submodule(owner), name, value)
        with torch.no_grad():
            for s in self.block.carried[key]:
                module.get_parameter(s.path).mul_(own / value)
        change = self.distance(self.run(module), self.output)
        return None if change <= TOLERANCE else f"{key!r} is not made up for by parameters: it differs by {change:.0e}"

    def scales(self) -> str | None:
        """Whether scaling the parameters is scaling the branches; the reason if it is not."""
        if not self.output.numel():
            return "its output holds no real floating-point numbers; a MeanFieldSequential takes complex branches"
        self.module.train().eval()
        graph = trace(_Called(self.module, self.args, self.kwargs), ())
        call = next(c for c in graph.calls if c.name == "module")
        found = [a for i, a in enumerate(nested_additions(call, graph.nodes)) if i not in self.block.skipped]
        if len(found) != len(self.block.branches):
            return f"in double precision it shows {len(found)} additions, not {len(self.block.branches)}"
        stages = _Constant()
        owner = self.module.module if isinstance(self.module, _Added) else self.module
        for value in FACTORS:
            additions = {a.node.index - call.start: a.node.inputs.index(a.branch) for a in found}
            expected = self.run(self.module, _Scaling(additions, value))
            stages.value = self.output.new_tensor(value)
            places = make_places(self.block, owner)
            with attached({descend(owner, p.path): Site(stages, p) for p in places}):
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
    for key, table in block.tables.items():
        for s in block.carried[key]:
            place = places.setdefault(s.site, Place(slot, member, s.site, type(module.get_submodule(s.site))))
            place.whole = False
            place.carried += ((s.owner[len(s.site) :].lstrip("."), s.name, table),)
    return list(places.values())


class _Called(nn.Module):
    """A module with its arguments, so that a trace sees its call."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.module, self.given = module, (args, kwargs)
        self.eval()

    def forward(self) -> Any:
        args, kwargs = anew(_cloned, self.given)
        return self.module(*args, **kwargs)


class _Added(nn.Module):
    """A block of a loop: the addition that the loop makes, to a stream of zeros."""

    def __init__(self, module: nn.Module, output: int) -> None:
        super().__init__()
        self.module, self.output = module, output

    def forward(self, stream: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs = tensors_in(self.module(*args, **kwargs))
        outputs[self.output] = stream + outputs[self.output]
        return outputs


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
