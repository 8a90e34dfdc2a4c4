"""Backbone: one adapter per model family over a stock transformers model. Heads talk to this interface only.

Legend: B rows (one image each), A rotary axes, N tokens, M dense queries, T image tokens, P patches, D language width, V vision
width, K branches.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mmseg_llm.backbones.adapters import Lora, Trainable, add_lora, add_trainable_rows, set_trainable
from mmseg_llm.backbones.features import VisionFeatures, gather, scatter
from mmseg_llm.backbones.generation import DEFAULT_SAMPLING, Constraint, Generated, Sampling, generate
from mmseg_llm.backbones.prefix import Prefix
from mmseg_llm.backbones.visibility import VISION_ATTENTION, Visibility, check_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mmseg_llm.backbones.codec import Codec
    from mmseg_llm.masks import Size
    from mmseg_llm.structures import Batch, Canvas

__all__ = ["Backbone", "Constraint", "Generated", "LanguageStates", "Sampling", "VisionFeatures", "gather"]


@dataclass(frozen=True)
class LanguageStates:
    """Result of one training pass: `states` `(B, N, D)` after the final norm, and the image `features`."""

    states: torch.Tensor
    features: VisionFeatures


class Backbone(nn.Module):
    """A vision encoder and a language model, assembled once.

    Subclasses build `model` (stock transformers) and `codec` and implement what differs between families: `encode_images`,
    where the parts are, and extra arguments of the decoder stack. Prefix sharing, packing and decoding live here.

    Args:
        model: stock transformers model with an LM head.
        codec: its tokenizer, chat template, image geometry and coordinates.
        vision_width, text_width: V and D.
        attention: implementation that the language model runs with; one that honours a visibility.
        lora: adapters on the language model; then set `trainable.language` and `trainable.embeddings` to false.
        trainable: what trains in full.
        gradient_checkpointing: recompute activations of vision tower and language model in the backward pass.

    Raises:
        ValueError: if the attention implementation ignores a visibility, or a layer has a window of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        codec: Codec,
        *,
        vision_width: int,
        text_width: int,
        attention: str = "sdpa",
        lora: Lora | None = None,
        trainable: Trainable | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.codec = model, codec
        self.vision_width, self.text_width = vision_width, text_width
        codec.context = codec.context or getattr(self.language_model.config, "max_position_embeddings", 0)
        self.base_vocabulary = 0  # tokens before the heads added theirs
        self.lora, self.trainable = lora, trainable or Trainable()
        check_attention(attention)
        for part, implementation in (
            (self.language_model, attention),
            (self.vision_tower, VISION_ATTENTION.get(attention, attention)),
        ):
            for module in part.modules():  # stock modules look it up at every call
                config: Any = getattr(module, "config", None)
                if config is not None:
                    config._attn_implementation = implementation
        kinds = set(getattr(self.language_model.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(
                f"the language model has layers of type {sorted(kinds - {'full_attention'})}, which would cut a visibility; "
                "set use_sliding_window to false in its config"
            )
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # ---- what a family says of itself ---------------------------------------------------------------------------------

    @abstractmethod
    def encode_images(self, pixels: torch.Tensor, canvas_sizes: Sequence[Size] | None = None) -> VisionFeatures:
        """Run the vision tower and the projector once.

        Args:
            pixels: `(B, 3, h, w)`, canvases in the upper left corners where their sizes differ.
            canvas_sizes: of each image; all are `(h, w)` when None.
        """

    @property
    @abstractmethod
    def language_model(self) -> PreTrainedModel:
        """The decoder stack without the LM head."""

    @property
    @abstractmethod
    def vision_tower(self) -> nn.Module:
        """The vision tower."""

    @property
    @abstractmethod
    def projector(self) -> nn.Module:
        """What brings vision features to the language width; may be a part of the tower."""

    def deep_arguments(
        self, features: VisionFeatures, image_positions: torch.Tensor, num_tokens: int
    ) -> dict[str, Any]:
        """Extra arguments of the decoder stack where image tokens are among the N new ones (DeepStack); none by default."""
        return {}

    # ---- parts --------------------------------------------------------------------------------------------------------

    @property
    def lm_head(self) -> nn.Module:
        """The LM head."""
        return self.model.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def attention(self) -> str:
        """Attention implementation of the language model."""
        return self.language_model.config._attn_implementation

    def prepare(self, tokens: Sequence[str]) -> int:
        """Give the heads' control tokens ids and rows, then freeze, adapt and unfreeze; called once by the model.

        New LM-head rows start at the mean of the old ones, new embedding rows at the model's normal init (MLLMSeg 3.3); where
        the matrices have spare rows already, as those of Qwen2-VL, these are used as they are (STAMP 1.4).

        Returns:
            How many of the tokens were not in the vocabulary before.
        """
        self.base_vocabulary = min(len(self.codec.tokenizer), self.model.get_input_embeddings().weight.shape[0])
        added = self.codec.add_tokens(tokens)
        ids = [self.codec.token_id(name) for name in tokens]
        rows = self.model.get_input_embeddings().weight.shape[0]
        needed = max(ids) + 1 if ids else 0
        if needed > rows:
            self._grow(rows, needed)
        if self.lora is not None:
            add_lora(self.language_model, self.lora)
        set_trainable(self, self.trainable)
        if self.trainable.new_rows and not self.trainable.embeddings and ids:
            add_trainable_rows(self.model, ids)
        return added

    def _grow(self, rows: int, needed: int) -> None:
        weight: Any = self.lm_head.weight
        is_tied = weight is self.model.get_input_embeddings().weight
        mean = None if weight.is_meta or is_tied else weight.detach().float().mean(0)
        self.model.resize_token_embeddings(needed, mean_resizing=False)
        if mean is not None:
            grown: Any = self.lm_head.weight
            with torch.no_grad():
                grown[rows:] = mean.to(grown.dtype)

    def save_config(self, folder: Path) -> None:
        """Write what `source=folder, weights='random'` needs to build the same architecture again (no weights)."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.save_pretrained(folder)
        self.codec.save(folder)

    # ---- passes -------------------------------------------------------------------------------------------------------

    def embed(
        self, ids: torch.Tensor, features: VisionFeatures | None = None, image_positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Input embeddings `(B, N, D)`, the image tokens at `image_positions` `(B, T)` replaced by the projected ones."""
        embeds = self.model.get_input_embeddings()(ids)
        if features is None:
            return embeds
        assert image_positions is not None and image_positions.shape[1] == features.tokens.shape[1]
        return scatter(embeds, image_positions, features.tokens)

    def _run(
        self,
        embeds: torch.Tensor,
        visibility: Visibility,
        positions: torch.Tensor,
        cache: Any = None,
        **deep: Any,
    ) -> torch.Tensor:
        """Post-norm states `(B, N, D)` of the last N tokens of `visibility`; the others are in the cache.

        `positions` is `(A, B, N)`, or `(B, N)` where all axes are equal.
        """
        mask = visibility.render(self.attention, embeds.dtype, num_queries=embeds.shape[1])
        name = "cache" if "cache" in inspect.signature(self.language_model.forward).parameters else "past_key_values"
        arguments = {name: cache, "use_cache": cache is not None, **deep}
        if positions.ndim == 3 and len(positions) == 1:
            positions = positions[0]
        output = self.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **arguments)
        return output.last_hidden_state

    def forward(
        self, batch: Batch, features: VisionFeatures | None = None, dense: torch.Tensor | None = None
    ) -> LanguageStates:
        """One training pass over packed sequences.

        Args:
            batch: collated examples.
            features: of the batch's images, when they are known already.
            dense: `(B, T', D)` what is added to the embeddings of the dense queries, by `batch.dense_index`.
        """
        if features is None:
            features = self.encode_images(batch.pixels, batch.canvas_sizes)
        embeds = self.embed(batch.ids, features, batch.image_positions)
        if dense is not None:
            places = batch.dense_positions  # (B, M)
            embeds = scatter(embeds, places, gather(embeds, places) + gather(dense, batch.dense_index).to(embeds.dtype))
        deep = self.deep_arguments(features, batch.image_positions, batch.ids.shape[1])
        return LanguageStates(self._run(embeds, batch.visibility, batch.positions, **deep), features)

    @torch.no_grad()
    def open(self, canvases: Sequence[Canvas]) -> Prefix:
        """Encode images once and cache the prefix that everything asked about each of them shares.

        Args:
            canvases: of B images, as `codec.geometry.canvas_size` asks for.
        """
        sizes = [canvas.size for canvas in canvases]
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        pixels = np.zeros((len(sizes), 3, height, width), np.float32)
        for row, canvas in enumerate(canvases):
            pixels[row, :, : canvas.size[0], : canvas.size[1]] = self.codec.pixels(canvas)
        features = self.encode_images(torch.from_numpy(pixels).to(self.device, self.model.dtype), sizes)
        return self.prefill(features, [self.codec.image_prefix(size) for size in sizes])

    @torch.no_grad()
    def prefill(self, features: VisionFeatures, prompts: Sequence[Sequence[int]]) -> Prefix:
        """Cache the prefix of each image.

        Args:
            features: of B images.
            prompts: per image, ids with its image placeholders.

        Raises:
            ValueError: if a prompt has another number of placeholders than its image has tokens.
        """
        from transformers import DynamicCache

        device = features.tokens.device
        shape = (len(prompts), max(len(prompt) for prompt in prompts))
        ids = torch.full(shape, self.codec.pad_id)
        positions = torch.zeros(self.codec.rope_axes, *shape, dtype=torch.long)
        image_positions = torch.full((len(prompts), features.tokens.shape[1]), -1)
        next_position = torch.zeros(len(prompts), 1, dtype=torch.long)
        context = self.codec.token_id(self.codec.template.image_context)
        for row, (prompt, grid) in enumerate(zip(prompts, features.grids, strict=True)):
            places = [place for place, index in enumerate(prompt) if index == context]
            if len(places) != grid[0] * grid[1]:
                raise ValueError(
                    f"the prompt has {len(places)} image placeholders but the vision tower gives {grid[0] * grid[1]} tokens; "
                    "build it with codec.image_prefix() for the size of the canvas"
                )
            ids[row, : len(prompt)] = torch.tensor(prompt)
            image_positions[row, : len(places)] = torch.tensor(places)
            size = (grid[0] * self.codec.geometry.step, grid[1] * self.codec.geometry.step)
            at, following = self.codec.positions(prompt, size)
            positions[:, row, : len(prompt)] = torch.from_numpy(at)
            next_position[row] = following
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        visibility = Visibility.causal(torch.arange(shape[1]) < lengths[:, None]).to(device)
        cache = DynamicCache(config=self.language_model.config)
        image_positions = image_positions.to(device)
        positions = positions.to(device)
        embeds = self.embed(ids.to(device), features, image_positions)
        deep = self.deep_arguments(features, image_positions, shape[1])
        states = self._run(embeds, visibility, positions, cache, **deep)
        return Prefix(
            cache=cache,
            visibility=visibility,
            positions=positions[0],
            next_position=next_position.to(device),
            states=states,
            image_positions=image_positions,
            features=features,
        )

    def extend(
        self,
        prefix: Prefix,
        block: torch.Tensor,
        *,
        ids: torch.Tensor | None = None,
        embeds: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run more tokens on a cached prefix, which grows by them.

        Args:
            prefix: as returned by `prefill`; give it blocks with `open_branches` or `open_blocks` first.
            block: `(B, M)` block of each new token, -1 at padding.
            ids, embeds: the tokens `(B, M)` or their embeddings `(B, M, D)`.
            shift: `(A, B, M)` added to the rotary positions, which otherwise go on counting within each block.

        Returns:
            Post-norm states `(B, M, D)`.
        """
        if embeds is None:
            assert ids is not None
            embeds = self.embed(ids)
        positions = prefix.append(block)
        if shift is not None:
            positions = positions + shift
        return self._run(embeds, prefix.visibility, positions, prefix.cache)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits, float32."""
        return self.lm_head(states).float()

    def generate(
        self,
        prefix: Prefix,
        suffixes: Sequence[Sequence[Sequence[int]]],
        *,
        max_new_tokens: int = 32,
        stop: Sequence[int] = (),
        constraints: Sequence[Sequence[Constraint]] | None = None,
        keep: bool = False,
        first: int | None = None,
        seeds: Sequence[Sequence[int | None]] | None = None,
        sampling: Sampling = DEFAULT_SAMPLING,
    ) -> Generated:
        """Decode all branches of all images at once, greedily unless they have seeds.

        Args:
            prefix: B rows; rolled back to its present length at the end unless the branches are kept.
            suffixes: `suffixes[row][branch]` prompt ids of each branch, none of them empty.
            max_new_tokens: bound per branch.
            stop: ids that end a branch beside the end of the turn.
            constraints: `constraints[row][branch]`: which answers are possible; what has no alternative costs no step.
            keep: leave the branches in the prefix, for what hangs off them or continues them.
            first: block of the first branch where kept branches go on; new ones are opened when None.
            seeds: `seeds[row][branch]`: None for a greedy branch; a sampled one says the same whatever is decoded beside it.
            sampling: of branches with a seed.
        """
        return generate(
            self,
            prefix,
            suffixes,
            max_new_tokens=max_new_tokens,
            stop=stop,
            constraints=constraints,
            keep=keep,
            first=first,
            seeds=seeds,
            sampling=sampling,
        )
