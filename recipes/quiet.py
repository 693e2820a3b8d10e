"""Messages of Lightning that say nothing to the user of these recipes."""

from __future__ import annotations

import logging
import warnings

HARMLESS = (
    "WeightAveraging callback with a model that overrides",  # averages of a divided model are refused here
    "does not have many workers",  # images in memory need none: a batch is one indexing operation
    "callbacks used to create the checkpoint",  # `validate` and `test` leave out those of training
    "The dirpath has changed",  # a resumed run has a folder of its own; the curve is whole in both
    "`isinstance.treespec, LeafSpec",  # Lightning's own use of a function that torch has deprecated
)


def quieten(chatter: bool = False) -> None:
    """Hide harmless warnings, and Lightning's announcements: the seed's, or with ``chatter`` all of them."""
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=f".*{message}")
    # The seed is in config.yaml and run.json; announced before an error, it would make the error two lines.
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    if chatter:
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
