#!/usr/bin/env python3
"""What birth and death cost, each figure a ratio of two things timed in one run.

    python benchmarks/birth_death.py [--steps 16] [--device cpu] [--out benchmarks/results]

1. A training step, wrapped over bare, at the wrapper's defaults over a whole period from event to event: ResNet-56 and
   ViT-Tiny on 32x32 images. Bare and wrapped steps take turns; each kind of step is counted as often as it comes.
2. One event on a population of 1,000,000 units with 64 incoming weights (10 % of them change), over copying the
   tensors it touches once; and the cost from 10^3 to 10^6 units.
3. One event against a literal particle loop, as in the published notebooks, at n = 10,000.

On the CPU, processor time is counted (one thread), which other work on the machine does not change much.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout's packages are found beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.timing import clock_of
from recipes.record import DIGITS, provenance, write_json
from torch_meanfield import MeanFieldResNet
from torch_meanfield.width import BirthDeathOptimizer


def median_time(run: Callable[[], Any], clock: Callable[[], float], repeats: int) -> float:
    """The median of ``repeats`` timings of ``run``, after one that is not counted."""
    run()
    out = []
    for _ in range(repeats):
        begin = clock()
        run()
        out.append(clock() - begin)
    return statistics.median(out)


# -- 1 ---------------------------------------------------------------------------------------------------------------


def resnet56() -> nn.Module:
    return MeanFieldResNet(depth=56, learn_tau=False)


def vit_tiny() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10)


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """The model as it is without the wrapper, which records the landscape in forward hooks."""
    hooks = [(m, m._forward_hooks) for m in model.modules() if m._forward_hooks]
    for m, _ in hooks:
        m._forward_hooks = OrderedDict()
    yield
    for m, kept in hooks:
        m._forward_hooks = kept


def training_step(make: Callable[[], nn.Module], batch: int, quiet: int, device: torch.device) -> dict[str, float]:
    """Mean seconds of a step over a whole period from event to event, bare and wrapped, and the ratio.

    A period has three kinds of steps: most of them, those before an event in which the landscape is recorded, and the
    one with the event. All of the second and third kind are timed, and ``quiet`` of the first; the others, which are
    like those, are taken with a batch of 2, so that potentials have their whole window behind them, and not timed.

    Both kinds of step are taken in turn by one model: two models in two places of memory differ by 2 % by themselves.
    """
    clock = clock_of(device)
    torch.manual_seed(0)
    model = make().to(device)
    bare_optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wrapper = BirthDeathOptimizer(bare_optimizer, model, example_input=torch.randn(1, 3, 32, 32, device=device))
    every, recorded = wrapper.settings.every, wrapper.settings.recorded
    replaced = [0]
    wrapper.register_event_hook(lambda event: replaced.append(len(event.born)))
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    kinds: dict[str, list[tuple[float, float]]] = {"quiet": [], "recorded": [], "event": []}
    first = every - recorded - quiet
    for step in range(1, every + 1):
        timed = step > first
        n = batch if timed or step <= 2 else 2  # two to warm up
        spent = [0.0, 0.0]
        for which in (0, 1) if step % 2 else (1, 0):
            with nullcontext() if which else without_hooks(model):
                begin = clock()
                bare_optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[:n]), y[:n]).backward()
                (wrapper if which else bare_optimizer).step()
                spent[which] = clock() - begin
        if timed:
            kind = "event" if step == every else "recorded" if step > every - recorded else "quiet"
            kinds[kind].append((spent[0], spent[1]))
    weights = {"quiet": every - recorded, "recorded": recorded - 1, "event": 1}
    bare = statistics.median(b for pairs in kinds.values() for b, _ in pairs)
    over = {kind: statistics.median(w - b for b, w in pairs) for kind, pairs in kinds.items()}
    over["event"] = kinds["event"][0][1] - bare
    wrapped_mean = bare + sum(over[kind] * weight for kind, weight in weights.items()) / every
    return {
        "populations": len(wrapper.populations),
        "units": sum(p.size for p in wrapper.populations),
        "replaced": sum(replaced),
        "bare": bare,
        "wrapped": wrapped_mean,
        **{f"more in a step, {kind}": value for kind, value in over.items()},
        "ratio": wrapped_mean / bare,
    }


# -- 2 and 3 ---------------------------------------------------------------------------------------------------------


def large(n: int, births: str, device: torch.device) -> tuple[BirthDeathOptimizer, list[Tensor]]:
    """A population of n units with 64 incoming weights of which a tenth is due, and the tensors an event touches."""
    torch.manual_seed(0)
    z = torch.randn(n, 64, device=device, requires_grad=True)
    c = torch.randn(n, device=device, requires_grad=True)
    inner = torch.optim.SGD([z, c], lr=1e-6, momentum=0.9)
    slices = [(z, 0), (c, 0)]
    optimizer = BirthDeathOptimizer(inner, populations=slices, births=births, every=10**9, window=20, batch_size=1)
    for _ in range(21):
        z.grad, c.grad = torch.zeros_like(z), torch.randn(n, device=device)
        due = torch.arange(n, device=device) % 10 == 0
        c.grad = torch.where(due, c.detach().sign(), torch.where(due.roll(1), -c.detach().sign(), c.grad)) * 1e-3
        optimizer.step()
    touched = [z, c, z.grad, c.grad] + [s for p in (z, c) for s in inner.state[p].values() if isinstance(s, Tensor)]
    return optimizer, [t.detach() for t in touched]


def event_time(n: int, births: str, device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of an event and of one copy of what it touches."""
    clock = clock_of(device)
    optimizer, touched = large(n, births, device)
    dynamics = optimizer._dynamics
    assert dynamics is not None
    table = dynamics.averages[0].table.clone()
    changed = []

    def event() -> None:
        dynamics.averages[0].table.copy_(table)  # the same units are due each time
        changed.append(len(dynamics.event(optimizer.optimizer, 0)))

    space = [torch.empty_like(t) for t in touched]

    def copy() -> None:
        for t, s in zip(touched, space, strict=True):
            s.copy_(t)

    times = {"event": median_time(event, clock, repeats), "copy": median_time(copy, clock, repeats)}
    assert all(changed)
    return {"units": n, **times, "ratio": times["event"] / times["copy"]}


