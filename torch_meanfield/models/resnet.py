"""``MeanFieldResNet``: the pre-activation CIFAR networks of Lu et al. 2020, section 5, with learnable times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from torch_meanfield.depth.sequential import MeanFieldSequential
from torch_meanfield.depth.tau_axis import check_tau_entries
from torch_meanfield.models.branches import OpeningBlock, basic_branch, bottleneck_branch
from torch_meanfield.models.intermediates import forward_intermediates
from torch_meanfield.particles.loading import check_entries, loaded_whole

BlockType = Literal["basic", "bottleneck", "resnext"]
_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "avg": lambda x: x.mean(dim=(2, 3)),
    "max": lambda x: x.amax(dim=(2, 3)),
    "avgmax": lambda x: 0.5 * (x.mean(dim=(2, 3)) + x.amax(dim=(2, 3))),
}
_LAYERS_PER_BLOCK = {"basic": 2, "bottleneck": 3, "resnext": 3}
_STAGES = 3


class Stage(nn.Module):
    """An opening block (where the shape changes) and a mean-field stack of the blocks of one shape.

    Args:
        opening: maps the stage's input to its shape; ``nn.Identity`` where the shape does not change.
        particles: the sortable blocks, or ``None`` if the stage has none (one block per stage).
    """

    def __init__(self, opening: nn.Module, particles: MeanFieldSequential | None) -> None:
        super().__init__()
        self.opening = opening
        self.particles = particles

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, H_in, W_in)`` to ``(B, C, H, W)``."""
        x = self.opening(x)
        return x if self.particles is None else cast(Tensor, self.particles(x))


