"""The one evaluator: predict a dataset, write every prediction, score from what was written.

The score is computed from the very records in the file, so it can always be computed again. With several processes
(`torchrun`), each predicts its share and writes a part; the first one joins them.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmseg_llm.records import StartingFrom, read_predictions, read_record, record_of, write_json
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
        metric: rules of the metric (`clean`, `mllmseg_res`, `mllmseg_gres`, ..., `interactive`, `depth`).
        rules: the metric's rules in words.
        dataset: name of the dataset and split.
        head: name of the head.
        dtype: of the weights.
        refiner: what sharpened the masks; empty without.
        start: file of the masks that a click policy started from; empty without.
    """

    predict: str
    metric: str
    rules: str
    dataset: str
    head: str
    dtype: str
    refiner: str = ""
    start: str = ""


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
    chosen = model.head(head)
    chosen.check_protocol(protocol)
    metric = metric or chosen.metric(protocol, any(count == 0 for _, count in dataset.query_counts()))
    started = time.monotonic()
    if start is not None:
        dataset = StartingFrom(dataset, start)
    settings = chosen.describe(protocol)
    max_clicks = settings.get("max_clicks", 0)
    rules = describe_rules(metric, max_clicks)  # refuses an unknown metric before anything is predicted
    records = []
    for prediction, query in predict_dataset(
        model, dataset, protocol=protocol, head=head, batch_size=batch_size, refiner=refiner
    ):
        records.append(record_of(prediction, query))
    protocol_of = Protocol(
        predict=protocol,
        metric=metric,
        rules=rules,
        dataset=dataset.name,
        head=chosen.name,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        refiner="" if refiner is None else repr(refiner),
        start="" if start is None else str(start),
    )
    gathered = _gather(records, output)
    if gathered is None:
        return {}
    report = {
        "scores": score_records(gathered, metric, max_clicks),
        "protocol": asdict(protocol_of) | settings,
        **_endings(gathered),
        "dataset": dataset.describe(),
        "seconds": round(time.monotonic() - started, 2),
    }
    write_json(output, {**report, "predictions": gathered})
    return report


def describe_rules(metric: str, max_clicks: int = 0) -> str:
    """The rules that scores follow, in words; see `score_records` for the arguments.

    Raises:
        ValueError: for an unknown metric, or `interactive` without episodes.
    """
    from mmseg_llm.metrics.depth_scores import describe_depth
    from mmseg_llm.metrics.interactive import describe_interactive
    from mmseg_llm.metrics.protocols import describe_protocol

    if metric == "depth":
        return describe_depth()
    if metric == "interactive" and not max_clicks:
        raise ValueError("metric 'interactive' scores episodes of clicks; use it with a click policy")
    parts = [] if metric == "interactive" else [describe_protocol(metric)]
    return "; ".join(parts + ([describe_interactive(max_clicks)] if max_clicks else []))


def score_records(records: Sequence[dict[str, Any]], metric: str, max_clicks: int = 0) -> dict[str, float]:
    """Scores of written records; the order does not matter and repeats count once.

    Args:
        records: as `evaluate` writes them.
        metric: protocol; `interactive` scores episodes of clicks only, `depth` the numbers in answers.
        max_clicks: where they hold episodes of a click policy, the bound of these, which are scored too.
    """
    from mmseg_llm.metrics import InteractiveSegmentation, make_metric

    scorers: list[Any] = []  # the records are all here already
    if metric != "interactive":
        scorers.append(make_metric(metric, sync_on_compute=False))
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
    content = read_predictions(path)
    records, protocol = content["predictions"], content["protocol"]
    metric, max_clicks = metric or protocol["metric"], protocol.get("max_clicks", 0)
    protocol |= {"metric": metric, "rules": describe_rules(metric, max_clicks)}
    scores = score_records(records, metric, max_clicks)
    return {"scores": scores, "protocol": protocol, **_endings(records)}


def format_report(report: dict[str, Any]) -> str:
    """The scores with the protocol beside them, as plain text."""
    scores, protocol = report["scores"], report["protocol"]
    width = max(16, *map(len, (*scores, *protocol)))
    lines = [
        f"{name:>{width}}  {value:.4f}{_baseline(name, scores)}"
        if isinstance(value, float) and not name.startswith("num_")
        else f"{name:>{width}}  {int(value)}"
        for name, value in scores.items()
    ]
    lines += [f"{name:>{width}}: {value}" for name, value in protocol.items() if value not in ("", 0)]
    for name in ("endings", "answers"):
        if name in report:
            lines.append(f"{name:>{width}}: " + ", ".join(f"{count} {kind}" for kind, count in report[name].items()))
    skipped = report.get("dataset", {}).get("skipped", {})
    if skipped:
        lines.append(f"{'skipped':>{width}}: " + ", ".join(f"{count} {kind}" for kind, count in skipped.items()))
    return "\n".join(lines)


def _baseline(name: str, scores: dict[str, float]) -> str:
    """What stands behind a score: of delta1, that of the best constant answer."""
    task, _, kind = name.rpartition("delta1")
    rival = scores.get(f"{task}constant_delta1")
    return "" if kind or rival is None else f"  (best constant answer: {rival:.4f})"


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
