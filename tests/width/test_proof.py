"""The proof accepts true populations, refuses incomplete ones, and leaves the model as it was."""

from __future__ import annotations

import copy
import random
import threading

import pytest
import torch
from torch import nn

from torch_meanfield.particles import Motion, Slice, subscribe
from torch_meanfield.particles.neurons import Neurons, neurons_from
from torch_meanfield.particles.population import named_tensors
from torch_meanfield.width.search.find import find_populations
from torch_meanfield.width.search.proof import verify
from torch_meanfield.width.search.prover import Prover


def conv_net() -> nn.Sequential:
    """Zero-initialised gains and fresh statistics: on these values the comparison would say nothing."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(24, 2),
    )  # fmt: skip
    nn.init.zeros_(net[1].weight)
    nn.init.zeros_(net[7].weight)
    return net


def whole(net: nn.Sequential) -> dict[str, tuple[Slice, str]]:
    return {
        "weight": (Slice(net[0].weight, 0), "in"),
        "bias": (Slice(net[0].bias, 0), "in"),
        "gain": (Slice(net[1].weight, 0), "own"),
        "shift": (Slice(net[1].bias, 0), "own"),
        "mean": (Slice(net[1].running_mean, 0), "own"),
        "var": (Slice(net[1].running_var, 0), "own"),
        "next": (Slice(net[3].weight, 1), "out"),
    }


def population(net: nn.Sequential, without: str = "") -> Neurons:
    kept = [c for name, c in whole(net).items() if name != without]
    return Neurons([c for c, _ in kept], [r for _, r in kept], owner=net, name=f"without {without}")


EXAMPLE = torch.randn(2, 3, 4, 4)


def test_the_whole_population_is_proven() -> None:
    (verdict,) = verify(net := conv_net(), EXAMPLE, [population(net)])
    assert verdict.proven and verdict.change < 1e-13 and verdict.producer_change > 1e-3
    assert "proven" in str(verdict)


@pytest.mark.parametrize("missing", ["weight", "bias", "gain", "shift", "mean", "var"])
def test_each_missing_column_is_noticed(missing: str) -> None:
    net = conv_net()
    (verdict,) = verify(net, EXAMPLE, [population(net, without=missing)])
    assert not verdict.proven and verdict.change > 1e-6
    assert "changes the output" in str(verdict)


def test_a_wrong_reader_is_noticed() -> None:
    net = conv_net()
    wrong = [(c, r) for n, (c, r) in whole(net).items() if n != "next"] + [(Slice(torch.randn(8, 8), 1), "out")]
    other = Neurons([c for c, _ in wrong], [r for _, r in wrong], name="lost")
    with pytest.raises(ValueError, match="lost: the copy .* has no tensor"):
        verify(net, EXAMPLE, [other])


def test_true_and_false_ones_together() -> None:
    net = conv_net()
    second = neurons_from([(net[3].weight, 0), (net[3].bias, 0), Slice(net[7].weight, 1, inner=4)], "second")  # no norm
    verdicts = verify(net, EXAMPLE, [population(net), second])
    assert [v.proven for v in verdicts] == [True, False]
    complete = Neurons(
        [*second.columns, *(Slice(getattr(net[4], t), 0) for t in ("weight", "bias", "running_mean", "running_var"))],
        ("in", "in", "out", "own", "own", "own", "own"),
        name="second",
    )
    assert all(v.proven for v in verify(net, EXAMPLE, [population(net), complete]))


def test_units_that_nothing_tells_apart_make_the_proof_vacuous() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.unread = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x).sum(-1, keepdim=True)

    net = Sum()
    claim = neurons_from([(net.a.weight, 0), (net.a.bias, 0), (net.unread.weight, 1)], "claim")
    (verdict,) = verify(net, torch.randn(2, 3), [claim])
    assert not verdict.proven and "vacuous" in str(verdict)


def test_the_model_is_left_exactly_as_it_was() -> None:
    net = conv_net().train()
    calls: list[int] = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    net[3].weight.grad = torch.ones_like(net[3].weight)
    before = {n: (t, t.clone(), t._version) for n, t in named_tensors(net).items()}
    keys = set(net.__dict__)
    state, python_state = torch.get_rng_state(), random.getstate()
    motions: list[Motion] = []
    with subscribe(motions.append, model=net):
        assert len(find_populations(net, EXAMPLE).populations) == 2
        verify(net, EXAMPLE)
    assert not motions and not calls and net.training and set(net.__dict__) == keys
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state
    for name, tensor in named_tensors(net).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1]) and tensor._version == before[name][2]
    assert torch.equal(net[3].weight.grad, torch.ones_like(net[3].weight))


def test_the_verdict_is_the_same_each_time() -> None:
    net = conv_net()
    first, second = (verify(net, EXAMPLE, [population(net)])[0].producer_change for _ in range(2))
    assert first == second


def test_keywords_and_tuples_are_inputs_too() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.b(self.a(x).relu() * scale)}

    net, x, s = Two(), torch.randn(2, 3), torch.rand(1)
    assert len(find_populations(net, (x, s)).populations) == len(find_populations(net, {"x": x, "scale": s})) == 1


def test_bad_input_is_named() -> None:
    net = conv_net()
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        verify("net", EXAMPLE, [])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"populations\[0\] must be Neurons"):
        verify(net, EXAMPLE, [[(net[0].weight, 0)]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no column has the role 'in'"):
        verify(net, EXAMPLE, [Neurons([Slice(net[3].weight, 1)], ["out"])])
    stuck = copy.deepcopy(net)
    stuck.cache = threading.Lock()
    with pytest.raises(ValueError, match="cannot be deep-copied"):
        find_populations(stuck, EXAMPLE)
    with pytest.raises(ValueError, match="no finite, non-zero"):
        find_populations(nn.Sequential(nn.Linear(3, 3), nn.Threshold(1e9, 0.0)), torch.randn(1, 3))


def test_under_autocast_and_compiled() -> None:
    net = conv_net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(find_populations(net, EXAMPLE)) == 2
    compiled = torch.compile(net, backend="eager")
    assert len(find_populations(compiled, EXAMPLE)) == 2  # type: ignore[arg-type]


def test_frozen_and_half_precision_parameters() -> None:
    net = conv_net().bfloat16().requires_grad_(False)
    report = find_populations(net, EXAMPLE.bfloat16())
    assert len(report) == 2 and not any(p.requires_grad for p in net.parameters())


def test_the_second_half_of_the_proof_costs_one_backward_pass_and_no_forward_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read off first-order slopes, and literally, to the same verdicts; the former without a forward for each."""
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(12) for m in (nn.Linear(8, 8), nn.Tanh())))
    runs: list[bool] = []
    original = Prover.run

    def counted(self: Prover, *, gradients: bool = False) -> torch.Tensor:
        runs.append(gradients)
        return original(self, gradients=gradients)

    monkeypatch.setattr(Prover, "run", counted)
    report = find_populations(net, torch.randn(1, 8))
    assert len(report) == 11
    quick = len(runs)
    assert quick < 8 and sum(runs) == 1
    verdicts = verify(net, torch.randn(1, 8), report.populations)
    assert all(v.proven for v in verdicts) and len(runs) - quick > 11
