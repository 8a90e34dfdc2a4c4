"""From questions to measurements: which pictures are looked at together, and what the answers say.

With text coordinates all questions about a picture share it; with arrows every question has a picture of its own, and only as
many are drawn as are looked at together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmseg_llm.cameras import Camera
from mmseg_llm.heads.depth_text.asking import Asked, Said, ask
from mmseg_llm.heads.depth_text.grammar import NumberGrammar
from mmseg_llm.heads.depth_text.references import Referred
from mmseg_llm.numbers_in_text import Reading, read_quantity
from mmseg_llm.questions import QUESTIONS
from mmseg_llm.structures import Canvas, Measurement, Prediction, Query, Sample

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.backbones.codec import Codec
    from mmseg_llm.heads.depth_text.head import DepthTextHead
    from mmseg_llm.heads.depth_text.views import View


CLOSING = "</answer>"


@dataclass(frozen=True)
class Job:
    """A question about a sample, seen through a view; or why the sample cannot be seen."""

    sample: Sample
    index: int
    camera: Camera
    view: View | str
    grammar: NumberGrammar

    @property
    def query(self) -> Query:
        """The question."""
        return self.sample.queries[self.index]

    @property
    def points(self) -> np.ndarray:
        """Original pixels float64 `(P, 2)`."""
        return np.array([(point.x, point.y) for point in self.query.points], np.float64).reshape(-1, 2)


@dataclass(frozen=True)
class _Ready:
    """A job with its words and its picture; `asked` is None where it cannot be asked."""

    job: Job
    referred: Referred
    asked: Asked | None = None
    canvas: Canvas | None = None


def answer_jobs(head: DepthTextHead, backbone: Backbone, jobs: Iterable[Job], *, is_forced: bool) -> list[Prediction]:
    """Answers in the order of the jobs."""
    predictions: list[Prediction] = []
    ready = (_prepare(head, backbone.codec, job, is_forced) for job in jobs)
    for group in _groups(head, backbone.codec, ready):
        canvases: list[Canvas] = []
        questions: list[list[Asked]] = []
        places: dict[int, int] = {}  # of pictures by identity: questions that share one stand together
        for item in group:
            if item.asked is None or item.canvas is None:
                continue
            key = id(item.canvas)
            if key not in places:
                places[key] = len(canvases)
                canvases.append(item.canvas)
                questions.append([])
            questions[places[key]].append(item.asked)
        most = max((item.job.grammar.longest for item in group), default=1) if is_forced else head.max_new_tokens
        said = ask(backbone, canvases, questions, max_new_tokens=most, max_cached=head.max_cached)
        answers = {key: iter(said[place]) for key, place in places.items()}
        for item in group:
            answer = None if item.asked is None else next(answers[id(item.canvas)])
            predictions.append(_finish(head, backbone.codec, item, answer, is_forced))
    return predictions


def _prepare(head: DepthTextHead, codec: Codec, job: Job, is_forced: bool) -> _Ready:
    """Words and picture of a question."""
    query, view = job.query, job.view
    if isinstance(view, str):
        return _Ready(job, Referred(reason=view))
    height, width = job.sample.size
    points = job.points
    is_inside = (points >= -0.5) & (points < np.array([width, height]) - 0.5)
    if not is_inside.all():  # nan, too, lies nowhere
        return _Ready(job, Referred(reason="outside_image"))
    if view.camera.distortion and not view.shows(view.locate(points)).all():
        return _Ready(job, Referred(reason="cut_away"))
    referred = head.reference.refer(view, points, head.prompts) if len(points) else Referred()
    if referred.reason:
        return _Ready(job, referred)
    ids = head.question(query, referred, codec) + codec.encode(codec.template.before_answer)
    if is_forced:
        ids += codec.encode(head.prompts.pieces(query.task)[0][0])
    canvas = view.shared(codec.geometry) if referred.image is None else view.finish(codec.geometry, referred.image)
    return _Ready(job, referred, Asked(ids, job.grammar if is_forced else None), canvas)


def _groups(head: DepthTextHead, codec: Codec, ready: Iterable[_Ready]) -> Iterator[list[_Ready]]:
    """Questions whose pictures fit into memory together."""
    group: list[_Ready] = []
    used, latest = 0, None
    for item in ready:
        if item.canvas is not None and item.asked is not None and item.canvas is not latest:
            size = codec.geometry.num_tokens(item.canvas.size) + len(item.asked.ids) + head.max_new_tokens
            if group and used + size > head.max_cached:
                yield group
                group, used = [], 0
            latest, used = item.canvas, used + size
        group.append(item)
    if group:
        yield group


def _finish(head: DepthTextHead, codec: Codec, item: _Ready, said: Said | None, is_forced: bool) -> Prediction:
    """An answer as a prediction."""
    job, referred = item.job, item.referred
    query = job.query
    kind = QUESTIONS[query.task]
    text, reading = "", Reading(None, referred.reason)
    if said is not None:
        text = _text(head, codec, job, said) if is_forced else codec.decode(said.ids)
        reading = read_quantity(text, kind.unit)  # type: ignore[arg-type]
        if not said.is_whole and (reading.value is None or CLOSING not in text):  # more digits might have followed
            reading = Reading(None, "truncated")
    points = job.points if referred.moved is None else referred.moved
    ratio = 1.0 if isinstance(job.view, str) else job.view.ratio
    measurement = Measurement(
        value=None if reading.value is None else reading.value * ratio,
        reason=reading.reason,
        points=tuple((float(x), float(y)) for x, y in points),
        task=query.task,
        unit=kind.unit,
        distance=head.distance if query.task == "depth" else "unspecified",
        camera=job.camera,
        is_snapped=referred.moved is not None,
        scale=ratio,
    )
    return Prediction(
        query=query.text,
        size=(int(job.sample.size[0]), int(job.sample.size[1])),
        query_id=query.id or str(job.index),
        sample_id=job.sample.id,
        text=text,
        score=0.0 if said is None else said.chance,
        exists=reading.value is not None,
        measurement=measurement,
        image=job.sample.image,
    )


def _text(head: DepthTextHead, codec: Codec, job: Job, said: Said) -> str:
    """The whole answer that the numbers of a forced one stand for."""
    numbers = [
        "".join(codec.tokenizer.convert_ids_to_tokens(list(said.ids[start:stop])))
        for start, stop in job.grammar.numbers(said.ids)
    ]
    return "".join(head.prompts.answer(job.query.task, numbers))
