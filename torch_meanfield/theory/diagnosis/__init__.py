"""``diagnose``: what the theory says of a given network on a given batch."""

from torch_meanfield.theory.diagnosis.parts import Finding as Finding
from torch_meanfield.theory.diagnosis.parts import Kernel as Kernel
from torch_meanfield.theory.diagnosis.parts import Layer as Layer
from torch_meanfield.theory.diagnosis.parts import Particles as Particles
from torch_meanfield.theory.diagnosis.report import Diagnosis as Diagnosis
from torch_meanfield.theory.diagnosis.run import diagnose as diagnose
