"""The command line of the image recipes: LightningCLI, with the data set named on it and errors on one line."""

from __future__ import annotations

import math
import warnings
from argparse import ArgumentError, ArgumentTypeError
from collections.abc import Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.errors import BadInput
from recipes.images.curve import Curve
from recipes.images.folder import Folder
from recipes.images.resume import check_same_run
from recipes.images.saving import WholeFiles, out_of_room
from recipes.record import provenance, write_json
from torch_meanfield.lightning import ExactResume, MeanFieldMonitor

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEFAULT_CONFIG = {"digits": "digits.yaml", "fashion-mnist": "resnet20-fashion-mnist.yaml"}
RUNS = "runs"
TRAINED_BY = ("max_epochs", "precision", "gradient_clip_val", "accumulate_grad_batches")  # of the trainer's options


def spelled_out(args: Sequence[str]) -> list[str]:
    """The arguments with ``--data NAME`` as ``--data.name NAME``, and the configuration for NAME if none is given.

    The name stands for the data module's own argument; a path to a YAML file keeps jsonargparse's meaning, the
    configuration of the whole group. Configurations come first, so that every option overrides them wherever it stands.
    Spelling out twice changes nothing.
    """
    out: list[str] = []
    configs: list[str] = []
    data, words = "digits", iter(args)
    for word in words:
        option, equals, value = word.partition("=")
        if option in ("--data", "--data.name"):
            value = value if equals else next(words, "")
            if option == "--data" and value.endswith((".yaml", ".yml", ".json")):
                out += [option, value]
            else:
                data = value
                out += ["--data.name", value]
            continue
        if option in ("-c", "--config"):
            configs += [word] if equals else [word, *islice(words, 1)]
            continue
        out.append(word)
    asks_for_help = not out or out[0].startswith("-") or {"-h", "--help"} & set(out)
    if not configs and not asks_for_help:
        configs = ["--config", str(CONFIGS / DEFAULT_CONFIG.get(data, "resnet20-cifar10.yaml"))]
    return [*out[:1], *configs, *out[1:]]  # behind the subcommand


