"""Callbacks for any Lightning project (``pip install torch-meanfield[lightning]``); not imported by the package."""

from torch_meanfield.lightning.births import BirthDeathMonitor as BirthDeathMonitor
from torch_meanfield.lightning.monitor import MeanFieldMonitor as MeanFieldMonitor
from torch_meanfield.lightning.resume.exact_resume import ExactResume as ExactResume
from torch_meanfield.lightning.resume.newest import newest_checkpoint as newest_checkpoint
from torch_meanfield.record.plot_births import plot_births as plot_births
from torch_meanfield.record.plot_tau import plot_tau as plot_tau
from torch_meanfield.record.trajectories import Trajectory as Trajectory
from torch_meanfield.record.turnover import Turnover as Turnover
