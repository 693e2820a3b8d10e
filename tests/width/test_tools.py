"""The wrapper in the hands of other tools: timm's schedulers, Accelerate, distributed checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from tests.width.optimizers import OPTIMIZERS, Net, backward, same, train, weights, wrap
from torch_meanfield.width import BirthDeathOptimizer


@pytest.mark.parametrize("sched", ["cosine", "step", "poly"])
def test_timm_schedulers_drive_the_wrapper_as_they_drive_a_bare_optimizer(sched: str) -> None:
    def rates(wrapped: bool) -> list[float]:
        model = Net()
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if wrapped:
            optimizer = wrap(model, optimizer)
        scheduler, epochs = create_scheduler_v2(optimizer, sched=sched, num_epochs=6, warmup_epochs=2, decay_epochs=2)
        out = []
        for epoch in range(epochs):
            backward(model, epoch)
            optimizer.step()
            scheduler.step(epoch + 1)
            inner = optimizer.optimizer if isinstance(optimizer, BirthDeathOptimizer) else optimizer
            out.append(inner.param_groups[0]["lr"])
        return out

    bare = rates(wrapped=False)
    assert rates(wrapped=True) == bare and len(set(bare)) > 1


def test_accelerate_prepares_it_and_trains_as_a_plain_loop_does(tmp_path: Path) -> None:
    from accelerate import Accelerator

    def make() -> tuple[Net, BirthDeathOptimizer]:
        model = Net()
        return model, wrap(model, OPTIMIZERS["adamw"](model.parameters()), reinject=0.1)

    def run(model: nn.Module, optimizer: Any, steps: range, accelerator: Any = None) -> None:
        for step in steps:
            optimizer.zero_grad()
            x = torch.rand(32, 6, generator=torch.Generator().manual_seed(step))
            loss = (model(x) - x[:, :3]).square().mean()
            loss.backward() if accelerator is None else accelerator.backward(loss)
            optimizer.step()

    plain = make()
    run(*plain, range(45))
    accelerator = Accelerator(cpu=True)
    events: list[int] = []
    model, inner = make()
    inner.register_event_hook(lambda event: events.append(event.step))
    prepared = accelerator.prepare(model, inner)
    run(*prepared, range(25), accelerator)
    accelerator.save_state(str(tmp_path / "state"))
    run(*prepared, range(25, 45), accelerator)
    assert events and same(weights(model), weights(plain[0]))
    accelerator.load_state(str(tmp_path / "state"))
    run(*prepared, range(25, 45), accelerator)
    assert same(weights(model), weights(plain[0]))


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable|uninitialized):UserWarning")
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw"])
def test_a_distributed_checkpoint_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    """Its tools name optimizer state by parameter and drop all else: what is the population's own is saved beside."""

    def make() -> tuple[Net, BirthDeathOptimizer]:
        model = Net()
        return model, wrap(model, OPTIMIZERS[name](model.parameters()), reinject=0.1)

    model, optimizer = make()
    train(model, optimizer, range(25))
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=str(tmp_path / "dcp"))
    torch.save(optimizer.state_dict()["birth_death"], tmp_path / "birth_death.pt")
    train(model, optimizer, range(25, 45))

    twin, other = make()
    state = {"model": twin.state_dict(), "optimizer": get_optimizer_state_dict(twin, other)}
    dcp.load(state, checkpoint_id=str(tmp_path / "dcp"))
    twin.load_state_dict(state["model"])
    set_optimizer_state_dict(twin, other, state["optimizer"])
    population = torch.load(tmp_path / "birth_death.pt", weights_only=True)
    other.load_state_dict({**other.state_dict(), "birth_death": population})
    train(twin, other, range(25, 45))
    assert same(weights(model), weights(twin))
