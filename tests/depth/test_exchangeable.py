import pytest
import torch
from torch import nn

from torch_meanfield import MeanFieldSequential


class _Custom(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        return self.drop(self.body(x))


def _tied(tie):
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if tie:
        m[1].weight = m[0].weight
    return m


def _shared():
    linear = nn.Linear(4, 4)
    return nn.Sequential(linear), nn.Sequential(linear)


@pytest.mark.parametrize(
    "branches, match",
    [
        (
            (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
            "it is Conv2d\\(.*dilation=.*one shape and config",
        ),
        (
            (nn.Linear(4, 4), nn.Linear(4, 4, bias=False)),
            "at 'bias': it holds None, branches\\[0\\] \\(4,\\) torch.float32 on cpu; only",
        ),
        ((nn.Linear(4, 4), nn.Linear(4, 4).double()), "float64"),
        ((nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.GELU())), "GELU"),
        ((nn.LayerNorm(4), nn.LayerNorm(4, eps=1e-3)), "eps=0.001"),
        ((nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)), "running_mean"),
        ((_tied(True), _tied(False)), "tied to '0.weight'"),
        (_shared(), r"branches\[1\] shares '0.weight' with branches\[0\].*deepcopy"),
        ((nn.Linear(4, 4), nn.LazyLinear(4)), r"branches\[1\].weight is not initialised"),
    ],
)
def test_branches_that_cannot_change_places_are_refused(branches, match):
    with pytest.raises(ValueError, match=match):
        MeanFieldSequential(*branches)


def test_drop_probabilities_belong_to_the_place():
    layer = MeanFieldSequential(_Custom(0.0), _Custom(0.5)).eval()
    assert layer(torch.ones(1, 4)).shape == (1, 4)


class StochasticDepth(nn.Module):
    """Named, and shown, as torchvision's is."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x

    def extra_repr(self):
        return f"p={self.p}"


def test_drop_modules_of_any_name_may_differ_in_their_probability():
    branches = [nn.Sequential(nn.Linear(4, 4), StochasticDepth(p), nn.Dropout(p)) for p in (0.1, 0.2)]
    assert len(MeanFieldSequential(*branches)) == 2
    with pytest.raises(ValueError, match="at '1': it is Dropout, branches.0. StochasticDepth"):
        MeanFieldSequential(branches[0], nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Dropout(0.1)))


def test_tied_tensors_inside_a_branch_are_fine():
    layer = MeanFieldSequential(_tied(True), _tied(True))
    first = layer[0][0].weight.detach().clone()
    layer.set_tau_([2.0, 1.0])
    assert layer[1][0].weight is layer[1][1].weight and torch.equal(layer[1][0].weight, first)
