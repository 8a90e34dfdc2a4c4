"""Small SAM networks with random weights, and the key names that `transformers` gives to the official ones."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from golden_files import weights
from PIL import Image
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from mmseg_llm.segmenters import SamEngine, SegmentAnythingEngine, TransformersSamEngine
from mmseg_llm.segmenters.sam_engine import MEAN, STD
from mmseg_llm.segmenters.sam_transformers import ATTENTION_NORM_EPS

# Official parts of a key and what they are called in SamModel.
RENAMES = (
    ("output_upscaling.0.", "upscale_conv1."),
    ("output_upscaling.1.", "upscale_layer_norm."),
    ("output_upscaling.3.", "upscale_conv2."),
    ("mask_downscaling.0.", "mask_embed.conv1."),
    ("mask_downscaling.1.", "mask_embed.layer_norm1."),
    ("mask_downscaling.3.", "mask_embed.conv2."),
    ("mask_downscaling.4.", "mask_embed.layer_norm2."),
    ("mask_downscaling.6.", "mask_embed.conv3."),
    ("point_embeddings.", "point_embed."),
    ("pe_layer.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    (".norm", ".layer_norm"),
)


def transformers_key(key: str) -> str:
    """Name of an official prompt encoder or mask decoder parameter in `SamModel`."""
    for old, new in RENAMES:
        key = key.replace(old, new)
    if "output_hypernetworks_mlps." in key or "iou_prediction_head." in key:
        for old, new in (("layers.0.", "proj_in."), ("layers.2.", "proj_out."), ("layers.1.", "layers.0.")):
            if old in key:
                return key.replace(old, new)
    return key


class Stub(nn.Module):
    """Stands for an image encoder that is never run."""

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.img_size = img_size


def prompt_and_decoder(width: int, grid: int, heads: int = 8, mlp: int = 2048, iou_hidden: int = 256, chans: int = 16):
    """Official prompt encoder and mask decoder for a `grid` x `grid` embedding of patches of 16 pixels."""
    prompt = PromptEncoder(width, (grid, grid), (16 * grid, 16 * grid), chans)
    transformer = TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=mlp, num_heads=heads)
    decoder = MaskDecoder(transformer_dim=width, transformer=transformer, iou_head_hidden_dim=iou_hidden)
    return prompt, decoder


def make_sam(image_side: int = 128, width: int = 32) -> Sam:
    """A complete official SAM whose masks are neither empty nor full."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        grid = image_side // 16
        encoder = ImageEncoderViT(
            img_size=image_side,
            embed_dim=32,
            depth=2,
            num_heads=2,
            out_chans=width,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=4,
            global_attn_indexes=(1,),
        )
        prompt, decoder = prompt_and_decoder(width, grid, heads=2, mlp=64, iou_hidden=32)
        sam = Sam(encoder, prompt, decoder, list(MEAN), list(STD))
        for name, parameter in sam.named_parameters():
            if "pos_embed" in name or "rel_pos" in name:
                nn.init.normal_(parameter, std=0.02)
    return sam.eval()


def make_transformers_sam(config: SimpleNamespace, state: dict[str, torch.Tensor]) -> nn.Module:
    """`SamModel` with an image encoder too small to matter and official prompt encoder and decoder weights."""
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    side = config.image_side
    vision = SamVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, output_channels=config.width, image_size=side,
        num_pos_feats=config.width // 2, mlp_dim=16, global_attn_indexes=[], window_size=2,
    )  # fmt: skip
    prompt = SamPromptEncoderConfig(
        hidden_size=config.width, image_size=side, image_embedding_size=side // 16, mask_input_channels=config.chans
    )
    decoder = SamMaskDecoderConfig(
        hidden_size=config.width, mlp_dim=config.mlp, num_hidden_layers=2, num_attention_heads=config.heads,
        iou_head_depth=3, iou_head_hidden_dim=config.iou_hidden, layer_norm_eps=ATTENTION_NORM_EPS,
    )  # fmt: skip
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    renamed = {transformers_key(key): value for key, value in state.items()}
    renamed["shared_image_embedding.positional_embedding"] = renamed[
        "prompt_encoder.shared_embedding.positional_embedding"
    ]
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected, unexpected
    assert all(key.startswith("vision_encoder.") for key in missing), missing
    return model.eval()


def make_sam2() -> nn.Module:
    """A tiny SAM 2 with random weights for images of 64 x 64 pixels."""
    from transformers import (
        Sam2Config,
        Sam2HieraDetConfig,
        Sam2MaskDecoderConfig,
        Sam2Model,
        Sam2PromptEncoderConfig,
        Sam2VisionConfig,
    )

    backbone = Sam2HieraDetConfig(
        hidden_size=8, image_size=[64, 64], blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2], window_size_per_stage=[4, 2, 4, 2], global_attention_blocks=[3],
    )  # fmt: skip
    vision = Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=32,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )  # fmt: skip
    prompt = Sam2PromptEncoderConfig(hidden_size=32, image_size=64)
    decoder = Sam2MaskDecoderConfig(hidden_size=32, mlp_dim=64, num_attention_heads=2, iou_head_hidden_dim=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
        model = Sam2Model(config)
        for parameter in model.parameters():  # as they are drawn, prompts hardly reach the masks
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.eval()


SAM, SAM2 = make_sam(), make_sam2()


def make_image(height: int = 90, width: int = 120) -> Image.Image:
    """Coloured patches that the seed fixes."""
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (height // 6, width // 6, 3), np.uint8)).resize((width, height))


def make_logits(count: int = 3) -> torch.Tensor:
    """Coarse maps of 5 x 7 cells: blocks of different places, the second one covers everything."""
    logits = torch.full((count, 5, 7), -4.0)
    for row in range(count):
        logits[row, row % 3 : row % 3 + 2, row % 4 : row % 4 + 3] = 3.0
    if count > 1:
        logits[1] = 2.0
    return logits


def make_engine(kind: str) -> SamEngine:
    """A tiny SAM in either library, with the same weights, or a tiny SAM 2."""
    if kind == "segment_anything":
        return SegmentAnythingEngine.of(SAM)
    if kind == "sam2":
        return TransformersSamEngine.of(SAM2)
    sizes = SimpleNamespace(image_side=128, width=32, heads=2, mlp=64, iou_hidden=32, chans=16)
    state = {key: value for key, value in SAM.state_dict().items() if not key.startswith("image_encoder.")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TransformersSamEngine.of(make_transformers_sam(sizes, state))


def error_of(actual, expected: torch.Tensor) -> float:
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max())


def golden_engine(library: str, meta: dict) -> SamEngine:
    """The golden's prompt encoder and mask decoder in either library; there is no image encoder."""
    config, state = meta["config"], weights(meta)
    side = max(config["resized"])
    sizes = SimpleNamespace(
        image_side=side,
        width=config["embed_dim"],
        heads=config["heads"],
        mlp=config["mlp_dim"],
        iou_hidden=config["iou_head_hidden_dim"],
        chans=config["mask_in_chans"],
    )
    if library == "transformers":
        return TransformersSamEngine.of(make_transformers_sam(sizes, state))
    prompt, decoder = prompt_and_decoder(sizes.width, side // 16, sizes.heads, sizes.mlp, sizes.iou_hidden, sizes.chans)
    sam = Sam(Stub(side), prompt, decoder)
    sam.load_state_dict(state, strict=True)
    return SegmentAnythingEngine.of(sam)
