"""Which blocks become particles of one stage, which stay, and what the report says."""

import pytest
import torch
from torch import nn

from tests.convert.networks import CifarResNet, Ordinary, PlainViT, Stack, images, stack, tokens
from torch_meanfield import conversion_report, convert, fold
from torch_meanfield.convert.segments import segments


def _particles(model):
    return [[list(p) for p in s.particles] for s in conversion_report(model)]


def _reasons(model):
    return {f.name: f.reason for f in conversion_report(model).fixed}


def test_strided_blocks_with_padded_shortcuts_stay_and_the_others_are_particles():
    model = convert(CifarResNet(blocks=4), images())
    assert _particles(model) == [
        [[f"groups.0.{i}"] for i in range(4)],
        [[f"groups.1.{i}"] for i in (1, 2, 3)],
        [[f"groups.2.{i}"] for i in (1, 2, 3)],
    ]
    assert _reasons(model) == {}  # a shortcut that changes shape is no stream
    assert "3 stages, 10 particles, 10 branches" in str(conversion_report(model))


def test_a_transformer_is_found_without_any_name():
    report = conversion_report(convert(PlainViT(), images()))
    (stage,) = report.stages
    assert (len(stage.particles), stage.branches, stage.checked) == (4, 2, True)
    assert set(dict(stage.parameters).values()) == {1}
    assert [n for n, _ in stage.parameters if n.startswith("layers.0.")] == [
        "layers.0.look.out_proj.weight", "layers.0.look.out_proj.bias",
        "layers.0.think.2.weight", "layers.0.think.2.bias",
    ]  # fmt: skip


def test_a_constant_of_the_block_forbids_the_exchange_and_is_named():
    model = Stack(Ordinary(), Ordinary(), Ordinary(constant=2.0), Ordinary(constant=3.0))
    convert(model, tokens())
    assert _particles(model) == [[["body.0"], ["body.1"]]]
    assert "at 'constant' it has 2.0, body.1 has 1.0" in _reasons(model)["body.2"]


def test_a_constant_that_the_forward_pass_never_reads_does_not_matter():
    model = stack(3)
    for i, block in enumerate(model.body):
        block.place_in_line = i
    assert _particles(convert(model, tokens())) == [[["body.0"], ["body.1"], ["body.2"]]]


def test_blocks_that_alternate_travel_in_pairs():
    model = Stack(*(Ordinary(constant=c) for c in (1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 5.0)))
    convert(model, tokens())
    assert _particles(model) == [[["body.0", "body.1"], ["body.2", "body.3"], ["body.4", "body.5"]]]
    stage = conversion_report(model).stages[0]
    assert stage.branches == 2 and len(stage.module[0]) == 2
    weights = [b.outer.weight.detach().clone() for b in model.body]
    stage.module.set_tau_([2.0, 1.0, 3.0])
    for place, source in enumerate([2, 3, 0, 1, 4, 5, 6]):
        assert torch.equal(model.body[place].outer.weight, weights[source])


def _hidden(sign):
    class Hidden(Ordinary):
        def forward(self, x):
            return x + self.outer(torch.tanh(sign * self.inner(x)))

    return Hidden()


def test_the_swap_test_finds_what_the_configuration_does_not_show():
    model = Stack(_hidden(1), _hidden(1), _hidden(-1))
    convert(model, tokens())
    assert _particles(model) == [[["body.0"], ["body.1"]]]
    assert "not exchangeable with body.0: with equal tensors its output differs" in _reasons(model)["body.2"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("silu", "silu stands behind the last affine layer"), ("shifted", "a constant is added behind the last affine")],
)
def test_a_branch_that_no_parameter_scales_is_left_out_with_the_reason(kind, reason):
    model = Stack(Ordinary(), Ordinary(), Ordinary(kind=kind), Ordinary(kind=kind))
    convert(model, tokens())
    assert _particles(model) == [[["body.0"], ["body.1"]]]
    assert reason in _reasons(model)["body.2"] and reason in _reasons(model)["body.3"]
    assert not conversion_report(model).fixed[0].foldable


def test_on_request_the_output_of_such_a_branch_is_scaled_and_fold_refuses():
    class Silu(nn.Module):
        def __init__(self):
            super().__init__()
            self.way = nn.Sequential(nn.Linear(6, 6), nn.SiLU())

        def forward(self, x):
            return x + self.way(x)

    torch.manual_seed(0)
    model, x = Stack(Silu(), Silu(), Silu()), tokens()
    with pytest.raises(ValueError, match="silu stands behind"):
        convert(model, x)
    before = model(x)
    convert(model, x, foldable=False)
    assert torch.equal(model(x), before)
    (stage,) = conversion_report(model).stages
    assert not stage.foldable and "cannot be folded" in str(stage)
    stage.module.set_tau_([0.5, 2.5, 2.75])
    h = model.enter(x)
    for block, step in zip(model.body, (0.5, 2.0, 0.25), strict=True):
        h = h + step * block.way[1](block.way[0](h))
    torch.testing.assert_close(model(x), model.leave(h))
    with pytest.raises(ValueError, match=r"fold: the branches of \['mean_field_body'\] were converted with foldable"):
        fold(model)


