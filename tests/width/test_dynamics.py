"""The whole dynamics against plain loops, and what it promises about devices, ranks and Lightning."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.defaults import other_defaults
from tests.width.optimizers import Net, backward, same, train, weights, wrap
from tests.width.test_rates import literal_event
from torch_meanfield import MeanFieldSequential, subscribe
from torch_meanfield.width import BirthDeathOptimizer, Event
from torch_meanfield.width.turnover.blocks import Blocks
from torch_meanfield.width.turnover.exact import birth_and_death


def plain_reference(
    c: Tensor, y: Tensor, energy: Any, lr: float, alpha: float, every: int, steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """SGD with the exact scheme, by loops: V_i = c_i dE/dc_i of the last step, time the sum of learning rates."""
    generator = torch.Generator().manual_seed(seed)
    n = len(c)
    for step in range(1, steps + 1):
        c, y = c.detach().requires_grad_(), y.detach().requires_grad_()
        gc, gy = torch.autograd.grad(energy(c, y), (c, y))
        potential = [float(c[i].detach() * gc[i]) for i in range(n)]
        c, y = (c - lr * gc).detach(), (y - lr * gy).detach()
        if step % every == 0:
            draws = torch.rand((4, n), generator=generator, dtype=torch.float64)
            index = literal_event(potential, alpha * lr * every, draws)
            c, y = torch.stack([c[j] for j in index]), torch.stack([y[j] for j in index])
    return c, y


def test_the_exact_scheme_is_the_plain_loop_step_by_step() -> None:
    torch.manual_seed(0)
    n, lr, alpha = 30, 0.3, 4.0
    c, y = torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)

    def energy(c: Tensor, y: Tensor) -> Tensor:
        return ((c * torch.exp(-(x[:, None] - y).square())).sum(1) / math.sqrt(n) - x.cos()).square().mean()

    expected = plain_reference(c, y, energy, lr, alpha, every=2, steps=100, seed=3)
    c, y = c.clone().requires_grad_(), y.clone().requires_grad_()
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD([c, y], lr=lr), populations=[(y, 0), (c, 0)], scheme="exact", rate=alpha, every=2, seed=3
    )
    events: list[Event] = []
    optimizer.register_event_hook(events.append)
    for _ in range(100):
        optimizer.zero_grad()
        energy(c, y).backward()
        optimizer.step()
    assert len(events) > 10
    torch.testing.assert_close(c.detach(), expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(y.detach(), expected[1], rtol=0, atol=1e-10)


def test_time_follows_the_schedule_of_the_outgoing_weights_group() -> None:
    c, y = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    inner = torch.optim.SGD([{"params": [c], "lr": 0.5}, {"params": [y], "lr": 0.1}])
    optimizer = BirthDeathOptimizer(inner, populations=[(y, 0), (c, 0)], scheme="exact", rate=1.0, every=10)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (c * y).sum().backward()
        optimizer.step()
        scheduler.step()
    assert optimizer._dynamics is not None and [t.elapsed for t in optimizer._dynamics.tracked] == [0.5 + 0.25 + 0.125]


def test_populations_are_found_from_the_first_input() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = BirthDeathOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, every=10)
    assert optimizer.populations == [] and model._forward_pre_hooks
    state = torch.get_rng_state()
    train(model, optimizer, range(1))
    assert [p.size for p in optimizer.populations] == [32, 16] and not model._forward_pre_hooks
    assert torch.equal(state, torch.get_rng_state())
    at_once = BirthDeathOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2), model, example_input=torch.randn(2, 6)
    )
    assert [p.size for p in at_once.populations] == [32, 16]


def test_a_state_can_be_loaded_before_populations_are_found() -> None:
    def made() -> tuple[nn.Module, BirthDeathOptimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
        return model, BirthDeathOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, every=60)

    model, optimizer = made()
    train(model, optimizer, range(15))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(15, 65))
    resumed, second = made()
    resumed.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    again = second.state_dict()["birth_death"]
    assert again["clock"] == 15 and again["populations"][0]["size"] == 32
    train(resumed, second, range(15, 65))
    assert same(weights(model), weights(resumed))


def test_a_head_that_is_trained_alone_has_no_population() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="1 proven populations, none of which belongs"):
        BirthDeathOptimizer(torch.optim.SGD(model[2].parameters(), lr=0.1), model, example_input=torch.randn(2, 6))


def _rank(rank: int, folder: str) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Net()
    replica = DistributedDataParallel(model)
    optimizer = wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), rate=0.3, threshold=0.5)
    born = 0

    def count(event: Event) -> None:
        nonlocal born
        born += len(event.born)

    optimizer.register_event_hook(count)
    train(replica, optimizer, range(1000 * rank, 1000 * rank + 40))  # each rank has data of its own
    torch.save((born, weights(model)), f"{folder}/{rank}.pt")
    destroy_process_group()


def test_data_parallel_ranks_choose_alike(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    (born, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert born > 4 and same(first, second)


def test_lightning_drives_it_as_any_optimizer(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return (self.net(batch[0]) - 1).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = wrap(self.net, torch.optim.AdamW(self.parameters(), lr=1e-2), every=4)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "interval": "step"}]

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(64, 6)), batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=2,
            accumulate_grad_batches=2,
            accelerator="cpu",
            default_root_dir=tmp_path,
            gradient_clip_val=1.0,
            **options,
        )
        task = Task()
        trainer.fit(task, data)
        optimizer = trainer.optimizers[0]
        assert isinstance(optimizer, BirthDeathOptimizer) and optimizer.clock == trainer.global_step == 16
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        again = Task()
        further = lightning.Trainer(
            max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False, **options
        )
        further.fit(again, data, ckpt_path=tmp_path / "last.ckpt")
        assert further.optimizers[0].clock == 32


@pytest.mark.parametrize(
    "options",
    [{"scheme": "exact", "rate": 50.0}, {"births": "reinject", "reinject": 0.1}, {"births": "split"}],
    ids=["exact", "reinject", "split"],
)
def test_defaults_of_torch_that_are_not_the_models_play_no_part(options: dict[str, Any]) -> None:
    models = Net(), Net()
    events: list[Event] = []
    for model, defaults in zip(models, (nullcontext, other_defaults), strict=True):
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), threshold=0.1, **options)
        optimizer.register_event_hook(events.append)
        for step in range(40):
            optimizer.zero_grad()
            backward(model, step)
            with defaults():
                optimizer.step()
    assert len(events) >= 4 and same(weights(models[0]), weights(models[1]))


def test_nothing_is_read_from_the_device_between_events() -> None:
    """On the CPU a read is an ``item``: none may be made on an ordinary step, one on a step with an event."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.nonzero.default:
                self.count += 1
            return func(*args, **(kwargs or {}))

    model = Net()
    # harmless units only, so that the event has nothing to do but to look
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05), every=8, threshold=1e9, window=100.0)
    for step in range(8):
        optimizer.zero_grad()
        backward(model, step)
        with Reads() as reads:
            optimizer.step()
        assert reads.count == 0


