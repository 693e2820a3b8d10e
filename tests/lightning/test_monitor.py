"""The callback beside an independent count of the events and particles that carry their names through training."""

import csv
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_meanfield import MeanFieldSequential, set_automatic_resort, subscribe
from torch_meanfield.depth.tau_axis import TauAxis
from torch_meanfield.lightning import MeanFieldMonitor


def _branch(name):
    branch = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    branch.register_buffer("name", torch.tensor(name))  # moves with the particle
    return branch


class Task(LightningModule):
    """Two layers whose tau moves fast enough to cross."""

    def __init__(self, learn_tau=True, tau_lr=0.5):
        super().__init__()
        torch.manual_seed(0)
        self.tau_lr = tau_lr
        self.first = MeanFieldSequential(*(_branch(i) for i in range(5)), horizon=1.0, learn_tau=learn_tau)
        self.second = MeanFieldSequential(*(_branch(i) for i in range(3)), horizon=1.0, learn_tau=learn_tau)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.second(self.first(x)) - y).square().mean()

    def configure_optimizers(self):
        fast = [p for n, p in self.named_parameters() if "tau" in n]
        slow = [p for n, p in self.named_parameters() if "tau" not in n]
        groups = [{"params": slow, "lr": 0.05}, *([{"params": fast, "lr": self.tau_lr}] if fast else [])]
        return torch.optim.SGD(groups, lr=0.05)


class Witness(Callback):
    """Who is where, read off the particles themselves."""

    def __init__(self):
        self.rows, self.slots = {"first": [], "second": []}, {"first": [], "second": []}

    def _look(self, task):
        for name, rows in self.rows.items():
            layer = getattr(task, name)
            tau = layer.tau_axis.read().clamp(min=0)
            row = [0.0] * len(layer)
            for branch, position in zip(layer, tau.tolist(), strict=True):
                row[int(branch.name)] = position
            rows.append(row)
            self.slots[name].append([int(branch.name) for branch in layer])

    def on_fit_start(self, trainer, pl_module):
        self._look(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._look(pl_module)


def _fit(tmp_path, *callbacks, task=None, epochs=2, batches=10, ckpt_path=None, logger=False, **kwargs):
    seed_everything(0, verbose=False)
    task = task or Task()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 3, generator=generator), torch.randn(80, 3, generator=generator)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=batches,
        callbacks=list(callbacks),
        logger=logger,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, **kwargs},
    )
    trainer.fit(task, DataLoader(TensorDataset(x, y), batch_size=8), ckpt_path=ckpt_path)
    return trainer, task


def test_counts_are_the_events_and_trajectories_are_the_particles(tmp_path):
    events, monitor, witness = [], MeanFieldMonitor(1, plot=False, keep=True), Witness()
    task = Task()
    with subscribe(events.append, model=task):
        _fit(tmp_path, monitor, witness, task=task)
    assert all(motion.cause == "resort" for motion in events)
    assert len(events) == monitor.resorts > 5
    for name in ("first", "second"):
        layer, trajectory = getattr(task, name), monitor.trajectories[name]
        assert len(trajectory.resorts) == sum(m.population.owner is layer for m in events) > 0
        assert trajectory.tau == witness.rows[name]
        assert trajectory.who == witness.slots[name][-1]
        assert trajectory.steps == list(range(21))
        slots = witness.slots[name]
        assert trajectory.resorts == [step for step in range(1, 21) if slots[step] != slots[step - 1]]


def test_another_model_in_the_process_is_not_counted(tmp_path):
    class Meddle(Callback):
        def on_train_batch_end(self, *args):
            MeanFieldSequential(*(_branch(i) for i in range(3))).set_tau_([3.0, 2.0, 1.0])
            args[1].first.set_tau_(args[1].first.tau.detach().flip(0))  # by hand: followed, but no re-sort

    monitor, witness = MeanFieldMonitor(1, plot=False, keep=True), Witness()
    _fit(tmp_path, Meddle(), monitor, witness, task=Task(tau_lr=0.0), epochs=1, batches=5)
    assert monitor.resorts == 0
    assert monitor.trajectories["first"].tau == witness.rows["first"]
    assert monitor.trajectories["first"].who == [4, 3, 2, 1, 0]  # five times round


