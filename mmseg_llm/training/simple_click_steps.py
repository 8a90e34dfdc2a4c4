"""Iterative training of SimpleClick: its loss, simulated clicks on what a prediction gets wrong, and episodes to judge it by.

Source: RITM (arXiv 2102.06583), whose training SimpleClick keeps; SegAgent specification section 9.

Legend: B batch, H W pixels, S side of a view, P points per sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as functional
from torchmetrics import Metric

from mmseg_llm.segmenters.oracle import distance_inside, next_click
from mmseg_llm.structures import Click

if TYPE_CHECKING:
    from PIL import Image

    from mmseg_llm.segmenters.environment import Environment

# A pixel is in the mask that clicks are simulated on above this probability, as in the predictor.
THRESHOLD = 0.49


def normalized_focal_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    alpha: float = 0.5,
    gamma: float = 2.0,
    ignore: torch.Tensor | None = None,
) -> torch.Tensor:
    """Focal loss whose focal weights average to 1 over each image, so that it does not fade as the image gets right (RITM).

    Args:
        logits: float `(B, H, W)`.
        targets: bool `(B, H, W)`.
        alpha: weight of the object's pixels, `1 - alpha` of the others.
        gamma: exponent of the focal weight `(1 - p)^gamma`, where p is the probability of what is right.
        ignore: bool `(B, H, W)`, pixels that count nothing.

    Returns:
        Mean over the pixels of each image, then over images; float32 scalar. The normaliser passes no gradient.
    """
    logits, positive = logits.float(), targets.bool()
    counted = torch.ones_like(logits) if ignore is None else (~ignore).float()
    signed = torch.where(positive, logits, -logits)
    focal = torch.sigmoid(-signed).pow(gamma) * counted  # (1 - p)^gamma
    num_counted = counted.sum((-2, -1), keepdim=True)
    scale = (num_counted / focal.sum((-2, -1), keepdim=True).clamp(min=1e-12)).detach()
    weight = torch.where(positive, alpha, 1 - alpha)
    loss = -weight * focal * scale * functional.logsigmoid(signed)
    return (loss.sum((-2, -1)) / num_counted[..., 0, 0].clamp(min=1)).mean()


def simulated_click(target: np.ndarray, mask: np.ndarray, rng: np.random.Generator | None = None) -> Click | None:
    """A click on the deepest error: `next_click` (rule clean), or any pixel at least half as deep within errors of its sign.

    Args:
        target: bool `(S, S)`, what the mask should be.
        mask: bool `(S, S)`, what it is.
        rng: source of chance; the deepest pixel itself when None.
    """
    click = next_click(target, mask, rule="clean")
    if click is None or rng is None:
        return click
    depth = distance_inside((target & ~mask) if click.is_positive else (mask & ~target))
    row, col = divmod(int(rng.choice(np.flatnonzero(depth > depth.max() / 2))), target.shape[1])
    return Click(row, col, click.is_positive)


def add_clicks(
    points: torch.Tensor, targets: torch.Tensor, chances: torch.Tensor, rng: np.random.Generator | None, order: int = 0
) -> torch.Tensor:
    """Points with one more click per view, on what the prediction gets wrong there; none where it is right.

    Args:
        points: float `(B, 2, P, 3)` of (row, col, order), padded with -1.
        targets: bool `(B, S, S)`.
        chances: float `(B, S, S)`.
        rng: see `simulated_click`.
        order: third value of the new points.

    Returns:
        float `(B, 2, P + 1, 3)`.
    """
    added = np.full((len(points), 2, 1, 3), -1, np.float32)
    masks, truths = (chances > THRESHOLD).cpu().numpy(), targets.cpu().numpy()
    for index, (truth, mask) in enumerate(zip(truths, masks, strict=True)):
        click = simulated_click(truth, mask, rng)
        if click is not None:
            added[index, 0 if click.is_positive else 1, 0] = click.row, click.col, order
    return torch.cat((points, torch.from_numpy(added).to(points)), 2)


def packed(points: torch.Tensor) -> torch.Tensor:
    """The network's form of points: `(B, 2, P, 3)` to `(B, 2P', 3)`, without the padding that no row needs."""
    is_point = points[..., 0] >= 0  # (B, 2, P)
    most = max(1, int(is_point.sum(-1).max()))
    order = is_point.int().argsort(dim=-1, descending=True, stable=True)[..., :most, None]
    return points.gather(2, order.expand(-1, -1, -1, 3)).flatten(1, 2)


def oracle_ious(
    environment: Environment,
    image: Image.Image,
    target: np.ndarray,
    num_clicks: int,
    ignore: np.ndarray | None = None,
    stop_at: float = 1.0,
) -> list[float]:
    """IoU after each of `num_clicks` oracle clicks on an image, starting from nothing.

    An episode that reaches `stop_at` or leaves nothing to click keeps its IoU from there on.

    Args:
        environment: interactive segmenter.
        image: to segment.
        target: bool `(H, W)`.
        num_clicks: length of the result.
        ignore: bool `(H, W)`, pixels that neither are clicked nor count.
        stop_at: IoU that ends an episode.
    """
    counted = np.ones_like(target) if ignore is None else ~ignore
    seen, ious = environment.reset(image), list[float]()
    while len(ious) < num_clicks:
        click = next_click(target, seen.mask, ignore=ignore, clicked=seen.clicks, rule="clean")
        if click is not None:
            seen = environment.step(click)
        union = int(((seen.mask | target) & counted).sum())
        ious.append(int((seen.mask & target & counted).sum()) / union if union else 1.0)
        if click is None or ious[-1] >= stop_at:
            ious += [ious[-1]] * (num_clicks - len(ious))
    return ious


class ClickIoU(Metric):
    """Mean IoU after chosen numbers of clicks and, beside it, a mean loss; float64 sums, the same for any world size.

    Args:
        clicks: numbers of clicks to score after.
    """

    total: torch.Tensor
    loss: torch.Tensor
    count: torch.Tensor

    def __init__(self, clicks: tuple[int, ...] = (1, 3, 5)) -> None:
        super().__init__()
        if not clicks or min(clicks) < 1:
            raise ValueError(f"scores after {clicks} clicks are not possible; give numbers of 1 or more")
        self.clicks = clicks
        for name, size in (("total", len(clicks)), ("loss", 1), ("count", 1)):
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, ious: list[float], loss: float) -> None:
        """Add an episode of at least `max(clicks)` clicks."""
        self.total += torch.tensor([ious[number - 1] for number in self.clicks], dtype=torch.float64).to(self.total)
        self.loss += loss
        self.count += 1

    def compute(self) -> dict[str, float]:
        """`mIoU@k` for each number of clicks and `loss`; NaN without episodes."""
        means = (self.total / self.count).tolist()
        return {f"mIoU@{k}": mean for k, mean in zip(self.clicks, means)} | {"loss": float(self.loss / self.count)}

    def describe(self) -> dict[str, Any]:
        """Protocol of these scores."""
        return {
            "metric": "mean IoU after oracle clicks",
            "clicks": list(self.clicks),
            "rule": "clean",
            "start": "empty",
        }
