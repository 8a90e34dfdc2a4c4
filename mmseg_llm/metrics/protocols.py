"""Scores of referring segmentation from integer rows: one table of protocols, one function, numpy only.

A row is one expression (int64), see `COLUMNS`. Rows can be kept in a file and scored again under any protocol.

Legend: Q expressions; I intersection, U union, in pixels of the original image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

COLUMNS = ("sample_key", "query_key", "intersection", "gt_area", "pred_area", "rejected", "box_clean", "box_official")
"""`pred_area` and `intersection` are of the raw mask; `rejected` and `box_official` are 0/1; `box_clean` is -1 where
there is no ground-truth box. The keys are stable 63-bit hashes of the ids."""

PRECISION_TENTHS = (5, 6, 7, 8, 9)


@dataclass(frozen=True)
class Protocol:
    """The rules under which rows become numbers.

    Attributes:
        rejected_mask: what stands for the mask of a rejected expression: `empty` (nothing), `actual` (its raw mask), or
            `missed` (I = 0, U unchanged).
        absent: when a prediction says "no target": it was `rejected`, its mask is `empty`, or `either`.
        iou_eps, ciou_eps: added to the union of an expression, to the sum of unions.
        mean_eps: added to the number of expressions that gIoU is divided by.
        box: which box rule REC follows: `clean` or `official`.
        note: which official numbers it reproduces.
    """

    rejected_mask: Literal["empty", "actual", "missed"]
    absent: Literal["rejected", "empty", "either"]
    note: str
    iou_eps: float = 0.0
    ciou_eps: float = 0.0
    mean_eps: float = 0.0
    box: Literal["clean", "official"] = "clean"


PROTOCOLS = {
    "clean": Protocol("empty", "either", "the library's default"),
    "strict": Protocol("empty", "rejected", "as clean, but only an explicit rejection counts as 'no target'"),
    "mllmseg_res": Protocol(
        "actual", "empty", "MLLMSeg test_mllmseg_res; its gIoU is gIoU_per_image", 1e-5, 1e-10, box="official"
    ),
    "mllmseg_gres": Protocol("actual", "rejected", "MLLMSeg test_mllmseg_gres", 1e-8, 1e-10, 1e-5),
    "stamp": Protocol("actual", "empty", "STAMP eval, class 1 of its histogram", 1e-5, 1e-5),
    "lisa": Protocol("actual", "empty", "LISA validate, SegAgent eval_result_iou", 1e-5, 1e-10),
    "rela": Protocol("missed", "rejected", "ReLA ReferEvaluator on gRefCOCO (as fractions)"),
}

_REJECTED_TEXT = {
    "empty": "a rejection is an empty mask (I = 0, U = target area)",
    "actual": "a rejected target counts with its actual mask",
    "missed": "a rejected target has I = 0 and keeps U",
}
_ABSENT_TEXT = {
    "rejected": "it was rejected",
    "empty": "its mask is empty",
    "either": "it was rejected or its mask is empty",
}
_BOX_TEXT = {
    "clean": "tight box against labelled box, exclusive edges, expressions with a box only",
    "official": "inclusive pixel indices, ground truth rounded through fp16, all expressions",
}


def get_protocol(name: str) -> Protocol:
    """Look up a protocol.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown metric protocol '{name}'; use one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def describe_protocol(name: str) -> str:
    """One line that belongs beside every number: averaging unit, empty rule, thresholds, rejection rule."""
    rules = get_protocol(name)
    return (
        f"protocol {name} ({rules.note}): IoU at original size; cIoU = sum I / sum U; gIoU per expression, "
        f"gIoU_per_image mean over images of their mean; "
        f"an empty target scores 1 iff {_ABSENT_TEXT[rules.absent]}, else 0; "
        f"{_REJECTED_TEXT[rules.rejected_mask]}; mIoU, Pr@t (IoU >= t) over targets; "
        f"REC box IoU > 0.5 ({_BOX_TEXT[rules.box]})"
    )