def literal(z: Tensor, c: Tensor, killed: list[int], cloned: list[int]) -> tuple[Tensor, Tensor]:
    """The event as a loop over particles: cut the killed out one by one, append the clones one by one."""
    for i in sorted(killed, reverse=True):
        z, c = torch.cat([z[:i], z[i + 1 :]]), torch.cat([c[:i], c[i + 1 :]])
    for i in cloned:
        z, c = torch.cat([z, z[i : i + 1]]), torch.cat([c, c[i : i + 1]])
    return z, c


def against_literal(n: int, device: torch.device) -> dict[str, float]:
    """Median seconds of one event with clones, vectorised and literal, parameters only in the latter."""
    clock = clock_of(device)
    ours = event_time(n, "clone", device, 9)["event"]
    z, c = torch.randn(n, 64, device=device), torch.randn(n, device=device)
    killed = list(range(0, n, 10))
    cloned = [i % (n - len(killed)) for i in range(1, n, 10)]
    theirs = median_time(lambda: literal(z, c, killed, cloned), clock, 1)
    return {"units": n, "event": ours, "literal": theirs, "ratio": theirs / ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=16, help="timed steps far from events; 0: no training (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    out: dict[str, Any] = {}
    lines = [
        f"| 1. training step, batch {args.batch} | bare | wrapped | more: far from an event, recording, with the event "
        "| replaced | wrapped / bare |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, make in (("ResNet-56", resnet56), ("ViT-Tiny", vit_tiny)) if args.steps else ():
        r = out[name] = training_step(make, args.batch, args.steps, device)
        lines.append(
            f"| {name}, {r['populations']} populations, {r['units']} units | {r['bare']:.4f} s | {r['wrapped']:.4f} s "
            "| "
            + ", ".join(f"{1e3 * r[f'more in a step, {kind}']:.0f} ms" for kind in ("quiet", "recorded", "event"))
            + f" | {r['replaced']} | {r['ratio']:.4f} |"
        )
        print(lines[-1], flush=True)
    lines += [
        "",
        "| 2. one event | units | event | copying what it touches once | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for births in ("clone", "reinject"):
        for n in (10**3, 10**4, 10**5, 10**6):
            r = out[f"{births} {n}"] = event_time(n, births, device, 5 if n == 10**6 else 15)
            lines.append(
                f"| {births} | {n:,} | {1e3 * r['event']:.2f} ms | {1e3 * r['copy']:.2f} ms | {r['ratio']:.2f} |"
            )
            print(lines[-1], flush=True)
    r = out["literal"] = against_literal(10_000, device)
    lines += ["", "| 3. one event, n = 10,000 | seconds |", "| --- | --- |"]
    lines += [
        f"| literal loop | {r['literal']:.4f} |",
        f"| this library | {r['event']:.5f} |",
        f"| ratio | {r['ratio']:.0f} |",
    ]
    made = provenance(device)
    text = (
        "\n".join(lines)
        + f"\n\nMade by `python benchmarks/birth_death.py --steps {args.steps}` on {made['device']}, "
        + f"torch {made['versions']['torch']}.\n"
    )
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    name = "birth_death" if device.type == "cpu" else f"birth_death_{device.type}"
    (args.out / f"{name}.md").write_text(text)
    write_json(args.out / f"{name}.json", {**made, "results": out}, DIGITS)


if __name__ == "__main__":
    main()
