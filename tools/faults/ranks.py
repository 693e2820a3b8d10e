"""One training on several processes over gloo, divided by DDP or by FSDP2, against the same training on one."""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.nn import functional as F

from tools.faults.digits import BATCH, EVERY, Net, differences, digits
from torch_meanfield import BirthDeathOptimizer, follow, subscribe
from torch_meanfield.particles.copying import whole
from torch_meanfield.particles.population import named_tensors

# Before 2.7 the FSDP2 of torch ran its collectives on accelerator streams only.
FSDP_ON_CPU = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7)
PATIENCE = timedelta(seconds=120)  # for ranks that share one processor
PRELOAD = ("sklearn.datasets", "torch.distributed.fsdp", "torch._dynamo")  # the last one by the first DTensor


@dataclass(frozen=True)
class Form:
    """How a training is divided.

    Args:
        strategy: ``"none"`` (one process), ``"DDP"`` or ``"FSDP2"``.
        narrow: Whether FSDP2 computes in bfloat16.
        dtype: Dtype of the parameters.
        alike: Every rank takes the whole batch, so that the mean over ranks rounds nothing; otherwise its own part.
        pieces: Backward passes in which a step's gradient is accumulated.
        births: Settings of the ``BirthDeathOptimizer`` other than the usual.
    """

    strategy: str = "none"
    narrow: bool = False
    dtype: torch.dtype = torch.float64
    alike: bool = False
    pieces: int = 1
    births: dict[str, Any] = field(default_factory=dict)


class Objective(nn.Module):
    """The loss as the forward pass: inside it, every strategy has all parameters at hand."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, labels: Tensor, push: Tensor) -> Tensor:
        """Mean over the images; tau is pushed about and held together, on all ranks alike."""
        tau = self.net.stack.tau
        return F.cross_entropy(self.net(images), labels) + (tau * push).sum() + (tau - 0.6).square().sum()


class Training:
    """Model, optimizer and record of one rank."""

    def __init__(self, form: Form) -> None:
        torch.manual_seed(0)
        self.form = form
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.net, self.average = (Net(dropout=0.0).to(form.dtype) for _ in range(2))
        self.average.load_state_dict(self.net.state_dict())
        self.objective: nn.Module = Objective(self.net)
        if form.strategy == "FSDP2":
            shard_(self.objective, self.net, form.narrow)
            shard_(self.average, self.average)
        self.called = nn.parallel.DistributedDataParallel(self.objective) if form.strategy == "DDP" else self.objective
        self.optimizer = optimizer_for(self.net, **form.births)
        follow(self.average, self.net)
        self.motions: list[list[Any]] = []
        self.step = 0

    def train(self, until: int) -> None:
        """Take steps up to number ``until``."""
        images, labels = digits()
        with subscribe(self._note, model=self.net):
            while self.step < until:
                draw = torch.Generator().manual_seed(self.step)
                index = torch.randint(len(images), (BATCH,), generator=draw)
                noise = 0.1 * torch.randn(BATCH, images.shape[1], generator=draw)
                push = torch.randn(len(self.net.stack), generator=draw).to(self.form.dtype)
                mine = slice(None) if self.form.alike else slice(self.rank, None, self.world)
                x = (images[index] + noise).to(self.form.dtype)
                self.optimizer.zero_grad()
                n = self.form.pieces
                for images_in, labels_in in zip(x[mine].chunk(n), labels[index[mine]].chunk(n), strict=True):
                    (self.called(images_in, labels_in, push) / n).backward()
                self.optimizer.step()
                with torch.no_grad():
                    for kept, new in zip(self.average.parameters(), self.net.parameters(), strict=True):
                        kept.lerp_(new, 0.1)
                self.step += 1

    def _note(self, motion: Any) -> None:
        born = [] if motion.born is None else motion.born.tolist()
        self.motions.append([motion.cause, motion.index.tolist(), born])

    def ending(self) -> dict[str, Any]:
        """All that the training has come to, every tensor whole, by name."""
        births = self.optimizer.state_dict()["birth_death"]
        return {
            **whole_state(self.net, self.optimizer),
            "average": {name: whole(t).clone() for name, t in named_tensors(self.average).items()},
            "potentials": {each["name"]: each["averages"] for each in births["populations"]},
            "clock": births["clock"],
            "generator": births["generator"],
            "motions": self.motions,
        }

    # -- distributed checkpoints -----------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write a checkpoint with ``torch.distributed.checkpoint``, each rank its part."""
        dcp.save(self._state(), checkpoint_id=folder)
        births = self.optimizer.birth_death_state()
        if self.rank == 0:
            torch.save(births, folder / "births.pt")

    def load(self, folder: Path) -> None:
        """Go on from :meth:`save`, whatever the number of ranks was."""
        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.net, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        set_model_state_dict(self.average, state["average"])
        self.optimizer.load_birth_death_state(torch.load(folder / "births.pt", weights_only=True))
        self.step = state["step"]

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.net, self.optimizer)
        average = get_model_state_dict(self.average)
        return {"model": model, "optimizer": optimizer, "average": average, "step": self.step}


