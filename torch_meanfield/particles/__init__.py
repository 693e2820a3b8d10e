"""The foundation: exchangeable particles and the one operation ``new[i] = old[index[i]]``.

In: tensors, an index, optimizers. Out: what particles own, moved in place, and a published :class:`Motion`.
What a particle is for, a block or a neuron, is not known here.
"""

import sys

from torch_meanfield.particles import no_compile, slices
from torch_meanfield.particles.averages import follow as follow
from torch_meanfield.particles.events import Motion as Motion
from torch_meanfield.particles.events import subscribe as subscribe
from torch_meanfield.particles.loading import load_whole_ as load_whole_
from torch_meanfield.particles.neurons import Neurons as Neurons
from torch_meanfield.particles.neurons import neurons_from as neurons_from
from torch_meanfield.particles.placing import place_ as place_
from torch_meanfield.particles.population import Population as Population
from torch_meanfield.particles.population import Slice as Slice
from torch_meanfield.particles.population import Stack as Stack
from torch_meanfield.particles.transport import transport_ as transport_

# What the two modules were called in 0.1.
eagerly, rows = no_compile, slices
sys.modules |= {f"{__name__}.eagerly": no_compile, f"{__name__}.rows": slices}
