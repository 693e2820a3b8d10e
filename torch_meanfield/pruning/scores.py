"""``depth_scores``: what each residual block of a model is worth."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from torch_meanfield.convert import convert
from torch_meanfield.observe import undisturbed
from torch_meanfield.pruning.batches import Batch, Loss, checked_loss, read_batches
from torch_meanfield.pruning.blocks import Block, blocks_of, is_converted, layers_by_name, size_of
from torch_meanfield.pruning.control import scoring_mode
from torch_meanfield.pruning.greedy import greedy_order
from torch_meanfield.pruning.one_pass import fisher, moved
from torch_meanfield.pruning.passes import Passes
from torch_meanfield.pruning.progress import Progress

Criterion = Literal["greedy", "leave_one_out", "fisher", "cosine", "ratio", "step"]


@dataclass(frozen=True)
class BlockScore:
    """One block and its score.

    Attributes:
        name: qualified name of the block.
        score: what it is worth; see :attr:`DepthScores.by`.
        layer: qualified name of the mean-field layer that holds it.
        step: its step size.
        parameters: how many it has.
    """

    name: str
    score: float
    layer: str
    step: float
    parameters: int


@dataclass(frozen=True)
class DepthScores:
    """Scores of all blocks of a model; iterating gives ``(name, score)`` in the order of the model.

    Attributes:
        by: the criterion. ``"greedy"``: the loss of the network when the block has gone, after all that went before
            it; ``"leave_one_out"``: by how much the loss rises without this block alone; else see the criterion.
        entries: one for each block.
        order: names in the order in which blocks are to go, the most dispensable first.
        loss: of the whole network on the batches; ``None`` if none was computed.
        samples: how many.
        passes: forward passes over all samples that this took, in units of a whole one.
        seconds: of wall clock.
    """

    by: str
    entries: tuple[BlockScore, ...]
    order: tuple[str, ...]
    loss: float | None = None
    samples: int = 0
    passes: float = 0.0
    seconds: float = 0.0

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return ((e.name, e.score) for e in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> float:
        """The score of the block ``name``."""
        return {e.name: e.score for e in self.entries}[name]

    def table(self) -> str:
        """A line for each block: name, when it goes, score, step, parameters."""
        rank = {name: i + 1 for i, name in enumerate(self.order)}
        width = max([len(e.name) for e in self.entries] + [len("block")])
        score = {"greedy": "loss then", "leave_one_out": "loss +"}.get(self.by, self.by)
        lines = [f"{'block':<{width}}  {'goes':>4}  {score:>10}  {'step':>8}  {'parameters':>10}"]
        lines += [
            f"{e.name:<{width}}  {rank[e.name]:>4}  {e.score:>10.4g}  {e.step:>8.4g}  {e.parameters:>10,}"
            for e in self.entries
        ]
        whole = "" if self.loss is None else f", loss {self.loss:.4g} with all blocks"
        cost = f", {self.passes:.1f} passes" if self.passes else ""
        lines.append(f"by {self.by}: {len(self)} blocks, {self.samples} samples{whole}{cost}, {self.seconds:.1f} s")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def depth_scores(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    by: Criterion = "greedy",
    loss: Loss | None = None,
    progress: bool = True,
    batch_statistics: bool = True,
) -> DepthScores:
    r"""Score every block of every stage of ``model``, so that those of least worth can be removed.

    The model is left as it is, with its buffers and torch's random state. Blocks are left out by letting the stream
    pass by them.

    Args:
        model: holds mean-field layers (:class:`.MeanFieldResNet`, :class:`.MeanFieldSequential`, what
            :func:`.convert` returned). Any other is converted on the way, in a copy.
        batches: of pairs (inputs, targets), read once; 512 images in a few batches are enough. ``"cosine"`` and
            ``"ratio"`` need no targets, ``"step"`` no batches.
        by: ``"greedy"``: of all blocks that are left, the one without which the loss is least goes next. The best of
            them where it was measured, and the dearest: n / 2 passes for n blocks, and then about two for each block
            that is left, in units of what they take by then (:func:`.greedy_order`).
            ``"leave_one_out"``: by how much the loss rises without the block; n / 2 passes, since what comes before a
            block is computed once a batch.
            ``"fisher"``: half the mean squared derivative of a sample's loss by a gate on the branch (Theis et al.
            2018); one pass forth and back.
            ``"cosine"``: 1 minus the cosine between what goes in and what comes out (Men et al. 2024).
            ``"ratio"``: :math:`|y - x| / |x|`, the size of the update.
            ``"step"``: the step size, for networks whose times were learned at a short horizon; it says nothing where
            times are not learned.
        loss: function of (outputs, targets) to the mean over the batch; ``None``: cross-entropy.
        progress: whether to show a progress bar (of ``tqdm``, if that is installed).
        batch_statistics: whether batch norms use the statistics of the batch, as after a removal they must. A batch
            then needs enough samples, about 64.

    Raises:
        TypeError: ``model`` is not a module, batches are not iterable, or a loss that gives no number.
        ValueError: an unknown criterion; no batches, empty ones, or ones without targets where a loss is needed; a
            model that cannot be converted, or whose slots are not in the order of tau.

    Example:
        >>> from torch_meanfield.models import MeanFieldResNet
        >>> model = MeanFieldResNet(20)
        >>> batches = [(torch.randn(8, 3, 8, 8), torch.randint(10, (8,)))]
        >>> scores = depth_scores(model, batches, by="ratio")
        >>> len(scores), [name for name, _ in scores][:2]
        (7, ['stage1.particles.0', 'stage1.particles.1'])
    """
    start = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise TypeError(f"depth_scores: model must be a torch.nn.Module, got {type(model).__name__}")
    if by not in get_args(Criterion):
        raise ValueError(f"depth_scores: by must be one of {', '.join(map(repr, get_args(Criterion)))}, got {by!r}")
    unread = by == "step" and (batches is None or is_converted(model))
    read = [] if unread else read_batches(() if batches is None else batches, model, "depth_scores")
    criterion = checked_loss(loss, read, "depth_scores") if by in ("greedy", "leave_one_out", "fisher") else None
    scored = model if is_converted(model) else converted_copy(model, read)
    blocks = scorable(scored, "depth_scores")
    steps = steps_of(scored, blocks)
    values, order, whole, passes = steps, None, None, 0.0
    with scoring_mode(scored, batch_statistics=batch_statistics):
        if by in ("cosine", "ratio"):
            with undisturbed():
                values, passes = moved(scored, blocks, read, by), 1.0
        elif criterion is not None and by == "fisher":
            values, passes = fisher(scored, blocks, read, criterion, "depth_scores"), 2.0
        elif criterion is not None:
            runs = Passes(scored, blocks, read, criterion, "depth_scores")
            if by == "greedy":
                whole, values, order = greedy_order(runs, blocks, Progress(progress, len(blocks)))
            else:
                share = len(blocks) / len(read) / (len(blocks) + 1)  # there is one more pass
                with Progress(progress, len(blocks)) as bar:
                    whole, without = runs.losses_without((), blocks, lambda: bar.update(share))
                values = {name: value - whole for name, value in without.items()}
            passes = runs.count
    entries = tuple(BlockScore(b.name, values[b.name], b.layer, steps[b.name], size_of(scored, b)) for b in blocks)
    if order is None:
        order = tuple(e.name for e in sorted(entries, key=lambda e: e.score))
    samples = sum(b.size for b in read)
    seconds = time.perf_counter() - start
    return DepthScores(by, entries, order, whole, samples, passes, seconds)


def scorable(model: nn.Module, caller: str) -> list[Block]:
    """The blocks of ``model``, or an error in the name of ``caller``."""
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(
            f"{caller}: {type(model).__name__} holds no mean-field layer with blocks; torch_meanfield.convert(model) "
            f"makes the residual blocks of an existing model such"
        )
    for name, layer in layers_by_name(model).items():
        tau = layer.tau_axis.read()
        if not tau.is_meta and not (bool(tau.isfinite().all()) and bool((tau.sort(stable=True).values == tau).all())):
            raise ValueError(
                f"{caller}: the slots of {name or 'the model'} are not in the order of tau "
                f"({[round(t, 4) for t in tau.tolist()]}), so that its blocks run in another order than their names; "
                f"call torch_meanfield.resort_(model) first"
            )
    return blocks


def steps_of(model: nn.Module, blocks: Sequence[Block]) -> dict[str, float]:
    """The step size of each block."""
    layers = layers_by_name(model)
    with torch.no_grad():
        sizes = {name: layer.steps().tolist() for name, layer in layers.items()}
    return {b.name: sizes[b.layer][b.slot] for b in blocks}


def converted_copy(model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """A converted copy of a plain model."""
    return convert(deepcopy(model), batches[0].few if batches else None)
