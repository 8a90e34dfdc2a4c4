"""Pixtral on stock `LlavaForConditionalGeneration` with `PixtralVisionModel`: images of any size, a token per patch, by rows.

The canvas of an image keeps its aspect ratio. Its tokens stand in the sequence as rows with a break token behind each and an end
token behind the last; rotary positions of the language model count on through them, those of the vision tower are rows and
columns (DepthLM specification B.4, C.3, J.1).

Legend: B images, P patches, T image tokens (T = P), V vision width, D language width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmseg_llm.backbones.adapters import Lora, Trainable
from mmseg_llm.backbones.base import Backbone
from mmseg_llm.backbones.chat import TEMPLATES
from mmseg_llm.backbones.codec import CODEC_FILE, Codec, load_tokenizer, tiny_tokenizer
from mmseg_llm.backbones.coordinates import CoordinateCodec
from mmseg_llm.backbones.features import VisionFeatures, split_rows
from mmseg_llm.backbones.image_geometry import CLIP_STATISTICS, ImageGeometry
from mmseg_llm.backbones.loading import (
    cast,
    check_type,
    image_settings,
    load_stock,
    local_folder,
    misfit,
    read_settings,
    statistics,
)
from mmseg_llm.backbones.sizes import HUB_SOURCES, PIXTRAL
from mmseg_llm.backbones.visibility import check_attention

if TYPE_CHECKING:
    from torch import nn
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

    from mmseg_llm.masks import Size

# A square canvas, for heads that need one, stays at so many tokens: the longest edge of hub processors allows 4096.
MAX_SQUARE_TOKENS = 1280
# The tower lays images of a pass out in one sequence, whose attention costs the square of its length: passes of up to so many
# patches per unit of width keep that below the cost of the linear layers, which small images share.
PATCHES_PER_WIDTH = 4


class PixtralBackbone(Backbone):
    """Pixtral: a vision encoder for images of any size, two linear layers and a Mistral decoder.

    Args:
        source: name of a size of `sizes.PIXTRAL`, folder, or hub id; folders may have the layout of transformers 4.
        weights: `pretrained` loads them; `random` builds the architecture only (sizes are always random).
        template: key of `chat.TEMPLATES`; `pixtral` when None.
        max_side: longer images are scaled down to so many pixels; that of the source's image processor when None.
        attention: `sdpa`, `eager` or `flex_attention`.
        dtype: storage type of the weights.
        lora: adapters on the language model; then set `trainable.language` and `trainable.embeddings` to false.
        trainable: what trains in full.
        gradient_checkpointing: recompute activations of vision tower and language model in the backward pass.

    Raises:
        ValueError: for an unknown source, attention or template, another kind of encoder or LM, missing weights, a tokenizer
            without control tokens or of another model, or a language model with a sliding window.
    """

    def __init__(
        self,
        source: str = "pixtral-tiny",
        *,
        weights: Literal["pretrained", "random"] = "pretrained",
        template: str | None = None,
        max_side: int | None = None,
        attention: str = "sdpa",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        lora: Lora | None = None,
        trainable: Trainable | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        check_attention(attention)
        if template is not None and template not in TEMPLATES:
            raise ValueError(f"unknown chat template '{template}'; use one of {', '.join(TEMPLATES)}")
        self.source = source
        model, codec = _Builder(getattr(torch, dtype), template or "pixtral", max_side)(source, weights == "random")
        window = getattr(model.config.text_config, "sliding_window", None)
        if window is not None:
            raise ValueError(
                f"the language model of '{source}' has a sliding window of {window} tokens, which would cut a visibility; "
                "set sliding_window to null in its config"
            )
        super().__init__(
            model,
            codec,
            vision_width=model.config.vision_config.hidden_size,
            text_width=model.config.text_config.hidden_size,
            attention=attention,
            lora=lora,
            trainable=trainable,
            gradient_checkpointing=gradient_checkpointing,
        )
        name, stored = codec.template.image_context, model.config.image_token_id
        if codec.token_id(name) != stored:
            raise ValueError(
                f"the tokenizer gives {name} the id {codec.token_id(name)} but the config of '{source}' says {stored}; "
                "use the tokenizer and the config of one checkpoint"
            )

    @property
    def language_model(self) -> PreTrainedModel:
        """The decoder stack."""
        return self.model.model.language_model

    @property
    def vision_tower(self) -> nn.Module:
        """The vision encoder."""
        return self.model.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        """Two linear layers."""
        return self.model.model.multi_modal_projector

    def encode_images(self, pixels: torch.Tensor, canvas_sizes: Sequence[Size] | None = None) -> VisionFeatures:
        """Patches `(B, P, V)` behind the last layer and tokens `(B, T, D)`; small images share passes of the tower."""
        geometry = self.codec.geometry
        height, width = pixels.shape[-2:]
        sizes = [(height, width)] * len(pixels) if canvas_sizes is None else [(h, w) for h, w in canvas_sizes]
        grids = [geometry.patch_grid(size) for size in sizes]
        counts = [rows * columns for rows, columns in grids]
        trains = self.trainable.vision or self.trainable.projector
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            flat = torch.cat(
                [
                    self._tower(pixels[first:stop], sizes[first:stop])
                    for first, stop in packs(counts, PATCHES_PER_WIDTH * self.vision_width)
                ]
            )  # (sum of P, V)
            tokens = self.projector(flat)
        return VisionFeatures(split_rows(flat, counts), split_rows(tokens, counts), tuple(grids))

    def _tower(self, pixels: torch.Tensor, sizes: Sequence[Size]) -> torch.Tensor:
        """One pass of the stock tower over some images, `(sum of P, V)`."""
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        output = self.vision_tower(pixels[:, :, :height, :width], image_sizes=sizes, return_dict=True)
        return output.last_hidden_state[0]


def packs(counts: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Neighbours that share a pass, as half-open ranges: of so many patches in all, or a single larger image."""
    first, total = 0, 0
    for index, count in enumerate(counts):
        if index > first and total + count > limit:
            yield first, index
            first, total = index, 0
        total += count
    yield first, len(counts)


