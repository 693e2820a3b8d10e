"""DDP and FSDP2 on two processes against the same training on one; ``tools/soak.py`` has four, and 300 steps."""

import sys

import pytest
import torch
import torch.distributed as dist

from tools.faults import ranks
from tools.faults.digits import Net
from tools.faults.ranks import (
    FSDP_ON_CPU,
    Form,
    all_trained,
    apart,
    distance,
    interrupted,
    resumed,
    together,
    trained,
)
from torch_meanfield import set_automatic_resort
from torch_meanfield.width.turnover.plastic import MATURE, Plastic

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs gloo and fork servers"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]
STEPS = 20
TOLERANCE = 1e-12  # float64: what is left is the order of additions
FSDP2 = ["FSDP2"] * FSDP_ON_CPU
_fsdp_only = pytest.mark.skipif(not FSDP_ON_CPU, reason="FSDP2 runs on the CPU from torch 2.7 on")

# Each rank takes half of the images, and in `pieces` half of that at a time.
HALVES = {
    **{strategy: Form(strategy) for strategy in ["DDP", *FSDP2]},
    **{f"{strategy}, exact": Form(strategy, births={"scheme": "exact", "rate": 5.0}) for strategy in FSDP2 or ["DDP"]},
    "DDP, plastic": Form("DDP", births={"scheme": "plastic", "births": "typical", "every": 5}),
    **{f"{strategy}, pieces": Form(strategy, pieces=2) for strategy in ["DDP", *FSDP2]},
}
NARROW = Form("FSDP2", narrow=True, dtype=torch.float32)


@pytest.fixture(scope="module")
def halves():
    """The endings of both ranks, by form."""
    return together(2, all_trained, HALVES, STEPS)


@pytest.mark.parametrize("name", HALVES)
def test_two_ranks_train_as_one_process_does(halves, name):
    ours = [rank[name] for rank in halves]
    assert apart(ours) == []
    alone = trained(Form(births=HALVES[name].births), STEPS)
    causes = [cause for cause, _, _ in alone["motions"]]
    assert causes.count("resort") >= 4 and causes.count("birth_death") >= 4
    assert distance(ours[0], alone) < TOLERANCE


@pytest.mark.parametrize("strategy", ["DDP", *FSDP2])
def test_two_ranks_find_the_same_units_least_useful(strategy):
    births = {"scheme": Plastic(least_useful=0.1), "births": "typical"}
    ours = together(2, trained, Form(strategy, births=births), MATURE + 10)
    assert apart(ours) == []
    alone = trained(Form(births=births), MATURE + 10)
    late = [[m for m in ending["motions"] if m[0] == "birth_death"][-2:] for ending in (ours[0], alone)]
    assert late[0] == late[1] and distance(ours[0], alone) < TOLERANCE


@_fsdp_only
def test_bfloat16_rounds_alike_on_every_rank():
    # With its own half of the images each rank rounds other gradients than one process does; with all, the same.
    whole_batch = Form("FSDP2", narrow=True, dtype=torch.float32, alike=True, births={"batch_size": 32, "steep": False})
    two = together(2, all_trained, {"halves": NARROW, "whole": whole_batch}, STEPS)
    assert apart([rank["halves"] for rank in two]) == apart([rank["whole"] for rank in two]) == []
    assert len(two[0]["halves"]["motions"]) >= 6
    (one,) = together(1, trained, whole_batch, STEPS)
    assert apart([one, two[0]["whole"]]) == []


@pytest.mark.parametrize("strategy", ["DDP", pytest.param("FSDP2", marks=_fsdp_only)])
def test_a_distributed_checkpoint_of_two_ranks_goes_on_in_one(tmp_path, strategy):
    at = 14  # two steps after an event: the next one's landscape is half recorded
    together(2, interrupted, Form(strategy), at, tmp_path)
    alone = trained(Form(), STEPS)
    ours = resumed(Form(), STEPS, tmp_path)
    assert 0 < len(ours["motions"]) < len(alone["motions"])
    assert distance(ours, alone) < TOLERANCE
    if strategy == "DDP":
        again = together(2, resumed, Form(strategy), STEPS, tmp_path)
        assert apart(again) == [] and distance(again[0], alone) < TOLERANCE


def _seeded_by_rank():
    training = ranks.Training(Form())  # not DDP, which would send rank 0's parameters to all
    with torch.no_grad():
        training.net.hidden.weight.mul_(1 + training.rank)
    training.optimizer = ranks.optimizer_for(training.net)
    training.train(4)


def test_ranks_that_would_part_are_told_so():
    with pytest.raises(RuntimeError, match="newborn units are drawn from differs between data-parallel ranks.*Seed"):
        together(2, _seeded_by_rank)


