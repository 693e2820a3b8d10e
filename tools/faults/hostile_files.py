"""Damage done to checkpoints at random, and what must come of it: loaded whole, or refused by name and nothing changed.

:func:`soak` runs any number of mutations from a seed; the tests run a few of each kind.
"""

from __future__ import annotations

import copy
import io
import random
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.convert.networks import stack, tokens
from torch_meanfield import BirthDeathOptimizer, MeanFieldResNet, MeanFieldSequential, convert
from torch_meanfield.particles import load_whole_

REFUSALS = (ValueError, TypeError, RuntimeError)


@dataclass
class Subject:
    """Something that loads a checkpoint.

    Attributes:
        state: Its state dict, live.
        load: Load one.
        others: State dicts of other models, none of which may be loaded.
        use: Run it once, after a load.
    """

    state: Callable[[], dict[str, Any]]
    load: Callable[[Any], Any]
    others: Callable[[], list[dict[str, Any]]]
    use: Callable[[], Any]


def _layer(n: int = 3, width: int = 4) -> MeanFieldSequential:
    layer = MeanFieldSequential(*(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)) for _ in range(n)))
    layer.set_tau_([0.5 + i * 0.75 for i in range(n)])
    return layer


def a_layer() -> Subject:
    """A stack of residual branches."""
    layer = _layer()
    return Subject(
        layer.state_dict,
        layer.load_state_dict,
        lambda: [_layer(4).state_dict(), _layer(3, 5).state_dict()],
        lambda: layer(torch.randn(3, 4)),
    )


def a_resnet() -> Subject:
    """The CIFAR network."""
    model = MeanFieldResNet(14, 3)
    return Subject(
        model.state_dict,
        model.load_state_dict,
        lambda: [MeanFieldResNet(20, 3).state_dict(), MeanFieldResNet(14, 4).state_dict()],
        lambda: model(torch.randn(2, 3, 8, 8)),
    )


def a_converted_model() -> Subject:
    """A model of one's own, converted, which loads with torch's own method unless told otherwise."""
    model = convert(stack(), tokens())
    return Subject(
        model.state_dict,
        lambda state: load_whole_(model, state),
        lambda: [
            convert(stack(5), tokens()).state_dict(),
            convert(stack(4, width=6, kind="gain"), tokens()).state_dict(),
        ],
        lambda: model(tokens()),
    )


def _trained(make: Callable[[Any], torch.optim.Optimizer], units: int = 6) -> tuple[nn.Module, BirthDeathOptimizer]:
    net = nn.Sequential(nn.Linear(4, units), nn.ReLU(), nn.Linear(units, 2))
    optimizer = BirthDeathOptimizer(
        make(net.parameters()),
        net,
        populations=[(net[0].weight, 0), (net[0].bias, 0), (net[2].weight, 1)],
        every=4,
        batch_size=8,
    )
    for _ in range(6):
        _step(net, optimizer)
    return net, optimizer


def _step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()


def an_optimizer(make: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=0.01)) -> Subject:
    """The birth-death wrapper, in the middle of recording for its next event."""
    net, optimizer = _trained(make)
    return Subject(
        optimizer.state_dict,
        optimizer.load_state_dict,
        lambda: [_trained(make, 7)[1].state_dict()],
        lambda: [_step(net, optimizer) for _ in range(8)],
    )


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "MeanFieldSequential": a_layer,
    "MeanFieldResNet": a_resnet,
    "converted": a_converted_model,
    "BirthDeathOptimizer over AdamW": an_optimizer,
    "BirthDeathOptimizer over SGD": lambda: an_optimizer(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
}


FILES = "--ckpt_path"


class Blob:
    """No tensor, and nothing that a checkpoint may hold."""


