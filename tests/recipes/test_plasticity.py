"""The benchmarks of networks that go on learning: streams, peers against what their papers say, and the study."""

import json
import sys

import pytest
import torch
from torch import nn

from recipes.errors import BadInput
from recipes.plasticity import study
from recipes.plasticity.backbone import Backbone
from recipes.plasticity.balancing import OBSERVED, ChangingCartPole
from recipes.plasticity.bits import BITS, SLOW, Target, walk
from recipes.plasticity.dqn import Learner, Memory, balance
from recipes.plasticity.network import ConvNet, Mlp, silent_share
from recipes.plasticity.overview import overview
from recipes.plasticity.peers import (
    ContinualBackprop,
    L2Init,
    Method,
    ReDo,
    SelfNormalisedResets,
    ShrinkPerturb,
    Upgd,
)
from recipes.plasticity.settings import SETTINGS, RunningNorm
from recipes.plasticity.streams import Stream
from recipes.plasticity.training import METHODS, goodness, packaged, train
from recipes.plasticity.transformer import VisionTransformer
from torch_meanfield.particles.resampled import Resampled


def walked(kind, **changes):
    settings = {"tasks": 3, "samples": 50, "epochs": 2, "last": 1, **changes}
    x, y = torch.rand(200, 9), torch.arange(200) % 5
    return list(Stream(kind, **settings).walk(x, y, torch.Generator().manual_seed(0))), x, y


def test_labels_are_drawn_anew_and_images_stay():
    tasks, _, _ = walked("labels")
    assert all(torch.equal(t.x, tasks[0].x) for t in tasks) and not torch.equal(tasks[0].y, tasks[1].y)
    assert all(t.asked[1] is t.y for t in tasks)


def test_pixels_are_permuted_and_labels_stay_those_of_their_images():
    tasks, x, y = walked("permuted")
    rows = {tuple(sorted(row.tolist())): int(label) for row, label in zip(x, y, strict=True)}
    for task in tasks:
        assert task.asked is None
        assert [rows[tuple(sorted(row.tolist()))] for row in task.x] == task.y.tolist()
    assert not torch.equal(tasks[0].x.mean(0), tasks[1].x.mean(0))


def test_nothing_changes_in_the_control_and_it_is_asked_about_others():
    tasks, _, _ = walked("stationary")
    assert all(torch.equal(t.x, tasks[0].x) and torch.equal(t.y, tasks[0].y) for t in tasks)
    assert not {tuple(r.tolist()) for r in tasks[0].x} & {tuple(r.tolist()) for r in tasks[0].asked[0]}


def test_one_slow_bit_flips_between_tasks_and_the_target_stays():
    generator = torch.Generator().manual_seed(0)
    tasks = list(walk(6, 400, generator))
    slow = [x[:, :SLOW] for x, _ in tasks]
    assert all((bits == bits[0]).all() for bits in slow) and set(tasks[0][0].flatten().tolist()) == {0.0, 1.0}
    assert all(int((a[0] != b[0]).sum()) == 1 for a, b in zip(slow, slow[1:], strict=False))
    target = Target(torch.Generator().manual_seed(0))
    assert all(torch.equal(y, target(x)) for x, y in tasks)


def test_the_target_counts_agreeing_inputs():
    """Against the sentence that defines it: a unit fires if enough of its inputs are as its weights ask."""
    target = Target(torch.Generator().manual_seed(1))
    x = torch.randint(2, (50, BITS)).float()
    total = torch.zeros(50)
    for weights, bias, sign in zip(target.weight, target.bias, target.out, strict=True):
        inputs, asked = torch.cat([x, torch.ones(50, 1)], 1), torch.cat([weights, bias[None]]) > 0
        total += sign * ((inputs > 0) == asked).sum(1).gt(0.7 * (BITS + 1)).float() * 1.0
    torch.testing.assert_close(target(x)[:, 0], (total - target.mean) / target.spread)
    wide = target(torch.randint(2, (20_000, BITS)).float())
    assert abs(float(wide.mean())) < 0.05 and abs(float(wide.std()) - 1) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_convolutions_and_learns_bits(method):
    torch.manual_seed(0)
    images = (torch.rand(48, 196), torch.arange(48) % 4)
    run = train(Stream("labels", 1, 32, 6, 1), SETTINGS["ConvNet"], method, 1, images)
    assert len(run.curve) == 1 and 0 <= run.score <= 1
    bits = train(Stream("regression", 2, 1600, 1, 1), SETTINGS["64 units"], method, 1, None)
    assert bits.curve[0] < bits.score or bits.score > 0.1, bits.curve


