"""A grid of small trainings in one process: a file for each that is done, so that a command can go on."""

from __future__ import annotations

import json
import math
import shlex
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from recipes.errors import BadInput
from recipes.evidence.training import in_segments
from recipes.images.source import Images
from recipes.record import DIGITS, known_device, provenance, write_json

Row = dict[str, Any]


class Job(Protocol):
    """What determines a training beside its data: a frozen dataclass."""

    @property
    def key(self) -> str:
        """A file name."""


def carried_out(
    jobs: Sequence[Any],
    run: Callable[[Any], Row],
    folder: Path,
    title: str,
    only_done: bool = False,
    device: str = "cpu",
) -> list[Row]:
    """The row of each job: its fields, what ``run`` returns, seconds of processor time, device and commit.

    Args:
        jobs: Frozen dataclasses with a ``key``, in the order in which they are made.
        run: Called for those that have no file yet.
        folder: Where the files lie.
        title: Of the progress bar.
        only_done: Make nothing; a job without a file has no row.
        device: What the jobs run on; rows name it, and the commit.
    """
    if only_done:
        paths = [folder / f"{job.key}.json" for job in jobs]
        return [json.loads(path.read_text()) for path in paths if path.is_file()]
    rows, whence = [], provenance(torch.device(device))
    made = {key: whence[key] for key in ("device", "commit")}
    for job in (bar := tqdm(jobs, desc=title, unit="run")):
        bar.set_postfix_str(job.key)
        path = folder / f"{job.key}.json"
        if not path.is_file():
            begin = time.process_time()
            row = asdict(job) | run(job) | made
            write_json(path, _flat(row | {"seconds": time.process_time() - begin}))
        rows.append(json.loads(path.read_text()))
    return rows


def _flat(value: Any) -> Any:
    """JSON has no infinities: a loss that is none is null."""
    if isinstance(value, dict):
        return {k: _flat(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_flat(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def descend(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[tuple[Tensor, Tensor]], bfloat16: bool = False
) -> Row:
    """Train on all ``batches``: ``loss``, the mean of the last tenth (``None`` if it diverged), and ``curve``."""
    losses: list[float] = []
    for x, y in batches:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return {"loss": None, "curve": []}
        loss.backward()
        optimizer.step()
    curve = in_segments(losses)
    return {"loss": curve[-1], "curve": curve}


def prepared(images: Images, side: int) -> Tensor:
    """All images averaged to ``side`` pixels, standardised as a whole; shape ``(N, C, side, side)``."""
    x = F.adaptive_avg_pool2d(images.pixels.float() / 255, side)
    return (x - x.mean()) / x.std()


def drawn(x: Tensor, y: Tensor, batch: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` batches in passes over the data, always the same for a seed."""
    draws = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(y), generator=draws)
        chosen, order = order[:batch].to(y.device), order[batch:]
        yield x[chosen], y[chosen]


def options(parser: ArgumentParser, name: str) -> Namespace:
    """The command line, with what every such script takes."""
    parser.add_argument("--data", default="cifar10", help="cifar10, or folder:PATH")
    parser.add_argument("--label", help="how results name the data")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision keeps what it downloads")
    parser.add_argument("--kept", type=Path, default=Path("runs") / name, help="folder of what is done")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="cpu", type=known_device, help="cpu, or cuda")
    parser.add_argument("--only-done", action="store_true", help="make nothing: tell what is in --kept")
    return parser.parse_args()


def command(script: str, args: Namespace, label: str) -> str:
    """The command that ``args`` came from, without paths of a machine."""
    words = ["python", f"recipes/evidence/{script}.py"]
    words += ["--data", args.data.partition(":")[0] + ":DATA" * (":" in args.data), "--label", label]
    for option, value in vars(args).items():
        if option not in ("data", "label", "root", "kept", "out", "only_done", "device"):
            words += [f"--{option.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def document(rows: Sequence[Row], due: int, script: str, args: Namespace, label: str) -> Row:
    """What a result file holds; ``due`` is the number of runs of the whole grid."""
    made = {"command": command(script, args, label), "data": label, "settings": _settings(args), "due": due}
    return {**made, **provenance(torch.device(args.device)), "rows": list(rows)}


def _settings(args: Namespace) -> Row:
    # No path of a machine; the device is named elsewhere.
    places = {"data", "label", "root", "kept", "out", "only_done", "device"}
    return {k: v for k, v in vars(args).items() if k not in places}


def made_by(found: Row) -> str:
    """The last line of a report."""
    hours, done = sum(r["seconds"] for r in found["rows"]) / 3600, len(found["rows"])
    count = f"all {done} runs" if done == found["due"] else f"{done} of {found['due']} runs so far"
    return (
        f"Made by `{found['command']}`: {count}, {hours:.1f} hours of processor time; {_of(found, 'device')}, "
        f"one thread, torch {found['versions']['torch']}, commit {_of(found, 'commit')}.\n"
    )


def _of(found: Row, key: str) -> str:
    """Where the runs were made, or their commits; older rows do not say."""
    return " and ".join(dict.fromkeys(str(r.get(key) or found[key]) for r in found["rows"]))


def written(found: Row, name: str, report: Callable[[Row], str], draw: Callable[[Path, Row], None], out: Path) -> None:
    """``name``.json, .md and .png.

    Raises:
        BadInput: There is no run to tell of; nothing is written.
    """
    if not found["rows"]:
        raise BadInput("--only-done: no run of this grid lies in --kept; leave --only-done out to make them")
    write_json(out / f"{name}.json", found, DIGITS)
    text = report(json.loads((out / f"{name}.json").read_text()))
    (out / f"{name}.md").write_text(text)
    draw(out / f"{name}.png", found)
    print(text)
