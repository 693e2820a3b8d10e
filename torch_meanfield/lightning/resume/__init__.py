"""Resuming a Lightning training exactly: bit for bit the run that was never interrupted."""

from torch_meanfield.lightning.resume.exact_resume import ExactResume as ExactResume
from torch_meanfield.lightning.resume.newest import newest_checkpoint as newest_checkpoint
