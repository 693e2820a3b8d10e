import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_meanfield import MeanFieldSequential, set_automatic_resort, subscribe


def _branch(chans=4, opaque=False):
    branch = nn.Sequential(nn.BatchNorm2d(chans), nn.ReLU(), nn.Conv2d(chans, chans, 3, padding=1))
    if opaque:
        branch.append(nn.BatchNorm2d(chans))  # ends in a layer that the step is not folded into
    return branch


def _layer(n=5, seed=0, **kwargs):
    torch.manual_seed(seed)
    return MeanFieldSequential(*(_branch() for _ in range(n)), **kwargs)


def _by_argsort(layer, x):
    """Eq. (15) from the raw positions, with nothing moved."""
    positions = layer.tau_axis.read().clamp(min=0)
    before = 0.0
    for i in positions.argsort(stable=True).tolist():
        x, before = x + (positions[i] - before) * layer[i](x), positions[i]
    return x


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_layer_has_the_bits_of_the_ordinary_stack(opaque, training):
    torch.manual_seed(0)
    branches = [_branch(opaque=opaque) for _ in range(50)]
    twins = copy.deepcopy(branches)
    layer = MeanFieldSequential(*branches).train(training)
    assert layer.steps().tolist() == [1.0] * 50 and layer.horizon == 50
    x = torch.randn(2, 4, 6, 6)
    y = x
    for twin in twins:
        y = y + twin.train(training)(y)
    assert torch.equal(layer(x), y)
    for name, buffer in layer[49].named_buffers():
        assert torch.equal(buffer, dict(twins[49].named_buffers())[name])


def test_the_horizon_scales_the_steps():
    layer = _layer(horizon=1)
    torch.testing.assert_close(layer.tau, torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0]))
    torch.testing.assert_close(layer.steps(), torch.full((5,), 0.2))
    assert layer.tau.dtype == layer.steps().dtype == torch.float32


def test_random_positions_are_sorted_and_drawn_from_the_global_generator():
    a, b = _layer(tau_init="random", horizon=3.0), _layer(tau_init="random", horizon=3.0)
    assert torch.equal(a.tau, b.tau) and torch.all(a.tau.diff() > 0)
    assert 0 <= a.tau[0] and a.tau[-1] <= 3 and not torch.allclose(a.steps(), a.steps()[0])


def test_it_is_a_sequence_of_its_branches():
    layer = _layer(3)
    assert len(layer) == 3 and list(layer) == [layer[0], layer[1], layer[2]]
    assert layer[-1] is layer[2] and layer[-3] is layer[0]
    assert [name for name, _ in layer.named_parameters() if "tau" in name] == ["tau_axis.offset"]
    assert sum(p.numel() for p in layer.parameters()) == 3 * (4 + 4 + 4 * 4 * 9 + 4) + 3
    with pytest.raises(IndexError, match="branch 3 is out of range for 3"):
        layer[3]
    with pytest.raises(TypeError, match="integer"):
        layer["0"]


def test_positions_and_steps_are_differentiable():
    layer = _layer(3).double()
    x, g = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    states = [x]
    for branch in layer:
        states.append((states[-1] + branch(states[-1])).detach().requires_grad_())
    (layer(x) * g).sum().backward()
    # theory.md section 1: dE/dtau^l = <p^l, f(X^{l-1})> - <p^{l+1}, f(X^l)>, p the adjoint after step l
    adjoint = g
    products = []
    for place in reversed(range(3)):
        start = states[place].detach().requires_grad_()
        f = layer[place](start)
        products.insert(0, (adjoint * f).sum())
        adjoint = adjoint + torch.autograd.grad((adjoint * f).sum(), start)[0]
    expected = torch.stack([*products, torch.zeros((), dtype=torch.float64)])
    torch.testing.assert_close(layer.tau_axis.offset.grad, expected[:-1] - expected[1:])
    (layer.tau.sum() + layer.steps().sum()).backward()


@pytest.mark.parametrize("learn_tau", [True, False])
def test_set_tau_places_exactly_and_moves_branch_and_state_together(learn_tau):
    layer = _layer(4, learn_tau=learn_tau)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(2, 4, 5, 5)).sum().backward()
    optimizer.step()
    weights = [b[2].weight.detach().clone() for b in layer]
    momenta = [optimizer.state[b[2].weight]["momentum_buffer"].clone() for b in layer]
    means = [b[0].running_mean.clone() for b in layer]
    identity = [(id(p), p.data_ptr(), p.stride()) for p in layer.parameters()]
    layer.set_tau_([0.7, 3.1, -0.5, 0.7])
    assert torch.equal(layer.tau, torch.tensor([0.0, 0.7, 0.7, 3.1]))
    for place, i in enumerate([2, 0, 3, 1]):  # equal positions keep their order
        assert torch.equal(layer[place][2].weight, weights[i]) and torch.equal(layer[place][0].running_mean, means[i])
        assert torch.equal(optimizer.state[layer[place][2].weight]["momentum_buffer"], momenta[i])
    assert identity == [(id(p), p.data_ptr(), p.stride()) for p in layer.parameters()]