class _Builder:
    """Makes model and codec from any source."""

    def __init__(self, dtype: torch.dtype, template: str, max_side: int | None) -> None:
        self.dtype, self.template, self.max_side = dtype, TEMPLATES[template], max_side

    def __call__(self, source: str, is_random: bool) -> tuple[LlavaForConditionalGeneration, Codec]:
        size = source if source in PIXTRAL else HUB_SOURCES.get(source) if is_random else None
        if size in PIXTRAL:
            return self._from_size(PIXTRAL[str(size)])
        folder = local_folder(source, not is_random, list(PIXTRAL))
        return self._from_folder(source, folder, is_random)

    def _from_size(self, spec: dict[str, Any]) -> tuple[LlavaForConditionalGeneration, Codec]:
        from transformers import LlavaConfig

        tokenizer = tiny_tokenizer(self.template)
        text = dict(spec["text"])
        text["vocab_size"] = max(text["vocab_size"], len(tokenizer))
        ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        text |= {**ends, "eos_token_id": tokenizer.convert_tokens_to_ids(self.template.turn_end)}
        config = LlavaConfig(
            vision_config=spec["vision"],
            text_config=text,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_token_index=tokenizer.convert_tokens_to_ids(self.template.image_context),
            image_seq_length=1,
            tie_word_embeddings=text["tie_word_embeddings"],
        )
        return self._build(config), self._codec(tokenizer, config, None)

    def _from_folder(self, source: str, folder: Path, is_random: bool) -> tuple[LlavaForConditionalGeneration, Codec]:
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        settings = read_settings(folder)
        check_type(source, settings, ("llava",))
        for part, kind in (("vision_config", "pixtral"), ("text_config", "mistral")):
            check_type(f"{source}: {part}", settings.get(part) or {}, (kind,))
        config = LlavaConfig.from_pretrained(folder)
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        if (layer, strategy) != (-1, "full"):
            raise ValueError(
                f"{source}: vision_feature_layer is {layer} and vision_feature_select_strategy '{strategy}', but a Pixtral takes "
                "all patches of the last layer; only models trained with -1 and 'full' are read"
            )
        if (folder / CODEC_FILE).is_file():
            codec = Codec.load(folder)
            codec.geometry = self._bound(codec.geometry)
        else:
            codec = self._codec(load_tokenizer(folder), config, folder)
        if is_random:
            return self._build(config), codec
        model, foreign = load_stock(LlavaForConditionalGeneration, folder, self.dtype)
        if foreign:
            raise ValueError(misfit(folder, (), foreign))
        return model, codec

    def _build(self, config: LlavaConfig) -> LlavaForConditionalGeneration:
        from transformers import LlavaForConditionalGeneration

        model = LlavaForConditionalGeneration(copy.deepcopy(config))
        cast(model, self.dtype)
        return model

    def _codec(self, tokenizer: Any, config: LlavaConfig, folder: Path | None) -> Codec:
        vision = config.vision_config
        means = CLIP_STATISTICS | statistics(folder)
        geometry = ImageGeometry(
            (vision.patch_size, vision.patch_size), vision.patch_size, 1, **means, max_side=_stored_side(folder, vision)
        )
        return Codec(tokenizer, self._bound(geometry), self.template, CoordinateCodec(bins=1000))

    def _bound(self, geometry: ImageGeometry) -> ImageGeometry:
        """The geometry with the longest side that was asked for, and the square canvas that goes with it."""
        longest = geometry.max_side if self.max_side is None else self.max_side
        if longest is None:
            return geometry
        step = geometry.step
        side = min(longest // step, int(MAX_SQUARE_TOKENS**0.5)) * step
        return replace(geometry, image_size=(side, side), max_side=longest)


def _stored_side(folder: Path | None, vision: Any) -> int:
    """The longest side of the image processor in a folder; that of the vision config where there is none.

    Raises:
        ValueError: if the processor treats images in another way than the released ones.
    """
    stored = image_settings(folder)
    if not stored.get("do_rescale", True):
        raise ValueError(
            f"the image processor in {folder} has do_rescale set to false, as training scripts leave it that give the tower "
            "values of 0 to 255; its weights cannot be used with images of 0 to 1"
        )
    size = stored.get("size") or {}
    sides = {size[name] for name in ("longest_edge", "height", "width") if size.get(name)}
    if len(sides) > 1:
        raise ValueError(
            f"the image processor in {folder} bounds height and width apart ({size}); set size to a longest_edge"
        )
    return int(sides.pop() if sides else vision.image_size)
