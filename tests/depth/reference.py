"""Algorithm 1 of Lu et al. 2020, read off the page: particles keep their identity, and each pass sorts them anew."""

import torch
from torch import Tensor, nn


class ReferenceNet(nn.Module):
    """Particles (theta_i, tau_i) in the order they were made, executed in the order of tau by eq. (15)."""

    def __init__(self, branches: list[nn.Module], anchor: Tensor) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.offset = nn.Parameter(torch.zeros_like(anchor))
        self.anchor = anchor.clone()
        self.order = list(range(len(branches)))  # particle at each place
        self.crossings = 0

    def tau(self) -> Tensor:
        return self.anchor + self.offset

    def forward(self, x: Tensor) -> Tensor:
        before = torch.zeros((), dtype=self.anchor.dtype)
        for i in self.order:
            x = x + (self.tau()[i] - before) * self.branches[i](x)
            before = self.tau()[i]
        return x

    @torch.no_grad()
    def sort(self) -> None:
        self.offset.copy_(torch.maximum(self.offset, -self.anchor))
        tau = self.tau().tolist()
        new = sorted(self.order, key=lambda i: tau[i])  # stable
        self.crossings += sum(a != b for a, b in zip(self.order, new, strict=True))
        self.order = new
