"""What happened to the particles over a training, as data and as pictures, for any training loop."""

from torch_meanfield.record.plot_births import plot_births as plot_births
from torch_meanfield.record.plot_tau import plot_tau as plot_tau
from torch_meanfield.record.trajectories import Trajectory as Trajectory
from torch_meanfield.record.turnover import Turnover as Turnover
