"""The train door of SimpleClick: the one of perception models, with another module and other weights in the run folder."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from mmseg_llm.segmenters.simple_click.weights import save_simple_click
from mmseg_llm.training.callbacks import RunFolder
from mmseg_llm.training.cli import PerceptionCLI, SaveRunConfig
from mmseg_llm.training.simple_click import SimpleClickModule
from mmseg_llm.training.simple_click_data import SimpleClickDataModule

if TYPE_CHECKING:
    from lightning import Callback, LightningModule, Trainer

WEIGHTS = "simple_click.safetensors"


class ClickRunFolder(RunFolder):
    """A run folder whose weights are those of one SimpleClick network."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights when they are the best so far, and report."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._remember(trainer, "val/")
        score = float(trainer.callback_metrics.get(self.monitor, torch.tensor(-math.inf)))
        if trainer.state.fn == "fit" and score > self.best:
            self.best = score
            self._keep(pl_module)
        self._report(trainer, pl_module)  # type: ignore[arg-type]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without validation the last weights are kept."""
        if not trainer.is_global_zero:
            return
        if self.best == -math.inf:
            self._keep(pl_module)
        self._report(trainer, pl_module)  # type: ignore[arg-type]

    def _keep(self, module: LightningModule) -> None:
        assert isinstance(module, SimpleClickModule)
        save_simple_click(module.judged, self.folder / WEIGHTS)


class SimpleClickCLI(PerceptionCLI):
    """`fit` and `validate` of SimpleClick with one run folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As for perception models; the score that picks the weights is another."""
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"monitor": "val/mIoU@5"})

    def before_instantiate_classes(self) -> None:
        """Refuse to train over an existing run.

        Raises:
            ValueError: if the run folder holds weights and neither `--overwrite` nor a checkpoint to resume is given.
        """
        super().before_instantiate_classes()
        config = self.config[self.subcommand]
        if self.subcommand == "fit" and not config.overwrite and not config.get("ckpt_path"):
            path = Path(config.output) / WEIGHTS
            if path.exists():
                raise ValueError(
                    f"{path} is already trained; choose another --output, or --overwrite true, or resume with "
                    f"--ckpt_path {config.output}/checkpoints/last.ckpt"
                )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """The trainer, with this kind of run folder."""
        own = [ClickRunFolder(item.folder, item.monitor) if isinstance(item, RunFolder) else item for item in callbacks]
        return super()._instantiate_trainer(config, own)


def train_simple_click(arguments: Sequence[str] | None = None) -> SimpleClickCLI:
    """Run this door with command-line arguments (those of the process when None)."""
    if arguments is not None:
        sys.argv[1:] = arguments  # LightningCLI warns about any other way of passing them
    return SimpleClickCLI(
        SimpleClickModule,
        SimpleClickDataModule,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_kwargs={"exit_on_error": False},
    )
