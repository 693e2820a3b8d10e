"""torch.compile, torch.export and torch.func."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim.swa_utils import AveragedModel

from torch_meanfield import MeanFieldSequential, subscribe


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(horizon=1.0):
    torch.manual_seed(0)
    branches = (nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(6))
    return nn.Sequential(nn.Linear(4, 4), MeanFieldSequential(*branches, horizon=horizon))


def test_one_compilation_over_fifty_re_sorts():
    model, eager = _model(), _model()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.5) for m in (model, eager)]
    resorts = []
    with subscribe(resorts.append, model=model):
        for _ in range(200):
            x, push = torch.randn(8, 4), torch.randn(6)
            for net, run, optimizer in zip((model, eager), (compiled, eager), optimizers, strict=True):
                optimizer.zero_grad()
                run(x).square().mean().backward()
                net[1].tau_axis.offset.grad += push
                optimizer.step()
    assert len(resorts) >= 50 and counter.frame_count == 1
    for (k, v), w in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(v, w, msg=k)


@pytest.mark.filterwarnings("ignore::UserWarning")  # inductor's, about its own caches
def test_the_compiler_that_users_have_gives_the_same_numbers():
    model = _model()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(8, 4)
    for run in (compiled, eager):
        run(x).square().mean().backward()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own, after a break
def test_an_averaged_copy_whose_times_cross_breaks_the_graph_rather_than_the_order():
    model = _model()
    averaged = AveragedModel(model).eval()
    model[1].set_tau_([0.9, 0.5, 0.6, 0.7, 0.8, 1.0])
    assert averaged.module[1].tau_axis.read().diff().min() < 0
    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(averaged, backend="eager")(x), averaged(x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="(?i)graph|unsupported|tolist|item|data-dependent"):
        torch.compile(averaged, backend="eager", fullgraph=True)(x)


def test_export():
    model = _model().eval()
    model[1].set_tau_([0.9, 0.5, 0.6, 0.7, 0.8, 1.0])
    x = torch.randn(3, 4)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def test_functional_call_and_transforms_follow_the_tau_they_are_given():
    model = _model().eval()
    x = torch.randn(3, 4)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["1.tau_axis.offset"] = torch.tensor([0.5, 0.0, 0.1, 0.0, 0.0, 0.0])
    placed = copy.deepcopy(model)
    placed.load_state_dict(state)
    torch.testing.assert_close(torch.func.functional_call(model, state, (x,)), placed(x))

    parameters = dict(model.named_parameters())

    def loss(p):
        return torch.func.functional_call(model, p, (x,)).square().sum()

    ours = torch.func.grad(loss)(parameters)
    model(x).square().sum().backward()
    torch.testing.assert_close(ours["1.tau_axis.offset"], model[1].tau_axis.offset.grad)
    many = {k: torch.stack([v, v]) for k, v in parameters.items()}
    both = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (x,)))(many)
    torch.testing.assert_close(both[1], model(x))
