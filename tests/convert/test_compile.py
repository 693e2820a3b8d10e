"""Converted models under ``torch.compile``: one graph, and no recompilation over steps and re-sorts."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.convert.networks import CifarResNet, PlainViT, images, stack, tokens
from torch_meanfield import conversion_report, convert, subscribe


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


CASES = {
    "cifar": (lambda: CifarResNet(blocks=3), lambda: images(4)),
    "vit": (lambda: PlainViT(depth=3), images),
    "gate": (lambda: stack(kind="gate"), tokens),
}


@pytest.mark.parametrize("case", CASES)
def test_one_graph_for_all_steps_and_re_sorts(case):
    build, example = CASES[case]
    torch.manual_seed(0)
    model, x = build(), example()
    convert(model, x, horizon=1.0)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    nets = [(model, compiled), (eager, eager)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m, _ in nets]
    stage = conversion_report(model).stages[0].module
    resorts = []
    with subscribe(resorts.append, model=model):
        for i in range(6):
            for (m, net), optimizer in zip(nets, optimizers, strict=True):
                optimizer.zero_grad()
                y = net(x)
                y.square().mean().backward()
                offset = conversion_report(m).stages[0].module.tau_axis.offset
                offset.grad[i % len(stage)] -= 1500.0 / len(stage)  # overtakes its neighbour
                optimizer.step()
    assert len(resorts) >= 3
    assert counter.frame_count == 1
    for (k, v), w in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(v, w, msg=k)


def unconverted(model):
    """The blocks of ``model`` as they were before the conversion."""
    plain = stack(len(model.body))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "tau_axis" not in k})
    return plain.body


def test_unsorted_slots_give_no_negative_step_in_a_compiled_model():
    torch.manual_seed(0)
    model, x = stack(3).eval(), tokens()
    convert(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        stage = conversion_report(model).stages[0].module
        stage.tau_axis.offset.copy_(torch.tensor([2.5, 0.0, -0.5]))  # tau = 3.5, 2, 2.5: by slot steps of 1, 2, 0.5
        h = model.enter(x)
        for block, step in zip(unconverted(model), (1.0, 2.0, 0.5), strict=True):
            h = h + step * (block(h) - h)
        torch.testing.assert_close(compiled(x), model.leave(h))
