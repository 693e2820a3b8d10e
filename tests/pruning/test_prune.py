"""``prune_depth_``: what is left is the function at step 0, in place, and folds to a plain model with fewer blocks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.convert.networks import CifarResNet, PlainViT, images, stack, tokens
from torch_meanfield import (
    MeanFieldResNet,
    MeanFieldSequential,
    conversion_report,
    convert,
    depth_scores,
    fold,
    prune_depth_,
)


def batches(n: int = 2, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images(size), torch.randint(10, (size,))) for _ in range(n)]


def at_random_times(model: nn.Module) -> nn.Module:
    """Every layer at steps between 0.5 and 1.5, norms with statistics of their own."""
    generator = torch.Generator().manual_seed(3)
    for stage in conversion_report(model):
        stage.module.set_tau_((torch.rand(len(stage.module), generator=generator) + 0.5).cumsum(0))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.3, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("build", [lambda: CifarResNet(blocks=4), lambda: PlainViT(depth=5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_0_and_removed_and_folded_and_loaded_plain_are_one_function(build, dtype):
    torch.manual_seed(0)
    model, x = build().to(dtype), images(4).to(dtype)
    at_random_times(convert(model, x))
    names = [part for s in conversion_report(model) for (part,) in s.particles]
    gone = set(names[1::3])
    zeroed = copy.deepcopy(model)
    for stage in conversion_report(zeroed):
        steps = stage.module.steps().detach()
        stage.module.set_tau_(
            torch.stack([s * (n not in gone) for s, (n,) in zip(steps, stage.particles, strict=True)]).cumsum(0)
        )
    report = prune_depth_(model, remove=gone)
    assert report.difference == 0.0 and {*report.removed} == gone
    y, zero = model(x).detach(), zeroed(x).detach()
    bound = 1e-12 if dtype is torch.float64 else 1e-5  # sums of other times round differently
    assert float((y - zero).abs().max() / zero.abs().max()) <= bound
    folded = fold(model)
    sizes = {name: now for name, (_, now) in report.layers.items()}
    plain = CifarResNet(blocks=4) if isinstance(model, CifarResNet) else PlainViT(depth=sizes["mean_field_layers"])
    if isinstance(plain, CifarResNet):  # one whose constructor takes one number for all groups
        for g, group in enumerate(plain.groups):
            plain.groups[g] = nn.Sequential(*list(group)[: len(folded.groups[g])])
    plain.to(dtype).load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(plain.eval()(x), folded(x))
    assert float((folded(x).detach() - y).abs().max() / y.abs().max()) <= bound


def test_at_steps_of_1_every_bit_is_that_of_the_plain_network_without_the_blocks():
    torch.manual_seed(0)
    plain, x = CifarResNet(blocks=4).eval(), images(4)
    model = convert(copy.deepcopy(plain), x)
    prune_depth_(model, remove={"groups.0.1", "groups.2.1", "groups.2.2", "groups.2.3"})
    del plain.groups[0][1]
    plain.groups[2] = nn.Sequential(plain.groups[2][0])
    assert torch.equal(model(x), plain(x))
    assert fold(model).state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in fold(model).state_dict().items())
    assert len(conversion_report(model)) == 2  # a stage without blocks is none


def test_a_lone_step_that_is_not_1_stays_and_is_folded():
    torch.manual_seed(0)
    model, x = convert(stack(3), tokens()), tokens()
    conversion_report(model).stages[0].module.set_tau_([0.5, 0.75, 2.0])
    inner, outer = (copy.deepcopy(m.state_dict()) for m in (model.body[2].inner, model.body[2].outer))
    report = prune_depth_(model, keep={"body.2"})
    stage = conversion_report(model).stages[0].module
    assert stage.steps().tolist() == [1.25] and report.names == ("body.0",) and report.kept == ("body.2",)
    h = model.enter(x)
    branch = F.linear(torch.tanh(F.linear(h, **inner)), **outer)
    expected = model.leave(h + 1.25 * branch)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(fold(model)(x), expected)


def test_pruning_twice_is_pruning_once():
    torch.manual_seed(0)
    once = at_random_times(convert(CifarResNet(blocks=4), images()))
    twice = copy.deepcopy(once)
    prune_depth_(once, remove={"groups.0.1", "groups.0.2", "groups.1.1"})
    first = prune_depth_(twice, remove={"groups.0.1"})
    assert dict(zip(first.kept, first.names, strict=True))["groups.0.2"] == "groups.0.1"
    prune_depth_(twice, remove={"groups.0.1", "groups.1.1"})
    x = images()
    torch.testing.assert_close(once(x), twice(x))
    assert [s.particles for s in conversion_report(once)] == [s.particles for s in conversion_report(twice)]


def test_blocks_of_several_modules_keep_their_names_down_to_the_last():
    class Pairs(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(6), nn.Linear(6, 6)]) for _ in range(depth))

        def forward(self, x):
            for norm, branch in self.layers:
                x = x + branch(norm(x))
            return x

    torch.manual_seed(0)
    model, x = convert(Pairs(4), tokens()), tokens()
    first = copy.deepcopy(model.layers[2].state_dict())
    report = prune_depth_(model, remove={"layers.0", "layers.1.1"})  # a part names its block
    assert report.removed == ("layers.0", "layers.1") and report.names == ("layers.0", "layers.1")
    report = prune_depth_(model, keep={"layers.0"})
    assert report.kept == ("layers.0",) and [n for n, _ in depth_scores(model, by="step")] == ["layers.0"]
    plain = Pairs(1)
    plain.load_state_dict(fold(model).state_dict(), strict=True)
    assert all(torch.equal(v, plain.layers[0].state_dict()[k]) for k, v in first.items())
    assert torch.equal(plain(x), model(x))


def test_fixed_blocks_behind_a_stage_are_counted_anew():
    class Wide(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(6, hidden), nn.Linear(hidden, 6)

        def forward(self, x):
            return x + self.outer(torch.tanh(self.inner(x)))

    torch.manual_seed(0)
    model, x = nn.Sequential(*(Wide(h) for h in (4, 5, 5, 5, 7, 8, 8))), torch.randn(2, 6)
    convert(model, x)
    shapes = [model[i].inner.weight.shape[0] for i in (0, 1, 2, 4, 5, 6)]
    report = prune_depth_(model, remove={"2"})
    assert [m.inner.weight.shape[0] for m in model] == shapes and report.difference == 0
    assert [f.name for f in conversion_report(model).fixed] == ["0", "3"]
    assert conversion_report(model).stages[1].particles == (("4",), ("5",))
    assert [n for n, _ in conversion_report(model).stages[1].parameters][0] == "4.outer.weight"
    assert fold(model)(x).shape == x.shape


def test_blocks_of_stacks_and_of_the_networks_of_the_paper():
    torch.manual_seed(0)
    model, x = MeanFieldResNet(20, learn_tau=True).eval(), torch.randn(2, 3, 16, 16)
    report = prune_depth_(model, remove={"stage1.particles.0", "stage3.particles.0", "stage3.particles.1"}, batches=[x])
    assert report.difference == 0 and model.stage3.particles is None and len(model.stage1.particles) == 2
    assert report.layers == {"stage1.particles": (3, 2), "stage2.particles": (2, 2), "stage3.particles": (2, 0)}
    model.train()(x).sum().backward()
    whole = nn.Sequential(nn.Linear(6, 4), MeanFieldSequential(*(nn.Linear(4, 4) for _ in range(2))), stack(2).body)
    whole = nn.Sequential(*whole[:2], nn.Linear(4, 6), MeanFieldSequential(*(nn.Linear(6, 6) for _ in range(2))))
    prune_depth_(whole, remove={"1.0", "1.1"})
    assert type(whole[1]) is nn.Identity and whole(torch.randn(3, 6)).shape == (3, 6)


def test_a_plain_model_is_converted_on_the_way_at_fixed_steps_of_1():
    torch.manual_seed(0)
    model, data = CifarResNet(blocks=3), batches()
    report = prune_depth_(model, remove=2, batches=data)
    assert (
        len(report.removed) == 2
        and report.removed
        and report.norms == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    )
    assert not any(p.requires_grad for n, p in model.named_parameters() if "tau_axis" in n)
    assert not [k for k in fold(model).state_dict() if "tau" in k]


def test_norms_are_those_of_the_shorter_network_on_the_batches():
    torch.manual_seed(0)
    model, data = convert(CifarResNet(blocks=3), images()).train(), batches(3)
    model.groups[0][0].n1.eval()
    twin = copy.deepcopy(model)
    report = prune_depth_(model, keep=4, scores=dict.fromkeys(("groups.0.0", "groups.0.1", "groups.0.2", "groups.1.1",
                          "groups.1.2", "groups.2.1", "groups.2.2"), 1.0), batches=data)  # fmt: skip
    prune_depth_(twin, remove={*report.removed})
    torch.optim.swa_utils.update_bn([x for x, _ in data], twin)
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, twin.state_dict()[k])
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    assert report.removed == ("groups.0.0", "groups.0.1", "groups.0.2") and "norms re-estimated" in str(report)


def test_numbers_names_and_shares_of_the_time():
    torch.manual_seed(0)
    model = convert(CifarResNet(blocks=3), images())
    scores = depth_scores(model, batches(), by="cosine", progress=False)
    by_remove, by_keep, by_time = (copy.deepcopy(model) for _ in range(3))
    assert {*prune_depth_(by_remove, remove=3, scores=scores).removed} == {*scores.order[:3]}
    assert {*prune_depth_(by_keep, keep=4, scores=scores).removed} == {*scores.order[:3]}
    report = prune_depth_(by_time, to_latency=0.7, scores=scores)
    assert {*report.removed} == {*scores.order[: len(report.removed)]} and 1 <= len(report.removed) <= 6
    assert report.latency is not None and min(report.latency) > 0 and "times faster" in str(report)
    with pytest.raises(ValueError, match="cannot be reached"):
        prune_depth_(model, to_latency=0.01, scores=scores)


def test_the_report_says_what_is_to_be_known():
    model = convert(CifarResNet(blocks=3), images())
    words = str(prune_depth_(model, remove={"groups.0.1"}))
    assert "1 of 7 blocks removed" in words and "mean_field_groups_0: 3 -> 2 blocks" in words
    assert "statistics of the deeper network" in words and "no constructor is known" in words


def test_where_a_block_does_more_than_add_the_difference_is_told():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)

        def forward(self, x):
            return self.norm(x + self.outer(torch.tanh(self.inner(x))))

    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(6, 6), *(Normed() for _ in range(3))), torch.randn(2, 6))
    report = prune_depth_(model, remove={"1"})
    assert report.difference is None or report.difference >= 0
    assert ("did more than add" in str(report)) == (report.difference > 1e-5)


def test_a_forward_that_asks_for_its_blocks_by_number_is_refused_and_left_whole():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(stack(4).body)

        def forward(self, x):
            for i in range(4):
                x = self.layers[i](x)
            return x

    torch.manual_seed(0)
    model, x = convert(Counting(), tokens()), tokens()
    y, state, modules = model(x), copy.deepcopy(model.state_dict()), [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match="does not run without layers.1"):
        prune_depth_(model, remove={"layers.1"})
    assert torch.equal(model(x), y) and [n for n, _ in model.named_modules()] == modules
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="does not run"):
        prune_depth_(plain := Counting(), remove={"layers.1"}, batches=[x])
    assert not any("forward" in m.__dict__ or "_mean_field_conversion" in m.__dict__ for m in plain.modules())
    assert not [k for k in plain.state_dict() if "tau" in k]


def test_what_is_left_is_exported():
    torch.manual_seed(0)
    model, x = convert(PlainViT(depth=4), images()), images()
    prune_depth_(model, remove={"layers.1"})
    folded = fold(model).eval()
    program = torch.export.export(folded, (x,))
    torch.testing.assert_close(program.module()(x), folded(x))
