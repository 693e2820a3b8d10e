"""The depth wing for existing models: ``convert`` a backbone, fine-tune it, and ``fold`` it back to plain weights."""

from torch_meanfield.convert.conversion import convert as convert
from torch_meanfield.convert.fold import fold as fold
from torch_meanfield.convert.report import conversion_report as conversion_report
from torch_meanfield.convert.stage import ConvertedStage as ConvertedStage