def test_every_logger_gets_positions_steps_and_counts(tmp_path):
    loggers = [CSVLogger(tmp_path, "a"), CSVLogger(tmp_path, "b")]
    monitor = MeanFieldMonitor(every_n_steps=5)
    _, task = _fit(tmp_path, monitor, logger=loggers)
    for logger in loggers:
        with open(f"{logger.log_dir}/metrics.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["resorts/total"]]
        assert [int(row["step"]) for row in rows] == [0, 5, 10, 15, 20]
        for layer, n in (("first", 5), ("second", 3)):
            for row in rows:
                tau = [float(row[f"tau/{layer}/{i}"]) for i in range(n)]
                steps = [float(row[f"step/{layer}/{i}"]) for i in range(n)]
                assert tau == sorted(tau)
                assert steps == pytest.approx([b - a for a, b in zip([0.0, *tau[:-1]], tau, strict=True)], abs=1e-6)
            assert tau == pytest.approx(getattr(task, layer).tau.tolist())
            assert float(rows[-1][f"resorts/{layer}"]) == len(monitor.trajectories[layer].resorts)
        assert float(rows[-1]["resorts/total"]) == monitor.resorts
    assert (tmp_path / "a" / "version_0" / "tau.png").exists()


class Forces(Callback):
    """Gradient and potential of every particle, in each step: by its name, and by its place in time."""

    def __init__(self):
        self.named, self.placed = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.named.append({})
        self.placed.append({})
        for name in ("first", "second"):
            layer = getattr(pl_module, name)
            tau, grad = layer.tau_axis.positions().tolist(), layer.tau_axis.offset.grad.tolist()
            n = len(tau)
            order = sorted(range(n), key=lambda slot: max(0.0, tau[slot]))
            potential = {}
            for place, slot in enumerate(order):
                step = max(0.0, tau[slot]) - (max(0.0, tau[order[place - 1]]) if place else 0.0)
                potential[slot] = step * sum(grad[later] for later in order[place:])  # all that move with this step
            who = [int(branch.name) for branch in layer]
            self.named[-1][name] = {who[slot]: (grad[slot], potential[slot]) for slot in range(n)}
            self.placed[-1][name] = [(grad[slot], potential[slot]) for slot in order]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_and_potentials_are_those_of_the_step_that_led_there(tmp_path, accumulate):
    monitor, forces, logger = MeanFieldMonitor(2, keep=True), Forces(), CSVLogger(tmp_path, "a")
    _fit(tmp_path, forces, monitor, logger=logger, accumulate_grad_batches=accumulate)
    assert monitor.resorts > 5
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file) if row["resorts/total"]}
    last = 20 // accumulate
    assert list(rows) == list(range(0, last + 1, 2))
    for name, n in (("first", 5), ("second", 3)):
        trajectory = monitor.trajectories[name]
        assert trajectory.grad[0] is trajectory.potential[0] is None  # before the first step
        assert not rows[0][f"tau_grad/{name}/0"]
        for k, step in enumerate(range(2, last + 1, 2), 1):
            named, placed = forces.named[step - 1][name], forces.placed[step - 1][name]
            assert trajectory.grad[k] == pytest.approx([named[i][0] for i in range(n)])
            assert trajectory.potential[k] == pytest.approx([named[i][1] for i in range(n)], abs=1e-6)
            logged = [[float(rows[step][f"{key}/{name}/{i}"]) for i in range(n)] for key in ("tau_grad", "potential")]
            assert logged[0] == pytest.approx([g for g, _ in placed])
            assert logged[1] == pytest.approx([v for _, v in placed], abs=1e-6)


def test_out_of_order_slots_have_gradients_but_no_potentials(tmp_path):
    task, monitor, forces = Task(), MeanFieldMonitor(1, plot=False, keep=True), Forces()
    set_automatic_resort(task, False)
    _fit(tmp_path, monitor, forces, task=task)
    assert monitor.trajectories["first"].potential == [None] * 21
    assert monitor.trajectories["first"].grad[-1] == pytest.approx([forces.named[-1]["first"][i][0] for i in range(5)])