def test_without_a_batch_size_harm_is_left_alone_and_said_once() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.001), threshold=0.0, batch_size=None)
    dead = {i for i in range(24) if not (model.first(torch.rand(1000, 6))[:, i] > 0).any()}
    optimizer._dynamics.batch.size = lambda: None  # type: ignore[union-attr, method-assign]
    events: list[Event] = []
    optimizer.register_event_hook(events.append)
    with pytest.warns(RuntimeWarning, match="does not know how many samples") as caught:
        train(model, optimizer, range(40))
    assert len(caught) == 1
    assert {0, 1, 2, 3} <= set(events[0].born.tolist()) <= dead
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"rate": 0.0, "reinject": 0.1}, {"scheme": "exact"}):
            model = Net()
            quiet = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05), **options)  # type: ignore[arg-type]
            quiet._dynamics.batch.size = lambda: None  # type: ignore[union-attr, method-assign]
            train(model, quiet, range(20))


def test_one_kind_of_randomness_for_each_share() -> None:
    """With rate 0 only reinjection acts, at its share, on neurons of every layer; the function stays."""
    model = Net(units=200)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=1e-9), rate=0.0, reinject=0.25, every=5)
    events: list[Event] = []
    optimizer.register_event_hook(events.append)
    train(model, optimizer, range(20))
    assert [e.step for e in events] == [5, 10, 15, 20]
    assert all(25 < len(e.born) < 75 and torch.equal(e.index, torch.arange(200)) for e in events)
    assert not torch.equal(events[0].born, events[1].born[: len(events[0].born)])
    assert not model.last.weight[:, events[-1].born].any()


