"""Width: neurons as exchangeable particles."""

from torch_meanfield.width.discover import Report as Report
from torch_meanfield.width.discover import find_populations as find_populations
from torch_meanfield.width.dynamics import Event as Event
from torch_meanfield.width.neurons import Neurons as Neurons
from torch_meanfield.width.neurons import neurons_from as neurons_from
from torch_meanfield.width.optimizer import BirthDeathOptimizer as BirthDeathOptimizer
from torch_meanfield.width.proof import Verdict as Verdict
from torch_meanfield.width.proof import verify as verify
