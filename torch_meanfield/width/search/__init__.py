"""Finding populations of neurons in a model, and proving that they are exchangeable.

In: a model and an example. Out: proven populations, and candidates that were refused, with the reason.
When units die, and the optimizer, are not known here.
"""

from torch_meanfield.width.search.candidates import Refused as Refused
from torch_meanfield.width.search.find import Report as Report
from torch_meanfield.width.search.find import find_populations as find_populations
from torch_meanfield.width.search.join import elementwise as elementwise
from torch_meanfield.width.search.join import product as product
from torch_meanfield.width.search.labels import Ledger as Ledger
from torch_meanfield.width.search.labels import Tracks as Tracks
from torch_meanfield.width.search.proof import verify as verify
from torch_meanfield.width.search.prover import Verdict as Verdict
from torch_meanfield.width.search.reparametrised import Reparametrised as Reparametrised
from torch_meanfield.width.search.rules import Rule as Rule
from torch_meanfield.width.search.rules import rule_for as rule_for
