"""Mean-field theory of neural networks as PyTorch tools: layers and optimizers over exchangeable particles."""

from torch_meanfield.convert import conversion_report as conversion_report
from torch_meanfield.convert import convert as convert
from torch_meanfield.convert import fold as fold
from torch_meanfield.depth import MeanFieldSequential as MeanFieldSequential
from torch_meanfield.depth import param_groups as param_groups
from torch_meanfield.depth import resort_ as resort_
from torch_meanfield.depth import set_automatic_resort as set_automatic_resort
from torch_meanfield.models import MeanFieldResNet as MeanFieldResNet
from torch_meanfield.particles import Motion as Motion
from torch_meanfield.particles import Neurons as Neurons
from torch_meanfield.particles import Population as Population
from torch_meanfield.particles import Slice as Slice
from torch_meanfield.particles import Stack as Stack
from torch_meanfield.particles import follow as follow
from torch_meanfield.particles import subscribe as subscribe
from torch_meanfield.particles import transport_ as transport_
from torch_meanfield.pruning import DepthScores as DepthScores
from torch_meanfield.pruning import PruneReport as PruneReport
from torch_meanfield.pruning import depth_scores as depth_scores
from torch_meanfield.pruning import prune_depth_ as prune_depth_
from torch_meanfield.width import BirthDeathOptimizer as BirthDeathOptimizer
from torch_meanfield.width import find_populations as find_populations
from torch_meanfield.width import verify as verify

__version__ = "0.1.0"
