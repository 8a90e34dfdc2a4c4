"""Predictions files: what `evaluate` writes, read back for scoring, rating, and episodes that go on from given masks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmseg_llm.data.base import SampleDataset
from mmseg_llm.masks import Mask
from mmseg_llm.metrics.depth_scores import labelled_value
from mmseg_llm.quantities import DepthPoint, from_null, to_null
from mmseg_llm.structures import Prediction, Query, Sample


def record_of(prediction: Prediction, query: Query) -> dict[str, Any]:
    """A prediction with its label, for JSON.

    The chance of a measured number differs in the sixth digit with what else is in its batch: four are kept.

    Raises:
        ValueError: for a query without label.
    """
    if query.masks is not None:
        truth: dict[str, Any] = {
            "masks": [mask.to_coco() for mask in query.masks],
            "boxes": None if query.boxes is None else [list(box) for box in query.boxes],
            **({} if query.ignore is None else {"ignore": query.ignore.to_coco()}),
        }
    elif labelled_value(query) is not None:
        points = [[to_null(point.x), to_null(point.y), point.metres] for point in query.points]
        truth = {"task": query.task, "value": query.value, "points": points}
    else:
        missing = "mask label" if query.task == "segment" else "label"
        asked = f" ('{query.text}')" if query.text else ""
        raise ValueError(
            f"query '{query.id or prediction.query_id}'{asked} of sample '{prediction.sample_id}' has no {missing}; "
            "evaluate a labelled dataset"
        )
    record = prediction.to_json()
    if prediction.measurement is not None:
        record["score"] = round(record["score"], 4)
    return {**record, "target": truth}


def read_record(record: dict[str, Any]) -> tuple[Prediction, Query]:
    """A prediction with its label, inverse of `record_of`."""
    prediction, truth = Prediction.from_json(record), record["target"]
    if "masks" not in truth:
        points = tuple(DepthPoint(from_null(x), from_null(y), metres) for x, y, metres in truth["points"])
        query = Query(prediction.query, points=points, id=prediction.query_id, task=truth["task"], value=truth["value"])
        return prediction, query
    ignore = truth.get("ignore")
    return prediction, Query(
        text=prediction.query,
        masks=tuple(Mask.from_coco(mask, prediction.size) for mask in truth["masks"]),
        boxes=None if truth["boxes"] is None else tuple(tuple(box) for box in truth["boxes"]),  # type: ignore[misc]
        id=prediction.query_id,
        ignore=None if ignore is None else Mask.from_coco(ignore, prediction.size),
    )


def read_predictions(path: Path) -> dict[str, Any]:
    """The content of a predictions file.

    Raises:
        ValueError: if the file was not written by `evaluate`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["predictions"], content["protocol"]
    except FileNotFoundError as error:
        raise ValueError(f"no file '{path}'; give the output of an evaluation") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no predictions file ({error}); write one with mmseg-llm evaluate") from error
    return content


class StartingFrom(SampleDataset):
    """A dataset whose queries start from given masks, those of any head.

    Args:
        dataset: the same that the masks were made for.
        masks: predictions file of `evaluate`.

    Raises:
        ValueError: if it is no such file.
    """

    def __init__(self, dataset: SampleDataset, masks: Path) -> None:
        self.dataset, self.masks = dataset, read_masks(masks)
        self.name, self.skipped = dataset.name, dataset.skipped

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`.

        Raises:
            ValueError: if there is no mask for one of its queries.
        """
        return starting_from(self.dataset[index], self.masks)


def starting_from(sample: Sample, masks: dict[tuple[str, str], Mask]) -> Sample:
    """A sample whose queries start from the masks of their `(sample id, query id)`.

    Raises:
        ValueError: if there is no mask for one of them.
    """
    queries = []
    for index, query in enumerate(sample.queries):
        name = query.id or str(index)
        if (sample.id, name) not in masks:
            raise ValueError(
                f"there is no mask for query '{name}' of sample '{sample.id}'; give predictions made on this very dataset"
            )
        queries.append(replace(query, id=name, start=masks[sample.id, name]))
    return replace(sample, queries=tuple(queries))


def read_masks(path: Path) -> dict[tuple[str, str], Mask]:
    """The answers in a predictions file of `evaluate`, by `(sample id, query id)`.

    Raises:
        ValueError: if the file was not written by `evaluate`.
    """
    found = (Prediction.from_json(record) for record in read_predictions(path)["predictions"])
    return {(prediction.sample_id, prediction.query_id): prediction.answer_mask for prediction in found}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is never seen half written; numbers that are not finite become null, as JSON knows no others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(_standard(content), ensure_ascii=False, allow_nan=False), encoding="utf-8")
    temporary.replace(path)


def _standard(content: Any) -> Any:
    """The content with None for numbers that are not finite, such as a mean over nothing."""
    if isinstance(content, dict):
        return {name: _standard(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_standard(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
