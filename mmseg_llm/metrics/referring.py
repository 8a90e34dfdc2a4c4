"""Referring segmentation and comprehension: predictions become integer rows, rows become scores (`protocols.py`).

Legend: Q expressions, H W pixels of the original image.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchmetrics import Metric

from mmseg_llm.geometry import box_iou
from mmseg_llm.metrics.protocols import COLUMNS, describe_protocol, get_protocol, score_rows, unique_rows
from mmseg_llm.structures import Mask

if TYPE_CHECKING:
    from mmseg_llm.structures import Box, Prediction, Query

REC_IOU = 0.5
"""A box is right if its IoU is above this."""


class ReferringSegmentation(Metric):
    """cIoU, gIoU, Pr@t, box accuracy and no-target accuracy, the same bits for any world size, order and batch size.

    An expression is known by its `(sample id, query id)` and counts once, however often it is updated. The state is
    one int64 row per expression (`protocols.COLUMNS`), gathered, never averaged.

    Args:
        protocol: `clean`, `strict`, `mllmseg_res`, `mllmseg_gres`, `lisa` or `rela`, see `protocols.PROTOCOLS`.

    Raises:
        ValueError: for an unknown protocol.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    rows: list[torch.Tensor]

    def __init__(self, protocol: str = "clean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        get_protocol(protocol)
        self.protocol = protocol
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, prediction: Prediction, query: Query) -> None:
        """Add one expression.

        Raises:
            ValueError: if the two do not belong together or are not labelled (see `expression_row`).
        """
        self.rows.append(torch.from_numpy(expression_row(prediction, query)[None]).to(self.device))  # (1, 8)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the rows of all processes; one that saw nothing takes part with zero rows (of the right type)."""
        if not self._is_synced and not len(self.rows):
            self.rows = [torch.zeros((0, len(COLUMNS)), dtype=torch.int64, device=self.device)]
        super().sync(*args, **kwargs)

    def expression_rows(self) -> np.ndarray:
        """The `(Q, 8)` int64 rows of this process (of all, once synchronised), repeats dropped, sorted by key.

        Raises:
            ValueError: if equal ids stand for expressions with different ground truth.
        """
        parts = [self.rows] if isinstance(self.rows, torch.Tensor) else self.rows
        arrays = [part.reshape(-1, len(COLUMNS)).cpu().numpy() for part in parts]
        return unique_rows(np.concatenate([np.zeros((0, len(COLUMNS)), np.int64), *arrays]))

    def compute(self) -> dict[str, float]:
        """Scores of everything seen, as fractions (see `score_rows`)."""
        return score_rows(self.expression_rows(), self.protocol)

    def describe(self) -> str:
        """The protocol in one line, to be printed with the scores."""
        return describe_protocol(self.protocol)


def expression_row(prediction: Prediction, query: Query) -> np.ndarray:
    """Everything the scores need of one expression, as int64 `(8,)` in the order of `protocols.COLUMNS`.

    The mask is counted as it is even where `exists` is False; each protocol decides what a rejection means.

    Raises:
        ValueError: if ids are missing or differ, the query has no mask label, the sizes differ, or there is no mask
            although the prediction says that the target exists.
    """
    name = f"prediction for query '{query.id or query.text}' of sample '{prediction.sample_id}'"
    if not prediction.sample_id:
        raise ValueError(f"{name} has no sample_id; set it, scores count each (sample id, query id) once")
    if query.id and prediction.query_id != query.id:
        raise ValueError(f"{name} has the query_id '{prediction.query_id}'; pair each prediction with its own query")
    if prediction.mask is None and prediction.exists:
        raise ValueError(f"{name} has no mask; use a head that segments, or set exists=False for a rejection")
    target = query.target(prediction.size)
    mask = prediction.mask or Mask.empty(prediction.size)
    if mask.size != target.size:
        raise ValueError(f"{name} has a mask of size {mask.size}, the target has {target.size}; resize the prediction")
    gt_box = _target_box(query, target)
    box = mask.box if prediction.exists else None
    values = (
        stable_key(prediction.sample_id),
        stable_key(query.id or prediction.query_id or query.text),
        mask.intersection(target),
        target.area,
        mask.area,
        not prediction.exists,
        -1 if gt_box is None else box_iou(box, gt_box) > REC_IOU,
        is_box_right_official(mask.box, gt_box),
    )
    return np.array(values, np.int64)


def stable_key(identity: str) -> int:
    """A 63-bit hash that is the same in every process and run."""
    return int.from_bytes(blake2b(identity.encode(), digest_size=8).digest(), "big") >> 1


def is_box_right_official(box: Box | None, gt_box: Box | None) -> bool:
    """The rule of MLLMSeg `test_mllmseg_res` (spec section 6.1).

    The predicted box (`(x1, y1, x2, y2)`, exclusive edges, or None) is taken to inclusive pixel indices without adding
    1 to its extent, a missing one is all zeros, and the ground truth is rounded through fp16.
    """
    corners = (0.0, 0.0, 0.0, 0.0) if box is None else (box[0], box[1], box[2] - 1, box[3] - 1)
    truth = np.asarray(gt_box or (0.0, 0.0, 0.0, 0.0), np.float16).astype(np.float64)
    return box_iou(corners, tuple(truth.tolist())) > REC_IOU


def _target_box(query: Query, target: Mask) -> Box | None:
    """The labelled box, of several the one around them all, without labelled boxes the tight box of the target."""
    if target.area == 0 or not query.boxes:
        return target.box
    corners = np.asarray(query.boxes, np.float64)  # (instances, 4)
    x1, y1 = corners[:, :2].min(0).tolist()
    x2, y2 = corners[:, 2:].max(0).tolist()
    return (x1, y1, x2, y2)
