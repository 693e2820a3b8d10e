"""The depth wing for existing models: ``convert`` a backbone, fine-tune it, and ``fold`` it back to plain weights.

In comes a model and an input that it runs on; out goes the same model with tau axes beside its blocks, and a report.
The room must not know any architecture, library of models or optimizer, nor the width wing; it knows torch's functions
(through ``observe``) and mean-field layers (through ``depth``).
"""

from torch_meanfield.convert.convert import convert as convert
from torch_meanfield.convert.fold import fold as fold
from torch_meanfield.convert.report import conversion_report as conversion_report
from torch_meanfield.convert.stage import ConvertedStage as ConvertedStage
