"""The files that a gradient passes on its way to a birth: those that an optimizer.step() with a birth enters, in order.

python tools/walk.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

if __package__ in (None, ""):  # run as a script: the checkout's packages are found beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch_meanfield
from torch_meanfield import BirthDeathOptimizer


def walk() -> list[str]:
    """The files of the package in the order in which calls enter them, one entry for each change of file."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    with torch.no_grad():
        net[0].bias[:8] -= 9.0  # dormant units
    optimizer = BirthDeathOptimizer(torch.optim.Adam(net.parameters()), net, every=10)
    born: list[int] = []
    optimizer.register_event_hook(lambda event: born.append(len(event.born)))
    root, seen = str(Path(torch_meanfield.__file__).parent), []

    def enter(frame: FrameType, what: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if what == "call" and file.startswith(root):
            name = file[len(root) + 1 :]
            if not seen or seen[-1] != name:
                seen.append(name)

    for step in range(10):
        optimizer.zero_grad()
        net(torch.randn(16, 20)).square().mean().backward()
        if step == 9:
            sys.setprofile(enter)
        optimizer.step()
    sys.setprofile(None)
    assert born, "no unit was born"
    return seen


if __name__ == "__main__":
    passed = walk()
    files = list(dict.fromkeys(passed))
    turns = sum(later in passed[:i] for i, later in enumerate(passed))
    print("\n".join(files))
    print(f"{len(files)} files, {len(passed)} entries, {turns} of them into a file that was left before")
