"""Annotation filtering: a click policy's estimates of how well given masks fit their expressions (SegAgent supplement E.1;
specification section 7.2).

Legend: N masks.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.data.base import SampleDataset
from mmseg_llm.heads.click_policy.head import ClickPolicyHead
from mmseg_llm.masks import Mask
from mmseg_llm.metrics.estimates import score_estimates
from mmseg_llm.records import read_masks, starting_from, write_json
from mmseg_llm.segmenters.starts import random_start

if TYPE_CHECKING:
    from mmseg_llm.model import PerceptionModel
    from mmseg_llm.segmenters.environment import Environment
    from mmseg_llm.structures import Query, Sample


def rate_dataset(
    model: PerceptionModel,
    dataset: SampleDataset,
    output: Path,
    *,
    masks: Path | None = None,
    is_benchmark: bool = False,
    keep: float = 0.8,
    head: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Estimate the IoU of one mask per expression and write all estimates.

    What is rated are the dataset's own annotations; or the masks of a predictions file; or, as a benchmark with known truth,
    masks that random clicks of the policy's segmenter made (right and mistaken ones, `segmenters.starts`).

    Args:
        model: with a click policy, on its device.
        dataset: labelled samples.
        output: JSON file to write: per expression estimate, true IoU where it is known, and whether to keep the mask.
        masks: predictions file of `mmseg-llm evaluate` whose masks are rated in place of the annotations.
        is_benchmark: rate masks of random clicks.
        keep: estimate from which a mask is kept; one without an estimate is not.
        head: name of the policy; the first head when None.
        batch_size: images at once; does not change the result.
        seed: of the random clicks.

    Returns:
        The report: counts, and scores of the estimates where the truth is another mask than the one rated.

    Raises:
        ValueError: for a head that is no click policy, a threshold out of range, or a query without mask.
    """
    from rich.progress import track

    policy = model.head(head)
    if not isinstance(policy, ClickPolicyHead):
        raise ValueError(f"head '{policy.name}' is no click policy; train one with configs/segagent_tiny.yaml")
    if not 0 <= keep <= 1:
        raise ValueError(f"keep is {keep}; it is an IoU between 0 and 1")
    if masks is not None and is_benchmark:
        raise ValueError("give either a file of masks or the benchmark of random clicks")
    given = None if masks is None else read_masks(masks)
    records: list[dict[str, Any]] = []
    for start in track(range(0, len(dataset), batch_size), description="rating", transient=True):
        samples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
        if is_benchmark:
            shown = [_clicked(sample, policy.click_environment(), seed) for sample in samples]
        else:
            shown = [_shown(sample, given) for sample in samples]
        estimates = iter(policy.rate(model.backbone, shown))
        for sample in shown:
            records += [_record(sample, query, next(estimates), keep) for query in sample.queries]
    report = _report(records, keep, "random clicks" if is_benchmark else str(masks or "annotations"), dataset.name)
    is_known = is_benchmark or masks is not None  # annotations are their own truth
    if is_known:
        report["scores"] = score_estimates([r["estimate"] for r in records], [r["iou"] for r in records])
    write_json(output, {**report, "masks": records})
    return report


def _report(records: Sequence[dict[str, Any]], keep: float, source: str, dataset: str) -> dict[str, Any]:
    kept = sum(record["keep"] for record in records)
    unanswered = sum(record["estimate"] is None for record in records)
    counts = {"num_masks": len(records), "num_kept": kept, "num_unanswered": unanswered}
    return {"protocol": {"masks": source, "dataset": dataset, "keep": keep}, "counts": counts, "scores": {}}


def _shown(sample: Sample, given: dict[tuple[str, str], Mask] | None) -> Sample:
    """A sample whose queries start from the masks to rate."""
    if given is not None:
        return starting_from(sample, given)
    queries = [replace(q, id=q.id or str(i), start=q.target(sample.size)) for i, q in enumerate(sample.queries)]
    return replace(sample, queries=tuple(queries))


def _clicked(sample: Sample, environment: Environment, seed: int) -> Sample:
    """A sample whose queries with a target start from what random clicks make of them."""
    image = sample.load_image()
    queries = []
    for index, query in enumerate(sample.queries):
        if query.is_no_target:
            continue
        draw = zlib.crc32(f"{sample.id}\n{query.id or index}".encode())
        observation = environment.reset(image)
        for click in random_start(query.target(sample.size), np.random.default_rng([seed, draw])):
            observation = environment.step(click)
        queries.append(replace(query, id=query.id or str(index), start=Mask.from_array(observation.mask)))
    return replace(sample, queries=tuple(queries))


def _record(sample: Sample, query: Query, estimate: float | None, keep: float) -> dict[str, Any]:
    assert query.start is not None
    return {
        "sample_id": sample.id,
        "query_id": query.id,
        "query": query.text,
        "estimate": estimate,
        "iou": None if query.masks is None else query.start.iou(query.target(sample.size)),
        "keep": estimate is not None and estimate >= keep,
        "mask": query.start.to_coco(),
    }
