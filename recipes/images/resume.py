"""Whether the configuration of a resumed training is that of the run it continues."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from recipes.errors import BadInput

GROUPS = ("seed_everything", "model", "data")
# What changes where and how fast a training runs, and not what it computes. The trainer's options may change too.
MAY_CHANGE = frozenset(
    {
        *("data.root", "data.workers", "data.eval_batch_size", "data.memory_limit_gib", "data.resident", "data.label"),
        *("model.compile", "model.channels_last"),
        *("model.pretrained", "model.checkpoint", "model.new_head"),  # overwritten by the checkpoint
    }
)


def check_same_run(checkpoint: Path, now: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse to continue a run under another configuration than the one in its folder.

    A checkpoint that does not lie in the folder of a run is none of this function's business.

    Args:
        checkpoint: The file to resume from, ``RUN/checkpoints/NAME.ckpt``.
        now: The configuration given, in groups as in ``RUN/config.yaml``.
        defaults: Defaults of all options, for those that the version of the run did not know yet.

    Raises:
        BadInput: Options differ; they are named.
    """
    kept = checkpoint.resolve().parent.parent / "config.yaml"
    if not kept.is_file():
        return
    try:
        then = yaml.safe_load(kept.read_text())
        then = {**_flat(defaults), **_flat({group: then[group] for group in GROUPS})}
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise BadInput(
            f"--ckpt_path {checkpoint}: {kept} beside it is not the configuration of a run ({type(error).__name__}); "
            f"restore it, or copy the checkpoint out of the folder to resume it under any configuration"
        ) from error
    ours = {**_flat(defaults), **_flat(now)}
    differing = [k for k in sorted(ours.keys() | then.keys()) if k not in MAY_CHANGE and ours.get(k) != then.get(k)]
    if differing:
        shown = ", ".join(f"{k} {then.get(k)!r} there and {ours.get(k)!r} here" for k in differing[:5])
        more = f", and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise BadInput(
            f"--ckpt_path {checkpoint} is of a run of another configuration: {shown}{more}; resume it with --config "
            f"{kept}, or begin a new run without --ckpt_path"
        )


def _flat(group: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options of :data:`GROUPS` by dotted name."""
    out: dict[str, Any] = {}
    for key, value in group.items():
        if not prefix and key not in GROUPS:
            continue
        name = f"{prefix}{key}"
        out |= _flat(value, f"{name}.") if isinstance(value, Mapping) and not prefix else {name: value}
    return out
