"""A network with one population of hidden neurons."""

import torch
from torch import nn

from torch_meanfield import Population, Slice


def network(n=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, n), nn.BatchNorm1d(n), nn.ReLU(), nn.Linear(n, 2))


def neurons(net):
    columns = [Slice(net[0].weight), Slice(net[0].bias), Slice(net[3].weight, 1)]
    columns += [Slice(t) for t in (net[1].weight, net[1].bias, net[1].running_mean, net[1].running_var)]
    return Population(columns, owner=net, name="hidden")