def optimizer_for(net: Net, **settings: Any) -> BirthDeathOptimizer:
    """The optimizer of :mod:`.digits` for a network that may be sharded already: nothing is searched for."""
    offset = net.stack.tau_axis.offset
    assert offset is not None
    slow = [p for p in net.parameters() if p is not offset]
    inner = torch.optim.AdamW([{"params": slow, "lr": 3e-3}, {"params": [offset], "lr": 0.2}])
    units = [(net.hidden.weight, 0), (net.hidden.bias, 0), (net.last.weight, 1)]
    usual: dict[str, Any] = {"every": EVERY, "reinject": 0.1, "candidates": 16, "threshold": 0.1}
    return BirthDeathOptimizer(inner, net, populations=[units, net.stack], **usual | settings)


def whole_state(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Parameters, buffers and optimizer state by name, gathered from all ranks."""
    for module in net.modules():
        if hasattr(module, "reshard"):  # a validation leaves them gathered
            cast(Any, module).reshard()
    names = {p: name for name, p in net.named_parameters()}
    state = {f"{names[p]}/{key}": value for p, each in optimizer.state.items() for key, value in each.items()}
    return {
        "parameters": {name: whole(p).clone() for name, p in net.named_parameters()},
        "buffers": {name: whole(b).clone() for name, b in net.named_buffers()},
        "optimizer": {name: whole(value).clone() for name, value in state.items()},
    }


def shard_(objective: nn.Module, net: Net, narrow: bool = False, mesh: Any = None) -> None:
    """Divide the blocks each for itself, and all else at once with ``objective``, which holds ``net``."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if narrow else MixedPrecisionPolicy()
    for block in net.stack:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)


# -- processes -----------------------------------------------------------------------------------------------------


def together(world: int, act: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``act(*args)`` returned on each of ``world`` ranks, in processes of their own that form a gloo group.

    Raises:
        RuntimeError: A rank failed; with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *PRELOAD])  # imported once for all
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [context.Process(target=_rank, args=(rank, world, folder, act, args)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
        codes = [process.exitcode for process in processes]
        if errors or any(codes):
            raise RuntimeError(f"ranks ended with {codes}\n" + "\n".join(errors))
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _rank(rank: int, world: int, folder: Path, act: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
        torch.save(act(*args), folder / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()[-4000:]}")
        os._exit(1)


def trained(form: Form, steps: int) -> dict[str, Any]:
    """The ending of a training from its start; for :func:`together`, or alone."""
    training = Training(form)
    training.train(steps)
    return training.ending()


def all_trained(forms: Mapping[str, Form], steps: int) -> dict[str, dict[str, Any]]:
    """The endings of several trainings, one after the other in the same processes."""
    return {name: trained(form, steps) for name, form in forms.items()}


def distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """How far two endings are apart: the largest difference of any two tensors, relative to the largest entry.

    Infinite if they did not make the same motions (of the shorter record, the last ones) on the same clock.
    """
    count = min(len(a["motions"]), len(b["motions"]))
    if a["motions"][-count:] != b["motions"][-count:] or a["clock"] != b["clock"]:
        return math.inf
    worst = 0.0
    for group in ("parameters", "buffers", "optimizer", "average", "potentials"):
        if a[group].keys() != b[group].keys():
            return math.inf
        for name, ours in a[group].items():
            apart = (ours.double() - b[group][name].double()).abs().max()
            worst = max(worst, float(apart / b[group][name].double().abs().max().clamp_min(1e-30)))
    return worst


def apart(ranks: list[dict[str, Any]]) -> list[str]:
    """Where ranks differ from the first in any bit."""
    return [difference for rank in ranks[1:] for difference in differences(ranks[0], rank)]


def interrupted(form: Form, steps: int, folder: Path) -> None:
    """Train, and leave a distributed checkpoint in ``folder``."""
    training = Training(form)
    training.train(steps)
    training.save(folder)


def resumed(form: Form, steps: int, folder: Path) -> dict[str, Any]:
    """The ending of a training that goes on from the checkpoint in ``folder``."""
    training = Training(form)
    training.load(folder)
    training.train(steps)
    return training.ending()
