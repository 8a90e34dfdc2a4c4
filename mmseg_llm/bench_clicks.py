"""The benchmark of click policies: what further candidates cost behind a shared prefix, and what the grammar saves.

Legend: K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.bench import clock
from mmseg_llm.heads.click_policy.asking import View, ask, show
from mmseg_llm.heads.click_policy.search import Search

if TYPE_CHECKING:
    from mmseg_llm.heads.click_policy.head import ClickPolicyHead
    from mmseg_llm.model import PerceptionModel
    from mmseg_llm.segmenters.environment import Environment
    from mmseg_llm.structures import Sample

CANDIDATES = 3
BATCHES = (1, 8)


class TimedEnvironment:
    """Passes everything on and adds up the seconds spent in the segmenter."""

    def __init__(self, environment: Environment) -> None:
        self.environment, self.seconds, self.clicks = environment, 0.0, 0

    def begin(self, *args: Any) -> Any:
        """See `Environment.begin`."""
        seconds, result = clock(lambda: self.environment.begin(*args), repeats=1)
        self.seconds += seconds
        return result

    def advance(self, states: Any, clicks: Any) -> Any:
        """See `Environment.advance`."""
        seconds, result = clock(lambda: self.environment.advance(states, clicks), repeats=1)
        self.seconds, self.clicks = self.seconds + seconds, self.clicks + len(clicks)
        return result


def measure(model: PerceptionModel, samples: Sequence[Sample]) -> dict[str, Any]:
    """Times in milliseconds and their ratios; see `mmseg-llm bench`."""
    head: Any = model.head()
    samples = [replace(sample, queries=sample.queries[:1]) for sample in samples]  # one picture, one question
    report: dict[str, Any] = {"milliseconds_per_answer": {}, "milliseconds_per_episode": {}, "ratios": {}}
    for batch in BATCHES:
        _time_answers(model, head, samples, batch, report)
    settings, environment = head.search, head.click_environment()
    try:
        for batch in BATCHES:
            _time_searches(model, head, samples, batch, environment, report)
    finally:
        head.search, head.environment = settings, environment
    return report


def _time_answers(
    model: PerceptionModel, head: ClickPolicyHead, samples: Sequence[Sample], batch: int, report: dict[str, Any]
) -> None:
    """From a picture to K answers: behind one prefix, and as K separate prompts."""
    views = [View(s.load_image(), np.zeros(s.size, bool), s.queries[0].text) for s in samples]
    groups = [views[start : start + batch] for start in range(0, len(views), batch)]

    def shared(count: int, constrained: bool = True) -> None:
        for group in groups:
            shown = show(head, model.backbone, group)
            ask(head, model.backbone, shown, seeds=[[None, *range(1, count)]] * len(group), constrained=constrained)

    def separate(count: int) -> None:
        for group in groups:
            for seed in (None, *range(1, count)):
                ask(
                    head,
                    model.backbone,
                    show(head, model.backbone, group),
                    seeds=[[seed]] * len(group),
                    constrained=True,
                )

    shared(1)  # warm up
    one, more = clock(lambda: shared(1))[0], clock(lambda: shared(CANDIDATES))[0]
    apart, free = clock(lambda: separate(CANDIDATES))[0], clock(lambda: shared(1, constrained=False))[0]
    times = report["milliseconds_per_answer"]
    for name, seconds in (
        ("K=1", one),
        (f"K={CANDIDATES}, one prefix", more),
        (f"K={CANDIDATES}, {CANDIDATES} prompts", apart),
        ("K=1, without grammar", free),
    ):
        times[f"{name}, batch {batch}"] = 1e3 * seconds / len(samples)
    report["ratios"] |= {
        f"answers: K={CANDIDATES} to K=1, batch {batch}": more / one,
        f"answers: {CANDIDATES} prompts to one prefix, batch {batch}": apart / more,
        f"answers: without grammar to with it, batch {batch}": free / one,
    }


def _time_searches(
    model: PerceptionModel,
    head: Any,
    samples: Sequence[Sample],
    batch: int,
    environment: Environment,
    report: dict[str, Any],
) -> None:
    """Whole searches of `max_clicks` steps, scoring of every candidate included, with and without the segmenter's time."""
    seconds: dict[int, tuple[float, float]] = {}
    for count in (1, CANDIDATES):
        head.search = Search(candidates=count, patience=None)
        best = (float("inf"), 0.0)
        for _ in range(2):
            head.environment = timed = TimedEnvironment(environment)
            total = clock(
                lambda: [
                    model.predict(samples[start : start + batch], protocol="search")
                    for start in range(0, len(samples), batch)
                ],
                repeats=1,
            )[0]
            best = min(best, (total, timed.seconds))
        seconds[count] = best
        name = f"search, K={count}, batch {batch}"
        report["milliseconds_per_episode"] |= {
            name: 1e3 * best[0] / len(samples),
            f"{name}: of it the segmenter": 1e3 * best[1] / len(samples),
        }
    (one, inside_one), (more, inside_more) = seconds[1], seconds[CANDIDATES]
    report["ratios"] |= {
        f"search: K={CANDIDATES} to K=1, batch {batch}": more / one,
        f"search: K={CANDIDATES} to K=1 without the segmenter, batch {batch}": (more - inside_more)
        / (one - inside_one),
    }


def print_report(report: dict[str, Any], title: str) -> None:
    """The times as a table, then the ratios."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("part")
    table.add_column("ms", justify="right")
    for unit in ("milliseconds_per_answer", "milliseconds_per_episode"):
        for part, value in report[unit].items():
            table.add_row(f"{part} ({unit.removeprefix('milliseconds_')})".replace("_", " "), f"{value:.2f}")
    console = Console()
    console.print(table)
    for name, ratio in report["ratios"].items():
        console.print(f"{name}: {ratio:.2f}x")
