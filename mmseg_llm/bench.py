"""`mmseg-llm bench`: times the parts, and shared-prefix inference against the reference's flow, in one run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmseg_llm.bench_flows import one_at_a_time, scenes, stamp_flow, untrained_model
from mmseg_llm.structures import Prediction, Sample

if TYPE_CHECKING:
    from mmseg_llm.model import PerceptionModel


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
    backbone, head = model.backbone, model.head()
    candidates: list[tuple[Any, str, str]] = [
        (backbone, "encode_images", "vision"),
        (backbone, "prefill", "language: shared prefix"),
        (backbone, "generate", "language: branches"),
        (head, "cell_logits", "language and head: mask pass"),
        (getattr(head, "decoder", None), "encode_image", "head: image side"),
        (getattr(head, "decoder", None), "decode", "head: expressions"),
    ]
    places = [(owner, name, part) for owner, name, part in candidates if hasattr(owner, name)]

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


def lowest_iou(first: Sequence[Prediction], *others: Sequence[Prediction]) -> float:
    """The lowest IoU of any mask to its counterparts."""
    return min(
        (a.mask.iou(b.mask) for other in others for a, b in zip(first, other, strict=True) if a.mask and b.mask),
        default=1.0,
    )


def measure(model: PerceptionModel, samples: Sequence[Sample], batch_size: int = 8) -> dict[str, Any]:
    """All figures of the benchmark; see `run_bench`."""
    codec, head = model.backbone.codec, model.head()
    rng = np.random.default_rng(0)
    data, _ = clock(lambda: [head.build(sample, codec, rng) for sample in samples])
    flows: dict[str, Callable[..., Any]] = {"one expression at a time": one_at_a_time}
    if hasattr(head, "cell_logits"):
        flows["STAMP's published flow (vision call and cached pass per mask)"] = partial(stamp_flow, is_cached=True)
        flows["STAMP without cache (vision call and whole pass per mask)"] = partial(stamp_flow, is_cached=False)
    one_at_a_time(model, samples[:1])  # warm up
    slow = {name: clock(lambda flow=flow: flow(model, samples)) for name, flow in flows.items()}  # type: ignore[misc]
    fast, together = clock(lambda: shared(model, samples, batch_size))
    one, single = clock(lambda: shared(model, samples, 1))
    totals: dict[str, float] = {}
    with timed_parts(model, totals):
        shared(model, samples, batch_size)
    count = len(samples)
    return {
        "milliseconds_per_image": {
            "data: canvas, tokens, targets": 1e3 * data / count,
            **{part: 1e3 * seconds / count for part, seconds in totals.items()},
            f"end to end, shared prefix, batch {batch_size}": 1e3 * fast / count,
            "end to end, shared prefix, batch 1": 1e3 * one / count,
            **{f"end to end, {name}": 1e3 * seconds / count for name, (seconds, _) in slow.items()},
        },
        "speedups": {
            name: {f"batch {batch_size}": seconds / fast, "batch 1": seconds / one}
            for name, (seconds, _) in slow.items()
        },
        "lowest_iou": lowest_iou(together, single, *(result for _, result in slow.values())),
        "masks_drawn": sum(prediction.mask is not None and prediction.mask.area > 0 for prediction in together),
    }


def run_bench(
    checkpoint: Path | None,
    images: int,
    queries: int,
    level: str | None,
    output: Path | None,
    threads: int,
    backbone: str = "internvl-tiny",
    head: str = "mask_decoder",
) -> dict[str, Any]:
    """Measure, print a table and optionally write JSON; arguments as in `mmseg-llm bench`.

    Raises:
        ValueError: without images or queries, or for an unknown model.
    """
    from mmseg_llm.inference.perceiver import Perceiver
    from mmseg_llm.training.callbacks import hardware

    for name, count in (("images", images), ("queries", queries)):
        if count < 1:
            raise ValueError(f"{name} is {count}; measure at least one")
    if threads:
        torch.set_num_threads(threads)
    model = Perceiver.from_pretrained(checkpoint).model if checkpoint else untrained_model(backbone, head)
    is_clicking = hasattr(model.head(), "click_environment")
    is_depth = model.head().metric("generate", False) == "depth"
    level = level or ("solid-128" if is_depth else "flat-96")
    if is_depth:
        from mmseg_llm import bench_depth

        report = bench_depth.measure(model, level)
    elif is_clicking:
        from mmseg_llm import bench_clicks

        report = bench_clicks.measure(model, scenes(level, images, queries))
    else:
        report = measure(model, scenes(level, images, queries))
    counts = {} if is_depth else {"images": images, "queries_per_image": queries}
    report |= {**counts, "level": level, "hardware": hardware()}
    report["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    title = f"{report['hardware']}, {report['dtype']}"
    if is_depth:
        bench_depth.print_report(report, f"{model.head().name}: {report['points']} points of an image, {title}")
    elif is_clicking:
        bench_clicks.print_report(report, f"{model.head().name}: {images} images, {title}")
    else:
        _print(model, report)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def _print(model: PerceptionModel, report: dict[str, Any]) -> None:
    """The times as a table, and what they mean."""
    from rich.console import Console
    from rich.table import Table

    images, queries = report["images"], report["queries_per_image"]
    table = Table(
        title=f"{model.head().name}: {images} images x {queries} expressions, {report['hardware']}, {report['dtype']}"
    )
    table.add_column("part")
    table.add_column("ms / image", justify="right")
    for part, value in report["milliseconds_per_image"].items():
        table.add_row(part, f"{value:.2f}")
    console = Console()
    console.print(table)
    for name, ratios in report["speedups"].items():
        console.print(f"shared prefix against {name}: " + ", ".join(f"{r:.1f}x ({b})" for b, r in ratios.items()))
    console.print(
        f"{report['masks_drawn']} of {images * queries} masks are not empty; lowest IoU between all flows "
        f"{report['lowest_iou']:.6f}"
    )