@pytest.mark.parametrize("training", [True, False])
def test_branches_execute_in_the_order_of_tau_even_while_the_slots_are_not(training):
    layer = _layer().train(training)
    with torch.no_grad():
        layer.tau_axis.offset.copy_(torch.tensor([2.5, 0.0, -3.5, 0.25, -2.0]))
    weights = [b[2].weight.clone() for b in layer]
    x = torch.randn(2, 4, 5, 5)
    expected = _by_argsort(copy.deepcopy(layer), x)
    torch.testing.assert_close(layer(x), expected)
    assert layer.tau.tolist() == [0.0, 2.0, 3.0, 3.5, 4.25]
    assert all(torch.equal(b[2].weight, w) for b, w in zip(layer, weights, strict=True))  # nothing has moved


def test_a_learn_tau_false_layer_is_the_ordinary_stack_until_placed():
    layer, twin = _layer(learn_tau=False), _layer()
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(layer(x), twin(x))
    assert not [n for n, _ in layer.named_parameters() if "tau" in n]
    layer.set_tau_([0.5, 1, 2, 3, 4])
    torch.testing.assert_close(layer.eval()(x), _by_argsort(layer, x))
    loaded = _layer(learn_tau=False, seed=1).eval()
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded(x), layer(x))


def test_checkpointed_branches_give_the_same_gradients():
    layer, twin = _layer(), _layer()
    layer.grad_checkpointing = True
    x = torch.randn(2, 4, 5, 5)
    for net in (layer, twin):
        net(x).square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_copies_pickles_and_state_dicts_are_complete_and_live(tmp_path):
    layer = _layer()
    layer.set_tau_([0.5, 1.5, 2.0, 2.5, 9.0])
    x = torch.randn(2, 4, 5, 5)
    y = layer.eval()(x)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    loaded = _layer(seed=3)
    loaded.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(twin.eval()(x), y)
        optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
        twin.train().tau_axis.offset.grad = torch.tensor([-3.0, 0, 0, 0, 0])
        before = twin[0][2].weight.clone()
        optimizer.step()  # a copy re-sorts by itself like the original
        assert torch.equal(twin[3][2].weight, before) and twin.tau_axis.read().tolist() == [1.5, 2.0, 2.5, 3.5, 9.0]
    assert layer.tau.tolist() == [0.5, 1.5, 2.0, 2.5, 9.0]


def test_an_unsorted_checkpoint_is_sorted_on_load():
    layer, loaded = _layer(), _layer(seed=1)
    state = layer.state_dict()
    state["tau_axis.offset"] = torch.tensor([2.5, 0.0, -3.5, 0.25, -2.0])
    motions = []
    with subscribe(motions.append, model=loaded):
        loaded.load_state_dict(state)
    assert loaded.tau_axis.read().tolist() == [0.0, 2.0, 3.0, 3.5, 4.25]
    assert [(m.cause, m.index.tolist()) for m in motions] == [("load", [2, 1, 4, 0, 3])]
    for place, i in enumerate([2, 1, 4, 0, 3]):
        assert torch.equal(loaded[place][2].weight, layer[i][2].weight)


def test_a_checkpoint_of_another_horizon_brings_its_positions_along():
    layer, loaded = _layer(horizon=1), _layer(seed=1)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded.tau, layer.tau)


