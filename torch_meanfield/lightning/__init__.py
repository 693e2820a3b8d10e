"""Callbacks for any Lightning project (``pip install torch-meanfield[lightning]``); not imported by the package.

In: a trainer. Out: logs, records and pictures (thin over ``record/``), and exact resumption (``resume/``).
How anything is decided or moved is not known here.
"""

import sys

try:
    import lightning.pytorch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "torch_meanfield.lightning needs Lightning, which is not installed: pip install 'torch-meanfield[lightning]'",
        name=error.name,
    ) from error

from torch_meanfield.lightning.births import BirthDeathMonitor as BirthDeathMonitor
from torch_meanfield.lightning.monitor import MeanFieldMonitor as MeanFieldMonitor
from torch_meanfield.lightning.resume.exact_resume import ExactResume as ExactResume
from torch_meanfield.lightning.resume.newest import newest_checkpoint as newest_checkpoint
from torch_meanfield.record import Trajectory as Trajectory
from torch_meanfield.record import plot_births as plot_births
from torch_meanfield.record import plot_tau as plot_tau
from torch_meanfield.record.birth_record import Turnover as Turnover

# Modules that were in this room in version 0.1, under the names they had.
_MOVED = {
    "lightning.resume.": "ends exact_resume generators means newest own_buffers plain_names replay",
    "record.": "plot_births trajectories",
    "record.plot_tau": "plot",
    "record.birth_record": "turnover",
}
for _new, _names in _MOVED.items():
    for _name in _names.split():
        _module = sys.modules[f"torch_meanfield.{_new}{_name if _new.endswith('.') else ''}"]
        sys.modules[f"{__name__}.{_name}"] = _module
        globals().setdefault(_name, _module)
