"""The train door: LightningCLI over PerceptionModule and PerceptionDataModule."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from mmseg_llm.training.callbacks import RunFolder
from mmseg_llm.training.checkpoint import CONFIG, WEIGHTS
from mmseg_llm.training.data import PerceptionDataModule
from mmseg_llm.training.module import PerceptionModule


class SaveRunConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run folder."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Only `fit` makes runs; the other verbs leave them alone."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        folder = Path(self.config.output)
        folder.mkdir(parents=True, exist_ok=True)
        text = self.parser.dump(self.config, skip_none=False)
        (folder / CONFIG).write_text(text, encoding="utf-8")


class PerceptionCLI(LightningCLI):
    """`fit`, `validate` and `test` with one run folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a run needs beside model, data and trainer."""
        parser.add_argument("--output", type=str, default="runs/default", help="run folder")
        parser.add_argument("--overwrite", type=bool, default=False, help="train into a folder that holds a run")
        parser.add_argument("--monitor", type=str, default="val/cIoU", help="score that picks the best weights")
        parser.add_argument("--checkpoint_every", type=int, default=500, help="steps between resumable checkpoints")
        parser.add_argument("--early_stop", type=int | None, default=None, help="validations without a better score")
        parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes all cores")
        parser.set_defaults({"trainer.use_distributed_sampler": False, "trainer.num_sanity_val_steps": 0})

    def before_instantiate_classes(self) -> None:
        """Refuse to train over an existing run.

        Raises:
            ValueError: if the run folder holds weights and neither `--overwrite` nor a checkpoint to resume is given.
        """
        import torch

        config = self.config[self.subcommand]
        torch.set_num_threads(config.threads or torch.get_num_threads())
        if self.subcommand != "fit" or config.overwrite or config.get("ckpt_path"):
            return
        if (Path(config.output) / WEIGHTS).exists():
            raise ValueError(
                f"{config.output} already holds a trained model; choose another --output, or --overwrite true, "
                f"or resume with --ckpt_path {config.output}/checkpoints/last.ckpt"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add loggers and the callbacks of the run folder to what the config asks for."""
        config = self.config[self.subcommand]
        folder = Path(config.output)
        extra: list[Callback] = []
        if self.subcommand == "fit":
            extra += [
                RunFolder(folder, config.monitor),
                ModelCheckpoint(
                    folder / "checkpoints",
                    filename="step_{step:06d}",
                    auto_insert_metric_name=False,
                    save_last="link",
                    every_n_train_steps=config.checkpoint_every,
                ),
                LearningRateMonitor("step"),
            ]
            if config.early_stop is not None:
                extra.append(EarlyStopping(config.monitor, mode="max", patience=config.early_stop))
            if self.config_init[self.subcommand].trainer.logger is None:
                kwargs["logger"] = [TensorBoardLogger(folder, "logs", ""), CSVLogger(folder, "logs", "")]
        elif self.config_init[self.subcommand].trainer.logger is None:
            kwargs["logger"] = False
        trainer_config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        trainer_config["default_root_dir"] = str(folder)
        return self._instantiate_trainer(trainer_config, extra)


def train(arguments: Sequence[str] | None = None) -> PerceptionCLI:
    """Run the train door with command-line arguments (those of the process when None)."""
    if arguments is not None:
        sys.argv[1:] = arguments  # LightningCLI warns about any other way of passing them
    return PerceptionCLI(
        PerceptionModule,
        PerceptionDataModule,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_kwargs={"exit_on_error": False},
    )
