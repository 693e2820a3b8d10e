"""The callback beside an independent count of births and deaths, on digits, with births forced."""

import csv

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_meanfield import BirthDeathOptimizer, MeanFieldSequential
from torch_meanfield.lightning import BirthDeathMonitor
from torch_meanfield.record import birth_recorder

EVERY = 5


def _digits():
    digits = load_digits()
    return TensorDataset(torch.tensor(digits.data[:320], dtype=torch.float32) / 16, torch.tensor(digits.target[:320]))


class Task(LightningModule):
    """Two hidden layers whose first units are dead, and a stack of residual blocks."""

    def __init__(self, example=True, birth_death=True, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        blocks = (nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        stack = MeanFieldSequential(*blocks, horizon=1.0)
        self.net = nn.Sequential(
            nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), stack, nn.Linear(8, 10)
        )
        with torch.no_grad():
            for layer, dead in ((self.net[0], 3), (self.net[2], 2)):
                layer.weight[:dead] = -layer.weight[:dead].abs()
                layer.bias[:dead] = -1
        self.example, self.birth_death, self.kwargs, self.events = example, birth_death, kwargs, []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        inner = torch.optim.SGD(self.net.parameters(), lr=0.1)
        if not self.birth_death:
            return inner
        example = torch.rand(2, 64) if self.example else None
        settings = {"every": EVERY, "threshold": 0.1, "rate": 0.3, "candidates": 32, "batch_size": 1, **self.kwargs}
        self.wrapper = BirthDeathOptimizer(inner, self.net, example_input=example, **settings)
        self.wrapper.register_event_hook(self.events.append)
        return self.wrapper


def _fit(tmp_path, *callbacks, task=None, epochs=2, logger=False, ckpt_path=None, **kwargs):
    seed_everything(0, verbose=False)
    task = task or Task()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=10,
        callbacks=list(callbacks),
        logger=logger,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, **kwargs},
    )
    trainer.fit(task, DataLoader(_digits(), batch_size=32), ckpt_path=ckpt_path)
    return trainer, task


class Witness(Callback):
    """Averages by hand: every potential of the first layer from its gradients, step by step."""

    def __init__(self, window):
        self.decay, self.before = 1 - 1 / window, []
        self.mean, self.weight = torch.zeros(16), 0.0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append((self.mean / self.weight if self.weight else self.mean).tolist())
        outgoing = pl_module.net[2].weight
        value = (outgoing.detach() * outgoing.grad).sum(0)
        self.mean = self.decay * self.mean + (1 - self.decay) * value
        self.weight = self.decay * self.weight + (1 - self.decay)


@pytest.mark.parametrize("kwargs", [{}, {"births": "clone"}, {"births": "split"}, {"reinject": 0.3}])
def test_counts_are_those_of_the_events(tmp_path, kwargs):
    monitor = BirthDeathMonitor(plot=False, keep=True)
    _, task = _fit(tmp_path, monitor, task=Task(**kwargs))
    assert {n: t.steps for n, t in monitor.turnovers.items()} == dict.fromkeys(monitor.turnovers, [5, 10, 15, 20])
    assert len(task.events) > 3
    for population in task.wrapper.populations:
        turnover = monitor.turnovers[population.name]
        for k, step in enumerate(turnover.steps):
            (event,) = [e for e in task.events if e.population is population and e.step == step] or [None]
            if event is None:
                assert turnover.killed[k] == 0
                continue
            kept = [s for place, s in enumerate(event.index.tolist()) if place not in event.born.tolist()]
            assert turnover.killed[k] == population.size - len(set(kept)) > 0
            assert turnover.born[k] == len(event.born)
            assert turnover.cloned[k] == turnover.killed[k] - turnover.born[k] >= 0
    assert monitor.killed == sum(sum(t.killed) for t in monitor.turnovers.values()) > 0
    which = "cloned" if kwargs.get("births") else "born"
    assert any(sum(getattr(t, which)) for t in monitor.turnovers.values())


def test_potentials_and_dead_units_are_those_before_the_event(tmp_path):
    task, witness = Task(), Witness(window=EVERY / 2)
    monitor = BirthDeathMonitor(plot=False, keep=True)
    _fit(tmp_path, witness, monitor, task=task, epochs=1, limit_val_batches=0, max_steps=5)
    (first,) = [p for p in task.wrapper.populations if p.size == 16]
    turnover = monitor.turnovers[first.name]
    assert turnover.steps == [5]
    assert turnover.potentials == pytest.approx(witness.before[4], rel=1e-4, abs=1e-7)
    assert turnover.dead == [3]  # those that were made so
    assert [turnover.potentials[i] for i in range(3)] == [0.0, 0.0, 0.0]
    assert turnover.killed[0] >= 3


