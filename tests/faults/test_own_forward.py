"""Branches and layers that are not plainly torch's own on plain real tensors: the step multiplies what they put out."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from torch_meanfield import MeanFieldSequential, conversion_report, convert
from torch_meanfield.depth.euler import euler_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature"),
]

X = torch.linspace(-1, 1, 24).view(4, 6)
STEP = torch.tensor(0.3)


class Ints(Tensor):
    """A weight that knows ``linear`` alone, as torchao's quantised tensors do; it stands for ``data / 10``."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Any:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)
        made.data_ = data
        return made

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = args
            return F.linear(x, weight.data_.float() / 10, bias)
        if func in (Tensor.detach, Tensor.__repr__, Tensor.requires_grad_):
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} of an int8 weight")


def forward_override(last: nn.Module) -> None:
    last.forward = lambda h: 0 * h  # type: ignore[method-assign]


def method_override(last: nn.Module) -> None:
    def forward(self: nn.Linear, h: Tensor) -> Tensor:
        return F.linear(h, self.weight.sign(), self.bias)

    last.forward = types.MethodType(forward, last)  # type: ignore[method-assign]


def doubled_by_hook(last: nn.Module) -> None:
    last.register_forward_hook(lambda m, args, out: out * 2 + 1)


def shifted_by_pre_hook(last: nn.Module) -> None:
    last.register_forward_pre_hook(lambda m, args: (args[0] + 1,))


def doubled_gradient(last: nn.Module) -> None:
    last.register_full_backward_hook(lambda m, before, after: tuple(None if g is None else g * 2 for g in before))


def call_override(last: nn.Module) -> None:
    last._call_impl = lambda h: h + 1  # type: ignore[method-assign]


def quantised(last: Any) -> None:
    last.weight = nn.Parameter(Ints(torch.arange(36).view(6, 6) % 7 - 3), requires_grad=False)


def sparse(last: Any) -> None:
    with torch.no_grad():
        last.weight = nn.Parameter(last.weight.to_sparse_csr(), requires_grad=False)


WAYS: dict[str, Any] = {
    "forward": forward_override,
    "method": method_override,
    "forward hook": doubled_by_hook,
    "forward pre-hook": shifted_by_pre_hook,
    "backward hook": doubled_gradient,
    "call": call_override,
    "tensor subclass": quantised,
    "sparse": sparse,
    "prune": lambda last: prune.l1_unstructured(last, "weight", 0.5),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": lambda last: parametrizations.spectral_norm(last).eval(),
}


def branch() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))


@pytest.mark.parametrize("name", WAYS)
def test_a_branch_that_ends_in_another_forward_is_called(name: str) -> None:
    f = branch()
    WAYS[name](f[-1])
    x = X.clone().requires_grad_()
    expected, got = x + STEP * f(x), euler_step(x, f, STEP)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), [x, f[0].weight], allow_unused=True),
        torch.autograd.grad(expected.square().sum(), [x, f[0].weight], allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_container_with_an_order_of_its_own_is_called() -> None:
    class Backwards(nn.Sequential):
        def __iter__(self) -> Any:
            return iter(list(super().__iter__())[::-1])

    f = Backwards(*branch())
    torch.testing.assert_close(euler_step(X, f, STEP), X + STEP * f(X))


def test_a_program_that_patches_the_layers_class_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """As programs of image generation do for their adapters: ``torch.nn.Linear.forward = ...``."""
    f, own = branch(), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, h: own(self, h) + 1)
    torch.testing.assert_close(euler_step(X, f, STEP), X + STEP * f(X))


def test_a_convolution_with_a_padding_of_its_own_is_called() -> None:
    """Tiled images: ``conv._conv_forward = ...`` pads the two axes differently."""
    conv = nn.Conv2d(3, 3, 3, padding=1)

    def padded(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1)), weight, bias).abs()

    conv._conv_forward = types.MethodType(padded, conv)  # type: ignore[method-assign]
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(euler_step(x, nn.Sequential(conv), -STEP), x - STEP * conv(x))


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d])
def test_complex_weights_keep_their_imaginary_part(kind: Any) -> None:
    torch.manual_seed(0)
    layer = (kind(6, 6, 1) if kind is nn.Conv1d else kind(6, 6)).to(torch.complex64)
    x = torch.randn(4, 6, 3 if kind is nn.Conv1d else 6, dtype=torch.complex64)
    torch.testing.assert_close(euler_step(x, nn.Sequential(layer), STEP), x + STEP * layer(x))
    stack = MeanFieldSequential(layer, horizon=0.3)
    torch.testing.assert_close(stack(x), x + STEP * layer(x))


def test_a_step_narrower_than_the_branch_rounds_nothing() -> None:
    f, x = branch().double(), X.double()
    expected = x + STEP.double() * f(x)
    torch.testing.assert_close(euler_step(x, f, STEP), expected, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(euler_step(x, f.append(nn.Tanh()), STEP), x + STEP.double() * f(x), rtol=0, atol=1e-15)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.g(self.f(h).relu())


@pytest.mark.parametrize("name", ["forward", "method", "tensor subclass", "sparse", "prune", "weight norm"])
def test_a_converted_layer_too_is_multiplied_as_a_whole(name: str) -> None:
    torch.manual_seed(0)
    model: Any = convert(nn.Sequential(*(Block() for _ in range(3))), X)
    stage: Any = conversion_report(model).stages[0].module
    torch.manual_seed(0)
    plain: Any = nn.Sequential(*(Block() for _ in range(3)))
    for net in (model, plain):
        WAYS[name](net[1].g)
    if name == "weight norm":
        for net in (model, plain):  # a particle's tensors are those of its neighbours
            WAYS[name](net[0].g), WAYS[name](net[2].g)
    with torch.no_grad():
        stage.tau_axis.place_(torch.tensor([0.3, 0.9, 1.5]))
    h = X
    for block, step in zip(plain, (0.3, 0.6, 0.6), strict=True):
        h = h + step * (block(h) - h)
    torch.testing.assert_close(model(X), h)


def test_complex_blocks_are_refused_with_the_way_out() -> None:
    net = nn.Sequential(*(Block().to(torch.complex64) for _ in range(3)))
    for block in net:
        block.forward = types.MethodType(lambda self, h: h + self.g(self.f(h)), block)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no real floating-point numbers; a MeanFieldSequential"):
        convert(net, torch.randn(4, 6, dtype=torch.complex64))