def share(text: str) -> float:
    """A share of the configuration's epochs, as ``0.0625`` or ``1/16``."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise ArgumentTypeError(f"{text!r} is no number; pass a share such as 0.0625 or 1/16") from error
    if not 0.0 < value <= 1.0:
        raise ArgumentTypeError(f"{text} is no share; pass a number above 0 and at most 1")
    return value


class RecipeCLI(LightningCLI):
    """LightningCLI whose user errors are :class:`BadInput`, raised before anything is written."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        every = LightningCLI.subcommands()
        return {name: every[name] for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.in_chans", "model.in_chans", apply_on="instantiate")
        parser.add_argument(
            "--schedule", type=share, default=None, help="share of the configuration's epochs, such as 1/16"
        )
        parser.add_argument(
            "--table", type=dict | None, default=None, help="the row of recipes/table.py: title and published errors"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise BadInput(str(error)) from error
        subcommand = self.config["subcommand"]
        config = self.config[subcommand]
        self._shorten(config)
        path = config.get("ckpt_path")
        self._checkpoint = self._read_checkpoint(path)
        if subcommand == "fit" and self._checkpoint is not None:
            known = self._parser(subcommand)
            plain = [yaml.safe_load(known.dump(c, skip_none=False)) for c in (config, known.get_defaults())]
            check_same_run(Path(path), *plain)

    @staticmethod
    def _shorten(config: Any) -> None:
        """Put ``schedule`` into effect: what is kept beside the run are its epochs, and no share of them."""
        if config.get("schedule") is None:
            return
        whole = config["trainer.max_epochs"]
        if whole is None or whole < 1:
            raise BadInput(f"--schedule is a share of trainer.max_epochs, which is {whole}; pass --trainer.max_epochs")
        config["trainer.max_epochs"] = max(1, math.floor(whole * config["schedule"] + 0.5))
        config["schedule"] = None

    @staticmethod
    def _read_checkpoint(path: str | None) -> dict[str, Any] | None:
        if path is None or path in ("best", "last", "hpc"):  # Lightning's own words, resolved by the trainer
            return None
        if not Path(path).is_file():
            raise BadInput(f"--ckpt_path {path}: there is no such file; pass a checkpoint that `fit` wrote")
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            checkpoint["state_dict"].items()
        except Exception as error:  # torch.load fails in as many ways as a file can be damaged
            raise BadInput(
                f"--ckpt_path {path}: not a readable checkpoint ({type(error).__name__}); it is damaged or was not "
                f"written by `fit`, pass another one"
            ) from error
        return checkpoint

    def before_instantiate_classes(self) -> None:
        # The configuration is kept beside the logs of a training; there is no place for it elsewhere.
        if self.subcommand != "fit" or self._get(self.config, "trainer").logger is False:
            self.save_config_callback = None

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        # ImportError: a precision or a logger of a package that is not installed.
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise BadInput(str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self._try_checkpoint()
        self._check_strategy()
        trainer, fit = self._get(self.config_init, "trainer"), self.subcommand == "fit"
        folder = trainer.default_root_dir or RUNS
        logger = trainer.logger
        if logger in (None, True):
            # Named together: left alone, each logger would number its own folder.
            csv = CSVLogger(folder, name=self.datamodule.label.replace(":", "-")) if fit else None
            logger = csv and [csv, TensorBoardLogger(folder, name=csv.name, version=csv.version)]
        # What only a training can use, and what Lightning refuses without a logger.
        idle = (() if fit else (ModelCheckpoint,)) + (() if logger else (LearningRateMonitor,))
        callbacks = [c for c in trainer.callbacks or [] if not isinstance(c, idle)]
        if fit and not any(isinstance(c, ExactResume) for c in callbacks):
            callbacks.append(ExactResume())
        self.curve = Curve()
        kwargs |= {"default_root_dir": folder, "logger": logger or False, "callbacks": [*callbacks, self.curve]}
        if not fit:
            kwargs["enable_checkpointing"] = False
        plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins] * bool(trainer.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeFiles()]
        with warnings.catch_warnings():
            # Lightning would go on in another precision than the one asked for.
            warnings.filterwarnings("error", ".*AMP with fp16 is not supported on CPU")
            try:
                made = super().instantiate_trainer(**kwargs)
            except UserWarning as warning:
                if "AMP with fp16" not in str(warning):
                    raise
                raise BadInput(
                    f"--trainer.precision {trainer.precision} needs a GPU, and this training is on the CPU; pass "
                    f"bf16-mixed, which the CPU has too, or 32"
                ) from warning
        self._check_processes(made)
        return made

    def _check_processes(self, trainer: Trainer) -> None:
        """A training goes on with as many processes as wrote its checkpoint: each has generators of its own."""
        exact = next((c for c in trainer.callbacks if isinstance(c, ExactResume)), None)
        if exact is None or self._checkpoint is None:
            return
        then = self._checkpoint.get("callbacks", {}).get(exact.state_key, {}).get("world_size", trainer.world_size)
        self._checkpoint = None  # Lightning reads it again; a whole training long it would lie in memory
        if then != trainer.world_size:
            raise BadInput(
                f"--ckpt_path {self._get(self.config, 'ckpt_path')} was written by {then} process(es), and this "
                f"training has {trainer.world_size}; pass --trainer.devices {then}"
            )

    def _check_strategy(self) -> None:
        strategy = self._get(self.config_init, "trainer").strategy
        if isinstance(strategy, FSDPStrategy) or strategy in ("fsdp", "fsdp_cpu_offload"):
            raise BadInput(
                "--trainer.strategy fsdp: FSDP1 flattens parameters, so that blocks and units cannot be told apart to "
                "move them; pass fsdp2"
            )

    def _try_checkpoint(self) -> None:
        """Try the checkpoint on the model, so that a misfit is told before the trainer exists or writes anything."""
        if self._checkpoint is None:
            return
        path, prefix = self._get(self.config, "ckpt_path"), "net."
        weights = {k.removeprefix(prefix): v for k, v in self._checkpoint["state_dict"].items() if k.startswith(prefix)}
        try:
            self.model.net.load_state_dict(weights)
        except (ValueError, RuntimeError) as error:
            raise BadInput(f"--ckpt_path {path}: {error}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:  # whoever was writing may have wrapped it
            full = out_of_room(error)
            if full is None:
                raise
            where = full.filename or self.trainer.log_dir or self.trainer.default_root_dir
            raise BadInput(
                f"no room on the disk ({full.strerror}) while writing to {where}; make room, or name another disk by "
                f"--trainer.default_root_dir, and resume with --ckpt_path, the last checkpoint is whole"
            ) from error

    def before_fit(self) -> None:
        # The trainer makes the folders of its loggers before it sets up the data: read what needs no download now.
        if isinstance(self.datamodule.source, Folder):
            self.datamodule.open()

    def after_fit(self) -> None:
        """Write ``run.json`` beside the logs: what was trained on what by which versions, and the curves."""
        steps = self.model.steps()  # on all ranks: where tau is sharded, reading it takes all of them
        logger = next((each for each in self.trainer.loggers if isinstance(each, CSVLogger)), None)
        if logger is None or not self.trainer.is_global_zero:
            return
        result = {
            "data": self.datamodule.label,
            "seed": self._get(self.config, "seed_everything"),
            "model": self._get(self.config, "model").as_dict(),
            "trainer": {option: self._get(self.config, "trainer")[option] for option in TRAINED_BY},
            "optimizer_steps": self.trainer.global_step,
            # null: nobody counted (no monitor among the callbacks)
            "resorts": next((c.resorts for c in self.trainer.callbacks if isinstance(c, MeanFieldMonitor)), None),
            "seconds": round(self.curve.seconds, 1),
            **provenance(self.trainer.strategy.root_device),
            "born": self.model.born,
            "steps": steps,
            "epochs": self.curve.epochs,
        }
        write_json(Path(logger.log_dir) / "run.json", result)


def run(model_class: type, data_class: type) -> RecipeCLI:
    """Parse ``sys.argv`` (spelled out) and carry out its subcommand.

    Raises:
        BadInput: Wrong arguments, files or folders.
    """
    each = {
        "exit_on_error": False,
        "description": "--data NAME stands for --data.name NAME: digits, fashion-mnist, cifar10, cifar100 or folder:P.",
    }
    return RecipeCLI(
        model_class,
        data_class,
        seed_everything_default=0,
        parser_kwargs={**each, **{name: dict(each) for name in RecipeCLI.subcommands()}},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,  # the configuration is in config.yaml, not in the checkpoint
    )
