"""Trainings beside each other: in threads, beside DataLoader workers, as copies, and in other processes."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from tools.faults.digits import Net, digits, optimizer_of
from tools.faults.kills import clone
from torch_meanfield import subscribe

STEPS = 40


def made(seed: int) -> Net:
    """A network without dropout, which would draw from the generator that all threads share."""
    torch.manual_seed(seed)
    return Net(dropout=0.0)


def train(net: Net, seed: int, steps: int = STEPS, optimizer: Any = None, loader: Any = None) -> dict[str, Any]:
    """Train with chance of its own; everything at the end, and how many motions there were."""
    optimizer = optimizer_of(net) if optimizer is None else optimizer
    generator = torch.Generator().manual_seed(seed)
    images, labels = digits()
    batches = iter(loader) if loader is not None else None
    motions: list[str] = []
    with subscribe(lambda motion: motions.append(motion.cause), model=net):
        for step in range(steps):
            if batches is None:
                at = step % 8 * 32
                x, y = images[at : at + 32], labels[at : at + 32]
            else:
                x, y = next(batches)
            optimizer.zero_grad()
            net.loss(x, y, generator).backward()
            optimizer.step()
    return clone({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "motions": motions})


def in_threads(seeds: list[int], steps: int = STEPS) -> dict[int, dict[str, Any]]:
    """Train one network for each seed, all at once in one process."""
    nets = {seed: made(seed) for seed in seeds}
    out: dict[int, Any] = {}
    together = threading.Barrier(len(seeds))

    def run(seed: int) -> None:
        together.wait()
        try:
            out[seed] = train(nets[seed], seed, steps)
        except BaseException as error:
            out[seed] = error

    threads = [threading.Thread(target=run, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in out.values():
        if isinstance(result, BaseException):
            raise result
    return out


def beside_workers(context: str, workers: int, steps: int = STEPS) -> dict[str, Any]:
    """Train on batches that DataLoader workers bring, over and over the same 256 images in order."""
    data = TensorDataset(*(torch.cat([t] * -(-steps // 8)) for t in digits()))
    loader = DataLoader(data, 32, num_workers=workers, multiprocessing_context=context)
    return train(made(0), 0, steps, loader=loader)


def as_a_copy(steps: int = STEPS) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """A network and its optimizer trained half-way, copied, and the copy trained on: what became of both."""
    net = made(0)
    optimizer = optimizer_of(net)
    train(net, 0, steps, optimizer)
    twin, its = copy.deepcopy((net, optimizer))
    before = clone({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    copied = train(twin, 1, steps, its)
    after = clone({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    return copied, train(net, 1, steps, optimizer), [before, after]


def in_another_process(steps: int = STEPS) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The same with a copy that was pickled to another process."""
    net = made(0)
    optimizer = optimizer_of(net)
    train(net, 0, steps, optimizer)
    before = clone({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "sklearn.datasets"])
    receiver, sender = context.Pipe(duplex=False)
    # As bytes: handed over as they are, tensors would be shared with the other process (torch.multiprocessing).
    process = context.Process(target=_elsewhere, args=(pickle.dumps((net, optimizer)), steps, sender))
    process.start()
    sender.close()
    there = pickle.loads(receiver.recv_bytes())
    process.join()
    after = clone({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    return there, train(net, 1, steps, optimizer), [before, after]


def _elsewhere(pickled: bytes, steps: int, sender: Any) -> None:
    torch.set_num_threads(1)
    net, optimizer = pickle.loads(pickled)
    sender.send_bytes(pickle.dumps(train(net, 1, steps, optimizer)))
