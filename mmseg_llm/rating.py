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
from mmseg_llm.segmenters.environment import describe_environment
from mmseg_llm.segmenters.recorder import iou_outside
from mmseg_llm.segmenters.starts import random_start
from mmseg_llm.trajectories import has_target

BENCHMARK = 0x5A7E
"""Behind the numbers that draw the random clicks, so that no start is one that `data trajectories --random_starts` draws."""

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
    masks that random clicks of the policy's segmenter made (right and mistaken ones, `segmenters.starts`). Queries without a
    target, or with one of ignored pixels only, are left out and counted, as there is no IoU to estimate.

    Args:
        model: with a click policy, on its device.
        dataset: labelled samples.
        output: JSON file to write: per expression estimate, true IoU where it is known, and whether to keep the mask.
        masks: predictions file of `mmseg-llm evaluate` whose masks are rated in place of the annotations.
        is_benchmark: rate masks of random clicks.
        keep: estimate from which a mask is kept; one without an estimate is not.
        head: name of the policy; the first head when None.
        batch_size: images at once; does not change the result.
        seed: of the random clicks of the benchmark.

    Returns:
        The report: counts, and scores of the estimates where the truth is another mask than the one rated.

    Raises:
        ValueError: for a head that is no click policy, a threshold out of range, or a query without label where annotations or
            random clicks are rated.
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
    num_without_target = 0
    for start in track(range(0, len(dataset), batch_size), description="rating", transient=True):
        whole = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
        samples = [_with_target(sample) for sample in whole]
        num_without_target += sum(len(a.queries) - len(b.queries) for a, b in zip(whole, samples, strict=True))
        if is_benchmark:
            shown = [_clicked(sample, policy.click_environment(), seed) for sample in samples]
        else:
            shown = [_shown(sample, given) for sample in samples]
        estimates = iter(policy.rate(model.backbone, shown))
        for sample in shown:
            records += [_record(sample, query, next(estimates), keep) for query in sample.queries]
    protocol: dict[str, Any] = {"masks": "random clicks" if is_benchmark else str(masks or "annotations")}
    protocol |= {"dataset": dataset.name, "keep": keep}
    if is_benchmark:
        protocol |= {"seed": str(seed), "environment": describe_environment(policy.click_environment())}
    report = {
        "protocol": protocol,
        "counts": _counts(records) | {"num_without_target": num_without_target},
        "scores": {},
    }
    if is_benchmark or masks is not None:  # annotations are their own truth
        known = [record for record in records if record["iou"] is not None]
        report["scores"] = score_estimates([r["estimate"] for r in known], [r["iou"] for r in known])
    write_json(output, {**report, "masks": records})
    return report


def _counts(records: Sequence[dict[str, Any]]) -> dict[str, int]:
    kept = sum(record["keep"] for record in records)
    unanswered = sum(record["estimate"] is None for record in records)
    return {"num_masks": len(records), "num_kept": kept, "num_unanswered": unanswered}


def _with_target(sample: Sample) -> Sample:
    """A sample with the queries whose masks can be rated, each under its name; unlabelled ones may have a mask from elsewhere."""
    queries = [
        replace(query, id=query.id or str(index))
        for index, query in enumerate(sample.queries)
        if query.masks is None or has_target(query, sample.size)
    ]
    return replace(sample, queries=tuple(queries))


def _shown(sample: Sample, given: dict[tuple[str, str], Mask] | None) -> Sample:
    """A sample whose queries start from the masks to rate."""
    if given is not None:
        return starting_from(sample, given)
    queries = [replace(query, start=query.target(sample.size)) for query in sample.queries]
    return replace(sample, queries=tuple(queries))


def _clicked(sample: Sample, environment: Environment, seed: int) -> Sample:
    """A sample whose queries start from what random clicks make of them."""
    image = sample.load_image()
    queries = []
    for query in sample.queries:
        draw = zlib.crc32(f"{sample.id}\n{query.id}".encode())
        observation = environment.reset(image)
        for click in random_start(query.target(sample.size), np.random.default_rng([seed, draw, 0, BENCHMARK])):
            observation = environment.step(click)
        queries.append(replace(query, start=Mask.from_array(observation.mask)))
    return replace(sample, queries=tuple(queries))


def _record(sample: Sample, query: Query, estimate: float | None, keep: float) -> dict[str, Any]:
    assert query.start is not None
    return {
        "sample_id": sample.id,
        "query_id": query.id,
        "query": query.text,
        "estimate": estimate,
        "iou": None if query.masks is None else _iou(query, query.start),
        "keep": estimate is not None and estimate >= keep,
        "mask": query.start.to_coco(),
    }


def _iou(query: Query, mask: Mask) -> float:
    """Of a mask with the target, over what is not ignored."""
    target, shown = (replace(each).array for each in (query.target(mask.size), mask))  # (H, W), of copies
    ignored = np.zeros(target.shape, bool) if query.ignore is None else replace(query.ignore).array
    return iou_outside(target, shown, ignored)
