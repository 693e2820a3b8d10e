"""The width wing: neurons as exchangeable particles that die and are born at fixed population.

In: a model and its optimizer. Out: the same optimizer, with events.
The depth wing is not known here: blocks are whatever resamples itself.
"""

from torch_meanfield.particles.neurons import Neurons as Neurons
from torch_meanfield.particles.neurons import neurons_from as neurons_from
from torch_meanfield.width.optimizer.wrapper import BirthDeathOptimizer as BirthDeathOptimizer
from torch_meanfield.width.search.find import Report as Report
from torch_meanfield.width.search.find import find_populations as find_populations
from torch_meanfield.width.search.proof import verify as verify
from torch_meanfield.width.search.prover import Verdict as Verdict
from torch_meanfield.width.turnover.event import Event as Event
