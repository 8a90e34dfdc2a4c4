"""Small samples and models for the tests of the depth head."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from mmseg_llm.backbones import QwenVLBackbone
from mmseg_llm.cameras import Camera
from mmseg_llm.heads.depth_text.head import DepthTextHead
from mmseg_llm.heads.depth_text.prompts import DepthPrompts
from mmseg_llm.model import PerceptionModel
from mmseg_llm.structures import DepthPoint, Query, Sample

SHORT = DepthPrompts(wording="short", thinking=False, digits=2)
CAMERA = Camera(60.0, 58.0, 31.0, 25.5, "planar")


def sample(seed: int = 0, size: tuple[int, int] = (56, 70), count: int = 5, **changes: Any) -> Sample:
    """Noise, with labelled points well inside."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8))
    points = [
        DepthPoint(int(rng.integers(8, size[1] - 8)), int(rng.integers(8, size[0] - 8)), float(rng.uniform(0.5, 20)))
        for _ in range(count)
    ]
    queries = tuple(Query("", points=(point,), task="depth", id=str(i)) for i, point in enumerate(points))
    return Sample(image, size, queries, f"s{seed}", "noise", **{"camera": CAMERA, **changes})


def head(**changes: Any) -> DepthTextHead:
    """For pictures of up to 96 pixels."""
    return DepthTextHead(**{"focal": 64.0, "prompts": SHORT, **changes})


def model(chosen: DepthTextHead, source: str = "qwen2_5_vl-tiny", seed: int = 0) -> PerceptionModel:
    """A tiny random model with this head."""
    torch.manual_seed(seed)
    return PerceptionModel(QwenVLBackbone(source), {"depth": chosen}).eval()
