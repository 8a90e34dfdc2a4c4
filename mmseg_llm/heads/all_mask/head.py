"""Head `all_mask`: STAMP (arXiv 2512.00395). The language model says `<|seg|>`; one mask token per image token then reads the
dialogue and all other mask tokens at once, and a linear classifier decides about its cell.

Legend: B images, Q queries, K masks, M mask tokens, T image tokens, D width, C classes, h w cells, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as functional
from torch import nn

from mmseg_llm.backbones.codec import IGNORE_INDEX, Codec
from mmseg_llm.backbones.features import gather
from mmseg_llm.geometry import frame, stretch
from mmseg_llm.heads.all_mask import dialogue
from mmseg_llm.heads.all_mask.answering import answer_samples
from mmseg_llm.heads.all_mask.conversation import Conversation
from mmseg_llm.heads.all_mask.grid import MaskGrid
from mmseg_llm.heads.all_mask.labels import LabelRule, cell_labels, check_rule
from mmseg_llm.heads.all_mask.losses import binary_loss, class_loss
from mmseg_llm.heads.all_mask.passes import Trigger, mask_pass
from mmseg_llm.heads.all_mask.prompts import MASK, NO, SEG, YES, Prompts
from mmseg_llm.heads.base import Head, check_choices
from mmseg_llm.structures import Batch, Canvas, DenseBlock, Example, Prediction, Sample

if TYPE_CHECKING:
    from PIL import Image

    from mmseg_llm.backbones.base import Backbone, VisionFeatures
    from mmseg_llm.backbones.prefix import Prefix
    from mmseg_llm.masks import Size
    from mmseg_llm.segmenters import Refiner

DEFAULT_GRID = MaskGrid()
WEIGHTS = {"ce": 1.0, "bce": 0.3, "dice": 0.7}
"""Of the reference (specification section 3.1)."""


class AllMaskHead(Head):
    """STAMP's head.

    Args:
        prompts: question and answer templates.
        num_classes: C; 1 asks one expression per turn. With more, up to C - 1 expressions are asked in one turn and every cell
            chooses between them and the background (STAMPlus, arXiv 2608.02791); their targets should not overlap.
        grid: how fine masks are predicted.
        label_rule: how cells are labelled, see `labels.cell_labels`.
        label_mode: `answer` supervises answers only; `official_all_tokens` everything, as the reference does.
        no_target: what an expression without target is answered with: `empty_mask` as in the reference, or `answer`: `<|no|>`.
        mask_attention: `bidirectional`, or `causal` for checkpoints trained without (specification section 8, quirk 1).
        upsampling: of cells to pixels: `bilinear` on logits, or the reference's `nearest`.
        weights: of the `ce`, `bce` and `dice` terms.
        max_queries: expressions drawn per image and step, without replacement; all when None.
        max_masks: masks taken from one answer; their union is the mask of the query.
        max_new_tokens: bound of an answer to an expression.
        max_chat_tokens: bound of a free answer.
        seed: of the question templates that the `official` protocol draws.
    """

    tokens: ClassVar[tuple[str, ...]] = (SEG, MASK, YES, NO)
    protocols: ClassVar[tuple[str, ...]] = ("generate", "force_segment", "official")

    def __init__(
        self,
        *,
        prompts: Prompts | None = None,
        num_classes: int = 1,
        grid: MaskGrid = DEFAULT_GRID,
        label_rule: LabelRule = "area",
        label_mode: Literal["answer", "official_all_tokens"] = "answer",
        no_target: Literal["empty_mask", "answer"] = "empty_mask",
        mask_attention: Literal["bidirectional", "causal"] = "bidirectional",
        upsampling: Literal["bilinear", "nearest"] = "bilinear",
        weights: dict[str, float] | None = None,
        max_queries: int | None = 5,
        max_masks: int = 1,
        max_new_tokens: int = 48,
        max_chat_tokens: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_rule(label_rule)
        check_choices(AllMaskHead.__init__, label_mode=label_mode, no_target=no_target, upsampling=upsampling,
                      mask_attention=mask_attention)  # fmt: skip
        counts = {"num_classes": num_classes, "max_masks": max_masks, "max_queries": max_queries}
        counts |= {"max_new_tokens": max_new_tokens, "max_chat_tokens": max_chat_tokens}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}; it must be at least 1")
        if unknown := (weights or {}).keys() - WEIGHTS.keys():
            raise ValueError(f"unknown loss weights {sorted(unknown)}; the losses are {', '.join(WEIGHTS)}")
        if no_target == "answer" and num_classes > 1:
            raise ValueError(
                "no_target 'answer' needs num_classes 1: several expressions in one turn share its answer; use 'empty_mask'"
            )
        self.prompts = prompts or Prompts()
        self.num_classes, self.grid = num_classes, grid
        self.label_rule: LabelRule = label_rule
        self.label_mode, self.no_target, self.upsampling = label_mode, no_target, upsampling
        self.is_bidirectional = mask_attention == "bidirectional"
        self.weights = WEIGHTS | (weights or {})
        self.max_queries, self.max_masks, self.seed = max_queries, max_masks, seed
        self.max_new_tokens, self.max_chat_tokens = max_new_tokens, max_chat_tokens
        self.classifier: nn.Linear
        self.place: nn.Parameter | None = None

    def bind(self, backbone: Backbone) -> None:
        """Create the classifier, and the place embedding of grids finer than the visual one.

        Raises:
            ValueError: if grid positions are asked of a backbone without grid axes.
        """
        codec = backbone.codec
        if self.grid.position == "grid" and codec.rope_axes == 1:
            raise ValueError("mask positions on a grid need a backbone with M-RoPE; set grid.position to sequential")
        self.classifier = nn.Linear(backbone.text_width, self.num_classes * self.grid.cells**2)
        if self.grid.scale > 1:
            self.place = nn.Parameter(torch.zeros(self.grid.scale**2, backbone.text_width))
        self.seg_id, self.mask_id, _, self.no_id = (codec.token_id(name) for name in self.tokens)

    # ---- data workers -------------------------------------------------------------------------------------------------

    def canvas(self, sample: Sample, codec: Codec) -> Canvas:
        """The image as the backbone takes it.

        Raises:
            ValueError: if the image is too small or too large for the mask grid.
        """
        geometry = codec.geometry
        size = geometry.canvas_size(sample.size)
        cells = self.grid.shape(geometry.token_grid(size))
        if sample.size[0] < cells[0] or sample.size[1] < cells[1]:
            raise ValueError(
                f"image {sample.id} of {sample.size[0]} x {sample.size[1]} pixels (H x W) is too small for a mask grid of "
                f"{cells[0]} x {cells[1]} cells; enlarge the image, or "
                f"{'lower min_pixels of the backbone' if geometry.is_dynamic else 'use a model with a coarser grid'}"
            )
        rows, columns = self.grid.tokens(geometry.token_grid(size))
        needed = geometry.num_tokens(size) + rows * columns + self.max_new_tokens
        if codec.context and needed > codec.context:
            raise ValueError(
                f"image {sample.id} of {sample.size[0]} x {sample.size[1]} pixels (H x W) is too large for the mask grid: it "
                f"needs {needed} tokens, the language model takes {codec.context}; "
                f"{'lower max_pixels of the backbone' if geometry.is_dynamic else 'lower grid.scale of the head'}"
            )
        return stretch(sample.load_image(), size)

    def build(self, sample: Sample, codec: Codec, rng: np.random.Generator) -> Example:
        """Draw expressions and templates; render canvas, dialogue branches, mask tokens and cell labels.

        Raises:
            ValueError: if no query of the sample has a label, or a dialogue has another number of triggers than masks.
        """
        labelled = [i for i, q in enumerate(sample.queries) if q.masks is not None or q.answer is not None]
        if not labelled:
            raise ValueError(f"sample {sample.id} of {sample.source} has no query with masks; remove it from training")
        if self.max_queries is not None and len(labelled) > self.max_queries:
            labelled = sorted(rng.choice(labelled, self.max_queries, replace=False).tolist())
        canvas = self.canvas(sample, codec)
        grid = codec.geometry.token_grid(canvas.size)
        turns = dialogue.training_turns(self, sample, labelled, codec, rng)
        block = DenseBlock(self.mask_id, self.grid.offsets(grid, codec.rope_axes), self.is_bidirectional)
        seen = frame(canvas, codec.geometry.covered(canvas.size))
        prefix = codec.image_prefix(canvas.size)
        return Example(
            head=self.name,
            sample=sample,
            canvas=canvas,
            pixels=codec.pixels(canvas),
            prefix=prefix,
            prefix_labels=prefix if self.label_mode == "official_all_tokens" else (),
            suffixes=tuple(turn.suffix(block, is_first=i == 0) for i, turn in enumerate(turns)),
            targets=tuple(
                None if mask is None else cell_labels(mask, seen, self.grid.shape(grid), self.label_rule)
                for turn in turns
                for mask in turn.masks
            ),
        )

    # ---- training -----------------------------------------------------------------------------------------------------

    def loss(self, backbone: Backbone, batch: Batch) -> dict[str, torch.Tensor]:
        """Cross-entropy of the answers, binary cross-entropy and Dice of the masks; `_seg_accuracy` is logged only."""
        features = backbone.encode_images(batch.pixels, batch.canvas_sizes)
        states = backbone(batch, features, self.dense_features(features)).states  # (B, N, D)
        is_target = batch.labels[:, 1:] != IGNORE_INDEX
        token_logits = backbone.logits(states[:, :-1][is_target])  # (tokens, vocabulary)
        losses = {"ce": functional.cross_entropy(token_logits, batch.labels[:, 1:][is_target])}
        losses |= self._mask_loss(states, batch, features.grids)
        losses = {name: self.weights[name] * value for name, value in losses.items()}
        if len(batch.slot_rows):
            with torch.no_grad():
                said = backbone.logits(states[batch.slot_rows, batch.slot_positions - 1]).argmax(-1)
                right = said == batch.ids[batch.slot_rows, batch.slot_positions]
                losses["_seg_accuracy"] = right.float().mean()
        return losses

    def _mask_loss(self, states: torch.Tensor, batch: Batch, grids: Sequence[Size]) -> dict[str, torch.Tensor]:
        """Mean over all masks of the batch (specification 3.1); masks of equal grids are handled together."""
        values = self.classifier(gather(states, batch.dense_positions))  # (B, M of all blocks, C r r)
        by_grid: dict[Size, list[tuple[int, int, list[np.ndarray]]]] = {}
        rows, starts = batch.slot_rows.tolist(), batch.dense_starts.tolist()
        blocks: dict[tuple[int, int], list[np.ndarray]] = {}
        for row, start, target in zip(rows, starts, batch.targets, strict=True):
            if start >= 0:
                blocks.setdefault((row, start), []).append(target)
        for (row, start), targets in blocks.items():
            by_grid.setdefault(grids[row], []).append((row, start, targets))
        if not blocks:  # keep the classifier in the graph, so that distributed training does not wait for it
            # empty sums: a product with zero would be NaN where half precision overflows
            zero = sum(p.flatten()[:0].sum() for p in self.parameters()) + states[:, :0].sum().float()
            return {"bce": zero, "dice": zero}
        terms: dict[str, torch.Tensor] = {}
        for grid, found in by_grid.items():
            tokens = self.grid.tokens(grid)
            index = torch.tensor([start for _, start, _ in found], device=values.device)[:, None]
            index = index + torch.arange(tokens[0] * tokens[1], device=values.device)  # (K, M)
            at = torch.tensor([row for row, _, _ in found], device=values.device)[:, None]
            cells = self.grid.arrange(values[at, index], grid, self.num_classes).flatten(2)  # (K, C, h w)
            labels = np.stack([self._stack(targets) for _, _, targets in found])  # (K, C, h w)
            truth = torch.as_tensor(labels, device=values.device)
            if self.num_classes == 1:
                parts = binary_loss(cells[:, 0], truth[:, 0])
            else:
                parts = class_loss(cells.transpose(1, 2), truth.transpose(1, 2))
            terms = {name: terms.get(name, 0) + value.sum() / len(blocks) for name, value in parts.items()}
        return terms

    def _stack(self, targets: Sequence[np.ndarray]) -> np.ndarray:
        """Targets of one block, flat: the mask itself, or the shares of all classes with the background first, `(C, h w)`."""
        flat = np.stack(targets).reshape(len(targets), -1)
        if self.num_classes == 1:
            return flat
        shares = np.zeros((self.num_classes, flat.shape[1]), np.float32)
        shares[1 : 1 + len(flat)] = flat / np.maximum(flat.sum(0), 1)  # cells of overlapping masks are shared
        shares[0] = 1 - shares[1:].sum(0)
        return shares

    # ---- inference ----------------------------------------------------------------------------------------------------

    def dense_features(self, features: VisionFeatures) -> torch.Tensor:
        """What is added to the embedding of each mask token, `(B, M, D)`."""
        return self.grid.features(features, self.place)

    def cell_logits(
        self, backbone: Backbone, prefix: Prefix, triggers: Sequence[Trigger], dense: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Logits of the cells `(C, h, w)` of each trigger, float32, in passes of several masks at once.

        Args:
            backbone: of the prefix.
            prefix: with the dialogue kept; unchanged afterwards.
            triggers: where the masks hang off.
            dense: `dense_features` of the prefix, where they are known already.
        """
        grids = prefix.features.grids

        def read(states: torch.Tensor, row: int) -> torch.Tensor:
            return self.grid.arrange(self.classifier(states), grids[row], self.num_classes)[0].float()

        return mask_pass(
            backbone,
            prefix,
            triggers,
            token_id=self.mask_id,
            features=self.dense_features(prefix.features) if dense is None else dense,
            offsets=[self.grid.offsets(grid, backbone.codec.rope_axes) for grid in grids],
            bidirectional=self.is_bidirectional,
            read=read,
        )

    @torch.no_grad()
    def predict(self, backbone: Backbone, samples: Sequence[Sample], protocol: str = "generate") -> list[Prediction]:
        """Masks of all queries.

        Protocols: `generate` decodes freely and draws the masks of the triggers it says; `force_segment` gives a stub of an
        answer and its trigger instead, everything in one pass; `official` is the reference's evaluation: a question template
        drawn per expression (here seeded), the first mask, nearest upsampling (specification section 6).
        """
        self.check_protocol(protocol)
        return answer_samples(self, backbone, samples, protocol)

    def converse(
        self, backbone: Backbone, image: str | Path | Image.Image, refiner: Refiner | None = None
    ) -> Conversation:
        """Start a conversation about an image: several turns and masks, one pass of the vision tower."""
        return Conversation(self, backbone, image, refiner)

    def metric(self, protocol: str, has_no_target: bool) -> str:
        """The reference's rules under its own protocol."""
        return "stamp" if protocol == "official" else super().metric(protocol, has_no_target)
