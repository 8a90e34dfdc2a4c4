"""The one evaluator: predict a dataset, write every prediction, score from what was written.

The score is computed from the very records in the file, so it can always be computed again. With several processes
(`torchrun`), each predicts its share and writes a part; the first one joins them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmseg_llm.segmenters import refine_predictions
from mmseg_llm.structures import Prediction

if TYPE_CHECKING:
    from mmseg_llm.data.base import SampleDataset
    from mmseg_llm.model import PerceptionModel
    from mmseg_llm.segmenters import Refiner
    from mmseg_llm.structures import Query


@dataclass(frozen=True)
class Protocol:
    """Everything a score depends on beside weights and data; printed with it.

    Attributes:
        predict: how the head answers (`generate`, `per_expression`, `official`).
        metric: rules of the metric (`clean`, `mllmseg_res`, `mllmseg_gres`, ...).
        rules: the metric's rules in words.
        dataset: name of the dataset and split.
        head: name of the head.
        dtype: of the weights.
        refiner: what sharpened the masks; empty without.
    """

    predict: str
    metric: str
    rules: str
    dataset: str
    head: str
    dtype: str
    refiner: str = ""


def predict_dataset(
    model: PerceptionModel,
    dataset: SampleDataset,
    *,
    protocol: str,
    head: str | None,
    batch_size: int,
    refiner: Refiner | None = None,
) -> Iterator[tuple[Prediction, Query]]:
    """Predictions of this process' share of a dataset, every sample once over all processes."""
    from rich.progress import track

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    indices = range(rank, len(dataset), world)
    starts = range(0, len(indices), batch_size)
    for start in track(starts, description="predicting", disable=rank != 0, transient=True):
        samples = [dataset[index] for index in indices[start : start + batch_size]]
        found = model.predict(samples, head, protocol)
        predictions = iter(found if refiner is None else refine_predictions(refiner, found))
        for sample in samples:
            for query in sample.queries:
                yield next(predictions), query


def evaluate(
    model: PerceptionModel,
    dataset: SampleDataset,
    output: Path,
    *,
    protocol: str = "generate",
    head: str | None = None,
    batch_size: int = 16,
    metric: str | None = None,
    refiner: Refiner | None = None,
) -> dict[str, Any]:
    """Predict, write `output` (JSON) and return the report without the predictions.

    Args:
        model: in eval mode, on its device.
        dataset: labelled samples.
        output: file to write; it is replaced only when all is done.
        protocol: see `Head.protocols`.
        head: name; the first one when None.
        batch_size: images at once; does not change the result.
        refiner: sharpens the masks.
        metric: protocol of the metric; that of the head and protocol when None.

    Raises:
        ValueError: for an unknown protocol or a dataset without labels.
    """
    from mmseg_llm.metrics.protocols import describe_protocol

    chosen = model.head(head)
    chosen.check_protocol(protocol)
    metric = metric or chosen.metric(protocol, any(count == 0 for _, count in dataset.query_counts()))
    started = time.monotonic()
    records = []
    for prediction, query in predict_dataset(
        model, dataset, protocol=protocol, head=head, batch_size=batch_size, refiner=refiner
    ):
        records.append(_record(prediction, query))
    described = Protocol(
        predict=protocol,
        metric=metric,
        rules=describe_protocol(metric),
        dataset=dataset.name,
        head=chosen.name,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        refiner="" if refiner is None else repr(refiner),
    )
    gathered = _gather(records, output)
    if gathered is None:
        return {}
    report = {
        "scores": score_records(gathered, metric),
        "protocol": asdict(described),
        "dataset": dataset.describe(),
        "seconds": round(time.monotonic() - started, 2),
    }
    _write(output, {**report, "predictions": gathered})
    return report


def score_records(records: Sequence[dict[str, Any]], metric: str) -> dict[str, float]:
    """Scores of written records; the order does not matter and repeats count once."""
    from mmseg_llm.metrics.referring import ReferringSegmentation
    from mmseg_llm.structures import Mask, Query

    scorer = ReferringSegmentation(metric, sync_on_compute=False)  # the records are all here already
    for record in records:
        prediction = Prediction.from_json(record)
        truth = record["target"]
        masks = tuple(Mask.from_coco(mask, prediction.size) for mask in truth["masks"])
        boxes = None if truth["boxes"] is None else tuple(tuple(box) for box in truth["boxes"])
        scorer.update(prediction, Query(text=prediction.query, masks=masks, boxes=boxes, id=prediction.query_id))  # type: ignore[arg-type]
    return scorer.compute()


def score_file(path: Path, metric: str | None = None) -> dict[str, Any]:
    """Score a predictions file again, under its own or another metric protocol.

    Raises:
        ValueError: if the file was not written by `evaluate`.
    """
    from mmseg_llm.metrics.protocols import describe_protocol

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        records, protocol = content["predictions"], content["protocol"]
    except FileNotFoundError as error:
        raise ValueError(f"no file '{path}'; give the output of an evaluation") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no predictions file ({error}); write one with mmseg-llm evaluate") from error
    metric = metric or protocol["metric"]
    protocol |= {"metric": metric, "rules": describe_protocol(metric)}
    return {"scores": score_records(records, metric), "protocol": protocol}


def format_report(report: dict[str, Any]) -> str:
    """The scores with the protocol beside them, as plain text."""
    lines = [f"{name:>16}  {value:.4f}" if isinstance(value, float) and not name.startswith("num_")
             else f"{name:>16}  {int(value)}" for name, value in report["scores"].items()]  # fmt: skip
    lines += [f"{name:>16}: {value}" for name, value in report["protocol"].items()]
    return "\n".join(lines)


def _record(prediction: Prediction, query: Query) -> dict[str, Any]:
    if query.masks is None:
        raise ValueError(f"query '{query.text}' ({query.id}) has no mask label; evaluate a labelled dataset")
    truth = {
        "masks": [mask.to_coco() for mask in query.masks],
        "boxes": None if query.boxes is None else [list(box) for box in query.boxes],
    }
    return {**prediction.to_json(), "target": truth}


def _gather(records: list[dict[str, Any]], output: Path) -> list[dict[str, Any]] | None:
    """All records in a fixed order on the first process, None on the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch.distributed as dist

        is_ours = not dist.is_initialized()
        if is_ours:
            dist.init_process_group("gloo")
        parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(records, parts)
        dist.barrier()  # a process that leaves early would break the connection of one that still receives
        if is_ours:
            dist.destroy_process_group()
        if parts is None:
            return None
        records = [record for part in parts for record in part]
    return sorted(records, key=lambda record: (record["sample_id"], record["query_id"]))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)
