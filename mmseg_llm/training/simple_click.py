"""SimpleClickModule: the LightningModule around a SimpleClick network, trained on the clicks its own errors draw.

Legend: B batch, S side of a view, P points per sign.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningModule
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmseg_llm.segmenters.simple_click.network import SimpleClick
from mmseg_llm.segmenters.simple_click.predictor import SimpleClickEnvironment
from mmseg_llm.training.data import Parcel
from mmseg_llm.training.simple_click_objects import collate_clicks
from mmseg_llm.training.simple_click_start import initialise, load_initial
from mmseg_llm.training.simple_click_steps import (
    ClickIoU,
    add_clicks,
    normalized_focal_loss,
    oracle_ious,
    packed,
)


@dataclass(frozen=True)
class ClickOptimization:
    """AdamW (Adam where nothing decays) with linear warm-up, then a cosine or steps.

    Attributes:
        lr: peak learning rate.
        weight_decay: on weight matrices only.
        betas, eps: of AdamW.
        warmup: share of all steps.
        schedule: `cosine` ends at 0, `steps` multiplies by `drop` at each of `drop_epochs`.
        drop_epochs, drop: see `schedule`.
    """

    lr: float = 5e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: float = 0.0
    schedule: Literal["cosine", "steps"] = "steps"
    drop_epochs: tuple[int, ...] = (50, 55)
    drop: float = 0.1

    def factor(self, progress: float, epoch: int) -> float:
        """Learning rate as a share of the peak, at a share of all steps and in an epoch."""
        if progress < self.warmup:
            return progress / self.warmup
        if self.schedule == "steps":
            return self.drop ** sum(epoch >= at for at in self.drop_epochs)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - self.warmup) / (1 - self.warmup))))


DEFAULT_OPTIMIZATION = ClickOptimization()


class SimpleClickModule(LightningModule):
    """Trains a network on views of objects with first clicks and up to `max_clicks` further ones.

    Further clicks lie where the network, with the clicks so far, is wrong; what it answered there is fed back as the previous
    mask. Only the last of its answers is learned from. Validation is a `SimpleClickEnvironment` under the oracle.

    Args:
        size: a name of `SIZES`.
        initial_weights: file to start from: SimpleClick weights of the same size, or a vision transformer of masked
            autoencoding (MAE), whose backbone is taken; random when None.
        optimization: optimiser and schedule.
        max_clicks: most further clicks.
        alpha, gamma: of the normalised focal loss.
        average: share of the running average of the weights that each step keeps; what is validated and saved is then the
            average. None for the weights themselves.
        min_crop: smallest region that validation zooms into, in pixels of the image.
        clicks: numbers of clicks after which validation scores.
        seed: of the further clicks.

    Raises:
        ValueError: for a setting out of range, or weights that are missing or do not fit.
    """

    def __init__(
        self,
        size: str = "large",
        initial_weights: str | None = None,
        optimization: ClickOptimization = DEFAULT_OPTIMIZATION,
        max_clicks: int = 3,
        alpha: float = 0.5,
        gamma: float = 2.0,
        average: float | None = None,
        min_crop: int = 200,
        clicks: tuple[int, ...] = (1, 3, 5),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if max_clicks < 0:
            raise ValueError(f"max_clicks is {max_clicks}; give 0 or more")
        if average is not None and not 0 <= average < 1:
            raise ValueError(f"average is {average}; give a share from 0 to below 1, such as 0.998, or null")
        self.model = SimpleClick(size)
        initialise(self.model)
        if initial_weights is not None:
            load_initial(self.model, initial_weights)
        self.averaged = None if average is None else copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimization, self.max_clicks, self.alpha, self.gamma = optimization, max_clicks, alpha, gamma
        self.average, self.min_crop, self.metric = average, min_crop, ClickIoU(clicks)
        self.rng = np.random.default_rng(seed)
        self.shown: list[Any] = []  # overlays are of queries; there are none here
        self.environment: SimpleClickEnvironment | None = None

    @property
    def protocol(self) -> str:
        """How validation predicts."""
        return "not validated" if self.environment is None else repr(self.environment)

    @property
    def judged(self) -> SimpleClick:
        """The network that is validated and saved."""
        return self.model if self.averaged is None else self.averaged

    def loss(self, batch: dict[str, torch.Tensor], num_clicks: int) -> torch.Tensor:
        """Loss after `num_clicks` further clicks, of a batch of `collate_clicks`."""
        images, targets, points = batch["image"].float() / 255, batch["target"], batch["points"]
        previous = torch.zeros_like(images[:, :1])
        is_training = self.model.training
        self.model.eval()
        for order in range(num_clicks):
            with torch.no_grad():
                logits = self.model(torch.cat((images, previous), 1), packed(points))
            previous = logits.float().sigmoid()
            points = add_clicks(points, targets, previous[:, 0], self.rng, order + points.shape[2])
        self.model.train(is_training)
        # On a CPU the fused attention is the slower one where gradients are wanted, the more so in bfloat16.
        on_cpu = sdpa_kernel(SDPBackend.MATH) if images.device.type == "cpu" else nullcontext()
        with on_cpu:
            logits = self.model(torch.cat((images, previous), 1), packed(points))
        return normalized_focal_loss(logits[:, 0], targets, self.alpha, self.gamma)

    def training_step(self, batch: dict[str, torch.Tensor], batch_index: int) -> torch.Tensor:
        """Loss after a random number of further clicks."""
        loss = self.loss(batch, int(self.rng.integers(self.max_clicks + 1)))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["image"]))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the average; it follows faster at first, when the weights still are random."""
        super().optimizer_step(*args, **kwargs)
        if self.averaged is None or self.average is None:
            return
        steps = self.trainer.global_step
        share = 1 - min(self.average, (1 + steps) / (10 + steps))
        with torch.no_grad():
            for mean, value in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(value, share)

    def on_validation_epoch_start(self) -> None:
        """An environment around a copy of the judged network, which environments freeze."""
        side = self.trainer.datamodule.side  # type: ignore[attr-defined]
        network = copy.deepcopy(self.judged)
        self.environment = SimpleClickEnvironment(network, size=side, min_crop=self.min_crop, device=str(self.device))

    def validation_step(self, parcel: Parcel, batch_index: int) -> None:
        """One episode of oracle clicks on each object, and the loss of one view of it."""
        assert self.environment is not None
        network = self.environment.network
        assert isinstance(network, nn.Module)
        for image, target, example in parcel.content:
            batch = {name: value.to(self.device) for name, value in collate_clicks([example]).items()}
            inputs = torch.cat((batch["image"] / 255, torch.zeros_like(batch["image"][:, :1], dtype=torch.float32)), 1)
            logits = network.eval()(inputs, packed(batch["points"]))
            loss = normalized_focal_loss(logits[:, 0], batch["target"], self.alpha, self.gamma)
            ious = oracle_ious(self.environment, image, target, max(self.metric.clicks))
            self.metric.update(ious, float(loss))

    def on_validation_epoch_end(self) -> None:
        """Log the scores."""
        scores = self.metric.compute()
        self.metric.reset()
        for name, value in scores.items():
            self.log(f"val/{name}", float(value), prog_bar=name.startswith("mIoU"), rank_zero_only=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the network, weight matrices decayed."""
        settings = self.optimization
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            is_matrix = parameter.dim() > 1 and "pos_embed" not in name
            groups.setdefault(settings.weight_decay if is_matrix else 0.0, []).append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": params, "weight_decay": decay} for decay, params in groups.items()],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: settings.factor((step + 1) / max(1, steps), self.trainer.current_epoch)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
