"""Dialogue turns of the all-mask head: what is asked, what is answered, and where masks hang off."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmseg_llm.backbones.codec import IGNORE_INDEX, Codec
from mmseg_llm.heads.all_mask.prompts import NO, SEG, fill, split_triggers
from mmseg_llm.masks import Mask
from mmseg_llm.structures import DenseBlock, Query, Sample, Suffix

if TYPE_CHECKING:
    from mmseg_llm.heads.all_mask.head import AllMaskHead


@dataclass(frozen=True)
class Turn:
    """One dialogue branch with its supervised answer.

    Attributes:
        ids: of question and answer.
        labels: aligned with `ids`.
        slots: places of the triggers and refusals in `ids`, one per entry of `masks`.
        query_ids: query of each slot.
        masks: label of each slot; None for a refusal, which has no mask.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    slots: tuple[int, ...]
    query_ids: tuple[int, ...]
    masks: tuple[Mask | None, ...]

    def suffix(self, block: DenseBlock, is_first: bool) -> Suffix:
        """The turn with a block of mask tokens behind each trigger; several slots at one place share a block.

        Args:
            block: the mask tokens.
            is_first: whether it lies right behind the image in its packed row; the first token of the others has no
                predecessor there that could predict it.
        """
        labels = self.labels if is_first else (IGNORE_INDEX, *self.labels[1:])
        with_mask = {slot: i for i, (slot, mask) in reversed(list(enumerate(zip(self.slots, self.masks)))) if mask}
        firsts = tuple(sorted(with_mask.values()))
        return Suffix(self.ids, labels, self.query_ids, self.slots, block if firsts else None, firsts)


def training_turns(
    head: AllMaskHead, sample: Sample, chosen: Sequence[int], codec: Codec, rng: np.random.Generator
) -> list[Turn]:
    """The branches that the chosen queries of a sample are trained with."""
    turns = [_conversation(head, sample, i, codec) for i in chosen if sample.queries[i].answer is not None]
    plain = [i for i in chosen if sample.queries[i].answer is None]
    size = max(1, head.num_classes - 1)
    groups = [plain[start : start + size] for start in range(0, len(plain), size)]
    return turns + [_segmentation(head, sample, group, codec, rng) for group in groups]


def question_of(head: AllMaskHead, queries: Sequence[Query], rng: np.random.Generator | None) -> str:
    """The question about one expression, or about a numbered list of them; the first template when there is no `rng`."""
    templates = head.prompts.questions
    template = templates[0 if rng is None else int(rng.integers(len(templates)))]
    return fill(template, listing(head, queries))


def listing(head: AllMaskHead, queries: Sequence[Query]) -> str:
    """One expression verbatim, or "1: first, 2: second": the numbers are the classes of the cells."""
    names = [expression(query) for query in queries]
    return names[0] if head.num_classes == 1 else ", ".join(f"{i}: {name}" for i, name in enumerate(names, 1))


def expression(query: Query) -> str:
    """The text of a query without blanks around it.

    Raises:
        ValueError: if nothing is left.
    """
    text = query.text.strip()
    if not text.strip("."):
        raise ValueError(f"the query {query.text!r} is empty; give an expression such as 'the red cube'")
    return text


def template_draw(head: AllMaskHead, sample: Sample, query: Query) -> np.random.Generator:
    """The seeded draw of the `official` protocol for one expression, whatever is asked beside it."""
    return np.random.default_rng([head.seed, zlib.crc32(f"{sample.id}\n{query.id}\n{query.text}".encode())])


def opening(query: Query, codec: Codec) -> tuple[int, ...]:
    """Ids from behind the image to the start of the answer of a conversation, its earlier turns included."""
    ids: tuple[int, ...] = ()
    for i, (question, answer) in enumerate(query.history):
        ids += codec.question(question, is_first=i == 0) + codec.answer(*split_triggers(answer))[0]
    return ids + codec.question(query.text, is_first=not query.history)


def _turn(
    head: AllMaskHead,
    codec: Codec,
    start: tuple[int, ...],
    answer: Sequence[str],
    query_ids: Sequence[int],
    masks: Sequence[Mask | None],
) -> Turn:
    ids, labels = codec.answer(*answer)
    slots = [len(start) + place for place, part in enumerate(ids) if part in (head.seg_id, head.no_id)]
    if len(slots) == 1:
        slots *= len(masks)
    everything = head.label_mode == "official_all_tokens"
    return Turn(
        ids=start + ids,
        labels=start + ids if everything else (IGNORE_INDEX,) * len(start) + labels,
        slots=tuple(slots),
        query_ids=tuple(query_ids),
        masks=tuple(masks),
    )


def _segmentation(
    head: AllMaskHead, sample: Sample, group: Sequence[int], codec: Codec, rng: np.random.Generator
) -> Turn:
    """One turn about the expressions of a group, answered by one mask (of all their classes)."""
    queries = [sample.queries[i] for i in group]
    start = codec.question(question_of(head, queries, rng))
    name = listing(head, queries)
    if head.no_target == "answer" and head.num_classes == 1 and queries[0].is_no_target:
        return _turn(head, codec, start, [f"{fill(head.prompts.absent, name)} ", NO], group, [None])
    templates = head.prompts.answers
    text = fill(templates[int(rng.integers(len(templates)))], name)
    masks = [query.target(sample.size) for query in queries]
    return _turn(head, codec, start, [f"{text} " if text else "", SEG], group, masks)


def _conversation(head: AllMaskHead, sample: Sample, index: int, codec: Codec) -> Turn:
    """A free-form turn: its triggers, in order, are the masks of its query."""
    query = sample.queries[index]
    assert query.answer is not None
    pieces = split_triggers(query.answer)
    masks = query.masks or ()
    count = sum(piece == SEG for piece in pieces)
    if count != len(masks):
        raise ValueError(
            f"the answer to query {query.id} of sample {sample.id} holds {count} times {SEG} but {len(masks)} masks are given; "
            "write one trigger per mask, in their order"
        )
    return _turn(head, codec, opening(query, codec), pieces, [index] * count, masks)