def unique_rows(rows: np.ndarray) -> np.ndarray:
    """Sort `(Q, 8)` rows by key and drop repeats of an expression, as samplers that pad for equal ranks make.

    The result does not depend on the order of `rows`: of repeats that differ (non-deterministic kernels), the smallest
    stays.

    Raises:
        ValueError: if the shape is wrong, or one key stands for expressions with different ground truth.
    """
    if rows.ndim != 2 or rows.shape[1] != len(COLUMNS):
        raise ValueError(f"rows must be (Q, {len(COLUMNS)}) integers {COLUMNS}, got shape {rows.shape}")
    rows = rows[np.lexsort(rows.T[::-1])]
    repeats = (rows[1:, :2] == rows[:-1, :2]).all(1)
    clashes = repeats & (rows[1:, 3] != rows[:-1, 3])
    if clashes.any():
        raise ValueError(
            f"{int(clashes.sum())} expressions share sample id and query id with one of different ground truth; "
            "give every Query an id that is unique within its sample, and every sample one that is unique in the run"
        )
    return rows[np.concatenate(([True], ~repeats))] if len(rows) else rows


def score_rows(rows: np.ndarray, protocol: str = "clean") -> dict[str, float]:
    """Scores of `(Q, 8)` integer rows; fractions in [0, 1], NaN where nothing is there to average.

    Sums run in float64 over rows sorted by key, so that the numbers are the same bits for any order and sharding.

    Raises:
        ValueError: for an unknown protocol or malformed rows (see `unique_rows`).
    """
    rules = get_protocol(protocol)
    rows = unique_rows(np.asarray(rows, np.int64))
    sample_keys, _, intersection, gt_area, pred_area, rejected, box_clean, box_official = rows.T
    is_target, is_rejected = gt_area > 0, rejected > 0
    absent = {"rejected": is_rejected, "empty": pred_area == 0, "either": is_rejected | (pred_area == 0)}[rules.absent]
    intersection, union = _overlap(rules, intersection, gt_area, pred_area, is_rejected)
    union = np.where(absent & ~is_target, 0, union)
    ratio = intersection / np.where(is_target, union + rules.iou_eps, 1.0)
    iou = np.where(is_target, ratio, absent.astype(np.float64))
    _, image_of = np.unique(sample_keys, return_inverse=True)
    num_images = int(image_of.max(initial=-1)) + 1
    image_iou = np.bincount(image_of, iou, num_images) / np.maximum(np.bincount(image_of, minlength=num_images), 1)
    scores = {
        "cIoU": _ratio(float(intersection.sum()), float(union.sum()) + rules.ciou_eps),
        "gIoU": _ratio(float(iou.sum()), len(iou) + rules.mean_eps) if len(iou) else float("nan"),
        "gIoU_per_image": _mean(image_iou),
        "mIoU": _mean(iou[is_target]),
    }
    for tenths in PRECISION_TENTHS:
        hits = 10 * intersection >= tenths * union  # exact in integers
        scores[f"Pr@0.{tenths}"] = _mean(hits[is_target])
    scores["REC"] = _mean(box_official > 0 if rules.box == "official" else box_clean[box_clean >= 0] > 0)
    scores["N_acc"] = _mean(absent[~is_target])
    scores["T_acc"] = _mean(~absent[is_target])
    scores["num_expressions"], scores["num_images"] = float(len(rows)), float(num_images)
    return scores


def _overlap(
    rules: Protocol, intersection: np.ndarray, gt_area: np.ndarray, pred_area: np.ndarray, is_rejected: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`(I, U)` of `(Q,)` each, after the protocol's rule for rejected expressions."""
    union = gt_area + pred_area - intersection
    if rules.rejected_mask == "empty":
        union = np.where(is_rejected, gt_area, union)
    if rules.rejected_mask != "actual":
        intersection = np.where(is_rejected, 0, intersection)
    return intersection, union


def _ratio(numerator: float, denominator: float) -> float:
    """A fraction, NaN where the denominator is 0."""
    return numerator / denominator if denominator else float("nan")


def _mean(values: np.ndarray) -> float:
    """Mean in float64, NaN where there are no values."""
    return _ratio(float(values.sum(dtype=np.float64)), len(values))
