"""Tools that change nothing in mathematics, in a training with re-sorts and births: it ends as it does without them."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.trust.tools import Converted, Net, Trained, furthest, optimizer_of, train


@lru_cache(maxsize=4)
def plain(steep: bool = True, made: type[Net] = Net) -> Trained:
    net = made()
    out = train(net, optimizer_of(net, steep=steep))
    assert out.resorts >= 5 and out.born >= 5 and out.batches == [32.0] * 3
    return out


both = pytest.mark.parametrize("made", [Net, Converted])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulated_gradients_are_those_of_the_whole_batch(set_to_none: bool) -> None:
    net = Net()
    optimizer = optimizer_of(net)
    zero = optimizer.zero_grad
    optimizer.zero_grad = lambda: zero(set_to_none=set_to_none)  # type: ignore[method-assign,assignment]
    out = train(net, optimizer, micro=2)
    assert (out.resorts, out.batches) == (plain().resorts, [32.0] * 3)
    assert out.recorded[0] == [2 * passes for passes in plain().recorded[0]]
    # the rows that are recorded are others of the batch, and so are the units that are placed by them
    whole, parts = (
        train(n, optimizer_of(n, steep=False), micro=m) for n, m in ((Net().double(), 1), (Net().double(), 2))
    )
    assert whole.born == parts.born > 0 and furthest(whole, parts) < 1e-9


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipped_gradients_are_those_that_move_everything(clip: str) -> None:
    """Against clipping by hand."""

    def torchs(net: nn.Module) -> None:
        if clip == "norm":
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        else:
            nn.utils.clip_grad_value_(net.parameters(), 0.05)

    def by_hand(net: nn.Module) -> None:
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for g in gradients:
            g.mul_(min(1.0, 0.5 / (float(norm) + 1e-6))) if clip == "norm" else g.copy_(g.clip(-0.05, 0.05))

    ends = []
    for clipping in (torchs, by_hand):
        net = Net()
        optimizer = optimizer_of(net, tau_lr=2.0 if clip == "value" else 0.5)
        ends.append(train(net, optimizer, before_step=lambda c=clipping, n=net: c(n)))  # type: ignore[misc]
    assert furthest(*ends) < 1e-4 and furthest(ends[0], plain()) > 1e-2
    assert ends[0].resorts == ends[1].resorts > 0 and ends[0].born == ends[1].born > 0


def test_a_scaler_that_unscales_before_clipping_changes_nothing() -> None:
    net = Net()
    optimizer = optimizer_of(net, steep=False)  # what is recorded is on the scale of the loss that was scaled
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)

    def backward(x: Tensor, y: Tensor, micro: int) -> None:
        scaler.scale(F.cross_entropy(net(x), y)).backward()
        scaler.unscale_(optimizer)

    step = optimizer.step

    def scaled() -> None:
        optimizer.step = step  # type: ignore[method-assign]
        scaler.step(optimizer)
        scaler.update()
        optimizer.step = scaled  # type: ignore[method-assign,assignment]

    optimizer.step = scaled  # type: ignore[method-assign,assignment]
    out = train(net, optimizer, backward=backward)
    assert (out.resorts, out.born, out.batches) == (plain(False).resorts, plain(False).born, [32.0] * 3)
    assert furthest(out, plain(False)) == 0.0  # the scale is a power of two


class Recomputed(nn.Module):
    """A block whose activations are not kept."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return out


@both
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_that_is_recomputed_is_seen_once(reentrant: bool, micro: int, made: type[Net]) -> None:
    """Hooks fire in the recomputation too: nothing may be counted or recorded twice, or dropped for it."""
    net = made()
    expected = plain(made=made) if micro == 1 else train(n := made(), optimizer_of(n), micro=micro)

    def forward(x: Tensor) -> Tensor:
        first, *rest = net.parts()
        h = first(x)
        for part in rest:
            h = checkpoint(part, h, use_reentrant=reentrant)
        return h

    out = train(net, optimizer_of(net), forward=forward, micro=micro)
    assert (out.batches, out.recorded) == (expected.batches, expected.recorded)
    assert furthest(out, expected) == 0.0


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, when units are looked for
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_recompute_themselves_change_places(reentrant: bool) -> None:
    net, without = Net(lambda block: Recomputed(block, reentrant)), Net(lambda block: Recomputed(block, False))
    for block in without.stack:
        block.forward = block.inner.forward  # type: ignore[union-attr]
    ends = [train(n, optimizer_of(n, steep=False)) for n in (net, without)]
    assert furthest(*ends) < 1e-6 and ends[0].resorts == ends[1].resorts > 0 and ends[0].born == ends[1].born > 0


