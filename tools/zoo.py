"""Convert every model of timm, or of torchvision: one row of ``benchmarks/results/zoo.csv`` for each.

    python tools/zoo.py                             # what the table lacks; stops and resumes at any time
    python tools/zoo.py --only test_vit resnet18    # these names again
    python tools/zoo.py --library torchvision       # benchmarks/results/zoo_torchvision.csv
    python tools/zoo.py --cut --only test_vit       # cut blocks of these, fold, load into fewer

Every name is converted on the meta device, by structure, at its configured input size. Of each model file the smallest
that converts is then converted with real weights, and checked: ``eval()`` and ``train()`` outputs and the gradients of
the old parameters are bit for bit what they were; an optimizer step that makes two particles pass re-sorts weights and
momentum; random steps in 0.5 to 1.5, folded and loaded into a fresh plain model with ``strict=True``, give the same
outputs to 1e-4 in float32 and 1e-10 in float64.

Verdict ``on request``: nothing in it can be folded, so it converts with ``foldable=False`` alone, and ``fold`` must
refuse it. Columns: ``branches`` are those of the converted blocks, ``unfoldable`` those of residual blocks that stay
because no parameter takes their step; ``checked`` is ``passed``, what failed, or empty (structure only); ``cut``,
filled by ``--cut``, is what makes the network that is left when a third of the blocks is cut (``tools/zoo_cut.py``).
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
FIELDS = (
    "name", "file", "parameters", "verdict", "stages", "particles", "branches", "foldable", "unfoldable",
    "fixed_blocks", "reason", "seconds", "input", "checked", "cut",
)  # fmt: skip
Row = dict[str, Any]


# -- one model -------------------------------------------------------------------------------------------------------


def structure(build: Callable[[], Any], shape: tuple[int, ...] | None) -> Row:
    """Convert on the meta device, by structure alone."""
    import torch

    from torch_meanfield import conversion_report

    start = time.process_time()
    model = on_meta(build)
    example = None if shape is None else torch.empty(shape, device="meta")
    with torch.device("meta"):  # some models make tensors in forward
        refused = attempt(model, example)
    row = summary(conversion_report(model)) if refused is None else refused
    count = sum(p.numel() for n, p in model.named_parameters() if ".tau_axis." not in f".{n}")
    return row | {"parameters": count, "seconds": f"{time.process_time() - start:.1f}"}


def on_meta(build: Callable[[], Any]) -> Any:
    """The model without memory for its weights."""
    import torch

    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):  # computes its widths, or in older timm its rates, with tensors
        return build().to("meta")


def attempt(model: Any, example: Any) -> Row | None:
    """Convert ``model``; where nothing in it can be folded, with ``foldable=False``. The row of a refusal, or none."""
    from torch_meanfield import convert

    try:
        convert(model, example)
    except ValueError as error:
        head, _, reasons = str(error).partition("\n")
        first = reasons.strip().splitlines()[0].strip() if reasons else head
        try:
            convert(model, example, foldable=False)
        except ValueError:
            return {"verdict": "refused", "reason": first}
    return None


def summary(report: Any) -> Row:
    """The columns that a report gives."""
    unfoldable = [f for f in report.fixed if not f.foldable]
    foldable = sum(s.branches * len(s.particles) for s in report.stages if s.foldable)
    return {
        "verdict": "converted" if all(s.foldable for s in report.stages) else "on request",
        "stages": len(report.stages),
        "particles": report.particles,
        "branches": report.branches,
        "foldable": foldable,
        "unfoldable": report.branches - foldable + sum(f.branches for f in unfoldable),
        "fixed_blocks": len(report.fixed),
        "reason": unfoldable[0].reason if unfoldable else "",
    }


def numbers(build: Callable[..., Any], shapes: Sequence[tuple[int, ...]]) -> Row:
    """Convert with weights, on the smallest input that the model takes, and check everything."""
    import torch

    from torch_meanfield import conversion_report

    torch.manual_seed(0)
    model, examples, arguments = on_smallest_input(build, shapes)
    loosen_(model)
    start = time.process_time()
    plain = copy.deepcopy(model)
    refused = attempt(model, examples[:1])
    if refused is not None:
        return {**refused, "input": shape_of(examples), "checked": "refused"}
    seconds = time.process_time() - start
    row = summary(conversion_report(model))
    failures = list(check(model, plain, examples, lambda: build(**arguments)))
    twin = on_meta(lambda: build(**arguments))
    with torch.device("meta"):
        attempt(twin, torch.empty(examples[:1].shape))
    if [s.particles for s in conversion_report(twin)] != [s.particles for s in conversion_report(model)]:
        failures.append("by structure alone other blocks are converted")
    return row | {
        "seconds": f"{seconds:.1f}", "input": shape_of(examples), "checked": "; ".join(failures) or "passed"
    }  # fmt: skip


def shape_of(examples: Any) -> str:
    """Such as ``3x64x64``."""
    return "x".join(map(str, examples.shape[1:]))


def on_smallest_input(build: Callable[..., Any], shapes: Sequence[tuple[int, ...]]) -> tuple[Any, Any, dict[str, int]]:
    """The model made for the smallest of ``shapes`` it takes, two such inputs, and the arguments it was made with."""
    import torch

    default = build().eval()
    for shape in shapes:
        for arguments in ({"img_size": shape[-1]}, {}):
            try:
                model = build(**arguments).eval() if arguments else default
                examples = torch.randn(2, *shape)
                with torch.no_grad():
                    model(examples[:1])
                    copy.deepcopy(model).train()(examples)
                return model, examples, arguments
            except Exception:
                continue
    return default, torch.randn(2, *shapes[-1]), {}


def loosen_(model: Any) -> None:
    """Replace constant initial values (gains of 1 or 0, layer scales of 1e-6), which hide branches, by random ones."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.copy_(torch.rand_like(parameter) + 0.5 if parameter.ndim < 2 else parameter)
            elif parameter.numel() == 1:
                parameter.fill_(0.7)


