"""The record of births and deaths, in a plain loop beside the callback, and its picture."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from tests.lightning.test_births import Task, _digits, _fit
from torch_meanfield.lightning import BirthDeathMonitor
from torch_meanfield.record import BirthRecord, BirthRecorder, plot_births


class Batches(Callback):
    """The batches of a training, in order."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append([t.clone() for t in batch])


@pytest.mark.parametrize("kwargs", [{}, {"births": "split"}, {"example": False, "every": 1, "reinject": 0.5}])
def test_a_plain_loop_gives_the_record_of_the_callback(tmp_path, kwargs):
    monitor, seen = BirthDeathMonitor(plot=False, keep=True), Batches()
    _fit(tmp_path, monitor, seen, task=Task(**kwargs))
    task = Task(**kwargs)
    optimizer = task.configure_optimizers()
    with BirthRecorder(optimizer) as recorder:
        for step, batch in enumerate(seen.batches, 1):
            optimizer.zero_grad()
            task.training_step(batch, step).backward()
            recorder.before_step(step)
            optimizer.step()
    assert monitor.killed == recorder.killed > 0
    assert {n: r.state_dict() for n, r in recorder.records.items()} == monitor.state_dict()
    assert recorder.metrics()["birth_death/killed/total"] == recorder.killed
    assert recorder.last == 20
    assert len(optimizer._callbacks) == 1  # the task's own


def test_a_step_that_was_not_announced_is_recorded_as_it_ends():
    task = Task(reinject=0.5)
    optimizer = task.configure_optimizers()
    x, y = _digits()[:32]
    recorder = BirthRecorder(optimizer)
    assert recorder.metrics() == {} and recorder.last == -1
    for _ in range(5):
        optimizer.zero_grad()
        task.training_step((x, y), 0).backward()
        optimizer.step()
    assert recorder.killed == sum(len(set(range(e.population.size)) - _survivors(e)) for e in task.events) > 0
    recorder.close()


def _survivors(event):
    return {source for place, source in enumerate(event.index.tolist()) if place not in event.born.tolist()}


def test_populations_of_one_name_are_told_apart():
    recorder = BirthRecorder()
    same = [SimpleNamespace(name="hidden") for _ in range(3)]
    assert [recorder._name(p) for p in [*same, *same]] == ["hidden", "hidden (2)", "hidden (3)"] * 2


def _turnover(killed, n=4):
    turnover = BirthRecord(n)
    for step, k in enumerate(killed, 1):
        turnover.due(step, 0, [-1.0, 0.0, 0.0, 1.0])
        turnover.happened(torch.arange(n), torch.arange(k))
    return turnover


def test_the_picture_sums_up(tmp_path):
    figure = plot_births({"one": _turnover([1, 0, 2]), "two": _turnover([0, 0, 0])}, title="a title")
    over_time, histogram = figure.axes
    assert [line.get_ydata().tolist() for line in over_time.lines] == [[0, 1, 1, 3], [0, 0, 0, 0]]
    assert over_time.get_title() == "3 units replaced: 3 drawn anew, 0 copies"
    assert [text.get_text() for text in over_time.get_legend().get_texts()] == [
        "one: 3 of 4 units",
        "two: 0 of 4 units",
    ]
    heights = histogram.patches[0].get_xy()[:, 1]
    assert sorted({round(float(h), 6) for h in heights}) == [0.0, 0.25, 0.5]
    figure.savefig(tmp_path / "births.png")


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="turnovers is empty"):
        plot_births({})
    with pytest.raises(ValueError, match="the record of 'new' is empty"):
        plot_births({"new": BirthRecord(3)})


def test_a_unit_copied_twice_leaves_two_dead():
    turnover = BirthRecord(5)
    turnover.due(1, 0, [0.0] * 5)
    turnover.happened(torch.tensor([0, 0, 0, 3, 4]), torch.tensor([4]))
    assert (turnover.killed, turnover.born, turnover.cloned) == ([3], [1], [2])
