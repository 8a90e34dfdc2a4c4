"""Head `click_policy`: SegAgent (CVPR 2025, arXiv 2503.08625). The language model sees the mask so far as a colour on the image
and answers with an estimate of its IoU and the next click; an interactive segmenter turns clicks into masks. No parameters.

Legend: B images, N tokens, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from mmseg_llm.backbones.codec import IGNORE_INDEX, Codec
from mmseg_llm.backbones.digits import encode_digits
from mmseg_llm.clicks import Click
from mmseg_llm.geometry import stretch
from mmseg_llm.heads.base import Head, check_choices
from mmseg_llm.heads.click_policy.answers import AnswerGrammar
from mmseg_llm.heads.click_policy.asking import Reply, View, estimate
from mmseg_llm.heads.click_policy.codec import QWEN_MILLI, ClickCodec
from mmseg_llm.heads.click_policy.episodes import Ending, Episode, play
from mmseg_llm.heads.click_policy.overlay import Overlay
from mmseg_llm.heads.click_policy.prompts import ClickPrompts, qwen_question
from mmseg_llm.heads.click_policy.search import Search, search
from mmseg_llm.heads.click_policy.text import ParsedAction, Status, parse, parse_official, write
from mmseg_llm.heads.losses import answer_loss
from mmseg_llm.masks import Mask, Size
from mmseg_llm.segmenters.environment import Environment, describe_environment
from mmseg_llm.structures import Batch, Example, Prediction, Query, Sample, Suffix

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone

OnFailure = Literal["stop", "resample", "clamp", "abort"]
Selection = Literal["last", "reward", "best"]
DEFAULT_OVERLAY = Overlay()
DEFAULT_SEARCH = Search()


class ClickPolicyHead(Head):
    """SegAgent's head.

    Args:
        environment: the segmenter that is clicked on; needed to predict, not to train.
        prompts: question templates.
        prompt_style: `own` templates, or the wording of the released `qwen` weights.
        codec: of coordinates and IoUs in text; belongs to the weights.
        overlay: how the mask so far is shown.
        max_clicks: T of an episode.
        with_iou: answers start with the IoU of the mask so far, the process reward.
        constrained: decode under the grammar of answers; nothing unreadable can be said, and what is certain costs no step.
        on_failure: an answer without a usable click ends the episode (`stop`, as the released code does); is asked again
            with sampling (`resample`); is moved to the edge where it lies slightly outside, and ends it otherwise (`clamp`);
            or discards the mask of the episode (`abort`).
        resamples: answers drawn at once with `resample`.
        search: how much is tried with protocol `search`.
        max_queries: expressions of one mask that training packs behind its picture.
        max_new_tokens: bound of an answer.
        batch_size: pictures that are looked at together.
        seed: of what is drawn.

    Raises:
        ValueError: for a value out of range, or a search without estimates.
    """

    protocols: ClassVar[tuple[str, ...]] = ("generate", "reward_selected", "search", "oracle_best", "official")

    def __init__(
        self,
        *,
        environment: Environment | None = None,
        prompts: ClickPrompts | None = None,
        prompt_style: Literal["own", "qwen"] = "own",
        codec: ClickCodec = QWEN_MILLI,
        overlay: Overlay = DEFAULT_OVERLAY,
        max_clicks: int = 7,
        with_iou: bool = True,
        constrained: bool = True,
        on_failure: OnFailure = "stop",
        resamples: int = 3,
        search: Search = DEFAULT_SEARCH,
        max_queries: int = 4,
        max_new_tokens: int = 48,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choices(ClickPolicyHead.__init__, prompt_style=prompt_style, on_failure=on_failure)
        counts = {"max_clicks": max_clicks, "resamples": resamples, "max_queries": max_queries}
        for name, value in (counts | {"max_new_tokens": max_new_tokens, "batch_size": batch_size}).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if prompt_style == "qwen" and overlay.colour != "green":
            raise ValueError(f"the released wording calls the mask green; overlay.colour is {overlay.colour}")
        self.environment, self.prompts, self.prompt_style = environment, prompts or ClickPrompts(), prompt_style
        self.codec, self.overlay, self.search = codec, overlay, search
        self.max_clicks, self.with_iou, self.constrained = max_clicks, with_iou, constrained
        self.on_failure, self.resamples, self.seed = on_failure, resamples, seed
        self.max_queries, self.max_new_tokens, self.batch_size = max_queries, max_new_tokens, batch_size
        self._grammar: AnswerGrammar | None = None

    def bind(self, backbone: Backbone) -> None:
        """Check that the longest answer fits the bound on its tokens."""
        size = (10_000, 10_000)
        text = write(Click(9_999, 9_999, True), size, self.codec, iou=1.0 if self.with_iou else None)
        needed = len(encode_digits(backbone.codec, text)) + 1
        if needed > self.max_new_tokens:
            raise ValueError(
                f"an answer such as '{text}' takes {needed} tokens; raise max_new_tokens from {self.max_new_tokens}"
            )
        if self.constrained:
            self.grammar(backbone.codec)

    def for_workers(self) -> ClickPolicyHead:
        """Data workers need neither the segmenter, whose weights may be large, nor the grammar."""
        light = copy(self)
        light.environment, light._grammar = None, None
        return light

    def describe(self, protocol: str) -> dict[str, Any]:
        """What the scores of a policy depend on beside its weights."""
        facts: dict[str, Any] = {
            "environment": describe_environment(self.environment),
            "max_clicks": self.max_clicks,
            "answers": f"constrained={self.constrained and protocol != 'official'}, on_failure={self.on_failure}",
            "codec": str(self.codec),
            "overlay": str(self.overlay),
        }
        if protocol == "search":
            facts["search"] = f"{self.search}, seed={self.seed}"
        return facts

    # ---- words --------------------------------------------------------------------------------------------------------

    def grammar(self, codec: Codec) -> AnswerGrammar:
        """Of the answers, made once."""
        if self._grammar is None:
            self._grammar = AnswerGrammar(codec, self.codec, self.with_iou)
        return self._grammar

    def question(self, expression: str, codec: Codec, index: int = 0) -> tuple[int, ...]:
        """Token ids of the question about one object, up to the start of its answer.

        Raises:
            ValueError: for an empty expression.
        """
        if not expression.strip(" ."):
            raise ValueError(f"the query {expression!r} is empty; give an expression such as 'the red cube'")
        if self.prompt_style == "qwen":
            return codec.question(*qwen_question(expression))
        return codec.question(self.prompts.question(expression, self.codec, self.overlay.colour, index, self.with_iou))

    def read(self, text: str, size: Size) -> ParsedAction:
        """An answer about an image of `(H, W)`; never raises."""
        return parse(text, size, self.codec)

    def read_official(self, reply: Reply, size: Size) -> Reply:
        """An answer as the released code reads it, its click brought into the image."""
        found = parse_official(reply.text)
        iou = reply.action.iou
        if found.point is None:
            kind = reply.action.status if reply.action.click is None else Status.MALFORMED
            return replace(reply, action=ParsedAction(kind, None, iou))
        row, col = self.codec.decode((float(found.point[0]), float(found.point[1])), size)
        return replace(reply, action=ParsedAction(Status.OK, Click(row, col, bool(found.is_positive)), iou))

    # ---- data workers -------------------------------------------------------------------------------------------------

    def build(self, sample: Sample, codec: Codec, rng: np.random.Generator) -> Example:
        """Draw expressions and templates; render the mask so far and the answers.

        Raises:
            ValueError: if no query of the sample says what the next click is, or they start from different masks.
        """
        labelled = [i for i, query in enumerate(sample.queries) if query.next_click is not None]
        if not labelled:
            raise ValueError(
                f"sample {sample.id} of {sample.source} has no query with a next click; make trajectories with mmseg-llm data "
                "trajectories and read them with mmseg_llm.data.TrajectoryDataset"
            )
        if len({query.start for query in map(sample.queries.__getitem__, labelled)}) > 1:
            raise ValueError(
                f"the queries of sample {sample.id} start from different masks; make one sample of each mask"
            )
        if len(labelled) > self.max_queries:
            labelled = sorted(rng.choice(labelled, self.max_queries, replace=False).tolist())
        image, start = sample.load_image(), sample.queries[labelled[0]].start
        if start is not None:
            image = self.overlay(image, replace(start).array)
        canvas = stretch(image, codec.geometry.canvas_size(sample.size))
        return Example(
            head=self.name,
            sample=sample,
            canvas=canvas,
            pixels=codec.pixels(canvas),
            prefix=codec.image_prefix(canvas.size),
            suffixes=tuple(self._suffix(sample.queries[i], i, sample.size, codec, rng) for i in labelled),
            targets=(None,) * len(labelled),
        )

    def _suffix(self, query: Query, index: int, size: Size, codec: Codec, rng: np.random.Generator) -> Suffix:
        """A question and its answer, the answer supervised."""
        label = query.next_click
        assert label is not None
        template = int(rng.integers(len(self.prompts.questions)))
        question = self.question(query.text.strip(), codec, template)
        text = write(
            *(label.click, size, self.codec), iou=label.iou if self.with_iou else None, is_finished=label.is_finished
        )
        answer = encode_digits(codec, text)
        if label.click is None and not label.is_finished:  # that an answer ends behind the estimate is not to be learnt
            return Suffix((*question, *answer), (IGNORE_INDEX,) * len(question) + answer, (index,), (len(question),))
        answer = (*answer, codec.end_id)
        tail = codec.encode(codec.template.after_answer)
        return Suffix(
            ids=(*question, *answer, *tail),
            labels=(IGNORE_INDEX,) * len(question) + answer + (IGNORE_INDEX,) * len(tail),
            query_ids=(index,),
            slots=(len(question),),
        )

    def loss(self, backbone: Backbone, batch: Batch) -> dict[str, torch.Tensor]:
        """Cross-entropy of the answers; `_token_accuracy` is logged only."""
        return answer_loss(backbone, batch)

    # ---- inference ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, backbone: Backbone, samples: Sequence[Sample], protocol: str = "generate") -> list[Prediction]:
        """Masks of all queries, each from its `start` mask or an empty one, with the whole episode as `trajectory`.

        Protocols: `generate` clicks greedily and gives the last mask; `reward_selected` the mask with the best estimate on the
        way; `search` tries several clicks at each step (`search`) and gives the mask with the best estimate; `oracle_best` the
        mask that fits the label best, an upper bound; `official` reads answers as the released loop does and gives the last mask
        (the released post-hoc choice of another mask is `text.select_official`, for scores of its own result files).

        Raises:
            ValueError: without an environment, for `oracle_best` without labels, or for estimates where there are none.
        """
        self.check_protocol(protocol)
        environment = self.click_environment()
        if protocol in {"reward_selected", "search"} and not self.with_iou:
            raise ValueError(f"protocol '{protocol}' needs a policy that estimates the IoU; with_iou is false")
        if protocol == "search":
            episodes = search(self, backbone, environment, samples)
        else:
            episodes = play(
                *(self, backbone, environment, samples),
                rate_last=self.with_iou and protocol != "official",
                is_official=protocol == "official",
            )
        kinds: dict[str, Selection] = {"generate": "last", "official": "last", "oracle_best": "best"}
        return [self._finish(samples[episode.row], episode, kinds.get(protocol, "reward")) for episode in episodes]

    @torch.no_grad()
    def rate(self, backbone: Backbone, samples: Sequence[Sample]) -> list[float | None]:
        """What the policy takes the IoU of the `start` mask of each query for; None where it does not say.

        Raises:
            ValueError: for a policy without estimates.
        """
        if not self.with_iou:
            raise ValueError(
                "this policy was trained without estimates of the IoU (with_iou is false); it cannot rate masks"
            )
        views = []
        for sample in samples:
            image = sample.load_image()
            for query in sample.queries:
                mask = np.zeros(sample.size, bool) if query.start is None else replace(query.start).array
                views.append(View(image, mask, query.text.strip()))
        return [reply.action.iou for reply in estimate(self, backbone, views)]

    def click_environment(self) -> Environment:
        """The segmenter that is clicked on.

        Raises:
            ValueError: if there is none.
        """
        if self.environment is None:
            raise ValueError(
                f"head '{self.name}' has nothing to click on; set model.heads.{self.name}.init_args.environment, or pass "
                "--environment configs/environments/grabcut.yaml"
            )
        return self.environment

    def _finish(self, sample: Sample, episode: Episode, selection: Selection) -> Prediction:
        """The chosen mask of an episode."""
        steps = episode.steps
        chosen = steps[-1]
        if selection == "reward":
            chosen = max(steps, key=lambda step: -1.0 if step.estimate is None else step.estimate)
        elif selection == "best":
            query = sample.queries[episode.query_id]
            target, ignored = query.target(sample.size), query.ignore
            chosen = max(steps, key=lambda step: step.mask.iou(target, ignored))
        is_lost = episode.ending == Ending.ABORTED
        mask = Mask.empty(sample.size) if is_lost else chosen.mask
        return Prediction.answering(
            *(sample, episode.query_id, mask),
            text=chosen.text,
            score=float(chosen.estimate or 0.0) if self.with_iou else float(mask.area > 0),
            exists=mask.area > 0,
            trajectory=tuple(steps),
            stop=str(episode.ending),
        )
