"""DepthLM checkpoints: full fine-tunes of Pixtral, Qwen2.5-VL or Qwen3-VL without parameters of their own, read and written back.

Weights alone do not say how to ask them: at which focal length pictures are, how pixels are pointed at, how answers read. That is
in `depthlm_config.json` next to them, or in the preset of a released name (DepthLM specification J.6).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from mmseg_llm.backbones.loading import cast, check_type, image_settings, read_settings
from mmseg_llm.backbones.pixtral import PixtralBackbone
from mmseg_llm.backbones.qwen_vl import QwenVLBackbone
from mmseg_llm.cameras import Distance
from mmseg_llm.heads.depth_text.head import DepthTextHead
from mmseg_llm.heads.depth_text.prompts import DepthPrompts, Wording
from mmseg_llm.heads.depth_text.references import MarkerReference
from mmseg_llm.heads.depth_text.views import Geometry
from mmseg_llm.model import PerceptionModel
from mmseg_llm.training.checkpoint import load_model, new_run, save_run
from mmseg_llm.zoo.stamp_adapter import merged_state
from mmseg_llm.zoo.stamp_files import fetch

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone

DEPTHLM_FILE = "depthlm_config.json"
HEAD = "depth_text"
FAMILIES: dict[str, type[PixtralBackbone] | type[QwenVLBackbone]] = {
    "llava": PixtralBackbone,
    "qwen2_5_vl": QwenVLBackbone,
    "qwen3_vl": QwenVLBackbone,
}
"""Backbones by the model type of a config; names of folders say nothing."""
PIXEL_TOKENS = (4, 16384)
"""Bounds of a canvas in tokens where a Qwen folder has no image processor: those of the released processors (section B.4)."""
MAX_NEW_TOKENS = 64
"""An answer of the released models is 34 tokens long; the reference allows 4096 (section C.5)."""

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class DepthLMSettings:
    """How weights want to be asked; the names of `DepthTextHead` and `DepthPrompts`.

    Attributes:
        reference: arrows drawn on the picture, or coordinates in words.
        focal: unified focal length in pixels.
        geometry: arithmetic of the pictures they were trained with.
        distance: what answers are measured along.
        wording: of questions and answers.
        thinking: whether answers say the number in a sentence first.
        decimals, digits: of numbers in answers, behind and before the point.
        marker_size: of arrows.
        cells: steps of coordinates per axis.
    """

    reference: Literal["text", "marker"]
    focal: float
    geometry: Geometry = "legacy"
    distance: Distance = "unspecified"
    wording: Wording = "full"
    thinking: bool = True
    decimals: int = 2
    digits: int = 3
    marker_size: int = 5
    cells: int = 2000

    @classmethod
    def from_json(cls, content: Mapping[str, Any], path: str | Path = DEPTHLM_FILE) -> DepthLMSettings:
        """What a file says; the rest is as the released weights have it.

        Raises:
            ValueError: for a name that is none, a value of another kind, or a missing reference or focal length.
        """
        kinds = get_type_hints(cls)
        for name, value in content.items():
            if name not in kinds:
                raise ValueError(f"{path} has a setting '{name}'; the ones that are known are {', '.join(kinds)}")
            choices = get_args(kinds[name])
            if value not in choices if choices else not _is_kind(value, kinds[name]):
                wanted = f"one of {', '.join(choices)}" if choices else f"of type {kinds[name].__name__}"
                raise ValueError(f"{path} has {name} = {value!r}; it must be {wanted}")
        for name in ("reference", "focal"):
            if name not in content:
                raise ValueError(f"{path} has no {name}; write down how the weights were trained")
        return cls(**content)

    @classmethod
    def of(cls, head: DepthTextHead) -> DepthLMSettings:
        """Those of a head."""
        reference, prompts = head.reference, head.prompts
        is_marker = isinstance(reference, MarkerReference)
        size = {"marker_size": reference.size} if isinstance(reference, MarkerReference) else {"cells": reference.cells}
        return cls(
            reference="marker" if is_marker else "text",
            focal=head.focal,
            geometry=head.geometry,
            distance=head.distance,
            wording=prompts.wording,
            thinking=prompts.thinking,
            decimals=prompts.decimals,
            digits=prompts.digits,
            **size,
        )

    def arguments(self) -> dict[str, Any]:
        """`init_args` of a `DepthTextHead`, as a config names them."""
        content = asdict(self)
        prompts = {name: content.pop(name) for name in ("wording", "thinking", "decimals", "digits")}
        return content | {"prompts": prompts}

    def build(self, max_new_tokens: int = MAX_NEW_TOKENS) -> DepthTextHead:
        """The head.

        Raises:
            ValueError: for a value out of range.
        """
        arguments = self.arguments() | {"max_new_tokens": max_new_tokens}
        return DepthTextHead(**arguments | {"prompts": DepthPrompts(**arguments["prompts"])})


PRESETS = {
    "facebook/DepthLM": DepthLMSettings("marker", 750.0),
    "facebook/VLM3-depth": DepthLMSettings("text", 1000.0),
}
"""Of the released weights: Pixtral 12B with arrows, and Qwen3-VL 4B with coordinates (specification A, B.1, C)."""


def load_depthlm(
    source: str | Path,
    *,
    preset: str | None = None,
    dtype: DType = "bfloat16",
    attention: str = "sdpa",
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> PerceptionModel:
    """DepthLM weights as a model of this library, in evaluation mode; its head is called `depth_text`.

    Args:
        source: folder or hub id in the stock layout, of transformers 4 or 5.
        preset: key of `PRESETS` for weights that do not say how to ask them; unnecessary where the source is one itself, or has a
            `depthlm_config.json`, before which a named preset goes.
        dtype: storage type; the weights are released in bfloat16.
        attention: `sdpa`, `eager` or `flex_attention`.
        max_new_tokens: bound of an answer that is decoded freely.

    Raises:
        ValueError: if the source is no such checkpoint, weights are missing, or nothing says how to ask them.
    """
    folder = fetch(source)
    family = check_type(str(source), read_settings(folder), tuple(FAMILIES))
    settings = _settings(source, folder, preset)
    backbone = FAMILIES[family](
        str(folder),
        dtype=dtype,
        attention=attention,
        **_bounds(folder, family),  # type: ignore[arg-type]
    )
    model = PerceptionModel(backbone, {HEAD: settings.build(max_new_tokens)}).eval()
    cast(model, backbone.model.dtype)  # as run folders are loaded
    return model


def convert_depthlm(
    source: str | Path,
    output: str | Path,
    *,
    preset: str | None = None,
    dtype: DType = "bfloat16",
    attention: str = "sdpa",
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Path:
    """Write DepthLM weights as a run folder, for `Perceiver.from_pretrained`, evaluation and further training.

    To train on, take architecture and vocabulary from the folder, too: `--model.backbone.init_args.source OUTPUT/backbone
    --model.backbone.init_args.weights random --model.initial_weights OUTPUT`.

    Args:
        source: see `load_depthlm`, as all others.
        output: folder to write.

    Returns:
        The folder.

    Raises:
        ValueError: as `load_depthlm`, or if the folder holds a model already.
    """
    folder = new_run(output)
    model = load_depthlm(source, preset=preset, dtype=dtype, attention=attention, max_new_tokens=max_new_tokens)
    head = model.head(HEAD)
    assert isinstance(head, DepthTextHead)
    geometry = model.backbone.codec.geometry
    bounds = {
        name: getattr(geometry, name)
        for name in ("min_pixels", "max_pixels", "max_side")
        if getattr(geometry, name) is not None
    }
    arguments = {"source": str(source), "dtype": dtype, "attention": attention, **bounds}
    backbone = {"class_path": f"mmseg_llm.backbones.{type(model.backbone).__name__}", "init_args": arguments}
    asked = DepthLMSettings.of(head).arguments() | {"max_new_tokens": head.max_new_tokens}
    chosen = {"class_path": "mmseg_llm.heads.DepthTextHead", "init_args": asked}
    return save_run(model, folder, {"backbone": backbone, "heads": {HEAD: chosen}})


def export_depthlm(run: str | Path, output: str | Path) -> Path:
    """Write a run with a `depth_text` head as a folder that plain transformers loads, adapters merged, with
    `depthlm_config.json` next to the weights.

    Args:
        run: folder that training or `convert_depthlm` wrote.
        output: folder to write.

    Returns:
        The folder.

    Raises:
        ValueError: if the run has no such head or another kind of backbone, or the folder holds a model already.
    """
    folder = Path(output)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} already holds a config.json; choose another output folder")
    model = load_model(run)
    heads = [head for head in model.heads.values() if isinstance(head, DepthTextHead)]
    backbone = model.backbone
    family = backbone.model.config.model_type
    if not heads or FAMILIES.get(family) is not type(backbone):
        raise ValueError(
            f"{run} has the heads {', '.join(model.heads)} on a {type(backbone).__name__} of type '{family}'; DepthLM is a "
            "depth_text head on Pixtral, Qwen2.5-VL or Qwen3-VL"
        )
    folder.mkdir(parents=True, exist_ok=True)
    backbone.model.save_pretrained(folder, state_dict=merged_state(backbone.model))
    _save_processor(backbone, folder)
    content = asdict(DepthLMSettings.of(heads[0]))
    (folder / DEPTHLM_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder


def _is_kind(value: Any, kind: type) -> bool:
    """Whether a JSON value is of a type; whole numbers are numbers, truth values are not."""
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)


def _settings(source: str | Path, folder: Path, preset: str | None) -> DepthLMSettings:
    """How the weights in a folder want to be asked."""
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"unknown preset '{preset}'; use one of {', '.join(PRESETS)}")
        return PRESETS[preset]
    if (folder / DEPTHLM_FILE).is_file():
        return DepthLMSettings.from_json(read_settings(folder, DEPTHLM_FILE), folder / DEPTHLM_FILE)
    if str(source) in PRESETS:
        return PRESETS[str(source)]
    raise ValueError(
        f"nothing says how the weights in {source} want to be asked, and a wrong focal length would scale all metres; name a "
        f"preset ({', '.join(PRESETS)}), or put a {DEPTHLM_FILE} with reference and focal next to them"
    )


def _bounds(folder: Path, family: str) -> dict[str, int]:
    """Bounds of a canvas where a folder says nothing of its image processor; Pixtral's are in its config."""
    if family == "llava" or image_settings(folder):
        return {}
    from transformers import AutoConfig

    vision = AutoConfig.from_pretrained(folder).vision_config
    side = vision.patch_size * vision.spatial_merge_size
    low, high = (tokens * side**2 for tokens in PIXEL_TOKENS)
    return {"min_pixels": low, "max_pixels": high}


def _save_processor(backbone: Backbone, folder: Path) -> None:
    """Tokenizer and image processor under the names that transformers reads."""
    import transformers

    codec, geometry = backbone.codec, backbone.codec.geometry
    means = {"image_mean": list(geometry.mean), "image_std": list(geometry.std)}
    codec.tokenizer.save_pretrained(folder)
    if isinstance(backbone, PixtralBackbone):
        patch = {"height": geometry.patch, "width": geometry.patch}
        images = transformers.PixtralImageProcessor(patch_size=patch, size={"longest_edge": geometry.max_side}, **means)
        processor = transformers.PixtralProcessor(images, codec.tokenizer, patch_size=geometry.patch)
        processor.save_pretrained(folder)
        return
    size = {"shortest_edge": geometry.min_pixels, "longest_edge": geometry.max_pixels}
    images = transformers.Qwen2VLImageProcessor(
        patch_size=geometry.patch, merge_size=geometry.merge, size=size, **means
    )
    images.save_pretrained(folder)
