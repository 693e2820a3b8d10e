"""Resuming a Lightning training exactly: bit for bit the run that was never interrupted.

In: a trainer and its newest checkpoint. Out: the same run, with its order of data, generators and averages.
What is trained and what is recorded is not known here.
"""

from torch_meanfield.lightning.resume.exact_resume import ExactResume as ExactResume
from torch_meanfield.lightning.resume.newest import newest_checkpoint as newest_checkpoint
