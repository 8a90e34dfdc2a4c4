"""PerceptionModule: the LightningModule around a PerceptionModel. Losses and predictions are the model's own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import LightningModule

from mmseg_llm.backbones.base import Backbone
from mmseg_llm.heads.base import Head
from mmseg_llm.metrics import make_metric
from mmseg_llm.model import PerceptionModel
from mmseg_llm.structures import Batch, Prediction, Sample
from mmseg_llm.training.checkpoint import find_weights, load_backbone, load_weights
from mmseg_llm.training.data import Parcel


@dataclass(frozen=True)
class Optimization:
    """AdamW with linear warm-up and cosine or linear decay.

    Attributes:
        lr: peak learning rate.
        head_lr: peak learning rate of the heads; None takes `lr`.
        weight_decay: on weight matrices only, unless `decay_all`.
        decay_all: decay biases, norms and embeddings too, as the reference recipe does.
        betas, eps: of AdamW.
        warmup: share of all steps.
        final: learning rate at the end as a share of the peak.
        schedule: shape of the decay.
    """

    lr: float = 4e-5
    head_lr: float | None = None
    weight_decay: float = 0.05
    decay_all: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: float = 0.03
    final: float = 0.0
    schedule: Literal["cosine", "linear"] = "cosine"


DEFAULT_OPTIMIZATION = Optimization()


class PerceptionModule(LightningModule):
    """Trains and validates a backbone with its heads.

    Args:
        backbone: vision encoder and language model.
        heads: by name.
        optimization: optimiser and schedule.
        protocol: how validation predicts, see `Head.protocols`.
        metric: protocol of the validation metric, see `metrics.make_metric`; that of the first head when None.
        initial_weights: `model.safetensors` of a run with the same model, or the name of a file in the package's assets, to
            start from.
        initial_backbone: the same of a run with the same backbone, whatever its heads.

    Raises:
        ValueError: if the initial weights are missing or do not fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: dict[str, Head],
        optimization: Optimization = DEFAULT_OPTIMIZATION,
        protocol: str = "generate",
        metric: str | None = None,
        initial_weights: str | None = None,
        initial_backbone: str | None = None,
    ) -> None:
        super().__init__()
        self.model = PerceptionModel(backbone, heads)
        for parameter in self.model.parameters():  # optimisers need float32 masters; what is frozen stays small
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if initial_weights is not None:
            load_weights(self.model, find_weights(initial_weights))
        if initial_backbone is not None:
            load_backbone(self.model, find_weights(initial_backbone))
        self.optimization = optimization
        self.protocol = protocol
        self.metric = make_metric(metric or self.model.head().metric(protocol, False))
        self.shown: list[tuple[Sample, Prediction, int]] = []

    def training_step(self, parcel: Parcel, batch_index: int) -> torch.Tensor:
        """Sum of the head's losses; each is logged by name."""
        batch: Batch = parcel.content
        losses = self.model.loss(batch)
        total = torch.stack([value for name, value in losses.items() if not name.startswith("_")]).sum()
        size = len(batch.samples)
        self.log("train/loss", total, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name.lstrip('_')}": value.detach() for name, value in losses.items()}, batch_size=size)
        return total

    def on_validation_epoch_start(self) -> None:
        """Forget the examples shown at the last validation."""
        self.shown = []

    def validation_step(self, parcel: Parcel, batch_index: int) -> None:
        """Predict exactly as `evaluate` and `Perceiver` do, and count."""
        samples: list[Sample] = parcel.content
        predictions = iter(self.model.predict(samples, protocol=self.protocol))
        for sample in samples:
            for index, query in enumerate(sample.queries):
                prediction = next(predictions)
                self.metric.update(prediction, query)
                if len(self.shown) < 64 and index < 2:
                    self.shown.append((sample, prediction, index))

    def on_validation_epoch_end(self) -> None:
        """Log the scores; the main ones in the progress bar."""
        scores = self.metric.compute()
        self.metric.reset()
        for name, value in scores.items():
            if not math.isnan(value) and not name.startswith("num_"):
                self.log(f"val/{name}", float(value), prog_bar=name in {"cIoU", "gIoU", "delta1"}, rank_zero_only=True)

    def test_step(self, parcel: Parcel, batch_index: int) -> None:
        """Same as validation."""
        self.validation_step(parcel, batch_index)

    def on_test_epoch_end(self) -> None:
        """Log the scores as `test/...`."""
        scores = self.metric.compute()
        self.metric.reset()
        self.log_dict({f"test/{k}": float(v) for k, v in scores.items() if not math.isnan(v)}, rank_zero_only=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over what trains, in groups by part and by decay."""
        settings = self.optimization
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            rate = settings.head_lr or settings.lr if name.startswith("model.heads.") else settings.lr
            is_matrix = parameter.dim() > 1 and "embed" not in name
            decay = settings.weight_decay if settings.decay_all or is_matrix else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
            betas=settings.betas,
            eps=settings.eps,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, round(settings.warmup * steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = min(1.0, (step - warmup) / max(1, steps - warmup))
            left = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
            return settings.final + (1 - settings.final) * left

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
