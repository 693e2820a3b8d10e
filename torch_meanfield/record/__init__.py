"""What happened to the particles over a training, as data and as pictures, for any training loop.

In come a model with mean-field layers or a ``BirthDeathOptimizer``, and numbers of steps; out go lists of plain
numbers and figures. The room must not know any trainer (Lightning, Accelerate, ...), and matplotlib only as it draws.
"""

from torch_meanfield.record.birth_record import BirthRecord as BirthRecord
from torch_meanfield.record.birth_recorder import BirthRecorder as BirthRecorder
from torch_meanfield.record.plot_births import plot_births as plot_births
from torch_meanfield.record.plot_tau import plot_tau as plot_tau
from torch_meanfield.record.tau_recorder import TauRecorder as TauRecorder
from torch_meanfield.record.trajectories import Trajectory as Trajectory
