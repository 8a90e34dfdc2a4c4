"""Head `depth_text`: DepthLM (arXiv 2509.25413) and its follow-up with text coordinates (arXiv 2605.30561). Metric depth of a
pixel is a question whose answer is a number in words. No parameters.

Legend: N tokens, P points of a question, K questions of a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from mmseg_llm.backbones.codec import IGNORE_INDEX, Codec
from mmseg_llm.backbones.digits import digit_parts
from mmseg_llm.cameras import Distance, assume_camera
from mmseg_llm.heads.base import Head, NoExampleError, check_choices
from mmseg_llm.heads.depth_text.answering import Job, answer_jobs
from mmseg_llm.heads.depth_text.grammar import NumberGrammar, encode_parts
from mmseg_llm.heads.depth_text.marker import SIZE
from mmseg_llm.heads.depth_text.prompts import DepthPrompts
from mmseg_llm.heads.depth_text.references import MarkerReference, OnBorder, Referred, TextReference
from mmseg_llm.heads.depth_text.views import Augmentation, Geometry, Overflow, UnviewableError, View, make_view
from mmseg_llm.heads.losses import answer_loss
from mmseg_llm.questions import QUESTIONS
from mmseg_llm.structures import Batch, Example, Prediction, Query, Sample, Suffix

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone

SMALLEST = 0.005
"""Metres; less would be said as zero."""


class DepthTextHead(Head):
    """DepthLM's head.

    Args:
        reference: `text` coordinates, for which all questions about a picture share its computation, or a `marker` drawn on it.
        focal: unified focal length in pixels: 1000 with Qwen2.5-VL and Qwen3-VL, 750 in the released Pixtral weights.
        geometry: `clean`, or the `legacy` arithmetic that released weights know.
        overflow: where a backbone's bounds would shrink a unified picture: `error`, or `shrink` and read metres accordingly.
        prompts: wording.
        distance: what answers are measured along. Labels of another kind are converted for training, answers for scoring;
            `unspecified` takes both as they are, as the reference does.
        marker_size: of arrows.
        on_border: see `MarkerReference`.
        cells: steps of text coordinates per axis.
        augmentation: of training pictures; none when None.
        max_questions: about a picture in one training sequence, with text coordinates; arrows allow one.
        forced: start answers with the words that are certain and decode numbers only; otherwise decode freely.
        max_new_tokens: bound of an answer that is decoded freely.
        max_cached: tokens of pictures and questions that are held at once; bounds memory, changes nothing else.

    Raises:
        ValueError: for a value out of range.
    """

    protocols: ClassVar[tuple[str, ...]] = ("generate", "official")

    def __init__(
        self,
        *,
        reference: Literal["text", "marker"] = "text",
        focal: float = 1000.0,
        geometry: Geometry = "clean",
        overflow: Overflow = "error",
        prompts: DepthPrompts | None = None,
        distance: Distance = "ray",
        marker_size: int = SIZE,
        on_border: OnBorder = "snap",
        cells: int = 2000,
        augmentation: Augmentation | None = None,
        max_questions: int = 10,
        forced: bool = True,
        max_new_tokens: int = 96,
        max_cached: int = 32768,
    ) -> None:
        super().__init__()
        choices = {"reference": reference, "geometry": geometry, "overflow": overflow, "on_border": on_border}
        check_choices(DepthTextHead.__init__, **choices, distance=distance)
        counts = {"focal": focal, "marker_size": marker_size, "max_questions": max_questions}
        for name, value in (counts | {"max_new_tokens": max_new_tokens, "max_cached": max_cached}).items():
            if not value >= 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.focal, self.geometry, self.overflow, self.distance = focal, geometry, overflow, distance
        self.prompts, self.augmentation = prompts or DepthPrompts(), augmentation
        self.reference: MarkerReference | TextReference = (
            MarkerReference(marker_size, on_border) if reference == "marker" else TextReference(cells)
        )
        self.max_questions, self.forced = max_questions, forced
        self.max_new_tokens, self.max_cached = max_new_tokens, max_cached

    def bind(self, backbone: Backbone) -> None:
        """Check that numbers can be written and that the longest answer fits the bound on its tokens."""
        number = "9" * self.prompts.digits + "." + "9" * self.prompts.decimals
        answers = (self.prompts.answer(task, [number] * len(self.prompts.pieces(task)[0])) for task in QUESTIONS)
        longest = max(len(encode_parts(backbone.codec, answer)) for answer in answers) + 1
        if longest > self.max_new_tokens:
            raise ValueError(
                f"the longest answer takes {longest} tokens with this tokenizer; raise max_new_tokens from {self.max_new_tokens}"
            )

    def describe(self, protocol: str) -> dict[str, Any]:
        """What the scores depend on beside the weights."""
        return {
            "reference": str(self.reference),
            "unified_focal": f"{self.focal:g} px, geometry {self.geometry}, overflow {self.overflow}",
            "prompts": str(self.prompts),
            "distance": self.distance,
            "answers": "forced start" if self._is_forced(protocol) else f"free, {self.max_new_tokens} tokens at most",
        }

    def metric(self, protocol: str, has_no_target: bool) -> str:
        """The metric protocol: depth."""
        return "depth"

    def _is_forced(self, protocol: str) -> bool:
        return self.forced and protocol != "official"

    # ---- words --------------------------------------------------------------------------------------------------------

    def question(self, query: Query, referred: Referred, codec: Codec) -> tuple[int, ...]:
        """Token ids of a question up to the start of its answer.

        Raises:
            ValueError: if it says nothing where it has to.
        """
        kind = QUESTIONS[query.task]
        if kind.given and not query.text.strip():
            raise ValueError(f"a query '{query.task}' needs a {kind.given} as its text; it is empty")
        text = self.prompts.question(query.task, referred.words, query.text.strip(), self.reference.cells)
        return codec.question(*digit_parts(codec, text))

    def _check(self, query: Query) -> None:
        """Raise ValueError for a query that this head cannot answer."""
        if query.task not in QUESTIONS:
            raise ValueError(
                f"head '{self.name}' answers {', '.join(QUESTIONS)}; query '{query.id}' asks for '{query.task}'"
            )
        if len(query.points) != QUESTIONS[query.task].num_points:
            raise ValueError(
                f"a query '{query.task}' refers to {QUESTIONS[query.task].num_points} points; '{query.id}' has "
                f"{len(query.points)}"
            )

    # ---- data workers -------------------------------------------------------------------------------------------------

    def build(self, sample: Sample, codec: Codec, rng: np.random.Generator) -> Example:
        """Draw an augmentation and questions; with arrows there is one question, for another would need another picture.

        Raises:
            ValueError: without intrinsics.
            NoExampleError: if no question of the sample can be asked and answered, or its picture does not fit the backbone.
        """
        if sample.camera is None:
            raise ValueError(
                f"sample {sample.id} of {sample.source} has no intrinsics, without which metres cannot be learnt; add them to "
                "the dataset"
            )
        image = sample.load_image()
        change = None if self.augmentation is None else self.augmentation.draw(rng, sample.source)
        settings = (self.focal, codec.geometry, self.geometry, self.overflow)
        for attempt in (change, None):  # a crop that leaves no point is not made
            try:
                view = make_view(image, sample.camera, *settings, attempt)
            except UnviewableError as error:
                raise NoExampleError(f"sample {sample.id} of {sample.source}: {error}") from error
            usable = [index for index, query in enumerate(sample.queries) if self._is_usable(query, view)]
            if usable:
                break
        else:
            raise NoExampleError(
                f"no question of sample {sample.id} of {sample.source} can be asked and answered: points must lie in the "
                f"image, and labels between {SMALLEST} and {self.prompts.largest:g}"
            )
        count = 1 if isinstance(self.reference, MarkerReference) else min(self.max_questions, len(usable))
        drawn = sorted(rng.choice(usable, count, replace=False).tolist())
        referred = [self._refer(sample.queries[index], view) for index in drawn]
        canvas = view.finish(codec.geometry, referred[0].image)
        return Example(
            head=self.name,
            sample=sample,
            canvas=canvas,
            pixels=codec.pixels(canvas),
            prefix=codec.image_prefix(canvas.size),
            suffixes=tuple(
                self._suffix(sample.queries[index], index, words, view, codec)
                for index, words in zip(drawn, referred, strict=True)
            ),
            targets=(None,) * len(drawn),
        )

    def _is_usable(self, query: Query, view: View) -> bool:
        """Whether a question can be asked about a view, and its label said."""
        self._check(query)
        pixels = view.locate(_points(query))
        if len(pixels) and not (view.shows(pixels) & self.reference.can(view, pixels)).all():
            return False
        numbers = self._numbers(query, view)
        return all(SMALLEST <= number <= self.prompts.largest for number in numbers)

    def _refer(self, query: Query, view: View) -> Referred:
        return self.reference.refer(view, _points(query), self.prompts) if query.points else Referred()

    def _numbers(self, query: Query, view: View) -> list[float]:
        """What the answer says, in the order of its chain, as seen at the unified focal length; nan where unlabelled."""
        first = query.points[0].metres if query.points else None
        depth = float("nan")
        if first is not None:
            wanted = self.distance if query.task == "depth" else "ray"
            depth = float(view.camera.convert(first, _points(query)[0], view.camera.distance, wanted))
        value = depth if query.value is None and query.task == "depth" else query.value
        value = float("nan") if value is None else value
        numbers = [depth, value] if query.task in ("speed", "time") and self.prompts.thinking else [value]
        return [number / view.ratio for number in numbers]

    def _suffix(self, query: Query, index: int, referred: Referred, view: View, codec: Codec) -> Suffix:
        """A question and its answer, the answer supervised."""
        question = self.question(query, referred, codec)
        numbers = [self.prompts.write(number) for number in self._numbers(query, view)]
        answer = (*encode_parts(codec, self.prompts.answer(query.task, numbers)), codec.end_id)
        lead = codec.encode(codec.template.before_answer)
        tail = codec.encode(codec.template.after_answer)
        return Suffix(
            ids=(*question, *lead, *answer, *tail),
            labels=(IGNORE_INDEX,) * (len(question) + len(lead)) + answer + (IGNORE_INDEX,) * len(tail),
            query_ids=(index,),
            slots=(len(question) + len(lead),),
        )

    def loss(self, backbone: Backbone, batch: Batch) -> dict[str, torch.Tensor]:
        """Cross-entropy of the answers (specification E.1, E.2); `_token_accuracy` is logged only."""
        return answer_loss(backbone, batch)

    # ---- inference ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, backbone: Backbone, samples: Sequence[Sample], protocol: str = "generate") -> list[Prediction]:
        """A number per query, in the order of the queries; None with a reason (`quantities.REASONS`) where there is none.

        Protocols: `generate` decodes numbers only (`forced`); `official` decodes whole answers as the reference does. Samples
        without intrinsics get assumed ones, which the measurement says.

        Raises:
            ValueError: for queries of other heads.
        """
        self.check_protocol(protocol)
        return answer_jobs(
            self, backbone, self._jobs(backbone.codec, samples, protocol), is_forced=self._is_forced(protocol)
        )

    def _jobs(self, codec: Codec, samples: Sequence[Sample], protocol: str) -> Iterator[Job]:
        """All questions in order; pictures are drawn when they are asked about."""
        grammars: dict[str, NumberGrammar] = {}
        for sample in samples:
            camera = sample.camera or assume_camera(sample.size)
            settings = (self.focal, codec.geometry, self.geometry, self.overflow)
            view: View | str
            try:
                view = make_view(sample.load_image(), camera, *settings)
            except UnviewableError as error:
                view = error.reason
            for index, query in enumerate(sample.queries):
                self._check(query)
                if query.task not in grammars:
                    grammars[query.task] = NumberGrammar(codec, self.prompts.pieces(query.task)[0][1:], self.prompts)
                yield Job(sample, index, camera, view, grammars[query.task])


def _points(query: Query) -> np.ndarray:
    """Original pixels float64 `(P, 2)` of a query."""
    return np.array([(point.x, point.y) for point in query.points], np.float64).reshape(-1, 2)
