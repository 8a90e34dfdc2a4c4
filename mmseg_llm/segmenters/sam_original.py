"""SAM by the package `segment-anything`. Nothing is imported or loaded before the first image, nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmseg_llm.segmenters.base import RefineError
from mmseg_llm.segmenters.sam_engine import SamEngine, summary

if TYPE_CHECKING:
    from PIL import Image

SamSize = Literal["vit_b", "vit_l", "vit_h"]

# Original files, all under https://dl.fbaipublicfiles.com/segment_anything/.
CHECKPOINTS = {"vit_b": "sam_vit_b_01ec64.pth", "vit_l": "sam_vit_l_0b3195.pth", "vit_h": "sam_vit_h_4b8939.pth"}


class SegmentAnythingEngine(SamEngine):
    """SAM by the package `segment-anything`, from an original checkpoint.

    Args:
        model: `vit_b`, `vit_l` or `vit_h`.
        checkpoint: the `.pth` file.
        device: a GPU where there is one when None.

    Raises:
        ValueError: for an unknown model.
    """

    def __init__(self, model: SamSize = "vit_h", checkpoint: str | None = None, device: str | None = None) -> None:
        super().__init__(device)
        if model not in CHECKPOINTS:
            raise ValueError(f"segment-anything has no model '{model}'; choose from {', '.join(CHECKPOINTS)}")
        self.model = model
        self.checkpoint = checkpoint

    @classmethod
    def of(cls, module: torch.nn.Module, device: str = "cpu") -> SegmentAnythingEngine:
        """An engine around a `segment_anything.modeling.Sam` that is built already."""
        engine = cls(device=device)
        engine.module = module.eval().requires_grad_(False).to(engine.device)
        return engine

    @property
    def image_side(self) -> int:
        """S, 1024 for the released models."""
        return int(self.module.image_encoder.img_size)

    @property
    def mask_side(self) -> int:
        """Side s, 256 for the released models."""
        return int(self.module.prompt_encoder.mask_input_size[0])

    def _load(self) -> torch.nn.Module:
        hint = f"download {CHECKPOINTS[self.model]} from https://github.com/facebookresearch/segment-anything"
        if self.checkpoint is None:
            raise RefineError(f"SAM {self.model} needs its weights; {hint} and set `checkpoint` to the file")
        path = Path(self.checkpoint).expanduser()
        if not path.is_file():
            raise RefineError(f"SAM checkpoint {path} does not exist; {hint} and set `checkpoint` to the file")
        try:
            from segment_anything import sam_model_registry
        except ImportError as error:
            raise RefineError("SAM needs the package segment-anything; `pip install segment-anything`") from error
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            module = sam_model_registry[self.model](checkpoint=None)
            module.load_state_dict(state, strict=True)
        except (RuntimeError, UnpicklingError, EOFError, TypeError) as error:
            raise RefineError(f"SAM checkpoint {path} is no {self.model} ({summary(error)}); {hint}") from error
        return module

    def embed(self, image: Image.Image) -> torch.Tensor:
        """Image embedding `(1, C, S / 16, S / 16)`."""
        return self.module.image_encoder(self.pixels(image))

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
        """See `SamEngine.decode_candidates`."""
        prompt_encoder = self.module.prompt_encoder
        sparse, dense = prompt_encoder(
            points=None if points is None else (points, labels),
            boxes=boxes,
            masks=None if masks is None else masks[:, None],
        )
        return self.module.mask_decoder(
            image_embeddings=embedding,
            image_pe=prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=is_multimask,
        )