@both
def test_functional_call_with_gradients_from_torch_func(made: type[Net]) -> None:
    net = made()

    def backward(x: Tensor, y: Tensor, micro: int) -> None:
        parameters = dict(net.named_parameters())
        gradients = torch.func.grad(
            lambda p: F.cross_entropy(torch.func.functional_call(net, p, (x,)), y) / micro
        )(parameters)  # fmt: skip
        for name, p in parameters.items():
            p.grad = gradients[name]

    out = train(net, optimizer_of(net), backward=backward)
    assert (out.batches, out.recorded) == (plain(made=made).batches, plain(made=made).recorded)
    assert furthest(out, plain(made=made)) < 1e-5


def test_under_vmap_the_missing_batch_size_is_said_and_everything_else_goes_on() -> None:
    """One sample at a time, many at once: no value can be kept from inside."""
    net = Net()

    def one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, parameters, (x[None],)), y[None])

    def backward(x: Tensor, y: Tensor, micro: int) -> None:
        parameters = dict(net.named_parameters())
        each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(parameters, x, y)
        for name, p in parameters.items():
            p.grad = each[name].mean(0)

    with pytest.warns(RuntimeWarning, match="does not know how many samples a step has .*vmap"):
        out = train(net, optimizer_of(net, steep=False), backward=backward)
    assert out.batches == [None] * 3 and furthest(out, plain(False)) < 1e-4


def test_an_ensemble_of_stacked_parameters() -> None:
    """Members are those of their modules; what was trained in a stack is sorted when a module takes it over."""
    nets = [Net() for _ in range(3)]
    for i, net in enumerate(nets):
        with torch.no_grad():
            net.stem.weight.add_(0.1 * i)
    parameters, buffers = torch.func.stack_module_state(nets)  # type: ignore[arg-type]
    x = torch.rand(5, 64)

    def run(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(nets[0], (p, b), (x,))
        return out

    together = torch.func.vmap(run)(parameters, buffers)
    for out, net in zip(together, nets, strict=True):
        torch.testing.assert_close(out, net(x))
    with torch.no_grad():
        parameters["stack.tau_axis.offset"][1, 0] += 0.6
    nets[1].load_state_dict({k: v[1] for k, v in (*parameters.items(), *buffers.items())})
    tau = nets[1].stack.tau_axis.read()
    assert bool((tau.diff() >= 0).all()) and tau.tolist() == pytest.approx([0.5, 0.75, 0.85, 1.0])


@pytest.mark.parametrize("made", [Net, Converted])
def test_a_block_at_time_zero_has_a_gradient_in_every_form_of_the_call(made: type[Net]) -> None:
    """It was projected there; without a gradient it would never leave."""
    net = made()
    net.stack.set_tau_([0.0, 0.3, 0.6, 1.0])
    x, y = torch.rand(8, 64), torch.arange(8)
    F.cross_entropy(net(x), y).backward()
    expected = net.stack.tau_axis.offset.grad
    parameters = dict(net.named_parameters())
    given = torch.func.grad(lambda p: F.cross_entropy(torch.func.functional_call(net, p, (x,)), y))(parameters)
    name = next(k for k in parameters if k.endswith("tau_axis.offset"))
    torch.testing.assert_close(given[name], expected)
    (through,) = torch.autograd.grad(net.stack.tau.sum(), net.stack.tau_axis.offset)
    assert expected[0] != 0 and through.tolist() == [1.0] * 4


class Images(nn.Module):
    """A convolutional net whose stack re-sorts and whose channels are replaced."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        from torch_meanfield import MeanFieldSequential

        def block() -> nn.Module:
            return nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.stack = MeanFieldSequential(*(block() for _ in range(4)), horizon=1.0)
        self.hidden = nn.Sequential(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 3))
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(self.stack(self.stem(x.view(-1, 1, 8, 8))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_last_stays_the_layout_of_weights_and_of_their_momentum(channels_last: bool) -> None:
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last if channels_last else torch.contiguous_format):
        net = Images().double().to(memory_format=layout)  # type: ignore[call-overload]
        optimizer = optimizer_of(net, steep=False)
        ends.append(train(net, optimizer))
    held = [p for p in net.parameters() if p.ndim == 4 and p.shape[1] > 1]
    held += [optimizer.state[p]["momentum_buffer"] for p in held]
    assert len(held) == 12 and all(t.is_contiguous(memory_format=layout) for t in held)
    assert furthest(*ends) < 1e-9 and ends[0].resorts == ends[1].resorts > 0 and ends[0].born == ends[1].born > 0