def check(model: Any, plain: Any, examples: Any, build: Callable[[], Any]) -> Iterator[str]:
    """Everything that fails, in words.

    Args:
        model: Converted; it is changed.
        plain: What it was before.
        examples: Two inputs.
        build: Makes a fresh plain model.
    """
    import torch

    from torch_meanfield import conversion_report, fold

    for mode in ("eval", "train"):
        outputs = []
        for m in (model, plain):
            m.train(mode == "train")
            m.zero_grad()
            torch.manual_seed(1)
            out = flat(m(examples))
            out.square().mean().backward()
            outputs.append(out.detach())
        if not bool(outputs[0].isfinite().all()):
            yield f"{mode} outputs are not finite"
        elif not torch.equal(*outputs):
            yield f"{mode} outputs differ by {relative(*outputs):.0e}"
        theirs = dict(plain.named_parameters())
        for name, p in model.named_parameters():
            if ".tau_axis." not in name and not same(p.grad, theirs[name].grad):
                yield f"{mode} gradient of {name} differs"
                break
    for stage in conversion_report(model):
        yield from resorts(model, stage.module)
    steps = torch.Generator().manual_seed(2)
    for stage in conversion_report(model):
        sizes = torch.rand(len(stage.module), generator=steps) + 0.5
        stage.module.set_tau_(sizes.cumsum(0))
    if not all(stage.foldable for stage in conversion_report(model)):
        try:
            fold(model, examples)
            yield "what cannot be folded was folded"
        except ValueError:
            return
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        # train() between the two clears tables that some models cache in eval()
        model, examples = model.to(dtype).train().eval(), examples.to(dtype)
        fresh = build().to(dtype)
        fresh.load_state_dict(fold(model, examples).state_dict(), strict=True)
        with torch.no_grad():
            try:
                error = relative(flat(model(examples)), flat(fresh.eval()(examples)))
            except RuntimeError as problem:
                if dtype is torch.float64:  # a model that makes float32 tensors of its own
                    yield f"does not run in float64 ({problem})"[:80]
                    continue
                raise
        if not error <= bound:
            yield f"folded in {dtype} it differs by {error:.0e}"


def resorts(model: Any, stage: Any) -> Iterator[str]:
    """Let the first two particles pass each other in one optimizer step: all that they own must change places."""
    import torch

    model.train()
    rest = [p for n, p in model.named_parameters() if p is not stage.tau_axis.offset]
    optimizer = torch.optim.SGD(
        [{"params": rest, "lr": 0.0}, {"params": [stage.tau_axis.offset]}], lr=1.0, momentum=0.9
    )
    for p in model.parameters():
        p.grad = None
    columns = [c for c in stage.population().columns if len(c.tensors) == len(stage)]  # the others are of the axis
    for column in columns:
        for i, t in enumerate(column.tensors):
            if t.requires_grad:
                t.grad = torch.full_like(t, float(i))
    stage.tau_axis.offset.grad = torch.zeros(len(stage))
    stage.tau_axis.offset.grad[0] = -1.5
    before = [[t.detach().clone() for t in column.tensors[:2]] for column in columns]
    optimizer.step()
    for column, (first, second) in zip(columns, before, strict=True):
        here = column.tensors[:2]
        if not (torch.equal(here[0], second) and torch.equal(here[1], first)):
            yield "a re-sort left tensors behind"
            return
        momentum = [optimizer.state[t].get("momentum_buffer") for t in here if t.requires_grad]
        if momentum and not (bool((momentum[0] == 1).all()) and bool((momentum[1] == 0).all())):
            yield "a re-sort left momentum behind"
            return


