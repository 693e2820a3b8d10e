"""``MeanFieldResNet``: the pre-activation CIFAR networks of Lu et al. 2020, section 5, with learnable times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_meanfield.depth.sequential import MeanFieldSequential
from torch_meanfield.depth.tau_axis import check_tau_entries
from torch_meanfield.models.architecture import (
    LAYERS_PER_BLOCK,
    STAGES,
    BlockType,
    Depth,
    architecture_of,
    checked_blocks,
    depth_of,
)
from torch_meanfield.models.branches import OpeningBlock, basic_branch, bottleneck_branch
from torch_meanfield.models.intermediates import forward_intermediates
from torch_meanfield.particles.loading import check_entries, loaded_whole

ResNet = TypeVar("ResNet", bound="MeanFieldResNet")
_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "avg": lambda x: x.mean(dim=(2, 3)),
    "max": lambda x: x.amax(dim=(2, 3)),
    "avgmax": lambda x: 0.5 * (x.mean(dim=(2, 3)) + x.amax(dim=(2, 3))),
}


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

    @property
    def blocks(self) -> int:
        """Number of blocks, with the one that opens the stage."""
        return isinstance(self.opening, OpeningBlock) + (0 if self.particles is None else len(self.particles))


class MeanFieldResNet(nn.Module):
    """A pre-activation CIFAR ResNet or ResNeXt whose blocks have learnable times tau, one tau axis for each stage.

    Three stages of 16, 32, 64 channels (times 4 for bottlenecks; 256, 512, 1024 for ResNeXt) at resolutions 1, 1/2 and
    1/4. The block that changes resolution or width opens its stage and has no tau; all others do.

    Args:
        depth: 6k + 2 for ``"basic"`` (20, 32, 44, 56, 110), 9k + 2 for ``"bottleneck"`` (164) and ``"resnext"`` (29);
            ``None``: 20.
        num_classes: size of the output; 0 leaves out the classifier.
        in_chans: channels of the input.
        block: kind of residual branch.
        cardinality: groups of the 3x3 convolution (ResNeXt only).
        base_width: channels in each group of the first stage (ResNeXt only).
        blocks: in place of a depth, the number of blocks of each of the three stages, with those that open them: at
            least 1 where the shape changes, so 0 in the first stage of ``"basic"`` alone.
        horizon: last time T of each stage, see :class:`MeanFieldSequential`; ``None``: its number of particles.
        tau_init: ``"uniform"`` or ``"random"``, see :class:`MeanFieldSequential`.
        learn_tau: ``False`` gives the vanilla twin, with the same initial weights under the same seed.
        drop_rate: dropout before the classifier.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, or ``""`` for an unpooled feature map (without a classifier).

    Shape:
        input ``(B, in_chans, H, W)``, output ``(B, num_classes)``. H and W of at least 4 (CIFAR: 32).

    Raises:
        ValueError: a depth that the block type does not have, or one beside ``blocks``, too few blocks, an unknown
            block type or pooling, a size below 1, a classifier without pooling.

    Source: Lu et al. 2020, section 5; He et al. 2016 (pre-activation), He et al. 2015 (initialisation), Xie et al.
        2017 (ResNeXt). Parameters, in millions: ResNet-20/32/44/56/110 0.27/0.46/0.66/0.85/1.7, ResNet-164 1.7,
        ResNeXt-29 8x64d 34.4 and 16x64d 68.1.

    Example:
        >>> model = MeanFieldResNet(depth=20)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> MeanFieldResNet(blocks=(4, 3, 6)).depth
        28
    """

    def __init__(
        self,
        depth: int | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
        block: BlockType = "basic",
        *,
        cardinality: int = 8,
        base_width: int = 64,
        blocks: Sequence[int] | None = None,
        horizon: float | None = None,
        tau_init: Literal["uniform", "random"] = "uniform",
        learn_tau: bool = True,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        counts = checked_blocks(depth, blocks, block)
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
        self.block = block
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        chans = 64 if block == "resnext" else 16
        self.stem = nn.Conv2d(in_chans, chans, 3, padding=1, bias=False)
        self.feature_info: list[dict[str, Any]] = []
        for s in range(STAGES):
            stride = 1 if s == 0 else 2
            out_chans = (16 if block == "basic" else 64 if block == "bottleneck" else 256) * 2**s
            branch = _branch_factory(block, s, cardinality, base_width)
            changes = stride != 1 or chans != out_chans
            opening = OpeningBlock(branch(chans, out_chans, stride), chans, out_chans, stride) if changes else None
            count = counts[s] - (opening is not None)
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

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of each stage as it is now, with the one that opens it."""
        return tuple(stage.blocks for stage in self.stages())

    @property
    def depth(self) -> int:
        """Layers with weights on the longest way from image to class."""
        return self._depth().total

    def _depth(self) -> Depth:
        return Depth(self.blocks, LAYERS_PER_BLOCK[self.block])

    def stages(self) -> list[Stage]:
        """The three stages, in order."""
        return [cast(Stage, getattr(self, f"stage{s + 1}")) for s in range(STAGES)]

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

    @classmethod
    def from_checkpoint(
        cls: type[ResNet],
        state_dict: Mapping[str, Any],
        *,
        horizon: float | None = None,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> ResNet:
        """The model that a checkpoint comes from, of whatever depth, with its weights, times and dtype.

        Blocks of each stage, their kind, widths, classes and whether times are learned are read from the entries; so a
        network that has lost blocks in training is made anew from what it saved.

        Args:
            state_dict: what ``state_dict()`` of such a model gave.
            horizon, drop_rate, global_pool: as in the constructor; no checkpoint holds them. The horizon tells only
                where a reset would put the times.

        Raises:
            TypeError: no mapping of names to tensors.
            ValueError: no checkpoint of such a model, entries that do not tell its shape, or a tau that is not finite.
            RuntimeError: missing, unexpected or misshapen entries.

        Example:
            >>> saved = MeanFieldResNet(blocks=(1, 2, 2), num_classes=7).state_dict()
            >>> MeanFieldResNet.from_checkpoint(saved).blocks
            (1, 2, 2)
        """
        check_entries(nn.Module(), state_dict)
        found = architecture_of(state_dict)
        with torch.device("meta"):  # nothing is drawn: every value comes from the checkpoint
            model = cls(**asdict(found), horizon=horizon, drop_rate=drop_rate, global_pool=global_pool)
        stem = state_dict["stem.weight"]
        model.to(stem.dtype).to_empty(device=stem.device)
        model.load_state_dict(state_dict)
        return model

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint whole or not at all; branches whose tau is not sorted are sorted.

        Raises:
            ValueError: a checkpoint for another depth (both are named), or a tau that is not finite. The model is
                unchanged then.
            RuntimeError: missing, unexpected or misshapen entries, as in ``nn.Module``; but the model is unchanged.
            TypeError: no mapping of names to tensors.
        """
        check_entries(self, state_dict)
        theirs, mine = depth_of(state_dict), self._depth()
        if theirs is not None and theirs != mine:
            raise ValueError(
                f"state_dict is a checkpoint of {theirs}, but this model has {mine}; "
                f"MeanFieldResNet.from_checkpoint(state_dict) makes the model it comes from"
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


def _branch_factory(block: str, stage: int, cardinality: int, base_width: int) -> Callable[..., nn.Sequential]:
    if block == "basic":
        return basic_branch
    if block == "bottleneck":
        return partial(bottleneck_branch, width=16 * 2**stage)
    return partial(bottleneck_branch, width=cardinality * base_width * 2**stage, groups=cardinality)