def test_channels_are_the_units_of_convolutions():
    model = ConvNet(5, width=8)
    assert model(torch.rand(3, 196)).shape == (3, 5)
    assert [h.values.shape for h in model.hidden()] == [(3 * 49, 8), (3 * 16, 8), (3, 8)]
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(3, 196)).sum().backward()
    optimizer.step()
    before = [p.clone() for p in model.parameters()]
    method = ReDo(model, optimizer, torch.Generator().manual_seed(0))
    hidden = model.hidden()[0]
    method.reinitialise_(hidden, torch.tensor([2, 5]))
    changed = (hidden.first.weight != before[0]).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [2, 5] and not hidden.last.weight[:, [2, 5]].any()
    assert not optimizer.state[hidden.last.weight]["exp_avg_sq"][:, [2, 5]].any()


def test_variance_explained_is_one_for_the_truth_and_zero_for_the_mean():
    y = torch.randn(4000, 1)
    assert goodness(y, y) == 1 and abs(goodness(torch.zeros_like(y), y)) < 0.1


def trained(make, steps=1, dead=0, **kwargs):
    torch.manual_seed(0)
    model = Mlp(6, 3, (16, 16), **kwargs)
    with torch.no_grad():
        model.layers[0].bias[:dead] = -50
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    method = make(model, optimizer, torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 6)), torch.randint(3, (16,))).backward()
        method.pull()
        optimizer.step()
        method.act()
    return model, optimizer, method


