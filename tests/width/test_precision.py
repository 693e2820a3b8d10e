"""The proof is in double precision also where the model asks for less, and costs few forwards."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_meanfield.observe import InDouble, private_copy
from torch_meanfield.observe.randomise import _DRAWN, Draws
from torch_meanfield.width.search.find import find_populations
from torch_meanfield.width.search.labels import pairs_of
from torch_meanfield.width.search.prover import MAGNIFIED, NUDGE, Prover


class SingleNorm(nn.Module):
    """A norm that computes in single precision, as several of timm's do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype)


def deep_net(norm: type[nn.Module] = SingleNorm) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [m for _ in range(6) for m in (norm(), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))]
    return nn.Sequential(*blocks, nn.Linear(16, 3))


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    runs: list[bool] = []
    original = Prover.run

    def counted(self: Prover, *, gradients: bool = False) -> torch.Tensor:
        runs.append(gradients)
        return original(self, gradients=gradients)

    monkeypatch.setattr(Prover, "run", counted)
    return runs


def test_casts_are_to_double_inside_the_context() -> None:
    x = torch.rand(2, 3, dtype=torch.float64)
    with InDouble():
        assert torch.equal(x.float(), x) and torch.equal(x.to(torch.bfloat16), x) and torch.equal(x.half(), x)
        assert torch.softmax(x, 1, dtype=torch.float32).dtype == torch.float64
        assert torch.zeros(2, dtype=torch.float32).dtype == torch.float64
        assert x.to(torch.int64).dtype == torch.int64
    assert x.float().dtype == torch.float32


def test_a_norm_in_single_precision_does_not_drown_the_proof() -> None:
    prover = Prover(deep_net(), torch.randn(2, 16))
    assert prover._settle()  # the first scale of the random parameters serves
    prover.mode = nullcontext  # as if nothing were done about it
    rounded = prover.run()
    assert prover._distance(rounded) > 10 * MAGNIFIED * NUDGE


def test_a_model_that_mixes_precisions_is_run_as_it_is() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            eye = torch.eye(8)  # single precision by default, not by name
            return self.b((self.a(x).relu().float() @ eye).to(x.dtype))

    prover = Prover(Mixed(), torch.randn(2, 4))
    assert prover.mode is not InDouble and len(find_populations(Mixed(), torch.randn(2, 4))) == 1


def test_two_forwards_prove_all_populations_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output, and the output of nudged and permuted parameters, whose history the second half of the proof uses."""
    runs = count_runs(monkeypatch)
    assert len(find_populations(deep_net(nn.Identity), torch.randn(2, 16))) == 12
    assert runs == [False, True]


def test_an_ill_conditioned_model_is_proven_at_a_smaller_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rough(nn.Module):
        """Magnifies the errors of large numbers a million times."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.sin(1e6 * torch.relu(x.abs() - 4))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), Rough())
    example = 20 * torch.randn(3, 4)
    first = Prover(net, example)
    assert not first._settle() and first.settled and next(first.scales, None) is not None
    runs = count_runs(monkeypatch)
    assert [p.name for p in find_populations(net, example)] == ["0.weight"]
    assert runs[:3] == [False, True, False] and len(runs) > 4


def test_large_matrices_get_the_numbers_of_small_ones() -> None:
    shape = torch.Size((3, _DRAWN // 2))
    whole, pieces = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
    whole.copy_(Draws(7).take(shape, normal=True)).mul_(0.3)
    Draws(7).fill_(pieces, 0.3)
    assert torch.equal(whole, pieces)
    turned = torch.empty(shape[::-1], dtype=torch.float64).T  # not contiguous
    Draws(7).fill_(turned, 0.3)
    assert torch.equal(whole, turned)


def test_pairs_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    a, b = torch.randint(0, 4, (5, 1, 6)), torch.randint(0, 4, (1, 7, 6))
    plain = {(int(a[i, 0, k]), int(b[0, j, k])) for i in range(5) for j in range(7) for k in range(6)}
    assert set(map(tuple, pairs_of(a, b).T.tolist())) == {(x, y) for x, y in plain if x and y}


def test_a_copy_can_hold_other_parameters() -> None:
    net = nn.Linear(3, 2)
    before = copy.deepcopy(net.state_dict())
    other = nn.Parameter(torch.ones(2, 3))
    twin = private_copy(net, parameters={id(net.weight): other})
    assert twin.weight is other and twin.bias is not net.bias and torch.equal(net.weight, before["weight"])
