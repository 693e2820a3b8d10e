"""``timm.create_model("meanfield_resnet20")`` and its siblings, once this module is imported. It needs timm.

    >>> import timm
    >>> import torch_meanfield.models.timm
    >>> timm.create_model("meanfield_resnet20", num_classes=7)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 7])

timm's own model tests pass for them, but for those of ``torch.fx`` and ``torch.jit.script``, and of pretrained weights,
which do not exist.

A training script need not be edited: something must import this before it makes its model. timm's own ``train.py``
does so with ``--device-modules``, which imports whatever modules it is given::

    python train.py DATA --model meanfield_resnet20 --device-modules torch_meanfield.models.timm

and any other script by being run from a process that has imported it::

    python -c "import runpy, torch_meanfield.models.timm; runpy.run_path('train.py', run_name='__main__')" ARGUMENTS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "torch_meanfield.models.timm needs timm, which is not installed: pip install 'torch-meanfield[timm]'",
        name=error.name,
    ) from error

from torch_meanfield.models.resnet import MeanFieldResNet

_VARIANTS: dict[str, dict[str, Any]] = {
    **{f"meanfield_resnet{depth}": {"depth": depth} for depth in (20, 32, 44, 56, 110)},
    "meanfield_resnet164": {"depth": 164, "block": "bottleneck"},
    "meanfield_resnext29_8x64d": {"depth": 29, "block": "resnext", "cardinality": 8},
    "meanfield_resnext29_16x64d": {"depth": 29, "block": "resnext", "cardinality": 16},
}

# CIFAR statistics; no pretrained weights are published.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "url": "",
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": (8, 8),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2616),
            "first_conv": "stem",
            "classifier": "fc",
        }
        for name in _VARIANTS
    }
)


def _entrypoint(name: str, config: dict[str, Any]) -> Callable[..., Any]:
    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        features = {"feature_cls": "getter", "out_indices": (0, 1, 2)}
        given = {k: v for k, v in config.items() if k != "depth" or kwargs.get("blocks") is None}
        return build_model_with_cfg(MeanFieldResNet, name, pretrained, feature_cfg=features, **{**given, **kwargs})

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = f":class:`.MeanFieldResNet` with {config}."
    return create


for _name, _config in _VARIANTS.items():
    _create = _entrypoint(_name, _config)
    setattr(sys.modules[__name__], _name, _create)
    register_model(_create)
