#!/usr/bin/env python3
"""Every GPU figure of the recipes in one run of less than ten minutes, as JSON and as a table.

    bash benchmarks/gpu.sh --data cifar10            (or: python benchmarks/gpu.py --data folder:PATH)
    python benchmarks/gpu.py --device cpu --tiny     a rehearsal of the script at toy size: no figure of it means much

Without ``--data`` the steps are timed on random pixels, whose speed is the same, and what starts the recipes is left
out. A part that fails is recorded with its reason, and the next one goes on; what was not measured is shown as such.
Without CUDA the script says so, ends with exit code 2 and writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout's packages are found beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks.birth_death import training_step as births_step
from benchmarks.loader import epoch, loaders
from benchmarks.timing import clock_of, compared, in_turns, table, training_step, written
from recipes.errors import BadInput, leave, one_line
from recipes.images.source import Images
from recipes.images.sources import open_source
from recipes.record import provenance
from torch_meanfield import MeanFieldResNet

ROOT = Path(__file__).resolve().parent.parent
Found = dict[str, tuple[float, dict[str, Any]]]  # value and detail by figure

FIGURES = {
    "epoch": ("ResNet-20, batch 128, bf16: an epoch of 50,000 images, seconds", "at most", 3.0),
    "eager": ("mean-field / vanilla, a training step, eager", "at most", 1.02),
    "compiled": ("mean-field / vanilla, a training step, compiled", "at most", 1.02),
    "memory": ("mean-field / vanilla, peak memory of training", "at most", 1.01),
    "loader": ("resident loader / DataLoader with 2 workers, end to end", "at least", 5.0),
    "table": ("recipes/table.py, runs in an hour: 3 at once / one at a time", "at least", 1.5),
    "lightning": ("the recipe / a bare loop, an epoch", "at most", 1.03),
    "births": ("BirthDeathOptimizer / bare, a training step of ResNet-56", "at most", 1.02),
}


class NotMeasured(Exception):
    """A figure that cannot be had here, and why."""


@dataclass
class Setting:
    """What the parts measure, and at which size.

    Attributes:
        device: CUDA, or the CPU in a rehearsal.
        tiny: Whether this is a rehearsal.
        images: Images of the training split, on the CPU; random pixels if ``data`` is ``None``.
        data: What ``--data`` is for the recipes.
        ends: When the time is up, on ``time.monotonic``.
    """

    device: torch.device
    tiny: bool
    images: Images
    data: str | None
    ends: float

    def __post_init__(self) -> None:
        self.depth, self.batch = (8, 16) if self.tiny else (20, 128)
        self.repeats, self.inner = (2, 2) if self.tiny else (15, 20)
        self.autocast = torch.bfloat16
        self.clock = clock_of(self.device)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.ends - time.monotonic()

    def network(self, learn_tau: bool = True, compiled: bool = False, channels_last: bool = False) -> nn.Module:
        """The network, the same weights each time."""
        torch.manual_seed(0)
        model = MeanFieldResNet(self.depth, in_chans=self.images.pixels.shape[1], learn_tau=learn_tau).to(self.device)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        if compiled:
            # Static shapes: the smaller last batch of an epoch gets a graph of its own. Toy: no code is generated.
            model.compile(dynamic=False, backend="aot_eager" if self.tiny else "inductor")
        return model

    def run(self, *command: str) -> str:
        """Run a script of this checkout with this Python, and return what it prints.

        Raises:
            NotMeasured: It ended with an error, or the time was up.
        """
        # In a session of its own, so that the trainings which a script has started end with it.
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        allowed = max(1.0, self.left)
        try:
            out, err = process.communicate(timeout=allowed)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise NotMeasured(f"{command[0]} took more than the {allowed:.0f} s that were left") from error
        if process.returncode:
            said = (err.strip() or out.strip() or "nothing").splitlines()[-1]
            raise NotMeasured(f"{command[0]} ended with exit code {process.returncode}: {said}")
        return out

    def named(self) -> str:
        """``data``, for a part that starts the recipes.

        Raises:
            NotMeasured: There is none.
        """
        if self.data is None:
            raise NotMeasured("starts the recipes, which need --data")
        return self.data


def epochs(s: Setting) -> Found:
    """Seconds for all images: loader, forward, backward, optimizer. The fastest of the recipe's options counts."""
    ways: dict[str, dict[str, bool]] = {
        "eager": {},
        "eager, channels_last": {"channels_last": True},
        "compiled, channels_last": {"compiled": True, "channels_last": True},
    }
    seconds = {}
    for way, options in ways.items():
        ours, _ = loaders(s.images, True, s.batch, s.device, 0)
        run = epoch(ours, s.device, training_step(s.network(**options), s.autocast))
        run()  # compiles, and lets the device choose its kernels
        spent = []
        for _ in range(3):
            begin = s.clock()
            run()
            spent.append(s.clock() - begin)
        seconds[way] = statistics.median(spent)
    fastest = min(seconds, key=lambda way: seconds[way])
    return {"epoch": (seconds[fastest], {"images": len(s.images), "fastest": fastest, "seconds": seconds})}


