"""Callbacks: the run folder's best weights, report, overlays and learning curves."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import Callback

from mmseg_llm.training.checkpoint import save_weights

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

    from mmseg_llm.training.module import PerceptionModule


class RunFolder(Callback):
    """Keeps a run folder usable at any time: best weights so far, `report.json`, overlays and curves.

    Args:
        folder: run folder.
        monitor: score to maximise.
        num_overlays: examples drawn at each validation.
    """

    def __init__(self, folder: Path, monitor: str = "val/cIoU", num_overlays: int = 8) -> None:
        self.folder, self.monitor, self.num_overlays = Path(folder), monitor, num_overlays
        self.best = -math.inf
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know: the best score so far and the curves."""
        return {"best": self.best, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.best, self.history = state_dict["best"], state_dict["history"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.started = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Remember the losses at the logging interval."""
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._remember(trainer, "train/")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, plot, and keep the weights when they are the best so far."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._remember(trainer, "val/")
        self._draw(trainer, pl_module)  # type: ignore[arg-type]
        score = float(trainer.callback_metrics.get(self.monitor, torch.tensor(-math.inf)))
        if trainer.state.fn == "fit" and score > self.best:
            self.best = score
            save_weights(pl_module.model, self.folder)  # type: ignore[arg-type]
        self._report(trainer, pl_module)  # type: ignore[arg-type]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without validation the last weights are kept; plot the curves a last time."""
        if not trainer.is_global_zero:
            return
        if self.best == -math.inf:
            save_weights(pl_module.model, self.folder)  # type: ignore[arg-type]
        self._report(trainer, pl_module)  # type: ignore[arg-type]

    def _remember(self, trainer: Trainer, prefix: str) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith(prefix):
                points = self.history.setdefault(name, [])
                if not points or points[-1][0] != trainer.global_step:
                    points.append((trainer.global_step, float(value)))

    def _draw(self, trainer: Trainer, module: PerceptionModule) -> None:
        from mmseg_llm.inference.visualize import comparison_sheet

        rows = []
        for sample, prediction, index in module.shown[: self.num_overlays]:
            query = sample.queries[index]
            target = None if query.masks is None else query.target(sample.size)
            rows.append((sample.load_image(), prediction, target))
        if rows:
            path = self.folder / "overlays" / f"step_{trainer.global_step:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            comparison_sheet(rows).save(path, quality=92)

    def _report(self, trainer: Trainer, module: PerceptionModule) -> None:
        from mmseg_llm.inference.visualize import plot_curves

        self.folder.mkdir(parents=True, exist_ok=True)
        if self.history:
            plot_curves(self.history, self.folder / "curves.png")
        report = {
            "best": {self.monitor: None if math.isinf(self.best) else self.best},
            "last": {name: points[-1][1] for name, points in sorted(self.history.items())},
            "protocol": {"predict": module.protocol, "metric": module.metric.describe()},
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "seconds": round(time.monotonic() - self.started, 1),
            "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
            "trainable": sum(p.numel() for p in module.model.parameters() if p.requires_grad),
            "precision": str(trainer.precision),
            "hardware": hardware(),
        }
        temporary = self.folder / ".report.json"
        temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
        temporary.replace(self.folder / "report.json")


def hardware() -> str:
    """One line about the machine, for reports."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {torch.get_num_threads()} threads"
