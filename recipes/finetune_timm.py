#!/usr/bin/env python3
"""Fine-tune any timm backbone with mean-field residual blocks, or as it is, and get plain timm weights back.

    python recipes/finetune_timm.py fit --model resnet50 --pretrained --data folder:PATH --size 224
    python recipes/finetune_timm.py fit --model vit_small_patch16_224 --checkpoint FILE --data cifar10 --size 224
    python recipes/finetune_timm.py fit --model convnext_atto --plain --trainer.precision bf16-mixed
    python recipes/finetune_timm.py test -c runs/NAME/version_0/config.yaml --ckpt_path CHECKPOINT

The classifier learns first, then everything, with learning rates that fall from layer to layer; the settings are in
recipes/configs/finetune/. At the end the run's folder holds plain.pt: the weights with all step sizes folded in, for
``timm.create_model(NAME, num_classes=...)``, which needs nothing from here; loading it there and comparing the outputs
is the last step of the run. Short forms: ``--model NAME`` for --model.name, ``--pretrained``, ``--checkpoint FILE``,
``--plain`` for --model.mean_field false, ``--size N`` for --data.size, ``--data`` as in cifar.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from recipes.errors import BadInput, leave
from recipes.finetune.data import FinetuneData
from recipes.finetune.export import NotTheSame, export
from recipes.finetune.task import FinetuneTask
from recipes.images.cli import CONFIGS, RecipeCLI, spelled_out
from recipes.quiet import quieten
from recipes.record import write_json

CHECKED = 64  # test images on which the plain checkpoint is compared
FLAGS = {"--pretrained": ["--model.pretrained", "true"], "--plain": ["--model.mean_field", "false"]}
OPTIONS = {"--model": "--model.name", "--checkpoint": "--model.checkpoint", "--size": "--data.size"}


def long_form(args: Sequence[str]) -> list[str]:
    """The arguments without the short forms, and with the configuration for the data set if none is given."""
    out: list[str] = []
    data, given = "digits", False
    for word, following in zip(args, [*args[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        value = value if equals else following
        if word in FLAGS:
            out += FLAGS[word]
        elif option in OPTIONS and not value.endswith((".yaml", ".yml", ".json")):
            out += [word.replace(option, OPTIONS[option], 1)]
        else:
            out.append(word)
        if option in ("--data", "--data.name"):
            data = value
        given |= option in ("-c", "--config")
    asks_for_help = not out or out[0].startswith("-") or {"-h", "--help"} & set(out)
    if not given and not asks_for_help:
        out[1:1] = ["--config", str(CONFIGS / "finetune" / ("digits.yaml" if data == "digits" else "adamw.yaml"))]
    return spelled_out(out)


class FinetuneCLI(RecipeCLI):
    """The recipes' command line; a training ends with the plain checkpoint."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.link_arguments("data.side", "model.side", apply_on="instantiate")

    def before_fit(self) -> None:
        rank_zero_only(print)(f"{self.model.backbone.name}: {self.model.told}")
        super().before_fit()

    def after_fit(self) -> None:
        super().after_fit()
        if not self.trainer.is_global_zero:
            return
        logger = next((each for each in self.trainer.loggers if isinstance(each, CSVLogger)), None)
        folder = None if logger is None else Path(logger.log_dir)
        images = self._some_images()
        self.exported = export(self.model.net, self.model.backbone, images, folder and folder / "plain.pt")
        kind = "folded into" if self.exported["folded"] else "saved as"
        where = "nothing (no logger, no folder)" if folder is None else folder / "plain.pt"
        print(f"weights {kind} {where}; plain timm computes the same, relative error {self.exported['error']:.1e}")
        if folder is not None:
            path = folder / "run.json"
            run = json.loads(path.read_text())
            run |= {
                "weights": self.model.told,
                "normalised_by": self.datamodule.statistics,
                "born": self.model.born,
                "plain_checkpoint": self.exported,
            }
            write_json(path, run)

    def _some_images(self) -> Any:
        batch = next(iter(self.datamodule.test_dataloader()))
        images, _ = self.datamodule.on_after_batch_transfer(batch, 0)
        return images[:CHECKED]


def run(data_class: type[FinetuneData] = FinetuneData) -> FinetuneCLI:
    """Parse ``sys.argv`` (in long form) and carry out its subcommand.

    Raises:
        BadInput: Wrong arguments, files or folders.
        NotTheSame: The plain checkpoint does not compute what the trained model does.
    """
    each = {"exit_on_error": False, "description": (__doc__ or "").splitlines()[0]}
    return FinetuneCLI(
        FinetuneTask,
        data_class,
        seed_everything_default=0,
        parser_kwargs={**each, **{name: dict(each) for name in FinetuneCLI.subcommands()}},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )


def main() -> FinetuneCLI:
    """Carry out ``sys.argv``; bad input ends the process with one line and exit code 2."""
    quieten()
    # In place: Lightning starts the other processes of a multi-device run with sys.argv.
    sys.argv[1:] = long_form(sys.argv[1:])
    try:
        return run()
    except BadInput as error:
        leave("finetune_timm.py", error)
    except NotTheSame as error:
        print(f"finetune_timm.py: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