# -- mutations of a state dict in memory -----------------------------------------------------------------------------


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every entry of nested dicts and lists."""
    entries: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for k, v in entries for p in ((*path, k), *_places(v, (*path, k)))]


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _garble(tensor: Tensor, rng: random.Random) -> tuple[str, Any]:
    """Another value for a tensor, and what was done."""
    flat = tensor.reshape(-1)
    kinds: dict[str, Callable[[], Any]] = {
        "one dimension more": lambda: tensor[None],
        "one entry less": lambda: flat[:-1],
        "twice as long": lambda: torch.cat([flat, flat]),
        "huge": lambda: torch.zeros(1_000_003),
        "empty": lambda: tensor.new_zeros(0),
        "not a number": lambda: torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor[None],
        "infinite": lambda: torch.full_like(tensor, -torch.inf) if tensor.is_floating_point() else tensor[None],
        "integers": lambda: tensor.to(torch.int64),
        "complex": lambda: tensor.to(torch.complex64),
        "half": lambda: tensor.half() if tensor.is_floating_point() else tensor,
        "sparse": lambda: tensor.to_sparse() if tensor.ndim else tensor[None],
        "without storage": lambda: torch.empty_like(tensor, device="meta"),
    }
    kind = rng.choice(sorted(kinds))
    return kind, kinds[kind]()


def mutate(state: dict[str, Any], others: list[dict[str, Any]], rng: random.Random) -> tuple[str, Any, tuple[Any, ...]]:
    """What was done, the damaged copy, and the keys one of which an error must name (none: any message will do)."""
    state = copy.deepcopy(state)  # of a module, with its metadata
    places = _places(state)
    path = rng.choice(places)
    parent, key = _at(state, path[:-1]), path[-1]
    named = tuple(k for k in path if isinstance(k, str)) or ("state",)
    kind = rng.choice(("drop", "add", "rename", "replace", "garble", "garble", "garble", "swap", "other", "whole"))
    if kind == "other":
        return "of another model", copy.deepcopy(dict(rng.choice(others))), ()
    if kind == "whole":
        return "no state dict at all", rng.choice((None, [], "state", 3, [state], {1: torch.zeros(2)}, {})), ()
    if kind == "drop":
        del parent[key]
        return f"without {path}", state, named
    if kind == "add":
        parent = parent if isinstance(parent, dict) else state
        parent["intruder"] = rng.choice((torch.zeros(3), "text", None, {"a": 1}))
        return f"intruder at {path[:-1]}", state, ("intruder", *named)
    if kind == "rename" and isinstance(parent, dict) and isinstance(key, str):
        parent[f"{key}_"] = parent.pop(key)
        return f"{path} renamed", state, (key, *named)
    if kind == "swap":
        other = rng.choice(places)
        if other[: len(path)] != path and path[: len(other)] != other:
            theirs = _at(state, other[:-1])
            parent[key], theirs[other[-1]] = theirs[other[-1]], parent[key]
            return f"{path} and {other} exchanged", state, (*named, *(k for k in other if isinstance(k, str)))
    value = _at(state, path)
    if isinstance(value, Tensor) and kind != "replace":
        what, parent[key] = _garble(value, rng)
        return f"{path} {what}", state, named
    new = rng.choice((None, "text", [1.0], {}, Blob(), float("nan"), -1, True, torch.zeros(2, 3)))
    parent[key] = new
    return f"{path} is {new!r:.20}", state, named


# -- what must come of it --------------------------------------------------------------------------------------------


def fingerprint(value: Any) -> Any:
    """Plain values and bytes of everything in nested containers, to compare bit by bit."""
    if isinstance(value, Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.detach().contiguous().cpu().view(-1).view(torch.uint8).tolist(),
        )
    if isinstance(value, dict):
        return {k: fingerprint(v) for k, v in value.items()}
    return [fingerprint(v) for v in value] if isinstance(value, (list, tuple)) else value


def _is_whole(loaded: dict[str, Any], given: dict[str, Any]) -> str:
    """What of ``given`` is not in ``loaded``, if anything."""
    for path in _places(loaded):
        if path[0] == "birth_death" and "birth_death" not in given:
            continue  # the state of a bare optimizer, which may be loaded
        mine = _at(loaded, path)
        try:
            theirs = _at(given, path)
        except (KeyError, IndexError, TypeError):
            if path[0] == "param_groups" and (mine is None or isinstance(mine, bool)):
                continue  # torch gives options of later versions their defaults
            return f"{path} is not in the file, and was loaded"
        if isinstance(mine, Tensor) and not (isinstance(theirs, Tensor) and theirs.shape == mine.shape):
            # torch takes a vector of one entry for a single number
            if not (mine.numel() == 1 and (isinstance(theirs, (int, float)) or theirs.numel() == 1)):
                return f"{path} differs in shape"
        elif isinstance(mine, Tensor) and not torch.equal(
            mine.nan_to_num(), theirs.to_dense().to(mine.dtype).nan_to_num()
        ):
            return f"{path} differs"
    return ""


def attempt(subject: Subject, rng: random.Random) -> tuple[str, str]:
    """One mutation: what was done, and what is wrong with what came of it (empty: nothing)."""
    what, damaged, names = mutate(subject.state(), subject.others(), rng)
    before = fingerprint(subject.state())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subject.load(damaged)
    except REFUSALS as error:
        message = str(error)
        if fingerprint(subject.state()) != before:
            return what, f"refused ({message[:200]}), but something has changed"
        if not message or (names and not any(name in message for name in names)):
            return what, f"refused without naming any of {names}: {message[:300]}"
        return what, ""
    except Exception:
        return what, "failed otherwise: " + traceback.format_exc(limit=-3)
    lost = _is_whole(subject.state(), damaged)
    if lost:
        return what, f"loaded, but {lost}"
    try:
        subject.use()
    except Exception:
        return what, "loaded, and fails in use: " + traceback.format_exc(limit=-3)
    return what, ""


def soak(
    count: int, seed: int = 0, *, subjects: dict[str, Callable[[], Subject]] = SUBJECTS
) -> tuple[int, int, list[str]]:
    """Damage checkpoints ``count`` times: each subject in turn, and then a file.

    Returns:
        Tries, how many were survived, and a line for each that was not.
    """
    rng, failures = random.Random(seed), []
    names = [*subjects, FILES] if subjects is SUBJECTS else list(subjects)
    for i in range(count):
        torch.manual_seed(seed + i)
        name = names[i % len(names)]
        what, wrong = attempt_file(rng) if name == FILES else attempt(subjects[name](), rng)
        if wrong:
            failures.append(f"seed {seed}, try {i}, {name}, {what}: {wrong}")
    return count, count - len(failures), failures


# -- mutations of a file ---------------------------------------------------------------------------------------------


class Executed(Exception):
    """A pickle in a checkpoint was run."""


def betray() -> None:
    """What the code in a hostile pickle does."""
    raise Executed


class _Hostile:
    def __reduce__(self) -> Any:
        return betray, ()


def hostile_file(checkpoint: dict[str, Any], path: Path, rng: random.Random) -> str:
    """Write a damaged or hostile ``checkpoint`` to ``path``; what was done to it."""
    stream = io.BytesIO()
    torch.save(checkpoint, stream)
    raw = bytearray(stream.getvalue())
    kind = rng.choice(("truncated", "flipped", "empty", "text", "code", "code in a tensor's place", "garbled pickle"))
    if kind == "truncated":
        raw = raw[: rng.randrange(1, len(raw))]
    elif kind == "flipped":
        for _ in range(64):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind in ("empty", "text"):
        raw = bytearray(b"" if kind == "empty" else b"no checkpoint\n" * 100)
    elif kind.startswith("code"):
        stream = io.BytesIO()
        inside = {"state_dict": {**checkpoint["state_dict"], "net.stem.weight": _Hostile()}}
        torch.save(_Hostile() if kind == "code" else inside, stream)
        raw = bytearray(stream.getvalue())
    else:
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(raw)) as given, zipfile.ZipFile(stream, "w") as out:
            for name in given.namelist():
                data = bytearray(given.read(name))
                if name.endswith("data.pkl"):
                    data[rng.randrange(len(data))] ^= 0xFF
                out.writestr(name, bytes(data))
        raw = bytearray(stream.getvalue())
    path.write_bytes(raw)
    return kind


def attempt_file(rng: random.Random) -> tuple[str, str]:
    """One hostile file given to ``--ckpt_path``: what was done, and what is wrong with what came of it."""
    from recipes.errors import BadInput
    from recipes.images.cli import RecipeCLI

    net = MeanFieldResNet(8, 2)
    before = fingerprint(net.state_dict())
    weights: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.ckpt"
        kind = hostile_file({"state_dict": {f"net.{k}": v for k, v in net.state_dict().items()}}, path, rng)
        try:
            loaded = RecipeCLI._read_checkpoint(str(path))
            assert loaded is not None
            weights = {k.removeprefix("net."): v for k, v in loaded["state_dict"].items()}
            net.load_state_dict(weights)
        except BadInput as error:
            wrong = "" if str(path) in str(error) else f"the file is not named: {error}"
            if isinstance(error.__cause__, Executed):
                wrong = "its code was executed"
        except REFUSALS as error:  # the pickle still is one, of other names or sizes
            wrong = "" if any(str(k) in str(error) for k in weights) else f"no key is named: {error}"
        except Executed:
            wrong = "its code was executed"
        except Exception:
            wrong = "failed otherwise: " + traceback.format_exc(limit=-3)
        else:  # a bit that means nothing, or one in a weight, can be flipped unseen
            return kind, "" if kind in ("flipped", "garbled pickle") else "was loaded"
        if not wrong and fingerprint(net.state_dict()) != before:
            wrong = "was refused, but something has changed"
        return kind, wrong
