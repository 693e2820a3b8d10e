#!/usr/bin/env python3
"""An epoch of the recipe over an epoch of a bare PyTorch loop with the same model, batches and evaluation.

    python benchmarks/lightning_overhead.py [--data cifar10 | folder:PATH | digits] [--repeats 5] [--batches 16]

The recipe is ``recipes/cifar.py fit`` itself, with its callbacks (MeanFieldMonitor among them), loggers and progress
bar. After each of its epochs a twin of its model is trained by hand for one epoch from a loader of the same kind: so
the two take turns, and the figure is the median over epochs of the ratio of neighbours. The first epoch of each does
not count. An epoch ends when its callbacks have been told; the checkpoint is written after that and is not counted. On
the CPU, processor time is counted, which other work on the machine does not change much. Bar: at most 1.03.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from itertools import islice
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout's packages are found beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from benchmarks.timing import clock_of, compared, table, written
from recipes import cifar
from recipes.record import provenance
from torch_meanfield import param_groups

BAR = 1.03


class BareTwin(Callback):
    """Time every epoch of the trainer, and one of a bare loop after it.

    Attributes:
        seconds: By side, one number for each epoch but the first.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"Lightning": [], "bare loop": []}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the model as it is before the first step."""
        self.clock = clock_of(pl_module.device)
        self.net: nn.Module = copy.deepcopy(pl_module.net)
        self.optimizer = torch.optim.SGD(param_groups(self.net, **pl_module.groups), momentum=pl_module.momentum)
        self.data = copy.copy(trainer.datamodule)
        self.data._generator = torch.Generator().manual_seed(0)
        self.loaders = self.data.train_dataloader(), self.data.val_dataloader()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.begin = self.clock()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop it, and let the twin have its turn."""
        taken = self.clock() - self.begin
        precision = trainer.precision_plugin
        begin = self.clock()
        train, val = (
            islice(loader, int(limit))
            for loader, limit in zip(
                self.loaders, (trainer.num_training_batches, trainer.num_val_batches[0]), strict=True
            )
        )
        self.net.train()
        for images, labels in train:
            self.optimizer.zero_grad()
            with precision.train_step_context():
                loss = F.cross_entropy(self.net(images), labels)
            loss.backward()
            self.optimizer.step()
        self.net.eval()
        wrong, losses, seen = torch.zeros(2, device=pl_module.device), [], 0
        with torch.no_grad():
            for images, labels in val:
                with precision.val_step_context():
                    logits = self.net(images)
                losses.append(F.cross_entropy(logits.float(), labels))
                wrong += (logits.argmax(1) != labels).sum()
                seen += len(labels)
        wrong.tolist()
        bare = self.clock() - begin
        if trainer.current_epoch:
            self.seconds["Lightning"].append(taken)
            self.seconds["bare loop"].append(bare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="digits, cifar10, cifar100, fashion-mnist or folder:PATH")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each that count")
    parser.add_argument("--batches", type=int, help="in an epoch: all on a GPU, else 16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", help="precision of the trainer; bf16-mixed on a GPU, else 32")
    parser.add_argument("--threads", type=int, default=1, help="threads of the processor")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lightning_overhead.json")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    batches = args.batches or (None if device.type == "cuda" else 16)
    # Two, since 1 would be read as the share 1.0.
    limits = [] if batches is None else [f"--trainer.limit_train_batches={batches}", "--trainer.limit_val_batches=2"]
    with tempfile.TemporaryDirectory() as folder:
        sys.argv[1:] = [
            "fit",
            f"--data={args.data}",
            f"--model.depth={args.depth}",
            f"--trainer.max_epochs={args.repeats + 1}",
            f"--trainer.accelerator={'gpu' if device.type == 'cuda' else 'cpu'}",
            "--trainer.devices=1",
            f"--trainer.precision={args.precision or ('bf16-mixed' if device.type == 'cuda' else '32-true')}",
            f"--trainer.default_root_dir={folder}",
            "--trainer.num_sanity_val_steps=0",
            # By its name in the package: as a script this module is another one.
            "--trainer.callbacks+=benchmarks.lightning_overhead.BareTwin",
            *limits,
        ]
        cli = cifar.main()
    twin = next(c for c in cli.trainer.callbacks if type(c).__name__ == BareTwin.__name__)
    figure = compared(twin.seconds, "Lightning", "bare loop")
    result = {
        **provenance(device),
        "data": cli.datamodule.label,
        "depth": args.depth,
        "precision": str(cli.trainer.precision),
        "batches": int(cli.trainer.num_training_batches),
        "batch": cli.datamodule.batch_size,
        "bar": BAR,
        **figure,
    }
    low, high = figure["quartiles"]
    ratio = f"{figure['ratio']:.4f} ({low:.4f} to {high:.4f})"
    seconds = [f"{figure['seconds'][side]:.2f}" for side in ("Lightning", "bare loop")]
    print(table(("Lightning, s/epoch", "bare loop", "ratio (quartiles)", "bar"), [(*seconds, ratio, BAR)]))
    written(result, args.out)


if __name__ == "__main__":
    main()
