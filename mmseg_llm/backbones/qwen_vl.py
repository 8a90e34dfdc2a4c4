"""Qwen-VL families (Qwen2-VL, Qwen2.5-VL, Qwen3-VL) on the stock transformers classes: dynamic resolution and M-RoPE.

The canvas of an image keeps its aspect ratio; its tokens, one per 2 x 2 patches, have places on a time and two grid axes.
Qwen2.5-VL attends within windows of the image in most vision layers, Qwen3-VL adds vision features behind its first language
layers (DeepStack); both are the stock models' own affair.

Legend: B images, P patches, p side of a patch, m patches per token and axis, T image tokens, V vision width, D language width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
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
from mmseg_llm.backbones.image_geometry import CLIP_STATISTICS, HALF_STATISTICS, ImageGeometry
from mmseg_llm.backbones.loading import (
    cast,
    check_type,
    image_settings,
    load_stock,
    local_folder,
    read_settings,
    statistics,
)
from mmseg_llm.backbones.sizes import HUB_SOURCES, QWEN_VL
from mmseg_llm.backbones.visibility import check_attention

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from mmseg_llm.masks import Size

# A square canvas, for heads that need one, stays at what STAMP trains with: hub processors allow 16384 tokens.
MAX_SQUARE_TOKENS = 1280

# Of each family: chat template, how it writes coordinates, channel statistics.
FAMILIES: dict[str, tuple[str, CoordinateCodec, dict[str, Any]]] = {
    "qwen2_vl": ("qwen2_vl", CoordinateCodec(bins=1000), CLIP_STATISTICS),
    "qwen2_5_vl": ("qwen2_vl", CoordinateCodec(bins=0), CLIP_STATISTICS),
    "qwen3_vl": ("qwen3_vl", CoordinateCodec(bins=1000), HALF_STATISTICS),
}


class QwenVLBackbone(Backbone):
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL; the family is that of the source.

    Args:
        source: name of a size, folder, or hub id.
        weights: `pretrained` loads them; `random` builds the architecture only (sizes are always random).
        template: key of `chat.TEMPLATES`; that of the family when None.
        min_pixels, max_pixels: bounds on the area of a canvas. STAMP trains with 802816 (1024 tokens of 28 x 28 pixels) and
            1003520 (1280), and evaluates with 802816 for both (specification 1.2).
        attention: `sdpa`, `eager` or `flex_attention`.
        dtype: storage type of the weights.
        lora: adapters on the language model; then set `trainable.language` and `trainable.embeddings` to false.
        trainable: what trains in full.
        gradient_checkpointing: recompute activations of vision tower and language model in the backward pass.

    Raises:
        ValueError: for an unknown source, attention or template, missing weights, a tokenizer without control tokens, or rotary
            positions that differ from the stock model's own.
    """

    def __init__(
        self,
        source: str = "qwen2_vl-tiny",
        *,
        weights: Literal["pretrained", "random"] = "pretrained",
        template: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
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
        build = _Builder(getattr(torch, dtype), template, (min_pixels, max_pixels))
        model, codec = build(source, weights == "random")
        vision = model.config.vision_config
        super().__init__(
            model,
            codec,
            vision_width=getattr(vision, "embed_dim", None) or vision.hidden_size,
            text_width=model.config.text_config.hidden_size,
            attention=attention,
            lora=lora,
            trainable=trainable,
            gradient_checkpointing=gradient_checkpointing,
        )
        if model.device.type != "meta":
            self._check_positions()

    @property
    def language_model(self) -> PreTrainedModel:
        """The decoder stack."""
        return self.model.model.language_model

    @property
    def vision_tower(self) -> nn.Module:
        """The vision transformer, its merger included."""
        return self.model.model.visual

    @property
    def projector(self) -> nn.Module:
        """The merger: 2 x 2 patches to one token of the language width."""
        return self.model.model.visual.merger

    def encode_images(self, pixels: torch.Tensor, canvas_sizes: Sequence[Size] | None = None) -> VisionFeatures:
        """One pass of the vision tower over all images, whatever their sizes."""
        geometry = self.codec.geometry
        sizes = [tuple(pixels.shape[-2:])] * len(pixels) if canvas_sizes is None else list(canvas_sizes)
        grids = [geometry.patch_grid(size) for size in sizes]  # type: ignore[arg-type]
        patches = patchify(pixels, sizes, geometry.patch, geometry.merge)  # type: ignore[arg-type]
        grid_thw = torch.tensor([(1, *grid) for grid in grids], device=pixels.device)
        trains = self.trainable.vision or self.trainable.projector
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            output = self.model.model.get_image_features(patches, grid_thw, return_dict=True)
        order = torch.cat([raster_order(grid, geometry.merge, self._window) + start for grid, start in _starts(grids)])
        counts = [rows * columns for rows, columns in grids]
        token_counts = [count // geometry.merge**2 for count in counts]
        return VisionFeatures(
            patches=split_rows(output.last_hidden_state[order.to(pixels.device)], counts),
            tokens=split_rows(_flat(output.pooler_output), token_counts),
            grids=tuple(geometry.token_grid(size) for size in sizes),  # type: ignore[arg-type]
            deep=tuple(
                split_rows(_flat(layer), token_counts) for layer in getattr(output, "deepstack_features", None) or ()
            ),
        )

    @property
    def _window(self) -> int | None:
        """Side of an attention window in tokens, where the tower orders its patches by windows (Qwen2.5-VL)."""
        config = self.model.config.vision_config
        size = getattr(config, "window_size", None)
        return None if size is None else size // config.spatial_merge_size // config.patch_size

    def deep_arguments(
        self, features: VisionFeatures, image_positions: torch.Tensor, num_tokens: int
    ) -> dict[str, Any]:
        """DeepStack: where the image tokens are, and what is added to them behind each of the first layers."""
        if not features.deep:
            return {}
        is_token = image_positions >= 0  # (B, T)
        mask = torch.zeros(len(image_positions), num_tokens + 1, dtype=torch.bool, device=image_positions.device)
        mask.scatter_(1, image_positions.masked_fill(~is_token, num_tokens), True)
        return {
            "visual_pos_masks": mask[:, :-1],
            "deepstack_visual_embeds": [layer[is_token] for layer in features.deep],
        }

    def _check_positions(self) -> None:
        """Assert that our rotary positions are those the stock model derives from `mm_token_type_ids`.

        Raises:
            ValueError: if they are not, as after a change of the installed transformers.
        """
        geometry = self.codec.geometry
        name, stored = self.codec.template.image_context, self.model.config.image_token_id
        if self.codec.token_id(name) != stored:
            raise ValueError(
                f"the tokenizer gives {name} the id {self.codec.token_id(name)} but the config of '{self.source}' says "
                f"{stored}; use the tokenizer and the config of one checkpoint"
            )
        size = (2 * geometry.step, 3 * geometry.step)
        ids = self.codec.image_prefix(size) + self.codec.question("a")
        ours, following = self.codec.positions(ids, size)
        tensor = torch.tensor([ids])
        kinds = (tensor == self.model.config.image_token_id).int()  # 0 text, 1 image
        grid = torch.tensor([(1, *geometry.patch_grid(size))])
        stock, delta = self.model.model.get_rope_index(tensor, mm_token_type_ids=kinds, image_grid_thw=grid)
        if stock[:, 0].tolist() != ours.tolist() or len(ids) + int(delta) != following:
            raise ValueError(
                "the installed transformers numbers image tokens differently from this library's M-RoPE; "
                "install a version that this release was tested with (see pyproject.toml)"
            )


def _flat(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Token features of all images in one tensor, whether or not the stock model split them by image."""
    return features if isinstance(features, torch.Tensor) else torch.cat(tuple(features))


def patchify(pixels: torch.Tensor, sizes: Sequence[Size], patch: int, merge: int) -> torch.Tensor:
    """Canvases as the flat patches the towers take: every frame twice in time, the patches of a token next to each other.

    Args:
        pixels: `(B, 3, h, w)`, canvases in the upper left corners.
        sizes: of the canvases.
        patch, merge: p and m.

    Returns:
        `(sum of P, 3 * 2 * p * p)`.
    """
    if len(set(sizes)) == 1:
        return _patchify(pixels[..., : sizes[0][0], : sizes[0][1]], patch, merge).flatten(0, 1)
    rows = [_patchify(image[None, :, :h, :w], patch, merge)[0] for image, (h, w) in zip(pixels, sizes, strict=True)]
    return torch.cat(rows)


def _patchify(pixels: torch.Tensor, patch: int, merge: int) -> torch.Tensor:
    batch, channels, height, width = pixels.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    cut = pixels.reshape(batch, channels, rows, merge, patch, columns, merge, patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (B, rows, columns, m, m, 3, p, p)
    twice = cut[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return twice.reshape(batch, rows * columns * merge**2, -1)


def raster_order(grid: Size, merge: int, window: int | None = None) -> torch.Tensor:
    """Where the patches of a `(rows, columns)` grid, in raster order, lie in the output of a tower; int64 `(P,)`.

    Towers keep the m x m patches of a token together, tokens in raster order or, with windows, window after window.
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    row, column = rows // merge, columns // merge  # of the token
    keys = [row, column, rows % merge, columns % merge]
    if window is not None:
        keys = [row // window, column // window, *keys]
    code = torch.zeros_like(rows)
    for key in keys:
        code = code * (max(grid) + 1) + key
    return code.flatten().argsort().argsort()


def _starts(grids: Sequence[Size]) -> list[tuple[Size, int]]:
    """Each grid with the index of its first patch."""
    start, out = 0, []
    for grid in grids:
        out.append((grid, start))
        start += grid[0] * grid[1]
    return out


class _Builder:
    """Makes model and codec from any source."""

    def __init__(self, dtype: torch.dtype, template: str | None, pixels: tuple[int | None, int | None]) -> None:
        self.dtype, self.template, self.pixels = dtype, template, pixels

    def __call__(self, source: str, is_random: bool) -> tuple[PreTrainedModel, Codec]:
        size = source if source in QWEN_VL else HUB_SOURCES.get(source) if is_random else None
        if size is not None:
            return self._from_size(QWEN_VL[size])
        folder = local_folder(source, not is_random, list(QWEN_VL))
        family = check_type(source, read_settings(folder), tuple(FAMILIES))
        config_class, model_class = _stock(family)
        config = config_class.from_pretrained(folder)
        if is_random:
            model = self._build(model_class, config)
        else:
            model, _ = load_stock(model_class, folder, self.dtype)
        if (folder / CODEC_FILE).is_file():
            codec = Codec.load(folder)
            codec.geometry = self._bound(codec.geometry)
            return model, codec
        return model, self._codec(family, config, load_tokenizer(folder), folder)

    def _build(self, model_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
        model = model_class(copy.deepcopy(config))
        cast(model, self.dtype)
        return model

    def _from_size(self, spec: dict[str, Any]) -> tuple[PreTrainedModel, Codec]:
        config_class, model_class = _stock(spec["family"])
        tokenizer = tiny_tokenizer(TEMPLATES[self.template or FAMILIES[spec["family"]][0]])
        text = dict(spec["text"])
        text["vocab_size"] = max(text["vocab_size"], len(tokenizer))
        text |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        names = {"image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>"}
        names |= {"vision_end_token_id": "<|vision_end|>"}
        ids = {key: tokenizer.convert_tokens_to_ids(name) for key, name in names.items()}
        config = config_class(
            vision_config=spec["vision"],
            text_config=text,
            video_token_id=text["vocab_size"],  # an id that no token has: there is no video here
            tie_word_embeddings=text["tie_word_embeddings"],
            **ids,
        )
        model = self._build(model_class, config)
        return model, self._codec(spec["family"], config, tokenizer, None, spec.get("pixels"))

    def _codec(
        self,
        family: str,
        config: PreTrainedConfig,
        tokenizer: Any,
        folder: Path | None,
        default_pixels: tuple[int, int] | None = None,
    ) -> Codec:
        template, coordinates, means = FAMILIES[family]
        patch, merge = config.vision_config.patch_size, config.vision_config.spatial_merge_size
        if default_pixels is None:
            default_pixels = _stored_pixels(folder, (patch * merge) ** 2)
        low, high = default_pixels
        side = patch * merge
        means = {**means, **statistics(folder)}
        geometry = self._bound(ImageGeometry((side, side), patch, merge, **means, min_pixels=low, max_pixels=high))
        return Codec(tokenizer, geometry, TEMPLATES[self.template or template], coordinates, rope_axes=3)

    def _bound(self, geometry: ImageGeometry) -> ImageGeometry:
        """The geometry with the pixel bounds that were asked for, and the square canvas that goes with them."""
        stored = (geometry.min_pixels, geometry.max_pixels)
        low, high = (own if given is None else given for own, given in zip(stored, self.pixels))
        if high is None:
            return geometry
        side = int(min(high, MAX_SQUARE_TOKENS * geometry.step**2) ** 0.5) // geometry.step * geometry.step
        return replace(geometry, image_size=(side, side), min_pixels=low, max_pixels=high)


def _stored_pixels(folder: Path | None, area: int) -> tuple[int, int]:
    """Pixel bounds of the image processor in a folder; STAMP's training bounds, 1024 to 1280 tokens, where there is none."""
    stored = image_settings(folder)
    size = stored.get("size") or {}
    low = stored.get("min_pixels") or size.get("min_pixels") or size.get("shortest_edge") or 1024 * area
    high = stored.get("max_pixels") or size.get("max_pixels") or size.get("longest_edge") or 1280 * area
    return int(low), int(high)


def _stock(family: str) -> tuple[Any, Any]:
    """Config and model class of a family."""
    import transformers

    stem = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    return getattr(transformers, f"{stem}Config"), getattr(transformers, f"{stem}ForConditionalGeneration")
