"""InternVL family (2.5, 3, 3.5) on stock `InternVLForConditionalGeneration`; language models Qwen2, Qwen3 and Llama.

Sources: a size of `sizes.INTERNVL` (random weights, nothing to download), a local folder or a hub id, in the transformers layout
or in the original `internvl_chat` layout.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmseg_llm.backbones.adapters import Lora, Trainable
from mmseg_llm.backbones.base import Backbone
from mmseg_llm.backbones.chat import TEMPLATES, ChatTemplate
from mmseg_llm.backbones.codec import CODEC_FILE, Codec, load_tokenizer, tiny_tokenizer
from mmseg_llm.backbones.features import VisionFeatures
from mmseg_llm.backbones.image_geometry import ImageGeometry
from mmseg_llm.backbones.internvl_layout import convert_config, convert_state_dict
from mmseg_llm.backbones.loading import (
    cast,
    check_type,
    load_stock,
    local_folder,
    misfit,
    read_settings,
    read_shards,
    statistics,
)
from mmseg_llm.backbones.sizes import HUB_SOURCES, INTERNVL
from mmseg_llm.backbones.visibility import check_attention

if TYPE_CHECKING:
    from torch import nn
    from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedModel

    from mmseg_llm.masks import Size


class InternVLBackbone(Backbone):
    """InternVL at one fixed image size, without tiling.

    Args:
        source: name of a size, folder, or hub id.
        weights: `pretrained` loads them; `random` builds the architecture only (sizes are always random).
        template: chat template of the checkpoint, a key of `chat.TEMPLATES`.
        attention: `sdpa`, `eager` or `flex_attention`.
        dtype: storage type of the weights.
        lora: adapters on the language model; then set `trainable.language` and `trainable.embeddings` to false.
        trainable: what trains in full.
        gradient_checkpointing: recompute activations of vision tower and language model in the backward pass.

    Raises:
        ValueError: for an unknown source, attention or template, missing weights, or a tokenizer without control tokens.
    """

    def __init__(
        self,
        source: str = "internvl-tiny",
        *,
        weights: Literal["pretrained", "random"] = "pretrained",
        template: str = "internvl2_5",
        attention: str = "sdpa",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        lora: Lora | None = None,
        trainable: Trainable | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        check_attention(attention)
        if template not in TEMPLATES:
            raise ValueError(f"unknown chat template '{template}'; use one of {', '.join(TEMPLATES)}")
        self.source = source
        model, codec = _Builder(getattr(torch, dtype), TEMPLATES[template])(source, weights == "random")
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

    @property
    def language_model(self) -> PreTrainedModel:
        """The decoder stack."""
        return self.model.model.language_model

    @property
    def vision_tower(self) -> nn.Module:
        """InternViT."""
        return self.model.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        """Norm and two linear layers behind the pixel unshuffle."""
        return self.model.model.multi_modal_projector

    def encode_images(self, pixels: torch.Tensor, canvas_sizes: Sequence[Size] | None = None) -> VisionFeatures:
        """One pass of the vision tower: patch tokens `(B, P, V)` without CLS, projected tokens `(B, T, D)`."""
        trains = self.trainable.vision or self.trainable.projector
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            output = self.model.model.get_image_features(pixel_values=pixels, return_dict=True)
        side = math.isqrt(output.pooler_output.shape[1])
        return VisionFeatures(output.last_hidden_state[:, 1:], output.pooler_output, ((side, side),) * len(pixels))


class _Builder:
    """Makes model and codec from any source."""

    def __init__(self, dtype: torch.dtype, template: ChatTemplate) -> None:
        self.dtype, self.template = dtype, template

    def __call__(self, source: str, is_random: bool) -> tuple[InternVLForConditionalGeneration, Codec]:
        size = source if source in INTERNVL else HUB_SOURCES.get(source) if is_random else None
        if size is not None:
            return self._from_size(size)
        folder = local_folder(source, not is_random, list(INTERNVL))
        settings = read_settings(folder)
        if check_type(source, settings, ("internvl", "internvl_chat")) == "internvl_chat":
            return self._from_chat(folder, settings, is_random)
        return self._from_transformers(folder, is_random)

    def _build(self, config: InternVLConfig) -> InternVLForConditionalGeneration:
        from transformers import InternVLForConditionalGeneration

        model = InternVLForConditionalGeneration(copy.deepcopy(config))
        cast(model, self.dtype)
        return model

    def _from_size(self, size: str) -> tuple[InternVLForConditionalGeneration, Codec]:
        from transformers import InternVLConfig

        spec = INTERNVL[size]
        tokenizer = tiny_tokenizer(self.template)
        text = dict(spec["text"])
        if text["vocab_size"] < len(tokenizer):
            text["vocab_size"] = len(tokenizer)
        codec = self._codec(tokenizer, spec["vision"]["image_size"], spec["vision"]["patch_size"], 0.5)
        config = InternVLConfig(
            vision_config=spec["vision"],
            text_config=text,
            image_token_id=codec.token_id(codec.template.image_context),
            image_seq_length=codec.geometry.num_tokens(),
            tie_word_embeddings=False,
        )
        model = self._build(config)
        _init_positions(model, codec.geometry.patch_grid())
        return model, codec

    def _from_transformers(self, folder: Path, is_random: bool) -> tuple[InternVLForConditionalGeneration, Codec]:
        from transformers import InternVLConfig, InternVLForConditionalGeneration

        config = InternVLConfig.from_pretrained(folder)
        if is_random:
            model = self._build(config)
        else:
            model, _ = load_stock(InternVLForConditionalGeneration, folder, self.dtype)
        if (folder / CODEC_FILE).is_file():
            return model, Codec.load(folder)
        vision = config.vision_config
        return model, self._codec(
            load_tokenizer(folder), vision.image_size[0], vision.patch_size[0], config.downsample_ratio, folder
        )

    def _from_chat(
        self, folder: Path, settings: dict[str, Any], is_random: bool
    ) -> tuple[InternVLForConditionalGeneration, Codec]:
        from transformers import InternVLConfig

        arguments = convert_config(settings)
        vision = arguments["vision_config"]
        codec = self._codec(
            load_tokenizer(folder), vision["image_size"], vision["patch_size"], arguments["downsample_ratio"], folder
        )
        context = codec.token_id(codec.template.image_context)
        config = InternVLConfig(**arguments, image_token_id=context, image_seq_length=codec.geometry.num_tokens())
        model = self._build(config)
        if not is_random:
            state = {key: value for shard in read_shards(folder) for key, value in shard.items()}
            converted, rest = convert_state_dict(state, config)
            result = model.load_state_dict({k: v.to(self.dtype) for k, v in converted.items()}, strict=False)
            if result.missing_keys or result.unexpected_keys:
                raise ValueError(misfit(folder, result.missing_keys, result.unexpected_keys))
            if rest:
                import warnings

                warnings.warn(f"{folder}: {len(rest)} tensors that belong to a head were not read here", stacklevel=2)
        return model, codec

    def _codec(self, tokenizer: Any, image_size: int, patch: int, ratio: float, folder: Path | None = None) -> Codec:
        geometry = ImageGeometry((image_size, image_size), patch, round(1 / ratio), **statistics(folder))
        template = self.template
        # InternLM2 tokenizers open the sequence with <s>; Qwen2 ones have no such token.
        if tokenizer.convert_tokens_to_ids("<s>") not in (None, tokenizer.unk_token_id):
            template = replace(template, bos="<s>")
        return Codec(tokenizer, geometry, template)


def _init_positions(model: InternVLForConditionalGeneration, grid: tuple[int, int]) -> None:
    """Start random models from 2-D sine-cosine positions: zeros, the stock init, cost a from-scratch run many epochs."""
    positions = model.model.vision_tower.embeddings.position_embeddings
    if positions.is_meta:
        return
    quarter = positions.shape[-1] // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter) / quarter)
    angles = [torch.arange(n)[:, None] * omega for n in grid]  # (rows, quarter), (columns, quarter)
    rows, columns = (torch.cat([angle.sin(), angle.cos()], -1) for angle in angles)
    table = torch.cat([rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)], -1)
    with torch.no_grad():
        positions[0, 1:] = 0.1 * table.flatten(0, 1).to(positions.dtype)
