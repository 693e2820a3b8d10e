"""``depth_scores``: against plain references, and that nothing of the model changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.convert.networks import CifarResNet, PlainViT, images, stack, tokens
from torch_meanfield import MeanFieldResNet, MeanFieldSequential, conversion_report, convert, depth_scores
from torch_meanfield.pruning.blocks import blocks_of

CRITERIA = ("greedy", "leave_one_out", "fisher", "cosine", "ratio", "step")


def batches(n: int = 2, size: int = 8, classes: int = 10) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images(size), torch.randint(classes, (size,))) for _ in range(n)]


def resnet(blocks: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = CifarResNet(blocks=blocks)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.3, 1.0)
            nn.init.normal_(m.bias, std=0.2)
    return model


def plain_loss(model: nn.Module, data, without: set[str]) -> float:
    """The mean loss with batch statistics, blocks taken out of their containers by hand."""
    model = copy.deepcopy(model).train()
    for name in sorted(without, reverse=True):
        parent, _, child = name.rpartition(".")
        del model.get_submodule(parent)[int(child)]
    with torch.no_grad():
        losses = [F.cross_entropy(model(x), y, reduction="sum") for x, y in data]
    return float(sum(losses)) / sum(len(y) for _, y in data)


def test_leave_one_out_is_the_loss_without_the_block():
    model, data = resnet(), [*batches(1, 8), *batches(1, 5)]
    scores = depth_scores(model, data, by="leave_one_out", progress=False)
    whole = plain_loss(model, data, set())
    assert scores.loss == pytest.approx(whole, rel=1e-5) and scores.samples == 13
    for name, score in scores:
        assert score == pytest.approx(plain_loss(model, data, {name}) - whole, abs=1e-5)
    assert scores.order == tuple(sorted(dict(scores), key=dict(scores).get))


def test_greedy_takes_what_a_plain_search_takes():
    model, data = resnet(), batches(2, 16)
    scores = depth_scores(model, data, by="greedy", progress=False)
    gone: list[str] = []
    names = [name for name, _ in scores]
    while len(gone) < len(names):
        losses = {n: plain_loss(model, data, {*gone, n}) for n in names if n not in gone}
        best = min(losses, key=losses.get)
        assert scores.order[len(gone)] == best
        assert scores[best] == pytest.approx(losses[best], rel=1e-5)
        gone.append(best)


def test_what_comes_before_a_block_is_not_computed_again():
    model = convert(resnet(4), images())
    calls = dict.fromkeys((b.name for b in blocks_of(model)), 0)
    for name in calls:
        model.get_submodule(name).first.register_forward_hook(
            lambda *_, name=name: calls.update({name: calls[name] + 1})
        )
    scores = depth_scores(model, batches(1), by="leave_one_out", progress=False)
    # each runs in the whole pass, and when a block before it is left out
    assert list(calls.values()) == list(range(1, len(calls) + 1))
    assert scores.passes == pytest.approx(sum(calls.values()) / len(calls))


def test_a_model_that_writes_into_what_its_blocks_put_out_is_scored_alike():
    class Writing(CifarResNet):
        def forward(self, x):
            x = F.relu(self.entry(x))
            for group in self.groups:
                x = group(x)
                x *= 1.5
            return self.exit(x.mean((2, 3)))

    torch.manual_seed(0)
    model, data = Writing(blocks=3), batches(1)
    scores = depth_scores(model, data, by="leave_one_out", progress=False)
    whole = plain_loss(model, data, set())
    for name, score in scores:
        assert score == pytest.approx(plain_loss(model, data, {name}) - whole, abs=1e-5)


def test_fisher_is_half_the_mean_squared_derivative_by_the_step_of_each_sample():
    torch.manual_seed(0)
    model = MeanFieldSequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(3)))
    x, y = torch.randn(7, 6), torch.randint(6, (7,))
    scores = depth_scores(model, [(x, y)], by="fisher", progress=False)
    for slot, (_, score) in enumerate(scores):
        total = 0.0
        for sample, target in zip(x, y, strict=True):
            model.zero_grad()
            F.cross_entropy(model(sample[None]), target[None]).backward()
            total += float(model.tau_axis.offset.grad[slot:].sum()) ** 2 / 2  # a step moves all later times
        assert score == pytest.approx(total / 7, rel=1e-4)
    assert all(p.grad is not None for p in model.parameters())  # those of before, untouched


@pytest.mark.parametrize("build", [resnet, PlainViT])
def test_cosine_and_ratio_compare_what_goes_in_with_what_comes_out(build):
    torch.manual_seed(0)
    model, (x, y) = convert(build(), images()), batches(1)[0]
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = [
        model.get_submodule(b.name).register_forward_hook(
            lambda m, args, out, name=b.name: seen.update({name: (args[0].flatten(1), out.flatten(1))})
        )
        for b in blocks_of(model)
    ]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    cosine, ratio = (
        depth_scores(model, [(x, y)], by=by, progress=False, batch_statistics=False) for by in ("cosine", "ratio")
    )
    for name, (a, b) in seen.items():
        assert cosine[name] == pytest.approx(float((1 - F.cosine_similarity(a, b)).mean()), abs=1e-5)
        assert ratio[name] == pytest.approx(float(((b - a).norm(dim=1) / a.norm(dim=1)).mean()), rel=1e-4)


def test_steps_need_no_batches():
    model = convert(stack(4), tokens())
    conversion_report(model).stages[0].module.set_tau_([0.5, 0.75, 2.0, 2.125])
    scores = depth_scores(model, by="step")
    assert dict(scores) == {"body.0": 0.5, "body.1": 0.25, "body.2": 1.25, "body.3": 0.125}
    assert scores.order == ("body.3", "body.1", "body.0", "body.2")


@pytest.mark.parametrize("by", CRITERIA)
@pytest.mark.parametrize("build", [lambda: convert(resnet(), images()), lambda: MeanFieldResNet(20), PlainViT])
def test_nothing_of_the_model_changes(build, by):
    torch.manual_seed(0)
    model, data = build().train(), batches()
    model(images()).sum().backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    held = [{**m.__dict__} for m in model.modules()]
    random = torch.get_rng_state()
    depth_scores(model, data, by=by, progress=False)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and len(state) == len(
        model.state_dict()
    )
    assert all(
        a is b is None or torch.equal(a, b) for a, b in zip([p.grad for p in model.parameters()], grads, strict=True)
    )
    assert all(m.training for m in model.modules()) and torch.equal(torch.get_rng_state(), random)
    assert [m.__dict__.keys() for m in model.modules()] == [h.keys() for h in held]
    assert all(m.__dict__.get("forward") is h.get("forward") for m, h in zip(model.modules(), held, strict=True))


def test_the_branches_of_a_loop_are_left_out_where_the_model_adds_them():
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            make = lambda: nn.ModuleList([nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))])  # noqa: E731
            self.layers, self.out = nn.ModuleList(make() for _ in range(4)), nn.Linear(6, 3)

        def forward(self, x):
            for norm, branch in self.layers:
                x = x + branch(norm(x))
            return self.out(x.mean(1))

    torch.manual_seed(0)
    model, data = Loop(), [(tokens(), torch.randint(3, (2,)))]
    scores = depth_scores(model, data, by="leave_one_out", progress=False)
    assert [name for name, _ in scores] == [f"layers.{i}" for i in range(4)]
    whole = plain_loss(model, data, set())
    for name, score in scores:
        assert score == pytest.approx(plain_loss(model, data, {name}) - whole, abs=1e-5)


def test_the_table_says_what_goes_when_and_what_it_cost():
    scores = depth_scores(resnet(), batches(), by="greedy", progress=False)
    lines = str(scores).splitlines()
    assert lines[0].split() == ["block", "goes", "loss", "then", "step", "parameters"]
    assert len(lines) == len(scores) + 2 and sorted(int(line.split()[1]) for line in lines[1:-1]) == [*range(1, 8)]
    assert lines[1].split()[0] == "groups.0.0" and lines[1].split()[-1] == "1,184"
    assert "7 blocks, 16 samples" in lines[-1] and "passes" in lines[-1] and lines[-1].endswith(" s")


def test_a_loss_of_ones_own_and_batches_of_keywords():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = stack(3)

        def forward(self, x, labels):
            out = self.inner(x)
            return {"loss": F.mse_loss(out, labels), "out": out}

    torch.manual_seed(0)
    data = [{"x": tokens(), "labels": torch.randn(2, 5, 3)}]
    scores = depth_scores(Words(), data, loss=lambda out, _: out["loss"], by="leave_one_out", progress=False)
    assert len(scores) == 3 and scores.loss > 0


@pytest.mark.parametrize(
    ("given", "options", "error", "words"),
    [
        (1, {}, TypeError, "model must be a torch.nn.Module"),
        (None, {"by": "magnitude"}, ValueError, "by must be one of 'greedy'"),
        ("no blocks", {}, ValueError, "no residual blocks"),
        (None, {"batches": []}, ValueError, "batches is empty"),
        (None, {"batches": 3}, TypeError, "batches must be an iterable"),
        (None, {"batches": torch.zeros(2, 3, 8, 8)}, TypeError, "batches must be an iterable"),
        (None, {"batches": [images(2)]}, ValueError, "has no targets"),
        (None, {"batches": [(images(0), torch.zeros(0).long())]}, ValueError, "holds no sample"),
        (None, {"batches": [(images(2), torch.zeros(3).long())]}, ValueError, "the loss failed"),
        (None, {"batches": [(images(2), [0, 1])]}, ValueError, "are a list, not a tensor"),
        (None, {"batches": [(images(2), torch.zeros(2).long(), 1)]}, ValueError, "holds 3 things"),
        (None, {"loss": "mse"}, TypeError, "loss must be a function"),
        (None, {"loss": lambda out, y: out}, TypeError, "one number"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(given, options, error, words):
    model = {None: resnet(2), "no blocks": nn.Sequential(nn.Conv2d(3, 4, 3))}.get(given, given)
    options = {"batches": batches(1), **options}
    data = options.pop("batches")
    with pytest.raises(error, match=words):
        depth_scores(model, data, progress=False, **options)
    if isinstance(model, nn.Module):
        assert not any("forward" in m.__dict__ for m in model.modules())


def test_slots_out_of_order_are_refused_with_the_way_out():
    model = convert(stack(3), tokens())
    with torch.no_grad():
        conversion_report(model).stages[0].module.tau_axis.offset.copy_(torch.tensor([1.5, 0.0, 0.0]))
    with pytest.raises(ValueError, match="resort_"):
        depth_scores(model, by="step")
