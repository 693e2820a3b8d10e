"""Which branches can be particles of one population."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_meanfield.particles.population import named_tensors


def check_exchangeable(branches: Sequence[nn.Module]) -> None:
    """Raise if ``branches`` cannot change places by copying their tensors.

    They must hold the same tensors by name, shape, dtype and device, in modules of the same kind and configuration
    (stride, dilation, eps, ...), and share none. Drop probabilities may differ: they belong to the place.

    Raises:
        ValueError: no branch, one that differs from the first, or two that share a tensor.
        TypeError: a branch that is not a module.
    """
    if not branches:
        raise ValueError("branches is empty: a mean-field layer needs at least one residual branch")
    for i, branch in enumerate(branches):
        if not isinstance(branch, nn.Module):
            raise TypeError(f"branches[{i}] must be a torch.nn.Module, got {type(branch).__name__}")
    owners: dict[int, int] = {}
    for i, branch in enumerate(branches):
        for name, tensor in named_tensors(branch).items():
            if is_lazy(tensor):
                raise ValueError(
                    f"branches[{i}].{name} is not initialised yet; run the lazy modules once before building the layer"
                )
            if owners.setdefault(id(tensor), i) != i:
                raise ValueError(
                    f"branches[{i}] shares {name!r} with branches[{owners[id(tensor)]}]; a particle must own its "
                    f"tensors, so give each branch modules of its own (copy.deepcopy)"
                )
    first_tensors, first_modules = _tensors(branches[0]), _modules(branches[0])
    for i, branch in enumerate(branches[1:], start=1):
        for what, theirs, ours in (
            ("holds", _tensors(branch), first_tensors),
            ("is", _modules(branch), first_modules),
        ):
            if theirs != ours:
                name = next(k for k in [*ours, *theirs] if theirs.get(k) != ours.get(k))
                raise ValueError(
                    f"branches[{i}] differs from branches[0] at {name or 'its top'!r}: it {what} {theirs.get(name)}, "
                    f"branches[0] {ours.get(name)}; only branches of one shape and configuration can change places"
                )


def check_alike(particles: Sequence[Sequence[nn.Module]], tensors: Sequence[Mapping[str, Tensor]], label: str) -> None:
    """Raise if what the blocks of a layer hold *now* cannot change places: a tool may have changed some of them.

    Args:
        particles: the modules of each particle.
        tensors: what each holds, by the number of the module and the name in it: ``"0.weight"``.
        label: of the layer.

    Raises:
        ValueError: a particle holds a tensor that the first does not hold, or not in the same kind of module; named.
    """

    def kinds(modules: Sequence[nn.Module], theirs: Mapping[str, Tensor]) -> dict[str, str]:
        owners = {
            f"{k}.{name}." if name else f"{k}.": m
            for k, b in enumerate(modules)
            for name, m in b.named_modules(remove_duplicate=False)
        }
        return {
            n: f"a {'parameter' if isinstance(t, nn.Parameter) else 'buffer'} of a "
            f"{type(owners[n[: n.rindex('.') + 1]]).__name__}"
            for n, t in theirs.items()
        }

    first = kinds(particles[0], tensors[0])
    for i in range(1, len(particles)):
        theirs = kinds(particles[i], tensors[i])
        if theirs != first:
            name = next(n for n in [*first, *theirs] if theirs.get(n) != first.get(n))
            raise ValueError(
                f"{label}: {name.partition('.')[2]!r} is {theirs.get(name, 'absent')} in block {i} and "
                f"{first.get(name, 'absent')} in block 0; blocks change places with all they hold, so do to each of "
                f"them what was done to one (an adapter, a frozen norm, a parametrised weight), or undo it"
            )


def _tensors(branch: nn.Module) -> dict[str, str]:
    tensors = named_tensors(branch)
    first = {id(t): name for name, t in reversed(tensors.items())}
    kinds = {name: f"{tuple(t.shape)} {t.dtype} on {t.device}" for name, t in tensors.items()}
    ties = {name: f", tied to {first[id(t)]!r}" for name, t in tensors.items() if first[id(t)] != name}
    return {name: kind + ties.get(name, "") for name, kind in kinds.items()}


def _modules(branch: nn.Module) -> dict[str, str]:
    kinds = {}
    for name, module in branch.named_modules():
        kind = type(module).__name__
        drops = "drop" in kind.lower() or "stochasticdepth" in kind.lower()
        kinds[name] = kind if drops else f"{kind}({module.extra_repr()})"
    return kinds
