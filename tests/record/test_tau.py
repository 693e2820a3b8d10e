"""Positions recorded in a plain loop are those of the callback."""

import torch
from lightning.pytorch.loggers import CSVLogger

from tests.lightning.test_monitor import Task, _fit
from tests.record.test_births import Batches
from torch_meanfield.lightning import MeanFieldMonitor
from torch_meanfield.record import TauRecorder, Trajectory


def test_a_plain_loop_gives_the_record_of_the_callback(tmp_path):
    monitor, seen, logger = MeanFieldMonitor(2, plot=False, keep=True), Batches(), CSVLogger(tmp_path)
    logged = []
    logger.log_metrics = lambda metrics, step=None: logged.append((step, metrics))
    _fit(tmp_path, monitor, seen, logger=logger)
    task, mine = Task(), []
    optimizer = task.configure_optimizers()
    with TauRecorder(task) as recorder:
        recorder.record(0)
        mine.append((0, recorder.metrics()))
        for step, batch in enumerate(seen.batches, 1):
            optimizer.zero_grad()
            task.training_step(batch, step).backward()
            recorder.before_step(step, forces=step % 2 == 0)
            optimizer.step()
            if step % 2 == 0:
                recorder.record(step)
                mine.append((step, recorder.metrics()))
    assert {name: t.state_dict() for name, t in recorder.trajectories.items()} == monitor.state_dict()
    assert mine == [(step, values) for step, values in logged if "resorts/total" in values]
    assert recorder.resorts == monitor.resorts > 5 and recorder.last == 20


def test_nothing_is_followed_after_the_end():
    task = Task()
    with TauRecorder(task) as recorder:
        assert recorder.metrics() == {} and recorder.last == -1
    task.first.set_tau_(task.first.tau.detach().flip(0))
    assert recorder.trajectories["first"].who == list(range(5))


def test_trajectories_are_continued_where_the_layer_is_the_same():
    known = {"first": Trajectory(5), "second": Trajectory(4), "gone": Trajectory(2)}
    recorder = TauRecorder(Task(), known)
    assert recorder.trajectories.keys() == {"first", "second"}
    assert recorder.trajectories["first"] is known["first"]
    assert len(recorder.trajectories["second"].who) == 3
    recorder.record(3)
    assert recorder.trajectories["first"].steps == [3]
    recorder.record(3)
    assert recorder.trajectories["first"].steps == [3] and torch.tensor(known["first"].tau).shape == (1, 5)
