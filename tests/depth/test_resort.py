"""When re-sorting happens, to whom, and when it must not."""

import copy
import gc
import threading
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.defaults import other_defaults
from torch_meanfield import MeanFieldSequential, resort_, set_automatic_resort, subscribe


def _layer(n=4, seed=0, **kwargs):
    torch.manual_seed(seed)
    return MeanFieldSequential(*(nn.Linear(3, 3) for _ in range(n)), **kwargs)


def _push(layer, by):
    """Gradients that move tau by ``by`` in one SGD step of lr 1 and leave the weights."""
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    layer.tau_axis.offset.grad = -torch.as_tensor(by)


def _state(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def _same(net, state):
    return all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_an_optimizer_step_re_sorts_the_layers_whose_tau_it_owns():
    model = nn.Sequential(nn.Linear(3, 3), _layer(), _layer(seed=1))
    weights = [b.weight.detach().clone() for b in model[1]]
    seen = []
    handle = subscribe(seen.append, model=model)
    for layer in model[1:]:
        _push(layer, [0.0] * 4)
    _push(model[1], [1.5, 0.0, 0.0, 0.0])
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    handle.remove()
    assert model[1].tau_axis.read().tolist() == [2.0, 2.5, 3.0, 4.0]
    assert all(torch.equal(model[1][place].weight, weights[i]) for place, i in enumerate([1, 0, 2, 3]))
    assert [(m.population.owner, m.index.tolist(), m.cause) for m in seen] == [(model[1], [1, 0, 2, 3], "resort")]
    assert "'1'" in seen[0].population.name


def test_another_model_and_another_optimizer_are_never_touched():
    mine, twin, unowned = _layer(), _layer(), _layer()
    other = torch.optim.SGD([unowned[0].weight], lr=1.0, momentum=0.9)  # holds weights, not tau
    for layer in (mine, twin, unowned):
        with torch.no_grad():
            layer.tau_axis.offset.copy_(torch.tensor([3.5, 0.0, 0.0, 0.0]))
    before = _state(twin), _state(unowned)
    _push(mine, [0.0] * 4)
    torch.optim.SGD(mine.parameters(), lr=1.0).step()
    unowned[0].weight.grad = torch.zeros(3, 3)
    other.step()
    assert mine.tau_axis.read().tolist() == [2.0, 3.0, 4.0, 4.5]
    assert _same(twin, before[0]) and _same(unowned, before[1])


def test_state_in_a_second_optimizer_and_gradients_it_has_yet_to_use_move_too():
    """tau in one optimizer, weights in another that steps after it: as if one optimizer held all."""
    split, joint = _layer(horizon=1.0), _layer(horizon=1.0)
    weights = [p for n, p in split.named_parameters() if "tau" not in n]
    optimizers = [
        torch.optim.SGD([split.tau_axis.offset], lr=0.05),
        torch.optim.SGD(weights, lr=0.02, momentum=0.9),
    ]
    one = torch.optim.SGD(
        [{"params": [p for n, p in joint.named_parameters() if "tau" not in n], "lr": 0.02, "momentum": 0.9},
         {"params": [joint.tau_axis.offset], "lr": 0.05}], momentum=0.0,
    )  # fmt: skip
    resorts = []
    with subscribe(resorts.append, model=split):
        for _ in range(40):
            x, push = torch.randn(5, 3), torch.randn(4)
            for net, opts in ((split, optimizers), (joint, [one])):
                net.zero_grad()
                net(x).square().mean().backward()
                net.tau_axis.offset.grad += 3 * push
                for o in opts:
                    o.step()
    assert len(resorts) >= 5
    for (k, v), w in zip(split.state_dict().items(), joint.state_dict().values(), strict=True):
        torch.testing.assert_close(v, w, msg=k)


def test_the_automatism_can_be_switched_off_and_the_sort_done_by_hand():
    layer = _layer()
    set_automatic_resort(layer, False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    _push(layer, [1.5, 0.0, 0.0, 0.0])
    optimizer.step()
    x = torch.randn(2, 3)
    before, momentum = layer(x), optimizer.state[layer[0].weight]["momentum_buffer"].clone()
    assert layer.tau_axis.read().tolist() == [2.5, 2.0, 3.0, 4.0]
    assert layer.tau.tolist() == [2.0, 2.5, 3.0, 4.0]  # positions come ascending all the same
    assert [(m.index.tolist(), m.cause) for m in resort_(layer, optimizer)] == [([1, 0, 2, 3], "resort")]
    assert layer.tau_axis.read().tolist() == [2.0, 2.5, 3.0, 4.0]
    assert torch.equal(optimizer.state[layer[1].weight]["momentum_buffer"], momentum)
    torch.testing.assert_close(layer(x), before)
    assert resort_(layer) == []
    set_automatic_resort(layer, True)
    _push(layer, [1.0, 0.0, 0.0, 0.0])
    optimizer.step()
    assert layer.tau_axis.read().diff().min() >= 0


def test_state_that_was_loaded_but_has_not_stepped_moves_when_its_optimizer_is_named():
    layer = _layer()
    source = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    _push(layer, [0.0] * 4)
    layer[0].weight.grad.fill_(1.0)
    source.step()
    resumed = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    resumed.load_state_dict(copy.deepcopy(source.state_dict()))
    with torch.no_grad():
        layer.tau_axis.offset[0] += 1.5
    resort_(layer, resumed)
    assert resumed.state[layer[1].weight]["momentum_buffer"].eq(1).all()
    assert resumed.state[layer[0].weight]["momentum_buffer"].eq(0).all()


def test_tau_below_zero_is_projected_and_ties_are_stable():
    layer = _layer()
    weights = [b.weight.detach().clone() for b in layer]
    _push(layer, [-1.5, 0.0, -9.0, -1.0])
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert layer.tau_axis.read().tolist() == [0.0, 0.0, 2.0, 3.0]
    assert all(torch.equal(layer[place].weight, weights[i]) for place, i in enumerate([0, 2, 1, 3]))
    small = _layer(horizon=1.0)
    weights = [b.weight.detach().clone() for b in small]
    _push(small, [0.0, 0.5, 0.0, -2.0])  # 0.25, 1.0, 0.75, -1.0
    torch.optim.SGD(small.parameters(), lr=1.0).step()
    assert small.tau_axis.read().tolist() == [0.0, 0.25, 0.75, 1.0]
    assert all(torch.equal(small[place].weight, weights[i]) for place, i in enumerate([3, 0, 2, 1]))
    tied = _layer()
    before = _state(tied)
    _push(tied, [1.0, 0.0, 0.0, 0.0])
    torch.optim.SGD(tied.parameters(), lr=1.0).step()
    assert tied.tau_axis.read().tolist() == [2.0, 2.0, 3.0, 4.0]
    assert torch.equal(tied[0].weight, before["0.weight"])


@pytest.mark.parametrize("place", [2, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tau_that_is_not_finite_re_sorts_nothing_and_warns_once(value, place):
    model = nn.ModuleDict({"trunk": _layer()})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    weights = [b.weight.detach().clone() for b in model["trunk"]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            by = [5.0 if place == 2 else 0.0, 0.0, 0.0, 0.0]
            by[place] = value
            _push(model["trunk"], by)
            optimizer.step()
    assert len(caught) == 1 and "'trunk'" in str(caught[0].message) and "not finite" in str(caught[0].message)
    assert caught[0].category is RuntimeWarning
    assert all(torch.equal(b.weight, w) for b, w in zip(model["trunk"], weights, strict=True))


def test_a_step_in_eval_mode_sorts_too():
    layer = _layer().eval()
    before = [b.weight.detach().clone() for b in layer]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    _push(layer, [1.5, 0.0, 0.0, 0.0])
    optimizer.step()
    assert torch.equal(layer[1].weight, before[0]) and layer.tau_axis.read().diff().min() >= 0


class _Scripted(torch.amp.GradScaler):
    """A scaler on the CPU."""

    def __init__(self):
        super().__init__("cpu", init_scale=4.0)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_moves_nothing(fused, optimizer_class):
    layer = _layer()
    set_automatic_resort(layer, False)
    optimizer, scaler = optimizer_class(layer.parameters(), lr=1.0, fused=fused), _Scripted()
    posts = []
    optimizer.register_step_post_hook(lambda *_: posts.append(1))

    def step(overflow):
        optimizer.zero_grad()
        scaler.scale(layer(torch.ones(2, 3)).sum()).backward()
        if overflow:
            layer[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()

    step(overflow=False)
    with torch.no_grad():  # slots that a sort would bring into order
        layer.tau_axis.place_(torch.tensor([3.0, 2.0, 1.0, 9.0]))
    set_automatic_resort(layer, True)
    before, posts[:] = _state(layer), []
    step(overflow=True)
    assert _same(layer, before)
    assert len(posts) == (1 if fused else 0)  # the trap: a fused optimizer's hooks run on overflow too
    step(overflow=False)
    assert not _same(layer, before) and layer.tau_axis.read().diff().min() >= 0


class _Reads(TorchFunctionMode):
    """Counts the times that values are read back from the device."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__)
        return func(*args, **(kwargs or {}))


def test_while_the_order_holds_a_step_reads_one_flag_for_the_whole_model_and_the_forward_pass_none():
    model = nn.Sequential(*(_layer(seed=s) for s in range(5)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model(torch.ones(2, 3)).sum().backward()
    with _Reads() as reads:
        optimizer.step()
    assert reads.count == 1
    with _Reads() as reads:
        model(torch.ones(2, 3)).sum().backward()
    assert reads.count == 0
    _push(model[1], [1.5, 0.0, 0.0, 0.0])
    torch.optim.SGD(model[1].parameters(), lr=1.0).step()  # re-sorts
    model[2].set_tau_([2.0, 1.0, 3.0, 4.0])
    with _Reads() as reads:
        model(torch.ones(2, 3)).sum().backward()
    assert reads.count == 0


def test_hooks_do_not_keep_layers_alive():
    layer = _layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    _push(layer, [1.5, 0.0, 0.0, 0.0])
    optimizer.step()
    gone = weakref.ref(layer)
    del layer, optimizer
    gc.collect()
    assert gone() is None


def test_two_models_in_two_threads_do_not_meet():
    errors = []

    def train(seed):
        try:
            generator = torch.Generator().manual_seed(seed)
            layer = _layer(seed=seed)
            twin = copy.deepcopy(layer)
            set_automatic_resort(twin, False)
            pushes = torch.randn(60, 4, generator=generator)
            for net in (layer, twin):
                optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
                for push in pushes:
                    _push(net, push)
                    optimizer.step()
                    if net is twin:
                        resort_(net, optimizer)
            assert _same(layer, _state(twin))
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=train, args=(s,)) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="resort_: model must be a torch.nn.Module, got int"):
        resort_(3)
    with pytest.raises(ValueError, match="Linear holds no MeanFieldSequential"):
        resort_(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer or several, got str"):
        resort_(_layer(), ["sgd"])
    with pytest.raises(ValueError, match="set_automatic_resort: Linear"):
        set_automatic_resort(nn.Linear(2, 2), True)


def test_defaults_of_torch_that_are_not_the_models_play_no_part():
    layers = _layer(n=7, horizon=1.0), _layer(n=7, horizon=1.0)
    motions, x = [], torch.randn(5, 3)
    pushes = torch.randn(20, 7)
    for layer, defaults in zip(layers, (other_defaults, nullcontext), strict=True):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        with subscribe(motions.append, model=layer):
            for push in pushes:
                optimizer.zero_grad()
                with defaults():
                    layer(x).square().mean().backward()
                    layer.tau_axis.offset.grad += push
                    optimizer.step()
            with defaults():
                layer.resample_(torch.tensor([0, 2, 2, 3, 4, 5, 6], device="cpu"), [optimizer])
                layer.set_tau_([0.5, 0.1, 0.3, 0.4, 0.9, 0.8, 0.7])
                assert layer.tau.device.type == "cpu" and layer.tau.dtype == torch.float32
    assert len(motions) > 8 and _same(layers[0], _state(layers[1]))


def test_loading_moves_no_optimizer_state_and_no_gradients():
    """They belong to what was there, and are loaded, or not, by themselves."""
    layer = _layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(2, 3)).square().sum().backward()
    optimizer.step()
    kept = [(p.grad.clone(), optimizer.state[p]["momentum_buffer"].clone()) for p in layer.parameters()]
    state = _state(layer)
    state["tau_axis.offset"] = torch.tensor([2.5, 0.0, 0.0, 0.0])
    layer.load_state_dict(state)
    assert torch.equal(layer[0].weight, state["1.weight"])
    for p, (grad, momentum) in zip(layer.parameters(), kept, strict=True):
        assert torch.equal(p.grad, grad) and torch.equal(optimizer.state[p]["momentum_buffer"], momentum)
