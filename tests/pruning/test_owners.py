"""What is kept for blocks outside of the model goes with them: optimizers, schedulers, averages; and who refuses."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.convert.networks import CifarResNet, images, stack, tokens
from torch_meanfield import (
    BirthDeathOptimizer,
    MeanFieldResNet,
    conversion_report,
    convert,
    depth_scores,
    follow,
    prune_depth_,
)
from torch_meanfield.record import TauRecorder

GONE = {"groups.0.1", "groups.1.2", "groups.2.1", "groups.2.2"}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-3),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return convert(CifarResNet(blocks=3), images())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_block_keeps_its_own_state_and_the_order_is_that_of_the_parameters(kind):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer)
    before = {
        n: {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()} for n, p in named(model).items()
    }
    values, group = {n: p.detach().clone() for n, p in named(model).items()}, optimizer.param_groups[0]
    report = prune_depth_(model, remove=GONE, optimizers=[optimizer])
    was = dict(zip(report.names, report.kept, strict=True))
    assert report.optimizers == 1 and optimizer.param_groups[0] is group
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    for name, p in named(model).items():
        block = next((now for now in was if name.startswith(f"{now}.")), None)
        old = name if block is None else was[block] + name.removeprefix(block)
        if "tau_axis" in name:
            continue
        assert torch.equal(p, values[old])
        assert all(torch.equal(torch.as_tensor(v), before[old][k]) for k, v in optimizer.state[p].items())
    offsets = [p for n, p in named(model).items() if "tau_axis" in n]
    assert all(v.shape in (p.shape, ()) for p in offsets for v in optimizer.state[p].values())
    train(model, optimizer)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_resumed_after_a_cut_is_the_run_that_went_on(kind):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer)
    prune_depth_(model, remove=GONE)  # an optimizer that has stepped is found
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, seed=2)
    other = network()
    report = prune_depth_(other, remove=GONE)
    assert len(report.kept) == 3
    resumed = OPTIMIZERS[kind](other.parameters())
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, seed=2)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_an_optimizer_that_has_not_stepped_lets_go_too_and_its_names_with_it():
    model = network()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    prune_depth_(model, remove=GONE)
    group = optimizer.param_groups[0]
    assert group["param_names"] == [n for n, _ in model.named_parameters()]
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


def groups_by_block(model: nn.Module) -> list[dict]:
    found: dict[str, list] = {}
    for name, p in model.named_parameters():
        found.setdefault(name if "tau" in name else ".".join(name.split(".")[:3]), []).append(p)
    return [{"params": ps, "lr": 0.01 * (i + 1)} for i, ps in enumerate(found.values())]


@pytest.mark.parametrize("kind", ["step", "lambda", "sequential", "onecycle", "plateau"])
def test_groups_that_hold_nothing_any_more_go_and_schedulers_know(kind):
    model = network()
    groups = groups_by_block(model)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    s = torch.optim.lr_scheduler
    make = {
        "step": lambda o: s.StepLR(o, 2, 0.5),
        "lambda": lambda o: s.LambdaLR(o, [lambda e, i=i: 1 / (e + i + 1) for i in range(len(o.param_groups))]),
        "sequential": lambda o: s.SequentialLR(o, [s.LinearLR(o), s.CosineAnnealingLR(o, 9)], milestones=[2]),
        "onecycle": lambda o: s.OneCycleLR(o, max_lr=0.1, total_steps=20),
        "plateau": lambda o: s.ReduceLROnPlateau(o, patience=0, min_lr=[1e-6] * len(o.param_groups)),
    }
    scheduler = make[kind](optimizer)
    advance = (lambda: scheduler.step(1.0)) if kind == "plateau" else scheduler.step
    train(model, optimizer, 1)
    advance()
    going = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    params = [list(g["params"]) for g in optimizer.param_groups]
    prune_depth_(model, remove=GONE, optimizers=optimizer)
    mine = {id(p) for p in model.parameters()}
    left = [i for i, ps in enumerate(params) if any(id(p) in mine for p in ps)]
    assert len(left) == len(optimizer.param_groups) < len(params)
    for i, group in zip(left, optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == going[i]
    # the same as with all groups, as far as they are left
    twin = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.01 * (i + 1)} for i in range(len(params))]
    )
    other = make[kind](twin)
    for _ in range(5):
        twin.step()
        other.step(1.0) if kind == "plateau" else other.step()
    for _ in range(4):
        train(model, optimizer, 1)
        advance()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([twin.param_groups[i]["lr"] for i in left])
    scheduler.load_state_dict(scheduler.state_dict())


@pytest.mark.parametrize("known", ["recognised", "given", "given by its module"])
def test_averaged_copies_lose_the_same_blocks(known):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if known == "recognised":
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        copied, given = average.module, ()
    else:
        copied = copy.deepcopy(model)

        class Ours:
            module = copied

        average, given = Ours(), [copied]
    twin = copy.deepcopy(model)
    train(model, optimizer)
    if known == "recognised":
        average.update_parameters(model)
        average.update_parameters(model)
    report = prune_depth_(model, remove=GONE, averages=given)
    assert report.averages == 1
    assert {n: p.shape for n, p in named(copied).items()} == {n: p.shape for n, p in named(model).items()}
    if known != "recognised":
        prune_depth_(twin, remove=GONE)
        x = images()
        assert torch.equal(copied.eval()(x), twin.eval()(x))
    else:
        for a, b in zip(copied.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b)
        train(model, optimizer)
        average.update_parameters(model)
        assert torch.isfinite(average(images())).all()


def test_averages_that_are_lists_lose_what_they_held_for_the_blocks():
    model = network()
    shadow, by_name = (
        [p.detach().clone() for p in model.parameters()],
        {n: p.detach().clone() for n, p in named(model).items()},
    )
    follow(shadow, model)
    prune_depth_(model, remove=GONE, averages=[by_name])
    assert all(map(torch.equal, shadow, model.parameters())) and len(shadow) == len(list(model.parameters()))
    assert by_name.keys() == named(model).keys() and all(torch.equal(by_name[n], p) for n, p in named(model).items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stage = conversion_report(model).stages[0].module
    stage.set_tau_([2.0, 1.0])  # they still move along
    assert all(map(torch.equal, shadow[1:], list(model.parameters())[1:])) or stage is not None
    train(model, optimizer, 1)


def test_an_average_that_follows_already_is_not_cut_twice():
    model = network()
    shadow = [p.detach().clone() for p in model.parameters()]
    follow(shadow, model)
    prune_depth_(model, remove=GONE, averages=[shadow])
    assert len(shadow) == len(list(model.parameters())) and all(map(torch.equal, shadow, model.parameters()))


def test_an_average_and_a_teacher_that_the_model_holds_are_no_blocks_of_it():
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.average = AveragedModel(self.net)
            self.teacher = CifarResNet(blocks=1).eval()
            nn.init.constant_(self.teacher.groups[0][0].n1.running_mean, 0.5)

        def forward(self, x):
            return self.net(x)

    task, data = Task(), [(images(8), torch.randint(10, (8,)))]
    scores = depth_scores(task, data, by="cosine", progress=False)
    assert len(scores) == 7 and all(name.startswith("net.groups") for name, _ in scores)
    report = prune_depth_(task, remove=3, scores=scores, batches=data)
    theirs = {n: p.shape for n, p in named(task.average.module).items()}
    assert report.averages == 1 and theirs == {n: p.shape for n, p in named(task.net).items()}
    assert bool((task.teacher.groups[0][0].n1.running_mean == 0.5).all())
    for a, b in zip(task.average.module.buffers(), task.net.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_average_of_another_structure_is_refused():
    model = network()
    for average, error, words in (
        (CifarResNet(blocks=2), ValueError, "follow: copy has no tensor"),
        (3, TypeError, "averages must be averaged models"),
    ):
        with pytest.raises(error, match=words):
            prune_depth_(model, remove=GONE, averages=[average])
    assert len(conversion_report(model).stages[0].module) == 3


def nothing_changed(model, call, error, words) -> None:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    names, ids = [n for n, _ in model.named_modules()], [id(p) for p in model.parameters()]
    with pytest.raises(error, match=words):
        call()
    assert [n for n, _ in model.named_modules()] == names and [id(p) for p in model.parameters()] == ids
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "give one of remove"),
        ({"remove": 1, "keep": 2}, ValueError, "give one of remove"),
        ({"remove": 1.5}, TypeError, "remove must be a number of blocks"),
        ({"remove": True}, TypeError, "remove must be a number of blocks"),
        ({"keep": "groups.0.1"}, TypeError, "keep must be a number"),
        ({"remove": {"groups.0.9"}}, ValueError, "'groups.0.9', which is no block"),
        ({"remove": {"entry"}}, ValueError, "'entry', which is no block"),
        ({"remove": set()}, ValueError, "at least one has to go"),
        ({"keep": set()}, ValueError, "leaves 0 of 7 blocks"),
        ({"remove": 7, "scores": "all"}, ValueError, "remove=7 of a model of 7 blocks"),
        ({"remove": 8, "scores": "all"}, ValueError, "remove=8"),
        ({"remove": -1, "scores": "all"}, ValueError, "remove=-1"),
        ({"keep": 0, "scores": "all"}, ValueError, "keep=0"),
        ({"remove": 2}, ValueError, "scores is missing"),
        ({"remove": 2, "scores": 5}, TypeError, "scores must be what depth_scores returned"),
        ({"remove": 2, "scores": {"groups.0.0": 1.0}}, ValueError, "nothing for its block 'groups.0.1'"),
        ({"remove": 2, "scores": {"layer1.0": 1.0}}, ValueError, "scores are of another model"),
        ({"remove": 2, "scores": {"groups.0.0": float("nan")}}, ValueError, "is no number"),
        ({"to_latency": 0.5, "scores": "all", "remove": 1}, ValueError, "give one of remove"),
        ({"to_latency": 1.0, "scores": "all"}, ValueError, "to_latency must be a share"),
        ({"to_latency": "half", "scores": "all"}, ValueError, "to_latency must be a share"),
        ({"remove": 2, "batches": []}, ValueError, "batches is empty"),
        ({"remove": {"groups.0.1"}, "optimizers": [3]}, TypeError, "optimizers must be torch.optim.Optimizer"),
        ({"remove": {"groups.0.1"}, "optimizers": "other"}, ValueError, "without any parameter of the model"),
        ({"remove": {"groups.0.1"}, "schedulers": [3]}, TypeError, "schedulers must be of torch.optim"),
        ({"remove": {"groups.0.1"}, "schedulers": "other"}, ValueError, "optimizer that does not train this"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(arguments, error, words):
    model, arguments = network(), dict(arguments)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    every = [part for s in conversion_report(model) for (part,) in s.particles]
    if arguments.get("scores") == "all":
        arguments["scores"] = dict.fromkeys(every, 1.0)
    if arguments.get("optimizers") == "other":
        arguments["optimizers"] = other
    if arguments.get("schedulers") == "other":
        arguments["schedulers"] = torch.optim.lr_scheduler.StepLR(other, 1)
    nothing_changed(model, lambda: prune_depth_(model, **arguments), error, words)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        prune_depth_([model], **arguments)


def test_scores_made_before_another_removal_are_refused():
    model = network()
    scores = {part: 1.0 for s in conversion_report(model) for (part,) in s.particles}
    prune_depth_(model, remove=2, scores=scores)
    nothing_changed(
        model, lambda: prune_depth_(model, remove=2, scores=scores), ValueError, "made before it was pruned"
    )


def test_scores_of_a_wider_model_are_refused():
    torch.manual_seed(0)
    scores = depth_scores(convert(CifarResNet(blocks=3, width=16), images()), by="step")
    model = network()
    nothing_changed(
        model, lambda: prune_depth_(model, remove=2, scores=scores), ValueError, "of another model: its block"
    )


def test_what_holds_the_model_is_refused_by_name(tmp_path):
    model, gone = network(), {"groups.0.1"}

    def call():
        return prune_depth_(model, remove=gone)

    compiled = torch.compile(model, backend="eager")
    nothing_changed(model, call, ValueError, "inside a? ?compiled")
    with pytest.raises(ValueError, match="compiled"):
        prune_depth_(compiled, remove=gone)
    del compiled
    model.groups[1].compile(backend="eager")
    nothing_changed(model, call, ValueError, r"groups.1 was compiled by .compile\(\)")
    model.groups[1]._compiled_call_impl = None
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        nothing_changed(model, call, ValueError, "inside a DistributedDataParallel")
        with pytest.raises(ValueError, match="is a DistributedDataParallel"):
            prune_depth_(wrapped, remove=gone)
        del wrapped
        from torch.distributed.fsdp import fully_shard

        sharded = network()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fully_shard(sharded, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="sharded .FSDP2"):
            prune_depth_(sharded, remove=gone)
        assert len(conversion_report(sharded).stages[0].module) == 3
    finally:
        torch.distributed.destroy_process_group()
    call()


def test_a_model_that_replays_cuda_graphs_is_refused():
    model = network()

    def replay(x):
        return x

    replay.__module__ = "torch.cuda.graphs"
    model.entry.forward = replay
    nothing_changed(model, lambda: prune_depth_(model, remove={"groups.0.1"}), ValueError, "replays CUDA graphs")


def test_populations_of_neurons_are_refused():
    model = MeanFieldResNet(20)
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, populations=model.stage1.particles
    )
    nothing_changed(
        model, lambda: prune_depth_(model, remove={"stage1.particles.0"}), ValueError, "BirthDeathOptimizer"
    )
    del optimizer


@pytest.mark.parametrize("where", ["norms", "optimizer", "constructor"])
def test_a_failure_half_way_leaves_everything_as_it_was(where, monkeypatch):
    model = network()
    optimizer = torch.optim.AdamW(groups_by_block(model), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    average = AveragedModel(model)
    train(model, optimizer, 2)
    scheduler.step()
    data = [(images(4), torch.zeros(4).long())]
    if where == "norms":
        data = [*data, (torch.randn(4, 5, 8, 8), torch.zeros(4).long())]  # update_bn comes last, and fails on it
    else:
        place = {"optimizer": "carrying_out.let_go_", "constructor": "prune.constructor_of"}[where]
        monkeypatch.setattr(f"torch_meanfield.pruning.{place}", lambda *_: 1 / 0)

    def snapshot():
        states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, average)]
        kept = copy.deepcopy(optimizer.state_dict())
        return states, kept, [id(p) for g in optimizer.param_groups for p in g["params"]], list(scheduler.base_lrs)

    before, x = snapshot(), images()
    modes, y = [m.training for m in model.modules()], model.eval()(x)
    model.train()
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        prune_depth_(model, remove=GONE, batches=data)
    after = snapshot()
    for one, other in zip(before[0], after[0], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())
    assert before[2:] == after[2:] and before[1]["param_groups"] == after[1]["param_groups"]
    for i, kept in before[1]["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after[1]["state"][i][k])) for k, v in kept.items())
    assert [m.training for m in model.modules()] == modes and torch.equal(model.eval()(x), y)
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    train(model, optimizer, 1)


def test_the_stage_of_a_pruned_model_goes_on_re_sorting():
    torch.manual_seed(0)
    model = convert(stack(4), tokens())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    prune_depth_(model, remove={"body.1"}, optimizers=optimizer)
    weights = [b.outer.weight.detach().clone() for b in model.body]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    stage = conversion_report(model).stages[0].module
    stage.tau_axis.offset.grad = -torch.tensor([1.5, 0.0, 0.0])
    optimizer.step()
    assert stage.tau.tolist() == [2.0, 2.5, 3.0] and torch.equal(model.body[0].outer.weight, weights[1])


def test_a_recorder_that_knew_more_blocks_says_that_another_is_to_be_made():
    model = network()
    with TauRecorder(model) as recorder:
        recorder.record(0)
        prune_depth_(model, remove={"groups.0.1"})
        with pytest.raises(ValueError, match="has 2 blocks, and had 3 .* make another"):
            recorder.record(1)
    with TauRecorder(model) as recorder:
        recorder.record(1)
        assert len(recorder.trajectories["mean_field_groups_0"].tau[0]) == 2
