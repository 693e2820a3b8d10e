"""The column ``cut`` of the zoo's table: a third of a model's blocks cut, folded, and loaded into a plain model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tools.zoo import flat, loosen_, on_smallest_input


def cut(build: Callable[..., Any], shapes: Sequence[tuple[int, ...]]) -> str:
    """What makes the plain network of the depth that is left, ``create_model`` or ``class``; else what went wrong.

    Steps are random, and the outputs of the folded and of the loaded network equal bit for bit.
    """
    import torch

    from torch_meanfield import conversion_report, convert, fold, prune_depth_

    torch.manual_seed(0)
    model, examples, _ = on_smallest_input(build, shapes)
    loosen_(model)
    try:
        convert(model, examples[:1])
    except ValueError:
        return ""  # on request, and not to be folded
    steps = torch.Generator().manual_seed(2)
    for stage in conversion_report(model):
        stage.module.set_tau_((torch.rand(len(stage.module), generator=steps) + 0.5).cumsum(0))
    names = [parts[0] for stage in conversion_report(model) for parts in stage.particles]
    report = prune_depth_(model, remove={*(names[1::3] or names[:1])})
    folded = fold(model)
    if report.constructor is None:
        return "no constructor"
    plain = report.constructor().eval()
    plain.load_state_dict(folded.state_dict(), strict=True)
    with torch.no_grad():
        same = torch.equal(flat(plain(examples)), flat(folded.eval()(examples)))
    if not same:
        return "outputs differ"
    return "create_model" if "create_model" in str(report.constructor) else "class"
