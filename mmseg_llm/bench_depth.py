"""The benchmark of depth as text: a dense map behind one shared prefix against a full pass per point, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.bench import clock
from mmseg_llm.data.synthetic import make_scene
from mmseg_llm.structures import DepthPoint, Prediction, Query, Sample

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.model import PerceptionModel

GRID = (48, 64)


@dataclass
class Usage:
    """What went through a backbone: tokens of the language model (padding included), and images of the vision tower."""

    tokens: int = 0
    images: int = 0


@contextmanager
def counted(backbone: Backbone) -> Iterator[Usage]:
    """Count while the context is open."""
    usage = Usage()
    encode = backbone.encode_images

    def count_tokens(module: Any, args: Any, kwargs: Any) -> None:
        usage.tokens += kwargs["inputs_embeds"].shape[:2].numel()

    def count_images(pixels: Any, *args: Any, **kwargs: Any) -> Any:
        usage.images += len(pixels)
        return encode(pixels, *args, **kwargs)

    hook = backbone.language_model.register_forward_pre_hook(count_tokens, with_kwargs=True)
    backbone.encode_images = count_images  # type: ignore[method-assign]
    try:
        yield usage
    finally:
        hook.remove()
        del backbone.encode_images  # type: ignore[method-assign]


def grid_sample(level: str, grid: tuple[int, int] = GRID) -> Sample:
    """A rendered scene with a depth question in the middle of every cell of a grid of rows and columns."""
    scene = make_scene(level, 0, 0, "bench").to_sample()
    (height, width), (rows, columns) = scene.size, grid
    x = (np.arange(columns) + 0.5) * width / columns - 0.5
    y = (np.arange(rows) + 0.5) * height / rows - 0.5
    queries = tuple(
        Query("", points=(DepthPoint(float(x[i % columns]), float(y[i // columns])),), task="depth", id=str(i))
        for i in range(rows * columns)
    )
    return replace(scene, queries=queries)


def measure(model: PerceptionModel, level: str, grid: tuple[int, int] = GRID) -> dict[str, Any]:
    """Seconds, tokens and answers of each way to fill a grid; see `mmseg-llm bench`.

    Raises:
        ValueError: for a level without depth.
    """
    sample = grid_sample(level, grid)
    if sample.camera is None:
        raise ValueError(f"level '{level}' has no depth; give one of solid scenes, such as solid-128")
    singles = [replace(sample, queries=(query,)) for query in sample.queries]

    def one_by_one(protocol: str) -> list[Prediction]:
        return [prediction for single in singles for prediction in model.predict([single], protocol=protocol)]

    flows: dict[str, Callable[[], list[Prediction]]] = {
        "all points behind one picture": lambda: model.predict([sample]),
        "a full pass per point": lambda: one_by_one("generate"),
        "a full pass per point, whole answers decoded": lambda: one_by_one("official"),
    }
    model.predict([replace(sample, queries=sample.queries[:8])])  # warm up
    report: dict[str, Any] = {"grid": list(grid), "flows": {}}
    answers: list[list[Prediction]] = []
    for number, (name, flow) in enumerate(flows.items()):
        seconds, found = clock(flow, repeats=1 if number else 3)
        with counted(model.backbone) as usage:
            if number:
                _count_some(model, singles, "official" if number == 2 else "generate")
            else:
                flow()
        share = 1 if not number else len(singles) / min(len(singles), SOME)
        report["flows"][name] = {
            "seconds": seconds,
            "language_tokens": round(usage.tokens * share),
            "images": round(usage.images * share),
        }
        answers.append(found)
    first = report["flows"]["all points behind one picture"]["seconds"]
    for entry in report["flows"].values():
        entry["ratio"] = entry["seconds"] / first
    shared, single = answers[0], answers[1]
    report["equal_answers"] = sum(a.depth == b.depth for a, b in zip(shared, single, strict=True))
    report["largest_difference_metres"] = max(
        (abs(a.depth - b.depth) for a, b in zip(shared, single, strict=True) if a.depth and b.depth), default=0.0
    )
    report["points"] = len(shared)
    return report


SOME = 16
"""Points whose tokens are counted where every point costs the same pass."""


def _count_some(model: PerceptionModel, singles: list[Sample], protocol: str) -> None:
    for single in singles[:SOME]:
        model.predict([single], protocol=protocol)


def print_report(report: dict[str, Any], title: str) -> None:
    """The flows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("flow", "seconds", "language tokens", "images encoded", "time ratio"):
        table.add_column(column, justify="left" if column == "flow" else "right")
    for name, entry in report["flows"].items():
        table.add_row(
            name,
            f"{entry['seconds']:.2f}",
            f"{entry['language_tokens']:,}",
            f"{entry['images']:,}",
            f"{entry['ratio']:.1f}x",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{report['equal_answers']} of {report['points']} answers are the same together and one by one; largest difference "
        f"{report['largest_difference_metres']:.2f} m"
    )
