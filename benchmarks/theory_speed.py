#!/usr/bin/env python3
"""How fast the theory is: a phase diagram, a tangent kernel, and a diagnosis beside passes of the same network.

    python benchmarks/theory_speed.py [--only phase diagnose ntk] [--model resnet50 --batch 32 --size 224]

Bounds: 100 x 100 settings of tanh in 10 s on two cores; ``diagnose`` on ResNet-50, batch 32, in the time of 10
forward-backward passes; the tangent kernel of ResNet-18 on 64 images of 64 x 64 in 60 s and 8 GB. Wall-clock and
processor time, since a shared machine blurs the first. Results go to ``benchmarks/results/theory_speed.json``, those of
measurements not asked for are kept.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from recipes.record import DIGITS, provenance, write_json
from torch_meanfield.theory import diagnose, empirical_ntk, phase


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of wall clock and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"wall": round(time.perf_counter() - wall, 3), "cpu": round(time.process_time() - cpu, 3)}


def measure_phase(args: argparse.Namespace) -> dict[str, Any]:
    """The diagram of 100 x 100 settings."""
    w, b = torch.linspace(0.05, 4, 100)[:, None], torch.linspace(0, 1, 100)
    phase(torch.tanh, 1.0, 0.1)
    return {"settings": 10_000, "seconds": timed(lambda: phase(torch.tanh, w, b)), "bound": 10}


def measure_diagnose(args: argparse.Namespace) -> dict[str, Any]:
    """A diagnosis in units of a forward-backward pass in training mode."""
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, args.model)()
    x, y = torch.randn(args.batch, 3, args.size, args.size), torch.randint(1000, (args.batch,))

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        model.zero_grad()

    step()
    once = min((timed(step) for _ in range(2)), key=lambda t: t["cpu"])
    found = timed(lambda: diagnose(model, (x, y)))
    ratio = {k: round(found[k] / once[k], 2) for k in once}
    out = {"model": args.model, "batch": args.batch, "size": args.size}
    return {**out, "pass": once, "diagnose": found, "ratio": ratio, "bound": 10}


def measure_ntk(args: argparse.Namespace) -> dict[str, Any]:
    """The tangent kernel of ResNet-18 with ten classes on 64 images of 64 x 64, whole and traced, within 8 GB."""
    import torchvision

    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=10), torch.randn(64, 3, 64, 64)
    empirical_ntk(model, x[:2])
    found = {name: timed(lambda r=reduce: empirical_ntk(model, x, reduce=r, max_bytes=8_000_000_000))
             for name, reduce in (("whole", None), ("traced", "trace"))}  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"images": 64, "size": 64, "outputs": 10, "seconds": found, "bound": 60, "peak bytes of the process": peak}


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "phase": measure_phase,
    "diagnose": measure_diagnose,
    "ntk": measure_ntk,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS), default=list(MEASUREMENTS))
    parser.add_argument("--model", default="resnet50", help="a model of torchvision (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="side of the images (default %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "theory_speed.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.only:
        results[name] = {**MEASUREMENTS[name](args), **provenance(torch.device("cpu"))}
        print(name, {k: v for k, v in results[name].items() if k not in ("versions", "python")}, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, results, DIGITS)


if __name__ == "__main__":
    main()