def test_blocks_move_after_the_neurons_inside_them() -> None:
    torch.manual_seed(0)
    layer = MeanFieldSequential(*(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(6)))
    declared: list[Any] = [layer, *([(b[0].weight, 0), (b[0].bias, 0), (b[2].weight, 1)] for b in layer)]
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1e-6), layer, populations=declared, scheme="exact", rate=1e9, every=3
    )
    events: list[Event] = []
    optimizer.register_event_hook(events.append)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        (layer(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
    kinds = [type(e.population) is Blocks for e in events]
    assert any(kinds) and not all(kinds) and kinds == sorted(kinds)
    assert all(e.born.numel() == 0 and e.step == 3 for e in events)


def test_time_begins_anew_after_each_event() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.5), scheme="exact", rate=1e-9, every=4)
    train(model, optimizer, range(3))
    dynamics = optimizer._dynamics
    assert dynamics is not None and [t.elapsed for t in dynamics.tracked] == [1.5]
    train(model, optimizer, range(3, 5))
    assert [t.elapsed for t in dynamics.tracked] == [0.5]


def test_a_unit_that_was_not_watched_yet_stands_where_the_others_are_on_average() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.5), scheme="exact", rate=3.0, window=4.0, every=99)
    train(model, optimizer, range(6))
    dynamics = optimizer._dynamics
    assert dynamics is not None
    (units,) = dynamics.tracked
    units.forget_(torch.tensor([2, 7, 11]))
    mean, mature = units.evidence().mean.clone(), units.evidence().mature
    assert mature.tolist() == [i not in (2, 7, 11) for i in range(24)]
    mean[[2, 7, 11]] = mean[mature].mean()
    generator = dynamics.events.draws.generator
    state = generator.get_state()
    turnover = dynamics.events._decide(units, None)
    generator.set_state(state)
    draws = torch.rand((4, 24), generator=generator)
    expected = birth_and_death(mean, 3.0 * 6 * 0.5, draws)
    assert torch.equal(turnover.index, expected.index) and turnover.counts()[0] > 0
    units.forget_(torch.arange(24))  # none was: all are alike
    assert dynamics.events._decide(units, None).counts().tolist() == [0, 0, 0]


def test_under_the_exact_scheme_the_dead_can_be_drawn_anew() -> None:
    model = Net()
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = wrap(model, inner, scheme="exact", rate=200.0, births="reinject", every=5)
    events: list[Event] = []
    optimizer.register_event_hook(events.append)
    train(model, optimizer, range(5))
    (event,) = events
    assert len(event.born) and torch.equal(event.index, torch.arange(24))
    assert event.population is optimizer.populations[0] and event.step == 5


@pytest.mark.parametrize("births", ["reinject", "split", "clone"])
def test_motions_tell_that_they_were_birth_and_death(births: Any) -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05), births=births, threshold=0.1, reinject=0.1)
    causes: list[str] = []
    with subscribe(lambda motion: causes.append(motion.cause), model=model):
        train(model, optimizer, range(40))
    assert len(causes) >= 4 and set(causes) == {"birth_death"}


def test_a_split_shares_the_mass_and_a_clone_repeats_it() -> None:
    for births in ("split", "clone"):
        model = Net()
        inner = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer = wrap(model, inner, births=births, threshold=0.1, every=20)
        before: list[Tensor] = []
        inner.register_step_post_hook(lambda *_, w=before, m=model: w.append(m.last.weight.detach().clone()))
        events: list[Event] = []
        optimizer.register_event_hook(events.append)
        train(model, optimizer, range(20))
        (event,) = events
        for i, j in enumerate(event.index.tolist()):
            brood = int((event.index == j).sum()) if births == "split" else 1
            torch.testing.assert_close(model.last.weight[:, i], before[-1][:, j] / brood)
            alike = torch.equal(model.first.weight[i], model.first.weight[j])
            assert alike == (births == "clone" or i == j)
