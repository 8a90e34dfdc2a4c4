"""Head `mask_decoder`: prompts, targets, losses and decoding around the network of `decoder.py` (MLLMSeg, arXiv 2508.04107).

The language model says `[SEG]` or `[REJ]`; the state that emitted `[SEG]` turns the cached image features into a mask.

Legend: B images, Q queries, P patches, T image tokens, D language width, V vision width, H W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image

from mmseg_llm.backbones.codec import IGNORE_INDEX, Codec
from mmseg_llm.backbones.collate import collate
from mmseg_llm.backbones.features import VisionFeatures, gather
from mmseg_llm.geometry import canvas_to_original, covers, frame, mask_to_canvas, stretch
from mmseg_llm.heads.base import Head
from mmseg_llm.heads.mask_decoder.decoder import MaskDecoder
from mmseg_llm.heads.mask_decoder.losses import clean_mask_loss, official_mask_loss
from mmseg_llm.heads.mask_decoder.prompts import OFFICIAL, REJ, SEG, Prompts, clean_expression
from mmseg_llm.structures import Batch, Canvas, Example, Mask, Prediction, Sample, Suffix

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.structures import Query

MASK_THRESHOLD = 0.5
DECODE_CHUNK = 64
"""Queries decoded at once, which bounds memory."""


class MaskDecoderHead(Head):
    """MLLMSeg's head.

    Args:
        prompts: question and answer templates.
        loss_rule: `clean`, or `official` for parity with the reference (section 4 of the specification).
        weights: of the `ce`, `focal` and `dice` terms.
        max_queries: expressions drawn per image and step, without replacement; all when None.
        joint_prompt: train on all expressions of an image in one dialogue turn as the reference does; otherwise each has its
            own branch behind the shared image prefix.
        jpeg_quality: `(low, high)` quality of the JPEG augmentation; None turns it off.
        width, heads, ffn, dropout, groups, grid_in_float32, offset_init: of `MaskDecoder`.
        max_new_tokens: bound of an answer.
    """

    tokens: ClassVar[tuple[str, ...]] = (SEG, REJ)
    protocols: ClassVar[tuple[str, ...]] = ("generate", "per_expression", "official")

    def __init__(
        self,
        *,
        prompts: Prompts | None = None,
        loss_rule: Literal["clean", "official"] = "clean",
        weights: dict[str, float] | None = None,
        max_queries: int | None = 5,
        joint_prompt: bool = False,
        jpeg_quality: tuple[int, int] | None = None,
        width: int | None = None,
        heads: int = 8,
        ffn: int | None = None,
        dropout: float = 0.1,
        groups: int = 4,
        grid_in_float32: bool = True,
        offset_init: float | None = None,
        max_new_tokens: int = 48,
    ) -> None:
        super().__init__()
        self.prompts = prompts or Prompts()
        self.loss_rule, self.joint_prompt = loss_rule, joint_prompt
        self.weights = {"ce": 1.0, "focal": 1.0, "dice": 1.0} | (weights or {})
        self.max_queries, self.jpeg_quality, self.max_new_tokens = max_queries, jpeg_quality, max_new_tokens
        self.label_padding = 0 if loss_rule == "official" else IGNORE_INDEX
        self._network: dict[str, Any] = {
            "width": width,
            "heads": heads,
            "ffn": ffn,
            "dropout": dropout,
            "groups": groups,
            "grid_in_float32": grid_in_float32,
            "offset_init": offset_init,
        }
        self.decoder: MaskDecoder

    def bind(self, backbone: Backbone) -> None:
        """Create the network for the backbone's widths and grids."""
        geometry = backbone.codec.geometry
        rows, columns = geometry.patch_grid()
        if rows != columns:
            raise ValueError(f"the mask decoder needs a square image, got patch grid {(rows, columns)}")
        self.decoder = MaskDecoder(
            vision_width=backbone.vision_width,
            text_width=backbone.text_width,
            patch=geometry.patch,
            merge=geometry.merge,
            **self._network,
        )
        self.seg_id, self.rej_id = (backbone.codec.token_id(name) for name in self.tokens)

    # ---- data workers -------------------------------------------------------------------------------------------------

    def build(self, sample: Sample, codec: Codec, rng: np.random.Generator) -> Example:
        """Draw expressions, question and answer style; render canvas, dialogue branches and targets.

        Raises:
            ValueError: if the sample has no query with a mask label, or an empty one.
        """
        labelled = [i for i, query in enumerate(sample.queries) if query.masks is not None]
        if not labelled:
            raise ValueError(f"sample {sample.id} of {sample.source} has no query with masks; remove it from training")
        if self.max_queries is not None and len(labelled) > self.max_queries:
            labelled = sorted(rng.choice(labelled, self.max_queries, replace=False).tolist())
        groups = [labelled] if self.joint_prompt else [[i] for i in labelled]
        suffixes = tuple(self._suffix(sample, group, codec, self.prompts, rng) for group in groups)
        image = sample.load_image()
        if self.jpeg_quality is not None:
            image = _jpeg(image, int(rng.integers(self.jpeg_quality[0], self.jpeg_quality[1] + 1)))
        canvas = stretch(image, codec.geometry.image_size)
        seen = frame(canvas, codec.geometry.covered(canvas.size))
        targets = tuple(self._target(sample, sample.queries[i], seen) for i in labelled)
        return self._example(sample, canvas, codec, suffixes, targets)

    def _example(
        self, sample: Sample, canvas: Canvas, codec: Codec, suffixes: tuple[Suffix, ...], targets: tuple = ()
    ) -> Example:
        return Example(
            head=self.name,
            sample=sample,
            canvas=canvas,
            pixels=codec.pixels(canvas),
            prefix=codec.image_prefix(canvas.size),
            suffixes=suffixes,
            targets=targets,
        )

    def _suffix(
        self,
        sample: Sample,
        query_ids: Sequence[int],
        codec: Codec,
        prompts: Prompts,
        rng: np.random.Generator | None = None,
        always_seg: bool = False,
    ) -> Suffix:
        """One dialogue turn about some queries with its answer; the first templates when there is no `rng`."""
        queries = [sample.queries[i] for i in query_ids]
        names = [clean_expression(query.text) for query in queries]
        question = prompts.questions[0 if rng is None else int(rng.integers(len(prompts.questions)))]
        style = prompts.answers[0 if rng is None else int(rng.integers(len(prompts.answers)))]
        slots = [REJ if query.is_no_target and not always_seg else SEG for query in queries]
        if prompts is OFFICIAL:
            names = [name.lower() for name in names]
        start = codec.question(question.format(x=", ".join(names).lower()))
        ids, labels = codec.answer(*style.parts(names, slots))
        all_ids = start + ids
        places = [i for i, index in enumerate(ids) if index in (codec.token_id(SEG), codec.token_id(REJ))]
        return Suffix(
            ids=all_ids,
            labels=(IGNORE_INDEX,) * len(start) + labels,
            query_ids=tuple(query_ids),
            slots=tuple(len(start) + place for place in places),
        )

    def _target(self, sample: Sample, query: Query, canvas: Canvas) -> np.ndarray | None:
        """What a slot is trained on: `(h, w)` bool at canvas size, at the original size for the official loss, None to reject."""
        if query.is_no_target:
            return None
        mask = query.target(sample.size)
        return mask.array if self.loss_rule == "official" else mask_to_canvas(mask, canvas)

    # ---- training -----------------------------------------------------------------------------------------------------

    def loss(self, backbone: Backbone, batch: Batch) -> dict[str, torch.Tensor]:
        """Cross-entropy of the answers, focal and Dice loss of the masks; `_seg_accuracy` is logged only."""
        output = backbone(batch)
        states = output.states  # (B, N, D)
        is_target = batch.labels[:, 1:] != IGNORE_INDEX
        token_logits = backbone.logits(states[:, :-1][is_target])  # (tokens, vocabulary)
        losses = {"ce": functional.cross_entropy(token_logits, batch.labels[:, 1:][is_target])}
        slot_states = states[batch.slot_rows, batch.slot_positions - 1]  # (Q, D)
        is_seg = batch.ids[batch.slot_rows, batch.slot_positions] == self.seg_id
        image_states = gather(states, batch.image_positions - 1)
        cache = self.decoder.encode_image(output.features.patches, image_states)  # (B, P, C)
        if is_seg.any():
            logits = self.decoder.decode(cache[batch.slot_rows[is_seg]], slot_states[is_seg])  # (Q', h, w)
            targets = [target for target, seg in zip(batch.targets, is_seg.tolist(), strict=True) if seg]
            losses |= self._mask_loss(logits, targets, len(batch.targets))
        else:  # keep the parameters in the graph, so that distributed training does not wait for them
            zero = 0.0 * (cache.sum() + sum(parameter.sum() for parameter in self.decoder.parameters()))
            losses |= {"focal": zero, "dice": zero}
        losses = {name: self.weights[name] * value for name, value in losses.items()}
        with torch.no_grad():
            answered = backbone.logits(slot_states)[:, [self.seg_id, self.rej_id]].argmax(-1)
            losses["_seg_accuracy"] = (answered == (~is_seg).long()).float().mean()
        return losses

    def _mask_loss(self, logits: torch.Tensor, targets: Sequence[np.ndarray], num_rows: int) -> dict[str, torch.Tensor]:
        if self.loss_rule == "official":
            arrays = [torch.as_tensor(target, device=logits.device) for target in targets]
            return official_mask_loss(list(logits), arrays, num_rows)
        return clean_mask_loss(logits, torch.as_tensor(np.stack(targets), device=logits.device))

    # ---- inference ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, backbone: Backbone, samples: Sequence[Sample], protocol: str = "generate") -> list[Prediction]:
        """Masks of all queries.

        Protocols: `generate` decodes freely, one expression per prompt, and takes the mask from the state that emitted
        `[SEG]`; `per_expression` forces the answer text; `official` forces the answer to all expressions of an image in one
        prompt, decides `[SEG]` or `[REJ]` in a first pass and draws all masks in a second one (specification section 6).
        """
        self.check_protocol(protocol)
        asked = [sample for sample in samples if sample.queries]
        if not asked:
            return []
        codec = backbone.codec
        canvases = [stretch(sample.load_image(), codec.geometry.image_size) for sample in asked]
        pixels = torch.from_numpy(np.stack([codec.pixels(canvas) for canvas in canvases]))
        features = backbone.encode_images(pixels.to(backbone.device))
        if protocol == "generate":
            image_states, found = self._generate(backbone, features, asked)
        else:
            image_states, found = self._forced(backbone, features, asked, canvases, protocol)
        cache = self.decoder.encode_image(features.patches, image_states)  # (B, P, C)
        drawn = self._draw(cache, found)
        covered = codec.geometry.covered()
        return [
            prediction
            for row, sample in enumerate(asked)
            for prediction in self._finish(sample, frame(canvases[row], covered), drawn.get(row), found[row])
        ]

    def metric(self, protocol: str, has_no_target: bool) -> str:
        """The reference's rules under its own protocol, which differ between its two evaluation scripts."""
        if protocol != "official":
            return super().metric(protocol, has_no_target)
        return "mllmseg_gres" if has_no_target else "mllmseg_res"

    def _generate(
        self, backbone: Backbone, features: VisionFeatures, samples: Sequence[Sample]
    ) -> tuple[torch.Tensor, list[list[_Answer]]]:
        """Decode one branch per query behind the shared image prefix."""
        codec = backbone.codec
        prompt = codec.image_prefix(codec.geometry.image_size)
        prefix = backbone.prefill(features, [prompt] * len(samples))
        question = self.prompts.questions[0]
        suffixes = [
            [codec.question(question.format(x=clean_expression(query.text).lower())) for query in sample.queries]
            for sample in samples
        ]
        generated = backbone.generate(
            prefix, suffixes, max_new_tokens=self.max_new_tokens, stop=(self.seg_id, self.rej_id)
        )
        answers = [
            [self._answer(backbone, ids, states) for ids, states in zip(row_ids, row_states, strict=True)]
            for row_ids, row_states in zip(generated.ids, generated.states, strict=True)
        ]
        return gather(prefix.states, prefix.image_positions - 1), answers

    def _answer(self, backbone: Backbone, ids: list[int], states: torch.Tensor) -> _Answer:
        slot = next((i for i, index in enumerate(ids) if index in (self.seg_id, self.rej_id)), None)
        text = backbone.codec.decode(ids)
        if slot is None:
            return _Answer(text, None, is_seg=False, confidence=0.0)
        odds = backbone.logits(states[slot])[[self.seg_id, self.rej_id]].softmax(-1)
        return _Answer(text, states[slot], ids[slot] == self.seg_id, float(odds[0]))

    def _forced(
        self,
        backbone: Backbone,
        features: VisionFeatures,
        samples: Sequence[Sample],
        canvases: Sequence[Canvas],
        protocol: str,
    ) -> tuple[torch.Tensor, list[list[_Answer]]]:
        """Teacher-forced answers; decisions from the first pass, masks from a second one when any answer holds `[REJ]`."""
        is_joint = protocol == "official"
        prompts = OFFICIAL if is_joint else self.prompts

        def run(always_seg: bool) -> tuple[Batch, torch.Tensor]:
            examples = []
            for sample, canvas in zip(samples, canvases, strict=True):
                everything = list(range(len(sample.queries)))
                groups = [everything] if is_joint else [[i] for i in everything]
                suffixes = [self._suffix(sample, g, backbone.codec, prompts, None, always_seg) for g in groups]
                examples.append(self._example(sample, canvas, backbone.codec, tuple(suffixes)))
            batch = collate(examples, backbone.codec).to(backbone.device)
            return batch, backbone(batch, features).states

        # One expression per prompt must not see its own label; the reference's joint prompt does show the earlier ones.
        batch, states = run(always_seg=not is_joint)
        decision = backbone.logits(states[batch.slot_rows, batch.slot_positions - 1])  # (Q, vocabulary)
        is_seg = decision.argmax(-1) != self.rej_id
        odds = decision[:, [self.seg_id, self.rej_id]].softmax(-1)[:, 0]
        if (batch.ids == self.rej_id).any():
            batch, states = run(always_seg=True)
        slot_states = states[batch.slot_rows, batch.slot_positions - 1]
        answers: list[list[_Answer]] = [[] for _ in samples]
        for row, state, seg, chance in zip(batch.slot_rows.tolist(), slot_states, is_seg.tolist(), odds.tolist()):
            answers[row].append(_Answer(str(SEG if seg else REJ), state, seg, chance))
        return gather(states, batch.image_positions - 1), answers

    def _draw(self, cache: torch.Tensor, found: Sequence[Sequence[_Answer]]) -> dict[int, torch.Tensor]:
        """Mask logits `(Q, h, w)` by image, of the answers that have a state; decoded together, whatever their images."""
        rows = [row for row, answers in enumerate(found) for answer in answers if answer.state is not None]
        states = [answer.state for answers in found for answer in answers if answer.state is not None]
        if not rows:
            return {}
        index, stacked = torch.tensor(rows, device=cache.device), torch.stack(states)
        chunks = zip(index.split(DECODE_CHUNK), stacked.split(DECODE_CHUNK), strict=True)
        logits = torch.cat([self.decoder.decode(cache[part], queries) for part, queries in chunks])
        return {row: logits[index == row] for row in dict.fromkeys(rows)}

    def _finish(
        self, sample: Sample, canvas: Canvas, logits: torch.Tensor | None, answers: Sequence[_Answer]
    ) -> list[Prediction]:
        """Bring the masks of one image to its original size and pair them with the answers."""
        masks: list[tuple[Mask, float, np.ndarray | None]] = []
        if logits is not None:
            chances = canvas_to_original(logits.float().sigmoid(), canvas)  # (Q, H, W)
            is_on = chances >= MASK_THRESHOLD
            means = (chances * is_on).sum((1, 2)) / is_on.sum((1, 2)).clamp(min=1)
            arrays = is_on.to(torch.uint8).cpu().numpy()
            soft = logits.float().cpu().numpy() if covers(canvas) else [None] * len(logits)
            masks = [
                (Mask.from_array(array), mean, coarse)
                for array, mean, coarse in zip(arrays, means.tolist(), soft, strict=True)
            ]
        drawn = iter(masks)
        predictions = []
        for i, answer in enumerate(answers):
            mask, certainty, coarse = (Mask.empty(sample.size), 0.0, None) if answer.state is None else next(drawn)
            predictions.append(
                Prediction.answering(
                    *(sample, i, mask),
                    text=answer.text,
                    score=answer.confidence * (certainty if answer.is_seg else 1.0),
                    exists=answer.is_seg,
                    mask_logits=coarse,
                )
            )
        return predictions


@dataclass(frozen=True)
class _Answer:
    """What the language model said to one query: text, the state that emitted the slot token, and which it was."""

    text: str
    state: torch.Tensor | None
    is_seg: bool
    confidence: float


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Encode and decode as JPEG, the only augmentation of the reference."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
