"""Checkpoints that are written whole or not at all, and what a full disk looks like."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, the largest file allowed


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, each written beside its place and then moved into it.

    Lightning's own go by way of the system's folder for temporary files: from another disk the last step is a copy,
    and a copy that finds no room destroys the checkpoint it was to replace.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``, a path of this machine's file system.

        Raises:
            OSError: It could not be written; what was at ``path`` is still there.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def out_of_room(error: BaseException) -> OSError | None:
    """The error of the file system behind ``error`` that says that there is no room, if there is one."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in NO_ROOM:
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
