"""The empirical tangent kernel against whole Jacobians, in blocks, within its memory."""

import copy

import pytest
import torch
from torch import nn

from tests.theory.jacobians import full_jacobian
from torch_meanfield.theory.ntk import empirical_ntk
from torch_meanfield.theory.tangent_routes import routes


class Odd(nn.Module):
    """Weights used twice, in plain arithmetic, transposed, in attention, and a layer over what are no samples."""

    def __init__(self):
        super().__init__()
        self.twice, self.tied = nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm, self.attention = nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.gain, self.unused = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(2))
        self.window = nn.Linear(3, 3)

    def forward(self, x):
        x = x.view(-1, 2, 6)
        x = self.twice(torch.tanh(self.twice(x)))
        x = self.norm(x) * self.gain
        x = x + self.attention(x, x, x)[0]
        x = self.window(x.reshape(-1, 3)).reshape(-1, 2, 6)
        return (self.tied(x) @ self.tied.weight).mean(1)


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def convolutional():
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 12, 3, padding="same", groups=3, bias=False), nn.GroupNorm(2, 12), nn.ReLU(inplace=True),
        nn.Flatten(), nn.LayerNorm(108), nn.Dropout(0.5), nn.Linear(108, 4),
    ).double()  # fmt: skip
    model(images(8, 2, 6, 6))  # so that running statistics are not what they were
    return model


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), (5,)),
    "convolutional": (convolutional, (2, 6, 6)),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding=2, dilation=2), nn.Flatten(), nn.Linear(32, 2)),
        (2, 8),
    ),
    "odd": (Odd, (12,)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (3, 8)),
}


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    make, shape = MODELS[request.param]
    return make().double(), images(5, *shape)


def test_the_kernel_is_that_of_the_whole_jacobian(case):
    model, x = case
    kernel = empirical_ntk(model, x)
    jacobian = full_jacobian(model.eval(), x)
    torch.testing.assert_close(kernel, jacobian @ jacobian.T)


@pytest.mark.parametrize("block_size", [1, 2, 5])
def test_blocks_change_nothing(case, block_size):
    model, x = case
    torch.testing.assert_close(empirical_ntk(model, x, block_size=block_size), empirical_ntk(model, x))


def test_two_batches_give_a_part_of_the_kernel(case):
    model, x = case
    k = model.eval()(x[:1]).numel()
    torch.testing.assert_close(empirical_ntk(model, x[:2], x, block_size=2), empirical_ntk(model, x)[: 2 * k])


def test_the_trace_sums_over_outputs(case):
    model, x = case
    kernel = empirical_ntk(model, x)
    k = len(kernel) // len(x)
    trace = kernel.view(len(x), k, len(x), k).diagonal(dim1=1, dim2=3).sum(-1)
    torch.testing.assert_close(empirical_ntk(model, x, reduce="trace", block_size=2), trace)


def test_small_workspaces_change_nothing(monkeypatch):
    """Convolutions are then written out a channel or a group at a time, products taken a sample at a time."""
    torch.manual_seed(0)
    model, x = convolutional(), images(5, 2, 6, 6)
    whole = empirical_ntk(model, x)
    for bytes_ in (1, 1 << 12, 1 << 15):
        monkeypatch.setattr("torch_meanfield.theory.tangent_routes.SMALLEST_WORKSPACE", bytes_)
        monkeypatch.setattr("torch_meanfield.theory.tangent_routes.LARGEST_WORKSPACE", bytes_)
        torch.testing.assert_close(empirical_ntk(model, x), whole)


def test_what_is_understood_needs_no_jacobian_and_what_is_not_goes_through_torch_func():
    torch.manual_seed(0)
    plain = routes(convolutional().eval(), images(2, 2, 6, 6), trace=False)
    assert not plain.functional and set(plain.factored) == {"0.weight", "3.weight", "9.weight"}
    odd = routes(Odd().double().eval(), images(2, 12), trace=False)
    assert {"gain", "unused", "window.weight", "tied.weight"} <= {name for group in odd.functional for name in group}
    assert set(odd.factored) == {"twice.weight"} and "norm.weight" in odd.dense


def test_frozen_parameters_take_no_part():
    torch.manual_seed(0)
    model, x = MODELS["mlp"][0]().double(), images(3, 5)
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    jacobian = full_jacobian(model, x)
    assert jacobian.shape[1] == 7 + 21
    torch.testing.assert_close(empirical_ntk(model, x), jacobian @ jacobian.T)


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = convolutional()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    empirical_ntk(model, images(3, 2, 6, 6))
    with pytest.raises(ValueError, match="max_bytes"):
        empirical_ntk(model, images(3, 2, 6, 6), max_bytes=1000)
    assert [m.training for m in model.modules()] == modes and not any(m._forward_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[9].weight.grad is None


def test_memory_is_bounded_and_the_error_names_the_block_size_that_fits(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 4))
    x = torch.randn(40, 3, 8, 8)
    calls = []
    monkeypatch.setattr("torch_meanfield.theory.ntk._add_", lambda *args: calls.append(args))
    bound = 18 << 20
    with pytest.raises(ValueError, match=r"needs [\d,]+ bytes with block_size=40.*block_size=(\d+) fits") as error:
        empirical_ntk(model, x, block_size=40, max_bytes=bound)
    assert not calls
    fits = int(str(error.value).split("block_size=")[-1].split()[0])
    assert 1 <= fits < 40
    empirical_ntk(model, x, block_size=fits, max_bytes=bound)
    with pytest.raises(ValueError, match=f"block_size={fits} fits"):
        empirical_ntk(model, x, block_size=fits + 1, max_bytes=bound)
    with pytest.raises(ValueError, match="no block size fits"):
        empirical_ntk(model, x, max_bytes=1 << 20)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": torch.tanh}, TypeError, "torch.nn.Module"),
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(0, 5)}, ValueError, "at least one sample"),
        ({"y": torch.zeros(2, 4)}, ValueError, "samples like those of x"),
        ({"reduce": "mean"}, ValueError, "'trace'"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes must be an integer"),
        ({"x": torch.full((2, 5), torch.nan)}, ValueError, "not finite"),
        ({"model": nn.Flatten()}, ValueError, "no parameter"),
        (
            {"model": nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, track_running_stats=False))},
            ValueError,
            "batch norm",
        ),
        ({"model": nn.LSTM(5, 3)}, ValueError, "must return a tensor"),
    ],
)
def test_bad_arguments(arguments, error, message):
    torch.manual_seed(0)
    call = {"model": nn.Linear(5, 2), "x": torch.randn(3, 5)} | arguments
    with pytest.raises(error, match=message):
        empirical_ntk(call.pop("model"), call.pop("x"), call.pop("y", None), **call)


def test_several_devices():
    model = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="several devices"):
        empirical_ntk(model, torch.randn(3, 5))