def test_every_logger_gets_what_it_can_show(tmp_path):
    board = TensorBoardLogger(tmp_path, "board")
    drawn = []
    board.experiment.add_histogram = lambda name, values, step: drawn.append((name, values.clone(), step))
    scalars = []
    board.log_metrics = lambda metrics, step=None: scalars.append((step, metrics))
    monitor, table = BirthDeathMonitor(), CSVLogger(tmp_path, "table")
    _fit(tmp_path, monitor, logger=[table, board])
    with open(f"{table.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("birth_death/killed/total")]
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20]
    for name, turnover in monitor.turnovers.items():
        for count in ("killed", "born", "cloned"):
            assert float(rows[-1][f"birth_death/{count}/{name}"]) == sum(getattr(turnover, count))
        assert [float(row[f"birth_death/dead/{name}"]) for row in rows] == turnover.dead
        assert float(rows[-1][f"birth_death/events/{name}"]) == sum(k > 0 for k in turnover.killed)
        middle = torch.tensor(turnover.potentials).quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        logged = [float(rows[-1][f"potential/{name}/{q}"]) for q in ("q05", "q50", "q95")]
        assert logged == pytest.approx(middle, rel=1e-4)
        (last,) = [values for n, values, step in drawn if n == f"potential/{name}" and step == 20]
        assert last.tolist() == pytest.approx(turnover.potentials)
    assert float(rows[-1]["birth_death/killed/total"]) == monitor.killed
    events = sum(k > 0 for t in monitor.turnovers.values() for k in t.killed)
    assert float(rows[-1]["birth_death/events/total"]) == events > 0
    ours = [metrics for _, metrics in scalars if "birth_death/killed/total" in metrics]
    assert len(ours) == 4 and not any(key.startswith("potential/") for key in ours[0])  # it has the histogram
    assert (tmp_path / "table" / "version_0" / "births.png").stat().st_size > 1000


def test_without_logger_plot_and_keep_nothing_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "torch_meanfield.record.birth_recorder._averages", lambda o: pytest.fail("read from the device")
    )
    monitor = BirthDeathMonitor(plot=False)
    _, task = _fit(tmp_path, monitor)
    assert task.events
    assert monitor.turnovers == {}
    assert len(task.wrapper._callbacks) == 1  # the task's own


def test_averages_are_read_at_events_only(tmp_path, monkeypatch):
    reads, read = [], birth_recorder._averages
    monkeypatch.setattr(birth_recorder, "_averages", lambda o: reads.append(o.clock) or read(o))
    _fit(tmp_path, BirthDeathMonitor(plot=False, keep=True))
    assert reads == [4, 9, 14, 19]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")  # the resumed run saves nothing
def test_a_resumed_run_continues_the_record(tmp_path):
    whole = BirthDeathMonitor(plot=False, keep=True)
    _fit(tmp_path, whole, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), enable_checkpointing=True)
    torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)  # refuses anything but plain data
    resumed = BirthDeathMonitor(plot=False, keep=True)
    _fit(tmp_path, resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.state_dict() == whole.state_dict()
    assert 0 < sum(sum(t.killed[:2]) for t in whole.turnovers.values()) < whole.killed


def test_populations_found_in_the_first_step_are_counted_from_it(tmp_path):
    monitor = BirthDeathMonitor(plot=False, keep=True)
    _, task = _fit(tmp_path, monitor, task=Task(example=False, every=1, reinject=0.5), epochs=1)
    first = [e for e in task.events if e.step == 1]
    assert first
    for event in first:
        turnover = monitor.turnovers[event.population.name]
        assert turnover.steps == list(range(1, 11))
        assert turnover.born[0] == len(event.born)
        assert turnover.killed[0] > 0


def test_the_hooks_are_gone_after_the_end_and_after_a_failure(tmp_path):
    class Fail(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("stop here")

    task = Task()
    _fit(tmp_path, BirthDeathMonitor(plot=False, keep=True), task=task, epochs=1)
    assert len(task.wrapper._callbacks) == 1  # the task's own
    with pytest.raises(RuntimeError, match="stop here"):
        _fit(tmp_path, BirthDeathMonitor(plot=False, keep=True), Fail(), task=task)
    assert len(task.wrapper._callbacks) == 1


def test_a_trainer_without_the_optimizer_is_told(tmp_path):
    monitor = BirthDeathMonitor(keep=True)
    with pytest.warns(UserWarning, match="the trainer has no BirthDeathOptimizer"):
        _fit(tmp_path, monitor, task=Task(birth_death=False), epochs=1)
    assert monitor.turnovers == {}
    assert not list(tmp_path.rglob("births.png"))
