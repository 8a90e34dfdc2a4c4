"""SAM and SAM 2 by `transformers`. Nothing is imported, fetched or loaded before the first image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmseg_llm.segmenters.base import RefineError
from mmseg_llm.segmenters.sam_engine import SamEngine, summary

if TYPE_CHECKING:
    import torch
    from PIL import Image

# SAM's decoder was trained with PyTorch's default in its attention blocks; `transformers` defaults to 1e-6 there.
ATTENTION_NORM_EPS = 1e-5

# SAM 2 feeds previous masks back cut to this range.
SAM2_LOGIT_LIMIT = 32.0
SAM2_PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")


class TransformersSamEngine(SamEngine):
    """SAM or SAM 2 / 2.1 by `transformers`; which of them is read from the checkpoint's `config.json`.

    Args:
        model: local folder or hub id, such as `facebook/sam-vit-huge` or `facebook/sam2.1-hiera-tiny`.
        device: a GPU where there is one when None.
    """

    def __init__(self, model: str = "facebook/sam2.1-hiera-tiny", device: str | None = None) -> None:
        super().__init__(device)
        self.model = model

    @classmethod
    def of(cls, module: torch.nn.Module, device: str = "cpu") -> TransformersSamEngine:
        """An engine around a `SamModel` (build it with `ATTENTION_NORM_EPS`) or `Sam2Model` that is built already."""
        engine = cls(device=device)
        engine._know(module)
        engine.module = module.eval().requires_grad_(False).to(engine.device)
        return engine

    def _know(self, module: Any) -> None:
        """SAM 2 stretches the image, SAM keeps its aspect ratio."""
        self.is_stretched = module.config.model_type.startswith("sam2")

    @property
    def image_side(self) -> int:
        """S, 1024 for the released models."""
        return int(self.module.config.prompt_encoder_config.image_size)

    @property
    def mask_side(self) -> int:
        """Side s, 256 for the released models."""
        return 4 * int(self.module.prompt_encoder.image_embedding_size[0])

    def _load(self) -> torch.nn.Module:
        from transformers import AutoConfig, PreTrainedConfig, Sam2Config, Sam2Model, SamModel

        hint = "give a folder or hub id such as facebook/sam2.1-hiera-tiny, and check the connection to the hub"
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise RefineError(f"SAM model '{self.model}' cannot be read ({summary(error)}); {hint}") from error
        if config.model_type == "sam":
            network = SamModel
            config.mask_decoder_config.layer_norm_eps = ATTENTION_NORM_EPS
        elif config.model_type in {"sam2", "sam2_video"}:  # released as video models, whose image part is a Sam2Model
            network = Sam2Model
            config = Sam2Config(**{part: getattr(config, part).to_dict() for part in SAM2_PARTS})
        else:
            raise RefineError(f"'{self.model}' is a '{config.model_type}' model, not SAM or SAM 2; {hint}")
        try:
            module, info = network.from_pretrained(self.model, config=config, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise RefineError(f"SAM model '{self.model}' cannot be loaded ({summary(error)}); {hint}") from error
        if info["missing_keys"]:
            raise RefineError(f"SAM model '{self.model}' lacks the weights {sorted(info['missing_keys'])[:3]}; {hint}")
        self._know(module)
        return module

    def embed(self, image: Image.Image) -> list[torch.Tensor]:
        """Feature maps of one image, each `(1, C, h, w)`: one for SAM, three for SAM 2."""
        features = self.module.get_image_embeddings(self.pixels(image))
        return list(features) if self.is_stretched else [features]

    def decode_candidates(
        self,
        embedding: Any,
        *,
        points: torch.Tensor | None,
        labels: torch.Tensor | None,
        boxes: torch.Tensor | None,
        masks: torch.Tensor | None,
        is_multimask: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SamEngine.decode_candidates`. Each prompt is a row: both models add a mask prompt per image, not per prompt."""
        asked = points if points is not None else boxes
        assert asked is not None
        maps = [features.expand(len(asked), -1, -1, -1) for features in embedding]
        if masks is not None and self.is_stretched:
            masks = masks.clamp(-SAM2_LOGIT_LIMIT, SAM2_LOGIT_LIMIT)
        output = self.module(
            image_embeddings=maps if self.is_stretched else maps[0],
            input_points=None if points is None else points[:, None],  # (B, 1, P, 2)
            input_labels=None if labels is None else labels[:, None],
            input_boxes=None if boxes is None else boxes[:, None],
            input_masks=None if masks is None else masks[:, None],
            multimask_output=is_multimask,
        )
        return output.pred_masks[:, 0], output.iou_scores[:, 0]
