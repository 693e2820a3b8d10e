#!/usr/bin/env python3
"""Remove residual blocks of a trained timm network, fine-tune what is left, and get a plain network of fewer blocks.

    python recipes/prune_depth.py fit --model resnet50 --pretrained --data folder:PATH --size 224 --to-latency 0.6
    python recipes/prune_depth.py fit --model convnext_atto --checkpoint plain.pt --data cifar10 --remove 4
    python recipes/prune_depth.py fit --model NAME --checkpoint plain.pt --data cifar10 --keep 6 --by cosine --plain

The network must know the classes already: plain.pt of recipes/finetune_timm.py, or published weights for them. Blocks
are scored on 512 training images, removed, norms re-estimated on these, and everything fine-tuned; options and settings
are those of finetune_timm.py (the head is not trained first). The run's folder then holds pruned.pt, the folded weights
for the constructor that prune.json names (or pruned.pt2, the exported network, where there is none), and prune.md,
prune.png: errors, and latencies measured before and after. Short forms beside those of finetune_timm.py:
``--remove N``, ``--keep N``, ``--to-latency SHARE``, ``--by CRITERION`` for --prune.remove and so on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger

from recipes import finetune_timm
from recipes.errors import BadInput, leave
from recipes.finetune.data import FinetuneData
from recipes.finetune.export import NotTheSame
from recipes.finetune_timm import FinetuneCLI
from recipes.images.cli import RecipeCLI
from recipes.pruning.constructor import constructor_with
from recipes.pruning.export import export
from recipes.pruning.story import draw, latencies, table
from recipes.pruning.task import PruneTask, Removal, error
from recipes.quiet import quieten
from recipes.record import DIGITS, provenance, write_json
from torch_meanfield import fold

SHORT = {f"--{name}": f"--prune.{name.replace('-', '_')}" for name in ("remove", "keep", "to-latency", "by")}
BATCH = 128  # of the images that blocks are scored on


def long_form(args: Sequence[str]) -> list[str]:
    """The arguments without the short forms; see :func:`recipes.finetune_timm.long_form`."""
    words = [w.replace(o, SHORT[o], 1) if (o := w.partition("=")[0]) in SHORT else w for w in args]
    out = finetune_timm.long_form(words)
    asks_for_help = not out or out[0].startswith("-") or {"-h", "--help"} & set(out)
    named = any(w.partition("=")[0] in ("--model.head_epochs", "-c", "--config") for w in words)
    return out if named or asks_for_help else [*out, "--model.head_epochs", "0"]


class PruneCLI(FinetuneCLI):
    """The fine-tuning recipe's command line; blocks go before the training, and the plain network comes after it."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": RecipeCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(Removal, "prune")

    def _try_checkpoint(self) -> None:
        cut = (self._checkpoint or {}).get("cut")
        if self._checkpoint is not None:
            if cut is None:
                raise BadInput(
                    f"--ckpt_path {self._get(self.config, 'ckpt_path')} is no checkpoint of this recipe; a fine-tuned "
                    f"network is passed as --checkpoint plain.pt"
                )
            example = self.model.backbone.example()
            self.model.cut_again_(cut, example.expand(2, *example.shape[1:]))
        super()._try_checkpoint()

    def before_fit(self) -> None:
        super().before_fit()
        if self.model.cut is None:
            wanted = self._get(self.config_init, "prune")
            scoring = [b for b in self.datamodule.some("train", wanted.images, BATCH) if len(b[1]) > 1]
            self.model.cut_(wanted, scoring, self._testing())
        if self.trainer.is_global_zero:
            print(self.model.report)

    def _testing(self) -> Any:
        return self.datamodule.some("test", None, self.datamodule.eval_batch_size)

    def after_fit(self) -> None:
        RecipeCLI.after_fit(self)
        if not self.trainer.is_global_zero:
            return
        logger = next((each for each in self.trainer.loggers if isinstance(each, CSVLogger)), None)
        folder = None if logger is None else Path(logger.log_dir)
        images = self._some_images().cpu()
        folded = fold(self.model.net, images[:1])
        report = constructor_with(self.model.backbone, self.model.report, folded)
        plain, written = export(self.model.net, report, images, folder)
        self.story = self._story(plain, written, images)
        print(table(self.story))
        if folder is not None:
            write_json(folder / "prune.json", self.story, DIGITS)
            (folder / "prune.md").write_text(table(self.story))
            draw(folder / "prune.png", self.story)

    def _story(self, plain: Any, written: dict[str, Any], images: Any) -> dict[str, Any]:
        cut = self.model.cut
        whole = self.model.whole.cpu().eval()
        whole = fold(whole, images[:1]) if self.model.converted else whole
        wanted = self._get(self.config_init, "prune")
        return {
            "network": self.model.backbone.name,
            "weights": self.model.told,
            "data": self.datamodule.label,
            "by": wanted.by,
            "images": wanted.images,
            **asdict(cut),
            "error": error(self.model.net.cpu(), self._testing()),
            "optimizer_steps": self.trainer.global_step,
            "parameters": [sum(p.numel() for p in m.parameters()) for m in (whole, plain)],
            "batch": len(images),
            "milliseconds": latencies([whole.eval(), plain], images),
            "file": written["file"],
            "made_by": written["made_by"],
            "relative_error": written["error"],
            **provenance(self.trainer.strategy.root_device),
        }


def run() -> PruneCLI:
    """Parse ``sys.argv`` (in long form) and carry it out.

    Raises:
        BadInput: Wrong arguments, files or folders, or a network without blocks that can be removed.
        NotTheSame: The plain network does not compute what the trained one does.
    """
    each = {"exit_on_error": False, "description": (__doc__ or "").splitlines()[0]}
    return PruneCLI(
        PruneTask,
        FinetuneData,
        seed_everything_default=0,
        parser_kwargs={**each, "fit": dict(each)},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )


def main() -> PruneCLI:
    """Carry out ``sys.argv``; bad input ends the process with one line and exit code 2."""
    quieten()
    sys.argv[1:] = long_form(sys.argv[1:])
    try:
        return run()
    except BadInput as failure:
        leave("prune_depth.py", failure)
    except NotTheSame as failure:
        print(f"prune_depth.py: error: {failure}", file=sys.stderr)
        raise SystemExit(1) from failure


if __name__ == "__main__":
    main()
