"""Observing one eager forward pass: what the searches for neurons and for residual branches have in common.

In: a model and an example. Out: the calls of torch functions, one by one.
What is looked for in them is not known here.
"""

from torch_meanfield.observe.observer import Call as Call
from torch_meanfield.observe.observer import Observer as Observer
from torch_meanfield.observe.observer import anew as anew
from torch_meanfield.observe.observer import map_tensors as map_tensors
from torch_meanfield.observe.observer import observe as observe
from torch_meanfield.observe.observer import run as run
from torch_meanfield.observe.observer import tensors_in as tensors_in
from torch_meanfield.observe.observer import undisturbed as undisturbed
from torch_meanfield.observe.precision import InDouble as InDouble
from torch_meanfield.observe.private import left_out as left_out
from torch_meanfield.observe.private import private_copy as private_copy
from torch_meanfield.observe.quantised import fake_quantiser as fake_quantiser
