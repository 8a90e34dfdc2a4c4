"""Tiny models with random weights that the backbone and head tests share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mmseg_llm.backbones.collate import collate
from mmseg_llm.backbones.internvl import InternVLBackbone
from mmseg_llm.data.synthetic import make_scene
from mmseg_llm.heads.mask_decoder.head import MaskDecoderHead
from mmseg_llm.model import PerceptionModel
from mmseg_llm.structures import Batch, Sample

FAMILIES = ("internvl-tiny", "internvl-tiny-qwen3", "internvl-tiny-llama")


def scenes(*indices: int) -> list[Sample]:
    """Flat scenes of 96 x 96 pixels with four expressions each; number 7 has one without a target."""
    return [make_scene("flat-96", 0, index).to_sample() for index in indices]


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


def make_batch(model: PerceptionModel, samples: Sequence[Sample], seed: int = 0) -> Batch:
    """The samples as the first head trains on them."""
    head, codec = model.head(), model.backbone.codec
    rng = np.random.default_rng(seed)
    return collate([head.build(sample, codec, rng) for sample in samples], codec, head.label_padding)


def stock_states(backbone: InternVLBackbone, ids: Sequence[int], pixels: torch.Tensor) -> torch.Tensor:
    """States `(N, D)` of one plain sequence, by the stock transformers model alone."""
    return backbone.model.model(input_ids=torch.tensor([list(ids)]), pixel_values=pixels[None]).last_hidden_state[0]