def steps(s: Setting, name: str) -> Found:
    """A training step of the twins in turns."""
    images = torch.randn(s.batch, *s.images.pixels.shape[1:], device=s.device)
    labels = torch.randint(10, (s.batch,), device=s.device)
    contenders = {}
    for twin, learn_tau in (("vanilla", False), ("mean-field", True)):
        step = training_step(s.network(learn_tau, name == "compiled"), s.autocast)
        contenders[twin] = partial(_several, partial(step, images, labels), s.inner)
    result = compared(in_turns(contenders, s.repeats, s.clock, f"steps, {name}", 2), "mean-field", "vanilla")
    return {name: (result["ratio"], result)}


def _several(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


def memory(s: Setting) -> Found:
    """The most memory that training takes, weights and optimizer included."""
    if s.device.type != "cuda":
        raise NotMeasured("peak memory is counted on CUDA alone")
    peaks = {}
    for twin, learn_tau in (("vanilla", False), ("mean-field", True)):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(s.device)
        images = torch.randn(s.batch, *s.images.pixels.shape[1:], device=s.device)
        step = training_step(s.network(learn_tau), s.autocast)
        torch.cuda.reset_peak_memory_stats(s.device)
        for _ in range(3):
            step(images, torch.zeros(s.batch, dtype=torch.int64, device=s.device))
        peaks[twin] = torch.cuda.max_memory_allocated(s.device) - before
        del step, images
    return {"memory": (peaks["mean-field"] / peaks["vanilla"], {"bytes": peaks})}


def end_to_end(s: Setting) -> Found:
    """Epochs of training from both loaders in turns, the network compiled so that the loader shows."""
    ours, theirs = loaders(s.images, True, s.batch, s.device, 2)
    step = training_step(s.network(compiled=True, channels_last=True), s.autocast)
    contenders = {"DataLoader": epoch(theirs, s.device, step), "resident": epoch(ours, s.device, step)}
    clock = clock_of(s.device, processor=False)
    result = compared(in_turns(contenders, 2 if s.tiny else 3, clock, "loaders"), "DataLoader", "resident")
    return {"loader": (result["ratio"], result)}


def concurrent(s: Setting) -> Found:
    """The wall time of the table, start of the processes and decoding included: what its user waits for."""
    data, rate, seconds = s.named(), {}, {}
    toy = ["--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "2"]
    more = toy if s.tiny else ["--trainer.precision", "bf16-mixed"]
    for at_once, seeds in ((1, 1), (3, 1 if s.tiny else 3)):
        with tempfile.TemporaryDirectory() as out:
            begin = time.perf_counter()
            s.run(
                *("recipes/table.py", "--rows", "resnet20", "--data", data, "--label", "timing", "--out", out),
                *("--seeds", str(seeds), "--jobs", str(at_once), "--epochs", "1" if s.tiny else "5", "--", *more),
            )
            seconds[f"{2 * seeds} runs, {at_once} at once"] = time.perf_counter() - begin
            rate[at_once] = 2 * seeds / (time.perf_counter() - begin)
    return {
        "table": (rate[3] / rate[1], {"seconds": seconds, "runs in an hour": {k: 3600 * r for k, r in rate.items()}})
    }


def recipe(s: Setting) -> Found:
    """See ``benchmarks/lightning_overhead.py``."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        size = ["--depth", str(s.depth), "--batches", "2", "--repeats", "1"] if s.tiny else ["--repeats", "4"]
        script = "benchmarks/lightning_overhead.py"
        s.run(script, "--data", s.named(), "--device", s.device.type, "--out", str(out), *size)
        result = json.loads(out.read_text())
    return {"lightning": (result["ratio"], {k: result[k] for k in ("seconds", "quartiles", "repeats", "batches")})}


def births(s: Setting) -> Found:
    """See ``benchmarks/birth_death.py``."""
    make = partial(MeanFieldResNet, 8 if s.tiny else 56, learn_tau=False)
    result = births_step(make, 4 if s.tiny else 128, 1 if s.tiny else 40, s.device)
    return {"births": (result["ratio"], result)}


PARTS: dict[str, tuple[tuple[str, ...], Callable[[Setting], Found]]] = {
    "epochs": (("epoch",), epochs),
    "steps": (("eager",), partial(steps, name="eager")),
    "compiled": (("compiled",), partial(steps, name="compiled")),
    "memory": (("memory",), memory),
    "loader": (("loader",), end_to_end),
    "table": (("table",), concurrent),
    "lightning": (("lightning",), recipe),
    "births": (("births",), births),
}


def measured(setting: Setting, parts: list[str]) -> dict[str, dict[str, Any]]:
    """Every figure with its bar, and its value or the reason why there is none."""
    out = {
        key: {"figure": figure, "bar": bar, "bar_is": kind, "value": None, "reason": "left out by --parts"}
        for key, (figure, kind, bar) in FIGURES.items()
    }
    for part in parts:
        keys, run = PARTS[part]
        begin = time.perf_counter()
        found: Found = {}
        try:
            if setting.left <= 0:
                raise NotMeasured("the time was up")
            found, reason = run(setting), None
        except NotMeasured as error:
            reason = str(error)
        except Exception as error:  # whatever breaks one part, the others are worth having
            reason = f"failed: {type(error).__name__}: {one_line(error)[:300]}"
        for key in keys:
            value, detail = found.get(key, (None, {}))
            out[key] |= {"value": value, "reason": reason, "detail": detail}
            out[key]["seconds_taken"] = round(time.perf_counter() - begin, 1)
            print(f"{out[key]['figure']}: {f'{value:.3f}' if value is not None else reason}", file=sys.stderr)
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return out


def rendered(result: dict[str, Any]) -> str:
    """The figures in Markdown."""
    rows = []
    for f in result["figures"].values():
        value, limit, held = f["value"], f["bar"], "–"
        if value is not None and not result["rehearsal"]:
            held = "yes" if (value <= limit if f["bar_is"] == "at most" else value >= limit) else "no"
        told = f"not measured: {f['reason']}" if value is None else f"{value:.3f}"
        rows.append((f["figure"], f"{f['bar_is']} {limit:g}", told, held))
    title = "Rehearsal at toy size: these figures say nothing about a GPU.\n\n" if result["rehearsal"] else ""
    made = f"{result['device']}, torch {result['versions']['torch']}, commit {result['commit']}"
    made += f"; images: {result['data'] or 'random pixels'}; {result['minutes']} minutes"
    return f"{title}{table(('figure', 'bar', 'measured', 'held'), rows)}\n\nMade by `benchmarks/gpu.sh` on {made}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="cifar10, folder:PATH, ...; random pixels if left out")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision keeps what it downloads")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a rehearsal at toy size; the only choice for the CPU")
    parser.add_argument("--minutes", type=float, default=9.5, help="parts that would begin later are left out")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/gpu.json (gpu_rehearsal.json if --tiny)")
    args = parser.parse_args()
    begin = time.monotonic()
    try:
        parts = args.parts.split(",")
        unknown = [part for part in parts if part not in PARTS]
        if unknown:
            raise BadInput(f"--parts {','.join(unknown)}: unknown; accepted: {', '.join(PARTS)}")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise BadInput("no CUDA device here, nothing measured; rehearse with --device cpu --tiny")
        if args.device == "cpu" and not args.tiny:
            raise BadInput("--device cpu is for a rehearsal, pass --tiny too")
        images = _images(args)
    except BadInput as error:
        leave("gpu.py", error)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True  # as --trainer.benchmark true: the shapes are always the same
    setting = Setting(device, args.tiny, images, args.data, begin + 60 * args.minutes)
    figures = measured(setting, parts)
    result = {
        **provenance(device),
        "rehearsal": args.tiny,
        "data": args.data,
        "figures": figures,
        "minutes": round((time.monotonic() - begin) / 60, 1),
    }
    out = args.out or Path(__file__).parent / "results" / f"gpu{'_rehearsal' if args.tiny else ''}.json"
    text = rendered(result)
    print(text)
    written(result, out)
    out.with_suffix(".md").write_text(text)


def _images(args: argparse.Namespace) -> Images:
    """The training images, or as many random ones.

    Raises:
        BadInput: A data set that cannot be read.
    """
    n, side = (64, 8) if args.tiny else (50_000, 32)
    if args.data is None:
        pixels = torch.randint(
            0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        return Images(pixels, torch.arange(n) % 10)
    source = open_source(args.data, args.root)
    source.download()
    images = source.decode("train")
    return images.select(torch.arange(n) % len(images))  # a smaller data set over and over: an epoch is of n images


if __name__ == "__main__":
    main()
