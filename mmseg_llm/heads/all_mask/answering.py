"""Predicting with the all-mask head: images in, one prediction per query out, everything batched.

Legend: B images, K masks, C classes, h w cells, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from mmseg_llm.geometry import covers, frame
from mmseg_llm.heads.all_mask import dialogue
from mmseg_llm.heads.all_mask.grid import upsample
from mmseg_llm.heads.all_mask.passes import Trigger
from mmseg_llm.heads.all_mask.prompts import SEG, fill
from mmseg_llm.masks import Mask
from mmseg_llm.structures import Canvas, Prediction, Sample

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.backbones.prefix import Prefix
    from mmseg_llm.heads.all_mask.head import AllMaskHead


@dataclass
class Said:
    """What the language model answered to some queries of an image.

    Attributes:
        row: image.
        query_ids: queries the answer is about, one unless classes are shared.
        text: of the answer.
        triggers: places its masks hang off.
        refused: whether it said that nothing fits.
        confidence: of having said the trigger rather than the refusal.
    """

    row: int
    query_ids: list[int]
    text: str = ""
    triggers: list[Trigger] = field(default_factory=list)
    refused: bool = False
    confidence: float = 1.0


def answer_samples(head: AllMaskHead, backbone: Backbone, samples: Sequence[Sample], protocol: str) -> list[Prediction]:
    """See `AllMaskHead.predict`."""
    asked = [sample for sample in samples if sample.queries]
    if not asked:
        return []
    prefix, canvases = open_images(head, backbone, asked)
    dense = head.dense_features(prefix.features)
    found: dict[tuple[int, int], Prediction] = {}
    upsampling: Literal["bilinear", "nearest"] = "nearest" if protocol == "official" else head.upsampling
    for is_chat in (False, True):
        groups = [_groups(head, sample, is_chat) for sample in asked]
        if not any(groups):
            continue
        mark = prefix.mark()
        if protocol == "force_segment" and not is_chat:
            said = _force(head, backbone, prefix, asked, groups)
        else:
            said = _generate(head, backbone, prefix, asked, groups, is_chat, protocol)
        logits = iter(head.cell_logits(backbone, prefix, [t for item in said for t in item.triggers], dense))
        for item in said:
            masks = [next(logits) for _ in item.triggers]
            sample = asked[item.row]
            for query_id, prediction in finish(head, sample, canvases[item.row], item, masks, upsampling):
                found[item.row, query_id] = prediction
        prefix.rollback(mark)
    return [found[row, i] for row, sample in enumerate(asked) for i in range(len(sample.queries))]


def open_images(head: AllMaskHead, backbone: Backbone, samples: Sequence[Sample]) -> tuple[Prefix, list[Canvas]]:
    """Encode images once and cache their shared prefix; the frames are what the mask grids cover."""
    codec = backbone.codec
    canvases = [head.canvas(sample, codec) for sample in samples]
    prefix = backbone.open(canvases)
    return prefix, [frame(canvas, codec.geometry.covered(canvas.size)) for canvas in canvases]


def _groups(head: AllMaskHead, sample: Sample, is_chat: bool) -> list[list[int]]:
    """Queries that are asked together: each alone, or as many as there are classes."""
    chosen = [i for i, query in enumerate(sample.queries) if (query.task == "chat") == is_chat]
    size = 1 if is_chat else max(1, head.num_classes - 1)
    return [chosen[start : start + size] for start in range(0, len(chosen), size)]


def _force(
    head: AllMaskHead,
    backbone: Backbone,
    prefix: Prefix,
    samples: Sequence[Sample],
    groups: Sequence[Sequence[Sequence[int]]],
) -> list[Said]:
    """Answers that are given: the first template and its trigger, to be run in the pass of the mask itself."""
    first = prefix.open_branches(max(len(row) for row in groups))
    said = []
    for row, (sample, parts) in enumerate(zip(samples, groups, strict=True)):
        for branch, part in enumerate(parts):
            queries = [sample.queries[i] for i in part]
            stub = fill(head.prompts.answers[0], dialogue.listing(head, queries))
            question = backbone.codec.question(dialogue.question_of(head, queries, None))
            before = backbone.codec.template.before_answer
            answer = backbone.codec.encode(before + (f"{stub} " if stub else ""), SEG)
            trigger = Trigger(row, first + branch, lead=question + answer)
            said.append(Said(row, list(part), backbone.codec.decode(answer), [trigger]))
    return said


def _generate(
    head: AllMaskHead,
    backbone: Backbone,
    prefix: Prefix,
    samples: Sequence[Sample],
    groups: Sequence[Sequence[Sequence[int]]],
    is_chat: bool,
    protocol: str,
) -> list[Said]:
    """Answers that the language model gives, one branch per group behind the shared image prefix."""
    codec = backbone.codec
    prompts: list[list[tuple[int, ...]]] = []
    for sample, parts in zip(samples, groups, strict=True):
        asked: list[tuple[int, ...]] = []
        for part in parts:
            queries = [sample.queries[i] for i in part]
            if is_chat:
                asked.append(dialogue.opening(queries[0], codec))
                continue
            rng = None
            if protocol == "official":  # its loader lower-cases expressions, too (specification 1.3)
                queries = [replace(query, text=query.text.lower()) for query in queries]
                rng = dialogue.template_draw(head, sample, queries[0])
            asked.append(codec.question(dialogue.question_of(head, queries, rng)))
        prompts.append(asked)
    most = 1 if protocol == "official" else head.max_masks
    ends = (head.no_id,) if is_chat or most > 1 else (head.seg_id, head.no_id)
    bound = head.max_chat_tokens if is_chat else head.max_new_tokens
    generated = backbone.generate(prefix, prompts, max_new_tokens=bound, stop=ends, keep=True)
    said: list[Said] = []
    decided: list[torch.Tensor | None] = []
    for row, parts in enumerate(groups):
        for branch, part in enumerate(parts):
            ids, places = generated.ids[row][branch], generated.places[row][branch]
            triggers = find_triggers(head, row, generated.first + branch, ids, places)
            limit = len(triggers) if is_chat else most
            item = Said(row, list(part), codec.decode(ids), triggers[:limit], refused=head.no_id in ids)
            said.append(item)
            slot = next((i for i, index in enumerate(ids) if index in (head.seg_id, head.no_id)), None)
            decided.append(None if slot is None else generated.states[row][branch][slot])
    for item, chance in zip(said, _confidences(head, backbone, decided), strict=True):
        item.confidence = chance
    return said


def find_triggers(head: AllMaskHead, row: int, block: int, ids: Sequence[int], places: Sequence[int]) -> list[Trigger]:
    """The triggers among generated tokens; the last token has not been cached yet and leads its mask pass."""
    return [
        Trigger(row, block, place=place) if place >= 0 else Trigger(row, block, lead=(index,))
        for index, place in zip(ids, places, strict=True)
        if index == head.seg_id
    ]


def _confidences(head: AllMaskHead, backbone: Backbone, states: Sequence[torch.Tensor | None]) -> list[float]:
    """Odds of the trigger against the refusal, from the states `(D,)` that said one of them; 0 where neither was said."""
    said = [state for state in states if state is not None]
    if head.no_target == "empty_mask" or not said:
        return [0.0 if state is None else 1.0 for state in states]
    odds = backbone.logits(torch.stack(said))[:, [head.seg_id, head.no_id]].softmax(-1)[:, 0]
    found = iter(odds.tolist())
    return [0.0 if state is None else next(found) for state in states]


def finish(
    head: AllMaskHead,
    sample: Sample,
    canvas: Canvas,
    said: Said,
    masks: Sequence[torch.Tensor],
    upsampling: Literal["bilinear", "nearest"],
) -> list[tuple[int, Prediction]]:
    """Cells to pixels: one prediction for each query of an answer.

    Args:
        head: of the masks.
        sample: asked about.
        canvas: what the grid covers.
        said: the answer.
        masks: logits of the cells `(C, h, w)` of its triggers.
        upsampling: of cells to pixels.
    """
    if masks:
        # a query with several masks is answered by their union
        shown = (
            1 if head.num_classes == 1 else 1 + len(said.query_ids)
        )  # classes that nothing was asked of do not compete
        values = torch.stack([_binary(logits[:shown]) for logits in masks]).amax(0)  # (queries, h, w)
        fine = upsample(values, canvas, upsampling)  # (queries, H, W)
        is_on = fine > 0
        chances = fine.sigmoid()
        inside = (chances * is_on).sum((1, 2)) / is_on.sum((1, 2)).clamp(min=1)
        certainty = torch.where(is_on.any(2).any(1), inside, chances.amax((1, 2)))  # of the best pixel where no mask is
        arrays, soft = is_on.to(torch.uint8).cpu().numpy(), values.cpu().numpy()
    out = []
    for i, query_id in enumerate(said.query_ids):
        mask = Mask.from_array(arrays[i]) if masks else Mask.empty(sample.size)
        is_there = mask.area > 0 and not said.refused
        prediction = Prediction.answering(
            *(sample, query_id, mask),
            text=said.text,
            score=said.confidence * (float(certainty[i]) if masks else 1.0),
            exists=is_there,
            mask_logits=soft[i] if masks and covers(canvas) else None,
        )
        out.append((query_id, prediction))
    return out


def _binary(logits: torch.Tensor) -> torch.Tensor:
    """Log-odds of each class but the background against all others, `(max(1, C - 1), h, w)`; positive where it wins."""
    if len(logits) == 1:
        return logits
    best = logits.topk(2, dim=0).values  # the strongest rival of each class decides
    rival = torch.where(logits == best[:1], best[1:], best[:1])
    return (logits - rival)[1:]
