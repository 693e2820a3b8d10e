"""The depth wing: residual branches as particles, each with a time tau (Lu et al. 2020).

In: branches and their times. Out: a layer whose slots stay in the order of tau, and the potential of each.
Neurons, whole networks and optimizers that wrap others are not known here.
"""

from torch_meanfield.depth.control import resort_ as resort_
from torch_meanfield.depth.control import set_automatic_resort as set_automatic_resort
from torch_meanfield.depth.groups import param_groups as param_groups
from torch_meanfield.depth.sequential import MeanFieldSequential as MeanFieldSequential