def test_tensors_are_read_on_recorded_steps_only_and_gradients_only_for_someone(tmp_path, monkeypatch):
    reads = []
    read = TauAxis.read
    monkeypatch.setattr(TauAxis, "read", lambda axis: reads.append(sys._getframe(1).f_code.co_name) or read(axis))
    for kwargs, places in (({"plot": False}, []), ({}, ["record"]), ({"keep": True}, ["_read_forces", "record"])):
        reads.clear()
        _fit(tmp_path, MeanFieldMonitor(5, **kwargs), task=Task(tau_lr=0.0))
        mine = sorted(name for name in reads if name in ("_read_forces", "record"))
        # two layers, four steps, and the beginning, when there is no gradient
        assert mine == [p for p in places for _ in range(8 if p == "_read_forces" else 10)]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")  # the resumed run saves nothing
def test_a_resumed_run_continues_trajectories_and_counts(tmp_path):
    whole = MeanFieldMonitor(1, plot=False, keep=True)
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    _fit(tmp_path, whole, kept, enable_checkpointing=True)
    half = tmp_path / "epoch=0.ckpt"
    torch.load(half, weights_only=True)  # refuses anything but plain data
    resumed = MeanFieldMonitor(1, plot=False, keep=True)
    _fit(tmp_path, resumed, ckpt_path=half)
    assert resumed.state_dict() == whole.state_dict()
    assert 0 < len([s for s in whole.trajectories["first"].resorts if s <= 10]) < whole.resorts


def test_without_logger_and_plot_nothing_is_read_but_re_sorts_are_counted(tmp_path, monkeypatch):
    monitor = MeanFieldMonitor(1, plot=False)
    events, task = [], Task()
    monkeypatch.setattr(monitor, "on_fit_end", lambda *args: None)
    with subscribe(events.append, model=task):
        _fit(tmp_path, monitor, task=task)
    assert monitor.resorts == len(events) > 0
    assert all(not trajectory.steps for trajectory in monitor.trajectories.values())


def test_the_vanilla_twin_is_left_alone(tmp_path):
    monitor, logger = MeanFieldMonitor(1), CSVLogger(tmp_path, "vanilla")
    _fit(tmp_path, monitor, task=Task(learn_tau=False), logger=logger)
    assert monitor.trajectories == {}
    assert not list(tmp_path.rglob("tau.png"))
    assert not list(tmp_path.rglob("metrics.csv"))


def test_with_automatic_re_sorting_off_the_slots_are_the_particles(tmp_path):
    task, monitor, witness = Task(), MeanFieldMonitor(1, plot=False, keep=True), Witness()
    set_automatic_resort(task, False)
    _fit(tmp_path, monitor, witness, task=task)
    assert monitor.resorts == 0
    assert monitor.trajectories["first"].tau == witness.rows["first"]
    assert any(row != sorted(row) for row in witness.rows["first"])


def test_a_run_that_fails_leaves_no_subscriber(tmp_path):
    class Fail(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("stop here")

    task, monitor = Task(tau_lr=0.0), MeanFieldMonitor(1, plot=False)
    with pytest.raises(RuntimeError, match="stop here"):
        _fit(tmp_path, monitor, Fail(), task=task)
    who = list(monitor.trajectories["first"].who)
    task.first.set_tau_(task.first.tau.detach().flip(0))
    assert monitor.trajectories["first"].who == who


def test_accumulated_batches_count_as_one_step(tmp_path):
    monitor = MeanFieldMonitor(1, plot=False, keep=True)
    _fit(tmp_path, monitor, epochs=1, batches=8, accumulate_grad_batches=2)
    assert monitor.trajectories["first"].steps == [0, 1, 2, 3, 4]


def test_an_interval_below_one_is_refused():
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        MeanFieldMonitor(every_n_steps=0)


def test_the_package_imports_without_lightning():
    heavy = "[m for m in sys.modules if m.split('.')[0] in ('lightning', 'matplotlib')]"
    program = f"import sys, torch_meanfield; print({heavy})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
