"""Which checkpoint to resume from after a crash that may have torn the last one."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from pathlib import Path


def newest_checkpoint(folder: str | os.PathLike[str], pattern: str = "*.ckpt") -> Path | None:
    """The file in ``folder`` that was written last and is whole, to be given to ``Trainer.fit(ckpt_path=...)``.

    A file written by ``torch.save`` is an archive with a check sum for each of its records. All of them are compared,
    so a file that was cut off, or whose content was changed on the disk, is not taken. Nothing is unpickled.

    Args:
        folder: folder that holds the checkpoints; it need not exist.
        pattern: pattern of their names, as in :meth:`pathlib.Path.glob`; ``**/*.ckpt`` looks into all folders below.

    Returns:
        The path; ``None`` if no file is whole.

    Warns:
        UserWarning: a newer file is not whole; it is named.
    """
    files = [path for path in Path(folder).glob(pattern) if path.is_file()]
    for path in sorted(files, key=_age, reverse=True):
        reason = _torn(path)
        if reason is None:
            return path
        warnings.warn(f"{path} is not whole ({reason}); an earlier checkpoint is taken, if there is one", stacklevel=2)
    return None


def _age(path: Path) -> tuple[int, list[int | str]]:
    """When it was written; of two at one tick of the disk's clock, ``step=10`` comes after ``step=9``."""
    return path.stat().st_mtime_ns, [int(s) if s.isdecimal() else s for s in re.split(r"([0-9]+)", str(path))]


def _torn(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        return str(error) or type(error).__name__
    return None if record is None else f"the check sum of {record} does not agree"