def _initialisers(strategy):
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.hidden.weight.mul_(3).add_(torch.arange(24.0)[:, None])  # no layer's own law: moments are taken
    if strategy == "FSDP2":
        ranks.shard_(ranks.Objective(net), net)
    births = ranks.optimizer_for(net).birth_death_state()
    return [entry["initialisers"] for entry in births["populations"]]


@_fsdp_only
def test_initialisers_are_those_of_the_whole_tensor():
    assert together(2, _initialisers, "FSDP2") == [_initialisers("none")] * 2


def _state_divided():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    training = ranks.Training(Form("DDP"))
    optimizer = ZeroRedundancyOptimizer(training.net.parameters(), torch.optim.SGD, lr=0.1)
    said = []
    for act in (lambda: ranks.BirthDeathOptimizer(optimizer, training.net), optimizer.step):
        try:
            act()
        except TypeError as error:
            said.append(str(error))
    return said


def test_an_optimizer_that_divides_its_state_among_ranks_is_refused():
    for said in together(2, _state_divided):
        assert len(said) == 2 and all("use FSDP2 (fully_shard), which divides every parameter" in s for s in said)


def _stepped_while_gathered():
    training = ranks.Training(Form("FSDP2"))
    batch = (torch.rand(2, 64, dtype=torch.float64), torch.tensor([0, 1]), torch.zeros(4, dtype=torch.float64))
    set_automatic_resort(training.net, False)  # a re-sort would say so itself
    inner, stack = training.optimizer.optimizer, training.net.stack
    optimizer = ranks.BirthDeathOptimizer(inner, training.net, populations=[stack], every=1, batch_size=2)
    training.objective(*batch).backward()
    with torch.no_grad():
        training.objective(*batch)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)


@_fsdp_only
def test_blocks_are_not_replaced_in_gathered_copies():
    (said,) = together(1, _stepped_while_gathered)
    assert "call reshard() of the sharded model before optimizer.step()" in said


def _searched_when_sharded():
    training = ranks.Training(Form("FSDP2"))
    try:
        ranks.BirthDeathOptimizer(training.optimizer.optimizer, training.net, example_input=torch.zeros(2, 64))
    except ValueError as error:
        return str(error)


@_fsdp_only
def test_the_search_for_populations_comes_before_sharding():
    (said,) = together(1, _searched_when_sharded)
    assert "is sharded" in said and "find_populations(model, example) before fully_shard" in said


# -- sharing what ranks have seen ----------------------------------------------------------------------------------


def _rows(*numbers):
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


def _saved(ranks):
    return {"world_size": len(ranks), "batch": ranks[0]["batch"], "populations": [{}], "ranks": ranks}


def _share(monkeypatch, saved, rank, of):
    from torch_meanfield.width.optimizer import rank_shares

    monkeypatch.setattr(rank_shares, "world", lambda: (rank, of))
    return rank_shares.share_of(saved)


@pytest.mark.parametrize("of", [1, 2, 3, 4])
def test_each_row_and_each_sample_goes_to_one_rank(monkeypatch, of):
    state = {"before": None, "after": _rows(7)}
    parts = [
        {"batch": [5, 2, 1], "recorded": [{**state, "inputs": [_rows(1, 2, 3)], "gradients": [_rows(-1, -2, -3)]}]},
        {"batch": [4, 2, 1], "recorded": [{**state, "inputs": [_rows(4, 5)], "gradients": [_rows(-4, -5)]}]},
    ]
    shares = [_share(monkeypatch, _saved(parts), rank, of) for rank in range(of)]
    assert sum(share["batch"][0] for share in shares) == 9 and all(share["batch"][1:] == [2, 1] for share in shares)
    rows = torch.cat([share["recorded"][0]["inputs"][0] for share in shares])
    assert rows.flatten().tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(torch.cat([share["recorded"][0]["gradients"][0] for share in shares]), -rows)
    assert all(share["recorded"][0]["before"] is None and share["recorded"][0]["after"] is not None for share in shares)
    if of == 2:
        assert all(share is part for share, part in zip(shares, parts, strict=True))  # each its own, whatever it had


def test_one_ranks_part_stands_for_all(monkeypatch):
    saved = {"world_size": 2, "batch": [6, 3, 1], "populations": [{"recorded": None}], "ranks": None}
    assert _share(monkeypatch, saved, 0, 1) == {"batch": [12, 3, 1], "recorded": [None]}
    assert _share(monkeypatch, saved, 1, 2) == {"batch": [6, 3, 1], "recorded": [None]}
    assert [_share(monkeypatch, saved, rank, 4)["batch"][0] for rank in range(4)] == [3, 3, 3, 3]


def test_a_rank_that_fails_is_named():
    with pytest.raises(RuntimeError, match=r"(?s)ended with \[1\].*rank 0: .*ZeroDivisionError"):
        together(1, divmod, 1, 0)
