"""Re-sorting, copies, averages and checkpoints of converted models."""

import copy
import io
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from tests.convert.networks import CifarResNet, PlainViT, images, stack, tokens
from torch_meanfield import conversion_report, convert, param_groups, resort_, set_automatic_resort, subscribe
from torch_meanfield.convert.sites import site_of


def _stage(model):
    return conversion_report(model).stages[0].module


def _push(model, stage, by):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    stage.tau_axis.offset.grad = -torch.tensor(by)


def test_an_optimizer_step_re_sorts_blocks_with_their_buffers_and_optimizer_state():
    torch.manual_seed(0)
    model, x = CifarResNet(blocks=3), images(4)
    convert(model, x)
    stage = _stage(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().mean().backward()
    optimizer.step()
    group = model.groups[0]
    before = [{n: t.clone() for n, t in b.state_dict().items()} for b in group]
    momentum = [optimizer.state[b.first.weight]["momentum_buffer"].clone() for b in group]
    pointers = [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        stage.tau_axis.offset.copy_(torch.tensor([1.5, 0.0, 0.0]))
    seen = []
    with subscribe(seen.append, model=model):
        motions = resort_(model, optimizer)
    assert [m.index.tolist() for m in motions] == [[1, 0, 2]] and seen[0].population.owner is stage
    for place, source in enumerate([1, 0, 2]):
        assert all(torch.equal(t, before[source][n]) for n, t in group[place].state_dict().items() if "tau" not in n)
        assert torch.equal(optimizer.state[group[place].first.weight]["momentum_buffer"], momentum[source])
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_automatic_re_sorting_and_its_switch():
    model, x = stack(3), tokens()
    convert(model, x)
    stage = _stage(model)
    weights = [b.outer.weight.detach().clone() for b in model.body]
    optimizer = torch.optim.SGD(param_groups(model, lr=1.0), lr=1.0)
    _push(model, stage, [1.5, 0.0, 0.0])
    optimizer.step()
    assert stage.tau.tolist() == [2.0, 2.5, 3.0]
    assert torch.equal(model.body[0].outer.weight, weights[1])
    set_automatic_resort(model, False)
    _push(model, stage, [0.75, 0.0, 0.0])
    optimizer.step()
    assert stage.tau_axis.read().tolist() == [2.75, 2.5, 3.0]
    # unsorted slots: the steps go by rank, and none is negative
    assert [stage.step(i).item() for i in range(3)] == [0.25, 2.5, 0.25]
    assert stage.steps().tolist() == [2.5, 0.25, 0.25]


def test_the_steps_by_rank_are_those_of_the_sorted_slots():
    torch.manual_seed(0)
    model = stack(5).double()
    convert(model, tokens().double())
    stage = _stage(model)
    stage.set_tau_(torch.rand(5).cumsum(0))
    quick = torch.stack([stage.step(i) for i in range(5)])
    (quick_grad,) = torch.autograd.grad(quick @ torch.arange(5.0).double(), stage.tau_axis.offset)
    stage.tau_axis.mark_sorted(False)
    ranked = torch.stack([stage.step(i) for i in range(5)])
    (ranked_grad,) = torch.autograd.grad(ranked @ torch.arange(5.0).double(), stage.tau_axis.offset)
    assert torch.equal(quick, ranked) and torch.equal(quick_grad, ranked_grad)


def _through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def _through_file(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, _through_pickle, _through_file])
@pytest.mark.parametrize("build", [PlainViT, CifarResNet])
def test_a_copy_has_stages_of_its_own_that_hold_its_own_blocks(twin_of, build):
    torch.manual_seed(0)
    model, x = build().eval(), images()
    convert(model, x)
    y = model(x)
    twin = twin_of(model)
    assert torch.equal(twin(x), y)
    mine, theirs = _stage(model), _stage(twin)
    assert theirs is not mine and type(theirs) is type(mine)
    modules = set(twin.modules())
    assert all(block in modules for particle in theirs for block in particle)
    assert all(s.stage in modules for m in modules if (s := site_of(m)) is not None)
    theirs.set_tau_([3.0, 2.0, 1.0, *range(4, len(theirs) + 1)])
    assert torch.equal(model(x), y) and not torch.equal(twin(x), y)


def test_a_model_is_freed_at_once():
    import gc
    import weakref

    model = convert(stack(), tokens())
    block = weakref.ref(model.body[1])
    gc.disable()
    try:
        del model
        assert block() is None
    finally:
        gc.enable()


def test_a_stage_without_its_model_says_so():
    model = convert(stack(), tokens())
    stage = copy.deepcopy(_stage(model))
    with pytest.raises(RuntimeError, match="no longer exists"):
        stage.population()
    with pytest.raises(TypeError, match="is not called"):
        stage(tokens())


def test_averaged_copies_follow_the_particles():
    torch.manual_seed(0)
    model, x = stack(3), tokens()
    convert(model, x)
    average = AveragedModel(model, multi_avg_fn=None)
    stage = _stage(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    weights = [b.outer.weight.detach().clone() for b in model.body]
    _push(model, stage, [1.5, 0.0, 0.0])
    optimizer.step()
    assert torch.equal(model.body[0].outer.weight, weights[1])
    assert torch.equal(average.module.body[0].outer.weight, weights[1])
    assert average.module.mean_field_body.tau_axis.read().tolist() == [2.0, 1.0, 3.0]
    average.update_parameters(model)
    assert torch.isfinite(average.eval()(x)).all()


@pytest.mark.parametrize("assign", [False, True])
def test_plain_and_converted_checkpoints_load_strictly(assign):
    torch.manual_seed(0)
    plain, x = stack(3), tokens()
    checkpoint = copy.deepcopy(plain.state_dict())
    model = convert(stack(3), x)
    stage = _stage(model)
    stage.set_tau_([0.5, 1.0, 4.0])
    with pytest.warns(RuntimeWarning, match="holds no tau"):
        model.load_state_dict(checkpoint, strict=True, assign=assign)
    assert stage.tau.tolist() == [0.5, 1.0, 4.0]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in checkpoint.items())
    other = convert(stack(3), x)
    other.load_state_dict(model.state_dict(), strict=True)
    assert _stage(other).tau.tolist() == [0.5, 1.0, 4.0]
    assert torch.equal(other(x), model(x))


def test_a_checkpoint_with_half_a_tau_or_a_damaged_one_is_refused():
    model = convert(stack(3), tokens())
    state = model.state_dict()
    half = {k: v for k, v in state.items() if not k.endswith("tau_axis.offset")}
    with pytest.raises(RuntimeError, match="Missing key.*tau_axis.offset"):
        model.load_state_dict(half)
    state["mean_field_body.tau_axis.offset"] = torch.full((3,), float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.load_state_dict(state)


def test_checkpoints_whose_slots_are_not_sorted_give_the_same_outputs():
    torch.manual_seed(0)
    model, x = stack(3), tokens()
    convert(model, x)
    with torch.no_grad():
        _stage(model).tau_axis.offset.copy_(torch.tensor([1.5, 0.0, 0.25]))
    other = convert(stack(3), x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_moving_to_another_dtype_keeps_tau_in_float32():
    model = convert(stack(3), tokens()).half()
    assert _stage(model).tau.dtype == torch.float32
    assert convert(stack(3).double(), tokens().double()) is not None
