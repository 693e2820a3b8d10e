"""Residual blocks that die and are cloned: intervals, the function, state, averaged copies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torch_meanfield import MeanFieldSequential, subscribe
from torch_meanfield.depth import resample
from torch_meanfield.depth.resample import shared_intervals


class Smooth(nn.Module):
    """f(x) = tanh(W x)."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight.T)


def smooth_layer(n: int, horizon: float | None = 1.0) -> MeanFieldSequential:
    """Blocks that vary smoothly with their time, in float64."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    return MeanFieldSequential(*(Smooth(a * (i / n) + b * (1 - i / n)) for i in range(n)), horizon=horizon)


def resample_list(tau: list[float], sources: list[int]) -> list[float]:
    """The rule in words: the living cover (0, T] in order, and m copies share their parent's interval."""
    alive = sorted(set(sources))
    out, start = [], 0.0
    for j in alive:
        stop = tau[-1] if j == alive[-1] else tau[j]
        m = sources.count(j)
        out += [start + (stop - start) * k / m for k in range(1, m + 1)]
        start = stop
    return out


@pytest.mark.parametrize(
    "sources",
    [[0, 1, 2, 3, 4], [0, 0, 1, 2, 4], [1, 1, 1, 3, 3], [0, 1, 2, 2, 2], [2, 2, 2, 2, 2], [4, 4, 4, 4, 4]],
)
def test_intervals_as_the_rule_says(sources: list[int]) -> None:
    tau = torch.tensor([0.5, 0.75, 2.0, 3.5, 4.0], dtype=torch.float64)
    torch.testing.assert_close(
        shared_intervals(tau, torch.tensor(sources)),
        torch.tensor(resample_list(tau.tolist(), sources), dtype=torch.float64),
        rtol=0,
        atol=1e-14,
    )


def test_particles_travel_whole() -> None:
    layer = smooth_layer(5)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    layer(torch.randn(8, 4, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    before = [p.weight.detach().clone() for p in layer]
    moments = [optimizer.state[p.weight]["exp_avg"].clone() for p in layer]
    tau, learned = layer.tau.detach().clone(), layer.tau_axis.offset.detach().clone()
    identities = [id(p) for p in layer.parameters()]
    with subscribe(lambda motion: seen.append(motion.cause)):
        seen: list[str] = []
        index = layer.resample_(torch.tensor([0, 3, 2, 3, 4]), [optimizer])  # 1 dies, 3 has a copy
    assert index.tolist() == [0, 2, 3, 3, 4] and set(seen) == {"birth_death"}
    assert identities == [id(p) for p in layer.parameters()]
    for place, source in enumerate(index.tolist()):
        assert torch.equal(layer[place].weight, before[source])
        assert torch.equal(optimizer.state[layer[place].weight]["exp_avg"], moments[source])
    torch.testing.assert_close(
        layer.tau.detach(),
        torch.tensor(resample_list(tau.tolist(), [0, 2, 3, 3, 4]), dtype=torch.float64),
        rtol=0,
        atol=1e-15,
    )
    assert torch.equal(layer.tau_axis.offset, learned[index])  # placed elsewhere, with what it had learned


def test_a_clone_changes_the_function_by_the_square_of_the_step() -> None:
    """Halving every step divides the change by 8: each of the two errors is O(dtau^2) with a smooth neighbour's."""
    x = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    change = []
    for n in (16, 32, 64, 128):
        layer = smooth_layer(n)
        before = layer(x).detach()
        index = torch.arange(n)
        index[n // 4] = n // 2  # one dies, another has a copy
        layer.resample_(index)
        change.append((layer(x) - before).abs().max().item())
    ratios = [a / b for a, b in zip(change, change[1:], strict=False)]
    assert all(3.5 < r < 4.6 for r in ratios), ratios  # 4: of second order


def test_the_potential_is_the_derivative_by_the_step_size() -> None:
    layer = smooth_layer(6, horizon=2.0)
    layer.set_tau_([0.1, 0.5, 0.6, 1.2, 1.3, 2.0])
    x = torch.randn(8, 4, dtype=torch.float64)
    assert layer.potential() is None
    layer(x).square().sum().backward()
    steps = layer.steps().detach()
    for i in range(6):
        steps_up, eps = steps.clone(), 1e-6
        values = []
        for sign in (1, -1):
            steps_up[i] = steps[i] * (1 + sign * eps)
            h = x
            for block, step in zip(layer, steps_up, strict=True):
                h = h + step * block(h)
            values.append(h.square().sum().item())
        assert layer.potential()[i].item() == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-5)


def test_averaged_copies_follow_to_the_new_places() -> None:
    layer = smooth_layer(5)
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.01)
    average.update_parameters(layer)
    twin = average.module
    before, learned = [p.weight.detach().clone() for p in twin], twin.tau_axis.offset.detach().clone()
    index = layer.resample_(torch.tensor([0, 1, 2, 2, 2]))
    assert all(torch.equal(twin[i].weight, before[j]) for i, j in enumerate(index.tolist()))
    assert torch.equal(twin.tau_axis.anchor, layer.tau_axis.anchor)
    assert torch.equal(twin.tau_axis.offset, learned[index])
    assert (twin.steps() > 0).all()


def test_a_bad_index_changes_nothing() -> None:
    layer = smooth_layer(4)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"MeanFieldSequential \(4 branches\): index must hold 4 integers"):
        layer.resample_(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"index must lie in 0\.\.3"):
        layer.resample_(torch.tensor([0, 1, 2, 9]))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_a_block_that_keeps_its_interval_stays_exactly_where_it_is() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(50):  # start + (stop - start) is not always stop
        tau = (torch.rand(6, generator=g) * 10 ** torch.randint(0, 8, (6,), generator=g)).sort().values
        new = shared_intervals(tau, torch.tensor([0, 1, 3, 3, 4, 5]))
        assert new[[0, 1, 3, 4, 5]].tolist() == tau[[0, 1, 3, 4, 5]].tolist() and new[2] <= new[3]


def test_the_cause_is_published_and_the_layer_knows_that_it_is_sorted() -> None:
    layer = smooth_layer(4)
    seen: list[str] = []
    with subscribe(lambda motion: seen.append(motion.cause), model=layer):
        layer.resample_(torch.tensor([0, 1, 1, 3]), cause="by hand")
        assert seen == ["by hand"] * 2  # what moved, and the intervals
        assert layer.tau_axis.is_sorted()
        resample.resample_(layer, torch.tensor([0, 1, 1, 3]))
    assert seen[2:] == ["birth_death"] * 2


def test_state_that_was_loaded_but_has_not_stepped_moves_when_its_optimizer_is_named() -> None:
    layer = smooth_layer(4)
    source = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(8, 4, dtype=torch.float64)).square().sum().backward()
    source.step()
    resumed = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    resumed.load_state_dict(copy.deepcopy(source.state_dict()))
    momenta = [resumed.state[b.weight]["momentum_buffer"].clone() for b in layer]
    index = layer.resample_(torch.tensor([1, 1, 2, 3]), [resumed])
    for place, j in enumerate(index.tolist()):
        assert torch.equal(resumed.state[layer[place].weight]["momentum_buffer"], momenta[j])