class MeanFieldResNet(nn.Module):
    """A pre-activation CIFAR ResNet or ResNeXt whose blocks have learnable times tau, one tau axis for each stage.

    Three stages of 16, 32, 64 channels (times 4 for bottlenecks; 256, 512, 1024 for ResNeXt) at resolutions 1, 1/2 and
    1/4. The block that changes resolution or width opens its stage and has no tau; all others do.

    Args:
        depth: 6k + 2 for ``"basic"`` (20, 32, 44, 56, 110), 9k + 2 for ``"bottleneck"`` (164) and ``"resnext"`` (29).
        num_classes: size of the output; 0 leaves out the classifier.
        in_chans: channels of the input.
        block: kind of residual branch.
        cardinality: groups of the 3x3 convolution (ResNeXt only).
        base_width: channels in each group of the first stage (ResNeXt only).
        horizon: last time T of each stage, see :class:`MeanFieldSequential`; ``None``: its number of particles.
        tau_init: ``"uniform"`` or ``"random"``, see :class:`MeanFieldSequential`.
        learn_tau: ``False`` gives the vanilla twin, with the same initial weights under the same seed.
        drop_rate: dropout before the classifier.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, or ``""`` for an unpooled feature map (without a classifier).

    Shape:
        input ``(B, in_chans, H, W)``, output ``(B, num_classes)``. H and W of at least 4 (CIFAR: 32).

    Raises:
        ValueError: a depth that the block type does not have, an unknown block type or pooling, a size below 1, a
            classifier without pooling.

    Source: Lu et al. 2020, section 5; He et al. 2016 (pre-activation), He et al. 2015 (initialisation), Xie et al.
        2017 (ResNeXt). Parameters, in millions: ResNet-20/32/44/56/110 0.27/0.46/0.66/0.85/1.7, ResNet-164 1.7,
        ResNeXt-29 8x64d 34.4 and 16x64d 68.1.

    Example:
        >>> model = MeanFieldResNet(depth=20)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        in_chans: int = 3,
        block: BlockType = "basic",
        *,
        cardinality: int = 8,
        base_width: int = 64,
        horizon: float | None = None,
        tau_init: Literal["uniform", "random"] = "uniform",
        learn_tau: bool = True,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        blocks = _blocks_per_stage(depth, block)
        for name, value, least in (
            ("num_classes", num_classes, 0),
            ("in_chans", in_chans, 1),
            ("cardinality", cardinality, 1),
            ("base_width", base_width, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        _check_head(num_classes, global_pool)
        super().__init__()
        self.depth, self.block = depth, block
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        chans = 64 if block == "resnext" else 16
        self.stem = nn.Conv2d(in_chans, chans, 3, padding=1, bias=False)
        self.feature_info: list[dict[str, Any]] = []
        for s in range(_STAGES):
            stride = 1 if s == 0 else 2
            out_chans = (16 if block == "basic" else 64 if block == "bottleneck" else 256) * 2**s
            branch = _branch_factory(block, s, cardinality, base_width)
            changes = stride != 1 or chans != out_chans
            opening = OpeningBlock(branch(chans, out_chans, stride), chans, out_chans, stride) if changes else None
            count = blocks - (opening is not None)
            particles = (
                MeanFieldSequential(
                    *(branch(out_chans, out_chans) for _ in range(count)), horizon=horizon, learn_tau=learn_tau
                )
                if count
                else None
            )
            self.add_module(f"stage{s + 1}", Stage(opening or nn.Identity(), particles))
            chans = out_chans
            self.feature_info.append({"num_chs": chans, "reduction": 2**s, "module": f"stage{s + 1}"})
        self.num_features = self.head_hidden_size = chans
        self.norm = nn.BatchNorm2d(chans)
        self.act = nn.ReLU()
        self.global_pool = global_pool
        self.fc: nn.Module = nn.Linear(chans, num_classes) if num_classes else nn.Identity()
        self.init_weights()
        if tau_init == "random":  # last, so that the twins draw the same weights
            for layer in self.mean_field_layers().values():
                layer.draw_tau_()
        elif tau_init != "uniform":
            raise ValueError(f"tau_init must be 'uniform' or 'random', got {tau_init!r}")

    def init_weights(self) -> None:
        """He et al. 2015: normal weights of variance 2 / fan-out for convolutions; norms 1 and 0; tau as when made."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
        for layer in self.mean_field_layers().values():
            layer.tau_axis.reset_parameters()

    def stages(self) -> list[Stage]:
        """The three stages, in order."""
        return [cast(Stage, getattr(self, f"stage{s + 1}")) for s in range(_STAGES)]

    def mean_field_layers(self) -> dict[str, MeanFieldSequential]:
        """The stacks of sortable blocks by their qualified names."""
        return {name: m for name, m in self.named_modules() if isinstance(m, MeanFieldSequential)}

    # -- timm's model interface --------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """Map ``(B, in_chans, H, W)`` to the normalised, activated feature map ``(B, num_features, H / 4, W / 4)``."""
        x = self.stem(x)
        for stage in self.stages():
            x = stage(x)
        return self._normed(x)

    def _normed(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.act(self.norm(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, drop and classify a feature map; ``pre_logits=True`` stops before the classifier."""
        x = _POOLS[self.global_pool](x)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else cast(Tensor, self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(self, x: Tensor, **kwargs: Any) -> Any:
        """Feature maps of chosen stages, as in timm: see :func:`.intermediates.forward_intermediates`."""
        return forward_intermediates(self.stem, self.stages(), self._normed, x, **kwargs)

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The classifier, an ``nn.Linear`` or ``nn.Identity``; or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place; 0 classes leave it out.

        Args:
            num_classes: size of the new output.
            global_pool: as in the constructor; ``None`` keeps it.

        Raises:
            ValueError: an unknown pooling, a negative number of classes, or a classifier without pooling.
        """
        pool = self.global_pool if global_pool is None else global_pool
        _check_head(num_classes, pool)
        self.num_classes, self.global_pool = num_classes, pool
        weight = self.norm.weight
        self.fc = (
            nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            if num_classes
            else nn.Identity()
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each sortable block in the backward pass instead of keeping its activations."""
        for layer in self.mean_field_layers().values():
            layer.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that want no weight decay: the taus."""
        return {name for name, _ in self.named_parameters() if "tau_axis" in name.split(".")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameter names into stem, stages and (unless ``coarse``) blocks, as timm expects."""
        fine = [(r"^stage(\d+)\.opening", None), (r"^stage(\d+)\.particles\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stage(\d+)" if coarse else fine}

    # -- checkpoints -------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint whole or not at all; branches whose tau is not sorted are sorted.

        Raises:
            ValueError: a checkpoint for another depth (both are named), or a tau that is not finite. The model is
                unchanged then.
            RuntimeError: missing, unexpected or misshapen entries, as in ``nn.Module``; but the model is unchanged.
            TypeError: no mapping of names to tensors.
        """
        check_entries(self, state_dict)
        theirs = _depth_of(state_dict)
        if theirs is not None and theirs != (self.depth, _LAYERS_PER_BLOCK[self.block]):
            kind = "blocks of {} layers".format
            raise ValueError(
                f"state_dict is a checkpoint of depth {theirs[0]} ({kind(theirs[1])}), but this model has depth "
                f"{self.depth} ({kind(_LAYERS_PER_BLOCK[self.block])}); build it with the checkpoint's depth and block"
            )
        for name in self.mean_field_layers():
            check_tau_entries(state_dict, f"{name}.")
        load = super().load_state_dict
        return loaded_whole(self, state_dict, lambda: load(state_dict, strict=strict, assign=assign))


def _check_head(num_classes: int, pool: str) -> None:
    if pool not in _POOLS:
        raise ValueError(f"global_pool must be one of {', '.join(map(repr, _POOLS))}, got {pool!r}")
    if num_classes < 0 or (num_classes and not pool):
        raise ValueError(f"num_classes must be >= 0, and 0 without pooling; got {num_classes} with {pool!r}")


def _blocks_per_stage(depth: int, block: str) -> int:
    if block not in _LAYERS_PER_BLOCK:
        raise ValueError(f"block must be one of {sorted(_LAYERS_PER_BLOCK)}, got {block!r}")
    period = _STAGES * _LAYERS_PER_BLOCK[block]
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < period + 2 or (depth - 2) % period:
        near = max(1, round((depth - 2) / period)) * period + 2 if isinstance(depth, int) else period + 2
        raise ValueError(
            f"depth must be {period}k + 2 for block={block!r} ({period + 2}, {2 * period + 2}, ...), got {depth!r}; "
            f"the nearest is {near}"
        )
    return (depth - 2) // period


def _depth_of(state_dict: Mapping[str, Any]) -> tuple[int, int] | None:
    """Depth and layers per block of the network a checkpoint comes from; ``None`` if it is no such checkpoint."""
    last = f"stage{_STAGES}."
    if not any(k.startswith(f"{last}opening.") for k in state_dict):
        return None
    # The last convolution of any block, so that a file which lacks one of them is not taken for another network's.
    numbers = (k.rpartition(".conv")[2].partition(".")[0] for k in state_dict if k.startswith(last) and ".conv" in k)
    layers = max((int(n) for n in numbers if n.isdecimal()), default=0)
    names = {k.split(".")[2] for k in state_dict if k.startswith(f"{last}particles.")}
    blocks = 1 + sum(name.isdigit() for name in names)  # the last stage always has an opening block
    return _STAGES * layers * blocks + 2, layers


def _branch_factory(block: str, stage: int, cardinality: int, base_width: int) -> Callable[..., nn.Sequential]:
    if block == "basic":
        return basic_branch
    if block == "bottleneck":
        return partial(bottleneck_branch, width=16 * 2**stage)
    return partial(bottleneck_branch, width=cardinality * base_width * 2**stage, groups=cardinality)
