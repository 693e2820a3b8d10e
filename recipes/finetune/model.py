"""timm backbones for fine-tuning: made by name, filled from a file, with their classifier and layers known."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.errors import BadInput


@dataclass(frozen=True)
class Backbone:
    """A timm model for given images and classes: what it takes to make it, and to make it again.

    Attributes:
        name: A name that ``timm.create_model`` knows, with or without the tag of pretrained weights.
        num_classes: Outputs of its classifier.
        in_chans: Channels of the images.
        side: Side of the (square) images in pixels.
        kwargs: Further arguments of ``timm.create_model``.
    """

    name: str
    num_classes: int
    in_chans: int
    side: int
    kwargs: dict[str, Any] = field(default_factory=dict)

    def create(self, pretrained: bool = False) -> nn.Module:
        """A new model, with random weights or those that its authors published.

        Transformers are built for images of ``side`` pixels; networks without ``img_size`` take any that they can run.

        Raises:
            BadInput: An unknown name or argument, images that the model cannot take, or weights that cannot be had.
        """
        import timm

        if not self.name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
            self._check_name(timm.list_models())
        given = {"num_classes": self.num_classes, "in_chans": self.in_chans, "pretrained": pretrained}
        try:
            try:
                model = timm.create_model(self.name, img_size=self.side, **given, **self.kwargs)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                model = timm.create_model(self.name, **given, **self.kwargs)
        except TypeError as error:
            raise BadInput(f"--model.kwargs {self.kwargs}: {self.name} does not take them ({error})") from error
        # Networks, hubs and caches fail in their own ways each; without weights, timm raises RuntimeError.
        except Exception as error:
            if pretrained:
                raise BadInput(
                    f"--pretrained: no weights for {self.name} ({type(error).__name__}: {error}); pass "
                    f"--checkpoint FILE with its state dict"
                ) from error
            raise BadInput(f"--model {self.name}: {self._cannot(error)}") from error
        self._check_run(model)
        return model

    def _check_name(self, known: list[str]) -> None:
        architecture = self.name.partition(".")[0]
        if architecture not in known:
            close = difflib.get_close_matches(architecture, known)
            hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() has all names"
            raise BadInput(f"--model {self.name}: timm has no model of this name; {hint}")

    def _cannot(self, error: Exception) -> str:
        return (
            f"it cannot be made for or run on images of {self.side} pixels ({type(error).__name__}: {error}); pass "
            f"--size PIXELS, to which images are resized"
        )

    def _check_run(self, model: nn.Module) -> None:
        training = model.training
        try:
            with torch.no_grad():
                logits = model.eval()(self.example())
        except Exception as error:  # what a model raises on images too small for it is its own choice
            raise BadInput(f"--model {self.name}: {self._cannot(error)}") from error
        model.train(training)
        if not isinstance(logits, Tensor) or logits.shape != (1, self.num_classes):
            raise BadInput(f"--model {self.name}: it does not classify images; pass an image classifier")

    def example(self) -> Tensor:
        """Noise of the shape of one image, always the same; the global random state is left alone."""
        shape = (1, self.in_chans, self.side, self.side)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def classifiers(model: nn.Module) -> dict[str, nn.Module]:
    """The last layers of a timm model by qualified name: what is new for new classes.

    Raises:
        BadInput: timm does not say which they are.
    """
    heads = model.get_classifier()
    # Distilled transformers have two.
    chosen = [h for h in (heads if isinstance(heads, (tuple, list)) else (heads,)) if isinstance(h, nn.Module)]
    found = {
        n: m for n, m in model.named_modules() if any(m is h for h in chosen) and any(True for _ in m.parameters())
    }
    if not found:
        raise BadInput(f"{type(model).__name__} has no classifier with parameters; pass another model")
    return found


def load_weights_(model: nn.Module, path: Path, new_head: bool) -> str:
    """Fill ``model`` from a file with a plain timm state dict; nothing but tensors is unpickled.

    Args:
        model: A plain timm model.
        path: Written by ``torch.save``, or with the suffix ``.safetensors``.
        new_head: Leave the file's classifier out in any case, and not only if it has another number of classes.

    Returns:
        One line that says what was loaded and what was left out.

    Raises:
        BadInput: No readable file, or keys or shapes beside the classifier's that differ; all are named. The model is
            unchanged then.
    """
    from timm.models import load_state_dict

    if not path.is_file():
        raise BadInput(f"--checkpoint {path}: there is no such file; pass one that holds a timm state dict")
    try:
        weights = dict(load_state_dict(str(path), weights_only=True))
        shapes = {k: tuple(v.shape) for k, v in weights.items()}
    except Exception as error:  # torch.load fails in as many ways as a file can be damaged
        raise BadInput(
            f"--checkpoint {path}: not a readable state dict ({type(error).__name__}); it is damaged or holds "
            f"more than tensors, pass a file written with torch.save(model.state_dict(), FILE)"
        ) from error
    mine = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    heads = tuple(f"{name}." for name in classifiers(model))
    told = f"weights from {path.name}"
    foreign = [k for k in shapes if k.startswith(heads) and shapes[k] != mine.get(k)]
    if new_head or foreign:
        dropped = [k for k in shapes if k.startswith(heads)]
        weights = {k: v for k, v in weights.items() if k not in dropped}
        classes = sorted({shapes[k][0] for k in dropped if shapes[k]})
        told += f"; its classifier of {', '.join(map(str, classes)) or 'no'} classes left out, a new one is random"
        mine = {k: s for k, s in mine.items() if not k.startswith(heads)}
    _check_same(path, {k: shapes[k] for k in weights}, mine)
    model.load_state_dict(weights, strict=False)  # all but the classifier is there, as just checked
    return told


def _check_same(path: Path, theirs: dict[str, tuple[int, ...]], mine: dict[str, tuple[int, ...]]) -> None:
    problems = [
        _named("lacks", [k for k in mine if k not in theirs]),
        _named("has besides", [k for k in theirs if k not in mine]),
        _named(
            "differs in",
            [f"{k} ({list(theirs[k])}, not {list(mine[k])})" for k in mine if k in theirs and theirs[k] != mine[k]],
        ),
    ]
    told = "; ".join(p for p in problems if p)
    if told:
        raise BadInput(
            f"--checkpoint {path}: not a state dict of this model: it {told}. Pass the model's own name, arguments and "
            f"image size (--model, --model.kwargs, --size)"
        )


def _named(what: str, keys: list[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"{what} {', '.join(keys[:most])}{more}" if keys else ""


def layer_groups(model: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups whose learning rate falls from the classifier to the stem: ``lr * layer_decay ** depth``.

    timm knows the layers and which parameters take no weight decay (vectors, position embeddings). Its groups carry
    ``lr_scale``, which only timm's own schedulers obey; these carry the learning rate itself. Call it before
    :func:`torch_meanfield.convert`, so that the layers are counted as timm counts them.

    Args:
        model: A plain timm model.
        lr: Learning rate of the classifier.
        weight_decay: Where there is any.
        layer_decay: Rate of a layer over that of the next one; 1 gives all the same.

    Returns:
        Dictionaries with ``params``, ``lr``, ``weight_decay`` and ``name``, from the stem to the classifier.
    """
    from timm.optim import param_groups_layer_decay

    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group in param_groups_layer_decay(
        model, weight_decay=weight_decay, no_weight_decay_list=tuple(exempt), layer_decay=layer_decay
    ):
        groups.setdefault((group["lr_scale"], group["weight_decay"]), []).extend(group["params"])
    return [
        {"params": params, "lr": lr * scale, "weight_decay": decay, "name": name}
        for name, ((scale, decay), params) in zip(_names(groups), groups.items(), strict=True)
    ]


def _names(groups: dict[tuple[float, float], Any]) -> Iterator[str]:
    scales = sorted({scale for scale, _ in groups})
    for scale, decay in groups:
        yield f"layers{scales.index(scale)}" + ("" if decay else "_no_decay")