def test_l2_init_adds_the_gradient_of_its_penalty():
    model, _, method = trained(L2Init)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    method.pull()
    penalty = L2Init.STRENGTH * sum(
        (p - p0).square().sum() for p, p0 in zip(model.parameters(), method.initial, strict=True)
    )
    for p, g in zip(model.parameters(), torch.autograd.grad(penalty, list(model.parameters())), strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("norm", [False, True])
def test_redo_reinitialises_the_dormant_alone(norm):
    chosen = []

    class Watched(ReDo):
        def reinitialise_(self, hidden, units):
            chosen.append((hidden.first, units.tolist(), (hidden.values == 0).all(0).nonzero().flatten().tolist()))
            super().reinitialise_(hidden, units)
            assert not hidden.last.weight[:, units].any() and not hidden.first.bias[units].any()
            state = self.optimizer.state[hidden.first.weight]["exp_avg_sq"]
            assert not state[units].any() and state.any(1).sum() >= len(state) - len(units) - 5

    model, _, _ = trained(Watched, steps=ReDo.EVERY - 1, dead=5, norm=norm)
    assert not chosen
    model, _, _ = trained(Watched, steps=ReDo.EVERY, dead=5, norm=norm)
    assert all(units == silent for _, units, silent in chosen)
    if not norm:
        first = next(units for layer, units, _ in chosen if layer is model.layers[0])
        assert set(first) >= set(range(5))
    assert silent_share(model, torch.randn(16, 6)) < 0.3


def test_continual_backprop_replaces_at_its_rate():
    replaced = []

    class Counting(ContinualBackprop):
        def reinitialise_(self, hidden, units):
            replaced.append(len(units))
            super().reinitialise_(hidden, units)

    steps = 200
    _, _, method = trained(Counting, steps=steps)
    most = 2 * 16 * Counting.RATE * (steps - Counting.MATURITY)
    assert 0.6 * most < sum(replaced) <= most + 2
    assert all((age <= steps).all() and (age < steps).any() for age in method.age)


def test_self_normalised_resets_learn_each_units_usual_silence(monkeypatch):
    """Unit 0 always fires, unit 1 every third step, unit 2 every tenth; later all fall silent for good."""
    _, _, method = trained(SelfNormalisedResets)
    went = []
    monkeypatch.setattr(method, "reinitialise_", lambda hidden, units: went.append((method.steps, units.tolist())))
    method.steps = 0
    for kept in (*method.silent, *method.ended):
        kept.zero_()
    hidden = method.model.hidden()
    for step in range(2 * method.UPDATE):
        for layer in hidden:
            layer.values = torch.ones(1, 16)
            if step < method.UPDATE:
                layer.values[:, 1], layer.values[:, 2] = float(step % 3 == 0), float(step % 10 == 0)
            else:
                layer.values[:, :3] = 0
        monkeypatch.setattr(method.model, "hidden", lambda: hidden)
        method.act()
        if step == method.UPDATE - 1:
            assert [t[:4].tolist() for t in method.threshold] == [[1, 2, 9, 1]] * 2 and not went
    first = {unit: next(steps for steps, units in went if unit in units) for unit in range(3)}
    # the last silences began when they had last fired, which may be before the change
    last = {unit: (method.UPDATE - 1) // usual * usual for unit, usual in enumerate((1, 3, 10))}
    expected = {unit: max(method.UPDATE, last[unit] + length) + 1 for unit, length in enumerate((1, 2, 9))}
    assert first == expected


def test_shrinking_shrinks():
    model, _, method = trained(ShrinkPerturb)
    bias = model.layers[0].bias.detach().clone()
    method.act()
    torch.testing.assert_close(model.layers[0].bias.detach(), bias * (1 - ShrinkPerturb.SHRINK))


def test_upgd_without_noise_or_utility_is_gradient_descent():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    twin = nn.Linear(4, 3)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(8, 4)
    for model, optimizer in (
        (layer, Upgd(layer.parameters(), torch.Generator(), lr=0.1, noise=0.0)),
        (twin, torch.optim.SGD(twin.parameters(), lr=0.1)),
    ):
        nn.functional.cross_entropy(model(x), torch.arange(8) % 3).backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight, twin.weight)


def test_a_study_ends_in_a_table_and_a_picture_and_runs_nothing_twice(tmp_path, monkeypatch, capsys):
    command = ["labels.py", "--data", "digits", "--tasks", "1", "--seeds", "1", "2", "--settings", "pixels", "GELU"]
    command += ["--methods", "bare", "UPGD", "library, plastic", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setitem(study.STREAMS, "labels", Stream("labels", tasks=1, samples=64, epochs=2, last=1))
    study.main("labels", "Labels.", ("pixels",), "accuracy")
    first = (tmp_path / "labels.md").read_text()
    rows = [line for line in first.splitlines() if line.startswith(("| pixels", "| GELU"))]
    assert len(rows) == 6 and all(" ± " in row for row in rows) and (tmp_path / "labels.png").stat().st_size > 10_000
    document = json.loads((tmp_path / "labels.json").read_text())
    assert {r["method"] for r in document["runs"]} == {"bare", "UPGD", "library, plastic"} and document["versions"]
    monkeypatch.setattr(study, "train", None)
    study.main("labels", "Labels.", ("pixels",), "accuracy")
    assert (tmp_path / "labels.md").read_text() == first
    monkeypatch.setattr(sys, "argv", ["labels.py", "--data", "nothing", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        study.main("labels", "Labels.", ("pixels",), "accuracy")
    assert "--data 'nothing' is unknown" in capsys.readouterr().err


def test_classes_arrive_two_by_two_with_those_before():
    tasks, x, y = walked("classes", tasks=3, samples=12)
    assert [len(t.y.unique()) for t in tasks] == [2, 4, 5]
    for task, later in zip(tasks, tasks[1:], strict=False):
        assert set(task.y.tolist()) < set(later.y.tolist())
        assert not {tuple(r.tolist()) for r in task.x} & {tuple(r.tolist()) for r in task.asked[0]}
        assert set(task.asked[1].tolist()) == set(task.y.tolist()) and (task.y.bincount()[task.y.unique()] == 12).all()


def test_a_converted_backbone_trains_and_begins_from_given_weights(tmp_path):
    timm = pytest.importorskip("timm")
    images = (torch.rand(24, 196), torch.arange(24) % 2)
    stream = Stream("classes", tasks=1, samples=8, epochs=1, last=1)
    run = train(stream, SETTINGS["resnet18"], "shrink and perturb", 1, images)
    assert len(run.curve) == 1 and 0 <= run.score <= 1
    source = timm.create_model("resnet18", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    filled = Backbone(2, "resnet18", tmp_path / "weights.pt")
    assert torch.equal(filled.model.conv1.weight, source.conv1.weight) and filled.model.fc.out_features == 2
    assert isinstance(filled.model.mean_field_layer1, Resampled)
    torch.save({"conv1.weight": source.conv1.weight}, tmp_path / "weights.pt")
    with pytest.raises(BadInput, match="it lacks"):
        Backbone(2, "resnet18", tmp_path / "weights.pt")


def test_the_overview_has_means_and_says_how_many_seeds(tmp_path):
    runs = [
        {"setting": "pixels", "method": method, "score": score}
        for method, score in (("bare", 0.1), ("bare", 0.2), ("ReDo", 0.5), ("library, plastic", 0.6))
    ]
    (tmp_path / "labels.json").write_text(json.dumps({"runs": runs}))
    text = overview(tmp_path, ("bare", "L2-init", "ReDo", "library, plastic")).splitlines()
    assert text[2] == "| random labels, pixels (2 seeds) | 0.150 |  | 0.500 (1) | **0.600** (1) |"
    with pytest.raises(BadInput, match="no benchmark has written"):
        overview(tmp_path / "elsewhere", ("bare",))


# -- reinforcement learning, one image a step, and what came with them


def test_running_normalisation_is_by_mean_and_deviation():
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(4000, 5)
    norm = RunningNorm(5, window=2000)
    for row in x:
        norm(row[None])
    assert torch.allclose(norm.mean, x[-2000:].mean(0), atol=0.3)
    out = norm(x[-2000:], watch=False)
    assert out.mean().abs() < 0.1 and abs(out.std() - 1) < 0.1
    before = norm.mean.clone()
    norm(x[:10], watch=False)
    assert torch.equal(norm.mean, before)


def test_a_transformer_shows_the_units_that_its_output_is_made_of():
    torch.manual_seed(0)
    model = VisionTransformer(36, 3, "relu")
    x = torch.rand(4, 36)
    out = model(x)
    hidden = model.hidden()
    assert out.shape == (4, 3) and [h.values.shape for h in hidden] == [(4 * 9, 64)] * 2
    dead = hidden[0].values.sum(0) == 0
    with torch.no_grad():
        hidden[0].first.bias[~dead] -= 100  # nothing of the first MLP fires now
        for block in model.blocks[:1]:
            block.last.bias.zero_()
    model(x)
    assert not model.hidden()[0].values.any()


def test_the_pole_changes_and_the_observations_with_it():
    pytest.importorskip("gymnasium")
    world = ChangingCartPole(torch.Generator().manual_seed(3), 7)
    plain = world.reset()
    known = world.env.unwrapped.length, world.env.unwrapped.force_mag
    world.change()
    cart = world.env.unwrapped
    assert (cart.length, cart.force_mag) != known and 0.25 <= cart.length <= 1 and 7 <= cart.force_mag <= 15
    assert cart.polemass_length == pytest.approx(cart.masspole * cart.length)
    world.seed = 7  # the same state again
    assert torch.equal(world.reset(), plain[world.order] * world.signs)
    twin = ChangingCartPole(torch.Generator().manual_seed(3), 7)
    twin.change()
    assert torch.equal(twin.order, world.order) and twin.exchanged == world.exchanged


def test_a_memory_forgets_the_oldest():
    memory = Memory(4)
    for i in range(6):
        memory.add(torch.full((OBSERVED,), float(i)), i % 2, 1.0, torch.zeros(OBSERVED), i == 5)
    before, action, _, _, fell = memory.draw(200, torch.Generator().manual_seed(0))
    assert set(before[:, 0].tolist()) == {2.0, 3.0, 4.0, 5.0}
    assert torch.equal(action, before[:, 0].long() % 2) and torch.equal(fell == 1, before[:, 0] == 5)


def test_a_learner_steps_towards_reward_plus_discounted_value():
    torch.manual_seed(0)
    model = Mlp(OBSERVED, 2, (16, 16))
    learner = Learner(model, torch.optim.SGD(model.parameters(), lr=0.05), Method(model, None, None))
    x = torch.randn(8, OBSERVED)
    for _ in range(400):  # episodes that end at once: the value is the reward
        learner.learn(x, torch.zeros(8, dtype=torch.long), torch.full((8,), 2.0), x, torch.ones(8))
    assert torch.allclose(model(x)[:, 0], torch.full((8,), 2.0), atol=0.2)


@pytest.mark.parametrize("method", ["bare", "ReDo", "library, plastic"])
def test_a_short_game_is_the_same_at_each_run(method):
    pytest.importorskip("gymnasium")
    stream = Stream("cartpole", tasks=2, samples=700, epochs=1, last=1, batch=8)
    one, other = (balance(stream, SETTINGS["DQN"], method, 5) for _ in range(2))
    assert one.curve == other.curve and len(one.curve) == 2 and all(1 <= value <= 500 for value in one.curve)


def test_the_packaged_peer_sees_every_hidden_layer():
    pytest.importorskip("ccbp_pytorch")
    run = train(Stream("labels", 2, 32, 2, 1), SETTINGS["pixels"], "ccbp-pytorch", 1, (torch.rand(64, 36), LABELS))
    assert 0 <= run.score <= 1
    model = Mlp(6, 3, (16, 8))
    optimizer = packaged(model, torch.optim.SGD(model.parameters(), lr=0.0), 6)
    first, second, out = model.layers
    told = [(c.param, c.bias, c.outgoing_param) for c in optimizer.neuron_configs]
    expected = [(first.weight, first.bias, second.weight), (second.weight, second.bias, out.weight)]
    assert all(a is b for t, e in zip(told, expected, strict=True) for a, b in zip(t, e, strict=True))


LABELS = torch.arange(64) % 3
