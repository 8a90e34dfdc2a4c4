"""The one evaluator: predict a dataset, write every prediction, score from what was written.

The score is computed from the very records in the file, so it can always be computed again. With several processes
(`torchrun`), each predicts its share and writes a part; the first one joins them.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmseg_llm.data.base import SampleDataset
from mmseg_llm.masks import Mask
from mmseg_llm.segmenters import refine_predictions
from mmseg_llm.structures import Prediction

if TYPE_CHECKING:
    from mmseg_llm.model import PerceptionModel
    from mmseg_llm.segmenters import Refiner
    from mmseg_llm.structures import Query, Sample


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
        start: file of the masks that a click policy started from; empty without.
        environment: what a click policy clicked on; empty for other heads.
        max_clicks: of a click policy; 0 for other heads.
    """

    predict: str
    metric: str
    rules: str
    dataset: str
    head: str
    dtype: str
    refiner: str = ""
    start: str = ""
    environment: str = ""
    max_clicks: int = 0


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
    found = (Prediction.from_json(record) for record in _read(path)["predictions"])
    return {(prediction.sample_id, prediction.query_id): prediction.answer_mask for prediction in found}


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
    start: Path | None = None,
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
        start: predictions file whose masks a click policy starts from.
        metric: protocol of the metric; that of the head and protocol when None.

    Raises:
        ValueError: for an unknown protocol or a dataset without labels.
    """
    from mmseg_llm.metrics.protocols import describe_protocol

    chosen = model.head(head)
    chosen.check_protocol(protocol)
    metric = metric or chosen.metric(protocol, any(count == 0 for _, count in dataset.query_counts()))
    started = time.monotonic()
    if start is not None:
        dataset = StartingFrom(dataset, start)
    environment = getattr(chosen, "environment", None)
    records = []
    for prediction, query in predict_dataset(
        model, dataset, protocol=protocol, head=head, batch_size=batch_size, refiner=refiner
    ):
        records.append(record_of(prediction, query))
    described = Protocol(
        predict=protocol,
        metric=metric,
        rules=describe_protocol(metric),
        dataset=dataset.name,
        head=chosen.name,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        refiner="" if refiner is None else repr(refiner),
        start="" if start is None else str(start),
        environment="" if environment is None else repr(environment),
        max_clicks=getattr(chosen, "max_clicks", 0),
    )
    gathered = _gather(records, output)
    if gathered is None:
        return {}
    report = {
        "scores": score_records(gathered, metric, described.max_clicks),
        "protocol": asdict(described),
        **_endings(gathered),
        "dataset": dataset.describe(),
        "seconds": round(time.monotonic() - started, 2),
    }
    write_json(output, {**report, "predictions": gathered})
    return report


def score_records(records: Sequence[dict[str, Any]], metric: str, max_clicks: int = 0) -> dict[str, float]:
    """Scores of written records; the order does not matter and repeats count once.

    Args:
        records: as `evaluate` writes them.
        metric: protocol; `interactive` scores episodes of clicks only.
        max_clicks: where they hold episodes of a click policy, the bound of these, which are scored too.
    """
    from mmseg_llm.metrics.interactive import InteractiveSegmentation
    from mmseg_llm.metrics.referring import ReferringSegmentation

    scorers: list[Any] = []  # the records are all here already
    if metric != "interactive":
        scorers.append(ReferringSegmentation(metric, sync_on_compute=False))
    if max_clicks:
        scorers.append(InteractiveSegmentation(max_clicks, sync_on_compute=False))
    if not records or not scorers:
        raise ValueError(
            "there is nothing to score; give predictions of a labelled dataset, with episodes for 'interactive'"
        )
    for record in records:
        prediction, query = read_record(record)
        for scorer in scorers:
            scorer.update(prediction, query)
    return {name: value for scorer in scorers for name, value in scorer.compute().items()}


def read_record(record: dict[str, Any]) -> tuple[Prediction, Query]:
    """A prediction with its label, inverse of `record_of`."""
    from mmseg_llm.structures import Query

    prediction, truth = Prediction.from_json(record), record["target"]
    ignore = truth.get("ignore")
    return prediction, Query(
        text=prediction.query,
        masks=tuple(Mask.from_coco(mask, prediction.size) for mask in truth["masks"]),
        boxes=None if truth["boxes"] is None else tuple(tuple(box) for box in truth["boxes"]),  # type: ignore[misc]
        id=prediction.query_id,
        ignore=None if ignore is None else Mask.from_coco(ignore, prediction.size),
    )


def _endings(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How often the episodes of a click policy ended for each reason, and how its answers were read."""
    endings = Counter(record["stop"] for record in records if record.get("stop"))
    answers = Counter(
        step["status"] for record in records for step in record.get("trajectory", ()) if step.get("status")
    )
    return {"endings": dict(endings), "answers": dict(answers)} if endings else {}


def score_file(path: Path, metric: str | None = None) -> dict[str, Any]:
    """Score a predictions file again, under its own or another metric protocol.

    Raises:
        ValueError: if the file was not written by `evaluate`.
    """
    from mmseg_llm.metrics.protocols import describe_protocol

    content = _read(path)
    records, protocol = content["predictions"], content["protocol"]
    metric = metric or protocol["metric"]
    if metric != "interactive":
        protocol |= {"metric": metric, "rules": describe_protocol(metric)}
    scores = score_records(records, metric, protocol.get("max_clicks", 0))
    return {"scores": scores, "protocol": protocol, **_endings(records)}


def _read(path: Path) -> dict[str, Any]:
    """The content of a predictions file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["predictions"], content["protocol"]
    except FileNotFoundError as error:
        raise ValueError(f"no file '{path}'; give the output of an evaluation") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no predictions file ({error}); write one with mmseg-llm evaluate") from error
    return content


def format_report(report: dict[str, Any]) -> str:
    """The scores with the protocol beside them, as plain text."""
    lines = [f"{name:>16}  {value:.4f}" if isinstance(value, float) and not name.startswith("num_")
             else f"{name:>16}  {int(value)}" for name, value in report["scores"].items()]  # fmt: skip
    lines += [f"{name:>16}: {value}" for name, value in report["protocol"].items() if value not in ("", 0)]
    for name in ("endings", "answers"):
        if name in report:
            lines.append(f"{name:>16}: " + ", ".join(f"{count} {kind}" for kind, count in report[name].items()))
    return "\n".join(lines)


def record_of(prediction: Prediction, query: Query) -> dict[str, Any]:
    """A prediction with its label, for JSON.

    Raises:
        ValueError: for a query without label.
    """
    if query.masks is None:
        raise ValueError(f"query '{query.text}' ({query.id}) has no mask label; evaluate a labelled dataset")
    truth = {
        "masks": [mask.to_coco() for mask in query.masks],
        "boxes": None if query.boxes is None else [list(box) for box in query.boxes],
        **({} if query.ignore is None else {"ignore": query.ignore.to_coco()}),
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)
