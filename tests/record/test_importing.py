"""Records need neither Lightning nor, before they are drawn, matplotlib."""

import subprocess
import sys

PLAIN = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name.split(".")[0] in {"lightning", "matplotlib"} else find(name, path, target)
)
import torch
from torch_meanfield import MeanFieldSequential
from torch_meanfield.record import BirthRecord, TauRecorder, plot_births, plot_tau

model = MeanFieldSequential(*(torch.nn.Linear(2, 2) for _ in range(2)), horizon=1.0)
recorder = TauRecorder(model)
recorder.record(0)
record = BirthRecord(2)
record.due(1, 0, [0.0, 1.0])
for draw in (lambda: plot_tau(recorder.trajectories), lambda: plot_births({"hidden": record})):
    try:
        draw()
    except ImportError as error:
        print(error)
"""


def test_records_are_made_without_lightning_and_pictures_name_the_extra():
    out = subprocess.run([sys.executable, "-c", PLAIN], check=True, capture_output=True, text=True).stdout
    assert out.splitlines() == [
        f"{name} needs matplotlib, which is not installed: pip install 'torch-meanfield[plot]'"
        for name in ("plot_tau", "plot_births")
    ]
