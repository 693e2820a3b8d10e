"""Callbacks for any Lightning project (``pip install torch-meanfield[lightning]``); not imported by the package."""

from torch_meanfield.lightning.monitor import MeanFieldMonitor as MeanFieldMonitor
from torch_meanfield.lightning.plot import plot_tau as plot_tau
from torch_meanfield.lightning.trajectories import Trajectory as Trajectory