def flat(output: Any) -> Any:
    """All floating outputs as one vector."""
    import torch

    from torch_meanfield.observe import tensors_in

    return torch.cat([t.reshape(-1) for t in tensors_in(output) if t.is_floating_point()])


def relative(one: Any, other: Any) -> float:
    """Largest difference over largest entry."""
    if one.shape != other.shape:
        return math.inf
    return float((one - other).abs().max() / one.abs().max())


def same(one: Any, other: Any) -> bool:
    """Both absent, or equal bit for bit."""
    import torch

    return one is other or (one is not None and other is not None and torch.equal(one, other))


# -- the zoos --------------------------------------------------------------------------------------------------------


class Timm:
    """``timm.list_models()``."""

    table = RESULTS / "zoo.csv"

    def names(self) -> dict[str, str]:
        """The model file of each name."""
        import timm

        files = {n: timm.models.model_entrypoint(n).__module__ for n in timm.list_models()}
        return {n: file.rpartition(".")[2] for n, file in files.items() if file.startswith("timm.")}

    def build(self, name: str, **arguments: Any) -> Any:
        """The model without pretrained weights."""
        import timm

        return timm.create_model(name, **arguments)

    def structure(self, name: str) -> Row:
        """See :func:`structure`."""
        return structure(lambda: self.build(name), None)

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        """Of one input, the smallest first."""
        import timm

        channels, height, _ = timm.get_pretrained_cfg(name).input_size
        sizes = [s for s in (64, 96, 112, 128, 160, 192, 224, 256) if s < height]
        return [(channels, side, side) for side in (*sizes, height)]

    def numbers(self, name: str) -> Row:
        """See :func:`numbers`."""
        return numbers(lambda **a: self.build(name, **a), self.shapes(name))

    def cut(self, name: str) -> Row:
        """See :func:`tools.zoo_cut.cut`."""
        sys.path.append(str(RESULTS.parents[1]))  # run as a script
        from tools.zoo_cut import cut

        return {"cut": cut(lambda **a: self.build(name, **a), self.shapes(name))}


class Torchvision:
    """torchvision's models that classify images, and those that classify videos."""

    table = RESULTS / "zoo_torchvision.csv"

    def names(self) -> dict[str, str]:
        """The module of each name."""
        import torchvision.models as zoo

        names = [*zoo.list_models(module=zoo), *zoo.list_models(module=zoo.video)]
        return {n: zoo.get_model_builder(n).__module__.partition("models.")[2] for n in names}

    def shape(self, name: str, side: int) -> tuple[int, ...]:
        """Of one input: an image, or a clip of 16."""
        return (3, 16, side, side) if self.names()[name].startswith("video.") else (3, side, side)

    def build(self, name: str, **arguments: Any) -> Any:
        """The model without pretrained weights."""
        import torchvision.models as zoo

        quiet = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return zoo.get_model(name, weights=None, **quiet)

    def structure(self, name: str) -> Row:
        """See :func:`structure`."""
        return structure(lambda: self.build(name), (1, *self.shape(name, 224)))

    def numbers(self, name: str) -> Row:
        """See :func:`numbers`."""
        return numbers(lambda **a: self.build(name), [self.shape(name, side) for side in (64, 96, 128, 224)])


ZOOS: dict[str, Any] = {"timm": Timm(), "torchvision": Torchvision()}


# -- processes -------------------------------------------------------------------------------------------------------


def _work(sender: Connection, library: str, name: str, kind: str) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        sender.send(getattr(ZOOS[library], kind)(name))
    except BaseException as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        sender.send({"verdict": "crashed", "reason": what, "checked": "crashed" if kind == "numbers" else ""})


def run_all(library: str, tasks: list[tuple[str, str]], workers: int, limit: float) -> Iterator[tuple[str, str, Row]]:
    """Each task in a process of its own, ``workers`` at a time; one that dies or takes too long becomes a row."""
    context = multiprocessing.get_context("fork")  # torch and timm are imported once, by the parent
    waiting, running = list(reversed(tasks)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            name, kind = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=_work, args=(sender, library, name, kind))
            child.start()
            sender.close()
            running[receiver] = (name, kind, child, time.monotonic())
        ready = wait(list(running), timeout=1.0)
        for receiver in list(running):
            name, kind, child, since = running[receiver]
            row: Row
            if receiver in ready:
                try:
                    row = receiver.recv()  # type: ignore[union-attr]
                except EOFError:
                    row = {"verdict": "crashed", "reason": "the process died"}
            elif time.monotonic() - since > limit:
                row = {"verdict": "crashed", "reason": f"took longer than {limit:.0f} s"}
            else:
                continue
            del running[receiver]
            child.kill()
            child.join()
            yield name, kind, row


