"""Depth after training: what each residual block is worth, and a network with fewer of them.

In: a model with mean-field layers (or one that can be converted), batches. Out: scores, and the same model, shorter.
Neurons are not known here; blocks are moved by ``particles/`` and lose their times by ``depth/``.
"""

from torch_meanfield.pruning.prune import prune_depth_ as prune_depth_
from torch_meanfield.pruning.report import PruneReport as PruneReport
from torch_meanfield.pruning.scores import DepthScores as DepthScores
from torch_meanfield.pruning.scores import depth_scores as depth_scores
