"""`mmseg-llm bench`: times the parts, and shared-prefix inference against one expression at a time, in one run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmseg_llm.structures import Prediction, Sample

if TYPE_CHECKING:
    from mmseg_llm.model import PerceptionModel


def untrained_model() -> PerceptionModel:
    """The tiny InternVL with a mask decoder; it always says `[SEG]` first, so that every query costs a mask."""
    from mmseg_llm.backbones import InternVLBackbone
    from mmseg_llm.backbones.collate import collate
    from mmseg_llm.heads import MaskDecoderHead
    from mmseg_llm.model import PerceptionModel

    torch.manual_seed(0)
    head = MaskDecoderHead(heads=4, max_new_tokens=8)
    model = PerceptionModel(InternVLBackbone("internvl-tiny"), {"mask_decoder": head}).eval()
    sample = scenes("flat-96", 1, 1)[0]
    codec = model.backbone.codec
    with torch.no_grad():  # point the row of [SEG] to the states that start an answer
        batch = collate([head.build(sample, codec, np.random.default_rng(0))], codec)
        state = model.backbone(batch).states[0, batch.labels[0].ne(-100).nonzero()[0, 0] - 1]
        model.backbone.model.get_output_embeddings().weight[head.seg_id] = state
    return model


def scenes(level: str, images: int, queries: int) -> list[Sample]:
    """Synthetic samples with exactly `queries` expressions each (repeated where a scene has fewer)."""
    from mmseg_llm.data.synthetic import make_scene

    samples = []
    for index in range(images):
        sample = make_scene(level, seed=7, index=index).to_sample()
        texts = [sample.queries[i % len(sample.queries)] for i in range(queries)]
        samples.append(replace(sample, queries=tuple(replace(q, id=str(i)) for i, q in enumerate(texts))))
    return samples


def naive(model: PerceptionModel, samples: Sequence[Sample]) -> list[Prediction]:
    """One expression at a time: the image is encoded and prefilled again for each of them."""
    return [
        prediction
        for sample in samples
        for query in sample.queries
        for prediction in model.predict([replace(sample, queries=(query,))])
    ]


def shared(model: PerceptionModel, samples: Sequence[Sample], batch_size: int) -> list[Prediction]:
    """All expressions of an image behind its one prefix, `batch_size` images at once."""
    starts = range(0, len(samples), batch_size)
    return [prediction for start in starts for prediction in model.predict(samples[start : start + batch_size])]


def clock(function: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """Best of some runs in seconds, and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, result


@contextmanager
def timed_parts(model: PerceptionModel, totals: dict[str, float]) -> Iterator[None]:
    """Add the time spent in vision, language and head to `totals` while the context is open."""
    backbone, decoder = model.backbone, model.head().decoder  # type: ignore[union-attr]
    places = [
        (backbone, "encode_images", "vision"),
        (backbone, "prefill", "language: shared prefix"),
        (backbone, "generate", "language: branches"),
        (decoder, "encode_image", "head: image side"),
        (decoder, "decode", "head: expressions"),
    ]

    def wrap(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            totals[part] = totals.get(part, 0.0) + time.perf_counter() - start
            return result

        return timed

    for owner, name, part in places:
        setattr(owner, name, wrap(getattr(owner, name), part))
    try:
        yield
    finally:
        for owner, name, _ in places:
            delattr(owner, name)


def measure(model: PerceptionModel, samples: Sequence[Sample], batch_size: int = 8) -> dict[str, Any]:
    """All figures of the benchmark; see `run_bench`."""
    codec, head = model.backbone.codec, model.head()
    rng = np.random.default_rng(0)
    data, _ = clock(lambda: [head.build(sample, codec, rng) for sample in samples])
    naive(model, samples[:1])  # warm up
    slow, alone = clock(lambda: naive(model, samples))
    fast, together = clock(lambda: shared(model, samples, batch_size))
    one, single = clock(lambda: shared(model, samples, 1))
    totals: dict[str, float] = {}
    with timed_parts(model, totals):
        shared(model, samples, batch_size)

    def iou(other: Sequence[Prediction]) -> float:
        return min(a.mask.iou(b.mask) for a, b in zip(alone, other, strict=True) if a.mask and b.mask)

    count = len(samples)
    return {
        "milliseconds_per_image": {
            "data: canvas, tokens, targets": 1e3 * data / count,
            **{part: 1e3 * seconds / count for part, seconds in totals.items()},
            f"end to end, shared prefix, batch {batch_size}": 1e3 * fast / count,
            "end to end, shared prefix, batch 1": 1e3 * one / count,
            "end to end, one expression at a time": 1e3 * slow / count,
        },
        "speedup_shared_prefix": slow / fast,
        "speedup_shared_prefix_batch_1": slow / one,
        "lowest_iou_to_naive": min(iou(together), iou(single)),
        "masks_drawn": sum(prediction.exists for prediction in alone),
    }


def run_bench(
    checkpoint: Path | None, images: int, queries: int, level: str, output: Path | None, threads: int
) -> dict[str, Any]:
    """Measure, print a table and optionally write JSON; arguments as in `mmseg-llm bench`."""
    from rich.console import Console
    from rich.table import Table

    from mmseg_llm.inference.perceiver import Perceiver
    from mmseg_llm.training.callbacks import hardware

    if threads:
        torch.set_num_threads(threads)
    model = Perceiver.from_pretrained(checkpoint).model if checkpoint else untrained_model()
    report = measure(model, scenes(level, images, queries))
    report |= {"images": images, "queries_per_image": queries, "level": level, "hardware": hardware()}
    report["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    table = Table(title=f"{images} images x {queries} expressions, {report['hardware']}, {report['dtype']}")
    table.add_column("part")
    table.add_column("ms / image", justify="right")
    for part, value in report["milliseconds_per_image"].items():
        table.add_row(part, f"{value:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"shared prefix: {report['speedup_shared_prefix']:.1f}x (batch 1: {report['speedup_shared_prefix_batch_1']:.1f}x), "
        f"lowest mask IoU to one-at-a-time {report['lowest_iou_to_naive']:.6f}"
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report