def test_a_damaged_tau_is_refused_by_key_with_nothing_changed():
    layer = _layer()
    model = nn.Sequential(layer)
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(before)
    state["0.0.2.weight"] += 1
    state["0.tau_axis.offset"][2] = float("nan")
    with pytest.raises(ValueError, match=r"state_dict\['0.tau_axis.offset'\] is not finite"):
        model.load_state_dict(state)
    state["0.tau_axis.offset"] = before["0.tau_axis.offset"].to_sparse()
    with pytest.raises(ValueError, match=r"state_dict\['0.tau_axis.offset'\] is torch.sparse_coo"):
        model.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class _Twice(nn.Module):
    def forward(self, x):
        return x.mean(dim=1, keepdim=True)


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda: MeanFieldSequential(), ValueError, "branches is empty"),
        (lambda: MeanFieldSequential(nn.Linear(2, 2), 3), TypeError, r"branches\[1\] must be .*got int"),
        (lambda: MeanFieldSequential(nn.Linear(2, 2), nn.Linear(2, 3)), ValueError, r"branches\[1\] differs"),
        (lambda: MeanFieldSequential(nn.Linear(2, 2), horizon=0), ValueError, "horizon must be positive.*got 0"),
        (lambda: MeanFieldSequential(nn.Linear(2, 2), horizon=float("nan")), ValueError, "horizon must be positive"),
        (lambda: MeanFieldSequential(nn.Linear(2, 2), horizon="1"), TypeError, "horizon must be a positive number"),
        (lambda: MeanFieldSequential(nn.Linear(2, 2), tau_init="sorted"), ValueError, "tau_init must be .*'sorted'"),
        (lambda: _layer(3).set_tau_([1, 2]), ValueError, r"values must hold 3 positions.*\(2,\)"),
        (lambda: _layer(2).set_tau_([1, float("inf")]), ValueError, "values must be finite"),
        (lambda: MeanFieldSequential(_Twice())(torch.ones(2, 3)), ValueError, r"keep the shape .*got \(2, 1\)"),
    ],
)
def test_bad_input_is_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_refused_positions_change_nothing():
    layer = _layer(3)
    before = copy.deepcopy(layer.state_dict())
    for values in ([1, 2], [3, float("nan"), 1]):
        with pytest.raises(ValueError):
            layer.set_tau_(values)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_nothing_warns_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = _layer()
        layer(torch.randn(2, 4, 5, 5)).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()


def test_positions_are_not_written_when_optimizer_state_could_not_follow():
    layer = _layer(3)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(2, 4, 5, 5)).square().mean()
        loss.backward()
        return loss

    set_automatic_resort(layer, False)
    optimizer.step(closure)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(TypeError, match="LBFGS keeps"):
        layer.set_tau_([3.0, 2.0, 1.0])
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


class _Multiplications(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.addcmul)
        return func(*args, **(kwargs or {}))


def _multiplications(layer):
    with _Multiplications() as seen:
        layer(torch.randn(2, 3))
    return seen.count


def test_a_fixed_stack_of_unit_steps_multiplies_nothing_also_after_loading_one():
    def layer(**kwargs):
        return MeanFieldSequential(*(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(3)), **kwargs)

    fixed = layer(learn_tau=False)
    assert _multiplications(fixed) == 0 and _multiplications(layer()) == 3
    fixed.load_state_dict(layer(learn_tau=False).state_dict())
    assert _multiplications(fixed) == 0
    for placed in (layer(learn_tau=False, horizon=1.0), layer(learn_tau=False, tau_init="random")):
        assert _multiplications(placed) == 3
    fixed.load_state_dict(layer(learn_tau=False, horizon=1.0).state_dict())
    assert _multiplications(fixed) == 3
    resampled = layer(learn_tau=False)
    resampled.resample_(torch.tensor([0, 0, 2]))
    assert _multiplications(resampled) == 3


class _Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


def test_branches_are_recomputed_in_training_with_gradients_and_only_there():
    layer, x = MeanFieldSequential(*(_Counting(3, 3) for _ in range(2))), torch.randn(2, 3)
    assert layer.grad_checkpointing is False

    def calls():
        _Counting.calls = 0
        out = layer(x)
        if out.requires_grad:
            out.sum().backward()
        return _Counting.calls

    assert calls() == 2
    layer.grad_checkpointing = True
    assert calls() == 4
    with torch.no_grad():
        assert calls() == 2
    layer.eval()
    assert calls() == 2


class _Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_an_order_once_read_is_known_until_tau_changes():
    layer, x = copy.deepcopy(_layer(3)).eval(), torch.randn(2, 4, 5, 5)  # a copy knows nothing of its order
    seen = []
    for change in (False, False, True, False):
        if change:
            with torch.no_grad():
                layer.tau_axis.offset.add_(0.25)
        with _Reads() as reads:
            torch.testing.assert_close(layer(x), _by_argsort(layer, x))
            seen.append(reads.count)  # those of the reference too, each time the same
    assert [n > seen[1] for n in seen] == [True, False, True, False]


def test_positions_below_zero_count_as_zero_even_where_they_are_in_order():
    layer, x = _layer(3).eval(), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        layer.tau_axis.offset.copy_(torch.tensor([-2.0, -2.5, 0.0]))
    assert layer.tau.tolist() == [0.0, 0.0, 3.0] and layer.steps().tolist() == [0.0, 0.0, 3.0]
    for _ in range(2):
        torch.testing.assert_close(layer(x), _by_argsort(layer, x))
