"""Whether a model is prepared for quantisation-aware training, which no proof in double precision can follow."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList


def fake_quantiser(model: nn.Module) -> str | None:
    """The first module of quantisation-aware training in ``model``, outside of parametrizations; ``None`` if none is.

    By the name of its class, as in ``torch.ao.quantization`` and torchao: importing either takes long.
    """
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, ParametrizationList):
            inside.update(id(m) for m in module.modules())
        elif "FakeQuant" in type(module).__name__ and id(module) not in inside:
            return f"{name or 'the model'} ({type(module).__name__})"
    return None
