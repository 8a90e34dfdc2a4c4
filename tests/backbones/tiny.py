"""Tiny models with random weights that the backbone and head tests share."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from mmseg_llm import backbones
from mmseg_llm.backbones import sizes
from mmseg_llm.backbones.base import Backbone
from mmseg_llm.backbones.collate import collate
from mmseg_llm.backbones.internvl import InternVLBackbone
from mmseg_llm.data.synthetic import make_scene
from mmseg_llm.heads.mask_decoder.head import MaskDecoderHead
from mmseg_llm.masks import Mask
from mmseg_llm.model import PerceptionModel
from mmseg_llm.structures import Batch, Sample

FAMILIES = ("internvl-tiny", "internvl-tiny-qwen3", "internvl-tiny-llama")


def scenes(*indices: int) -> list[Sample]:
    """Flat scenes of 96 x 96 pixels with four expressions each; number 7 has one without a target."""
    return [make_scene("flat-96", 0, index).to_sample() for index in indices]


def resized(sample: Sample, size: tuple[int, int]) -> Sample:
    """The scene, its masks included, as an image of `size` `(h, w)`."""

    def resize(mask: Mask) -> Mask:
        return Mask.from_array(np.asarray(Image.fromarray(mask.array).resize(size[::-1], Image.Resampling.NEAREST)))

    queries = tuple(
        replace(q, masks=None if q.masks is None else tuple(map(resize, q.masks)), boxes=None) for q in sample.queries
    )
    return replace(sample, image=sample.load_image().resize(size[::-1]), size=size, queries=queries)


def tables() -> dict[str, dict]:
    """The tables of `mmseg_llm.backbones.sizes` that name whole models, which have tiny ones among them."""
    found = {name: table for name, table in vars(sizes).items() if name.isupper() and isinstance(table, dict)}
    return {name: table for name, table in found.items() if any("tiny" in size for size in table)}


def tiny_sizes() -> dict[str, type[Backbone]]:
    """Every tiny size, with the adapter whose module takes the table it is in."""
    owners = {}
    for name in backbones.__all__:
        adapter = getattr(backbones, name)
        module = importlib.import_module(adapter.__module__)
        for table in tables().values():
            if any(value is table for value in vars(module).values()):
                owners |= {size: adapter for size in table if "tiny" in size}
    return owners


def make_model(source: str = "internvl-tiny", head: MaskDecoderHead | None = None, **settings) -> PerceptionModel:
    """A tiny model in eval mode whose answers are not trivial: `[SEG]` often wins, `[REJ]` sometimes."""
    torch.manual_seed(0)
    head = head or MaskDecoderHead(width=64, heads=4, max_new_tokens=8)
    model = PerceptionModel(InternVLBackbone(source, **settings), {"mask_decoder": head})
    lm_head = model.backbone.lm_head
    if "lora" not in settings:
        with torch.no_grad():
            for token, scale in (("[SEG]", 0.08), ("[REJ]", 0.06)):
                lm_head.weight[model.backbone.codec.token_id(token)].normal_(std=scale)
    return model.eval()


def make_batch(model: PerceptionModel, samples: Sequence[Sample], seed: int = 0, name: str | None = None) -> Batch:
    """The samples as a head trains on them, the first one when no name is given."""
    head, codec = model.head(name), model.backbone.codec
    rng = np.random.default_rng(seed)
    return collate([head.build(sample, codec, rng) for sample in samples], codec, head.label_padding)


def stock_inputs(backbone: Backbone, ids: Sequence[int], pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """One plain sequence with one image `(3, h, w)`, as the stock transformers model takes it."""
    tensor = torch.tensor([list(ids)])
    if backbone.codec.rope_axes == 1:
        return {"input_ids": tensor, "pixel_values": pixels[None]}
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    geometry = backbone.codec.geometry
    done = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    processor = Qwen2VLImageProcessorPil(patch_size=geometry.patch, merge_size=geometry.merge, **done)
    images = processor(pixels.numpy(), input_data_format="channels_first", return_tensors="pt")
    kinds = (tensor == backbone.model.config.image_token_id).int()
    return {"input_ids": tensor, "mm_token_type_ids": kinds, **images}


def stock_states(backbone: Backbone, ids: Sequence[int], pixels: torch.Tensor, **settings) -> torch.Tensor:
    """States `(N, D)` of one plain sequence, by the stock transformers model alone."""
    return backbone.model.model(**stock_inputs(backbone, ids, pixels), **settings).last_hidden_state[0]