def test_tied_parameters_and_repeated_calls_forbid_the_exchange():
    model = stack(4)
    model.body[2].inner = model.body[3].inner
    convert(model, tokens())
    assert _particles(model) == [[["body.0"], ["body.1"]]]
    assert "shares its parameter 'inner.weight' with 'body.3.inner.weight'" in _reasons(model)["body.2"]
    twice = Stack(Ordinary(), Ordinary(), Ordinary())
    twice.body[2] = nn.Sequential(last := Ordinary(), last)
    convert(twice, tokens())
    assert "called 2 times" in _reasons(twice)["body.2.0"]


def test_a_table_that_all_blocks_share_belongs_to_none():
    model, table = stack(3), torch.rand(6)
    for block in model.body:
        block.register_buffer("table", table)
    stage = conversion_report(convert(model, tokens())).stages[0].module
    assert all(t is not table for c in stage.population().columns[:-2] for t in c.tensors)


class _Mixed(nn.Module):
    """A residual module, then a pointwise layer: no residual block as a whole (ConvMixer)."""

    def __init__(self):
        super().__init__()
        self.mix, self.point = Ordinary(), nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.point(self.mix(x)))


def test_blocks_around_a_residual_module_are_particles_where_the_residual_modules_are_no_neighbours():
    model = convert(Stack(*(_Mixed() for _ in range(3))), tokens())
    assert _particles(model) == [[["body.0"], ["body.1"], ["body.2"]]]
    assert _reasons(model) == {}


def test_drop_probabilities_belong_to_the_place():
    model = PlainViT(drop=0.1)
    convert(model, images())
    assert len(conversion_report(model).stages[0].particles) == 4
    conversion_report(model).stages[0].module.set_tau_([4.0, 3.0, 2.0, 1.0])
    assert [layer.think[3].p for layer in model.layers] == [0.0, 0.1, 0.2, 0.30000000000000004]


def test_include_and_exclude_choose_blocks_by_pattern():
    model = convert(CifarResNet(), images(), include=["groups.0", "groups.2.*"], exclude="groups.0.0")
    assert _particles(model) == [[["groups.0.1"], ["groups.0.2"]], [["groups.2.1"], ["groups.2.2"]]]
    assert _reasons(model)["groups.1.1"] == "left out by include and exclude"


def test_where_all_modules_are_containers_the_stage_is_registered_inside_the_first_block():
    net = nn.Sequential(nn.Linear(6, 6), *(Ordinary() for _ in range(3)), nn.Linear(6, 2))
    convert(net, tokens())
    assert [n for n, _ in net.named_children()] == ["0", "1", "2", "3", "4"]
    stage = conversion_report(net).stages[0]
    assert stage.name == "1.mean_field_blocks"
    weights = [b.outer.weight.detach().clone() for b in net[1:4]]
    before = net(tokens())
    stage.module.set_tau_([3.0, 2.0, 1.0])
    assert stage.module.tau.tolist() == [1.0, 2.0, 3.0]
    assert all(torch.equal(net[1 + i].outer.weight, weights[2 - i]) for i in range(3))
    assert before.shape == net(tokens()).shape


class _OverChildren(nn.Module):
    """timm's RegStage: runs over its children, and is no container by type."""

    def __init__(self):
        super().__init__()
        for i in range(3):
            self.add_module(f"b{i}", Ordinary())

    def forward(self, x):
        for block in self.children():
            x = block(x)
        return x


def test_a_module_that_runs_over_its_children_gets_no_other_child():
    model = Stack(_OverChildren())
    convert(model, tokens())
    assert conversion_report(model).stages[0].name == "mean_field_body_0"
    assert model(tokens()).shape == (2, 5, 3)


def test_the_report_is_found_from_around_the_model_too():
    model = convert(stack(), tokens())
    wrapped = nn.ModuleDict({"net": model})
    assert conversion_report(wrapped) == conversion_report(model)
    assert conversion_report(wrapped).stages[0].module is model.mean_field_body


def test_on_the_meta_device_the_structure_decides():
    with torch.device("meta"):
        model, x = CifarResNet(), images()
    real = convert(CifarResNet(), images())
    convert(model, x)
    assert _particles(model) == _particles(real)
    assert [s.parameters for s in conversion_report(model)] == [s.parameters for s in conversion_report(real)]
    assert not any(s.checked for s in conversion_report(model))
    assert "by structure alone" in str(conversion_report(model))


def _segments_by_force(labels):
    """The rule in words: from the left, the repetition that covers most; of equal ones the shortest period."""
    found, start = [], 0
    while start < len(labels):
        options = [
            (p * k, -p, k)
            for p in range(1, len(labels))
            for k in range(2, len(labels))
            if start + p * k <= len(labels)
            and list(labels[start : start + p]) * k == list(labels[start : start + p * k])
        ]
        if options:
            covered, period, repeats = max(options)
            found.append((start, -period, repeats))
            start += covered
        else:
            start += 1
    return found


@pytest.mark.parametrize("seed", range(5))
def test_segments_are_those_of_the_rule(seed):
    draws = torch.Generator().manual_seed(seed)
    for _ in range(50):
        labels = torch.randint(3, (10,), generator=draws).tolist()
        assert [tuple(s) for s in segments(labels)] == _segments_by_force(labels)
    assert segments([None, None, None]) == []