def write(table: Path, rows: dict[str, Row]) -> None:
    """The table, by file and name; replaced as a whole, so that an interrupted run leaves a good one."""
    fresh = table.with_suffix(".tmp")
    with fresh.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows.values(), key=lambda r: (r["file"], r["name"])))
    fresh.replace(table)


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=list(ZOOS), default="timm")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these names, even if they have a row")
    parser.add_argument("--cut", action="store_true", help="fill the column cut alone (timm)")
    parser.add_argument("--again", metavar="TEXT", help="also rows whose verdict, reason or check contains this")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one model")
    parser.add_argument("--table", type=Path, help="where the table is, if not in results/")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch_meanfield  # noqa: F401  (before the children are forked)

    zoo = ZOOS[options.library]
    table = options.table or zoo.table
    rows: dict[str, Row] = {}
    if table.exists():
        with table.open() as stream:
            rows = {row["name"]: row for row in csv.DictReader(stream)}
    files = zoo.names()
    if options.only is not None:
        unknown = [n for n in options.only if n not in files]
        if unknown:
            parser.error(f"{options.library} has no model {unknown}")
    start = time.monotonic()

    def fill(names: list[str], kind: str) -> None:
        tasks = [(n, kind) for n in names]
        for done, (name, _, row) in enumerate(run_all(options.library, tasks, options.workers, options.limit), start=1):
            known = rows.get(name, {}) if kind != "structure" else {}
            row = {"cut": row["reason"]} if kind == "cut" and "cut" not in row else row  # it crashed
            rows[name] = {**known, "name": name, "file": files[name], **row}
            print(f"{kind} {done}/{len(tasks)}", *(f"{k}={v}" for k, v in rows[name].items()), flush=True)
            if done % 10 == 0 or kind != "structure" or done == len(tasks):
                write(table, rows)

    if options.cut:
        passed = [n for n, row in rows.items() if row.get("checked") == "passed" and not row.get("cut")]
        fill(passed if options.only is None else options.only, "cut")
        print(f"{time.monotonic() - start:.0f} s")
        return

    def wanted(name: str) -> bool:
        if options.only is not None:
            return name in options.only
        row = rows.get(name)
        return row is None or bool(options.again and options.again in " ".join(map(str, row.values())))

    again = [n for n in files if wanted(n)]
    fill(again, "structure")
    fill([n for n in smallest(rows) if not rows[n].get("checked") or n in again], "numbers")
    print(f"{time.monotonic() - start:.0f} s")
    conclude(rows)


def smallest(rows: dict[str, Row]) -> list[str]:
    """Of each file the model with the fewest parameters that converts, by default rather than on request."""
    least: dict[str, tuple[bool, int, str]] = {}
    for name, row in rows.items():
        if row["verdict"] in ("converted", "on request"):
            entry = (row["verdict"] != "converted", int(row["parameters"]), name)
            least[row["file"]] = min(least.get(row["file"], entry), entry)
    return [name for *_, name in least.values()]


def conclude(rows: dict[str, Row]) -> None:
    """The figures that the table stands for."""
    converted = [r for r in rows.values() if r["verdict"] == "converted"]
    kept = [r for r in rows.values() if r["verdict"] == "on request"]
    checked = [r for r in rows.values() if r.get("checked")]
    passed = [r for r in checked if r["checked"] == "passed"]
    foldable = sum(int(r["foldable"]) for r in checked if r["verdict"] != "refused")
    unfoldable = sum(int(r["unfoldable"]) for r in checked if r["verdict"] != "refused")
    print(f"{len(converted)} of {len(rows)} names converted, in {len({r['file'] for r in converted})} files")
    only = {r["file"] for r in kept} - {r["file"] for r in converted}
    print(f"{len(kept)} more on request, with branches that cannot be folded: {len(only)} files more, {sorted(only)}")
    print(f"{len(passed)} of {len(checked)} checked with numbers passed")
    print(f"{foldable} of {foldable + unfoldable} branches foldable among them")
    for r in rows.values():
        if r["verdict"] == "crashed" or (r.get("checked") not in (None, "", "passed", "refused")):
            print("  ", r["name"], r["verdict"], r.get("reason", ""), r.get("checked", ""))


if __name__ == "__main__":
    main()
