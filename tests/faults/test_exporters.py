"""Exporters and tracers: what they make of a layer or a converted model computes the same, or `fold` is named."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_meanfield import MeanFieldResNet, MeanFieldSequential, conversion_report, convert, fold

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export"),
    pytest.mark.filterwarnings("ignore:.torch.jit"),
    pytest.mark.filterwarnings("ignore:Constant folding"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # the order is that of now
]

X = torch.linspace(-1, 1, 24).view(4, 6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.g(self.f(h).relu())
        return out


class Gained(Block):
    """A block that holds a scaled parameter itself, which is no whole layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.gain * self.g(self.f(h).relu()).tanh()
        return out


def layer() -> Any:
    stack = MeanFieldSequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(3)))
    return stack.set_tau_([0.3, 0.9, 1.5]).eval()


def converted(block: type[nn.Module]) -> Any:
    model = convert(nn.Sequential(nn.Linear(6, 6), *(block() for _ in range(3))), X)
    conversion_report(model).stages[0].module.set_tau_([0.3, 0.9, 1.5])  # type: ignore[union-attr]
    return model.eval()


def resnet() -> Any:
    return MeanFieldResNet(depth=20, num_classes=3).eval()


MODELS: dict[str, Any] = {
    "layer": (layer, X),
    "converted": (lambda: converted(Block), X),
    "converted, gain": (lambda: converted(Gained), X),
    "resnet": (resnet, torch.linspace(-1, 1, 384).view(2, 3, 8, 8)),
}


def made(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    build, x = MODELS[name]
    return build(), x


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_onnx_computes_the_same(name: str, dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    import onnxruntime

    model, x = made(name)
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), file, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(file)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_no_exported_graph_sorts_and_all_compute_the_same(name: str) -> None:
    """ONNX has no stable sort, and the legacy exporter no multiplication of lists; both without ONNX installed."""
    model, x = made(name)
    exported = torch.export.export(model, (x,))
    names = {str(n.target) for n in exported.graph.nodes}
    assert not any("sort" in n or "foreach" in n for n in names)
    torch.testing.assert_close(exported.module()(x), model(x))
    traced = torch.jit.trace(model, x)
    assert "foreach" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model(x))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_scripting_names_fold_and_leaves_the_model_as_it_was(name: str) -> None:
    model, x = made(name)
    before, modules = model(x), list(model.modules())
    with pytest.raises(TypeError, match=r"torch.jit.script cannot .*fold\(model\)"):
        torch.jit.script(model)
    assert list(model.modules()) == modules and torch.equal(model(x), before)
    if name == "converted":
        torch.testing.assert_close(torch.jit.script(fold(model))(x), before)
        with pytest.raises(AttributeError, match=r"torch.jit.script cannot .*fold\(model\)"):
            torch.jit.script(model[2])


@pytest.mark.parametrize("name", MODELS)
def test_symbolic_tracing_names_fold(name: str) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = made(name)
    nodes = [n for n, _ in model.named_modules()][-1:]
    for tracer in (torch.fx.symbolic_trace, lambda m: create_feature_extractor(m, nodes)):
        with pytest.raises(TypeError, match=r"torch.fx.symbolic_trace.*fold\(model\)"):
            tracer(model)
    if name.startswith("converted"):
        torch.testing.assert_close(
            create_feature_extractor(fold(model), ["2"])(x)["2"], model[2](model[1](model[0](x)))
        )


def test_features_of_torchvisions_and_timms_own_models_are_those_of_the_folded_one() -> None:
    timm = pytest.importorskip("timm")
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    x, seen = torch.randn(2, 3, 32, 32), []
    for model, node in ((models.resnet18(), "layer3"), (timm.create_model("resnet18"), "layer3.1.act2")):
        convert(model.eval(), x)
        stage: Any = conversion_report(model).stages[0].module
        stage.set_tau_(0.7 * stage.tau)
        model.layer3.register_forward_hook(lambda m, args, out: seen.append(out))
        with pytest.raises(TypeError, match=r"create_feature_extractor.*fold\(model\)"):
            models.feature_extraction.create_feature_extractor(model, [node])
        model(x)
        expected, plain = seen[-1], fold(model, x)
        out = models.feature_extraction.create_feature_extractor(plain, [node])(x)[node]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
