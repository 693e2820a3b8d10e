"""One benchmark: every method on every setting and seed, none done twice, one table and one picture."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from recipes.errors import BadInput, leave
from recipes.images.source import Images
from recipes.images.sources import open_source
from recipes.plasticity.dqn import balance
from recipes.plasticity.settings import SETTINGS, Setting
from recipes.plasticity.streams import STREAMS, Stream, inputs
from recipes.plasticity.training import METHODS, OURS, Run, installed, train
from recipes.record import DIGITS, provenance, write_json

MADE = {"regression": "bits", "cartpole": "CartPole"}  # streams that need no images


def table(runs: Sequence[Run], name: str) -> str:
    """A markdown table: for each setting and method the mean score with its 95 % interval, and each seed's."""
    seeds = sorted({r.seed for r in runs})
    lines = [
        f"| {name} | method | mean | 95 % | silent units | units born | {' | '.join(f'seed {s}' for s in seeds)} |",
        f"| --- | --- | ---: | ---: | ---: | ---: |{' ---: |' * len(seeds)}",
    ]
    for setting in dict.fromkeys(r.setting for r in runs):
        groups = {m: [r for r in runs if (r.setting, r.method) == (setting, m)] for m in METHODS}
        best = max(statistics.mean(r.score for r in g) for g in groups.values() if g)
        for method, group in groups.items():
            if not group:
                continue
            of = {r.seed: figure(r.score) for r in group}
            mean = statistics.mean(r.score for r in group)
            shown = f"**{figure(mean)}**" if mean == best else figure(mean)
            silent = statistics.mean(r.silent for r in group)
            born = f"{statistics.mean(r.births for r in group):.0f}" if method in OURS else ""
            lines.append(
                f"| {setting} | {method} | {shown} | {_interval([r.score for r in group])} | {silent:.0%} | "
                f"{born} | {' | '.join(of.get(s, '') for s in seeds)} |"
            )
    return "\n".join(lines) + "\n"


def commits(runs: Sequence[Run]) -> str:
    """Which methods were run at which commit, where it was not one for all."""
    return _told("Runs of commit", runs, lambda r: str(r.commit))


def devices(runs: Sequence[Run]) -> str:
    """Which methods were run on which device, where it was not one for all."""
    return _told("Runs on", runs, lambda r: r.device or "a device that was not written down")


def _told(words: str, runs: Sequence[Run], of: Callable[[Run], str]) -> str:
    """The methods of each value of ``of``; a method that has several of them is told by setting."""
    values: dict[str, set[str]] = {}
    for r in runs:
        values.setdefault(r.method, set()).add(of(r))
    groups: dict[str, dict[str, None]] = {}
    for r in runs:
        groups.setdefault(of(r), {})[r.method if len(values[r.method]) == 1 else f"{r.method} ({r.setting})"] = None
    if len(groups) < 2:
        return ""
    joint = f"; {words.split()[1]} "
    return f"{words} " + joint.join(f"{value}: {', '.join(methods)}" for value, methods in groups.items()) + ".\n"


def _interval(values: Sequence[float]) -> str:
    """Half the width of Student's 95 % interval of the mean."""
    quantile = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
    n = len(values)
    if n not in quantile:
        return "" if n < 2 else f"± {figure(1.96 * statistics.stdev(values) / math.sqrt(n))}"
    return f"± {figure(quantile[n] * statistics.stdev(values) / math.sqrt(n))}"


def figure(value: float) -> str:
    """Three decimals of an accuracy, one of a return."""
    return f"{value:.1f}" if abs(value) >= 2 else f"{value:.3f}"


