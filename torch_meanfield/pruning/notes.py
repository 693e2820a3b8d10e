"""What a removal leaves to be done, or to be known, in words."""

from __future__ import annotations

from torch import nn

from torch_meanfield._torch import is_batch_norm
from torch_meanfield.convert.report import RECORD
from torch_meanfield.pruning.refusals import captured_graphs
from torch_meanfield.pruning.report import Constructor


def notes_on(
    model: nn.Module, difference: float | None, constructor: Constructor | None, norms: int
) -> tuple[str, ...]:
    """All that applies to ``model`` as it is now."""
    notes = []
    if difference is not None and not difference <= 1e-5:
        notes.append(
            f"the removed blocks did more than add to the stream: outputs differ by {difference:.1e} from those at "
            f"step 0"
        )
    if not norms and any(is_batch_norm(type(m)) for m in model.modules()):
        notes.append("batch norms hold the statistics of the deeper network; pass batches=, or call update_bn")
    if any("droppath" in type(m).__name__.lower() or "stochasticdepth" in type(m).__name__.lower()
           for m in model.modules()):  # fmt: skip
        notes.append(
            "drop-path rates are those of the places: the first of the old depth, where a network made with fewer "
            "blocks spreads them anew"
        )
    if constructor is None and any(RECORD in m.__dict__ for m in model.modules()):
        notes.append("no constructor is known for this depth: save or export the module that fold(model) returns")
    if captured_graphs():
        notes.append("a CUDA graph is alive: if it was captured from this model, capture it anew")
    return tuple(notes)
