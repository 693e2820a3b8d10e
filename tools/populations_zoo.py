"""Populations of the smallest model of each timm model file: rows of ``benchmarks/results/populations_zoo.csv``.

    python tools/populations_zoo.py                     # what the table lacks
    python tools/populations_zoo.py --only beit resnet  # these files again
    python tools/populations_zoo.py --literally         # and confirm each population by a permutation of its own

Each model runs in a child process on one core with a time limit. ``seconds`` is the processor time of
``find_populations`` on the smallest input that the model takes, proof included; constructing the model is not.
``confirmed`` counts the populations that ``verify`` proves again, with other random numbers and one forward for each.
"""

from __future__ import annotations

import argparse
import collections
import csv
import multiprocessing
import time
import warnings
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "populations_zoo.csv"
FIELDS = ("file", "model", "input", "populations", "units", "patterns", "refused", "reasons", "seconds", "confirmed")
# In the order they are tried: 64 is four patches of 16 a side, and 56 four of 14.
SIZES = (64, 56, 96, 112, 128, 160, 192, 224, 256)


def smallest_models() -> dict[str, str]:
    """For each timm model file the model with the fewest parameters, counted on the meta device."""
    import timm
    import torch

    smallest = {}
    for file in timm.list_modules():
        counts = {}
        for name in timm.list_models(module=file):  # without deprecated names, some of which build nothing any more
            with torch.device("meta"):
                model = timm.create_model(name)
            if type(model).__module__.startswith("timm."):  # not those that this package registers
                counts[name] = sum(p.numel() for p in model.parameters())
        if counts:
            smallest[file] = min(counts, key=lambda n: counts[n])
    return smallest


def on_smallest_input(name: str) -> tuple[Any, Any]:
    """The model, made for the smallest square input it takes, and such an input."""
    import timm
    import torch

    default = timm.create_model(name).eval()
    channels, height, width = default.default_cfg["input_size"]
    for size in (s for s in SIZES if s < height):
        for arguments in ({"img_size": size}, {}):
            try:
                model = timm.create_model(name, **arguments).eval() if arguments else default
                example = torch.randn(1, channels, size, size)
                with torch.no_grad():
                    model(example)
                return model, example
            except Exception:
                continue
    return default, torch.randn(1, channels, height, width)


def pattern(population: Any, names: dict[int, str]) -> str:
    """A short word for what kind of units these are."""
    columns = population.slices(population.columns)
    incoming, outgoing, own = population.incoming, population.outgoing, population.own
    if any(c.inner > 1 for c in columns):
        blocks = [c for c in own if c.tensor.ndim > 2 and c.inner > 1]
        return "groups" if blocks else "heads"
    if any(c.outer > 1 for c in columns):
        return "packed"
    if any(c.tensor.ndim > 2 and c.tensor.shape[1] == 1 for c in own):
        return "depthwise"
    if len([c for c in incoming if c.tensor.ndim > 1]) > 1:
        return "gated" if all(c.tensor.ndim == 2 for c in incoming if c.tensor.ndim > 1) else "joined"
    if any(c.tensor.ndim > 2 for c in (*incoming, *outgoing)):
        return "conv"
    return "mlp"


def examine(name: str, literally: bool) -> dict[str, Any]:
    """One row, without the file."""
    import torch

    from torch_meanfield.width.search.find import find_populations
    from torch_meanfield.width.search.proof import verify

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, example = on_smallest_input(name)
    start = time.process_time()
    report = find_populations(model, example)
    seconds = time.process_time() - start
    names = {id(t): n for n, t in model.named_parameters()}
    patterns = collections.Counter(pattern(p, names) for p in report.populations)
    reasons = collections.Counter(r.reason.split(" by ")[0] for r in report.refused)
    return {
        "model": name,
        "input": "x".join(map(str, example.shape[1:])),
        "populations": len(report.populations),
        "units": sum(p.size for p in report.populations),
        "patterns": "; ".join(f"{n} {k}" for k, n in patterns.most_common()),
        "refused": len(report.refused),
        "reasons": "; ".join(f"{n} {k}" for k, n in reasons.most_common()),
        "seconds": f"{seconds:.1f}",
        "confirmed": sum(v.proven for v in verify(model, example, report.populations, seed=1)) if literally else "",
    }


def in_child(name: str, limit: float, literally: bool) -> dict[str, Any]:
    """:func:`examine` in a process of its own; a crash or time-out becomes a row with the reason."""
    context = multiprocessing.get_context("fork")  # timm is imported once, by the parent
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, name, literally))
    child.start()
    sender.close()
    row: dict[str, Any] = {"model": name, "populations": 0}
    try:
        if receiver.poll(limit):
            row = receiver.recv()
        else:
            row["reasons"] = f"took longer than {limit:.0f} s"
    except EOFError:
        row["reasons"] = "the process died"
    child.kill()
    child.join()
    return row


def _send(sender: Any, name: str, literally: bool) -> None:
    try:
        sender.send(examine(name, literally))
    except Exception as error:
        sender.send({"model": name, "populations": 0, "reasons": f"{type(error).__name__}: {error}"[:200]})


def write(rows: dict[str, dict[str, Any]]) -> None:
    """The table, sorted by file."""
    with RESULTS.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        writer.writeheader()
        writer.writerows(rows[f] for f in sorted(rows))


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="FILE", help="these timm model files, even if they have a row")
    parser.add_argument("--failed", action="store_true", help="again those without a population")
    parser.add_argument("--literally", action="store_true", help="confirm each population with verify(); not timed")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one model, construction included")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    import timm  # noqa: F401  (before the children are forked)

    import torch_meanfield.width.search.find  # noqa: F401

    rows: dict[str, dict[str, Any]] = {}
    if RESULTS.exists():
        with RESULTS.open() as stream:
            rows = {row["file"]: row for row in csv.DictReader(stream)}
    else:
        rows = {file: {"file": file, "model": name} for file, name in smallest_models().items()}
        write(rows)
    for file, row in rows.items():
        wanted = file in options.only if options.only else not row.get("populations")
        if not wanted and not (options.failed and row.get("populations") == "0"):
            continue
        rows[file] = {"file": file, **in_child(row["model"], options.limit, options.literally)}
        print(*(f"{k}={v}" for k, v in rows[file].items()), flush=True)
        write(rows)
    proven = sum(int(r.get("populations") or 0) > 0 for r in rows.values())
    slow = [f for f, r in rows.items() if r.get("seconds") and float(r["seconds"]) > 5]
    print(f"{proven} of {len(rows)} model files with a proven population; {len(slow)} took more than 5 s: {slow}")


if __name__ == "__main__":
    main()
