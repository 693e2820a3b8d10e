"""The residual branches of Lu et al. 2020, section 5, pre-activation throughout, and the blocks that open a stage."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


def basic_branch(in_chans: int, out_chans: int, stride: int = 1) -> nn.Sequential:
    """bn-relu-conv-bn-relu-conv with 3x3 convolutions: ``(B, in, H, W)`` to ``(B, out, H / stride, W / stride)``."""
    return _branch(
        (in_chans, nn.Conv2d(in_chans, out_chans, 3, stride, 1, bias=False)),
        (out_chans, nn.Conv2d(out_chans, out_chans, 3, 1, 1, bias=False)),
    )


def bottleneck_branch(in_chans: int, out_chans: int, stride: int = 1, *, width: int, groups: int = 1) -> nn.Sequential:
    """bn-relu-conv three times, 1x1, 3x3 (in ``groups``), 1x1, with ``width`` channels inside."""
    return _branch(
        (in_chans, nn.Conv2d(in_chans, width, 1, bias=False)),
        (width, nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)),
        (width, nn.Conv2d(width, out_chans, 1, bias=False)),
    )


def _branch(*layers: tuple[int, nn.Conv2d]) -> nn.Sequential:
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (chans, conv) in enumerate(layers, start=1):
        modules[f"bn{i}"] = nn.BatchNorm2d(chans)
        modules[f"relu{i}"] = nn.ReLU()
        modules[f"conv{i}"] = conv
    return nn.Sequential(modules)


class OpeningBlock(nn.Module):
    """The block that changes resolution or width: ``shortcut(h) + branch(x)`` with ``h = relu(bn(x))`` of the branch.

    It opens a stage and is no particle: no other block of the stage has its shape.

    Args:
        branch: a pre-activation branch whose first two modules are its norm and activation.
        in_chans, out_chans, stride: of the 1x1 projection on the identity path.

    Source: He et al. 2016, identity mappings (shared pre-activation before a projection).
    """

    def __init__(self, branch: nn.Sequential, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Conv2d(in_chans, out_chans, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in, H, W)`` to ``(B, out, H / stride, W / stride)``."""
        norm, activation, *rest = self.branch
        h = activation(norm(x))
        out: Tensor = self.shortcut(h)
        for module in rest:
            h = module(h)
        out = out + h
        return out