def draw(runs: Sequence[Run], path: Path, ylabel: str) -> None:
    """The score over tasks: a panel for each setting, a line for each method, the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = list(dict.fromkeys(r.setting for r in runs))
    figure, axes = plt.subplots(1, len(settings), figsize=(4.6 * len(settings), 3.8), squeeze=False, sharey=True)
    for axis, setting in zip(axes[0], settings, strict=True):
        for method in METHODS:
            curves = [r.curve for r in runs if (r.setting, r.method) == (setting, method)]
            if curves:
                mean = [statistics.mean(at) for at in zip(*curves, strict=True)]
                wide = 2.4 if method == "library, plastic" else 1.2
                axis.plot(range(1, len(mean) + 1), mean, linewidth=wide, label=method)
        axis.set(title=setting, xlabel="task")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(ylabel)
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments(
    name: str, description: str | None, settings: Sequence[str], methods: Sequence[str] = METHODS
) -> Namespace:
    """The command line of a benchmark."""
    parser = ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--data", default="fashion-mnist", help="digits, fashion-mnist, cifar10, or folder:PATH")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision keeps what it downloads")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103, 104, 105])
    here = [m for m in methods if installed(m)]
    parser.add_argument("--methods", nargs="+", default=here, choices=methods, metavar="METHOD")
    parser.add_argument("--settings", nargs="+", default=list(settings), choices=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--tasks", type=int, help="fewer tasks than the benchmark has, to try it out")
    parser.add_argument("--weights", type=Path, help="state dict that a timm backbone begins from")
    parser.add_argument(
        "--from-results",
        type=Path,
        nargs="?",
        const=Path("benchmarks/results"),
        metavar="FOLDER",
        help="take the runs that a result file in this folder has (default: benchmarks/results), make only the others",
    )
    parser.add_argument("--done", action="store_true", help="run nothing: the table of what is there")
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="folder of runs, table and picture")
    return parser.parse_args()


def study(name: str, stream: Stream, args: Namespace, ylabel: str) -> None:
    """Run what is not there yet, then write ``name``.md, .json and .png to ``args.out``."""
    torch.set_num_threads(1)  # as fast, and the sums come out the same on every machine
    try:
        for absent in (m for m in args.methods if not installed(m)):
            raise BadInput(
                f"--methods {absent!r}: it is not installed; pip install 'torch-meanfield[studies]', or leave it out"
            )
        source, images = _images(stream, args)
        if args.from_results is not None:
            adopt(args.from_results / f"{name}.json", stream, source, args)
    except BadInput as error:
        leave(f"{name}.py", error)
    jobs = [(s, m, seed) for seed in args.seeds for s in args.settings for m in args.methods]
    runs = []
    for setting, method, seed in tqdm(jobs, desc=name, unit="run"):
        path = _path(args, stream, source, setting, method, seed)
        if path.is_file() or not args.done:
            of = replace(SETTINGS[setting], weights=args.weights)
            runs.append(_once(path, stream, of, method, seed, images))
    if not runs:
        leave(f"{name}.py", BadInput(f"--done: nothing of this is in {args.out / 'runs'}; run it first"))
    text = table(runs, name)
    print(text)
    made = {"command": _command(name, args, runs), "data": source, "stream": asdict(stream)}
    write_json(
        args.out / f"{name}.json",
        {**made, **provenance(torch.device("cpu")), "runs": [asdict(r) for r in runs]},
        DIGITS,
    )
    hours = sum(r.seconds for r in runs) / 3600
    text += f"\nMade by `{made['command']}` in {hours:.1f} hours of one thread.\n"
    (args.out / f"{name}.md").write_text(text + commits(runs) + devices(runs))
    draw(runs, args.out / f"{name}.png", ylabel)


def adopt(results: Path, stream: Stream, source: str, args: Namespace) -> None:
    """Write the file of each run in ``results``, the JSON of an earlier table, where it is not there already.

    Raises:
        BadInput: no such file, of other data or weights, or of another stream.
    """
    if not results.is_file():
        raise BadInput(f"--from-results {results.parent}: no {results.name} is there; leave the option out")
    document = json.loads(results.read_text())
    now = {**asdict(stream), "data": source}
    for key, value in {**document["stream"], "data": document["data"]}.items():
        if now[key] != value:
            raise BadInput(f"--from-results: {results.name} has {key} {value!r}, this is {now[key]!r}; give the same")
    if ("--weights" in document["command"]) != (args.weights is not None):
        raise BadInput(
            f"--weights {args.weights}: {results.name} has runs of `{document['command']}`; begin as they do"
        )
    for values in document["runs"]:
        run = Run(**values)
        run.device = run.device or document["device"]
        path = _path(args, stream, source, run.setting, run.method, run.seed)
        if not path.is_file():
            write_json(path, asdict(run))


def _path(args: Namespace, stream: Stream, source: str, setting: str, method: str, seed: int) -> Path:
    """Where a run is kept."""
    begun = () if args.weights is None else (args.weights.stem,)
    key = "-".join((stream.kind, setting, *begun, method, str(seed), source, str(stream.tasks)))
    return args.out / "runs" / f"{key.replace(' ', '_').replace(',', '')}.json"


def _command(name: str, args: Namespace, runs: Sequence[Run]) -> str:
    """What makes these runs, and no others."""
    methods = [m for m in METHODS if any(r.method == m for r in runs)]
    options = ["--settings", *dict.fromkeys(r.setting for r in runs), "--methods", *methods]
    options += ["--seeds", *(str(s) for s in sorted({r.seed for r in runs}))]
    options += [] if args.tasks is None else ["--tasks", str(args.tasks)]
    options += [] if args.weights is None else ["--weights", args.weights.name]
    return shlex.join(["python", f"recipes/plasticity/{name}.py", "--data", args.data, *options])


def main(
    name: str, description: str | None, settings: Sequence[str], ylabel: str, methods: Sequence[str] = METHODS
) -> None:
    """The script of the benchmark ``name``, see :data:`.STREAMS`."""
    args, stream = arguments("plasticity", description, settings, methods), STREAMS[name]
    study(name, replace(stream, tasks=args.tasks or stream.tasks), args, ylabel)


def _images(stream: Stream, args: Namespace) -> tuple[str, Images | None]:
    """The name of the data, and all that is trained on; ``None`` where the stream makes its own."""
    if stream.kind in MADE:
        return MADE[stream.kind], None
    source = open_source(args.data, args.root, 32)
    source.download()
    return source.name, source.decode("train")


def _once(path: Path, stream: Stream, setting: Setting, method: str, seed: int, images: Images | None) -> Run:
    if path.is_file():
        return Run(**json.loads(path.read_text()))
    data = None if images is None else (inputs(images, setting.standardised, stream.side), images.labels)
    run = (balance if stream.kind == "cartpole" else train)(stream, setting, method, seed, data)
    made = provenance(torch.device("cpu"))
    run.commit, run.device = made["commit"], made["device"]
    write_json(path, asdict(run))
    return run
