#!/usr/bin/env python3
"""What a conversion costs: in training, after folding, and to make. Ratios of things timed in turns, medians.

    python benchmarks/convert_overhead.py [--repeats 10] [--batch 8] [--size 224] [--models resnet50 ...]

1. A training step (forward, backward, SGD with momentum) of the converted model over the unconverted one.
2. Inference of the folded model over the plain one.
3. ``convert(vit_base_patch16_224)`` in forward passes of its example (one image), and what stays in memory afterwards.

Each repeat times every contender once, in an order that changes from repeat to repeat; a figure is the median over
repeats of the ratio within one repeat. On the CPU, processor time is counted, which other work on the machine does not
change much.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout's packages are found beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.timing import clock_of, compared, in_turns, training_step, written
from recipes.record import provenance
from torch_meanfield import conversion_report, convert, fold

MODELS = ("resnet50", "convnext_tiny", "vit_small_patch16_224", "swin_tiny_patch4_window7_224")
LARGE = "vit_base_patch16_224"
BARS = {"training step": 1.05, "folded inference": 1.0, "forward passes to convert": 10}


def create(name: str, size: int, device: torch.device) -> nn.Module:
    """A timm model with the same random weights each time."""
    import timm

    torch.manual_seed(0)
    try:
        return timm.create_model(name, img_size=size).to(device)
    except TypeError:  # networks of convolutions take any size
        return timm.create_model(name).to(device)


def inference(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """A forward pass in ``eval()``, as a function."""
    model.eval()

    def run() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return run


def measure(
    name: str, size: int, batch: int, repeats: int, device: torch.device, autocast: torch.dtype | None
) -> dict[str, Any]:
    """Training step and folded inference of one model."""
    clock, inner = clock_of(device), 1 if device.type == "cpu" else 10
    images, labels = torch.randn(batch, 3, size, size, device=device), torch.randint(1000, (batch,), device=device)
    plain = create(name, size, device)
    converted = convert(create(name, size, device), torch.randn(1, 3, size, size, device=device))
    for stage in conversion_report(converted):  # steps that differ from 1: all weights are really multiplied
        assert stage.module is not None
        drawn = random.Random(0)
        times = [i + 1 + drawn.uniform(-0.2, 0.2) for i in range(len(stage.module))]
        stage.module.set_tau_(times)
    seconds = in_turns(
        {
            which: partial(training_step(model, autocast, SGD(model.parameters(), 1e-3, 0.9)), images, labels)
            for which, model in (("plain", plain), ("converted", converted))
        },
        repeats,
        clock,
        f"{name} training",
        warm_up=2,
        inner=inner,
    )
    trained = compared(seconds, "converted", "plain")
    folded = fold(converted)
    del converted, seconds
    seconds = in_turns(
        {"plain": inference(plain, images), "folded": inference(folded, images)},
        repeats,
        clock,
        f"{name} inference",
        warm_up=2,
        inner=inner,
    )
    report = conversion_report(folded)
    return {
        "model": name,
        "size": size,
        "batch": batch,
        "device": str(device),
        "autocast": str(autocast) if autocast else "off",
        "particles": report.particles,
        "branches": report.branches,
        "fold_error": report.fold_error,
        "training step": trained,
        "folded inference": compared(seconds, "folded", "plain"),
    }


def held(kept: Iterable[Any]) -> int:
    """Bytes of all tensors that Python can reach, each storage counted once; ``kept`` keeps what must not be freed."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # by type: asking some lazy objects for their class makes them warn
        if issubclass(type(thing), Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    del kept
    return sum(storages.values())


def conversion(name: str, repeats: int, device: torch.device) -> dict[str, Any]:
    """Time to convert a large model, in forward passes, and the memory that it costs for good."""
    clock = clock_of(device)
    forward_seconds, convert_seconds, lasting = [], [], 0
    for r in range(repeats):
        model = create(name, 224, device).eval()
        forward = inference(model, torch.randn(1, 3, 224, 224, device=device))
        forward()
        for _ in range(3):
            begin = clock()
            forward()
            forward_seconds.append(clock() - begin)
        del forward
        before = held([model])
        begin = clock()
        convert(model)
        convert_seconds.append(clock() - begin)
        lasting = max(lasting, held([model]) - before)
        print(f"\r  convert({name}): {r + 1}/{repeats}", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    forward, seconds = statistics.median(forward_seconds), statistics.median(convert_seconds)
    return {
        "model": name,
        "device": str(device),
        "forward": forward,
        "convert": seconds,
        "forward passes to convert": seconds / forward,
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "lasting_bytes": lasting,
    }


def show(result: dict[str, Any]) -> str:
    """The figures in Markdown."""

    def ratio(row: dict[str, Any]) -> str:
        low, high = row["quartiles"]
        return f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"

    lines = [
        "| model | device | plain step, s | converted / plain, quartiles (bar 1.05) | folded / plain, inference "
        "| fold error |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        plain = row["training step"]["seconds"]["plain"]
        lines.append(
            f"| {row['model']}, {row['batch']} x {row['size']} px | {row['device']} ({row['autocast']}) "
            f"| {plain:.3f} | {ratio(row['training step'])} | {ratio(row['folded inference'])} "
            f"| {row['fold_error']:.0e} |"
        )
    for c in result["conversions"]:
        lines.append(
            f"\nconvert({c['model']}) on {c['device']}: {c['convert']:.2f} s, {c['forward passes to convert']:.1f} "
            f"forward passes (bar 10); {c['lasting_bytes']:,} bytes stay, of {c['weights_bytes']:,} of weights."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="timm names")
    parser.add_argument("--large", default=LARGE, help="the model whose conversion is timed")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, help="threads of the processor; torch's choice by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "convert_overhead.json")
    args = parser.parse_args()
    for name in ("size", "batch", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    settings: list[tuple[torch.device, torch.dtype | None]] = [(torch.device("cpu"), None)]
    if torch.cuda.is_available():
        settings += [(torch.device("cuda"), None), (torch.device("cuda"), torch.bfloat16)]
    else:
        print("no CUDA device: GPU not measured", file=sys.stderr)
    begin = time.perf_counter()
    rows = [
        measure(name, args.size, args.batch, args.repeats, device, autocast)
        for device, autocast in settings
        for name in args.models
    ]
    conversions = [conversion(args.large, max(1, args.repeats // 3), d) for d in dict.fromkeys(d for d, _ in settings)]
    made = provenance(settings[-1][0])
    made["versions"]["timm"] = version("timm")
    result = {
        **made,
        "bars": BARS,
        "gpu_measured": torch.cuda.is_available(),
        "minutes": round((time.perf_counter() - begin) / 60, 1),
        "rows": rows,
        "conversions": conversions,
    }
    print(show(result))
    written(result, args.out)


if __name__ == "__main__":
    main()
